"""The table the project exists for: does each artefact still forget, and at what cost? Markdown.

``python benchmarks/forgetting.py [RUN]``: per artefact the forget bound, McNemar's exact test against
the FP32 graph on the same latents, retained accuracy, size; then latency of the same run.
"""

from __future__ import annotations

import sys

from sfd_deploy.bench import forgetting, latency, markdown
from sfd_deploy.embedded import judges_for
from sfd_deploy.measure.judges import open_judge
from sfd_deploy.models.generator import labels_of
from sfd_deploy.runs import Run

if __name__ == "__main__":
    run = Run.named(next(iter(sys.argv[1:]), None))
    judges = [open_judge(folder) for folder in judges_for(labels_of(run.generator()).class_names)]
    sys.stdout.write(markdown(forgetting(run, judges)) + "\n\n" + markdown(latency(run)) + "\n")
