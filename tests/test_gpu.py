"""On a GPU: streams, real graphs, and how close all of it is to `loop`. `pytest -m gpu`; skipped where there is none.
All around it is tested without one: test_cuda.py, laws/test_cuda.py."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
import lamina.engine as engines
from lamina import Federation, LocalSGD, State
from lamina.engine import cuda
from lamina.models import cnn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU (torch.cuda.is_available())"),
]

ON_ODD = {"personal", "personal, fedlama"}
LOCAL = LocalSGD(lr=0.1, batch_size=8, epochs=2)


@pytest.fixture(autouse=True)
def captured_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the few steps of these tests are replayed."""
    monkeypatch.setattr(cuda, "available", torch.cuda.is_available)
    monkeypatch.setattr(cuda, "_OFTEN", 3)


def close(state: State, expected: State, rtol: float, atol: float) -> None:
    assert (state.bytes_up, state.bytes_down) == (expected.bytes_up, expected.bytes_down)
    for tree in ("params", "buffers"):
        for name, x in getattr(expected, tree).items():
            torch.testing.assert_close(getattr(state, tree)[name], x, rtol=rtol, atol=atol, msg=lambda m, n=name: n + m)


def last(fed: Federation, rounds: int) -> State:
    return cases.states(fed, rounds)[-1]


@pytest.mark.parametrize("name", sorted(set(cases.ALL) - ON_ODD))
def test_a_gpu_agrees_with_loop_in_float64(name: str) -> None:
    """1e-8 after five rounds: other kernels add in another order, and no more."""
    options: dict[str, Any] = {"model": "double", "local": LOCAL}
    close(last(cases.case(name, engine="cuda", **options), 5), last(cases.case(name, **options), 5), 0, 1e-8)


@pytest.mark.parametrize("norm", [False, True])
def test_a_gpu_agrees_with_loop_in_float32(norm: bool) -> None:
    """A CNN, without TF32: 1e-3 of each entry or 1e-4 after one round, which one wrong step exceeds by far."""

    def model() -> nn.Module:
        if not norm:
            return cnn(num_classes=4, size=8, kernel=3, channels=(4, 8), padding="same", dense=(16,))
        head = (nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 4))
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), *head)

    feds = [Federation(model, cases.data(), seed=7, engine=e, local=LOCAL) for e in ("cuda", "loop")]
    close(last(feds[0], 1), last(feds[1], 1), 1e-3, 1e-4)


@pytest.mark.parametrize("model", ["small", "odd"])
def test_two_runs_give_the_same_bits_and_so_does_any_number_of_streams(model: str) -> None:
    def run(workers: int) -> dict[str, Any]:
        return cases.everything(last(cases.federation(model=model, cohort="all", engine="cuda", workers=workers), 4))

    one = run(1)
    assert run(1) == one
    assert run(5) == one


def test_dropout_is_the_same_every_time_and_captured() -> None:
    def run(often: int, monkeypatch: pytest.MonkeyPatch) -> State:
        monkeypatch.setattr(cuda, "_OFTEN", often)
        return last(cases.federation(model="dropout", cohort="all", engine="cuda", local=LOCAL), 3)

    with pytest.MonkeyPatch.context() as patch:
        one, two, eager = run(3, patch), run(3, patch), run(10**9, patch)
    assert cases.everything(one) == cases.everything(two)
    close(one, eager, 1e-4, 1e-5)


def replicas(fed: Federation, rounds: int) -> list[cuda._Replica]:
    engine = engines.make("cuda", 2, "", fed._trainer, fed._setup)
    state, books = fed.start(engine)
    for _ in range(rounds):
        state, _ = fed.round(state, engine, rounds, True, books)
    return engine._replicas


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold", "ssfl, fedlama"])
@pytest.mark.parametrize("local", [LOCAL, LocalSGD(batch_size=8, precision="bf16"), LocalSGD(precision="tf32")])
def test_steps_are_really_replayed(name: str, local: LocalSGD) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = replicas(cases.case(name, model="small", cohort="all", engine="cuda", local=local), 5)
    assert all(replica.place.captures for replica in made)
    assert all(ground.graphs for ground in made[0]._grounds.values())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_replay_is_the_step(momentum: float) -> None:
    local = LocalSGD(lr=0.1, batch_size=8, epochs=2, momentum=momentum, weight_decay=0.01, clip=0.5)
    with pytest.MonkeyPatch.context() as patch:
        replayed = last(cases.federation(model="small", engine="cuda", local=local), 3)
        patch.setattr(cuda, "_OFTEN", 10**9)
        eager = last(cases.federation(model="small", engine="cuda", local=local), 3)
    close(replayed, eager, 1e-5, 1e-6)


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x.flatten(1))
        return -out if out.detach().sum().item() > 0 else out


def test_a_model_that_looks_at_values_goes_step_by_step_and_is_right() -> None:
    feds = [Federation(Looks, cases.data(), engine=e, local=LOCAL) for e in ("cuda", "loop")]
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        state = last(feds[0], 2)
    close(state, last(feds[1], 2), 1e-3, 1e-4)


def test_torch_is_left_as_it_was() -> None:
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = (
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.cuda.get_sync_debug_mode(),
        torch.cuda.current_stream(), generator.get_state().tolist(),
    )  # fmt: skip
    last(cases.federation(model="dropout", engine="cuda", local=LocalSGD(precision="tf32")), 2)
    assert before == (
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.cuda.get_sync_debug_mode(),
        torch.cuda.current_stream(), generator.get_state().tolist(),
    )  # fmt: skip


def test_memory_does_not_grow_with_the_rounds() -> None:
    fed = cases.federation(model="small", cohort="all", engine="cuda", local=LOCAL)
    used = []
    for _ in fed.run(30, evaluate_every=1):
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert max(used[10:]) == min(used[10:])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_several_gpus_give_the_same_bits_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    both = last(cases.federation(model="small", cohort="all", engine="cuda", workers=4), 3)
    monkeypatch.setattr(cuda, "devices", lambda: [torch.device("cuda", 0)])
    one = last(cases.federation(model="small", cohort="all", engine="cuda", workers=4), 3)
    assert cases.everything(both) == cases.everything(one)
