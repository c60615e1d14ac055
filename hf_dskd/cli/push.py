"""
The student with a model card to the hub, in one commit.

Pushes a finished run: the student or its adapter with config, generation config, tokenizer and chat template, and a
model card made of the run's files, with its curves and its alignment.

The token is that of `hf auth login` or of HF_TOKEN, and must have the role "write". Stopped, the same command goes on:
files that the hub has already aren't sent again, and nothing shows before all of them are there.

    hf-dskd push runs/student --dry_run runs/pushed
    hf-dskd push runs/student student-of-qwen --private
    hf-dskd push runs/student my-lab/student-of-qwen --auxiliary --replace
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..errors import UserError


USAGE = "RUN REPO [--option VALUE ...]"


def add_arguments(parser: ArgumentParser) -> None:
    """Tells the parser what the command takes."""
    parser.add_argument("run", metavar="RUN", type=Path, help="what `hf-dskd train` wrote")
    parser.add_argument(
        "repo", metavar="REPO", nargs="?", help="NAMESPACE/NAME, or NAME in your own namespace; it is made if need be"
    )
    for name, meaning in (
        ("private", "make a new repository private; one that is there and public is refused"),
        ("auxiliary", "push projectors and discriminator too, into auxiliary/"),
        (
            "no_alignment",
            "leave out the picture of the alignment, which shows the text of an example: the first held-out one, or"
            " else the first of the training data",
        ),
        (
            "replace",
            "delete what else the repository holds; needed where that is another model, or this one by another method"
            " (of an earlier push of the same, what is left over always goes)",
        ),
        ("create_pr", "open a pull request"),
    ):
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    parser.add_argument("--revision", metavar="BRANCH", help="the branch to push to (main)")
    parser.add_argument("--commit_message", metavar="TEXT", help="what the commit says")
    parser.add_argument(
        "--dry_run",
        metavar="FOLDER",
        type=Path,
        help="write what would be pushed into this folder, and only read from the hub: licences, your name; with"
        " HF_HUB_OFFLINE=1 nobody is contacted, and licences are not looked up",
    )


def run(given: Namespace) -> int:
    """Pushes a run, and prints where the model is."""
    contents = {"auxiliary": given.auxiliary, "alignment": not given.no_alignment}
    if given.dry_run is not None:
        from ..hub.folder import write_model_folder
        from ..hub.names import check_repo_id
        from ..hub.push import full_name

        if given.repo is not None:
            check_repo_id(given.repo, "REPO")
        print(write_model_folder(given.run, given.dry_run, given.repo and full_name(given.repo), **contents))
        return 0
    if given.repo is None:
        raise UserError("REPO is not set: name the repository on the hub, as NAMESPACE/NAME, after the run's folder")

    from ..hub.push import push_run

    options = {name: getattr(given, name) for name in ("revision", "commit_message", "replace", "create_pr")}
    try:
        commit = push_run(given.run, given.repo, private=given.private or None, **contents, **options)
    except KeyboardInterrupt:
        print("stopped; nothing was published, and the same command goes on", file=sys.stderr)
        return 130
    print(commit.pr_url or commit.commit_url)
    return 0
