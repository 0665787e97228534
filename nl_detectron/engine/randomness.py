"""Random numbers that depend on a seed and on what they are for, not on what was drawn before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_generators(seed: int, *purpose: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch, on the CPU and all GPUs in use.

    (``torch.manual_seed`` also does so, but takes a millisecond where no GPU is in use.)

    Args:
        seed: of the whole run, at least 0.
        purpose: what the numbers are for, such as iteration and rank of a process; every purpose
            has numbers of its own.
    """
    number = _seed_cpu(seed, *purpose)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


@contextmanager
def seeded_generators(seed: int, *purpose: int) -> Iterator[None]:
    """Seed the global generators of the CPU as above, and put their states back at the end."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    _seed_cpu(seed, *purpose)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


def _seed_cpu(seed: int, *purpose: int) -> int:
    """Seed the generators of the CPU, and return PyTorch's seed."""
    state = np.random.SeedSequence(seed, spawn_key=purpose).generate_state(4)
    np.random.seed(state)
    random.seed(state.tobytes())
    number = int.from_bytes(state[:2].tobytes(), "little") >> 1
    torch.default_generator.manual_seed(number)
    return number
