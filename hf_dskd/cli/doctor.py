"""
Whether this machine, and a run, have what they need.

A line for each finding: ok, a note, or a problem with its remedy. Nothing is trained, and no weights are loaded or
fetched. The exit code is 1 if there is a problem.

    hf-dskd doctor
    hf-dskd doctor --config recipes/gpt2_qwen.yaml
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, replace

from ..redaction import without_values


USAGE = "[--config FILE.yaml] [--json]"


def add_arguments(parser: ArgumentParser) -> None:
    """Tells the parser what the command takes."""
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="a YAML file as for `hf-dskd train`: looks at its models, tokenizers, data, output folder and memory",
    )
    parser.add_argument("--json", action="store_true", help="a JSON object a line instead: check, status, text")


def run(given: Namespace) -> int:
    """Prints a line for each finding, and returns 1 if one is a problem."""
    from ..doctor import NOTE, PROBLEM, examine

    statuses = []
    for finding in examine(given.config):
        # People paste this into reports.
        finding = replace(finding, text=without_values(finding.text))
        statuses.append(finding.status)
        line = f"{finding.status:8}{finding.check:11} {finding.text}"
        print(json.dumps(asdict(finding), ensure_ascii=False) if given.json else line, flush=True)
    count = statuses.count(PROBLEM)
    if not given.json:
        print(f"{count or 'no'} problem{'' if count == 1 else 's'}, {statuses.count(NOTE)} notes")
    return 1 if count else 0
