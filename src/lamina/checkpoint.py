"""A checkpoint is a State in a folder: safetensors for tensors, JSON for the rest, there whole or not at all.

    checkpoints/round-000012/{model,server,clients}.safetensors  state.json  MANIFEST.json

Everything is written into `.round-000012.tmp`, flushed to the disk, and renamed; the newest two are kept. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lamina.errors import StorageError
from lamina.federation import Federation, Observed, State
from lamina.store import ClientStore, Row, Stored
from lamina.tree import flatten, skeleton, unflatten

_VERSION = 1
_KEEP = 2
_MANIFEST = "MANIFEST.json"
_NAMES = {"model.safetensors", "server.safetensors", "clients.safetensors", "state.json"}


def commit(state: State, folder: Path, extra: Mapping[str, Any] | None = None) -> Path:
    """Writes the state as one more checkpoint under `folder` and returns its path.

    Args:
        extra: plain JSON kept beside it, e.g. the lengths of the run's jsonl files.

    Raises:
        StorageError: E401 when the disk is full or fails; earlier checkpoints are untouched.
    """
    final = folder / f"round-{state.round:06d}"
    temporary = folder / f".round-{state.round:06d}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        files = _files(state)
        files["state.json"] = json.dumps(_document(state) | {"extra": dict(extra or {})}).encode()
        hashes = {name: _write(temporary / name, blob) for name, blob in files.items()}
        _write(temporary / _MANIFEST, json.dumps({"version": _VERSION, "sha256": hashes}).encode())
        _sync(temporary)
        shutil.rmtree(final, ignore_errors=True)  # a round that is committed again after going back to before it
        temporary.rename(final)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(
            f"checkpoint of round {state.round} could not be written: {error.strerror or error}",
            code="E401",
            where=str(folder),
            remedy="free some space; earlier checkpoints are intact, so `lamina resume` goes on from the last one",
        ) from error
    others = [path for path in committed(folder) if path != final]
    for old in others[: 1 - _KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def committed(folder: Path) -> list[Path]:
    """The checkpoints under `folder`, oldest first."""
    return sorted(path for path in folder.glob("round-*") if (path / _MANIFEST).is_file())


def latest(folder: Path) -> Path | None:
    """The newest checkpoint whose files are what they were when it was written; damaged ones are passed over."""
    return next((path for path in reversed(committed(folder)) if intact(path)), None)


def intact(path: Path) -> bool:
    try:
        hashes = json.loads((path / _MANIFEST).read_bytes())["sha256"]
        return set(hashes) == _NAMES and all(_sha256((path / name).read_bytes()) == hashes[name] for name in _NAMES)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read(path: Path, fed: Federation) -> tuple[State, dict[str, Any]]:
    """The state at `path` for this federation, and what was kept beside it.

    Raises:
        StorageError: E404 when the files are damaged, E405 when they are of another model or method.
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
        observed = Observed(_like(fed.initial.params, _part(model, "reference")), document["elapsed"])
        clients = _clients(document, _load(path / "clients.safetensors"), fed)
    except (KeyError, ValueError, TypeError, SafetensorError) as error:
        raise StorageError(f"{path.name} is of another kind of run: {error!r}", code="E405", where=str(path)) from error
    mine = _form(fed.initial.params | fed.initial.buffers)
    theirs = _form(params | buffers)
    if mine != theirs:
        odd = next(n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n))
        message = (
            f"{path.name} is of another model: {odd} is {theirs.get(odd, 'absent')}, here {mine.get(odd, 'absent')}"
        )
        raise StorageError(message, code="E405", where=str(path))
    state = State(
        params, buffers, server, clients, document["round"], document["bytes_up"], document["bytes_down"], observed
    )
    return state, document["extra"]


def _form(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{tuple(x.shape)} {x.dtype}" for name, x in tensors.items()}


def _files(state: State) -> dict[str, bytes]:
    model = {f"params/{n}": x for n, x in state.params.items()} | {f"buffers/{n}": x for n, x in state.buffers.items()}
    model |= {f"reference/{n}": x for n, x in state.observed.reference.items()}
    server = {f"server/{n}": x for n, x in flatten(state.server).items() if isinstance(x, Tensor)}
    clients: dict[str, Tensor] = {}
    for c in state.clients:
        row = state.clients.get(c).row
        clients |= {f"{c}/{n}": x for n, x in flatten(row).items()}
    return {
        f"{name}.safetensors": save(_apart(tensors))
        for name, tensors in (("model", model), ("server", server), ("clients", clients))
    }


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same in memory of their own: safetensors refuses values that share some, as states may."""
    seen: set[int] = set()
    apart = {}
    for name, x in tensors.items():
        place = x.untyped_storage().data_ptr()
        apart[name] = x.detach().contiguous() if place not in seen else x.detach().contiguous().clone()
        seen.add(place)
    return apart


def _document(state: State) -> dict[str, Any]:
    held: list[dict[str, int]] = []  # a cohort shares one table of tags: each is written once
    places: dict[int, int] = {}
    clients = {}
    for c in state.clients:
        stored = state.clients.get(c)
        if id(stored.held) not in places:
            places[id(stored.held)] = len(held)
            held.append(stored.held)
        clients[str(c)] = [skeleton(stored.row), places[id(stored.held)], stored.accepted]
    return {
        "version": _VERSION,
        "round": state.round,
        "bytes_up": state.bytes_up,
        "bytes_down": state.bytes_down,
        "server": skeleton(state.server),
        "numbers": {n: x for n, x in flatten(state.server).items() if not isinstance(x, Tensor)},
        "elapsed": state.observed.elapsed,
        "held": held,
        "clients": clients,
    }


def _clients(document: Mapping[str, Any], tensors: Mapping[str, Tensor], fed: Federation) -> ClientStore:
    like = Row(fed.method.init_client(fed.initial.params), {})
    leaves: dict[str, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        client, _, name = key.partition("/")
        leaves.setdefault(client, {})[name] = x
    rows = {}
    for c, (shape, place, accepted) in document["clients"].items():
        row = unflatten(like, shape, leaves.get(c, {}))
        rows[int(c)] = Stored(row, document["held"][place], accepted)
    return ClientStore(rows)


def _like(model: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In the model's order; safetensors keeps its own."""
    return {name: tensors[name] for name in (*model, *tensors) if name in tensors}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    start = f"{prefix}/"
    return {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}


def _load(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load(path.read_bytes())
    return found


def _write(path: Path, blob: bytes) -> str:
    with path.open("wb") as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())
    return _sha256(blob)


def _sync(folder: Path) -> None:
    """Makes the names in a folder durable; a folder cannot be opened for that on Windows."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()
