"""A restructured model that learns from the unmodified one: a module whose forward is the loss.

The student's loss at every token is KL(teacher || student) of their next-token distributions. It
needs no label, so any text will do, and it says of the whole vocabulary what the student got wrong
where plain fine-tuning says one token of it; nothing the text does not show is unlearned.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vllm_depthpar import hf
from vllm_depthpar.hf import ParallelBlock, Stream
from vllm_depthpar.plan import Plan

Objective = Literal["distil", "next-token"]
Train = Literal["layers", "blocks", "norms", "lora", "all"]
# The tensors of these names, each with its name.
Read: TypeAlias = Callable[[Iterable[str]], Iterable[tuple[str, Tensor]]]

# What the product of an adapter's matrices is multiplied by.
SCALING = 2
# Rows of logits that exist at a time: with 128k tokens of vocabulary 0.5 MB a row.
_ROWS = 512


class Distillation(nn.Module):
    """A teacher and its student.

    All of the student's tensors are the teacher's until they are to change: `unfreeze` and `own`
    give it copies of those, in float32, the master weights. Blocks before the first changed
    one are run once for both.

    Attributes:
        changed: positions of the blocks that the plan changes.
        learning: those of the blocks that are fitted and, unless all tensors are, trained.
        what: the argument `train`, a name that modules have a method of.

    Args:
        model: as loaded, not restructured; it becomes the teacher and is not changed.
        plan: the student's.
        train: what may learn: every block from the first changed one on, which makes up for what
            an earlier one gets wrong ("layers"); of the changed blocks alone all ("blocks"), the
            norms, or low-rank adapters of the projections ("lora"); or every tensor ("all").
        objective: "next-token" is plain fine-tuning on the text, for comparison.
        bfloat16: compute in it, whatever the student's copies are in.
        read: reads what the student's copies begin as, by their names in the checkpoint: where
            `model` was loaded in fewer bits than the checkpoint's, they must not begin rounded.
            By default they begin as the teacher's.

    Raises:
        UserError: the plan is for another number of layers.
    """

    # transformers' Trainer asks for it when it loads what `state_dict` gave.
    _keys_to_ignore_on_save = None

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        train: Train = "layers",
        objective: Objective = "distil",
        bfloat16: bool = False,
        read: Read | None = None,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.what = train
        self.objective = objective
        self.bfloat16 = bfloat16
        self.changed = [at for at in range(plan.depth) if plan.is_changed(at)]
        self.teacher = model.eval().requires_grad_(False)
        shared = {id(parameter): parameter for parameter in model.parameters()}
        self.student = hf.restructure(copy.deepcopy(model, shared), plan)
        self._read = read or self._teachers
        # Up to here teacher and student are the same function.
        first = min(self.changed, default=plan.depth)
        self.first = 0 if train == "all" else first
        every = range(first, plan.depth)
        self.learning = list(every) if train in ("layers", "all") else self.changed

    def autocast(self) -> torch.autocast:
        """Make the context that every forward pass runs in."""
        return torch.autocast(self.teacher.device.type, torch.bfloat16, enabled=self.bfloat16)

    def unfreeze(self, rank: int = 16, seed: int = 0) -> None:
        """Let gradients change what may learn.

        Experts and their routers stay the teacher's.

        Args:
            rank: of the low-rank adapters.
            seed: of the adapters' first values.
        """
        if self.what == "lora":
            self._adapt(rank, seed)
            return
        chosen = self._by_name() if self.what == "all" else self._of_blocks(self.learning)
        chosen = [name for name in chosen if not hf.is_of_experts(name)]
        norms = self.what == "norms"
        for parameter in self.own(name for name in chosen if not norms or "norm" in name):
            parameter.requires_grad_(True)

    def own(self, names: Iterable[str]) -> list[nn.Parameter]:
        """Give the student float32 copies of tensors, by their names in the checkpoint; returns
        them. What are its own already it keeps."""
        wanted, shared, mine = list(names), self._shared(), self._by_name()
        copies = {}
        for name, tensor in self._read([name for name in wanted if id(mine[name]) in shared]):
            master = tensor.to(mine[name].device, torch.float32, copy=True)
            copies[id(mine[name])] = nn.Parameter(master, requires_grad=False)
        for module in self.student.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in copies:  # in all places where it is tied
                    setattr(module, name, copies[id(parameter)])
        mine = self._by_name()
        return [mine[name] for name in wanted]

    @torch.no_grad()
    def reset(self, names: Collection[str], tensor_of: Callable[[str], Tensor]) -> None:
        """Make the student the checkpoint again, but for tensors, by their names there, of which
        `tensor_of` gives one at a time."""
        own = self.own(names)
        kept = self.changes()
        for name, tensor in self._read([name for name in kept if name not in names]):
            kept[name].copy_(tensor)
        for name, one in zip(names, own, strict=True):
            one.copy_(tensor_of(name))

    def _of_blocks(self, positions: Iterable[int]) -> list[str]:
        layers = {layer for position in positions for layer in self.plan.blocks[position]}
        return [
            name
            for name in self._by_name()
            if name.startswith("model.layers.") and int(name.split(".")[2]) in layers
        ]

    def _by_name(self) -> dict[str, nn.Parameter]:
        """List the student's parameters by their names in the checkpoint."""
        found: dict[str, Any] = hf.checkpoint_names(dict(self.student.named_parameters()))
        return found

    def _shared(self) -> set[int]:
        return {id(parameter) for parameter in self.teacher.parameters()}

    def _teachers(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        theirs = dict(self.teacher.named_parameters())
        return ((name, theirs[name].detach()) for name in names)

    def _adapt(self, rank: int, seed: int) -> None:
        """Put adapters on all projections of the blocks that learn."""
        from peft import LoraConfig, inject_adapter_in_model

        names = [
            f"model.layers.{position}.{name}"
            for position in self.learning
            for name, module in self.blocks[position].named_modules()
            if isinstance(module, nn.Linear)
        ]
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=names)
        inject_adapter_in_model(config, self.student)
        for parameter in self.student.parameters():
            if parameter.requires_grad:  # peft makes them in the projections' dtype
                parameter.data = parameter.data.float()

    def adapter(self) -> dict[str, Tensor]:
        """List the adapters' matrices, by the names of projections in the checkpoint and ".lora_A"
        or ".lora_B"."""
        found: dict[str, Tensor] = {}
        for at, module in self.student.named_modules():
            if hasattr(module, "get_delta_weight"):  # peft's; it may not be installed
                for part in ("lora_A", "lora_B"):
                    found[f"{at}.{part}"] = getattr(module, part)["default"].weight.detach()
        return hf.checkpoint_names(found)

    def changes(self) -> dict[str, Tensor]:
        """List the student's tensors that are not the teacher's, by the checkpoint's names."""
        shared = self._shared()
        return {
            name: tensor for name, tensor in self._by_name().items() if id(tensor) not in shared
        }

    @property
    def blocks(self) -> list[ParallelBlock]:
        """The student's blocks."""
        return [cast(ParallelBlock, block) for block in hf.body(self.student).layers]

    @property
    def teacher_layers(self) -> list[GradientCheckpointingLayer]:
        """The teacher's layers."""
        return list(hf.body(self.teacher).layers)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Compute the loss on a batch of windows.

        Args:
            input_ids: (batch, tokens).

        Returns:
            "loss", which has gradients, the mean over all predictions; "kl" and "nll", means
            in nats per token, without gradients. Where the objective is "next-token" a training
            step does not run the teacher and has no "kl".
        """
        distil = self.objective == "distil"
        with self.autocast():
            kl, nll = self._losses(input_ids, taught=distil or not self.training)
        return {"loss": kl if distil else nll, "kl": kl.detach(), "nll": nll.detach()}

    def _losses(self, input_ids: Tensor, taught: bool) -> tuple[Tensor, Tensor]:
        """Compute KL (0 if not `taught`) and negative log-likelihood, means of all predictions."""
        with torch.no_grad():
            stream: Stream = hf.embed(self.teacher, input_ids)
            context = hf.context(self.teacher, cast(Tensor, stream))
            for block in self.blocks[: self.first]:
                stream = block(stream, **context)
            target = self._teach(stream, context) if taught else None
        if self.what == "all":
            stream = hf.embed(self.student, input_ids)
        for block in self.blocks[self.first :]:
            stream = block(stream, **context)
        hidden = hf.last_hidden(self.student, cast(Tensor, stream))[:, :-1].flatten(0, 1)
        labels = input_ids[:, 1:].flatten()
        losses: tuple[Tensor, Tensor] = _HeadLoss.apply(
            hidden,
            self.student.lm_head.weight,
            None if target is None else target[:, :-1].flatten(0, 1),
            self.teacher.lm_head.weight,
            labels,
            self.objective == "distil",
            hf.cap_of(self.teacher),
        )
        return losses

    def _teach(self, stream: Stream, context: dict[str, Any]) -> Tensor:
        """Compute the teacher's normalized last hidden states, (batch, tokens, hidden), from what
        the shared blocks made of the stream: each of them is the layer of its own number."""
        x = stream[0] if isinstance(stream, tuple) else stream
        for layer in self.teacher_layers[self.first :]:
            x = layer(x, **hf.of_kind(layer, context))
        return hf.last_hidden(self.teacher, cast(Tensor, x))

    def train(self, mode: bool = True) -> Distillation:
        """Switch training on or off as every module does, but the teacher never trains."""
        super().train(mode)
        self.teacher.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """List what is trained, all else is the checkpoint's: what transformers' Trainer saves."""
        return {
            name: parameter.detach()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }


class _HeadLoss(torch.autograd.Function):
    """KL(teacher || student) and the text's negative log-likelihood, from last hidden states.

    The logits are never there all at once: their gradient is known as soon as they are (softmax
    minus target), so that forward makes the gradients, a few rows at a time, and backward only
    hands them out. As Liger Kernel does for cross-entropy (arXiv 2410.10989, section 3.2).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor | None,
        target_weight: Tensor,
        labels: Tensor,
        distil: bool,
        cap: float | None,
    ) -> tuple[Tensor, Tensor]:
        """Compute means over the rows; the first has gradients if `distil`, else the second.

        hidden, target: (rows, hidden); weights: (vocabulary, hidden); labels: (rows,); cap: see
        `hf.capped`.
        """
        rows = len(hidden)
        total = torch.zeros(2, device=hidden.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight) if needs_weight else None
        for begin in range(0, rows, _ROWS):
            part = slice(begin, begin + _ROWS)
            logits = hf.capped(functional.linear(hidden[part], weight).float(), cap)
            logs = logits.log_softmax(-1)
            chosen = labels[part, None]
            total[1] -= logs.gather(1, chosen).sum()
            wanted = None
            if target is not None:
                taught = functional.linear(target[part], target_weight).float()
                wanted_logs = hf.capped(taught, cap).log_softmax(-1)
                wanted = wanted_logs.exp()
                total[0] += (wanted * wanted_logs.sub_(logs)).sum()
            if not needs_hidden and not needs_weight:
                continue
            grad = logs.exp_()
            if distil and wanted is not None:
                grad -= wanted
            else:
                grad.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=grad.dtype))
            if cap is not None:  # the slope of tanh
                grad *= 1 - (logits / cap) ** 2
            grad = grad.div_(rows).to(hidden.dtype)
            if hidden_grad is not None:
                hidden_grad[part] = grad @ weight.to(grad.dtype)
            if weight_grad is not None:
                weight_grad += grad.T @ hidden[part]
        ctx.distil = distil
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total[0] / rows, total[1] / rows

    @staticmethod
    def backward(ctx: Any, *outward: Tensor) -> tuple[Tensor | None, ...]:
        """Hand out gradients of the objective's mean."""
        scale = outward[0 if ctx.distil else 1]
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * scale,
            None if weight_grad is None else weight_grad * scale,
            *5 * (None,),
        )
