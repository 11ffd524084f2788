"""A node: Flower starts a process for every message, so all that lasts is on the node's disk.

Of what Flower keeps for a node, `Context.state`, only a counter is used: it lives in the SuperNode's memory, travels
with every message, and is gone when the SuperNode is.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from lamina.config import build, data_of
from lamina.data import ClientData
from lamina.errors import WireError, expect
from lamina.flower.records import packed, unpacked
from lamina.flower.settings import NodeKeys, back, loaded
from lamina.remote import DiskShelf, Node, Roll, bundled, unbundled

_COUNTER = "lamina"


def client_app(config: str | Path) -> ClientApp:
    """What Flower runs at a node.

    Args:
        config: of the experiment, beside the app.
    """
    app: Any = ClientApp()
    path = Path(config)

    def roll(message: Message, context: Context) -> Message:
        data = _here(path, NodeKeys.of(context.node_config))
        return Message(packed(Roll.of(data).packed()), reply_to=message)

    def train(message: Message, context: Context) -> Message:
        blob, about = unpacked(message.content)
        answers = _answered(path, NodeKeys.of(context.node_config), blob, about)
        before = context.state.config_records.get(_COUNTER, {"answered": 0})
        context.state[_COUNTER] = ConfigRecord({"answered": int(before["answered"]) + 1})
        return Message(packed(answers), reply_to=message)

    app.query()(roll)
    app.train()(train)
    return app


def _here(path: Path, keys: NodeKeys) -> ClientData:
    data = data_of(loaded(path, keys.data))
    return data.subset(keys.chosen(len(data))) if keys.mine else data


def _answered(path: Path, keys: NodeKeys, blob: bytes, about: dict[str, Any]) -> bytes:
    """Raises WireError for what is said about the letters, if it is not what a server says."""
    config = loaded(path, keys.data)
    data = _here(path, keys)
    try:
        numbers = dict(zip(about["names"], about["numbers"], strict=True))
        names = [f"({number})" for number in range(int(about["clients"]))]
        for name, number in numbers.items():
            names[number] = name
        experiment = str(about["experiment"])
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise WireError(f"a message without its {error}", code="E345") from None
    own = {name: place for place, name in enumerate(data.names)}
    lacking = sorted(numbers.keys() - own.keys())
    expect(not lacking, f"client {lacking[:1]} is not here any more", code="E118", where="node")
    asked = data.subset([own[name] for name in numbers])
    alone = replace(asked, test=None, client_tests=None, check=False).among(names)
    fed = build(config, data=alone)
    shelf = DiskShelf(fed, keys.state_dir, experiment)
    with Node(fed, shelf, back=back(config)) as node:
        return bundled(node.answer(unbundled(blob)))
