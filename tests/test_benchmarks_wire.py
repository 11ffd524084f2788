"""The wire benchmark on a small MLP: everything runs, and says of every goal whether it is met."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lamina import wire

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="not a checkout")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return __import__("wire")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def folder(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("vectors")
    benchmark.write(made, benchmark.TINY)
    return made


def test_the_vectors_are_of_one_run(benchmark: ModuleType, folder: Path) -> None:
    """update = after - before, bit for bit; the last epoch starts elsewhere than the first; the masks keep half and a
    tenth of the weights."""
    file = benchmark.read(folder / "mlp-digits.safetensors")
    trees = file.trees
    assert all(torch.equal(x, trees["after"][n] - trees["before"][n]) for n, x in trees["update"].items())
    assert not any(torch.equal(x, trees["first_before"][n]) for n, x in trees["before"].items())
    assert list(trees["sent"]) == list(trees["update"]) == list(trees["after"])  # in the order of the model
    for density in (0.5, 0.1):
        kept = sum(int(m.sum()) for m in trees[f"mask_{density}"].values())
        assert kept == pytest.approx(density * (64 * 128 + 128 * 10), rel=0.01)
    assert json.loads(json.dumps(file.made))["torch"] == torch.__version__


def test_every_part_is_printed_and_every_goal_has_a_verdict(
    benchmark: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark.measure(folder, benchmark.PARTS, 1, None)
    goals, *sections = capsys.readouterr().out.split("## ")[1:]
    verdicts = [line.split(" | ")[-1].rstrip(" |") for line in goals.splitlines()[4:] if line]
    assert len(verdicts) == 16
    assert set(verdicts) <= {"met", "**not met**"}
    titles = [section.splitlines()[0] for section in sections]
    assert [t.split(":")[0] for t in titles[4:]] == ["mlp-digits"] * 4
    (others,) = [s for s in sections if "otherwise send" in s]
    assert {"numpy.savez_compressed", "safetensors + zstd 3", "pickle + gzip", "COO, int64 + fp32"} <= {
        line.split(" | ")[1] for line in others.splitlines()[4:] if line
    }


def test_a_goal_is_met_on_its_limit_and_not_beyond(benchmark: ModuleType) -> None:
    assert benchmark.Goal("x", 0.8, 0.8).line() == "| x | <= 0.8 | 0.8 | met |"
    assert benchmark.Goal("x", 0.8, 0.81).line() == "| x | <= 0.8 | 0.81 | **not met** |"
    assert benchmark.Goal("x", 1, 0.9, " GB/s", least=True).line() == "| x | >= 1 GB/s | 0.9 GB/s | **not met** |"


def test_the_bound_counts_sets(benchmark: ModuleType) -> None:
    """10 pairs of 5: log2 10 bits."""
    assert benchmark.bound(5, 2) == pytest.approx(math.log2(10) / 8)


def test_entries_that_are_0_are_seen_to_be_selected(benchmark: ModuleType) -> None:
    """Of 4 zeros the first 2 are the largest; so they are of (0, 0, -1, 0), with the -1."""
    tree = {"a": torch.zeros(4), "b": torch.tensor([0.0, 0.0, -1.0, 0.0])}
    mask = benchmark.chosen(tree, wire.TopK(0.5))
    assert mask["a"].tolist() == [True, True, False, False]
    assert mask["b"].tolist() == [True, False, True, False]
    told = benchmark.given(tree, wire.TopK(0.5))
    assert wire.encode(tree, told) == wire.encode(tree, wire.TopK(0.5))


@pytest.mark.parametrize("way", ["savez", "safetensors_zstd", "pickle_gzip", "npy_arrays", "coo"])
def test_what_others_send_comes_back(benchmark: ModuleType, way: str) -> None:
    tree = {"a.weight": torch.tensor([[0.0, 1.5], [-2.0, 0.0]]), "a.bias": torch.tensor(3.0), "b": torch.zeros(0, 4)}
    made = getattr(benchmark, way)(tree)
    assert benchmark.same(made.decode(made.encode()), tree)


def test_coo_takes_12_bytes_an_entry(benchmark: ModuleType) -> None:
    """8 of int64 and 4 of fp32 for each that is not 0; the head of the file is the same whatever it holds."""
    few, many = torch.zeros(1000), torch.zeros(1000)
    few[:100], many[:900] = 1, 1
    sizes = [len(benchmark.coo({"a": x}).encode()) for x in (few, many)]
    assert abs(sizes[1] - sizes[0] - 12 * 800) <= 16  # the head has the counts, and is padded to 8
