"""Small worlds with nothing special about them."""

import numpy as np

from palimpsest.rewards.gridworlds import Floats, GridWorld


def any_world(seed: int, *, cells: int = 3, moves: int = 2, horizon: int = 3, slip: float = 0.2) -> GridWorld:
    """Moves, rewards and start drawn at random."""
    rng = np.random.default_rng(seed)
    return GridWorld(
        name="any",
        moves=rng.integers(cells, size=(cells, moves)),
        reward=rng.normal(size=cells),
        start=rng.dirichlet(np.ones(cells)),
        places=rng.uniform(-1, 1, (cells, 2)),
        horizon=horizon,
        slip=slip,
    )


def step_matrix(world: GridWorld, policy: Floats) -> Floats:
    """[n, n] the probabilities of a step under [n, A], written out move by move."""
    n, width = world.moves.shape
    matrix = np.zeros((n, n))
    for cell in range(n):
        for chosen in range(width):
            matrix[cell, world.moves[cell, chosen]] += policy[cell, chosen] * (1 - world.slip)
            for slipped in range(width):
                matrix[cell, world.moves[cell, slipped]] += policy[cell, chosen] * world.slip / width
    return matrix
