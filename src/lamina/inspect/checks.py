"""What `lamina inspect` says of a model: each with its code, the figure, the reason and the remedy."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lamina import wire
from lamina.advice import CODES, FIELD, NORM, AdviceList, guidelines
from lamina.data import ClientData
from lamina.data.transform import Batch
from lamina.inspect.table import Rest, Row, Seen
from lamina.training import Loss, addressed_rng

HEAVY = 0.5  # share of the bytes above which a stage is worth a word
HEADER = 0.1  # of a layer's values
ROWS = 0.5  # share of an embedding's rows below which a client touches few of them
_LOOKED_AT = 8  # clients, for the rows of embeddings
_AT_ONCE = 64  # of their examples
_NAMED = 4


class Finding(NamedTuple):
    """One thing worth knowing. W: it may be wrong; G: it may be done better; I: information."""

    code: str
    figure: str  # what was found, with numbers
    reason: str
    remedy: str
    where: tuple[str, ...] = ()  # layers, buffers or clients


def named(names: Sequence[str]) -> str:
    """The first few of them."""
    if len(names) <= _NAMED:
        return ", ".join(names)
    return f"{', '.join(names[: _NAMED - 1])}, ... {names[-1]} ({len(names)} in all)"


def of_model(
    model: nn.Module, rows: Sequence[Row], looked: Seen, rest: Rest, buffers: str, example: Batch | None
) -> Iterator[Finding]:
    """The checks that need the model alone.

    Args:
        rows: a row per stage.
        buffers: the policy: "average", "keep" or "skip".
        example: one batch; None leaves out what must be run.
    """
    advice = guidelines(model, example) if example is not None else AdviceList()
    yield from _norms(rest, buffers, advice)
    yield from _counters(rest, buffers)
    yield from _tied(rest)
    yield from _heavy(rows)
    yield from _small(model)
    yield from _fields(rows, looked, advice)
    yield from _guided(advice)
    yield from _frozen(model, rest)


def _norms(rest: Rest, buffers: str, advice: AdviceList) -> Iterator[Finding]:
    if rest.norms and buffers == "average":
        own = next((a.change for a in advice if a.guideline == NORM), "")
        yield Finding(
            "W101",
            f"running statistics of {rest.norms} norm{'s' * (rest.norms > 1)} ({rest.statistics:,} floats) "
            "are averaged",
            "each client normalises by its own batches; under label skew their mean describes nobody's data",
            own or "buffers=keep, or a norm without running statistics such as nn.GroupNorm",
        )


def _counters(rest: Rest, buffers: str) -> Iterator[Finding]:
    other = [name for name in rest.counters if not name.endswith("num_batches_tracked")]
    if other and buffers == "average":
        yield Finding(
            "W103",
            f"{len(other)} integer or bool buffers would be averaged: {named(other)}",
            "lamina takes their maximum, which is right for counters only",
            "buffers=keep (each client its own), buffers=skip (as at the start), or register_buffer(persistent=False)",
            tuple(other),
        )


def _tied(rest: Rest) -> Iterator[Finding]:
    if rest.tied:
        pairs = [f"{name} is {first}" for name, first, _ in rest.tied]
        yield Finding(
            "W105",
            f"{len(rest.tied)} tied weights, sent once: {sum(n for *_, n in rest.tied):,} B less per message: "
            + named(pairs),
            "two names of the model are one tensor",
            "nothing; if it was not meant, copy the tensor",
            tuple(name for name, *_ in rest.tied),
        )


def _heavy(rows: Sequence[Row]) -> Iterator[Finding]:
    largest = max(rows, key=lambda row: row.share, default=None)
    if largest is not None and largest.share > HEAVY and len(rows) > 1:
        yield Finding(
            "G204",
            f"{largest.group} is {100 * largest.share:.1f} % of every message",
            f"sending it every 2nd round saves {50 * largest.share:.1f} %",
            "method=fedlama or method=fedluar decide this themselves",
            (largest.group,),
        )


def _small(model: nn.Module) -> Iterator[Finding]:
    """Under int8, the cheapest codec that sends every value: what a layer costs beside its values."""
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    if not params:
        return
    sizes = wire.Dense("int8").transmit(params, wire.Context(wire.schema_of(params)))[1]
    small = [name for name, p in params.items() if sizes.rows.get(name, 0) >= (1 + HEADER) * p.numel()]
    if small:
        share = sum(sizes.rows[name] for name in small) / max(1, sizes.total)
        yield Finding(
            "G205",
            f"{len(small)} of {len(params)} tensors cost 10 % or more beside their values under int8; "
            f"together they are {100 * share:.1f} % of the message",
            "every coded tensor has a scale, and a bias of ten entries has little else",
            "usually nothing; where a model consists of such tensors, leave uplink=lossless",
            tuple(small),
        )


def _fields(rows: Sequence[Row], looked: Seen, advice: AdviceList) -> Iterator[Finding]:
    if looked.side is None:
        return
    beyond = [row for row in rows if row.field is not None and row.field > looked.side]
    if beyond:
        own = [a for a in advice if a.guideline == FIELD and a.layer.startswith(beyond[0].group)]
        change = f"{own[-1].layer}: {own[-1].change}" if own else "smaller kernels, or strides later on"
        yield Finding(
            "G207",
            f"receptive field ({beyond[0].field}) exceeds the input ({looked.side}) from {beyond[0].group} on",
            "what lies beyond the border is padding, and large fields go with more divergence between clients",
            change,
            tuple(row.group for row in beyond),
        )


def _guided(advice: AdviceList) -> Iterator[Finding]:
    """The guidelines for deeper models, one finding for all layers of a guideline."""
    done = (FIELD, NORM)
    for guideline in dict.fromkeys(a.guideline for a in advice if a.guideline not in done):
        own = [a for a in advice if a.guideline == guideline]
        layers = [a.layer for a in own]
        why = own[0].why if len(own) == 1 else f"{layers[0]}: {own[0].why}"
        yield Finding(CODES[guideline], f"{guideline}: {named(layers)}", why, own[0].change, tuple(layers))


def _frozen(model: nn.Module, rest: Rest) -> Iterator[Finding]:
    if rest.frozen:
        frozen = sum(rest.frozen.values())
        total = sum(p.numel() for p in model.parameters())
        yield Finding(
            "G220",
            f"{frozen:,} of {total:,} parameters are frozen: {100 * (1 - frozen / total):.1f} % train and travel",
            "frozen parameters are the same everywhere, and are sent neither up nor down",
            "nothing; if it was not meant, requires_grad_(True)",
            tuple(rest.frozen),
        )


# ---- what must be run


def repeatable(model: nn.Module, loss: Loss, x: Batch, y: Batch) -> Iterator[Finding]:
    """Operations of a training step that torch knows to give other bits from time to time."""
    twin = copy.deepcopy(model).train()
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings(record=True) as said, addressed_rng(0, "trial"):
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            out = twin(**x) if isinstance(x, Mapping) else twin(x)
            torch.autograd.grad(loss(out, y), [p for p in twin.parameters() if p.requires_grad], allow_unused=True)
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    texts = [str(w.message) for w in said if "deterministic" in str(w.message)]
    operations = sorted({text.split()[0] for text in texts})
    if operations:
        yield Finding(
            "W112",
            f"not deterministic: {named(operations)}",
            "two runs with the same seed may differ, and `lamina verify --wire` cannot repeat one",
            texts[0].split(". ")[0],
            tuple(operations),
        )


def of_width(rows: Sequence[Row], data: ClientData) -> Iterator[Finding]:
    median = int(data.sizes.median())
    wide = [row for row in rows if row.width is not None and row.width > median]
    if wide:
        yield Finding(
            "G208",
            f"{wide[0].group} has {wide[0].width} outputs, the median client {median} examples",
            "a client with fewer examples than channels fits noise with what is left over",
            "a narrower model, or more examples per client",
            tuple(row.group for row in wide),
        )


def of_embeddings(model: nn.Module, data: ClientData) -> Iterator[Finding]:
    """How many rows of each embedding the examples of one client touch."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    if not found:
        return
    twin = copy.deepcopy(model).eval()
    touched: dict[str, set[int]] = {}
    shares: dict[str, list[float]] = {name: [] for name in found}
    for name in found:
        twin.get_submodule(name).register_forward_pre_hook(_noting(touched, name), with_kwargs=True)
    for client in data.here[:_LOOKED_AT]:
        touched.clear()
        held = data.indices_of(client)
        for some in torch.tensor_split(held, -(-len(held) // _AT_ONCE) or 1):
            with torch.no_grad(), addressed_rng(0, "trial"):
                x = data.transform(data.examples(some)[0], None)
                twin(**x) if isinstance(x, Mapping) else twin(x)
        for name, rows in touched.items():
            shares[name].append(len(rows) / found[name].num_embeddings)
    for name, own in shares.items():
        if own and (mean := sum(own) / len(own)) < ROWS and found[name].weight.requires_grad:
            yield Finding(
                "G210",
                f"a client touches {100 * mean:.1f} % of the {found[name].num_embeddings:,} rows of {name}",
                "the other rows get no gradient, and sent dense they travel as zeros",
                "uplink=lossless makes runs of zeros cheap; uplink=topk:0.1 leaves them out",
                (name,),
            )


def _noting(touched: dict[str, set[int]], name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows: Tensor = args[0] if args else kwargs["input"]
        touched.setdefault(name, set()).update(torch.unique(rows).tolist())

    return hook


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Warnings first, then guidance, then information."""
    return sorted(findings, key=lambda f: ("WGI".index(f.code[0]), f.code))
