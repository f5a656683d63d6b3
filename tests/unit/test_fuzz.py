"""Anything in the files that this package reads: success or one line, in time, in its folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import write_llama
from safetensors.torch import load_file

from vllm_depthpar import hf
from vllm_depthpar.checkpoint import export
from vllm_depthpar.checkpoint.config import read_config, read_tensors
from vllm_depthpar.checkpoint.tensors import stored
from vllm_depthpar.cli.main import main
from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import Plan, precedence, read_spec, resolve

LAYERS = 4
PLAN = resolve({"pair": [0, 4]}, LAYERS)
# No example may hang.
SECONDS = 10
some = settings(
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
fewer = settings(some, max_examples=40)

numbers = st.integers() | st.integers(-2, 9) | st.floats() | st.sampled_from([0, 2**31, 10**30])
scalars = st.none() | st.booleans() | numbers | st.text(max_size=9)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)
CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "max_window_layers": LAYERS,
    "use_sliding_window": False,
    "sliding_window": None,
}
KEYS = (
    *("model_type", "architectures", "num_hidden_layers", "hidden_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "intermediate_size", "vocab_size", "hidden_act"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "rms_norm_eps", "rope_theta"),
    *("rope_scaling", "rope_parameters", "max_position_embeddings", "torch_dtype", "dtype"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "depthpar"),
    *("ladder_layers", "quantization_config", "partial_rotary_factor", "transformers_weights"),
)
kinds = st.lists(st.sampled_from(["full_attention", "sliding_attention", "x"]), max_size=LAYERS + 1)
ropes = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "llama3", "yarn", "x"]) | scalars},
    optional={"factor": scalars, "rope_theta": scalars},
)
families = st.sampled_from(["llama", "llamaLadder", "mistral", "ministral", "qwen2", "qwen3"])
changes = st.dictionaries(
    st.sampled_from(KEYS), json_values | kinds | ropes | families, min_size=1, max_size=3
)
names = (
    st.sampled_from(
        [
            *("../x.safetensors", "/x.safetensors", "a/../../x.safetensors", "..", ".", "", "a\0"),
            *("model-1.safetensors", "./model-1.safetensors", "~/x", "\ud800", "config.json"),
            *("a\nb", "\x1c", "\u2028", "\x1b[2J"),
        ]
    )
    | st.text(max_size=20)
    | scalars
)


@contextmanager
def in_time_and_in(folder: Path) -> Iterator[None]:
    """Allow one line of an error, and nothing made or changed beside the folder."""

    def late(*_: object) -> None:
        raise AssertionError(f"it hangs: more than {SECONDS} s")

    before = _listing(folder.parent)
    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    except UserError as error:
        assert len(str(error).splitlines()) == 1, str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        assert _listing(folder.parent) == before


def _listing(folder: Path) -> dict[str, bytes]:
    """What stands beside the checkpoint that is looked at, and beside what is written."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("model"), layers=LAYERS, **CONFIG)


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A copy to change, in a folder with a file that nobody may touch."""
    (tmp_path / "x.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    return Path(shutil.copytree(model, tmp_path / "model"))


def every_reader(folder: Path) -> list[Callable[[], object]]:
    """Whatever reads a checkpoint's files, and writes what they name."""
    out = folder.parent / "out"
    model = str(folder)
    return [
        lambda: stored(folder),
        lambda: dict(read_tensors(model, ["model.norm.weight"])),
        lambda: export.export(model, PLAN, out),
        lambda: hf.load(folder, PLAN, torch.float32),
    ]


def read_by_all(folder: Path) -> None:
    """Have each reader read; what was written is removed again."""
    for read in every_reader(folder):
        with in_time_and_in(folder):
            read()
    shutil.rmtree(folder.parent / "out", ignore_errors=True)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, "x.safetensors"}


@some
@given(spec=json_values, config=changes, text=st.none() | st.text() | json_values.map(json.dumps))
def test_plans(model: Path, spec: Any, config: dict[str, Any], text: str | None) -> None:
    whole = json.loads((model / "config.json").read_text())
    with in_time_and_in(model):
        found, _ = precedence.choose({**whole, "depthpar": spec}, environ=text)
        assert isinstance(found, Plan)
    with in_time_and_in(model):
        assert isinstance(precedence.choose({**whole, **config}, spec)[0], Plan)


@some
@given(text=st.text(max_size=40) | json_values.map(json.dumps) | st.just("[" * 100_000))
def test_text_of_a_plan(model: Path, text: str) -> None:
    with in_time_and_in(model):
        read_spec(text)


@some
@given(change=changes)
def test_config(folder: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, **change}))
    try:
        with in_time_and_in(folder):
            read_config(str(folder))
        for words in (["plan", "show"], ["predict", "--device", "h100", "--json"]):
            with in_time_and_in(folder):
                code = main([*words, str(folder)])
                lines = capsys.readouterr().err.splitlines()
                assert code == 0 or len(lines) == 1
    finally:
        (folder / "config.json").write_text(json.dumps(known))


@fewer
@given(change=changes)
def test_models_of_configs(folder: Path, change: dict[str, Any]) -> None:
    known = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps({**json.loads(known), **change}))
    read_by_all(folder)
    (folder / "config.json").write_text(known)


@some
@given(content=st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
def test_config_that_is_anything(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with in_time_and_in(folder):
        read_config(str(folder))


@fewer
@given(
    where=st.dictionaries(st.sampled_from(["model.norm.weight", "x"]), names, max_size=2),
    default=names,
)
def test_index(folder: Path, where: dict[str, Any], default: Any) -> None:
    """Its names; all tensors but those of `where` are in the file `default`."""
    if (folder / "model.safetensors").exists():
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    everything = dict.fromkeys(load_file(folder / "model-1.safetensors"), default)
    index = json.dumps({"weight_map": {**everything, **where}})
    (folder / "model.safetensors.index.json").write_text(index)
    read_by_all(folder)


@fewer
@given(content=st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()))
def test_index_that_is_anything(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_bytes(content)
    read_by_all(folder)


entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "F8_E4M3", "X"]) | scalars,
        "shape": st.lists(st.integers(-1, 512) | numbers, max_size=3) | scalars,
        "data_offsets": st.lists(st.integers(-1, 300_000) | numbers, max_size=3) | scalars,
    },
)


@fewer
@given(
    tensors=st.dictionaries(
        st.sampled_from(["model.norm.weight", "model.layers.2.mlp.up_proj.weight", "x", "\ud800"]),
        st.none() | entries | json_values,
        max_size=2,
    ),
    metadata=st.just({"format": "pt"}) | json_values,
)
def test_header(model: Path, folder: Path, tensors: dict[str, Any], metadata: Any) -> None:
    """Of safetensors, of which entries are changed, added, or left out (None)."""
    content = (model / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for name, entry in tensors.items():
        if isinstance(entry, dict):
            header[name] = {**header.get(name, {}), **entry}
        else:
            header[name] = entry
        if entry is None:
            del header[name]
    changed = json.dumps({**header, "__metadata__": metadata}).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])
    read_by_all(folder)


@fewer
@given(cut=st.integers(0, 400_000), size=st.none() | st.integers(0, 2**64 - 1), junk=st.binary())
def test_safetensors_that_are_cut_off(
    model: Path, folder: Path, cut: int, size: int | None, junk: bytes
) -> None:
    content = (model / "model.safetensors").read_bytes()
    start = content[:8] if size is None else size.to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes((start + content[8:])[:cut] + junk)
    read_by_all(folder)


def test_a_hang_would_be_seen(folder: Path) -> None:
    """And a file that stands elsewhere."""
    os.mkfifo(folder / "pipe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_fuzz.SECONDS", 1)
        with pytest.raises(AssertionError, match="it hangs"), in_time_and_in(folder):
            (folder / "pipe").read_bytes()
    with pytest.raises(AssertionError), in_time_and_in(folder):
        (folder.parent / "x.safetensors").write_bytes(b"")
