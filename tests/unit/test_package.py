"""The package as it is installed: cheap to import, its entry points there, its version one."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
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


def test_the_wheel_has_every_file_of_the_package(tmp_path: Path) -> None:
    """What is no Python, too: an editable install would not miss it."""
    source = tmp_path / "source"
    junk = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "vllm_depthpar", source / "vllm_depthpar", ignore=junk)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [*(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"), "--no-index"]
    options = ["--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run([*build, *options], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = zipfile.ZipFile(wheel).namelist()
    there = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "vllm_depthpar").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert there - set(packed) == set()
    licenses = {Path(name).name for name in packed if ".dist-info/licenses/" in name}
    assert licenses == {"LICENSE", "d3.LICENSE"}
