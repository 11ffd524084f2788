"""Writes a Flower app: a few lines that call us, and the experiment's settings beside them."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

from lamina import config as configs
from lamina.config import Config
from lamina.entry import is_entry
from lamina.errors import ConfigError, StorageError
from lamina.flower.settings import CONFIG_FILE, RunKeys, deployable
from lamina.store.files import storing

TESTED = ">=1.41,<1.43"  # versions of flwr; the same in pyproject.toml

_SERVER = '''"""Server of a lamina experiment; its settings are in {file}."""

from pathlib import Path

from lamina.flower import server_app

app = server_app(Path(__file__).with_name("{file}"))
'''

_CLIENT = _SERVER.replace("Server of", "Node of").replace("server_app", "client_app")

_PYPROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0.0"
description = "A lamina experiment"
license = "Apache-2.0"
dependencies = ["lamina[flower]=={version}"]

[tool.flwr.app]
publisher = "lamina"

[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"

[tool.flwr.app.config]  # given anew with: flwr run --run-config 'rounds=20 resume="runs/..."'
{keys}
"""

_README = """# {name}

A [lamina](https://pypi.org/project/lamina) experiment as a Flower app. All settings of the experiment are in {file}.

    flwr run . SUPERLINK --stream                                   # SUPERLINK: of $FLWR_HOME/config.toml
    flwr run . SUPERLINK --run-config 'resume="{name}/001-..."'     # goes on where that run stopped

Every node needs `pip install 'lamina[flower]=={version}'` and its data. A SuperNode says which clients it has with
`--node-config 'clients="0-7" state-dir="..."'`, or with `partition-id=0 num-partitions=2` instead of `clients`.
Flower tells its makers nothing with FLWR_TELEMETRY_ENABLED=0 and FLWR_DISABLE_UPDATE_CHECK=1 in the environment, and
installs nothing with `flower-superlink --disable-runtime-dependency-installation`.
"""


def write(config: Config, folder: Path) -> list[Path]:
    """The app of this experiment.

    Returns:
        The files.

    Raises:
        StorageError: E402 there is something already.
        ConfigError: E118 what cannot be deployed.
    """
    deployable(config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(f"{folder} is not empty", code="E402", where=str(folder), remedy="name another folder")
    text, entries = _portable(configs.to_toml(config))
    said = {"file": CONFIG_FILE, "name": _name(config.name), "version": version("lamina")}
    keys = "\n".join(f"{key} = {_literal(value)}" for key, value in RunKeys().table().items())
    files = {
        "pyproject.toml": _PYPROJECT.format(keys=keys, **said),
        "server_app.py": _SERVER.format(**said),
        "client_app.py": _CLIENT.format(**said),
        "README.md": _README.format(**said),
        CONFIG_FILE: text,
    }
    taken = {*files} & {entry.name for entry in entries}
    if taken:
        raise ConfigError(f"{min(taken)}: an entry's file has the name of a file of the app", code="E118")
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
        for entry in entries:
            shutil.copyfile(entry, folder / entry.name)
    return [folder / name for name in [*files, *(entry.name for entry in entries)]]


def _portable(text: str) -> tuple[str, list[Path]]:
    """A written config with the files of its entries beside it. Raises ConfigError E118 for two of one name."""
    found: dict[str, Path] = {}
    lines = []
    for line in text.splitlines():
        _, quoted, rest = line.partition(' = "')
        value = rest.partition('"')[0]
        if quoted and is_entry(value):
            path = Path(value.rpartition(":")[0])
            if found.setdefault(path.name, path) != path:
                raise ConfigError(f"{path} and {found[path.name]} have the same name", code="E118", where="entry")
            line = line.replace(str(path), path.name)
        lines.append(line)
    return "\n".join(lines) + "\n", [*found.values()]


def _name(text: str) -> str:
    """As a distribution may be called."""
    return "".join(c if c.isalnum() else "-" for c in text.lower()).strip("-") or "experiment"


def _literal(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else repr(value)
