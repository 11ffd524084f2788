"""Who takes part in a round."""

from __future__ import annotations

import torch

from lamina.random import generator


def draw(seed: int, key: int, clients: int, m: int) -> tuple[int, ...]:
    """m of the clients, uniformly without replacement, ascending.

    Args:
        key: the round that stands for the whole hold: ``round - round % hold``.

    For up to half of the clients, positions are drawn one by one until m different ones are there, so the cost follows
    m, not the population; for more, the first m of a permutation are taken.
    """
    if m >= clients:
        return tuple(range(clients))
    source = generator(seed, "cohort", key)
    if 2 * m > clients:
        return tuple(sorted(torch.randperm(clients, generator=source)[:m].tolist()))
    chosen: set[int] = set()
    while len(chosen) < m:
        chosen.add(int(torch.randint(clients, (1,), generator=source)))
    return tuple(sorted(chosen))
