"""The paired layout of the regression transformer against the interleaved one: same size, same prompts, same steps.

The two are different networks, so `agreement` is how far apart their losses are after these steps, and no bar.

python benchmarks/regression_layout.py --json
python benchmarks/regression_layout.py --setting paper --device cuda --json
"""

import argparse
import statistics
from dataclasses import replace

import torch
from harness import in_turn, report
from torch import Tensor

from palimpsest.models.regression_transformer import (
    Layout,
    RegressionTransformer,
    predict_regression,
    train_regression,
)
from palimpsest.studies.implicit_inference_cells import SETTINGS
from palimpsest.worlds.regression import Gaussian, sample_prompts

STEPS, RUNS = 40, 5


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the only output there is; accepted for uniformity")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--setting", choices=list(SETTINGS), default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    setting = SETTINGS[arguments.setting]
    size, prior = setting.architecture, Gaussian(setting.architecture.dim)
    training = replace(setting.pretraining, steps=arguments.steps, warmup=arguments.steps // 4)
    batches = [
        sample_prompts(prior, training.batch_size, size.points, setting.noise, n) for n in range(arguments.steps)
    ]
    unseen = sample_prompts(prior, 500, size.points, setting.noise, arguments.steps)
    parameters: dict[str, int] = {}

    def loss(layout: Layout) -> float:
        network = RegressionTransformer(replace(size, layout=layout), 0).to(arguments.device)
        parameters[layout] = sum(value.numel() for value in network.parameters())
        train_regression(network, batch_at, training)
        return unseen.squared_errors(predict_regression(network, unseen.x, unseen.y)).mean().item()

    def batch_at(step: int) -> tuple[Tensor, Tensor]:
        return batches[step].x, batches[step].y

    ours, theirs, agreement = in_turn(lambda: loss("paired"), lambda: loss("interleaved"), runs=RUNS)
    report(
        f"{arguments.steps} steps of {training.batch_size} prompts of {size.points} pairs, "
        f"{size.layers} layers of width {size.width}",
        "the interleaved layout (Garg et al. 2022)",
        ours,
        theirs,
        agreement,
        parameters=parameters,
        steps_per_second=round(arguments.steps / statistics.median(ours), 1),
        device=arguments.device,
    )


if __name__ == "__main__":
    main()
