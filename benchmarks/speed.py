"""How long a round takes, as ratios inside one interleaved run.

    python benchmarks/speed.py [--works W1,W3] [--repeats 5] [--rounds 3] [--flower PYTHON] [--pfl PYTHON] [--out FILE]

Every contender does the same work: same partition, cohorts and number of steps. First it trains `--rounds` rounds
after one of warm-up, from the same weights over the same batches in the same order, and no comparison is made unless
all end at the same accuracy (within 0.01). Then they take turns, round for round of repeats, so that a machine whose
speed drifts slows all of them alike. Reported is the median over the repeats of seconds per round, its spread, and the
ratio to the single-model loop of the same repeat.

    lamina        the whole product: plan, hooks, ledger, per-layer records, exact byte counts; engine "auto"
    loop          the same with engine="loop" (one thread)
    single-model  one central model over the same batches with every trick and all cores: what no federation can have
    naive         what a first federated script does: deepcopy, DataLoader, torch.optim.SGD, mean of state_dicts
    flower, pfl   in environments of their own, set up as is best for them, with their own order of batches
    ... + ours    the same with the allocator and MKL settings that all others here have

LAMINA_MKL=amd in the environment switches MKL for all but the peers in environments of their own. Evaluation is left
out of every contender's round. Last comes the time from the start of a process to the end of its first round.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import lamina
from lamina.cohort import draw
from lamina.engine import cores, mkl
from lamina.engine.allocator import keep_memory
from lamina.random import generator
from lamina.training import Trainer, batches


class Work(NamedTuple):
    """One of the fixed works: what is trained, on what, how."""

    title: str
    dataset: str
    clients: int
    cohort: int
    model: Callable[[], torch.nn.Module]
    local: lamina.LocalSGD


WORKS = {
    "W1": Work("CNN 184,586, B=32", "fashion_mnist", 100, 10, lamina.models.cnn,
               lamina.LocalSGD(lr=0.02, momentum=0.9, batch_size=32)),
    "W2": Work("CNN 184,586, B=10", "fashion_mnist", 1000, 100, lamina.models.cnn,
               lamina.LocalSGD(lr=0.05, batch_size=10)),
    "W2b": Work("MLP 784-64-10, B=10", "fashion_mnist", 1000, 100, lambda: lamina.models.mlp((784, 64, 10)),
                lamina.LocalSGD(lr=0.05, batch_size=10)),
    "W3": Work("ResNet20-GN, B=32", "cifar10", 100, 10, lambda: lamina.models.resnet20(norm="group"),
               lamina.LocalSGD(lr=0.1, batch_size=32, steps=5)),
    "W4": Work("MLP 11.1 M, B=10", "fashion_mnist", 1000, 10, lambda: lamina.models.mlp((784, 3072, 2816, 10)),
               lamina.LocalSGD(lr=0.05, batch_size=10)),
}  # fmt: skip

SAME = 0.01  # of the accuracy

# `keep_memory` for programs of others: glibc reads these when a process starts
GLIBC_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


def load(work: Work) -> lamina.ClientData:
    options = {"augment": False} if work.dataset == "cifar10" else {}
    return lamina.data.load(work.dataset, clients=work.clients, partition="dirichlet:0.5", seed=0, **options)


def federation(work: Work, data: lamina.ClientData, engine: str, workers: int | None) -> lamina.Federation:
    return lamina.Federation(work.model, data, cohort=work.cohort, local=work.local, engine=engine, workers=workers)


def with_lamina(work: Work, data: lamina.ClientData, engine: str, workers: int | None = None) -> Iterator[float]:
    """Seconds of each round, for ever; evaluation is left out."""
    fed = federation(work, data, engine, workers)
    for _, record in fed.run(10**9, evaluate_every=10**9):
        yield record.seconds


def accuracy_of(work: Work, data: lamina.ClientData, engine: str, rounds: int) -> float:
    *_, (_, record) = federation(work, data, engine, None).run(rounds, evaluate_every=rounds)
    assert record.accuracy is not None, "the last round is evaluated"
    return record.accuracy


def single_model(work: Work, data: lamina.ClientData) -> Iterator[float]:
    """The same batches through one model that is never averaged, on all cores."""
    fed = federation(work, data, "loop", None)
    trainer, local = fed._trainer, work.local
    trainer.load(fed.initial.params, fed.initial.buffers)
    trainer.model.train()
    weights = trainer.weights
    velocity = [torch.zeros_like(w) for w in weights]
    round = 0
    while True:
        before = torch.get_num_threads()
        torch.set_num_threads(cores())
        began = time.perf_counter()
        for client in draw(0, round, len(data), work.cohort):
            for indices in batches(data, client, local, 0, round):
                x, y = trainer.batch(indices, None)
                grads, _ = trainer.gradient(x, y)
                with torch.no_grad():
                    step: list[torch.Tensor] = list(grads)
                    if local.momentum:
                        torch._foreach_mul_(velocity, local.momentum)
                        torch._foreach_add_(velocity, step)
                        step = velocity
                    torch._foreach_add_(weights, step, alpha=-local.lr)
        seconds = time.perf_counter() - began
        torch.set_num_threads(before)
        round += 1
        yield seconds


class _Set(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """What a script's author writes: items one by one, converted in __getitem__."""

    def __init__(self, data: lamina.ClientData, indices: torch.Tensor):
        x, self.y = data.examples(indices)
        self.x = data.transform(x, None)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[i], self.y[i]


def naive(work: Work, data: lamina.ClientData) -> Iterator[tuple[float, torch.nn.Module]]:
    """deepcopy, DataLoader, an optimizer object, the mean of the state_dicts: seconds of each round, and the model."""
    server = federation(work, data, "loop", None).model
    local = work.local
    sets = {}
    round = 0
    while True:
        before = torch.get_num_threads()
        torch.set_num_threads(cores())
        cohort = draw(0, round, len(data), work.cohort)
        for client in cohort:
            sets.setdefault(client, _Set(data, data.indices_of(client)))
        began = time.perf_counter()
        states, sizes = [], []
        for client in cohort:
            model = copy.deepcopy(server)
            optimizer = torch.optim.SGD(model.parameters(), lr=local.lr, momentum=local.momentum)
            order = torch.utils.data.RandomSampler(sets[client], generator=generator(0, "order", round, client))
            loader = torch.utils.data.DataLoader(sets[client], batch_size=local.batch_size, sampler=order)
            left = local.count(len(sets[client]))
            while left > 0:
                for x, y in loader:
                    optimizer.zero_grad()
                    torch.nn.functional.cross_entropy(model(x), y).backward()
                    optimizer.step()
                    left -= 1
                    if left == 0:
                        break
            states.append(model.state_dict())
            sizes.append(len(sets[client]))
        total = sum(sizes)
        mean = {k: sum(s[k] * (n / total) for s, n in zip(states, sizes, strict=True)) for k in states[0]}
        server.load_state_dict(mean)
        seconds = time.perf_counter() - began
        torch.set_num_threads(before)
        round += 1
        yield seconds, server


def bookkeeping(work: Work, data: lamina.ClientData, rounds: int) -> float:
    """Share of a round of engine "loop" that is not local training (plan, hooks, wire, ledger, mean, records)."""
    fed = federation(work, data, "loop", None)
    training = 0.0
    train = Trainer.train

    def timed(self: Trainer, *args: object) -> object:
        nonlocal training
        began = time.perf_counter()
        result = train(self, *args)  # type: ignore[arg-type]
        training += time.perf_counter() - began
        return result

    Trainer.train = timed  # type: ignore[method-assign, assignment]
    try:
        records = itertools.islice(fed.run(10**9, evaluate_every=10**9), rounds)  # no last round, which is evaluated
        total = sum(record.seconds for _, record in records)
    finally:
        Trainer.train = train  # type: ignore[method-assign]
    return 1 - training / total


def write_work(path: Path, work: Work, data: lamina.ClientData, rounds: int, check: bool = False) -> None:
    """All that a peer needs, for its environment has no lamina; the rounds are those of the other contenders.

    Args:
        check: also the first weights, the batches and the examples to be tested with.
    """
    local = work.local
    cohorts = [draw(0, round, len(data), work.cohort) for round in range(rounds)]
    more = {}
    if check:
        order = [b for t, cohort in enumerate(cohorts) for client in cohort for b in batches(data, client, local, 0, t)]
        state = federation(work, data, "loop", None).model.state_dict()
        test_x, test_y = data.test
        more = {
            "batches": torch.cat(order).numpy(),
            "sizes": np.array([len(b) for b in order]),
            "initial": torch.cat([x.flatten() for x in state.values()]).numpy(),
            "test_x": data.transform(test_x, None).numpy(),
            "test_y": test_y.numpy(),
        }
    np.savez(
        path,
        x=data.transform(data.x, None).numpy(),
        y=data.y.numpy(),
        offsets=data.offsets.numpy(),
        indices=data.indices.numpy(),
        cohorts=np.array(cohorts, dtype=np.int64),
        steps=local.steps or 0,  # 0: so many epochs
        epochs=local.epochs,
        batch_size=local.batch_size,
        lr=local.lr,
        momentum=local.momentum,
        **more,
    )


def peer(run: Peer, name: str, work: Work, data: lamina.ClientData, repeats: int, rounds: int) -> Iterator[float]:
    """A peer in its own environment, started anew for each repeat: benchmarks/peers/SCRIPT reports seconds per round
    after a warm-up round of its own. The first run is one round of warm-up, as for the others."""
    with tempfile.TemporaryDirectory(prefix="lamina-speed-") as folder:
        path = Path(folder) / "WORK.npz"
        write_work(path, work, data, 1 + repeats * rounds)
        for repeat in range(repeats + 1):
            first, count = (1 + (repeat - 1) * rounds, rounds) if repeat else (1, 1)
            yield from run(path, name, count, first)["seconds"]


class Peer(NamedTuple):
    """A program of benchmarks/peers in an environment of its own."""

    python: str
    script: str
    ours: bool  # with our settings of the allocator and MKL

    def __call__(self, path: Path, name: str, rounds: int, first: int) -> dict[str, Any]:
        """What it reports. Whatever happens, what the peer started is ended with it."""
        environment = {k: v for k, v in os.environ.items() if k not in GLIBC_SETTINGS and k != mkl.VARIABLE}
        if self.ours:
            environment |= GLIBC_SETTINGS | {"LAMINA_MKL_FILE": mkl.__file__}
            environment |= {k: v for k, v in os.environ.items() if k == mkl.VARIABLE}
        script = Path(__file__).parent / "peers" / self.script
        command = [self.python, str(script), str(path), name, str(rounds), str(first)]
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
            ) as process,
        ):
            try:
                out, _ = process.communicate(timeout=1800)
            except BaseException:
                process.terminate()  # it ends its own processes
                raise
            if process.returncode:
                errors.seek(0)
                sys.exit(f"{' '.join(command)}: exit status {process.returncode}\n{errors.read()[-4000:]}")
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found


def accuracies(name: str, work: Work, data: lamina.ClientData, rounds: int, peers: dict[str, Peer]) -> dict[str, float]:
    """Of the contenders' models after a round of warm-up and so many more. Ends the program where they differ."""
    found = {
        "lamina": accuracy_of(work, data, "auto", 1 + rounds),
        "processes": accuracy_of(work, data, "processes", 1 + rounds),
        "loop": accuracy_of(work, data, "loop", 1 + rounds),
    }
    _, model = next(itertools.islice(naive(work, data), rounds, None))
    x, y = data.test
    model.eval()
    with torch.no_grad():
        right = [
            model(data.transform(part, None)).argmax(1) == of
            for part, of in zip(x.split(1000), y.split(1000), strict=True)
        ]
    found["naive"] = float(torch.cat(right).float().mean())
    with tempfile.TemporaryDirectory(prefix="lamina-speed-") as folder:
        path = Path(folder) / "WORK.npz"
        if peers:
            write_work(path, work, data, 1 + rounds, check=True)
        for label, run in peers.items():
            found[label] = run(path, name, rounds, 1)["accuracy"]
    if max(found.values()) - min(found.values()) > SAME:
        sys.exit(f"{name}: not the same work, the accuracies after {1 + rounds} rounds differ: {found}")
    return found


def measure(name: str, work: Work, repeats: int, rounds: int, peers: dict[str, Peer]) -> dict[str, object]:
    data = load(work)
    reached = accuracies(name, work, data, rounds, peers)
    contenders: dict[str, Iterator[float]] = {
        "single-model": single_model(work, data),
        "lamina": with_lamina(work, data, "auto"),
        "processes": with_lamina(work, data, "processes"),
        "loop": with_lamina(work, data, "loop"),
        "naive": (seconds for seconds, _ in naive(work, data)),
    }
    for label, run in peers.items():
        contenders[label] = peer(run, name, work, data, repeats, rounds)
    for contender in contenders.values():
        next(contender)  # warm-up: allocation, forking
    seconds: dict[str, list[float]] = {label: [] for label in contenders}
    for _ in range(repeats):
        for label, contender in contenders.items():
            seconds[label].append(statistics.mean(next(contender) for _ in range(rounds)))
    for contender in contenders.values():
        contender.close()  # type: ignore[attr-defined]
    reference = seconds["single-model"]
    rows = {}
    for label, s in seconds.items():
        ratios = [a / b for a, b in zip(s, reference, strict=True)]
        rows[label] = {
            "seconds": statistics.median(s),
            "low": min(s),
            "high": max(s),
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "to_lamina": statistics.median([a / b for a, b in zip(s, seconds["lamina"], strict=True)]),
            "accuracy": reached.get(label),
        }
    engine = federation(work, data, "auto", None)
    return {
        "work": name,
        "title": work.title,
        "rows": rows,
        "auto": f"{engine.engine} x {engine.workers}: {engine.engine_reason}",
        "bookkeeping": bookkeeping(work, data, rounds),
        "first_round": first_round(name),
    }


FIRST_ROUND = """
import sys; sys.path.insert(0, sys.argv[1])
import speed
work = speed.WORKS[sys.argv[2]]
next(speed.with_lamina(work, speed.load(work), "auto"))
"""


def first_round(name: str) -> float:
    """Seconds from the start of a process to the end of its first round, imports and the data's loading included."""
    began = time.perf_counter()
    command = [sys.executable, "-c", FIRST_ROUND, str(Path(__file__).parent), name]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| work | contender | s/round, median (min-max) | / single-model, median (min-max) | / lamina | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        for label, r in result["rows"].items():
            reached = "" if r["accuracy"] is None else f"{r['accuracy']:.4f}"
            lines.append(
                f"| {result['work']} | {label} | {r['seconds']:.3f} ({r['low']:.3f}-{r['high']:.3f}) "
                f"| {r['ratio']:.2f} ({r['ratio_low']:.2f}-{r['ratio_high']:.2f}) | {r['to_lamina']:.2f} | {reached} |"
            )
        more = f"bookkeeping {result['bookkeeping']:.1%}; start to first round {result['first_round']:.2f} s"
        lines.append(f"| {result['work']} | *auto = {result['auto']}; {more}* | | | | |")
    return "\n".join(lines)


def hardware() -> dict[str, object]:
    def first(path: str, key: str) -> str:
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            return platform.processor()
        return next((line.split(":")[1].strip() for line in lines if line.startswith(key)), "")

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return {
        "cpu": first("/proc/cpuinfo", "model name"),
        "cores": cores(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else ""),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", default=",".join(WORKS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flower", help="python of an environment with flwr[simulation]")
    parser.add_argument("--pfl", help="python of an environment with pfl[pytorch]")
    parser.add_argument("--out", type=Path, help="append the table to this Markdown file")
    arguments = parser.parse_args()
    keep_memory()
    mkl.switch()
    peers = {}
    for label in ("flower", "pfl"):
        python = getattr(arguments, label)
        if python:
            peers[label] = Peer(python, f"{label}_work.py", ours=False)
            peers[f"{label} + ours"] = Peer(python, f"{label}_work.py", ours=True)
    results = []
    for name in arguments.works.split(","):
        results.append(measure(name, WORKS[name], arguments.repeats, arguments.rounds, peers))
        print(table(results[-1:]), flush=True)
    mkl_said = f"LAMINA_MKL={os.environ[mkl.VARIABLE]} " if mkl.asked_for() else ""
    command = f"{mkl_said}python benchmarks/speed.py {' '.join(sys.argv[1:])}"
    text = f"{json.dumps(hardware())}\n\n`{command}`\n\n{table(results)}\n"
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(text)


if __name__ == "__main__":
    main()
