"""The secure sum itself: its two roles, and what they say to each other as bytes.

Bonawitz et al., *Practical Secure Aggregation for Privacy-Preserving Machine Learning*, CCS 2017, for a server that
follows the protocol and looks at everything:

    keys      client -> server   two public keys                     server -> all   everybody's
    shares    client -> server   for every other client, sealed: a share of its mask key and one of its own seed
                                                                     server -> all   those that are for it
    masked    client -> server   x + PRG(own seed) + sum over v after it PRG(with v) - sum over v before it PRG(with v)
    unmask    server -> those who did   who did                      client -> server   of each of these a share of its
                                                                     own seed; of each who did not, of its mask key

All mod 2^bits. In the sum the masks between two who came cancel; the others the server makes again from the shares of
`threshold` clients. It has the own seed of those who came and the mask key of those who did not, and never both of
one: without the other, one hides the vector as well as the two. Every round has fresh keys.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Collection, Mapping

import numpy as np

from lamina.privacy import shamir
from lamina.privacy.fixed import Ring, low
from lamina.privacy.keys import KEY, TAG, Pair, masks, seal, unseal

Vectors = Mapping[str, Ring]  # tree -> its elements
Widths = Mapping[str, int]  # tree -> bits of an element, in the order of the trees

_WHO = struct.Struct("<I")
_SEALED = 2 * shamir.SHARE + TAG
_OWN = 1 << 32  # added to a tree's number: the purpose of an own mask


class Client:
    """One client in one round.

    Args:
        who: its number, below 2^32 - 1.
        widths: of the trees that it will send.
    """

    def __init__(self, who: int, widths: Widths):
        self.who = who
        self._widths = widths
        self._sealing = Pair()  # for what others may read
        self._masking = Pair()
        self._seed = secrets.token_bytes(KEY)
        self._roster: dict[int, bytes] = {}
        self._held: dict[int, tuple[bytes, bytes]] = {}  # whose -> shares of its mask key and of its own seed
        self._asked = False

    def keys(self) -> bytes:
        return self._sealing.public + self._masking.public

    def shares(self, roster: bytes, threshold: int) -> bytes:
        """For everybody else on the roster."""
        self._roster = read_table(roster, 2 * KEY)
        points = [who + 1 for who in self._roster]
        of_key = shamir.split(self._masking.private, points, threshold)
        of_seed = shamir.split(self._seed, points, threshold)
        self._held[self.who] = of_key[self.who + 1], of_seed[self.who + 1]
        sealed = {}
        for who in self._others():
            text = of_key[who + 1] + of_seed[who + 1]
            sealed[who] = seal(self._sealing_key(who, self.who, who), text, _WHO.pack(self.who) + _WHO.pack(who))
        return table(sealed)

    def take(self, shares: bytes) -> None:
        """Those of the others that are for this one: who is not among them takes no part. Raises ValueError for what
        nobody sealed."""
        for who, sealed in read_table(shares, _SEALED).items():
            about = _WHO.pack(who) + _WHO.pack(self.who)
            text = unseal(self._sealing_key(who, who, self.who), sealed, about)
            self._held[who] = text[: shamir.SHARE], text[shamir.SHARE :]

    def masked(self, vectors: Vectors) -> dict[str, Ring]:
        """What it sends instead of these."""
        with_ = {who: self._masking.agreed(self._roster[who][KEY:], b"mask") for who in self._held if who != self.who}
        made = {}
        for i, (tree, bits) in enumerate(self._widths.items()):
            x = vectors[tree] + masks(self._seed, _OWN + i, len(vectors[tree]), bits)
            for who, seed in with_.items():
                mask = masks(seed, i, len(x), bits)
                x = x + mask if who > self.who else x - mask
            made[tree] = x & low(bits)
        return made

    def unmask(self, came: bytes) -> bytes:
        """Shares: the own seed of who came, the mask key of who did not. Once only: whoever asks twice, with two lists,
        would learn both of one.

        Raises:
            ValueError: it was asked before, or is not on the list itself.
        """
        there = {*read_table(came, 0)}
        if self._asked or self.who not in there:
            raise ValueError("asked twice" if self._asked else "it is asked to unmask a sum that it is not in")
        self._asked = True
        return table({who: seed if who in there else key for who, (key, seed) in self._held.items()})

    def _others(self) -> list[int]:
        return [who for who in self._roster if who != self.who]

    def _sealing_key(self, other: int, sender: int, receiver: int) -> bytes:
        way = b"share:" + _WHO.pack(sender) + _WHO.pack(receiver)
        return self._sealing.agreed(self._roster[other][:KEY], way)


class Server:
    """The server in one round. What it is given is all that it ever sees of a client.

    Args:
        threshold: clients without whom there is no sum.
    """

    def __init__(self, widths: Widths, threshold: int):
        self.threshold = threshold
        self.came: list[int] = []
        self._widths = widths
        self._keys: dict[int, bytes] = {}
        self._shares: dict[int, dict[int, bytes]] = {}
        self._sums: dict[str, Ring] = {}

    def keys(self, who: int, keys: bytes) -> None:
        self._keys[who] = keys

    def roster(self) -> bytes:
        return table(self._keys)

    def shares(self, who: int, shares: bytes) -> None:
        self._shares[who] = read_table(shares, _SEALED)

    def shares_for(self, who: int) -> bytes:
        return table({other: shares[who] for other, shares in self._shares.items() if who in shares})

    def masked(self, who: int, vectors: Vectors) -> None:
        for tree, x in vectors.items():
            old = self._sums.get(tree)
            self._sums[tree] = x.copy() if old is None else old + x
        self.came.append(who)

    def who_came(self) -> bytes:
        return table(dict.fromkeys(self.came, b""))

    def sums(self, answers: Mapping[int, bytes]) -> dict[str, Ring]:
        """Of all who came, from the answers of those who were left then.

        Raises:
            ValueError: fewer than the threshold answered, or their shares do not fit.
        """
        if len(answers) < self.threshold:
            raise ValueError(f"{len(answers)} clients are left, {self.threshold} are needed to take the masks away")
        shares: dict[int, dict[int, bytes]] = {}
        for helper in [*answers][: self.threshold]:
            for who, share in read_table(answers[helper], shamir.SHARE).items():
                shares.setdefault(who, {})[helper + 1] = share
        secret = {who: shamir.combine(shares[who]) for who in self._shares}
        gone = {who: Pair(secret[who]) for who in self._shares if who not in self.came}
        for who, pair in gone.items():
            if pair.public != self._keys[who][KEY:]:
                raise ValueError(f"the shares of client {who} make another key than its own")
        made = {}
        for i, (tree, bits) in enumerate(self._widths.items()):
            x = self._sums[tree]
            for who in self.came:
                x = x - masks(secret[who], _OWN + i, len(x), bits)
            for absent, pair in gone.items():  # take away what those who came added for it
                for who in self.came:
                    mask = masks(pair.agreed(self._keys[who][KEY:], b"mask"), i, len(x), bits)
                    x = x - mask if absent > who else x + mask
            made[tree] = x & low(bits)
        return made


# ---- tables: (client, so many bytes), one after the other


def table(rows: Mapping[int, bytes]) -> bytes:
    return b"".join(_WHO.pack(who) + content for who, content in rows.items())


def read_table(blob: bytes, width: int) -> dict[int, bytes]:
    """Raises ValueError for what is no table of this width, or names a client twice."""
    size = _WHO.size + width
    if len(blob) % size:
        raise ValueError(f"a table of {len(blob)} bytes, expected a multiple of {size}")
    rows = [blob[at : at + size] for at in range(0, len(blob), size)]
    made = {_WHO.unpack_from(row)[0]: row[_WHO.size :] for row in rows}
    if len(made) < len(rows):
        raise ValueError("a table names a client twice")
    return made


def plain_sum(vectors: Collection[Vectors], widths: Widths) -> dict[str, Ring]:
    """What the whole comes to, without hiding anything."""
    made = {}
    for tree, bits in widths.items():
        total: Ring = np.zeros_like(next(iter(vectors))[tree])
        for each in vectors:
            total = total + each[tree]
        made[tree] = total & low(bits)
    return made
