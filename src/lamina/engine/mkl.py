"""torch's MKL runs its AVX2 kernels on AMD processors, at half their speed. `LAMINA_MKL=amd` has it take those that it
takes on Intel's.

MKL asks a function of its own, `mkl_serv_intel_cpu_true`, which is no documented interface; so this is never done
unless it was asked for, it is recorded with every run, and what products of matrices then give is compared with numpy's
before anything is trained. It must be done before the first product of the process, since MKL asks but once.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lamina.errors import ConfigError

VARIABLE = "LAMINA_MKL"
_SYMBOL = "mkl_serv_intel_cpu_true"
_YES = b"\xb8\x01\x00\x00\x00\xc3"  # mov eax, 1; ret
_PAGE = 4096
_READ_EXECUTE, _READ_WRITE_EXECUTE = 5, 7


def asked_for() -> bool:
    """Whether the environment asks for it. Raises ConfigError (E103) for a value that means nothing."""
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "amd"):
        raise ConfigError(f"{VARIABLE}={value!r}: expected 'amd', or nothing", code="E103", where=VARIABLE)
    return value == "amd"


def label() -> str:
    """torch's version, and whether MKL was switched: what a run's bits depend on."""
    return f"{torch.__version__}{', MKL as on Intel' if asked_for() else ''}"


def switch() -> None:
    """Does it where the environment asks for it; once, and then again does nothing.

    Raises:
        ConfigError: E118 when this machine cannot, or when products of matrices come out wrong.
    """
    if not asked_for():
        return
    asks = _function()
    if asks() == 1:
        return
    _overwrite(asks)
    worst = error()
    if asks() != 1 or not worst < 1e-5:
        raise _cannot(f"products of matrices came out wrong (relative error {worst:.1e})")


def error() -> float:
    """The largest error of some float32 products, relative to numpy's in float64 (which are not MKL's)."""
    source = np.random.default_rng(0)
    worst = 0.0
    for n, k, m in ((10, 784, 64), (32, 512, 512), (129, 65, 257), (1, 1000, 10)):
        a, b = source.standard_normal((n, k)), source.standard_normal((k, m))
        exact = a @ b
        got = (torch.from_numpy(a).float() @ torch.from_numpy(b).float()).double().numpy()
        worst = max(worst, float(np.abs(got - exact).max() / np.abs(exact).max()))
    return worst


class Gain(NamedTuple):
    """Of the switch: products of 1024 x 1024 matrices on one thread."""

    before: float  # GFLOP/s
    after: float
    error: float  # see `error`


def gain() -> Gain | str:
    """What it would bring here, tried in two processes; or why it cannot be had."""
    figures = []
    for value in ("", "amd"):
        done = subprocess.run(
            [sys.executable, "-c", "from lamina.engine import mkl; mkl._measure()"],
            env={**os.environ, VARIABLE: value},
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["it failed without a word"])[-1]
        figures.append([float(word) for word in done.stdout.split()])
    (before, _), (after, worst) = figures
    return Gain(before, after, worst)


def _measure() -> None:
    """Prints GFLOP/s and the error; in a process of its own."""
    import time

    try:
        switch()
    except ConfigError as refused:
        sys.exit(refused.message)
    torch.set_num_threads(1)
    a = torch.ones(1024, 1024)
    best = float("inf")
    for _ in range(12):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    print(2 * 1024**3 / best / 1e9, error())


def _function() -> ctypes._NamedFuncPointer:
    """MKL's, in the library that torch has loaded."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        raise _cannot("it is known for Linux on x86-64 alone")
    if "AuthenticAMD" not in Path("/proc/cpuinfo").read_text():
        raise _cannot("the processor is not AMD's")
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return getattr(ctypes.CDLL(str(library)), _SYMBOL)  # type: ignore[no-any-return]
    except (OSError, AttributeError):
        raise _cannot("this torch has no MKL that can be asked") from None


def _overwrite(function: ctypes._NamedFuncPointer) -> None:
    """Has the function answer yes."""
    at = ctypes.cast(function, ctypes.c_void_p).value or 0
    page = at - at % _PAGE
    pages = _PAGE * (1 + (at % _PAGE + len(_YES) > _PAGE))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    if protect(ctypes.c_void_p(page), pages, _READ_WRITE_EXECUTE) != 0:
        raise _cannot(f"the system does not allow it ({os.strerror(ctypes.get_errno())})")
    ctypes.memmove(at, _YES, len(_YES))
    protect(ctypes.c_void_p(page), pages, _READ_EXECUTE)


def _cannot(why: str) -> ConfigError:
    return ConfigError(f"{VARIABLE}=amd: {why}", code="E118", where=VARIABLE, remedy=f"unset {VARIABLE}")
