"""Checkpoints: there whole or not at all, and never taken for those of another run."""

from __future__ import annotations

import errno
import gc
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import cases
from lamina import (
    ErrorFeedback,
    FedAvg,
    FedAvgM,
    Federation,
    FedLAMA,
    LocalOnly,
    Scaffold,
    State,
    StorageError,
    checkpoint,
    wire,
)


def states(rounds: int = 2, method: Any = None) -> list[State]:
    return cases.states(cases.federation(method or FedLAMA(phi=2)), rounds)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_a_folder_of_safetensors_and_json(tmp_path: Path) -> None:
    (state,) = states(1)
    path = checkpoint.commit(state, tmp_path / "checkpoints", {"rows": 7})
    assert path == tmp_path / "checkpoints" / "round-000001"
    assert names(path) == [
        "MANIFEST.json",
        "clients.safetensors",
        "model.safetensors",
        "server.safetensors",
        "state.json",
    ]
    json.loads((path / "state.json").read_text())
    assert checkpoint.read(path, cases.federation(FedLAMA(phi=2)))[1] == {"rows": 7}


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    for name in ("fedlama, scaffold", "errorfeedback, fedavgm", "localonly"):
        state = cases.states(cases.case(name, buffers="keep"), 5)[-1]
        again, _ = checkpoint.read(checkpoint.commit(state, tmp_path / name), cases.case(name, buffers="keep"))
        assert cases.everything(again) == cases.everything(state)
        assert type(again.server) is type(state.server)
        row, other = (s.clients.get(next(iter(s.clients))).row for s in (state, again))
        assert type(other) is type(row)
        assert type(other.method) is type(row.method)


def test_the_parameters_sent_before_are_kept_where_their_distance_goes_down(tmp_path: Path) -> None:
    fed = cases.federation(FedLAMA(phi=2), downlink=wire.Dense("lossless"))
    path = checkpoint.commit(cases.states(fed, 3)[-1], tmp_path)
    past = [key for key in load_file(path / "model.safetensors") if key.startswith("past/")]
    assert sorted(past) == sorted(f"past/{i}/{name}" for i in (0, 1) for name in fed.initial.params)
    again, _ = checkpoint.read(path, fed)
    assert [list(version.params) for version in again.past] == [list(fed.initial.params)] * 2


def test_a_checkpoint_of_before_they_were_kept_is_read(tmp_path: Path) -> None:
    """The run goes on without them, and its model is the same."""
    fed = cases.federation(FedLAMA(phi=2), downlink=wire.Dense("lossless"))
    *_, second, third = cases.states(fed, 3)
    path = checkpoint.commit(second, tmp_path)
    document = json.loads((path / "state.json").read_text())
    del document["past"]
    (path / "state.json").write_text(json.dumps(document))
    hashes = json.loads((path / "MANIFEST.json").read_text())["sha256"]
    hashes["state.json"] = hashlib.sha256((path / "state.json").read_bytes()).hexdigest()
    (path / "MANIFEST.json").write_text(json.dumps({"version": 1, "sha256": hashes}))  # without a parent, too
    again, _ = checkpoint.read(path, fed)
    assert again.past == ()
    assert cases.learned(cases.states(fed, 1, again)[-1]) == cases.learned(third)


def test_a_state_before_the_first_round_can_be_kept(tmp_path: Path) -> None:
    from lamina.store import ClientStore

    fed = cases.federation(FedLAMA(phi=2))
    state = State(*fed.initial, fed.method.init(fed.initial.params), ClientStore())
    again, extra = checkpoint.read(checkpoint.commit(state, tmp_path), fed)
    assert cases.everything(again) == cases.everything(state)
    assert extra == {}


@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_the_state_after_any_round_can_be_kept(done: int, tmp_path: Path) -> None:
    """After round 2 the reference of the inertia curve *is* the model: two names for the same tensors."""
    state = states(done)[-1]
    again, _ = checkpoint.read(checkpoint.commit(state, tmp_path), cases.federation(FedLAMA(phi=2)))
    assert cases.everything(again) == cases.everything(state)


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    (state, *_) = states(1)
    for n in range(1, 5):
        checkpoint.commit(renumbered(state, n), tmp_path)
    assert names(tmp_path) == ["round-000003", "round-000004"]
    assert [path.name for path in checkpoint.committed(tmp_path)] == names(tmp_path)
    assert checkpoint.latest(tmp_path) == tmp_path / "round-000004"


def renumbered(state: State, n: int) -> State:
    from dataclasses import replace

    return replace(state, round=n)


def test_what_was_just_written_is_never_what_is_dropped(tmp_path: Path) -> None:
    """A run that went back, or begins anew, writes a round before those that are there."""
    (state,) = states(1)
    for n in (10, 11):
        checkpoint.commit(renumbered(state, n), tmp_path)
    path = checkpoint.commit(renumbered(state, 3), tmp_path)
    assert checkpoint.intact(path)


def test_without_a_checkpoint_there_is_no_latest(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None


@pytest.mark.parametrize("step", range(9))
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_leaves_the_earlier_checkpoints_and_nothing_else(
    step: int, error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th flush to the disk or rename fails: five files, the folder, the rename, the parent folder."""
    first, second = states(2)
    checkpoint.commit(first, tmp_path)
    calls = {"n": -1}

    def failing(real):
        def call(*arguments: Any) -> Any:
            calls["n"] += 1
            if calls["n"] == step:
                raise OSError(error, os.strerror(error))
            return real(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(Path, "rename", failing(Path.rename))
    if step == 8:  # nothing fails
        checkpoint.commit(second, tmp_path)
    else:
        with pytest.raises(StorageError, match=os.strerror(error)) as caught:
            checkpoint.commit(second, tmp_path)
        assert caught.value.code == "E401"
        assert "round 2" in caught.value.message
    assert not [name for name in names(tmp_path) if name.startswith(".")]
    assert checkpoint.intact(tmp_path / "round-000001")
    assert all(checkpoint.intact(path) for path in checkpoint.committed(tmp_path))


@pytest.mark.parametrize("step", range(9))
def test_a_disk_that_fails_leaves_the_rows_on_disk_that_earlier_checkpoints_need(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th flush fails: the log, what the store keeps for checkpoints and its folder, four files, the checkpoint's
    folder; and the one above it after the rename. Then the process ends, and another goes on from what is there."""

    def make() -> Federation:
        return cases.federation(Scaffold(), "small", store=f"disk:{tmp_path / 'clients'}")

    folder = tmp_path / "checkpoints"
    expected = [cases.everything(state) for state in cases.states(cases.federation(Scaffold(), "small"), 3)]
    first, second = cases.states(make(), 2)
    checkpoint.commit(first, folder)
    calls = itertools.count()
    sync = os.fsync

    def failing(handle: int) -> None:
        if next(calls) == step:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StorageError, match="round 2") as caught:
        checkpoint.commit(second, folder)
    assert caught.value.code == "E401"
    monkeypatch.undo()
    del first, second, caught
    gc.collect()
    fed = make()
    state, _ = checkpoint.read(folder / "round-000001", fed)
    assert cases.everything(state) == expected[0]
    assert [cases.everything(s) for s in cases.states(fed, 2, state)] == expected[1:]


def test_what_a_crash_left_behind_is_ignored_and_replaced(tmp_path: Path) -> None:
    first, second = states(2)
    path = checkpoint.commit(first, tmp_path)
    half = tmp_path / ".round-000002.tmp"
    shutil.copytree(path, half)
    (half / "state.json").write_text("{")
    assert checkpoint.latest(tmp_path) == path
    checkpoint.commit(second, tmp_path)
    assert names(tmp_path) == ["round-000001", "round-000002"]


def test_what_a_crash_left_of_an_older_checkpoint_goes_and_what_it_needed(tmp_path: Path) -> None:
    """Killed while it deleted the one of round 1, and while it wrote that of another round: both are in the way of
    nobody, and no row is kept for them."""
    folder = tmp_path / "checkpoints"
    fed = cases.federation(Scaffold(), "small", store=f"disk:{tmp_path / 'clients'}")
    run = fed.run(4)
    for _ in range(2):
        checkpoint.commit(next(run)[0], folder)
    (folder / "round-000001" / "MANIFEST.json").unlink()
    shutil.copytree(folder / "round-000002", folder / ".round-000009.tmp")
    for _ in range(2):
        checkpoint.commit(next(run)[0], folder)
    assert names(folder) == ["round-000003", "round-000004"]
    pins = json.loads((tmp_path / "clients" / "checkpoints.json").read_bytes().partition(b"\n")[2])
    assert sorted(pins["checkpoints"]) == ["../checkpoints/round-000003", "../checkpoints/round-000004"]


@pytest.mark.parametrize("file", ["model.safetensors", "server.safetensors", "clients.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_file_is_noticed_and_the_one_before_is_used(file: str, damage: str, tmp_path: Path) -> None:
    first, second = states(2)
    older, newer = (checkpoint.commit(state, tmp_path) for state in (first, second))
    blob = bytearray((newer / file).read_bytes())
    if damage == "gone":
        (newer / file).unlink()
    elif damage == "cut":
        (newer / file).write_bytes(blob[: len(blob) // 2])
    else:
        blob[len(blob) // 2] ^= 0x01
        (newer / file).write_bytes(blob)
    assert checkpoint.latest(tmp_path) == older
    with pytest.raises(StorageError) as caught:
        checkpoint.read(newer, cases.federation(FedLAMA(phi=2)))
    assert caught.value.code == "E404"


def test_a_digit_changed_in_the_json_is_damage(tmp_path: Path) -> None:
    """One flipped bit makes a 2 a 3, and the file is JSON as before: a round, a count of bytes, a tag."""
    *_, state = states(2)
    path = checkpoint.commit(state, tmp_path)
    text = (path / "state.json").read_text()
    places = [i for i, c in enumerate(text) if c in "12345678"]
    for place in places[:: len(places) // 40]:
        other = chr(ord(text[place]) ^ 1) if text[place] != "1" else "3"
        (path / "state.json").write_text(text[:place] + other + text[place + 1 :])
        assert not checkpoint.intact(path), text[max(0, place - 40) : place + 20]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (FedAvg(), FedAvgM()),
        (FedAvgM(), FedAvg()),
        (FedAvgM(), Scaffold()),
        (FedLAMA(phi=2), FedAvg()),
        (ErrorFeedback(), LocalOnly()),
        (LocalOnly(), ErrorFeedback()),
    ],
)
def test_the_checkpoint_of_another_method_is_refused(written: Any, read: Any, tmp_path: Path) -> None:
    path = checkpoint.commit(cases.states(cases.federation(written, model="small"), 1)[-1], tmp_path)
    with pytest.raises(StorageError) as caught:
        checkpoint.read(path, cases.federation(read, model="small"))
    assert caught.value.code == "E405"
    assert "another model or method" in caught.value.message
    assert not re.search("Error|fields|Client", caught.value.message)
    assert "that the run was begun with" in str(caught.value.remedy)


@pytest.mark.parametrize("other", ["small", "dropout", "wider"])
def test_the_checkpoint_of_another_model_is_refused_and_the_layer_named(other: str, tmp_path: Path) -> None:
    path = checkpoint.commit(cases.states(cases.federation(model="small"), 1)[-1], tmp_path)
    if other == "wider":
        fed = Federation(lambda: cases.mlp((64, 7, 6, 4)), cases.data(), engine="loop")
    else:
        fed = cases.federation(model="odd" if other == "small" else other)
    with pytest.raises(StorageError, match=r"another model: [a-z0-9]+\.(weight|bias)") as caught:
        checkpoint.read(path, fed)
    assert caught.value.code == "E405"


def test_the_checkpoint_of_another_precision_is_refused(tmp_path: Path) -> None:
    half = Federation(cases.small, cases.data(), engine="loop")
    double = Federation(lambda: cases.small().double(), cases.data(torch.float64), engine="loop")
    path = checkpoint.commit(cases.states(half, 1)[-1], tmp_path)
    with pytest.raises(StorageError) as caught:
        checkpoint.read(path, double)
    assert caught.value.code == "E405"


def test_the_checkpoint_of_a_model_with_other_buffers_is_refused(tmp_path: Path) -> None:
    from torch import nn

    def model(buffers: bool) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4, track_running_stats=buffers))

    with_, without = (Federation(lambda b=b: model(b), cases.data(), engine="loop") for b in (True, False))
    path = checkpoint.commit(cases.states(without, 1)[-1], tmp_path)
    with pytest.raises(StorageError) as caught:
        checkpoint.read(path, with_)
    assert caught.value.code == "E405"


def test_the_checkpoint_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_VERSION", 2)
    path = checkpoint.commit(states(1)[-1], tmp_path)
    monkeypatch.undo()
    with pytest.raises(StorageError, match="version 2, this lamina reads 1") as caught:
        checkpoint.read(path, cases.federation(FedLAMA(phi=2)))
    assert caught.value.code == "E405"


# ---- the chain


def chain(folder: Path, rounds: int = 3, **options: Any) -> list[Path]:
    (state,) = states(1)
    return [checkpoint.commit(renumbered(state, n), folder, **options) for n in range(1, rounds + 1)]


def manifest(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "MANIFEST.json").read_text())
    return found


def hash_of(path: Path) -> str:
    return hashlib.sha256((path / "MANIFEST.json").read_bytes()).hexdigest()


def test_a_manifest_names_the_one_before_by_its_hash(tmp_path: Path) -> None:
    _, second, third = chain(tmp_path)
    assert names(tmp_path) == ["round-000002", "round-000003"]
    assert manifest(second)["parent"]["round"] == 1
    assert manifest(third)["parent"] == {"round": 2, "sha256": hash_of(second)}
    assert manifest(third)["round"] == 3
    assert checkpoint.unlinked(third) is None


def test_the_first_has_none_before_it(tmp_path: Path) -> None:
    (first,) = chain(tmp_path, 1)
    assert (manifest(first)["parent"], manifest(first)["best"]) == (None, None)


def test_the_best_is_kept_beside_the_newest_two(tmp_path: Path) -> None:
    (state,) = states(1)
    for n, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
        last = checkpoint.commit(renumbered(state, n), tmp_path, best=best)
    assert names(tmp_path) == ["round-000002", "round-000004", "round-000005"]
    assert manifest(last)["best"] == {"round": 2, "sha256": hash_of(tmp_path / "round-000002")}
    checkpoint.commit(renumbered(state, 6), tmp_path, best=6)
    assert names(tmp_path) == ["round-000005", "round-000006"]


def test_what_went_on_from_an_older_one_names_that_and_keeps_it(tmp_path: Path) -> None:
    """Round 3 is damaged; whoever goes on from 2 must not throw 2 away for 3."""
    *_, second, third = chain(tmp_path)
    (third / "model.safetensors").write_bytes(b"")
    (state,) = states(1)
    fourth = checkpoint.commit(renumbered(state, 4), tmp_path, after=2)
    assert names(tmp_path) == ["round-000002", "round-000004"]
    assert manifest(fourth)["parent"] == {"round": 2, "sha256": hash_of(second)}


def test_another_checkpoint_in_the_place_of_the_one_before_breaks_the_chain(tmp_path: Path) -> None:
    """Whole in itself, and made by a run with another learning rate, say."""
    *_, second, third = chain(tmp_path / "mine")
    (other,) = cases.states(cases.federation(FedLAMA(phi=2), seed=8), 1)
    checkpoint.commit(renumbered(other, 2), tmp_path / "other")
    shutil.rmtree(second)
    shutil.copytree(tmp_path / "other" / "round-000002", second)
    assert checkpoint.intact(second)
    assert checkpoint.unlinked(third) == "round-000002 is not the one that it goes on from"


def test_a_checkpoint_under_the_name_of_another_is_none(tmp_path: Path) -> None:
    *_, third = chain(tmp_path)
    third.rename(tmp_path / "round-000007")
    assert not checkpoint.intact(tmp_path / "round-000007")


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    """One bit of it is flipped; R5 of the reliability table tries all eight."""
    (path,) = chain(tmp_path, 1)
    file = path / "MANIFEST.json"
    blob = file.read_bytes()
    for at in range(len(blob)):
        file.write_bytes(blob[:at] + bytes([blob[at] ^ (1 << at % 8)]) + blob[at + 1 :])
        assert not checkpoint.intact(path), at
    file.write_bytes(blob)
    assert checkpoint.intact(path)


def test_a_checkpoint_of_an_earlier_lamina_is_the_parent_of_one_of_this(tmp_path: Path) -> None:
    _, second = chain(tmp_path, 2)
    (second / "MANIFEST.json").write_text(json.dumps({"version": 1, "sha256": manifest(second)["sha256"]}))
    assert checkpoint.intact(second)
    (state,) = states(1)
    third = checkpoint.commit(renumbered(state, 3), tmp_path)
    assert manifest(third)["parent"] == {"round": 2, "sha256": hash_of(second)}
    assert checkpoint.unlinked(third) is None


def test_one_that_goes_is_none_from_its_first_file_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it is deleted, as if nothing could be deleted behind the first file."""
    first, second = chain(tmp_path, 2)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    checkpoint._remove(first)
    assert first.is_dir()
    assert checkpoint.committed(tmp_path) == [second]


def test_a_checkpoint_of_before_the_reference_had_a_file_is_read_and_compared(tmp_path: Path) -> None:
    fed = cases.federation(Scaffold(), "small")
    *_, state = cases.states(fed, 4)
    path = checkpoint.commit(state, tmp_path)
    reference = load_file(path / "reference.safetensors")
    with_it = load_file(path / "model.safetensors") | {f"reference/{name}": x for name, x in reference.items()}
    save_file(with_it, path / "model.safetensors")
    (path / "reference.safetensors").unlink()
    made = {key: value for key, value in manifest(path).items() if key != "own"}
    model = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    made["sha256"] = {name: sha for name, sha in made["sha256"].items() if name != "reference.safetensors"}
    made["sha256"]["model.safetensors"] = model
    (path / "MANIFEST.json").write_bytes(checkpoint.summed(made))
    assert checkpoint.intact(path)
    assert cases.everything(checkpoint.read(path, fed)[0]) == cases.everything(state)
    assert checkpoint.differences(state, path) == []


def test_a_state_is_compared_with_a_checkpoint_to_the_bit(tmp_path: Path) -> None:
    first, second = cases.states(cases.federation(Scaffold(), "small"), 2)
    path = checkpoint.commit(first, tmp_path)
    assert checkpoint.differences(first, path) == []
    files = ["clients.safetensors", "model.safetensors", "server.safetensors", "state.json"]
    assert sorted(checkpoint.differences(second, path)) == files
    name = next(iter(first.params))
    first.params[name].view(-1)[0].nextafter_(torch.tensor(9.0))
    assert checkpoint.differences(first, path) == ["model.safetensors"]


# ---- rows that an earlier checkpoint has


def one_a_round() -> Federation:
    """SCAFFOLD with one of five clients in a round, so most rows stay as they were."""
    return cases.federation(Scaffold(), "small", cohort=1)


def partly(rounds: int, state: State | None = None) -> list[State]:
    return cases.states(one_a_round(), rounds, state)


def rows_in(file: Path) -> set[int]:
    return {int(key.partition("/")[0]) for key in load_file(file)}


def inodes(path: Path) -> set[int]:
    return {file.stat().st_ino for file in path.iterdir()}


def test_a_row_is_written_twice_and_then_linked(tmp_path: Path) -> None:
    """By the commit after its client's round and the one after that, however many come then; a third time where three
    quarters of its file are needed no more."""
    changed: list[int] = []
    written = 0
    for state, record in one_a_round().run(20):
        path = checkpoint.commit(state, tmp_path)
        changed += record.cohort
        fresh = rows_in(path / "clients.safetensors")
        assert {*changed[-2:]} <= fresh <= {*changed}
        written += len(fresh)
        assert cases.everything(checkpoint.read(path, one_a_round())[0]) == cases.everything(state)
    assert [*path.glob("clients-*.safetensors")]
    assert written < 20 * 3 < 20 * len(state.clients)


def test_the_newest_two_checkpoints_have_no_file_together(tmp_path: Path) -> None:
    for state in partly(10):
        checkpoint.commit(state, tmp_path, best=3 if state.round > 3 else None)
        *_, older, newer = [None, *checkpoint.committed(tmp_path)]
        if older is not None:
            assert not inodes(older) & inodes(newer)
    assert checkpoint.committed(tmp_path)[0].name == "round-000003"


def test_damage_to_a_linked_file_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    after = partly(9)
    for state in after:
        checkpoint.commit(state, tmp_path)
    older, newer = checkpoint.committed(tmp_path)
    file = next(newer.glob("clients-*.safetensors"))
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    file.write_bytes(blob)
    assert not checkpoint.intact(newer)
    assert checkpoint.latest(tmp_path) == older
    again, _ = checkpoint.read(older, one_a_round())
    assert cases.everything(again) == cases.everything(after[-2])


def test_what_was_damaged_is_written_again_and_not_linked(tmp_path: Path) -> None:
    """Every commit finds all files of the one before the last one damaged; the last one is whole."""
    for state in partly(12):
        newest = checkpoint.commit(state, tmp_path)
        assert checkpoint.intact(newest)
        for older in checkpoint.committed(tmp_path)[:-1]:
            for file in older.glob("*.safetensors"):
                blob = bytearray(file.read_bytes())
                blob[-1] ^= 1
                file.write_bytes(blob)
    assert cases.everything(checkpoint.read(newest, one_a_round())[0]) == cases.everything(state)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("back", range(1, 8))
def test_a_run_that_goes_back_links_nothing_that_it_cannot_read(seed: int, back: int, tmp_path: Path) -> None:
    """A file of later rounds has rows of clients that the earlier state does not know."""
    fed = cases.federation(Scaffold(), "small", cohort=1, seed=seed)
    after = cases.states(fed, 8)
    for state in after:
        checkpoint.commit(state, tmp_path)
    again, _ = checkpoint.read(checkpoint.commit(after[back - 1], tmp_path), fed)
    assert cases.everything(again) == cases.everything(after[back - 1])
    for state in cases.states(fed, 3, again):
        path = checkpoint.commit(state, tmp_path)
        assert cases.everything(checkpoint.read(path, fed)[0]) == cases.everything(state)
    assert back > 5 or cases.everything(state) == cases.everything(after[back + 2])


def test_an_old_file_that_cannot_be_read_is_not_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *before, last = partly(8)
    for state in before:
        checkpoint.commit(state, tmp_path)
    opened = Path.open

    def failing(path: Path, *mode: Any, **named: Any) -> Any:
        if path.parent.name == "round-000006" and path.suffix == ".safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, *mode, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing)
        path = checkpoint.commit(last, tmp_path)
    assert [name for name in names(path) if name.startswith("clients")] == ["clients.safetensors"]
    assert cases.everything(checkpoint.read(path, one_a_round())[0]) == cases.everything(last)


class Nothing(FedAvg):
    """Remembers a tensor without entries."""

    def init_client(self, params: Any) -> Any:
        return {"none": torch.empty(0)}


def test_a_row_of_tensors_without_entries_is_kept(tmp_path: Path) -> None:
    fed = cases.federation(Nothing(), "small", cohort=1)
    for state in cases.states(fed, 5):
        again, _ = checkpoint.read(checkpoint.commit(state, tmp_path), fed)
        assert {c: row.method["none"].shape for c, row in again.clients.rows.items()} == dict.fromkeys(
            state.clients, (0,)
        )


def test_the_reference_of_inertia_is_linked(tmp_path: Path) -> None:
    """It is the model after round 2 for ever after, and every second checkpoint has it in the same file."""
    files = []
    for state in partly(9):
        file = checkpoint.commit(state, tmp_path) / "reference.safetensors"
        if file.exists():
            files.append((file.stat().st_ino, file.read_bytes()))
    assert len(files) == 7
    assert len({content for _, content in files}) == 1
    assert [inode for inode, _ in files[2:]] == [inode for inode, _ in files[:-2]]
    assert files[0][0] != files[1][0]


def test_a_run_that_goes_on_links_what_it_read(tmp_path: Path) -> None:
    """And ends with what the run that never stopped ends with."""
    *_, last = partly(9)
    for state in partly(5):
        checkpoint.commit(state, tmp_path)
    again, _ = checkpoint.read(tmp_path / "round-000005", one_a_round())
    for state in partly(4, again):
        checkpoint.commit(state, tmp_path)
    newest = tmp_path / "round-000009"
    assert [*newest.glob("clients-*.safetensors")]
    there, _ = checkpoint.read(newest, one_a_round())
    assert cases.everything(there) == cases.everything(last)


def test_where_nothing_can_be_linked_rows_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    for state in partly(6):
        again, _ = checkpoint.read(checkpoint.commit(state, tmp_path), one_a_round())
        assert cases.everything(again) == cases.everything(state)
    assert [*(tmp_path / "round-000006").glob("clients-*.safetensors")]


def test_a_file_of_which_most_is_not_needed_is_not_linked(tmp_path: Path) -> None:
    """In a round of all clients everything changes, and nothing of before is kept."""
    fed = cases.federation(Scaffold(), "small", cohort="all")
    for state, _ in fed.run(4):
        path = checkpoint.commit(state, tmp_path)
        assert [name for name in names(path) if name.startswith("clients")] == ["clients.safetensors"]


def test_a_checkpoint_of_before_rows_were_linked_is_read(tmp_path: Path) -> None:
    fed = cases.federation(Scaffold(), "small")
    *_, state = cases.states(fed, 2)
    path = checkpoint.commit(state, tmp_path)
    document = json.loads((path / "state.json").read_text())
    del document["clients"]["files"]
    document["clients"]["kinds"] = [kind[:3] for kind in document["clients"]["kinds"]]
    (path / "state.json").write_text(json.dumps(document))
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["sha256"]["state.json"] = hashlib.sha256((path / "state.json").read_bytes()).hexdigest()
    (path / "MANIFEST.json").write_bytes(checkpoint.summed({k: v for k, v in manifest.items() if k != "own"}))
    assert cases.everything(checkpoint.read(path, fed)[0]) == cases.everything(state)


# ---- how often


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def paced(
    monkeypatch: pytest.MonkeyPatch, rounds: int, seconds: float, cost: Callable[[int], float]
) -> tuple[float, int]:
    """Share of the time that commits cost, and their number, in so many rounds of so many seconds each."""
    clock = Clock()
    monkeypatch.setattr(checkpoint, "time", clock)
    pace, spent, commits = checkpoint.Pace(), 0.0, 0
    for _ in range(rounds):
        clock.now += seconds
        if pace.due():
            took = cost(commits)
            clock.now += took
            pace.took(took)
            spent, commits = spent + took, commits + 1
    return spent / (clock.now - 100), commits


@pytest.mark.parametrize("seconds", [0.01, 1.0, 20.0])
def test_commits_cost_at_most_2_percent_of_the_time_and_not_much_less(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes 0.1 s: one in 5 s, so 2,000 in 10,000 s; after rounds of 20 s every round is committed."""
    share, commits = paced(monkeypatch, int(10_000 / seconds), seconds, lambda n: 0.1)
    assert share <= 0.02
    assert commits == (500 if seconds == 20 else pytest.approx(2000, rel=0.02))


def test_a_slow_commit_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third takes 10 s instead of 0.1 s: the next is due when 20.2 s are 2 % of the time, after 1,010 s."""
    share, commits = paced(monkeypatch, 900, 1.0, lambda n: 10.0 if n == 2 else 0.1)
    assert commits == 3
    share, commits = paced(monkeypatch, 100_000, 1.0, lambda n: 10.0 if n == 2 else 0.1)
    assert 0.0195 < share <= 0.02


def test_the_first_round_is_committed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert paced(monkeypatch, 1, 1.0, lambda n: 5.0)[1] == 1
