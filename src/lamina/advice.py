"""Which guideline for deeper models applies to which layer of a model, and why.

Wang et al., arXiv 2306.02701: federated accuracy falls with depth even for IID clients, because differences between
the clients' models accumulate from layer to layer in back-propagation. Its abstract recommends wider models and
smaller receptive fields, for up to 43 % on ResNet-101 and Tiny-ImageNet (absolute or relative: not stated). The effect
of any single change is not published, so no advice here promises one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lamina.errors import expect, is_number, is_whole
from lamina.layers import Layer, layer_table, matrices
from lamina.models.norm import group_count
from lamina.models.receptive_field import Field, fields_of
from lamina.models.resnet import STEM_FIELD, BasicBlock, Bottleneck
from lamina.models.sequence import CharModel
from lamina.models.trace import Example, Pass, Step, follow
from lamina.models.vgg import VGG

WIDER = "wider"
FIELD = "smaller receptive field"
PLACEMENT = "width placement"
RESIDUAL = "residual connections"
NORM = "normalisation"
GUIDELINES = (WIDER, FIELD, PLACEMENT, RESIDUAL, NORM)  # the order of the advice
CODES = {WIDER: "G208", FIELD: "G207", PLACEMENT: "G208", RESIDUAL: "G209", NORM: "W101"}  # `lamina explain CODE`

ABSTRACT = "[abstract] of arXiv 2306.02701; the effect of this change alone is not published"
CODE = "first author's code; no measurement of it is known"


class Advice(NamedTuple):
    layer: str  # a parameter, or a module that has none
    guideline: str  # one of GUIDELINES
    why: str
    change: str
    source: str  # who says so


class AdviceList(list[Advice]):
    """A piece of advice per layer and reason. Printed, those whose reasons differ in numbers alone are one paragraph,
    with the first layers and the last one by name, and the ranges of the numbers."""

    def __str__(self) -> str:
        alike: dict[tuple[str, ...], list[Advice]] = {}
        for advice in self:
            kind = (advice.guideline, _NUMBER.sub("#", advice.why), advice.change, advice.source)
            alike.setdefault(kind, []).append(advice)
        return "\n".join(map(_paragraph, alike.values())) or "none of the guidelines applies"


_NUMBER = re.compile(r"\b\d+(?:\.\d+)?\b")
_NAMED = 4  # layers


def _paragraph(alike: Sequence[Advice]) -> str:
    first = alike[0]
    names = [advice.layer for advice in alike]
    if len(names) > _NAMED + 1:
        names = [*names[: _NAMED - 1], f"... {names[-1]} ({len(names)} in all)"]
    columns = zip(*(_NUMBER.findall(advice.why) for advice in alike), strict=True)
    spans = iter([sorted(set(numbers), key=float) for numbers in columns])
    why = _NUMBER.sub(lambda _: " to ".join(dict.fromkeys((span := next(spans))[:: max(1, len(span) - 1)])), first.why)
    return f"{first.guideline}: {', '.join(names)}\n  {why}\n  {first.change}\n  {first.source}"


class _Look(NamedTuple):
    """One weight tensor in one pass. Depth is its position in model order, as in `lamina.observe`."""

    layer: Layer
    from_input: int
    from_loss: int
    width: int | None  # outputs per position; None where that is no free choice
    chain: int  # fewest further weight tensors on a way from it to the output
    last: bool  # no way from it to the output passes another one
    bypassed: bool  # a sum with another branch stands in for it


def guidelines(
    model: nn.Module,
    example: Example | Sequence[int],
    *,
    deep: int = 8,
    field: float = 1.0,
    narrow: float = 1.0,
    uneven: float = 2.0,
) -> AdviceList:
    """What the paper on deeper models would have one change, layer by layer; [] when nothing applies. Printed as a
    whole it has one paragraph for all layers with the same reason.

    The thresholds are ours: none is published.

    Args:
        model: any module. It is followed in eval mode and left as it is.
        example: one batch that it is called with (a tensor, or a dictionary of keyword arguments), or the shape of one
            example, e.g. (3, 32, 32), for a model that takes floating-point numbers.
        deep: a layer is far from the loss with so many weight tensors or more between the two. "wider", "residual
            connections" and "width placement" are for models that have such layers: their reason is the length of the
            chain. 8 is the depth of the shallowest network that the reviews of the paper mention.
        field: a receptive field is too large above so many times the longest side of the input: at 1.0 a position sees
            all of the image, and padding beyond it.
        narrow: a layer far from the loss is narrow up to so many times the mean width of the hidden layers.
        uneven: widths are placed unevenly when the hidden layers of the first and of the last quarter
            of the depth differ by so many times in mean width.

    Raises:
        ConfigError: E101 for a value out of range, E121 for a model that cannot be followed.
    """
    expect(is_whole(deep, 1), f"deep={deep!r}: expected a whole number >= 1", where="deep")
    for name, value, least in (("field", field, 0), ("narrow", narrow, 0), ("uneven", uneven, 1)):
        fine = is_number(value, least) and value > least
        expect(fine, f"{name}={value!r}: expected a number > {least}", where=name)
    seen = follow(model, _batch(model, example))
    looks = _look(model, seen)
    advice = (
        *_wider(model, looks, deep, narrow),
        *_field(model, seen.steps, field),
        *_placement(model, looks, deep, uneven),
        *_residual(model, looks, deep),
        *_norm(model),
    )
    order = {name: i for i, (name, _) in enumerate((*model.named_parameters(), *model.named_modules()))}
    return AdviceList(sorted(advice, key=lambda a: (GUIDELINES.index(a.guideline), order.get(a.layer, len(order)))))


def _batch(model: nn.Module, example: Example | Sequence[int]) -> Example:
    """Two examples of zeros for a shape."""
    if isinstance(example, Tensor):
        return example
    if isinstance(example, Mapping):
        fine = bool(example) and all(isinstance(x, Tensor) for x in example.values())
        expect(fine, "example: expected a dictionary of tensors", where="example", remedy="name -> one batch")
        return example
    fine = isinstance(example, Sequence) and len(example) > 0 and all(is_whole(side, 1) for side in example)
    expect(
        fine,
        f"example={example!r}: expected a tensor, a dictionary of tensors, or a shape",
        where="example",
        remedy="for example (3, 32, 32), without the batch, or one batch of the training data",
    )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return torch.zeros((2, *example), dtype=dtype)


# ---- what the pass shows


def _look(model: nn.Module, seen: Pass) -> list[_Look]:
    table = matrices(layer_table(model))
    names = {layer.name for layer in table}
    steps = [step._replace(weights=tuple(w for w in step.weights if w in names)) for step in seen.steps]
    chains = _chains(steps, seen.outputs)
    needed = _needed(steps, seen.outputs)
    return [
        _Look(layer, i, len(table) - 1 - i, _width(layer), *chains[layer.name], layer.name not in needed)
        for i, layer in enumerate(table)
        if layer.name in chains
    ]


def _chains(steps: Sequence[Step], outputs: Sequence[int]) -> dict[str, tuple[int, bool]]:
    """Per weight: the fewest steps with weights behind it, on any way to the output, and whether no way has any."""
    far = len(steps) + 1
    fewest = [far] * (len(steps) + 1)
    none = [True] * (len(steps) + 1)
    for value in outputs:
        fewest[value] = 0
    chains: dict[str, tuple[int, bool]] = {}
    for i in range(len(steps), 0, -1):
        step = steps[i - 1]
        if fewest[i] == far:
            continue  # leads nowhere
        for weight in step.weights:
            chain, last = chains.get(weight, (far, True))
            chains[weight] = min(chain, fewest[i]), last and none[i]
        for value in step.reads:
            fewest[value] = min(fewest[value], fewest[i] + bool(step.weights))
            none[value] = none[value] and none[i] and not step.weights
    return chains


def _needed(steps: Sequence[Step], outputs: Sequence[int]) -> frozenset[str]:
    """The weights without which nothing comes through. Of the terms of a sum (or of a concatenation) one is enough; a
    product, as in gates and attention, takes all of its factors."""
    needed: list[frozenset[str]] = [frozenset()]
    for step in steps:
        parts = [needed[value] for value in step.reads]
        open_ = step.what in ("add", "add_", "sub", "sub_", "cat", "stack")
        joint = frozenset.intersection(*parts) if open_ else frozenset().union(*parts)
        bias = open_ and bool(step.weights)  # a weight that is added, such as an embedding of positions
        needed.append(joint if bias else joint | set(step.weights))
    return frozenset().union(*(needed[value] for value in outputs))


def _width(layer: Layer) -> int | None:
    outputs, inputs = layer.shape[:2]
    if layer.kind.startswith("conv") or layer.kind == "linear":
        return outputs
    return inputs if layer.kind in ("embedding", "attention") or ".weight_hh" in f".{layer.name}" else None


def _hidden(looks: Iterable[_Look]) -> list[tuple[_Look, int]]:
    """Layers whose width is free, with it: the last ones give the outputs, as many as there are classes."""
    return [(look, look.width) for look in looks if look.width is not None and not look.last]


# ---- the guidelines


def _wider(model: nn.Module, looks: Sequence[_Look], deep: int, narrow: float) -> Iterator[Advice]:
    hidden = _hidden(looks)
    if not hidden:
        return
    mean = sum(width for _, width in hidden) / len(hidden)
    for look, width in hidden:
        if look.from_loss >= deep and width <= narrow * mean:
            why = (
                f"{width} wide, {width / mean:.2f} of the mean {mean:.0f} of the hidden layers; "
                f"depth {look.from_input} from the input, {look.from_loss} from the loss, {look.chain} the shortest way"
            )
            yield Advice(look.layer.name, WIDER, why, _widened(model, look.layer, width), ABSTRACT)


def _widened(model: nn.Module, layer: Layer, width: int) -> str:
    free = "; how much wider is not published"
    widths = _stages(model)
    if widths:
        return f"width={tuple(2 * w for w in widths)} instead of {widths}, for example{free}"
    if isinstance(model, VGG):
        first = model.widths[0]
        return f"width={2 * first} instead of {first}, for example{free}"
    if isinstance(model, CharModel):
        embedded = layer.kind == "embedding"
        return f"{'embed' if embedded else 'hidden'}={2 * width} instead of {width}, for example{free}"
    knob = {"linear": "out_features", "embedding": "embedding_dim", "attention": "embed_dim"}
    knob |= dict.fromkeys(("lstm", "gru", "rnn"), "hidden_size")
    return f"{knob.get(layer.kind, 'out_channels')}={2 * width} instead of {width}, for example{free}"


def _field(model: nn.Module, steps: Sequence[Step], ratio: float) -> Iterator[Advice]:
    convs = [i for i, step in enumerate(steps) if step.what == "convolution" and step.weights]
    if not convs:
        return
    before = fields_of(steps)
    side = steps[convs[0]].side
    limit = ratio * side
    last = max(convs, key=lambda i: before[i + 1])
    largest = before[last + 1].rf
    if largest <= limit:
        return
    change = "a kernel of 1, without padding, adds nothing"
    if _stages(model):
        knob = max(int(limit), STEM_FIELD["7x7" if steps[convs[0]].kernel == 7 else "3x3"][0])
        change = f"receptive_field={knob}: from the first block on that would see more, kernels are 1x1"
    for i in convs:
        step, rf = steps[i], before[i + 1].rf
        if step.reach and rf > limit:
            gain = rf - max(before[value].rf for value in step.reads)
            why = (
                f"one position sees {rf} pixels, the input has {side}; this kernel of {step.kernel} adds {gain} of them"
            )
            yield Advice(step.weights[0], FIELD, why, change, ABSTRACT)
    yield from _strides(model, steps, before, last, largest, side)


def _strides(
    model: nn.Module, steps: Sequence[Step], before: Sequence[Field], last: int, largest: int, side: int
) -> Iterator[Advice]:
    """Everything that divides the same positions is one downsampling: a block's convolution and its projection."""
    jumps = {i: max(before[v].jump for v in s.reads) for i, s in enumerate(steps) if s.stride > 1 and i <= last}
    for jump, group in groupby(sorted(jumps, key=lambda i: (jumps[i], i)), key=jumps.__getitem__):
        members = set(group)
        flat = [s._replace(stride=1) if i in members else s for i, s in enumerate(steps)]
        then = fields_of(flat)[last + 1].rf
        if then == largest:
            continue
        first = steps[min(members)]
        owner = first.weights or _weights_before(steps, min(members))
        if not owner:
            continue
        factor, kind = first.stride, "its stride" if first.weights else "the pooling behind it"
        why = (
            f"{kind} ({factor}, total {jump * factor}) multiplies what every later kernel adds: the last convolution "
            f"sees {largest} pixels, with stride 1 here {then}; the input has {side}, the last map {steps[last].left}"
        )
        change = f"stride 1 here, or the stride later; every map up to the next one then has {factor}x the side"
        if _stages(model) and owner[0] == "conv1.weight":
            change = 'stem="3x3": a kernel of 3 with stride 1 and no pooling'
        yield Advice(owner[0], FIELD, why, change, ABSTRACT)


def _weights_before(steps: Sequence[Step], i: int) -> tuple[str, ...]:
    """Of the nearest step before this one that has any."""
    while not steps[i].weights:
        if (value := max(steps[i].reads)) == 0:
            return ()
        i = value - 1
    return steps[i].weights


def _placement(model: nn.Module, looks: Sequence[_Look], deep: int, uneven: float) -> Iterator[Advice]:
    hidden = _hidden(looks)
    if not any(look.from_loss >= deep for look, _ in hidden):
        return
    widths = [width for _, width in hidden]
    quarter = max(1, len(widths) // 4)
    first, last = (sum(part) / quarter for part in (widths[:quarter], widths[-quarter:]))
    if max(first, last) < uneven * min(first, last):
        return
    why = f"the quarter of the hidden layers next to the input is {first:.0f} wide on average, the last {last:.0f}"
    stages = _stages(model)
    even = round(sum(stages or widths) / len(stages or widths))
    change = f"equal widths ({even} everywhere)"
    if stages:
        change = f"width={(even,) * len(stages)} (equal) or width={stages[::-1]} (reversed) instead of {stages}"
    yield Advice(hidden[0][0].layer.name, PLACEMENT, why, change + "; which is better is not published", CODE)


def _residual(model: nn.Module, looks: Sequence[_Look], deep: int) -> Iterator[Advice]:
    change = "x + f(x) for f one or two layers, with a layer of kernel 1 on x where the shapes differ"
    if _stages(model):
        change = "residual=True"
    for look in looks:
        if look.chain >= deep and not look.bypassed:
            why = f"all paths go through it, and the shortest from it to the loss through {look.chain} further layers"
            yield Advice(look.layer.name, RESIDUAL, why, change, CODE)


def _norm(model: nn.Module) -> Iterator[Advice]:
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.running_mean is None:
            continue
        channels = module.num_features
        why = (
            f"{type(module).__name__} over {channels} channels: it normalises by each client's own batches, and the "
            "server averages the clients' running means and variances, which leaves out how far the means are apart"
        )
        own = bool(_stages(model)) or isinstance(model, VGG)
        change = 'norm="group"' if own else f"nn.GroupNorm({group_count(channels)}, {channels})"
        layer = f"{name}.weight" if module.affine and name else "weight" if module.affine else name
        yield Advice(layer, NORM, why, f'{change}, or buffers="keep" for statistics that stay personal', CODE)


def _stages(model: nn.Module) -> tuple[int, ...]:
    """The widths of the stages of one of our residual networks; () for any other model."""
    if not isinstance(model, nn.Sequential):
        return ()
    blocks = [stage[0] for _, stage in model.named_children() if isinstance(stage, nn.Sequential) and len(stage)]
    return tuple(b.conv1.out_channels for b in blocks if isinstance(b, BasicBlock | Bottleneck))
