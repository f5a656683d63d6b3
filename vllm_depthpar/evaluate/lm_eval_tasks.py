"""Tasks of lm-evaluation-harness (lm-eval), asked of a real `vllm serve` for each plan.

Every answer is kept on disk as it comes, for the model, plan and server flags that gave it. A run
that was broken off goes on where it was, a larger `limit` asks only for what is new, and where
every answer is known no server is started.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import math
import random
import re
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_depthpar.checkpoint.tokenizer import read_tokenizer
from vllm_depthpar.errors import UserError
from vllm_depthpar.evaluate import served
from vllm_depthpar.launch.variants import Variant
from vllm_depthpar.util import files
from vllm_depthpar.util.markdown import table
from vllm_depthpar.util.provenance import origin

YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class TaskSettings:
    """What the answers depend on, beside model, plan and tasks.

    Attributes:
        limit: only the first documents of each task, at most this many.
        num_fewshot: examples in each prompt; None for the task's own number. A task that has fixed
            it at 0 keeps that.
        seed: of the choice of examples (1234 is lm-eval's own), and of the server.
        server_args: more flags for `vllm serve`.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    seed: int = 1234
    server_args: tuple[str, ...] = ()


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """Load tasks with their data, ready for `run_tasks`.

    Args:
        names: names that lm-eval knows (tasks, groups, tags), and paths of YAML files. What the
            folder of such a file defines can be named too.

    Returns:
        What lm-eval's TaskManager loads.

    Raises:
        UserError: lm-eval is not installed, a name is unknown, or a task or its data can't be
            loaded.
    """
    if find_spec("lm_eval") is None:
        raise UserError("tasks need lm-eval: pip install 'vllm-depthpar[eval]'")
    from lm_eval.tasks import TaskManager

    # It explains options of its own command to everyone who loads a task with a function.
    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)
    paths = [Path(name).expanduser() for name in names if name.endswith(YAML)]
    for path in paths:
        if not path.is_file():
            raise UserError(f"task file {str(path)!r} does not exist")
    specs = list(dict.fromkeys(names))
    which = ", ".join(map(repr, specs))
    with _loading(which):
        manager = TaskManager(
            include_path=sorted({str(path.parent) for path in paths}),
            # Looking through lm-eval's thousands of tasks takes seconds.
            include_defaults=len(paths) < len(names) or any(map(_is_group, paths)),
        )
    for name in specs:
        if not name.endswith(YAML) and name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(
                f"task {name!r} is unknown{hint} (allowed: a name that `lm-eval ls tasks` lists, "
                "or the path of a YAML file)"
            )
    with _loading(which):
        loaded: dict[str, Any] = dict(manager.load(specs))
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"task {name!r} would run code that the model writes; not supported")
    return loaded


@contextlib.contextmanager
def _loading(which: str) -> Iterator[None]:
    try:
        yield
    # A task may be anybody's code, over data from anywhere.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"can't load {which} ({type(error).__name__}: {reason})") from error


def run_tasks(
    model: str,
    variants: Iterable[Variant],
    tasks: Mapping[str, Any],
    settings: TaskSettings,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Evaluate plans, one server after the other; progress goes to stderr.

    With different numbers of requests under way a server rounds differently: a loglikelihood is
    the same again to the precision of its dtype, unless it comes from the cache.

    Args:
        model: folder or hub name.
        variants: see `vllm_depthpar.launch.variants`.
        tasks: what `load_tasks` gave.
        settings: the same for all plans.
        cache: folder for the answers, by default `eval` in `files.cache_folder()`.

    Returns:
        A report, JSON-ready: versions and settings, the tasks, and for each plan its digest, its
        metrics with standard errors, and how many of its requests a server was asked.

    Raises:
        UserError: the checkpoint has no tokenizer, a server does not start, or stops answering.
    """
    cache = cache or files.cache_folder() / "eval"
    chosen = list(variants)
    rows, described = [], {}
    for number, variant in enumerate(chosen, 1):
        served.say(f"[{number}/{len(chosen)}] {variant.label}: {variant.plan}")
        started = time.monotonic()
        found, asked = _evaluate(model, variant, tasks, settings, cache)
        described = _describe(found)
        rows.append(
            {
                **asdict(variant),
                "requests_asked": asked,
                "seconds": round(time.monotonic() - started, 1),
                "results": {name: _metrics(found["results"][name]) for name in described},
            }
        )
    report = origin("depthpar")
    report["versions"]["lm_eval"] = metadata.version("lm_eval")
    path = Path(model).expanduser()
    return {
        **report,
        "model": path.name if path.is_dir() else model,
        **asdict(settings),
        "tasks": described,
        "plans": rows,
    }


def task_table(report: Mapping[str, Any]) -> str:
    """Make a Markdown table of a report: a row for each metric, a column for each plan."""
    plans = report["plans"]
    lines = []
    for task, about in report["tasks"].items():
        for metric in plans[0]["results"][task]:
            arrow = {True: " ↑", False: " ↓"}.get(about["higher_is_better"].get(metric), "")
            cells = [_cell(plan["results"][task][metric]) for plan in plans]
            lines.append([task, str(about["documents"]), metric + arrow, *cells])
    return table(["task", "documents", "metric", *(plan["label"] for plan in plans)], lines)


def _evaluate(
    model: str, variant: Variant, tasks: Mapping[str, Any], settings: TaskSettings, cache: Path
) -> tuple[dict[str, Any], int]:
    """Evaluate a plan; returns what lm-eval found, and how many requests a server was asked."""
    import aiohttp
    import numpy
    from lm_eval import evaluate
    from lm_eval.api.model import CachingLM

    from vllm_depthpar.evaluate.lm_eval_model import ServedLM

    # An error is raised, too; they log it once for each of the requests under way.
    for name in ("asyncio", "lm_eval.models.api_models", "sqlitedict.SqliteMultithread"):
        logging.getLogger(name).addFilter(_below_error)
    _prepare(tasks, settings)
    random.seed(settings.seed)
    numpy.random.seed(settings.seed)
    answers = cache / f"{_cache_key(model, variant, settings)}.sqlite"
    with contextlib.ExitStack() as stack:
        # Tasks print.
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        read_tokenizer(model)  # raises what lm-eval's client would, in one line
        args, seed = settings.server_args, settings.seed
        lm = ServedLM(lambda: served.start(stack, model, variant, args, seed), model, seed)
        stack.enter_context(keeping(answers))
        caching = CachingLM(lm, str(answers))
        stack.callback(caching.dbdict.close)
        try:
            found = evaluate(caching, dict(tasks), limit=settings.limit, log_samples=False)
        except (aiohttp.ClientError, TimeoutError) as error:
            assert lm.server is not None
            raise served.no_answer(variant, lm.server, error) from error
    return dict(found), lm.asked


@contextlib.contextmanager
def keeping(answers: Path) -> Iterator[None]:
    """Say in one line why answers can't be kept; found before the first, but for a full disk."""
    try:
        with files.writing(answers):
            answers.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(answers)) as known:
            known.execute("BEGIN IMMEDIATE")
        yield
    except sqlite3.Error as error:
        raise UserError(
            f"answers can't be kept in {answers} ({error}); allowed: a file that can be read and "
            f"written, with space; DEPTHPAR_CACHE=FOLDER names a place"
        ) from error


def _prepare(tasks: Mapping[str, Any], settings: TaskSettings) -> None:
    """Do to tasks what lm-eval's `simple_evaluate` does before it calls `evaluate`."""
    for task in tasks["tasks"].values():
        own = task.get_config("num_fewshot")
        wanted = own if settings.num_fewshot is None or own == 0 else settings.num_fewshot
        task.set_config(key="num_fewshot", value=wanted or 0)
        task.set_fewshot_seed(seed=settings.seed)


def _cache_key(model: str, variant: Variant, settings: TaskSettings) -> str:
    """Name the answers that can stand for each other. Their prompts are lm-eval's part."""
    parts = served.identity(model, variant, settings.server_args, "lm_eval")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _describe(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Say what is the same for all plans, of each task and group."""
    return {
        name: {
            "version": found["versions"].get(name),
            "num_fewshot": found["n-shot"].get(name),
            "documents": result["sample_len"],
            "higher_is_better": found["higher_is_better"].get(name, {}),
        }
        for name, result in found["results"].items()
    }


def _metrics(result: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Make {metric: {"value", "stderr"}} of lm-eval's {"acc,none": ..., "acc_stderr,none": ...}."""
    metrics = {}
    for key, value in result.items():
        name, comma, filtered = key.partition(",")
        if comma and not name.endswith("_stderr"):
            label = name if filtered == "none" else f"{name} ({filtered})"
            stderr = result.get(f"{name}_stderr,{filtered}")
            metrics[label] = {"value": _number(value), "stderr": _number(stderr)}
    return metrics


def _number(value: object) -> float | None:
    """Read a number that JSON has; lm-eval says "N/A" where there is none."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def _cell(metric: Mapping[str, float | None]) -> str:
    value, stderr = metric["value"], metric["stderr"]
    if value is None:
        return "-"
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def _below_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


def _is_group(path: Path) -> bool:
    return re.search(r"^group:", path.read_text(errors="replace"), re.MULTILINE) is not None
