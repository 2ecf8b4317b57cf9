"""Writes the example pairs of the how-to pages beside itself: `python docs/examples/make.py`.

Each task gets NAME.jsonl to train on and NAME-test.jsonl with combinations that the former does not contain.
"""

import json
import random
from pathlib import Path

Row = tuple[str, str]

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PLACES = {  # country: capital, continent
    "Argentina": ("Buenos Aires", "South America"),
    "Austria": ("Vienna", "Europe"),
    "Brazil": ("Brasília", "South America"),
    "Chile": ("Santiago", "South America"),
    "China": ("Beijing", "Asia"),
    "Cuba": ("Havana", "North America"),
    "Egypt": ("Cairo", "Africa"),
    "Finland": ("Helsinki", "Europe"),
    "France": ("Paris", "Europe"),
    "Ghana": ("Accra", "Africa"),
    "Greece": ("Athens", "Europe"),
    "India": ("New Delhi", "Asia"),
    "Italy": ("Rome", "Europe"),
    "Japan": ("Tokyo", "Asia"),
    "Kenya": ("Nairobi", "Africa"),
    "Mexico": ("Mexico City", "North America"),
    "Nepal": ("Kathmandu", "Asia"),
    "Norway": ("Oslo", "Europe"),
    "Peru": ("Lima", "South America"),
    "Vietnam": ("Hanoi", "Asia"),
}
QUESTIONS = {
    "The capital of {country} is {capital}.": [
        "What is the capital of {country}?",
        "Which city is the capital of {country}?",
        "Name the capital of {country}.",
        "Tell me the capital of {country}.",
        "What is {country}'s capital?",
    ],
    "{country} is a country in {continent}.": [
        "Where is {country}?",
        "On which continent is {country}?",
        "Which continent is {country} in?",
        "Name the continent of {country}.",
        "Tell me where {country} is.",
    ],
}
FUNCTIONS = {
    "add": "{a} + {b}",
    "subtract": "{a} - {b}",
    "multiply": "{a} * {b}",
    "divide": "{a} / {b}",
    "remainder": "{a} % {b}",
    "power": "{a} ** {b}",
    "equal": "{a} == {b}",
    "different": "{a} != {b}",
    "smaller": "{a} if {a} < {b} else {b}",
    "larger": "{a} if {a} > {b} else {b}",
    "mean": "({a} + {b}) / 2",
    "distance": "abs({a} - {b})",
}
NAMES = (
    "a b, x y, m n, p q, u v, s t, i j, c d, f g, k l, r w, h z, left right, first second, old new, "
    "one other, low high, begin end, top bottom, width height, price tax, before after, head tail, min max"
)


def digits(rng: random.Random) -> tuple[list[Row], list[Row]]:
    numbers: set[str] = set()
    while len(numbers) < 500:
        numbers.add(" ".join(str(rng.randrange(10)) for _ in range(rng.randint(1, 4))))
    rows = [(f"{n} =", " ".join(WORDS[int(digit)] for digit in n.split())) for n in sorted(numbers)]
    rng.shuffle(rows)
    return rows[:400], rows[400:]


def questions(rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Of each fact one phrasing of the question is held out."""
    train, test = [], []
    for country, (capital, continent) in PLACES.items():
        for answer, phrasings in QUESTIONS.items():
            values = {"country": country, "capital": capital, "continent": continent}
            rows = [(text.format(**values), " " + answer.format(**values)) for text in phrasings]
            rng.shuffle(rows)
            train += rows[1:]
            test += rows[:1]
    return train, test


def code(rng: random.Random) -> tuple[list[Row], list[Row]]:
    rows = []
    for name, body in FUNCTIONS.items():
        for pair in NAMES.split(", "):
            a, b = pair.split()
            rows.append((f"def {name}({a}, {b}):", f"\n    return {body.format(a=a, b=b)}\n"))
    rng.shuffle(rows)
    return rows[:-24], rows[-24:]


def write(path: Path, rows: list[Row]) -> None:
    lines = (json.dumps({"prompt": p, "completion": c}, ensure_ascii=False, separators=(",", ":")) for p, c in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def main(folder: Path) -> None:
    for make in (digits, questions, code):
        train, test = make(random.Random(0))
        write(folder / f"{make.__name__}.jsonl", train)
        write(folder / f"{make.__name__}-test.jsonl", test)


if __name__ == "__main__":
    main(Path(__file__).parent)
