"""What a server asks of clients that are elsewhere, and what comes back of it: whatever comes, in whatever order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from lamina import wire
from lamina.admission import unused
from lamina.client import Reply, Setup
from lamina.cohort import Faults
from lamina.engine.base import Kind, Missing, Pack
from lamina.errors import WireError
from lamina.method import Plan
from lamina.remote import message
from lamina.remote.envelope import Answer, Letter, Step, expect_by, fingerprint
from lamina.remote.signing import AtServer, Rejected
from lamina.remote.staging import Staging
from lamina.remote.terms import Terms, differences, stamp

REFUSED = "E336"  # a step of a secure sum that a client does not take
OUT = frozenset({"E310", "E312", "E319"})  # why a client leaves itself out of a sum
SLACK = 4096  # bytes of an answer beyond its frame

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


class Carrier(NamedTuple):
    """What carries all that a server asks.

    Args:
        terms: what nodes must have in common with this server.
        clock: monotonic, in seconds.
        signing: what letters are signed with; None: nothing is signed.
    """

    post: Post
    setup: Setup
    terms: Terms
    faults: Faults
    clock: Callable[[], float]
    signing: AtServer | None = None


class Asking(NamedTuple):
    """One step of a secure sum.

    Args:
        of: what of it each client is sent.
        longest: bytes that the frame of no right answer exceeds.
    """

    name: str
    of: Callable[[int], Step]
    longest: int


class Asked:
    """One plan on its way to some clients, or one step of a secure sum, and what has come back.

    Args:
        by: through whom, and how.
        step: none where a message in the clear is asked for.
        together: a node may answer for several clients in one message.
        enough: messages with which it is content, though more clients were asked; None: all.
    """

    def __init__(
        self, by: Carrier, kind: Kind, plan: Plan, clients: Sequence[int], pack: Pack, step: Asking | None = None,
        *, together: bool = False, enough: int | None = None,
    ):  # fmt: skip
        post, setup, signing, clock = by.post, by.setup, by.signing, by.clock
        self._signing = signing
        if signing is not None:
            signing.begin()
        self._post = post
        self._setup = setup
        self._terms = by.terms
        self._stamp = stamp(by.terms)
        self._kind = kind
        self._plan = plan
        self._pack = pack
        self._step = step
        self._together = together
        self._expected = message.Expected.of(setup, kind, plan)
        self._patience = by.faults.reply_deadline_s
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
        self._most = self._expected.most(len(clients)) if step is None else step.longest + SLACK
        post.send(((client, self._letter(client, "")) for client in clients), self._most)

    def reply(self, client: int) -> Reply:
        """Waits for it."""
        found = self.answer(client)
        return self._read(found) if isinstance(found, Answer) else found

    def answer(self, client: int) -> Answer | Reply:
        """Waits for it, and does not read it; a reply that says why, where nothing usable came."""
        while client in self._open:
            left = None if self._end is None else max(0.0, self._end - self._clock())
            arrival = self._post.receive(left)
            if arrival is None:
                self._give_up()
            else:
                self._take(*arrival)
        return self._came.pop(client) if client in self._came else self._staged.take(client)

    def unused(self, client: int, code: str, why: str, length: int = 0, layer: str = "") -> Reply:
        return unused(client, code, why, length, self._again.get(client), layer)

    def again(self, client: int) -> str | None:
        """Why it was sent the plan once more."""
        return self._again.get(client)

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
            return self.unused(answer.client, code, said, len(answer.frame), layer)
        except Exception as error:  # whatever a codec makes of bytes that it did not make
            return self.unused(answer.client, code_of(error), message.why(error), len(answer.frame))
        return read._replace(again=self._again.get(answer.client))

    def _letter(self, client: int, missing: Missing) -> bytes:
        plan = self._plan
        shared = {tree: wire.schema_of(content) for tree, content in plan.shared.items()}
        step = None if self._step is None else self._step.of(client)
        bare = step is not None and step.name != "masked"
        frame = b"" if bare else self._pack(client, missing)
        mask = () if bare else tuple(plan.mask or ())
        head = (self._kind, client, plan.round, self._fingerprint, mask, {} if bare else shared, self._together)
        letter = Letter(*head, frame, self._stamp, step=step)
        if self._signing is None:
            return letter.packed()
        signed = self._signing.letter(client, self._name(client), plan.round)
        return letter._replace(signed=signed).packed(self._signing.keys)

    def _take(self, client: int, what: bytes | Lost) -> None:
        if isinstance(what, Lost):
            if client in self._open:
                self._close(client, self.unused(client, _LOST, what.reason))
            return
        try:
            answer = Answer.unpacked(what, self._most)
        except Exception as error:
            if client in self._open and self._signing is None:
                self._close(client, self.unused(client, code_of(error), message.why(error), len(what)))
            elif client in self._open:  # anybody can send bytes: its answer may still come
                self._put_beside(client, code_of(error), message.why(error), len(what))
            else:
                self._put_beside(client, "E331", "bytes that cannot be read, after its answer", len(what))
            return
        try:
            self._expect_signed(client, what, answer)
        except Rejected as rejected:
            self._beside.append(unused(client, rejected.code, rejected.why, len(answer.frame))._replace(beside=True))
            return
        named = "" if self._step is None else self._step.name
        if answer.plan not in ("", self._fingerprint) or (answer.plan and answer.step != named):
            other = "another plan" if answer.plan != self._fingerprint else "another step"
            self._put_beside(client, "E332", f"it comes late: it answers {other}", len(answer.frame))
            return  # the one to this may still come
        if client not in self._open:
            code, said = (
                ("E331", "it has answered already") if client in self._asked else (_NOT_ITS, "it was not asked")
            )
            self._put_beside(client, code, said, len(answer.frame))
            return
        if answer.client != client:
            said = f"an answer of client {answer.client} in its place"
            self._close(client, self.unused(client, _NOT_ITS, said, len(answer.frame)))
        elif answer.said == "message" and answer.members:
            self._take_together(answer)
        elif answer.said == "message":
            self._close(client, answer)
        elif answer.said == "terms":
            other = differences(self._terms, answer.terms) or "settings that it does not name"
            self._close(client, self.unused(client, "E323", f"it has other settings: {other}"))
        elif answer.said == "out":
            self._close(client, self._out(answer))
        elif answer.said == "failed" or client in self._again:
            code = answer.code if answer.code == REFUSED else _LOST
            self._close(client, self.unused(client, code, answer.why or answer.said))
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
            self._close(answer.client, self.unused(answer.client, _NOT_ITS, said, len(answer.frame)))
            return
        if len({*members}) < len(members):
            said = f"a message that counts a client of {members} twice"
            self._close(answer.client, self.unused(answer.client, _NOT_ITS, said, len(answer.frame)))
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
                self._came[other] = self.unused(other, "E302", f"{self._answered} others had answered")
            self._open.clear()

    def _put_beside(self, client: int, code: str, said: str, length: int) -> None:
        if length:
            self._beside.append(unused(client, code, said, length)._replace(beside=True))

    def _give_up(self) -> None:
        over = self._end is not None and self._clock() >= self._end
        said = f"within {self._patience:g} s" if over else "any more: nothing is under way"
        for client in self._open.copy():
            self._close(client, self.unused(client, _LOST, f"no answer {said}"))

    def _out(self, answer: Answer) -> Reply:
        """Of a client that has left itself out of a sum."""
        code, c = answer.code if answer.code in OUT else _LOST, answer.client
        left = self.unused(c, code, answer.why, len(answer.frame), answer.layer)
        due = 0 if self._kind == "probe" else self._setup.local.count(int(self._setup.data.sizes[c]))
        return left._replace(steps=due)


def code_of(error: Exception) -> str:
    return error.code if isinstance(error, WireError) else _WRONG
