"""The documents: commands that parse, links that lead somewhere, paths and plans that exist."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
from documents import Document, read, shell_commands

from vllm_depthpar.cli.main import parser
from vllm_depthpar.errors import UserError
from vllm_depthpar.plan.plan import Spec, parse

ROOT = Path(__file__).parents[2]
MAX_README_LINES = 150
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("README.md")),
    *sorted((ROOT / "deploy").rglob("README.md")),
]
# A path of the repository, named in the text; "*" for several.
_PATH = re.compile(r"(?:benchmarks|deploy|docs|requirements|tests|vllm_depthpar)/[\w./*-]+")


class Stop(Exception):
    """A script has parsed its arguments, which is all that was wanted of it."""


def misuse(command: Sequence[str], folder: Path) -> str | None:
    """What is wrong with a command, as its own parser says; None for none, or for one of others.

    Args:
        folder: where the document is, which may name scripts relative to it.
    """
    program, *words = command
    match Path(program).name, words:
        case "depthpar", _:
            return _refused(parser(), words)
        case "vllm", ["serve", *options]:
            return _refused(_vllm_serve(), options)
        case "make", _:
            return _make(words)
        case "python" | "python3", ["-m", module, *options]:
            return _module(module, options)
        case "python" | "python3", [script, *options] if script.endswith(".py"):
            return _script(script, options, folder)
        case "accelerate", ["launch", *options] if "-m" in options:
            module, *rest = options[options.index("-m") + 1 :]
            return _module(module, rest)
    return None


def _refused(known: argparse.ArgumentParser, words: Sequence[str]) -> str | None:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            options = known.parse_args(list(words))
        except SystemExit as error:
            return said.getvalue().strip().splitlines()[-1] if error.code else None
    return _wrong_plans(options)


def _wrong_plans(options: argparse.Namespace) -> str | None:
    """Of the plans that are written out in a command."""
    given = getattr(options, "hf_overrides", None) or {}
    for value in (getattr(options, "plan", None), getattr(options, "plans", None)):
        for text in [value] if isinstance(value, str) else value or ():
            if text.startswith("{") and (wrong := _wrong_plan(text)):
                return wrong
    return _wrong_plan(json.dumps(given["depthpar"])) if "depthpar" in given else None


def _wrong_plan(text: str) -> str | None:
    try:
        parse(json.loads(text))
    except UserError as error:
        return str(error)
    return None


@cache
def _vllm_serve() -> argparse.ArgumentParser:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    whole = FlexibleArgumentParser(prog="vllm")
    return ServeSubcommand().subparser_init(whole.add_subparsers())


def _make(words: Sequence[str]) -> str | None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    variables = re.findall(r"^(\w+) \?=", makefile, re.MULTILINE)
    assert targets is not None
    for word in words:
        name, is_variable, value = word.partition("=")
        known = variables if is_variable else targets[1].split()
        if name not in known:
            return f"make: {name} is unknown; allowed: {', '.join(known)}"
        if is_variable and (wrong := _pytest(value.split())):
            return wrong
    return None


def _pytest(options: Sequence[str]) -> str | None:
    named = [word.partition("::")[0] for word in options if word.startswith("tests/")]
    missing = [path for path in named if not (ROOT / path).exists()]
    return f"pytest: no {', '.join(missing)}" if missing else None


def _module(module: str, options: Sequence[str]) -> str | None:
    if module == "vllm_depthpar.cli":
        return _refused(parser(), options)
    if module == "pytest":
        return _pytest(options)
    return None


def _script(script: str, options: Sequence[str], folder: Path) -> str | None:
    """Run a script of the repository as far as its arguments."""
    path = next((place / script for place in (ROOT, folder) if (place / script).exists()), None)
    if path is None:
        return f"no script {script}"
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *given: object) -> None:
        parse_args(self, *given)  # type: ignore[call-overload]
        raise Stop

    said = io.StringIO()
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop),
        mock.patch.object(sys, "argv", [str(path), *options]),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except Stop:
            return None
        except SystemExit as error:
            return said.getvalue().strip().splitlines()[-1] if error.code else None
    return None


def misnamed(span: str) -> str | None:
    """What is wrong with code within the text: an option that its command does not have, a path
    that does not exist, a plan that is none; None for nothing, or for anything else."""
    words = span.split()
    if words[:1] == ["depthpar"]:
        return _unknown(parser(), words[1:])
    if words[:2] == ["vllm", "serve"]:
        return _unknown(_vllm_serve(), words[2:])
    if words[:1] == ["make"]:
        return _make(shlex.split(span)[1:])
    if _PATH.fullmatch(span):
        return None if any(ROOT.glob(span)) else f"no {span}"
    return _wrong_json(span)


def _unknown(known: argparse.ArgumentParser, words: Sequence[str]) -> str | None:
    """An option or a subcommand that a parser does not know, of a command that may be a part."""
    for word in words:
        below = [
            action.choices
            for action in known._actions
            if isinstance(action, argparse._SubParsersAction)
        ]
        if word.startswith("--"):
            if word.partition("=")[0] not in known._option_string_actions:
                return f"{known.prog} has no {word}"
        elif below and word != "...":
            if word not in below[0]:
                return f"{known.prog} has no {word}"
            known = below[0][word]
    return None


def _wrong_json(text: str) -> str | None:
    """A plan that is none, at the beginning of a text; None where there is no plan."""
    try:
        found, _ = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return None
    found = found.get("depthpar", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or next(iter(found), None) not in Spec.model_fields:
        return None
    return _wrong_plan(json.dumps(found))


def broken(link: str, document: Document) -> str | None:
    """What is wrong with a link; None for nothing, or for one to elsewhere."""
    address, _, anchor = link.partition("#")
    if ":" in address:
        return None
    target = document.path.parent / address if address else document.path
    if not target.exists():
        return f"no file {address}"
    if anchor and target.suffix == ".md":
        there = document if target == document.path else read(target.resolve())
        if anchor not in there.anchors:
            return f"no heading #{anchor} in {target.name}"
    return None


def problems(document: Document) -> Iterator[str]:
    """Everything that is wrong with a document, a line each."""
    for command in document.commands:
        if wrong := misuse(command, document.path.parent):
            yield f"{' '.join(command)}: {wrong}"
    for span in document.spans:
        if wrong := misnamed(span):
            yield f"`{span}`: {wrong}"
    for block in document.blocks:
        for line in block.splitlines():
            if wrong := _wrong_json(line):
                yield f"{line}: {wrong}"
    for link in document.links:
        if wrong := broken(link, document):
            yield f"({link}): {wrong}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_is_there(path: Path) -> None:
    found = list(problems(read(path)))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("    depthpar evaluate MODEL", "invalid choice: 'evaluate'"),
        ("    depthpar eval MODEL --text a.txt --plans plain", "unrecognized arguments: --plans"),
        ("    depthpar search MODEL --depth 24", "required: --out"),
        ("    depthpar eval MODEL --plan '{\"pairs\": [1, 3]}' --text a", "did you mean 'pair'?"),
        ("    MODEL=$(depthpar bundle)", "invalid choice: 'bundle'"),
        ('    RUN="depthpar export M"\n    $RUN --plan auto --to x', "required: --out"),
        ("    cat plan.json | depthpar plan shows", "invalid choice: 'shows'"),
        ("    make dance", "dance is unknown"),
        ("    make serve PROT=8001", "PROT is unknown"),
        ("    make test ARGS='tests/unit/no.py -k x'", "no tests/unit/no.py"),
        ("    python benchmarks/no.py", "no script benchmarks/no.py"),
        ("    python benchmarks/serving/load.py \\\n        --pans auto", "arguments: --pans"),
        ("    python -m pytest tests/unit/no.py", "no tests/unit/no.py"),
        ("    accelerate launch -m vllm_depthpar.cli recovery", "invalid choice: 'recovery'"),
        ("    vllm serve MODEL --model-implementation depthpar", "arguments: --model-impl"),
        (
            '    vllm serve M --hf-overrides \'{"depthpar": {"pair": 3}}\'',
            "plan key 'pair': 3 is wrong",
        ),
        ("`depthpar eval --task`", "depthpar eval has no --task"),
        ("`vllm serve --eager`", "has no --eager"),
        ("`benchmarks/no.py`", "no benchmarks/no.py"),
        ('`{"pair": [28]}`', "plan key 'pair'"),
        ('    {"ladder": 0}', "plan key 'ladder'"),
        ("[x](docs/no.md)", "no file docs/no.md"),
        ("![x](docs/no.png)", "no file docs/no.png"),
        ("[x](docs/plans.md#no)", "no heading #no in plans.md"),
        ("# Yes\n\n[x](#no)", "no heading #no"),
    ],
)
def test_what_is_wrong_is_found(text: str, words: str) -> None:
    (problem,) = problems(Document(text, ROOT / "README.md"))
    assert words in problem


def test_commands_are_found() -> None:
    """All that a block runs, with its variables put in, and nothing else."""
    block = """\
export A=1 B=x; M=$(depthpar bundled)   # the model
RUN="depthpar recover $M --text 'a b'"
sudo C=2 $RUN --plan '{"pair": [1, 3]}' ... --out b > log.txt
vllm serve m "{\\"depthpar\\": $(cat plan.json)}" \\
    --port 1 &
it doesn't run
"""
    assert list(shell_commands(block)) == [
        ["depthpar", "bundled"],
        ["depthpar", "recover", "x", "--text", "a b", "--plan", '{"pair": [1, 3]}', "--out", "b"],
        ["cat", "plan.json"],
        ["vllm", "serve", "m", '{"depthpar": "auto"}', "--port", "1"],
    ]


def test_readme_is_short() -> None:
    lines = len((ROOT / "README.md").read_text().splitlines())
    assert lines <= MAX_README_LINES, "what it is, and links: the rest belongs in docs/"


def test_readme_links_to_every_page() -> None:
    links = {link.partition("#")[0] for link in read(ROOT / "README.md").links}
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")}
    assert pages - links == set()


def test_structure_names_every_package_and_the_modules_at_the_centre() -> None:
    package = ROOT / "vllm_depthpar"
    named = set(read(ROOT / "docs/structure.md").spans)
    there = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    for folder in (package, package / "plan", package / "model"):
        there |= {path.stem for path in folder.glob("*.py")}
    assert there - named == set()
