"""The cache of decoded data sets: what is in it was checked, and is whole or not there.

    <cache>/<name>/*.npy, manifest.json     one data set, memory-mapped when read
    <cache>/.raw-<name>-<n>/                an interrupted download, or a package client at work
    <cache>/.new-<name>-*/                  being written; becomes <name> by one rename, manifest last
    <cache>/.<name>.lock                    held while a process fetches; others wait, then find the set there

Errors: E220 (DataError) no source could give the data set; E401 (StorageError) no room, or no right, to store it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamina.data.sources import Source, collect
from lamina.errors import DataError, StorageError

Arrays = dict[str, NDArray[Any]]
Progress = Callable[[str, str, int, int], None]  # data set, stage, done, total in bytes (0: not known)
# The stages are "wait" (for another process), "download", "decode", "write" and "verify".

FORMAT = 1


class Form(NamedTuple):
    """What one array of a data set must be. The sum is over its bytes in C order; None where nobody could check it."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str | None

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Spec:
    """How a data set is had.

    Args:
        name: also of its folder in the cache.
        forms: its arrays by name.
        wanted: patterns of the raw files' base names.
        decode: from the raw files to the arrays.
        sources: in the order in which they are tried.
        download: bytes that the largest source sends.
        by_hand: which file to fetch oneself, and from where.
    """

    name: str
    forms: Mapping[str, Form]
    wanted: tuple[str, ...]
    decode: Callable[[Mapping[str, bytes]], Arrays]
    sources: tuple[Source, ...]
    download: int
    by_hand: str

    @property
    def bytes(self) -> int:
        """Of the decoded arrays."""
        return sum(form.bytes for form in self.forms.values())

    @property
    def variable(self) -> str:
        """The environment variable that may name a folder with the raw files."""
        return f"LAMINA_DATA_{self.name.upper()}"


class Stored(NamedTuple):
    """A data set in the cache: its folder, where it came from, and its arrays (read-only memory maps)."""

    folder: Path
    source: str
    arrays: Arrays


def cache_folder() -> Path:
    """LAMINA_DATA if set, else `lamina` in the platform's cache folder."""
    named = os.environ.get("LAMINA_DATA")
    if named:
        return Path(named).expanduser().absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "lamina"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lamina"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lamina"


def fetch(
    spec: Spec, *, folder: str | Path | None = None, verify: bool = False, progress: Progress | None = None
) -> Stored:
    """The data set from the cache or, once, from the first source that has it.

    Args:
        spec: of the data set.
        folder: holds the raw files; then no other source is asked. Default: the variable LAMINA_DATA_<NAME>.
        verify: read everything that is in the cache and compare its sums (normally: forms and sizes alone). What does
            not pass is fetched anew.
        progress: called as (name, stage, done, total).

    Raises:
        DataError: E220, with every source tried and why it failed.
        StorageError: E401, no room or no right to write.
    """
    say: Progress = progress or (lambda name, stage, done, total: None)
    named = folder or os.environ.get(spec.variable) or None
    home = cache_folder()
    try:
        return _load(spec, home / spec.name, named, verify, say)
    except DataError as error:
        missing = f"cache {home / spec.name}: {error.message}"
    with _storing(spec, home):
        home.mkdir(parents=True, exist_ok=True)
        with _lock(home / f".{spec.name}.lock", lambda: say(spec.name, "wait", 0, 0)) as alone:
            with suppress(DataError):
                return _load(spec, home / spec.name, named, verify, say)  # another process may have been faster
            if alone:
                for left in home.glob(f".new-{spec.name}-*"):  # of a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
            return _store_first(spec, home, named, missing, say)


def is_cached(spec: Spec) -> bool:
    """Whether the data set is in the cache (by forms and sizes; `fetch(verify=True)` reads it all)."""
    try:
        _load(spec, cache_folder() / spec.name, None, False, lambda name, stage, done, total: None)
    except DataError:
        return False
    return True


def _load(spec: Spec, folder: Path, named: str | Path | None, verify: bool, say: Progress) -> Stored:
    """Raises DataError for whatever is not whole and as expected."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        entries = manifest["arrays"]
        source = str(manifest["source"])
        known = manifest["format"] == FORMAT and set(entries) == set(spec.forms)
        sums = {name: str(entries[name]["sha256"]) for name in spec.forms} if known else {}
        sizes = {name: int(entries[name]["bytes"]) for name in spec.forms} if known else {}
    except FileNotFoundError:
        raise DataError("not there", code="E220") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"damaged manifest ({type(error).__name__}: {error})", code="E220") from error
    if not known:
        raise DataError("of another version", code="E220")
    arrays: Arrays = {}
    for name, form in spec.forms.items():
        if form.sha256 is None and named is not None and source != _title(named):
            raise DataError(f"came from {source}", code="E220")
        if form.sha256 not in (None, sums[name]):
            raise DataError(f"{name} has another sum than expected", code="E220")
        path = folder / f"{name}.npy"
        try:
            if path.stat().st_size != sizes[name]:
                raise DataError(f"{path.name} is damaged: not {sizes[name]} bytes", code="E220")
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path.name} is damaged ({error})", code="E220") from error
        _check_form(name, arrays[name], form)
    if verify:
        done = 0
        for name, array in arrays.items():
            say(spec.name, "verify", done, spec.bytes)
            if _sha256(array) != sums[name]:
                raise DataError(f"{name}.npy is damaged: its sum differs", code="E220")
            done += array.nbytes
        say(spec.name, "verify", done, spec.bytes)
    return Stored(folder, source, arrays)


def _store_first(spec: Spec, home: Path, named: str | Path | None, missing: str, say: Progress) -> Stored:
    """Try the sources in order."""
    if named is not None:
        _need_room(spec, home, spec.bytes)
        try:
            return _store(spec, home, Path(named).expanduser(), _title(named), say)
        except StorageError:
            raise
        except Exception as error:
            if _is_full(error):
                raise
            raise _nothing(spec, [missing, f"{_title(named)}: {_reason(error)}"]) from error
    tried = [missing]
    offline = os.environ.get("LAMINA_OFFLINE", "") not in ("", "0")
    for number, source in enumerate(spec.sources):
        if offline:
            tried.append(f"{source.title}: not asked, LAMINA_OFFLINE is set")
            continue
        _need_room(spec, home, spec.bytes + 2 * spec.download)  # a client keeps a second copy for a while
        raw = home / f".raw-{spec.name}-{number}"
        keep = False
        try:
            if not source.resumable:
                shutil.rmtree(raw, ignore_errors=True)
            raw.mkdir(exist_ok=True)
            say(spec.name, "download", 0, spec.download)
            keep = source.resumable  # until it is all there; then it is right or of no use
            source.bring(raw, lambda done, total: say(spec.name, "download", done, total or spec.download))
            keep = False
            return _store(spec, home, raw, source.title, say)
        except StorageError:
            raise
        except Exception as error:
            if _is_full(error):
                raise
            tried.append(f"{source.title}: {_reason(error)}")
        finally:
            if not (keep and any(raw.iterdir())):
                shutil.rmtree(raw, ignore_errors=True)
    raise _nothing(spec, tried)


def _store(spec: Spec, home: Path, raw: Path, title: str, say: Progress) -> Stored:
    """Decode, check, write aside, put in place."""
    if not raw.is_dir():
        raise DataError("no such folder", code="E220")
    say(spec.name, "decode", 0, spec.bytes)
    files = collect(raw, spec.wanted)
    if not files:
        raise DataError(f"holds no file named {' or '.join(spec.wanted)}, nor an archive of it", code="E220")
    arrays = spec.decode(files)
    del files
    sums = {}
    for name, form in spec.forms.items():
        _check_form(name, arrays[name], form)
        sums[name] = _sha256(arrays[name])
        if form.sha256 not in (None, sums[name]):
            raise DataError(f"{name} decodes to sha256 {sums[name]}, expected {form.sha256}", code="E220")
    made = Path(tempfile.mkdtemp(prefix=f".new-{spec.name}-", dir=home))
    try:
        _write(spec, made, arrays, sums, title, say)
        _put(made, home / spec.name)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    for left in home.glob(f".raw-{spec.name}-*"):  # of sources that broke off earlier
        shutil.rmtree(left, ignore_errors=True)
    return _load(spec, home / spec.name, None, False, say)


def _write(spec: Spec, made: Path, arrays: Arrays, sums: Mapping[str, str], title: str, say: Progress) -> None:
    made.chmod(0o755)  # a cache may be shared
    entries, done = {}, 0
    for name in spec.forms:
        say(spec.name, "write", done, spec.bytes)
        with (made / f"{name}.npy").open("wb") as file:
            np.save(file, arrays[name], allow_pickle=False)
            _flush(file.fileno())
            entries[name] = {"sha256": sums[name], "bytes": file.tell()}
        done += arrays[name].nbytes
    with (made / "manifest.json").open("w", encoding="utf-8") as manifest:
        json.dump({"format": FORMAT, "name": spec.name, "source": title, "arrays": entries}, manifest, indent=1)
        manifest.flush()
        _flush(manifest.fileno())
    say(spec.name, "write", done, spec.bytes)


def _put(made: Path, place: Path) -> None:
    """Rename `made` to `place`; what was there, damaged or of another version, goes."""
    if place.exists():
        old = Path(tempfile.mkdtemp(prefix=f".new-{place.name}-old-", dir=place.parent))
        os.rename(place, old / "old")
        shutil.rmtree(old, ignore_errors=True)
    try:
        os.rename(made, place)
    except OSError:
        if not place.exists():
            raise  # else: without locks, another process was faster; its copy is read


def _flush(descriptor: int) -> None:
    os.fsync(descriptor)


def _check_form(name: str, array: NDArray[Any], form: Form) -> None:
    if array.shape != form.shape or array.dtype != np.dtype(form.dtype):
        raise DataError(
            f"{name} is {array.dtype} {list(array.shape)}, expected {np.dtype(form.dtype)} {list(form.shape)}",
            code="E220",
        )


def _sha256(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def _title(folder: str | Path) -> str:
    return f"folder {Path(folder).expanduser().absolute()}"


def _reason(error: Exception) -> str:
    if isinstance(error, DataError):
        return error.message
    return f"{type(error).__name__}: {error}"


def _nothing(spec: Spec, tried: list[str]) -> DataError:
    listed = "".join(f"\n      - {line}" for line in tried)
    return DataError(
        f"{spec.name}: no source could give it; tried{listed}",
        code="E220",
        where=f"lamina.data.{spec.name}",
        remedy=f"Put {spec.by_hand}, packed or not, into a folder; name it: folder=FOLDER or {spec.variable}=FOLDER",
    )


def _need_room(spec: Spec, home: Path, need: int) -> None:
    free = shutil.disk_usage(home).free
    if free < need:
        raise _no_room(spec, home, need, f", {free} bytes are free")


def _no_room(spec: Spec, home: Path, need: int, more: str = "") -> StorageError:
    return StorageError(
        f"{spec.name} needs {need} bytes in {home}{more}",
        code="E401",
        where=str(home),
        remedy="make room, or set LAMINA_DATA to a folder with more of it",
    )


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def _storing(spec: Spec, home: Path) -> Iterator[None]:
    """Turn what the disk refuses into StorageError."""
    try:
        yield
    except OSError as error:
        if _is_full(error):
            raise _no_room(spec, home, spec.bytes + 2 * spec.download, ", the disk is full") from error
        raise StorageError(
            f"cannot write into the cache: {error}",
            code="E401",
            where=str(home),
            remedy="set LAMINA_DATA to a folder you may write in",
        ) from error


@contextmanager
def _lock(path: Path, waiting: Callable[[], None]) -> Iterator[bool]:
    """Hold a lock file, which the system lets go of when a process dies.

    False where the file system knows no locks: two processes then do the same work, and the later rename yields.
    """
    with open(path, "ab", opener=_no_link) as file:
        yield _hold(file.fileno(), waiting)  # closing the file lets go


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


if sys.platform == "win32":
    import msvcrt
    import time

    def _hold(descriptor: int, waiting: Callable[[], None]) -> bool:
        told = False
        while True:
            try:
                os.lseek(descriptor, 0, os.SEEK_SET)
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                return True
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EDEADLK):
                    return False
            if not told:
                waiting()
                told = True
            time.sleep(0.2)

else:
    import fcntl

    def _hold(descriptor: int, waiting: Callable[[], None]) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            return False
        return True
