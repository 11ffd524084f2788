"""What a round costs follows its cohort, not the clients; and nothing grows with the rounds. Work and memory are
counted here, time is not: that is benchmarks/growth.py."""

from __future__ import annotations

import gc
import os
import re
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cases
from lamina import ClientData, Federation, LocalSGD, Method, Scaffold, State, checkpoint
from lamina.engine import processes
from lamina.store import ClientStore, Entry, Stored
from lamina.store.clients import Kept, Memory, Row
from lamina.store.entries import Entries

CLIENTS = 100_000
forked = pytest.mark.skipif(not processes.available(), reason="no fork here")


def many(**options: Any) -> Federation:
    """100,000 clients with 4 to 8 of 1,000 examples each, 10 of them a round."""
    source = torch.Generator().manual_seed(0)
    x, y = torch.randn(1000, 64, generator=source), torch.randint(4, (1000,), generator=source)
    sizes = torch.randint(4, 9, (CLIENTS,), generator=source)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    indices = torch.randint(1000, (int(offsets[-1]),), generator=source)
    data = ClientData(x, y, tuple(map(str, range(CLIENTS))), offsets, indices, test=(x[:50], y[:50]))
    local = LocalSGD(lr=0.1, batch_size=4)
    return Federation(cases.small, data, **{"cohort": 10, "local": local, "engine": "loop"} | options)


def everybody_knows(fed: Federation) -> State:
    """After a round, and as if every client had taken part before."""
    state = cases.finish(fed, 1)[0]
    row = Kept(Row(fed.method.init_client(state.params), {}))
    known = {c: state.clients.entry(c) for c in state.clients}
    held = next(iter(known.values())).held
    return replace(
        state, clients=ClientStore(fed.store.shelf, dict.fromkeys(range(CLIENTS), Entry(row, held, 0)) | known)
    )


class Largest(TorchDispatchMode):
    """The most entries of a tensor that an operation makes; views of these tensors are nothing new."""

    def __init__(self, *known: Tensor):
        super().__init__()
        self.entries = 0
        self._known = {x.untyped_storage().data_ptr() for x in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **kwargs or {})
        for x in made if isinstance(made, tuple | list) else [made]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self._known:
                self.entries = max(self.entries, x.numel())
        return made


# ---- with the clients


@pytest.mark.parametrize("method", [None, Scaffold()])
def test_a_round_makes_nothing_that_is_as_large_as_the_clients_are_many(method: Method[Any, Any] | None) -> None:
    """Every client is known, so any pass over them would show: as Python objects (one list of them is 800 kB) or as
    a tensor of 100,000 entries. The model has 500 parameters."""
    fed = many(method=method)
    run = fed.run(4, everybody_knows(fed), evaluate_every=4)
    with Largest():
        next(run)  # what torch imports when it is first looked at so
    largest = Largest(fed.data.x, fed.data.indices, fed.data.offsets)
    gc.collect()
    tracemalloc.start()
    try:
        with largest:
            state, record = next(run)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        run.close()
    assert len(record.cohort) == 10
    assert len(state.clients) == CLIENTS
    assert peak < 400_000
    assert 256 <= largest.entries < 10_000  # a minibatch of 4 examples, and weights


def test_a_round_asks_for_the_rows_and_examples_of_its_cohort_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    touched: dict[str, set[int]] = {"row": set(), "put": set(), "examples": set()}

    class Spied(Memory):
        def get(self, client: int, place: Kept) -> Row:
            touched["row"].add(client)
            return super().get(client, place)

        def put(self, client: int, accepted: int, row: Row) -> Kept:
            touched["put"].add(client)
            return super().put(client, accepted, row)

    indices_of = ClientData.indices_of

    def spied(data: ClientData, client: int) -> Tensor:
        touched["examples"].add(client)
        return indices_of(data, client)

    fed = many(method=Scaffold())
    fed.store = ClientStore(Spied())
    state = everybody_knows(fed)
    monkeypatch.setattr(ClientData, "indices_of", spied)
    for place in touched.values():
        place.clear()
    _, record = next(fed.run(2, state))
    cohort = set(record.cohort)
    assert touched == {"row": cohort, "put": cohort, "examples": cohort}


def test_entries_share_all_but_the_way_to_what_changed() -> None:
    """100,000 positions are 17 bits, so four levels of 32 places: ten changes make at most 1 + 3 x 10 nodes."""

    def nodes(node: Any, level: int) -> Iterator[int]:
        yield id(node)
        if level:
            for below in node:
                if below is not None:
                    yield from nodes(below, level - 1)

    old = Entries({c: Entry(None, {}, 0) for c in range(CLIENTS)})
    new = old.with_({c: Entry(None, {}, 1) for c in range(7, CLIENTS, CLIENTS // 10)})
    before = set(nodes(old._root, old._levels - 1))
    after = set(nodes(new._root, new._levels - 1))
    assert len(before) == len(after) == 1 + 4 + 98 + 3125
    assert len(after - before) <= 31
    assert sum(entry.accepted for _, entry in new.items()) == 10
    assert not any(entry.accepted for _, entry in old.items())


def test_entries_are_a_map() -> None:
    """Against a dict, at positions around every border between nodes."""
    source = torch.Generator().manual_seed(1)
    positions = [0, 1, 31, 32, 33, 1023, 1024, 32767, 32768, 999_999]
    plain: dict[int, Entry] = {}
    made = Entries()
    for step in range(40):
        some = [positions[i] for i in torch.randperm(len(positions), generator=source)[: 1 + step % 3].tolist()]
        changed = {c: Entry(None, {}, step) for c in some}
        older, was = made, dict(plain)
        made = made.with_(changed)
        plain |= changed
        assert dict(older.items()) == was
        assert dict(made.items()) == plain
        assert list(dict(made.items())) == sorted(plain)
        assert len(made) == len(plain)
        for c in (*positions, 2, 5_000_000):
            assert made[c] == plain.get(c, Entry(None, {}, -1))
    assert made.with_({}).items() is not None
    assert len(Entries()) == 0
    assert not list(Entries().items())


def test_clients_of_a_cohort_that_remember_nothing_are_one_entry() -> None:
    """So that a million clients are a million references, and in a checkpoint one number each."""
    fed = many()
    (first, _), (second, record) = fed.run(2)
    assert len({id(first.clients.entry(c)) for c in first.clients}) == 1
    assert len({id(second.clients.entry(c)) for c in record.cohort}) == 1
    assert len(checkpoint._document(second, None)["clients"]["kinds"]) == 2


def test_rows_of_other_methods_are_not_taken_for_each_other() -> None:
    """Tuples are equal whatever their classes, and methods read a state by its fields."""

    class One(NamedTuple):
        residual: dict[str, Tensor]

    class Other(NamedTuple):
        velocity: dict[str, Tensor]

    for state in (One({}), Other({}), One({})):
        store = ClientStore().updated({c: Stored(Row(state, {}), {}, 0) for c in (0, 1)})
        assert [type(row.method) for row in store.rows.values()] == [type(state)] * 2
        assert store.entry(0).place is store.entry(1).place


def test_a_checkpoint_gives_back_who_shares_what(tmp_path: Path) -> None:
    fed = many()
    state = cases.finish(fed, 3)[0]
    back, _ = checkpoint.read(checkpoint.commit(state, tmp_path), fed)
    assert cases.everything(back) == cases.everything(state)
    kinds = {id(entry) for _, entry in back.clients.entries()}
    assert len(kinds) == len({id(entry) for _, entry in state.clients.entries()}) == 3


def test_a_checkpoint_of_an_earlier_lamina_is_read() -> None:
    """It listed skeleton, table and last round once more for every client."""
    one, other = ["leaf", 0, 3], [None, 1, 4]
    now = {"who": [2, 5, 10], "kind": [0, 1, 0], "kinds": [[*one, 0], [*other, 0]]}
    between = now | {"kinds": [one, other]}  # when all rows of a checkpoint were in one file
    before = {"2": one, "5": other, "10": one}
    assert checkpoint._listed(now) == checkpoint._listed(between) == checkpoint._listed(before)
    assert checkpoint._listed(now) == {2: [*one, 0], 5: [*other, 0], 10: [*one, 0]}


# ---- with the rounds


def of_all(look: Callable[[int], int]) -> int:
    """Summed over this process and its workers."""
    return sum(look(pid) for pid in (os.getpid(), *workers()))


def workers() -> list[int]:
    tasks = Path("/proc/self/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text().split()]


def resident(pid: int) -> int:
    """Bytes of a process's own memory: what is shared is counted where it is made."""
    text = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s*(\d+)", text)[1])


def look() -> dict[str, int]:
    gc.collect()
    objects = gc.get_objects()
    return {
        "processes": len(workers()),
        "descriptors": of_all(lambda pid: len(os.listdir(f"/proc/{pid}/fd"))),
        "tensors": sum(issubclass(type(x), Tensor) for x in objects),
        "objects": len(objects),
        "memory": of_all(resident),
    }


def looked(fed: Federation, *rounds: int) -> list[dict[str, int]]:
    """What there is at most in the three rounds that end with each of these: FedLAMA's cycles differ inside. States and
    records before are let go of."""
    found: dict[int, dict[str, int]] = {}
    for state, record in fed.run(max(rounds), evaluate_every=50):
        for end in rounds:
            if 0 <= end - state.round < 3:
                now = look()
                found[end] = {what: max(n, found.get(end, now)[what]) for what, n in now.items()}
        del state, record
    return list(found.values())


ENGINES = ["loop", pytest.param("processes", marks=forked), pytest.param("stacked", marks=forked)]


def running(engine: str, method: str) -> Federation:
    fed = cases.case(method, model="small", engine=engine, cohort=4, workers=None if engine == "loop" else 2)
    if engine == "stacked":
        fed._stack.width = 2
    assert fed.engine == engine
    return fed


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what a process has")
@pytest.mark.parametrize("engine", cases.the_rest_slowly(ENGINES, ("processes",)))
def test_nothing_grows_over_200_rounds(engine: str) -> None:
    """Tensors, descriptors and processes to the last one; memory to 2 MiB, where one row of a ledger that is kept, or
    one message, would be 200 x 4."""
    early, late = looked(running(engine, "fedlama, scaffold"), 60, 260)
    for what in ("processes", "descriptors", "tensors"):
        assert late[what] == early[what], what
    assert late["objects"] <= early["objects"] + 50
    assert late["memory"] <= early["memory"] + (2 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["fedavg", "errorfeedback", "ssfl, fedlama, fedadam", "feddyn", "fedluar, fedadam"])
def test_nothing_grows_over_2000_rounds(engine: str, method: str) -> None:
    early, late = looked(running(engine, method), 300, 2300)
    for what in ("processes", "descriptors", "tensors"):
        assert late[what] == early[what], what
    assert late["objects"] <= early["objects"] + 50
    assert late["memory"] <= early["memory"] + (4 << 20)
