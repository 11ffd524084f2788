"""What a recipe is: a published experiment as data, and what its paper claims, as functions of the results.

Recipe ── published ─┐
       └─ scaled ────┴─ Variant: base tables + arms (label -> tables over base) ── Config, one per arm and seed
                                 claims: Table -> Verdict
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lamina.compare import deviation, mean
from lamina.config import Config, load_tables
from lamina.runs import Run

Tables = Mapping[str, Any]  # keys as in a config's TOML


# ---- what came out


class Outcome(NamedTuple):
    """One run. Accuracies are of rounds in sync; where clients keep models of their own, theirs."""

    seed: int
    accuracy: float | None  # of the last tested round; None when it diverged
    accuracy_round: int | None
    best: float | None
    bytes_up: int
    bytes_down: int
    rounds: int
    seconds: float
    refused: int  # messages
    diverged: int | None  # the round in which no message could be used
    personal: bool
    final_sha256: str | None
    path: str


class Arm(NamedTuple):
    """The runs of one label, one per seed."""

    label: str
    outcomes: tuple[Outcome, ...]

    @property
    def diverged(self) -> bool:
        return any(o.diverged is not None for o in self.outcomes)

    def mean(self, of: str) -> float | None:
        """Over seeds; None unless every run has the number."""
        found = mean([getattr(o, of) for o in self.outcomes])
        return None if found is None else float(found)

    def deviation(self, of: str) -> float | None:
        """Over seeds, with n - 1; None for fewer than two."""
        return deviation([getattr(o, of) for o in self.outcomes])


class Table(NamedTuple):
    """All that a claim is judged by."""

    arms: Mapping[str, Arm]  # those that have been run, by label
    reference: str
    floor: float
    extra: Mapping[str, Any]  # what the variant's `extra` gave


class Extra(NamedTuple):
    """A further table, computed from the records of the runs."""

    markdown: str
    data: Mapping[str, Any]


class Verdict(NamedTuple):
    """`held` is None where it cannot be judged; `words` has the numbers."""

    held: bool | None
    words: str

    @property
    def title(self) -> str:
        return {True: "held", False: "did not hold", None: "cannot be judged"}[self.held]


Judge = Callable[[Table], Verdict]


@dataclass(frozen=True)
class Claim:
    """What a paper says, and how it is judged.

    Args:
        text: the claim, with the paper's figure where there is one.
        source: where that stands.
        judge: a pure function of the results; asked only when the reference has reached the floor.
    """

    text: str
    source: str
    judge: Judge


# ---- the experiment


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One size of a recipe.

    Args:
        base: what all arms have in common, as in a config's TOML.
        arms: label -> tables laid over it; a part that is named anew replaces the one below.
        claims: judged in this order.
        floor: accuracy that the reference must reach, stated in advance; below it no claim is judged.
        why: where that number comes from.
        size: what a seed of the whole table costs.
        scaled: what is smaller than published; "" where nothing is.
        reference: the arm that bytes are compared with and that must reach the floor.
        extra: a further table from the runs of every arm, first seed first.
    """

    base: Tables
    arms: Mapping[str, Tables]
    claims: Sequence[Claim]
    floor: float
    why: str
    size: str
    scaled: str = ""
    reference: str = "FedAvg"
    extra: Callable[[Mapping[str, Sequence[Run]]], Extra] | None = None

    @property
    def log_every(self) -> int:
        """Rounds between two lines, for about ten of the reference."""
        return max(1, self.config("recipe", self.reference, 0).rounds // 10)

    def config(self, recipe: str, arm: str, seed: int) -> Config:
        """The experiment of one run. The seed draws the model, batches and cohorts, and the split where there is one.

        Raises:
            ConfigError: with the recipe or arm that says what is wrong.
        """
        tables = load_tables((f"recipe {recipe}", self.base), (f"arm {arm}", self.arms[arm]))
        drawn: dict[str, Any] = {"seed": seed, "name": recipe}
        if "seed" in tables.data.arguments:
            drawn["data"] = {"seed": seed}
        return load_tables((f"recipe {recipe}", self.base), (f"arm {arm}", self.arms[arm]), ("--seeds", drawn))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A published experiment.

    Args:
        name: on the command line.
        title: one line.
        paper: title, place, arXiv, and the authors where we know them.
        arxiv: its number there.
        source: which numbers come from the paper, which from its released code, and which from neither.
        compares: what the arms are, in a few words.
        dataset: of `lamina list data`.
        published: as published, as far as lamina can.
        scaled: what two cores do in at most 30 minutes.
        differs: from the paper or its released code.
    """

    name: str
    title: str
    paper: str
    arxiv: str | None
    source: str
    compares: str
    dataset: str
    published: Variant
    scaled: Variant
    differs: Sequence[str] = field(default_factory=tuple)

    def variant(self, scaled: bool) -> Variant:
        return self.scaled if scaled else self.published


def part(name: str) -> str:
    """The entry of something in `parts.py`, beside this file."""
    return f"{Path(__file__).with_name('parts.py')}:{name}"


# ---- judging


def percent(x: float) -> str:
    return f"{100 * x:.2f} %"


def points(x: float) -> str:
    return f"{100 * x:+.2f} points"


def accuracy(arm: Arm) -> str:
    """In words: "FedAvg 61.27 % (3 seeds)"."""
    if arm.diverged:
        when = next(o.diverged for o in arm.outcomes if o.diverged is not None)
        return f"{arm.label} diverged at round {when}"
    mean, spread = arm.mean("accuracy"), arm.deviation("accuracy")
    if mean is None:
        return f"{arm.label} has no accuracy"
    return f"{arm.label} {percent(mean)}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def margin(table: Table, arm: str, other: str) -> tuple[float, float] | None:
    """Mean of the differences in accuracy, seed by seed, and its standard error (0 for one seed); None when they
    cannot be taken."""
    first = {o.seed: o.accuracy for o in table.arms[arm].outcomes}
    second = {o.seed: o.accuracy for o in table.arms[other].outcomes}
    pairs = [(first[seed], second[seed]) for seed in first if seed in second]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    if not differences or len(differences) < len(pairs):
        return None
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return statistics.fmean(differences), error


def missing(table: Table, *labels: str) -> Verdict | None:
    absent = [label for label in labels if label not in table.arms]
    return Verdict(None, f"not run: {', '.join(absent)}") if absent else None


def unrecorded(table: Table, column: str, *labels: str) -> Verdict | None:
    """Where the records of an arm have no such numbers, as when it diverged early."""
    if absent := missing(table, *labels):
        return absent
    silent = [label for label in labels if not table.extra[column].get(label)]
    return Verdict(None, f"no {column} of {', '.join(silent)}") if silent else None


def higher(arm: str, other: str, within: float = 0.0) -> Judge:
    """Whether `arm` is more accurate than `other`; `within` > 0: at most so much less accurate."""

    def judge(table: Table) -> Verdict:
        if absent := missing(table, arm, other):
            return absent
        a, b = table.arms[arm], table.arms[other]
        said = f"{accuracy(a)}, {accuracy(b)}"
        if a.diverged or b.diverged:
            return Verdict(None if a.diverged and b.diverged else b.diverged, said)
        found = margin(table, arm, other)
        if found is None:
            return Verdict(None, f"{said}: not tested at the same seeds")
        difference, error = found
        seeds = len(a.outcomes)
        said += f": {points(difference)}" + (f" ± {100 * error:.2f} over {seeds} seeds" if seeds > 1 else ", one seed")
        if within:
            said += f", at most {100 * within:.1f} points below counts as held"
        if abs(difference + within) < error:
            return Verdict(None, f"{said}: within one standard error")
        return Verdict(difference + within > 0, said)

    return judge


def cheaper(arm: str, share: float, than: str | None = None) -> Judge:
    """Whether `arm` sends up at most this share of what the reference (or `than`) sends."""

    def judge(table: Table) -> Verdict:
        other = than or table.reference
        if absent := missing(table, arm, other):
            return absent
        if table.arms[arm].diverged or table.arms[other].diverged:
            return Verdict(None, f"{accuracy(table.arms[arm])}, {accuracy(table.arms[other])}")
        sent, base = table.arms[arm].mean("bytes_up"), table.arms[other].mean("bytes_up")
        if sent is None or not base:
            return Verdict(None, "no bytes")
        said = f"{arm} sent up {percent(sent / base)} of what {other} did; at most {percent(share)} counts as held"
        return Verdict(sent / base <= share, said)

    return judge


def both(*judges: Judge) -> Judge:
    """All of them: one that does not hold decides, one that cannot be judged leaves it open."""

    def judge(table: Table) -> Verdict:
        found = [one(table) for one in judges]
        held = False if any(v.held is False for v in found) else None if any(v.held is None for v in found) else True
        return Verdict(held, "; ".join(v.words for v in found))

    return judge


def judged(claim: Claim, table: Table) -> Verdict:
    """The verdict on a claim; none where the reference is below the floor."""
    if absent := missing(table, table.reference):
        return absent
    reached = table.arms[table.reference].mean("accuracy")
    if reached is None or reached < table.floor:
        return Verdict(None, f"{accuracy(table.arms[table.reference])} is below the floor of {percent(table.floor)}")
    return claim.judge(table)
