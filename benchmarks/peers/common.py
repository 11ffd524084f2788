"""What the peers share: a work as benchmarks/speed.py wrote it, and its models in plain torch.

Runs in the peers' environments, which have torch and no lamina.
"""

from __future__ import annotations

import os
import sys
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

    def count(self, client: int) -> int:
        """Local steps of a client."""
        return self.steps or self.epochs * -(-len(self.clients[client]) // self.batch_size)


def load(path: str) -> Task:
    with np.load(path) as f:
        indices = torch.from_numpy(f["indices"])
        return Task(
            torch.from_numpy(f["x"]),
            torch.from_numpy(f["y"]),
            list(torch.split(indices, np.diff(f["offsets"]).tolist())),
            f["cohorts"].tolist(),
            int(f["steps"]) or None,
            int(f["epochs"]),
            int(f["batch_size"]),
            float(f["lr"]),
            float(f["momentum"]),
        )


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
