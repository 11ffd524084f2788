"""What a plan costs: a client is sent only what it lacks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import cases
from lamina import (
    ConfigError,
    FedAvg,
    Federation,
    FedLAMA,
    LocalOnly,
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
from lamina.downlink import Broadcast, tag
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
        broadcast.sizes(broadcast.lacking({}), -1)
    assert caught.value.code == "E343"
