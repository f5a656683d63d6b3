"""The reference on transformers, against the equations on plain tensors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from equations import plain_logits
from models import LLAMA3_ROPE, as_published, prompts, write_llama
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, BloomForCausalLM, LlamaForCausalLM

from vllm_depthpar import hf
from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import resolve

LAYERS = 6
PLANS: dict[str, Any] = {
    "identity": "identity",
    "pairs": {"pair": [1, 5]},
    "all pairs": {"pair": [0, 6]},
    "group of 3": {"pair": [2, 5], "group": 3},
    "one block": {"pair": [0, 6], "group": 6},
    "skip": {"skip": {"speedup": 2}},
    "skip and pair": {"skip": {"speedup": 1.5}, "pair": [1, 5]},
    "out of order": {"blocks": [[0], [3], [2, 1], [5, 4]]},
    "out of order, skipping": {"blocks": [[4, 1], [0], [5, 2]]},
    # One for each way into a ladder block (first, after a standard one, after a ladder one) and out
    # of it (last, before a standard one, before a ladder one).
    "all ladder": {"ladder": "all"},
    "last ladder": {"ladder": 3},
    "first ladder": {"ladder": [0, 1]},
    "one ladder": {"ladder": [2]},
    "scattered ladder": {"ladder": [0, 2, 3, 5]},
    "ladder over pairs": {"pair": [0, 6], "ladder": "all"},
    "ladder over some pairs": {"pair": [1, 5], "ladder": [3, 4, 5]},
    "ladder with skips": {"skip": {"speedup": 1.5}, "ladder": "all"},
    "ladder out of order, skipping": {"blocks": [[4, 1], [0], [5, 2]], "ladder": [0, 2, 5]},
    "no attention in some": {"drop_attention": [1, 4]},
    "no MLP in some": {"drop_mlp": [0, 5]},
    "halves, before and after ladders": {"drop_attention": [1], "drop_mlp": [3], "ladder": [2, 4]},
    "unequal halves": {
        "blocks": [[0], {"attention": [2], "mlp": [1, 2]}, {"attention": [], "mlp": [4, 3]}, [5]]
    },
    "pairs with a half missing": {"pair": [0, 6], "drop_attention": [1, 2], "drop_mlp": [4, 5]},
    "all parallel residual": {"parallel_residual": "all"},
    "parallel residual of pairs": {"pair": [1, 5], "parallel_residual": [1, 2, 5]},
    "ladder around parallel residual": {"parallel_residual": [0, 3], "ladder": [1, 2, 4, 5]},
}
# What these mean depends on the ranks.
DROPS: dict[str, Any] = {
    "all dropped": {"drop_sync": "all"},
    "some dropped": {"drop_sync": [1, 2, 5]},
    "dropped in pairs": {"pair": [0, 6], "drop_sync": "all"},
    "dropped in groups, out of order": {"blocks": [[4, 1, 5], [0, 2, 3]], "drop_sync": "all"},
    "every mode": {
        "blocks": [[0], [3, 2], [1], [5]],
        "ladder": [1],
        "drop_sync": [2, 3],
        "parallel_residual": [5],
    },
    "one all-reduce in three": {"desync": {"every": 3}},
    "one in four, of pairs": {"pair": [0, 6], "desync": {"every": 4}},
    "desync beside other blocks": {
        "blocks": [[0], [3, 2], [1], [5]],
        "desync": {"attention": [0, 2, 3, 5], "mlp": [0]},
        "parallel_residual": [1],
    },
    "desync and missing halves": {
        "drop_attention": [1, 4],
        "drop_mlp": [3],
        "desync": {"attention": [0, 2], "mlp": [0, 1, 4]},
    },
}
ALL_SLIDING = {"use_sliding_window": True, "max_window_layers": 0}
MODELS: dict[str, dict[str, Any]] = {
    "GQA": {},
    "MHA, tied": {"kv_heads": 4, "tie": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3 rope": {"rope_scaling": LLAMA3_ROPE},
    "Mistral": {"model_type": "mistral"},
    "Mistral, sliding window": {"model_type": "mistral", "sliding_window": 8},
    "Qwen2": {"model_type": "qwen2", "tie": True},
    "Qwen2, sliding window": {"model_type": "qwen2", "sliding_window": 8, **ALL_SLIDING},
    "Qwen3": {"model_type": "qwen3"},
    "Qwen3, biases": {"model_type": "qwen3", "attention_bias": True},
    # Layers of different windows in one block, and one after the other.
    "Qwen3, some sliding": {
        "model_type": "qwen3",
        "sliding_window": 8,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"] * 2,
    },
    "Gemma 2": {"model_type": "gemma2", "tie": True},
    "Gemma 3": {"model_type": "gemma3_text", "attention_bias": True},
    "Phi 3": {"model_type": "phi3"},
    "GLM 4": {"model_type": "glm4", "attention_bias": True},
    "Granite": {"model_type": "granite", "tie": True},
    "BLOOM": {"model_type": "bloom", "tie": True},
    "BLOOM, untied": {"model_type": "bloom", "hidden": 96, "heads": 6},
    "Mixtral": {"model_type": "mixtral"},
    "Qwen2 MoE": {"model_type": "qwen2_moe"},
    "Qwen3 MoE": {"model_type": "qwen3_moe"},
    "GPT-OSS": {"model_type": "gpt_oss"},
    "GPT-OSS, other windows": {
        "model_type": "gpt_oss",
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"] * 2,
    },
}

# Written for this test, so that nothing needs to be downloaded to read it.
TEXT = """\
The lighthouse stands at the end of a long stone pier, and for more than a hundred years its
lamp has guided fishing boats back to the harbor. In winter, when storms come in from the north,
the waves break over the wall and the keeper has to wait for the tide to fall before he can walk
home. The old keeper retired last spring. His daughter, who had studied engineering in the city,
came back to take his place, and the first thing she did was to replace the lamp with a more
efficient one. Some people in the village complained that the new light was too bright. Others
said that it made no difference at all. But when a thick fog covered the bay in October, and
three boats found their way in without any trouble, nobody complained again."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On matrices this small, threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("model"), layers=LAYERS)


@pytest.mark.parametrize("model", MODELS)
def test_every_plan_equals_the_equations(model: str, tmp_path: Path) -> None:
    path = write_llama(tmp_path, layers=LAYERS, seed=1, **MODELS[model])
    ids = prompts(2, 48, seed=2)
    for name, spec in PLANS.items():
        plan = resolve(spec, LAYERS)
        expected = torch.stack([plain_logits(path, plan, row) for row in ids])
        assert expected.std() > 1  # else a tolerance in logits would say little
        with torch.no_grad():
            logits = hf.load(path, plan)(ids).logits
        assert (logits - expected).abs().max() < 1e-4, name


RANKED = ["BLOOM", "Phi 3", "GLM 4", "Granite", "Mixtral", "Qwen2 MoE", "GPT-OSS"]
# Heads and sizes that three ranks can cut, and blocks of any width two ranks and six.
CUT = {"hidden": 96, "heads": 6, "kv_heads": 6, "intermediate": 96}
NO_DESYNC = {
    "Gemma 3": "'desync': this model's modules have norms after",
    "GLM 4": "'desync': this model's modules have norms after",
    "Phi 3": "'desync': this model's q, k and v are one projection",
    "BLOOM": "'desync': this model's q, k and v are one projection",
}
CUT_EXPERTS = {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 96}


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
@pytest.mark.parametrize("model", ["GQA", "biases", "Qwen3", "Gemma 3", *RANKED])
def test_what_depends_on_ranks_equals_the_equations(model: str, ranks: int, tmp_path: Path) -> None:
    sizes = {**CUT, **(CUT_EXPERTS if model == "Qwen2 MoE" else {})}
    path = write_llama(tmp_path, layers=LAYERS, seed=1, **{**MODELS[model], **sizes})
    ids = prompts(2, 48, seed=2)
    for name, spec in DROPS.items():
        if model in NO_DESYNC and "desync" in spec:
            with pytest.raises(UserError, match=NO_DESYNC[model]):
                hf.load(path, spec)
            continue
        plan = resolve(spec, LAYERS)
        expected = torch.stack([plain_logits(path, plan, row, ranks) for row in ids])
        for model_of in (hf.load(path, plan, ranks=ranks), hf.load(path, {**spec, "tp": ranks})):
            with torch.no_grad():
                assert (model_of(ids).logits - expected).abs().max() < 1e-4, name
        standard = resolve({**spec, "drop_sync": [], "desync": None}, LAYERS)
        far = (plain_logits(path, standard, ids[0]) - expected[0]).abs().max()
        # A ladder block after one that reduces once reads the complete stream.
        assert (far < 1e-9) == (ranks == 1 and name != "every mode"), name


def test_ranks_that_do_not_fit_are_refused(folder: Path) -> None:
    model = hf.load(folder, {"drop_sync": "all"}, ranks=5)
    with pytest.raises(UserError, match=r"5 ranks can't cut 1 times 128 evenly; allowed: tensor-"):
        model(prompts(1, 8))


def test_ranks_that_share_kv_heads_are_refused(folder: Path) -> None:
    model = hf.load(folder, {"desync": {"every": 4}}, ranks=4)
    with pytest.raises(UserError, match=r"4 ranks share 2 KV heads, and under 'desync' each has"):
        model(prompts(1, 8))


@pytest.mark.parametrize("spec", [{"drop_sync": "all"}, {"desync": {"every": 3}}], ids=str)
def test_what_depends_on_ranks_generates_and_learns(folder: Path, spec: Any) -> None:
    """With a KV cache the same, and the gradient is that of the loss."""
    model = hf.load(folder, spec, ranks=2)
    ids = prompts(1, 12)
    generated = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        best = model(generated).logits.argmax(-1)
    assert torch.equal(best[:, 11:-1], generated[:, 12:])
    weight = model.model.layers[2].layers[0].self_attn.o_proj.weight
    loss = cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    (gradient,) = torch.autograd.grad(loss, [weight])
    step = 1e-3 * torch.sign(gradient) / gradient.abs().sum()
    with torch.no_grad():
        weight += step
        raised = cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]) - loss
        weight -= step
    assert raised.item() == pytest.approx((gradient * step).sum().item(), rel=0.2)


def test_pickled_weights_are_read_only_where_asked_for(tmp_path: Path) -> None:
    path = write_llama(tmp_path, layers=LAYERS)
    expected = load_file(path / "model.safetensors")
    torch.save(expected, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors; .* use_safetensors=False"):
        hf.load(path, "identity")
    model = hf.load(path, "identity", use_safetensors=False)
    assert torch.equal(model.state_dict()["model.norm.weight"], expected["model.norm.weight"])


def test_plans_differ(folder: Path) -> None:
    """The tolerance of the test above tells every plan from every other."""
    ids = prompts(1, 48)[0]
    logits = [plain_logits(folder, resolve(spec, LAYERS), ids) for spec in PLANS.values()]
    for i, one in enumerate(logits):
        for other in logits[i + 1 :]:
            assert (one - other).abs().max() > 0.1


def test_identity_is_the_unmodified_model(folder: Path) -> None:
    plain = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    same = hf.load(folder, "identity")
    ids = prompts(2, 48)
    with torch.no_grad():
        expected = plain(ids, output_hidden_states=True)
        result = same(ids, output_hidden_states=True)
    assert torch.equal(result.logits, expected.logits)
    assert len(result.hidden_states) == len(expected.hidden_states) == LAYERS + 1
    for got, wanted in zip(result.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(got, wanted)


def test_bloom_is_transformers_own(tmp_path: Path) -> None:
    """Whatever the files' names are; from embeddings, too, which are not normalized."""
    folder = write_llama(tmp_path / "bloom", layers=LAYERS, model_type="bloom", tie=True)
    plain = BloomForCausalLM.from_pretrained(folder, dtype=torch.float32)
    bare, ids = as_published(folder, tmp_path / "bare"), prompts(2, 48)
    embedded = plain.transformer.word_embeddings(ids)
    with torch.no_grad():
        expected = plain(ids, output_hidden_states=True)
        for path in (folder, bare):
            model = hf.load(path, "identity")
            result = model(ids, output_hidden_states=True)
            torch.testing.assert_close(result.logits, expected.logits)
            for got, wanted in zip(result.hidden_states, expected.hidden_states, strict=True):
                torch.testing.assert_close(got, wanted)
            torch.testing.assert_close(model(inputs_embeds=embedded).logits, expected.logits)


@pytest.mark.parametrize(
    "model", [name for name in MODELS if name[0] in "BMQ" or name[:2] in ("Ge", "GP")]
)
def test_other_families_generate_and_learn(model: str, tmp_path: Path) -> None:
    path = write_llama(tmp_path, layers=LAYERS, **MODELS[model])
    restructured, ids = hf.load(path, PLANS["ladder over some pairs"]), prompts(2, 12)
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    cached = restructured.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, restructured.generate(ids, use_cache=False, **options))
    restructured.train()
    restructured.gradient_checkpointing_enable()
    output = restructured(ids, labels=ids, output_hidden_states=True)
    output.loss.backward()
    assert len(output.hidden_states) == 1 + len(restructured.model.layers)
    assert all(parameter.grad is not None for parameter in restructured.parameters())


@pytest.mark.parametrize("plan", PLANS)
def test_generate_with_cache_equals_without(folder: Path, plan: str) -> None:
    model = hf.load(folder, PLANS[plan])
    ids = prompts(3, 12)
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, use_cache=True, return_dict_in_generate=True, **options)
    plain = model.generate(ids, use_cache=False, **options)
    assert cached.sequences.shape == (3, 28)
    assert torch.equal(cached.sequences, plain)
    # One slot for each attention that runs; where there are more blocks, the other slots are empty.
    resolved = resolve(PLANS[plan], LAYERS)
    used = sum(half == "attention" for _, half in resolved.runs)
    empty = max(0, resolved.depth - used)
    slots = [layer.get_seq_length() for layer in cached.past_key_values.layers]
    assert slots == [27] * used + [0] * empty


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "bloom"])
def test_left_padding_does_not_change_a_row(model_type: str, tmp_path: Path) -> None:
    folder = write_llama(tmp_path, layers=LAYERS, model_type=model_type)
    model = hf.load(folder, PLANS["out of order, skipping"])
    ids = prompts(1, 12)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(17) >= 5).long()[None]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(padded, attention_mask=mask, **options)[:, 5:],
        model.generate(ids, **options),
    )


@pytest.mark.parametrize(
    "plan", ["pairs", "out of order, skipping", "scattered ladder", "ladder over pairs"]
)
def test_gradients_reach_every_kept_parameter(folder: Path, plan: str) -> None:
    model = hf.load(folder, PLANS[plan])
    ids = prompts(2, 16)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    assert set(expected) == {name for name, _ in model.named_parameters()}
    # A token that isn't in the batch has an embedding without a gradient.
    for name, gradient in expected.items():
        rows = gradient[ids.unique()] if "embed_tokens" in name else gradient
        assert rows.abs().amax() > 1e-6, name

    model.train()
    model.gradient_checkpointing_enable()
    checkpointed = gradients()
    assert set(checkpointed) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)


def test_parameters_keep_their_checkpoint_names(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    model = hf.load(folder, PLANS["out of order, skipping"])
    state = hf.checkpoint_names(model.state_dict())
    assert set(state) == {name for name in tensors if ".layers.3." not in name}
    for name, tensor in state.items():
        assert torch.equal(tensor, tensors[name]), name
    # The modules themselves, not copies: one optimizer step would show in both.
    assert {t.data_ptr() for t in state.values()} == {p.data_ptr() for p in model.parameters()}


def test_errors(folder: Path, tmp_path: Path) -> None:
    model = hf.load(folder, "identity")
    with pytest.raises(UserError, match="already restructured"):
        hf.restructure(model, resolve("identity", LAYERS))
    with pytest.raises(UserError, match="the plan is for 7 layers; allowed: 6"):
        hf.load(folder, resolve("identity", 7))
    with pytest.raises(UserError, match="layer 6 is out of range"):
        hf.load(folder, {"blocks": [[6]]})
    other = write_llama(tmp_path, layers=2)
    config = json.loads((other / "config.json").read_text())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"model_type": "gemma"}, "'gemma' is not supported; allowed: 'llama', .*'qwen3'"),
        ({"model_type": "cohere"}, "'cohere' is not supported; allowed: 'llama', .*'gpt_oss'"),
        (
            {"model_type": "qwen2", "dual_chunk_attention_config": {"chunk_size": 8}},
            "'dual_chunk_attention_config' is not supported; allowed: qwen2 models without it",
        ),
    ]
    for keys, message in wrong:
        (other / "config.json").write_text(json.dumps(config | keys))
        with pytest.raises(UserError, match=message):
            hf.load(other, "identity")


def test_perplexity_of_a_real_model_grows_with_the_span(smollm2: Path) -> None:
    ids = AutoTokenizer.from_pretrained(smollm2)(TEXT, return_tensors="pt").input_ids

    def perplexity(spec: Any) -> float:
        with torch.no_grad():
            logits = hf.load(smollm2, spec)(ids).logits[0]
        return float(cross_entropy(logits[:-1], ids[0, 1:]).exp())

    plain, some, every = map(perplexity, ["identity", {"pair": [16, 28]}, {"pair": [0, 30]}])
    assert plain < some < every
    # Pairing the late layers hurts, but the model still works; pairing all breaks it.
    assert plain < 25
    assert some < 3 * plain
    assert every > 10 * plain
