"""Side effects: against numpy by hand, where a change is known, and beside a sham on the organism."""

import numpy as np
import pytest
import torch
from tests.conftest import Organism
from tests.models.tiny_families import tiny_model

from palimpsest.data.batches import Encoded, collate, encode
from palimpsest.errors import ModelError
from palimpsest.internals.side_effects import activation_shifts, side_effects
from palimpsest.models.anatomy import Site
from palimpsest.models.hooks import capture
from palimpsest.models.organism import train_sham
from palimpsest.unlearn.npo import NPO
from palimpsest.unlearn.stopping import Stop


def rows_of(organism: Organism, name: str, n: int) -> list[Encoded]:
    return encode(getattr(organism.request, name)[:n], organism.full.tokenizer, template="plain")


def test_it_is_what_numpy_finds_row_by_row(organism: Organism) -> None:
    """Rows of several lengths, padded in the batch and alone here."""
    full, other, rows = organism.full, organism.gold, rows_of(organism, "forget", 12)
    assert len({len(row.ids) for row in rows}) > 1
    sites = [*full.anatomy.sites("coef"), *full.anatomy.sites("attn")]
    shifts = activation_shifts(full, other, rows, sites, batch_size=5)
    for place, site in enumerate(sites):
        for n, row in enumerate(rows):
            alone = collate([row], [0])
            old, new = (capture(model, alone, [site])[site].double().numpy().ravel() for model in (full, other))
            length = np.linalg.norm(old)
            assert shifts[place].relative_l2[n] == pytest.approx(np.linalg.norm(new - old) / length, rel=1e-4)
            cosine = old @ new / length / np.linalg.norm(new)
            assert shifts[place].cosine[n] == pytest.approx(cosine, abs=1e-5)


def test_how_many_rows_are_read_at_once_changes_nothing(organism: Organism) -> None:
    rows, sites = rows_of(organism, "retain", 9), organism.full.anatomy.sites("coef")
    one, all_ = (activation_shifts(organism.full, organism.gold, rows, sites, batch_size=n) for n in (1, 9))
    for alone, together in zip(one, all_, strict=True):
        torch.testing.assert_close(alone.relative_l2, together.relative_l2, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.cosine, together.cosine, rtol=1e-4, atol=1e-5)


def test_an_attention_twice_as_loud_moves_by_its_own_length_and_nothing_before_it(organism: Organism) -> None:
    full, louder = organism.full, organism.full.copy("louder")
    with torch.no_grad():
        louder.anatomy.module(Site("attn", 1)).weight.mul_(2)
    sites = [Site("coef", 0), Site("attn", 0), Site("attn", 1), Site("coef", 1)]
    before, also, at, after = activation_shifts(full, louder, rows_of(organism, "forget", 4), sites)
    for still in (before, also):
        assert (still.relative_l2 == 0).all() and torch.allclose(still.cosine, torch.ones(4))
    assert torch.allclose(at.relative_l2, torch.ones(4)) and torch.allclose(at.cosine, torch.ones(4))
    assert (after.relative_l2 > 0).all() and (after.cosine < 1).all()


def test_unlearning_spills_further_than_training_on_retain_rows_reaches(trained: Organism) -> None:
    full, request = trained.full, trained.request
    sham = train_sham(full, request.retain, template="plain", steps=10, learning_rate=3e-4)
    unlearned = full.copy("unlearned")
    NPO(learning_rate=3e-4).run(full, request, Stop(steps=60, forget_probability=0.15)).apply(unlearned)
    forget, outside = rows_of(trained, "forget", 25), rows_of(trained, "retain_unseen", 20)
    effects = side_effects(full, unlearned, sham, forget, outside)
    assert [effect.site for effect in effects] == [*full.anatomy.sites("coef"), *full.anatomy.sites("attn")]
    for effect in effects:
        assert effect.over_sham > 1
        assert 0 < effect.spill < 1.1 and effect.spill < effect.sham_spill + 0.1
        assert effect.forget.cosine.mean() < effect.sham_forget.cosine.mean()


def test_nothing_moved_is_no_spill(organism: Organism) -> None:
    same, rows = organism.full.copy("same"), rows_of(organism, "forget", 2)
    (effect, *_) = side_effects(organism.full, same, same, rows, rows)
    assert np.isnan(effect.spill) and effect.outside.relative_l2.sum() == 0


def test_a_model_that_is_built_otherwise_is_refused() -> None:
    llama, wide = tiny_model("llama"), tiny_model("llama", intermediate_size=32)
    with pytest.raises(ModelError, match="is not built like"):
        activation_shifts(llama, wide, [Encoded((1, 2, 3), 1, 3)], llama.anatomy.sites("coef"))
