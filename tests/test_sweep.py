"""Sweeps: what the combinations are, what is not run again, what one failure costs, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lamina import cli, engine, folder, runs
from lamina.config import build, load
from lamina.errors import ConfigError, StorageError
from lamina.jobs import Job, _cores, going
from lamina.runs import Run
from lamina.sweep import Point, Stopped, Swept, _folder_of, alternatives, federation, finished, points, sweep
from lamina.terminal import Quiet

SMALL = ("engine=loop", "model.widths=[64, 12, 10]", "data.clients=6", "cohort=3", "local.epochs=1", "rounds=1")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAMINA_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def swept(planned: list[Point], root: Path, jobs: int = 1, events: list[dict[str, Any]] | None = None) -> Swept:
    return sweep(planned, root, jobs, Quiet(), (events if events is not None else []).append)


def names(made: Swept) -> list[str]:
    return [run.path.name for run in made.runs]


# ---- what to run


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.1,0.03", ["0.1", "0.03"]),
        ("fedavg", ["fedavg"]),
        ("topk:0.01, topk:0.1", ["topk:0.01", "topk:0.1"]),
        ("[64,10],[64,32,10]", ["[64,10]", "[64,32,10]"]),
        ("[ssfl,fedlama],fedavg", ["[ssfl,fedlama]", "fedavg"]),
        ('{name="topk", density=0.1},fp32', ['{name="topk", density=0.1}', "fp32"]),
        ("\"a,b\",'c,d'", ['"a,b"', "'c,d'"]),
        (r'"a\",b",c', [r'"a\",b"', "c"]),
        ("", [""]),
    ],
)
def test_commas_inside_brackets_and_quotes_separate_nothing(text: str, values: list[str]) -> None:
    assert alternatives(text, "x") == values


@pytest.mark.parametrize("text", ["a,", ",a", "a,,b", ","])
def test_an_empty_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="a value between commas is empty"):
        alternatives(text, "x")


def test_every_combination_is_run_with_the_first_seed_before_any_with_the_second() -> None:
    planned = points("quickstart", ["method=fedavg,fedlama", "local.lr=0.1,0.3", *SMALL], 2)
    assert [point.title for point in planned] == [
        f"method={method} local.lr={lr} seed={seed}"
        for seed in (0, 1)
        for method in ("fedavg", "fedlama")
        for lr in ("0.1", "0.3")
    ]
    assert [point.config.seed for point in planned] == [0] * 4 + [1] * 4
    assert planned[-1].config.local.arguments["lr"] == 0.3
    assert planned[0].config.origin("seed") == "--seeds"
    assert planned[0].config.origin("local.lr") == "command line, argument 3"


def test_a_seed_changes_neither_the_data_nor_the_split() -> None:
    first, second = points("quickstart", SMALL, 2)
    assert first.config.data == second.config.data


@pytest.mark.parametrize(
    ("keys", "seeds", "message"),
    [
        (["local.lr=0.1", "local.lr=0.3"], None, "local.lr is given twice"),
        (["seed=1,2"], 2, "seed is given, and --seeds too"),
        (["engine=loop,processes"], None, "are the same experiment"),
        (["local.lr=0.1,0.10"], None, "are the same experiment"),
        (["method.phi=2,4"], None, "unknown key  method.phi"),
        (["local.lr=0.1,-1"], None, "lr"),
        (["rounds"], None, "expected key=value"),
        ([], 0, "--seeds=0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_run(
    keys: list[str], seeds: int | None, message: str, root: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        points("quickstart", keys, seeds)
    assert not root.exists()


# ---- running


def test_what_is_finished_is_not_run_again(root: Path) -> None:
    first = swept(points("quickstart", ["local.lr=0.1,0.3", *SMALL]), root)
    assert names(first) == ["001-fedavg", "002-fedavg"]
    events: list[dict[str, Any]] = []
    again = swept(points("quickstart", ["local.lr=0.3,0.2,0.1", *SMALL]), root, events=events)
    assert names(again) == ["002-fedavg", "003-fedavg", "001-fedavg"]
    assert events[0] == {"event": "sweep", "runs": 3, "finished": 2, "to_do": 1}
    assert [event["event"] for event in events] == ["sweep", "start", "end"]
    assert events[1]["settings"] == {"local.lr": "0.2"}


def test_the_last_of_more_than_999_runs_is_gone_on_with(root: Path) -> None:
    (point,) = points("quickstart", SMALL)
    info = dict.fromkeys(folder._NEEDED, 0) | {"version": folder.VERSION, "status": "failed", "lengths": {}}
    for name in ("999-fedavg", "1000-fedavg", "mine"):
        (root / "quickstart" / name).mkdir(parents=True)
        (root / "quickstart" / name / "run.json").write_text(json.dumps({**info, "config_sha256": point.config.sha256}))
        (root / "quickstart" / name / "env.json").write_text('{"data": {"fingerprint": ""}}')
    assert _folder_of(root, point.config) == root / "quickstart" / "1000-fedavg"


def test_what_a_round_puts_up_with_makes_another_experiment(root: Path) -> None:
    """Where fewer answer a round is skipped, which leaves another model than a round that is not."""
    keys = ["availability=random:0.4", "faults.on_quorum=skip", *SMALL[:-1], "rounds=3"]
    one, three = points("quickstart", ["faults.min_replies=1,3", *keys])
    made = swept([one, three], root)
    assert names(made) == ["001-fedavg", "002-fedavg"]
    assert len({run.info["final_sha256"] for run in made.runs}) == 2
    events: list[dict[str, Any]] = []
    assert names(swept(points("quickstart", ["faults.min_replies=3,2", *keys]), root, events=events))[0] == "002-fedavg"
    assert events[0]["to_do"] == 1
    with pytest.raises(StorageError, match=r"other settings: faults\.min_replies") as caught:
        finished(made.runs[0].path, three.config)
    assert caught.value.code == "E402"


def test_a_run_of_before_a_key_was_there_is_finished(root: Path) -> None:
    """As if lamina had no `diagnostics` and FedLAMA no `warmup` yet when it was made."""
    (plain,) = points("quickstart", ["method=fedlama", *SMALL])
    (made,) = swept([plain], root).runs
    environment = json.loads((made.path / "env.json").read_text())
    del environment["config"]["diagnostics"], environment["config"]["method.0.warmup"]
    (made.path / "env.json").write_text(json.dumps(environment))
    assert finished(made.path, plain.config) is not None
    for said, key in (("diagnostics=false", "diagnostics"), ("method.warmup=1", "method.0.warmup")):
        (other,) = points("quickstart", ["method=fedlama", *SMALL, said])
        with pytest.raises(StorageError, match=f"other settings: {key}"):
            finished(made.path, other.config)


def test_a_run_of_lamina_run_counts_as_finished(root: Path) -> None:
    config = load("quickstart", SMALL)
    made = runs.fit(build(config), 1, root=root, config=config, progress=False)
    assert [run.path for run in swept(points("quickstart", SMALL), root).runs] == [made.path]


def test_what_was_stopped_goes_on_and_ends_as_if_it_had_not(root: Path) -> None:
    planned = points("quickstart", [*SMALL[:-1], "rounds=3", "method=fedavg,fedlama"])

    class Stop(Quiet):
        def round(self, row: Any) -> None:
            if row.round == 1:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped, match="0 of 2 runs are finished; the same command goes on from here") as stopped:
        sweep(planned, root, 1, Stop(), lambda event: None)
    assert stopped.value.exit_code == 130
    assert Run.open(root / "quickstart" / "001-fedavg").info["status"] == "interrupted"
    made = swept(planned, root)
    assert names(made) == ["001-fedavg", "002-fedlama"]
    whole = runs.fit(build(planned[0].config), 3, root.parent / "whole", config=planned[0].config, progress=False)
    assert made.runs[0].info["final_sha256"] == whole.info["final_sha256"]


def test_a_run_that_fails_does_not_lose_the_others(root: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import torch\n"
        "def model(cfg):\n"
        "    if cfg.seed == 1:\n"
        "        raise ValueError('no weights for seed 1')\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    keys = [key for key in SMALL if not key.startswith("model")]
    events: list[dict[str, Any]] = []
    made = swept(points("quickstart", [*keys, f"model={mine}:model"], 3), root, events=events)
    assert [run.info["seed"] for run in made.runs] == [0, 2]
    (failure,) = made.failed
    assert failure["seed"] == 1
    assert "no weights for seed 1" in failure["error"]
    assert failure["run"] is None
    assert [event["event"] for event in events] == ["sweep", "start", "end", "start", "failed", "start", "end"]
    assert sorted(path.name for path in (root / "quickstart").iterdir()) == ["001-fedavg", "002-fedavg"]


def test_to_diverge_is_a_result_and_is_not_tried_again(root: Path) -> None:
    planned = points("quickstart", ["local.lr=0.1,1e30", *SMALL])
    made = swept(planned, root)
    assert [run.info["status"] for run in made.runs] == ["done", "failed"]
    assert not made.failed
    events: list[dict[str, Any]] = []
    swept(planned, root, events=events)
    assert events[0]["to_do"] == 0


def test_a_users_file_that_changed_is_another_experiment(root: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    text = "import torch\ndef model():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    mine.write_text(text)
    keys = [key for key in SMALL if not key.startswith("model")]
    assert names(swept(points("quickstart", [*keys, f"model={mine}:model"]), root)) == ["001-fedavg"]
    mine.write_text(text + "# another\n")
    assert names(swept(points("quickstart", [*keys, f"model={mine}:model"]), root)) == ["002-fedavg"]


def test_the_engine_does_not_depend_on_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three clients a round on eight cores: `auto` takes all cores for one client, whose sums depend on how many."""
    keys = [key for key in SMALL if not key.startswith(("engine", "cohort"))]
    config = load("quickstart", [*keys, "cohort=1"], {})
    monkeypatch.setattr(engine, "cores", lambda: 8)
    assert build(config).engine == "threads"
    assert engine.bits(federation(config).engine) == "one thread"
    assert federation(config.model_copy(update={"engine": "threads"})).engine == "threads"


def test_threads_are_refused_where_several_run_at_once(root: Path) -> None:
    with pytest.raises(ConfigError, match="results would depend on --jobs"):
        swept(points("quickstart", [*SMALL[1:], "engine=threads"]), root, jobs=2)
    with pytest.raises(ConfigError, match="--jobs=0"):
        swept(points("quickstart", SMALL), root, jobs=0)
    assert not root.exists()


# ---- the command


def lamina(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["sweep", *arguments])


def test_the_command_ends_with_one_table(root: Path) -> None:
    result = lamina("quickstart", "method=fedavg,fedlama", *SMALL, "--seeds", "2")
    assert result.exit_code == 0, result.output
    table = result.stdout[result.stdout.rindex("\n  run ") :].splitlines()
    assert [line.split()[:4] for line in table[2:4]] == [
        ["001", "fedavg", "fp32", "2"],
        ["002", "fedlama", "fp32", "2"],
    ]
    assert table[-1] == "  next  lamina compare 001-004 --latex"
    objects = [json.loads(line) for line in lamina("quickstart", *SMALL, "--seeds", "2", "--json").stdout.splitlines()]
    assert [row["event"] for row in objects] == ["sweep", "compare"]
    assert objects[1]["n"] == 2


def test_a_quiet_sweep_prints_the_folders_and_the_table_and_nothing_else(root: Path) -> None:
    folders = [str(root / "quickstart" / name) for name in ("001-fedavg", "002-fedlama")]
    result = lamina("quickstart", "method=fedavg,fedlama", *SMALL, "--quiet")
    paths, _, table = result.stdout.partition("\n\n")
    assert paths.splitlines() == folders
    assert table == CliRunner().invoke(cli.app, ["compare", "001-002"]).stdout


def test_the_command_says_what_failed_and_with_which_error(root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def model(cfg):\n    raise ValueError('none')\n")
    keys = [key for key in SMALL if not key.startswith("model")]
    result = lamina("quickstart", *keys, f"model={tmp_path / 'mine.py'}:model")
    assert result.exit_code == 4
    assert "1 of 1 runs failed" in result.stderr
    assert "E106" in result.stderr


# ---- processes


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A job that says what it was given, fails, or sleeps until it is interrupted."""
    (tmp_path / "a_job.py").write_text(
        "import json, os, sys, time\n"
        "from pathlib import Path\n"
        "job = json.loads(sys.stdin.readline())\n"
        "out = Path(job['out'])\n"
        "cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else []\n"
        "out.write_text(json.dumps({'pid': os.getpid(), 'cores': cores}))\n"
        "if job['do'] == 'fail':\n"
        "    print('warned', file=sys.stderr)\n"
        "    raise SystemExit('E301  it cannot go on\\n      try again')\n"
        "if job['do'] == 'crash':\n"
        "    raise ZeroDivisionError('on purpose')\n"
        "if job['do'] == 'die':\n"
        "    os.kill(os.getpid(), 9)\n"
        "if job['do'] == 'sleep':\n"
        "    time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "a_job"


def jobs_of(folder: Path, *does: str) -> Iterator[Job]:
    for number, do in enumerate(does):
        yield Job(number, folder, json.dumps({"do": do, "out": str(folder / f"{number}.json")}))


def never() -> bool:
    return False


def test_jobs_say_what_they_failed_of(module: str, tmp_path: Path) -> None:
    does = ("say", "fail", "crash", "die")
    found = {job.number: error for job, error in going(module, jobs_of(tmp_path, *does), 2, never)}
    assert found == {
        0: None,
        1: "E301  it cannot go on\n      try again",
        2: "E300  ZeroDivisionError: on purpose",
        3: "E303  its process ended with signal 9",
    }


def test_a_slot_has_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five cores and two slots: 0, 2, 4 and 1, 3. Two cores and three slots: the third shares the first."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4}, raising=False)
    assert [_cores(slot, 2) for slot in range(2)] == [[0, 2, 4], [1, 3]]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 7}, raising=False)
    assert [_cores(slot, 3) for slot in range(3)] == [[3], [7], [3]]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinity")
def test_a_job_runs_on_its_share_and_the_sweep_keeps_all(module: str, tmp_path: Path) -> None:
    before = sorted(os.sched_getaffinity(0))
    assert len(list(going(module, jobs_of(tmp_path, "say", "say"), len(before), never))) == 2
    assert sorted(os.sched_getaffinity(0)) == before
    assert len(json.loads((tmp_path / "0.json").read_text())["cores"]) == 1


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def wait_for(path: Path) -> dict[str, Any]:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        time.sleep(0.05)
    raise TimeoutError(path)


def test_one_wish_to_stop_interrupts_every_job_and_begins_none(module: str, tmp_path: Path) -> None:
    def asked() -> bool:
        return all((tmp_path / f"{i}.json").exists() for i in range(2))

    ended = list(going(module, jobs_of(tmp_path, "sleep", "sleep", "sleep"), 2, asked))
    assert sorted(job.number for job, _ in ended) == [0, 1]
    assert all("signal 2" in str(error) or "KeyboardInterrupt" in str(error) for _, error in ended)
    assert not (tmp_path / "2.json").exists()


def test_a_second_ctrl_c_leaves_no_process(module: str, tmp_path: Path) -> None:
    def asked() -> bool:
        if (tmp_path / "0.json").exists() and wait_for(tmp_path / "0.json"):
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        list(going(module, jobs_of(tmp_path, "sleep"), 1, asked))
    assert not alive(wait_for(tmp_path / "0.json")["pid"])


@pytest.mark.slow
def test_results_do_not_depend_on_jobs(root: Path) -> None:
    keys = ["method=fedavg,fedlama", *SMALL[1:-1], "rounds=3"]
    planned = points("quickstart", keys, 2)
    events: list[dict[str, Any]] = []
    one, two = swept(planned, root / "1"), swept(planned, root / "2", 2, events)
    assert names(one) == names(two) == ["001-fedavg", "002-fedlama", "003-fedavg", "004-fedlama"]
    for a, b in zip(one.runs, two.runs, strict=True):
        assert a.info["final_sha256"] == b.info["final_sha256"]
        assert [row._replace(seconds=0) for row in a.records] == [row._replace(seconds=0) for row in b.records]
        assert (a.path / "config.toml").read_text() == (b.path / "config.toml").read_text()
    assert [event["event"] for event in events].count("end") == 4


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_a_sweep_that_is_stopped_leaves_committed_runs_and_no_process(root: Path, number: str, code: int) -> None:
    keys = ["method=fedavg,fedlama", *SMALL[:-1], "rounds=100000", "--jobs", "2"]
    going = subprocess.Popen(
        [sys.executable, "-m", "lamina.cli", "sweep", "quickstart", *keys],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    logs = [root / "quickstart" / name / "metrics.jsonl" for name in ("001-fedavg", "002-fedlama")]
    end = time.monotonic() + 120
    while time.monotonic() < end and not all(log.exists() and log.stat().st_size for log in logs):
        time.sleep(0.1)
    going.send_signal(getattr(signal, number))
    _, said = going.communicate(timeout=60)
    assert going.returncode == code
    while time.monotonic() < end and any(Run.open(log.parent).info["status"] == "running" for log in logs):
        time.sleep(0.1)
    for log in logs:
        run = Run.open(log.parent)
        assert run.info["status"] == "interrupted"
        assert len(run.records) == run.info["rounds_done"] > 0
    if number == "SIGINT":
        assert "stopped: 0 of 2 runs are finished; the same command goes on from here" in said
