"""The distillation's loss and gradients against plain ones, and what it may change."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import prompts, write_llama
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from vllm_depthpar import hf
from vllm_depthpar.checkpoint.config import read_tensors
from vllm_depthpar.plan import Plan, resolve
from vllm_depthpar.recover import distillation, least_squares
from vllm_depthpar.recover.distillation import SCALING, Distillation, Objective, Train

LAYERS = 6
PLANS: dict[str, Any] = {
    "pairs": {"pair": [2, 6]},
    "ladder": {"ladder": 3},
    "skip": {"blocks": [[0], [1], [3], [5]]},
    "from the first layer": {"pair": [0, 4], "ladder": "all"},
    "out of order": {"blocks": [[0], [1, 4], [2], [3, 5]]},
    "reduced once": {
        "blocks": [[0], [1], [2, 3], [4], [5]],
        "drop_sync": [1, 2, 3],
        "parallel_residual": [4],
        "tp": 2,
    },
    "not reduced": {"pair": [2, 4], "desync": {"every": 3}, "tp": 2},
    "nothing": "identity",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"), layers=LAYERS)


def plain_losses(
    teacher: PreTrainedModel, student: PreTrainedModel, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) and the student's loss on the text, by whole models and autograd."""
    with torch.no_grad():
        wanted = teacher(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    found = student(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    kl = (wanted.exp() * (wanted - found)).sum(-1).mean()
    return kl, functional.nll_loss(found.flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("objective", ["distil", "next-token"])
@pytest.mark.parametrize("train", ["blocks", "layers", "all"])
def test_loss_and_gradients(
    folder: Path,
    plan: str,
    objective: Objective,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distillation, "_ROWS", 20)  # several parts, the last one shorter
    resolved = resolve(PLANS[plan], LAYERS)
    teacher = hf.load_unmodified(folder)
    tested = Distillation(teacher, resolved, train, objective)
    tested.unfreeze()
    reference = hf.load(folder, resolved)
    ids = prompts(3, 24)
    kl, nll = plain_losses(hf.load_unmodified(folder), reference, ids)
    losses = tested(ids)
    wanted = kl if objective == "distil" else nll
    assert losses["nll"].item() == pytest.approx(nll.item(), rel=1e-5)
    assert losses["loss"].item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-6)
    assert tested.eval()(ids)["kl"].item() == pytest.approx(kl.item(), rel=1e-4, abs=1e-6)
    if plan == "nothing" and train != "all":
        assert not losses["loss"].requires_grad
        return
    tested.train()
    losses["loss"].backward()
    wanted.backward()
    expected = dict(reference.named_parameters())
    trained = {
        name: parameter
        for name, parameter in tested.student.named_parameters()
        if parameter.requires_grad
    }
    changed = [position for position in range(resolved.depth) if resolved.is_changed(position)]
    if train == "all":
        assert trained.keys() == expected.keys()
    else:
        later = range(changed[0], resolved.depth)
        learned = set(changed if train == "blocks" else later)
        assert {int(name.split(".")[2]) for name in trained} == learned
    for name, parameter in trained.items():
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-6, msg=name
        )


@pytest.mark.parametrize(
    "shape",
    [
        {"model_type": "mistral", "sliding_window": 8},
        {"model_type": "qwen2", "tie": True},
        {"model_type": "qwen3"},
    ],
    ids=str,
)
def test_other_families(tmp_path: Path, shape: dict[str, Any]) -> None:
    """The loss is that of whole models, windows included, and a refit lowers it."""
    path = write_llama(tmp_path, layers=LAYERS, **shape)
    plan, ids = resolve(PLANS["pairs"], LAYERS), prompts(3, 24)
    tested = Distillation(hf.load_unmodified(path), plan, "norms")
    kl, nll = plain_losses(hf.load_unmodified(path), hf.load(path, plan), ids)
    losses = tested.eval()(ids)
    assert losses["kl"].item() == pytest.approx(kl.item(), rel=1e-4)
    assert losses["nll"].item() == pytest.approx(nll.item(), rel=1e-5)
    tested.unfreeze()
    trained = [name for name, p in tested.student.named_parameters() if p.requires_grad]
    assert len(trained) == 4 * (4 if shape["model_type"] == "qwen3" else 2)
    least_squares.refit(tested, prompts(64, 64))
    with torch.no_grad():
        assert float(tested(ids)["kl"]) < 0.95 * float(kl)


def trained_as_whole_models(path: Path, plan: Plan, ids: torch.Tensor) -> list[str]:
    """The names of what is trained of the layers that learn; loss and gradients are checked against
    those of whole models."""
    tested = Distillation(hf.load_unmodified(path), plan)
    tested.unfreeze()
    reference = hf.load(path, plan)
    kl, nll = plain_losses(hf.load_unmodified(path), reference, ids)
    losses = tested(ids)
    assert losses["nll"].item() == pytest.approx(nll.item(), rel=1e-5)
    assert losses["loss"].item() == pytest.approx(kl.item(), rel=1e-4)
    losses["loss"].backward()
    kl.backward()
    expected = dict(reference.named_parameters())
    trained = [name for name, p in tested.student.named_parameters() if p.requires_grad]
    for name in trained:
        gradient = tested.student.get_parameter(name).grad
        torch.testing.assert_close(gradient, expected[name].grad, rtol=1e-3, atol=1e-6, msg=name)
    return trained


@pytest.mark.parametrize(
    "model_type", ["granite", "glm4", "phi3", "mixtral", "qwen2_moe", "gpt_oss", "bloom"]
)
def test_families_whose_layers_are_whole(model_type: str, tmp_path: Path) -> None:
    """Loss and gradients are those of whole models; experts and routers are not trained, and a
    refit, of what there is to refit, does not make it worse."""
    path = write_llama(tmp_path, layers=LAYERS, model_type=model_type)
    plan, ids = resolve(PLANS["pairs"], LAYERS), prompts(3, 24)
    trained = trained_as_whole_models(path, plan, ids)
    assert trained
    of_experts = (".mlp.experts.", ".mlp.gate.", ".mlp.router.")
    assert not any(part in name for name in trained for part in of_experts)
    tested = Distillation(hf.load_unmodified(path), plan).eval()
    unseen = prompts(16, 64, seed=1)
    with torch.no_grad():
        lost = float(tested(unseen)["kl"])
        least_squares.refit(tested, prompts(64, 64))
        # Of these q, k and v are in one, and there are no gate and up: nothing is refitted.
        same = model_type in ("phi3", "bloom")
        assert float(tested(unseen)["kl"]) < lost + same * 1e-6


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_norms_after_windows_and_caps(model_type: str, tmp_path: Path) -> None:
    """Loss and gradients, those through soft-capped logits too, are those of whole models."""
    path = write_llama(tmp_path, layers=LAYERS, model_type=model_type)
    # Blocks of layers with different windows.
    plan, ids = resolve({"pair": [1, 5], "ladder": [3, 4]}, LAYERS), prompts(3, 24)
    trained = trained_as_whole_models(path, plan, ids)
    assert len(trained) == 5 * (13 if model_type == "gemma3_text" else 11)


def test_only_what_may_change_is_the_students_own(folder: Path) -> None:
    teacher = hf.load_unmodified(folder)
    tested = Distillation(teacher, resolve(PLANS["pairs"], LAYERS))
    assert tested.changes() == {}
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    tested.unfreeze()
    own = tested.changes()
    assert own.keys() == {
        name
        for name, _ in teacher.named_parameters()
        if name.startswith(tuple(f"model.layers.{layer}." for layer in (2, 3, 4, 5)))
    }
    optimizer = torch.optim.SGD([p for p in tested.parameters() if p.requires_grad], lr=1.0)
    tested(prompts(2, 16))["loss"].backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not any(torch.equal(tensor, before[name]) for name, tensor in own.items())
    everything = Distillation(teacher, resolve("identity", LAYERS), "all")
    everything.unfreeze()
    assert everything.changes().keys() == dict(teacher.named_parameters()).keys()


@pytest.mark.parametrize(
    ("what", "share"), [("blocks", 1.0), ("norms", 4 * 2 * 64), ("lora", None)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_trained(
    folder: Path, what: Train, share: float | None, dtype: torch.dtype
) -> None:
    """In float32, and only that is saved while training."""
    model = hf.load_unmodified(folder, dtype)
    tested = Distillation(model, resolve(PLANS["pairs"], LAYERS), what)
    own = sum(p.numel() for layer in model.model.layers[2:] for p in layer.parameters())
    tested.unfreeze(rank=2)
    trained = {name: p for name, p in tested.named_parameters() if p.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    count = sum(parameter.numel() for parameter in trained.values())
    if what == "blocks":
        assert count == own
    elif what == "norms":
        assert count == share
    else:
        assert all("lora" in name for name in trained)
        assert 0 < count < own / 4
    saved = tested.state_dict()
    assert saved.keys() == trained.keys()
    assert not tested.load_state_dict(saved, strict=False).unexpected_keys


@pytest.mark.parametrize(
    ("name", "changed"), [("pairs", (2, 3, 4, 5)), ("reduced once", (1, 2, 3, 4))]
)
def test_adapters_act_on_what_they_are_named_after(
    folder: Path, name: str, changed: tuple[int, ...]
) -> None:
    plan = resolve(PLANS[name], LAYERS)
    ids = prompts(2, 16)
    original = load_file(folder / "model.safetensors")
    tested = Distillation(hf.load_unmodified(folder), plan, "lora")
    tested.unfreeze(rank=2)
    assert all("lora" in name for name in tested.changes())
    with torch.no_grad():
        for name, parameter in tested.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    found = tested.adapter()
    layers = tuple(f"model.layers.{layer}." for layer in changed)
    projections = {
        name.removesuffix(".weight")
        for name in original
        if name.startswith(layers) and "proj" in name
    }
    assert found.keys() == {
        f"{name}.{part}" for name in projections for part in ("lora_A", "lora_B")
    }
    # The model with their products added is the same.
    merged = Distillation(hf.load_unmodified(folder), plan)
    names = [f"{name}.weight" for name in projections]
    for name, parameter in zip(projections, merged.own(names), strict=True):
        parameter.data += SCALING * found[f"{name}.lora_B"] @ found[f"{name}.lora_A"]
    measured = [one.eval()(ids)["kl"].item() for one in (tested, merged)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)
    untouched = Distillation(hf.load_unmodified(folder), plan)
    assert measured[0] != pytest.approx(untouched.eval()(ids)["kl"].item(), rel=0.01)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("what", ["layers", "norms", "all", "refit"])
def test_copies_begin_as_what_is_in_the_checkpoint(tmp_path: Path, tie: bool, what: str) -> None:
    """Not as what it was rounded to for the teacher, be they trained or refitted."""
    path = write_llama(tmp_path, layers=LAYERS, tie=tie)
    original = load_file(path / "model.safetensors")
    model = hf.load_unmodified(path, torch.bfloat16)
    plan, read = resolve(PLANS["pairs"], LAYERS), partial(read_tensors, str(path))
    train: Any = "layers" if what == "refit" else what
    tested = Distillation(model, plan, train, bfloat16=True, read=read)
    if what == "refit":
        tested.own(f"model.layers.{layer}.mlp.down_proj.weight" for layer in (2, 3, 4, 5))
    else:
        tested.unfreeze()
    found = tested.changes()
    kinds = {"norms": "norm", "refit": "down_proj"}
    layers = ("",) if what == "all" else tuple(f"model.layers.{layer}." for layer in (2, 3, 4, 5))
    assert found.keys() == {
        name for name in original if name.startswith(layers) and kinds.get(what, "") in name
    }
    assert all(torch.equal(tensor, original[name]) for name, tensor in found.items())
    assert (tested.student.lm_head.weight is tested.student.model.embed_tokens.weight) == tie
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_what_was_learned_is_undone(tmp_path: Path, from_checkpoint: bool) -> None:
    """Some tensors are given, all others are the checkpoint's again."""
    path = write_llama(tmp_path, layers=LAYERS)
    original = load_file(path / "model.safetensors")
    read = partial(read_tensors, str(path)) if from_checkpoint else None
    tested = Distillation(hf.load_unmodified(path), resolve(PLANS["pairs"], LAYERS), read=read)
    tested.unfreeze()
    with torch.no_grad():
        for parameter in tested.changes().values():
            parameter += 1
    kept = "model.layers.3.mlp.down_proj.weight"
    tested.reset([kept], lambda name: 2 * original[name])
    for name, tensor in tested.changes().items():
        assert torch.equal(tensor, (1 + (name == kept)) * original[name])


def test_bfloat16_computes_on_float32_masters(folder: Path) -> None:
    plan, ids = resolve(PLANS["pairs"], LAYERS), prompts(4, 32)
    exact = Distillation(hf.load_unmodified(folder), plan)
    rounded = Distillation(hf.load_unmodified(folder, torch.bfloat16), plan, bfloat16=True)
    gradients = []
    for tested in (exact, rounded):
        tested.unfreeze()
        loss = tested(ids)["loss"]
        loss.backward()
        parameters = [p for p in tested.parameters() if p.requires_grad]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
    assert {tensor.dtype for tensor in rounded.changes().values()} == {torch.float32}
    assert rounded.student.lm_head.weight.dtype == torch.bfloat16
    assert rounded(ids)["kl"].item() == pytest.approx(exact(ids)["kl"].item(), rel=0.05)
    assert functional.cosine_similarity(*gradients, dim=0) > 0.98
    with torch.no_grad():
        before = float(rounded.eval()(ids)["kl"])
        assert least_squares.refit(rounded, prompts(64, 64)).keys() == {2, 3}
        assert float(rounded(ids)["kl"]) < 0.95 * before
