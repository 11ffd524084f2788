"""Run folders: what they hold, that their sums are exact, and that going on is as if nothing had happened."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import cases
import lamina
from lamina import (
    ClientData,
    Federation,
    FedLAMA,
    LocalSGD,
    State,
    StorageError,
    checkpoint,
    cli,
    engine,
    folder,
    runs,
    terminal,
    verify,
)
from lamina.cli import base, comparing, looking
from lamina.compare import compare
from lamina.config import build, load
from lamina.errors import ConfigError, RunError
from lamina.machine import sync_seconds
from lamina.redaction import redacted
from lamina.runs import Interrupted, Run, Watcher, fit, new_folder, resume
from lamina.settings import CHANGEABLE
from lamina.store import disk

SMALL = ("engine=loop", "model.widths=[64, 12, 10]", "data.clients=6", "cohort=3", "local.epochs=1")


def make(path: Path, *arguments: str, rounds: int = 4, progress: Any = False, **options: Any) -> Run:
    config = load("quickstart", [*SMALL, f"rounds={rounds}", *arguments], {})
    return fit(build(config), rounds, path, config=config, progress=progress, **options)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in lines(path / "metrics.jsonl")]


def by_layer(path: Path) -> dict[tuple[int, str], dict[str, Any]]:
    return {(row["round"], row["layer"]): row for row in lines(path / "layers.jsonl")}


class Stop:
    """Stops the run after so many rounds, in one of the ways runs are stopped."""

    def __init__(self, after: int, how: str):
        self.after = after
        self.how = how
        self.notes: list[str] = []

    def begin(self, run: Run, fed: Any) -> None: ...
    def end(self, run: Run) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)

    def round(self, row: Any) -> None:
        if row.round + 1 != self.after:
            return
        if self.how == "crash":
            raise ZeroDivisionError("on purpose")
        os.kill(os.getpid(), getattr(signal, self.how, signal.SIGINT))
        if self.how == "twice":
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_folder_holds_everything_about_a_run(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "method=fedlama", "run.keep_clients_log=true")
    names = {path.name for path in run.path.iterdir()}
    assert names >= {"config.toml", "env.json", "run.json", "metrics.jsonl", "layers.jsonl", "bytes.jsonl"}
    assert names >= {"split.json", "events.jsonl", "clients.jsonl", "checkpoints", "model.safetensors"}
    info = json.loads((run.path / "run.json").read_text())
    assert (info["status"], info["exit_code"], info["rounds_done"]) == ("done", 0, 4)
    assert info["engine"] == "loop"
    assert info["engine_reason"] == "asked for"
    assert info["final_sha256"] == run.state.sha256()
    env = json.loads((run.path / "env.json").read_text())
    assert env["torch"] == torch.__version__
    assert env["data"]["clients"] == 6
    split = json.loads((run.path / "split.json").read_text())
    assert split["split_sha256"] == info["split_sha256"]
    assert len(split["clients"]) == 6
    assert all(sum(row["labels"]) == row["examples"] for row in split["clients"])
    assert split["label_names"] is None  # digits are their own names
    assert sum(row["examples"] for row in split["clients"]) == 1442
    assert len(lines(run.path / "metrics.jsonl")) == len(run.records) == 4
    assert len(lines(run.path / "layers.jsonl")) == 4 * 4
    assert len(lines(run.path / "clients.jsonl")) == 4 * 3
    assert {path.name for path in (run.path / "checkpoints").iterdir()} <= {f"round-{i:06d}" for i in range(1, 5)}


def test_the_rows_of_bytes_jsonl_add_up_to_the_totals(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "method=fedlama", "uplink=topk:0.1", rounds=5)
    sums: Counter[str] = Counter()
    for row in lines(run.path / "bytes.jsonl"):
        sums[row["direction"]] += row["bytes"]
    assert sums == {"up": run.info["bytes_up"], "down": run.info["bytes_down"]}
    assert sums == {"up": run.records[-1].total_up, "down": run.records[-1].total_down}
    assert sums["up"] == run.state.bytes_up


def test_the_model_file_is_the_whole_state_dict_of_the_module(tmp_path: Path) -> None:
    run = make(tmp_path / "run", 'model={name="mlp", widths=[64, 12, 10]}')
    model = build(load(run.path, env={})).model
    model.load_state_dict(load_file(run.path / "model.safetensors"))
    assert not run.model.training
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
        assert torch.equal(tensor, run.state.params[name])
    opened = Run.open(run.path)
    assert opened._saved() is not None
    assert all(torch.equal(x, model.state_dict()[n]) for n, x in opened.model.state_dict().items())


def test_best_and_final_are_rounds_in_sync(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "method=fedlama", "method.phi=4", rounds=11)
    waiting = [row for row in run.records if not row.in_sync]
    assert waiting
    assert run.final is not None
    assert run.best is not None
    assert not run.records[-1].in_sync
    assert run.final.round == 7
    assert run.best.in_sync
    assert run.info["final"]["round"] == 7
    assert "@ 7" in run.summary()


def test_a_config_written_into_the_folder_makes_the_same_run_again(tmp_path: Path) -> None:
    first = make(tmp_path / "first", "method=fedlama", "seed=3")
    config = load(first.path / "config.toml", env={})
    again = fit(build(config), config.rounds, tmp_path / "again", config=config, progress=False)
    assert again.info["final_sha256"] == first.info["final_sha256"]
    assert timeless(again.path) == timeless(first.path)
    assert again.info["config_sha256"] == first.info["config_sha256"]


# ---- stopping and going on


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make(tmp_path_factory.mktemp("whole") / "run", *LONG, rounds=9)


LONG = ("method=fedlama", "method.phi=3", "local.schedule=cosine", "uplink=topk:0.2")


def same(run: Run, whole: Run) -> None:
    assert run.info["status"] == "done"
    assert run.info["final_sha256"] == whole.info["final_sha256"]
    assert timeless(run.path) == timeless(whole.path)
    assert (run.path / "bytes.jsonl").read_bytes() == (whole.path / "bytes.jsonl").read_bytes()
    assert by_layer(run.path) == by_layer(whole.path)
    assert (run.info["best"], run.info["final"]) == (whole.info["best"], whole.info["final"])


@pytest.mark.parametrize("after", [1, 3, 5])
def test_control_c_finishes_the_round_and_the_run_goes_on_as_if_nothing_had_been(
    after: int, whole: Run, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted) as caught:
        make(tmp_path / "run", *LONG, rounds=9, progress=Stop(after, "once"), checkpoint_every=100)
    stopped = caught.value.run
    assert (stopped.info["status"], stopped.info["exit_code"]) == ("interrupted", 130)
    assert Run.open(tmp_path / "run").info["rounds_done"] == after
    assert len(Run.open(tmp_path / "run").records) == after
    same(resume(tmp_path / "run", progress=False), whole)


def test_control_c_twice_stops_at_once_and_keeps_the_last_commit(whole: Run, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "run", *LONG, rounds=9, progress=Stop(4, "twice"), checkpoint_every=2)
    info = Run.open(tmp_path / "run").info
    assert (info["status"], info["rounds_done"]) == ("interrupted", 2)
    same(resume(tmp_path / "run", progress=False), whole)


def test_a_crash_keeps_the_rounds_that_were_done_and_writes_crash_txt(whole: Run, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        make(tmp_path / "run", *LONG, rounds=9, progress=Stop(4, "crash"), checkpoint_every=100)
    assert "crash.txt" in caught.value.__notes__[0]
    assert "on purpose" in (tmp_path / "run" / "crash.txt").read_text()
    info = Run.open(tmp_path / "run").info
    assert (info["status"], info["exit_code"], info["rounds_done"]) == ("failed", 4, 4)
    same(resume(tmp_path / "run", progress=False), whole)


def test_more_rounds_can_be_asked_for(whole: Run, tmp_path: Path) -> None:
    arguments = ("method=fedlama", "method.phi=3")
    make(tmp_path / "short", *arguments, rounds=3)
    longer = resume(tmp_path / "short", 6, progress=False)
    straight = make(tmp_path / "straight", *arguments, rounds=6)
    assert longer.info["final_sha256"] == straight.info["final_sha256"]
    assert load(longer.path, env={}).rounds == 6
    assert resume(tmp_path / "short", progress=False).info["rounds_done"] == 6
    with pytest.raises(ConfigError, match="has done 6"):
        resume(tmp_path / "short", 4, progress=False)


def test_more_rounds_change_no_rounds_of_a_part(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN_ROUNDS, encoding="utf-8")
    entry = f'method={{entry="{tmp_path / "mine.py"}:Mine", rounds=7}}'
    run = make(tmp_path / "run", entry, "run.checkpoint_every=1", rounds=2)
    resume(run.path, 3, progress=False)
    config = load(run.path, env={})
    assert (config.rounds, config.method[0].arguments["rounds"]) == (3, 7)
    assert config.origin("rounds").startswith("config.toml:")
    assert "# lamina resume" in (run.path / "config.toml").read_text()
    before = (run.path / "config.toml").read_bytes()
    resume(run.path, progress=False)
    assert (run.path / "config.toml").read_bytes() == before


OWN_ROUNDS = """
import lamina

class Mine(lamina.Method):
    def __init__(self, rounds: int = 1):
        self.kept = rounds
"""


def test_a_config_says_how_a_run_is_kept(tmp_path: Path) -> None:
    keys = ("evaluate_every=2", "run.checkpoint_every=3", "run.keep_clients_log=true")
    run = make(tmp_path / "run", *keys, rounds=5)
    kept = {"evaluate_every": 2, "checkpoint_every": 3, "keep_clients_log": True, "track": [], "stop": {}}
    assert run.info["options"] == kept
    assert [row.round for row in run.records if row.accuracy is not None] == [1, 3, 4]
    assert make(tmp_path / "2", *keys, rounds=1, evaluate_every=1).info["options"]["evaluate_every"] == 1


def test_where_clients_keep_their_own_models_theirs_is_the_accuracy(tmp_path: Path) -> None:
    run = make(tmp_path / "1", "method=localonly", rounds=3)
    assert run.final is not None
    assert run.best is not None
    assert run.final.personal_accuracy is not None
    assert f"final personal accuracy {run.final.personal_accuracy:.4f} @ 2" in run.summary()
    assert run.best.personal_accuracy == max(row.personal_accuracy or 0 for row in run.records)
    assert run.info["best"]["round"] == run.best.round
    rows = compare([make(tmp_path / "2", rounds=3), run])
    assert [row["personal"] for row in rows] == [False, True]
    assert rows[1]["accuracy"] == run.final.personal_accuracy


def test_what_a_folder_costs_to_be_safe(tmp_path: Path) -> None:
    seconds = sync_seconds(tmp_path)
    assert seconds is not None
    assert seconds >= 0
    assert sync_seconds(tmp_path / "nothing") is None


def test_rows_behind_the_last_commit_are_cut_off(whole: Run, tmp_path: Path) -> None:
    """As after kill -9 between the logs and the checkpoint, with a last line written by half."""
    with pytest.raises(Interrupted):
        make(tmp_path / "run", *LONG, rounds=9, progress=Stop(4, "once"))
    for log in ("metrics.jsonl", "bytes.jsonl", "layers.jsonl"):
        with (tmp_path / "run" / log).open("a") as file:
            file.write('{"round": 4, "direction": "up", "bytes": 1}\n{"round": 4, "dire')
    assert len(Run.open(tmp_path / "run").records) == 4
    same(resume(tmp_path / "run", progress=False), whole)


def test_a_damaged_checkpoint_is_passed_over_and_it_is_said(whole: Run, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        make(tmp_path / "run", *LONG, rounds=9, progress=Stop(5, "once"), checkpoint_every=1)
    newest = checkpoint.committed(tmp_path / "run" / "checkpoints")[-1] / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    watcher = Stop(0, "")
    run = resume(tmp_path / "run", progress=watcher)
    assert "E404  round-000005 is damaged" in watcher.notes[0]
    assert [e["event"] for e in lines(run.path / "events.jsonl")] == ["passed over", "resumed"]
    assert run.info["final_sha256"] == whole.info["final_sha256"]
    assert timeless(run.path) == timeless(whole.path)


def test_logs_that_do_not_belong_to_the_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        make(tmp_path / "run", *LONG, rounds=9, progress=Stop(2, "once"), checkpoint_every=100)
    text = (tmp_path / "run" / "bytes.jsonl").read_text()
    (tmp_path / "run" / "bytes.jsonl").write_text(text.replace('"bytes": 3', '"bytes": 4'))
    with pytest.raises(StorageError, match="none of round-000002 is whole") as caught:
        resume(tmp_path / "run", progress=False)
    assert caught.value.code == "E404"
    (tmp_path / "run" / "bytes.jsonl").write_text(text)
    resume(tmp_path / "run", progress=False)


def test_a_run_that_was_stopped_before_its_first_commit_begins_again(whole: Run, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "run", *LONG, rounds=9, progress=Stop(1, "twice"), checkpoint_every=100)
    same(resume(tmp_path / "run", progress=False), whole)


def test_other_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        make(tmp_path / "run", progress=Stop(1, "once"))
    text = (tmp_path / "run" / "config.toml").read_text()
    (tmp_path / "run" / "config.toml").write_text(text.replace("clients = 6", "clients = 7"))
    with pytest.raises(StorageError) as caught:
        resume(tmp_path / "run", progress=False)
    assert caught.value.code == "E405"


def test_other_frozen_values_are_refused(tmp_path: Path) -> None:
    fed = cases.federation()
    assert fed.frozen
    assert not cases.federation(model="small").frozen
    with pytest.raises(Interrupted):
        fit(fed, 4, tmp_path / "run", progress=Stop(1, "once"))
    other = cases.federation()
    other._trainer.frozen["frozen.weight"].add_(1e-3)
    with pytest.raises(StorageError, match="parameters that are not trained are not those") as caught:
        resume(tmp_path / "run", 4, fed=other, progress=False)
    assert caught.value.code == "E405"
    assert resume(tmp_path / "run", 4, fed=cases.federation(), progress=False).info["status"] == "done"


@pytest.mark.parametrize("sign", ["\x9b", "\x7f", "\x1b", "\x85"])
def test_a_line_of_json_holds_nothing_that_a_terminal_obeys(sign: str, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.emit({"text": f"a{sign}b é"})
    said = capsys.readouterr().out
    assert sign not in said
    assert json.loads(said) == {"text": f"a{sign}b é"}


def refused(path: Path, said: str, **options: Any) -> None:
    with pytest.raises(StorageError, match=said) as caught:
        resume(path, progress=False, **options)
    assert caught.value.code == "E405"


def stopped(path: Path, *arguments: str, rounds: int = 4) -> Path:
    with pytest.raises(Interrupted):
        make(path, *arguments, rounds=rounds, progress=Stop(1, "once"))
    return path


def test_another_config_is_refused_by_its_key(tmp_path: Path) -> None:
    file = stopped(tmp_path / "run", "run.log_every=1") / "config.toml"
    text = file.read_text()
    file.write_text(text.replace("lr = 0.1", "lr = 0.2").replace("cohort = 3", "cohort = 2"))
    assert file.read_text() != text
    refused(tmp_path / "run", "started with: cohort, local.lr")
    file.write_text(text.replace("log_every = 1", "log_every = 2").replace("rounds = 4", "rounds = 5"))
    assert resume(tmp_path / "run", progress=False).info["rounds_done"] == 4


def test_a_changed_entry_file_is_refused_by_its_name(tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    own.write_text(OWN_ROUNDS, encoding="utf-8")
    stopped(tmp_path / "run", f'method={{entry="{own}:Mine", rounds=7}}')
    own.write_text(OWN_ROUNDS + "# changed\n", encoding="utf-8")
    refused(tmp_path / "run", r"mine.py \(method.*entry\) has changed")
    own.write_text(OWN_ROUNDS, encoding="utf-8")
    assert resume(tmp_path / "run", progress=False).info["status"] == "done"


def own_data(shift: float = 0.0, label: int = 0, test: bool = False) -> Any:
    x = torch.arange(24.0).view(12, 2) / 24
    x[0, 0] += shift
    y = torch.tensor([0, 1] * 6)
    y[-1] += label
    clients = {"a": (x[:6], y[:6]), "b": (x[6:], y[6:])}
    return ClientData.from_clients(clients, test=(x, y) if test else None)


def own_fed(data: Any, engine: str = "loop") -> Federation:
    return Federation(lambda: torch.nn.Linear(2, 3), data, local=LocalSGD(lr=0.1), engine=engine)


@pytest.mark.parametrize("other", [{"shift": 1.0}, {"label": 1}])
def test_data_of_other_content_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="fed=fed"):
        fit(own_fed(own_data()), 3, tmp_path / "run", progress=Stop(1, "once"))
    refused(tmp_path / "run", "the data is not", fed=own_fed(own_data(**other)))
    refused(tmp_path / "run", "which gives other bits", fed=own_fed(own_data(), "threads"))
    assert resume(tmp_path / "run", fed=own_fed(own_data()), progress=False).info["status"] == "done"


def test_without_a_test_set_the_training_loss_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(own_fed(own_data()), 2, tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    assert "train loss" in said
    assert f"train loss {run.records[-1].train_loss:.4f} @ 1 · no test set: pass test= to ClientData" in said
    assert "train loss" in run.summary()
    fit(own_fed(own_data(test=True)), 2, tmp_path / "tested")
    assert "train loss" not in capsys.readouterr().out


def test_a_run_goes_on_with_an_engine_of_the_same_bits(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tmp_path / "run", *LONG, rounds=9)
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (info["engine"], info["cores"]) == ("loop", engine.cores())
    (tmp_path / "run" / "run.json").write_text(json.dumps(info | {"engine": "processes"}))
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace('engine = "loop"', 'engine = "auto"'))
    monkeypatch.setattr(engine.processes, "available", lambda: False)
    run = resume(tmp_path / "run", progress=False)
    assert (run.info["engine"], run.info["engine_reason"]) == ("loop", "same bits")
    same(run, whole)


def test_a_run_on_threads_stays_on_threads_and_says_when_the_cores_are_others(tmp_path: Path) -> None:
    stopped(tmp_path / "run", "engine=threads")
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace('engine = "threads"', 'engine = "loop"'))
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(info | {"cores": 1000}))
    watcher = Stop(0, "")
    run = resume(tmp_path / "run", progress=watcher)
    assert run.info["engine"] == "threads"
    assert "begun on 1000 cores" in watcher.notes[0]
    assert "not bit-identical" in lines(run.path / "events.jsonl")[0]["message"]


def test_ctrl_c_while_the_final_model_is_written_leaves_a_run_that_names_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.json is written once more then, and must not name a model that is not there."""
    written = folder.replace

    def pressed(path: Path, blob: bytes) -> None:
        if path.name == "model.safetensors":
            raise KeyboardInterrupt
        written(path, blob)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "replace", pressed)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "run")
    opened = Run.open(tmp_path / "run")
    assert opened.info["final_sha256"] is None
    assert [check.problem for check in verify.files(opened.path) if check.problem] == []
    whole = make(tmp_path / "whole")
    assert resume(tmp_path / "run", progress=False).info["final_sha256"] == whole.info["final_sha256"]


def test_a_resume_that_does_not_end_leaves_no_model_of_before(tmp_path: Path) -> None:
    first = make(tmp_path / "run", "run.checkpoint_every=1", rounds=2)
    old = (first.path / "model.safetensors").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        resume(first.path, 6, progress=Stop(4, "twice"))
    opened = Run.open(first.path)
    assert (opened.info["rounds_done"], opened.info["final_sha256"]) == (3, None)
    assert not (first.path / "model.safetensors").exists()
    (first.path / "model.safetensors").write_bytes(old)  # as an older lamina left it
    for final in (None, "0" * 64):
        opened = Run.open(first.path)
        opened.info["final_sha256"] = final
        model = opened.model.state_dict()
        assert all(torch.equal(x, opened.state.params[name]) for name, x in model.items())


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_the_rows_that_a_run_went_on_from_go_as_soon_as_there_are_newer_ones(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [f"store=disk:{tmp_path / 'clients'}"] if store == "disk" else []
    make(tmp_path / "run", "method=errorfeedback", "uplink=topk:0.1", *more, rounds=2)
    gc.collect()
    restored: list[weakref.ref[State]] = []

    def restore(*arguments: Any) -> Any:
        found = folder.restore(*arguments)
        assert found[0] is not None
        restored.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(runs, "restore", restore)
    alive: list[bool] = []

    class Look(Stop):
        def round(self, row: Any) -> None:
            gc.collect()
            alive.append(restored[0]() is not None)

    resume(tmp_path / "run", 4, progress=Look(0, ""))
    assert alive == [False, False]


def test_a_run_is_left_as_it_is_when_another_process_is_at_its_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has ended there, but its Federation is still around."""
    path = tmp_path / "run"
    make(path, "method=errorfeedback", f"store=disk:{tmp_path / 'clients'}", rounds=2)
    gc.collect()

    def content() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    before = content()
    with monkeypatch.context() as patch:
        take = disk.lock.take
        patch.setattr(disk.lock, "take", lambda place: {} if place.parent.name == "clients" else take(place))
        with pytest.raises(StorageError, match="has not let go of the Federation") as caught:
            resume(path, 4, progress=False)
    assert caught.value.code == "E406"
    assert content() == before
    assert Run.open(path).info["status"] == "done"
    assert resume(path, 4, progress=False).info["rounds_done"] == 4


def test_a_schedule_over_the_run_allows_no_other_rounds(tmp_path: Path) -> None:
    make(tmp_path / "run", "local.schedule=cosine", rounds=2)
    with pytest.raises(StorageError, match="runs over the 2 rounds") as caught:
        resume(tmp_path / "run", 4, progress=False)
    assert caught.value.code == "E405"
    assert 'local.schedule="cosine:4"' in str(caught.value)
    make(tmp_path / "2", "local.schedule=cosine:4", rounds=2)
    longer = resume(tmp_path / "2", 4, progress=False)
    assert longer.info["config_sha256"] == load(longer.path, env={}).sha256


def pressed(interrupts: runs.Interrupts, presses: int) -> None:
    """So many presses, of which Python makes one call: the system writes a byte for each, whatever code runs."""
    os.write(interrupts._pipe[1], bytes([signal.SIGINT]) * (presses - 1))
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to oneself")
def test_two_presses_during_one_long_step_are_two() -> None:
    with runs.Interrupts() as interrupts:
        pressed(interrupts, 1)
        assert interrupts.asked
        with pytest.raises(KeyboardInterrupt):
            pressed(interrupts, 1)
    with runs.Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            pressed(interrupts, 2)
        assert interrupts.asked


# ---- what may change in a run that has begun


def test_what_cannot_change_the_result_may_change(whole: Run, tmp_path: Path) -> None:
    stopped(tmp_path / "run", *LONG, rounds=9)
    keys = ("run.checkpoint_every=2", "stop.bytes=1GB", "faults.reply_deadline_s=60", "workers=3", "engine=processes")
    run = resume(tmp_path / "run", keys=keys, progress=False)
    same(run, whole)
    assert run.info["options"]["checkpoint_every"] == 2
    assert run.info["options"]["stop"] == {"bytes": "1GB"}
    assert (run.info["engine"], run.info["workers"]) == ("processes", 3)
    config = load(run.path, env={})
    assert (config.run.checkpoint_every, config.stop.bytes, config.faults.reply_deadline_s) == (2, "1GB", 60)
    assert (config.engine, config.workers) == ("processes", 3)
    text = (run.path / "config.toml").read_text().splitlines()
    assert sum("# lamina resume" in line for line in text) == 5
    again = resume(run.path, keys=("rounds=9",), progress=False)
    assert again.info["status"] == "done"
    assert (run.path / "config.toml").read_text().splitlines() == text


@pytest.mark.parametrize("key", ["cohort=2", "seed=1", "method.phi=2", "local.lr=0.2", "aggregate=median", "nothing=1"])
def test_what_can_change_the_result_may_not_and_the_key_is_named(key: str, tmp_path: Path) -> None:
    path = stopped(tmp_path / "run", *LONG)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(StorageError) as caught:
        resume(path, keys=("rounds=4", key), progress=False)
    assert caught.value.code == "E405"
    assert caught.value.message == f"{key.partition('=')[0]} cannot change in a run that has begun"
    assert caught.value.where == "command line, argument 3"
    assert "run.*, stop.*" in (caught.value.remedy or "")
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_what_a_round_puts_up_with_may_change_and_is_then_what_the_run_is_of(tmp_path: Path) -> None:
    stopped(tmp_path / "run", "faults.min_replies=3")
    run = resume(tmp_path / "run", keys=("faults.min_replies=1", "faults.rest_rounds=2"), progress=False)
    config = load("quickstart", [*SMALL, "rounds=4", "faults.rest_rounds=2"], {})
    assert run.info["config_sha256"] == config.sha256
    assert folder.other_settings(run.path, config) == []
    begun = load("quickstart", [*SMALL, "rounds=4", "faults.min_replies=3"], {})
    assert folder.other_settings(run.path, begun) == ["faults.min_replies", "faults.rest_rounds"]
    assert folder.other_settings(run.path, begun, resuming=True) == []


def test_what_may_change_is_said_in_full() -> None:
    pages = Path(lamina.__file__).parent / "explain" / "pages"
    said = [(pages / "E405.md").read_text(encoding="utf-8")]
    said += [(Path(__file__).parents[1] / "docs" / "resume.md").read_text(encoding="utf-8")]
    for text in said:
        assert [key for key in CHANGEABLE if f"`{key}`" not in text] == []
    told = " ".join(CliRunner().invoke(cli.app, ["resume", "--help"]).output.split())
    assert f"What may change: {', '.join(CHANGEABLE)}." in told


def test_a_key_with_an_impossible_value_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = stopped(tmp_path / "run")
    for key in ("rounds=many", "run.checkpoint_every=0", "stop.accuracy=2", "run.nothing=1"):
        with pytest.raises(ConfigError):
            resume(path, keys=(key,), progress=False)
    assert Run.open(path).info["status"] == "interrupted"


def test_an_engine_of_other_bits_and_a_log_that_would_lack_rounds_are_refused(tmp_path: Path) -> None:
    path = stopped(tmp_path / "run")
    refused(path, "engine='threads': this run was begun with 'loop'", keys=("engine=threads",))
    refused(path, "run.keep_clients_log cannot change", keys=("run.keep_clients_log=true",))
    assert resume(path, keys=("run.keep_clients_log=false",), progress=False).info["status"] == "done"


def test_a_run_of_before_a_key_was_there_goes_on(tmp_path: Path) -> None:
    """As if lamina had no `diagnostics` yet when it began, in env.json and in config.toml."""
    path = stopped(tmp_path / "run")
    environment = json.loads((path / "env.json").read_text())
    del environment["config"]["diagnostics"]
    (path / "env.json").write_text(json.dumps(environment))
    text = (path / "config.toml").read_text().splitlines(keepends=True)
    (path / "config.toml").write_text("".join(line for line in text if not line.startswith("diagnostics")))
    assert resume(path, progress=False).info["status"] == "done"


def test_a_run_that_was_killed_when_it_had_just_reached_its_limit_does_not_go_on_behind_it(tmp_path: Path) -> None:
    """Between the last commit and the end; one that had ended by it goes on, as whoever asks wants more."""
    run = make(tmp_path / "run", "stop.accuracy=0.01", "run.checkpoint_every=1", rounds=4)
    assert run.info["rounds_done"] == 1
    info = {key: value for key, value in run.info.items() if key != "stopped"}
    (run.path / "run.json").write_text(json.dumps(info | {"status": "running", "final_sha256": None}))
    again = resume(run.path, progress=False)
    assert (again.info["status"], again.info["rounds_done"]) == ("done", 1)
    assert again.info["final_sha256"] == run.info["final_sha256"]
    assert "accuracy" in again.info["stopped"]
    assert resume(run.path, progress=False).info["rounds_done"] == 4


def test_the_best_round_of_those_that_were_committed_is_kept_over_a_stop(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        make(tmp_path / "run", *LONG, "run.checkpoint_every=1", rounds=9, progress=Stop(5, "once"))
    run = resume(tmp_path / "run", progress=False)
    assert run.best is not None
    kept = {int(path.name[6:]) for path in checkpoint.committed(run.path / "checkpoints")}
    assert kept == {8, 9, run.best.round + 1}


DAMAGE: dict[str, list[str | None]] = {
    "run.json": ["[]", '{"version": 1}', "{", "7"],
    "metrics.jsonl": [None, "garbage\n", "[1]\n"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in DAMAGE.items() for text in texts])
def test_a_damaged_run_says_so(name: str, text: str | None, tmp_path: Path) -> None:
    run = make(tmp_path / "run", rounds=1)
    (run.path / name).unlink()
    if text is not None:
        (run.path / name).write_text(text * (1 if name == "run.json" else 999))
    with pytest.raises(StorageError) as caught:
        Run.open(run.path)
    assert caught.value.code == "E404"


def test_a_run_without_its_environment_does_not_go_on(tmp_path: Path) -> None:
    (stopped(tmp_path / "run") / "env.json").unlink()
    with pytest.raises(StorageError, match="is missing or damaged"):
        resume(tmp_path / "run", progress=False)


def test_without_a_folder_a_run_is_named_by_its_config_below_the_root(tmp_path: Path) -> None:
    config = load("quickstart", (*SMALL, "name=mine"), env={})
    run = fit(build(config), 1, root=tmp_path, config=config, progress=False)
    assert run.path == tmp_path / "mine" / "001-fedavg"
    run = fit(build(config), 1, root=tmp_path, progress=False)
    assert run.path == tmp_path / "digits" / "001-fedavg"


def test_a_failed_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    path = new_folder("x", "fedavg", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "split_document", failing)
        with pytest.raises(StorageError, match="Read-only") as caught:
            make(path, rounds=1)
    assert "make room" not in str(caught.value)
    assert not path.exists()
    assert not (tmp_path / "latest").is_symlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a file is where a folder should be"):
        new_folder("y", "fedavg", tmp_path / "file")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM to oneself")
@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_other_signals_finish_the_round_too(number: str, code: int, whole: Run, tmp_path: Path) -> None:
    before = signal.signal(getattr(signal, number), signal.SIG_DFL)
    try:
        with pytest.raises(Interrupted) as caught:
            make(tmp_path / "run", *LONG, rounds=9, progress=Stop(2, number), checkpoint_every=100)
        assert signal.getsignal(getattr(signal, number)) == signal.SIG_DFL
    finally:
        signal.signal(getattr(signal, number), before)
    assert caught.value.exit_code == code
    info = Run.open(tmp_path / "run").info
    assert (info["status"], info["exit_code"], info["rounds_done"]) == ("interrupted", code, 2)
    same(resume(tmp_path / "run", progress=False), whole)


@pytest.mark.skipif(sys.platform == "win32", reason="no file locks")
def test_two_processes_cannot_be_at_one_run(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        make(tmp_path / "run", progress=Stop(1, "once"))
    held = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", held, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(StorageError) as caught:
            resume(tmp_path / "run", progress=False)
        other.communicate(b"\n")
    assert caught.value.code == "E406"
    assert resume(tmp_path / "run", progress=False).info["status"] == "done"


@pytest.mark.parametrize("victim", ["metrics.jsonl", "checkpoint"])
def test_a_full_disk_stops_cleanly_and_the_last_commit_is_intact(
    victim: str, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    count = 0

    def failing(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == 13:  # in the third commit or so
                raise full
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        if victim == "checkpoint":
            patch.setattr(checkpoint, "_write", failing(checkpoint._write))
        else:
            patch.setattr(folder, "_append", failing(folder._append))
        with pytest.raises(StorageError) as caught:
            make(tmp_path / "run", *LONG, rounds=9, checkpoint_every=1)
    assert (caught.value.code, caught.value.exit_code) == ("E401", 5)
    info = Run.open(tmp_path / "run").info
    assert info["status"] == "failed"
    assert 1 <= info["rounds_done"] < 9
    assert all(info[key]["round"] < info["rounds_done"] for key in ("best", "final"))
    same(resume(tmp_path / "run", progress=False), whole)


def test_a_run_that_diverges_says_so_and_keeps_its_status(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        make(tmp_path / "run", "local.lr=1e30", "local.momentum=0.9")
    info = Run.open(tmp_path / "run").info
    assert (info["status"], info["exit_code"]) == ("failed", 4)
    assert "E310" in info["error"]
    assert not (tmp_path / "run" / "crash.txt").exists()


# ---- folders


def test_folders_are_numbered_and_the_latest_is_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_RUNS", str(tmp_path / "elsewhere"))
    first, second = new_folder("digits", "fedavg"), new_folder("digits", "fedlama")
    assert (first.name, second.name) == ("001-fedavg", "002-fedlama")
    assert first.parent == tmp_path / "elsewhere" / "digits"
    assert (tmp_path / "elsewhere" / "latest").resolve() == second.resolve()
    assert new_folder("../../x y", "fedavg", tmp_path).parent == tmp_path / "x-y"


def test_numbers_go_on_beyond_999(tmp_path: Path) -> None:
    """1000 is after 999, has a name of its own for the commands, and is not found by 100."""
    (tmp_path / "exp" / "999-fedavg").mkdir(parents=True)
    made = [new_folder("exp", method, tmp_path) for method in ("fedavg", "fedlama", "fedavg")]
    assert [path.name for path in made] == ["1000-fedavg", "1001-fedlama", "1002-fedavg"]
    assert [runs.number_of(Path(name)) for name in ("001-x", "1000-x", "10-x", "mine")] == [1, 1000, 0, 0]
    for path in (tmp_path / "exp").iterdir():
        (path / "run.json").write_text('{"version": 1}')  # damaged, but there
    assert base.find("1000", tmp_path) == made[0]
    with pytest.raises(StorageError, match="no run '100'"):
        base.find("100", tmp_path)
    there = [tmp_path / "exp" / "999-fedavg", *made]
    assert base.find_all("999-1002", tmp_path) == there
    assert comparing._called(made[:2] + made[2:], tmp_path) == f"1000-1002 --run-dir {tmp_path}"
    assert [Path(row["run"]).name for row in looking._runs_listed(tmp_path)[0]] == [path.name for path in there]


def test_what_replaces_a_file_is_durable_and_so_is_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a machine that loses its power may come back with the old run.json beside new logs."""
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(stat.S_ISDIR(os.fstat(handle).st_mode)))
    book = folder.Book(tmp_path, {"options": {"keep_clients_log": False}, "seconds": 0.0})
    book.save()
    assert synced == [False, True]
    assert (tmp_path / "run.json").exists()


def test_a_folder_with_a_run_is_not_written_over(tmp_path: Path) -> None:
    make(tmp_path / "run", rounds=1)
    with pytest.raises(StorageError) as caught:
        make(tmp_path / "run", rounds=1)
    assert caught.value.code == "E402"
    with pytest.raises(StorageError) as caught:
        Run.open(tmp_path / "nothing")
    assert caught.value.code == "E403"


def test_a_run_from_python_can_be_gone_on_with_by_its_federation(tmp_path: Path) -> None:
    def fed() -> Any:
        return build(load("quickstart", [*SMALL], {}))

    with pytest.raises(Interrupted):
        fit(fed(), 3, tmp_path / "run", progress=Stop(1, "once"))
    with pytest.raises(StorageError, match="fed=fed"):
        resume(tmp_path / "run", progress=False)
    assert resume(tmp_path / "run", fed=fed(), progress=False).info["status"] == "done"
    opened = Run.open(tmp_path / "run", fed=fed())
    assert isinstance(opened.state, State)
    assert opened.state.sha256() == opened.info["final_sha256"]


def test_fit_is_a_method_of_the_federation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = build(load("quickstart", SMALL, {})).fit(rounds=2, out=tmp_path / "run")
    assert len(run.records) == 2
    assert "2 of 2 rounds" in capsys.readouterr().out


def test_control_c_outside_the_main_thread_is_left_alone(tmp_path: Path) -> None:
    made: list[Run] = []
    thread = threading.Thread(target=lambda: made.append(make(tmp_path / "run", rounds=1)))
    thread.start()
    thread.join()
    assert made[0].info["status"] == "done"


def test_a_run_that_ends_with_layers_waiting_says_so(tmp_path: Path) -> None:
    watcher: Watcher = Stop(0, "")
    make(tmp_path / "run", "method=fedlama", "method.phi=3", rounds=4, progress=watcher)
    assert "no multiple of 3" in watcher.notes[0]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("uplink", "told"), [("fp32", True), ("topk:0.1", False)])
def test_a_method_that_has_nothing_to_make_up_for_says_so(tmp_path: Path, uplink: str, told: bool) -> None:
    watcher: Watcher = Stop(0, "")
    make(tmp_path / "run", "method=flare", f"uplink={uplink}", rounds=1, progress=watcher)
    notes = [note for note in watcher.notes if "loses nothing: try uplink=topk" in note]  # type: ignore[attr-defined]
    assert bool(notes) == told


def test_secrets_on_the_command_line_are_not_written_down() -> None:
    argv = ["lamina", "run", "x", "data.token=abc", "--password", "def", "https://me:pw@host/x", "rounds=3"]
    assert redacted(argv) == [
        "lamina",
        "run",
        "x",
        "data.token=***",
        "--password",
        "***",
        "https://***@host/x",
        "rounds=3",
    ]


def test_titles() -> None:
    from lamina import Chain, FedAdam, wire

    assert runs.method_title(Chain(FedLAMA(phi=2), FedAdam())) == "fedlama+fedadam"
    assert runs.codec_title(wire.TopK(0.01, values="sign")) == "topk:0.01:sign"
    assert runs.codec_title(wire.Dense("int8")) == "int8"
