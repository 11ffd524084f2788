"""Hostile names and links: whatever somebody has called a run, a client, a file of an archive or a link in a folder,
nothing is written outside the run's folder and the cache.

A sandbox with a run root, a cache and a victim in it is compared, file by file, before and after; with `strace`, where
that is, every file that the process opens to write, makes or removes.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lamina import ClientData, FedAvg, Federation, LaminaError, LocalSGD, StorageError, cli, config, models, runs, sweep
from lamina.data import fetch
from lamina.data.sources import collect
from lamina.export import export
from lamina.remote import DiskShelf, Letter, Node
from lamina.report import write
from lamina.runs import Run
from lamina.settings import presets
from lamina.terminal import Quiet

HOSTILE = (
    "..", ".", "../x", "../../x", "/tmp/lamina-x", "a/b", "a\\b", "..\\x", "~", "~/x", "$HOME/x", "`id`", "a\nb",
    "a\x00b", "\u2025/x", "\uff0e\uff0e\uff0fx", "con", ".hidden", "-rf", "--out=x", "x" * 300, "", " ", "a;b",
    "%2e%2e%2fx", "nul",
)  # fmt: skip
SMALL = ["rounds=1", "data.clients=4", "cohort=2", "model.widths=[64,8,10]", "local.epochs=1", "engine=loop"]


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with what must stay as it is beside it."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "precious").write_text("precious")
    (tmp_path / "work" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("LAMINA_RUNS", str(tmp_path / "work" / "runs"))
    return tmp_path


def outside(sandbox: Path) -> dict[str, bytes | None]:
    """All that is in the sandbox but not where runs may be written: path -> content; None for a folder."""
    kept = sandbox / "work" / "runs"
    found = [path for path in sandbox.rglob("*") if not path.is_relative_to(kept)]
    return {str(path): path.read_bytes() if path.is_file() else None for path in found}


def tiny(**options: Any) -> Federation:
    x, y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1] * 3)
    data = options.pop("data", None) or ClientData.from_clients({"a": (x, y), "b": (x, y)}, test=(x, y))
    return Federation(models.mlp((3, 2)), data, local=LocalSGD(lr=0.1), engine="loop", **options)


def refused(act: Callable[[], Any]) -> bool:
    """Whether it is, with an error of ours."""
    try:
        act()
    except (LaminaError, SystemExit):
        return True
    return False


# ---- names


@pytest.mark.parametrize("name", HOSTILE)
def test_a_run_is_written_below_its_root_whatever_its_experiment_is_called(name: str, sandbox: Path) -> None:
    before = outside(sandbox)
    data = replace(tiny().data, name=name or "x", check=False)
    made: list[Run] = []
    if not refused(lambda: made.append(tiny(data=data).fit(1, progress=False))):
        assert made[0].path.resolve().is_relative_to(sandbox / "work" / "runs")
        assert len(made[0].path.relative_to(runs.runs_root()).parts) == 2
    assert outside(sandbox) == before


@pytest.mark.parametrize("name", HOSTILE)
def test_a_config_has_no_name_that_is_a_path(name: str, sandbox: Path) -> None:
    before = outside(sandbox)
    text = f'name = "{name.encode("unicode_escape").decode() if name.isascii() else "x/y"}"\npreset = "quickstart"\n'
    Path("runs/exp.toml").write_text(text)
    CliRunner().invoke(cli.app, ["run", "runs/exp.toml", *SMALL])
    assert outside(sandbox) == before
    for folder in (sandbox / "work" / "runs").glob("**/run.json"):
        assert folder.resolve().is_relative_to(sandbox / "work" / "runs")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_method_names_no_path(name: str, sandbox: Path) -> None:
    before = outside(sandbox)
    method = type(name.replace("\x00", "0") or "x", (FedAvg,), {})()
    folder = runs.new_folder("x", runs.method_title(method))
    assert folder.parent == runs.runs_root() / "x"
    assert re.fullmatch(r"001-[A-Za-z0-9._+-]{0,100}", folder.name)
    assert outside(sandbox) == before


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_clients_are_no_files(store: str, sandbox: Path) -> None:
    """With a store on disk, a log of them, a report and exports."""
    from lamina import ErrorFeedback, wire

    before = outside(sandbox)
    draw = torch.Generator().manual_seed(0)
    one = (torch.randn(2, 3, generator=draw), torch.tensor([0, 1]))
    data = ClientData.from_clients({name: one for name in HOSTILE if name}, test=one)
    where = "memory" if store == "memory" else f"disk:{sandbox / 'work' / 'runs' / 'store'}"
    fed = tiny(data=data, method=ErrorFeedback(), uplink=wire.TopK(0.5), store=where)
    run = fed.fit(1, "runs/x", keep_clients_log=True, progress=False)
    write([run], run.path / "report.html")
    for to in ("csv", "latex", "md", "safetensors"):
        export(run.path, to)
    assert outside(sandbox) == before


@pytest.mark.parametrize("name", HOSTILE)
def test_a_run_is_looked_for_and_not_made(name: str, sandbox: Path) -> None:
    before = outside(sandbox)
    for words in (
        ["report", name],
        ["export", name, "--to", "csv"],
        ["resume", name],
        ["compare", name],
        ["verify", name],
    ):
        assert CliRunner().invoke(cli.app, words).exit_code != 0
    assert outside(sandbox) == before
    assert not list((sandbox / "work" / "runs").iterdir())


@pytest.mark.parametrize("name", HOSTILE)
def test_an_entry_names_a_python_file_or_nothing(name: str, sandbox: Path) -> None:
    before = outside(sandbox)
    for entry in (f"{name}.py:x", f"victim/precious.py:{name}", f"../victim/precious:{name}"):
        assert refused(lambda entry=entry: config.load("quickstart", [f"method.entry={entry}"], {}))
    assert outside(sandbox) == before


@pytest.mark.parametrize(
    "name", ["..", "../x", "/tmp/x", "", ".", "a/b", "a\\b", "-x", "x" * 101, "a\nb", "a\x00", "é"]
)
def test_a_shelf_has_no_name_that_is_a_path(name: str, sandbox: Path) -> None:
    assert refused(lambda: DiskShelf(tiny(), "shelf", name))
    assert not Path("shelf").exists()


def test_a_plan_names_no_file_at_a_node(sandbox: Path) -> None:
    """Its fingerprint is in the name of a file there: one that is no fingerprint is refused."""
    fed = tiny()
    node = Node(tiny(data=fed.data.among(fed.data.names)), DiskShelf(fed, "runs/shelf", "exp"))
    before = outside(sandbox)
    for said in ("../../x", "/tmp/x", "..", "a/b"):
        letter = Letter("round", 0, 0, said, (), {}, False, b"LMF\1\0\0\0\0").packed()
        assert [client for client, _ in node.answer([(0, letter)])] == [0]
    assert outside(sandbox) == before
    assert not Path("runs/shelf").exists()


# ---- links


LINKED = ("metrics.jsonl", "events.jsonl", ".lock", "run.json", "config.toml", "crash.txt", "checkpoints", "export",
          ".run.json.tmp", ".crash.txt.tmp", "model.safetensors", "clients.jsonl", "report.html",
          "checkpoints/round-000009", "checkpoints/.round-000001.tmp", "export/csv")  # fmt: skip


@pytest.mark.parametrize("name", LINKED)
def test_nothing_is_written_through_a_link_in_a_folder(name: str, sandbox: Path) -> None:
    """In a new one that is not empty, and in one of a run that was stopped: to a file, and to a folder."""
    for target in (sandbox / "victim" / "precious", sandbox / "victim"):
        folder = sandbox / "work" / "runs" / f"new-{target.name}"
        (folder / name).parent.mkdir(parents=True)
        (folder / name).symlink_to(target)
        before = outside(sandbox)
        refused(lambda folder=folder: tiny().fit(1, folder, progress=False))
        assert outside(sandbox) == before
        run = sandbox / "work" / "runs" / f"old-{target.name}"
        tiny().fit(1, run, progress=False, checkpoint_every=1)
        if (run / name).is_dir():
            shutil.rmtree(run / name)
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(target)
        for act in (
            partial(runs.resume, run, 2, fed=tiny(), progress=False),
            partial(export, run, "csv"),
            partial(_reported, run),
        ):
            refused(act)
        assert outside(sandbox) == before


def _reported(run: Path) -> None:
    write([Run.open(run)], run / "report.html")


def test_a_link_is_named_and_what_to_do(sandbox: Path) -> None:
    folder = sandbox / "work" / "runs" / "x"
    tiny().fit(1, folder, progress=False, checkpoint_every=1)
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").symlink_to(sandbox / "victim" / "precious")
    shutil.copy(sandbox / "victim" / "precious", folder / "copy")
    with pytest.raises(StorageError, match=r"metrics\.jsonl is a link") as caught:
        runs.resume(folder, 2, fed=tiny(), progress=False)
    assert caught.value.code == "E405"


def test_a_report_replaces_a_link_and_does_not_follow_it(sandbox: Path) -> None:
    run = tiny().fit(1, "runs/x", progress=False)
    before = outside(sandbox)
    out = Path("runs/out.html")
    out.symlink_to(sandbox / "victim" / "precious")
    Path("runs/.out.html.tmp").symlink_to(sandbox / "victim" / "precious")
    write([run], out)
    assert not out.is_symlink()
    assert outside(sandbox) == before


def test_the_link_to_the_latest_run_replaces_no_folder(sandbox: Path) -> None:
    (sandbox / "work" / "runs" / "latest").mkdir()
    (sandbox / "work" / "runs" / "latest" / "mine").write_text("mine")
    tiny().fit(1, progress=False)
    assert (sandbox / "work" / "runs" / "latest" / "mine").read_text() == "mine"


def test_a_hostile_folder_is_looked_at_and_not_run(sandbox: Path) -> None:
    """Its config names code: `compare`, `report`, `export` and `list` do not load it."""
    made = config.load("quickstart", SMALL, {})
    run = runs.fit(config.build(made), 1, "runs/x/001-fedavg", config=made, progress=False)
    mark = sandbox / "mark"
    (run.path / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nthing = 1\n")
    text = (run.path / "config.toml").read_text()
    changed = re.sub(r'(?m)^\[method\]\nname = "fedavg"', f'[method]\nentry = "{run.path / "evil.py"}:thing"', text)
    changed = re.sub(r'(?m)^\[model\]\nname = "mlp"', f'[model]\nentry = "{run.path / "evil.py"}:thing"', changed)
    changed = re.sub(r'(?m)^\[data\]\nname = "digits"', f'[data]\nentry = "{run.path / "evil.py"}:thing"', changed)
    assert changed.count("entry = ") == 3
    (run.path / "config.toml").write_text(changed)
    for words in (
        ["compare", "001"], ["report", "001"], ["export", "001", "--to", "csv"], ["list", "runs"],
    ):  # fmt: skip
        CliRunner().invoke(cli.app, words)
        assert not mark.exists(), words


# ---- archives and the cache


def test_members_of_archives_are_read_and_never_unpacked(sandbox: Path) -> None:
    """Absolute and relative paths, links and devices."""
    folder = sandbox / "work" / "runs" / "raw"
    folder.mkdir()
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        for name in ("../../victim/evil.bin", "/tmp/lamina-evil.bin", "..\\..\\evil.bin"):
            archive.writestr(name, "x")
    with tarfile.open(folder / "b.tar.gz", "w:gz") as tar:
        for name, kind, link in (
            ("../../victim/evil2.bin", tarfile.REGTYPE, ""), ("link.bin", tarfile.SYMTYPE, "/etc/passwd"),
            ("hard.bin", tarfile.LNKTYPE, "/etc/passwd"), ("dev.bin", tarfile.CHRTYPE, ""),
            ("pipe.bin", tarfile.FIFOTYPE, ""),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, link, 1 if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(b"y") if kind == tarfile.REGTYPE else None)
    before, here = outside(sandbox), sorted(folder.iterdir())
    found = collect(folder, ("*.bin",))
    assert {*found.values()} == {b"x", b"y"}
    assert all("/" not in name for name in found)
    assert not any(b"root:" in content for content in found.values())
    assert outside(sandbox) == before
    assert sorted(folder.iterdir()) == here


def test_the_cache_follows_no_link(sandbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone has put links where its lock is: the set is not fetched, and the victim is not touched."""
    spec = fetch.Spec("evil", {}, ("x",), lambda files: {}, (), 0, "by hand")
    cache = sandbox / "work" / "runs" / "cache"
    cache.mkdir()
    (cache / ".evil.lock").symlink_to(sandbox / "victim" / "made")
    monkeypatch.setenv("LAMINA_DATA", str(cache))
    before = outside(sandbox)
    assert refused(lambda: fetch.fetch(spec))
    assert outside(sandbox) == before


def test_every_preset_and_a_sweep_stay_in_their_folders(sandbox: Path) -> None:
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in presets())
    before = outside(sandbox)
    planned = sweep.points("quickstart", [*SMALL, "seed=1,2"], None)
    sweep.sweep(planned, None, 1, Quiet(), lambda event: None)
    assert outside(sandbox) == before


# ---- the system's own account


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_strace_sees_no_write_outside(sandbox: Path) -> None:
    """A run, a resume, a report and exports; allowed are the run root and what Python itself keeps (bytecode, /dev)."""
    trace = sandbox / "trace"
    root = sandbox / "work" / "runs"
    script = "\n".join([
        "from lamina.cli import app",
        f"keys = {SMALL!r}",
        "for words in (['run', 'quickstart', *keys, 'run.keep_clients_log=true'], ['resume', '001', 'rounds=2'],",
        "              ['report', '001'], ['export', '001', '--to', 'csv'], ['compare', '001']):",
        "    try: app(words)",
        "    except SystemExit as done: assert not done.code, words",
    ])  # fmt: skip
    calls = "trace=openat,open,creat,mkdir,mkdirat,unlink,unlinkat,rename,renameat,renameat2,symlink,link,truncate"
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    words = ["strace", "-f", "-qq", "-y", "-s", "4096", "-e", calls, "-o", str(trace), sys.executable, "-c", script]
    done = subprocess.run(words, cwd=sandbox / "work", env=env, capture_output=True, timeout=600)
    if done.returncode and b"ptrace" in done.stderr:
        pytest.skip("strace is not allowed here")
    assert done.returncode == 0, done.stderr[-2000:]
    changed = set()
    for line in trace.read_text(errors="replace").splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)\) += (-?\d+)", line)
        if call is None or call[3].startswith("-"):
            continue
        if call[1] in ("openat", "open") and not re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", call[2]):
            continue
        named = re.findall(r'(?:<([^>]*)>, )?"((?:[^"\\]|\\.)*)"', call[2])  # a folder that is open, and a name in it
        changed |= {os.path.normpath(os.path.join(place or sandbox / "work", path)) for place, path in named}
    odd = {p for p in changed if not Path(p).is_relative_to(root) and not p.startswith(("/dev/", "/proc/"))}
    odd = {p for p in odd if not re.match(r"\d{3}-|quickstart", Path(p).name)}  # the text of the link `latest`
    temporary = {p for p in odd if p.startswith(("/tmp/", "/var/tmp/")) and not Path(p).is_relative_to(sandbox)}
    assert odd <= temporary, odd - temporary
    assert not any(Path(p).exists() for p in temporary if "torch" not in p and "matplotlib" not in p), temporary
    assert len([p for p in changed if Path(p).is_relative_to(root)]) > 20
