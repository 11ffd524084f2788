"""A forecast beside the run it is of."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from lamina import (
    SSFL,
    ClientData,
    ErrorFeedback,
    FedAvg,
    Federation,
    FedLAMA,
    FedLUAR,
    LocalSGD,
    Method,
    RunError,
    Scaffold,
    cli,
    robust,
    wire,
)
from lamina.inspect import forecast
from lamina.inspect.forecasts import count, decides, fixed
from lamina.inspect.stand_in import StandIn, chosen
from lamina.models import mlp
from lamina.preflight import ready
from lamina.random import generator

ROUNDS = 12


def data(image: bool = False) -> ClientData:
    """Nine clients of 8 to 40 examples in four classes that can be told apart."""
    source = generator(0, "forecast data")
    sizes = [8, 12, 16, 20, 24, 28, 32, 36, 40]
    centres = torch.randn((4, 24), generator=source)
    parts = {}
    for i, n in enumerate(sizes):
        y = torch.randint(4, (n,), generator=source)
        x = centres[y] + torch.randn((n, 24), generator=source)
        parts[str(i)] = (x.view(n, 1, 4, 6) if image else x, y)
    return ClientData.from_clients(parts)


def small() -> nn.Module:
    return mlp((24, 48, 32, 4))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(24 * 24, 4),
    )  # fmt: skip


def federation(
    method: Method[Any, Any] | None = None, uplink: str = "fp32", downlink: str = "fp32", *,
    image: bool = False, **options: Any,
) -> Federation:  # fmt: skip
    options = {"local": LocalSGD(lr=0.05, batch_size=8), "cohort": 4, "engine": "loop", **options}
    return Federation(
        conv if image else small, data(image), method=method, uplink=wire.parse(uplink),
        downlink=wire.Dense(downlink), **options,  # type: ignore[arg-type]
    )  # fmt: skip


def spent(fed: Federation, rounds: int) -> tuple[int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        *_, (state, _) = fed.run(rounds, evaluate_every=rounds)
    return state.bytes_up, state.bytes_down


# ---- fixed sizes


@pytest.mark.parametrize("method", [FedAvg(), Scaffold()], ids=repr)
@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_what_depends_on_no_value_is_forecast_to_the_byte(method: Method[Any, Any], codec: str) -> None:
    made = forecast(federation(method, codec), ROUNDS)
    up, down = spent(federation(method, codec), ROUNDS)
    assert made.up == (up, up)
    assert made.down == (down, down)
    assert made.why == ""
    assert made.counted == made.rounds == ROUNDS


def test_newcomers_are_counted_as_in_the_run() -> None:
    """SSFL's mask travels to each client once, when it is first drawn, and 9 clients come in one by one."""
    made = forecast(federation(SSFL(density=0.4), cohort=2), 4)
    up, down = spent(federation(SSFL(density=0.4), cohort=2), 4)
    assert made.up.low <= up <= made.up.high
    assert made.down.middle == pytest.approx(down, rel=0.01)


def test_fedavg_beside_it_is_exact() -> None:
    made = forecast(federation(FedLAMA(phi=2), "topk:0.1"), 6)
    assert (made.fedavg_up, made.fedavg_down) == spent(federation(), 6)


# ---- sizes that depend on values


@pytest.mark.parametrize(
    ("method", "codec", "within"),
    [(FedAvg(), "lossless", 0.05), (FedLAMA(phi=2), "fp32", 0.15), (FedLUAR(recycle=1), "fp32", 0.15)],
    ids=repr,
)
def test_what_depends_on_values_is_forecast_nearly(method: Method[Any, Any], codec: str, within: float) -> None:
    made = forecast(federation(method, codec), ROUNDS)
    up, down = spent(federation(method, codec), ROUNDS)
    assert made.up.middle == pytest.approx(up, rel=within)
    assert made.down.middle == pytest.approx(down, rel=within)
    assert not made.up.exact
    assert "depend" in made.why or "chooses" in made.why


@pytest.mark.slow
@pytest.mark.parametrize("image", [False, True], ids=["mlp", "conv"])
@pytest.mark.parametrize("codec", ["fp32", "lossless", "int8", "topk:0.05"])
@pytest.mark.parametrize(
    "method", [FedAvg(), ErrorFeedback(), SSFL(density=0.4), FedLAMA(phi=4), FedLUAR(recycle=1)], ids=repr
)
def test_forecasts_of_five_methods_four_codecs_and_two_models(
    method: Method[Any, Any], codec: str, image: bool
) -> None:
    """5 % for methods that do the same whatever the data, 15 % for those that decide by what they measure."""
    downlink = "lossless" if codec == "lossless" else "fp32"
    made = forecast(federation(method, codec, downlink, image=image), 24)
    up, down = spent(federation(method, codec, downlink, image=image), 24)
    within = 0.15 if method.withholds else 0.05
    assert made.up.middle == pytest.approx(up, rel=within)
    assert made.down.middle == pytest.approx(down, rel=within)


def test_a_codec_is_tried_to_know_whether_its_sizes_follow_from_the_shapes() -> None:
    fed = federation()
    trainer = ready(fed.model, fed.loss, fed.data, fed.local, fed.seed)
    stand_in = StandIn(trainer, fed.setup, None, 1, 0.0, 0)
    count(fed, 1, stand_in)
    (sample,) = stand_in.samples
    named = {text: fixed(wire.parse(text), sample) for text in ("fp32", "fp16", "int8", "sign", "lossless")}
    assert named == {"fp32": True, "fp16": True, "int8": True, "sign": True, "lossless": False}
    assert decides(FedLAMA(phi=2))
    assert decides(FedLUAR())
    assert decides(SSFL())
    assert not decides(SSFL(score="random"))
    assert not decides(FedAvg())


# ---- how it is made


def test_the_two_clients_are_of_median_size() -> None:
    assert chosen(torch.tensor([5, 1, 9, 3, 7, 2])) == [3, 0]
    assert chosen(torch.tensor([5])) == [0]


def test_messages_of_some_clients_may_stand_for_the_others() -> None:
    def totals(each: int | None) -> tuple[int, int, int]:
        fed = federation()
        trainer = ready(fed.model, fed.loss, fed.data, fed.local, fed.seed)
        made = count(fed, 5, StandIn(trainer, fed.setup, None, 1, 0.0, 0), each=each)
        return made.up, made.down, made.steps

    assert totals(2) == totals(None)


def test_no_message_that_stands_for_others_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine clients of 8 to 40 examples, in batches of 8: each makes as many local steps as are its own."""
    seen = []
    going = Federation.round

    def round(*arguments: Any) -> Any:
        made = going(*arguments)
        seen.extend((c.refused, c.steps, -(-c.examples // 8)) for c in made[1].clients)
        return made

    monkeypatch.setattr(Federation, "round", round)
    fed = federation(Scaffold(), cohort="all", aggregate=robust.Median(), faults={"min_replies": 1.0})
    trainer = ready(fed.model, fed.loss, fed.data, fed.local, fed.seed)
    stand_in = StandIn(trainer, fed.setup, None, 1, 0.0, 0)
    made = count(fed, 3, stand_in, each=2)
    assert len(seen) == 3 * 9
    assert all(refused is None and steps == fed.local.epochs * due for refused, steps, due in seen)
    assert made.steps == sum(steps for _, steps, _ in seen)


def test_rounds_that_are_not_counted_are_like_the_later_half() -> None:
    fed = federation()
    trainer = ready(fed.model, fed.loss, fed.data, fed.local, fed.seed)
    some = count(fed, 10, StandIn(trainer, fed.setup, None, 1, 0.0, 0), most=4)
    assert some.counted == 4
    assert (some.up, some.down) == spent(federation(), 10)


def test_a_forecast_leaves_the_federation_as_it_was() -> None:
    fed, plain = federation(FedLAMA(phi=2)), federation(FedLAMA(phi=2))
    forecast(fed, 4)
    *_, (state, _) = fed.run(4)
    *_, (other, _) = plain.run(4)
    assert state.sha256() == other.sha256()
    assert state.bytes_up == other.bytes_up


def test_training_that_diverges_is_said_before_the_run() -> None:
    with pytest.raises(RunError, match="every message was refused"):
        forecast(federation(local=LocalSGD(lr=1e30, batch_size=8)), 4)


# ---- the command


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAMINA_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("COLUMNS", raising=False)
    return tmp_path / "runs"


QUICK = ("quickstart", "rounds=3", "model.widths=[64, 12, 10]", "local.epochs=1", "engine=loop")


def test_a_dry_run_says_what_a_run_will_cost_and_writes_nothing(root: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    result = CliRunner().invoke(cli.app, ["run", *QUICK, f"store=disk:{store}", "--dry-run"])
    assert result.exit_code == 0, result.output
    words = ("3 real rounds with 2 of 10 clients: ok", "B exactly", "B at most", "about 0:", "nothing was written")
    assert all(word in result.stdout for word in words)
    assert not root.exists()
    assert not store.exists()


def test_a_dry_run_as_an_object_and_the_run_agree(root: Path) -> None:
    result = CliRunner().invoke(cli.app, ["run", *QUICK, "--dry-run", "--json"])
    (said,) = map(json.loads, result.stdout.splitlines())
    CliRunner().invoke(cli.app, ["run", *QUICK, "--quiet"])
    info = json.loads((root / "quickstart" / "001-fedavg" / "run.json").read_text())
    assert said["up"] == {"low": info["bytes_up"], "high": info["bytes_up"]}
    assert said["down"] == {"low": info["bytes_down"], "high": info["bytes_down"]}
    assert said["written"] is False


def test_the_config_with_origins_stands_before_the_forecast(root: Path) -> None:
    result = CliRunner().invoke(cli.app, ["run", *QUICK, "--dry-run", "--show-config", "changed"])
    lines = result.stdout.splitlines()
    assert any(line.split()[:3] == ["rounds", "=", "3"] and "command line, argument 2" in line for line in lines)
    assert lines[-1].strip() == "nothing was written"
    origins = CliRunner().invoke(cli.app, ["run", *QUICK, "--show-config", "changed", "--json"]).stdout
    assert json.loads(origins)["origins"]["rounds"] == "command line, argument 2"


def test_what_a_codecs_name_says_of_it_has_an_origin_too() -> None:
    result = CliRunner().invoke(cli.app, ["run", *QUICK, "uplink=topk:0.02:sign", "--show-config", "changed"])
    said = {line.split(" = ")[0].strip(): " ".join(line.split()[2:]) for line in result.stdout.splitlines()}
    assert said["uplink.density"] == "0.02 command line, argument 6"
    assert said["uplink.values"] == "'sign' command line, argument 6"
