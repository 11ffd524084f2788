"""Answers that no client sends. As a program: a server that is sent 200 of them, and the memory it took."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])] if __name__ == "__main__" else []

import torch  # noqa: E402

from lamina import ClientData, FedAvg, Federation, LocalSGD  # noqa: E402
from lamina.client import Reply  # noqa: E402
from lamina.models import mlp  # noqa: E402
from lamina.remote import Answer, Letter, Lost, Node, over  # noqa: E402
from lamina.remote.staging import LIMIT  # noqa: E402
from lamina.wire import frame  # noqa: E402
from lamina.wire.container import checksum, uv  # noqa: E402


class Spied:
    """Wraps an engine, and knows the plan that it was given last."""

    def __init__(self) -> None:
        self.plan: Any = None
        self.kind = ""
        self._engine: Any = None

    def __call__(self, engine: Any) -> Spied:
        self._engine = engine
        self.name, self.reason, self.workers = engine.name, engine.reason, engine.workers
        return self

    def replies(self, kind: Any, plan: Any, *asked: Any) -> Iterator[Reply]:
        if kind in ("round", "probe"):
            self.kind, self.plan = kind, plan
        yield from self._engine.replies(kind, plan, *asked)

    def close(self) -> None:
        self._engine.close()


def head(kind: int, round: int, client: int, scalars: dict[str, float], sections: dict[str, int]) -> bytes:
    """A frame's front and head with any lengths."""
    parts = [frame.FIXED.pack(kind, round, client), uv(len(scalars))]
    for name, number in scalars.items():
        parts += [uv(len(name)), name.encode(), struct.pack("<d", number)]
    parts += [uv(len(sections))]
    for name, size in sections.items():
        parts += [uv(len(name)), name.encode(), uv(size)]
    inner = b"".join(parts)
    front = frame.FRONT.pack(frame.MAGIC, frame.VERSION, len(inner))
    return front + checksum(front, [inner]).to_bytes(8, "little") + inner


def claims_tebibytes(answer: Answer) -> bytes:
    """A short frame whose head says that its update has 8 TiB."""
    real = frame.unpack(answer.frame)
    lengths = {name: len(blob) for name, blob in real.sections.items()} | {"update": 1 << 43}
    said = head(1, real.round, real.client, dict(real.scalars), lengths)
    return answer._replace(frame=said + bytes(64)).packed()


def garbage(answer: Answer) -> bytes:
    return answer._replace(frame=bytes(i * 7 % 251 for i in range(400))).packed()


def left_over(answer: Answer) -> bytes:
    return answer._replace(frame=bytes(answer.frame) + b"\0").packed()


def no_arrays(answer: Answer) -> bytes:
    real = frame.unpack(answer.frame)
    return answer._replace(frame=frame.pack(real._replace(sections={}))).packed()


# ---- the program


class Crowd:
    """A post on which all clients but one are hostile. They answer last to first, so that all must wait.

    Their messages: random bytes; a right head around random bytes; NaN; more than may come.
    """

    def __init__(self, node: Node, clients: int):
        self.sent = 0
        self._node = node
        self._clients = clients
        self._letters: list[tuple[int, bytes]] = []
        self._most = 0
        self._right: Answer | None = None

    def send(self, letters: Iterable[tuple[int, bytes]], most: int) -> None:
        self._most = most
        for client, blob in letters:
            if client == 0:
                ((_, answer),) = self._node.answer([(client, blob)])
                self._right = Answer.unpacked(answer)
            self._letters.append((client, Letter.unpacked(blob).fingerprint.encode()))  # and not all those plans

    def receive(self, timeout_s: float | None) -> tuple[int, bytes | Lost] | None:
        if not self._letters:
            return None
        client, name = self._letters.pop()
        assert self._right is not None
        if client == 0:
            return client, self._right.packed()
        blob = self._bad(client, name.decode())
        self.sent += len(blob)
        return client, blob

    def _bad(self, client: int, plan: str) -> bytes:
        assert self._right is not None
        real = frame.unpack(self._right.frame)
        room = self._most - 5000
        kind = client % 4
        if kind == 0:
            body = os.urandom(room)
        elif kind == 1:
            sizes = {name: len(blob) for name, blob in real.sections.items()}
            sizes["update"] += room - sum(sizes.values())
            body = head(1, real.round, client, dict(real.scalars), sizes) + os.urandom(sum(sizes.values()))
        elif kind == 2:
            sections = dict(real.sections)
            sections["update"] = sections["update"][:-8] + b"\xff" * 8
            body = frame.pack(real._replace(client=client, sections=sections))
        else:
            body = os.urandom(self._most + 1)
        return self._right._replace(client=client, plan=plan, frame=body).packed()


def peak() -> int:
    """Bytes of memory that this process had at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not say how much memory a process had")


def main(clients: int, width: int) -> None:
    torch.set_num_threads(1)
    y = torch.arange(12) % 3

    def make(data: ClientData) -> Federation:
        return Federation(
            lambda: mlp((32, width, width, 3)), data, method=FedAvg(), cohort="all", seed=7, engine="loop",
            local=LocalSGD(lr=0.1, batch_size=4),
        )  # fmt: skip

    source = torch.Generator().manual_seed(1)
    mine = ClientData.from_clients({"c0": (torch.randn(12, 32, generator=source), y)})
    names = tuple(f"c{i}" for i in range(clients))
    node = Node(make(mine.among(names)))
    crowd = Crowd(node, clients)
    fed = over(make(ClientData.registry(dict.fromkeys(names, 12))), crowd)
    model = sum(x.numel() * x.element_size() for x in fed.initial.params.values())
    first = over(make(ClientData.registry({"c0": 12})), Crowd(Node(make(mine.among(("c0",)))), 1))
    list(first.run(1, evaluate_every=2))  # an honest round, so that all code and its buffers are there
    before = peak()
    ((_, record),) = fed.run(1, evaluate_every=2)
    refused = sum(c.refused is not None for c in record.clients)
    print(peak() - before, 2 * model + LIMIT + 64_000_000, refused, crowd.sent)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
