"""The command `depthpar`, run as a user runs it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import write_llama

from vllm_depthpar.cli.main import main, parser
from vllm_depthpar.plan import json_schema, precedence, presets, resolve
from vllm_depthpar.plan.model_shape import ModelShape


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"), layers=8, dtype=torch.bfloat16)


PLAN = '{"blocks": [[0], [1], [2, 3], [4], [6]]}'


def test_show_draws_the_blocks(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "show", str(model), "--plan", PLAN, "--tp", "2"]) == 0
    out = capsys.readouterr().out
    for line in (
        "8 layers as 5 blocks (1 of 2, 2 skipped) (from --plan)",
        "  │ 0 .. 1   2 layers",
        "  ╪ 2 ║ 3",
        "  ┊ 5   skipped",
        "  ┊ 7   skipped",
    ):
        assert line in out
    assert "effective depth                       8 -> 5" in out
    assert "all-reduces per forward pass, TP > 1  17 -> 11" in out
    assert "tensor-parallel sizes that fit        1, 2, 4" in out


def test_show_draws_ladders(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = '{"pair": [4, 6], "ladder": [1, 2, 4, 5, 6]}'
    assert main(["plan", "show", str(model), "--plan", spec]) == 0
    out = capsys.readouterr().out
    column = """
  │ 0
  ├ 1 .. 2   2 layers, ladder
  │ 3
  ╪ 4 ║ 5   ladder
  ├ 6   ladder
  │ 7
"""
    assert column in out
    # Seven blocks; at the end of each of the two stretches one all-reduce for attention and MLP.
    # Hidden: the MLP's before each of the four ladder blocks, the attention's of 1 and of (4, 5).
    assert "all-reduces per forward pass, TP > 1  17 -> 13, 6 of them hidden" in out


def test_show_json_counts_bytes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "show", str(model), "--plan", PLAN, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    files = (model / "model.safetensors").stat().st_size
    header = 8 + int.from_bytes((model / "model.safetensors").read_bytes()[:8], "little")
    assert facts["weight_bytes_per_rank"]["before"] == files - header
    layer = ModelShape.from_config(json.loads((model / "config.json").read_text()))
    saved = 2 * layer.layer_parameters() * 2
    assert facts["weight_bytes_per_rank"]["after"] == files - header - saved
    # 2 (K, V) x 2 KV heads x 32 x 2 bytes for each layer that is kept
    assert facts["kv_bytes_per_token_per_rank"] == {"before": 8 * 256, "after": 6 * 256}
    assert resolve(facts["plan"], 8).digest == facts["digest"]


FAMILIES = [
    *("mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"),
    *("phi3", "glm4", "granite", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "bloom"),
]


@pytest.mark.parametrize("kind", FAMILIES)
def test_bytes_of_other_families(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_llama(tmp_path, layers=32, hidden=64, model_type=kind)
    assert main(["plan", "show", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    content = (tmp_path / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert facts["weight_bytes_per_rank"]["before"] == len(content) - header


def test_presets_are_of_llamas() -> None:
    shape = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008}
    config = {**shape, "num_attention_heads": 32, "vocab_size": 32000}
    assert "preset for Llama 2 7B" in precedence.choose({**config, "model_type": "llama"})[1]
    # Qwen 1.5 7B is of the same shape.
    assert "conservative rule" in precedence.choose({**config, "model_type": "qwen2"})[1]


def test_show_says_when_tp_does_not_fit(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "show", str(model), "--plan", PLAN, "--tp", "3"]) == 0
    assert "TP = 3 does not fit this plan." in capsys.readouterr().out


def test_environment_and_auto(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["plan", "show", str(model)]) == 0
    assert "conservative rule" in capsys.readouterr().out
    monkeypatch.setenv("DEPTHPAR_PLAN", PLAN)
    assert main(["plan", "show", str(model)]) == 0
    assert "(from DEPTHPAR_PLAN)" in capsys.readouterr().out


def write_config(
    folder: Path, layers: int, hidden: int, intermediate: int, family: str = "llama"
) -> None:
    config = {
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": hidden // 64,
        "vocab_size": 32000,
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("family", "layers", "expected"),
    [("gemma2", 18, [14, 16]), ("glm4", 61, [53, 59]), ("qwen3", 18, [12, 16])],
)
def test_auto_pairs_fewer_layers_with_norms_after_them(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
    layers: int,
    expected: list[int],
) -> None:
    write_config(tmp_path, layers, 576, 1536, family)
    assert main(["plan", "show", str(tmp_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["plan"]
    assert shown == resolve({"pair": expected}, layers).to_spec()


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "intermediate", "expected"),
    [
        ("auto", 32, 4096, 11008, [18, 28]),
        ("auto", 28, 3072, 8192, [21, 25]),
        ("auto", 30, 576, 1536, [22, 28]),
        ("auto", 80, 8192, 28672, [58, 78]),
        # Llama 3.1 8B, whose published plan is of retrained weights.
        ("auto", 32, 4096, 14336, [22, 30]),
        ("published", 32, 4096, 11008, [14, 28]),
        ("published", 28, 3072, 8192, [15, 25]),
    ],
)
@pytest.mark.parametrize("way", ["--plan", "DEPTHPAR_PLAN", "config.json"])
def test_plans_by_name(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    name: str,
    layers: int,
    hidden: int,
    intermediate: int,
    expected: list[int],
) -> None:
    write_config(tmp_path, layers, hidden, intermediate)
    if way == "config.json":
        file = tmp_path / way
        file.write_text(json.dumps({**json.loads(file.read_text()), "depthpar": name}))
    elif way == "DEPTHPAR_PLAN":
        monkeypatch.setenv(way, name)
    given = ["--plan", name] if way == "--plan" else []
    assert main(["plan", "show", str(tmp_path), "--json", *given]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["plan"] == resolve({"pair": expected}, layers).to_spec()
    assert shown["source"].startswith(f"{way}: {name}, ")


@pytest.mark.parametrize("preset", presets.PRESETS, ids=lambda one: one.model)
def test_published_plans_are_of_the_depth_that_their_speed_is_of(preset: presets.Preset) -> None:
    """Of pairs: eager code is as fast as it has blocks, and so are these speed-ups."""
    plan = resolve(preset.published.spec, preset.layers)
    assert f"{preset.speedup}x" in preset.published.source
    if preset.retrained:
        assert plan.ladder
    else:
        assert preset.layers / plan.depth == pytest.approx(preset.speedup, abs=0.011)
        assert f"at depth {plan.depth}" in preset.published.source


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            (30, 576, 1536),
            "no paper has one for a llama of 30 layers with hidden size 576; allowed",
        ),
        ((32, 4096, 14336), """for Llama 3.1 8B that is {"ladder": 16} of weights that were"""),
    ],
)
def test_a_model_without_a_published_plan_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sizes: tuple[int, int, int], words: str
) -> None:
    write_config(tmp_path, *sizes)
    model = str(tmp_path)
    for command in (
        ["plan", "show", model, "--plan"],
        ["predict", model, "--plan"],
        ["eval", model, "--text", "x", "--plan"],
        ["bench", model, "--plans"],
    ):
        assert main([*command, "published"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"depthpar: error: plan 'published': {words}")
    if sizes[0] == 30:
        assert line.endswith("; allowed: Llama 2 7B, Llama 3.2 3B")


@pytest.mark.parametrize(
    ("arguments", "ladder", "blocks"),
    [
        ([], [4, 5, 6, 7], 8),
        (["--plan", '{"pair": [4, 8]}'], [4, 5, 6, 7], 6),
        (["--plan", '{"pair": [4, 8], "ladder": [6, 7]}'], [6, 7], 6),
        (["--plan", '{"pair": [4, 8], "ladder": []}'], [], 6),
        (["--plan", "identity"], [], 8),
    ],
)
def test_a_ladder_checkpoint_stays_one_unless_told_otherwise(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    ladder: list[int],
    blocks: int,
) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "llamaLadder", "ladder_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", "show", str(tmp_path), "--json", *arguments]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["ladder"] == ladder
    assert shown["depth"]["after"] == blocks


def test_wrong_input_is_one_line(model: Path, tmp_path: Path) -> None:
    gpt2 = tmp_path / "config.json"
    gpt2.write_text('{"model_type": "gpt2"}')
    for arguments, words in (
        ([str(model), "--plan", '{"pair": [0, 99]}'], "'pair'"),
        ([str(tmp_path)], "'gpt2'"),
        ([str(tmp_path / "none")], "no checkpoint"),
    ):
        done = subprocess.run(
            [str(Path(sys.executable).with_name("depthpar")), "plan", "show", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 1
        assert done.stderr.startswith("depthpar: error: ")
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


# What each command needs besides MODEL and a plan, which follows the last of these.
COMMANDS = {
    "plan show": ["--plan"],
    "predict": ["--device", "h100", "--plan"],
    "eval": ["--text", "TEXT", "--plan"],
    "export": ["--out", "OUT", "--plan"],
    "recover": ["--out", "OUT", "--text", "TEXT", "--plan"],
    "bench": ["--plans"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("given", "words"), [("", "plan is empty text"), ("null.json", "null is no plan")]
)
def test_a_plan_that_says_nothing_is_refused(
    command: str,
    given: str,
    words: str,
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "null.json").write_text("null\n")
    names = {"TEXT": str(text), "OUT": str(tmp_path / "out")}
    options = [names.get(option, option) for option in COMMANDS[command]]
    last = str(tmp_path / given) if given else given
    assert main([*command.split(), str(model), *options, last]) == 1
    line = capsys.readouterr().err
    assert line.startswith("depthpar: error: ")
    assert words in line
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), "/tmp/x: No space left on"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system; allowed: "),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: Permission denied; all"),
    ],
)
def test_what_the_system_refuses_to_a_library(
    error: OSError, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in a command it is: one line. What may be a fault of ours is none of these."""

    def raise_it(_: object) -> str:
        raise error

    def add(commands: Any) -> None:
        commands.add_parser("command").set_defaults(run=raise_it)

    monkeypatch.setattr("vllm_depthpar.cli.main.COMMANDS", [SimpleNamespace(add=add)])
    assert main(["command"]) == 1
    assert capsys.readouterr().err.startswith(f"depthpar: error: {line}")
    error = FileNotFoundError(errno.ENOENT, "No such file or directory")
    with pytest.raises(FileNotFoundError):
        main(["command"])


def test_every_path_takes_a_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`--out='~/x'`, which a shell leaves as it is, in every command; and models, and texts."""
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = set()
    for words in (
        ["eval", "~/m", "--text", "~/t", "--tasks", "~/y.yaml", "gsm8k", "--out", "~/x.json"],
        ["eval", "~/m", "--answers", "~/p", "--out", "~/x.json"],
        ["study", "~/m", "--text", "~/t", "--out=~/x.json"],
        ["search", "~/m", "--text", "~/t", "--depth=3", "--out=~/x.json"],
        ["recover", "~/m", "--plan=auto", "--text", "~/t", "--held-out", "~/h", "--out=~/x.json"],
        ["export", "~/m", "--plan=auto", "--out=~/x.json"],
        ["order", "~/m", "--tp=2", "--text", "~/t", "--out=~/x.json"],
        ["tune", "~/m", "--speedup=1.1", "--text", "~/t", "--out=~/x.json"],
        ["verify", "~/m", "--out=~/x.json"],
        ["bench", "~/m", "--out=~/x.json"],
    ):
        args = parser().parse_args(words)
        assert args.model == str(tmp_path / "m")
        assert args.out == tmp_path / "x.json"
        for name in ("text", "held_out", "tasks", "answers"):
            for path in [getattr(args, name, None) or []]:
                assert "~" not in str(path)
        seen.add(words[0])
    args = parser().parse_args(["report", "~/a.json", "~/b.json", "--out=~/x.html"])
    assert args.files == [tmp_path / "a.json", tmp_path / "b.json"]
    assert args.out == tmp_path / "x.html"
    seen.add("report")
    outs = {
        name
        for action in parser()._subparsers._group_actions  # type: ignore[union-attr]
        for name, one in action.choices.items()  # type: ignore[union-attr]
        if any(option.dest == "out" for option in one._actions)
    }
    assert seen == outs


def test_an_empty_variable_is_none(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEPTHPAR_PLAN", "")
    assert main(["plan", "show", str(model)]) == 0
    assert "(from default: auto, " in capsys.readouterr().out


def test_auto_of_one_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_llama(tmp_path, layers=1)
    assert main(["plan", "show", str(tmp_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["plan"] == {"layers": 1, "blocks": [[0]]}
    assert "too few layers to pair any" in shown["source"]


def test_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
