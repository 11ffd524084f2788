"""A model and its data, looked at before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

from lamina.data import ClientData
from lamina.data.transform import Batch
from lamina.errors import ConfigError
from lamina.evaluate import loss_function
from lamina.inspect.budget import LARGE, Budget, budget
from lamina.inspect.checks import Finding, of_embeddings, of_model, of_width, ordered, repeatable
from lamina.inspect.data_checks import of_data, one_in
from lamina.inspect.table import Rest, Row, rest, rows, seen
from lamina.preflight import ready
from lamina.training import LocalSGD, Loss, addressed_rng

Buffers = Literal["average", "keep", "skip"]


@dataclass(frozen=True)
class Inspection:
    """Attributes:
    stages, tensors: the layer table by stage, and by parameter tensor.
    policy: for the model's buffers.
    findings: what the checks say, warnings first.
    fine: what they looked for and did not find, in words.
    budget: bytes per method and codec; None where it was not made, and `skipped` says why.
    """

    title: str
    params: int
    bytes: int
    dtypes: tuple[str, ...]
    stages: tuple[Row, ...]
    tensors: tuple[Row, ...]
    rest: Rest
    policy: Buffers
    findings: tuple[Finding, ...]
    fine: tuple[str, ...]
    budget: Budget | None
    skipped: str


def inspection(
    model: nn.Module,
    data: ClientData | None = None,
    *,
    example: Batch | None = None,
    made_up: ClientData | None = None,
    title: str = "",
    local: LocalSGD | None = None,
    loss: Literal["cross_entropy"] | Loss = "cross_entropy",
    buffers: Buffers = "average",
    seed: int = 0,
    rounds: int | None = None,
    cohort: int | None = None,
    forecast: bool | None = None,
) -> Inspection:
    """What there is to know of a model before it is trained. The model is left as it is.

    Args:
        data: of its clients; without it nothing is said of data.
        example: one batch that it is called with; where it is None, the data's first two examples.
        made_up: examples without meaning, to train on where there is no data.
        title: of the model.
        local, loss, buffers, seed: as in `lamina.Federation`.
        rounds, cohort: of the run that bytes are forecast for; None: 200, and ten clients if there are so many.
        forecast: whether to; None: unless the model is large.

    Raises:
        ConfigError: E111 for a module that is not initialised, E121 when the model fails on a batch, with the layer
            and the shapes.
    """
    local = local or LocalSGD()
    held = data if data is not None else made_up
    judge = loss_function(loss)
    if held is not None:
        # lazily initialised modules, and a model that fails, are named here
        ready(copy.deepcopy(model), judge, held, local, seed)
    if example is None and held is not None:
        example = held.transform(held.examples(held.indices[:2])[0], None)
    looked = seen(model, example)
    stages, others = rows(model, looked), rest(model)
    findings = [*of_model(model, stages, looked, others, buffers, example)]
    if held is not None:
        with addressed_rng(seed, "trial"):
            x, y = held.examples(held.indices[:2])
            findings += repeatable(model, judge, held.transform(x, None), y)
    if data is not None:
        findings += [*of_width(stages, data), *of_embeddings(model, data), *of_data(data, local.batch_size)]
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    size = sum(p.numel() for p in params.values())
    made, skipped = _budget(model, held, size, forecast, local=local, loss=loss, buffers=buffers, seed=seed,
                            rounds=rounds, cohort=cohort)  # fmt: skip
    found = ordered(findings)
    return Inspection(
        title or type(model).__name__,
        size,
        sum(p.numel() * p.element_size() for p in params.values()),
        tuple(dict.fromkeys(_word(p) for p in params.values())),
        tuple(stages),
        tuple(rows(model, looked, every=True)),
        others,
        buffers,
        tuple(found),
        tuple(_fine(found, others, params.values(), data)),
        made,
        skipped,
    )


def _budget(
    model: nn.Module, held: ClientData | None, size: int, wanted: bool | None, **options: Any
) -> tuple[Budget | None, str]:
    if wanted is False:
        return None, ""
    if held is None:
        return None, "no examples to train on: --data, or --input with the shape of one example"
    if wanted is None and size > LARGE:
        return None, f"{size:,} parameters take minutes: --forecast makes it"
    try:
        return budget(model, held, **options), ""
    except ConfigError as error:
        if wanted:
            raise
        return None, error.message


def _word(p: Tensor) -> str:
    name = str(p.dtype).removeprefix("torch.")
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}.get(name, name)


def _fine(found: Sequence[Finding], others: Rest, params: Any, data: ClientData | None) -> list[str]:
    codes = {finding.code for finding in found}
    said = []
    if not others.norms:
        said.append("no running statistics")
    if not others.tied:
        said.append("no tied weights")
    if not others.frozen:
        said.append("nothing is frozen")
    words = {_word(p) for p in params}
    if len(words) == 1:
        said.append(f"{words.pop()} only")
    if data is not None and "W310" not in codes:
        partly = "" if (step := one_in(data)) == 1 else f" (looked at one example in {step})"
        copies = f"no duplicates across clients, no test examples in training{partly}"
        said.append(f"no short or single-class clients, {copies}")
    return said


def of_target(target: Any, forecast: bool | None = None) -> Inspection:
    """The same for what a command line names (`lamina.inspect.target.found`)."""
    from lamina import config as configs

    config = target.config
    return inspection(
        target.model,
        target.data,
        example=target.example,
        made_up=target.made_up,
        title=target.title,
        local=configs.local_of(config),
        loss=configs.loss_of(config),
        buffers=cast("Buffers", config.buffers),
        seed=config.seed,
        rounds=config.rounds if target.given else None,
        cohort=None if not target.given else len(target.data) if config.cohort == "all" else config.cohort,
        forecast=forecast,
    )
