"""Server and nodes through Flower's messages, in one process: Flower's own programs are in test_flower_processes."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs the extra lamina[flower]")
pytest.importorskip("sklearn")

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from grid import FakeGrid, Node, served, simulated

import lamina
from lamina import ConfigError, RunError, StorageError, WireError, config, engine, preflight
from lamina.flower import client, client_app, mod, post, project
from lamina.flower import server as serving
from lamina.flower.records import STYPE, framing, packed, unpacked
from lamina.flower.settings import NodeKeys
from lamina.remote import Roll, bundled
from lamina.runs import Run
from lamina.wire import frame

EXPERIMENT = [
    "rounds=3", "data.clients=5", "cohort=4", "model.widths=[64,8,10]", "local.epochs=1", "engine=loop",
]  # fmt: skip


def app(folder: Path, *keys: str) -> Path:
    """A written app's config."""
    return project.write(config.load("quickstart", [*EXPERIMENT, *keys], env={}), folder / "app")[-1]


def joined(path: Path, folder: Path, nodes: int = 2) -> FakeGrid:
    grid = FakeGrid()
    for i in range(nodes):
        grid.join(100 - i, client_app(path), folder / f"state-{i}", **{"partition-id": i, "num-partitions": nodes})
    return grid


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post, "POLL_S", 0.001)


CONFIGS = {
    "fedavg": ["method=fedavg"],
    "errorfeedback": ["method=errorfeedback", "uplink=topk:0.05"],
    "ssfl, fedlama": ["method=[ssfl,fedlama]", "method.1.phi=2", "uplink=int8", "downlink=lossless"],
}


def layers(folder: Path) -> list[dict[str, object]]:
    """Without what clients keep back, which stays with them."""
    lines = (folder / "layers.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "residual_norm"} for line in lines]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:rounds=3 is no multiple")
def test_model_and_ledger_are_those_of_the_simulator(name: str, tmp_path: Path) -> None:
    path = app(tmp_path, *CONFIGS[name], "run.keep_clients_log=true")
    local = simulated(path)
    grid = joined(path, tmp_path)
    remote = served(path, grid, tmp_path)
    assert remote.info["final_sha256"] == local.info["final_sha256"]
    for log in ("bytes.jsonl", "clients.jsonl"):
        assert (remote.path / log).read_text() == (local.path / log).read_text()
    assert layers(remote.path) == layers(local.path)
    trains = [node for node, kind in grid.pushed if kind == "train"]
    assert len(trains) <= 2 * (3 + ("ssfl" in name))  # a message a node and round, and one for the probe
    assert grid.nodes[100].context.state["lamina"]["answered"] == trains.count(100)
    rows = [json.loads(line) for line in (remote.path / "flower.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert sum(row["messages"] for row in rows) == len(trains)
    assert all(0 < row["framing_down"] < 400 * row["messages"] for row in rows)
    assert all(0 < row["framing_up"] < 200 * row["messages"] for row in rows)


def test_a_node_sends_its_clients_together(tmp_path: Path) -> None:
    path = app(tmp_path, "run.keep_clients_log=true", "cohort=all")
    local = simulated(path)
    remote = served(path, joined(path, tmp_path), tmp_path, together=True)
    for name, x in remote.state.params.items():
        torch.testing.assert_close(x, local.state.params[name], rtol=0, atol=1e-5)
    assert remote.info["bytes_up"] < local.info["bytes_up"] / 2


def test_what_cannot_be_sent_together_is_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    path = app(tmp_path, "uplink=int8")
    grid = joined(path, tmp_path)
    with pytest.raises(ConfigError, match=r"together=True with uplink=.*int8"):
        served(path, grid, tmp_path, together=True)
    assert grid.pushed == []


@pytest.mark.parametrize("together", [False, True])
def test_nodes_without_a_client_are_let_be(together: bool, tmp_path: Path) -> None:
    """Seven nodes have five clients: of every seven parts two are empty."""
    path = app(tmp_path)
    local = simulated(path)
    grid = joined(path, tmp_path, 7)
    remote = served(path, grid, tmp_path, nodes=7, together=together)
    assert remote.info["final_sha256"] == local.info["final_sha256"]
    assert len({node for node, kind in grid.pushed if kind == "query"}) == 7
    assert len({node for node, kind in grid.pushed if kind == "train"}) == 5
    assert not events(tmp_path)


def test_a_node_has_no_more_processes_than_clients_to_train_and_cores_to_do_it_on() -> None:
    def few(clients: int, *keys: str, cores: int | None = None) -> tuple[str, int | None]:
        made = client._at_most(config.load("quickstart", keys, env={}), clients, cores)
        return made.engine, made.workers

    assert few(1, "engine=processes", "workers=4") == ("loop", 1)
    assert few(3, "engine=processes", "workers=4") == ("processes", 3)
    assert few(1, "engine=auto", "workers=4") == ("auto", 1)
    assert few(1, "engine=stacked", "workers=4") == ("stacked", 1)
    assert few(3, "engine=processes", "workers=4", cores=2) == ("processes", 2)
    assert few(3, "engine=processes", "workers=4", cores=1) == ("loop", 1)
    assert few(3, "engine=auto", cores=1) == ("auto", 1)


@pytest.mark.parametrize("cores", [1, 2])
def test_an_engine_has_no_more_cores_than_its_node(cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few clients it has: one alone would be given all cores."""
    path, seen = app(tmp_path, "engine=auto"), []

    def noting(*given: Any, **named: Any) -> Any:
        seen.append(engine.cores())
        raise RuntimeError("far enough")

    monkeypatch.setattr(client, "Node", noting)
    names = config.data_of(config.load(path, env={})).names
    about = {"experiment": "e", "clients": len(names), "numbers": [0], "names": [names[0]]}
    with pytest.raises(RuntimeError, match="far enough"):
        client._answered(path, NodeKeys("", tmp_path, (), None, cores), b"", about)
    assert seen == [min(cores, engine.cores())]


@pytest.mark.parametrize("damage", ["", "[]", '{"channels_last": 1, "smallest": 1, "settings": ""}', "{"])
def test_a_model_is_tried_by_the_first_message_of_an_experiment_alone(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again where the note of it cannot be read, the settings are others, or a batch is smaller."""
    tries: list[bool] = []
    fails = preflight._fails

    def counted(*given: Any, **named: Any) -> Any:
        tries.append(True)
        return fails(*given, **named)

    loaded = config.load(app(tmp_path), env={})
    note = tmp_path / "tried.json"
    plain = config.build(loaded)
    sizes = plain.data.sizes.tolist()

    def tried(with_: config.Config, *clients: int) -> int:
        before = len(tries)
        data = config.data_of(with_)
        here = data.subset(clients or range(len(data)))
        alone = replace(here, test=None, client_tests=None, check=False).among(data.names)
        made, now = client._built(with_, alone, note)
        note.write_text(json.dumps(now._asdict()))
        assert made.channels_last == plain.channels_last
        return len(tries) - before

    monkeypatch.setattr(preflight, "_fails", counted)
    last = [size % loaded.local.batch_size for size in sizes]
    least, other = last.index(min(last)), last.index(max(last))
    assert tried(loaded, other) > 0
    assert tried(loaded, least) > 0
    assert [tried(loaded), tried(loaded, other), tried(loaded, least)] == [0, 0, 0]
    uniform = loaded.model_copy(update={"weights": "uniform"})
    assert tried(uniform) > 0
    assert tried(uniform) == 0
    note.write_text(damage)
    assert tried(uniform) > 0
    assert tried(uniform) == 0


def test_bytes_that_are_no_letter_leave_nothing_on_a_nodes_disk(tmp_path: Path) -> None:
    path = app(tmp_path)
    names = config.data_of(config.load(path, env={})).names
    about = {"experiment": "other", "clients": len(names), "numbers": [0], "names": [names[0]]}
    with pytest.raises(WireError):
        client._answered(path, NodeKeys("", tmp_path / "state", ()), b"garbage", about)
    client._answered(path, NodeKeys("", tmp_path / "state", ()), bundled([(0, b"garbage")]), about)
    assert not (tmp_path / "state").exists()


def test_a_letter_that_is_too_long_is_refused_by_its_length(tmp_path: Path) -> None:
    path = app(tmp_path, "rounds=1")
    grid = joined(path, tmp_path)
    push = grid.push_messages

    def longer(messages: Iterable[Message]) -> list[str | None]:
        going = [*messages]
        for message in going:
            if message.metadata.message_type == "train" and message.metadata.dst_node_id == 100:
                blob, about = unpacked(message.content)
                message.content = packed(blob + bytes(1 << 20), about)
        return push(going)

    grid.push_messages = longer  # type: ignore[method-assign]
    served(path, grid, tmp_path)
    found = events(tmp_path)
    assert found
    assert all("E340" in why or "bytes, expected at most" in why for *_, why in found), found


def test_a_message_is_one_array_and_a_few_words(tmp_path: Path) -> None:
    path = app(tmp_path)
    grid = joined(path, tmp_path)
    seen: list[Message] = []
    grid.happens = lambda node, message, reply: seen.extend([message, reply]) or reply
    served(path, grid, tmp_path, rounds=1)
    for message in seen:
        (record,) = message.content.array_records.values()
        (array,) = record.values()
        assert array.stype == STYPE
        assert len(array.data) == array.shape[0]
        assert len(message.content.config_records) <= 1
        blob, _ = unpacked(message.content)
        assert framing(message.content) == sum(r.count_bytes() for r in message.content.values()) - len(blob) + sum(
            map(len, message.content)
        )


def events(folder: Path) -> list[tuple[int, str, str, str]]:
    (log,) = (folder / "runs").glob("*/*/events.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [(row["round"], row["client"], row["code"], row["why"]) for row in rows if row["event"] == "refused"]


class Weather:
    """Does something to what one node sends in one of its training messages."""

    def __init__(self, grid: FakeGrid, node: int, at: int, change: Callable[[Message], Message | None]):
        self._node, self._at, self._change = node, at, change
        self._count = -1
        grid.happens = self

    def __call__(self, node: int, message: Message, reply: Message) -> Message | None:
        if node != self._node or message.metadata.message_type != "train":
            return reply
        self._count += 1
        return self._change(reply) if self._count == self._at else reply


def said(change: Callable[[bytes], bytes]) -> Callable[[Message], Message]:
    def changed(reply: Message) -> Message:
        reply.content = packed(change(unpacked(reply.content)[0]))
        return reply

    return changed


def failed(reply: Message) -> Message:
    reply.__dict__["_content"] = None
    reply.error = Error(2, "<class 'MemoryError'>:<''>")
    return reply


def nothing_of_ours(reply: Message) -> Message:
    reply.content = RecordDict({"arrays": ArrayRecord()})
    return reply


LOST: dict[str, tuple[Callable[[Message], Message | None], str]] = {
    "an error of its app": (failed, "its node says: <class 'MemoryError'>"),
    "too long": (said(lambda blob: blob + bytes(1 << 20)), "is refused: E340 "),
    "cut off": (said(lambda blob: blob[:-1]), "is refused: E340 "),
    "another message": (nothing_of_ours, "is refused: E345 a message with ['arrays']"),
    "nothing at all": (lambda reply: None, "no answer within 0.3 s"),
}


@pytest.mark.parametrize("what", LOST)
def test_what_does_not_come_right_is_lost_and_the_run_goes_on(what: str, tmp_path: Path) -> None:
    change, why = LOST[what]
    path = app(tmp_path, "method=errorfeedback", "uplink=topk:0.05", "cohort=all", "faults.reply_deadline_s=0.3")
    grid = joined(path, tmp_path)
    Weather(grid, 100, 1, change)
    served(path, grid, tmp_path)
    lost = events(tmp_path)
    assert [(t, name, code) for t, name, code, _ in lost] == [(1, "0", "E311"), (1, "1", "E311")]
    assert all(why in said for *_, said in lost)


def test_what_is_too_long_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    unpack = frame.unpack
    monkeypatch.setattr(frame, "unpack", lambda blob, **how: looked.append(len(blob)) or unpack(blob, **how))
    path = app(tmp_path)
    grid = joined(path, tmp_path)
    Weather(grid, 100, 1, said(lambda blob: bytes(1 << 20)))
    served(path, grid, tmp_path)
    assert "1048576 bytes" in events(tmp_path)[0][3]
    assert max(looked) < 1 << 20


def test_a_node_that_comes_back_under_another_name_goes_on_from_its_disk(tmp_path: Path) -> None:
    """Flower names a SuperNode without a key anew. Node 100 answers round 0, and as 777 all others."""
    path = app(tmp_path, "method=errorfeedback", "uplink=topk:0.05", "cohort=all")
    local = simulated(path)
    grid = joined(path, tmp_path)

    def renamed(reply: Message) -> Message:
        grid.nodes[777] = grid.nodes.pop(100)
        grid.nodes[777].context.state = RecordDict()  # what Flower kept for it is gone
        return reply

    Weather(grid, 100, 0, renamed)
    remote = served(path, grid, tmp_path)
    assert not events(tmp_path)
    assert remote.info["final_sha256"] == local.info["final_sha256"]
    assert [kind for node, kind in grid.pushed if node == 777] == ["query", "train", "train"]


def test_a_node_that_is_not_connected_is_not_waited_for(tmp_path: Path) -> None:
    path = app(tmp_path, "cohort=all")
    grid = joined(path, tmp_path)
    gone: list[Any] = []
    Weather(grid, 100, 0, lambda reply: gone.append(grid.nodes.pop(100)) or reply)
    served(path, grid, tmp_path)
    assert {(t, why) for t, _, _, why in events(tmp_path)} == {(t, "its node is not connected") for t in (1, 2)}


def test_an_answer_to_an_earlier_message_is_not_taken_for_one_to_this(tmp_path: Path) -> None:
    """The message of round 0 to node 100 fails at last, when that of round 1 is under way."""
    path = app(tmp_path, "cohort=all", "faults.reply_deadline_s=0.3")
    grid = joined(path, tmp_path)
    late: list[Message] = []
    pull = grid.pull_messages
    Weather(grid, 100, 0, lambda reply: late.append(failed(reply)))  # type: ignore[func-returns-value]

    def pulled(ids: Iterable[str]) -> list[Message]:
        found = pull(ids)
        return found + [late.pop() for _ in range(len(late)) if found]

    grid.pull_messages = pulled  # type: ignore[method-assign]
    served(path, grid, tmp_path)
    assert {t for t, *_ in events(tmp_path)} == {0}


# ---- who is there


def test_a_node_with_another_lamina_is_refused_with_both_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = app(tmp_path)
    monkeypatch.setattr(Roll, "of", lambda data, of=Roll.of: of(data)._replace(lamina="9.9"))
    with pytest.raises(ConfigError, match=r"a node runs lamina 9\.9, the server \d") as caught:
        served(path, joined(path, tmp_path), tmp_path)
    assert caught.value.code == "E118"
    assert not (tmp_path / "runs").exists()


def test_too_few_clients_are_waited_for_and_then_named(tmp_path: Path) -> None:
    path = app(tmp_path)
    with pytest.raises(ConfigError, match=r"2 of 2 nodes, 5 of 6 clients are there after 0\.1 s"):
        served(path, joined(path, tmp_path), tmp_path, clients=6, nodes=2, wait_s=0.1)


def test_a_node_that_cannot_say_what_it_has_fails_the_run(tmp_path: Path) -> None:
    path = app(tmp_path)
    grid = joined(path, tmp_path)
    grid.nodes[99].context.node_config["clients"] = "3-4"
    with pytest.raises(RunError, match=r"node 99 cannot say which clients it has: .*expected one of them") as caught:
        served(path, grid, tmp_path)
    assert caught.value.code == "E315"


def test_a_node_has_data_of_its_own(tmp_path: Path) -> None:
    """The path is the node's; the server has none, so nothing is tested."""
    own = tmp_path / "own.py"
    own.write_text(
        "import lamina, torch\n"
        "def data(names: str = 'server'):\n"
        "    make = lambda i: (torch.ones(6 + i, 64) * i, torch.arange(6 + i) % 10)\n"
        "    return lamina.ClientData.from_clients({name: make(i) for i, name in enumerate(names.split('+'))})\n"
    )
    keys = [
        "rounds=2",
        "cohort=all",
        "model.name=mlp",
        "model.widths=[64,8,10]",
        "local.epochs=1",
        "engine=loop",
        f"data={own}:data",
    ]
    made = tmp_path / "made"
    path = project.write(config.load("quickstart", keys, env={}), made)[4]
    assert path.name == "lamina.toml"
    assert (made / "own.py").read_text() == own.read_text()
    assert str(tmp_path) not in path.read_text()
    grid = FakeGrid()
    for i, names in enumerate(("ann+bob", "cyd")):
        grid.join(i, client_app(path), tmp_path / f"state-{i}", **{"data.names": names})
    with pytest.warns(UserWarning, match="no example here"):
        run = served(path, grid, tmp_path, evaluate=False, clients=3)
    assert run.info["clients"] == 3
    assert run.final is None
    split = json.loads((run.path / "split.json").read_text())
    assert [c["client"] for c in split["clients"]] == ["ann", "bob", "cyd"]


# ---- servers that stop


def test_a_run_is_resumed_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    path = app(tmp_path, "method=[scaffold,fedlama]", "method.1.phi=2", "rounds=4", "local.momentum=0")
    local = simulated(path)
    grid = joined(path, tmp_path)

    def killed(reply: Message) -> Message:
        raise OSError("the machine is gone")

    Weather(grid, 100, 2, killed)
    with pytest.raises(OSError, match="gone"):
        served(path, grid, tmp_path)
    grid = joined(path, tmp_path)
    (folder,) = (tmp_path / "runs").glob("*/0*")
    run = served(path, grid, tmp_path, resume=str(folder.relative_to(tmp_path / "runs")))
    assert run.path == folder
    assert run.info["final_sha256"] == local.info["final_sha256"]
    assert (folder / "bytes.jsonl").read_text() == (local.path / "bytes.jsonl").read_text()
    assert not events(tmp_path)
    rows = [json.loads(line)["round"] for line in (folder / "flower.jsonl").read_text().splitlines()]
    assert rows == [0, 1, 2, 3]


def test_a_run_is_not_resumed_with_other_settings(tmp_path: Path) -> None:
    path = app(tmp_path, "rounds=1")
    run = served(path, joined(path, tmp_path), tmp_path)
    path.write_text(path.read_text().replace("lr = 0.1", "lr = 0.2"))
    with pytest.raises(StorageError, match=r"local\.lr") as caught:
        served(path, joined(path, tmp_path), tmp_path, resume=str(run.path), rounds=2)
    assert caught.value.code == "E405"
    (run.path / "flower.json").unlink()
    path.write_text(path.read_text().replace("lr = 0.2", "lr = 0.1"))
    with pytest.raises(StorageError, match=r"flower\.json is missing"):
        served(path, joined(path, tmp_path), tmp_path, resume=str(run.path), rounds=2)


def test_a_run_of_before_a_key_was_there_is_resumed_and_may_put_up_with_less(tmp_path: Path) -> None:
    """As if lamina had no `diagnostics` yet when it began, in env.json and in the app."""
    path = app(tmp_path, "rounds=1", "faults.min_replies=2")
    run = served(path, joined(path, tmp_path), tmp_path)
    environment = json.loads((run.path / "env.json").read_text())
    del environment["config"]["diagnostics"]
    (run.path / "env.json").write_text(json.dumps(environment))
    said = path.read_text().replace("min_replies = 2", "min_replies = 1").splitlines(keepends=True)
    path.write_text("".join(line for line in said if not line.startswith("diagnostics")))
    again = served(path, joined(path, tmp_path), tmp_path, resume=str(run.path), rounds=2)
    assert again.info["rounds_done"] == 2


def test_what_a_run_says_is_in_its_report(tmp_path: Path) -> None:
    path = app(tmp_path, "rounds=2")
    report = tmp_path / "report.jsonl"
    made: Any = serving.server_app(path)
    grid = joined(path, tmp_path)
    keys = {"run-dir": str(tmp_path / "runs"), "report": str(report)}
    made._main(grid, Context(1, 0, {}, RecordDict(), keys))
    with pytest.raises(ConfigError):
        made._main(grid, Context(1, 0, {}, RecordDict(), keys | {"rounds": "two"}))
    with pytest.raises(ConfigError):
        made._main(grid, Context(1, 0, {}, RecordDict(), keys | {"clients": 9, "wait-s": 0}))
    said = [json.loads(line) for line in report.read_text().splitlines()]
    found = [event["event"] for event in said if event["event"] not in ("line", "note")]
    assert found == ["begin", "round", "round", "end", "failed"]
    ends = [event["exit_code"] for event in said if event["event"] in ("end", "failed")]
    assert ends == [0, 2]


# ---- our codecs in an app that is not ours


def plain(codec: str, train: Callable[[ArrayRecord], ArrayRecord], **metrics: int) -> FakeGrid:
    """A grid with one node, whose app sends back what `train` makes of the arrays."""
    client: Any = ClientApp(mods=[mod.coded(codec)])

    def answer(message: Message, context: Context) -> Message:
        arrays = train(message.content["arrays"])
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics or {"n": 3})}), reply_to=message)

    client.train()(answer)
    grid = FakeGrid()
    grid.join(1, client, Path())
    return grid


def arrays(**tensors: torch.Tensor) -> ArrayRecord:
    return ArrayRecord({name: Array(x.numpy()) for name, x in tensors.items()})


def moved(record: ArrayRecord) -> ArrayRecord:
    return arrays(**{name: torch.from_numpy(np.array(array.numpy())) + 1 for name, array in record.items()})


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("codec", ["fp32", "int8", "topk:0.5"])
def test_a_plain_app_sends_its_arrays_coded(codec: str, blocking: bool) -> None:
    """All values move by 1, so top-k at a half sends half of them, and what int8 codes is exact."""
    inner = plain(codec, moved)
    seen: list[Message] = []
    inner.happens = lambda node, message, reply: seen.append(copy.deepcopy(reply.content)) or reply
    grid: Any = mod.Decoding(inner)
    start = {"w": torch.zeros(8, 4), "b": torch.arange(3.0), "n": torch.tensor(7)}
    message = Message(RecordDict({"arrays": arrays(**start)}), dst_node_id=1, message_type="train")
    if blocking:
        (reply,) = grid.send_and_receive([message])
    else:
        (reply,) = grid.pull_messages(grid.push_messages([message]))
    came = {name: torch.from_numpy(array.numpy()) for name, array in reply.content["arrays"].items()}
    assert [*came] == [*start]
    assert int(came["n"]) == 8
    change = came["w"] - start["w"]
    assert int(change.count_nonzero()) == (16 if codec == "topk:0.5" else 32)
    torch.testing.assert_close(change[change != 0], torch.ones(int(change.count_nonzero())))
    (travelled,) = seen[0]["arrays"].values()
    assert travelled.stype == mod.STYPE
    assert reply.content["metrics"]["n"] == 3
    assert grid.get_node_ids() == [1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_strategy_of_flowers_own_sees_plain_arrays() -> None:
    """Every node moves all values by 1, and int8 has that exactly: after two rounds they are 2."""
    from flwr.serverapp.strategy import FedAvg

    inner = plain("int8", moved, **{"num-examples": 3})
    inner.nodes[2] = Node(inner.nodes[1].app, 2, {})
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    result = strategy.start(mod.Decoding(inner), arrays(w=torch.zeros(4, 2)), num_rounds=2)
    assert result.arrays["w"].numpy().tolist() == [[2.0, 2.0]] * 4
    assert len(inner.pushed) == 4


def test_other_arrays_than_those_that_were_sent_travel_as_they_are() -> None:
    grid: Any = mod.Decoding(plain("int8", lambda record: arrays(other=torch.ones(2))))
    message = Message(RecordDict({"arrays": arrays(w=torch.ones(3))}), dst_node_id=1, message_type="train")
    (reply,) = grid.send_and_receive([message])
    assert [*reply.content["arrays"]] == ["other"]


def test_coded_arrays_that_do_not_fit_are_refused() -> None:
    grid: Any = mod.Decoding(plain("int8", moved))
    message = Message(RecordDict({"arrays": arrays(w=torch.ones(3))}), dst_node_id=1, message_type="train")
    (name,) = grid.push_messages([message])
    grid._sent[name] = {"arrays": arrays(v=torch.ones(3))}
    with pytest.raises(WireError, match=r"not that of a coded record"):
        grid.pull_messages([name])


# ---- signed


SIGNED = "sign.key=env:LAMINA_KEY"
SECRET = "canary-of-the-flower-tests-0123456789abcdef"


def test_a_signed_run_is_the_same_and_goes_on_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_KEY", SECRET)
    path = app(tmp_path, SIGNED, "method=errorfeedback", "uplink=topk:0.05")
    local = simulated(path)
    grid = joined(path, tmp_path)
    first = served(path, grid, tmp_path, rounds=2)
    before = json.loads((first.path / "letters.json").read_text())
    again = served(path, grid, tmp_path, resume=str(first.path), rounds=3)
    after = json.loads((again.path / "letters.json").read_text())
    assert again.info["final_sha256"] == local.info["final_sha256"]
    assert (again.path / "bytes.jsonl").read_text() == (local.path / "bytes.jsonl").read_text()
    assert after["run"] == before["run"]
    assert after["start"] > before["start"]
    assert not (local.path / "letters.json").exists()  # in a simulation nothing travels
    for file in (*first.path.rglob("*"), *path.parent.rglob("*"), *(tmp_path / "state-0").rglob("*")):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


def test_a_node_without_the_key_is_left_out_and_takes_nobody_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says that it has the clients of node 100, and then, asked rightly, a forged roll."""
    monkeypatch.setenv("LAMINA_KEY", SECRET)
    path = app(tmp_path, SIGNED)
    local = simulated(path)
    grid = joined(path, tmp_path)
    (tmp_path / "other.key").write_text("another key, of somebody else entirely")
    (tmp_path / "other.key").chmod(0o600)
    rogue = {"partition-id": 0, "num-partitions": 2, "sign.key": f"file:{tmp_path / 'other.key'}"}
    grid.join(7, client_app(path), tmp_path / "state-7", **rogue)

    def unsigned(message: Message, context: Context) -> Message:
        return Message(packed(Roll({"0": 3}, lamina.__version__).packed()), reply_to=message)

    grid.nodes[8] = Node(unsigned, 8, {})
    remote = served(path, grid, tmp_path, nodes=2)
    assert remote.info["final_sha256"] == local.info["final_sha256"]
    printed = capsys.readouterr().out
    assert "node 7 is left out" in printed
    assert "node 8 is left out: E334" in printed
    assert SECRET not in printed
    assert {node for node, kind in grid.pushed if kind == "train"} == {99, 100}


def test_a_server_without_the_key_learns_nothing_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_KEY", SECRET)
    signed, plain = app(tmp_path / "a", SIGNED), app(tmp_path / "b")
    with pytest.raises(RunError) as caught:
        served(plain, joined(signed, tmp_path), tmp_path)
    assert caught.value.code == "E315"


def test_a_nodes_error_does_not_carry_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_KEY", SECRET)
    path = app(tmp_path, SIGNED)

    def failing(*given: Any) -> Any:
        raise ValueError(f"it says {SECRET}")

    grid = joined(path, tmp_path)
    monkeypatch.setattr(client, "_answered", failing)
    with pytest.raises(RunError) as caught:
        served(path, grid, tmp_path)
    assert caught.value.code == "E311"
    assert "ValueError" in caught.value.message
    assert "***" in caught.value.message
    assert SECRET not in str(caught.value)


# ---- what a server says and keeps


def test_a_report_has_no_secret_and_a_terminal_is_sent_no_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A node chooses its reason: it may quote what both know, and hold what a terminal obeys."""
    monkeypatch.setenv("MY_TOKEN", 'pa"ss\\word1')
    with serving.Report(str(tmp_path / "report.jsonl")) as report:
        report.note('node 1 is left out: \x1b]0;owned\x07 pa"ss\\word1')
    assert capsys.readouterr().out == "  node 1 is left out: ?]0;owned? ***\n"
    said = [json.loads(line)["text"] for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert said == ["  node 1 is left out: \x1b]0;owned\x07 ***", "node 1 is left out: \x1b]0;owned\x07 ***"]


@pytest.mark.parametrize("blocking", [True, False])
def test_what_was_sent_is_not_remembered_for_ever(blocking: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody answers. Kept are the last 3, or all of one call: their answers come next."""
    monkeypatch.setattr(mod, "_KEPT", 3)
    inner = plain("int8", moved)
    grid: Any = mod.Decoding(inner)

    def sent(count: int) -> int:
        content = RecordDict({"arrays": arrays(w=torch.ones(1))})
        many = [Message(content, dst_node_id=1, message_type="train") for _ in range(count)]
        if blocking:
            inner.happens = lambda node, message, reply: None
            assert grid.send_and_receive(many, timeout=0.0) == []
        else:
            grid.push_messages(many)
        return len(grid._sent)

    assert [sent(n) for n in (2, 2, 5, 1)] == [2, 3, 5, 3]


def test_ledgers_are_compared_as_they_are_committed_whatever_clients_are_called(tmp_path: Path) -> None:
    from lamina.flower import parity

    row = {"round": 0, "name": "a\u2028b", "bytes_up": 3}
    text = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    (tmp_path / "clients.jsonl").write_bytes(text + b'{"half')
    run = Run(tmp_path, {"lengths": {"clients.jsonl": len(text)}}, [], None, None)
    assert parity._rows(run, "clients.jsonl") == {(0, "client", "a\u2028b"): {"bytes_up": 3}}


# ---- the reliability table


def test_the_row_of_faults_in_flowers_messages_meets_its_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    soak = importlib.import_module("soak")
    (row,) = [row for row in soak.every() if row.name == "R13:flower"]
    result = row.run(True)
    assert result.met, result
