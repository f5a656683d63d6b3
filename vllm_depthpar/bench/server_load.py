"""Requests to a server as they come in the field: vLLM's own load generator, `vllm bench serve`."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

# Of its report, what a run is judged by: {name there: name here}.
FIGURES = {
    f"{statistic}_{metric}_ms": f"{statistic}_{metric}_ms"
    for metric in ("ttft", "tpot", "itl", "e2el")
    for statistic in ("median", "p99")
} | {"request_throughput": "requests_per_second", "output_throughput": "tokens_per_second"}


def run_client(connection: Connection) -> None:
    """vLLM's load generator: sends "ready", then answers each job, arguments of ``vllm bench
    serve``, with its `FIGURES` or a RuntimeError. One process for many runs: its imports take
    longer than a run does."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    connection.send("ready")
    while True:
        try:
            job = connection.recv()
        except EOFError:  # nothing more is asked
            return
        parsed = parser.parse_args(job)
        found = main(parsed)
        answer: dict[str, float] | RuntimeError
        asked = parsed.num_prompts * parsed.random_output_len
        if found["total_output_tokens"] != asked:
            answer = RuntimeError(
                f"{asked} tokens asked for, {found['total_output_tokens']} came; "
                f"{found['failed']} of {parsed.num_prompts} requests failed"
            )
        else:
            answer = {name: float(found[theirs]) for theirs, name in FIGURES.items()}
        connection.send(answer)


def job(
    url: str,
    model: str,
    tokenizer: str,
    *,
    rate: float,
    requests: int,
    prompt_tokens: int,
    tokens: int,
    seed: int,
) -> list[str]:
    """Arguments for requests of one size that arrive as a Poisson process.

    Args:
        rate: requests per second on average; inf: all at once.
        seed: of prompts and arrivals: the same for all that are compared.
    """
    return [
        *("--backend", "vllm", "--base-url", url, "--model", model, "--tokenizer", tokenizer),
        *("--dataset-name", "random", "--random-input-len", str(prompt_tokens)),
        *("--random-output-len", str(tokens), "--ignore-eos", "--temperature", "0"),
        *("--num-prompts", str(requests), "--request-rate", str(rate), "--seed", str(seed)),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "99"),
        "--disable-tqdm",
    ]


def has_tokenizer(model: str) -> bool:
    """Whether a checkpoint brings a tokenizer; one that is not a folder is taken to."""
    folder = Path(model).expanduser()
    return not folder.is_dir() or any(folder.glob("*token*"))


def write_tokenizer(folder: Path, vocab: int) -> list[str]:
    """Write a tokenizer with a word for each of `vocab` ids, for a checkpoint that has none;
    returns the flags with which vLLM takes it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({f"w{token}": token for token in range(vocab)}, "w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return ["--tokenizer", str(folder)]
