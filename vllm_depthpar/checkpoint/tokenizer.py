"""A checkpoint's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def chat_ids(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], **template: object
) -> list[int]:
    """Write a chat, up to where the model answers, as token ids.

    Args:
        tokenizer: transformers' kind, with a chat template.
        messages: with "role" and "content".
        template: variables of the template, which ignores those that it does not know.
    """
    chat = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=False, **template
    )
    # The template has written the tokenizer's BOS, if there is one.
    ids: list[int] = tokenizer(chat, add_special_tokens=False).input_ids
    return ids
