"""The tutorials and examples, run as they stand: from a clean folder, with what their pages say and nothing else."""

from __future__ import annotations

import difflib
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from lamina import cli
from lamina.scaffold import synthetic

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "tutorials" / "own-model-and-data.md"
EXAMPLES = ROOT / "examples"
AT_MOST = 12  # lines added to a plain script


class Block(NamedTuple):
    language: str
    file: str  # its name, "" for what is typed or printed
    text: str


def blocks(page: Path) -> Iterator[Block]:
    form = r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$'
    for language, file, text in re.findall(form, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        yield Block(language, file, text)


def typed(page: Path) -> list[list[str]]:
    return [shlex.split(line) for block in blocks(page) if block.language == "sh" for line in block.text.splitlines()]


def there(words: list[str]) -> bool:
    """Whether this program has the command, so that a page can be written before it."""
    return words[0] != "lamina" or words[1] in get_command(cli.app).commands  # type: ignore[attr-defined]


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("LAMINA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LAMINA_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lay_out(page: Path, folder: Path) -> None:
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")


# ---- the tutorial


def test_the_tutorial_runs_in_few_rounds(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of the page with 2 rounds for 40, but the sweep: nine runs more, left to the long form."""
    monkeypatch.setenv("LAMINA_ROUNDS", "2")
    monkeypatch.setenv("LAMINA_ENGINE", "loop")
    lay_out(PAGE, clean)
    said = {}
    for words in typed(PAGE):
        if words[0] == "python":
            subprocess.run([sys.executable, *words[1:]], check=True)
        elif there(words) and words[1] != "sweep":
            result = CliRunner().invoke(cli.app, words[1:])
            assert result.exit_code == 0, (words, result.output)
            said[" ".join(words[1:])] = result.stdout
    assert (clean / "machines.csv").read_text().startswith(printed("factory,vibration"))
    assert [line.split()[0] for line in said["data show exp.toml"].splitlines()[1:9]] == [
        f"factory-{i}" for i in range(8)
    ]
    assert said["data show exp.toml"].split()[:5] == ["client", "examples", "bearing", "belt", "none"]
    compared = said["compare 001 002 003"]
    assert [name for name in ("fedavg", "fedlama", "ssfl") if f" {name} " in compared] == ["fedavg", "fedlama", "ssfl"]
    assert "same split yes" in " ".join(compared.split())
    if there(["lamina", "report"]):
        assert b"<html" in (clean / "report.html").read_bytes()


def printed(beginning: str) -> str:
    (text,) = [block.text for block in blocks(PAGE) if block.language == "text" and block.text.startswith(beginning)]
    return text


def test_the_error_on_the_page_is_the_one_that_comes(clean: Path) -> None:
    lay_out(PAGE, clean)
    subprocess.run([sys.executable, "make_data.py"], check=True)
    rows = (clean / "machines.csv").read_text().splitlines()
    cells = rows[2].split(",")
    rows[2] = ",".join([*cells[:2], "", *cells[3:]])
    (clean / "machines.csv").write_text("\n".join(rows))
    result = CliRunner().invoke(cli.app, ["data", "show", "exp.toml"])
    assert result.exit_code == 3
    assert result.stderr.replace(f"{clean.resolve()}{os.sep}", "") == printed("E223")


@pytest.mark.slow
def test_the_tutorial_runs_as_a_reader_types_it(clean: Path) -> None:
    """In a process for each line, all rounds and seeds; and its sentences on the methods hold."""
    lay_out(PAGE, clean)
    for words in typed(PAGE):
        program = [sys.executable, *([] if words[0] == "python" else ["-m", "lamina.cli"]), *words[1:]]
        if there(words):
            done = subprocess.run(program, capture_output=True, text=True, check=False)
            assert done.returncode == 0, (words, done.stdout, done.stderr)
    from lamina.runs import Run

    runs = [Run.open(next((clean / "runs" / "machines").glob(f"00{i}-*"))) for i in (1, 2, 3)]
    fedavg, fedlama, ssfl = (run.info["bytes_up"] for run in runs)
    assert fedlama < fedavg
    assert ssfl < fedavg
    assert all(run.info["final"]["accuracy"] > 0.8 for run in runs), [run.info["final"]["accuracy"] for run in runs]


# ---- a plain script and what is added to it


@pytest.mark.parametrize("name", ["mine.py", "federated.py"])
def test_a_plain_script_takes_at_most_twelve_more_lines(name: str) -> None:
    plain, more = ((EXAMPLES / file).read_text().splitlines() for file in ("plain.py", name))
    found = list(difflib.ndiff(plain, more))
    added = [line for line in found if line.startswith("+ ")]
    assert 0 < len(added) <= AT_MOST, "\n".join(added)
    if name == "mine.py":  # but for its title nothing is taken away
        assert len([line for line in found if line.startswith("- ")]) == 1


def test_the_plain_script_and_its_federated_versions_run(
    clean: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ran(name: str) -> str:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    assert float(ran("plain.py").split()[1]) > 0.8
    assert float(ran("mine.py").split()[1]) > 0.8
    assert "done   20 of 20 rounds" in ran("federated.py")
    monkeypatch.setenv("LAMINA_ROUNDS", "3")
    result = CliRunner().invoke(cli.app, ["run", str(EXAMPLES / "mine.toml"), "method=fedlama", "engine=loop"])
    assert result.exit_code == 0, result.output
    assert (clean / "runs" / "mine" / "001-fedlama" / "run.json").is_file()


def test_the_table_of_the_examples_is_the_made_up_one() -> None:
    assert (EXAMPLES / "clinics.csv").read_text() == synthetic.clinics(600)
