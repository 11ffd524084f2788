"""Law: `loop` and `processes` agree to the last bit, for any number of workers; `threads` to rounding."""

from __future__ import annotations

import pytest
import torch

import cases
from lamina import LocalSGD
from lamina.engine import processes
from lamina.engine.processes import available

forked = pytest.mark.skipif(not available(), reason="no fork here")


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it forks, the engine has the collector look through everything: here that is pytest, and takes longer
    than the run."""
    monkeypatch.setattr(processes.gc, "collect", lambda: 0)


@forked
@pytest.mark.parametrize("name", cases.ALL)
def test_processes_give_the_bits_of_loop(name: str) -> None:
    state, records = cases.finish(cases.case(name))
    expected = cases.everything(state)
    for workers in (1, 2, 3):
        other, others = cases.finish(cases.case(name, engine="processes", workers=workers))
        assert cases.everything(other) == expected, f"{workers} workers"
        assert others == records, f"{workers} workers"


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
