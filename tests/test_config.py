"""Configs: layers with origins, errors that say where and what was meant, and files that load to the same again."""

from __future__ import annotations

import random
import shlex
import string
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from lamina import FedAvg, FedLAMA, Method, config, wire
from lamina.config import Config, build, changed, load, to_toml
from lamina.engine import ENGINES
from lamina.errors import ConfigError
from lamina.settings import presets


def quick(*arguments: str, env: dict[str, str] | None = None) -> Config:
    return load("quickstart", arguments, env or {})


def refused(*arguments: str, target: str | Path = "quickstart", env: dict[str, str] | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        build(load(target, arguments, env or {}))
    return caught.value


def toml(folder: Path, text: str, name: str = "exp.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# ---- layers


def test_a_later_layer_overrides_an_earlier_one(tmp_path: Path) -> None:
    path = toml(tmp_path, 'preset = "quickstart"\nrounds = 3\ncohort = 4\nseed = 5\n')
    made = load(path, ["seed=7"], {"LAMINA_COHORT": "2", "LAMINA_SEED": "6", "LAMINA_LOCAL__LR": "0.25"})
    assert (made.rounds, made.cohort, made.seed) == (3, 2, 7)
    assert made.local.arguments["lr"] == 0.25
    assert made.model.name == "mlp"
    assert made.weights == "examples"


def test_every_key_keeps_its_origin(tmp_path: Path) -> None:
    text = 'preset = "quickstart"\n\nrounds = 3\nmethod = { name = "fedlama", phi = 4 }\n[local]\nlr = 0.5\n'
    made = load(toml(tmp_path, text), ["data.partition=iid"], {"LAMINA_COHORT": "2"})
    assert made.origin("rounds") == "exp.toml:3"
    assert made.origin("method.phi") == "exp.toml:4"
    assert made.origin("local.lr") == "exp.toml:6"
    assert made.origin("cohort") == "environment LAMINA_COHORT"
    assert made.origin("data.partition") == "command line, argument 2"
    assert made.origin("model.widths") == "preset quickstart"
    assert made.origin("workers") == "default"


def test_shorthands_take_keys_one_by_one() -> None:
    made = quick(
        "method=fedlama", "method.phi=4", "uplink=topk:0.01", "uplink.values=sign", "data.partition=dirichlet:0.3"
    )
    fed = build(made)
    assert fed.method == FedLAMA(phi=4)
    assert fed.uplink == wire.TopK(0.01, values="sign")
    assert fed.downlink == wire.Dense()
    assert fed.data.partition == "dirichlet:0.3"


def test_order_on_the_command_line_does_not_matter_between_a_name_and_its_keys() -> None:

    assert build(quick("method.phi=4", "method=fedlama")).method == FedLAMA(phi=4)


def test_naming_another_part_drops_what_was_said_about_the_one_before(tmp_path: Path) -> None:
    path = toml(tmp_path, 'preset = "quickstart"\nmethod = { name = "fedlama", phi = 4 }\nuplink = "topk:0.1:sign"\n')
    assert build(load(path, ["method=fedprox", "uplink=int8"], {})).method.mu == 0.01  # type: ignore[attr-defined]
    assert load(path, ["method=fedlama"], {}).method[0].arguments["phi"] == 4
    assert load(path, ["uplink=topk:0.2"], {}).uplink.arguments["values"] == "fp32"


def test_a_list_of_methods_is_a_chain(tmp_path: Path) -> None:
    text = 'preset = "quickstart"\nmethod = ["fedlama", { name = "fedadam", lr = 0.1 }]\n'
    made = load(toml(tmp_path, text), ["method.0.phi=4"], {})
    assert repr(build(made).method) == "Chain(FedLAMA(phi=4, warmup=0), FedAdam(lr=0.1, b1=0.9, b2=0.99, eps=0.001))"
    assert made.method_title == "fedlama+fedadam"
    assert len(load(toml(tmp_path, text), ["method=fedavg"], {}).method) == 1


def test_values_are_toml_then_bare_strings() -> None:
    made = quick("model.widths=[64, 32, 10]", "local.steps=3", "local.batch_size=none", "engine=loop", 'name="x"')
    assert made.model.arguments["widths"] == [64, 32, 10]
    assert made.local.arguments["batch_size"] is None
    assert made.name == "x"


def test_none_stands_for_none_only_where_none_is_possible() -> None:
    assert refused("rounds=none").code == "E103"
    assert quick("workers=none").workers is None


def test_variables_of_the_environment_that_are_no_keys_are_left_alone() -> None:
    env = {"LAMINA_RUNS": "x", "LAMINA_DATA": "y", "LAMINA_DATA_MNIST": "z", "LAMINA_OFFLINE": "1"}
    assert quick(env=env).data.name == "digits"
    assert quick(env={"LAMINA_DATA__CLIENTS": "7"}).data.arguments["clients"] == 7


# ---- errors


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("method.phy=4", "fedlama takes: phi, warmup.  did you mean 'method.phi'?"),
        ("roundz=4", "did you mean 'rounds'?"),
        ("lr=4", "did you mean 'local.lr'?"),
        ("data.partion=iid", "did you mean 'data.partition'?"),
        ("local.momentun=0.5", "did you mean 'local.momentum'?"),
        ("uplink.densty=0.5", "dense takes: values."),
        ("method.mu=4", "mu belongs to fedprox."),
        ("rounds.x=1", "expected a whole number >= 1"),
    ],
)
def test_an_unknown_key_says_where_it_stands_and_what_was_meant(argument: str, said: str) -> None:
    error = refused("method=fedlama", argument)
    assert error.code in ("E102", "E103")
    assert error.where == "command line, argument 3"
    assert said in str(error)


def test_an_unknown_key_of_a_file_says_its_line(tmp_path: Path) -> None:
    error = refused(target=toml(tmp_path, 'preset = "quickstart"\n[local]\nlr = 0.1\nmomentun = 0.9\n'))
    assert (error.code, error.where) == ("E102", "exp.toml:4")


def test_a_stray_variable_warns_and_one_of_a_section_is_refused() -> None:
    with pytest.warns(UserWarning, match="LAMINA_ROUNDZ of the environment is no key .* did you mean 'LAMINA_ROUNDS'"):
        assert quick(env={"LAMINA_ROUNDZ": "3"}).rounds == quick().rounds
    with pytest.warns(UserWarning, match="LAMINA_FOO__BAR"):
        quick(env={"LAMINA_FOO__BAR": "3"})
    assert refused(env={"LAMINA_LOCAL__MOMENTUN": "3"}).where == "environment LAMINA_LOCAL__MOMENTUN"


@pytest.mark.parametrize(
    ("argument", "code", "said"),
    [
        ("rounds=many", "E103", "rounds: expected a whole number >= 1, got 'many'"),
        ("rounds=0", "E103", "rounds: expected a whole number >= 1, got 0"),
        ("rounds=true", "E103", "rounds: expected a whole number >= 1, got True"),
        ("weights=even", "E103", "weights: expected 'examples' or 'uniform', got 'even'"),
        ("engine=ray", "E103", "engine: expected one of auto, loop, processes, threads"),
        ("model.widths=64", "E103", "model.widths: expected a list (a whole number), got 64"),
        ("data.clients=2.5", "E103", "data.clients: expected a whole number, got 2.5"),
        ("method=fedlma", "E103", "did you mean 'fedlama'?"),
        ("loss=mae", "E103", "loss: expected one of cross_entropy, mse"),
        ("local.lr=-1", "E101", "local.lr=-1.0: expected a number > 0"),
        ("local.schedule=cosin", "E103", "schedule='cosin'"),
        ("cohort=50", "E112", "expected 'all' or a whole number from 1 to 10"),
        ("data.partition=dirichlet:x", "E101", "data.partition: a=x"),
        ("uplink=topk", "E101", "density is missing"),
        ("uplink=topk:3", "E101", "expected 0 < density <= 1"),
        ("downlink=topk:0.1", "E113", "downlink"),
        ("local=3", "E103", "local: expected a table, got 3"),
        ("rounds", "E101", "expected key=value"),
    ],
)
def test_an_impossible_value_says_what_was_expected_and_its_origin(argument: str, code: str, said: str) -> None:
    error = refused(argument)
    assert error.code.startswith(code)
    assert said in str(error)
    assert "command line, argument 2" in (error.where or "")
    assert error.exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "got", "remedy"),
    [
        (("method=ssfl", 'method.density="0.5"'), "expected a number, got the text '0.5'", "write method.density=0.5"),
        (("method=ssfl", "method.density=.5"), "expected a number, got the text '.5'", "write method.density=0.5"),
        (('cohort="3"',), "or a whole number >= 1, got the text '3'", "write cohort=3"),
        (('cohort="0"',), "or a whole number >= 1, got the text '0'", None),
        (('rounds="2.5"',), "expected a whole number >= 1, got the text '2.5'", None),
        (("rounds=1e2",), "expected a whole number >= 1, got 100.0", "write rounds=100"),
        (("accuracy_before=True",), "expected true or false, got the text 'True'", "write accuracy_before=true"),
        (("model.widths=64,10",), "a list (a whole number), got the text '64,10'", "write model.widths=[64,10]"),
        (("data.partition=3",), "got 3", 'write data.partition=\'"3"\', in a file data.partition = "3"'),
        (("local.clip=x",), "expected a number or 'none', got 'x'", None),
    ],
)
def test_a_value_of_the_wrong_type_says_which_it_is_and_how_to_write_it(
    arguments: tuple[str, ...], got: str, remedy: str | None
) -> None:
    error = refused(*arguments)
    assert error.code == "E103"
    assert error.message.endswith(got)
    assert error.remedy == remedy
    if remedy is not None:
        (argument,) = shlex.split(remedy.removeprefix("write ").partition(", in a file")[0])
        quick(*arguments[:-1], argument)


def test_a_quoted_number_in_a_file_says_so_too(tmp_path: Path) -> None:
    (tmp_path / "exp.toml").write_text('preset = "quickstart"\n[method]\nname = "ssfl"\ndensity = "0.5"\n')
    with pytest.raises(ConfigError, match=r"method\.density: expected a number, got the text '0.5'") as caught:
        load(tmp_path / "exp.toml", env={})
    assert caught.value.where == "exp.toml:4"


@pytest.mark.parametrize("said", ["[ssfl,fedlama]", "[ssfl, fedlama]", '["ssfl","fedlama"]'])
def test_a_chain_is_a_list_with_or_without_quotes_and_its_members_have_numbers(said: str) -> None:
    made = quick(f"method={said}", "method.0.density=0.4", "method.1.phi=4")
    assert made.method_title == "ssfl+fedlama"
    assert [part.arguments.get("density") for part in made.method] == [0.4, None]
    assert made.method[1].arguments["phi"] == 4


def test_a_member_of_a_chain_without_a_name_is_asked_for_it() -> None:
    error = refused("method=[ssfl,fedlama]", "method.2.phi=4")
    assert error.message == "method.2 is missing"
    assert "method.2=NAME" in str(error.remedy)


def test_a_value_out_of_a_methods_range_names_the_key() -> None:
    error = refused("method=fedlama", "method.phi=0")
    assert "method.phi=0: expected a whole number of rounds >= 1" in str(error)
    assert error.where == "command line, argument 3"


def test_a_method_that_refuses_the_local_work_names_the_origin_of_that() -> None:
    assert refused("method=scaffold").where == "local.momentum, preset quickstart"


def test_a_file_that_is_not_toml_and_a_preset_that_is_not_there(tmp_path: Path) -> None:
    assert refused(target=toml(tmp_path, "rounds = = 3\n")).code == "E104"
    assert refused(target=tmp_path / "none.toml").code == "E105"
    assert "did you mean 'quickstart'?" in str(refused(target="quikstart"))


def test_seeded_typos_in_keys_are_understood() -> None:
    """60 keys, each with one or two wrong letters: 58 or more are guessed right."""
    draw = random.Random(0)
    keys = [
        key for key in config._all_keys({("method", "name"): "fedlama", ("data", "name"): "digits"}) if len(key) > 4
    ]
    right = 0
    for _ in range(60):
        key = draw.choice(keys)
        wrong = list(key)
        for _ in range(draw.choice((1, 2))):
            place = draw.randrange(len(wrong))
            if wrong[place] != ".":
                wrong[place] = draw.choice(string.ascii_lowercase)
        right += config.closest("".join(wrong), keys) == key
    assert right >= 58


# ---- files


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("method=fedlama", "method.phi=4", "uplink=topk:0.01", "uplink.values=sign", "downlink=fp16", "cohort=all"),
        ('method=["fedprox", "fedlama"]', "local.batch_size=none", "workers=3", "local.lr=1e-5"),
        ("method=centralised", "loss=mse", "run.checkpoint_every=5", "run.log_every=2"),
    ],
)
@pytest.mark.parametrize("preset", list(presets()))
def test_a_written_config_loads_to_the_same(preset: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    made = load(preset, arguments, {})
    again = load(toml(tmp_path, to_toml(made), "config.toml"), env={})
    assert again.model_dump() == made.model_dump()
    assert again.sha256 == made.sha256
    assert again.name == preset


def test_a_written_config_names_the_origin_of_every_key() -> None:
    text = to_toml(quick("rounds=3"))
    lines = [line for line in text.splitlines() if "=" in line]
    assert all("  # " in line for line in lines)
    assert any(line.startswith("rounds = 3") and line.endswith("# command line, argument 2") for line in lines)
    assert tomllib.loads(text)["local"]["momentum"] == 0.9


def test_what_was_said_can_be_listed() -> None:
    assert ("rounds", 3, "command line, argument 2") in changed(quick("rounds=3"))


def test_the_hash_ignores_what_cannot_change_the_result() -> None:
    assert quick("engine=loop", "run.log_every=3", "name=x").sha256 == quick().sha256
    assert quick("seed=1").sha256 != quick().sha256


@pytest.mark.parametrize("name", list(presets()))
def test_presets_say_what_they_are_and_make_their_model(name: str) -> None:
    assert presets()[name].startswith("# ")
    made = load(name, env={})
    assert made.origin("cohort") == f"preset {name}"
    parameters = sum(p.numel() for p in config.model_of(made)().parameters())
    known = {"fashion-mnist-cnn": 184_586, "mnist-cnn": 184_586, "cifar10-resnet20": 272_474, "hapt-cnn": 274_342}
    assert parameters == known.get(name, parameters)


# ---- parts


def test_a_new_method_needs_no_change_in_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Halved(Method[Any, Any]):
        share: float = 0.5

    monkeypatch.setitem(config.METHODS, "halved", Halved)
    assert build(quick("method=halved", "method.share=0.25")).method == Halved(share=0.25)
    assert refused("method=halved", "method.share=x").code == "E103"


def test_centralised_is_one_client_with_all_examples() -> None:
    fed = build(quick("method=centralised"))
    assert len(fed.data) == fed.cohort == 1
    assert int(fed.data.sizes[0]) == 1442
    assert isinstance(fed.method, FedAvg)


def test_local_only_and_another_loss() -> None:
    assert type(build(quick("method=localonly")).method).__name__ == "LocalOnly"
    assert config.loss_of(quick("loss=mse")) is torch.nn.functional.mse_loss


def test_engines_are_those_there_are() -> None:
    assert get_args(Config.model_fields["engine"].annotation) == ENGINES


MINE = """
import torch
from torch import nn

import lamina
from beside import WIDTH

def model(cfg):
    return nn.Sequential(nn.Linear(3, cfg.model.width), nn.Linear(cfg.model.width, WIDTH))

def plain(width: int = 4):
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))

def data():
    make = torch.Generator().manual_seed(0)
    clients = {str(i): (torch.randn(9, 3, generator=make), torch.arange(9) % 2) for i in range(3)}
    return lamina.ClientData.from_clients(clients, test=clients["0"])

def loss(output, target):
    return nn.functional.cross_entropy(output, target, label_smoothing=0.1)

def ones(output, target):
    return 1.0

class Mine(lamina.Method):
    def __init__(self, strength: float = 1.0):
        self.strength = strength

def broken():
    raise ValueError("no such thing")
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    (tmp_path / "beside.py").write_text("WIDTH = 2\n", encoding="utf-8")
    return toml(
        tmp_path,
        """
rounds = 2
loss = "mine.py:loss"
metrics = { ones = "mine.py:ones" }
model = { entry = "mine.py:model", width = 5 }
data = { entry = "mine.py:data" }
method = { entry = "mine.py:Mine", strength = 2.0 }
""",
    )


def test_a_users_own_parts_are_found_beside_the_file(mine: Path, tmp_path: Path) -> None:
    made = load(mine, ["engine=loop"], {})
    fed = build(made)
    assert fed.layers[0].shape == (5, 3)
    assert type(fed.method).__name__ == "Mine"
    assert fed.method.strength == 2.0  # type: ignore[attr-defined]
    (*_, (_, record)) = fed.run(1)
    assert record.metrics == {"ones": 1.0}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    again = load(toml(elsewhere, to_toml(made), "config.toml"), env={})
    assert again.model_dump() == made.model_dump()
    build(again)


def test_an_entry_without_cfg_takes_its_keys_as_arguments(mine: Path) -> None:
    given = f"{mine.parent / 'mine.py'}:plain"
    fed = build(load(mine, [f'model={{entry="{given}", width=7}}'], {}))
    assert fed.layers[0].shape == (7, 3)
    error = refused(f'model={{entry="{given}", wide=7}}', target=mine)
    assert (error.code, error.message) == ("E102", "unknown key  model.wide")


def test_an_entry_in_a_chain_keeps_its_origins(mine: Path, tmp_path: Path) -> None:
    text = mine.read_text(encoding="utf-8").replace("method = ", "# ")
    chain = '[[method]]\nentry = "mine.py:Mine"\n{}\n[[method]]\nname = "fedavg"\n'
    path = toml(tmp_path, text + chain.format("strenght = 2.0"), "chain.toml")
    at = path.read_text(encoding="utf-8").splitlines().index("strenght = 2.0") + 1
    error = refused(target=path)
    assert (error.message, error.where) == ("unknown key  method.0.strenght", f"chain.toml:{at}")
    assert error.remedy == "mine.py:Mine takes: strength.  did you mean 'strength'?"
    error = refused(target=toml(tmp_path, text + chain.format("strength = true"), "chain.toml"))
    assert error.where == f"chain.toml:{at}"
    made = load(toml(tmp_path, text + chain.format("strength = 2.0"), "chain.toml"), env={})
    assert made.origin("method.0") == f"chain.toml:{at - 1}"
    again = load(toml(tmp_path, to_toml(made), "config.toml"), env={})
    assert again.model_dump() == made.model_dump()
    assert refused('method=["fedavg", {name="fedlama", phy=4}]').remedy.endswith("did you mean 'method.1.phi'?")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("none.py:model", "no such file"),
        ("mine.py:modl", "mine.py has no 'modl'"),
        ("mine.py:broken", "mine.py:broken failed: ValueError: no such thing"),
        ("mine.py:WIDTH", "expected a lamina.ClientData"),
        ("wrong.py:data", "wrong.py cannot be loaded: SyntaxError"),
        ("https://example.org/mine.py:data", "no such file"),
    ],
)
def test_an_entry_that_does_not_work_is_said(entry: str, said: str, mine: Path) -> None:
    (mine.parent / "wrong.py").write_text("x = = 1\n", encoding="utf-8")
    path = toml(mine.parent, f'model = "mine.py:plain"\ndata = {{ entry = "{entry}" }}\n', "other.toml")
    error = refused(target=path)
    assert error.code == "E106"
    assert said in str(error)
