"""``python -m sfd_deploy``, which is what process launchers start."""

from __future__ import annotations

from sfd_deploy.cli.main import run

if __name__ == "__main__":
    run()
