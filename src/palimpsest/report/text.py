"""How an audit is put into words: numbers, names and sentences that the page and the Markdown share."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from sys import float_info
from typing import Literal

from palimpsest.audit.results import Audit, Audited, Outcome, Role
from palimpsest.metrics.auc import Auc
from palimpsest.metrics.scores import Equivalence, Measure, Score

MEANING: dict[Outcome, str] = {
    "erased": "The facts behave like facts the model never saw: on every test there was, it stands where gold stands.",
    "suppressed": "The model no longer says it when asked as before, but it is inside: it can be read or revived.",
    "scrambled": "The answers are gone, but what took their place is unlike a model that never knew.",
    "broken": "The facts went together with the rest: the model is damaged on text it was to keep.",
    "remembered": "The model still says it.",
    "inconclusive": "The evidence does not decide. This is not a pass.",
}
"""What each outcome says, one sentence each."""

EXPECTED: dict[Role, tuple[Outcome, ...]] = {
    "original": ("remembered",),
    "gold": ("erased", "inconclusive"),
    "sham": ("remembered",),
}
"""What a working rule may say of the controls. It finds nothing against gold, but may lack what shows an erasure."""

_SETS = {
    "forget": "Forget set",
    "forget_reworded": "Forget set, reworded",
    "forget_layers": "Forget set, layer by layer",
    "forget_recovery": "Forget set, parts of the original put in",
    "forget_depth_layers": "Forget set, depth by layer",
    "forget_recovery_layers": "Forget set, recovery by layer",
    "forget_attacked": "Forget set, under attack",
    "forget_relearned": "Forget set, asked after a lesson",
    "forget_taught": "Forget set, what the lesson taught",
    "retain_unseen": "Retain text, unseen",
}

_DONE: dict[Outcome | None, str] = {
    "erased": "erased the facts",
    "suppressed": "only suppressed them",
    "scrambled": "scrambled them",
    "broken": "broke the model",
    "remembered": "left them remembered",
    "inconclusive": "stayed undecided",
    None: "went unjudged",
}

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

Likeness = Literal["equivalent", "different", "cannot tell"]

SIGNS: dict[Likeness, str] = {"equivalent": "=", "different": "≠", "cannot tell": "?"}
"""How a score stands to gold's, in one character."""


@dataclass(frozen=True)
class ControlCheck:
    """What the verdict's rule says of a control, beside what it should say."""

    name: str
    outcome: Outcome | None
    expected: tuple[Outcome, ...]

    @property
    def as_expected(self) -> bool:
        """Whether the rule recognised this control; False when it was not judged."""
        return self.outcome in self.expected

    @property
    def should_be(self) -> str:
        """The outcomes that a working rule may give, in words."""
        return " or ".join(self.expected)


def number(value: float) -> str:
    """A value for people: about three digits that matter, and minus as a minus sign."""
    size = abs(value)
    if size == 0:
        text = "0"
    elif size < 0.00005:
        mantissa, exponent = f"{value:.0e}".split("e")
        text = f"{mantissa}×10{str(int(exponent)).translate(_RAISED)}"
    elif size < 0.001:
        text = f"{value:.4f}"
    else:
        decimals = 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0
        text = f"{value:,.{decimals}f}"
    return text.replace("-", "−")


def interval(score: Score | Equivalence | Auc) -> str:
    """The two ends of an interval."""
    return f"{number(score.low)} to {number(score.high)}"


def duration(seconds: float) -> str:
    """Wall-clock time for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def set_name(on: str) -> str:
    """The heading of a set of rows."""
    return _SETS.get(on, on.replace("_", " ").capitalize())


def direction(measure: Measure) -> str:
    """Which way an unlearned model should move on a measure."""
    return {"toward gold": "should move toward gold", "lower": "lower is better", "higher": "higher is better"}[
        measure.better
    ]


def likeness(found: Equivalence) -> Likeness:
    """Whether a model sits with gold: `different` when the whole 90 % interval lies beyond the margin."""
    if found.equivalent:
        return "equivalent"
    beyond = found.low > found.margin or found.high < -found.margin
    return "different" if beyond and _tested(found) else "cannot tell"


def smallest_visible(found: Equivalence) -> str:
    """The smallest difference that could have been seen, or that there was no test."""
    return number(found.smallest_effect) if _tested(found) else "none: too few subjects"


def comparison(found: Equivalence) -> str:
    """A comparison with gold in one sentence."""
    side = "above" if found.difference >= 0 else "below"
    return (
        f"{number(abs(found.difference))} {side} gold (90 % interval {interval(found)}, "
        f"margin ±{number(found.margin)}, TOST p = {number(found.p)}): {likeness(found)}. "
        f"Smallest difference that could have been seen: {smallest_visible(found)}."
    )


def says(said: str, answer: str) -> bool:
    """Whether the true answer stands in what was said word for word, case and punctuation aside."""
    spoken, truth = _words(said), _words(answer)
    starts = range(len(spoken) - len(truth) + 1)
    return bool(truth) and any(spoken[start : start + len(truth)] == truth for start in starts)


def controls(audit: Audit) -> list[Audited]:
    """Original, gold and sham, those there are."""
    return [model for model in audit.models if model.role != "unlearned"]


def methods(audit: Audit) -> list[Audited]:
    """The unlearned models."""
    return [model for model in audit.models if model.role == "unlearned"]


def headline(audit: Audit) -> str:
    """The audit in one sentence: how many methods had which outcome."""
    counts = Counter(model.verdict.outcome if model.verdict else None for model in methods(audit))
    total = counts.total()
    parts = [f"{_count(counts[outcome])} {done}" for outcome, done in _DONE.items() if counts[outcome]]
    if not parts:
        return "No method was audited."
    if total == 1:
        return f"One method was audited: it {parts[0].removeprefix('one ')}."
    if len(parts) == 1:
        return f"{_count(total).capitalize()} methods were audited: all {parts[0].split(' ', 1)[1]}."
    listing = ", ".join(parts[:-1]) + " and " + parts[-1]
    # "them" needs something to stand for when no method erased the facts.
    if "the facts" not in listing:
        listing = listing.replace("them", "the facts", 1)
    return f"Of {_count(total)} methods, {listing}."


def calibration(audit: Audit) -> list[ControlCheck]:
    """What the rule says of the controls themselves."""
    return [
        ControlCheck(model.name, model.verdict.outcome if model.verdict else None, EXPECTED[model.role])
        for model in controls(audit)
    ]


def caveats(audit: Audit) -> list[str]:
    """The audit's notes, and the absence of a control if no note tells of it."""
    told = " ".join(audit.notes).casefold()
    roles = {model.role for model in audit.models}
    missing = []
    if "gold" not in roles and "no gold" not in told:
        missing.append("no gold: uncalibrated. Nothing here shows what a model that never knew would score.")
    if "sham" not in roles and "no sham" not in told:
        missing.append(
            "no sham: nothing here shows what the same training without any forgetting does to these scores."
        )
    return [*audit.notes, *missing]


def _tested(found: Equivalence) -> bool:
    # With fewer than two subjects there is no test, and no difference, however large, would show.
    return found.smallest_effect < float_info.max


def _count(n: int) -> str:
    return _WORDS[n] if n < len(_WORDS) else str(n)


def _words(text: str) -> list[str]:
    # Scripts written without spaces count letter by letter, so that an answer is found inside a sentence.
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.findall(
        r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\W_\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+", folded
    )
