"""Quality while generating: what plans write through a real `vllm serve`, and what the unmodified
model says of it.

Under teacher forcing a model is put back onto its way at every token. Here it goes on from what it
wrote itself, as it does for users.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.checkpoint.tokenizer import read_tokenizer
from vllm_depthpar.errors import UserError
from vllm_depthpar.evaluate import generated_tasks, own_text, served, writing
from vllm_depthpar.evaluate.completions import (
    Answer,
    Completions,
    Request,
    check_length,
    greedy,
    sampled,
    scored,
)
from vllm_depthpar.evaluate.estimates import share
from vllm_depthpar.evaluate.generated_tasks import TASKS, Question
from vllm_depthpar.evaluate.writing import Judged
from vllm_depthpar.launch.variants import Variant, usual, variants
from vllm_depthpar.util import files
from vllm_depthpar.util.provenance import origin

LENGTHS = (256, 1024)
# The label of a model that the plans' checkpoint was made from.
UNMODIFIED = "unmodified"


@dataclass(frozen=True)
class GenerationSettings:
    """What the answers depend on, beside model and plan.

    Attributes:
        lengths: answers are described after so many tokens, and written to the longest.
        prompts: of each kind.
        questions: of each task.
        seed: of the choice of prompts, of questions, and of sampling.
        server_args: more flags for `vllm serve`.
    """

    lengths: tuple[int, ...] = LENGTHS
    prompts: int = 16
    questions: int = 64
    seed: int = 1234
    server_args: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """What every plan is asked.

    Attributes:
        kinds: of the prompts, one for each.
        greedy, sampled: requests, one for each prompt.
        questions: of the tasks; none without a chat template.
        asked: requests, one for each question.
    """

    kinds: list[str]
    greedy: list[Request]
    sampled: list[Request]
    questions: list[Question]
    asked: list[Request]

    @property
    def longest(self) -> int:
        """Tokens of the longest request with its answer, and one for scoring that."""
        every = [*self.greedy, *self.asked]
        return max(len(one["prompt"]) + one["max_tokens"] for one in every) + 1


@dataclass(frozen=True)
class Written:
    """What a plan answered, one answer for each request of `Work`."""

    greedy: list[Answer]
    sampled: list[Answer]
    asked: list[Answer]


def run_generation(
    model: str,
    plans: Sequence[Variant],
    settings: GenerationSettings,
    cache: Path | None = None,
    made_from: str | None = None,
) -> dict[str, Any]:
    """Let plans write, one server after the other; progress goes to stderr.

    The unmodified model comes last, since it scores what the others wrote.

    Args:
        model: folder or hub name.
        plans: see `vllm_depthpar.launch.variants`; the unmodified model need not be among them.
        settings: the same for all plans.
        cache: folder for the answers, by default `eval` in `files.cache_folder()`.
        made_from: folder or hub name of the unmodified model, if the weights of `model` are others.

    Returns:
        A report, JSON-ready: versions and settings, and for each plan, the unmodified model first,
        what `writing` says of its answers by kind of prompt, and its share of right answers to
        each task.

    Raises:
        UserError: a checkpoint has no tokenizer, both have different ones, answers don't fit their
            context, a server does not start or stops answering, or answers can't be kept.
    """
    cache = cache or files.cache_folder() / "eval"
    work = make_work(read_tokenizer(model), settings)
    own_model = made_from or model
    if made_from and make_work(read_tokenizer(made_from), settings) != work:
        raise UserError(
            f"{made_from} has other tokens, or another chat template, than {model}; allowed: the "
            f"model that it was made from"
        )
    for checkpoint in dict.fromkeys((model, own_model)):
        check_length(checkpoint, work.longest, settings.server_args)
    unmodified, others = split(model, plans, made_from)
    chosen = [*others, unmodified]
    written: dict[str, Written] = {}
    judged: dict[str, dict[str, list[Judged]]] = {}
    rows = {}
    for number, variant in enumerate(chosen, 1):
        served.say(f"[{number}/{len(chosen)}] {variant.label}: {variant.plan}")
        started = time.monotonic()
        checkpoint = own_model if variant is unmodified else model
        with _answering(checkpoint, variant, settings, work.longest, cache) as server:
            written[variant.label] = _write(server, work)
            if variant is unmodified:
                for label, of_plan in written.items():
                    judged[label] = _judge(server, label, work, of_plan)
        rows[variant.label] = {
            **asdict(variant),
            "requests_asked": server.asked,
            "seconds": round(time.monotonic() - started, 1),
        }
    own = written[unmodified.label]
    for variant in chosen:
        label = variant.label
        rows[label]["writing"] = _describe(
            work, settings, judged[label], None if variant is unmodified else own
        )
        rows[label]["tasks"] = _score(work, written[label])
    return {
        **origin("depthpar"),
        "model": _name(model),
        "unmodified": _name(own_model),
        **asdict(settings),
        "plans": [rows[variant.label] for variant in (unmodified, *others)],
    }


def _name(model: str) -> str:
    path = Path(model).expanduser()
    return path.name if path.is_dir() else model


def split(
    model: str, plans: Sequence[Variant], made_from: str | None = None
) -> tuple[Variant, list[Variant]]:
    """Find the unmodified model, among the plans or not, and the others: vLLM's own model, or of a
    checkpoint that carries a plan, or is a ladder's, that.

    Args:
        made_from: see `run_generation`. No plan for `model` is that one.
    """
    if made_from is not None:
        (unmodified,) = variants(made_from, usual(read_config(made_from))[:1])
        return replace(unmodified, label=UNMODIFIED), list(plans)
    (unmodified,) = variants(model, usual(read_config(model))[:1])
    unmodified = next((one for one in plans if one.digest == unmodified.digest), unmodified)
    return unmodified, [one for one in plans if one.label != unmodified.label]


def make_work(tokenizer: Any, settings: GenerationSettings) -> Work:
    """Make all requests: prompts of both kinds, and questions, where there is a chat template;
    without one, prose to go on from."""
    seed, longest = settings.seed, max(settings.lengths)
    openings = own_text.make_openings(tokenizer, settings.prompts, seed)
    questions = [
        question
        for task in (TASKS if tokenizer.chat_template else ())
        for question in generated_tasks.questions(task, settings.questions, seed)
    ]
    return Work(
        [kind.removeprefix("own-") for kind, _ in openings],
        [greedy(prompt, longest) for prompt in openings.values()],
        [sampled(prompt, longest, seed + number) for (_, number), prompt in openings.items()],
        questions,
        [greedy(one.ids(tokenizer), TASKS[one.task].tokens) for one in questions],
    )


@contextlib.contextmanager
def _answering(
    model: str, variant: Variant, settings: GenerationSettings, longest: int, cache: Path
) -> Iterator[Completions]:
    with contextlib.ExitStack() as stack:
        yield Completions(
            stack, model, variant, settings.server_args, settings.seed, longest, cache
        )


def _write(server: Completions, work: Work) -> Written:
    return Written(
        server.write(work.greedy, "Greedy writing"),
        server.write(work.sampled, "Sampled writing"),
        server.write(work.asked, "Tasks"),
    )


def _judge(
    server: Completions, label: str, work: Work, written: Written
) -> dict[str, list[Judged]]:
    """Let the unmodified model score a plan's answers, by the way of writing them."""
    found = {}
    for way in ("greedy", "sampled"):
        prompts = [request["prompt"] for request in getattr(work, way)]
        answers = getattr(written, way)
        pairs = list(zip(prompts, answers, strict=True))
        scores = server.score(
            [scored([*prompt, *answer.tokens]) for prompt, answer in pairs],
            f"Scoring {label}'s, {way}",
        )
        found[way] = [
            Judged(answer, tuple(of_all[len(prompt) - 1 :]))
            for (prompt, answer), of_all in zip(pairs, scores, strict=True)
        ]
    return found


def _describe(
    work: Work,
    settings: GenerationSettings,
    judged: Mapping[str, Sequence[Judged]],
    own: Written | None,
) -> dict[str, Any]:
    """Describe a plan's writing by kind of prompt; `own` is the unmodified model's."""
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(work.kinds):
        here = [at for at, one in enumerate(work.kinds) if one == kind]
        of_kind = {way: [all_of[at] for at in here] for way, all_of in judged.items()}
        lengths = {}
        for length in settings.lengths:
            cut = {way: [one.cut(length) for one in all_of] for way, all_of in of_kind.items()}
            described = {way: writing.figures(answers) for way, answers in cut.items()}
            if own is not None:
                described["greedy"] |= writing.agreement(
                    [one.answer for one in cut["greedy"]],
                    [Judged(own.greedy[at], ()).cut(length).answer for at in here],
                )
            lengths[str(length)] = described
        found[kind] = {
            "answers": len(here),
            "lengths": lengths,
            "by_position": writing.by_position(of_kind["sampled"]),
        }
    return found


def _score(work: Work, written: Written) -> dict[str, Any]:
    """Count right answers to each task."""
    right: dict[str, list[bool]] = {}
    for question, answer in zip(work.questions, written.asked, strict=True):
        right.setdefault(question.task, []).append(answer.ended and question.accepts(answer.text))
    return {
        task: {"questions": len(of_task), **share(sum(of_task), len(of_task))}
        for task, of_task in right.items()
    }
