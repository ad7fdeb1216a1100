"""Where a lens reads, and which models it refuses."""

from pathlib import Path

import pytest
import torch
from tests.models.tiny_families import FAMILIES, tiny_batch, tiny_model, tiny_rows

from palimpsest.errors import ModelError
from palimpsest.lens.hidden import read_layers
from palimpsest.lens.lens import Lens
from palimpsest.lens.others import open_lens, read_jacobian_lens, read_tuned_lens, write_tuned_lens
from palimpsest.models.inputs import forward_inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_what_each_block_reads_and_the_last_is_the_model(family: str) -> None:
    model, rows = tiny_model(family), tiny_rows(7, 4, 6)
    hidden = next(read_layers(model, rows))
    assert hidden.layers.shape == (model.anatomy.n_layers + 1, 17, model.anatomy.d_model)
    assert [(hidden.row == row).sum().item() for row in range(3)] == [7, 4, 6]
    lens = Lens.logit(model)
    readout = lens.readout(model)
    for row, length in enumerate((7, 4, 6)):
        batch = tiny_batch(7, 4, 6)
        with torch.no_grad():
            expected = model.network(**forward_inputs(model.network, batch)).logits[row, :length]
        states = hidden.layers[-1, hidden.row == row]
        found = readout.logits(readout.z(lens.translate(states, lens.n_layers)))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_states_do_not_depend_on_batches() -> None:
    model, rows = tiny_model("llama"), tiny_rows(7, 4, 6, 5)
    together = next(read_layers(model, rows, batch_size=4))
    alone = list(read_layers(model, rows, batch_size=1))
    for part in alone:
        (row,) = part.row.unique().tolist()
        same = together.row == row
        assert together.position[same].tolist() == part.position.tolist() == list(range(len(rows[row].ids)))
        torch.testing.assert_close(together.layers[:, same], part.layers, rtol=1e-5, atol=1e-5)


def test_the_first_layer_is_the_embeddings() -> None:
    model, rows = tiny_model("llama"), tiny_rows(5)
    found = next(read_layers(model, rows)).layers[0]
    torch.testing.assert_close(found, model.anatomy.embedding.weight[torch.tensor(rows[0].ids)].detach())


def test_a_lens_is_affine_and_the_identity_without_maps() -> None:
    model = tiny_model("llama")
    hidden = torch.randn(3, 5, model.anatomy.d_model)
    logit = Lens.logit(model)
    assert torch.equal(logit.translate(hidden, 1), hidden)
    n, d = logit.n_layers, model.anatomy.d_model
    changes, biases = torch.randn(n, d, d), torch.randn(n, d)
    lens = Lens("tuned", n, logit.unembedding, changes, biases)
    expected = hidden @ (torch.eye(d) + changes[1]).T + biases[1]
    torch.testing.assert_close(lens.translate(hidden, 1), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(lens.translate(hidden, n), hidden)


def test_another_unembedding_is_refused_and_further_training_of_blocks_is_not() -> None:
    model, later = tiny_model("llama"), tiny_model("llama")
    lens = Lens.logit(model)
    with torch.no_grad():
        later.anatomy.value_matrices[0].weight.add_(1)
    lens.readout(later)
    with torch.no_grad():
        later.anatomy.unembedding.weight[7, 3] += 1e-6
    with pytest.raises(ModelError, match=r"^model: this lens was made for another unembedding"):
        lens.readout(later)


def test_a_layer_that_is_not_there_is_named() -> None:
    lens = Lens.logit(tiny_model("llama"))
    with pytest.raises(ModelError, match="layer 4: this lens has layers 0 to 3, the last being the model"):
        lens.translate(torch.zeros(16), 4)


# On disk.


def random_lens(model) -> Lens:
    n, d = model.anatomy.n_layers, model.anatomy.d_model
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(n, d, d, generator=generator), torch.randn(n, d, generator=generator)
    return Lens("tuned", n, Lens.logit(model).unembedding, *parts, {"tokens": 5})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    model = tiny_model("llama")
    for lens in (random_lens(model), Lens.logit(model)):
        found = Lens.load(lens.save(tmp_path / lens.kind))
        assert (found.kind, found.n_layers, found.unembedding) == (lens.kind, lens.n_layers, lens.unembedding)
        assert found.provenance == lens.provenance
        for one, other in ((found.changes, lens.changes), (found.biases, lens.biases)):
            assert (one is None and other is None) or torch.equal(one, other)


def test_a_damaged_lens_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no lens\.json there"):
        Lens.load(tmp_path)
    random_lens(tiny_model("llama")).save(tmp_path / "lens")
    (tmp_path / "lens" / "lens.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match="this lens cannot be read"):
        Lens.load(tmp_path / "lens")


def test_the_tuned_lens_packages_layout_is_read_and_written(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    lens = random_lens(model)
    written = write_tuned_lens(lens, model, tmp_path / "theirs")
    stored = torch.load(written / "params.pt", weights_only=True)
    assert set(stored) == {f"{layer}.{part}" for layer in range(3) for part in ("weight", "bias")}
    translator = torch.nn.Linear(16, 16)
    translator.load_state_dict({"weight": stored["1.weight"], "bias": stored["1.bias"]})
    hidden = torch.randn(4, 16)
    torch.testing.assert_close(hidden + translator(hidden), lens.translate(hidden, 1), rtol=1e-5, atol=1e-6)
    found = read_tuned_lens(written, model)
    assert torch.equal(found.changes, lens.changes) and torch.equal(found.biases, lens.biases)
    assert found.unembedding == lens.unembedding


def test_a_lens_of_theirs_without_biases_or_of_another_size(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    write_tuned_lens(Lens("tuned", 3, Lens.logit(model).unembedding, torch.ones(3, 16, 16)), model, tmp_path / "lens")
    assert read_tuned_lens(tmp_path / "lens", model).biases is None
    with pytest.raises(ModelError, match="a lens of 3 layers and width 16, but model has 2 and 16"):
        read_tuned_lens(tmp_path / "lens", tiny_model("gpt2", num_hidden_layers=2))
    torch.save({"0.weight": torch.ones(16, 16)}, tmp_path / "lens" / "params.pt")
    with pytest.raises(ModelError, match=r"1\.weight is missing"):
        read_tuned_lens(tmp_path / "lens", model)


def test_no_code_is_run_from_a_lens_of_theirs(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    write_tuned_lens(random_lens(model), model, tmp_path / "lens")
    torch.save({"0.weight": Path("anything")}, tmp_path / "lens" / "params.pt")
    with pytest.raises(ModelError, match="cannot be read as tensors alone"):
        read_tuned_lens(tmp_path / "lens", model)


def test_a_jacobian_lens_maps_what_blocks_give(tmp_path: Path) -> None:
    model = tiny_model("llama")
    jacobians = {layer: torch.randn(16, 16) for layer in range(3)}
    torch.save({"J": jacobians, "n_prompts": 4, "source_layers": [0, 1, 2], "d_model": 16}, tmp_path / "jlens.pt")
    lens = open_lens(tmp_path / "jlens.pt", model)
    hidden = torch.randn(5, 16)
    assert torch.equal(lens.translate(hidden, 0), hidden)
    torch.testing.assert_close(lens.translate(hidden, 1), hidden @ jacobians[0].T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lens.translate(hidden, 2), hidden @ jacobians[1].T, rtol=1e-4, atol=1e-5)
    assert torch.equal(lens.translate(hidden, 3), hidden)
    assert lens.provenance["unmapped_layers"] == [0] and lens.provenance["n_prompts"] == 4
    with pytest.raises(ModelError, match=r"layer 0 is \[16, 16\], but model has 3 layers of width 32"):
        read_jacobian_lens(tmp_path / "jlens.pt", tiny_model("llama", hidden_size=32))
