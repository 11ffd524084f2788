"""One client's round: batches, the order of a step, what is sent, what is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
from lamina import ClientData, ConfigError, FedAvg, Federation, LocalSGD, Message, Params, Plan, State, Work, wire
from lamina.client import client_round
from lamina.engine.base import Worker
from lamina.random import generator
from lamina.training import Trainer, batches


def mse(output: Tensor, y: Tensor) -> Tensor:
    return ((output - y) ** 2).mean()


class Line(nn.Module):
    """output = w x, from w = 1, in float64. With y = 0 and x = 1 the gradient of mse is 2 w."""

    def __init__(self, start: float = 1.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[start]], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


def points(*xy: tuple[float, float]) -> tuple[Tensor, Tensor]:
    x, y = zip(*xy, strict=True)
    return torch.tensor(x, dtype=torch.float64)[:, None], torch.tensor(y, dtype=torch.float64)[:, None]


def line(clients: dict[str, tuple[Tensor, Tensor]] | None = None, **options: Any) -> Federation:
    data = ClientData.from_clients(clients or {"only": points((1, 0))})
    return Federation(Line, data, **{"loss": mse, "engine": "loop", "local": LocalSGD(batch_size=None)} | options)


def end(fed: Federation, rounds: int = 1) -> State:
    return cases.states(fed, rounds)[-1]


# ---- batches


def order(fed_data: ClientData, local: LocalSGD, client: int = 0, round: int = 0) -> list[list[int]]:
    return [b.tolist() for b in batches(fed_data, client, local, 7, round)]


def test_an_epoch_is_a_permutation_and_its_last_short_batch_is_kept() -> None:
    """Client bob holds examples 26 to 37, twelve of them."""
    found = order(cases.data(), LocalSGD(batch_size=5), client=1, round=3)
    expected = torch.randperm(12, generator=generator(7, "order", 3, 1)) + 26
    assert found == [expected[:5].tolist(), expected[5:10].tolist(), expected[10:].tolist()]


def test_epochs_are_drawn_in_succession_from_one_generator() -> None:
    source = generator(7, "order", 0, 1)
    first, second = torch.randperm(12, generator=source) + 26, torch.randperm(12, generator=source) + 26
    found = order(cases.data(), LocalSGD(batch_size=8, epochs=2), client=1)
    assert found == [first[:8].tolist(), first[8:].tolist(), second[:8].tolist(), second[8:].tolist()]
    assert not torch.equal(first, second)


def test_steps_go_on_over_epochs_and_stop_within_one() -> None:
    two = order(cases.data(), LocalSGD(batch_size=8, epochs=2), client=1)
    assert order(cases.data(), LocalSGD(batch_size=8, steps=3), client=1) == two[:3]
    assert order(cases.data(), LocalSGD(batch_size=8, steps=1, epochs=9), client=1) == two[:1]


def test_without_a_batch_size_all_examples_come_in_their_given_order() -> None:
    whole = list(range(26, 38))
    assert order(cases.data(), LocalSGD(batch_size=None), client=1) == [whole]
    assert order(cases.data(), LocalSGD(batch_size=None, epochs=2), client=1) == [whole, whole]
    assert order(cases.data(), LocalSGD(batch_size=None, steps=3), client=1) == [whole] * 3


def test_orders_differ_between_rounds_and_clients() -> None:
    local = LocalSGD(batch_size=8)
    assert order(cases.data(), local, client=1, round=0) != order(cases.data(), local, client=1, round=1)


def test_a_batch_larger_than_the_client_is_the_client() -> None:
    assert [sorted(b) for b in order(cases.data(), LocalSGD(batch_size=99), client=3)] == [list(range(57, 65))]


@pytest.mark.parametrize("local", [LocalSGD(batch_size=8, epochs=3), LocalSGD(batch_size=5, steps=7)])
@pytest.mark.parametrize("client", range(5))
def test_count_is_the_number_of_batches(local: LocalSGD, client: int) -> None:
    assert local.count(int(cases.data().sizes[client])) == len(order(cases.data(), local, client))


IMPOSSIBLE: dict[str, list[Any]] = {
    "lr": [0, -1, float("inf"), float("nan")],
    "momentum": [1, -0.1],
    "weight_decay": [-1, float("nan")],
    "batch_size": [0, 1.5],
    "epochs": [0, None, True],
    "steps": [0, 2.0],
    "clip": [0, -1, float("nan")],
}


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key, values in IMPOSSIBLE.items() for value in values],
)
def test_impossible_local_settings_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key}=") as caught:
        LocalSGD(**{key: value})
    assert caught.value.where == f"local.{key}"


# ---- the order of a step


def test_a_step_clips_then_decays_then_gathers_momentum() -> None:
    """x = 1, y = 0, w = 1, lr 0.1, momentum 0.9, decay 0.1, clip 0.5, two steps:

        g = 2 w = 2     clipped 0.5   + 0.1 w = 0.6    v = 0.6                       w = 1 - 0.06    = 0.94
        g = 1.88        clipped 0.5   + 0.094 = 0.594  v = 0.9 * 0.6 + 0.594 = 1.134 w = 0.94 - 0.1134 = 0.8266

    Decay before the clip would give 0.9 and momentum before the decay 0.95 after one or two of these steps.
    """
    local = LocalSGD(lr=0.1, momentum=0.9, weight_decay=0.1, clip=0.5, steps=2, batch_size=None)
    assert end(line(local=local)).params["w"].item() == pytest.approx(0.8266, abs=1e-15)


def test_momentum_starts_from_zero_each_round() -> None:
    """w <- w - 0.1 * 2 w in each of two rounds: 0.8, 0.64; with momentum carried over it would be 0.46."""
    fed = line(local=LocalSGD(lr=0.1, momentum=0.9, batch_size=None))
    assert [s.params["w"].item() for s in cases.states(fed, 2)] == pytest.approx([0.8, 0.64], abs=1e-15)


def test_a_gradient_within_the_limit_is_not_clipped() -> None:
    assert end(line(local=LocalSGD(clip=2.0, batch_size=None))).params["w"].item() == pytest.approx(0.8, abs=1e-15)


def test_clipping_is_by_the_global_norm_of_all_layers() -> None:
    """One step: the update over all layers together has the length lr * clip."""
    one = ClientData.from_clients({"only": (cases.data(torch.float64).x, cases.data().y)})
    fed = Federation(cases.double, one, engine="loop", local=LocalSGD(lr=0.1, batch_size=None, clip=1e-3))
    update = torch.cat([(end(fed).params[n] - x).flatten() for n, x in fed.initial.params.items()])
    assert float(update.norm()) == pytest.approx(1e-4, rel=1e-9)


@dataclass(frozen=True)
class Tenfold(FedAvg):
    """Multiplies every gradient by ten."""

    def correct(self, client: Any, plan: Plan, step: Tensor, params: Params, grads: Params) -> Params:
        return {name: 10 * g for name, g in grads.items()}


def test_the_corrected_gradient_is_what_is_clipped() -> None:
    """10 * 2 w = 20 is clipped to 5: w = 1 - 0.5. Clipped first it would be 2, then 20: w = -1."""
    fed = line(method=Tenfold(), local=LocalSGD(lr=0.1, clip=5.0, batch_size=None))
    assert end(fed).params["w"].item() == pytest.approx(0.5, abs=1e-15)


@dataclass(frozen=True)
class Reversed(FedAvg):
    """Returns the gradients in another order, as a dictionary may."""

    def correct(self, client: Any, plan: Plan, step: Tensor, params: Params, grads: Params) -> Params:
        return dict(reversed(grads.items()))


def test_corrected_gradients_go_by_name_not_by_order() -> None:
    """Two layers of one shape: taken by order they would be swapped without a word."""

    def square() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False))

    def model(method: FedAvg) -> str:
        return end(Federation(square, cases.data(), method=method, engine="loop")).sha256()

    assert model(Reversed()) == model(FedAvg())


class Seen(FedAvg):
    """Notes the step numbers that `correct` is given, and the work that `report` is given of a client."""

    def __init__(self) -> None:
        object.__setattr__(self, "steps", [])
        object.__setattr__(self, "work", [])

    def correct(self, client: Any, plan: Plan, step: Tensor, params: Params, grads: Params) -> Params:
        assert step.shape == ()
        self.steps.append(int(step))
        return {name: 2 * g for name, g in grads.items()}

    def report(self, client: Any, plan: Plan, work: Work, message: Message) -> tuple[Message, Any]:
        if any(g.any() for g in work.grads.values()):  # not when it is asked what a message looks like
            self.work.append(work)
        return message, client


def test_steps_count_from_zero_and_work_keeps_the_raw_gradient_of_the_last_batch() -> None:
    """Steps double the gradient: w = 1 - 0.1 * 4 = 0.6, then 0.6 - 0.1 * 2.4 = 0.36. The last raw gradient was at
    0.6: 1.2, whatever correct, clip and decay made of it."""
    method = Seen()
    end(line(method=method, local=LocalSGD(lr=0.1, steps=2, batch_size=None, clip=1e3)))
    assert method.steps == [0, 1]
    (work,) = method.work
    assert work.params["w"].item() == pytest.approx(0.36, abs=1e-15)
    assert work.grads["w"].item() == pytest.approx(1.2, abs=1e-15)
    assert (work.steps.shape, int(work.steps)) == ((), 2)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"weight_decay": 0.01}, {"momentum": 0.5, "weight_decay": 0.1}]
)
@pytest.mark.parametrize("make", [cases.double, cases.small])
def test_local_training_is_torch_sgd_bit_for_bit(options: dict[str, float], make: Callable[[], nn.Module]) -> None:
    """One client, two rounds of its own batches; torch's optimiser is made anew each round."""
    dtype = torch.float64 if make is cases.double else torch.float32
    x, y = cases.data(dtype).x, cases.data().y
    one = ClientData.from_clients({"only": (x, y)})
    local = LocalSGD(lr=0.1, batch_size=16, epochs=2, **options)
    fed = Federation(make, one, local=local, engine="loop", seed=3)
    model, state = fed.model.train(), None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for t in range(2):
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            optimiser = torch.optim.SGD(model.parameters(), lr=0.1, **options)
            for chosen in batches(one, 0, local, 3, t):
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
                optimiser.step()
            with torch.no_grad():  # the server adds the update to its own weights
                for name, p in model.named_parameters():
                    p.copy_(before[name] + (p - before[name]))
            (state, _) = next(fed.run(1, state))
            assert cases.bits(state.params) == cases.bits({n: p.detach() for n, p in model.named_parameters()})
    finally:
        torch.set_num_threads(threads)


# ---- frozen parameters, tied weights, buffers


def test_frozen_parameters_are_neither_sent_nor_changed() -> None:
    fed = cases.federation()
    state, records = cases.finish(fed, 2)
    assert not any(name.startswith("frozen") for name in (*state.params, *records[-1].layers))
    assert not any(t.layer.startswith("frozen") for r in records for t in r.traffic)
    before, after = fed.model.state_dict(), fed.module(state).state_dict()
    assert torch.equal(before["frozen.weight"], after["frozen.weight"])
    assert not torch.equal(before["head.weight"], after["head.weight"])


def test_frozen_parameters_do_not_decay() -> None:
    fed = cases.federation(local=LocalSGD(weight_decay=0.5, momentum=0.9, batch_size=8))
    state = end(fed)
    assert torch.equal(fed.model.state_dict()["frozen.bias"], fed.module(state).state_dict()["frozen.bias"])


def test_tied_weights_travel_once_and_stay_tied() -> None:
    fed = cases.federation()
    state, records = cases.finish(fed, 2)
    assert "first.weight" in state.params
    assert "second.weight" not in state.params
    assert "second.weight" not in records[-1].layers
    module = fed.module(state)
    assert module.second.weight is module.first.weight
    assert torch.equal(module.second.weight, state.params["first.weight"])


class Counting(nn.Module):
    """A line that counts its training examples and remembers the mean of the last batch's x."""

    def __init__(self, rebind: bool = False) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, 1, dtype=torch.float64))
        self.rebind = rebind
        self.seen: Tensor
        self.register_buffer("seen", torch.tensor(0))
        self.centre: Tensor
        self.register_buffer("centre", torch.tensor(0.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.rebind:
            self.seen = self.seen + len(x)
            self.centre = x.mean().detach()
        elif self.training:
            self.seen += len(x)
            self.centre.copy_(x.mean().detach())
        return x @ self.w


TWO = {"a": points((1, 0)), "b": points((2, 0), (4, 0), (6, 0))}


def counting(policy: str, rebind: bool = False) -> list[State]:
    fed = Federation(
        lambda: Counting(rebind),
        ClientData.from_clients(TWO),
        loss=mse,
        engine="loop",
        buffers=policy,
        local=LocalSGD(lr=1e-3, batch_size=None),
    )
    return cases.states(fed, 2)


def numbers(buffers: Params) -> tuple[float, ...]:
    return tuple(x.item() for x in buffers.values())


@pytest.mark.parametrize("rebind", [False, True])
def test_averaged_buffers_are_a_weighted_mean_and_integers_the_maximum(rebind: bool) -> None:
    """Means 1 and 4, weights 1/4 and 3/4: 3.25. Counts 1 and 3: 3, from which both go on: 4 and 6, so 6.

    A forward pass may change a buffer in place or give its name a new tensor.
    """
    first, second = counting("average", rebind)
    assert numbers(first.buffers) == (3, 3.25)
    assert numbers(second.buffers) == (6, 3.25)
    assert first.buffers["seen"].dtype == torch.int64


@pytest.mark.parametrize("rebind", [False, True])
def test_kept_buffers_are_the_clients_own_and_the_global_ones_stay(rebind: bool) -> None:
    first, second = counting("keep", rebind)
    assert numbers(first.buffers) == numbers(second.buffers) == (0, 0)
    assert [numbers(first.clients.get(c).row.buffers) for c in (0, 1)] == [(1, 1), (3, 4)]
    assert [numbers(second.clients.get(c).row.buffers) for c in (0, 1)] == [(2, 1), (6, 4)]


@pytest.mark.parametrize("rebind", [False, True])
def test_skipped_buffers_start_from_the_initial_ones_each_round(rebind: bool) -> None:
    first, second = counting("skip", rebind)
    assert numbers(first.buffers) == numbers(second.buffers) == (0, 0)
    assert [second.clients.get(c).row.buffers for c in (0, 1)] == [{}, {}]


def test_buffers_travel_only_when_they_are_averaged() -> None:
    for policy, sent in (("average", True), ("keep", False), ("skip", False)):
        _, (record,) = cases.finish(cases.federation(buffers=policy), 1)
        assert any(t.layer == "_buffers" and t.direction == "up" for t in record.traffic) is sent


def test_buffers_that_are_not_saved_do_not_outlive_a_client() -> None:
    """`Odd.last` adds to the output: what one client left would change the next one's training."""
    fed = cases.federation(cohort="all")
    plan, setup = fed._plan(*fed.initial, 0, fed.local.lr, 5), fed._setup
    (alone,) = Worker(fed._trainer, setup).do("round", plan, [1], [None])
    Worker(fed._trainer, setup).do("round", plan, [0], [None])
    (after,) = Worker(fed._trainer, setup).do("round", plan, [1], [None])
    assert cases.bits(after.message) == cases.bits(alone.message)


def test_the_trainer_keeps_the_dtypes_and_values_it_loads() -> None:
    fed = cases.federation()
    trainer: Trainer = fed._trainer
    trainer.load(*fed.initial)
    assert cases.bits(trainer.snapshot()) == cases.bits(fed.initial.params)
    assert all(x.is_contiguous() for x in trainer.snapshot().values())


# ---- messages


class Reports(FedAvg):
    def __init__(self, tree: str):
        object.__setattr__(self, "tree", tree)

    def report(self, client: Any, plan: Plan, work: Work, message: Message) -> tuple[Message, Any]:
        return message | {self.tree: {}}, client


@pytest.mark.parametrize("tree", ["moments", "steps"])
def test_a_method_may_not_write_the_trees_of_the_engine(tree: str) -> None:
    with pytest.raises(ConfigError, match=tree) as caught:
        end(cases.federation(Reports(tree)))
    assert caught.value.code == "E116"


def test_moments_are_the_squared_norms_of_the_update_as_decoded() -> None:
    fed = cases.federation(uplink=wire.TopK(0.2, values="int8"))
    plan = fed._plan(*fed.initial, 0, fed.local.lr, 3)
    reply = client_round(fed._trainer, fed._setup, plan, 1, fed_row(fed))
    for name, u in reply.message["update"].items():
        assert reply.message["moments"][name].item() == pytest.approx(float((u.double() ** 2).sum()), rel=1e-12)
        assert reply.message["moments"][name].dtype == torch.float64
    assert reply.message["steps"]["steps"].item() == reply.steps == 2


def test_a_message_without_diagnostics_has_no_moments() -> None:
    fed = cases.federation(diagnostics=False)
    reply = client_round(fed._trainer, fed._setup, fed._plan(*fed.initial, 0, fed.local.lr, 3), 1, fed_row(fed))
    assert set(reply.message) == {"update", "buffers", "steps"}


def fed_row(fed: Federation):
    from lamina.store import Row

    return Row(fed.method.init_client(fed.initial.params), {})


def test_only_what_the_plan_asks_for_is_sent() -> None:
    fed = cases.federation()
    plan = fed._plan(*fed.initial, 0, fed.local.lr, 3).keep(["head.weight", "head.bias"])
    reply = client_round(fed._trainer, fed._setup, plan, 1, fed_row(fed))
    assert list(reply.message["update"]) == ["head.weight", "head.bias"] == list(reply.message["moments"])


def test_the_update_is_local_minus_global() -> None:
    """w goes from 1 to 0.8: the update is -0.2, whatever `begin` did to the start."""
    fed = line()
    reply = client_round(fed._trainer, fed._setup, fed._plan(*fed.initial, 0, fed.local.lr, 1), 0, fed_row(fed))
    assert reply.message["update"]["w"].item() == pytest.approx(-0.2, abs=1e-15)
    assert reply.loss == 1.0


@dataclass(frozen=True)
class Elsewhere(FedAvg):
    """Starts at 3 w."""

    def begin(self, client: Any, plan: Plan, params: Params) -> Params:
        return {name: 3 * x for name, x in params.items()}


def test_the_update_is_measured_from_the_plan_not_from_where_the_client_began() -> None:
    """From 3: 3 - 0.1 * 6 = 2.4, so the update is 2.4 - 1."""
    assert end(line(method=Elsewhere())).params["w"].item() == pytest.approx(2.4, abs=1e-15)


def test_the_training_loss_is_the_mean_over_local_steps() -> None:
    """Losses 1 and 0.8^2 = 0.64."""
    _, (record,) = cases.finish(line(local=LocalSGD(lr=0.1, steps=2, batch_size=None)), 1)
    assert record.train_loss == pytest.approx(0.82, abs=1e-15)
