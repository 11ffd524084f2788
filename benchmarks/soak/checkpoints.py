"""Runs that are killed, damaged, cut off from their disk or interrupted: what is left goes on, and to the same bits.

Every run is a child of this process, which has imported torch once. Compared are the model's SHA-256, every row of
metrics.jsonl but its seconds, bytes.jsonl to the byte, every row of layers.jsonl, and what `lamina verify` says.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lamina import checkpoint, runs, verify
from lamina.config import build, load
from lamina.errors import LaminaError
from soak import Result, row
from soak.io_steps import Journal, Step, Steps, ended, forked

SMALL = ("engine=loop", "model.widths=[64, 12, 10]", "data.clients=6", "cohort=3", "local.epochs=1")
METHODS: dict[str, tuple[str, ...]] = {
    "fedavg": ("method=fedavg",),
    "fedlama": ("method=fedlama", "method.phi=3"),
    "lips": (
        "method=lips",
        "method.density=0.3",
        "method.every=4",
        "method.rounds=ROUNDS",
        "model.widths=[64, 12, 11, 10]",
    ),
    "flare": ("method=flare", "uplink=topk:0.05"),
    "ssfl": ("method=ssfl", "method.density=0.4"),
    "fedluar": ("method=fedluar",),
}
STORE = ("method=errorfeedback", "uplink=topk:0.1")  # clients remember something, on disk


# ---- runs


@contextlib.contextmanager
def workshop() -> Iterator[Path]:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # no disk is waited for; none is needed
    folder = Path(tempfile.mkdtemp(prefix="lamina-soak-", dir=memory))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def keys(method: str, rounds: int, *more: str) -> tuple[str, ...]:
    said = tuple(key.replace("ROUNDS", str(rounds)) for key in METHODS[method])
    return (*SMALL, f"rounds={rounds}", *said, *more)


def made(folder: Path, arguments: tuple[str, ...], every: Any = "auto", watcher: Any = False) -> None:
    """A run, in this process."""
    torch.set_num_threads(1)
    config = load("quickstart", arguments, {})
    runs.fit(build(config), config.rounds, folder, config=config, progress=watcher, checkpoint_every=every)


def gone_on(folder: Path, arguments: tuple[str, ...], every: Any = "auto") -> None:
    """The same run to its end, from wherever it is, in this process."""
    torch.set_num_threads(1)
    if (folder / "run.json").exists():
        runs.resume(folder, progress=False)
    else:  # it was killed before it was one: there is nothing to go on from, and nothing in the way
        shutil.rmtree(folder, ignore_errors=True)
        made(folder, arguments, every)


def finished(folder: Path, arguments: tuple[str, ...], every: Any = "auto") -> str | None:
    """Goes on with a run in a child; what failed, if anything."""
    errors = folder.parent / "errors"
    errors.unlink(missing_ok=True)
    code = ended(forked(lambda: gone_on(folder, arguments, every), errors))
    return None if code == 0 else f"exit {code}: {errors.read_text()[-300:] if errors.exists() else ''}"


def content(folder: Path) -> dict[str, Any]:
    """All that two runs of the same config must have in common."""
    info = json.loads((folder / "run.json").read_bytes())

    def rows(log: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / log).read_bytes().splitlines()]

    return {
        "sha256": info["final_sha256"],
        "status": info["status"],
        "best": info["best"],
        "metrics": [{k: v for k, v in r.items() if k != "seconds"} for r in rows("metrics.jsonl")],
        "bytes": (folder / "bytes.jsonl").read_bytes(),
        "layers": sorted(json.dumps(r, sort_keys=True) for r in rows("layers.jsonl")),
    }


def wrong(folder: Path, expected: dict[str, Any]) -> str | None:
    """What is not as it would be had nothing happened."""
    here = content(folder)
    odd = [key for key in expected if here[key] != expected[key]]
    problems = [f"{check.file}: {check.problem}" for check in verify.files(folder) if check.problem]
    return ", ".join([*odd, *problems]) or None


def straight(folder: Path, arguments: tuple[str, ...], every: Any = "auto") -> tuple[dict[str, Any], float]:
    """What the run comes to when nothing happens to it, and in how many seconds."""
    began = time.monotonic()
    problem = finished(folder, arguments, every)
    if problem is not None:
        raise RuntimeError(problem)
    return content(folder), time.monotonic() - began


def counted(good: int, whole: int, failed: list[str]) -> str:
    return f"{good} of {whole}" + (f"; the first that was not: {failed[0]}" if failed else "")


@contextlib.contextmanager
def warm() -> Iterator[Path]:
    """A folder to work in; all that a run imports is imported, so that its children need not."""
    threads = torch.get_num_threads()
    try:
        with workshop() as folder:
            made(folder / "warm", keys("fedlama", 3), 1)
            yield folder
    finally:
        torch.set_num_threads(threads)


# ---- R1


@row(
    "R1", *METHODS, goal="200 of 200 runs of 50 rounds, killed at random times, end as if they had not been", minutes=8
)
def killed_at_random(method: str, short: bool) -> Result:
    rounds, trials = (12, 4) if short else (50, 200)
    arguments = keys(method, rounds)
    chance = random.Random(method)
    failed: list[str] = []
    with warm() as folder:
        seconds = {}
        for every in (1, "auto"):
            expected, seconds[every] = straight(folder / f"straight-{every}", arguments, every)
        kills = 0
        for trial in range(trials):
            place = folder / f"run-{trial}"
            every = chance.choice((1, "auto"))
            for attempt in range(1 + chance.randrange(3)):
                work = made if attempt == 0 else gone_on
                pid = forked(lambda: work(place, arguments, every))  # noqa: B023
                time.sleep(chance.uniform(0, seconds[every]))
                os.kill(pid, signal.SIGKILL)
                kills += ended(pid) == -signal.SIGKILL
            problem = finished(place, arguments, every) or wrong(place, expected)
            if problem is not None:
                failed.append(f"trial {trial}: {problem}")
            shutil.rmtree(place, ignore_errors=True)
    figure = counted(trials - len(failed), trials, failed)
    return Result(figure, not failed, f"{kills} kills of {rounds}-round runs, in one, two or three places each")


# ---- R2, R6: every step


@cache
def _inputs(kind: str) -> tuple[str, ...]:
    more = ("run.keep_clients_log=true",)
    return keys("fedlama", 3, *more) if kind == "commit" else (*SMALL, "rounds=3", *STORE, *more)


def _work(kind: str, place: Path) -> Callable[[], None]:
    """What is done in a run's folder, or to make it."""
    if kind in ("commit", "store"):
        more = (f"store=disk:{place / 'clients'}",) if kind == "store" else ()
        return lambda: made(place / "run", (*_inputs(kind), *more), 1)
    if kind == "resume":
        return lambda: gone_on(place / "run", _inputs("commit"), 1)

    def written() -> None:
        torch.set_num_threads(1)
        if kind == "report":
            from lamina import report

            report.write([runs.Run.open(place / "run")], place / "run" / "report.html")
        else:
            from lamina.export import export, files

            for name in files.WRITERS:
                export(place / "run", name)

    return written


def _prepared(kind: str, place: Path, before: Path) -> None:
    """The folder in which the work begins."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if kind in ("report", "export", "resume"):
        shutil.copytree(before, place / "run")


def _arguments(kind: str, place: Path) -> tuple[str, ...]:
    more = (f"store=disk:{place / 'clients'}",) if kind == "store" else ()
    return (*_inputs("store" if kind == "store" else "commit"), *more)


def _before(kind: str, folder: Path) -> Path:
    """A run to work on: one that has ended, or one that was stopped after its second round of three."""
    place = folder / "before" / "run"
    place.parent.mkdir()
    if kind == "resume":
        stop = Pressing(2)
        ended(forked(lambda: made(place, _inputs("commit"), 1, stop)))
    elif kind in ("report", "export"):
        straight(place, _inputs("commit"), 1)
    return place


class Pressing:
    """Presses Ctrl-C after so many rounds."""

    def __init__(self, after: int):
        self.after = after

    def begin(self, run: Any, fed: Any) -> None: ...
    def note(self, text: str) -> None: ...
    def end(self, run: Any) -> None: ...

    def round(self, row: Any) -> None:
        if row.round + 1 == self.after:
            os.kill(os.getpid(), signal.SIGINT)


def _steps(kind: str, folder: Path, before: Path) -> list[str]:
    """The kind of every step, of one go in which nothing happens."""
    place = folder / "counted"
    _prepared(kind, place, before)
    seen = folder / "seen"

    def work() -> None:
        kinds: list[str] = []
        Steps(place, where=lambda step: kinds.append(step.kind)).begin()
        _work(kind, place)()
        Path(seen).write_text(json.dumps(kinds))

    code = ended(forked(work, folder / "errors"))
    if code:
        raise RuntimeError((folder / "errors").read_text())
    found: list[str] = json.loads(seen.read_text())
    return found


def _whole(kind: str, place: Path, expected: dict[str, bytes]) -> str | None:
    """What is there of a report or an export is there whole."""
    for name, blob in _products(kind, place).items():
        if name not in expected:
            return f"{name} is left over"
        if len(blob) != len(expected[name]) and kind == "export":
            return f"{name} is there by half"
        if kind == "report" and not blob.rstrip().endswith(b"</html>"):
            return f"{name} is there by half"
    return None


def _products(kind: str, place: Path) -> dict[str, bytes]:
    top = place / "run"
    found = [top / "report.html"] if kind == "report" else sorted((top / "export").rglob("*"))
    return {str(f.relative_to(top)): f.read_bytes() for f in found if f.is_file() and not f.name.startswith(".")}


def _after(kind: str, place: Path, expected: dict[str, Any], products: dict[str, bytes]) -> str | None:
    """What is wrong after the work was cut short, and done once more."""
    if kind in ("commit", "store", "resume"):
        problem = finished(place / "run", _arguments(kind, place), 1)
        return problem or wrong(place / "run", expected)
    problem = _whole(kind, place, products) or wrong(place / "run", expected)
    if problem is None and ended(forked(_work(kind, place), place / "errors")) != 0:
        problem = (place / "errors").read_text()[-300:]
    if problem is None and _products(kind, place).keys() != products.keys():
        problem = "not all of it is there when it was done again"
    return problem or _whole(kind, place, products)


KINDS = ("commit", "store", "resume", "report", "export")


@row("R2", *KINDS, goal="killed at every step of writing: 100 % go on to the same bits", minutes=5)
def killed_at_every_step(kind: str, short: bool) -> Result:
    failed: list[str] = []
    with warm() as folder:
        before = _before(kind, folder)
        steps = _steps(kind, folder, before)
        expected = content(folder / "counted" / "run")
        products = _products(kind, folder / "counted") if kind in ("report", "export") else {}
        tries = [
            (at, half) for at, step in enumerate(steps, 1) for half in (False, True) if not half or step == "write"
        ]
        if short:
            tries = tries[:: len(tries) // 11 + 1]
        place = folder / "at"
        for at, half in tries:
            _prepared(kind, place, before)

            def work(at: int = at, half: bool = half) -> None:
                Steps(place, at, half=half).begin()
                _work(kind, place)()

            code = ended(forked(work))
            said = f"step {at} of {len(steps)} ({steps[at - 1]}{', by half' if half else ''})"
            if code != -signal.SIGKILL:
                failed.append(f"{said}: exit {code}, not killed")
                continue
            problem = _after(kind, place, expected, products)
            if problem is not None:
                failed.append(f"{said}: {problem}")
    figure = counted(len(tries) - len(failed), len(tries), failed)
    return Result(figure, not failed, f"{len(steps)} steps; writes also by half")


ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO, "read-only": errno.EROFS}


@row(
    "R6", *ERRORS, goal="the disk fails at every step: exit 5, the last commit verifies, and the run goes on", minutes=8
)
def disk_fails(what: str, short: bool) -> Result:
    failed: list[str] = []
    exits: dict[int, int] = {}
    number = ERRORS[what]
    whole = 0
    with warm() as folder:
        for kind in ("commit", "store", "resume"):
            (folder / kind).mkdir()
            before = _before(kind, folder / kind)
            steps = _steps(kind, folder / kind, before)
            expected = content(folder / kind / "counted" / "run")
            tries = [(at, half) for at, s in enumerate(steps, 1) for half in (False, True) if not half or s == "write"]
            if short:
                tries = tries[:: len(tries) // 4 + 1]
            place = folder / kind / "at"
            for at, half in tries:
                _prepared(kind, place, before)
                on = what != "broken"  # a full disk stays full

                def work(place: Path = place, kind: str = kind, at: int = at, half: bool = half, on: bool = on) -> None:
                    Steps(place, at, number, half, on).begin()
                    _work(kind, place)()

                whole += 1
                code = ended(forked(work, folder / "errors"))
                exits[code] = exits.get(code, 0) + 1
                said = f"{kind}, step {at} of {len(steps)} ({steps[at - 1]}{', by half' if half else ''})"
                problem = None if code in (0, 5) else f"exit {code}: {(folder / 'errors').read_text()[-400:]}"
                problem = problem or _after(kind, place, expected, {})
                if problem is not None:
                    failed.append(f"{said}: {problem}")
    said = ", ".join(f"exit {code}: {n}" for code, n in sorted(exits.items()))
    return Result(
        counted(whole - len(failed), whole, failed), not failed, said + "; 0 where the step could be left out"
    )


@row("R6", "tmpfs", goal="a disk that is really full, at many sizes: exit 5, the last commit verifies", minutes=5)
def disk_full(what: str, short: bool) -> Result:
    sizes = range(8, 160, 40 if short else 2)  # KiB: from too small for anything to room for all
    failed: list[str] = []
    exits: dict[int, int] = {}
    with warm() as folder:
        expected, _ = straight(folder / "straight", _inputs("commit"), 1)
        for size in sizes:
            place = folder / f"{size}"
            place.mkdir()
            script = (
                f"mount -t tmpfs -o size={size}k tmpfs {place} && {sys.executable} -m lamina.cli run quickstart "
                f"{' '.join(repr(key) for key in _inputs('commit'))} run.checkpoint_every=1 --quiet --run-dir {place}; "
                f"code=$?; cp -r {place} {folder}/kept-{size}; exit $code"
            )
            done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True)
            if "Operation not permitted" in done.stderr:
                return Result("not tried: this machine lets nobody mount", True)
            exits[done.returncode] = exits.get(done.returncode, 0) + 1
            found = list((folder / f"kept-{size}").glob("*/*/run.json"))
            problem = None if done.returncode in (0, 5) else f"exit {done.returncode}: {done.stderr[-300:]}"
            if found and problem is None:
                problem = finished(found[0].parent, _inputs("commit"), 1) or wrong(found[0].parent, expected)
            if problem is not None:
                failed.append(f"{size} KiB: {problem}")
    said = ", ".join(f"exit {code}: {n}" for code, n in sorted(exits.items()))
    return Result(counted(len(sizes) - len(failed), len(sizes), failed), not failed, said)


# ---- R3


@row(
    "R3",
    goal="the power fails after every step: 100 % go on, from the last commit that was flushed or a later one",
    minutes=20,
)
def power_fails(short: bool) -> Result:
    failed: list[str] = []
    tried = 0
    with warm() as folder:
        place = folder / "at"
        place.mkdir()
        taped = folder / "steps"

        def work() -> None:
            torch.set_num_threads(1)
            steps: list[Any] = []
            watch = Steps(place, where=lambda step: steps.append(step))
            watch.begin()
            made(place / "run", (*_inputs("store"), f"store=disk:{place / 'clients'}"), 1)
            watch.where = None
            plain = [
                [s.kind, s.path, [s.content[0], s.content[1].hex()] if s.kind == "write" else s.content] for s in steps
            ]
            taped.write_text(json.dumps(plain))

        if ended(forked(work, folder / "errors")):
            raise RuntimeError((folder / "errors").read_text())
        expected = content(place / "run")
        steps = [
            Step(kind, path, (c[0], bytes.fromhex(c[1])) if kind == "write" else c)
            for kind, path, c in json.loads(taped.read_text())
        ]
        chance = random.Random(3)
        ways: list[tuple[str, Callable[[int], int], Callable[[int], int]]] = [
            ("nothing that was not flushed", lambda n: 0, lambda n: 0),
            ("names, no content", lambda n: 0, lambda n: n),
            ("content, no names", lambda n: n, lambda n: 0),
        ]
        some = lambda n: chance.randint(0, n)  # noqa: E731
        ways += [("some", some, some)] * (1 if short else 4)
        journal = Journal(place)
        durable, renamed = 0, 0
        every = len(steps) // 4 if short else 1
        for number, step in enumerate(steps, 1):
            journal.take(step)
            if step.kind == "rename" and "checkpoints" in step.path and "round-" in step.path:
                renamed = int(step.content.rpartition("-")[2])
            if step.kind == "fsync" and step.path.endswith("checkpoints"):
                durable = renamed
            if number % every:
                continue
            for said, data, names in ways:
                tried += 1
                shutil.rmtree(place)
                place.mkdir()
                journal.build(place, data, names)
                kept = checkpoint.latest(place / "run" / "checkpoints")
                done = 0 if kept is None else int(kept.name.rpartition("-")[2])
                problem = None if done >= durable else f"round {durable} was committed, {done} is left"
                if durable and not (place / "run" / "run.json").exists():
                    problem = f"round {durable} was committed, and there is no run.json"
                problem = problem or finished(place / "run", _arguments("store", place), 1)
                problem = problem or wrong(place / "run", expected)
                if problem is not None:
                    failed.append(f"after step {number} of {len(steps)} ({step.kind} {step.path}), {said}: {problem}")
    figure = counted(tried - len(failed), tried, failed)
    return Result(figure, not failed, f"after each of {len(steps)} steps, {len(ways)} ways in which it may fail")


# ---- R4


@row("R4", goal="resumed twice, elsewhere, with other workers, another engine: 10 of 10 the same", minutes=2)
def resumed_elsewhere(short: bool) -> Result:
    rounds = 9
    base = tuple(k for k in keys("fedlama", rounds) if not k.startswith("engine"))
    failed: list[str] = []
    ways: dict[str, tuple[str, ...]] = {
        "once": (), "twice": (), "elsewhere": (), "one worker": ("engine=processes", "workers=1"),
        "two workers": ("engine=processes", "workers=2"), "four workers": ("engine=processes", "workers=4"),
        "engine loop": ("engine=loop",), "other checkpoints": ("run.checkpoint_every=1",),
        "trackers off": ("run.track=[]",), "a limit far off": ("stop.bytes=1e12",),
    }  # fmt: skip
    with warm() as folder:
        expected, _ = straight(folder / "straight", (*base, "engine=loop"))
        for name, changed in ways.items():
            place = folder / name.replace(" ", "-")
            stop = Pressing(4)
            ended(forked(lambda: made(place, (*base, "engine=processes", "workers=2"), 1, stop)))  # noqa: B023
            if name == "twice":
                ended(forked(lambda: _pressed(place, 7)))  # noqa: B023
            if name == "elsewhere":
                place = place.rename(
                    folder / "another" if (folder / "another").mkdir() else folder / "another" / "name"
                )
            errors = folder / "errors"
            code = ended(forked(lambda: _changed(place, changed), errors))  # noqa: B023
            problem = wrong(place, expected) if code == 0 else f"exit {code}: {errors.read_text()[-300:]}"
            if problem is not None:
                failed.append(f"{name}: {problem}")
    return Result(counted(len(ways) - len(failed), len(ways), failed), not failed)


def _pressed(place: Path, after: int) -> None:
    torch.set_num_threads(1)
    runs.resume(place, progress=Pressing(after))


def _changed(place: Path, changed: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    runs.resume(place, keys=changed, progress=False)


# ---- R5


@row("R5", goal="every byte of a manifest and 10,000 random bits: all seen, and the one before is used", minutes=5)
def bits_flip(short: bool) -> Result:
    flips = 300 if short else 10_000
    chance = random.Random(5)
    missed: list[str] = []
    with warm() as folder:
        place = folder / "run"
        expected, _ = straight(place, keys("ssfl", 3), 1)
        older, newest = checkpoint.committed(place / "checkpoints")[-2:]

        def seen(file: Path, at: int, bit: int) -> bool:
            blob = bytearray(file.read_bytes())
            blob[at] ^= 1 << bit
            kept = file.read_bytes()
            file.write_bytes(blob)
            try:
                return not checkpoint.intact(newest) and checkpoint.latest(place / "checkpoints") == older
            finally:
                file.write_bytes(kept)

        manifest = newest / "MANIFEST.json"
        every = [(manifest, at, bit) for at in range(manifest.stat().st_size) for bit in range(8)]
        sizes = {file: file.stat().st_size for file in sorted(newest.iterdir())}
        files = list(sizes)
        chosen = chance.choices(files, [sizes[file] for file in files], k=flips)
        tries = (every[::97] if short else every) + [
            (f, chance.randrange(sizes[f]), chance.randrange(8)) for f in chosen
        ]
        for file, at, bit in tries:
            if not seen(file, at, bit):
                missed.append(f"{file.name}, byte {at}, bit {bit}")
        gone = 0
        for trial in range(2 if short else 20):  # the whole way: it says so, and the result is the same
            copy = Path(shutil.copytree(place, folder / f"copy-{trial}"))
            info = json.loads((copy / "run.json").read_bytes())
            (copy / "run.json").write_text(json.dumps({**info, "status": "running"}))
            file = copy / "checkpoints" / newest.name / chance.choice(files).name
            blob = bytearray(file.read_bytes())
            blob[chance.randrange(len(blob))] ^= 1 << chance.randrange(8)
            file.write_bytes(blob)
            problem = finished(copy, ()) or wrong(copy, expected)
            said = "passed over" in (copy / "events.jsonl").read_text()
            if problem is not None or not said:
                missed.append(f"{file.name}: {problem or 'nothing was said'}")
            gone += 1
    figure = f"{len(tries) - len(missed)} of {len(tries)} seen" + (
        f"; the first that was not: {missed[0]}" if missed else ""
    )
    return Result(figure, not missed, f"{len(every)} bits of the manifest, {flips} of all files; {gone} went on")


# ---- R18


@row("R18", goal="5,000 rounds: memory grows by at most 1 kB a round, no open file and no thread more", minutes=10)
def many_rounds(short: bool) -> Result:
    rounds = 200 if short else 5_000
    with warm() as folder:
        taped = folder / "seen"

        class Watching(Pressing):
            def __init__(self) -> None:
                self.seen: list[tuple[int, int, int, int]] = []

            def round(self, row: Any) -> None:
                if (row.round + 1) % max(1, rounds // 50) == 0:
                    pages = int(Path("/proc/self/statm").read_text().split()[1])
                    files = len(os.listdir("/proc/self/fd"))
                    self.seen.append((row.round, pages * os.sysconf("SC_PAGE_SIZE"), files, _threads()))

        def work() -> None:
            watcher = Watching()
            arguments = (*SMALL, f"rounds={rounds}", "method=fedlama", "evaluate_every=10")
            made(folder / "run", arguments, 20, watcher)
            taped.write_text(json.dumps(watcher.seen))

        if ended(forked(work, folder / "errors"), 3600):
            raise RuntimeError((folder / "errors").read_text())
        seen = json.loads(taped.read_text())
    later = seen[len(seen) // 5 :]  # caches have filled
    slope = _slope([s[0] for s in later], [s[1] for s in later])
    files, threads = ({s[i] for s in later} for i in (2, 3))
    flat = len(files) == 1 and len(threads) == 1
    said = f"{slope:,.0f} bytes a round; open files {_span(files)}, threads {_span(threads)}"
    return Result(said, flat and (short or slope <= 1000), f"{rounds} rounds, from {seen[0][1] / 1e6:.0f} MB")


def _threads() -> int:
    return len(os.listdir("/proc/self/task")) if Path("/proc/self/task").exists() else threading.active_count()


def _slope(x: list[float], y: list[float]) -> float:
    middle, mean = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle) * (b - mean) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def _span(values: set[int]) -> str:
    return str(min(values)) if len(values) == 1 else f"{min(values)} to {max(values)}"


# ---- R22


@row(
    "R22",
    "once",
    "twice",
    goal="Ctrl-C at any time: once, committed within a round and exit 130; twice, within 1 s; no process left",
    minutes=8,
)
def pressed(how: str, short: bool) -> Result:
    trials = 3 if short else 100
    rounds = 400
    base = tuple(k for k in keys("fedlama", rounds) if not k.startswith("engine"))
    arguments = (*base, "engine=processes", "workers=2")
    chance = random.Random(how)
    failed: list[str] = []
    waits: list[float] = []
    with warm() as folder:
        for trial in range(trials):
            place = folder / f"{trial}"

            def work(place: Path = place) -> int:
                os.setsid()
                signal.signal(signal.SIGINT, signal.default_int_handler)
                try:
                    made(place, arguments, "auto")
                except KeyboardInterrupt as error:
                    return int(getattr(error, "exit_code", 130))
                return 0

            pid = forked(work)
            time.sleep(chance.uniform(0.05, 2.0))
            began = time.monotonic()
            os.killpg(pid, signal.SIGINT)
            if how == "twice":
                time.sleep(chance.uniform(0, 0.05))
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGINT)
            code = ended(pid)
            waits.append(time.monotonic() - began)
            said = _after_press(place, code, how)
            while (left := _group(pid)) and time.monotonic() < began + 1.0:  # they end with their parent, not before it
                time.sleep(0.01)
            if left:
                said = f"{len(left)} processes left"
                for other in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(other, signal.SIGKILL)
            if waits[-1] > (5.0 if short else 1.0):  # among other tests, a machine may be busy
                said = f"{waits[-1]:.2f} s until it had ended"
            if said:
                failed.append(f"trial {trial}: {said}")
            shutil.rmtree(place, ignore_errors=True)
    figure = counted(trials - len(failed), trials, failed)
    return Result(figure, not failed, f"at most {max(waits):.2f} s until it had ended")


def _after_press(place: Path, code: int, how: str) -> str:
    if code != 130:
        return f"exit {code}"
    if not (place / "run.json").exists():
        return "" if not place.exists() else "a folder without a run"  # it had not begun
    try:
        run = runs.Run.open(place)
    except LaminaError as error:
        return str(error)
    if run.info["status"] != "interrupted":
        return f"status {run.info['status']}"
    problems = [f"{check.file}: {check.problem}" for check in verify.files(place) if check.problem]
    if how == "once" and not problems and checkpoint.latest(place / "checkpoints") is None and run.info["rounds_done"]:
        problems = ["no commit"]
    return "; ".join(problems)


def _group(leader: int) -> list[int]:
    """Processes of this group that are still there."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[2]) == leader and fields[0] != "Z":
                found.append(int(entry.parent.name))
    return found
