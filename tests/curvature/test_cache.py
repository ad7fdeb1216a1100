"""Curvature kept on disk: the same blocks again, never another model's, and a fit that goes on where it was stopped."""

from pathlib import Path

import pytest
import torch
from tests.curvature.dense_fisher import small_model, small_rows

from palimpsest.curvature import curvature as fitting
from palimpsest.curvature.blocks import Block
from palimpsest.curvature.curvature import RetainCurvature
from palimpsest.errors import StorageError
from palimpsest.models.language_model import LanguageModel

KINDS = ["kfac", "ekfac", "diagonal"]
IN_GROUPS = 10_000
"""Bytes in which the small model's matrices do not fit together."""


def fit(model: LanguageModel, folder: Path | None = None, **settings: object) -> RetainCurvature:
    return RetainCurvature.fit(model, settings.pop("rows", None) or small_rows(), folder=folder, quiet=True, **settings)


def equal(one: Block, other: Block) -> bool:
    spectra = torch.equal(one.spectrum, other.spectrum)
    bases = zip((one.q_out, one.q_in), (other.q_out, other.q_in), strict=True)
    return spectra and all(a is b is None or torch.equal(a, b) for a, b in bases)


@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_back_bit_for_bit_and_shares_what_was_shared(kind: str, tmp_path: Path, monkeypatch) -> None:
    model = small_model("llama")
    first = fit(model, tmp_path, kind=kind)
    monkeypatch.setattr(fitting, "_measure", None)  # calling it would fail
    again = fit(model, tmp_path, kind=kind)
    assert again.blocks.keys() == first.blocks.keys()
    assert all(equal(again.blocks[name], block) for name, block in first.blocks.items())
    assert (again.n_targets, again.n_carrying, again.kind) == (first.n_targets, first.n_carrying, kind)
    if kind != "diagonal":
        name = "model.layers.0.self_attn.{}_proj"
        assert again.blocks[name.format("k")].q_in is again.blocks[name.format("q")].q_in


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"draws": 2}, {"kind": "ekfac"}, {"modules": ["*.mlp.*"]}, {"rows": small_rows(seed=5)}]
)
def test_what_differs_in_anything_is_measured_itself(change: dict, tmp_path: Path) -> None:
    model = small_model("llama")
    fit(model, tmp_path)
    alone, found = fit(model, **change), fit(model, tmp_path, **change)
    assert all(equal(found.blocks[name], block) for name, block in alone.blocks.items())
    assert len(list(tmp_path.iterdir())) == 2


def test_another_model_is_measured_itself(tmp_path: Path) -> None:
    model = small_model("llama")
    before = fit(model, tmp_path)
    with torch.no_grad():
        next(model.network.parameters())[5:] *= 2
    after = fit(model, tmp_path)
    assert not any(equal(after.blocks[name], block) for name, block in before.blocks.items())


def test_the_batch_size_is_no_matter(tmp_path: Path, monkeypatch) -> None:
    model = small_model("llama")
    fit(model, tmp_path, batch_size=1)
    monkeypatch.setattr(fitting, "_measure", None)
    fit(model, tmp_path, batch_size=4)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_give_what_one_pass_gives(kind: str) -> None:
    model = small_model("llama")
    whole, parted = fit(model, kind=kind), fit(model, kind=kind, memory=IN_GROUPS)
    assert list(parted.blocks) == list(whole.blocks)
    assert all(equal(parted.blocks[name], block) for name, block in whole.blocks.items())


def test_a_fit_that_was_stopped_goes_on_at_its_next_group(tmp_path: Path, monkeypatch) -> None:
    model, measure, measured = small_model("llama"), fitting._measure, []

    def stopping(model, encoded, group, *rest):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(group)
        return measure(model, encoded, group, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fitting, "_measure", stopping)
        fit(model, tmp_path, memory=IN_GROUPS)
    assert len(list(tmp_path.iterdir())) == 2
    rest = []
    monkeypatch.setattr(fitting, "_measure", lambda *args: rest.append(args[2]) or measure(*args))
    resumed = fit(model, tmp_path, memory=IN_GROUPS)
    assert rest and not set(map(tuple, rest)) & set(map(tuple, measured))
    whole = fit(model)
    assert all(equal(resumed.blocks[name], block) for name, block in whole.blocks.items())


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_file_is_named_and_how_to_mend_it(damage: str, tmp_path: Path) -> None:
    model = small_model("llama")
    fit(model, tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-9], "empty": b"", "other": b"\x02\0\0\0\0\0\0\0{}"}[damage])
    with pytest.raises(StorageError, match=rf"{path.name}: a damaged file of curvature; delete it"):
        fit(model, tmp_path)


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        fit(small_model("llama"), tmp_path / "file" / "curvature")
