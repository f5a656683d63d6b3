"""Rounding or a fault: judging the difference between what vLLM serves and the reference.

vLLM is asked as it would serve: the log-probability of every prompt token (prefill), and 64 greedy
tokens after each prompt with their log-probabilities (decoding, of a batch and of one sequence
alone). The reference runs the same plan over the same texts, vLLM's own tokens included, on
transformers in fp32. So each token is judged by itself, and no near tie early in a text spoils the
rest of it.

How large a difference is rounding and no fault depends on dtype, kernels, quantization and the
plan: one that damages the model amplifies any rounding. All of that is measured, not guessed:

- The control, vLLM's own model against the unmodified reference, says how much this vLLM rounds.
- The reference run once more, in bfloat16, says how much a plan amplifies rounding. To first order
  that is one number, whatever rounds: 2**16 times finer rounding gives 2**16 times smaller
  differences, and the ratio of a plan's to the control's stays.

So rounding explains of a plan: control * (plan's reference in bf16 / control's reference in bf16),
and no less than the control. `MEAN_FACTOR` and `WORST_FACTOR` times that are allowed. SmolLM2-135M,
plain, identity, 3 and 8 pairs, and 6 of 30 layers skipped: what was found was 0.8 to 1.1 times what
this explains in fp32 (control 5e-6 nats, amplified up to 3.6 times), and 0.9 to 1.1 in bf16 (0.024
nats, up to 4.0 times); of the single worst tokens 0.3 to 2.7 times, amplified up to 26 times. A
block that reads what is not there is wrong by 1e5 times in fp32, and by 40 to 100 times in bf16.

A generated token is the reference's best, or two log-probabilities that rounding moved have changed
places: it may be behind by as much as a worst token may be off. The control itself has to be what
its dtype's unit roundoff makes of the reference's own bf16 rounding, within `CONTROL_FACTOR`; where
something is quantized, whose error the reference lacks, within `QUANTIZED_LIMIT`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_depthpar.verify.streamed import Score

MEAN_FACTOR, WORST_FACTOR, CONTROL_FACTOR = 3, 10, 10
# Differences below these are of no account, whatever the control's: nats, mean and worst.
FLOOR = 1e-5, 1e-4
# Of a quantized control's mean, nats.
QUANTIZED_LIMIT = 0.5
# Unit roundoff, in units of bfloat16's.
_ROUNDOFF = {"bfloat16": 1, "float16": 2**-3, "float32": 2**-16}
PROMPT, GENERATED = PHASES = ("prompt", "generated")


@dataclass(frozen=True)
class Answer:
    """What an engine made of a prompt.

    Attributes:
        prompt, generated: token ids.
        logprobs: of each of these tokens but the first, in nats.
    """

    prompt: list[int]
    generated: list[int]
    logprobs: list[float]

    @property
    def text(self) -> list[int]:
        """All tokens."""
        return self.prompt + self.generated


@dataclass(frozen=True)
class Served:
    """What an engine answered, and what it was.

    Attributes:
        dtype: that it computes in, as "float32".
        mode: "eager" or "compiled", and its CUDA graphs.
        quantized: what rounds weights, activations or KV cache to less than the dtype; "" if
            nothing does.
    """

    answers: list[Answer]
    dtype: str
    mode: str
    quantized: str


@dataclass(frozen=True)
class Difference:
    """Between the log-probabilities that two models give to the same tokens, in nats.

    Attributes:
        mean, worst: of the absolute values; NaN if one of them is.
        gap: by how much the worst of the tokens is behind the reference's best.
    """

    mean: float
    worst: float
    gap: float = 0.0


# Of each of `PHASES`: vLLM's difference, and that of the reference when it runs in bfloat16.
Compared = dict[str, tuple[Difference, Difference]]


def difference(
    ours: Sequence[float], reference: Sequence[float], best: Sequence[float] = ()
) -> Difference:
    """Measure how far one model's log-probabilities of some tokens are from the reference's.

    Args:
        ours, reference: one for each token, at least one.
        best: the reference's of its likeliest token there, for tokens that we chose.
    """
    apart = [abs(one - other) for one, other in zip(ours, reference, strict=True)]
    gaps = [top - own for top, own in zip(best, reference, strict=True)] if best else [0.0]
    return Difference(math.fsum(apart) / len(apart), _largest(apart), _largest(gaps))


def _largest(values: Sequence[float]) -> float:
    return max(values, key=lambda value: (math.isnan(value), value))


def explained(
    control: Difference, control_in_bf16: Difference, plan_in_bf16: Difference
) -> Difference:
    """Compute what rounding explains of a plan's difference (see the module).

    Args:
        control: vLLM's, of the unmodified model.
        control_in_bf16, plan_in_bf16: of the reference when it runs in bfloat16.
    """
    scale = control.mean / control_in_bf16.mean if control_in_bf16.mean else 0.0
    worst = max(control.worst, scale * plan_in_bf16.worst)
    return Difference(max(control.mean, scale * plan_in_bf16.mean), worst)


def allowed(explained: Difference) -> Difference:
    """Compute the largest difference that is taken for rounding."""
    mean, worst = (
        factor * max(value, floor)
        for factor, value, floor in zip(
            (MEAN_FACTOR, WORST_FACTOR), (explained.mean, explained.worst), FLOOR, strict=True
        )
    )
    return Difference(mean, worst, gap=worst)


def allowed_of_control(in_bf16: Difference, dtype: str, quantized: str) -> Difference:
    """Compute the largest difference that vLLM's own model may have.

    Args:
        in_bf16: of the unmodified reference when it runs in bfloat16.
        dtype, quantized: see `Served`.
    """
    if quantized:
        return Difference(QUANTIZED_LIMIT, math.inf, math.inf)
    mean = CONTROL_FACTOR * max(in_bf16.mean * _ROUNDOFF.get(dtype, 1), FLOOR[0])
    return Difference(mean, math.inf, math.inf)


def fault(found: Difference, allowed: Difference) -> str | None:
    """Say what of a difference is not allowed, in words; None if all is. NaN is not."""
    for name in ("mean", "worst", "gap"):
        value, most = getattr(found, name), getattr(allowed, name)
        if not value <= most:
            what = {
                "mean": "log-probabilities are off by {} nats on average",
                "worst": "a log-probability is off by {} nats",
                "gap": "a token is {} nats behind the reference's best",
            }[name]
            return f"{what.format(f'{value:.2g}')}; allowed: {most:.2g}"
    return None


def compare(
    answers: Sequence[Answer], exact: Sequence[Score], in_bf16: Sequence[Score]
) -> Compared:
    """Measure the differences of an engine's answers from the reference.

    Args:
        exact, in_bf16: the reference's scores of the answers' texts, in fp32 and in bfloat16.
    """
    found = {}
    for phase in PHASES:
        ours: list[float] = []
        fp32: list[float] = []
        bf16: list[float] = []
        best: list[float] = []
        for answer, score, rounded in zip(answers, exact, in_bf16, strict=True):
            begin = len(answer.prompt) - 1
            part = slice(begin) if phase == PROMPT else slice(begin, None)
            ours += answer.logprobs[part]
            fp32 += score.chosen[part]
            bf16 += rounded.chosen[part]
            best += score.best[part]
        served = difference(ours, fp32, best if phase == GENERATED else ())
        found[phase] = (served, difference(bf16, fp32))
    return found


def judge(differences: Sequence[Compared], dtype: str, quantized: str) -> list[dict[str, Any]]:
    """Say what to make of differences.

    Args:
        differences: the control's first.
        dtype, quantized: of the control, see `Served`.

    Returns:
        For each, JSON-ready: of "prompt" and "generated" the `difference`, that of the reference
        `in_bf16`, what rounding has `explained` of it and what is `allowed`; and the `fault` in
        words, None if there is none.
    """
    rows = []
    for at, of_one in enumerate(differences):
        row: dict[str, Any] = {"fault": None}
        for phase, (served, in_bf16) in of_one.items():
            control, control_in_bf16 = differences[0][phase]
            by_rounding = explained(control, control_in_bf16, in_bf16)
            most = allowed(by_rounding) if at else allowed_of_control(in_bf16, dtype, quantized)
            row[phase] = {
                "difference": asdict(served),
                "in_bf16": asdict(in_bf16),
                "explained": asdict(by_rounding),
                "allowed": asdict(most),
            }
            if row["fault"] is None and (words := fault(served, most)):
                row["fault"] = f"{phase} tokens: {words}"
        rows.append(row)
    return rows
