"""What a reader may rely on: who imports whom. What is nowhere in the source: test_static."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import lamina

SOURCE = Path(lamina.__file__).parent
FILES = sorted(path for path in SOURCE.rglob("*.py"))

LEVELS = (  # lowest first; a file or folder imports from the rows above it, and within its own folder
    ("errors", "random", "redaction"),
    ("tree", "units", "per_client", "layers", "data", "models", "schedule", "entry", "metrics", "lock"),
    ("method", "network", "store", "record", "settings"),
    ("methods", "wire", "training"),
    ("client", "aggregate", "cohort", "downlink", "robust"),
    ("preflight", "evaluate", "books", "advice", "observe", "admission"),
    ("norms",),
    ("privacy", "assembly"),
    ("engine", "state"),
    ("collect",),
    ("federation",),
    ("attacks", "chaos", "checkpoint", "config", "jobs", "machine", "remote"),
    ("folder",),
    ("stop",),
    ("terminal",),
    ("tabular",),
    ("export",),
    ("runs",),
    ("compare", "comparison", "survival", "sweep"),
    ("demo", "explain", "inspect", "recipes", "scaffold", "verify", "flower"),
    ("report", "reproduce"),
    ("cli",),
    ("__init__",),
)
EXCEPTIONS = {  # who -> whom, and the functions in which alone: so that Federation.fit and Run.report can exist
    ("federation", "runs"): {"fit"},
    ("runs", "report"): {"report", "_repr_html_"},
}


def part(path: Path) -> str:
    """The file or folder at the top of the package to which a file belongs."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def level(name: str) -> int:
    rows = [i for i, row in enumerate(LEVELS) if name in row]
    assert rows, f"{name} has no level: say in LEVELS where it belongs"
    return rows[0]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported(node: ast.AST) -> Iterator[str]:
    """Modules named by one import statement, absolute; `from a import b` gives a.b."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def for_types_only(path: Path) -> set[ast.AST]:
    """Import statements under `if TYPE_CHECKING`: they name types and never run."""
    blocks = (
        node
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    )
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def neighbours(path: Path, types: bool = True) -> Iterator[tuple[ast.AST, str]]:
    """The statements of a file that import a part of lamina, with that part."""
    skipped = set() if types else for_types_only(path)
    for node in ast.walk(tree(path)):
        if node in skipped:
            continue
        for name in imported(node):
            top, *rest = name.split(".")
            if top == "lamina":
                there = rest and ((SOURCE / f"{rest[0]}.py").is_file() or (SOURCE / rest[0]).is_dir())
                yield node, rest[0] if there else "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_imports_only_from_lower_levels(path: Path) -> None:
    own = part(path)
    for node, other in neighbours(path, types=False):
        if (own, other) not in EXCEPTIONS:
            assert other == own or level(other) < level(own), f"line {node.lineno}: {own} imports {other}"


@pytest.mark.parametrize(("own", "other"), EXCEPTIONS)
def test_exceptions_are_inside_the_functions_they_are_named_for(own: str, other: str) -> None:
    path = SOURCE / f"{own}.py"
    names = EXCEPTIONS[own, other]
    statements = [node for node, there in neighbours(path, types=False) if there == other]
    functions = [f for f in ast.walk(tree(path)) if isinstance(f, ast.FunctionDef) and f.name in names]
    assert len(statements) == len(functions) == len(names)
    assert all(any(statement in f.body for f in functions) for statement in statements)


def test_the_architecture_has_every_file_on_its_level() -> None:
    text = (Path(__file__).parents[1] / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+)(?:-(\d+))? \| (.+?) \|", text, re.MULTILINE)
    spans = [(int(first) - 1, int(last or first)) for first, last, _ in rows]
    assert [begin for begin, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == len(LEVELS)
    for (begin, end), (_, _, files) in zip(spans, rows, strict=True):
        names = re.findall(r"`(.+?)`", files)
        assert sorted(name.removesuffix("/") for name in names) == sorted(itertools.chain(*LEVELS[begin:end]))
        assert [name for name in names if name.endswith("/") != (SOURCE / name).is_dir()] == []


def test_a_method_imports_only_method_tree_layers_random_and_errors() -> None:
    """And what several methods share: that module, in the same folder, obeys the same rule."""
    allowed = {"method", "tree", "layers", "random", "errors"}
    for path in (SOURCE / "methods").glob("*.py"):
        if path.name != "__init__.py":
            for node, other in neighbours(path):
                assert other in allowed or getattr(node, "module", "") == "lamina.methods.masking", path.name


def test_the_engine_and_the_federation_name_no_method_but_fedavg() -> None:
    from lamina import METHODS

    names = {cls.__name__ for cls in METHODS.values()} - {"FedAvg"}
    core = [SOURCE / f"{name}.py" for name in ("client", "federation", "downlink", "aggregate", "evaluate")]
    for path in (*core, *(path for name in ("engine", "store", "wire") for path in (SOURCE / name).glob("*.py"))):
        found = {node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name)} & names
        assert not found, f"{path.name} names {found}"


def test_only_plain_bytes_go_through_the_pipes() -> None:
    """`send` and `recv` of a Connection would pickle."""
    for path in (SOURCE / "engine").glob("*.py"):
        called = {
            node.func.attr
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        assert not called & {"send", "recv"}, path.name
