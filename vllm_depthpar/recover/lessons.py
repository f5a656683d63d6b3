"""What a student learns from, step by step: windows of text, and windows that it writes itself.

Under teacher forcing a student sees only text of others. When it is served it goes on from what it
wrote itself, and what it does there no text shows. So some windows of every step are its own: it is
given the beginning of a window of text and writes the rest, and the teacher says of every token of
that what it would have said (on-policy distillation: GKD, arXiv 2306.13649, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GenerationConfig

from vllm_depthpar.recover.distillation import Distillation
from vllm_depthpar.util import files

# Windows that are written at a time: what they are written by is older by as many.
AT_ONCE = 8
# Of a window of the student's own so much is given.
_GIVEN = 1 / 4


class Lessons(Dataset[dict[str, Tensor]]):
    """The windows of all steps of a run, in their order.

    Each epoch goes through the text in another order. Of every micro-batch the first windows are
    the student's own; they are written when the first of them is asked for, by the student as it is
    then, and kept, so that a run that goes on after a kill learns from the same.

    Args:
        windows: of text, (windows, tokens).
        count: of all steps' windows, over all processes.
        seed: of the order, and of what is written.
    """

    def __init__(self, windows: Tensor, count: int, seed: int) -> None:
        self._windows = windows
        self._count = count
        self._seed = seed
        self._orders: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"input_ids": self.text(at)}

    def text(self, at: int) -> Tensor:
        """Find the window of text in a place, (tokens,)."""
        epoch, place = divmod(at, len(self._windows))
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._orders = {epoch: torch.randperm(len(self._windows), generator=generator)}
        return self._windows[self._orders[epoch][place]]


class WithRollouts(Lessons):
    """Lessons of which some are the student's own writing.

    Args:
        rollouts: so many of each micro-batch.
        micro_batch: windows that run together on a process.
        distillation: the student's.
        folder: where what is written is kept.
        process, processes: the number of this process, and how many there are: micro-batches go
            round them, and each writes its own.
    """

    def __init__(
        self,
        windows: Tensor,
        count: int,
        seed: int,
        *,
        rollouts: int,
        micro_batch: int,
        distillation: Distillation,
        folder: Path,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        super().__init__(windows, count, seed)
        self._rollouts = rollouts
        self._micro_batch = micro_batch
        self._distillation = distillation
        self._folder = folder
        self._process = process
        self._processes = processes
        self._written: tuple[int, Tensor] | None = None

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        of_batch, place = divmod(at, self._micro_batch)
        if place >= self._rollouts:
            return super().__getitem__(at)
        number = of_batch // self._processes * self._rollouts + place
        chunk, place = divmod(number, AT_ONCE)
        if self._written is None or self._written[0] != chunk:
            self._written = chunk, self._read(chunk)
        return {"input_ids": self._written[1][place]}

    def _read(self, chunk: int) -> Tensor:
        path = self._folder / f"written-{self._process}-{chunk}.safetensors"
        if not path.exists():
            given = torch.stack([self.text(at) for at in self._places(chunk)])
            written = write(self._distillation, given, self._seed + chunk)
            files.write_bytes(path, save({"windows": written}))
        return load_file(path)["windows"]

    def _places(self, chunk: int) -> Iterator[int]:
        """Find where the windows of a chunk stand among all."""
        for number in range(chunk * AT_ONCE, (chunk + 1) * AT_ONCE):
            of_process, place = divmod(number, self._rollouts)
            at = (of_process * self._processes + self._process) * self._micro_batch + place
            if at < self._count:
                yield at


@torch.no_grad()
def write(distillation: Distillation, given: Tensor, seed: int) -> Tensor:
    """Let the student go on from the beginnings of windows, drawing from its own distribution, past
    ends of texts as the windows of text go.

    Args:
        given: (windows, tokens), of which the first quarter is kept.

    Returns:
        Windows of the same size, on the CPU.
    """
    device, size = distillation.teacher.device, given.shape[1]
    prompt = given[:, : max(1, round(_GIVEN * size))].to(device)
    student: Any = distillation.student
    # In place of its own, which would fill in what is left out here: where texts end.
    student.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=size, pad_token_id=0
    )
    training = distillation.training
    distillation.eval()
    with distillation.autocast(), torch.random.fork_rng():
        torch.manual_seed(seed)
        found: Tensor = student.generate(prompt, attention_mask=torch.ones_like(prompt))
    distillation.train(training)
    return found.cpu()
