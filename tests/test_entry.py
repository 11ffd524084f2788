"""A user's own method and codec, by `entry`: those of the tutorial, as its reader runs them."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import cases
import network
from lamina import ErrorFeedback, Federation, cli, wire
from lamina.config import build, load
from lamina.errors import ConfigError, LaminaError
from lamina.runs import Run

PAGE = Path(__file__).parent.parent / "docs" / "tutorials" / "own-method.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the files of the tutorial; the current one, as for somebody who types commands there."""
    found = re.findall(r'^```python title="([^"]+)"\n(.*?)^```$', PAGE.read_text(encoding="utf-8"), re.M | re.S)
    for name, text in found:
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAMINA_RUNS", str(tmp_path / "runs"))
    return tmp_path


def ran(*words: str) -> Run:
    result = CliRunner().invoke(cli.app, ["run", "quickstart", "rounds=3", *words])
    assert result.exit_code == 0, result.output
    newest = sorted((Path.cwd() / "runs" / "quickstart").glob("[0-9]*"))[-1]
    return Run.open(newest)


def test_layers_take_turns(folder: Path) -> None:
    """Four tensors, of 4096, 64, 640 and 10 entries: rounds 0 and 2 send the weights, round 1 the biases."""
    plain, turns = ran("engine=loop"), ran("engine=loop", "method=turns.py:Turns")
    weights, biases = 5 * 4 * (4096 + 640), 5 * 4 * (64 + 10)
    for row, entries in zip(turns.records, (weights, biases, weights), strict=True):
        assert entries < row.bytes_up < entries + 5 * 300
        assert row.uploaded == 2
    assert turns.info["bytes_up"] < plain.info["bytes_up"]


@pytest.mark.parametrize(
    ("words", "engines"),
    [
        (["method=turns.py:Turns", "method.parts=3"], ["loop", "processes", "stacked"]),
        (["method=[turns.py:Turns,fedlama]"], ["loop", "processes"]),
        (["method=halfway.py:Halfway", "method.share=0.7"], ["loop", "processes"]),
        (["uplink=coarse.py:Coarse", "uplink.drop=18"], ["loop", "processes"]),
        (["uplink=coarse.py:Coarse", "method=errorfeedback"], ["loop", "processes"]),
    ],
)
def test_own_parts_give_the_same_in_every_engine_and_through_bytes(
    words: list[str], engines: list[str], folder: Path
) -> None:
    runs = [ran(*words, f"engine={engine}", "workers=2") for engine in engines if engine != "stacked"]
    runs.append(ran(*words, "engine=loop", "through_bytes=true"))
    first = runs[0].info
    for run in runs[1:]:
        for key in ("final_sha256", "bytes_up", "bytes_down"):
            assert run.info[key] == first[key], key
    if "stacked" in engines:
        assert ran(*words, "engine=stacked").info["bytes_up"] == first["bytes_up"]


HALVES = '''
import json

import numpy as np
import torch
from lamina import WireError
from lamina.wire import Codec


class Halves(Codec):
    """A line of JSON with the names, then two bytes an entry: no format of lamina\'s."""

    lossless = False

    def encode(self, tree, context):
        body = b"".join(x.half().numpy().tobytes() for x in tree.values())
        return json.dumps(list(tree)).encode() + b"\\n" + body

    def decode(self, blob, context):
        head, _, body = blob.partition(b"\\n")
        try:
            tree, at = {}, 0
            for name in json.loads(head):
                spec = context.schema[name]
                values = np.frombuffer(body, np.float16, spec.numel, at)
                tree[name] = torch.from_numpy(values.astype(np.float32)).view(spec.shape)
                at += 2 * spec.numel
        except (ValueError, KeyError, TypeError) as error:
            raise WireError(f"no halves: {error}") from None
        return tree
'''


def test_a_codec_of_another_format_gives_the_same_through_bytes_and_from_elsewhere(folder: Path) -> None:
    (folder / "halves.py").write_text(HALVES, encoding="utf-8")
    simulated, sent = (ran("uplink=halves.py:Halves", "engine=loop", f"through_bytes={x}") for x in ("false", "true"))
    assert sent.info["final_sha256"] == simulated.info["final_sha256"]
    assert (sent.path / "bytes.jsonl").read_text() == (simulated.path / "bytes.jsonl").read_text()
    halves = runpy.run_path(str(folder / "halves.py"))["Halves"]

    def make(**options: Any) -> Federation:
        return cases.federation(uplink=halves(), **options)

    here = list(cases.federation(uplink=halves(), examples=network.shared()).run(3))
    remote, _ = network.connected(make, ((0, 3), (1, 2, 4)))
    there = list(remote.run(3))
    assert there[-1][0].sha256() == here[-1][0].sha256()
    assert [record.traffic for _, record in there] == [record.traffic for _, record in here]


def test_halfway_moves_weights_by_half(folder: Path) -> None:
    """After one round: matrices by half of what FedAvg moves them, biases by all of it."""
    found = {}
    for name in ("fedavg", "halfway.py:Halfway"):
        fed = build(load("quickstart", [f"method={name}", "engine=loop"], {}))
        (*_, (state, _)) = fed.run(1)
        found[name] = {key: x - fed.initial.params[key] for key, x in state.params.items()}
    for key, moved in found["fedavg"].items():
        ratio = found["halfway.py:Halfway"][key].norm() / moved.norm()
        assert float(ratio) == pytest.approx(0.5 if moved.ndim > 1 else 1.0, rel=1e-4)


def test_a_run_with_own_parts_is_verified_through_a_socket(folder: Path) -> None:
    ran("uplink=coarse.py:Coarse", "method=turns.py:Turns", "engine=loop")
    result = CliRunner().invoke(cli.app, ["verify", "001", "--wire"])
    assert result.exit_code == 0, result.output


def test_a_run_with_own_parts_runs_again_from_its_config(folder: Path) -> None:
    first = ran("uplink=coarse.py:Coarse", "uplink.drop=12", "method=turns.py:Turns", "engine=loop")
    result = CliRunner().invoke(cli.app, ["run", str(first.path)])
    assert result.exit_code == 0, result.output
    (again,) = (folder / "runs" / "quickstart").glob("002-*")
    assert Run.open(again).info["final_sha256"] == first.info["final_sha256"]
    assert "drop = 12" in (again / "config.toml").read_text(encoding="utf-8")


def test_an_own_codec_is_lossy_where_it_says_and_cheaper(folder: Path) -> None:
    codec = runpy.run_path(str(folder / "coarse.py"))["Coarse"]
    tree = {"w": cases.data().test[0].reshape(-1, 8).contiguous()}  # type: ignore[index, union-attr]
    context = wire.Context(wire.schema_of(tree))
    sizes = []
    for drop in (0, 8, 16):
        blob = codec(drop).encode(tree, context)
        received, size = codec(drop).transmit(tree, context)
        assert cases.bits(received) == cases.bits(codec(drop).decode(blob, context))
        assert size.total == len(blob)
        assert float((received["w"] - tree["w"]).abs().max()) <= float(tree["w"].abs().max()) * 2.0 ** (drop - 23)
        sizes.append(len(blob))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 1.5 * sizes[-1]
    fed = cases.federation(ErrorFeedback(), model="small", uplink=codec(20))
    cases.finish(fed, 2)


def test_the_python_of_the_page_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    runpy.run_path(str(folder / "federated.py"))
    assert int(capsys.readouterr().out.splitlines()[-1]) > 0
    sys.modules.pop("turns", None)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["method=turns.py:Turns", "method.parts=0"], "E101", "parts=0: expected a whole number >= 1"),
        (["method=turns.py:Turns", "method.part=2"], "E102", "did you mean 'parts'?"),
        (["method=turns.py:Turns", "method.parts=two"], "E103", "method.parts: expected a whole number"),
        (["method=turns.py:Turn"], "E106", "did you mean 'Turns'?"),
        (["method=coarse.py:Coarse"], "E106", "expected a lamina.Method"),
        (["uplink=turns.py:Turns"], "E101", "expected a codec"),
        (["uplink=coarse.py:Coarse", "uplink.dorp=3"], "E102", "did you mean 'drop'?"),
        (["downlink=coarse.py:Coarse"], "E113", "expected Dense"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    words: list[str], code: str, said: str, folder: Path
) -> None:
    with pytest.raises(LaminaError) as raised:
        build(load("quickstart", words, {}))
    assert isinstance(raised.value, ConfigError)
    assert raised.value.code == code
    assert said in str(raised.value)
    assert not (folder / "runs").exists()
