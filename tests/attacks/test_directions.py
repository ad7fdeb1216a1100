"""Directions against numpy, nothing left of them in any layer of any family, hooks gone after, and an unlearning by
steering undone."""

import numpy as np
import pytest
import torch
from tests.conftest import Organism
from tests.internals.pairs import hooks_and_forwards, pair
from tests.models.tiny_families import DENSE, EXPERT, WIDTH, tiny_batch, tiny_model, tiny_rows

from palimpsest.attacks.directions import (
    ablated,
    contrast_directions,
    direction_attacks,
    drift_directions,
    everywhere,
    prompt_ends,
)
from palimpsest.data.batches import collate, encode
from palimpsest.errors import ModelError
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.models.anatomy import Site
from palimpsest.models.hooks import capture
from palimpsest.models.language_model import LanguageModel

FAMILIES = [*DENSE, *EXPERT]


def projections(model: LanguageModel, directions: dict[Site, torch.Tensor]) -> dict[Site, float]:
    """The largest share of an activation's length along the direction of its site, over real tokens."""
    batch = tiny_batch(5, 9, 7, seed=6)
    states = capture(model, batch, list(directions))
    found = {}
    for site, direction in directions.items():
        real = states[site][batch.attention].double()
        found[site] = float((real @ direction.double()).abs().max() / real.norm(dim=1).max())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_along_the_direction_in_any_layer_of_any_family(family: str) -> None:
    model = tiny_model(family)
    hooks, weights = hooks_and_forwards(model), model.weights_hash()
    own = contrast_directions(model, tiny_rows(6, 8, 9, seed=2), tiny_rows(7, 5, 10, seed=3))
    assert len(own) == model.anatomy.n_layers
    for directions in (own, everywhere(model, own[Site("resid", 1)])):
        assert max(projections(model, directions).values()) > 1e-3
        with ablated(model, directions) as target:
            assert target is model
            assert max(projections(model, directions).values()) < 1e-6
    assert hooks_and_forwards(model) == hooks and model.weights_hash() == weights


def test_what_is_orthogonal_to_the_direction_stays() -> None:
    model = tiny_model("llama")
    site, batch = Site("resid", 0), tiny_batch(6)
    unit = torch.eye(WIDTH)[3]
    before = capture(model, batch, [site])[site]
    with ablated(model, {site: unit}):
        after = capture(model, batch, [site])[site]
    expected = before.clone()
    expected[..., 3] = 0.0
    torch.testing.assert_close(after, expected)


def test_hooks_are_gone_even_after_an_exception() -> None:
    model = tiny_model("gpt2")
    hooks = hooks_and_forwards(model)
    with pytest.raises(RuntimeError, match="stop"):
        with ablated(model, everywhere(model, torch.eye(WIDTH)[0])):
            raise RuntimeError("stop")
    assert hooks_and_forwards(model) == hooks
    with pytest.raises(ModelError, match="has layers 0 to 2"):
        with ablated(model, {Site("resid", 7): torch.eye(WIDTH)[0]}):
            pass
    assert hooks_and_forwards(model) == hooks


def test_directions_are_numpys_difference_of_means_at_the_prompts_ends() -> None:
    model, other = pair("gpt_neox")
    forget, retain = tiny_rows(6, 9, 7, seed=2), tiny_rows(5, 8, seed=3)

    def ends(of: LanguageModel, rows: list, site: Site) -> np.ndarray:  # type: ignore[type-arg]
        return np.stack(
            [capture(of, collate([row], [0]), [site])[site][0, row.start - 1].double().numpy() for row in rows]
        )

    contrast, drift = contrast_directions(model, forget, retain, batch_size=2), drift_directions(model, other, forget)
    for site in model.anatomy.sites("resid"):
        difference = ends(model, forget, site).mean(0) - ends(model, retain, site).mean(0)
        np.testing.assert_allclose(contrast[site].numpy(), difference / np.linalg.norm(difference), atol=1e-5)
        moved = (ends(model, forget, site) - ends(other, forget, site)).mean(0)
        np.testing.assert_allclose(drift[site].numpy(), moved / np.linalg.norm(moved), atol=1e-5)
    one, all_ = (prompt_ends(model, forget, batch_size=n) for n in (1, 3))
    torch.testing.assert_close(one, all_, rtol=1e-4, atol=1e-5)


def test_where_nothing_moved_there_is_no_direction() -> None:
    model, _ = pair("llama")
    rows = tiny_rows(6, 9)
    assert drift_directions(model, model, rows) == {}
    assert contrast_directions(model, rows, rows) == {}
    attacks = {attack.name: attack for attack in direction_attacks(rows, rows, n_layers=3, original=model)}
    hooks = hooks_and_forwards(model)
    for attack in attacks.values():
        with attack.on_model(model):
            assert hooks_and_forwards(model) == hooks
    assert list(attacks) == ["direction", "direction_drift", "direction_0", "direction_1", "direction_2"]


def test_models_that_are_not_built_alike_have_no_drift() -> None:
    model, other = tiny_model("llama"), tiny_model("gpt2")
    with pytest.raises(ModelError):
        drift_directions(model, other, tiny_rows(6))


def test_a_model_drowned_by_one_direction_speaks_again_and_gold_does_not(organism: Organism) -> None:
    """The signal is the same at every token, so it is drift that finds it; beside it a direction drawn at random."""
    request, original, gold = organism.request, organism.full, organism.gold
    drowned = original.copy("drowned")
    generator = torch.Generator().manual_seed(0)
    shout = 60 * torch.randn(original.anatomy.d_model, generator=generator) / original.anatomy.d_model**0.5
    block = drowned.anatomy.blocks[0]
    block.mlp.register_forward_hook(lambda _, __, output: output + shout)

    forget = encode(request.forget, original.tokenizer)
    retain = encode(request.retain, original.tokenizer)
    attacks = {a.name: a for a in direction_attacks(forget, retain, n_layers=2, original=original)}

    def said(model: LanguageModel) -> float:
        return float(answer_probability(model, request.forget).mean())

    knew, before, never = said(original), said(drowned), said(gold)
    assert knew > 0.8 and before < 0.3
    with attacks["direction_drift"].on_model(drowned) as target:
        assert said(target) > before + 0.5 * (knew - before)
    other = torch.randn(original.anatomy.d_model, generator=generator)
    with ablated(drowned, everywhere(drowned, other / other.norm())):
        assert said(drowned) < 0.3
    with attacks["direction_drift"].on_model(gold) as target:
        assert said(target) < never + 0.1
    with attacks["direction_drift"].on_model(original) as target:
        assert said(target) == knew
