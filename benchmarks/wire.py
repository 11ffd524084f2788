"""How many bytes a message takes, and how long: on vectors of real runs, beside bounds and beside what others send.

    python benchmarks/wire.py vectors --out FOLDER [--works resnet18-cifar10,...] [--tiny]
    python benchmarks/wire.py measure FOLDER [--parts sizes,others,speed] [--repeats 7] [--flower PYTHON]

`vectors` trains and writes a file per work: a federation of two clients with up to 640 examples each, lr 0.1, batches
of 32 (so that ResNet-18 on two cores takes minutes), and of its first client

    first_before, first_after   weights before and after the local epoch of round 0
    before, after, update       the same of round 2, and the update it sent
    sent                        update + residual, what error feedback with TopK(0.01) codes, in the last of 5 rounds of
                                5 steps
    mask_0.5, mask_0.1          the masks that SSFL makes of both clients' saliency

`measure` prints Markdown: the goals first, reached or not, then every figure. Sizes count whole messages, every header
in; masks travel as the codec `Mask` sends them. bound = log2 of the number of sets of k out of all n entries, in bytes.
Every message is decoded and compared. Times are medians (min-max) over repeats in which the contenders take turns, in
one process but for Flower, which needs its own; the allocator keeps its memory, as in the engines.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor
from wire_vectors import DENSITIES, TINY, WORKS, File, count, machine, read, write
from wire_ways import (
    Peer,
    Turn,
    Way,
    bits,
    by_codec,
    chosen,
    coo,
    given,
    length,
    npy_arrays,
    pickle_gzip,
    safetensors_zstd,
    same,
    savez,
    timed,
    turns,
)

from lamina import wire
from lamina.engine.allocator import keep_memory
from lamina.random import generator
from lamina.tree import Params
from lamina.wire.container import HEADER
from lamina.wire.index import log2_choose

THREADS = (1, 2)


class Goal(NamedTuple):
    what: str
    limit: float
    reached: float
    unit: str = ""
    least: bool = False  # the limit is a lower one

    def line(self) -> str:
        met = self.reached >= self.limit if self.least else self.reached <= self.limit
        sign = ">=" if self.least else "<="
        reached = f"{self.reached:.5g}{self.unit}"
        return f"| {self.what} | {sign} {self.limit:g}{self.unit} | {reached} | {'met' if met else '**not met**'} |"


class Report(NamedTuple):
    """One table, and the goals that it decides."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[object, ...]]
    goals: list[Goal]

    def text(self) -> str:
        return f"## {self.title}\n\n{table(self.columns, self.rows)}\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def ones(mask: Params) -> int:
    return sum(int(x.sum()) for x in mask.values())


def bound(n: int, k: int) -> float:
    """Bytes to say which k of n."""
    return log2_choose(n, k) / 8


def sent_as(tree: Params, codec: wire.Codec, reference: Params | None = None) -> bytes:
    """The message; it is decoded, and must be what the codec says the receiver gets."""
    blob = wire.encode(tree, codec, reference=reference)
    expected, size = wire.transmit(tree, codec, reference=reference)
    if not same(wire.decode(blob, tree, reference=reference), expected) or size.total != len(blob):
        sys.exit(f"{codec}: another message came back")
    return blob


def reports_of_sizes(files: Sequence[File]) -> list[Report]:
    # A figure of every file is in the table; the goals are of ResNet-18, where there is one.
    main = [v.name for v in files if v.model == "resnet18"] or [v.name for v in files]
    return [uniform_masks(files), real_masks(files, main), sparse_messages(files, main), dense_messages(files, main)]


SHARES = (0.0001, 0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.38, 0.42, 0.5)
DRAWS = 3
FEWEST = 1000


def uniform_masks(files: Sequence[File]) -> Report:
    rows: list[tuple[object, ...]] = []
    worst = 0.0
    for like in {v.model: v.trees["update"] for v in files}.values():
        n = count(like)
        for share in SHARES:
            k = round(share * n)
            if k < FEWEST:
                continue
            source = generator(0, "benchmark masks")
            blobs = [sent_as(drawn(like, k, source), wire.Mask()) for _ in range(DRAWS)]
            longest = max(blobs, key=len)
            ratio = len(longest) / bound(n, k)
            worst = max(worst, ratio)
            section = (len(longest) - HEADER.size) / bound(n, k)
            rows.append((f"{n:,}", f"{share:g}", f"{k:,}", longest[4], f"{len(longest):,}", f"{section:.4f}",
                         f"{ratio:.4f}"))  # fmt: skip
    title = f"Masks at random, the longest of {DRAWS} draws"
    columns = ("n", "share", "k", "index id", "bytes", "index section / bound", "message / bound")
    return Report(title, columns, rows, [Goal(f"index / log2 C(n,k), uniform masks, k >= {FEWEST}", 1.02, worst)])


def drawn(like: Params, k: int, source: torch.Generator) -> Params:
    """A mask of k entries anywhere."""
    flat = torch.zeros(count(like), dtype=torch.bool)
    flat[torch.randperm(len(flat), generator=source)[:k]] = True
    parts = torch.split(flat, [x.numel() for x in like.values()])
    return {name: part.reshape(x.shape) for (name, x), part in zip(like.items(), parts, strict=True)}


def real_masks(files: Sequence[File], main: Sequence[str]) -> Report:
    rows: list[tuple[object, ...]] = []
    reached: dict[str, list[float]] = {}
    for v in files:
        masks = {
            f"error feedback, top {density:.1%} {scope}": chosen(v.trees["sent"], wire.TopK(density, scope))
            for density in (0.1, 0.01, 0.001)
            for scope in ("layer", "global")
        }
        masks |= {
            f"update, top 1.0% {scope}": chosen(v.trees["update"], wire.TopK(0.01, scope))
            for scope in ("layer", "global")
        }
        masks |= {f"SSFL {density}": v.trees[f"mask_{density}"] for density in DENSITIES}
        for title, mask in masks.items():
            blob, n, k = sent_as(mask, wire.Mask()), count(mask), ones(mask)
            ratio = len(blob) / bound(n, k)
            section = (len(blob) - HEADER.size) / bound(n, k)
            rows.append((v.name, title, f"{k:,}", blob[4], f"{len(blob):,}", f"{section:.3f}", f"{ratio:.3f}"))
            if v.name in main and title.startswith("error feedback, top 1.0%"):
                reached.setdefault(title, []).append(ratio)
    goals = [Goal(f"index / log2 C(n,k), {title}", 0.80, max(ratios)) for title, ratios in reached.items()]
    columns = ("vectors", "mask", "k", "index id", "bytes", "index section / bound", "message / bound")
    return Report("Masks of real runs", columns, rows, goals)


VALUES = ("lossless", "fp32", "bf16", "fp16", "int8", "int4", "sign")


def sparse_messages(files: Sequence[File], main: Sequence[str]) -> Report:
    rows: list[tuple[object, ...]] = []
    reached: dict[str, list[float]] = {}
    for v in files:
        tree = v.trees["sent"]
        n = count(tree)
        for scope, values in itertools.product(("layer", "global"), VALUES):
            codec = wire.TopK(0.01, scope, values)
            blob = sent_as(tree, codec)
            k = sum(wire.transmit(tree, codec)[1].entries.values())
            ratio = len(blob) / (bound(n, k) + 4 * k)
            rows.append((v.name, scope, values, f"{len(blob):,}", f"{ratio:.3f}", f"{8 * len(blob) / n:.4f}",
                         f"{4 * n / len(blob):,.0f}"))  # fmt: skip
            if v.name in main and values == "lossless":
                reached.setdefault(scope, []).append(ratio)
    goals = [
        Goal(f"total / (log2 C(n,k) + 32 k), lossless, error feedback, top 1% {scope}", 0.72, max(ratios))
        for scope, ratios in reached.items()
    ]
    columns = ("vectors", "scope", "values", "bytes", "/ (bound + 4 k)", "bits per parameter", "dense fp32 / this")
    return Report("Error feedback, top 1 %", columns, rows, goals)


def dense_messages(files: Sequence[File], main: Sequence[str]) -> Report:
    rows: list[tuple[object, ...]] = []
    given: list[float] = []
    for v in files:
        t = v.trees
        cases = {
            "weights after the first epoch, given those before": (t["first_after"], t["first_before"]),
            "weights after the third epoch, given those before": (t["after"], t["before"]),
            "weights after the third epoch": (t["after"], None),
            "update": (t["update"], None),
            "update + residual": (t["sent"], None),
        }
        for title, (tree, reference) in cases.items():
            blob = sent_as(tree, wire.Dense("lossless"), reference)
            ratio = len(blob) / (4 * count(tree))
            rows.append((v.name, title, f"{len(blob):,}", f"{ratio:.3f}", f"{32 * ratio:.2f}"))
            if v.name in main and reference is not None:
                given.append(ratio)
    goals = [Goal("dense lossless given the model before / raw fp32, weights after a local epoch", 0.70, max(given))]
    columns = ("vectors", "tree", "bytes", "/ raw fp32", "bits per parameter")
    return Report("Dense, lossless", columns, rows, goals)


# Beside what others send.


def reports_of_others(files: Sequence[File], repeats: int, flower: str | None) -> list[Report]:
    return [report_of_others(v, repeats, flower) for v in files]


def report_of_others(v: File, repeats: int, flower: str | None) -> Report:
    sent = v.trees["sent"]
    codec = wire.TopK(0.01, values="lossless")
    sparse = wire.transmit(sent, codec)[0]
    halves = wire.TopK(0.01, values="bf16")
    lossless = wire.Dense("lossless")
    messages: dict[str, tuple[Params, dict[str, Way]]] = {
        "weights after a local epoch": (
            v.trees["after"],
            {
                "lamina lossless, given the model before": by_codec(v.trees["after"], lossless, v.trees["before"]),
                "lamina lossless": by_codec(v.trees["after"], lossless),
                "lamina fp32": by_codec(v.trees["after"], wire.Dense()),
            },
        ),
        "update": (v.trees["update"], {"lamina lossless": by_codec(v.trees["update"], lossless)}),
        "top 1 % of update + residual": (
            sparse,
            {
                "lamina lossless": by_codec(sent, given(sent, codec)),
                "lamina lossless, and the selection": by_codec(sent, codec),
                "lamina bf16 (loses bits)": by_codec(sent, given(sent, halves)),
                "COO, int64 + fp32": coo(sparse),
            },
        ),
    }
    rows: list[tuple[object, ...]] = []
    for title, (tree, ways) in messages.items():
        ways |= {
            "numpy.savez_compressed": savez(tree),
            "safetensors + zstd 3": safetensors_zstd(tree),
            "pickle + gzip": pickle_gzip(tree),
        }
        if flower is None:
            ways["a .npy per tensor, as in Flower"] = npy_arrays(tree)
        lengths = {name: length(way, tree, exact="loses" not in name) for name, way in ways.items()}
        contenders: dict[str, Turn] = {name: way.turn(max(THREADS)) for name, way in ways.items()}
        with contextlib.ExitStack() as stack:
            if flower is not None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lamina-wire-")))
                peer = stack.enter_context(contextlib.closing(Peer(flower, tree, folder)))
                contenders["Flower's ArrayRecord"] = peer
            seconds = turns(contenders, repeats)
            if flower is not None:
                lengths["Flower's ArrayRecord"] = peer.bytes
        ours = lengths["lamina lossless"]
        for name, size in sorted(lengths.items(), key=lambda item: item[1]):
            encode, decode = zip(*seconds[name], strict=True)
            rows.append((title, name, f"{size:,}", f"{size / ours:.2f}", ms(encode), ms(decode)))
    heading = f"{v.name}: what a user would otherwise send (lamina and torch with {max(THREADS)} threads)"
    return Report(heading, ("message", "as", "bytes", "/ lamina lossless", "encode, ms", "decode, ms"), rows, [])


# Speed.


def spread(numbers: Iterable[float]) -> str:
    """median (min-max)"""
    some = sorted(numbers)
    digits = 2 if abs(statistics.median(some)) < 10 else 0
    middle, low, high = (f"{x:,.{digits}f}" for x in (statistics.median(some), some[0], some[-1]))
    return f"{middle} ({low}-{high})"


def ms(seconds: Iterable[float]) -> str:
    return spread([1e3 * s for s in seconds])


def reports_of_speed(files: Sequence[File], repeats: int) -> list[Report]:
    """Of the largest model, of equal ones the first file."""
    v = max(files, key=lambda v: count(v.trees["update"]))
    return [sparse_speed(v, repeats), dense_speed(v, repeats), raw_speed(v, repeats)]


def sparse_speed(v: File, repeats: int) -> Report:
    tree = v.trees["sent"]
    contenders: dict[str, Turn] = {}
    for threads, scope in itertools.product(THREADS, ("layer", "global")):
        codec = wire.TopK(0.01, scope, "lossless")
        key = f"{scope}/{threads}"
        contenders[f"whole/{key}"] = by_codec(tree, codec).turn(threads)
        contenders[f"coding/{key}"] = by_codec(tree, given(tree, codec)).turn(threads)
        for values in ("bf16", "sign"):
            other = given(tree, wire.TopK(0.01, scope, values))
            contenders[f"{values}/{key}"] = by_codec(tree, other).turn(threads)
        contenders[f"topk/{key}"] = timed(topk(tree, 0.01, scope), threads)
    seconds = turns(contenders, repeats)
    rows: list[tuple[object, ...]] = []
    goals = []
    for threads, scope in itertools.product(THREADS, ("layer", "global")):
        key = f"{scope}/{threads}"
        coding = seconds[f"coding/{key}"]
        for values in ("lossless", "bf16", "sign"):
            both = coding if values == "lossless" else seconds[f"{values}/{key}"]
            encode, decode = zip(*both, strict=True)
            rows.append((f"coding, values {values}", scope, threads, ms(encode), ms(decode), ms(map(sum, both)), ""))
        selection = [whole[0] - part[0] for whole, part in zip(seconds[f"whole/{key}"], coding, strict=True)]
        torchs = [s[0] for s in seconds[f"topk/{key}"]]
        ratios = [a / b for a, b in zip(torchs, selection, strict=True)]
        rows.append(("selection", scope, threads, ms(selection), "", "", f"torch.topk takes {spread(ratios)} times"))
        rows.append(("torch.topk", scope, threads, ms(torchs), "", "", ""))
        if threads == max(THREADS):
            reached = 1e3 * statistics.median(map(sum, coding))
            what = f"encode + decode beyond the selection, top 1% {scope}, lossless, {threads} threads"
            goals.append(Goal(what, 15, reached, " ms"))
    title = f"{v.name}: time of a top-1 % message of {count(tree):,} parameters"
    return Report(title, ("part", "scope", "threads", "encode, ms", "decode, ms", "both, ms", ""), rows, goals)


def topk(tree: Params, density: float, scope: str) -> Callable[[], object]:
    """The selection as one would write it in torch; the order of the entries found is left open."""
    if scope == "layer":
        asked = [(x, max(1, round(density * x.numel()))) for x in tree.values()]
        return lambda: [torch.topk(x.reshape(-1).abs(), k, sorted=False) for x, k in asked]
    k = max(1, round(density * count(tree)))
    return lambda: torch.topk(torch.cat([x.reshape(-1) for x in tree.values()]).abs(), k, sorted=False)


def dense_speed(v: File, repeats: int) -> Report:
    cases = {
        "weights": (v.trees["after"], None),
        "weights, given the model before": (v.trees["after"], v.trees["before"]),
        "update": (v.trees["update"], None),
    }
    codec = wire.Dense("lossless")
    contenders = {
        f"{title}/{threads}": by_codec(tree, codec, reference).turn(threads)
        for title, (tree, reference) in cases.items()
        for threads in THREADS
    }
    seconds = turns(contenders, repeats)
    rows: list[tuple[object, ...]] = []
    goals = []
    for title, (tree, _) in cases.items():
        gigabytes = 4e-9 * count(tree)
        for threads in THREADS:
            encode, decode = (
                [gigabytes / s for s in part] for part in zip(*seconds[f"{title}/{threads}"], strict=True)
            )
            rows.append((title, threads, spread(encode), spread(decode)))
        for part, rates in (("encode", encode), ("decode", decode)):
            what = f"dense lossless, {title}: {part}, {threads} threads"
            goals.append(Goal(what, 1, statistics.median(rates), " GB/s", least=True))
    title = f"{v.name}: dense lossless, GB of raw fp32 per second"
    return Report(title, ("tree", "threads", "encode, GB/s", "decode, GB/s"), rows, goals)


def raw_speed(v: File, repeats: int) -> Report:
    """fp32 beside what it cannot do without: the bytes copied, and their XXH3-64."""
    tree = v.trees["after"]
    views = [bits(x).numpy().data for x in tree.values()]
    sizes = [len(view) for view in views]

    def copy() -> bytes:
        blob = b"".join(views)
        xxhash.xxh3_64_intdigest(blob)
        return blob

    def back(blob: bytes) -> list[Tensor]:
        xxhash.xxh3_64_intdigest(blob)
        out, at, view = [], 0, memoryview(blob)
        for size in sizes:
            out.append(torch.empty(size, dtype=torch.uint8))
            np.copyto(out[-1].numpy(), np.frombuffer(view[at : at + size], np.uint8))
            at += size
        return out

    contenders = {"fp32": by_codec(tree, wire.Dense()).turn(1), "copy and checksum": Way(copy, back).turn(1)}
    seconds = turns(contenders, repeats)
    rows: list[tuple[object, ...]] = []
    for name, both in seconds.items():
        encode, decode = zip(*both, strict=True)
        rows.append((name, ms(encode), ms(decode), ms(map(sum, both))))
    pairs = list(zip(seconds["fp32"], seconds["copy and checksum"], strict=True))
    ratios = {
        "encode": [a[0] / b[0] for a, b in pairs],
        "decode": [a[1] / b[1] for a, b in pairs],
        "both": [sum(a) / sum(b) for a, b in pairs],
    }
    rows.append(("ratio", *(spread(r) for r in ratios.values())))
    goals = [
        Goal(f"raw fp32 / copy and checksum, {part}", 1.3, statistics.median(ratios[part]))
        for part in ("encode", "decode")
    ]
    title = f"{v.name}: dense fp32, beside a copy and a checksum"
    return Report(title, ("", "encode, ms", "decode, ms", "both, ms"), rows, goals)


# The command.

PARTS = ("sizes", "others", "speed")


def measure(folder: Path, parts: Sequence[str], repeats: int, flower: str | None) -> None:
    keep_memory()
    files = [read(path) for path in sorted(folder.glob("*.safetensors"))]
    if not files:
        sys.exit(f"{folder}: no vectors there; python benchmarks/wire.py vectors --out {folder}")
    reports: list[Report] = []
    if "sizes" in parts:
        reports += reports_of_sizes(files)
    if "others" in parts:
        reports += reports_of_others(files, repeats, flower)
    if "speed" in parts:
        reports += reports_of_speed(files, repeats)
    print(f"`python benchmarks/wire.py {' '.join(sys.argv[1:])}`\n\n{json.dumps(machine())}")
    made = ", ".join(f"{v.name} at commit {v.made['commit']}" for v in files)
    print(f"\nVectors: {made}\n")
    goals = [goal.line() for report in reports for goal in report.goals]
    if goals:
        print("## Goals\n\n" + "\n".join([table(("what", "goal", "reached", ""), []), *goals]) + "\n")
    print("\n".join(report.text() for report in reports))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("vectors", help="train, and write what is measured")
    maker.add_argument("--out", type=Path, required=True)
    maker.add_argument("--works", default=",".join(WORKS))
    maker.add_argument("--tiny", action="store_true", help="a small MLP on the digits instead: does everything run?")
    measurer = commands.add_parser("measure", help="print the tables")
    measurer.add_argument("folder", type=Path)
    measurer.add_argument("--parts", default=",".join(PARTS))
    measurer.add_argument("--repeats", type=int, default=7)
    measurer.add_argument("--flower", help="python of an environment with flwr and torch")
    arguments = parser.parse_args()
    if arguments.command == "vectors":
        write(arguments.out, TINY if arguments.tiny else {name: WORKS[name] for name in arguments.works.split(",")})
    else:
        measure(arguments.folder, arguments.parts.split(","), arguments.repeats, arguments.flower)


if __name__ == "__main__":
    main()
