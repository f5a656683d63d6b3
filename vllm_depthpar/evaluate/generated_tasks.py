"""Tasks for chat models that are made here, so that no data set is needed: seeded, in any number,
each with a checker of its own.

Every question follows three that are answered, as turns of the same chat, so that small models know
the form of an answer. What counts is the whole answer, not a part of it: a model that goes on
talking is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from vllm_depthpar.checkpoint.tokenizer import chat_ids

EXAMPLES = 3

ANIMALS = (
    "ant", "bear", "bee", "camel", "cat", "cow", "crab", "crow", "deer", "dog", "duck", "eagle",
    "fish", "fox", "frog", "goat", "goose", "hare", "horse", "lion", "mole", "mouse", "owl",
    "pig", "rabbit", "rat", "seal", "shark", "sheep", "snake", "spider", "swan", "tiger", "toad",
    "whale", "wolf", "worm", "zebra",
)  # fmt: skip
WORDS = (
    "apple", "arm", "ball", "bell", "boat", "book", "box", "bread", "bridge", "chair", "city",
    "cloud", "coat", "cup", "door", "egg", "field", "fire", "floor", "garden", "gold", "hand",
    "hill", "house", "island", "key", "lamp", "leaf", "letter", "milk", "moon", "night", "paper",
    "rain", "ring", "river", "road", "salt", "ship", "snow", "stone", "street", "summer", "table",
    "tree", "water", "wind", "window", "winter", "wood",
)  # fmt: skip
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Leo")
CITIES = ("Athens", "Berlin", "Cairo", "Dublin", "London", "Madrid", "Oslo", "Paris", "Rome")
# Examples of an answer, of each kind of thing; what the model names is left to it.
KINDS = {
    "animals": ("Cat", "Dog", "Horse", "Lion", "Sheep", "Wolf"),
    "birds": ("Crow", "Duck", "Eagle", "Owl", "Robin", "Swan"),
    "cities": ("Athens", "Berlin", "Cairo", "London", "Madrid", "Rome"),
    "colors": ("Black", "Blue", "Green", "Red", "White", "Yellow"),
    "countries": ("Brazil", "Canada", "France", "India", "Japan", "Spain"),
    "fruits": ("Apple", "Banana", "Cherry", "Grape", "Orange", "Pear"),
    "rivers": ("Amazon", "Danube", "Ganges", "Nile", "Rhine", "Thames"),
    "vegetables": ("Bean", "Cabbage", "Carrot", "Onion", "Pea", "Potato"),
}
_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
_LINES = 24

# What is asked, and a right answer.
Exchange = tuple[str, str]


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        talk: makes so many exchanges, of which the last is the question.
        accepts: whether an answer, without white space around it, is right; beside the right one.
        tokens: that an answer may have.
    """

    talk: Callable[[Random, int], list[Exchange]]
    accepts: Callable[[str, str], bool]
    tokens: int


@dataclass(frozen=True)
class Question:
    """One question of a task.

    Attributes:
        task: its name in `TASKS`.
        messages: what the model answers.
        right: an answer that is right.
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
    *examples, (asked, right) = TASKS[task].talk(random, EXAMPLES + 1)
    messages = []
    for ask, answer in examples:
        messages.append({"role": "user", "content": ask})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": asked})
    return Question(task, tuple(messages), right)


def _each(make: Callable[[Random], Exchange]) -> Callable[[Random, int], list[Exchange]]:
    """Make exchanges that have nothing to do with each other."""
    return lambda random, count: [make(random) for _ in range(count)]


def _arithmetic(random: Random) -> Exchange:
    """Of one, two or three digits, as often; the result is never negative."""
    digits = random.randint(1, 3)
    first, second = (random.randint(10 ** (digits - 1), 10**digits - 1) for _ in range(2))
    if random.random() < 0.5:
        return f"What is {first} + {second}?", f"{first + second}"
    first, second = max(first, second), min(first, second)
    return f"What is {first} - {second}?", f"{first - second}"


def _copying(random: Random) -> Exchange:
    words = " ".join(random.sample(WORDS, 12))
    return f"Repeat exactly: {words}", words


def _retrieval(random: Random, count: int) -> list[Exchange]:
    """Ask for one line after the other of the same list."""
    codes = {animal: f"{random.randint(1000, 9999)}" for animal in random.sample(ANIMALS, _LINES)}
    lines = "\n".join(f"The code of the {animal} is {code}." for animal, code in codes.items())
    asked = [
        (f"What is the code of the {animal}?", codes[animal])
        for animal in random.sample(sorted(codes), count)
    ]
    return [(f"{lines}\n\n{asked[0][0]}", asked[0][1]), *asked[1:]]


def _upper_case(random: Random) -> Exchange:
    words = " ".join(random.sample(WORDS, 5))
    return f"Write in upper case: {words}", words.upper()


def _json(random: Random) -> Exchange:
    name, city, age = random.choice(NAMES), random.choice(CITIES), random.randint(18, 80)
    asked = (
        "Write as a JSON object with the keys name, age and city: "
        f"{name} is {age} years old and lives in {city}."
    )
    return asked, json.dumps({"name": name, "age": age, "city": city})


def _list(random: Random) -> Exchange:
    number, kind = random.choice(list(_NUMBERS)), random.choice(list(KINDS))
    asked = f"List exactly {_NUMBERS[number]} {kind}, one on each line, and nothing else."
    return asked, "\n".join(random.sample(KINDS[kind], number))


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


def _as_many_lines(answer: str, right: str) -> bool:
    """Different lines of one or two words, nothing else: no numbers, no empty lines."""
    lines = answer.split("\n")
    words = [line.replace("-", " ").split() for line in lines]
    short = all(1 <= len(one) <= 2 and "".join(one).isalpha() for one in words)
    return short and len(set(lines)) == len(lines) == len(right.split("\n"))


TASKS = {
    "arithmetic": Task(_each(_arithmetic), _same_number, 16),
    "copying": Task(_each(_copying), _same, 48),
    "retrieval": Task(_retrieval, _same_number, 16),
    "upper case": Task(_each(_upper_case), _same, 48),
    "JSON": Task(_each(_json), _same_json, 48),
    "lists": Task(_each(_list), _as_many_lines, 48),
}
