"""What the metrics cost: decode speed of one plan's server with them beside one without, in turns.

Two real `vllm serve`, alike but for DEPTHPAR_METRICS, both alive and one asked at a time. A round's
ratio comes from two neighbours in time; the table gives the median and the spread of those. The
first round is not counted.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

import common
from completions_client import measure

from vllm_depthpar import bundled, metric_files
from vllm_depthpar.checkpoint import read_config
from vllm_depthpar.progress import step_bar
from vllm_depthpar.rounds import in_turn, spread, summary
from vllm_depthpar.server_process import HOST, serve

OFF = "0"
# A compiled model is compiled before its server answers.
START_SECONDS = 1800


def main() -> None:
    """Measure, print a table, write the JSON."""
    args = _parser().parse_args()
    model = str(args.model or bundled.prepare())
    vocab = read_config(model)["vocab_size"]
    (plan,) = args.plans
    (contender,) = [one for one in common.contenders(model, [plan]) if one.spec is not None]
    flags = [*contender.flags, "--served-model-name", "model", "--dtype", args.dtype]
    flags += ["--tensor-parallel-size", str(args.tp), "--no-enable-prefix-caching"]
    flags += ["--max-model-len", str(args.prompt_tokens + args.tokens)]
    flags += ["--enforce-eager"] * args.eager
    settings = [OFF, *args.every]
    # setting -> batch -> tokens per second of each round
    speeds: dict[str, dict[int, list[float]]] = {
        setting: {batch: [] for batch in args.batches} for setting in settings
    }
    with ExitStack() as stack, step_bar() as progress:
        total = len(settings) * (1 + (1 + args.rounds) * len(args.batches))
        task = progress.add_task("", total=total)
        servers = []
        for setting in settings:
            progress.update(task, description=f"starting {metric_files.ENV}={setting}")
            server = stack.enter_context(
                serve(model, *flags, env={metric_files.ENV: setting}, timeout=START_SECONDS)
            )
            servers.append((setting, server))
            progress.advance(task)
        for number in range(-1, args.rounds):
            for batch in args.batches:
                for setting, server in in_turn(servers, number):
                    progress.update(task, description=f"{setting}, batch {batch}")
                    speed = measure(
                        HOST,
                        server.port,
                        "model",
                        batch,
                        args.prompt_tokens,
                        args.tokens,
                        vocab,
                        seed=number + 1,
                    )["decode"]
                    if number >= 0:
                        speeds[setting][batch].append(speed)
                    progress.advance(task)

    ratios = {
        setting: {
            batch: [a / b for a, b in zip(rounds, speeds[OFF][batch], strict=True)]
            for batch, rounds in by_batch.items()
        }
        for setting, by_batch in speeds.items()
    }
    columns = [metric_files.ENV]
    columns += [f"batch {batch}: {what}" for batch in args.batches for what in ("tok/s", "ratio")]
    rows = [
        [
            setting,
            *(
                cell
                for batch in args.batches
                for cell in (
                    spread(speeds[setting][batch], ".1f"),
                    spread(ratios[setting][batch], ".3f") if setting != OFF else "",
                )
            ),
        ]
        for setting in settings
    ]
    print(common.markdown(columns, rows))
    print(f"\n{Path(model).name}, {contender.plan}, TP = {args.tp}, {args.rounds} rounds")
    if args.out:
        report = {
            **common.facts(),
            "model": Path(model).name,
            "plan": contender.plan,
            "tp": args.tp,
            "eager": args.eager,
            "tokens_per_second": speeds,
            "ratio_to_off": {
                setting: {batch: summary(rounds) for batch, rounds in by_batch.items()}
                for setting, by_batch in ratios.items()
            },
        }
        common.write_json(args.out, report)


def _parser() -> argparse.ArgumentParser:
    parser = common.arguments("Decode speed with metrics beside that without.")
    positive = common.at_least(1)
    parser.add_argument("model", nargs="?", help=common.MODEL_HELP)
    parser.add_argument("--every", nargs="+", default=[str(metric_files.EVERY)], help="(8)")
    parser.add_argument("--tp", type=positive, default=1, help="(1)")
    parser.add_argument("--batches", nargs="+", type=positive, default=[1, 8], help="(1 8)")
    parser.add_argument("--tokens", type=common.at_least(2), default=64, help="a sequence (64)")
    parser.add_argument("--prompt-tokens", type=positive, default=32, help="a sequence (32)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    return parser


if __name__ == "__main__":
    common.run_main(main)
