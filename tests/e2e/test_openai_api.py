"""A real `vllm serve` with a restructured model, used the way its users use it."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import torch
from forked_serve import forked_servers
from models import prompts, write_llama
from openai import BadRequestError, NotFoundError, OpenAI
from prometheus import scrape
from texts import TEXTS
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vllm_depthpar import hf
from vllm_depthpar.launch.server import Server, serve

PLAN = {"pair": [14, 28]}
NAME = "SmolLM2"
BATCHED_TOKENS = 128


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[Server]:
    """Eager, fp32, and steps of so few tokens that long prompts are prefilled in chunks."""
    arguments = ["--model-impl", "depthpar", "--hf-overrides", json.dumps({"depthpar": PLAN})]
    arguments += ["--dtype", "float32", "--enforce-eager", "--served-model-name", NAME]
    arguments += ["--max-model-len", "1024", "--max-num-batched-tokens", str(BATCHED_TOKENS)]
    arguments += ["--max-num-seqs", "16", "--enable-prompt-tokens-details"]
    env = {"VLLM_LOGGING_LEVEL": "INFO", "TORCHDYNAMO_DISABLE": "1"}
    with forked_servers(), serve(smollm2, *arguments, env=env) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def greedy(smollm2: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int], int], str]:
    """The reference's greedy continuation, as text."""
    model = hf.load(smollm2, PLAN)

    def continuation(tokens: list[int], count: int) -> str:
        output = model.generate(
            torch.tensor([tokens]), max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
        return str(tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True))

    return continuation


def complete(client: OpenAI, prompt: Any, count: int, **options: Any) -> Any:
    extra = {"ignore_eos": True, **options.pop("extra_body", {})}
    return client.completions.create(
        model=NAME, prompt=prompt, max_tokens=count, temperature=0, extra_body=extra, **options
    )


def test_log_names_the_plan(server: Server) -> None:
    assert "30 layers as 23 blocks (7 of 2) (from --hf-overrides)" in server.log_text()


def test_chat_and_streaming(
    client: OpenAI,
    tokenizer: PreTrainedTokenizerBase,
    greedy: Callable[[list[int], int], str],
) -> None:
    messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
    options: Any = {"model": NAME, "messages": messages, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**options, extra_body={"ignore_eos": True})
    stream = client.chat.completions.create(**options, stream=True, extra_body={"ignore_eos": True})
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    text = whole.choices[0].message.content
    assert "".join(pieces) == text
    assert len(pieces) > 10
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert text == greedy(tokens, 24)


def test_logprobs(client: OpenAI, smollm2: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    answer = complete(client, TEXTS[0], 4, logprobs=3, extra_body={"prompt_logprobs": 2})
    tokens = tokenizer(TEXTS[0]).input_ids
    model = hf.load(smollm2, PLAN)
    with torch.no_grad():
        reference = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    best = reference[-1].topk(3)
    assert sorted(answer.choices[0].logprobs.top_logprobs[0].values(), reverse=True) == (
        pytest.approx(best.values.tolist(), abs=1e-3)
    )
    given = answer.choices[0].prompt_logprobs
    assert given[0] is None
    for position, entry in enumerate(given[1:], 1):
        expected = reference[position - 1, tokens[position]].item()
        assert entry[str(tokens[position])]["logprob"] == pytest.approx(expected, abs=1e-3)


def test_stop_string(client: OpenAI) -> None:
    free = complete(client, TEXTS[1], 40).choices[0].text
    stop = free[len(free) // 2 :][:5]
    stopped = complete(client, TEXTS[1], 40, stop=[stop]).choices[0]
    assert stopped.text == free[: free.index(stop)]
    assert stopped.finish_reason == "stop"


def test_structured_output(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "capital": {"type": "boolean"}},
        "required": ["city", "capital"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "Name a city, as JSON."}],
        max_tokens=60,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    )
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), schema)


def test_chunked_prefill_and_prefix_caching(
    server: Server,
    client: OpenAI,
    tokenizer: PreTrainedTokenizerBase,
    greedy: Callable[[list[int], int], str],
) -> None:
    tokens = tokenizer(" ".join(TEXTS)).input_ids[:600]
    assert len(tokens) > 4 * BATCHED_TOKENS
    first = complete(client, tokens, 8)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert first.choices[0].text == greedy(tokens, 8)
    again = complete(client, tokens, 8)
    assert again.usage.prompt_tokens_details.cached_tokens >= 512
    assert again.choices[0].text == first.choices[0].text


def test_continuous_batching(
    client: OpenAI,
    tokenizer: PreTrainedTokenizerBase,
    greedy: Callable[[list[int], int], str],
) -> None:
    """Requests of many lengths at once: some prefill while others decode."""
    jobs = [(tokenizer(text).input_ids, 6 + 3 * i) for i, text in enumerate(TEXTS[:8])]
    with ThreadPoolExecutor(len(jobs)) as pool:
        texts = list(pool.map(lambda job: complete(client, *job).choices[0].text, jobs))
    assert texts == [greedy(*job) for job in jobs]


def test_several_answers_and_usage(client: OpenAI) -> None:
    """n > 1, and what a stream says it used."""
    answer = client.completions.create(
        model=NAME,
        prompt=TEXTS[2],
        n=3,
        temperature=1.5,
        max_tokens=12,
        extra_body={"ignore_eos": True},
    )
    assert len({choice.text for choice in answer.choices}) == 3
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 36
    stream = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": TEXTS[2]}],
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    *_, last = stream
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 8
    assert last.usage.total_tokens == last.usage.prompt_tokens + 8


def test_chat_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "Say something."}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    for entry in answer.choices[0].logprobs.content:
        first, second = entry.top_logprobs
        assert (entry.token, entry.logprob) == (first.token, first.logprob)
        assert second.logprob <= first.logprob <= 0


def test_tools(client: OpenAI) -> None:
    """As plain vLLM without its flags for them: refused, with the flags' names."""
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for choice in ("auto", named):
        with pytest.raises(BadRequestError, match="--tool-call-parser"):
            client.chat.completions.create(
                model=NAME,
                messages=[{"role": "user", "content": "How is the weather in Rome?"}],
                tools=[tool],
                tool_choice=choice,
            )


def test_bad_requests(server: Server, client: OpenAI) -> None:
    """Each is refused with a reason, and the next request is answered."""
    with pytest.raises(BadRequestError, match="1024"):
        complete(client, [5] * 1025, 1)
    with pytest.raises(BadRequestError, match="max_tokens"):
        complete(client, TEXTS[0], -1)
    with pytest.raises(NotFoundError, match="another"):
        client.completions.create(model="another", prompt=TEXTS[0])
    url = f"{server.url}/v1/completions"
    headers = {"Content-Type": "application/json"}
    for body in (b'{"model": ', b"[]", b"\xff\xfe", b'{"prompt": ' + b"[" * 20_000):
        answer = httpx.post(url, content=body, headers=headers, timeout=60)
        assert answer.status_code == 400, (body[:20], answer.text)
        assert answer.json()  # "error", or FastAPI's "detail" where the body is no text
    assert complete(client, TEXTS[0], 1).usage.completion_tokens == 1


def test_clients_that_leave(
    server: Server,
    client: OpenAI,
    tokenizer: PreTrainedTokenizerBase,
    greedy: Callable[[list[int], int], str],
) -> None:
    """Streams closed after their first token free what they held."""

    def leave(text: str) -> None:
        with client.completions.create(
            model=NAME, prompt=text, max_tokens=800, stream=True, extra_body={"ignore_eos": True}
        ) as stream:
            next(iter(stream))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(leave, TEXTS[:6]))
    left = time.monotonic() + 10
    while (busy := sum(gauges(server, "num_requests_running", "num_requests_waiting"))) > 0:
        assert time.monotonic() < left, busy
        time.sleep(0.1)
    assert gauges(server, "kv_cache_usage_perc") == [0]
    tokens = tokenizer(TEXTS[3]).input_ids
    assert complete(client, tokens, 8).choices[0].text == greedy(tokens, 8)


def gauges(server: Server, *names: str) -> list[float]:
    wanted = {f"vllm:{name}" for name in names}
    return [sample.value for sample in scrape(server) if sample.name in wanted]


def test_log_has_no_prompts_and_no_answers(server: Server, client: OpenAI) -> None:
    """At vLLM's default level."""
    marker = "a-prompt-that-is-nobody's-business"
    answer = complete(client, f"{marker} " * 3, 12).choices[0].text
    client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": marker}], max_tokens=2
    )
    with pytest.raises(BadRequestError):
        complete(client, marker * 1000, 1)
    log = server.log_text()
    assert "POST /v1/completions" in log
    assert marker not in log
    assert answer not in log


def test_metrics(server: Server) -> None:
    metrics = httpx.get(f"{server.url}/metrics").text
    assert "vllm:generation_tokens_total" in metrics


@pytest.mark.next
def test_compiled_checkpoint_without_flags(smollm2: Path, tmp_path: Path) -> None:
    """vLLM's defaults (torch.compile, bf16), and a checkpoint that carries its plan."""
    folder = tmp_path / "restructured"
    shutil.copytree(smollm2, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["DepthParLlamaForCausalLM"], "depthpar": {"pair": [20, 28]}}
    (folder / "config.json").write_text(json.dumps(config))
    # As `make serve` does; see the Makefile.
    env = {"VLLM_USE_AOT_COMPILE": "0"}
    arguments = ["--served-model-name", NAME, "--max-model-len", "512"]
    with forked_servers(compiled=True), serve(folder, *arguments, env=env) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)
        answer = client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_tokens=32,
            temperature=0,
        )
        assert "Paris" in (answer.choices[0].message.content or "")
        log = server.log_text()
        assert "30 layers as 26 blocks (4 of 2) (from config.json)" in log
        assert "enforce_eager=False" in log
        assert "'mode': <CompilationMode.DYNAMO_TRACE_ONCE" in log


@pytest.mark.next
def test_two_ranks(tmp_path: Path) -> None:
    """vLLM's own tensor-parallel workers, each with one member of every pair. The plan's file is
    read once; what is running when the server is told to end is finished."""
    folder = write_llama(tmp_path / "model")
    plan = {"pair": [1, 5]}
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    arguments = ["--model-impl", "depthpar", "--enforce-eager", "--skip-tokenizer-init"]
    arguments += ["--enable-scale-out", "--shutdown-timeout", "60", "--tensor-parallel-size", "2"]
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "TORCHDYNAMO_DISABLE": "1"}
    env |= {"DEPTHPAR_PLAN": str(file)}
    tokens = prompts(1, 30)

    def generate(server: Server, count: int) -> list[int]:
        answer = httpx.post(
            f"{server.url}/inference/v1/generate",
            json={
                "token_ids": tokens[0].tolist(),
                "sampling_params": {"temperature": 0, "max_tokens": count, "ignore_eos": True},
            },
            timeout=120,
        )
        assert answer.status_code == 200, answer.text
        generated: list[int] = answer.json()["choices"][0]["token_ids"]
        return generated

    with (
        forked_servers(),
        serve(folder, *arguments, env=env) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        file.write_text('{"skip": [1, 2, 3]}')
        generated = generate(server, 12)
        running = pool.submit(generate, server, 200)
        while gauges(server, "num_requests_running") != [1]:
            if running.done():  # before it was seen
                running = pool.submit(generate, server, 200)
        server.process.send_signal(signal.SIGTERM)
        assert len(running.result()) == 200
        assert server.process.wait(60) == 0
    expected = hf.load(folder, plan).generate(tokens, max_new_tokens=12, do_sample=False)
    assert generated == expected[0, 30:].tolist()


def test_embeddings(smollm2: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """`--runner pooling`: the last token's normalized hidden state, as vLLM gives for Llama."""
    arguments = ["--model-impl", "depthpar", "--hf-overrides", json.dumps({"depthpar": PLAN})]
    arguments += ["--runner", "pooling", "--dtype", "float32", "--enforce-eager"]
    arguments += ["--max-model-len", "512", "--served-model-name", NAME]
    with forked_servers(), serve(smollm2, *arguments) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)
        answer = client.embeddings.create(model=NAME, input=TEXTS[:3], encoding_format="float")
    model = hf.load(smollm2, PLAN)
    for text, item in zip(TEXTS[:3], answer.data, strict=True):
        with torch.no_grad():
            hidden = model.model(torch.tensor([tokenizer(text).input_ids])).last_hidden_state
        expected = torch.nn.functional.normalize(hidden[0, -1], dim=0)
        torch.testing.assert_close(torch.tensor(item.embedding), expected, atol=1e-4, rtol=0)
