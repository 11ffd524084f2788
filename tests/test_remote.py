"""What goes wrong between a server and clients that are elsewhere, and what is done about it.

`loop` with the same messages left out is the point of reference: what is lost on a network costs bytes, and no bit of
the model beside the message itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import cases
import network
from lamina import (
    ClientData,
    ConfigError,
    DataError,
    FedAvg,
    Federation,
    FedLAMA,
    LocalSGD,
    Method,
    Plan,
    RunError,
    StorageError,
    WireError,
    Work,
    cohort,
    wire,
)
from lamina.admission import unused
from lamina.client import Reply
from lamina.remote import Answer, DiskShelf, Letter, Lost, MemoryShelf, Node, Roll, message, over, register, terms
from lamina.remote.bundle import bundled, unbundled
from lamina.remote.envelope import Member
from lamina.remote.message import Expected
from lamina.tree import Message
from lamina.wire import frame
from network import Streets, connected

HOMES = ((0, 3), (1, 2, 4))
ROUNDS = 4


def maker(name: str, **settings: Any) -> Callable[..., Federation]:
    return lambda **options: cases.case(name, **settings | options)


def without(fed: Federation, missing: set[tuple[int, int]]) -> Federation:
    """The federation with the answers of these (round, client) lost, in one process."""

    class Losing:
        def __init__(self, inner: Any):
            self.__dict__.update(name=inner.name, reason=inner.reason, workers=inner.workers, inner=inner)

        def replies(self, kind: Any, plan: Plan, clients: Any, rows: Any, pack: Any = None) -> Iterator[Reply]:
            for reply in self.inner.replies(kind, plan, clients, rows):
                lost = kind == "round" and (plan.round, reply.client) in missing
                yield unused(reply.client, "E311", "lost") if lost else reply

        def close(self) -> None:
            self.inner.close()

    made = fed.made_engine
    fed.made_engine = lambda carry=None: Losing(made(carry))  # type: ignore[method-assign]
    return fed


def drawn(fed: Federation, round: int) -> tuple[int, ...]:
    return fed._drawn(round, {})


class Weather:
    """Does something to the answer of one client in one round; `did` says whether it came to that."""

    def __init__(self, streets: Streets, client: int, at: int, change: Callable[[bytes], Iterable[bytes | Lost]]):
        self.did = 0
        self._client, self._at, self._change = client, at, change
        streets.happens = self

    def __call__(self, client: int, blob: bytes) -> Iterable[tuple[int, bytes | Lost]]:
        answer = Answer.unpacked(blob)
        if client != self._client or not answer.frame or frame.unpack(answer.frame).round != self._at:
            return [(client, blob)]
        self.did += 1
        return [(client, what) for what in self._change(blob)]


def lost(blob: bytes) -> list[bytes | Lost]:
    return [Lost("its node is away")]


def events(pairs: Sequence[tuple[Any, Any]], code: str) -> list[tuple[int, str, str]]:
    return [
        (record.round, event["client"], event.get("why", event.get("layer", "")))
        for _, record in pairs
        for event in record.events
        if event["code"] == code
    ]


def once(pairs: Sequence[tuple[Any, Any]], code: str, round: int, client: int) -> str:
    """The one event of this code is about this client in this round: why."""
    ((t, name, why),) = events(pairs, code)
    assert (t, name) == (round, network.shared().names[client])
    return why


# ---- answers that are lost, late or wrong


@pytest.mark.parametrize("name", ["fedavg", "errorfeedback", "fedlama, scaffold", "ssfl, fedlama", "ef21", "lips"])
@pytest.mark.parametrize("downlink", ["fp32", "lossless"])
@pytest.mark.filterwarnings(r"ignore:.* plans \d+ rounds, this run has \d+:UserWarning")
def test_a_lost_answer_is_left_out_and_its_client_goes_back(name: str, downlink: str) -> None:
    make = maker(name, downlink=wire.Dense(downlink), cohort="all")
    local = list(without(make(examples=network.shared()), {(1, 2)}).run(ROUNDS))
    fed, streets = connected(make, HOMES)
    weather = Weather(streets, 2, 1, lost)
    pairs = list(fed.run(ROUNDS))
    assert weather.did == 1
    assert once(pairs, "E311", 1, 2) == "its node is away"
    state, expected = pairs[-1][0], local[-1][0]
    assert cases.everything(state) | {"rows": network.rows(state, streets.nodes)} == cases.everything(expected)
    (client,) = [c for c in pairs[1][1].clients if c.client == 2]
    assert (client.refused, client.steps, client.bytes_up) == ("E311", 0, 0)
    assert client.bytes_down > 0  # it was sent its plan
    assert not events(pairs, "E313")  # and can read the next one, which is whole


def test_a_client_whose_answer_was_lost_is_sent_the_whole_plan() -> None:
    """In round 4 of FedLAMA with phi = 3 the others hold the layers that waited in round 3."""
    make = maker("fedlama", cohort="all")
    fed, streets = connected(make, HOMES)
    Weather(streets, 2, 3, lost)
    pairs = list(fed.run(5))
    first, after = ({c.client: c.bytes_down for c in pairs[t][1].clients} for t in (0, 4))
    assert after[2] == first[2]
    assert {after[c] for c in (0, 1, 3, 4)} == {after[0]}
    assert after[0] < after[2]


def test_an_answer_that_comes_a_round_late_is_passed_over() -> None:
    make = maker("errorfeedback", cohort="all")
    local = list(without(make(examples=network.shared()), {(1, 2)}).run(ROUNDS))
    fed, streets = connected(make, HOMES)
    kept: list[bytes] = []

    def late(client: int, blob: bytes) -> list[tuple[int, bytes | Lost]]:
        if client != 2:
            return [(client, blob)]
        kept.append(blob)
        return [] if len(kept) == 2 else [(2, old) for old in kept]  # the second, of round 1, comes in round 2 and 3

    streets.happens = late
    pairs = list(fed.run(ROUNDS))
    assert "nothing is under way" in once(pairs, "E311", 1, 2)
    assert cases.learned(pairs[-1][0])["params"] == cases.learned(local[-1][0])["params"]


def test_an_answer_that_comes_twice_counts_once() -> None:
    make = maker("scaffold")
    plain, _ = connected(make, HOMES)
    expected = list(plain.run(ROUNDS))
    fed, streets = connected(make, HOMES)
    streets.happens = lambda client, blob: [(client, blob), (client, blob)]
    pairs = list(fed.run(ROUNDS))
    twice, once_each = (cases.everything(found[-1][0]) for found in (pairs, expected))
    assert {k: x for k, x in twice.items() if k != "bytes"} == {k: x for k, x in once_each.items() if k != "bytes"}
    second = "it has answered already"
    for (_, record), (_, plain) in zip(pairs, expected, strict=True):
        unseen = {name: layer._replace(residual_norm=None) for name, layer in plain.layers.items()}
        assert record.layers == unseen  # what clients keep back stays with them
        assert record.bytes_up >= plain.bytes_up  # both came, and what came was counted
        assert {e["why"] for e in record.events} <= {second, "it comes late: it answers another plan"}
    beside = sum(t.bytes for _, record in pairs for t in record.traffic if t.layer == "_unused")
    assert sum(r.bytes_up for _, r in pairs) == sum(r.bytes_up for _, r in expected) + beside
    assert len(events(pairs, "E331")) >= len(pairs)


def flipped(where: float) -> Callable[[bytes], list[bytes | Lost]]:
    def flip(blob: bytes) -> list[bytes | Lost]:
        at = min(int(where * len(blob)), len(blob) - 1)
        return [blob[:at] + bytes([blob[at] ^ 4]) + blob[at + 1 :]]

    return flip


def other_client(blob: bytes) -> list[bytes | Lost]:
    return [Answer.unpacked(blob)._replace(client=3).packed()]


def other_frame(blob: bytes) -> list[bytes | Lost]:
    """The frame says client 3, though the answer says 2."""
    answer = Answer.unpacked(blob)
    again = frame.pack(frame.unpack(answer.frame)._replace(client=3))
    return [answer._replace(frame=again).packed()]


def other_round(blob: bytes) -> list[bytes | Lost]:
    answer = Answer.unpacked(blob)
    return [answer._replace(frame=frame.pack(frame.unpack(answer.frame)._replace(round=7))).packed()]


WRONG: dict[str, tuple[Callable[[bytes], list[bytes | Lost]], str]] = {
    "no bytes": (lambda blob: [b""], "E340"),
    "half of it": (lambda blob: [blob[: len(blob) // 2]], "E340"),
    "a byte behind it": (lambda blob: [blob + b"\0"], "E340"),
    "a flipped bit in front": (flipped(0.0), "E341"),
    "a flipped bit in the head": (lambda blob: [blob[:20] + b"~" + blob[21:]], "E343"),
    "a flipped bit in the middle": (flipped(0.5), "E343"),
    "a flipped bit at the end": (flipped(1.0), "E343"),
    "too long": (lambda blob: [blob + bytes(1 << 20)], "E340"),
    "of another client": (other_client, "E330 an answer of client 3 in its place"),
    "a frame of another client": (other_frame, "E330 a message of round 1 from client 3"),
    "a frame of another round": (other_round, "E332 a message of round 7 from client 2"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_answer_is_refused_with_its_client_and_nothing_else(wrong: str) -> None:
    change, why = WRONG[wrong]
    make = maker("errorfeedback", cohort="all")
    local = list(without(make(examples=network.shared()), {(1, 2)}).run(ROUNDS))
    fed, streets = connected(make, HOMES)
    weather = Weather(streets, 2, 1, change)
    pairs = list(fed.run(ROUNDS))
    assert weather.did == 1
    (event,) = pairs[1][1].events
    assert event["client"] == network.shared().names[2]
    assert why in f"{event['code']} {event['why']}"
    assert [c.client for _, r in pairs for c in r.clients if c.refused] == [2]
    assert cases.bits(pairs[-1][0].params) == cases.bits(local[-1][0].params)
    assert network.rows(pairs[-1][0], streets.nodes) == cases.everything(local[-1][0])["rows"]


def test_what_is_too_long_is_refused_before_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    fed, streets = connected(maker("fedavg", cohort="all"), HOMES)
    looked: list[int] = []
    unpack = frame.unpack
    monkeypatch.setattr(frame, "unpack", lambda blob, **how: looked.append(len(blob)) or unpack(blob, **how))
    Weather(streets, 2, 1, lambda blob: [bytes(1 << 20)])
    pairs = list(fed.run(2))
    assert "1048576 bytes" in once(pairs, "E340", 1, 2)
    assert max(looked) < 1 << 20


def test_no_answer_within_the_deadline_is_a_lost_one() -> None:
    fed, streets = connected(maker("fedavg", cohort="all"), HOMES, faults={"reply_deadline_s": 0.2})
    asked: list[float | None] = []
    receive = streets.receive

    def waits(timeout_s: float | None) -> Any:
        asked.append(timeout_s)
        arrival = receive(timeout_s)
        if arrival is None and timeout_s is not None:
            time.sleep(timeout_s)
        return arrival

    streets.receive = waits  # type: ignore[method-assign]
    Weather(streets, 2, 1, lambda blob: [])
    pairs = list(fed.run(2))
    assert once(pairs, "E311", 1, 2) == "no answer within 0.2 s"
    assert all(t is not None and 0 <= t <= 0.2 for t in asked)


def test_too_few_replies_fail_the_round_and_keep_the_state_before_it() -> None:
    make = maker("errorfeedback", cohort="all")
    fed, streets = connected(make, HOMES, faults={"min_replies": 5})
    Weather(streets, 2, 2, lost)
    run = fed.run(ROUNDS)
    state = [next(run)[0], next(run)[0]][-1]
    with pytest.raises(RunError, match=r"round 2: 4 of 5 messages.*'cyd': its node is away") as caught:
        next(run)
    assert caught.value.code == "E306"
    streets.happens = lambda client, blob: [(client, blob)]
    again = list(fed.run(ROUNDS - 2, state))
    expected = list(make(examples=network.shared()).run(ROUNDS))
    assert cases.bits(again[-1][0].params) == cases.bits(expected[-1][0].params)
    assert network.rows(again[-1][0], streets.nodes) == cases.everything(expected[-1][0])["rows"]


def test_a_round_without_any_answer_fails() -> None:
    fed, streets = connected(maker("fedavg"), HOMES)
    streets.happens = lambda client, blob: [(client, Lost("a storm"))]
    with pytest.raises(RunError, match=r"round 0: every message was refused.*a storm") as caught:
        next(fed.run(1))
    assert caught.value.code == "E311"


class Count(NamedTuple):
    rounds: Tensor


class Diverging(Method[tuple[()], Count]):
    """The client with one local step has an infinite update in its second round; all count theirs."""

    def init_client(self, params: Any) -> Count:
        return Count(torch.tensor(0))

    def report(self, client: Count, plan: Plan, work: Work, said: Message) -> tuple[Message, Count]:
        diverged = int(work.steps) == 1 and int(client.rounds) == 1 and plan.round < 3
        update = {name: x / 0 if diverged else x for name, x in said["update"].items()}
        return said | {"update": update}, Count(client.rounds + 1)


def test_a_client_that_was_refused_goes_back_and_keeps_its_plan() -> None:
    """Rounds 1 and 2 of "dan" diverge, and it counts 1, 1, 1, 2: as it does in `loop`."""

    def make(**options: Any) -> Federation:
        return cases.federation(Diverging(), cohort="all", **options)

    local = list(make(examples=network.shared()).run(ROUNDS))
    fed, streets = connected(make, HOMES)
    pairs = list(fed.run(ROUNDS))
    assert [t for t, name, _ in events(pairs, "E310") if name == "dan"] == [1, 2]
    assert [cases.untimed(r) for _, r in pairs] == [cases.untimed(r) for _, r in local]
    found = cases.everything(pairs[-1][0]) | {"rows": network.rows(pairs[-1][0], streets.nodes)}
    assert found == cases.everything(local[-1][0])
    assert int(streets.nodes[0].shelf.get(3).rows[3].method.rounds) == 2  # type: ignore[union-attr]


# ---- nodes that forget, and servers that go back


def test_a_node_that_forgot_is_sent_the_whole_plan_and_both_are_counted() -> None:
    """FedAvg's clients remember nothing that the model depends on, but its node says that round 0's state is gone."""
    make = maker("fedavg", cohort="all")
    expected = list(make(examples=network.shared()).run(3))
    fed, streets = connected(make, HOMES)
    run = fed.run(3)
    pairs = [next(run)]
    streets.nodes[0].shelf = MemoryShelf()
    pairs += list(run)
    assert cases.bits(pairs[-1][0].params) == cases.bits(expected[-1][0].params)
    assert [e[:2] for e in events(pairs, "E313")] == [(1, "ann"), (1, "dan")]
    down = {c.client: c.bytes_down for c in pairs[1][1].clients}
    whole = {c.client: c.bytes_down for c in pairs[0][1].clients}
    kept = {c.client: c.bytes_down for c in expected[1][1].clients}
    assert down == {c: kept[c] + whole[c] * (c in (0, 3)) for c in down}
    assert pairs[1][1].bytes_down == sum(down.values())


@pytest.mark.parametrize("name", ["scaffold", "errorfeedback", "fedlama", "stc"])
def test_a_client_that_lost_its_state_begins_as_a_newcomer(name: str) -> None:
    fed, streets = connected(maker(name, cohort="all"), HOMES)
    run = fed.run(3)
    pairs = [next(run)]
    streets.nodes[1].shelf = MemoryShelf()
    pairs += list(run)
    assert [t for t, _, _ in events(pairs, "E313")] == [1, 1, 1]
    assert all("state after round 0 is not here" in why for _, _, why in events(pairs, "E313"))
    assert not events(pairs, "E311")


def shelves(folder: Path) -> Callable[[Federation], DiskShelf]:
    """One folder for every node of a run."""
    return lambda fed: DiskShelf(fed, folder, "mine")


@pytest.mark.parametrize("name", ["fedlama, scaffold", "ssfl, errorfeedback", "personal, fedlama", "lips", "boosted"])
@pytest.mark.filterwarnings("ignore:personal models are with clients:UserWarning")
@pytest.mark.filterwarnings(r"ignore:.* plans \d+ rounds, this run has \d+:UserWarning")
def test_a_node_that_is_started_again_goes_on_from_its_disk(name: str, tmp_path: Path) -> None:
    make = maker(name, downlink=cases.LOSSLESS)
    expected = list(make(examples=network.shared()).run(ROUNDS))
    fed, streets = connected(make, HOMES, shelves(tmp_path))
    run = fed.run(ROUNDS)
    pairs = [next(run), next(run)]
    _, again = connected(make, HOMES, shelves(tmp_path))
    streets.nodes = again.nodes
    pairs += list(run)
    found = cases.everything(pairs[-1][0]) | {"rows": network.rows(pairs[-1][0], streets.nodes)}
    assert found == cases.everything(expected[-1][0])
    assert not events(pairs, "E313")
    took = {c: sum(c in r.cohort for _, r in pairs) for c in range(5)}
    probed = fed.method.has("probe")
    assert streets.nodes[0].shelf.counts() == {c: n + probed for c, n in took.items() if n + probed}


def test_a_damaged_file_is_named_and_its_client_begins_as_a_newcomer(tmp_path: Path) -> None:
    fed, _ = connected(maker("errorfeedback", cohort="all"), HOMES, shelves(tmp_path))
    run = fed.run(3)
    pairs = [next(run)]
    path = tmp_path / "mine" / "client-000002.safetensors"
    blob = bytearray(path.read_bytes())
    blob[-5] ^= 1
    path.write_bytes(blob)
    pairs += list(run)
    why = once(pairs, "E313", 1, 2)
    assert "client-000002.safetensors is damaged: it does not match its checksum" in why
    assert not events(pairs, "E311")


def test_a_damaged_plan_is_sent_again_and_its_clients_keep_their_states(tmp_path: Path) -> None:
    make = maker("ssfl, fedlama", cohort="all")  # its mask is sent but once
    expected = list(make(examples=network.shared()).run(3))
    fed, _ = connected(make, HOMES, lambda fed: DiskShelf(fed, tmp_path, str(min(fed.data.here))))
    run = fed.run(3)
    pairs = [next(run)]
    for path in (tmp_path / "1").glob("plan-*.safetensors"):
        path.write_bytes(path.read_bytes()[:-9])
    again, streets = connected(make, HOMES, lambda fed: DiskShelf(fed, tmp_path, str(min(fed.data.here))))
    with pytest.warns(UserWarning, match=r"plan-\w+.safetensors is damaged: .* sent the whole plan"):
        pairs += list(again.run(2, pairs[0][0]))
    assert {name for _, name, _ in events(pairs, "E313")} == {"bob", "cyd", "eve"}
    assert cases.bits(pairs[-1][0].params) == cases.bits(expected[-1][0].params)
    assert network.rows(pairs[-1][0], streets.nodes) == cases.everything(expected[-1][0])["rows"]


def test_a_plan_is_on_disk_once_for_all_clients_that_read_it(tmp_path: Path) -> None:
    fed, _ = connected(maker("scaffold"), HOMES, lambda fed: DiskShelf(fed, tmp_path, str(min(fed.data.here))))
    for _, record in fed.run(6):
        for home, folder in zip(HOMES, ("0", "1"), strict=True):
            here = {path.name for path in (tmp_path / folder).glob("*")}
            plans = {name for name in here if name.startswith("plan-")}
            clients = {name for name in here if name.startswith("client-")}
            assert here == plans | clients
            assert len(plans) <= min(len(clients) + 1, record.round + 1)  # one more until the next is put there
            assert clients >= {f"client-{c:06d}.safetensors" for c in {*home} & {*record.cohort}}


def test_a_shelf_takes_nothing_from_another_experiment_or_client(tmp_path: Path) -> None:
    fed, streets = connected(maker("errorfeedback", cohort="all"), HOMES, shelves(tmp_path))
    next(fed.run(1))
    mine = streets.nodes[0].shelf
    assert isinstance(mine, DiskShelf)
    other = DiskShelf(cases.case("errorfeedback"), tmp_path, "other")
    assert other.get(2) is None
    other.folder.mkdir()
    other.file(2).write_bytes(mine.file(2).read_bytes())
    mine.file(3).write_bytes(mine.file(2).read_bytes())
    mine.file(4).write_bytes(b"no safetensors")
    for shelf, client, why in ((other, 2, "it is of 'mine'"), (mine, 3, "of client 2"), (mine, 4, "is damaged")):
        with pytest.raises(StorageError, match=why) as caught:
            shelf.get(client)
        assert caught.value.code == "E404"
        assert caught.value.where == str(shelf.file(client))
    changed = DiskShelf(cases.case("scaffold"), tmp_path, "mine")
    with pytest.raises(StorageError, match="is damaged: "):
        changed.get(2)
    with pytest.raises(ConfigError):
        DiskShelf(cases.case("fedavg"), tmp_path, "../mine")


@pytest.mark.parametrize("name", ["scaffold", "fedlama, stc", "ssfl, fedlama", "personal, fedlama"])
@pytest.mark.parametrize("downlink", ["fp32", "lossless"])
@pytest.mark.filterwarnings("ignore:personal models are with clients:UserWarning")
def test_a_server_that_makes_a_round_again_gives_the_same_bits_and_bytes(name: str, downlink: str) -> None:
    """It was stopped after its clients had answered, before its checkpoint."""
    make = maker(name, **{} if "stc" in name else {"downlink": wire.Dense(downlink)})
    expected, _ = connected(make, HOMES)
    whole = list(expected.run(ROUNDS))
    fed, _ = connected(make, HOMES)
    stopped = list(fed.run(3))
    again = list(fed.run(ROUNDS - 2, stopped[1][0]))
    assert cases.everything(again[-1][0]) == cases.everything(whole[-1][0])
    assert [cases.untimed(r) for _, r in again] == [cases.untimed(r) for _, r in whole[2:]]


@pytest.mark.parametrize("back", [1, 3])
def test_a_server_that_goes_further_back_needs_nodes_that_keep_as_much(back: int) -> None:
    """With back=3 the model is the same to the bit, though plans may be sent twice; with back=1 the clients have
    lost what the server counts on, and begin anew."""
    make = maker("scaffold", cohort="all", downlink=cases.LOSSLESS)
    whole = list(make(examples=network.shared()).run(5))
    fed, streets = connected(make, HOMES)
    streets.nodes = [Node(node._fed, back=back) for node in streets.nodes]
    stopped = list(fed.run(4))
    again = list(fed.run(4, stopped[0][0]))
    same = cases.bits(again[-1][0].params) == cases.bits(whole[-1][0].params)
    lacked = events(again, "E313")
    assert {t for t, _, _ in lacked} == {1}
    assert same == (back == 3)
    assert all(("state after round 0" in why) == (back == 1) for _, _, why in lacked)


# ---- who is where


def test_clients_are_numbered_by_name_whatever_the_nodes() -> None:
    rolls = [
        Roll({"10": 3, "2": 4}, Roll.of(network.shared()).lamina),
        Roll({"1": 5}, Roll.of(network.shared()).lamina),
    ]
    assert list(register(rolls).items()) == [("1", 5), ("2", 4), ("10", 3)]
    words = [rolls[0]._replace(sizes={"b": 1, "a10": 2, "a2": 3})]
    assert list(register(words)) == ["a10", "a2", "b"]


def test_nodes_that_do_not_fit_are_refused() -> None:
    mine = Roll.of(network.shared())
    assert mine.sizes == cases.SIZES
    with pytest.raises(ConfigError, match=rf"lamina 9\.9, the server {mine.lamina}"):
        register([mine, Roll({"zoe": 1}, "9.9")])
    with pytest.raises(ConfigError, match="two nodes have a client 'ann'"):
        register([mine, mine])
    with pytest.raises(ConfigError, match="no node has a client"):
        register([])
    for blob in (b"", b"LMR1", mine.packed()[:-1], Roll({"a": -1}, "1").packed(), Answer("plan", 1, "").packed()):
        with pytest.raises(WireError):
            Roll.unpacked(blob)


def test_data_stands_among_the_names_of_all_clients() -> None:
    data = network.shared()
    some = data.subset([3, 1]).among(data.names)
    assert some.names == data.names
    assert some.here == [1, 3]
    assert some.sizes.tolist() == [0, 12, 0, 8, 0]
    for c in some.here:
        for mine, theirs in zip(some.examples(some.indices_of(c)), data.examples(data.indices_of(c)), strict=True):
            assert torch.equal(mine, theirs)
    with pytest.raises(DataError, match="'bob' is not among"):
        data.subset([1]).among(["ann", "cyd"])
    with pytest.raises(DataError):
        data.among([*data.names, "ann"])


def test_a_registry_knows_names_and_sizes() -> None:
    data = network.registry(network.shared())
    assert (data.names, data.sizes.tolist()) == (tuple(cases.SIZES), [*cases.SIZES.values()])
    assert data.here == []
    assert data.classes == 4  # those of the test set
    assert data.fingerprint != ClientData.registry({**cases.SIZES, "ann": 27}, test=data.test).fingerprint
    with pytest.raises(DataError, match="'b'"):
        ClientData.registry({"a": 1, "b": 0})
    with pytest.raises(DataError):
        ClientData.registry({})


def test_a_registry_without_a_test_set_tries_no_model() -> None:
    with pytest.warns(UserWarning, match="no example here"):
        fed = cases.federation(examples=ClientData.registry(cases.SIZES))
    assert fed.engine == "loop"


def test_a_servers_test_set_shows_that_a_model_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="fails on a batch"):
        Federation(torch.nn.Linear(3, 4), network.registry(network.shared()))


def test_what_needs_the_clients_own_tests_is_refused() -> None:
    streets = Streets([])
    with pytest.raises(ConfigError, match="client_tests"):
        over(cases.federation(), streets)
    with pytest.raises(ConfigError, match="accuracy_before"):
        over(cases.federation(examples=network.registry(network.shared()), accuracy_before=True), streets)
    with pytest.warns(UserWarning, match="personal models are with clients"):
        over(cases.case("personal", examples=network.registry(network.shared())), streets)


@pytest.mark.parametrize(
    ("faults", "code"),
    [
        ({"min_replies": 0}, "E112"),
        ({"min_replies": 4}, "E112"),
        ({"reply_deadline_s": 0}, "E101"),
        ({"reply_deadline": 3}, "E102"),
    ],
)
def test_impossible_faults_are_refused(faults: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cases.federation(faults=faults)
    assert caught.value.code == code
    assert cohort.Faults.of({"min_replies": 3}, 3) == cases.federation(faults={"min_replies": 3}).faults


# ---- what a server believes of a message


def expectations(fed: Federation, upload: Iterable[str] | None = None) -> tuple[Any, Plan, Expected]:
    plan = fed.method.plan(fed.method.init(fed.initial.params), fed._plan(*fed.initial, 1, 0.1, 3))
    if upload is not None:
        plan = plan.keep(upload)
    return fed._setup, plan, Expected.of(fed._setup, "round", plan)


def said(fed: Federation, plan: Plan, **changes: Any) -> Answer:
    """A right message of client 1, with changes to its update, trees and scalars."""
    from lamina.client import uplink_context

    upload = {name: torch.full_like(x, 0.5) for name, x in plan.params.items() if name in plan.upload}
    trees: dict[str, Any] = {"update": upload, "buffers": plan.buffers} | changes.get("trees", {})
    squares = {n: (x.double() ** 2).sum() for n, x in trees["update"].items()}
    trees = {"update": trees.pop("update"), **trees, "moments": changes.get("moments", squares)}
    blobs = {}
    for tree, content in trees.items():
        context = uplink_context(fed._setup, plan, 1) if tree == "update" else wire.Context(wire.schema_of(content))
        blobs[tree] = wire.Dense().encode(content, context)
    blobs = {tree: blob for tree, blob in blobs.items() if tree not in changes.get("without", ())}
    scalars = {"steps": 2.0, "loss": 1.0} | changes.get("scalars", {})
    return Answer("message", 1, "", changes.get("why", ""), frame.pack(frame.Frame("message", 1, 1, scalars, blobs)))


def test_a_message_is_read_as_the_plan_implies() -> None:
    fed = cases.federation(FedLAMA(phi=2))
    setup, plan, expected = expectations(fed)
    reply = message.read(setup, plan, expected, said(fed, plan))
    assert reply.refused is None
    assert reply.message.keys() == {"update", "buffers", "moments", "steps"}
    assert (reply.steps, reply.loss) == (2, 1.0)
    assert sum(size.total for size in reply.sizes.values()) == len(said(fed, plan).frame)


BAD: dict[str, tuple[Mapping[str, Any], str]] = {
    "a layer that was not asked for": ({"trees": {"update": {"conv.weight": torch.ones(4, 1, 3, 3)}}}, "not asked for"),
    "a tree too many": ({"trees": {"control": {"x": torch.ones(1)}}}, "expected"),
    "a tree too few": ({"without": ("buffers",)}, "expected"),
    "buffers of another shape": ({"trees": {"buffers": {"norm.running_mean": torch.ones(5)}}}, "schema"),
    "buffers that are missing": ({"trees": {"buffers": {"norm.running_mean": torch.ones(4)}}}, "schema"),
    "moments of other layers": ({"moments": {"head.bias": torch.ones((), dtype=torch.float64)}}, "schema"),
    "steps that it cannot have made": ({"scalars": {"steps": 200.0}}, "200 local steps"),
    "steps that are none": ({"scalars": {"steps": float("nan")}}, "local steps"),
    "a number too many": ({"scalars": {"lr": 1.0}}, "expected"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_message_that_the_plan_does_not_imply_is_refused(bad: str) -> None:
    changes, why = BAD[bad]
    fed = cases.federation(FedLAMA(phi=2))
    setup, plan, expected = expectations(fed, {"norm.weight", "head.weight", "head.bias"})
    with pytest.raises((WireError, message.Refused), match=why):
        message.read(setup, plan, expected, said(fed, plan, **changes))


NOT_FINITE: dict[str, tuple[Mapping[str, Any], str]] = {
    "update": ({"trees": {"update": {"head.bias": torch.full((4,), float("nan"))}}}, "head.bias"),
    "update with moments that are": (
        {
            "trees": {"update": {"head.bias": torch.full((4,), float("inf"))}},
            "moments": {"head.bias": torch.ones((), dtype=torch.float64)},
        },
        "head.bias",
    ),
    "moments": (
        {
            "trees": {"update": {"head.bias": torch.ones(4)}},
            "moments": {"head.bias": torch.tensor(float("inf"), dtype=torch.float64)},
        },
        "moments/head.bias",
    ),
    "loss": ({"scalars": {"loss": float("nan")}}, "loss"),
    "what it would remember": ({"why": "state/residual/x"}, "state/residual/x"),
}


@pytest.mark.parametrize("what", NOT_FINITE)
def test_values_that_are_not_finite_are_refused(what: str) -> None:
    changes, layer = NOT_FINITE[what]
    fed = cases.federation(FedLAMA(phi=2))
    setup, plan, expected = expectations(fed)
    reply = message.read(setup, plan, expected, said(fed, plan, **changes))
    assert (reply.refused, reply.code) == (layer, "E310")


@pytest.mark.parametrize("codec", cases.CODECS)
def test_no_right_message_is_too_long(codec: str) -> None:
    make = maker("fedprox, fedlama", uplink=cases.CODECS[codec])
    fed, _ = connected(make, HOMES)
    pairs = list(fed.run(2))
    assert not [event for _, record in pairs for event in record.events]


# ---- letters


def test_a_letter_is_what_was_packed() -> None:
    shared = {"control": {"a.weight": wire.Spec((2, 3), torch.float32), "n": wire.Spec((), torch.int64)}}
    letter = Letter("round", 3, 7, "f" * 32, ("a.weight", "b"), shared, True, b"frame", "0" * 16)
    assert Letter.unpacked(letter.packed()) == letter
    answer = Answer("message", 3, "f" * 32, "", b"frame", (Member(3, 2, 0.5), Member(4, 1, 1.0)), {"seed": "1"})
    assert Answer.unpacked(answer.packed()) == answer
    for blob in (letter.packed(), answer.packed()):
        for at in range(len(blob) - len(b"frame")):
            broken = blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :]
            with pytest.raises(WireError):
                (Letter if blob[:4] == b"LML1" else Answer).unpacked(broken)


def test_a_node_says_what_it_cannot_answer() -> None:
    fed, streets = connected(maker("fedavg", cohort="all"), HOMES)
    sent: list[tuple[int, bytes]] = []
    send = streets.send

    def noted(letters: Iterable[tuple[int, bytes]], most: int) -> None:
        sent.extend(letters)
        send(sent, most)

    streets.send = noted  # type: ignore[method-assign]
    next(fed.run(1))
    node = streets.nodes[0]
    letters = dict(sent)
    wrong = [
        (0, b"no letter"),
        (0, letters[3]),
        (1, letters[1]),
        (0, Letter.unpacked(letters[0])._replace(kind="personal").packed()),
        (0, Letter.unpacked(letters[0])._replace(frame=b"no frame").packed()),
    ]
    answers = [Answer.unpacked(blob) for _, blob in node.answer(wrong)]
    assert [a.said for a in answers] == ["failed"] * 5
    other = Letter.unpacked(letters[0])._replace(fingerprint="0" * 32)
    ((_, blob),) = node.answer([(0, other.packed())])
    assert Answer.unpacked(blob).said == "plan"
    assert not any(Answer.unpacked(blob).frame for _, blob in node.answer(wrong))


def test_a_letter_that_is_too_long_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 times the tiny model, with room for names: what no plan needs."""
    _, streets = connected(maker("fedavg"), HOMES)
    node = streets.nodes[0]
    monkeypatch.setattr("lamina.remote.envelope.json.loads", lambda text: pytest.fail("it was looked at"))
    ((client, blob),) = node.answer([(0, b"LML1" + bytes(node.longest))])
    monkeypatch.undo()
    answer = Answer.unpacked(blob)
    assert (client, answer.said) == (0, "failed")
    assert f"E340 {node.longest + 4} bytes" in answer.why


def test_what_fails_at_a_client_is_told_to_the_server() -> None:
    class Failing(Method[tuple[()], tuple[()]]):
        def begin(self, client: tuple[()], plan: Plan, params: Any) -> Any:
            if plan.round == 1:
                raise ArithmeticError("no such number")
            return params

    fed, _ = connected(lambda **options: cases.federation(Failing(), cohort="all", **options), HOMES)
    with pytest.raises(RunError, match=r"every message was refused.*E304 ArithmeticError: no such number") as caught:
        list(fed.run(2))
    assert caught.value.code == "E311"


# ---- settings that differ


OTHER: dict[str, tuple[dict[str, Any], str]] = {  # what the nodes' federation has of its own, and what is said
    "seed": ({"seed": 8}, "seed 8 at its node, {seed} here"),
    "method": ({"method": FedLAMA(phi=2)}, "method FedLAMA(phi=2, warmup=0) at its node, FedAvg() here"),
    "uplink": ({"uplink": wire.Dense("int8")}, "uplink Dense"),
    "downlink": ({"downlink": wire.Dense("lossless")}, "downlink Dense"),
    "local": ({"local": LocalSGD(lr=0.3)}, "local LocalSGD(lr=0.3"),
    "weights": ({"weights": "uniform"}, "weights uniform at its node, examples here"),
    "cohort": ({"cohort": 2}, "cohort 2 of 5 at its node, 5 of 5 here"),
    "diagnostics": ({"diagnostics": False}, "moments False at its node, True here"),
}


def with_other(mine: dict[str, Any], homes: Sequence[Sequence[int]]) -> tuple[Federation, Streets]:
    """The nodes of these clients have settings of their own."""

    def make(**options: Any) -> Federation:
        method = options.pop("method", None) or FedAvg()
        return cases.federation(method, **{"cohort": "all"} | options)

    fed, streets = connected(make, HOMES)
    data = network.shared()
    for home in homes:
        examples = replace(data.subset(home), test=None, check=False).among(data.names)
        streets.nodes[HOMES.index(tuple(home))] = Node(make(examples=examples, **mine))
    return fed, streets


@pytest.mark.parametrize("name", OTHER)
def test_a_node_with_other_settings_is_refused_with_both_named(name: str) -> None:
    mine, said = OTHER[name]
    fed, streets = with_other(mine, HOMES[:1])
    pairs = list(fed.run(2))
    refused = events(pairs, "E323")
    assert {(t, client) for t, client, _ in refused} == {(t, fed.data.names[c]) for t in (0, 1) for c in HOMES[0]}
    for _, _, why in refused:
        assert why.startswith("it has other settings: ")
        assert said.format(seed=fed.seed) in why
        assert why.count(" at its node, ") == 1 + (name == "seed")  # another seed draws other frozen values, too
    assert not streets.nodes[0].shelf.counts()


def test_a_node_with_other_frozen_values_is_refused() -> None:
    """Nobody sends them, so nothing else would tell."""
    fed, streets = with_other({}, ())
    data = network.shared()
    other = cases.federation(
        FedAvg(), cohort="all", examples=replace(data.subset(HOMES[0]), test=None).among(data.names)
    )
    other._trainer.frozen["frozen.weight"].add_(1e-3)
    streets.nodes[0] = Node(other)
    refused = events(list(fed.run(1)), "E323")
    assert {client for _, client, _ in refused} == {fed.data.names[c] for c in HOMES[0]}
    assert all(f"frozen {other.frozen} at its node, {fed.frozen} here" in why for _, _, why in refused)


def test_a_run_whose_nodes_all_have_other_settings_fails_and_says_so() -> None:
    fed, _ = with_other({"seed": 8}, HOMES)
    with pytest.raises(RunError, match=r"every message was refused.*seed 8 at its node") as caught:
        list(fed.run(1))
    assert caught.value.code == "E323"


def test_machines_may_differ_in_engine_store_and_faults(tmp_path: Path) -> None:
    make = maker("fedavg")
    plain = terms.terms_of(make())
    other = make(engine="loop", store=f"disk:{tmp_path}", faults={"min_replies": 1}, through_bytes=True)
    assert terms.terms_of(other) == plain


def test_terms_are_the_same_in_every_process() -> None:
    """A function is at another address in each."""

    def made() -> Federation:
        return cases.federation(FedAvg(), local=LocalSGD(schedule=lambda round, rounds: 1.0))

    (first, second) = (terms.terms_of(made()) for _ in range(2))
    assert terms.stamp(first) == terms.stamp(second)
    assert " at 0x" not in str(first)


@pytest.mark.parametrize(
    "wrong", [{"seed": 1}, {"x" * 501: ""}, {"x": "y" * 501}, dict.fromkeys(map(str, range(33)), "")]
)
def test_terms_that_are_none_are_no_answer(wrong: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        Answer.unpacked(Answer("terms", 3, "f" * 32, "", b"", (), wrong).packed())


# ---- engines and runs


@pytest.mark.parametrize("engine", ["processes", "stacked"])
def test_a_node_trains_with_this_machines_engine(engine: str) -> None:
    def make(**options: Any) -> Federation:
        return cases.federation(FedLAMA(phi=2), "double", cohort="all", **options | {"engine": engine, "workers": 2})

    data = network.shared(torch.float64)
    local = list(cases.federation(FedLAMA(phi=2), "double", data, cohort="all").run(3))
    fed, streets = connected(make, HOMES, data=data)
    pairs = list(fed.run(3))
    for node in streets.nodes:
        assert getattr(node._engine, "name", None) == engine
        node.close()
    assert pairs[-1][0].bytes_up == local[-1][0].bytes_up
    for name, x in local[-1][0].params.items():
        torch.testing.assert_close(pairs[-1][0].params[name], x, rtol=0, atol=1e-9 if engine == "stacked" else 0)


def test_a_run_over_a_network_has_a_folder_and_is_resumed(tmp_path: Path) -> None:
    from lamina.runs import Run, resume

    make = maker("fedlama, scaffold")
    expected = list(make(examples=network.shared()).run(4))[-1][0]
    fed, streets = connected(make, HOMES, faults={"min_replies": 3})
    client = drawn(fed, 2)[0]
    Weather(streets, client, 2, lost)
    with pytest.raises(RunError, match="messages were accepted"):
        fed.fit(4, tmp_path / "run", progress=False, checkpoint_every=1)
    streets.happens = lambda client, blob: [(client, blob)]
    run = resume(tmp_path / "run", fed=fed, progress=False)
    assert isinstance(run, Run)
    assert run.state.sha256() == expected.sha256()
    assert run.info["engine"] == "remote"


def test_a_lost_answer_is_told_while_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fed, streets = connected(maker("fedavg", cohort="all"), HOMES)
    Weather(streets, 2, 1, lost)
    run = fed.fit(2, tmp_path / "run", progress=False)
    assert run.info["status"] == "done"
    assert "round 1: client cyd: its node is away: no answer" in capsys.readouterr().err


# ---- one node, many clients


RAW = [name for name in cases.ALL if "uplink" not in cases.OPTIONS.get(name, {})]


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("weights", ["examples", "uniform"])
@pytest.mark.filterwarnings("ignore:personal models are with clients:UserWarning")
@pytest.mark.filterwarnings(r"ignore:.* plans \d+ rounds, this run has \d+:UserWarning")
def test_the_messages_of_a_node_together_give_the_same_model_to_rounding(name: str, weights: str) -> None:
    """In float64: 1e-9 is far above rounding and far below what one message counted wrongly would change."""
    model = {} if "personal" in name or name == "localonly" else {"model": "double"}
    data = network.shared(torch.float64 if model else None)
    make = maker(name, cohort="all", weights=weights, **model)
    local = list(make(examples=data).run(3))
    fed, _ = connected(make, HOMES, data=data, together=True)
    pairs = list(fed.run(3))
    for layer, x in local[-1][0].params.items():
        torch.testing.assert_close(pairs[-1][0].params[layer], x, rtol=0, atol=1e-9 if model else 1e-5)
    for (_, record), (_, alone) in zip(pairs, local, strict=True):
        assert [c[:4] for c in record.clients] == [c[:4] for c in alone.clients]
        assert [c.refused for c in record.clients] == [None] * 5
        assert record.bytes_down == alone.bytes_down
        up = [c.bytes_up for c in alone.clients]
        votes = any(row.layer == "_votes" for row in alone.traffic)  # of which there is no mean to send
        assert [c.bytes_up for c in record.clients] == (up if votes else [0, up[1], 0, up[3], 0])


def test_who_is_refused_is_left_out_of_what_its_node_sends_together() -> None:
    """ "dan" diverges in round 1: its node sends the message of "ann", and that of "dan" beside it."""

    def make(**options: Any) -> Federation:
        return cases.federation(Diverging(), "double", cohort="all", **options)

    data = network.shared(torch.float64)
    local = list(make(examples=data).run(ROUNDS))
    fed, streets = connected(make, HOMES, data=data, together=True)
    pairs = list(fed.run(ROUNDS))
    assert [t for t, name, _ in events(pairs, "E310") if name == "dan"] == [1, 2]
    for layer, x in local[-1][0].params.items():
        torch.testing.assert_close(pairs[-1][0].params[layer], x, rtol=0, atol=1e-9)
    assert network.rows(pairs[-1][0], streets.nodes).keys() == {0, 1, 2, 3, 4}


def test_messages_that_are_coded_are_not_taken_together() -> None:
    with pytest.raises(ConfigError, match="together=True with uplink=Dense"):
        connected(maker("fedavg", uplink=wire.Dense("int8")), HOMES, together=True)


TOGETHER: dict[str, tuple[Callable[[Answer], Answer], str]] = {
    "a client twice": (lambda a: a._replace(members=(*a.members, a.members[-1])), "twice"),
    "a client of another node": (lambda a: a._replace(members=(*a.members, Member(9, 4, 1.0))), "not asked"),
    "steps that nobody made": (
        lambda a: a._replace(members=(a.members[0]._replace(steps=9), *a.members[1:])),
        "9 local steps",
    ),
}


@pytest.mark.parametrize("wrong", TOGETHER)
def test_a_wrong_message_of_several_clients_is_refused(wrong: str) -> None:
    change, why = TOGETHER[wrong]
    fed, streets = connected(maker("fedavg", cohort="all"), HOMES, together=True)

    def happens(client: int, blob: bytes) -> list[tuple[int, bytes | Lost]]:
        answer = Answer.unpacked(blob)
        return [(client, change(answer).packed() if len(answer.members) == 3 else blob)]

    streets.happens = happens
    ((_, record),) = fed.run(1)
    refused = {c.client: c.refused for c in record.clients}
    assert {refused[0], refused[3]} == {None}
    assert {refused[1], refused[2], refused[4]} <= {"E311", "E314", "E330"}
    assert any(why in event["why"] for event in record.events)


def test_a_letter_that_comes_twice_is_answered_once_a_batch() -> None:
    fed, streets = connected(maker("scaffold", cohort="all"), HOMES)
    expected = list(fed.run(2))
    fed, streets = connected(maker("scaffold", cohort="all"), HOMES)
    send = streets.send
    streets.send = lambda letters, most: send([letter for letter in letters for _ in range(2)], most)  # type: ignore[method-assign]
    pairs = list(fed.run(2))
    assert [cases.untimed(r) for _, r in pairs] == [cases.untimed(r) for _, r in expected]
    assert cases.everything(pairs[-1][0]) == cases.everything(expected[-1][0])


def test_a_server_may_put_its_own_plans_through_bytes_too() -> None:
    make = maker("fedlama, scaffold", downlink=cases.LOSSLESS)
    expected = list(connected(make, HOMES)[0].run(3))
    pairs = list(connected(make, HOMES, through_bytes=True)[0].run(3))
    assert [cases.untimed(r) for _, r in pairs] == [cases.untimed(r) for _, r in expected]


def test_nobody_answers_for_others_unasked() -> None:
    fed, streets = connected(maker("fedavg", cohort="all"), HOMES)
    members = (Member(1, 2, 1.0), Member(2, 3, 1.0), Member(4, 4, 1.0))
    Weather(streets, 1, 0, lambda blob: [Answer.unpacked(blob)._replace(members=members).packed()])
    ((_, record),) = fed.run(1)
    assert [c.refused for c in record.clients] == [None, "E330", None, None, None]


def test_a_bundle_has_equal_plans_once() -> None:
    sections = {"params": bytes(range(256)) * 400, "upload": b"\1"}
    letters = []
    for client in range(5):
        plan = frame.pack(frame.Frame("plan", 3, client, {"accepted": float(client)}, sections))
        letters.append((client, Letter("round", client, 3, "f" * 32, (), {}, False, plan).packed()))
    blob = bundled(letters)
    assert len(blob) < len(letters[0][1]) + 1500
    assert list(unbundled(blob)) == letters
    assert list(unbundled(bundled([]))) == []
    odd = [(1, b""), (2, b"LML1"), (3, letters[0][1][:40])]
    assert list(unbundled(bundled(odd))) == odd
    with pytest.raises(WireError, match="E340"):
        unbundled(blob, max_bytes=1000)
    for broken in (b"", blob[:-1], blob + b"\0", letters[0][1], blob[:30] + b"x" + blob[31:]):
        with pytest.raises(WireError):
            unbundled(broken)
