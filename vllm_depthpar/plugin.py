"""vLLM's entry point into this package (group `vllm.general_plugins`)."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import ValidationError

from vllm_depthpar import __version__
from vllm_depthpar.checkpoint.config import read_config
from vllm_depthpar.errors import UserError
from vllm_depthpar.launch.command_line import options_in_file, options_of
from vllm_depthpar.model import last_words
from vllm_depthpar.plan import ladder_checkpoint
from vllm_depthpar.plan.families import FAMILIES, lacking
from vllm_depthpar.plan.multimodal import CLASSES, MULTIMODAL
from vllm_depthpar.plan.precedence import ARCHITECTURE, OLD_ARCHITECTURE
from vllm_depthpar.util import files

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# The versions that `vllm_compat` was checked on.
SUPPORTED = SpecifierSet(">=0.32,<0.34")

MODEL_IMPL = "depthpar"
# What a config.json may name to be served with a plan.
ARCHITECTURES = (
    *dict.fromkeys(name for family in FAMILIES.values() for name in family.architectures),
    ARCHITECTURE,
    OLD_ARCHITECTURE,
    *CLASSES.values(),
)
# In place of vLLM's, which makes its language model without asking the registry.
_SEEING = {"qwen3_vl": "vllm_depthpar.model.qwen3_vl:Qwen3VLForConditionalGeneration"}


def _outside(kind: str) -> str:
    """Name the class of a multimodal model whose language model runs by a plan: it is vLLM's own,
    under another name, so that the plan is chosen before it is made."""
    return f"DepthPar{CLASSES[kind]}"


def register() -> None:
    """Register the plugin. vLLM calls this in every one of its processes, perhaps repeatedly.

    Raises:
        UserError: this vLLM is not one that the package was checked on.
    """
    from vllm.version import __version__ as vllm_version

    check_version(vllm_version)  # before anything of ours asks for what another may not have
    install()


def check_version(version: str) -> None:
    """Refuse a vLLM that this package was not checked on.

    Raises:
        UserError: `version` is outside `SUPPORTED`.
    """
    try:
        supported = SUPPORTED.contains(Version(Version(version).base_version))
    except InvalidVersion:  # a source tree without its version
        supported = False
    if not supported:
        raise UserError(
            f"vllm-depthpar {__version__} does not work with vllm {version}; allowed: vllm "
            f"{SUPPORTED}, or VLLM_PLUGINS without 'depthpar' to run vllm alone"
        )


def install() -> None:
    """Teach this process's vLLM the architecture and `--model-impl depthpar`. Idempotent."""
    from vllm_depthpar import vllm_compat

    if vllm_compat.is_registered(ARCHITECTURE):
        return
    # Each takes its place in vLLM where it is defined.
    from vllm_depthpar.checkpoint import ladder_config
    from vllm_depthpar.metrics import mfu  # noqa: F401
    from vllm_depthpar.model.config import DepthParConfig

    for name in (ARCHITECTURE, OLD_ARCHITECTURE):
        vllm_compat.register(name, f"vllm_depthpar.model.causal_lm:{ARCHITECTURE}", DepthParConfig)
    for kind, model in (MULTIMODAL | _SEEING).items():
        vllm_compat.register(_outside(kind), model, DepthParConfig)
    ladder_config.register()
    vllm_compat.let_select_architectures(architectures_of)
    vllm_compat.let_ray_copy("DEPTHPAR_")
    sys.excepthook = _one_line(sys.excepthook)


def architectures_of(architectures: Sequence[str], model_config: ModelConfig) -> Sequence[str]:
    """Select our class for `--model-impl depthpar`, and for checkpoints trained as a ladder.

    Relies on: `ModelConfig.model_impl` accepts any string.

    Args:
        architectures: as config.json names them.

    Raises:
        UserError: they are none that can be restructured.
    """
    ladder = model_config.hf_config.model_type == ladder_checkpoint.MODEL_TYPE
    if model_config.model_impl != MODEL_IMPL and not ladder:
        return architectures
    kind = model_config.hf_config.model_type
    # Of some the language model, which is the other that is asked for, has the whole config.
    if CLASSES.get(kind) in architectures:
        return [_outside(kind)]
    if not any(name in ARCHITECTURES for name in architectures):
        raise UserError(
            f"--model-impl {MODEL_IMPL} can't serve the architecture {', '.join(architectures)}"
            f"{lacking(kind)}; allowed: {', '.join(ARCHITECTURES)}"
        )
    return [ARCHITECTURE]


def _fault_of(model: str) -> str | None:
    """Say what is wrong with a checkpoint's config.json; None if nothing, or if it is not here."""
    if not os.path.exists(os.path.join(model, "config.json")):
        return None
    try:
        read_config(model)
    except UserError as fault:
        return str(fault)
    return None


ExceptHook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


def _one_line(previous: ExceptHook) -> ExceptHook:
    """End a program with one line where the user, not the program, is to mend something."""

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        message = _explain(error)
        if message is None:
            previous(kind, error, traceback)
        else:
            print(f"depthpar: error: {message}", file=sys.stderr)

    return hook


def _explain(error: BaseException) -> str | None:
    """Explain in one line an error that wrong input caused; None for any other.

    vLLM's own checks of the same command line (model, port, options), and transformers' of a
    config.json, are reported likewise when the command asks for this plugin; plain vLLM keeps its
    own reports.
    """
    if isinstance(error, UserError):
        return str(error)
    if (words := last_words.found()) is not None:
        return words
    options = options_of(sys.argv[1:])
    try:
        options = {**options_in_file(sys.argv[1:]), **options}
    except UserError as fault:
        return str(fault) if options.get("model-impl") == MODEL_IMPL else None
    if options.get("model-impl") != MODEL_IMPL:
        return None
    if said := _fault_of(options.get("model", "")):
        return said
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return "the port is taken by another program; allowed: a free one with --port"
    if isinstance(error, OSError) and (said := files.of_the_system(error)):
        return said
    if isinstance(error, HFValidationError | RepositoryNotFoundError | LocalEntryNotFoundError):
        return (
            "no such model; allowed: a checkpoint's folder, or a model of the hub that is cached "
            "or can be downloaded"
        )
    if isinstance(error, ValidationError):
        return "; ".join(dict.fromkeys(map(_cause, error.errors())))
    return None


def _cause(error: Mapping[str, Any]) -> str:
    """Say one of pydantic's errors in one line, with the field and its value where it has them: the
    message says only what is allowed."""
    message = str(error["msg"]).strip().splitlines()[0]
    if error["loc"] and isinstance(error["input"], str | int | float | None):
        return f"{'.'.join(map(str, error['loc']))} {error['input']!r}: {message}"
    return message
