"""The report card against numpy over whole distributions."""

import numpy as np
import pytest
from scipy.special import log_softmax
from tests.lens.test_lens import random_lens
from tests.models.tiny_families import tiny_model, tiny_rows

from palimpsest.lens.card import report_card
from palimpsest.lens.hidden import read_layers
from palimpsest.lens.lens import Lens

ROWS = tiny_rows(6, 4, 7, 5, 3, 6)


def beliefs(lens: Lens, model, rows) -> tuple[np.ndarray, np.ndarray]:
    """[L + 1, N, V] log-probabilities, and [N] what follows each token, -1 where nothing does."""
    layers, following = [], []
    readout = lens.readout(model)
    for row in rows:
        hidden = next(read_layers(model, [row]))
        logits = [readout.logits(readout.z(lens.translate(h, n))).numpy() for n, h in enumerate(hidden.layers)]
        layers.append(log_softmax(np.stack(logits).astype(np.float64), -1))
        following += [*row.ids[1:], -1]
    return np.concatenate(layers, 1), np.array(following)


def test_every_number_by_hand() -> None:
    model = tiny_model("llama")
    lens = random_lens(model)
    log_q, following = beliefs(lens, model, ROWS)
    log_p, known = log_q[-1], following >= 0
    cards = report_card(lens, model, ROWS)
    assert [card.layer for card in cards] == [0, 1, 2, 3]
    for layer, card in enumerate(cards):
        q, p = np.exp(log_q[layer]), np.exp(log_p)
        marginal_q, marginal_p = q.mean(0), p.mean(0)
        expected = {
            "kl": (p * (log_p - log_q[layer])).sum(-1).mean(),
            "cross_entropy": -log_q[layer][known, following[known]].mean(),
            "entropy": -(q * log_q[layer]).sum(-1).mean(),
            "agreement": (q.argmax(-1) == p.argmax(-1)).mean(),
            "bias": (marginal_p * np.log(marginal_p / marginal_q)).sum(),
        }
        for name, value in expected.items():
            score = getattr(card, name)
            assert score.value == pytest.approx(value, rel=1e-4, abs=1e-5), name
            assert score.low <= score.value + 1e-9 and score.value <= score.high + 1e-9 and score.clusters == len(ROWS)
        assert card.calibration is None


def test_the_model_itself_is_without_fault() -> None:
    model = tiny_model("gpt2")
    last = report_card(random_lens(model), model, ROWS, causal=ROWS[:2], directions=3)[-1]
    assert last.kl.value == pytest.approx(0, abs=1e-6) and last.bias.value == pytest.approx(0, abs=1e-6)
    assert last.agreement.value == 1 and last.calibration is None


def test_calibration_is_measured_where_it_is_asked_for() -> None:
    model = tiny_model("llama")
    cards = report_card(Lens.logit(model), model, ROWS, causal=ROWS[:3], directions=4)
    for card in cards[:-1]:
        assert card.calibration and card.calibration.in_lens.shape == (4, 17)
        low, high = card.calibration.interval()
        assert 0 < low <= card.calibration.ratio <= high


def test_transfer_reads_another_models_layers_and_is_held_against_its_own_predictions() -> None:
    rows = [*tiny_rows(6, 4)]
    model, other = tiny_model("llama"), tiny_model("llama", seed=3)
    lens = random_lens(model)
    found = report_card(lens, other, rows, fitted_to=model)
    assert found[-1].kl.value == pytest.approx(0, abs=1e-6)
    assert found[0].kl.value != pytest.approx(report_card(lens, model, rows)[0].kl.value, rel=0.01)
