"""The secure sum itself: its two roles, and what they say to each other as bytes.

Bonawitz et al., *Practical Secure Aggregation for Privacy-Preserving Machine Learning*, CCS 2017, for a server that
follows the protocol and looks at everything:

    keys      client -> server   two public keys, and a hash of its own seed
                                                                     server -> all   everybody's keys
    shares    client -> server   for every other client, sealed: a share of its mask key and one of its own seed
                                                                     server -> all   those that are for it
    masked    client -> server   x + PRG(own seed) + sum over v after it PRG(with v) - sum over v before it PRG(with v)
    unmask    server -> those who did   who did                      client -> server   of each of these a share of its
                                                                     own seed; of each who did not, of its mask key

All mod 2^bits. In the sum the masks between two who came cancel; the others the server makes again from the shares of
`threshold` clients. It has the own seed of those who came and the mask key of those who did not, and never both of
one: without the other, one hides the vector as well as the two. Every round has fresh keys.

Clients may be wrong, too. What a shared secret comes to is looked at, by the hash of a seed and by the public key, so a
wrong share makes no wrong sum: others are tried instead. A share that does not open is as good as none.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import numpy as np

from lamina.privacy import shamir
from lamina.privacy.fixed import Ring, low
from lamina.privacy.keys import KEY, TAG, Pair, masks, seal, unseal

Vectors = Mapping[str, Ring]  # tree -> its elements
Widths = Mapping[str, int]  # tree -> bits of an element, in the order of the trees

SEALED = 2 * shamir.SHARE + TAG  # bytes of a share on its way
SAID = 3 * KEY  # bytes of what a client says first

_WHO = struct.Struct("<I")
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
        self._about = b""
        self._held: dict[int, tuple[bytes, bytes]] = {}  # whose -> shares of its mask key and of its own seed
        self._others: frozenset[int] = frozenset()  # who masks with it
        self._asked = False

    def keys(self) -> bytes:
        return self._sealing.public + self._masking.public + _hash(self._seed)

    def shares(self, roster: bytes, threshold: int, about: bytes = b"") -> bytes:
        """For everybody else on the roster.

        Args:
            about: what they have to agree on: a share opens only for who says the same.

        Raises:
            ValueError: it is no roster, or its own keys are not on it, or keys of others are none.
        """
        self._roster = read_table(roster, 2 * KEY)
        self._about = about
        if self._roster.get(self.who) != self._sealing.public + self._masking.public:
            raise ValueError("the list of keys does not have its own")
        points = [who + 1 for who in self._roster]
        of_key = shamir.split(self._masking.private, points, threshold)
        of_seed = shamir.split(self._seed, points, threshold)
        self._held[self.who] = of_key[self.who + 1], of_seed[self.who + 1]
        sealed = {}
        for who in self._roster.keys() - {self.who}:
            self._masking.agreed(self._roster[who][KEY:], b"mask")  # so keys that are none are found now
            text = of_key[who + 1] + of_seed[who + 1]
            sealed[who] = seal(self._sealing_key(who, self.who, who), text, self._said(self.who, who))
        return table({who: sealed[who] for who in self._roster if who != self.who})

    def take(self, shares: bytes) -> None:
        """Those of the others that are for this one: who is not among them takes no part. Raises ValueError for what
        nobody sealed."""
        lacking = self.take_sealed(shares)
        if lacking:
            raise ValueError(f"a sealed share of client {min(lacking)} is not what was sealed")

    def take_sealed(self, shares: bytes) -> frozenset[int]:
        """The same, but who sealed none that opens is told. Their masks are made all the same. Raises ValueError for
        clients that are not on the roster."""
        found = read_table(shares, SEALED)
        strange = found.keys() - self._roster.keys()
        if self.who in found:
            raise ValueError("a share from itself is not what was sealed for it")
        if strange:
            raise ValueError(f"shares of client {min(strange)}, who is not on the list of keys")
        self._others = frozenset(found)
        lacking = set()
        for who, sealed in found.items():
            try:
                text = unseal(self._sealing_key(who, who, self.who), sealed, self._said(who, self.who))
            except ValueError:
                lacking.add(who)
                continue
            self._held[who] = text[: shamir.SHARE], text[shamir.SHARE :]
        return frozenset(lacking)

    def masked(self, vectors: Vectors) -> dict[str, Ring]:
        """What it sends instead of these."""
        with_ = {who: self._masking.agreed(self._roster[who][KEY:], b"mask") for who in sorted(self._others)}
        made = {}
        for i, (tree, bits) in enumerate(self._widths.items()):
            x = vectors[tree] + masks(self._seed, _OWN + i, len(vectors[tree]), bits)
            for who, seed in with_.items():
                mask = masks(seed, i, len(x), bits)
                x = x + mask if who > self.who else x - mask
            made[tree] = x & low(bits)
        return made

    @property
    def held(self) -> Held:
        """All that it needs to unmask."""
        return Held(self.who, self._others, dict(self._held))

    def unmask(self, came: bytes) -> bytes:
        """See `Held.unmask`. Once only: whoever asks twice, with two lists, would learn both of one.

        Raises:
            ValueError: it was asked before, or the list is none.
        """
        if self._asked:
            raise ValueError("asked twice")
        answer = self.held.unmask(came)
        self._asked = True
        return answer

    def packed(self) -> bytes:
        """Its secrets, for the time until its next step."""
        roster, held = table(self._roster), self.held.packed()
        parts = (self._sealing.private, self._masking.private, self._seed, self._about, roster, held)
        return b"".join(_WHO.pack(len(part)) + part for part in parts)

    @classmethod
    def unpacked(cls, who: int, widths: Widths, blob: bytes) -> Client:
        made = cls(who, widths)
        parts, at = [], 0
        while at < len(blob):
            end = at + _WHO.size + _WHO.unpack_from(blob, at)[0]
            parts.append(blob[at + _WHO.size : end])
            at = end
        sealing, masking, made._seed, made._about, roster, held = parts
        made._sealing, made._masking = Pair(sealing), Pair(masking)
        made._roster = read_table(roster, 2 * KEY)
        _, made._others, made._held = Held.unpacked(who, held)
        return made

    def _said(self, sender: int, receiver: int) -> bytes:
        return _WHO.pack(sender) + _WHO.pack(receiver) + self._about

    def _sealing_key(self, other: int, sender: int, receiver: int) -> bytes:
        way = b"share:" + _WHO.pack(sender) + _WHO.pack(receiver)
        return self._sealing.agreed(self._roster[other][:KEY], way)


class Held(NamedTuple):
    """What of others' secrets a client has once its vector is masked.

    Args:
        others: who masked with it.
        shares: whose -> shares of its mask key and of its own seed, its own ones among them.
    """

    who: int
    others: frozenset[int]
    shares: dict[int, tuple[bytes, bytes]]

    def unmask(self, came: bytes) -> bytes:
        """Shares: the own seed of who came, the mask key of who did not.

        Raises:
            ValueError: it is not on the list itself, or somebody is who has no mask in common with it.
        """
        there = {*read_table(came, 0)}
        if self.who not in there:
            raise ValueError("it is asked to unmask a sum that it is not in")
        strange = there - self.others - {self.who}
        if strange:
            raise ValueError(f"it is asked to unmask client {min(strange)}, who was not there for the shares")
        return table({who: seed if who in there else key for who, (key, seed) in self.shares.items()})

    def packed(self) -> bytes:
        shares = table({who: key + seed for who, (key, seed) in self.shares.items()})
        return table(dict.fromkeys(sorted(self.others), b"")) + shares + _WHO.pack(len(self.others))

    @classmethod
    def unpacked(cls, who: int, blob: bytes) -> Held:
        cut = _WHO.size * _WHO.unpack_from(blob, len(blob) - _WHO.size)[0]
        shares = read_table(blob[cut : -_WHO.size], 2 * shamir.SHARE)
        apart = {whose: (two[: shamir.SHARE], two[shamir.SHARE :]) for whose, two in shares.items()}
        return cls(who, frozenset(read_table(blob[:cut], 0)), apart)


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
        self._hashes: dict[int, bytes] = {}  # of own seeds
        self._shares: dict[int, dict[int, bytes]] = {}
        self._sums: dict[str, Ring] = {}

    def keys(self, who: int, said: bytes) -> None:
        """Raises ValueError for keys of another length."""
        if len(said) != SAID:
            raise ValueError(f"keys of {len(said)} bytes, expected {SAID}")
        self._keys[who], self._hashes[who] = said[: 2 * KEY], said[2 * KEY :]

    def roster(self) -> bytes:
        return table(self._keys)

    def shares(self, who: int, shares: bytes) -> None:
        """Raises ValueError where they are not one for everybody else on the roster."""
        found = read_table(shares, SEALED)
        if found.keys() != self._keys.keys() - {who}:
            raise ValueError(f"shares for {len(found)} clients, expected one for each of {len(self._keys) - 1} others")
        self._shares[who] = found

    def shares_for(self, who: int) -> bytes:
        return table({other: shares[who] for other, shares in self._shares.items() if who in shares})

    def masked(self, who: int, vectors: Vectors) -> None:
        for tree, x in vectors.items():
            old = self._sums.get(tree)
            self._sums[tree] = x.copy() if old is None else old + x
        self.came.append(who)

    def who_came(self) -> bytes:
        return table(dict.fromkeys(self.came, b""))

    def answers(self, answer: bytes) -> dict[int, bytes]:
        """What a client says to unmask: whose secret -> its share. Raises ValueError for what says something else."""
        found = read_table(answer, shamir.SHARE)
        strange = found.keys() - self._shares.keys()
        if strange:
            raise ValueError(f"a share of client {min(strange)}'s secret, whom nobody asked about")
        return found

    def sums(self, answers: Mapping[int, bytes]) -> dict[str, Ring]:
        """Of all who came, from the answers of those who were left then.

        Raises:
            ValueError: fewer than the threshold answered, or their shares do not fit.
        """
        if len(answers) < self.threshold:
            raise ValueError(f"{len(answers)} clients are left, {self.threshold} are needed to take the masks away")
        shares: dict[int, dict[int, bytes]] = {who: {} for who in self._shares}
        for helper, answer in answers.items():
            for who, share in self.answers(answer).items():
                shares[who][helper + 1] = share
        seeds = {who: self._secret(who, shares[who], self._is_seed) for who in self.came}
        gone = {who: Pair(self._secret(who, shares[who], self._is_key)) for who in self._shares if who not in seeds}
        made = {}
        for i, (tree, bits) in enumerate(self._widths.items()):
            x = self._sums[tree]
            for who in self.came:
                x = x - masks(seeds[who], _OWN + i, len(x), bits)
            for absent, pair in gone.items():  # take away what those who came added for it
                for who in self.came:
                    mask = masks(pair.agreed(self._keys[who][KEY:], b"mask"), i, len(x), bits)
                    x = x - mask if absent > who else x + mask
            made[tree] = x & low(bits)
        return made

    def _secret(self, who: int, shares: Mapping[int, bytes], fits: Callable[[int, bytes], bool]) -> bytes:
        """Of as many shares as are needed; where one of them is wrong, of the next ones."""
        points = [*shares]
        if len(points) < self.threshold:
            said = f"{len(points)} clients have a share of client {who}'s secret, {self.threshold} are needed"
            raise ValueError(said)
        for start in range(len(points)):
            some = [points[(start + k) % len(points)] for k in range(self.threshold)]
            try:
                secret = shamir.combine({x: shares[x] for x in some})
            except ValueError:
                continue
            if fits(who, secret):
                return secret
        raise ValueError(f"the shares of client {who}'s secret make another one: some of them are wrong")

    def _is_seed(self, who: int, secret: bytes) -> bool:
        return _hash(secret) == self._hashes[who]

    def _is_key(self, who: int, secret: bytes) -> bool:
        return Pair(secret).public == self._keys[who][KEY:]


def _hash(seed: bytes) -> bytes:
    return hashlib.sha256(b"lamina secure sum: own seed" + seed).digest()


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
