"""Law: sending everything through real bytes changes nothing, and the ledger is the length of what was sent."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

import cases
from lamina import Federation, FedLAMA, LocalSGD, Params, Plan, RoundRecord, WireError, wire
from lamina.downlink import Broadcast
from lamina.wire import frame


def check_ledger(record: RoundRecord) -> None:
    """The rows, the clients and the layers of one record sum to its totals."""
    up, down = (sum(t.bytes for t in record.traffic if t.direction == d) for d in ("up", "down"))
    assert (up, down) == (record.bytes_up, record.bytes_down)
    rows = {(t.direction, t.layer): t.bytes for t in record.traffic if t.phase == "round"}
    assert {t.phase for t in record.traffic} <= ({"round", "probe"} if record.round == 0 else {"round"})
    assert len({t[:3] for t in record.traffic}) == len(record.traffic)  # one row per phase, direction and layer
    for direction in ("up", "down"):
        own = sum(getattr(c, f"bytes_{direction}") for c in record.clients)
        assert own == sum(n for (way, _), n in rows.items() if way == direction)
    for name, layer in record.layers.items():
        assert layer.bytes_up == rows.get(("up", name), 0)
        assert layer.bytes_down == rows.get(("down", name), 0)
        assert layer.uploaded or layer.bytes_up == 0
    assert all(n >= 0 for n in rows.values())
    assert {layer for _, layer in rows} - set(record.layers) <= {
        "_shared",
        "_moments",
        "_buffers",
        "_control",
        "_norm",
        "_mask",
        "_votes",
        "_halves",
    }


def agree(make: Any, rounds: int = cases.ROUNDS) -> None:
    fast: Federation = make(through_bytes=False)
    state, records = cases.finish(fast, rounds)
    real, reals = cases.finish(make(through_bytes=True), rounds)
    assert cases.everything(real) == cases.everything(state)
    assert reals == records
    for record in records:
        check_ledger(record)
    assert state.bytes_up == sum(r.bytes_up for r in records)
    assert state.bytes_down == sum(r.bytes_down for r in records)


@pytest.mark.parametrize("name", cases.ALL)
def test_bytes_change_nothing(name: str) -> None:
    agree(lambda **options: cases.case(name, **options))


@pytest.mark.parametrize("codec", cases.CODECS)
def test_bytes_change_nothing_whatever_the_uplink(codec: str) -> None:
    agree(lambda **options: cases.federation(cases.ALL["fedprox, fedlama"](), uplink=cases.CODECS[codec], **options), 4)


@pytest.mark.parametrize("values", ["lossless", "fp16", "bf16", "int8"])
def test_bytes_change_nothing_whatever_the_downlink(values: str) -> None:
    agree(lambda **options: cases.federation(FedLAMA(phi=2), downlink=wire.Dense(values), **options), 3)


@pytest.mark.parametrize("name", cases.SENT_LOSSLESS)
def test_bytes_change_nothing_where_distances_go_down(name: str) -> None:
    agree(lambda **options: cases.case(name, downlink=cases.LOSSLESS, **options))


@pytest.mark.parametrize("model", ["double", "dropout"])
@pytest.mark.parametrize("buffers", ["keep", "skip"])
def test_bytes_change_nothing_whatever_the_model(model: str, buffers: str) -> None:
    agree(lambda **options: cases.federation(model=model, buffers=buffers, diagnostics=False, **options), 2)


def test_personal_buffers_go_through_bytes_and_stay() -> None:
    agree(lambda **options: cases.federation(FedLAMA(phi=2), buffers="keep", **options), 4)


@pytest.mark.parametrize("name", ["fedavg", "fedlama, scaffold", "errorfeedback, fedavgm"])
def test_the_ledger_is_the_length_of_the_frames_that_were_packed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every client's plan and message are packed for it. Besides, plans are packed as for a newcomer, under the number
    0, to see that they can be read: one for the round, one for the evaluation on the clients' own test sets."""
    packed: list[tuple[str, int, int]] = []
    pack = frame.pack

    def spy(given: frame.Frame) -> bytes:
        blob = pack(given)
        packed.append((given.kind, given.client, len(blob)))
        return blob

    monkeypatch.setattr(frame, "pack", spy)
    for _, record in cases.case(name, through_bytes=True).run(cases.ROUNDS):
        messages = [(client, size) for kind, client, size in packed if kind == "message"]
        assert sorted(messages) == [(c.client, c.bytes_up) for c in record.clients]
        plans = Counter((client, size) for kind, client, size in packed if kind == "plan")
        plans.subtract((c.client, c.bytes_down) for c in record.clients)
        assert {client: n for (client, _), n in plans.items() if n} == {0: 2}
        packed.clear()


def test_client_states_go_through_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaffold's and ErrorFeedback's rows are decoded before a client uses them: their tensors are new ones."""
    from lamina import client

    seen: Counter[int] = Counter()
    through = client._through_bytes

    def spy(row):
        again = through(row)
        assert cases.bits(again) == cases.bits(row)
        before = {x.data_ptr() for x in row.method.residual.values()}
        assert before.isdisjoint(x.data_ptr() for x in again.method.residual.values())
        seen["rows"] += 1
        return again

    monkeypatch.setattr(client, "_through_bytes", spy)
    cases.finish(cases.case("errorfeedback", through_bytes=True), 2)
    assert seen["rows"] == 6


class Homes:
    """Clients that know only what came in their own frames, and the mask: a `frame.Carry`."""

    def __init__(self) -> None:
        self.params: dict[int, Params] = {}
        self.referred: Counter[bool] = Counter()
        self.newest: Broadcast | None = None

    def __call__(self, kind: str, blob: bytes) -> bytes:
        if kind == "plan":
            assert self.newest is not None
            self.receive(frame.unpack(blob), self.newest.plan)
        return blob

    def receive(self, arrived: frame.Frame, plan: Plan) -> None:
        own, mask = self.params.get(arrived.client, {}), plan.mask or {}
        if "params" in arrived.sections:
            context = wire.Context(wire.schema_of(plan.params), plan.mask, own or None)
            self.referred[self.refers(arrived.sections["params"], context)] += 1
            own = own | cases.LOSSLESS.decode(arrived.sections["params"], context)
        own = {name: torch.where(mask[name], x, 0) if name in mask else x for name, x in own.items()}
        assert cases.bits(own) == cases.bits({name: plan.params[name] for name in own})
        assert own.keys() == plan.params.keys()
        self.params[arrived.client] = own

    @staticmethod
    def refers(blob: bytes, context: wire.Context) -> bool:
        try:
            cases.LOSSLESS.decode(blob, replace(context, reference=None))
        except WireError as error:
            return error.code == "E348"
        return False


@pytest.mark.parametrize("name", [name for name in cases.ALL if "stc" not in name])
def test_every_client_can_read_its_plan_with_what_it_holds_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No distance is sent to anyone who holds something else (that would be E348), under masks that change, to
    clients that are probed or absent; and it adds up to the model that the engine says they hold."""
    homes = Homes()
    make = Federation._broadcast

    def noting(self: Federation, *arguments: Any) -> Broadcast:
        homes.newest = make(self, *arguments)
        return homes.newest

    monkeypatch.setattr(Federation, "_broadcast", noting)
    cases.finish(cases.case(name, downlink=cases.LOSSLESS, local=LocalSGD(lr=1e-3, batch_size=8)).over(homes))
    assert homes.referred[False] >= 3
    assert homes.referred[True] >= 3 or name == "localonly"
