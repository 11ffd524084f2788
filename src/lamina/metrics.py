"""Metrics by name: exact functions (outputs, targets) over the whole test set, computed in float64.

A metric gives a number, a table label -> number (which becomes columns such as ``per_class/3``), or None where it is
undefined: an accuracy of a class without a test example, an AUC of one class only. Nothing undefined enters a mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lamina.errors import ConfigError, expect, meant

Number: TypeAlias = float | None
Metric: TypeAlias = Callable[[Any, Any], "float | Tensor | Mapping[Any, Any] | None"]

_FIRST = 5  # labels among which `top5` looks


def per_class(outputs: Any, targets: Any) -> dict[str, Number]:
    """Accuracy on the examples of each class (its recall), by label."""
    counts = _confusion(outputs, targets)
    hits, examples = counts.diagonal().tolist(), counts.sum(1).tolist()
    return {str(c): hit / n if n else None for c, (hit, n) in enumerate(zip(hits, examples, strict=True))}


def balanced_accuracy(outputs: Any, targets: Any) -> Number:
    """Mean of the accuracies of the classes that have a test example."""
    return _mean(per_class(outputs, targets).values())


def f1(outputs: Any, targets: Any) -> Number:
    """Macro F1: the mean of 2 TP / (2 TP + FP + FN) over the classes that are a target or a prediction somewhere."""
    counts = _confusion(outputs, targets)
    hits, sums = counts.diagonal().tolist(), (counts.sum(0) + counts.sum(1)).tolist()  # 2 TP + FP + FN
    return _mean(2 * hit / n for hit, n in zip(hits, sums, strict=True) if n)


def auc(outputs: Any, targets: Any) -> Number:
    """Area under the ROC curve, ties counted half. Two outputs, or one with targets 0 and 1: of the second class. More:
    each class against the rest by its probability, the mean over the classes that have examples on both sides; outputs
    with a target 0 or 1 each: their mean."""
    if _are_scores(outputs, targets):
        scores, y = _columns(outputs, targets)
        return _mean(_area(score, label == 1) for score, label in zip(scores.mT, y.mT, strict=True))
    scores, y = _labelled(outputs, targets)
    scores = scores.double()
    if scores.shape[1] == 2:
        return _area(scores[:, 1] - scores[:, 0], y == 1)
    # Log-probabilities, since small probabilities round to 0 and tie. Equal ones do tie: float32 outputs are shifted
    # without rounding, and rows of the same outputs in another order are summed in one order.
    scores = scores - scores.amax(1, keepdim=True)
    likely = scores - scores.sort(1).values.logsumexp(1, keepdim=True)
    return _mean(_area(likely[:, c], y == c) for c in range(scores.shape[1]))


def top5(outputs: Any, targets: Any) -> Number:
    """Share of the examples whose label is among the five largest outputs; of equal ones the first counts as larger."""
    scores, y = _labelled(outputs, targets)
    expect(
        scores.shape[1] > _FIRST,
        f"the model has {scores.shape[1]} outputs, so the label is always among the first {_FIRST}",
        code="E103",
        remedy="leave it out: accuracy is measured anyway",
    )
    own = scores.gather(1, y[:, None])
    before = torch.arange(scores.shape[1]) < y[:, None]
    ahead = ((scores > own) | ((scores == own) & before)).sum(1)
    return _share(ahead < _FIRST)


def mae(outputs: Any, targets: Any) -> Number:
    """Mean absolute error; over several columns their mean."""
    found, wanted = _columns(outputs, targets)
    return float((found - wanted).abs().mean()) if len(wanted) else None


def rmse(outputs: Any, targets: Any) -> Number:
    """Root of the mean squared error; over several columns the mean of their roots."""
    found, wanted = _columns(outputs, targets)
    return float((found - wanted).square().mean(0).sqrt().mean()) if len(wanted) else None


def r2(outputs: Any, targets: Any) -> Number:
    """1 - squared error / squared deviation from the mean; the mean over the columns in which the targets differ."""
    found, wanted = _columns(outputs, targets)
    if not len(wanted):
        return None
    error, spread = (found - wanted).square().sum(0), (wanted - wanted.mean(0)).square().sum(0)
    differ = (wanted != wanted[0]).any(0)  # not the spread: the mean of equal numbers may round to another
    return _mean((1 - error / spread)[differ].tolist())


METRICS: dict[str, Metric] = {
    "per_class": per_class,
    "balanced_accuracy": balanced_accuracy,
    "f1": f1,
    "auc": auc,
    "top5": top5,
    "mae": mae,
    "rmse": rmse,
    "r2": r2,
}


def chosen(metrics: Mapping[str, Any] | Iterable[str] | None) -> dict[str, Metric]:
    """Name -> function, of names in METRICS, or of names and functions (or names in METRICS).

    Raises:
        ConfigError: E103 for a name that is not known, E101 for what is no function.
    """
    if isinstance(metrics, str):
        raise ConfigError(f"metrics={metrics!r}: expected a list of names", remedy=f"metrics=[{metrics!r}]")
    given = metrics if isinstance(metrics, Mapping) else {name: name for name in metrics or ()}
    return {
        str(name): METRICS[known(name, it)] if isinstance(it, str) else _function(name, it)
        for name, it in given.items()
    }


def known(key: str, name: str) -> str:
    """The name, if it is that of a metric. Raises ConfigError E103."""
    if name not in METRICS:
        raise ConfigError(
            f'metrics.{key}: expected one of {", ".join(METRICS)}, or an entry "mine.py:metric"; got {name!r}',
            code="E103",
            where=f"metrics.{key}",
            remedy=meant(name, METRICS) or None,
        )
    return name


def measured(metrics: Mapping[str, Metric], outputs: Any, targets: Any) -> dict[str, Number]:
    """All of them, a table as one column per label. What is not finite has no value."""
    return dict(_measured(metrics, outputs, targets))


def _measured(metrics: Mapping[str, Metric], outputs: Any, targets: Any) -> Iterator[tuple[str, Number]]:
    for name, metric in metrics.items():
        try:
            found = metric(outputs, targets)
        except ConfigError as error:
            where = f"metrics.{name}"
            raise ConfigError(f"{where}: {error.message}", code=error.code, where=where, remedy=error.remedy) from error
        table = {f"{name}/{label}": x for label, x in found.items()} if isinstance(found, Mapping) else {name: found}
        for column, x in table.items():
            value = math.nan if x is None else float(x)
            yield column, value if math.isfinite(value) else None


def _function(name: Any, metric: Any) -> Metric:
    expect(callable(metric), f"metrics[{name!r}]={metric!r}: expected a function (outputs, targets) -> number")
    function: Metric = metric
    return function


# ---- what the metrics are made of


def _labelled(outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Outputs [n, classes] and labels [n]; of grids and texts every cell is an example."""
    fine = isinstance(outputs, Tensor) and isinstance(targets, Tensor)
    fine = fine and not targets.is_floating_point() and outputs.dim() == targets.dim() + 1
    if not fine or outputs.shape[0] != targets.shape[0] or outputs.shape[2:] != targets.shape[1:]:
        raise _misfit("outputs [n, classes] and whole numbers as labels [n]", outputs, targets)
    scores, y = outputs.movedim(1, -1).reshape(-1, outputs.shape[1]), targets.reshape(-1).long()
    if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < scores.shape[1]:
        raise _misfit(
            f"labels from 0 to {scores.shape[1] - 1}, got one of {int(y.min())} to {int(y.max())}", outputs, targets
        )
    return scores, y


def _columns(outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Outputs and targets [n, columns]; nothing is broadcast."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or not _alike(outputs, targets):
        raise _misfit("outputs and targets of one shape", outputs, targets)
    n = len(targets)
    return outputs.double().reshape(n, -1), targets.double().reshape(n, -1)


def _alike(outputs: Tensor, targets: Tensor) -> bool:
    """Of one shape, but for a last dimension of 1 that only one of them has."""
    return (
        outputs.shape == targets.shape
        or tuple(outputs.shape) == (*targets.shape, 1)
        or tuple(targets.shape) == (*outputs.shape, 1)
    )


def _are_scores(outputs: Any, targets: Any) -> bool:
    """An output for each target, which is 0 or 1."""
    both = isinstance(outputs, Tensor) and isinstance(targets, Tensor) and _alike(outputs, targets)
    return both and bool(((targets == 0) | (targets == 1)).all())


def _misfit(expected: str, outputs: Any, targets: Any) -> ConfigError:
    def shown(x: Any) -> str:
        return (
            f"{list(x.shape)} of {str(x.dtype).removeprefix('torch.')}" if isinstance(x, Tensor) else type(x).__name__
        )

    return ConfigError(
        f"expected {expected}; got outputs {shown(outputs)}, targets {shown(targets)}",
        code="E103",
        remedy="per_class, balanced_accuracy, f1, auc and top5 are for classes; mae, rmse and r2 for numbers",
    )


def _confusion(outputs: Any, targets: Any) -> Tensor:
    """How often a target (row) was predicted as a class (column): the largest output, as accuracy has it."""
    scores, y = _labelled(outputs, targets)
    classes = scores.shape[1]
    return torch.bincount(y * classes + scores.argmax(1), minlength=classes * classes).view(classes, classes)


def _area(scores: Tensor, positive: Tensor) -> Number:
    """Share of the pairs (positive, negative) in which the positive has the larger score, equal ones counted half: from
    the sum of the positives' ranks. None without such a pair, or where a score is no number."""
    above, below = int(positive.sum()), int((~positive).sum())
    if not above or not below or bool(scores.isnan().any()):
        return None
    _, place, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    twice = 2 * counts.cumsum(0) - counts + 1  # the mean rank of equal scores, times two: whole numbers
    wins = int(twice[place[positive]].sum()) - above * (above + 1)
    return wins / (2 * above * below)


def _mean(values: Iterable[Number]) -> Number:
    defined = [x for x in values if x is not None]
    return math.fsum(defined) / len(defined) if defined else None


def _share(hits: Tensor) -> Number:
    return int(hits.sum()) / len(hits) if len(hits) else None
