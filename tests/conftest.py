"""What all tests share. No test may reach a network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# In GiB, the least there is: every server fills it with zeros when it starts.
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
# What "auto" is must not depend on the processor; `auto_dtype` is for tests of both.
os.environ.setdefault("DEPTHPAR_DTYPE", "float32")

# Two teams of OpenMP threads on the same cores wait for each other's time slices: far slower than
# one thread each. `make test` runs one pytest worker for each of two cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import settings
from texts import TEXTS

# A slow machine is not a failure. In continuous integration the examples are the same every time:
# a new one is found where somebody looks.
settings.register_profile("depthpar", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("depthpar")


def pytest_report_header() -> str:
    """On which vLLM: `make test-next` puts the next release's Python on the installed kernels."""
    builds = metadata.distributions(name="vllm-cpu")
    kernels = [f"kernels of vllm-cpu {build.version}" for build in builds]
    return ", ".join([f"vllm {metadata.version('vllm')}", *kernels])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-combination",
        action="store_true",
        help="test_compiled.py: all plans, placements and dtypes, not a choice of them",
    )
    parser.addoption(
        "--kills",
        type=int,
        default=3,
        help="test_killed.py: how often each command is killed, and begun again (3)",
    )


# What takes minutes begins first, so that no worker is left with it while the others are done.
_LONG = ("test_compiled.py", "test_smollm2.py", "test_verify.py", "test_bench.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _LONG)


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty cache: nothing is known from another test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEPTHPAR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=["float32", "bfloat16"])
def auto_dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the commands take for "auto", also in processes of their own: on one processor this, on
    another that."""
    monkeypatch.setenv("DEPTHPAR_DTYPE", request.param)
    return str(request.param)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of some passages."""
    path = tmp_path_factory.mktemp("text") / "passages.txt"
    path.write_text("\n".join(TEXTS))
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the bundled checkpoint: SmolLM2-135M-Instruct, 30 layers, TP 1 or 3."""
    from vllm_depthpar.checkpoint import bundled

    return bundled.prepare()
