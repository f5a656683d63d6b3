"""Text that a model writes itself, for users who have none: sampled by plain vLLM, kept on disk.

Two kinds, in many styles, for quality on one kind of text says little about another. Prose goes on
from openings at temperature 1: from the model's own distribution, over which the expected increase
in loss is the KL divergence, and which surprises the model as people's text does (SmolLM2's has a
perplexity of 36; drawn at 0.8 it is 5). Answers to requests are drawn as chats are served, colder.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
from typing import Any

from . import engine_process, files
from .checkpoint import fingerprint
from .texts import TextError

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
PROSE, ANSWERS = "own-prose", "own-answers"
_SAMPLING: dict[str, dict[str, Any]] = {
    PROSE: {"temperature": 1.0, "max_tokens": _TOKENS_EACH},
    ANSWERS: {"temperature": 0.8, "top_p": 0.95, "max_tokens": _TOKENS_EACH},
}
SETTINGS = {"sampling": _SAMPLING, "topics": TOPICS, "openings": OPENINGS, "requests": REQUESTS}

# A kind, and the tokens that a text of it begins with.
_Opening = tuple[str, list[int]]


def write(model: str, tokens: int, seed: int = 0, dtype: str = "auto") -> dict[str, str]:
    """Texts by the model, by kind: "own-prose", and "own-answers" if it has a chat template.

    The first call for a model samples them with plain vLLM in a process of its own; later ones read
    them from `files.cache_folder`.

    Args:
        model: folder or hub name.
        tokens: about how many, of all kinds together.
        seed: of the choice of openings and of the sampling.
        dtype: what vLLM computes in.

    Raises:
        TextError: vLLM could not run the model.
    """
    settings = json.dumps([fingerprint(model), tokens, seed, SETTINGS])
    digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
    path = files.cache_folder() / "own-text" / f"{digest}.json"
    if path.exists():
        kept: dict[str, str] = json.loads(path.read_text())
        return kept
    openings = _openings(model, tokens, seed)
    flat = [(kind, opening) for kind, of_kind in openings.items() for opening in of_kind]
    try:
        written = iter(engine_process.call(_sample, model, flat, seed, dtype, progress=True))
    except engine_process.EngineError as error:
        raise TextError(f"vLLM could not write text with {model!r}: {error}") from None
    texts = {
        kind: "\n\n".join(dict.fromkeys(itertools.islice(written, len(of_kind))))
        for kind, of_kind in openings.items()
    }
    files.write_json(path, texts)
    return texts


def _openings(model: str, tokens: int, seed: int) -> dict[str, list[list[int]]]:
    """Token ids of the openings, by kind."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    kinds: dict[str, tuple[str, ...]] = {PROSE: OPENINGS}
    if tokenizer.chat_template:
        kinds[ANSWERS] = REQUESTS
    count = -(-tokens // (_TOKENS_EACH * len(kinds)))
    found = {}
    for kind, forms in kinds.items():
        pool = list(itertools.product(TOPICS, forms))
        random.Random(seed).shuffle(pool)
        filled = [
            form.format(topic=topic, Topic=topic.capitalize())
            for topic, form in itertools.islice(itertools.cycle(pool), count)
        ]
        if kind == ANSWERS:
            found[kind] = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": request}],
                    add_generation_prompt=True,
                    return_dict=False,
                )
                for request in filled
            ]
        else:
            found[kind] = [tokenizer(opening).input_ids for opening in filled]
    return found


def _sample(model: str, openings: list[_Opening], seed: int, dtype: str) -> list[str]:
    """Openings with their continuations, as text."""
    # Not worth compiling for the few minutes that this takes.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    engine = LLM(
        model,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=max(len(tokens) for _, tokens in openings) + _TOKENS_EACH,
        disable_log_stats=True,
        seed=seed,
    )
    outputs = engine.generate(
        [TokensPrompt(prompt_token_ids=tokens) for _, tokens in openings],
        [
            SamplingParams(**_SAMPLING[kind], seed=seed + at)
            for at, (kind, _) in enumerate(openings)
        ],
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [
        tokenizer.decode([*output.prompt_token_ids, *output.outputs[0].token_ids])
        for output in outputs
    ]
