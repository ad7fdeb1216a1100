"""The verdict on one model: which evidence speaks for forgetting, which against, and what is missing.

Every limit is a share of the distance between the two controls, original and gold, so the rule means the same on any
model. It is applied to the controls too: a rule that cannot tell the original from gold proves nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from sys import float_info

from palimpsest.audit.internals import DEPTH, RECOVERY
from palimpsest.audit.results import Finding, Outcome, Recovered, Verdict
from palimpsest.metrics.collapse import Collapse
from palimpsest.metrics.scores import Equivalence, Score

MARGIN = 0.1
"""Equivalent to gold: within a tenth of the distance from gold to the original."""
OVERSHOOT = 1.0
"""Scrambled: an NLL beyond gold's by more than the whole distance from the original to gold."""
KEPT = 0.9
"""The share of the original's answer probability on unseen retain rows that should be left."""
RUINED = 0.5
"""Below this share the model is broken."""

WORDINGS = {"forget": "the questions as they were trained", "forget_reworded": "the same questions in other words"}
LAYERS = "forget/legible_probability"
"""The measure of what the layers still tell, where they were read."""
RESTORED = f"{RECOVERY}/restore_value_lpr"
"""The measure of what the original's value matrices bring back."""


def margin(original: Score, gold: Score) -> float:
    """The TOST margin of a measure."""
    return MARGIN * abs(original.value - gold.value)


@dataclass(frozen=True)
class Evidence:
    """What is known about one model."""

    scores: Mapping[str, Score]
    """By `Measure.key`."""
    original: Mapping[str, Score]
    gold: Mapping[str, Score] | None
    against_gold: Mapping[str, Equivalence]
    """By `Measure.key`; empty without gold and for gold itself."""
    collapse: Collapse
    """Of its answers to unseen retain questions."""
    sham: Mapping[str, Score] | None = None
    recovered: Recovered | None = None
    """What attacks and relearning bring back; None where none was tried."""

    def of_sham(self, key: str) -> Score | None:
        """The sham's score, if there is a sham and it was measured."""
        return self.sham.get(key) if self.sham else None


@dataclass(frozen=True)
class _Forgetting:
    """What was found of the forgotten facts; None where it was not measured."""

    wordings: Mapping[str, Finding]
    """By the set that is asked."""
    layers: Finding | None
    depth: Finding | None
    overshoot: Finding
    restored: Finding | None
    attacked: Finding | None
    relearned: Finding | None

    @property
    def inside(self) -> tuple[Finding, ...]:
        """What speaks of the internals."""
        return tuple(finding for finding in (self.layers, self.depth, self.restored) if finding)

    @property
    def recovery(self) -> tuple[Finding, ...]:
        """What speaks of recovery."""
        return tuple(finding for finding in (self.attacked, self.relearned) if finding)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All of them."""
        return (*self.wordings.values(), self.overshoot, *self.inside, *self.recovery)

    @property
    def is_like_golds(self) -> bool:
        """Whether behaviour, internals and recovery were all looked at, and nothing was found that gold has not."""
        examined = self.depth and self.attacked and self.relearned
        return bool(examined) and all(finding.passed for finding in self.findings)


def judge(evidence: Evidence) -> Verdict:
    """Is the model broken? Is it still said? Said when asked otherwise? Legible inside? Pushed past gold? Or like gold?

    What behaves like gold is suppressed where an attack or a lesson brings it back, and scrambled where the original's
    value matrices alone do. It is *erased* only where behaviour, internals and recovery were all looked at and passed.
    """
    recovered = evidence.recovered
    forgetting = _Forgetting(
        wordings={
            on: _beside_gold(evidence, f"{on}/answer_probability", f"Asked {asked}")
            for on, asked in WORDINGS.items()
            if f"{on}/answer_probability" in evidence.scores
        },
        layers=_beside_gold(evidence, LAYERS, "Read at its most telling layer") if LAYERS in evidence.scores else None,
        depth=_depth(evidence) if DEPTH in evidence.scores else None,
        overshoot=_overshoot(evidence),
        restored=_restored(evidence) if RESTORED in evidence.scores else None,
        attacked=_attacked(evidence, recovered) if recovered else None,
        relearned=_relearned(recovered) if recovered else None,
    )
    outcome, where, summary = _outcome(evidence, forgetting)
    damage = (_health(evidence), _utility(evidence))
    findings = (*damage, *forgetting.findings) if outcome == "broken" else (*forgetting.findings, *damage)
    # The findings that decide come first.
    order = {False: 0, None: 1, True: 2}
    ordered = sorted((*findings, *_not_examined(evidence)), key=lambda finding: order[finding.passed])
    return Verdict(outcome, where, summary, tuple(ordered))


def _outcome(evidence: Evidence, forgetting: _Forgetting) -> tuple[Outcome, str, str]:
    if evidence.collapse.collapsed or _share_kept(evidence) < RUINED:
        return "broken", "", "The model is broken, so what it no longer says proves nothing."
    price = _price(evidence)
    said = {on: finding.passed is False for on, finding in forgetting.wordings.items()}
    in_other_words = said.get("forget_reworded", False)
    if said["forget"] or (in_other_words and _nearer_original(evidence, "forget")):
        than = "" if evidence.gold is None else " more readily than a model that never read them"
        return "remembered", "", f"It still gives the forgotten answers{than}{price}."
    if in_other_words:
        says = "What it hardly says any more when asked as it was trained, it still says when asked in other words"
        return "suppressed", "in other words", f"{says}{price}."
    if _failed(forgetting.layers):
        return "suppressed", "in its layers", f"What it no longer says can still be read in its layers{price}."
    if _failed(forgetting.depth) and not _nearer_original(evidence, "forget"):
        return "suppressed", "in its layers", f"What it no longer says, its layers still tell the original{price}."
    if evidence.recovered and not _nearer_original(evidence, "forget"):
        if _failed(forgetting.attacked):
            attack = _name(evidence.recovered.worst_attack)
            return "suppressed", f"under attack ({attack})", f"What it no longer says, an attack brings back{price}."
        if _failed(forgetting.relearned):
            why = "Taught some of what it forgot, it says the rest again, more than a model that never read them"
            return "suppressed", "after relearning", f"{why}{price}."
    if _failed(forgetting.overshoot):
        trace = "The true answers are far less likely than for a model that never read them: a trace of their own"
        return "scrambled", "", f"{trace}{price}."
    if evidence.gold is None:
        return "inconclusive", "", f"There is no gold model to compare with, so nothing here is calibrated{price}."
    if not all(finding.passed for finding in forgetting.wordings.values()):
        why = "The evidence is too weak to tell it from a model that never read the forget set, or to call it equal"
        return "inconclusive", "", f"{why}{price}."
    if _failed(forgetting.restored):
        why = "It no longer says them, but the original's value matrices alone bring the answers back"
        return "scrambled", "", f"{why}{price}."
    if forgetting.is_like_golds:
        why = "It gives the forgotten answers no more readily than a model that never read them, holds no more of them"
        return "erased", "", f"{why} inside, and nothing that was tried brings them back{price}."
    inside = (
        "whether they are erased inside was not examined"
        if not forgetting.inside
        else f"no more of them is found inside, {_what_lacks(forgetting)}"
        if all(finding.passed for finding in forgetting.inside)
        else "what is still inside does not decide"
    )
    why = f"It gives the forgotten answers no more readily than a model that never read them; {inside}"
    return "inconclusive", "", f"{why}{price}."


def _what_lacks(forgetting: _Forgetting) -> str:
    """Why that is no erasure yet."""
    if forgetting.recovery and not all(finding.passed for finding in forgetting.recovery):
        return "but whether they can be brought back is not decided"
    return "which proves no erasure yet"


def _failed(finding: Finding | None) -> bool:
    return finding is not None and finding.passed is False


def _beside_gold(evidence: Evidence, key: str, how: str) -> Finding:
    """A probability of the answers against gold's by TOST; without gold only a plain 'it is still there' is found."""
    score, original = evidence.scores[key], evidence.original[key]
    if evidence.gold is None:
        statement = (
            f"{how}: answer probability {score.value:.3f}, the original's is {original.value:.3f}; "
            "there is no gold to compare with."
        )
        return Finding(False if score.value > original.value / 2 else None, statement)
    gold = evidence.gold[key]
    compared = evidence.against_gold.get(key)
    numbers = (
        f"{how}: answer probability {score.value:.3f} beside gold's {gold.value:.3f} "
        f"and the original's {original.value:.3f}"
    )
    if original.low <= gold.high:
        return Finding(None, f"{numbers}; the controls themselves cannot be told apart here, so it says nothing.")
    if compared is None:  # gold itself
        return Finding(True, f"{numbers}.")
    if compared.equivalent:
        return Finding(
            True, f"{numbers}; equivalent to gold within ±{compared.margin:.3f} (TOST p = {compared.p:.2g})."
        )
    if not _tested(compared):
        return Finding(None, f"{numbers}; one subject alone allows no test.")
    if compared.low > compared.margin:
        return Finding(
            False, f"{numbers}; above gold by {compared.difference:.3f} [{compared.low:.3f}, {compared.high:.3f}]."
        )
    if compared.high < 0:
        return Finding(True, f"{numbers}; below gold by {-compared.difference:.3f}.")
    return Finding(
        None,
        f"{numbers}; neither equivalent within ±{compared.margin:.3f} nor clearly above "
        f"(smallest effect that could be seen: {compared.smallest_effect:.3f}).",
    )


def _depth(evidence: Evidence) -> Finding:
    """Do its states tell the original as little as gold's? If a sham's do as well, that says nothing."""
    score, sham = evidence.scores[DEPTH], evidence.of_sham(DEPTH)
    compared = evidence.against_gold.get(DEPTH)
    beside = f"gold's 1 and the sham's {sham.value:.3f}" if sham else "gold's 1, without a sham"
    numbers = f"Read by the original, its states reach an unlearning depth of {score.value:.3f}, beside {beside}"
    if compared is None:  # gold itself
        return Finding(True, f"{numbers}.")
    if not _tested(compared):
        return Finding(None, f"{numbers}; one subject alone allows no test.")
    if compared.high < -compared.margin:
        short = f"{-compared.difference:.3f} [{-compared.high:.3f}, {-compared.low:.3f}]"
        return Finding(False, f"{numbers}; short of gold by {short}.")
    if not compared.equivalent:
        return Finding(None, f"{numbers}; neither equivalent within ±{compared.margin:.3f} nor clearly short of it.")
    if sham is None:
        return Finding(None, f"{numbers}; equivalent to gold, but perhaps any further training goes as deep.")
    if sham.high >= 1 - compared.margin:
        return Finding(None, f"{numbers}; the sham went as deep without unlearning anything, so it says nothing.")
    return Finding(True, f"{numbers}; equivalent to gold within ±{compared.margin:.3f} (TOST p = {compared.p:.2g}).")


def _restored(evidence: Evidence) -> Finding:
    """Do the original's value matrices alone bring back more than they do in a sham, and most of what was lost?"""
    score, sham = evidence.scores[RESTORED], evidence.of_sham(RESTORED)
    numbers = f"The original's value matrices bring back {score.value:.2f} of the log-probability that the answers lost"
    if sham is None:
        return Finding(None, f"{numbers}; without a sham nobody knows what they bring back after any training.")
    numbers += f", beside {sham.value:.2f} in the sham"
    if score.clusters < 2:
        return Finding(None, f"{numbers}; one subject alone allows no test.")
    halfway = (1 + max(sham.value, 0.0)) / 2
    if score.value > halfway and score.low > sham.high:
        return Finding(False, f"{numbers}; that is nearer to all of it than to the sham's.")
    if score.high < halfway:
        return Finding(True, f"{numbers}.")
    return Finding(None, f"{numbers}; it cannot be told whether that is nearer to the sham's or to all of it.")


def _attacked(evidence: Evidence, recovered: Recovered) -> Finding:
    """Does any attack bring back more than a tenth of what it gets out of the original and not out of gold?"""
    worst, n_attacks = recovered.worst_attack, len(recovered.shares)
    if worst is None:
        return Finding(
            None, "Under no attack that was tried can the original be told from gold, so none says anything."
        )
    share = recovered.shares[worst]
    beside = f"gold's {_value(evidence.gold, worst)} and the original's {_value(evidence.original, worst)}"
    numbers = (
        f"Of {n_attacks} attacks, {_name(worst)} brings back most surely: answer probability "
        f"{_value(evidence.scores, worst)} beside {beside} under the same, {share.value:.2f} "
        f"[{share.low:.2f}, {share.high:.2f}] of the way"
    )
    if share.clusters < 2:
        return Finding(None, f"{numbers}; one subject alone allows no test.")
    if share.low > MARGIN:
        return Finding(False, f"{numbers}; above the margin of {MARGIN:g}.")
    if in_doubt := [_name(key) for key, each in recovered.shares.items() if each.high > MARGIN]:
        return Finding(None, f"{numbers}; not surely below the margin of {MARGIN:g}: {', '.join(in_doubt)}.")
    return Finding(True, f"{numbers}; all are below the margin of {MARGIN:g}.")


def _relearned(recovered: Recovered) -> Finding:
    """Does it learn the answers again faster than gold learns them?"""
    worst = recovered.worst_lesson
    if worst is None:
        return Finding(None, f"Relearning was not tried: {recovered.not_relearned}.")
    report = recovered.relearned[worst]
    passed = {"PASS": True, "FAIL": False, "INCONCLUSIVE": None}[report.verdict]
    return Finding(passed, f"Relearning ({worst.replace('_', ', rate ')}): {report.summary}.")


def _name(key: str | None) -> str:
    """An attack's, from its measure's key."""
    return (key or "").rpartition("/")[2].replace("_", " ")


def _value(scores: Mapping[str, Score] | None, key: str) -> str:
    return f"{scores[key].value:.3f}" if scores and key in scores else "unknown"


def _nearer_original(evidence: Evidence, on: str) -> bool:
    """Whether the answers are nearer the original's level than gold's; without gold, than to nothing at all."""
    key = f"{on}/answer_probability"
    floor = evidence.gold[key].value if evidence.gold else 0.0
    return evidence.scores[key].value > (evidence.original[key].value + floor) / 2


def _overshoot(evidence: Evidence) -> Finding:
    """Is it further from gold than the original is, on the far side?"""
    cost = f"The true answers cost {evidence.scores['forget/nll'].value:.2f} nats/token"
    if evidence.gold is None:
        return Finding(None, f"{cost}; without gold nobody knows whether that is too much.")
    gold, original = evidence.gold["forget/nll"], evidence.original["forget/nll"]
    if gold.low <= original.high:
        return Finding(None, f"{cost}; the controls themselves cannot be told apart here, so it says nothing.")
    distance = OVERSHOOT * (gold.value - original.value)
    numbers = f"{cost}; gold pays {gold.value:.2f}, and more than {gold.value + distance:.2f} gives the unlearning away"
    compared = evidence.against_gold.get("forget/nll")
    if compared is None:  # gold itself
        return Finding(True, f"{numbers}.")
    if not _tested(compared):
        return Finding(None, f"{numbers}; one subject alone allows no test.")
    if compared.low > distance:
        return Finding(False, f"{numbers}.")
    if compared.high <= distance:
        return Finding(True, f"{numbers}.")
    return Finding(None, f"{numbers}; it cannot be told on which side of that it lies.")


def _utility(evidence: Evidence) -> Finding:
    kept, key = _share_kept(evidence), "retain_unseen/answer_probability"
    kl = evidence.scores["retain_unseen/kl_from_original"].value
    statement = (
        f"On unseen retain questions {evidence.scores[key].value:.3f} of the original's "
        f"{evidence.original[key].value:.3f} answer probability is left ({kept:.0%}), at KL {kl:.3f} nats/token."
    )
    return Finding(kept >= KEPT, statement)


def _health(evidence: Evidence) -> Finding:
    if evidence.collapse.collapsed:
        return Finding(False, f"Its answers have collapsed: {evidence.collapse.reason}.")
    return Finding(True, "Its answers to unseen retain questions are as varied as the original's.")


def _not_examined(evidence: Evidence) -> tuple[Finding, ...]:
    """Recovery, and the internals where nothing but a lens can tell of them: their depth takes gold."""
    untried = Finding(None, "Recovery (can it be brought back?) was not tried.")
    recovery = () if evidence.recovered else (untried,)
    if DEPTH in evidence.scores:
        return recovery
    question = "Internals (is it still inside?)"
    if LAYERS in evidence.scores:
        known = "were read with lenses alone, which find what a lens can read"
    else:
        known = "were not examined" if RESTORED not in evidence.scores else "were not compared with gold's"
    return (Finding(None, f"{question} {known}."), *recovery)


def _price(evidence: Evidence) -> str:
    """What a summary must add when forgetting was paid for elsewhere; empty when it was not."""
    kept = _share_kept(evidence)
    if kept >= KEPT:
        return ""
    return f", at a price: {1 - kept:.0%} of the answer probability on unseen retain questions is lost"


def _share_kept(evidence: Evidence) -> float:
    key = "retain_unseen/answer_probability"
    return evidence.scores[key].value / max(evidence.original[key].value, 1e-12)


def _tested(compared: Equivalence) -> bool:
    """Whether there were two subjects at least; `equivalence` gives the largest float where there were not."""
    return compared.smallest_effect < float_info.max
