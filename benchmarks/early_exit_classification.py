"""Classification that leaves early against transformers' whole pass, at an accuracy within one point of it.

python benchmarks/early_exit_classification.py --json [--studies FOLDER] [--width 384] [--seed 0] [--runs 7]

The network is that of `palimpsest studies run consistentee` but wider, since in one of width 128 Python takes longer
than arithmetic: six blocks that learned to hop along a permutation, with questions of 0 to 5 hops and a tenth that
nothing answers. It is trained if it is not in the folder (some half an hour of processor time). What is fair was
settled like this:

- The network and its heads are trained as long as the study's, then stay as they are; the policy is trained after the
  fact, and its price is chosen on 16,384 held-out questions as the dearest whose drop is shown to be below one point.
- The peer is transformers' own forward pass of the same network, in batches of the same rows, with our last head.
- Both sides are run in turn on other questions. `accuracy` is each side's there; `agreement` is the largest difference
  between the logits of the whole pass, ours block by block and transformers'.
- `entropy` is our own loop with a threshold on the entropy that was chosen on the same held-out questions.
- `foretold` is what the parts say, timed on exits that have learned nothing: if all rows left after so many blocks, a
  policy being asked on the way, and for the exits that were taken. Beside it what was measured, in turn.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import torch
import transformers
from harness import report

from palimpsest.data.batches import Encoded, batches
from palimpsest.early_exit.bench import Planned, break_even, costs, predicted
from palimpsest.early_exit.classifier import ExitClassifier
from palimpsest.early_exit.heads import pooled, read_at
from palimpsest.early_exit.policy_training import PolicySettings
from palimpsest.early_exit.rules import Confident, Fixed, Rule, exits_by, thresholds
from palimpsest.studies.consistentee_cells import Asked, Networks, Sizes

Side = Callable[[], torch.Tensor]
"""Gives [N, C] logits."""
MAX_DROP = 0.01
HELD_OUT = 16_384
"""A third is beyond the network, which guesses otherwise at every exit: few questions would show no small drop."""
PRICES = (0.02, 3.0)


def main() -> None:
    """Run the sides in turn at both batch sizes, and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the only output there is; accepted for uniformity")
    parser.add_argument("--studies", type=Path, default=Path("runs/studies/consistentee"))
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, action="append")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = Sizes(held_out=HELD_OUT, width=arguments.width)
    folder = arguments.studies if sizes.width == Sizes().width else arguments.studies / f"width-{sizes.width}"
    networks = Networks(arguments.seed, folder / f"seed-{arguments.seed}", sizes)
    exits = networks.first_stage()
    exits.fit_policy(networks.for_policies.examples, PolicySettings(prices=PRICES, seed=arguments.seed))
    choose, tell = networks.held_out
    point = exits.calibrate(choose.examples, max_drop=MAX_DROP)
    entropy = _entropy(exits, choose)
    few = tell.examples.take(range(arguments.rows))
    for batch_size in arguments.batch_size or (1, 16):
        untrained = ExitClassifier.of(exits.model, exits.classes, exits.layers)
        parts = costs(untrained, few.rows, batch_size)
        planned = {
            f"all after {layer}": Planned(exits.rule, (*[0.0] * exit, 1.0))
            for exit, layer in enumerate(exits.layers[:-1])
        }
        rules: dict[str, Rule] = {"ours": exits.rule, "entropy": entropy} | planned
        sides: dict[str, Side] = {
            name: partial(_labelled, exits, few.rows, batch_size, rule) for name, rule in rules.items()
        }
        sides["transformers"] = partial(_whole, exits, few.rows, batch_size)
        sides["block by block"] = partial(_labelled, exits.only_last(), few.rows, batch_size, Fixed())
        seconds, said = _in_turn(sides, arguments.runs)
        found = exits.classify(few.rows, batch_size=batch_size)
        order = [row for batch in batches(few.rows, batch_size=batch_size) for row in batch.rows]
        foretold = {f"all after {layer}": ratio for layer, ratio in break_even(parts).items()}
        early = predicted(parts, found.layers[order].tolist(), batch_size)
        foretold["ours"] = parts.whole[-1] / batch_size / early
        report(
            f"{arguments.rows} questions of 9 tokens, {batch_size} at a time, a Llama of {exits.stack.n_layers} blocks "
            f"of width {sizes.width}",
            f"transformers {transformers.__version__}, all blocks",
            seconds["ours"],
            seconds["transformers"],
            float((said["block by block"] - said["transformers"]).abs().max()),
            threads=arguments.threads,
            milliseconds={name: 1000 * median(values) / arguments.rows for name, values in seconds.items()},
            accuracy={
                name: float((said[name].argmax(-1) == few.labels).float().mean())
                for name in ("ours", "entropy", "transformers")
            },
            blocks={"ours": float(found.layers.float().mean()), "transformers": exits.stack.n_layers},
            entropy_to_ours=_ratio(seconds["entropy"], seconds["ours"]),
            foretold={
                name: _foretold(foretold[name], _ratio(seconds["block by block"], seconds[name]))
                for name in ("ours", *planned)
            },
            parts=asdict(parts),
            held_out=asdict(point),
        )


def _labelled(exits: ExitClassifier, rows: Sequence[Encoded], batch_size: int, rule: Rule) -> torch.Tensor:
    return exits.classify(rows, rule=rule, batch_size=batch_size).logits


def _ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    return median(one / other for one, other in zip(slow, fast, strict=True))


def _foretold(predicted: float, measured: float) -> dict[str, float]:
    return {"predicted": predicted, "measured": measured, "error": predicted / measured - 1}


def _entropy(exits: ExitClassifier, choose: Asked) -> Rule:
    """The threshold that takes fewest blocks at an accuracy within the allowed drop, where it is chosen."""
    table = exits.table(choose.examples, batch_size=512)
    least = table.accuracy(exits_by(Fixed(), table)) - MAX_DROP
    rules = [Confident("entropy", threshold) for threshold in thresholds("entropy", table)]
    tried = [(exits_by(rule, table), rule) for rule in rules]
    kept = [(table.mean_layers(left), rule) for left, rule in tried if table.accuracy(left) >= least]
    return min(kept, key=lambda one: one[0])[1]


@torch.inference_mode()
def _whole(exits: ExitClassifier, rows: tuple, batch_size: int) -> torch.Tensor:
    """Transformers' own pass, then the last head."""
    found = torch.zeros(len(rows), exits.heads.n_classes)
    last = len(exits.layers) - 1
    blocks = exits.stack.network.base_model
    seen: list[torch.Tensor] = []
    # Our heads read what the last block gives, before the network's final norm.
    handle = exits.stack.blocks[-1].register_forward_hook(lambda *given: seen.append(given[2]))
    for batch in batches(rows, batch_size=batch_size):
        blocks(input_ids=batch.ids, attention_mask=batch.attention.long(), use_cache=False)
        output = seen.pop()
        hidden = output[0] if isinstance(output, tuple) else output
        found[list(batch.rows)] = exits.heads.at(last, pooled(hidden, read_at(batch.attention, True)))
    handle.remove()
    return found


def _in_turn(sides: dict[str, Side], runs: int) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    said = {name: side() for name, side in sides.items()}  # and warm up
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - start)
    return seconds, said


if __name__ == "__main__":
    main()
