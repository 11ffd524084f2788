"""A node's side of secure sums: what its clients say at each step, and what they do not.

A client follows its server in everything but what would show its update. It has one sum at a time, takes each step once
and in order, and gives its share of a secret for one list of who came. Shares open only for who was told the same: list
of keys, plan, number of clients, largest weight. Who is asked for something else answers E336, and is out of the sum.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import NamedTuple

from lamina.admission import Admission
from lamina.client import Reply
from lamina.errors import WireError
from lamina.federation import Federation
from lamina.method import Plan
from lamina.privacy.keys import KEY
from lamina.privacy.protocol import Client, Held, read_table
from lamina.privacy.secure import FEWEST, SecureSum
from lamina.privacy.summing import BEYOND
from lamina.privacy.trees import Trees, implied, of_reply
from lamina.remote import message
from lamina.remote.envelope import Answer, Letter
from lamina.remote.vault import Kept, Vault
from lamina.wire import frame

REFUSED = "E336"
_PER_PEER = 96  # bytes of a letter for each other client: its keys, or what it sealed
_SLACK = 4096


class Unsafe(Exception):
    """A step that this client does not take."""


class _Open(NamedTuple):
    """A sum that is under way."""

    kind: str
    round: int
    plan: str  # its fingerprint
    due: str  # the step that comes next
    asked: int
    largest: float
    secrets: bytes  # Client.packed, or Held.packed once its vector is masked

    def packed(self) -> bytes:
        head = json.dumps(self[:-1]).encode()
        return len(head).to_bytes(4, "little") + head + self.secrets

    @classmethod
    def unpacked(cls, blob: bytes) -> _Open:
        end = 4 + int.from_bytes(blob[:4], "little")
        kind, round, plan, due, asked, largest = json.loads(blob[4:end])
        return cls(kind, round, plan, due, asked, largest, blob[end:])

    def __repr__(self) -> str:
        return f"_Open(round={self.round}, due={self.due!r})"


class Turn(NamedTuple):
    """One client between its shares and its masked message: its secrets are here and nowhere else."""

    open: _Open  # its secrets are those of a Client that has taken its shares
    number: int

    def __repr__(self) -> str:
        return "Turn(***)"


class Masking:
    """Takes a client's steps.

    Args:
        fed: the node's.
        vault: of its clients.
    """

    def __init__(self, fed: Federation, secure: SecureSum, vault: Vault):
        self._fed = fed
        self._secure = secure
        self._vault = vault

    @property
    def longest(self) -> int:
        """Bytes that a letter may have beside its plan."""
        return _PER_PEER * len(self._fed.data) + _SLACK

    def last(self, client: int) -> int:
        """The number of the last letter of a sum that it has answered."""
        kept = self._vault.get(client)
        return 0 if kept is None else kept.number

    def answer(self, letter: Letter) -> Answer:
        """To a letter without a plan. Raises Unsafe, WireError."""
        assert letter.step is not None  # the caller looked
        c, name = letter.client, letter.step.name
        if not 0 <= letter.round < 1 << 32:
            raise Unsafe(f"round {letter.round}: expected 0 to 2^32 - 1")
        self._vault.forget(letter.round)
        if name == "keys":
            said = self._keys(letter)
        else:
            open_ = self._taken(letter)
            step = self._shares if name == "shares" else self._unmask
            said = step(letter, open_)
        framed = frame.pack(frame.Frame("message", letter.round, c, {}, {name: said}))
        return Answer("message", c, letter.fingerprint, "", framed, step=name)

    def turn(self, letter: Letter) -> Turn:
        """Before it trains: what others have sealed for it is good. Raises Unsafe, WireError."""
        c, open_ = letter.client, self._taken(letter)
        client = Client.unpacked(c, {}, open_.secrets)
        try:
            sealed = _section(letter, "shares")
            lacking = client.take_sealed(sealed)
        except ValueError as error:
            raise Unsafe(str(error)) from None
        needed, opened = self._secure.needed(open_.asked), len(client.held.shares)
        if opened < needed:
            said = f"{len(lacking)} shares are not what was sealed for it" if lacking else "the others are not there"
            raise Unsafe(f"{opened} clients, {needed} are needed: {said}")
        return Turn(open_._replace(secrets=client.packed()), _number(letter))

    def hiding(self, kind: str, plan: Plan) -> Hiding:
        return Hiding(self._fed, self._secure, self._vault, kind, plan)

    def _keys(self, letter: Letter) -> bytes:
        c, number = letter.client, _number(letter)
        fresh = _Open(letter.kind, letter.round, letter.fingerprint, "shares", 0, 0.0, b"")
        kept = self._vault.get(c)
        if kept is not None and kept.secrets:
            before = _Open.unpacked(kept.secrets)
            if before._replace(secrets=b"") == fresh:  # the letter came twice, and nothing was made of its answer yet
                self._vault.put(c, kept._replace(number=max(number, kept.number)))
                return Client.unpacked(c, {}, before.secrets).keys()
        client = Client(c, {})
        self._vault.put(c, Kept(letter.round, number, fresh._replace(secrets=client.packed()).packed()))
        return client.keys()

    def _shares(self, letter: Letter, open_: _Open) -> bytes:
        step, c = letter.step, letter.client
        assert step is not None  # the caller looked
        roster = _section(letter, "keys")
        needed = self._expected_of(step.asked, step.largest, open_.kind, c, roster)
        about = [letter.kind, letter.round, letter.fingerprint, step.asked, float(step.largest).hex()]
        digest = hashlib.sha256(json.dumps(about).encode() + roster).digest()
        client = Client.unpacked(c, {}, open_.secrets)
        try:
            said = client.shares(roster, needed, digest)
        except ValueError as error:
            raise Unsafe(str(error)) from None
        after = open_._replace(due="masked", asked=step.asked, largest=step.largest, secrets=client.packed())
        self._vault.put(c, Kept(letter.round, _number(letter), after.packed()))
        return said

    def _unmask(self, letter: Letter, open_: _Open) -> bytes:
        came = _section(letter, "unmask")
        needed = self._secure.needed(open_.asked)
        try:
            there = len(read_table(came, 0))
            if there < needed:
                raise Unsafe(f"a sum of {there} clients, {needed} are needed")
            return Held.unpacked(letter.client, open_.secrets).unmask(came)
        except ValueError as error:
            raise Unsafe(str(error)) from None

    def _taken(self, letter: Letter) -> _Open:
        """The sum that this letter is about; from now on it is in nobody else's hands. Raises Unsafe."""
        assert letter.step is not None  # the caller looked
        name, kept = letter.step.name, self._vault.get(letter.client)
        if kept is None or not kept.secrets:
            raise Unsafe(f"it is asked for {name!r} of a sum that is not open here: it is over, or was never begun")
        open_ = _Open.unpacked(kept.secrets)
        if (open_.kind, open_.round, open_.plan) != (letter.kind, letter.round, letter.fingerprint):
            raise Unsafe(f"it is asked for {name!r} of another sum than the one that is open")
        if open_.due != name:
            raise Unsafe(f"it is asked for {name!r}, and {open_.due!r} is what comes next")
        if self._vault.take(letter.client) != kept:  # another process has them
            raise Unsafe(f"it is asked for {name!r} twice")
        return open_

    def _expected_of(self, asked: int, largest: float, kind: str, c: int, roster: bytes) -> int:
        """The threshold. Raises Unsafe for what no server of these clients says."""
        try:
            keys = read_table(roster, 2 * KEY)
        except ValueError as error:
            raise Unsafe(str(error)) from None
        everybody = len(self._fed.data)
        most = everybody if kind == "probe" else self._fed.cohort
        if not FEWEST <= asked <= most:
            raise Unsafe(f"{asked} clients were asked, expected {FEWEST} to {most}")
        needed = self._secure.needed(asked)
        if not needed <= len(keys) <= asked:
            raise Unsafe(f"a list of {len(keys)} keys, expected {needed} to {asked}")
        strange = next((who for who in keys if who >= everybody), None)
        if strange is not None:
            raise Unsafe(f"the list of keys has client {strange}, there are {everybody}")
        halves = [half for both in keys.values() for half in (both[:KEY], both[KEY:])]
        if len({*halves}) < len(halves):
            raise Unsafe("the list of keys has one twice")
        own = self._fed.setup.weights_of([c])[0]
        fine = own <= largest < math.inf and (self._fed.weights != "uniform" or largest == own)
        if not fine:
            raise Unsafe(f"a largest weight of {largest:g}, its own is {own:g}")
        return needed


class Hiding:
    """Makes masked messages of the replies to one plan."""

    def __init__(self, fed: Federation, secure: SecureSum, vault: Vault, kind: str, plan: Plan):
        self._setup = fed.setup
        self._secure = secure
        self._vault = vault
        self._kind = kind
        self._plan = plan
        self._expected = message.Expected.of(fed.setup, kind, plan)
        self._like = implied(fed.setup, kind, plan)
        self._trees: dict[int, Trees] = {}  # by how many were asked

    def hide(self, turn: Turn, reply: Reply, said: Answer) -> tuple[Reply, Answer]:
        """The reply, refused where its client leaves itself out, and what is said instead of its message.

        Args:
            said: the message in the clear. It goes nowhere.
        """
        c, setup = reply.client, self._setup
        try:
            read = message.read(setup, self._plan, self._expected, said)
        except message.Refused as error:
            return _out(reply, said, *error.refusal)
        judged = next(iter(Admission(setup, self._kind, self._plan, [c]).through([read])))
        if judged.refused is not None:
            return _out(reply, said, judged.code, judged.refused, judged.layer or judged.refused)
        trees, given = self._of(turn.open.asked), of_reply(judged)
        beyond = trees.refuses(given)
        if beyond is not None:
            return _out(reply, said, BEYOND, beyond.why, beyond.layer)
        client = Client.unpacked(c, trees.widths, turn.open.secrets)
        hidden = client.masked(trees.elements(given, setup.weights_of([c])[0] / turn.open.largest))
        after = turn.open._replace(due="unmask", secrets=client.held.packed())
        found = self._vault.get(c)
        if found is None or found.secrets or found.round != after.round:
            late = said._replace(said="failed", why="another sum has begun meanwhile", frame=b"", code=REFUSED)
            return reply._replace(refused=late.why), late
        self._vault.put(c, Kept(after.round, turn.number, after.packed()))
        scalars = {} if self._kind == "probe" else {"steps": float(judged.message["steps"]["steps"])}
        return reply, said._replace(frame=trees.packed(c, hidden, scalars))

    def _of(self, asked: int) -> Trees:
        if asked not in self._trees:
            self._trees[asked] = Trees(self._secure, self._setup, self._plan, asked, self._like)
        return self._trees[asked]


def _number(letter: Letter) -> int:
    return 0 if letter.signed is None else letter.signed.number


def _section(letter: Letter, name: str) -> bytes:
    """Raises WireError for what is not of this letter."""
    assert letter.step is not None  # the caller looked
    arrived = frame.unpack(letter.step.frame)
    found, said = (arrived.kind, arrived.round, arrived.client), ("plan", letter.round, letter.client)
    if found != said or arrived.scalars or arrived.sections.keys() != {name}:
        raise WireError(f"a step with {sorted(arrived.sections)} of {found}, expected {name} of {said}", code="E345")
    return arrived.sections[name]


def _out(reply: Reply, said: Answer, code: str, why: str, layer: str = "") -> tuple[Reply, Answer]:
    """It has nothing to add, and says why."""
    return reply._replace(refused=why), Answer("out", reply.client, said.plan, why, code=code, layer=layer)
