"""The closed form against the problem that it solves, and what it does for whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import prompts, write_llama

from vllm_depthpar import hf
from vllm_depthpar.plan import resolve
from vllm_depthpar.recover import least_squares
from vllm_depthpar.recover.distillation import Distillation, Train

LAYERS = 6
MLP = ("gate", "up", "down")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"), layers=LAYERS)


@pytest.mark.parametrize(
    "spec",
    [
        {"pair": [2, 6]},
        {"ladder": 3},
        {"blocks": [[0], [1], [3], [5]]},
        {"pair": [0, 4]},
        {"drop_sync": [2, 3], "tp": 2},
        {"parallel_residual": [1, 4]},
        {"desync": {"attention": [2, 3], "mlp": []}, "tp": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("train", ["layers", "blocks"])
def test_less_is_lost_on_text_that_was_not_seen(folder: Path, spec: Any, train: Train) -> None:
    plan = resolve(spec, LAYERS)
    tested = Distillation(hf.load_unmodified(folder), plan, train).eval()
    before = hf.load_unmodified(folder).state_dict()
    unseen = prompts(16, 64, seed=1)
    with torch.no_grad():
        lost = float(tested(unseen)["kl"])
        shares: list[float] = []
        ridges = least_squares.refit(tested, prompts(64, 64), on_progress=shares.append)
        left = float(tested(unseen)["kl"])
    assert left < 0.95 * lost
    changed = {at for at in range(plan.depth) if plan.is_changed(at)}
    fitted = changed if train == "blocks" else set(range(min(changed), plan.depth))
    assert ridges.keys() == fitted
    assert sum(shares) == pytest.approx(1)
    layers = {layer for at in ridges for layer in plan.blocks[at]}
    changes = tested.changes()
    of_mlps = {f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in layers for part in MLP}
    assert {name for name in changes if ".mlp." in name} == of_mlps
    # Of attentions all but the one up to which all is as it was.
    late = {int(name.split(".")[2]) for name in changes if ".self_attn." in name}
    first = min(changed)
    assert late == layers - (set() if plan.is_ladder(first) else {plan.blocks[first][0]})
    assert ridges[first] < torch.inf
    for at, ridge in ridges.items():
        for layer in plan.blocks[at]:
            name = f"model.layers.{layer}.mlp.down_proj.weight"
            assert torch.equal(changes[name], before[name]) == (ridge == torch.inf)
    for name, tensor in tested.teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    "spec", [{"blocks": [[0], [1], [3], [4], [5]]}, {"drop_attention": [2]}], ids=str
)
def test_later_layers_make_up_for_earlier_ones(folder: Path, spec: Any) -> None:
    """What is missing before them they can add."""
    plan, unseen, left = resolve(spec, LAYERS), prompts(16, 64, seed=1), {}
    trains: tuple[Train, ...] = ("blocks", "layers")
    for train in trains:
        tested = Distillation(hf.load_unmodified(folder), plan, train).eval()
        with torch.no_grad():
            least_squares.refit(tested, prompts(64, 64))
            left[train] = float(tested(unseen)["kl"])
    assert left["layers"] < 0.95 * left["blocks"]


@pytest.mark.parametrize("spec", [{"pair": [2, 6]}, {"ladder": 3}], ids=str)
def test_norms_after_the_modules(spec: Any, tmp_path: Path) -> None:
    """What is added has no closed form behind them; what is read has one before them."""
    tested = Distillation(
        hf.load_unmodified(write_llama(tmp_path, layers=LAYERS, model_type="gemma3_text")),
        resolve(spec, LAYERS),
    ).eval()
    unseen = prompts(16, 64, seed=1)
    with torch.no_grad():
        lost = float(tested(unseen)["kl"])
        assert set(least_squares.refit(tested, prompts(64, 64)).values()) == {torch.inf}
        assert float(tested(unseen)["kl"]) < 0.98 * lost
    before = tested.teacher.state_dict()
    for name, tensor in tested.changes().items():
        if name.endswith("down_proj.weight"):
            assert torch.equal(tensor, before[name]), name


def test_what_a_block_can_say_is_found(folder: Path) -> None:
    """A block whose down projections are spoiled, and whose target is what it was."""
    model = hf.load(folder, {"pair": [2, 4]})
    block = model.model.layers[2]
    ids = prompts(32, 64)
    with torch.no_grad():
        stream = model.model.embed_tokens(ids)
        context = {
            "position_embeddings": model.model.rotary_emb(
                stream, position_ids=torch.arange(64)[None]
            ),
            "attention_mask": None,
        }
        target = block(stream, **context)
        for layer in block.layers:
            layer.mlp.down_proj.weight += 0.5 * torch.randn_like(layer.mlp.down_proj.weight)
        spoiled = float((block(stream, **context) - target).norm())
        states = [
            least_squares.BatchState(stream[at : at + 4], target[at : at + 4], context)
            for at in range(0, 32, 4)
        ]
        assert least_squares.fit_block(block, states) == min(least_squares.RIDGES)
        assert float((block(stream, **context) - target).norm()) < 0.2 * spoiled


def states_of(model: Any, at: int, count: int) -> list[least_squares.BatchState]:
    """Of random tokens before a block that only standard ones stand before, as their targets."""
    found = []
    for ids in prompts(count, 64).split(4):
        stream = model.model.embed_tokens(ids)
        context = hf.context(model, stream)
        for block in model.model.layers[:at]:
            stream = block(stream, **context)
        found.append(least_squares.BatchState(stream, stream, context))
    return found


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_what_a_layer_reads_is_predicted(folder: Path, half: str) -> None:
    """The teacher's layer reads a linear map of what the student's does: that map is found."""
    model = hf.load(folder, "identity")
    block, (layer,) = model.model.layers[2], model.model.layers[2].layers
    norm = getattr(layer, block.norms[half][0])
    names = ("q_proj", "k_proj", "v_proj") if half == "attention" else ("gate_proj", "up_proj")
    inside = layer.self_attn if half == "attention" else layer.mlp
    weights = [getattr(inside, name).weight for name in names]
    with torch.no_grad():
        states = states_of(model, 2, 32)
        turned = torch.linalg.qr(torch.randn(64, 64, generator=torch.manual_seed(0)))[0]
        right = [weight @ turned for weight in weights]
        for state in states:
            read = state.stream
            if half == "mlp":
                read = read + block.attend(read, **state.context)
            state.reads[2, half] = norm(read) @ turned.T
        before = [weight.clone() for weight in weights]
        for weight, wanted in zip(weights, right, strict=True):
            weight.copy_(wanted)
        for state in states:
            state.target = block(state.stream, **state.context)
        for weight, kept in zip(weights, before, strict=True):
            weight.copy_(kept)
        least_squares.fit_inputs(block, half, states)
        for weight, wanted, kept in zip(weights, right, before, strict=True):
            assert float((weight - wanted).norm()) < 0.1 * float((kept - wanted).norm())


@pytest.mark.parametrize(
    "spec", [{"drop_sync": [2]}, {"pair": [2, 4], "drop_sync": [2, 3]}], ids=str
)
def test_each_rank_predicts_from_its_own_stream(folder: Path, spec: Any) -> None:
    """Each rank's rows are fitted to what it reads, and closer to what it should read."""
    model = hf.load(folder, spec, ranks=2)
    block = model.model.layers[2]
    layer = block.layers[-1]
    index = block.feeding[-1]
    with torch.no_grad():
        states = states_of(model, 2, 32)
        for state in states:
            read, _ = block.read_by_mlp(state.stream, **state.context)
            state.reads[index, "mlp"] = layer.post_attention_layernorm(read)
            state.target = read + block.feed(read)
        weights = {name: getattr(layer.mlp, name).weight for name in ("gate_proj", "up_proj")}
        before = {name: weight.clone() for name, weight in weights.items()}
        least_squares.fit_inputs(block, "mlp", states)
        shares = dict(block._shares(len(block.feeding), block.feeding.index(index), 96))
        assert shares
        for rank, mine in shares.items():
            for name, weight in weights.items():
                off = []
                for fitted in (weight, before[name]):
                    errors = 0.0
                    for state in states:
                        _, apart = block.read_by_mlp(state.stream, **state.context)
                        read = layer.post_attention_layernorm(apart[rank])
                        wanted = state.reads[index, "mlp"] @ before[name][mine].T
                        errors += float((read @ fitted[mine].T - wanted).pow(2).sum())
                    off.append(errors)
                assert off[0] < 0.8 * off[1]


def test_a_block_that_can_only_get_worse_is_left_alone(folder: Path) -> None:
    """Its error is noise, which on held-out windows nothing predicts."""
    model = hf.load(folder, {"pair": [2, 4]})
    block = model.model.layers[2]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        stream = model.model.embed_tokens(prompts(8, 32))
        context = {
            "position_embeddings": model.model.rotary_emb(
                stream, position_ids=torch.arange(32)[None]
            ),
            "attention_mask": None,
        }
        noise = torch.randn(stream.shape, generator=generator)
        target = block(stream, **context) + noise
        before = [layer.mlp.down_proj.weight.clone() for layer in block.layers]
        states = [
            least_squares.BatchState(stream[at : at + 2], target[at : at + 2], context)
            for at in range(0, 8, 2)
        ]
        assert least_squares.fit_block(block, states) == torch.inf
        for layer, weight in zip(block.layers, before, strict=True):
            assert torch.equal(layer.mlp.down_proj.weight, weight)


def test_a_block_between_depths_is_left_alone(folder: Path) -> None:
    plan = resolve({"blocks": [[0], [1, 4], [2], [3, 5]]}, LAYERS)
    tested = Distillation(hf.load_unmodified(folder), plan).eval()
    with torch.no_grad():
        # After [1, 4] and [2] the stream stands for no depth; after [3, 5] for the whole model.
        assert least_squares.refit(tested, prompts(64, 64)).keys() == {3}
