"""Writes the dashboard: python dashboard.py > dashboards/depthpar.json

Queries keep the label `job`, one line for each deployment, so that a plain server and a
restructured one stand in the same panels; the row "Two deployments" divides one by the other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

COLUMNS, HEIGHT = 24, 8
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

# What the variables at the top of the dashboard choose.
MODEL = 'model_name=~"$model"'
CHOSEN = f'job=~"$job", {MODEL}'
BASELINE = f'job="$baseline", {MODEL}'
CANDIDATE = f'job="$candidate", {MODEL}'
BOTH = f'job=~"$baseline|$candidate", {MODEL}'

TTFT = "vllm:time_to_first_token_seconds"
ITL = "vllm:inter_token_latency_seconds"
TPOT = "vllm:request_time_per_output_token_seconds"
E2E = "vllm:e2e_request_latency_seconds"
QUEUED = "vllm:request_queue_time_seconds"
GENERATED = "vllm:generation_tokens_total"
FORWARD = "vllm:depthpar_forward_seconds"
ALL_REDUCE = "vllm:depthpar_all_reduce_seconds_total"
# Of the passes that those were in; of others none is timed.
AROUND = "vllm:depthpar_all_reduce_forward_seconds_total"

NOT_IN_GRAPHS = (
    "No data from GPUs whose passes are CUDA graphs: no Python runs for an all-reduce in a graph,"
    " and an event in it would be recorded at every replay. There with --enforce-eager, and in"
    " passes of more tokens than the largest graph."
)


def gauge(series: str, *labels: str, how: str = "sum", by: str = "job") -> str:
    """A gauge over all engines and instances of a deployment."""
    return f"{how} by ({by}) ({series}{{{', '.join((CHOSEN, *labels))}}})"


def rate(series: str, *labels: str, by: str = "job", chosen: str = CHOSEN) -> str:
    """A counter's growth per second, summed over engines and instances."""
    return f"sum by ({by}) (rate({series}{{{', '.join((chosen, *labels))}}}[$__rate_interval]))"


def rate_or_zero(series: str, *labels: str, by: str, chosen: str) -> str:
    """`rate` of events whose series is not there before the first of them: 0 until then, in every
    group that the series has with any labels."""
    every = rate(series, by=by, chosen=chosen)
    return f"{rate(series, *labels, by=by, chosen=chosen)} or 0 * {every}"


def quantile(q: float, histogram: str, *labels: str, chosen: str = CHOSEN) -> str:
    """A quantile over all engines and instances."""
    buckets = rate(f"{histogram}_bucket", *labels, by="job, le", chosen=chosen)
    return f"histogram_quantile({q}, {buckets})"


def quantiles(histogram: str) -> dict[str, str]:
    return {f"{{{{job}}}} p{100 * q:g}": quantile(q, histogram) for q in (0.5, 0.9, 0.99)}


def ratio(above: str, below: str) -> str:
    """Of two deployments, whose labels differ."""
    return f"sum({above}) / sum({below})"


@dataclass(frozen=True)
class Panel:
    """One panel: what it draws, as PromQL by legend."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    description: str = ""
    width: int = 8

    def json(self, number: int, x: int, y: int) -> dict[str, Any]:
        """Grafana's form of it, at a place in the grid."""
        table = self.kind == "table"
        targets = [
            {
                "refId": chr(ord("A") + at),
                "datasource": DATASOURCE,
                "expr": query,
                "legendFormat": legend,
                "instant": self.kind != "timeseries",
                "range": self.kind == "timeseries",
                "format": "table" if table else "time_series",
            }
            for at, (legend, query) in enumerate(self.queries.items())
        ]
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": DATASOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": HEIGHT},
            "fieldConfig": {"defaults": {"unit": self.unit}, "overrides": []},
            "options": {} if self.kind != "timeseries" else {"tooltip": {"mode": "multi"}},
            "targets": targets,
            # Without it a table has a column for the time of the scrape and one of ones.
            "transformations": [
                {
                    "id": "organize",
                    "options": {"excludeByName": {"Time": True, "Value": True}},
                }
            ]
            if table
            else [],
        }


def faster(what: str, histogram: str) -> Panel:
    return Panel(
        f"{what} p50: times faster",
        {
            "$candidate": ratio(
                quantile(0.5, histogram, chosen=BASELINE),
                quantile(0.5, histogram, chosen=CANDIDATE),
            )
        },
        unit="suffix:×",
        kind="stat",
        description="Baseline's over candidate's. Compare under the same load only.",
    )


def beside(what: str, histogram: str) -> Panel:
    return Panel(
        f"{what} p50 and p99",
        {
            "{{job}} p50": quantile(0.5, histogram, chosen=BOTH),
            "{{job}} p99": quantile(0.99, histogram, chosen=BOTH),
        },
        unit="s",
    )


ROWS = {
    "Latency": [
        Panel("Time to first token", quantiles(TTFT), unit="s"),
        Panel("Inter-token latency", quantiles(ITL), unit="s"),
        Panel(
            "Time per output token",
            quantiles(TPOT),
            unit="s",
            description="The mean of a request's inter-token latencies; quantiles over requests.",
        ),
        Panel("End-to-end latency", quantiles(E2E), unit="s"),
        Panel(
            "Time in the queue",
            quantiles(QUEUED),
            unit="s",
            description="vLLM counts times up to 0.3 s together, and quantiles are interpolated:"
            " 0.15, 0.27 and 0.297 s may mean that nobody waits.",
        ),
        Panel(
            "Requests that end, by reason",
            {
                "{{job}} {{finished_reason}}": rate(
                    "vllm:request_success_total", by="job, finished_reason"
                )
            },
            unit="reqps",
        ),
    ],
    "Throughput and load": [
        Panel(
            "Tokens per second",
            {
                "{{job}} generated": rate(GENERATED),
                "{{job}} prompt": rate("vllm:prompt_tokens_total"),
            },
        ),
        Panel(
            "Requests in the server",
            {
                "{{job}} running": gauge("vllm:num_requests_running"),
                "{{job}} waiting": gauge("vllm:num_requests_waiting"),
            },
        ),
        Panel(
            "KV cache use",
            {"{{job}}": gauge("vllm:kv_cache_usage_perc", how="max")},
            unit="percentunit",
            description="Of the fullest engine.",
        ),
        Panel("Preemptions per second", {"{{job}}": rate("vllm:num_preemptions_total")}),
        Panel(
            "Prefix cache hits",
            {
                "{{job}}": f"{rate('vllm:prefix_cache_hits_total')}"
                f" / {rate('vllm:prefix_cache_queries_total')}"
            },
            unit="percentunit",
        ),
        Panel(
            "HTTP 5xx per second",
            {
                "{{job}} {{handler}}": rate_or_zero(
                    "http_requests_total",
                    'status="5xx"',
                    by="job, handler",
                    chosen='job=~"$job"',
                )
            },
            unit="reqps",
        ),
    ],
    "Plan": [
        Panel(
            "Plans served",
            {
                "": gauge(
                    "vllm:depthpar_plan_info",
                    how="max",
                    by="job, model_name, name, digest, source, effective_depth,"
                    " tensor_parallel_size",
                )
            },
            kind="table",
            width=16,
            description="Deployments without a plan, plain ones, are not in it.",
        ),
        Panel(
            "Layers by how they run",
            {"{{job}} {{kind}}": gauge("vllm:depthpar_layers", how="max", by="job, kind")},
            kind="bargauge",
        ),
        Panel(
            "All-reduces of a forward pass",
            {
                "{{job}} all": gauge("vllm:depthpar_all_reduces_per_forward", how="max"),
                "{{job}} hidden by the plan": gauge(
                    "vllm:depthpar_hidden_all_reduces_per_forward", how="max"
                ),
            },
            kind="stat",
        ),
        Panel(
            "Weights saved on each rank",
            {"{{job}}": gauge("vllm:depthpar_weight_bytes_saved", how="max")},
            unit="bytes",
            kind="stat",
            description="Beside the checkpoint with every layer.",
        ),
        Panel(
            "KV cache saved per token on each rank",
            {"{{job}}": gauge("vllm:depthpar_kv_bytes_per_token_saved", how="max")},
            unit="bytes",
            kind="stat",
        ),
    ],
    "Communication": [
        Panel(
            "Decoding time in all-reduces",
            {
                f"{{{{job}}}} {kind}": rate(ALL_REDUCE, 'phase="decode"', f'kind="{kind}"')
                + " / "
                + rate(AROUND, 'phase="decode"')
                for kind in ("exposed", "hidden")
            },
            unit="percentunit",
            description="Exposed: rank 0 sends, waits or adds. Hidden: one is on its way while it"
            f" computes; on a CPU an upper bound. {NOT_IN_GRAPHS}",
        ),
        Panel(
            "Mean exposed time of one all-reduce",
            {
                "{{job}} {{phase}}": rate(ALL_REDUCE, 'kind="exposed"', by="job, phase")
                + " / "
                + rate("vllm:depthpar_all_reduces_total", by="job, phase")
            },
            unit="s",
            description=NOT_IN_GRAPHS,
        ),
        Panel(
            "Decoding step, p50 and p99",
            {
                f"{{{{job}}}} p{100 * q:g}": quantile(q, FORWARD, 'phase="decode"')
                for q in (0.5, 0.99)
            },
            unit="s",
            description="One forward pass of rank 0, without sampling; on a GPU between events"
            " around it, CUDA graphs included. Quantiles are interpolated.",
        ),
    ],
    "Two deployments: $candidate beside $baseline": [
        beside("TTFT", TTFT),
        beside("Inter-token latency", ITL),
        Panel("Generated tokens per second", {"{{job}}": rate(GENERATED, chosen=BOTH)}),
        faster("TTFT", TTFT),
        faster("Inter-token latency", ITL),
        Panel(
            "Generated tokens per second: times more",
            {
                "$candidate": ratio(
                    rate(GENERATED, chosen=CANDIDATE), rate(GENERATED, chosen=BASELINE)
                )
            },
            unit="suffix:×",
            kind="stat",
            description="Candidate's over baseline's: the load's ratio, where neither is full.",
        ),
    ],
}


def variable(name: str, label: str, of: str, several: bool, current: str) -> dict[str, Any]:
    """A variable with the values of a label of vLLM's metrics."""
    query = f"label_values(vllm:num_requests_running, {of})"
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": "Prometheus"},
        "refresh": 2,
        "sort": 1,
        "multi": several,
        "includeAll": several,
        "current": {"text": "All", "value": "$__all"}
        if several
        else {"text": current, "value": current},
    }


VARIABLES: list[dict[str, Any]] = [
    {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
    variable("job", "Deployments", "job", several=True, current=""),
    variable("model", "Models", "model_name", several=True, current=""),
    variable("baseline", "Baseline", "job", several=False, current="vllm-plain"),
    variable("candidate", "Candidate", "job", several=False, current="vllm-depthpar"),
]


def panels() -> list[dict[str, Any]]:
    """All rows from the top down, their panels from left to right."""
    placed: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        placed.append(
            {"id": len(placed) + 1, "type": "row", "title": title, "gridPos": place, "panels": []}
        )
        x, y = 0, y + 1
        for panel in row:
            if x + panel.width > COLUMNS:
                x, y = 0, y + HEIGHT
            placed.append(panel.json(len(placed) + 1, x, y))
            x += panel.width
        y += HEIGHT
    return placed


def dashboard() -> dict[str, Any]:
    return {
        "uid": "vllm-depthpar",
        "title": "vllm-depthpar",
        "tags": ["vllm"],
        "schemaVersion": 39,
        "editable": True,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": VARIABLES},
        "panels": panels(),
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1, ensure_ascii=False))
