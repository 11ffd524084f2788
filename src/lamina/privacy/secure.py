"""Secure sums: what the server may not see, and where they are refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from lamina import wire
from lamina.errors import expect, is_number, is_whole
from lamina.method import Chain, Method
from lamina.privacy.fixed import WIDE, exponent
from lamina.privacy.keys import expect_installed

FEWEST = 3  # of two, each would know the other's update from the sum and its own


@dataclass(frozen=True)
class SecureSum:
    """The server learns the sum of the clients' messages, and of no client more than that.

    Args:
        bits: of an entry of an update on the wire, 8 to 62.
        threshold: share of a round's clients that must be there to the end, 0.5 < threshold <= 1, rounded up. That
            many of them together could also take away the mask of any one.
        limit: largest absolute value of an entry of an update, 0 < limit <= 1024; who exceeds it takes no part in the
            round (E319). An entry is rounded to about limit * clients / 2^(bits - 1).
    """

    bits: int = 32
    threshold: float = 0.6
    limit: float = 16.0

    def __post_init__(self) -> None:
        fine = is_whole(self.bits, 8) and self.bits < WIDE
        expect(fine, f"bits={self.bits!r}: expected a whole number from 8 to {WIDE - 1}", where="secure.bits")
        fine = is_number(self.threshold, 0) and 0.5 < self.threshold <= 1
        expect(fine, f"threshold={self.threshold!r}: expected 0.5 < threshold <= 1", where="secure.threshold")
        fine = is_number(self.limit, 0) and 0 < self.limit <= 1024
        expect(fine, f"limit={self.limit!r}: expected 0 < limit <= 1024", where="secure.limit")

    def needed(self, clients: int) -> int:
        """Clients of so many that must be there to the end."""
        return math.ceil(self.threshold * clients - 1e-9)


class Plain(NamedTuple):
    """What of a federation decides whether its messages can be summed securely, beside the method."""

    uplink: wire.Codec
    buffers: str  # policy; "" where the model has none
    rule: bool  # updates are not averaged
    private: bool
    accuracy_before: bool
    norm: str
    over_select: float
    cohort: int


def expect_additive(secure: SecureSum, method: Method[Any, Any], given: Plain) -> None:
    """Raises ConfigError E123 where messages are no sum over common entries, with the reason."""

    def refuse(fine: bool, what: str, why: str, where: str, remedy: str | None = None) -> None:
        expect(fine, f"secure sums with {what}: {why}", code="E123", where=where, remedy=remedy)

    expect_installed()
    for part in method.methods if isinstance(method, Chain) else (method,):
        why = _not_additive(part)
        refuse(why is None, repr(part), str(why), "method", "`lamina explain E123` says which methods have sums")
    refuse(
        given.uplink == wire.Dense(), f"uplink={given.uplink!r}",
        "an entry travels as an element of a ring, and every client has to send the same ones", "uplink",
        "uplink='fp32', and secure.bits for the size of an entry",
    )  # fmt: skip
    refuse(
        given.buffers != "average", "buffers='average'", "of whole-numbered buffers the maximum is taken, which is "
        "no sum, and a running variance knows no limit", "buffers", "buffers='keep' or 'skip'",
    )  # fmt: skip
    said = "it looks at every client's update by itself, and nobody can"
    refuse(not given.rule, "a rule for the updates", said, "aggregate", "aggregate='mean'")
    refuse(given.norm == "off", f"norm={given.norm!r}", said, "faults.norm", "faults.norm='off'")
    refuse(
        not given.accuracy_before, "accuracy_before", "it tests every client's model by itself, and nobody has one",
        "accuracy_before", "accuracy_before=false",
    )  # fmt: skip
    refuse(
        given.over_select == 1, f"over_select={given.over_select:g}", "who is in the sum cannot be taken out of it",
        "faults.over_select", "faults.over_select=1",
    )  # fmt: skip
    refuse(
        not given.private, "privacy", "a cohort that is drawn client by client may be one client, whose sum hides "
        "nothing, and with masks the server could not clip", "secure", "one of the two",
    )  # fmt: skip
    refuse(
        given.cohort >= FEWEST, f"a cohort of {given.cohort}", "two clients know each other's update from the sum, "
        "and the sum of one is its update", "cohort", f"at least {FEWEST}",
    )  # fmt: skip
    exponent(secure.bits, given.cohort, secure.limit)


def _not_additive(m: Method[Any, Any]) -> str | None:
    """Why a method is refused, by what it declares."""
    reasons = (
        (m.alone, "it shares nothing"),
        ("loss" in m.sends, "it sends a tree called loss, which is the name of the sum of the clients' losses"),
        (m.masks == "clients", "the clients vote on the mask with tensors of their own, which are no part of the sum"),
        (m.compensates, "each client sends the entries that it chooses, and masks cancel only where all send the same"),
        (m.encodes, "what it sends has no limit that is known before, so sums could leave the ring"),
    )
    return next((why for holds, why in reasons if holds), None)
