"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from lamina import cli, machine, runs, terminal
from lamina.cli import looking
from lamina.config import build, load
from lamina.runs import Run
from lamina.terminal import Column, fields, sizes, summary, table

QUICK = ("engine=loop", "model.widths=[64, 12, 10]", "local.epochs=1")


def lamina(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def program(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", "lamina.cli", *arguments], stdout=pipe, stderr=pipe, text=True, **options
    )


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAMINA_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("COLUMNS", raising=False)
    return tmp_path / "runs"


def objects(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


# ---- run, resume


def test_run_prints_a_line_per_round_and_the_exact_bytes(root: Path) -> None:
    result = lamina("run", "quickstart", "rounds=4", "method=fedlama", *QUICK)
    assert result.exit_code == 0, result.output
    run = Run.open(root / "quickstart" / "001-fedlama")
    assert f"up {run.info['bytes_up']:,} · down {run.info['bytes_down']:,}" in result.stdout
    assert [line.split()[0] for line in result.stdout.splitlines() if " sync " in line or " wait " in line][1:] == list(
        "0123"
    )
    assert str(run.path) in result.stdout
    assert "\x1b" not in result.stdout


def test_a_note_at_the_start_comes_before_the_titles() -> None:
    said = lamina("run", "quickstart", "rounds=5", "method=fedlama", *QUICK).stdout
    assert 0 < said.index("! rounds=5 is no multiple") < said.index("round ") < said.index(" sync ")
    note = said.index("! rounds=5 is no multiple")
    assert "s/round" not in said[:note]
    assert "s/round" in said[note:]


def test_run_prints_every_nth_line_where_that_is_asked_for() -> None:
    result = lamina("run", "quickstart", "rounds=6", "run.log_every=3", *QUICK)
    assert sum(" sync " in line for line in result.stdout.splitlines()) == 1 + 2


def test_json_is_one_object_a_line_and_nothing_else(root: Path) -> None:
    result = lamina("run", "quickstart", "rounds=3", "--json", *QUICK)
    rows = objects(result)
    assert [row["event"] for row in rows] == ["begin", "round", "round", "round", "end"]
    assert rows[-1]["status"] == "done"
    assert rows[-1]["bytes_up"] == rows[-2]["total_up"]
    assert objects(lamina("resume", rows[0]["run"], "--json"))[-1]["status"] == "done"


def test_quiet_says_only_where_the_run_lies(root: Path) -> None:
    result = lamina("run", "quickstart", "rounds=1", "--quiet", *QUICK)
    assert result.stdout == f"{root / 'quickstart' / '001-fedavg'}\n"


def test_the_run_dir_option_moves_the_runs(tmp_path: Path) -> None:
    lamina("run", "quickstart", "rounds=1", "--run-dir", str(tmp_path / "there"), *QUICK)
    assert (tmp_path / "there" / "quickstart" / "001-fedavg" / "run.json").is_file()
    assert (tmp_path / "there" / "latest").resolve().name == "001-fedavg"


def test_a_run_folder_can_be_run_again_from_its_config(root: Path) -> None:
    lamina("run", "quickstart", "rounds=3", "method=fedlama", *QUICK)
    lamina("run", str(root / "quickstart" / "001-fedlama" / "config.toml"))
    first, second = Run.open(root / "quickstart" / "001-fedlama"), Run.open(root / "quickstart" / "002-fedlama")
    assert first.info["final_sha256"] == second.info["final_sha256"]


def test_resume_goes_on_for_more_rounds_and_refuses_other_keys(root: Path) -> None:
    lamina("run", "quickstart", "rounds=2", *QUICK)
    result = lamina("resume", "001", "rounds=4")
    assert result.exit_code == 0, result.output
    assert "4 of 4 rounds" in result.stdout
    assert "is done" in lamina("resume", "latest").stdout
    refused = lamina("resume", "001", "cohort=4")
    assert refused.exit_code == 5
    assert "E405  cohort cannot change in a run that has begun  [command line, argument 2]" in refused.stderr


def test_show_config_prints_and_stops(root: Path) -> None:
    result = lamina("run", "quickstart", "rounds=3", "--show-config", "changed")
    assert any(
        line.split() == ["rounds", "=", "3", "command", "line,", "argument", "2"] for line in result.stdout.splitlines()
    )
    assert "rounds = 3 " in lamina("run", "quickstart", "rounds=3", "--show-config", "all").stdout
    assert not root.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to a process")
def test_control_c_leaves_a_run_that_goes_on_and_no_process(root: Path) -> None:
    """The real program with worker processes, interrupted once, then twice, in the middle of a run."""
    keys = ("rounds=14", "workers=2", "method=fedlama")
    straight = lamina("run", "quickstart", "engine=loop", *keys, "--quiet").stdout.strip()
    for number, signals in ((2, 1), (3, 2)):
        with program("run", "quickstart", "engine=processes", *keys) as going:
            assert going.stdout is not None
            for line in going.stdout:
                if line.split()[:1] == ["4"]:
                    break
            children = _children(going.pid)
            for _ in range(signals):
                going.send_signal(signal.SIGINT)
            _, err = going.communicate(timeout=60)
        assert going.returncode == 130, err
        assert not [pid for pid in children if Path(f"/proc/{pid}/stat").exists()]
        stopped = Run.open(root / "quickstart" / f"{number:03d}-fedlama")
        assert stopped.info["status"] == "interrupted"
        resumed = lamina("resume", str(number))
        assert resumed.exit_code == 0, resumed.output
        assert Run.open(stopped.path).info["final_sha256"] == Run.open(straight).info["final_sha256"]


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("run", "quickstart", "method=fedlama", "method.phy=4"), 2, "did you mean 'method.phi'?"),
        (("run", "quickstart", "rounds=many"), 2, "E103  rounds: expected a whole number >= 1, got 'many'"),
        (("run", "quickstrat"), 2, "did you mean 'quickstart'?"),
        (("run", "quickstart", "cohort=11"), 2, "E112"),
        (("run", "quickstart", "local.lr=1e30", "local.momentum=0.9", "engine=loop"), 4, "E310"),
        (("compare", "nothing"), 5, "E403"),
        (("resume", "nothing"), 5, "E403"),
        (("list", "things"), 2, "expected one of methods"),
        (("list", "models", "--run-dir", "x"), 2, "--run-dir is of `lamina list runs`"),
        (("data", "fetch", "mnis"), 2, "did you mean 'mnist'?"),
        (("list", "--run-dir", "x"), 2, "--run-dir is of `lamina list runs`"),
        (("run",), 2, "Missing argument"),
        (("fly",), 2, "No such command"),
    ],
)
def test_errors_go_to_the_error_output_with_their_exit_code(arguments: tuple[str, ...], code: int, said: str) -> None:
    result = lamina(*arguments)
    assert result.exit_code == code
    assert said in result.stderr
    assert said not in result.stdout


def test_a_crash_is_one_line_that_names_crash_txt(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, row: Any) -> None:
        raise ZeroDivisionError("on\npurpose")

    monkeypatch.setattr(terminal.Terminal, "round", broken)
    result = lamina("run", "quickstart", "rounds=2", *QUICK)
    assert result.exit_code == 4
    (line,) = result.stderr.strip().splitlines()
    folder = root / "quickstart" / "001-fedavg"
    assert line.startswith("E300  ZeroDivisionError: on purpose")
    assert str(folder) in line
    assert "crash.txt" in line
    assert (folder / "crash.txt").is_file()


# ---- compare


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    made = []
    for method in ("fedavg", "fedlama"):
        path = tmp_path_factory.mktemp("pair") / f"00{len(made) + 1}-{method}"
        config = load("quickstart", [*QUICK, f"method={method}", "rounds=6"], {})
        made.append(runs.fit(build(config), 6, path, config=config, progress=False).path)
    return made[0], made[1]


def test_compare_prints_accuracy_bytes_and_the_factor(pair: tuple[Path, Path]) -> None:
    result = lamina("compare", *map(str, pair))
    assert result.exit_code == 0, result.output
    title, first, second, same = result.stdout.splitlines()
    assert title.split()[:4] == ["run", "method", "codec", "acc"]
    assert first.split()[1:3] == ["fedavg", "fp32"]
    assert "1.00x" in first
    assert "x" in second
    assert "same split yes" in same
    assert "same init yes" in same


def test_compare_in_other_forms_has_the_exact_numbers(pair: tuple[Path, Path]) -> None:
    info = Run.open(pair[1]).info
    rows = objects(lamina("compare", *map(str, pair), "--json"))
    assert rows[1]["bytes_up"] == info["bytes_up"]
    table_ = list(csv.DictReader(io.StringIO(lamina("compare", *map(str, pair), "--csv").stdout)))
    assert int(table_[1]["bytes_up"]) == info["bytes_up"]
    lines = lamina("compare", *map(str, pair), "--md").stdout.splitlines()
    assert {line.count("|") for line in lines[:4]} == {lines[0].count("|")}
    assert lines[1].startswith("| --- |")
    assert lines[-1].startswith("same split yes")


def test_compare_says_what_is_pooled_and_what_is_personal(pair: tuple[Path, Path], root: Path) -> None:
    for method in ("centralised", "localonly"):
        assert lamina("run", "quickstart", f"method={method}", "rounds=2", "--quiet", *QUICK).exit_code == 0
    result = lamina("compare", str(pair[0]), "001", "002")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "same split yes" in said
    assert "same examples yes" in said
    assert "001-centralised: pooled, one client with all examples" in said
    assert "002-localonly: acc is the mean of the clients' own models" in said


def test_compare_refuses_other_splits_unless_forced(pair: tuple[Path, Path], root: Path) -> None:
    lamina("run", "quickstart", "data.seed=1", "rounds=1", *QUICK)
    refused = lamina("compare", str(pair[0]), "001")
    assert refused.exit_code == 2
    assert "E109" in refused.stderr
    forced = lamina("compare", str(pair[0]), "001", "--force")
    assert forced.exit_code == 0
    assert "same split NO" in forced.stdout


def test_runs_are_named_by_number_and_range(root: Path) -> None:
    for _ in range(3):
        lamina("run", "quickstart", "rounds=1", "--quiet", *QUICK)
    assert len(objects(lamina("compare", "001-003", "--json"))) == 3
    assert objects(lamina("compare", "2", "--json"))[0]["run"].endswith("002-fedavg")
    assert len(objects(lamina("list", "runs", "--json"))) == 3


# ---- list, data, doctor


@pytest.mark.parametrize("what", looking.LISTS)
def test_lists_have_a_table_and_objects(what: str) -> None:
    assert lamina("list", what).exit_code == 0
    rows = objects(lamina("list", what, "--json"))
    assert all("name" in row or "run" in row for row in rows)
    assert rows or what == "runs"


def test_list_alone_says_what_can_be_listed_a_line_each() -> None:
    result = lamina("list")
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()[: len(looking.LISTS)]] == [*looking.LISTS]
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert [row["name"] for row in objects(lamina("list", "--json"))] == [*looking.LISTS]


def test_the_readme_names_every_list_and_installs_extras_from_the_checkout() -> None:
    said = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (also,) = re.findall(r"^lamina list methods +# also: (.+)$", said, re.MULTILINE)
    assert ["methods", *also.split(", ")] == [*looking.LISTS]
    assert "pip install 'lamina" not in said  # it is on no index yet
    assert said.index("lamina compare 001 002") < said.index("lamina resume ")  # which gives one of them more rounds


@pytest.mark.parametrize("what", ["models", "codecs", "rules", "partitions"])
def test_what_there_is_fits_the_terminal_with_what_it_is(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrapped, where a table dropped everything but the names; elsewhere no line is of 200 columns."""
    rows = objects(lamina("list", what, "--json"))
    assert max(map(len, lamina("list", what).stdout.splitlines())) < 200
    monkeypatch.setenv("COLUMNS", "80")
    said = lamina("list", what).stdout
    assert max(map(len, said.splitlines())) <= 80
    assert all(" ".join(row["about"].split()) in " ".join(said.split()) for row in rows)
    if what in ("codecs", "rules"):
        assert all(row["takes"] in " ".join(said.split()) for row in rows)


def test_methods_are_listed_with_what_they_take() -> None:
    rows = {row["name"]: row for row in objects(lamina("list", "methods", "--json"))}
    assert rows["fedlama"]["takes"] == "phi=2, warmup=0"
    assert rows["fedlama"]["about"] == "aggregates less often the layers that diverge little"
    assert "centralised" in rows


def test_every_method_says_what_it_does_in_words_of_one_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row["name"]: row["about"] for row in objects(lamina("list", "methods", "--json"))}
    assert len(set(rows.values())) == len(rows)
    for about in rows.values():
        assert re.fullmatch(r"[a-z]+s [^.:]{10,}", about), about  # "pulls local weights ...", no name, no full stop
    monkeypatch.setenv("COLUMNS", "80")
    lines = lamina("list", "methods").stdout.splitlines()
    assert all(any(about in line for line in lines) for about in rows.values())
    assert max(map(len, lines)) <= 80


def test_a_chain_is_explained_where_one_looks_for_it_and_works_as_it_is_said() -> None:
    said = " ".join(lamina("run", "--help").stdout.split())
    (line,) = (line for line in lamina("list", "methods").stdout.splitlines() if "several at once" in line)
    for text in (said, line):
        command = re.search(r"lamina run (quickstart \"method=[^`]*)", text)
        assert command is not None
        target, *keys = shlex.split(command[1])
        assert load(target, keys, {}).method_title == "ssfl+fedlama"


def test_the_bytes_of_the_table_say_that_they_are_totals() -> None:
    """Of two rounds that cost the same the second line has twice the bytes of the first."""
    lines = lamina("run", "quickstart", "rounds=2", *QUICK).stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if "s/round" in line)
    assert re.split(r"\s{2,}", lines[start].strip())[6:8] == ["total up", "total down"]
    first, second = (float(re.split(r"\s{2,}", line.strip())[6].split()[0]) for line in lines[start + 1 : start + 3])
    assert second == pytest.approx(2 * first, rel=0.01)


def test_a_store_that_refuses_leaves_no_run_folder_and_latest_where_it_was(root: Path) -> None:
    keys = (*QUICK, "rounds=1", "method=errorfeedback", "uplink=topk:0.1", f"store=disk:{root / 'clients'}")
    assert lamina("run", "quickstart", *keys).exit_code == 0
    refused = lamina("run", "quickstart", "name=other", *keys)
    assert refused.exit_code == 5
    assert "E402  store 'disk:" in refused.stderr
    assert sorted(path.name for path in root.iterdir()) == ["clients", "latest", "quickstart"]
    assert [path.name for path in (root / "quickstart").iterdir()] == ["001-errorfeedback"]
    assert (root / "latest").resolve().name == "001-errorfeedback"


def test_presets_are_listed_with_whole_sentences() -> None:
    rows = {row["name"]: row for row in objects(lamina("list", "presets", "--json"))}
    assert all(row["about"].endswith(".") for row in rows.values())
    assert rows["fashion-mnist-cnn"]["about"].endswith("about 200 local steps a round.")


def test_data_show_prints_who_holds_what() -> None:
    (split,) = objects(lamina("data", "show", "quickstart", "data.clients=30", "--json"))
    lines = lamina("data", "show", "quickstart", "data.clients=30").stdout.splitlines()
    assert split["split_sha256"] in lines[-1]
    assert lines[0].split() == ["client", "examples", "label", *map(str, range(10))]
    first, last, total = lines[1].split(), lines[21].split(), lines[22].split()
    assert list(map(int, first[1:])) == [split["clients"][0]["examples"], *split["clients"][0]["labels"]]
    assert last[0] == "29"
    assert set(lines[11].split()) == {"..."}
    assert total[:2] == ["all", "1,442"]
    assert len(lamina("data", "show", "quickstart", "data.clients=20").stdout.splitlines()) == 1 + 20 + 1 + 2


def test_a_split_that_does_not_fit_drops_labels_and_says_so() -> None:
    labels = {"labels": [1_000_000] * 100}
    clients = [{"client": "a", "examples": 100_000_000, **labels}]
    split = {"data": "x", "partition": "iid", "split_sha256": "5a1c", "classes": 100, "clients": clients}
    lines = terminal.split_lines(split, 80)
    assert all(len(line) <= 80 for line in lines)
    assert "1,000,000" in lines[1]
    assert re.search(r"labels \d to 99 do not fit", lines[3])


def test_the_table_of_a_split_has_the_names_of_the_labels_or_says_what_their_numbers_mean() -> None:
    names = ["none", "outer bearing", "drive belt"]
    clients = [{"client": "a", "examples": 6, "labels": [1, 2, 3]}]
    split = {"data": "x", "partition": "iid", "split_sha256": "5a1c", "classes": 3, "clients": clients}
    lines = terminal.split_lines({**split, "label_names": names}, 80)
    assert re.split(r"  +", lines[0].strip()) == ["client", "examples", *names]
    lines = terminal.split_lines({**split, "label_names": names}, 45)
    assert lines[0].split() == ["client", "examples", "label", "0", "1", "2"]
    assert lines[4].strip() == "labels  0 none · 1 outer bearing ·"
    assert lines[5].strip() == "2 drive belt"
    for old in (split, {**split, "label_names": None}):
        lines = terminal.split_lines(old, 45)
        assert lines[0].split() == ["client", "examples", "label", "0", "1", "2"]
        assert not any("labels" in line for line in lines)


def test_doctor_and_data_list() -> None:
    facts = objects(lamina("doctor", "--json"))[0]
    assert {"memory", "same bits"} <= facts.keys()
    assert " ms" in facts["runs"]
    assert "torch" in objects(lamina("doctor", "--json"))[0]
    assert "engine" in lamina("doctor").stdout
    assert {row["name"] for row in objects(lamina("data", "list", "--json"))} >= {"digits", "cifar10", "hapt"}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lamina with extras of packages that exist nowhere, but for one."""
    said = (
        "Provides-Extra: demo\nRequires-Dist: torch>=2\nRequires-Dist: lamina-there>=1; extra == 'demo'\n"
        "Provides-Extra: both\nRequires-Dist: lamina-there; extra == 'both'\n"
        'Requires-Dist: lamina-nowhere[x]<2,>=1 ; extra == "both"\n'
        "Provides-Extra: dev\nRequires-Dist: lamina-nowhere; extra == 'dev'\n"
    )
    folder = tmp_path / "packages"
    for name, more in (("lamina", said), ("lamina_there", "")):
        made = folder / f"{name}-0.1.dist-info"
        made.mkdir(parents=True)
        (made / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 0.1\n{more}")
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_doctor_says_which_extras_are_here_and_what_others_lack(packages: Path) -> None:
    (line,) = (line for line in lamina("doctor").stdout.splitlines() if line.startswith("  extras "))
    assert line.split(maxsplit=1)[1] == "here: demo · missing: both (lamina-nowhere) · pip install 'lamina[NAME]'"
    assert objects(lamina("doctor", "--json"))[0]["extras"] == {
        "here": ["demo"],
        "missing": [{"extra": "both", "packages": ["lamina-nowhere"]}],
    }


def test_doctor_asks_for_nothing_where_every_extra_is_here(packages: Path) -> None:
    nowhere = packages / "lamina_nowhere-1.dist-info"
    nowhere.mkdir()
    (nowhere / "METADATA").write_text("Metadata-Version: 2.4\nName: lamina-nowhere\nVersion: 1.0\n")
    assert "here: demo, both\n" in lamina("doctor").stdout


def test_extras_that_doctor_leaves_out_are_those_for_work_on_lamina() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {*project["optional-dependencies"]} - {*machine._DEVELOPERS} == {
        "demo", "flower", "plots", "parquet", "hf", "track", "secure",
    }  # fmt: skip


def test_a_data_set_that_comes_with_a_package_needs_no_fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    result = lamina("data", "fetch", "digits", "--verify")
    assert result.exit_code == 0, result.output
    assert result.stdout == "  digits  nothing to fetch: it comes with the Python package scikit-learn, which is here\n"
    (row,) = objects(lamina("data", "fetch", "digits", "--json"))
    assert row == {"event": "fetched", "data": "digits", "folder": None, "source": "Python package scikit-learn"}
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    missing = lamina("data", "fetch", "digits")
    assert missing.exit_code == 3
    assert "E219" in missing.stderr
    assert "pip install 'lamina[demo]'" in missing.stderr


@pytest.mark.parametrize("command", ["inspect", "run", "sweep", "chaos", "data show"])
def test_a_python_file_in_the_place_of_a_config_is_told_how_its_model_is_named(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("import torch\ndef net(cfg):\n    return torch.nn.Linear(64, 10)\n")
    refused = lamina(*command.split(), "mine.py")
    assert refused.exit_code == 2
    assert "E104  mine.py is a Python file, not TOML" in refused.stderr
    assert "a model in it is named mine.py:NAME: `lamina inspect mine.py:NAME`" in refused.stderr
    if command != "inspect":  # which takes this
        assert "`lamina run quickstart model=mine.py:net`" in lamina(*command.split(), "mine.py:net").stderr


def test_a_python_file_that_is_not_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "E105  no file and no preset is named 'mine.py'" in lamina("inspect", "mine.py").stderr


def test_the_command_line_itself_imports_nothing_heavy() -> None:
    """`lamina --help` must come at once: these import only the standard library, typer and each other."""
    light = set(sys.stdlib_module_names) | {"typer", "__future__"}
    folder = Path(cli.__file__).parent
    own = ("errors", "redaction", "entry", "settings")
    light |= {f"lamina.{name}" for name in own}
    for file in (*folder.glob("*.py"), *(folder.with_name(f"{name}.py") for name in own)):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            ours = [module for module in found if not {module, module.split(".")[0]} & light]
            assert all(module.startswith("lamina.cli") for module in ours), file


def test_help_and_version() -> None:
    assert lamina("--help").exit_code == 0
    assert lamina("--version").stdout.startswith("lamina ")


# ---- tables


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("terminal_", [True, False])
def test_a_run_on_the_screen_fits_and_cuts_nothing(width: int, terminal_: bool, tmp_path: Path) -> None:
    text = io.StringIO()
    out = Console(
        file=text, width=width, force_terminal=terminal_, no_color=True, highlight=False, legacy_windows=False
    )
    config = load("quickstart", [*QUICK, "rounds=4", "method=fedlama"], {})
    watcher = terminal.Terminal(out)
    runs.fit(build(config), 4, tmp_path / "a", config=config, progress=watcher)
    said = text.getvalue()
    assert "…" not in said
    if terminal_:
        drawn = re.split(r"\n|\x1b\[2K", said)  # a line is erased before a row takes its place
        tables = [
            line for line in (re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", x) for x in drawn) if line[:7].strip().isdigit()
        ]
        assert len(tables) == 4
        assert all(len(line) <= width for line in tables)
    else:
        assert "\x1b" not in said
        assert "s/round" in said
    assert "4 of 4 rounds" in said


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.console().no_color
    monkeypatch.delenv("NO_COLOR")
    assert terminal.console(no_color=True).no_color
    assert not terminal.console().no_color


def test_a_column_of_bytes_has_one_unit() -> None:
    """kB = 1000 B; four digits for the largest."""
    assert sizes([2_180_000_000, 64_201_336]) == ["2.180 GB", "0.064 GB"]
    assert sizes([999]) == ["999 B"]
    assert sizes([27_084_000]) == ["27.08 MB"]
    assert sizes([]) == []


def test_columns_of_rank_zero_stay() -> None:
    columns = [Column("a", ["1" * 30]), Column("b", ["2" * 30], 1), Column("c", ["3" * 30], 2)]
    assert len(table(columns, 70)[1].split()) == 2
    assert table(columns, 10)[1].split() == ["1" * 30]
    assert len(table(columns, None)[1].split()) == 3


def test_fields_wrap_between_words() -> None:
    lines = fields([("bytes", "up 664,201,336 · down 743,118,902")], 30)
    assert all(len(line) <= 30 for line in lines)
    assert "664,201,336" in lines[0]
    assert "743,118,902" in lines[1]


def test_a_summary_is_thinned_and_says_the_totals(pair: tuple[Path, Path]) -> None:
    text = summary(Run.open(pair[0]))
    assert "6 of 6 rounds" in text
    assert len(text.splitlines()) <= 15


def test_a_pipe_that_nobody_reads_is_no_crash() -> None:
    with program("list", "models") as going:
        assert going.stdout is not None
        assert going.stderr is not None
        going.stdout.close()
        assert "Traceback" not in going.stderr.read()


@pytest.mark.skipif(sys.platform == "win32", reason="other pipes")
@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_run_that_nobody_watches_any_more_goes_on_to_its_end(flags: tuple[str, ...], root: Path) -> None:
    with program("run", "quickstart", "rounds=12", *QUICK, *flags) as going:
        assert going.stdout is not None
        assert going.stderr is not None
        going.stdout.readline()
        going.stdout.close()
        said = going.stderr.read()
    assert (going.returncode, said) == (0, "")
    info = Run.open(root / "quickstart" / "001-fedavg").info
    assert (info["status"], info["rounds_done"]) == ("done", 12)


def test_a_damaged_run_does_not_hide_the_others(root: Path) -> None:
    for _ in range(3):
        lamina("run", "quickstart", "rounds=1", *QUICK)
    (root / "quickstart" / "001-fedavg" / "metrics.jsonl").unlink()
    (root / "quickstart" / "002-fedavg" / "run.json").write_text("[]")
    result = lamina("list", "runs")
    assert result.exit_code == 0, result.output
    assert [line.split()[1] for line in result.stdout.splitlines()[1:]] == ["damaged", "damaged", "done"]
    assert [row["status"] for row in objects(lamina("list", "runs", "--json"))] == ["damaged", "damaged", "done"]
    assert len(objects(lamina("compare", "003", "3", "--json"))) == 1


def test_large_losses_are_short() -> None:
    assert [terminal.share(x) for x in (None, 0.5, 99999.0, 1234567.0)] == ["-", "0.5000", "99999.0000", "1.235e+06"]


@pytest.mark.parametrize(
    ("saving", "shown"), [(0.0, "+0.0 %"), (1e-9, "+0.0 %"), (0.513, "-51.3 %"), (-0.02, "+2.0 %")]
)
def test_a_saving_is_shown_with_the_sign_of_what_was_sent(saving: float, shown: str) -> None:
    assert terminal.against(saving) == shown
