"""Vectors of real runs for benchmarks/wire.py, which says what they are."""

from __future__ import annotations

import contextlib
import itertools
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import nn

import lamina
from lamina import wire
from lamina.engine import cores
from lamina.machine import cpu_name, installed
from lamina.method import Method, Plan, Work
from lamina.tree import Message, Params, select, zeros_like

EXAMPLES = 640  # of a client, at most
CLIENTS = 2
EPOCHS = 3  # rounds of one local epoch
ROUNDS, STEPS = 5, 5  # of error feedback
DENSITIES = (0.5, 0.1)  # of SSFL
FOREVER = 10**9  # rounds: the last one of a run is evaluated, which takes longer than the training here


class Case(NamedTuple):
    """What is trained."""

    model: str
    dataset: str
    make: Callable[[], nn.Module]
    clients: int  # that the whole data set is cut into


def _resnet(name: str, dataset: str, examples: int) -> Case:
    channels = 1 if dataset == "fashion_mnist" else 3
    variant = getattr(lamina.models, name)
    return Case(name, dataset, lambda: variant(10, norm="group", in_channels=channels), -(-examples // EXAMPLES))


WORKS = {
    f"{model}-{dataset}": _resnet(model, dataset, examples)
    for model in ("resnet18", "resnet20")
    for dataset, examples in (("cifar10", 50_000), ("fashion_mnist", 60_000))
}
TINY = {"mlp-digits": Case("mlp", "digits", lambda: lamina.models.mlp((64, 128, 10)), 2)}


class Seen(NamedTuple):
    before: Params
    after: Params
    sent: Params


class Recorder(Method[tuple[()], Seen]):
    """Changes nothing; a client remembers its weights around local training and the update it handed to the codec."""

    def init_client(self, params: Params) -> Seen:
        return Seen(zeros_like(params), zeros_like(params), zeros_like(params))

    def report(self, client: Seen, plan: Plan, work: Work, message: Message) -> tuple[Message, Seen]:
        return message, client._replace(before=plan.params, after=select(work.params, plan.params))

    def settle(self, client: Seen, sent: Message, received: Message) -> Seen:
        return client._replace(sent=sent["update"])


def train(case: Case) -> dict[str, Params]:
    """Every tree of the file."""
    whole = lamina.data.load(case.dataset, clients=case.clients, partition="iid", seed=0)
    data = whole.subset(range(CLIENTS))

    def rounds(count: int, steps: int | None, **options: Any) -> Iterator[lamina.State]:
        local = lamina.LocalSGD(lr=0.1, batch_size=32, steps=steps)
        fed = lamina.Federation(case.make, data, local=local, **options)
        with contextlib.closing(fed.run(FOREVER, evaluate_every=FOREVER)) as run:  # type: ignore[type-var]
            yield from (state for state, _ in itertools.islice(run, count))

    first, *_, last = (state.clients.rows[0].method for state in rounds(EPOCHS, None, method=Recorder()))
    trees: dict[str, Params] = {"first_before": first.before, "first_after": first.after}
    trees |= {"before": last.before, "after": last.after, "update": last.sent}
    method = lamina.Chain(lamina.ErrorFeedback(), Recorder())
    for state in rounds(ROUNDS, STEPS, method=method, uplink=wire.TopK(0.01)):
        trees["sent"] = state.clients.rows[0].method[1].sent
    for density in DENSITIES:
        for state in rounds(1, 1, method=lamina.SSFL(density)):
            trees[f"mask_{density}"] = state.server.mask
    return trees


def write(folder: Path, works: Mapping[str, Case]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, case in works.items():
        began = time.perf_counter()
        trees = train(case)
        flat = {f"{tree}/{key}": x.contiguous() for tree, content in trees.items() for key, x in content.items()}
        order = json.dumps({tree: list(content) for tree, content in trees.items()})
        about = {"model": case.model, "dataset": case.dataset, "order": order, "made": json.dumps(machine())}
        safetensors.torch.save_file(flat, folder / f"{name}.safetensors", about)
        print(f"{name}: {count(trees['update']):,} parameters, {time.perf_counter() - began:.0f} s", flush=True)


class File(NamedTuple):
    """A file of them. Trees are in the order of the model, which safetensors does not keep."""

    name: str
    model: str
    trees: dict[str, Params]
    made: dict[str, Any]


def read(path: Path) -> File:
    with safetensors.safe_open(path, framework="pt") as file:
        about = file.metadata()
        trees = {
            tree: {key: file.get_tensor(f"{tree}/{key}") for key in keys}
            for tree, keys in json.loads(about["order"]).items()
        }
    return File(path.stem, about["model"], trees, json.loads(about["made"]))


def count(tree: Params) -> int:
    return sum(x.numel() for x in tree.values())


def machine() -> dict[str, Any]:
    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()

    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "zstandard": installed("zstandard"),
        "commit": ask("rev-parse", "--short", "HEAD") + "+changes" * bool(ask("status", "--porcelain", "-uno")),
    }
