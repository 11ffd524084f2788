"""Law: `loop` and `processes` agree to the last bit, for any number of workers; `threads` and `stacked` to rounding,
and `stacked` with itself to the last bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cases
from lamina import Federation, LocalSGD
from lamina.engine.processes import available
from lamina.engine.stack import Vmapped

forked = pytest.mark.skipif(not available(), reason="no fork here")


@forked
@pytest.mark.parametrize("workers", cases.the_rest_slowly([1, 2, 3], [2]))
@pytest.mark.parametrize("name", cases.ALL)
def test_processes_give_the_bits_of_loop(name: str, workers: int) -> None:
    state, records = cases.finish(cases.case(name))
    other, others = cases.finish(cases.case(name, engine="processes", workers=workers))
    assert cases.everything(other) == cases.everything(state)
    assert others == records


@forked
@pytest.mark.parametrize("codec", ["lossless", "int8", "topk, global, int8", "randomk, fp16"])
def test_processes_give_the_bits_of_loop_whatever_the_uplink(codec: str) -> None:
    def fed(**options):
        return cases.federation(cases.ALL["fedprox, fedlama"](), uplink=cases.CODECS[codec], **options)

    state, records = cases.finish(fed(), 4)
    other, others = cases.finish(fed(engine="processes", workers=2), 4)
    assert cases.everything(other) == cases.everything(state)
    assert others == records


@forked
@pytest.mark.parametrize("name", cases.SENT_LOSSLESS)
def test_processes_give_the_bits_of_loop_where_distances_go_down(name: str) -> None:
    state, records = cases.finish(cases.case(name, downlink=cases.LOSSLESS))
    other, others = cases.finish(cases.case(name, downlink=cases.LOSSLESS, engine="processes", workers=2))
    assert cases.everything(other) == cases.everything(state)
    assert others == records


@forked
@pytest.mark.parametrize(
    ("model", "buffers"),
    [("odd", "average"), ("odd", "keep"), ("odd", "skip"), ("double", "average"), ("dropout", "keep")],
)
def test_processes_give_the_bits_of_loop_whatever_the_model(model: str, buffers: str) -> None:
    local = LocalSGD(lr=0.05, momentum=0.9, weight_decay=0.01, clip=1.0, steps=3, batch_size=8)
    options = {"model": model, "buffers": buffers, "local": local, "cohort": "all"}
    state, records = cases.finish(cases.federation(**options), 2)
    other, others = cases.finish(cases.federation(engine="processes", workers=3, **options), 2)
    assert cases.everything(other) == cases.everything(state)
    assert others == records


@pytest.mark.parametrize("name", ["fedavg", "fedlama", "fedlama, scaffold"])
def test_threads_agree_with_loop_to_rounding(name: str) -> None:
    """Sums over several threads are grouped differently: float64, so 1e-9 is far above rounding and far below noise."""
    state, _ = cases.finish(cases.case(name, model="double"))
    other, _ = cases.finish(cases.case(name, model="double", engine="threads"))
    assert (other.bytes_up, other.bytes_down) == (state.bytes_up, state.bytes_down)
    for layer, x in state.params.items():
        torch.testing.assert_close(other.params[layer], x, rtol=0, atol=1e-9)


ON_ODD = {"personal", "personal, fedlama"}  # named layers that only that model has


def stacked(name: str, width: int = 2, **options) -> Federation:
    """A federation of float64 networks that trains so many clients at a time."""
    fed = cases.case(name, model="double", engine="stacked", **options)
    assert fed.engine == "stacked", fed.engine_reason
    fed._stack.width = width
    return fed


def same(state, expected) -> None:
    """Float64, so 1e-9 is far above rounding and far below what one wrong step would change."""
    assert (state.bytes_up, state.bytes_down) == (expected.bytes_up, expected.bytes_down)
    for layer, x in expected.params.items():
        torch.testing.assert_close(state.params[layer], x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", sorted(set(cases.ALL) - ON_ODD))
def test_stacked_agrees_with_loop_to_rounding(name: str) -> None:
    """Three clients a round, two at a time: stacks of two and of one, states of newcomers beside those of others."""
    expected, records = cases.finish(cases.case(name, model="double"))
    state, others = cases.finish(stacked(name, workers=1))
    same(state, expected)
    for record, other in zip(records, others, strict=True):
        assert [c._replace(loss=0) for c in other.clients] == [c._replace(loss=0) for c in record.clients]
        assert other.traffic == record.traffic
        assert other.train_loss == pytest.approx(record.train_loss, abs=1e-9)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold"])
@pytest.mark.parametrize("way", ["written out", "vmap"])
@pytest.mark.parametrize(
    "local",
    [
        LocalSGD(lr=0.1, batch_size=8, epochs=3),
        LocalSGD(lr=0.1, batch_size=None, epochs=2),
        LocalSGD(lr=0.1, batch_size=5, steps=9),
        LocalSGD(lr=0.1, batch_size=8, weight_decay=0.01, clip=0.5),
        LocalSGD(lr=0.1, batch_size=8, momentum=0.9, weight_decay=0.01, clip=0.5, epochs=2),
    ],
    ids=["epochs", "whole", "steps", "clip", "all"],
)
def test_stacked_agrees_with_loop_whatever_the_local_training(name: str, way: str, local: LocalSGD) -> None:
    if name == "scaffold":
        local = replace(local, momentum=0.0, weight_decay=0.0, clip=None)  # it assumes plain SGD
    expected, _ = cases.finish(cases.case(name, model="double", local=local, cohort="all"), 3)
    fed = stacked(name, 4, local=local, cohort="all", workers=1)
    if way == "vmap":
        fed._stack.gradient = Vmapped(fed._trainer)
    same(cases.finish(fed, 3)[0], expected)


@forked
@pytest.mark.parametrize("name", ["fedavg", "fedprox", "errorfeedback", "fedlama, scaffold", "ssfl, fedlama", "lips"])
def test_stacked_gives_the_same_bits_for_any_number_of_workers(name: str) -> None:
    one, records = cases.finish(stacked(name, workers=1, cohort="all"))
    for workers in (2, 3):
        other, others = cases.finish(stacked(name, workers=workers, cohort="all"))
        assert cases.everything(other) == cases.everything(one), f"{workers} workers"
        assert others == records, f"{workers} workers"
