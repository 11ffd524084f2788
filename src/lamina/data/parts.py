"""From a table to what `ClientData.from_index` takes: examples, who holds which, and a test set.

Rows keep their order, and clients and labels are sorted, so the same rows give the same split whatever kind of file
they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamina.data.partition import hold_out, split
from lamina.data.pictures import is_picture, stacked
from lamina.data.reading import Reading
from lamina.data.tables import Header, Read, Table, finite, names, numbers, ordered, positions
from lamina.data.transform import Images, Transform
from lamina.errors import DataError, expect

CLIENTS = 10  # where neither client= nor clients= is given

Array = NDArray[Any]


class Parts(TypedDict):
    """The arguments of `ClientData.from_index`."""

    x: Any
    y: Any
    groups: dict[str, Any]
    test: Any
    client_tests: dict[str, tuple[Any, Any]] | None
    transform: Transform | None
    name: str
    partition: str
    label_names: Sequence[str] | None


class _Learnt(NamedTuple):
    """What the training table says of its columns; a test set is read in the same terms."""

    inputs: list[str]
    classes: list[str] | None  # None: y holds no labels
    categories: dict[str, list[str]]
    grey: bool | None = None  # whether the pictures have one channel; None: as they are


def parts(
    read: Read, source: Any, how: Reading, *, name: str, owners: Callable[[], Sequence[str]] | None = None
) -> Parts:
    """What `ClientData.from_index` takes.

    Args:
        read: gives the chosen columns of a source: of `source`, and of `how.test`.
        name: of the data set where `how` gives none.
        owners: once the source has been read, the client of every row, where no column says it.
    """
    headers: list[Header] = []

    def choose(header: Header) -> Mapping[str, bool]:
        headers.append(header)
        return how.choose(header, _title(source, name))

    table = read(source, choose)
    if not table.rows:
        raise DataError("no examples", code="E211", where=table.source)
    learnt = _learnt(table, how, how.inputs(headers[0]))
    x, y = _x(table, how, learnt), _y(table, how, learnt)
    look: Transform | None = None
    if _pictures(table, learnt):
        learnt = learnt._replace(grey=x.shape[3] == 1)
        look = Images((0.0,) * x.shape[3], (1.0,) * x.shape[3])
    expect(
        not how.standardise or x.dtype.kind == "f",
        f"standardise=True: x is {x.dtype}, expected numbers with a fraction",
        remedy="for images: transform=Images(mean, std)",
    )
    if owners is None and how.client is None:
        clients = CLIENTS if how.clients is None else how.clients
        rule = how.partition or "iid"
        labels = None if learnt.classes is None or y.ndim != 1 else torch.from_numpy(y)
        groups = dict(zip(map(str, range(clients)), split(rule, labels, clients, how.seed, table.rows), strict=True))
    else:
        rule = "by folder" if owners else f"column:{how.client}"
        groups = _grouped(owners() if owners else _clients(table, how))
    test: tuple[Array, Array] | None = None
    own: dict[str, Array] = {}  # by client, its rows of the test set
    if how.test_share:
        groups, held = hold_out(groups, how.test_share, how.seed)
        rows = torch.cat([*held.values()]).numpy()
        test, own = (x[rows], y[rows]), _in_turn(held)
    elif how.test is not None:
        other = read(how.test, lambda header: how.choose(header, _title(how.test, "test"), tested=True))
        if not other.rows:
            raise DataError("no examples", code="E211", where=other.source)
        test = (_x(other, how, learnt), _y(other, how, learnt))
        own = _own(other, how, groups) if how.client_tests else {}
    if how.standardise:
        mean, deviation = _moments(x[torch.cat([*groups.values()]).numpy()])
        x = (x - mean) / deviation
        test = None if test is None else ((test[0] - mean) / deviation, test[1])
    tests = None
    if how.client_tests and test is not None:
        tests = {who: (test[0][rows], test[1][rows]) for who, rows in own.items() if len(rows)}
    return {
        "x": x,
        "y": y,
        "groups": groups,
        "test": test,
        "client_tests": tests,
        "transform": how.transform or look,
        "name": how.name or name,
        "partition": rule,
        "label_names": _label_names(table, how, learnt),
    }


def _title(source: Any, otherwise: str) -> str:
    return str(source) if isinstance(source, str | Path) else otherwise


# ---- columns


def _learnt(table: Table, how: Reading, inputs: list[str]) -> _Learnt:
    categories = {name: ordered(names(table.columns[name], name, table.place)) for name in how.categorical}
    if how.regression:
        return _Learnt(inputs, None, categories)
    target = how.targets[0]
    values = table.columns[target]
    if isinstance(values, np.ndarray) and values.ndim > 1:
        return _Learnt(inputs, None, categories)  # such as a label for every pixel
    if isinstance(how.classes, int):
        return _Learnt(inputs, [str(i) for i in range(how.classes)], categories)
    if how.classes is not None:
        return _Learnt(inputs, names(how.classes, "classes", lambda _: "classes="), categories)
    if target in table.known:
        return _Learnt(inputs, [*table.known[target]], categories)
    found = names(_cells(values), target, table.place)
    for row, value in enumerate(found):
        if _is_fraction(value):
            raise _no_label(value, target, table.place(row))
    return _Learnt(inputs, ordered(found), categories)


def _label_names(table: Table, how: Reading, learnt: _Learnt) -> list[str] | None:
    """What the labels are called; None where that is their numbers."""
    if learnt.classes is None:
        return None
    target = how.targets[0]
    called = dict(zip(table.known.get(target, ()), table.called.get(target, ()), strict=False))
    found = [called.get(name, name) for name in learnt.classes]
    return None if found == [str(i) for i in range(len(found))] else found


def _pictures(table: Table, learnt: _Learnt) -> bool:
    return len(learnt.inputs) == 1 and is_picture(table.columns[learnt.inputs[0]][0])


def _x(table: Table, how: Reading, learnt: _Learnt) -> Array:
    if how.encode is not None:
        return _encoded(list(table.columns[learnt.inputs[0]]), how.encode, table)
    if _pictures(table, learnt):
        return stacked(table.columns[learnt.inputs[0]], table.rows, table.place, how.size, learnt.grey)
    columns = []
    for name in learnt.inputs:
        values = table.columns[name]
        if name in learnt.categories:
            known = learnt.categories[name]
            remedy = "the categories are those of the training examples"
            found = names(values, name, table.place)
            at = positions(found, known, f"column {name!r} holds", table.place, remedy)
            columns.append(np.eye(len(known), dtype=np.float32)[at])
        elif table.plain:
            column = numbers(values, name, table.place).astype(np.float32)
            columns.append(column if column.ndim > 1 else column[:, None])
        else:
            columns.append(finite(np.asarray(values), name, table.place))
    if len(columns) == 1:
        return columns[0]
    for name, column in zip(learnt.inputs, columns, strict=True):
        if column.ndim != 2:
            message = f"column {name!r} holds {column.ndim - 1}-dimensional examples beside other columns"
            raise DataError(message, code="E215", where=table.source, remedy="x= takes one such column alone")
    return np.concatenate(columns, axis=1)


def _encoded(values: list[Any], encode: Callable[[list[Any]], Any], table: Table) -> Array:
    made = encode(values)
    array = made.numpy() if isinstance(made, Tensor) else np.asarray(made)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    if array.dtype.kind not in "fiub" or array.ndim == 0 or len(array) != len(values):
        raise DataError(
            f"encode= gave {array.dtype} {list(array.shape)} for {len(values)} values, expected an array of numbers "
            "with a row for each",
            code="E212",
            where=table.source,
        )
    return finite(array, "encode=", table.place)


def _y(table: Table, how: Reading, learnt: _Learnt) -> Array:
    """int64 [n] of labels; float32 [n, targets] of a regression, as the output of a last layer; else as it is."""
    values = [table.columns[name] for name in how.targets]
    if how.regression:
        columns = [numbers(one, name, table.place) for one, name in zip(values, how.targets, strict=True)]
        return np.concatenate([c if c.ndim > 1 else c[:, None] for c in columns], axis=1).astype(np.float32)
    if learnt.classes is None:
        return finite(np.asarray(values[0]), how.targets[0], table.place)
    remedy = "classes= lists the labels that there may be; without it they are those of the training examples"
    return positions(
        names(_cells(values[0]), how.targets[0], table.place), learnt.classes, "label", table.place, remedy
    )


def _clients(table: Table, how: Reading) -> list[str]:
    return names(_cells(table.columns[str(how.client)]), str(how.client), table.place)


def _cells(values: Any) -> Any:
    return values.tolist() if isinstance(values, np.ndarray) else values


def _is_fraction(text: str) -> bool:
    try:
        return not float(text).is_integer()
    except (ValueError, OverflowError):  # a text, or infinity
        return False


def _no_label(value: Any, column: str, where: str) -> DataError:
    return DataError(
        f"column {column!r} holds {value}, which is no label",
        code="E224",
        where=where,
        remedy="regression=True (and loss='mse') for targets that are numbers; labels are texts or whole numbers",
    )


# ---- who holds what


def _grouped(owners: Sequence[str]) -> dict[str, Tensor]:
    """The rows of every owner, owners sorted."""
    every = ordered(owners)
    at = {name: i for i, name in enumerate(every)}
    owner = np.fromiter((at[name] for name in owners), dtype=np.int64, count=len(owners))
    order = torch.from_numpy(np.argsort(owner, kind="stable"))
    return dict(zip(every, torch.split(order, np.bincount(owner).tolist()), strict=True))


def _in_turn(held: Mapping[str, Tensor]) -> dict[str, Array]:
    """Where each client's examples lie when they are laid one after the other."""
    ends = np.cumsum([len(part) for part in held.values()]).tolist()
    return {name: np.arange(end - len(part), end) for (name, part), end in zip(held.items(), ends, strict=True)}


def _own(test: Table, how: Reading, groups: Mapping[str, Tensor]) -> dict[str, Array]:
    """The rows of every client of the test set, which must name them."""
    if how.client is None or how.client not in test.columns:
        message = f"client_tests=True: the test set says not whose a row is (client={how.client!r})"
        raise DataError(message, code="E222", where=test.source, remedy="client= names such a column of both files")
    found = _clients(test, how)
    positions(found, [*groups], "client", test.place, "a client of the test set has training examples too")
    return {name: rows.numpy() for name, rows in _grouped(found).items()}


def _moments(x: Array) -> tuple[Array, Array]:
    """Mean and deviation of every column, float32; a column that never changes keeps its scale."""
    mean, deviation = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    return mean.astype(np.float32), np.where(deviation > 0, deviation, 1).astype(np.float32)
