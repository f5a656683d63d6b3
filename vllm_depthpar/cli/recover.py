"""`depthpar recover`: win back what a plan has cost."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from vllm_depthpar.checkpoint import adapter, export
from vllm_depthpar.checkpoint.config import fingerprint, folder, read_original_config, read_tensors
from vllm_depthpar.checkpoint.quantized import is_quantized
from vllm_depthpar.cli.quality_table import quality_table
from vllm_depthpar.cli.types import (
    DTYPES,
    MODEL_HELP,
    PLAN_HELP,
    at_least,
    out_folder,
    path_or_name,
)
from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import Plan, precedence, read_spec, resolve
from vllm_depthpar.plan.families import family_of
from vllm_depthpar.plan.ladder_checkpoint import ladder_of
from vllm_depthpar.util.provenance import origin

if TYPE_CHECKING:
    from accelerate import PartialState

    from vllm_depthpar.evaluate.texts import Windows

_OWN_TOKENS = 131072
_REFIT = 32768
# Windows of each text that are measured and not learned from, unless other texts are given.
_HELD_OUT = 4
_HELD_TOKENS = 2048
_LEAST_WINDOWS = 16


def add(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "recover", help="win lost quality back by distillation; write a checkpoint that serves"
    )
    parser.add_argument("model", type=path_or_name, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--plan", required=True, metavar="P", help=PLAN_HELP)
    parser.add_argument(
        "--tp",
        type=at_least(1),
        metavar="N",
        help="tensor-parallel size, on which drop_sync and desync depend (the plan's own, else 1)",
    )
    parser.add_argument(
        "--out", type=out_folder, required=True, metavar="DIR", help="folder to make"
    )
    data = parser.add_argument_group("text to learn from")
    data.add_argument(
        "--text", type=path_or_name, nargs="+", default=[], metavar="FILE", help="UTF-8 text"
    )
    data.add_argument(
        "--own-text",
        type=at_least(0),
        metavar="N",
        help=f"N tokens that the model writes itself ({_OWN_TOKENS} without --text, else 0)",
    )
    data.add_argument(
        "--held-out",
        type=path_or_name,
        nargs="+",
        default=[],
        metavar="FILE",
        help="measure on these on the way",
    )
    data.add_argument("--window", type=at_least(2), default=512, help="tokens (512)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--tokens", type=at_least(0), metavar="N", help="learn from N (all, once); 0: refit only"
    )
    budget.add_argument(
        "--minutes", type=float, metavar="M", help="of the command, writing of text included"
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--train",
        choices=("layers", "blocks", "norms", "lora", "all"),
        default="layers",
        help="what changes: the layers from the first changed one on, those of the changed blocks "
        "alone, their norms, or all tensors; lora: nothing, and what is written is an adapter to "
        "serve beside the untouched checkpoint (layers)",
    )
    training.add_argument(
        "--refit",
        type=at_least(0),
        metavar="N",
        help="first fit projections in closed form, on N tokens; 0: don't (32768; lora: 0)",
    )
    training.add_argument(
        "--objective",
        choices=("distil", "next-token"),
        default="distil",
        help="next-token: plain fine-tuning, for comparison (distil)",
    )
    training.add_argument("--batch", type=at_least(1), default=4, help="windows of a step (4)")
    training.add_argument(
        "--micro-batch", type=at_least(1), default=4, help="of them at a time, a process (4)"
    )
    training.add_argument(
        "--rollouts",
        type=at_least(0),
        default=0,
        metavar="N",
        help="of the windows at a time N are the student's own writing (0)",
    )
    training.add_argument("--rate", type=float, default=2e-4, help="peak learning rate (2e-4)")
    training.add_argument("--rank", type=at_least(1), default=16, help="of adapters (16)")
    training.add_argument(
        "--checkpointing", action="store_true", help="recompute activations: less memory, slower"
    )
    training.add_argument(
        "--evaluations", type=at_least(1), default=10, help="on the way, each also saved (10)"
    )
    training.add_argument("--seed", type=int, default=0, help="(0)")
    training.add_argument(
        "--dtype", choices=DTYPES[:3], default="auto", help="to compute in (auto)"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> str:
    until = None if args.minutes is None else time.time() + 60 * args.minutes
    _check_installed(args)
    from vllm_depthpar.recover import trainer

    process = trainer.this_process()
    chosen = _check(args, process.num_processes)
    # To its end: what it goes on with lies beside the folder.
    with export.claimed(args.out) if process.is_main_process else nullcontext():
        return _recover(args, chosen, process, until)


def _recover(
    args: argparse.Namespace, chosen: Plan, process: PartialState, until: float | None
) -> str:
    import torch

    from vllm_depthpar import hf
    from vllm_depthpar.evaluate.dtypes import usable_dtype
    from vllm_depthpar.recover import trainer
    from vllm_depthpar.recover.distillation import SCALING, Distillation

    with process.main_process_first():
        texts, held_out = _texts(args)  # before the weights load
    training = torch.cat([text.tokens for text in texts])

    dtype = usable_dtype(args.dtype)
    bfloat16 = dtype == torch.bfloat16
    model = hf.load_unmodified(folder(args.model), dtype).to(process.device)
    unmodified = Distillation(model, resolve("identity", chosen.layers), bfloat16=bfloat16)
    distillation = Distillation(
        model,
        chosen,
        train=args.train,
        objective=args.objective,
        bfloat16=bfloat16,
        read=None if is_quantized(folder(args.model)) else partial(read_tensors, args.model),
    )
    settings = trainer.TrainingSettings(
        **{field.name: getattr(args, field.name) for field in fields(trainer.TrainingSettings)}
    )
    kept = args.out.with_name(f".{args.out.name}.run")
    identity = [
        fingerprint(args.model),
        str(dtype),
        [text.digest for text in texts],
    ]
    run = trainer.Recovery(distillation, settings, training, held_out, kept, identity)
    # In this order: what is measured depends on what was done.
    quality_after = {
        "unmodified": {text.name: trainer.quality(unmodified, text) for text in held_out},
        "plan": run.measure(),
    }
    ridges = run.refit() if args.refit else {}
    quality_after["refit"] = run.measure()
    done = run.train(args.tokens, until)
    end = run.measure()
    better = _kl(end) <= _kl(quality_after["refit"])  # not if it is no number
    may_be_undone = args.refit and args.objective == "distil"
    undone = may_be_undone and run.undo_training(worse=not better)
    if undone:
        quality_after["distilled"], end = end, quality_after["refit"]
    quality_after["end"] = end
    if process.is_main_process:
        record = {
            **origin("depthpar"),
            "plan": chosen.to_spec(),
            "settings": asdict(settings),
            "dtype": str(dtype).removeprefix("torch."),
            "texts": {text.name: text.tokens.numel() for text in texts},
            "held_out": [windows.described() for windows in held_out],
            "ridges": ridges,
            "training": done,
            "quality": quality_after,
            "curve": run.curve,
        }
        if args.train == "lora":
            matrices = distillation.adapter()
            adapter.write(args.model, chosen, args.out, matrices, args.rank, SCALING, record)
        else:
            export.write(args.model, chosen, args.out, distillation.changes(), record)
        shutil.rmtree(kept)
    process.wait_for_everyone()
    table = quality_table([""], [([stage], found) for stage, found in quality_after.items()])
    command = f"vllm serve {args.out}"
    if args.train == "lora":
        command = adapter.serving_command(args.model, args.out, args.rank)
    lines = ["", f"{args.out}: {chosen.name}", f"serve it: {command}"]
    if undone:
        lines.insert(1, f"distillation made it worse and was undone; try less than {args.rate:g}")
    return "\n".join([table, *lines])


def _kl(found: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over the texts."""
    return fmean(one["kl"] for one in found.values())


def _check_installed(args: argparse.Namespace) -> None:
    try:
        import accelerate  # noqa: F401

        if args.train == "lora":
            import peft  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"recovery needs {error.name}; allowed: pip install 'vllm-depthpar[recover]'"
        ) from None


def _check(args: argparse.Namespace, processes: int) -> Plan:
    """Refuse what is wrong before anything long begins; returns the plan."""
    config = read_original_config(args.model)
    if ladder_of(config):
        raise UserError("the model is a ladder checkpoint; allowed: a model that runs every layer")
    if args.train == "lora" and family_of(config).by_heads:
        raise UserError(
            f"--train lora: no {config['model_type']} is served with adapters; allowed: other kinds"
        )
    chosen, _ = precedence.choose(config, read_spec(args.plan), override_name="--plan")
    if args.tp is not None and chosen.depends_on_ranks:
        chosen = replace(chosen, tp=args.tp)
    if chosen.is_identity:
        raise UserError("the plan changes nothing, and nothing is lost; allowed: another --plan")
    export.check_out(args.out)
    export.check_source(args.model, chosen)
    if args.batch % (at_once := args.micro_batch * processes):
        raise UserError(
            f"--batch {args.batch} is no multiple of --micro-batch {args.micro_batch} times "
            f"{processes} processes; allowed: multiples of {at_once}"
        )
    if args.rollouts and args.objective != "distil":
        raise UserError(
            f"--rollouts {args.rollouts}: from its own words alone a student learns nothing; "
            f"allowed: --objective distil"
        )
    if args.rollouts > args.micro_batch:
        raise UserError(
            f"--rollouts {args.rollouts} are more than --micro-batch {args.micro_batch}; allowed: "
            f"0 to {args.micro_batch}"
        )
    if args.refit is None:
        args.refit = 0 if args.train == "lora" else _REFIT
    if args.refit and args.train == "lora":
        raise UserError(
            f"--refit {args.refit}: an adapter holds no refitted projections; allowed with --train "
            f"lora: 0"
        )
    if args.minutes is not None and not args.minutes > 0:
        raise UserError(f"--minutes {args.minutes:g} is too short; allowed: more than 0")
    return chosen


def _texts(args: argparse.Namespace) -> tuple[list[Windows], list[Windows]]:
    """Read the texts to learn from and those to measure on."""
    from vllm_depthpar.evaluate import own_text
    from vllm_depthpar.evaluate.suite import read_texts

    own = args.own_text
    if own is None:
        own = 0 if args.text else _OWN_TOKENS
    if not args.text and not own:
        raise UserError("no text to learn from; allowed: --text FILE ..., --own-text N")
    texts = read_texts(
        args.model,
        args.text,
        args.window,
        own_tokens=own,
        dtype=args.dtype,
        kinds=(own_text.PROSE, own_text.CHATS),
    )
    if args.held_out:
        held_out = read_texts(args.model, args.held_out, args.window, tokens=_HELD_TOKENS)
    else:
        parted = [text.part(_HELD_OUT) for text in texts]
        texts, held_out = [rest for rest, _ in parted], [held for _, held in parted]
    if (count := sum(map(len, texts))) < _LEAST_WINDOWS:
        raise UserError(
            f"{count} windows of {args.window} tokens to learn from; allowed: {_LEAST_WINDOWS} or "
            f"more (more text, --own-text, a smaller --window)"
        )
    return texts, held_out
