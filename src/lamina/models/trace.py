"""One forward pass, written down operation by operation."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lamina.errors import ConfigError, place

Example: TypeAlias = Tensor | Mapping[str, Tensor]  # what the model is called with: a tensor, or keyword arguments


class Step(NamedTuple):
    """One operation on something that comes from the example. Value 0 is the example, value i + 1 what step i gives."""

    what: str  # "convolution", "add", ...
    reads: tuple[int, ...]  # values
    weights: tuple[str, ...] = ()  # parameters of two or more dimensions, by name
    side: int = 0  # convolutions and pools: longest spatial side of what is read,
    left: int = 0  # and of what is given
    kernel: int = 1
    reach: int = 0  # further inputs that one output sees, on the longer side
    stride: int = 1
    up: int = 1  # stride of a transposed convolution


class Pass(NamedTuple):
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]  # values


def follow(model: nn.Module, example: Example) -> Pass:
    """What happens to the example in eval mode. The model is left as it is.

    The pass runs on the meta device, where nothing is computed; a model that looks at values there is run for real,
    on a copy.

    Raises:
        ConfigError: E121 when the model cannot be copied or fails on the example.
    """
    try:
        return _run(_on_meta(model), _moved(example, torch.device("meta")))
    except Exception:  # whatever it was, a real pass says it better
        pass
    try:
        with torch.random.fork_rng(devices=[]):
            return _run(copy.deepcopy(model), _moved(example, _device(model)))
    except Exception as error:
        raise ConfigError(
            f"the model cannot be followed on the example ({_shapes(example)}): {type(error).__name__}: {error}",
            code="E121",
            where=place(error),
            remedy="give an example that model(example) accepts in eval mode, e.g. one batch of the training data",
        ) from error


def _run(model: nn.Module, example: Example) -> Pass:
    model.eval()
    recorder = _Recorder(model, example)
    # with gradients: without them, transformers take a fast path that is one operation
    with torch.enable_grad(), recorder:
        output = model(**example) if isinstance(example, Mapping) else model(example)
    ends = {recorder.values[id(x)] for x in _tensors((output,)) if id(x) in recorder.values}
    return Pass(tuple(recorder.steps), tuple(sorted(ends or {len(recorder.steps)})))


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have shapes and nothing else."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, memo)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, model: nn.Module, example: Example) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        given = list(_tensors((example,)))
        self.steps: list[Step] = []
        self.values = {id(x): 0 for x in given}
        self.made_of: dict[int, tuple[str, ...]] = {
            id(p): (name,) for name, p in model.named_parameters() if p.ndim > 1
        }
        self.alive: list[Tensor] = given  # ids stay unique as long as their tensors live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        given = list(_tensors((*args, *(kwargs or {}).values())))
        reads = dict.fromkeys(self.values[id(x)] for x in given if id(x) in self.values)
        weights = dict.fromkeys(name for x in given for name in self.made_of.get(id(x), ()))
        made = list(_tensors((output,)))
        if reads:
            step = Step(func.overloadpacket.__name__, tuple(reads), tuple(weights))
            self.steps.append(_windowed(step, args)._replace(left=max(made[0].shape[2:], default=0) if made else 0))
            self.values.update((id(x), len(self.steps)) for x in made)
        elif weights:  # a transposed or normalised weight
            self.made_of.update((id(x), tuple(weights)) for x in made)
        self.alive += made
        return output


def _windowed(step: Step, args: tuple[Any, ...]) -> Step:
    """With the window of a convolution or a pool."""
    name = step.what
    if name == "convolution":
        stride, dilation, transposed = max(args[3]), max(args[5]), args[6]
        kernel, side = max(args[1].shape[2:]), max(args[0].shape[2:])
        if transposed:
            return step._replace(side=side, kernel=kernel, reach=-(-kernel // stride) - 1, up=stride)
        return step._replace(side=side, kernel=kernel, reach=(kernel - 1) * dilation, stride=stride)
    if name in ("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d"):
        kernel = max(args[1])
        stride = max(args[2]) if len(args) > 2 and args[2] else kernel
        dilation = max(args[4]) if name.startswith("max") and len(args) > 4 else 1
        side = max(args[0].shape[2:])
        return step._replace(side=side, kernel=kernel, reach=(kernel - 1) * dilation, stride=stride)
    if name.lstrip("_").startswith("adaptive_") or (name == "mean" and len(args) > 1 and _spatial(args)):
        side = max(args[0].shape[2:])
        left = 1 if name == "mean" else max(args[1])
        window = -(-side // left)
        stride = 1 if left == 1 else max(1, side // left)  # a single position has no neighbour to be apart from
        return step._replace(side=side, kernel=window, reach=window - 1, stride=stride)
    return step


def _spatial(args: tuple[Any, ...]) -> bool:
    """Whether a mean runs over all spatial axes of a map."""
    axes = args[0].ndim
    return axes > 2 and {axis % axes for axis in args[1]} == set(range(2, axes))


def _moved(example: Example, device: torch.device) -> Example:
    if isinstance(example, Tensor):
        return example.detach().to(device)
    return {name: x.detach().to(device) for name, x in example.items()}


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _shapes(example: Example) -> str:
    if isinstance(example, Tensor):
        return f"{'x'.join(map(str, example.shape))}, {str(example.dtype).removeprefix('torch.')}"
    return "; ".join(f"{name} {_shapes(x)}" for name, x in example.items())


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
