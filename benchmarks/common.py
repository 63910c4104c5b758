"""What the benchmarks share: the facts that numbers depend on, and how results are written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from expedite_d2 import _ext


def environment(device: str) -> dict[str, Any]:
    """Device, versions and commit."""
    root = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    on_gpu = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "extension": _ext.build_info(),
        "commit": commit or None,
    }


def write_json(path: str, results: dict[str, Any]) -> None:
    """Writes the whole file or nothing."""
    partial = Path(f"{path}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(partial, path)
