"""A Python that has imported everything and forks for every command, which then takes no seconds of imports."""

from __future__ import annotations

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
# Where the tests' modules are.
PATHS = (*sorted({str(path.parent) for path in (ROOT / "tests").rglob("test_*.py")}), str(ROOT))
# Nothing here computes before it forks: a thread pool wouldn't come along.
SERVER = """
import atexit, gc, json, os, runpy, signal, sys, traceback
import accelerate, datasets, matplotlib.figure, peft, torch, transformers, trl
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
import hf_dskd.cli, hf_dskd.run, hf_dskd.report.one, hf_dskd.analysis.record, hf_dskd.evaluation.protocol
from hf_dskd import DSKDConfig, DSKDTrainer

def work(job, rank):
    os.chdir(job["cwd"])
    for number, path in ((1, job["out"]), (2, job["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    signal.alarm(job["timeout"])
    os.environ |= {**job["environment"], **rank}
    sys.path[:0] = job["paths"]
    sys.argv = job["words"]
    if job["code"] is not None:
        exec(compile(job["code"], "<code>", "exec"), {"__name__": "__main__"})
    elif sys.argv[0] == "hf-dskd":
        sys.exit(hf_dskd.cli.main())
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")

# before
gc.collect()
gc.freeze()
def run(job, rank):
    code = 1
    try:
        work(job, rank)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

for line in sys.stdin:
    job, children, code = json.loads(line), [], 0
    for rank in job["ranks"]:
        child = os.fork()
        if child == 0:
            run(job, rank)
        children.append(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status and not code:
            # As a launcher does; the others would wait for the one that failed.
            code = os.waitstatus_to_exitcode(status)
            for other in children:
                os.kill(other, signal.SIGKILL)
    print(code, file=sys.__stdout__, flush=True)
"""


class WarmPython:
    """
    Runs `hf-dskd …`, `recipes/….py …` and pieces of code, one after the other.

    Args:
        environment: Of all of them, whole.
        before: Code to run once, before the first of them.
    """

    def __init__(self, environment: Mapping[str, str], before: str = ""):
        self.folder = tempfile.TemporaryDirectory()
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER.replace("# before", before)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> WarmPython:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()
        self.folder.cleanup()

    def __call__(
        self,
        words: list[str],
        cwd: Path,
        code: str | None = None,
        timeout: int = 400,
        environment: Mapping[str, str] | None = None,
        paths: tuple[str, ...] = (),
        ranks: int = 1,
    ) -> subprocess.CompletedProcess:
        """
        As `subprocess.run` of a command, or of `python -c` with `code`, and its text.

        `environment` comes on top, and is no use for what libraries read when they are imported. More than one of
        `ranks` find the variables of `torchrun`.
        """
        out, err = (Path(self.folder.name) / name for name in ("out", "err"))
        out.write_text("")
        err.write_text("")
        job = {
            **{"words": words, "cwd": str(cwd), "code": code, "timeout": timeout, "out": str(out), "err": str(err)},
            **{
                "environment": dict(environment or {}),
                "paths": paths,
                "ranks": [{}] if ranks == 1 else of_ranks(ranks),
            },
        }
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        returned = int(self.server.stdout.readline())
        return subprocess.CompletedProcess(words, returned, out.read_text(), err.read_text())


def of_ranks(count: int) -> list[dict[str, str]]:
    """What `torchrun` tells each of `count` processes of one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    return [{name: str(value) for name, value in rank.items()} for rank in ranks]


@functools.cache
def _server() -> WarmPython:
    """One for all tests of this process."""
    server = WarmPython({**os.environ, "HF_HUB_OFFLINE": "1"}).__enter__()
    atexit.register(server.__exit__)
    return server


def forked(code: str, *words: object, ranks: int = 1, cwd: Path = ROOT, **options: Any) -> subprocess.CompletedProcess:
    """Runs `code`, which finds the tests' modules, with `words` as arguments, in `ranks` processes."""
    return _server()(["-c", *map(str, words)], cwd, code, ranks=ranks, paths=PATHS, **options)


def run_command(*words: object, cwd: Path = ROOT, **options: Any) -> subprocess.CompletedProcess:
    """Runs `hf-dskd …` or a script with its arguments."""
    return _server()(list(map(str, words)), cwd, **options)


def ranks_of(module: str, call: str, folder: Path, ranks: int = 2, timeout: int = 600) -> list[Any]:
    """
    Runs `call` of a test module in `ranks` processes and returns what it returns on each, by way of JSON.

    `call` may name `folder` and `ranks`.
    """
    code = (
        f"import json, os, sys\nimport {module}\nfrom hf_dskd.launch import leave_together\n"
        "folder, ranks = sys.argv[1], int(sys.argv[2])\n"
        f"found = {module}.{call}\n"
        "with open(f'{folder}/{os.environ.get(\"RANK\", 0)}.json', 'w') as file:\n    json.dump(found, file)\n"
        "leave_together()\n"
    )
    done = forked(code, folder, ranks, ranks=ranks, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
