"""Whether this machine, with these flags, serves the models that plans mean.

vLLM answers as it would serve, and `vllm_depthpar.verify.streamed` runs the same plan over the same
texts; `vllm_depthpar.verify.rounding` says what their difference means.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_depthpar.bench.server_load import has_tokenizer
from vllm_depthpar.checkpoint.config import folder, read_config
from vllm_depthpar.checkpoint.tokenizer import read_tokenizer
from vllm_depthpar.errors import UserError
from vllm_depthpar.launch import hardware, kv_cache
from vllm_depthpar.launch.engine import EngineError, Worker, flags_of, make_engine
from vllm_depthpar.launch.variants import PLAIN, Variant, check_tp, usual, variants
from vllm_depthpar.plan import Plan, resolve
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.precedence import ENV, choose
from vllm_depthpar.util import progress
from vllm_depthpar.util.provenance import origin
from vllm_depthpar.verify import passages
from vllm_depthpar.verify.rounding import Answer, Served, compare, judge

TOKENS = 64


@dataclass(frozen=True)
class VerifySettings:
    """How vLLM serves, by its flags.

    Attributes:
        engine_args: more flags of vLLM's engine; they win.
    """

    tp: int = 1
    dtype: str = "auto"
    eager: bool = False
    engine_args: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One that is served: a variant, the plan that it means, and its tensor-parallel size."""

    variant: Variant
    plan: Plan
    tp: int


def verify(model: str, labels: Sequence[str], settings: VerifySettings) -> dict[str, Any]:
    """Serve plans, and compare each with the reference.

    Args:
        model: folder or hub name.
        labels: plans as `vllm_depthpar.launch.variants` takes them; none for what would be served.

    Returns:
        JSON-ready: when, with what and on what; `rows`: the control and then the plans, each with
        its differences, what rounding explains of them and what is allowed (see `rounding.judge`).

    Raises:
        UserError: vLLM did not start, or ended.
        UserError: wrong input, or a checkpoint of which there is no reference.
    """
    config = read_config(model)
    entries = _entries(model, config, labels, settings.tp)
    prompts = _prompts(model, config)

    import torch

    from vllm_depthpar.verify.streamed import StreamedModel

    on_gpu = torch.cuda.is_available()
    reference = StreamedModel(folder(model), torch.device("cuda" if on_gpu else "cpu"))
    served, differences = [], []
    with progress.step_bar() as bar:
        task = bar.add_task("", total=3 * len(entries))
        # All of them before the first reference, which would keep a GPU's memory from them.
        for entry in entries:
            bar.update(task, description=f"vLLM: {entry.variant.label}")
            served.append(_serve(model, config, entry, settings, prompts, on_gpu))
            bar.advance(task)
        for entry, one in zip(entries, served, strict=True):
            bar.update(task, description=f"transformers: {entry.variant.label}")
            texts = [answer.text for answer in one.answers]
            plan = replace(entry.plan, tp=entry.tp)  # what it means may depend on it
            exact, in_bf16 = (
                reference.score(plan, texts, dtype, lambda share: bar.advance(task, share))
                for dtype in (torch.float32, torch.bfloat16)
            )
            differences.append(compare(one.answers, exact, in_bf16))
    verdicts = judge(differences, served[0].dtype, served[0].quantized)
    return {
        **origin("depthpar"),
        "hardware": hardware.inventory(),
        "model": Path(model).name,
        "settings": asdict(settings),
        "passages": len(served[0].answers),
        "prompt_tokens": sum(len(answer.prompt) for answer in served[0].answers),
        "generated_tokens": sum(len(answer.generated) for answer in served[0].answers),
        "rows": [
            {
                **asdict(entry.variant),
                "blocks": entry.plan.depth,
                "tp": entry.tp,
                "dtype": one.dtype,
                "mode": one.mode,
                "quantized": one.quantized,
                **verdict,
            }
            for entry, one, verdict in zip(entries, served, verdicts, strict=True)
        ],
    }


def _entries(model: str, config: Mapping[str, Any], labels: Sequence[str], tp: int) -> list[Entry]:
    """List the control, and the plans.

    The control is vLLM's own model; where that can't be, every layer of the checkpoint alone. It
    may be cut into fewer ranks than a plan, whose blocks have more heads.
    """
    option = "--plan"
    if not labels and os.environ.get(ENV):
        labels, option = [os.environ[ENV]], ENV
    if PLAIN in labels:
        raise UserError("--plan 'plain' is every plan's control; allowed: other plans")
    labels = labels or [label for label in usual(config) if label != PLAIN]
    plans = variants(model, labels, option)
    shape = ModelShape.from_config(config)
    if PLAIN in usual(config):
        control, alone = Variant(PLAIN), resolve("identity", shape.layers)
    else:
        kept = choose(config)[0].kept
        alone = resolve({"blocks": [[layer] for layer in kept]}, shape.layers)
        spec = {**alone.to_spec(), "ladder": []}
        control = Variant("every layer alone", alone.name, spec, alone.digest)
    entries = [Entry(control, alone, max(shape.fitting_tps(alone, tp)))]
    for one in plans:
        plan = resolve(one.spec, shape.layers)
        check_tp(one, plan, shape, tp)
        entries.append(Entry(one, plan, tp))
    return entries


def _prompts(model: str, config: Mapping[str, Any]) -> list[list[int]]:
    """Encode the passages, as long as the model has positions for them and what it adds."""
    most = config.get("max_position_embeddings", math.inf) - TOKENS
    if most < 2:
        raise UserError(f"{most + TOKENS} positions are too few; allowed: {TOKENS + 2} or more")
    if not has_tokenizer(model):
        return passages.random_ids(config["vocab_size"], most)
    return passages.token_ids(read_tokenizer(model), most)


def _serve(
    model: str,
    config: Mapping[str, Any],
    entry: Entry,
    settings: VerifySettings,
    prompts: Sequence[Sequence[int]],
    on_gpu: bool,
) -> Served:
    """Serve the prompts with an engine in a process of its own, which has ended on return.

    Raises:
        UserError: it did not answer.
    """
    one = entry.variant
    options = {
        "dtype": settings.dtype,
        "enforce_eager": settings.eager,
        "tensor_parallel_size": entry.tp,
        "max_model_len": max(map(len, prompts)) + TOKENS,
    }
    flags = [*one.flags, *flags_of(options), *settings.engine_args]
    shape = ModelShape.from_config(config).in_dtype("float32")  # whatever it will be
    lengths = [len(prompt) + TOKENS for prompt in prompts]
    env = {
        **hardware.environment(entry.tp, on_gpu),
        **kv_cache.environment(kv_cache.needed_bytes(shape, entry.plan, lengths, entry.tp)),
        **one.env,
    }
    worker = Worker(one.label, ask, model, flags, prompts, TOKENS, env=env)
    try:
        found: Served = worker.receive()
    except EngineError as error:
        reason = error.last.rpartition("depthpar: error: ")[2]
        raise UserError(f"vLLM could not serve {one.label}: {reason}") from None
    finally:
        worker.stop()
    return found


def ask(
    connection: Connection,
    model: str,
    flags: Sequence[str],
    prompts: Sequence[Sequence[int]],
    tokens: int,
) -> None:
    """Run an engine's process: send `Served` for all prompts at once and then the longest alone.

    Args:
        tokens: how many to generate, greedily, after each.
    """
    engine = make_engine(model, flags)
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    from vllm_depthpar import vllm_compat

    params = SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=0,
        logprobs=0,
    )
    answers = []
    for batch in (prompts, [max(prompts, key=len)]):
        asked = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in batch]
        for output in engine.generate(asked, params, use_tqdm=False):
            given, made = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
            entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
            logprobs = [
                float(entry[token].logprob)
                for entry, token in zip(entries, [*given[1:], *made], strict=True)
            ]
            answers.append(Answer(given, made, logprobs))
    served = Served(answers, **vllm_compat.how_it_runs(engine))
    vllm_compat.shut_down(engine)
    connection.send(served)
