"""The line search: at the goal or as far as is allowed, in few evaluations, whatever falls and however it falls."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.unlearn.line_search import NARROWINGS, meet

Falling = Callable[[float], float]


@dataclass
class Counting:
    """A function that remembers where it was asked."""

    function: Falling
    asked: list[float] = field(default_factory=list)

    def __call__(self, length: float) -> float:
        self.asked.append(length)
        return self.function(length)


@st.composite
def kinked(draw: st.DrawFn) -> Falling:
    """Falls from above 0 to below it along straight pieces, some of them level."""
    pieces = draw(st.lists(st.tuples(st.floats(0.01, 2), st.floats(0, 4)), min_size=1, max_size=6))
    start = draw(st.floats(0.1, 5))

    def value(length: float) -> float:
        level, begun = start, 0.0
        for width, slope in pieces:
            if length <= begun + width:
                return level - slope * (length - begun)
            level, begun = level - slope * width, begun + width
        return level - (length - begun)

    return value


@st.composite
def smooth(draw: st.DrawFn) -> Falling:
    """Falls from above 0 to below it: evenly or ever faster, ever slower, or most of it all at once."""
    start, size, power = draw(st.floats(0.1, 9)), draw(st.floats(0.2, 5)), draw(st.floats(1, 12))
    return draw(
        st.sampled_from(
            [
                lambda x: start - (x / size) ** power,
                lambda x: start + 1 - math.exp(min(power * x / size, 300)),
                lambda x: start - 10 * math.sqrt(x / size),
                lambda x: start - 20 / math.pi * math.atan(power * x / size),
                lambda x: start * (1 - 2 / (1 + math.exp(min(-power * (x - size), 300)))) - 0.01 * x,
            ]
        )
    )


@given(
    falling=smooth() | kinked(),
    guess=st.floats(1e-4, 1e3),
    largest=st.floats(0.5, 1e3),
    tolerance=st.sampled_from([0.3, 0.05, 0.004]),
)
@settings(deadline=None, max_examples=200)
def test_it_ends_at_the_goal_or_as_far_as_it_may_go(
    falling: Falling, guess: float, largest: float, tolerance: float
) -> None:
    counting = Counting(falling)
    length = meet(counting, 0.0, guess, tolerance=tolerance, largest=largest)
    assert 0 < length <= largest
    if falling(length) > 0:
        assert length == largest
    else:
        assert falling(length) >= -tolerance
    doublings = math.ceil(math.log2(largest / min(guess, largest)))
    assert len(counting.asked) <= 2 + doublings + NARROWINGS
    assert max(counting.asked) <= largest


@given(guess=st.floats(1e-3, 1e3), at=st.floats(0.1, 50), drop=st.floats(0.5, 9))
@settings(deadline=None, max_examples=100)
def test_where_a_fall_has_a_jump_it_ends_beyond_the_jump(guess: float, at: float, drop: float) -> None:
    """No length is within the tolerance; the goal is still reached, and not by much more than it takes."""

    def jumps(length: float) -> float:
        return 0.2 if length < at else 0.2 - drop

    length = meet(jumps, 0.0, guess, tolerance=0.01, largest=100.0)
    assert at <= length <= 1.5 * at + 0.1


@pytest.mark.parametrize("guess", [1e-3, 0.1, 1.0, 7.0, 40.0])
def test_a_straight_fall_is_met_at_once_and_a_curved_one_soon(guess: float) -> None:
    doublings = max(0, math.ceil(math.log2(1 / guess)))
    straight, curved = Counting(lambda x: 1 - x), Counting(lambda x: 1 - x**3)
    assert meet(straight, 0.0, guess, tolerance=1e-6, largest=40.0) == pytest.approx(1, abs=1e-6)
    assert len(straight.asked) <= 4 + doublings
    assert 0 <= meet(curved, 0.0, guess, tolerance=1e-3, largest=40.0) - 1 <= 1e-3 / 3
    assert len(curved.asked) <= 12 + doublings


def test_a_goal_that_is_met_already_takes_no_step_and_no_second_look() -> None:
    for start in (1.0, 0.5):
        counting = Counting(lambda x, start=start: start - x)  # type: ignore[misc]
        assert meet(counting, 1.0, 0.3, tolerance=0.1, largest=9.0) == 0
        assert counting.asked == [0]


@pytest.mark.parametrize("guess", [0.4, 1.0, 6.0, 1e9])
def test_what_never_falls_that_far_is_taken_as_far_as_is_allowed(guess: float) -> None:
    counting = Counting(lambda x: 2 - x / 10)
    assert meet(counting, 0.0, guess, tolerance=0.1, largest=6.0) == 6
    assert max(counting.asked) == 6 and counting.asked.count(6.0) == 1


@pytest.mark.parametrize("guess", [0.3, 0.9, 3.0, 70.0])
def test_a_step_never_ends_higher_than_it_began(guess: float) -> None:
    """Where the goal is out of reach, and far out everything is worse than at the start."""
    bowl = Counting(lambda x: 1 + (x - 1) ** 2)
    length = meet(bowl, 0.0, guess, tolerance=0.1, largest=100.0)
    assert 0 < length < 2 and bowl.function(length) == min(map(bowl.function, bowl.asked))
    rising = Counting(lambda x: 1 + x)
    assert meet(rising, 0.0, guess, tolerance=0.1, largest=100.0) == 0
