"""Secure sums: the sharing, the ring, the protocol with its drop-outs, and federations whose server sees sums alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lamina
from lamina import ClientData, Federation, LocalSGD, SecureSum
from lamina.config import load_tables, secure_of
from lamina.privacy import fixed, shamir
from lamina.robust import Median

pytest.importorskip("cryptography")

from lamina.privacy import keys
from lamina.privacy.protocol import Client, Server, plain_sum, read_table, table

SECRET = bytes(range(32))


def chi_square(counts: np.ndarray[Any, Any]) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


# 255 degrees of freedom: 340 is exceeded once in 3,000 times by bytes that are uniform, 400 once in a hundred million
UNIFORM = 400.0


def byte_counts(blob: bytes) -> np.ndarray[Any, Any]:
    return np.bincount(np.frombuffer(blob, np.uint8), minlength=256)


# ---- sharing


def test_the_field_is_one() -> None:
    """2^256 + 297 is prime: no witness among the first bases, by Miller and Rabin."""
    p = shamir.PRIME
    d, r = p - 1, 0
    while d % 2 == 0:
        d, r = d // 2, r + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43):
        x = pow(base, d, p)
        assert x in (1, p - 1) or any(pow(x, 2**k, p) == p - 1 for k in range(1, r))


@pytest.mark.parametrize(("n", "t"), [(1, 1), (3, 2), (5, 3), (5, 5), (20, 12)])
def test_any_t_shares_are_the_secret(n: int, t: int) -> None:
    shares = shamir.split(SECRET, range(1, n + 1), t)
    assert {len(share) for share in shares.values()} == {33}
    for start in range(n):
        some = {1 + (start + k) % n: shares[1 + (start + k) % n] for k in range(t)}
        assert shamir.combine(some) == SECRET
    assert shamir.combine(shares) == SECRET


def test_fewer_shares_fit_every_secret() -> None:
    """For t - 1 shares and any other secret there is a polynomial: here it is, so they say nothing about which."""
    t = 4
    shares = shamir.split(SECRET, range(1, 8), t)
    few = {x: shares[x] for x in (2, 5, 7)}
    for other in (bytes(32), bytes([255] * 32), bytes(reversed(SECRET))):
        at_six = _through({0: int.from_bytes(other, "big")} | {x: int.from_bytes(y, "big") for x, y in few.items()}, 6)
        assert shamir.combine({**few, 6: at_six.to_bytes(33, "big")}) == other


def _through(points: dict[int, int], x: int) -> int:
    """The value at x of the polynomial through the points."""
    made = 0
    for i, y in points.items():
        factor = y
        for j in points:
            if j != i:
                factor = factor * (x - j) * pow(i - j, -1, shamir.PRIME) % shamir.PRIME
        made = (made + factor) % shamir.PRIME
    return made


def test_the_bytes_of_a_share_are_uniform_whatever_the_secret() -> None:
    for secret in (bytes(32), SECRET):
        blob = b"".join(
            shamir.split(secret, [1, 2, 3], 2)[3][1:] for _ in range(1500)
        )  # byte 0 is 0 but for one in 2^248
        assert chi_square(byte_counts(blob)) < UNIFORM


def test_too_few_or_damaged_shares_are_no_secret() -> None:
    odd = 0
    for _ in range(20):
        shares = shamir.split(SECRET, [1, 2, 3], 3)
        try:
            odd += shamir.combine({1: shares[1], 2: shares[2]}) == SECRET
        except ValueError:
            continue
    assert odd == 0
    with pytest.raises(ValueError, match="no element"):
        shamir.combine({1: b"\xff" * 33})
    for bad in ((b"short", [1, 2], 2), (SECRET, [1, 1], 2), (SECRET, [0, 1], 2), (SECRET, [1, 2], 3)):
        with pytest.raises(ValueError, match=r"secret of|threshold"):
            shamir.split(*bad)


# ---- the ring


def test_numbers_are_whole_steps_of_a_power_of_two() -> None:
    """bits=16, 3 clients, limit 2: 2^15 - 1 = 32767, a third of it less 1 is 10921, 10921 / 2 = 5460: f = 12."""
    assert fixed.exponent(16, 3, 2.0) == 12
    x = torch.tensor([2.0, -2.0, 0.0, 2**-12, -0.75 * 2**-12])
    made = fixed.to_ring(x, 1.0, 12, 16)
    assert made.tolist() == [8192, 65536 - 8192, 0, 1, 65535]
    assert fixed.signed(made, 16).tolist() == [8192, -8192, 0, 1, -1]
    assert fixed.from_ring(made, 12, 16).tolist() == [2.0, -2.0, 0.0, 2**-12, -(2**-12)]
    assert fixed.to_ring(torch.tensor([1.0]), 0.5, 12, 16).tolist() == [2048]


@pytest.mark.parametrize("bits", [8, 16, 24, 32, 33, 48, 62, 63])
@pytest.mark.parametrize("clients", [1, 3, 7, 100, 1000])
def test_no_sum_leaves_the_ring(bits: int, clients: int) -> None:
    """Everybody at the limit, with either sign: the sum of the elements is the element of the sum."""
    limit = 0.3
    if clients * 128 > 2 ** (bits - 2):
        with pytest.raises(lamina.ConfigError, match="fewer than 7 bits"):
            fixed.exponent(bits, clients, limit)
        return
    f = fixed.exponent(bits, clients, limit)
    for sign in (1.0, -1.0):
        one = fixed.to_ring(torch.tensor([sign * limit], dtype=torch.float64), 1.0, f, bits)
        total = (one * np.uint64(clients)) & fixed.low(bits)
        whole = round(sign * limit * 2**f) * clients
        assert fixed.signed(total, bits).tolist() == [whole]
        assert abs(whole) < 2 ** (bits - 1)


def test_who_is_beyond_the_limit_does_not_fit() -> None:
    assert fixed.fits(torch.tensor([1.0, -1.0]), 1.0)
    assert fixed.fits(torch.empty(0), 1.0)
    for odd in (1.0001, float("nan"), float("-inf")):
        assert not fixed.fits(torch.tensor([0.0, odd]), 1.0)


# ---- the primitives


def test_both_ends_agree_and_nobody_else() -> None:
    one, other, third = keys.Pair(), keys.Pair(), keys.Pair()
    agreed = one.agreed(other.public, b"mask")
    assert agreed == other.agreed(one.public, b"mask")
    assert agreed != one.agreed(other.public, b"share")
    assert agreed != third.agreed(other.public, b"mask")
    assert keys.Pair(one.private).public == one.public


def test_masks_are_uniform_and_differ_by_purpose() -> None:
    for bits in (8, 32, 62):
        made = keys.masks(SECRET, 0, 40_000, bits)
        assert int(made.max()) < 2**bits
        for byte in range(bits // 8):
            counts = np.bincount(((made >> np.uint64(8 * byte)) & np.uint64(255)).astype(np.int64), minlength=256)
            assert chi_square(counts) < UNIFORM
    assert not np.array_equal(keys.masks(SECRET, 0, 9, 32), keys.masks(SECRET, 1, 9, 32))
    assert not np.array_equal(keys.masks(SECRET, 1, 9, 32), keys.masks(SECRET, (1 << 32) + 1, 9, 32))
    assert np.array_equal(keys.masks(SECRET, 5, 1000, 63)[:7], keys.masks(SECRET, 5, 7, 63))


def test_a_sealed_text_opens_as_what_it_was_only() -> None:
    sealed = keys.seal(SECRET, b"text", b"1 to 2")
    assert keys.unseal(SECRET, sealed, b"1 to 2") == b"text"
    for key, blob, about in (
        (bytes(32), sealed, b"1 to 2"),
        (SECRET, sealed[:-1] + b"x", b"1 to 2"),
        (SECRET, sealed, b"2 to 1"),
    ):
        with pytest.raises(ValueError, match="not what was sealed"):
            keys.unseal(key, blob, about)


def test_tables_are_read_as_they_were_written_or_not_at_all() -> None:
    rows = {3: b"abc", 1: b"xyz", 4_000_000_000: b"..."}
    assert read_table(table(rows), 3) == rows
    for odd in (table(rows)[:-1], table({1: b"abc"}) + table({1: b"abc"})):
        with pytest.raises(ValueError, match="a table"):
            read_table(odd, 3)


# ---- the protocol

WIDTHS = {"update": 32, "moments": 63}


def vectors(n: int, seed: int = 0) -> dict[int, dict[str, fixed.Ring]]:
    source = np.random.default_rng(seed)
    return {
        10 + c: {
            "update": source.integers(0, 2**32, 50, np.uint64),
            "moments": source.integers(0, 2**63, 3, np.uint64),
        }
        for c in range(n)
    }


class Run:
    """One sum, with clients that are gone at each step. What the server was sent is in `seen`."""

    def __init__(self, given: dict[int, dict[str, fixed.Ring]], threshold: int):
        self.given = given
        self.server = Server(WIDTHS, threshold)
        self.clients = {c: Client(c, WIDTHS) for c in given}
        self.seen: dict[int, dict[str, fixed.Ring]] = {}

    def sum(
        self, no_shares: tuple[int, ...] = (), no_vector: tuple[int, ...] = (), no_answer: tuple[int, ...] = ()
    ) -> dict[str, fixed.Ring]:
        for c, client in self.clients.items():
            self.server.keys(c, client.keys())
        there = {c: client for c, client in self.clients.items() if c not in no_shares}
        for c, client in there.items():
            self.server.shares(c, client.shares(self.server.roster(), self.server.threshold))
        for c, client in there.items():
            client.take(self.server.shares_for(c))
        for c, client in there.items():
            if c not in no_vector:
                self.seen[c] = client.masked(self.given[c])
                self.server.masked(c, self.seen[c])
        answers = {c: there[c].unmask(self.server.who_came()) for c in self.server.came if c not in no_answer}
        return self.server.sums(answers)

    def expected(self) -> dict[str, fixed.Ring]:
        return plain_sum([self.given[c] for c in self.server.came], WIDTHS)


@pytest.mark.parametrize(
    "gone",
    [
        {},
        {"no_vector": (11,)},
        {"no_vector": (10, 15, 13)},
        {"no_shares": (12,)},
        {"no_answer": (14, 10)},
        {"no_shares": (10,), "no_vector": (12,), "no_answer": (14,)},
    ],
    ids=str,
)
def test_the_sum_is_exact_whoever_drops_out(gone: dict[str, tuple[int, ...]]) -> None:
    run = Run(vectors(7), 4)
    made, expected = run.sum(**gone), run.expected()
    assert all(np.array_equal(made[tree], expected[tree]) for tree in WIDTHS)
    absent = {*gone.get("no_shares", ()), *gone.get("no_vector", ())}
    assert {*run.server.came} == {*run.given} - absent


def test_with_fewer_than_the_threshold_there_is_no_sum() -> None:
    run = Run(vectors(6), 4)
    with pytest.raises(ValueError, match="3 clients are left, 4 are needed"):
        run.sum(no_vector=(10,), no_answer=(11, 12))


def test_what_the_server_is_sent_is_uniform_and_not_the_vector() -> None:
    """Vectors of zeros: the bytes that come are those of masks alone, of one client and of the sum of any few."""
    zeros = {c: {"update": np.zeros(20_000, np.uint64), "moments": np.zeros(3, np.uint64)} for c in range(5)}
    run = Run(zeros, 3)
    assert not run.sum()["update"].any()
    for c, sent in run.seen.items():
        assert not np.array_equal(sent["update"], zeros[c]["update"])
        assert chi_square(byte_counts(sent["update"].astype("<u4").tobytes())) < UNIFORM
    for some in ((0, 1), (1, 2, 4), (0, 1, 2, 3), (0, 1, 2, 3, 4)):  # own masks are still there
        total = sum(run.seen[c]["update"] for c in some) & fixed.low(32)
        assert chi_square(byte_counts(total.astype("<u4").tobytes())) < UNIFORM


def test_fewer_than_the_threshold_cannot_take_away_a_mask() -> None:
    """With the server's view and t - 1 clients' shares of client 10's seed: any other is as possible."""
    run = Run(vectors(5), 3)
    run.sum()
    held = {c + 1: client._held[10][1] for c, client in run.clients.items() if c != 10}
    few = dict([*held.items()][:2])
    points = {x: int.from_bytes(y, "big") for x, y in few.items()}
    for other in (bytes(32), SECRET):
        last = _through({0: int.from_bytes(other, "big"), **points}, 100)
        assert shamir.combine({**few, 100: last.to_bytes(33, "big")}) == other
    assert shamir.combine(dict([*held.items()][:3])) == run.clients[10]._seed


def test_nobody_gives_both_secrets_of_a_client() -> None:
    """A client answers once: for each other, the share of the seed or of the key."""
    run = Run(vectors(5), 3)
    run.sum(no_vector=(12,))
    client = run.clients[10]
    with pytest.raises(ValueError, match="asked twice"):
        client.unmask(table(dict.fromkeys([10, 12], b"")))
    fresh = Run(vectors(5), 3)
    fresh.sum(no_answer=(14,))
    answer = read_table(fresh.clients[14].unmask(table(dict.fromkeys([10, 14], b""))), 33)
    held = fresh.clients[14]._held
    assert answer == {c: held[c][1] if c in (10, 14) else held[c][0] for c in held}


def test_shares_that_somebody_changed_are_refused() -> None:
    run = Run(vectors(4), 3)
    for c, client in run.clients.items():
        run.server.keys(c, client.keys())
    for c, client in run.clients.items():
        run.server.shares(c, client.shares(run.server.roster(), 3))
    blob = bytearray(run.server.shares_for(10))
    blob[-1] ^= 1
    with pytest.raises(ValueError, match="not what was sealed"):
        run.clients[10].take(bytes(blob))


def test_a_share_is_only_for_the_one_it_was_sealed_for() -> None:
    run = Run(vectors(4), 3)
    for c, client in run.clients.items():
        run.server.keys(c, client.keys())
    for c, client in run.clients.items():
        run.server.shares(c, client.shares(run.server.roster(), 3))
    with pytest.raises(ValueError, match="not what was sealed"):
        run.clients[10].take(run.server.shares_for(11))


# ---- in a federation


def data(clients: int = 5) -> ClientData:
    source = torch.Generator().manual_seed(0)
    held = {
        f"c{i}": (torch.randn(10 + 3 * i, 5, generator=source), torch.randint(0, 3, (10 + 3 * i,), generator=source))
        for i in range(clients)
    }
    return ClientData.from_clients(
        held, test=(torch.randn(9, 5, generator=source), torch.randint(0, 3, (9,), generator=source))
    )


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def federation(secure: SecureSum | None = None, **more: Any) -> Federation:
    local = LocalSGD(lr=0.1, batch_size=8)
    return Federation(model, data(), **{"local": local, "engine": "loop", **more}, secure=secure)


@pytest.mark.parametrize("weights", ["examples", "uniform"])
@pytest.mark.parametrize(
    "method",
    [lamina.FedAvg(), lamina.SSFL(0.4), lamina.FedLAMA(phi=2), lamina.FedLUAR(), lamina.FedProx(), lamina.FedAdam(),
     lamina.Scaffold(), lamina.MagnitudePruning(0.5, end=2, every=1), lamina.Personal(layers=["4.weight", "4.bias"]),
     lamina.Chain(lamina.SSFL(0.4), lamina.FedLAMA(phi=2))],
    ids=repr,
)  # fmt: skip
def test_a_secure_run_is_the_plain_one_to_rounding(method: lamina.Method[Any, Any], weights: str) -> None:
    """bits=48, so that an entry is rounded to 16 * 5 / 2^47 = 6e-13."""
    plain = list(federation(method=method, weights=weights, cohort=4).run(4))
    hidden = list(federation(SecureSum(bits=48), method=method, weights=weights, cohort=4).run(4))
    for (before, a), (after, b) in zip(plain, hidden, strict=True):
        for name, x in before.params.items():
            torch.testing.assert_close(after.params[name], x, rtol=1e-5, atol=1e-6)
        assert a.train_loss == pytest.approx(b.train_loss)
        assert [layer.uploaded for layer in a.layers.values()] == [layer.uploaded for layer in b.layers.values()]
        for name, layer in a.layers.items():
            assert (layer.divergence is None) == (b.layers[name].divergence is None)
            if layer.divergence is not None:
                assert b.layers[name].divergence == pytest.approx(layer.divergence, rel=1e-4)
            assert b.layers[name].density == pytest.approx(layer.density)


def test_the_mean_is_that_of_the_plain_sums_of_elements() -> None:
    """Exactly: of every client's update as elements, with its examples as weight, in the ring of 32 bits."""
    plain = federation()
    updates = {
        reply.client: {name: x.clone() for name, x in reply.message["update"].items()}
        for reply in plain.made_engine().replies("round", plain._plan(*plain.initial, 0, 0.1, 5), range(5), {})
    }
    sizes = {c: float(n) for c, n in enumerate(data().sizes.tolist())}
    f = fixed.exponent(32, 5, 16.0)
    (state, _), *_ = federation(SecureSum()).run(1)
    for name, start in plain.initial.params.items():
        whole = sum(fixed.signed(fixed.to_ring(updates[c][name], sizes[c] / 22.0, f, 32), 32) for c in updates)
        mean = torch.from_numpy(whole * 2.0**-f / (sum(sizes.values()) / 22.0)).reshape(start.shape).float()
        assert torch.equal(state.params[name], start + mean)


def test_keys_are_new_every_time_and_no_bit_depends_on_them() -> None:
    kept = [[s.sha256() for s, _ in federation(SecureSum(), engine=e).run(3)] for e in ("loop", "processes", "loop")]
    assert kept[0] == kept[1] == kept[2]


def test_every_byte_that_is_said_is_in_the_ledger() -> None:
    """5 clients, threshold 3, in frames of 39, 41 and 41 bytes beside what is in them.

    up     keys 96 each; shares for 4 others, 4 + 82 each; unmask for 5, 4 + 33 each
    down   keys of 5, 4 + 64 each; shares of 4 others; a list of 5 numbers
    """
    (_, record), *_ = federation(SecureSum()).run(1)
    rows = {(t.direction, t.layer): t.bytes for t in record.traffic}
    around = {"_keys": 33, "_shares": 36, "_unmask": 35}
    expected = {
        ("up", "_keys"): 96, ("up", "_shares"): 4 * 86, ("up", "_unmask"): 5 * 37,
        ("down", "_keys"): 5 * 68, ("down", "_shares"): 4 * 86, ("down", "_unmask"): 5 * 4,
    }  # fmt: skip
    found = {key: rows[key] / 5 - around[key[1]] for key in expected}
    assert found == pytest.approx(expected, abs=2)
    assert sum(n for (way, _), n in rows.items() if way == "up") == record.bytes_up
    assert sum(n for (way, _), n in rows.items() if way == "down") == record.bytes_down
    assert rows["up", "0.weight"] == 5 * 4 * 40


def test_fewer_bits_are_fewer_bytes_and_coarser() -> None:
    start = federation().initial.params
    sizes, errors = [], []
    for bits in (16, 24, 32):
        (state, record), *_ = federation(SecureSum(bits=bits, limit=1.0)).run(1)
        (plain, _), *_ = federation().run(1)
        sizes.append(sum(t.bytes for t in record.traffic if t.direction == "up" and t.layer in start))
        errors.append(max(float((state.params[n] - plain.params[n]).abs().max()) for n in start))
    assert sizes[0] < sizes[1] < sizes[2]
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] < 5 / 2**15


def test_the_server_has_no_message_and_no_loss_of_any_one_client() -> None:
    fed = federation(SecureSum())
    (_, record), *_ = fed.run(1)
    assert len({c.loss for c in record.clients}) == 1
    (_, plain), *_ = federation().run(1)
    assert len({c.loss for c in plain.clients}) == 5


# ---- drop-outs, through the faults of a federation


class Losing:
    """An engine some of whose clients are gone after training, or send NaN."""

    def __init__(self, inner: Any, gone: dict[int, str]):
        self.name, self.reason, self.workers = inner.name, inner.reason, inner.workers
        self._inner, self._gone = inner, gone

    def replies(self, kind: str, plan: Any, clients: Any, *rest: Any) -> Iterator[Any]:
        for reply in self._inner.replies(kind, plan, clients, *rest):
            how = self._gone.get(reply.client) if kind == "round" else None
            if how == "gone":
                continue
            if how is not None:
                bad = {"nan": float("nan"), "large": 1e4}[how]
                update = {name: torch.full_like(x, bad) for name, x in reply.message["update"].items()}
                reply = reply._replace(message={**reply.message, "update": update})
            yield reply

    def close(self) -> None:
        self._inner.close()


def test_the_mean_of_those_who_are_left_is_exact() -> None:
    gone = {1: "gone", 3: "nan"}
    hidden = federation(SecureSum(bits=48)).through(lambda engine: Losing(engine, gone))
    plain = federation().through(lambda engine: Losing(engine, gone))
    for (a, mine), (b, theirs) in zip(plain.run(3), hidden.run(3), strict=True):
        assert [c.refused for c in mine.clients] == [c.refused for c in theirs.clients]
        for name, x in a.params.items():
            torch.testing.assert_close(b.params[name], x, rtol=1e-5, atol=1e-6)


def test_an_update_beyond_the_limit_is_left_out_and_named() -> None:
    fed = federation(SecureSum()).through(lambda engine: Losing(engine, {2: "large"}))
    (_, record), *_ = fed.run(1)
    assert [c.refused for c in record.clients] == [None, None, "E319", None, None]
    event = next(event for event in record.events if event["code"] == "E319")
    assert event["layer"] == "0.weight"
    assert "secure.limit=16" in event["why"]
    assert {t.layer for t in record.traffic if t.direction == "up"} >= {"_keys", "_shares", "_unmask"}


def test_with_too_few_left_the_round_fails_and_the_state_stays() -> None:
    fed = federation(SecureSum(threshold=0.8)).through(lambda engine: Losing(engine, {0: "gone", 1: "gone"}))
    with pytest.raises(lamina.RunError):
        list(fed.run(1))
    calm = federation(SecureSum(threshold=0.8), faults={"on_quorum": "skip"})
    skipped = calm.through(lambda engine: Losing(engine, {0: "gone", 1: "gone"}))
    (state, record), *_ = skipped.run(1)
    assert {c.refused for c in record.clients} == {"E307", "E311"}
    assert all(torch.equal(state.params[n], x) for n, x in skipped.initial.params.items())


# ---- what is refused


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ({"method": lamina.ErrorFeedback(), "uplink": lamina.wire.TopK(0.1)}, "masks cancel only where all send"),
        ({"method": lamina.DGC()}, "masks cancel only where all send"),
        ({"method": lamina.STC()}, "masks cancel only where all send"),
        ({"method": lamina.FedDST(0.5)}, "vote on the mask"),
        ({"method": lamina.FedNova()}, "no limit that is known"),
        ({"method": lamina.LocalOnly()}, "shares nothing"),
        ({"uplink": lamina.wire.TopK(0.1)}, "every client has to send the same"),
        ({"uplink": lamina.wire.Dense("int8")}, "an element of a ring"),
        ({"aggregate": Median()}, "nobody can"),
        ({"accuracy_before": True}, "nobody has one"),
        ({"faults": {"norm": "median"}}, "nobody can"),
        ({"faults": {"over_select": 1.5}, "cohort": 3}, "cannot be taken out"),
        ({"privacy": lamina.DP(1.0, 1.0), "weights": "uniform"}, "hides nothing"),
        ({"cohort": 2}, "two clients know"),
        ({"secure": SecureSum(bits=8)}, "fewer than 7 bits"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_is_no_sum_over_common_entries_is_refused(what: dict[str, Any], why: str) -> None:
    with pytest.raises(lamina.ConfigError, match=why) as caught:
        federation(**{"secure": SecureSum(), **what})
    assert caught.value.code == "E123"


@pytest.mark.parametrize("bad", [{"bits": 7}, {"bits": 63}, {"bits": 32.0}, {"threshold": 0.5}, {"threshold": 1.1},
                                 {"limit": 0}, {"limit": float("inf")}])  # fmt: skip
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(lamina.ConfigError, match=next(iter(bad))):
        SecureSum(**bad)


@pytest.mark.parametrize(
    ("n", "threshold", "needed"), [(5, 0.6, 3), (10, 0.6, 6), (3, 0.6, 2), (7, 1.0, 7), (4, 0.51, 3)]
)
def test_the_threshold_is_rounded_up(n: int, threshold: float, needed: int) -> None:
    assert SecureSum(threshold=threshold).needed(n) == needed


def test_what_is_elsewhere_or_looked_at_is_refused() -> None:
    fed = federation(SecureSum())
    for make in (lambda: fed.over(lambda kind, blob: blob), lambda: fed.by("remote", "", lambda setup, here: here)):
        with pytest.raises(lamina.ConfigError, match="secure") as caught:
            make()
        assert caught.value.code == "E118"


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography", None)
    with pytest.raises(lamina.ConfigError, match="cryptography") as caught:
        federation(SecureSum())
    assert "lamina[secure]" in str(caught.value)


def test_a_config_says_it() -> None:
    base = {"model": "mlp", "data": "digits"}
    assert secure_of(load_tables(("here", {**base, "secure": {"bits": 24}}))) == SecureSum(bits=24)
    assert secure_of(load_tables(("here", base))) is None
