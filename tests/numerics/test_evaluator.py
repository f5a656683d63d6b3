"""Perplexity and KL of many plans in one pass, against one forward pass for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import prompts, write_llama
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from vllm_depthpar import hf
from vllm_depthpar.evaluate.evaluator import Evaluator
from vllm_depthpar.evaluate.rows import Block, row_of
from vllm_depthpar.evaluate.span_study import TRANSFORMATIONS, row_with, spans
from vllm_depthpar.evaluate.texts import Windows
from vllm_depthpar.plan import Plan, resolve
from vllm_depthpar.util.result_cache import Journal

LAYERS = 6
SPECS: list[Any] = [
    {"pair": [1, 5]},
    "identity",
    {"pair": [2, 5], "group": 3},
    {"skip": {"speedup": 1.5}},
    {"blocks": [[0], [3], [2, 1], [5, 4]]},
    {"ladder": "all"},
    {"ladder": 2},
    {"ladder": [1, 3, 4]},
    {"pair": [0, 6], "ladder": [2, 3, 4, 5]},
    {"parallel_residual": [1, 2, 4]},
    {"drop_sync": [2, 3]},
    {"blocks": [[0], [2, 1, 3], [4], [5]], "drop_sync": [1, 2, 3, 4], "ladder": [5]},
    {"blocks": [[0], [1, 2, 3], [4], [5]], "drop_sync": [1, 2, 3, 4], "ladder": [5]},
    {"desync": {"every": 3}},
    {"pair": [1, 5], "desync": {"attention": [0, 1, 2], "mlp": [0]}, "ladder": [5]},
]
PLANS = [resolve(spec, LAYERS) for spec in SPECS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"), layers=LAYERS)


@pytest.fixture(scope="module")
def windows() -> Windows:
    return Windows("random", prompts(5, 24), counted=20)


def logits_of(folder: Path, plan: Plan, tokens: Tensor, ranks: int = 1) -> Tensor:
    with torch.no_grad():
        logits: Tensor = hf.load(folder, plan, ranks=ranks)(tokens).logits
    return logits


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ({}, None),
        ({}, {"ladder": 2}),
        ({"model_type": "mistral", "sliding_window": 8}, None),
        ({"model_type": "qwen3"}, None),
        ({"model_type": "gemma2"}, None),
        ({"model_type": "granite"}, None),
        ({"model_type": "qwen2_moe"}, None),
        ({"model_type": "gpt_oss"}, None),
        ({"model_type": "bloom"}, None),
    ],
    ids=str,
)
def test_equals_the_reference(
    tmp_path: Path, windows: Windows, shape: dict[str, Any], spec: Any, ranks: int
) -> None:
    folder = write_llama(tmp_path, layers=LAYERS, **shape)
    unmodified = resolve(spec or "identity", LAYERS)
    evaluator = Evaluator(hf.load_unmodified(folder), spec and unmodified, batch=2, ranks=ranks)
    # Which models whose modules have norms after them, or q, k and v in one, can't run.
    apart = shape.get("model_type") not in ("gemma2", "bloom")
    plans = [plan for plan in PLANS if apart or not plan.desync]
    found = evaluator.measure(plans, windows)
    teacher = logits_of(folder, unmodified, windows.tokens)[:, -21:-1].log_softmax(-1)
    for plan, quality in zip(plans, found, strict=True):
        student = logits_of(folder, plan, windows.tokens, ranks)[:, -21:-1].log_softmax(-1)
        nll = -student.gather(2, windows.tokens[:, -20:, None])[..., 0].sum(-1)
        kl = (teacher.exp() * (teacher - student)).sum((-1, -2))
        assert quality.nll == pytest.approx(nll.tolist(), rel=1e-4)
        assert quality.kl == pytest.approx(kl.tolist(), rel=1e-3, abs=1e-3)
        assert quality.loss == pytest.approx(nll.sum().item() / 100, rel=1e-4)
        assert quality.perplexity == pytest.approx((nll.sum() / 100).exp().item(), rel=1e-3)
        assert quality.divergence == pytest.approx(kl.sum().item() / 100, rel=1e-3, abs=1e-4)
        spread = (kl / 20).std().item() / 5**0.5
        assert quality.divergence_error == pytest.approx(spread, rel=1e-2, abs=1e-4)


def test_the_model_stays_as_it_is(folder: Path, windows: Windows) -> None:
    model = hf.load_unmodified(folder)
    Evaluator(model).measure(PLANS, windows)
    with torch.no_grad():
        again = model(windows.tokens).logits
    torch.testing.assert_close(
        again, logits_of(folder, resolve("identity", LAYERS), windows.tokens)
    )
    assert model.config.num_hidden_layers == LAYERS


def test_layers_that_plans_share_run_once(folder: Path, windows: Windows) -> None:
    model = hf.load_unmodified(folder)
    runs = [0] * LAYERS

    def count(layer: int) -> Any:
        def hook(*_: object) -> None:
            runs[layer] += 1

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(count(index))
    one_batch = Windows("one", windows.tokens[:2], windows.counted)
    late = [resolve({"pair": [at, at + 2]}, LAYERS) for at in (3, 4)]
    Evaluator(model).measure(late, one_batch)
    # 0 1 2 | 3 4 5 and (3 4) 5 and 3 (4 5)
    assert runs == [1, 1, 1, 2, 3, 3]


def test_progress_sums_to_one(folder: Path, windows: Windows) -> None:
    shares: list[float] = []
    Evaluator(hf.load_unmodified(folder)).measure(PLANS, windows, shares.append)
    assert len(shares) == 3
    assert sum(shares) == pytest.approx(1)


def test_goes_on_where_it_was(
    folder: Path, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEPTHPAR_CACHE", str(tmp_path))
    model = hf.load_unmodified(folder)
    whole = Evaluator(model).measure(PLANS, windows)

    class Killed(Exception):
        pass

    def kill(_: float) -> None:
        raise Killed

    with pytest.raises(Killed):
        Evaluator(model, origin="model").measure(PLANS, windows, kill)
    (file,) = (tmp_path / "measured").iterdir()
    # Killed while it wrote.
    file.write_text(file.read_text()[:-20])
    forward = model.model.embed_tokens.forward
    batches: list[int] = []

    def counted_forward(tokens: Tensor) -> Tensor:
        batches.append(len(tokens))
        embedded: Tensor = forward(tokens)
        return embedded

    monkeypatch.setattr(model.model.embed_tokens, "forward", counted_forward)
    resumed = Evaluator(model, origin="model").measure(PLANS, windows)
    # The first batch again for the one plan whose line was cut off, then the other two.
    assert batches == [2, 2, 1]
    for one, other in zip(whole, resumed, strict=True):
        assert one.nll == pytest.approx(other.nll)
        assert one.kl == pytest.approx(other.kl, abs=1e-4)
    batches.clear()
    assert Evaluator(model, origin="model").measure(PLANS, windows) == resumed
    assert batches == []
    # Another model, or another text, is measured.
    Evaluator(model, origin="other").measure(PLANS[:1], windows)
    Evaluator(model, origin="model").measure(PLANS[:1], Windows("x", windows.tokens + 1, 20))
    assert batches == [2, 2, 1, 2, 2, 1]


def test_journal_of_two_writers(tmp_path: Path) -> None:
    one, other = Journal("s", tmp_path), Journal("s", tmp_path)
    one.add({"a": [1.5]})
    other.add({"b": [2.5]})
    assert "b" not in one
    both = Journal("s", tmp_path)
    assert (both["a"], both["b"]) == ([1.5], [2.5])
    assert Journal("t", tmp_path).path != both.path


def test_ranks_keep_their_journals_apart(
    folder: Path, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured for two ranks says nothing of four, but where no sync point is dropped."""
    monkeypatch.setenv("DEPTHPAR_CACHE", str(tmp_path))
    plans = [resolve(spec, LAYERS) for spec in ({"drop_sync": "all"}, {"pair": [1, 5]})]
    model = hf.load_unmodified(folder)
    two, four = (
        Evaluator(model, origin="this", ranks=ranks).measure(plans, windows) for ranks in (2, 4)
    )
    assert abs(two[0].loss - four[0].loss) > 1e-3
    assert two[1] == four[1]
    again = Evaluator(model, origin="this", ranks=2).measure(plans, windows)
    assert again == two


def test_merged_is_the_mean_of_the_weights(folder: Path, windows: Windows, tmp_path: Path) -> None:
    row = row_with(LAYERS, (2, 5), TRANSFORMATIONS["merge"])
    (quality,) = Evaluator(hf.load_unmodified(folder)).measure([row], windows)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.startswith("model.layers.2.")]:
        same = [tensors[name.replace("layers.2.", f"layers.{at}.")] for at in (2, 3, 4)]
        tensors[name] = torch.stack(same).mean(0)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    expected = Evaluator(LlamaForCausalLM.from_pretrained(tmp_path)).measure(
        [resolve({"blocks": [[0], [1], [2], [5]]}, LAYERS)], windows
    )
    assert quality.nll == pytest.approx(expected[0].nll, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("prune", {"blocks": [[0], [4], [5]]}),
        ("parallel", {"blocks": [[0], [1, 2, 3], [4], [5]]}),
        ("pairs", {"blocks": [[0], [1, 2], [3], [4], [5]]}),
        ("ladder", {"ladder": [1, 2, 3]}),
        ("parallel_residual", {"parallel_residual": [1, 2, 3]}),
        ("drop_sync", {"drop_sync": [1, 2, 3]}),
    ],
)
def test_transformations_are_plans(name: str, spec: Any) -> None:
    assert row_with(LAYERS, (1, 4), TRANSFORMATIONS[name]) == row_of(resolve(spec, LAYERS))


def test_shuffle_moves_the_layers_of_the_span_only() -> None:
    for span in spans(LAYERS):
        row = row_with(LAYERS, span, TRANSFORMATIONS["shuffle"])
        order = [block.layers[0] for block in row]
        assert sorted(order) == list(range(LAYERS))
        assert order != sorted(order)
        start, end = span
        assert order[:start] + order[end:] == [*range(start), *range(end, LAYERS)]
        assert row == row_with(LAYERS, span, TRANSFORMATIONS["shuffle"])
        assert all(block == Block(block.layers) for block in row)


def test_spans() -> None:
    assert list(spans(4)) == [(0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (2, 4)]
    assert list(spans(7, grid=3)) == [(0, 3), (0, 6), (0, 7), (3, 6), (3, 7)]
