"""The primitives, all from the `cryptography` package: X25519, HKDF, ChaCha20 and ChaCha20-Poly1305.

Imported when first used: secure sums are an extra, `pip install 'lamina[secure]'`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lamina.errors import ConfigError
from lamina.privacy.fixed import Ring, low

KEY = 32  # bytes of a key, public or private, and of a seed
TAG = 16  # bytes that sealing adds


def expect_installed() -> None:
    """Raises ConfigError E123 where the package is missing."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise ConfigError(
            "secure sums need the package cryptography",
            code="E123",
            where="secure",
            remedy="pip install 'lamina[secure]'",
        ) from None


class Pair:
    """A private key and its public one.

    Args:
        private: 32 bytes; None: new ones.
    """

    def __init__(self, private: bytes | None = None):
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        self._key: Any = (
            X25519PrivateKey.generate() if private is None else X25519PrivateKey.from_private_bytes(private)
        )

    @property
    def public(self) -> bytes:
        made: bytes = self._key.public_key().public_bytes_raw()
        return made

    @property
    def private(self) -> bytes:
        made: bytes = self._key.private_bytes_raw()
        return made

    def agreed(self, other: bytes, purpose: bytes) -> bytes:
        """32 bytes that only the two holders know, for one purpose.

        Raises ValueError for a public key that is none.
        """
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        shared = self._key.exchange(X25519PublicKey.from_public_bytes(other))
        ends = b"".join(sorted((self.public, other)))
        made: bytes = HKDF(SHA256(), KEY, None, b"lamina secure sum:" + purpose + b":" + ends).derive(shared)
        return made


def masks(seed: bytes, purpose: int, count: int, bits: int) -> Ring:
    """So many elements mod 2^bits that are uniform to whoever does not know the seed: ChaCha20's keystream.

    Args:
        purpose: different for each use of one seed, below 2^64.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    kind = np.dtype("<u4") if bits <= 32 else np.dtype("<u8")
    nonce = bytes(8) + purpose.to_bytes(8, "little")  # a block counter of 64 bits, then the nonce
    stream = Cipher(algorithms.ChaCha20(seed, nonce), mode=None).encryptor().update(bytes(count * kind.itemsize))
    return np.frombuffer(stream, kind).astype(np.uint64) & low(bits)


def seal(key: bytes, text: bytes, about: bytes) -> bytes:
    """Encrypted and authenticated, with what it is about. A key is for one text only: the nonce is 0."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    return ChaCha20Poly1305(key).encrypt(bytes(12), text, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """Raises ValueError for anything that was not sealed like this."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, about)
    except InvalidTag:
        raise ValueError("a sealed share is not what was sealed") from None
