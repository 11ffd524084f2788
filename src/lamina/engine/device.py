"""What lies on a device: the examples, copies of plans and states at fixed addresses, and what goes back to the CPU.

Nothing here needs a GPU: with device "cpu" the same code makes the same copies.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lamina.client import Setup
from lamina.data.client_data import ClientData
from lamina.data.transform import Batch
from lamina.engine.arena import Arena, layout
from lamina.method import Plan
from lamina.random import address
from lamina.training import Precision, Trainer, addressed_rng
from lamina.tree import Message

Form: TypeAlias = tuple[tuple[str, torch.Size, torch.dtype], ...]


class Resident(ClientData):
    """Examples on a device, as they are stored; who holds which of them stays on the CPU."""

    def examples(self, indices: Tensor) -> tuple[Batch, Batch]:
        device = next(iter(self.x.values())).device if isinstance(self.x, dict) else self.x.device
        return super().examples(indices.to(device))


def resident(data: ClientData, device: torch.device) -> Resident:
    tests = data.client_tests
    return Resident(
        _moved(data.x, device),
        _moved(data.y, device),
        data.names,
        data.offsets,
        data.indices,
        test=None if data.test is None else _both(data.test, device),
        client_tests=None if tests is None else {name: _both(pair, device) for name, pair in tests.items()},
        transform=_with_tensors_on(data.transform, device),
        name=data.name,
        partition=data.partition,
        counts=data.counts,
        check=False,
    )


def trainer_on(trainer: Trainer, data: ClientData, device: torch.device) -> Trainer:
    """The same with a model, and a loss that is a module, of its own on the device."""
    loss = trainer.loss
    if isinstance(loss, nn.Module):
        loss = copy.deepcopy(loss).to(device)
    model = copy.deepcopy(trainer.model).to(device)
    return Trainer(model, loss, data, trainer.local, trainer.seed, trainer.channels_last)


def setup_on(setup: Setup, data: ClientData, trainer: Trainer) -> Setup:
    """For evaluation there. Hooks, codec and buffers work with what is on the CPU."""
    return setup._replace(data=data, loss=trainer.loss)


class Copies:
    """Copies of trees on a device. As long as the form of the trees stays the same, so do the addresses."""

    def __init__(self, trees: Message, device: torch.device):
        self.form = form_of(trees)
        self.trees: Message = {
            tree: {name: torch.empty_like(x, device=device) for name, x in content.items()}
            for tree, content in trees.items()
        }
        self.write(trees)

    def write(self, trees: Message) -> None:
        for tree, content in trees.items():
            for name, x in content.items():
                self.trees[tree][name].copy_(x)


def form_of(trees: Message) -> Form:
    return tuple((f"{tree}/{name}", x.shape, x.dtype) for tree, content in trees.items() for name, x in content.items())


def trees_of(plan: Plan) -> Message:
    trees: Message = {"params": plan.params, "buffers": plan.buffers}
    if plan.mask is not None:
        trees["mask"] = plan.mask
    return trees | {f"shared/{name}": tree for name, tree in plan.shared.items()}


def with_trees(plan: Plan, trees: Message) -> Plan:
    """The plan with these copies of its trees."""
    return dataclasses.replace(
        plan,
        params=trees["params"],
        buffers=trees["buffers"],
        mask=None if plan.mask is None else trees["mask"],
        shared={name: trees[f"shared/{name}"] for name in plan.shared},
    )


class Parcel:
    """Trees on their way to the CPU: gathered in one piece of memory, moved by one copy."""

    def __init__(self, trees: Message, device: torch.device):
        self.form = form_of(trees)
        self._entries, self._size = layout(trees)
        self._there = torch.empty(self._size, dtype=torch.uint8, device=device)
        self._here = torch.empty(self._size, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def dispatch(self, trees: Message) -> None:
        """Returns before the copy is there."""
        Arena(self._there).write(trees, 0, self._size)
        self._here.copy_(self._there, non_blocking=True)

    def open(self) -> Message:
        """What has arrived, in memory of its own; a tree without tensors is not in it."""
        return Arena(self._here.clone()).read(self._entries)


@contextmanager
def arithmetic(precision: Precision) -> Iterator[None]:
    """Within it products are made in fp32, or in TF32 where that was asked for, by cuDNN's kernels that give the same
    bits every time. Afterwards torch's global switches are as before."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    tf32 = precision == "tf32"
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = tf32, tf32, True, False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def device_rng(device: torch.device, seed: int, purpose: str, round: int, client: int) -> Iterator[None]:
    """`addressed_rng` of the device's own generator: other numbers than the CPU's, the same every time."""
    if device.type == "cpu":
        with addressed_rng(seed, purpose, round, client):
            yield
        return
    generator = rng_of(device)
    before = generator.get_state()
    generator.manual_seed(address(seed, purpose, round, client))
    try:
        yield
    finally:
        generator.set_state(before)


def rng_of(device: torch.device) -> torch.Generator:
    """Torch's global generator of this device."""
    return torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]


def on(device: torch.device, stream: Any = None) -> Any:
    """A context in which kernels go to this device, and to this stream of it if one is given."""
    if device.type == "cpu":
        return nullcontext()
    return torch.cuda.device(device) if stream is None else torch.cuda.stream(stream)


def _moved(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, dict):
        return {name: x.to(device) for name, x in batch.items()}
    return batch.to(device)


def _both(pair: tuple[Batch, Batch], device: torch.device) -> tuple[Batch, Batch]:
    return _moved(pair[0], device), _moved(pair[1], device)


def _with_tensors_on(thing: Any, device: torch.device) -> Any:
    """A dataclass, such as `Windows`, with its tensors on the device, so that a step does not copy them there."""
    if not dataclasses.is_dataclass(thing) or isinstance(thing, type):
        return thing
    values: Mapping[str, Any] = {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing) if f.init}
    moved = {name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)}
    return dataclasses.replace(thing, **moved) if moved else thing
