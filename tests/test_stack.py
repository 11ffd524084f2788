"""Clients stacked: which networks are written out, what cannot be stacked, and what happens then. That stacked agrees
with one client after the other: laws/test_engines.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
import lamina
from lamina.data.transform import Images
from lamina.engine import gemm
from lamina.engine.stack import Vmapped, minibatches
from lamina.training import LocalSGD, batches


def tokens(clients: int = 4, words: int = 9, length: int = 6) -> lamina.ClientData:
    """Sequences of word numbers in three classes; a sequence repeats words, so rows of an embedding add up."""
    source = torch.Generator().manual_seed(1)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        return torch.randint(words, (n, length), generator=source), torch.randint(3, (n,), generator=source)

    return lamina.ClientData.from_clients({str(c): draw(9 + 4 * c) for c in range(clients)}, test=draw(12))


def written() -> dict[str, nn.Module]:
    return {
        "logistic": nn.Linear(64, 4),
        "sequential": nn.Sequential(nn.Flatten(), nn.Linear(64, 4)),
        "relu": nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)),
        "inplace": nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)),
        "tanh": nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)),
        "no bias": nn.Sequential(nn.Flatten(), nn.Linear(64, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False)),
        "nested": nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 8), nn.Tanh()), nn.ReLU(), nn.Linear(8, 4)),
        "two at once": nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.ReLU(), nn.Linear(8, 4)),
        "the other way": nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Tanh(), nn.Linear(8, 4)),
        "input": nn.Sequential(nn.Flatten(), nn.Tanh(), nn.Linear(64, 4)),
    }  # fmt: skip


def gradients(fed: lamina.Federation, gradient: Any) -> None:
    """Those of all clients on their first minibatches, of unequal sizes, are those of each alone."""
    trainer, setup = fed._trainer, fed._setup
    clients = sorted(range(len(fed.data)), key=lambda c: -int(fed.data.sizes[c]))
    given = next(minibatches(setup, 0, clients, [1] * len(clients), draws=False))
    assert len(set(given.sizes)) > 1
    weights = {n: torch.stack([x + c / 50 for c in clients]) for n, x in fed.initial.params.items()}
    grads, losses = gradient(weights, given)
    for i, client in enumerate(clients):
        chunk = next(batches(fed.data, client, setup.local, 0, 0))
        trainer.load({n: w[i] for n, w in weights.items()}, {})
        expected, loss = trainer.gradient(*trainer.batch(chunk, None))
        torch.testing.assert_close(losses[i], loss, rtol=1e-5, atol=1e-6)
        for name, g in zip(trainer.params, expected, strict=True):
            torch.testing.assert_close(grads[name][i], g, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", [n for n in written() if n != "logistic"])
def test_the_written_out_gradient_is_autograds(name: str) -> None:
    fed = cases.federation(model="small", engine="stacked", local=LocalSGD(batch_size=20))
    fed = lamina.Federation(written()[name], fed.data, engine="stacked", local=LocalSGD(batch_size=20))
    assert isinstance(fed._stack.gradient, gemm.Gemm)
    gradients(fed, fed._stack.gradient)
    gradients(fed, Vmapped(fed._trainer))


def test_an_embedding_in_front_is_written_out() -> None:
    model = nn.Sequential(nn.Embedding(9, 5), nn.Flatten(), nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 3))
    fed = lamina.Federation(model, tokens(), engine="stacked", local=LocalSGD(batch_size=16))
    assert isinstance(fed._stack.gradient, gemm.Gemm)
    gradients(fed, fed._stack.gradient)


def test_a_step_without_a_gradient_is_the_step_with_it() -> None:
    fed = lamina.Federation(written()["relu"], cases.data(), engine="stacked", local=LocalSGD(batch_size=20))
    gradient, clients = fed._stack.gradient, [4, 0, 1]
    given = next(minibatches(fed._setup, 0, clients, [2, 2, 1], draws=False))
    weights = {n: torch.stack([x] * 3) for n, x in fed.initial.params.items()}
    grads, _ = gradient(weights, given)
    expected = {n: w - 0.3 * grads[n] for n, w in weights.items()}
    gradient.descend(weights, given, 0.3)
    for name, w in weights.items():
        torch.testing.assert_close(w, expected[name], rtol=1e-6, atol=1e-7)


class Hooked(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def twice() -> nn.Module:
    layer = nn.Linear(64, 64)
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer, nn.Linear(64, 4))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    model[3].weight = model[1].weight
    return model


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    model[1].bias.requires_grad_(False)
    return model


def watched() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    model[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


OTHERS = {
    "another forward": lambda: Hooked(nn.Flatten(), nn.Linear(64, 4)),
    "a layer twice": twice,
    "a frozen bias": frozen,
    "a hook": watched,
    "gelu": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 4)),
    "an activation at the end": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU()),
    "convolution": lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4)),
    "group norm": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 4)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_written_out_is_mapped(name: str) -> None:
    fed = lamina.Federation(OTHERS[name](), cases.data(), engine="stacked", local=LocalSGD(batch_size=20))
    assert (fed.engine, type(fed._stack.gradient)) == ("stacked", Vmapped)
    gradients(fed, fed._stack.gradient)


def test_another_loss_is_mapped() -> None:
    def smooth(output: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, y, label_smoothing=0.1)

    fed = lamina.Federation(written()["relu"], cases.data(), engine="stacked", loss=smooth)
    assert isinstance(fed._stack.gradient, Vmapped)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("odd", "buffers"),
        ("dropout", "cannot be stacked"),
        ("looks", "cannot be stacked"),
        ("tied", "1.weight differs"),
    ],
)
def test_what_cannot_be_stacked_trains_otherwise_and_says_why(model: str, why: str) -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x.flatten(1))
            return -out if out.detach().sum().item() > 0 else out

    made = {"looks": Looks, "tied": tied, **cases.MODELS}[model]()
    fed = lamina.Federation(made, cases.data(), engine="stacked", cohort=5)
    assert fed.engine != "stacked"
    assert "stacked was asked for, but" in fed.engine_reason
    assert why in fed.engine_reason
    assert next(fed.run(1))[1].accuracy is not None


def test_auto_writes_out_networks_of_linear_layers_and_stacks_small_ones() -> None:
    data = lamina.data.digits(clients=32, partition="iid")
    small, large = lamina.models.mlp((64, 32, 10)), lamina.models.mlp((64, 2000, 10))
    chosen = lamina.Federation(small, data)
    assert chosen.engine == "stacked"
    assert "2,410 parameters in linear layers, 8 clients at a time" in chosen.engine_reason
    alone = lamina.Federation(large, data)
    assert alone.engine == "stacked"
    assert "150,010 parameters in linear layers, one client at a time" in alone.engine_reason
    assert lamina.Federation(large, data, local=LocalSGD(momentum=0.9)).engine != "stacked"  # has to make a gradient
    assert lamina.Federation(large, data, method=lamina.FedProx(mu=0.1)).engine != "stacked"
    assert lamina.Federation(large, data, cohort=1).engine != "stacked"
    assert lamina.Federation(small, data, cohort=4).engine != "stacked"  # too few to fill a stack
    assert lamina.Federation(small, data, engine="loop").engine == "loop"
    assert lamina.Federation(small, data, loss=lambda o, y: nn.functional.cross_entropy(o, y)).engine != "stacked"


@pytest.mark.parametrize("from_left", [False, True])
def test_one_client_at_a_time_is_the_same_training(from_left: bool) -> None:
    data, model = lamina.data.digits(clients=8, partition="dirichlet:0.5"), lamina.models.mlp((64, 2000, 10))
    found = []
    for engine in ("loop", "stacked"):
        fed = lamina.Federation(model, data, local=LocalSGD(lr=0.1, batch_size=10), engine=engine, cohort=4, workers=2)
        if engine == "stacked":
            assert fed._stack.width == 1
            fed._stack.gradient._from_left = from_left
        found.append(list(fed.run(3)))
    for (state, record), (other, its) in zip(*found, strict=True):
        for name, x in state.params.items():
            torch.testing.assert_close(other.params[name], x, rtol=1e-4, atol=1e-6)
        assert (record.bytes_up, record.bytes_down) == (its.bytes_up, its.bytes_down)
        assert [c.steps for c in record.clients] == [c.steps for c in its.clients]
        for name, row in record.layers.items():
            assert its.layers[name].divergence == pytest.approx(row.divergence, rel=1e-3)


def test_a_client_that_diverges_is_refused_and_the_others_count() -> None:
    """The first client's pictures are as bright as float32 can be; its neighbours in the stack do not notice."""
    clean = cases.data()
    clients = {name: clean.examples(clean.indices_of(i)) for i, name in enumerate(clean.names)}
    x, y = clients["ann"]
    clients["ann"] = (x.clone().fill_(3e38), y)
    data = lamina.ClientData.from_clients(clients, test=clean.test)
    records = {}
    for engine in ("loop", "stacked"):
        fed = lamina.Federation(cases.small, data, engine=engine, workers=1, seed=3, local=LocalSGD(batch_size=8))
        if engine == "stacked":
            fed._stack.width = 5
        state, record = next(fed.run(1))
        records[engine] = record.clients
        assert [event["client"] for event in record.events] == ["ann"]
        assert all(torch.isfinite(p).all() for p in state.params.values())
    assert [c.refused for c in records["loop"]] == [c.refused for c in records["stacked"]]


def test_clients_models_are_tested_before_aggregation_there_too() -> None:
    made = []
    for engine in ("loop", "stacked"):
        fed = cases.federation(model="double", engine=engine, workers=1, cohort="all", accuracy_before=True)
        if engine == "stacked":
            fed._stack.width = 3
        made.append([record.accuracy_before for _, record in fed.run(3)])
    assert made[0] == made[1]
    assert made[0][0] is not None


def test_augmentation_is_each_clients_own() -> None:
    """Crops and mirrors are drawn for one client at a time, in the order of its steps, as in `loop`."""
    source = torch.Generator().manual_seed(2)
    transform = Images((0.5,), (0.25,), crop=1, flip=True)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        return torch.randint(256, (n, 8, 8, 1), generator=source, dtype=torch.uint8), torch.arange(n) % 4

    data = lamina.ClientData.from_clients({str(c): draw(9 + 3 * c) for c in range(4)}, transform=transform)
    states = []
    for engine in ("loop", "stacked"):
        fed = lamina.Federation(cases.small, data, engine=engine, workers=1, local=LocalSGD(batch_size=8, epochs=2))
        if engine == "stacked":
            fed._stack.width = 4
        states.append([state for state, _ in fed.run(2)][-1])
    for name, x in states[0].params.items():
        torch.testing.assert_close(states[1].params[name], x, rtol=1e-5, atol=1e-6)
