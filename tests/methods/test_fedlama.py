"""FedLAMA by hand, the paper's own communication costs, and what follows from its rule.

In the worked examples the server's two hooks are driven with the moments that a round would have brought.
"""

from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import lamina
from lamina.layers import layer_table
from lamina.method import Plan, Task
from lamina.methods.fedlama import relaxed
from lamina.models import femnist_cnn, mlp


def task(layers):
    return Task(layers, 4, 4, "examples", 0, 1, 0.1, 0.0, 0.0, None)


def bound(dims, **arguments):
    """The method on a model of one weight [1, dim] per layer, its parameters and its first state."""
    layers = [lamina.Layer(name, "linear", "weight", (1, dim)) for name, dim in dims.items()]
    params = {name: torch.zeros(1, dim, dtype=torch.float64) for name, dim in dims.items()}
    method = lamina.FedLAMA(**arguments).bind(task(layers))
    return method, params, method.init(params)


def asked(method, server, params, t, **more):
    plan = Plan(round=t, seed=0, params=params, buffers={}, upload=frozenset(params), lr=0.1, **more)
    return method.plan(server, plan)


def answered(method, server, plan, steps, spread):
    """The state after a round in which the clients' weights of each uploaded layer had this E|u - x|^2."""
    mean = {
        "update": {name: torch.zeros(1, dtype=torch.float64) for name in plan.upload},
        "moments": {name: torch.tensor(spread.get(name, 0.0), dtype=torch.float64) for name in plan.upload},
        "steps": {"steps": torch.tensor(steps, dtype=torch.float64)},
    }
    stepped, server = method.step(server, plan, mean)
    assert stepped is mean
    return server


# Which layers get the long interval


DIMS = {"l1": 100, "l2": 400, "l3": 1500, "l4": 2000}
D = {"l1": 8e-4, "l2": 4e-4, "l3": 1e-4, "l4": 2e-4}


@pytest.mark.parametrize(("phi", "cost"), [(2, 0.5625), (4, 0.34375)])
def test_the_prefix_includes_the_crossing_layer(phi, cost):
    """Ascending: l3, l4, l2, l1. d * dim = .15, .4, .16, .08, in all .79.

    delta = .1899, .6962, .8987, 1; 1 - lambda = .625, .125, .025, 0. They cross at l4: {l3, l4}, 7/8 of the entries,
    cost 1/8 + 7/8 / phi. Without the crossing layer it would be {l3}; by the printed delta < lambda {l3, l4, l2}.
    """
    assert relaxed(D, DIMS) == ["l3", "l4"]
    share = sum(DIMS[name] for name in relaxed(D, DIMS)) / sum(DIMS.values())
    assert 1 - share + share / phi == cost


def test_the_dense_kernel_of_the_femnist_cnn_is_relaxed_alone():
    """d * dim = 8e-4, .0256, .0642, .0254, so delta = .5536 at the dense kernel, where 1 - lambda = .0271."""
    dims = {"conv1": 800, "conv2": 51200, "fc1": 6422528, "fc2": 126976}
    d = {"conv1": 1e-6, "conv2": 5e-7, "fc1": 1e-8, "fc2": 2e-7}
    assert d["fc1"] * dims["fc1"] / sum(d[n] * dims[n] for n in d) == pytest.approx(0.5536, abs=5e-5)
    assert 1 - dims["fc1"] / sum(dims.values()) == pytest.approx(0.0271, abs=5e-5)
    assert relaxed(d, dims) == ["fc1"]


def test_ties_are_taken_in_model_order():
    """Three equal layers: lambda = delta = 1/3, 2/3, so the second one crosses."""
    assert relaxed({"b": 1.0, "a": 1.0, "c": 1.0}, {"a": 4, "b": 4, "c": 4}) == ["b", "a"]
    assert relaxed({"c": 1.0, "b": 1.0, "a": 1.0}, {"a": 4, "b": 4, "c": 4}) == ["c", "b"]
    assert relaxed({"z": 2.0, "y": 1.0, "x": 1.0}, {"x": 9, "y": 1, "z": 2}) == ["y", "x"]


def test_equal_discrepancies_relax_just_more_than_half_of_the_entries():
    """delta = lambda, so the prefix ends with the first lambda > 1/2: 1/4, 2/4, 3/4."""
    assert relaxed(dict.fromkeys("abcd", 2.0), dict.fromkeys("abcd", 8)) == ["a", "b", "c"]


def test_nothing_is_relaxed_where_nothing_differs():
    assert relaxed({"a": 0.0, "b": 0.0}, {"a": 1, "b": 5}) == []


def test_a_layer_that_does_not_differ_is_relaxed_with_the_next_one():
    """delta = 0, 1; 1 - lambda = 5/6, 0."""
    assert relaxed({"a": 1.0, "b": 0.0}, {"a": 5, "b": 1}) == ["b", "a"]


tables = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3),
    st.tuples(st.integers(0, 1000), st.integers(1, 10_000)),
    min_size=1,
    max_size=12,
)


def curves(d, dims):
    """delta and lambda over the layers by ascending d, exactly."""
    total, size = sum(d[n] * dims[n] for n in d), sum(dims.values())
    names = sorted(d, key=d.get)
    deltas = [Fraction(sum(d[n] * dims[n] for n in names[: i + 1]), total) for i in range(len(names))]
    lambdas = [Fraction(sum(dims[n] for n in names[: i + 1]), size) for i in range(len(names))]
    return names, deltas, lambdas


@settings(deadline=None)
@given(tables)
def test_the_prefix_ends_where_delta_crosses_1_minus_lambda(table):
    """delta never exceeds lambda, so more than half of the entries are relaxed, and all of them only if they must be.

    d and dim are whole numbers, so that the sums are exact; exact crossings are left out, where the quotients' last
    bit decides.
    """
    d, dims = {n: x for n, (x, _) in table.items()}, {n: x for n, (_, x) in table.items()}
    assume(any(d.values()))
    names, deltas, lambdas = curves(d, dims)
    assert all(delta <= lam for delta, lam in zip(deltas, lambdas, strict=True))
    assume(all(1 - lam != delta for delta, lam in zip(deltas, lambdas, strict=True)))
    crossing = next(i for i, (delta, lam) in enumerate(zip(deltas, lambdas, strict=True)) if 1 - lam < delta)
    chosen = relaxed({n: float(x) for n, x in d.items()}, dims)
    assert chosen == names[: crossing + 1]
    assert 2 * sum(dims[n] for n in chosen) > sum(dims.values())


@settings(deadline=None)
@given(tables, st.sampled_from([2.0**-20, 0.25, 2.0, 2.0**30]))
def test_the_prefix_does_not_depend_on_the_scale_of_d(table, factor):
    d, dims = {n: float(x) for n, (x, _) in table.items()}, {n: x for n, (_, x) in table.items()}
    assert relaxed({n: factor * x for n, x in d.items()}, dims) == relaxed(d, dims)


# The discrepancy


FOUR = torch.tensor([[1.0, 3.0], [3.0, 5.0], [2.0, 4.0], [6.0, 0.0]], dtype=torch.float64)


def message(x, start, p, steps):
    """What the server has of clients' weights x [clients, dim] that came from `start`."""
    u = x - start
    return {
        "update": {"w": (p[:, None] * u).sum(0, keepdim=True)},
        "moments": {"w": (p * (u**2).sum(1)).sum()},
        "steps": {"steps": torch.tensor(steps, dtype=torch.float64)},
    }


def discrepancy(x, *, start=(0.0, 0.0), p=None, steps=6.0, mask=None, before=()):
    """d after rounds of `before` steps in which the layer waited, and one in which it is due."""
    method, params, server = bound({"w": 2}, phi=4)
    p = torch.full((len(x),), 1 / len(x), dtype=torch.float64) if p is None else torch.tensor(p, dtype=torch.float64)
    for t, waiting in enumerate(before):
        server = answered(method, server, asked(method, server, params, t).keep(()), waiting, {})
    plan = asked(method, server, params, len(before), mask=mask)
    _, server = method.step(server, plan, message(x, torch.tensor(start, dtype=torch.float64), p, steps))
    return server.discrepancy["w"]


def test_discrepancy_per_entry_and_step():
    """u = (3, 3); squared distances 4, 4, 2, 18, mean 7. dim 2: 7 / (6 * 2) = 7/12, over 12 steps 7/24."""
    assert discrepancy(FOUR) == pytest.approx(7 / 12, rel=1e-15)
    assert discrepancy(FOUR, steps=12) == pytest.approx(7 / 24, rel=1e-15)


def test_discrepancy_counts_the_steps_of_the_rounds_in_which_the_layer_waited():
    assert discrepancy(FOUR, before=(6,)) == pytest.approx(7 / 24, rel=1e-15)
    assert discrepancy(FOUR, before=(2.5, 0.5)) == pytest.approx(7 / 18, rel=1e-15)


def test_discrepancy_takes_the_weights_of_the_clients():
    """Weights 1/2, 1/2, 0, 0: u = (2, 4), both at squared distance 2; 2 / (6 * 2) = 1/6."""
    assert discrepancy(FOUR, p=[0.5, 0.5, 0, 0]) == pytest.approx(1 / 6, rel=1e-15)


def test_discrepancy_does_not_depend_on_where_the_clients_started():
    """E|u|^2 - |Eu|^2 of the updates is that of the weights."""
    assert discrepancy(FOUR, start=(-2.0, 5.5)) == pytest.approx(7 / 12, rel=1e-14)


def test_discrepancy_under_a_lossy_uplink_is_that_of_what_was_received():
    """Updates (3, 1) and (1, 3) in one step; the largest entry travels: (3, 0) and (0, 3) around (3/2, 3/2).

    Both at squared distance 9/2: d = 9/2 / (1 * 2) = 9/4. Whole updates: (2, 2), distance 2, d = 1.
    """
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    clients = {"a": [[-3.0, -1.0]], "b": [[-1.0, -3.0]]}
    data = lamina.ClientData.from_clients({n: (torch.tensor(x).double(), torch.zeros(1)) for n, x in clients.items()})
    for uplink, expected in ((lamina.wire.TopK(0.5), 9 / 4), (lamina.wire.Dense(), 1)):
        fed = lamina.Federation(
            model, data, method=lamina.FedLAMA(), uplink=uplink, local=lamina.LocalSGD(lr=1.0, batch_size=None),
            loss=lambda output, target: output.mean(), engine="loop",
        )  # fmt: skip
        state, record = next(fed.run(1))
        assert state.server.discrepancy == pytest.approx({"weight": expected}, rel=1e-12)
        assert record.layers["weight"].discrepancy == pytest.approx(expected, rel=1e-12)


def test_discrepancy_under_a_mask_counts_kept_entries():
    """The second entry is masked: 1, 3, 2, 6 around 3, squares 4, 0, 1, 9, mean 7/2; dim 1: 7/2 / 6 = 7/12.

    Likewise as 0 and 1.
    """
    x = FOUR * torch.tensor([1.0, 0.0], dtype=torch.float64)
    for mask in (torch.tensor([[True, False]]), torch.tensor([[1.0, 0.0]])):
        assert discrepancy(x, mask={"w": mask}) == pytest.approx(7 / 12, rel=1e-15)


def test_discrepancy_of_equal_clients_is_zero_and_never_below():
    same = torch.tensor([[0.1, 0.7]], dtype=torch.float64).expand(3, 2)
    assert discrepancy(same, start=(1e-9, -1e9)) >= 0
    assert discrepancy(same, p=[1.0, 0, 0]) == 0


@pytest.mark.parametrize("factor", [1e-3, 0.5, 3.0])
def test_scaling_all_weights_scales_it_by_the_square(factor):
    assert discrepancy(factor * FOUR) == pytest.approx(factor**2 * 7 / 12, rel=1e-14)


def test_the_order_of_the_clients_does_not_matter():
    assert discrepancy(FOUR[[2, 0, 3, 1]]) == pytest.approx(7 / 12, rel=1e-15)


def test_kept_entries_are_the_sizes_of_the_prefix():
    """Equal d; a has 6 entries, of which a mask keeps 1, b has 4: lambda = 1/5 at a, so b is relaxed too.

    Without the mask lambda = 3/5 at a, and a is relaxed alone.
    """
    for mask, expected in ((None, {"a": 2, "b": 1}), ({"a": torch.tensor([[1.0] + [0.0] * 5])}, {"a": 2, "b": 2})):
        method, params, server = bound({"a": 6, "b": 4}, phi=2)
        entries = {"a": 6 if mask is None else 1, "b": 4}
        for t in range(2):
            plan = asked(method, server, params, t, mask=mask)
            server = answered(method, server, plan, 1.0, {n: 1.0 * k for n, k in entries.items()})
        assert server.interval == expected


# The intervals


def test_intervals_are_chosen_at_the_end_of_a_cycle_and_hold_for_the_next():
    """phi = 2, dims and d of the first example, one step a round.

    l3 and l4 wait in rounds 2 and 4; in round 3 they span two steps, so twice the squares give the same d. In round 3
    l1 differs least instead: d = (1, 4, 3, 3) e-4, ascending l1, l3, l4, l2: delta .0079, .3651, .8413 and
    1 - lambda .975, .6, .1: {l1, l3, l4} wait from then on.
    """
    method, params, server = bound(DIMS, phi=2)
    plans = []
    for t in range(6):
        plans.append(plan := asked(method, server, params, t))
        d = D if t < 3 else {"l1": 1e-4, "l2": 4e-4, "l3": 3e-4, "l4": 3e-4}
        steps = {name: 2 if t == 3 and name in ("l3", "l4") else 1 for name in DIMS}
        server = answered(method, server, plan, 1.0, {name: d[name] * DIMS[name] * steps[name] for name in DIMS})
        if t == 1:
            assert server.interval == {"l1": 1, "l2": 1, "l3": 2, "l4": 2}
        if t in (0, 2):
            assert server.interval == {"l1": 1, "l2": 1, "l3": 1 + (t == 2), "l4": 1 + (t == 2)}
        if t == 3:
            assert server.discrepancy == pytest.approx(d, rel=1e-12)
            assert server.interval == {"l1": 2, "l2": 1, "l3": 2, "l4": 2}
    everything = set(DIMS)
    expected = [everything, everything, {"l1", "l2"}, everything, {"l2"}, everything]
    assert [set(plan.upload) for plan in plans] == expected
    assert [plan.in_sync for plan in plans] == [True, True, False, True, False, True]


@pytest.mark.parametrize(
    ("phi", "warmup", "first"),
    [(2, 0, 2), (2, 1, 2), (2, 2, 4), (2, 3, 4), (2, 5, 6), (2, 6, 8), (4, 0, 4), (4, 3, 4), (4, 4, 8), (4, 6, 8)],
)
def test_intervals_first_change_at_the_end_of_the_cycle_that_passes_the_warmup(phi, warmup, first):
    method, params, server = bound(DIMS, phi=phi, warmup=warmup)
    changed = []
    for t in range(12):
        plan = asked(method, server, params, t)
        server = answered(method, server, plan, 1.0, {name: D[name] * DIMS[name] for name in DIMS})
        changed.append(max(server.interval.values()) > 1)
    assert changed.index(True) + 1 == first


@pytest.mark.parametrize("phi", [1, 2, 4])
def test_all_discrepancies_zero_make_all_intervals_1(phi):
    method, params, server = bound(DIMS, phi=phi)
    for t in range(2 * phi):
        spread = {name: D[name] * DIMS[name] for name in DIMS} if t < phi else {}
        server = answered(method, server, asked(method, server, params, t), 1.0, spread)
    assert server.interval == dict.fromkeys(DIMS, 1)


def test_layers_that_never_arrived_in_the_cycle_take_no_part_and_stay_at_1():
    """Without l4 (personal, say): delta .3846, .7949, 1 and 1 - lambda .25, ...: l3 is relaxed alone."""
    method, params, server = bound(DIMS, phi=2)
    for t in range(2):
        plan = asked(method, server, params, t).keep(["l1", "l2", "l3"])
        server = answered(method, server, plan, 1.0, {name: D[name] * DIMS[name] for name in DIMS})
    assert server.interval == {"l1": 1, "l2": 1, "l3": 2, "l4": 1}


def test_a_layer_that_arrived_in_an_earlier_cycle_only_takes_no_part():
    """As above, but l4 arrived in the first cycle and waited in the second."""
    method, params, server = bound(DIMS, phi=2)
    for t in range(4):
        plan = asked(method, server, params, t)
        plan = plan if t < 2 else plan.keep(["l1", "l2", "l3"])
        spread = {name: D[name] * DIMS[name] * (2 if t == 3 and name == "l3" else 1) for name in DIMS}
        server = answered(method, server, plan, 1.0, spread)
        if t == 1:
            assert server.interval == {"l1": 1, "l2": 1, "l3": 2, "l4": 2}
    assert server.interval == {"l1": 1, "l2": 1, "l3": 2, "l4": 1}


def test_a_layer_that_arrived_anywhere_in_the_cycle_takes_part():
    """l3 and l4 as in the first example, though l3 arrived in the first round of the cycle only."""
    method, params, server = bound(DIMS, phi=2)
    for t in range(2):
        plan = asked(method, server, params, t)
        plan = plan if t == 0 else plan.keep(["l1", "l2", "l4"])
        server = answered(method, server, plan, 1.0, {name: D[name] * DIMS[name] for name in DIMS})
    assert server.interval == {"l1": 1, "l2": 1, "l3": 2, "l4": 2}


COSTS = [  # phi, warmup, round after which the intervals first change, aggregations of the dense kernel, percent
    (2, 6, 8, 104, 53.3169),
    (4, 6, 8, 56, 29.9754),
    (2, 4, 6, 103, 52.8307),
    (2, 0, 2, 101, 51.8581),
]


@pytest.mark.parametrize(("phi", "warmup", "first", "times", "percent"), COSTS)
def test_communication_cost_of_the_femnist_cnn_is_the_papers(phi, warmup, first, times, percent):
    """Table 3 of the paper: 53.32, 29.98, 52.83 and 51.86 % of FedAvg, biases counted, 200 rounds of 10 steps.

    The dense kernel (6,422,528 of 6,603,710 parameters) differs least, so it alone is relaxed:
    e.g. phi = 2 from round 8 on: 8 + 192 / 2 = 104 of 200 times.
    """
    with torch.device("meta"):
        model = femnist_cnn()
    params = {name: p.detach() for name, p in model.named_parameters()}
    d = {"conv1.weight": 1e-6, "conv2.weight": 5e-7, "fc1.weight": 1e-8, "fc2.weight": 2e-7}
    method = lamina.FedLAMA(phi=phi, warmup=warmup).bind(task(layer_table(model)))
    server = method.init(params)
    assert list(server.interval) == list(d)
    times_of = dict.fromkeys(params, 0)
    waited = []
    for t in range(200):
        plan = asked(method, server, params, t)
        for name in plan.upload:
            times_of[name] += 1
        if not plan.in_sync:
            waited.append(t)
        spread = {name: x * 10 * server.interval[name] * params[name].numel() for name, x in d.items()}
        server = answered(method, server, plan, 10.0, spread)
        assert server.interval["fc1.weight"] == (phi if t + 1 >= first else 1)
    assert waited[0] == first
    assert times_of == {name: times if name == "fc1.weight" else 200 for name in params}
    sent = sum(n * params[name].numel() for name, n in times_of.items())
    cost = 100 * sent / (200 * 6_603_710)
    assert cost == pytest.approx(percent, abs=5e-5)


# The clients


def test_a_client_goes_on_with_what_waits_and_starts_a_cycle_from_the_global_model():
    method, params, _ = bound({"a": 1, "b": 1}, phi=2)
    own = {name: x + 5 for name, x in params.items()}
    plan = Plan(round=2, seed=0, params=params, buffers={}, upload=frozenset(["b"]), lr=0.1, in_sync=False)
    work = lamina.Work(own, {}, {}, torch.tensor(1))
    sent = {"update": {"b": own["b"]}}
    message, client = method.report(method.init_client(params), plan, work, sent)
    assert message is sent
    assert client.waiting == {"a": own["a"]}
    started = method.begin(client, Plan(**{**vars(plan), "round": 3}), params)
    assert started == {"a": own["a"], "b": params["b"]}
    assert method.begin(client, Plan(**{**vars(plan), "round": 4}), params) == params
    assert method.begin(method.init_client(params), Plan(**{**vars(plan), "round": 3}), params) == params


def federation(method, *, order=None, **kwargs):
    """Six clients of two to seven examples on a small network."""
    source = torch.Generator().manual_seed(5)
    clients = [
        (torch.randn(n, 4, generator=source).double(), torch.randint(3, (n,), generator=source)) for n in range(2, 8)
    ]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = mlp((4, 6, 5, 3)).double()
    picked = [clients[i] for i in order or range(6)]
    data = lamina.ClientData.from_clients({str(i): pair for i, pair in enumerate(picked)})
    return lamina.Federation(model, data, method=method, engine="loop",
                             **{"local": lamina.LocalSGD(lr=0.2, batch_size=2, momentum=0.5)} | kwargs)  # fmt: skip


@pytest.mark.parametrize("cohort", ["all", 2])
@pytest.mark.parametrize("codec", [lamina.wire.Dense(), lamina.wire.Dense("int8")], ids=repr)
def test_phi_1_is_fedavg_bit_for_bit(cohort, codec):
    ours = federation(lamina.FedLAMA(phi=1), cohort=cohort, uplink=codec).run(5)
    plain = federation(lamina.FedAvg(), cohort=cohort, uplink=codec).run(5)
    for (a, record), (b, expected) in zip(ours, plain, strict=True):
        assert a.sha256() == b.sha256()
        assert (record.bytes_up, record.bytes_down) == (expected.bytes_up, expected.bytes_down)


@pytest.mark.parametrize("phi", [2, 3, 4])
@pytest.mark.parametrize("cohort", ["all", 2])
def test_cost_lies_between_1_over_phi_and_1_and_everything_is_in_sync_after_every_cycle(phi, cohort):
    fed = federation(lamina.FedLAMA(phi=phi), cohort=cohort)
    rounds, times = 3 * phi, {}
    for t, (state, record) in enumerate(fed.run(rounds)):
        if (t + 1) % phi == 0:
            assert record.in_sync
            assert all(row.uploaded for row in record.layers.values())
            assert all(state.clients.get(c).row.method.waiting == {} for c in record.cohort)
        else:
            assert record.in_sync == (t < phi)
            waiting = {name for name, row in record.layers.items() if not row.uploaded}
            assert all(state.clients.get(c).row.method.waiting.keys() == waiting for c in record.cohort)
        for name, row in record.layers.items():
            times[name] = times.get(name, 0) + row.uploaded
            assert row.uploaded or (row.bytes_up == 0 and row.update_norm is None)
    dims = {name: x.numel() for name, x in state.params.items()}
    cost = sum(dims[name] * times[name] for name in dims) / (rounds * sum(dims.values()))
    assert 1 / phi <= cost < 1
    assert all(times[name] == rounds for name in dims if name.endswith("bias"))
    relaxed_ = {name for name in dims if times[name] < rounds}
    assert relaxed_
    assert all(times[name] >= rounds // phi + phi - 1 for name in relaxed_)  # the first cycle is full


def test_waiting_layers_of_the_global_model_do_not_move():
    fed = federation(lamina.FedLAMA(phi=4))
    before = fed.initial.params
    for state, record in fed.run(8):
        moved = {name for name, x in state.params.items() if not torch.equal(x, before[name])}
        assert moved == {name for name, row in record.layers.items() if row.uploaded}
        before = state.params


def test_the_cohort_stays_for_phi_rounds():
    cohorts = [record.cohort for _, record in federation(lamina.FedLAMA(phi=3), cohort=2).run(9)]
    assert all(cohorts[t] == cohorts[t - t % 3] for t in range(9))
    assert len({cohorts[0], cohorts[3], cohorts[6]}) > 1
    assert lamina.Chain(lamina.FedLAMA(phi=2), lamina.FedProx()).hold == 2


@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_the_order_of_the_clients_changes_nothing(weights):
    """Full batches, so that no client's data depend on its position."""
    local = lamina.LocalSGD(lr=0.2, batch_size=None, epochs=3)
    first = federation(lamina.FedLAMA(phi=2), local=local, weights=weights).run(6)
    other = federation(lamina.FedLAMA(phi=2), local=local, weights=weights, order=[4, 1, 5, 0, 3, 2]).run(6)
    for (a, _), (b, _) in zip(first, other, strict=True):
        assert a.server.interval == b.server.interval
        assert a.server.discrepancy == pytest.approx(b.server.discrepancy, rel=1e-9)
        for name, x in a.params.items():
            torch.testing.assert_close(x, b.params[name], rtol=1e-12, atol=1e-14)


def test_the_records_carry_the_intervals_in_force_and_the_discrepancies():
    in_force = {}
    for state, record in federation(lamina.FedLAMA(phi=2)).run(5):
        for name in state.server.interval:
            assert record.layers[name].interval == in_force.get(name, 1)
            if record.layers[name].uploaded:
                assert record.layers[name].discrepancy == pytest.approx(state.server.discrepancy[name], rel=1e-12)
        in_force = state.server.interval


# What is refused


@pytest.mark.parametrize("phi", [0, -1, 1.5, 2.0, "2", None])
def test_phi_must_be_a_whole_number(phi):
    with pytest.raises(lamina.ConfigError) as refused:
        lamina.FedLAMA(phi=phi)
    assert refused.value.message == f"phi={phi}: expected a whole number of rounds >= 1"


@pytest.mark.parametrize("warmup", [-1, 0.5])
def test_warmup_must_be_a_whole_number(warmup):
    with pytest.raises(lamina.ConfigError) as refused:
        lamina.FedLAMA(warmup=warmup)
    assert refused.value.message == f"warmup={warmup}: expected a whole number of rounds >= 0"


def test_a_model_without_weight_matrices_is_refused():
    data = lamina.ClientData.from_clients({"a": (torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))})
    with pytest.raises(lamina.ConfigError, match="schedules weight tensors with ndim > 1: the model has none"):
        lamina.Federation(nn.LayerNorm(3), data, method=lamina.FedLAMA())


@pytest.mark.parametrize("optimiser", [lamina.FedAdam(), lamina.FedYogi(), lamina.FedAdagrad(), lamina.FedAvgM()])
def test_a_server_optimiser_before_it_is_refused(optimiser):
    with pytest.raises(lamina.ConfigError) as refused:
        lamina.Chain(optimiser, lamina.FedLAMA())
    assert refused.value.code == "E115"
    fedlama = "FedLAMA(phi=2, warmup=0)"
    why = "it replaces the mean update before the other can read it"
    assert refused.value.message == f"{optimiser!r} before {fedlama}: {why}"
    assert refused.value.remedy == f"put {fedlama} before {optimiser!r}"
    assert lamina.Chain(lamina.FedLAMA(), optimiser).hold == 2
