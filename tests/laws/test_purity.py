"""Law: a hook changes nothing it was given, keeps nothing in the method, and draws from no global generator."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
from lamina import FedAvg, Message, Method, Params, Plan, RunError, Task, Work
from lamina.tree import tmap

FLAGS = (
    "hold",
    "sends",
    "uniform",
    "needs_moments",
    "rounds",
    "withholds",
    "neutral",
    "alone",
    "optimises",
    "encodes",
    "compensates",
    "masks",
    "measures",
    "controls",
    "shocks",
)


def picture(value: Any) -> Any:
    """A value to the bit, to be compared later."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.detach().clone().contiguous().reshape(-1).tolist()
    if isinstance(value, dict):
        return {key: picture(x) for key, x in value.items()}
    if isinstance(value, tuple):
        return tuple(picture(x) for x in value)
    if is_dataclass(value):
        return {f.name: picture(getattr(value, f.name)) for f in fields(value)}
    return value


class Checked(Method[Any, Any]):
    """Another method whose every hook is given copies, which must come back unchanged."""

    def __init__(self, inner: Method[Any, Any]):
        self.inner = inner
        self.called: set[str] = set()
        for flag in FLAGS:
            setattr(self, flag, getattr(inner, flag))

    def has(self, hook: str) -> bool:
        return self.inner.has(hook)

    def bind(self, task: Task) -> Checked:
        bound = Checked(self.inner.bind(task))
        bound.called = self.called
        return bound

    def _call(self, hook: str, *arguments: Any) -> Any:
        given = copy.deepcopy(arguments)
        own = picture(vars(self.inner))
        drawn = torch.default_generator.get_state()
        result = getattr(self.inner, hook)(*given)
        assert picture(given) == picture(arguments), f"{self.inner!r}.{hook} changed its arguments"
        assert picture(vars(self.inner)) == own, f"{self.inner!r}.{hook} changed the method"
        assert torch.equal(torch.default_generator.get_state(), drawn), f"{self.inner!r}.{hook} drew random numbers"
        self.called.add(hook)
        return result

    def init(self, params: Params) -> Any:
        return self._call("init", params)

    def init_client(self, params: Params) -> Any:
        return self._call("init_client", params)

    def probe(self, params: Params, grads: Params) -> Message:
        return self._call("probe", params, grads)

    def setup(self, server: Any, params: Params, mean: Message) -> tuple[Params, Any]:
        return self._call("setup", server, params, mean)

    def plan(self, server: Any, plan: Plan) -> Plan:
        return self._call("plan", server, plan)

    def begin(self, client: Any, plan: Plan, params: Params) -> Params:
        return self._call("begin", client, plan, params)

    def correct(self, client: Any, plan: Plan, step: Tensor, params: Params, grads: Params) -> Params:
        return self._call("correct", client, plan, step, params, grads)

    def report(self, client: Any, plan: Plan, work: Work, message: Message) -> tuple[Message, Any]:
        return self._call("report", client, plan, work, message)

    def settle(self, client: Any, sent: Message, received: Message) -> Any:
        return self._call("settle", client, sent, received)

    def step(self, server: Any, plan: Plan, mean: Message) -> tuple[Message, Any]:
        return self._call("step", server, plan, mean)

    def absorb(self, server: Any, sent: Message, received: Message) -> Any:
        return self._call("absorb", server, sent, received)

    def observe(self, server: Any) -> Any:
        return self._call("observe", server)


@pytest.mark.parametrize("name", cases.ALL)
def test_hooks_change_nothing_they_were_given(name: str) -> None:
    """And they look at values only: copies of their arguments give the same run."""
    expected = cases.everything(cases.states(cases.case(name), 4)[-1])
    method = Checked(cases.ALL[name]())
    state = cases.states(cases.federation(method, **cases.OPTIONS.get(name, {})), 4)[-1]
    assert cases.everything(state) == expected
    assert {"init", "init_client", "setup", "plan", "begin", "report", "settle", "step"} <= method.called


class Careless(FedAvg):
    """Changes what it was given, in one hook."""

    def __init__(self, hook: str):
        object.__setattr__(self, "hook", hook)

    def report(self, client: Any, plan: Plan, work: Work, message: Message) -> tuple[Message, Any]:
        if self.hook == "report":
            message["update"]["head.bias"].zero_()
        return message, client

    def correct(self, client: Any, plan: Plan, step: Tensor, params: Params, grads: Params) -> Params:
        if self.hook == "correct":
            tmap(lambda g: g.mul_(2), grads)
        if self.hook == "draw":
            torch.rand(1)
        return grads

    def step(self, server: Any, plan: Plan, mean: Message) -> tuple[Message, Any]:
        if self.hook == "step":
            mean.pop("moments")
        if self.hook == "self":
            object.__setattr__(self, "hook", "other")
        return mean, server


@pytest.mark.parametrize("hook", ["report", "correct", "step", "self", "draw"])
def test_the_law_notices_a_careless_method(hook: str) -> None:
    with pytest.raises((AssertionError, RunError), match=r"changed|drew"):  # an engine may wrap what a client raises
        cases.states(cases.federation(Checked(Careless(hook))), 1)


@pytest.mark.parametrize("name", cases.ALL)
@pytest.mark.parametrize("engine", ["loop", "processes"])
def test_a_round_leaves_the_states_before_it_as_they_were(name: str, engine: str) -> None:
    if engine == "processes" and name not in ("fedlama, scaffold", "errorfeedback, fedavgm"):
        return  # the server's half is the same code: two are enough
    kept = []
    for state, _ in cases.case(name, engine=engine, workers=2).run(4):
        kept.append((state, cases.everything(state)))
    for state, before in kept:
        assert cases.everything(state) == before


def test_the_model_and_the_data_given_stay_as_they_were() -> None:
    model = cases.odd().train()
    before = cases.bits(dict(model.state_dict())), model.training
    x, y = cases.data().x, cases.data().y
    examples = picture((x, y))
    from lamina import Federation, LocalSGD

    cases.states(Federation(model, cases.data(), engine="loop", local=LocalSGD(batch_size=8)), 1)
    assert (cases.bits(dict(model.state_dict())), model.training) == before
    assert picture((x, y)) == examples
