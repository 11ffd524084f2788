"""Random numbers that nobody can guess who does not know a key: SHAKE-256 over the key and an address.

torch's generator will not do: it keeps 32 bits of its seed, and whoever tries them all has the noise.
"""

from __future__ import annotations

import hashlib
import secrets

import numpy as np
import torch
from torch import Tensor

from lamina.random import stream

_PIECE = 1 << 18  # numbers that are made at a time


def key_of(seed: int) -> bytes:
    """The key that follows from a run's seed. As secret as the seed, and no more."""
    return hashlib.sha256(f"lamina:privacy:{seed}".encode()).digest()


def fresh_key() -> bytes:
    """A key of the operating system's, which is nowhere but in this process."""
    return secrets.token_bytes(32)


def gaussian(key: bytes, purpose: str, round: int, count: int) -> Tensor:
    """So many independent normal numbers in float64, by Box and Muller from 53 bits each."""
    made = np.empty(count + count % 2)
    for start in range(0, len(made), _PIECE):
        half = min(_PIECE, len(made) - start) // 2
        bits = np.frombuffer(stream(key, f"{purpose}/{start}", round, 16 * half), "<u8") >> 11
        u, v = bits[:half], bits[half:]
        length = np.sqrt(-2 * np.log((u + 1.0) * 2.0**-53))  # of (0, 1]
        angle = v * (2 * np.pi * 2.0**-53)
        made[start : start + half] = length * np.cos(angle)
        made[start + half : start + 2 * half] = length * np.sin(angle)
    return torch.from_numpy(made[:count])
