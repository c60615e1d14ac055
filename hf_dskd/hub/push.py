"""Pushing a finished run to the hub: what can be known before training, and one commit after it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..report.files import read_run
from .card import TAG, run_identity, write_model_folder


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

LATER = "or drop --push_to_hub and push later with `hf-dskd push RUN REPO`"


def check_access(
    repo_id: str,
    *,
    token: str | None = None,
    revision: str | None = None,
    replace: bool = False,
    folder_facts: Mapping[str, Any] | None = None,
    create_pr: bool = False,
) -> str:
    """
    Raises a [`UserError`] unless a model can be pushed to `repo_id`, as far as the hub tells; changes nothing there.

    Args:
        repo_id (`str`): `namespace/name`, or the name alone for the user's own namespace.
        token (`str`, *optional*): The one of `HF_TOKEN` or `hf auth login` by default.
        revision (`str`, *optional*): Branch; the main one by default.
        replace (`bool`, *optional*, defaults to `False`): Another model that is there may go.
        folder_facts (`Mapping[str, Any]`, *optional*):
            `base_model` and `library_name` of the model (see [`~hf_dskd.hub.card.identity`]); a repository whose card
            has others holds another model.
        create_pr (`bool`, *optional*, defaults to `False`):
            Only a pull request will be opened, in a repository that is there, of whomever.

    Returns:
        `str`: `namespace/name`.

    Raises:
        UserError: For what stands in the way, with what to do about it.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    settings = f"{constants.ENDPOINT}/settings/tokens"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} can't name a repository ({_line(error)}): write NAMESPACE/NAME") from None
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repo_id!r} can't be pushed to with HF_HUB_OFFLINE=1 set: unset it, {LATER}")
    token = token or get_token()
    if token is None:
        raise UserError(
            f"{repo_id!r} can't be pushed to without a token: run `hf auth login` or set HF_TOKEN, with a token of the"
            f' role "write" from {settings}, {LATER}'
        )
    api = HfApi(token=token)
    try:
        user = api.whoami()
    except Exception as error:  # the client's own, and those of two HTTP libraries
        if _status(error) == 401:
            raise UserError(
                f"{repo_id!r} can't be pushed to: the hub doesn't know the token; make another at {settings}, then `hf"
                f" auth login` or HF_TOKEN, {LATER}"
            ) from None
        raise _unreachable(repo_id, error, LATER) from None
    full = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
    _check_rights(full, user, settings, create_pr)
    _check_repository(api, full, revision, replace, folder_facts, create_pr)
    return full


def push_run(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    auxiliary: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    replace: bool = False,
    create_pr: bool = False,
) -> CommitInfo:
    """
    Pushes a finished run with its model card, in one commit: the repository has all of it or nothing.

    Interrupted, the same call goes on: large files that the hub has already aren't sent again.

    Args:
        folder (`str` or `Path`): What `hf-dskd train` wrote.
        repo_id (`str`): `namespace/name`, or the name alone for the user's own namespace; made if need be.
        token (`str`, *optional*): The one of `HF_TOKEN` or `hf auth login` by default.
        private (`bool`, *optional*): Of a new repository; the namespace's own default by default.
        auxiliary (`bool`, *optional*, defaults to `False`): Projectors and discriminator too, in `auxiliary/`.
        revision (`str`, *optional*): Branch, made of the main one if need be; the main one by default.
        commit_message (`str`, *optional*): Says what was trained by default.
        replace (`bool`, *optional*, defaults to `False`): What else the repository holds is deleted.
        create_pr (`bool`, *optional*, defaults to `False`): Opens a pull request instead.

    Returns:
        [`~huggingface_hub.CommitInfo`]: with `commit_url` and, for a pull request, `pr_url`.

    Raises:
        UserError: For what stands in the way (see [`check_access`]), and where the connection is lost.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    run = read_run(folder)
    full = check_access(
        repo_id,
        token=token,
        revision=revision,
        replace=replace,
        folder_facts=run_identity(folder),
        create_pr=create_pr,
    )
    api = HfApi(token=token)
    # In the run's folder, that is on its disk: weights are linked, not copied.
    with tempfile.TemporaryDirectory(dir=run.folder, prefix=".push-") as scratch:
        written = write_model_folder(folder, Path(scratch) / "model", full, auxiliary=auxiliary, token=token)
        paths = {path.relative_to(written).as_posix(): path for path in sorted(written.rglob("*")) if path.is_file()}
        try:
            if not create_pr:
                api.create_repo(full, private=private, exist_ok=True)
                if revision is not None:
                    api.create_branch(full, branch=revision, exist_ok=True)
            there = set(api.list_repo_files(full, revision=revision)) if replace else set()
            # Not `upload_folder`, which cuts large folders into several commits.
            return api.create_commit(
                full,
                [
                    *(CommitOperationAdd(name, path) for name, path in paths.items()),
                    *(CommitOperationDelete(name) for name in sorted(there - {*paths, ".gitattributes"})),
                ],
                commit_message=commit_message or f"A student trained by {run.method} with hf_dskd",
                revision=revision,
                create_pr=create_pr,
            )
        except Exception as error:  # the client's own, and those of two HTTP libraries
            if _status(error) in (401, 403):
                raise UserError(
                    f"{full!r} may not be written with this token ({_line(error)}): give it write access to that"
                    " repository, nothing was published"
                ) from None
            raise _unreachable(full, error, "nothing was published and the same command goes on") from None


def _check_rights(repo_id: str, user: Mapping[str, Any], settings: str, create_pr: bool) -> None:
    """What whoami says of the token and of its user's namespaces."""
    namespace = repo_id.partition("/")[0]
    access = (user.get("auth") or {}).get("accessToken") or {}
    wanted = f'take one with the role "write" from {settings} for `hf auth login` or HF_TOKEN, {LATER}'
    if access.get("role") == "read":
        raise UserError(f"{repo_id!r} can't be pushed to with a token of the role 'read': {wanted}")
    if create_pr:
        return
    organizations = {found["name"]: found.get("roleInOrg") for found in user.get("orgs", ())}
    if namespace not in (user["name"], *organizations):
        known = ", ".join([user["name"], *organizations])
        raise UserError(
            f"{repo_id!r} is in a namespace that isn't yours: name the repository in one of {known}, or open a pull"
            " request with --create_pr"
        )
    if organizations.get(namespace) == "read":
        raise UserError(
            f"{repo_id!r} is of an organization that {user['name']} may only read: ask for the role 'contributor' or"
            f" 'write' there, or name the repository {user['name']}/{repo_id.split('/')[1]}"
        )
    scopes = (access.get("fineGrained") or {}).get("scoped")
    if access.get("role") == "fineGrained" and scopes is not None:
        writes = {scope["entity"].get("name") for scope in scopes if "repo.write" in scope["permissions"]}
        if not writes & {namespace, repo_id}:
            raise UserError(
                f"{repo_id!r} can't be pushed to with this fine-grained token, which may not write there: give it"
                f" write access to {namespace} at {settings}, or {wanted}"
            )


def _check_repository(
    api: Any, repo_id: str, revision: str | None, replace: bool, facts: Mapping[str, Any] | None, create_pr: bool
) -> None:
    """That it is free, empty, or holds an earlier push of the same model."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        try:
            info = api.model_info(repo_id, revision=revision)
        except RevisionNotFoundError:  # a new branch begins as a copy of the main one
            info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        if create_pr:
            raise UserError(f"{repo_id!r} isn't on the hub, so there is nothing to open a pull request in") from None
        return
    except Exception as error:  # the client's own, and those of two HTTP libraries
        raise _unreachable(repo_id, error, LATER) from None
    if replace or create_pr or not {file.rfilename for file in info.siblings or ()} - {".gitattributes"}:
        return
    card = info.card_data.to_dict() if info.card_data else {}
    if TAG not in (card.get("tags") or ()):
        other = f"holds something else (its model card has no tag {TAG})"
    else:
        names = ("base_model", "library_name")
        other = next(
            (
                f"holds another model (its {name} is {card.get(name)!r}, this one's {facts.get(name)!r})"
                for name in names
                if facts is not None and card.get(name) not in (None, facts.get(name))
            ),
            "",
        )
    if other:
        raise UserError(f"{repo_id!r} {other}: choose another name, or delete what it holds with --replace")


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _unreachable(repo_id: str, error: Exception, remedy: str) -> UserError:
    from huggingface_hub import constants

    return UserError(
        f"{repo_id!r}: {constants.ENDPOINT} didn't answer as it should ({type(error).__name__}: {_line(error)}): check"
        f" the network, {remedy}"
    )
