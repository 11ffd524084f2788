"""What leaves the clients, bounded: client-level differential privacy (`DP`), and sums that hide their terms
(`SecureSum`).

    dp           DP and what it refuses; Poisson cohorts, clip, noise, what a state has cost
    accountant   epsilon of so many rounds
    noise        random numbers that nobody guesses
    secure       SecureSum and what it refuses
    summing      a round of a federation as a secure sum, every byte counted
    trees        what goes into a sum, as elements of rings and back
    protocol     client and server of a sum: keys, shares, masked vectors, unmasking
    keys         X25519, HKDF, ChaCha20 (the package `cryptography`)
    shamir       t of n shares of a secret
    fixed        numbers as elements of a ring

What they promise and what they do not: docs/threat-model.md.
"""

from __future__ import annotations

from lamina.privacy.dp import DP
from lamina.privacy.secure import SecureSum

__all__ = ["DP", "SecureSum"]
