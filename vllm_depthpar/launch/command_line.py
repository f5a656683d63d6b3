"""What a command of vLLM's asks for, in its own words and in its --config file."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_depthpar.errors import UserError


def options_of(words: Sequence[str]) -> dict[str, str]:
    """Read what a command says itself.

    Args:
        words: of the command line, without the program.

    Returns:
        Values by the options' names with dashes; "model" also where it stands behind `serve`.
    """
    found = {}
    if words[:1] == ["serve"] and not "".join(words[1:2]).startswith("-"):
        found["model"] = "".join(words[1:2])
    for word, after in zip(words, [*words[1:], ""], strict=False):
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            found[name.replace("_", "-")] = value if has_value else after
    return found


def options_in_file(words: Sequence[str]) -> dict[str, str]:
    """Read what the --config file of a command says, which its own words override.

    Relies on: vLLM takes `--config` and the file as two words, and makes words of the file with
    `FlexibleArgumentParser.load_config_file`.

    Raises:
        UserError: it can't be read.
    """
    if "--config" not in words[:-1]:
        return {}
    file = words[words.index("--config") + 1]
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        return options_of(FlexibleArgumentParser().load_config_file(file))
    # The system's, YAML's, and vLLM's own where it is no mapping.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--config {file} can't be read ({reason}); allowed: a YAML file of options"
        ) from None
