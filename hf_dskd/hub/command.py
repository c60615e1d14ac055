"""The command `hf-dskd push`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ..errors import UserError


HELP = """\
hf-dskd push RUN REPO [--option VALUE ...]

Pushes a finished run to the hub, in one commit: the student or its adapter with config, generation config, tokenizer
and chat template, and a model card made of the run's files, with its curves and its alignment.

  RUN                what `hf-dskd train` wrote
  REPO               NAMESPACE/NAME, or NAME in your own namespace; it is made if need be
  --private          a new repository is private; one that is there and public is refused
  --auxiliary        projectors and discriminator too, in auxiliary/
  --no_alignment     without the picture of the alignment, which shows the text of an example: the first held-out one,
                     or else the first of the training data
  --replace          deletes what else the repository holds; needed where that is another model, or this one by another
                     method (of an earlier push of the same, what is left over always goes)
  --revision         branch (main)
  --create_pr        opens a pull request
  --commit_message   of the commit
  --dry_run          writes what would be pushed into this folder, and only reads from the hub: licences, your name;
                     with HF_HUB_OFFLINE=1 nobody is contacted, and licences are not looked up

The token is that of `hf auth login` or of HF_TOKEN, and must have the role "write". Stopped, the same command goes on:
files that the hub has already aren't sent again, and nothing shows before all of them are there.

    hf-dskd push runs/student --dry_run runs/pushed
    hf-dskd push runs/student student-of-qwen --private
    hf-dskd push runs/student my-lab/student-of-qwen --auxiliary --replace"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `hf-dskd push --help` lists the options")


def main(arguments: Sequence[str]) -> int:
    """`hf-dskd push`: prints where the model is, and returns the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(HELP)
        return 0
    parser = _Parser(prog="hf-dskd push", allow_abbrev=False, add_help=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("repo", nargs="?")
    for name in ("private", "auxiliary", "no_alignment", "replace", "create_pr"):
        parser.add_argument(f"--{name}", action="store_true")
    for name in ("revision", "commit_message"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--dry_run", type=Path)
    given = parser.parse_intermixed_args(list(arguments))
    contents = {"auxiliary": given.auxiliary, "alignment": not given.no_alignment}
    if given.dry_run is not None:
        from .folder import write_model_folder
        from .names import check_repo_id
        from .push import full_name

        if given.repo is not None:
            check_repo_id(given.repo, "REPO")
        print(write_model_folder(given.run, given.dry_run, given.repo and full_name(given.repo), **contents))
        return 0
    if given.repo is None:
        raise UserError("REPO is not set: name the repository on the hub, as NAMESPACE/NAME, after the run's folder")

    from .push import push_run

    try:
        commit = push_run(
            given.run,
            given.repo,
            private=given.private or None,
            **contents,
            revision=given.revision,
            commit_message=given.commit_message,
            replace=given.replace,
            create_pr=given.create_pr,
        )
    except KeyboardInterrupt:
        print("stopped; nothing was published, and the same command goes on", file=sys.stderr)
        return 130
    print(commit.pr_url or commit.commit_url)
    return 0
