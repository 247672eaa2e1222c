"""Walls: what may import what, and what must stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = {
    "training": ROOT / "training", "export": ROOT / "export", "serving": ROOT / "serving",
    "audit": ROOT / "sfd_deploy" / "audit", "adopt": ROOT / "sfd_deploy" / "adopt",
}  # fmt: skip


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_no_stage_imports_another():
    found = [
        (file.relative_to(ROOT).as_posix(), name)
        for stage, folder in STAGES.items()
        for file in folder.rglob("*.py")
        for name in imported(file)
        for other in STAGES
        if other != stage and f"{name}.".startswith(f"sfd_deploy.{other}.")
    ]
    assert found == []
    assert "sfd_deploy.training.losses" in imported(ROOT / "training" / "loop.py")  # the check sees imports at all


def test_the_command_line_loads_no_heavy_library():
    code = (
        "import sys, importlib, sfd_deploy.cli.main as m\n"
        "[importlib.import_module(f'sfd_deploy.cli.{c}') for c in m.COMMANDS]\n"
        "print([n for n in ('torch', 'diffusers', 'onnx', 'onnxruntime', 'tensorrt_rtx_bindings', 'tritonclient', "
        "'scipy', 'numpy') if n in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert output.stdout.strip() == "[]"


def test_nothing_loads_pickles_or_unsafe_yaml():
    sources = [
        path for folder in ("sfd_deploy", "training", "export", "serving") for path in (ROOT / folder).rglob("*.py")
    ]
    opened = [path for path in sources if "torch.load(" in path.read_text()]
    assert [path.relative_to(ROOT).as_posix() for path in opened] == ["sfd_deploy/adopt/child.py"]
    assert opened[0].read_text().count("weights_only=True") == opened[0].read_text().count("torch.load(") == 1
    banned = ("yaml.load(", "allow_pickle=True", "trust_remote_code")
    assert [(path.name, word) for path in sources for word in banned if word in path.read_text()] == []
    assert [path.name for path in sources if imported(path) & {"pickle", "joblib", "dill"}] == []
