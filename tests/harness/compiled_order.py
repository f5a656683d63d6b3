"""Whether compiled code reads buffers after they are written: looks at Inductor's own schedules."""

from __future__ import annotations

from functools import wraps
from typing import Any

early_reads: list[str] = []


def watch() -> None:
    """Note in `early_reads` every read that a graph compiled from now on makes before the write
    that it depends on, as its dependencies were before anything was fused. Idempotent."""
    from torch._inductor.scheduler import Scheduler

    if hasattr(Scheduler._init, "__wrapped__"):
        return
    compute_ancestors, init = Scheduler.compute_ancestors, Scheduler._init

    @wraps(compute_ancestors)
    def noting(self: Any) -> None:
        compute_ancestors(self)
        if not hasattr(self, "written_before"):
            self.written_before = {
                node.get_name(): {
                    self.name_to_buf[read.name].defining_op_name()
                    for read in node.unmet_dependencies
                }
                for node in self.nodes
            }

    @wraps(init)
    def comparing(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        place = {
            name: at for at, node in enumerate(self.nodes) for name in node.get_operation_names()
        }
        early_reads.extend(
            f"{reader} before {writer}"
            for reader, writers in self.written_before.items()
            for writer in writers
            # What nobody needs is in no place.
            if place.get(reader, len(place)) < place.get(writer, -1)
        )

    Scheduler.compute_ancestors, Scheduler._init = noting, comparing
