"""What a reader may rely on: who imports whom, and what is nowhere in the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import lamina

SOURCE = Path(lamina.__file__).parent
FILES = sorted(path for path in SOURCE.rglob("*.py"))

LEVELS = (  # lowest first; a file or folder imports from the rows above it, and within its own folder
    ("errors", "random"),
    ("tree", "layers", "data", "models", "schedule", "entry"),
    ("method", "store", "record", "settings"),
    ("methods", "wire", "training"),
    ("client", "aggregate", "cohort", "downlink"),
    ("preflight", "evaluate", "books", "advice", "observe"),
    ("engine",),
    ("federation",),
    ("checkpoint", "config", "machine", "remote"),
    ("folder",),
    ("terminal",),
    ("runs",),
    ("demo", "recipes", "verify", "flower"),
    ("reproduce",),
    ("cli",),
    ("__init__", "__main__"),
)
EXCEPTION = ("federation", "runs")  # so that Federation.fit can exist: inside that function, nowhere else


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
        if (own, other) != EXCEPTION:
            assert other == own or level(other) < level(own), f"line {node.lineno}: {own} imports {other}"


def test_the_one_exception_is_inside_the_function_it_is_named_for() -> None:
    path = SOURCE / "federation.py"
    statements = [node for node, other in neighbours(path, types=False) if other == "runs"]
    functions = [f for f in ast.walk(tree(path)) if isinstance(f, ast.FunctionDef) and f.name == "fit"]
    assert len(statements) == len(functions) == 1
    assert statements[0] in functions[0].body


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


# ---- what is nowhere

MODULES = {"pickle", "cPickle", "_pickle", "marshal", "dill", "cloudpickle", "shelve", "joblib", "jsonpickle"}
CALLS = {"eval", "exec", "__import__"}
METHODS = {("torch", "load"), ("yaml", "load"), ("os", "system"), ("os", "popen"), ("np", "fromregex")}
UNPICKLER = Path("data/sets/hapt.py")  # one package stores its tables so; what it may name is a list


def forbidden(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            yield from (f"line {node.lineno}: import {n}" for n in names if n.split(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield f"line {node.lineno}: {node.func.id}()"
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            name = (node.func.value.id, node.func.attr)
            if name in METHODS:
                yield f"line {node.lineno}: {'.'.join(name)}()"
        for keyword in node.keywords:
            if keyword.arg in ("shell", "allow_pickle") and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            ):
                yield f"line {node.lineno}: {keyword.arg}="


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_that_is_read_can_run(path: Path) -> None:
    found = list(forbidden(tree(path)))
    if path.relative_to(SOURCE) == UNPICKLER:
        assert [line.split(": ")[1] for line in found] == ["import pickle"]
    else:
        assert not found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import marshal as m",
        "from dill import loads",
        "eval('1')",
        "exec('1')",
        "torch.load(f)",
        "yaml.load(f)",
        "subprocess.run('ls', shell=True)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_what_is_forbidden_is_found(line: str) -> None:
    assert len(list(forbidden(ast.parse(line)))) == 1


def test_the_one_unpickler_names_only_what_is_on_its_list() -> None:
    uses = {
        ast.unparse(node)
        for node in ast.walk(tree(SOURCE / UNPICKLER))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle"
    }
    assert uses <= {"pickle.Unpickler", "pickle.UnpicklingError"}


def test_the_one_unpickler_refuses_every_other_name() -> None:
    import io
    import pickle

    from lamina import DataError
    from lamina.data.sets import hapt

    class Evil:
        def __reduce__(self):
            return print, ("this must not be printed",)

    for thing in (Evil(), print, io.BytesIO):
        with pytest.raises((DataError, pickle.UnpicklingError)):
            hapt._Restricted(io.BytesIO(pickle.dumps(thing))).load()


def test_only_plain_bytes_go_through_the_pipes() -> None:
    """`send` and `recv` of a Connection would pickle."""
    for path in (SOURCE / "engine").glob("*.py"):
        called = {
            node.func.attr
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        assert not called & {"send", "recv"}, path.name
