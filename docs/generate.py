"""Pages of the reference that are made from the program, and the folder from which the site is built.

python docs/generate.py                    writes docs/reference/*.md anew; a test says when they are stale
python docs/generate.py --site build/docs  puts all pages together for `mkdocs build --strict`

The site has pages from elsewhere in the repository too (`ELSEWHERE`). Links between pages are right in the repository;
they are turned into those of the site, and a link to what the site has not becomes plain text.
"""

from __future__ import annotations

import inspect
import posixpath
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from lamina import cli
from lamina.explain import codes, files, keys, words

HERE = Path(__file__).parent
ROOT = HERE.parent
ELSEWHERE = {  # in the repository -> in the site
    "src/lamina/explain/pages": "reference/codes",
    "benchmarks/parity": "results",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
}
MADE = "<!-- Made by `python docs/generate.py`; a test says when it is stale. -->"


# ---- reference


def reference() -> dict[str, str]:
    """File in docs/reference -> text."""
    return {"cli.md": _cli(), "config.md": _config(), "files.md": _files(), "codes.md": _codes()}


def _page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", MADE, *parts]) + "\n"


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [titles, tuple("---" for _ in titles), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines
    )


def _cli() -> str:
    command: Any = typer.main.get_command(cli.app)
    said = (
        "What `--help` says, in one page. Exit codes: 0 done, 2 usage and config (E1xx), 3 data (E2xx), 4 a run failed "
        "(E3xx), 5 storage (E4xx), 130 interrupted after a commit. `--json` gives one object per line; `NO_COLOR` and "
        "`COLUMNS` are respected."
    )
    return _page("Commands", said, *_commands(command, "lamina"))


def _commands(command: Any, path: str) -> Iterator[str]:
    for name, inner in command.commands.items():
        if hasattr(inner, "commands"):
            yield from _commands(inner, f"{path} {name}")
            continue
        arguments = [option for option in inner.params if option.param_type_name == "argument"]
        options = [option for option in inner.params if option.param_type_name == "option" and option.help]
        said = " ".join([f"{path} {name}", *(str(option.metavar or option.name.upper()) for option in arguments)])
        yield f"## {path} {name}"
        yield f"`{said} [OPTIONS]`" if options else f"`{said}`"
        yield inspect.cleandoc(inner.help or "").replace("\f", "")
        if options:
            yield _table(("option", ""), [_option(option) for option in options])


def _option(option: Any) -> tuple[str, str]:
    """Not by click's own lines: those differ between versions of typer."""
    value = "" if option.is_flag else f" {option.metavar or option.name.upper()}"
    plain = option.default is None or callable(option.default) or isinstance(option.default, bool)
    default = "" if plain else f" Default: {option.default}."
    return f"`{', '.join(option.opts)}{value}`", " ".join(option.help.split()) + default


def _config() -> str:
    known = keys.known()
    sections: dict[str, list[keys.Key]] = {}
    for name, key in known.items():
        sections.setdefault(name.partition(".")[0] if "." in name else "", []).append(key)
    parts = [
        "An experiment is a TOML file, or a preset, and `key=value` on the command line. Later ones win: default, "
        'preset, file, environment (`LAMINA_ROUNDS`, `LAMINA_LOCAL__LR`), command line. `"none"` stands for no value. '
        "`lamina explain KEY` says the same in the terminal; `lamina run ... --show-config all` has every key of one "
        "experiment with its value and where it came from.",
        "## In an editor",
        "`lamina explain schema > lamina.schema.json` writes the JSON schema of these files. With it an editor "
        "completes keys and marks what cannot be. [Taplo](https://taplo.tamasfe.dev), which Even Better TOML for VS "
        "Code has in it, takes it from the first line of the file:",
        '```toml\n#:schema ./lamina.schema.json\npreset = "quickstart"\nmethod = { name = "fedlama", phi = 4 }\n```',
        "The schema of a method, codec, model or data set has its own keys and no other.",
    ]
    for section, found in sections.items():
        parts.append(f"## {section}" if section else "## At the top")
        parts.append(_table(("key", "takes", "default", ""), [row for key in found for row in _key(key)]))
    return _page("Keys of the config", *parts)


def _key(key: keys.Key) -> Iterator[tuple[str, ...]]:
    """A row for each meaning that it has among the parts that take it."""
    sorts: dict[tuple[str, str, str], list[str]] = {}
    for taken in key.taken:
        sorts.setdefault((taken.type, keys.said(taken), words.plain(taken.meaning)), []).append(
            taken.by.partition(" ")[2]
        )
    for (type_, default, meaning), owners in sorts.items():
        of = ", ".join(name for name in owners if name)
        yield f"`{key.name}`", type_, f"`{default}`", f"{of}: {meaning}" if of else meaning


def _files() -> str:
    parts = [
        "A run has a folder, `runs/<experiment>/<number>-<method>`; `runs/latest` is a link to the newest. A test runs "
        "one and compares: no file and no column is written that is not described here. The same in the terminal: "
        "`lamina explain files`, `lamina explain layers.jsonl`.",
    ]
    for file in files.FILES:
        parts += [f"## {file.name}", file.about]
        if file.columns:
            parts.append(_table(("column" if file.name.endswith("l") else "key", ""),
                                [(f"`{name}`", text) for name, text in file.columns.items()]))  # fmt: skip
    return _page("Files of a run", *parts)


def _codes() -> str:
    parts = [
        "Every error has a code, says where it came from, and what to do. `lamina explain CODE` shows its page without "
        "a network. The first digit gives the exit code of the command.",
    ]
    rest = list(codes.names())
    for start, about in codes.KINDS.items():
        own = [code for code in rest if code.startswith(start)]
        rest = [code for code in rest if code not in own]
        rows = [(f"[{code}](../../src/lamina/explain/pages/{code}.md)", codes.page(code).title) for code in own]
        if rows:
            parts += [f"## {start}: {about}", _table(("code", ""), rows)]
    assert not rest, f"codes.KINDS lacks a kind for {rest}"
    return _page("Codes", *parts)


# ---- site


def place(path: str) -> str | None:
    """Where a file of the repository is in the site; None where it is not."""
    for source, target in ELSEWHERE.items():
        if path == source:
            return target
        if path.startswith(f"{source}/"):
            return f"{target}/{path.removeprefix(source + '/')}"
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def pages() -> dict[str, str]:
    """File of the repository -> its place in the site, of every page and picture."""
    found = [path for path in HERE.rglob("*") if path.is_file() and path.suffix in (".md", ".png", ".svg", ".html")]
    for source in ELSEWHERE:
        path = ROOT / source
        found += [path] if path.is_file() else sorted(path.glob("*.md"))
    names = [path.relative_to(ROOT).as_posix() for path in found]
    return {name: target for name in sorted(names) if (target := place(name)) is not None}


def linked(text: str, source: str, targets: dict[str, str]) -> str:
    """The page with the links of the site."""
    here = posixpath.dirname(source)
    own = posixpath.dirname(targets[source])

    def put(match: re.Match[str]) -> str:
        label, link = match[1], match[2]
        path, mark, anchor = link.partition("#")
        if re.match(r"\w+:", link) or not path:
            return match[0]
        target = targets.get(posixpath.normpath(posixpath.join(here, path)))
        return label if target is None else f"[{label}]({posixpath.relpath(target, own or '.')}{mark}{anchor})"

    blocks = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)  # code is no Markdown
    return "".join(
        block if block.startswith("```") else re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", put, block) for block in blocks
    )


def assemble(folder: Path) -> None:
    """All pages in one folder, as mkdocs wants them."""
    if folder.exists():
        shutil.rmtree(folder)
    targets = pages()
    for source, target in targets.items():
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        if source.endswith(".md"):
            text = (ROOT / source).read_text(encoding="utf-8")
            path.write_text(linked(text, source, targets), encoding="utf-8")
        else:
            shutil.copyfile(ROOT / source, path)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--site"] and len(arguments) == 2:
        assemble(Path(arguments[1]))
    elif not arguments:
        (HERE / "reference").mkdir(exist_ok=True)
        for name, text in reference().items():
            (HERE / "reference" / name).write_text(text, encoding="utf-8")
    else:
        sys.exit("usage: python docs/generate.py [--site DIR]")


if __name__ == "__main__":
    main(sys.argv[1:])
