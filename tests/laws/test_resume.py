"""Law: a run that is stopped after any round and goes on from a checkpoint is the run that was never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

import cases
import lamina.robust
from lamina import Federation, LocalSGD, checkpoint, wire
from lamina.robust import FLTrust, GeometricMedian, Krum, Median, MultiKrum, TrimmedMean

LOCAL = LocalSGD(lr=0.1, batch_size=8, schedule="warmup:2 cosine")


def check(make, folder: Path) -> None:
    pairs = list(make().run(cases.ROUNDS))
    expected = cases.everything(pairs[-1][0])
    records = [cases.untimed(record) for _, record in pairs]
    for done, (state, _) in enumerate(pairs[:-1], start=1):
        path = checkpoint.commit(state, folder / str(done), {"rows": done})
        fed = make()
        again, extra = checkpoint.read(path, fed)
        assert cases.everything(again) == cases.everything(state)
        assert extra == {"rows": done}
        last, rest = cases.finish(fed, cases.ROUNDS - done, again)
        assert cases.everything(last) == expected, f"stopped after {done} rounds"
        assert rest == records[done:], f"stopped after {done} rounds"


@pytest.mark.parametrize("name", cases.ALL)
def test_stopping_after_any_round_changes_nothing(name: str, tmp_path: Path) -> None:
    check(lambda: cases.case(name, local=LOCAL), tmp_path)


ON_DISK = ["errorfeedback", "fedlama", "scaffold", "fedlama, scaffold"]


@pytest.mark.parametrize("name", cases.the_rest_slowly(cases.ALL, ON_DISK))
def test_stopping_changes_nothing_with_clients_on_disk(name: str, tmp_path: Path) -> None:
    store = f"disk:{tmp_path / 'clients'}"
    check(lambda: cases.case(name, local=LOCAL, buffers="keep", store=store), tmp_path / "checkpoints")


@pytest.mark.parametrize("name", cases.CODECS)
def test_stopping_changes_nothing_with_any_codec(name: str, tmp_path: Path) -> None:
    check(lambda: cases.case("errorfeedback", local=LOCAL, uplink=cases.CODECS[name]), tmp_path)


RULES = {
    "median": Median,
    "trimmed": lambda: TrimmedMean(0.2),
    "krum": lambda: Krum(1),
    "multikrum": lambda: MultiKrum(1),
    "geomedian": GeometricMedian,
    "fltrust": lambda: FLTrust("ann"),
}


def test_every_rule_is_tried() -> None:
    assert RULES.keys() == lamina.robust.RULES.keys()


@pytest.mark.parametrize("rule", RULES)
def test_stopping_changes_nothing_under_a_rule(rule: str, tmp_path: Path) -> None:
    check(lambda: cases.case("fedlama", local=LOCAL, cohort=5, aggregate=RULES[rule]()), tmp_path)


@pytest.mark.parametrize("there", ["random:0.6", "day:0.5:3", "file"])
def test_stopping_changes_nothing_where_clients_come_and_go(there: str, tmp_path: Path) -> None:
    """From rounds 1 to 3, ann and bob are away: they go on from what they had."""
    if there == "file":
        (tmp_path / "there.csv").write_text("client,from,to\nann,0,0\nann,4,9\nbob,0,0\nbob,4,9\n")
        there = f"file:{tmp_path / 'there.csv'}"
    check(lambda: cases.case("fedlama, scaffold", local=LOCAL, availability=there), tmp_path)


@pytest.mark.parametrize("engine", ["processes", "threads", "stacked"])
def test_stopping_changes_nothing_with_any_engine(engine: str, tmp_path: Path) -> None:
    """Each goes on with what it began itself; a stack has two clients."""

    def make() -> Federation:
        fed = cases.case("fedlama, scaffold", model="small", local=LOCAL, engine=engine, workers=2)
        if engine == "stacked":
            fed._stack.width = 2
        return fed

    check(make, tmp_path)


@pytest.mark.parametrize("model", ["odd", "double"])
def test_stopping_changes_nothing_with_lossy_links_and_personal_buffers(model: str, tmp_path: Path) -> None:
    links = {"uplink": wire.RandomK(0.5, values="int8"), "downlink": wire.Dense("fp16"), "buffers": "keep"}
    check(lambda: cases.federation(cases.ALL["fedprox, fedlama"](), model, local=LOCAL, **links), tmp_path)


@pytest.mark.parametrize("name", cases.SENT_LOSSLESS)
def test_stopping_changes_nothing_where_distances_go_down(name: str, tmp_path: Path) -> None:
    check(lambda: cases.case(name, local=LOCAL, downlink=cases.LOSSLESS), tmp_path)


@pytest.mark.parametrize("name", ["fedlama", "fedlama, scaffold"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(name: str, tmp_path: Path) -> None:
    expected: dict = {}
    for state, _ in cases.case(name, local=LOCAL).run(cases.ROUNDS):
        if state.round < cases.ROUNDS:
            checkpoint.commit(state, tmp_path)
        expected = cases.everything(state)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.name == "round-000004"
    blob = bytearray((newest / "clients.safetensors").read_bytes())
    blob[-1] ^= 1
    (newest / "clients.safetensors").write_bytes(blob)
    before = checkpoint.latest(tmp_path)
    assert before is not None
    assert before.name == "round-000003"
    fed = cases.case(name, local=LOCAL)
    state, _ = checkpoint.read(before, fed)
    last, _ = cases.finish(fed, cases.ROUNDS - 3, state)
    assert cases.everything(last) == expected


def test_a_run_goes_on_from_a_state_in_memory() -> None:
    fed = cases.case("fedlama", local=LOCAL)
    whole = cases.states(fed)
    for done, state in enumerate(whole[:-1], start=1):
        assert cases.everything(cases.states(fed, cases.ROUNDS - done, state)[-1]) == cases.everything(whole[-1])


def test_processes_resume_what_loop_began(tmp_path: Path) -> None:
    *_, last = loop = cases.states(cases.case("fedlama, scaffold"))
    fed = cases.case("fedlama, scaffold", engine="processes", workers=2)
    state, _ = checkpoint.read(checkpoint.commit(loop[1], tmp_path), fed)
    assert cases.everything(cases.states(fed, cases.ROUNDS - 2, state)[-1]) == cases.everything(last)
