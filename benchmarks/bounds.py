"""Where the time of a round goes, and how far it is from the arithmetic: one thread, the works of benchmarks/speed.py.

    python benchmarks/bounds.py [--works W1,W2b] [--rounds 3] [--out FILE]

bound      the products and convolutions of the round, at the best rate of a large one of either on one thread
groups     shares of a round under torch's profiler, which slows small operations more than large ones: products and
           convolutions · other kernels of a local step · making batches · the rest of torch (differences, norms,
           sums, copies) · no kernel (Python, the profiler)
outside    share of a round, unprofiled, that is not local training (engine `loop` only)
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import speed
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import lamina
from lamina.cohort import draw
from lamina.engine import mkl
from lamina.engine.allocator import keep_memory
from lamina.training import batches

GROUPS = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "convolution", "conv2d", "dot"),
    "other kernels": (
        "relu", "threshold", "tanh", "max_pool", "avg_pool", "mean", "softmax", "nll_loss", "cross_entropy",
        "group_norm", "batch_norm", "add", "mul", "gather", "scatter", "exp", "log", "logsumexp", "amax", "_foreach",
    ),
    "batches": ("index", "index_select", "to", "_to_copy", "div", "sub", "randperm", "contiguous", "clone", "copy"),
}  # fmt: skip


def group_of(name: str) -> str:
    name = name.removeprefix("aten::").removeprefix("mkldnn_").removeprefix("native_").removesuffix("_")
    for group, starts in GROUPS.items():
        if any(name == start or name.startswith((f"{start}_", f"{start}2", f"_{start}")) for start in starts):
            return group
    return "rest of torch"


class Found(NamedTuple):
    work: str
    engine: str
    seconds: float  # of a round, unprofiled, median
    gflop: float  # of its products and convolutions
    bound: float  # seconds
    shares: dict[str, float]
    outside: float | None


def peak() -> float:
    """FLOP/s of one thread: the best of some products of matrices and some convolutions."""
    a = torch.randn(1024, 1024)
    x = torch.randn(16, 128, 32, 32).contiguous(memory_format=torch.channels_last)
    w = torch.randn(128, 128, 3, 3).contiguous(memory_format=torch.channels_last)
    ways = {
        2 * 1024**3: lambda: a @ a,
        2 * 16 * 32 * 32 * 128 * 128 * 9: lambda: torch.nn.functional.conv2d(x, w, padding=1),
    }
    best = 0.0
    for flops, run in ways.items():
        for _ in range(12):
            began = time.perf_counter()
            run()
            best = max(best, flops / (time.perf_counter() - began))
    return best


def flops_of(work: speed.Work, data: lamina.ClientData) -> float:
    """Of a full local step, forward and backward, per example."""
    fed = speed.federation(work, data, "loop", None)
    model, size = fed.model, work.local.batch_size or 1
    x = data.transform(data.x[:size], None)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.cross_entropy(model(x), data.y[:size]).backward()
    return float(counter.get_total_flops()) / size


def examples_of(work: speed.Work, data: lamina.ClientData, round: int) -> int:
    cohort = draw(0, round, len(data), work.cohort)
    return sum(len(batch) for client in cohort for batch in batches(data, client, work.local, 0, round))


def profiled(name: str, engine: str, rounds: int, rate: float) -> Found:
    work = speed.WORKS[name]
    data = speed.load(work)
    run = speed.with_lamina(work, data, engine, 1)
    seconds = sorted(itertools.islice(run, 1, 1 + rounds))[rounds // 2]
    for _ in range(2):  # the first time the profiler sets itself up
        with profile(activities=[ProfilerActivity.CPU]) as prof:
            began = time.perf_counter()
            next(run)
            whole = time.perf_counter() - began
    run.close()  # type: ignore[attr-defined]
    shares = dict.fromkeys([*GROUPS, "rest of torch"], 0.0)
    for event in prof.key_averages():
        shares[group_of(event.key)] += event.self_cpu_time_total / 1e6 / whole
    shares["no kernel"] = 1 - sum(shares.values())
    flops = flops_of(work, data) * sum(examples_of(work, data, t) for t in range(1, 1 + rounds)) / rounds
    outside = speed.bookkeeping(work, data, rounds) if engine == "loop" else None
    return Found(name, engine, seconds, flops / 1e9, flops / rate, shares, outside)


def table(found: Sequence[Found]) -> str:
    titles = ["work", "engine", "s/round", "GFLOP", "bound, s", "bound / round", *found[0].shares, "outside training"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in found:
        cells = [row.work, row.engine, f"{row.seconds:.4f}", f"{row.gflop:.2f}", f"{row.bound:.4f}"]
        cells += [f"{row.bound / row.seconds:.0%}", *(f"{share:.0%}" for share in row.shares.values())]
        lines.append(f"| {' | '.join([*cells, '' if row.outside is None else f'{row.outside:.1%}'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", default=",".join(speed.WORKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="append the table to this Markdown file")
    options = parser.parse_args()
    keep_memory()
    mkl.switch()
    torch.set_num_threads(1)
    rate = peak()
    found = []
    for name in options.works.split(","):
        engines = ["loop", "stacked"] if name == "W2b" else ["loop"]
        found += [profiled(name, engine, options.rounds, rate) for engine in engines]
    said = f"{json.dumps(speed.hardware())}\n\none thread, {rate / 1e9:.0f} GFLOP/s\n\n{table(found)}\n"
    print(said)
    if options.out:
        with options.out.open("a") as file:
            file.write(said)


if __name__ == "__main__":
    main()
