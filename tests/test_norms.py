"""Bounds on the lengths of updates: worked by hand, their memory, and what they leave alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cases
import lamina
from lamina import checkpoint
from lamina.client import Reply
from lamina.norms import Bounds, Known, Policy
from lamina.robust import Median
from test_robust import federation, made


def reply(client: int, *, refused: str | None = None, trees: Any = None, **lengths: float) -> Reply:
    """One whose update has these lengths by layer, each along its first axis."""
    update = {name: torch.tensor([length, 0.0]) for name, length in lengths.items()}
    moments = {name: torch.tensor(length**2, dtype=torch.float64) for name, length in lengths.items()}
    return Reply(client, {"update": update, "moments": moments, **(trees or {})}, None, {}, 0.0, 1, refused)


def passed(policy: str, known: Known, *replies: Reply) -> tuple[list[Reply], Known]:
    bounds = Bounds(Policy.of(policy), known)
    through = list(bounds.through(iter(replies)))
    return through, bounds.after()


def lengths(replies: list[Reply], layer: str = "w") -> list[float]:
    return [round(float(r.message["update"][layer].norm()), 6) for r in replies if r.refused is None]


# ---- worked by hand


def test_a_fixed_bound() -> None:
    through, known = passed("fixed:2", {}, reply(0, w=1), reply(1, w=5))
    assert lengths(through) == [1, 2]
    assert known == {}


def test_the_first_round_is_bounded_by_its_own_median() -> None:
    """Lengths 1, 2, 3, 900: median 2.5, twice that is 5. Zeros (the last two) count in none."""
    through, known = passed("clip:2x", {}, *(reply(i, w=x) for i, x in enumerate((1, 2, 3, 900, 0, 0))))
    assert lengths(through) == [1, 2, 3, 5, 0, 0]
    assert known == {"w": (2.5,)}


def test_later_rounds_are_bounded_by_the_median_of_the_last_ten() -> None:
    """Medians 1 to 11, so 2 to 11 are remembered before this round: their median is 6.5, and 6.5 x 2 = 13."""
    known: Known = {}
    for t in range(1, 12):
        _, known = passed("clip:2x", known, reply(0, w=t), reply(1, w=t))
    assert known["w"] == tuple(range(2, 12))
    through, known = passed("clip:2x", known, reply(0, w=100), reply(1, w=12))
    assert lengths(through) == [13, 12]
    assert known["w"] == (*range(3, 12), 56)


def test_the_preset_cuts_to_the_median_and_refuses_eight_times_it() -> None:
    known = {"w": (1.0,), "v": (10.0,)}
    through, after = passed("median", known, reply(0, w=3, v=5), reply(1, w=1, v=81), reply(2, w=0.5, v=10))
    assert [r.client for r in through] == [0, 2, 1]  # who may be refused comes last
    assert [r.refused for r in through] == [None, None, "a norm of 81, expected at most 80, 8 times its running median"]
    assert (through[2].code, through[2].layer) == ("E312", "v")
    assert lengths(through) == [1, 0.5]
    assert lengths(through, "v") == [5, 10]
    assert after == {"w": (1.0, 1.0), "v": (10.0, 10.0)}  # the one that was refused is in the median, too


def test_a_burst_of_most_clients_is_cut_by_the_preset_and_refused_by_reject() -> None:
    """Two of three are 9 times the median; a learning rate has changed, or a shock was planned."""
    burst = [reply(0, w=9), reply(1, w=1), reply(2, w=9)]
    through, _ = passed("median", {"w": (1.0,)}, *burst)
    assert [r.client for r in through] == [1, 0, 2]
    assert lengths(through) == [1, 1, 1]
    through, _ = passed("reject:8x", {"w": (1.0,)}, *burst)
    assert [r.client for r in through if r.refused] == [0, 2]
    assert [r.client for r in through] == [0, 1, 2]


def test_half_of_the_clients_are_no_burst() -> None:
    through, _ = passed("median", {"w": (1.0,)}, reply(0, w=9), reply(1, w=1), reply(2, w=1), reply(3, w=9))
    assert [r.client for r in through if r.refused] == [0, 3]


def test_rejection_cuts_nothing() -> None:
    through, known = passed(
        "reject:3x", {}, reply(0, w=1), reply(1, w=2.9), reply(2, w=1), reply(3, w=1), reply(4, w=9)
    )
    assert lengths(through) == [1, 2.9, 1, 1]
    assert through[4].code == "E312"
    assert known == {"w": (1.0,)}


def test_an_adaptive_bound_follows_its_quantile() -> None:
    """It begins at the median of four, the second: 2. In the next round three of four are within 2, a quarter too many:
    2 exp(-0.2 (0.75 - 0.5))."""
    through, known = passed("adaptive:0.5", {}, *(reply(i, w=x) for i, x in enumerate((1, 2, 3, 4))))
    assert lengths(through) == [1, 2, 2, 2]
    assert known == {"w": (2.0,)}
    through, known = passed("adaptive:0.5", known, *(reply(i, w=x) for i, x in enumerate((1, 1.5, 2, 4))))
    assert lengths(through) == [1, 1.5, 2, 2]
    assert known["w"] == (pytest.approx(2 * math.exp(-0.05)),)


def test_an_adaptive_bound_ends_at_its_quantile() -> None:
    """Lengths 1 to 100 in every round, from a start far too high: nine tenths are within it at the end."""
    known: Known = {"w": (500.0,)}
    for _ in range(200):
        _, known = passed("adaptive:0.9", known, *(reply(i, w=i + 1) for i in range(100)))
    assert known["w"][0] == pytest.approx(90, abs=2)


# ---- what is bounded


def test_moments_are_those_of_what_is_used() -> None:
    """The client claims 1e30; its update has length 4, of which 2 is used."""
    liar = reply(0, w=4)
    liar.message["moments"]["w"] = torch.tensor(1e30, dtype=torch.float64)
    (through,), _ = passed("fixed:2", {}, liar)
    assert float(through.message["moments"]["w"]) == pytest.approx(4)


def test_a_methods_own_trees_are_bounded_and_buffers_are_not() -> None:
    trees = {"control": {"w": torch.tensor([3.0, 4.0])}, "buffers": {"running": torch.tensor([300.0])},
             "votes": {"w": torch.tensor([True])}}  # fmt: skip
    (through,), _ = passed("fixed:1", {}, reply(0, w=1, trees=trees))
    torch.testing.assert_close(through.message["control"]["w"], torch.tensor([0.6, 0.8]))
    assert float(through.message["buffers"]["running"]) == 300
    assert through.message["votes"]["w"].dtype == torch.bool


def test_a_reply_that_was_refused_goes_through_and_counts_in_no_median() -> None:
    bad = reply(1, w=math.nan, refused="w")
    through, known = passed("median", {}, reply(0, w=1), bad, reply(2, w=1))
    assert through[1] is bad or through[1].refused == "w"
    assert known == {"w": (1.0,)}


def test_a_message_that_is_no_tensors_waits_for_the_bounds_like_others() -> None:
    """It was refused by its type (E321); what is held back until the first bounds are known is copied."""
    odd = Reply(1, {"update": {"w": 5}}, None, {}, 0.0, 1, "expected a tensor", code="E321")  # type: ignore[dict-item]
    through, _ = passed("median", {}, reply(0, w=1), odd)
    assert [r.client for r in through] == [0, 1]
    assert through[1].code == "E321"


def test_messages_go_through_one_by_one_once_their_layers_are_known() -> None:
    """The first round has to wait for all; later ones, and layers that are all zero, do not."""
    asked: list[int] = []

    def coming(**layers: float) -> Iterator[Reply]:
        for i in range(3):
            asked.append(i)
            yield reply(i, **layers)

    next(Bounds(Policy.of("median"), {}).through(coming(w=1.0)))
    assert asked == [0, 1, 2]
    asked.clear()
    next(Bounds(Policy.of("median"), {"w": (1.0,)}).through(coming(w=1.0, still=0.0)))
    assert asked == [0]


def test_no_update_is_changed_in_place() -> None:
    mine = reply(0, w=4)
    passed("fixed:2", {}, mine)
    assert float(mine.message["update"]["w"][0]) == 4


@pytest.mark.parametrize(
    "said",
    ["on", "clip:8", "clip:0x", "clip:-1x", "fixed:nan", "fixed:", "adaptive:1", "adaptive:0", "reject:1x", "median:2"],
)
def test_what_is_no_policy_is_refused(said: str) -> None:
    with pytest.raises(lamina.ConfigError, match="E103") as caught:
        federation("mean", faults={"norm": said})
    assert caught.value.where == "faults.norm"


# ---- in a federation


QUICK = ("fedavg", "fedlama", "lips", "flare", "ssfl", "fedluar", "scaffold", "fedlama, scaffold")


@pytest.mark.parametrize("name", cases.the_rest_slowly(cases.ALL, QUICK))
def test_every_method_goes_with_bounds(name: str) -> None:
    """One that nothing reaches changes no bit; those that bite leave a model that is finite."""
    plain = cases.finish(cases.case(name))[0]
    assert cases.finish(cases.case(name, faults={"norm": "reject:1e9x"}))[0].sha256() == plain.sha256()
    if "ef21" not in name:
        assert cases.finish(cases.case(name, faults={"norm": "clip:1e9x"}))[0].sha256() == plain.sha256()
        for policy in ("median", "adaptive:0.5"):
            state, _ = cases.finish(cases.case(name, faults={"norm": policy}))
            assert all(torch.isfinite(x).all() for x in state.params.values())


@pytest.mark.parametrize("policy", ["fixed:1e9", "clip:1e9x", "reject:1e9x"])
@pytest.mark.parametrize("method", [None, lamina.FedLAMA(phi=2), lamina.Scaffold()], ids=repr)
def test_a_bound_that_nothing_reaches_changes_no_bit(policy: str, method: Any) -> None:
    plain = list(federation("mean", method).run(3))
    bounded = list(federation("mean", method, faults={"norm": policy}).run(3))
    assert plain[-1][0].sha256() == bounded[-1][0].sha256()
    for (_, a), (_, b) in zip(plain, bounded, strict=True):
        assert {n: row._replace(clipped=None) for n, row in b.layers.items()} == a.layers


@pytest.mark.parametrize("policy", ["median", "clip:0.5x", "adaptive:0.5", "reject:1.5x", "fixed:0.05"])
def test_engines_agree(policy: str) -> None:
    loop = made(federation("mean", faults={"norm": policy}))
    processes = made(federation("mean", faults={"norm": policy}, engine="processes", workers=2))
    stacked = made(federation("mean", faults={"norm": policy}, engine="stacked", workers=1))
    assert (loop.sha256(), loop.norms) == (processes.sha256(), processes.norms)
    for name, x in loop.params.items():
        torch.testing.assert_close(stacked.params[name], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["median", "adaptive:0.3"])
def test_what_is_remembered_is_in_the_checkpoint(policy: str, tmp_path: Path) -> None:
    def fed() -> lamina.Federation:
        return federation("mean", lamina.Scaffold(), faults={"norm": policy})

    whole = made(fed(), 5)
    half = made(fed(), 2)
    again, _ = checkpoint.read(checkpoint.commit(half, tmp_path), fed())
    assert again.norms == half.norms
    resumed = list(fed().run(3, again))[-1][0]
    assert (resumed.sha256(), resumed.norms) == (whole.sha256(), whole.norms)


def test_records_say_how_often_a_layer_was_cut() -> None:
    """Of six lengths three exceed their median."""
    _, record = next(iter(federation("mean", faults={"norm": "clip:1x"}).run(1)))
    assert {row.clipped for row in record.layers.values()} == {0.5}
    _, record = next(iter(federation("mean").run(1)))
    assert {row.clipped for row in record.layers.values()} == {None}


def test_a_refused_client_is_in_the_events_with_its_layer() -> None:
    records = [record for _, record in federation("mean", faults={"norm": "reject:1.2x"}).run(3)]
    event = next(event for record in records for event in record.events)
    assert event["code"] == "E312"
    assert event["layer"] in records[0].layers
    assert "1.2 times its running median" in event["why"]


@pytest.mark.parametrize("aggregate", ["mean", Median()], ids=repr)
def test_ef21_takes_no_part_of_a_message(aggregate: Any) -> None:
    """Its server has to add up what its clients think they sent."""
    faults = {"norm": "median" if aggregate == "mean" else "off"}
    with pytest.raises(lamina.ConfigError, match="E115"):
        federation(aggregate, lamina.EF21(), faults=faults)
    made(federation("mean", lamina.EF21(), faults={"norm": "reject:1.5x"}))


def test_a_chain_is_looked_through() -> None:
    with pytest.raises(lamina.ConfigError, match="EF21"):
        federation("mean", lamina.Chain(lamina.EF21(), lamina.FedAvgM()), faults={"norm": "median"})
