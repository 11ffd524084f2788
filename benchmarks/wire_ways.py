"""Ways to make bytes of a tree and a tree of bytes, ours and others', and a clock for them: for benchmarks/wire.py."""

from __future__ import annotations

import contextlib
import gzip
import io
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
import zstandard
from torch import Tensor

from lamina import wire
from lamina.tree import Params
from lamina.wire.codec import Selection, Support, some
from lamina.wire.values import Vectors

Turn = Callable[[], tuple[float, ...]]  # does its work once, and says how many seconds its parts took


def turns(contenders: Mapping[str, Turn], repeats: int) -> dict[str, list[tuple[float, ...]]]:
    """Seconds, after one turn of each that does not count."""
    for contender in contenders.values():
        contender()
    seconds: dict[str, list[tuple[float, ...]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            seconds[name].append(contender())
    return seconds


class Way(NamedTuple):
    """A way to make bytes of a tree and a tree of bytes."""

    encode: Callable[[], Any]
    decode: Callable[[Any], Any]

    def turn(self, threads: int | None = None) -> Turn:
        """Seconds to encode, to decode."""

        def go() -> tuple[float, ...]:
            with torch_threads(threads):
                began = time.perf_counter()
                blob = self.encode()
                encoded = time.perf_counter()
                tree = self.decode(blob)
                decoded = time.perf_counter()
                del tree, blob
                return encoded - began, decoded - encoded

        return go


@contextlib.contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(work: Callable[[], object], threads: int) -> Turn:
    """One part, and nothing to undo."""
    return Way(work, lambda _: None).turn(threads)


def by_codec(tree: Params, codec: wire.Codec, reference: Params | None = None) -> Way:
    return Way(
        lambda: wire.encode(tree, codec, reference=reference),
        lambda blob: wire.decode(blob, tree, reference=reference),
    )


@dataclass(frozen=True)
class Given(wire.TopK):
    """TopK that is told which entries are the largest: what is left is the coding."""

    positions: tuple[Any, ...] = ()

    def select(self, support: Support, vectors: Vectors) -> Selection:
        return some(support, list(self.positions))


def given(tree: Params, codec: wire.TopK) -> Given:
    mask = chosen(tree, codec)
    positions = tuple(np.flatnonzero(x.numpy()) for x in mask.values())
    told = Given(codec.density, codec.scope, codec.values, positions=positions)
    if wire.encode(tree, told) != wire.encode(tree, codec):
        sys.exit(f"{codec}: other bytes when it is told the entries")
    return told


def chosen(tree: Params, codec: wire.TopK) -> Params:
    """Where the entries are that the codec selects, as a mask."""
    least = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps  # of a 0 selected, too
    marked = {name: torch.where(x == 0, least, x) for name, x in tree.items()}
    received, _ = wire.transmit(marked, wire.TopK(codec.density, codec.scope))
    return {name: x != 0 for name, x in received.items()}


def same(a: Params, b: Params) -> bool:
    return a.keys() == b.keys() and all(torch.equal(bits(x), bits(b[name])) for name, x in a.items())


def bits(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


def length(way: Way, tree: Params, exact: bool) -> int:
    """Bytes; what comes back must be the tree."""
    blob = way.encode()
    if exact and not same(way.decode(blob), tree):
        sys.exit("another tree came back")
    return sum(map(len, blob)) if isinstance(blob, list) else len(blob)


# What others send.


def savez(tree: Params) -> Way:
    def encode() -> bytes:
        file = io.BytesIO()
        np.savez_compressed(file, **{name: x.numpy() for name, x in tree.items()})
        return file.getvalue()

    def decode(blob: bytes) -> Params:
        with np.load(io.BytesIO(blob), allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in tree}

    return Way(encode, decode)


def safetensors_zstd(tree: Params) -> Way:
    def encode() -> bytes:
        packed: bytes = zstandard.ZstdCompressor(level=3).compress(safetensors.torch.save(tree))
        return packed

    return Way(encode, lambda blob: safetensors.torch.load(zstandard.ZstdDecompressor().decompress(blob)))


def pickle_gzip(tree: Params) -> Way:
    """Of our own bytes only: who unpickles a stranger's runs the stranger's code."""

    def encode() -> bytes:
        return gzip.compress(pickle.dumps({name: x.numpy() for name, x in tree.items()}, protocol=5))

    def decode(blob: bytes) -> Params:
        return {name: torch.from_numpy(x) for name, x in pickle.loads(gzip.decompress(blob)).items()}

    return Way(encode, decode)


def coo(tree: Params) -> Way:
    """Flat int64 positions and fp32 values of what is not 0, per tensor, in one safetensors file."""

    def encode() -> bytes:
        parts = {}
        for name, x in tree.items():
            flat = x.reshape(-1)
            parts[f"{name}.positions"] = positions = flat.nonzero().reshape(-1)
            parts[f"{name}.values"] = flat[positions]
        return safetensors.torch.save(parts)

    def decode(blob: bytes) -> Params:
        parts, back = safetensors.torch.load(blob), {}
        for name, x in tree.items():
            flat = torch.zeros(x.numel())
            flat[parts[f"{name}.positions"]] = parts[f"{name}.values"]
            back[name] = flat.reshape(x.shape)
        return back

    return Way(encode, decode)


def npy_arrays(tree: Params) -> Way:
    """A .npy of each tensor, as Flower's ndarrays_to_parameters makes them, without the message around them."""

    def encode() -> list[bytes]:
        files = []
        for x in tree.values():
            file = io.BytesIO()
            np.save(file, x.numpy(), allow_pickle=False)
            files.append(file.getvalue())
        return files

    def decode(files: list[bytes]) -> Params:
        arrays = (np.load(io.BytesIO(file), allow_pickle=False) for file in files)
        return {name: torch.from_numpy(x) for name, x in zip(tree, arrays, strict=True)}

    return Way(encode, decode)


class Peer:
    """benchmarks/peers/flower_arrays.py with one message, in its own environment."""

    def __init__(self, python: str, tree: Params, folder: Path):
        path = folder / "MESSAGE.npz"
        np.savez(path, **{name: x.numpy() for name, x in tree.items()})
        script = Path(__file__).parent / "peers" / "flower_arrays.py"
        self._process = subprocess.Popen(
            [python, str(script), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.bytes = 0

    def __call__(self) -> tuple[float, ...]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the peer has no pipes")
        stdin.write("\n")
        stdin.flush()
        answer = stdout.readline().split()
        if not answer:
            sys.exit(f"flower_arrays.py ended with exit status {self._process.wait()}")
        self.bytes = int(answer[0])
        return float(answer[1]), float(answer[2])

    def close(self) -> None:
        self._process.communicate()  # end of input ends it
