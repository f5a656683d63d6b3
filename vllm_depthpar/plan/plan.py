"""The plan: which layers run, which of them run side by side, and what each block reads.

A *spec* is what people write (`vllm_depthpar.plan.spec`). `resolve` turns a spec and the
checkpoint's number of layers into a `Plan`, the one normal form that every other part of the
program takes. Plain data: no torch, no vLLM.

Methods: Layer Parallelism (arXiv 2502.02790), Ladder Residual (arXiv 2501.06589), Unified Layer
Skipping (arXiv 2404.06954), Sync-Point Drop (arXiv 2502.20727), parallel residual (GPT-J, PaLM),
desync residual (Ladder Residual's authors). They compose.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_depthpar.errors import UserError, shortened
from vllm_depthpar.plan.spec import HALVES, MODES, STANDARD, Every, Halves, Skip, Spec, parse

# A layer of the checkpoint, and one of `spec.HALVES`.
Half = tuple[int, str]


@dataclass(frozen=True)
class Plan:
    """The normal form of a plan.

    Attributes:
        layers: number of decoder layers N of the checkpoint.
        blocks: the blocks in the order they run; each holds the indices (0..N-1) of the layers
            that run side by side in it. Layers in no block are skipped.
        ladder, drop_sync, parallel_residual: positions in `blocks` of the blocks of that mode; the
            others are standard. With x the stream before a block and A and F its attention and
            MLP, a standard block computes y = x + A(x), then y + F(y).
            A ladder block computes y = x + A(y'), then y + F(x), where y' is the y of the block
            before it; the stream itself before the first block, and after a block of one
            all-reduce.
            A block of parallel residual computes x + A(x) + F(x): one all-reduce.
            A drop-sync block on R ranks, A_r and F_r a rank's terms of A and F, computes
            x + sum_r (A_r(x) + F_r(x + A_r(x))): one all-reduce, and at R = 1 a standard block.
        desync: halves of layers whose sum is not reduced, all of a block's or none: each rank r
            goes on with its own stream, x_r + T_r(x_r), with T_r its terms of that half. The next
            that is reduced makes them one again: sum_r (x_r / R + T_r(x_r)).
        drop_attention, drop_mlp: layers that run without that half: its term is left out of the
            sums of its block.
        layout: how layers side by side are to be held, "folded" or "whole", if it was asked for;
            the numbers are the same.
        tp: the tensor-parallel size that the plan was made for, if it was made for one.
    """

    layers: int
    blocks: tuple[tuple[int, ...], ...]
    ladder: frozenset[int] = frozenset()
    drop_sync: frozenset[int] = frozenset()
    parallel_residual: frozenset[int] = frozenset()
    desync: frozenset[Half] = frozenset()
    drop_attention: frozenset[int] = frozenset()
    drop_mlp: frozenset[int] = frozenset()
    layout: str | None = None
    tp: int | None = None

    @property
    def depth(self) -> int:
        """Effective depth: the number of blocks that run one after the other."""
        return len(self.blocks)

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices of the layers that run, ascending."""
        return tuple(sorted(layer for block in self.blocks for layer in block))

    @property
    def skipped(self) -> tuple[int, ...]:
        """Indices of the layers that don't run, ascending."""
        return tuple(sorted(set(range(self.layers)) - set(self.kept)))

    @property
    def has_parallel_blocks(self) -> bool:
        """Whether any layers run side by side."""
        return any(len(block) > 1 for block in self.blocks)

    @property
    def is_identity(self) -> bool:
        """True when the plan runs every layer alone and in order, as plain vLLM does."""
        alone = tuple((layer,) for layer in range(self.layers))
        changed = any(getattr(self, key) for key in (*MODES, "desync", *HALVES.values()))
        return self.blocks == alone and not changed

    @property
    def runs(self) -> frozenset[Half]:
        """The halves of layers that run."""
        return frozenset(
            (layer, half)
            for layer, half in halves_of(self.kept)
            if layer not in getattr(self, HALVES[half])
        )

    @property
    def absent(self) -> frozenset[Half]:
        """The halves of the checkpoint's layers that don't run."""
        return halves_of(range(self.layers)) - self.runs

    def attention(self, position: int) -> tuple[int, ...]:
        """List the layers of a block that run their attention."""
        return tuple(layer for layer in self.blocks[position] if layer not in self.drop_attention)

    def mlp(self, position: int) -> tuple[int, ...]:
        """List the layers of a block that run their MLP."""
        return tuple(layer for layer in self.blocks[position] if layer not in self.drop_mlp)

    def is_whole(self, position: int) -> bool:
        """Whether every layer of a block has both halves."""
        return self.attention(position) == self.mlp(position)

    def reductions(self, position: int) -> int:
        """Count the all-reduces of a block at TP > 1.

        One for its attentions and one for its MLPs; but where the sync point between them is
        dropped, where both read the same stream, and in a ladder block that no other follows, both
        are summed on each rank first and reduced once. None for what is under `desync`.
        """
        once = self.is_ladder(position) and not self.is_ladder(position + 1)
        if once or self.reduces_once(position):
            return 1
        return len(self.halves(position)) - len(self.unreduced(position))

    def halves(self, position: int) -> tuple[str, ...]:
        """List the halves of which a block has any, in the order they run."""
        return tuple(half for half in HALVES if getattr(self, half)(position))

    def unreduced(self, position: int) -> tuple[str, ...]:
        """List the halves of a block whose sum is not reduced."""
        return tuple(
            half
            for half in self.halves(position)
            if (getattr(self, half)(position)[0], half) in self.desync
        )

    def is_apart(self, position: int) -> bool:
        """Say whether the streams of the ranks differ before a block; past the last, after it."""
        if position == 0:
            return False
        return self.halves(position - 1)[-1] in self.unreduced(position - 1)

    @property
    def depends_on_ranks(self) -> bool:
        """Whether what the plan means depends on the tensor-parallel size."""
        return bool(self.drop_sync or self.desync)

    def mode(self, position: int) -> str:
        """Say how a block runs: one of `MODES`, or `STANDARD`; this past the last, too."""
        return next((mode for mode in MODES if position in getattr(self, mode)), STANDARD)

    def reduces_once(self, position: int) -> bool:
        """Say whether a block has one all-reduce, of attention and MLP together."""
        return position in self.drop_sync or position in self.parallel_residual

    def is_ladder(self, position: int) -> bool:
        """Say whether a block is a ladder block; False for positions past the last."""
        return position in self.ladder

    def end(self, position: int) -> int | None:
        """Count the checkpoint's layers that the stream after a block stands for.

        Those that ran and the skipped ones between them and the next: the first d layers, or None
        if the layers that ran so far and those to come are interleaved, or the streams are apart.
        """
        if self.is_apart(position + 1):
            return None
        done = [layer for block in self.blocks[: position + 1] for layer in block]
        to_come = [layer for block in self.blocks[position + 1 :] for layer in block]
        end = min(to_come, default=self.layers)
        return end if max(done) < end else None

    def position_after(self, count: int) -> int:
        """Find the first block after which the stream stands for so many of the checkpoint's
        layers, or more; -1: before any."""
        if count == 0:
            return -1
        ends = ((at, self.end(at)) for at in range(self.depth))
        return next(at for at, end in ends if end is not None and end >= count)

    def is_changed(self, position: int) -> bool:
        """Say whether a block is anything else than one standard layer in its own place."""
        (first, *more), begin = self.blocks[position], self.end(position - 1) if position else 0
        return (
            bool(more)
            or self.mode(position) != STANDARD
            or not self.is_whole(position)
            or bool(self.unreduced(position))
            or (begin, self.end(position)) != (first, first + 1)
        )

    @property
    def name(self) -> str:
        """A summary for one line of a log: '30 layers as 23 blocks (7 of 2)'."""
        widths = [len(block) for block in self.blocks if len(block) > 1]
        notes = [f"{widths.count(width)} of {width}" for width in sorted(set(widths))]
        for mode in MODES:
            if positions := getattr(self, mode):
                notes.append(f"{len(positions)} {mode.replace('_', ' ')}")
        if self.desync:
            count = sum(len(self.unreduced(at)) for at in range(self.depth))
            notes.append(f"{count} without all-reduce")
        for half, key in HALVES.items():
            if layers := getattr(self, key):
                notes.append(f"{len(layers)} without {'MLP' if half == 'mlp' else half}")
        if self.skipped:
            notes.append(f"{len(self.skipped)} skipped")
        return f"{self.layers} layers as {self.depth} blocks" + (
            f" ({', '.join(notes)})" if notes else ""
        )

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that identify the plan."""
        return hashlib.sha256(json.dumps(self.to_spec()).encode()).hexdigest()[:12]

    def to_spec(self) -> dict[str, Any]:
        """Write the plan as JSON-ready data; `resolve` gives the same plan back."""
        spec: dict[str, Any] = {
            "layers": self.layers,
            "blocks": [list(block) for block in self.blocks],
        }
        for mode in MODES:
            if positions := getattr(self, mode):
                spec[mode] = sorted(layer for at in positions for layer in self.blocks[at])
        if self.desync:
            spec["desync"] = {
                half: sorted(layer for layer, of in self.desync if of == half) for half in HALVES
            }
        for key in HALVES.values():
            if layers := getattr(self, key):
                spec[key] = sorted(layers)
        for key in ("layout", "tp"):
            if (value := getattr(self, key)) is not None:
                spec[key] = value
        return spec


def halves_of(layers: Iterable[int]) -> frozenset[Half]:
    """List both halves of layers."""
    return frozenset((layer, half) for layer in layers for half in HALVES)


def resolve(spec: object, layers: int) -> Plan:
    """Turn a spec into the normal form.

    Args:
        spec: parsed JSON: a mapping in one of the short forms, or ``"identity"``. ``"auto"`` and
            ``"published"`` depend on the model; `vllm_depthpar.plan.precedence` turns them into one
            of the others.
        layers: number of decoder layers of the checkpoint.

    Raises:
        UserError: one line that names the key, the value and what is allowed.
    """
    parsed = parse(spec)
    if parsed == "identity":
        return Plan(layers, tuple((layer,) for layer in range(layers)))
    if isinstance(parsed, str):
        raise UserError(f"plan {parsed!r} needs the model; allowed here: a mapping, or 'identity'")
    if parsed.layers not in (None, layers):
        raise UserError(
            f"plan key 'layers': {parsed.layers} is not this checkpoint's number of layers; "
            f"allowed: {layers}"
        )
    blocks = _blocks(parsed, layers)
    dropped: dict[str, Any] = {
        key: _dropped(half, key, parsed, blocks, layers) for half, key in HALVES.items()
    }
    if both := sorted(dropped["drop_attention"] & dropped["drop_mlp"]):
        raise UserError(
            f"plan key 'drop_mlp': layer {both[0]} has no attention, either; allowed: to skip it"
        )
    of_mode: dict[str, Any] = {
        mode: _blocks_named(mode, getattr(parsed, mode), blocks, layers) for mode in MODES
    }
    if dropped["drop_attention"] == {layer for block in blocks for layer in block}:
        raise UserError("plan key 'drop_attention': no attention is left; allowed: to keep one")
    plan = Plan(layers, blocks, **of_mode, **dropped, layout=parsed.layout, tp=parsed.tp)
    _check_modes(plan, of_mode)
    if parsed.desync is None:
        return plan
    if isinstance(parsed.desync, Every):
        return replace(plan, desync=_all_but_one_in(parsed.desync.every, plan))
    plan = replace(plan, desync=_halves_named(parsed.desync, plan))
    _check_desync(plan)
    return plan


def _blocks(spec: Spec, layers: int) -> tuple[tuple[int, ...], ...]:
    if spec.blocks is not None:
        return _checked_blocks(spec.blocks, layers)
    kept = _kept_by_skipping(spec.skip, layers) if spec.skip else tuple(range(layers))
    if spec.pair is None:
        return tuple((layer,) for layer in kept)
    return _grouped(kept, spec.pair, spec.group or 2, layers)


def _blocks_named(
    key: str,
    choice: int | list[int] | str | None,
    blocks: tuple[tuple[int, ...], ...],
    layers: int,
) -> frozenset[int]:
    """Find the positions of the blocks whose layers a key's value names."""
    if isinstance(choice, int):
        if choice > layers:
            raise UserError(f"plan key {key!r}: {choice} is too many; allowed: 1 to {layers}")
        named = set(range(layers - choice, layers))
    elif isinstance(choice, list):
        named = set(choice)
        kept = {layer for block in blocks for layer in block}
        for layer in choice:
            if layer >= layers:
                raise UserError(
                    f"plan key {key!r}: layer {layer} is out of range; allowed: 0 to {layers - 1}"
                )
            if layer not in kept:
                raise UserError(
                    f"plan key {key!r}: layer {layer} is skipped; allowed: layers that run"
                )
    else:
        named = set(range(layers)) if choice == "all" else set()
    for block in blocks:
        _check_whole(f"{key!r}: {shortened(choice)}", named, block)
    return frozenset(position for position, block in enumerate(blocks) if named.issuperset(block))


def _check_whole(what: str, named: Collection[int], block: tuple[int, ...]) -> None:
    """Refuse a key's value that names some of a block's layers and not all."""
    if 0 < len(set(named).intersection(block)) < len(block):
        raise UserError(
            f"plan key {what} takes some layers of the block {shortened(list(block))}; allowed: "
            f"all layers of a block, or none"
        )


def _check_modes(plan: Plan, of_mode: dict[str, frozenset[int]]) -> None:
    """Refuse blocks of two modes, and modes of blocks that are not whole."""
    taken: dict[int, str] = {}
    for mode, positions in of_mode.items():
        for position in sorted(positions):
            block = shortened(list(plan.blocks[position]))
            if position in taken:
                raise UserError(
                    f"plan key {mode!r}: the block {block} is under {taken[position]!r}, too; "
                    f"allowed: one mode a block"
                )
            if not plan.is_whole(position):
                raise UserError(
                    f"plan key {mode!r}: the block {block} lacks a half of a layer; allowed: "
                    f"blocks of whole layers"
                )
            taken[position] = mode


def _all_but_one_in(every: int, plan: Plan) -> frozenset[Half]:
    """Choose what is not reduced: in each row of standard blocks all but one in `every`, and the
    row's last, because what follows reads one stream."""
    found: set[Half] = set()
    row: list[tuple[int, str]] = []
    for position in range(plan.depth + 1):
        if position < plan.depth and _can_desync(plan, position):
            row += [(position, half) for half in plan.halves(position)]
            continue
        for number, (at, half) in enumerate(row[:-1], 1):
            if number % every:
                found.update((layer, half) for layer in getattr(plan, half)(at))
        row = []
    return frozenset(found)


def _can_desync(plan: Plan, position: int) -> bool:
    return plan.mode(position) == STANDARD and not plan.is_ladder(position + 1)


def _halves_named(choice: Halves, plan: Plan) -> frozenset[Half]:
    named = {(layer, half) for half in HALVES for layer in getattr(choice, half)}
    if missing := sorted(named - plan.runs):
        layer, half = missing[0]
        raise UserError(
            f"plan key 'desync': the {half} of layer {layer} does not run; allowed: what does"
        )
    for position in range(plan.depth):
        for half in plan.halves(position):
            chosen = getattr(choice, half)
            what = f"'desync': {half} {shortened(chosen)}"
            _check_whole(what, chosen, getattr(plan, half)(position))
    return frozenset(named)


def _check_desync(plan: Plan) -> None:
    """Refuse streams that are apart where one is read."""
    if plan.is_apart(plan.depth):
        raise UserError(
            "plan key 'desync': the last half that runs has no all-reduce; allowed: all before it"
        )
    for position in range(plan.depth):
        if _can_desync(plan, position) or not (plan.is_apart(position) or plan.unreduced(position)):
            continue
        mode = plan.mode(position)
        where = f"is under {mode!r}" if mode != STANDARD else "comes before one under 'ladder'"
        raise UserError(
            f"plan key 'desync': the block {shortened(list(plan.blocks[position]))} {where} and "
            f"needs one stream and its all-reduces; allowed: other blocks, the last of them in a "
            f"row with an all-reduce at its end"
        )


def _dropped(
    half: str, key: str, spec: Spec, blocks: tuple[tuple[int, ...], ...], layers: int
) -> frozenset[int]:
    """Layers whose half a spec leaves out, by its key or by blocks that name halves."""
    kept = {layer for block in blocks for layer in block}
    named = getattr(spec, key) or []
    for layer in named:
        if layer >= layers:
            raise UserError(
                f"plan key {key!r}: layer {layer} is out of range; allowed: 0 to {layers - 1}"
            )
        if layer not in kept:
            raise UserError(f"plan key {key!r}: layer {layer} is skipped; allowed: layers that run")
    halves = [block for block in spec.blocks or () if isinstance(block, Halves)]
    missing = {
        layer
        for block in halves
        for layer in {*block.attention, *block.mlp} - set(getattr(block, half))
    }
    return frozenset(missing.union(named))


def _checked_blocks(
    given: Sequence[list[int] | Halves], layers: int
) -> tuple[tuple[int, ...], ...]:
    blocks = [_members(block) if isinstance(block, Halves) else block for block in given]
    seen: set[int] = set()
    for block in blocks:
        if not block:
            raise UserError("plan key 'blocks': a block is empty; allowed: one layer or more each")
        for layer in block:
            if layer >= layers:
                raise UserError(
                    f"plan key 'blocks': layer {layer} is out of range; allowed: 0 to {layers - 1}"
                )
            if layer in seen:
                raise UserError(f"plan key 'blocks': layer {layer} is used twice; allowed: once")
            seen.add(layer)
    return tuple(tuple(block) for block in blocks)


def _members(block: Halves) -> list[int]:
    """List the layers of which a block has a half or both, in the order of its attentions."""
    for half in ("attention", "mlp"):
        layers = getattr(block, half)
        if len(set(layers)) < len(layers):
            raise UserError(
                f"plan key 'blocks': {half} {shortened(layers)} names a layer twice; allowed: once"
            )
    rest = [layer for layer in block.mlp if layer not in block.attention]
    return [*block.attention, *rest]


def _kept_by_skipping(skip: Skip, layers: int) -> tuple[int, ...]:
    """List the layers that Unified Layer Skipping keeps (arXiv 2404.06954, section 3)."""
    if skip.speedup > layers / 2:
        raise UserError(
            f"plan key 'skip.speedup': {skip.speedup:g} keeps fewer than two layers; "
            f"allowed: 1 to {layers / 2:g}"
        )
    count = int(layers / skip.speedup)
    if skip.schedule == "paper":
        interval = layers // (count - 1)
        inner = [layer for layer in range(1, layers - 1) if layer % interval == 0]
        return (0, *inner[: count - 2], layers - 1)
    # The nearest integers to count evenly spaced points on 0..layers-1, in exact arithmetic.
    gaps = count - 1
    return tuple((2 * i * (layers - 1) + gaps) // (2 * gaps) for i in range(count))


def _grouped(
    kept: tuple[int, ...], span: tuple[int, int], group: int, layers: int
) -> tuple[tuple[int, ...], ...]:
    start, end = span
    if not start < end <= layers:
        raise UserError(
            f"plan key 'pair': [{start}, {end}] is not a span of layers; "
            f"allowed: [start, end) with 0 <= start < end <= {layers}"
        )
    inside = [layer for layer in kept if start <= layer < end]
    if len(inside) % group or not inside:
        raise UserError(
            f"plan key 'pair': [{start}, {end}] holds {len(inside)} layers; "
            f"allowed: a multiple of {group}"
        )
    groups = [tuple(inside[i : i + group]) for i in range(0, len(inside), group)]
    before = [(layer,) for layer in kept if layer < start]
    after = [(layer,) for layer in kept if layer >= end]
    return (*before, *groups, *after)
