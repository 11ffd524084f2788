"""How long training takes on GPUs, beside a plain eager loop, as ratios inside one run.

    python benchmarks/gpu.py [--works CIFAR,W1] [--rounds N] [--precisions fp32,tf32,bf16] [--workers K] [--out FILE]

CIFAR is pfl-research's published benchmark: CIFAR-10 shapes, 1000 clients of 50 images, 50 of them a round, one epoch
at batch size 10, SGD 0.1, 1500 rounds: 375,000 local steps. Its model has 1,626,442 parameters: conv 3x3x32, conv
3x3x64, 2x2 max pooling, dropout 0.25, dense 128, dropout 0.5, dense 10 (`lamina.models.pfl_cnn`). CIFAR-nodrop is the
same without dropout, with which several clients train at once on one GPU. W1 to W4 are those of benchmarks/speed.py.

    lamina   the whole product, engine "cuda": plan, hooks, ledger, per-layer records, exact byte counts
    eager    one model on the first GPU, data resident there, the same batches; each client starts from the global
             weights, SGD by foreach, the weighted mean on the GPU. No plan, no records, no bytes.

Both take turns, round for round, and neither evaluates within what is timed. At the end both models are tested; figures
are printed only where the accuracies agree within 0.03.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from speed import WORKS, Work

import lamina
from lamina.cohort import draw
from lamina.engine import cuda
from lamina.engine.device import arithmetic, device_rng, resident, trainer_on
from lamina.training import batches

ALIKE = 0.03  # of accuracy
SGD = lamina.LocalSGD(lr=0.1, batch_size=10)
GPU_WORKS = {
    "CIFAR": Work("pfl's CNN 1,626,442, B=10", "cifar10", 1000, 50, lamina.models.pfl_cnn, SGD),
    "CIFAR-nodrop": Work("the same without dropout", "cifar10", 1000, 50,
                         lambda: lamina.models.pfl_cnn(dropout=(0.0, 0.0)), SGD),
    **WORKS,
}  # fmt: skip
ROUNDS = {"CIFAR": 1500, "CIFAR-nodrop": 1500}  # others 30
PARTITION = {"CIFAR": "iid", "CIFAR-nodrop": "iid"}  # 50 images each; others dirichlet:0.5


def load(name: str, work: Work) -> lamina.ClientData:
    options = {"augment": False} if work.dataset == "cifar10" else {}
    partition = PARTITION.get(name, "dirichlet:0.5")
    return lamina.data.load(work.dataset, clients=work.clients, partition=partition, seed=0, **options)


def federation(work: Work, data: lamina.ClientData, precision: str, workers: int | None) -> lamina.Federation:
    local = lamina.LocalSGD(**{**vars(work.local), "precision": precision})
    return lamina.Federation(work.model, data, cohort=work.cohort, local=local, engine="cuda", workers=workers)


class Lamina:
    """Rounds of the product, and the accuracy of what they made."""

    def __init__(self, fed: lamina.Federation):
        self._fed = fed
        self._state: lamina.State | None = None

    def rounds(self) -> Iterator[float]:
        for state, record in self._fed.run(10**9, evaluate_every=10**9):
            self._state = state
            yield record.seconds

    def accuracy(self) -> float:
        assert self._state is not None
        return self._fed.evaluate(self._state).accuracy or 0.0


class Eager:
    """What a careful script does."""

    def __init__(self, fed: lamina.Federation, device: torch.device):
        self._fed = fed
        self._device = device
        self._trainer = trainer_on(fed._trainer, resident(fed.data, device), device)
        self._whole = [w.detach().to(device).clone() for w in self._trainer.weights]

    def rounds(self) -> Iterator[float]:
        fed, trainer, local, device = self._fed, self._trainer, self._fed.local, self._device
        weights, seed = trainer.weights, fed.seed
        if trainer.buffers:
            raise ValueError("this loop averages no buffers: choose a work whose model has none")
        sizes = fed.data.sizes.tolist()
        round = 0
        while True:
            _wait(device)
            began = time.perf_counter()
            cohort = draw(seed, round, len(fed.data), fed.cohort)
            share = [sizes[c] / sum(sizes[c] for c in cohort) for c in cohort]
            mean = [torch.zeros_like(w) for w in self._whole]
            with arithmetic(local.precision):
                for client, part in zip(cohort, share, strict=True):
                    with torch.no_grad():
                        torch._foreach_copy_(weights, self._whole)
                    velocity: list[torch.Tensor] = []
                    trainer.model.train()
                    with device_rng(device, seed, "dropout", round, client):
                        for indices in batches(fed.data, client, local, seed, round):
                            grads, _ = trainer.gradient(*trainer.batch(indices, None))
                            with torch.no_grad():
                                step = list(grads)
                                if local.momentum and velocity:
                                    torch._foreach_mul_(velocity, local.momentum)
                                    torch._foreach_add_(velocity, step)
                                elif local.momentum:
                                    velocity = step
                                torch._foreach_add_(weights, velocity or step, alpha=-local.lr)
                    with torch.no_grad():
                        torch._foreach_add_(mean, list(weights), alpha=part)
            self._whole = mean
            _wait(device)
            round += 1
            yield time.perf_counter() - began

    def accuracy(self) -> float:
        trainer = self._trainer
        x, y = trainer.data.test  # type: ignore[misc]
        with torch.inference_mode():
            for w, own in zip(trainer.weights, self._whole, strict=True):
                w.copy_(own)
            trainer.model.eval()
            parts = [trainer.arrange(trainer.data.transform(part, None)) for part in x.split(500)]
            hits = torch.cat([trainer.forward(part).argmax(1) for part in parts]).eq(y)
        return float(hits.double().mean())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, precision: str, rounds: int, workers: int | None) -> dict[str, object]:
    work = GPU_WORKS[name]
    data = load(name, work)
    fed = federation(work, data, precision, workers)
    contenders = {"lamina": Lamina(fed), "eager": Eager(fed, cuda.devices()[0])}
    going = {label: contender.rounds() for label, contender in contenders.items()}
    first = {label: next(seconds) for label, seconds in going.items()}  # captures and allocations
    seconds: dict[str, list[float]] = {label: [] for label in going}
    for _ in range(rounds - 1):
        for label, turns in going.items():
            seconds[label].append(next(turns))
    accuracy = {label: contender.accuracy() for label, contender in contenders.items()}
    for turns in going.values():
        turns.close()  # type: ignore[attr-defined]
    if abs(accuracy["lamina"] - accuracy["eager"]) > ALIKE:
        sys.exit(
            f"{name} {precision}: accuracies {accuracy} differ by more than {ALIKE}: these runs are not comparable"
        )
    steps = fed.local.count(int(data.sizes.double().mean())) * work.cohort  # per round, about
    return {
        "work": name,
        "title": work.title,
        "precision": precision,
        "rounds": rounds,
        "clients at once": fed.workers,
        "first": first,
        "median": {label: statistics.median(s or [first[label]]) for label, s in seconds.items()},
        "low": {label: min(s or [first[label]]) for label, s in seconds.items()},
        "high": {label: max(s or [first[label]]) for label, s in seconds.items()},
        "total": {label: first[label] + sum(s) for label, s in seconds.items()},
        "ratio": statistics.median([a / b for a, b in zip(seconds["eager"], seconds["lamina"], strict=True)] or [0.0]),
        "steps": steps,
        "accuracy": accuracy,
    }


def table(results: list[dict[str, object]]) -> str:
    lines = [
        "| work | precision | contender | s/round, median (min-max) | us/step | all rounds, s | accuracy "
        "| eager / lamina |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        for label in ("lamina", "eager"):
            median, low, high, total = (r[key][label] for key in ("median", "low", "high", "total"))  # type: ignore[index]
            ratio = f"**{r['ratio']:.2f}**" if label == "lamina" else ""
            lines.append(
                f"| {r['work']} | {r['precision']} | {label} | {median:.4f} ({low:.4f}-{high:.4f}) "
                f"| {1e6 * median / r['steps']:.1f} | {total:.1f} over {r['rounds']} "
                f"| {r['accuracy'][label]:.4f} | {ratio} |"  # type: ignore[index]
            )
    return "\n".join(lines)


def hardware() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "gpus": cuda.names(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", default=",".join(GPU_WORKS))
    parser.add_argument("--rounds", type=int, help="at most; CIFAR has 1500, the others 30")
    parser.add_argument("--precisions", default="fp32,tf32,bf16")
    parser.add_argument("--workers", type=int, help="clients at once")
    parser.add_argument("--out", type=Path, help="append the table to this Markdown file")
    arguments = parser.parse_args()
    if not cuda.available():
        sys.exit("benchmarks/gpu.py measures GPUs, and torch finds none here (torch.cuda.is_available() is False).")
    results = []
    for name in arguments.works.split(","):
        for precision in arguments.precisions.split(","):
            rounds = min(arguments.rounds or 10**9, ROUNDS.get(name, 30))
            results.append(measure(name, precision, rounds, arguments.workers))
            print(table(results[-1:]), flush=True)
    command = f"`python benchmarks/gpu.py {' '.join(sys.argv[1:])}`"
    text = f"{json.dumps(hardware())}\n\n{command}\n\n{table(results)}\n"
    print(text)
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(text)


if __name__ == "__main__":
    main()
