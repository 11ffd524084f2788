"""What it takes to make this run again, and to check it."""

from __future__ import annotations

import shlex

from lamina.report.figure import Code, Note, Page, Table
from lamina.report.tables import Tables

_MACHINE = ("lamina", "python", "torch", "numpy", "safetensors", "system", "cpu", "cores", "torch_threads")
_SUMS = (
    ("model at the end", "final_sha256"),
    ("model at the start", "initial_sha256"),
    ("split", "split_sha256"),
    ("examples", "pool_sha256"),
    ("config", "config_sha256"),
)


def page(tables: Tables) -> Page:
    run, info = tables.run, tables.info
    folder = shlex.quote(str(run.path))
    lead = "The same config, data and versions give the same model, bit for bit, with any number of workers."
    if info["engine"] == "threads":
        lead = "This run was made with engine=threads: its bits hold for the same number of cores."
    blocks: list[Code | Note | Table] = []
    if tables.command:
        blocks.append(Code("As it was started", tables.command))
    if tables.config is not None:
        blocks.append(Code("Make it again", f"lamina run {folder}/config.toml"))
    else:
        blocks.append(
            Note("Make it again", "This run was started from Python, without a config: its script makes it again.")
        )
    blocks.append(
        Code("Check its files; its bytes through a socket", f"lamina verify {folder}\nlamina verify {folder} --wire")
    )
    sums = [
        [what, str(info.get(key) or ("not yet: the run has not ended" if key == "final_sha256" else "-"))]
        for what, key in _SUMS
    ]
    blocks.append(
        Table("SHA-256", "Equal sums are equal things: compare them with those of your own run.", ["of", "sum"], sums)
    )
    environment = tables.environment
    machine = [[key, str(environment[key])] for key in _MACHINE if environment.get(key) is not None]
    machine.append(["engine", f"{info['engine']}: {info.get('engine_reason') or 'asked for'}"])
    machine.append(["seed", str(info["seed"])])
    git = environment.get("git")
    if git:
        machine.append(["git", f"{git['commit']}{', with changes' if git['dirty'] else ''}"])
    machine += [["started", str(info.get("started", "-"))], ["updated", str(info.get("updated", "-"))]]
    blocks.append(Table("Where it was made", "From env.json and run.json.", ["", ""], machine))
    if tables.config is not None:
        blocks.append(Code("config.toml", tables.config))
    return Page("reproduce", "Reproduce", lead, blocks)
