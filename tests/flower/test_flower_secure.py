"""Secure sums through Flower: in one process with a grid of our own, and with Flower's own programs."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs the extra lamina[flower]")
pytest.importorskip("cryptography", reason="needs the extra lamina[flower]")
pytest.importorskip("sklearn", reason="needs the extra lamina[demo]")

from flwr.app import Message
from grid import FakeGrid, served, simulated

from lamina import ConfigError, config
from lamina.flower import client_app, parity, post, project
from lamina.flower.records import unpacked
from lamina.flower.settings import NodeKeys
from lamina.remote import Answer, Letter, unbundled

SETTINGS = [
    "rounds=3", "data.clients=5", "cohort=4", "model.widths=[64,8,10]", "local.epochs=1", "engine=loop",
    "secure.bits=32", "run.keep_clients_log=true",
]  # fmt: skip
CONFIGS = {"fedavg": ["method=fedavg"], "ssfl, fedlama": ["method=[ssfl,fedlama]", "method.1.phi=2"]}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post, "POLL_S", 0.001)


def app(folder: Path, *keys: str) -> Path:
    return project.write(config.load("quickstart", [*SETTINGS, *keys], env={}), folder / "app")[-1]


def joined(path: Path, folder: Path) -> FakeGrid:
    grid = FakeGrid()
    for i in range(2):
        own: dict[str, Any] = {"partition-id": i, "num-partitions": 2, "secret-dir": str(folder / f"secret-{i}")}
        grid.join(100 - i, client_app(path), folder / f"state-{i}", **own)
    return grid


@pytest.mark.parametrize("name", CONFIGS)
def test_model_and_ledger_are_those_of_the_simulator(name: str, tmp_path: Path) -> None:
    path = app(tmp_path, *CONFIGS[name])
    local = simulated(path)
    grid = joined(path, tmp_path)
    said: list[Answer] = []

    def hear(node: int, message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train":
            said.extend(Answer.unpacked(blob) for _, blob in unbundled(unpacked(reply.content)[0]))
        return reply

    grid.happens = hear
    remote = served(path, grid, tmp_path)
    assert remote.info["final_sha256"] == local.info["final_sha256"]
    for log in ("bytes.jsonl", "clients.jsonl"):
        assert (remote.path / log).read_text() == (local.path / log).read_text()
    sums = 3 + ("ssfl" in name)
    trains = [node for node, kind in grid.pushed if kind == "train"]
    assert len(trains) <= 2 * 4 * sums  # four messages a node and sum
    assert {x.step for x in said} == {"keys", "shares", "masked", "unmask"}
    assert not any(x.why or x.members for x in said)
    for i in range(2):
        assert stat.S_IMODE((tmp_path / f"secret-{i}").stat().st_mode) & 0o077 == 0
        files = [*(tmp_path / f"secret-{i}").rglob("sum-*")]
        assert files
        assert {path.stat().st_size for path in files} == {16}  # a round and a number: no secret is left
    assert not [*tmp_path.glob("state-*/**/sum-*")]


def test_a_plan_travels_once_to_a_node_whatever_each_client_is_told_beside_it(tmp_path: Path) -> None:
    path = app(tmp_path, "cohort=all", "rounds=1")
    grid = joined(path, tmp_path)
    sent: list[tuple[str, int, int]] = []

    def hear(node: int, message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train":
            blob, _ = unpacked(message.content)
            letters = [Letter.unpacked(part) for _, part in unbundled(blob)]
            step = letters[0].step
            assert step is not None
            sent.append((step.name, len(blob), sum(len(x.packed()) for x in letters)))
        return reply

    grid.happens = hear
    served(path, grid, tmp_path)
    whole = {name: (packed, apart) for name, packed, apart in sent if name == "masked"}
    packed, apart = whole["masked"]
    assert packed < 0.6 * apart  # two or three clients at each node
    assert [name for name, _, _ in sent] == ["keys"] * 2 + ["shares"] * 2 + ["masked"] * 2 + ["unmask"] * 2


def test_a_node_that_is_lost_within_a_round_is_out_of_the_sum(tmp_path: Path) -> None:
    """Node 100 has two of five clients; its third message of round 1 is lost. threshold=0.6 asks for three."""
    path = app(tmp_path, "cohort=all", "rounds=2", "faults.reply_deadline_s=1")
    grid = joined(path, tmp_path)
    messages = [0]

    def happens(node: int, message: Message, reply: Message) -> Message | None:
        messages[0] += node == 100 and message.metadata.message_type == "train"
        return None if node == 100 and messages[0] == 7 else reply

    grid.happens = happens
    remote = served(path, grid, tmp_path)
    rows = [json.loads(line) for line in (remote.path / "events.jsonl").read_text().splitlines()]
    lost = [(row["round"], row["code"]) for row in rows if row["event"] == "refused"]
    assert lost == [(1, "E311")] * 2
    assert remote.info["rounds_done"] == 2


def test_what_is_masked_is_not_sent_together(tmp_path: Path) -> None:
    path = app(tmp_path)
    grid = joined(path, tmp_path)
    with pytest.raises(ConfigError, match="each client masks its own message"):
        served(path, grid, tmp_path, together=True)
    assert grid.pushed == []


def test_a_node_says_where_its_secrets_are() -> None:
    assert NodeKeys.of({}).secret_dir is None
    assert NodeKeys.of({"secret-dir": "/run/lamina"}).secret_dir == Path("/run/lamina")


@pytest.mark.flower
def test_with_flowers_own_programs_it_is_the_simulators_sum_too(tmp_path: Path) -> None:
    """A process for every message: what a client has to remember within a round is in its node's folder for secrets."""
    made = config.load("quickstart", [*SETTINGS, "rounds=2"], env={})
    (row,) = parity.compare([made], 2, 2, print, folder=tmp_path)
    assert row.differences == ()
    assert row.same
    assert row.carried["messages"] == 2 * 2 * 4
