"""Latency and throughput table of a run as Markdown: ``python benchmarks/latency.py [RUN]``."""

from __future__ import annotations

import sys

from sfd_deploy.bench import latency, markdown
from sfd_deploy.runs import Run

if __name__ == "__main__":
    sys.stdout.write(markdown(latency(Run.named(next(iter(sys.argv[1:]), None)), batches=(1, 16, 64))) + "\n")
