"""Ablation: exactly what it says it does, every bit put back, and its controls tell what noise alone does not."""

import numpy as np
import pytest
import torch
from tests.conftest import Organism
from tests.models.tiny_families import EXPERT, n_hooks, tiny_batch, tiny_model

from palimpsest.data.batches import encode
from palimpsest.data.records import QA
from palimpsest.errors import DataError, ModelError, SpecError
from palimpsest.internals.attribution import attribution, mean_coefficient, most
from palimpsest.internals.concept_ablation import (
    ablate_concept,
    ablated,
    mean_ablated,
    noised,
    random_neurons,
    replaced,
    selective_neurons,
    zeroed,
)
from palimpsest.internals.value_vectors import ValueVector
from palimpsest.metrics.likelihood import answer_nll
from palimpsest.models.anatomy import Site
from palimpsest.models.hooks import capture
from palimpsest.models.inputs import forward_inputs

SOME = [ValueVector(0, 3), ValueVector(1, 0), ValueVector(1, 5, -1)]
BATCH = tiny_batch(6, 9)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.network(**forward_inputs(model.network, BATCH)).logits[BATCH.attention]


def changed(model, before) -> set[tuple[int, int]]:
    """The value vectors that are not as they were; everything else must be."""
    now = dict(model.network.named_parameters())
    matrices = {id(model.anatomy.value_matrices[layer].weight): layer for layer in range(model.anatomy.n_layers)}
    found = set()
    for name, weight in now.items():
        if id(weight) not in matrices:
            assert torch.equal(weight, before[name])
            continue
        axis = 1 if model.anatomy.value_vectors(matrices[id(weight)]).stride() == weight.stride() else 0
        found |= {(matrices[id(weight)], c) for c in (weight != before[name]).any(axis).nonzero()[:, 0].tolist()}
    return found


def weights(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.network.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "falcon"])
def test_a_zeroed_vector_writes_nothing_and_nothing_else_changes(family):
    model, before = tiny_model(family), None
    before = weights(model)
    with zeroed(model, SOME):
        assert changed(model, before) == {(0, 3), (1, 0), (1, 5)}
        assert all(not model.anatomy.value_vectors(some.layer)[some.column].any() for some in SOME)
        without = logits(model)
    assert changed(model, before) == set()
    # A neuron that writes nothing is a neuron whose coefficient is 0.
    means = torch.zeros(model.anatomy.n_layers, model.anatomy.d_ff)
    with mean_ablated(model, SOME, means):
        torch.testing.assert_close(logits(model), without, rtol=1e-4, atol=1e-5)
    assert n_hooks(model.network) == 0 and not torch.allclose(logits(model), without)


def test_a_mean_ablated_neuron_has_the_same_coefficient_everywhere():
    model = tiny_model("llama")
    before, means = weights(model), torch.randn(3, 24)
    with mean_ablated(model, SOME, means):
        assert changed(model, before) == set()
        store = capture(model, BATCH, [Site("mlp", 0), Site("mlp", 1)])
    clean = capture(model, BATCH, [Site("coef", 0), Site("mlp", 0)])
    values = model.anatomy.value_vectors(0)[3].detach()
    wanted = clean[Site("mlp", 0)] + (means[0, 3] - clean[Site("coef", 0)][..., 3, None]) * values
    torch.testing.assert_close(store[Site("mlp", 0)], wanted, rtol=1e-4, atol=1e-5)
    assert n_hooks(model.network) == 0


def test_noise_is_in_deviations_of_the_layers_matrix_and_the_seeds():
    model = tiny_model("llama")
    everything = [ValueVector(1, column) for column in range(24)]
    matrix = model.anatomy.value_vectors(1).detach().clone()

    def drawn(seed: int) -> torch.Tensor:
        with noised(model, everything, 5.0, seed=seed):
            return model.anatomy.value_vectors(1).detach() - matrix

    noise = drawn(0)
    assert noise.std().item() == pytest.approx(5 * matrix.std().item(), rel=0.1)
    assert abs(noise.mean().item()) < 0.5 * matrix.std().item() * 5 / 384**0.5 * 6
    assert torch.equal(drawn(0), noise) and not torch.equal(drawn(1), noise)


def test_every_bit_is_put_back_whatever_happens():
    model = tiny_model("gpt2")
    before = weights(model)
    for seed in range(3):  # noise never adds up
        with pytest.raises(KeyboardInterrupt), noised(model, SOME, 5.0, seed=seed):
            raise KeyboardInterrupt
        assert changed(model, before) == set()
    with pytest.raises(RuntimeError, match="size"), replaced(model, {(0, 1): torch.ones(16), (0, 2): torch.ones(3)}):
        pass
    assert changed(model, before) == set()
    with zeroed(model, SOME), noised(model, SOME, 1.0, seed=0), zeroed(model, SOME[:1]):
        assert changed(model, before) == {(0, 3), (1, 0), (1, 5)}
    assert changed(model, before) == set()
    with pytest.raises(ZeroDivisionError), mean_ablated(model, SOME, torch.zeros(3, 24)):
        _ = 1 / 0
    assert n_hooks(model.network) == 0


def test_half_precision_comes_back_too():
    model = tiny_model("llama")
    model.network.to(torch.bfloat16)
    before = weights(model)
    with noised(model, SOME, 5.0, seed=0):
        assert len(changed(model, before)) == 3
    assert changed(model, before) == set()


# Controls


def test_controls_have_as_many_neurons_in_each_layer_and_none_of_the_set():
    model = tiny_model("llama")
    scores = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    scores[1, [0, 5]] = 9.0
    for controls in (random_neurons(model, SOME, seed=1), selective_neurons(scores, SOME)):
        assert [vector.layer for vector in controls] == [0, 1, 1] and len(set(controls)) == 3
        assert not {(vector.layer, vector.column) for vector in controls} & {(0, 3), (1, 0), (1, 5)}
    assert random_neurons(model, SOME, seed=1) == random_neurons(model, SOME, seed=1)
    assert len({tuple(random_neurons(model, SOME, seed=seed)) for seed in range(5)}) > 1
    rest = sorted((set(range(24)) - {0, 5}), key=lambda column: -scores[1, column])
    assert {vector.column for vector in selective_neurons(scores, SOME)[1:]} == set(rest[:2])


def test_where_no_other_neuron_is_left():
    model = tiny_model("llama")
    most_of_it = [ValueVector(0, column) for column in range(22)]
    assert random_neurons(model, most_of_it, seed=0) == [ValueVector(0, 22), ValueVector(0, 23)]


# Results


def test_an_effect_is_the_change_of_the_answers_log_probability(organism: Organism):
    model, own = organism.full, organism.request.forget[:5]
    unrelated = organism.request.retain
    set_ = most(attribution(model, encode(own, model.tokenizer)), 64)
    before, hash_before = [answer_nll(model, rows).numpy() for rows in (own, unrelated)], model.weights_hash()
    found = ablate_concept(model, set_, own, unrelated, how="zero")
    assert model.weights_hash() == hash_before and found.concept.vectors == tuple(sorted(set_))
    with torch.no_grad():
        for vector in set_:
            model.anatomy.value_vectors(vector.layer)[vector.column] = 0
    after = [answer_nll(model, rows).numpy() for rows in (own, unrelated)]
    for effect, one, other in zip((found.concept.own, found.concept.unrelated), before, after, strict=True):
        assert effect.change.value == pytest.approx(np.mean(one - other), rel=1e-3, abs=1e-6)
        assert effect.change.low <= effect.change.value <= effect.change.high
        assert effect.said_before == 1.0


def test_a_set_holds_what_no_single_vector_does_and_controls_do_not(trained: Organism):
    model = trained.full
    subject = trained.request.forget[0].subject
    own = [row for row in trained.request.forget if row.subject == subject]
    unrelated = [row for row in trained.request.forget if row.subject != subject] + list(trained.request.retain)
    scores = attribution(model, encode(own, model.tokenizer))
    changes = [
        ablate_concept(model, most(scores, k), own, unrelated).concept.own.change.value for k in (1, 16, 64, 128)
    ]
    assert changes == sorted(changes, reverse=True) and changes[0] > -0.1 > changes[-1]
    assert changes[-1] < 10 * changes[0]
    found = ablate_concept(model, most(scores, 64), own, unrelated)
    assert found.concept.own.change.value < 3 * found.concept.unrelated.change.value < 0
    for control in (found.random, found.selective):
        assert abs(control.own.change.value) < 0.1 * abs(found.concept.own.change.value)


def test_noise_says_how_hard_a_neuron_fires(trained: Organism):
    """Zero ablation tells attributed neurons from those that only fire hard; noise makes these look like them."""
    model = trained.full
    subject = trained.request.forget[0].subject
    own = [row for row in trained.request.forget if row.subject == subject]
    some = most(attribution(model, encode(own, model.tokenizer)), 16)
    zero, noise = (ablate_concept(model, some, own, trained.request.retain, how=how) for how in ("zero", "noise"))
    assert zero.selective.own.change.value > 0.3 * zero.concept.own.change.value
    assert noise.selective.own.change.value < 10 * zero.selective.own.change.value
    assert noise.random.own.change.value > 0.3 * noise.selective.own.change.value


def test_mean_ablation_uses_the_means_on_unrelated_rows(trained: Organism):
    model, own, unrelated = trained.full, trained.request.forget, trained.request.retain
    set_ = most(attribution(model, encode(own, model.tokenizer)), 32)
    found = ablate_concept(model, set_, own, unrelated, how="mean")
    means = mean_coefficient(model, encode(unrelated, model.tokenizer))
    with ablated(model, set_, "mean", means=means, noise=0, seed=0):
        now = answer_nll(model, own).mean().item()
    assert found.concept.own.change.value == pytest.approx(answer_nll(model, own).mean().item() - now, rel=1e-3)


@pytest.mark.parametrize(
    ("vectors", "how", "error", "says"),
    [
        ([ValueVector(3, 0)], "zero", DataError, "value vector 1: layer is 3"),
        ([], "zero", DataError, "no value vectors are given"),
        ([ValueVector(0, 0)], "erase", SpecError, "ablation 'erase' is unknown; choose zero, mean or noise"),
    ],
)
def test_what_cannot_be_ablated(vectors, how, error, says):
    rows = [QA("w4", "w5")]
    with pytest.raises(error, match=f"^{says}"):
        ablate_concept(tiny_model("llama"), vectors, rows, rows, how=how)


def test_fused_experts():
    model, rows = tiny_model(next(iter(EXPERT))), [QA("w4", "w5")]
    with pytest.raises(ModelError, match="are fused"):
        ablate_concept(model, [ValueVector(0, 0)], rows, rows)
    with pytest.raises(ModelError, match="are fused"), zeroed(model, [ValueVector(0, 0)]):
        pass
