"""Who is let into a sum, and what a round does when clients fail: R8, R9, R10, R11, R13, R17."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import math
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
TESTS = HERE.parents[1] / "tests"
sys.path[:0] = [path for path in (str(HERE.parent), str(TESTS)) if path not in sys.path]

import cases  # noqa: E402
from lamina import ClientData, Federation, LocalSGD, RoundRecord, State, wire  # noqa: E402
from lamina.admission import own  # noqa: E402
from lamina.chaos import CONTENTS, changed, claims, layered, one_is  # noqa: E402
from lamina.client import Reply, uplink_context  # noqa: E402
from lamina.errors import WireError  # noqa: E402
from lamina.models import mlp  # noqa: E402
from lamina.remote import Answer, Lost, message, over  # noqa: E402
from lamina.survival import survivors  # noqa: E402
from lamina.wire import frame  # noqa: E402
from soak import Result, hostile, nodes, row  # noqa: E402


def _in_process() -> Any:
    """tests/network.py, by its path: there is a network.py here, too."""
    spec = importlib.util.spec_from_file_location("in_process_network", TESTS / "network.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


network = _in_process()
CODECS = {"errorfeedback": {"uplink": wire.TopK(0.3)}}


def world(clients: int, seed: int = 5) -> ClientData:
    """So many clients of unequal sizes, with eight numbers and three classes each example."""
    source = torch.Generator().manual_seed(seed)
    made = {}
    for c in range(clients):
        y = torch.randint(3, (6 + 3 * (c % 4),), generator=source)
        made[f"c{c}"] = torch.randn(len(y), 8, generator=source) + y[:, None], y
    return ClientData.from_clients(made)


def federation(name: str, data: ClientData, **options: Any) -> Federation:
    settings: dict[str, Any] = {"cohort": "all", "seed": 7, "engine": "loop", "local": LocalSGD(lr=0.1, batch_size=4)}
    method = cases.ALL[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a server has no examples on which to try the model
        return Federation(lambda: mlp((8, 6, 3)), data, method=method, **settings | CODECS.get(name, {}) | options)


def lost_in(records: Sequence[RoundRecord]) -> dict[tuple[int, int], str]:
    """(round, client) -> code, of those who were not used."""
    return {(r.round, c.client): c.refused for r in records for c in r.clients if c.refused is not None}


def learned(state: State) -> dict[str, Any]:
    return {
        "params": cases.bits(state.params),
        "buffers": cases.bits(state.buffers),
        "server": cases.bits(state.server),
    }


# ---- R8, R9: nodes that are processes


@row(
    "R8", "fedavg", "scaffold", "errorfeedback", minutes=3,
    goal="30 % of the nodes killed in each of 50 rounds: the survivors' model to the bit, no round beyond 10 s",
)  # fmt: skip
def killed(name: str, short: bool) -> Result:
    rounds, clients, deadline = (4, 6, 10.0) if short else (50, 10, 10.0)
    data = world(clients)
    with nodes.Nodes(lambda own: federation(name, own), data, clients) as post:
        fed = over(federation(name, registry(data), faults={"reply_deadline_s": deadline}), post)
        chance = random.Random(3)
        records, longest, state = [], 0.0, None
        run = fed.run(rounds, evaluate_every=rounds)
        for _ in range(rounds):
            some = chance.sample(range(clients), max(1, round(0.3 * clients)))
            post.doomed = {node: chance.uniform(0, 0.2) for node in some}
            began = time.monotonic()
            state, record = next(run)
            longest = max(longest, time.monotonic() - began)
            records.append(record)
            post.revive()
        kills = post.kills
    lost = lost_in(records)
    *_, (expected, _) = survivors(federation(name, data), lost).run(rounds, evaluate_every=rounds)
    same = state is not None and learned(state) == learned(expected)
    figure = (
        f"{kills} kills, {len(lost)} answers lost, longest round {longest:.2f} s, model {'right' if same else 'wrong'}"
    )
    return Result(figure, same and longest <= deadline + 1 and len(lost) > 0)


@row(
    "R9",
    minutes=3,
    goal="10 % of the nodes hang: every round ends at its deadline +- 0.5 s, names them, lets them rest",
)
def hanging(short: bool) -> Result:
    rounds, clients, deadline, rest = (3, 5, 0.7, 1) if short else (40, 10, 2.0, 2)
    data = world(clients)
    faults = {"reply_deadline_s": deadline, "rest_rounds": rest}
    off, wrong, woken = 0.0, 0, 0
    with nodes.Nodes(lambda own: federation("scaffold", own), data, clients) as post:
        fed = over(federation("scaffold", registry(data), faults=faults), post)
        resting: dict[int, int] = {}
        run = fed.run(rounds, evaluate_every=rounds)
        for t in range(rounds):
            hung = next(c for c in range(t, t + clients) if resting.get(c % clients, 0) <= t) % clients
            post.stop(hung)
            began = time.monotonic()
            _, record = next(run)
            took = time.monotonic() - began
            post.go_on(hung)
            asleep = {c for c, until in resting.items() if until > t}
            silent = {e["client"] for e in record.events if e["code"] == "E311"}
            wrong += silent != {data.names[hung]} or bool(asleep & {*record.cohort})
            woken += len({c for c, until in resting.items() if until == t} & {*record.cohort})
            off = max(off, abs(took - deadline))
            resting[hung] = t + 1 + rest
    figure = f"{rounds} rounds at most {off:.2f} s off, {wrong} with another name or a resting node, {woken} came back"
    return Result(figure, off <= 0.5 and wrong == 0 and woken > 0)


def registry(data: ClientData) -> ClientData:
    return ClientData.registry({name: int(n) for name, n in zip(data.names, data.sizes, strict=True)})


# ---- R11: arrival orders


class Shuffled:
    """An engine whose replies come in another order."""

    def __init__(self, engine: Any, chance: random.Random):
        self.name, self.reason, self.workers = engine.name, engine.reason, engine.workers
        self._engine = engine
        self._chance = chance

    def replies(self, *asked: Any) -> Iterator[Reply]:
        held = [own(reply) for reply in self._engine.replies(*asked)]
        self._chance.shuffle(held)
        yield from held

    def close(self) -> None:
        self._engine.close()


@row("R11", "simulator", "remote", minutes=3, goal="1,000 arrival orders of ten clients' answers make one model")
def orders(where: str, short: bool) -> Result:
    many, rounds, clients = (12, 2, 10) if short else (1000, 2, 10)
    data = world(clients)
    found = set()
    for i in range(many):
        chance = random.Random(i)
        if where == "simulator":
            fed = federation("scaffold", data).through(lambda engine, chance=chance: Shuffled(engine, chance))
        else:
            fed, streets = network.connected(
                lambda examples, **o: federation("scaffold", examples, **o), [range(clients)], data=data
            )
            receive = streets.receive

            def shuffled(timeout: float | None, receive=receive, streets=streets, chance=chance) -> Any:
                if not streets._arrived:
                    first = receive(timeout)
                    streets._arrived.extend([] if first is None else [first])
                    chance.shuffle(streets._arrived)
                return receive(timeout)

            streets.receive = shuffled  # type: ignore[method-assign]
        *_, (state, _) = fed.run(rounds, evaluate_every=rounds)
        found.add((state.sha256(), str(learned(state)["server"])))
    return Result(f"{len(found)} models of {many} orders", len(found) == 1)


# ---- R13: one faulty client

FAULTY, AT, ROUNDS = 2, 1, 3  # client, round, of so many
SURVIVE, HONEST, PARTLY = "the others", "all", "all but its layer"


def _first(update: Mapping[str, Tensor]) -> str:
    """A layer with a matrix, if there is one; "" where nothing is sent."""
    matrices = [name for name, x in update.items() if x.dim() > 1 and x.shape[0] != x.shape[1]]
    return next(iter([*matrices, *update]), "")


def of_layer(turn: Callable[[Tensor], Any]) -> Callable[[Reply, float], Reply]:
    def change(reply: Reply, where: float) -> Reply:
        name = _first(reply.message["update"])
        return changed(reply, "update", lambda update: update | {name: turn(update[name])}) if name else reply

    return change


def _missing(reply: Reply, where: float) -> Reply:
    name = _first(reply.message["update"])
    made = changed(reply, "update", lambda update: {n: x for n, x in update.items() if n != name})
    if "moments" not in made.message:
        return made
    return changed(made, "moments", lambda moments: {n: x for n, x in moments.items() if n != name})


def _all_nan(reply: Reply, where: float) -> Reply:
    return changed(reply, "update", lambda update: {n: torch.full_like(x, math.nan) for n, x in update.items()})


CONTENT: dict[str, tuple[Callable[[Reply, float], Reply], str, str]] = {  # -> the change, what counts, code
    "all NaN": (_all_nan, SURVIVE, "E310"),
    "one +Inf": (layered(one_is(math.inf)), SURVIVE, "E310"),
    "x 1e20": (CONTENTS["scale"], SURVIVE, "E312"),
    "transposed layer": (of_layer(lambda x: x.transpose(0, -1).contiguous()), SURVIVE, "E320"),
    "a first dimension more": (of_layer(lambda x: x.unsqueeze(0)), SURVIVE, "E320"),
    "shape (1, n)": (of_layer(lambda x: x.reshape(-1)[: x.shape[-1]].reshape(1, -1).clone()), SURVIVE, "E320"),
    "shape ()": (of_layer(lambda x: x.sum()), SURVIVE, "E320"),
    "shape (5, ...)": (of_layer(lambda x: x.expand(5, *x.shape).contiguous()), SURVIVE, "E320"),
    "dtype float64": (of_layer(lambda x: x.double() if x.dtype != torch.float64 else x.float()), SURVIVE, "E321"),
    "dtype complex64": (of_layer(lambda x: x.to(torch.complex64)), SURVIVE, "E321"),
    "dtype string": (of_layer(lambda x: "ones"), SURVIVE, "E321"),
    "missing layer": (_missing, PARTLY, ""),
    "extra layer": (CONTENTS["layer"], SURVIVE, "E322"),
    "claims 1e9": (claims(1e9), SURVIVE, "E314"),
    "claims -80": (claims(-80.0), SURVIVE, "E314"),
    "claims 0": (claims(0.0), SURVIVE, "E314"),
    "claims NaN": (claims(math.nan), SURVIVE, "E314"),
}
ARRIVAL: dict[str, tuple[str, str]] = {  # what counts, code
    "no reply": (SURVIVE, "E311"),
    "reply twice": (HONEST, "E331"),
    "reply to an old round": (SURVIVE, "E332"),
}
BYTES: dict[str, tuple[Callable[[Answer], bytes], str]] = {
    "claims 8 TiB": (hostile.claims_tebibytes, "E340"),
    "garbage": (hostile.garbage, "E341"),
    "bytes left over": (hostile.left_over, "E340"),
    "no arrays": (hostile.no_arrays, "E322"),
}


def nan_loss(reply: Reply, where: float) -> Reply:
    return reply._replace(loss=math.nan)


class Oracle:
    """What the model must be, whatever is wrong with one client's reply in round 1."""

    def __init__(self, make: Callable[[], Federation]):
        self.honest = self._end(make())
        self.others = self._end(survivors(make(), {(AT, FAULTY): "E311"}))

    def _end(self, fed: Federation) -> dict[str, Any]:
        *_, (state, _) = fed.run(ROUNDS, evaluate_every=ROUNDS)
        return learned(state)

    def right(self, counts: str, pairs: Sequence[tuple[State, RoundRecord]]) -> bool:
        found = learned(pairs[-1][0])
        if counts == PARTLY:  # what became of the layer is the method's business; nothing else may be lost
            return all(bool(torch.isfinite(x).all()) for x in pairs[-1][0].params.values())
        return found == {HONEST: self.honest, SURVIVE: self.others}[counts]


class Faulty:
    """An engine one of whose clients sends something else in one round."""

    def __init__(self, engine: Any, fault: str):
        self.name, self.reason, self.workers = engine.name, engine.reason, engine.workers
        self._engine = engine
        self._fault = fault
        self._old: Reply | None = None

    def replies(self, kind: Any, plan: Any, *asked: Any) -> Iterator[Reply]:
        for reply in self._engine.replies(kind, plan, *asked):
            if kind not in ("round", "judged") or reply.client != FAULTY or plan.round > AT:
                yield reply
            elif plan.round < AT:
                self._old = own(reply)._replace(round=plan.round)
                yield reply
            elif self._fault in CONTENT:
                yield CONTENT[self._fault][0](reply, 0.0)
            elif self._fault == "reply twice":
                yield own(reply)
                yield reply
            elif self._fault == "reply to an old round" and self._old is not None:
                yield self._old
            elif self._fault == "NaN loss":
                yield nan_loss(reply, 0.0)
            elif self._fault == "NaN metric only":
                yield changed(reply, "score", lambda score: {"score": torch.full_like(score["score"], math.nan)})

    def close(self) -> None:
        self._engine.close()


def judged(fed: Federation) -> list[tuple[State, RoundRecord]]:
    return list(fed.run(ROUNDS, evaluate_every=1 if fed._judges else ROUNDS))


def said(pairs: Sequence[tuple[State, RoundRecord]], code: str, name: str) -> bool:
    """Whether the code stands in the events of that round, with the client."""
    return not code or any(e["code"] == code and e["client"] == name for e in pairs[AT][1].events)


def table(where: str, names: Sequence[str], one: Callable[[str, str], str]) -> Result:
    wrong = []
    here = where == "simulator"  # where no bytes travel, and clients test their models
    faults = [*ARRIVAL, *CONTENT, "NaN loss", *(["NaN metric only"] if here else BYTES)]
    for name in names:
        for fault in faults:
            what = one(name, fault)
            wrong += [f"{name}: {fault}: {what}"] if what else []
    tried = len(names) * len(faults)
    return Result(f"{tried - len(wrong)} of {tried} right ({len(faults)} faults, {len(names)} methods)", not wrong,
                  "; ".join(wrong[:5]))  # fmt: skip


SILENT = ("localonly",)  # sends no layer, so none of its can be wrong
OF_LAYERS = {*CONTENT} - {"extra layer", "claims 1e9", "claims -80", "claims 0", "claims NaN"}
QUICK = ("fedlama, scaffold",)


@row(
    "R13", "simulator", "remote", minutes=20,
    goal="every fault of the one-faulty-client table costs that client that round and no more, for every method",
)  # fmt: skip
def one_faulty(where: str, short: bool) -> Result:
    names = QUICK if short else tuple(cases.ALL)
    oracles: dict[str, Oracle] = {}

    made: dict[tuple[Any, ...], Federation] = {}  # a federation has no state of a run, so one will do for many

    def make(name: str, **options: Any) -> Federation:
        examples = options.pop("examples", network.shared())
        key = name, tuple(examples.here), len(examples.indices), *sorted(options.items())
        if key not in made:
            made[key] = cases.case(name, **{"cohort": "all", "examples": examples, **options})
        return made[key]

    def simulated(name: str, fault: str) -> str:
        options: dict[str, Any] = {"accuracy_before": True} if fault == "NaN metric only" else {}
        fed = make(name, **options).through(lambda engine: Faulty(engine, fault))
        return outcome(name, fault, fed, *expected(fault))

    def expected(fault: str) -> tuple[str, str]:
        """What counts, and the code."""
        if fault in ("NaN metric only", "NaN loss"):
            return (HONEST, "") if fault == "NaN metric only" else (SURVIVE, "E310")
        return ARRIVAL.get(fault) or (CONTENT[fault][1:] if fault in CONTENT else (SURVIVE, BYTES[fault][1]))

    def elsewhere(name: str, fault: str) -> str:
        fed, streets = network.connected(lambda **o: make(name, **o), ((0, 3), (1, 2, 4)))
        spied = hostile.Spied()
        fed = fed.through(spied)
        old: list[bytes] = []

        def happens(client: int, blob: bytes) -> list[tuple[int, bytes | Lost]]:
            answer = Answer.unpacked(blob)
            round = frame.unpack(answer.frame).round if answer.frame and spied.kind == "round" else -1
            if client != FAULTY or round > AT or round < 0:
                return [(client, blob)]
            if round < AT:
                old.append(blob)
                return [(client, blob)]
            if fault in BYTES:
                return [(client, BYTES[fault][0](answer))]
            if fault in ARRIVAL:
                return {"no reply": [], "reply twice": [(client, blob)] * 2}.get(
                    fault, [(client, old[-1])] if old else []
                )
            made = reworked(fed, spied.plan, answer, nan_loss if fault == "NaN loss" else CONTENT[fault][0])
            return [] if made is None else [(client, made)]

        streets.happens = happens
        counts, code = expected(fault)
        # bytes carry no shapes and no names: another schema is refused as a whole; what does not travel is not sent
        code = {"E320": "E342", "E321": "E342"}.get(code, code) if fault in CONTENT else code
        code = {"dtype complex64": "E311", "dtype string": "E311", "extra layer": "E342"}.get(fault, code)
        return outcome(name, fault, fed, counts, code)

    def outcome(name: str, fault: str, fed: Federation, counts: str, code: str) -> str:
        try:
            pairs = judged(fed)
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:120]}"
        if not oracles.get(name):
            oracles[name] = Oracle(lambda: make(name))
        if name in SILENT and fault in OF_LAYERS:
            counts, code = HONEST, ""
        if not oracles[name].right(counts, pairs):
            return f"another model; {[(e['code'], e['client']) for e in pairs[AT][1].events]}"
        if not said(pairs, code, fed.data.names[FAULTY]):
            return f"not {code} but {[(e['code'], e['client']) for e in pairs[AT][1].events]}"
        return ""

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return table(where, names, simulated if where == "simulator" else elsewhere)


def reworked(fed: Federation, plan: Any, answer: Answer, change: Callable[[Reply, float], Reply]) -> bytes | None:
    """The answer of a client that says something else; None where it cannot be said in bytes."""
    setup = fed.setup
    expected = message.Expected.of(setup, "round", plan)
    reply = message.read(setup, plan, expected, answer)
    arrived = frame.unpack(answer.frame)
    odd = change(reply, 0.0)
    scalars = dict(arrived.scalars) | {"steps": float(odd.message["steps"]["steps"]), "loss": odd.loss}
    update = odd.message["update"]
    context = uplink_context(setup, plan, answer.client)
    sections = dict(arrived.sections)
    if any(not isinstance(x, Tensor) for x in update.values()):
        return None
    schema = {name: wire.schema_of(update).get(name, spec) for name, spec in context.schema.items()}
    schema |= wire.schema_of({name: x for name, x in update.items() if name not in schema})
    mask = context.mask
    if mask is not None and schema != context.schema:
        mask = {name: x for name, x in mask.items() if schema[name] == context.schema[name]}
    try:
        sections["update"] = setup.uplink.encode(update, replace(context, schema=schema, mask=mask))
    except WireError:
        return None
    if "moments" in sections:
        moments = {name: (x.double() ** 2).sum() for name, x in update.items()}
        form = {name: wire.Spec((), torch.float64) for name in schema if name in update}
        sections["moments"] = wire.Dense().encode({name: moments[name] for name in form}, wire.Context(form))
    packed = frame.pack(arrived._replace(scalars=scalars, sections=sections))
    return answer._replace(frame=packed).packed()


# ---- R17: memory


@row(
    "R17", minutes=5, goal="200 hostile messages of the greatest length: at most two models, the staging cap and 64 MB"
)
def memory(short: bool) -> Result:
    """In a process of its own, whose memory is that of the server alone."""
    many, width = (24, 512) if short else (200, 1024)
    ran = subprocess.run(
        [sys.executable, str(HERE / "hostile.py"), str(many), str(width)], capture_output=True, text=True, timeout=3000
    )
    if ran.returncode:
        return Result("it failed", False, ran.stderr.strip().splitlines()[-1])
    used, allowed, refused, sent = map(int, ran.stdout.split())
    figure = f"{used / 2**20:,.0f} MiB more at most, {allowed / 2**20:,.0f} allowed; {refused} of {many} refused"
    return Result(figure, used <= allowed and refused == many - 1, f"{sent / 2**20:,.0f} MiB came")


def _scalar(name: str, value: float) -> Callable[[Answer], bytes]:
    def change(answer: Answer) -> bytes:
        real = frame.unpack(answer.frame)
        return answer._replace(frame=frame.pack(real._replace(scalars={**real.scalars, name: value}))).packed()

    return change


FLOWER: dict[str, tuple[Callable[[Answer], bytes], str]] = {
    **BYTES,
    "claims 1e9": (_scalar("steps", 1e9), "E314"),
    "claims -80": (_scalar("steps", -80.0), "E314"),
    "claims 0": (_scalar("steps", 0.0), "E314"),
    "claims NaN": (_scalar("steps", math.nan), "E314"),
    "NaN loss": (_scalar("loss", math.nan), "E310"),
    "of another client": (lambda answer: answer._replace(client=0).packed(), "E330"),
}


@row("R13", "flower", minutes=5, goal="faults of one client are judged as elsewhere where Flower's messages carry them")
def one_faulty_flower(short: bool) -> Result:
    """Flower's own messages and apps, in this process: tests/flower/grid.py."""
    sys.path[:0] = [path for path in (str(TESTS / "flower"),) if path not in sys.path]
    try:
        from flwr.app import Message
        from grid import FakeGrid
    except ImportError:
        return Result("not tried: flwr is not installed", False, "pip install 'lamina[flower]'")
    from lamina import config
    from lamina.flower import client_app, post, project
    from lamina.flower import server as serving
    from lamina.flower.records import packed, unpacked
    from lamina.flower.settings import RunKeys
    from lamina.remote import bundled, unbundled

    post.POLL_S = 0.001
    faults = [*FLOWER, "no reply", "an error of its app"]
    faults = [*faults[:3], faults[-1]] if short else faults
    keys = ["rounds=3", "data.clients=5", "cohort=all", "model.widths=[64,8,10]", "local.epochs=1", "engine=loop",
            "faults.reply_deadline_s=0.5", "method=scaffold", "local.momentum=0"]  # fmt: skip
    wrong = []
    with tempfile.TemporaryDirectory() as place:
        path = project.write(config.load("quickstart", keys, env={}), Path(place) / "app")[-1]
        lost = survivors(config.build(config.load(path, env={})), {(AT, FAULTY): "E311"})
        *_, (expected, _) = lost.run(3, evaluate_every=3)
        for i, fault in enumerate(faults):
            grid = FakeGrid()
            for n in range(5):
                home = Path(place) / f"{i}-state-{n}"
                grid.join(100 + n, client_app(path), home, **{"partition-id": n, "num-partitions": 5})
            trained = itertools.count()

            def happens(node: int, message: Message, reply: Message, fault=fault, trained=trained) -> Message | None:
                if node != 100 + FAULTY or message.metadata.message_type != "train" or next(trained) != AT:
                    return reply
                if fault == "no reply":
                    return None
                if fault == "an error of its app":
                    raise RuntimeError("boom")
                ((client, blob),) = unbundled(unpacked(reply.content)[0])
                reply.content = packed(bundled([(client, FLOWER[fault][0](Answer.unpacked(blob)))]))
                return reply

            grid.happens = happens if fault != "an error of its app" else _failing(grid, happens)
            with serving.Report("") as report, contextlib.redirect_stdout(io.StringIO()):
                run = serving.serve(path, RunKeys(run_dir=str(Path(place) / f"{i}-runs"), rounds=3), grid, report)
            lines = (run.path / "events.jsonl").read_text().splitlines()
            events = [(e["round"], e["client"], e["code"]) for e in map(json.loads, lines) if e["event"] == "refused"]
            due = (AT, str(FAULTY), FLOWER[fault][1] if fault in FLOWER else "E311")
            if run.info["final_sha256"] != expected.sha256() or due not in events:
                wrong.append(f"{fault}: {events}")
    return Result(f"{len(faults) - len(wrong)} of {len(faults)} right", not wrong, "; ".join(wrong[:4]))


def _failing(grid: Any, happens: Callable[..., Any]) -> Callable[..., Any]:
    """Its app raises instead of answering."""
    from flwr.app import Error, Message

    def happened(node: int, message: Any, reply: Any) -> Any:
        try:
            return happens(node, message, reply)
        except RuntimeError as error:
            return Message(Error(2, str(error)), reply_to=message)

    return happened
