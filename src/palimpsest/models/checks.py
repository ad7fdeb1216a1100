"""The anatomy's numeric self-checks: cheap enough to run at every load, and able to fail.

Two rows of four tokens, four forward passes: a reading one, one with many plans stacked, and two plans one by one.
Differences are relative: the largest absolute difference over the largest absolute value.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from palimpsest.errors import ModelError
from palimpsest.models.anatomy import Anatomy, Site
from palimpsest.models.hooks import Patch, capturing, patched, stacked

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Room for rounding alone: a matrix product may sum in another order when its batch has another size."""


def check(anatomy: Anatomy, network: PreTrainedModel) -> None:
    """Read and patch a tiny input in eval mode, and check the following.

    0. Each part is used once and in its place (a part of another layer would pass all the rest).
    1. Patching every site of a kind with its own activations leaves the logits alone.
    2. Many plans stacked in one pass give what they give one by one, and each of them does change the logits.
    3. Each value matrix, as the anatomy reads it, turns its coefficients into its output.
    4. Final norm and unembedding turn the last block's output into the logits, up to a known scale and cap.
    5. Afterwards weights and hooks are as they were.
    6. The last block's output was read before the final norm (`hidden_states[-1]` is after it in every family).

    Raises:
        ModelError: names the check that failed, and by how much.
    """
    was_training, before = network.training, _state(network)
    network.eval()
    try:
        with torch.inference_mode():
            ids = _tiny_input(network)
            logits, store = _check_reading(anatomy, network, ids)
            _check_patching(anatomy, network, ids, logits, store)
    finally:
        network.train(was_training)
    if _state(network) != before:
        raise _failure(anatomy, "5, patch and undo", "weights or hooks are not as they were")


def _check_reading(anatomy: Anatomy, network: PreTrainedModel, ids: Tensor) -> tuple[Tensor, dict[Site, Tensor]]:
    with _calls_noted(anatomy) as (calls, norm_inputs), capturing(anatomy, anatomy.sites(), ids.shape) as store:
        logits = _logits(network, ids)
    for came, expected in zip([*calls, "nothing"], [*_expected_calls(anatomy), "nothing"], strict=False):
        if came != expected:
            raise _failure(anatomy, "0, the place of each part", f"{came} came where {expected} was expected")
    last = store[Site("resid", anatomy.n_layers - 1)]
    _compare(anatomy, "6, reading before the final norm", last, norm_inputs[0])
    _compare(anatomy, "4, unembedding the last block", anatomy.logits(last), logits)
    for layer, matrix in enumerate(anatomy.value_matrices):
        bias = getattr(matrix, "bias", None)
        output = store[Site("coef", layer)] @ anatomy.value_vectors(layer) + (0 if bias is None else bias)
        _compare(anatomy, f"3, value matrix of layer {layer}", output, store[Site("mlp", layer)])
    return logits, store


def _check_patching(
    anatomy: Anatomy, network: PreTrainedModel, ids: Tensor, logits: Tensor, store: dict[Site, Tensor]
) -> None:
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    second = torch.zeros_like(everywhere)
    second[:, 1] = True
    own = [{site: Patch.of(store[site], everywhere) for site in anatomy.sites(kind)} for kind in anatomy.kinds]
    foreign = [
        {site: Patch.of(store[site].flip(0), second) for site in plan if site.kind in anatomy.kinds}
        for plan in (
            [Site("attn", 0), Site("coef", anatomy.n_layers - 1)],
            [Site("mlp", 0), Site("resid", anatomy.n_layers // 2)],
        )
    ]
    plans = [*own, *foreign]
    with patched(anatomy, stacked(plans)):
        together = _logits(network, ids.repeat(len(plans), 1)).chunk(len(plans))
    for kind, result in zip(anatomy.kinds, together, strict=False):
        _compare(anatomy, f"1, patching {kind} with itself", result, logits)
    for plan, result in zip(foreign, together[len(own) :], strict=True):
        with patched(anatomy, plan):
            alone = _logits(network, ids)
        named = " and ".join(f"{site.kind} of layer {site.layer}" for site in plan)
        _compare(anatomy, f"2, patching {named} in a stack", result, alone)
        if torch.equal(alone, logits):
            raise _failure(anatomy, f"2, patching {named}", "the logits did not change at all")


def _tiny_input(network: PreTrainedModel) -> Tensor:
    """[2, 4] eight tokens spread over the vocabulary."""
    ids = torch.linspace(0, network.config.vocab_size - 1, 10)[1:-1].long()
    return ids.reshape(2, 4).to(network.device)


def _logits(network: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = network(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits


@contextmanager
def _calls_noted(anatomy: Anatomy) -> Iterator[tuple[list[str], list[Tensor]]]:
    """Yield what a forward pass inside fills: the parts in the order of their use, and the final norm's inputs."""
    calls: list[str] = []
    norm_inputs: list[Tensor] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        norm_inputs.append(inputs[0].clone())

    with ExitStack() as hooks:
        hooks.enter_context(anatomy.embedding.register_forward_hook(note("embedding")))
        for layer, block in enumerate(anatomy.blocks):
            hooks.enter_context(block.register_forward_pre_hook(note(f"block {layer}")))
            hooks.enter_context(block.register_forward_hook(note(f"end of block {layer}")))
        for layer, module in enumerate(anatomy.attention_outputs):
            hooks.enter_context(module.register_forward_hook(note(f"attention output {layer}")))
        for layer, module in enumerate(anatomy.value_matrices):
            hooks.enter_context(module.register_forward_hook(note(f"value matrix {layer}")))
        hooks.enter_context(anatomy.final_norm.register_forward_hook(note("final norm")))
        hooks.enter_context(anatomy.final_norm.register_forward_pre_hook(keep))
        hooks.enter_context(anatomy.unembedding.register_forward_hook(note("unembedding")))
        yield calls, norm_inputs


def _expected_calls(anatomy: Anatomy) -> list[str]:
    calls = ["embedding"]
    for layer in range(anatomy.n_layers):
        calls += [f"block {layer}", f"attention output {layer}"]
        calls += [f"value matrix {layer}"] if anatomy.value_matrices else []
        calls += [f"end of block {layer}"]
    return [*calls, "final norm", "unembedding"]


def _state(network: PreTrainedModel) -> list[Any]:
    """What any change of a weight or a hook would change, without reading the weights."""
    weights = [(name, w.data_ptr(), w._version) for name, w in network.state_dict(keep_vars=True).items()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in network.modules()]
    return [weights, hooks]


def _compare(anatomy: Anatomy, name: str, found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    difference = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    if not difference <= tolerance:  # NaN fails too
        raise _failure(anatomy, name, f"relative difference {difference:.2g}, allowed {tolerance:g}")


def _failure(anatomy: Anatomy, name: str, reason: str) -> ModelError:
    return ModelError(
        f"this {anatomy.family} failed self-check {name}: {reason}; it is not built as its family is in families.py"
    )
