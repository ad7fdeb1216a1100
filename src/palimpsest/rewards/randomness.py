"""Draws of libraries that know only global generators, made to follow from a seed and to leave no trace."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def stream_seed(*words: int) -> int:
    """A seed below 2^31 for one purpose, e.g. (seed, step); those of different words are unrelated."""
    return int(np.random.SeedSequence(words).generate_state(1)[0] >> 1)


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's global draws follow from `seed` inside; outside they go on as if it had not been.

    Torch's is the CPU's generator.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
