"""FedLUAR by hand, the law of its draws, and what follows from its rule.

In the worked examples the server's two hooks are driven with the means that a round would have brought, and with the
layers that a draw would have chosen.
"""

import itertools
import math
from collections import Counter

import pytest
import torch
from from_scratch.fedluar import fedluar
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import DTYPES, PAIRS, assert_equal_rounds, examples, from_scratch, small_cnn, small_mlp, with_lamina
from torch import nn

import lamina
from lamina.method import Plan, Task
from lamina.methods.fedluar import drawn, odds
from lamina.models import mlp


def bound(values, **arguments):
    """The method on a model of one weight [1, 1] per value and a bias, its parameters and its first state."""
    params = {name: torch.tensor([[x]], dtype=torch.float64) for name, x in values.items()}
    layers = [lamina.Layer(name, "linear", "weight", (1, 1)) for name in values]
    layers.append(lamina.Layer("bias", "linear", "bias", (1,)))
    params["bias"] = torch.zeros(1, dtype=torch.float64)
    method = lamina.FedLUAR(**arguments).bind(Task(layers, 4, 4, "examples", 0, 1, 0.1, 0.0, 0.0, None))
    return method, params, method.init(params)


def asked(method, server, params, t, lr=0.1, **more):
    plan = Plan(round=t, seed=t, params=params, buffers={}, upload=frozenset(params), lr=lr, **more)
    return method.plan(server, plan)


def answered(method, server, plan, updates):
    """The parameters and the state after a round in which the mean update of each uploaded layer was this."""
    whole = {name: torch.full_like(x, updates.get(name, 0.0)) for name, x in plan.params.items()}
    mean = {"update": {name: whole[name] for name in plan.params if name in plan.upload}}
    mean, server = method.step(server, plan, mean)
    return plan.params | {name: plan.params[name] + u for name, u in mean["update"].items()}, server


def recycling(server, *names):
    """The state as if these layers had been drawn."""
    return server._replace(recycled=dict.fromkeys(names, 1))


# The rule


def test_a_scalar_layer_over_four_rounds():
    """x = 10. Round 0: the clients' mean is 10.5, so D = .5, s = .5/10 = .05 and x = 10.5.
    Rounds 1 and 2 recycle it: 11.0, 11.5; s stays .05.
    Round 3: the mean is 11.3, so D = -.2, s = .2/11.5 = .017391 (of x before the update) and x = 11.3.
    """
    method, params, server = bound({"w": 10.0, "other": 1.0})
    trace = []
    for t, mean in enumerate((10.5, None, None, 11.3)):
        server = recycling(server, *(["w"] if mean is None else []))
        plan = asked(method, server, params, t)
        assert plan.upload == set(params) - ({"w"} if mean is None else set())
        assert plan.in_sync
        params, server = answered(method, server, plan, {"w": (mean or math.nan) - params["w"].item(), "other": 0.5})
        trace.append((params["w"].item(), server.score["w"]))
    assert [x for x, _ in trace] == pytest.approx([10.5, 11.0, 11.5, 11.3], rel=1e-15)
    assert [s for _, s in trace] == pytest.approx([0.05, 0.05, 0.05, 0.2 / 11.5], rel=2e-7)  # 1e-6 beside ||x||
    assert round(trace[-1][1], 6) == 0.017391


def test_the_score_divides_by_the_norm_plus_1e_6():
    """x = 0, D = 3: s = 3/1e-6."""
    method, params, server = bound({"w": 0.0, "other": 1.0})
    _, server = answered(method, server, asked(method, server, params, 0), {"w": 3.0})
    assert server.score == pytest.approx({"w": 3e6, "other": 0.0})


@pytest.mark.parametrize("arriving", [7.0, math.inf, math.nan])
def test_a_recycled_layer_does_not_depend_on_what_arrives_for_it(arriving):
    for replay in (True, False):
        method, params, server = bound({"w": 10.0, "other": 1.0}, replay=replay)
        params, server = answered(method, server, asked(method, server, params, 0), {"w": 0.5, "other": 0.25})
        server = recycling(server, "w")
        plan = asked(method, server, params, 1)
        mean = {"update": {"w": torch.tensor([[arriving]]), "other": torch.tensor([[0.125]]).double()}}
        mean, after = method.step(server, plan, mean)
        assert after.score == {"w": server.score["w"], "other": 0.125 / (1.25 + 1e-6)}
        if replay:
            assert mean["update"]["w"] is after.updates["w"] is server.updates["w"]
        else:
            assert "w" not in mean["update"]


def test_dropping_leaves_the_layer_where_it_is():
    """As in the trace, without the replay: 10.5, 10.5, 10.5."""
    method, params, server = bound({"w": 10.0, "other": 1.0}, replay=False)
    for t in range(3):
        server = recycling(server, *(["w"] if t else []))
        params, server = answered(method, server, asked(method, server, params, t), {"w": 0.5, "other": 0.1})
        assert params["w"].item() == 10.5
        assert server.score["w"] == pytest.approx(0.05, rel=2e-7)
        assert server.updates == {}


def test_a_round_that_starts_from_a_shock_is_left_out_of_the_books():
    """Round 1 would score 5 / 10.5; the layer keeps .05, and what it repeats in round 2 is round 0's .5."""
    method, params, server = bound({"w": 10.0, "other": 1.0})
    params, first = answered(method, server, asked(method, server, params, 0), {"w": 0.5, "other": 0.1})
    plan = asked(method, recycling(first), params, 1, config={"shock": 0.5})
    params, server = answered(method, recycling(first), plan, {"w": 5.0, "other": -3.0})
    assert (server.score, server.updates) == (first.score, first.updates)
    assert server.recycled  # the draw goes on, by the scores of before
    params, _ = answered(method, recycling(server, "w"), asked(method, recycling(server, "w"), params, 2), {})
    assert params["w"].item() == 16.0


def test_nothing_is_recycled_before_a_round_without_a_shock():
    method, params, server = bound({"w": 10.0, "other": 1.0})
    plan = asked(method, server, params, 0, config={"shock": 0.5})
    _, server = answered(method, server, plan, {"w": 0.5, "other": 0.1})
    assert server == ({}, {}, {}, 0.1)


def test_a_lower_learning_rate_can_ask_for_a_full_round():
    """.1, .1, .01, .01: the third round is full, its draw counts again in the fourth."""
    for refresh in (False, True):
        method, params, server = bound({"a": 1.0, "b": 1.0, "c": 1.0}, recycle=2, refresh_on_lr_drop=refresh)
        withheld = []
        for t, lr in enumerate((0.1, 0.1, 0.01, 0.01, 0.1)):
            plan = asked(method, server, params, t, lr=lr)
            withheld.append(len(params) - len(plan.upload))
            moved, server = answered(method, server, plan, {"a": 0.5, "b": 0.25, "c": 0.125})
            fresh = set(plan.upload) - {"bias"}
            assert all(server.updates[name].item() == {"a": 0.5, "b": 0.25, "c": 0.125}[name] for name in fresh)
            params = moved
        assert withheld == ([0, 2, 0, 2, 2] if refresh else [0, 2, 2, 2, 2])


# Who is drawn


def test_the_odds_go_as_1_over_s():
    assert odds({"a": 0.5, "b": 0.25, "c": 2.0}) == {"a": 0.5, "b": 1.0, "c": 0.125}


def test_a_layer_that_did_not_move_counts_as_the_calmest_that_did():
    assert odds({"a": 0.5, "b": 0.0, "c": 0.25, "d": 0.0}) == {"a": 0.5, "b": 1.0, "c": 1.0, "d": 1.0}


def test_where_nothing_moved_all_are_equally_likely():
    assert odds({"a": 0.0, "b": 0.0}) == {"a": 1.0, "b": 1.0}


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=8), st.floats(1e-9, 1e9))
def test_the_odds_do_not_depend_on_the_scale_of_the_scores(scores, factor):
    before = odds(dict(enumerate(scores)))
    after = odds({i: factor * s for i, s in enumerate(scores)})
    assert after == pytest.approx(before, rel=1e-12)


def test_each_number_falls_into_the_odds_that_are_left():
    """Odds 1, 2, 1: edges .25, .75, 1. With .5 b is drawn; then a and c are left with edges .5, 1."""
    three = {"a": 1.0, "b": 2.0, "c": 1.0}
    assert drawn(three, [0.5]) == ["b"]
    assert drawn(three, [0.5, 0.49]) == ["b", "a"]
    assert drawn(three, [0.5, 0.5]) == ["b", "c"]
    assert drawn(three, [0.0, 0.0, 0.0]) == ["a", "b", "c"]
    assert drawn(three, [0.25, 0.999]) == ["b", "c"]
    assert drawn(three, []) == []
    assert drawn(three, [1 - 2**-53] * 3) == ["c", "b", "a"]  # the largest number that torch.rand gives in float64


def test_the_draws_follow_the_probabilities():
    """100,000 draws of two of four layers with p = 1/s normalised: P(i then j) = p_i p_j / (1 - p_i), 12 outcomes.

    Chi-square of 11 degrees of freedom exceeds 31.3 once in a thousand. Inclusions: P(i) = p_i + sum_j p_j p_i/(1-p_j).
    """
    scores = {"a": 0.1, "b": 0.02, "c": 0.4, "d": 0.05}
    whole = sum(1 / s for s in scores.values())
    p = {name: 1 / s / whole for name, s in scores.items()}
    n = 100_000
    source = torch.Generator().manual_seed(1)
    numbers = torch.rand(n, 2, dtype=torch.float64, generator=source).tolist()
    weights = odds(scores)
    seen = Counter(tuple(drawn(weights, pair)) for pair in numbers)
    expected = {(i, j): n * p[i] * p[j] / (1 - p[i]) for i, j in itertools.permutations(p, 2)}
    assert sum(expected.values()) == pytest.approx(n)
    assert seen.keys() == expected.keys()
    assert sum((seen[pair] - e) ** 2 / e for pair, e in expected.items()) < 31.3
    for i in p:
        inclusion = p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in p if j != i)
        found = sum(count for pair, count in seen.items() if i in pair) / n
        assert found == pytest.approx(inclusion, abs=4 * (inclusion * (1 - inclusion) / n) ** 0.5)


def test_the_draws_of_a_run_follow_its_seeds():
    """The rounds' own generators give 1/s too: p = 2/3, 1/3 over 3,000 rounds, within four deviations."""
    method, params, server = bound({"a": 1.0, "b": 1.0}, recycle=1)
    plan = asked(method, server, params, 0)
    counts = Counter()
    for seed in range(3000):
        round_ = Plan(**{**vars(plan), "seed": seed})
        counts.update(answered(method, server, round_, {"a": 0.1, "b": 0.2})[1].recycled)
    assert abs(counts["a"] / 3000 - 2 / 3) < 4 * (2 / 9 / 3000) ** 0.5


def test_uniform_choice_ignores_the_scores():
    method, params, server = bound({"a": 1.0, "b": 1.0}, choose="uniform")
    plan = asked(method, server, params, 0)
    counts = Counter()
    for seed in range(2000):
        round_ = Plan(**{**vars(plan), "seed": seed})
        counts.update(answered(method, server, round_, {"a": 1e-9, "b": 100.0})[1].recycled)
    assert abs(counts["a"] / 2000 - 1 / 2) < 4 * (1 / 4 / 2000) ** 0.5


moves = st.one_of(st.just(0.0), st.floats(-1e3, 1e3), st.sampled_from([1e-300, -1e300, math.inf, math.nan]))


@settings(deadline=None)
@given(st.data(), st.lists(st.tuples(moves, st.floats(-1e3, 1e3)), min_size=1, max_size=7), st.integers(0, 2**62))
def test_exactly_as_many_matrices_are_drawn_as_asked_for_whatever_the_numbers(data, pairs, seed):
    """Zero norms, huge ones and NaNs included; a layer whose mean is not finite is no candidate."""
    values = {f"w{i}": x for i, (_, x) in enumerate(pairs)}
    recycle = data.draw(st.integers(0, len(values) - 1))
    method, params, server = bound(values, recycle=recycle)
    plan = Plan(**{**vars(asked(method, server, params, 0)), "seed": seed})
    _, server = answered(method, server, plan, {f"w{i}": move for i, (move, _) in enumerate(pairs)} | {"bias": 7.0})
    finite = [name for name in values if name in server.score]
    assert all(math.isfinite(s) for s in server.score.values())
    assert all(bool(torch.isfinite(u).all()) for u in server.updates.values())
    assert {f"w{i}" for i, (move, _) in enumerate(pairs) if abs(move) < 1e9} <= set(finite) <= set(values)
    assert len(server.recycled) == min(recycle, max(0, len(finite) - 1))
    assert set(server.recycled) <= set(finite)
    assert "bias" not in server.score


@settings(deadline=None)
@given(st.lists(st.floats(1e-300, 1.0), min_size=1, max_size=12))
def test_no_number_below_1_falls_beyond_the_last_edge(shares):
    assert sorted(drawn(dict(enumerate(shares)), [1 - 2**-53] * len(shares))) == list(range(len(shares)))


@pytest.mark.parametrize("scores", [(5e-324, 1.7e308), (1e-308, 1e308, 1e308), (0.0, 5e-324), (1e300, 1e300)])
def test_scores_at_the_ends_of_float64_still_give_odds(scores):
    weights = odds(dict(enumerate(scores)))
    assert all(0 < share <= 1 for share in weights.values())
    assert sorted(drawn(weights, [0.3] * len(scores))) == list(range(len(scores)))


def test_a_layer_that_never_arrives_is_no_candidate_and_one_that_does_stays_fresh():
    """Three layers, one of them personal, recycle = 2: of the two that are left, one is recycled."""
    method, params, server = bound({"a": 1.0, "b": 1.0, "own": 1.0}, recycle=2)
    for t in range(20):
        plan = asked(method, server, params, t).keep(["a", "b", "bias"])
        _, server = answered(method, server, plan, {"a": 0.1, "b": 0.1, "own": 0.1})
        assert "own" not in {**server.score, **server.updates, **server.recycled}
        assert len(server.recycled) == 1


# Whole runs


def federation(method, *, norm=False, **kwargs):
    """Four clients on a small network of three weight matrices, with or without BatchNorm."""
    source = torch.Generator().manual_seed(5)
    clients = {
        str(n): (torch.randn(n, 4, generator=source).double(), torch.randint(3, (n,), generator=source))
        for n in range(4, 8)
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = mlp((4, 6, 5, 3)).double()
        if norm:
            model = nn.Sequential(nn.BatchNorm1d(4), model).double()
    return lamina.Federation(
        model,
        lamina.ClientData.from_clients(clients),
        method=method,
        engine="loop",
        **{"local": lamina.LocalSGD(lr=0.2, batch_size=2, momentum=0.5)} | kwargs,
    )


def withheld(record):
    return {name for name, row in record.layers.items() if not row.uploaded}


@pytest.mark.parametrize("recycle", [1, 2])
def test_the_first_round_is_full_and_then_so_many_matrices_are_not_uploaded(recycle):
    drawn_ever = set()
    for state, record in federation(lamina.FedLUAR(recycle=recycle)).run(8):
        assert record.in_sync
        assert len(withheld(record)) == (recycle if record.round else 0)
        assert all(name.endswith("weight") for name in withheld(record))
        for name in withheld(record):
            row = record.layers[name]
            assert (row.bytes_up, row.update_norm, row.divergence) == (0, None, None)
            assert row.bytes_down > 0  # it moves, so it is sent down
        assert len(state.server.recycled) == recycle
        drawn_ever |= withheld(record)
    assert len(drawn_ever) > recycle


def test_recycled_layers_repeat_their_stored_update_bit_for_bit():
    fed = federation(lamina.FedLUAR(recycle=2))
    (before, _), *rest = fed.run(6)
    for state, record in rest:
        for name in withheld(record):
            assert torch.equal(state.params[name], before.params[name] + before.server.updates[name])
            assert torch.equal(state.server.updates[name], before.server.updates[name])
            assert state.server.score[name] == before.server.score[name]
        before = state


def test_everything_else_is_fedavg_of_the_same_clients():
    """Round 0 is FedAvg's, so round 1 starts from the same model: what is not recycled ends where FedAvg's does."""
    settings = {"norm": True, "local": lamina.LocalSGD(lr=0.2, batch_size=None, epochs=3)}
    ours = list(federation(lamina.FedLUAR(recycle=2), **settings).run(2))
    plain = list(federation(lamina.FedAvg(), **settings).run(2))
    assert ours[0][0].sha256() == plain[0][0].sha256()
    recycled = withheld(ours[1][1])
    for name, x in (plain[1][0].params | plain[1][0].buffers).items():
        assert torch.equal(x, (ours[1][0].params | ours[1][0].buffers)[name]) == (name not in recycled), name


def test_recycling_dropping_and_averaging_end_in_different_models():
    methods = (lamina.FedLUAR(recycle=2), lamina.FedLUAR(recycle=2, replay=False), lamina.FedAvg())
    hashes = {next(itertools.islice(federation(m).run(3), 1, None))[0].sha256() for m in methods}
    assert len(hashes) == 3


def test_recycling_nothing_is_fedavg_bit_for_bit():
    ours, plain = federation(lamina.FedLUAR(recycle=0)).run(4), federation(lamina.FedAvg()).run(4)
    for (a, record), (b, expected) in zip(ours, plain, strict=True):
        assert a.sha256() == b.sha256()
        assert (record.bytes_up, record.bytes_down) == (expected.bytes_up, expected.bytes_down)


def test_it_saves_the_values_of_what_it_recycles_and_more():
    """Four clients, 8 bytes a value; besides them a tensor's entry in the frame and its moment."""
    plain = [r.bytes_up for _, r in federation(lamina.FedAvg()).run(4)]
    for state, record in federation(lamina.FedLUAR(recycle=2)).run(4):
        values = 4 * 8 * sum(state.params[name].numel() for name in withheld(record))
        assert plain[record.round] - record.bytes_up >= values
        assert (values > 0) == (record.round > 0)


def test_a_learning_rate_that_falls_in_steps_gives_full_rounds():
    local = lamina.LocalSGD(lr=0.2, batch_size=2, schedule=lambda t, rounds: 0.1 if t >= 3 else 1.0)
    runs = {r: federation(lamina.FedLUAR(recycle=2, refresh_on_lr_drop=r), local=local).run(5) for r in (False, True)}
    assert [len(withheld(record)) for _, record in runs[False]] == [0, 2, 2, 2, 2]
    assert [len(withheld(record)) for _, record in runs[True]] == [0, 2, 2, 0, 2]


# With others


def test_a_server_optimiser_takes_a_repeated_update_for_a_fresh_one():
    """FedAvgM with momentum 1/2 after it: m <- m/2 + D, for recycled layers with the stored raw D."""
    method, params, server = bound({"w": 10.0, "other": 1.0})
    chain = lamina.Chain(method, lamina.FedAvgM(momentum=0.5))
    state = (server, chain.methods[1].init(params))
    for t, expected in enumerate((10.5, 11.25, 12.125)):  # m = .5, .75, .875
        state = (recycling(state[0], *(["w"] if t else [])), state[1])
        params, state = answered(chain, state, asked(chain, state, params, t), {"w": 0.5 if t == 0 else math.nan})
        assert params["w"].item() == expected
    assert state[0].updates["w"].item() == 0.5


def test_a_dropped_layer_leaves_the_optimisers_moments_alone():
    method, params, server = bound({"w": 10.0, "other": 1.0}, replay=False)
    chain = lamina.Chain(method, lamina.FedAvgM(momentum=0.5))
    state = (server, chain.methods[1].init(params))
    for t in range(2):
        state = (recycling(state[0], *(["w"] if t else [])), state[1])
        params, state = answered(chain, state, asked(chain, state, params, t), {"w": 0.5})
    assert (params["w"].item(), state[1].m["w"].item()) == (10.5, 0.5)


def test_the_residuals_of_recycled_layers_stay_as_they_are():
    chain = lamina.Chain(lamina.ErrorFeedback(), lamina.FedLUAR(recycle=2))
    (before, _), *rest = federation(chain, uplink=lamina.wire.TopK(0.3)).run(5)
    for state, record in rest:
        for c in record.cohort:
            old, new = (s.clients.get(c).row.method[0].residual for s in (before, state))
            for name, x in new.items():
                assert torch.equal(x, old[name]) == (name in withheld(record)), name
        before = state


@pytest.mark.parametrize("swap", [False, True])
def test_what_follows_a_shock_of_lips_is_neither_scored_nor_stored(swap):
    """LIPS(every=2) fires after rounds 0, 2 and 4, so rounds 1, 3 and 5 start from a shock."""
    pair = [lamina.LIPS(every=2, rounds=6), lamina.FedLUAR(recycle=1)]
    chain = lamina.Chain(*(pair[::-1] if swap else pair))
    place = chain.methods.index(pair[1])
    before = chain.methods[place].init({})
    for state, record in federation(chain).run(6):
        after = state.server[place]
        fresh = {name for name, s in after.score.items() if s != before.score.get(name)}
        assert len(fresh) == (0 if record.round % 2 else 3 if record.round == 0 else 2)
        assert all(after.updates[name] is before.updates[name] for name in after.updates if name not in fresh)
        assert len(withheld(record)) == (record.round > 0)
        before = after


@pytest.mark.parametrize("swap", [False, True])
def test_it_is_refused_with_fedlama(swap):
    pair = [lamina.FedLAMA(), lamina.FedLUAR()]
    with pytest.raises(lamina.ConfigError, match="one that waits keeps training, one that is recycled") as refused:
        lamina.Chain(*(pair[::-1] if swap else pair))
    assert refused.value.code == "E115"


@pytest.mark.parametrize("optimiser", [lamina.FedAvgM(), lamina.FedAdam()])
def test_a_server_optimiser_before_it_is_refused(optimiser):
    with pytest.raises(lamina.ConfigError) as refused:
        lamina.Chain(optimiser, lamina.FedLUAR())
    assert refused.value.code == "E115"
    assert lamina.Chain(lamina.FedLUAR(), optimiser).withholds == "recycled"


# Against a plain loop


def compare_fedluar(method, model, clients, dtype, *, mine, **local):
    ours = with_lamina(method, model, clients, **local)
    theirs = from_scratch(fedluar, model, clients, **mine, **{k: v for k, v in local.items() if k != "schedule"})
    assert_equal_rounds(ours, [r.server for r in theirs], dtype)
    for (state, record), expected in zip(ours, theirs, strict=True):
        assert withheld(record) == set(expected.recycled), record.round
        assert state.server.score == pytest.approx(expected.s, rel=1e-10 if dtype == torch.float64 else 1e-4)
    return ours


@pytest.mark.parametrize("recycle", [1, 2])
@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), PAIRS)
def test_parity(dtype, weights, momentum, cohort, recycle):
    ours = compare_fedluar(lamina.FedLUAR(recycle=recycle), small_mlp(dtype), examples(dtype), dtype,
                           mine={"recycle": recycle}, weights=weights, momentum=momentum, cohort=cohort)  # fmt: skip
    assert len({frozenset(withheld(record)) for _, record in ours}) > 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [{"choose": "uniform"}, {"replay": False}], ids=str)
def test_parity_of_the_ablations(dtype, settings):
    compare_fedluar(lamina.FedLUAR(recycle=2, **settings), small_mlp(dtype), examples(dtype), dtype,
                    mine={"recycle": 2, **settings}, cohort=3, momentum=0.5)  # fmt: skip


def test_parity_with_batch_norm_weight_decay_and_clipping():
    compare_fedluar(lamina.FedLUAR(recycle=2), small_cnn(torch.float64), examples(torch.float64, (1, 5, 5)),
                    torch.float64, mine={"recycle": 2}, cohort=3, lr=0.03, weight_decay=0.05, clip=0.5)  # fmt: skip


@pytest.mark.parametrize("refresh", [False, True])
def test_parity_where_the_learning_rate_falls(refresh):
    def decay(t, rounds=None):
        return 1.0 if t < 4 else 0.1 if t < 7 else 0.5 if t < 9 else 0.05

    compare_fedluar(lamina.FedLUAR(recycle=2, refresh_on_lr_drop=refresh), small_mlp(torch.float64),
                    examples(torch.float64), torch.float64,
                    mine={"recycle": 2, "refresh": refresh, "decay": decay}, schedule=decay, cohort=3)  # fmt: skip


# What is refused


@pytest.mark.parametrize("recycle", [-1, 1.0, 0.5, "1", None, True])
def test_recycle_must_be_a_whole_number(recycle):
    with pytest.raises(lamina.ConfigError) as refused:
        lamina.FedLUAR(recycle=recycle)
    assert refused.value.message == f"recycle={recycle!r}: expected a whole number of layers >= 0"


@pytest.mark.parametrize("recycle", [3, 4])
def test_recycling_as_many_layers_as_there_are_is_refused_with_their_number(recycle):
    with pytest.raises(lamina.ConfigError) as refused:
        federation(lamina.FedLUAR(recycle=recycle))
    assert refused.value.message == (
        f"recycle={recycle}: expected at most 2; the model has 3 weight tensors with ndim > 1"
    )
    assert refused.value.remedy == "leave at least one of them to be uploaded"
    federation(lamina.FedLUAR(recycle=2))


def test_a_model_without_weight_matrices_is_refused():
    data = lamina.ClientData.from_clients({"a": (torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))})
    with pytest.raises(lamina.ConfigError, match="recycles weight tensors with ndim > 1: the model has none"):
        lamina.Federation(nn.LayerNorm(3), data, method=lamina.FedLUAR())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choose": "inversed"}, "choose='inversed': expected 'inverse' or 'uniform'"),
        ({"replay": "no"}, "replay='no': expected true or false"),
        ({"refresh_on_lr_drop": 1}, "refresh_on_lr_drop=1: expected true or false"),
    ],
)
def test_other_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(lamina.ConfigError) as refused:
        lamina.FedLUAR(**settings)
    assert refused.value.message == message
