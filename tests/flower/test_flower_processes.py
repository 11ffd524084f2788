"""Flower's own programs on this machine: SuperLink, SuperNodes, runs. `make test-flower`; minutes.

Every test is bounded in time, and checks that nothing is left of what it started. No test depends on how fast the
machine is, up to its bounds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs the extra lamina[flower]")
pytest.importorskip("cryptography", reason="needs the extra lamina[flower]")
pytest.importorskip("sklearn", reason="needs the extra lamina[demo]")

import lamina
from lamina import config, runs
from lamina.flower import keys, parity, project
from lamina.flower.processes import free_ports
from lamina.flower.rehearsal import Rehearsal
from lamina.runs import Run

pytestmark = pytest.mark.flower
LIMIT_S = 900
PATIENCE_S = 180
SMALL = [
    "rounds=3", "data.clients=5", "cohort=all", "model.widths=[64,16,16,10]", "local.epochs=1", "engine=loop",
    "run.keep_clients_log=true",
]  # fmt: skip


@pytest.fixture(autouse=True)
def bounded(tmp_path: Path) -> Iterator[None]:
    def over(number: int, frame: Any) -> None:
        raise TimeoutError(f"more than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, over)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, inherited
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        signal.signal(signal.SIGINT, interrupt)
    assert left(tmp_path) == []


def running(folder: Path) -> list[int]:
    """Processes whose environment names this folder."""
    found = [process for process in Path("/proc").glob("[0-9]*") if str(folder).encode() in _environ(process)]
    return [int(process.name) for process in found if int(process.name) != os.getpid()]


def _environ(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:  # it has just ended
        return b""


def left(folder: Path) -> list[int]:
    """Those that are there after a moment for what is about to end."""
    end = time.monotonic() + 10
    while (found := running(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def loaded(*settings: str) -> config.Config:
    return config.load("quickstart", [*SMALL, *settings], env={})


def simulated(made: config.Config, folder: Path) -> Run:
    return runs.fit(config.build(made), made.rounds, folder / "local", config=made, progress=False)


def events(run: Run) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "refused"]


METHODS = {
    "fedavg": ["method=fedavg"],
    "fedlama": ["method=fedlama", "method.phi=2", "cohort=3"],
    "lips": ["method=lips", "method.density=0.3", "method.every=2", "method.rounds=3"],
    "flare": ["method=flare", "method.steps=2", "uplink=topk:0.05"],
    "ssfl": ["method=ssfl", "cohort=3"],
    "fedluar": ["method=fedluar"],
    "ssfl x fedlama x int8": ["method=[ssfl,fedlama]", "method.1.phi=2", "uplink=int8"],
}
SHORT = ("flare", "ssfl x fedlama x int8")


def same(names: Any, folder: Path) -> None:
    rows = [*parity.compare([loaded(*METHODS[name]) for name in names], 3, 2, print, folder=folder)]
    assert [row.differences for row in rows] == [()] * len(rows)
    for row in rows:
        assert row.same
        assert row.simulator == row.flower
        assert row.carried["messages"] <= 2 * 4
        assert row.traffic["inbound-bytes"] > row.carried["packed_up"] > 0


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:rounds=3 is no multiple")
def test_model_and_ledger_are_those_of_the_simulator(tmp_path: Path) -> None:
    same(SHORT, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:rounds=3 is no multiple")
def test_model_and_ledger_are_those_of_the_simulator_for_the_other_methods(tmp_path: Path) -> None:
    same([name for name in METHODS if name not in SHORT], tmp_path)


def test_over_tls_only_nodes_with_a_key_on_the_list_take_part(tmp_path: Path) -> None:
    made = loaded("rounds=2")
    local = simulated(made, tmp_path)
    project.write(made, tmp_path / "app")
    keys.write(tmp_path / "other", ["localhost"], 1)
    with Rehearsal(tmp_path, 2, tls=True) as rehearsal:
        words: Any = rehearsal.nodes[0].process.args
        theirs = {str(tmp_path / "keys" / "node-1"): str(tmp_path / "other" / "node-1")}
        stranger = [theirs.get(word, word) for word in words[1:]]
        stranger[stranger.index("--port") + 1] = str(free_ports(1)[0])
        unknown = rehearsal._groups.start("stranger", "flower-supernode", stranger)
        run = rehearsal.submit(tmp_path / "app", {"run-dir": str(tmp_path / "runs")})
        outcome = rehearsal.wait(run)
        assert "SuperNode ID" not in unknown.log.read_text()
    assert outcome.exit_code == 0, outcome.error
    assert outcome.folder is not None
    assert Run.open(outcome.folder).info["final_sha256"] == local.info["final_sha256"]


@pytest.mark.slow
def test_a_node_that_is_killed_is_lost_and_goes_on_when_it_is_back(tmp_path: Path) -> None:
    """In round 1, with a plan in its hands; where it is not back in time, in round 2 too. What its clients remember is
    on its disk: nobody begins anew."""
    made = loaded("rounds=4", "method=errorfeedback", "uplink=topk:0.05", "faults.reply_deadline_s=60")
    project.write(made, tmp_path / "app")
    with Rehearsal(tmp_path, 2) as rehearsal:

        def see(event: dict[str, Any]) -> None:
            if event["event"] != "round" or event["round"] != 0:
                return
            node = rehearsal.nodes[1]
            rehearsal._groups.ready(node, r"(?s)(Receiving: train message.*){2}", PATIENCE_S)
            rehearsal.end_node(1, signal.SIGKILL)
            rehearsal.restart_node(1)

        outcome = rehearsal.wait(rehearsal.submit(tmp_path / "app", {"run-dir": str(tmp_path / "runs")}), see)
    assert outcome.exit_code == 0, outcome.error
    assert outcome.folder is not None
    found = events(Run.open(outcome.folder))
    lost = sorted((row["round"], row["client"], row["code"]) for row in found)
    once = [(1, str(c), "E311") for c in (2, 3, 4)]
    assert lost in (once, once + [(2, str(c), "E311") for c in (2, 3, 4)])


def test_a_server_that_is_killed_goes_on_and_ends_with_the_same_model(tmp_path: Path) -> None:
    made = loaded("rounds=4", "method=[errorfeedback,fedlama]", "method.1.phi=2", "uplink=topk:0.05")
    local = simulated(made, tmp_path)
    project.write(made, tmp_path / "app")
    seen: list[Path] = []

    class Killed(Exception):
        pass

    def see(event: dict[str, Any]) -> None:
        seen.extend([Path(event["run"])] if event["event"] == "begin" else [])
        if event["event"] == "round" and event["round"] == 1:
            raise Killed

    keys_of_run = {"run-dir": str(tmp_path / "runs")}
    with Rehearsal(tmp_path, 2) as rehearsal:
        with pytest.raises(Killed):
            rehearsal.wait(rehearsal.submit(tmp_path / "app", keys_of_run), see)
        rehearsal._groups.ready(rehearsal.nodes[1], r"(?s)(Receiving: train message.*){3}", PATIENCE_S)
        rehearsal._groups.end(rehearsal.link, how=signal.SIGKILL)
    assert Run.open(seen[0]).info["status"] == "running"
    with Rehearsal(tmp_path, 2) as rehearsal:
        outcome = rehearsal.wait(rehearsal.submit(tmp_path / "app", keys_of_run | {"resume": str(seen[0])}))
    assert outcome.exit_code == 0, outcome.error
    assert outcome.folder == seen[0]
    run = Run.open(seen[0])
    assert run.info["final_sha256"] == local.info["final_sha256"]
    assert (run.path / "bytes.jsonl").read_text() == (local.path / "bytes.jsonl").read_text()
    assert events(run) == []


@pytest.mark.slow
def test_a_node_with_another_lamina_is_refused_with_both_versions(tmp_path: Path) -> None:
    other = tmp_path / "other" / "lamina-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: lamina\nVersion: 9.9\n")
    path = os.pathsep.join(filter(None, [str(other.parent), os.environ.get("PYTHONPATH", "")]))
    project.write(loaded(), tmp_path / "app")
    with Rehearsal(tmp_path, 2, node_env=lambda i: {"PYTHONPATH": path} if i == 1 else {}) as rehearsal:
        outcome = rehearsal.wait(rehearsal.submit(tmp_path / "app", {"run-dir": str(tmp_path / "runs")}))
    assert outcome.exit_code == 2
    assert outcome.folder is None
    assert f"a node runs lamina 9.9, the server {lamina.__version__}" in outcome.error


@pytest.mark.slow
def test_what_is_too_long_is_refused_by_its_length(tmp_path: Path) -> None:
    project.write(loaded("rounds=2"), tmp_path / "app")
    client = tmp_path / "app" / "client_app.py"
    client.write_text(
        client.read_text() + "\nimport os\nif os.environ.get('TOO_LONG'):\n    import lamina.flower.client as client\n"
        "    client.bundled = lambda parts: bytes(3 << 20)\n"
    )
    with Rehearsal(tmp_path, 2, node_env=lambda i: {"TOO_LONG": "1"} if i == 1 else {}) as rehearsal:
        outcome = rehearsal.wait(rehearsal.submit(tmp_path / "app", {"run-dir": str(tmp_path / "runs")}))
    assert outcome.exit_code == 0, outcome.error
    assert outcome.folder is not None
    found = events(Run.open(outcome.folder))
    assert sorted((row["round"], row["client"]) for row in found) == [(t, str(c)) for t in (0, 1) for c in (2, 3, 4)]
    assert all("is refused: E340 3145728 bytes" in row["why"] for row in found)


def rehearsed(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`lamina flower rehearse` as a user starts it, with all it makes in this folder."""
    command = [sys.executable, "-m", "lamina.cli", "flower", "rehearse", "quickstart", *SMALL, *arguments, "--json"]
    env = os.environ | {"TMPDIR": str(folder), "LAMINA_RUNS": str(folder / "runs")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


@pytest.mark.slow
def test_a_rehearsal_ends_with_the_exit_code_of_its_run(tmp_path: Path) -> None:
    """`flwr run` itself ends with 0 whatever becomes of the run."""
    out, errors = rehearsed(tmp_path, "local.lr=1e30").communicate(timeout=LIMIT_S)
    said = [json.loads(line) for line in out.splitlines()]
    assert "E310" in errors
    assert [event["event"] for event in said if event["event"] != "note"] == ["begin", "end", "failed"]
    process = rehearsed(tmp_path, "rounds=1")
    out, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, errors
    said = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in said if event["event"] != "note"] == ["begin", "round", "end"]
    assert Run.open(said[-1]["run"]).info["status"] == "done"


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_rehearsal_that_is_stopped_leaves_nothing_running(number: int, tmp_path: Path) -> None:
    process = rehearsed(tmp_path, "rounds=50")
    assert process.stdout is not None
    began = until(process.stdout.readline, "begin")
    assert len(running(tmp_path)) > 4
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert left(tmp_path) == []
    assert Run.open(began["run"]).info["rounds_done"] < 50


def until(read: Callable[[], str], event: str) -> dict[str, Any]:
    while line := read():
        said: dict[str, Any] = json.loads(line)
        if said["event"] == event:
            return said
    raise AssertionError(f"no {event}")
