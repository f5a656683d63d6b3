"""A checkpoint with texts to judge plans of it by: what `eval`, `study` and `search` begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_depthpar import hf
from vllm_depthpar.checkpoint.config import fingerprint, folder, read_config
from vllm_depthpar.checkpoint.tokenizer import read_tokenizer
from vllm_depthpar.evaluate import own_text, texts
from vllm_depthpar.evaluate.dtypes import usable_dtype
from vllm_depthpar.evaluate.evaluator import Evaluator, Quality
from vllm_depthpar.evaluate.rows import Row
from vllm_depthpar.evaluate.texts import Windows
from vllm_depthpar.plan import Plan, resolve
from vllm_depthpar.plan.ladder_checkpoint import ladder_of
from vllm_depthpar.plan.precedence import KEY
from vllm_depthpar.util.progress import bar

# A plan's quality on each text, by the text's name.
Qualities = Mapping[str, Quality]


@dataclass(frozen=True)
class Suite:
    """A model and texts.

    Attributes:
        evaluator: runs plans on the unmodified model.
        texts: cut into windows.
    """

    evaluator: Evaluator
    texts: Sequence[Windows]

    def measure(
        self, plans: Sequence[Plan | Row], what: str | None = None, thin: int = 1
    ) -> list[dict[str, Quality]]:
        """Measure the quality of each plan on each text, by the text's name.

        Args:
            what: is being done, for a progress bar; None for what was measured before.
            thin: use every `thin`-th window only.
        """
        found: list[dict[str, Quality]] = [{} for _ in plans]
        with bar(f"{what} ({len(plans)} plans)") if what else nullcontext(_ignore) as advance:
            for text in self.texts:
                thinned = Windows(text.name, text.tokens[::thin], text.counted)
                qualities = self.evaluator.measure(
                    plans, thinned, lambda share: advance(share / len(self.texts))
                )
                for of_plan, quality in zip(found, qualities, strict=True):
                    of_plan[text.name] = quality
        return found

    def unmodified(self) -> dict[str, Quality]:
        """Measure the model as it is."""
        return self.measure([self.evaluator.unmodified], "The unmodified model")[0]

    def described(self) -> dict[str, Any]:
        """State what has to stand beside the qualities, JSON-ready."""
        return {
            "dtype": str(self.evaluator.dtype).removeprefix("torch."),
            "texts": [text.described() for text in self.texts],
        }


def _ignore(_: float) -> None:
    """Draw no bar."""


def divergence(qualities: Qualities) -> float:
    """Average the KL over the texts, each with equal weight, nats per token."""
    return sum(quality.divergence for quality in qualities.values()) / len(qualities)


def loss(qualities: Qualities) -> float:
    """Average the negative log-likelihood over the texts, each with equal weight, nats per
    token."""
    return sum(quality.loss for quality in qualities.values()) / len(qualities)


def reported(qualities: Qualities) -> dict[str, dict[str, float]]:
    """Say what a report says of each text, JSON-ready."""
    return {
        name: {
            "perplexity": quality.perplexity,
            "kl": quality.divergence,
            "kl_standard_error": quality.divergence_error,
        }
        for name, quality in qualities.items()
    }


def read_texts(
    model: str,
    paths: Sequence[str | Path],
    window: int,
    stride: int | None = None,
    tokens: int | None = None,
    own_tokens: int = 0,
    dtype: str = "auto",
    kinds: Sequence[str] = (own_text.PROSE, own_text.ANSWERS),
) -> list[Windows]:
    """Cut text files, and text that the model writes itself, into windows.

    Args:
        tokens: at most about this many of each file.
        own_tokens: about how many tokens the model is to write, 0 for none.
        kinds: what it writes, see `own_text`.

    Raises:
        UserError: a file can't be read or is too short, there is no tokenizer, or vLLM could not
            run the model.
    """
    tokenizer = read_tokenizer(model)
    named = zip(texts.names(paths), paths, strict=True)
    found = [
        texts.cut(name, texts.read(path), tokenizer, window, stride, tokens) for name, path in named
    ]
    if own_tokens:
        own = own_text.write(
            model,
            own_tokens,
            dtype=str(usable_dtype(dtype)).removeprefix("torch."),
            kinds=kinds,
        )
        found += [
            texts.cut(name, written.text, tokenizer, window, stride, own_tokens // len(own))
            for name, written in own.items()
        ]
    return found


def open_model(model: str, dtype: str = "auto", batch: int = 2, ranks: int = 1) -> Evaluator:
    """Load the unmodified model, onto the GPU if there is one. Of a checkpoint that carries a plan
    that is the plan's model.

    Args:
        dtype: see `usable_dtype`.
        ranks: see `Evaluator`.

    Raises:
        UserError: there is no such checkpoint, or it is of no family that can be restructured; or
            see `usable_dtype`.
    """
    config = read_config(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers, carried, ladder = config["num_hidden_layers"], config.get(KEY), ladder_of(config)
    unmodified = None
    if carried is not None or ladder:
        unmodified = resolve({"ladder": ladder} if carried is None else carried, layers)
    absent = unmodified.absent if unmodified else ()
    loaded = hf.load_unmodified(folder(model), usable_dtype(dtype), absent=absent).to(device)
    return Evaluator(loaded, unmodified, fingerprint(model), batch, absent, ranks)
