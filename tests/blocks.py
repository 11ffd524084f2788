"""Blocks of Markdown that run: Python, and the lines of a terminal that begin with `lamina`.

A page's Python blocks share one namespace, its commands one working directory. Commands run in this process, with few
rounds and in one process (`small`); what would take long or need what a test has not is only parsed (`PARSED`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from typer.testing import CliRunner

from lamina import cli

SHELL = ("", "sh", "console", "bash")
PARSED = ("demo", "reproduce", "parity", "flower", "data fetch")  # minutes, Flower's programs, a network
SKIPPED = "# docs: not run"  # behind one command of a block
PLACEHOLDER = re.compile(r"\b(?!LAMINA)[A-Z]{2,}\b|\.\.\.")


class Block(NamedTuple):
    language: str  # of the fence; "" for none, and for what is indented
    text: str
    line: int
    mark: str  # the comment right above it, <!-- so -->; "" for none
    title: str | None = None  # of the file that the reader is to make of it


def blocks(markdown: str) -> list[Block]:
    """Fenced blocks, indented ones, and single lines of code that stand alone."""
    found: list[Block] = []
    rows = markdown.splitlines()
    at = 0
    mark = ""
    while at < len(rows):
        row = rows[at]
        start = at
        if fence := re.match(r'```(\w*)(?: title="([^"]+)")?', row):
            at += 1
            while at < len(rows) and not rows[at].startswith("```"):
                at += 1
            found.append(Block(fence[1], "\n".join(rows[start + 1 : at]), start + 1, mark, fence[2]))
        elif row.startswith("    ") and (start == 0 or not rows[start - 1].strip()):
            while at + 1 < len(rows) and (rows[at + 1].startswith("    ") or not rows[at + 1].strip()):
                at += 1
            found.append(Block("", "\n".join(line[4:] for line in rows[start : at + 1]).rstrip(), start + 1, mark))
        elif alone := re.fullmatch(r"`(lamina [^`]+)`", row):
            found.append(Block("", alone[1], start + 1, mark))
        comment = re.fullmatch(r"<!-- (.+) -->", row)
        if comment or row.strip():
            mark = comment[1] if comment else ""
        at += 1
    return found


def commands(block: Block) -> list[list[str]]:
    """The lines of it that call lamina or a Python file, as words, and `cd`; what a terminal answered is left out."""
    if block.language not in SHELL:
        return []
    text = re.sub(r"\\\n\s*", " ", block.text)
    lines = (line.removeprefix("$ ") for line in text.splitlines() if SKIPPED not in line)
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(lamina|cd) |python [\w/]+\.py", line)]


def parsed(words: list[str]) -> None:
    """That these options and arguments exist. Raises click's UsageError."""
    command: Any = typer.main.get_command(cli.app)
    context = command.context_class(command)
    rest = words[1:]
    while hasattr(command, "commands"):
        name, *rest = rest
        assert name in command.commands, f"there is no command {name}"
        command = command.commands[name]
    command.make_context(command.name, [word for word in rest if word not in (">", "|")], parent=context)


def small(words: list[str]) -> list[str]:
    """The same command for a test: two rounds, in this process."""
    verb = words[1]
    if verb in ("run", "sweep", "resume"):
        fewer = [re.sub(r"^rounds=\d+$", "rounds=4" if verb == "resume" else "rounds=2", word) for word in words]
        if verb == "resume" or "--dry-run" in words or any(word.startswith("--show-config") for word in words):
            return fewer
        has = {word.partition("=")[0] for word in words}
        return fewer + [key for key in ("rounds=2", "engine=loop") if key.partition("=")[0] not in has]
    return ["latest" if word == "RUN" else word for word in words]


def heavy(words: list[str]) -> bool:
    """Takes data that must be fetched, or minutes: its config is resolved, and that is all."""
    return words[1] in ("run", "sweep") and words[2] in ("cifar10-resnet20", "fashion-mnist-cnn", "mnist-cnn",
                                                         "hapt-cnn", "shakespeare-lstm")  # fmt: skip


class Failed(Exception):
    """A command that ended with another exit code than 0, and what it printed."""


def run_command(words: list[str]) -> str:
    """What it prints. Raises Failed."""
    if words[0] == "cd":
        os.chdir(words[1])
        return ""
    line = shlex.join(words)
    if words[0] == "python":
        if Path(words[1]).exists():  # else it is a file of the repository, such as a benchmark
            runpy.run_path(words[1], run_name="__main__")
        return ""
    verb = " ".join(words[1:3]) if words[1] == "data" else words[1]
    if verb in PARSED or {"--watch", "--mkl", "--install-completion", "--show-completion"} & set(words):
        parsed(words)
        return ""
    needed = [name for name in ("tensorboard", "mlflow", "wandb") if any(name in word for word in words)]
    needed += ["matplotlib"] if "--figure" in words else []
    if any(importlib.util.find_spec(name) is None for name in needed):
        parsed(words)
        return ""
    words, into = (words[: words.index(">")], words[-1]) if ">" in words else (words, None)
    words = small(words)
    if heavy(words):
        words = [*words, "--show-config", "changed"]
    if any(PLACEHOLDER.fullmatch(word) for word in words):
        parsed(words)
        return ""
    result = CliRunner().invoke(cli.app, words[1:])
    if result.exit_code:
        raise Failed(f"{line}: exit code {result.exit_code}\n{result.output}\n{result.exception!r}")
    if into is not None:
        Path(into).write_text(result.stdout, encoding="utf-8")
    return result.output


def run_python(block: Block, page: str, namespace: dict[str, Any]) -> None:
    code = compile("\n" * block.line + block.text, page, "exec")
    exec(code, namespace)


def run(page: str, markdown: str, given: dict[str, Any] | None = None) -> Iterator[tuple[Block, str]]:
    """Runs a page's blocks in order; gives each that ran, and what its commands printed."""
    namespace: dict[str, Any] = {"__name__": "page", **(given or {})}
    for block in blocks(markdown):
        if block.mark.startswith("not run"):
            continue
        if block.title:
            Path(block.title).write_text(block.text + "\n", encoding="utf-8")
        elif block.language == "python":
            run_python(block, page, namespace)
            yield block, ""
        elif calls := commands(block):
            yield block, "".join(run_command(words) for words in calls)


@contextlib.contextmanager
def elsewhere(folder: Path, cache: Path | None = None) -> Iterator[None]:
    """In a clean folder, with runs there; without a network where another cache than the machine's is given."""
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setenv("LAMINA_RUNS", str(folder / "runs"))
        patch.delenv("COLUMNS", raising=False)
        if cache is not None:
            patch.setenv("LAMINA_DATA", str(cache))
            patch.setenv("LAMINA_OFFLINE", "1")
        yield
