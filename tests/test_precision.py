"""bf16: what is computed in it and what is not, and that engines agree under it as they do without."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import cases
import lamina
from lamina import ConfigError, FedAvg, Federation, LocalSGD, Params, Plan, State
from lamina.config import build, load
from lamina.engine import processes
from lamina.engine.stack import Vmapped

forked = pytest.mark.skipif(not processes.available(), reason="no fork here")
BF16 = LocalSGD(lr=0.1, batch_size=8, momentum=0.9, precision="bf16")


@pytest.mark.parametrize("value", ["float16", "FP32", None, 16])
def test_an_unknown_precision_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="expected one of fp32, tf32, bf16") as caught:
        LocalSGD(precision=value)
    assert (caught.value.code, caught.value.where) == ("E101", "local.precision")


def test_it_is_a_key_like_any_other_and_stands_in_the_run() -> None:
    config = load("quickstart", ["local.precision=bf16"], {})
    assert build(config).local.precision == "bf16"
    assert config.settings["local.precision"] == "bf16"  # a run that has begun cannot go on with another
    assert config.sha256 != load("quickstart", [], {}).sha256
    with pytest.raises(ConfigError, match=r"local\.precision: expected .*fp32.*got 'half'") as caught:
        load("quickstart", ["local.precision=half"], {})
    assert caught.value.code == "E103"


class Watched(nn.Module):
    """Notes the precision of what its first layer gives, in training and in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 6), nn.Linear(6, 4)
        self.seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        self.seen[self.training].add(x.dtype)
        return self.second(torch.relu(x))


class Sees(FedAvg):
    """What `correct` is given."""

    seen: ClassVar[set[torch.dtype]] = set()

    def correct(self, client: Any, plan: Plan, step: Tensor, params: Params, grads: Params) -> Params:
        Sees.seen |= {x.dtype for tree in (params, grads) for x in tree.values()}
        return grads


@pytest.mark.parametrize("engine", ["loop", "threads"])
def test_the_step_is_in_bf16_and_nothing_else_is(engine: str) -> None:
    fed = Federation(Watched, cases.data(), method=Sees(), engine=engine, local=BF16)
    for state, record in fed.run(2):
        assert {x.dtype for x in state.params.values()} == {torch.float32}
        assert record.bytes_up == record.fedavg_up
    assert fed._trainer.model.seen == {True: {torch.bfloat16}, False: {torch.float32}}
    assert Sees.seen == {torch.float32}


def test_the_loss_is_not_rounded_to_bf16() -> None:
    fed = cases.federation(model="small", local=BF16)
    x, y = fed._trainer.batch(torch.arange(8), None)
    grads, loss = fed._trainer.gradient(x, y)
    assert {t.dtype for t in (*grads, loss)} == {torch.float32}
    assert loss != loss.bfloat16()


def test_bf16_changes_the_result_and_little() -> None:
    """Eight bits of a mantissa: a round differs by more than fp32's rounding and by far less than a step."""
    one = cases.states(cases.federation(model="small", local=LocalSGD(lr=0.1, batch_size=8)), 1)[-1]
    two = cases.states(cases.federation(model="small", local=LocalSGD(lr=0.1, batch_size=8, precision="bf16")), 1)[-1]
    assert 1e-5 < gap(one, two) < 1e-2


def gap(one: State, other: State) -> float:
    """The largest difference of two entries."""
    return max(float((other.params[name] - x).abs().max()) for name, x in one.params.items())


@forked
@pytest.mark.parametrize("name", ["fedavg", "scaffold", "errorfeedback", "ssfl, fedlama", "lips"])
@pytest.mark.parametrize("model", ["small", "odd"])
def test_processes_give_the_bits_of_loop_in_bf16(name: str, model: str) -> None:
    local = LocalSGD(lr=0.1, batch_size=8, precision="bf16")
    state, records = cases.finish(cases.case(name, model=model, local=local))
    for workers in (1, 2):
        fed = cases.case(name, model=model, local=local, engine="processes", workers=workers)
        other, others = cases.finish(fed)
        assert cases.everything(other) == cases.everything(state)
        assert others == records


def test_nothing_is_written_out_in_bf16_and_the_reason_says_so() -> None:
    fed = cases.federation(model="small", engine="stacked", cohort="all", workers=1, local=BF16)
    assert fed.engine == "stacked"
    assert isinstance(fed._stack.gradient, Vmapped)
    assert "only fp32 is written out, not bf16" in fed.engine_reason
    data = lamina.data.digits(clients=32, partition="iid")
    assert Federation(lamina.models.mlp((64, 32, 10)), data).engine == "stacked"
    assert Federation(lamina.models.mlp((64, 32, 10)), data, local=BF16).engine != "stacked"


def test_stacked_agrees_with_loop_to_bf16s_rounding() -> None:
    local = LocalSGD(lr=0.1, batch_size=8, precision="bf16")
    one = cases.states(cases.federation(model="small", cohort="all", local=local), 2)[-1]
    two = cases.states(cases.federation(model="small", cohort="all", engine="stacked", workers=1, local=local), 2)[-1]
    plain = cases.states(cases.federation(model="small", cohort="all", local=LocalSGD(lr=0.1, batch_size=8)), 2)[-1]
    assert gap(two, one) < 1e-2
    assert gap(two, plain) > 1e-5


def test_a_model_that_fails_in_bf16_is_told_before_anything_is_trained() -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x.flatten(1))
            if x.dtype != torch.float32:
                raise TypeError("float32 alone")
            return x

    assert Federation(Strict, cases.data()).engine
    with pytest.raises(ConfigError, match="float32 alone") as caught:
        Federation(Strict, cases.data(), local=BF16)
    assert caught.value.code == "E121"
