"""FedDST: one readjustment by hand, what it sends, and against a plain loop."""

import math

import pytest
import torch
from from_scratch.feddst import feddst
from parity import PAIRS, ROUNDS, TOLERANCE, examples, from_scratch, small_mlp, with_lamina

import cases
import lamina
from lamina import FedDST, Plan, RandomMask, Work, wire
from lamina.aggregate import Mean
from lamina.methods.feddst import Server, elected, readjusted


def bits(*values):
    return torch.tensor(values, dtype=torch.bool)


X, MASK = torch.tensor([4.0, -3, 2, 0, 0, 0]), bits(1, 1, 1, 0, 0, 0)
PLAN = Plan(
    round=2, seed=0, params={"w": X}, buffers={}, upload=frozenset({"w"}), lr=0.1, mask={"w": MASK}
)  # fmt: skip
METHOD = FedDST(every=2, ratio=0.9, until=4)


def reply(w, grads):
    work = Work({"w": w}, {}, {"w": grads}, torch.tensor(1))
    message, _ = METHOD.report((), PLAN, work, {"update": {"w": w - X}})
    return message


def test_a_readjustment_of_two_clients():
    """x = (4 -3 2 | 0 0 0), the first three are kept. Round 2 of until=4: alpha = .9 / 2 * (1 + cos(pi / 2)) = .45,
    floor(.55 * 3) = 1 stays, 2 are exchanged.

    Client 1 (weight 1/4): w = (5 -1 3), keeps 5; gradients outside (.5 -2 1): regrows the last two.
    Client 2 (weight 3/4): w = (1 -7 2), keeps -7; gradients outside (3 -1 1): regrows the first, and of the equal ones
      the lower index.
    Shares of votes (1/4 3/4 0 3/4 1 1/4); sums of p m w (5/4 -21/4 0 0 0 0): W = (5 -7 0 0 0 0).
    Three are kept: -7, 5, and of the zeros the one with all votes.
    """
    first = reply(torch.tensor([5.0, -1, 3, 0, 0, 0]), torch.tensor([9.0, 9, 9, 0.5, -2, 1]))
    second = reply(torch.tensor([1.0, -7, 2, 0, 0, 0]), torch.tensor([0.0, 0, 0, 3, -1, 1]))
    assert first["votes"]["w"].tolist() == [1, 0, 0, 0, 1, 1]
    assert second["votes"]["w"].tolist() == [0, 1, 0, 1, 1, 0]
    assert first["update"]["w"].tolist() == [1, 0, 0, 0, 0, 0]  # who is left out of the sum needs no value
    mean = Mean(1.0)
    for message, p in ((first, 0.25), (second, 0.75)):
        mean.add("update", message["update"], p)
        mean.add("votes", message["votes"], p)
    result, server = METHOD.step(Server({"w": MASK}), PLAN, mean.result())
    assert (X + result["update"]["w"]).tolist() == [5, -7, 0, 0, 0, 0]
    assert server.mask["w"].tolist() == [1, 1, 0, 0, 1, 0]


def test_what_one_client_prunes_another_may_hold():
    """W of an entry is the mean of those who kept it: 6 where the only one says 6, not 6 * 1/4."""
    mean = {"update": {"w": torch.tensor([0.5, 0, 0, 0, 0, 0])}, "votes": {"w": torch.tensor([0.25, 1, 1, 0.75, 0, 0])}}
    result, server = METHOD.step(Server({"w": MASK}), PLAN, mean)
    assert (X + result["update"]["w"]).tolist() == [6, -3, 2, 0, 0, 0]
    assert server.mask["w"].tolist() == MASK.tolist()


def test_between_readjustments_nothing_but_the_update_is_sent():
    other = lamina.FedDST(every=5)
    message = {"update": {"w": X}}
    assert other.report((), PLAN, Work({}, {}, {}, torch.tensor(1)), message)[0] is message
    result, server = other.step(Server({"w": MASK}), PLAN, message)
    assert result["update"]["w"] is X
    assert server.mask["w"].tolist() == MASK.tolist()


def test_the_ratio_falls_along_a_cosine():
    """every=10, until=40: rounds 10, 20, 30 with (1 + cos(pi/4)) / 2, 1/2, (1 - cos(pi/4)) / 2 of the ratio."""
    method = FedDST(every=10, ratio=0.2, until=40)
    found = {t: a for t in range(60) if (a := method.exchanged(t))}
    half = math.cos(math.pi / 4)
    assert found == pytest.approx({10: 0.1 * (1 + half), 20: 0.1, 30: 0.1 * (1 - half)})


def test_any_readjustment_exchanges_at_least_one_entry_and_no_more_than_there_is_room_for():
    """floor(.999 * 3) = 2 of 3 stay. Of five entries with four kept, one is outside: one at most is exchanged."""
    w, g = torch.tensor([1.0, -2, 3, 0, 0]), torch.tensor([0.0, 0, 0, 1, 2])
    assert readjusted(w, g, bits(1, 1, 1, 0, 0), 0.001).tolist() == [0, 1, 1, 0, 1]
    assert readjusted(torch.tensor([1.0, 2, 3, 4, 0]), g, bits(1, 1, 1, 1, 0), 0.9).tolist() == [0, 1, 1, 1, 1]


def test_ties_go_to_votes_and_then_to_the_lower_index():
    w, share = torch.tensor([0.0, 0, -2, 2, 0, 1]), torch.tensor([0.0, 0.5, 0.1, 0.2, 0.5, 0])
    chosen = [elected(w, share, k).nonzero().flatten().tolist() for k in range(1, 7)]
    assert chosen == [[3], [2, 3], [2, 3, 5], [1, 2, 3, 5], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]


# ---- in a federation


def test_ratio_0_is_random_mask():
    ours, records = cases.finish(cases.federation(FedDST(0.4, every=1, ratio=0)), 4)
    plain, others = cases.finish(cases.federation(RandomMask(0.4)), 4)
    assert cases.bits(ours.params) == cases.bits(plain.params)
    assert records == others


def test_every_layer_keeps_its_count_and_the_mask_moves_in_readjustments_only():
    fed = cases.federation(FedDST(0.4, every=2, ratio=0.5, until=7), cohort="all")
    masks = [state.server.mask for state, _ in fed.run(10)]
    count = {name: int(m.sum()) for name, m in masks[0].items()}
    assert all({name: int(m.sum()) for name, m in mask.items()} == count for mask in masks)
    moved = {t for t in range(1, 10) if cases.bits(masks[t]) != cases.bits(masks[t - 1])}
    assert moved
    assert moved <= {2, 4, 6}


@pytest.mark.parametrize("model", ["small", "double"])
def test_weights_outside_the_mask_are_zero(model):
    local = lamina.LocalSGD(lr=0.1, momentum=0.9, weight_decay=0.05, batch_size=8)
    for state, _ in cases.federation(FedDST(0.3, every=2, ratio=0.6), model, local=local).run(6):
        assert all(not state.params[name][~m].any() for name, m in state.server.mask.items())


def test_votes_travel_as_bits_in_readjustments_only_and_the_new_mask_follows():
    """448, 35 and 20 entries: 56 + 5 + 3 bytes up, and as many down in the next round, with the headers of a tree."""
    fed = cases.federation(
        FedDST(0.3, every=2, ratio=0.6, layout="uniform"), model="small", cohort="all", diagnostics=False
    )
    for state, record in fed.run(6):
        up = {t.layer: t.bytes for t in record.traffic if t.direction == "up"}
        down = {t.layer: t.bytes for t in record.traffic if t.direction == "down"}
        size = len(wire.encode(state.server.mask, wire.Dense()))
        assert size - len(wire.encode({}, wire.Dense())) == 56 + 5 + 3
        assert up.get("_votes", 0) == (5 * size if record.round in (2, 4) else 0)
        assert ("_mask" in down) == (record.round in (0, 3, 5))
        kept = {name: int(m.sum()) for name, m in state.server.mask.items()}
        assert all(up[name] == 5 * 4 * k for name, k in kept.items())


@pytest.mark.parametrize(
    "other", [lamina.FedLAMA(), lamina.FedLUAR(), lamina.ErrorFeedback(), lamina.SSFL(), lamina.FedAdam()]
)
@pytest.mark.parametrize("before", [True, False])
def test_it_does_not_go_with(other, before):
    with pytest.raises(lamina.ConfigError) as refused:
        lamina.Chain(*((other, FedDST()) if before else (FedDST(), other)))
    assert refused.value.code == "E115"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"density": 0}, "density=0: expected 0 < density <= 1"),
        ({"every": 0}, "every=0: expected a whole number of rounds >= 1"),
        ({"ratio": 1}, "ratio=1: expected 0 <= ratio < 1"),
        ({"ratio": -0.1}, "ratio=-0.1: expected 0 <= ratio < 1"),
        ({"layout": "flat"}, "layout='flat': expected one of erk, uniform"),
        ({"until": 0}, "until=0: expected a whole number of rounds >= 1"),
        ({"until": 1.5}, "until=1.5: expected a whole number"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(lamina.ConfigError, match=said):
        FedDST(**settings)


# ---- against a plain loop


@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), PAIRS)
def test_parity(dtype, weights, momentum, cohort):
    mine = {"density": 0.4, "every": 2, "ratio": 0.6, "until": 8}
    settings = {"weights": weights, "momentum": momentum, "cohort": cohort}
    ours = with_lamina(FedDST(**mine, layout="uniform"), small_mlp(dtype), examples(dtype), **settings)
    theirs = from_scratch(feddst, small_mlp(dtype), examples(dtype), **mine, **settings)
    masks = []
    for (state, _), expected in zip(ours, theirs, strict=True):
        for name, positions in expected.masks.items():
            assert set(state.server.mask[name].flatten().nonzero().flatten().tolist()) == positions
        for name, x in state.params.items():
            torch.testing.assert_close(x, expected.server[name], **TOLERANCE[dtype])
        masks.append(cases.bits(state.server.mask))
    assert len(ours) == ROUNDS
    assert len({str(mask) for mask in masks}) >= 3
