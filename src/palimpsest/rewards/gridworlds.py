"""Grid worlds of a fixed horizon in which every return is exact: no evaluation has noise.

The reward is one of arriving in a cell. Every episode has the same length: where some end early, how long an episode
lasts tells whether rewards are above or below 0, and a reward that knows nothing else seems to have learned something
(Freire et al. 2020, arXiv 2012.01365).

Shapes: S seeds, H steps, n cells, A moves. A policy is [S, H, n, A] probabilities, or [S, 1, n, A] where it is the same
at every step. Seeds are computed side by side and no sum goes over them, so a seed's numbers are the same bytes
whichever others there are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from palimpsest.errors import SpecError

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]

SIDE = 8
STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))
"""Up, down, left, right, stay: rows grow downwards."""
TIE = 1e-9
"""Values that differ by no more than this are equally good."""


@dataclass(frozen=True, eq=False)
class GridWorld:
    """Cells, moves between them, and what arriving is worth.

    Raises:
        SpecError: a move that leads to no cell (which would end the episode), arrays that do not fit together, a start
            that is no distribution, or a horizon or a slip that is out of range.
    """

    name: str
    moves: Ints
    """[n, A] the cell that each move leads to."""
    reward: Floats
    """[n] of arriving."""
    start: Floats
    """[n] the probability of beginning there."""
    places: Floats
    """[n, 2] row and column, from -1 to 1: what a reward network sees of a cell."""
    horizon: int = 30
    slip: float = 0.1
    """How often a move drawn evenly from all takes the place of the chosen one."""

    def __post_init__(self) -> None:
        n = len(self.moves)
        if self.reward.shape != (n,) or self.start.shape != (n,) or self.places.shape != (n, 2):
            raise SpecError(
                f"world {self.name}: moves are of {n} cells, but reward, start and places are of "
                f"{len(self.reward)}, {len(self.start)} and {len(self.places)}; give one row a cell"
            )
        lost = np.argwhere((self.moves < 0) | (self.moves >= n))
        if len(lost):
            cell, move = lost[0]
            raise SpecError(
                f"world {self.name}: move {move} from cell {cell} leads to {self.moves[cell, move]}, which is no cell. "
                "An episode that ends early tells the sign of the reward by its length; let the last cell lead to "
                "itself instead, so that every episode has the same length"
            )
        if not (self.start >= 0).all() or abs(self.start.sum() - 1) > 1e-9:
            raise SpecError(f"world {self.name}: start sums to {self.start.sum():g}; give probabilities that sum to 1")
        if self.horizon < 1 or not 0 <= self.slip < 1:
            raise SpecError(f"world {self.name}: horizon {self.horizon} and slip {self.slip}; from 1, and below 1")

    @property
    def everywhere(self) -> Floats:
        """[n] a start that is any cell as likely as any other."""
        return np.full(len(self.moves), 1 / len(self.moves))

    @cached_property
    def ends(self) -> tuple[float, float]:
        """The exact returns of the uniform and of the best policy: 0 and 1 of `score`."""
        best = plan(self, self.reward[None])
        return tuple(float(returns(self, policy)[0]) for policy in (uniform(self, 1), best))  # type: ignore[return-value]


def near(horizon: int = 30) -> GridWorld:
    """A good patch two cells from the start, and most of the map below it bad: what a sampler soon stops visiting."""
    reward = np.zeros((SIDE, SIDE))
    reward[:2, 2:4] = 1.0
    reward[3:] = -0.5
    return _grid("near", reward, (0, 0), horizon)


def stay(horizon: int = 30) -> GridWorld:
    """The start is good as it is, and everywhere else is bad."""
    reward = np.full((SIDE, SIDE), -1.0)
    reward[3:5, 3:5] = 1.0
    return _grid("stay", reward, (3, 3), horizon)


def slope(horizon: int = 30) -> GridWorld:
    """A reward that rises all the way to the far corner, with a lake on the straight path: it is soon well covered."""
    rows, columns = np.indices((SIDE, SIDE))
    reward = (rows + columns) / (2 * SIDE - 2)
    reward[3:5, 2:6] = -1.0
    return _grid("slope", reward, (0, 0), horizon)


WORLDS: dict[str, Callable[[int], GridWorld]] = {"near": near, "stay": stay, "slope": slope}
"""By name, given a horizon."""


def greedy(values: Floats) -> Floats:
    """[..., A] probabilities: evenly over the moves whose value is the highest."""
    best = values >= values.max(-1, keepdims=True) - TIE
    chosen: Floats = best / best.sum(-1, keepdims=True)
    return chosen


def uniform(world: GridWorld, seeds: int) -> Floats:
    """[S, 1, n, A] every move as likely as any other."""
    n, moves = world.moves.shape
    return np.full((seeds, 1, n, moves), 1 / moves)


def plan(world: GridWorld, rewards: Floats) -> Floats:
    """[S, H, n, A] the best policy for each of [S, n] rewards, by backward induction."""
    value = np.zeros_like(rewards)
    policy = np.empty((len(rewards), world.horizon, *world.moves.shape))
    for step in reversed(range(world.horizon)):
        values = _slipped(world, np.take(rewards + value, world.moves, axis=1))
        policy[:, step] = greedy(values)
        value = values.max(-1)
    return policy


def visits(world: GridWorld, policy: Floats, start: Floats | None = None) -> Floats:
    """[S, H, n] how probable it is to arrive in each cell at each step."""
    seeds, n = len(policy), len(world.moves)
    executed = _slipped(world, np.broadcast_to(policy, (seeds, world.horizon, *world.moves.shape)))
    arrival = (np.arange(seeds)[:, None, None] * n + world.moves).ravel()
    here: Floats = np.broadcast_to(world.start if start is None else start, (seeds, n))
    arrived = np.empty((seeds, world.horizon, n))
    for step in range(world.horizon):
        flow = here[:, :, None] * executed[:, step]
        arrived[:, step] = np.bincount(arrival, flow.ravel(), seeds * n).reshape(seeds, n)
        here = arrived[:, step]
    return arrived


def returns(world: GridWorld, policy: Floats, rewards: Floats | None = None) -> Floats:
    """[S] the expected sum of rewards over an episode, exactly; of the true reward unless [S, n] others are given."""
    rewards = np.broadcast_to(world.reward, (len(policy), len(world.reward))) if rewards is None else rewards
    total: Floats = (visits(world, policy).sum(1) * rewards).sum(-1)
    return total


def score(world: GridWorld, policy: Floats) -> Floats:
    """[S] the true return, with 0 for the uniform policy and 1 for the best."""
    low, high = world.ends
    return (returns(world, policy) - low) / (high - low)


def roll_out(world: GridWorld, policy: Floats, draws: Floats, start: Floats | None = None) -> tuple[Ints, Ints]:
    """Episodes of a policy.

    Args:
        world: where.
        policy: [S, H or 1, n, A].
        draws: [S, 2, H + 1, E] evenly from [0, 1): of E episodes a seed, and so of the seed alone.
        start: [n] where episodes begin; the world's own start when None.

    Returns:
        Cells [S, E, H + 1], the first being where an episode begins; chosen moves [S, E, H].
    """
    seeds, _, _, episodes = draws.shape
    here = np.arange(seeds)[:, None]
    bounds = np.ascontiguousarray(np.moveaxis(np.cumsum(policy, -1)[..., :-1], -1, 0))  # sums go over the first axis
    cells = np.empty((seeds, episodes, world.horizon + 1), np.int64)
    moves = np.empty((seeds, episodes, world.horizon), np.int64)
    begin = np.cumsum(world.start if start is None else start)
    cells[..., 0] = np.minimum(begin.searchsorted(draws[:, 0, -1], side="right"), len(begin) - 1)
    for step in range(world.horizon):
        cell, (chance, slip) = cells[..., step], (draws[:, 0, step], draws[:, 1, step])
        of_step = bounds[:, :, step if bounds.shape[2] > 1 else 0]
        chosen = moves[..., step] = (chance >= of_step[:, here, cell]).sum(0)
        # Below `slip`, the draw is itself an even one of all moves.
        slipped = (slip * (world.moves.shape[1] / (world.slip or 1))).astype(np.int64)
        cells[..., step + 1] = world.moves[cell, np.where(slip < world.slip, slipped, chosen)]
    return cells, moves


def _slipped(world: GridWorld, of_moves: Floats) -> Floats:
    """What is chosen by move becomes what happens: the transpose of a step, and the same for values and choices."""
    return (1 - world.slip) * of_moves + world.slip * of_moves.mean(-1, keepdims=True)


def _grid(name: str, reward: Floats, start: tuple[int, int], horizon: int) -> GridWorld:
    cells = np.indices((SIDE, SIDE)).reshape(2, -1).T
    reached = np.clip(cells[:, None] + np.array(STEPS), 0, SIDE - 1)
    begin = np.zeros((SIDE, SIDE))
    begin[start] = 1.0
    return GridWorld(
        name=name,
        moves=reached[..., 0] * SIDE + reached[..., 1],
        reward=reward.ravel(),
        start=begin.ravel(),
        places=2 * cells / (SIDE - 1) - 1,
        horizon=horizon,
    )
