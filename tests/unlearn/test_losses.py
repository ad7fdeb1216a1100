"""Every method's loss against a float64 transcription of its formula, computed from full logits of unpadded rows."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_request import answer_logprobs, draw_weights, loss_between, padded, toy_model, toy_request, true_logprobs

from palimpsest.data import batches
from palimpsest.data.records import QA
from palimpsest.errors import SpecError
from palimpsest.unlearn import other_answers
from palimpsest.unlearn.gradient_ascent import GradientAscent, GradientDifference, KLMinimization
from palimpsest.unlearn.npo import NPO, npo_loss
from palimpsest.unlearn.random_labels import RandomLabels, relabelled
from palimpsest.unlearn.request import Request

REQUEST = toy_request()
START, NOW = toy_model(), toy_model()
draw_weights(NOW, seed=5, size=0.1)  # no loss is at its start value, and no divergence is zero
ALL = {"batch_size": len(REQUEST.forget)}


def nll(model, records):
    """Mean over all tokens of all rows: long answers weigh more than short ones."""
    return -np.concatenate([true_logprobs(model, record) for record in records]).mean()


def kl(records):
    """KL(START || NOW), mean over all tokens of all rows."""
    divergences = []
    for record in records:
        (p, _), (q, _) = answer_logprobs(START, record), answer_logprobs(NOW, record)
        divergences.append((np.exp(p) * (p - q)).sum(-1))
    return np.concatenate(divergences).mean()


def npo(records, beta):
    ratios = [true_logprobs(NOW, record).sum() - true_logprobs(START, record).sum() for record in records]
    return np.mean([2 / beta * math.log1p(math.exp(beta * ratio)) for ratio in ratios])


def relabelled_rows(epoch=0, seed=0):
    return [relabelled(REQUEST, row, epoch, seed) for row in range(len(REQUEST.forget))]


def loss_now(method, step=0):
    """The loss at NOW's weights of a run that started from START."""
    return loss_between(method, START, NOW, REQUEST, step)


FORGET, RETAIN = REQUEST.forget, REQUEST.retain
PARITY = {
    "ascent": (GradientAscent(**ALL), lambda: -nll(NOW, FORGET)),
    "difference": (GradientDifference(**ALL), lambda: nll(NOW, RETAIN) - nll(NOW, FORGET)),
    "difference, weighted": (
        GradientDifference(forget_weight=0.7, retain_weight=1.3, **ALL),
        lambda: 1.3 * nll(NOW, RETAIN) - 0.7 * nll(NOW, FORGET),
    ),
    "difference, KL": (
        GradientDifference(retain_weight=2.0, retain_term="kl", **ALL),
        lambda: 2 * kl(RETAIN) - nll(NOW, FORGET),
    ),
    "kl_min": (KLMinimization(**ALL), lambda: kl(RETAIN) - nll(NOW, FORGET)),
    "difference, unkept": (GradientDifference(retain_weight=0, **ALL), lambda: -nll(NOW, FORGET)),
    "npo": (NPO(**ALL), lambda: npo(FORGET, 0.1) + nll(NOW, RETAIN)),
    "npo, steep": (NPO(beta=1.5, retain_weight=0.5, **ALL), lambda: npo(FORGET, 1.5) + 0.5 * nll(NOW, RETAIN)),
    "npo, KL": (NPO(retain_term="kl", **ALL), lambda: npo(FORGET, 0.1) + kl(RETAIN)),
    "npo, unkept": (NPO(retain_weight=0, **ALL), lambda: npo(FORGET, 0.1)),
    "labels": (RandomLabels(**ALL), lambda: nll(NOW, relabelled_rows()) + nll(NOW, RETAIN)),
    "labels, KL": (
        RandomLabels(retain_weight=3.0, retain_term="kl", **ALL),
        lambda: nll(NOW, relabelled_rows()) + 3 * kl(RETAIN),
    ),
    "labels, unkept": (RandomLabels(retain_weight=0, seed=4, **ALL), lambda: nll(NOW, relabelled_rows(seed=4))),
}


@pytest.mark.parametrize("name", PARITY)
def test_loss_is_its_formula(name):
    method, expected = PARITY[name]
    assert loss_now(method).item() == pytest.approx(expected(), rel=2e-5, abs=2e-5)


@pytest.mark.parametrize(
    ("method", "of_row"),
    [
        (GradientAscent(batch_size=1), lambda row: -nll(NOW, [FORGET[row]])),
        (NPO(batch_size=1, retain_weight=0), lambda row: npo([FORGET[row]], 0.1)),
        (RandomLabels(batch_size=1, retain_weight=0), lambda row: nll(NOW, [relabelled_rows()[row]])),
    ],
)
def test_an_epoch_of_single_rows_gives_every_rows_own_loss(method, of_row):
    found = sorted(loss_now(method, step).item() for step in range(len(FORGET)))
    np.testing.assert_allclose(found, sorted(map(of_row, range(len(FORGET)))), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", PARITY)
def test_padding_moves_no_loss(name, monkeypatch):
    method, _ = PARITY[name]
    plain = loss_now(method).item()
    monkeypatch.setattr(batches, "collate", padded)
    monkeypatch.setattr(other_answers, "collate", padded)
    assert loss_now(method).item() == pytest.approx(plain, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", [GradientAscent, GradientDifference, NPO])
def test_the_order_of_a_batch_moves_no_loss(kind):
    losses = [loss_now(kind(seed=seed, **ALL)).item() for seed in range(3)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("name", PARITY)
def test_only_answer_tokens_reach_the_unembedding(name):
    method, _ = PARITY[name]
    model, seen = START.copy(), []
    objective = method.objective(model, REQUEST)
    model.network.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[1]))
    objective(0)
    asked = relabelled_rows(seed=method.seed) if isinstance(method, RandomLabels) else FORGET
    kept = [] if name == "ascent" or name.endswith("unkept") else RETAIN
    # A word is a token here. A KL term runs the start model too, but through a head of its own.
    words = [sum(len(record.answer.split()) for record in rows) for rows in (asked, kept) if rows]
    assert sorted(seen) == sorted(words)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_npo_starts_as_gradient_ascent_on_the_summed_nll(beta):
    model = START.copy()
    loss = NPO(beta=beta, retain_weight=0, **ALL).objective(model, REQUEST)(0)
    assert loss.item() == pytest.approx(2 / beta * math.log(2), rel=1e-6)
    loss.backward()
    found = {name: value.grad.clone() for name, value in model.network.named_parameters()}
    model.network.zero_grad()
    total = sum(
        GradientAscent(batch_size=1).objective(model, Request((record,), RETAIN, RETAIN, RETAIN))(0)
        * len(record.answer.split())
        for record in FORGET
    )
    (total / len(FORGET)).backward()
    for name, value in model.network.named_parameters():
        torch.testing.assert_close(found[name], value.grad, rtol=2e-4, atol=2e-5)


def test_npo_saturates_where_the_answer_is_gone():
    logprobs = torch.tensor([-1e4, -3.0], requires_grad=True)
    loss = npo_loss(logprobs, torch.tensor([-2.0, -2.0]), 0.5)
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([0.0, 1 / (1 + math.exp(0.5))], abs=1e-6)
    assert loss.item() == pytest.approx(2 * math.log1p(math.exp(-0.5)), rel=1e-5)


@given(
    st.lists(st.tuples(st.floats(-300, 0), st.floats(-300, 0)), min_size=1, max_size=6),
    st.floats(0.01, 5.0),
)
@settings(deadline=None, max_examples=60)
def test_npo_loss_is_finite_and_exact_for_any_answers(rows, beta):
    logprobs, start = np.array(rows).T
    exact = np.mean(2 / beta * np.logaddexp(0.0, beta * (logprobs - start)))
    found = npo_loss(torch.tensor(logprobs), torch.tensor(start), beta).item()
    assert found == pytest.approx(exact, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ["difference, KL", "npo", "labels"])
def test_gradients_are_finite_differences(name):
    method, _ = PARITY[name]
    model = START.copy()
    model.network.double()
    objective = method.objective(model, REQUEST)
    draw_weights(model, seed=6, size=0.05)
    parameters = list(model.network.parameters())
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in parameters]
    objective(0).backward()
    slope = sum((value.grad * along).sum() for value, along in zip(parameters, direction, strict=True)).item()

    def moved(by):
        with torch.no_grad():
            for value, along in zip(parameters, direction, strict=True):
                value.add_(along, alpha=by)
            return objective(0).item()

    step = 1e-3
    ahead, behind = moved(step), moved(-2 * step)
    assert slope == pytest.approx((ahead - behind) / (2 * step), rel=2e-2)
    assert abs(slope) > 0.1


# Random labels


def test_random_labels_are_the_rows_own_wrong_answers():
    request = toy_request(wrong=4)
    for row, record in enumerate(request.forget):
        drawn = {relabelled(request, row, epoch, 0).answer for epoch in range(60)}
        assert drawn == set(record.wrong) - {record.answer}
        assert relabelled(request, row, 3, 0).question == record.question


def test_without_wrong_answers_labels_come_from_the_other_forget_and_retain_rows():
    drawn = {relabelled(REQUEST, 0, epoch, 0).answer for epoch in range(400)}
    assert drawn == {record.answer for record in (*FORGET, *RETAIN)} - {FORGET[0].answer}


def test_the_true_answer_is_drawn_only_where_there_is_no_other():
    true = QA("w1", "w2", wrong=("w2", "w3", "w2"), id="a")
    request = Request((true,), *[(QA("w4", "w2", id="b"),)] * 3)
    assert {relabelled(request, 0, epoch, 0).answer for epoch in range(30)} == {"w3"}
    only = Request((QA("w1", "w2", wrong=("w2",), id="a"),), *[(QA("w4", "w2", id="b"),)] * 3)
    assert relabelled(only, 0, 0, 0).answer == "w2"


def draws(monkeypatch, steps=9, **changes):
    """What RandomLabels encodes, row by row of every epoch: {(row's question, epoch): answer}."""
    asked = []

    def spy(records, *args, **keywords):
        asked.extend(records)
        return batches.encode(records, *args, **keywords)

    monkeypatch.setattr(other_answers, "encode", spy)
    method = RandomLabels(**{"retain_weight": 0, "batch_size": len(FORGET)} | changes)
    objective = method.objective(START.copy(), toy_request(wrong=6))
    for step in range(steps):
        objective(step)
    found = {}
    for place, record in enumerate(asked):
        key = (record.question, place // len(FORGET))
        assert key not in found, "a row came twice in an epoch"
        found[key] = record.answer
    return found


def test_fixed_labels_never_change_and_resampled_ones_do(monkeypatch):
    fixed, resampled = draws(monkeypatch, labels="fixed"), draws(monkeypatch, labels="resampled")
    questions = [record.question for record in toy_request(wrong=6).forget]
    for question in questions:
        assert len({fixed[question, epoch] for epoch in range(9)}) == 1
        assert len({resampled[question, epoch] for epoch in range(9)}) >= 3
    assert [fixed[question, 0] for question in questions] == [resampled[question, 0] for question in questions]


def test_labels_follow_from_seed_epoch_and_row_alone(monkeypatch):
    whole = draws(monkeypatch)
    by_threes = draws(monkeypatch, steps=21, batch_size=3)
    assert by_threes == whole
    assert draws(monkeypatch, seed=1) != whole


def test_a_flipped_label_is_the_rows_first_wrong_answer_in_every_epoch(monkeypatch):
    drawn = draws(monkeypatch, labels="flipped")
    for record in toy_request(wrong=6).forget:
        first = next(answer for answer in record.wrong if answer != record.answer)
        assert {drawn[record.question, epoch] for epoch in range(9)} == {first}


def test_a_row_without_a_wrong_answer_cannot_be_flipped():
    wrong = QA("w1", "w2", wrong=("w2",), id="a")  # its wrong answer is the true one
    request = Request((QA("w3", "w2", wrong=("w4",), id="b"), wrong), *[FORGET] * 3)
    with pytest.raises(SpecError, match=r"^random_labels: forget row 'a' has no wrong answer to flip to; give"):
        RandomLabels(labels="flipped").objective(START.copy(), request)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_a_random_label_is_never_the_true_answer_when_there_is_another(data):
    answers = st.sampled_from(["w1", "w2", "w3"])
    rows = data.draw(st.lists(st.tuples(answers, st.lists(answers, max_size=3)), min_size=2, max_size=5))
    records = tuple(QA("w0", answer, wrong=tuple(wrong), id=str(n)) for n, (answer, wrong) in enumerate(rows))
    request = Request(records[:-1], records[-1:], records[-1:], records[-1:])
    row = random.Random(0).randrange(len(records) - 1)
    record = records[row]
    others = {*record.wrong, *(other.answer for other in records)} - {record.answer}
    drawn = relabelled(request, row, data.draw(st.integers(0, 5)), 0).answer
    assert drawn in others if others else drawn == record.answer


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (GradientAscent, {"learning_rate": 0.0}, "grad_ascent: learning_rate is 0.0; it must be above 0"),
        (GradientAscent, {"learning_rate": math.nan}, "grad_ascent: learning_rate is nan"),
        (NPO, {"batch_size": 0}, "npo: batch_size is 0"),
        (NPO, {"beta": 0}, "npo: beta is 0"),
        (NPO, {"beta": -0.1}, "npo: beta is -0.1"),
        (GradientDifference, {"clip": -1.0}, "grad_diff: clip is -1.0"),
        (RandomLabels, {"labels": "random"}, "labels 'random' is unknown; choose fixed, resampled or flipped"),
        (NPO, {"retain_term": "KL"}, "npo: retain_term 'KL' is unknown; choose nll or kl"),
    ],
)
def test_settings_that_make_no_loss_are_refused(kind, changes, message):
    with pytest.raises(SpecError, match=message) as error:
        kind(**changes).objective(START.copy(), REQUEST)
    assert "\n" not in str(error.value)
