"""Command lines of ``vllm serve``, read by vLLM's own parser."""

from __future__ import annotations

from typing import Any

import fork_server


def parsed(command_lines: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """What ``vllm serve`` takes the arguments for, by the names that the command lines have here.

    RuntimeError, with what the parser says, if it refuses one of them.
    """
    answers: dict[str, dict[str, Any]] = fork_server.call(_parse, command_lines)
    return answers


def _parse(command_lines: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    (command,) = cmd_init()
    parser = FlexibleArgumentParser()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    answers = {}
    for name, args in command_lines.items():
        namespace = parser.parse_args(["serve", *args])
        command.validate(namespace)
        kept = {"model": namespace.model_tag}
        for flag in args:
            if flag.startswith("--"):
                key = flag.removeprefix("--").partition("=")[0].replace("-", "_")
                kept[key] = getattr(namespace, key)
        answers[name] = kept
    return answers
