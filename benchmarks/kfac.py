"""EK-FAC of a Llama with random weights: RetainCurvature against kronfluence.

python benchmarks/kfac.py --json [--size tiny|small|gpt2] [--runs 5] [--threads 1]

The same weights, packed rows, matrices, batch size, fp32 and threads on both sides, each fit in a process of its own,
the sides in turn. What is fair was settled like this:

- Both take the true Fisher of the *same* sampled labels. Ours draws them while it fits; kronfluence is given them, and
  so is spared the sampling.
- kronfluence is given each row without its last token, which predicts nothing, so that it needs no mask and computes no
  position in vain.
- kronfluence runs as its defaults are, except that eigenvectors are found in fp32 as ours are, not in fp64. Its time is
  that of its three stages; the files it writes and reads between them are not counted.
- `memory` is the peak of the fit above what the process held before it (interpreter, libraries, weights): resident
  memory, or torch's own allocations on a GPU. `process` compares the whole peaks. Needs Linux for want of a GPU.
- `agreement` is the largest relative difference of a matrix (Frobenius) over A, S and Lambda. Eigenvectors are not
  unique, so Lambda is compared in kronfluence's basis; and kronfluence divides it by rows, we by targets.
- `gemm_share` is the rate of matrix products in ours (forward, backward, Gram products and, for Lambda, rotations; as
  executed, attention and eigenvectors left out) over the rate of one large torch product on as many threads.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import peer_packages, report
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from usage import DEVICE, Stopwatch, now, peak_memory

from palimpsest.curvature import curvature
from palimpsest.curvature.blocks import Block
from palimpsest.curvature.curvature import RetainCurvature
from palimpsest.curvature.factors import collect_factors
from palimpsest.curvature.modules import Matrix, matrices, shared_inputs
from palimpsest.curvature.moments import collect_moments
from palimpsest.curvature.taps import sampled_label_gradient, uniforms
from palimpsest.data.batches import Encoded, batches
from palimpsest.models.anatomy import Anatomy
from palimpsest.models.language_model import LanguageModel, evaluating
from palimpsest.models.scoring import predict
from palimpsest.models.tokenizers import word_tokenizer
from palimpsest.models.workers import Workers
from palimpsest.progress import Ticker

SEED, BATCH = 0, 8
STAGES = {
    "ours": {"covariance": "collect_factors", "eigendecomposition": "kfac_blocks", "lambda": "collect_moments"},
    "kronfluence": {
        "covariance": "Fit Covariance",
        "eigendecomposition": "Perform Eigendecomposition",
        "lambda": "Fit Lambda",
    },
}
"""What each side calls the stages."""


@dataclass(frozen=True)
class Size:
    """A Llama and the packed rows it reads."""

    layers: int
    width: int
    mlp_width: int
    heads: int
    vocabulary: int
    rows: int
    length: int


SIZES = {
    "tiny": Size(layers=2, width=64, mlp_width=176, heads=4, vocabulary=512, rows=32, length=64),
    "small": Size(layers=2, width=512, mlp_width=1408, heads=8, vocabulary=8192, rows=32, length=256),
    "gpt2": Size(layers=12, width=768, mlp_width=2048, heads=12, vocabulary=50257, rows=256, length=512),
}


def main() -> None:
    """Compare, or be one of the processes of a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the only output there is; accepted for uniformity")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](SIZES[arguments.size], arguments.folder)))
    else:
        _compare(arguments.size, arguments.runs, arguments.threads)


def _compare(size: str, runs: int, threads: int) -> None:
    overlay = peer_packages("kfac-requirements.txt")

    def part(name: str, folder: Path) -> dict[str, Any]:
        command = [sys.executable, "-W", "ignore", __file__, f"--part={name}", f"--folder={folder}", f"--size={size}"]
        environment = os.environ | ({"PYTHONPATH": str(overlay)} if name == "kronfluence" else {})
        done = subprocess.run([*command, f"--threads={threads}"], env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{name}: its process ended with {done.returncode}; what it said is above")
        return json.loads(done.stdout.splitlines()[-1])

    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        part("labels", folder)
        for run in range(runs):
            ours.append(part("ours", folder))
            theirs.append(part("kronfluence", folder))
            seconds = f"ours {ours[-1]['seconds']:.1f} s, kronfluence {theirs[-1]['seconds']:.1f} s"
            print(f"run {run + 1}/{runs}: {seconds}", file=sys.stderr)
        check = part("agreement", folder)
    _report(SIZES[size], ours, theirs, check)


def _report(size: Size, ours: list[dict[str, Any]], theirs: list[dict[str, Any]], check: dict[str, Any]) -> None:
    def middle(side: list[dict[str, Any]], key: str) -> dict[str, float]:
        return {name: round(median(run[key][name] for run in side), 3) for name in side[0][key]}

    def ratio(key: str) -> float:
        return round(median(run["memory"][key] for run in ours) / median(run["memory"][key] for run in theirs), 3)

    shares = {
        stage: round(median(flops / run["stages"][stage] / run["gemm"] for run in ours), 3)
        for stage, flops in check["flops"].items()
    }
    shape = f"{size.layers} layers of width {size.width}, MLP {size.mlp_width}"
    report(
        f"EK-FAC of a Llama, {shape}, {size.rows} rows of {size.length} tokens, fp32, {DEVICE}",
        "kronfluence 1.0.1",
        [run["seconds"] for run in ours],
        [run["seconds"] for run in theirs],
        max(check["differences"].values()),
        differences=check["differences"],
        stages={"ours": middle(ours, "stages"), "peer": middle(theirs, "stages")},
        cpu_seconds_ratio=round(median(t["cpu"] / o["cpu"] for o, t in zip(ours, theirs, strict=True)), 3),
        memory={
            "ratio": ratio("fit"),
            "process": ratio("process"),
            "ours": middle(ours, "memory"),
            "peer": middle(theirs, "memory"),
        },
        gemm_share=shares,
        gemm_gflops=round(median(run["gemm"] for run in ours) / 1e9, 1),
    )


def _model(size: Size) -> LanguageModel:
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.mlp_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.length,
        tie_word_embeddings=False,
    )
    torch.manual_seed(SEED)
    network = LlamaForCausalLM(config).to(DEVICE).eval()
    return LanguageModel(network, word_tokenizer(["never asked"]), Anatomy.of(network))


def _rows(size: Size) -> list[Encoded]:
    """Packed rows of tokens as frequent as Zipf has it."""
    frequency = 1 / torch.arange(1, size.vocabulary + 1)
    draws = torch.multinomial(
        frequency, size.rows * size.length, replacement=True, generator=torch.Generator().manual_seed(SEED)
    )
    return [Encoded(tuple(row), 1, size.length) for row in draws.view(size.rows, size.length).tolist()]


def _labels(size: Size, folder: Path) -> dict[str, Any]:
    """The labels that ours samples, [rows, length - 1], into a file: p - onehot(label) is least at the label."""
    model, rows = _model(size), _rows(size)
    labels = torch.empty(size.rows, size.length - 1, dtype=torch.long)
    with evaluating(model) as network:
        for batch in batches(rows, batch_size=BATCH):
            logits = predict(network, batch.to(model.device)).logits
            gradient = sampled_label_gradient(logits, uniforms(batch, SEED))
            labels[list(batch.rows)] = gradient.argmin(1).view(len(batch.rows), -1).cpu()
    save_file({"labels": labels}, folder / "labels.safetensors")
    return {}


def _ours(size: Size, _: Path) -> dict[str, Any]:
    fit = partial(RetainCurvature.fit, kind="ekfac", seed=SEED, batch_size=BATCH, quiet=True)
    fit(_model(SIZES["tiny"]), _rows(SIZES["tiny"]))  # so that nothing is made ready in what is timed
    model, rows, clock = _model(size), _rows(size), Stopwatch()
    for stage, name in STAGES["ours"].items():
        setattr(curvature, name, clock.profile(stage)(getattr(curvature, name)))
    with peak_memory() as memory, clock.profile("fit"):
        fit(model, rows)
    return {
        "seconds": clock.wall.pop("fit"),
        "cpu": clock.cpu.pop("fit"),
        "stages": clock.wall,
        "memory": memory,
        "gemm": _gemm_rate(),
    }


def _kronfluence(size: Size, folder: Path) -> dict[str, Any]:
    """Its fit of all three stages; the first run's factors stay in the folder."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class LanguageModelling(Task):
        def __init__(self, modules: list[str]) -> None:
            self.modules = modules

        def compute_train_loss(self, batch: dict[str, Tensor], model: torch.nn.Module, sample: bool = False) -> Tensor:
            logits = model(input_ids=batch["ids"], use_cache=False).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")

        def compute_measurement(self, batch: dict[str, Tensor], model: torch.nn.Module) -> Tensor:
            raise NotImplementedError

        def get_influence_tracked_modules(self) -> list[str]:
            return self.modules

    def analyzer(size: Size, name: str) -> Analyzer:
        model = _model(size)
        task = LanguageModelling([matrix.name for matrix in matrices(model)])
        network = prepare_model(model.network, task)
        return Analyzer(name, network, task, cpu=DEVICE == "cpu", disable_tqdm=True, output_dir=str(folder))

    def fit(analyzer: Analyzer, size: Size, labels: Tensor) -> None:
        inputs = torch.tensor([row.ids[:-1] for row in _rows(size)])
        dataset = [{"ids": ids, "labels": row} for ids, row in zip(inputs, labels, strict=True)]
        arguments = FactorArguments(strategy="ekfac", eigendecomposition_dtype=torch.float32)
        analyzer.fit_all_factors("ekfac", dataset, BATCH, factor_args=arguments, overwrite_output_dir=True)

    tiny = SIZES["tiny"]
    fit(analyzer(tiny, "warm"), tiny, torch.zeros(tiny.rows, tiny.length - 1, dtype=torch.long))
    timed, labels, clock = analyzer(size, "timed"), load_file(folder / "labels.safetensors")["labels"], Stopwatch()
    timed.profiler = clock
    with peak_memory() as memory:
        fit(timed, size, labels)
    stages = {stage: clock.wall[name] for stage, name in STAGES["kronfluence"].items()}
    cpu = sum(clock.cpu[name] for name in STAGES["kronfluence"].values())
    return {"seconds": sum(stages.values()), "cpu": cpu, "stages": stages, "memory": memory}


def _agreement(size: Size, folder: Path) -> dict[str, Any]:
    """How far our factors are from those that kronfluence left in the folder, and what products ours take."""
    theirs: dict[str, dict[str, Tensor]] = {
        path.stem: load_file(path, device=DEVICE) for path in (folder / "timed" / "factors_ekfac").glob("*.safetensors")
    }
    model, rows = _model(size), _rows(size)
    chosen = matrices(model)
    owners = shared_inputs(model, chosen)
    how: dict[str, Any] = {"seed": SEED, "draws": 1, "batch_size": BATCH, "workers": Workers()}
    n_tokens = size.rows * size.length
    with _flops() as covariance:
        factors = collect_factors(model, rows, chosen, owners, **how, ticker=Ticker(None, "", n_tokens, ""))
    basis = {
        matrix.name: Block(
            theirs["gradient_eigenvectors"][matrix.name],
            theirs["activation_eigenvectors"][matrix.name],
            torch.empty(0),
        )
        for matrix in chosen
    }
    with _flops() as lambdas:
        moments = collect_moments(model, rows, chosen, basis, **how, ticker=Ticker(None, "", n_tokens, ""))

    def apart(mine: Callable[[Matrix], Tensor], sums: str, counts: str, unit: float = 1.0) -> float:
        differences = []
        for matrix in chosen:
            expected = theirs[sums][matrix.name].double() / theirs[counts][matrix.name].double() * unit
            difference = torch.linalg.matrix_norm(mine(matrix).double() - expected)
            differences.append((difference / torch.linalg.matrix_norm(expected)).item())
        return max(differences)

    rows_a_target = size.rows / sum(row.n_targets for row in rows)
    return {
        "differences": {
            "A": apart(
                lambda matrix: factors.inputs[owners[matrix.name]],
                "activation_covariance",
                "num_activation_covariance_processed",
            ),
            "S": apart(
                lambda matrix: factors.outputs[matrix.name],
                "gradient_covariance",
                "num_gradient_covariance_processed",
            ),
            "Lambda": apart(
                lambda matrix: moments[matrix.name], "lambda_matrix", "num_lambda_processed", rows_a_target
            ),
        },
        "flops": {"covariance": covariance.get_total_flops(), "lambda": lambdas.get_total_flops()},
    }


def _flops() -> FlopCounterMode:
    """Counts products in place too, which torch's own counter leaves out."""

    def addmm(total: Any, left: torch.Size, right: torch.Size, **_: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm})


def _gemm_rate() -> float:
    """FLOP/s of one large fp32 product."""
    width = 8192 if DEVICE == "cuda" else 2048
    left, right = torch.randn(2, width, width, device=DEVICE)
    seconds = []
    for _ in range(6):
        started = now()
        left @ right
        seconds.append(now() - started)
    return 2 * width**3 / median(seconds[1:])


PARTS = {"labels": _labels, "ours": _ours, "kronfluence": _kronfluence, "agreement": _agreement}

if __name__ == "__main__":
    main()
