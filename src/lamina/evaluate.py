"""What a model is worth: on the test set, and on the clients' own.

The test set is cut into pieces that are worth the same wherever they are computed, so an engine can spread them over
its workers like clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lamina.client import Setup
from lamina.data.transform import Batch
from lamina.errors import expect
from lamina.method import Plan
from lamina.metrics import Metric, Number, measured
from lamina.store import Row
from lamina.training import Loss, Trainer

_PIECE = 500  # examples


class Score(NamedTuple):
    """Of some examples. Scores add up."""

    loss: float  # sum over the examples
    examples: int
    hits: int  # right predictions
    targets: int  # labels to predict; 0 when the targets are no class labels

    @staticmethod
    def total(parts: Iterable[Score]) -> Score:
        loss, examples, hits, targets = zip(*parts, strict=True)
        return Score(sum(loss), sum(examples), sum(hits), sum(targets))

    @property
    def accuracy(self) -> float | None:
        return self.hits / self.targets if self.targets else None


def loss_function(loss: Any) -> Loss:
    if loss == "cross_entropy":
        return functional.cross_entropy
    expect(callable(loss), f"loss={loss!r}: expected 'cross_entropy' or a function (output, target) -> scalar")
    chosen: Loss = loss
    return chosen


def pieces(test: tuple[Batch, Batch]) -> int:
    """How many pieces a test set is cut into."""
    return -(-_length(test[1]) // _PIECE)


def score_piece(trainer: Trainer, setup: Setup, plan: Plan, piece: int) -> Score:
    """The global model, plan.params, on one piece of the test set."""
    trainer.hold(plan)
    return _score(trainer, setup.loss, _cut(_given(setup.data.test), piece))


def score_local(trainer: Trainer, setup: Setup) -> Score:
    """The model as the trainer holds it after a client's local training, on the whole test set."""
    test = _given(setup.data.test)
    return Score.total(_score(trainer, setup.loss, _cut(test, piece)) for piece in range(pieces(test)))


def score_personal(trainer: Trainer, setup: Setup, plan: Plan, client: int, row: Row) -> Score:
    """A client's personal model, begin(client, next plan, params), on its own test set.

    Where the data has none (local-only training), on the common one.
    """
    tests = setup.data.client_tests
    test = _given(setup.data.test if tests is None else tests.get(setup.data.names[client]))
    trainer.load(setup.method.begin(row.method, plan, plan.params), row.buffers or plan.buffers)
    return Score.total(_score(trainer, setup.loss, _cut(test, piece)) for piece in range(pieces(test)))


def score_at_once(
    trainer: Trainer, setup: Setup, plan: Plan, metrics: Mapping[str, Metric]
) -> tuple[Score, dict[str, Number]]:
    """The whole test set, with metrics that need its outputs and targets all at once: in this process and on all its
    cores, while the workers wait, and with all outputs in memory."""
    trainer.hold(plan)
    trainer.model.eval()
    test = _given(setup.data.test)
    cuts = [_cut(test, piece) for piece in range(pieces(test))]
    with torch.inference_mode():
        outputs = [_forward(trainer, x) for x, _ in cuts]
        score = Score.total(_judge(setup.loss, output, y) for output, (_, y) in zip(outputs, cuts, strict=True))
        whole = torch.cat(outputs) if isinstance(outputs[0], Tensor) else outputs
        return score, measured(metrics, whole, test[1])


def _score(trainer: Trainer, loss: Loss, examples: tuple[Batch, Batch]) -> Score:
    trainer.model.eval()
    x, y = examples
    with torch.inference_mode():
        return _judge(loss, _forward(trainer, x), y)


def _judge(loss: Loss, output: Any, y: Batch) -> Score:
    n = _length(y)
    value = float(loss(output, y)) * n
    if isinstance(y, Tensor) and isinstance(output, Tensor) and _labels(y, output):
        return Score(value, n, int(output.argmax(1).eq(y).sum()), y.numel())
    return Score(value, n, 0, 0)


def _labels(y: Tensor, output: Tensor) -> bool:
    """Whether these targets are class labels for this output."""
    return not y.is_floating_point() and output.dim() == y.dim() + 1


def _forward(trainer: Trainer, x: Batch) -> Any:
    return trainer.forward(trainer.arrange(trainer.data.transform(x, None)))


def _given(test: tuple[Batch, Batch] | None) -> tuple[Batch, Batch]:
    expect(test is not None, "there is no test set to evaluate on")
    assert test is not None  # said above
    return test


def _cut(test: tuple[Batch, Batch], piece: int) -> tuple[Batch, Batch]:
    start, end = piece * _PIECE, (piece + 1) * _PIECE
    x, y = ({k: v[start:end] for k, v in part.items()} if isinstance(part, dict) else part[start:end] for part in test)
    return x, y


def _length(x: Batch) -> int:
    return len(next(iter(x.values()))) if isinstance(x, dict) else len(x)
