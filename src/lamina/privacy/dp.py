"""Client-level differential privacy: DP-FedAvg.

McMahan, Ramage, Talwar, Zhang, *Learning Differentially Private Recurrent Language Models*, ICLR 2018 (arXiv
1710.06963), with the fixed denominator of its equation for f_f:

    cohort   every client by itself with probability q = cohort / clients        # Poisson: any size, also nobody
    client   u <- u * min(1, clip / |u|)                                          # |u| over all tensors together
    server   mean = (sum u + N(0, (noise * clip)^2)) / cohort                     # the expected number, not the real

What is released is the sequence of models. Epsilon is that of `accountant`, for two sets of clients of which one has
one client more. The server is trusted: it clips what it has decoded, so no client can take more than its share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from lamina import wire
from lamina.client import Reply
from lamina.cohort import Faults, draw_each
from lamina.errors import expect, is_number
from lamina.method import Chain, Method, Plan
from lamina.privacy.accountant import Made, epsilon
from lamina.privacy.noise import fresh_key, gaussian, key_of
from lamina.tree import Message, Params, cut, squared_norms

_MARGIN = 1 - 2.0**-20  # of the clip, so that rounding to float32 leaves it below

Spent = tuple[Made, ...] | None  # what a state has cost; None: a round was made that nothing accounts for


@dataclass(frozen=True)
class DP:
    """A bound on what the models of a run say about any one client.

    Args:
        clip: largest norm of a client's update, over all its tensors together, > 0.
        noise: standard deviation of what is added to the sum of the updates, in units of `clip`, > 0.
        delta: at which epsilon is reported, 0 < delta < 1 / clients.
        noise_seed: "run": cohorts and noise follow from the run's seed, so the run can be replayed, and whoever knows
            or guesses the seed can take the noise away again; "system": from the operating system, nowhere written
            down, so that no second run gives the same model.
    """

    clip: float
    noise: float
    delta: float = 1e-5
    noise_seed: Literal["run", "system"] = "run"

    def __post_init__(self) -> None:
        for name in ("clip", "noise"):
            value = getattr(self, name)
            fine = is_number(value, 0) and 0 < value < float("inf")
            expect(fine, f"{name}={value!r}: expected a number > 0", where=f"privacy.{name}")
        fine = is_number(self.delta, 0, 1) and self.delta > 0
        expect(fine, f"delta={self.delta!r}: expected 0 < delta < 1", where="privacy.delta")
        fine = self.noise_seed in ("run", "system")
        said = f"noise_seed={self.noise_seed!r}: expected 'run' or 'system'"
        expect(fine, said, where="privacy.noise_seed")


class Terms(NamedTuple):
    """What of a federation the guarantee depends on beside the method."""

    weights: str
    buffers: str  # policy; "" where the model has none
    availability: str
    faults: Faults
    rule: bool  # updates are not averaged
    uplink: wire.Codec
    clients: int


def expect_covered(dp: DP, method: Method[Any, Any], terms: Terms) -> None:
    """Raises ConfigError E122 for what the guarantee would not cover, with the reason."""

    def refuse(covered: bool, what: str, why: str, where: str, remedy: str | None = None) -> None:
        expect(covered, f"privacy with {what}: {why}", code="E122", where=where, remedy=remedy)

    for part in method.methods if isinstance(method, Chain) else (method,):
        why = _uncovered(part)
        refuse(why is None, repr(part), str(why), "method", "`lamina explain E122` says which methods are covered")
    refuse(
        terms.weights == "uniform", f"weights={terms.weights!r}",
        "a client's share would depend on how much data it and the others have", "weights", "weights='uniform'",
    )  # fmt: skip
    refuse(
        terms.buffers != "average", "buffers='average'", "nothing clips or noises the mean of the model's buffers",
        "buffers", "buffers='keep' or 'skip', or a model without BatchNorm",
    )  # fmt: skip
    refuse(
        terms.availability == "always", f"availability={terms.availability!r}",
        "who is there decides who is drawn, so the draw hides nobody", "availability", "availability='always'",
    )  # fmt: skip
    refuse(
        terms.faults == Faults(terms.faults.reply_deadline_s), repr(terms.faults),
        "who is asked and who counts may depend on chance alone, and no round may fail because few were drawn",
        "faults", "leave faults as it is, but for reply_deadline_s",
    )  # fmt: skip
    refuse(
        not terms.rule, "a rule for the updates", "the noise is for a sum of clipped updates, and it is none",
        "aggregate", "aggregate='mean'",
    )  # fmt: skip
    refuse(
        isinstance(terms.uplink, wire.Dense), f"uplink={terms.uplink!r}",
        "which entries a client sends depends on its data, and only whole updates are clipped and noised here",
        "uplink", "a dense uplink: fp32, lossless, fp16, bf16, int8 or int4",
    )  # fmt: skip
    refuse(
        dp.delta * terms.clients < 1, f"delta={dp.delta:g}",
        f"of {terms.clients} clients it lets one be given away entirely", "privacy.delta",
        f"a delta well below 1 / clients = {1 / terms.clients:.2g}",
    )  # fmt: skip


def _uncovered(m: Method[Any, Any]) -> str | None:
    """Why a method is refused, by what it declares."""
    beside = sorted(m.sends - {"update"})
    reasons = (
        (m.hold > 1, f"its cohort stays together for {m.hold} rounds, so that those are not drawn independently"),
        (m.alone, "it shares nothing, so there is nothing to protect"),
        (m.withholds == "waiting", "which layers wait depends on the clients' updates, and nothing noises that choice"),
        (
            m.withholds == "recycled",
            "which layers are sent depends on the clients' updates, and that choice is no part of what is accounted",
        ),
        (
            m.has("probe"),
            "it asks every client something before the first round, and nothing noises the answers",
        ),
        (m.masks == "clients", "the mask depends on what the clients' data makes them vote for"),
        (m.shocks, "each client prunes by its own gradients, and an update would begin with all that it pruned"),
        (bool(beside), f"it sends {', '.join(beside)} beside the update, which nothing clips or noises"),
        (m.needs_moments, "it reads the norms of the clients' updates, which nothing noises"),
        (m.compensates, "what the clip takes from an update would be owed and sent later, round after round"),
        (m.encodes, "what it sends is a code of the update, so the clip would not be one of the update"),
    )
    return next((why for holds, why in reasons if holds), None)


class Guard:
    """The guarantee of one federation.

    Args:
        cohort: clients expected in a round.
    """

    def __init__(self, dp: DP, seed: int, clients: int, cohort: int):
        self.dp = dp
        self._key = key_of(seed) if dp.noise_seed == "run" else fresh_key()
        self._clients = clients
        self._cohort = cohort
        self.q = cohort / clients

    @property
    def facts(self) -> dict[str, Any]:
        """For run.json; never a key."""
        dp = self.dp
        return {
            "clip": dp.clip, "noise": dp.noise, "delta": dp.delta, "sampling": self.q, "noise_seed": dp.noise_seed,
        }  # fmt: skip

    def drawn(self, t: int) -> tuple[int, ...]:
        """The cohort of round t."""
        return draw_each(self._key, t, self._clients, self.q)

    def clipped(self, update: Params) -> Params:
        norm = sum(squared_norms(update).values()) ** 0.5
        if norm <= self.dp.clip * _MARGIN:
            return update
        factor = self.dp.clip * _MARGIN / norm
        return {name: (x.double() * factor).to(x.dtype) for name, x in update.items()}

    def through(self, replies: Iterable[Reply]) -> Iterator[Reply]:
        """Replies to a round, with their updates clipped."""
        for reply in replies:
            if reply.refused is None and (reply.within or len(reply.members) > 1):
                said = "it is in a message for several clients, whose updates cannot be clipped one by one"
                reply = reply._replace(message={}, row=None, refused=said, code="E312")
            elif reply.refused is None:
                update = self.clipped(reply.message["update"])
                reply = reply._replace(message={**reply.message, "update": update})
            yield reply

    def released(self, mean: Message, plan: Plan, accepted: int) -> Message:
        """All that the server may learn from: the noised sum of so many clipped updates over the expected number.

        Args:
            mean: of the accepted messages, uniform.
        """
        sigma = self.dp.noise * self.dp.clip
        come = mean.get("update", {})
        made: Params = {}
        for name, w in plan.params.items():
            if name not in plan.upload:
                continue
            noise = gaussian(self._key, f"noise/{name}", plan.round, w.numel()).view(w.shape)
            sum_ = noise.mul_(sigma)
            if name in come:
                sum_ = sum_.add_(come[name].double(), alpha=accepted)
            made[name] = (sum_ / self._cohort).to(w.dtype)
        return {"update": cut(made, plan.mask)}

    def seen(self, mean: Message, released: Message) -> Message:
        """For the records: what the server learnt from, and how many steps the clients made."""
        return {"steps": mean.get("steps", {"steps": torch.tensor(0.0, dtype=torch.float64)}), **released}

    def after(self, spent: Spent) -> Spent:
        """What a state has cost after one more round."""
        if spent is None:
            return None
        *before, last = spent or (Made(self.q, self.dp.noise, 0),)
        if (last.q, last.noise) != (self.q, self.dp.noise):
            before, last = [*before, last], Made(self.q, self.dp.noise, 0)
        return (*before, last._replace(rounds=last.rounds + 1))

    def again(self, spent: Spent) -> Spent:
        """The same where rounds are gone on with: the next one may have been made before, by a process that is no
        more, and with other noise, if that does not follow from the seed."""
        return self.after(spent) if self.dp.noise_seed == "system" and spent else spent

    def epsilon(self, spent: Spent) -> float | None:
        """None where nothing can be said."""
        return None if spent is None else epsilon(spent, self.dp.delta)
