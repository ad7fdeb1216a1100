"""Encoders from folders: read back as they were saved, and refused in one line where there is none."""

from pathlib import Path

import pytest
from tests.early_exit.test_stack import encoder
from tests.models.tiny_families import tiny_tokenizer

from palimpsest.early_exit.encoder import Encoder, load_encoder
from palimpsest.early_exit.stack import ENCODERS, Stack
from palimpsest.errors import ModelError


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_is_read_as_it_was_saved(family: str, tmp_path: Path) -> None:
    saved = Encoder(encoder(family), tiny_tokenizer(), family)
    saved.network.save_pretrained(tmp_path / family)
    saved.tokenizer.save_pretrained(tmp_path / family)
    found = load_encoder(tmp_path / family)
    assert found.name == family and Stack.of(found.network).n_layers == 3
    own = dict(saved.network.named_parameters())
    assert all(value.equal(own[name]) for name, value in found.network.named_parameters())


def test_what_is_no_encoder_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be loaded as an encoder: .+") as error:
        load_encoder(tmp_path)
    assert "\n" not in str(error.value)
