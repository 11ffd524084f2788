"""Trees of tensors: parameter name -> tensor, and the few operations the methods are written in.

Nothing here changes its arguments. A function of two trees runs over the names of the first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Params: TypeAlias = dict[str, Tensor]
Message: TypeAlias = dict[str, Params]


def tmap(f: Callable[..., Tensor], first: Mapping[str, Tensor], *rest: Mapping[str, Tensor]) -> Params:
    """f over the entries of `first`, with the entries of the same name in the others."""
    return {name: f(x, *(tree[name] for tree in rest)) for name, x in first.items()}


def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Params:
    return {name: x + b[name] for name, x in a.items()}


def sub(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Params:
    return {name: x - b[name] for name, x in a.items()}


def mul(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Params:
    return {name: x * b[name] for name, x in a.items()}


def scale(a: Mapping[str, Tensor], factor: float) -> Params:
    return {name: x * factor for name, x in a.items()}


def zeros_like(a: Mapping[str, Tensor]) -> Params:
    return {name: torch.zeros_like(x) for name, x in a.items()}


def select(a: Mapping[str, Tensor], names: Iterable[str]) -> Params:
    """The entries with these names, in the order of `a`."""
    wanted = set(names)
    return {name: x for name, x in a.items() if name in wanted}


def omit(a: Mapping[str, Tensor], names: Iterable[str]) -> Params:
    unwanted = set(names)
    return {name: x for name, x in a.items() if name not in unwanted}


def cut(a: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None) -> Params:
    """The tree with 0 outside the mask; a tensor without an entry in it is whole."""
    mask = mask or {}
    return {name: torch.where(mask[name], x, 0) if name in mask else x for name, x in a.items()}


_PIECE = 1 << 18  # entries


def squared_norm(x: Tensor) -> float:
    """Sum of squares in float64, in pieces, so that a large float32 tensor is never copied whole."""
    flat = x.detach().reshape(-1)
    if flat.dtype == torch.float64:
        return float(torch.dot(flat, flat))
    total = 0.0
    for start in range(0, flat.numel(), _PIECE):
        exact = flat[start : start + _PIECE].double()
        total += float(torch.dot(exact, exact))
    return total


def squared_norms(a: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: squared_norm(x) for name, x in a.items()}


def apart(a: Mapping[str, Tensor]) -> Params:
    """The same in memory of their own: safetensors refuses values that share some, as those of a state may."""
    seen: set[int] = set()
    made: Params = {}
    for name, x in a.items():
        place = x.untyped_storage().data_ptr()
        made[name] = x.detach().contiguous() if place not in seen else x.detach().contiguous().clone()
        seen.add(place)
    return made


def sha256(a: Mapping[str, Tensor]) -> str:
    """Fingerprint of names, shapes, dtypes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, x in sorted(a.items()):
        digest.update(f"{name}:{tuple(x.shape)}:{x.dtype};".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def top_fraction(scores: Tensor, keep: int) -> Tensor:
    """Boolean mask of the `keep` largest scores; ties go to the lower flat index."""
    flat = scores.reshape(-1)
    if keep >= flat.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    mask = torch.zeros(flat.numel(), dtype=torch.bool)
    if keep > 0:
        threshold = torch.topk(flat, keep, sorted=True).values[-1]
        mask = flat > threshold
        ties = (flat == threshold).nonzero().reshape(-1)
        mask[ties[: keep - int(mask.sum())]] = True
    return mask.reshape(scores.shape)


# A state (of a server or of a client) is a NamedTuple, tuple, dict or None, nested, of tensors and, on the server
# only, numbers. These two take one apart into named leaves and put it together again, for checkpoints and the wire.


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of a nested state by path, e.g. ``{"0/velocity/conv1.weight": tensor, "1/round": 3}``."""
    if isinstance(value, dict):
        items: Iterable[tuple[str, Any]] = value.items()
    elif hasattr(value, "_asdict"):
        items = value._asdict().items()
    elif isinstance(value, tuple):
        items = ((str(i), x) for i, x in enumerate(value))
    elif value is None:
        return {}
    else:
        return {path: value}
    leaves: dict[str, Any] = {}
    for key, child in items:
        leaves.update(flatten(child, f"{path}/{key}" if path else str(key)))
    return leaves


def skeleton(value: Any) -> Any:
    """The shape of a state as plain JSON; with `flatten`'s leaves, `unflatten` rebuilds it."""
    if isinstance(value, dict):
        return {"dict": {str(k): skeleton(v) for k, v in value.items()}}
    if hasattr(value, "_asdict"):
        return {"tuple": [skeleton(v) for v in value], "fields": list(value._fields)}
    if isinstance(value, tuple):
        return {"tuple": [skeleton(v) for v in value]}
    return None if value is None else "leaf"


def unflatten(like: Any, shape: Any, leaves: Mapping[str, Any], path: str = "") -> Any:
    """Inverse of `flatten`: `shape` is its skeleton, `like` a value of the same classes (it names the NamedTuples).

    Raises ValueError for a state of other fields.
    """

    def below(key: str) -> str:
        return f"{path}/{key}" if path else key

    if shape is None:
        return None
    if shape == "leaf":
        return leaves[path]
    if "dict" in shape:
        source = like if isinstance(like, dict) else {}
        return {k: unflatten(source.get(k), s, leaves, below(k)) for k, s in shape["dict"].items()}
    fields = shape.get("fields") or [str(i) for i in range(len(shape["tuple"]))]
    known = list(getattr(like, "_fields", fields))
    if like is not None and known != fields:
        raise ValueError(f"{path or 'state'}: fields {', '.join(fields)}, expected {', '.join(known)}")
    classes = tuple(like) if isinstance(like, tuple) else (None,) * len(fields)
    parts = [unflatten(x, s, leaves, below(f)) for x, s, f in zip(classes, shape["tuple"], fields, strict=True)]
    return type(like)(*parts) if hasattr(like, "_asdict") else tuple(parts)
