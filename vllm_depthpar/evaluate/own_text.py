"""Text that a model writes itself, for users who have none: sampled by plain vLLM, kept on disk.

Several kinds, in many styles, for quality on one kind of text says little about another. Prose goes
on from openings at temperature 1: from the model's own distribution, over which the expected
increase in loss is the KL divergence, and which surprises the model as people's text does
(SmolLM2's has a perplexity of 36; drawn at 0.8 it is 5). Answers to requests are drawn as chats are
served, colder. In chats the model writes both sides, so that there is no end of different ones (as
Magpie has requests written, arXiv 2406.08464).
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_depthpar.checkpoint.config import fingerprint, read_config
from vllm_depthpar.checkpoint.tokenizer import chat_ids, read_tokenizer
from vllm_depthpar.errors import UserError
from vllm_depthpar.launch import engine, kv_cache
from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.util import files
from vllm_depthpar.util.result_cache import Journal

TOPICS = (
    "a river", "bread", "the railway", "a lost letter", "bicycles", "the moon", "a small town",
    "medicine", "chess", "an election", "soil", "a violin", "winter", "computers", "a court case",
    "bees", "the sea", "a football match", "taxes", "an old house", "volcanoes", "coffee",
    "a school", "glass", "a journey on foot", "electricity", "a king", "birds", "a market", "paint",
)  # fmt: skip
# How texts begin, for any model that continues text.
OPENINGS = (
    " = {Topic} = \n\n {Topic} is",
    "The following is an excerpt from an encyclopedia article about {topic}.\n\n",
    "NEWS: A report published on Tuesday about {topic} says that",
    "Once upon a time there was a story about {topic}. It went like this:",
    "How to deal with {topic}, step by step:\n\n1.",
    "Question: What should I know about {topic}?\nAnswer:",
    "Dear Sir or Madam,\n\nI am writing to you about {topic}.",
    "Chapter 3: {Topic}\n\n",
    "In this paper we study {topic}. Abstract:",
    '"Tell me about {topic}," she said.',
    "Product review ({topic}): I bought this last month and",
    "# A Python program about {topic}\n\ndef",
)
# What users ask, for models with a chat template.
REQUESTS = (
    "Write an encyclopedia article about {topic}.",
    "Write a news report about {topic}.",
    "Tell me a short story about {topic}.",
    "Give me practical instructions that have to do with {topic}, step by step.",
    "Explain {topic} to a child.",
    "What are five facts about {topic}?",
    "Write a dialogue between two people about {topic}.",
    "Write a small Python function that has to do with {topic}, and explain it.",
)
_TOKENS_EACH = 192
_AT_ONCE_ON_CPU = 64
PROSE, ANSWERS, CHATS = "own-prose", "own-answers", "own-chats"
_SAMPLING: dict[str, dict[str, Any]] = {
    PROSE: {"temperature": 1.0, "max_tokens": _TOKENS_EACH},
    ANSWERS: {"temperature": 0.8, "top_p": 0.95, "max_tokens": _TOKENS_EACH},
    # Past the end of the user's turn to the answer.
    CHATS: {"temperature": 1.0, "max_tokens": _TOKENS_EACH, "ignore_eos": True},
}
SETTINGS = {"sampling": _SAMPLING, "topics": TOPICS, "openings": OPENINGS, "requests": REQUESTS}
_HERE = "<the user's message>"

# What a text begins with, by its kind and number: token ids.
Openings = dict[tuple[str, int], list[int]]


@dataclass(frozen=True)
class Written:
    """What a model wrote, of one kind.

    Attributes:
        text: its passages, each once.
        passages: how many.
        tokens: that the model made.
    """

    text: str
    passages: int
    tokens: int


def write(
    model: str,
    tokens: int,
    seed: int = 0,
    dtype: str = "auto",
    kinds: Sequence[str] = (PROSE, ANSWERS),
) -> dict[str, Written]:
    """Texts by the model, by kind; without a chat template it writes prose only.

    Plain vLLM samples them in a process of its own. Each is kept on disk as soon as it is there: a
    later call with the same arguments, or one after this was broken off, samples what is missing.

    Args:
        model: folder or hub name.
        tokens: about how many, of all kinds together.
        seed: of the choice of openings and of the sampling.
        dtype: what vLLM computes in.
        kinds: of `PROSE`, `ANSWERS`, `CHATS`; as much of each.

    Raises:
        UserError: vLLM could not run the model, it has no tokenizer, or the text can't be kept.
    """
    tokenizer = read_tokenizer(model)
    kinds_written = len(kinds) if tokenizer.chat_template else 1
    count = -(-tokens // (_TOKENS_EACH * kinds_written))
    openings = make_openings(tokenizer, count, seed, kinds)
    settings = [fingerprint(model), tokens, seed, dtype, list(kinds), SETTINGS]
    folder = files.cache_folder() / "own-text"
    journal = Journal(settings, folder)
    if not all(_key(*place) in journal for place in openings):
        journal.check()
        arguments = (model, openings, seed, dtype, settings, folder)
        try:
            engine.call(_sample, *arguments, progress=True)
        except (engine.EngineError, UserError) as error:
            raise UserError(f"vLLM could not write text with {model!r}: {error}") from None
        journal = Journal(settings, folder)
    found = {}
    for kind in dict.fromkeys(kind for kind, _ in openings):
        written = [journal[_key(*place)] for place in openings if place[0] == kind]
        passages = list(dict.fromkeys(text for text, _ in written))
        found[kind] = Written("\n\n".join(passages), len(passages), sum(n for _, n in written))
    return found


def _key(kind: str, number: int) -> str:
    return f"{kind} {number}"


def make_openings(
    tokenizer: Any, count: int, seed: int, kinds: Sequence[str] = (PROSE, ANSWERS)
) -> Openings:
    """Choose token ids to go on from; without a chat template of prose only.

    Args:
        tokenizer: transformers' kind.
        count: of each kind.
        seed: of the choice. The first of a larger count are those of a smaller.
        kinds: of `PROSE`, `ANSWERS`, `CHATS`.
    """
    if not tokenizer.chat_template:
        kinds = (PROSE,)
    forms = {PROSE: OPENINGS, ANSWERS: REQUESTS, CHATS: (_HERE,)}
    found: Openings = {}
    for kind in kinds:
        pool = list(itertools.product(TOPICS, forms[kind]))
        random.Random(seed).shuffle(pool)
        for number, (topic, form) in enumerate(itertools.islice(itertools.cycle(pool), count)):
            filled = form.format(topic=topic, Topic=topic.capitalize())
            found[kind, number] = _ids(tokenizer, kind, filled)
    return found


def _ids(tokenizer: Any, kind: str, opening: str) -> list[int]:
    if kind == PROSE:
        ids: list[int] = tokenizer(opening).input_ids
        return ids
    message = {"role": "user", "content": opening}
    if kind == ANSWERS:
        return chat_ids(tokenizer, [message])
    chat = tokenizer.apply_chat_template([message], tokenize=False)
    # The template has written the tokenizer's BOS, if there is one.
    ids = tokenizer(chat.partition(_HERE)[0], add_special_tokens=False).input_ids
    return ids


def _sample(
    model: str, openings: Openings, seed: int, dtype: str, settings: object, folder: Path
) -> None:
    """Write openings with their continuations into the journal, as text, with their tokens."""
    # Not worth compiling for the few minutes that this takes.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    longest = max(map(len, openings.values())) + _TOKENS_EACH
    # A CPU must never run out of cache: vLLM 0.32 can't go on with a seeded request there after
    # preempting it ("CPU Generator does not use offset").
    shape = ModelShape.from_config(read_config(model)).in_dtype("float32")  # whatever it will be
    plan = resolve("identity", shape.layers)
    os.environ.pop(kv_cache.SPACE, None)
    needed = kv_cache.needed_bytes(shape, plan, [longest] * _AT_ONCE_ON_CPU)
    os.environ.update(kv_cache.environment(needed))
    from tqdm import tqdm
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.platforms import current_platform

    journal = Journal(settings, folder)
    tokenizer = read_tokenizer(model)
    engine = LLM(
        model,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=longest,
        max_num_seqs=_AT_ONCE_ON_CPU if current_platform.is_cpu() else None,
        disable_log_stats=True,
        seed=seed,
    ).llm_engine
    for at, ((kind, number), tokens) in enumerate(openings.items()):
        if _key(kind, number) not in journal:
            params = SamplingParams(**_SAMPLING[kind], seed=seed + at, detokenize=False)
            engine.add_request(_key(kind, number), TokensPrompt(prompt_token_ids=tokens), params)
    with tqdm(total=engine.get_num_unfinished_requests(), desc="Passages") as progress:
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    made = output.outputs[0].token_ids
                    text = tokenizer.decode([*output.prompt_token_ids, *made])
                    journal.add({output.request_id: [text, len(made)]})
                    progress.update()
