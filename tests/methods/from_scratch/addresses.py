"""Addressed randomness: which clients take part, and in which order a client sees its examples."""

import hashlib

import torch


def generator(seed, purpose, round=0, client=0):
    digest = hashlib.sha256(f"lamina:{seed}:{purpose}:{round}:{client}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def cohort(seed, key, clients, m):
    """m of the clients, ascending; key = the round in which this cohort came together."""
    if m is None or m >= clients:
        return list(range(clients))
    source = generator(seed, "cohort", key)
    if 2 * m > clients:
        return sorted(torch.randperm(clients, generator=source)[:m].tolist())
    drawn = set()
    while len(drawn) < m:
        drawn.add(torch.randint(clients, (1,), generator=source).item())
    return sorted(drawn)


def batches(n, seed, round, client, batch_size, epochs=1, steps=None):
    """Indices of every local step of one client in one round."""
    if batch_size is None:
        return [torch.arange(n)] * (steps or epochs)
    source = generator(seed, "order", round, client)
    per_epoch = (n + batch_size - 1) // batch_size
    wanted = steps or epochs * per_epoch
    made = []
    while len(made) < wanted:
        made += torch.randperm(n, generator=source).split(batch_size)
    return made[:wanted]
