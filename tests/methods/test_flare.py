"""FLARE by hand on six weights with a constant gradient, its limits, its telescoping law, and a plain loop."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from from_scratch.flare import flare
from parity import DTYPES, PAIRS, TOLERANCE, assert_equal_rounds, examples, from_scratch, small_mlp, with_lamina
from torch import nn

import cases
import lamina
from lamina import FLARE, ErrorFeedback, FedAvg, LocalSGD, Method, wire
from lamina.methods.flare import Client
from lamina.tree import add, zeros_like

# ---- by hand

START = [0.5, -0.4, 0.3, -0.2, 0.1, 0.0]
SLOPE = [1.0, -0.8, 0.5, 0.3, -0.2, 0.1]


def run(rounds, method, steps=1, uplink=None):
    """(weights, residual) after every round of one client with lr 0.1 and a loss whose gradient is always SLOPE. Of six
    entries the uplink sends those strictly above the second largest: one."""
    model = nn.Linear(6, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([START], dtype=torch.float64))
    fed = lamina.Federation(
        model,
        lamina.ClientData.from_clients({"a": (torch.tensor([SLOPE], dtype=torch.float64), torch.zeros(1, 1).double())}),
        method=method,
        uplink=uplink or wire.TopK(0.05, keep="released"),
        local=LocalSGD(lr=0.1, batch_size=None, epochs=steps),
        loss=lambda output, target: output.mean(),
        engine="loop",
    )
    for state, _ in fed.run(rounds):
        yield state.params["weight"].reshape(-1).tolist(), residual_of(state, 0)["weight"].reshape(-1).tolist()


def residual_of(state, client):
    return state.clients.get(client).row.method.residual


def close(numbers):
    return pytest.approx(numbers, rel=1e-12, abs=1e-15)


def test_three_rounds_by_hand():
    """tau 1/2, decay 1.05, the upper half of the residual pulled, lr 0.1, one local step of the gradient SLOPE.

    Round 0, A = 0: nothing pulled. U = (-.1, .08, -.05, -.03, .02, -.01); the first is sent.
    Round 1, |A| = (0, .08, .05, .03, .02, .01), sorted 0 .01 .02 .03 .05 .08; index round(.5 * 5) = 2 (Python rounds
      2.5 to 2), so above .02: entries 1, 2 and 3. p = .1 * .5 / 1.05^2 = .0453515 in the direction of A:
      D = (-.1, .08 + p, -.05 - p, -.03 - p, .02, -.01), U = A + D = (-.1, .16 + p, -.1 - p, -.06 - p, .04, -.02).
      Entry 1 is sent: w_1 = -.4 + .16 + p.
    Round 2, |A| = (.1, 0, .1 + p, .06 + p, .04, .02), sorted 0 .02 .04 .1 .06+p .1+p: above .04: entries 0, 2 and 3.
      q = .1 * .5 / 1.05^3 = .0431919. U = (-.2 - q, .08, -.15 - p - q, -.09 - p - q, .06, -.03).
      .2 + q = .2431919 is more than .15 + p + q = .2385434, so entry 0 is sent: w_0 = .4 - .2 - q.
    """
    p, q = 0.05 / 1.05**2, 0.05 / 1.05**3
    rounds = list(run(3, FLARE()))
    assert rounds[0] == (close([0.4, -0.4, 0.3, -0.2, 0.1, 0]), close([0, 0.08, -0.05, -0.03, 0.02, -0.01]))
    assert rounds[1] == (
        close([0.4, -0.24 + p, 0.3, -0.2, 0.1, 0]),
        close([-0.1, 0, -0.1 - p, -0.06 - p, 0.04, -0.02]),
    )
    assert rounds[2] == (
        close([0.2 - q, -0.24 + p, 0.3, -0.2, 0.1, 0]),
        close([0, 0.08, -0.15 - p - q, -0.09 - p - q, 0.06, -0.03]),
    )


def test_a_weight_that_is_past_its_residual_is_pulled_back():
    """Two local steps of lr 0.1, all but the least of the residual pulled (percentile 0), tau 1/2 and decay 1.

    Round 0: U = -.2 * SLOPE = (-.2, .16, -.1, -.06, .04, -.02), the first is sent: A = (0, .16, -.1, -.06, .04, -.02).
    Round 1, step 0: delta = (-.1, .08 + .05, -.05 - .05, -.03 - .05, .02 + .05, -.01 - .05); entry 0 has the least
      residual. Step 1: delta - A = (*, -.03, 0, -.02, .03, -.04), so entry 1 is pulled on, the others back (entry
      2 stands at A to rounding, and goes either way).
      delta = (-.2, .26, *, -.06, .04, -.02), U = delta + A = (-.2, .42, *, -.12, .08, -.04); entry 1 is sent.
    With steps=1 the second step is not pulled: entry 3 ends at -.08 - .03 - .06 = -.17.
    """
    _, (weights, residual) = run(2, FLARE(decay=1, percentile=0, steps=2), steps=2)
    assert weights == close([0.3, 0.02, 0.3, -0.2, 0.1, 0])
    assert residual[:2] == close([-0.2, 0])
    assert residual[3:] == close([-0.12, 0.08, -0.04])
    _, (_, once) = run(2, FLARE(decay=1, percentile=0, steps=1), steps=2)
    assert once[3] == close(-0.17)


def test_the_pull_decays_by_the_round():
    """One round of five at decay 2: entry 3, always pulled and never sent, gains .05 / 2^(t+1) in rounds 1 to 4."""
    method = FLARE(decay=2, percentile=0)
    *_, (_, residual) = run(5, method)
    assert residual[3] == close(-0.03 * 5 - 0.05 * (1 / 4 + 1 / 8 + 1 / 16 + 1 / 32))


def test_after_very_many_rounds_the_pull_is_gone():
    """1.05^15001 is beyond any float: tau_t is 0 there, and the gradient as it was."""
    method, w = FLARE(), {"w": torch.tensor([1.0, 2.0])}
    client = Client({"w": torch.tensor([3.0, -4.0])}, {"w": torch.tensor(3.5)}, {})
    plan = lamina.Plan(round=15_000, seed=0, params=w, buffers={}, upload=frozenset("w"), lr=0.1)
    assert method.correct(client, plan, torch.tensor(0), w, w)["w"].tolist() == [1, 2]


def test_a_residual_too_small_to_be_added_to_the_weight_still_pulls():
    """In float32, .05 + 1e-9 is .05 again, so sign(w - (w0 + A)) would be 0; w - w0 against A is not."""
    w, a = torch.full((2,), 0.05), torch.tensor([1e-9, 0.0])
    assert torch.equal(w + a, w)
    plan = lamina.Plan(round=0, seed=0, params={"w": w}, buffers={}, upload=frozenset("w"), lr=0.1)
    client = Client({"w": a}, {"w": torch.tensor(0.0)}, {})
    pulled = FLARE(tau=1, decay=1).correct(client, plan, torch.tensor(0), {"w": w}, {"w": torch.zeros(2)})
    assert pulled["w"].tolist() == [-1, 0]


def settled(method, residual, kept=None):
    """Threshold per tensor, for these residuals."""
    client = method.init_client(residual)._replace(kept=kept or {})
    message = {"update": residual}
    return method.settle(client, message, {"update": zeros_like(residual)}).threshold


@pytest.mark.parametrize(
    ("percentile", "pulled"), [(0, [1, 2, 3, 4, 5]), (10, [1, 2, 3, 4, 5]), (11, [2, 3, 4, 5]), (90, [5]), (100, [])]
)
def test_the_mask_is_strictly_above_the_nearest_entry(percentile, pulled):
    """Magnitudes 0 to 5, n - 1 = 5: indices round(0), round(.5) = 0, round(.55) = 1, round(4.5) = 4 and 5."""
    a = {"w": torch.tensor([0.0, -1.0, 2.0, 3.0, -4.0, 5.0])}
    threshold = settled(FLARE(percentile=percentile), a)["w"]
    assert a["w"].abs()[a["w"].abs() > threshold].tolist() == pulled


def test_equal_magnitudes_are_above_none_of_themselves():
    assert settled(FLARE(percentile=20), {"w": torch.full((2, 3), -2.0), "b": torch.tensor([7.0])}) == {"w": 2, "b": 7}


def test_a_mask_is_of_its_tensor_alone():
    torch.manual_seed(0)
    w, b = torch.randn(4, 5), torch.randn(7)
    alone = settled(FLARE(percentile=30), {"w": w})["w"]
    assert settled(FLARE(percentile=30), {"b": 1e6 * b, "w": w})["w"] == alone
    assert settled(FLARE(percentile=30), {"w": w.flatten()[torch.randperm(20)]})["w"] == alone


@pytest.mark.parametrize("percentile", [0, 30, 50, 77.7, 100])
def test_under_a_mask_the_percentile_is_of_kept_entries(percentile):
    torch.manual_seed(1)
    mask = torch.rand(6, 7) < 0.4
    a = torch.randn(6, 7) * mask
    kept = a[mask].abs().sort().values
    expected = kept[round(percentile / 100 * (len(kept) - 1))]
    assert settled(FLARE(percentile=percentile), {"w": a}, {"w": mask.sum()})["w"] == expected
    assert settled(FLARE(), {"w": torch.zeros(2, 2)}, {"w": torch.tensor(0)})["w"] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_thresholds_are_entries_of_the_residual(dtype):
    a = torch.randn(50, generator=torch.Generator().manual_seed(2)).to(dtype)
    threshold = settled(FLARE(), {"w": a})["w"]
    assert threshold.dtype == dtype
    assert (a.abs() > threshold).sum() == 25  # index round(24.5) = 24 of 50
    assert (a.abs() == threshold).any()


def test_a_layer_that_was_not_asked_for_keeps_residual_and_threshold():
    method = FLARE(percentile=0)
    before = Client(
        {"a": torch.tensor([5.0, 1.0]), "b": torch.tensor([7.0])},
        {"a": torch.tensor(1.0), "b": torch.tensor(7.0)},
        {},
    )
    plan = lamina.Plan(round=0, seed=0, params=before.residual, buffers={}, upload=frozenset("a"), lr=0.1)
    sent, client = method.report(before, plan, None, {"update": {"a": torch.tensor([1.0, 1.0])}})
    assert sent["update"]["a"].tolist() == [6, 2]
    after = method.settle(client, sent, {"update": {"a": torch.tensor([6.0, 0.0])}})
    assert {name: x.tolist() for name, x in after.residual.items()} == {"a": [0, 2], "b": [7]}
    assert {name: x.item() for name, x in after.threshold.items()} == {"a": 0, "b": 7}


def test_a_layer_that_waits_is_pulled_but_accumulates_nothing():
    """Between two aggregations its residual stays as it is, and goes on changing how it trains."""
    chain = lamina.Chain(FLARE(), lamina.FedLAMA(phi=4))
    ours = with_lamina(chain, small_mlp(torch.float64), examples(torch.float64), uplink=wire.TopK(0.1), momentum=0.9)
    waited = 0
    for (before, _), (after, record) in pairwise(ours):
        plan = lamina.Plan(round=1, seed=0, params=before.params, buffers={}, upload=frozenset(), lr=0.1)
        for name in (name for name, row in record.layers.items() if not row.uploaded):
            for c in record.cohort:
                (old, _), (new, _) = (s.clients.get(c).row.method for s in (before, after))
                assert torch.equal(old.residual[name], new.residual[name])
                assert torch.equal(old.threshold[name], new.threshold[name])
                pull = FLARE().correct(old, plan, torch.tensor(0), before.params, zeros_like(before.params))
                assert pull[name].any()
                waited += 1
    assert waited


def test_what_a_mask_that_has_moved_leaves_behind_is_neither_pulled_nor_kept():
    """Residual 3 at an entry that is pruned now: no pull there, and it is gone afterwards."""
    method, mask = FLARE(tau=1, decay=1, percentile=0), {"w": torch.tensor([True, False, True])}
    client = Client({"w": torch.tensor([1.0, 3.0, 2.0])}, {"w": torch.tensor(0.5)}, {})
    w = {"w": torch.zeros(3)}
    plan = lamina.Plan(round=0, seed=0, params=w, buffers={}, upload=frozenset("w"), lr=0.1, mask=mask)
    assert method.correct(client, plan, torch.tensor(0), w, w)["w"].tolist() == [-1, 0, -1]
    sent, client = method.report(client, plan, None, {"update": w})
    assert sent["update"]["w"].tolist() == [1, 0, 2]
    client = method.settle(client, sent, {"update": {"w": torch.tensor([0.0, 0.0, 2.0])}})
    assert client.residual["w"].tolist() == [1, 0, 0]
    assert client.threshold["w"] == 0  # the lesser of the two kept ones, 0 and 1


# ---- limits

TOPK = {"exact": wire.TopK(0.2), "released": wire.TopK(0.2, keep="released"), "sign": wire.Dense("sign")}
MANY = LocalSGD(lr=0.1, momentum=0.9, weight_decay=0.01, clip=1.0, batch_size=8, epochs=2)


def bits(method, model="odd", rounds=4, **options):
    """Of the model and the residuals, after every round."""
    states = cases.states(cases.federation(method, model, local=MANY, **options), rounds)
    return [
        (cases.bits(s.params), cases.bits(s.buffers), {c: cases.bits(residual_of(s, c)) for c in s.clients})
        for s in states
    ]


@pytest.mark.parametrize("uplink", TOPK)
@pytest.mark.parametrize("model", ["odd", "double"])
def test_without_a_pull_it_is_error_feedback_bit_for_bit(uplink, model):
    expected = bits(ErrorFeedback(), model, uplink=TOPK[uplink])
    assert bits(FLARE(tau=0.0, steps=3), model, uplink=TOPK[uplink]) == expected
    assert bits(FLARE(percentile=100), model, uplink=TOPK[uplink]) == expected  # nothing is above the largest
    pulled = bits(FLARE(), model, uplink=TOPK[uplink])
    assert pulled[0] == expected[0]  # round 0: nothing is left over yet
    assert pulled[1:] != expected[1:]


@pytest.mark.parametrize("uplink", [wire.Dense(), wire.Dense("lossless"), wire.TopK(1.0)], ids=repr)
def test_where_everything_arrives_it_is_fedavg_for_any_pull(uplink):
    for method in (FLARE(), FLARE(tau=100.0, decay=1, percentile=0, steps=9)):
        ours = cases.states(cases.federation(method, local=MANY, uplink=uplink), 3)
        plain = cases.states(cases.federation(FedAvg(), local=MANY, uplink=uplink), 3)
        assert [s.sha256() for s in ours] == [s.sha256() for s in plain]
        assert not any(x.any() for x in residual_of(ours[-1], next(iter(ours[-1].clients))).values())


def test_with_one_local_step_a_proximal_term_does_nothing_and_the_pull_does():
    """FedProx's gradient is 0 at w = w0; the pull's is not."""
    one = {"local": LocalSGD(lr=0.1, batch_size=None), "uplink": wire.TopK(0.2)}
    plain, proximal, pulled = (
        cases.states(cases.federation(method, **one), 3)[-1].sha256()
        for method in (ErrorFeedback(), lamina.Chain(lamina.FedProx(mu=5.0), ErrorFeedback()), FLARE())
    )
    assert plain == proximal != pulled


@pytest.mark.parametrize(("keep", "count"), [("exact", lambda k: max(1, k)), ("released", lambda k: k + 1)])
@pytest.mark.parametrize("density", [0.0001, 0.1, 0.35])
def test_so_many_values_are_sent_of_every_tensor(keep, count, density):
    """round(density * n), and one more in the released code, so that never nothing is sent; of n at most n. The
    model is linear: a ReLU that is dead for a client leaves ties at 0, which the released code does not send."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).double()
    for state, record in with_lamina(FLARE(), model, examples(torch.float64), uplink=wire.TopK(density, keep=keep)):
        for name, row in record.layers.items():
            n = state.params[name].numel()
            assert row.density * n == pytest.approx(min(n, count(round(density * n))), rel=1e-12), name


# ---- telescoping


class Sums(NamedTuple):
    updates: dict
    received: dict


class Bookkeeper(Method):
    """Before FLARE in a chain: adds up a client's updates as trained, and what the server had of it."""

    def init_client(self, params):
        return Sums(zeros_like(params), zeros_like(params))

    def report(self, client, plan, work, message):
        return message, client._replace(updates=client.updates | add(message["update"], client.updates))

    def settle(self, client, sent, received):
        return client._replace(received=client.received | add(received["update"], client.received))


UPLINKS = {
    "top-k exact": wire.TopK(0.1),
    "top-k released": wire.TopK(0.1, keep="released"),
    "int8": wire.Dense("int8"),
    "sign": wire.Dense("sign"),
}


@pytest.mark.parametrize("cohort", ["all", 3])
@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("method", [FLARE(steps=2), ErrorFeedback()], ids=["flare", "errorfeedback"])
def test_what_arrived_and_what_is_left_are_all_updates_of_a_client(method, uplink, cohort):
    """In float64: the sum of what was received and the residual is the sum of the updates, to rounding."""
    chain = lamina.Chain(Bookkeeper(), method)
    ours = with_lamina(chain, small_mlp(torch.float64), examples(torch.float64), uplink=UPLINKS[uplink], cohort=cohort)
    state = ours[-1][0]
    seen = [c for c in state.clients if state.clients.get(c).row is not None]
    assert len(seen) > 3
    for c in seen:
        sums, client = state.clients.get(c).row.method
        for name, whole in sums.updates.items():
            assert client.residual[name].any()
            both = sums.received[name] + client.residual[name]
            torch.testing.assert_close(both, whole, rtol=1e-14, atol=1e-14 * float(whole.abs().max()))


@pytest.mark.parametrize("uplink", UPLINKS)
def test_the_model_and_the_mean_residual_are_the_sum_of_mean_updates(uplink):
    """With everybody in every round: w_T + mean A_T = w_0 + the sum of all mean updates."""
    chain = lamina.Chain(Bookkeeper(), FLARE(steps=2))
    model, clients = small_mlp(torch.float64), examples(torch.float64)
    state = with_lamina(chain, model, clients, uplink=UPLINKS[uplink], weights="uniform")[-1][0]
    rows = [state.clients.get(c).row.method for c in range(len(clients))]
    for name, w0 in model.named_parameters():
        mean_residual = sum(client.residual[name] for _, client in rows) / len(rows)
        mean_update = sum(sums.updates[name] for sums, _ in rows) / len(rows)
        torch.testing.assert_close(
            state.params[name] + mean_residual, w0.detach() + mean_update, rtol=1e-13, atol=1e-13
        )


# ---- a plain loop


def compare(model, clients, dtype, density, keep, steps, percentile=50.0, **settings):
    method = FLARE(tau=0.3, decay=1.2, percentile=percentile, steps=steps)
    ours = with_lamina(method, model, clients, uplink=wire.TopK(density, keep=keep), **settings)
    mine = {"tau": 0.3, "decay": 1.2, "percentile": percentile, "pulled_steps": steps}
    theirs = from_scratch(flare, model, clients, density=density, keep=keep, **mine, **settings)
    assert_equal_rounds(ours, [r.weights for r in theirs], dtype)
    pulled = 0
    for t, ((state, record), expected) in enumerate(zip(ours, theirs, strict=True)):
        before = ours[t - 1][0].clients if t else None
        for i in record.cohort:
            for name, a in residual_of(state, i).items():
                torch.testing.assert_close(a, expected.residual[i][name], **TOLERANCE[dtype])
            row = before.get(i).row if before is not None else None
            for name, mask in expected.pulled[i].items():
                own = row and row.method.residual[name].abs() > row.method.threshold[name]
                assert torch.equal(torch.zeros_like(mask) if own is None else own, mask), (t, i, name)
                pulled += int(mask.sum())
        for c in record.clients:
            assert c.refused is None
    assert pulled
    return ours


@pytest.mark.parametrize("density", [0.1, pytest.param(0.35, marks=pytest.mark.slow)])
@pytest.mark.parametrize("keep", ["exact", "released"])
@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), PAIRS)
def test_it_agrees_with_a_plain_loop(dtype, weights, momentum, cohort, keep, density):
    """Models, residuals and masks, over 10 rounds; all local steps are pulled."""
    compare(small_mlp(dtype), examples(dtype), dtype, density, keep, 100,
            weights=weights, momentum=momentum, cohort=cohort)  # fmt: skip


@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("percentile", [0, 25.0, 80])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_agrees_with_a_plain_loop_when_some_steps_are_pulled(dtype, percentile, steps):
    """Two epochs: clients take 2 to 6 steps."""
    compare(small_mlp(dtype), examples(dtype), dtype, 0.1, "exact", steps, percentile,
            momentum=0.9, cohort=3, epochs=2)  # fmt: skip


# ---- bad input


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("tau", -0.1, "a number >= 0"),
        ("tau", float("nan"), "a number >= 0"),
        ("tau", float("inf"), "a number >= 0"),
        ("decay", 0.99, "a number >= 1; below 1 the pull would grow from round to round"),
        ("decay", 0, "a number >= 1"),
        ("percentile", -1, "0 <= percentile <= 100"),
        ("percentile", 100.1, "0 <= percentile <= 100"),
        ("percentile", float("nan"), "0 <= percentile <= 100"),
        ("steps", 0, "a whole number >= 1; tau=0 pulls in no step"),
        ("steps", 1.5, "a whole number >= 1"),
        ("steps", True, "a whole number >= 1"),
    ],
)
def test_settings_out_of_range_are_refused(argument, value, expected):
    with pytest.raises(lamina.ConfigError) as refused:
        FLARE(**{argument: value})
    assert refused.value.code == "E101"
    assert refused.value.message.startswith(f"{argument}={value}: expected {expected}")


@pytest.mark.parametrize("other", [ErrorFeedback(), FLARE(tau=1.0), lamina.EF21(), lamina.DGC()], ids=repr)
def test_another_that_sends_again_what_was_lost_is_refused(other):
    for pair in ((FLARE(), other), (other, FLARE())):
        with pytest.raises(lamina.ConfigError, match="both would send again what the uplink lost") as refused:
            lamina.Chain(*pair)
        assert refused.value.code == "E115"


@pytest.mark.parametrize("flare_first", [False, True])
def test_under_a_mask_the_percentile_is_that_of_the_kept_entries(flare_first):
    ssfl, flare = lamina.SSFL(density=0.4), FLARE(steps=2, percentile=37)
    chain = lamina.Chain(flare, ssfl) if flare_first else lamina.Chain(ssfl, flare)
    fed = cases.federation(chain, "double", uplink=wire.TopK(0.2))
    for state, record in fed.run(4):
        mask = state.server[1 if flare_first else 0].mask
        for client in record.cohort:
            own = state.clients.get(client).row.method[0 if flare_first else 1]
            for name, a in own.residual.items():
                kept = a[mask[name]] if name in mask else a.flatten()
                magnitudes = sorted(kept.abs().tolist())
                assert own.threshold[name] == magnitudes[round(0.37 * (len(magnitudes) - 1))]
                assert name not in mask or not a[~mask[name]].any()
