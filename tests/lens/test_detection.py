"""What detectors are given against plain numpy, the detectors against formulas, what they find and must not find."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax
from scipy.stats import entropy
from sklearn.covariance import LedoitWolf
from tests.lens.test_lens import random_lens
from tests.models.tiny_families import LAYERS, VOCABULARY, WIDTH, tiny_model

from palimpsest.data.records import QA, Choice, Passage, Preference, Record
from palimpsest.errors import DataError, ModelError
from palimpsest.lens import detection
from palimpsest.lens import trajectory as trajectory_module
from palimpsest.lens.detection import DETECTORS, Signs, detect, read_signs, split
from palimpsest.lens.lens import Lens
from palimpsest.metrics.auc import auc
from palimpsest.models.language_model import LanguageModel

ASKED = [
    QA("w5 w6", "w9 w8 w7", wrong=("w10", "w11 w30"), id="one"),
    QA("w12", "w13", wrong=("w14 w15", "w6"), id="two"),
    QA("w5 w6 w7 w8 w9", "w40", wrong=("w41", "w42"), id="three"),
]


def words(seed: int, low: int, high: int, n: int, length: int = 6) -> list[Passage]:
    """Texts of words from `low` to below `high`."""
    drawn = np.random.default_rng(seed).integers(low, high, size=(n, length))
    return [Passage(" ".join(f"w{word}" for word in row), id=f"{seed}-{place}") for place, row in enumerate(drawn)]


def seen(model: LanguageModel, lens: Lens, text: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """A text's tokens, the residual stream [L + 1, T, d] and log-probabilities [L + 1, T, V], in plain numpy."""
    ids, read = model.tokenizer(text)["input_ids"], []
    base = model.network.get_decoder()
    handles = [
        module.register_forward_pre_hook(lambda _, args: read.append(args[0][0].double().numpy()))
        for module in (*base.layers, base.norm)
    ]
    with torch.no_grad():
        logits = model.network(torch.tensor([ids])).logits[0].double().numpy()
    for handle in handles:
        handle.remove()
    states, layers = np.stack(read), []
    gain, head = (w.detach().double().numpy() for w in (base.norm.weight, model.network.lm_head.weight))
    for hidden, change, bias in zip(states, lens.changes.double(), lens.biases.double(), strict=False):
        moved = hidden + hidden @ change.numpy().T + bias.numpy()
        normed = moved / np.sqrt((moved**2).mean(-1, keepdims=True) + base.norm.variance_epsilon) * gain
        layers.append(normed @ head.T)
    return ids, states, log_softmax(np.stack([*layers, logits]), -1)


def test_signs_of_candidates_are_numpys() -> None:
    model = tiny_model("llama")
    lens = random_lens(model)
    signs = read_signs(lens, model, ASKED)
    assert signs.believed.shape == (3, (LAYERS + 1) * 3) and signs.states.shape == (3, LAYERS + 1, WIDTH)
    for row, record in enumerate(ASKED):
        prompt = f"Question: {record.question}\nAnswer:"
        n = len(model.tokenizer(prompt)["input_ids"])
        believed, states = [], []
        for answer in sorted([record.answer, *record.wrong]):
            ids, hidden, logprobs = seen(model, lens, f"{prompt} {answer}")
            believed.append(sum(logprobs[:, place - 1, ids[place]] for place in range(n, len(ids))))
            states += [hidden[:, place] for place in range(n, len(ids))]
        assert np.allclose(signs.believed[row].view(LAYERS + 1, 3).T, believed, rtol=1e-3, atol=1e-3)
        assert np.allclose(signs.states[row], np.mean(states, 0), rtol=1e-4, atol=1e-4)
        assert signs.cost[row].item() == pytest.approx(-np.mean([logprobs[-1, i - 1, ids[i]] for i in range(1, n)]))
        assert signs.length[row].item() == n


def test_signs_of_rows_without_candidates_are_numpys_at_the_prompts_last_token() -> None:
    model = tiny_model("llama")
    lens = random_lens(model)
    asked = {
        "w5 w6 w7 w8": Passage("w5 w6 w7 w8"),
        "Question: w9 w10\nAnswer:": QA("w9 w10", "w11"),
        "Question: w9\nAnswer:": Preference("w9", "w12 w13", "w14"),
    }
    signs = read_signs(lens, model, list(asked.values()))
    assert signs.believed.shape == (3, 4 * LAYERS + 1)
    for row, text in enumerate(asked):
        ids, hidden, logprobs = seen(model, lens, text)
        q = np.exp(logprobs[:, -1])
        expected = [
            [entropy(mine), entropy(q[-1], mine), jensenshannon(mine, q[-1]) ** 2, np.abs(mine - q[-1]).sum() / 2]
            for mine in q
        ]
        assert np.allclose(signs.believed[row], np.concatenate(expected)[:-3], rtol=1e-3, atol=2e-5)
        assert np.allclose(signs.states[row], hidden[:, -1], rtol=1e-4, atol=1e-4)
        cost = -np.mean([logprobs[-1, place - 1, ids[place]] for place in range(1, len(ids))])
        assert signs.cost[row].item() == pytest.approx(cost, rel=1e-4) and signs.length[row].item() == len(ids)


@pytest.mark.parametrize(
    "rows", [ASKED, words(0, 4, VOCABULARY, 3) + words(1, 4, VOCABULARY, 3, 9)], ids=["qa", "text"]
)
def test_batches_and_pieces_change_nothing(rows: Sequence[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    together = read_signs(random_lens(model), model, rows)
    monkeypatch.setattr(trajectory_module, "SAMPLED", 2)
    alone = read_signs(random_lens(model), model, rows, batch_size=1)
    for name in ("believed", "states", "cost", "length"):
        torch.testing.assert_close(getattr(alone, name), getattr(together, name), rtol=1e-4, atol=1e-4)


def signs_of(*records: Record) -> Signs:
    model = tiny_model("llama")
    return read_signs(Lens.logit(model), model, records)


def test_nobody_need_know_which_candidate_is_right() -> None:
    signs = signs_of(QA("w5", "w6", wrong=("w7 w9", "w8")), QA("w5", "w8", wrong=("w6", "w7 w9")))
    assert torch.equal(signs.believed[0], signs.believed[1])
    signs = signs_of(
        Choice("w5 w20", ("w6", "w7"), 0), Choice("w5 w20", ("w6", "w7"), 1), Choice("w5 w20", ("w7", "w6"), 1)
    )
    assert torch.equal(signs.believed[0], signs.believed[1])
    mirrored = signs.believed[2].view(LAYERS + 1, 2).flip(1).flatten()
    torch.testing.assert_close(signs.believed[0], mirrored, rtol=1e-5, atol=1e-5)
    assert not torch.equal(signs.believed[0], signs.believed[2])


def test_the_right_answer_stands_in_the_words_of_the_wrong_ones() -> None:
    reworded = QA("w5", "w30 w31", paraphrased_answer="w6", wrong=("w7",))
    signs = signs_of(reworded, QA("w5", "w6", wrong=("w7",)))
    assert torch.equal(signs.believed[0], signs.believed[1])


def test_the_answer_of_a_row_without_candidates_is_not_read() -> None:
    signs = signs_of(QA("w5 w6", "w7"), QA("w5 w6", "w8 w9 w10"))
    for values in (signs.believed, signs.states, signs.cost, signs.length):
        torch.testing.assert_close(values[0], values[1])


# The detectors.


def drawn(seed: int, n: int, width: int = 6, layers: int = 2) -> Signs:
    """States whose first two directions go together, and beliefs like them."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(n, layers, width)) * [*[3.0] * (width // 2), *[0.5] * (width - width // 2)] + 10
    states[..., 1] = states[..., 0] + 0.1 * rng.normal(size=(n, layers))
    states = torch.tensor(states, dtype=torch.float32)
    cost, length = (torch.tensor(rng.normal(size=n)) for _ in range(2))
    return Signs(states.flatten(1), states, cost, length, 0)


@pytest.mark.parametrize(("n", "width"), [(40, 6), (12, 30)])
def test_distances_are_those_of_the_covariance_written_out(n: int, width: int) -> None:
    normal, rows = drawn(0, n, width), drawn(1, 9, width)
    whole, relative = np.zeros(9), np.zeros(9)
    for layer in range(2):
        known, new = (signs.states[:, layer].double().numpy() for signs in (normal, rows))
        known, new = ((each - known.mean(0)) / known.std(0) for each in (known, new))
        covariance = LedoitWolf(assume_centered=True).fit(known).covariance_
        distance = np.einsum("nd,de,ne->n", new, np.linalg.inv(covariance), new)
        whole += distance
        relative += distance - (new**2 / np.diag(covariance)).sum(1)
    assert np.allclose(DETECTORS["mahalanobis"](normal, rows, 0), whole, rtol=1e-6)
    assert np.allclose(DETECTORS["srm"](normal, rows, 0), relative, rtol=1e-6, atol=1e-6 * whole.max())


def test_only_what_breaks_the_normal_rows_correlation_is_relative() -> None:
    normal, rows = drawn(0, 300), drawn(1, 3)
    rows.states[:] = normal.states.mean(0)
    rows.states[1, :, :2] += torch.tensor([6.0, 6.0])  # far, along what goes together
    rows.states[2, :, :2] += torch.tensor([3.0, -3.0])  # near, across it
    usual, along, across = DETECTORS["srm"](normal, rows, 0)
    assert across > 50 and abs(usual) < 1 and along < usual
    assert DETECTORS["mahalanobis"](normal, rows, 0)[1] > 3


def test_ranked_candidates_stand_in_the_order_of_the_models_last_word() -> None:
    model = tiny_model("llama")
    signs = read_signs(Lens.logit(model), model, ASKED)
    for row, ranked in zip(signs.believed, signs.ranked().believed, strict=True):
        table, expected = row.view(LAYERS + 1, 3).numpy(), ranked.view(LAYERS + 1, 3).numpy()
        assert np.array_equal(expected, table[:, np.argsort(-table[-1])])
    mirrored = replace(signs, believed=signs.believed.unflatten(1, (-1, 3)).flip(2).flatten(1))
    assert torch.equal(mirrored.ranked().believed, signs.ranked().believed)


def test_ranked_candidates_show_a_layer_that_believes_another_answer_than_the_model() -> None:
    """Rows whose middle layer is sure of another answer than the model, whichever of six answers that is."""

    def minds(seed: int, changed: bool, n: int = 150) -> Signs:
        rng = np.random.default_rng(seed)
        believed = rng.normal(-8, 1, size=(n, 3, 6))
        first, last = rng.permuted(np.tile(np.arange(6), (n, 1)), axis=1)[:, :2].T
        believed[np.arange(n), 1, first if changed else last] += 7
        believed[np.arange(n), 2, last] += 8
        return replace(drawn(seed, n), believed=torch.tensor(believed).flatten(1), candidates=6)

    normal, held_out, suspects = minds(0, False), minds(1, False), minds(2, True)
    found = {
        name: auc(DETECTORS[name](normal, held_out, 0), DETECTORS[name](normal, suspects, 0)).value
        for name in ("isolation_forest", "lof", "isolation_forest_ranked", "lof_ranked")
    }
    assert all(found[f"{name}_ranked"] > found[name] + 0.05 for name in ("isolation_forest", "lof")), found
    assert found["lof_ranked"] > 0.95 and found["isolation_forest"] < 0.65, found


@pytest.mark.parametrize("name", ["isolation_forest", "lof", "mahalanobis", "srm"])
def test_what_was_planted_is_found_and_normal_rows_are_not(name: str) -> None:
    normal, others, rows = drawn(0, 120), drawn(1, 100), drawn(2, 40)
    rows.states[..., ::2] += 8
    rows.believed[:] = rows.states.flatten(1)
    usual = DETECTORS[name](normal, others, 0)
    assert auc(usual, DETECTORS[name](normal, rows, 0)).value > 0.95
    assert abs(auc(usual, DETECTORS[name](normal, drawn(3, 100), 0)).value - 0.5) < 0.12


def test_constant_features_and_units_do_not_matter() -> None:
    normal, rows = drawn(0, 30), drawn(1, 5)

    def changed(signs: Signs) -> Signs:
        """A feature and a layer more that are constant but for rounding, and the others in another unit."""
        n = len(signs.states)
        noise = 1e-7 * torch.randn(n, 1, generator=torch.Generator().manual_seed(n))
        states = torch.cat([1000 * signs.states, (5 + noise)[:, None].expand(-1, 2, -1)], 2)
        states = torch.cat([states, 5 + noise[:, None].expand(-1, 1, 7)], 1)
        return replace(signs, states=states, believed=torch.cat([1000 * signs.believed, 5 + noise], 1))

    for name, detector in DETECTORS.items():
        assert np.allclose(detector(changed(normal), changed(rows), 0), detector(normal, rows, 0), rtol=1e-3), name


def test_the_seed_decides_the_forest_and_nothing_else() -> None:
    normal, rows = drawn(0, 30), drawn(1, 5)
    for name, detector in DETECTORS.items():
        first, again, other = (detector(normal, rows, seed) for seed in (0, 0, 1))
        assert np.array_equal(first, again) and np.array_equal(first, other) is ("forest" not in name)


# From rows to numbers.


def found_in(normal: Sequence[Record], held_out: Sequence[Record], suspects: Sequence[Record]) -> dict:
    model = tiny_model("llama")
    return detect(Lens.logit(model), model, normal, held_out, suspects)


def test_strange_texts_are_found_and_more_of_the_same_are_not() -> None:
    normal, held_out = words(0, 4, 9, 60), words(1, 4, 9, 60)
    found = found_in(normal, held_out, words(2, 40, 45, 60))
    assert list(found) == [name for name in DETECTORS if "ranked" not in name]
    assert found["mahalanobis"].auc.low > 0.7 and found["length"].auc.value == 0.5
    for name, null in found_in(normal, held_out, words(3, 4, 9, 60)).items():
        assert abs(null.auc.value - 0.5) < 0.15, name
    longer = found_in(normal, held_out, words(4, 4, 9, 20, 8))
    assert longer["length"].auc.value == 1


def test_rows_with_candidates_are_ranked_too() -> None:
    def asked(seed: int) -> list[QA]:
        texts = [row.text.split() for row in words(seed, 4, 40, 12)]
        return [
            QA(" ".join(text[:4]), text[4], wrong=(text[5], "w41"), id=f"{seed}-{n}") for n, text in enumerate(texts)
        ]

    assert list(found_in(asked(0), asked(1), asked(2))) == list(DETECTORS)


def test_a_suspect_about_a_fitted_subject_is_scored_and_not_compared() -> None:
    def about(records: Sequence[Record], *subjects: str) -> list[Record]:
        return [replace(record, subject=subjects[place % len(subjects)]) for place, record in enumerate(records)]

    normal, held_out = about(words(0, 4, 12, 20), "Ann", "Bea"), about(words(1, 4, 12, 20), "Cleo", "Dora")
    suspects = about(words(2, 4, 12, 20), "Ann", "Cleo", "Eve")
    for found in found_in(normal, held_out, suspects).values():
        compared = [place for place, record in enumerate(suspects) if record.subject != "Ann"]
        clusters = [[record.subject for record in side] for side in (held_out, [suspects[place] for place in compared])]
        assert len(found.suspects) == 20 and found.auc == auc(found.held_out, found.suspects[compared], *clusters)


def test_normal_rows_are_parted_by_subject() -> None:
    rows = [QA(f"q{place}", "a", subject=f"s{place % 5}", id=str(place)) for place in range(20)]
    fitted, held_out = split(rows, seed=0)
    subjects = [{row.subject for row in side} for side in (fitted, held_out)]
    assert subjects[0].isdisjoint(subjects[1]) and [len(side) for side in subjects] == [2, 3]
    assert sorted([*fitted, *held_out], key=rows.index) == rows and split(rows, seed=0) == (fitted, held_out)
    assert {tuple(split(rows, seed=seed)[0]) for seed in range(5)} != {tuple(fitted)}


NORMAL, HELD_OUT = words(0, 4, 30, 12), words(1, 4, 30, 3)


@pytest.mark.parametrize(
    ("normal", "held_out", "suspects", "says"),
    [
        (
            NORMAL[:9],
            HELD_OUT,
            NORMAL,
            "^9 normal rows to fit detectors to and 3 held out are too few; give at least 10",
        ),
        (NORMAL, [], NORMAL, "12 normal rows to fit detectors to and 0 held out are too few"),
        (NORMAL, NORMAL[:1], HELD_OUT, "^subject '0-0' is fitted to and held out; part normal rows by subject"),
        (NORMAL, HELD_OUT, NORMAL[:2], "^all 2 suspects are about subjects that are fitted to; give others"),
        (NORMAL, HELD_OUT, [], "^there is no suspect; give one at least"),
        (NORMAL, HELD_OUT, ASKED, "^record 'one' has 3 candidate answers, but '0-0' has 0; give rows that all have as"),
        (NORMAL, HELD_OUT, [Passage("w5", id="short")], "^record 'short': "),
        ([Passage("w5 w6", id=str(place)) for place in range(10)], HELD_OUT, HELD_OUT, "are alike to every layer"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    normal: list[Record], held_out: list[Record], suspects: list[Record], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        found_in(normal, held_out, suspects)


def test_one_subject_cannot_be_parted() -> None:
    with pytest.raises(DataError, match="1 subject cannot be parted in two"):
        split([QA("q", "a", subject="one"), QA("p", "a", subject="one")], seed=0)


def test_double_precision_is_read_too() -> None:
    model = tiny_model("llama")
    single = read_signs(Lens.logit(model), model, ASKED)
    model.network.double()
    double = read_signs(Lens.logit(model), model, ASKED)
    torch.testing.assert_close(double.believed, single.believed, rtol=1e-4, atol=1e-4)


def test_a_damaged_model_and_another_models_lens_are_refused() -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    with pytest.raises(ModelError, match="made for another unembedding"):
        read_signs(Lens.logit(other), model, ASKED)
    with torch.no_grad():
        model.anatomy.embedding.weight[model.tokenizer("w12")["input_ids"]] = torch.nan
    with pytest.raises(ModelError, match="record 'two' is not finite; the model is damaged"):
        read_signs(Lens.logit(model), model, ASKED)


def test_nothing_as_wide_as_the_vocabulary_is_kept() -> None:
    """Beliefs are asked for where they are needed: at the tokens before a candidate's, the model's at the prompt's."""
    model, asked = tiny_model("llama"), list[int]()
    original = detection.beliefs

    def counting(lens, readout, own, layers):
        asked.append(layers.shape[0] * layers.shape[1])
        return original(lens, readout, own, layers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detection, "beliefs", counting)
        signs = read_signs(Lens.logit(model), model, ASKED)
    of_candidates = sum(len(answer.split()) for row in ASKED for answer in (row.answer, *row.wrong))
    assert sum(asked) == (LAYERS + 1) * of_candidates + int(signs.length.sum()) - len(ASKED)
