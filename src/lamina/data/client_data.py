"""ClientData: all examples in central tensors, and for every client the list of those it holds.

Errors of this package (DataError):

    E210  no clients                          E215  shapes, dtypes or entries differ
    E211  clients without examples            E216  a negative label
    E212  x and y of different lengths        E217  an index outside the examples
    E213  names: twice the same, or unknown   E218  not to be read as tensors
    E214  a number that is not finite         E219  an optional package is missing
    E221  no such file or folder              E222  no such column
    E223  a cell that cannot be used          E224  a label or category outside the known ones
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from lamina.data import csv_table, hugging_face, parquet
from lamina.data import folders as client_folders
from lamina.data.partition import hold_out, split
from lamina.data.parts import parts
from lamina.data.reading import TableArguments, reading
from lamina.data.transform import Batch, Identity, Images, Transform
from lamina.errors import ConfigError, DataError, expect

POOLED = "pooled"  # the `partition` of what `pooled` makes
CHUNK = 1 << 22  # entries looked at in one go by the check for finite numbers


@dataclass(frozen=True, eq=False, repr=False)
class ClientData:
    """The data of a federation. Nobody writes into its tensors: they may be read-only memory maps.

    Usually made by one of its functions `from_...`. An example may be held by several clients, or none.

    Args:
        x: train examples, a tensor or a dict of tensors of equal length; the first axis = examples.
        y: their targets, likewise. A vector of integers is a vector of labels (int64).
        names: of the clients; a "client id" is a position in it.
        offsets: int64 [N + 1].
        indices: int64; client i holds indices[offsets[i]:offsets[i + 1]] of the examples, in this order.
        test: (x, y) for the global model.
        client_tests: (x, y) by client name, for personal evaluation; not every client needs one.
        transform: applied to x inside the step; see `lamina.data.transform`.
        name: of the data set, for records.
        partition: how it was split, for records.
        counts: int64 [N], examples per client where not all of them are here; made by `among` and `registry`.
        label_names: what the labels 0, 1, ... are called, for people: no sum and no result depends on it.
        check: look through all values (finite, not negative); the form is checked always.

    Raises:
        DataError: E210 to E217, E224 (see the module), naming the client and the remedy.
    """

    x: Batch
    y: Batch
    names: tuple[str, ...]
    offsets: Tensor
    indices: Tensor
    test: tuple[Batch, Batch] | None = None
    client_tests: dict[str, tuple[Batch, Batch]] | None = None
    transform: Transform = field(default_factory=Identity)
    name: str = "custom"
    partition: str = "given"
    counts: Tensor | None = None
    label_names: tuple[str, ...] | None = None
    check: InitVar[bool] = True

    def __post_init__(self, check: bool) -> None:
        self._check_form()
        for where, x, y in self._sets():
            _check_pair(x, y, where)
            _check_alike(x, self.x, f"{where}: x")
            _check_alike(y, self.y, f"{where}: y")
            if check:
                self._check_values(x, y, where)
        if check and self.label_names is not None and self.classes and len(self.label_names) < self.classes:
            raise DataError(
                f"label_names: expected {self.classes} names or more, as there are labels to {self.classes - 1}, "
                f"got {len(self.label_names)}",
                code="E224",
                remedy="a name for every label from 0 on, in their order; or leave label_names out",
            )

    def __len__(self) -> int:
        """Number of clients."""
        return len(self.names)

    def __repr__(self) -> str:
        classes = "" if self.classes is None else f", {self.classes} classes"
        return f"ClientData({self.name}, {self.partition}: {len(self)} clients, {len(self.indices)} examples{classes})"

    @property
    def sizes(self) -> Tensor:
        """Examples per client, int64 [N], wherever they are."""
        return self.offsets.diff() if self.counts is None else self.counts

    def sizes_of(self, clients: Sequence[int]) -> list[int]:
        """Examples of each of these clients."""
        some = torch.tensor(clients, dtype=torch.int64)
        found = self.offsets[some + 1] - self.offsets[some] if self.counts is None else self.counts[some]
        return [int(n) for n in found.tolist()]

    @property
    def here(self) -> list[int]:
        """Positions of the clients whose examples are here, ascending."""
        return self.offsets.diff().nonzero().view(-1).tolist()

    @cached_property
    def classes(self) -> int | None:
        """Number of labels, 1 + the largest one in the train and test sets; None unless y is a vector of integers."""
        labels = [y for _, _, y in self._sets() if isinstance(y, Tensor) and _is_labels(y)]
        return 1 + max(int(y.max()) for y in labels) if labels else None

    def indices_of(self, client: int) -> Tensor:
        """Which examples a client holds, in its order: int64 [n_client]."""
        return self.indices[int(self.offsets[client]) : int(self.offsets[client + 1])]

    def examples(self, indices: Tensor) -> tuple[Batch, Batch]:
        """(x, y) of these examples, raw: the transform is not applied."""
        return _select(self.x, indices), _select(self.y, indices)

    @cached_property
    def split_sha256(self) -> str:
        """Of the names (as JSON), offsets and indices (little-endian int64): equal splits have equal sums."""
        digest = hashlib.sha256(json.dumps(self.names).encode())
        for part in (self.offsets, self.indices):
            digest.update(part.cpu().numpy().astype("<i8").tobytes())
        if self.counts is not None:
            digest.update(self.counts.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the split and of the shapes and dtypes of x and y: what a run must find again to be resumed."""
        form = [[_layout(part), _length(part)] for part in (self.x, self.y)]
        return hashlib.sha256((self.split_sha256 + json.dumps(form)).encode()).hexdigest()

    def label_table(self, first: int = 0, end: int | None = None) -> Tensor | None:
        """Examples by client and label, int64 [N, classes], of the clients from `first` to before `end`; None when
        there are no labels."""
        if self.classes is None or not isinstance(self.y, Tensor):
            return None
        offsets = self.offsets[first : len(self) + 1 if end is None else end + 1]
        n = len(offsets) - 1
        client = torch.repeat_interleave(torch.arange(n), offsets.diff())
        held = self.indices[int(offsets[0]) : int(offsets[-1])]
        cell = client * self.classes + self.y.index_select(0, held)
        return torch.bincount(cell, minlength=n * self.classes).view(n, self.classes)

    @cached_property
    def pool_sha256(self) -> str:
        """Of what all clients hold together, whoever holds it, and of the test set: name, forms, targets. It is equal
        for any two partitions that leave no example out, and for the `pooled` data of both."""
        sets = [(self.x, self.y), *([] if self.test is None else [self.test])]
        form = [[_layout(part), _length(part)] for pair in sets for part in pair]
        digest = hashlib.sha256(json.dumps([self.name, form]).encode())
        digest.update(self._held().numpy().astype("<i8").tobytes())
        for _, y in sets:
            for _, values in sorted(_entries(y), key=lambda entry: entry[0]):
                digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _held(self) -> Tensor:
        """The examples that some client holds, ascending: by marking them, as sorting all indices takes seconds."""
        held = torch.zeros(_length(self.x), dtype=torch.bool)
        held[self.indices] = True
        return held.nonzero().view(-1)

    def pooled(self) -> ClientData:
        """One client, "all", that holds every example that any client holds, once; the tests of clients are dropped."""
        return ClientData(
            self.x,
            self.y,
            ("all",),
            *_csr([self._held()]),
            test=self.test,
            transform=self.transform,
            name=self.name,
            partition=POOLED,
            label_names=self.label_names,
            check=False,
        )

    def subset(self, clients: Sequence[int]) -> ClientData:
        """These clients (by position, in this order) over the same examples; the test set stays whole.

        Raises:
            DataError: E210 for an empty list, E213 for a position that does not exist or comes twice.
        """
        wrong = [client for client in clients if not 0 <= client < len(self)]
        if wrong:
            raise DataError(f"client {wrong[0]}: expected a position in 0..{len(self) - 1}", code="E213")
        names = tuple(self.names[client] for client in clients)
        tests = self.client_tests
        return ClientData(
            self.x,
            self.y,
            names,
            *_csr([self.indices_of(client) for client in clients]),
            test=self.test,
            client_tests=None if tests is None else {name: tests[name] for name in names if name in tests},
            transform=self.transform,
            name=self.name,
            partition=self.partition,
            label_names=self.label_names,
            check=False,
        )

    def held_out(self, share: float, seed: int = 0, *, client_tests: bool = False) -> ClientData:
        """The same, with a share of every client's examples as test set instead of training.

        Args:
            share: of each client's examples, rounded; every client keeps at least one to train on.
            seed: of the draw.
            client_tests: each client's part is its own test set too.

        Raises:
            ConfigError: no client has enough examples, or there is a test set, or clients share examples.
        """
        expect(self.test is None and self.client_tests is None, "there is a test set already", where="held_out")
        expect(
            len(self.indices) == len(self._held()),
            "clients share examples, so one's test example would be another's training example",
            where="held_out",
        )
        train, test = hold_out({name: self.indices_of(i) for i, name in enumerate(self.names)}, share, seed)
        offsets, indices = _csr([*train.values()])
        own = {name: self.examples(part) for name, part in test.items() if len(part)} if client_tests else None
        return replace(
            self,
            offsets=offsets,
            indices=indices,
            test=self.examples(torch.cat([*test.values()])),
            client_tests=own,
            check=False,
        )

    def among(self, names: Sequence[str]) -> ClientData:
        """The same clients and examples, among further clients of which there are no examples here.

        Args:
            names: of all clients, these included; a "client id" is a position in it.

        Raises:
            DataError: E213 for a list that lacks a client of these, or has a name twice.
        """
        lacking = sorted(set(self.names) - set(names))
        if lacking:
            raise DataError(f"client {lacking[0]!r} is not among the {len(names)} names", code="E213")
        own = {name: client for client, name in enumerate(self.names)}
        nobody = self.indices[:0]
        offsets, indices = _csr([self.indices_of(own[name]) if name in own else nobody for name in names])
        return ClientData(
            self.x,
            self.y,
            tuple(names),
            offsets,
            indices,
            test=self.test,
            client_tests=self.client_tests,
            transform=self.transform,
            name=self.name,
            partition=self.partition,
            counts=offsets.diff(),
            label_names=self.label_names,
            check=False,
        )

    @classmethod
    def registry(
        cls,
        sizes: Mapping[str, int],
        *,
        test: Any = None,
        transform: Transform | None = None,
        name: str = "custom",
        partition: str = "given",
    ) -> ClientData:
        """Of clients whose examples are elsewhere.

        Args:
            sizes: number of examples by client name, in the order of the clients.
            test: as `train` in `from_dataset`.
            transform: `Identity()` if None.
            name, partition: for records.

        Raises:
            DataError: E210 to E218.
        """
        pair = None if test is None else _read(test, "test")[:2]
        nobody = torch.arange(0)
        x, y = (nobody, nobody) if pair is None else (_select(part, nobody) for part in pair)
        offsets, indices = _csr([nobody for _ in sizes])
        empty = [key for key, size in sizes.items() if size < 1]
        if empty:
            raise _empty_clients(empty, len(sizes))
        return cls(
            x,
            y,
            tuple(sizes),
            offsets,
            indices,
            test=pair,
            transform=transform or Identity(),
            name=name,
            partition=partition,
            counts=torch.tensor([*sizes.values()], dtype=torch.int64),
        )

    @classmethod
    def from_clients(
        cls,
        clients: Mapping[str, tuple[Any, Any]],
        *,
        test: Any = None,
        client_tests: Mapping[str, tuple[Any, Any]] | None = None,
        transform: Transform | None = None,
        name: str = "custom",
        test_share: float = 0.0,
        seed: int = 0,
        label_names: Sequence[str] | None = None,
    ) -> ClientData:
        """From data that is split already.

        Args:
            clients: (x, y) by client name; tensors, numpy arrays, or dicts of them. They are copied once, into one.
            test: as `train` in `from_dataset`.
            client_tests: (x, y) by client name.
            transform: `Identity()` if None.
            name: of the data set.
            test_share: instead of `test`: of every client's examples, see `held_out`.
            seed: of that draw.
            label_names: what the labels 0, 1, ... are called, for tables and reports.

        Raises:
            ConfigError: an impossible test_share.
            DataError: E210 to E218, E224.
        """
        parts = {str(key): _pair(value, f"client {key!r}") for key, value in clients.items()}
        if not parts:
            raise _no_clients()
        if len(parts) < len(clients):
            raise DataError("client names that are equal as text", code="E213", remedy="give every client its own name")
        empty = [key for key, (x, y) in parts.items() if _length(x) == _length(y) == 0]
        if empty:
            raise _empty_clients(empty, len(parts))
        first = next(iter(parts.values()))
        for key, (x, y) in parts.items():
            where = f"client {key!r}"
            _check_pair(x, y, where)
            _check_alike(x, first[0], f"{where}: x")
            _check_alike(y, first[1], f"{where}: y")
        ends = np.cumsum([_length(x) for x, _ in parts.values()])
        made = cls(
            _concatenate([x for x, _ in parts.values()]),
            _concatenate([y for _, y in parts.values()]),
            tuple(parts),
            torch.tensor([0, *ends.tolist()]),
            torch.arange(int(ends[-1])),
            test=None if test is None else _read(test, "test")[:2],
            client_tests=_tests(client_tests),
            transform=transform or Identity(),
            name=name,
            label_names=_named(label_names),
        )
        return made.held_out(test_share, seed) if test_share else made

    @classmethod
    def from_dataset(
        cls,
        train: Any,
        test: Any = None,
        *,
        clients: int | None = None,
        partition: str = "iid",
        seed: int = 0,
        transform: Transform | None = None,
        name: str = "custom",
        columns: Mapping[str, Sequence[Any]] | None = None,
        test_share: float = 0.0,
        label_names: Sequence[str] | None = None,
    ) -> ClientData:
        """From one data set, split by a rule of `lamina.data.partition`.

        Args:
            train: (x, y) as tensors, numpy arrays or dicts of them, used without a copy (numpy float64 stays float64);
                or a map-style Dataset with items (x, y), read once: a random transform inside it would be applied once
                and for all, so put augmentation into `transform`. Images of Pillow become uint8 [H, W, C], numbers
                int64 or torch's default float.
            test: likewise, or None.
            clients: how many; None with `column:NAME`.
            partition: the rule. `column:NAME` makes one client of each value of columns[NAME], or of the attribute NAME
                of a Dataset, sorted.
            seed: of the split, and of `test_share`.
            transform: if None, `Identity()`, or for Pillow images `Images` with mean 0 and std 1.
            name: of the data set.
            columns: by name, one value per train example.
            test_share: instead of `test`: of every client's examples, see `held_out`.
            label_names: what the labels 0, 1, ... are called, for tables and reports.

        Raises:
            ConfigError: an impossible partition.
            DataError: E210 to E218, E224.
        """
        x, y, pictures = _read(train, "train")
        _check_pair(x, y, "train")
        if partition.startswith("column:"):
            column = partition.removeprefix("column:")
            names, parts = _by_column(column, columns or _attribute(train, column), clients, _length(x))
        else:
            if clients is None:
                raise ConfigError(f"clients=None: {partition} needs a number of clients", where="clients")
            labels = y if isinstance(y, Tensor) and _is_labels(y) else None
            if labels is not None:
                _check_labels(labels, "train")
            parts = split(partition, labels, clients, seed, _length(x))
            names = [str(client) for client in range(clients)]
        if transform is None:
            transform = Images((0.0,) * x.shape[3], (1.0,) * x.shape[3]) if pictures else Identity()  # type: ignore[union-attr]
        made = cls(
            x,
            y,
            tuple(names),
            *_csr(parts),
            test=None if test is None else _read(test, "test")[:2],
            transform=transform,
            name=name,
            partition=partition,
            label_names=_named(label_names),
        )
        return made.held_out(test_share, seed) if test_share else made

    @classmethod
    def from_csv(cls, file: str | Path, *, delimiter: str = ",", **how: Unpack[TableArguments]) -> ClientData:
        """From a CSV file: UTF-8, the first line names the columns.

        Args:
            file: relative to the current folder, as everywhere in Python.
            delimiter: between cells.
            y: the column of the labels, texts or whole numbers. A label is its position among all of them, sorted.
            x: the columns of the examples, in this order; by default all others. Their cells are finite numbers
                (float32), or see `categorical` and `encode`.
            client: the column that says whose a row is: a client for every value, sorted. Without it, the rows are
                split:
            clients, partition: into as many clients (10) by a rule of `lamina.data.PARTITIONS` ("iid").
            classes: all labels that there may be, in their order, or how many (0, 1, ...). Parties that read files of
                their own must agree on it.
            regression: y is no label but a number, or `y` a list of such columns: float32 [n, columns of y].
            categorical: columns of x that hold texts: each becomes a column of 0 and 1 for every text, sorted.
            standardise: every column of x has mean 0 and deviation 1 over all training examples, of all clients: in a
                real federation they would have to agree on these two numbers.
            encode: makes the examples of one column x, such as a text: called with the list of its values, it gives an
                array with a row for each, of the dtype that the model takes.
            size: (height, width) that images are scaled to.
            test: a file of test examples, with the same columns; that of the clients may be missing.
            test_share: instead of it: of every client's examples, rounded, drawn at random.
            client_tests: a client's examples among those of the test are its own test set too.
            seed: of the split and of the draw.
            transform: as for `ClientData`; for images by default `Images` with mean 0 and std 1.
            name: of the data set; by default the file's.

        Raises:
            ConfigError: arguments that do not fit together, an impossible partition or share.
            DataError: E210 to E224, with file and line.
        """
        read = csv_table.by(delimiter)
        return cls.from_index(**parts(read, file, reading("from_csv", how), name=Path(file).stem))

    @classmethod
    def from_parquet(cls, file: str | Path, **how: Unpack[TableArguments]) -> ClientData:
        """From a parquet file, by pyarrow (extra `parquet`): arguments and errors as `from_csv`; rows count from 0.

        A column of x that holds lists of equal length is taken alone: x="pixels".
        """
        return cls.from_index(**parts(parquet.read, file, reading("from_parquet", how), name=Path(file).stem))

    @classmethod
    def from_hf(
        cls, dataset: Any, *, column: str | None = None, split: str = "train", **how: Unpack[TableArguments]
    ) -> ClientData:
        """From a data set of Hugging Face (extra `hf`): arguments and errors as `from_csv`, and

        Args:
            dataset: a `Dataset` or a `DatasetDict` of the package `datasets`; the folder of a saved one; or its name on
                the Hub, from where it is fetched unless LAMINA_OFFLINE is set.
            column: that says whose a row is, as `client` elsewhere.
            split: of a DatasetDict, for training.
            test: another split of it, or a Dataset.
        """
        asked = reading("from_hf", {"client": column, **how})
        return cls.from_index(**hugging_face.parts_of(dataset, split, asked))

    @classmethod
    def from_folders(cls, folders: str | Path, **how: Unpack[TableArguments]) -> ClientData:
        """From a folder or a file for each client, which gives the client its name: `from_folders("data/*/")`.

        A client's folder holds

        - a folder of images for each class, by Pillow (extra `demo`): uint8 [n, H, W, C], grey where all are, or
        - files .npz or .safetensors with arrays `x` and `y`, which keep their dtype (float64 becomes float32), or
        - files .csv or .parquet, which need `y=`;

        and `from_folders("data/*.csv", y="label")` takes a file for each client. Hidden files and others are left out.
        Nothing that is pickled is read.

        Args:
            folders: a pattern, or the folder in which the clients' lie.
            x, y: names of the arrays or columns, see `from_csv`.
            test: a folder (or file) like that of one client.
            **how: the other arguments of `from_csv`.

        Raises:
            ConfigError, DataError: as `from_csv`.
        """
        return cls.from_index(**client_folders.parts_of(folders, how))

    @classmethod
    def from_index(
        cls,
        x: Any,
        y: Any,
        groups: Mapping[str, Any],
        *,
        test: Any = None,
        client_tests: Mapping[str, tuple[Any, Any]] | None = None,
        transform: Transform | None = None,
        name: str = "custom",
        partition: str = "given",
        label_names: Sequence[str] | None = None,
    ) -> ClientData:
        """From one data set and, by client name, the indices of the examples that each holds (kept in their order).

        x and y are used without a copy.

        Raises:
            DataError: E210 to E218, E224.
        """
        x, y = _pair((x, y), "train")
        parts = [_tensor(held, f"client {key!r}: indices").reshape(-1) for key, held in groups.items()]
        wrong = [key for key, part in zip(groups, parts, strict=True) if part.numel() and part.is_floating_point()]
        if wrong:
            raise DataError("indices that are not integers", code="E217", where=f"client {wrong[0]!r}")
        return cls(
            x,
            y,
            tuple(str(key) for key in groups),
            *_csr([part.to(torch.int64) for part in parts]),
            test=None if test is None else _read(test, "test")[:2],
            client_tests=_tests(client_tests),
            transform=transform or Identity(),
            name=name,
            partition=partition,
            label_names=_named(label_names),
        )

    def _sets(self) -> list[tuple[str, Batch, Batch]]:
        tests = [] if self.test is None else [("test", *self.test)]
        own = [(f"test of client {name!r}", *pair) for name, pair in (self.client_tests or {}).items()]
        train = [("train", self.x, self.y)] if self.counts is None or len(self.indices) else []
        return [*train, *tests, *own]

    def _check_form(self) -> None:
        if not self.names:
            raise _no_clients()
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise DataError("two clients of one name", code="E213", where=f"client {twice!r}", remedy="rename one")
        unknown = sorted(set(self.client_tests or {}) - set(self.names))
        if unknown:
            raise DataError(
                f"client_tests names {unknown[0]!r}, which is no client",
                code="E213",
                remedy=f"names are {', '.join(self.names[:5])}{', ...' if len(self) > 5 else ''}",
            )
        length = _length(self.x)
        sizes = self.offsets.diff()
        if len(sizes) != len(self) or int(self.offsets[0]) != 0 or int(self.offsets[-1]) != len(self.indices):
            raise DataError(
                f"offsets of {len(self.offsets)} for {len(self)} clients and {len(self.indices)} indices",
                code="E217",
                remedy="offsets has one more entry than there are clients, from 0 to the number of indices",
            )
        empty = [self.names[i] for i in (sizes <= 0).nonzero().view(-1).tolist()]
        if empty and self.counts is None:
            raise _empty_clients(empty, len(self))
        outside = ((self.indices < 0) | (self.indices >= length)).nonzero().view(-1)
        if len(outside):
            place = int(outside[0])
            raise DataError(
                f"index {int(self.indices[place])}: expected 0 <= index < {length}, the number of examples",
                code="E217",
                where=f"client {self._holder(place)!r}",
            )

    def _holder(self, place: int) -> str:
        """Name of the client at this place of `indices`."""
        return self.names[int(torch.searchsorted(self.offsets, place, right=True)) - 1]

    def _check_values(self, x: Batch, y: Batch, where: str) -> None:
        for label, part in (("x", x), ("y", y)):
            for entry, values in _entries(part):
                row = _first_not_finite(values)
                if row is not None:
                    raise DataError(
                        f"{label}{entry} of example {row} is not finite",
                        code="E214",
                        where=self._owner(where, row),
                        remedy="drop or repair the examples that hold NaN or infinity",
                    )
        if isinstance(y, Tensor) and _is_labels(y):
            _check_labels(y, where, self._owner)

    def _owner(self, where: str, row: int) -> str:
        """`train` becomes the client that holds the example, with the place of the example among its own."""
        if where != "train":
            return where
        held = (self.indices == row).nonzero().view(-1)
        if not len(held):
            return "train, held by no client"
        name = self._holder(int(held[0]))
        return f"client {name!r}, its example {int(held[0] - self.offsets[self.names.index(name)])}"


# ---- reading


def _read(source: Any, where: str) -> tuple[Batch, Batch, bool]:
    """(x, y, whether x came as Pillow images)."""
    if isinstance(source, TensorDataset):
        source = source.tensors
    if isinstance(source, tuple):
        return *_pair(source, where), False
    if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
        raise DataError(
            f"{type(source).__name__}: expected (x, y) or a Dataset with len() and [i]",
            code="E218",
            where=where,
            remedy="read an iterable data set into two tensors first",
        )
    if len(source) == 0:
        raise DataError("a data set without examples", code="E211", where=where)
    pictures = False
    stores: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    plain = [True, True]
    for i in range(len(source)):
        item = source[i]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(f"item {i} is no pair (x, y)", code="E218", where=where)
        for side, (store, value) in enumerate(zip(stores, item, strict=True)):
            plain[side] = not isinstance(value, Mapping)
            values = {"": value} if plain[side] else dict(value)
            if i == 0:
                pictures |= side == 0 and _is_picture(value)
            elif values.keys() != store.keys():
                raise DataError(
                    f"item {i} has the entries {sorted(values)}, item 0 {sorted(store)}", code="E215", where=where
                )
            for key, one in values.items():
                tensor = _item(one, f"{where}: item {i}")
                if i == 0:
                    store[key] = tensor.new_empty((len(source), *tensor.shape))
                if tensor.dtype != store[key].dtype or tensor.shape != store[key].shape[1:]:
                    raise DataError(
                        f"item {i} is {tensor.dtype} {list(tensor.shape)}, "
                        f"item 0 {store[key].dtype} {list(store[key].shape[1:])}",
                        code="E215",
                        where=where,
                        remedy="bring all examples to one shape and dtype",
                    )
                store[key][i] = tensor
    x, y = (store[""] if alone else store for store, alone in zip(stores, plain, strict=True))
    return x, _as_labels(y), pictures


def _item(value: Any, where: str) -> Tensor:
    """One x or y of a Dataset."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool | int):
        return torch.tensor(int(value))
    if isinstance(value, float):
        return torch.tensor(value)
    if _is_picture(value):
        if value.mode in ("1", "P", "PA"):
            value = value.convert("L" if value.mode == "1" else "RGB")
        pixels = np.array(value)
        if pixels.dtype != np.uint8:
            raise DataError(f"an image of mode {value.mode}: expected 8 bits", code="E218", where=where)
        return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None])
    return _tensor(value, where)


def _is_picture(value: Any) -> bool:
    return hasattr(value, "getbands") and hasattr(value, "convert")


def _pair(value: Any, where: str) -> tuple[Batch, Batch]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise DataError(f"{type(value).__name__}: expected a pair (x, y)", code="E218", where=where)
    return _batch(value[0], f"{where}: x"), _as_labels(_batch(value[1], f"{where}: y"))


def _tests(tests: Mapping[str, tuple[Any, Any]] | None) -> dict[str, tuple[Batch, Batch]] | None:
    return (
        None if tests is None else {str(key): _pair(value, f"test of client {key!r}") for key, value in tests.items()}
    )


def _named(label_names: Sequence[str] | None) -> tuple[str, ...] | None:
    expect(not isinstance(label_names, str), f"label_names={label_names!r}: expected a list of names")
    return None if label_names is None else tuple(map(str, label_names))


def _batch(value: Any, where: str) -> Batch:
    if isinstance(value, Mapping):
        return {str(key): _tensor(entry, f"{where}[{key!r}]") for key, entry in value.items()}
    return _tensor(value, where)


def _tensor(value: Any, where: str) -> Tensor:
    """On the CPU and, where possible, over the same memory."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:
        array = np.asarray(value)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if any(stride < 0 for stride in array.strides):
            array = np.ascontiguousarray(array)
        if isinstance(value, list) and array.dtype == np.float64:
            array = array.astype(np.float32)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)  # nobody writes into it
            return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{type(value).__name__} is not to be read as a tensor: {error}",
            code="E218",
            where=where,
            remedy="give a tensor or a numpy array of numbers",
        ) from error


def _as_labels(y: Batch) -> Batch:
    return y.to(torch.int64) if isinstance(y, Tensor) and _is_labels(y) else y


def _is_labels(y: Tensor) -> bool:
    return y.ndim == 1 and not y.is_floating_point() and not y.is_complex() and y.dtype != torch.bool


def _attribute(dataset: Any, name: str) -> dict[str, Sequence[Any]]:
    """A column that a Dataset carries as an attribute, itself or the one that it is a Subset of."""
    if isinstance(dataset, Subset):
        found = _attribute(dataset.dataset, name)
        return {name: [found[name][i] for i in dataset.indices]} if found else {}
    values: Any = getattr(dataset, name, None)
    return {name: values} if hasattr(values, "__len__") and hasattr(values, "__getitem__") else {}


def _by_column(
    column: str, columns: Mapping[str, Sequence[Any]], clients: int | None, length: int
) -> tuple[list[str], list[Tensor]]:
    where = f"column:{column}"
    if column not in columns:
        raise ConfigError(
            f"no column {column!r}: known are {sorted(columns) or 'none'}",
            where=where,
            remedy=f"pass columns={{{column!r}: values}}, or a Dataset with an attribute {column!r}",
        )
    values = np.asarray(columns[column])
    if values.shape != (length,):
        raise DataError(f"{values.shape} values for {length} examples", code="E212", where=where)
    missing = [i for i, value in enumerate(values.tolist()) if value is None or value != value]
    if missing:
        raise DataError(
            f"{len(missing)} examples have no value, the first is {missing[0]}",
            code="E218",
            where=where,
            remedy="drop them or name the gap",
        )
    if values.dtype == object and len({type(value) for value in values.tolist()}) > 1:
        values = values.astype(str)
    unique, inverse = np.unique(values, return_inverse=True)
    if clients is not None and clients != len(unique):
        raise ConfigError(f"clients={clients}: the column has {len(unique)} values", where=where, remedy="clients=None")
    order = torch.from_numpy(np.argsort(inverse, kind="stable"))
    return [str(value) for value in unique.tolist()], list(torch.split(order, np.bincount(inverse).tolist()))


# ---- batches


def _entries(batch: Batch) -> list[tuple[str, Tensor]]:
    return [("", batch)] if isinstance(batch, Tensor) else [(f"[{key!r}]", value) for key, value in batch.items()]


def _length(batch: Batch) -> int:
    return 0 if not _entries(batch) or _entries(batch)[0][1].ndim == 0 else len(_entries(batch)[0][1])


def _layout(batch: Batch) -> list[tuple[str, str, list[int]]]:
    """(entry, dtype, shape of one example), by entry."""
    return sorted((key, str(value.dtype), list(value.shape[1:])) for key, value in _entries(batch))


def _select(batch: Batch, indices: Tensor) -> Batch:
    if isinstance(batch, Tensor):
        return batch.index_select(0, indices)
    return {key: value.index_select(0, indices) for key, value in batch.items()}


def _concatenate(batches: list[Batch]) -> Batch:
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat([batch for batch in batches if isinstance(batch, Tensor)])
    return {key: torch.cat([batch[key] for batch in batches if isinstance(batch, dict)]) for key in first}


def _csr(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    offsets = np.cumsum([0, *(len(part) for part in parts)])
    return torch.from_numpy(offsets.astype(np.int64)), torch.cat(list(parts)) if parts else torch.empty(
        0, dtype=torch.int64
    )


# ---- checks


def _no_clients() -> DataError:
    return DataError("no clients", code="E210", remedy="give at least one client")


def _empty_clients(empty: list[str], clients: int) -> DataError:
    shown = ", ".join(repr(key) for key in empty[:10]) + (", ..." if len(empty) > 10 else "")
    return DataError(
        f"{len(empty)} of {clients} clients have no examples: {shown}",
        code="E211",
        where=f"client {empty[0]!r}",
        remedy="leave them out, or make fewer clients",
    )


def _check_pair(x: Batch, y: Batch, where: str) -> None:
    lengths = {f"{side}{key}": _length(value) for side, part in (("x", x), ("y", y)) for key, value in _entries(part)}
    if len(set(lengths.values())) != 1:
        shown = ", ".join(f"{key}: {length}" for key, length in lengths.items())
        raise DataError(
            f"x and y of different lengths ({shown})",
            code="E212",
            where=where,
            remedy="the first axis of all of them is the examples",
        )
    if _length(x) == 0:
        raise DataError("no examples", code="E211", where=where, remedy="leave it out")


def _check_alike(part: Batch, model: Batch, where: str) -> None:
    if _layout(part) != _layout(model):
        raise DataError(
            f"an example is {_layout_text(part)}, elsewhere {_layout_text(model)}",
            code="E215",
            where=where,
            remedy="bring all examples to one shape and dtype",
        )


def _layout_text(batch: Batch) -> str:
    return ", ".join(f"{key}{' ' if key else ''}{dtype} {shape}" for key, dtype, shape in _layout(batch))


def _check_labels(y: Tensor, where: str, owner: Any = None) -> None:
    if int(y.min()) < 0:
        row = int((y < 0).nonzero()[0])
        raise DataError(
            f"label {int(y[row])} of example {row}: expected labels from 0",
            code="E216",
            where=owner(where, row) if owner else where,
            remedy="renumber the labels from 0 or drop those examples",
        )


def _first_not_finite(values: Tensor) -> int | None:
    if not (values.is_floating_point() or values.is_complex()):
        return None
    rows = max(1, CHUNK // max(1, values[0].numel()))
    for begin, chunk in zip(range(0, len(values), rows), torch.split(values, rows), strict=True):
        if not bool(chunk.isfinite().all()):
            return begin + int((~chunk.isfinite()).reshape(len(chunk), -1).any(1).nonzero()[0])
    return None
