"""A checkpoint's tokenizer."""

from __future__ import annotations

from typing import Any

from vllm_depthpar.checkpoint.config import folder
from vllm_depthpar.errors import UserError


def read_tokenizer(model: str) -> Any:
    """Read the tokenizer of a checkpoint: transformers' kind.

    Args:
        model: folder or hub name, which `config.read_config` has accepted.

    Raises:
        UserError: there is none, or its files are damaged.
    """
    from transformers import AutoTokenizer

    from vllm_depthpar.checkpoint import ladder_config

    ladder_config.register()
    try:
        return AutoTokenizer.from_pretrained(folder(model))
    except UserError:
        raise
    # Each kind of tokenizer has errors of its own for files that it can't make anything of.
    except Exception as error:
        raise UserError(
            f"no tokenizer in {model!r} ({type(error).__name__}); allowed: a checkpoint with its "
            f"tokenizer's files"
        ) from error
