"""What a variant's `vllm serve` answers to requests, each answer kept on disk as it comes.

Requests are token ids, and so are answers: nothing is lost between text and tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.errors import UserError
from vllm_depthpar.evaluate import served
from vllm_depthpar.launch import kv_cache
from vllm_depthpar.launch.command_line import options_of
from vllm_depthpar.launch.server import Server, post_json
from vllm_depthpar.launch.variants import Variant
from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.util.progress import bar
from vllm_depthpar.util.result_cache import Journal

# Few enough that their KV cache stays small on a CPU; the server batches them.
CONCURRENT = 16
# A checkpoint's generation_config.json must not decide how answers are drawn.
_NEUTRAL = {
    **{"top_p": 1.0, "top_k": 0, "min_p": 0.0},
    **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
}

# The body of a request to /v1/completions, but for the model's name.
Request = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        tokens: ids, with the one that ended it.
        text: of them, without special tokens.
        ended: whether the model ended it, not the limit.
        logprobs: of each token under the model that wrote it, in nats; empty of greedy answers.
    """

    tokens: tuple[int, ...]
    text: str
    ended: bool
    logprobs: tuple[float, ...] = ()


def greedy(prompt: Sequence[int], tokens: int) -> Request:
    """Ask for the likeliest next token, at most so many times."""
    return {**_asked(prompt, tokens), "temperature": 0.0}


def sampled(prompt: Sequence[int], tokens: int, seed: int) -> Request:
    """Ask for tokens drawn at temperature 1, the model's own distribution, and for their
    log-probabilities."""
    return {**_asked(prompt, tokens), "temperature": 1.0, "seed": seed, "logprobs": 0}


def scored(tokens: Sequence[int]) -> Request:
    """Ask for the log-probability of each token but the first, given those before it."""
    return {**_asked(tokens, 1), "temperature": 0.0, "prompt_logprobs": 0}


def _asked(prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    return {"prompt": list(prompt), "max_tokens": tokens, "return_token_ids": True, **_NEUTRAL}


class Completions:
    """Answers of one variant, from its journal or its server, which is started when the first is
    asked that is not known.

    Args:
        stack: what the server ends with.
        model: folder or hub name.
        variant: see `vllm_depthpar.launch.variants`.
        server_args: more flags for `vllm serve`.
        seed: of the server.
        longest: tokens of the longest request with its answer.
        folder: of the journal.

    Attributes:
        asked: how many requests the server was asked.
    """

    def __init__(
        self,
        stack: contextlib.ExitStack,
        model: str,
        variant: Variant,
        server_args: Sequence[str],
        seed: int,
        longest: int,
        folder: Path,
    ) -> None:
        self._stack, self._model, self._variant = stack, model, variant
        self._server_args, self._seed, self._longest = tuple(server_args), seed, longest
        self._journal = Journal(served.identity(model, variant, server_args), folder)
        self._server: Server | None = None
        self._name = ""
        self.asked = 0

    def write(self, requests: Sequence[Request], what: str) -> list[Answer]:
        """Write an answer to each of `greedy` and `sampled` requests.

        Args:
            what: is being done, for a progress bar.

        Raises:
            UserError: the server does not start, or stops answering; or answers can't be kept.
        """
        return [
            Answer(tuple(tokens), text, ended, tuple(logprobs))
            for tokens, text, ended, logprobs in self._ask(requests, what)
        ]

    def score(self, requests: Sequence[Request], what: str) -> list[list[float]]:
        """Compute the log-probabilities, in nats, that `scored` requests ask for; see `write`."""
        return self._ask(requests, what)

    def _ask(self, requests: Sequence[Request], what: str) -> list[Any]:
        missing = {key: one for one in requests if (key := _key(one)) not in self._journal}
        if missing:
            self._journal.check()
            server = self._started()
            with bar(f"{what}, {self._variant.label}") as advance:
                for key, answer in self._answers(server, missing):
                    self._journal.add({key: answer})
                    advance(1 / len(missing))
            self.asked += len(missing)
        return [self._journal[_key(one)] for one in requests]

    def _started(self) -> Server:
        if self._server is None:
            flags = [*self._server_args]
            if "max-model-len" not in options_of(flags):
                flags += ["--max-model-len", str(self._longest)]
            env = {kv_cache.SPACE: str(_cache_gib(self._model, self._variant, self._longest))}
            self._server = served.start(
                self._stack, self._model, self._variant, flags, self._seed, env
            )
            self._name = self._server.model()["id"]
        return self._server

    def _answers(self, server: Server, requests: Mapping[str, Request]) -> Any:
        """Yield each key with its answer, as they come."""
        threads = ThreadPoolExecutor(CONCURRENT)
        try:
            open_ = {
                threads.submit(_complete, server.url, {**one, "model": self._name}): key
                for key, one in requests.items()
            }
            while open_:
                done, _ = wait(open_, return_when=FIRST_COMPLETED)
                for future in done:
                    yield open_.pop(future), self._result(server, future)
        finally:
            # What still waits for an answer ends with the server.
            threads.shutdown(wait=False, cancel_futures=True)

    def _result(self, server: Server, future: Future[Any]) -> Any:
        try:
            return future.result()
        except OSError as error:
            raise served.no_answer(self._variant, server, error) from error


def check_length(model: str, longest: int, server_args: Sequence[str]) -> None:
    """Refuse what does not fit the model's context, before a server says so.

    Args:
        model: folder or hub name.
        longest: tokens of the longest request with its answer.
        server_args: may say otherwise.

    Raises:
        UserError: it does not fit.
    """
    given = options_of(list(server_args)).get("max-model-len")
    most = int(given) if given and given.isdigit() else None
    if given is None:
        most = read_config(model).get("max_position_embeddings")
    if most is not None and longest > most:
        raise UserError(
            f"{longest} tokens, prompt and answer, don't fit a context of {most}; allowed: shorter "
            f"answers"
        )


def _key(request: Request) -> str:
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:24]


def _complete(url: str, body: Mapping[str, Any]) -> Any:
    """Ask a server; returns what the journal keeps of its answer."""
    (choice,) = post_json(f"{url}/v1/completions", body, served.REQUEST_SECONDS)["choices"]
    if "prompt_logprobs" in body:
        after_first = zip(body["prompt"][1:], choice["prompt_logprobs"][1:], strict=True)
        return [round(at[str(token)]["logprob"], 5) for token, at in after_first]
    own = choice["logprobs"]["token_logprobs"] if "logprobs" in body else []
    ended = choice["finish_reason"] == "stop"
    return [choice["token_ids"], choice["text"], ended, [round(value, 5) for value in own]]


def _cache_gib(model: str, variant: Variant, longest: int) -> int:
    """Compute the GiB of KV cache that a server on a CPU must never run out of: vLLM 0.32 can't go
    on with a seeded request there after preempting it. More where the environment says so."""
    # As wide as it may be, whatever the server computes in.
    shape = ModelShape.from_config(read_config(model)).in_dtype("float32")
    plan = resolve(variant.spec or "identity", shape.layers)
    needed = kv_cache.needed_bytes(shape, plan, [longest] * CONCURRENT)
    return max(math.ceil(needed / 2**30), int(os.environ.get(kv_cache.SPACE, 0)))
