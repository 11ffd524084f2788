"""`lamina verify`: what a run folder says is compared with itself, and with what a socket carries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from lamina import (
    SSFL,
    ClientData,
    FedAvg,
    Federation,
    RunError,
    StorageError,
    WireError,
    checkpoint,
    cli,
    verify,
    wire,
)
from lamina.chaos import Chaos, Chaotic
from lamina.config import build, load
from lamina.errors import LaminaError
from lamina.folder import CLIENTS
from lamina.report.tables import read
from lamina.runs import Run, fit, resume
from lamina.verify import PREFIX, Line, files, replay, resend

SMALL = ("engine=loop", "model.widths=[64, 12, 10]", "data.clients=6", "cohort=3", "local.epochs=1")
METHODS = {
    "fedavg": ("method=fedavg",),
    "fedlama": ("method=fedlama", "uplink=topk:0.1"),
    "ssfl": ("method=ssfl", "method.density=0.3"),
    "stc": ("method=stc", "uplink=topk:0.02:sign", "downlink=topk:0.02:sign"),
    "int8": ("method=scaffold", "local.momentum=0", "uplink=int8", "downlink=int8"),
}


def make(path: Path, *arguments: str, rounds: int = 4, every: Any = 2) -> Run:
    config = load("quickstart", [*SMALL, f"rounds={rounds}", *arguments], {})
    return fit(build(config), rounds, path, config=config, progress=False, checkpoint_every=every)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints after rounds 2 and 4 of 4."""
    return make(tmp_path_factory.mktemp("runs") / "run", "run.keep_clients_log=true").path


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def quiet(text: str) -> None:
    pass


def problems(folder: Path) -> dict[str, str]:
    return {check.file: check.problem for check in files(folder) if check.problem}


def rewrite(folder: Path, log: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes every row of a log, and writes its new length into run.json, as a forger would."""
    rows = [json.loads(line) for line in (folder / log).read_text().splitlines()]
    for row in rows:
        change(row)
    (folder / log).write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = json.loads((folder / "run.json").read_text())
    info["lengths"][log] = (folder / log).stat().st_size
    (folder / "run.json").write_text(json.dumps(info))


def lamina(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


# ---- through a socket


@pytest.mark.parametrize("afresh", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_the_ledger_is_what_the_socket_carried(name: str, afresh: bool, tmp_path: Path) -> None:
    """Rounds 4 and 5 from the checkpoint after 4 rounds, or all six with SSFL's probe of all 6 clients before them."""
    run = make(tmp_path / "run", *METHODS[name], rounds=6)
    assert not problems(run.path)
    resent = resend(run.path, afresh=afresh, say=quiet)
    assert resent.problems == []
    assert [(trip.round, trip.direction) for trip in resent.trips] == [
        (t, way) for t in range(0 if afresh else 4, 6) for way in ("up", "down")
    ]
    for trip in resent.trips:
        row = run.records[trip.round]
        assert trip.frames == 3 + 6 * (name == "ssfl" and trip.round == 0)
        assert trip.prefixes == 8 * trip.frames
        assert trip.socket - trip.prefixes == getattr(row, f"bytes_{trip.direction}") == trip.metrics == trip.rows
    assert any(share.phase == "probe" for share in resent.shares) == (afresh and name == "ssfl")
    ends = [(5, "round-000006")] if not afresh else [(3, "round-000004"), (5, "round-000006")]
    assert [(model.round, model.where) for model in resent.models] == ends
    assert resent.models[-1].sha256 == run.info["final_sha256"]


def test_every_client_is_sent_its_own_plan(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frame by frame: a plan under the number of each client of the cohort and as long as clients.jsonl says, and a
    message of each."""
    carried: list[tuple[str, int, int, int]] = []
    call = Line.__call__

    def spy(line: Line, kind: str, blob: bytes) -> bytes:
        frame = wire.frame.unpack(blob)
        assert frame.kind == kind
        carried.append((kind, frame.round, frame.client, len(blob)))
        return call(line, kind, blob)

    monkeypatch.setattr(Line, "__call__", spy)
    resend(made, say=quiet)
    rows = [json.loads(line) for line in (made / "clients.jsonl").read_text().splitlines()]
    said = [("plan", row["round"], row["client"], row["bytes_down"]) for row in rows]
    said += [("message", row["round"], row["client"], row["bytes_up"]) for row in rows]
    assert sorted(carried) == sorted(row for row in said if row[1] >= 2)


def test_it_writes_nothing_into_the_run(made: Path) -> None:
    def stamp() -> dict[str, tuple[int, int]]:
        found = (path.stat() for path in made.rglob("*"))
        return {str(path): (s.st_mtime_ns, s.st_size) for path, s in zip(made.rglob("*"), found, strict=True)}

    before = stamp()
    files(made)
    resend(made, say=quiet)
    assert stamp() == before


def test_a_run_with_its_states_on_disk_is_read_and_not_written(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "method=errorfeedback", "uplink=topk:0.1", f"store=disk:{tmp_path / 'clients'}")
    before = {path.name: path.read_bytes() for path in (tmp_path / "clients").iterdir()}
    assert resend(run.path, say=quiet).problems == []
    assert {path.name: path.read_bytes() for path in (tmp_path / "clients").iterdir()} == before


def test_a_run_of_several_processes_is_verified_in_one(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "engine=processes", "workers=2", "method=fedlama")
    assert run.info["engine"] == "processes"
    assert resend(run.path, say=quiet).problems == []


def test_a_run_that_was_not_made_from_a_config_needs_its_federation(tmp_path: Path) -> None:
    def fed() -> Federation:
        return build(load("quickstart", [*SMALL, "method=fedlama"], {}))

    run = fit(fed(), 4, tmp_path / "run", progress=False, checkpoint_every=2)
    with pytest.raises(StorageError) as caught:
        resend(run.path, say=quiet)
    assert caught.value.code == "E405"
    assert resend(run.path, fed=fed(), say=quiet).problems == []


def test_where_no_older_checkpoint_is_whole_it_begins_at_the_start_and_says_so(tmp_path: Path) -> None:
    """A checkpoint after the last round only."""
    run = make(tmp_path / "run", every=4)
    said: list[str] = []
    resent = resend(run.path, say=said.append)
    assert said == ["rounds 0 to 3 of 4 once more, from the start: there is no older checkpoint that is whole"]
    assert resent.problems == []
    assert [model.where for model in resent.models] == ["round-000004"]


def test_of_a_long_run_without_an_older_checkpoint_the_first_rounds_are_made(tmp_path: Path) -> None:
    run = make(tmp_path / "run", rounds=13, every=13)
    resent = resend(run.path, say=quiet)
    assert {trip.round for trip in resent.trips} == set(range(verify.AFRESH))
    assert resent.problems == []
    assert resent.models == ()  # none was kept to compare with


def test_an_interrupted_run_is_verified_as_far_as_it_is_committed(tmp_path: Path) -> None:
    """Stopped after 4 of 8 rounds, and gone on with to the end."""

    class Stop:
        def begin(self, run: Any, fed: Any) -> None: ...
        def note(self, text: str) -> None: ...
        def end(self, run: Any) -> None: ...

        def round(self, row: Any) -> None:
            if row.round == 3:
                raise ZeroDivisionError("on purpose")

    config = load("quickstart", [*SMALL, "rounds=8", 'local.schedule="cosine"'], {})
    with pytest.raises(ZeroDivisionError):
        fit(build(config), 8, tmp_path / "run", config=config, progress=Stop(), checkpoint_every=2)
    assert Run.open(tmp_path / "run").info["rounds_done"] == 4
    for _ in range(2):
        assert not problems(tmp_path / "run")
        assert resend(tmp_path / "run", say=quiet).problems == []
        resume(tmp_path / "run", progress=False)


def test_a_ledger_that_is_forged_everywhere_is_not_what_the_socket_carried(folder: Path) -> None:
    """1,000 bytes more in round 3, upwards: in bytes.jsonl, in metrics.jsonl, in clients.jsonl, in run.json and in the
    checkpoint. The files agree; a message does not weigh that."""
    more = 1000

    def row_of_bytes(row: dict[str, Any]) -> None:
        forged = (row["round"], row["direction"], row["layer"]) == (3, "up", "_moments")
        row["bytes"] += more if forged else 0

    def row_of_metrics(row: dict[str, Any]) -> None:
        for key in ("bytes_up", "total_up"):
            row[key] += more if row["round"] == 3 else 0

    def row_of_clients(row: dict[str, Any]) -> None:
        row["bytes_up"] += more if row["round"] == 3 and row["client"] == first else 0

    clients = [json.loads(line) for line in (folder / "clients.jsonl").read_text().splitlines()]
    first = next(row["client"] for row in clients if row["round"] == 3)
    rewrite(folder, "bytes.jsonl", row_of_bytes)
    rewrite(folder, "metrics.jsonl", row_of_metrics)
    rewrite(folder, "clients.jsonl", row_of_clients)
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | {"bytes_up": info["bytes_up"] + more}))
    place = folder / "checkpoints" / "round-000004"
    state = json.loads((place / "state.json").read_text())
    (place / "state.json").write_text(json.dumps(state | {"bytes_up": state["bytes_up"] + more}))
    manifest = json.loads((place / "MANIFEST.json").read_text())
    manifest["sha256"]["state.json"] = checkpoint._sha256((place / "state.json").read_bytes())
    (place / "MANIFEST.json").write_bytes(checkpoint.summed({k: v for k, v in manifest.items() if k != "own"}))

    assert not problems(folder)
    own = Run.open(folder).records[3].bytes_up - more
    moments = next(share for share in resend(folder, say=quiet).shares if share.layer == "_moments").frames
    assert resend(folder, say=quiet).problems == [
        f"round 3, up: {own:,} bytes came through the socket, metrics.jsonl says {own + more:,} and bytes.jsonl "
        f"{own + more:,}",
        f"round 3, up, _moments: {moments:,} bytes in the frames, bytes.jsonl says {moments + more:,}",
    ]
    result = lamina("verify", str(folder), "--wire")
    assert result.exit_code == 5
    assert result.stderr.startswith(f"E407  round 3, up: {own:,} bytes came through the socket")


def test_a_model_that_is_not_that_of_its_rounds_is_named(folder: Path) -> None:
    other = "0" * 64
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | {"final_sha256": other}))
    shutil.rmtree(folder / "checkpoints" / "round-000004")  # else that has the word
    (problem,) = resend(folder, say=quiet).problems
    assert problem == f"after round 3 the model is {info['final_sha256'][:12]}, run.json has {other[:12]}"
    assert "run.json says 000000000000" in problems(folder)["model.safetensors"]


def test_on_other_cores_a_run_of_threads_keeps_its_bytes_and_its_model_is_not_compared(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "engine=threads")
    (model,) = resend(run.path, say=quiet).models
    assert model.sha256 == model.written
    (run.path / "run.json").write_text(json.dumps(run.info | {"cores": run.info["cores"] + 64}))
    said: list[str] = []
    resent = resend(run.path, say=said.append)
    assert said[0].endswith(": the model is not compared")
    assert (resent.models, resent.problems) == ((), [])
    assert "  model: compared with none" in verify.wire_table(resent, None)


def test_another_torch_is_said_beforehand(folder: Path) -> None:
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | {"torch": "1.0"}))
    said: list[str] = []
    resend(folder, say=said.append)
    assert said[0].startswith("this run was made with torch 1.0: ")


def test_another_config_is_refused_as_by_resume(folder: Path) -> None:
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace("lr = 0.1", "lr = 0.2"))
    with pytest.raises(StorageError, match=r"not what this run was started with: local\.lr"):
        resend(folder, say=quiet)


@pytest.mark.parametrize(("changed", "error"), [("plan", RunError), ("message", WireError)])
def test_a_byte_that_changes_on_the_way_stops_the_rounds(changed: str, error: type[LaminaError]) -> None:
    """The last byte of a plan belongs to the bits that say whose update is asked for, that of a message to a tree."""
    fed = build(load("quickstart", SMALL, {}))

    def carry(kind: str, blob: bytes) -> bytes:
        return blob if kind != changed else blob[:-1] + bytes([blob[-1] ^ 128])

    with pytest.raises(error) as caught:
        next(fed.over(carry).run(1))
    assert caught.value.code == "E343"


@pytest.mark.parametrize("lost", ["plan", "message"])
def test_a_frame_of_which_nothing_arrives_stops_the_rounds(lost: str) -> None:
    fed = build(load("quickstart", SMALL, {}))
    with pytest.raises(WireError) as caught:
        next(fed.over(lambda kind, blob: b"" if kind == lost else blob).run(1))
    assert caught.value.code == "E340"


def test_a_line_counts_what_comes_out_of_it() -> None:
    """Two plans of 5 and 3,000,000 bytes and an empty message: 8 bytes of length before each."""
    with Line() as line:
        assert line("plan", b"hello") == b"hello"
        large = bytes(range(250)) * 12_000
        assert line("plan", large) == large
        assert line("message", b"") == b""
        assert line.frames == {"down": 2, "up": 1}
        assert line.bytes == {"down": 5 + 3_000_000 + 2 * PREFIX.size, "up": PREFIX.size}
        line.begin()
        assert not line.frames


def test_a_connection_that_is_closed_is_an_error_and_no_wait() -> None:
    with Line() as line:
        line._clients.close()
        with pytest.raises(RunError) as caught:
            line("message", b"hello")
    assert caught.value.code == "E305"


def test_looking_through_a_carrier_leaves_the_federation_as_it_was() -> None:
    fed = build(load("quickstart", [*SMALL, "engine=processes"], {}))
    seen: list[str] = []

    def carry(kind: str, blob: bytes) -> bytes:
        seen.append(kind)
        return blob

    real = fed.over(carry)
    assert (real.engine, fed.engine) == ("loop", "processes")
    state, record = next(real.run(1))
    assert seen == ["message", "plan"] * 3
    again, the_same = next(fed.run(1))
    assert (again.sha256(), the_same.traffic) == (state.sha256(), record.traffic)
    assert len(seen) == 6


# ---- its rounds once more


REPLAYED = {
    "fedavg": (),
    "fedlama": ("method=fedlama", "uplink=topk:0.1"),
    "ssfl": ("method=ssfl",),
    "lips": ("method=lips", "method.rounds=6", "model.widths=[64, 12, 11, 10]"),
    "stc": METHODS["stc"],
    "int8": METHODS["int8"],
    "rule": ("aggregate=median",),
    "network": ("network.up=5Mbit", "network.down=5Mbit"),
    "processes": ("engine=processes", "workers=2"),
    "clients there": ("availability=random:0.7", "run.keep_clients_log=true"),
    "tested every other": ("evaluate_every=2",),
}


@pytest.mark.parametrize("name", REPLAYED)
def test_rounds_made_once_more_are_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    run = make(tmp_path / "run", *REPLAYED[name], rounds=6)
    said: list[str] = []
    replayed = replay(run.path, 99, say=said.append)
    assert replayed.problems == ()
    assert replayed.rounds == 6
    assert replayed.stretches[-1].end == 6
    assert replayed.stretches[-1].kept == "round-000006"
    assert replay(run.path, 1, afresh=True, say=quiet).stretches == ((0, 6, "the start", "round-000006"),)
    assert len(said) == len(replayed.stretches)


def test_so_many_rounds_are_drawn_by_the_seed_behind_the_checkpoints(tmp_path: Path) -> None:
    """After rounds 2, 4, 6 and 8 of 8; the newest two and the best are kept."""
    run = make(tmp_path / "run", rounds=8)
    drawn = {seed: replay(run.path, 3, seed=seed, say=quiet).stretches for seed in range(4)}
    assert all(sum(s.end - s.begin for s in stretches) == 3 for stretches in drawn.values())
    assert len(set(drawn.values())) > 1
    assert drawn[0] == replay(run.path, 3, seed=0, say=quiet).stretches
    starts = {0, *(int(p.name[6:]) for p in checkpoint.committed(run.path / "checkpoints"))}
    assert {s.begin for stretches in drawn.values() for s in stretches} <= starts


def test_a_run_that_was_stopped_and_made_longer_is_replayed(tmp_path: Path) -> None:
    make(tmp_path / "run", "method=fedlama", "evaluate_every=2", rounds=3)
    resume(tmp_path / "run", 6, progress=False)
    assert replay(tmp_path / "run", 1, afresh=True, say=quiet).problems == ()


def test_a_run_with_a_round_that_was_skipped_is_replayed(tmp_path: Path) -> None:
    """Rounds in which fewer than three clients are there."""
    few = ("availability=random:0.4", "faults.min_replies=3", "faults.on_quorum=skip")
    run = make(tmp_path / "run", *few, rounds=6)
    events = [json.loads(line)["event"] for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert 0 < events.count("skipped") < 6
    assert replay(run.path, 1, afresh=True, say=quiet).problems == ()
    rewrite(run.path, "events.jsonl", lambda row: row.update(why="nothing"))
    assert "events.jsonl" in replay(run.path, 1, afresh=True, say=quiet).problems[0]


@pytest.mark.parametrize("again", [resend, lambda folder, say: replay(folder, 1, say=say)], ids=["resend", "replay"])
def test_a_run_whose_cohorts_and_noise_came_from_the_system_cannot_be_made_again(again: Any, tmp_path: Path) -> None:
    private = ("weights=uniform", "privacy.clip=1.0", "privacy.noise=1.0", "privacy.noise_seed=system")
    run = make(tmp_path / "run", *private, rounds=2)
    assert problems(run.path) == {}
    with pytest.raises(StorageError, match="came from the system") as caught:
        again(run.path, say=quiet)
    assert caught.value.code == "E405"


def test_a_number_that_was_edited_everywhere_is_found_by_replay(folder: Path) -> None:
    """The training loss of round 2 in its last digit: no sum and no length knows it."""
    text = (folder / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    digit = json.dumps(rows[2]["train_loss"])
    other = digit[:-1] + ("1" if digit[-1] != "1" else "2")
    (folder / "metrics.jsonl").write_text(text.replace(f'"train_loss": {digit}', f'"train_loss": {other}'))
    assert not problems(folder)
    assert replay(folder, 99, say=quiet).problems == ("round 2 is another one than in metrics.jsonl in train_loss",)
    result = lamina("verify", str(folder), "--replay", "4")
    assert result.exit_code == 5
    assert result.stderr.startswith("E408  round 2 is another one than in metrics.jsonl in train_loss")


def test_a_state_that_is_not_that_of_its_rounds_is_found_by_replay(folder: Path) -> None:
    """The last checkpoint is of another seed, and whole."""
    other = make(folder.parent / "other", "seed=5", "run.keep_clients_log=true")
    place = folder / "checkpoints" / "round-000004"
    files = [path for path in place.iterdir() if path.name.endswith("safetensors")]
    manifest = json.loads((place / "MANIFEST.json").read_text())
    for file in files:
        blob = (other.path / "checkpoints" / place.name / file.name).read_bytes()
        file.write_bytes(blob)
        manifest["sha256"][file.name] = checkpoint._sha256(blob)
    (place / "MANIFEST.json").write_bytes(checkpoint.summed({k: v for k, v in manifest.items() if k != "own"}))
    found = replay(folder, 99, say=quiet).problems
    assert "after round 3 the state is not that in round-000004/model.safetensors" in found


def test_replaying_writes_nothing_into_the_run_nor_into_its_clients(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "method=errorfeedback", "uplink=topk:0.1", f"store=disk:{tmp_path / 'clients'}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert replay(run.path, 99, say=quiet).problems == ()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_on_other_cores_a_run_of_threads_is_not_replayed(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "engine=threads")
    (run.path / "run.json").write_text(json.dumps(run.info | {"cores": run.info["cores"] + 64}))
    with pytest.raises(StorageError, match="not bit-identical") as caught:
        replay(run.path, 1, say=quiet)
    assert caught.value.code == "E405"


def test_the_command_replays(made: Path) -> None:
    result = lamina("verify", str(made), "--replay", "2", "--seed", "3")
    assert result.exit_code == 0, result.output
    assert "once more, from" in result.stdout
    events = [json.loads(line) for line in lamina("verify", str(made), "--replay", "9", "--json").stdout.splitlines()]
    assert sum(e["end"] - e["begin"] for e in events if e["event"] == "replayed") == 4
    for arguments in (("--afresh",), ("--seed", "1")):
        assert lamina("verify", str(made), *arguments).exit_code == 2


# ---- the files


def test_a_checkpoint_that_is_not_of_this_run_is_named(folder: Path) -> None:
    """Whole in itself; the one behind it names another."""
    other = make(folder.parent / "other", "seed=5", "run.keep_clients_log=true")
    place = folder / "checkpoints" / "round-000002"
    shutil.rmtree(place)
    shutil.copytree(other.path / "checkpoints" / place.name, place)
    assert problems(folder)["round-000004"] == "round-000002 is not the one that it goes on from"


def test_a_whole_run_holds(made: Path) -> None:
    checks = files(made)
    assert [check.file for check in checks] == [
        "metrics.jsonl", "bytes.jsonl", "layers.jsonl", "events.jsonl", "clients.jsonl", "round-000002",
        "round-000004", "model.safetensors",
    ]  # fmt: skip
    assert not any(check.problem for check in checks)


def test_a_byte_more_in_bytes_jsonl_is_found_and_named(folder: Path) -> None:
    def change(row: dict[str, Any]) -> None:
        row["bytes"] += (row["round"], row["direction"], row["layer"]) == (1, "down", "_shared")

    said = Run.open(folder).records[1].bytes_down
    rewrite(folder, "bytes.jsonl", change)
    assert problems(folder)["bytes.jsonl"] == (
        f"round 1, down: its rows add up to {said + 1:,} bytes, metrics.jsonl says {said:,}"
    )
    assert "bytes.jsonl" in problems(folder)["clients.jsonl"]
    result = lamina("verify", str(folder))
    assert result.exit_code == 5
    assert result.stderr.startswith(f"E404  bytes.jsonl: round 1, down: its rows add up to {said + 1:,} bytes")


def test_bytes_moved_from_one_layer_to_another_are_found(folder: Path) -> None:
    """The sums stay as they were; layers.jsonl knows better, and so do the frames."""

    def change(row: dict[str, Any]) -> None:
        if (row["round"], row["direction"]) == (2, "up"):
            row["bytes"] += {"fc1.weight": -7, "fc2.weight": 7}.get(row["layer"], 0)

    rewrite(folder, "bytes.jsonl", change)
    assert list(problems(folder)) == ["layers.jsonl"]
    assert problems(folder)["layers.jsonl"].startswith("round 2, up, fc1.weight: ")
    assert [problem.split(":")[0] for problem in resend(folder, say=quiet).problems] == [
        "round 2, up, fc1.weight",
        "round 2, up, fc2.weight",
    ]


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "clients.safetensors"])
def test_a_damaged_checkpoint_is_named(name: str, folder: Path) -> None:
    place = folder / "checkpoints" / "round-000002" / name
    blob = bytearray(place.read_bytes())
    blob[len(blob) // 2] ^= 1
    place.write_bytes(blob)
    assert problems(folder) == {"round-000002": "its files do not match their checksums"}
    result = lamina("verify", str(folder), "--wire")  # from the start, then
    assert result.exit_code == 5
    assert "there is no older checkpoint that is whole" in result.stdout
    assert result.stderr.startswith("E404  round-000002: its files do not match their checksums  [")


@pytest.mark.parametrize("log", ["metrics.jsonl", "layers.jsonl", "bytes.jsonl", "clients.jsonl"])
def test_a_log_that_is_cut_or_gone_is_named(log: str, folder: Path) -> None:
    blob = (folder / log).read_bytes()
    (folder / log).write_bytes(blob[:-5])
    assert log in problems(folder)
    (folder / log).unlink()
    assert log in problems(folder)


def odd(path: Path, wrap: Callable[[Any], Any], method: FedAvg | None = None) -> Path:
    """A run whose engine's replies pass through this."""
    source = torch.Generator().manual_seed(0)
    parts = {str(i): (torch.randn(12, 4, generator=source), torch.arange(12) % 2) for i in range(8)}
    data = ClientData.from_clients(parts)
    fed = Federation(lambda: torch.nn.Linear(4, 2), data, method=method, cohort=3, engine="loop").through(wrap)
    return fit(fed, 6, path, keep_clients_log=True, progress=False).path


def test_an_answer_from_outside_the_cohort_is_in_the_ledger_and_in_no_clients_row(tmp_path: Path) -> None:
    """The answer to an earlier round: clients' rows add up to all bytes but those that were not used."""
    folder = odd(tmp_path / "run", lambda engine: Chaotic(engine, Chaos(late=0.4, seed=1)))
    rows = [json.loads(line) for line in (folder / "bytes.jsonl").read_text().splitlines()]
    clients = [json.loads(line) for line in (folder / CLIENTS).read_text().splitlines()]
    up = sum(row["bytes"] for row in rows if row["direction"] == "up")
    own = sum(row["bytes_up"] for row in clients)
    beside = {row["round"] for row in rows if row["layer"] == "_unused"}
    assert up - sum(row["bytes"] for row in rows if row["layer"] == "_unused") <= own < up
    assert problems(folder) == {}
    assert all(check.agrees for check in read(Run.open(folder)).ledger)

    def more(by: int, round: int) -> Callable[[dict[str, Any]], None]:
        return lambda row: row.update(bytes_up=row["bytes_up"] + by * (row["round"] == round))

    t = next(t for t in range(6) if t not in beside and any(c["round"] == t and c["bytes_up"] for c in clients))
    for by, there in ((-1, t), (1, t), (10**6, min(beside))):
        copy = Path(shutil.copytree(folder, tmp_path / f"copy {by}"))
        rewrite(copy, CLIENTS, more(by, there))
        assert problems(copy)[CLIENTS].startswith(f"round {there}, up: ")


def test_a_probe_that_comes_twice_is_in_no_round(tmp_path: Path) -> None:
    class Twice:
        def __init__(self, engine: Any):
            self.name, self.reason, self.workers = engine.name, engine.reason, engine.workers
            self._engine = engine

        def replies(self, kind: str, *rest: Any) -> Iterator[Any]:
            for reply in self._engine.replies(kind, *rest):
                yield reply
                if kind == "probe":
                    yield reply

        def close(self) -> None:
            self._engine.close()

    assert problems(odd(tmp_path / "run", Twice, SSFL(density=0.5))) == {}


def test_what_was_not_committed_is_not_looked_at(folder: Path) -> None:
    with (folder / "bytes.jsonl").open("ab") as file:
        file.write(b'{"round": 9, "half a li')
    assert not problems(folder)


def test_totals_of_run_json_are_compared(folder: Path) -> None:
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | {"bytes_down": 12}))
    assert problems(folder) == {
        "metrics.jsonl": f"down: it adds up to {info['bytes_down']:,} bytes, run.json says 12",
    }


# ---- the command


def test_the_table_says_what_the_socket_carried_and_that_nothing_differs(made: Path) -> None:
    result = lamina("verify", str(made), "--wire", "--layers")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines() if line]
    rows = Run.open(made).records[2:]
    for way in ("up", "down"):
        own = sum(getattr(row, f"bytes_{way}") for row in rows)
        assert [way, "6", f"{own + 48:,}", "48", f"{own:,}", f"{own:,}", "0"] in lines
    assert any(line[:3] == ["up", "round", "fc1.weight"] and line[-1] == "0" for line in lines)
    assert "  rounds 2 to 3 of 4 once more, from round-000002" in result.stdout.splitlines()
    assert any(line[:3] == ["model", "after", "round"] for line in lines)


def test_json_is_one_object_a_line(made: Path) -> None:
    result = lamina("verify", str(made), "--wire", "--layers", "--json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["event"] for event in events if event["event"] != "layer"] == [
        *["file"] * 8, "note", *["wire"] * 4, "model", "verified",
    ]  # fmt: skip
    assert all(event["difference"] == 0 for event in events if event["event"] == "wire")
    assert events[-1] == {"event": "verified", "run": str(made), "problems": []}


def test_options_of_wire_need_it(made: Path) -> None:
    for option in ("--afresh", "--layers"):
        result = lamina("verify", str(made), option)
        assert (result.exit_code, option in result.stderr) == (2, True)


def test_a_run_without_a_committed_round_has_nothing_to_send_again(folder: Path) -> None:
    info = json.loads((folder / "run.json").read_text())
    info |= {"rounds_done": 0, "lengths": dict.fromkeys(info["lengths"], 0)}
    (folder / "run.json").write_text(json.dumps(info))
    with pytest.raises(StorageError) as caught:
        resend(folder, say=quiet)
    assert caught.value.code == "E403"
