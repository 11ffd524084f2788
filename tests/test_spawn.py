"""Workers where fork is not to be had: spawned, with the bits of `loop`. Each of these starts Python anew, so they are
few. What a forked worker does, too, is in test_engine.py."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import cases
import lamina.engine as engines
from lamina import ClientData, ConfigError, FedAvg, Federation, LocalSGD, RunError, entry
from lamina.data.transform import Identity
from lamina.engine import children, processes

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="looks at processes as Linux shows them")
MARK = 3  # a label that one client alone has


@pytest.fixture(autouse=True)
def no_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "available", lambda: False)


def running() -> set[int]:
    """Processes below this one, dead ones that nobody waited for included."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    resource_tracker.ensure_running()  # Python's own, one for all that this process ever spawns
    before = running()
    yield
    assert running() <= before


# ---- what a spawned worker is handed: by name, so at the top level of this file


def in_a_worker() -> bool:
    return multiprocessing.parent_process() is not None


def acting(action: Callable[[], object], output: Tensor, y: Tensor) -> Tensor:
    if in_a_worker() and bool((y == MARK).all()):
        action()
    return functional.cross_entropy(output, y)


def killed(output: Tensor, y: Tensor) -> Tensor:
    return acting(lambda: os.kill(os.getpid(), signal.SIGKILL), output, y)


def failing(output: Tensor, y: Tensor) -> Tensor:
    return acting(lambda: 1 / 0, output, y)


def interrupting(output: Tensor, y: Tensor) -> Tensor:
    """What Ctrl-C does: every process of the terminal is sent it."""

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getppid(), signal.SIGINT)

    return acting(interrupt, output, y)


class Unreadable(Identity):
    """It can be sent, and not be read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (int, ("no number",))


def marked(**options: Any) -> Federation:
    """Three clients with 4, 3 and 2 steps; the last one, "cyd", holds the mark."""
    x, y = cases.data().x, cases.data().y % 3
    last = torch.full((16,), MARK)
    data = ClientData.from_clients(
        {"ann": (x[:32], y[:32]), "bob": (x[32:56], y[32:56]), "cyd": (x[56:72], last)}, test=(x[:8], y[:8])
    )
    local = LocalSGD(lr=0.1, batch_size=8)
    return Federation(cases.small, data, **{"engine": "processes", "workers": 2, "local": local} | options)


# ---- the choice


def test_what_asks_for_workers_has_them_and_auto_does_not() -> None:
    """A script without a `__main__` guard must keep working unless it asks for workers."""
    assert cases.federation(engine="processes", workers=2).workers == 2
    asked = cases.federation(model="small", engine="stacked", cohort=5, workers=2)
    assert (asked.engine, asked.workers) == ("stacked", 2)
    groups = {str(i): list(range(i, i + 8)) for i in range(16)}
    many = ClientData.from_index(cases.data().x, cases.data().y, groups)
    auto = Federation(cases.small, many, engine="auto")
    assert (auto.engine, auto.workers) == ("stacked", 1)
    assert Federation(cases.odd, many, engine="auto", workers=2).engine == "threads"


# ---- bits


def test_spawned_workers_give_the_bits_of_loop() -> None:
    """Two methods, a model with buffers and a frozen layer, clients' own test sets."""
    state, records = cases.finish(cases.case("fedlama, scaffold"), 3)
    other, others = cases.finish(cases.case("fedlama, scaffold", engine="processes", workers=2), 3)
    assert cases.everything(other) == cases.everything(state)
    assert others == records


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavg", "errorfeedback", "lips", "personal", "ssfl, fedlama", "feddyn"])
def test_spawned_workers_give_the_bits_of_loop_with_every_kind_of_state(name: str) -> None:
    state, records = cases.finish(cases.case(name))
    other, others = cases.finish(cases.case(name, engine="processes", workers=2))
    assert cases.everything(other) == cases.everything(state)
    assert others == records


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_spawned_stacks_give_the_bits_of_one_process(name: str) -> None:
    def stacked(workers: int) -> Federation:
        fed = cases.case(name, model="double", engine="stacked", cohort="all", workers=workers)
        fed._stack.width = 2
        return fed

    one, records = cases.finish(stacked(1), 3)
    other, others = cases.finish(stacked(2), 3)
    assert cases.everything(other) == cases.everything(one)
    assert others == records


# ---- memory


def test_data_and_arenas_are_in_memory_that_all_workers_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the inodes of what is mapped: all workers map the same, which is what the parent maps, and the piece from
    which each takes its model."""
    made: list[Any] = []
    make = engines.make
    monkeypatch.setattr(engines, "make", lambda *parts: made.append(make(*parts)) or made[-1])

    def shared(pid: int | str) -> dict[str, int]:
        found: dict[str, int] = {}
        for start, end, inode, _ in re.findall(
            r"(?m)^(\w+)-(\w+) \S+ \S+ \S+ (\d+) +(/dev/shm/torch\S+|/torch\S+)", Path(f"/proc/{pid}/maps").read_text()
        ):
            found[inode] = found.get(inode, 0) + int(end, 16) - int(start, 16)
        return found

    before = shared("self")  # data of other tests
    fed = marked()
    data = fed.data
    with contextlib.closing(fed.run(2)) as run:
        next(run)
        own = shared("self")
        one, other = (shared(child.pid) for child in made[0]._pool._children)
    assert one == other
    assert own.keys() - before.keys() <= one.keys()
    assert len(one.keys() - own.keys()) == 1
    assert sum(one.values()) >= sum(x.nbytes for x in (data.x, data.y, data.indices)) + (1 << 20)
    assert data.x.is_shared()
    assert data.indices.is_shared()


# ---- failures


@pytest.mark.slow
def test_a_spawned_worker_that_is_killed_in_a_round_is_named_with_its_client() -> None:
    with pytest.raises(RunError, match=r"signal 9 while client 'cyd' was training") as caught:
        list(marked(loss=killed).run(2))
    assert caught.value.code == "E303"


@pytest.mark.slow
def test_an_exception_in_a_spawned_worker_names_the_client() -> None:
    with pytest.raises(RunError, match="ZeroDivisionError") as caught:
        list(marked(loss=failing).run(2))
    assert caught.value.code == "E304"
    assert "client 'cyd'" in caught.value.where


@pytest.mark.slow
def test_a_keyboard_interrupt_is_the_parents_business() -> None:
    """The worker that gets it, too, goes on; the parent ends the run, and no process is left. Once: cyd takes one
    step."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            list(marked(loss=interrupting, local=LocalSGD(batch_size=16)).run(1))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_worker_that_cannot_start_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    x, y = cases.data().x, cases.data().y
    data = ClientData.from_clients({"a": (x[:8], y[:8]), "b": (x[8:16], y[8:16])}, transform=Unreadable())
    with pytest.raises(ConfigError, match="could not start") as caught:
        list(Federation(cases.small, data, engine="processes", workers=2).run(1))
    assert caught.value.code == "E118"
    assert "__main__" in caught.value.remedy
    assert "no number" in capfd.readouterr().err


def local_model() -> nn.Module:
    class Local(nn.Linear):
        pass

    return nn.Sequential(nn.Flatten(), Local(64, 4))


def local_method() -> FedAvg:
    class Local(FedAvg):
        pass

    return Local()


def local_transform() -> ClientData:
    class Local(Identity):
        pass

    return ClientData.from_clients({"a": (torch.randn(4, 64), torch.arange(4))}, transform=Local())


@pytest.mark.parametrize(
    ("part", "options"),
    [
        ("loss", lambda: {"loss": lambda output, y: functional.cross_entropy(output, y)}),
        ("model", lambda: {"model": local_model}),
        ("method", lambda: {"method": local_method()}),
        ("local", lambda: {"local": LocalSGD(schedule=lambda round, rounds: 1.0)}),
        ("transform", lambda: {"data": local_transform()}),
    ],
)
def test_what_cannot_be_sent_is_refused_before_anything_runs(part: str, options: Callable[[], dict[str, Any]]) -> None:
    made = {"model": cases.small, "data": cases.data()} | options()
    before = running()
    with pytest.raises(ConfigError, match=f" {part}: ") as caught:
        Federation(**made, engine="processes", workers=2)
    assert (caught.value.code, caught.value.where) == ("E118", part)
    assert "engine='threads'" in caught.value.remedy
    assert "top level" in caught.value.remedy
    assert running() == before
    Federation(**made, engine="threads")


def test_what_an_interactive_session_defines_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """There `__main__` has no file that a worker could import."""

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(output, y)

    session = ModuleType("__main__")
    loss.__module__, loss.__qualname__ = "__main__", "loss"
    session.loss = loss  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "__main__", session)
    with pytest.raises(ConfigError, match="loss is defined in an interactive session") as caught:
        cases.federation(loss=loss, engine="processes")
    assert caught.value.code == "E118"


@pytest.mark.slow
def test_a_part_of_a_users_file_is_handed_over(tmp_path: Path) -> None:
    """As `loss = { entry = "mine.py:loss" }` in a configuration: no import finds that file by a name."""
    mine = tmp_path / "mine.py"
    mine.write_text("from torch.nn import functional\n\n\ndef loss(x, y):\n    return functional.cross_entropy(x, y)\n")
    loss = entry.thing(f"{mine}:loss", "loss")
    state, _ = cases.finish(cases.federation(loss=loss, engine="processes", workers=1), 1)
    assert cases.everything(state) == cases.everything(cases.finish(cases.federation(), 1)[0])


def test_client_tests_in_one_piece_are_what_they_were() -> None:
    tests = {
        "a": (torch.arange(6.0).view(2, 3), torch.tensor([1, 2])),
        "b": ({"ids": torch.ones(1, 3, dtype=torch.int16), "mask": torch.zeros(1, 3, dtype=torch.bool)}, torch.ones(1)),
    }
    made = children._gathered(tests)
    assert cases.bits(made) == cases.bits(tests)
    assert len({x.untyped_storage().data_ptr() for x in (made["a"][0], made["a"][1], made["b"][0]["mask"])}) == 1


SCRIPT = """
import multiprocessing, sys, time
import torch
import lamina
from lamina.engine import processes
from torch.nn import functional

processes.available = lambda: False

def slow(output, y):
    if multiprocessing.parent_process() is not None and sys.argv[1] == "slow":
        time.sleep(60)
    return functional.cross_entropy(output, y)

def main():
    x, y = torch.randn(64, 8), torch.randint(2, (64,))
    data = lamina.ClientData.from_dataset((x, y), clients=4)
    model = torch.nn.Linear(8, 2)
    fed = lamina.Federation(model, data, loss=slow, engine="processes", workers=2)
    print("made", flush=True)
    fed.fit(2, sys.argv[2], progress=False)
    print("done", flush=True)

"""


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_so_and_leaves_one_run_folder(tmp_path: Path) -> None:
    """Each worker that starts runs the script from its top; it must not get as far as a run of its own."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + "main()\n")
    done = subprocess.run(
        [sys.executable, script, "fast", tmp_path / "run"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert done.stdout.split() == ["made"]
    assert "E118" in done.stderr.splitlines()[-2] + done.stderr.splitlines()[-1]
    assert "__main__" in done.stderr
    script.write_text(SCRIPT + "if __name__ == '__main__':\n    main()\n")
    again = [sys.executable, script, "fast", tmp_path / "again"]
    assert "done" in subprocess.run(again, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.slow
def test_spawned_workers_end_with_a_parent_that_is_killed_in_the_middle_of_a_step(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + "if __name__ == '__main__':\n    main()\n")
    parent = subprocess.Popen([sys.executable, script, "slow", tmp_path / "run"], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"made\n"
    time.sleep(8)  # the workers have begun by now
    workers = [int(p) for t in Path(f"/proc/{parent.pid}/task").glob("*/children") for p in t.read_text().split()]
    assert len(workers) == 3  # with Python's resource tracker
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while (left := [pid for pid in workers if runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def runs(pid: int) -> bool:
    """Not one that has ended and waits to be asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_only_files_that_could_be_loaded_are_loaded_again(tmp_path: Path) -> None:
    """What another run named and could not be used, or is gone, is not handed to workers."""
    wrong, gone, fine = (tmp_path / name for name in ("wrong.py", "gone.py", "fine.py"))
    wrong.write_text("x = = 1\n")
    for path in (gone, fine):
        path.write_text("x = 1\n")
        assert entry.thing(f"{path}:x", "loss") == 1
    with pytest.raises(ConfigError, match="cannot be loaded"):
        entry.thing(f"{wrong}:x", "loss")
    gone.unlink()
    known = entry.loaded()
    assert str(fine) in known
    assert not {str(wrong), str(gone)} & {*known}
