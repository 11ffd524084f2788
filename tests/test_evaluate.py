"""What a model is worth, in numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
from lamina import ClientData, ConfigError, Federation, FedLAMA, LocalOnly, LocalSGD, evaluate, wire
from lamina.evaluate import Score, loss_function


class Table(nn.Module):
    """The output is the input: logits. Its one parameter adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout(0.9)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x) + 0 * self.w


LOGITS = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0], [5.0, 0.0]])
LABELS = torch.tensor([0, 1, 1, 0, 0])  # three of five right


def table(test: Any = (LOGITS, LABELS), **options: Any) -> Federation:
    train = {"a": (LOGITS, LABELS), "b": (LOGITS, LABELS)}
    data = ClientData.from_clients(train, test=test, client_tests=options.pop("client_tests", None))
    return Federation(Table, data, **{"engine": "loop", "local": LocalSGD(batch_size=None)} | options)


def state_of(fed: Federation):
    return cases.states(fed, 1, evaluate_every=9)[-1]


@pytest.fixture(params=[2, 3, 500])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Test sets are cut into pieces of so many examples."""
    monkeypatch.setattr(evaluate, "_PIECE", request.param)
    return request.param


def test_accuracy_and_loss_are_over_examples_whatever_the_pieces(piece: int) -> None:
    fed = table()
    found = fed.evaluate(state_of(fed))
    assert found.accuracy == 0.6
    expected = nn.functional.cross_entropy(LOGITS, LABELS).item()
    assert found.loss == pytest.approx(expected, rel=1e-6)


def test_metrics_see_the_whole_test_set_at_once(piece: int) -> None:
    seen = []

    def balanced(output: Tensor, y: Tensor) -> Tensor:
        seen.append((output.clone(), y.clone()))
        hits = output.argmax(1) == y
        return torch.stack([hits[y == label].float().mean() for label in (0, 1)]).mean()

    fed = table(metrics={"balanced": balanced})
    state = state_of(fed)
    seen.clear()
    found = fed.evaluate(state)
    assert found.metrics == {"balanced": pytest.approx((2 / 3 + 1 / 2) / 2)}
    assert len(seen) == 1
    assert torch.equal(seen[0][0], LOGITS)
    assert torch.equal(seen[0][1], LABELS)


def test_grids_of_labels_count_every_cell(piece: int) -> None:
    """Two classes on 1x2 grids: four of the ten cells are wrong."""
    x = torch.stack([LOGITS, LOGITS.flip(1)], dim=2)[:, :, None, :]  # [5, 2, 1, 2]
    y = torch.stack([LABELS, LABELS], dim=1)[:, None, :]  # the second cell is right where the first is wrong
    y[0, 0, 1] = 1
    data = ClientData.from_clients({"a": (x, y)}, test=(x, y))
    fed = Federation(Table, data, engine="loop", local=LocalSGD(batch_size=None))
    assert fed.evaluate(state_of(fed)).accuracy == pytest.approx(6 / 10)


def test_targets_that_are_no_labels_have_no_accuracy(piece: int) -> None:
    data = ClientData.from_clients({"a": (LOGITS, LOGITS + 1)}, test=(LOGITS, LOGITS + 1))
    fed = Federation(Table, data, loss=nn.functional.mse_loss, engine="loop", local=LocalSGD(batch_size=None))
    found = fed.evaluate(state_of(fed))
    assert found.accuracy is None
    assert found.loss == pytest.approx(1.0)


def test_personal_accuracy_is_a_mean_over_clients_not_over_examples(piece: int) -> None:
    """Client a has one example, right; b five, three of them right: (1 + 0.6) / 2."""
    tests = {"a": (LOGITS[:1], LABELS[:1]), "b": (LOGITS, LABELS)}
    fed = table(client_tests=tests)
    assert fed.evaluate(state_of(fed)).personal_accuracy == pytest.approx(0.8)


def test_clients_without_a_test_set_are_left_out() -> None:
    fed = table(client_tests={"b": (LOGITS, LABELS)})
    assert fed.evaluate(state_of(fed)).personal_accuracy == pytest.approx(0.6)


def test_without_client_tests_there_is_a_personal_accuracy_only_when_nothing_is_shared() -> None:
    fed = table()
    assert fed.evaluate(state_of(fed)).personal_accuracy is None
    fed = table(method=LocalOnly())
    assert fed.evaluate(state_of(fed)).personal_accuracy == pytest.approx(0.6)


def test_personal_tests_without_a_common_one() -> None:
    fed = table(None, client_tests={"a": (LOGITS, LABELS)})
    found = fed.evaluate(state_of(fed))
    assert (found.accuracy, found.loss) == (None, None)
    assert found.personal_accuracy == pytest.approx(0.6)


def test_personal_models_keep_their_waiting_layers_within_a_cycle() -> None:
    """After the third round of FedLAMA(phi=2) some layers wait: a client's personal model has its own."""
    fed = cases.federation(FedLAMA(phi=2), model="small", cohort="all")
    *_, (state, record) = fed.run(3)
    assert not record.in_sync
    scores = []
    for client, name in ((0, "ann"), (4, "eve")):
        waiting = state.clients.get(client).row.method.waiting
        assert waiting
        model = fed.model
        model.load_state_dict(state.params | waiting)
        x, y = cases.data().client_tests[name]
        scores.append(float((model(x).argmax(1) == y).double().mean()))
    assert record.personal_accuracy == pytest.approx(sum(scores) / 2)


def test_personal_models_begin_from_what_the_downlink_delivers() -> None:
    """plan.params is the global model as clients decode it, in the plan of an evaluation too."""
    seen: list[Any] = []

    class Watch(FedLAMA):
        def begin(self, client: Any, plan: Any, params: Any) -> Any:
            seen.append((plan.round, cases.bits(plan.params)))
            return super().begin(client, plan, params)

    fed = cases.federation(Watch(phi=1), model="small", downlink=wire.Dense("int8"))
    cases.states(fed, 2)
    assert len({str(bits) for t, bits in seen if t == 1}) == 1  # in the evaluation after round 0, and in round 1


def test_evaluation_is_in_eval_mode_and_without_augmentation() -> None:
    """With the dropout of `Table` on, hardly any output would be its input."""
    from lamina.data.transform import Images

    fed = table()
    state = state_of(fed)
    assert fed.evaluate(state) == fed.evaluate(state)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (6, 8, 8, 1), generator=generator, dtype=torch.uint8)
    y = torch.arange(6) % 4
    given = []

    class Watched(Images):
        def __call__(self, x: Any, generator: Any) -> Any:
            given.append(generator is None)
            return super().__call__(x, generator)

    data = ClientData.from_clients({"a": (x, y)}, test=(x, y), transform=Watched((0.5,), (0.5,), crop=1, flip=True))
    fed = Federation(cases.odd, data, engine="loop")
    state = cases.states(fed, 1, evaluate_every=9)[-1]
    given.clear()
    fed.evaluate(state)
    assert given == [True]


@pytest.mark.parametrize("engine", ["loop", "processes", "threads"])
@pytest.mark.parametrize("model", ["small", "odd"])
def test_every_engine_gives_the_same_evaluation(model: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of the test set are worth the same wherever they are computed: also when the forward pass of `Odd` leaves
    a value behind that the next one adds to its output."""
    monkeypatch.setattr(evaluate, "_PIECE", 7)
    _, expected = cases.finish(cases.federation(FedLAMA(phi=2), model), 3)
    _, records = cases.finish(cases.federation(FedLAMA(phi=2), model, engine=engine, workers=2), 3)
    for mine, other in zip(records, expected, strict=True):
        assert (mine.accuracy, mine.personal_accuracy) == (other.accuracy, other.personal_accuracy)
        assert mine.loss == pytest.approx(other.loss, rel=0 if engine == "processes" else 1e-5)


def test_scores_add_up() -> None:
    total = Score.total([Score(1.5, 2, 1, 2), Score(0.5, 3, 2, 3)])
    assert total == Score(2.0, 5, 3, 5)
    assert total.accuracy == 0.6
    assert Score(1.0, 5, 0, 0).accuracy is None


def test_a_loss_is_cross_entropy_or_a_function() -> None:
    assert loss_function("cross_entropy") is nn.functional.cross_entropy
    assert loss_function(max) is max
    with pytest.raises(ConfigError, match="loss='mse': expected 'cross_entropy' or a function"):
        loss_function("mse")
