"""The losses of the methods beyond the first ones, each against a float64 transcription of its formula."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_request import (
    answer_logits,
    answer_logprobs,
    draw_weights,
    loss_between,
    padded,
    toy_model,
    toy_request,
    true_logprobs,
)

from palimpsest.data import batches
from palimpsest.data.records import QA, Passage
from palimpsest.errors import SpecError
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.training import TrainingSettings, train
from palimpsest.unlearn import distillation, other_answers, preference
from palimpsest.unlearn.altpo import AltPO
from palimpsest.unlearn.distillation import CEU, UNDIAL, ceu_losses
from palimpsest.unlearn.gradient_ascent import GradientAscent
from palimpsest.unlearn.idk import IDK
from palimpsest.unlearn.losses import sampler
from palimpsest.unlearn.npo import NPO, NPOTokenMean
from palimpsest.unlearn.npo_sam import NPOSAM
from palimpsest.unlearn.pdu import PDU, flatness
from palimpsest.unlearn.preference import DPO, dpo_loss
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.weighted_ascent import WGA, SatImp
from palimpsest.unlearn.whp import WHP

REQUEST = toy_request()
FORGET, RETAIN = REQUEST.forget, REQUEST.retain
START, NOW = toy_model(), toy_model()
draw_weights(NOW, seed=5, size=0.1)  # no loss is at its start value, and no divergence is zero
ALL = {"batch_size": len(FORGET)}
ALONE = {**ALL, "retain_weight": 0}
REFUSAL = "w3 w1 w30"


def tokens(records, value, model=NOW):
    """Mean over all answer tokens of all rows of `value(logprobs [tokens, V], targets)`."""
    return np.concatenate([value(*answer_logprobs(model, record)) for record in records]).mean()


def nll(records, model=NOW):
    return tokens(records, lambda logprobs, targets: -logprobs[range(len(targets)), targets], model)


def answered(answer):
    return [QA(record.question, answer) for record in FORGET]


def dpo(winners, beta):
    """Rafailov et al. 2023, equation 7: -log sigmoid(x) written as log(1 + exp(-x))."""

    def ratio(record):
        return true_logprobs(NOW, record).sum() - true_logprobs(START, record).sum()

    return np.mean(
        [
            math.log1p(math.exp(-beta * (ratio(winner) - ratio(record))))
            for winner, record in zip(winners, FORGET, strict=True)
        ]
    )


def npo_tokenmean(beta):
    return 2 / beta * math.log1p(math.exp(beta * (nll(FORGET, START) - nll(FORGET, NOW))))


def undial(strength):
    losses = []
    for record in FORGET:
        (adjusted, targets), (now, _) = answer_logprobs(START, record), answer_logprobs(NOW, record)
        adjusted[range(len(targets)), targets] -= strength
        weights = np.exp(adjusted)
        losses.append(-(weights / weights.sum(-1, keepdims=True) * now).sum(-1))
    return np.concatenate(losses).mean()


def ceu(skip=0):
    losses = []
    for record in FORGET:
        logprobs, targets = answer_logprobs(NOW, record)
        others = np.exp(logprobs)
        others[range(len(targets)), targets] = 0
        losses.append(-(others / others.sum(-1, keepdims=True) * logprobs).sum(-1)[skip:])
    return np.concatenate(losses).mean()


def whp(alpha):
    """The generic labels by numpy; only the model that was trained further is the library's."""
    steps = TrainingSettings(
        steps=20,
        batch_size=len(FORGET),
        learning_rate=1e-2,
        betas=(0.9, 0.999),
        weight_decay=0,
        schedule="constant",
        warmup=1,
    )
    tuned = train(START.copy(), batches.encode(FORGET, START.tokenizer), steps)
    losses = []
    for record in FORGET:
        (start, _), (reinforced, _) = answer_logits(START, record), answer_logits(tuned, record)
        labels = (start - alpha * np.maximum(0, reinforced - start)).argmax(-1)
        losses.append(-answer_logprobs(NOW, record)[0][range(len(labels)), labels])
    return np.concatenate(losses).mean()


def weighted(weight):
    def value(logprobs, targets):
        logp = logprobs[range(len(targets)), targets]
        return weight(np.exp(logp)) * logp

    return tokens(FORGET, value)


def pdu(limit, dual):
    # Log-probabilities are logits less a constant, and the largest less the mean does not see one.
    flat = tokens(FORGET, lambda logprobs, _: (logprobs.max(-1) - logprobs.mean(-1)) ** 2)
    return flat + dual * (nll(RETAIN) - limit)


ALTPO = AltPO(alternates=1, max_new_tokens=4, retain_weight=0.5, beta=0.7, **ALL)
PARITY = {
    "idk": (IDK(refusals=(REFUSAL,), **ALL), lambda: nll(answered(REFUSAL)) + nll(RETAIN)),
    "dpo": (DPO(refusals=(REFUSAL,), **ALL), lambda: dpo(answered(REFUSAL), 0.1) + nll(RETAIN)),
    "dpo, steep": (DPO(refusals=(REFUSAL,), beta=1.5, **ALONE), lambda: dpo(answered(REFUSAL), 1.5)),
    "altpo": (ALTPO, lambda: dpo([row for [row] in ALTPO.preferred(START, REQUEST)], 0.7) + 0.5 * nll(RETAIN)),
    "npo_tokenmean": (NPOTokenMean(beta=2.5, **ALL), lambda: npo_tokenmean(2.5) + nll(RETAIN)),
    "undial": (UNDIAL(**ALL), lambda: undial(10)),
    "undial, kept": (UNDIAL(strength=0.7, retain_weight=2.0, **ALL), lambda: undial(0.7) + 2 * nll(RETAIN)),
    "ceu": (CEU(**ALL), ceu),
    "whp": (WHP(alpha=3.0, tuning_steps=20, tuning_rate=1e-2, **ALL), lambda: whp(3.0) + nll(RETAIN)),
    "ceu, skipping": (CEU(skip_tokens=1, **ALL), lambda: ceu(1)),
    "wga": (WGA(beta=0.5, **ALL), lambda: weighted(lambda p: p**0.5) + nll(RETAIN)),
    "satimp": (
        SatImp(saturation=0.3, importance=2.0, **ALONE),
        lambda: weighted(lambda p: p**0.3 * (1 - p) ** 2),
    ),
    "pdu": (PDU(limit=1.5, dual=0.4, **ALL), lambda: pdu(1.5, 0.4)),
    "pdu, from the start": (PDU(**ALL), lambda: pdu(nll(RETAIN, START), 1.0)),
}
every = pytest.mark.parametrize("name", PARITY)


def loss_now(method, step=0):
    return loss_between(method, START, NOW, REQUEST, step)


@every
def test_loss_is_its_formula(name):
    method, expected = PARITY[name]
    assert loss_now(method).item() == pytest.approx(expected(), rel=2e-5, abs=2e-5)


@every
def test_padding_moves_no_loss(name, monkeypatch):
    method, _ = PARITY[name]
    plain = loss_now(method).item()
    for module in (batches, other_answers, preference):
        monkeypatch.setattr(module, "collate", padded)
    assert loss_now(method).item() == pytest.approx(plain, rel=1e-5, abs=1e-5)


@every
def test_only_answer_tokens_reach_the_unembedding(name):
    method, _ = PARITY[name]
    model, seen = START.copy(), []
    objective = method.objective(model, REQUEST)
    model.network.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[1]))
    objective(0)
    if name == "altpo":
        read = [[option for [option] in method.preferred(START, REQUEST)], FORGET, RETAIN]
    else:
        forget = {"idk": [answered(REFUSAL)], "dpo": [answered(REFUSAL), FORGET]}.get(name.split(",")[0], [FORGET])
        read = [*forget, *([RETAIN] if isinstance(method, PDU) or getattr(method, "retain_weight", 0) else [])]
    # What the start model says was kept from before the first step.
    assert sorted(seen) == sorted(sum(len(true_logprobs(START, record)) for record in rows) for rows in read)


LOWERING = [
    WGA(**ALONE), SatImp(saturation=1.0, **ALONE), UNDIAL(**ALL), CEU(**ALL),
    NPO(**ALONE), NPOTokenMean(**ALONE), NPOSAM(**ALONE), DPO(refusals=(REFUSAL,), **ALONE),
    AltPO(alternates=1, max_new_tokens=4, **ALONE),
]  # fmt: skip


@pytest.mark.parametrize("method", LOWERING, ids=lambda method: method.name)
def test_down_the_loss_the_answers_become_less_likely(method):
    model = START.copy()
    method.objective(model, REQUEST)(0).backward()
    down = {name: -value.grad for name, value in model.network.named_parameters()}
    model.network.zero_grad()
    (-GradientAscent(**ALL).objective(model, REQUEST)(0)).backward()
    slope = sum((value.grad * down[name]).sum() for name, value in model.network.named_parameters()).item()
    assert slope > 1e-4  # the NLL of the true answers rises


def test_down_the_loss_of_pdu_the_answers_logits_flatten():
    model = START.copy()
    objective = PDU(dual=0.0, **ALL).objective(model, REQUEST)
    before = objective(0)
    before.backward()
    with torch.no_grad():
        for value in model.network.parameters():
            value.add_(value.grad, alpha=-1e-4 / max(1.0, value.grad.norm().item()))
    assert objective(0).item() < before.item() - 1e-5


# Their parts, for any numbers

PROBABILITIES = st.lists(st.floats(0.01, 0.99), min_size=1, max_size=6)


@given(PROBABILITIES, st.floats(0, 6), st.floats(0, 6))
@settings(deadline=None, max_examples=60)
def test_the_weights_are_no_part_of_the_gradient(probabilities, saturation, importance):
    p = torch.tensor(probabilities, dtype=torch.float64)
    found = SatImp(saturation=saturation, importance=importance).weights(p).numpy()
    np.testing.assert_allclose(found, [x**saturation * (1 - x) ** importance for x in probabilities], rtol=1e-9)
    np.testing.assert_allclose(WGA(beta=saturation).weights(p).numpy(), [x**saturation for x in probabilities])


def test_a_weighted_loss_pushes_each_token_by_its_weight_alone():
    model = NOW.copy()
    objective = WGA(beta=1.3, **ALONE).objective(model, REQUEST)
    objective(0).backward()
    found = {name: value.grad.clone() for name, value in model.network.named_parameters()}
    model.network.zero_grad()
    n = sum(len(record.answer.split()) for record in FORGET)
    for record in FORGET:
        ids = torch.tensor([model.tokenizer(f"Question: {record.question}\nAnswer: {record.answer}")["input_ids"]])
        first = ids.shape[1] - len(record.answer.split())
        logp = model.network(ids).logits[0].log_softmax(-1)[range(first - 1, ids.shape[1] - 1), ids[0, first:]]
        (sum(math.exp(value.item()) ** 1.3 * value for value in logp) / n).backward()
    for name, value in model.network.named_parameters():
        torch.testing.assert_close(found[name], value.grad, rtol=2e-4, atol=1e-6)


@given(st.integers(0, 4), st.lists(st.floats(-8, 8), min_size=5, max_size=5))
@settings(deadline=None, max_examples=60)
def test_the_slope_of_ceu_is_the_true_tokens_probability_shared_out(target, logits):
    z = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
    ceu_losses(z, torch.tensor([target])).sum().backward()
    p = np.exp(logits) / np.exp(logits).sum()
    expected = p - np.where(np.arange(5) == target, 0, p / (1 - p[target]))
    np.testing.assert_allclose(z.grad.numpy()[0], expected, atol=1e-9)


def test_undial_is_at_its_minimum_where_the_odds_have_fallen_by_the_strength():
    z = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    there = distillation.lowered(z, torch.tensor([1]), 3.0).requires_grad_()
    distillation.soft_cross_entropy(there, distillation.lowered(z, torch.tensor([1]), 3.0)).sum().backward()
    assert there.grad.abs().max() < 1e-12
    assert there.tolist() == [[1.0, -5.0, 0.5]]


@pytest.mark.parametrize(("n", "by_a_copy"), [(7, False), (400, True)])
def test_the_start_models_predictions_last_in_whichever_way_takes_less_memory(n, by_a_copy, monkeypatch):
    model, request, copies, copy = START.copy(), toy_request(n), [], LanguageModel.copy
    monkeypatch.setattr(LanguageModel, "copy", lambda copied: copies.append(copied) or copy(copied))
    rows = sampler(UNDIAL(batch_size=5), model, request, request.forget)
    at_start = distillation.start_logprobs(model, rows)
    assert bool(copies) is by_a_copy
    model.network.load_state_dict(NOW.network.state_dict())
    batch = rows.at(3)
    expected = np.concatenate([answer_logprobs(START, request.forget[row])[0] for row in batch.rows])
    np.testing.assert_allclose(at_start(batch).numpy(), expected, atol=2e-5)


@given(st.lists(st.tuples(st.floats(-300, 300), st.floats(-300, 300)), min_size=1, max_size=6), st.floats(0.01, 5.0))
@settings(deadline=None, max_examples=60)
def test_dpo_loss_is_finite_and_exact_for_any_answers(rows, beta):
    preferred, rejected = np.array(rows).T
    exact = np.mean(np.logaddexp(0.0, -beta * (preferred - rejected)))
    assert dpo_loss(torch.tensor(preferred), torch.tensor(rejected), beta).item() == pytest.approx(exact, rel=1e-9)


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=6), st.floats(-100, 100))
@settings(deadline=None, max_examples=60)
def test_flatness_sees_no_constant_and_is_0_only_where_all_is_equal(logits, constant):
    z = torch.tensor([logits], dtype=torch.float64)
    assert flatness(z).item() == pytest.approx((max(logits) - np.mean(logits)) ** 2, abs=1e-9)
    assert flatness(z + constant).item() == pytest.approx(flatness(z).item(), abs=1e-6)
    assert flatness(torch.full_like(z, constant)).item() == pytest.approx(0, abs=1e-18)


# What is drawn


def test_refusals_are_drawn_anew_each_epoch_and_all_of_them_are_used():
    refusals = ("w1", "w2 w3", "w4")
    method = IDK(refusals=refusals, **ALL)
    drawn = {row: [method.asked(REQUEST, row, epoch).answer for epoch in range(30)] for row in range(len(FORGET))}
    assert all(set(answers) == set(refusals) for answers in drawn.values())
    again = IDK(refusals=list(refusals), batch_size=2)
    assert again == IDK(refusals=refusals, batch_size=2) and again.asked(REQUEST, 2, 5).answer == drawn[2][5]
    assert [IDK(seed=1, refusals=refusals).asked(REQUEST, 0, epoch).answer for epoch in range(30)] != drawn[0]


@pytest.mark.parametrize("kind", [IDK, DPO])
def test_single_rows_give_each_row_the_loss_of_one_of_its_refusals(kind):
    refusals = ("w1", "w2 w3", "w4")

    def losses_of(record):
        winners = [QA(record.question, refusal) for refusal in refusals]
        if kind is IDK:
            return [nll([winner]) for winner in winners]
        ratio = [true_logprobs(NOW, row).sum() - true_logprobs(START, row).sum() for row in (*winners, record)]
        return [math.log1p(math.exp(-0.1 * (won - ratio[-1]))) for won in ratio[:-1]]

    possible = {record.id: losses_of(record) for record in FORGET}
    method = kind(refusals=refusals, batch_size=1, retain_weight=0)
    model = START.copy()
    objective = method.objective(model, REQUEST)
    model.network.load_state_dict(NOW.network.state_dict())
    n, used = len(FORGET), set()
    for step in range(4 * n):
        [(row, _)] = other_answers.visits(n, step, batch_size=1, seed=0)
        found = objective(step).item()
        gaps = np.abs(np.array(possible[FORGET[row].id]) - found)
        assert gaps.min() < 1e-4
        used.add(int(gaps.argmin()))
    assert used == {0, 1, 2}


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 30), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_visits_are_the_rows_of_the_batch_and_how_often_they_came(n, size, step, seed):
    size = min(size, n)
    encoded = [batches.Encoded((row, 1), 1, 2) for row in range(n)]
    seen = [other_answers.visits(n, at, batch_size=size, seed=seed) for at in range(step + 1)]
    assert tuple(row for row, _ in seen[-1]) == batches.batch_at(encoded, step, batch_size=size, seed=seed).rows
    flat = [visit for at in seen for visit in at]
    assert len(set(flat)) == len(flat)
    assert all(epoch == [row for row, _ in flat[:place]].count(row) for place, (row, epoch) in enumerate(flat))


# What is refused


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (IDK, {"refusals": ()}, r"idk: refusals is \(\); it is a list of sentences, at least one, none empty"),
        (DPO, {"refusals": "no"}, "dpo: refusals is 'no'; it is a list of sentences"),
        (DPO, {"refusals": ["no", " "]}, "dpo: refusals is .* none empty"),
        (DPO, {"beta": 0}, "dpo: beta is 0; it must be above 0"),
        (AltPO, {"temperature": 0.0}, "altpo: temperature is 0.0; it must be above 0"),
        (AltPO, {"alternates": 0}, "altpo: alternates is 0"),
        (UNDIAL, {"strength": math.nan}, "undial: strength is nan"),
        (CEU, {"skip_tokens": -1}, "ceu: skip_tokens is -1; it cannot be below 0"),
        (CEU, {"skip_tokens": 9}, "ceu: skip_tokens is 9, but no forget answer has more than 5 tokens; lower it"),
        (WGA, {"beta": -1.0}, "wga: beta is -1.0; it cannot be below 0"),
        (SatImp, {"importance": math.nan}, "satimp: importance is nan"),
        (NPOSAM, {"rho": 0.0}, "npo_sam: rho is 0.0"),
        (PDU, {"dual": -1.0}, "pdu: dual is -1.0"),
        (PDU, {"limit": 0.0}, "pdu: limit is 0.0"),
    ],
)
def test_settings_that_make_no_loss_are_refused(kind, changes, message):
    with pytest.raises(SpecError, match=f"^{message}") as error:
        kind(**changes).objective(START.copy(), REQUEST)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [IDK, DPO, AltPO])
def test_a_passage_has_no_question_to_answer_otherwise(kind):
    request = Request((FORGET[0], Passage("w1 w2", id="p")), RETAIN, RETAIN, RETAIN)
    with pytest.raises(SpecError, match=f"^{kind.name}: forget row 'p' is a passage"):
        kind().objective(START.copy(), request)
