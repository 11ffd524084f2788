"""A node: Flower starts a process for every message, so all that lasts is on the node's disk.

Of what Flower keeps for a node, `Context.state`, only a counter is used: it lives in the SuperNode's memory, travels
with every message, and is gone when the SuperNode is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from lamina import preflight
from lamina.config import Config, build, data_of
from lamina.data import ClientData
from lamina.engine import cores, sharing
from lamina.errors import ConfigError, RunError, WireError
from lamina.federation import Federation
from lamina.flower.records import packed, unpacked
from lamina.flower.settings import NodeKeys, back, keys_of, loaded
from lamina.redaction import hidden
from lamina.remote import AtNode, DiskShelf, FileVault, Node, Roll, bundled, unbundled
from lamina.remote.roll import called
from lamina.remote.shelf import place_of
from lamina.remote.terms import stamp, terms_of
from lamina.store.files import replace

_COUNTER = "lamina"
_SLACK = 4096  # bytes of a bundle beyond its parts
_PER_PART = 64


def client_app(config: str | Path) -> ClientApp:
    """What Flower runs at a node.

    Args:
        config: of the experiment, beside the app.
    """
    app: Any = ClientApp()
    path = Path(config)

    def roll(message: Message, context: Context) -> Message:
        own = NodeKeys.of(context.node_config)
        with _unspoken():
            return Message(packed(_roll(path, own, unpacked(message.content)[0])), reply_to=message)

    def train(message: Message, context: Context) -> Message:
        blob, about = unpacked(message.content)
        with _unspoken():
            answers = _answered(path, NodeKeys.of(context.node_config), blob, about)
        before = context.state.config_records.get(_COUNTER, {"answered": 0})
        context.state[_COUNTER] = ConfigRecord({"answered": int(before["answered"]) + 1})
        return Message(packed(answers), reply_to=message)

    app.query()(roll)
    app.train()(train)
    return app


@contextlib.contextmanager
def _unspoken() -> Iterator[None]:
    """Flower logs an error here and sends it to the server: without secrets."""
    try:
        yield
    except Exception as error:
        if hidden(said := "".join(traceback.format_exception(error))) == said:
            raise
        raise RunError(hidden(f"{type(error).__name__}: {error}"), code="E300") from None


def _roll(path: Path, own: NodeKeys, blob: bytes) -> bytes:
    """Raises WireError, Rejected: it is not the server that asks."""
    config = loaded(path, own.data)
    keys = keys_of(config)
    signed = None if keys is None else called(blob, keys)
    return Roll.of(_here(config, own))._replace(signed=signed).packed(keys)


def _here(config: Config, keys: NodeKeys) -> ClientData | None:
    """None where there are more nodes than clients, and this one has none."""
    data = data_of(config)
    if not keys.mine:
        return data
    chosen = keys.chosen(len(data))
    return data.subset(chosen) if chosen else None


def _answered(path: Path, keys: NodeKeys, blob: bytes, about: dict[str, Any]) -> bytes:
    """Raises WireError for what is said about the letters, if it is not what a server says."""
    config = loaded(path, keys.data)
    data = _here(config, keys)
    try:
        numbers = dict(zip(about["names"], about["numbers"], strict=True))
        names = [f"({number})" for number in range(int(about["clients"]))]
        for name, number in numbers.items():
            names[number] = name
        experiment = str(about["experiment"])
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise WireError(f"a message without its {error}", code="E345") from None
    own = {name: place for place, name in enumerate(() if data is None else data.names)}
    lacking = sorted(numbers.keys() - own.keys())
    if data is None or lacking:
        raise ConfigError(f"client {lacking[:1]} is not here any more", code="E118", where="node")
    asked = data.subset([own[name] for name in numbers])
    alone = dataclasses.replace(asked, test=None, client_tests=None, check=False).among(names)
    place = place_of(keys.state_dir, experiment)
    signs = keys_of(config)
    signing = None if signs is None else AtNode(signs, experiment)
    with sharing(keys.cores):
        fed, tried = _built(_at_most(config, len(asked), keys.cores), alone, place / _TRIED)
        shelf = DiskShelf(fed, keys.state_dir, experiment)
        vault = None if fed.secure is None else FileVault(keys.secret_dir, experiment)
        with Node(fed, shelf, back=back(config), signing=signing, vault=vault) as node:
            answers = bundled(node.answer(unbundled(blob, (node.longest + _PER_PART) * len(asked) + _SLACK)))
    if place.exists():  # only what came from the server makes a folder
        with contextlib.suppress(OSError):  # then the next message tries it again
            replace(place / _TRIED, json.dumps(tried._asdict()).encode())
    return answers


_TRIED = "tried.json"


class _Tried(NamedTuple):
    """How the model ran on the smallest batch so far, and with which settings."""

    channels_last: bool
    smallest: int  # examples
    settings: str


def _built(config: Config, data: ClientData, note: Path) -> tuple[Federation, _Tried]:
    """The federation, and what to note of it. Its model is tried on the data unless it was, as the note says."""
    known = _noted(note)
    with preflight.tried(known and known.channels_last):
        fed = build(config, data=data)
    now = _Tried(fed.channels_last, preflight.smallest(fed.data, fed.local), stamp(terms_of(fed)))
    if known is None:
        return fed, now
    if known.settings == now.settings and known.smallest <= now.smallest:
        return fed, known
    fed = build(config, data=data)
    return fed, now._replace(channels_last=fed.channels_last)


def _noted(path: Path) -> _Tried | None:
    try:
        known = _Tried(**json.loads(path.read_text()))
        return known if list(map(type, known)) == [bool, int, str] else None
    except (OSError, ValueError, TypeError):
        return None


def _at_most(config: Config, clients: int, most: int | None = None) -> Config:
    """With no more processes than it has clients to train, and than it may have: one needs none, and its clients get
    the same bits without."""
    if config.engine not in ("auto", "processes", "stacked"):
        return config
    few = config.model_copy(update={"workers": min(config.workers or cores(), clients, most or clients)})
    return few.model_copy(update={"engine": "loop"}) if few.engine == "processes" and few.workers == 1 else few
