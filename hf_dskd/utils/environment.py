"""What a run was made with: command, machine, versions."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..redaction import redact_words


PACKAGES = (
    *("torch", "transformers", "accelerate", "datasets", "peft", "trl", "bitsandbytes", "tokenizers"),
    "rouge-score",
)


def check_installed(package: str, extra: str, what: str) -> None:
    """Raises a [`UserError`] that names the command of pip unless `package`, which only `what` needs, is there."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{what} needs the package {package}: pip install 'hf-dskd[{extra}]', or pip install {package}"
        )


def command_line() -> str:
    """Gives the command of this process, without the folder that the program lies in, and without a token."""
    path = Path(sys.argv[0])
    program = "python -m hf_dskd.cli" if path.parts[-2:] == ("cli", "__main__.py") else path.name
    return f"{program} {shlex.join(redact_words(sys.argv[1:]))}".rstrip()


def versions() -> dict[str, str]:
    """Lists the versions of hf_dskd (with its commit where it is no release), Python, and what results depend on."""
    from .. import __version__

    commit = own_commit()
    own = __version__ if commit is None else f"{__version__}+g{commit}"
    found = {"hf_dskd": own, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def own_commit() -> str | None:
    """
    Finds the commit that hf_dskd is of, 12 digits, with `.dirty` where files were changed; `None` for a release.

    Either it lies in a checkout of its own, or pip was given a repository and wrote down the commit.
    """
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / ".git").exists():
        git = ["git", "-C", str(checkout)]
        # Another repository, that it was copied into, may not keep it.
        kept = [*git, "ls-files", "--error-unmatch", "hf_dskd/__init__.py"]
        command = [*git, "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=.dirty"]
        try:
            if subprocess.run(kept, capture_output=True, timeout=10).returncode:
                return None
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() or None
    try:
        origin = json.loads(distribution("hf-dskd").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return None
    return (origin.get("vcs_info") or {}).get("commit_id", "")[:12] or None


def hardware(processes: int = 1) -> dict[str, Any]:
    """Lists processor, cores, memory in GB (10^9 bytes) and GPUs of this machine, and the run's processes."""
    import psutil  # comes with accelerate
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(f"{properties.name} {properties.total_memory / 1e9:.0f} GB")
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": gpus,
        "processes": processes,
    }


def in_words(found: dict[str, Any]) -> str:
    """Puts into one line what [`hardware`] found."""
    parts = [*found["gpus"], f"{found['cores']} cores of {found['cpu']}", f"{found['memory_gb']:g} GB"]
    return ", ".join([*parts, f"{found['processes']} process{'es' if found['processes'] > 1 else ''}"])


def processor() -> str:
    """Names the processor; on Linux `platform` knows only the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
