"""What plans answer to the same prompts, for people to read: greedy, from a real `vllm serve`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_depthpar.checkpoint.tokenizer import read_tokenizer
from vllm_depthpar.errors import UserError
from vllm_depthpar.evaluate import served
from vllm_depthpar.launch.server import Server, post_json
from vllm_depthpar.launch.variants import Variant
from vllm_depthpar.util import files
from vllm_depthpar.util.provenance import origin

# Of many kinds, each with an answer that a person can judge at a glance.
PROMPTS = (
    "What is the capital of France?",
    "Who wrote Romeo and Juliet, and what is it about?",
    "Explain in two sentences why the sky is blue.",
    "What is 17 plus 25? Show how you get there.",
    "Anna has three apples and buys five more. She gives two away. How many are left?",
    "Which is heavier, a kilogram of iron or a kilogram of feathers?",
    "Write a Python function that says whether a number is prime.",
    "Write a SQL query for the ten newest rows of a table named orders.",
    "Translate into French: Good morning, how are you?",
    "Correct the grammar: She don't likes apples, neither do he.",
    "Summarize in one sentence: The ship left at dawn. At noon a storm rose, and it turned back.",
    "List five things to take on a walk in the mountains.",
    "How do I boil an egg? Answer step by step.",
    "Give three synonyms of happy.",
    "What do bees do in winter?",
    "Name the planets of the solar system in order.",
    "Write a polite letter of two sentences that declines an invitation.",
    "Write a poem of four lines about the sea.",
    "Tell a story of three sentences about a lost key.",
    "Is it safe to look at the sun through binoculars? Why?",
)
TOKENS = 96
_AT_ONCE = 32
_SECONDS = 900


def read_prompts(path: str | None) -> list[str]:
    """Read prompts, one a line; without a file, `PROMPTS`.

    Raises:
        UserError: it can't be read, or has none.
    """
    if path is None:
        return list(PROMPTS)
    allowed = "UTF-8 text, a prompt a line"
    with files.reading(path, allowed):
        lines = files.read_bytes(Path(path), allowed).decode().splitlines()
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"{path} has no prompt; allowed: {allowed}")
    return found


def ask(
    model: str, variants: Iterable[Variant], prompts: Sequence[str], server_args: Sequence[str]
) -> dict[str, Any]:
    """Ask plans, one server after the other, as a chat where the model has a chat template.

    Args:
        model: folder or hub name.
        prompts: each asked alone, many at once.
        server_args: more flags for `vllm serve`.

    Returns:
        A report, JSON-ready: what was asked, and of each plan the answers.

    Raises:
        UserError: the checkpoint has no tokenizer, a server does not start, or stops answering.
    """
    chat = bool(read_tokenizer(model).chat_template)
    rows = []
    for one in variants:
        served.say(f"{one.label}: {one.plan}")
        rows.append({**asdict(one), "answers": _answers(model, one, prompts, server_args, chat)})
    how = "as chats" if chat else "going on from the prompt"
    return {
        **origin("depthpar"),
        "model": Path(model).name,
        "settings": [f"greedy, {how}, at most {TOKENS} tokens", *server_args],
        "prompts": list(prompts),
        "plans": rows,
    }


def shown(report: dict[str, Any]) -> str:
    """Write the answers for a terminal."""
    lines = []
    for at, prompt in enumerate(report["prompts"]):
        lines.append(f"{at + 1}. {prompt}")
        lines += [f"   [{one['label']}] {one['answers'][at].strip()}" for one in report["plans"]]
        lines.append("")
    return "\n".join(lines).rstrip()


def _answers(
    model: str, one: Variant, prompts: Sequence[str], server_args: Sequence[str], chat: bool
) -> list[str]:
    with ExitStack() as stack:
        server = served.start(stack, model, one, server_args, seed=0)
        name = server.model()["id"]
        try:
            with ThreadPoolExecutor(min(len(prompts), _AT_ONCE)) as at_once:
                return list(
                    at_once.map(lambda prompt: _answer(server, name, prompt, chat), prompts)
                )
        except OSError as error:
            raise UserError(
                f"no answer from the server of plan {one.label} ({type(error).__name__}: {error}); "
                f"allowed: prompts that fit into the context"
            ) from error


def _answer(server: Server, name: str, prompt: str, chat: bool) -> str:
    settings = {"model": name, "temperature": 0, "max_tokens": TOKENS, "seed": 0}
    asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    url = f"{server.url}/v1/{'chat/' * chat}completions"
    (choice,) = post_json(url, {**settings, **asked}, _SECONDS)["choices"]
    return str(choice["message"]["content"] if chat else choice["text"])
