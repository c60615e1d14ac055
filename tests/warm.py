"""A Python that has imported everything and forks for every command, which then takes no seconds of imports."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
# Nothing here computes before it forks: a thread pool wouldn't come along.
SERVER = """
import atexit, gc, json, os, runpy, signal, sys, traceback
import accelerate, datasets, matplotlib.figure, peft, torch, transformers, trl
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
import hf_dskd.cli, hf_dskd.run, hf_dskd.report.one, hf_dskd.analysis.record, hf_dskd.evaluation.protocol
from hf_dskd import DSKDConfig, DSKDTrainer

def work(job):
    os.chdir(job["cwd"])
    for number, path in ((1, job["out"]), (2, job["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.alarm(job["timeout"])
    sys.argv = job["words"]
    if job["code"] is not None:
        exec(compile(job["code"], "<code>", "exec"), {"__name__": "__main__"})
    elif sys.argv[0] == "hf-dskd":
        sys.exit(hf_dskd.cli.main())
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")

gc.collect()
gc.freeze()
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work(json.loads(line))
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.__stdout__, flush=True)
"""


class WarmPython:
    """
    Runs `hf-dskd …`, `recipes/….py …` and pieces of code, one after the other.

    Args:
        environment: Of all of them, whole.
    """

    def __init__(self, environment: Mapping[str, str]):
        self.folder = tempfile.TemporaryDirectory()
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
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
        self, words: list[str], cwd: Path, code: str | None = None, timeout: int = 400
    ) -> subprocess.CompletedProcess:
        """As `subprocess.run` of a command, or of `python -c` with `code`, and its text."""
        out, err = (Path(self.folder.name) / name for name in ("out", "err"))
        job = {"words": words, "cwd": str(cwd), "code": code, "timeout": timeout, "out": str(out), "err": str(err)}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        returned = int(self.server.stdout.readline())
        return subprocess.CompletedProcess(words, returned, out.read_text(), err.read_text())
