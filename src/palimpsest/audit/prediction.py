"""Which score would have told: do the facts that an attack brings back stand out before anyone attacks?

Of one model's facts, by the attack that brings most back. A fact has come back where the attack puts it more than half
of the way from gold to the original, both attacked alike; facts that those two answer alike say nothing. What a high
score means is fixed beforehand by what it measures, so a score that tells the wrong way has an AUC below 1/2.
"""

from collections.abc import Mapping, Sequence

from palimpsest.audit.recovery import Items
from palimpsest.metrics.auc import Auc, auc
from palimpsest.metrics.scores import Row

COMES_BACK_WHEN: Mapping[str, int] = {
    "forget/answer_probability": 1,
    "forget/kl_from_gold": 1,
    "forget/legible_probability": 1,
    "forget/erased_from_layers": -1,
    "forget/unlearning_depth": -1,
    "forget_recovery/patch_coefficients_lpr": 1,
    "forget_recovery/restore_value_lpr": 1,
}
"""1 where a high value should mean that a fact comes back, -1 where a low one should, by `Measure.key`."""
BACK = 0.5
"""The share of the way from gold to the original from which a fact has come back."""
SMALLEST_GAP = 0.2
"""Of answer probability under attack, between original and gold: nearer ones do not tell what came back."""
FEWEST = 5
"""Facts that came back, and that did not; with fewer of either there is no AUC."""


def foretold(own: Items, gold: Items, original: Items, attack: str | None) -> dict[str, Auc]:
    """How well each score ranks the facts that came back above the others; empty where too few did or did not.

    Args:
        own: the model's rows.
        gold: gold's.
        original: the original's.
        attack: the key of the attack that brings most back; None where none tells anything.
    """
    if attack is None:
        return {}
    after, floor, ceiling = (_by_item(items[attack]) for items in (own, gold, original))
    gaps = {item: ceiling[item] - floor[item] for item in after}
    back = {item: after[item] - floor[item] > BACK * gap for item, gap in gaps.items() if gap >= SMALLEST_GAP}
    subjects = {row.item: row.cluster for row in own[attack]}
    found = {}
    for key, direction in COMES_BACK_WHEN.items():
        values = _by_item(own.get(key, ()))
        came, stayed = (
            [item for item, yes in back.items() if yes is side and item in values] for side in (True, False)
        )
        if min(len(came), len(stayed)) >= FEWEST:
            # `auc` counts who costs less: those that came back.
            costs = {item: -direction * value for item, value in values.items()}
            found[key] = auc(
                [costs[item] for item in came],
                [costs[item] for item in stayed],
                [subjects[item] for item in came],
                [subjects[item] for item in stayed],
            )
    return found


def _by_item(rows: Sequence[Row]) -> dict[str, float]:
    """The mean over an item's rows."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row.item, []).append(row.value)
    return {item: sum(of_item) / len(of_item) for item, of_item in values.items()}
