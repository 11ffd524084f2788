"""Law: a run is a function of its settings and its seed; looking at it changes nothing."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cases
from lamina import LocalSGD

FIVE = ["fedavg", "fedlama", "scaffold", "errorfeedback, fedavgm", "fedprox, errorfeedback, fedlama, fedyogi"]


@pytest.mark.parametrize("name", cases.ALL)
def test_two_runs_agree_whatever_the_global_generators_hold(name: str) -> None:
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        state, records = cases.finish(cases.case(name), 4)
        runs.append((cases.everything(state), records))
    assert runs[0] == runs[1]


def test_a_run_leaves_the_global_generators_and_threads_as_they_were() -> None:
    before = torch.default_generator.get_state(), np.random.get_state()[1].tolist(), random.getstate()
    threads = torch.get_num_threads()
    cases.finish(cases.federation(), 1)
    assert torch.equal(torch.default_generator.get_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]
    assert torch.get_num_threads() == threads


def test_another_seed_gives_another_run() -> None:
    shas = {cases.finish(cases.federation(seed=seed), 1)[0].sha256() for seed in range(4)}
    assert len(shas) == 4


@pytest.mark.parametrize("name", FIVE)
def test_looking_changes_no_bit(name: str) -> None:
    plain = cases.states(cases.case(name))
    watched = cases.case(name, metrics={"largest": lambda output, y: float(output.max())})
    for other in (cases.states(watched), cases.states(cases.case(name), evaluate_every=3)):
        assert [cases.everything(s) for s in other] == [cases.everything(s) for s in plain]
    blind = cases.states(cases.case(name, diagnostics=False))
    assert [cases.learned(s) for s in blind] == [cases.learned(s) for s in plain]


@pytest.mark.parametrize("name", FIVE)
def test_evaluating_between_rounds_changes_no_bit(name: str) -> None:
    plain = cases.states(cases.case(name))
    fed = cases.case(name)
    for expected, (state, _) in zip(plain, fed.run(cases.ROUNDS), strict=True):
        fed.evaluate(state)
        fed.module(state)(torch.zeros(2, 1, 8, 8))
        fed.model.train()(torch.zeros(2, 1, 8, 8))
        assert cases.everything(state) == cases.everything(expected)


def test_two_runs_of_one_federation_may_interleave() -> None:
    fed = cases.case("fedlama, scaffold")
    alone = cases.states(fed, 3)
    for (a, _), (b, _), expected in zip(fed.run(3), fed.run(3), alone, strict=True):
        assert cases.everything(a) == cases.everything(b) == cases.everything(expected)


def test_the_horizon_changes_nothing_but_the_schedule() -> None:
    """The first rounds of a longer run are those of a shorter one under a constant rate, and not under cosine."""
    same = [cases.states(cases.federation(), n)[1].sha256() for n in (2, 3)]
    assert same[0] == same[1]
    cosine = LocalSGD(lr=0.1, batch_size=8, schedule="cosine")
    other = [cases.states(cases.federation(local=cosine), n)[1].sha256() for n in (2, 3)]
    assert other[0] != other[1]


def shas() -> dict[str, str]:
    return {name: cases.finish(cases.case(name), 4)[0].sha256() for name in FIVE}


def test_another_process_with_another_hash_seed_gives_the_same_bits() -> None:
    """Sets of names are everywhere; their order, which Python shuffles anew in each process, must be nowhere."""
    here = Path(__file__).parents[1]
    script = "import json; from laws.test_determinism import shas; print(json.dumps(shas()))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(here)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(done.stdout) == shas()
