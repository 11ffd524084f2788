"""The server's side: an engine whose clients are elsewhere. It hands letters to a post and takes what comes back."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from lamina import wire
from lamina.admission import unused
from lamina.client import Reply, Setup
from lamina.cohort import Faults
from lamina.engine.base import Engine, Kind, Missing, Pack
from lamina.errors import ConfigError, WireError, expect
from lamina.federation import Federation
from lamina.method import Plan
from lamina.remote import message
from lamina.remote.envelope import Answer, Letter, expect_by, fingerprint
from lamina.remote.signing import AtServer, Rejected
from lamina.remote.staging import Staging
from lamina.remote.terms import Terms, differences, stamp, terms_of
from lamina.store import Row

_WRONG = "E345"  # bytes at which a codec failed without a word of its own
_LOST = "E311"
_NOT_ITS = "E330"


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
        terms: what nodes must have in common with this server.
        here: evaluates the global model.
        enough: messages with which a round is content, though more clients were asked; None: all.
        clock: monotonic, in seconds.
        signing: what letters are signed with; None: nothing is signed.
    """

    name = "remote"
    workers = 1

    def __init__(
        self, post: Post, setup: Setup, terms: Terms, faults: Faults, here: Engine, reason: str, together: bool = False,
        enough: int | None = None, clock: Callable[[], float] = time.monotonic, signing: AtServer | None = None,
    ):  # fmt: skip
        self.reason = reason
        self._signing = signing
        self._together = together
        self._post = post
        self._setup = setup
        self._terms = terms
        self._faults = faults
        self._here = here
        self._enough = enough
        self._clock = clock

    def replies(
        self, kind: Kind, plan: Plan, clients: Sequence[int], rows: Mapping[int, Row], pack: Pack | None = None
    ) -> Iterator[Reply]:
        if kind == "test":
            yield from self._here.replies(kind, plan, clients, rows)
            return
        if kind not in ("round", "probe") or pack is None:
            raise ConfigError(f"clients that are elsewhere are not asked for {kind!r}", code="E118", where="engine")
        together = self._together and kind == "round"
        enough = self._enough if kind == "round" else None
        asked = _Asked(
            self._post, self._setup, self._terms, self._faults, kind, plan, clients, pack, together, enough,
            self._clock, self._signing,
        )  # fmt: skip
        try:
            for client in clients:
                reply = asked.reply(client)
                yield from asked.beside()
                yield reply
        finally:
            asked.close()

    def close(self) -> None:
        self._here.close()


class _Asked:
    """One plan on its way to some clients, and what has come back."""

    def __init__(
        self, post: Post, setup: Setup, terms: Terms, faults: Faults, kind: Kind, plan: Plan, clients: Sequence[int],
        pack: Pack, together: bool, enough: int | None, clock: Callable[[], float], signing: AtServer | None,
    ):  # fmt: skip
        self._signing = signing
        if signing is not None:
            signing.begin()
        self._post = post
        self._setup = setup
        self._terms = terms
        self._stamp = stamp(terms)
        self._kind = kind
        self._plan = plan
        self._pack = pack
        self._together = together
        self._expected = message.Expected.of(setup, kind, plan)
        self._patience = faults.reply_deadline_s
        self._clock = clock
        self._enough = enough
        self._answered = 0
        self._beside: list[Reply] = []
        self._end = None if self._patience is None else clock() + self._patience
        self._asked = frozenset(clients)
        self._open = set(clients)
        self._came: dict[int, Reply] = {}
        self._staged = Staging()
        self._again: dict[int, str] = {}  # client -> why it was sent the plan once more
        self._fingerprint = fingerprint(plan)
        self._most = self._expected.most(len(clients))
        post.send(((client, self._letter(client, "")) for client in clients), self._most)

    def reply(self, client: int) -> Reply:
        """Waits for it."""
        while client in self._open:
            left = None if self._end is None else max(0.0, self._end - self._clock())
            arrival = self._post.receive(left)
            if arrival is None:
                self._give_up()
            else:
                self._take(*arrival)
        return self._came.pop(client) if client in self._came else self._read(self._staged.take(client))

    def close(self) -> None:
        self._staged.close()

    def beside(self) -> list[Reply]:
        """What came since it was last asked for, and is nobody's answer to this plan."""
        found, self._beside = self._beside, []
        return found

    def _read(self, answer: Answer) -> Reply:
        try:
            read = message.read(self._setup, self._plan, self._expected, answer)
        except message.Refused as error:
            code, said, layer = error.refusal
            return self._unused(answer.client, code, said, len(answer.frame), layer)
        except Exception as error:  # whatever a codec makes of bytes that it did not make
            return self._unused(answer.client, _code(error), message.why(error), len(answer.frame))
        return read._replace(again=self._again.get(answer.client))

    def _letter(self, client: int, missing: Missing) -> bytes:
        plan = self._plan
        shared = {tree: wire.schema_of(content) for tree, content in plan.shared.items()}
        frame = self._pack(client, missing)
        mask = tuple(plan.mask or ())
        head = (self._kind, client, plan.round, self._fingerprint, mask, shared, self._together)
        letter = Letter(*head, frame, self._stamp)
        if self._signing is None:
            return letter.packed()
        signed = self._signing.letter(client, self._name(client), plan.round)
        return letter._replace(signed=signed).packed(self._signing.keys)

    def _take(self, client: int, what: bytes | Lost) -> None:
        if isinstance(what, Lost):
            if client in self._open:
                self._close(client, self._unused(client, _LOST, what.reason))
            return
        try:
            answer = Answer.unpacked(what, self._most)
        except Exception as error:
            if client in self._open and self._signing is None:
                self._close(client, self._unused(client, _code(error), message.why(error), len(what)))
            elif client in self._open:  # anybody can send bytes: its answer may still come
                self._put_beside(client, _code(error), message.why(error), len(what))
            else:
                self._put_beside(client, "E331", "bytes that cannot be read, after its answer", len(what))
            return
        try:
            self._expect_signed(client, what, answer)
        except Rejected as rejected:
            self._beside.append(unused(client, rejected.code, rejected.why, len(answer.frame))._replace(beside=True))
            return
        if answer.plan not in ("", self._fingerprint):
            self._put_beside(client, "E332", "it comes late: it answers another plan", len(answer.frame))
            return  # the one to this plan may still come
        if client not in self._open:
            code, said = (
                ("E331", "it has answered already") if client in self._asked else (_NOT_ITS, "it was not asked")
            )
            self._put_beside(client, code, said, len(answer.frame))
            return
        if answer.client != client:
            said = f"an answer of client {answer.client} in its place"
            self._close(client, self._unused(client, _NOT_ITS, said, len(answer.frame)))
        elif answer.said == "message" and answer.members:
            self._take_together(answer)
        elif answer.said == "message":
            self._close(client, answer)
        elif answer.said == "terms":
            other = differences(self._terms, answer.terms) or "settings that it does not name"
            self._close(client, self._unused(client, "E323", f"it has other settings: {other}"))
        elif answer.said == "failed" or client in self._again:
            self._close(client, self._unused(client, _LOST, answer.why or answer.said))
        else:
            missing: Missing = "row" if answer.said == "row" else "plan"
            self._again[client] = answer.why or answer.said
            self._post.send([(client, self._letter(client, missing))], self._most)

    def _expect_signed(self, client: int, blob: bytes, answer: Answer) -> None:
        """Raises Rejected."""
        if self._signing is None:
            return
        if answer.client != client:
            raise Rejected(_NOT_ITS, f"an answer of client {answer.client} in its place")
        expect_by(self._name(client), blob, self._signing.keys)
        known = [m.client for m in answer.members if m.client < len(self._setup.data)]
        if not self._signing.keys.one(self._name(c) for c in known):
            raise Rejected("E334", f"its key is not that of all of the clients {known}")
        self._signing.take(client, answer.signed)

    def _name(self, client: int) -> str:
        return self._setup.data.names[client]

    def _take_together(self, answer: Answer) -> None:
        """Read at once: its members share its fate."""
        members = [member.client for member in answer.members]
        if not self._together or members[0] != answer.client or not {*members} <= self._open:
            said = f"a message of clients {members} together, who were not asked for one"
            self._close(answer.client, self._unused(answer.client, _NOT_ITS, said, len(answer.frame)))
            return
        if len({*members}) < len(members):
            said = f"a message that counts a client of {members} twice"
            self._close(answer.client, self._unused(answer.client, _NOT_ITS, said, len(answer.frame)))
            return
        first = self._read(answer)
        self._close(answer.client, first)
        for client, steps, loss in answer.members[1:]:
            used = Reply(client, {}, None, {}, loss, steps, None, again=self._again.get(client), within=True)
            refused = used._replace(refused=first.refused, code=first.code, layer=first.layer, within=False)
            self._close(client, used if first.refused is None else refused)

    def _close(self, client: int, what: Answer | Reply) -> None:
        self._open.discard(client)
        if isinstance(what, Answer):
            self._staged.put(client, what)
        else:
            self._came[client] = what
        self._answered += isinstance(what, Answer) or what.refused is None
        if self._enough is not None and self._answered >= self._enough:
            for other in self._open:
                self._came[other] = self._unused(other, "E302", f"{self._answered} others had answered")
            self._open.clear()

    def _put_beside(self, client: int, code: str, said: str, length: int) -> None:
        if length:
            self._beside.append(unused(client, code, said, length)._replace(beside=True))

    def _give_up(self) -> None:
        over = self._end is not None and self._clock() >= self._end
        said = f"within {self._patience:g} s" if over else "any more: nothing is under way"
        for client in self._open.copy():
            self._close(client, self._unused(client, _LOST, f"no answer {said}"))

    def _unused(self, client: int, code: str, why: str, length: int = 0, layer: str = "") -> Reply:
        return unused(client, code, why, length, self._again.get(client), layer)


def _code(error: Exception) -> str:
    return error.code if isinstance(error, WireError) else _WRONG


def over(
    fed: Federation, post: Post, *, together: bool = False, clock: Callable[[], float] = time.monotonic,
    signing: AtServer | None = None,
) -> Federation:  # fmt: skip
    """The same federation with its clients behind a post.

    What its own data has of clients is not used, but for their names and numbers of examples (`ClientData.registry`).

    Args:
        together: a node may send the weighted mean of its clients' messages as one, for a raw uplink. The sums are then
            made in another order, so the model is that of `loop` to rounding; the ledger has what travelled, with the
            first of those clients.
        clock: monotonic, in seconds; deadlines follow it.
        signing: letters are signed with this, and no answer is taken that is not; None: nothing is signed.

    Raises:
        ConfigError: E118 for what would be evaluated at the clients, for secure sums, or an uplink with which messages
            cannot be taken together.
    """
    if together:
        message.expect_raw(fed.uplink)
        message.expect_taken_together(fed.aggregate, fed.faults.norm)
        said = "together=True with privacy: updates are clipped one by one"
        expect(fed.privacy is None, said, code="E118", where="privacy", remedy="let every client send its own message")
    if "personal" in (fed.method.withholds or ""):
        warnings.warn("personal models are with clients that are elsewhere: they are not tested", stacklevel=2)
    reason = f"clients are elsewhere; engine {fed.engine} here"
    terms = terms_of(fed)

    def made(setup: Setup, here: Engine) -> RemoteEngine:
        return RemoteEngine(post, setup, terms, fed.faults, here, reason, together, fed.enough, clock, signing)

    return fed.by("remote", reason, made)
