"""Names that a stranger chooses - of clients, labels, metrics, layers, methods, settings - in what other programs read.

The report's own tests open it in a browser. Here: CSV that a spreadsheet opens, LaTeX that is set, Markdown, terminals.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from lamina import ClientData, ConfigError, Federation, LocalSGD, StorageError, cli, comparison, models, terminal
from lamina.cli.base import guarded, say
from lamina.compare import compare
from lamina.export import export
from lamina.redaction import printable
from lamina.runs import Run
from lamina.tabular import commas, escaped, latex, markdown
from lamina.terminal import Column

FORMULAS = (
    "=1+1", "+1+1", "-1+1", "@SUM(1)", "=cmd|' /C calc'!A0", '=HYPERLINK("http://x","y")', "=IMPORTXML(A1,B1)",
    "\t=1+1",
    "\r=1+1", "\n=1+1", " =1+1", "\u00a0=1+1", "\u3000=1+1", "\u200b=1+1", "\ufeff=1+1", "\u2060+1", "\x00=1", "\x1f@A",
    "\u202e=1+1", "\uff1d1+1", "\uff0b1", "\uff0d1", "\uff20A1", "=1;=2", "x;=1+1", "x\t=1+1", 'x",=1+1', "x,=1+1",
    "x\n=1+1", "x\r\n=1+1", "x|=1+1", "-2+3+cmd|' /C calc'!D2", "=DDE(\"cmd\",\"/C calc\",\"x\")", "+\u200b1", "--1",
)  # fmt: skip
MARKUP = (
    r"\input{/etc/passwd}", r"\write18{touch x}", r"\immediate\write18{id}", r"\csname end\endcsname", "^^5cinput x",
    "$x$", "a & b", r"a \\ b", "% hidden", "#1", "a_b^c", "~", "{", "}", "}}{{", "[1em]", "*", "*[2em]", r"\verb|x|",
    r"\catcode`\@=0 @input x", "a\n\nb", "\n\n", "\u2028", "\x00", "\x1b[31mred", "\u202eabc", r"\end{tabular}",
    "<script>alert(1)</script>", "![x](http://x/y.png)", "a|b", r"a\|b", "`x`",
)  # fmt: skip
PAYLOADS = [*FORMULAS, *MARKUP]


def test_there_are_fifty_and_more() -> None:
    assert len({*PAYLOADS}) >= 60


# ---- one text


def opened_by(text: str, separator: str) -> Iterator[str]:
    """The cells that a spreadsheet makes of it, which begins one at this character; zero-width characters gone."""
    for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator):
        for cell in row:
            yield re.sub("^[\\s\\x00-\\x20\\x7f-\\xa0\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3000\ufeff]+", "", cell)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_no_cell_of_a_csv_file_is_a_formula(payload: str, separator: str) -> None:
    rows = [{"name": payload, payload: "x"}, {"name": [payload, payload], payload: {payload: payload}}]
    text = commas(rows, ["name", payload])
    for cell in opened_by(text, separator):
        assert not cell.startswith(("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")), cell


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_csv_file_still_says_what_it_was_given(payload: str) -> None:
    ((head,), (cell,)) = csv.reader(io.StringIO(commas([{payload: payload}], [payload]), newline=""))
    assert head.replace("'", "") == cell.replace("'", "") == payload.replace("'", "")  # but for apostrophes


@pytest.mark.parametrize("payload", PAYLOADS)
def test_latex_sets_it_letter_by_letter(payload: str) -> None:
    """One line, braces in pairs, and no character left that means something: commands are only those of the table."""
    text = escaped(payload)
    assert "\n" not in text
    assert all(c.isprintable() for c in text)
    left = re.sub(
        r"\\textbackslash\{\}|\\textasciitilde\{\}|\\textasciicircum\{\}|\$\\pm\$|\\[&%$#_{}]|\{[\[*]\}", "", text
    )
    assert not re.search(r"[\\^~&%$#_{}\[*]", left), left


def test_a_latex_table_has_the_rows_and_columns_that_it_should() -> None:
    columns = [Column(f"{p} head", [p, f"x{p}", p], left=True) for p in PAYLOADS]
    lines = latex(columns, {(0, 0)}, notes=PAYLOADS)
    rows = [line for line in lines if line.endswith(r" \\")]
    assert len(rows) == 4
    for row in rows:
        assert len(re.findall(r"(?<!\\)&", row)) == len(PAYLOADS) - 1
        assert not row.removesuffix(r"\\").strip().startswith(("[", "*"))
    notes = lines[lines.index(r"\end{tabular}") + 1 :]
    assert len(notes) == len(PAYLOADS)
    assert all(note.startswith("%") and "\n" not in note and note.isprintable() for note in notes)


def test_a_markdown_table_has_the_rows_and_columns_that_it_should() -> None:
    columns = [Column("name", PAYLOADS, left=True), Column("n", ["1"] * len(PAYLOADS))]
    lines = markdown(columns)
    assert len(lines) == len(PAYLOADS) + 2
    for line in lines:
        assert "\n" not in line
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3, line
        assert not re.search(r"(?<!\\)<|!\[", line), line


# ---- whole runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Its clients and its metrics are called like that."""
    draw = torch.Generator().manual_seed(0)
    names = [name for name in PAYLOADS if "\x00" not in name]
    clients = {name: (torch.randn(2, 3, generator=draw), torch.tensor([0, 1])) for name in names}
    data = ClientData.from_clients(clients, test=(torch.randn(4, 3, generator=draw), torch.tensor([0, 1, 0, 1])))
    metrics = dict.fromkeys(itertools.islice(names, 0, None, 3), _half)
    fed = Federation(models.mlp((3, 2)), data, local=LocalSGD(lr=0.1), metrics=_known(metrics), engine="loop")
    return fed.fit(1, tmp_path_factory.mktemp("names") / "run", keep_clients_log=True, progress=False)


def _half(scores: Any, targets: Any) -> float:
    return 0.5


def _known(metrics: dict[str, Any]) -> dict[str, Any]:
    """Those names that a federation takes for metrics."""
    taken = {}
    for name, metric in metrics.items():
        try:
            Federation(models.mlp((3, 2)), _tiny(), metrics={name: metric}, engine="loop")
        except ConfigError:
            continue
        taken[name] = metric
    return taken


def _tiny() -> ClientData:
    x, y = torch.zeros(2, 3), torch.tensor([0, 1])
    return ClientData.from_clients({"a": (x, y)}, test=(x, y))


def test_an_exported_run_has_no_formula(run: Run, tmp_path: Path) -> None:
    files = export(run.path, "csv", tmp_path / "csv")
    assert {file.name for file in files} >= {"metrics.csv", "layers.csv", "bytes.csv", "clients.csv"}
    for file in files:
        text = file.read_bytes().decode()
        for separator in (",", ";", "\t"):
            found = [
                cell for cell in opened_by(text, separator) if cell[:1] in ("=", "+", "@") or re.match(r"-\D", cell)
            ]
            assert not found, (file.name, found[:3])


def test_an_exported_run_is_a_table_in_latex_and_markdown(run: Run, tmp_path: Path) -> None:
    (tex,) = export(run.path, "latex", tmp_path / "tex")
    (md,) = export(run.path, "md", tmp_path / "md")
    lines = tex.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.endswith(r" \\")]
    assert len({len(re.findall(r"(?<!\\)&", row)) for row in rows}) == 1
    commands = {*re.findall(r"\\[a-z]+", " ".join(line for line in lines if not line.startswith("%")))}
    assert commands <= {
        r"\begin", r"\toprule", r"\midrule", r"\bottomrule", r"\end", r"\textbackslash", r"\textasciitilde",
        r"\textasciicircum", r"\textbf", r"\pm",
    }  # fmt: skip
    assert (
        len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in md.read_text(encoding="utf-8").splitlines()}) == 1
    )


def test_compared_runs_have_no_formula(run: Run) -> None:
    rows = compare([run, run], force=True)
    for row in rows:  # methods and settings come from configs
        row["method"] = row["codec"] = PAYLOADS[0]
        row["settings"] = {f"method.{p}": p for p in PAYLOADS}
    for cell in opened_by(comparison.as_csv(rows), ","):
        assert not re.match(r"[=+@]|-\D", cell), cell
    for text in (comparison.as_latex(rows), comparison.as_markdown(rows)):
        assert all("\n" not in line for line in text)


def test_a_terminal_is_sent_no_command(run: Run) -> None:
    for words in (["inspect", str(run.path)], ["export", str(run.path), "--to", "md"], ["compare", str(run.path)]):
        output = CliRunner().invoke(cli.app, words).output
        assert "\x1b" not in output
        assert "\x00" not in output


COMMANDS = "a\x1b]0;owned\x07b\x9b2Jc\x9d0;x\x9cd\x08\x7f\re\x85f\x00"
INERT = "a?]0;owned?b?2Jc?0;x?d???e?f?"


def test_only_tabs_and_line_ends_are_left_of_what_a_terminal_obeys() -> None:
    assert printable(COMMANDS + "\t\nünï·±") == INERT + "\t\nünï·±"
    assert {chr(n) for n in range(0xA0) if printable(chr(n)) == chr(n)} == {"\t", "\n", *map(chr, range(32, 127))}


@pytest.mark.parametrize("colours", [True, False])
def test_what_others_say_reaches_a_terminal_without_commands(colours: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Reasons of nodes and names of clients: in notes of a run, on its error output, in lines of a command."""
    out = io.StringIO()
    shown = Console(file=out, force_terminal=colours, no_color=True, width=200)
    terminal.Terminal(shown).note(COMMANDS)
    say(shown, [COMMANDS])
    assert out.getvalue() == f"! {INERT}\n{INERT}\n"
    terminal.Quiet().note(COMMANDS)
    assert capsys.readouterr().err == f"! {INERT}\n"


@pytest.mark.parametrize("error", [StorageError, ValueError, KeyboardInterrupt])
def test_an_error_reaches_a_terminal_without_commands(error: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise error(f"node {COMMANDS}")

    with pytest.raises(typer.Exit):
        guarded(command)()
    said = capsys.readouterr().err
    assert "node a?]0;owned?b" in said
    assert said == printable(said)
