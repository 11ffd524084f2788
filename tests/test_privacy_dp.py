"""Client-level differential privacy in a federation: what is clipped, noised, drawn, refused and reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina import DP, ClientData, Federation, LocalSGD
from lamina.cohort import Faults, draw_each
from lamina.config import load_tables
from lamina.privacy.accountant import Made, epsilon
from lamina.privacy.dp import Guard
from lamina.privacy.noise import gaussian, key_of
from lamina.random import stream
from lamina.robust import Median
from lamina.runs import fit, resume
from network import connected

KEY = bytes(range(32))
USUAL = DP(1.0, 1.0)


def data(clients: int = 6, **more: Any) -> ClientData:
    source = torch.Generator().manual_seed(0)
    held = {
        f"c{i}": (torch.randn(12 + i, 5, generator=source), torch.randint(0, 3, (12 + i,), generator=source))
        for i in range(clients)
    }
    test = torch.randn(9, 5, generator=source), torch.randint(0, 3, (9,), generator=source)
    return ClientData.from_clients(held, test=test, **more)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def federation(privacy: DP | None = USUAL, **more: Any) -> Federation:
    local = LocalSGD(lr=0.1, batch_size=8)
    return Federation(
        model, data(), **{"local": local, "weights": "uniform", "engine": "loop", **more}, privacy=privacy
    )


def last(fed: Federation, rounds: int) -> lamina.State:
    return [state for state, _ in fed.run(rounds)][-1]


# ---- its parts


def test_the_noise_is_normal_and_only_known_with_the_key() -> None:
    x = gaussian(KEY, "noise/a", 3, 200_001)
    assert x.dtype == torch.float64
    assert len(x) == 200_001
    assert abs(float(x.mean())) < 0.01
    assert abs(float(x.std()) - 1) < 0.01
    assert abs(float((x**4).mean()) - 3) < 0.1
    for at, share in ((0.0, 0.5), (1.0, 0.8413), (-1.96, 0.025), (3.0, 0.99865)):
        assert float((x < at).double().mean()) == pytest.approx(share, abs=0.004)
    assert torch.equal(x, gaussian(KEY, "noise/a", 3, 200_001))
    others = [gaussian(bytes(32), "noise/a", 3, 9), gaussian(KEY, "noise/b", 3, 9), gaussian(KEY, "noise/a", 4, 9)]
    assert not any(torch.equal(x[:9], other) for other in others)
    assert abs(float((x[:100_000] * x[100_000:200_000]).mean())) < 0.02  # the two halves of Box and Muller


def test_the_key_of_a_seed_is_no_small_number() -> None:
    assert len(key_of(7)) == 32
    assert key_of(7) != key_of(8)
    assert stream(KEY, "a", 1, 40)[:20] == stream(KEY, "a", 1, 20)


def test_every_client_is_drawn_by_itself() -> None:
    """Means and variances of 2,000 Poisson cohorts of 40 clients at 0.2: size 8 and 6.4, each client 400 times."""
    drawn = [draw_each(KEY, t, 40, 0.2) for t in range(2000)]
    sizes = torch.tensor([float(len(d)) for d in drawn])
    assert float(sizes.mean()) == pytest.approx(8, abs=0.25)
    assert float(sizes.var()) == pytest.approx(6.4, rel=0.12)
    counts = torch.bincount(torch.tensor([c for d in drawn for c in d]), minlength=40)
    assert int(counts.min()) > 320
    assert int(counts.max()) < 480
    together = sum(0 in d and 1 in d for d in drawn)
    assert together == pytest.approx(80, abs=35)
    assert any(draw_each(KEY, t, 3, 0.1) == () for t in range(20))
    assert draw_each(KEY, 0, 5, 1.0) == (0, 1, 2, 3, 4)
    assert all(tuple(sorted(d)) == d for d in drawn)


def test_the_clip_is_over_all_layers_together() -> None:
    """(3, 4) in two layers has norm 5: clipped to 1 it is (0.6, 0.8), a hair less."""
    guard = Guard(DP(1.0, 1.0), 0, 10, 5)
    made = guard.clipped({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
    assert float(made["a"]) == pytest.approx(0.6, rel=2e-6)
    assert float(made["b"]) == pytest.approx(0.8, rel=2e-6)
    short = {"a": torch.tensor([0.3])}
    assert guard.clipped(short) is short


def test_a_clipped_update_is_never_longer_than_the_clip() -> None:
    source = torch.Generator().manual_seed(0)
    for clip in (1e-3, 0.7, 13.0):
        guard = Guard(DP(clip, 1.0), 0, 10, 5)
        for size in (1, 10, 5000):
            made = guard.clipped({"a": 100 * torch.randn(size, generator=source)})["a"]
            assert float(made.double().norm()) <= clip
            assert float(made.double().norm()) > 0.9999 * clip


def test_one_round_by_hand() -> None:
    """Every client (q = 1): the clipped updates of a plain federation of one client each, summed, noised, over 6."""
    fed = federation(DP(0.05, 0.5))
    (state, _), *_ = fed.run(1)
    whole: dict[str, Tensor] = {name: torch.zeros_like(x).double() for name, x in fed.initial.params.items()}
    plain = federation(None)
    for reply in plain.made_engine().replies("round", _plan(plain), range(6), {}):
        update = {name: x.clone() for name, x in reply.message["update"].items()}
        norm = torch.cat([x.double().flatten() for x in update.values()]).norm()
        for name, x in update.items():
            whole[name] += x.double() * min(1.0, 0.05 / float(norm))
    for name, x in state.params.items():
        noise = gaussian(key_of(0), f"noise/{name}", 0, x.numel()).view(x.shape) * 0.5 * 0.05
        expected = fed.initial.params[name].double() + (whole[name] + noise) / 6
        torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-7)


def _plan(fed: Federation) -> lamina.Plan:
    return fed._plan(*fed.initial, 0, 0.1, 6)


def test_the_sum_is_divided_by_the_expected_number_of_clients() -> None:
    """Nobody is drawn: noise * clip / cohort is what the model moves by, and the round is one like any other."""
    fed = federation(DP(1.0, 1.0), cohort=1)
    empty = next(t for t in range(50) if not fed._drawn(t, {}))
    going = list(fed.run(empty + 1))
    before = going[-2][0].params if empty else fed.initial.params
    after, record = going[-1]
    name = "0.weight"
    noise = gaussian(key_of(0), f"noise/{name}", empty, 40).view(8, 5)
    torch.testing.assert_close(after.params[name], before[name] + noise.float(), rtol=1e-6, atol=1e-6)
    assert record.cohort == ()
    assert record.bytes_up == 0
    assert record.epsilon is not None


def test_a_client_that_is_refused_counts_as_nothing() -> None:
    """Its update is NaN: the others' sum and the denominator stay, and epsilon is reported all the same."""
    fed = federation(DP(0.05, 1.0))
    bad = federation(DP(0.05, 1.0)).through(lambda engine: _Nan(engine, 2))
    (_, record), *_ = bad.run(1)
    (_, fine), *_ = fed.run(1)
    assert [c.refused for c in record.clients].count("E310") == 1
    assert record.epsilon == fine.epsilon


class _Nan:
    def __init__(self, inner: Any, client: int):
        self.name, self.reason, self.workers = inner.name, inner.reason, inner.workers
        self._inner, self._client = inner, client

    def replies(self, *given: Any) -> Any:
        for reply in self._inner.replies(*given):
            if reply.client == self._client and "update" in reply.message:
                update = {name: x * float("nan") for name, x in reply.message["update"].items()}
                reply = reply._replace(message={**reply.message, "update": update})
            yield reply

    def close(self) -> None:
        self._inner.close()


# ---- what it is worth


def test_epsilon_grows_round_by_round_as_the_accountant_says() -> None:
    records = [record for _, record in federation(DP(1.0, 1.3, 1e-4), cohort=3).run(4)]
    for done, record in enumerate(records, start=1):
        assert record.epsilon == epsilon([Made(0.5, 1.3, done)], 1e-4)
    assert [record.epsilon for _, record in federation(None).run(2)] == [None, None]


def test_a_round_without_privacy_leaves_no_epsilon_for_ever() -> None:
    bare = last(federation(None), 2)
    assert bare.spent is None
    assert [record.epsilon for _, record in federation().run(2, bare)] == [None, None]


def test_rounds_with_other_noise_are_counted_with_theirs() -> None:
    first = last(federation(DP(1.0, 2.0)), 2)
    (state, record), *_ = federation(DP(1.0, 1.0)).run(1, first)
    assert state.spent == (Made(1.0, 2.0, 2), Made(1.0, 1.0, 1))
    assert record.epsilon == epsilon(state.spent, 1e-5)


def test_noise_of_the_system_gives_another_model_every_time_and_counts_a_resumption() -> None:
    made = [federation(DP(1.0, 1.0, noise_seed="system")) for _ in range(2)]
    one, other = (last(fed, 2) for fed in made)
    assert one.sha256() != other.sha256()
    (state, _), *_ = made[0].run(1, one)
    assert state.spent == (Made(1.0, 1.0, 4),)  # the round after a checkpoint may have been made before it was lost


def test_the_same_seed_gives_the_same_bits_in_every_engine() -> None:
    kept = [last(federation(cohort=3, engine=engine), 3).sha256() for engine in ("loop", "processes", "loop")]
    assert len({*kept}) == 1


@pytest.mark.parametrize(
    "method",
    [lamina.FedProx(), lamina.FedAdam(), lamina.SSFL(0.5, score="random"), lamina.MagnitudePruning(0.5, end=2, every=1),
     lamina.RandomMask(0.5), lamina.FedDyn(), lamina.Personal(layers=["4.weight", "4.bias"])],
    ids=repr,
)  # fmt: skip
def test_methods_that_only_see_the_noised_mean_are_covered(method: lamina.Method[Any, Any]) -> None:
    records = list(federation(method=method, cohort=3).run(3))
    assert records[-1][1].epsilon is not None


def test_nothing_outside_a_mask_is_noised() -> None:
    state = last(federation(method=lamina.RandomMask(0.3)), 2)
    mask = state.server.mask
    assert mask
    assert all(not bool(state.params[name][~m].any()) for name, m in mask.items())


# ---- what it refuses


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ({"method": lamina.FedLAMA(phi=2)}, "stays together for 2 rounds"),
        ({"method": lamina.FedLAMA(phi=1)}, "which layers wait"),
        ({"method": lamina.FedLUAR()}, "which layers are sent"),
        ({"method": lamina.SSFL(0.5)}, "before the first round"),
        ({"method": lamina.FedDST(0.5)}, "vote"),
        ({"method": lamina.LIPS(rounds=5)}, "prunes by its own"),
        ({"method": lamina.Scaffold()}, "control beside the update"),
        ({"method": lamina.FedNova()}, "norm beside the update"),
        ({"method": lamina.ErrorFeedback()}, "owed and sent later"),
        ({"method": lamina.EF21()}, "owed and sent later"),
        ({"method": lamina.FLARE()}, "owed and sent later"),
        ({"method": lamina.LocalOnly()}, "shares nothing"),
        ({"method": lamina.Chain(lamina.FedProx(), lamina.FedLUAR())}, "which layers are sent"),
        ({"weights": "examples"}, "how much data"),
        ({"availability": "random:0.5"}, "who is there"),
        ({"faults": {"min_replies": 2}}, "no round may fail"),
        ({"faults": {"norm": "median"}}, "no round may fail"),
        ({"aggregate": Median()}, "sum of clipped updates"),
        ({"uplink": lamina.wire.TopK(0.1)}, "which entries"),
        ({"privacy": DP(1.0, 1.0, 0.2)}, "given away entirely"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_the_guarantee_would_not_cover_is_refused(what: dict[str, Any], why: str) -> None:
    with pytest.raises(lamina.ConfigError, match=why) as caught:
        federation(**what)
    assert caught.value.code == "E122"


def test_buffers_that_are_averaged_are_refused() -> None:
    def normed() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    with pytest.raises(lamina.ConfigError, match="buffers='average'"):
        Federation(normed, data(), weights="uniform", privacy=DP(1.0, 1.0))
    list(Federation(normed, data(), weights="uniform", buffers="skip", privacy=DP(1.0, 1.0)).run(1))


@pytest.mark.parametrize(
    "bad",
    [{"clip": 0}, {"clip": float("inf")}, {"noise": 0.0}, {"noise": True}, {"delta": 0}, {"delta": 1},
     {"noise_seed": "os"}],
)  # fmt: skip
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(lamina.ConfigError, match=next(iter(bad))):
        DP(**{"clip": 1.0, "noise": 1.0, **bad})


def test_a_deadline_is_no_obstacle() -> None:
    assert federation(faults={"reply_deadline_s": 3.0}).faults == Faults(3.0)


# ---- on disk, and from a config


def test_a_resumed_run_has_the_bits_and_the_epsilon_of_one_that_went_on(tmp_path: Path) -> None:
    whole = fit(federation(cohort=3), 4, tmp_path / "whole", progress=False)
    fit(federation(cohort=3), 2, tmp_path / "half", progress=False)
    again = resume(tmp_path / "half", 4, fed=federation(cohort=3), progress=False)
    assert again.info["final_sha256"] == whole.info["final_sha256"]
    assert [row.epsilon for row in again.records] == [row.epsilon for row in whole.records]
    assert again.records[-1].epsilon == epsilon([Made(0.5, 1.0, 4)], 1e-5)
    said = whole.summary()
    assert f"epsilon {whole.records[-1].epsilon:.4g} at delta 1e-05" in said
    assert "as long as the seed stays secret" in said
    facts = {"clip": 1.0, "noise": 1.0, "delta": 1e-5, "sampling": 0.5, "noise_seed": "run"}
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["privacy"] == facts


def test_a_run_with_noise_of_the_system_keeps_every_round_and_no_key(tmp_path: Path) -> None:
    fed = federation(DP(1.0, 1.0, noise_seed="system"))
    run = fit(fed, 2, tmp_path / "run", progress=False)
    assert fed.privacy is not None
    key = fed.privacy._key
    assert run.info["options"]["checkpoint_every"] == 1
    for path in tmp_path.rglob("*"):
        if path.is_file():
            blob = path.read_bytes()
            assert key not in blob
            assert key.hex().encode() not in blob
    assert "only models are published" in run.summary()


def test_a_config_says_it() -> None:
    base = {"model": "mlp", "data": "digits", "weights": "uniform"}
    config = load_tables(("here", {**base, "privacy": {"clip": 0.5, "noise": 1.1}}))
    assert lamina.config.privacy_of(config) == DP(0.5, 1.1)  # type: ignore[attr-defined]
    assert lamina.config.privacy_of(load_tables(("here", base))) is None  # type: ignore[attr-defined]
    with pytest.raises(lamina.ConfigError, match=r"privacy\.noise is missing"):
        load_tables(("here", {**base, "privacy": {"clip": 0.5}}))


# ---- elsewhere


def test_over_a_network_it_is_the_same_run() -> None:
    """The server clips what it has decoded: the bits are those of a simulation, rounds in which nobody is drawn too."""

    def make(examples: ClientData, **more: Any) -> Federation:
        local = LocalSGD(lr=0.1, batch_size=8)
        kept = {"local": local, "weights": "uniform", "engine": "loop", "cohort": 2, **more}
        return Federation(model, examples, privacy=USUAL, **kept)

    held = data()
    fed, _ = connected(make, ((0, 3), (1, 2, 4, 5)), data=held)
    for (a, mine), (b, theirs) in zip(make(held).run(8), fed.run(8), strict=True):
        assert a.sha256() == b.sha256()
        assert mine.epsilon == theirs.epsilon
        assert mine.cohort == theirs.cohort
    assert () in {record.cohort for _, record in make(held).run(8)}


def test_messages_of_several_clients_as_one_are_refused() -> None:
    def make(examples: ClientData, **more: Any) -> Federation:
        return Federation(model, examples, weights="uniform", privacy=USUAL, **more)

    with pytest.raises(lamina.ConfigError, match="clipped one by one") as caught:
        connected(make, ((0, 3), (1, 2, 4, 5)), data=data(), together=True)
    assert caught.value.code == "E118"
