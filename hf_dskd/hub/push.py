"""Pushing a finished run to the hub: what can be known before training, and one commit after it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError
from ..methods import METHODS
from ..redaction import without_values
from .folder import PUSHED, write_model_folder
from .identity import TAG, FinishedRun
from .names import check_repo_id


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from ..config import DSKDConfig


class Words(NamedTuple):
    """What remedies are called where the user is: the options, and what else there is to do."""

    repo: str
    private: str
    replace: str
    other_namespace: str
    later: str


COMMAND = Words("REPO", "--private", "--replace", ", or open a pull request with --create_pr", "")
TRAINING = Words(
    "hub_model_id",
    "hub_private_repo",
    "replace_on_hub",
    "",
    ", or leave push_to_hub out and push later with `hf-dskd push RUN REPO`",
)


def check_training(config: DSKDConfig, folder_facts: Mapping[str, Any], token: str | None = None) -> str:
    """Does [`check_access`] for a run that will push its student with the settings of `config`."""
    return check_access(
        config.hub_model_id or Path(str(config.output_dir)).absolute().name,
        token=token or config.hub_token,
        private=config.hub_private_repo,
        revision=config.hub_revision,
        replace=config.replace_on_hub,
        folder_facts=folder_facts,
        words=TRAINING,
    )


def check_access(
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    replace: bool = False,
    folder_facts: Mapping[str, Any] | None = None,
    create_pr: bool = False,
    words: Words = COMMAND,
) -> str:
    """
    Raises a [`UserError`] unless a model can be pushed to `repo_id`, as far as the hub tells; changes nothing there.

    Args:
        repo_id (`str`): `namespace/name`, or the name alone for the user's own namespace.
        token (`str`, *optional*): The one of `HF_TOKEN` or `hf auth login` by default.
        private (`bool`, *optional*): Nobody else is to see it, so a public repository that is there is refused.
        revision (`str`, *optional*): Branch; the main one by default.
        replace (`bool`, *optional*, defaults to `False`): Another model that is there may go.
        folder_facts (`Mapping[str, Any]`, *optional*):
            What the model is (see [`~hf_dskd.hub.identity.identity`]); a repository whose card says otherwise holds
            another model.
        create_pr (`bool`, *optional*, defaults to `False`):
            Only a pull request will be opened, in a repository that is there, of whomever.
        words ([`Words`], *optional*): What the remedies in the errors are called; as in `hf-dskd push` by default.

    Returns:
        `str`: `namespace/name`.

    Raises:
        UserError: For what stands in the way, with what to do about it.
    """
    from huggingface_hub import HfApi, constants, get_token

    settings = f"{constants.ENDPOINT}/settings/tokens"
    check_repo_id(repo_id, words.repo)
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repo_id!r} can't be pushed to with HF_HUB_OFFLINE=1 set: unset it{words.later}")
    token = token or get_token()
    if token is None:
        raise UserError(
            f"{repo_id!r} can't be pushed to without a token: run `hf auth login` or set HF_TOKEN, with a token of the"
            f' role "write" from {settings}{words.later}'
        )
    api = HfApi(token=token)
    try:
        user = api.whoami()
    except Exception as error:  # the client's own, and those of two HTTP libraries
        if _status(error) == 401:
            raise UserError(
                f"{repo_id!r} can't be pushed to: the hub doesn't know the token; make another at {settings}, then `hf"
                f" auth login` or HF_TOKEN{words.later}"
            ) from None
        raise _unreachable(repo_id, error, words.later) from None
    full = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
    _check_rights(full, user, settings, create_pr, words)
    _check_repository(api, full, private, revision, replace, folder_facts, create_pr, words)
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
    alignment: bool = True,
    words: Words = COMMAND,
) -> CommitInfo:
    """
    Pushes a finished run with its model card, in one commit: the repository has all of it or nothing.

    What an earlier push left there and this one doesn't have is deleted. Interrupted, the same call goes on: large
    files that the hub has already aren't sent again.

    Args:
        folder, auxiliary, alignment: As in [`~hf_dskd.hub.folder.write_model_folder`].
        repo_id, token, words: As in [`check_access`]; the repository is made if need be.
        private (`bool`, *optional*):
            Of a new repository; the namespace's own default by default. A public one that is there is refused.
        revision (`str`, *optional*): Branch, made of the main one if need be; the main one by default.
        commit_message (`str`, *optional*): Says what was trained by default.
        replace (`bool`, *optional*, defaults to `False`): What else the repository holds is deleted.
        create_pr (`bool`, *optional*, defaults to `False`): Opens a pull request instead.

    Returns:
        [`~huggingface_hub.CommitInfo`]: with `commit_url` and, for a pull request, `pr_url`.

    Raises:
        UserError: For what stands in the way (see [`check_access`]), and where the connection is lost.
    """
    from huggingface_hub import HfApi

    run = FinishedRun(folder)
    full = check_access(
        repo_id,
        token=token,
        private=private,
        revision=revision,
        replace=replace,
        folder_facts=run.identity,
        create_pr=create_pr,
        words=words,
    )
    api, message = HfApi(token=token), commit_message or f"A student trained by {run.record.method} with hf_dskd"
    # In the run's folder, that is on its disk: weights are linked, not copied.
    with tempfile.TemporaryDirectory(dir=run.folder, prefix=".push-") as scratch:
        written = write_model_folder(
            folder, Path(scratch) / "model", full, auxiliary=auxiliary, alignment=alignment, token=token
        )
        # Before there is a repository, which would stay empty.
        _check_card(full, (written / "README.md").read_text(encoding="utf-8"), token)
        try:
            if not create_pr:
                api.create_repo(full, private=private, exist_ok=True)
                if revision is not None:
                    api.create_branch(full, branch=revision, exist_ok=True)
            there = set() if create_pr and not replace else set(api.list_repo_files(full, revision=revision))
            # Not `upload_folder`, which cuts large folders into several commits.
            return api.create_commit(
                full,
                _operations(written, there, replace),
                commit_message=without_values(message),
                revision=revision,
                create_pr=create_pr,
            )
        except Exception as error:  # the client's own, and those of two HTTP libraries
            raise _failed(full, error) from None


def _operations(written: Path, there: set[str], replace: bool) -> list[Any]:
    """Adds every file that was written, and deletes what an earlier push left, or all that is there."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    paths = {path.relative_to(written).as_posix(): path for path in sorted(written.rglob("*")) if path.is_file()}
    left = sorted(name for name in there - {*paths, ".gitattributes"} if replace or _is_pushed(name))
    return [
        *(CommitOperationAdd(name, path) for name, path in paths.items()),
        *(CommitOperationDelete(name) for name in left),
    ]


def _failed(repo_id: str, error: Exception) -> UserError:
    if _status(error) in (401, 403):
        return UserError(
            f"{repo_id!r} may not be written with this token ({_line(error)}): give it write access to that"
            " repository, nothing was published"
        )
    # The client asks about the metadata as well, and raises a bare ValueError.
    if _status(error) == 400 or "Invalid metadata" in str(error):
        return _refused(repo_id, _line(error))
    return _unreachable(repo_id, error, ", nothing was published and the same command goes on")


def full_name(repo_id: str) -> str:
    """Writes `namespace/name` for a look at what would be pushed, NAMESPACE where the user's own can't be asked."""
    from huggingface_hub import HfApi

    if "/" in repo_id:
        return repo_id
    try:
        return f"{HfApi().whoami()['name']}/{repo_id}"
    except Exception:  # offline, or nobody is logged in: the client raises those of two HTTP libraries
        return f"NAMESPACE/{repo_id}"


def _is_pushed(name: str) -> bool:
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in PUSHED)


def _check_card(repo_id: str, card: str, token: str | None) -> None:
    """Raises a [`UserError`] if the hub would not take the card's metadata."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session

    try:
        answer = get_session().post(
            f"{constants.ENDPOINT}/api/validate-yaml",
            json={"repoType": "model", "content": card},
            headers=build_hf_headers(token=token),
            timeout=30,
        )
    except Exception:  # those of two HTTP libraries; the commit is checked as well
        return
    if answer.status_code == 400:
        raise _refused(repo_id, _line(answer.text))


def _refused(repo_id: str, reason: str) -> UserError:
    return UserError(
        f"{repo_id!r}: the hub doesn't take what is pushed ({reason}): write it into a folder with `hf-dskd push RUN"
        " REPO --dry_run FOLDER`, mend its README.md there and send it with `hf upload`; nothing was published"
    )


def _check_rights(repo_id: str, user: Mapping[str, Any], settings: str, create_pr: bool, words: Words) -> None:
    """What whoami says of the token and of its user's namespaces."""
    namespace = repo_id.partition("/")[0]
    access = (user.get("auth") or {}).get("accessToken") or {}
    wanted = f'take one with the role "write" from {settings} for `hf auth login` or HF_TOKEN{words.later}'
    if access.get("role") == "read":
        raise UserError(f"{repo_id!r} can't be pushed to with a token of the role 'read': {wanted}")
    if create_pr:
        return
    organizations = {found["name"]: found.get("roleInOrg") for found in user.get("orgs", ())}
    if namespace not in (user["name"], *organizations):
        known = ", ".join([user["name"], *organizations])
        raise UserError(
            f"{repo_id!r} is in a namespace that isn't yours: write {words.repo} as NAMESPACE/NAME with one of {known}"
            f"{words.other_namespace}"
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
    api: Any,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    replace: bool,
    facts: Mapping[str, Any] | None,
    create_pr: bool,
    words: Words,
) -> None:
    """That it is free, empty, or holds an earlier push of the same student, and is as private as wanted."""
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
        raise _unreachable(repo_id, error, words.later) from None
    if private and not info.private:
        raise UserError(
            f"{repo_id!r} is public, and {words.private} only makes new repositories private: make it private in its"
            f" settings on the hub, choose another name, or leave {words.private} out"
        )
    if replace or create_pr or not {file.rfilename for file in info.siblings or ()} - {".gitattributes"}:
        return
    other = _other_model(info.card_data.to_dict() if info.card_data else {}, facts)
    if other is not None:
        raise UserError(f"{repo_id!r} {other}: choose another name, or delete what it holds with {words.replace}")


def _other_model(card: Mapping[str, Any], facts: Mapping[str, Any] | None) -> str | None:
    """What a repository holds by its card, unless that is a student with these facts, as far as they tell."""
    tags = card.get("tags") or []
    if TAG not in tags:
        return f"holds something else (its model card has no tag {TAG})"
    if facts is None:
        return None
    for name in ("base_model", "library_name"):
        if card.get(name) != facts.get(name):
            return f"holds another model (its {name} is {card.get(name)!r}, this one's {facts.get(name)!r})"
    if facts.get("method") not in tags:
        theirs = ", ".join(tag for tag in tags if tag in METHODS)
        return f"holds the student of another method ({theirs or 'none that is known'}, not {facts.get('method')})"
    if facts.get("base_model") is None and facts.get("model_type") not in tags:
        return f"holds another model (its model card has no tag {facts.get('model_type')}, the architecture)"
    return None


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _line(error: Exception | str) -> str:
    return " ".join(str(error).split())[:200]


def _unreachable(repo_id: str, error: Exception, remedy: str) -> UserError:
    from huggingface_hub import constants

    return UserError(
        f"{repo_id!r}: {constants.ENDPOINT} didn't answer as it should ({type(error).__name__}: {_line(error)}): check"
        f" the network{remedy}"
    )
