"""Addressed randomness: every random number is a function of (seed, purpose, round, client).

There is no generator state to save or to lose, an extra consumer never shifts another stream, and the number of
workers never changes a bit.
"""

from __future__ import annotations

import hashlib

import torch


def address(seed: int, purpose: str, round: int = 0, client: int = 0) -> int:
    """A 63-bit integer that identifies one stream: SHA-256 over the four parts, cut to 8 bytes."""
    key = f"lamina:{seed}:{purpose}:{round}:{client}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1


def generator(seed: int, purpose: str, round: int = 0, client: int = 0) -> torch.Generator:
    """A fresh CPU generator for one purpose of one client in one round (client = its position in ClientData).

    torch's CPU generator keeps 32 of the 63 bits, so among many streams a few coincide; nothing here relies on two
    streams being different, only on each being a function of its address.
    """
    made = torch.Generator()
    made.manual_seed(address(seed, purpose, round, client))
    return made


def stream(key: bytes, purpose: str, round: int, count: int) -> bytes:
    """So many bytes that only follow from the key: SHAKE-256 over it and the address. For what must stay secret."""
    return hashlib.shake_256(b"lamina:%d:%s:" % (round, purpose.encode()) + key).digest(count)
