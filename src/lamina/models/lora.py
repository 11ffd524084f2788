"""Adapters: low-rank updates of frozen layers (LoRA), and layers that stand still. Only what trains travels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import Tensor, nn

from lamina.errors import ConfigError, expect
from lamina.models.knobs import whole

M = TypeVar("M", bound=nn.Module)


class Frozen(nn.Module):
    """A module that stands still: its parameters do not train, and it is always in eval mode, so that BatchNorm's
    statistics stay as they are and nothing is dropped out."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.base.eval()

    def train(self, mode: bool = True) -> Frozen:
        self.training = mode
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs)


class Adapted(nn.Module):
    """base(x) + alpha / rank * b(a(x)): the weight of `base` is frozen, those of `a` and `b` train. b begins at 0, so
    at first this is `base`. Those of a convolution are convolutions: `a` with its kernel to `rank` channels, `b` 1 x 1.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float):
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        like: Any = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.a: nn.Linear | nn.Conv2d
        self.b: nn.Linear | nn.Conv2d
        if isinstance(base, nn.Linear):
            self.a = nn.Linear(base.in_features, rank, **like)
            self.b = nn.Linear(rank, base.out_features, **like)
        else:
            how: Any = {name: getattr(base, name) for name in ("stride", "padding", "dilation", "padding_mode")}
            self.a = nn.Conv2d(base.in_channels, rank, base.kernel_size, **how, **like)  # type: ignore[arg-type]
            self.b = nn.Conv2d(rank, base.out_channels, 1, **like)
        nn.init.zeros_(self.b.weight)

    @property
    def weight(self) -> Tensor:
        """The weight that this amounts to; modules that read the weight of a layer inside them find it here."""
        w = self.base.weight
        return w + self.scale * (self.b.weight.flatten(1) @ self.a.weight.flatten(1)).view_as(w)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x) + self.scale * self.b(self.a(x))
        return found


def lora(
    model: nn.Module,
    rank: int = 4,
    alpha: float = 8,
    targets: Sequence[str] = ("*",),
    train: Sequence[str] = (),
) -> nn.Module:
    """Hu et al. 2022 (arXiv 2106.09685): a copy of the model of which only low-rank updates of its weights train.

    A target is an nn.Linear or an ungrouped nn.Conv2d whose weight no other module shares; every other is left frozen
    as it is. Modules with statistics of their own (BatchNorm) keep those they have, unless something in them trains.
    Draws from torch's global generator.

    Args:
        rank: of an update, >= 1.
        alpha: updates count alpha / rank, > 0.
        targets: patterns of modules' names, e.g. "layer4.*".
        train: patterns of parameters' names, e.g. "head.*", that train in full and need no update.

    Raises:
        ConfigError: a value out of range, a pattern that nothing matches, or an update that is no smaller than the
            weight itself.
    """
    whole("rank", rank)
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    expect(number and 0 < alpha < math.inf, f"alpha={alpha!r}: expected a number > 0", where="alpha")
    adapted = copy.deepcopy(model)
    _expect_matches("train", train, [name for name, _ in adapted.named_parameters()])
    for name, parameter in adapted.named_parameters():
        expect(not nn.parameter.is_lazy(parameter), f"{name} is not initialised yet", code="E111", where="model")
        parameter.requires_grad_(_matches(name, train))
    fit = {name: module for name, module in _layers(adapted) if not module.weight.requires_grad}
    _expect_matches("targets", targets, list(fit))
    chosen = {id(module): name for name, module in fit.items() if _matches(name, targets)}

    def made(module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.Linear | nn.Conv2d) and id(module) in chosen:
            return _adapter(module, rank, alpha, chosen[id(module)])
        return Frozen(module) if _keeps_statistics(module) else None

    return _replaced(adapted, made)


def merged(model: nn.Module) -> nn.Module:
    """A copy of an adapted model as the plain module that it came from: the updates are in the weights, all train."""

    def plain(module: nn.Module) -> nn.Module | None:
        if isinstance(module, Frozen):
            return module.base
        if not isinstance(module, Adapted):
            return None
        module.base.weight = nn.Parameter(module.weight.detach())
        return module.base

    whole_model = _replaced(copy.deepcopy(model), plain)
    return whole_model.requires_grad_(True).train(model.training)


def _adapter(module: nn.Linear | nn.Conv2d, rank: int, alpha: float, name: str) -> Adapted:
    made = Adapted(module, rank, alpha)
    own, full = made.a.weight.numel() + made.b.weight.numel(), module.weight.numel()
    if own >= full:
        raise ConfigError(
            f"rank={rank}: the update of {name} would have {own:,} entries, its weight has {full:,}",
            where="rank",
            remedy=f'let it train in full, train=["{name}.*"], or a smaller rank',
        )
    return made


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """The layers that can be adapted."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), set()).add(id(module))
    for name, module in model.named_modules():
        plain = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        if name and plain and len(owners[id(module.weight)]) == 1:
            yield name, module


def _keeps_statistics(module: nn.Module) -> bool:
    """A norm layer that would go on counting although nothing in it trains."""
    counts = getattr(module, "running_mean", None) is not None
    return counts and not any(p.requires_grad for p in module.parameters(recurse=False))


def _replaced(model: nn.Module, made: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """The model with other modules in the place of some, everywhere that these stand; itself where it is one."""
    known: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if id(module) not in known:
            other = made(module)
            known[id(module)] = module if other is None else other
            if other is None:
                for name, child in module._modules.items():
                    if child is not None:
                        module._modules[name] = visit(child)
        return known[id(module)]

    return visit(model)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _expect_matches(key: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    listed = not isinstance(patterns, str) and all(isinstance(pattern, str) for pattern in patterns)
    expect(listed, f"{key}={patterns!r}: expected a list of patterns", where=key, remedy=f'{key}=["head.*"]')
    what = "nn.Linear or ungrouped nn.Conv2d that is frozen" if key == "targets" else "parameter"
    for pattern in patterns:
        expect(
            any(fnmatchcase(name, pattern) for name in names),
            f"{key}: {pattern!r} matches no {what}",
            where=key,
            remedy=f"names here: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}" if names else None,
        )
