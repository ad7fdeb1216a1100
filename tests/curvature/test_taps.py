"""What is collected: which positions carry gradient, which labels are drawn, and that the model is left as it was."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tests.curvature.dense_fisher import N_CARRYING, small_model, small_rows
from tests.models.tiny_families import DENSE, n_hooks, tiny_batch, tiny_model
from torch.utils.checkpoint import checkpoint

from palimpsest.curvature import taps
from palimpsest.curvature.curvature import RetainCurvature
from palimpsest.curvature.modules import matrices
from palimpsest.curvature.taps import backward, carrying, sampled_label_gradient, tapped, uniforms
from palimpsest.data.batches import Batch, Encoded, collate
from palimpsest.errors import TrainingError
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import predict

MODELS = {family: small_model(family) for family in ("gpt2", "llama")}


@st.composite
def any_batches(draw: st.DrawFn) -> Batch:
    """Up to four rows with any targets after the first token, padded on either side."""
    lengths = draw(st.lists(st.integers(2, 7), min_size=1, max_size=4))
    left, width = draw(st.booleans()), max(lengths) + draw(st.integers(0, 2))
    ids = torch.randint(3, 11, (len(lengths), width), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    attention, targets = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for line, length in enumerate(lengths):
        shift = width - length if left else 0
        attention[line, shift : shift + length] = True
        chosen = draw(st.sets(st.integers(1, length - 1), min_size=1))
        targets[line, [shift + place for place in chosen]] = True
    return Batch(ids, attention, targets, tuple(range(len(lengths))))


@pytest.mark.parametrize("family", MODELS)
@given(batch=any_batches())
@settings(max_examples=30, deadline=None)
def test_carrying_is_where_the_loss_has_a_gradient(family: str, batch: Batch) -> None:
    network, embedded = MODELS[family].network, []
    handle = MODELS[family].anatomy.embedding.register_forward_hook(lambda _, inputs, output: embedded.append(output))
    logits = predict(network, batch).logits
    handle.remove()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad((logits * weights).sum(), embedded)
    assert torch.isfinite(slope).all()
    assert torch.equal(carrying(batch), (slope != 0).any(-1))


@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    draw=st.integers(0, 3),
    size=st.integers(1, 6),
    side=st.sampled_from(["left", "right"]),
    shuffle=st.randoms(),
)
@settings(max_examples=50, deadline=None)
def test_a_rows_uniforms_do_not_know_its_batch(lengths, seed, draw, size, side, shuffle) -> None:
    rows = [Encoded((3,) * length, 1, length) for length in lengths]
    alone = [uniforms(collate([row], [place]), seed, draw) for place, row in enumerate(rows)]
    order = list(range(len(rows)))
    shuffle.shuffle(order)
    for first in range(0, len(order), size):
        part = order[first : first + size]
        together = uniforms(collate([rows[place] for place in part], part, side=side), seed, draw)
        assert torch.equal(together, torch.cat([alone[place] for place in part]))
    assert all(((0 <= numbers) & (numbers < 1)).all() for numbers in alone)


def test_uniforms_differ_between_rows_draws_and_seeds() -> None:
    row = Encoded((3,) * 5, 1, 5)
    numbers = [
        number
        for seed in range(3)
        for draw in range(3)
        for number in uniforms(collate([row] * 3, range(3)), seed, draw).tolist()
    ]
    assert len(set(numbers)) == 3 * 3 * 3 * 4
    assert stats.kstest(numbers, "uniform").pvalue > 0.01


def test_sampled_labels_follow_the_models_probabilities() -> None:
    n, logits = 40_000, torch.tensor([2.0, -1.0, 0.5, -torch.inf, 1.0, -2.0, -torch.inf], dtype=torch.float64)
    batch = collate([Encoded((3,) * 101, 1, 101)] * (n // 100), range(n // 100))
    gradient = sampled_label_gradient(logits.expand(n, -1).contiguous(), uniforms(batch, seed=0))
    counts = torch.bincount(gradient.argmin(-1), minlength=7).numpy()
    probabilities = logits.softmax(-1).numpy()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], n * probabilities[possible]).pvalue > 0.01


@pytest.mark.parametrize("point", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_label_of_no_probability_is_never_drawn_at_the_ends_of_the_interval(point, dtype) -> None:
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=(500, 9)) * 3, dtype=dtype)
    logits[:, [0, 1, 8]] = -torch.inf
    drawn = sampled_label_gradient(logits, torch.full((500,), point, dtype=torch.float64)).argmin(-1)
    assert set(drawn.tolist()) == ({2} if point == 0 else {7})


@pytest.mark.parametrize("chunk", [1, 20, 2**24])
def test_the_label_gradient_is_autograds_in_chunks_of_any_size(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps, "CHUNK", chunk)
    rng = np.random.default_rng(1)
    logits = torch.tensor(rng.normal(size=(7, 9)), requires_grad=True)
    points = torch.tensor(rng.random(7))
    labels = (logits.detach().softmax(-1).cumsum(-1) > points[:, None]).int().argmax(-1)
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    torch.testing.assert_close(sampled_label_gradient(logits, points), logits.grad, rtol=0, atol=1e-15)


@pytest.mark.parametrize("family", DENSE)
def test_a_gradient_written_over_the_logits_is_the_gradient(family: str) -> None:
    """The backward pass of the last operation, a soft cap or a scale in some families, must not need its result."""
    model, batch = tiny_model(family), tiny_batch(5, 3, 7)
    hidden: list[list[torch.Tensor]] = []
    for last in (False, True):
        gradients: list[torch.Tensor] = []
        with tapped(model, matrices(model), lambda _, inputs, slopes, to=gradients: to.append(slopes)) as forward:
            backward(forward(batch).logits, batch, 0, 0, last=last)
        hidden.append(gradients)
    assert hidden[0] and all(torch.equal(apart, over) for apart, over in zip(*hidden, strict=True))


def collected(model: LanguageModel, *, draws: int = 2) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """By matrix, what `see` was called with."""
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    batch = collate(small_rows(), range(4))
    with tapped(model, matrices(model), lambda m, a, g: seen.setdefault(m.name, []).append((a, g))) as forward:
        logits = forward(batch).logits
        for draw in range(draws):
            backward(logits, batch, 0, draw, last=draw + 1 == draws)
    return seen


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    plain, model, runs = collected(MODELS[family]), small_model(family), []

    def recomputed(forward: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            runs.append(forward)
            return forward(*args, **kwargs)

        def call(hidden: torch.Tensor, *args: object, **kwargs: object) -> object:
            return checkpoint(lambda h: run(h, *args, **kwargs), hidden, use_reentrant=reentrant)

        return call

    # transformers checkpoints in training mode alone, but the network is tapped in evaluation mode.
    for block in model.anatomy.blocks:
        block.forward = recomputed(block.forward)
    found = collected(model)
    assert len(runs) > len(model.anatomy.blocks)  # some were run again
    assert found.keys() == plain.keys() == {matrix.name for matrix in matrices(model)}
    for name, calls in plain.items():
        assert len(found[name]) == len(calls) == 2
        for (activations, gradients), (expected_activations, expected_gradients) in zip(
            found[name], calls, strict=True
        ):
            assert len(activations) == len(gradients) == N_CARRYING
            assert torch.equal(activations, expected_activations) and torch.equal(gradients, expected_gradients)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
def test_the_model_is_left_as_it_was(kind: str, training: bool) -> None:
    model = small_model("llama")
    model.network.train(training)
    frozen = {name for name, _ in model.network.named_parameters() if "layers.0" in name}
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_(name not in frozen)
    kept = model.anatomy.unembedding.weight
    kept.grad = torch.ones_like(kept)
    before = model.weights_hash()
    RetainCurvature.fit(model, small_rows(), kind=kind, quiet=True)
    assert model.weights_hash() == before
    assert model.network.training is training and n_hooks(model.network) == 0
    for name, parameter in model.network.named_parameters():
        assert parameter.requires_grad is (name not in frozen)
        assert parameter.grad is None or (parameter is kept and (parameter.grad == 1).all())


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
def test_a_damaged_model_is_refused_and_left_as_it_was(kind: str, damage: float) -> None:
    model = small_model("gpt2")
    model.network.train()
    with torch.no_grad():
        model.anatomy.value_matrices[1].weight[0, 0] = damage
    with pytest.raises(TrainingError, match="not finite"):
        RetainCurvature.fit(model, small_rows(), kind=kind, quiet=True)
    assert model.network.training and n_hooks(model.network) == 0
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.network.parameters())


def test_dropout_is_off_while_it_is_measured() -> None:
    model = small_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    quiet = collected(model)
    model.network.train()
    for name, calls in collected(model).items():
        for (activations, gradients), expected in zip(calls, quiet[name], strict=True):
            assert torch.equal(activations, expected[0]) and torch.equal(gradients, expected[1])
