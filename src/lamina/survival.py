"""An experiment under chaos, and what became of it: who was asked, what was used, and whether the model is right.

The run is an ordinary one, in a folder of its own beside the experiment's; where a kill takes it down it is resumed
from its last commit. Then it is made once more without chaos, from the clients alone whose messages were used: every
other reply is left out before it is one. Both must end in the same model, to the bit.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina import checkpoint
from lamina import config as configs
from lamina.admission import unused
from lamina.attacks import attacked, expect_attack, fooled
from lamina.chaos import Chaos, Chaotic
from lamina.client import Reply
from lamina.engine.base import Engine, Kind, Pack
from lamina.errors import ConfigError, LaminaError, RunError
from lamina.federation import Federation
from lamina.folder import CLIENTS, read_info, read_log
from lamina.method import Plan
from lamina.redaction import hidden, printable
from lamina.runs import Watcher, fit, new_folder, resume
from lamina.store import Row

if TYPE_CHECKING:
    from lamina.config import Config

WHERE = "chaos.json"  # in the run's folder: what went wrong on purpose, and the account
_BESIDE = ("E330", "E331", "E332")


@dataclass
class Account:
    """Of a run. `asked` is `used` and all that is in `refused`, by code; E311 of them gave no answer."""

    run: str
    status: str
    rounds: int
    skipped: int = 0  # rounds that changed nothing
    resumed: int = 0
    asked: int = 0
    used: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    beside: dict[str, int] = field(default_factory=dict)  # what came and was nobody's answer, by code
    bytes_up: int = 0
    bytes_down: int = 0
    sha256: str | None = None
    expected: str | None = None  # of the same run from the survivors alone; None: it was not made
    why: str = ""  # it was not made, or the run ended
    code: str = ""  # with which it ended
    fooled: float | None = None  # share of marked test pictures taken for the label that a backdoor asks for

    @property
    def answered(self) -> int:
        return self.asked - self.refused.get("E311", 0)

    @property
    def adds_up(self) -> bool:
        return self.asked == self.used + sum(self.refused.values())

    @property
    def right(self) -> bool | None:
        """Whether the model is that of the survivors; None: nobody looked."""
        return None if self.expected is None else self.sha256 == self.expected

    def facts(self) -> dict[str, Any]:
        return {**asdict(self), "answered": self.answered, "adds_up": self.adds_up, "right": self.right}


def survive(
    config: Config, chaos: Chaos, root: Path | None = None, watcher: Watcher | bool = False, check: bool = True
) -> Account:
    """Runs the experiment under chaos, and says what became of it.

    Args:
        root: where runs lie.
        check: make it once more from the survivors.

    Raises:
        LaminaError: it cannot begin, or it stopped for a reason that is no part of the chaos.
    """
    options = config.run.model_copy(update={"checkpoint_every": 1, "keep_clients_log": True, "track": []})
    name = f"{config.name}-chaos"
    config = config.model_copy(update={"run": options, "store": "memory", "name": name})
    folder = new_folder(config.name, config.method_title, root)
    left = chaos
    error: LaminaError | None = None
    while True:
        try:
            _attempt(config, left, folder, watcher)
            error = None
        except _Killed:
            pass
        except RunError as caught:
            error = caught
            if caught.code != "E303" or not any(kill.what == "worker" for kill in left.kills):
                if (folder / "run.json").exists():
                    break  # no part of the chaos
                raise
        if error is None and read_info(folder)["status"] == "done":
            break
        done = read_info(folder)["rounds_done"] if (folder / "run.json").exists() else 0
        still = tuple(str(kill) for kill in left.kills if kill.round > done)
        if len(still) == len(left.kill):  # it would be killed there again
            raise RunError("the run was killed, though not by its chaos", code="E303", where=str(folder))
        left = replace(left, kill=still)
    account = counted(folder)
    if error is not None:
        account.why, account.code = hidden(error.message), error.code
    elif not check:
        account.why = "not asked for"
    elif config.faults.norm != "off":
        account.why = "bounds of faults.norm follow from all lengths that come, refused ones included"
    elif config.privacy.noise_seed == "system":
        account.why = "cohorts and noise come from the system (privacy.noise_seed): a second run has others"
    else:
        account.expected = _expected(config, chaos, folder)
    if error is None and chaos.attack == "backdoor":
        fed = _under_attack(config, chaos)
        last = checkpoint.latest(folder / "checkpoints")
        account.fooled = None if last is None else fooled(fed, checkpoint.read(last, fed)[0])
    (folder / WHERE).write_text(json.dumps({"chaos": chaos.said(), **account.facts()}, indent=1) + "\n")
    return account


class _Killed(Exception):
    """The process of the run was killed."""


def _attempt(config: Config, chaos: Chaos, folder: Path, watcher: Watcher | bool) -> None:
    if not any(kill.what == "run" for kill in chaos.kills):
        _go(config, chaos, folder, watcher)
        return
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    arguments = (theirs, config.model_dump_json(), json.dumps(asdict(chaos)), str(folder))
    process = multiprocessing.get_context("spawn").Process(target=_child, args=arguments)
    process.start()
    theirs.close()
    try:
        said = json.loads(ours.recv_bytes())
    except EOFError:
        said = None
    process.join()
    if said is None and process.exitcode == -signal.SIGKILL:
        raise _Killed
    if said is None:
        raise RunError(f"its process ended with status {process.exitcode}", code="E303", where=str(folder))
    if said:
        raise RunError(said["message"], code=said["code"], where=said["where"], remedy=said["remedy"])


def _child(pipe: Any, config: str, chaos: str, folder: str) -> None:
    """Where the process of a run that is to be killed begins."""
    said: dict[str, Any] = {}
    given = json.loads(chaos)
    try:
        _go(configs.Config.model_validate_json(config), Chaos(**{**given, "kill": tuple(given["kill"])}), Path(folder))
    except LaminaError as error:
        said = {"message": error.message, "code": error.code, "where": error.where, "remedy": error.remedy}
    except Exception as error:  # the user's: what is told of it here is what `lamina run` would tell
        notes = getattr(error, "__notes__", [])
        if not notes:
            print(printable(hidden(traceback.format_exc())), file=sys.stderr)
        text = f"{type(error).__name__}: {' '.join(hidden(str(error)).split())[:300]}"
        said = {"message": text, "code": "E300", "where": folder, "remedy": "; ".join(notes) or None}
    pipe.send_bytes(json.dumps(said).encode())


def _go(config: Config, chaos: Chaos, folder: Path, watcher: Watcher | bool = False) -> None:
    fed = _under_attack(config, chaos)
    deadline = config.faults.reply_deadline_s
    fed = fed.through(lambda engine: Chaotic(engine, chaos, deadline))
    if (folder / "run.json").exists():
        resume(folder, fed=fed, progress=watcher)
    else:
        fit(fed, config.rounds, folder, config=config, progress=watcher)


def _under_attack(config: Config, chaos: Chaos) -> Federation:
    fed = configs.build(config)
    return attacked(fed, chaos.attack, chaos.attackers, chaos.seed) if chaos.attack else fed


def counted(folder: Path) -> Account:
    """What a run's own files say became of it."""
    info = read_info(folder)
    account = Account(str(folder), info["status"], info["rounds_done"], sha256=info["final_sha256"])
    account.bytes_up, account.bytes_down = info["bytes_up"], info["bytes_down"]
    refused: Counter[str] = Counter()
    for row in _rows(folder, CLIENTS):
        account.asked += 1
        account.used += row["refused"] is None
        refused.update([row["refused"]] if row["refused"] else ())
    beside: Counter[str] = Counter()
    for event in _rows(folder, "events.jsonl"):
        account.resumed += event["event"] == "resumed"
        account.skipped += event["event"] == "skipped"
        beside.update([event["code"]] if event.get("code") in _BESIDE else ())
    account.refused, account.beside = dict(sorted(refused.items())), dict(sorted(beside.items()))
    return account


def _rows(folder: Path, log: str) -> Iterator[dict[str, Any]]:
    """What is committed of it."""
    length = read_info(folder)["lengths"].get(log, 0)
    return read_log(folder / log, length) if length else iter(())


# ---- the same run from the survivors


class Survivors:
    """An engine that gives out the replies of some clients alone, as they are.

    Args:
        lost: (round, client) -> code, of the others.
    """

    def __init__(self, engine: Engine, lost: Mapping[tuple[int, int], str]):
        self.name, self.reason, self.workers = engine.name, engine.reason, engine.workers
        self._engine = engine
        self._lost = lost

    def replies(
        self, kind: Kind, plan: Plan, clients: Sequence[int], rows: Mapping[int, Row], pack: Pack | None = None
    ) -> Iterator[Reply]:
        for reply in self._engine.replies(kind, plan, clients, rows, pack):
            code = self._lost.get((plan.round, reply.client)) if kind in ("round", "judged") else None
            yield reply if code is None else unused(reply.client, code, "left out")

    def close(self) -> None:
        self._engine.close()


def survivors(fed: Federation, lost: Mapping[tuple[int, int], str]) -> Federation:
    """The federation from those clients alone that are not lost."""
    return fed.through(lambda engine: Survivors(engine, lost))


def _expected(config: Config, chaos: Chaos, folder: Path) -> str | None:
    """The fingerprint of the model that the survivors make; None without any round."""
    rows = _rows(folder, CLIENTS)
    lost = {(r["round"], r["client"]): r["refused"] for r in rows if r["refused"] not in (None, "E302", "E306")}
    fed = survivors(_under_attack(config, chaos), lost)
    last = None
    for state, _ in fed.run(config.rounds, evaluate_every=config.rounds):
        last = state.sha256()
    return last


def expect_survivable(config: Config, chaos: Chaos) -> None:
    """Raises ConfigError E103, E118 for what cannot be put to a chaos."""
    if chaos.attack:
        expect_attack(chaos.attack, chaos.attackers)
    late = [str(kill) for kill in chaos.kills if kill.round >= config.rounds]
    if late:
        raise ConfigError(
            f"--kill {late[0]}: this run has the rounds 0 to {config.rounds - 1}", code="E103", where="kill"
        )
