"""A checkpoint is a State in a folder: safetensors for tensors, JSON for the rest, there whole or not at all.

    checkpoints/round-000012/{model,server,reference,clients,clients-*}.safetensors  state.json  MANIFEST.json

Everything is written into `.round-000012.tmp`, flushed to the disk, and renamed; the newest two are kept, and the best.
The manifest has the SHA-256 of every file, of the manifest of the checkpoint before, and its own: a chain. No pickle.
What an earlier checkpoint has, rows of clients and the reference of inertia, is linked from there: see `store.linked`.
With Federation(store="disk:PATH") the clients' rows are on disk already: state.json says where, instead of
clients.safetensors, and the store keeps them for as long as the checkpoint is there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lamina.books import Observed
from lamina.downlink import Change, Version
from lamina.errors import StorageError
from lamina.federation import Federation
from lamina.privacy.accountant import Made
from lamina.state import State
from lamina.store import MEMORY, ClientStore, Disk, Entry, Row, Shelf, linked
from lamina.store.files import sync
from lamina.store.linked import File, Rows
from lamina.tree import apart, flatten, sha256, skeleton, unflatten

_VERSION = 1
_COST = 0.02  # share of the time that commits may cost, when it is left to `Pace`
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MANIFEST = "MANIFEST.json"
_SUM = b', "own": "'  # then the SHA-256 of what stands before it
_REFERENCE = "reference.safetensors"
_NAMES = {"model.safetensors", "server.safetensors", "state.json"}


class Pace:
    """When the next commit is due, so that all of them together cost at most 2 % of the time since this was made. The
    first is due at once: then it is known what one costs."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._spent = 0.0
        self._last = 0.0

    def due(self) -> bool:
        return self._spent + self._last <= _COST * (time.monotonic() - self._began)

    def took(self, seconds: float) -> None:
        self._last = seconds
        self._spent += seconds


def commit(
    state: State,
    folder: Path,
    extra: Mapping[str, Any] | None = None,
    *,
    after: int | None = None,
    best: int | None = None,
) -> Path:
    """Writes the state as one more checkpoint under `folder` and returns its path.

    Args:
        extra: plain JSON kept beside it, e.g. the lengths of the run's jsonl files.
        after: rounds done at the checkpoint that this one goes on from; None: at the newest before it.
        best: rounds done at one that is kept however old it gets.

    Raises:
        StorageError: E401 when the disk is full or fails; earlier checkpoints are untouched.
    """
    final = place(folder, state.round)
    temporary = folder / f".{final.name}.tmp"
    files: dict[str, bytes] = {}
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True)
            sync(folder.parent)
        before = _before(folder, state.round, after)
        links = {"parent": _link(before), "best": None}
        if best is not None and best != state.round:
            links["best"] = _link(place(folder, best))
        state.clients.pin(final)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        rows = _planned(state, folder, before)
        files = _files(state) | ({} if rows is None else {linked.OWN: save(apart(rows.tensors()))})
        files["state.json"] = json.dumps(_document(state, rows) | {"extra": dict(extra or {})}).encode()
        hashes = _written(temporary, files, _references(folder, before))
        if rows is not None:
            rows.note(state.round, hashes[linked.OWN])
            hashes |= rows.link(temporary, _write)
        manifest = {"version": _VERSION, "round": state.round, **links, "sha256": hashes}
        _write(temporary / _MANIFEST, summed(manifest))
        sync(temporary)
        _remove(final)  # a round that is committed again after going back to before it
        temporary.rename(final)
        sync(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        needed = f"; it needs {sum(map(len, files.values()))} bytes" if files and error.errno in _FULL else ""
        raise StorageError(
            f"checkpoint of round {state.round} could not be written: {error.strerror or error}{needed}",
            code="E401",
            where=str(folder),
            remedy="free some space; earlier checkpoints are intact, so `lamina resume` goes on from the last one",
        ) from error
    kept = {final, *[place(folder, link["round"]) for link in links.values() if link is not None]}
    for path in (*folder.glob("round-*"), *folder.glob(".round-*.tmp")):  # those cut short by a crash, too
        if path not in kept:
            _remove(path)
    with contextlib.suppress(OSError):  # then rows are kept that nobody needs, until the next commit
        state.clients.shelf.unpin(folder)
    return final


def _planned(state: State, folder: Path, before: Path | None) -> Rows | None:
    """How the clients' rows go into the next checkpoint; None where they are on disk already."""
    if isinstance(state.clients.shelf, Disk):
        return None
    there: dict[File, Path] = {}
    for path in committed(folder):
        there |= {file: path / name for file, name in _files_of_rows(path).items() if (path / name).is_file()}
    return linked.planned(state.clients, state.round, there, _files_of_rows(before) if before is not None else ())


def _references(folder: Path, before: Path | None) -> dict[str, Path]:
    """The references of inertia that the next checkpoint may link, by SHA-256: none that the one before it has, so that
    damage to it leaves that one whole."""
    own = None if before is None else before / _REFERENCE
    found: dict[str, Path] = {}
    for path in committed(folder):
        found_sum, file = (_manifest(path) or {"sha256": {}})["sha256"].get(_REFERENCE), path / _REFERENCE
        if found_sum and file.is_file() and not (own and own.is_file() and own.samefile(file)):
            found[found_sum] = file
    return found


def _files_of_rows(path: Path) -> dict[File, str]:
    hashes = (_manifest(path) or {"sha256": {}})["sha256"]
    return linked.files(int(path.name.rpartition("-")[2]), hashes)


def _remove(path: Path) -> None:
    """Without its manifest it is no checkpoint any more, so one that goes is never seen half gone."""
    with contextlib.suppress(OSError):
        (path / _MANIFEST).unlink()
    shutil.rmtree(path, ignore_errors=True)


def place(folder: Path, done: int) -> Path:
    """Where the checkpoint after so many rounds is."""
    return folder / f"round-{done:06d}"


def _before(folder: Path, done: int, after: int | None) -> Path | None:
    """The checkpoint that the one after so many rounds goes on from."""
    if after is not None and after < done:
        return place(folder, after)
    return next((path for path in reversed(committed(folder)) if path < place(folder, done) and _link(path)), None)


def _link(path: Path | None) -> dict[str, Any] | None:
    """What another manifest says of this checkpoint; None where there is none."""
    if path is None or _manifest(path) is None:
        return None
    return {"round": int(path.name.rpartition("-")[2]), "sha256": _sha256((path / _MANIFEST).read_bytes())}


def committed(folder: Path) -> list[Path]:
    """The checkpoints under `folder`, oldest first."""
    return sorted(path for path in folder.glob("round-*") if (path / _MANIFEST).is_file())


def latest(folder: Path) -> Path | None:
    """The newest checkpoint whose files are what they were when it was written; damaged ones are passed over."""
    return next((path for path in reversed(committed(folder)) if intact(path)), None)


def intact(path: Path) -> bool:
    try:
        hashes = (_manifest(path) or {})["sha256"]
        whole = set(hashes) - {*linked.files(0, hashes).values(), _REFERENCE} == _NAMES
        return whole and all(linked.intact(path / name, own) for name, own in hashes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def unlinked(path: Path) -> str | None:
    """What is wrong with the chain here: that a checkpoint which this one names is there and is another one."""
    manifest = _manifest(path) or {}
    for key, about in (("parent", "goes on from"), ("best", "keeps as the best")):
        link = manifest.get(key)
        if link is not None:
            other = place(path.parent, link["round"])
            if (other / _MANIFEST).is_file() and _link(other) != link:
                return f"{other.name} is not the one that it {about}"
    return None


def differences(state: State, path: Path) -> list[str]:
    """The files at `path`, which is intact, that do not hold this state, to the bit."""
    hashes = (_manifest(path) or {})["sha256"]
    files = _files(state, alone=_REFERENCE in hashes)
    odd = [name for name, blob in files.items() if _sha256(blob) != hashes[name]]
    mine, written = _document(state, None), json.loads((path / "state.json").read_bytes())
    if written.get("rows") is None and not isinstance(state.clients.shelf, Disk):
        theirs = linked.written(*_rows(written, path))
        rows = {c: flatten(row) for c, row in state.clients.rows.items()}
        if {c: sha256(row) for c, row in rows.items() if row} != {c: sha256(row) for c, row in theirs.items()}:
            odd.append(linked.OWN)
    known = (k for k in mine if k in written and k not in ("held", "clients", "rows"))  # these share what is alike
    return odd if all(json.dumps(mine[k]) == json.dumps(written[k]) for k in known) else [*odd, "state.json"]


def summed(manifest: Mapping[str, Any]) -> bytes:
    """As JSON, with the SHA-256 of itself at the end."""
    text = json.dumps(manifest).encode()[:-1]
    return text + _SUM + _sha256(text).encode() + b'"}'


def _manifest(path: Path) -> dict[str, Any] | None:
    """None where there is none, or it is damaged. Those of an earlier lamina have no checksum of their own."""
    try:
        blob = (path / _MANIFEST).read_bytes()
        text, found, own = blob.rpartition(_SUM)
        manifest: dict[str, Any] = json.loads(blob)
        if found:
            same = own == _sha256(text).encode() + b'"}' and path.name == place(path, manifest["round"]).name
        else:
            same = manifest.keys() == {"version", "sha256"}
        return manifest if same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read(path: Path, fed: Federation) -> tuple[State, dict[str, Any]]:
    """The state at `path` for this federation, and what was kept beside it.

    Raises:
        StorageError: E404 when the files are damaged, E405 when they are of another model or method, or rely on
            another store on disk.
    """
    if not intact(path):
        raise StorageError(
            f"{path.name} is damaged: its files do not match their checksums", code="E404", where=str(path)
        )
    document = json.loads((path / "state.json").read_bytes())
    if document.get("version") != _VERSION:
        raise StorageError(
            f"{path.name} has version {document.get('version')}, this lamina reads {_VERSION}", code="E405"
        )
    try:
        model = _load(path / "model.safetensors")
        params, buffers = (
            _like(fed.initial.params, _part(model, "params")),
            _like(fed.initial.buffers, _part(model, "buffers")),
        )
        like = fed.method.init(fed.initial.params)
        server = unflatten(
            like, document["server"], _part(_load(path / "server.safetensors"), "server") | document["numbers"]
        )
        kept_apart = (path / _REFERENCE).exists()  # which of an earlier lamina it is not
        reference = _load(path / _REFERENCE) if kept_apart else _part(model, "reference")
        observed = Observed(_like(fed.initial.params, reference), document["elapsed"], _part(model, "mask"))
        clients = _clients(document, path, fed)
        change = document.get("change")
        if change is not None:
            change = Change(**change)._replace(step=_like(fed.initial.params, _part(model, "change")))
        past = tuple(
            Version(tags, _like(fed.initial.params, _part(model, f"past/{i}")))
            for i, tags in enumerate(document.get("past", []))  # of an earlier lamina there is none
        )
    except (KeyError, ValueError, TypeError, SafetensorError) as error:
        raise StorageError(
            f"{path.name} was written by a run with another model or method: what it holds does not fit this one",
            code="E405",
            where=str(path),
            remedy="go on with the model, method and settings that the run was begun with",
        ) from error
    mine = _form(fed.initial.params | fed.initial.buffers)
    theirs = _form(params | buffers)
    if mine != theirs:
        odd = next(n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n))
        message = (
            f"{path.name} is of another model: {odd} is {theirs.get(odd, 'absent')}, here {mine.get(odd, 'absent')}"
        )
        raise StorageError(message, code="E405", where=str(path))
    state = State(
        params, buffers, server, clients, document["round"], document["bytes_up"], document["bytes_down"], observed,
        change, past, {name: tuple(lengths) for name, lengths in document.get("norms", {}).items()},
        {int(c): until for c, until in document.get("resting", {}).items()},
        None if document.get("spent") is None else tuple(Made(*made) for made in document["spent"]),
    )  # fmt: skip
    return state, document["extra"]


def _form(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{tuple(x.shape)} {x.dtype}" for name, x in tensors.items()}


def _files(state: State, alone: bool = True) -> dict[str, bytes]:
    """Args: alone: the reference has a file of its own, which it had not in an earlier lamina."""
    model = {f"params/{n}": x for n, x in state.params.items()} | {f"buffers/{n}": x for n, x in state.buffers.items()}
    if not alone:
        model |= {f"reference/{n}": x for n, x in state.observed.reference.items()}
    model |= {f"mask/{n}": x for n, x in state.observed.mask.items()}
    if state.change is not None:
        model |= {f"change/{n}": x for n, x in state.change.step.items()}
    model |= {f"past/{i}/{n}": x for i, version in enumerate(state.past) for n, x in version.params.items()}
    server = {f"server/{n}": x for n, x in flatten(state.server).items() if isinstance(x, Tensor)}
    parts = {"model.safetensors": model, "server.safetensors": server}
    if state.observed.reference and alone:
        parts[_REFERENCE] = dict(state.observed.reference)
    return {name: save(apart(tensors)) for name, tensors in parts.items()}


def _document(state: State, rows: Rows | None) -> dict[str, Any]:
    held: list[dict[str, int]] = []  # a cohort shares one table of tags, and one entry where it remembers nothing
    tables: dict[int, int] = {}
    kinds: list[list[Any]] = []
    known: dict[tuple[int, int], int] = {}
    who: list[int] = []
    kind: list[int] = []
    shelf = state.clients.shelf
    on_disk = None
    if isinstance(shelf, Disk):
        on_disk = shelf.document({c: entry.place for c, entry in state.clients.entries()})
    for c, entry in state.clients.entries():
        file = rows.position.get(c, 0) if rows is not None else 0
        if (id(entry), file) not in known:
            if id(entry.held) not in tables:
                tables[id(entry.held)] = len(held)
                held.append(entry.held)
            known[id(entry), file] = len(kinds)
            shape = None if on_disk is not None or entry.place is None else skeleton(entry.place.row)
            kinds.append([shape, tables[id(entry.held)], entry.accepted, file])
        who.append(c)
        kind.append(known[id(entry), file])
    return {
        "version": _VERSION,
        "round": state.round,
        "bytes_up": state.bytes_up,
        "bytes_down": state.bytes_down,
        "server": skeleton(state.server),
        "numbers": {n: x for n, x in flatten(state.server).items() if not isinstance(x, Tensor)},
        "elapsed": state.observed.elapsed,
        "change": state.change and state.change._replace(step={})._asdict(),
        "past": [version.tags for version in state.past],
        "norms": state.norms,
        "resting": state.resting,
        "spent": state.spent,
        "held": held,
        "clients": {"who": who, "kind": kind, "kinds": kinds, "files": [] if rows is None else rows.names()},
        "rows": on_disk,
    }


def _clients(document: Mapping[str, Any], path: Path, fed: Federation) -> ClientStore:
    shelf: Shelf = MEMORY
    listed = _listed(document["clients"])
    if document.get("rows") is None:
        places: dict[int, Any] = linked.read(*_rows(document, path), _row(fed))
    elif isinstance(fed.store.shelf, Disk):
        shelf, places = fed.store.shelf, fed.store.shelf.places(document["rows"])
    else:
        raise StorageError(
            f"the clients' states of {path.name} are not in it but in a store on disk",
            code="E405",
            where=str(path),
            remedy="Federation(..., store='disk:PATH') with the path that the run had",
        )
    tables = document["held"]
    alike: dict[tuple[int, int, int], Entry] = {}
    entries = {}
    for c, (_, held, accepted, _) in listed.items():
        place = places[c]
        entry = Entry(place, tables[held], accepted)
        entries[c] = alike.setdefault((id(place), id(entry.held), accepted), entry)
    return ClientStore(shelf, entries)


def _listed(clients: dict[str, Any]) -> dict[int, list[Any]]:
    """Skeleton of the row, position of the table of tags, last round accepted, and position of the file, by client."""
    if "kinds" not in clients:  # of an earlier lamina
        return {int(c): [*one, 0] for c, one in clients.items()}
    kinds = [[*kind, 0][:4] for kind in clients["kinds"]]  # which of an earlier lamina have no file
    return {c: kinds[kind] for c, kind in zip(clients["who"], clients["kind"], strict=True)}


def _rows(
    document: Mapping[str, Any], path: Path
) -> tuple[dict[int, list[Any]], list[File], Callable[[File], dict[str, Tensor]]]:
    """Where the clients' rows are in the checkpoint at `path`, see `linked.written`."""
    names = _files_of_rows(path)
    files = {name: file for file, name in names.items()}
    listed = _listed(document["clients"])
    return (
        listed,
        [files[name] for name in document["clients"].get("files", [linked.OWN])],
        lambda f: _load(path / names[f]),
    )


def _row(fed: Federation) -> Row:
    return Row(fed.method.init_client(fed.initial.params), {})


def _like(model: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In the model's order; safetensors keeps its own."""
    return {name: tensors[name] for name in (*model, *tensors) if name in tensors}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    start = f"{prefix}/"
    return {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}


def _load(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load(path.read_bytes())
    return found


def _written(folder: Path, files: Mapping[str, bytes], references: Mapping[str, Path]) -> dict[str, str]:
    """The SHA-256 of each, which another thread takes meanwhile: it takes about as long as writing. A reference that is
    one of these is linked."""
    with ThreadPoolExecutor(1) as pool:
        order = sorted(files, key=lambda name: name != _REFERENCE)
        hashes = {name: pool.submit(_sha256, files[name]) for name in order}
        for name in reversed(order):
            same = references.get(hashes[name].result()) if name == _REFERENCE else None
            whole = same is not None and linked.intact(same, hashes[name].result())  # it may have been damaged since
            if same is None or not whole or not linked.link(same, folder / name):
                _write(folder / name, files[name])
        return {name: hashes[name].result() for name in files}


def _write(path: Path, blob: bytes) -> None:
    with path.open("wb") as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())


def _sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()
