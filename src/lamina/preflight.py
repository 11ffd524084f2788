"""Before anything is trained: does this model run on this data?"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lamina.data.client_data import ClientData
from lamina.data.transform import Batch
from lamina.errors import ConfigError
from lamina.metrics import METRICS, Metric, measured
from lamina.training import LocalSGD, Loss, Trainer, addressed_rng

_TRIAL = 8  # examples

_known: ContextVar[bool | None] = ContextVar("known", default=None)


@contextlib.contextmanager
def tried(channels_last: bool | None) -> Iterator[None]:
    """Inside, a model is not tried: it was, and ran so. None: it is."""
    before = _known.set(channels_last)
    try:
        yield
    finally:
        _known.reset(before)


def ready(model: nn.Module, loss: Loss, data: ClientData, local: LocalSGD, seed: int) -> Trainer:
    """A trainer for the model, after one real forward and backward pass on a copy of it.

    NHWC memory is used when the model has 2-D convolutions and its forward pass accepts it (one that calls `.view` on
    activations does not).

    Raises:
        ConfigError: E111 for uninitialised modules or nothing to train, E121 when the model or the loss fails, with
            the layer and the shapes.
    """
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(x):
            raise ConfigError(
                f"{name} is not initialised yet", code="E111", where="model", remedy="run one batch through it first"
            )
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("the model has no trainable parameter", code="E111", where="model")
    if (known := _known.get()) is not None:
        return Trainer(model, loss, data, local, seed, known)
    if not len(data.indices) and data.test is None:
        warnings.warn("there is no example here: the model is not tried on any", stacklevel=3)
        return Trainer(model, loss, data, local, seed, channels_last=False)
    largest, smallest = _extremes(data, local)
    convolves = any(isinstance(module, nn.Conv2d) for module in model.modules())
    nhwc = convolves and _fails(model, loss, data, local, seed, largest, channels_last=True) is None
    error = None if nhwc else _fails(model, loss, data, local, seed, largest, channels_last=False)
    if error is None and _length(smallest) < _length(largest):
        error = _fails(model, loss, data, local, seed, smallest, nhwc)
        if error is not None:
            error.remedy = (
                f"some client's last batch has {_length(smallest)} example(s): choose another batch_size, or a model "
                "that takes such a batch (BatchNorm over a 1 x 1 map does not; norm='group' does)"
            )
    if error is not None:
        raise error
    return Trainer(model, loss, data, local, seed, nhwc)


def try_metrics(trainer: Trainer, metrics: Mapping[str, Metric]) -> None:
    """The metrics of the box on some test examples, on a copy of the model: whether they fit its outputs. A user's own
    are not tried, as eight examples may be too few for them. Raises ConfigError E103."""
    known = {name: metric for name, metric in metrics.items() if metric in METRICS.values()}
    if not known or trainer.data.test is None:
        return
    x, y = (_first(part, _TRIAL) for part in trainer.data.test)
    trial = copy.copy(trainer)
    trial.model = copy.deepcopy(trainer.model).eval()
    with torch.inference_mode(), addressed_rng(trainer.seed, "trial"):
        measured(known, trial.forward(trial.arrange(trial.data.transform(x, None))), y)


Pair = tuple[Batch, Batch]  # x and y, as the data has them


def _extremes(data: ClientData, local: LocalSGD) -> tuple[Pair, Pair]:
    """The examples of a usual batch and of the smallest one that some client here will train on; where none is here,
    some of the test set."""
    if not len(data.indices):
        assert data.test is not None  # else there is nothing to try
        x, y = (_first(part, local.batch_size or _TRIAL) for part in data.test)
        return (x, y), (x, y)
    sizes = data.offsets.diff()
    usual = data.indices_of(int(sizes.argmax()))[: min(local.batch_size or int(sizes.max()), _TRIAL)]
    client, last = _smallest(data, local)
    return data.examples(usual), data.examples(data.indices_of(client)[: min(last, _TRIAL)])


def smallest(data: ClientData, local: LocalSGD) -> int:
    """Examples of the smallest batch that some client here will train on; 0 where none is here."""
    return _smallest(data, local)[1] if len(data.indices) else 0


def _smallest(data: ClientData, local: LocalSGD) -> tuple[int, int]:
    """Whose it is, and how many."""
    sizes = data.offsets.diff()
    batch = local.batch_size or int(sizes.max())
    last = torch.where(sizes < batch, sizes, torch.where(sizes % batch == 0, batch, sizes % batch))
    client = int(last.where(sizes > 0, batch + 1).argmin())
    return client, int(last[client])


def _first(part: Batch, n: int) -> Batch:
    n = min(n, _TRIAL)
    return {key: x[:n] for key, x in part.items()} if isinstance(part, dict) else part[:n]


def _length(pair: Pair) -> int:
    y = pair[1]
    return len(next(iter(y.values()))) if isinstance(y, dict) else len(y)


def _fails(
    model: nn.Module, loss: Loss, data: ClientData, local: LocalSGD, seed: int, examples: Pair, channels_last: bool
) -> ConfigError | None:
    """One training step's gradient on these examples, on a copy."""
    trainer = Trainer(copy.deepcopy(model), loss, data, local, seed, channels_last)
    trainer.model.train()
    x, y = trainer.arrange(data.transform(examples[0], None)), examples[1]
    trace = _Trace(trainer.model)
    try:
        with addressed_rng(seed, "trial"):
            with trainer.cast():
                output = trainer.forward(x)
            classes = data.classes or 0
            if loss is functional.cross_entropy and isinstance(output, Tensor) and output.shape[1] < classes:
                return ConfigError(
                    f"the model has {output.shape[1]} outputs, the data {classes} classes",
                    code="E121",
                    where="model",
                    remedy=f"give the last layer {classes} outputs",
                )
            trace.inside = "loss"
            with trainer.cast():
                value = loss(output, y)
            if not isinstance(value, Tensor) or value.dim() != 0:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                return ConfigError(f"loss: expected a scalar tensor, got {shape}", code="E121", where="loss")
            trace.inside = "gradient of the loss"
            torch.autograd.grad(value, trainer.weights, materialize_grads=True)
    except Exception as error:
        where = trace.inside
        given = "" if "loss" in where else f" received {trace.received},"
        return ConfigError(
            f"the model fails on a batch of the data (x {_shape(x)}, y {_shape(y)}): {where}{given} "
            f"{type(error).__name__}: {error}",
            code="E121",
            where=where,
            remedy=f"{trace.remedy()}, or the data provide what the model expects",
        )
    return None


class _Trace:
    """Which module a forward pass is in."""

    def __init__(self, model: nn.Module):
        self.inside = ""
        self.received = ""
        self._stack: list[str] = []
        self._in: tuple[nn.Module, tuple[Any, ...]] | None = None  # the innermost module, and its inputs
        for name, module in model.named_modules():
            label = f"{type(model).__name__}.{name}" if name else type(model).__name__
            module.register_forward_pre_hook(self._enter(label))
            module.register_forward_hook(self._leave)

    def remedy(self) -> str:
        """What makes the model accept what it was given; with the number, where a Linear got another than it takes."""
        layer, x = (self._in[0], self._in[1][0]) if self._in and self._in[1] else (None, None)
        if not (
            isinstance(layer, nn.Linear) and isinstance(x, Tensor) and x.dim() and x.shape[-1] != layer.in_features
        ):
            return "make the model accept these shapes"
        takes, given = layer.in_features, x.shape[-1]
        if x.dim() > 2 and x.shape[1:].numel() == takes:
            return f"put nn.Flatten() before {self.inside}, which takes {takes} numbers per example"
        return f"give {self.inside} in_features={given} (it has {takes})"

    def _enter(self, label: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._stack.append(label)
            self.inside = label
            self.received = ", ".join(_shape(x) for x in inputs)
            self._in = (module, inputs)

        return hook

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._stack.pop()
        self._in = None
        self.inside = self._stack[-1] if self._stack else ""


def _shape(x: Batch | Any) -> str:
    if isinstance(x, Tensor):
        return "x".join(map(str, x.shape)) or "scalar"
    if isinstance(x, dict):
        return "{" + ", ".join(f"{k}: {_shape(v)}" for k, v in x.items()) + "}"
    return type(x).__name__
