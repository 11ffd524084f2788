"""The first contact: which clients a node has. From all rolls together follows every client's number."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from typing import NamedTuple

from lamina.data.client_data import ClientData
from lamina.errors import ConfigError, WireError
from lamina.remote.envelope import seal, unseal


class Roll(NamedTuple):
    """One node's clients.

    Args:
        sizes: number of examples by client name.
        lamina: the version that the node runs.
    """

    sizes: dict[str, int]
    lamina: str

    @classmethod
    def of(cls, data: ClientData) -> Roll:
        return cls({data.names[c]: len(data.indices_of(c)) for c in data.here}, version("lamina"))

    def packed(self) -> bytes:
        return seal(b"LMR1", {"lamina": self.lamina, "sizes": self.sizes})

    @classmethod
    def unpacked(cls, blob: bytes) -> Roll:
        """Raises WireError and nothing else."""
        head, _ = unseal(b"LMR1", blob)
        sizes = head.get("sizes")
        fine = isinstance(sizes, dict) and all(type(n) is int and n >= 1 for n in sizes.values())
        if not fine or not isinstance(head.get("lamina"), str):
            raise WireError("the head is not that of a roll", code="E345")
        return cls(dict(sizes), head["lamina"])  # type: ignore[arg-type]  # said above


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
