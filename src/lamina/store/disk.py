"""Rows on disk: an append-only log in segment files, of which a store's entries are the index.

    PATH/store.json             version, id, the model's form, the classes of a row
    PATH/checkpoints.json       checkpoint -> {segment: bytes of it that its rows are in}
    PATH/rows-000001.log ...    segments, see `segment`
    PATH/.lock                  held by the process that writes

A row is never changed, so old states stay good. A segment goes when no checkpoint and no store of this process refers
to it. A process appends to its own segments only; what was not checkpointed before a crash is nobody's, and goes too.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from torch import Tensor

from lamina import lock
from lamina.errors import StorageError
from lamina.store.clients import Row
from lamina.store.entries import Entries, Entry
from lamina.store.files import replace, sealed, storing, unsealed
from lamina.store.form import Form, classes, form_from, form_of, packed, unpacked
from lamina.store.segment import HEAD, Segment, damaged, named, verify
from lamina.tree import flatten, skeleton, unflatten

_VERSION = 1
SEGMENT = 64 << 20  # bytes after which the next segment is begun
CACHE = 64 << 20  # bytes of rows kept in memory
AHEAD = 256 << 20  # bytes of rows that the system is asked to read ahead
OBJECT = 1024  # bytes that Python needs for a row, and for each tensor in it, beside the values


class Place(NamedTuple):
    """Where a row lies. It keeps the segment alive."""

    segment: Segment
    offset: int
    checksum: int
    form: Form


class Disk:
    """The shelf at a path. Made by `on_disk`.

    Args:
        mine: what it is for, see `purpose`.
        like: a row, for its classes.
        names: of the clients, for messages.

    Raises:
        StorageError: E404 when what checkpoints need is damaged, E405 when it is of another model or method. Nothing is
            written before a run begins.
    """

    shares = False  # a row says whose it is

    def __init__(self, path: Path, mine: Mapping[str, Any], like: Row, names: tuple[str, ...]):
        self.path = path
        self._mine = mine
        self._like = like
        self._names = names
        self._forms: dict[str, Form] = {}
        self._segments: WeakValueDictionary[int, Segment] = WeakValueDictionary()  # those that somebody refers to
        self._open: Segment | None = None
        self._lock: int | None = None  # handle of the locked file, in the process that writes
        self._cache: OrderedDict[tuple[int, int, int], tuple[Row, int]] = OrderedDict()
        self._cached = 0
        self.look()

    def __del__(self) -> None:
        self._let_go()

    # ---- whose it is

    def look(self) -> None:
        """Reads all that checkpoints need. Raises StorageError E404 or E405."""
        self._expect()
        for number, end in sorted(self._ends().items()):
            self._verify(number, end)

    def _verify(self, number: int, end: int) -> None:
        try:
            verify(self._file(number), end, self._names)
        except StorageError:
            now = self._ends()[number]  # the process that writes may have let go of a checkpoint meanwhile
            if now >= end:
                raise
            if now:
                self._verify(number, now)

    def _expect(self) -> str:
        """The id of the store at the path, "" for none yet. Raises StorageError E404 or E405 unless what is there, if
        anything, is for this model and method."""
        if not self.path.exists():
            return ""
        if not self.path.is_dir():
            raise self._refusal("a file is where a folder should be", "E401")
        place = self.path / "store.json"
        found = sorted(path.name for path in self.path.iterdir() if not path.name.startswith("."))
        if place.name not in found:
            if any(name.endswith(".log") for name in found):
                raise damaged(place, "it is missing")
            others = [name for name in found if name != "checkpoints.json"]  # which is written first
            if others:
                raise self._refusal(f"the folder holds something else: {others[0]}", "E405")
            return ""
        theirs, mine = unsealed(place, "version"), self._mine
        if theirs["version"] != _VERSION:
            raise self._refusal(f"it has version {theirs['version']}, this lamina reads {_VERSION}", "E405")
        before, after = theirs["model"], mine["model"]
        if before != after:
            odd = next(name for name in {**after, **before} if before.get(name) != after.get(name))
            raise self._refusal(
                f"it is of another model: {odd} is {before.get(odd, 'absent')}, here {after.get(odd, 'absent')}", "E405"
            )
        if theirs["row"] != mine["row"]:
            raise self._refusal(
                "it is of another method: what its clients remember between rounds is not what this run's method has "
                "them remember", "E405",
            )  # fmt: skip
        name: str = theirs["id"]
        return name

    def begin(self) -> None:
        """Raises StorageError: E402 when checkpoints of another run need what is here, E406 when another process is."""
        self.claim()
        pins = self._pins()
        holder = next((path for key in pins if (path := self._holder(key)).exists()), None)
        if holder is not None:
            raise self._refusal(
                f"it holds the clients' states of another run, which its checkpoint {holder} needs", "E402",
                f"go on with that run (resume), give this one another path, or delete {holder.parent} and {self.path}",
            )  # fmt: skip
        if pins:
            with storing(self.path):
                self._write_pins({})

    def claim(self) -> None:
        """For writing: one process at a time, until this shelf is let go of. What is at the path may have been deleted,
        or put back from a copy, since it was claimed before. Raises StorageError E401, E404, E405, E406."""
        self._expect()
        self._open = None  # the file that it writes to may be nowhere any more
        with storing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            try:
                self._expect()  # somebody may have been faster
                if not (self.path / "store.json").exists():
                    self._write_pins({})
                    replace(self.path / "store.json", sealed({**self._mine, "id": secrets.token_hex(8)}))
            except BaseException:
                self._let_go()
                raise

    def _take_lock(self) -> None:
        place = self.path / ".lock"
        if self._lock is not None and place.exists() and os.path.samestat(os.fstat(self._lock), place.stat()):
            return
        self._let_go()
        taken = lock.take(place)
        if isinstance(taken, dict):
            raise self._refusal(
                "another process is at it, or has not let go of the Federation that wrote to it", "E406",
                "wait until that process has ended, or end it, or give this run another path",
            )  # fmt: skip
        self._lock = taken

    def _let_go(self) -> None:
        if self._lock is not None:
            lock.give_back(self._lock)
            self._lock = None

    def _refusal(self, message: str, code: str, remedy: str | None = None) -> StorageError:
        return StorageError(
            f"store 'disk:{self.path}': {message}",
            code=code,
            where="store",
            remedy=remedy or "give this run a path of its own: nothing there was changed",
        )

    # ---- rows

    def put(self, client: int, accepted: int, row: Row) -> Place:
        leaves: dict[str, Tensor] = flatten(row)
        made = form_of(skeleton(row), [(name, x.dtype, tuple(x.shape)) for name, x in leaves.items()])
        form = self._forms.setdefault(json.dumps(made), made)
        return self._append(client, accepted, packed(form, leaves), form)

    def get(self, client: int, place: Place) -> Row:
        segment, offset, checksum, form = place
        key = (_number(segment.path), offset, checksum)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key][0]
        body = segment.read(client, offset, form.size, checksum, named(client, self._names))
        row: Row = unflatten(self._like, form.skeleton, dict(unpacked(form, body)))
        cost = form.size + OBJECT * (1 + len(form.leaves))
        self._cache[key] = row, cost
        self._cached += cost
        while self._cached > CACHE:
            _, (_, cost) = self._cache.popitem(last=False)
            self._cached -= cost
        return row

    def will_need(self, places: Iterable[Place]) -> None:
        asked = 0
        with contextlib.suppress(OSError):  # whoever reads them will say what is wrong
            for segment, offset, _, form in places:
                asked += form.size
                if asked > AHEAD:
                    break
                segment.will_need(offset, form.size)

    def tally(self, before: Counter[Segment] | None, gone: Iterable[Place], come: Iterable[Place]) -> Counter[Segment]:
        """Bytes of each segment that are needed."""
        used = Counter(before or {})
        for place in come:
            used[place.segment] += HEAD + place.form.size
        for place in gone:
            used[place.segment] -= HEAD + place.form.size
        return +used

    def moved(self, tally: Counter[Segment], entries: Entries) -> dict[int, Entry]:
        """Rows in segments of which more than half is needed no more are moved on, so that the segments can go."""
        sparse = {segment for segment, n in tally.items() if 2 * n < segment.size and segment is not self._open}
        if not sparse:
            return {}
        old = {c: entry for c, entry in entries.items() if entry.place is not None and entry.place.segment in sparse}
        return {c: entry._replace(place=self._moved(c, entry)) for c, entry in old.items()}

    def _moved(self, client: int, entry: Entry) -> Place:
        segment, offset, checksum, form = entry.place
        body = segment.read(client, offset, form.size, checksum, named(client, self._names))
        return self._append(client, entry.accepted, body, form)

    def _append(self, client: int, accepted: int, body: Tensor, form: Form) -> Place:
        if self._lock is None:
            self.claim()
        with storing(self.path):
            if self._open is None or self._open.size >= SEGMENT:
                self._begin_segment()
            assert self._open is not None  # just begun
            try:
                offset, checksum = self._open.append(client, accepted, body)
            except OSError:
                self._open = None  # nothing is written behind half a row
                raise
        return Place(self._open, offset, checksum, form)

    # ---- segments

    def _file(self, number: int) -> Path:
        return self.path / f"rows-{number:06d}.log"

    def _begin_segment(self) -> None:
        if self._open is not None:
            self._open.close()
        self._sweep()
        number = max([*map(_number, self.path.glob("rows-*.log")), *self._segments], default=0) + 1
        self._open = Segment.begun(self._file(number))
        self._segments[number] = self._open

    def _segment(self, number: int) -> Segment:
        found = self._segments.get(number)
        if found is None:
            found = self._segments[number] = Segment(self._file(number), 0)
        if found is not self._open:
            found.look()
        return found

    def _sweep(self) -> None:
        """Deletes the segments that neither a checkpoint nor a store in this process refers to."""
        pinned = self._ends()
        for path in self.path.glob("rows-*.log"):
            if _number(path) not in pinned and _number(path) not in self._segments:
                path.unlink()

    # ---- checkpoints

    def pin(self, holder: Path, places: Iterable[Place]) -> None:
        if self._lock is None:
            self.claim()
        ends: dict[Segment, int] = {}
        for segment, offset, _, form in places:
            ends[segment] = max(offset + HEAD + form.size, ends.get(segment, 0))
        for segment in ends:
            segment.sync()
        needed = Counter({_number(segment.path): end for segment, end in ends.items()})
        pins = self._pins()
        key = self._key(holder)
        pins[key] = dict(needed | Counter(pins.get(key, {})))  # what was there before counts until it is replaced
        self._write_pins(pins)

    def unpin(self, folder: Path) -> None:
        if self._lock is None:
            return
        pins, own = self._pins(), folder.resolve()
        kept = {k: v for k, v in pins.items() if self._holder(k).parent != own or self._holder(k).exists()}
        if kept != pins:
            self._write_pins(kept)
        self._sweep()

    def _key(self, holder: Path) -> str:
        """Relative to the store, so that both can be moved together."""
        try:
            return Path(os.path.relpath(holder.resolve(), self.path)).as_posix()
        except ValueError:  # another drive
            return holder.resolve().as_posix()

    def _holder(self, key: str) -> Path:
        return Path(os.path.normpath(self.path / key))

    def _pins(self) -> dict[str, dict[int, int]]:
        """What checkpoints need: path of each -> segment -> bytes of it."""
        place = self.path / "checkpoints.json"
        if not place.exists() and not (self.path / "store.json").exists():
            return {}
        pins = unsealed(place, "checkpoints")["checkpoints"]
        return {key: {int(n): end for n, end in ends.items()} for key, ends in pins.items()}

    def _ends(self) -> Counter[int]:
        """How much of each segment some checkpoint needs."""
        ends: Counter[int] = Counter()
        for needed in self._pins().values():
            ends |= Counter(needed)
        return ends

    def _write_pins(self, pins: Mapping[str, Mapping[int, int]]) -> None:
        replace(self.path / "checkpoints.json", sealed({"checkpoints": pins}))

    def document(self, clients: Mapping[int, Place | None]) -> dict[str, Any]:
        """Where these clients' rows are, as plain JSON."""
        forms: dict[int, int] = {}  # id of a form -> its position
        listed: list[Form] = []
        places: dict[str, Any] = {}
        for client, place in clients.items():
            if place is None:
                places[str(client)] = None
                continue
            segment, offset, checksum, form = place
            if id(form) not in forms:
                forms[id(form)] = len(listed)
                listed.append(form)
            places[str(client)] = [_number(segment.path), offset, form.size, checksum, forms[id(form)]]
        return {"id": self._expect(), "forms": [[form.skeleton, form.leaves] for form in listed], "places": places}

    def places(self, document: Mapping[str, Any]) -> dict[int, Place | None]:
        """Inverse of `document`. Raises StorageError: E405 for that of another store, E404 when rows are missing."""
        if document["id"] != self._expect():
            remedy = "give the path that the run had; a relative one starts at the working directory"
            raise self._refusal("the checkpoint belongs to another store", "E405", remedy)
        forms = [form_from(form) for form in document["forms"]]
        found: dict[int, Place | None] = {}
        for client, place in document["places"].items():
            found[int(client)] = None
            if place is not None:
                number, offset, length, checksum, form = place
                segment = self._segment(number)
                if offset + HEAD + length > segment.size:
                    raise damaged(segment.path, f"the row of {named(int(client), self._names)} is missing")
                found[int(client)] = Place(segment, offset, checksum, forms[form])
        return found


_shelves: WeakValueDictionary[tuple[Path, str], Disk] = WeakValueDictionary()  # of this process


def on_disk(path: str | Path, model: Mapping[str, Tensor], like: Row, names: tuple[str, ...]) -> Disk:
    """The shelf at this path, which is relative to the working directory, for this model. See `Disk`.

    In a process there is one for all federations of the same purpose, so that none deletes what a state of another
    refers to. One of another purpose cannot write there: the folder is for this one as soon as anything is in it.
    """
    place = Path(path).expanduser().resolve()
    mine = purpose(model, like)
    key = (place, json.dumps(mine, sort_keys=True))
    found = _shelves.get(key)
    if found is None:
        found = _shelves[key] = Disk(place, mine, like, names)
    else:
        found.look()
    return found


def purpose(model: Mapping[str, Tensor], like: Row) -> dict[str, Any]:
    """What a store is for: a model, and a method by the classes of its rows."""
    form = {name: f"{tuple(x.shape)} {x.dtype}" for name, x in model.items()}
    return {"version": _VERSION, "model": form, "row": classes(like)}


def _number(path: Path) -> int:
    return int(path.stem.partition("-")[2])
