"""A folder or a file for each client: images in a folder per class, arrays, or tables."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lamina.data import csv_table, parquet
from lamina.data.parts import Parts, parts
from lamina.data.pictures import SUFFIXES
from lamina.data.reading import reading
from lamina.data.tables import Choose, Table, joined, listed, no_file
from lamina.errors import DataError, expect

_WAYS = (
    "a client's folder holds a folder of images per class, or files .npz or .safetensors with x and y, .csv or .parquet"
)


def parts_of(folders: str | Path, how: Mapping[str, Any]) -> Parts:
    """What `ClientData.from_index` takes, of the folders and files that a pattern finds."""
    who = "from_folders"
    for key in ("client", "clients", "partition"):
        expect(key not in how, f"{key}={how.get(key)!r}: the folders are the clients", where=who)
    clients = _clients(folders)
    kinds = {kind: path for _, path in clients for kind in _kinds(path)}
    if len(kinds) > 1:
        (one, first), (two, second) = [*kinds.items()][:2]
        message = f"{first} holds {one}, {second} {two}: expected one kind"
        raise DataError(message, code="E218", where=str(folders), remedy=_WAYS)
    kind = next(iter(kinds))
    owners: list[str] = []

    def read(source: Any, choose: Choose) -> Table:
        trains = source is folders
        tables = []
        for name, path in clients if trains else [("", Path(source))]:
            if not trains and kind not in _kinds(path):
                raise DataError(f"no {kind} here", code="E218", where=str(path), remedy=f"clients have {kind}")
            found = _read(kind, path, choose)
            tables += found
            owners.extend([name] * sum(table.rows for table in found) if trains else [])
            if not sum(table.rows for table in found):
                raise DataError("no examples", code="E211", where=str(path), remedy="leave it out")
        return joined(str(source), tables)

    if kind == "images":
        for key in ("x", "y"):
            expect(key not in how, f"{key}={how.get(key)!r}: these folders hold images, not columns", where=who)
        fixed = {"x": "image", "y": "class"}
    else:
        fixed = {"x": "x", "y": "y"} if kind in ("npz", "safetensors") else {}
    root, _ = _fixed(folders)
    return parts(read, folders, reading(who, {**fixed, **how}), name=root.name or "folders", owners=lambda: owners)


def _fixed(folders: str | Path) -> tuple[Path, str]:
    """The folder above all clients, and the pattern of what lies below it; of a folder without one: all in it."""
    pieces = Path(folders).expanduser().parts
    fixed = next((i for i, piece in enumerate(pieces) if glob.has_magic(piece)), len(pieces))
    below = "/".join(pieces[fixed:]) or "*"
    return Path(*pieces[:fixed]), below + ("/" if str(folders).endswith("/") and fixed < len(pieces) else "")


def _clients(folders: str | Path) -> list[tuple[str, Path]]:
    """Name and path of every client, sorted. Raises DataError E210, E213, E221."""
    root, pattern = _fixed(folders)
    if not root.is_dir():
        raise no_file(root, "no such folder")
    every = sorted(root / found for found in glob.glob(pattern, root_dir=root, recursive=True))
    paths = [path for path in every if path.is_dir() or _suffix(path)]
    if not paths:
        raise DataError(f"{folders} finds no folder or file", code="E210", where="from_folders", remedy=_WAYS)
    named: dict[str, Path] = {}
    for path in paths:
        name = (path if path.is_dir() else path.with_suffix("")).relative_to(root).as_posix()
        if named.setdefault(name, path) != path:
            raise DataError(f"two clients of one name: {named[name]} and {path}", code="E213", where=f"client {name!r}")
    return [*named.items()]


def _suffix(path: Path) -> str:
    """The kind of a file that holds examples, else ""."""
    kind = path.suffix.lower().removeprefix(".")
    return kind if kind in _READERS and path.is_file() and not path.name.startswith(".") else ""


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")


def _kinds(path: Path) -> set[str]:
    """What lies in a client's folder, or what its file is. Raises DataError E211, E218, E221."""
    if not path.exists():
        raise no_file(path)
    if path.is_file():
        return {_suffix(path)} - {""}
    inside = sorted(path.iterdir())
    found = {_suffix(file) for file in inside} - {""}
    if any(file.is_dir() and not file.name.startswith(".") and any(map(_is_image, file.rglob("*"))) for file in inside):
        found.add("images")
    if not found:
        loose = next((file for file in inside if _is_image(file)), None)
        message = "nothing that can be read" if loose is None else f"{loose.name} lies in no folder that says its class"
        raise DataError(message, code="E211" if loose is None else "E218", where=str(path), remedy=_WAYS)
    return found


def _read(kind: str, path: Path, choose: Choose) -> list[Table]:
    if kind == "images":
        return [_images(path, choose)]
    files = [path] if path.is_file() else [file for file in sorted(path.iterdir()) if _suffix(file) == kind]
    return [_READERS[kind](file, choose) for file in files]


def _images(path: Path, choose: Choose) -> Table:
    """Files, and the folders of their classes."""
    choose(("image", "class"))
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
    files = [(file, folder.name) for folder in folders for file in sorted(folder.rglob("*")) if _is_image(file)]
    images, classes = [file for file, _ in files], [name for _, name in files]
    return Table(str(path), {"image": images, "class": classes}, len(files), lambda row: str(images[row]))


def _npz(path: Path, choose: Choose) -> Table:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return _arrays(path, stored.files, stored.__getitem__, choose)
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise DataError(f"not to be read as .npz: {error}", code="E218", where=str(path), remedy=_NO_OBJECTS) from error


def _safetensors(path: Path, choose: Choose) -> Table:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as stored:
            return _arrays(path, [*stored.keys()], stored.get_tensor, choose)
    except (OSError, SafetensorError, TypeError) as error:
        raise DataError(f"not to be read as .safetensors: {error}", code="E218", where=str(path)) from error


_NO_OBJECTS = "numpy.savez(file, x=..., y=...) of arrays of numbers or texts; pickled objects are never loaded"


def _arrays(path: Path, names: Sequence[str], get: Callable[[str], Any], choose: Choose) -> Table:
    columns = {name: get(name) for name in choose(names)}
    rows = {name: len(values) if values.ndim else 0 for name, values in columns.items()}
    if len({*rows.values()}) != 1:
        shown = listed([f"{name}: {n}" for name, n in rows.items()])
        raise DataError(f"arrays of different lengths ({shown})", code="E212", where=str(path))
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
        columns = {n: v.astype(np.float32) if v.dtype == np.float64 else v for n, v in columns.items()}
    return Table(str(path), columns, next(iter(rows.values())), lambda row: f"{path}, example {row}", plain=False)


_READERS: dict[str, Callable[[Path, Choose], Table]] = {
    "npz": _npz,
    "safetensors": _safetensors,
    "csv": csv_table.read,
    "parquet": parquet.read,
}
