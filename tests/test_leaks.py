"""Over 200 rounds no engine keeps anything: neither tensors nor open files, threads or memory, in no process."""

from __future__ import annotations

import gc
import os
import resource
import sys
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import lamina
from lamina import LocalSGD
from lamina.engine.base import Engine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

SETTLED, ROUNDS = 40, 200
GROWTH = 1 << 20  # bytes: a tenth of a model's update in each of the 160 rounds would be sixteen times as much


class Alive(NamedTuple):
    tensors: int
    entries: int
    files: int
    threads: int


def alive() -> Alive:
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    files = len(os.listdir("/proc/self/fd"))
    return Alive(len(tensors), sum(x.numel() for x in tensors), files, threading.active_count())


def resident(pids: Sequence[int]) -> list[int]:
    """Bytes of these processes."""
    page = resource.getpagesize()
    return [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for pid in pids]


@pytest.mark.parametrize(("engine", "workers"), [("loop", 1), ("processes", 2), ("stacked", 2)])
@pytest.mark.parametrize(
    ("method", "uplink"),
    [
        pytest.param(lamina.FedAvg(), None, id="fedavg"),
        pytest.param(lamina.ErrorFeedback(), lamina.wire.TopK(0.1), id="top-k", marks=pytest.mark.slow),
    ],
)
def test_200_rounds_leave_nothing_behind(
    engine: str, workers: int, method: lamina.Method, uplink: lamina.wire.Codec | None
) -> None:
    data = lamina.data.digits(clients=8, partition="iid")
    fed = lamina.Federation(
        lamina.models.mlp((64, 128, 10)), data, method=method, uplink=uplink, engine=engine, workers=workers,
        local=LocalSGD(lr=0.05, batch_size=64),
    )  # fmt: skip
    made: list[Engine] = []
    fed = fed.through(lambda inner: made.append(inner) or inner) if engine == "processes" else fed
    before: tuple[Alive, list[int]] | None = None
    with closing(fed.run(ROUNDS, evaluate_every=ROUNDS)) as rounds:
        for state, _ in rounds:
            if state.round in (SETTLED, ROUNDS - 1):
                now = alive(), resident((os.getpid(), *(made[0].pids if made else ())))
                if before is not None:
                    assert now[0] == before[0]
                    assert [b - a for a, b in zip(before[1], now[1], strict=True) if b - a > GROWTH] == []
                    return
                before = now
    pytest.fail(f"it ended before round {ROUNDS}")
