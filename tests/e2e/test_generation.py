"""`depthpar eval --generate`: what plans write through a real `vllm serve`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_serve import quick_servers
from models import write_llama, write_tokenizer

from vllm_depthpar import hf
from vllm_depthpar.checkpoint.tokenizer import read_tokenizer
from vllm_depthpar.cli.main import main
from vllm_depthpar.evaluate.completions import Answer, Completions
from vllm_depthpar.evaluate.generated_tasks import TASKS
from vllm_depthpar.evaluate.generation import GenerationSettings, Work, make_work, split
from vllm_depthpar.launch.variants import Variant, variants

PLAN = '{"pair": [8, 28]}'
SERVER_ARGS = "--dtype float32 --enforce-eager"
SETTINGS = GenerationSettings((6, 12), 1, 1, 7, tuple(SERVER_ARGS.split()))


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for answers and logs; and servers that start quickly."""
    folder = tmp_path_factory.mktemp("generate")
    with quick_servers(folder):
        yield folder


@pytest.fixture(scope="module")
def command(smollm2: Path, place: Path) -> list[str]:
    more = ["--prompts", "1", "--questions", "1", "--seed", "7", f"--server-args={SERVER_ARGS}"]
    # vLLM's own model is not named: what others write is told by it all the same.
    plans = ["--plan", PLAN, "--out", str(place / "out.json")]
    return ["eval", str(smollm2), *plans, *more, "--generate", "12", "6"]


@pytest.fixture(scope="module")
def report(command: list[str], place: Path) -> dict[str, Any]:
    assert main(command) == 0
    found: dict[str, Any] = json.loads((place / "out.json").read_text())["generate"]
    return found


@dataclass(frozen=True)
class Kept:
    """What a run has left: what was asked, and the answers by the plan's label."""

    work: Work
    greedy: dict[str, list[Answer]]
    sampled: dict[str, list[Answer]]
    asked: dict[str, list[Answer]]


@pytest.fixture(scope="module")
def kept(report: dict[str, Any], smollm2: Path, place: Path) -> Kept:
    work = make_work(read_tokenizer(str(smollm2)), SETTINGS)
    greedy, sampled, asked = {}, {}, {}
    for one in variants(str(smollm2), ["plain", PLAN]):
        with contextlib.ExitStack() as stack:
            answers = completions(stack, smollm2, one, work, place)
            greedy[one.label] = answers.write(work.greedy, "known")
            sampled[one.label] = answers.write(work.sampled, "known")
            asked[one.label] = answers.write(work.asked, "known")
            assert answers.asked == 0
    return Kept(work, greedy, sampled, asked)


def completions(
    stack: contextlib.ExitStack, model: Path, one: Variant, work: Work, place: Path
) -> Completions:
    folder = place / "cache" / "eval"
    return Completions(stack, str(model), one, SETTINGS.server_args, 7, work.longest, folder)


def scores(model: Any, prompt: list[int], answer: Answer) -> torch.Tensor:
    """Log-probability of each token of an answer, by one forward pass."""
    with torch.inference_mode():
        tokens = torch.tensor([[*prompt, *answer.tokens]])
        logprobs = model(tokens).logits[0, :-1].log_softmax(-1)
    chosen = logprobs.gather(1, tokens[0, 1:, None])[:, 0]
    return chosen[len(prompt) - 1 :]


def test_figures_are_the_models(report: dict[str, Any], kept: Kept, smollm2: Path) -> None:
    """Answers, their log-probabilities and the divergence, beside the same plans on transformers,
    by kind of prompt; of the shorter length, too."""
    unmodified = hf.load(smollm2, "identity")
    references = {"plain": unmodified, PLAN: hf.load(smollm2, json.loads(PLAN))}
    assert kept.work.kinds == ["prose", "answers"]
    assert [row["label"] for row in report["plans"]] == ["plain", PLAN]
    for row in report["plans"]:
        own = references[row["label"]]
        for at, kind in enumerate(kept.work.kinds):
            prompt = kept.work.greedy[at]["prompt"]
            greedy, sampled = (of[row["label"]][at] for of in (kept.greedy, kept.sampled))
            with torch.inference_mode():
                logits = own(torch.tensor([[*prompt, *greedy.tokens]])).logits[0]
            assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == list(greedy.tokens)
            by_unmodified = {
                "greedy": scores(unmodified, prompt, greedy),
                "sampled": scores(unmodified, prompt, sampled),
            }
            gains = scores(own, prompt, sampled) - by_unmodified["sampled"]
            about = row["writing"][kind]
            assert about["answers"] == 1
            for length in (6, 12):
                found = about["lengths"][str(length)]
                for way, expected in by_unmodified.items():
                    mean = float(expected[:length].mean())
                    assert found[way]["log_probability"]["value"] == pytest.approx(mean, abs=1e-3)
                    assert found[way]["median_tokens"] == len(expected[:length])
                mean = float(gains[:length].mean())
                assert found["sampled"]["kl"]["value"] == pytest.approx(mean, abs=2e-3)
            (piece,) = about["by_position"]
            assert piece["kl"] == about["lengths"]["12"]["sampled"]["kl"]


def test_a_plan_is_another_model(report: dict[str, Any], kept: Kept) -> None:
    plain, plan = report["plans"]
    assert (plain["digest"], plan["plan"]) == ("plain", "30 layers as 20 blocks (10 of 2)")
    assert kept.greedy["plain"] != kept.greedy[PLAN]
    for kind in ("prose", "answers"):
        (ours, theirs) = (row["writing"][kind]["lengths"]["12"] for row in (plan, plain))
        assert "same" not in theirs["greedy"]
        assert ours["greedy"]["median_tokens_alike"] < 12
        assert ours["greedy"]["same"] == 0
        assert abs(theirs["sampled"]["kl"]["value"]) < 1e-3
        assert ours["sampled"]["kl"]["value"] > 0.05


def test_tasks_are_reported(report: dict[str, Any], kept: Kept) -> None:
    """Each question's answer, judged again here."""
    for row in report["plans"]:
        answers = zip(kept.work.questions, kept.asked[row["label"]], strict=True)
        assert list(row["tasks"]) == list(TASKS)
        for question, answer in answers:
            found = row["tasks"][question.task]
            right = answer.ended and question.accepts(answer.text)
            assert (found["questions"], found["value"]) == (1, right)
    # A pass key among other lines is what this model finds, and with twenty layers in pairs not.
    assert [row["tasks"]["retrieval"]["value"] for row in report["plans"]] == [1, 0]


def test_nothing_is_asked_twice(
    report: dict[str, Any],
    command: list[str],
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No server where all is known; the same figures. An answer that got lost is asked again."""
    plain, plan = report["plans"]
    asked = 2 * 2 + 6
    assert plan["requests_asked"] == asked
    assert plain["requests_asked"] == asked + 2 * 2 * 2
    servers = sorted(place.glob("vllm-serve-*"))
    assert len(servers) == 2
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("| kind | up to | plan | log-prob., drawn | KL, drawn |")
    assert f"| prose | 12 | {PLAN} |" in printed
    assert "| right answers | arithmetic | copying |" in printed
    again = json.loads((place / "out.json").read_text())["generate"]
    assert sorted(place.glob("vllm-serve-*")) == servers
    for row, before in zip(again["plans"], report["plans"], strict=True):
        assert row["requests_asked"] == 0
        assert (row["writing"], row["tasks"]) == (before["writing"], before["tasks"])

    (journal,) = [
        path
        for path in (place / "cache" / "eval").glob("*.jsonl")
        if len([line for line in path.read_text().splitlines() if line]) == asked
    ]
    kept = [line for line in journal.read_text().splitlines() if line]
    journal.write_text("\n".join(kept[:-1]) + "\n" + kept[-1][:20])
    assert main(command) == 0
    again = json.loads((place / "out.json").read_text())["generate"]
    assert [row["requests_asked"] for row in again["plans"]] == [0, 1]
    assert len(sorted(place.glob("vllm-serve-*"))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--generate", "8192"], "tokens, prompt and answer, don't fit a context of 8192"),
        (
            ["--generate", "--server-args=--max-model-len=300"],
            "tokens, prompt and answer, don't fit a context of 300; allowed: shorter answers",
        ),
        (["--generate", "--plan", '{"pair": [1, 4]}'], "plan key 'pair': [1, 4]"),
        (["--generate", "--server-args=--port=1"], "server flag '--port' can't"),
        (["--answers", "--made-from", "M"], "--made-from M says who scores what plans write; allo"),
    ],
)
def test_wrong_input(
    arguments: list[str],
    message: str,
    smollm2: Path,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, and no server."""
    servers = sorted(place.glob("vllm-serve-*"))
    assert main(["eval", str(smollm2), *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("depthpar: error: ")
    assert message in line
    assert sorted(place.glob("vllm-serve-*")) == servers


def test_other_weights_are_told_by_the_model_they_were_made_from(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint that carries a plan writes as that plan does, and the other scores it."""
    model = write_tokenizer(write_llama(tmp_path / "model", layers=4), bos=True)
    made, out = tmp_path / "made", tmp_path / "out.json"
    plan = '{"pair": [0, 4]}'
    assert main(["export", str(model), "--plan", plan, "--out", str(made)]) == 0
    command = ["eval", str(made), "--made-from", str(model), "--generate", "8", "--prompts", "1"]
    command += [f"--server-args={SERVER_ARGS}", "--out", str(out)]
    assert main([*command, "--plan", "carried"]) == 0
    found = json.loads(out.read_text())["generate"]
    assert (found["model"], found["unmodified"]) == ("made", "model")
    unmodified, carried = found["plans"]
    assert (unmodified["label"], unmodified["digest"]) == ("unmodified", "plain")
    assert "same" in carried["writing"]["prose"]["lengths"]["8"]["greedy"]

    assert main(["eval", str(model), "--plan", plan, *command[4:], "--generate", "8"]) == 0
    _, alone = json.loads(out.read_text())["generate"]["plans"]
    assert carried["writing"] == alone["writing"], "the same weights in the same plan"

    other = write_tokenizer(write_llama(tmp_path / "other", layers=4), bos=False)
    command[3] = str(other)
    capsys.readouterr()
    assert main(command) == 1
    assert "has other tokens, or another chat template, than" in capsys.readouterr().err


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    """It goes on from openings, and is asked no questions."""
    folder = write_tokenizer(write_llama(tmp_path, layers=2), bos=True)
    work = make_work(read_tokenizer(str(folder)), SETTINGS)
    assert (work.kinds, work.questions) == (["prose"], [])
    assert all(request["prompt"][0] == 256 for request in work.greedy)


def test_the_unmodified_model_of_a_ladder_checkpoint(tmp_path: Path) -> None:
    """vLLM itself can't serve one: it is the ladder."""
    model = str(write_llama(tmp_path, layers=4, ladder_layers=2))
    auto, identity = variants(model, ["auto", "identity"])
    assert split(model, [identity]) == (auto, [identity])
    ladder, other = variants(model, ['{"ladder": 2}', "identity"])
    assert split(model, [other, ladder]) == (ladder, [other])
