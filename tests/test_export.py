"""Exports and trackers: what they are given, that both ways agree, and that none of them stops a run."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from lamina import ClientData, FedAvg, Federation, RunError, cli, models, runs, verify
from lamina.config import build, load
from lamina.errors import ConfigError, StorageError
from lamina.export import FORMATS, export, live, sink
from lamina.export.feed import Described, Layers, rounds, scalars
from lamina.runs import Run, fit

SMALL = ("engine=loop", "model.widths=[64, 12, 10]", "data.clients=6", "cohort=3", "local.epochs=1", "method=fedlama")


def make(path: Path, *arguments: str, count: int = 3, progress: Any = False) -> Run:
    config = load("quickstart", [*SMALL, f"rounds={count}", *arguments], {})
    return fit(build(config), count, path, config=config, progress=progress)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make(tmp_path_factory.mktemp("exported") / "quickstart" / "001-fedlama")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- files


def test_csv_has_the_rows_of_the_logs_with_all_their_digits(run: Run, tmp_path: Path) -> None:
    made = export(run.path, "csv", tmp_path)
    assert [path.name for path in made] == ["metrics.csv", "layers.csv", "bytes.csv"]
    with made[0].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == [row.accuracy for row in run.records]
    assert [int(row["total_up"]) for row in rows] == [row.total_up for row in run.records]
    with made[2].open(newline="") as file:
        assert sum(int(row["bytes"]) for row in csv.DictReader(file)) == sum(
            row.bytes_up + row.bytes_down for row in run.records
        )


def test_names_that_begin_formulas_are_inert_in_csv(tmp_path: Path) -> None:
    """A metric's name and a client's are the user's; both stand in cells."""
    made = make(tmp_path / "run", "run.keep_clients_log=true", count=1)
    info = json.loads((made.path / "run.json").read_text())
    for log, row in (
        ("metrics.jsonl", {**lines(made.path / "metrics.jsonl")[0], "metrics": {"x": 1.0}, "=cmd|' /C calc'!A0": -1.0}),
        ("clients.jsonl", {**lines(made.path / "clients.jsonl")[0], "name": "@SUM(A1)"}),
    ):
        (made.path / log).write_text(json.dumps(row) + "\n")
        info["lengths"][log] = (made.path / log).stat().st_size
    (made.path / "run.json").write_text(json.dumps(info))
    export(made.path, "csv", tmp_path / "out")
    with (tmp_path / "out" / "metrics.csv").open(newline="") as file:
        titles = next(csv.reader(file))
    assert "'=cmd|' /C calc'!A0" in titles
    assert "metrics.x" in titles
    with (tmp_path / "out" / "clients.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["name"] == "'@SUM(A1)"


def test_tables_for_texts_have_ten_rounds_at_most(tmp_path: Path) -> None:
    made = make(tmp_path / "run", "evaluate_every=3", count=21)
    (tex,) = export(made.path, "latex", tmp_path)
    (md,) = export(made.path, "md")
    assert md == made.path / "export" / "md" / "rounds.md"
    assert len(md.read_text().splitlines()) == 2 + 7  # every third of 21 rounds
    assert md.read_text().splitlines()[-1].startswith("| 20 |")
    assert tex.read_text().count(r"\\") == 1 + 7
    assert "FedLAMA(phi=2, warmup=0)" in tex.read_text()


def test_safetensors_is_the_model_of_the_run(run: Run, tmp_path: Path) -> None:
    (file,) = export(run.path, "safetensors", tmp_path)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(load_file(file)[name], tensor)


def test_a_run_without_a_whole_model_has_none_to_export(tmp_path: Path) -> None:
    made = make(tmp_path / "run", count=1)
    (made.path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(StorageError, match="no model that is whole"):
        export(made.path, "safetensors", tmp_path / "out")
    (made.path / "model.safetensors").unlink()
    with pytest.raises(StorageError, match="has not ended"):
        export(made.path, "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_format_is_refused(run: Run) -> None:
    with pytest.raises(
        ConfigError, match="expected one of csv, latex, md, safetensors, tensorboard, mlflow, wandb"
    ) as e:
        export(run.path, "tensorbord")
    assert e.value.remedy == "did you mean 'tensorboard'?"
    with pytest.raises(StorageError, match="there is no run"):
        export(run.path / "nowhere", "csv")


def test_a_file_where_the_folder_should_be_is_said(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a file is where a folder should be"):
        export(run.path, "csv", tmp_path / "file")


# ---- what trackers are given


def test_the_numbers_of_a_round_have_one_name_each(run: Run) -> None:
    fed = list(rounds(run.path, run.info["lengths"]))
    assert [row["round"] for row, _ in fed] == [0, 1, 2]
    named = scalars(*fed[1])
    assert named["accuracy"] == run.records[1].accuracy
    layer = next(row for row in lines(run.path / "layers.jsonl") if row["round"] == 1)
    assert named[f"layers/{layer['layer']}/update_norm"] == layer["update_norm"]
    assert scalars({"round": 3, "metrics": {"auc": 0.5}, "loss": None}, []) == {"metrics/auc": 0.5}


class Fake:
    """A tracker that keeps what it is given, or fails in one of its three ways."""

    def __init__(self, fails: str = ""):
        self.fails, self.given, self.closed, self.done = fails, [], 0, -1

    def open_sink(self, place: Path, run: Described, done: int) -> Fake:
        self.done = done
        assert place.is_dir()
        self._fail("open")
        return self

    def round(self, row: Mapping[str, Any], layers: Layers) -> None:
        self._fail("round")
        self.given.append((dict(row), list(layers)))

    def close(self) -> None:
        self.closed += 1
        self._fail("close")

    def _fail(self, where: str) -> None:
        if self.fails == where:
            raise OSError(f"cannot {where}")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setitem(sys.modules, "lamina.export.tensorboard", made)  # type: ignore[arg-type]
    monkeypatch.setitem(sink.TRACKERS, "tensorboard", "json")  # a package that is here
    return made


TRACK = "run.track=[tensorboard]"


def test_a_tracker_is_given_while_the_run_goes_what_export_gives_after_it(fake: Fake, tmp_path: Path) -> None:
    made = make(tmp_path / "run", TRACK)
    assert fake.given == list(rounds(made.path, made.info["lengths"]))
    assert [row["round"] for row, _ in fake.given] == [0, 1, 2]
    assert fake.closed == 1
    live, fake.given = fake.given, []
    export(made.path, "tensorboard", tmp_path / "out")
    assert fake.given == live


def test_a_resumed_run_gives_every_round_once(fake: Fake, tmp_path: Path) -> None:
    made = make(tmp_path / "run", TRACK, count=2)
    assert made.info["options"]["track"] == ["tensorboard"]
    runs.resume(made.path, 4, progress=False)
    assert fake.done == 2
    assert [row["round"] for row, _ in fake.given] == [0, 1, 2, 3]


class Stops(FedAvg):
    """Fails in round 4, as long as it is told to."""

    fails = True

    def plan(self, state: Any, plan: Any) -> Any:
        if plan.round == 4 and self.fails:
            raise RunError("stop", code="E306")
        return plan


def committed(path: Path, lengths: dict[str, int]) -> Any:
    return rounds(path, lengths)


def given(fake: Fake) -> list[int]:
    return [row["round"] for row, _ in fake.given]


def test_rounds_that_an_error_commits_are_handed_on(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Committed are rounds 0 to 2, and 3 as the last words of the run; then the rest, by a second process."""
    parts = {name: (torch.ones(4, 3), torch.tensor([0, 1, 0, 1])) for name in "abc"}
    fed = Federation(models.mlp((3, 2)), ClientData.from_clients(parts), method=Stops(), engine="loop")
    with pytest.raises(RunError):
        fit(fed, 6, tmp_path / "run", track=["tensorboard"], checkpoint_every=3, progress=False)
    assert given(fake) == [0, 1, 2, 3]
    monkeypatch.setattr(Stops, "fails", False)
    runs.resume(tmp_path / "run", fed=fed, progress=False)
    assert (fake.done, given(fake)) == (4, [0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("rounds", [2, 3])
def test_rounds_that_were_committed_before_a_kill_are_handed_on_once(
    rounds: int, fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the commit of round 1 and its handing on. With 2 rounds, nothing is left to do but that."""
    feed, times = live.Trackers.feed, itertools.count()

    def dies(self: Any) -> None:
        if next(times) >= 2:  # at the start, after round 0, after round 1
            raise SystemExit(9)
        feed(self)

    with monkeypatch.context() as patch:
        patch.setattr(live.Trackers, "feed", dies)
        with pytest.raises(SystemExit):
            make(tmp_path / "run", TRACK, "run.checkpoint_every=1", count=rounds)
    assert given(fake) == [0]
    assert json.loads((tmp_path / "run" / "export" / "given.json").read_text()) == {"tensorboard": 1}
    runs.resume(tmp_path / "run", progress=False)
    assert (fake.done, given(fake)) == (1, list(range(rounds)))
    made = Run.open(tmp_path / "run")
    assert fake.given == list(committed(made.path, made.info["lengths"]))


def test_a_run_that_goes_back_to_an_older_checkpoint_hands_on_no_round_twice(fake: Fake, tmp_path: Path) -> None:
    made = make(tmp_path / "run", TRACK, "run.checkpoint_every=1", count=3)
    (made.path / "checkpoints" / "round-000003" / "model.safetensors").write_bytes(b"damaged")
    runs.resume(made.path, 4, progress=False)
    assert given(fake) == [0, 1, 2, 3]


def test_a_tracker_that_comes_later_is_given_what_was_before(fake: Fake, tmp_path: Path) -> None:
    made = make(tmp_path / "run", count=2)
    assert not (made.path / "export").exists()
    runs.resume(made.path, 3, keys=[TRACK], progress=False)
    assert (fake.done, given(fake)) == (0, [0, 1, 2])


def test_a_run_of_an_earlier_lamina_has_handed_on_what_is_committed(fake: Fake, tmp_path: Path) -> None:
    made = make(tmp_path / "run", TRACK, count=2)
    (made.path / "export" / "given.json").unlink()
    runs.resume(made.path, 3, progress=False)
    assert (fake.done, given(fake)) == (2, [0, 1, 2])


class Notes:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def begin(self, run: Run, fed: Any) -> None: ...
    def round(self, row: Any) -> None: ...
    def end(self, run: Run) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("where", ["open", "round", "close"])
def test_a_tracker_that_fails_is_an_event_and_stops_nothing(fake: Fake, tmp_path: Path, where: str) -> None:
    fake.fails = where
    watcher = Notes()
    made = make(tmp_path / "run", TRACK, progress=watcher)
    plain = make(tmp_path / "plain")
    assert made.info["status"] == "done"
    assert made.info["final_sha256"] == plain.info["final_sha256"]
    events = [row for row in lines(made.path / "events.jsonl") if row["event"] == "tracker failed"]
    assert events == [{"event": "tracker failed", "tracker": "tensorboard", "message": f"OSError: cannot {where}"}]
    assert f"tensorboard failed and is told nothing more: OSError: cannot {where}" in watcher.notes
    assert not [check for check in verify.files(made.path) if check.problem]


def test_a_run_of_python_takes_trackers_too(fake: Fake, tmp_path: Path) -> None:
    fed = build(load("quickstart", SMALL, {}))
    fed.fit(2, tmp_path / "run", track=["tensorboard"], progress=False)
    assert len(fake.given) == 2
    with pytest.raises(ConfigError, match="track: expected tensorboard, mlflow, wandb; got 'wand'"):
        fed.fit(2, tmp_path / "other", track=["wand"], progress=False)
    assert not (tmp_path / "other").exists()


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setitem(sink.TRACKERS, "tensorboard", "no_such_package")
    with pytest.raises(ConfigError, match="tensorboard needs its package") as error:
        make(tmp_path / "run", TRACK)
    assert error.value.remedy == "pip install 'lamina[track]'"
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="tensorboard needs its package"):
        export(run.path, "tensorboard", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_no_tracker_is_no_config() -> None:
    with pytest.raises(ConfigError, match="one of tensorboard, mlflow, wandb"):
        load("quickstart", ["run.track=[wandbs]"], {})


def test_trackers_change_no_result() -> None:
    plain, tracked = load("quickstart", SMALL, {}), load("quickstart", [*SMALL, TRACK], {})
    assert plain.sha256 == tracked.sha256
    assert tracked.run.track == ["tensorboard"]


# ---- the packages


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_what_the_run_says(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    export(run.path, "tensorboard", tmp_path)
    found = EventAccumulator(str(tmp_path / "quickstart" / "001-fedlama"))
    found.Reload()
    scalars_ = found.Scalars("accuracy")
    assert [x.step for x in scalars_] == [0, 1, 2]
    assert [x.value for x in scalars_] == pytest.approx([row.accuracy for row in run.records])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_reads_what_the_run_says(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    for name in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "")  # so that what the sink sets is taken back
    export(run.path, "mlflow", tmp_path)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=tmp_path.as_uri())
    experiment = client.get_experiment_by_name("quickstart")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "001-fedlama"
    assert found.data.params["uplink"] == "fp32"
    history = client.get_metric_history(found.info.run_id, "accuracy")
    assert [(m.step, m.value) for m in history] == [(row.round, row.accuracy) for row in run.records]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_beside_the_run_and_nowhere_else(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "online")  # of the user's shell: not ours
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", "")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "")
    export(run.path, "wandb", tmp_path / "out")
    (file,) = (tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb")
    assert file.stat().st_size > 0
    assert not (tmp_path / "home").exists()


# ---- the command


def lamina(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["export", *arguments])


def test_the_command_says_what_it_wrote(run: Run, tmp_path: Path) -> None:
    result = lamina(str(run.path), "--to", "md", "--out", str(tmp_path))
    assert result.stdout.split() == [str(tmp_path / "rounds.md")]
    found = json.loads(lamina(str(run.path), "--to", "md", "--out", str(tmp_path), "--json").stdout)
    assert found["files"] == [str(tmp_path / "rounds.md")]
    refused = lamina(str(run.path), "--to", "excel")
    assert refused.exit_code == 2
    assert all(name in " ".join(lamina("--help").stdout.split()) for name in FORMATS)


def test_an_export_that_is_there_is_not_written_over(fake: Fake, tmp_path: Path) -> None:
    made = make(tmp_path / "run", count=1)
    (made.path / "export" / "tensorboard").mkdir(parents=True)
    (made.path / "export" / "tensorboard" / "events").write_text("mine")
    with pytest.raises(StorageError, match="holds this run already") as error:
        export(made.path, "tensorboard")
    assert error.value.code == "E402"
    assert not fake.given
