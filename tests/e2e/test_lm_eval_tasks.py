"""`depthpar eval --tasks`: lm-eval's tasks over a real `vllm serve`, for plain vLLM and a plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from forked_serve import quick_servers
from lm_eval.tasks import TaskManager
from models import write_llama
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vllm_depthpar import hf
from vllm_depthpar.checkpoint.config import fingerprint
from vllm_depthpar.cli.main import main
from vllm_depthpar.errors import UserError
from vllm_depthpar.evaluate import lm_eval_tasks
from vllm_depthpar.evaluate.lm_eval_model import ServedLM
from vllm_depthpar.launch.variants import variants

PIQA = Path(__file__).parents[2] / "benchmarks" / "quality" / "tasks" / "piqa.yaml"
PLAN = '{"pair": [8, 28]}'
SERVER_ARGS = "--dtype float32 --enforce-eager --max-model-len 512"
SETTINGS = lm_eval_tasks.TaskSettings(server_args=tuple(SERVER_ARGS.split()))

DATA = """
from datasets import Dataset

CHOICES = [
    ("To keep milk fresh, put it in the", ["fridge", "oven"], 0),
    ("A bicycle has two", ["wings", "wheels"], 1),
    ("She opened the umbrella because of the", ["rain", "spoon"], 0),
    ("At night it is", ["dark", "Tuesday"], 0),
    ("To cut the bread he took a", ["pillow", "knife"], 1),
    ("Ice is frozen", ["water", "wood"], 0),
    ("The dog began to", ["bark", "read the newspaper"], 0),
    ("Letters are sent by", ["soup", "mail"], 1),
]
QUESTIONS = [("The capital of France is", "Paris"), ("One, two, three, four,", "five")]
TEXTS = ["A short walk led down to the river, where two boats lay.", "Nobody answered the phone."]


def choices(**_):
    rows = [{"text": text, "choices": both, "right": right} for text, both, right in CHOICES]
    return {"validation": Dataset.from_list(rows)}


def questions(**_):
    return {"validation": Dataset.from_list([{"text": q, "right": a} for q, a in QUESTIONS])}


def texts(**_):
    return {"validation": Dataset.from_list([{"text": text} for text in TEXTS])}


def broken(**_):
    raise OSError("no data\\nhere")
"""
COMMON = 'validation_split: validation\ndoc_to_text: "{{text}}"\ntarget_delimiter: " "\n'
MEAN = "aggregation: mean, higher_is_better: true"
YAML = {
    "choices": f"""
output_type: multiple_choice
doc_to_target: right
doc_to_choice: choices
num_fewshot: 1
metric_list: [{{metric: acc, {MEAN}}}, {{metric: acc_norm, {MEAN}}}]
""",
    "questions": f"""
output_type: generate_until
doc_to_target: right
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, {MEAN}, ignore_punctuation: true}}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_target: text
metric_list: [{metric: bits_per_byte}]
""",
    "broken": "output_type: loglikelihood_rolling\n",
}


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for answers and logs; and servers that start quickly."""
    folder = tmp_path_factory.mktemp("eval")
    with quick_servers(folder):
        yield folder


@pytest.fixture(scope="module")
def names(place: Path) -> list[str]:
    """Three tasks of ours: choices, generation, and loglikelihood of texts."""
    (place / "data.py").write_text(DATA)
    for name, config in YAML.items():
        text = f"task: own_{name}\ncustom_dataset: !function data.{name}\n{COMMON}{config}"
        (place / f"{name}.yaml").write_text(text)
    return [str(place / f"{name}.yaml") for name in YAML if name != "broken"]


Answers = dict[str, list[tuple[tuple[Any, ...], Any]]]


@pytest.fixture(scope="module")
def runs(smollm2: Path, names: list[str]) -> dict[str, tuple[dict[str, Any], Answers]]:
    """For plain vLLM and for the plan: the report, and (arguments, answer) of every request."""
    found = {}
    for variant in variants(str(smollm2), ["plain", PLAN]):
        loaded = lm_eval_tasks.load_tasks(names)
        report = lm_eval_tasks.run_tasks(str(smollm2), [variant], loaded, SETTINGS)
        answers = {
            name: [(one.args, one.resps[0]) for one in task.instances]
            for name, task in loaded["tasks"].items()
        }
        found[variant.label] = report, answers
    return found


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2)


class Reference:
    """The same plan on transformers."""

    def __init__(self, path: Path, label: str, tokenizer: PreTrainedTokenizerBase) -> None:
        spec = "identity" if label == "plain" else json.loads(label)
        self._model, self._tokenizer = hf.load(path, spec), tokenizer

    @torch.inference_mode()
    def loglikelihood(self, context: str, continuation: str) -> float:
        """Of the tokens after the context's; nothing before the first is the BOS token."""
        before = self._tokenizer(context).input_ids or [self._tokenizer.bos_token_id]
        tokens = self._tokenizer(context + continuation).input_ids
        if not context:
            tokens = before + tokens
        logprobs = self._model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        return sum(float(logprobs[i - 1, tokens[i]]) for i in range(len(before), len(tokens)))

    def greedy(self, prompt: str, count: int) -> str:
        tokens = self._tokenizer(prompt, return_tensors="pt")
        output = self._model.generate(**tokens, max_new_tokens=count, do_sample=False)
        new = output[0, tokens.input_ids.shape[1] :]
        return str(self._tokenizer.decode(new, skip_special_tokens=True))


@pytest.mark.parametrize("label", ["plain", PLAN])
def test_answers_are_the_models(
    label: str,
    runs: dict[str, tuple[dict[str, Any], Answers]],
    smollm2: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    report, answers = runs[label]
    reference = Reference(smollm2, label, tokenizer)
    results = report["plans"][0]["results"]

    choices = answers["own_choices"]
    assert len(choices) == 16
    expected = [reference.loglikelihood(*arguments) for arguments, _ in choices]
    assert [answer[0] for _, answer in choices] == pytest.approx(expected, abs=1e-3)
    # One example, never the question itself, before each question.
    assert all(context.count("\n\n") == 1 for (context, _), _ in choices)
    right = [0, 1, 0, 0, 1, 0, 0, 1]
    hits = [
        (expected[2 * i + answer] > expected[2 * i + 1 - answer]) for i, answer in enumerate(right)
    ]
    assert results["own_choices"]["acc"]["value"] == sum(hits) / 8
    assert results["own_choices"]["acc"]["stderr"] > 0 or all(hits)

    for (prompt, options), answer in answers["own_questions"]:
        continuation = reference.greedy(prompt, options["max_gen_toks"])
        assert answer == continuation.partition("\n")[0]

    texts = answers["own_texts"]
    expected = [reference.loglikelihood("", text) for (text,), _ in texts]
    assert [answer for _, answer in texts] == pytest.approx(expected, abs=1e-3)
    size = sum(len(text.encode()) for (text,), _ in texts)
    bits = -sum(expected) / size / torch.log(torch.tensor(2.0)).item()
    assert results["own_texts"]["bits_per_byte"]["value"] == pytest.approx(bits, abs=1e-4)


def test_a_plan_is_another_model(runs: dict[str, tuple[dict[str, Any], Answers]]) -> None:
    (plain, plain_answers), (plan, plan_answers) = runs["plain"], runs[PLAN]
    both = zip(plain_answers["own_choices"], plan_answers["own_choices"], strict=True)
    for (plain_arguments, one), (plan_arguments, other) in both:
        assert plain_arguments == plan_arguments
        assert abs(one[0] - other[0]) > 1e-2
    assert plain["plans"][0]["digest"] == "plain"
    assert plan["plans"][0]["plan"] == "30 layers as 20 blocks (10 of 2)"


def test_report(runs: dict[str, tuple[dict[str, Any], Answers]]) -> None:
    report, _ = runs[PLAN]
    assert report["versions"].keys() >= {"vllm_depthpar", "vllm", "transformers", "lm_eval"}
    assert (report["seed"], report["limit"]) == (1234, None)
    about = report["tasks"]
    assert about["own_choices"]["num_fewshot"] == 1
    assert [one["documents"] for one in about.values()] == [8, 2, 2]
    assert report["plans"][0]["requests_asked"] == 16 + 2 + 2


def test_nothing_is_asked_twice(
    runs: dict[str, tuple[dict[str, Any], Answers]],
    smollm2: Path,
    names: list[str],
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command, with the settings of the runs before it: no server, the same numbers."""
    servers = sorted(place.glob("vllm-serve-*"))
    out = place / "out.json"
    arguments = ["eval", str(smollm2), "--plan", "plain", "--plan", PLAN, "--out", str(out)]
    arguments += [f"--server-args={SERVER_ARGS}", "--tasks"]
    assert main([*arguments, *names]) == 0
    assert len(servers) == 2
    assert sorted(place.glob("vllm-serve-*")) == servers

    report = json.loads(out.read_text())["tasks"]
    assert report["model"] == smollm2.name
    for row in report["plans"]:
        before = runs[row["label"]][0]["plans"][0]
        assert row["requests_asked"] == 0
        assert row["results"] == before["results"]
        assert row["digest"] == before["digest"]
    table = capsys.readouterr().out.splitlines()
    assert table[0] == f"| task | documents | metric | plain | {PLAN} |"
    assert len(table) == 2 + 2 + 1 + 1
    acc = [row["results"]["own_choices"]["acc"] for row in report["plans"]]
    cells = " | ".join("{value:.4f} ± {stderr:.4f}".format(**one) for one in acc)
    assert table[2] == f"| own_choices | 8 | acc ↑ | {cells} |"

    # Answers are kept one by one, not task by task.
    assert main([*arguments, names[0], "--limit", "3"]) == 0
    report = json.loads(out.read_text())["tasks"]
    assert report["tasks"]["own_choices"]["documents"] == 3
    assert [row["requests_asked"] for row in report["plans"]] == [0, 0]
    assert sorted(place.glob("vllm-serve-*")) == servers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "nowhere.yaml"], "task file 'nowhere.yaml' does not exist"),
        (["--tasks", "{place}/broken.yaml"], "(OSError: no data here)"),
        (["--tasks", "own_chioces", "{place}/choices.yaml"], "did you mean 'own_choices'? (allow"),
        (
            ["--tasks", "{place}/texts.yaml", "--plan", '{"pair": [1, 4]}'],
            "plan key 'pair': [1, 4]",
        ),
        (["--tasks", "{place}/texts.yaml", "--server-args=--port=1"], "server flag '--port' can't"),
        (["--tasks", "{place}/texts.yaml", "--server-args='"], "--server-args: No closing quot"),
    ],
)
def test_wrong_input(
    arguments: list[str],
    message: str,
    smollm2: Path,
    names: list[str],
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, and no server."""
    servers = sorted(place.glob("vllm-serve-*"))
    given = [text.replace("{place}", str(place)) for text in arguments]
    assert main(["eval", str(smollm2), *given]) == 1
    error = capsys.readouterr().err
    assert error.startswith("depthpar: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(place.glob("vllm-serve-*")) == servers


def test_without_lm_eval(smollm2: Path) -> None:
    code = (
        "import sys; sys.modules['lm_eval'] = None; from vllm_depthpar.cli.main import main;"
        f"sys.exit(main(['eval', {str(smollm2)!r}, '--tasks', 'piqa']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ
    )
    assert run.returncode == 1
    assert run.stderr == (
        "depthpar: error: tasks need lm-eval: pip install 'vllm-depthpar[eval]'\n"
    )


def test_plain_of_a_ladder_checkpoint(tmp_path: Path) -> None:
    model = write_llama(tmp_path, layers=4, ladder_layers=2)
    with pytest.raises(UserError, match="vLLM itself can't serve a ladder"):
        variants(str(model), ["auto", "plain"])
    (auto,) = variants(str(model), ["auto"])
    assert auto.plan == "4 layers as 4 blocks (2 ladder)"


def test_fingerprint(tmp_path: Path) -> None:
    model = write_llama(tmp_path, layers=2)
    before = fingerprint(str(model))
    assert fingerprint(str(model)) == before
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert fingerprint(str(model)) != before


def test_bos_as_the_tokenizer_has_it(
    tokenizer: PreTrainedTokenizerBase, smollm2: Path, tmp_path: Path
) -> None:
    """A Llama's tokenizer starts a text with BOS; one token once, and none in continuations."""
    tokenizer.save_pretrained(tmp_path)
    bos, text = tokenizer.bos_token, (tmp_path / "tokenizer.json").read_text()
    template = [
        {"SpecialToken": {"id": bos, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    ids = {bos: {"id": bos, "ids": [tokenizer.bos_token_id], "tokens": [bos]}}
    processor = {"type": "TemplateProcessing", "single": template, "pair": template}
    changed = {**json.loads(text), "post_processor": {**processor, "special_tokens": ids}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    (tmp_path / "config.json").write_text((smollm2 / "config.json").read_text())

    lm = ServedLM(lambda: pytest.fail("a server"), str(tmp_path), seed=0)
    plain = tokenizer("Water is wet").input_ids
    assert lm.tok_encode("Water is wet") == [tokenizer.bos_token_id, *plain]
    assert lm.tok_encode(f"{bos}Water is wet") == [tokenizer.bos_token_id, *plain]
    assert lm.tok_encode(("Water is wet",), left_truncate_len=2) == [plain[-2:]]
    context, continuation = lm._encode_pair("Water is", " wet")
    assert (context, continuation) == ([tokenizer.bos_token_id, *plain[:-1]], plain[-1:])
    assert lm.tok_encode("Water is wet", add_special_tokens=False) == plain


def test_piqa_is_lm_evals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task of benchmarks/quality asks, word by word, what lm-eval's own `piqa` asks."""
    rows = [
        {"goal": "open a jar", "sol1": "Twist the lid. ", "sol2": "Sing to it."},
        {"goal": "How do I dry a shirt?", "sol1": "Bury it", "sol2": "hang it in the sun"},
    ]
    monkeypatch.delenv("PIQA_DIR", raising=False)
    with pytest.raises(UserError, match="PIQA_DIR must name a folder"):
        lm_eval_tasks.load_tasks([str(PIQA)])
    monkeypatch.setenv("PIQA_DIR", str(tmp_path))
    (tmp_path / "piqa-valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "piqa-valid-labels.lst").write_text("0\n1\n")
    ours = lm_eval_tasks.load_tasks([str(PIQA)])["tasks"]["piqa_local"]

    built_in = Path(lm_eval.__file__).parent / "tasks" / "piqa" / "piqa.yaml"
    manager = TaskManager(include_path=str(built_in.parent), include_defaults=False)
    config = dict(manager.task_index["piqa"].cfg or {})
    data = {**ours.dataset, "train": ours.dataset["validation"]}
    theirs = manager.load({**config, "custom_dataset": lambda **_: data})["tasks"]["piqa"]
    for one in (ours, theirs):
        one.build_all_requests()
    assert [one.args for one in ours.instances] == [one.args for one in theirs.instances]
    assert ours.instances[3].args == (
        "Question: How do I dry a shirt?\nAnswer:",
        " hang it in the sun",
    )
    answers = [(-1.0, False), (-3.0, False)]
    for row in ours.dataset["validation"]:
        assert ours.process_results(row, answers) == theirs.process_results(row, answers)
