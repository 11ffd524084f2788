"""Personal layers: what stays, what travels, and what a client's own model is worth."""

import copy

import pytest
import torch
from from_scratch.personal import personal
from parity import LR, PAIRS, ROUNDS, SEED, assert_equal_rounds, examples, small_cnn, small_mlp
from parity import from_scratch as run_loop
from torch import nn

import cases
import lamina
from lamina.layers import layer_table
from lamina.methods.personal import matched
from lamina.models import mlp, resnet8


def data(clients, **more):
    return lamina.ClientData.from_clients({f"client {i}": pair for i, pair in enumerate(clients)}, **more)


def test_two_clients_by_hand():
    """y = b * a * x, x = 1, loss (y - target)^2 / 2, lr 1/2, one step a round; a is shared, b personal, both 1.

    Round 0, b a = 1. Target 2: gradient of a is b (1 - 2) = -1, of b a (1 - 2) = -1: a = b = 3/2.
      Target 3: both -2, a = b = 2. Shared: a = 7/4; the server's b stays 1.
    Round 1. Client 1 starts from a = 7/4, b = 3/2: y = 21/8, residual 5/8;
      a = 7/4 - 1/2 * 3/2 * 5/8 = 41/32, b = 3/2 - 1/2 * 7/4 * 5/8 = 61/64.
      Client 2 from a = 7/4, b = 2: y = 7/2, residual 1/2; a = 7/4 - 1/2 * 2 * 1/2 = 5/4, b = 2 - 1/2 * 7/4 * 1/2
      = 25/16. Shared: a = (41/32 + 5/4) / 2 = 81/64.
    """
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    nn.init.ones_(model[0].weight)
    nn.init.ones_(model[1].weight)
    clients = [(torch.ones(1, 1).double(), torch.full((1, 1), y).double()) for y in (2.0, 3.0)]
    fed = lamina.Federation(
        model,
        data(clients),
        method=lamina.Personal("head"),
        local=lamina.LocalSGD(lr=0.5, batch_size=None),
        loss=lambda output, target: ((output - target) ** 2).mean() / 2,
        engine="loop",
    )
    seen = []
    for state, _ in fed.run(2):
        own = [state.clients.get(i).row.method.own["1.weight"].item() for i in range(2)]
        seen.append((state.params["0.weight"].item(), state.params["1.weight"].item(), own))
    assert seen == [(7 / 4, 1, [3 / 2, 2]), (81 / 64, 1, [61 / 64, 25 / 16])]


def permuted(classes=3, per_class=8):
    """Two clients that see the same images and call them by different names; no shared head can please both."""
    source = torch.Generator().manual_seed(2)
    y = torch.arange(classes).repeat(per_class)
    x = nn.functional.one_hot(y, classes).float() + 0.05 * torch.randn(len(y), classes, generator=source)
    return [(x, y), (x, (y + 1) % classes)]


def test_personal_accuracy_is_of_each_clients_own_layers_on_its_own_test_set():
    clients = permuted()
    tests = {"client 0": clients[0], "client 1": clients[1]}

    def fed(method):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = mlp((3, 8, 3))
        given = data(clients, test=clients[0], client_tests=tests)
        return lamina.Federation(model, given, method=method, local=lamina.LocalSGD(lr=0.5, epochs=5), engine="loop")

    alone = fed(lamina.Personal("head"))
    *_, (state, record) = alone.run(10)
    assert record.personal_accuracy == 1.0
    *_, (_, plain) = fed(lamina.FedAvg()).run(10)
    assert plain.personal_accuracy <= 0.5  # right about one client is wrong about the other

    hits = []  # the same by hand
    for i, (x, y) in enumerate(clients):
        model = alone.module(state)
        model.load_state_dict(state.clients.get(i).row.method.own, strict=False)
        hits.append(model(x).argmax(1).eq(y).float().mean().item())
    assert hits == [1.0, 1.0]
    swapped = alone.module(state)
    swapped.load_state_dict(state.clients.get(1).row.method.own, strict=False)
    assert swapped(clients[0][0]).argmax(1).eq(clients[0][1]).float().mean().item() == 0.0
    assert record.accuracy == alone.module(state)(clients[0][0]).argmax(1).eq(clients[0][1]).double().mean().item()


def test_a_client_that_never_took_part_is_worth_what_the_global_model_is():
    clients = permuted()
    fed = lamina.Federation(
        lambda: mlp((3, 8, 3)),
        data(clients, client_tests={"client 0": clients[0]}),
        method=lamina.Personal("head"),
        cohort=1,
        engine="loop",
    )
    state, record = next(
        (s, r) for seed in range(1, 20) for s, r in [next(reseeded(fed, seed).run(1))] if r.cohort == (1,)
    )
    model = fed.module(state)
    assert record.personal_accuracy == model(clients[0][0]).argmax(1).eq(clients[0][1]).double().mean().item()


def reseeded(fed, seed):
    return lamina.Federation(fed.model, fed.data, method=lamina.Personal("head"), cohort=1, engine="loop", seed=seed)


def small_federation(method, **settings):
    clients = examples(torch.float32, (1, 5, 5))
    local = lamina.LocalSGD(lr=0.03, batch_size=4)
    return lamina.Federation(small_cnn(torch.float32), data(clients), method=method, local=local, **settings)


def test_personal_layers_are_not_uploaded_and_go_down_once():
    fed = small_federation(lamina.Personal("norm"), engine="loop", buffers="keep")
    (state, first), (_, second) = fed.run(2)
    for name in ("1.weight", "1.bias"):
        for record in (first, second):
            assert not record.layers[name].uploaded
            assert record.layers[name].bytes_up == 0
        assert first.layers[name].bytes_down > 0 == second.layers[name].bytes_down
        assert torch.equal(state.params[name], fed.initial.params[name])
    assert first.layers["0.weight"].uploaded
    assert second.layers["0.weight"].bytes_down > 0
    assert first.in_sync


def test_the_same_layers_are_withheld_with_fedlama_in_either_order():
    methods = lamina.Personal("head"), lamina.FedLAMA(phi=2)
    runs = [list(small_federation(lamina.Chain(*m), engine="loop", cohort=4).run(6)) for m in (methods, methods[::-1])]
    for (a, first), (b, second) in zip(*runs, strict=True):
        assert a.sha256() == b.sha256()
        assert first.in_sync == second.in_sync
        assert {n: row.uploaded for n, row in first.layers.items()} == {
            n: row.uploaded for n, row in second.layers.items()
        }
        assert not first.layers["6.weight"].uploaded
    assert not all(record.in_sync for _, record in runs[0])


# Which layers


TABLE = layer_table(resnet8(10, width=4))


def test_norm_is_every_norm_parameter_and_head_the_last_linear():
    norm = matched("norm", TABLE)
    assert norm == [layer.name for layer in TABLE if layer.kind == "norm"]
    assert norm
    linear = [layer.name for layer in TABLE if layer.kind == "linear"]
    assert matched("head", TABLE) == linear
    assert len(linear) == 2
    assert matched("head", layer_table(mlp((4, 4, 4)))) == [f"{last(mlp((4, 4, 4)))}.{x}" for x in ("weight", "bias")]
    assert matched("head", layer_table(nn.Linear(2, 2))) == ["weight", "bias"]


def last(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


def test_a_pattern_is_a_glob_over_parameter_names():
    table = layer_table(small_cnn(torch.float32))
    assert matched("3.*", table) == ["3.weight", "3.bias"]
    assert matched("*.bias", table) == ["0.bias", "1.bias", "3.bias", "6.bias"]
    assert matched("6.weight", table) == ["6.weight"]


def test_several_patterns_are_all_personal():
    fed = small_federation(lamina.Personal(("norm", "6.*")), engine="loop")
    _, record = next(fed.run(1))
    withheld = {name for name, row in record.layers.items() if not row.uploaded}
    assert withheld == {"1.weight", "1.bias", "6.weight", "6.bias"}
    assert lamina.Personal(["norm", "6.*"]) == lamina.Personal(("norm", "6.*"))
    hash(lamina.Personal(["norm"]))


def refused(layers, model):
    x = torch.zeros(2, 1, 5, 5)
    given = data([(x, torch.zeros(2, dtype=torch.long))] * 2)
    with pytest.raises(lamina.ConfigError) as error:
        lamina.Federation(model, given, method=lamina.Personal(layers), engine="loop")
    assert error.value.code == "E117"
    assert error.value.where == "method.layers"
    return error.value


def test_a_pattern_that_matches_nothing_is_named_with_what_may_have_been_meant():
    model = nn.Sequential()
    model.add_module("flat", nn.Flatten())
    model.add_module("body", nn.Linear(25, 4))
    model.add_module("head1", nn.Linear(4, 3))
    error = refused("haed1.weight", model)
    assert error.message == "layers: 'haed1.weight' matches no parameter of the model"
    assert error.remedy == "did you mean 'head1.weight'?"
    assert refused("body", model).remedy == "did you mean 'body.*'?"
    assert refused(("head", "qq"), model).message == "layers: 'qq' matches no parameter of the model"
    assert refused("qq", model).remedy == "its parameters: body.weight, body.bias, head1.weight, head1.bias"
    assert "no norm parameters" in refused("norm", model).remedy


def test_a_head_whose_weight_is_not_its_own_is_refused():
    """A frozen weight never trains; a tied one stands under its first name, and may be shared with the rest."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 4), nn.ReLU(), nn.Linear(4, 3))
    model[3].weight.requires_grad_(False)
    assert "name its head by a pattern" in refused("head", model).remedy
    assert "name its head by a pattern" in refused("head", nn.Sequential(nn.Conv2d(1, 3, 5), nn.Flatten())).remedy


@pytest.mark.parametrize("layers", ["*", ("head", "0.*", "1.*", "3.*")])
def test_keeping_everything_is_refused_with_what_to_use(layers):
    error = refused(layers, small_cnn(torch.float32))
    assert "nothing would be shared" in error.message
    assert error.remedy == "to train alone, use LocalOnly()"


@pytest.mark.parametrize("layers", ["", (), None, 3, ("norm", ""), ("norm", 4)])
def test_what_names_no_layers_is_refused(layers):
    with pytest.raises(lamina.ConfigError, match=r"layers=.*: expected 'norm', 'head', a pattern"):
        lamina.Personal(layers)


# Against a plain loop


NORM = ("1.weight", "1.bias")
STATISTICS = ("1.running_mean", "1.running_var", "1.num_batches_tracked")


def compare(layers, own, dtype, model, clients, lr=LR, buffers="average", cohort="all", weights="examples", momentum=0):
    """Round by round: the server's model, and every client's own tensors."""
    fed = lamina.Federation(
        model,
        data(clients),
        method=lamina.Personal(layers),
        local=lamina.LocalSGD(lr=lr, momentum=momentum, batch_size=4),
        cohort=cohort,
        weights=weights,
        buffers=buffers,
        seed=SEED,
        engine="loop",
    )
    ours = list(fed.run(ROUNDS))
    theirs = run_loop(
        personal, model, clients, own=own, lr=lr, cohort=cohort, weights=weights, momentum=float(momentum)
    )
    assert_equal_rounds(ours, [r.server for r in theirs], dtype)
    close = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    initial = copy.deepcopy(model.state_dict())
    for (state, _), expected in zip(ours, theirs, strict=True):
        for i, models in enumerate(expected.clients):
            row = state.clients.get(i).row
            kept = initial if row is None else {**row.method.own, **row.buffers}
            for name in own:
                torch.testing.assert_close(kept[name], models[name], **close)
    differ = [name for name in own if not torch.equal(theirs[-1].clients[0][name], theirs[-1].clients[3][name])]
    assert differ


@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), PAIRS)
def test_fedper_agrees_with_a_plain_loop(dtype, weights, momentum, cohort):
    model = small_mlp(dtype)
    own = tuple(f"{last(model)}.{x}" for x in ("weight", "bias"))
    compare("head", own, dtype, model, examples(dtype), weights=weights, momentum=momentum, cohort=cohort)


@pytest.mark.parametrize("buffers", ["average", "keep"])
@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), PAIRS)
def test_fedbn_agrees_with_a_plain_loop(dtype, weights, momentum, cohort, buffers):
    own = NORM + (STATISTICS if buffers == "keep" else ())
    model, clients = small_cnn(dtype), examples(dtype, (1, 5, 5))
    settings = {"weights": weights, "momentum": momentum, "cohort": cohort, "lr": 0.03}
    compare("norm", own, dtype, model, clients, buffers=buffers, **settings)


def test_fedlama_leaves_personal_layers_to_their_owner():
    """LIPS prunes what the methods before it start from, so it stands after Personal; where FedLAMA stands among them
    does not matter, since it keeps no second copy of a personal layer."""
    shocked = (lamina.Personal("*fc2*"), lamina.LIPS(density=0.3, every=1, rounds=6))
    orders = []
    for place in range(3):
        parts = list(shocked)
        parts.insert(place, lamina.FedLAMA(phi=4, warmup=8))
        fed = cases.federation(lamina.Chain(*parts), "small", cohort="all")
        state = cases.states(fed, 6)[-1]
        assert all(not state.clients.get(c).row.method[place].waiting for c in state.clients)
        orders.append(state.sha256())
    assert len(set(orders)) == 1
