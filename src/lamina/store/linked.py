"""Clients' rows in the files of a checkpoint: those that are new are written, the others are linked.

    clients.safetensors          the rows that this commit wrote: "12/method/residual/conv1.weight"
    clients-000007.safetensors   those that the commit of round 7 wrote, the same file as in an earlier checkpoint

Nothing is linked from the last checkpoint. So the newest two have no file together, and damage to one of them leaves
the other whole; and a row is written twice, however many commits come before its client changes it again. A file of
which less than a quarter is needed is not linked: that is written again, so that the rest can go. What is linked is
read first: a file that has been damaged meanwhile goes no further.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from lamina.store.clients import ClientStore, Kept, Row
from lamina.tree import flatten, unflatten

OWN = "clients.safetensors"
_PIECE = 1 << 20  # bytes
_FILES = 32  # linked at most; the rows of others are written again
_NAME = re.compile(r"clients(?:-(\d{6,}))?\.safetensors")

File: TypeAlias = tuple[int, str]  # round of the commit that wrote it, SHA-256


class Rows(NamedTuple):
    """How the rows of a store go into a checkpoint."""

    fresh: dict[int, Kept]  # by client: are written
    links: dict[File, Path]  # where the others are, in other checkpoints
    position: dict[int, int]  # by client: 0 for the file that is written, or the position of one of `links`, from 1

    def tensors(self) -> dict[str, Tensor]:
        """Of the file that is written."""
        return named({c: kept.row for c, kept in self.fresh.items()})

    def names(self) -> list[str]:
        """Of the files, in the checkpoint."""
        return [OWN, *(f"clients-{round:06d}.safetensors" for round, _ in self.links)]

    def link(self, folder: Path, write: Callable[[Path, bytes], Any]) -> dict[str, str]:
        """Puts the files that are not written into this folder, too; a copy where it cannot be the same file. Returns
        the SHA-256 of each by its name."""
        linked = {}
        for name, ((_, sha256), source) in zip(self.names()[1:], self.links.items(), strict=True):
            if not link(source, folder / name):
                write(folder / name, source.read_bytes())
            linked[name] = sha256
        return linked

    def note(self, round: int, sha256: str) -> None:
        """The file of this commit is there."""
        for kept in self.fresh.values():
            kept.files = (*kept.files, (round, sha256))[-2:]


def link(source: Path, target: Path) -> bool:
    """Makes it one file by two names; False where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def planned(store: ClientStore, round: int, there: Mapping[File, Path], last: Iterable[File]) -> Rows:
    """How the rows of a store in memory go into the checkpoint after so many rounds.

    Args:
        there: the files of rows of all checkpoints.
        last: those of the last checkpoint.
    """
    taken = {number for number, _ in last} | {round}
    rows = {c: kept for c, entry in store.entries() if (kept := entry.place) is not None and not kept.bare}
    found = {c: next((f for f in kept.files if f in there and f[0] not in taken), None) for c, kept in rows.items()}
    needed = Counter[File]()
    for c, file in found.items():
        if file is not None:
            needed[file] += rows[c].size
    most = needed.most_common(_FILES)
    worth = [file for file, size in most if _worth(there[file], size) and intact(there[file], file[1])]
    worth = [*{file[0]: file for file in reversed(worth)}.values()]  # of a round that was made twice, one
    positions = {file: i for i, file in enumerate(worth, 1)}
    position = {c: 0 if file is None else positions.get(file, 0) for c, file in found.items()}
    return Rows({c: rows[c] for c, at in position.items() if not at}, {file: there[file] for file in worth}, position)


def intact(path: Path, sha256: str) -> bool:
    """Whether the file can be read, and has this SHA-256."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError:
        return False
    return digest.hexdigest() == sha256


def _worth(path: Path, needed: int) -> bool:
    """Whether a quarter or more of a safetensors file is needed. Its head, which begins with its own length, does not
    count."""
    try:
        with path.open("rb") as file:
            return 4 * needed >= path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    except OSError:
        return False


def files(round: int, hashes: Mapping[str, str]) -> dict[File, str]:
    """The names of the files of rows in the checkpoint after so many rounds.

    Args:
        hashes: SHA-256 of every file of it.
    """
    matches = {name: match for name in hashes if (match := _NAME.fullmatch(name))}
    return {(int(match[1] or round), hashes[name]): name for name, match in matches.items()}


def named(rows: Mapping[int, Row]) -> dict[str, Tensor]:
    return {f"{c}/{name}": x for c, row in rows.items() for name, x in flatten(row).items()}


def written(
    listed: Mapping[int, Sequence[Any]], files: Sequence[File], load: Callable[[File], dict[str, Tensor]]
) -> dict[int, dict[str, Tensor]]:
    """The tensors of a checkpoint's rows, by client; of a row without any there is nothing.

    Args:
        listed: by client: the skeleton of its row, what the store knows of it, and the position of its file.
        load: the tensors of a file.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for position, file in enumerate(files):
        for key, x in load(file).items():
            client, _, name = key.partition("/")
            if int(client) in listed and listed[int(client)][-1] == position:
                found.setdefault(int(client), {})[name] = x
    return found


def read(
    listed: Mapping[int, Sequence[Any]], files: Sequence[File], load: Callable[[File], dict[str, Tensor]], like: Row
) -> dict[int, Kept | None]:
    """The rows themselves; for the arguments see `written`. `like` is a row, for its classes."""
    leaves = written(listed, files, load)
    bare: dict[int, Kept | None] = {}  # rows without tensors, by the id of their kind
    rows: dict[int, Kept | None] = {}
    for c, kind in listed.items():
        if c not in leaves and id(kind) in bare:
            rows[c] = bare[id(kind)]
            continue
        row = unflatten(like, kind[0], leaves.get(c, {}))
        rows[c] = None if row is None else Kept(row, (files[kind[-1]],) if c in leaves else ())
        if c not in leaves:
            bare[id(kind)] = rows[c]
    return rows
