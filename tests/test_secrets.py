"""Canaries: secrets that go in through the environment, key files and errors, and must come out nowhere."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from lamina import cli, config, redaction
from lamina.export import live, sink
from lamina.redaction import hidden, is_reference, redacted, remember
from lamina.remote.keys import opened
from lamina.runs import fit

CANARIES = {
    "LAMINA_KEY": "canary-lamina-3f0c7d51e8a94b26b1c7",
    "WANDB_API_KEY": "canary-wandb-91d2c4e07bfa4a13f0e8",
    "HF_TOKEN": "canary-token-5b7e2a90c1d84f36a95d",
    "MY_PASSWORD": "canary-pass-c84e1f6a27d90b53e7c2",
}
IN_FILE = "canary-file-0d9b6e3f51a7c842d6b0"
SMALL = ["rounds=1", "data.clients=4", "cohort=2", "model.widths=[64,8,10]", "local.epochs=1"]
ALL = [*CANARIES.values(), IN_FILE]

FAILING = """
import os
from lamina import FedAvg
from lamina.remote.keys import opened

class Telling(FedAvg):
    def plan(self, state, plan):
        opened("file:{file}")
        raise {error}("it says " + os.environ["LAMINA_KEY"] + " and {in_file}, of https://me:hunter22@example.org/x")

    def report(self, client, plan, work, said):
        opened("file:{file}")
        raise {error}("it says " + os.environ["LAMINA_KEY"] + " and {in_file}, of https://me:hunter22@example.org/x")
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a key, in a process that has read no secret before."""
    monkeypatch.setattr(redaction, "_known", set())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "key").write_text(f"{IN_FILE}\n")
    (tmp_path / "key").chmod(0o600)
    return tmp_path


def environment(home: Path) -> dict[str, str]:
    kept = {"PATH", "HOME", "LANG", "PYTHONPATH", "LAMINA_DATA"}
    own = {k: x for k, x in os.environ.items() if k in kept or k.startswith("LAMINA_DATA")}
    return {**own, **CANARIES, "LAMINA_RUNS": str(home / "runs"), "OMP_NUM_THREADS": "1"}


class Done(NamedTuple):
    args: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes


@pytest.fixture
def lamina(home: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command of the tool; what its worker processes print is printed too."""
    for name, value in environment(home).items():
        monkeypatch.setenv(name, value)

    def lamina(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["lamina", *words])
        capfdbinary.readouterr()
        result = CliRunner().invoke(cli.app, [*words])
        said = capfdbinary.readouterr()
        return Done(words, result.exit_code, result.stdout_bytes + said.out, result.stderr_bytes + said.err)

    return lamina


def leaks(blob: bytes) -> list[str]:
    """The canaries in it: as they are, in base64, in hexadecimal, backwards."""
    found = []
    for canary in ALL:
        forms = (canary, base64.b64encode(canary.encode()).decode()[:-4], canary.encode().hex(), canary[::-1])
        found += [canary for form in forms if form.encode() in blob]
    return found


def expect_clean(home: Path, *said: Done) -> None:
    for done in said:
        assert not leaks(done.stdout + done.stderr), done.args
        assert b"hunter22" not in done.stdout + done.stderr
    files = [path for path in home.rglob("*") if path.is_file() and path.name not in ("key", "own.py")]
    assert files
    for path in files:
        assert not leaks(path.read_bytes()), path
        assert b"hunter22" not in path.read_bytes(), path


def test_a_run_and_all_that_is_made_of_it_have_no_secret(home: Path, lamina: Any) -> None:
    reference = [f"sign.key=file:{home / 'key'}"]
    done = [
        lamina("run", "quickstart", *SMALL, *reference, "run.keep_clients_log=true", "engine=loop"),
        lamina("run", "quickstart", *SMALL, "sign.key=env:LAMINA_KEY", "--json", "engine=loop"),
        lamina("report", "001"),
        lamina("export", "001", "--to", "csv"),
    ]
    assert [one.returncode for one in done] == [0] * len(done), done
    expect_clean(home, *done)
    (first, *_) = sorted((home / "runs").glob("quickstart/001-*"))
    argv = json.loads((first / "env.json").read_text())["argv"]
    assert reference[0] in argv  # where a key is may be known


@pytest.mark.parametrize("engine", ["loop", "processes"])
@pytest.mark.parametrize("hook", ["plan", "report"])
def test_an_error_that_quotes_a_secret_is_recorded_without_it(engine: str, hook: str, home: Path, lamina: Any) -> None:
    text = FAILING.format(file=home / "key", in_file=IN_FILE, error="ValueError")
    other = {"plan": "report", "report": "plan"}[hook]
    (home / "own.py").write_text(text.replace(f"def {other}(", "def unused("))
    done = lamina("run", "quickstart", *SMALL, "method=own.py:Telling", f"engine={engine}", "workers=1")
    assert done.returncode != 0
    assert b"it says ***" in done.stderr
    expect_clean(home, done)
    (folder,) = (home / "runs").glob("quickstart/001-*")
    assert "it says" in (folder / "run.json").read_text() + done.stderr.decode()


def test_an_error_of_ours_that_quotes_a_secret_too(home: Path, lamina: Any) -> None:
    text = FAILING.format(file=home / "key", in_file=IN_FILE, error="RunError")
    (home / "own.py").write_text(text.replace("import FedAvg", "import FedAvg, RunError"))
    plain = lamina("run", "quickstart", *SMALL, "method=own.py:Telling", "engine=loop")
    objects = lamina("run", "quickstart", *SMALL, "method=own.py:Telling", "engine=loop", "--json")
    assert all(done.returncode for done in (plain, objects))
    assert b"it says ***" in plain.stderr
    expect_clean(home, plain, objects)


@pytest.mark.slow
@pytest.mark.parametrize("error", ["RunError", "ValueError"])
def test_jobs_of_a_sweep_print_no_secret(error: str, home: Path, lamina: Any) -> None:
    text = FAILING.format(file=home / "key", in_file=IN_FILE, error=error)
    (home / "own.py").write_text(text.replace("import FedAvg", "import FedAvg, RunError"))
    words = ["method=own.py:Telling", "engine=loop", "seed=1,2", "--jobs=2"]
    said = lamina("sweep", "quickstart", *SMALL, *words)
    objects = lamina("sweep", "quickstart", *SMALL, *words, "--json")
    assert said.returncode == objects.returncode == 4
    assert b"it says ***" in said.stderr or error == "ValueError"  # there it names the folder with the crash.txt
    expect_clean(home, said, objects)


def test_a_secret_in_place_of_a_reference_is_refused_before_anything_is_written(home: Path, lamina: Any) -> None:
    canary = CANARIES["LAMINA_KEY"]
    said = [lamina("run", "quickstart", f"sign.key={canary}"), lamina("run", "exp.toml")]
    (home / "exp.toml").write_text(f'preset = "quickstart"\n[sign]\nkey = "{canary}"\n')
    said.append(lamina("run", "exp.toml"))
    (home / "exp.toml").unlink()
    assert [done.returncode for done in said] == [2, 2, 2]
    assert not any(leaks(done.stdout + done.stderr) for done in said)
    assert not (home / "runs").exists()


def test_values_on_a_command_line_whose_names_say_that_they_are_secret_are_not_recorded(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = CANARIES["HF_TOKEN"]
    argv = [
        "lamina",
        "run",
        "x.toml",
        f"data.token={canary}",
        "--api-key",
        canary,
        f"data.url=https://me:{canary}@host",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    made = config.load("quickstart", [*SMALL, "engine=loop"], {})
    run = fit(config.build(made), 1, home / "run", config=made, progress=False)
    assert not leaks((run.path / "env.json").read_bytes())
    recorded = json.loads((run.path / "env.json").read_text())["argv"]
    assert recorded == ["lamina", "run", "x.toml", "data.token=***", "--api-key", "***", "data.url=https://***@host"]


# ---- what is hidden


def test_a_secret_that_was_read_is_found_in_every_form(home: Path) -> None:
    opened(f"file:{home / 'key'}")
    text = (home / "key").read_text().strip()
    for form in (text, text.encode().hex(), base64.b64encode(text.encode()).decode()):
        assert hidden(f"a {form} b", {}) in ("a *** b", "a ***= b", "a ***== b")


def test_a_variable_counts_as_secret_by_its_name_and_short_values_do_not() -> None:
    env = {"A_TOKEN": "abcdefghij", "LAMINA_KEY": "klmnopqrst", "KEYBOARD": "us-international", "X_SECRET": "on"}
    text = "abcdefghij klmnopqrst us-international on"
    assert hidden(text, env) == "*** *** us-international on"


def test_longer_secrets_go_first_and_short_ones_are_not_remembered() -> None:
    remember(b"tiny")
    assert hidden("tiny", {}) == "tiny"
    env = {"A_KEY": "0123456789", "B_KEY": "0123456789-and-more"}
    assert hidden("0123456789-and-more", env) == "***"


@pytest.mark.parametrize(
    ("value", "fine"),
    [("env:LAMINA_KEY", True), ("file:/etc/key", True), ("'file:/a b'", True), ("env:a b", False), ("abc", False),
     ("file:", False), ("env:", False), ("xenv:A", False), ("env:A\nB", False)],
)  # fmt: skip
def test_references_are_told_from_secrets(value: str, fine: bool) -> None:
    assert is_reference(value) == fine
    assert redacted([f"sign.key={value}"]) == [f"sign.key={value if fine else '***'}"]


# ---- a deployment


@pytest.mark.flower
def test_a_signed_rehearsal_shows_its_key_to_nobody(home: Path) -> None:
    """Of every process that it starts the command line is read, as long as it lasts; then all that is written."""
    pytest.importorskip("flwr")
    words = [*SMALL, "rounds=2", "engine=loop", "sign.key=env:LAMINA_KEY"]
    seen: set[bytes] = set()
    with (home / "out").open("wb") as out:
        started = subprocess.Popen(
            [sys.executable, "-m", "lamina.cli", "flower", "rehearse", "quickstart", *words],
            cwd=home,
            env={**environment(home), "TMPDIR": str(home)},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        end = time.monotonic() + 300
        while started.poll() is None and time.monotonic() < end:
            seen |= {*_command_lines(str(home).encode())}
            time.sleep(0.05)
        started.kill()
    assert started.returncode == 0, (home / "out").read_text()
    assert len(seen) > 5
    assert not any(leaks(line) for line in seen)
    expect_clean(home)
    (folder,) = (home / "runs").glob("quickstart/001-*")
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
    assert (folder / "letters.json").exists()
    assert (folder / "events.jsonl").read_bytes() == b""


def _command_lines(mark: bytes) -> Iterator[bytes]:
    """Of all processes whose environment names this folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes():
                yield (process / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue


QUOTED = 'pa"ss\\word\n1'


@pytest.mark.parametrize("said", [repr, json.dumps])
def test_a_secret_is_found_as_python_and_json_quote_it(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """'pa"ss\\\\word\\n1' has none of its own characters in a row once it is quoted."""
    monkeypatch.setenv("MY_TOKEN", QUOTED)
    found = redaction.hidden_in({"why": said(QUOTED), "in": [QUOTED], QUOTED: {"n": 12345678}})
    shown = said(QUOTED).replace(said(QUOTED)[1:-1], "***")
    assert shown[1:-1] == "***"
    assert found == {"why": shown, "in": ["***"], "***": {"n": 12345678}}
    assert hidden(json.dumps({"why": QUOTED})) == '{"why": "***"}'


def test_what_is_json_stays_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number, or what stands between two texts, may be the same as somebody's password."""
    monkeypatch.setenv("MY_PASSWORD", "12345678")
    monkeypatch.setenv("MY_TOKEN", '", "why": "')
    row = {"code": "E310", "why": "x", "bytes": 12345678}
    assert redaction.hidden_in(row) == row


def test_what_a_tracker_fails_with_is_recorded_without_secrets(
    home: Path, lamina: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> Any:
        raise ValueError(f"401 for {QUOTED}, {QUOTED!r}")

    monkeypatch.setenv("MY_TOKEN", QUOTED)
    monkeypatch.setitem(sink.TRACKERS, "tensorboard", "json")  # a package that is here
    monkeypatch.setattr(live, "opened", refuse)
    done = lamina("run", "quickstart", *SMALL, "run.track=[tensorboard]", "engine=loop")
    assert done.returncode == 0
    (folder,) = (home / "runs").glob("quickstart/001-*")
    (event,) = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert event["message"] == "ValueError: 401 for ***, '***'"
    assert b"401 for ***" in done.stdout
    assert b"word" not in done.stdout + done.stderr
