"""Names and addresses on the hub."""

from __future__ import annotations

from ..errors import UserError


def check_repo_id(repo_id: str, word: str) -> None:
    """Raises a [`UserError`] unless `repo_id`, which the user knows as `word`, can name a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{repo_id!r} can't name a repository ({reason}): write {word} as NAMESPACE/NAME") from None


def page(name: str, kind: str = "model") -> str:
    """Gives the address of a model's or dataset's page, on the hub that HF_ENDPOINT names."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
