"""With what letters and answers are signed: a key that all ends share, or a pair of each end's own.

    env:NAME    a variable of this process's environment
    file:PATH   a file that only its owner can read (mode 0600)

So a key stands in no config, on no command line and in no run folder. Its text is either at least 32 characters that
all ends have, for HMAC-SHA256; or "ed25519:" and 32 bytes in base64, private to its end, with a roster of public keys.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lamina.errors import ConfigError
from lamina.redaction import is_reference, remember

SERVER = None  # who signs, where it is no client
SHORTEST, LONGEST = 32, 4096  # characters of a key
PAIR = "ed25519:"
_WHERE = "sign.key"


class Keys(Protocol):
    """Of one end."""

    def sign(self, text: bytes) -> bytes: ...

    def made(self, who: str | None, text: bytes, signature: bytes) -> bool:
        """Whether this end's counterpart, the client of this name or the server (None), signed this text."""
        ...

    def one(self, clients: Iterable[str]) -> bool:
        """Whether whoever signs for one of these clients may sign for all of them."""
        ...


class Shared:
    """HMAC-SHA256. It keeps out who has no key; who has it can speak for everybody.

    Args:
        key: 32 to 4096 bytes.
    """

    def __init__(self, key: bytes):
        if not SHORTEST <= len(key) <= LONGEST:
            raise _unfit(f"a key of {len(key)} bytes: expected {SHORTEST} to {LONGEST}")
        self._key = key

    def __repr__(self) -> str:
        return "Shared(***)"

    def sign(self, text: bytes) -> bytes:
        return hmac.digest(self._key, text, "sha256")

    def made(self, who: str | None, text: bytes, signature: bytes) -> bool:
        return hmac.compare_digest(self.sign(text), signature)

    def one(self, clients: Iterable[str]) -> bool:
        return True


class Own:
    """Ed25519: nobody can speak for another.

    Args:
        private: 32 bytes.
        server: the server's public key; none is needed at the server.
        clients: public keys by client; none are needed at a node. A node signs with one key for all of its clients.

    Raises:
        ConfigError: E124 what is no key; E123 the package cryptography is not installed.
    """

    def __init__(self, private: bytes, server: bytes | None, clients: Mapping[str, bytes]):
        kinds = _ed25519()
        self._private: Any = _made(kinds.Ed25519PrivateKey.from_private_bytes, private, "the private key")
        self._bytes: dict[str | None, bytes] = {} if server is None else {SERVER: server}
        for client, public in clients.items():
            self._bytes[client] = public
        self._public = {
            who: _made(kinds.Ed25519PublicKey.from_public_bytes, key, f"the key of {who or 'the server'}")
            for who, key in self._bytes.items()
        }

    def __repr__(self) -> str:
        return "Own(***)"

    def sign(self, text: bytes) -> bytes:
        made: bytes = self._private.sign(text)
        return made

    def made(self, who: str | None, text: bytes, signature: bytes) -> bool:
        from cryptography.exceptions import InvalidSignature

        if who not in self._public:
            return False
        try:
            self._public[who].verify(signature, text)
        except InvalidSignature:
            return False
        return True

    def one(self, clients: Iterable[str]) -> bool:
        return len({self._bytes.get(client) for client in clients}) <= 1


def opened(key: str, roster: str | Path | None = None) -> Keys:
    """The keys that these name.

    Args:
        key: `env:NAME` or `file:PATH`.
        roster: for a pair: a JSON file `{"server": KEY, "clients": {NAME: KEY, ...}}` with the public keys.

    Raises:
        ConfigError: E124 there is none, it can be read by others, it is too short, or it is none; never with its text.
    """
    text = secret(key)
    if not text.startswith(PAIR.encode()):
        if roster is not None:
            raise _unfit(f"the key does not begin with {PAIR}, so it is one that all ends share and needs no roster")
        return Shared(text)
    private = _decoded(text.decode(errors="replace"), "the private key")
    remember(private)
    if roster is None:
        raise _unfit(f"a key that begins with {PAIR} needs a roster with the public keys", "sign.roster")
    return Own(private, *_roster(Path(roster).expanduser()))


def secret(reference: str) -> bytes:
    """What a reference names, without blanks around it. Raises ConfigError E124."""
    expect_reference(reference)
    kind, _, place = reference.partition(":")
    held = os.environ.get(place, "").encode(errors="surrogateescape")
    text = (held if kind == "env" else _read(Path(place).expanduser())).strip()
    if not text:
        raise _unfit(f"{reference} is empty" if kind == "file" else f"the variable {place} is not set")
    remember(text)
    if not SHORTEST <= len(text) <= LONGEST:
        raise _unfit(f"{reference} has {len(text)} characters, expected {SHORTEST} to {LONGEST}")
    return text


def expect_reference(reference: str) -> None:
    """Raises ConfigError E124 for a text that says no place. It may be a key, so it is not repeated."""
    if not is_reference(reference):
        raise _unfit("expected env:NAME or file:PATH, got something else, which is not repeated here")


def pair() -> tuple[str, str]:
    """A new private key and its public one, as texts."""
    private = _ed25519().Ed25519PrivateKey.generate()
    return _text(private.private_bytes_raw()), _text(private.public_key().public_bytes_raw())


def _read(path: Path) -> bytes:
    """Of a file that nobody else can read; of what was opened, not of what the name meant before."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe would be waited for
    except OSError as error:
        raise _unfit(f"file:{path}: {error.strerror}") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise _unfit(f"file:{path} is no file")
        if os.name == "posix" and stat.S_IMODE(status.st_mode) & 0o077:
            mode = oct(stat.S_IMODE(status.st_mode))
            raise _unfit(f"file:{path} has mode {mode}: others can read it", remedy=f"chmod 600 {path}")
        return os.read(handle, LONGEST + 64)
    finally:
        os.close(handle)


def _roster(path: Path) -> tuple[bytes | None, dict[str, bytes]]:
    try:
        found = json.loads(path.read_bytes())
        server, clients = found.get("server"), dict(found.get("clients", {}))
        return (
            None if server is None else _decoded(server, "the server's key"),
            {str(name): _decoded(key, f"the key of client {name!r}") for name, key in clients.items()},
        )
    except (OSError, ValueError, AttributeError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        said = error.strerror if isinstance(error, OSError) else "it is not a table of public keys"
        raise _unfit(f"the roster {path}: {said}", "sign.roster") from None


def _decoded(text: Any, what: str) -> bytes:
    try:
        found = base64.b64decode(re.fullmatch(rf"{PAIR}(\S+)", text)[1], validate=True)  # type: ignore[index]
    except (TypeError, binascii.Error, ValueError):
        found = b""
    if len(found) != 32:
        raise _unfit(f"{what} is none: expected {PAIR} and 32 bytes in base64")
    return found


def _text(key: bytes) -> str:
    return PAIR + base64.b64encode(key).decode()


def _made(kind: Any, key: bytes, what: str) -> Any:
    try:
        return kind(key)
    except ValueError:
        raise _unfit(f"{what} is none: expected 32 bytes") from None


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise ConfigError(
            "keys of one's own need the package cryptography",
            code="E123",
            where=_WHERE,
            remedy="pip install 'lamina[secure]', or one key that all ends share",
        ) from None
    return ed25519


def _unfit(message: str, where: str = _WHERE, remedy: str | None = None) -> ConfigError:
    return ConfigError(message, code="E124", where=where, remedy=remedy or "`lamina explain E124`")
