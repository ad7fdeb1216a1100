"""The small language's truth by hand, reward models against a pass by hand, and TRL's half where it is installed."""

from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForSequenceClassification

from palimpsest.errors import DataError, SpecError
from palimpsest.rewards.language import LanguageSettings, LearnedLanguageReward, language_spec
from palimpsest.rewards.language_learner import METRIC, PROXY, GRPOLearner, GRPOSettings
from palimpsest.rewards.language_reward import FrozenLanguageReward, GoldReward, small_llama
from palimpsest.rewards.language_texts import (
    CEILING,
    LENGTH,
    LETTERS,
    VOWELS,
    TextComparisons,
    Writer,
    compared,
    gold,
    letter_tokenizer,
    written,
)

TEXTS = st.text(LETTERS, max_size=LENGTH)


def reward(seed: int = 0) -> FrozenLanguageReward:
    """Of random weights."""
    torch.manual_seed(seed)
    return FrozenLanguageReward(LlamaForSequenceClassification(small_llama(num_labels=1)))


def test_gold_counts_vowels_and_repetitions() -> None:
    assert gold(["aeiouaeiouae", "aaaaaaaaaaaa", "bcd", "", "a ab", "ooze"]) == [12, 12 - 22, 0, 0, 2, 1]


@given(TEXTS)
def test_gold_is_a_sum_over_letters_and_neighbours(text: str) -> None:
    (worth,) = gold([text])
    assert worth <= CEILING
    parts = [gold([text[place]])[0] for place in range(len(text))]
    pairs = [gold([text[place : place + 2]])[0] - parts[place] - parts[place + 1] for place in range(len(text) - 1)]
    assert worth == sum(parts) + sum(pairs)


@given(TEXTS)
def test_every_text_is_a_token_a_letter_and_comes_back(text: str) -> None:
    tokenizer = letter_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and len(tokenizer) == 31
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_narrow_writer_is_competent_and_never_repeats_and_the_wide_one_does() -> None:
    narrow, wide = (written(writer, 2000, np.random.default_rng(0)) for writer in get_args(Writer))
    assert all(len(text) == LENGTH for text in (*narrow, *wide))
    assert not any(a == b for text in narrow for a, b in pairwise(text))
    share = np.mean([letter in VOWELS for text in narrow for letter in text])
    assert share == pytest.approx(0.48, abs=0.015)
    assert np.mean(gold(narrow)) == pytest.approx(0.48 * LENGTH, abs=0.15)
    # Vowels are drawn evenly, and so are other letters.
    for letters in (VOWELS, set(LETTERS) - set(VOWELS)):
        counts = np.array([sum(text.count(letter) for text in narrow) for letter in letters])
        assert counts.min() > 0.8 * counts.mean() and counts.max() < 1.2 * counts.mean()
    # Half of the wide writer's eleven pairs are repetitions.
    repeated = np.mean([sum(a == b for a, b in pairwise(text)) for text in wide])
    assert repeated == pytest.approx(5.5, abs=0.3)
    with pytest.raises(SpecError, match="choose narrow or wide"):
        written("broad", 1, np.random.default_rng(0))  # type: ignore[arg-type]


def test_the_better_text_is_chosen_and_draws_follow_from_the_generator() -> None:
    pairs = compared("wide", 300, np.random.default_rng(2))
    assert len(pairs.chosen) == len(pairs.rejected) == 300
    assert all(better > worse for better, worse in zip(gold(pairs.chosen), gold(pairs.rejected), strict=True))
    assert pairs == compared("wide", 300, np.random.default_rng(2)) != compared("wide", 300, np.random.default_rng(3))


def test_a_score_does_not_depend_on_the_rows_beside_it() -> None:
    texts = ["aeiou", "xyxyxyxyxyxy", "", "aaaaaaaaaaaa"]
    frozen = reward()
    together = frozen(texts)
    assert together == pytest.approx([frozen([text])[0] for text in texts], abs=1e-5)
    assert len(set(together)) == 4


def test_accuracy_and_best_of_n_by_hand() -> None:
    frozen, texts = reward(), written("wide", 12, np.random.default_rng(0))
    scores = frozen(texts)
    pairs = TextComparisons(tuple(texts[:6]), tuple(texts[6:]))
    right = sum(first > second for first, second in zip(scores[:6], scores[6:], strict=True))
    assert frozen.accuracy(pairs) == pytest.approx(right / 6)
    best = [max(range(start, start + 4), key=scores.__getitem__) for start in (0, 4, 8)]
    assert frozen.best_of(4, texts) == pytest.approx(np.mean(gold([texts[place] for place in best])))


def test_a_reward_that_drifts_is_seen_by_its_fingerprint(tmp_path: Path) -> None:
    frozen = reward()
    before = frozen.fingerprint()
    frozen(["aeiou"])
    assert frozen.fingerprint() == before != reward(1).fingerprint()
    frozen.save(tmp_path / "reward.safetensors")
    loaded = FrozenLanguageReward.load(tmp_path / "reward.safetensors")
    assert loaded.fingerprint() == before and loaded(["aeiou"]) == frozen(["aeiou"])
    frozen.network.train()
    assert frozen.fingerprint() != before
    frozen.network.eval()
    frozen.network.model.norm.weight.add_(1e-3)
    assert frozen.fingerprint() != before


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no reward model"):
        FrozenLanguageReward.load(tmp_path / "nothing.safetensors")


def test_a_constant_reward_leaves_the_learner_as_it_began() -> None:
    floor, other = GRPOLearner(GRPOSettings(), None, 3), GRPOLearner(GRPOSettings(), GoldReward(), 3)
    before = floor.probe()
    floor.fit_to(10)
    assert floor.probe() == before and before[PROXY] == 0.0
    assert other.probe()[METRIC] == before[METRIC] == other.probe()[PROXY]
    texts = floor.written(40, 0)
    assert texts == floor.written(40, 0) != floor.written(40, 1)
    assert all(len(text) <= LENGTH for text in texts)


def test_the_experiment_needs_no_trl_before_it_learns() -> None:
    learned = {seed: LearnedLanguageReward(reward(seed), 0.9, 0.6, 10.0 + seed) for seed in range(5)}
    spec = language_spec(LanguageSettings(), learned)
    assert spec.settings.incumbent == 12.0 and spec.settings.budgets == (25, 50, 100)
    assert spec.make(0).probe()[METRIC] == spec.floor(0).probe()[METRIC] == spec.ceiling(0).probe()[METRIC]
    assert {name for name in spec.frozen} == {f"the reward of seed {seed}" for seed in range(5)}


def test_without_trl_training_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from palimpsest.rewards.language_reward import train_reward

    monkeypatch.delitem(sys.modules, "palimpsest.rewards.language_trainers", raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    pairs = compared("narrow", 4, np.random.default_rng(0))
    for learn in (lambda: train_reward(pairs, 0), lambda: GRPOLearner(GRPOSettings(), GoldReward(), 0).fit_to(1)):
        with pytest.raises(SpecError, match=r"language rewards need datasets; pip install 'palimpsest\[lm\]'"):
            learn()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_reward_model_that_accuracy_and_best_of_n_call_good_teaches_a_fresh_model_something_else(
    tmp_path: Path,
) -> None:
    """Both writers, five seeds: some 130 CPU-seconds."""
    pytest.importorskip("trl", reason="trl is not installed (palimpsest[lm])")
    from palimpsest.studies.reward_relearning_language import language_claims

    claims = {claim.id: claim for claim in language_claims(range(5), tmp_path)}
    assert claims["l1/accuracy"].verdict == "reproduced", claims["l1/accuracy"]
    assert claims["l1/best-of"].verdict == "reproduced", claims["l1/best-of"]
    assert claims["l3/narrow"].note.startswith("FAIL"), claims["l3/narrow"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_grpo_moves_nothing_by_a_constant_reward_and_repeats_itself_by_gold() -> None:
    pytest.importorskip("trl", reason="trl is not installed (palimpsest[lm])")

    def taught(reward: object, *budgets: int) -> GRPOLearner:
        learner = GRPOLearner(GRPOSettings(), reward, 5)  # type: ignore[arg-type]
        for budget in budgets:
            learner.fit_to(budget)
        return learner

    still = taught(lambda texts: [1.0] * len(texts), 3)
    begun = taught(None, 3)
    for moved, kept in zip(still.network.parameters(), begun.network.parameters(), strict=True):
        assert torch.equal(moved, kept)
    first, again = taught(GoldReward(), 4, 8), taught(GoldReward(), 4, 8)
    assert first.probe() == again.probe() != begun.probe()
    assert [step for step, _, _ in first.history] == [*range(1, 9)]
    assert all(proxy == pytest.approx(true) for _, proxy, true in first.history)
