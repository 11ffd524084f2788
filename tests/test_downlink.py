"""What a plan costs: a client is sent only what it lacks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch

import cases
from lamina import (
    ConfigError,
    FedAvg,
    Federation,
    FedLAMA,
    LocalOnly,
    LocalSGD,
    Message,
    Method,
    Params,
    Plan,
    RoundRecord,
    RunError,
    Scaffold,
    Work,
    wire,
)
from lamina.downlink import HISTORY, Broadcast, Version, tag
from lamina.wire import frame


def down(record: RoundRecord) -> dict[int, int]:
    return {c.client: c.bytes_down for c in record.clients}


def rows(record: RoundRecord) -> dict[str, int]:
    return {t.layer: t.bytes for t in record.traffic if t.direction == "down"}


def in_full(fed: Federation) -> int:
    """Bytes of a plan with everything: one encoded tree for the parameters, one for the buffers, and the frame."""
    trees = {"params": fed.initial.params, "buffers": fed.initial.buffers}
    trees = {tree: content for tree, content in trees.items() if content}
    lengths = {t: len(wire.encode(x, fed.downlink if t == "params" else wire.Dense())) for t, x in trees.items()}
    return sum(lengths.values()) + bare(lengths)


def bare(lengths: dict[str, int], names: int = 6) -> int:
    """Bytes of a frame around sections of these lengths, with the bits that say what is asked for."""
    bits = -(-names // 8)
    scalars = dict.fromkeys(("lr", "participation", "in_sync", "accepted"), 0.0)
    return frame.overhead("plan", scalars, lengths | {"upload": bits}) + bits


@pytest.mark.parametrize("values", ["fp32", "int8"])
def test_a_newcomer_pays_in_full(values: str) -> None:
    fed = cases.federation(downlink=wire.Dense(values))
    _, (record,) = cases.finish(fed, 1)
    assert set(down(record).values()) == {in_full(fed)}


def test_who_holds_the_current_version_pays_for_the_frame_only() -> None:
    """Under LocalOnly nothing is uploaded, so nothing at the server ever changes. Newcomers still pay in full."""
    fed = cases.federation(LocalOnly(), cohort=3, model="small")
    _, records = cases.finish(fed, 4)
    known: set[int] = set()
    met = set()
    for record in records:
        for client, size in down(record).items():
            assert size == (bare({}) if client in known else in_full(fed))
            met.add(client in known)
        known |= set(record.cohort)
    assert met == {False, True}


def test_everything_is_sent_again_when_everything_changed() -> None:
    """FedAvg changes every parameter and every buffer in every round."""
    fed = cases.federation(cohort="all")
    _, records = cases.finish(fed, 3)
    assert [set(down(r).values()) for r in records] == [{in_full(fed)}] * 3


def test_waiting_layers_are_not_sent_down_again() -> None:
    _, records = cases.finish(cases.federation(FedLAMA(phi=2), cohort="all"), 4)
    waited = {name for name, row in records[2].layers.items() if not row.uploaded}
    assert waited
    for name, row in records[3].layers.items():
        assert (row.bytes_down == 0) == (name in waited)


def test_a_newcomer_is_sent_the_waiting_layers_too() -> None:
    """With a cohort of 2 of 5, held for phi = 2 rounds: who is new in a cycle lacks everything."""
    fed = cases.federation(FedLAMA(phi=2), cohort=2)
    _, records = cases.finish(fed, 8)
    seen: set[int] = set()
    for record in records:
        for client, size in down(record).items():
            assert client in seen or size == in_full(fed)
        seen |= set(record.cohort)


def test_a_shared_tree_is_sent_like_a_layer() -> None:
    fed = cases.federation(Scaffold(), cohort="all")
    _, records = cases.finish(fed, 2)
    control = len(wire.encode(fed.initial.params, wire.Dense()))
    assert [rows(r)["_control"] for r in records] == [5 * control] * 2


class Watch(Method[Any, Any]):
    """Lets layers wait as FedLAMA does, and notes what each client was given."""

    hold = 1

    def __init__(self) -> None:
        self.given: list[tuple[int, Params]] = []

    def plan(self, server: Any, plan: Plan) -> Plan:
        return plan.keep(["head.weight", "head.bias"] if plan.round else plan.upload)

    def report(self, client: Any, plan: Plan, work: Work, message: Message) -> tuple[Message, Any]:
        self.given.append((plan.round, plan.params))
        return message, client


@pytest.mark.parametrize("values", ["fp16", "bf16", "int8"])
def test_a_lossy_downlink_gives_all_holders_the_same_bits(values: str) -> None:
    """Who got a layer in round 1 and is not sent it again has what a newcomer gets in round 3; and that is what
    decode(encode(the server's own)) gives, the server's staying in full precision."""
    method = Watch()
    fed = cases.federation(method, cohort=2, downlink=wire.Dense(values))
    states = cases.states(fed, 5)
    for t, params in method.given:
        if t:
            server = states[t - 1].params
            blob = wire.encode(server, wire.Dense(values))
            assert cases.bits(params) == cases.bits(wire.decode(blob, server))
    later = [params for t, params in method.given if t >= 1]
    assert len({params["conv.weight"].numpy().tobytes() for params in later}) == 1
    assert not torch.equal(later[0]["conv.weight"], states[0].params["conv.weight"])


def test_a_tag_is_a_function_of_the_bytes_in_row_major_order() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert tag(x) == tag(x.clone()) == tag(x.t().contiguous().t())
    assert tag(x) != tag(x.t())
    assert tag(x) != tag(x + 0.5)
    assert tag(torch.tensor(0.0)) != tag(torch.tensor(-0.0))
    assert isinstance(tag(torch.empty(0)), int)
    assert 0 <= tag(torch.tensor(True)) < 2**64


@dataclass(frozen=True)
class Naming(FedAvg):
    """Shares a tree and a number under names of its choice."""

    tree: str = "extra"
    number: str = "extra"

    def plan(self, server: Any, plan: Plan) -> Plan:
        tree = {"head.bias": torch.ones(4)}
        return plan.share(**{self.tree: tree}).set(**{self.number: 1.0})


@pytest.mark.parametrize("name", ["params", "buffers", "mask", "upload"])
def test_a_shared_tree_may_not_take_the_name_of_a_part_of_the_plan(name: str) -> None:
    """It would replace the parameters in the ledger without a word."""
    with pytest.raises(ConfigError, match=name):
        cases.states(cases.federation(Naming(tree=name)), 1)


@pytest.mark.parametrize("name", ["lr", "participation", "in_sync", "accepted"])
def test_a_plan_number_may_not_take_the_name_of_a_field_of_the_plan(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        cases.states(cases.federation(Naming(number=name)), 1)


def test_further_numbers_are_counted() -> None:
    plain, extra = (
        next(cases.federation(method, diagnostics=False).run(1))[1].bytes_down
        for method in (FedAvg(), Naming(tree="t", number="number"))
    )
    tree = len(wire.encode({"head.bias": torch.ones(4)}, wire.Dense()))
    section = len(b"\x01t") + 1  # name and length of the section
    number = len(b"\x06number") + 8
    assert extra - plain == 3 * (tree + section + number)


def test_a_plan_that_changes_on_the_wire_stops_the_run() -> None:
    """Under through_bytes what arrives is compared with what every client is said to hold."""
    fed = cases.federation()
    plan = fed._plan(*fed.initial, 0, fed.local.lr, 3)
    broadcast = Broadcast(plan, wire.Dense(), wire.schema_of(plan.params), frame.in_memory)
    broadcast.plan = replace(broadcast.plan, params={n: x + 1 for n, x in plan.params.items()})
    with pytest.raises(RunError, match="params changed on the wire") as caught:
        broadcast.sizes({}, -1)
    assert caught.value.code == "E343"


# ---- lossless: the distance to what a client holds

LOSSLESS = wire.Dense("lossless")
SLOW = LocalSGD(lr=1e-3, batch_size=8)


class Sent(NamedTuple):
    """What one client's parameters took on the way down, and would have taken by each way."""

    age: int | None  # rounds since it last was in a cohort; None: a newcomer
    size: int
    planes: int
    distance: int | None  # to what it holds


@cache
def plans() -> tuple[tuple[Sent, ...], ...]:
    """By round: FedAvg with 2 of 5 clients, a model without buffers that moves slowly."""
    fed = cases.federation(model="small", cohort=2, local=SLOW, downlink=LOSSLESS)
    versions, seen, rounds = [fed.initial.params], {}, []
    for t, (state, record) in enumerate(fed.run(14)):
        sent = []
        for client, size in down(record).items():
            age = t - seen[client] if client in seen else None
            base = None if age is None else versions[seen[client]]
            planes = len(wire.encode(versions[t], LOSSLESS))
            distance = None if base is None else len(wire.encode(versions[t], LOSSLESS, reference=base))
            (own,) = (n for n in {planes, distance} - {None} if size == n + bare({"params": n}))
            sent.append(Sent(age, own, planes, distance))
        seen |= dict.fromkeys(record.cohort, t)
        versions.append(state.params)
        rounds.append(tuple(sent))
    return tuple(rounds)


def sent(*ages: int | None) -> list[Sent]:
    found = [one for plan in plans() for one in plan if one.age in ages]
    assert found
    return found


def test_who_was_there_in_one_of_the_last_two_rounds_is_sent_the_distance() -> None:
    for one in (*sent(1), *sent(2)):
        assert one.size == one.distance < one.planes


def test_who_missed_two_rounds_or_more_is_sent_planes() -> None:
    """The distance to what it holds would be shorter, but the server has forgotten that."""
    late = [one for plan in plans() for one in plan if one.age and one.age > HISTORY]
    assert {one.age for one in late} >= {3, 4}
    for one in late:
        assert one.size == one.planes > (one.distance or 0)


def test_a_newcomer_is_sent_planes() -> None:
    newcomers = sent(None)
    assert len(newcomers) == 5
    assert all(one.size == one.planes for one in newcomers)


def test_two_clients_of_a_round_with_different_bases_pay_different_bytes() -> None:
    pairs = [plan for plan in plans() if {one.age for one in plan} == {1, 2}]
    assert pairs
    for a, b in pairs:
        assert a.planes == b.planes
        assert a.size != b.size


@dataclass(frozen=True)
class Refused(FedAvg):
    """What a client with a single local step sends is not finite."""

    def report(self, client: Any, plan: Plan, work: Work, message: Message) -> tuple[Message, Any]:
        bad = {name: x + torch.nan for name, x in message["update"].items()} if int(work.steps) == 1 else {}
        return {**message, "update": message["update"] | bad}, client


def test_who_was_refused_holds_what_it_was_sent() -> None:
    fed = cases.federation(Refused(), model="small", cohort="all", local=SLOW, downlink=LOSSLESS)
    _, (first, second) = cases.finish(fed, 2)
    assert [c.name for c in first.clients if c.refused] == ["dan"]
    assert len({*down(second).values()}) == 1
    assert max(down(second).values()) < min(down(first).values())


def test_the_same_parameters_cut_by_another_mask_are_no_base() -> None:
    """Who was sent them under a mask of the even entries has 0 at the odd ones, which the next plan is about."""
    fed = cases.federation(model="small")
    plan = fed._plan(*fed.initial, 0, fed.local.lr, 3)
    even = {name: torch.arange(x.numel()).reshape(x.shape) % 2 == 0 for name, x in plan.params.items()}
    odd = {name: ~x for name, x in even.items()}

    def under(mask: Params, scale: float, *past: Version) -> Broadcast:
        params = {name: x * scale for name, x in plan.params.items()}
        return Broadcast(replace(plan, params=params, mask=mask), LOSSLESS, fed._schema, None, None, past)

    first, second = under(even, 1.0), under(odd, 1.0)
    third = under(odd, 1.0001, *second.past)
    newcomer, late, present = (third.sizes(held, 0)["params"].total for held in ({}, first.tags, second.tags))
    assert newcomer == late > present


def test_the_server_keeps_two_models_and_copies_none() -> None:
    """They are the tensors of the states before."""
    fed = cases.federation(model="small", downlink=LOSSLESS)
    before = [fed.initial.params, *(state.params for state in cases.states(fed, 4))]
    for t, state in enumerate(cases.states(fed, 4)):
        assert len(state.past) == min(HISTORY, t + 1)
        for version, params in zip(state.past, reversed(before[: t + 1]), strict=False):
            assert cases.bits(version.params) == cases.bits(params)
    (one, two) = state.past
    last = cases.states(fed, 1, state)[0]
    assert last.past[1] is one
    assert all(last.past[0].params[name] is x for name, x in state.params.items())
    assert two not in last.past


def test_a_model_that_stays_as_it_is_is_kept_once() -> None:
    states = cases.states(cases.federation(LocalOnly(), model="small", downlink=LOSSLESS), 3)
    assert [len(state.past) for state in states] == [1, 1, 1]


@pytest.mark.parametrize(
    ("model", "codec"),
    [("small", wire.Dense()), ("small", wire.Dense("bf16")), ("double", LOSSLESS)],
)
def test_nothing_is_kept_that_no_codec_makes_use_of(model: str, codec: wire.Codec) -> None:
    assert all(state.past == () for state in cases.states(cases.federation(model=model, downlink=codec), 2))


def test_a_run_that_goes_on_with_another_downlink_forgets() -> None:
    state = cases.states(cases.federation(downlink=LOSSLESS), 2)[-1]
    assert len(state.past) == 2
    assert cases.states(cases.federation(), 1, state)[-1].past == ()
