"""The package as it is installed: cheap to import, its entry points there, its version one."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import vllm_depthpar

ROOT = Path(__file__).parents[2]


def test_import_is_cheap() -> None:
    """vLLM imports the package in every process it starts."""
    code = (
        "import sys; before = set(sys.modules); import vllm_depthpar;"
        "print(*sorted(set(sys.modules) - before))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert loaded == ["vllm_depthpar"]


def test_command_starts_without_what_it_may_not_need() -> None:
    """`depthpar plan show` answers at once: numpy, torch and vLLM take seconds to import."""
    code = (
        "import sys, vllm_depthpar.cli.main; print(*{'numpy', 'torch', 'vllm'} & set(sys.modules))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert loaded == []


def test_entry_points() -> None:
    (plugin,) = metadata.entry_points(group="vllm.general_plugins", name="depthpar")
    assert callable(plugin.load())
    (command,) = metadata.entry_points(group="console_scripts", name="depthpar")
    assert callable(command.load())


def test_one_version() -> None:
    version = vllm_depthpar.__version__
    assert metadata.version("vllm-depthpar") == version
    command = Path(sys.executable).with_name("depthpar")
    shown = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == version
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[?{re.escape(version)}\b", changes, re.MULTILINE), (
        "not in the changelog"
    )


def test_installed_versions_satisfy_pyproject() -> None:
    """The bounds of pyproject.toml admit what requirements/cpu.lock installs."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    every = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    for line in every:
        requirement = Requirement(line)
        installed = metadata.version(requirement.name)
        assert requirement.specifier.contains(installed, prereleases=True), (line, installed)
