"""The client store is a value, in memory and on disk; on disk it survives what happens to disks."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cases
from lamina import (
    ConfigError,
    ErrorFeedback,
    FedAvg,
    Federation,
    Scaffold,
    State,
    StorageError,
    checkpoint,
    config,
    lock,
    runs,
)
from lamina.store import ClientStore, Disk, Row, Stored, disk
from lamina.tree import Params

NAMES = tuple(f"client-{i}" for i in range(10))


def row(x: float, **more: Any) -> Row:
    return Row((torch.tensor(x),), {name: torch.as_tensor(value) for name, value in more.items()})


def stored(x: float, accepted: int = 0) -> Stored:
    return Stored(row(x), {"params/w": 1}, accepted)


def value(store: ClientStore, client: int) -> float:
    found = store.get(client).row
    assert found is not None
    return float(found.method[0])


def on_disk(path: Path) -> ClientStore:
    model: Params = {"w": torch.zeros(2)}
    return ClientStore(disk.on_disk(path, model, row(0.0), NAMES))


@pytest.fixture(params=["memory", "disk"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> ClientStore:
    return ClientStore() if request.param == "memory" else on_disk(tmp_path / "store")


# ---- a value


def test_a_client_that_never_took_part_has_no_row_and_holds_nothing(empty: ClientStore) -> None:
    assert empty.get(3) == Stored(None, {}, -1)
    assert (len(empty), list(empty.rows)) == (0, [])


def test_updating_makes_a_new_store_and_leaves_the_old_one(empty: ClientStore) -> None:
    old = empty.updated({1: stored(1.0)})
    new = old.updated({4: stored(4.0), 1: stored(2.0)})
    assert (list(old), list(new)) == ([1], [1, 4])
    assert (value(old, 1), value(new, 1)) == (1.0, 2.0)


def test_two_stores_may_go_on_from_one(empty: ClientStore) -> None:
    first = empty.updated({1: stored(1.0)})
    left, right = first.updated({1: stored(2.0)}), first.updated({1: stored(3.0)})
    assert [value(store, 1) for store in (first, left, right)] == [1.0, 2.0, 3.0]


def test_untouched_rows_are_shared() -> None:
    old = ClientStore().updated({1: stored(1.0)})
    assert old.updated({2: stored(2.0)}).get(1).row is old.get(1).row


def test_clients_come_in_ascending_order(empty: ClientStore) -> None:
    assert list(empty.updated({5: stored(1.0), 2: stored(1.0), 9: stored(1.0)})) == [2, 5, 9]


def test_a_client_that_was_told_something_keeps_its_row(empty: ClientStore) -> None:
    writer = empty.updated({1: stored(1.0)}).writing()
    writer.tell(1, {"params/w": 7})
    writer.tell(2, {"params/w": 7})
    store = writer.done()
    assert (value(store, 1), store.get(1).held, store.get(1).accepted) == (1.0, {"params/w": 7}, 0)
    assert store.get(2) == Stored(None, {"params/w": 7}, -1)
    assert list(store.rows) == [1]
    assert store.rows.get(2) is None


def test_clients_of_a_cohort_share_their_table_of_tags(empty: ClientStore) -> None:
    """Also after the setup has told all of them more, and after a checkpoint."""
    tags = {"params/w": 1}
    store = empty.updated({c: Stored(row(c), tags, 0) for c in (1, 2)}).told({"params/v": 2})
    assert store.get(1).held == {"params/w": 1, "params/v": 2}
    assert store.get(1).held is store.get(2).held


# ---- on disk


KINDS = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)


def test_rows_of_every_dtype_and_shape_come_back_to_the_bit(tmp_path: Path) -> None:
    source = torch.Generator().manual_seed(0)
    tensors = {str(kind): torch.randint(0, 2, (3, 5), generator=source).to(kind) for kind in KINDS}
    tensors |= {"empty": torch.zeros(0, 4), "number": torch.tensor(2), "slice": torch.arange(12).view(3, 4).t()[1:]}
    tensors |= {"odd": torch.tensor([float("nan"), -0.0, float("inf")])}
    before = Row((torch.tensor(1.5),), tensors)
    after = on_disk(tmp_path).updated({3: Stored(before, {}, 2)}).get(3).row
    assert after is not None
    assert cases.bits(after) == cases.bits(before)
    assert list(after.buffers) == list(before.buffers)
    assert all(x.data_ptr() % 64 == 0 for x in after.buffers.values() if x.numel())  # sums may depend on it


def test_rows_come_back_as_the_classes_they_were(tmp_path: Path) -> None:
    state = cases.states(cases.case("fedlama, scaffold", store=f"disk:{tmp_path}"), 2)[-1]
    memory = cases.states(cases.case("fedlama, scaffold"), 2)[-1]
    client = next(iter(state.clients))
    found, expected = (s.clients.get(client).row for s in (state, memory))
    assert [type(part) for part in (found, *found.method)] == [type(part) for part in (expected, *expected.method)]


def test_nothing_is_written_before_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "a" / "store"
    cases.case("errorfeedback", store=f"disk:{path}")
    assert not path.parent.exists()


@pytest.mark.parametrize("store", ["disk", "disk:", "ram", "Disk:x", None, 3])
def test_a_store_of_another_kind_is_refused(store: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected 'memory' or 'disk:PATH'"):
        cases.case("errorfeedback", store=store)


METHODS = ("fedavg", "errorfeedback", "scaffold", "localonly", "fedlama", "fedprox, errorfeedback, fedlama, fedyogi")


PROCESSES = {"engine": "processes", "workers": 2}


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        *[(name, {}) for name in METHODS],
        (METHODS[-1], PROCESSES),
        *[pytest.param(name, PROCESSES, marks=pytest.mark.slow) for name in METHODS[:-1]],
    ],
    ids=lambda x: x if isinstance(x, str) else x.get("engine", "loop"),
)
def test_memory_and_disk_hold_the_same_states(name: str, engine: dict[str, Any], tmp_path: Path) -> None:
    memory = list(cases.case(name, buffers="keep", **engine).run(cases.ROUNDS))
    pairs = list(cases.case(name, buffers="keep", store=f"disk:{tmp_path}", **engine).run(cases.ROUNDS))
    for (state, record), (expected, expected_record) in zip(pairs, memory, strict=True):
        assert cases.everything(state) == cases.everything(expected)
        assert cases.untimed(record) == cases.untimed(expected_record)


def test_a_state_in_memory_goes_on_on_disk(tmp_path: Path) -> None:
    whole = cases.states(cases.case("scaffold"))
    fed = cases.case("scaffold", store=f"disk:{tmp_path}")
    last = cases.states(fed, cases.ROUNDS - 2, whole[1])[-1]
    assert isinstance(last.clients.shelf, Disk)
    assert cases.everything(last) == cases.everything(whole[-1])


def test_rows_are_written_as_they_come_and_not_at_the_end_of_a_round(tmp_path: Path) -> None:
    """When the second client of a round answers, the row of the first is on disk already."""
    writer = on_disk(tmp_path).writing()
    sizes = []
    for c in (1, 2):
        writer.put(c, stored(c))
        sizes.append(sum(path.stat().st_size for path in tmp_path.glob("*.log")))
    assert sizes == [128, 256]  # a head and one tensor, 64 bytes each


def test_the_rows_in_memory_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four rows of 64 bytes, each with 36 for a row and 36 for its tensor, three fit in 450: reading a fourth puts
    out the one that was not used for longest."""
    monkeypatch.setattr(disk, "CACHE", 450)
    monkeypatch.setattr(disk, "OBJECT", 36)
    store = on_disk(tmp_path).updated({c: stored(c) for c in range(4)})
    reads: list[int] = []
    read = disk.Segment.read
    monkeypatch.setattr(
        disk.Segment, "read", lambda self, client, *rest: reads.append(client) or read(self, client, *rest)
    )
    for client in (0, 1, 2, 0, 3, 0, 2, 1):
        assert value(store, client) == client
    assert reads == [0, 1, 2, 3, 1]


def test_rows_without_a_value_take_memory_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of FedAvg, which are nothing but a class."""
    monkeypatch.setattr(disk, "CACHE", 5 * disk.OBJECT)
    nothing = Row((), {})
    store = ClientStore(disk.on_disk(tmp_path, {"w": torch.zeros(2)}, nothing, NAMES))
    store = store.updated({c: Stored(nothing, {}, 0) for c in range(10)})
    shelf: Any = store.shelf
    assert [store.get(c).row for c in store] == [nothing] * 10
    assert len(shelf._cache) == 5


def test_reading_ahead_is_bounded_and_asks_for_the_next_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(disk.Segment, "will_need", lambda self, offset, length: asked.append(offset))
    store = on_disk(tmp_path / "a").updated({c: stored(c) for c in range(4)})
    monkeypatch.setattr(disk, "AHEAD", 130)
    store.will_need([3, 0, 2, 9])
    assert asked == [3 * 128, 0]
    monkeypatch.undo()
    told: list[set[int]] = []
    monkeypatch.setattr(ClientStore, "will_need", lambda self, clients: told.append(set(clients)))
    fed = cases.case("errorfeedback", store=f"disk:{tmp_path / 'b'}")
    cohorts = [set(record.cohort) for _, record in fed.run(4)]
    assert told[:3] == [after - now for now, after in itertools.pairwise(cohorts)]
    assert any(told[:3])


def test_a_disk_that_fails_says_so_and_the_store_goes_on_behind_whole_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = on_disk(tmp_path).updated({1: stored(1.0)})

    def half(self: Any, client: int, *rest: Any) -> None:
        os.write(self._handle, b"half a row")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(disk.Segment, "append", half)
        with pytest.raises(StorageError, match="No space left") as caught:
            store.updated({2: stored(2.0)})
    assert caught.value.code == "E401"
    after = store.updated({2: stored(3.0)})
    assert (value(after, 1), value(after, 2)) == (1.0, 3.0)


# ---- what goes and what stays


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "SEGMENT", 300)  # three rows of 128 bytes


def logs(path: Path) -> dict[str, int]:
    return {file.stem: file.stat().st_size // 128 for file in sorted(path.glob("*.log"))}


@pytest.mark.usefixtures("small_segments")
def test_a_segment_goes_when_nobody_refers_to_it(tmp_path: Path) -> None:
    """Three clients, each round a segment of its own: the store of round 0 keeps its segment until it is let go of."""
    first = store = on_disk(tmp_path).updated({c: stored(0.0) for c in range(3)})
    for t in range(1, 4):
        store = store.updated({c: stored(t) for c in range(3)})
    assert logs(tmp_path) == {"rows-000001": 3, "rows-000003": 3, "rows-000004": 3}
    assert [value(first, c) for c in range(3)] == [0.0] * 3
    del first
    store = store.updated({0: stored(4.0)})
    assert logs(tmp_path) == {"rows-000004": 3, "rows-000005": 1}


@pytest.mark.usefixtures("small_segments")
def test_a_segment_of_which_more_than_half_is_dead_is_rewritten_and_only_its_live_rows(tmp_path: Path) -> None:
    """Clients 0, 1, 2 are in the first segment. When 1 has a new row two thirds of it are live; when 2 has one, one
    third: row 0 moves behind that of 2, and the segment goes with the next one that is begun."""
    store = on_disk(tmp_path).updated({c: stored(c) for c in range(3)})
    store = store.updated({1: stored(11.0)})
    assert logs(tmp_path) == {"rows-000001": 3, "rows-000002": 1}
    store = store.updated({2: stored(12.0)})
    assert logs(tmp_path) == {"rows-000001": 3, "rows-000002": 3}
    store = store.updated({5: stored(15.0)})
    assert logs(tmp_path) == {"rows-000002": 3, "rows-000003": 1}
    assert [value(store, c) for c in store] == [0.0, 11.0, 12.0, 15.0]
    assert [store.get(c).accepted for c in store] == [0] * 4


@pytest.mark.usefixtures("small_segments")
def test_however_long_it_runs_at_most_half_of_the_store_is_dead(tmp_path: Path) -> None:
    store = on_disk(tmp_path).updated({c: stored(c) for c in range(10)})
    expected = {c: float(c) for c in range(10)}
    source = torch.Generator().manual_seed(1)
    for t in range(60):
        cohort = torch.randperm(10, generator=source)[:2].tolist()
        store = store.updated({c: stored(100.0 * t + c, t) for c in cohort})
        expected |= {c: 100.0 * t + c for c in cohort}
        assert {c: value(store, c) for c in store} == expected
        store.shelf.unpin(tmp_path)
        assert sum(logs(tmp_path).values()) <= 2 * 10 + 3


@pytest.mark.usefixtures("small_segments")
def test_rows_that_a_checkpoint_needs_stay_until_it_is_pruned(tmp_path: Path) -> None:
    place, held = tmp_path / "store", tmp_path / "checkpoints"
    store = on_disk(place).updated({c: stored(0.0) for c in range(3)})
    for t in range(1, 4):
        (held / str(t)).mkdir(parents=True)
        store.pin(held / str(t))
        store = store.updated({c: stored(t) for c in range(3)})
    assert list(logs(place)) == ["rows-000001", "rows-000002", "rows-000003", "rows-000004"]
    (held / "1").rmdir()
    (held / "3").rmdir()
    store.shelf.unpin(held)
    assert list(logs(place)) == ["rows-000002", "rows-000004"]


@pytest.mark.usefixtures("small_segments")
def test_rows_of_a_run_that_was_deleted_go_when_a_new_one_begins(tmp_path: Path) -> None:
    """What its checkpoint needed was the first file; the new run has the name for one of its own."""
    place, held = tmp_path / "store", tmp_path / "run" / "checkpoints"
    store = on_disk(place).updated({c: stored(0.0) for c in range(3)})
    (held / "1").mkdir(parents=True)
    store.pin(held / "1")
    shutil.rmtree(tmp_path / "run")
    del store
    gc.collect()
    again = on_disk(place)
    again.shelf.begin()
    again = again.updated({0: stored(1.0)})
    assert logs(place) == {"rows-000001": 1}
    assert value(again, 0) == 1.0


# ---- checkpoints, crashes, damage


def run_of(path: Path, rounds: int = 3, method: Any = None, **options: Any) -> tuple[Federation, list[State]]:
    """Three rounds of error feedback over the store, with a checkpoint after each but the last."""
    fed = cases.federation(method or ErrorFeedback(), "small", store=f"disk:{path / 'store'}", **options)
    states = []
    for state, _ in fed.run(rounds):
        if state.round < rounds:
            checkpoint.commit(state, path / "checkpoints")
        states.append(state)
    return fed, states


def gone_on(path: Path, done: int, rounds: int) -> State:
    fed = cases.federation(ErrorFeedback(), "small", store=f"disk:{path / 'store'}")
    state, _ = checkpoint.read(path / "checkpoints" / f"round-{done:06d}", fed)
    return cases.states(fed, rounds - done, state)[-1]


CHILD = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_store import run_of
found = run_of(Path({path!r}))
if {crash}:
    import os
    os._exit(9)
print("ready", flush=True)
sys.stdin.read()
"""


def child(path: Path, crash: bool) -> subprocess.Popen[str]:
    """Another process with the run of `run_of`: it dies, or stays, with the third round not checkpointed."""
    code = CHILD.format(tests=str(Path(__file__).parent), path=str(path), crash=crash)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("crashed")
    with child(path, crash=True) as process:
        assert process.wait() == 9
    return path


@pytest.fixture
def left(crashed: Path, tmp_path: Path) -> Path:
    """What a process that died in its third round, after two checkpoints, left behind."""
    shutil.copytree(crashed, tmp_path / "left")
    return tmp_path / "left"


def content(folder: Path) -> dict[str, bytes]:
    """But for the lock, which says who is at it."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("done", [1, 2])
def test_a_crash_between_two_checkpoints_loses_nothing(done: int, left: Path) -> None:
    expected = cases.states(cases.federation(ErrorFeedback(), "small"), 5)[-1]
    assert cases.everything(gone_on(left, done, 5)) == cases.everything(expected)


def test_a_checkpoint_says_where_rows_are_and_holds_none(left: Path) -> None:
    for path in checkpoint.committed(left / "checkpoints"):
        assert sorted(file.name for file in path.iterdir()) == [
            "MANIFEST.json", "model.safetensors", "server.safetensors", "state.json",
        ]  # fmt: skip


@pytest.mark.parametrize("torn", [b"\0" * 1000, b"LAMROW1\0 and so on", "half"])
def test_a_tail_torn_by_a_crash_is_no_damage(torn: bytes | str, left: Path) -> None:
    (log,) = (left / "store").glob("*.log")
    blob = log.read_bytes()
    log.write_bytes(blob[:-100] if torn == "half" else blob + torn)
    expected = cases.states(cases.federation(ErrorFeedback(), "small"), 5)[-1]
    assert cases.everything(gone_on(left, 2, 5)) == cases.everything(expected)


def test_what_no_checkpoint_refers_to_goes_with_the_run_that_made_it(left: Path) -> None:
    """Checkpoints of rounds 4 and 5 replace those of 1 and 2, and with them their rows."""
    fed = cases.federation(ErrorFeedback(), "small", store=f"disk:{left / 'store'}", cohort="all")
    start, _ = checkpoint.read(left / "checkpoints" / "round-000002", fed)
    for state, _ in fed.run(3, start):
        checkpoint.commit(state, left / "checkpoints")
    assert list(logs(left / "store")) == ["rows-000001", "rows-000002"]  # `start` still refers to the first
    del start
    checkpoint.commit(state, left / "checkpoints")
    assert list(logs(left / "store")) == ["rows-000002"]


def flipped(path: Path, at: int) -> None:
    blob = bytearray(path.read_bytes())
    blob[at] ^= 1
    path.write_bytes(blob)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a row": lambda store: flipped(store / "rows-000001.log", 64 + 64 + 3),
    "a head": lambda store: flipped(store / "rows-000001.log", 2),
    "a length": lambda store: flipped(store / "rows-000001.log", 27),
    "cut": lambda store: os.truncate(store / "rows-000001.log", 100),
    "gone": lambda store: (store / "rows-000001.log").unlink(),
    "no store.json": lambda store: (store / "store.json").unlink(),
    "store.json": lambda store: flipped(store / "store.json", 120),
    "checkpoints.json": lambda store: flipped(store / "checkpoints.json", 120),
    "no checkpoints.json": lambda store: (store / "checkpoints.json").unlink(),
    "store.json twice": lambda store: shutil.copy(store / "store.json", store / "checkpoints.json"),
    "checkpoints.json twice": lambda store: shutil.copy(store / "checkpoints.json", store / "store.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_refused_at_construction_and_left_as_it_is(damage: str, left: Path) -> None:
    DAMAGES[damage](left / "store")
    before = content(left)
    with pytest.raises(StorageError, match="is damaged") as caught:
        cases.federation(ErrorFeedback(), "small", store=f"disk:{left / 'store'}")
    assert caught.value.code == "E404"
    assert caught.value.remedy
    assert content(left) == before
    if damage == "a row":
        assert "client '" in caught.value.message
        assert "rows-000001.log" in caught.value.message


OTHERS: dict[str, tuple[Any, str, str]] = {
    "model": (ErrorFeedback(), "dropout", r"of another model: [a-z0-9]+\.weight is"),
    "precision": (ErrorFeedback(), "double", r"of another model: [a-z0-9]+\.weight is"),
    "method": (Scaffold(), "small", r"of another method: what its clients remember between rounds is not"),
    "stateless": (FedAvg(), "small", "of another method"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_store_of_another_model_or_method_is_refused_at_construction(other: str, left: Path) -> None:
    method, model, message = OTHERS[other]
    before = content(left)
    with pytest.raises(StorageError, match=message) as caught:
        cases.federation(method, model, store=f"disk:{left / 'store'}")
    assert caught.value.code == "E405"
    assert caught.value.remedy
    assert not re.search("Row|dict|Client\\(", str(caught.value))
    assert content(left) == before


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(StorageError, match=r"holds something else: thesis\.txt") as caught:
        cases.case("errorfeedback", store=f"disk:{tmp_path}")
    assert caught.value.code == "E405"
    with pytest.raises(StorageError, match="a file is where a folder should be"):
        cases.case("errorfeedback", store=f"disk:{tmp_path / 'thesis.txt'}")


def test_a_row_that_is_damaged_while_a_run_goes_names_client_and_file(tmp_path: Path) -> None:
    _, states = run_of(tmp_path)
    (log,) = (tmp_path / "store").glob("*.log")
    flipped(log, 64 + 5)
    store = states[0].clients
    first = next(c for c in store if store.entry(c).place.offset == 0)
    states[0].clients.shelf._cache.clear()
    with pytest.raises(
        StorageError, match=rf"rows-000001\.log is damaged: the row of client '{tuple(cases.SIZES)[first]}'"
    ):
        store.get(first)


def test_a_new_run_does_not_take_the_rows_of_another_for_its_own(left: Path) -> None:
    before = content(left)
    fed = cases.federation(ErrorFeedback(), "small", store=f"disk:{left / 'store'}")
    with pytest.raises(StorageError, match="another run, which its checkpoint") as caught:
        next(fed.run(1))
    assert caught.value.code == "E402"
    assert "resume" in str(caught.value.remedy)
    assert content(left) == before
    with pytest.raises(StorageError, match="another run, which its checkpoint"):
        fed.fit(1, left / "run", progress=False)
    assert content(left) == before
    assert not (left / "run").exists()


def test_a_new_run_takes_the_place_of_rows_that_no_checkpoint_needs(tmp_path: Path) -> None:
    options = {"store": f"disk:{tmp_path}"}
    first = cases.states(cases.case("errorfeedback", **options), 2)
    second = cases.states(cases.case("errorfeedback", **options), 2)
    assert cases.everything(first[-1]) == cases.everything(second[-1])


def test_a_crash_while_a_store_is_made_leaves_a_path_for_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it dies in is the second of two files, store.json."""

    def dies(path: Path, blob: bytes) -> None:
        if path.name == "store.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replaced(path, blob)

    replaced = disk.replace
    with monkeypatch.context() as patch:
        patch.setattr(disk, "replace", dies)
        with pytest.raises(StorageError, match="cannot be stored"):
            on_disk(tmp_path).updated({1: stored(1.0)})
    gc.collect()
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["checkpoints.json"]
    assert value(on_disk(tmp_path).updated({1: stored(1.0)}), 1) == 1.0


@pytest.mark.parametrize("hidden", [True, False], ids=["rmtree", "rm *"])
def test_a_federation_begins_anew_when_run_and_store_were_deleted(hidden: bool, tmp_path: Path) -> None:
    """What the refusal of a second run says one may do; `rm store/*` leaves the lock file where it is."""
    fed, states = run_of(tmp_path)
    expected = cases.everything(states[-1])
    with pytest.raises(StorageError, match=r"delete .*checkpoints and .*store") as caught:
        next(fed.run(1))
    assert caught.value.code == "E402"
    shutil.rmtree(tmp_path / "checkpoints")
    if hidden:
        shutil.rmtree(tmp_path / "store")
    else:
        for path in (tmp_path / "store").glob("[!.]*"):
            path.unlink()
    again = []
    for state, _ in fed.run(3):
        checkpoint.commit(state, tmp_path / "checkpoints")
        again.append(state)
    assert cases.everything(again[-1]) == expected
    del fed, states, again, state, caught
    gc.collect()
    assert cases.everything(gone_on(tmp_path, 2, 3)) == expected


def test_a_federation_writes_into_a_store_that_was_put_back_from_a_copy(left: Path) -> None:
    """The file that it was writing to is nowhere any more."""
    expected = [cases.everything(s) for s in cases.states(cases.federation(ErrorFeedback(), "small"), 4)]
    shutil.copytree(left / "store", left / "copy")
    fed = cases.federation(ErrorFeedback(), "small", store=f"disk:{left / 'store'}")
    start, _ = checkpoint.read(left / "checkpoints" / "round-000002", fed)
    next(fed.run(1, start))
    shutil.rmtree(left / "store")
    (left / "copy").rename(left / "store")
    fed.store.shelf.claim()
    start, _ = checkpoint.read(left / "checkpoints" / "round-000002", fed)
    for state, _ in fed.run(1, start):
        checkpoint.commit(state, left / "checkpoints")
    assert cases.everything(state) == expected[2]
    del fed, start, state
    gc.collect()
    assert cases.everything(gone_on(left, 3, 4)) == expected[3]


def test_the_checkpoint_of_a_run_on_disk_needs_its_store(left: Path, tmp_path: Path) -> None:
    place = left / "checkpoints" / "round-000002"
    with pytest.raises(StorageError, match="in a store on disk") as caught:
        checkpoint.read(place, cases.federation(ErrorFeedback(), "small"))
    assert caught.value.code == "E405"
    with pytest.raises(StorageError, match="belongs to another store") as caught:
        checkpoint.read(place, cases.federation(ErrorFeedback(), "small", store=f"disk:{tmp_path / 'other'}"))
    assert caught.value.code == "E405"


def test_a_checkpoint_from_memory_goes_on_on_disk(tmp_path: Path) -> None:
    whole = cases.states(cases.case("fedlama, scaffold"))
    path = checkpoint.commit(whole[1], tmp_path / "checkpoints")
    fed = cases.case("fedlama, scaffold", store=f"disk:{tmp_path / 'store'}")
    state, _ = checkpoint.read(path, fed)
    assert cases.everything(cases.states(fed, cases.ROUNDS - 2, state)[-1]) == cases.everything(whole[-1])


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Path]:
    """A store that another process is at."""
    with child(tmp_path, crash=False) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield tmp_path
        process.communicate("")


def test_a_second_process_may_look_but_not_write(busy: Path) -> None:
    before = content(busy)
    fed = cases.federation(ErrorFeedback(), "small", store=f"disk:{busy / 'store'}")
    state, _ = checkpoint.read(busy / "checkpoints" / "round-000002", fed)
    assert len(cases.everything(state)["rows"]) >= 3
    for started in (None, state):
        with pytest.raises(StorageError, match="another process") as caught:
            next(fed.run(1, started))
        assert caught.value.code == "E406"
    assert content(busy) == before


def test_where_there_are_no_locks_the_process_that_is_named_must_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process 1 always does. Who lets go of the store says so."""

    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    store = on_disk(tmp_path).updated({1: stored(1.0)})
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    del store
    gc.collect()
    assert (tmp_path / ".lock").read_bytes() == b""
    named = json.dumps({"pid": 1, **lock._machine()})
    (tmp_path / ".lock").write_text(named)
    with pytest.raises(StorageError, match="another process is at it") as caught:
        on_disk(tmp_path).updated({1: stored(1.0)})
    assert caught.value.code == "E406"
    assert (tmp_path / ".lock").read_text() == named


def looking(path: Path) -> Federation:
    """A federation as in a process of its own: with a shelf of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "_shelves", {})
        return cases.federation(ErrorFeedback(), "small", store=f"disk:{path / 'store'}")


def test_who_looked_before_there_was_a_store_sees_every_checkpoint_of_it(tmp_path: Path) -> None:
    """Three rounds go into one file: it is longer every time."""
    watching = looking(tmp_path)
    fed = cases.federation(ErrorFeedback(), "small", store=f"disk:{tmp_path / 'store'}")
    assert watching.store.shelf is not fed.store.shelf
    seen = []
    for state, _ in fed.run(3):
        found, _ = checkpoint.read(checkpoint.commit(state, tmp_path / "checkpoints"), watching)
        assert cases.everything(found) == cases.everything(state)
        seen.append(found)  # so the file is still known at the next look
    assert len(logs(tmp_path / "store")) == 1


@pytest.mark.parametrize("kept", [False, True], ids=["gone", "needed less"])
def test_who_looks_does_not_miss_what_the_one_who_writes_deletes_meanwhile(
    kept: bool, left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between reading what is needed and reading that, a checkpoint and its segment go; or the newer of two goes, and
    the rest of the segment with it."""
    pins = left / "store" / "checkpoints.json"
    log = left / "store" / "rows-000001.log"
    needed = disk.unsealed(pins, "checkpoints")["checkpoints"]
    older = needed["../checkpoints/round-000001"]["1"]
    assert older < needed["../checkpoints/round-000002"]["1"]
    read = disk.verify
    ends: list[int] = []

    def late(path: Path, end: int, names: tuple[str, ...]) -> None:
        if not ends and kept:
            os.truncate(log, older)
            needed.pop("../checkpoints/round-000002")
            disk.replace(pins, disk.sealed({"checkpoints": needed}))
        elif not ends:
            disk.replace(pins, disk.sealed({"checkpoints": {}}))
            log.unlink()
        ends.append(end)
        read(path, end, names)

    monkeypatch.setattr(disk, "verify", late)
    looking(left)
    assert ends[1:] == ([older] if kept else [])
    if kept:
        flipped(log, 64 + 5)
        with pytest.raises(StorageError, match="does not match its checksum"):
            looking(left)


def test_two_federations_of_one_process_share_a_store(tmp_path: Path) -> None:
    first = cases.case("scaffold", store=f"disk:{tmp_path}")
    second = cases.case("scaffold", store=f"disk:{tmp_path}")
    assert first.store.shelf is second.store.shelf
    states = [next(fed.run(1))[0] for fed in (first, second)]
    assert cases.everything(states[0]) == cases.everything(states[1])


@pytest.mark.usefixtures("small_segments")
def test_of_federations_of_two_models_one_has_the_path(tmp_path: Path) -> None:
    """None has begun when the third is made: it shares with the first, whose rows stay and whose lock is held on to."""
    store = f"disk:{tmp_path}"
    made = [cases.federation(ErrorFeedback(), model, store=store) for model in ("small", "dropout", "small")]
    first, other, third = made
    assert first.store.shelf is third.store.shelf
    state = cases.states(first, 2)[-1]
    expected = cases.everything(state)
    with pytest.raises(StorageError, match="of another model") as caught:
        next(other.run(1))
    assert caught.value.code == "E405"
    cases.states(third, 2)
    shelf: Any = first.store.shelf
    shelf._cache.clear()
    assert cases.everything(state) == expected
    del made, other, third, caught
    gc.collect()
    assert shelf._lock is not None
    assert os.path.samestat(os.fstat(shelf._lock), (tmp_path / ".lock").stat())


def test_a_store_and_its_checkpoints_can_be_moved_together(left: Path, tmp_path: Path) -> None:
    moved = left.rename(tmp_path / "moved")
    expected = cases.states(cases.federation(ErrorFeedback(), "small"), 4)[-1]
    assert cases.everything(gone_on(moved, 2, 4)) == cases.everything(expected)


def test_a_relative_path_is_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cases.states(cases.case("errorfeedback", store="disk:a/b"), 1)
    assert (tmp_path / "a" / "b" / "store.json").exists()


SMALL = (
    "engine=loop",
    "model.widths=[64, 12, 10]",
    "data.clients=6",
    "cohort=3",
    "method=errorfeedback",
    "uplink=topk:0.1",
)


def test_where_clients_are_changes_nothing_else_of_an_experiment(tmp_path: Path) -> None:
    memory, on_disk = (config.load("quickstart", (*SMALL, *more), {}) for more in ((), ("store=disk:a b/c",)))
    assert on_disk.store == "disk:a b/c"
    assert (on_disk.sha256, on_disk.settings) == (memory.sha256, memory.settings)
    (tmp_path / "again.toml").write_text(config.to_toml(on_disk))
    assert config.load(tmp_path / "again.toml", (), {}).store == "disk:a b/c"
    with pytest.raises(ConfigError, match="expected 'memory' or 'disk:PATH'") as caught:
        config.load("quickstart", ("store=ram",), {})
    assert caught.value.where == "command line, argument 2"  # after the target


def test_a_run_with_clients_on_disk_is_resumed_to_the_result_of_one_in_memory(tmp_path: Path) -> None:
    def run(name: str, rounds: int) -> runs.Run:
        store = (f"store=disk:{tmp_path / name / 'clients'}",) if name == "disk" else ()
        made = config.load("quickstart", (*SMALL, f"rounds={rounds}", *store), {})
        return runs.fit(config.build(made), rounds, tmp_path / name, config=made, progress=False)

    expected = run("memory", 4)
    run("disk", 2)
    found = runs.resume(tmp_path / "disk", 4, progress=False)
    assert found.info["final_sha256"] == expected.info["final_sha256"]
    assert cases.everything(runs.Run.open(tmp_path / "disk").state) == cases.everything(expected.state)
