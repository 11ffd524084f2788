"""What is said of a model and its data before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from lamina import ClientData, ConfigError, FedAvg, LocalSGD, cli
from lamina.advice import CODES, GUIDELINES
from lamina.explain import codes
from lamina.inspect import Inspection, data_checks, inspection, view
from lamina.inspect.budget import budget
from lamina.inspect.checks import Finding, of_embeddings, repeatable
from lamina.inspect.data_checks import of_data
from lamina.inspect.table import NOTHING, rest, rows, seen
from lamina.inspect.view import lines
from lamina.models import mlp, resnet20
from lamina.random import generator


def looked(model: nn.Module, **options: Any) -> Inspection:
    return inspection(model, forecast=False, **options)


def by_code(findings: Any) -> dict[str, Finding]:
    return {finding.code: finding for finding in findings}


# ---- the layer table


def test_the_table_of_resnet_20_is_exact() -> None:
    """conv1 3*16*9 + 2*16 = 464; layer1 6*(16*16*9 + 2*16) = 14,016; layer2 16*32*9 + 5*32*32*9 + 16*32 + 7*2*32 =
    51,648; layer3 32*64*9 + 5*64*64*9 + 32*64 + 7*2*64 = 205,696; fc 65*10 = 650. In all 272,474, 1,089,896 B."""
    made = looked(resnet20(num_classes=10), example=torch.zeros(2, 3, 32, 32))
    assert [(r.group, r.kind, r.out, r.width, r.field, r.params, r.bytes) for r in made.stages] == [
        ("conv1", "conv 3x3", "32x32", 16, 3, 464, 1_856),
        ("layer1", "6 conv", "32x32", 16, 15, 14_016, 56_064),
        ("layer2", "7 conv /2", "16x16", 32, 37, 51_648, 206_592),
        ("layer3", "7 conv /2", "8x8", 64, 81, 205_696, 822_784),
        ("fc", "linear", "10", None, 81, 650, 2_600),
    ]
    assert (made.params, made.bytes) == (272_474, 1_089_896)
    assert [f"{100 * r.share:.1f}" for r in made.stages] == ["0.2", "5.1", "19.0", "75.5", "0.2"]
    assert (made.rest.norms, made.rest.statistics, len(made.rest.counters)) == (21, 1_568, 21)
    found = by_code(made.findings)
    assert found["G204"].figure == "layer3 is 75.5 % of every message"
    assert found["G204"].reason == "sending it every 2nd round saves 37.7 %"
    assert found["G207"].figure == "receptive field (37) exceeds the input (32) from layer2 on"
    assert "running statistics of 21 norms (1,568 floats)" in found["W101"].figure


def test_every_tensor_has_a_row_where_that_is_asked_for() -> None:
    model = mlp((6, 5, 4))
    made = rows(model, NOTHING, every=True)
    assert [(r.group, r.kind, r.params) for r in made] == [
        ("fc1.weight", "5x6", 30), ("fc1.bias", "5", 5), ("fc2.weight", "4x5", 20), ("fc2.bias", "4", 4)
    ]  # fmt: skip
    assert sum(r.share for r in made) == pytest.approx(1)


def test_what_is_nearly_the_whole_model_is_opened() -> None:
    inner = nn.ModuleDict({"a": nn.Linear(30, 30), "b": nn.Linear(30, 30)})
    model = nn.ModuleDict({"body": inner, "head": nn.Linear(3, 2)})
    assert [r.group for r in rows(model, NOTHING)] == ["body.a", "body.b", "head"]


# ---- what is no trainable parameter


class Odd(nn.Module):
    """A tied weight, a frozen one, a table of integers, a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 4)
        self.body = nn.Linear(4, 4)
        self.body.weight.requires_grad_(False)
        self.head = nn.Linear(4, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(3))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.embed(x)).mean(1))
        return out


def test_tied_frozen_and_other_tensors_are_named_with_what_happens_to_them() -> None:
    found = rest(Odd())
    assert found.tied == (("head.weight", "embed.weight", 800),)
    assert found.frozen == {"body.weight": 16}
    assert found.counters == ("table",)
    assert found.unsaved == ("cache",)
    made = looked(Odd(), example=torch.zeros((2, 5), dtype=torch.int64))
    codes_found = by_code(made.findings)
    assert "800 B less" in codes_found["W105"].figure
    assert "table" in codes_found["W103"].figure
    assert "16 of 220 parameters are frozen" in codes_found["G220"].figure
    text = "\n".join(lines(made, 100))
    for word in ("buffers=average", "head.weight is embed.weight", "never sent, never changed", "in no state_dict"):
        assert word in text


def test_policies_other_than_average_are_not_warned_of() -> None:
    made = looked(resnet20(num_classes=10), example=torch.zeros(2, 3, 32, 32), buffers="keep")
    assert "W101" not in by_code(made.findings)
    assert "each client keeps its own" in "\n".join(lines(made, None))


def test_embeddings_of_which_a_client_touches_few_rows_are_named() -> None:
    x = torch.arange(20).view(4, 5) % 10
    data = ClientData.from_clients({"a": (x, torch.zeros(4)), "b": (x, torch.zeros(4))})
    (finding,) = of_embeddings(Odd(), data)
    assert (finding.code, finding.where) == ("G210", ("embed",))
    assert "touches 20.0 % of the 50 rows" in finding.figure


def test_rows_of_an_embedding_that_is_called_by_name_are_seen_a_few_examples_at_a_time() -> None:
    """Client "a" touches rows 0 to 9 of 50 in its first 60 examples and 10 to 14 in its last 40: 30 %."""
    sizes: list[int] = []

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 2)

        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            out: Tensor = self.embed(input=x).sum(1)
            return out

    x = torch.cat([torch.arange(60) % 10, 10 + torch.arange(40) % 5])[:, None]
    (finding,) = of_embeddings(Named(), ClientData.from_clients({"a": (x, torch.zeros(100))}))
    assert "touches 30.0 % of the 50 rows" in finding.figure
    assert sizes == [50, 50]  # equal parts, of 64 at most


def test_an_operation_that_may_give_other_bits_is_named() -> None:
    class Maybe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            import warnings

            warnings.warn("put_ does not have a deterministic implementation. You can file an issue", stacklevel=1)
            return x * self.w

    before = torch.are_deterministic_algorithms_enabled()
    (finding,) = repeatable(Maybe(), lambda out, y: out.sum(), torch.ones(2, 3), torch.zeros(2))
    assert finding.code == "W112"
    assert finding.where == ("put_",)
    assert torch.are_deterministic_algorithms_enabled() == before
    assert not list(repeatable(mlp((3, 2)), nn.functional.cross_entropy, torch.ones(2, 3), torch.tensor([0, 1])))


def test_every_code_has_a_page() -> None:
    source = [p.read_text() for p in Path(cli.__file__).parents[1].joinpath("inspect").glob("*.py")]
    import re

    used = {code for text in source for code in re.findall(r'"([WGI]\d{3})"', text)} | {CODES[g] for g in GUIDELINES}
    assert used <= set(codes.names())


# ---- data


def test_four_things_about_data_that_are_often_a_mistake() -> None:
    source = generator(0, "odd data")
    x = torch.randn((12, 3), generator=source)
    data = ClientData.from_clients(
        {
            "short": (x[:2], torch.tensor([0, 1])),
            "single": (x[2:6], torch.ones(4, dtype=torch.int64)),
            "copy": (torch.cat([x[3:5], x[6:9]]), torch.tensor([0, 1, 0, 1, 0])),
        },
        test=(torch.cat([x[7:8], x[11:]]), torch.tensor([0, 1])),
    )
    found = list(of_data(data, batch_size=4))
    assert [f.code for f in found] == ["W310"] * 4
    assert [f.where for f in found] == [("short",), ("single",), ("single", "copy"), ()]
    assert found[0].figure.startswith("1 of 3 clients have less than one batch of 4, the smallest 2")
    assert found[2].figure.startswith("2 examples are equal to one of another client")
    assert found[3].figure == "1 training examples are also in the test set of 2"


def test_of_large_data_the_same_examples_are_looked_at_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 201 examples with at most 50 remembered, one in 5: copies are found wherever they lie, and the words say how
    many were looked at. By their own strides, the copies that lie one place further would all be missed."""
    monkeypatch.setattr(data_checks, "MOST", 50)
    x, y = torch.randn((100, 3), generator=generator(0, "large data")), torch.tensor([0, 1] * 50)
    parts = {"a": (x, y), "b": (x.roll(1, 0), y)}
    test = torch.cat([-x[:1], x, -x[:100]]), torch.tensor([0, 1] * 100 + [0])
    shared, leaked = of_data(ClientData.from_clients(parts, test=test), batch_size=4)
    count = int(shared.figure.split()[0])
    assert 10 <= count <= 30  # 20 of 100 are due
    among = "of the one in 5 that were looked at are"
    assert shared.figure == f"{count} examples {among} equal to one of another client: a, b"
    assert leaked.figure == f"{2 * count} training examples {among} also in the test set of 201"
    sound = ClientData.from_clients({"a": (x, y), "b": (-x, y)})
    assert not list(of_data(sound, batch_size=4))
    said = looked(nn.Linear(3, 2), data=sound).fine
    assert any(text.endswith("no test examples in training (looked at one example in 4)") for text in said)


def test_sound_data_gives_nothing() -> None:
    x = torch.arange(24.0).view(8, 3)
    y = torch.tensor([0, 1] * 4)
    assert not list(of_data(ClientData.from_clients({"a": (x[:4], y[:4]), "b": (x[4:], y[4:])}), batch_size=4))


# ---- failures


def test_a_model_that_fails_is_named_with_the_layer_and_the_shapes() -> None:
    x, y = torch.zeros((8, 6)), torch.tensor([0, 1] * 4)
    with pytest.raises(ConfigError, match=r"E121|Sequential\.1 received 2x5|fails on a batch") as caught:
        inspection(nn.Sequential(nn.Linear(6, 5), nn.Linear(4, 2)), ClientData.from_clients({"a": (x, y)}))
    assert caught.value.code == "E121"
    assert "Sequential.1" in str(caught.value)
    with pytest.raises(ConfigError, match="not initialised"):
        inspection(nn.Sequential(nn.LazyLinear(2)), ClientData.from_clients({"a": (x, y)}))


# ---- bytes per method and codec


def test_the_table_of_bytes_has_exact_cells_and_says_which() -> None:
    source = generator(0, "budget")
    parts = {str(i): (torch.randn((8, 6), generator=source), torch.tensor([0, 1] * 4)) for i in range(4)}
    made = budget(
        mlp((6, 5, 2)), ClientData.from_clients(parts), local=LocalSGD(), rounds=20, cohort=4,
        methods={"fedavg": FedAvg()}, codecs=("fp32", "lossless"),
    )  # fmt: skip
    raw, squeezed = made.cells
    assert (raw.exact, squeezed.exact) == (True, False)
    assert raw.up > 4 * (6 * 5 + 5 + 5 * 2 + 2)
    assert (made.rounds, made.left_out) == (20, {})


# ---- any module


def test_a_transformer_from_its_config_is_inspected_with_dictionaries() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=60,
            max_position_embeddings=16,
        )
    )  # fmt: skip
    tokens = torch.randint(0, 20, (8, 7), generator=generator(0, "tokens"))
    parts = {
        name: ({"input_ids": tokens[at], "attention_mask": torch.ones_like(tokens[at])}, torch.tensor([0, 1] * 2))
        for name, at in (("a", slice(0, 4)), ("b", slice(4, 8)))
    }
    made = inspection(
        model,
        ClientData.from_clients(parts),
        loss=lambda out, y: nn.functional.cross_entropy(out.logits, y),
        local=LocalSGD(batch_size=4),
        forecast=False,
    )
    assert made.params == sum(p.numel() for p in model.parameters())
    groups = {row.group: row for row in made.stages}
    assert groups["bert.embeddings"].kind == "3 embedding"
    assert groups["classifier"].out == "2"
    assert "bert.embeddings.word_embeddings" in {f.where[0] for f in made.findings if f.code == "G210"}


# ---- the command

MINE = """
from torch import nn
import torch
from lamina import ClientData

def model(cfg):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))

def bad():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(7, 3))
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def inspect(*arguments: str, columns: int | None = None) -> Result:
    env = {} if columns is None else {"COLUMNS": str(columns)}
    return CliRunner().invoke(cli.app, ["inspect", *arguments], env=env)


@pytest.mark.parametrize(("asked", "said"), [
    ({}, "for example 200 rounds x 7 clients (of an experiment: `lamina inspect exp.toml`), FedAvg fp32: up"),
    ({"rounds": 20, "cohort": 3}, "20 rounds x 3 clients, FedAvg fp32: up"),
])  # fmt: skip
def test_a_cost_without_an_experiment_is_an_example_for_the_clients_there_are(asked: dict[str, int], said: str) -> None:
    x, y = torch.randn(7, 2, 4), torch.zeros(7, 2, dtype=torch.int64)
    data = ClientData.from_clients({str(c): (x[c], y[c]) for c in range(7)})
    made = budget(nn.Linear(4, 2), data, local=LocalSGD(), methods={"fedavg": FedAvg()}, codecs=("fp32",), **asked)
    assert said in " ".join(" ".join(view._budgeted(made, None)).split())


def test_a_model_of_ones_own_is_inspected_by_file_and_name(mine: Path) -> None:
    result = inspect("mine.py:model", "--input", "1,8,8", "--no-forecast")
    assert result.exit_code == 0, result.output
    assert "model · 483 parameters" in result.stdout  # 4*9 + 4 + 2*4 + 145*3
    assert "conv 3x3" in result.stdout
    assert "W101" in result.stdout


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_lines_fit_and_no_number_is_cut(mine: Path, columns: int) -> None:
    result = inspect("mine.py:model", "--input", "1,8,8", "--no-forecast", columns=columns)
    assert max(map(len, result.stdout.splitlines())) <= columns
    assert "…" not in result.stdout
    assert any(line.split()[0] == "4" and "435" in line for line in result.stdout.splitlines() if line.strip())


def test_json_is_one_object_a_line(mine: Path) -> None:
    result = inspect("mine.py:model", "--input", "1,8,8", "--no-forecast", "--json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [e["event"] for e in events if e["event"] != "finding"] == [
        "model", "stage", "stage", *["tensor"] * 6, "inspected"
    ]  # fmt: skip
    assert events[0]["parameters"] == 483


def test_what_cannot_be_inspected_is_refused_with_a_remedy(mine: Path) -> None:
    failing = inspect("mine.py:bad", "--input", "1,8,8")
    assert failing.exit_code == 2
    assert "E121" in failing.stderr
    assert "Sequential.2 received 8x144" in failing.stderr
    assert "E106" in inspect("mine.py:modle", "--input", "1,8,8").stderr
    assert "--input 1,x: expected whole numbers" in inspect("mine.py:model", "--input", "1,x").stderr
    assert "--data is given" in inspect("mine.py:model", "--input", "1,8,8", "--data", "digits").stderr
    assert "has data" in inspect("quickstart", "--input", "64").stderr


def test_a_model_alone_has_a_table_too(mine: Path) -> None:
    result = inspect("mine.py:model")
    assert result.exit_code == 0, result.output
    assert "483 parameters" in result.stdout
    assert "no forecast: no examples to train on" in result.stdout


def test_following_leaves_the_model_as_it_was() -> None:
    model = resnet20(num_classes=10).train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    seen(model, torch.zeros(2, 3, 32, 32))
    assert model.training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
