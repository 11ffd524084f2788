"""An experiment as data: from TOML, environment and `key=value` to a Federation, each key with its origin.

    default < preset < file < LAMINA_* < command line  ->  load  ->  Config  ->  build  ->  Federation
                                                                       to_toml  ->  a file that loads to the same Config

What a method, codec, model or data set takes is read off its signature, so a new one needs no change here. A part may
be written short (``method = "fedlama"``, ``uplink = "topk:0.01"``) and its keys be set one by one (``method.phi=4``).
Naming another part drops what lower layers said about the one before. ``"none"`` stands for None.

Errors: E102 unknown key, E103 impossible type or value, E104 not TOML, E105 no such file or preset, E106 an `entry`.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import inspect
import json
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, TypeAdapter, ValidationError
from torch import nn

import lamina.data
from lamina import wire
from lamina.data import ClientData
from lamina.entry import is_entry, short
from lamina.entry import sha256 as entry_sha256
from lamina.entry import thing as entry_thing
from lamina.errors import ConfigError, LaminaError, meant
from lamina.federation import Federation
from lamina.method import Chain, FedAvg, Method
from lamina.methods import ABOUT, METHODS
from lamina.metrics import Metric, chosen
from lamina.models import MODELS
from lamina.network import Network
from lamina.norms import Policy
from lamina.privacy import DP, SecureSum
from lamina.redaction import is_reference
from lamina.robust import RULES, Rule
from lamina.settings import IDLE, PARTS, SECTIONS, Key, Values, collect, is_among, merged
from lamina.store import expect_kind
from lamina.training import LocalSGD

CENTRALISED = "centralised"  # no method: all examples with one client, the point of reference
LOSSES: dict[str, Callable[..., Any]] = {
    "cross_entropy": nn.functional.cross_entropy,
    "mse": nn.functional.mse_loss,
}
_NONE = "none"
DEFAULTS = {"method": "fedavg", "uplink": "fp32", "downlink": "fp32", "aggregate": "mean"}  # parts that may go unsaid

Whole = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """A thing by name, or by `entry` in a file of the user's, with its arguments as attributes."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str | None = None
    entry: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @property
    def title(self) -> str:
        return self.name or (self.entry or "").rpartition(":")[2]


_TABLE = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)  # texts below keys: `lamina explain`


class RunOptions(BaseModel):
    """How a run is kept; nothing here changes its result."""

    model_config = _TABLE
    checkpoint_every: Literal["auto"] | Whole = "auto"
    """Rounds between two checkpoints; "auto": as often as costs 2 % of the time."""
    keep_clients_log: bool = False
    """Write clients.jsonl: a row per round and client, with its bytes up and down in all."""
    log_every: Whole | None = None
    """Rounds between two printed lines."""
    track: list[Literal["tensorboard", "mlflow", "wandb"]] = []
    """Trackers that are given every committed round, below export/ in the run folder; nothing goes online."""


class FaultOptions(BaseModel):
    """What a round puts up with, see `lamina.cohort.Faults`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    reply_deadline_s: Annotated[float, Field(gt=0)] | None = None
    min_replies: Whole | Annotated[float, Field(gt=0, le=1)] = 1
    on_quorum: Literal["fail", "skip"] = "fail"
    over_select: Annotated[float, Field(ge=1)] = 1.0
    rest_rounds: Annotated[int, Field(ge=0)] = 0
    norm: str = "off"


class StopOptions(BaseModel):
    """What ends a run before its last round, see `lamina.stop.Stop`."""

    model_config = _TABLE
    accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    """Of a tested round in which no layer waits, at least."""
    bytes: float | str | None = None
    """Up and down, of all clients since the start, at least: a number, or "1.5GB"."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Since the start; the only condition that does not give the same bits on another day."""
    network_minutes: Annotated[float, Field(gt=0)] | None = None
    """The same on the virtual network's clock."""


class NetworkOptions(BaseModel):
    """Links on which every round's time is reckoned from its bytes, see `lamina.network.Network`; none: no network."""

    model_config = _TABLE
    up: float | str | None = None
    """Bits per second from a client: "5Mbit", or a range "1Mbit..20Mbit" from which every client draws its own."""
    down: float | str | None = None
    """Bits per second to a client."""
    latency: float | str | None = None
    """One way: "40ms"."""
    step: float | str | None = None
    """Time of one local step on a client."""
    clients: str | None = None
    """A CSV file of clients' own links: client, and any of up, down, latency, step."""


class PrivacyOptions(BaseModel):
    """Client-level differential privacy, see `lamina.privacy.dp.DP`; none: none."""

    model_config = _TABLE
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of a client's update, over all its tensors together."""
    noise: Annotated[float, Field(gt=0)] | None = None
    """Standard deviation of what is added to the sum of the updates, in clips."""
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """At which epsilon is reported: well below 1 / clients; none: 1e-5."""
    noise_seed: Literal["run", "system"] | None = None
    """From where cohorts and noise come: the run's seed (none), which must then stay secret, or the system; then nobody
    can make the run again."""


class SecureOptions(BaseModel):
    """The server learns the sum of the clients' messages only, see `lamina.privacy.secure.SecureSum`; none: it sees
    each."""

    model_config = _TABLE
    bits: Annotated[int, Field(ge=8, le=62)] | None = None
    """Of an entry of an update on the wire; none: 32."""
    threshold: Annotated[float, Field(gt=0.5, le=1)] | None = None
    """Share of a round's clients that must be there to the end; none: 0.6."""
    limit: Annotated[float, Field(gt=0, le=1024)] | None = None
    """Largest absolute value of an entry of an update, a client that exceeds it is left out; none: 16."""


class SignOptions(BaseModel):
    """With what letters and answers on a real network are signed, see `lamina.remote.keys`; none: nothing is. In a
    simulation nothing travels."""

    model_config = _TABLE
    key: str | None = None
    """Where this end's key is: "env:LAMINA_KEY" or "file:/a/file/of/mode/0600"; never the key."""
    roster: str | None = None
    """A JSON file of public keys, where every end has a key of its own; none: all ends share one."""


class Config(BaseModel):
    """A whole experiment, every key resolved. Made by `load`."""

    model_config = _TABLE
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "experiment"
    """Of the experiment: its runs lie in a folder of this name. Default: the file's or the preset's."""
    rounds: Whole = 10
    """Rounds of plan, local training and aggregation."""
    seed: int = 0
    cohort: Literal["all"] | Whole = "all"
    weights: Literal["examples", "uniform"] = "examples"
    buffers: Literal["average", "keep", "skip"] = "average"
    loss: str = "cross_entropy"
    engine: Literal["auto", "loop", "processes", "threads", "stacked", "cuda"] = "auto"
    workers: Whole | None = None
    """Processes that train clients, none: one per core; on GPUs the clients that train at once, none: 8 a device."""
    evaluate_every: Whole = 1
    """Rounds between two tests of the model; the last round is always tested."""
    diagnostics: bool = True
    accuracy_before: bool = False
    through_bytes: bool = False
    store: str = "memory"
    availability: str = "always"
    budget: float | str | None = None
    """Bytes up per client and round, e.g. "100kB": a density or an interval is chosen that keeps within it."""
    model: Part
    data: Part
    method: tuple[Part, ...]
    uplink: Part
    downlink: Part
    aggregate: Part
    local: Part
    metrics: dict[str, str] = {}
    run: RunOptions = RunOptions()
    faults: FaultOptions = FaultOptions()
    stop: StopOptions = StopOptions()
    network: NetworkOptions = NetworkOptions()
    privacy: PrivacyOptions = PrivacyOptions()
    secure: SecureOptions = SecureOptions()
    sign: SignOptions = SignOptions()
    _origins: dict[Key, str] = PrivateAttr(default_factory=dict)

    def origin(self, path: str) -> str:
        """Where a key's value comes from, or a part's name or entry; e.g. ``"exp.toml:9"``."""
        parts = tuple(path.split("."))
        ways = [(*way, *last) for way in (parts, _alone(parts)) for last in ((), ("name",), ("entry",))]
        return next((self._origins[way] for way in ways if way in self._origins), "default")

    @property
    def method_paths(self) -> list[Key]:
        """Where the keys of each method stand: ("method",), or ("method", "0") and so on in a chain."""
        chained = any(path[0] == "method" and len(path) > 2 for path in self._origins)
        return [("method", str(i)) for i in range(len(self.method))] if chained else [("method",)]

    @property
    def sha256(self) -> str:
        """Of all keys that can change the result."""
        tree = self.model_dump(mode="json", exclude={"name", *(pattern.removesuffix(".*") for pattern in IDLE)})
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    @property
    def settings(self) -> dict[str, Any]:
        """Key -> value of all that can change a round, so not how many there are; an entry without its folder."""
        found = _leaves(self.model_dump(mode="json", exclude={"name"}))
        kept = [(key, value) for key, value in found if not is_among(key, (*IDLE, "rounds", "stop.*"))]
        return {key: short(value) if is_entry(value) else value for key, value in kept}

    @property
    def entry_sha256(self) -> dict[str, str | None]:
        """Key -> SHA-256 of the file that its entry names."""
        found = _leaves(self.model_dump(mode="json"))
        return {key: entry_sha256(value) for key, value in found if is_entry(value)}

    @property
    def method_title(self) -> str:
        return "+".join(part.title for part in self.method)


TABLES: dict[str, type[BaseModel]] = {
    "run": RunOptions, "faults": FaultOptions, "stop": StopOptions, "network": NetworkOptions,
    "privacy": PrivacyOptions, "secure": SecureOptions, "sign": SignOptions,
}  # fmt: skip


def _alone(path: Key) -> Key:
    """Where the keys of a method stand that is not in a chain."""
    return ("method", *path[2:]) if path[:2] == ("method", "0") else path


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted key and value of everything in it; tables in a list are numbered."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        tabled = isinstance(value, list) and any(isinstance(inner, dict) for inner in value)
        inside = {str(i): inner for i, inner in enumerate(value)} if tabled else value
        if isinstance(inside, dict):
            found += _leaves(inside, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


# ---- loading


def load(target: str | Path, arguments: Sequence[str] = (), env: Mapping[str, str] | None = None) -> Config:
    """The experiment named on a command line.

    Args:
        target: a preset, a TOML file, or a run folder (its config.toml).
        arguments: `key=value`, dotted; a value is read as TOML, else as a bare string or a list of them.
        env: variables LAMINA_KEY and LAMINA_SECTION__KEY; None: the process's own.

    Raises:
        ConfigError: E102 to E106, with the origin of what is wrong.
    """
    return resolve(collect(target, arguments, env, Config.model_fields))


def load_tables(*layers: tuple[str, Mapping[str, Any]], arguments: Sequence[str] = ()) -> Config:
    """The experiment that tables in the form of a TOML file say together: (origin, table), the lowest first; and
    `key=value` above them.

    Raises:
        ConfigError: E102 to E106, with the origin of what is wrong.
    """
    return resolve(merged(layers, arguments))


# ---- what a part takes


class _Takes(NamedTuple):
    annotation: Any
    default: Any  # inspect.Parameter.empty: it must be given


@lru_cache(maxsize=256)
def takes(thing: Any) -> Mapping[str, _Takes]:
    """Arguments of a function or class, from its signature."""
    try:
        parameters = inspect.signature(thing).parameters
    except (TypeError, ValueError):
        return {}
    hints: dict[str, Any] = {}
    for holder in (thing, getattr(thing, "__init__", None)):
        try:
            hints = {**typing.get_type_hints(holder, include_extras=True), **hints}
        except (NameError, TypeError, AttributeError):
            continue  # an annotation that cannot be read leaves the value unchecked
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: _Takes(hints.get(name, Any), p.default)
        for name, p in parameters.items()
        if p.kind in named and name != "self"
    }


def catalogue(section: str) -> Mapping[str, Callable[..., Any]]:
    """Name -> what makes it, for a section of the config."""
    match section:
        case "model":
            return MODELS
        case "data":
            return {name: getattr(lamina.data, name) for name in lamina.data.DATASETS}
        case "method":
            return {**METHODS, CENTRALISED: _centralised}
        case "aggregate":
            return {"mean": _mean, **RULES}
        case _:
            return wire.CODECS


def _centralised() -> FedAvg:
    """trains on pooled examples, as a point of reference"""
    return FedAvg()


def _mean() -> Literal["mean"]:
    """The mean, weighted by `weights`."""
    return "mean"


def about(section: str, name: str) -> str:
    """A line on a part: of a method what it does, else the first of its docstring, or of the module's where a class
    says only what it takes."""
    if section == "method" and name in ABOUT:
        return ABOUT[name]
    thing = catalogue(section)[name]
    own = (getattr(thing, "__doc__", None) or "").strip()
    if not own or own.startswith(("Args:", "No arguments")):
        own = (sys.modules[thing.__module__].__doc__ or "").strip()
    return own.splitlines()[0] if own else ""


def arguments_of(section: str, thing: Any) -> dict[str, _Takes]:
    hidden = ("progress", "verify") if section == "data" else ()
    return {name: taken for name, taken in takes(thing).items() if name not in hidden}


# ---- resolution


def resolve(values: Values) -> Config:
    """The experiment that these keys say, each with its origin. Raises ConfigError: E102, E103, E106."""
    origins = {path: origin for path, (_, origin) in values.items()}
    given: dict[Key, Any] = {path: value for path, (value, _) in values.items()}
    _refuse_unknown(given, origins)
    tree: dict[str, Any] = {}
    for name in Config.model_fields:
        if name in SECTIONS:
            continue
        if (name,) in given:
            tree[name] = _checked(annotation_of(Config, name), given[name,], name, origins[name,])
    for section, options in TABLES.items():
        tree[section] = {
            key: _checked(annotation_of(options, key), value, f"{section}.{key}", origins[section, key])
            for key, value in _below(given, (section,)).items()
        }
    tree["metrics"] = {
        key: _checked(str, value, f"metrics.{key}", origins["metrics", key])
        for key, value in _below(given, ("metrics",)).items()
    }
    tree["local"] = _arguments(LocalSGD, "local", "local", given, ("local",), origins)
    for section in ("uplink", "downlink", "aggregate"):
        if (section, "entry") not in given:
            given.setdefault((section, "name"), DEFAULTS[section])
    for section in ("model", "data", "uplink", "downlink", "aggregate"):
        tree[section] = _resolved_part(section, given, (section,), origins)
        if section in ("uplink", "downlink"):
            origins |= _said_short(section, tree[section], given, origins)
    chain = sorted({p[1] for p in given if p[0] == "method" and len(p) > 2}, key=int)
    if not chain and ("method", "entry") not in given:
        given.setdefault(("method", "name"), DEFAULTS["method"])
    paths: list[Key] = [("method", i) for i in chain] or [("method",)]
    tree["method"] = [_resolved_part("method", given, path, origins) for path in paths]
    config = Config(**tree)
    config._origins.update(origins)
    if len(config.method) > 1 and any(part.name == CENTRALISED for part in config.method):
        raise ConfigError("method: centralised stands alone", code="E103", where=config.origin("method.0"))
    method_of(config)  # impossible values show before any data is touched
    _codec(config, "uplink")
    _codec(config, "downlink")
    rule_of(config)
    norm_of(config)
    local_of(config)
    loss_of(config)
    metrics_of(config)
    privacy_of(config)
    _expect_places(config)
    expect_kind(config.store, config.origin("store"))
    return config


def _below(given: Mapping[Key, Any], prefix: Key) -> dict[str, Any]:
    return {p[-1]: v for p, v in given.items() if p[:-1] == prefix}


def annotation_of(model: type[BaseModel], key: str) -> Any:
    field = model.model_fields[key]
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def _resolved_part(section: str, given: Mapping[Key, Any], path: Key, origins: Mapping[Key, str]) -> dict[str, Any]:
    """The part with every argument written out."""
    own = _below(given, path)
    where = next((origins[p] for p in given if p[: len(path)] == path and p in origins), "default")
    if "entry" in own and "name" in own:
        raise ConfigError(f"{section}: has a name and an entry, expected one of them", code="E103", where=where)
    if "entry" in own:
        entry = _checked(str, own.pop("entry"), f"{section}.entry", where)
        return {"entry": entry, **own}
    if "name" not in own:
        title = ".".join(path)
        remedy = f"{_listing(section)}, or an entry of your own" + (f": {title}=NAME" if len(path) > 1 else "")
        raise ConfigError(f"{title} is missing", code="E103", where=where, remedy=remedy)
    name = _checked(str, own["name"], f"{section}.name", where)
    if section in ("uplink", "downlink"):
        return _resolved_codec(section, name, given, path, origins, where)
    known = catalogue(section)
    if name not in known:
        raise ConfigError(
            f"{section}: expected one of {', '.join(known)}; got {name!r}",
            code="E103",
            where=where,
            remedy=f"{meant(name, known)}  {_listing(section)}".strip(),
        )
    return {"name": name, **_arguments(known[name], section, name, given, path, origins)}


def _said_short(
    section: str, part: Mapping[str, Any], given: Mapping[Key, Any], origins: Mapping[Key, str]
) -> dict[Key, str]:
    """Origins of what a codec's name says of its arguments: ``"int8"`` is dense with values="int8"."""
    text = given.get((section, "name"))
    if text in (None, part.get("name")) or (section, "name") not in origins:
        return {}
    kind: Any = wire.CODECS[part["name"]]
    defaults = takes(kind)
    own = [key for key, value in part.items() if key in defaults and value != defaults[key].default]
    return {(section, key): origins[section, "name"] for key in own if (section, key) not in origins}


def _resolved_codec(
    section: str, text: str, given: Mapping[Key, Any], path: Key, origins: Mapping[Key, str], where: str
) -> dict[str, Any]:
    """``"topk:0.01"`` and keys beside it, as one table."""
    base = text.split(":")[0]
    kind: Any = wire.CODECS.get(base, wire.CODECS["dense"])
    known = takes(kind)
    extra = {k: v for k, v in _below(given, path).items() if k != "name"}
    for key, value in extra.items():
        _checked(known[key].annotation, value, f"{section}.{key}", origins[(*path, key)])
    try:
        codec = wire.parse({"name": text, **extra})
    except ConfigError as error:
        raise _located(error, section, where, {k: origins[(*path, k)] for k in extra}) from error
    name = next(name for name, made in wire.CODECS.items() if type(codec) is made)
    return {"name": name, **{key: getattr(codec, key) for key in known}}


def _arguments(
    thing: Callable[..., Any], section: str, title: str, given: Mapping[Key, Any], path: Key,
    origins: Mapping[Key, str],
) -> dict[str, Any]:  # fmt: skip
    known = arguments_of(section, thing)
    own = {key: value for key, value in _below(given, path).items() if key not in ("name", "entry")}
    where = origins.get((*path, "name"), origins.get(path))
    resolved: dict[str, Any] = {}
    for key, (annotation, default) in known.items():
        if key in own:
            resolved[key] = _checked(annotation, own[key], f"{section}.{key}", origins[(*path, key)])
        elif default is not inspect.Parameter.empty:
            if _is_plain(default):
                resolved[key] = list(default) if isinstance(default, tuple) else default
        else:
            raise ConfigError(f"{section}.{key} is missing: {title} needs it", code="E103", where=where)
    return resolved


def _is_plain(value: Any) -> bool:
    """Whether it can stand in a TOML file; a default that cannot is left to the thing itself."""
    return value is None or isinstance(value, str | int | float | list | tuple | dict)


def _checked(annotation: Any, value: Any, key: str, origin: str) -> Any:
    """The value as plain JSON of this type. Raises ConfigError E103."""
    optional = type(None) in typing.get_args(annotation)
    if optional and value == _NONE:
        return None
    try:
        adapter = _adapter(annotation)
        return adapter.dump_python(adapter.validate_json(json.dumps(value), strict=True), mode="json")
    except (ValidationError, TypeError):
        if key == "sign.key":  # it may be a secret
            raise ConfigError(f"{key}: expected a text", code="E103", where=origin) from None
        meanings = _meanings(value)
        got = f"the text {value!r}" if isinstance(value, str) and meanings else repr(value)
        remedy = next((_written(key, meaning) for meaning in meanings if _fits(annotation, meaning)), None)
        raise ConfigError(
            f"{key}: expected {in_words(annotation)}, got {got}", code="E103", where=origin, remedy=remedy
        ) from None


def _fits(annotation: Any, value: Any) -> bool:
    try:
        _adapter(annotation).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError):
        return False
    return True


def _meanings(value: Any) -> list[Any]:
    """Values of other types that somebody may have meant: a text that says a number, a number that is to be a text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return []
    if not isinstance(value, str):
        return [int(value), str(value)] if isinstance(value, float) and value.is_integer() else [str(value)]
    if value.strip().lower() in ("true", "false"):
        return [value.strip().lower() == "true"]
    found: list[Any] = []
    for read in (int, float, _items):
        with contextlib.suppress(ValueError):
            found.append(read(value))
    return found


def _items(text: str) -> list[Any]:
    """Numbers between commas. Raises ValueError for anything else."""
    if "," not in text:
        raise ValueError(text)
    return [int(item) if item.strip().isdigit() else float(item) for item in text.split(",")]


def _written(key: str, value: Any) -> str:
    """How to write it: a text needs quotes where it could be something else, and a shell takes one pair away."""
    plain = literal(value).replace(", ", "," if isinstance(value, list) else ", ")
    return f"write {key}='{plain}', in a file {key} = {plain}" if isinstance(value, str) else f"write {key}={plain}"


@lru_cache(maxsize=256)
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))


def in_words(annotation: Any) -> str:
    """A type in words."""
    kind, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if kind is Annotated:
        metadata = [m for entry in parts[1:] for m in getattr(entry, "metadata", [entry])]
        least = [f" >= {m.ge}" for m in metadata if getattr(m, "ge", None) is not None]
        pattern = [" of letters, digits, dots and dashes" for m in metadata if getattr(m, "pattern", None)]
        return in_words(parts[0]) + "".join(least + pattern)
    if kind in (typing.Union, types.UnionType):
        words = [in_words(p) for p in parts if typing.get_origin(p) is not Callable and p is not Path]
        return " or ".join(dict.fromkeys(words))
    if kind is Literal:
        return " or ".join(repr(choice) for choice in parts) if len(parts) < 3 else f"one of {', '.join(parts)}"
    if kind is not None and issubclass(kind, Mapping):
        return "a table"
    if kind is not None and issubclass(kind, Sequence):
        return f"a list ({', '.join(in_words(p) for p in parts if p is not Ellipsis)})"
    simple: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return {**simple, type(None): repr(_NONE), dict: "a table"}.get(annotation, str(annotation))


# ---- unknown keys


def _refuse_unknown(given: Mapping[Key, Any], origins: Mapping[Key, str]) -> None:
    fixed = {"local": list(takes(LocalSGD)), **{name: list(table.model_fields) for name, table in TABLES.items()}}
    for path, value in given.items():
        section = path[0]
        if section == "preset":
            message = "unknown key  preset: it stands in a file, or as the first argument of the command line"
            raise ConfigError(message, code="E102", where=origins[path])
        if section not in Config.model_fields:
            raise _unknown(path, origins[path], given, "")
        sectioned = section in SECTIONS
        if sectioned and len(path) == 1:
            raise ConfigError(f"{section}: expected a table, got {value!r}", code="E103", where=origins[path])
        if not sectioned and len(path) > 1:
            raise _unknown(path, origins[path], given, f"{section} has no keys of its own.  ")
        if section in fixed and path[-1] not in fixed[section]:
            raise _unknown(path, origins[path], given, f"{section} takes: {', '.join(fixed[section])}.  ")
        if section in PARTS and path[-1] not in ("name", "entry"):
            known = _known_arguments(section, given, path[:-1])
            if known is not None and path[-1] not in known[1]:
                title, names = known
                takes_text = f"{title} takes: {', '.join(names)}.  " if names else f"{title} takes no arguments.  "
                raise _unknown(path, origins[path], given, takes_text + _owners(section, path[-1]))


def _known_arguments(section: str, given: Mapping[Key, Any], path: Key) -> tuple[str, list[str]] | None:
    """Title and arguments of the part at this path; None where anything goes, or the name is wrong itself."""
    if (*path, "entry") in given:
        return None
    default = DEFAULTS.get(section)
    name = given.get((*path, "name"), default if len(path) == 1 else None)  # in a chain every method has a name
    if section in ("uplink", "downlink") and isinstance(name, str):
        base = name.split(":")[0]
        name = base if base in wire.CODECS else "dense"
    thing = catalogue(section).get(str(name)) if isinstance(name, str) else None
    return None if thing is None else (str(name), list(arguments_of(section, thing)))


def _owners(section: str, key: str) -> str:
    owners = [name for name, thing in catalogue(section).items() if key in arguments_of(section, thing)]
    return f"{key} belongs to {', '.join(owners[:4])}.  " if owners and len(owners) <= 4 else ""


def _unknown(path: Key, origin: str, given: Mapping[Key, Any], more: str) -> ConfigError:
    key = ".".join(path)
    close = None if "belongs to" in more else closest(key, _all_keys(given))
    remedy = more + (f"did you mean {close!r}?" if close else "")
    return ConfigError(f"unknown key  {key}", code="E102", where=origin, remedy=remedy.strip() or None)


def _all_keys(given: Mapping[Key, Any]) -> list[str]:
    """Every key that could be said here."""
    keys = [name for name in Config.model_fields if name not in ("local", *TABLES)] + ["preset"]
    keys += [f"local.{name}" for name in takes(LocalSGD)]
    keys += [f"{section}.{name}" for section, table in TABLES.items() for name in table.model_fields]
    chain = {path[:2] for path in given if path[0] == "method" and len(path) > 2}
    paths: list[Key] = [(section,) for section in PARTS if section != "method" or not chain]
    for path in (*paths, *sorted(chain)):
        known = _known_arguments(path[0], given, path)
        keys += [".".join((*path, name)) for name in ("name", "entry", *(known[1] if known else ()))]
    return keys


def closest(key: str, known: Iterable[str]) -> str | None:
    """By likeness, section by section; a key without its section counts as that of any."""

    def likeness(other: str) -> float:
        mine, theirs = key.split("."), other.split(".")
        if len(mine) != len(theirs):
            mine, theirs, discount = mine[-1:], theirs[-1:], 0.95
        else:
            discount = 1.0
        ratios = [difflib.SequenceMatcher(None, a, b).ratio() for a, b in zip(mine, theirs, strict=True)]
        return discount * sum(ratios) / len(ratios)

    best = max(known, key=likeness)
    return best if likeness(best) >= 0.6 else None


def _listing(section: str) -> str:
    listed = {"model": "models", "data": "data", "method": "methods", "aggregate": "rules"}
    return f"`lamina list {listed[section]}`"


# ---- building


def build(
    config: Config,
    progress: Callable[[str, str, int, int], None] | None = None,
    data: ClientData | None = None,
) -> Federation:
    """The federation of this config; its data is fetched if need be.

    Args:
        progress: called while data is fetched, as (name, stage, done, total).
        data: instead of the config's, where clients are elsewhere.

    Raises:
        LaminaError: what is impossible, with the origin of the key.
    """
    if config.budget is not None:
        raise ConfigError(
            f"budget={config.budget}: nothing has been chosen yet that keeps within it",
            code="E107",
            where="budget",
            remedy="`lamina run` chooses; in Python lamina.inspect.within(config).config",
        )
    held = data_of(config, progress) if data is None else data
    try:
        return Federation(
            model_of(config),
            held,
            method=method_of(config),
            uplink=_codec(config, "uplink"),
            downlink=_codec(config, "downlink"),
            local=local_of(config),
            cohort="all" if _pools(config) else config.cohort,
            weights=config.weights,
            buffers=config.buffers,
            loss=loss_of(config),
            metrics=metrics_of(config),
            aggregate=rule_of(config),
            seed=config.seed,
            engine=config.engine,
            workers=config.workers,
            diagnostics=config.diagnostics,
            accuracy_before=config.accuracy_before,
            through_bytes=config.through_bytes,
            store=config.store,
            faults=config.faults.model_dump(),
            availability=config.availability,
            network=network_of(config),
            privacy=privacy_of(config),
            secure=secure_of(config),
        )
    except ConfigError as error:
        section = (error.where or "").split(".")[0]
        if section in Config.model_fields:
            where = f"{error.where}, {config.origin(error.where or '')}"
            raise ConfigError(error.message, code=error.code, where=where, remedy=error.remedy) from error
        raise


def data_of(config: Config, progress: Callable[[str, str, int, int], None] | None = None) -> ClientData:
    """As the clients of this config's federation hold it: fetched if need be, and pooled where it is centralised."""
    data = _split_of(config, progress)
    return data.pooled() if _pools(config) else data


def _pools(config: Config) -> bool:
    return any(part.name == CENTRALISED for part in config.method)


def _split_of(config: Config, progress: Callable[[str, str, int, int], None] | None) -> ClientData:
    part, where = config.data, config.origin("data")
    if part.entry is not None:
        made = _made(part, config, ("data",))
        if not isinstance(made, ClientData):
            message = f"{short(part.entry)} gave {type(made).__name__}, expected a lamina.ClientData"
            raise ConfigError(message, code="E106", where=where)
        return made
    options = dict(part.arguments)
    if progress is not None and "progress" in takes(catalogue("data")[str(part.name)]):
        options["progress"] = progress
    try:
        return catalogue("data")[str(part.name)](**options)  # type: ignore[no-any-return]
    except ConfigError as error:
        key = next((k for k in part.arguments if k in f"{error.where or ''}:{error.message}"), "name")
        raise ConfigError(
            f"data.{key}: {error.message}", code=error.code, where=config.origin(f"data.{key}"), remedy=error.remedy
        ) from error


def model_of(config: Config) -> Callable[[], nn.Module]:
    """What makes the model; Federation calls it under the seed."""
    part, where = config.model, config.origin("model")
    if part.entry is not None:
        return lambda: typing.cast("nn.Module", _made(part, config, ("model",)))
    make, arguments = MODELS[str(part.name)], part.arguments

    def made() -> nn.Module:
        try:
            return make(**arguments)
        except ConfigError as error:
            raise _located(error, "model", where, {k: config.origin(f"model.{k}") for k in arguments}) from error

    return made


def method_of(config: Config) -> Method[Any, Any]:
    methods = []
    for path, part in zip(config.method_paths, config.method, strict=True):
        where = config.origin(".".join(path))
        if part.entry is not None:
            made = _made(part, config, path)
        else:
            keys = {k: config._origins.get((*path, k), where) for k in part.arguments}
            made = _constructed(catalogue("method")[str(part.name)], part.arguments, "method", where, keys)
        if not isinstance(made, Method):
            raise ConfigError(
                f"{part.title} gave {type(made).__name__}, expected a lamina.Method", code="E106", where=where
            )
        methods.append(made)
    if len(methods) == 1:
        return methods[0]
    try:
        return Chain(*methods)
    except ConfigError as error:
        raise _located(error, "method", config.origin("method.0"), {}) from error


def rule_of(config: Config) -> Literal["mean"] | Rule:
    part, where = config.aggregate, config.origin("aggregate")
    if part.entry is not None:
        made = _made(part, config, ("aggregate",))
    else:
        keys = {key: config.origin(f"aggregate.{key}") for key in part.arguments}
        made = _constructed(catalogue("aggregate")[str(part.name)], part.arguments, "aggregate", where, keys)
    if made == "mean" or (isinstance(made, Rule) and not isinstance(made, type)):
        return typing.cast("Literal['mean'] | Rule", made)
    needed = "expected a rule with expect(clients) and combine(updates, weights)"
    raise ConfigError(f"{part.title} gave {type(made).__name__}, {needed}", code="E106", where=where)


def norm_of(config: Config) -> Policy:
    try:
        return Policy.of(config.faults.norm)
    except ConfigError as error:
        origin = config.origin("faults.norm")
        raise ConfigError(f"faults.{error.message}", code=error.code, where=origin, remedy=error.remedy) from error


def local_of(config: Config) -> LocalSGD:
    arguments = config.local.arguments
    keys = {key: config.origin(f"local.{key}") for key in arguments}
    made = _constructed(LocalSGD, arguments, "local", "default", keys)
    assert isinstance(made, LocalSGD)  # it is what was called
    return made


def network_of(config: Config) -> Network | None:
    """The virtual network, if any of its keys is set."""
    said = config.network.model_dump(exclude_none=True)
    return Network(**said) if said else None


def privacy_of(config: Config) -> DP | None:
    """Differential privacy, if any of its keys is set. Raises ConfigError E103 where one is missing."""
    said = config.privacy.model_dump(exclude_none=True)
    missing = [key for key in ("clip", "noise") if key not in said]
    if said and missing:
        where = config.origin(f"privacy.{next(iter(said))}")
        example = f"for example privacy.{missing[0]}=1.0"
        raise ConfigError(f"privacy.{missing[0]} is missing", code="E103", where=where, remedy=example)
    return DP(**said) if said else None


def secure_of(config: Config) -> SecureSum | None:
    """Secure sums, if any of their keys is set."""
    said = config.secure.model_dump(exclude_none=True)
    return SecureSum(**said) if said else None


def _expect_places(config: Config) -> None:
    """Raises ConfigError E124 for a key of `sign` that says no place: it may be a secret, so it is not repeated."""
    key, roster = config.sign.key, config.sign.roster
    if key is not None and not is_reference(key):
        raise ConfigError(
            "sign.key: expected env:NAME or file:PATH; what was given is not repeated here",
            code="E124",
            where=config.origin("sign.key"),
            remedy='sign.key = "env:LAMINA_KEY"',
        )
    if roster is not None and key is None:
        raise ConfigError("sign.roster without sign.key", code="E124", where=config.origin("sign.roster"))


def loss_of(config: Config) -> Callable[..., Any] | Literal["cross_entropy"]:
    """`Federation` knows the first by name, for what it prints."""
    if config.loss == "cross_entropy":
        return "cross_entropy"
    if is_entry(config.loss):
        made: Callable[..., Any] = entry_thing(config.loss, config.origin("loss"))
        return made
    if config.loss not in LOSSES:
        raise ConfigError(
            f'loss: expected one of {", ".join(LOSSES)}, or an entry "mine.py:loss"; got {config.loss!r}',
            code="E103",
            where=config.origin("loss"),
            remedy=meant(config.loss, LOSSES) or None,
        )
    return LOSSES[config.loss]


def metrics_of(config: Config) -> dict[str, Metric]:
    """Name -> function."""
    try:
        return chosen(
            {
                name: entry_thing(said, config.origin(f"metrics.{name}")) if is_entry(said) else said
                for name, said in config.metrics.items()
            }
        )
    except ConfigError as error:
        where = error.where or ""
        origin = config.origin(where) if where.startswith("metrics.") else where
        raise ConfigError(error.message, code=error.code, where=origin, remedy=error.remedy) from error


def _codec(config: Config, section: Literal["uplink", "downlink"]) -> wire.Codec:
    part = config.uplink if section == "uplink" else config.downlink
    if part.entry is not None:
        codec: wire.Codec = _made(part, config, (section,))
        return codec
    return wire.parse({"name": part.name, **part.arguments})


def _constructed(
    thing: Callable[..., Any], arguments: Mapping[str, Any], section: str, where: str, keys: Mapping[str, str]
) -> Any:
    try:
        return thing(**arguments)
    except ConfigError as error:
        raise _located(error, section, where, keys) from error


def _located(error: ConfigError, section: str, where: str, keys: Mapping[str, str]) -> ConfigError:
    """The same error, with the section and the origin of the key it begins with (``"phi=0: expected ..."``)."""
    found = re.match(r"(\w+)=", error.message)
    key = found[1] if found else ""
    message = f"{section}.{error.message}" if key in keys else f"{section}: {error.message}"
    return ConfigError(message, code=error.code, where=keys.get(key, where), remedy=error.remedy)


# ---- a user's own parts


def _made(part: Part, config: Config, path: Key) -> Any:
    """What an entry stands for: an instance as it is; thing(cfg) when it takes one argument that is not a key of the
    part; else thing(keys)."""
    where = config.origin(".".join(path))
    entry = str(part.entry)
    thing = entry_thing(entry, where)
    if not callable(thing) or isinstance(thing, nn.Module | Method | ClientData):
        return thing
    known, keys = takes(thing), part.arguments
    needed = [name for name, taken in known.items() if taken.default is inspect.Parameter.empty and name not in keys]
    if len(needed) > 1:
        raise ConfigError(
            f"{short(entry)} takes {', '.join(needed)}: expected one argument, cfg", code="E106", where=where
        )
    if not needed:
        for key, value in keys.items():
            title, origin = ".".join((*path, key)), config._origins.get((*path, key), where)
            if key not in known:
                takes_text = f"{short(entry)} takes: {', '.join(known) or 'no arguments'}.  {meant(key, known)}"
                raise ConfigError(f"unknown key  {title}", code="E102", where=origin, remedy=takes_text.strip())
            keys[key] = _checked(known[key].annotation, value, title, origin)
    try:
        return thing(config) if needed else thing(**keys)
    except LaminaError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"{short(entry)} failed: {type(error).__name__}: {error}",
            code="E106",
            where=f"{Path(frame.filename).name}:{frame.lineno}",
        ) from error


# ---- writing


def to_toml(config: Config) -> str:
    """Every key, with its origin as a comment. `load` makes the same Config of it."""
    lines: list[tuple[str, str]] = []

    def put(path: Key, value: Any) -> None:
        lines.append((f"{path[-1]} = {literal(value)}", config._origins.get(path, "default")))

    tree = config.model_dump(mode="json")
    for key, value in tree.items():
        if not isinstance(value, dict) and key != "method":
            put((key,), value)
    for section in (*PARTS, "local", "metrics", *TABLES):
        tables = tree[section] if section == "method" else [tree[section]]
        chained = section == "method" and config.method_paths != [("method",)]
        for i, table in enumerate(tables):
            if not table:
                continue
            lines.append(("", ""))
            lines.append((f"[[{section}]]" if chained else f"[{section}]", ""))
            for key, value in table.items():
                if value is not None or key not in ("name", "entry"):
                    put((section, str(i), key) if chained else (section, key), value)
    width = max((len(text) for text, origin in lines if origin), default=0)
    return "".join(f"{text:<{width}}  # {origin}".rstrip() + "\n" if origin else text + "\n" for text, origin in lines)


def changed(config: Config) -> list[tuple[str, Any, str]]:
    """Key, value and origin of everything that was said."""
    tree = config.model_dump(mode="json")
    found = []
    for path, origin in config._origins.items():
        value: Any = tree
        for key in path:
            if isinstance(value, list) and not key.isdigit():
                value = value[0]
            value = value[int(key)] if isinstance(value, list) else value.get(key)
        if origin != "default":
            found.append((".".join(path), value, origin))
    return found


def literal(value: Any) -> str:
    """A value as TOML."""
    match value:
        case None:
            return f'"{_NONE}"'
        case bool():
            return str(value).lower()
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case int() | float():
            return repr(value)
        case dict():
            return "{ " + ", ".join(f"{_key(k)} = {literal(v)}" for k, v in value.items()) + " }"
        case _:
            return "[" + ", ".join(literal(v) for v in value) + "]"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)
