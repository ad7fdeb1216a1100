"""RMU: its loss against a float64 transcription, and the few weights that it may touch."""

import numpy as np
import pytest
import torch
from tests.models.tiny_families import DENSE, EXPERT, FAMILIES, n_hooks, tiny_batch, tiny_model
from toy_request import WORDS, draw_weights, same_weights, toy_request, weights_of

from palimpsest.data import batches
from palimpsest.errors import SpecError
from palimpsest.models.anatomy import Site
from palimpsest.models.hooks import capture
from palimpsest.models.organism import Architecture, new_model
from palimpsest.models.tokenizers import word_tokenizer
from palimpsest.unlearn.rmu import RMU, distance, hidden_states
from palimpsest.unlearn.stopping import Stop

REQUEST = toy_request()
FORGET, RETAIN = REQUEST.forget, REQUEST.retain
ALL = {"batch_size": len(FORGET)}


def deep_model(layers=5):
    tokenizer = word_tokenizer(["Question: " + " ".join(WORDS) + "\nAnswer: w0"])
    model = new_model(Architecture(layers=layers, width=16, mlp_width=24, heads=2, context=64), tokenizer, 0)
    draw_weights(model, 0)
    model.network.eval()
    return model


START, NOW = deep_model(), deep_model()
draw_weights(NOW, seed=5, size=0.1)


def hidden(model, record, layer):
    """[tokens, width] of prompt and answer: one unpadded row through the plain forward pass, in float64."""
    ids = model.tokenizer(f"Question: {record.question}\nAnswer: {record.answer}")["input_ids"]
    with torch.no_grad():
        states = model.network(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return states[layer + 1][0].numpy().astype(np.float64)


def rmu(layer, coefficient, alpha, seed=0):
    entries = torch.rand(16, generator=torch.Generator().manual_seed(seed)).numpy().astype(np.float64)
    lengths = np.concatenate([np.linalg.norm(hidden(START, record, layer), axis=1) for record in FORGET])
    middle = np.sort(lengths)[(len(lengths) - 1) // 2]
    target = coefficient * middle * entries / np.linalg.norm(entries)
    push = np.mean([((hidden(NOW, record, layer) - target) ** 2).mean() for record in FORGET])
    moved = [((hidden(NOW, record, layer) - hidden(START, record, layer)) ** 2).mean() for record in RETAIN]
    return push + alpha * np.mean(moved)


def loss_now(method, step=0):
    """The loss at NOW's weights of a run that started from START."""
    model = START.copy()
    objective = method.objective(model, REQUEST)
    model.network.load_state_dict(NOW.network.state_dict())
    return objective(step)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (1, 5.0, 1.0)),
        ({"layer": 3, "coefficient": 0.5, "alpha": 40.0}, (3, 0.5, 40.0)),
        ({"layer": 0, "alpha": 0.0, "seed": 7}, (0, 5.0, 0.0, 7)),
    ],
)
def test_loss_is_its_formula(settings, expected):
    assert loss_now(RMU(**settings, **ALL)).item() == pytest.approx(rmu(*expected), rel=2e-5)


def test_padding_on_the_left_moves_no_loss(monkeypatch):
    plain, collate = loss_now(RMU(**ALL)).item(), batches.collate
    monkeypatch.setattr(batches, "collate", lambda rows, places, **_: collate(rows, places, pad_id=9, side="left"))
    assert loss_now(RMU(**ALL)).item() == pytest.approx(plain, rel=1e-5)


def test_what_stands_at_padding_is_never_counted():
    batch = tiny_batch(3, 6)
    states = torch.ones(2, 6, 4)
    states[~batch.attention] = torch.nan
    assert distance(states, torch.zeros(4), batch).item() == 1.0
    assert distance(states, torch.tensor([3.0, 1.0, 1.0, 1.0]), batch).item() == pytest.approx(1.0)


def test_every_seed_pushes_another_way():
    losses = {seed: loss_now(RMU(alpha=0, seed=seed, **ALL)).item() for seed in range(3)}
    assert len({round(loss, 3) for loss in losses.values()}) == 3


@pytest.mark.parametrize(
    ("layer", "changed"),
    [(None, {0, 1}), (0, {0}), (1, {0, 1}), (2, {0, 1, 2}), (4, {2, 3, 4})],
)
def test_it_changes_the_value_matrices_of_three_blocks_and_nothing_else(layer, changed):
    model, before = START.copy(), weights_of(START)
    update = RMU(layer=layer, learning_rate=1e-2, **ALL).run(model, REQUEST, Stop(3, measure_every=3))
    names = {f"model.layers.{block}.mlp.down_proj.weight" for block in changed}
    assert set(update.delta) == names
    after = weights_of(update.apply(model))
    rest = before.keys() - names
    assert same_weights({name: before[name] for name in rest}, {name: after[name] for name in rest})
    assert all(not torch.equal(before[name], after[name]) for name in names)


def test_no_gradient_is_computed_for_what_does_not_change(monkeypatch):
    held = []
    step = torch.optim.AdamW.step
    model = START.copy()

    def spied(optimizer, *args, **kwargs):
        held.append({name for name, value in model.network.named_parameters() if value.grad is not None})
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    RMU(layer=2, **ALL).run(model, REQUEST, Stop(2))
    assert held == [{f"model.layers.{block}.mlp.down_proj.weight" for block in range(3)}] * 2


def test_forget_rows_turn_to_the_direction_and_alpha_holds_retain_rows_still():
    entries = torch.rand(16, generator=torch.Generator().manual_seed(4)).numpy()

    def cosine(model):
        states = np.concatenate([hidden(model, record, 2) for record in FORGET])
        return (states @ entries / np.linalg.norm(states, axis=1) / np.linalg.norm(entries)).mean()

    def moved(model):
        return np.mean([((hidden(model, record, 2) - hidden(START, record, 2)) ** 2).mean() for record in RETAIN])

    def unlearned(alpha):
        method = RMU(layer=2, coefficient=2.0, alpha=alpha, learning_rate=2e-3, seed=4, **ALL)
        return method.run(START, REQUEST, Stop(40, measure_every=40)).apply(START.copy())

    free, held = unlearned(0.0), unlearned(10.0)
    assert cosine(free) > cosine(START) + 0.5
    assert cosine(held) > cosine(START) + 0.1
    assert moved(held) < moved(free) / 4


@pytest.mark.parametrize(("layers", "third"), [(1, 0), (2, 0), (3, 1), (6, 2), (8, 2)])
def test_it_pushes_a_third_of_the_way_up_unless_told_otherwise(layers, third):
    model = deep_model(layers)
    assert RMU().parameters(model).keys() == RMU(layer=third).parameters(model).keys()
    assert f"model.layers.{third}.mlp.down_proj.weight" in RMU().parameters(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_what_the_block_gives_in_every_family(family):
    model, site = tiny_model(family), Site("resid", 1)
    batch = tiny_batch(5, 9)
    found = hidden_states(model, batch, site)
    expected = capture(model, batch, [site])[site]
    torch.testing.assert_close(found[batch.attention], expected[batch.attention])
    assert found.requires_grad and n_hooks(model.network) == 0


@pytest.mark.parametrize("family", DENSE)
def test_in_every_dense_family_it_finds_one_matrix_a_block(family):
    model = tiny_model(family)
    found = RMU(layer=1).parameters(model)
    assert [tuple(value.shape) for value in found.values()] == [
        tuple(matrix.weight.shape) for matrix in model.anatomy.value_matrices[:2]
    ]
    hidden_states(model, tiny_batch(5, 9), Site("resid", 1)).square().mean().backward(inputs=list(found.values()))
    assert all(value.grad.abs().max() > 0 for value in found.values())


@pytest.mark.parametrize("family", EXPERT)
def test_fused_experts_are_refused(family):
    with pytest.raises(SpecError, match=f"^rmu: the experts of a {family} are fused") as error:
        RMU().run(tiny_model(family), REQUEST)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layer", [-1, 5, 99])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(SpecError, match=f"^rmu: layer is {layer}; this llama has 0 to 4$"):
        RMU(layer=layer).run(START, REQUEST)


@pytest.mark.parametrize("coefficient", [0, -2.0, float("nan")])
def test_a_coefficient_that_gives_no_direction_is_refused(coefficient):
    with pytest.raises(SpecError, match=f"^rmu: coefficient is {coefficient}; it must be above 0$"):
        RMU(coefficient=coefficient)
