"""A user's own parts: the object that ``"mine.py:thing"`` names. Local Python files only, and only those named."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
import types
from functools import lru_cache
from pathlib import Path
from typing import Any

from lamina.errors import ConfigError, LaminaError, meant


def is_entry(value: Any) -> bool:
    return isinstance(value, str) and ".py:" in value


_PREFIX = "lamina_entry_"  # of the names of modules


def anchored(entry: str, base: Path) -> str:
    """With its file as an absolute path, relative to `base`."""
    file, _, name = entry.rpartition(":")
    try:
        return f"{(base / Path(file).expanduser()).resolve()}:{name}"
    except (OSError, RuntimeError, ValueError):  # no path, or of nobody: `thing` says so
        return entry


def short(entry: str) -> str:
    file, _, name = entry.rpartition(":")
    return f"{Path(file).name}:{name}"


def thing(entry: str, where: str) -> Any:
    """The object that ``"folder/mine.py:thing"`` names. Raises ConfigError E106."""
    file, _, name = entry.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not _is_file(path):
        raise ConfigError(
            f"{entry}: no such file" if path.suffix == ".py" else f'entry {entry!r}: expected "mine.py:thing"',
            code="E106",
            where=where,
            remedy="a path is relative to the TOML file, on the command line to the current folder",
        )
    module = _module(path.resolve(), path.stat().st_mtime_ns, where)
    if not hasattr(module, name):
        remedy = meant(name, [known for known in vars(module) if not known.startswith("_")])
        raise ConfigError(f"{path.name} has no {name!r}", code="E106", where=where, remedy=remedy or None)
    return getattr(module, name)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or no name
        return False


def loaded() -> list[str]:
    """The files that things have been taken from, and that are still there."""
    files = [str(module.__file__) for name, module in [*sys.modules.items()] if name.startswith(_PREFIX)]
    return [file for file in files if Path(file).is_file()]


def load(files: list[str]) -> None:
    """The same in another process, before anything that is in them is asked for."""
    for file in files:
        _module(Path(file), Path(file).stat().st_mtime_ns, "engine")


def sha256(entry: str) -> str | None:
    """Of the entry's file as it is now; None where there is none."""
    try:
        return hashlib.sha256(Path(entry.rpartition(":")[0]).read_bytes()).hexdigest()
    except OSError:
        return None


@lru_cache(maxsize=32)
def _module(path: Path, changed: int, where: str) -> types.ModuleType:
    """The file as a module; as when it is run, it can import what lies beside it."""
    name = f"{_PREFIX}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # it ends with .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, LaminaError) or not isinstance(error, Exception):
            raise
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else 1
        raise ConfigError(
            f"{path.name} cannot be loaded: {type(error).__name__}: {error}", code="E106", where=f"{path.name}:{line}"
        ) from error
    finally:
        sys.path.remove(str(path.parent))
    return module
