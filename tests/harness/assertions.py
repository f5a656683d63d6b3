"""Whether what vLLM answered is what the reference on transformers (`vllm_depthpar.hf`) says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from engine_runs import Case, Result

LOGPROB = 1e-3


def spec_of(plan: Any) -> Any:
    return "identity" if plan == "plain" else plan


def check(result: Result, case: Case, model: Callable[[torch.Tensor], Any]) -> None:
    """Prompt log-probabilities within the bound, and each generated token the reference's best.

    The second is the same as equal greedy continuations, by induction over the tokens.
    """
    texts = [
        torch.tensor(prompt + tokens)
        for prompt, tokens in zip(case.prompts, result.tokens, strict=True)
    ]
    # Padding comes after the text, where a causal model does not see it.
    with torch.no_grad():
        logits = model(torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)).logits
    for prompt, text, row, logprobs in zip(
        case.prompts, texts, logits, result.prompt_logprobs, strict=True
    ):
        reference = row[: len(text)].log_softmax(-1)
        expected = reference[:-1].gather(1, text[1:, None])[: len(prompt) - 1, 0]
        torch.testing.assert_close(logprobs, expected, atol=LOGPROB, rtol=0)
        assert len(text) == len(prompt) + case.max_tokens
        assert torch.equal(reference[len(prompt) - 1 : -1].argmax(-1), text[len(prompt) :])
