"""Where a lens reads, and which models it refuses."""

import pytest
import torch
from tests.models.tiny_families import FAMILIES, tiny_batch, tiny_model, tiny_rows

from palimpsest.errors import ModelError
from palimpsest.lens.hidden import hidden_states
from palimpsest.lens.lens import Lens
from palimpsest.models.inputs import forward_inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_what_each_block_reads_and_the_last_is_the_model(family: str) -> None:
    model, rows = tiny_model(family), tiny_rows(7, 4, 6)
    hidden = next(hidden_states(model, rows))
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
    together = next(hidden_states(model, rows, batch_size=4))
    alone = list(hidden_states(model, rows, batch_size=1))
    for part in alone:
        (row,) = part.row.unique().tolist()
        same = together.row == row
        assert together.position[same].tolist() == part.position.tolist() == list(range(len(rows[row].ids)))
        torch.testing.assert_close(together.layers[:, same], part.layers, rtol=1e-5, atol=1e-5)


def test_the_first_layer_is_the_embeddings() -> None:
    model, rows = tiny_model("llama"), tiny_rows(5)
    found = next(hidden_states(model, rows)).layers[0]
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
