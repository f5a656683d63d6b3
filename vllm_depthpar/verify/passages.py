"""A few short passages in several styles, to ask a model about."""

from __future__ import annotations

import random
from typing import Any

PASSAGES = (
    "The",
    "Bridges are built where people have to cross something that they cannot walk through: a "
    "river, a valley, a road. The oldest that still stand are of stone, and carry their load by "
    "pressure alone. Wood is lighter, but it rots. Steel can be pulled as well as pressed, which "
    "made the long suspension bridges of the nineteenth century possible; one of the first of "
    "them was opened in 1826 and is still in use.",
    '"You are late again," said the clerk without looking up.\n\n"The train was," said Anna, and '
    'put her wet umbrella in the corner. "Has anybody asked for me?"\n\n"Only the man with the '
    'dog. He left a letter, and he would not say what was in it."',
    "def merge(left, right):\n"
    '    """Merge two sorted lists into one."""\n'
    "    merged, i, j = [], 0, 0\n"
    "    while i < len(left) and j < len(right):\n"
    "        if left[i] <= right[j]:\n"
    "            merged.append(left[i])\n"
    "            i += 1\n"
    "        else:\n"
    "            merged.append(right[j])\n"
    "            j += 1\n"
    "    return merged + left[i:] + right[j:]\n",
    "To make bread for four people you need:\n\n1. 500 g of flour\n2. 350 ml of warm water\n"
    "3. 10 g of salt\n4. 7 g of dry yeast\n\nMix everything, wait for an hour, and",
    '{"orders": [{"id": 1041, "city": "Lyon", "items": 3, "total": 74.90}, '
    '{"id": 1042, "city": "Porto", "items": 1, "total": 12.50}, {"id": 1043, "city":',
    "Der Zug nach Hamburg fährt heute von Gleis sieben. Le musée est fermé le mardi. "
    "La biblioteca abre a las nueve. 東京の天気は晴れです。",
    "Question: A farmer has 17 sheep. All but 9 run away, and then he buys 4 more. How many sheep "
    "has he now?\nAnswer: Nine sheep are left, because all but 9 ran away. With 4 more he has",
)
# The last passage: all of them one after the other, up to so many tokens.
LONGEST = 448
_RANDOM_LENGTHS = (1, 17, 33, 64, 100, 129, 160, LONGEST)


def token_ids(tokenizer: Any, most: int) -> list[list[int]]:
    """Encode the passages as tokens, and all of them as one more.

    Args:
        tokenizer: transformers'; it begins each passage as it begins any text.
        most: tokens of a passage.
    """
    texts = [*PASSAGES, "\n\n".join(PASSAGES)]
    return [tokenizer(text).input_ids[: min(most, LONGEST)] for text in texts]


def random_ids(vocab: int, most: int) -> list[list[int]]:
    """Draw seeded random tokens in their place, for a model without a tokenizer."""
    numbers = random.Random(0)
    return [numbers.choices(range(vocab), k=min(most, length)) for length in _RANDOM_LENGTHS]
