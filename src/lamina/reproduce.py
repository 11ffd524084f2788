"""A recipe run in full: every arm and seed in a run folder of its own, then a table and a verdict on every claim.

DIR/<recipe>[-scaled]/<arm>/seed-<n>/   run folders; what is finished is not run again, what was stopped goes on
OUT/<recipe>[-scaled].md  .json         the table, for people and for programs
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lamina.compare import measured
from lamina.data import DATASETS, cached, download
from lamina.engine import cores
from lamina.entry import is_entry, short
from lamina.errors import expect, is_whole, meant
from lamina.folder import document, finite, read_environment, storing
from lamina.machine import cpu_name, installed
from lamina.recipes import RECIPES
from lamina.recipes.recipe import Arm, Extra, Outcome, Recipe, Table, Variant, Verdict, accuracy, judged, percent
from lamina.runs import Run, Watcher
from lamina.store.files import replace
from lamina.sweep import diverged, finished, run_once
from lamina.tabular import markdown
from lamina.terminal import Column, Fetching, clock, sizes, spread


class Report(NamedTuple):
    """What was written, and where."""

    markdown: Path
    json: Path
    lines: list[str]
    data: dict[str, Any]


def find(name: str) -> Recipe:
    """Raises ConfigError for a name that is no recipe."""
    remedy = f"{meant(name, RECIPES)}  `lamina list recipes`".strip()
    expect(name in RECIPES, f"recipe {name!r}: expected one of {', '.join(RECIPES)}", where="NAME", remedy=remedy)
    return RECIPES[name]


def chosen(variant: Variant, wanted: Sequence[str] | None) -> list[str]:
    """Labels of the arms that are meant, by label or by folder name; None: all. Raises ConfigError."""
    if wanted is None:
        return list(variant.arms)
    known = {folder_name(label): label for label in variant.arms}
    for name in wanted:
        expect(
            folder_name(name) in known,
            f"arm {name!r}: expected one of {', '.join(variant.arms)}",
            where="--arms",
            remedy=meant(folder_name(name), known) or None,
        )
    return [label for label in variant.arms if folder_name(label) in {folder_name(name) for name in wanted}]


def folder_name(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", label).strip("-.")


def title(recipe: Recipe, scaled: bool) -> str:
    return f"{recipe.name}-scaled" if scaled else recipe.name


def reproduce(
    recipe: Recipe,
    scaled: bool,
    seeds: Sequence[int],
    arms: Sequence[str] | None,
    root: Path,
    out: Path,
    watcher: Watcher,
    fetching: Fetching,
) -> Report:
    """Runs what is not finished yet, then writes the table over all arms that are.

    Args:
        arms: run only these; those that were finished before stand in the table all the same.
        root: run folders lie below it.
        out: where the table goes.

    Raises:
        ConfigError: an unknown arm, a seed that is no whole number >= 0.
        StorageError: E402, a folder holds a run of other settings.
        Interrupted: Ctrl-C; the same call goes on where this one stopped.
    """
    variant = recipe.variant(scaled)
    for seed in seeds:
        expect(is_whole(seed, 0), f"seed {seed!r}: expected a whole number >= 0", where="--seeds")
    expect(bool(seeds) and len(set(seeds)) == len(seeds), "seeds: expected one or more, each once", where="--seeds")
    labels = chosen(variant, arms)
    name = title(recipe, scaled)
    configs = {(label, seed): variant.config(name, label, seed) for seed in seeds for label in variant.arms}
    if DATASETS[recipe.dataset].download and not cached(recipe.dataset):
        with fetching as progress:
            download(recipe.dataset, progress=progress)
    for seed in seeds:
        for label in labels:
            run_once(_folder(root, name, label, seed), configs[label, seed], watcher)
    found = {
        label: [
            run
            for seed in seeds
            if (run := finished(_folder(root, name, label, seed), configs[label, seed])) is not None
        ]
        for label in variant.arms
    }
    report = written(recipe, scaled, seeds, {label: made for label, made in found.items() if made})
    path = out / f"{name}.md"
    with storing(out):
        out.mkdir(parents=True, exist_ok=True)
        replace(path, ("\n".join(report.lines) + "\n").encode())
        replace(path.with_suffix(".json"), document(finite_tree(report.data)))
    return report._replace(markdown=path, json=path.with_suffix(".json"))


def _folder(root: Path, name: str, label: str, seed: int) -> Path:
    return root / name / folder_name(label) / f"seed-{seed}"


# ---- one run


def outcome(run: Run, seed: int) -> Outcome:
    figures, lost = measured(run), diverged(run)
    return Outcome(
        seed=seed,
        accuracy=figures["accuracy"] if lost is None else None,
        accuracy_round=figures["accuracy_round"] if lost is None else None,
        **{key: figures[key] for key in ("best", "bytes_up", "bytes_down", "rounds", "seconds")},
        refused=sum(row.refused for row in run.records),
        diverged=lost,
        personal=run.personal,
        final_sha256=run.info["final_sha256"],
        path=str(run.path),
    )


# ---- the table


def written(recipe: Recipe, scaled: bool, seeds: Sequence[int], made: Mapping[str, Sequence[Run]]) -> Report:
    """The report on these runs."""
    variant = recipe.variant(scaled)
    arms = {label: Arm(label, tuple(outcome(run, run.info["seed"]) for run in own)) for label, own in made.items()}
    extra = variant.extra(made) if variant.extra is not None and made else Extra("", {})
    table = Table(arms, variant.reference, variant.floor, extra.data)
    verdicts = [judged(claim, table) for claim in variant.claims]
    command = f"lamina reproduce {recipe.name}{' --scaled' if scaled else ''} --seeds {','.join(map(str, seeds))}"
    made_with = provenance([run for own in made.values() for run in own])
    lines = [
        f"# {title(recipe, scaled)}: {recipe.title}",
        "",
        f"    {command}",
        "",
        f"- lamina {made_with['lamina']} · torch {made_with['torch']}",
        f"- {made_with['cores']} cores of {made_with['cpu']}",
        f"- paper: {recipe.paper}",
        f"- settings: {recipe.source}",
        *([f"- scaled: {variant.scaled}"] if variant.scaled else []),
        *(f"- differs: {text}" for text in recipe.differs),
        f"- floor: {variant.reference} must reach {percent(variant.floor)} ({variant.why}): {_reached(table)}",
        *_absent(variant, table, seeds),
        "",
        *results(table),
        "",
        *claims(variant, verdicts),
        *(["", extra.markdown] if extra.markdown else []),
    ]
    data = {
        "recipe": recipe.name,
        "scaled": variant.scaled or None,
        "command": command,
        "seeds": list(seeds),
        "paper": recipe.paper,
        **made_with,
        "reference": variant.reference,
        "floor": variant.floor,
        "reached": _mean(table, variant.reference),
        "arms": {label: _numbers(arm, arms.get(variant.reference)) for label, arm in arms.items()},
        "claims": [
            {"text": claim.text, "source": claim.source, "held": verdict.held, "words": verdict.words}
            for claim, verdict in zip(variant.claims, verdicts, strict=True)
        ],
        "extra": dict(extra.data),
        "base": _short(variant.base),
        "tables": _short(variant.arms),
    }
    return Report(Path(), Path(), lines, data)


def results(table: Table) -> list[str]:
    """A row per arm, as Markdown: means over seeds, with their deviations."""
    arms = list(table.arms.values())
    base = table.arms.get(table.reference)
    rounds = [arm.outcomes[0].rounds for arm in arms]
    columns = [
        Column("arm", [arm.label for arm in arms], left=True),
        Column("accuracy", [_spread(arm, "accuracy") for arm in arms]),
        Column("best", [_spread(arm, "best") for arm in arms]),
        Column("up", [_bytes(arm, "bytes_up") for arm in arms]),
        Column(f"up, {table.reference} = 100 %", [_relative(arm, base, "bytes_up") for arm in arms]),
        Column("down", [_bytes(arm, "bytes_down") for arm in arms]),
        Column(f"down, {table.reference} = 100 %", [_relative(arm, base, "bytes_down") for arm in arms]),
        Column("rounds", [str(n) for n in rounds]),
        Column("time", [clock(arm.mean("seconds") or 0) for arm in arms]),
        Column("seeds", [str(len(arm.outcomes)) for arm in arms]),
    ]
    if any(o.refused for arm in arms for o in arm.outcomes):
        columns.append(Column("refused updates", [str(sum(o.refused for o in arm.outcomes)) for arm in arms]))
    notes = [
        "Accuracy is that of the last tested round in which no layer waits, `best` the highest of those; ± is the "
        "deviation over seeds (n - 1)."
    ]
    personal = [arm.label for arm in arms if any(o.personal for o in arm.outcomes)]
    if personal:
        notes.append(f"{', '.join(personal)}: the mean of the clients' own models.")
    return [*markdown(columns), "", " ".join(notes)]


def claims(variant: Variant, verdicts: Sequence[Verdict]) -> list[str]:
    lines = ["## Claims", ""]
    for number, (claim, verdict) in enumerate(zip(variant.claims, verdicts, strict=True), start=1):
        lines += [f"{number}. {claim.text} [{claim.source}]", f"   **{verdict.title}**: {verdict.words}."]
    return lines


def _spread(arm: Arm, of: str) -> str:
    if of == "accuracy" and arm.diverged:
        return accuracy(arm).removeprefix(f"{arm.label} ")
    return spread(arm.mean(of), arm.deviation(of))


def _bytes(arm: Arm, of: str) -> str:
    """In a unit of its own: arms are thousands of times apart."""
    return sizes([round(arm.mean(of) or 0)])[0]


def _relative(arm: Arm, base: Arm | None, of: str) -> str:
    sent, whole = arm.mean(of), base and base.mean(of)
    if sent is None or not whole:
        return "-"
    percentage = 100 * sent / whole
    return f"{percentage:.1f} %" if percentage >= 1 else f"{percentage:.2g} %"


def _mean(table: Table, label: str) -> float | None:
    return table.arms[label].mean("accuracy") if label in table.arms else None


def _reached(table: Table) -> str:
    if table.reference not in table.arms:
        return "not run"
    reached = _mean(table, table.reference)
    verdict = "reached" if reached is not None and reached >= table.floor else "NOT reached, so no claim is judged"
    return f"{accuracy(table.arms[table.reference])}, {verdict}"


def _absent(variant: Variant, table: Table, seeds: Sequence[int]) -> list[str]:
    absent = [
        label if label not in table.arms else f"{label} (seeds {', '.join(map(str, missed))})"
        for label in variant.arms
        if (
            missed := sorted(set(seeds) - {o.seed for o in (table.arms[label].outcomes if label in table.arms else ())})
        )
    ]
    return [f"- not run: {', '.join(absent)}"] if absent else []


def _numbers(arm: Arm, base: Arm | None) -> dict[str, Any]:
    numbers = ("accuracy", "best", "bytes_up", "bytes_down", "seconds")
    relative = {
        f"{of}_relative": sent / whole
        for of in ("bytes_up", "bytes_down")
        if base is not None and (whole := base.mean(of)) and (sent := arm.mean(of)) is not None
    }
    return {
        **{of: {"mean": arm.mean(of), "deviation": arm.deviation(of)} for of in numbers},
        **relative,
        "runs": [o._asdict() for o in arm.outcomes],
    }


# ---- what it was made with


def provenance(made: Sequence[Run]) -> dict[str, Any]:
    """Versions and machine, of the runs where they say so; several, where runs were made by several."""
    found = [read_environment(run.path) for run in made]
    commit = checkout()

    def said(key: str, now: object) -> str:
        return ", ".join(sorted({str(env[key]) for env in found if env.get(key)})) or str(now)

    version = said("lamina", installed("lamina"))
    return {
        "lamina": f"{version}{f' ({commit})' if commit else ''}",
        "commit": commit,
        "torch": said("torch", torch.__version__),
        "cores": said("cores", cores()),
        "cpu": said("cpu", cpu_name()),
    }


def checkout() -> str | None:
    """Commit of the working tree that lamina is imported from, if it is one."""
    here = Path(__file__).parent

    def ask(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True, cwd=here)
        return done.stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        ask(
            "ls-files", "--error-unmatch", "__init__.py"
        )  # an environment inside another project is no checkout of ours
        changed = ask("status", "--porcelain", "--untracked-files=no", "--", ".")
        return f"commit {ask('rev-parse', '--short=12', 'HEAD')}{', with changes' if changed else ''}"
    return None


def _short(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Tables with every entry's file by its name: where it lies is this machine's business."""
    return {
        key: _short(value) if isinstance(value, Mapping) else short(value) if is_entry(value) else value
        for key, value in tables.items()
    }


def finite_tree(value: Any) -> Any:
    """`folder.finite`, through lists too."""
    if isinstance(value, list | tuple):
        return [finite_tree(inner) for inner in value]
    if isinstance(value, Mapping):
        return {str(key): finite_tree(inner) for key, inner in value.items()}
    return finite(value)
