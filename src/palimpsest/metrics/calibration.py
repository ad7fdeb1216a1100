"""An attack chosen, with its k and its threshold, on other items than those it is tried on.

With a dozen attacks and settings, the best of them on the test items beats chance by luck alone. So the items are
parted by subject: on one part an attack, its sign and its threshold are chosen, on the other it is tried.
"""

import random
from dataclasses import dataclass

from palimpsest.errors import DataError
from palimpsest.metrics.auc import Auc, Threshold, auc, best_threshold
from palimpsest.metrics.membership import MembershipScores


@dataclass(frozen=True, slots=True)
class MembershipAttack:
    """An attack on membership, as it was chosen on the calibration items."""

    name: str
    """One of the attacks, its k included: `min_k@0.2`."""
    inverted: bool
    """Whether members are those that cost *more*. Forgetting that goes too far marks what was forgotten just so."""
    threshold: Threshold
    """Up to which cost, or minus the cost where inverted, an item is called a member."""
    auc: float
    """On the calibration items: the largest of all attacks and signs, so more than can be expected elsewhere."""
    items: frozenset[str]
    """The calibration items of both sides."""


@dataclass(frozen=True, slots=True)
class Attacked:
    """What the chosen attack does on items that were not used to choose it."""

    auc: Auc
    """Of the attack's own sign: above 1/2 it tells members from non-members."""
    true_positives: float
    """Share of the members that it calls members."""
    false_positives: float
    """Share of the non-members that it calls members."""

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the shares of members and of non-members that are called rightly; 1/2 for a coin."""
        return (self.true_positives + 1 - self.false_positives) / 2


def halves(scores: MembershipScores, *, seed: int) -> tuple[MembershipScores, MembershipScores]:
    """Items for calibration and items for the test: half of the subjects each, drawn by the seed.

    Raises:
        DataError: there are fewer than two subjects.
    """
    subjects = sorted(set(scores.clusters))
    if len(subjects) < 2:
        raise DataError(f"{len(subjects)} subject cannot be parted in two; give items of more subjects")
    chosen = set(random.Random(f"calibration/{seed}").sample(subjects, len(subjects) // 2))
    inside = [cluster in chosen for cluster in scores.clusters]
    return (
        scores.take([place for place, here in enumerate(inside) if here]),
        scores.take([place for place, here in enumerate(inside) if not here]),
    )


def calibrate(members: MembershipScores, nonmembers: MembershipScores) -> MembershipAttack:
    """The attack and sign with the largest AUC on these items, the first of equals, with its best threshold.

    Raises:
        DataError: no items on a side, a cost that is not a number, or no attack that both sides have.
    """
    shared = [attack for attack in members.costs if attack in nonmembers.costs]
    if not shared:
        raise DataError("the members and the non-members have no attack in common; score both in the same way")
    tried = [
        (auc(sign * members.costs[name], sign * nonmembers.costs[name]).value, name, sign)
        for name in shared
        for sign in (1, -1)
    ]
    value, name, sign = max(tried, key=lambda one: one[0])
    threshold = best_threshold(sign * members.costs[name], sign * nonmembers.costs[name])
    return MembershipAttack(name, sign < 0, threshold, value, frozenset((*members.items, *nonmembers.items)))


def try_attack(attack: MembershipAttack, members: MembershipScores, nonmembers: MembershipScores) -> Attacked:
    """What a chosen attack does on other items.

    Raises:
        DataError: an item was used to choose the attack, the attack was not scored, or as `auc` does.
    """
    for side in (members, nonmembers):
        for item in side.items:
            if item in attack.items:
                raise DataError(f"item {item!r} was used to choose the attack; test on items of other subjects")
        if attack.name not in side.costs:
            raise DataError(
                f"attack {attack.name!r} was not scored on the test items; score both parts in the same way"
            )
    sign = -1 if attack.inverted else 1
    ours, others = sign * members.costs[attack.name], sign * nonmembers.costs[attack.name]
    return Attacked(
        auc(ours, others, members.clusters, nonmembers.clusters),
        float((ours.double() <= attack.threshold.value).double().mean()),
        float((others.double() <= attack.threshold.value).double().mean()),
    )
