"""What a Markdown document tells people to type and to open: commands, links, paths, plans."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

_MARKDOWN = MarkdownIt("commonmark").enable("table")
# What stands for something of the user's, or for what was left out.
_LEFT_OUT = "..."
_SUBSTITUTION = re.compile(r"\$\(([^()]*)\)")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
# Words that run the command after them.
_BEFORE = {"sudo", "export", "exec"}


class Document:
    """One Markdown file, read.

    Args:
        text: its content.
        path: where it is, for links relative to it.
    """

    def __init__(self, text: str, path: Path) -> None:
        self.path = path
        self._tokens = _MARKDOWN.parse(text)

    @property
    def blocks(self) -> list[str]:
        """The code blocks, fenced and indented."""
        return [token.content for token in self._tokens if token.type in ("fence", "code_block")]

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command that the code blocks run."""
        return [command for block in self.blocks for command in shell_commands(block)]

    @property
    def spans(self) -> list[str]:
        """Code within the text."""
        return [token.content for token in self._inline() if token.type == "code_inline"]

    @property
    def links(self) -> list[str]:
        """The addresses of links and images."""
        found = (token.attrGet("href") or token.attrGet("src") for token in self._inline())
        return [str(address) for address in found if address]

    @property
    def anchors(self) -> set[str]:
        """What "#..." of a link may name: GitHub's names of the headings."""
        names: list[str] = []
        for at, token in enumerate(self._tokens):
            if token.type == "heading_open":
                text = "".join(part.content for part in self._tokens[at + 1].children or ())
                name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
                again = sum(re.sub(r"-\d+$", "", known) == name for known in names)
                names.append(f"{name}-{again}" if again else name)
        return set(names)

    def _inline(self) -> Iterator[Token]:
        for token in self._tokens:
            yield from token.children or ()


@cache
def read(path: Path) -> Document:
    """A document of the repository."""
    return Document(path.read_text(), path)


def shell_commands(block: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, of those in `$(...)` too.

    Lines that are no commands (what one prints, JSON) come out as commands that nobody knows.
    Variables that the block sets are put in where it uses them; "..." is left out.
    """
    variables: dict[str, str] = {}
    for line in block.replace("\\\n", " ").splitlines():
        inside: list[str] = []

        def put_aside(match: re.Match[str], inside: list[str] = inside) -> str:
            inside.append(match[1])
            return f"@{len(inside) - 1}@"

        line = _SUBSTITUTION.sub(put_aside, line)
        for name, value in variables.items():
            line = re.sub(rf"\$\{{?{name}\b\}}?", value.replace("\\", r"\\"), line)
        for part in inside:
            yield from shell_commands(part)
        for words in _split(line):
            words = [_put_back(word, inside) for word in words if word != _LEFT_OUT]
            while words and (words[0] in _BEFORE or _ASSIGNMENT.fullmatch(words[0])):
                if (match := _ASSIGNMENT.fullmatch(words.pop(0))) and not words:
                    variables[match[1]] = match[2]
            if words:
                yield words


def _split(line: str) -> Iterator[list[str]]:
    """The commands of a line, between `;`, `|`, `&&` and redirections; none if it is no shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    skip = False
    try:
        for word in lexer:
            if word.startswith("#"):
                break
            if set(word) <= set(";|&"):
                yield words
                words = []
            elif set(word) <= set("<>"):
                skip = True
            elif skip:
                skip = False
            else:
                words.append(word)
    except ValueError:  # an apostrophe: text
        return
    yield words


def _put_back(word: str, inside: list[str]) -> str:
    """A plan file's content is JSON; all else that a command prints is a word."""
    return re.sub(
        r"@(\d+)@", lambda m: '"auto"' if inside[int(m[1])].startswith("cat ") else "x", word
    )
