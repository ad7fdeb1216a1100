"""Upstream's recipe against a loop written out with autograd and no optimiser of torch's."""

from collections.abc import Sequence

import pytest
import torch
from tests.models.tiny_families import LAYERS, WIDTH, tiny_model, tiny_rows
from torch import Tensor

from palimpsest.data.batches import Encoded
from palimpsest.lens.hidden import read_layers
from palimpsest.lens.lens import Lens
from palimpsest.models.language_model import LanguageModel
from palimpsest.studies.upstream_lens import Recipe, fit_as_upstream

STEPS = 9


def batches(steps: int = STEPS) -> list[list[Encoded]]:
    """Steps of two rows of seven tokens, no two alike."""
    rows = tiny_rows(*[7] * (2 * steps))
    return [rows[2 * step : 2 * step + 2] for step in range(steps)]


def steep(family: str, times: float = 1.9) -> LanguageModel:
    """In fp64, with a final norm so much larger that some gradients are longer than the bound."""
    model = tiny_model(family)
    model.network.double()
    model.anatomy.final_norm.weight.data.mul_(times)
    return model


def kl(model: LanguageModel, batch: Sequence[Encoded], maps: Tensor) -> Tensor:
    """[L] KL(model || lens), the mean over a batch's tokens, over all of the vocabulary at once."""
    (hidden,) = read_layers(model, batch)
    anatomy, found = model.anatomy, []
    p = anatomy.logits(hidden.layers[-1]).log_softmax(-1)
    for x, map in zip(hidden.layers, maps, strict=False):
        q = anatomy.logits(x + x @ map[:, :-1].T + map[:, -1]).log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1).mean())
    return torch.stack(found)


def by_hand(model: LanguageModel, steps: Sequence[Sequence[Encoded]], recipe: Recipe) -> tuple[Tensor, list[float]]:
    """Maps [L, d, d + 1] after SGD with Nesterov momentum, and the norm of each step's gradient."""
    maps = torch.zeros(LAYERS, WIDTH, WIDTH + 1, dtype=torch.float64)
    moving, norms = torch.zeros_like(maps), []
    for number, batch in enumerate(steps):
        free = maps.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(kl(model, batch, free).sum(), free)
        norms.append(gradient.norm().item())
        gradient = gradient * min(1.0, 1 / (norms[-1] + 1e-6)) + recipe.weight_decay * maps
        moving = recipe.momentum * moving + gradient
        rate = recipe.rate * (1 - recipe.momentum) * (len(steps) - number) / len(steps)
        maps = maps - rate * (gradient + recipe.momentum * moving)
    return maps, norms


def maps_of(lens: Lens) -> Tensor:
    return torch.cat([lens.changes, lens.biases[..., None]], -1).double()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("recipe", [Recipe(), Recipe(rate=0.5, momentum=0.6, weight_decay=0.1)])
def test_every_step_is_that_of_autograd(family: str, recipe: Recipe) -> None:
    model, steps = steep(family), batches()
    expected, norms = by_hand(model, steps, recipe)
    assert min(norms) < 1 < max(norms)
    found = maps_of(fit_as_upstream(model, steps, recipe))
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


def test_one_norm_of_all_layers_is_bounded_and_not_each_layers_own() -> None:
    """A single step at a rate of one, without momentum or decay, is as long as the bound."""
    lens = fit_as_upstream(steep("llama", 10), batches(1), Recipe(momentum=0.0001, weight_decay=0.0))
    assert maps_of(lens).norm().item() == pytest.approx(1, rel=1e-3)


def test_the_rate_falls_to_nothing() -> None:
    """Bounded gradients make the way of step i at most its rate long; the last of n has 1 / n of the first's."""
    model, steps = steep("llama", 10), batches(2)
    plain = Recipe(momentum=0.0001, weight_decay=0.0)
    first, _ = by_hand(model, steps[:1], plain)
    assert (maps_of(fit_as_upstream(model, steps, plain)) - first).norm().item() == pytest.approx(0.5, rel=1e-3)


def test_the_kl_falls_and_muon_is_another_way_down() -> None:
    model, steps = tiny_model("gpt2"), batches(40)
    start = kl(model, steps[0], torch.zeros(LAYERS, WIDTH, WIDTH + 1))
    sgd = fit_as_upstream(model, steps)
    muon = fit_as_upstream(model, steps, Recipe("muon", rate=0.02, weight_decay=0.0))
    heavy = fit_as_upstream(model, steps, Recipe("muon", rate=0.02, weight_decay=30.0))
    for lens in (sgd, muon):
        assert (kl(model, steps[0], maps_of(lens).float()) < start).all()
    assert heavy.changes.norm() < 0.5 * muon.changes.norm()
    assert sgd.provenance["tokens"] == 40 * 14 and sgd.unembedding == Lens.logit(model).unembedding
