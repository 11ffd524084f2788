"""Who wrote a letter or an answer, in which run, for which round, and that it is not one from before.

    letter   head: its plan's fingerprint, ..., "signed": [version, run, round, number, nonce, name of client], "mac"
    answer   head: its plan's fingerprint, ..., "signed": those of its letter, "mac"
    "mac"    the signature of all that stands before it in the head, and of the frame's SHA-256

Numbers grow with every letter of a run, over restarts of its server. So a node remembers one number for each client,
and takes no letter that is not above it; and a server takes one answer to each letter that is open.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lamina.errors import StorageError, WireError
from lamina.remote.keys import SERVER, Keys
from lamina.store.files import replace, storing
from lamina.wire.container import Buffer

VERSION = 1
_DOMAIN = b"lamina signed 1\0"
_MAC = b',"mac":"'  # what JSON cannot have inside a text: quotes are escaped there
_PER_START = 1 << 32  # letters between two starts of a server


class Signed(NamedTuple):
    """What a letter says beside its plan; its answer says it again."""

    run: str
    round: int
    number: int
    nonce: str
    name: str  # of its client

    def said(self) -> list[Any]:
        return [VERSION, *self]

    @classmethod
    def of(cls, said: Any) -> Signed | None:
        """None where nothing is said. Raises WireError for what is no such thing."""
        if said is None:
            return None
        if not isinstance(said, list) or [type(x) for x in said] != [int, str, int, int, str, str]:
            raise WireError("what is said to be signed has not the form of it", code="E345")
        if said[0] != VERSION:
            raise WireError(f"signed by version {said[0]}, this lamina has {VERSION}", code="E341")
        return cls(*said[1:])


class Rejected(Exception):
    """It is not what it says it is: E330, E331, E332 late, E333 seen before, E334 forged, E335 of another run."""

    def __init__(self, code: str, why: str):
        super().__init__(f"{code} {why}")
        self.code = code
        self.why = why


def sign(magic: bytes, text: bytes, body: Sequence[Buffer], keys: Keys) -> bytes:
    """The text of a head, which is a JSON object, with its signature as the last thing in it."""
    return text[:-1] + _MAC + keys.sign(_signed(magic, text, body)).hex().encode() + b'"}'


def expect_by(who: str | None, magic: bytes, text: Buffer, body: Buffer, keys: Keys) -> None:
    """Raises Rejected E334 unless it was signed by the client of this name, or by the server."""
    whole = bytes(text)
    start, mac, signature = whole.rpartition(_MAC)
    by = "the server" if who is SERVER else f"client {who!r}"
    if not mac:
        raise Rejected("E334", f"it is not signed, expected a signature of {by}")
    try:
        given = bytes.fromhex(signature.removesuffix(b'"}').decode("ascii"))
    except ValueError:
        given = b""
    rest = start + b"}"
    if signature != given.hex().encode() + b'"}' or not keys.made(who, _signed(magic, rest, [body]), given):
        raise Rejected("E334", f"its signature is not that of {by} under this")


def _signed(magic: bytes, text: bytes, body: Sequence[Buffer]) -> bytes:
    digest = hashlib.sha256()
    for part in body:
        digest.update(part)
    return b"".join([_DOMAIN, magic, digest.digest(), text])


class AtServer:
    """A server's letters in one run, and which answers to them are due.

    Args:
        keys: the server's.
        run: a name that no other run has; nodes are told it with every letter.
        file: keeps between two starts of the server from where letters are numbered; None: `keep` says it, or the clock
            alone does.
    """

    def __init__(self, keys: Keys, run: str, file: Path | None = None):
        self.keys = keys
        self.run = run
        self._file = file
        self._first = self._last = 0  # numbers of letters of this process
        self._due: dict[int, Signed] = {}  # by number: open letters to the present plan
        self._whose: dict[int, int] = {}  # number -> client
        self._answered: dict[int, int] = {}  # client -> the highest number that it has answered

    def keep(self, file: Path) -> None:
        """Before the first letter."""
        self._file = file

    def begin(self) -> None:
        """Another plan: nothing is due of the one before."""
        self._due, self._whose = {}, {}

    def letter(self, client: int, name: str, round: int) -> Signed:
        """What the next letter says."""
        if not self._last:
            self._first = self._last = self._start() * _PER_START
        self._last += 1
        made = Signed(self.run, round, self._last, secrets.token_hex(16), name)
        self._due[self._last], self._whose[self._last] = made, client
        return made

    def call(self) -> Signed:
        """What a node is asked with that is to say which clients it has."""
        return Signed(self.run, 0, 0, secrets.token_hex(16), "")

    def take(self, client: int, said: Signed | None) -> None:
        """An answer whose signature is good. Raises Rejected unless it is due; the next one like it is not."""
        if said is None:
            raise Rejected("E334", "it does not say which letter it answers")
        if said.run != self.run:
            raise Rejected("E335", f"it is of the run {said.run[:80]!r}")
        due = self._due.get(said.number)
        answered = self._answered.get(client, 0)
        if due is not None:
            if due != said or self._whose[said.number] != client:
                raise Rejected("E334", "it is not what was to be answered")
            del self._due[said.number]
            self._answered[client] = max(answered, said.number)
        elif said.number > self._last:
            raise Rejected("E334", "it answers a letter that was never written")
        elif self._first < answered == said.number and said.number in self._whose:
            raise Rejected("E331", "it has answered already")
        elif max(answered, self._first) < said.number:
            raise Rejected("E332", f"it comes late: it answers a letter of round {said.round}")
        else:
            raise Rejected("E333", f"it answers a letter of round {said.round} that is not open")

    def _start(self) -> int:
        """A number above that of every start before, safe before it is used. The clock helps where the file is lost."""
        now = int(time.time())
        if self._file is None:
            return now
        try:
            found = json.loads(self._file.read_bytes())
            run, before = str(found["run"]), int(found["start"])
        except FileNotFoundError:
            run, before = self.run, 0
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{self._file.name} is damaged: {error!r}",
                code="E404",
                where=str(self._file),
                remedy="take it away: letters are then numbered by the clock",
            ) from None
        if run != self.run:
            raise StorageError(f"{self._file.name} is of the run {run!r}", code="E405", where=str(self._file))
        start = max(now, before + 1)
        with storing(self._file):
            replace(self._file, json.dumps({"run": self.run, "start": start}).encode())
        return start


class AtNode:
    """A node's side in one run.

    Args:
        keys: the node's.
        run: as the server has it.
    """

    def __init__(self, keys: Keys, run: str):
        self.keys = keys
        self.run = run

    def expect(self, said: Signed | None, name: str, round: int, last: int) -> Signed:
        """A letter whose signature is good.

        Args:
            last: the highest number of a letter that this client has answered.

        Raises:
            Rejected: it is not for this client, now.
        """
        if said is None:
            raise Rejected("E334", "the letter does not say what it is")
        if said.run != self.run:
            raise Rejected("E335", f"the letter is of the run {said.run[:80]!r}, this is {self.run!r}")
        if said.name != name:
            raise Rejected("E330", f"the letter is to client {said.name[:80]!r}, this is {name!r}")
        if said.round != round:
            raise Rejected("E332", f"the letter is of round {said.round}, its plan of round {round}")
        if said.number <= last:
            raise Rejected("E333", f"letter {said.number} has been here, or a later one")
        return said
