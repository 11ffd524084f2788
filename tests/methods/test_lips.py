"""LIPS by hand: its schedule, its masks, and what a shock does to a round."""

import math
import re

import pytest
import torch
from from_scratch.fedavg import fedavg
from from_scratch.lips import lips
from parity import PAIRS, ROUNDS, assert_equal_rounds, examples, from_scratch, small_cnn, small_mlp, with_lamina
from torch import nn

import lamina
from lamina.layers import layer_table
from lamina.method import Plan, Task
from lamina.methods.lips import Client, pruned
from lamina.models import mlp, resnet6, resnet8


def bound(model, **arguments):
    task = Task(layer_table(model), 4, 4, "examples", 0, 1, 0.1, 0.0, 0.0, None)
    return lamina.LIPS(**arguments).bind(task)


def plan(params, t=0, **more):
    return Plan(round=t, seed=0, params=params, buffers={}, upload=frozenset(params), lr=0.1, **more)


def shocks(method, rounds, waiting=()):
    """Round -> density of the shock at its start, in a run in which these rounds leave layers waiting."""
    server = method.init({})
    found = {}
    for t in range(rounds):
        asked = method.plan(server, plan({}, t, in_sync=t not in waiting))
        if "shock" in asked.config:
            found[t] = asked.config["shock"]
        mean = {"update": {}}
        same, server = method.step(server, asked, mean)
        assert same is mean
    return found


# When (L1, L2)


@pytest.mark.parametrize(
    ("density", "every", "some", "count", "mean", "overall"),
    [
        (0.5, 5, {0: 0.5, 5: 0.50833, 150: 0.75, 295: 0.99167}, 60, 0.74583, 0.94917),
        (0.3, 5, {0: 0.3, 5: 0.31167, 150: 0.65, 295: 0.98833}, 60, 0.64417, 0.92883),
        (0.1, 10, {0: 0.1, 10: 0.13, 150: 0.55, 290: 0.97}, 30, 0.535, 0.9535),
    ],
)
def test_the_density_rises_linearly_to_one(density, every, some, count, mean, overall):
    """d = density + (1 - density) * r / 300 for r = 0, every, ...; each falls one round later."""
    found = shocks(bound(small_mlp(torch.float32), density=density, every=every, rounds=300), 301)
    assert list(found) == [r + 1 for r in range(0, 300, every)]
    for r, d in some.items():
        assert found[r + 1] == pytest.approx(d, abs=5e-6)
    assert len(found) == count
    assert sum(found.values()) / count == pytest.approx(mean, abs=5e-6)
    assert (sum(found.values()) + 300 - count) / 300 == pytest.approx(overall, abs=5e-6)


def test_after_its_rounds_there_are_no_shocks():
    assert shocks(bound(small_mlp(torch.float32), every=2, rounds=4), 20) == {1: 0.5, 3: 0.75}


def test_a_long_interval_does_not_switch_it_off():
    """The shock of round 0 falls whatever `every` is; only density = 1 is FedAvg."""
    assert shocks(bound(small_mlp(torch.float32), every=1000), 50) == {1: 0.5}
    assert shocks(bound(small_mlp(torch.float32), density=1.0, every=1), 50) == {}


def test_a_shock_that_is_due_waits_for_a_round_in_sync_and_keeps_its_density():
    """every = 4, rounds = 8: due after rounds 0 and 4 with 1/2 and 3/4. Rounds 0, 1, 3 and 4 leave layers waiting, so
    the first falls after round 2, at the start of 3, the second after round 5, at the start of 6."""
    method = bound(small_mlp(torch.float32), every=4, rounds=8)
    assert shocks(method, 8, waiting={0, 1, 3, 4}) == {3: 0.5, 6: 0.75}


def test_a_newer_shock_takes_the_place_of_one_that_waits():
    """Due after rounds 0 and 2 with 1/2 and 5/8; the first round in sync is 3."""
    assert shocks(bound(small_mlp(torch.float32), every=2, rounds=8), 5, waiting={0, 1, 2}) == {4: 0.625}


def test_a_run_of_another_length_warns():
    with pytest.warns(UserWarning, match="plans 300 rounds, this run has 2"):
        with_lamina(lamina.LIPS(), small_mlp(torch.float32), examples(torch.float32), rounds=2)


@pytest.mark.parametrize(
    ("method", "key"),
    [
        (lamina.LIPS(), "method.rounds=2"),
        (lamina.Chain(lamina.FedProx(0.1), lamina.LIPS()), "method.1.rounds=2"),
    ],
)
def test_the_warning_names_the_setting_as_one_types_it(method, key):
    with pytest.warns(UserWarning, match=rf"this run has 2: .*, {re.escape(key)}, in Python LIPS\(rounds=2\)"):
        with_lamina(method, small_mlp(torch.float32), examples(torch.float32), rounds=2)


# What (L3, L4)


W = torch.tensor([0.5, -0.2, 0.1, -0.8, 0.06, 0.3])
G = torch.tensor([0.1, -0.5, 0.9, 0.01, 1.0, -0.25])


def begun(client, score="saliency", density=0.5, mask=None):
    """What the middle one of three weights starts from, W."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 2, bias=False), nn.Linear(2, 2))
    params = {name: x.detach().clone() for name, x in model.named_parameters()}
    params["1.weight"] = W.reshape(2, 3)
    method = bound(model, score=score)
    shocked = plan(params, 1, config={"shock": density}, mask=None if mask is None else {"1.weight": mask})
    start = method.begin(client, shocked, params)
    assert all(start[name] is x for name, x in params.items() if name != "1.weight")
    return start["1.weight"].reshape(-1)


def test_a_client_keeps_the_most_sensitive_half():
    """|g w| = .05, .10, .09, .008, .06, .075; the three largest are the 2nd, the 3rd and the 6th."""
    start = begun(Client({"1.weight": G.reshape(2, 3)}, {}))
    assert torch.equal(start, torch.tensor([0, -0.2, 0.1, 0, 0, 0.3]))


def test_a_client_that_never_trained_keeps_the_largest_half():
    """|w|: the 1st, the 4th and the 6th, as score="magnitude" has it for everybody."""
    expected = torch.tensor([0.5, 0, 0, -0.8, 0, 0.3])
    assert torch.equal(begun(Client({}, {})), expected)
    assert torch.equal(begun(Client({}, {}), "magnitude"), expected)


def test_magnitude_keeps_no_gradients():
    model = small_mlp(torch.float32)
    params = {name: x.detach() for name, x in model.named_parameters()}
    work = lamina.Work(params, {}, params, torch.tensor(1))
    for score, kept in (("saliency", {"fc2.weight"}), ("magnitude", set())):
        method = bound(model, score=score)
        _, client = method.report(method.init_client(params), plan(params), work, {"update": {}})
        assert client.grads.keys() == kept
        assert client.own == {}


def test_ties_stay_at_the_lower_flat_index_and_the_number_is_rounded_down():
    """floor(7 * 0.5) = 3, floor(7 * 0.99) = 6, floor(7 * 0.1) = 0."""
    w = torch.tensor([1.0, -1, 1, -1, 1, -1, 1])
    for density, left in ((0.5, 3), (0.99, 6), (0.1, 0)):
        assert pruned(w, w.abs(), density, None).nonzero().reshape(-1).tolist() == list(range(left))


def test_under_a_mask_only_kept_entries_are_counted_and_compete():
    """The mask keeps the 1st, the 3rd, the 5th and the 6th: two of four stay, .09 and .075, the 3rd and the 6th."""
    mask = torch.tensor([[True, False, True], [False, True, True]])
    start = begun(Client({"1.weight": G.reshape(2, 3)}, {}), mask=mask)
    assert torch.equal(start, torch.tensor([0, 0, 0.1, 0, 0, 0.3]))


class Watch(lamina.LIPS):
    """Writes down what clients start from, and what they have after one step."""

    starts: list
    steps: list

    def begin(self, client, plan, params):
        start = super().begin(client, plan, params)
        Watch.starts.append((plan, start))
        return start

    def correct(self, client, plan, step, params, grads):
        if int(step) == 1:
            Watch.steps.append((plan.round, {name: x.clone() for name, x in params.items()}))
        return grads


def smooth_mlp(dtype):
    """No unit of it is ever dead, so no weight of it is ever 0 but for a shock."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return mlp((6, 8, 5, 3), activation="tanh").to(dtype)


def watched(score):
    Watch.starts, Watch.steps = [], []
    method = Watch(density=0.4, every=2, rounds=6, score=score)
    with_lamina(method, smooth_mlp(torch.float32), examples(torch.float32), rounds=6, epochs=2)
    return Watch.starts, Watch.steps


@pytest.mark.parametrize("score", ["saliency", "magnitude"])
def test_in_a_shock_round_the_chosen_layer_is_pruned_to_its_density_and_nothing_else(score):
    """The middle layer has 40 weights; d = 2/5, 3/5, 4/5 at the starts of rounds 1, 3 and 5."""
    starts, _ = watched(score)
    for asked, start in starts:
        left = {1: 16, 3: 24, 5: 32}.get(asked.round, 40)
        assert int(start["fc2.weight"].count_nonzero()) == left
        stays = start["fc2.weight"] != 0
        assert torch.equal(start["fc2.weight"][stays], asked.params["fc2.weight"][stays])
        assert all(torch.equal(start[n], x) for n, x in asked.params.items() if n != "fc2.weight")
    masks = [tuple((s["fc2.weight"] != 0).flatten().tolist()) for p, s in starts if p.round == 1]
    assert len(masks) == 7
    assert len(set(masks)) == (7 if score == "saliency" else 1)


def test_what_was_pruned_grows_again_in_one_step():
    """Sparsity is transient (L5): 16 of 40 weights at the start, all of them after one step."""
    starts, steps = watched("saliency")
    before = [int(start["fc2.weight"].count_nonzero()) for asked, start in starts if asked.round == 1]
    after = [int(w["fc2.weight"].count_nonzero()) for t, w in steps if t == 1]
    assert before == [16] * 7
    assert after == [40] * 7


def test_without_local_training_the_model_shrinks_to_the_mean_of_the_masks():
    """Learning rate 0 (L6): w after the shock = mean_k(mask_k) * w, so some entries keep a share, some vanish."""
    Watch.starts, Watch.steps = [], []
    method = Watch(density=0.4, every=9, rounds=2)
    clients = examples(torch.float64)
    (first, _), (second, _) = with_lamina(
        method, small_mlp(torch.float64), clients, rounds=2, weights="uniform", schedule=lambda t, rounds: 0.0
    )
    masks = [(s["fc2.weight"] != 0).double() for p, s in Watch.starts if p.round == 1]
    share = torch.stack(masks).mean(0)
    assert share.sum().item() == pytest.approx(16)
    assert len(share.unique()) > 2
    w = first.params["fc2.weight"]
    torch.testing.assert_close(second.params["fc2.weight"], share * w, rtol=1e-14, atol=1e-16)
    assert all(torch.equal(second.params[n], x) for n, x in first.params.items() if n != "fc2.weight")


def test_batches_are_those_of_fedavg():
    """No random number is drawn (L7): the labels come in the same order."""

    def labels(method):
        seen = []

        def loss(output, target):
            seen.append(target.tolist())
            return nn.functional.cross_entropy(output, target)

        given = {f"client {i}": pair for i, pair in enumerate(examples(torch.float32))}
        local = lamina.LocalSGD(lr=0.1, batch_size=4)
        fed = lamina.Federation(
            small_mlp(torch.float32), lamina.ClientData.from_clients(given), method=method, local=local, loss=loss,
            cohort=3, engine="loop",
        )  # fmt: skip
        states = [state for state, _ in fed.run(4)]
        return seen, states[-1].sha256()

    (ours, sha), (plain, other) = labels(lamina.LIPS(every=1, rounds=4)), labels(lamina.FedAvg())
    assert ours == plain
    assert sha != other


def test_only_a_round_with_a_shock_costs_bytes_and_only_a_few():
    """One more number in the plan of rounds 1 and 3, for each of seven clients."""
    clients = examples(torch.float32)
    ours = with_lamina(lamina.LIPS(every=2, rounds=5), small_mlp(torch.float32), clients, rounds=5)
    plain = with_lamina(lamina.FedAvg(), small_mlp(torch.float32), clients, rounds=5)
    more = [a.bytes_down - b.bytes_down for (_, a), (_, b) in zip(ours, plain, strict=True)]
    assert more[0] == more[2] == more[4] == 0
    assert more[1] == more[3]
    assert more[1] == 7 * 14
    assert [a.bytes_up for _, a in ours] == [b.bytes_up for _, b in plain]


# Which layers


def chosen(model, **arguments):
    """Names of the tensors that a shock changes."""
    params = {name: x.detach() + 1.0 for name, x in model.named_parameters()}
    start = bound(model, **arguments).begin(Client({}, {}), plan(params, 1, config={"shock": 0.5}), params)
    return [name for name, x in params.items() if not torch.equal(start[name], x)]


@pytest.mark.parametrize(
    ("make", "layers", "weights", "whole"), [(resnet6, 5, None, 314_954), (resnet8, 8, 1_220_608, 1_235_274)]
)
def test_of_a_resnet_every_convolution_but_the_stem_is_pruned(make, layers, weights, whole):
    """The papers' models: 1x1 shortcuts are pruned too, classifier, biases and norm parameters are not."""
    model = make(10, width=64, stem="7x7")
    assert sum(x.numel() for x in model.parameters()) == whole
    names = chosen(model)
    sizes = dict(model.named_parameters())
    assert len(names) == layers
    assert all(sizes[name].dim() == 4 for name in names)
    assert next(name for name, x in sizes.items() if x.dim() == 4) not in names
    if weights is not None:
        assert sum(sizes[name].numel() for name in names) == weights


def test_middle_is_every_weight_tensor_but_the_first_and_the_last():
    assert chosen(mlp((4, 6, 6, 6, 2))) == ["fc2.weight", "fc3.weight"]
    assert chosen(mlp((4, 6, 6, 6, 2)), layers="middle") == ["fc2.weight", "fc3.weight"]
    assert chosen(small_cnn(torch.float32), layers="middle") == ["3.weight"]
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(2, 6), nn.Linear(6, 2))
    assert chosen(model) == chosen(model, layers="conv") == ["1.weight"]
    assert chosen(model, layers="middle") == ["1.weight", "3.weight"]


def test_one_convolution_is_no_conv_model():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 6), nn.Linear(6, 2))
    assert chosen(model) == ["2.weight"]
    with pytest.raises(lamina.ConfigError, match=r"every Conv2d but the first: this model has 1") as refused:
        bound(model, layers="conv")
    assert "layers='middle'" in refused.value.remedy


@pytest.mark.parametrize("layers", ["auto", "conv", "middle"])
@pytest.mark.parametrize(("model", "count"), [(nn.Linear(2, 2), 1), (mlp((4, 3, 2)), 2), (nn.BatchNorm1d(3), 0)])
def test_a_model_with_fewer_than_three_layers_is_refused(model, count, layers):
    with pytest.raises(lamina.ConfigError, match=rf"three or more weight tensors .* this model has {count}") as refused:
        bound(model, layers=layers)
    assert refused.value.code == "E117"
    assert '"model.widths=[64,64,64,10]"' in refused.value.remedy
    assert "mlp((64, 64, 64, 10))" in refused.value.remedy


def test_the_model_that_the_refusal_names_is_taken():
    assert chosen(mlp((64, 64, 64, 10))) == ["fc2.weight"]


# norm_sync="local"


def local_norm(method, rounds=4, buffers="average", **more):
    clients = examples(torch.float32, (1, 5, 5))
    given = {f"client {i}": pair for i, pair in enumerate(clients)}
    fed = lamina.Federation(
        small_cnn(torch.float32), lamina.ClientData.from_clients(given, test=clients[0]), method=method,
        local=lamina.LocalSGD(lr=0.03, batch_size=4), engine="loop", buffers=buffers, **more,
    )  # fmt: skip
    return fed, list(fed.run(rounds))


def test_norm_parameters_and_biases_are_personal_when_local():
    fed, pairs = local_norm(lamina.LIPS(every=1, rounds=4, norm_sync="local"))
    personal = {"0.bias", "1.weight", "1.bias", "3.bias", "6.bias"}
    for state, record in pairs:
        assert {name for name, row in record.layers.items() if not row.uploaded} == personal
        assert all(torch.equal(state.params[name], fed.initial.params[name]) for name in personal)
        assert record.in_sync
        assert record.personal_accuracy is not None
    rows = [pairs[-1][0].clients.get(i).row.method.own for i in range(7)]
    assert all(row.keys() == personal for row in rows)
    assert not torch.equal(rows[0]["6.bias"], rows[1]["6.bias"])
    assert lamina.LIPS(norm_sync="local").withholds == "personal"
    assert lamina.LIPS().withholds is None


def test_without_shocks_local_is_personal_layers():
    """density = 1: what Personal keeps by the same names."""
    _, ours = local_norm(lamina.LIPS(density=1.0, rounds=4, norm_sync="local"), cohort=4)
    _, theirs = local_norm(lamina.Personal(("norm", "*.bias")), cohort=4)
    assert [state.sha256() for state, _ in ours] == [state.sha256() for state, _ in theirs]
    for i in range(7):
        row, other = (pairs[-1][0].clients.get(i).row for pairs in (ours, theirs))
        assert (row is None) == (other is None)
        assert row is None or all(torch.equal(x, other.method.own[name]) for name, x in row.method.own.items())


# With FedLAMA


def test_the_order_with_fedlama_does_not_matter():
    """phi = 3, every = 2: due after rounds 0, 2, 4, 6 and 8. The first cycle is in sync throughout; rounds 3, 4, 6, 7
    and 9 leave layers waiting. Shocks fall in rounds 1, 3 (due after 2), 6 (after 4), 9 (after 8, in 6's place)."""
    runs = []
    for make in (lambda a, b: lamina.Chain(a, b), lambda a, b: lamina.Chain(b, a)):
        method = make(lamina.LIPS(density=0.3, every=2, rounds=10), lamina.FedLAMA(phi=3))
        given = {f"client {i}": pair for i, pair in enumerate(examples(torch.float32))}
        fed = lamina.Federation(
            small_mlp(torch.float32), lamina.ClientData.from_clients(given), method=method, cohort=4, engine="loop",
            local=lamina.LocalSGD(lr=0.1, batch_size=4),
        )  # fmt: skip
        runs.append(list(fed.run(10)))
    fell = {}
    for (state, record), (other, twin) in zip(*runs, strict=True):
        assert all(torch.equal(x, other.params[name]) for name, x in state.params.items())
        assert (record.bytes_up, record.bytes_down, record.in_sync) == (twin.bytes_up, twin.bytes_down, twin.in_sync)
        assert state.server == other.server[::-1]
        if state.server[0].falls < 1:
            fell[record.round + 1] = state.server[0].falls
            assert record.in_sync
    assert [record.in_sync for _, record in runs[0]] == [t not in (3, 4, 6, 7, 9) for t in range(10)]
    assert fell == {t: pytest.approx(0.3 + 0.7 * r / 10) for t, r in {1: 0, 3: 2, 6: 4, 9: 8}.items()}


def test_the_shock_falls_on_layers_that_are_about_to_wait():
    """Right after a full synchronisation a cycle begins, in whose first round relaxed layers are not asked for."""
    Watch.starts, Watch.steps = [], []
    method = lamina.Chain(Watch(density=0.3, every=1, rounds=8), lamina.FedLAMA(phi=2))
    pairs = with_lamina(method, smooth_mlp(torch.float32), examples(torch.float32), rounds=8)
    relaxed = [t for t, (_, record) in enumerate(pairs) if not record.layers["fc2.weight"].uploaded]
    assert relaxed
    for asked, start in Watch.starts:
        shocked = asked.config.get("shock", 1.0)
        assert int(start["fc2.weight"].count_nonzero()) == math.floor(40 * shocked)
    assert {p.round for p, _ in Watch.starts if "shock" in p.config} >= set(relaxed)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0}, r"density=0: expected 0 < density <= 1 \(a share, not a percentage\)"),
        ({"density": 50}, r"density=50: expected 0 < density <= 1"),
        ({"density": float("nan")}, r"density=nan: expected 0 < density"),
        ({"density": True}, r"density=True: expected"),
        ({"density": None}, r"density=None: expected"),
        ({"every": 0}, r"every=0: expected a whole number of rounds >= 1"),
        ({"every": 2.5}, r"every=2.5: expected a whole number"),
        ({"rounds": 0}, r"rounds=0: expected a whole number >= 1"),
        ({"rounds": "300"}, r"rounds=300: expected a whole number >= 1"),
        ({"score": "topk"}, r"score='topk': expected one of saliency, magnitude"),
        ({"layers": "first"}, r"layers='first': expected one of auto, conv, middle"),
        ({"norm_sync": True}, r"norm_sync=True: expected one of global, local"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(lamina.ConfigError, match=message):
        lamina.LIPS(**arguments)


# Against a plain loop


def compare(method, dtype, model, clients, *, chosen, mine=None, own=(), **settings):
    ours = with_lamina(method, model, clients, **settings)
    options = {"density": method.density, "every": method.every, "horizon": method.rounds, "chosen": chosen, "own": own}
    theirs = from_scratch(lips, model, clients, **options, **(mine or {}), **settings)
    assert_equal_rounds(ours, [r.server for r in theirs], dtype)
    zeros = [len(gone) for r in theirs for layers in r.zeros.values() for gone in layers.values()]
    assert any(zeros)
    for i, kept in theirs[-1].own.items():
        row = ours[-1][0].clients.get(i).row.method.own
        assert row.keys() == set(own)
        for name in own:
            close = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(row[name], kept[name], **close)
    return theirs


@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), PAIRS)
def test_lips_agrees_with_a_plain_loop(dtype, weights, momentum, cohort):
    model, clients = small_mlp(dtype), examples(dtype)
    settings = {"weights": weights, "momentum": momentum, "cohort": cohort}
    method = lamina.LIPS(density=0.35, every=3, rounds=ROUNDS)
    theirs = compare(method, dtype, model, clients, chosen=["fc2.weight"], **settings)
    plain = from_scratch(fedavg, model, clients, **settings)
    gap = (plain[-1]["fc2.weight"] - theirs[-1].server["fc2.weight"]).abs().max().item()
    assert gap > 1e-2  # or the comparison would say nothing about shocks


@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), PAIRS[:4])
def test_lips_by_magnitude_agrees_with_a_plain_loop(dtype, weights, momentum, cohort):
    compare(lamina.LIPS(density=0.2, every=2, rounds=ROUNDS, score="magnitude"), dtype, small_mlp(dtype),
            examples(dtype), chosen=["fc2.weight"], mine={"magnitude": True},
            weights=weights, momentum=momentum, cohort=cohort)  # fmt: skip


@pytest.mark.parametrize("norm_sync", ["global", "local"])
@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), PAIRS)
def test_lips_on_convolutions_agrees_with_a_plain_loop(dtype, weights, momentum, cohort, norm_sync):
    own = ("0.bias", "1.weight", "1.bias", "3.bias", "6.bias") if norm_sync == "local" else ()
    compare(lamina.LIPS(density=0.3, every=2, rounds=ROUNDS, norm_sync=norm_sync), dtype, small_cnn(dtype),
            examples(dtype, (1, 5, 5)), chosen=["3.weight"], own=own, lr=0.03,
            weights=weights, momentum=momentum, cohort=cohort)  # fmt: skip
