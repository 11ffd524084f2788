"""What is to be looked at: a preset, a TOML file, or a model in a file of the user's, with data or without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lamina import config as configs
from lamina.config import Config
from lamina.data import ClientData
from lamina.data.transform import Batch
from lamina.entry import anchored, is_entry, short, thing
from lamina.errors import ConfigError, expect
from lamina.training import addressed_rng

_CLIENTS = 10  # of data that is made up
_EXAMPLES = 64  # of each of them
_VOCABULARY = 2  # tokens of made-up text, below the size of every embedding


class Target(NamedTuple):
    title: str
    model: nn.Module
    config: Config
    data: ClientData | None  # of the user
    made_up: ClientData | None  # random examples of the form asked for, where there is no data
    example: Batch | None  # what the model is called with; None: nobody said
    given: bool  # the config is the user's, not made for a model alone


def found(
    text: str,
    keys: Sequence[str] = (),
    *,
    input_size: Sequence[int] | None = None,
    data: str | None = None,
    progress: Callable[[str, str, int, int], None] | None = None,
) -> Target:
    """The target of a command line.

    Args:
        text: ``FILE.py:object`` (a module, a class, or a function of no argument or of cfg), a preset, or a TOML file.
        keys: `key=value`.
        input_size: of one example, without the batch.
        data: instead of the target's own: the name of a data set, or ``FILE.py:data``.
        progress: called while data is fetched.

    Raises:
        LaminaError: what is impossible, with its origin.
    """
    expect(
        input_size is None or data is None, "--input is for a model without data, and --data is given", where="--input"
    )
    part = None if data is None else {"entry" if is_entry(data) else "name": data}
    if is_entry(text):
        return _own(text, keys, input_size, part, progress)
    expect(input_size is None, f"--input: {text} has data, whose form is known", where="--input")
    said = [*keys] if part is None else [*keys, f"data={data}"]
    config = configs.load(text, said)
    held = configs.data_of(config, progress)
    return Target(config.name, _made(config), config, held, None, _batch(held), True)


def _own(
    text: str,
    keys: Sequence[str],
    input_size: Sequence[int] | None,
    data: Mapping[str, str] | None,
    progress: Callable[[str, str, int, int], None] | None,
) -> Target:
    """A model in a file of the user's; the function `data` beside it is its data, unless other is named."""
    entry = anchored(text, Path.cwd())
    thing(entry, "command line, argument 1")  # no such file or object
    beside = f"{entry.rpartition(':')[0]}:data"
    if data is None and input_size is None and not any(key.startswith("data") for key in keys) and _has(beside):
        data = {"entry": beside}
    elif data is not None and "entry" in data:
        data = {"entry": anchored(data["entry"], Path.cwd())}
    own = data is not None or any(key.startswith("data") for key in keys)
    table = {"model": {"entry": entry}, "data": dict(data or {"name": "digits"})}
    config = configs.load_tables(("command line", table), arguments=keys)
    held = configs.data_of(config, progress) if own else None
    model = _made(config)
    title = short(entry).rpartition(":")[2]
    if held is not None:
        return Target(title, model, config, held, None, _batch(held), False)
    dummy = getattr(model, "dummy_inputs", None)
    if input_size is None and isinstance(dummy, Mapping) and all(isinstance(x, Tensor) for x in dummy.values()):
        return Target(title, model, config, None, None, dict(dummy), False)
    made_up = None if input_size is None else imagined(model, input_size)
    return Target(title, model, config, None, made_up, None if made_up is None else _batch(made_up), False)


def _has(entry: str) -> bool:
    try:
        return callable(thing(entry, "data"))
    except ConfigError:
        return False


def _made(config: Config) -> nn.Module:
    with addressed_rng(config.seed, "model"):
        model = configs.model_of(config)()
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{config.model.title} gave {type(model).__name__}, expected a torch nn.Module",
            code="E106",
            where=config.origin("model"),
            remedy="name a module, a class of modules, or a function that returns one",
        )
    return model


def _batch(data: ClientData) -> Batch:
    x, _ = data.examples(data.indices[:2] if len(data.indices) > 1 else data.indices.repeat(2)[:2])
    return data.transform(x, None)


def imagined(model: nn.Module, input_size: Sequence[int]) -> ClientData:
    """Random examples of this form, token numbers where the model begins with an embedding, with random labels."""
    source = torch.Generator().manual_seed(0)
    n = _CLIENTS * _EXAMPLES
    tokens = any(isinstance(module, nn.Embedding) for module in model.modules())
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    x = (
        torch.randint(_VOCABULARY, (n, *input_size), generator=source)
        if tokens
        else torch.randn((n, *input_size), generator=source, dtype=dtype)
    )
    y = torch.randint(max(1, _outputs(model, x[:2])), (n,), generator=source)
    parts = {str(i): (x[i::_CLIENTS], y[i::_CLIENTS]) for i in range(_CLIENTS)}
    return ClientData.from_clients(parts, name="made up")


def _outputs(model: nn.Module, x: Tensor) -> int:
    """How many classes it tells apart; 1 where it cannot be called like this, which is said later."""
    try:
        with torch.no_grad(), addressed_rng(0, "trial"):
            out: Any = model.eval()(x)
    except Exception:
        return 1
    return int(out.shape[1]) if isinstance(out, Tensor) and out.dim() > 1 else 1
