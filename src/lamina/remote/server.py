"""The server's side: an engine whose clients are elsewhere. It hands letters to a post and takes what comes back."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from lamina import wire
from lamina.client import Reply, Setup
from lamina.cohort import Faults
from lamina.engine.base import Engine, Kind, Missing, Pack
from lamina.errors import ConfigError
from lamina.federation import Federation
from lamina.method import Plan
from lamina.remote import message
from lamina.remote.envelope import Answer, Letter, fingerprint
from lamina.store import Row

_WRONG = "E312"
_LOST = "E311"


class Lost(NamedTuple):
    """Instead of an answer."""

    reason: str


class Post(Protocol):
    """Takes letters to the clients' nodes, and brings answers, in any order. It may bring nothing, anything twice, and
    answers of earlier rounds: the engine makes sense of it."""

    def send(self, letters: Iterable[tuple[int, bytes]], most: int) -> None:
        """Takes letters over: (client, letter). They are made one at a time as they are asked for.

        A client that cannot be reached is no error: `receive` says that it is `Lost`.

        Args:
            most: bytes that no right answer exceeds; a longer one need not be brought, nor looked at.
        """
        ...

    def receive(self, timeout_s: float | None) -> tuple[int, bytes | Lost] | None:
        """The next (client, answer); waits for at most so long (None: without limit). None: nothing came, or nothing is
        under way any more."""
        ...


class RemoteEngine:
    """Asks clients through a post.

    Args:
        here: evaluates the global model.
    """

    name = "remote"
    workers = 1

    def __init__(self, post: Post, setup: Setup, faults: Faults, here: Engine, reason: str, together: bool = False):
        self.reason = reason
        self._together = together
        self._post = post
        self._setup = setup
        self._faults = faults
        self._here = here

    def replies(
        self, kind: Kind, plan: Plan, clients: Sequence[int], rows: Mapping[int, Row], pack: Pack | None = None
    ) -> Iterator[Reply]:
        if kind == "test":
            yield from self._here.replies(kind, plan, clients, rows)
            return
        if kind not in ("round", "probe") or pack is None:
            raise ConfigError(f"clients that are elsewhere are not asked for {kind!r}", code="E118", where="engine")
        together = self._together and kind == "round"
        asked = _Asked(self._post, self._setup, self._faults, kind, plan, clients, pack, together)
        for client in clients:
            yield asked.reply(client)

    def close(self) -> None:
        self._here.close()


class _Asked:
    """One plan on its way to some clients, and what has come back."""

    def __init__(
        self, post: Post, setup: Setup, faults: Faults, kind: Kind, plan: Plan, clients: Sequence[int], pack: Pack,
        together: bool,
    ):  # fmt: skip
        self._post = post
        self._setup = setup
        self._kind = kind
        self._plan = plan
        self._pack = pack
        self._together = together
        self._expected = message.Expected.of(setup, kind, plan)
        self._patience = faults.reply_deadline_s
        self._end = None if self._patience is None else time.monotonic() + self._patience
        self._open = set(clients)
        self._came: dict[int, Answer | Reply] = {}
        self._again: dict[int, str] = {}  # client -> why it was sent the plan once more
        self._fingerprint = fingerprint(plan)
        self._most = self._expected.most(len(clients))
        post.send(((client, self._letter(client, "")) for client in clients), self._most)

    def reply(self, client: int) -> Reply:
        """Waits for it."""
        while client in self._open:
            left = None if self._end is None else max(0.0, self._end - time.monotonic())
            arrival = self._post.receive(left)
            if arrival is None:
                self._give_up()
            else:
                self._take(*arrival)
        came = self._came.pop(client)
        if isinstance(came, Reply):
            return came
        return self._read(came)

    def _read(self, answer: Answer) -> Reply:
        try:
            read = message.read(self._setup, self._plan, self._expected, answer)
        except Exception as error:  # whatever a codec makes of bytes that it did not make
            return self._unused(answer.client, _WRONG, message.why(error), len(answer.frame))
        return read._replace(again=self._again.get(answer.client))

    def _letter(self, client: int, missing: Missing) -> bytes:
        plan = self._plan
        shared = {tree: wire.schema_of(content) for tree, content in plan.shared.items()}
        frame = self._pack(client, missing)
        mask = tuple(plan.mask or ())
        letter = Letter(self._kind, client, plan.round, self._fingerprint, mask, shared, self._together, frame)
        return letter.packed()

    def _take(self, client: int, what: bytes | Lost) -> None:
        if client not in self._open:
            return  # it was not asked, or has answered already
        if isinstance(what, Lost):
            self._close(client, self._unused(client, _LOST, what.reason))
            return
        try:
            answer = Answer.unpacked(what, self._most)
        except Exception as error:
            self._close(client, self._unused(client, _WRONG, message.why(error), len(what)))
            return
        if answer.plan not in ("", self._fingerprint):
            return  # it comes late, to another plan: the one to this plan may still come
        if answer.client != client:
            said = f"an answer of client {answer.client} in its place"
            self._close(client, self._unused(client, _WRONG, said, len(answer.frame)))
        elif answer.said == "message" and answer.members:
            self._take_together(answer)
        elif answer.said == "message":
            self._close(client, answer)
        elif answer.said == "failed" or client in self._again:
            self._close(client, self._unused(client, _LOST, answer.why or answer.said))
        else:
            missing: Missing = "row" if answer.said == "row" else "plan"
            self._again[client] = answer.why or answer.said
            self._post.send([(client, self._letter(client, missing))], self._most)

    def _take_together(self, answer: Answer) -> None:
        """Read at once: its members share its fate."""
        members = [member.client for member in answer.members]
        if not self._together or members[0] != answer.client or not {*members} <= self._open:
            said = f"a message of clients {members} together, who were not asked for one"
            self._close(answer.client, self._unused(answer.client, _WRONG, said, len(answer.frame)))
            return
        if len({*members}) < len(members):
            said = f"a message that counts a client of {members} twice"
            self._close(answer.client, self._unused(answer.client, _WRONG, said, len(answer.frame)))
            return
        first = self._read(answer)
        self._close(answer.client, first)
        for client, steps, loss in answer.members[1:]:
            used = Reply(client, {}, None, {}, loss, steps, None, again=self._again.get(client))
            refused = used._replace(refused=first.refused, code=first.code)
            self._close(client, used if first.refused is None else refused)

    def _close(self, client: int, what: Answer | Reply) -> None:
        self._open.discard(client)
        self._came[client] = what

    def _give_up(self) -> None:
        over = self._end is not None and time.monotonic() >= self._end
        said = f"within {self._patience:g} s" if over else "any more: nothing is under way"
        for client in self._open.copy():
            self._close(client, self._unused(client, _LOST, f"no answer {said}"))

    def _unused(self, client: int, code: str, why: str, length: int = 0) -> Reply:
        return message.unused(client, code, why, length, self._again.get(client))


def over(fed: Federation, post: Post, *, together: bool = False) -> Federation:
    """The same federation with its clients behind a post.

    What its own data has of clients is not used, but for their names and numbers of examples (`ClientData.registry`).

    Args:
        together: a node may send the weighted mean of its clients' messages as one, for a raw uplink. The sums are then
            made in another order, so the model is that of `loop` to rounding; the ledger has what travelled, with the
            first of those clients.

    Raises:
        ConfigError: E118 for what would be evaluated at the clients, or an uplink with which messages cannot be taken
            together.
    """
    if together:
        message.expect_raw(fed.uplink)
    if "personal" in (fed.method.withholds or ""):
        warnings.warn("personal models are with clients that are elsewhere: they are not tested", stacklevel=2)
    reason = f"clients are elsewhere; engine {fed.engine} here"
    return fed.by("remote", reason, lambda setup, here: RemoteEngine(post, setup, fed.faults, here, reason, together))
