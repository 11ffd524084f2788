"""The server's side of a secure sum with clients that are elsewhere: four exchanges, and of each client only what hides
it (`lamina.privacy.protocol`).

    letter                        answer                       who gives none is out of
    keys                          its public keys              the sum; it is not sent the plan
    shares: everybody's keys      sealed shares                the sum; it is not sent the plan
    masked: shares, and the plan  its masked message           the sum; the others' shares take its masks away
    unmask: who came              shares of secrets            nothing, as long as enough others answer

Every exchange has the whole of `faults.reply_deadline_s`. Frames count as in a simulation, where the same protocol is
in one process (`lamina.privacy.summing`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from lamina import wire
from lamina.client import Reply
from lamina.engine.base import Kind, Pack
from lamina.errors import WireError
from lamina.method import Plan
from lamina.privacy.protocol import SAID, SEALED, Server
from lamina.privacy.secure import SecureSum
from lamina.privacy.shamir import SHARE
from lamina.privacy.summing import around, told, too_few, weights
from lamina.privacy.trees import Mean, Trees, implied
from lamina.remote.asked import Asked, Asking, Carrier, code_of
from lamina.remote.envelope import Answer, Step
from lamina.remote.message import why
from lamina.wire import frame

_NUMBER = 4  # bytes of a client in a table
_PER_TENSOR = 256  # bytes; names in a frame, lengths
_SLACK = 4096  # bytes of a message beyond its elements


def replies(
    secure: SecureSum, by: Carrier, kind: Kind, plan: Plan, clients: Sequence[int], pack: Pack
) -> Iterator[Reply]:
    """Those of all clients in their order: the first that came has the mean, as that of all its `members`. Where too
    few are left all are refused (E307)."""
    sum_ = _Sum(secure, by, kind, plan, clients, pack)
    made = sum_.made()
    yield from sum_.beside
    yield from told(sum_.stubs(), sum_.server.came, made, sum_.up, sum_.down)


class _Sum:
    """One sum, from the first letter to the last answer.

    Attributes:
        up, down: what was said beside the plan, by client.
        beside: what came and is nobody's answer.
    """

    def __init__(self, secure: SecureSum, by: Carrier, kind: Kind, plan: Plan, clients: Sequence[int], pack: Pack):
        self.up: dict[int, dict[str, wire.Size]] = {c: {} for c in clients}
        self.down: dict[int, dict[str, wire.Size]] = {c: {} for c in clients}
        self.beside: list[Reply] = []
        self._by, self._kind, self._plan, self._pack = by, kind, plan, pack
        self._clients = tuple(clients)
        self._weights = weights(by.setup, clients)
        self._largest = max(by.setup.weights_of(clients))
        self._trees = Trees(secure, by.setup, plan, len(clients), implied(by.setup, kind, plan))
        self._needed = secure.needed(len(clients))
        self._steps: dict[int, int] = {}
        self._lost: dict[int, Reply] = {}
        self._again: dict[int, str | None] = {}
        self._sent: frozenset[int] = frozenset()  # who was sent the plan
        self.server = Server(self._trees.widths, self._needed)

    def made(self) -> Mean | str:
        """The mean, or why there is none."""
        there = self._keys(self._clients)
        for step in (self._shares, self._masked):
            if len(there) >= self._needed:
                there = step(there)
        if len(there) >= self._needed:
            return self._unmasked()
        return too_few(len(there), len(self._clients), self._needed)

    def stubs(self) -> Iterator[Reply]:
        for c in self._clients:
            one = Reply(c, {}, None, {}, math.nan, self._steps.get(c, 0), None, again=self._again.get(c), within=True)
            yield self._lost.get(c, one)._replace(sent=c in self._sent)

    def _keys(self, clients: Sequence[int]) -> list[int]:
        return [
            c
            for c, answer in self._answers("keys", clients, None, _framed("keys", SAID))
            if self._taken(c, "keys", answer, partial(self.server.keys, c))
        ]

    def _shares(self, clients: Sequence[int]) -> list[int]:
        roster = self.server.roster()
        longest = _framed("shares", (len(clients) - 1) * (_NUMBER + SEALED))
        return [
            c
            for c, answer in self._answers("shares", clients, lambda c: ("keys", roster), longest)
            if self._taken(c, "shares", answer, partial(self.server.shares, c))
        ]

    def _masked(self, clients: Sequence[int]) -> list[int]:
        self._sent = frozenset(clients)
        longest = self._trees.longest + _PER_TENSOR * self._trees.tensors + _SLACK
        shares = {c: self.server.shares_for(c) for c in clients}
        answers = self._answers("masked", clients, lambda c: ("shares", shares[c]), longest)
        return [c for c, answer in answers if self._summed(c, answer, longest)]

    def _unmasked(self) -> Mean | str:
        came = self.server.came
        list_, answers = self.server.who_came(), {}
        longest = _framed("unmask", len(self._clients) * (_NUMBER + SHARE))
        for c, answer in self._answers("unmask", came, lambda c: ("unmask", list_), longest):
            if self._taken(c, "unmask", answer, self.server.answers):
                answers[c] = self._section(answer, "unmask")
        try:
            sums = self.server.sums(answers)
        except ValueError as error:
            return str(error)
        steps = [float(self._steps[c]) for c in came] if self._steps else []
        return self._trees.mean(sums, [self._weights[c] for c in came], steps)

    def _answers(
        self, name: str, clients: Sequence[int], said: Callable[[int], tuple[str, bytes]] | None, longest: int
    ) -> Iterator[tuple[int, Answer]]:
        """Of one step, in the order of the clients; who gave none is lost.

        Args:
            said: what a client is told, by its section's name; None: nothing.
        """

        def of(c: int) -> Step:
            if said is None:
                return Step(name, b"", len(self._clients), self._largest)
            section, content = said(c)
            framed = frame.pack(frame.Frame("plan", self._plan.round, c, {}, {section: content}))
            before = self.down[c].get(section, wire.Size({}, 0, {})).total
            self.down[c][section] = wire.Size({}, before + len(framed), {})
            return Step(name, framed, len(self._clients), self._largest)

        asked = Asked(self._by, self._kind, self._plan, clients, self._pack, Asking(name, of, longest))
        try:
            for c in clients:
                found = asked.answer(c)
                self._again[c] = asked.again(c) or self._again.get(c)
                if isinstance(found, Answer):
                    yield c, found
                else:
                    self._lose(name, found)
        finally:
            asked.close()
            self.beside += asked.beside()

    def _lose(self, name: str, reply: Reply) -> None:
        if name != "unmask":  # after it a message is in the sum, whatever comes then
            self._lost[reply.client] = reply
            if reply.sizes:
                self.up[reply.client]["" if name == "masked" else name] = reply.sizes[""]
        elif reply.sizes or reply.code != "E311":
            self.beside.append(reply._replace(beside=True))

    def _refuse(self, name: str, answer: Answer, code: str, said: str) -> None:
        sizes = {"": wire.Size({}, len(answer.frame), {})}
        lost = Reply(answer.client, {}, None, sizes, math.nan, 0, said, code, self._again.get(answer.client))
        self._lose(name, lost)

    def _taken(self, c: int, name: str, answer: Answer, take: Callable[[bytes], object]) -> bool:
        try:
            take(self._section(answer, name))
        except (WireError, ValueError) as error:
            self._refuse(name, answer, code_of(error), why(error))
            return False
        self.up[c][name] = wire.Size({}, len(answer.frame), {})
        return True

    def _summed(self, c: int, answer: Answer, longest: int) -> bool:
        """Whether its message is in the sum."""
        due = self._by.setup.local.count(int(self._by.setup.data.sizes[c]))
        expected = {} if self._kind == "probe" else {"steps": float(due)}
        try:
            arrived = self._arrived(answer, longest)
            if arrived.scalars.keys() != expected.keys():
                raise WireError(f"numbers {sorted(arrived.scalars)}, expected {sorted(expected)}", code="E345")
            elements, sizes = self._trees.unpacked(arrived.sections)
        except Exception as error:  # whatever a codec makes of bytes that it did not make
            self._refuse("masked", answer, code_of(error), why(error))
            return False
        if arrived.scalars != expected:
            claimed = arrived.scalars["steps"]
            self._refuse("masked", answer, "E314", f"{claimed:g} local steps, this client's examples make {due}")
            return False
        self.up[c] |= sizes | {"": around(answer.frame, sizes)}
        self._steps |= {c: due} if expected else {}
        self.server.masked(c, elements)
        return True

    def _section(self, answer: Answer, name: str) -> bytes:
        arrived = self._arrived(answer, len(answer.frame))
        if arrived.scalars or arrived.sections.keys() != {name}:
            raise WireError(f"it has {sorted({*arrived.scalars, *arrived.sections})}, expected {name}", code="E345")
        return arrived.sections[name]

    def _arrived(self, answer: Answer, longest: int) -> frame.Frame:
        """Raises WireError."""
        arrived = frame.unpack(answer.frame, max_bytes=longest)
        found = (arrived.kind, arrived.round, arrived.client)
        if found != ("message", self._plan.round, answer.client):
            said = f"a {found[0]} of round {found[1]} from client {found[2]}"
            raise WireError(f"{said}, expected round {self._plan.round} from {answer.client}", code="E345")
        return arrived


def _framed(section: str, length: int) -> int:
    """Bytes of a message with nothing else."""
    return length + frame.overhead("message", {}, {section: length})
