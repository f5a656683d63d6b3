"""Imports go downwards: each package knows those below it and none above."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import vllm_depthpar

PACKAGE = Path(vllm_depthpar.__file__).parent
# From the top down, as in docs/structure.md.
ORDER = (
    "cli",
    "search",
    "recover",
    "verify",
    "report",
    "bench",
    "evaluate",
    "serving",
    "plugin",
    "model",
    "metrics",
    "vllm_compat",
    "hf",
    "predict",
    "launch",
    "checkpoint",
    "plan",
    "util",
    "errors",
)
_NAMED = re.compile(r"vllm_depthpar\.([\w.]+)(:.*)?")


def modules() -> dict[str, ast.Module]:
    """The syntax tree of each module by its name below the package."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
        for path in PACKAGE.rglob("*.py")
    }


def imported(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """The package's modules that one imports, wherever in it, or hands on by name in a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            match = _NAMED.fullmatch(node.value)
            names = [f"vllm_depthpar.{match[1]}"] if match else []
        else:
            continue
        for name in names:
            root, _, inner = name.partition(".")
            if root != "vllm_depthpar":
                continue
            # `from module import thing`; `from package import thing` is of its __init__.
            for found in (inner, f"{inner}.__init__", inner.rpartition(".")[0]):
                if found in known:
                    yield found
                    break
            else:
                yield inner.partition(".")[0]


def test_every_module_has_its_place() -> None:
    found = {name.partition(".")[0] for name in modules()} - {"__init__"}
    assert found == set(ORDER)


def test_imports_go_downwards() -> None:
    trees = modules()
    upwards = set()
    for name, tree in trees.items():
        here = name.partition(".")[0]
        for other in imported(tree, set(trees)):
            there = other.partition(".")[0]
            if there not in ("__version__", "__init__", "") and (
                here == "__init__" or ORDER.index(there) < ORDER.index(here)
            ):
                upwards.add((name, other))
    assert not upwards


def test_an_import_upwards_is_seen() -> None:
    """In every form that there is."""
    for line in (
        "import vllm_depthpar.cli.main",
        "from vllm_depthpar import cli",
        "from vllm_depthpar.cli import main",
        "from vllm_depthpar.cli.main import main",
        "def f():\n    from vllm_depthpar.cli.main import main",
        "import_module('vllm_depthpar.cli.main')",
        "register('Name', 'vllm_depthpar.cli.main:main')",
        "register('Name', f'vllm_depthpar.cli.main:{NAME}')",
    ):
        (found,) = imported(ast.parse(line), set(modules()))
        assert found in ("cli.main", "cli.__init__"), line
