"""`lamina explain`: words, keys, files, the schema."""

from __future__ import annotations

import json
import random
import re
import string
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import blocks
import lamina
from lamina import cli, config, explain, settings
from lamina.errors import ConfigError
from lamina.explain import files, keys, schema


def said(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["explain", *arguments])


# ---- words


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("E103", "wrong type"),
        ("e103", "wrong type"),
        ("fedlama", "gets interval phi"),
        ("FedLAMA", "method.warmup"),
        ("local.lr", "learning rate, > 0"),
        ("method.phi", "the long interval, in rounds, >= 1"),
        ("phi", "method fedlama"),
        ("local", "local.momentum"),
        ("uplink", "How updates are coded"),
        ("topk", "uplink.density=..."),
        ("fashion-mnist", "60,000 + 10,000"),
        ("resnet20", "model.receptive_field"),
        ("quickstart", 'partition = "dirichlet:0.5"'),
        ("files", "layers.jsonl"),
        ("layers.jsonl", "relative to what they agree on"),
        ("MANIFEST.json", "SHA-256"),
        ("codes", "E404"),
        ("keys", "run.checkpoint_every"),
    ],
)
def test_a_word_is_explained(word: str, found: str) -> None:
    result = said(word)
    assert result.exit_code == 0, result.output
    assert found in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("word", "meant"),
    [("fedlma", "fedlama"), ("E130", "E103"), ("local.lrr", "local.lr"), ("metric.jsonl", "metrics.jsonl"), ("momentun",
     "local.momentum")],
)  # fmt: skip
def test_an_unknown_word_is_answered_by_those_that_are_close(word: str, meant: str) -> None:
    result = said(word)
    assert result.exit_code == 2
    assert meant in result.stderr
    assert "did you mean" in result.stderr


def test_a_word_that_is_like_nothing_points_to_the_list() -> None:
    with pytest.raises(ConfigError, match="no code, part, key or file") as caught:
        explain.explain("qqqqqqqqqqq")
    assert caught.value.remedy == "`lamina explain` lists what there is"


def test_everything_there_is_has_an_answer_that_fits_the_screen_and_is_json() -> None:
    """Only code, tables and single long words may be wider: they are copied, not read."""
    for name in explain.names():
        answer = explain.explain(name)
        json.dumps(answer.facts)
        if answer.kind in ("code", "key", "file"):
            wide = [line for line in answer.lines(80) if len(line) > 80 and not line.startswith("    ")]
            assert not wide, name


def test_json_is_one_object() -> None:
    (line,) = said("E103", "--json").stdout.splitlines()
    assert json.loads(line)["kind"] == "code"
    (line,) = said("local.lr", "--json").stdout.splitlines()
    assert json.loads(line)["takes"][0]["default"] == 0.1


def test_output_is_plain_where_nobody_looks() -> None:
    assert "\x1b" not in said("fedlama").stdout


def test_completion_knows_the_commands() -> None:
    """What a shell asks of typer's completion: which words may follow `lamina ex`."""
    asked = {"_LAMINA_COMPLETE": "complete_bash", "COMP_WORDS": "lamina expl", "COMP_CWORD": "1"}
    result = CliRunner().invoke(cli.app, [], prog_name="lamina", env=asked)
    assert "explain" in result.stdout.split()
    shown = CliRunner().invoke(cli.app, ["--show-completion", "bash"], prog_name="lamina")
    assert "_LAMINA_COMPLETE" in shown.output or "shell" in shown.output.lower()


# ---- keys


def test_every_key_says_what_it_means() -> None:
    silent = [f"{key.name} of {taken.by}" for key in keys.known().values() for taken in key.taken if not taken.meaning]
    assert not silent, "a line in its Args:, or a text below it in config.py"


def test_the_default_of_a_key_is_the_one_that_is_used() -> None:
    resolved = config.load("quickstart", ["method=fedlama"], {})
    known = keys.known()
    (phi,) = [taken for taken in known["method.phi"].taken if taken.by == "method fedlama"]
    assert phi.default == resolved.method[0].arguments["phi"]
    assert known["local.schedule"].taken[0].default == resolved.local.arguments["schedule"]
    assert known["buffers"].taken[0].default == resolved.buffers


def mistyped(key: str, draw: random.Random) -> str:
    """One edit: a letter left out, doubled, swapped with the next, or another one; never of the section."""
    head, dot, tail = key.rpartition(".")
    place = draw.randrange(len(tail) - 1)
    match draw.choice(("less", "twice", "swapped", "other")):
        case "less":
            tail = tail[:place] + tail[place + 1 :]
        case "twice":
            tail = tail[:place] + tail[place] + tail[place:]
        case "swapped":
            tail = tail[:place] + tail[place + 1] + tail[place] + tail[place + 2 :]
        case _:
            tail = tail[:place] + draw.choice(string.ascii_lowercase) + tail[place + 1 :]
    return head + dot + tail


def test_60_seeded_typos_in_keys_get_58_right_suggestions() -> None:
    """Through `load`, as a person meets them: half have lost their section as well."""
    draw = random.Random(2026)
    base = ["method=fedlama", "uplink=topk:0.1"]
    given: dict[Any, Any] = {("method", "name"): "fedlama", ("uplink", "name"): "topk", ("model", "name"): "mlp",
                             ("data", "name"): "digits"}  # fmt: skip
    known = [key for key in config._all_keys(given) if len(key.rpartition(".")[2]) > 3 and not key.endswith(".entry")]
    endings = [key.rpartition(".")[2] for key in known]
    right, wrong = 0, []
    while right + len(wrong) < 60:
        key = draw.choice(known)
        typo = mistyped(key, draw)
        ending = typo.rpartition(".")[2]
        if draw.random() < 0.5 and endings.count(key.rpartition(".")[2]) == 1:
            typo = ending
        if typo in known or ending in endings:
            continue
        with pytest.raises(ConfigError) as caught:
            config.load("quickstart", [*base, f"{typo}=1"], {})
        if caught.value.code == "E102" and f"did you mean '{key}'?" in (caught.value.remedy or ""):
            right += 1
        else:
            wrong.append((key, typo, str(caught.value)))
    assert right >= 58, wrong


# ---- files


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run with all logs, resumed after one checkpoint was damaged; and one of which messages are refused."""
    root = tmp_path_factory.mktemp("files")
    options = ["engine=loop", "run.keep_clients_log=true", "run.checkpoint_every=1", "local.epochs=1"]
    with blocks.elsewhere(root):
        for command in (
            ["run", "quickstart", "method=fedlama", "rounds=3", *options],
            ["run", "quickstart", "rounds=1", "local.lr=1e30", *options],
        ):
            CliRunner().invoke(cli.app, command)
        first = next((root / "runs").glob("*/001-*"))
        (first / "checkpoints" / "round-000003" / "server.safetensors").write_bytes(b"")
        assert CliRunner().invoke(cli.app, ["resume", "001", "rounds=4"]).exit_code == 0
        x, y = torch.randn(6, 4), torch.tensor([0, 1] * 3)
        data = lamina.ClientData.from_clients({"a": (x, y), "b": (x * 3e37, y)}, test=(x, y))
        fed = lamina.Federation(
            lamina.models.mlp((4, 2)),
            data,
            local=lamina.LocalSGD(lr=1e3, epochs=2),
            accuracy_before=True,
            engine="loop",
        )
        fed.fit(3, "runs/mine", progress=False)
    return [first, *(path.parent for path in (root / "runs").glob("quickstart/002-*/run.json")), root / "runs" / "mine"]


def written(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]


def dotted(document: Any, prefix: str = "") -> set[str]:
    """Keys of a JSON document; those of tables in a list count once."""
    found: set[str] = set()
    for table in document if isinstance(document, list) else [document]:
        for key, value in table.items():
            found.add(prefix + key)
            deeper = isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict))
            found |= dotted(value, f"{prefix}{key}.") if deeper else set()
    return found


def test_every_file_of_a_run_is_described(folders: list[Path]) -> None:
    for folder in folders:
        unknown = [name for name in written(folder) if files.described(name) is None]
        assert not unknown, "say in lamina/explain/files.py what they are"


def test_every_column_of_a_run_is_described_and_there_is_no_other(folders: list[Path]) -> None:
    """Rows and documents of these runs have the described columns; what no run here writes is named."""
    seen: dict[str, set[str]] = {}
    for folder in folders:
        for name in written(folder):
            file = files.described(name)
            assert file is not None
            text = (folder / name).read_text(encoding="utf-8") if name.endswith((".json", ".jsonl")) else ""
            if not file.columns:
                continue
            rows = [json.loads(line) for line in text.splitlines()] if name.endswith("l") else [json.loads(text)]
            found = seen.setdefault(file.name, set())
            for row in rows:
                found |= set(row) if name.endswith("l") else dotted(row)
    for name, found in seen.items():
        columns = set(next(file for file in files.FILES if file.name == name).columns)
        starred = {column.removesuffix("*") for column in columns if column.endswith(".*")}
        unknown = {key for key in found - columns if not key.startswith(tuple(starred))} if starred else found - columns
        assert not unknown, f"{name}: say in lamina/explain/files.py what they mean"
        unseen = {column for column in columns - found if not column.endswith("*")}
        elsewhere = {"events.jsonl": {"why", "tracker"}, "run.json": {"stopped"},
                     "layers.jsonl": {"clipped", "mask_churn", "residual_norm"}}  # fmt: skip
        assert unseen <= elsewhere.get(name, set()), f"{name} does not have them"
    assert {"metrics.jsonl", "layers.jsonl", "bytes.jsonl", "clients.jsonl", "events.jsonl"} <= seen.keys()


# ---- schema


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    made = json.loads(said("schema").stdout)
    jsonschema.Draft7Validator.check_schema(made)
    return jsonschema.Draft7Validator(made)


@pytest.mark.parametrize("name", settings.presets())
def test_presets_and_what_they_resolve_to_fit_the_schema(name: str, validator: Any) -> None:
    validator.validate(tomllib.loads(settings.presets()[name]))
    validator.validate(tomllib.loads(config.to_toml(config.load(name, [], {}))))


RIGHT = [
    'preset = "quickstart"\nrounds = 3\nmethod = "fedlama"',
    'preset = "quickstart"\n[method]\nphi = 4',
    'method = { name = "fedlama", phi = 4 }\nuplink = "topk:0.01:sign"\ndownlink = "lossless"',
    'uplink = { name = "topk", density = 0.01, values = "int8" }',
    '[[method]]\nname = "ssfl"\ndensity = 0.4\n[[method]]\nname = "fedlama"',
    'method = ["ssfl", "fedlama"]',
    'model = { entry = "mine.py:model", width = 3 }\ndata = "mine.py:data"',
    'local = { lr = 1, clip = "none", batch_size = 16 }\nworkers = "none"',
    'metrics = { auc = "mine.py:auc" }\ncohort = "all"',
]
WRONG = [
    ("ronds = 3", "ronds"),
    ('rounds = "3"', "rounds"),
    ("rounds = 0", "rounds"),
    ('method = "fedlma"', "method"),
    ('method = { name = "fedlama", phy = 4 }', "method"),
    ('method = { name = "fedavg", phi = 4 }', "method"),
    ('uplink = "top:0.1"', "uplink"),
    ("local = { lr = true }", "local"),
    ('buffers = "mean"', "buffers"),
    ("run = { log_evry = 3 }", "run"),
]


@pytest.mark.parametrize("text", RIGHT)
def test_a_right_file_fits_the_schema(text: str, validator: Any) -> None:
    assert not [error.message for error in validator.iter_errors(tomllib.loads(text))]


@pytest.mark.parametrize(("text", "key"), WRONG)
def test_a_wrong_file_does_not_fit_where_it_is_wrong(text: str, key: str, validator: Any) -> None:
    errors = list(validator.iter_errors(tomllib.loads(text)))
    assert errors
    assert all(key in str(list(error.absolute_path)) or key in error.message for error in errors)


def test_the_schema_and_load_agree_on_what_is_wrong(tmp_path: Path) -> None:
    for text, _ in WRONG:
        (tmp_path / "wrong.toml").write_text(f'preset = "quickstart"\n{text}\n')
        with pytest.raises(ConfigError) as caught:
            config.load(tmp_path / "wrong.toml", [], {})
        assert re.fullmatch("E10[1-3]", caught.value.code), text


def test_every_key_of_the_schema_has_its_text() -> None:
    made = schema.made()
    assert all("description" in made["properties"][key] for key in ("rounds", "cohort", "method", "uplink", "buffers"))
    assert made["properties"]["local"]["properties"]["lr"]["description"] == "learning rate, > 0."
