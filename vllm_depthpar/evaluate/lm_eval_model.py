"""lm-evaluation-harness's model for a `vllm serve` of ours. It imports lm-eval (extra `eval`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lm_eval.models.openai_completions import LocalCompletionsAPI

from vllm_depthpar.checkpoint import ladder_config
from vllm_depthpar.evaluate.served import REQUEST_SECONDS
from vllm_depthpar.launch.server import Server

# The server batches what is asked at the same time.
CONCURRENT = 32


class ServedLM(LocalCompletionsAPI):
    """Asks `/v1/completions` of a server that is started when the first question comes.

    Args:
        start: starts the server; called once at most, and not at all if nothing is asked.
        tokenizer: folder or hub name of the checkpoint. Prompts are sent as tokens.
        seed: sent with every request.

    Attributes:
        asked: how many requests there were.
    """

    def __init__(self, start: Callable[[], Server], tokenizer: str, seed: int) -> None:
        ladder_config.register()
        super().__init__(
            tokenizer=tokenizer,
            tokenizer_backend="huggingface",
            num_concurrent=CONCURRENT,
            timeout=REQUEST_SECONDS,
            seed=seed,
            add_bos_token=None,
        )
        self._start = start
        self.server: Server | None = None
        self.asked = 0

    def tok_encode(
        self,
        string: str | Iterable[str],
        left_truncate_len: int | None = None,
        add_special_tokens: bool | None = None,
        **_: Any,
    ) -> Any:
        """Encode a text, with the BOS token if the tokenizer adds one and the text has none yet.

        That is what lm-eval's models for transformers and vLLM do, and published numbers have;
        its client for completions would leave BOS out.
        """
        if not isinstance(string, str):
            return [self.tok_encode(one, left_truncate_len, add_special_tokens) for one in string]
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        tokens = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return tokens[-left_truncate_len:] if left_truncate_len else tokens

    async def amodel_call(self, *args: Any, cache_keys: Any = None, **options: Any) -> Any:
        """See lm-eval, whose 0.4.13 fails on what has no key in its cache: windows of a text."""
        keys = [key for key in cache_keys or [] if key is not None]
        return await super().amodel_call(*args, cache_keys=keys, **options)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """See lm-eval."""
        self._ask(requests)
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """See lm-eval."""
        self._ask(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """See lm-eval."""
        self._ask(requests)
        return super().generate_until(requests, disable_tqdm)

    def _ask(self, requests: list[Any]) -> None:
        self.asked += len(requests)
        if self.server is None:
            self.server = self._start()
            served = self.server.model()
            self.model = served["id"]
            self.max_length = served["max_model_len"] - 1  # one token is always generated
            self.base_url = f"{self.server.url}/v1/completions"
