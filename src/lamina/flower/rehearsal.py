"""A whole deployment on one machine: SuperLink, SuperNodes and runs, in processes of their own.

Nothing waits for a constant time: a program is ready when it says so, and a run has ended when Flower says so.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lamina.engine import cores
from lamina.errors import RunError, expect, is_whole
from lamina.flower import keys as keyring
from lamina.flower.processes import Group, Groups, free_ports

_READY_S = 120.0
_ASK_S = 15.0  # seconds between two questions whether a run has ended, where it has not said so itself
_LINK = "rehearsal"  # the SuperLink's name in Flower's config


class Outcome(NamedTuple):
    """A run that has ended.

    Args:
        status: Flower's word, such as "finished:completed".
        folder: of the run; None when it did not come to that.
        exit_code: as of `lamina run`.
        error: "" for none.
        traffic: bytes that Flower counted, "inbound-bytes" and "outbound-bytes" at the SuperLink.
    """

    status: str
    folder: Path | None
    exit_code: int
    error: str
    traffic: dict[str, int]


class Rehearsal:
    """SuperLink and SuperNodes; a context manager that leaves no process behind.

    Args:
        folder: for logs, states and Flower's files; it is not removed.
        nodes: how many SuperNodes; the clients are dealt out to them in order.
        tls: with certificates and SuperNode keys, made anew; only nodes with a key of those are let in.
        host: where the SuperLink listens.
        node_config: of node i beside `partition-id`, `num-partitions` and `state-dir`.
        node_env: environment of node i beside this process's.
        node_words: what comes before the command of node i, such as `ip netns exec NAME`.

    Raises:
        ConfigError: E101 an impossible value; E118 a server that others could reach without TLS and keys.
        RunError: E316 a program that does not start.
    """

    def __init__(
        self, folder: Path, nodes: int = 2, *, tls: bool = False, host: str = "127.0.0.1",
        node_config: Callable[[int], Mapping[str, Any]] = lambda i: {},
        node_env: Callable[[int], Mapping[str, str]] = lambda i: {},
        node_words: Callable[[int], Sequence[str]] = lambda i: (),
    ):  # fmt: skip
        expect(is_whole(nodes, 1), f"nodes={nodes}: expected a whole number >= 1", where="nodes")
        expect_guarded(host, tls)
        self.folder = folder
        self.count = nodes
        self.nodes: list[Group] = []
        self._tls = tls
        self._host = host
        self._node_config, self._node_env, self._node_words = node_config, node_env, node_words
        self._groups = Groups(folder)
        self._ports = free_ports(nodes + 1)

    def __enter__(self) -> Rehearsal:
        try:
            self._begin()
        except BaseException:
            self._groups.__exit__()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        self._groups.__exit__(*exception)

    @property
    def _near(self) -> str:
        """How the SuperLink is reached from here."""
        anywhere = ipaddress.ip_address(self._host).is_unspecified if _is_address(self._host) else False
        return "127.0.0.1" if anywhere else self._host

    def _begin(self) -> None:
        keys = self.folder / "keys"
        if self._tls:
            hosts = dict.fromkeys([self._near, "127.0.0.1", "localhost"])
            keyring.write(keys, [*hosts], self.count)
        self._start_link()
        for i in range(self.count):
            if self._tls:
                self._groups.ask("flwr", ["supernode", "register", str(keys / f"node-{i + 1}.pub"), _LINK])
        self.nodes = [self.start_node(i) for i in range(self.count)]
        for node in self.nodes:
            self._groups.ready(node, r"SuperNode ID: \d+", _READY_S)

    def _start_link(self) -> None:
        address = f"{self._near}:{self._ports[0]}"
        secure, root = ["--insecure"], "insecure = true"
        if self._tls:
            ca, pem, key = (str(self.folder / "keys" / name) for name in ("ca.pem", "server.pem", "server.key"))
            secure = ["--ssl-ca-certfile", ca, "--ssl-certfile", pem, "--ssl-keyfile", key, "--enable-supernode-auth"]
            root = f"root-certificates = {json.dumps(ca)}"
        config = self._groups.home("flwr") / "config.toml"
        config.write_text(f"[superlink.{_LINK}]\naddress = {json.dumps(address)}\n{root}\n", encoding="utf-8")
        where = ["--host", self._host, "--port", str(self._ports[0]), "--disable-runtime-dependency-installation"]
        self.link = self._groups.start("superlink", "flower-superlink", [*secure, *where])
        self._groups.ready(self.link, "Uvicorn running", _READY_S)

    def start_node(self, i: int) -> Group:
        """The i-th SuperNode, for the first time or again."""
        config: dict[str, Any] = {
            "partition-id": i,
            "num-partitions": self.count,
            "state-dir": str(self.folder / "state" / f"node-{i + 1}"),
            "cores": max(1, cores() // self.count),  # they are all on this machine
            **self._node_config(i),
        }
        secure = ["--insecure"]
        if self._tls:
            keys = self.folder / "keys"
            secure = ["--root-certificates", str(keys / "ca.pem")]
            secure += ["--auth-supernode-private-key", str(keys / f"node-{i + 1}")]
        arguments = [
            *secure, "--superlink", f"{self._near}:{self._ports[0]}", "--port", str(self._ports[i + 1]),
            "--node-config", " ".join(f"{key}={json.dumps(value)}" for key, value in config.items() if value != ""),
        ]  # fmt: skip
        name = f"node-{i + 1}"
        return self._groups.start(name, "flower-supernode", arguments, self._node_env(i), self._node_words(i))

    def end_node(self, i: int, how: int = signal.SIGTERM) -> None:
        self._groups.end(self.nodes[i], how=how)

    def restart_node(self, i: int) -> None:
        """After `end_node`."""
        self.nodes[i] = self.start_node(i)

    def submit(self, app: Path, run_config: Mapping[str, Any]) -> Submitted:
        """A run of an app made by `project.write`."""
        report = self.folder / f"report-{time.monotonic_ns()}.jsonl"
        report.touch()
        keys = {"nodes": self.count, **run_config, "report": str(report)}
        said = " ".join(f"{key}={json.dumps(value)}" for key, value in keys.items())
        answer = self._groups.ask("flwr", ["run", str(app), _LINK, "--run-config", said])
        return Submitted(str(answer["run-id"]), report)

    def wait(self, run: Submitted, see: Callable[[dict[str, Any]], None] = lambda event: None) -> Outcome:
        """Until it has ended.

        Args:
            see: is told what the run says, as it says it.
        """
        told = _Told(see)
        asked = 0.0
        while True:
            told.take(run.news())
            if told.last or time.monotonic() - asked >= _ASK_S:
                asked = time.monotonic()
                if self.link.process.poll() is not None:
                    said = f"the SuperLink ended with {self.link.process.returncode}"
                    raise RunError(f"{said}:\n{self.link.tail()}", code="E316", where=str(self.link.log))
                found = self._groups.ask("flwr", ["list", _LINK, "--run-id", run.id])["runs"][0]
                if str(found["status"]).startswith("finished"):
                    told.take(run.news())
                    return _outcome(found, told)
            time.sleep(0.1)


class Submitted:
    """A run that Flower has taken."""

    def __init__(self, id: str, report: Path):
        self.id = id
        self._report = report
        self._read = 0  # bytes

    def news(self) -> list[dict[str, Any]]:
        """What it has said since the last time."""
        with self._report.open("rb") as file:
            file.seek(self._read)
            lines = [line for line in file if line.endswith(b"\n")]
        self._read += sum(map(len, lines))
        return [json.loads(line) for line in lines]


class _Told:
    """What a run has said until now, as far as it matters in the end."""

    def __init__(self, see: Callable[[dict[str, Any]], None]):
        self.folder: Path | None = None
        self.last: dict[str, Any] = {}
        self._see = see

    def take(self, events: Sequence[dict[str, Any]]) -> None:
        for event in events:
            self._see(event)
            if event["event"] == "begin":
                self.folder = Path(event["run"])
            elif event["event"] == "failed" or (event["event"] == "end" and not self.last):
                self.last = event


def _outcome(found: Mapping[str, Any], told: _Told) -> Outcome:
    status, last = str(found["status"]), told.last
    fine = status == "finished:completed" and last.get("exit_code") == 0
    code = 0 if fine else int(last.get("exit_code") or 4)
    error = "" if fine else str(last.get("text") or last.get("error") or found["status-details"])
    return Outcome(status, told.folder, code, error, dict(found.get("network-traffic", {})))


def expect_guarded(host: str, tls: bool) -> None:
    """Raises ConfigError (E118) for a server that others can reach and that does not say who it is, nor ask who they
    are."""
    local = host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
    expect(
        local or tls,
        f"host={host}: other machines could reach this server",
        code="E118",
        where="host",
        remedy="with --tls it has a certificate and takes only nodes with a key that is on its list; or 127.0.0.1",
    )


def _is_address(host: str) -> bool:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return True
    return False
