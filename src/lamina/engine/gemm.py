"""The gradient of K clients' stacked small networks, written out: linear layers with ReLU or tanh between them, an
embedding in front, softmax cross-entropy behind. Three times as fast as vmap; a step of plain SGD makes no gradient:
the outer product that it is goes straight into the weights.

    forward    a_0 = x,  z_l = a_(l-1) W_l' + b_l,  a_l = relu(z_l)
    loss       -log softmax(z_L)[y], the mean over the minibatch
    backward   d_L = (softmax - onehot) / B,  dW_l = d_l' a_(l-1),  db_l = sum d_l,  d_(l-1) = (d_l W_l) relu'
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lamina.engine.stack import Minibatches
from lamina.training import Trainer
from lamina.tree import Params


class Linear(NamedTuple):
    weight: str
    bias: str | None


class Embedding(NamedTuple):
    weight: str


Operation = Linear | Embedding | str  # "relu" | "tanh" | "flatten"


class Slope(NamedTuple):
    """The gradient of one layer, not yet multiplied out: weight d'a, bias sum d. Of an embedding: rows and their d."""

    layer: Linear | Embedding
    d: Tensor  # [m, b, outputs]; [m, b * length, width]
    a: Tensor  # [m, b, inputs];  [m, b * length] token ids


class Gemm:
    """Made by `recognise`."""

    def __init__(self, operations: list[Operation]):
        self._operations = operations
        # entries of the first layer's input need no gradient
        self._lowest = next(i for i, o in enumerate(operations) if not isinstance(o, str))

    def __call__(self, weights: Params, given: Minibatches) -> tuple[Params, Tensor]:
        grads: Params = {}
        losses, slopes = self._slopes(weights, given)
        for layer, d, a in slopes:
            if isinstance(layer, Embedding):
                grads[layer.weight] = _rows(layer, weights, d, a)
                continue
            grads[layer.weight] = torch.bmm(d.mT, a)
            if layer.bias is not None:
                grads[layer.bias] = d.sum(1)
        return {name: grads[name] for name in weights}, losses

    def descend(self, weights: Params, given: Minibatches, lr: float) -> Tensor:
        losses, slopes = self._slopes(weights, given)
        for layer, d, a in slopes:  # a slope comes when the layer's weights are no longer needed
            if isinstance(layer, Embedding):
                weights[layer.weight].sub_(_rows(layer, weights, d, a), alpha=lr)
                continue
            weights[layer.weight].baddbmm_(d.mT, a, alpha=-lr)
            if layer.bias is not None:
                weights[layer.bias].sub_(d.sum(1), alpha=lr)
        return losses

    def _slopes(self, weights: Params, given: Minibatches) -> tuple[Tensor, Iterator[Slope]]:
        """Losses [m], and the slopes from the last layer to the first."""
        x: Any = given.x
        y: Any = given.y
        share = _shares(given.sizes, next(iter(weights.values())).dtype)
        kept: list[Tensor] = []  # the input of each layer, the output of each activation
        a = x
        for operation in self._operations:
            if isinstance(operation, Linear):
                kept.append(a)
                w = weights[operation.weight].mT
                a = torch.bmm(a, w) if operation.bias is None else torch.baddbmm(weights[operation.bias][:, None], a, w)
            elif isinstance(operation, Embedding):
                kept.append(a)
                a = weights[operation.weight][torch.arange(len(a))[:, None, None], a]
            elif operation == "flatten":
                kept.append(a)
                a = a.flatten(2)
            else:
                a = a.relu_() if operation == "relu" else a.tanh_()
                kept.append(a)
        scores = _log_softmax(a)
        target = y.unsqueeze(2)
        losses = -(scores.gather(2, target).squeeze(2) * share).sum(1)
        d = scores.exp_().scatter_add_(2, target, torch.full((), -1.0, dtype=a.dtype).expand(target.shape))
        d *= share if isinstance(share, float) else share.unsqueeze(2)
        return losses, self._back(weights, d, kept)

    def _back(self, weights: Params, d: Tensor, kept: list[Tensor]) -> Iterator[Slope]:
        for i in reversed(range(self._lowest, len(self._operations))):
            operation, a = self._operations[i], kept[i]
            if isinstance(operation, Embedding):
                yield Slope(operation, d.flatten(1, 2), a.flatten(1))
            elif isinstance(operation, Linear):
                below = torch.bmm(d, weights[operation.weight]) if i > self._lowest else d
                yield Slope(operation, d, a)
                d = below
            elif operation == "flatten":
                d = d.reshape(a.shape)
            else:
                d = torch.ops.aten.threshold_backward(d, a, 0) if operation == "relu" else d * (1 - a * a)


def recognise(trainer: Trainer) -> Gemm | None:
    """The written-out gradient of this model, if it is such a network and trains in its own precision."""
    model, data = trainer.model, trainer.data
    if trainer.local.precision != "fp32":
        return None
    if trainer.loss is not functional.cross_entropy or isinstance(data.x, dict) or isinstance(data.y, dict):
        return None
    if data.y.dim() != 1 or data.y.is_floating_point():
        return None
    leaves = _leaves(model)
    if leaves is None or trainer.buffers:
        return None
    names = {id(p): name for name, p in trainer.params.items()}
    operations = [_operation(module, names) for module in leaves if not isinstance(module, nn.Identity)]
    layers = [o for o in operations if not isinstance(o, str)]
    fine = (
        None not in operations
        and len(names) == sum(1 for _ in model.parameters())
        and bool(layers)
        and isinstance(operations[-1], Linear)
        and all(isinstance(o, Linear) for o in layers[1:])
    )
    if fine and isinstance(layers[0], Embedding):
        fine = operations[:2] == [layers[0], "flatten"]
    return Gemm(operations) if fine else None  # type: ignore[arg-type]


def _leaves(model: nn.Module) -> list[nn.Module] | None:
    """The modules of a (nested) Sequential in the order in which they are called; None for any other model."""
    if type(model) is not nn.Sequential:
        return None
    found: list[nn.Module] = []
    for child in model:
        below = _leaves(child) if isinstance(child, nn.Sequential) else [child]
        if below is None:
            return None
        found += below
    return found if len({id(m) for m in found}) == len(found) else None  # one module twice has one weight for two


def _operation(module: nn.Module, names: dict[int, str]) -> Operation | None:
    if any(hooks for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)):
        return None
    match module:
        case nn.Linear() if type(module) is nn.Linear and id(module.weight) in names:
            return Linear(names[id(module.weight)], None if module.bias is None else names.get(id(module.bias)))
        case nn.Embedding() if type(module) is nn.Embedding and id(module.weight) in names:
            usual = module.padding_idx is None and module.max_norm is None and not module.scale_grad_by_freq
            return Embedding(names[id(module.weight)]) if usual and not module.sparse else None
        case nn.ReLU():
            return "relu"
        case nn.Tanh():
            return "tanh"
        case nn.Flatten() if module.start_dim == 1 and module.end_dim == -1:
            return "flatten"
    return None


def _log_softmax(x: Tensor) -> Tensor:
    """Over the last dimension. torch's is slow where that is short: a few classes go along the one before it."""
    return x.mT.contiguous().log_softmax(1).mT if x.shape[2] < 32 else x.log_softmax(2)


def _shares(sizes: list[int], dtype: torch.dtype) -> Tensor | float:
    """Each example's share of its client's mean loss, [m, b] where they differ: what fills a minibatch up has none."""
    b = max(sizes)
    if min(sizes) == b:
        return 1 / b
    counts = torch.tensor(sizes, dtype=torch.float64)[:, None]
    return ((torch.arange(b) < counts) / counts).to(dtype)


def _rows(layer: Embedding, weights: Params, d: Tensor, tokens: Tensor) -> Tensor:
    table = weights[layer.weight]
    grad = torch.zeros_like(table)
    return grad.scatter_add_(1, tokens.unsqueeze(2).expand(d.shape), d)
