"""Pruning takes exactly the smallest, noise has the size that is asked for, both by seed and of linear maps alone."""

import numpy as np
import pytest
import torch
from tests.models.tiny_families import tiny_model

from palimpsest.attacks.attack import linear_maps
from palimpsest.attacks.perturbation import perturbation_attacks, pruned, shaken
from palimpsest.errors import SpecError

FAMILIES = ["llama", "gpt2", "opt", "mixtral"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_exactly_the_smallest_are_pruned_in_every_matrix(family: str, share: float) -> None:
    model = tiny_model(family)
    before = model.weights_hash()
    for old, new in zip(linear_maps(model), linear_maps(pruned(model, share)), strict=True):
        values, left = old.numpy().ravel(), new.numpy().ravel()
        gone = np.argsort(np.abs(values), kind="stable")[: round(share * values.size)]
        expected = values.copy()
        expected[gone] = 0.0
        np.testing.assert_array_equal(left, expected)
    assert model.weights_hash() == before


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_is_as_large_as_it_is_said_to_be(family: str) -> None:
    model = tiny_model(family)
    drawn = []
    for old, new in zip(linear_maps(model), linear_maps(shaken(model, 0.5, seed=3)), strict=True):
        drawn.append(((new - old) / old.std() / 0.5).flatten())
    normal = torch.cat(drawn)
    assert abs(float(normal.mean())) < 4 / len(normal) ** 0.5
    assert abs(float(normal.std()) - 1) < 4 / (2 * len(normal)) ** 0.5
    assert torch.cat([part[:4] for part in drawn]).unique().numel() == 4 * len(drawn)  # no draw is used twice


def test_models_that_are_built_alike_are_shaken_alike_and_by_the_seed() -> None:
    one, other = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        for matrix in linear_maps(other):
            matrix.mul_(2)  # exact in floating point

    def moved(model, seed):  # type: ignore[no-untyped-def]
        pairs = zip(linear_maps(model), linear_maps(shaken(model, 0.1, seed=seed)), strict=True)
        return torch.cat([((new - old) / old.std()).flatten() for old, new in pairs])

    torch.testing.assert_close(moved(one, 1), moved(other, 1), rtol=1e-3, atol=1e-5)
    assert shaken(one, 0.1, seed=1).weights_hash() == shaken(one, 0.1, seed=1).weights_hash()
    assert not torch.allclose(moved(one, 1), moved(one, 2), atol=0.01)
    assert shaken(one, 0.0, seed=1).weights_hash() == one.weights_hash()


def test_embeddings_norms_and_biases_stay() -> None:
    model = tiny_model("gpt2")
    attacks = perturbation_attacks(seed=0)
    assert len({attack.name for attack in attacks}) == len(attacks) == 6
    for attack in attacks:
        with attack.on_model(model) as target:
            pairs = zip(model.network.named_parameters(), target.network.parameters(), strict=True)
            changed = {name for (name, old), new in pairs if not torch.equal(old, new)}
        assert changed == {f"transformer.h.{layer}.{part}.weight" for layer in range(3) for part in PARTS}


PARTS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def test_settings_that_make_no_sense_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(SpecError, match=r"share is 1\.2"):
        pruned(model, 1.2)
    with pytest.raises(SpecError, match="noise: -1"):
        shaken(model, -1, seed=0)
