"""Reports: one file that needs nothing else, whose words follow from the run's numbers and whose names never act."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import browser
from lamina import ClientData, ConfigError, Federation, FedLAMA, LocalSGD, StorageError, config, report
from lamina.cli import app
from lamina.folder import Row, document
from lamina.report import clients, layers, overview, papers, sparsity, watching
from lamina.report.figure import Figure, Note, Table, evenly, heat, log_ticks, number, plain
from lamina.report.render import pages_of
from lamina.report.tables import Tables, bins, lasts, means, read
from lamina.runs import Run, fit
from test_runs import make

EVIL = "<script>alert(1)</script>"
EVIL_KEY = '"><img src=x onerror=alert(2)>'


# ---- run folders


def written(
    path: Path, rounds: int = 12, names: tuple[str, ...] = ("a.weight", "b.weight", "c.weight"), **columns: Any
) -> Run:
    """A run folder of so many rounds with these columns of layers.jsonl: a number, or a function of layer and round."""
    path.mkdir(parents=True)
    up = 100 * len(names)
    rows = [
        Row(t, True, 0.5, 1.0, None, None, {}, 1.0, 0.1, 2, 0, len(names), len(names), up, up, up * (t + 1),
            up * (t + 1), 2 * up * (t + 1), 2 * up * (t + 1), 0.1)
        for t in range(rounds)
    ]  # fmt: skip
    told = {"uploaded": True, "interval": 1, "bytes_up": 100, "bytes_down": 100} | columns
    logs: dict[str, list[dict[str, Any]]] = {
        "metrics.jsonl": [row._asdict() for row in rows],
        "layers.jsonl": [
            {"round": t, "layer": name, **{k: v(i, t) if callable(v) else v for k, v in told.items()}}
            for t in range(rounds)
            for i, name in enumerate(names)
        ],
        "bytes.jsonl": [
            {"round": t, "phase": "round", "direction": way, "layer": name, "bytes": 100}
            for t in range(rounds)
            for way in ("up", "down")
            for name in names
        ],
        "events.jsonl": [],
    }
    for name, lines in logs.items():
        (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    info = {
        "version": 1, "status": "done", "exit_code": 0, "error": None, "method": "fedavg", "method_repr": "FedAvg()",
        "uplink": "fp32", "downlink": "fp32", "personal": False, "data": "made", "partition": "iid", "clients": 2,
        "cohort": 2, "parameters": 100, "seed": 0, "split_sha256": "s", "pool_sha256": "p", "initial_sha256": "i",
        "final_sha256": "f", "config_sha256": None, "torch": "2", "engine": "loop", "engine_reason": "asked for",
        "tested": True, "options": {}, "rounds": rounds, "rounds_done": rounds, "bytes_up": up * rounds,
        "bytes_down": up * rounds, "best": None, "final": None,
        "lengths": {name: (path / name).stat().st_size for name in logs}, "seconds": 1.0, "started": "", "updated": "",
    }  # fmt: skip
    (path / "run.json").write_bytes(document(info))
    header = json.dumps({name: {"dtype": "F32", "shape": [4, 5 * (i + 1)]} for i, name in enumerate(names)}).encode()
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return Run.open(path)


def changed(run: Run, **values: Any) -> Run:
    """The same folder with other values in run.json."""
    (run.path / "run.json").write_bytes(document(run.info | values))
    return Run.open(run.path)


@pytest.fixture(scope="module")
def wicked(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in which clients, a metric, a layer and the data are called like markup."""
    draws = torch.Generator().manual_seed(0)
    parts = {}
    for k, name in enumerate((EVIL, f"</script>{EVIL_KEY}", "c", "d`e`")):
        x, y = torch.randn(12, 4, generator=draws), torch.randint(0, 3, (12,), generator=draws)
        parts[name] = (x * 1e20 if k == 2 else x, y)  # it diverges at its second step
    test = torch.randn(20, 4, generator=draws), torch.randint(0, 3, (20,), generator=draws)
    data = ClientData.from_clients(parts, test=test, name=EVIL, label_names=[EVIL, "a", "b"])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("<b>first", nn.Linear(4, 6))
            self.last = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(getattr(self, "<b>first")(x).relu())

    fed = Federation(
        Net, data, method=FedLAMA(phi=2), local=LocalSGD(lr=0.1, batch_size=4), engine="loop",
        metrics={EVIL_KEY: lambda outputs, targets: 0.25},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("runs") / "<i>evil"
    return fit(fed, 6, folder, progress=False, keep_clients_log=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("runs") / "001-fedlama"
    return make(path, "method=fedlama", rounds=6, keep_clients_log=True)


# ---- the file


class Seen(HTMLParser):
    """Elements, and what they name elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.names: list[str] = []
        self.handlers: list[str] = []
        self.scripts: list[str] = []
        self.kinds: list[str | None] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "action", "data", "srcset", "poster"):
                self.names.append(value or "")
            if key.startswith("on"):
                self.handlers.append(key)
        if tag == "script":
            self.scripts.append("")
            self.kinds.append(dict(attrs).get("type"))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and not self.scripts[-1]:
            self.scripts[-1] = data
        else:
            self.text += data


def figures_of(text: str) -> dict[str, Any]:
    seen = Seen(text)
    return json.loads(seen.scripts[seen.kinds.index("application/json")])  # type: ignore[no-any-return]


def test_a_report_names_nothing_elsewhere_and_holds_plotly_once(quick: Run) -> None:
    text = report.build([quick])
    seen = Seen(text)
    assert all(name.startswith("#") for name in seen.names)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & set(seen.tags)
    assert "@import" not in text.split("</style>")[0]
    assert "url(" not in text.split("</style>")[0]
    assert text.count("* plotly.js v") == 1
    assert seen.tags.count("script") == 3
    assert len(text.encode()) <= report.LIMIT


def test_the_policy_of_the_page_is_the_sums_of_its_own_scripts(quick: Run) -> None:
    text = report.build([quick])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    sums = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    said = unescape(policy[1])
    assert f"script-src {' '.join(f'{chr(39)}sha256-{x}{chr(39)}' for x in sums)}; base-uri 'none'" in said


def test_all_pages_are_there_and_can_be_reached_by_keyboard(quick: Run) -> None:
    seen = Seen(report.build([quick]))
    pages = ["overview", "layers", "communication", "sparsity", "clients", "compare", "reproduce"]
    assert seen.names == ["#main", *(f"#{page}" for page in pages)]
    assert seen.tags.count("section") == 7
    assert "input" in seen.tags  # the slider of the rounds is one, with its own label


def test_every_figure_is_one_that_plotly_knows(quick: Run, wicked: Run) -> None:
    objects = pytest.importorskip("plotly.graph_objects")
    for run in (quick, wicked):
        for name, figure in figures_of(report.build([run])).items():
            made = objects.Figure(data=figure["data"], layout=figure["layout"])  # refuses what it does not know
            assert made.data, name
            for frame in figure.get("frames", []):
                assert len(frame["x"]) == len(figure["data"][0]["x"])


def test_names_with_markup_are_shown_and_do_nothing(wicked: Run) -> None:
    text = report.build([wicked])
    seen = Seen(text)
    assert seen.tags.count("script") == 3
    assert not {"img", "b", "i"} & set(seen.tags)
    assert not seen.handlers
    assert EVIL in seen.text  # the name of a client, as text
    assert "<script>alert" not in text
    everything = json.dumps(figures_of(text), ensure_ascii=False)
    for shown in re.findall(r"<(/?[a-z]+)", everything):
        assert shown in ("br", "extra", "/extra"), shown  # of plotly's own little markup, what we write
    assert plain(EVIL) in everything
    assert json.dumps(plain(EVIL_KEY))[1:-1] in everything


def test_names_with_markup_do_nothing_in_a_notebook(wicked: Run) -> None:
    seen = Seen(wicked._repr_html_())
    assert set(seen.tags) <= {"div", "strong", "svg", "polyline"}
    assert not seen.handlers
    assert "<i>evil" in seen.text


def test_a_refused_client_is_named_with_its_code(wicked: Run) -> None:
    block = next(b for b in pages_of(read(wicked), 50)[4].blocks if b.title == "Updates that were not used")
    assert isinstance(block, Table)
    assert block.rows[0][:3] == ["E310", "6", "c"]


def test_a_long_run_of_many_layers_is_thinned_to_the_limit(tmp_path: Path) -> None:
    """The slow test has 5,000 rounds."""
    _long(tmp_path, 150)


@pytest.mark.slow
def test_a_run_of_5000_rounds_and_60_layers_is_thinned_to_the_limit(tmp_path: Path) -> None:
    _long(tmp_path, 5000)


def _long(tmp_path: Path, rounds: int) -> None:
    def noise(i: int, t: int) -> float:
        return 0.1 + (i * 7919 + t * 104729) % 1000 / 997

    columns = dict.fromkeys(("inertia", "divergence", "update_norm", "discrepancy", "density", "mask_churn"), noise)
    run = written(tmp_path / "run", rounds, tuple(f"block.{i}.conv.weight" for i in range(60)), **columns)
    text = report.build([run])
    assert len(text.encode()) <= report.LIMIT
    figures = figures_of(text)
    assert len(figures["0-inertia"]["data"][0]["z"]) == 60
    assert "rounds" in text


def test_thinning_takes_means_or_the_last_of_neighbouring_rounds() -> None:
    """Five rounds in two groups: 0-2 and 3-4; the second layer was not recorded in rounds 1 and 3."""
    grid = np.array([[1.0, 2.0, 6.0, 4.0, 8.0], [1.0, np.nan, 3.0, np.nan, np.nan]])
    groups = bins(5, 2)
    assert [list(g) for g in groups] == [[0, 1, 2], [3, 4]]
    assert means(grid, groups)[0].tolist() == [3.0, 6.0]
    assert means(grid, groups)[1, 0] == 2.0
    assert np.isnan(means(grid, groups)[1, 1])
    assert lasts(grid, groups)[0].tolist() == [6.0, 8.0]
    assert lasts(grid, groups)[1, 0] == 3.0
    assert evenly(10, 4) == [0, 3, 6, 9]
    assert number(float("nan")) is None
    assert number(0.123456) == 0.1235


def test_a_heatmap_ends_at_its_largest_value_and_begins_at_zero() -> None:
    data, _, _ = heat(["a"], ["0", "1"], [[0.25, float("nan")]], "x")
    assert (data[0]["zmin"], data[0]["zmax"], data[0]["z"]) == (0, 0.25, [[0.25, None]])


# ---- what it says


def block(run: Run, page: Any, title: str) -> Any:
    return next(b for b in page(read(run), 100).blocks if getattr(b, "title", None) == title)


def test_layers_that_lag_in_the_middle_are_named_and_what_acts_on_them(tmp_path: Path) -> None:
    """Moved 1.0, 0.2 and 0.9 of their size: the middle's 0.2 is below 0.8 x min(1.0, 0.9)."""
    run = written(tmp_path / "run", inertia=lambda i, t: (1.0, 0.2, 0.9)[i])
    said = " ".join(block(run, layers.page, "How far each layer has moved").concludes)
    assert "a.weight has moved farthest (1 of its size), b.weight least (0.2)" in said
    assert "lag behind both ends: 0.2 on average against 1 for the first layer and 0.9" in said
    assert "method=lips" in said


def test_lips_is_not_advised_where_the_middle_does_not_lag(tmp_path: Path) -> None:
    run = written(tmp_path / "run", inertia=lambda i, t: (0.3, 0.5, 0.9)[i])
    said = " ".join(block(run, layers.page, "How far each layer has moved").concludes)
    assert "do not lag" in said
    assert "method=lips" not in said


def test_no_conclusion_is_drawn_between_the_two(tmp_path: Path) -> None:
    """0.85 is neither below 0.8 x 1.0 nor above 1.0, and nothing has moved clearly less than another."""
    run = written(tmp_path / "run", inertia=lambda i, t: (1.0, 0.85, 1.0)[i])
    assert block(run, layers.page, "How far each layer has moved").concludes == []


@pytest.mark.parametrize(
    ("values", "said", "remedy"),
    [
        ((0.5, 0.6, 0.9), "grows towards the loss (0.50 near the input, 0.90 near the loss)", "method=personal"),
        ((0.9, 0.6, 0.5), "grows towards the input (0.90 near the input, 0.50 near the loss)", "deeper_models"),
        ((2.0, 2.1, 2.2), "In all 3 layers the clients disagreed by more", "method=scaffold"),
    ],
)
def test_divergence_says_where_it_grows_and_what_acts_on_it(
    tmp_path: Path, values: tuple[float, ...], said: str, remedy: str
) -> None:
    run = written(tmp_path / "run", divergence=lambda i, t: values[i])
    figure = block(run, layers.page, "How far the clients diverge, by depth")
    text = " ".join(figure.concludes)
    assert said in text
    assert remedy in text
    assert figure.frames[0]["name"] == "rounds 6-11, mean"
    assert figure.frames[0]["x"] == list(values)


def test_control_variates_are_named_with_what_they_need_in_this_run(tmp_path: Path) -> None:
    """With momentum `method=scaffold` alone is refused."""
    run = written(tmp_path / "run", divergence=2.0)
    tables = read(run)
    assert tables.control_variates == "`method=scaffold`"
    tables.environment["config"] = {"local.momentum": 0.9}
    assert tables.control_variates == "`method=scaffold method.approximate=true`"
    config.build(config.load("quickstart", ["method=scaffold", "method.approximate=true"], env={}))
    with pytest.raises(ConfigError, match="E117"):
        config.build(config.load("quickstart", ["method=scaffold"], env={}))


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ([[50, 50], [50, 50]], "spread alike"),
        ([[48, 52], [52, 48]], "spread alike"),
        ([[640, 240, 120], [500, 200, 300]], "Labels differ somewhat: on average 7 %"),
        ([[95, 5], [5, 95]], "Labels are skewed: on average 95 %"),
    ],
)
def test_how_labels_are_spread_is_said_beyond_chance(counts: list[list[int]], said: str, tmp_path: Path) -> None:
    """Of 1,000 examples each, 12 and 30 % of the third label: pooled shares 57, 22 and 21 %, so 9 % of the examples
    would have to change; by chance it would be 2 %."""
    tables = read(written(tmp_path / "run", 2))
    assert said in " ".join(clients._skew(np.array(counts), [sum(row) for row in counts], tables))


def test_labels_are_called_by_their_names_and_by_numbers_in_runs_without(tmp_path: Path) -> None:
    """Of 100 examples 40 have the first label, all of them with the second client: 50 and 100 % are of one label."""
    run = written(tmp_path / "run", 2)
    holders = [
        {"client": "a", "examples": 60, "labels": [0, 30, 30]},
        {"client": "b", "examples": 40, "labels": [40, 0, 0]},
    ]
    split: dict[str, Any] = {"classes": 3, "clients": holders}
    for names, called in ((["ok", "belt", "<b>"], ("ok", "belt", "&lt;b&gt;")), (None, ("0", "1", "2"))):
        (run.path / "split.json").write_bytes(document(split if names is None else {**split, "label_names": names}))
        figure = block(Run.open(run.path), lambda tables, most: clients.page(tables), "Who holds which labels")
        assert figure.layout["xaxis"]["ticktext"] == list(called)
        assert [cell[2] for cell in figure.data[0]["customdata"][0]] == list(called)
        said = " ".join(figure.concludes)
        assert f"of all examples together: 40 %, label {called[0]})" in said
        assert f"Label {called[0]} is with fewest: 1 of 2 clients." in said


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.06, 0.7], ["0.1", "0.2", "0.5"]),
        ([0.11, 0.14], ["0.1", "0.2"]),
        ([0.0, None, float("nan"), 0.3, 0.9], ["0.5", "1"]),
        ([0.00001, 3.0], ["0.00001", "0.0001", "0.001", "0.01", "0.1", "1"]),
        ([3e5, 2e6], ["500000", "1000000", "2000000"]),
        ([0.5], ["0.5", "1"]),
        ([], ["1", "2"]),
    ],
)
def test_a_logarithmic_axis_has_plain_numbers_at_1_2_and_5(values: list[Any], texts: list[str]) -> None:
    ticks, shown, (start, end) = log_ticks(values)
    assert shown == texts
    assert ticks == [float(text) for text in texts]
    assert all(start <= value <= end for value in [*ticks, *(v for v in values if v and v > 0)])


def test_a_logarithmic_axis_over_many_decades_has_few_ticks() -> None:
    assert len(log_ticks([1e-150, 1e150])[0]) <= 9


def test_the_steps_are_drawn_over_such_an_axis(tmp_path: Path) -> None:
    run = written(tmp_path / "run", update_norm=lambda i, t: 0.07 * 1.2**t)  # to 0.52
    axis = block(run, layers.page, "Length of the common step").layout["yaxis"]
    assert (axis["type"], axis["ticktext"]) == ("log", ["0.1", "0.2", "0.5"])
    assert axis["range"][0] < np.log10(0.07) < np.log10(0.52) < axis["range"][1]


def test_steps_that_shrink_name_the_layers_whose_do_not(tmp_path: Path) -> None:
    run = written(tmp_path / "run", 16, update_norm=lambda i, t: 1.0 if i == 2 else 0.5**t)
    said = " ".join(block(run, layers.page, "Length of the common step").concludes)
    assert "in the median layer; not so in c" in said


def test_a_mask_that_never_changes_is_a_sentence(tmp_path: Path) -> None:
    run = written(tmp_path / "run", mask_churn=0.0)
    note = block(run, sparsity.page, "How much the mask changes")
    assert isinstance(note, Note)
    assert note.text.startswith("It never did: the mask was the same in all 12 rounds.")


def test_accuracy_that_goes_to_and_fro_gives_no_trend_and_a_steady_rise_does(tmp_path: Path) -> None:
    run = written(tmp_path / "run", 16)
    rising = [row._replace(accuracy=0.5 + 0.02 * row.round) for row in run.records]
    run.records[:] = rising
    said = " ".join(block(run, overview.page, "Accuracy by round").concludes)
    assert "still rising: the rounds from 12 on added 8.0 points" in said
    assert "to and fro" not in said
    wavering = [row._replace(accuracy=0.5 + 0.001 * row.round + 0.012 * (row.round % 2)) for row in rising]
    run.records[:] = wavering  # 1.2 points up and down, 0.4 gained by the last quarter
    said = " ".join(block(run, overview.page, "Accuracy by round").concludes)
    assert "still rising" not in said
    assert "to and fro by 0.9 points" in said
    run.records[:] = [row._replace(accuracy=0.5 + 0.1 * (row.round % 2)) for row in rising]
    said = " ".join(block(run, overview.page, "Accuracy by round").concludes)
    assert "nor can be told whether it still rises" in said
    assert "levelled off" not in said
    run = written(tmp_path / "short", 5)
    assert block(run, overview.page, "Accuracy by round").concludes == []


def test_a_sentence_stands_where_nothing_was_recorded(tmp_path: Path) -> None:
    run = written(tmp_path / "run", 2)
    notes = [b for page in pages_of(read(run), 50) for b in page.blocks if isinstance(b, Note)]
    said = " ".join(f"{note.title}: {note.text}" for note in notes)
    for part in (
        "this run has no later round", "There is no divergence", "Nothing is recorded here", "no split.json",
        "run.keep_clients_log=true", "None: all 4 answers of 2 rounds were used", "There is no mask in this run",
        "Every layer was uploaded in each of the 2 rounds",
    ):  # fmt: skip
        assert part in said, part


@pytest.mark.parametrize("column", ["mask_churn", "residual_norm"])
def test_columns_that_only_some_runs_have_are_drawn_where_they_are(tmp_path: Path, column: str) -> None:
    run = written(tmp_path / "run", **{column: lambda i, t: (0.1, 0.4, 0.2)[i]})
    found = [
        b for b in sparsity.page(read(run), 50).blocks if isinstance(b, Figure) and b.id == column.replace("_", "-")
    ]
    assert len(found) == 1
    assert "highest in b.weight: 0.4" in found[0].concludes[0]


def test_the_ledger_check_says_by_how_much_sums_differ(quick: Run, tmp_path: Path) -> None:
    assert all(check.agrees for check in read(quick).ledger)
    assert len(read(quick).ledger) == 8
    run = written(tmp_path / "run")
    changed(run, bytes_up=run.info["bytes_up"] + 7)
    table = next(b for b in pages_of(read(Run.open(run.path)), 50)[2].blocks if b.title == "Ledger check")
    assert isinstance(table, Table)
    assert sum("differ by 7" in row[3] for row in table.rows) == 2
    assert "lamina verify" in table.concludes[0]


def test_waiting_layers_are_counted_by_round(quick: Run) -> None:
    tables = read(quick)
    figure = next(b for b in pages_of(tables, 50)[2].blocks if b.title == "Which layer was aggregated when")
    assert isinstance(figure, Figure)
    sent = np.nansum(tables.column("uploaded"), axis=1)
    layer = min(tables.matrices, key=lambda i: sent[i])
    assert f"{tables.parts[layer].name} ({int(sent[layer])} of 6 rounds)" in figure.concludes[0]


def test_sizes_and_receptive_fields_come_from_the_model_of_the_config(tmp_path: Path) -> None:
    """A 5x5 convolution sees 5 pixels; behind a pool of 2 another one sees 5 + 1 + 4 x 2 = 14."""
    folder = tmp_path / "run"
    run = written(folder, names=("conv1.weight", "conv1.bias", "conv2.weight", "fc1.weight"))
    (folder / "config.toml").write_text('preset = "fashion-mnist-cnn"\n', encoding="utf-8")
    parts = {part.name: part for part in read(Run.open(run.path)).parts}
    assert (parts["conv1.weight"].width, parts["conv1.weight"].field) == (32, 5)
    assert (parts["conv2.weight"].shape, parts["conv2.weight"].field) == ((64, 32, 5, 5), 14)
    assert parts["fc1.weight"].field is None
    assert not parts["conv1.bias"].matrix


def test_a_model_of_the_users_own_is_not_run_for_a_report(tmp_path: Path) -> None:
    run = written(tmp_path / "run")
    (tmp_path / "mine.py").write_text("raise SystemExit('it was run')\n", encoding="utf-8")
    config = f'model = {{ entry = "{tmp_path / "mine.py"}:model" }}\ndata = "digits"\n'
    (run.path / "config.toml").write_text(config, encoding="utf-8")
    parts = read(Run.open(run.path)).parts
    assert [part.shape for part in parts] == [(4, 5), (4, 10), (4, 15)]


# ---- several runs


def test_several_runs_are_compared_and_chosen_from(tmp_path: Path) -> None:
    """B is as accurate for twice the bytes of A: A alone is on the front."""
    a, b = written(tmp_path / "001-a"), written(tmp_path / "002-b")
    more = [row._replace(total_up=2 * row.total_up, total_down=2 * row.total_down) for row in b.records]
    b.records[:] = more
    b = changed(b, bytes_up=2 * b.info["bytes_up"], bytes_down=2 * b.info["bytes_down"])
    b.records[:] = more
    text = report.build([a, b])
    seen = Seen(text)
    assert seen.tags.count("select") == 1
    assert seen.tags.count("section") == 13
    assert "Beaten by another run in accuracy and bytes: 002-b." in seen.text
    assert "001-a was there first in bytes: 600 B, where 002-b needed 1.200 kB, 2.0 times as many." in seen.text
    assert {"0-bytes", "1-bytes", "-1-pareto", "-1-to-target"} <= set(figures_of(text))


def test_runs_on_different_splits_are_compared_with_a_warning(tmp_path: Path) -> None:
    a, b = written(tmp_path / "001-a"), written(tmp_path / "002-b")
    assert "Careful: 002-b has another split than 001-a" in Seen(report.build([a, changed(b, split_sha256="t")])).text


def test_a_report_goes_into_the_folder_of_its_run_and_of_several_beside_them(tmp_path: Path) -> None:
    a, b = written(tmp_path / "x/001-a"), written(tmp_path / "x/002-b")
    assert report.place_for([a]) == a.path / "report.html"
    assert report.place_for([a, b]) == tmp_path / "x/report-001-002.html"


# ---- watching


def test_watching_writes_again_until_the_run_ends(tmp_path: Path) -> None:
    run = changed(written(tmp_path / "run"), status="running", rounds=20)
    out, said, steps = tmp_path / "r.html", [], []

    def sleep(seconds: float) -> None:
        text = out.read_text(encoding="utf-8")
        assert '<body data-reload="3.0">' in text
        assert "running, round 12 of 20" in text
        steps.append(seconds)
        if len(steps) == 2:
            changed(run, status="done")

    assert watching.watch([run.path], out, 3.0, said.append, sleep) == out
    assert steps == [3.0, 3.0]
    assert len(said) == 2  # nothing is written where nothing is new
    assert "data-reload" not in out.read_text(encoding="utf-8").split("<script")[0]


def test_watching_ends_when_the_process_of_a_run_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = changed(written(tmp_path / "run"), status="running", rounds=20)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(watching.time, "monotonic", lambda: float(next(clock)))
    said: list[str] = []
    watching.watch([run.path], tmp_path / "r.html", 1.0, said.append, lambda seconds: None)
    assert "nobody is at run any more: `lamina resume` goes on with it" in said[-1]


def test_watching_does_not_end_where_the_lock_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's run, say: whether its process is gone is not known."""
    run = changed(written(tmp_path / "run"), status="running", rounds=20)
    (run.path / ".lock").mkdir()
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(watching.time, "monotonic", lambda: float(next(clock)))
    steps: list[float] = []

    def sleep(seconds: float) -> None:
        steps.append(seconds)
        if len(steps) == 9:
            changed(run, status="done")

    said: list[str] = []
    watching.watch([run.path], tmp_path / "r.html", 1.0, said.append, sleep)
    assert len(steps) == 9
    assert not [text for text in said if "nobody" in text]


# ---- figures of the papers


def test_the_crossing_of_fedlama_is_that_of_the_rule(tmp_path: Path) -> None:
    """Entries 100, 400, 1500, 2000 and d = 8, 4, 1, 2 e-4: by ascending d the shares of d x dim (0.79) add up to
    0.15 / 0.79 = 0.1899, 0.6962, 0.8987, 1, and the entries that are left are 0.625, 0.125, 0.025, 0: the second layer
    is the first at which delta is more."""
    run = written(tmp_path / "run", names=("1", "2", "3", "4"), discrepancy=lambda i, t: (8e-4, 4e-4, 1e-4, 2e-4)[i])
    shapes = {"1": [10, 10], "2": [20, 20], "3": [30, 50], "4": [40, 50]}
    header = json.dumps({name: {"dtype": "F32", "shape": shape} for name, shape in shapes.items()}).encode()
    (run.path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    drawing = papers.drawing_of("fedlama-crossing", [read(run)])
    delta, left = drawing.curves
    assert delta.y == pytest.approx([0, 0.1899, 0.6962, 0.8987, 1], abs=1e-4)
    assert left.y == pytest.approx([1, 0.625, 0.125, 0.025, 0])
    assert drawing.mark == 2


def test_syncs_and_inertia_are_the_recorded_ones(tmp_path: Path) -> None:
    run = written(tmp_path / "run", 8, uploaded=lambda i, t: (t + 1) % (i + 1) == 0, inertia=lambda i, t: t - 2.0)
    syncs = papers.drawing_of("fedlama-syncs", [read(run)])
    assert syncs.curves[0].y == [8, 4, 2]
    assert syncs.names == ["a.weight", "b.weight", "c.weight"]
    assert papers.drawing_of("lips-inertia", [read(run)]).curves[1].y == [float(t - 2) for t in range(8)]


def test_flares_figure_is_of_several_densities(tmp_path: Path) -> None:
    dense, sparse = written(tmp_path / "a", density=1.0), written(tmp_path / "b", density=0.1)
    drawing = papers.drawing_of("flare-sparsity", [read(dense), read(sparse)])
    assert drawing.curves[0].x == pytest.approx([0.1, 1.0])
    with pytest.raises(ConfigError, match="runs of at least two densities"):
        papers.drawing_of("flare-sparsity", [read(dense)])


def test_a_papers_logarithmic_axis_has_the_ticks_of_the_reports(tmp_path: Path) -> None:
    """Densities 0.06 and 0.7 have one power of ten between them."""
    pytest.importorskip("matplotlib")
    curves = [papers.Curve("fedavg", [0.06, 0.7], [0.5, 0.6])]
    papers._drawn(papers.Drawing("x", "y", curves, log=True), tmp_path / "a.svg")
    shown = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "a.svg").read_text())
    assert [text for text in shown if text in ("0.1", "0.2", "0.5")] == ["0.1", "0.2", "0.5"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("lips-inertia", "measured from the model after round 2"),
        ("fedlama-crossing", "no discrepancy"),
        ("divergence-depth", "no divergence"),
        ("ssfl-density", "no layer was uploaded"),
        ("flare-sparsity", "not known"),
    ],
)
def test_a_run_that_cannot_produce_a_figure_says_why(tmp_path: Path, name: str, why: str) -> None:
    run = written(tmp_path / "run", 2)
    with pytest.raises(ConfigError, match=why):
        papers.draw(name, [run], tmp_path / "x.svg")
    assert not (tmp_path / "x.svg").exists()


def test_an_unknown_figure_names_the_known_ones(tmp_path: Path) -> None:
    run = written(tmp_path / "run")
    with pytest.raises(ConfigError, match="lips-inertia, fedlama-crossing") as caught:
        papers.draw("lips-inerta", [run], tmp_path / "x.svg")
    assert "did you mean 'lips-inertia'?" in str(caught.value)
    with pytest.raises(ConfigError, match=r"ends with \.svg or \.png"):
        papers.draw("fedlama-syncs", [run], tmp_path / "x.gif")


def test_figures_are_files_that_equal_runs_make_equal(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = written(tmp_path / "run", names=("$x$", "_y", "z"), inertia=0.5, density=0.5, divergence=1.0)
    for name in ("lips-inertia", "fedlama-syncs", "ssfl-density", "divergence-depth"):
        first = papers.draw(name, [run], tmp_path / f"{name}.svg").read_bytes()
        assert papers.draw(name, [run], tmp_path / "again.svg").read_bytes() == first
    assert "$x$" in (tmp_path / "lips-inertia.svg").read_text(encoding="utf-8")
    assert papers.draw("ssfl-density", [run], tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="need matplotlib") as caught:
        papers.draw("fedlama-syncs", [written(tmp_path / "run")], tmp_path / "x.svg")
    assert "lamina[plots]" in str(caught.value)


# ---- the command, and Python


def test_the_command_writes_the_report_and_says_where(quick: Run, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    done = CliRunner().invoke(app, ["report", str(quick.path), "--out", str(out)])
    assert (done.exit_code, done.stdout.strip()) == (0, str(out))
    done = CliRunner().invoke(app, ["report", str(quick.path), "--json"])
    assert json.loads(done.stdout) == {"event": "written", "files": [str(quick.path / "report.html")]}
    assert out.read_bytes() == (quick.path / "report.html").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--figure", "nothing"], 2, "expected one of lips-inertia"),
        (["--figure", "lips-inertia", "--watch"], 2, "expected one of them"),
        (["--out", "x.pdf"], 2, "ends with .html"),
    ],
)
def test_what_the_command_refuses(quick: Run, arguments: list[str], code: int, said: str) -> None:
    done = CliRunner().invoke(app, ["report", str(quick.path), *arguments])
    assert done.exit_code == code
    assert said in done.stderr


def test_the_figures_that_help_names_are_those_there_are() -> None:
    shown = "".join(CliRunner().invoke(app, ["report", "--help"]).stdout.split())
    assert ",".join(papers.FIGURES) in shown


def test_a_run_reports_itself(quick: Run, tmp_path: Path) -> None:
    assert quick.report(tmp_path / "a/r.html") == tmp_path / "a/r.html"
    assert (tmp_path / "a/r.html").read_bytes() == report.build([quick]).encode()
    assert "accuracy" in quick._repr_html_()


def test_damaged_logs_are_refused_and_no_report_is_written(tmp_path: Path) -> None:
    run = written(tmp_path / "run")
    log = run.path / "layers.jsonl"
    log.write_bytes(b"{" + log.read_bytes()[1:-40] + b"x" * 40)
    with pytest.raises(StorageError, match="logs of this run cannot be read"):
        run.report(tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_run_that_has_no_round_yet_has_a_report(tmp_path: Path) -> None:
    run = changed(written(tmp_path / "run", 0), status="running", rounds=5)
    assert "no round is finished yet" in Seen(report.build([run])).text
    assert isinstance(read(run), Tables)


# ---- in a browser


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="chromium is not installed: apt install chromium")
@pytest.mark.parametrize("width", [1280, 400])
def test_the_report_opens_in_chromium_without_requests_or_errors(
    quick: Run, wicked: Run, tmp_path: Path, width: int
) -> None:
    """All pages: figures are drawn, nothing is wider than the screen, and no name has run as a script."""
    several = [quick, make(tmp_path / "002-fedavg", rounds=6, keep_clients_log=True)]
    files = [report.write(runs, tmp_path / f"{i}.html") for i, runs in enumerate(([wicked], several))]
    with browser.Browser() as page:
        for file in files:
            page.requests.clear()
            page.open(file, width)
            for name in page.run("Array.from(document.querySelectorAll('nav a')).map(a => a.dataset.page)"):
                page.run(f"location.hash = '{name}'")
                page.wait_for(f"document.querySelector('section.shown[data-page={name}]') !== null")
                drawn = "Array.from(document.querySelectorAll('.shown .plot')).every(p => p.querySelector('.main-svg'))"
                page.wait_for(drawn)
                assert page.run("document.documentElement.scrollWidth") <= width, name
                assert page.run("document.querySelectorAll('.shown .plot a, .shown img').length") == 0, name
            page.run("location.hash = 'layers'")
            page.wait_for("document.querySelector('section.shown input[type=range]') !== null")
            before = page.run("document.querySelector('.shown output').value")
            page.run(
                "(() => { const s = document.querySelector('.shown input[type=range]'); s.value = 1;"
                " s.dispatchEvent(new Event('input')); })()"
            )
            assert page.run("document.querySelector('.shown output').value") != before
            page.print(tmp_path / "report.pdf")
            assert {url for url in page.requests if not url.startswith(("data:", "blob:"))} == {file.resolve().as_uri()}
        assert page.complaints == []
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="chromium is not installed: apt install chromium")
def test_a_watched_page_reads_itself_again_and_can_be_told_not_to(tmp_path: Path) -> None:
    run = changed(written(tmp_path / "run"), status="running", rounds=20)
    file = report.write([run], tmp_path / "r.html", reload=0.5)
    with browser.Browser() as page:
        page.open(file, 1280)
        page.run("location.hash = 'layers'")
        page.run("window.old = true")
        page.wait_for("window.old === undefined && document.readyState === 'complete'")
        assert page.run("location.hash") == "#layers"
        page.run("document.getElementById('pause').click()")
        page.run("window.old = true")
        page.run("new Promise(done => setTimeout(done, 1500))")
        assert page.run("window.old") is True
        assert page.complaints == []
