"""What the peers share: a work as benchmarks/speed.py wrote it, and its models in plain torch.

Runs in the peers' environments, which have torch and no lamina. A work that gives each client's batches and the first
weights is there to be checked: then the peer also reports the accuracy it reaches.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Task(NamedTuple):
    """WORK.npz."""

    x: Tensor  # float32 [examples, ...], normalised
    y: Tensor  # int64 [examples]
    clients: list[Tensor]  # which examples each client holds
    cohorts: list[list[int]]  # by round
    steps: int | None  # local steps per round, going on over epochs; else so many `epochs`
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    given: dict[tuple[int, int], list[Tensor]]  # (round, client) -> batches; {}: the peer shuffles as it likes
    initial: Tensor | None  # all weights, end to end
    test: tuple[Tensor, Tensor] | None

    def count(self, client: int) -> int:
        """Local steps of a client."""
        return self.steps or self.epochs * -(-len(self.clients[client]) // self.batch_size)

    def start(self, model: nn.Module) -> nn.Module:
        """The model, from the weights with which training starts where they are given."""
        if self.initial is not None:
            state = model.state_dict()
            parts = torch.split(self.initial, [x.numel() for x in state.values()])
            model.load_state_dict({name: y.reshape(x.shape) for (name, x), y in zip(state.items(), parts, strict=True)})
        return model

    def accuracy(self, model: nn.Module) -> float | None:
        if self.test is None:
            return None
        model.eval()
        with torch.no_grad():
            right = [model(x).argmax(1) == y for x, y in zip(*(t.split(1000) for t in self.test), strict=True)]
        return float(torch.cat(right).float().mean())


def load(path: str) -> Task:
    with np.load(path) as f:
        indices = torch.from_numpy(f["indices"])
        task = Task(
            torch.from_numpy(f["x"]),
            torch.from_numpy(f["y"]),
            list(torch.split(indices, np.diff(f["offsets"]).tolist())),
            f["cohorts"].tolist(),
            int(f["steps"]) or None,
            int(f["epochs"]),
            int(f["batch_size"]),
            float(f["lr"]),
            float(f["momentum"]),
            {},
            torch.from_numpy(f["initial"]) if "initial" in f else None,
            (torch.from_numpy(f["test_x"]), torch.from_numpy(f["test_y"])) if "test_x" in f else None,
        )
        if "batches" in f:
            batches = iter(torch.split(torch.from_numpy(f["batches"]), f["sizes"].tolist()))
            for t, cohort in enumerate(task.cohorts):
                for client in cohort:
                    task.given[t, client] = [next(batches) for _ in range(task.count(client))]
        return task


def report(seconds: Sequence[float], accuracy: float | None) -> None:
    """The last line of a peer's output."""
    print(json.dumps({"seconds": list(seconds), "accuracy": accuracy}), flush=True)


def switch_mkl() -> None:
    """MKL as lamina sets it, where the environment names lamina's file that does it."""
    file = os.environ.get("LAMINA_MKL_FILE")
    if file and os.environ.get("LAMINA_MKL"):
        sys.path.insert(0, os.path.abspath(os.path.join(file, "../../..")))  # for lamina.errors
        spec = importlib.util.spec_from_file_location("mkl", file)
        assert spec is not None, file
        assert spec.loader is not None, file
        module = importlib.util.module_from_spec(spec)
        sys.modules["mkl"] = module
        spec.loader.exec_module(module)
        module.switch()


switch_mkl()  # before the first product of any process that imports this file


def rounds(task: Task, first: int, count: int) -> list[list[int]]:
    """The cohorts of `count` rounds, and before them one for the warm-up that is not reported."""
    if not 0 <= first <= first + count <= len(task.cohorts):
        sys.exit(f"rounds {first}..{first + count - 1}: WORK.npz has cohorts of {len(task.cohorts)} rounds")
    return [task.cohorts[first - 1], *task.cohorts[first : first + count]]


def arguments() -> tuple[str, str, int, int]:
    """WORK.npz WORK ROUNDS [FIRST]: the rounds FIRST, FIRST + 1, ... of WORK.npz."""
    if len(sys.argv) not in (4, 5) or sys.argv[2] not in MODELS:
        sys.exit(f"usage: {sys.argv[0]} WORK.npz {{{','.join(MODELS)}}} ROUNDS [FIRST]")
    return os.path.abspath(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int((sys.argv[4:] or [0])[0])


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Block(nn.Module):
    """conv - norm - relu - conv - norm, plus the shortcut, relu."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False), norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), norm(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


def norm(channels: int) -> nn.Module:
    return nn.GroupNorm(min(32, channels // 2), channels)


def resnet20() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), norm(16), nn.ReLU(inplace=True)]
    inputs = 16
    for width in (16, 32, 64):
        for b in range(3):
            layers.append(Block(inputs, width, 2 if width > 16 and b == 0 else 1))
            inputs = width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


MODELS = {
    "W1": cnn,
    "W2": cnn,
    "W2b": lambda: mlp(784, 64, 10),
    "W3": resnet20,
    "W4": lambda: mlp(784, 3072, 2816, 10),
}
