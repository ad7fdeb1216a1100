"""Exits for generation: fitted, kept in files, asked at a price that they were made for."""

from pathlib import Path

import pytest
import torch
from tests.models.tiny_families import tiny, tiny_tokenizer

from palimpsest.data.batches import Encoded
from palimpsest.early_exit.generator import ExitGenerator
from palimpsest.early_exit.policy_training import PolicySettings
from palimpsest.errors import ModelError, SpecError
from palimpsest.models.anatomy import Anatomy
from palimpsest.models.language_model import LanguageModel


def model(seed: int = 0) -> LanguageModel:
    network = tiny("llama", seed=seed)
    return LanguageModel(network, tiny_tokenizer(), Anatomy.of(network))


def test_a_policy_is_fitted_saved_and_read_and_belongs_to_one_model(tmp_path: Path) -> None:
    ids = torch.randint(4, 48, (6, 10), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [Encoded(tuple(row), len(row), len(row)) for row in ids]
    settings = PolicySettings(prices=(0.1, 10.0), steps=40, batch_size=16)
    fitted = ExitGenerator.fit(model(), rows, (1, 2), settings)
    fitted.save(tmp_path / "exits")
    again = ExitGenerator.load(tmp_path / "exits", model())
    assert again.exits == (1, 2) and again.settings == settings
    prompts = [ids[0][:4], ids[1][:6]]
    for price in (0.1, 10.0):
        said = fitted.generate(prompts, price=price, max_new_tokens=4)
        assert again.generate(prompts, price=price, max_new_tokens=4) == said
        assert all(one.exits[:1] in ((), (3,)) for one in said)  # what is said first, all blocks say
    with pytest.raises(SpecError, match=r"price 20; this policy was trained for 0.1 to 10 nats"):
        fitted.generate(prompts, price=20, max_new_tokens=4)
    with pytest.raises(ModelError, match="another model"):
        ExitGenerator.load(tmp_path / "exits", model(seed=1))
    with pytest.raises(ModelError, match="make exits with `palimpsest exit fit --generation`"):
        ExitGenerator.load(tmp_path, model())
    (tmp_path / "exits" / "token_policy.json").write_text("[]")
    with pytest.raises(ModelError, match="cannot be read"):
        ExitGenerator.load(tmp_path / "exits", model())
