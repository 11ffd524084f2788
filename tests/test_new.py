"""`lamina new`: what it writes runs as it stands, offline and without extras, and nothing is overwritten."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from lamina import cli, scaffold
from lamina.config import data_of, load, model_of
from lamina.runs import Run

KINDS = ("image", "text", "tabular")


def lamina(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, none of the extras, runs below the clean folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAMINA_OFFLINE", "1")
    monkeypatch.delenv("LAMINA_RUNS", raising=False)
    for package in ("sklearn", "PIL", "pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_runs_as_it_stands(kind: str, tmp_path: Path) -> None:
    made = lamina("new", f"my {kind}s", f"--{kind}")
    assert made.exit_code == 0, made.output
    assert f"lamina run 'my {kind}s/exp.toml'" in made.stdout
    result = lamina("run", f"my {kind}s/exp.toml", "rounds=3", "engine=loop")
    assert result.exit_code == 0, result.output
    run = Run.open(tmp_path / "runs" / f"my-{kind}s" / "001-fedavg")
    assert run.info["final"]["accuracy"] > {"image": 0.3, "text": 0.55, "tabular": 0.6}[kind]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "least"), [("image", 0.93), ("text", 0.9), ("tabular", 0.75)])
def test_in_all_its_rounds_it_learns_what_there_is_to_learn(kind: str, least: float, tmp_path: Path) -> None:
    lamina("new", kind, f"--{kind}")
    assert lamina("run", f"{kind}/exp.toml", "--quiet").exit_code == 0
    assert Run.open(tmp_path / "runs" / kind / "001-fedavg").info["final"]["accuracy"] > least


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_command_of_its_readme_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lamina("new", kind, f"--{kind}")
    monkeypatch.chdir(tmp_path / kind)
    monkeypatch.setenv("LAMINA_ROUNDS", "4")
    lines = re.findall(r"^    lamina ([^#\n]+)", Path("README.md").read_text(), re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["data", "inspect", "run", "run", "compare"]
    for line in lines:
        result = lamina(*line.split())
        assert result.exit_code == 0, (line, result.output)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_same_every_time_and_its_clients_differ(kind: str, tmp_path: Path) -> None:
    found = []
    for name in "ab":
        lamina("new", name, f"--{kind}")
        found.append(data_of(load(tmp_path / name / "exp.toml")))
    assert found[0].pool_sha256 == found[1].pool_sha256
    assert found[0].split_sha256 == found[1].split_sha256
    assert len(found[0]) == 6
    labels = found[0].label_table()
    assert labels is not None
    shares = labels / labels.sum(1, keepdim=True)
    assert float((shares.max(0).values - shares.min(0).values).max()) > 0.2


def test_the_digits_are_all_there_and_each_lies_at_one_site(tmp_path: Path) -> None:
    lamina("new", "i", "--image")
    parts = [np.load(file, allow_pickle=False) for file in sorted(tmp_path.glob("i/data/*/digits.npz"))]
    assert sum(len(part["y"]) for part in parts) == 1797
    assert {part["x"].dtype.name for part in parts} == {"uint8"}
    x, _ = data_of(load(tmp_path / "i" / "exp.toml")).examples(torch.arange(4))
    assert isinstance(x, torch.Tensor)
    assert x.shape == (4, 1, 8, 8)


@pytest.mark.slow  # to import
def test_the_digits_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    datasets = pytest.importorskip("sklearn.datasets")
    stored = np.load(Path(scaffold.__file__).parent / "image" / "digits.npz", allow_pickle=False)
    whole = datasets.load_digits()
    assert (stored["x"][:, 0] == whole.images * 15).all()
    assert (stored["y"] == whole.target).all()


@pytest.mark.parametrize("kind", KINDS)
def test_its_model_is_found_by_name_and_takes_its_data(kind: str, tmp_path: Path) -> None:
    lamina("new", kind, f"--{kind}")
    config = load(tmp_path / kind / "exp.toml")
    data = data_of(config)
    x, _ = data.examples(torch.arange(5))
    assert model_of(config)()(data.transform(x, None)).shape == (5, data.classes)


def test_nothing_is_overwritten_and_one_kind_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    refused = lamina("new", "full", "--text")
    assert refused.exit_code == 5
    assert "E402  full is not empty" in refused.stderr
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("")
    assert "E402" in lamina("new", "file", "--text").stderr
    for arguments in ((), ("--text", "--image")):
        refused = lamina("new", "x", *arguments)
        assert refused.exit_code == 2
        assert "expected one of --image, --text, --tabular" in refused.stderr
    assert not (tmp_path / "x").exists()


def test_the_files_are_listed_in_json(tmp_path: Path) -> None:
    (said,) = [json.loads(line) for line in lamina("new", "t", "--tabular", "--json").stdout.splitlines()]
    assert said["event"] == "written"
    assert sorted(said["files"]) == sorted(str(file.relative_to(tmp_path)) for file in tmp_path.glob("t/*"))


def test_every_file_that_a_readme_or_a_setting_names_is_there(tmp_path: Path) -> None:
    for kind in KINDS:
        lamina("new", kind, f"--{kind}")
        assert "@NAME@" not in "".join(file.read_text() for file in (tmp_path / kind).glob("*.*") if file.is_file())
        readme = (tmp_path / kind / "README.md").read_text()
        assert ("**synthetic**" in readme) == (kind != "image")
