"""What a model is worth: on the test set, and on the clients' own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lamina.client import Loss, Setup, Trainer
from lamina.data.transform import Batch
from lamina.errors import expect
from lamina.method import Plan
from lamina.store import ClientStore, Row

_BATCH = 500


class Evaluation(NamedTuple):
    accuracy: float | None = None  # None when the targets are not class labels
    loss: float | None = None
    metrics: dict[str, float] | None = None
    personal_accuracy: float | None = None


def loss_function(loss: Any) -> Loss:
    if loss == "cross_entropy":
        return functional.cross_entropy
    expect(callable(loss), f"loss={loss!r}: expected 'cross_entropy' or a function (output, target) -> scalar")
    chosen: Loss = loss
    return chosen


def evaluate(
    trainer: Trainer, test: tuple[Batch, Batch] | None, loss: Loss, metrics: Mapping[str, Callable[[Any, Any], float]]
) -> Evaluation:
    """The model that the trainer holds, in eval mode, without augmentation.

    Accuracy counts ``output.argmax(1) == target`` where targets are integer labels; `metrics` see the outputs and
    targets of the whole test set at once.
    """
    if test is None:
        return Evaluation()
    trainer.model.eval()
    examples = right = 0
    total = 0.0
    outputs: list[Any] = []
    labelled = True
    with torch.inference_mode():
        for x, y in _pieces(test):
            output = trainer.forward(trainer.arrange(trainer.data.transform(x, None)))
            n = _length(y)
            total += float(loss(output, y)) * n
            hits = _hits(output, y)
            labelled = labelled and hits is not None
            right += hits or 0
            examples += y.numel() if labelled and isinstance(y, Tensor) else n
            if metrics:
                outputs.append(output)
        found = {}
        if metrics:
            whole = torch.cat(outputs) if isinstance(outputs[0], Tensor) else outputs
            found = {name: float(metric(whole, test[1])) for name, metric in metrics.items()}
    return Evaluation(right / examples if labelled else None, total / _length(test[1]), found)


def personal_accuracy(trainer: Trainer, setup: Setup, plan: Plan, store: ClientStore) -> float | None:
    """Mean over clients of the accuracy of each one's personal model, begin(client, next plan, params).

    Each is tested on its own test set; where the data has none (local-only training), on the common one.
    """
    method, data = setup.method, setup.data
    tests = data.client_tests
    scores: list[float] = []
    for client, name in enumerate(data.names):
        test = data.test if tests is None else tests.get(name)
        if test is None:
            continue
        row = store.get(client).row or Row(method.init_client(plan.params), {})
        trainer.load(method.begin(row.method, plan, plan.params), row.buffers or plan.buffers)
        accuracy = evaluate(trainer, test, setup.loss, {}).accuracy
        if accuracy is None:
            return None
        scores.append(accuracy)
    return sum(scores) / len(scores) if scores else None


def _pieces(test: tuple[Batch, Batch]) -> Iterator[tuple[Batch, Batch]]:
    x, y = test
    for start in range(0, _length(y), _BATCH):
        yield _slice(x, start), _slice(y, start)


def _slice(x: Batch, start: int) -> Batch:
    if isinstance(x, dict):
        return {name: part[start : start + _BATCH] for name, part in x.items()}
    return x[start : start + _BATCH]


def _length(x: Batch) -> int:
    return len(next(iter(x.values()))) if isinstance(x, dict) else len(x)


def _hits(output: Any, y: Batch) -> int | None:
    """Right predictions, None where the target is not a vector (or grid) of class labels."""
    classes = isinstance(y, Tensor) and isinstance(output, Tensor) and not y.is_floating_point()
    if not classes or output.dim() != y.dim() + 1:  # type: ignore[union-attr]  # both are tensors here
        return None
    return int((output.argmax(1) == y).sum())
