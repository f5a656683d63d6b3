"""Checkpoint folders that carry their plan: what is in them, and that vLLM serves them."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engine_runs
import pytest
import torch
from models import prompts, write_llama, write_tokenizer
from safetensors.torch import load_file, save_file
from texts import TEXTS
from transformers import AutoTokenizer

from vllm_depthpar import hf
from vllm_depthpar.checkpoint import export
from vllm_depthpar.checkpoint.config import read_tensors
from vllm_depthpar.checkpoint.tensors import split_name
from vllm_depthpar.cli.main import main
from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.precedence import ARCHITECTURE
from vllm_depthpar.verify.streamed import StreamedModel

pytestmark = pytest.mark.usefixtures("own_cache")

LAYERS = 6
PLANS: dict[str, Any] = {
    "pairs": {"pair": [2, 6]},
    "ladder": {"ladder": 3},
    "skip": {"blocks": [[0], [1], [3], [5]]},
    "halves": {"drop_attention": [1], "drop_mlp": [4], "drop_sync": [2], "tp": 2},
}
PARTS = {
    "attention": ("self_attn.", "input_layernorm."),
    "mlp": ("mlp.", "post_attention_layernorm."),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_llama(tmp_path_factory.mktemp("llama"), layers=LAYERS, dtype=torch.bfloat16)
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    (folder / "LICENSE").write_text("as you like\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Original\n")
    return write_tokenizer(folder, bos=True, chat=True)


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each plan, made by the command."""
    out = tmp_path_factory.mktemp("exported")
    for name, spec in PLANS.items():
        arguments = ["export", str(model), "--plan", json.dumps(spec), "--out", str(out / name)]
        assert main(arguments) == 0
    return {name: out / name for name in PLANS}


@pytest.mark.parametrize("plan", PLANS)
def test_folder(model: Path, exported: dict[str, Path], plan: str) -> None:
    folder, resolved = exported[plan], resolve(PLANS[plan], LAYERS)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [ARCHITECTURE] == [export.ARCHITECTURE]
    assert resolve(config["depthpar"], LAYERS) == resolved
    original = load_file(model / "model.safetensors")
    found = load_file(folder / "model.safetensors")
    absent = tuple(
        f"model.layers.{layer}.{part}" for layer, half in resolved.absent for part in PARTS[half]
    )
    assert bool(absent) == (plan in ("skip", "halves"))
    assert found.keys() == {name for name in original if not name.startswith(absent)}
    assert all(torch.equal(tensor, original[name]) for name, tensor in found.items())
    for name in ("generation_config.json", "LICENSE", "tokenizer.json"):
        assert (folder / name).read_bytes() == (model / name).read_bytes()
    assert AutoTokenizer.from_pretrained(folder)("a").input_ids == [256, 64]
    card = (folder / "README.md").read_text()
    assert "license: mit" in card
    assert f"base_model: {model.name}" in card
    assert resolved.name in card
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("plan", ["skip", "halves"])
def test_what_is_left_out_is_not_warned_of(
    exported: dict[str, Path],
    plan: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """transformers' word for it is that it was newly initialized, and should be trained."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    hf.load(exported[plan], ranks=1)
    assert "MISSING" not in caplog.text


def test_served_without_a_flag(exported: dict[str, Path], model: Path) -> None:
    ids = prompts(2, 24)
    cases = [
        engine_runs.Case(exported[plan], "plain", ids.tolist(), max_tokens=8) for plan in PLANS
    ]
    for plan, result in zip(PLANS, engine_runs.run(cases), strict=True):
        # On one rank, whatever size the plan was made for.
        reference = hf.load(model, PLANS[plan], ranks=1)
        with torch.no_grad():
            logs = reference(ids).logits[:, :-1].log_softmax(-1)
        for row, found, expected in zip(ids, result.prompt_logprobs, logs, strict=True):
            wanted = expected.gather(1, row[1:, None])[:, 0]
            torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)
        generated = reference.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert result.tokens == generated[:, 24:].tolist()
        # The same in our transformers module, which takes the plan from the config.
        again = hf.load(exported[plan], ranks=1).generate(
            ids, max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        assert torch.equal(again, generated)


@pytest.mark.parametrize("kind", ["mistral", "qwen3", "gemma3_text", "gpt_oss", "bloom"])
def test_other_families_are_served_without_a_flag(tmp_path: Path, kind: str) -> None:
    hidden = 128 if kind == "bloom" else 64  # four heads of 32
    source = write_llama(tmp_path / "source", layers=LAYERS, model_type=kind, hidden=hidden)
    plan, ids = resolve({"blocks": [[0], [2, 1], [4]]}, LAYERS), prompts(2, 24)
    export.export(str(source), plan, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == kind
    (result,) = engine_runs.run(
        [engine_runs.Case(tmp_path / "out", "plain", ids.tolist(), max_tokens=8)]
    )
    for folder, spec in ((source, plan), (tmp_path / "out", None)):
        generated = hf.load(folder, spec).generate(
            ids, max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        assert result.tokens == generated[:, 24:].tolist()


def test_changed_tensors_and_shards(model: Path, tmp_path: Path) -> None:
    """Each tensor stays in its file; a change is rounded to what it replaces."""
    tensors = load_file(model / "model.safetensors")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    where = {}
    for name in tensors:
        place = split_name(name)
        where[name] = f"model-{place[1] // 3 + 1 if place else 0}.safetensors"
    for shard in set(where.values()):
        part = {name: tensors[name] for name in where if where[name] == shard}
        save_file(part, sharded / shard, metadata={"format": "pt"})
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (sharded / "config.json").write_bytes((model / "config.json").read_bytes())
    name = "model.layers.4.mlp.down_proj.weight"
    change = {name: torch.randn(tensors[name].shape)}
    plan = resolve({"blocks": [[0], [1], [2], [4], [5]]}, LAYERS)
    export.export(str(sharded), plan, tmp_path / "out", change)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    kept = {key: shard for key, shard in where.items() if not key.startswith("model.layers.3.")}
    assert index["weight_map"] == kept
    total = 0
    for shard in set(kept.values()):
        for key, tensor in load_file(tmp_path / "out" / shard).items():
            wanted = change[key].bfloat16() if key == name else tensors[key]
            assert torch.equal(tensor, wanted)
            assert kept.pop(key) == shard
            total += tensor.nbytes
    assert not kept
    assert index["metadata"]["total_size"] == total
    loaded = hf.load(tmp_path / "out")
    weight = loaded.model.layers[3].members["4"].mlp.down_proj.weight
    assert torch.equal(weight, change[name].bfloat16().float())
    with pytest.raises(UserError, match=r"no tensor 'model\.layers\.3\.x'"):
        export.export(str(sharded), plan, tmp_path / "no", {"model.layers.3.x": change[name]})
    assert not (tmp_path / "no").exists()
    read = dict(read_tensors(str(sharded), tensors))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read.items())
    with pytest.raises(UserError, match=r"^the checkpoint has no tensor 'x'; allowed: "):
        dict(read_tensors(str(sharded), [name, "x"]))


def test_one_of_many_makes_the_folder(model: Path, tmp_path: Path) -> None:
    """All of it; the others end in one line, whether they meet it at work or done."""
    specs = [{"pair": [start, start + 2]} for start in range(4)]
    together = threading.Barrier(len(specs))

    def make(out: Path, spec: dict[str, Any]) -> str | None:
        together.wait()
        try:
            export.export(str(model), resolve(spec, LAYERS), out)
        except UserError as error:
            return str(error)
        return None

    for number in range(10):
        out = tmp_path / f"{number}"
        if number % 2:
            out.mkdir()
        with ThreadPoolExecutor(len(specs)) as threads:
            ends = list(threads.map(make, [out] * len(specs), specs))
        (won,) = [spec for spec, end in zip(specs, ends, strict=True) if end is None]
        for end in ends:
            assert end is None or end in (
                f"--out {out} is being made by another command; allowed: another folder",
                f"--out {out} is there already; allowed: a folder that is new or empty",
            )
        plan = resolve(won, LAYERS)
        assert json.loads((out / "config.json").read_text())["depthpar"] == plan.to_spec()
        assert f"plan {plan.digest}: " in (out / "README.md").read_text()
        assert load_file(out / "model.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {str(number) for number in range(10)}


@pytest.mark.parametrize("command", ["export", "recover"])
def test_another_command_makes_the_folder(
    command: str, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = {"export": [], "recover": ["--text", str(text), "--window", "64"]}[command]
    words = [command, str(model), "--plan", '{"pair": [2, 6]}', *more, "--out", str(out)]
    with export.claimed(out):
        assert main(words) == 1
        # By another name of the same folder.
        (tmp_path / "link").symlink_to(tmp_path)
        assert main([*words[:-1], str(tmp_path / "link" / "out")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("out is being made by another command; allowed: another" in line for line in lines)
    assert {path.name for path in tmp_path.iterdir()} == {"link"}


def test_what_a_killed_one_left_is_no_hindrance(model: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.lock").write_text("")
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_text("half")
    empty = tmp_path / "elsewhere"
    empty.mkdir()
    (tmp_path / "out").symlink_to(empty)
    plan = resolve(PLANS["pairs"], LAYERS)
    export.export(str(model), plan, tmp_path / "out")
    assert hf.load(empty).config.depthpar == plan.to_spec()
    export.export(str(model), plan, tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("out", "elsewhere", "new", ".out.lock", ".out.partial")
    }


@pytest.mark.parametrize("name", ["../x.safetensors", "OUTSIDE", "a/../../x.safetensors", "x\0"])
def test_no_name_leads_out_of_the_folder(
    model: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is read there, and nothing written, by whatever reads checkpoints."""
    outside = tmp_path / "x.safetensors"
    outside.write_bytes((model / "model.safetensors").read_bytes())
    before = outside.read_bytes()
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    named = str(outside) if name == "OUTSIDE" else name
    index = {"weight_map": dict.fromkeys(load_file(model / "model.safetensors"), named)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    plan, out = json.dumps(PLANS["pairs"]), tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS))
    texts = ["--text", str(text), "--window", "64"]
    for command, more in (("export", []), ("recover", texts), ("eval", texts)):
        words = [command, str(folder), "--plan", plan, *more, "--out", str(out)]
        assert main(words) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"index.json names {repr(named)[:20]}" in line
        assert "; allowed: files of its folder, by name alone" in line
    with pytest.raises(UserError, match="allowed: files of its folder"):
        hf.load(folder, PLANS["pairs"])
    with pytest.raises(UserError, match="allowed: files of its folder"):
        StreamedModel(folder, torch.device("cpu"))
    # Of pickled weights, too, where they are asked for.
    (folder / "model.safetensors.index.json").rename(folder / "pytorch_model.bin.index.json")
    with pytest.raises(UserError, match="allowed: files of its folder"):
        hf.load(folder, PLANS["pairs"], use_safetensors=False)
    assert outside.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "x.safetensors", "text.txt"}


@pytest.mark.parametrize(
    ("readme", "reason"),
    [
        (b"\xff\xfe", "not UTF-8 text"),
        (b"---\na: [\n---\n", "while parsing a flow node"),
        (b"---\n- x\n---\n", "should be a dict"),
    ],
)
def test_a_model_card_that_is_damaged(
    readme: bytes, reason: str, model: Path, tmp_path: Path
) -> None:
    """A licence that can't be read is not left out without a word."""
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "README.md").write_bytes(readme)
    with pytest.raises(
        UserError, match=rf"README\.md can't be read \(.*{reason}.*; allowed: a mod"
    ):
        export.export(str(folder), resolve(PLANS["pairs"], LAYERS), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_wrong_input(model: Path, exported: dict[str, Path], tmp_path: Path) -> None:
    plan = resolve(PLANS["pairs"], LAYERS)
    with pytest.raises(UserError, match="is there already; allowed: a folder that is new or empty"):
        export.export(str(model), plan, exported["pairs"])
    with pytest.raises(
        UserError, match=r"no layer 2, which the plan runs; allowed: layers 0, 1, 3, 5"
    ):
        export.export(str(exported["skip"]), plan, tmp_path / "out")
    with pytest.raises(
        UserError, match=r"no layer 2, which the plan runs; allowed: layers 0, 1, 3, 5"
    ):
        hf.load(exported["skip"], plan)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((model / "config.json").read_bytes())
    torch.save({}, bare / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no model.safetensors; allowed: safetensors"):
        export.export(str(bare), plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ladder_checkpoints_become_plans(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", layers=LAYERS, ladder_layers=2)
    plan = resolve({"ladder": 2}, LAYERS)
    export.export(str(source), plan, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "ladder_layers" not in config
    ids = prompts(1, 16)
    with torch.no_grad():
        found = hf.load(tmp_path / "out")(ids).logits
        assert torch.equal(found, hf.load(source, plan)(ids).logits)


def test_measured_as_what_it_is(
    model: Path, exported: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`depthpar eval` of an exported folder means its plan; the figures are the plan's."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS))
    common = ["--text", str(text), "--window", "64", "--tokens", "126", "--out"]
    perplexities = {}
    for name, folder, more in (
        ("plan", model, ["--plan", json.dumps(PLANS["skip"])]),
        ("carried", exported["skip"], []),
    ):
        out = tmp_path / f"{name}.json"
        assert main(["eval", str(folder), *more, *common, str(out)]) == 0
        (row,) = json.loads(out.read_text())["text"]["plans"]
        assert row["digest"] == resolve(PLANS["skip"], LAYERS).digest
        perplexities[name] = row["results"]["text"]["perplexity"]
    assert perplexities["carried"] == pytest.approx(perplexities["plan"], rel=1e-3)
    assert row["results"]["text"]["kl"] == pytest.approx(0, abs=1e-5)
    capsys.readouterr()
    text_arguments = ["--text", str(text), "--window", "64"]
    for arguments, message in (
        (
            ["eval", "--plan", "plain", *text_arguments],
            "or one that carries a plan; allowed: a plan",
        ),
        (
            ["eval", "--plan", "identity", *text_arguments],
            "weights of layer 2 are not in the check",
        ),
        (["search", "--depth", "3", "--out", "x.json"], "carries a plan already; allowed: the"),
        (["recover", "--plan", "auto", "--out", "x"], "carries a plan already; allowed: the"),
    ):
        assert main([arguments[0], str(exported["skip"]), *arguments[1:]]) == 1
        assert message in capsys.readouterr().err.splitlines()[-1]
