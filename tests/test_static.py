"""What is nowhere in the source: nothing that is read can run, and nothing is handed to a shell.

By the names that a file's imports give: `from torch import load as x; x(f)` is found, `model.load(f)` is none of it.
"""

from __future__ import annotations

import ast
import io
import os
import pickle
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lamina
from lamina import DataError
from lamina.data.sets import hapt

SOURCE = Path(lamina.__file__).parent
FILES = sorted(path for path in SOURCE.rglob("*.py"))
UNPICKLER = Path("data/sets/hapt.py")  # the one exception: a package stores its tables so; what it may name is a list
ENTRIES = Path("entry.py")  # runs the files that a person names in a config, and no others
HANDED = Path("engine/children.py")  # tries whether a worker process can be handed a part: it writes, and reads nothing

MODULES = {
    "pickle", "cPickle", "_pickle", "pickle5", "marshal", "dill", "cloudpickle", "shelve", "dbm", "joblib",
    "jsonpickle", "yaml", "ruamel", "xmlrpc", "pty", "commands", "code", "codeop",
}  # fmt: skip
NAMES = {
    "eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile",
    "builtins.__import__", "torch.load", "torch.jit.load", "torch.hub.load",
    "torch.package.PackageImporter", "torch.serialization.load",
    "numpy.fromregex", "pandas.read_pickle", "multiprocessing.Queue", "multiprocessing.Manager", "multiprocessing.Pool",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell",
    "tempfile.mktemp", "shutil.unpack_archive", "ssl._create_unverified_context", "runpy.run_path", "runpy.run_module",
    "importlib.util.spec_from_file_location", "multiprocessing.reduction.ForkingPickler",
}  # fmt: skip
PREFIXES = ("os.exec", "os.spawn", "os.posix_spawn")
METHODS = {"extractall", "extract", "exec_module", "load_module"}  # of any object: archives are read member by member
STARTS = {"subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_call", "subprocess.check_output"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def aliases(module: ast.Module) -> dict[str, str]:
    """Name in this file -> what it stands for; numpy and torch by their usual names too."""
    found = {"np": "numpy"}
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def dotted(node: ast.AST, known: dict[str, str]) -> str:
    """`a.b.c` with its first name resolved; "" for what is no such chain."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (before := dotted(node.value, known)):
        return f"{before}.{node.attr}"
    return ""


def forbidden(module: ast.Module) -> Iterator[str]:
    """What is found, as "line 3: os.system"."""
    known = aliases(module)
    for node in ast.walk(module):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            yield from (f"line {node.lineno}: import {n}" for n in names if n.split(".")[0] in MODULES)
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = dotted(node, known)
            if name in NAMES or name.startswith(PREFIXES):
                yield f"line {node.lineno}: {name}"
        if isinstance(node, ast.Call):
            yield from (f"line {node.lineno}: {text}" for text in _wrong_call(node, dotted(node.func, known), module))


def _wrong_call(node: ast.Call, name: str, module: ast.Module) -> Iterator[str]:
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    for key in ("shell", "allow_pickle"):
        if key in keywords and not _is(keywords[key], False):
            yield f"{key}="
    if name == "numpy.load" and "allow_pickle" not in keywords:
        yield "numpy.load without allow_pickle=False"
    if "weights_only" in keywords or any(isinstance(x, ast.Constant) and x.value == "pickle" for x in node.args):
        yield f"{name} of a pickle"
    if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
        yield f".{node.func.attr}()"
    if name in ("importlib.import_module",) and not _names_ours(node.args[0]):
        yield "importlib.import_module of a name from elsewhere"
    if name in STARTS and not (node.args and _is_list(node.args[0], node, module)):
        yield f"{name} without a list"


def _is(node: ast.AST, value: Any) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _names_ours(node: ast.AST) -> bool:
    """A text, or an f-string that begins with this package's name."""
    first = node.values[0] if isinstance(node, ast.JoinedStr) and node.values else node
    return isinstance(first, ast.Constant | ast.FormattedValue) and (
        isinstance(node, ast.Constant) or ast.unparse(node).startswith(("f'lamina.", 'f"lamina.', "f'{__name__}."))
    )


def _is_list(words: ast.AST, call: ast.Call, module: ast.Module) -> bool:
    """A list as it stands there, or an argument of the function that is said to be one."""
    if isinstance(words, ast.List):
        return True
    for function in ast.walk(module):
        if isinstance(function, ast.FunctionDef) and any(inner is call for inner in ast.walk(function)):
            every = (*function.args.args, *function.args.kwonlyargs)
            said = {a.arg: ast.unparse(a.annotation) for a in every if a.annotation is not None}
            if isinstance(words, ast.Name) and said.get(words.id) in ("Sequence[str]", "list[str]"):
                return True
    return False


ALLOWED = {
    UNPICKLER: ["import pickle"],
    ENTRIES: ["importlib.util.spec_from_file_location", ".exec_module()"],
    HANDED: ["multiprocessing.reduction.ForkingPickler"],
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_that_is_read_can_run_and_nothing_goes_to_a_shell(path: Path) -> None:
    found = [line.partition(": ")[2] for line in forbidden(tree(path))]
    assert found == ALLOWED.get(path.relative_to(SOURCE), [])


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "import marshal as m", "from dill import loads", "import cloudpickle", "import shelve",
        "import joblib", "import yaml", "eval('1')", "exec('1')", "compile('1', 'f', 'exec')", "f = eval",
        "import builtins\nbuiltins.exec('1')", "import torch\ntorch.load(f)", "import torch as t\nt.load(f)",
        "from torch import load\nload(f)", "from torch import load as x\nx(f)", "import os\nos.system('ls')",
        "from os import system\nsystem('ls')", "import os\nos.execv('a', [])", "import os\nos.popen('ls')",
        "import subprocess\nsubprocess.run(['ls'], shell=True)", "import subprocess\nsubprocess.run('ls')",
        "import subprocess\nsubprocess.Popen(f'ls {x}')", "from subprocess import run\nrun('ls -l')",
        "import subprocess\nsubprocess.getoutput('ls')", "import subprocess\ndef f(x: str): subprocess.run(x)",
        "import numpy\nnumpy.load(f)", "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=x)",
        "archive.extractall(place)", "import importlib\nimportlib.import_module(name)", "__import__('pickle')",
        "import importlib\nimportlib.import_module('pickle')", "import shutil\nshutil.unpack_archive(f)",
        "spec.loader.exec_module(m)", "from multiprocessing.reduction import ForkingPickler as P\nP.loads(x)",
    ],
)  # fmt: skip
def test_what_is_forbidden_is_found(text: str) -> None:
    assert list(forbidden(ast.parse(text)))


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()", "re.compile('x')", "np.load(f, allow_pickle=False)", "store.load(f)", "json.load(f)",
        "import subprocess\nsubprocess.run(['git', *words])", "import os\nos.environ['x']",
        "import subprocess\nfrom collections.abc import Sequence\ndef f(x: Sequence[str]): subprocess.run(x)",
    ],
)  # fmt: skip
def test_what_is_harmless_is_not(text: str) -> None:
    assert not list(forbidden(ast.parse(text)))


# ---- the one unpickler


def test_the_one_unpickler_is_the_only_thing_that_uses_pickle() -> None:
    module = tree(SOURCE / UNPICKLER)
    uses = {name for node in ast.walk(module) if (name := dotted(node, aliases(module))).startswith("pickle.")}
    assert uses <= {"pickle.Unpickler", "pickle.UnpicklingError"}
    made = [node for node in ast.walk(module) if isinstance(node, ast.Call) and dotted(node.func, {}) == "_Restricted"]
    assert len(made) == 1


def test_it_can_name_arrays_and_what_does_nothing() -> None:
    """Every name on its list stands for an array, a type of one, or a class of our own that keeps what it is given."""
    for (module, name), thing in hapt._Restricted.ALLOWED.items():
        ours = getattr(thing, "__module__", "") == hapt.__name__
        assert ours or thing in (np.ndarray, np.dtype, object, slice), (module, name)


class Runs:
    """Pickled, a call."""

    def __init__(self, call: Any, *arguments: Any):
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def malicious(mark: Path) -> dict[str, bytes]:
    """Pickles that write a file when they are loaded by an open unpickler; by hand where Python cannot write them."""
    text = f"open({str(mark)!r}, 'w').close()"
    shell = f"touch {mark}"
    made = {
        "os.system": pickle.dumps(Runs(os.system, shell)),
        "eval": pickle.dumps(Runs(eval, text)),
        "exec": pickle.dumps(Runs(exec, text)),
        "__import__": pickle.dumps(Runs(__import__, "antigravity")),
        "getattr": b"cbuiltins\ngetattr\n.",
        "python 2 names": b"c__builtin__\neval\n(V" + text.encode() + b"\ntR.",
        "posix": b"cposix\nsystem\n(V" + shell.encode() + b"\ntR.",
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x1andarray.__class__.__base__\x93.",
        "an attribute": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        "numpy's own loader": b"cnumpy\nload\n.",
        "a class of ours": b"clamina.data.sets.hapt\n_Restricted\n.",
        "persistent id": b"Pid\n.",
        "extension": b"\x82\x01.",
        "truncated": pickle.dumps([1, 2, 3])[:-1],
        "empty": b"",
    }
    made["through a dtype"] = b"cnumpy\ndtype\n(cos\nsystem\ntR."
    made["in a build"] = b"ccopy_reg\n_reconstructor\n(cposix\nsystem\nc__builtin__\nobject\nNtR."
    return made


@pytest.mark.parametrize("what", malicious(Path("x")))
def test_the_one_unpickler_refuses_everything_else(what: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises((DataError, pickle.UnpicklingError, EOFError, ValueError)):
        hapt._Restricted(io.BytesIO(malicious(mark)[what])).load()
    assert not mark.exists()


def test_what_can_be_pickled_of_allowed_names_stays_inert(tmp_path: Path) -> None:
    """Calls and states of the allowed names: whatever they are given, nothing is run and nothing is written."""
    before = sorted(Path.cwd().iterdir())
    for blob in (
        b"cpandas.core.frame\nDataFrame\n(V__import__('os')\ntR.",
        b"ccopy_reg\n_reconstructor\n(cpandas.core.frame\nDataFrame\nc__builtin__\nobject\nNtR}V__class__\nVx\nsb.",
        b"c_codecs\nencode\n(Vabc\nVzlib\ntR.",
    ):
        try:
            made = hapt._Restricted(io.BytesIO(blob)).load()
        except (DataError, pickle.UnpicklingError, TypeError, ValueError, AttributeError):
            continue
        assert type(made).__module__ in (hapt.__name__, "builtins")
    assert sorted(Path.cwd().iterdir()) == before
    assert not list(tmp_path.iterdir())
