"""`depthpar report`: what was measured of plans, on one page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_depthpar.cli.types import out_file
from vllm_depthpar.report import gather, records
from vllm_depthpar.report.html import write
from vllm_depthpar.util import files


def add(commands: Any) -> None:
    """Register the subcommand."""
    report = commands.add_parser("report", help="show what was measured of plans on one page")
    report.add_argument(
        "files",
        type=files.expanded,
        nargs="+",
        metavar="FILE.json",
        help=f"{records.ALLOWED}; the first says whose plans these are",
    )
    report.add_argument(
        "--out",
        type=out_file(suffix=".html"),
        required=True,
        metavar="FILE.html",
        help="the page: one file, which loads nothing",
    )
    report.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> str:
    names = _names(args.files)
    read = [
        (name, records.read(files.read_json(path, records.ALLOWED), str(path)))
        for name, path in zip(names, args.files, strict=True)
    ]
    page = gather.page(read)
    write(args.out, page)
    return f"report: {args.out}   {len(page.points)} plans of {page.model}"


def _names(paths: list[Path]) -> list[str]:
    """Name files as shortly as tells them apart: many are called recovery.json."""
    short = [path.name for path in paths]
    return [
        name if short.count(name) == 1 else "/".join(path.parts[-2:])
        for name, path in zip(short, paths, strict=True)
    ]
