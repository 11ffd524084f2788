"""A node: the clients whose data is here, answering letters. It trains them with this machine's engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from lamina.client import Reply
from lamina.engine.base import Engine, Keep
from lamina.errors import LaminaError, StorageError, WireError, expect, is_whole
from lamina.federation import Federation
from lamina.method import Plan
from lamina.remote import message, reading
from lamina.remote.envelope import Answer, Letter, expect_by
from lamina.remote.keys import SERVER
from lamina.remote.masking import REFUSED, Masking, Turn, Unsafe
from lamina.remote.message import why
from lamina.remote.shelf import Holding, MemoryShelf, Shelf
from lamina.remote.signing import AtNode, Rejected, Signed
from lamina.remote.terms import Terms, stamp, terms_of
from lamina.remote.vault import MemoryVault, Vault
from lamina.store import Row

_T = TypeVar("_T")


class _Key(NamedTuple):
    """What letters that are answered at the same time have in common."""

    kind: str
    plan: str  # its fingerprint
    together: bool


class _Asked(NamedTuple):
    """One client of a batch."""

    client: int
    accepted: int  # round
    holding: Holding | None
    signed: Signed | None  # what its letter says
    turn: Turn | None  # in a secure sum

    @property
    def row(self) -> Row | None:
        """What it goes on from."""
        return None if self.accepted < 0 or self.holding is None else self.holding.rows[self.accepted]


class Node:
    """Answers letters.

    Args:
        fed: of `data.among(names)`; its engine trains, its store is not used. All else must be as it is at the server.
        shelf: where clients' holdings are.
        back: rounds over which a server that was stopped may go back without that its clients lose their states, >= 1:
            as many rounds as it makes between two checkpoints.
        signing: answers are signed with this, and no letter is read that the server has not signed; None: nothing is.
        vault: where clients' secrets are during a secure sum; None: in this process.
    """

    def __init__(
        self, fed: Federation, shelf: Shelf | None = None, back: int = 1, *, signing: AtNode | None = None,
        vault: Vault | None = None,
    ):  # fmt: skip
        expect(is_whole(back, 1), f"back={back}: expected a whole number of rounds >= 1", where="back")
        self.shelf: Shelf = MemoryShelf() if shelf is None else shelf
        self.clients = frozenset(fed.data.here)
        self._fed = fed
        self._form = reading.Form.of(fed)
        self._terms = terms_of(fed)
        self._stamp = stamp(self._terms)
        self._back = back
        self._signing = signing
        self._masking = None if fed.secure is None else Masking(fed, fed.secure, vault or MemoryVault())
        self._engine: Engine | None = None

    @property
    def longest(self) -> int:
        """Bytes that no letter exceeds; a longer one is not looked at."""
        return self._form.longest + (0 if self._masking is None else self._masking.longest)

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends its worker processes. It may be used again."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def answer(self, letters: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        """(client, answer) for each (client, letter); those that cannot be read are answered first. What an answered
        client now holds is on the shelf before its answer is given out."""
        plans: dict[_Key, Plan] = {}  # the same for many clients, so it is read once
        asked: dict[_Key, list[_Asked]] = {}
        for client, blob in letters:
            try:
                letter = Letter.unpacked(blob, self.longest)
                if self._signing is not None:
                    expect_by(SERVER, blob, self._signing.keys)
            except WireError as error:
                yield client, Answer("failed", client, "", why(error)).packed()
                continue
            except Rejected as error:
                yield client, Answer("failed", client, "", f"{error.code} {error.why}").packed()
                continue
            try:
                if letter.step is not None and letter.step.name != "masked":
                    yield client, self._packed(self._stepped(letter, client), letter.signed)
                    continue
                key = _Key(letter.kind, letter.fingerprint, letter.together)
                if letter.step is not None and any(one.client == client for one in asked.get(key, ())):
                    continue  # it came twice, and a step is taken once
                one, plan = self._read(letter, client, plans.get(key))
                plans[key] = plan
                batch = asked.setdefault(key, [])
                batch.extend([one] if all(one.client != other.client for other in batch) else [])  # it came twice
            except _Unread as unread:
                step = "" if letter.step is None else letter.step.name
                refusal = Answer(unread.said, client, letter.fingerprint, unread.why, terms=unread.terms)
                yield client, self._packed(refusal._replace(step=step, code=unread.code), letter.signed)
            except Rejected as error:  # not signed: whoever sends it a letter anew must not get a new answer to it
                yield client, Answer("failed", client, "", f"{error.code} {error.why}").packed()
        for key, batch in asked.items():
            answers = self._answers(key, plans[key], batch)
            signed = {one.client: one.signed for one in batch}
            step = "" if self._masking is None else "masked"
            for answer in self._gathered(plans[key], answers) if key.together else answers:
                yield answer.client, self._packed(answer._replace(plan=key.plan, step=step), signed[answer.client])

    def _packed(self, answer: Answer, signed: Signed | None) -> bytes:
        if self._signing is None:
            return answer.packed()
        return answer._replace(signed=signed).packed(self._signing.keys)

    def _read(self, letter: Letter, client: int, plan: Plan | None) -> tuple[_Asked, Plan]:
        """Raises _Unread, Rejected."""
        holding, damage = self._expected(letter, client)
        try:
            arrived = reading.opened(letter)
            accepted = int(arrived.scalars["accepted"])
        except (WireError, KeyError, ValueError, OverflowError) as error:
            raise _Unread("failed", why(error)) from None
        if accepted >= 0 and (holding is None or accepted not in holding.rows):
            lacks = damage or f"its state after round {accepted} is not here"
            raise _Unread("row", lacks)
        if plan is None:
            try:
                plan = reading.read(self._form, letter, arrived, holding)
            except WireError as error:
                raise _Unread("plan", damage or why(error)) from None
        turn = None if self._masking is None else self._safe(self._masking.turn, letter)
        return _Asked(client, accepted, holding, letter.signed, turn), plan

    def _stepped(self, letter: Letter, client: int) -> Answer:
        """What it says at a step of a secure sum to which no plan belongs. Raises _Unread, Rejected."""
        self._expected(letter, client)
        assert self._masking is not None  # as this letter was expected
        return self._safe(self._masking.answer, letter)

    def _expected(self, letter: Letter, client: int) -> tuple[Holding | None, str]:
        """What the client holds, and what is the matter with it. Raises _Unread, Rejected for a letter that it must not
        answer."""
        if client not in self.clients or letter.client != client:
            raise _Unread("failed", f"client {letter.client} is not at this node")
        if letter.kind not in ("round", "probe"):
            raise _Unread("failed", f"kind {letter.kind!r}: expected round or probe")
        holding, damage = None, ""
        try:
            holding = self.shelf.get(client)
        except StorageError as error:
            damage = why(error)
        if self._signing is not None:
            last = 0 if holding is None else holding.number
            last = last if self._masking is None else max(last, self._masking.last(client))
            self._signing.expect(letter.signed, self._fed.data.names[client], letter.round, last)
        if letter.terms not in ("", self._stamp):
            raise _Unread("terms", "other settings", self._terms)
        if (letter.step is None) != (self._masking is None):
            said = "a step of a secure sum, which" if self._masking is None else "a message in the clear, which"
            raise _Unread("failed", f"it is asked for {said} its node's settings do not have", code=REFUSED)
        return holding, damage

    def _safe(self, step: Callable[[Letter], _T], letter: Letter) -> _T:
        """Raises _Unread where the client does not take this step."""
        try:
            return step(letter)
        except Unsafe as error:
            raise _Unread("failed", str(error), code=REFUSED) from None
        except (WireError, StorageError) as error:
            raise _Unread("failed", why(error)) from None

    def _answers(self, key: _Key, plan: Plan, batch: list[_Asked]) -> Iterator[Answer]:
        left = {one.client: one for one in batch}
        rows = {one.client: one.row for one in batch if one.row is not None}
        if self._engine is None:
            self._engine = self._fed.made_engine(Keep())
        replies = self._engine.replies("probe" if key.kind == "probe" else "round", plan, list(left), rows)
        try:
            hiding = None if self._masking is None else self._masking.hiding(key.kind, plan)
            for reply in replies:
                one = left[reply.client]
                blob = reply.message["frame"]["frame"].numpy().tobytes()
                answer = Answer("message", one.client, key.plan, reply.refused or "", blob)
                if hiding is not None and one.turn is not None:
                    reply, answer = hiding.hide(one.turn, reply, answer)
                self._keep(one, key.plan, plan, reply)
                del left[reply.client]
                yield answer
        except LaminaError as error:
            self.close()
            for client in left:
                yield Answer("failed", client, key.plan, why(error))

    def _gathered(self, plan: Plan, answers: Iterator[Answer]) -> Iterator[Answer]:
        """The messages that can be taken together, as one; all other answers as they are."""
        expected = message.Expected.of(self._fed.setup, "round", plan)
        singles: list[Answer] = []
        parts: list[tuple[Reply, float]] = []
        for answer in answers:
            reply = message.read(self._fed.setup, plan, expected, answer) if answer.said == "message" else None
            if reply is None or reply.refused is not None:
                yield answer
                continue
            singles.append(answer)
            size = float(self._fed.data.sizes[answer.client])
            parts.append((reply, size if self._fed.weights == "examples" else 1.0))
        one = message.together(self._fed.setup, plan, parts) if len(parts) > 1 else None
        yield from singles if one is None else [one]

    def _keep(self, one: _Asked, name: str, plan: Plan, reply: Reply) -> None:
        before = one.holding or Holding("", {}, {})
        older = {round: row for round, row in before.rows.items() if round <= one.accepted}
        fresh = {} if reply.row is None or reply.refused is not None else {plan.round: reply.row}
        kept = dict([*fresh.items(), *older.items()][: len(fresh) + self._back])
        number = before.number if one.signed is None else one.signed.number
        self.shelf.put(one.client, Holding(name, reading.trees_of(plan), kept, before.puts + 1, number))


class _Unread(Exception):
    def __init__(self, said: str, why: str, terms: Terms = MappingProxyType({}), code: str = ""):
        super().__init__(why)
        self.said = said
        self.why = why
        self.code = code
        self.terms = terms
