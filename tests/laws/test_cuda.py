"""Law: `cuda` agrees with `loop` to rounding, for every method and chain. Here its device is the CPU, where all of it
runs but streams and the capture of graphs; with a GPU (`pytest -m gpu`): test_gpu.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cases
from lamina import Federation, LocalSGD
from lamina.engine import cuda


@pytest.fixture(autouse=True)
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "available", lambda: True)
    monkeypatch.setattr(cuda, "devices", lambda: [torch.device("cpu")])


def same(fed: Federation, other: Federation, rounds: int = cases.ROUNDS, atol: float = 1e-9) -> None:
    """Float64, so 1e-9 is far above rounding and far below what one wrong step would change."""
    assert fed.engine == "cuda"
    state, records = cases.finish(fed, rounds)
    expected, others = cases.finish(other, rounds)
    assert (state.bytes_up, state.bytes_down) == (expected.bytes_up, expected.bytes_down)
    for tree in ("params", "buffers"):
        assert getattr(state, tree).keys() == getattr(expected, tree).keys()
        for name, x in getattr(expected, tree).items():
            torch.testing.assert_close(
                getattr(state, tree)[name], x, rtol=0, atol=atol, msg=lambda m, n=name: f"{n} {m}"
            )
    for record, one in zip(records, others, strict=True):
        assert [c._replace(loss=0) for c in record.clients] == [c._replace(loss=0) for c in one.clients]
        assert record.traffic == one.traffic
        assert record.train_loss == pytest.approx(one.train_loss, abs=max(atol, 1e-9))
        assert record.accuracy == one.accuracy
        assert record.personal_accuracy == one.personal_accuracy
        assert record.accuracy_before == one.accuracy_before


ON_ODD = {"personal", "personal, fedlama"}  # named layers that only that model has


@pytest.mark.parametrize("name", cases.the_rest_slowly(sorted(set(cases.ALL) - ON_ODD), cases.METHODS))
def test_cuda_agrees_with_loop_to_rounding(name: str) -> None:
    """Three clients a round on two replicas: the third one waits for the first."""
    same(cases.case(name, model="double", engine="cuda", workers=2), cases.case(name, model="double"))


@pytest.mark.parametrize(
    ("name", "buffers"),
    [
        *((name, "average") for name in (*sorted(ON_ODD), "fedavg", "fedlama, scaffold", "ssfl, fedlama")),
        *((name, "keep") for name in ("personal", "fedavg", "fedlama, scaffold", "localonly")),
        *((name, "skip") for name in ("fedavg", "ssfl, fedlama")),
    ],
)
def test_cuda_agrees_with_loop_where_the_model_has_buffers_and_dropout(name: str, buffers: str) -> None:
    """BatchNorm, a tied and a frozen layer, counting and unsaved buffers; float32, and on the CPU the same dropout."""
    options = {"accuracy_before": True, "cohort": "all"}
    one = cases.case(name, engine="cuda", workers=2, **{"buffers": buffers} | options)
    same(one, cases.case(name, **{"buffers": buffers} | options), 3, atol=1e-5)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold", "errorfeedback"])
@pytest.mark.parametrize(
    "local",
    [
        LocalSGD(lr=0.1, batch_size=8, epochs=3, schedule="exp:0.9"),
        LocalSGD(lr=0.1, batch_size=None, epochs=2),
        LocalSGD(lr=0.1, batch_size=5, steps=9),
        LocalSGD(lr=0.1, batch_size=8, momentum=0.9, weight_decay=0.01, clip=0.5, epochs=2),
    ],
    ids=["epochs", "whole", "steps", "all"],
)
def test_cuda_agrees_with_loop_whatever_the_local_training(name: str, local: LocalSGD) -> None:
    if name == "scaffold":
        local = replace(local, momentum=0.0, weight_decay=0.0, clip=None)  # it assumes plain SGD
    options = {"model": "double", "local": local, "cohort": "all"}
    same(cases.case(name, engine="cuda", workers=4, **options), cases.case(name, **options), 3)


@pytest.mark.parametrize("codec", ["lossless", "int8", "topk, global, int8", "randomk, fp16"])
def test_cuda_agrees_with_loop_whatever_the_uplink(codec: str) -> None:
    """One round: where rounding moves an entry over the edge of a code, later rounds differ by that step."""
    options = {"uplink": cases.CODECS[codec], "model": "double"}
    same(cases.federation(engine="cuda", **options), cases.federation(**options), 1, atol=1e-6)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold", "fedlama, scaffold", "ssfl, fedlama"])
def test_cuda_gives_the_same_bits_for_any_number_of_replicas(name: str) -> None:
    one, records = cases.finish(cases.case(name, engine="cuda", workers=1, cohort="all"))
    for workers in (2, 5):
        other, others = cases.finish(cases.case(name, engine="cuda", workers=workers, cohort="all"))
        assert cases.everything(other) == cases.everything(one)
        assert others == records


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_cuda_gives_the_same_bits_on_several_devices(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    one = cases.finish(cases.case(name, engine="cuda", cohort="all"))
    monkeypatch.setattr(cuda, "devices", lambda: [torch.device("cpu")] * 3)
    other = cases.finish(cases.case(name, engine="cuda", workers=4, cohort="all"))
    assert cases.everything(other[0]) == cases.everything(one[0])
    assert other[1] == one[1]


@pytest.mark.parametrize("name", ["fedavg", "fedlama", "scaffold", "ssfl, errorfeedback, fedlama, fedavgm"])
def test_cuda_goes_on_from_a_state_as_if_it_had_never_stopped(name: str) -> None:
    whole, _ = cases.finish(cases.case(name, engine="cuda"))
    first = cases.states(cases.case(name, engine="cuda"), 2)[-1]
    rest = cases.states(cases.case(name, engine="cuda"), cases.ROUNDS - 2, first)[-1]
    assert cases.everything(rest) == cases.everything(whole)
