"""A guard against destroyed models: one that says the same thing always has not forgotten, it has broken.

Ask it on retain or neutral questions. On the forget set "I don't know" to every question is a refusal, not a collapse.

What is ordinary depends on the questions: where a relation has two possible values, half of all answers are the same.
So every indicator is compared with a control's answers to the same questions (gold's, the original's, or the true
answers) when they are given, and only extremes trip without one.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

MIN_ANSWERS = 5
"""With fewer answers their variety says nothing."""
NGRAM = 3
"""Words in the n-grams whose repetition is counted."""
SHARE = 0.5
"""A share below this never trips with a control."""
SHARE_ALONE = 0.9
"""The limit of a share without a control."""
EXCESS = 0.25
"""How far a share must lie above its control's."""
ENTROPY_ALONE = 0.3
"""Nats. The limit of the word entropy without a control: a coin that lands 91 % on one side."""
NLL_EXCESS = 3.0
"""Nats per token above gold: each true token is e^3 = 20 times less likely than it should be."""
NLL_ALONE = math.log(262144)
"""Nats per token without gold: worse than guessing evenly among the tokens of the largest vocabularies in use."""


@dataclass(frozen=True, slots=True)
class Indicator:
    """One sign of collapse."""

    value: float
    control: float | None
    """The same for the control; None when there is none."""
    limit: float
    """What the value was held against."""
    tripped: bool


@dataclass(frozen=True, slots=True)
class Collapse:
    """Whether a model is destroyed, and by which signs."""

    constant: Indicator
    """Share of the most common answer among all answers (case and spaces aside)."""
    repetition: Indicator
    """Mean over answers of the share of word 3-grams that stood in the same answer before (Welleck et al. 2020)."""
    entropy: Indicator
    """Entropy of the distribution of words over all answers, nats; low is bad."""
    nll: Indicator
    """Median negative log-likelihood of the true answers, nats/token; the control is gold's. Capped at 1e6."""
    collapsed: bool
    """Whether any indicator tripped."""
    reason: str
    """The signs that tripped, with their numbers; empty for a healthy model."""


def collapse(
    answers: Sequence[str],
    nlls: ArrayLike,
    *,
    control_answers: Sequence[str] | None = None,
    gold_nlls: ArrayLike | None = None,
) -> Collapse:
    """Look for constant output, repetition, few words and an exploded likelihood.

    Args:
        answers: [n] the model's greedy answers to n different questions.
        nlls: [n] its negative log-likelihoods of the true answers, nats/token.
        control_answers: answers of gold or the original to the same questions, or the true answers.
        gold_nlls: [n] gold's (or the original's) negative log-likelihoods.
    """
    enough = len(answers) >= MIN_ANSWERS

    def control(measure: Callable[[Sequence[str]], float]) -> float | None:
        return None if control_answers is None else measure(control_answers)

    constant = _share(most_common_share(answers), control(most_common_share), enough)
    repetition = _share(repeated_ngrams(answers), control(repeated_ngrams), True)
    entropy = _entropy(word_entropy(answers), control(word_entropy), enough)
    nll = _nll(_median(nlls), None if gold_nlls is None else _median(gold_nlls))
    signs = {
        "constant output: {0.value:.0%} of the answers are the same (limit {0.limit:.0%})": constant,
        "repetition: {0.value:.0%} of an answer's 3-grams are repeated (limit {0.limit:.0%})": repetition,
        "few words: the answers' word entropy is {0.value:.2f} nats (limit {0.limit:.2f})": entropy,
        "exploded loss: the true answers cost {0.value:.1f} nats/token (limit {0.limit:.1f})": nll,
    }
    reasons = [sign.format(indicator) for sign, indicator in signs.items() if indicator.tripped]
    return Collapse(constant, repetition, entropy, nll, bool(reasons), "; ".join(reasons))


def most_common_share(answers: Sequence[str]) -> float:
    """The share of answers that equal the most common one, case and spaces aside; 0 for no answers."""
    counts = Counter(" ".join(answer.lower().split()) for answer in answers)
    return max(counts.values()) / len(answers) if answers else 0.0


def repeated_ngrams(answers: Sequence[str]) -> float:
    """Mean over answers of 1 - distinct 3-grams / 3-grams of words; an answer of under three words repeats nothing."""
    shares = []
    for answer in answers:
        words = _words(answer)
        ngrams = list(zip(*(words[start:] for start in range(NGRAM)), strict=False))
        shares.append(1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0)
    return float(np.mean(shares)) if shares else 0.0


def word_entropy(answers: Sequence[str]) -> float:
    """Shannon entropy in nats of the distribution of words over all answers; 0 when nothing was said."""
    counts = Counter(word for answer in answers for word in _words(answer))
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values()) + 0.0


def _share(value: float, control: float | None, enough: bool) -> Indicator:
    limit = SHARE_ALONE if control is None else max(SHARE, control + EXCESS)
    return Indicator(value, control, limit, enough and value >= limit)


def _entropy(value: float, control: float | None, enough: bool) -> Indicator:
    limit = ENTROPY_ALONE if control is None else control / 2
    return Indicator(value, control, limit, enough and value < limit)


def _nll(value: float, gold: float | None) -> Indicator:
    limit = NLL_ALONE if gold is None else gold + NLL_EXCESS
    return Indicator(value, gold, limit, value >= limit)


def _median(nlls: ArrayLike) -> float:
    # A destroyed model's likelihood may be infinite or not a number, which is no JSON.
    return float(np.median(np.nan_to_num(np.asarray(nlls, dtype=np.float64), nan=1e6, posinf=1e6).clip(max=1e6)))


def _words(text: str) -> list[str]:
    """Words and single signs, so that "!!!!!!" is six of them."""
    return re.findall(r"\w+|[^\w\s]", text.lower())
