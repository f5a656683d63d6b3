"""What `eval --generate` says of answers: its measures, and the tasks that it makes."""

from __future__ import annotations

import json
import math
import random

import pytest

from vllm_depthpar.evaluate import writing
from vllm_depthpar.evaluate.completions import Answer
from vllm_depthpar.evaluate.estimates import mean_per_token, share
from vllm_depthpar.evaluate.generated_tasks import EXAMPLES, TASKS, questions
from vllm_depthpar.evaluate.repetition import common_prefix, ends_in_loop, repeated_share
from vllm_depthpar.evaluate.writing import Judged

DIFFERENT = list(range(100, 140))


def test_repeated_share() -> None:
    assert repeated_share(DIFFERENT) == 0
    # Eight 4-grams, of which four are different.
    assert repeated_share([1, 2, 3, 4] * 2 + [1, 2, 3]) == 1 / 2
    assert repeated_share([5] * 13) == 1 - 1 / 10
    assert repeated_share([5, 5, 5]) == 0
    assert repeated_share([5, 5, 5], size=2) == 1 / 2


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (DIFFERENT, False),
        (DIFFERENT + [7] * 24, True),
        (DIFFERENT + [7] * 23, False),
        (DIFFERENT + list(range(10)) * 3, True),
        # Twice may be a refrain.
        (DIFFERENT + list(range(20)) * 2, False),
        # In the middle of a piece, as where a limit cuts it.
        (DIFFERENT + list(range(10)) * 3 + [0, 1, 2], True),
        # It came out of it again.
        (DIFFERENT + [7] * 30 + DIFFERENT, False),
        # A number that is counted up.
        ([token for at in range(9) for token in (1, 2, 3, 50 + at)], False),
        ([7] * 30, True),
        ([], False),
    ],
)
def test_ends_in_loop(tokens: list[int], expected: bool) -> None:
    assert ends_in_loop(tokens) is expected


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 3]) == 2
    assert common_prefix([1, 2], [1, 2, 4]) == 2
    assert common_prefix([1], [2]) == 0


def test_mean_per_token() -> None:
    """Of answers of one length it is the mean with its standard error; a long one weighs more."""
    assert mean_per_token([2.0, 4.0, 9.0], [2, 2, 2]) == pytest.approx(
        {"value": 2.5, "stderr": math.sqrt((1.5**2 + 0.5**2 + 2**2) / 2 / 3)}
    )
    assert mean_per_token([1.0, 9.0], [1, 3]) == pytest.approx({"value": 2.5, "stderr": 0.75})
    assert mean_per_token([3.0], [2]) == {"value": 1.5, "stderr": 0.0}


def test_an_error_is_how_far_means_are_apart() -> None:
    """Of many samples of answers of different lengths, drawn from one distribution."""
    draw = random.Random(0)
    means, errors = [], []
    for _ in range(400):
        tokens = [draw.randint(1, 200) for _ in range(32)]
        sums = [draw.gauss(-2, 0.5) * count for count in tokens]
        found = mean_per_token(sums, tokens)
        means.append(found["value"])
        errors.append(found["stderr"])
    center = sum(means) / len(means)
    spread = math.sqrt(sum((value - center) ** 2 for value in means) / len(means))
    assert center == pytest.approx(-2, abs=0.02)
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.15)


def test_share() -> None:
    """Wilson's interval; the numbers are those of its inventor's formula worked out by hand."""
    found = share(8, 10)
    assert found["value"] == 0.8
    assert (found["low"], found["high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    none, every = share(0, 20), share(20, 20)
    assert none["low"] == pytest.approx(0, abs=1e-9)
    assert none["high"] == pytest.approx(0.1611, abs=1e-4)
    assert (every["low"], every["high"]) == pytest.approx((1 - none["high"], 1))


def answer(tokens: list[int], ended: bool = True, logprobs: tuple[float, ...] = ()) -> Answer:
    return Answer(tuple(tokens), "", ended, logprobs)


def test_figures() -> None:
    judged = [
        Judged(answer([1, 2, 3], logprobs=(-1.0, -1.0, -1.0)), (-1.0, -2.0, -6.0)),
        Judged(answer([7] * 5, ended=False, logprobs=(-0.5,) * 5), (-0.5,) * 5),
    ]
    found = writing.figures(judged)
    assert found["log_probability"]["value"] == pytest.approx(-11.5 / 8)
    assert found["kl"]["value"] == pytest.approx((6 + 0) / 8)
    assert found["repeated_4_grams"] == pytest.approx((0 + 1 / 2) / 2)
    assert (found["ended"], found["median_tokens"], found["loops"]) == (1 / 2, 4, 0)
    greedy = writing.figures([Judged(answer([1, 2]), (-1.0, -2.0))])
    assert "kl" not in greedy


def test_a_cut_is_what_a_lower_limit_gives() -> None:
    whole = Judged(answer([1, 2, 3], logprobs=(-1.0, -2.0, -3.0)), (-4.0, -5.0, -6.0))
    assert whole.cut(3) == whole
    assert whole.cut(1000) == whole
    assert whole.cut(2) == Judged(answer([1, 2], ended=False, logprobs=(-1.0, -2.0)), (-4.0, -5.0))


def test_agreement() -> None:
    own = [answer([1, 2, 3, 4]), answer([5, 6]), answer([7, 8, 9])]
    other = [answer([1, 2, 9]), answer([5, 6]), answer([7, 8, 9, 10])]
    assert writing.agreement(other, own) == {"median_tokens_alike": 2, "same": 1 / 3}
    assert writing.agreement(own, own) == {"median_tokens_alike": 3, "same": 1}


def test_by_position() -> None:
    """A model that gets worse late, and an answer that is not there any more then."""
    late = Judged(
        answer([1] * 100, logprobs=(-1.0,) * 100), tuple(-1.0 - (at >= 64) for at in range(100))
    )
    short = Judged(answer([1] * 10, logprobs=(-1.0,) * 10), (-1.5,) * 10)
    first, second = writing.by_position([late, short])
    assert (first["begin"], first["end"], first["tokens"]) == (0, 64, 74)
    assert first["kl"]["value"] == pytest.approx(0.5 * 10 / 74)
    assert first["log_probability"]["value"] == pytest.approx(-1 - 0.5 * 10 / 74)
    assert (second["begin"], second["end"], second["tokens"]) == (64, 100, 36)
    assert second["kl"]["value"] == pytest.approx(1)


@pytest.mark.parametrize("task", TASKS)
def test_questions(task: str) -> None:
    """The same of the same seed, each with its examples, and what is right is accepted."""
    found = questions(task, 40, seed=1)
    assert questions(task, 10, seed=1) == found[:10]
    assert questions(task, 40, seed=2) != found
    assert len({str(one.messages) for one in found}) == 40
    for one in found:
        roles = [message["role"] for message in one.messages]
        assert roles == ["user", "assistant"] * EXAMPLES + ["user"]
        assert one.accepts(one.right)
        assert one.accepts(f" {one.right}\n")
        assert not one.accepts("")
        assert not one.accepts(f"Sure! Here it is: {one.right}")
        assert not one.accepts(f"{one.right}\n{one.right}")
        assert not one.accepts(one.right[: len(one.right) // 2])


@pytest.mark.parametrize("task", TASKS)
def test_what_is_right(task: str) -> None:
    """Of examples and of the question: worked out again from what they ask."""
    for one in questions(task, 20, seed=3):
        asked = [message["content"] for message in one.messages[::2]]
        given = [*(message["content"] for message in one.messages[1::2]), one.right]
        assert given == [solved(task, question) for question in asked]


def solved(task: str, asked: str) -> str:
    """The answer to a question, read from what it says."""
    words = asked.partition(": ")[2].split()
    match task:
        case "arithmetic" if "after" in asked:
            return str(int(asked.removesuffix("?").split()[-1]) + 1)
        case "arithmetic":
            first, sign, second = asked.removeprefix("What is ").removesuffix("?").split()
            numbers = int(first), int(second)
            return str(sum(numbers) if sign == "+" else numbers[0] - numbers[1])
        case "copying":
            return " ".join(words)
        case "retrieval":
            (line,) = [one for one in asked.splitlines() if one.startswith("The pass key is ")]
            return line.removesuffix(".").split()[-1]
        case "upper case":
            return " ".join(words).upper()
        case "JSON":
            city = words[-1].removesuffix(".")
            return json.dumps({"name": words[0], "age": int(words[2]), "city": city})
        case "numbered list":
            return "\n".join(f"{at + 1}. {word}" for at, word in enumerate(words))
    raise ValueError(task)


@pytest.mark.parametrize(
    ("task", "right", "answers"),
    [
        ("arithmetic", "12", {"12": True, "12.": True, "120": False, "= 12": False}),
        ("copying", "a b", {"a b": True, "a  b": False, "A b": False, "a b.": False}),
        ("upper case", "A B", {"A B": True, "A b": False}),
        (
            "JSON",
            '{"name": "Leo", "age": 3}',
            {
                '{"age":3,"name":"Leo"}': True,
                '{\n "name": "Leo",\n "age": 3\n}': True,
                '{"name": "Leo", "age": "3"}': False,
                '{"name": "Leo", "age": 3, "city": ""}': False,
                "{'name': 'Leo', 'age': 3}": False,
                '```json\n{"name": "Leo", "age": 3}\n```': False,
            },
        ),
        (
            "numbered list",
            "1. cup\n2. egg",
            {"1. cup\n2. egg": True, "1. cup\n\n2. egg": False, "cup\negg": False},
        ),
    ],
)
def test_what_is_accepted(task: str, right: str, answers: dict[str, bool]) -> None:
    accepts = TASKS[task].accepts
    assert {text: accepts(text, right) for text in answers} == answers
