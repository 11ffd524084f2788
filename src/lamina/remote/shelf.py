"""What clients hold between rounds, at their node: the plan as they last read it, and what they remember."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lamina.errors import StorageError, expect
from lamina.federation import Federation
from lamina.remote.envelope import add_to
from lamina.store import Row
from lamina.store.files import replace, storing
from lamina.tree import Message, Params, apart, flatten, skeleton, unflatten

_VERSION = "1"


class Holding(NamedTuple):
    """What one client holds.

    Args:
        plan: fingerprint of the plan that it last read.
        trees: of that plan: "params", "buffers", "mask" and the shared ones by their names.
        rows: what it remembered after its last answers, by round, newest first. The server may not have accepted the
            newest: then the client goes back to the one that it names.
        puts: how often it has been put away.
        number: of the last letter that it has answered, where letters are signed.
    """

    plan: str
    trees: Message
    rows: dict[int, Row]
    puts: int = 0
    number: int = 0


class Shelf(Protocol):
    def get(self, client: int) -> Holding | None:
        """What was put last; None for nothing. Raises StorageError (E404) when it is damaged."""
        ...

    def put(self, client: int, holding: Holding) -> None:
        """It is durable when this returns, as far as the shelf is. Raises StorageError (E401)."""
        ...

    def counts(self) -> dict[int, int]:
        """How often each client's holding was put here."""
        ...


class MemoryShelf:
    """Gone when the process ends. Trees that clients share stay shared."""

    def __init__(self) -> None:
        self._holdings: dict[int, Holding] = {}

    def get(self, client: int) -> Holding | None:
        return self._holdings.get(client)

    def put(self, client: int, holding: Holding) -> None:
        self._holdings[client] = holding

    def counts(self) -> dict[int, int]:
        return {client: holding.puts for client, holding in self._holdings.items()}


def place_of(folder: str | Path, experiment: str) -> Path:
    """Where a node keeps what is of this experiment. Raises ConfigError for a name that is none."""
    fine = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", experiment) is not None
    expect(fine, f"experiment={experiment!r}: expected letters, digits, '.', '_', '-'", where="experiment")
    return Path(folder) / experiment


class DiskShelf:
    """Files that are there whole or not at all, each with a checksum over all that is in it.

        FOLDER/EXPERIMENT/client-000012.safetensors     what a client remembers, and which plan it read
        FOLDER/EXPERIMENT/plan-<fingerprint>.safetensors     a plan's trees, once for all clients that read it

    One process at a time.

    Args:
        fed: whose clients they are, for the classes of what they remember.
        folder: made if need be.
        experiment: what sets this run's files apart from those of others.
    """

    def __init__(self, fed: Federation, folder: str | Path, experiment: str):
        self.folder = place_of(folder, experiment)
        self._experiment = experiment
        self._like = Row(fed.method.init_client(fed.initial.params), {})
        self._read: tuple[str, Message] = ("", {})  # the plan that was read last

    def file(self, client: int) -> Path:
        return self.folder / f"client-{client:06d}.safetensors"

    def plan_file(self, plan: str) -> Path:
        return self.folder / f"plan-{plan}.safetensors"

    def get(self, client: int) -> Holding | None:
        """Where only the plan is damaged, the rest of the holding, with a warning."""
        path = self.file(client)
        if not path.exists():
            return None
        try:
            said, tensors = self._opened(path)
            if said["client"] != client:
                raise ValueError(f"it is of client {said['client']}")
            plan, puts, number = str(said["plan"]), int(said["puts"]), int(said.get("number", 0))
            rows = {
                int(round): unflatten(self._like, shape, _below(tensors, f"{round}/")) for round, shape in said["rows"]
            }
        except _UNREADABLE as error:
            raise StorageError(
                f"{path.name} is damaged: {error}",
                code="E404",
                where=str(path),
                remedy="its client begins as a newcomer; what was there is replaced with its next answer",
            ) from error
        try:
            return Holding(plan, self._trees(plan), rows, puts, number)
        except _UNREADABLE as error:
            name = self.plan_file(plan).name
            warnings.warn(f"{name} is damaged: {error}: its clients are sent the whole plan", stacklevel=2)
            return Holding("", {}, rows, puts, number)

    def put(self, client: int, holding: Holding) -> None:
        with storing(self.file(client)):
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._read[0] != holding.plan or not self.plan_file(holding.plan).exists():
                self._put_plan(holding.plan, holding.trees)
            rows = {f"{round}/{n}": x for round, row in holding.rows.items() for n, x in flatten(row).items()}
            said = {
                "client": client,
                "puts": holding.puts,
                **({"number": holding.number} if holding.number else {}),
                "plan": holding.plan,
                "rows": [[round, skeleton(row)] for round, row in holding.rows.items()],
            }
            self._write(self.file(client), said, rows)

    def counts(self) -> dict[int, int]:
        return {client: int(said["puts"]) for client, said in self._clients().items()}

    def _put_plan(self, plan: str, trees: Message) -> None:
        """And away with those that no client has any more."""
        named = {"trees": {tree: [*content] for tree, content in trees.items()}}  # safetensors has an order of its own
        tensors = {f"{tree}/{n}": x for tree, content in trees.items() for n, x in content.items()}
        self._write(self.plan_file(plan), named, tensors)
        self._read = plan, trees
        needed = {self.plan_file(str(said["plan"])) for said in self._clients().values()} | {self.plan_file(plan)}
        for path in self.folder.glob("plan-*.safetensors"):
            if path not in needed:
                path.unlink(missing_ok=True)

    def _trees(self, plan: str) -> Message:
        if self._read[0] != plan:
            said, tensors = self._opened(self.plan_file(plan))
            self._read = plan, {t: {n: tensors[f"{t}/{n}"] for n in names} for t, names in said["trees"].items()}
        return self._read[1]

    def _clients(self) -> dict[int, dict[str, Any]]:
        """What the clients' files say beside tensors; `get` says what is wrong with those that are left out."""
        found = {}
        for path in self.folder.glob("client-*.safetensors"):
            try:
                with safe_open(path, "pt") as file:
                    said = json.loads(file.metadata()["said"])
                found[int(said["client"])] = said
            except _UNREADABLE:
                continue
        return found

    def _write(self, path: Path, said: Mapping[str, Any], tensors: Params) -> None:
        text = json.dumps({"version": _VERSION, "experiment": self._experiment, **said})
        names = json.dumps([*tensors])
        checksum = _checksum(text + names, tensors)
        replace(path, save(apart(tensors), {"said": text, "names": names, "checksum": checksum}))

    def _opened(self, path: Path) -> tuple[dict[str, Any], Params]:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        text, names = metadata["said"], metadata["names"]
        tensors = {name: found[name] for name in json.loads(names)}
        if metadata.get("checksum") != _checksum(text + names, tensors):
            raise ValueError("it does not match its checksum")
        said: dict[str, Any] = json.loads(text)
        if said["version"] != _VERSION:
            raise ValueError(f"it has version {said['version']}, this lamina reads {_VERSION}")
        if said["experiment"] != self._experiment:
            raise ValueError(f"it is of {said['experiment']!r}")
        return said, tensors


_UNREADABLE = (OSError, ValueError, KeyError, TypeError, SafetensorError)


def _below(tensors: Params, prefix: str) -> Params:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def _checksum(text: str, tensors: Params) -> str:
    digest: Any = xxhash.xxh3_128(text.encode())
    add_to(digest, tensors)
    return str(digest.hexdigest())
