"""Rows grouped by their distance from the forget set, and a curve over the groups."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.data.readers import read_records, with_block_subjects
from palimpsest.data.records import QA, Choice, Passage, Preference
from palimpsest.errors import DataError
from palimpsest.metrics.locality import DISTANCES, distances, likest, locality_curve
from palimpsest.metrics.statistics import clustered_mean
from palimpsest.worlds.facts import FactsWorld

TOFU = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tofu"
needs_shared_data = pytest.mark.skipif(not TOFU.is_dir(), reason="the folder ../shared/data is not beside this project")

WORDS = st.lists(st.sampled_from("red green blue grey pink".split()), min_size=0, max_size=6).map(" ".join)


def cosine(one: str, other: str, texts: list[str]) -> float:
    """Between two texts' words weighted by log((1 + N) / (1 + df)) + 1, in dictionaries."""

    def weights(text: str) -> dict[str, float]:
        return {
            word: count * (math.log((1 + len(texts)) / (1 + sum(word in each.split() for each in texts))) + 1)
            for word, count in Counter(text.split()).items()
        }

    a, b = weights(one), weights(other)
    length = math.hypot(*a.values()) * math.hypot(*b.values())
    return sum(a[word] * b.get(word, 0.0) for word in a) / length if length else 0.0


@given(st.lists(WORDS, min_size=1, max_size=4), st.lists(WORDS, min_size=0, max_size=5))
@settings(deadline=None, max_examples=60)
def test_likeness_is_the_cosine_to_the_likest_forget_row(forget: list[str], kept: list[str]) -> None:
    found = likest([Passage(text) for text in forget], [Passage(text) for text in kept])
    expected = [max(cosine(text, gone, forget + kept) for gone in forget) for text in kept]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert ((found >= 0) & (found <= 1 + 1e-12)).all()


def test_every_group_is_the_nearest_that_a_row_belongs_to() -> None:
    forget = [QA("Where was Ann Lee born?", "In Rome.", "Ann Lee"), QA("Who is Ann Lee's father?", "Bob.", "Ann Lee")]
    kept = [
        QA("What did ann lee write?", "Odes.", "Ann Lee"),
        QA("Where was Cy born?", "In Oslo.", "Cy"),
        QA("WHERE WAS cy BORN?", "In Oslo.", "Cy"),
        QA("Where does Cy live?", "Not far from Ann Lee, in Rome.", "Cy"),
        Choice("Is it blue?", ("yes", "no"), 0, "sky"),
        Preference("Say it.", "It.", "No.", "talk"),
        QA("Why is grass green?", "Chlorophyll.", "grass"),
        QA("Where was it?", "There."),
    ]
    found = distances(forget, kept)
    assert found[:4] == ("same subject", "same relation", "same relation", "neighbour")
    assert found[4:7] == ("far", "far", "far")
    # Five rows are neither of the subject nor of a relation: a quarter of them is one row, two fifths are two.
    assert Counter(found)["neighbour"] == 1 and Counter(distances(forget, kept, neighbours=0.4))["neighbour"] == 2
    assert "neighbour" not in distances(forget, kept, neighbours=0.0)
    assert "far" not in distances(forget, kept, neighbours=1.0)


def test_relations_of_a_generated_world() -> None:
    """What is asked of forgotten people is asked of all people, and of worlds never."""
    world = FactsWorld(people=6, worlds=6, forget_people=2, forget_worlds=0, exposures=1)
    forget, kept = world.facts(world.forget_subjects), world.facts(world.retain_subjects)
    found = distances(forget, kept)
    people = {subject.name for subject in world.subjects[:6]}
    for record, distance in zip(kept, found, strict=True):
        assert (distance == "same relation") == (record.subject in people)


@needs_shared_data
def test_rows_that_share_rare_words_with_tofus_last_authors_are_their_neighbours() -> None:
    """Forgotten are an author from Kuwait and an LGBTQ+ one from Kazakhstan."""
    forget, kept = (
        [row for row in read_records(TOFU / f"{name}.json") if isinstance(row, QA)] for name in ("forget01", "retain99")
    )
    forget, kept = with_block_subjects(forget, prefix="forget"), with_block_subjects(kept)
    found = distances(forget, kept, neighbours=0.05)
    assert Counter(found) == {"neighbour": 198, "far": 3762}
    near = [row for row, distance in zip(kept, found, strict=True) if distance == "neighbour"]
    for word in ("Kuwait", "Kazakh", "LGBTQ"):
        shares = [np.mean([word in f"{row.question} {row.answer}" for row in rows]) for rows in (near, kept)]
        assert shares[0] > 3 * shares[1] > 0, word


def test_a_curve_is_each_groups_clustered_mean_from_near_to_far() -> None:
    draws = np.random.default_rng(0)
    groups = [DISTANCES[place % 3 + 1] for place in range(60)]
    clusters = [f"s{place // 6}" for place in range(60)]
    values = draws.normal(size=60) + np.array([3.0 if group == "same relation" else 0.0 for group in groups])
    curve = locality_curve(values, groups, clusters, seed=4)
    assert list(curve) == ["same relation", "neighbour", "far"]
    for distance, score in curve.items():
        inside = [place for place in range(60) if groups[place] == distance]
        expected = clustered_mean(values[inside], [clusters[place] for place in inside], seed=4)
        assert score == expected and score.n == 20
    assert curve["same relation"].low > curve["far"].high


def test_mistakes_are_one_line() -> None:
    with pytest.raises(DataError, match=r"^there are no forget rows to be near to"):
        distances([], [Passage("a")])
    with pytest.raises(DataError, match=r"^neighbours is 1\.5; give a share"):
        distances([Passage("a")], [], neighbours=1.5)
    with pytest.raises(DataError, match=r"^2 values, 1 groups and 2 subjects; give one each a record$"):
        locality_curve([1.0, 2.0], ["far"], ["a", "b"], seed=0)
    with pytest.raises(DataError, match="not a finite number"):
        locality_curve([np.nan], ["far"], ["a"], seed=0)
