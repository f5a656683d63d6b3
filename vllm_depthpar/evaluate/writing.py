"""What answers of one plan say beside those of the unmodified model. Plain arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import mean, median
from typing import Any

from vllm_depthpar.evaluate.completions import Answer
from vllm_depthpar.evaluate.estimates import mean_per_token
from vllm_depthpar.evaluate.repetition import common_prefix, ends_in_loop, repeated_share

# Where a long answer is looked at piece by piece.
_EDGES = (0, 64, 256, 1024, 4096, 16384)


@dataclass(frozen=True)
class Judged:
    """An answer, and what the unmodified model says of it.

    Attributes:
        answer: by the plan.
        unmodified: log-probability of each of its tokens under the unmodified model, in nats.
    """

    answer: Answer
    unmodified: tuple[float, ...]

    def cut(self, tokens: int) -> Judged:
        """Take what was there after so many tokens: what a lower limit would have given."""
        whole = self.answer
        shorter = replace(
            whole,
            tokens=whole.tokens[:tokens],
            ended=whole.ended and len(whole.tokens) <= tokens,
            logprobs=whole.logprobs[:tokens],
        )
        return Judged(shorter, self.unmodified[:tokens])


def figures(judged: Sequence[Judged]) -> dict[str, Any]:
    """Describe answers, JSON-ready.

    Returns:
        "log_probability": mean per token under the unmodified model, nats, with its standard error;
        "kl", where the answers were drawn from the plan's own distribution: the mean of what that
        gives their tokens more, which estimates KL(plan || unmodified) per token;
        "repeated_4_grams" (mean share), "loops" and "ended" (shares of the answers), and
        "median_tokens".
    """
    answers = [one.answer for one in judged]
    found: dict[str, Any] = {"log_probability": _per_token([one.unmodified for one in judged])}
    if answers[0].logprobs:
        found["kl"] = _per_token([_gains(one) for one in judged])
    return {
        **found,
        "repeated_4_grams": mean(repeated_share(one.tokens) for one in answers),
        "loops": mean(ends_in_loop(one.tokens) for one in answers),
        "ended": mean(one.ended for one in answers),
        "median_tokens": median(len(one.tokens) for one in answers),
    }


def agreement(answers: Sequence[Answer], own: Sequence[Answer]) -> dict[str, float]:
    """Compare greedy answers with the unmodified model's own.

    Returns:
        "median_tokens_alike": before the first that differs; of an answer that never does, all.
        "same": share of the answers that never do.
    """
    pairs = [(one.tokens, other.tokens) for one, other in zip(answers, own, strict=True)]
    return {
        "median_tokens_alike": median(common_prefix(*pair) for pair in pairs),
        "same": mean(one == other for one, other in pairs),
    }


def by_position(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Describe drawn answers piece by piece, JSON-ready: whether they get worse as they get longer.

    Returns:
        For each piece "begin" and "end" (exclusive), how many "tokens" all answers have there, and
        "log_probability" and "kl" as `figures` has them.
    """
    found = []
    longest = max(len(one.answer.tokens) for one in judged)
    for begin, end in pairwise(_EDGES):
        there = [one for one in judged if len(one.unmodified) > begin]
        if there:
            found.append(
                {
                    "begin": begin,
                    "end": min(end, longest),
                    "tokens": sum(len(one.unmodified[begin:end]) for one in there),
                    "log_probability": _per_token([one.unmodified[begin:end] for one in there]),
                    "kl": _per_token([_gains(one)[begin:end] for one in there]),
                }
            )
    return found


def _gains(one: Judged) -> list[float]:
    both = zip(one.answer.logprobs, one.unmodified, strict=True)
    return [own - unmodified for own, unmodified in both]


def _per_token(values: Sequence[Sequence[float]]) -> dict[str, float]:
    return mean_per_token([sum(one) for one in values], [len(one) for one in values])
