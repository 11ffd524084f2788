"""The gradient of K clients' stacked small networks, written out: linear layers with ReLU or tanh between them, an
embedding in front, softmax cross-entropy behind. Three times as fast as vmap; a step of plain SGD makes no gradient:
the outer product that it is goes straight into the weights. So a large network gains too, one client at a time.

    forward    a_0 = x,  z_l = a_(l-1) W_l' + b_l,  a_l = relu(z_l)
    loss       -log softmax(z_L)[y], the mean over the minibatch
    backward   d_L = (softmax - onehot) / B,  dW_l = d_l' a_(l-1),  db_l = sum d_l,  d_(l-1) = (d_l W_l) relu'
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from lamina.engine import mkl
from lamina.engine.stack import Minibatches
from lamina.training import Trainer
from lamina.tree import Params


class Linear(NamedTuple):
    weight: str
    bias: str | None


class Embedding(NamedTuple):
    weight: str


Operation = Linear | Embedding | str  # "relu" | "tanh" | "flatten"
_OfLinear: TypeAlias = Callable[[Linear, Tensor, Tensor, bool], Tensor]  # d [m, b, outputs], a [m, b, inputs]
_OfEmbedding: TypeAlias = Callable[[Embedding, Tensor, Tensor], None]  # d [m, b * length, width], ids [m, b * length]


class Gemm:
    """Made by `recognise`."""

    def __init__(self, operations: list[Operation]):
        self._operations = operations
        self._from_left = mkl.asked_for()
        # entries of the first layer's input need no gradient
        self._lowest = next(i for i, o in enumerate(operations) if not isinstance(o, str))

    def __call__(self, weights: Params, given: Minibatches) -> tuple[Params, Tensor]:
        grads: Params = {}

        def linear(layer: Linear, d: Tensor, a: Tensor, below: bool) -> Tensor:
            grads[layer.weight] = torch.bmm(d.mT, a)
            if layer.bias is not None:
                grads[layer.bias] = d.sum(1)
            return torch.bmm(d, weights[layer.weight]) if below else d

        def embedding(layer: Embedding, d: Tensor, tokens: Tensor) -> None:
            grads[layer.weight] = _rows(layer, weights, d, tokens)

        losses = self._walk(weights, given, linear, embedding)
        return {name: grads[name] for name in weights}, losses

    def descend(self, weights: Params, given: Minibatches, lr: float) -> Tensor:
        def linear(layer: Linear, d: Tensor, a: Tensor, below: bool) -> Tensor:
            if layer.bias is not None:
                weights[layer.bias].sub_(d.sum(1), alpha=lr)
            w = weights[layer.weight]
            made = torch.bmm(d, w) if below else d
            w.baddbmm_(d.mT, a, alpha=-lr)
            return made

        def embedding(layer: Embedding, d: Tensor, tokens: Tensor) -> None:
            weights[layer.weight].sub_(_rows(layer, weights, d, tokens), alpha=lr)

        return self._walk(weights, given, linear, embedding)

    def _product(self, a: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """a w' + bias. With MKL's kernels for Intel a minibatch of ten takes half the time from the right: (w a')'."""
        if self._from_left and len(w) == 1 and a.dim() == 3:
            a = torch.mm(w[0], a[0].T.contiguous()).T.contiguous()[None]
            return a if bias is None else a.add_(bias)
        return torch.bmm(a, w.mT) if bias is None else torch.baddbmm(bias, a, w.mT)

    def _walk(self, weights: Params, given: Minibatches, linear: _OfLinear, embedding: _OfEmbedding) -> Tensor:
        """Forward, then back from the last layer to the first; losses [m]."""
        x: Any = given.x
        y: Any = given.y
        share = _shares(given.sizes, next(iter(weights.values())).dtype)
        kept: list[Tensor] = []  # the input of each layer, the output of each activation
        a = x
        for operation in self._operations:
            if isinstance(operation, Linear):
                kept.append(a)
                bias = None if operation.bias is None else weights[operation.bias][:, None]
                a = self._product(a, weights[operation.weight], bias)
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
        for i in reversed(range(self._lowest, len(self._operations))):
            operation, a = self._operations[i], kept[i]
            if isinstance(operation, Embedding):
                embedding(operation, d.flatten(1, 2), a.flatten(1))
            elif isinstance(operation, Linear):
                d = linear(operation, d, a, i > self._lowest)
            elif operation == "flatten":
                d = d.reshape(a.shape)
            else:
                d = torch.ops.aten.threshold_backward(d, a, 0) if operation == "relu" else d * (1 - a * a)
        return losses


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
