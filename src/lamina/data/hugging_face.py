"""Data sets of Hugging Face as tables, by their package `datasets` (extra `hf`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lamina.data.parts import Parts, parts
from lamina.data.reading import Reading
from lamina.data.tables import Choose, Table, listed, no_file
from lamina.errors import ConfigError, DataError


def opened(source: Any, part: str | None) -> Any:
    """The `Dataset` that is meant: one that is given, one saved in a folder, or one of the Hub by its name.

    Raises:
        ConfigError: E101 a split that there is not.
        DataError: E219 without the package, E221 it cannot be had.
    """
    if isinstance(source, str | Path):
        source = _loaded(str(source))
    if isinstance(source, dict):  # a DatasetDict is one
        if part not in source:
            raise ConfigError(f"split={part!r}: expected one of {listed([*source])}", where="from_hf")
        source = source[part]
    if not hasattr(source, "column_names") or not hasattr(source, "with_format"):
        raise DataError(
            f"{type(source).__name__}: expected a Dataset or a DatasetDict",
            code="E218",
            where="from_hf",
            remedy="an IterableDataset is read with Dataset.from_list([*it]) first",
        )
    return source


def _table(dataset: Any, title: str, choose: Choose) -> Table:
    wanted = choose(dataset.column_names)
    plain, features = dataset.with_format(None), dataset.features
    columns = {name: list(plain[name]) for name in wanted}
    called = {name: features[name].names for name in wanted if hasattr(features[name], "names")}
    known = {name: [str(i) for i in range(len(them))] for name, them in called.items()}  # positions among the names
    return Table(title, columns, len(dataset), lambda row: f"{title}, row {row}", known, called=called)


def parts_of(dataset: Any, part: str, how: Reading) -> Parts:
    """What `ClientData.from_index` takes. A test set that is named is another split, or a folder of its own."""
    source = _loaded(str(dataset)) if isinstance(dataset, str | Path) else dataset
    title = str(dataset) if isinstance(dataset, str | Path) else "dataset"

    def read(which: Any, choose: Choose) -> Table:
        if which is source:
            return _table(opened(source, part), f"{title}[{part}]", choose)
        if isinstance(which, str) and isinstance(source, dict):
            return _table(opened(source, which), f"{title}[{which}]", choose)
        return _table(opened(which, "test"), str(which) if isinstance(which, str | Path) else "test", choose)

    return parts(read, source, how, name=Path(title).name)


def _loaded(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "data sets of Hugging Face are read by their package, which is not installed",
            code="E219",
            where=name,
            remedy="pip install 'lamina[hf]'",
        ) from error
    if Path(name).is_dir():
        try:
            return datasets.load_from_disk(name)
        except (FileNotFoundError, ValueError) as error:
            raise no_file(name, f"no saved data set: {error}") from error
    if os.environ.get("LAMINA_OFFLINE", "") not in ("", "0"):
        raise DataError(
            f"{name}: no such folder, and the Hub is not asked: LAMINA_OFFLINE is set",
            code="E221",
            where=name,
            remedy="Dataset.save_to_disk makes a folder that is read without a network",
        )
    try:
        return datasets.load_dataset(name)
    except Exception as error:  # of the network, the Hub or a file in it
        raise DataError(f"{name} cannot be had: {type(error).__name__}: {error}", code="E221", where=name) from error
