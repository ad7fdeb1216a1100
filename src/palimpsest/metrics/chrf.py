"""chrF: how many runs of one to six characters two texts share (Popović 2015), as sacreBLEU's chrF2 counts it.

White space does not count, capitals do; recall weighs twice as much as precision; runs are counted over the whole
corpus, and only lengths that both sides have are averaged (sacreBLEU 2.6 `nc:6|nw:0|space:no|eff:yes`).
"""

from collections import Counter
from collections.abc import Sequence

LONGEST = 6
BETA = 2
DEFINITION = "chrf2@corpus"


def chrf(texts: Sequence[str], references: Sequence[str]) -> float:
    """From 0 (no character in common) to 1, of n texts against n references taken together."""
    pairs = [("".join(text.split()), "".join(ref.split())) for text, ref in zip(texts, references, strict=True)]
    precisions, recalls = [], []
    for length in range(1, LONGEST + 1):
        counts = [(_runs(text, length), _runs(reference, length)) for text, reference in pairs]
        shared = sum((said & wanted).total() for said, wanted in counts)
        n_said, n_wanted = (sum(side.total() for side in sides) for sides in zip(*counts, strict=True))
        if n_said and n_wanted:
            precisions.append(shared / n_said)
            recalls.append(shared / n_wanted)
    precision, recall = (sum(values) / max(len(values), 1) for values in (precisions, recalls))
    if precision + recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


def _runs(text: str, length: int) -> Counter[str]:
    return Counter(text[first : first + length] for first in range(len(text) - length + 1))
