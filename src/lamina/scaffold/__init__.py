"""`lamina new`: a folder with a model, data and settings of one's own to begin with, which runs as it stands.

The templates are files beside this one. What they train on: real digits cut into sites, or tables made here by a seeded
generator, which their README says are made up. Nothing is fetched.
"""

from __future__ import annotations

import importlib.resources
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lamina.errors import StorageError
from lamina.scaffold import synthetic
from lamina.scaffold.synthetic import SITES
from lamina.store.files import storing

_SKEW = 8  # a digit that a site prefers lies there so many times as often as one that it does not


def write(kind: str, folder: Path) -> list[Path]:
    """The files of such a project: "image", "text" or "tabular".

    Raises:
        StorageError: E402 the folder holds something already; E401 it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(
            f"{folder} is not empty",
            code="E402",
            where=str(folder),
            remedy="name another folder: nothing is overwritten",
        )
    ours = importlib.resources.files("lamina.scaffold")
    said = {"@NAME@": _name(folder)}
    files: dict[str, bytes] = {}
    for name, source in {"mine.py": ours / kind, "exp.toml": ours, "README.md": ours / kind}.items():
        text = (source / f"{name}.in").read_text(encoding="utf-8")
        files[name] = re.sub("@NAME@", lambda found: said[found[0]], text).encode()
    files |= _DATA[kind]()
    with storing(folder):
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return [folder / name for name in files]


def _name(folder: Path) -> str:
    """The folder's, as an experiment may be called."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._")
    return name or "experiment"


def _digits() -> Mapping[str, bytes]:
    """An .npz for each site; every site has digits that it sees more often than others do."""
    import numpy as np

    stored = (importlib.resources.files("lamina.scaffold") / "image" / "digits.npz").read_bytes()
    with np.load(io.BytesIO(stored), allow_pickle=False) as arrays:
        x, y = arrays["x"], arrays["y"]
    odds = 1 + (_SKEW - 1) * np.array(
        [[digit % len(SITES) == site for site in range(len(SITES))] for digit in range(10)]
    )
    draws = np.random.RandomState(np.random.Philox(key=0)).random_sample(len(y))
    site = (np.cumsum(odds, axis=1)[y] <= draws[:, None] * odds.sum(1)[y, None]).sum(1)
    return {f"data/{name}/digits.npz": _packed(np, x[site == i], y[site == i]) for i, name in enumerate(SITES)}


def _packed(np: Any, x: Any, y: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, x=x, y=y)
    return file.getvalue()


_DATA: Mapping[str, Callable[[], Mapping[str, bytes]]] = {
    "image": _digits,
    "text": lambda: {"reviews.csv": synthetic.reviews().encode()},
    "tabular": lambda: {"clinics.csv": synthetic.clinics().encode()},
}
