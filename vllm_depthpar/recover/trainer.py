"""Win back quality that a plan has cost: by least squares (`least_squares`), then by distillation.

The loop is transformers' Trainer, on one process or as many as `accelerate launch` starts; bfloat16
computes on float32 master weights. Everything a run needs to go on after a kill lies in one folder.
"""

from __future__ import annotations

import json
import math
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save
from torch import Tensor
from transformers import ProgressCallback, Trainer, TrainingArguments

from vllm_depthpar.checkpoint.tensors import opened
from vllm_depthpar.errors import UserError
from vllm_depthpar.evaluate.texts import Windows
from vllm_depthpar.recover.distillation import Distillation, Objective, Train
from vllm_depthpar.recover.least_squares import refit
from vllm_depthpar.recover.lessons import AT_ONCE, Lessons, WithRollouts
from vllm_depthpar.util import files
from vllm_depthpar.util.progress import bar

_MEASURED_BATCH = 2
# A run of given minutes leaves this much of them to saving and to steps slower than the first.
_MARGIN = 0.95


@dataclass(frozen=True)
class TrainingSettings:
    """What a run depends on beside model, plan and texts; the run of a folder keeps them.

    Attributes:
        train: see `Distillation`, which has it.
        refit: how many tokens to refit on, 0 for no refit.
        objective: see `Distillation`.
        batch: windows of a step, over all processes.
        micro_batch: windows that run together on a process.
        rollouts: windows of each micro-batch that the student writes itself, see `lessons`.
        rate: peak of the learning rate: linear warm-up, cosine decay.
        rank: of the adapters.
        checkpointing: recompute activations in the backward pass instead of keeping them.
        seed: of the order of the windows and of adapters.
        evaluations: how often to measure while training.
    """

    train: Train = "layers"
    refit: int = 32768
    objective: Objective = "distil"
    batch: int = 4
    micro_batch: int = 4
    rollouts: int = 0
    rate: float = 2e-4
    rank: int = 16
    checkpointing: bool = False
    seed: int = 0
    evaluations: int = 10


def this_process() -> PartialState:
    """Find this process among those that `accelerate launch` or torchrun started."""
    # Without being told, processes without GPUs would not know of each other.
    return PartialState(cpu=not torch.cuda.is_available())


class Recovery:
    """A run, in its folder.

    Args:
        distillation: teacher and student, on the device that this process trains on.
        settings: of the run.
        training: windows to learn from.
        held_out: windows to measure on, by their texts' names.
        folder: where what a later call needs to go on is kept. Another run's is refused.
        identity: what else the run depends on, JSON-ready: checkpoint, texts.

    Raises:
        UserError: the folder holds another run.
    """

    def __init__(
        self,
        distillation: Distillation,
        settings: TrainingSettings,
        training: Tensor,
        held_out: Sequence[Windows],
        folder: Path,
        identity: object = None,
    ) -> None:
        self._distillation = distillation
        self._settings = settings
        self._training = training
        self._held_out = held_out
        self._folder = folder
        self._process = this_process()
        # Of a step's batch, one after the other on each process.
        self._parts = settings.batch // (settings.micro_batch * self._process.num_processes)
        wanted = {
            "settings": asdict(settings),
            "plan": distillation.plan.to_spec(),
            "identity": identity,
        }
        if self._once("run.json", lambda: wanted) != json.loads(json.dumps(wanted)):
            raise UserError(
                f"{folder} holds a run of other settings, plan or texts; allowed: the same command "
                f"again to go on with it, another --out, or remove the folder"
            )
        self.curve: list[dict[str, Any]] = []

    def _once(self, name: str, make: Callable[[], object]) -> Any:
        """Read a file of the folder; if there is none, write what `make` gives on the main process.

        Every process gets it as JSON.
        """
        path = self._folder / name
        if self._process.is_main_process and not path.exists():
            files.write_json(path, make())
        self._process.wait_for_everyone()
        return files.read_json(path, _allowed(self._folder))

    @contextmanager
    def _going_on(self, path: Path) -> Iterator[None]:
        """Say in one line that what an earlier call left is damaged."""
        try:
            yield
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            allowed = _allowed(self._folder)
            raise UserError(f"{path} is damaged ({why}); allowed: {allowed}") from None

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Say in one line that training can't be kept."""
        try:
            with files.writing(self._folder):
                yield
        except RuntimeError as error:
            # torch's words for a file that it could not read or write to its end.
            if "PytorchStreamReader" in str(error):
                why = f"has a checkpoint that is damaged inside; allowed: {_allowed(self._folder)}"
            elif "inline_container" in str(error):
                why = f"can't be written (a file is cut off); allowed: {files.WRITABLE}"
            else:
                raise
            raise UserError(f"{self._folder} {why}") from None

    def measure(self) -> dict[str, dict[str, float]]:
        """Measure the student's perplexity on every held-out text, and its KL from the teacher."""
        return {windows.name: quality(self._distillation, windows) for windows in self._held_out}

    def refit(self) -> dict[int, float]:
        """Run `refit`, or read what a call before this one made of it; returns the ridges."""
        path = self._folder / "refit.safetensors"

        def fit() -> dict[int, float]:
            count = max(8, self._settings.refit // self._training.shape[1])
            # Spread over the texts, which come one after the other.
            chosen = self._training[:: max(1, len(self._training) // count)][:count]
            with bar("Refit") as advance:
                found = refit(self._distillation, chosen, on_progress=advance)
            fitted = self._distillation.changes()
            files.write_bytes(path, save({name: one.detach() for name, one in fitted.items()}))
            return found

        known = self._once("refit.json", fit)
        with self._going_on(path):
            ridges = {int(at): float(ridge) for at, ridge in known.items()}
            with opened(path, allowed=_allowed(self._folder)) as file:
                self._distillation.reset(list(file.keys()), file.get_tensor)
        return ridges

    def undo_training(self, worse: bool) -> bool:
        """Make the student again what `refit` made of it, if that is better; returns whether.

        Args:
            worse: whether training was for the worse; the main process's word counts.
        """
        undone = bool(self._once("undone.json", lambda: worse))
        if undone:
            self.refit()
        return undone

    def train(self, tokens: int | None, until: float | None) -> dict[str, Any]:
        """Train the student.

        Args:
            tokens: how many to learn from; more than there are repeats them. None: all once.
            until: stop about then, `time.time()`, rather than after `tokens`.

        Returns:
            What was done: steps, tokens, seconds.
        """
        settings, of_step = self._settings, self._tokens_of_a_step
        # The first call decides for the later ones.
        steps = self._once("steps.json", lambda: self._steps(tokens, until))
        with self._going_on(self._folder / "steps.json"):
            if not isinstance(steps, int) or steps < 0:
                raise ValueError("no number of steps")
        if steps == 0:
            return {"steps": 0, "tokens": 0, "seconds": 0.0}
        self._prepare()
        every = max(1, round(steps / settings.evaluations)) if settings.evaluations else steps
        trainer = _Trainer(
            recovery=self,
            model=self._distillation,
            args=TrainingArguments(
                output_dir=str(self._folder),
                max_steps=steps,
                per_device_train_batch_size=settings.micro_batch,
                gradient_accumulation_steps=self._parts,
                learning_rate=settings.rate,
                lr_scheduler_type="cosine",
                warmup_steps=max(1, steps // 20),
                optim="adamw_torch_fused",
                adam_beta2=0.95,
                weight_decay=0.0,
                max_grad_norm=1.0,
                seed=settings.seed,
                train_sampling_strategy="sequential",
                # Distillation casts by itself.
                use_cpu=self._process.device.type == "cpu",
                eval_strategy="steps",
                eval_steps=every,
                save_strategy="steps",
                save_steps=every,
                save_total_limit=1,
                logging_steps=every,
                report_to="none",
                log_level="error",
                label_names=[],
            ),
            train_dataset=self._lessons(steps),
            eval_dataset=[],
        )
        trainer.remove_callback(ProgressCallback)
        progress = _Progress(of_step)
        trainer.add_callback(progress)
        started = time.monotonic()
        with closing(progress), self._saving():
            trainer.train(resume_from_checkpoint=_last_complete(self._folder))
        self.curve = [
            entry["quality"] | {"step": entry["step"], "tokens": entry["step"] * of_step}
            for entry in trainer.state.log_history
            if "quality" in entry
        ]
        return {
            "steps": steps,
            "tokens": steps * of_step,
            "seconds": time.monotonic() - started,
        }

    def _lessons(self, steps: int) -> Lessons:
        settings, process = self._settings, self._process
        lessons = (self._training, steps * settings.batch, settings.seed)
        if not settings.rollouts:
            return Lessons(*lessons)
        return WithRollouts(
            *lessons,
            rollouts=settings.rollouts,
            micro_batch=settings.micro_batch,
            distillation=self._distillation,
            folder=self._folder,
            process=process.process_index,
            processes=process.num_processes,
        )

    def _prepare(self) -> None:
        """Make the student one that learns; harmless the second time."""
        if any(parameter.requires_grad for parameter in self._distillation.parameters()):
            return
        settings = self._settings
        self._distillation.unfreeze(settings.rank, settings.seed)
        if settings.checkpointing:
            self._distillation.student.gradient_checkpointing_enable()

    @property
    def _tokens_of_a_step(self) -> int:
        return self._settings.batch * self._training.shape[1]

    def _steps(self, tokens: int | None, until: float | None) -> int:
        """Count the steps to take."""
        if until is None:
            wanted = self._training.numel() if tokens is None else tokens
            return math.ceil(wanted / self._tokens_of_a_step)
        per_step = self._seconds_of_a_step()
        begun = time.time()
        self.measure()
        measuring = (time.time() - begun) * (self._settings.evaluations + 1)
        left = until - time.time() - measuring
        return max(0, math.floor(_MARGIN * left / per_step))

    def _seconds_of_a_step(self) -> float:
        """Time a step: the faster of two that change nothing, and its share of what is written."""
        self._prepare()
        settings, device = self._settings, self._process.device
        part = self._training[: settings.micro_batch].to(device)
        seconds = []
        for _ in range(2):
            begun = time.monotonic()
            loss = self._distillation(part)["loss"]
            loss.backward()
            loss.item()
            seconds.append(time.monotonic() - begun)
            self._distillation.zero_grad()
        begun = time.monotonic()
        self._lessons(AT_ONCE)[0]
        writing = (time.monotonic() - begun) / AT_ONCE * settings.rollouts
        return (min(seconds) + writing) * self._parts


@torch.no_grad()
def quality(distillation: Distillation, windows: Windows) -> dict[str, float]:
    """Measure perplexity and mean KL divergence (nats per token) of the student on a text.

    All tokens of a window but its first are counted.
    """
    device = distillation.teacher.device
    training = distillation.training
    distillation.eval()
    kl = nll = 0.0
    for part in windows.tokens.split(_MEASURED_BATCH):
        losses = distillation(part.to(device))
        share = len(part) / len(windows)
        kl, nll = kl + share * float(losses["kl"]), nll + share * float(losses["nll"])
    distillation.train(training)
    return {"perplexity": math.exp(min(nll, 700)), "kl": kl}


def _allowed(folder: Path) -> str:
    return f"what the same command wrote there, or to remove {folder} and begin anew"


def _last_complete(folder: Path) -> str | None:
    """Find the newest checkpoint written to its end: its state is what Trainer writes last."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdecimal()]
    for checkpoint in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if _is_whole(checkpoint):
            return str(checkpoint)
    return None


def _is_whole(checkpoint: Path) -> bool:
    """Whether no file of a checkpoint is missing or cut off."""
    weights = list(checkpoint.glob("*.safetensors"))
    try:
        state = files.read_json(checkpoint / "trainer_state.json", "Trainer's state")
        for path in weights:
            with opened(path):
                pass
    except UserError:
        return False
    whole = all(zipfile.is_zipfile(path) for path in checkpoint.glob("*.pt*"))
    return whole and bool(weights) and isinstance(state, dict)


class _Trainer(Trainer):
    """Measures the held-out texts where Trainer would compute a loss."""

    def __init__(self, recovery: Recovery, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._recovery = recovery

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the student, and log and show what was found."""
        found = self._recovery.measure()
        self.log({"quality": found})
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, {"quality": found}
        )
        return {}


class _Progress(ProgressCallback):
    """A bar of steps, and a line for each measurement."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens

    def close(self) -> None:
        """End the bar, wherever training has ended: what is printed next stands below it."""
        if self.training_bar is not None:
            self.training_bar.close()

    def on_log(self, *_: Any, **__: Any) -> None:
        """Show nothing: `on_evaluate` shows more."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show what was measured."""
        if state.is_world_process_zero and self.training_bar is not None:
            found = kwargs["metrics"]["quality"]
            shown = "   ".join(
                f"{name}: perplexity {value['perplexity']:.2f}, KL {value['kl']:.3f}"
                for name, value in found.items()
            )
            line = f"{state.global_step * self._tokens} tokens   {shown}"
            self.training_bar.write(line, file=sys.stderr)
