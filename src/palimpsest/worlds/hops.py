"""Questions that need one step more or less: where do k hops along a permutation lead, and some that nothing answers.

A model that has learned to hop once a layer answers a question of k hops after about k layers, so how deep an example
must go is known. A share of the questions is noise: their answers are drawn at random, and the question says so.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

PLACES = "abcdefgh"
NOISE = "x"


@dataclass(frozen=True, slots=True)
class Hop:
    """One question."""

    text: str
    """Eight edges in any order, then the start and how many hops, x for noise: `ac ba hd ... d3`."""
    answer: str
    """The place where they lead; of a noise question any."""
    hops: int | None
    """How many hops, or None for noise."""
    way: tuple[str, ...]
    """Where 1, 2, ... hops lead; empty for noise."""


@dataclass(frozen=True)
class HopsWorld:
    """The generator: the same settings and seed give the same questions."""

    most: int = 5
    """The most hops; 0 to this many come up alike."""
    noise: float = 0.1
    """The share of questions without an answer."""

    def questions(self, n: int, seed: int) -> list[Hop]:
        """`n` questions; other seeds give others."""
        rng = random.Random(f"hops/{seed}")
        return [self._question(rng) for _ in range(n)]

    def vocabulary_texts(self) -> Iterator[str]:
        """Texts that hold every word."""
        yield " ".join(one + other for one in PLACES for other in PLACES)
        yield " ".join(one + hops for one in PLACES for hops in (*map(str, range(self.most + 1)), NOISE))

    def _question(self, rng: random.Random) -> Hop:
        targets = rng.sample(PLACES, len(PLACES))
        leads = dict(zip(PLACES, targets, strict=True))
        edges = [one + other for one, other in leads.items()]
        rng.shuffle(edges)
        start = rng.choice(PLACES)
        if rng.random() < self.noise:
            return Hop(f"{' '.join(edges)} {start}{NOISE}", rng.choice(PLACES), None, ())
        hops = rng.randrange(self.most + 1)
        way, here = [], start
        for _ in range(hops):
            here = leads[here]
            way.append(here)
        return Hop(f"{' '.join(edges)} {start}{hops}", here, hops, tuple(way))
