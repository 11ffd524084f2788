"""What is made and checked before anything is deployed: no Flower is needed for it."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import signal
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lamina.flower
from lamina import ConfigError, RunError, StorageError, cli, config
from lamina.flower import keys, project, rehearsal
from lamina.flower.processes import Groups, free_ports
from lamina.flower.rehearsal import Rehearsal, expect_guarded
from lamina.flower.settings import NodeKeys, RunKeys, back

SOURCE = Path(lamina.flower.__file__).parent
CONFIG = config.load("quickstart", ["rounds=3"], env={})


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, [*arguments])


# ---- who imports Flower


def test_only_this_folder_imports_flower_and_only_its_public_modules() -> None:
    for path in SOURCE.parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.split(".")[0] == "flwr":
                    assert path.parent == SOURCE, path
                    assert name in ("flwr.app", "flwr.serverapp", "flwr.clientapp"), path


def test_without_flower_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules]:
        if name.startswith(("flwr", "lamina.flower.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flwr", None)
    monkeypatch.delitem(vars(lamina.flower), "mod", raising=False)  # as an import leaves it
    for name in lamina.flower.__all__:
        with pytest.raises(ConfigError, match="flwr is not installed") as caught:
            getattr(lamina.flower, name)
        assert caught.value.remedy == "pip install 'lamina[flower]'"
    with pytest.raises(AttributeError):
        lamina.flower.nothing


def test_without_flowers_programs_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ConfigError, match="flower-superlink is not installed") as caught, Rehearsal(tmp_path):
        pass
    assert caught.value.remedy == "pip install 'lamina[flower]'"


def test_the_tested_versions_are_those_of_the_extra() -> None:
    text = (SOURCE.parents[2] / "pyproject.toml").read_text() if (SOURCE.parents[2] / "pyproject.toml").exists() else ""
    assert not text or f'"flwr{project.TESTED}"' in text


# ---- the app


def test_an_app_is_short_and_holds_the_whole_config(tmp_path: Path) -> None:
    files = project.write(CONFIG, tmp_path / "app")
    names = [file.name for file in files]
    assert names == ["pyproject.toml", "server_app.py", "client_app.py", "README.md", "lamina.toml"]
    assert sum(len(file.read_text().splitlines()) for file in files[:-1]) < 80
    assert config.load(files[-1], env={}).sha256 == CONFIG.sha256
    for file in files[1:3]:
        compile(file.read_text(), file.name, "exec")


def test_an_app_declares_every_key_of_a_run(tmp_path: Path) -> None:
    """Flower refuses keys that the app does not have."""
    import tomllib

    text = project.write(CONFIG, tmp_path / "app")[0].read_text()
    declared = tomllib.loads(text)["tool"]["flwr"]["app"]["config"]
    assert declared == RunKeys().table()
    assert RunKeys.of(declared) == RunKeys()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    before = sorted(tmp_path.iterdir())
    for folder in (tmp_path, tmp_path / "mine"):
        with pytest.raises(StorageError, match="is not empty") as caught:
            project.write(CONFIG, folder)
        assert caught.value.code == "E402"
    assert sorted(tmp_path.iterdir()) == before
    project.write(CONFIG, tmp_path / "new" / "app")


def test_files_of_entries_go_with_the_app(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("import lamina\ndef model():\n    return lamina.models.mlp((64, 8, 10))\n")
    loaded = config.load("quickstart", [f"model={own}:model"], env={})
    files = project.write(loaded, tmp_path / "app")
    assert files[-1].read_text() == own.read_text()
    again = config.load(tmp_path / "app" / "lamina.toml", env={})
    assert again.model.entry == f"{tmp_path}/app/own.py:model"
    other = tmp_path / "other" / "own.py"
    other.parent.mkdir()
    other.write_text("def loss(a, b):\n    return (a - b).sum()\n")
    with pytest.raises(ConfigError, match="the same name"):
        project.write(config.load("quickstart", [f"model={own}:model", f"loss={other}:loss"], env={}), tmp_path / "b")


def test_what_is_in_one_place_is_not_deployed(tmp_path: Path) -> None:
    central = config.load("quickstart", ["method=centralised"], env={})
    with pytest.raises(ConfigError, match="centralised"):
        project.write(central, tmp_path / "app")
    assert not (tmp_path / "app").exists()


def test_commands_write_and_refuse(tmp_path: Path) -> None:
    done = run("flower", "new", "quickstart", str(tmp_path / "app"), "rounds=7", "--json")
    assert done.exit_code == 0
    assert len(json.loads(done.stdout)["files"]) == 5
    assert config.load(tmp_path / "app" / "lamina.toml", env={}).rounds == 7
    assert run("flower", "new", "quickstart", str(tmp_path / "app")).exit_code == 5
    assert run("parity", "rounds=3").exit_code == 2
    assert run("flower", "rehearse", "quickstart", "--host", "0.0.0.0").exit_code == 2
    assert run("flower", "rehearse", "quickstart", "--nodes", "0").exit_code == 2


def test_what_cannot_be_sent_together_is_refused_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "Rehearsal", lambda *a, **k: pytest.fail("it was started"))
    for uplink in ("int8", "topk:0.1"):
        done = run("flower", "rehearse", "quickstart", f"uplink={uplink}", "--together")
        assert done.exit_code == 2
        assert "E118" in done.output
        assert "together=True with uplink=" in done.output


# ---- keys of runs and nodes


def test_keys_of_a_run_are_checked() -> None:
    assert RunKeys.of({"rounds": 3, "wait-s": 5, "theirs": 1}) == RunKeys(rounds=3, wait_s=5)
    for key, value in {"rounds": -1, "nodes": 1.5, "together": 1, "resume": 3, "wait-s": -1, "clients": True}.items():
        with pytest.raises(ConfigError, match=key) as caught:
            RunKeys.of({key: value})
        assert caught.value.code == "E103"


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6]),
        ({"clients": "0-2"}, [0, 1, 2]),
        ({"clients": "6, 0-1,0"}, [6, 0, 1]),
        ({"clients": 4}, [4]),
        ({"partition-id": 0, "num-partitions": 2}, [0, 1, 2]),
        ({"partition-id": 1, "num-partitions": 2}, [3, 4, 5, 6]),
    ],
)
def test_a_node_says_which_clients_it_has(table: dict[str, Any], expected: list[int]) -> None:
    assert NodeKeys.of(table).chosen(7) == expected


@pytest.mark.parametrize(
    "table",
    [
        {"clients": "7"}, {"clients": "2-1"}, {"clients": "a"}, {"clients": "1-9"},
        {"partition-id": 2, "num-partitions": 2}, {"partition-id": 0}, {"partition-id": -1, "num-partitions": 2},
        {"clients": "1", "partition-id": 0, "num-partitions": 2},
    ],
)  # fmt: skip
def test_clients_that_are_none_are_refused(table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        NodeKeys.of(table).chosen(7)


def test_all_partitions_together_are_all_clients() -> None:
    for count in (1, 5, 8):
        parts = [NodeKeys.of({"partition-id": i, "num-partitions": 3}).chosen(count) for i in range(3)]
        assert [client for part in parts for client in part] == list(range(count))


def test_nodes_on_one_machine_keep_their_states_apart() -> None:
    tables: list[dict[str, Any]] = [{"partition-id": i, "num-partitions": 2} for i in range(2)]
    folders = {NodeKeys.of(table).state_dir for table in tables}
    assert len(folders) == 2
    assert NodeKeys.of(tables[0]).state_dir in folders
    assert NodeKeys.of({"state-dir": "/srv/x"}).state_dir == Path("/srv/x")
    assert NodeKeys.of({**tables[0], "cores": 3}).state_dir == NodeKeys.of(tables[0]).state_dir


def test_a_node_may_have_a_part_of_its_machine() -> None:
    assert NodeKeys.of({"cores": 3}).cores == 3
    assert NodeKeys.of({}).cores is None
    for wrong in (0, -1, 1.5, "two", True):
        with pytest.raises(ConfigError, match=r"cores=.*expected a whole number >= 1") as caught:
            NodeKeys.of({"cores": wrong})
        assert caught.value.code == "E103"


def test_a_nodes_own_data_keys() -> None:
    table = {"data.path": "/srv/mine", "data.clients": 3, "data.check": False, "other": 1}
    assert NodeKeys.of(table).data == ('data.path="/srv/mine"', "data.clients=3", "data.check=false")


def test_nodes_remember_as_far_back_as_the_server_may_go() -> None:
    assert back(CONFIG) == 1
    assert back(config.load("quickstart", ["run.checkpoint_every=5"], env={})) == 5


# ---- who may reach a server


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.3.2.1"])
def test_the_loopback_needs_no_guard(host: str) -> None:
    expect_guarded(host, tls=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.3", "fl.example.org"])
def test_a_server_that_others_reach_needs_tls_and_keys(host: str, tmp_path: Path) -> None:
    expect_guarded(host, tls=True)
    with pytest.raises(ConfigError, match="other machines could reach") as caught:
        Rehearsal(tmp_path, host=host)
    assert caught.value.code == "E118"


# ---- certificates and keys


def test_keys_are_what_flower_takes(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="needs the extra lamina[flower]")
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    made = keys.write(tmp_path / "keys", ["fl.example.org", "10.0.0.7", "::1"], 2)
    names = [path.name for path in made]
    assert names == ["ca.pem", "server.pem", "server.key", "node-1", "node-1.pub", "node-2", "node-2.pub"]
    for path in made:
        secret = path.name in ("server.key", "node-1", "node-2")
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == (0 if secret else 0o044 & stat.S_IMODE(path.stat().st_mode))
        assert not secret or stat.S_IMODE(path.stat().st_mode) == 0o600
    blobs = {path.name: path.read_bytes() for path in made}
    ca, server = (x509.load_pem_x509_certificate(blobs[name]) for name in ("ca.pem", "server.pem"))
    server.verify_directly_issued_by(ca)
    alternatives = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert alternatives.get_values_for_type(x509.DNSName) == ["fl.example.org"]
    assert [*map(str, alternatives.get_values_for_type(x509.IPAddress))] == ["10.0.0.7", "::1"]
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert load_pem_private_key(blobs["server.key"], None).public_key() == server.public_key()
    for node in ("node-1", "node-2"):
        private = load_ssh_private_key(blobs[node], None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert blobs[f"{node}.pub"].startswith(b"ecdsa-sha2-nistp384 ")
    assert blobs["node-1"] != blobs["node-2"]


def test_keys_are_not_overwritten(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="needs the extra lamina[flower]")
    (tmp_path / "node-2.pub").write_text("mine")
    with pytest.raises(StorageError, match=r"node-2\.pub is there already"):
        keys.write(tmp_path, ["localhost"], 2)
    assert [path.name for path in tmp_path.iterdir()] == ["node-2.pub"]
    assert run("flower", "keys", str(tmp_path / "new"), "--nodes", "1", "--host", "fl.example.org").exit_code == 0
    assert run("flower", "keys", str(tmp_path / "new"), "--nodes", "1").exit_code == 5


@pytest.mark.parametrize(
    "bad", [{"hosts": []}, {"hosts": ["a:b c"]}, {"hosts": ["https://x"]}, {"nodes": -1}, {"days": 0}]
)
def test_impossible_keys_are_refused(bad: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        keys.write(tmp_path, **{"hosts": ["localhost"], "nodes": 1, **bad})


def test_without_cryptography_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigError, match="cryptography is not installed") as caught:
        keys.write(tmp_path, ["localhost"], 1)
    assert caught.value.remedy == "pip install 'lamina[flower]'"


# ---- programs


def _there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" if Path("/proc").exists() else True


ELSEWHERE = "setsid sleep 300 & echo child $!; wait"  # as the SuperLink starts its own
STUBBORN = "trap '' TERM; sleep 300 & echo child $!; wait; sleep 300"


@pytest.mark.skipif(os.name != "posix", reason="groups of processes are POSIX's")
@pytest.mark.parametrize("script", ["sleep 300 & echo child $!; wait", STUBBORN, ELSEWHERE])
def test_nothing_is_left_of_what_was_started(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.flower.processes._PATIENCE_S", 0.3)
    with Groups(tmp_path) as groups:
        group = groups.start("one", "sh", ["-c", script])
        child = int(re.findall(r"\d+", groups.ready(group, r"child \d+\n", 20))[0])
        assert _there(child)
        assert _there(group.process.pid)
    end = time.monotonic() + 5
    while _there(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert not _there(child)
    assert not _there(group.process.pid)


@pytest.mark.skipif(os.name != "posix", reason="a shell is needed")
def test_a_program_that_ends_is_named_with_its_last_words(tmp_path: Path) -> None:
    with Groups(tmp_path) as groups, pytest.raises(RunError, match=r"(?s)one ended with 3:.*no such port") as caught:
        groups.ready(groups.start("one", "sh", ["-c", "echo no such port; exit 3"]), "Uvicorn running", 20)
    assert caught.value.code == "E316"
    with Groups(tmp_path) as groups, pytest.raises(RunError, match="two was not ready after"):
        groups.ready(groups.start("two", "sh", ["-c", "sleep 300"]), "Uvicorn running", 0.2)
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


@pytest.mark.skipif(os.name != "posix", reason="a shell is needed")
def test_a_program_is_told_to_tell_nobody(tmp_path: Path) -> None:
    with Groups(tmp_path) as groups:
        group = groups.start("one", "sh", ["-c", "env; echo ready"])
        groups.ready(group, "ready", 20)
        said = dict(line.partition("=")[::2] for line in group.log.read_text().splitlines())
    assert said["FLWR_TELEMETRY_ENABLED"] == "0"
    assert said["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert said["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert said["FLWR_HOME"] == str(tmp_path / "flwr" / "one")
    assert "127.0.0.1" in said["NO_PROXY"]


def test_ports_are_different() -> None:
    assert len({*free_ports(8)}) == 8


def test_flower_is_not_needed_to_import_all_this() -> None:
    """Of what the command line needs before it starts anything."""
    for name in ("project", "keys", "processes", "rehearsal", "settings", "parity"):
        spec = importlib.util.find_spec(f"lamina.flower.{name}")
        assert spec is not None
        assert spec.origin is not None
        assert not re.search(r"^(from|import) flwr", Path(spec.origin).read_text(), re.MULTILINE), name
