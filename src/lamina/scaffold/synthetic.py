"""Made-up tables with something in them that can be learned: the same bytes every time."""

from __future__ import annotations

import math
import random

SITES = ("north", "east", "south", "west", "harbour", "hill")

_PRODUCTS = ("kettle", "lamp", "chair", "radio", "jacket", "bicycle", "tent", "clock", "printer", "scarf")
_PRAISE = ("works well", "is a joy to use", "arrived early", "looks lovely", "was worth every penny", "feels solid")
_BLAME = ("broke at once", "is a nuisance", "arrived late", "looks shabby", "was a waste of money", "feels flimsy")
_OPENINGS = ("the", "my new", "this", "our", "their", "the second")
_ASIDES = ("and I told a friend", "so I wrote this", "after a week", "as expected", "to be honest", "like the last one")


def clinics(rows: int = 1200, seed: int = 0) -> str:
    """CSV: clinic, age, pressure, glucose, smoker, ill. Clinics differ in the age of their patients and in size."""
    draw = random.Random(seed)
    lines = ["clinic,age,pressure,glucose,smoker,ill"]
    for _ in range(rows):
        at = int(len(SITES) * draw.random() ** 1.5)
        age = min(95, max(18, round(draw.gauss(38 + 6 * at, 12))))
        smoker = draw.random() < 0.3
        pressure = draw.gauss(110 + 0.3 * age, 10)
        glucose = draw.gauss(5.2 + 0.01 * age, 0.9)
        odds = 0.05 * (age - 50) + 0.05 * (pressure - 125) + 1.1 * (glucose - 5.7) + 1.5 * smoker - 0.4
        ill = draw.random() < 1 / (1 + math.exp(-2 * odds))
        cells = (SITES[at], age, f"{pressure:.0f}", f"{glucose:.1f}", "yes" if smoker else "no", "yes" if ill else "no")
        lines.append(",".join(map(str, cells)))
    return "\n".join(lines) + "\n"


def reviews(rows: int = 1200, seed: int = 0) -> str:
    """CSV: shop, text, verdict ("good" or "bad"). Shops differ in what they sell and in how many are content."""
    draw = random.Random(seed)
    lines = ["shop,text,verdict"]
    for _ in range(rows):
        at = int(len(SITES) * draw.random())
        good = draw.random() < 0.35 + 0.06 * at
        says, other = (_PRAISE, _BLAME) if good else (_BLAME, _PRAISE)
        product = _PRODUCTS[(at * 2 + int(draw.random() * 5)) % len(_PRODUCTS)]
        words = [draw.choice(_OPENINGS), product, draw.choice(says), "and", draw.choice(says)]
        if draw.random() < 0.3:
            words += ["though it", draw.choice(other)]
        if draw.random() < 0.6:
            words.append(draw.choice(_ASIDES))
        lines.append(f"{SITES[at]},{' '.join(words)},{'good' if good else 'bad'}")
    return "\n".join(lines) + "\n"
