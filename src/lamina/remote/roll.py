"""The first contact: which clients a node has. From all rolls together follows every client's number."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from typing import NamedTuple

from lamina.data.client_data import ClientData
from lamina.errors import ConfigError, WireError
from lamina.remote.envelope import expect_by, seal, unseal
from lamina.remote.keys import SERVER, Keys
from lamina.remote.signing import Rejected, Signed


class Roll(NamedTuple):
    """One node's clients.

    Args:
        sizes: number of examples by client name.
        lamina: the version that the node runs.
        signed: of the call that it answers, where it is signed.
    """

    sizes: dict[str, int]
    lamina: str
    signed: Signed | None = None

    @classmethod
    def of(cls, data: ClientData | None) -> Roll:
        """None: of a node without clients."""
        if data is None:
            return cls({}, version("lamina"))
        return cls({data.names[c]: len(data.indices_of(c)) for c in data.here}, version("lamina"))

    def packed(self, keys: Keys | None = None) -> bytes:
        signed = {} if self.signed is None else {"signed": self.signed.said()}
        return seal(b"LMR1", {"lamina": self.lamina, "sizes": self.sizes, **signed}, keys=keys)

    @classmethod
    def unpacked(cls, blob: bytes) -> Roll:
        """Raises WireError and nothing else."""
        head, _ = unseal(b"LMR1", blob)
        sizes = head.get("sizes")
        fine = isinstance(sizes, dict) and all(type(n) is int and n >= 1 for n in sizes.values())
        if not fine or not isinstance(head.get("lamina"), str):
            raise WireError("the head is not that of a roll", code="E345")
        return cls(dict(sizes), head["lamina"], Signed.of(head.get("signed")))  # type: ignore[arg-type]  # said above


def call(signed: Signed, keys: Keys) -> bytes:
    """What a node is sent that is to say which clients it has."""
    return seal(b"LMC1", {"signed": signed.said()}, keys=keys)


def called(blob: bytes, keys: Keys) -> Signed:
    """Raises WireError, or Rejected for a call that is not the server's."""
    head, _ = unseal(b"LMC1", blob)
    expect_by(SERVER, blob, keys)
    said = Signed.of(head.get("signed"))
    if said is None:
        raise WireError("the head is not that of a call", code="E345")
    return said


def expect_answered(roll: Roll, blob: bytes, said: Signed, keys: Keys) -> None:
    """Raises Rejected unless this roll, which came as `blob`, answers this call and is signed for all its clients."""
    if not roll.sizes:
        return  # it says nothing that anybody goes by
    expect_by(next(iter(roll.sizes)), blob, keys)
    if roll.signed != said:
        raise Rejected("E333", "its roll answers another call")
    if not keys.one(roll.sizes):
        raise Rejected("E334", "its key is not that of all of its clients")


def register(rolls: Iterable[Roll]) -> dict[str, int]:
    """Number of examples by client name, in the order of the clients' numbers: names that are whole numbers by value,
    else by their letters. `ClientData.registry` and `ClientData.among` take it.

    Raises:
        ConfigError: E118 for nodes with another version of lamina than this one, a client that two nodes have, or none.
    """
    sizes: dict[str, int] = {}
    mine = version("lamina")
    for roll in rolls:
        if roll.lamina != mine:
            raise ConfigError(
                f"a node runs lamina {roll.lamina}, the server {mine}",
                code="E118",
                where=f"the node of client {next(iter(roll.sizes), 'none')!r}",
                remedy=f"install lamina {mine} there",
            )
        twice = sorted(sizes.keys() & roll.sizes.keys())
        if twice:
            raise ConfigError(f"two nodes have a client {twice[0]!r}", code="E118", remedy="give it another name")
        sizes |= roll.sizes
    if not sizes:
        raise ConfigError("no node has a client", code="E118", remedy="start the nodes first")
    numbered = all(name.isascii() and name.isdigit() for name in sizes)
    return dict(sorted(sizes.items(), key=(lambda item: (int(item[0]), item[0])) if numbered else None))
