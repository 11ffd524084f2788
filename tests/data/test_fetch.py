"""The cache: what is in it is whole and checked, whatever happens on the way."""

from __future__ import annotations

import errno
import hashlib
import json
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from lamina.data import fetch as module
from lamina.data.fetch import Form, Spec, cache_folder, fetch, is_cached
from lamina.errors import DataError, StorageError

VALUES = np.arange(12, dtype="<i8").reshape(3, 4)
SUM = hashlib.sha256(VALUES.tobytes()).hexdigest()


def decode(files: Mapping[str, bytes]) -> dict[str, np.ndarray]:
    return {"values": np.frombuffer(files["values.bin"], "<i8").reshape(-1, 4)}


@dataclass(frozen=True)
class Fake:
    """A source whose files are `content`, or which fails."""

    title: str
    content: bytes = b""
    error: Exception | None = None
    resumable: bool = False
    calls: list[str] | None = None
    wait: float = 0.0

    def bring(self, folder: Path, report: Callable[[int, int], None]) -> None:
        if self.calls is not None:
            self.calls.append(self.title)
        time.sleep(self.wait)
        (folder / "values.bin.part").write_bytes(b"half")
        report(1, 2)
        if self.error is not None:
            raise self.error
        (folder / "values.bin").write_bytes(self.content)


GOOD = Fake("good", VALUES.tobytes())


def spec(*sources: Fake, sha256: str | None = SUM) -> Spec:
    return Spec(
        name="toy",
        forms={"values": Form((3, 4), "<i8", sha256)},
        wanted=("values.bin",),
        decode=decode,
        sources=sources,
        download=96,
        by_hand="values.bin",
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAMINA_DATA", str(tmp_path / "cache"))
    monkeypatch.delenv("LAMINA_OFFLINE", raising=False)
    return tmp_path / "cache"


def left_over(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name not in ("toy", ".toy.lock"))


def test_the_first_source_that_works_is_stored_once_and_read_from_then_on(cache: Path):
    calls: list[str] = []
    broken = Fake("broken", error=OSError("refused"), calls=calls)
    good = replace(GOOD, calls=calls)
    stored = fetch(spec(broken, good))
    assert np.array_equal(stored.arrays["values"], VALUES)
    assert stored.source == "good"
    again = fetch(spec(broken, good))
    assert np.array_equal(again.arrays["values"], VALUES)
    assert calls == ["broken", "good"]
    assert left_over(cache) == []


def test_arrays_are_read_only_memory_maps():
    values = fetch(spec(GOOD)).arrays["values"]
    assert isinstance(values, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        values[0, 0] = 1


def test_a_failed_fetch_names_every_source_its_reason_and_the_way_by_hand(cache: Path):
    wrong = Fake("wrong bytes", (VALUES + 1).tobytes())
    other = Fake("other shape", b"\0" * 64)
    broken = Fake("broken", error=OSError("refused"))
    with pytest.raises(DataError) as caught:
        fetch(spec(broken, wrong, other))
    text = str(caught.value)
    assert caught.value.code == "E220"
    for part in (
        f"cache {cache / 'toy'}: not there",
        "broken: OSError: refused",
        "wrong bytes: values decodes to sha256",
    ):
        assert part in text
    assert "other shape: values is int64 [2, 4], expected int64 [3, 4]" in text
    assert "Put values.bin" in text
    assert "LAMINA_DATA_TOY=FOLDER" in text
    assert not (cache / "toy").exists()
    assert left_over(cache) == []


def test_offline_asks_no_source_and_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LAMINA_OFFLINE", "1")
    calls: list[str] = []
    with pytest.raises(DataError, match="good: not asked, LAMINA_OFFLINE is set"):
        fetch(spec(replace(GOOD, calls=calls)))
    assert calls == []


def test_offline_reads_what_is_in_the_cache(monkeypatch: pytest.MonkeyPatch):
    fetch(spec(GOOD))
    monkeypatch.setenv("LAMINA_OFFLINE", "1")
    assert np.array_equal(fetch(spec(GOOD)).arrays["values"], VALUES)


@pytest.mark.parametrize("way", ["argument", "variable"])
def test_a_folder_that_the_user_names_comes_first(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = tmp_path / "mine" / "deeper"
    own.mkdir(parents=True)
    (own / "values.bin").write_bytes(VALUES.tobytes())
    if way == "variable":
        monkeypatch.setenv("LAMINA_DATA_TOY", str(own.parent))
    calls: list[str] = []
    stored = fetch(spec(replace(GOOD, calls=calls)), folder=own.parent if way == "argument" else None)
    assert stored.source == f"folder {own.parent}"
    assert calls == []


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "holds no file named values.bin"),
        (lambda folder: (folder.mkdir(), (folder / "values.bin").write_bytes(b"abc")), "ValueError"),
    ],
)
def test_a_named_folder_that_will_not_do_is_an_error_and_not_passed_over(
    make: Callable[[Path], object], reason: str, tmp_path: Path
):
    make(tmp_path / "mine")
    calls: list[str] = []
    with pytest.raises(DataError, match=reason):
        fetch(spec(replace(GOOD, calls=calls)), folder=tmp_path / "mine")
    assert calls == []


def test_where_no_sum_is_known_a_named_folder_replaces_what_came_from_elsewhere(tmp_path: Path):
    fetch(spec(GOOD, sha256=None))
    (tmp_path / "values.bin").write_bytes((VALUES + 5).tobytes())
    stored = fetch(spec(GOOD, sha256=None), folder=tmp_path)
    assert stored.arrays["values"][0, 0] == 5


@pytest.mark.parametrize("damage", ["short", "gone", "no manifest", "half a manifest", "other format", "other sum"])
def test_what_is_not_whole_is_fetched_anew(damage: str, cache: Path):
    fetch(spec(GOOD))
    file, manifest = cache / "toy" / "values.npy", cache / "toy" / "manifest.json"
    if damage == "short":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "gone":
        file.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_text(manifest.read_text()[:20])
    else:
        content = json.loads(manifest.read_text())
        if damage == "other format":
            content["format"] = 0
        else:
            content["arrays"]["values"]["sha256"] = "0" * 64
        manifest.write_text(json.dumps(content))
    assert not is_cached(spec(GOOD))
    assert np.array_equal(fetch(spec(GOOD)).arrays["values"], VALUES)
    assert is_cached(spec(GOOD))
    assert left_over(cache) == []


def test_a_changed_bit_is_found_by_verify_alone(cache: Path):
    fetch(spec(GOOD))
    file = cache / "toy" / "values.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert not np.array_equal(fetch(spec(GOOD)).arrays["values"], VALUES)
    assert np.array_equal(fetch(spec(GOOD), verify=True).arrays["values"], VALUES)


def test_verify_reports_the_damage_where_nothing_can_replace_it(cache: Path):
    fetch(spec(GOOD))
    file = cache / "toy" / "values.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    with pytest.raises(DataError, match=r"values\.npy is damaged: its sum differs"):
        fetch(spec(Fake("broken", error=OSError("refused"))), verify=True)


def test_the_stages_are_reported_in_order():
    seen: list[tuple[str, str, int, int]] = []
    fetch(spec(GOOD), progress=lambda *step: seen.append(step))
    assert [stage for _, stage, _, _ in seen] == ["download", "download", "decode", "write", "write"]
    assert seen[1] == ("toy", "download", 1, 2)
    assert seen[-1] == ("toy", "write", 96, 96)


def test_too_little_room_is_said_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    calls: list[str] = []
    with pytest.raises(StorageError, match=r"toy needs 288 bytes in .*, 100 bytes are free") as caught:
        fetch(spec(replace(GOOD, calls=calls)))
    assert caught.value.code == "E401"
    assert calls == []


@pytest.mark.parametrize("where", ["download", "write"])
def test_a_disk_that_fills_up_leaves_nothing_behind(where: str, cache: Path, monkeypatch: pytest.MonkeyPatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    source = GOOD
    if where == "download":
        source = replace(GOOD, error=full)
    else:

        def flush(descriptor: int) -> None:
            raise full

        monkeypatch.setattr(module, "_flush", flush)
    with pytest.raises(StorageError, match="288 bytes") as caught:
        fetch(spec(source, GOOD))
    assert caught.value.code == "E401"
    assert not (cache / "toy").exists()
    assert left_over(cache) == []


def test_a_cache_that_cannot_be_made_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAMINA_DATA", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match="cannot write into the cache"):
        fetch(spec(GOOD))


def test_a_resumable_source_finds_its_half_download_again(cache: Path):
    broken = Fake("broken", error=ConnectionError("lost"), resumable=True)
    with pytest.raises(DataError):
        fetch(spec(broken))
    assert (cache / ".raw-toy-0" / "values.bin.part").read_bytes() == b"half"
    fetch(spec(replace(broken, error=None, content=VALUES.tobytes())))
    assert left_over(cache) == []


def test_what_a_killed_process_left_is_cleared_away(cache: Path):
    (cache / ".new-toy-abc").mkdir(parents=True)
    (cache / ".new-toy-abc" / "values.npy").write_bytes(b"half")
    (cache / ".raw-toy-3").mkdir()
    fetch(spec(GOOD))
    assert left_over(cache) == []


def test_of_many_at_once_one_fetches_and_all_read_the_same():
    calls: list[str] = []
    waited: list[str] = []
    slow = replace(GOOD, calls=calls, wait=0.1)
    results: list[np.ndarray] = []

    def one() -> None:
        stored = fetch(spec(slow), progress=lambda name, stage, done, total: waited.append(stage))
        results.append(stored.arrays["values"])

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == ["good"]
    assert "wait" in waited
    assert len(results) == 4
    assert all(np.array_equal(values, VALUES) for values in results)


def test_without_locks_the_slower_of_two_discards_its_copy(monkeypatch: pytest.MonkeyPatch, cache: Path):
    """What a file system without locks comes to: the other process stores first, while this one decodes."""
    monkeypatch.setattr(module, "_hold", lambda descriptor, waiting: False)
    inner = spec(GOOD)

    def meanwhile(files: Mapping[str, bytes]) -> dict[str, np.ndarray]:
        fetch(inner)
        return decode(files)

    stored = fetch(replace(inner, decode=meanwhile))
    assert np.array_equal(stored.arrays["values"], VALUES)
    assert left_over(cache) == []


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, ".cache/lamina"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/lamina"),
        ("darwin", {}, "Library/Caches/lamina"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/lamina"),
        ("win32", {}, "AppData/Local/lamina"),
        ("linux", {"LAMINA_DATA": "/here"}, "/here"),
    ],
)
def test_the_cache_is_where_the_platform_keeps_caches(
    platform: str, variables: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("LAMINA_DATA", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder() == tmp_path / expected  # an absolute `expected` replaces tmp_path
