"""The engine for GPUs, with the CPU as its device: when it is taken, what lies where, what it does when something goes
wrong. A graph is stood in for by the step itself, so that all around it is tested here too. That it agrees with `loop`:
laws/test_cuda.py; streams and real graphs: test_gpu.py."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
import lamina
import lamina.engine as engines
from lamina import (
    ClientData,
    ConfigError,
    FedAvg,
    Federation,
    LocalSGD,
    Params,
    Plan,
    RunError,
    StorageError,
    machine,
)
from lamina.data.transform import Images, Windows
from lamina.engine import cuda, device
from lamina.runs import resume
from lamina.training import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs that are the CPU."""
    monkeypatch.setattr(cuda, "available", lambda: True)
    monkeypatch.setattr(cuda, "devices", lambda: [CPU, CPU])


# ---- the choice


def test_without_a_gpu_it_is_refused_and_auto_takes_another() -> None:
    with pytest.raises(ConfigError, match="torch finds no GPU") as caught:
        cases.federation(engine="cuda")
    assert (caught.value.code, caught.value.where) == ("E118", "engine")
    assert "engine='auto'" in caught.value.remedy
    assert cases.federation(engine="auto").engine != "cuda"


@pytest.mark.usefixtures("gpu")
def test_auto_says_that_there_is_a_gpu_and_leaves_it() -> None:
    for model in ("small", "odd"):
        fed = cases.federation(model=model, engine="auto")
        assert fed.engine != "cuda"
        assert "engine='cuda' would use the GPU" in fed.engine_reason


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("cohort", "workers", "expected"), [(100, None, 16), (100, 5, 5), (3, None, 3), (3, 9, 3)])
def test_clients_at_once_are_eight_a_device_or_as_many_as_asked_for(cohort: int, workers: Any, expected: int) -> None:
    assert engines.choose("cuda", cohort, workers) == ("cuda", expected, "asked for")


def test_its_bits_are_its_own() -> None:
    assert engines.bits("cuda") == "cuda"


def test_tf32_needs_a_gpu() -> None:
    for engine in ("loop", "threads", "stacked"):
        with pytest.raises(ConfigError, match="precision='tf32': only a GPU has it") as caught:
            cases.federation(engine=engine, local=LocalSGD(precision="tf32"))
        assert (caught.value.code, caught.value.where) == ("E118", "local.precision")


@pytest.mark.usefixtures("gpu")
def test_the_record_says_what_the_devices_are() -> None:
    assert machine.environment(cases.federation(engine="cuda"))["gpus"] == ["cpu", "cpu"]
    assert machine.environment(cases.federation(engine="loop"))["gpus"] == []


@pytest.mark.usefixtures("gpu")
def test_a_run_goes_on_with_the_same_bits_and_with_no_other_engine(tmp_path: Path) -> None:
    def fed(**options: Any) -> Federation:
        return cases.federation(lamina.Scaffold(), model="small", **options)

    whole = fed(engine="cuda", workers=2).fit(4, tmp_path / "whole", progress=False)
    fed(engine="cuda", workers=2).fit(2, tmp_path / "part", progress=False)
    with pytest.raises(StorageError, match="begun with 'cuda'") as caught:
        resume(tmp_path / "part", 4, fed=fed(engine="loop"), progress=False)
    assert caught.value.code == "E405"
    again = resume(tmp_path / "part", 4, fed=fed(engine="cuda", workers=3), progress=False)
    assert again.info["final_sha256"] == whole.info["final_sha256"]


# ---- what torch's global switches are


def switches() -> tuple[bool, ...]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("precision", "training"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_switches_are_set_for_the_step_alone(precision: Any, training: bool) -> None:
    """cuDNN would use TF32 by default. Between two rounds, and after a failure, all is as it was."""
    before = switches()
    seen: dict[bool, set[tuple[bool, ...]]] = {True: set(), False: set()}

    def loss(output: Tensor, y: Tensor) -> Tensor:
        seen[output.requires_grad].add(switches())
        return nn.functional.cross_entropy(output, y)

    fed = cases.federation(model="small", loss=loss, engine="cuda", local=LocalSGD(precision=precision))
    seen[True].clear()  # of the trial when it was made
    for _ in fed.run(2):
        assert switches() == before
    assert seen == {True: {(training, training, True, False)}, False: {(False, False, True, False)}}

    with pytest.raises(ZeroDivisionError), device.arithmetic("tf32"):
        1 / 0
    assert switches() == before


# ---- what lies where


def test_examples_lie_on_the_device_as_they_are_stored() -> None:
    """On the meta device, which holds no values: bytes stay bytes, and who holds what stays where it is."""
    x, y = torch.zeros(9, 8, 8, 1, dtype=torch.uint8), torch.arange(9) % 3
    clients = {"a": (x[:4], y[:4]), "b": (x[4:], y[4:])}
    data = ClientData.from_clients(clients, test=(x, y), client_tests={"a": (x, y)}, transform=Images((0.5,), (0.5,)))
    made = device.resident(data, torch.device("meta"))
    for part in (made.x, made.y, *made.test, *made.client_tests["a"]):
        assert part.device.type == "meta"
    assert (made.x.dtype, made.indices.device.type, made.transform) == (torch.uint8, "cpu", data.transform)
    assert [part.device.type for part in made.examples(torch.tensor([1, 2]))] == ["meta", "meta"]
    assert made.split_sha256 == data.split_sha256


def test_a_transforms_tensors_lie_there_too() -> None:
    text = Windows(torch.zeros(20, dtype=torch.uint8), 5)
    assert device._with_tensors_on(text, torch.device("meta")).text.device.type == "meta"
    assert text.text.device.type == "cpu"
    plain = Images((0.5,), (0.5,))
    assert device._with_tensors_on(plain, torch.device("meta")) is plain


def test_copies_keep_their_addresses() -> None:
    trees = {"a": {"x": torch.arange(3.0)}, "b": {}, "c": {"y": torch.ones(2, dtype=torch.bool)}}
    copies = device.Copies(trees, CPU)
    held = copies.trees["a"]["x"]
    copies.write({"a": {"x": torch.zeros(3)}, "c": {"y": torch.zeros(2, dtype=torch.bool)}})
    assert copies.trees["a"]["x"] is held
    assert held.tolist() == [0, 0, 0]
    assert trees["a"]["x"].tolist() == [0, 1, 2]


def test_a_parcel_brings_everything_and_is_not_overwritten_by_the_next() -> None:
    weight = torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last)
    trees = {"a": {"w": weight, "n": torch.tensor(3)}, "b": {"h": torch.ones(2, dtype=torch.bfloat16)}}
    parcel = device.Parcel(trees, CPU)
    parcel.dispatch(trees)
    first = parcel.open()
    parcel.dispatch({"a": {"w": weight + 1, "n": torch.tensor(4)}, "b": {"h": torch.zeros(2, dtype=torch.bfloat16)}})
    assert cases.bits(first) == cases.bits(trees)
    assert first["a"]["w"].is_contiguous()
    assert parcel.open()["a"]["n"] == 4


def test_the_devices_generator_is_as_before_afterwards() -> None:
    def draws() -> list[float]:
        with device.device_rng(CPU, 7, "dropout", 3, 1):
            return torch.rand(3).tolist()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert draws() == draws()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("gpu")
def test_a_model_that_draws_trains_one_client_at_a_time_on_a_device() -> None:
    def replicas(model: str) -> int:
        fed = cases.federation(model=model, engine="cuda", cohort="all", workers=5)
        return len(engines.make("cuda", 5, "", fed._trainer, fed._setup)._replicas)

    assert replicas("small") == 5
    assert replicas("dropout") == replicas("odd") == 2  # two devices


@pytest.mark.usefixtures("gpu")
def test_a_raw_update_stays_on_the_device_and_any_other_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(cuda, "finish", lambda *a, real=cuda.finish: calls.append(a[2]) or real(*a))
    for options, finished in [
        ({}, False),
        ({"method": lamina.FedProx(0.1)}, False),
        ({"method": lamina.FedAdam()}, False),
        ({"method": lamina.Scaffold()}, True),
        ({"uplink": lamina.wire.TopK(0.1)}, True),
        ({"through_bytes": True}, True),
        ({"model": "odd"}, True),  # it has buffers
    ]:
        calls.clear()
        list(cases.federation(**{"model": "small", "engine": "cuda"} | options).run(1))
        assert bool(calls) is finished, options


# ---- as in `loop`


def states(fed: Callable[..., Federation], rounds: int = 2, **options: Any) -> None:
    made = [cases.states(fed(engine=engine, **options), rounds)[-1] for engine in ("loop", "cuda")]
    for name, x in made[0].params.items():
        torch.testing.assert_close(made[1].params[name], x, rtol=1e-5, atol=1e-6)


def images(clients: int = 4, **options: Any) -> ClientData:
    source = torch.Generator().manual_seed(2)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        return torch.randint(256, (n, 8, 8, 1), generator=source, dtype=torch.uint8), torch.arange(n) % 4

    transform = Images((0.5,), (0.25,), **options)
    return ClientData.from_clients({str(c): draw(9 + 3 * c) for c in range(clients)}, test=draw(9), transform=transform)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("augmentation", [{}, {"crop": 1, "flip": True}])
def test_images_are_augmented_by_the_same_draws(augmentation: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))
    local = LocalSGD(batch_size=8, epochs=2)
    states(lambda **options: Federation(model, images(**augmentation), local=local, **options))


@pytest.mark.usefixtures("gpu")
def test_dictionaries_and_windows_of_text() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(a + b)

    source = torch.Generator().manual_seed(3)
    x = {"a": torch.randn(20, 4, generator=source), "b": torch.randn(20, 4, generator=source)}
    groups = {"p": torch.arange(13), "q": torch.arange(13, 20)}
    data = ClientData.from_index(x, torch.arange(20) % 3, groups)
    states(lambda **options: Federation(Two, data, local=LocalSGD(batch_size=4), **options))

    text = torch.randint(6, (40,), generator=source, dtype=torch.uint8)
    data = ClientData.from_index(torch.arange(30), torch.arange(30) % 3, groups, transform=Windows(text, 5))
    model = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(20, 3))
    states(lambda **options: Federation(model, data, local=LocalSGD(batch_size=4), **options))


@pytest.mark.usefixtures("gpu")
def test_a_diverging_client_is_refused_there_too() -> None:
    clean = cases.data()
    clients = {name: clean.examples(clean.indices_of(i)) for i, name in enumerate(clean.names)}
    clients["ann"] = (clients["ann"][0].clone().fill_(3e38), clients["ann"][1])
    data = ClientData.from_clients(clients, test=clean.test)
    for diagnostics in (True, False):
        records = [
            next(Federation(cases.small, data, engine=engine, seed=3, diagnostics=diagnostics).run(1))[1]
            for engine in ("loop", "cuda")
        ]
        assert [event["client"] for event in records[1].events] == ["ann"]
        assert records[1].events[0]["layer"] == records[0].events[0]["layer"]


@pytest.mark.usefixtures("gpu")
def test_an_exception_in_a_clients_step_names_the_client() -> None:
    calls = iter([None] * 8)

    def loss(output: Tensor, y: Tensor) -> Tensor:
        if next(calls, "over") == "over":
            raise ValueError("no such thing")
        return nn.functional.cross_entropy(output, y)

    with pytest.raises(RunError, match="ValueError: no such thing") as caught:
        list(cases.federation(model="small", loss=loss, engine="cuda").run(9))
    assert caught.value.code == "E304"
    assert any(repr(name) in caught.value.where for name in cases.SIZES)


# ---- capture


class Replayed:
    """What a graph does, without one: the same step again, its result written to the same place."""

    def __init__(self, step: Any, grads: tuple[Tensor, ...]):
        self.step = step
        self.grads = grads

    def replay(self) -> None:
        for there, here in zip(self.grads, self.step({}), strict=True):
            there.copy_(here)


@pytest.fixture
def graphs(gpu: None, monkeypatch: pytest.MonkeyPatch) -> list[Replayed]:
    """Graphs are captured from the third step of a size on."""
    made: list[Replayed] = []

    def recorded(step: Any, read: dict[str, Any], stream: Any, pool: Any) -> tuple[Replayed, tuple[Tensor, ...]]:
        grads = tuple(g.clone() for g in step(read))
        made.append(Replayed(step, grads))
        return made[-1], grads

    class Place(cuda._Place):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            self.captures = True

    monkeypatch.setattr(cuda, "_recorded", recorded)
    monkeypatch.setattr(cuda, "_Place", Place)
    monkeypatch.setattr(cuda, "_OFTEN", 3)
    return made


@pytest.mark.parametrize(
    "name", ["fedavg", "fedprox", "scaffold", "fedlama, scaffold", "ssfl, fedlama", "flare", "feddyn", "feddst"]
)
@pytest.mark.parametrize("model", ["double", "odd"])
def test_what_is_around_a_graph_changes_nothing(graphs: list[Replayed], name: str, model: str) -> None:
    local = LocalSGD(lr=0.1, batch_size=8, epochs=2)
    expected = cases.states(cases.case(name, model=model, cohort="all", local=local))[-1]
    state = cases.states(cases.case(name, model=model, cohort="all", local=local, engine="cuda", workers=2))[-1]
    assert graphs
    for tree in ("params", "buffers"):
        for n, x in getattr(expected, tree).items():
            torch.testing.assert_close(getattr(state, tree)[n], x, rtol=0, atol=1e-9 if model == "double" else 1e-5)


def test_augmented_minibatches_are_written_into_the_graphs_input(graphs: list[Replayed]) -> None:
    def fed(**options: Any) -> Federation:
        return Federation(cases.small, images(crop=1, flip=True), local=LocalSGD(batch_size=8, epochs=3), **options)

    states(fed, 3)
    assert graphs


def captures(fed: Federation, rounds: int) -> cuda._Replica:
    """The first replica after so many rounds."""
    engine = engines.make("cuda", 1, "", fed._trainer, fed._setup)
    state, books = fed.start(engine)
    for _ in range(rounds):
        state, _ = fed.round(state, engine, rounds, False, books)
    return engine._replicas[0]


class Timed(FedAvg):
    """Its correction reads numbers of the plan: one that stays, one that changes in round 2."""

    def plan(self, server: Any, plan: Plan) -> Plan:
        return plan.set(part=1.0 if plan.round < 2 else 0.5)

    def correct(self, client: Any, plan: Plan, step: Tensor, params: Params, grads: Params) -> Params:
        return {name: g * (plan.config["part"] * plan.participation) for name, g in grads.items()}


def test_a_number_that_a_graph_has_read_and_that_changes_makes_it_stale(graphs: list[Replayed]) -> None:
    def fed() -> Federation:
        return cases.federation(Timed(), "double", cohort="all", engine="cuda", workers=1)

    (ground,) = captures(fed(), 2)._grounds.values()
    assert ground.graphs[8].read == {"config": {"part": 1.0}, "participation": 1.0}
    (ground,) = captures(fed(), 3)._grounds.values()
    assert 8 not in ground.graphs


class Grows(FedAvg):
    """Its shared tree is another one in round 1."""

    def plan(self, server: Any, plan: Plan) -> Plan:
        return plan.share(part={"x": torch.full((1 + min(plan.round, 1),), 0.5 + plan.round)})

    def correct(self, client: Any, plan: Plan, step: Tensor, params: Params, grads: Params) -> Params:
        return {name: g * plan.shared["part"]["x"][0] for name, g in grads.items()}


def test_trees_of_another_form_make_graphs_stale(graphs: list[Replayed]) -> None:
    """Their addresses change, and no graph may read the old ones; where only values change, it reads the new ones."""

    def fed(**options: Any) -> Federation:
        return cases.federation(Grows(), "small", cohort="all", **options)

    replica = captures(fed(engine="cuda"), 3)
    assert replica._times == replica.place.times == 2
    states(fed, 4)


class Swaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 4)
        self.last: Tensor
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach().mean()
        return self.layer(x.flatten(1))


class Asks(FedAvg):
    def correct(self, client: Any, plan: Plan, step: Tensor, params: Params, grads: Params) -> Params:
        return {name: g / plan.kept(name) for name, g in grads.items()}


@pytest.mark.parametrize(
    ("model", "method", "why"),
    [(Swaps, None, "in the place of its buffer last"), (cases.small, Asks(), "calls plan.kept")],
    ids=["buffer", "method"],
)
def test_what_cannot_be_captured_goes_step_by_step_and_says_so_once(
    graphs: list[Replayed], model: Any, method: Any, why: str
) -> None:
    expected = cases.states(Federation(model, cases.data(), method=method, engine="loop", local=LocalSGD(steps=4)), 3)
    fed = Federation(model, cases.data(), method=method, engine="cuda", local=LocalSGD(steps=4))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        state = cases.states(fed, 3)[-1]
    own = [str(w.message) for w in said if "CUDA graph" in str(w.message)]
    assert len(own) == 2  # one for each device
    assert why in own[0]
    for name, x in expected[-1].params.items():
        torch.testing.assert_close(state.params[name], x, rtol=1e-5, atol=1e-6)


def test_the_trainer_finds_a_buffer_that_was_replaced() -> None:
    fed = Federation(Swaps, cases.data(), engine="loop")
    trainer: Trainer = fed._trainer
    trainer.load(*fed.initial)
    assert trainer.replaced is None
    trainer.forward(torch.ones(2, 1, 8, 8))
    assert trainer.replaced == "last"
    trainer.load(*fed.initial)
    assert trainer.replaced is None


# ---- the benchmark


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_benchmark_says_in_one_sentence_that_it_needs_a_gpu() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip().count("\n") == 0
    assert "torch finds none here" in done.stderr


def test_the_benchmarks_model_is_the_published_one() -> None:
    assert sum(p.numel() for p in lamina.models.pfl_cnn().parameters()) == 1_626_442


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_benchmarks_eager_loop_makes_the_same_model(monkeypatch: pytest.MonkeyPatch, momentum: float) -> None:
    """What is compared does the same work, dropout included."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    gpu = importlib.import_module("gpu")
    local = LocalSGD(lr=0.1, batch_size=8, momentum=momentum)
    fed = cases.federation(model="dropout", engine="cuda", local=local)
    ours, plain = gpu.Lamina(fed), gpu.Eager(fed, CPU)
    for contender in (ours, plain):
        seconds = contender.rounds()
        assert all(next(seconds) > 0 for _ in range(3))
        seconds.close()
    for name, own in zip(fed.initial.params, plain._whole, strict=True):
        torch.testing.assert_close(own, ours._state.params[name], rtol=1e-4, atol=1e-5)
    assert plain.accuracy() == pytest.approx(ours.accuracy())
