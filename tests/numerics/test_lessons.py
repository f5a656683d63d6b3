"""What a student learns from: the order of the text, and what it writes itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import write_llama
from torch import Tensor

from vllm_depthpar import hf
from vllm_depthpar.plan import resolve
from vllm_depthpar.recover import lessons
from vllm_depthpar.recover.distillation import Distillation
from vllm_depthpar.recover.lessons import AT_ONCE, Lessons, WithRollouts

WINDOW = 32
MICRO_BATCH = 4


@pytest.fixture(scope="module", params=[{"pair": [2, 6]}, {"drop_sync": "all", "tp": 2}], ids=str)
def distillation(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Distillation:
    model = hf.load_unmodified(write_llama(tmp_path_factory.mktemp("llama"), layers=6))
    model.generation_config.eos_token_id = list(range(128))  # half of all tokens end a text
    return Distillation(model, resolve(request.param, 6))


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(256, (10, WINDOW), generator=torch.Generator().manual_seed(0))


def test_every_epoch_has_all_windows_in_another_order(windows: Tensor) -> None:
    found = torch.stack([Lessons(windows, 30, seed=7)[at]["input_ids"] for at in range(30)])
    epochs = found.split(10)
    for epoch in epochs:
        assert torch.equal(epoch.unique(dim=0), windows.unique(dim=0))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])
    again = Lessons(windows, 30, seed=7)
    assert torch.equal(again[25]["input_ids"], found[25])
    assert torch.equal(again[3]["input_ids"], found[3])
    assert not torch.equal(Lessons(windows, 30, seed=8)[3]["input_ids"], found[3])


def test_the_student_writes(distillation: Distillation) -> None:
    """What is drawn is as likely as the student's own entropy says, and not the teacher's; a
    window's beginning stays, and no end of a text ends it."""
    given = torch.randint(256, (64, WINDOW), generator=torch.Generator().manual_seed(1))
    distillation.train()
    state = torch.get_rng_state()
    written = lessons.write(distillation, given, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert distillation.training
    assert written.shape == given.shape
    assert torch.equal(written[:, :8], given[:, :8])
    assert not torch.equal(written[:, 8:], given[:, 8:])
    assert torch.equal(lessons.write(distillation, given, seed=3), written)
    assert not torch.equal(lessons.write(distillation, given, seed=4), written)
    with torch.no_grad():
        logs = distillation.student(written, use_cache=False).logits[:, 7:-1].log_softmax(-1)
    likely = logs.gather(-1, written[:, 8:, None]).squeeze(-1)
    surprise = likely - (logs.exp() * logs).sum(-1)
    assert abs(surprise.mean()) < 4 * surprise.std() / surprise.numel() ** 0.5
    # A sample of other logits would be seen: these are far from flat.
    assert (logs.exp() * logs).sum(-1).mean() > -0.95 * torch.tensor(256).log()


def test_some_of_each_micro_batch_are_written(
    distillation: Distillation, windows: Tensor, tmp_path: Path
) -> None:
    count = 8 * MICRO_BATCH

    def made(folder: Path, process: int = 0, processes: int = 1) -> WithRollouts:
        return WithRollouts(
            windows,
            count,
            seed=7,
            rollouts=3,
            micro_batch=MICRO_BATCH,
            distillation=distillation,
            folder=folder,
            process=process,
            processes=processes,
        )

    alone = made(tmp_path)
    found = [alone[at]["input_ids"] for at in range(count)]
    text = [Lessons(windows, count, seed=7)[at]["input_ids"] for at in range(count)]
    for at, (one, of_text) in enumerate(zip(found, text, strict=True)):
        assert torch.equal(one[: WINDOW // 4], of_text[: WINDOW // 4])
        assert torch.equal(one, of_text) == (at % MICRO_BATCH == 3)
    # Kept: another student would write other words, but goes on with what is there.
    kept = sorted(tmp_path.iterdir())
    assert [path.name for path in kept] == [f"written-0-{chunk}.safetensors" for chunk in range(3)]
    again = made(tmp_path)
    kept[1].unlink()
    assert torch.equal(again[24]["input_ids"], found[24])
    assert not kept[1].exists()
    assert torch.equal(again[13]["input_ids"], found[13])  # written anew, from the same seed
    assert kept[1].exists()
    assert 24 // MICRO_BATCH * 3 // AT_ONCE == 2
    # Two processes take micro-batches in turn, and each writes what it needs.
    two = [made(tmp_path / "two", process, 2) for process in range(2)]
    for at in range(count):
        one = two[at // MICRO_BATCH % 2][at]["input_ids"]
        assert torch.equal(one[: WINDOW // 4], text[at][: WINDOW // 4])
        assert torch.equal(one, text[at]) == (at % MICRO_BATCH == 3)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        f"written-{process}-{chunk}.safetensors" for process in range(2) for chunk in range(2)
    }
