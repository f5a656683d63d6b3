"""Text for measuring quality: files in, windows of tokens out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_depthpar.errors import UserError
from vllm_depthpar.util import files

if TYPE_CHECKING:
    from torch import Tensor

_TEXT = "a file of UTF-8 text"


@dataclass(frozen=True)
class Windows:
    """What a model is shown of one text, and which of its predictions count.

    Attributes:
        name: of the text, for reports: a domain.
        tokens: (windows, window) int64. Every window starts with the tokenizer's BOS token if the
            tokenizer adds one to a text.
        counted: how many predictions count, at the end of each window. With windows that do not
            overlap, all but those of tokens that nothing precedes.
    """

    name: str
    tokens: Tensor
    counted: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def predictions(self) -> int:
        """Number of tokens whose prediction counts."""
        return len(self) * self.counted

    @property
    def digest(self) -> str:
        """Hexadecimal, of the tokens."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()

    def part(self, count: int) -> tuple[Windows, Windows]:
        """All windows but `count` (at most half) spread over the text, and those."""
        import torch

        step = max(2, len(self) // count)
        held = torch.zeros(len(self), dtype=torch.bool)
        held[step - 1 :: step] = True
        return replace(self, tokens=self.tokens[~held]), replace(self, tokens=self.tokens[held])

    def described(self) -> dict[str, Any]:
        """Say what to state beside a perplexity, JSON-ready."""
        return {
            "text": self.name,
            "window": self.tokens.shape[1],
            "windows": len(self),
            "counted_per_window": self.counted,
            "tokens_counted": self.predictions,
        }


def read(path: str | Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        UserError: it can't be read, or is empty.
    """
    path = files.expanded(path)
    with files.reading(f"text {str(path)!r}", allowed=_TEXT):
        text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise UserError(f"text {str(path)!r} is empty; allowed: {_TEXT}")
    return text


def cut(
    name: str,
    text: str,
    tokenizer: Any,
    window: int = 512,
    stride: int | None = None,
    limit: int | None = None,
) -> Windows:
    """Cut a text into windows.

    Args:
        name: of the text.
        text: at least one window long; what does not fill the last window is left out.
        tokenizer: a transformers tokenizer.
        window: tokens in a window, 2 or more.
        stride: tokens from one window to the next (default: no overlap). Smaller strides give each
            counted token more context, as in the usual sliding-window perplexity.
        limit: count at most about this many tokens, in windows spread evenly over the text.

    Raises:
        UserError: the text is shorter than a window, or the stride is not 1 to `window`.
    """
    import torch  # takes seconds: every command imports this module, for its error

    # As the tokenizer starts a text: Llama 2 and 3 put <s> or <|begin_of_text|> there.
    start = [token for token in tokenizer("").input_ids if token == tokenizer.bos_token_id]
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    body = window - len(start)
    stride = stride or body
    if not 1 <= stride <= body:
        raise UserError(f"stride {stride} does not fit windows of {window}; allowed: 1 to {body}")
    if len(ids) < body:
        raise UserError(
            f"text {name!r} has {len(ids)} tokens; allowed: at least one window of {body}"
        )
    starts = list(range(0, len(ids) - body + 1, stride))
    # The first token of a window without BOS is predicted from nothing.
    counted = min(stride, window - 1)
    if limit is not None and (wanted := max(1, round(limit / counted))) < len(starts):
        starts = [starts[index * len(starts) // wanted] for index in range(wanted)]
    return Windows(name, torch.tensor([start + ids[at : at + body] for at in starts]), counted)


def names(paths: Sequence[str | Path]) -> list[str]:
    """Take the files' names without folder and suffix, made different where they are equal."""
    stems = [Path(path).stem for path in paths]
    return [
        stem if stems.count(stem) == 1 else f"{stem}-{stems[: index + 1].count(stem)}"
        for index, stem in enumerate(stems)
    ]
