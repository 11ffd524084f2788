"""Chaos on purpose: the same for the same seed, and an account that adds up."""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import cases
from lamina import ConfigError, FedLAMA, RunError, config, folder, survival
from lamina.chaos import GROUP, Chaos, Chaotic, Kill
from lamina.survival import WHERE, counted, survive

ALL = dict.fromkeys(GROUP, 0.06)


def test_shares_are_met_in_the_long_run() -> None:
    """Each is 6 % of 4,000 replies: 240, with a standard deviation of 15."""
    chaos = Chaos(**ALL, duplicate=0.1)
    fates = [chaos.fate(t, c) for t in range(400) for c in range(10)]
    counts = Counter(fate.meets for fate in fates)
    assert all(abs(counts[name] - 240) < 75 for name in GROUP)
    assert abs(sum(fate.twice for fate in fates) - 400) < 95
    assert fates == [Chaos(**ALL, duplicate=0.1).fate(t, c) for t in range(400) for c in range(10)]
    assert fates != [Chaos(**ALL, duplicate=0.1, seed=1).fate(t, c) for t in range(400) for c in range(10)]


def test_a_delay_beyond_the_deadline_is_late() -> None:
    """An exponential with mean 2 is beyond 2 with probability 1/e."""
    fates = [Chaos(delay=2.0).fate(t, 0, 2.0) for t in range(2000)]
    assert all((fate.meets == "late") == (fate.seconds > 2.0) for fate in fates)
    assert 0.33 < sum(fate.meets == "late" for fate in fates) / 2000 < 0.41
    assert not any(Chaos(delay=2.0).fate(t, 0).meets for t in range(50))  # nobody waits for anybody


@pytest.mark.parametrize(
    "wrong",
    [{"drop": -0.1}, {"nan": 1.1}, {"drop": 0.6, "nan": 0.6}, {"delay": -1}, {"kill": ("me",)}, {"seed": -1}],
)
def test_impossible_chaos_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Chaos(**wrong)
    assert caught.value.code == "E103"


def test_a_kill_names_a_process_and_a_round() -> None:
    assert Kill.of("worker@r3") == Kill("worker", 3)
    assert str(Kill.of("run@7")) == "run@r7"
    for text in ("run", "run@", "server@r1", "run@r-1", "run@r1 "):
        with pytest.raises(ConfigError):
            Kill.of(text)


@pytest.mark.parametrize("engine", ["loop", "processes"])
def test_the_same_chaos_comes_again_whatever_the_engine(engine: str) -> None:
    def run(engine: str) -> Any:
        fed = cases.federation(FedLAMA(phi=2), cohort="all", engine=engine, workers=2, faults={"on_quorum": "skip"})
        chaos = Chaos(**dict.fromkeys(GROUP, 0.08), duplicate=0.2, reorder=True)
        return list(fed.through(lambda inner: Chaotic(inner, chaos)).run(4))

    found, expected = run(engine), run("loop")
    assert cases.everything(found[-1][0]) == cases.everything(expected[-1][0])
    assert [r.events for _, r in found] == [r.events for _, r in expected]
    assert sum(len(r.events) for _, r in found) > 3


def test_a_reply_that_is_late_comes_in_the_next_round() -> None:
    fed = cases.federation(cohort="all", faults={"on_quorum": "skip"})
    pairs = list(fed.through(lambda inner: Chaotic(inner, Chaos(late=1.0))).run(2))
    assert [c.refused for c in pairs[0][1].clients] == ["E311"] * 5
    assert Counter(e["code"] for e in pairs[1][1].events) == {"E332": 5, "E311": 5, "E306": 1}
    assert pairs[0][1].bytes_up == 0
    beside = [t.bytes for t in pairs[1][1].traffic if t.layer == "_unused"]
    assert sum(beside) == pairs[1][1].bytes_up > 0
    assert sum(c.bytes_up for c in pairs[1][1].clients) == pairs[1][1].bytes_up


def account_of(tmp_path: Path, *keys: str, **chaos: Any) -> Any:
    made = config.load("quickstart", ("rounds=4", "engine=loop", *keys))
    return survive(made, Chaos(**chaos), tmp_path)


def test_an_account_adds_up_and_the_model_is_that_of_the_survivors(tmp_path: Path) -> None:
    account = account_of(tmp_path, "cohort=all", "faults.on_quorum=skip", **ALL, duplicate=0.2, reorder=True, seed=2)
    assert account.adds_up
    assert account.right
    assert (account.asked, account.rounds, account.status) == (40, 4, "done")
    assert account.used + sum(account.refused.values()) == 40
    assert {"E310", "E311", "E320"} <= account.refused.keys()
    assert account.beside.keys() <= {"E331", "E332"}
    stored = json.loads((Path(account.run) / WHERE).read_text())
    assert stored["right"] is True
    assert counted(Path(account.run)).refused == account.refused


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_and_ends_in_the_same_model(tmp_path: Path) -> None:
    account = account_of(tmp_path, "cohort=4", kill=("run@r0", "run@r2"), drop=0.2)
    assert account.resumed == 2
    assert account.right
    assert account.rounds == 4


FAILING = """
import os
from lamina import FedAvg

class Failing(FedAvg):
    def plan(self, state, plan):
        if plan.round == 1:
            raise ValueError("it says " + os.environ["MY_TOKEN"])
        return plan
"""


@pytest.mark.slow
def test_an_error_of_the_users_own_is_no_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_TOKEN", "canary-of-the-chaos-tests")
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(FAILING)
    account = account_of(tmp_path, "method=own.py:Failing", kill=("run@r2",))
    assert (account.status, account.code, account.rounds, account.resumed) == ("failed", "E300", 1, 0)
    assert account.why == "ValueError: it says ***"
    assert "canary" not in "".join(capfd.readouterr())
    assert not [path for path in Path(account.run).rglob("*") if path.is_file() and b"canary" in path.read_bytes()]


class Pipe:
    def send_bytes(self, blob: bytes) -> None:
        self.said = json.loads(blob)


def test_what_is_no_error_of_ours_is_told_without_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: Any) -> None:
        raise ValueError(f"no \x1b[2J {'canary-of-the-chaos-tests'}")

    monkeypatch.setenv("MY_TOKEN", "canary-of-the-chaos-tests")
    monkeypatch.setattr(survival, "_go", fails)
    pipe, made = Pipe(), config.load("quickstart", ())
    survival._child(pipe, made.model_dump_json(), json.dumps({"kill": ["run@r1"]}), str(tmp_path))
    assert pipe.said["code"] == "E300"
    assert pipe.said["message"] == "ValueError: no \x1b[2J ***"
    said = capsys.readouterr().err
    assert "ValueError: no ?[2J ***" in said
    assert "canary" not in said


@pytest.mark.parametrize(("ended", "killed"), [(-signal.SIGKILL, True), (1, False), (-signal.SIGSEGV, False)])
def test_only_sigkill_is_a_kill(ended: int, killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of the run says nothing and ends with this status."""

    class Process:
        exitcode = ended

        def start(self) -> None: ...
        def join(self) -> None: ...

    class Context:
        Pipe = staticmethod(multiprocessing.Pipe)

        def Process(self, **arguments: Any) -> Process:
            return Process()

    monkeypatch.setattr(survival.multiprocessing, "get_context", lambda how: Context())
    chaos, made = Chaos(kill=("run@r1",)), config.load("quickstart", ())
    with pytest.raises(survival._Killed if killed else RunError):
        survival._attempt(made, chaos, tmp_path, False)


def test_an_account_is_of_what_is_committed_whatever_clients_are_called(tmp_path: Path) -> None:
    """U+2028 ends a line for Python, and none in a log. What stands behind the committed length is not there."""
    row = {"name": "a\u2028b", "refused": None}
    info = dict.fromkeys(folder._NEEDED, 0) | {"version": folder.VERSION, "status": "done"}
    lengths = {}
    for log, rows in (("clients.jsonl", [row, {**row, "refused": "E310"}]), ("events.jsonl", [{"event": "resumed"}])):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rows).encode()
        (tmp_path / log).write_bytes(text + text + b'{"half')
        lengths[log] = len(text)
    (tmp_path / "run.json").write_text(json.dumps({**info, "lengths": lengths}))
    account = counted(tmp_path)
    assert (account.asked, account.used, account.refused, account.resumed) == (2, 1, {"E310": 1}, 1)


def test_a_worker_that_is_killed_costs_no_client_anything(tmp_path: Path) -> None:
    account = account_of(tmp_path, "engine=processes", "workers=2", "cohort=all", kill=("worker@r1",))
    assert (account.resumed, account.used, account.right) == (1, 40, True)


def test_too_few_end_the_run_and_are_accounted_for(tmp_path: Path) -> None:
    account = account_of(tmp_path, "faults.min_replies=0.9", drop=0.8)
    assert (account.status, account.code, account.right) == ("failed", "E306", None)


def test_the_command_prints_the_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lamina.cli import app

    monkeypatch.setenv("LAMINA_RUNS", str(tmp_path))
    arguments = [
        "chaos",
        "quickstart",
        "rounds=3",
        "engine=loop",
        "--drop",
        "0.2",
        "--nan",
        "0.1",
        "--duplicate",
        "0.3",
    ]
    shown = CliRunner().invoke(app, [*arguments, "--json"])
    assert shown.exit_code == 0, shown.output
    (fact,) = [said for line in shown.stdout.splitlines() if (said := json.loads(line))["event"] == "chaos"]
    assert fact["right"] is True
    assert fact["asked"] == fact["used"] + sum(fact["refused"].values())
    assert fact["chaos"] == {"drop": 0.2, "nan": 0.1, "duplicate": 0.3, "seed": 0}
    plain = CliRunner().invoke(app, [*arguments, "--no-check"])
    assert "not asked for" in plain.stdout
    wrong = CliRunner().invoke(app, ["chaos", "quickstart", "rounds=3", "--kill", "run@r3"])
    assert wrong.exit_code == 2
    assert "this run has the rounds 0 to 2" in wrong.output


def test_a_run_that_nobody_can_make_again_is_not_compared(tmp_path: Path) -> None:
    private = ("weights=uniform", "privacy.clip=1.0", "privacy.noise=1.0", "privacy.noise_seed=system")
    account = account_of(tmp_path, "rounds=2", *private, drop=0.2)
    assert (account.status, account.right) == ("done", None)
    assert "from the system" in account.why
