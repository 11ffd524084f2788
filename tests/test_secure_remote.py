"""Secure sums with clients that are elsewhere: the sum is the simulation's to the bit, whoever drops out at whatever
step; no client says what would show its update, whatever it is asked; and nothing is left of its secrets."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cases
import network
from lamina import ConfigError, FedAvg, Federation, Method, Plan, RunError, SecureSum, WireError, Work, wire
from lamina.privacy import protocol
from lamina.privacy.fixed import low
from lamina.privacy.keys import KEY, Pair
from lamina.privacy.protocol import Client, Held, read_table, table
from lamina.privacy.shamir import SHARE
from lamina.remote import Answer, AtNode, AtServer, FileVault, Letter, Lost, MemoryShelf, Node, over
from lamina.remote.envelope import LONGEST_REASON, Step, sections_at
from lamina.remote.keys import Shared
from lamina.remote.masking import Masking, Turn, _Open
from lamina.remote.vault import Kept, MemoryVault
from lamina.tree import Message
from lamina.wire import frame
from network import Streets, connected
from test_remote import drawn, events, once, without

pytest.importorskip("cryptography")

HOMES = ((0, 3), (1, 2, 4))
ROUNDS = 3
STEPS = ("keys", "shares", "masked", "unmask")
NAMES = network.shared().names


def maker(name: str = "fedavg", **settings: Any) -> Callable[..., Federation]:
    """bits=32, threshold=0.6: three of five clients are needed."""
    fixed = {"buffers": "keep", "secure": SecureSum(), "cohort": "all", **settings}
    return lambda **options: cases.case(name, **fixed | options)


def small(**settings: Any) -> Callable[..., Federation]:
    fixed = {"secure": SecureSum(), "cohort": "all", **settings}
    return lambda **options: cases.federation(FedAvg(), "small", **fixed | options)


class Post:
    """Streets on which letters and answers may be changed. What was on them is in `letters` and `answers`."""

    def __init__(self, streets: Streets):
        self.letters: list[Letter] = []
        self.answers: list[Answer] = []
        self.on_the_way: Callable[[Letter], Iterable[Letter]] = lambda letter: [letter]
        self.on_the_way_back: Callable[[Answer], Iterable[Answer | bytes | Lost]] = lambda answer: [answer]
        self.nodes = streets.nodes
        self._send = streets.send
        streets.send = self._sent  # type: ignore[method-assign]
        streets.happens = self._happens

    def _sent(self, letters: Iterable[tuple[int, bytes]], most: int) -> None:
        for client, blob in letters:
            for letter in self.on_the_way(_own(Letter.unpacked(blob))):
                self.letters.append(letter)
                self._send([(client, letter.packed())], most)

    def _happens(self, client: int, blob: bytes) -> list[tuple[int, bytes | Lost]]:
        self.answers.append(Answer.unpacked(blob))
        came = self.on_the_way_back(Answer.unpacked(blob))
        return [(client, what.packed() if isinstance(what, Answer) else what) for what in came]


def _own(letter: Letter) -> Letter:
    step = letter.step
    return letter._replace(frame=bytes(letter.frame), step=step and step._replace(frame=bytes(step.frame)))


def posted(make: Callable[..., Federation], homes: Any = HOMES, **more: Any) -> tuple[Federation, Post]:
    fed, streets = connected(make, homes, **more)
    return fed, Post(streets)


def of_step(answer: Answer, client: int, step: str, round: int = 0) -> bool:
    there = not answer.frame or frame.unpack(answer.frame).round == round
    return (answer.client, answer.step) == (client, step) and there


def changed(letter: Letter, section: str, change: Callable[[bytes], bytes]) -> Letter:
    """With another content of its step."""
    assert letter.step is not None
    said = frame.unpack(letter.step.frame)
    again = said._replace(sections={section: change(said.sections[section])})
    return letter._replace(step=letter.step._replace(frame=frame.pack(again)))


def losing(post: Post, client: int, step: str, round: int = 0) -> None:
    gone = [Lost("its node is away")]
    post.on_the_way_back = lambda answer: gone if of_step(answer, client, step, round) else [answer]  # type: ignore[assignment,return-value]


# ---- the sum is the simulation's


METHODS = ("fedavg", "ssfl, fedlama", "scaffold", "fedluar", "personal, fedlama", "fedadam")


@pytest.mark.parametrize("name", cases.the_rest_slowly(METHODS, METHODS[:2]))
@pytest.mark.parametrize("cohort", ["all", 4])
@pytest.mark.filterwarnings("ignore:personal models are with clients:UserWarning")
@pytest.mark.filterwarnings(r"ignore:.* plans \d+ rounds, this run has \d+:UserWarning")
def test_model_ledger_and_states_are_those_of_the_simulation(name: str, cohort: int | str) -> None:
    make = maker(name, cohort=cohort)
    local = list(make(examples=network.shared()).run(ROUNDS))
    fed, streets = connected(make, HOMES)
    pairs = list(fed.run(ROUNDS))
    for (_, mine), (_, theirs) in zip(pairs, local, strict=True):
        assert mine.traffic == theirs.traffic
        assert mine.clients == theirs.clients
        unseen = {n: layer._replace(residual_norm=None) for n, layer in theirs.layers.items()}
        assert mine.layers == unseen
        assert not mine.events
    found = cases.everything(pairs[-1][0]) | {"rows": network.rows(pairs[-1][0], streets.nodes)}
    assert found == cases.everything(local[-1][0])


@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_it_is_close_to_the_plain_mean(weights: str) -> None:
    """bits=32, limit=16, 5 clients: an entry is a multiple of 2^-f with f = 24, the largest for which five times
    16 * 2^f + 1 is below 2^31. So each client is off by at most 2^-25, and so is their weighted mean, whose weights are
    at most 1 to the largest: 5 * 2^-25 at worst."""
    fed, _ = connected(small(weights=weights), HOMES)
    (hidden, _), *_ = fed.run(1)
    (plain, _), *_ = small(weights=weights, secure=None)(examples=network.shared()).run(1)
    for name, x in plain.params.items():
        assert float((hidden.params[name] - x).abs().max()) <= 5 * 2**-25 + 2**-23  # and float32's own rounding
    assert hidden.sha256() != plain.sha256()


def test_every_byte_on_the_street_is_in_the_ledger() -> None:
    """Frames are counted, heads are not. A plan that is sent twice is, and so is what of a step goes with it."""
    fed, post = posted(small())
    losing(post, 2, "masked", 1)
    run = fed.run(ROUNDS)
    for t in range(ROUNDS):
        if t == 2:
            post.nodes[0].shelf = MemoryShelf()
        before = len(post.letters), len(post.answers)
        _, record = next(run)
        down = sum(len(x.frame) + len(x.step.frame) for x in post.letters[before[0] :] if x.step is not None)
        lost = [x for x in post.answers[before[1] :] if of_step(x, 2, "masked", 1)]
        up = sum(len(x.frame) for x in post.answers[before[1] :]) - sum(len(x.frame) for x in lost)
        assert len(lost) == (t == 1)
        assert (record.bytes_down, record.bytes_up) == (down, up)
        assert record.bytes_down == sum(c.bytes_down for c in record.clients)
        assert len(events([(None, record)], "E313")) == 2 * (t == 2)


# ---- drop-outs


@pytest.mark.parametrize("step", STEPS)
def test_the_sum_is_that_of_who_is_left(step: str) -> None:
    """Client 2 is lost at one step of round 1. Before its message is in the sum, the model is that of a simulation in
    which it is; after that it is in it, and nobody needs it any more."""
    missing = set() if step == "unmask" else {(1, 2)}
    local = list(without(small()(examples=network.shared()), missing).run(ROUNDS))
    fed, post = posted(small())
    losing(post, 2, step, 1)
    pairs = list(fed.run(ROUNDS))
    assert [s.sha256() for s, _ in pairs] == [s.sha256() for s, _ in local]
    refused = {(r.round, c.client) for _, r in pairs for c in r.clients if c.refused}
    assert refused == missing
    if missing:
        assert once(pairs, "E311", 1, 2) == "its node is away"
    rows = {(t.direction, t.layer): t.bytes for t in pairs[1][1].traffic}
    reached = STEPS.index(step)  # what it was sent and what it said until then
    n, asked = 5, [c for c in range(5) if c != 2]
    in_roster, in_shares = (n, n) if reached > 1 else (n, n - 1) if reached == 1 else (n - 1, n - 1)
    assert rows["up", "_keys"] == (n - (reached == 0)) * (96 + 33)
    assert rows["down", "_keys"] == in_roster * (in_roster * 68 + frame.overhead("plan", {}, {"keys": in_roster * 68}))
    assert len(asked) + 1 == n
    down = {c.client: c.bytes_down for c in pairs[1][1].clients}
    others = {down[c] for c in asked}
    assert len(others) == 1
    if step in ("keys", "shares"):  # it was not sent the plan, and still holds the one from before
        assert down[2] < 500
        assert {c.bytes_down for c in pairs[2][1].clients} == {
            min(others) + (pairs[2][1].clients[0].bytes_down - min(others))
        }
    assert rows["down", "_shares"] <= in_shares * (86 * (in_shares - 1) + 60)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_below_the_threshold_a_round_fails_with_one_error(step: str, policy: str) -> None:
    """Three of five are gone; three are needed."""
    fed, post = posted(small(), faults={"on_quorum": policy})
    gone = [Lost("a storm")]
    post.on_the_way_back = lambda x: gone if x.client in (1, 2, 4) and x.step == step and x.frame else [x]  # type: ignore[assignment,return-value]
    before = fed.initial.params
    run = fed.run(2)
    if policy == "fail":
        with pytest.raises(RunError, match=r"clients (were|are) left") as caught:
            next(run)
        assert caught.value.code == "E307"
        return
    state, record = next(run)
    assert all(torch.equal(state.params[name], x) for name, x in before.items())
    codes = {c.client: c.refused for c in record.clients}
    lost = "E307" if step == "unmask" else "E311"
    assert codes == {0: "E307", 3: "E307", 1: lost, 2: lost, 4: lost}
    assert any(event["code"] == "E306" for event in record.events)
    assert (record.bytes_down > 5 * 1000) == (step in ("masked", "unmask"))  # else nobody was sent the plan
    post.on_the_way_back = lambda answer: [answer]
    state, record = next(run)  # and all goes on
    assert not [c for c in record.clients if c.refused]
    expected = small()(examples=network.shared())
    (after, _), *_ = expected.run(1)
    if step in ("keys", "shares"):
        assert record.bytes_up == next(iter(small()(examples=network.shared()).run(1)))[1].bytes_up
    assert state.round == 2
    assert after.round == 1


def test_every_step_has_the_whole_deadline() -> None:
    """1 s each; each answer of round 0 takes 0.15 s, so that five make 0.75 s, and twenty 3 s."""
    now = [0.0]
    made = small()
    nodes = [
        Node(made(examples=replace(network.shared().subset(h), test=None, check=False).among(NAMES))) for h in HOMES
    ]
    streets = Streets(nodes)
    receive, asked = streets.receive, []

    def slow(timeout_s: float | None) -> Any:
        asked.append(timeout_s)
        now[0] += 0.15
        return receive(timeout_s)

    streets.receive = slow  # type: ignore[method-assign]
    faults = {"reply_deadline_s": 1.0}
    fed = over(made(examples=network.registry(network.shared()), faults=faults), streets, clock=lambda: now[0])
    (_, record), *_ = fed.run(1)
    assert not [c for c in record.clients if c.refused]
    assert now[0] > 2.5
    assert len([t for t in asked if t == pytest.approx(1.0)]) == 4


def test_who_is_silent_at_a_step_is_waited_for_until_its_deadline() -> None:
    fed, post = posted(small(), faults={"reply_deadline_s": 0.1})
    post.on_the_way_back = lambda answer: [] if of_step(answer, 2, "masked") else [answer]
    (_, record), *_ = fed.run(1)
    assert once([(None, record)], "E311", 0, 2).startswith("no answer")


class Diverging(Method[tuple[()], tuple[()]]):
    """Of one client an update that is not finite, of another one that is too large."""

    def report(self, client: tuple[()], plan: Plan, work: Work, said: Message) -> tuple[Message, tuple[()]]:
        factor = {1: float("nan"), 2: 1e6}.get(int(work.steps), 1.0)
        return said | {"update": {name: x * factor for name, x in said["update"].items()}}, client


def test_who_has_nothing_to_send_leaves_itself_out_as_in_the_simulation() -> None:
    def make(**options: Any) -> Federation:
        fixed: dict[str, Any] = {"secure": SecureSum(threshold=0.51), "cohort": "all", "faults": {"on_quorum": "skip"}}
        return cases.federation(Diverging(), "small", **fixed | options)

    local = list(make(examples=network.shared()).run(2))
    fed, post = posted(make)
    pairs = list(fed.run(2))
    codes = [c.refused for c in local[0][1].clients]
    assert {"E310", "E319"} <= {*codes}
    for (_, mine), (_, theirs) in zip(pairs, local, strict=True):
        assert [(c.client, c.refused, c.steps, c.bytes_up) for c in mine.clients] == [
            (c.client, c.refused, c.steps, c.bytes_up) for c in theirs.clients
        ]
        assert mine.events == theirs.events
    assert pairs[-1][0].sha256() == local[-1][0].sha256()
    left = [x for x in post.answers if x.said == "out"]
    assert {x.code for x in left} == {"E310", "E319"}
    assert not any(x.frame for x in left)


# ---- what the server sees


def test_no_message_in_the_clear_is_ever_sent() -> None:
    """Every section of what is masked is an encoding of ring elements whose bytes are uniform, and of one client alone
    they are not what the others' sum leaves of it."""
    fed, post = posted(small())
    list(fed.run(2))
    masked = [x for x in post.answers if x.step == "masked"]
    assert len(masked) == 10
    assert {x.step for x in post.answers} == {*STEPS}
    for answer in masked:
        arrived = frame.unpack(answer.frame)
        assert arrived.scalars.keys() == {"steps"}
        assert {*arrived.sections} == {"update", "moments", "loss"}
        entries = np.frombuffer(arrived.sections["update"][-4 * 400 :], np.uint8)
        counts = np.bincount(entries, minlength=256)
        assert ((counts - len(entries) / 256) ** 2 / (len(entries) / 256)).sum() < 400
    assert not any(x.members or x.why for x in post.answers)


def test_of_each_client_the_server_is_given_one_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Held, bytes, bytes]] = []
    unmask = Held.unmask

    def spied(self: Held, came: bytes) -> bytes:
        given.append((self, came, unmask(self, came)))
        return given[-1][2]

    monkeypatch.setattr(Held, "unmask", spied)
    fed, post = posted(small())
    losing(post, 2, "masked", 0)
    list(fed.run(1))
    assert {held.who for held, _, _ in given} == {0, 1, 3, 4}
    for held, came, answer in given:
        there = {*read_table(came, 0)}
        assert there == {0, 1, 3, 4}
        assert read_table(answer, SHARE) == {c: held.shares[c][c in there] for c in range(5)}


# ---- a server that is not what it should be


def both_lists(letter: Letter) -> list[Letter]:
    """Asked once more, with a list on which client 0 is not."""
    return [letter, changed(letter, "unmask", lambda came: table(dict.fromkeys([1, 2, 3, 4], b"")))]


def told(
    section: str, change: Callable[[dict[int, bytes]], dict[int, bytes]], width: int
) -> Callable[..., list[Letter]]:
    return lambda letter: [changed(letter, section, lambda said: table(change(read_table(said, width))))]


def said(**changes: Any) -> Callable[..., list[Letter]]:
    return lambda letter: [letter._replace(step=letter.step._replace(**changes))]


def as_step(name: str) -> Callable[..., list[Letter]]:
    """The step comes before its time."""

    def change(letter: Letter) -> list[Letter]:
        content = {"unmask": table(dict.fromkeys(range(5), b""))}
        framed = frame.pack(frame.Frame("plan", letter.round, letter.client, {}, content))
        return [letter._replace(frame=b"", step=Step(name, framed, 5, 1.0))]

    return change


def other_key(keys: dict[int, bytes]) -> dict[int, bytes]:
    """The server's own keys in place of those that client 2 said."""
    return keys | {2: Pair().public + Pair().public}


HOSTILE: dict[str, tuple[str, Callable[[Letter], Iterable[Letter]], str]] = {
    "both secrets of one client": ("unmask", both_lists, "is over"),
    "unmasking before there is a message": ("masked", as_step("unmask"), "'masked' is what comes next"),
    "a sum without it": (
        "unmask", told("unmask", lambda came: {c: x for c, x in came.items() if c != 2}, 0), "that it is not in"
    ),
    "a sum with a stranger": ("unmask", told("unmask", lambda came: came | {9: b""}, 0), "not there for the shares"),
    "a sum of two": ("unmask", told("unmask", lambda came: {2: b"", 3: b""}, 0), "a sum of 2 clients, 3 are needed"),
    "a list without its keys": (
        "shares", told("keys", lambda keys: {c: x for c, x in keys.items() if c != 2}, 64), "does not have its own"
    ),
    "other keys for its own": ("shares", told("keys", other_key, 64), "does not have its own"),
    "its own keys for another": ("shares", told("keys", lambda keys: keys | {3: keys[2]}, 64), "one twice"),
    "one key for two others": ("shares", told("keys", lambda keys: keys | {3: keys[4]}, 64), "one twice"),
    "keys of two alone": ("shares", told("keys", lambda keys: {2: keys[2], 3: keys[3]}, 64), "a list of 2 keys"),
    "keys of a client that is none": (
        "shares", told("keys", lambda keys: {2: keys[2], 3: keys[3], 77: keys[4]}, 64), "has client 77, there are 5"
    ),
    "keys of one more than were asked": (
        "shares", told("keys", lambda keys: {**keys, 5: Pair().public + Pair().public}, 64), "a list of 6 keys"
    ),
    "keys that are none": ("shares", told("keys", lambda keys: keys | {3: bytes(32) + bytes([1]) + bytes(31)}, 64), ""),
    "half a list": ("shares", lambda x: [changed(x, "keys", lambda keys: keys[:-1])], "a table of"),
    "fewer that were asked": ("shares", said(asked=2), "2 clients were asked, expected 3 to 5"),
    "more that were asked": ("shares", said(asked=500), "500 clients were asked"),
    "a weight beyond 1": ("shares", said(largest=0.5), "a largest weight of 0.5"),
    "a weight of nothing": ("shares", said(largest=float("inf")), "a largest weight of inf"),
    "another number than the others": ("shares", said(asked=4), "list of 5 keys"),
    "another plan than the others": ("shares", lambda x: [x._replace(fingerprint="f" * 32)], "another sum"),
    "no shares": ("masked", told("shares", lambda shares: {}, 82), "1 clients, 3 are needed: the others are not there"),
    "shares of a stranger": ("masked", told("shares", lambda x: {**x, 9: x[3]}, 82), "not on the list of keys"),
    "shares that were changed": (
        "masked", told("shares", lambda x: {c: bytes(82) for c in x}, 82), "4 shares are not what was sealed"
    ),
    "a message in the clear": ("masked", lambda x: [x._replace(step=None)], "a message in the clear"),
    "a message in the clear at once": ("keys", lambda x: [x._replace(step=None)], "a message in the clear"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_client_does_not_take_a_step_that_would_show_it(what: str) -> None:
    """Client 2 alone is asked wrongly. It says E336 and nothing else; the others' sum goes on without it."""
    step, change, why = HOSTILE[what]
    fed, post = posted(small())
    post.on_the_way = lambda x: change(x) if x.client == 2 and x.step is not None and x.step.name == step else [x]
    before = len(post.answers)
    (state, record), *_ = fed.run(1)
    own = [x for x in post.answers[before:] if x.client == 2]
    refusals = [x for x in own if x.code == "E336" or (what.startswith("half") and x.said == "failed")]
    assert len(refusals) == 1, own
    assert not refusals[0].frame
    assert why in refusals[0].why
    assert len([x for x in own if x.step == "unmask" and x.frame]) == (what == "both secrets of one client")
    in_the_sum = step == "unmask"
    expected = without(small()(examples=network.shared()), set() if in_the_sum else {(0, 2)})
    (local, _), *_ = expected.run(1)
    assert state.sha256() == local.sha256()
    told_of = [e for e in record.events if e["client"] == NAMES[2]]
    assert [e["code"] for e in told_of if e["code"] != "E332"] == (
        [] if what.startswith("both") else [told_of[0]["code"]]
    )


def test_a_server_that_tells_one_client_of_another_weight_has_no_sum() -> None:
    """With a weight that is next to nothing for all but one, the sum would be that one's update. Here one is told that
    the largest weight is 10^6: its shares open for nobody, and nobody's for it."""
    fed, post = posted(small())
    other = said(largest=1e6)
    post.on_the_way = lambda x: other(x) if x.client == 2 and x.step is not None and x.step.name == "shares" else [x]
    with pytest.raises(RunError, match="0 clients have a share of client 2's secret, 3 are needed") as caught:
        list(fed.run(1))
    assert caught.value.code == "E307"
    (refusal,) = [x for x in post.answers if x.code == "E336"]
    assert refusal.client == 2
    assert "1 clients, 3 are needed: 4 shares are not what was sealed for it" in refusal.why


def test_a_node_without_sums_takes_no_step_and_a_server_without_has_no_answer() -> None:
    """Their settings differ: E323, before anything else; and where terms are not said, E336."""
    for mine, theirs in ((SecureSum(), None), (None, SecureSum())):
        nodes = [
            Node(
                small(secure=theirs)(examples=replace(network.shared().subset(h), test=None, check=False).among(NAMES))
            )
            for h in HOMES
        ]
        streets = Streets(nodes)
        fed = over(small(secure=mine)(examples=network.registry(network.shared())), streets)
        with pytest.raises(RunError, match="other settings: secure") as caught:
            list(fed.run(1))
        assert caught.value.code in ("E323", "E307")
        post = Post(streets)
        post.on_the_way = lambda letter: [letter._replace(terms="")]
        with pytest.raises(RunError):
            list(fed.run(1))
        assert {x.code for x in post.answers} == {"E336"}
        assert not any(x.frame for x in post.answers)


# ---- clients that are not what they should be


def spoilt(section: str, change: Callable[[bytes], bytes]) -> Callable[[Answer], list[Answer]]:
    def spoil(answer: Answer) -> list[Answer]:
        arrived = frame.unpack(answer.frame)
        return [
            answer._replace(frame=frame.pack(arrived._replace(sections={section: change(arrived.sections[section])})))
        ]

    return spoil


def reframed(change: Callable[[frame.Frame], frame.Frame]) -> Callable[[Answer], list[Answer]]:
    return lambda answer: [answer._replace(frame=frame.pack(change(frame.unpack(answer.frame))))]


def without_section(arrived: frame.Frame) -> frame.Frame:
    return arrived._replace(sections={tree: x for tree, x in arrived.sections.items() if tree != "moments"})


WRONG: dict[str, tuple[str, Callable[[Answer], Iterable[Any]], str]] = {
    "too short keys": ("keys", spoilt("keys", lambda x: x[:-1]), "E345"),
    "too long keys": ("keys", spoilt("keys", lambda x: x + bytes(5000)), "E340"),
    "keys a little too long": ("keys", spoilt("keys", lambda x: x + b"x"), "E345"),
    "no keys": ("keys", reframed(lambda x: x._replace(sections={})), "E345"),
    "shares for too few": ("shares", spoilt("shares", lambda x: x[:-86]), "E345"),
    "half a share": ("shares", spoilt("shares", lambda x: x[:-1]), "E345"),
    "a gigabyte of shares": ("shares", lambda x: [bytes(1 << 20)], "E340"),
    "no vector": ("masked", reframed(without_section), "E345"),
    "half a vector": ("masked", spoilt("update", lambda x: x[: len(x) // 2]), "E345"),
    "a vector of another sum": ("masked", reframed(lambda x: x._replace(round=7)), "E345"),
    "a vector of another client": ("masked", reframed(lambda x: x._replace(client=3)), "E345"),
    "steps that it cannot have made": ("masked", reframed(lambda x: x._replace(scalars={"steps": 99.0})), "E314"),
    "no steps": ("masked", reframed(lambda x: x._replace(scalars={})), "E345"),
    "its loss": ("masked", reframed(lambda x: x._replace(scalars={**x.scalars, "loss": 1.0})), "E345"),
    "a megabyte of vector": ("masked", lambda x: [x._replace(frame=bytes(1 << 20))], "E340"),
    "another step": ("masked", lambda x: [x._replace(step="keys"), Lost("nothing more")], "E311"),
    "another client's answer": ("masked", lambda x: [x._replace(client=3)], "E330"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_answer_costs_its_client_that_round(what: str) -> None:
    step, change, code = WRONG[what]
    fed, post = posted(small())
    post.on_the_way_back = lambda x: change(x) if of_step(x, 2, step) else [x]  # type: ignore[assignment,return-value]
    (state, record), *_ = fed.run(1)
    assert {c.client: c.refused for c in record.clients if c.refused} == {2: code}
    (local, _), *_ = without(small()(examples=network.shared()), {(0, 2)}).run(1)
    assert state.sha256() == local.sha256()


def test_a_wrong_share_of_a_secret_makes_no_wrong_sum() -> None:
    """Client 2 gives a share of client 0's seed that is none: three others have right ones."""

    def wrong(answer: bytes) -> bytes:
        return table({c: bytes(SHARE) if c == 0 else x for c, x in read_table(answer, SHARE).items()})

    fed, post = posted(small())
    post.on_the_way_back = lambda x: spoilt("unmask", wrong)(x) if of_step(x, 2, "unmask") else [x]
    (state, record), *_ = fed.run(1)
    (local, _), *_ = small()(examples=network.shared()).run(1)
    assert state.sha256() == local.sha256()
    assert not [c for c in record.clients if c.refused]


def test_a_wrong_answer_to_the_last_step_is_noted_and_not_needed() -> None:
    fed, post = posted(small())
    post.on_the_way_back = lambda x: spoilt("unmask", lambda s: s[:-1])(x) if of_step(x, 2, "unmask") else [x]
    (state, record), *_ = fed.run(1)
    (local, _), *_ = small()(examples=network.shared()).run(1)
    assert state.sha256() == local.sha256()
    assert not [c for c in record.clients if c.refused]
    assert [(e["code"], e["client"]) for e in record.events] == [("E345", NAMES[2])]
    assert sum(t.bytes for t in record.traffic if t.layer == "_unused") > 0


def test_shares_that_do_not_open_cost_the_round_and_name_who_sealed_them() -> None:
    """To one other client they are no matter: four more have its secret. To all, nobody can take its masks away."""

    def for_(some: Iterable[int]) -> Callable[[bytes], bytes]:
        return lambda said: table({c: bytes(82) if c in some else x for c, x in read_table(said, 82).items()})

    fed, post = posted(small())
    post.on_the_way_back = lambda x: spoilt("shares", for_([0]))(x) if of_step(x, 2, "shares") else [x]
    (state, _), *_ = fed.run(1)
    (local, _), *_ = small()(examples=network.shared()).run(1)
    assert state.sha256() == local.sha256()
    fed, post = posted(small())
    post.on_the_way_back = lambda x: spoilt("shares", for_([0, 1, 3, 4]))(x) if of_step(x, 2, "shares") else [x]
    with pytest.raises(RunError, match="1 clients have a share of client 2's secret, 3 are needed") as caught:
        list(fed.run(1))
    assert caught.value.code == "E307"


# ---- things that come twice, late, or after a restart


def test_letters_and_answers_that_come_twice_change_nothing() -> None:
    (local, _), *_ = small()(examples=network.shared()).run(1)
    fed, post = posted(small())
    post.on_the_way = lambda letter: [letter, letter]
    (state, record), *_ = fed.run(1)
    assert state.sha256() == local.sha256()
    assert not [c for c in record.clients if c.refused]
    fed, post = posted(small())
    post.on_the_way_back = lambda answer: [answer, answer]
    (state, record), *_ = fed.run(1)
    assert state.sha256() == local.sha256()
    assert not [c for c in record.clients if c.refused]


def test_an_answer_to_the_step_before_is_late_and_not_taken_for_one() -> None:
    kept: list[Answer] = []

    def late(answer: Answer) -> list[Answer]:
        kept.extend([answer] if of_step(answer, 2, "keys") else [])
        return [*kept, answer] if of_step(answer, 2, "shares") else [answer]

    fed, post = posted(small())
    post.on_the_way_back = late
    (_, record), *_ = fed.run(1)
    assert not [c for c in record.clients if c.refused]
    assert [e["why"] for e in record.events] == ["it comes late: it answers another step"]
    assert kept


def test_a_node_that_is_started_again_within_a_round_is_out_of_it_and_back_in_the_next() -> None:
    fed, post = posted(small())

    def restart(letter: Letter) -> list[Letter]:
        if letter.step is not None and letter.step.name == "masked" and letter.round == 0:
            post.nodes[0]._masking._vault = MemoryVault()  # type: ignore[union-attr]
        return [letter]

    post.on_the_way = restart
    (_, first), (_, second) = fed.run(2)
    assert {c.client: c.refused for c in first.clients} == {0: "E336", 1: None, 2: None, 3: "E336", 4: None}
    assert all("not open here" in e["why"] for e in first.events)
    assert not [c for c in second.clients if c.refused]


def test_who_is_still_training_when_the_next_sum_begins_leaves_that_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    turn, fresh = Masking.turn, Kept(1, 0, b"of the next round")

    def overtaken(self: Masking, letter: Letter) -> Turn:
        made = turn(self, letter)
        if letter.client == 2:
            self._vault.put(2, fresh)
        return made

    monkeypatch.setattr(Masking, "turn", overtaken)
    fed, post = posted(small())
    (_, record), *_ = fed.run(1)
    assert {c.client: c.refused for c in record.clients if c.refused} == {2: "E336"}
    assert post.nodes[1]._masking._vault.get(2) == fresh  # type: ignore[union-attr]
    assert not [x for x in post.answers if x.client == 2 and x.step == "masked" and x.frame]


def test_a_client_that_lost_its_state_is_sent_the_whole_plan_within_the_step() -> None:
    expected = list(small()(examples=network.shared()).run(2))
    fed, post = posted(small())
    run = fed.run(2)
    next(run)
    post.nodes[1].shelf = MemoryShelf()
    state, record = next(run)
    assert [e["code"] for e in record.events] == ["E313"] * 3
    assert state.sha256() == expected[-1][0].sha256()


def test_signed_letters_make_the_same_sum_and_are_answered_once() -> None:
    keys = Shared(b"canary-7c1f9d2e-0b6a-4f58-a1d3-5e9b8c7a6f40")
    nodes = [
        Node(
            small()(examples=replace(network.shared().subset(h), test=None, check=False).among(NAMES)),
            signing=AtNode(keys, "mine"),
        )
        for h in HOMES
    ]
    streets = Streets(nodes)
    letters: dict[tuple[int, str], bytes] = {}
    send = streets.send

    def recorded(sent: Iterable[tuple[int, bytes]], most: int) -> None:
        for client, blob in sent:
            step = Letter.unpacked(blob).step
            assert step is not None
            letters[client, step.name] = blob
            send([(client, blob)], most)

    streets.send = recorded  # type: ignore[method-assign]
    fed = over(small()(examples=network.registry(network.shared())), streets, signing=AtServer(keys, "mine"))
    pairs = list(fed.run(2))
    local = list(small()(examples=network.shared()).run(2))
    assert [s.sha256() for s, _ in pairs] == [s.sha256() for s, _ in local]
    assert not any(r.events for _, r in pairs)
    assert {step for _, step in letters} == {*STEPS}
    for (client, step), blob in letters.items():
        (node,) = [node for node in nodes if client in node.clients]
        ((_, again),) = node.answer([(client, blob)])
        answer = Answer.unpacked(again)
        assert (answer.said, answer.frame) == ("failed", b"")
        assert answer.why.startswith("E333") or answer.code == "E336", step
        unsigned = Letter.unpacked(blob).packed()
        ((_, again),) = node.answer([(client, unsigned)])
        assert Answer.unpacked(again).why.startswith("E334")


# ---- secrets


def secrets_of(monkeypatch: pytest.MonkeyPatch) -> tuple[list[bytes], list[bytes]]:
    """All that were made: private keys and seeds; shares of them."""
    made: list[bytes] = []
    parts: list[bytes] = []
    packed, split = Client.packed, protocol.shamir.split

    def spied(self: Client) -> bytes:
        made.extend([self._sealing.private, self._masking.private, self._seed])
        return packed(self)

    def shared(*given: Any) -> dict[int, bytes]:
        shares = split(*given)
        parts.extend(x[1:] for x in shares.values())
        return shares

    monkeypatch.setattr(Client, "packed", spied)
    monkeypatch.setattr(protocol.shamir, "split", shared)
    return made, parts


def holds(text: bytes, secrets: Iterable[bytes]) -> bool:
    return any(x in text or x.hex().encode() in text or repr(x).encode() in text for x in secrets)


def test_no_secret_is_in_a_run_folder_a_log_or_a_letter_to_another(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept, parts = secrets_of(monkeypatch)
    fed, post = posted(small())
    losing(post, 2, "masked", 1)
    fed.fit(2, tmp_path / "run")
    made = [*kept, *parts]
    assert len(kept) > 2 * 5 * 3
    assert len(parts) == 2 * 2 * 25
    found = [path for path in tmp_path.rglob("*") if path.is_file() and holds(path.read_bytes(), made)]
    assert found == []
    printed = capsys.readouterr()
    assert not holds((printed.out + printed.err + caplog.text).encode(), made)
    letters = b"|".join(bytes(x.step.frame) + bytes(x.frame) for x in post.letters if x.step is not None)
    assert len(letters) > 10_000
    assert not holds(letters, made)
    assert not holds(b"|".join(bytes(x.frame) for x in post.answers), kept)
    assert not holds(b"|".join(bytes(x.frame) for x in post.answers if x.step != "unmask"), parts)
    assert not holds("|".join(x.why for x in post.answers).encode(), made)
    assert max(len(x.why) for x in post.answers) <= LONGEST_REASON


def test_nothing_is_left_of_a_clients_secrets_after_its_round(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = secrets_of(monkeypatch)
    fed, post = posted(small())
    losing(post, 2, "shares", 0)
    run = fed.run(2)
    next(run)
    vaults = [node._masking._vault for node in post.nodes]  # type: ignore[union-attr]
    left = {c: kept for vault in vaults for c, kept in vault._kept.items() if kept.secrets}  # type: ignore[attr-defined]
    assert {*left} == {2}  # whose round is not over, as far as it knows
    before = left[2].secrets
    post.on_the_way_back = lambda answer: [answer]
    next(run)
    kept = [kept for vault in vaults for kept in vault._kept.values()]  # type: ignore[attr-defined]
    assert not any(one.secrets for one in kept)
    assert before not in [one.secrets for one in kept]
    assert not holds(repr(kept).encode(), made)


def test_once_its_vector_is_masked_a_client_has_its_own_keys_no_more() -> None:
    fed, post = posted(small())
    seen: list[_Open] = []

    def look(letter: Letter) -> list[Letter]:
        if letter.step is not None and letter.step.name == "unmask":
            (node,) = [node for node in post.nodes if letter.client in node.clients]
            kept = node._masking._vault.get(letter.client)  # type: ignore[union-attr]
            assert kept is not None
            seen.append(_Open.unpacked(kept.secrets))
        return [letter]

    post.on_the_way = look
    list(fed.run(1))
    assert [one.due for one in seen] == ["unmask"] * 5
    for one in seen:
        held = Held.unpacked(0, one.secrets)
        assert len(one.secrets) == 4 * len(held.others) + len(held.shares) * (4 + 2 * SHARE) + 4


def test_secrets_do_not_show_themselves() -> None:
    client = Client(3, {})
    secret = client.packed()
    open_ = _Open("round", 0, "f", "shares", 5, 1.0, secret)
    for one in (Kept(1, 2, secret), open_, Turn(open_, 3), client):
        assert not holds(f"{one!r} {one}".encode(), [secret, client._seed])
    assert _Open.unpacked(open_.packed()) == open_
    again = Client.unpacked(3, {}, secret)
    assert again.keys() == client.keys()


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX")
def test_files_of_secrets_are_their_owners_and_are_taken_once(tmp_path: Path) -> None:
    vault = FileVault(tmp_path / "own", "exp-1")
    kept = Kept(3, 17, b"secret")
    vault.put(2, kept)
    (path,) = (tmp_path / "own" / "exp-1").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) & 0o077 == 0
    assert vault.get(2) == kept
    other = FileVault(tmp_path / "own", "exp-1")  # another process
    assert other.take(2) == kept
    assert vault.take(2) is None
    assert vault.get(2) == Kept(3, 17, b"")
    assert vault.get(5) is None
    assert b"secret" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    vault.put(2, kept)
    vault.forget(4)
    assert vault.get(2) is None
    assert FileVault(tmp_path / "own", "exp-2").get(2) is None


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX")
def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "own").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "own")
    for name in ("open", "link"):
        with pytest.raises(ConfigError, match="others can enter") as caught:
            FileVault(tmp_path / name, "exp-1")
        assert caught.value.code == "E123"


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX")
def test_a_node_may_be_a_new_process_with_every_letter(tmp_path: Path) -> None:
    """As under Flower: nodes have nothing but their files, and each answers once."""
    shelves = {home: MemoryShelf() for home in HOMES}

    class Anew:
        def __init__(self, home: tuple[int, ...]):
            self.home, self.clients = home, frozenset(home)

        def answer(self, letters: Any) -> Any:
            examples = replace(network.shared().subset(self.home), test=None, check=False).among(NAMES)
            vault = FileVault(tmp_path, "exp-1")
            with Node(small()(examples=examples), shelves[self.home], vault=vault) as node:
                yield from node.answer(letters)

    streets = Streets([Anew(home) for home in HOMES])  # type: ignore[list-item]
    fed = over(small()(examples=network.registry(network.shared())), streets)
    pairs = list(fed.run(2))
    local = list(small()(examples=network.shared()).run(2))
    assert [s.sha256() for s, _ in pairs] == [s.sha256() for s, _ in local]
    files = [*(tmp_path / "exp-1").iterdir()]
    assert len(files) == 5
    assert {len(path.read_bytes()) for path in files} == {16}  # a round and a number


# ---- envelopes, and what is refused


def test_a_letter_of_a_step_is_what_was_packed_or_nothing() -> None:
    plan = frame.pack(frame.Frame("plan", 3, 1, {"lr": 0.5}, {"params": b"abc"}))
    own = frame.pack(frame.Frame("plan", 3, 1, {}, {"shares": b"xyz"}))
    letter = Letter("round", 1, 3, "f" * 32, (), {}, False, plan, "t", step=Step("masked", own, 5, 13.0))
    blob = letter.packed()
    assert _own(Letter.unpacked(blob)) == letter
    assert blob[sections_at(blob) :] == b"abc"
    bare = letter._replace(frame=b"", step=Step("shares", own, 5, 13.0)).packed()
    assert bare[sections_at(bare) :] == b"xyz"
    empty = letter._replace(frame=b"", step=Step("keys")).packed()
    assert sections_at(empty) == len(empty)
    assert _own(Letter.unpacked(empty)).step == Step("keys")
    for cut in range(len(blob)):
        try:
            Letter.unpacked(blob[:cut])
        except WireError:
            continue
        assert cut >= len(blob) - len(plan)  # the plan's own frame is looked at later
    odd = [["keys"], ["keys", 1, 2], ["nothing", 1, 2.0], {"a": 1}, ["keys", True, 2.0], None]
    for step in odd:
        said = letter._replace(step=None)
        head = json.dumps({"kind": "round", "client": 1, "round": 3, "plan": "f", "step": step})
        assert said.step is None
        with pytest.raises(WireError):
            Step.of(json.loads(head)["step"], b"")


def test_messages_that_are_masked_are_not_taken_together() -> None:
    with pytest.raises(ConfigError, match="each client masks its own message") as caught:
        connected(small(), HOMES, together=True)
    assert caught.value.code == "E118"


def test_another_engine_has_to_say_that_it_has_sums() -> None:
    fed = small()(examples=network.registry(network.shared()))
    with pytest.raises(ConfigError, match="not for their part of a sum") as caught:
        fed.by("mine", "", lambda setup, here: here)
    assert caught.value.code == "E118"
    remote, streets = connected(small(), HOMES)
    for between in (lambda: remote.through(lambda engine: engine), lambda: over(fed.through(lambda x: x), streets)):
        with pytest.raises(ConfigError, match="secure") as caught:
            between()
        assert caught.value.code == "E118"


@pytest.mark.parametrize("what", [{"uplink": wire.TopK(0.1)}, {"faults": {"norm": "median"}}, {"cohort": 2}])
def test_what_is_no_sum_is_refused_as_in_a_simulation(what: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        connected(small(**what), HOMES)
    assert caught.value.code == "E123"


def test_elements_are_of_their_ring() -> None:
    """A client's vector and its masks are added mod 2^32: no bit above is ever set."""
    client = Client(1, {"update": 32})
    client.shares(
        table({1: client.keys()[: 2 * KEY], 2: Pair().public + Pair().public, 3: Pair().public + Pair().public}), 2
    )
    client.take_sealed(table({2: bytes(82), 3: bytes(82)}))
    made = client.masked({"update": np.zeros(100, np.uint64)})["update"]
    assert not (made & ~low(32)).any()
    assert hashlib.sha256(made.tobytes()).digest() != hashlib.sha256(bytes(800)).digest()
    assert drawn(small()(examples=network.shared()), 0) == (0, 1, 2, 3, 4)
