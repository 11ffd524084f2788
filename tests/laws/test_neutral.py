"""Law: a method in its neutral setting is FedAvg, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

import cases
import lamina
from lamina import LocalSGD, wire

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum, everybody": {"local": LocalSGD(lr=0.05, momentum=0.9, batch_size=8), "cohort": "all"},
    "uniform, decay, clip, schedule": {
        "local": LocalSGD(lr=0.2, weight_decay=0.01, clip=0.5, steps=3, batch_size=8, schedule="exp:0.9"),
        "weights": "uniform",
        "cohort": 2,
    },
    "float64": {"model": "double"},
    "fp16 downlink, personal buffers": {"downlink": wire.Dense("fp16"), "buffers": "keep"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_neutral_settings_are_fedavg_bit_for_bit(setting: str) -> None:
    options = SETTINGS[setting]
    plain, records = cases.finish(cases.federation(lamina.FedAvg(), **options), 3)
    for name, make in cases.NEUTRAL.items():
        state, own = cases.finish(cases.federation(make(), **options), 3)
        assert state.sha256() == plain.sha256(), name
        assert cases.bits(state.params) == cases.bits(plain.params), name
        assert [(r.accuracy, r.loss, r.train_loss) for r in own] == [
            (r.accuracy, r.loss, r.train_loss) for r in records
        ], name
        assert (state.bytes_up, state.bytes_down) == (plain.bytes_up, plain.bytes_down), name


def test_no_method_is_fedavg() -> None:
    plain, _ = cases.finish(cases.federation(lamina.FedAvg()), 2)
    assert cases.everything(cases.finish(cases.federation(None), 2)[0]) == cases.everything(plain)


def test_every_method_has_a_case_and_every_neutral_one_its_setting() -> None:
    assert cases.METHODS.keys() == lamina.METHODS.keys()
    for name, make in cases.METHODS.items():
        assert type(make()) is lamina.METHODS[name]
        if make().neutral:
            assert name in cases.NEUTRAL, f"{name} declares a neutral setting: add it to cases.NEUTRAL"
    assert all(make().neutral for make in cases.NEUTRAL.values())
