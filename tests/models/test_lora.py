"""Low-rank updates of frozen layers: what they compute, what trains, what travels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
from lamina import Chain, ClientData, ConfigError, ErrorFeedback, Federation, FedLAMA, LocalSGD, wire
from lamina.models import Frozen, cnn, lora, merged, mlp, resnet8


def trains(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def moved(model: nn.Module, by: float = 0.3) -> nn.Module:
    """With other values in everything that trains."""
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=source, dtype=p.dtype), alpha=by)
    return model


def test_by_hand() -> None:
    """W = [[1, 2]], a = [[3, 4]], b = [[0.5]], alpha / rank = 2: W' = [[1 + 2 x 0.5 x 3, 2 + 2 x 0.5 x 4]] = [[4, 6]].

    Of x = (1, 1): 10, of which 3 are the base's.
    """
    base = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        base[0].weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    with pytest.raises(ConfigError, match="the update of 0 would have 4 entries, its weight has 4"):
        lora(base, rank=1)
    wide = nn.Sequential(nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        wide[0].weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]))
    model = lora(wide, rank=1, alpha=2)
    with torch.no_grad():
        model[0].a.weight.copy_(torch.tensor([[3.0, 4.0]]))
        model[0].b.weight.copy_(torch.tensor([[0.5], [0.0], [0.0]]))
    assert model(torch.ones(1, 2)).tolist() == [[10.0, 0.0, 0.0]]
    assert merged(model)[0].weight.tolist() == [[4.0, 6.0], [0.0, 0.0], [0.0, 0.0]]


class Convolutions(nn.Module):
    """Kernels of 1 x 1 and 3 x 3 with stride, padding by reflection and dilation, a grouped one, and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=2, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, groups=4, padding=1)
        self.wide = nn.Conv2d(16, 12, 3, dilation=2, padding=2, bias=False)
        self.point = nn.Conv2d(12, 10, 1)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = self.point(torch.relu(self.wide(torch.relu(self.grouped(x)))))
        return self.head(x.mean((2, 3)))


IMAGES = torch.randn(5, 3, 9, 9, generator=torch.Generator().manual_seed(1))
MAKERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: mlp((64, 16, 10)), torch.randn(5, 64, generator=torch.Generator().manual_seed(2))),
    "convolutions": (Convolutions, IMAGES),
    "resnet8": (resnet8, IMAGES),
    "attention": (
        lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2)),
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_at_first_it_is_the_model_and_merged_it_is_the_plain_model_it_came_to(name: str) -> None:
    make, x = MAKERS[name]
    torch.manual_seed(0)
    plain = make().eval()
    before = cases.bits(dict(plain.state_dict()))
    model = lora(plain, rank=2, train=["head.*"] if name == "convolutions" else []).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-6)
    moved(model)
    again = merged(model)
    assert again.state_dict().keys() == plain.state_dict().keys()
    assert [type(m) for m in again.modules()] == [type(m) for m in plain.modules()]
    assert trains(again) == trains(plain)
    with torch.no_grad():
        out = model(x)
        torch.testing.assert_close(again(x), out, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(out, plain(x), atol=1e-2)
    assert cases.bits(dict(plain.state_dict())) == before  # neither call changes what it is given
    assert any(isinstance(p, nn.Parameter) and p.shape[0] == 2 for p in model.parameters())


def test_only_updates_and_what_is_named_train() -> None:
    torch.manual_seed(0)
    model = lora(Convolutions(), rank=2, targets=["wide", "poi*"], train=["head.*"])
    assert trains(model) == [
        "wide.a.weight", "wide.b.weight", "point.a.weight", "point.b.weight", "head.weight", "head.bias",
    ]  # fmt: skip
    assert isinstance(model.head, nn.Linear)
    assert isinstance(model.grouped, nn.Conv2d)


def test_statistics_of_frozen_layers_stand_still_and_those_of_trained_ones_move() -> None:
    torch.manual_seed(0)
    for train, fixed in (([], True), (["norm.*"], False)):
        model = lora(Convolutions(), rank=2, train=train).train()
        norm = model.norm.base if fixed else model.norm  # type: ignore[union-attr]
        before = norm.running_mean.clone()  # type: ignore[operator, union-attr]
        model(IMAGES)
        assert isinstance(model.norm, Frozen) == fixed
        assert torch.equal(norm.running_mean, before) == fixed  # type: ignore[arg-type, union-attr]


def test_a_frozen_backbone_neither_trains_nor_drops_nor_counts() -> None:
    torch.manual_seed(0)
    backbone = Frozen(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)))
    model = nn.Sequential(backbone, nn.Linear(8, 2)).train()
    x = torch.randn(6, 4)
    assert torch.equal(model(x), model(x))
    assert trains(model) == ["1.weight", "1.bias"]
    assert float(backbone.base[1].num_batches_tracked) == 0  # type: ignore[index]
    assert trains(merged(model)) == ["0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias", "1.weight", "1.bias"]


def test_shared_layers_and_tied_weights() -> None:
    """A layer in two places is adapted once; one whose weight another module has too is left alone."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(20, 8)
            self.inner = nn.Linear(8, 8)
            self.again = self.inner
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.words.weight

    model = lora(Tied(), rank=2)
    assert model.again is model.inner
    assert trains(model) == ["inner.a.weight", "inner.b.weight"]
    back = merged(model)
    assert back.again is back.inner
    assert back.head.weight is back.words.weight  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="targets: 'head' matches no"):
        lora(Tied(), targets=["head"])


def test_a_is_drawn_from_torchs_generator_and_of_the_models_precision() -> None:
    made = []
    for seed in (1, 1, 2):
        plain = mlp((64, 16, 10)).double()
        torch.manual_seed(seed)
        made.append(lora(plain, rank=2))
    first, same, other = ([p for p in m.parameters() if p.requires_grad] for m in made)
    assert all(torch.equal(p, q) for p, q in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])
    assert first[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank=0: expected an integer >= 1"),
        ({"rank": True}, "rank=True"),
        ({"alpha": 0}, "alpha=0: expected a number > 0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"targets": "hidden"}, "targets='hidden': expected a list of patterns"),
        ({"targets": ["nothing"]}, "targets: 'nothing' matches no nn.Linear"),
        ({"train": ["nothing"]}, "train: 'nothing' matches no parameter"),
        ({"rank": 30}, "rank=30: the update of .* would have"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        lora(mlp((64, 16, 10)), **options)


def test_a_refusal_says_what_to_do() -> None:
    with pytest.raises(ConfigError) as raised:
        lora(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 2)))
    assert raised.value.remedy == 'let it train in full, train=["1.*"], or a smaller rank'
    assert trains(lora(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 2)), train=["1.*"])) == [
        "0.a.weight", "0.b.weight", "1.weight", "1.bias",
    ]  # fmt: skip


# ---- only what trains travels


def adapted() -> nn.Module:
    """With updates other than 0, so that there is something to rank and to prune."""
    return moved(lora(cases.small(), rank=1, alpha=1), by=0.1)


def federation(name: str = "fedavg", model: Callable[[], nn.Module] = adapted, **options: Any) -> Federation:
    settings = {"cohort": 3, "seed": 7, "engine": "loop", "local": LocalSGD(lr=0.1, batch_size=8)}
    given = settings | cases.OPTIONS.get(name, {}) | options
    return Federation(model, cases.data(), method=cases.ALL[name](), **given)


QUICK = ("fedavg", "fedlama", "scaffold", "ssfl", "feddst")
NAMES = [name for name in cases.METHODS if name != "personal"]  # its layers are norms, here are none


@pytest.mark.parametrize("name", cases.the_rest_slowly(NAMES, QUICK))
def test_every_method_moves_and_sends_updates_alone(name: str) -> None:
    fed = federation(name)
    state, records = cases.finish(fed, 5)
    names = {layer.name for layer in fed.layers}
    assert names
    assert all(leaf.endswith((".a.weight", ".b.weight")) for leaf in names)
    assert {t.layer for r in records for t in r.traffic if not t.layer.startswith("_")} <= names
    before, after = fed.model.state_dict(), fed.module(state).state_dict()
    for key in before:
        if key not in names:
            assert torch.equal(before[key], after[key]), key


@pytest.mark.parametrize("engine", ["loop", "processes", "threads", "stacked"])
def test_every_engine_moves_and_sends_updates_alone(engine: str) -> None:
    fed = federation("fedlama", engine=engine, workers=2 if engine == "processes" else None)
    state, records = cases.finish(fed, 3)
    expected, theirs = cases.finish(federation("fedlama"), 3)
    assert [r.bytes_up for r in records] == [r.bytes_up for r in theirs]
    for name, x in state.params.items():
        assert name.endswith((".a.weight", ".b.weight"))
        torch.testing.assert_close(x, expected.params[name], rtol=1e-4, atol=1e-6)
    before, after = fed.model.state_dict(), fed.module(state).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if ".base." in key)


def test_bytes_are_those_of_the_updates() -> None:
    """mlp(64, 7, 5, 4) has 518 parameters; of rank 1 the updates have 71 + 12 + 9."""
    whole, records = cases.finish(federation(model=cases.small), 1)
    small, own = cases.finish(federation(), 1)
    assert sum(x.numel() for x in whole.params.values()) == 64 * 7 + 7 + 7 * 5 + 5 + 5 * 4 + 4
    assert sum(x.numel() for x in small.params.values()) == 71 + 12 + 9
    headers = own[0].bytes_up - 3 * 4 * (71 + 12 + 9)
    assert 0 < headers < 3 * 300
    assert own[0].bytes_up < records[0].bytes_up / 3


def test_statistics_of_a_frozen_backbone_cost_nothing_with_skip() -> None:
    """With "average" they are sent every round, though they stand still."""
    data = ClientData.from_clients({c: (IMAGES, torch.arange(5) % 4) for c in "ab"})

    def model() -> nn.Module:
        return lora(Convolutions(), rank=2)

    up = {}
    for buffers in ("skip", "average"):
        fed = Federation(model, data, buffers=buffers, engine="loop", diagnostics=False)
        (*_, (state, record)) = fed.run(2)
        assert cases.bits(state.buffers) == cases.bits(fed.initial.buffers)
        up[buffers] = sum(t.bytes for t in record.traffic if t.direction == "up" and t.layer == "_buffers")
        assert not any(t.bytes for t in record.traffic if t.direction == "down" and t.layer == "_buffers")
    assert up["skip"] == 0
    assert up["average"] >= 2 * 2 * 16 * 4


def test_methods_and_codecs_work_on_adapters() -> None:
    """Image models too: convolutions in NHWC memory, a chain and a sparse uplink."""
    data = ClientData.from_clients({c: (torch.randn(12, 1, 16, 16), torch.arange(12) % 4) for c in "abc"})
    fed = Federation(
        lambda: lora(cnn(1, 4, (8, 16), dense=(32,), size=16), rank=2),
        data,
        method=Chain(ErrorFeedback(), FedLAMA(phi=2)),
        uplink=wire.TopK(0.3),
        engine="loop",
    )
    state, _ = cases.finish(fed, 3)
    again = merged(fed.module(state))
    assert all(".base." not in name for name in again.state_dict())


# ---- transformers


@pytest.mark.parametrize("by", ["lora", "peft"])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft's own calls
def test_a_transformer_from_a_config_trains_by_adapters(by: str) -> None:
    """Of a made-up text task; nothing is fetched."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft") if by == "peft" else None

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = transformers.BertConfig(
                vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                max_position_embeddings=12, num_labels=3,
            )  # fmt: skip
            self.bert = transformers.BertForSequenceClassification(config)

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.bert(input_ids=tokens).logits
            return logits

    def model() -> nn.Module:
        made = Classifier()
        if peft is None:
            return lora(made, rank=2, targets=["*.query", "*.value"], train=["bert.classifier.*"])
        config = peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
        made.bert = peft.get_peft_model(made.bert, config)
        return made

    source = torch.Generator().manual_seed(0)
    texts = {c: torch.randint(30, (16, 8), generator=source) for c in "abc"}
    data = ClientData.from_clients(
        {c: (x, x[:, 0] % 3) for c, x in texts.items()}, test=(texts["a"], texts["a"][:, 0] % 3)
    )
    fed = Federation(model, data, engine="loop", method=FedLAMA(phi=2), local=LocalSGD(lr=0.1, batch_size=8))
    state, records = cases.finish(fed, 3)
    assert 0 < len(fed.layers) <= 2 * 2 * 2 + 2
    entries = sum(layer.numel for layer in fed.layers)
    assert entries == 2 * 2 * 2 * (16 + 16) + 16 * 3 + 3
    assert records[0].bytes_up < 3 * (4 * entries + 1500)
    before, after = fed.model.state_dict(), fed.module(state).state_dict()
    trained = {layer.name for layer in fed.layers}
    assert all(torch.equal(before[key], after[key]) for key in before if key not in trained)
    if peft is None:
        assert merged(fed.module(state)).state_dict().keys() == Classifier().state_dict().keys()
