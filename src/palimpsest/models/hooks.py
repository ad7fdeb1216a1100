"""Reading and patching activations by hooks, for every family alike.

Hooks read what a module really gives. `output_hidden_states` would not: its last entry has been through the final norm.
Shapes: B rows, T tokens, d the width of a site (d_ff for `coef`, d_model for the rest).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from palimpsest.data.batches import Batch
from palimpsest.models.anatomy import Anatomy, Site
from palimpsest.models.inputs import forward_inputs
from palimpsest.models.language_model import LanguageModel, evaluating


@dataclass(frozen=True, eq=False)
class Patch:
    """New activations for one site."""

    positions: Tensor
    """[B, T] bool, True where the activation is replaced."""
    values: Tensor
    """[P, d] one activation for each of the P True positions, row by row."""

    @staticmethod
    def of(activations: Tensor, positions: Tensor) -> "Patch":
        """Put `activations` [B, T, d], as they were captured, in at `positions` [B, T]."""
        return Patch(positions, activations[positions])


def capture(model: LanguageModel, batch: Batch, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """The activations [B, T, d] of one forward pass, in eval mode: detached, cloned, of the network's type.

    No logits are computed: over a large vocabulary they would cost more than all else.
    Those at padding positions mean nothing; select with `batch.attention`.

    Raises:
        ModelError: a site that this model does not have.
    """
    head = model.anatomy.unembedding
    handle = head.register_forward_pre_hook(lambda _, given: (given[0][:, :0], *given[1:]))
    try:
        # Inference tensors could not be trained on later, so gradients are only switched off.
        with evaluating(model) as network, torch.inference_mode(False), torch.no_grad():
            with capturing(model.anatomy, sites, batch.ids.shape) as store:
                network(**forward_inputs(network, batch))
    finally:
        handle.remove()
    return store


@contextmanager
def capturing(
    anatomy: Anatomy, sites: Sequence[Site], shape: Sequence[int], *, attached: bool = False
) -> Iterator[dict[Site, Tensor]]:
    """Yield a dictionary that each forward pass inside fills with the sites' activations, detached and cloned.

    Inside `patched`, it reads the activations as patched.

    Args:
        anatomy: of the network that will run.
        sites: what to read.
        shape: (B, T) of the passes; some families (OPT) flatten the two in their MLP.
        attached: keep the activations themselves, so that gradients can be taken by them.

    Raises:
        ModelError: a site that this network does not have.
    """
    store: dict[Site, Tensor] = {}

    def keep(site: Site) -> Callable[[Tensor], None]:
        def read(activation: Tensor) -> None:
            # Cloned because Falcon adds its attention into the MLP's output in place.
            store[site] = activation if attached else activation.detach().clone().reshape(*shape, -1)

        return read

    with acting_on(anatomy, {site: keep(site) for site in sites}):
        yield store


@contextmanager
def patched(anatomy: Anatomy, patches: Mapping[Site, Patch]) -> Iterator[None]:
    """Replace activations during every forward pass inside; all is as before on leaving, whatever happened.

    The passes inside must have the patches' B rows and T tokens. Gradients flow through what is not replaced, and into
    the patches' values.

    Raises:
        ModelError: a site that this network does not have.
    """

    def put(patch: Patch) -> Callable[[Tensor], Tensor]:
        def replace(activation: Tensor) -> Tensor:
            changed = activation.clone().reshape(*patch.positions.shape, -1)
            changed[patch.positions] = patch.values.to(activation)
            return changed.reshape(activation.shape)

        return replace

    with acting_on(anatomy, {site: put(patch) for site, patch in patches.items()}):
        yield


def stacked(plans: Sequence[Mapping[Site, Patch]]) -> dict[Site, Patch]:
    """Many plans for one batch as the patches of one large batch, to run them in a single pass.

    Args:
        plans: n plans, each the patches [B, T] of its own sites; at least one patch among them.

    Returns:
        Patches for the batch repeated n times, [n * B, T], whose rows i * B to (i + 1) * B follow plan i:
        `ids.repeat(n, 1)`.
    """
    nowhere = torch.zeros_like(next(patch.positions for plan in plans for patch in plan.values()))
    patches = {}
    for site in dict.fromkeys(site for plan in plans for site in plan):
        own = [plan.get(site) for plan in plans]
        patches[site] = Patch(
            torch.cat([nowhere if patch is None else patch.positions for patch in own]),
            torch.cat([patch.values for patch in own if patch is not None]),
        )
    return patches


@contextmanager
def acting_on(anatomy: Anatomy, actions: Mapping[Site, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Let each action see its site's activation in every forward pass inside, and replace it unless it gives None.

    Raises:
        ModelError: a site that this network does not have.
    """
    places = [(anatomy.module(site), site, action) for site, action in actions.items()]
    with ExitStack() as handles:
        for module, site, action in places:
            if site.is_input:
                handles.enter_context(module.register_forward_pre_hook(_on_input(action), with_kwargs=True))
            else:
                handles.enter_context(module.register_forward_hook(_on_output(action)))
        yield


def _on_input(action: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any] | None:
        if not inputs:  # some families name what they give a block
            changed = action(named["hidden_states"])
            return None if changed is None else (inputs, named | {"hidden_states": changed})
        changed = action(inputs[0])
        return None if changed is None else ((changed, *inputs[1:]), named)

    return hook


def _on_output(action: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, tuple):
            return action(output)
        # Some families' blocks give the hidden state first, then attention weights.
        changed = action(output[0])
        return None if changed is None else (changed, *output[1:])

    return hook
