"""The layer table: one row per trainable parameter of a model, in named_parameters order."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Conv1d, "conv1d"),
    (nn.Conv2d, "conv2d"),
    (nn.Conv3d, "conv3d"),
    (nn.Linear, "linear"),
    (nn.Embedding, "embedding"),
    (nn.LSTM, "lstm"),
    (nn.GRU, "gru"),
    (nn.RNN, "rnn"),
    (nn.MultiheadAttention, "attention"),
)


class Layer(NamedTuple):
    """One parameter tensor. `kind` is what owns it, `role` is "weight" or "bias"."""

    name: str
    kind: str  # "conv2d" "linear" "embedding" "lstm" "norm" ... or "other"
    role: str  # "weight" | "bias"
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def kind_of(module: nn.Module) -> str:
    for cls, kind in _KINDS:
        if isinstance(module, cls):
            return kind
    name = type(module).__name__
    return "norm" if "Norm" in name else "other"


def layer_table(model: nn.Module) -> tuple[Layer, ...]:
    """Rows for the trainable parameters; a tied weight stands once, under its first name."""
    owners = dict(model.named_modules())
    rows = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner, _, leaf = name.rpartition(".")
        kind = kind_of(owners[owner])
        rows.append(Layer(name, kind, "bias" if "bias" in leaf else "weight", tuple(parameter.shape)))
    return tuple(rows)


def is_matrix(layer: Layer) -> bool:
    """The scheduled unit of FedLAMA and FedLUAR: one weight tensor with ndim > 1 (never a bias or a norm parameter)."""
    return layer.role == "weight" and layer.kind != "norm" and len(layer.shape) > 1


def matrices(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    return tuple(layer for layer in layers if is_matrix(layer))
