"""
Check what only a GPU can show, in 8 minutes: whether the kernels are right, how fast they are, where the host waits.

    make gpu
    make gpu PARTS=bench,gluon OUT=runs/gpu
    python3 recipes/benchmarks/gpu_check.py runs/gpu --parts correct

env      the machine: a matrix product, a copy, products with rows of 50,257 numbers
correct  every tile and mask of StreamKL's kernels, and the autotuner, against float64
bench    StreamKL's kernels from 4K to 64K beside the paper's milliseconds, with the best tiles
gluon    the forward pass written for Hopper (gluon_forward.py)
loss     the loss from hidden states, compiled and not, in two budgets
syncs    runs of tiny models: how often the host waits for the GPU in a micro-batch
step     a whole step of GPT-2 from Qwen1.5-1.8B, with a live and a cached teacher

Each part is a process of its own with a limit of seconds, so that one that fails costs its own figures only. Figures
are the lines that begin with ##, and gpu_check.json in the folder (by default the variable OUT, or runs/gpu_check);
all that the parts print is in its `log`. Nothing has to be installed but torch, triton, transformers and accelerate:
what else is missing is taken from .wheels, which `make gpu-wheels` fills on a machine with an index.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
# Seconds that each part may take.
PARTS = {"env": 40, "correct": 120, "bench": 110, "gluon": 50, "loss": 100, "syncs": 60, "step": 150}
# No part begins this many seconds after the first one, and none goes on.
DEADLINE = 440
LEAST_SECONDS = 20
SHOWN = re.compile(r"^##|Error|error:")


def missing() -> str | None:
    """Say why nothing can be checked here, if so."""
    if importlib.util.find_spec("torch") is None:
        return "no GPU check: this Python has no torch"
    import torch

    if not torch.cuda.is_available():
        return f"no GPU: torch {torch.__version__} sees none here, so that nothing was checked"
    return None


def carried_packages(folder: Path = ROOT / ".wheels") -> list[str]:
    """Install the wheels in `folder`, if there are any, and return where to import them from."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        return []
    target = tempfile.mkdtemp(prefix="gpu_check")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*install, "--no-cache-dir", "--upgrade", "--target", target, *wheels], check=True)
    return [target]


def run_part(name: str, seconds: float, folder: Path, environment: dict[str, str]) -> int | str:
    """Run one part, print its figures and errors, and return its exit status."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_parts.py")), str(folder), name]
    with (folder / "log").open("ab") as log:
        start = log.tell()
        # A session of its own: a part that overruns ends with every process that it started.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        status: int | str
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = "overran"
    printed = (folder / "log").read_bytes()[start:].decode(errors="replace")
    for line in filter(SHOWN.search, printed.splitlines()):
        print(line[:400], flush=True)
    return status


def check(folder: Path, parts: list[str]) -> bool:
    """Run the parts one after the other; tell whether all of them succeeded."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [
        *map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "kernels")),
        *carried_packages(),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    began, succeeded = time.perf_counter(), True
    for name in parts:
        start = time.perf_counter()
        left = DEADLINE - (start - began)
        if left < LEAST_SECONDS:
            status: int | str = "no time left"
        else:
            status = run_part(name, min(PARTS[name], left), folder, environment)
        print(f"## == {name}: {status}, {time.perf_counter() - start:.0f} s", flush=True)
        succeeded = succeeded and status == 0
    return succeeded


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("OUT") or "runs/gpu_check"
    parser.add_argument("folder", nargs="?", default=default, help=f"for figures and log ({default})")
    parser.add_argument("--parts", default="", metavar="NAMES", help=f"of {','.join(PARTS)} (all)")
    args = parser.parse_args(arguments)
    args.parts = args.parts.split(",") if args.parts else list(PARTS)
    for name in args.parts:
        if name not in PARTS:
            parser.error(f"--parts {name!r} is unknown: one of {', '.join(PARTS)}")
    return args


def main() -> None:
    args = parse()
    reason = missing()
    if reason is not None:
        print(f"## {reason}")
        return
    sys.exit(0 if check(Path(args.folder).resolve(), args.parts) else 1)


if __name__ == "__main__":
    main()
