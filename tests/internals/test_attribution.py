"""Attribution and selectivity, against the networks read row by row in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.tiny_families import EXPERT, n_hooks, tiny_model, tiny_rows

from palimpsest.errors import ModelError
from palimpsest.internals.attribution import attribution, mean_coefficient, mean_firing, most, selectivity
from palimpsest.internals.value_vectors import ValueVector, VocabularyProjection

ROWS, OTHERS = tiny_rows(5, 9, 3, 12), tiny_rows(4, 7, 6, seed=5)


def coefficients(model, row) -> np.ndarray:
    """[layers, targets, d_ff] what each value matrix is given where the targets are predicted: one unpadded row."""
    given_: list[np.ndarray] = []
    hooks = [
        matrix.register_forward_pre_hook(lambda _, inputs: given_.append(inputs[0].reshape(len(row.ids), -1).numpy()))
        for matrix in model.anatomy.value_matrices
    ]
    with torch.no_grad():
        model.network(torch.tensor([row.ids]))
    for hook in hooks:
        hook.remove()
    return np.stack(given_)[:, row.start - 1 : row.stop - 1].astype(np.float64)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "phi"])
def test_a_contribution_is_coefficient_times_what_the_vector_adds_to_the_token(family):
    model = tiny_model(family)
    projection = VocabularyProjection.of(model)
    n_layers, wanted = model.anatomy.n_layers, []
    logits = [projection.logits(projection.vectors(layer), layer).double().numpy() for layer in range(n_layers)]
    for row in ROWS:
        targets = list(row.ids[row.start : row.stop])
        of_row = coefficients(model, row)
        beyond_mean = [(of_layer - of_layer.mean(1, keepdims=True))[:, targets].T for of_layer in logits]
        wanted.append([(of_row[layer] * beyond_mean[layer]).mean(0) for layer in range(n_layers)])
    found = attribution(model, ROWS, batch_size=3)
    np.testing.assert_allclose(found.numpy(), np.mean(wanted, 0), rtol=1e-3, atol=1e-5)
    assert n_hooks(model.network) == 0


MODEL = tiny_model("llama")
ALONE = attribution(MODEL, ROWS, batch_size=1)


@settings(deadline=None, max_examples=12)
@given(st.permutations(range(len(ROWS))), st.integers(1, 5))
def test_neither_order_nor_batch_size_changes_it(order, batch_size):
    found = attribution(MODEL, [ROWS[place] for place in order], batch_size=batch_size)
    torch.testing.assert_close(found, ALONE, rtol=1e-4, atol=1e-6)


def test_means_and_selectivity_are_their_definitions():
    read = {id(rows): [coefficients(MODEL, row) for row in rows] for rows in (ROWS, OTHERS)}
    mean = np.mean([row.mean(1) for row in read[id(OTHERS)]], 0)
    np.testing.assert_allclose(mean_coefficient(MODEL, OTHERS, batch_size=2).numpy(), mean, rtol=1e-4, atol=1e-6)
    here, there = (np.mean([abs(row).mean(1) for row in read[id(rows)]], 0) for rows in (ROWS, OTHERS))
    np.testing.assert_allclose(mean_firing(MODEL, ROWS).numpy(), here, rtol=1e-4, atol=1e-6)
    lengths = np.stack(
        [np.linalg.norm(MODEL.anatomy.value_vectors(layer).detach().numpy(), axis=1) for layer in range(3)]
    )
    found = selectivity(MODEL, ROWS, OTHERS, batch_size=3)
    np.testing.assert_allclose(found.numpy(), (here - there) * lengths, rtol=1e-3, atol=1e-5)


def test_the_neurons_with_the_highest_scores():
    scores = torch.tensor([[0.5, -3.0, 2.0], [1.0, 4.0, 0.0]])
    assert most(scores, 3) == [ValueVector(1, 1), ValueVector(0, 2), ValueVector(1, 0)]
    assert len(most(scores, 100)) == 6


def test_fused_experts_have_no_coefficients():
    with pytest.raises(ModelError, match="are fused"):
        attribution(tiny_model(next(iter(EXPERT))), ROWS)
    with pytest.raises(ModelError, match="are fused"):
        mean_coefficient(tiny_model(next(iter(EXPERT))), ROWS)
