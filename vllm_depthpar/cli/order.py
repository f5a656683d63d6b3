"""`depthpar order`: the same model, of which dropped sync points cost less."""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

from vllm_depthpar.checkpoint import export
from vllm_depthpar.checkpoint.config import folder, read_original_config
from vllm_depthpar.checkpoint.quantized import is_quantized
from vllm_depthpar.cli import calibration
from vllm_depthpar.cli.types import MODEL_HELP, at_least, out_folder, path_or_name
from vllm_depthpar.errors import UserError
from vllm_depthpar.plan.model_shape import ModelShape
from vllm_depthpar.util.progress import bar
from vllm_depthpar.util.provenance import origin


def add(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "order", help="deal MLP neurons out to ranks, so that dropped sync points cost less"
    )
    parser.add_argument("model", type=path_or_name, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--tp", type=at_least(2), required=True, metavar="N", help="ranks that it will be served on"
    )
    calibration.add(parser)
    parser.add_argument(
        "--out", type=out_folder, required=True, metavar="DIR", help="folder to make"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> str:
    _check(args)
    with export.claimed(args.out):
        texts = calibration.read(args)  # before the weights load
        import torch

        from vllm_depthpar import hf
        from vllm_depthpar.evaluate.dtypes import usable_dtype
        from vllm_depthpar.recover import neuron_order

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = hf.load_unmodified(folder(args.model), usable_dtype(args.dtype)).to(device)
        tokens = torch.cat([text.tokens for text in texts])
        with bar("Neurons") as advance:
            found = neuron_order.orders(model, tokens, args.tp, on_progress=advance)
        left = [one.after / one.before for one in found if one.before]
        record = {
            **origin("depthpar"),
            "tp": args.tp,
            "texts": [text.described() for text in texts],
            "costs": [{"before": one.before, "after": one.after} for one in found],
        }
        export.rewrite(
            args.model,
            args.out,
            lambda tensors: neuron_order.reordered(tensors, found),
            f"The neurons of its MLPs in another order, for plans with `drop_sync` on {args.tp} "
            f"tensor-parallel ranks. The same model: every vLLM serves it. Adapters of its MLPs "
            f"that were made for the original do not fit.",
            record,
        )
    return (
        f"{args.out}: the same model; what a dropped sync point gets wrong is, in the median "
        f"layer, {median(left):.0%} of before on {args.tp} ranks"
    )


def _check(args: argparse.Namespace) -> None:
    """Refuse what is wrong before anything long begins."""
    config = read_original_config(args.model)
    shape = ModelShape.from_config(config)
    intermediate = shape.intermediate
    if shape.experts:
        raise UserError(
            f"{args.model} has MLPs of experts, whose neurons have no order yet; allowed: models "
            f"without"
        )
    if not shape.family.gated:
        raise UserError(
            f"{args.model} has MLPs without a gate, which this command was not taught; allowed: "
            f"models whose MLPs have one"
        )
    if intermediate % args.tp:
        raise UserError(
            f"--tp {args.tp}: {intermediate} neurons of an MLP can't be dealt out evenly; allowed: "
            f"sizes that divide {intermediate}"
        )
    if is_quantized(folder(args.model)):
        raise UserError(
            f"{args.model} is quantized, and its groups can't be torn apart; allowed: to order the "
            f"checkpoint that it was made from, and quantize that"
        )
