"""`depthpar eval --answers`: what plans answer, from a real `vllm serve` for each."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from forked_serve import forked_servers
from models import write_llama
from transformers import AutoTokenizer, PreTrainedModel

from vllm_depthpar import hf
from vllm_depthpar.cli.main import main
from vllm_depthpar.evaluate import answers

PLAN = {"pair": [8, 28]}
SERVER_ARGS = "--server-args=--dtype float32 --enforce-eager --max-model-len 512"
TOKENS = 8


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers that start quickly, with their logs in a folder; short answers."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TORCHDYNAMO_DISABLE", "1")
        environment.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("logs")))
        with forked_servers(), patch.object(answers, "TOKENS", TOKENS):
            yield


def expected(model: Path, network: PreTrainedModel, prompt: str, chat: bool) -> str:
    """By transformers' own greedy search."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = prompt
    if chat:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).input_ids
    output = network.generate(ids, max_new_tokens=TOKENS, do_sample=False)
    written: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return written


def test_answers_of_plain_and_plan(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As chats; to the twenty prompts, and on the page."""
    out, page = tmp_path / "eval.json", tmp_path / "report.html"
    plans = ["--plan", "plain", "--plan", json.dumps(PLAN)]
    command = ["eval", str(smollm2), *plans, "--answers", SERVER_ARGS, "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())["answers"]
    assert report["prompts"] == list(answers.PROMPTS)
    assert len(set(report["prompts"])) == 20
    assert report["settings"][0] == f"greedy, as chats, at most {TOKENS} tokens"
    plain, paired = report["plans"]
    for row, spec in ((plain, "identity"), (paired, PLAN)):
        network = hf.load(smollm2, spec)
        for at in (0, 7, 16):
            answer = expected(smollm2, network, report["prompts"][at], chat=True)
            assert row["answers"][at] == answer
            assert answer.strip() in printed
    assert plain["answers"] != paired["answers"]

    assert main(["report", str(out), "--out", str(page)]) == 0
    html = page.read_text()
    assert html.count("<blockquote>") == 40
    assert f"3. {answers.PROMPTS[2]}" in printed


def test_own_prompts_of_a_model_without_a_chat_template(smollm2: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The capital of France is\n\n  One, two, three,\n")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = write_llama(tmp_path / "model", vocab=len(tokenizer))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(model)
    out = tmp_path / "eval.json"
    command = ["eval", str(model), "--plan", "identity", "--answers", str(prompts), SERVER_ARGS]
    assert main([*command, "--out", str(out)]) == 0
    report = json.loads(out.read_text())["answers"]
    assert report["prompts"] == ["The capital of France is", "One, two, three,"]
    assert report["settings"][0].startswith("greedy, going on from the prompt, ")
    (row,) = report["plans"]
    network = hf.load(model, "identity")
    for prompt, answer in zip(report["prompts"], row["answers"], strict=True):
        assert answer == expected(model, network, prompt, chat=False)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "can't be read (No such file"), (b"\n \n", "has no prompt"), (b"\xff", "not UTF-8")],
)
def test_wrong_prompts_are_refused_before_a_server_starts(
    smollm2: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    words: str,
) -> None:
    prompts = tmp_path / "prompts.txt"
    if content is not None:
        prompts.write_bytes(content)
    assert main(["eval", str(smollm2), "--plan", "plain", "--answers", str(prompts)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert words in said
    assert "; allowed: UTF-8 text, a prompt a line" in said


def test_a_prompt_that_does_not_fit_ends_in_one_line(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("word " * 2000)
    command = ["eval", str(smollm2), "--plan", "plain", "--answers", str(prompts), SERVER_ARGS]
    assert main(command) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "no answer from the server of plan plain (OSError: " in said
    assert "maximum context length" in said, "the server's own words"
    assert "allowed: prompts that fit into the context" in said
