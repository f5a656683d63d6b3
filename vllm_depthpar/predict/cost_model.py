"""How long a plan takes on a machine, predicted: plain arithmetic over sizes, no measurement.

A forward pass is a chain of modules, an attention and an MLP a block, and of all-reduces. A module
takes what its operations take on a roofline (bytes over memory bandwidth, or FLOPs over FLOP/s,
whichever is longer) and half of the fixed cost of a layer. An all-reduce costs the rank that
computes some time that nothing hides, and then is on its way for some time, which the next module
hides in a ladder. `vllm_depthpar.predict.machines` says what the numbers of a machine are.

No torch, no vLLM, and cheap: a search ranks thousands of plans with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import Plan, resolve
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.plan.spec import HALVES, WHOLE
from vllm_depthpar.predict.machines import Deployment, Device, Link, Workload

# One sequence that gets one token.
DECODE = Workload()


@dataclass(frozen=True)
class StepTime:
    """Where the seconds of one forward pass go.

    Attributes:
        memory: reading weights and KV cache, in operations that memory bandwidth bounds.
        compute: operations that FLOP/s bound.
        fixed: what every layer and every step takes, whatever its size.
        communication: all-reduces, and the gathering of logits, as far as nothing hides them.
    """

    memory: float
    compute: float
    fixed: float
    communication: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.memory + self.compute + self.fixed + self.communication

    @property
    def shares(self) -> dict[str, float]:
        """Each part's share of the whole, by its name; they sum to 1."""
        return {name: part / self.seconds for name, part in vars(self).items()}


def step_time(
    shape: ModelShape,
    plan: Plan,
    deployment: Deployment,
    workload: Workload = DECODE,
    plain: bool = False,
) -> StepTime:
    """Predict the time of one forward pass, in seconds.

    Args:
        plain: through plain vLLM's all-reduces, not this package's.

    Raises:
        UserError: see `check`.
    """
    check(shape, plan, deployment.tp)
    device, link, tp = deployment.device, deployment.link, deployment.tp
    work = _Work(shape, deployment, workload)
    held = {half: _held(plan, half, shape, tp) for half in HALVES}
    widths = {half: Counter(chain.from_iterable(blocks)) for half, blocks in held.items()}
    parts = {
        "attention": {width: _parts(work.attention(width)) for width in widths["attention"]},
        "mlp": {
            width: _parts(work.mlp(width) if width else work.experts()) for width in widths["mlp"]
        },
    }
    memory, compute = (
        head
        + sum(
            count * parts[half][width][of]
            for half in HALVES
            for width, count in widths[half].items()
        )
        for of, head in enumerate(_parts([work.head()]))
    )
    fixed = device.layer_seconds / 2
    communication = 0.0
    if tp > 1 and link is not None:
        size = workload.rows * shape.hidden * shape.dtype_bytes
        seconds = {
            half: [sum(fixed + sum(parts[half][width]) for width in block) for block in blocks]
            for half, blocks in held.items()
        }
        communication = _Reduction(device, link, tp, size).communication(
            shape, plan, seconds["attention"], seconds["mlp"], plain
        )
        # vLLM gathers every rank's logits of the last tokens, for plans as for plain.
        logits = workload.batch * shape.vocab * shape.dtype_bytes / tp
        communication += _Reduction(device, link, tp, logits).busy(plain=True)
        communication += link.gather_seconds(logits, tp)
    return StepTime(
        memory=memory,
        compute=compute,
        fixed=device.step_seconds + sum(map(Counter.total, widths.values())) * fixed,
        communication=communication,
    )


def plain_time(shape: ModelShape, deployment: Deployment, workload: Workload = DECODE) -> StepTime:
    """Predict `step_time` of plain vLLM: every layer alone, through vLLM's own all-reduces."""
    identity = resolve("identity", shape.layers)
    return step_time(shape, identity, deployment, workload, plain=True)


def speedup(
    shape: ModelShape, plan: Plan, deployment: Deployment, workload: Workload = DECODE
) -> float:
    """Predict how many times as fast as plain vLLM a plan is: above 1 is faster; raises as
    `step_time`."""
    plain = plain_time(shape, deployment, workload)
    return plain.seconds / step_time(shape, plan, deployment, workload).seconds


def check(shape: ModelShape, plan: Plan, tp: int) -> None:
    """Check that a plan is for a model, and that both can be cut into `tp` ranks.

    Raises:
        UserError: the plan is for another number of layers, or does not fit `tp`.
    """
    if plan.layers != shape.layers:
        raise UserError(
            f"the plan is for {plan.layers} layers; allowed: {shape.layers}, as the model has"
        )
    if not shape.fits_plan(plan, tp):
        sizes = ", ".join(map(str, shape.fitting_tps(plan)))
        raise UserError(
            f"{plan.name} can't be cut into {tp} tensor-parallel ranks; allowed: {sizes}"
        )


def _held(plan: Plan, half: str, shape: ModelShape, tp: int) -> list[list[int]]:
    """List, for each block, vLLM's attentions or MLPs by how many of the checkpoint's each is; 0
    stands for an MLP of experts, which is one by itself."""
    held = []
    for at in range(plan.depth):
        layers = getattr(plan, half)(at)
        if half == "mlp" and shape.experts:
            held.append([int(not shape.is_sparse(layer)) for layer in layers])
        elif shape.layout(plan, at, tp) == WHOLE:
            held.append([1] * len(layers))
        else:
            held.append([len(layers)] * bool(layers))
    return held


# The seconds that memory bandwidth and that FLOP/s would take for one operation.
_Operation = tuple[float, float]


def _parts(operations: list[_Operation]) -> tuple[float, float]:
    """Seconds of operations one after the other: those bound by memory, those bound by FLOP/s."""
    memory = sum(m for m, c in operations if m >= c)
    return memory, sum(c for m, c in operations if m < c)


@dataclass(frozen=True)
class _Work:
    """The operations of one forward pass on one rank."""

    shape: ModelShape
    deployment: Deployment
    workload: Workload

    def head(self) -> _Operation:
        """Of the last token of each sequence, the logits."""
        weights = self.shape.vocab * self.shape.hidden
        return self._matmul(weights, self.workload.batch, self.shape.dtype_bytes)

    def attention(self, width: int) -> list[_Operation]:
        """Projections, then scores and values over the KV cache."""
        shape, load = self.shape, self.workload
        device, tp = self.deployment.device, self.deployment.tp
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        weights = width * shape.hidden * (2 * q + 2 * kv)
        seen = load.context + load.tokens
        kv_heads = max(1, width * shape.kv_heads // tp)
        kv_bytes = 2 * load.batch * seen * kv_heads * shape.head_dim * shape.dtype_bytes
        # A new token attends to those in the cache, to itself and to the new ones before it.
        attended = load.rows * (load.context + (load.tokens + 1) / 2)
        flops = 4 * attended * width * q / tp
        inner = (kv_bytes / device.memory_bandwidth, flops / device.flops_at(load.rows))
        return [self._matmul(weights, load.rows, shape.projection_bytes), inner]

    def mlp(self, width: int) -> list[_Operation]:
        """Gate, unless there is none, up and down."""
        matrices = 3 if self.shape.family.gated else 2
        weights = matrices * width * self.shape.hidden * self.shape.intermediate
        return [self._matmul(weights, self.workload.rows, self.shape.projection_bytes)]

    def experts(self) -> list[_Operation]:
        """Router, the experts that any row chooses, each as likely as the others, and the one of
        all rows."""
        shape, sizes, load = self.shape, self.shape.experts, self.workload
        assert sizes is not None
        of_one = 3 * shape.hidden * sizes.intermediate
        chosen = sizes.chosen / sizes.count
        read = sizes.count * (1 - (1 - chosen) ** load.rows)
        rows = sizes.chosen * load.rows / read
        return [
            self._matmul(sizes.count * shape.hidden, load.rows, shape.dtype_bytes),
            self._matmul(read * of_one, rows, shape.projection_bytes),
            self._matmul(3 * shape.hidden * sizes.shared, load.rows, shape.projection_bytes),
        ]

    def _matmul(self, weights: float, rows: float, size: float) -> _Operation:
        """Products of `rows` activations with so many weights of `size` bytes, cut into tp shards.

        Activations are of the model's dtype: as much arithmetic whatever the weights are kept as.
        """
        device, share = self.deployment.device, weights / self.deployment.tp
        return (
            share * size / device.memory_bandwidth,
            2 * share * rows / device.flops_at(rows),
        )


@dataclass(frozen=True)
class _Reduction:
    """All-reduces of one size, in bytes, between the ranks."""

    device: Device
    link: Link
    tp: int
    size: float

    @cached_property
    def flight(self) -> float:
        return self.link.all_reduce_seconds(self.size, self.tp)

    def busy(self, plain: bool) -> float:
        """Compute what nothing can hide."""
        if self.link.shared_memory:
            return 0.0  # the threads that compute do it all, in plain vLLM too: see `flight`
        moved = 2 * (self.tp - 1) / self.tp * self.size
        seconds = self.device.reduce_seconds + moved / self.device.reduce_bandwidth
        return seconds + plain * self.device.plain_reduce_seconds

    def communication(
        self,
        shape: ModelShape,
        plan: Plan,
        attention: Sequence[float],
        mlp: Sequence[float],
        plain: bool,
    ) -> float:
        """Seconds of a forward pass's all-reduces that nothing hides; this is one of one term.

        Args:
            attention, mlp: seconds of each block's attentions, and of its MLPs.
        """

        def seconds(at: int, *halves: str, behind: float = 0.0) -> float:
            return self._of(shape.terms_reduced(plan, at, halves)).left(plain, behind)

        total = self.left(plain)  # the embedding's
        for at in range(plan.depth):
            ladder, before_ladder = plan.is_ladder(at), plan.is_ladder(at + 1)
            if plan.reduces_once(at) or (ladder and not before_ladder):
                total += seconds(at, *HALVES)
                continue
            unreduced = plan.unreduced(at)
            if plan.attention(at) and "attention" not in unreduced:
                total += seconds(at, "attention", behind=mlp[at] if ladder else 0.0)
            if plan.mlp(at) and "mlp" not in unreduced:
                total += seconds(at, "mlp", behind=attention[at + 1] if before_ladder else 0.0)
        return total

    def _of(self, terms: int) -> _Reduction:
        """Take one of so many terms at once."""
        return self if terms == 1 else replace(self, size=terms * self.size)

    def left(self, plain: bool, behind: float = 0.0) -> float:
        """Compute what is left of an all-reduce behind so many seconds of computation."""
        hidden = 0.0 if self.link.shared_memory else self.device.overlap * self.flight
        return self.busy(plain) + self.flight - min(hidden, behind)
