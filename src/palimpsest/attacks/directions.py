"""Direction ablation: taking out of the residual stream what tells forget prompts from others.

Some methods do not erase but add a signal that drowns the answer (RMU steers towards a random vector). The difference
of mean activations finds such a direction, and projecting it out undoes the method (Arditi et al. 2024, arXiv
2406.11717, for refusal; Łucki et al. 2024, arXiv 2409.18025, for unlearning). On gold there is nothing to take away
but what tells the subjects apart, so what the projection does to gold is what it does by itself.

Shapes: n rows, d the model's width, L layers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor

from palimpsest.attacks.attack import Attack
from palimpsest.data.batches import Encoded, batches
from palimpsest.internals.patching import refuse_unlike
from palimpsest.models.anatomy import Site
from palimpsest.models.hooks import acting_on, capture
from palimpsest.models.language_model import LanguageModel


def contrast_directions(
    model: LanguageModel, forget: Sequence[Encoded], retain: Sequence[Encoded], *, batch_size: int = 64
) -> dict[Site, Tensor]:
    """Per layer, the unit vector [d] from the mean activation on retain prompts to that on forget prompts.

    Activations are those of the prompt's last token, from which the answer's first is predicted. A layer in which the
    two means are the same has no direction.

    Args:
        model: whose activations.
        forget: rows of the forget set.
        retain: rows to compare with.
        batch_size: rows at a time; it changes nothing.
    """
    ends = (prompt_ends(model, rows, batch_size=batch_size) for rows in (forget, retain))
    means = [states.mean(1) for states in ends]
    return _unit(model, means[0] - means[1])


def drift_directions(
    model: LanguageModel, original: LanguageModel, forget: Sequence[Encoded], *, batch_size: int = 64
) -> dict[Site, Tensor]:
    """Per layer, the unit vector [d] from the original's mean activation on forget prompts to the model's.

    For an attacker who has the original too. A layer whose mean did not move has no direction.

    Raises:
        ModelError: the models are not built alike.
    """
    refuse_unlike(original, model)
    ours, theirs = (prompt_ends(each, forget, batch_size=batch_size) for each in (model, original))
    return _unit(model, (ours - theirs).mean(1))


def prompt_ends(model: LanguageModel, rows: Sequence[Encoded], *, batch_size: int = 64) -> Tensor:
    """[L, n, d] each layer's residual stream at the last token before each row's first target, fp64 on the CPU."""
    sites = model.anatomy.sites("resid")
    found = torch.empty(len(sites), len(rows), model.anatomy.d_model, dtype=torch.float64)
    for batch in batches(rows, batch_size=batch_size):
        states = capture(model, batch.to(model.device), sites)
        places = torch.tensor([rows[row].start - 1 for row in batch.rows])
        for layer, site in enumerate(sites):
            at_end = states[site][torch.arange(len(places)), places.to(model.device)]
            found[layer, list(batch.rows)] = at_end.double().cpu()
    return found


@contextmanager
def ablated(model: LanguageModel, directions: Mapping[Site, Tensor]) -> Iterator[LanguageModel]:
    """The model with x - r (r·x) in place of the activation x, at every token of each site that has a unit vector r.

    No weight changes, and the hooks are gone on leaving, whatever happened.

    Raises:
        ModelError: a site that this model does not have.
    """

    def without(direction: Tensor) -> Callable[[Tensor], Tensor]:
        def project(activation: Tensor) -> Tensor:
            unit = direction.to(activation.device, torch.promote_types(activation.dtype, torch.float32))
            wide = activation.to(unit.dtype)
            return (wide - (wide @ unit)[..., None] * unit).to(activation.dtype)

        return project

    with acting_on(model.anatomy, {site: without(direction) for site, direction in directions.items()}):
        yield model


def everywhere(model: LanguageModel, direction: Tensor) -> dict[Site, Tensor]:
    """One direction [d] at every layer, the first block's input included, so that no layer can write or read it."""
    return {Site("resid", layer): direction for layer in range(-1, model.anatomy.n_layers)}


def direction_attacks(
    forget: Sequence[Encoded], retain: Sequence[Encoded], *, n_layers: int, original: LanguageModel | None = None
) -> list[Attack]:
    """Each layer's own direction taken out of it, in all layers at once, and each layer's taken out everywhere.

    Every model is attacked with directions of its own.

    Args:
        forget: rows of the forget set, in the tokens of the models that will be attacked.
        retain: rows to compare with.
        n_layers: of these models.
        original: for the drift from it too, which the original itself does not have: there it changes nothing.
    """

    def by_layer(model: LanguageModel) -> AbstractContextManager[LanguageModel]:
        return ablated(model, contrast_directions(model, forget, retain))

    def by_drift(original: LanguageModel, model: LanguageModel) -> AbstractContextManager[LanguageModel]:
        return ablated(model, drift_directions(model, original, forget))

    def by_one(layer: int, model: LanguageModel) -> AbstractContextManager[LanguageModel]:
        direction = contrast_directions(model, forget, retain).get(Site("resid", layer))
        return ablated(model, {} if direction is None else everywhere(model, direction))

    budget = f"{len(forget)} forget prompts, {len(retain)} others"
    attacks = [Attack("direction", f"{budget}; a direction a layer", by_layer)]
    if original is not None:
        attacks.append(
            Attack("direction_drift", f"{len(forget)} forget prompts, the original", partial(by_drift, original))
        )
    for layer in range(n_layers):
        attacks.append(
            Attack(f"direction_{layer}", f"{budget}; that of layer {layer}, everywhere", partial(by_one, layer))
        )
    return attacks


def _unit(model: LanguageModel, differences: Tensor) -> dict[Site, Tensor]:
    """By site, the directions of differences [L, d]; of a difference that is none there is no direction."""
    lengths = differences.norm(dim=1)
    return {
        site: difference / length
        for site, difference, length in zip(model.anatomy.sites("resid"), differences, lengths, strict=True)
        if length > 0
    }
