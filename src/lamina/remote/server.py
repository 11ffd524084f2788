"""The server's side: an engine whose clients are elsewhere. It hands letters to a post and takes what comes back."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

from lamina.client import Reply, Setup
from lamina.cohort import Faults
from lamina.engine.base import Engine, Kind, Pack
from lamina.errors import ConfigError, expect
from lamina.federation import Federation
from lamina.method import Plan
from lamina.privacy.secure import SecureSum
from lamina.remote import message, summing
from lamina.remote.asked import Asked, Carrier, Post
from lamina.remote.signing import AtServer
from lamina.remote.terms import Terms, terms_of
from lamina.store import Row


class RemoteEngine:
    """Asks clients through a post.

    Args:
        terms: what nodes must have in common with this server.
        here: evaluates the global model.
        enough: messages with which a round is content, though more clients were asked; None: all.
        clock: monotonic, in seconds.
        signing: what letters are signed with; None: nothing is signed.
        secure: clients are asked for their part of a sum, and never for a message of their own; None: for messages.
    """

    name = "remote"
    workers = 1

    def __init__(
        self, post: Post, setup: Setup, terms: Terms, faults: Faults, here: Engine, reason: str, together: bool = False,
        enough: int | None = None, clock: Callable[[], float] = time.monotonic, signing: AtServer | None = None,
        secure: SecureSum | None = None,
    ):  # fmt: skip
        self.reason = reason
        self._by = Carrier(post, setup, terms, faults, clock, signing)
        self._together = together
        self._here = here
        self._enough = enough
        self._secure = secure

    def replies(
        self, kind: Kind, plan: Plan, clients: Sequence[int], rows: Mapping[int, Row], pack: Pack | None = None
    ) -> Iterator[Reply]:
        if kind == "test":
            yield from self._here.replies(kind, plan, clients, rows)
            return
        if kind not in ("round", "probe") or pack is None:
            raise ConfigError(f"clients that are elsewhere are not asked for {kind!r}", code="E118", where="engine")
        if self._secure is not None:
            yield from summing.replies(self._secure, self._by, kind, plan, clients, pack)
            return
        together = self._together and kind == "round"
        enough = self._enough if kind == "round" else None
        asked = Asked(self._by, kind, plan, clients, pack, together=together, enough=enough)
        try:
            for client in clients:
                reply = asked.reply(client)
                yield from asked.beside()
                yield reply
        finally:
            asked.close()

    def close(self) -> None:
        self._here.close()


def over(
    fed: Federation, post: Post, *, together: bool = False, clock: Callable[[], float] = time.monotonic,
    signing: AtServer | None = None,
) -> Federation:  # fmt: skip
    """The same federation with its clients behind a post.

    What its own data has of clients is not used, but for their names and numbers of examples (`ClientData.registry`).

    Args:
        together: a node may send the weighted mean of its clients' messages as one, for a raw uplink. The sums are then
            made in another order, so the model is that of `loop` to rounding; the ledger has what travelled, with the
            first of those clients.
        clock: monotonic, in seconds; deadlines follow it.
        signing: letters are signed with this, and no answer is taken that is not; None: nothing is signed.

    Raises:
        ConfigError: E118 for what would be evaluated at the clients, or where messages cannot be taken together: with
            an uplink that is not raw, a rule, a bound on norms, privacy, or secure sums.
    """
    if together:
        message.expect_raw(fed.uplink)
        message.expect_taken_together(fed.aggregate, fed.faults.norm)
        said = "together=True with privacy: updates are clipped one by one"
        expect(fed.privacy is None, said, code="E118", where="privacy", remedy="let every client send its own message")
        message.expect_in_the_clear(fed.secure)
    if "personal" in (fed.method.withholds or ""):
        warnings.warn("personal models are with clients that are elsewhere: they are not tested", stacklevel=2)
    reason = f"clients are elsewhere; engine {fed.engine} here"
    terms = terms_of(fed)

    def made(setup: Setup, here: Engine) -> RemoteEngine:
        return RemoteEngine(
            post, setup, terms, fed.faults, here, reason, together, fed.enough, clock, signing, fed.secure
        )

    return fed.by("remote", reason, made, sums=True)
