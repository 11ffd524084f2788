"""The layer table: what stands where in a model, what it sees, and what it costs on the wire."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lamina.data.transform import Batch
from lamina.layers import Layer, is_matrix, kind_of
from lamina.models.receptive_field import fields_of
from lamina.models.trace import Step, follow
from lamina.training import addressed_rng

_MOST_GROUPS = 24  # a group that is nearly the whole model is opened as long as there are no more
_NEARLY = 0.9


class Seen(NamedTuple):
    """What a batch shows of the parameters and modules, by name."""

    fields: dict[str, int]  # weight of a convolution -> receptive field, in pixels of the input
    sides: dict[str, tuple[int, int]]  # the same -> longest side of the map it reads and of the one it gives
    shapes: dict[str, tuple[int, ...]]  # module -> shape of its output, without the batch
    side: int | None  # longest side of the input, where there are convolutions


NOTHING = Seen({}, {}, {}, None)


class Row(NamedTuple):
    """A stage of the model, or one tensor of it. Bytes are of its trainable parameters, raw."""

    group: str
    kind: str
    out: str  # size of its output, e.g. "32x32"
    width: int | None  # output channels or features; None where that is no free choice
    field: int | None
    params: int
    bytes: int
    share: float  # of all bytes
    frozen: int  # parameters beside these


class Rest(NamedTuple):
    """What else is in the model."""

    norms: int  # modules with running statistics
    statistics: int  # their floats
    floats: dict[str, int]  # other float buffers -> entries
    counters: tuple[str, ...]  # integer and bool buffers
    unsaved: tuple[str, ...]  # in no state_dict: stay at each client
    tied: tuple[tuple[str, str, int], ...]  # further name, first name, bytes
    frozen: dict[str, int]  # frozen parameter -> entries


def seen(model: nn.Module, example: Batch | None) -> Seen:
    """What happens to a batch in eval mode. The model is left as it is.

    Raises:
        ConfigError: E121 for a model that cannot be followed.
    """
    if example is None:
        return NOTHING
    steps = follow(model, example).steps
    convs = [(i, s) for i, s in enumerate(steps, start=1) if s.what == "convolution" and s.weights]
    fields = fields_of(steps)
    return Seen(
        {name: fields[i].rf for i, step in convs for name in step.weights},
        {name: (step.side, step.left) for _, step in convs for name in step.weights},
        _shapes(model, example),
        _first_side(steps, [i for i, _ in convs]),
    )


def _first_side(steps: Sequence[Step], convs: Sequence[int]) -> int | None:
    return steps[convs[0] - 1].side if convs else None


def _shapes(model: nn.Module, example: Batch) -> dict[str, tuple[int, ...]]:
    """The shape of the first tensor that each module gives, without the batch."""
    found: dict[str, tuple[int, ...]] = {}
    twin = copy.deepcopy(model).eval()

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = next(_tensors(output), None)
            if tensor is not None:
                found.pop(name, None)  # the order is that of the last calls
                found[name] = tuple(tensor.shape[1:])

        return hook

    for name, module in twin.named_modules():
        module.register_forward_hook(note(name))
    with torch.no_grad(), addressed_rng(0, "trial"):
        twin(**example) if isinstance(example, Mapping) else twin(example)
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


# ---- rows


class _Part(NamedTuple):
    """A parameter and its module."""

    layer: Layer
    owner: str
    module: nn.Module
    trains: bool


def rows(model: nn.Module, looked: Seen, every: bool = False) -> list[Row]:
    """A row per stage; with `every`, one per tensor."""
    parts = _parts(model)
    total = sum(_bytes(model, p.layer.name) for p in parts if p.trains)
    matrices = [p.layer.name for p in parts if is_matrix(p.layer)]
    head = matrices[-1] if matrices else None
    groups = {p.layer.name: [p] for p in parts} if every else _grouped(parts)
    made: list[Row] = []
    field: int | None = None
    for name, members in groups.items():
        own = [looked.fields[p.layer.name] for p in members if p.layer.name in looked.fields]
        field = max(own) if own else field
        size = sum(_bytes(model, p.layer.name) for p in members if p.trains)
        made.append(
            Row(
                name,
                "x".join(map(str, members[0].layer.shape)) or "scalar" if every else _kind(members, looked),
                "" if every else _out(name, members, looked),
                _width(members, head),
                field,
                sum(p.layer.numel for p in members if p.trains),
                size,
                size / total if total else 0.0,
                sum(p.layer.numel for p in members if not p.trains),
            )
        )
    return made


def _parts(model: nn.Module) -> list[_Part]:
    owners = dict(model.named_modules())
    parts = []
    for name, p in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        role = "bias" if "bias" in leaf else "weight"
        layer = Layer(name, kind_of(owners[owner]), role, tuple(p.shape))
        parts.append(_Part(layer, owner, owners[owner], p.requires_grad))
    return parts


def _bytes(model: nn.Module, name: str) -> int:
    p = model.get_parameter(name)
    return p.numel() * p.element_size()


def _grouped(parts: Sequence[_Part]) -> dict[str, list[_Part]]:
    """By stage: the first part of the name; what is nearly the whole model is opened. A norm belongs to what it
    follows."""
    prefixes = _prefixes(parts)
    groups: dict[str, list[_Part]] = {}
    for part in parts:
        own = next(p for p in prefixes if part.layer.name == p or part.layer.name.startswith(f"{p}."))
        groups.setdefault(own, []).append(part)
    merged: dict[str, list[_Part]] = {}
    for name, members in groups.items():
        if merged and all(p.layer.kind == "norm" for p in members):
            merged[next(reversed(merged))] += members
        else:
            merged[name] = members
    return merged


def _prefixes(parts: Sequence[_Part]) -> list[str]:
    total = sum(p.layer.numel for p in parts)
    depth: dict[str, int] = {}

    def prefix(part: _Part, level: int) -> str:
        path = part.owner.split(".") if part.owner else [part.layer.name]
        return ".".join(path[:level])

    for part in parts:
        depth[prefix(part, 1)] = 1
    while True:
        for name in list(depth):
            inside = [p for p in parts if f"{p.layer.name}.".startswith(f"{name}.")]
            finer = dict.fromkeys(prefix(p, depth[name] + 1) for p in inside)
            large = sum(p.layer.numel for p in inside) > _NEARLY * total
            if large and list(finer) != [name] and len(depth) - 1 + len(finer) <= _MOST_GROUPS:
                level = depth.pop(name) + 1
                depth.update(dict.fromkeys(finer, level))
                break
        else:
            return sorted(depth, key=len, reverse=True)


def _kind(members: Sequence[_Part], looked: Seen) -> str:
    """In a word: what it is made of, and by how much it divides the map."""
    modules = {p.owner: p for p in members if p.layer.kind != "norm"}
    if not modules:
        return "norm"
    counts: dict[str, int] = {}
    for part in modules.values():
        word = "conv" if part.layer.kind.startswith("conv") else part.layer.kind
        word = type(part.module).__name__ if word == "other" else word
        counts[word] = counts.get(word, 0) + 1
    sides = [looked.sides[p.layer.name] for p in members if p.layer.name in looked.sides]
    stride = "" if not sides or sides[-1][1] in (0, sides[0][0]) else _ratio(sides[0][0], sides[-1][1])
    if len(modules) == 1:
        (part,) = modules.values()
        kernel = getattr(part.module, "kernel_size", None) if "conv" in counts else None
        word = next(iter(counts))
        return f"{word} {'x'.join(map(str, kernel))}{stride}" if kernel else f"{word}{stride}"
    return ", ".join(f"{n} {word}" if n > 1 else word for word, n in counts.items()) + stride


def _ratio(before: int, after: int) -> str:
    """ "/2" where the map is halved; nothing where it loses no more than a border."""
    factor = before // after
    return f" /{factor}" if factor > 1 else ""


def _out(name: str, members: Sequence[_Part], looked: Seen) -> str:
    """Size of the stage's output: sides of a map, steps of a sequence, features of a vector."""
    inside = [n for n in looked.shapes if n == name or n.startswith(f"{name}.")]
    source = name if name in looked.shapes else inside[-1] if inside else members[-1].owner
    shape = looked.shapes.get(source)
    if not shape:
        return "-"
    convolves = any(p.layer.kind.startswith("conv") for p in members) and len(shape) > 1
    return "x".join(map(str, shape[1:] if convolves else shape[:-1] if len(shape) > 1 else shape))


def _width(members: Sequence[_Part], head: str | None) -> int | None:
    wide = [p for p in members if is_matrix(p.layer)]
    if not wide or wide[-1].layer.name == head:
        return None
    layer = wide[-1].layer
    if layer.kind in ("lstm", "gru", "rnn"):
        return int(getattr(wide[-1].module, "hidden_size"))  # noqa: B009  # Module's attributes are typed as Tensors
    return layer.shape[1] if layer.kind == "embedding" else layer.shape[0]


# ---- what is no trainable parameter


def rest(model: nn.Module) -> Rest:
    norms = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
    statistics = {id(x) for m in norms for x in (m.running_mean, m.running_var)}
    kept = set(model.state_dict(keep_vars=True))
    buffers = dict(model.named_buffers())
    names: dict[int, str] = {}
    tied = []
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in names:
            tied.append((name, names[id(p)], p.numel() * p.element_size()))
        names.setdefault(id(p), name)
    return Rest(
        len(norms),
        sum(x.numel() for x in buffers.values() if id(x) in statistics),
        {n: x.numel() for n, x in buffers.items()
         if n in kept and x.is_floating_point() and id(x) not in statistics},
        tuple(n for n, x in buffers.items() if n in kept and not x.is_floating_point()),
        tuple(n for n in buffers if n not in kept),
        tuple(tied),
        {n: math.prod(p.shape) for n, p in model.named_parameters() if not p.requires_grad},
    )  # fmt: skip
