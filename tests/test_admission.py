"""What is let into a sum, what a round does without, and that a refused reply leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import cases
import network
from lamina import ConfigError, FedAvg, Federation, FedLAMA, Method, Plan, RunError, Scaffold, Work
from lamina.admission import LARGEST, Admission, Form, Refusal, enough, out_of_range, unused
from lamina.chaos import Chaos, Chaotic
from lamina.client import Reply
from lamina.cohort import Faults
from lamina.survival import survivors
from lamina.tree import Message


def plan_of(fed: Federation, t: int = 0) -> Plan:
    return fed.method.plan(fed.method.init(fed.initial.params), fed._plan(*fed.initial, t, 0.1, 3))


def replies_of(fed: Federation, plan: Plan, clients: tuple[int, ...] = (0, 1, 2)) -> list[Reply]:
    engine = fed.made_engine()
    try:
        return list(engine.replies("round", plan, clients, {}))
    finally:
        engine.close()


# ---- what a message has to look like


@pytest.mark.parametrize("name", cases.ALL)
def test_what_every_method_sends_is_what_its_hooks_say(name: str) -> None:
    fed = cases.case(name, accuracy_before=name == "fedavg")
    plan = plan_of(fed, 1)
    form = Form.of(fed.setup, "round", plan)
    for reply in replies_of(fed, plan):
        assert form.refuses(reply.message) is None


def shaped(message: Message, **trees: Any) -> Message:
    return {**message, **trees}


BAD: dict[str, tuple[Callable[[Message], Message], tuple[str, str, str]]] = {
    "shape": (
        lambda m: shaped(m, update={**m["update"], "head.weight": m["update"]["head.weight"].T}),
        ("E320", "expected (4, 6), got (6, 4)", "head.weight"),
    ),
    "no dimensions": (
        lambda m: shaped(m, update={**m["update"], "head.bias": torch.tensor(1.0)}),
        ("E320", "expected (4,), got ()", "head.bias"),
    ),
    "type": (
        lambda m: shaped(m, update={**m["update"], "head.bias": m["update"]["head.bias"].double()}),
        ("E321", "expected torch.float32, got torch.float64", "head.bias"),
    ),
    "no tensor": (
        lambda m: shaped(m, update={**m["update"], "head.bias": "four"}),
        ("E321", "expected torch.float32, got str", "head.bias"),
    ),
    "extra layer": (
        lambda m: shaped(m, update={**m["update"], "tail": torch.ones(1)}),
        ("E322", "is not one that was asked for", "tail"),
    ),
    "extra tree": (lambda m: shaped(m, gift={}), ("E322", "is not one that was asked for", "gift")),
    "a tree less": (
        lambda m: {tree: content for tree, content in m.items() if tree != "control"},
        ("E322", "is absent", "control"),
    ),
    "a layer of another tree less": (
        lambda m: shaped(m, control={n: x for n, x in m["control"].items() if n != "head.bias"}),
        ("E322", "is absent", "control/head.bias"),
    ),
    "an integer buffer as a number": (
        lambda m: shaped(m, buffers={**m["buffers"], "seen": torch.tensor(1.0)}),
        ("E321", "expected torch.int64, got torch.float32", "buffers/seen"),
    ),
    "no trees at all": (lambda m: {}, ("E322", "is absent", "buffers")),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_message_of_another_form_is_refused_with_the_layer(bad: str) -> None:
    change, (code, why, layer) = BAD[bad]
    fed = cases.federation(Scaffold())
    plan = plan_of(fed)
    reply = replies_of(fed, plan, (0,))[0]
    found = Form.of(fed.setup, "round", plan).refuses(change(reply.message))
    assert found is not None
    assert (found.code, found.layer) == (code, layer)
    assert why in found.why


def test_an_update_may_lack_layers_for_that_is_its_methods_choice() -> None:
    fed = cases.federation()
    plan = plan_of(fed)
    message = dict(replies_of(fed, plan, (0,))[0].message)
    for tree in ("update", "moments"):
        message[tree] = {name: x for name, x in message[tree].items() if name != "head.bias"}
    assert Form.of(fed.setup, "round", plan).refuses(message) is None


def test_layers_that_wait_are_not_asked_for() -> None:
    fed = cases.federation(FedLAMA(phi=2))
    plan = plan_of(fed).keep(["head.bias"])
    whole = replies_of(fed, plan_of(fed), (0,))[0].message
    found = Form.of(fed.setup, "round", plan).refuses(whole)
    assert found is not None
    assert found.code == "E322"


class Shy(Method[tuple[()], tuple[()]]):
    """Its report fails on an update of zeros, and sends a tree that nobody knows in advance."""

    sends = ("hello",)

    def report(self, client: tuple[()], plan: Plan, work: Work, message: Message) -> tuple[Message, tuple[()]]:
        if not any(bool(g.any()) for g in work.grads.values()):
            raise ZeroDivisionError
        return message | {"hello": {"x": torch.ones(2)}}, client


def test_a_method_whose_hooks_fail_on_zeros_is_still_judged_by_what_the_engine_asks_for() -> None:
    fed = cases.federation(Shy())
    ((_, record),) = fed.run(1)
    assert [c.refused for c in record.clients] == [None] * 3
    form = Form.assumed(fed.setup, "round", plan_of(fed))
    assert form.open
    message = dict(replies_of(fed, plan_of(fed), (0,))[0].message)
    assert form.refuses(message) is None
    assert form.refuses(shaped(message, hello={"x": "y"})) == Refusal(
        "E321", "expected a tensor of real numbers", "hello/x"
    )
    assert form.refuses(shaped(message, hello={"x": torch.ones(1, dtype=torch.complex64)})) is not None


def test_the_largest_finite_numbers_are_finite_and_their_sum_need_not_be() -> None:
    top = torch.full((4,), 3e38)
    assert not torch.isfinite(top.sum())
    assert out_of_range({"control": {"x": top}}) is None
    assert out_of_range({"update": {"x": torch.tensor([1.0, math.nan])}}) == Refusal("E310", "x", "x")
    assert out_of_range({"control": {"x": torch.tensor([math.inf, -math.inf])}}) == Refusal(
        "E310", "control/x", "control/x"
    )
    assert out_of_range({"score": {"score": torch.tensor(math.nan)}}) is None
    assert out_of_range({"update": {"x": torch.zeros(0), "n": torch.tensor([1, 2])}}) is None


def test_an_update_that_would_erase_the_model_is_refused() -> None:
    """|(6e11, 8e11)| = 1e12 is the longest that is let in; in float32 the square of 1e20 is infinite."""
    assert out_of_range({"update": {"x": torch.tensor([6e11, 8e11], dtype=torch.float64)}}) is None
    assert LARGEST == 1e12
    for far in (torch.tensor([6e11, 8.1e11]), torch.tensor([1e20]), torch.tensor([1e300], dtype=torch.float64)):
        found = out_of_range({"update": {"w": torch.zeros(3), "x": far}})
        assert found is not None
        assert (found.code, found.layer) == ("E312", "x")
    assert out_of_range({"update": {}}) is None


# ---- who is judged, and in which order


def admitted(fed: Federation, come: list[Reply], clients: tuple[int, ...] = (0, 1, 2)) -> list[Reply]:
    return list(Admission(fed.setup, "round", plan_of(fed), clients).through(iter(come)))


def test_replies_leave_in_the_schedules_order_whatever_theirs_was() -> None:
    fed = cases.federation()
    come = replies_of(fed, plan_of(fed), (2, 0, 1))
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        out = admitted(fed, [come[i] for i in order], (2, 0, 1))
        assert [(r.client, r.refused) for r in out] == [(2, None), (0, None), (1, None)]


def test_who_does_not_answer_is_named() -> None:
    fed = cases.federation()
    come = replies_of(fed, plan_of(fed))
    out = admitted(fed, [come[2]])
    assert [(r.client, r.refused and r.code) for r in out] == [(0, "E311"), (1, "E311"), (2, None)]


def test_a_second_answer_an_old_one_and_a_strangers_are_no_answers() -> None:
    fed = cases.federation()
    come = replies_of(fed, plan_of(fed), (0, 1, 2, 4))
    old = come[1]._replace(round=7)
    out = admitted(fed, [come[0], come[0], old, come[3], come[1], come[2]])
    beside = [(r.client, r.code) for r in out if r.beside]
    assert beside == [(0, "E331"), (1, "E332"), (4, "E330")]
    assert [(r.client, r.refused) for r in out if not r.beside] == [(0, None), (1, None), (2, None)]


def test_the_members_of_a_refused_message_are_refused_with_it() -> None:
    fed = cases.federation(FedAvg())
    first, second, third = replies_of(fed, plan_of(fed))
    group = first._replace(members=(0, 1))
    member = second._replace(message={}, within=True)
    assert [r.refused for r in admitted(fed, [group, member, third])] == [None] * 3
    broken = group._replace(message={**group.message, "update": {}, "moments": {}, "gift": {}})
    assert [r.refused and r.code for r in admitted(fed, [broken, member, third])] == ["E322", "E322", None]


@pytest.mark.parametrize("steps", [1e9, -80.0, 0.0, math.nan, 3.5])
def test_steps_that_a_clients_examples_do_not_make_are_refused(steps: float) -> None:
    fed = cases.federation()
    reply = replies_of(fed, plan_of(fed), (0,))[0]
    said = {"steps": torch.tensor(steps, dtype=torch.float64)}
    (out,) = admitted(fed, [reply._replace(message={**reply.message, "steps": said})], (0,))
    assert (out.code, out.refused is None) == ("E314", False)


def test_only_as_many_are_used_as_are_needed() -> None:
    fed = cases.federation()
    come = replies_of(fed, plan_of(fed))
    bad = unused(0, "E311", "gone")
    assert [r.refused and r.code for r in enough([bad, *come[1:]], 1)] == ["E311", None, "E302"]
    assert [r.refused and r.code for r in enough(come, 1, always=(2,))] == [None, "E302", None]
    assert [r.refused for r in enough(come, None)] == [None] * 3


def test_a_refused_reply_leaves_no_trace_in_the_sums() -> None:
    """Each fault, against the same round without that client."""
    make = lambda: cases.federation(Scaffold(), cohort="all")  # noqa: E731
    (expected, _), *_ = survivors(make(), {(0, 2): "E311"}).run(1)

    class Only:
        def __init__(self, engine: Any, meets: str):
            self.name, self.reason, self.workers = engine.name, engine.reason, engine.workers
            self.engine, self.meets = engine, meets

        def replies(self, kind: Any, *asked: Any) -> Iterator[Reply]:
            from lamina.chaos import CONTENTS

            for reply in self.engine.replies(kind, *asked):
                yield CONTENTS[self.meets](reply, 0.5) if reply.client == 2 and kind == "round" else reply

        def close(self) -> None:
            self.engine.close()

    codes = {"nan": "E310", "scale": "E312", "shape": "E320", "type": "E321", "layer": "E322", "claim": "E314"}
    for meets, code in codes.items():
        fed = make().through(lambda engine, meets=meets: Only(engine, meets))
        ((state, record),) = fed.run(1)
        assert cases.learned(state)["params"] == cases.learned(expected)["params"], meets
        assert cases.bits(state.server) == cases.bits(expected.server)
        assert [c.refused for c in record.clients] == [None, None, code, None, None]
        (event,) = record.events
        assert (event["code"], event["client"]) == (code, "cyd")
        assert event["message"]
        assert event["remedy"]


def test_a_metric_that_is_not_a_number_is_left_out_and_its_message_used() -> None:
    fed = cases.federation(cohort="all", accuracy_before=True)

    class Odd(Chaotic):
        def _met(self, replies: Iterator[Reply], plan: Plan) -> Iterator[Reply]:
            for reply in replies:
                nan = {"score": torch.full((4,), math.nan, dtype=torch.float64)}
                yield reply._replace(message={**reply.message, "score": nan}) if reply.client == 2 else reply

    ((state, record),) = fed.through(lambda engine: Odd(engine, Chaos())).run(1)
    ((expected, plain),) = fed.run(1)
    assert cases.learned(state) == cases.learned(expected)
    assert record.accuracy_before is not None
    assert record.accuracy_before != plain.accuracy_before


# ---- faults


@pytest.mark.parametrize(
    ("table", "code"),
    [
        ({"min_replies": 0}, "E112"),
        ({"min_replies": 1.5}, "E112"),
        ({"min_replies": 4}, "E112"),
        ({"min_replies": True}, "E112"),
        ({"on_quorum": "wait"}, "E103"),
        ({"over_select": 0.9}, "E112"),
        ({"over_select": math.inf}, "E112"),
        ({"rest_rounds": -1}, "E112"),
        ({"rest_rounds": 1.5}, "E112"),
    ],
)
def test_faults_out_of_range_are_refused(table: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cases.federation(faults=table)
    assert caught.value.code == code
    assert next(iter(table)) in str(caught.value)


def test_a_share_of_the_cohort_is_rounded_up() -> None:
    """0.7 of 10 is 7, of 9 is 6.3 and so 7, of 3 is 2.1 and so 3; 1.0 is all, 1 is one."""
    assert [Faults(min_replies=0.7).needed(n) for n in (10, 9, 3)] == [7, 7, 3]
    assert [Faults(min_replies=1.0).needed(5), Faults(min_replies=1).needed(5)] == [5, 1]
    assert [Faults(over_select=1.3).asked(10, 100), Faults(over_select=1.3).asked(3, 100)] == [13, 4]
    assert Faults(over_select=3.0).asked(4, 5) == 5


def test_over_selection_of_everybody_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves nobody else"):
        cases.federation(cohort="all", faults={"over_select": 1.3})


def test_more_clients_are_asked_and_a_cohort_of_them_is_used() -> None:
    fed = cases.federation(cohort=3, faults={"over_select": 1.5})
    records = [record for _, record in fed.run(3)]
    for record in records:
        assert len(record.cohort) == 5  # 1.5 x 3 = 4.5
        order = sorted(record.cohort, key=lambda c: (-fed.local.count(int(fed.data.sizes[c])), c))
        assert [c.client for c in record.clients if c.refused is None] == sorted(order[:3])
        assert {c.refused for c in record.clients} == {None, "E302"}
        assert all(c.bytes_up > 0 for c in record.clients)  # they answered, so it is counted


def test_somebody_else_takes_the_place_of_one_that_fails() -> None:
    fed = cases.federation(cohort=3, faults={"over_select": 1.5})
    ((_, plain),) = fed.run(1)
    lost = next(c.client for c in plain.clients if c.refused is None)
    ((_, record),) = survivors(fed, {(0, lost): "E311"}).run(1)
    assert sum(c.refused is None for c in record.clients) == 3
    assert lost not in [c.client for c in record.clients if c.refused is None]


def dropped(fed: Federation, rounds: dict[int, set[int]]) -> Federation:
    return survivors(fed, {(t, c): "E311" for t, clients in rounds.items() for c in clients})


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "errorfeedback", "fedlama, scaffold", "stc", "fedadam", "ssfl"])
def test_a_skipped_round_changes_nothing_but_the_books(name: str) -> None:
    make = lambda: cases.case(name, cohort="all", faults={"min_replies": 0.7, "on_quorum": "skip"})  # noqa: E731
    pairs = list(dropped(make(), {1: {0, 3}}).run(3))
    before, after = pairs[0][0], pairs[1][0]
    for part in ("params", "buffers", "server"):
        assert cases.bits(getattr(after, part)) == cases.bits(getattr(before, part))
    rows = [{c: cases.bits(s.clients.get(c).row) for c in s.clients} for s in (before, after)]
    assert rows[0] == rows[1]
    assert after.round == before.round + 1
    record = pairs[1][1]
    assert [c.refused for c in record.clients] == ["E311", "E306", "E306", "E311", "E306"]
    assert record.bytes_up > 0
    (event,) = [e for e in record.events if e["code"] == "E306"]
    assert "3 of 5 messages were accepted, expected at least 4" in event["why"]
    assert math.isnan(record.train_loss)
    assert all(layer.update_norm is None for layer in record.layers.values())
    assert not [c for c in pairs[2][1].clients if c.refused]


def test_a_round_in_which_nobody_answers_is_skipped_too() -> None:
    fed = cases.federation(cohort="all", faults={"on_quorum": "skip"})
    pairs = list(dropped(fed, {0: {0, 1, 2, 3, 4}}).run(2))
    assert cases.bits(pairs[0][0].params) == cases.bits(fed.initial.params)
    assert [c.refused for c in pairs[1][1].clients] == [None] * 5


def test_too_few_end_the_run_unless_rounds_may_be_skipped() -> None:
    fed = cases.federation(cohort="all", faults={"min_replies": 0.7})
    with pytest.raises(RunError, match=r"3 of 5 messages were accepted, expected at least 4") as caught:
        list(dropped(fed, {1: {0, 3}}).run(3))
    assert caught.value.code == "E306"


def test_who_did_not_answer_rests() -> None:
    """Client 2 is silent in round 1, and with rest_rounds = 2 not asked in rounds 2 and 3."""
    fed = cases.federation(cohort="all", faults={"rest_rounds": 2})
    pairs = list(dropped(fed, {1: {2}}).run(5))
    asked = [2 in record.cohort for _, record in pairs]
    assert asked == [True, True, False, False, True]
    assert [dict(state.resting) for state, _ in pairs] == [{}, {2: 4}, {2: 4}, {}, {}]


def test_one_who_rests_is_replaced_by_another_who_is_drawn() -> None:
    fed = cases.federation(cohort=3, faults={"rest_rounds": 1})
    pairs = list(dropped(fed, {0: set(fed._drawn(0, {})[:1])}).run(2))
    silent = fed._drawn(0, {})[0]
    assert len(pairs[1][1].cohort) == 3
    assert silent not in pairs[1][1].cohort


def test_one_who_falls_silent_is_left_out_of_a_cohort_that_is_kept() -> None:
    """FedLAMA keeps its cohort for phi = 3 rounds: the others stay the same."""
    fed = cases.federation(FedLAMA(phi=3), cohort=3, faults={"rest_rounds": 1})
    first = fed._drawn(0, {})
    pairs = list(dropped(fed, {0: {first[0]}}).run(3))
    assert [record.cohort for _, record in pairs] == [first, first[1:], first]


def test_who_rests_is_in_the_checkpoint(tmp_path: Any) -> None:
    from lamina import checkpoint

    fed = cases.federation(cohort="all", faults={"rest_rounds": 2})
    state, _ = list(dropped(fed, {1: {2}}).run(2))[-1]
    again, _ = checkpoint.read(checkpoint.commit(state, tmp_path), fed)
    assert again.resting == {2: 4}


# ---- the same at the boundary to nodes


def test_the_first_who_answer_are_used_where_more_were_asked() -> None:
    fed, streets = network.connected(
        lambda **o: cases.case("fedavg", **{"cohort": 2, **o}), ((0, 3), (1, 2, 4)), faults={"over_select": 2.0}
    )
    ((_, record),) = fed.run(1)
    assert len(record.cohort) == 4
    assert sum(c.refused is None for c in record.clients) == 2
    assert {c.refused for c in record.clients} == {None, "E302"}
    assert streets.letters == 4


def test_answers_that_wait_for_their_turn_go_to_a_file_beyond_the_limit() -> None:
    from lamina.remote import Answer
    from lamina.remote.staging import Staging

    staged = Staging(limit=250)
    for client in range(5):
        staged.put(client, Answer("message", client, "plan", frame=bytes([client]) * 100))
    assert len(staged._held) == 2
    for client in (3, 0, 4, 2, 1):
        taken = staged.take(client)
        assert (taken.client, bytes(taken.frame)) == (client, bytes([client]) * 100)
    assert (staged._size, staged._file) == (0, None)
    staged.put(1, Answer("message", 1, "plan", frame=bytes(300)))
    staged.close()
    assert staged._file is None
