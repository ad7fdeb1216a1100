"""Where a Llama's knowledge is recovered, layer by layer: our sweep against one run with hooks after the other.

python benchmarks/patching.py --json [--size tiny|small|short_answers] [--runs 5] [--threads 1]

Two Llamas with random weights stand for the original and the unlearned model. Every layer's coefficients, attention and
residual stream are patched one at a time, at all tokens, and every layer's value matrix is restored; the result is the
Knowledge Recovery Score of each. What is fair was settled like this:

- The peer is TransformerLens as it is used: the original is run with a cache of the sites, then `run_with_hooks` once
  for each patch, and once with each copied matrix, all rows in one batch. Its bridge loads the same folders in fp32.
- Both sides read the same token ids, all of one length so that neither computes padding, with answers of one length.
- `plain_hooks` is a second peer: the same with torch's own hooks on transformers' own model. Its ratio is what is due
  to our beginning at the patched layer and computing no logits but the answer's; the rest is TransformerLens's own.
- `flops` is our share of the matrix products that `plain_hooks` makes, as torch's FlopCounterMode counts them.
- `cpu` are ratios of processor time, which other load on the machine moves less. Loading is not counted.
- `agreement` is the largest difference of a score.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from harness import peer_packages, report
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from palimpsest.data.batches import Encoded
from palimpsest.internals.patching import window_plans
from palimpsest.internals.recovery import patching_recovery
from palimpsest.internals.restoration import restoration_recovery, restoration_windows
from palimpsest.models.anatomy import Anatomy, Kind
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.tokenizers import word_tokenizer

KINDS: tuple[Kind, ...] = ("coef", "attn", "resid")
NAMES = {"coef": "mlp.out.hook_in", "attn": "attn.o.hook_out", "resid": "hook_out"}
"""TransformerLens's for our sites."""


@dataclass(frozen=True)
class Size:
    """A Llama, and questions with their answers."""

    layers: int
    width: int
    mlp_width: int
    heads: int
    vocabulary: int
    rows: int
    length: int
    answer: int
    """Tokens of each row that are its answer."""


SIZES = {
    "tiny": Size(layers=4, width=64, mlp_width=176, heads=4, vocabulary=512, rows=4, length=24, answer=4),
    "small": Size(layers=8, width=256, mlp_width=704, heads=8, vocabulary=8192, rows=10, length=60, answer=20),
    "short_answers": Size(layers=8, width=256, mlp_width=704, heads=8, vocabulary=50304, rows=10, length=60, answer=5),
}
Sweep = Callable[[], Tensor]
"""Gives [layers * (sites + 1)] scores."""


def main() -> None:
    """Run the sides in turn, and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the only output there is; accepted for uniformity")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    size = SIZES[arguments.size]
    original, unlearned, rows = _model(size, 0), _model(size, 1), _rows(size)
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, Sweep] = {
            "ours": lambda: _ours(original, unlearned, rows),
            "transformer_lens": _transformer_lens(original, unlearned, rows, Path(folder)),
            "plain_hooks": lambda: _plain_hooks(original, unlearned, rows),
        }
        wall, cpu, difference = _in_turn(sides, arguments.runs)
        products = {name: _flops(sides[name]) for name in ("ours", "plain_hooks")}
    report(
        f"{size.layers} layers x 3 sites patched and {size.layers} value matrices restored in a Llama of width "
        f"{size.width}, {size.rows} rows of {size.length} tokens",
        "transformer-lens 4.3.0",
        wall["ours"],
        wall["transformer_lens"],
        difference,
        plain_hooks=_ratio(wall, "plain_hooks"),
        flops=products["ours"] / products["plain_hooks"],
        cpu={name: _ratio(cpu, name) for name in ("transformer_lens", "plain_hooks")},
    )


def _model(size: Size, seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.mlp_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.length,
        initializer_range=0.05,
    )
    network = LlamaForCausalLM(config).eval()
    words = word_tokenizer([" ".join(f"w{number}" for number in range(size.vocabulary - 8))])
    return LanguageModel(network, words, Anatomy.of(network), f"seed {seed}")


def _rows(size: Size) -> list[Encoded]:
    ids = torch.randint(size.vocabulary, (size.rows, size.length), generator=torch.Generator().manual_seed(2))
    return [Encoded(tuple(row.tolist()), size.length - size.answer, size.length) for row in ids]


def _ours(original: LanguageModel, unlearned: LanguageModel, rows: list[Encoded]) -> Tensor:
    plans = [plan for kind in KINDS for plan in window_plans(unlearned.anatomy, (kind,), 1)]
    patching = patching_recovery(original, unlearned, rows, plans)
    restoring = restoration_recovery(original, unlearned, rows, restoration_windows(unlearned.anatomy, "value", 1))
    return torch.tensor([recovery.krs for recovery in (*patching, *restoring)])


def _transformer_lens(original: LanguageModel, unlearned: LanguageModel, rows: list[Encoded], folder: Path) -> Sweep:
    sys.path.append(str(peer_packages("patching-requirements.txt")))
    from transformer_lens.model_bridge import TransformerBridge

    donor, model = (
        TransformerBridge.boot_transformers(str(one.save(folder / one.name)), device="cpu")
        for one in (original, unlearned)
    )
    ids, layers = torch.tensor([row.ids for row in rows]), range(unlearned.anatomy.n_layers)
    answers = slice(rows[0].start - 1, rows[0].stop - 1)

    @torch.inference_mode()
    def sweep() -> Tensor:
        sites = [f"blocks.{layer}.{NAMES[kind]}" for kind in KINDS for layer in layers]
        goal, cache = donor.run_with_cache(ids, names_filter=lambda name: name in sites, prepend_bos=False)
        goal = goal[:, answers]
        before = _loss(model(ids, prepend_bos=False)[:, answers], goal)
        after = []
        for site in sites:
            hook = (site, lambda activation, hook: cache[hook.name])
            after.append(_loss(model.run_with_hooks(ids, fwd_hooks=[hook], prepend_bos=False)[:, answers], goal))
        for layer in layers:
            with _copied(_value(donor, layer), _value(model, layer)):
                after.append(_loss(model(ids, prepend_bos=False)[:, answers], goal))
        return _scores(before, after)

    return sweep


def _value(bridge: Any, layer: int) -> Tensor:
    """The weight of a bridged value matrix."""
    weight: Tensor = bridge.blocks[layer].mlp.out.original_component.weight
    return weight


@torch.inference_mode()
def _plain_hooks(original: LanguageModel, unlearned: LanguageModel, rows: list[Encoded]) -> Tensor:
    ids, answers = torch.tensor([row.ids for row in rows]), slice(rows[0].start - 1, rows[0].stop - 1)
    sites = [site for kind in KINDS for site in unlearned.anatomy.sites(kind)]
    kept: dict[int, Tensor] = {}
    handles = []
    for place, site in enumerate(sites):
        module = original.anatomy.module(site)
        if site.is_input:
            keep = lambda _, inputs, place=place: kept.update({place: inputs[0]})  # noqa: E731
            handles.append(module.register_forward_pre_hook(keep))
        else:
            keep = lambda _, __, output, place=place: kept.update({place: output})  # noqa: E731
            handles.append(module.register_forward_hook(keep))
    goal = original.network(ids, use_cache=False).logits[:, answers]
    for handle in handles:
        handle.remove()

    def predicted() -> Tensor:
        return _loss(unlearned.network(ids, use_cache=False).logits[:, answers], goal)

    before, after = predicted(), []
    for place, site in enumerate(sites):
        module = unlearned.anatomy.module(site)
        if site.is_input:
            handle = module.register_forward_pre_hook(lambda *_, place=place: (kept[place],))
        else:
            handle = module.register_forward_hook(lambda *_, place=place: kept[place])
        after.append(predicted())
        handle.remove()
    for theirs, own in zip(original.anatomy.value_matrices, unlearned.anatomy.value_matrices, strict=True):
        with _copied(theirs.get_parameter("weight"), own.get_parameter("weight")):
            after.append(predicted())
    return _scores(before, after)


@contextmanager
def _copied(given: Tensor, weight: Tensor) -> Iterator[None]:
    """One weight with another's values, and its own after."""
    own = weight.clone()
    weight.data.copy_(given)
    yield
    weight.data.copy_(own)


def _loss(logits: Tensor, goal: Tensor) -> Tensor:
    """[B] mean squared difference."""
    return (logits - goal).square().mean((1, 2))


def _scores(before: Tensor, after: list[Tensor]) -> Tensor:
    return torch.stack([(1 - losses / before).mean() for losses in after])


def _in_turn(sides: dict[str, Sweep], runs: int) -> tuple[dict[str, list[float]], dict[str, list[float]], float]:
    """Seconds and processor seconds of each run of each side, and the largest difference of a score from ours."""
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    difference = 0.0
    for _ in range(runs):
        scores = {}
        for name, sweep in sides.items():
            started, worked = time.perf_counter(), os.times()
            scores[name] = sweep()
            now = os.times()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(now.user + now.system - worked.user - worked.system)
        difference = max(difference, *(float((scores[name] - scores["ours"]).abs().max()) for name in sides))
    return wall, cpu, difference


def _flops(sweep: Sweep) -> int:
    """Of a sweep's matrix products."""
    with FlopCounterMode(display=False) as counter:
        sweep()
    return counter.get_total_flops()


def _ratio(seconds: dict[str, list[float]], peer: str) -> dict[str, float]:
    ratios = [theirs / mine for mine, theirs in zip(seconds["ours"], seconds[peer], strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


if __name__ == "__main__":
    main()
