"""What a run was made with: versions, processor, working tree, command, data. Nothing secret."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any

import torch
import xxhash

from lamina.data import ClientData
from lamina.engine import cores, cuda, mkl
from lamina.federation import Federation
from lamina.redaction import redacted


def environment(fed: Federation) -> dict[str, Any]:
    sizes = fed.data.sizes
    return {
        "lamina": installed("lamina"),
        "python": platform.python_version(),
        "torch": mkl.label(),
        "numpy": installed("numpy"),
        "safetensors": installed("safetensors"),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": cores(),
        "gpus": cuda.names() if fed.engine == "cuda" else [],
        "torch_threads": torch.get_num_threads(),
        "git": _git(),
        "argv": redacted(sys.argv),
        "frozen": fed.frozen,
        "data": {
            "name": fed.data.name,
            "partition": fed.data.partition,
            "clients": len(fed.data),
            "examples": int(sizes.sum()),
            "smallest": int(sizes.min()),
            "largest": int(sizes.max()),
            "split_sha256": fed.data.split_sha256,
            "fingerprint": fed.data.fingerprint,
            "content": content(fed.data),
        },
    }


_SAMPLED = 1000


def content(data: ClientData) -> str:
    """What a run must find again to be resumed, beside the split: all targets, and about a thousand examples of each
    set."""
    digest = xxhash.xxh3_128(data.pool_sha256.encode())
    for x in (data.x, *(() if data.test is None else (data.test[0],))):
        for key, values in [("", x)] if isinstance(x, torch.Tensor) else sorted(x.items()):
            sample = values[:: max(1, -(-len(values) // _SAMPLED))].contiguous()
            digest.update(key.encode())
            digest.update(sample.reshape(-1).view(torch.uint8).numpy().data)
    return str(digest.hexdigest())


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


_DEVELOPERS = ("dev", "docs", "fuzz")  # extras for work on lamina itself


def extras() -> dict[str, list[str]]:
    """Extra of lamina -> those of its packages that are not here, by lamina's own metadata; developers' left out."""
    try:
        said = metadata("lamina")
    except PackageNotFoundError:
        return {}
    missing: dict[str, list[str]] = {
        name: [] for name in said.get_all("Provides-Extra") or () if name not in _DEVELOPERS
    }
    for line in said.get_all("Requires-Dist") or ():
        package = re.match(r"[\w.-]+", line)
        extra = re.search(r"""extra\s*==\s*["']([^"']+)["']""", line)
        if package and extra and extra[1] in missing and installed(package[0]) is None:
            missing[extra[1]].append(package[0])
    return missing


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def free_memory() -> int | None:
    """Bytes that programs can have without swapping, where the system says so."""
    with contextlib.suppress(OSError):
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
        if found:
            return int(found[1]) * 1024
    return None


def sync_seconds(folder: Path) -> float | None:
    """How long a small file takes to be safe on this disk, the median of five; None where nothing can be written."""
    times = []
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(5):
                began = time.perf_counter()
                file.write(b"lamina" * 100)
                file.flush()
                os.fsync(file.fileno())
                times.append(time.perf_counter() - began)
    except OSError:
        return None
    return statistics.median(times)


def _git() -> dict[str, Any] | None:
    """Commit and state of the working tree that the run was started in."""

    def ask(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
