"""Tasks for chat models that are made here, so that no data set is needed: seeded, in any number,
each with a checker of its own.

Every question follows others that are answered, as turns of the same chat, so that small models
know the form of an answer. What counts is the whole answer, not a part of it: a model that goes on
talking is wrong. Questions of a task have different levels, so that it tells something of small
models and of large ones; examples have their question's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from vllm_depthpar.checkpoint.tokenizer import chat_ids

EXAMPLES = 4

WORDS = (
    "apple", "arm", "ball", "bell", "boat", "book", "box", "bread", "bridge", "chair", "city",
    "cloud", "coat", "cup", "door", "egg", "field", "fire", "floor", "garden", "gold", "hand",
    "hill", "house", "island", "key", "lamp", "leaf", "letter", "milk", "moon", "night", "paper",
    "rain", "ring", "river", "road", "salt", "ship", "snow", "stone", "street", "summer", "table",
    "tree", "water", "wind", "window", "winter", "wood",
)  # fmt: skip
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Leo")
CITIES = ("Athens", "Berlin", "Cairo", "Dublin", "London", "Madrid", "Oslo", "Paris", "Rome")
LINES = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Snow is cold.",
    "Birds sing in the morning.", "The river runs to the sea.", "Bread is made of flour.",
    "The road leads to the city.", "The lamp stands on the table.", "The letter came on Monday.",
    "The old house has a garden.", "The ship left the island at night.", "Apples grow on trees.",
    "The wind blows from the west.", "The children play in the street.", "Stones are heavy.",
)  # fmt: skip

# What is asked, and what is right.
Exchange = tuple[str, str]


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        make: makes one of a level, from 0 for the easiest to 1, exclusive.
        accepts: whether an answer, without white space around it, is right; beside the right one.
        tokens: that an answer may have.
    """

    make: Callable[[Random, float], Exchange]
    accepts: Callable[[str, str], bool]
    tokens: int


@dataclass(frozen=True)
class Question:
    """One question of a task.

    Attributes:
        task: its name in `TASKS`.
        messages: what the model answers.
        right: the answer.
    """

    task: str
    messages: tuple[Mapping[str, str], ...]
    right: str

    def ids(self, tokenizer: Any) -> list[int]:
        """Write the chat as token ids; a model that can think first is told not to."""
        return chat_ids(tokenizer, self.messages, enable_thinking=False)

    def accepts(self, answer: str) -> bool:
        """Say whether an answer is right."""
        return TASKS[self.task].accepts(answer.strip(), self.right)


def questions(task: str, count: int, seed: int) -> list[Question]:
    """Make questions; the first of a larger count are those of a smaller.

    Args:
        task: of `TASKS`.
        seed: of all that is drawn.
    """
    return [_question(task, Random(f"{seed} {task} {number}")) for number in range(count)]


def _question(task: str, random: Random) -> Question:
    messages, level = [], random.random()
    for _ in range(EXAMPLES):
        asked, right = TASKS[task].make(random, level)
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": right})
    asked, right = TASKS[task].make(random, level)
    return Question(task, (*messages, {"role": "user", "content": asked}), right)


def _arithmetic(random: Random, level: float) -> Exchange:
    """Half of them count on; of the others half have one digit, half two. Nothing is negative."""
    if level < 0.5:
        number = random.randint(1, 98)
        return f"What number comes after {number}?", f"{number + 1}"
    most = 9 if level < 0.75 else 99
    first, second = random.randint(1, most), random.randint(1, most)
    if most == 9 or random.random() < 0.5:
        return f"What is {first} + {second}?", f"{first + second}"
    first, second = max(first, second), min(first, second)
    return f"What is {first} - {second}?", f"{first - second}"


def _copying(random: Random, level: float) -> Exchange:
    words = " ".join(random.sample(WORDS, 3 + int(10 * level)))
    return f"Repeat exactly: {words}", words


def _retrieval(random: Random, level: float) -> Exchange:
    """One line among others, as pass keys are looked for (arXiv 2305.16300)."""
    key = f"{random.randint(1000, 9999)}"
    lines = random.sample(LINES, 4 + int(9 * level))
    lines.insert(random.randint(0, len(lines)), f"The pass key is {key}.")
    return "\n".join([*lines, "", "What is the pass key?"]), key


def _upper_case(random: Random, level: float) -> Exchange:
    words = " ".join(random.sample(WORDS, 1 + int(2 * level)))
    return f"Write in upper case: {words}", words.upper()


def _json(random: Random, _: float) -> Exchange:
    name, city, age = random.choice(NAMES), random.choice(CITIES), random.randint(18, 80)
    asked = (
        "Write as a JSON object with the keys name, age and city: "
        f"{name} is {age} years old and lives in {city}."
    )
    return asked, json.dumps({"name": name, "age": age, "city": city})


def _list(random: Random, level: float) -> Exchange:
    words = random.sample(WORDS, 2 + int(3 * level))
    right = "\n".join(f"{number}. {word}" for number, word in enumerate(words, 1))
    return f"Write as a numbered list: {' '.join(words)}", right


def _same(answer: str, right: str) -> bool:
    return answer == right


def _same_number(answer: str, right: str) -> bool:
    return answer.removesuffix(".") == right


def _same_json(answer: str, right: str) -> bool:
    try:
        found: object = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    return bool(found == json.loads(right))


TASKS = {
    "arithmetic": Task(_arithmetic, _same_number, 16),
    "copying": Task(_copying, _same, 48),
    "retrieval": Task(_retrieval, _same_number, 16),
    "upper case": Task(_upper_case, _same, 32),
    "JSON": Task(_json, _same_json, 48),
    "numbered list": Task(_list, _same, 48),
}
