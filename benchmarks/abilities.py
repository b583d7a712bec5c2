"""What a chat model can do before it is fine-tuned, as small local tasks: facts by choice, and short instructions whose
answer can be checked. General knowledge, from no data set.

    python -m benchmarks.abilities FOLDER      # writes facts.jsonl and instructions.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

_CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Greece": "Athens", "Austria": "Vienna", "Poland": "Warsaw", "Hungary": "Budapest", "Sweden": "Stockholm",
    "Norway": "Oslo", "Finland": "Helsinki", "Denmark": "Copenhagen", "Ireland": "Dublin", "Belgium": "Brussels",
    "Russia": "Moscow", "Ukraine": "Kyiv", "Turkey": "Ankara", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Thailand": "Bangkok", "Indonesia": "Jakarta",
    "Canada": "Ottawa", "Mexico": "Mexico City", "Brazil": "Brasília", "Argentina": "Buenos Aires", "Chile": "Santiago",
    "Peru": "Lima", "Cuba": "Havana", "Iran": "Tehran", "Iraq": "Baghdad", "Israel": "Jerusalem",
    "Australia": "Canberra", "New Zealand": "Wellington", "South Korea": "Seoul", "Vietnam": "Hanoi",
    "Nepal": "Kathmandu",
}  # fmt: skip
_OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "day": "night", "open": "closed", "fast": "slow", "old": "young",
    "rich": "poor", "wet": "dry", "left": "right", "happy": "sad", "light": "dark", "strong": "weak", "early": "late",
    "empty": "full", "hard": "soft", "high": "low", "long": "short", "clean": "dirty", "loud": "quiet",
}  # fmt: skip
_WORDS = [
    "river", "table", "garden", "music", "window", "bread", "horse", "island", "letter", "mountain", "orange", "paper",
    "queen", "school", "train",
]  # fmt: skip


def facts() -> list[dict[str, Any]]:
    """Capitals, each with three others to choose from; chance is a quarter."""
    draw, rows = random.Random(0), []
    for country, capital in _CAPITALS.items():
        choices = [capital, *draw.sample(sorted({*_CAPITALS.values()} - {capital}), 3)]
        draw.shuffle(choices)
        rows.append({"context": f"The capital of {country} is", "choices": choices, "answer": choices.index(capital)})
    return rows


def instructions() -> list[dict[str, Any]]:
    """Chats of one turn; the answer is one word."""
    asked = [(f"What is the opposite of '{one}'? Answer with one word.", other) for one, other in _OPPOSITES.items()]
    asked += [(f"Write the word '{one}' in capital letters.", one.upper()) for one in _WORDS]
    asked += [(f"Repeat this word once, and write nothing else: {one}", one) for one in _WORDS]
    return [
        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
        for ask, answer in asked
    ]


# An answer is right if it has the word in quotes, in bold, in a sentence that ends with it, or alone.
ANSWER = r"(\w+)\W*$"


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("facts", facts()), ("instructions", instructions())):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
