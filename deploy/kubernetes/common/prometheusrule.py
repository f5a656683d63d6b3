"""Writes the alerts for the Prometheus operator: python prometheusrule.py > prometheusrule.yaml"""

from __future__ import annotations

from pathlib import Path
from textwrap import indent

ALERTS = Path(__file__).parents[2] / "prometheus/alerts.yml"

HEAD = """\
# Generated from ../../prometheus/alerts.yml by prometheusrule.py.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: vllm-depthpar
spec:
"""

if __name__ == "__main__":
    print(HEAD + indent(ALERTS.read_text(), "  "), end="")
