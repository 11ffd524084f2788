"""R10: what a network may do to letters and answers, in any order, and what must hold whatever it does."""

from __future__ import annotations

import heapq
import itertools
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
sys.path[:0] = [path for path in (str(HERE.parent), str(HERE.parents[1] / "tests")) if path not in sys.path]

from hypothesis import HealthCheck, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test  # noqa: E402

from lamina import Federation, RoundRecord, State  # noqa: E402
from lamina.books import Books  # noqa: E402
from lamina.remote import Answer, Letter, Lost, MemoryShelf, Node, over  # noqa: E402
from lamina.survival import Survivors  # noqa: E402
from soak import Result, row  # noqa: E402
from soak.admission import federation, learned, lost_in, registry, world  # noqa: E402

CLIENTS = 4
HOMES = ((0, 1), (2, 3))
DEADLINE = 10.0  # seconds on the virtual clock


class Fate(NamedTuple):
    """Of a client's message: when copies of it arrive, in seconds after the letter; none: it is lost."""

    copies: tuple[float, ...] = (1.0,)


class Street:
    """A `Post` on a clock that stands still unless somebody waits. Its tap counts the frames that go through.

    Attributes:
        fates: client -> what happens to its next message.
        down: nodes that do not run.
        due: clients whose message of this round comes in time, as an observer outside sees it.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.fates: dict[int, Fate] = {}
        self.down: set[int] = set()
        self.due: set[int] = set()
        self.tap_up = self.tap_down = 0
        self.end = 0.0
        self._queue: list[tuple[float, int, int, bytes]] = []
        self._number = itertools.count()
        self._nodes: list[Node] = []
        self._makes: list[Callable[[], Node]] = []

    def settle(self, makes: Iterable[Callable[[], Node]]) -> None:
        self._makes = [*makes]
        self._nodes = [make() for make in self._makes]

    def crash(self, node: int) -> None:
        self.down.add(node)

    def restart(self, node: int) -> None:
        """With what is on its disk, and nothing else."""
        before = self._nodes[node].shelf
        self._nodes[node] = self._makes[node]()
        self._nodes[node].shelf = before
        self.down.discard(node)

    def clock(self) -> float:
        return self.now

    def send(self, letters: Iterable[tuple[int, bytes]], most: int) -> None:
        for client, blob in letters:
            letter = Letter.unpacked(blob)
            self.tap_down += len(letter.frame)
            # a server that has gone back asks again for what it asked before: what is still on its way is an answer
            asked = (
                at <= self.end and Answer.unpacked(old)[2] == letter.fingerprint
                for at, _, c, old in self._queue
                if c == client
            )
            self.due |= {client} if any(asked) else set()
            node = next(i for i, home in enumerate(HOMES) if client in home)
            if node in self.down:
                continue
            for answered, answer in self._nodes[node].answer([(client, blob)]):
                self._hand(answered, answer)

    def receive(self, timeout_s: float | None) -> tuple[int, bytes | Lost] | None:
        assert timeout_s is not None  # there is a deadline
        end = self.now + timeout_s
        if not self._queue or self._queue[0][0] > end:
            self.now = max(self.now, end)
            return None
        at, _, client, blob = heapq.heappop(self._queue)
        self.now = max(self.now, at)
        self.tap_up += len(Answer.unpacked(blob).frame)
        return client, blob

    def _hand(self, client: int, blob: bytes) -> None:
        if Answer.unpacked(blob).said != "message":
            self._put(self.now + 0.01, client, blob)
            return
        for after in self.fates.get(client, Fate()).copies:
            self._put(self.now + after, client, blob)
            if self.now + after <= self.end:
                self.due.add(client)

    def _put(self, at: float, client: int, blob: bytes) -> None:
        heapq.heappush(self._queue, (at, next(self._number), client, blob))


class World:
    """Made once: federations hold no state of a run."""

    def __init__(self, method: str = "scaffold"):
        data = world(CLIENTS)
        faults = {"reply_deadline_s": DEADLINE, "on_quorum": "skip"}
        self.street = Street()
        self.server = over(federation(method, registry(data), faults=faults), self.street, clock=self._clock)
        self.here = federation(method, data, faults={"on_quorum": "skip"})
        self._feds = [
            federation(method, replace(data.subset([*home]), check=False).among(data.names)) for home in HOMES
        ]

    def _clock(self) -> float:
        return self.street.now

    def begin(self) -> Street:
        """An empty street, with nodes that know nothing."""
        self.street.__init__()  # type: ignore[misc]
        self.street.settle([lambda fed=fed: Node(fed, MemoryShelf()) for fed in self._feds])
        return self.street


_WORLD: list[World] = []


def the_world() -> World:
    if not _WORLD:
        _WORLD.append(World())
    return _WORLD[0]


def step(fed: Federation, state: State | None, engine: Any) -> tuple[State, RoundRecord]:
    if state is None:
        state, books = fed.start(engine)
        return fed.round(state, engine, 99, False, books)
    return fed.round(state, engine, 99, False, Books())


IN_TIME, TOO_LATE = st.sampled_from([0.0, 0.3, 0.5, 3.0, 9.9]), st.sampled_from([10.5, 14.0, 25.0])
FATES = st.one_of(  # sent; delayed, and so out of order; late; dropped; duplicated
    st.just(Fate()),
    IN_TIME.map(lambda after: Fate((after,))),
    TOO_LATE.map(lambda after: Fate((after,))),
    st.just(Fate(())),
    st.lists(st.one_of(IN_TIME, TOO_LATE), min_size=2, max_size=3).map(lambda copies: Fate(tuple(copies))),
)


class Schedules(RuleBasedStateMachine):
    """Any number of fates, then a round; nodes crash and are started again; the server is, with its last commit."""

    rounds = 0

    def __init__(self) -> None:
        super().__init__()
        self.world = the_world()
        self.street = self.world.begin()
        self.state: State | None = None
        self.local: State | None = None
        self.before: tuple[State | None, State | None] = None, None

    @rule(node=st.integers(0, len(HOMES) - 1))
    def crash(self, node: int) -> None:
        self.street.crash(node)

    @rule(node=st.integers(0, len(HOMES) - 1))
    def restart(self, node: int) -> None:
        self.street.restart(node)

    @rule()
    def restart_server(self) -> None:
        """It goes on from the round before; what is under way to it stays so."""
        self.state, self.local = self.before

    @rule(fates=st.tuples(*[FATES] * CLIENTS))
    def send(self, fates: tuple[Fate, ...]) -> None:
        """A round, in which the network does this to the clients' messages."""
        self.street.fates = dict(enumerate(fates))
        self.a_round()

    @rule()
    def send_on_a_calm_day(self) -> None:
        self.a_round()

    def a_round(self) -> None:
        street, Schedules.rounds = self.street, Schedules.rounds + 1
        self.before = self.state, self.local
        up, down = street.tap_up, street.tap_down
        street.due = set()
        street.end = street.now + DEADLINE
        began = street.now
        engine = self.world.server.made_engine()
        try:
            self.state, record = step(self.world.server, self.state, engine)
        finally:
            engine.close()
        street.fates = {}
        # conservation: each client is accounted for once, and used once if its message came in time
        assert [c.client for c in record.clients] == list(range(CLIENTS))
        used = {c.client for c in record.clients if c.refused is None}
        assert used == street.due, (used, street.due, record.events)
        assert street.now <= began + DEADLINE
        # the ledger is what a tap on the street counts
        assert record.bytes_up == street.tap_up - up
        assert record.bytes_down == street.tap_down - down
        # the model is that of the survivors, made without a street
        lost = lost_in([record])
        inner = self.world.here.made_engine()
        self.local, _ = step(self.world.here, self.local, Survivors(inner, lost))
        assert learned(self.state) == learned(self.local)
        assert self.state.round == self.local.round

    def teardown(self) -> None:
        self.street.fates = {}


@row("R10", minutes=45, goal="10,000 random schedules on a virtual clock: conservation, ledger = tap, model = oracle")
def schedules(short: bool) -> Result:
    many = 12 if short else 10_000
    Schedules.rounds = 0
    how = settings(
        max_examples=many, stateful_step_count=14, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    try:
        run_state_machine_as_test(Schedules, settings=how)
    except AssertionError as error:
        return Result("a schedule breaks it", False, str(error)[:300])
    return Result(f"{many:,} schedules, {Schedules.rounds:,} rounds, 0 violations", True)
