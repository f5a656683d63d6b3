"""How much quality a plan costs: perplexity, and KL divergence from the unmodified model.

Many plans are measured in one pass over the text. Plans that start with the same blocks share them:
sorted by their blocks they form a trie, which is walked depth first with one residual stream kept
for each level, so that a block is run once for all plans that reach it by the same blocks. A change
of layer k costs the layers after k only, and memory does not grow with the number of plans.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vllm_depthpar import __version__, hf
from vllm_depthpar.errors import UserError
from vllm_depthpar.evaluate.rows import Block, Row, row_of
from vllm_depthpar.evaluate.texts import Windows
from vllm_depthpar.hf import ParallelBlock
from vllm_depthpar.plan import Plan, resolve
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.plan import Half
from vllm_depthpar.util.result_cache import Journal

_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Quality:
    """What a plan does to a text, in sums over the counted predictions of each window.

    Attributes:
        counted: predictions of a window that count.
        nll: negative log-likelihood of the text in nats, per window.
        kl: KL(unmodified || plan) of the next-token distributions in nats, per window.
    """

    counted: int
    nll: list[float]
    kl: list[float]

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats per token."""
        return sum(self.nll) / (len(self.nll) * self.counted)

    @property
    def perplexity(self) -> float:
        """exp of `loss`; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def divergence(self) -> float:
        """Mean KL divergence, nats per token."""
        return sum(self.kl) / (len(self.kl) * self.counted)

    @property
    def divergence_error(self) -> float:
        """Standard error of `divergence`, windows taken as independent; 0 for a single one."""
        if len(self.kl) < 2:
            return 0.0
        return statistics.stdev(self.kl) / self.counted / math.sqrt(len(self.kl))


class Evaluator:
    """Runs plans on one unmodified model, which it leaves as it is.

    Args:
        model: as loaded, not restructured; any device and dtype. Losses are computed in fp32.
        unmodified: the plan that the others are compared with (default: every layer alone); of a
            checkpoint that was trained as a ladder, its ladder.
        origin: what identifies the model's weights, JSON-ready; with it, what is measured is kept
            on disk (`result_cache`) and not measured again.
        batch: windows that run together.
        absent: halves of layers whose weights are not the checkpoint's: no plan may run them.
        ranks: the tensor-parallel size whose models plans are to be: it matters to
            `drop_sync` and `desync` alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        unmodified: Plan | None = None,
        origin: object = None,
        batch: int = 2,
        absent: Collection[Half] = (),
        ranks: int = 1,
    ) -> None:
        self.ranks = ranks
        self._model = model.eval()
        shape = ModelShape.from_config(hf.body(model).config.to_dict())
        self._norms, self._whole = shape.family.norms, shape.always_whole
        self._layers: list[GradientCheckpointingLayer] = list(hf.body(model).layers)
        self.unmodified = unmodified or resolve("identity", len(self._layers))
        self._origin = origin
        self._batch = batch
        self._absent = frozenset(absent)
        self._journals: dict[str, Journal | _Notes] = {}

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self._model.dtype

    def measure(
        self,
        plans: Sequence[Plan | Row],
        windows: Windows,
        on_progress: Callable[[float], None] = lambda _: None,
    ) -> list[Quality]:
        """Measure the quality of each plan on a text.

        Args:
            plans: plans for this model, or rows of blocks that no plan can say.
            windows: the text.
            on_progress: called with the share of the work done since the last call; they sum to 1.

        Raises:
            UserError: a plan runs a layer that the checkpoint lacks.
        """
        rows = [row_of(plan) if isinstance(plan, Plan) else plan for plan in plans]
        run = {half for one in rows for block in one for half in block.runs}
        if lost := sorted(run & self._absent):
            raise UserError(
                f"weights of layer {lost[0][0]} are not in the checkpoint; allowed: plans of its "
                f"other layers"
            )
        journal = self._journal(windows)
        batches = windows.tokens.split(self._batch)
        # Neighbours in this order start alike. In parts, so that little is lost if this run ends.
        order = sorted(set(rows))
        parts = [order[at : at + _ROWS_AT_ONCE] for at in range(0, len(order), _ROWS_AT_ONCE)]
        for number, batch in enumerate(batches):
            for part in parts:
                missing = [row for row in part if self._key(number, row) not in journal]
                if missing:
                    found = self._measure_batch(missing, batch, windows.counted)
                    journal.add({self._key(number, row): sums for row, sums in found.items()})
                on_progress(1 / (len(batches) * len(parts)))
        found_all = []
        for row in rows:
            sums = [journal[self._key(number, row)] for number in range(len(batches))]
            nll, kl = ([value for batch in sums for value in batch[of]] for of in (0, 1))
            found_all.append(Quality(windows.counted, nll, kl))
        return found_all

    def _journal(self, windows: Windows) -> Journal | _Notes:
        """Read the journal of a text, once."""
        setting = [windows.digest, windows.counted, list(windows.tokens.shape)]
        key = str(setting)
        if key not in self._journals:
            about = [__version__, self._origin, self.unmodified.to_spec(), *setting]
            self._journals[key] = (
                _Notes()
                if self._origin is None
                else Journal([*about, self._batch, str(self.dtype)])
            )
        return self._journals[key]

    @torch.inference_mode()
    def _measure_batch(
        self, rows: list[Row], tokens: Tensor, counted: int
    ) -> dict[Row, list[list[float]]]:
        """Measure the sums of `Quality.nll` and of `Quality.kl` of each row, window by window."""
        tokens = tokens.to(self._model.device)
        targets = tokens[:, -counted:]
        stream = hf.embed(self._model, tokens)
        context = hf.context(self._model, stream)
        # The unmodified model's distribution is what the others are compared with, hence first.
        unmodified = row_of(self.unmodified)
        # streams[i] is (x, y) after i blocks: the stream, and what it was before the last MLP; or
        # those of all ranks, where they are apart.
        streams: list[tuple[Tensor, ...]] = [(stream, stream)]
        before: Row = ()
        probabilities: list[Tensor] = []
        entropies: list[Tensor] = []
        found: dict[Row, list[list[float]]] = {}
        for row in [unmodified, *rows]:
            shared = _common(before, row)
            del streams[shared + 1 :]
            for block in row[shared:]:
                streams.append(self._module(block)(streams[-1], **context))
            before = row
            nll, kl = [], []
            # Window by window: the logits of one are the largest tensor there is.
            for at, (x, target) in enumerate(zip(streams[-1][0], targets, strict=True)):
                hidden = hf.last_hidden(self._model, x[-counted - 1 : -1])
                logits = hf.logits(self._model, hidden)
                chosen = logits.gather(1, target[:, None])[:, 0]
                if len(probabilities) == at:
                    probability = logits.softmax(-1)
                    probabilities.append(probability)
                # KL(p || q) = cross entropy of p and q - entropy of p
                expected = torch.linalg.vecdot(probabilities[at], logits)
                normalizer = _logsumexp_in_place(logits)
                del logits  # or the next are made beside them
                if len(entropies) == at:
                    entropies.append(normalizer - expected)
                nll.append(float((normalizer - chosen).sum()))
                kl.append(float((normalizer - expected - entropies[at]).sum()))
            found[row] = [nll, kl]
        return found

    def _key(self, batch: int, row: Row) -> str:
        depends = any(block.depends_on_ranks for block in row)
        return f"{batch}: {' '.join(map(str, row))}" + (f" on {self.ranks}" if depends else "")

    def _module(self, block: Block) -> nn.Module:
        members = {layer: self._layers[layer] for layer in block.layers}
        if block.merged:
            members = {block.layers[0]: _mean(list(members.values()))}
        # `before_ladder` makes every block hand on both streams, whatever comes next.
        return ParallelBlock(
            members,
            block.mode,
            before_ladder=True,
            ranks=self.ranks,
            drop_attention=block.drop_attention,
            drop_mlp=block.drop_mlp,
            unreduced=block.unreduced,
            whole=block.whole or self._whole,
            norms=self._norms,
        )


def _logsumexp_in_place(logits: Tensor) -> Tensor:
    """Compute the logarithm of the sum of exp over the last dimension, and spoil `logits`.

    Of a large vocabulary they are half a gigabyte, and the kernel makes every page of a copy anew.
    """
    most = logits.amax(-1, keepdim=True)
    return logits.sub_(most).exp_().sum(-1).log_().add_(most[..., 0])


def _common(one: Row, other: Row) -> int:
    """Count the blocks that two rows start with alike."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count


class _Notes(dict[str, Any]):
    """A journal of this run only."""

    add = dict.update


def _mean(layers: list[GradientCheckpointingLayer]) -> GradientCheckpointingLayer:
    """Make a new layer whose weights are the mean of the layers'."""
    merged = copy.deepcopy(layers[0])
    others = [dict(layer.named_parameters()) for layer in layers]
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter.copy_(torch.stack([other[name] for other in others]).mean(0))
    return merged
