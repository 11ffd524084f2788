"""Feeds the targets inputs until one breaks a promise, or time is up.

    python fuzz/run.py                          all targets, ten minutes each, two at a time
    python fuzz/run.py index --seconds 60
    python fuzz/run.py values --inputs 100000 --plain
    python fuzz/run.py whole --input FILE       one input, as libFuzzer leaves it behind

Led by coverage where atheris is installed (the extra `fuzz`), by chance otherwise or with --plain. What libFuzzer
collects stays in runs/fuzz and is compared with the slow decoder, input by input, when time is up; --keep adds to
fuzz/corpus what of it goes where no seed goes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).parent
WORK = HERE.parent / "runs" / "fuzz"
NAMES = ("whole", "index", "values")
HEADROOM = 1 << 29  # bytes of address space beyond what the process has when it begins
AT_A_TIME = 2
LARGEST = 1 << 15  # bytes of a corpus in this repository


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", choices=NAMES)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--inputs", type=int, default=0, help="0: as many as there is time for")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="by chance, without atheris")
    parser.add_argument("--keep", action="store_true", help="run nothing; sort out what earlier runs have found")
    parser.add_argument("--input", type=Path)
    options = parser.parse_args()
    if options.target is None:
        return every(sys.argv[1:])
    if options.input is not None:
        print(import_targets().TARGETS[options.target](options.input.read_bytes()))
        return 0
    if options.keep:
        return keep(options.target)
    if options.plain or importlib.util.find_spec("atheris") is None:
        return by_chance(options)
    return by_coverage(options)


def every(arguments: list[str]) -> int:
    """Each target in a process of its own."""

    def one(name: str) -> tuple[str, int, str]:
        done = subprocess.run([sys.executable, __file__, name, *arguments], capture_output=True, text=True)
        return name, done.returncode, done.stdout + done.stderr

    failed = False
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for name, status, output in pool.map(one, NAMES):
            counted = re.findall(r"Done (\d+) runs in (\d+) second", output)
            said = "{} inputs in {} s".format(*counted[-1]) if counted else "did not finish"
            said += "".join(f", {n} of them new and compared" for n in re.findall(r"Compared (\d+) inputs", output))
            print(f"{name:8}{said}{'' if status == 0 else f', exit status {status}'}", flush=True)
            if status or not counted:
                failed = True
                print(output[-5000:])
    return int(failed)


def import_targets() -> Any:
    sys.path.insert(0, str(HERE))
    import targets

    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))
    targets.torch.set_num_threads(1)
    return targets


def attempt(run: Callable[[bytes], Any], data: bytes) -> None:
    try:
        run(data)
    except Exception:
        print(f"input {data.hex()}", file=sys.stderr)
        raise


def by_chance(options: argparse.Namespace) -> int:
    targets = import_targets()
    run, pool, rng = targets.TARGETS[options.target], targets.seeds(options.target), random.Random(options.seed)
    for data in pool:
        attempt(run, data)
    targets.settle()
    targets.every = False
    started, inputs = time.monotonic(), 0
    while time.monotonic() - started < options.seconds and (not options.inputs or inputs < options.inputs):
        attempt(run, targets.mutated(rng, pool))
        inputs += 1
    print(f"Done {inputs} runs in {time.monotonic() - started:.0f} second(s)")
    return 0


def by_coverage(options: argparse.Namespace) -> int:
    import atheris

    with atheris.instrument_imports(include=["lamina.wire"], enable_loader_override=False):
        targets = import_targets()
    run, corpus, crashes = targets.TARGETS[options.target], WORK / options.target, WORK / "crashes"
    for folder in (corpus, crashes):
        folder.mkdir(parents=True, exist_ok=True)
    for data in targets.seeds(options.target):
        attempt(run, data)
        (corpus / targets.reference.hashlib.sha1(data).hexdigest()).write_bytes(data)
    targets.settle()
    fuzzing = os.fork()
    if not fuzzing:
        targets.every = False
        limits = [f"-max_total_time={options.seconds}", f"-runs={options.inputs or -1}", f"-seed={options.seed}"]
        limits += [f"-max_len={targets.LONGEST}", f"-artifact_prefix={crashes}/{options.target}-", "-timeout=10"]
        atheris.Setup([sys.argv[0], *limits, str(corpus)], run)
        atheris.Fuzz()  # ends the process
    status = os.waitstatus_to_exitcode(os.waitpid(fuzzing, 0)[1])
    if status:
        return abs(status)
    new = sorted(corpus.iterdir())
    for file in new:
        attempt(run, file.read_bytes())
    print(f"Compared {len(new)} inputs that go where no other goes")
    return 0


def keep(name: str) -> int:
    targets = import_targets()
    run, path = targets.TARGETS[name], HERE / "corpus" / f"{name}.txt"
    seen = {step for data in targets.seeds(name) for step in steps(run, data)}
    found = sorted((file.read_bytes() for file in (WORK / name).iterdir()), key=lambda data: (len(data), data))
    lines = path.read_text().split() if path.exists() else []
    for data in found:
        new = steps(run, data) - seen
        if new:
            seen |= new
            lines.append(data.hex())
    text = "".join(f"{line}\n" for line in lines)
    if len(text) > LARGEST:
        print(f"{len(text)} bytes are too many to keep, expected at most {LARGEST}", file=sys.stderr)
        return 1
    path.write_text(text)
    print(f"{name}: {len(lines)} inputs, {len(text)} bytes")
    return 0


def steps(run: Callable[[bytes], Any], data: bytes) -> set[Any]:
    """From which line of lamina.wire to which it goes, and what it comes to."""
    gone: set[Any] = set()

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        file, last = frame.f_code.co_filename, 0
        if "/lamina/wire/" not in file:
            return None

        def step(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            gone.add((file, last, frame.f_lineno))
            last = frame.f_lineno
            return step

        return step

    sys.settrace(enter)
    try:
        outcome = run(data)
    finally:
        sys.settrace(None)
    return gone | {outcome if isinstance(outcome, str) else ""}


if __name__ == "__main__":
    sys.exit(main())
