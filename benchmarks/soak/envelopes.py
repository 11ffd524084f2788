"""S1: letters and answers that somebody else wrote, changed, kept or sent again, among those that are right.

A whole federation, whose post hands every node, before each right letter, wrong ones; and its server, before each right
answer, wrong ones. Each must be rejected with the code of its kind. In the end the model, the ledger and what the
clients remember must be, bit for bit, those of the same federation left in peace.
"""

from __future__ import annotations

import json
import random
import struct
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from lamina import ClientData, ErrorFeedback, Federation, LocalSGD, State, wire
from lamina.models import mlp
from lamina.remote import AtNode, AtServer, Lost, MemoryShelf, Node, over
from lamina.remote.envelope import Answer, Letter, seal, unseal
from lamina.remote.keys import Keys, Own, Shared
from lamina.wire.container import checksum
from soak import Result, row

NAMES = ("ann", "bob", "cyd", "dan")
HOMES = ((0, 2), (1, 3))
RUN, OTHER = "soak-1f", "soak-2e"
MAC = b',"mac":"'

Kind = tuple[str, set[str]]  # what is done, the codes it may be rejected with


def keyring(kind: str) -> tuple[Keys, list[Keys], Keys]:
    """Of the server, of each node, and of somebody else."""
    if kind == "hmac":
        shared = b"soak " * 8
        return Shared(shared), [Shared(shared) for _ in HOMES], Shared(b"else " * 8)
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = [bytes([i]) * 32 for i in range(len(HOMES) + 2)]
    public = [Ed25519PrivateKey.from_private_bytes(p).public_key().public_bytes_raw() for p in private]
    clients = {NAMES[c]: public[home] for home, own in enumerate(HOMES) for c in own}
    server = public[len(HOMES)]
    nodes: list[Keys] = [Own(private[home], server, {}) for home in range(len(HOMES))]
    return Own(private[-2], server, clients), nodes, Own(private[-1], server, clients)


def flipped(blob: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(blob))
    return blob[:at] + bytes([blob[at] ^ 1 << draw.randrange(8)]) + blob[at + 1 :]


class Hostile:
    """A Post whose streets are not safe.

    Args:
        wrong: of each kind, at most so many on the way of one letter and its answer; 0: none.
    """

    def __init__(self, nodes: list[Node], keys: tuple[Keys, list[Keys], Keys], wrong: int, seed: int = 0):
        self.nodes = nodes
        self.tried: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.passed: list[str] = []
        self.right = 0
        self._server, self._own, self._stranger = keys
        self._wrong = wrong
        self._draw = random.Random(seed)
        self._letters: list[tuple[int, bytes]] = []
        self._arrived: list[tuple[int, bytes | Lost]] = []
        self._kept_letters: dict[int, list[bytes]] = {}
        self._kept_answers: dict[int, list[bytes]] = {}
        self.due: list[Kind] = []  # what the server has been sent and must reject

    def send(self, letters: Iterable[tuple[int, bytes]], most: int) -> None:
        self._letters += [(client, bytes(blob)) for client, blob in letters]

    def receive(self, timeout_s: float | None) -> tuple[int, bytes | Lost] | None:
        if not self._arrived:
            letters, self._letters = self._letters, []
            self._draw.shuffle(letters)
            for client, blob in letters:
                self._deliver(client, blob)
        return self._arrived.pop(0) if self._arrived else None

    def _deliver(self, client: int, letter: bytes) -> None:
        (home,) = [i for i, node in enumerate(self.nodes) if client in node.clients]
        node, before = self.nodes[home], self._held(home, client)
        for what, code, wrong in self._wrongs(client, letter, self._kept_letters.setdefault(client, []), home, True):
            self._tell(what, code, node, client, wrong)
        assert self._held(home, client) == before, "a wrong letter left a trace"
        ((_, answer),) = node.answer([(client, letter)])
        self.right += 1
        if self._wrong:  # and once more, now that it is answered
            self._tell("letter again", {"E333"}, node, client, letter)
        for what, code, wrong in self._wrongs(client, answer, self._kept_answers.setdefault(client, []), home, False):
            self.due.append((what, code))
            self._arrived.append((client, wrong))
        self._arrived.append((client, answer))
        if self._wrong:
            self.due.append(("answer twice", {"E331", "E333"}))  # the last of a round comes in the next
            self._arrived.append((client, answer))
        for kept, blob in ((self._kept_letters, letter), (self._kept_answers, answer)):
            kept[client] = [*kept[client][-20:], blob]

    def _tell(self, what: str, codes: set[str], node: Node, client: int, wrong: bytes) -> None:
        self.tried[what] += 1
        ((_, said),) = node.answer([(client, wrong)])
        answer = Answer.unpacked(said)
        fine = answer.said == "failed" and answer.why[:4] in codes and not answer.frame and MAC not in said
        self._count(what, fine, f"{what}: {answer.said} {answer.why}")

    def _count(self, what: str, fine: bool, text: str) -> None:
        self.rejected[what] += fine
        self.passed += [] if fine else [text]

    def judged(self, codes: Iterable[str]) -> None:
        """What the server said of all that was wrong, in its order."""
        for code in codes:
            what, expected = self.due.pop(0)
            self.tried[what] += 1
            self._count(what, code in expected, f"{what}: {code}")

    def _held(self, home: int, client: int) -> Any:
        holding = self.nodes[home].shelf.get(client)
        return None if holding is None else (holding.plan, holding.number, holding.puts, [*holding.rows])

    def _wrongs(
        self, client: int, right: bytes, kept: list[bytes], home: int, down: bool
    ) -> Iterator[tuple[str, set[str], bytes]]:
        """(what, codes it may be rejected with, bytes)."""
        if not self._wrong:
            return
        thing = "letter" if down else "answer"
        opened: Any = (Letter if down else Answer).unpacked(right)
        head, body = unseal(right[:4], right)
        genuine = self._server if down else self._own[home]
        draw, signed, later = self._draw, opened.signed, opened.signed._replace(round=opened.signed.round + 1)
        unreadable = {"E334", "E340", "E341", "E343", "E345"}

        def again(keys: Keys | None, **changes: Any) -> bytes:
            return opened._replace(**changes).packed(keys)

        for _ in range(self._wrong):
            if kept:
                yield f"{thing} replayed", {"E333"}, draw.choice(kept)
            yield f"{thing} forged", {"E334"}, again(self._stranger)
            yield f"{thing} unsigned", {"E334"}, again(None)
            yield f"{thing} of another run", {"E335"}, again(genuine, signed=signed._replace(run=OTHER))
            yield f"{thing} truncated", unreadable, right[: 1 + draw.randrange(len(right) - 1)]
            yield f"{thing} with a flipped bit", unreadable, flipped(right, draw)
            frame = bytearray(body)
            frame[draw.randrange(len(frame))] ^= 1
            yield f"{thing} with another frame", {"E334"}, right[: len(right) - len(body)] + bytes(frame)
            other = bytes(unseal(kept[-1][:4], kept[-1])[1]) if kept else bytes(body[:-1])
            yield f"{thing} with an older frame", {"E334"}, right[: len(right) - len(body)] + other
            if down:
                yield "letter of another round", {"E332"}, again(genuine, signed=later)
                yield "letter to another client", {"E330"}, again(genuine, signed=signed._replace(name="eve"))
                as_answer = seal(b"LMA1", {k: x for k, x in head.items() if k != "mac"}, body, keys=self._own[home])
                yield "letter signed as an answer", {"E334"}, retitled(as_answer, b"LML1")
            else:
                earlier = {"E332", "E333", "E334"}
                stale = signed._replace(round=signed.round - 1, number=signed.number - draw.randrange(1, 50))
                yield "answer to an earlier letter", earlier, again(genuine, signed=stale)
                unwritten = signed._replace(number=signed.number + 999)
                yield "answer to no letter", {"E334"}, again(genuine, signed=unwritten)
                yield "answer with another nonce", {"E334"}, again(genuine, signed=signed._replace(nonce="0" * 32))
                yield "answer of another round", {"E334"}, again(genuine, signed=later)
                yield "answer for another client", {"E330"}, again(genuine, client=(client + 1) % len(NAMES))
                yield "answer re-signed by another", {"E334"}, resigned(right, self._stranger)


def retitled(blob: bytes, magic: bytes) -> bytes:
    """The same head with its signature, under another magic."""
    size = struct.unpack_from("<4sI", blob)[1]
    front, text = struct.pack("<4sI", magic, size), blob[16 : 16 + size]
    return b"".join([front, checksum(front, [text]).to_bytes(8, "little"), text, blob[16 + size :]])


def resigned(blob: bytes, keys: Keys) -> bytes:
    """The same, with a signature of somebody else in its place."""
    opened = Answer.unpacked(blob)
    return opened.packed(keys)


def federation(data: ClientData) -> Federation:
    return Federation(
        lambda: mlp((3, 2)), data, method=ErrorFeedback(), uplink=wire.TopK(0.3),
        local=LocalSGD(lr=0.1, batch_size=2), engine="loop",
    )  # fmt: skip


def examples() -> ClientData:
    draw = torch.Generator().manual_seed(1)
    clients = {name: (torch.randn(3, 3, generator=draw), torch.tensor([0, 1, 0])) for name in NAMES}
    return ClientData.from_clients(clients)


def connected(kind: str | None, wrong: int) -> tuple[Federation, Hostile]:
    data = examples()
    keys = keyring(kind or "hmac")
    nodes = []
    for home, own in enumerate(HOMES):
        fed = federation(data.subset(own).among(data.names))
        nodes.append(Node(fed, MemoryShelf(), signing=AtNode(keys[1][home], RUN) if kind else None))
    post = Hostile(nodes, keys, wrong)
    sizes = dict(zip(data.names, data.sizes.tolist(), strict=True))
    signing = AtServer(keys[0], RUN) if kind else None
    return over(federation(ClientData.registry(sizes)), post, signing=signing), post


def remembered(post: Hostile) -> str:
    """Of all clients, what is on their shelves."""
    found = []
    for node in post.nodes:
        for client in sorted(node.clients):
            holding = node.shelf.get(client)
            rows = {} if holding is None else holding.rows
            found.append((client, {t: [x.tolist() for x in _leaves(r.method)] for t, r in rows.items()}))
    return json.dumps(sorted(found))


def _leaves(tree: Any) -> list[torch.Tensor]:
    from lamina.tree import flatten

    return [*flatten(tree).values()]


def through(kind: str | None, rounds: int, wrong: int, judge: Callable[[Hostile, Any], None]) -> tuple[State, Hostile]:
    state: State | None = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "there is no example here")
        fed, post = connected(kind, wrong)
        for after, record in fed.run(rounds):
            state = after
            judge(post, record)
    assert state is not None
    return state, post


def judge(post: Hostile, record: Any) -> None:
    """Events come in the order in which what they are about came; the answer that came twice last, a round later."""
    post.judged(event["code"] for event in record.events)
    assert len(post.due) == bool(post.right), f"{len(post.due)} that nobody rejected"


@row(
    "S1",
    "hmac",
    "ed25519",
    goal="of each kind of wrong envelope 10,000 of 10,000 rejected, of right ones used",
    minutes=6,
)
def envelopes(kind: str, short: bool) -> Result:
    rounds = 13 if short and kind == "ed25519" else 51 if short else 2510
    state, post = through(kind, rounds, 1, judge)
    peace, calm = through(None, rounds, 0, lambda post, record: None)
    same = state.sha256() == peace.sha256() and remembered(post) == remembered(calm)
    tried, rejected = sum(post.tried.values()), sum(post.rejected.values())
    least = min(post.tried.values())
    met = same and tried == rejected and not post.passed and post.right == calm.right == rounds * len(NAMES)
    figure = f"{rejected:,} of {tried:,} rejected, of each of {len(post.tried)} kinds {least:,} or more; "
    figure += f"{post.right:,} of {rounds * len(NAMES):,} taken; model {'the same' if same else 'ANOTHER'}"
    return Result(figure, met, "; ".join(post.passed[:3]))
