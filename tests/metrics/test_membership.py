"""Six attacks against transcriptions on the full logits in float64, and attacks that are chosen on other items."""

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.quiz import learn, quiz

from palimpsest.data.batches import Batch, Encoded, batches, encode
from palimpsest.data.records import QA, Passage
from palimpsest.errors import DataError, ModelError
from palimpsest.metrics import membership as module
from palimpsest.metrics.auc import auc
from palimpsest.metrics.calibration import calibrate, halves, try_attack
from palimpsest.metrics.likelihood import answer_scores
from palimpsest.metrics.membership import MembershipScores, membership_scores, write_membership
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.tokenizers import word_tokenizer

Reference = Callable[[LanguageModel, Encoded], np.ndarray]
Build = Callable[..., LanguageModel]
SHARES = (0.2, 0.4, 1.0)
NAMES = [f"{first}{last}" for first in "bel cor dun fal gor hal".split() for last in "ax id on us yr".split()]


def transcribed(logprobs: np.ndarray, targets: np.ndarray, text: str) -> dict[str, float]:
    """The attacks that need one forward pass, as their papers define them."""
    chosen = logprobs[np.arange(len(targets)), targets]
    p = np.exp(logprobs)
    mean = (p * logprobs).sum(-1)
    deviation = np.sqrt((p * logprobs**2).sum(-1) - mean**2)
    standardised = (chosen - mean) / deviation
    costs = {"loss": -chosen.mean(), "zlib": -chosen.mean() / len(zlib.compress(text.encode()))}
    for share in SHARES:
        k = max(1, math.floor(len(targets) * share))
        costs[f"min_k@{share:g}"] = -np.sort(chosen)[:k].mean()
        costs[f"min_k_plus_plus@{share:g}"] = -np.sort(standardised)[:k].mean()
    return costs


def norms(model: LanguageModel, row: Encoded) -> tuple[float, float]:
    """L2 of the whole gradient of the mean loss, and the mean over tensors of theirs, by plain backward."""
    twin = model.copy().network.double()
    logits = twin(torch.tensor([row.ids])).logits[0, row.start - 1 : row.stop - 1]
    torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[row.start : row.stop])).backward()
    found = [float(weight.grad.square().sum().sqrt()) for weight in twin.parameters() if weight.grad is not None]
    return math.hypot(*found), sum(found) / len(found)


def test_every_attack_is_its_formula_on_the_full_logits(
    model: LanguageModel, other_model: LanguageModel, records: list[QA], reference: Reference
) -> None:
    found = membership_scores(
        model, records, reference=other_model, gradients=True, shares=SHARES, template="plain", batch_size=4
    )
    assert found.items == tuple(record.id for record in records)
    assert found.clusters == tuple(record.subject for record in records)
    for place, (record, row) in enumerate(zip(records, encode(records, model.tokenizer), strict=True)):
        targets = np.array(row.ids[row.start : row.stop])
        expected = transcribed(reference(model, row), targets, record.answer)
        theirs = transcribed(reference(other_model, row), targets, record.answer)
        expected["reference"] = expected["loss"] - theirs["loss"]
        expected["gradient_norm"], expected["gradient_norm@mean_tensor"] = norms(model, row)
        assert set(found.costs) == set(expected)
        for attack, cost in expected.items():
            assert found.costs[attack][place].item() == pytest.approx(cost, rel=2e-4, abs=1e-5), attack


def test_passages_are_scored_from_their_second_token_on(
    model: LanguageModel, records: list[QA], reference: Reference
) -> None:
    passages = [Passage(f"{record.question} {record.answer}") for record in records]
    found = membership_scores(model, passages, shares=SHARES)
    assert found.items == tuple(passage.text for passage in passages)
    for place, row in enumerate(encode(passages, model.tokenizer)):
        assert row.start == 1
        expected = transcribed(reference(model, row), np.array(row.ids[1:]), passages[place].text)
        assert found.costs["min_k@0.4"][place].item() == pytest.approx(expected["min_k@0.4"], rel=1e-4)
        assert found.costs["zlib"][place].item() == pytest.approx(expected["zlib"], rel=1e-4)


@given(st.integers(1, 12), st.permutations(range(11)), st.sampled_from(["left", "right"]))
@settings(deadline=None, max_examples=12)
def test_neither_batch_size_nor_order_nor_padding_changes_a_cost(
    model: LanguageModel, records: list[QA], batch_size: int, order: list[int], side: str
) -> None:
    def padded(encoded: list[Encoded], *, batch_size: int) -> list[Batch]:
        return list(batches(encoded, batch_size=batch_size, side=side))  # type: ignore[arg-type]

    one = membership_scores(model, records, batch_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "batches", padded)
        many = membership_scores(model, [records[place] for place in order], batch_size=batch_size)
    assert set(many.costs) == set(one.costs) and len(one.costs) == 2 + 2 * len(module.SHARES)
    for attack, costs in many.costs.items():
        torch.testing.assert_close(costs, one.costs[attack][order], rtol=1e-4, atol=1e-5)


def test_a_larger_share_never_makes_an_item_cost_more_and_all_of_it_is_the_loss(
    model: LanguageModel, records: list[QA]
) -> None:
    shares = (0.1, 0.3, 0.5, 0.7, 1.0)
    found = membership_scores(model, records, shares=shares).costs
    for attack in ("min_k", "min_k_plus_plus"):
        by_share = torch.stack([found[f"{attack}@{share:g}"] for share in shares])
        assert (by_share.diff(dim=0) <= 1e-5).all() and (by_share.diff(dim=0) < -1e-3).any()
    torch.testing.assert_close(found["min_k@1"], found["loss"])


def test_standardising_in_parts_and_over_impossible_or_equal_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    logits[3, 2:] = -torch.inf
    logits[4] = 1.0  # every token is as likely: no deviation, but the mean is met
    chosen = logits.log_softmax(-1)[torch.arange(9), torch.zeros(9, dtype=torch.long)]
    whole = module._standardised(chosen, logits)
    assert whole.isfinite().all() and whole[4] == pytest.approx(0, abs=1e-3)
    p = np.exp(logits[3, :2].double().log_softmax(-1).numpy())
    mean, square = (p * np.log(p)).sum(), (p * np.log(p) ** 2).sum()
    assert whole[3].item() == pytest.approx((np.log(p[0]) - mean) / np.sqrt(square - mean**2), rel=1e-4)
    monkeypatch.setattr(module, "CHUNK", 15)
    assert torch.equal(module._standardised(chosen, logits), whole)


def test_a_token_known_by_heart_costs_more_by_min_k_plus_plus_than_one_half_known() -> None:
    """Both the token's surprise and the deviation go to 0, and the former faster: this attack saturates."""
    logits = torch.zeros(3, 50)
    logits[:, 0] = torch.tensor([-2.0, 6.0, 14.0])
    logprobs = logits.log_softmax(-1)[:, 0]
    unknown, half_known, by_heart = module._standardised(logprobs, logits).tolist()
    assert unknown < by_heart < half_known and by_heart == pytest.approx(0, abs=0.01)


def test_gradients_in_the_weights_and_frozen_weights_stay_as_they_are(build: Build, records: list[QA]) -> None:
    model = build(0)
    weights = list(model.network.parameters())
    weights[0].requires_grad_(False)
    weights[1].grad = torch.ones_like(weights[1])
    model.network.train()
    found = membership_scores(model, records[:3], gradients=True).costs
    assert not weights[0].requires_grad and all(weight.requires_grad for weight in weights[1:])
    assert weights[1].grad is not None and torch.equal(weights[1].grad, torch.ones_like(weights[1]))
    assert weights[2].grad is None and model.network.training
    free = membership_scores(build(0), records[:3], gradients=True).costs
    torch.testing.assert_close(found["gradient_norm"], free["gradient_norm"])


def test_mistakes_are_one_line(model: LanguageModel, build: Build, records: list[QA], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^two items are called '4'; give each record an id of its own$"):
        membership_scores(model, [*records[:5], records[4]])
    other = replace(build(0), name="gold")
    other.tokenizer.add_tokens([" w99"])
    with pytest.raises(
        ModelError, match=r"^gold: its tokenizer is not that of .*\(token ' w99' is 46 in one and missing"
    ):
        membership_scores(model, records, reference=other)
    broken = made([1.0, math.nan], "m", 1)
    with pytest.raises(DataError, match=r"^item 'm1' costs nan by attack 'good', not a finite number; the model is"):
        write_membership(tmp_path / "m.json", broken, broken)


def test_attacks_tell_what_was_learnt_from_what_was_not_and_gold_gives_nothing_away() -> None:
    """Facts drawn alike: one model learnt a third of them, gold another third, and the last third is unseen."""
    facts = [QA(row["question"], row["choices"][row["answer"]], id=row["question"]) for row in quiz(NAMES)]
    learnt, others, unseen = facts[::3], facts[1::3], facts[2::3]
    tokenizer = word_tokenizer([f"Question: {fact.question}\nAnswer: {fact.answer}" for fact in facts])
    full, gold = learn(learnt, tokenizer, steps=80), learn(others, tokenizer, steps=80)
    sides = [[membership_scores(model, some, gradients=True) for some in (learnt, unseen)] for model in (full, gold)]
    for attack in ("loss", "zlib", "min_k@0.2", "gradient_norm", "gradient_norm@mean_tensor"):
        of_full, of_gold = (auc(members.costs[attack], seen.costs[attack]) for members, seen in sides)
        assert of_full.value > 0.9 and of_full.low > 0.5, attack
        assert abs(of_gold.value - 0.5) < 0.35, attack  # of ten and ten: chance is further off once in 150 times
    assert answer_scores(full, learnt).extraction_strength.mean() > 0.9
    assert answer_scores(full, unseen).extraction_strength.mean() < 0.5


# --- chosen on other items --------------------------------------------------------------------------------------


def made(costs: list[float], side: str, items_a_subject: int, **more: list[float]) -> MembershipScores:
    items = tuple(f"{side}{place}" for place in range(len(costs)))
    clusters = tuple(f"{side} {place // items_a_subject}" for place in range(len(costs)))
    return MembershipScores(
        items, clusters, {name: torch.tensor(values) for name, values in {"good": costs, **more}.items()}
    )


def test_every_items_costs_stand_in_one_file(tmp_path: Path) -> None:
    members, nonmembers = made([0.5, 1.5], "m", 2, other=[2.0, 3.0]), made([4.0], "n", 1, other=[5.0])
    write_membership(tmp_path / "membership.json", members, nonmembers)
    assert json.loads((tmp_path / "membership.json").read_text()) == [
        {"item": "m0", "cluster": "m 0", "member": True, "costs": {"good": 0.5, "other": 2.0}},
        {"item": "m1", "cluster": "m 0", "member": True, "costs": {"good": 1.5, "other": 3.0}},
        {"item": "n0", "cluster": "n 0", "member": False, "costs": {"good": 4.0, "other": 5.0}},
    ]


def test_an_attack_is_tried_as_it_was_chosen() -> None:
    members = made([1, 2, 3, 6], "m", 1, flat=[1.0] * 4)
    nonmembers = made([5, 7, 8, 9], "n", 1, flat=[1.0] * 4)
    attack = calibrate(members, nonmembers)
    assert (attack.name, attack.inverted, attack.threshold.value) == ("good", False, 4)
    assert attack.auc == 15 / 16 and attack.threshold.balanced_accuracy == 7 / 8
    test = made([3.9, 4.1], "x", 1), made([3.0, 4.5, 9.0, 9.0], "y", 1)
    found = try_attack(attack, *test)
    assert (found.true_positives, found.false_positives, found.balanced_accuracy) == (0.5, 0.25, 0.625)
    assert found.auc.value == 6 / 8


def test_forgetting_that_goes_too_far_is_found_out_too() -> None:
    """What was forgotten costs far more than what was never seen: an AUC near 0, and a leak."""
    forgotten, unseen = made([9, 10, 11, 12], "m", 1), made([1, 2, 3, 4], "n", 1)
    attack = calibrate(forgotten, unseen)
    assert attack.inverted and attack.auc == 1
    found = try_attack(attack, made([10.0, 9.5], "x", 1), made([2.0, 1.0], "y", 1))
    assert found.auc.value == 1 and found.balanced_accuracy == 1


def test_the_choice_never_sees_the_test_items() -> None:
    """Of forty attacks that know nothing the best looks good where it was chosen, and not elsewhere."""
    draws = np.random.default_rng(0)
    seen, held_out = [], []
    for seed in range(20):
        sides = [
            made(
                draws.normal(size=40).tolist(),
                side,
                4,
                **{f"noise{number}": draws.normal(size=40).tolist() for number in range(39)},
            )
            for side in "mn"
        ]
        chosen, kept = zip(*(halves(side, seed=seed) for side in sides), strict=True)
        attack = calibrate(*chosen)
        seen.append(attack.auc)
        held_out.append(try_attack(attack, *kept).auc.value)
    assert np.mean(seen) > 0.65
    assert abs(np.mean(held_out) - 0.5) < 0.06


def test_halves_part_subjects_and_depend_on_the_seed_alone() -> None:
    scores = made(list(map(float, range(20))), "m", 4)
    for seed in range(4):
        one, other = halves(scores, seed=seed)
        assert sorted(one.items + other.items) == sorted(scores.items)
        assert set(one.clusters).isdisjoint(other.clusters) and len(set(one.clusters)) == 2
        assert all(one.costs["good"][place] == float(item[1:]) for place, item in enumerate(one.items))
        assert halves(scores, seed=seed)[0].items == one.items
    assert len({halves(scores, seed=seed)[0].items for seed in range(8)}) > 1
    with pytest.raises(DataError, match=r"^1 subject cannot be parted in two"):
        halves(made([1.0, 2.0], "m", 2), seed=0)


def test_items_that_the_attack_was_chosen_on_are_refused() -> None:
    members, nonmembers = made([1, 2], "m", 1), made([3, 4], "n", 1)
    attack = calibrate(members, nonmembers)
    with pytest.raises(DataError, match=r"^item 'n0' was used to choose the attack; test on items of other subjects$"):
        try_attack(attack, made([1.0], "x", 1), nonmembers)
    other = MembershipScores(("z",), ("z",), {"loss": torch.tensor([1.0])})
    with pytest.raises(DataError, match=r"^attack 'good' was not scored on the test items"):
        try_attack(attack, other, other)
    with pytest.raises(DataError, match=r"^the members and the non-members have no attack in common"):
        calibrate(members, other)
