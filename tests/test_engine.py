"""Engines: which one is chosen, and what processes do when something goes wrong. Their bits: laws/test_engines.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import cases
import lamina.engine as engines
from lamina import (
    ClientData,
    ConfigError,
    FedAvg,
    Federation,
    LaminaError,
    LocalSGD,
    Message,
    Method,
    Params,
    Plan,
    RunError,
    Work,
    evaluate,
)
from lamina.data.transform import Identity
from lamina.engine import processes
from lamina.engine.arena import Arena, Full, anonymous_memory, layout, shared_memory

forked = pytest.mark.skipif(not processes.available(), reason="no fork here")


# ---- the choice


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set(cores: int = 4, forks: bool = True) -> None:
        monkeypatch.setattr(engines, "cores", lambda: cores)
        monkeypatch.setattr(processes, "available", lambda: forks)

    return set


@pytest.mark.parametrize(
    ("cores", "forks", "cohort", "chosen"),
    [
        (4, True, 10, ("processes", 4)),
        (4, True, 4, ("processes", 4)),
        (4, True, 3, ("threads", 1)),  # fewer clients than cores
        (4, False, 10, ("threads", 1)),
        (1, True, 10, ("loop", 1)),
    ],
)
def test_auto_follows_the_static_rule(machine, cores, forks, cohort, chosen) -> None:
    machine(cores, forks=forks)
    name, workers, reason = engines.choose("auto", cohort, None)
    assert (name, workers) == chosen
    assert reason


def test_a_number_of_workers_is_a_limit_and_so_is_the_cohort(machine) -> None:
    machine(cores=4)
    assert engines.choose("processes", 10, 2)[1] == 2
    assert engines.choose("processes", 10, 9)[1] == 9
    assert engines.choose("processes", 3, None)[1] == 3


def test_what_was_asked_for_is_what_is_used(machine) -> None:
    machine()
    for name in ("loop", "threads", "processes"):
        assert engines.choose(name, 10, None)[::2] == (name, "asked for")


def test_without_fork_processes_are_for_those_who_ask(machine) -> None:
    """They are spawned then, which a script must be fit for: see test_spawn.py."""
    machine(forks=False)
    assert engines.choose("processes", 10, 3) == ("processes", 3, "asked for")


@pytest.mark.parametrize("workers", [0, -1, 1.5, "2", True])
def test_a_number_of_workers_must_be_whole_and_positive(workers: Any) -> None:
    with pytest.raises(ConfigError, match="workers="):
        engines.choose("processes", 10, workers)


def test_the_machine_is_read_not_guessed() -> None:
    assert engines.cores() == len(os.sched_getaffinity(0))


def test_the_choice_stands_in_the_federation() -> None:
    fed = cases.federation(engine="processes", workers=2)
    assert (fed.engine, fed.workers, fed.engine_reason) == ("processes", 2, "asked for")


# ---- shared memory


@pytest.mark.parametrize("memory", [anonymous_memory, shared_memory])
def test_an_arena_gives_back_what_was_written(memory: Callable[[int], Tensor]) -> None:
    trees = {
        "a": {"x": torch.arange(5.0), "y": torch.tensor(True), "none": torch.empty(0, 3)},
        "b": {"z": torch.tensor([[1, 2], [3, 4]], dtype=torch.int16).t(), "h": torch.ones(3, dtype=torch.bfloat16)},
        "empty": {},
    }
    arena = Arena(memory(4096))
    entries, end = arena.write(trees, 128, 4096)
    assert cases.bits(arena.read(entries)) == cases.bits({t: x for t, x in trees.items() if x})
    assert layout(trees, 128) == (entries, end)
    assert all(offset % 64 == 0 for *_, offset in entries)


def test_an_arena_that_is_too_small_says_what_would_do_and_writes_nothing() -> None:
    arena = Arena(anonymous_memory(1024))
    with pytest.raises(Full) as caught:
        arena.write({"a": {"x": torch.ones(100), "y": torch.ones(100)}}, 64, 512)
    assert caught.value.needed == 896
    assert not bool(arena._bytes.any())
    arena.write({"a": {"x": torch.ones(100), "y": torch.ones(100)}}, 64, 64 + 896)


# ---- clients that fail


def children() -> set[int]:
    """Processes below this one, dead ones that nobody waited for included."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


PARENT = os.getpid()
MARK = 3  # a label that one client alone has


def marked(action: Callable[[], None], engine: str = "processes", **options: Any) -> Federation:
    """Three clients with 4, 3 and 2 steps; the last one, "cyd", holds the mark, at which its loss acts once trained."""
    x, y = cases.data().x, cases.data().y % 3
    last = torch.full((16,), MARK)
    data = ClientData.from_clients(
        {"ann": (x[:32], y[:32]), "bob": (x[32:56], y[32:56]), "cyd": (x[56:72], last)}, test=(x[:8], y[:8])
    )

    def loss(output: Tensor, y: Tensor) -> Tensor:
        if bool((y == MARK).all()):
            action()
        return nn.functional.cross_entropy(output, y)

    local = LocalSGD(lr=0.1, batch_size=8)
    return Federation(cases.small, data, loss=loss, engine=engine, **{"workers": 2, "local": local} | options)


def fail() -> None:
    raise ValueError("no such thing")


@pytest.mark.parametrize("engine", ["loop", pytest.param("processes", marks=forked)])
def test_an_exception_in_a_clients_step_names_the_client(engine: str) -> None:
    with pytest.raises(RunError, match="ValueError: no such thing") as caught:
        list(marked(fail, engine).run(2))
    assert caught.value.code == "E304"
    assert "client 'cyd'" in caught.value.where
    assert f"{Path(__file__).name}:" in caught.value.where


class Refuses(FedAvg):
    def report(self, client: Any, plan: Plan, work: Work, message: Message) -> tuple[Message, Any]:
        raise ConfigError("mu=-1: expected a number >= 0", code="E117", where="method.mu", remedy="use 0")


@pytest.mark.parametrize("engine", ["loop", pytest.param("processes", marks=forked)])
def test_an_error_of_lamina_keeps_its_code_place_and_remedy(engine: str) -> None:
    with pytest.raises(LaminaError, match="mu=-1") as caught:
        list(cases.federation(Refuses(), engine=engine).run(1))
    assert (caught.value.code, caught.value.where, caught.value.remedy) == ("E117", "method.mu", "use 0")


@forked
def test_a_worker_that_is_killed_in_a_round_is_named_with_its_client() -> None:
    fed = marked(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RunError, match=r"signal 9 while client 'cyd' was training") as caught:
        list(fed.run(2))
    assert caught.value.code == "E303"
    assert "memory" in caught.value.remedy


@forked
def test_a_worker_that_ends_on_its_own_is_named() -> None:
    with pytest.raises(RunError, match=r"status 7 while client 'cyd'") as caught:
        list(marked(lambda: os._exit(7)).run(1))
    assert caught.value.code == "E303"


class Kills(Identity):
    """In a worker, where it sees a value that one client alone has."""

    def __call__(self, x: Any, generator: torch.Generator | None) -> Any:
        if os.getpid() != PARENT and float(x.max()) >= 1000:
            os.kill(os.getpid(), signal.SIGKILL)
        return x


@forked
def test_a_worker_that_is_killed_with_a_stack_is_named_with_its_clients() -> None:
    """Four clients with 4, 3, 2 and 1 steps, two in a stack; the value is cyd's. No round comes out, not even a short
    one."""
    x, y = cases.data().x, cases.data().y
    ends = {"ann": (0, 32), "bob": (32, 56), "cyd": (56, 72), "dan": (72, 80)}
    clients = {name: (x[a:b] + 1000 * (name == "cyd"), y[a:b]) for name, (a, b) in ends.items()}
    data = ClientData.from_clients(clients, test=(x[:8], y[:8]), transform=Kills())
    fed = Federation(cases.small, data, local=LocalSGD(batch_size=8), engine="stacked", workers=2)
    fed._stack.width = 2
    fed.workers = 2
    done = []
    with pytest.raises(RunError, match=r"signal 9 while one of the clients 'cyd', 'dan' was training") as caught:
        done.extend(fed.run(2))
    assert caught.value.code == "E303"
    assert not done


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The engines that are made."""
    found: list[Any] = []
    make = engines.make

    def spy(*arguments: Any) -> Any:
        found.append(make(*arguments))
        return found[-1]

    monkeypatch.setattr(engines, "make", spy)
    return found


@forked
@pytest.mark.parametrize("which", [0, 1])
def test_a_worker_that_is_killed_between_rounds_is_noticed(which: int, made: list[Any]) -> None:
    run = cases.federation(engine="processes", workers=2).run(3)
    next(run)
    os.kill(made[0]._pool._children[which].pid, signal.SIGKILL)
    with pytest.raises(RunError, match="signal 9") as caught:
        next(run)
    assert caught.value.code == "E303"


@forked
def test_a_failure_while_evaluating_does_not_blame_a_client() -> None:
    """The pieces of a test set are numbered like clients; piece 1 is not client "bob", and piece 5 is nobody."""

    def loss(output: Tensor, y: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise ValueError("cannot evaluate")
        return nn.functional.cross_entropy(output, y)

    with pytest.raises(RunError, match="cannot evaluate") as caught:
        list(cases.federation(loss=loss, engine="processes", workers=2).run(1))
    assert caught.value.code == "E304"
    assert not any(repr(name) in str(caught.value) for name in cases.SIZES)


@forked
def test_a_failure_in_a_late_piece_of_the_test_set_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "_PIECE", 4)  # ten pieces, five clients

    def loss(output: Tensor, y: Tensor) -> Tensor:
        if torch.is_inference_mode_enabled() and torch.equal(y, cases.data().test[1][-4:]):
            raise ValueError("cannot evaluate")
        return nn.functional.cross_entropy(output, y)

    with pytest.raises(RunError, match="cannot evaluate") as caught:
        list(cases.federation(loss=loss, engine="processes", workers=2).run(1))
    assert caught.value.code == "E304"


# ---- nothing is left behind


@forked
def test_breaking_out_leaves_no_process(made: list[Any]) -> None:
    for _ in cases.federation(engine="processes", workers=3).run(9):
        assert len(children()) >= 3
        break
    assert made[0]._pool is None


@forked
def test_the_end_of_a_run_leaves_no_process_and_no_descriptor() -> None:
    cases.finish(cases.federation(engine="processes", workers=3), 1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        cases.finish(cases.federation(engine="processes", workers=3), 1)
    assert len(os.listdir("/proc/self/fd")) == before


@forked
def test_a_keyboard_interrupt_in_the_middle_of_a_round_leaves_no_process() -> None:
    """A worker sends the parent what Ctrl-C would, once; the workers themselves ignore it."""
    fed = marked(lambda: os.getpid() != PARENT and os.kill(os.getppid(), signal.SIGINT), local=LocalSGD(batch_size=16))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            list(fed.run(1))
    finally:
        signal.signal(signal.SIGINT, before)


@forked
def test_a_keyboard_interrupt_between_rounds_leaves_no_process() -> None:
    def stop(output: Tensor, y: Tensor) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(cases.federation(engine="processes", workers=2, metrics={"stop": stop}).run(2))


@forked
def test_an_error_of_the_caller_leaves_no_process() -> None:
    def use(fed: Federation) -> None:
        for _ in fed.run(2):
            1 / 0

    with pytest.raises(ZeroDivisionError):
        use(cases.federation(engine="processes", workers=2))


@forked
def test_a_run_can_be_begun_again_after_a_failure() -> None:
    calls = iter([fail])  # the first time only, in the parent's memory: each fork sees what was left of it
    fed = marked(lambda: next(calls, lambda: None)())
    with pytest.raises(RunError):
        list(fed.run(1))
    next(calls, None)
    assert cases.finish(fed, 1)[0].round == 1


@forked
def test_two_runs_in_processes_may_interleave() -> None:
    fed = cases.federation(cases.ALL["fedlama"](), engine="processes", workers=2)
    alone = cases.states(fed, 3)
    for (a, _), (b, _), expected in zip(fed.run(3), fed.run(3), alone, strict=True):
        assert cases.everything(a) == cases.everything(b) == cases.everything(expected)


# ---- room for replies


class Pile(NamedTuple):
    pile: Tensor


class Grows(Method[Any, Pile]):
    """A client state of so many KiB after each round."""

    hold = 4

    def __init__(self, sizes: tuple[int, ...]):
        self.sizes = sizes

    def init_client(self, params: Params) -> Pile:
        return Pile(torch.zeros(0))

    def report(self, client: Pile, plan: Plan, work: Work, message: Message) -> tuple[Message, Pile]:
        bias = work.params["head.bias"]
        extra = client.pile[:4].sum() if client.pile.numel() else torch.zeros(())
        update = message["update"] | {"head.bias": message["update"]["head.bias"] + 1e-3 * extra}
        return message | {"update": update}, Pile(bias.mean() + torch.arange(256.0 * self.sizes[plan.round]))


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the slots of the pools that are made; more than ten pools are an endless loop."""
    found: list[int] = []

    class Counted(processes._Pool):
        def __init__(self, *arguments: Any):
            assert len(found) < 10, f"slots of {found} bytes, and none is large enough"
            super().__init__(*arguments)
            found.append(self._slot)

    monkeypatch.setattr(processes, "_Pool", Counted)
    return found


SHAPES = {  # KiB of client state after each round; slots begin with some 80, and grow to twice of what was missing
    "grows": (100, 200, 300, 400),
    "grows late": (1, 1, 300, 300),
    "shrinks": (900, 100, 100, 100),
    "shrinks when its slot is just large enough": (400, 1, 750, 500),  # what comes in needs room beside what goes out
}


@forked
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("workers", [1, 2])
def test_slots_that_are_too_small_are_replaced_without_changing_a_bit(
    shape: str, workers: int, pools: list[int]
) -> None:
    method = Grows(SHAPES[shape])
    expected, records = cases.finish(cases.federation(method), 4)
    state, others = cases.finish(cases.federation(method, engine="processes", workers=workers), 4)
    assert cases.everything(state) == cases.everything(expected)
    assert others == records
    assert len(pools) > 1


@forked
def test_few_slots_are_enough_for_many_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for two replies per worker, fast clients wait for the slow one that is first in the order."""
    monkeypatch.setattr(processes, "_SLOT_BUDGET", 1)
    expected, records = cases.finish(cases.case("fedlama, scaffold", cohort="all"))
    state, others = cases.finish(cases.case("fedlama, scaffold", cohort="all", engine="processes", workers=1))
    assert cases.everything(state) == cases.everything(expected)
    assert others == records


@forked
def test_a_plan_that_grows_finds_room() -> None:
    """A tree shared from the second round on, larger than the room for plans."""

    class Shares(FedAvg):
        def plan(self, server: Any, plan: Plan) -> Plan:
            return plan if plan.round == 0 else plan.share(big={"x": torch.ones(1 << 19)})

        def correct(self, client: Any, plan: Plan, step: Tensor, params: Params, grads: Params) -> Params:
            return grads if plan.round == 0 else {n: g * plan.shared["big"]["x"][0] * 2 for n, g in grads.items()}

    expected, _ = cases.finish(cases.federation(Shares()), 3)
    state, _ = cases.finish(cases.federation(Shares(), engine="processes", workers=2), 3)
    assert cases.everything(state) == cases.everything(expected)


@forked
def test_workers_do_not_depend_on_the_thread_that_began_the_run() -> None:
    """A run is often begun in a thread of its own that ends before the run does (asyncio.to_thread, a notebook)."""
    from concurrent.futures import ThreadPoolExecutor

    run = cases.federation(engine="processes", workers=2).run(2)
    try:
        with ThreadPoolExecutor(1) as one:
            one.submit(next, run).result()
        assert next(run)[0].round == 2
    finally:
        run.close()
