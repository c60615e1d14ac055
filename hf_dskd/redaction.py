"""Tokens stay out of what is written: by the name of what holds them, by their form, and those of the environment."""

from __future__ import annotations

import os
import re
from typing import Any


REDACTED = "..."
# What a token, a key or a password is called in settings and in the environment; `eos_token` isn't one.
_NAME = (
    r"(?:token|(?:\w+[_-])?(?:hub|hf|auth|access|api|user|write|read)[_-]token"
    r"|(?:\w+[_-])?(?:api[_-]?key|access[_-]key|secret(?:[_-]key)?|password))"
)
_SECRET = re.compile(_NAME, re.IGNORECASE)
_QUOTED = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
# A text, several of them in brackets, or a word.
_VALUE = rf"""({_QUOTED}|[\[({{](?:\\.|{_QUOTED}|[^\])}}"'\\])*[\])}}]|[^\s,;}}\])"']+)"""
# Where a name is followed by its value: as an option, as a key of JSON or YAML, as an argument or a variable.
_NAMED = re.compile(
    rf"""(?P<name>--{_NAME}(?:\s+|=)|\\?["']{_NAME}\\?["']\s*[:=]\s*|[{{,]\s*{_NAME}\s*:\s*|(?<![\w-]){_NAME}=)"""
    rf"""(?P<slash>\\?){_VALUE}""",
    re.IGNORECASE,
)
# Of the hub, of a header, and between `://` and `@` of an address.
_FORMS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}|\bapi_org_[A-Za-z0-9]{20,}"), REDACTED),
    (re.compile(r"\b(Bearer\s+)[\w.~+/=-]{8,}"), rf"\1{REDACTED}"),
    (re.compile(r"(://)[^\s/@'\"]+@"), rf"\1{REDACTED}@"),
)


def is_secret(name: str) -> bool:
    """Tells whether a setting or a variable of that name holds a token, a key or a password."""
    return _SECRET.fullmatch(name) is not None


def without_values(text: str) -> str:
    """Takes tokens out of a text, as far as their form or this process's environment tells."""
    for pattern, shown in _FORMS:
        text = pattern.sub(shown, text)
    for name, value in os.environ.items():
        if not is_secret(name):
            continue
        if len(value) >= 8 and re.search("[0-9]", value) and re.search("[A-Za-z]", value):
            text = text.replace(value, REDACTED)
        elif len(value) >= 12:
            # It may be a word, and a part of others; a shorter one could be any.
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])", REDACTED, text)
    return text


def redact(text: str) -> str:
    """Takes tokens, and what follows the name of a secret, out of a command or a message."""
    return without_values(_NAMED.sub(lambda found: f"{found['name']}{REDACTED}", text))


def redact_words(words: list[str]) -> list[str]:
    """Takes tokens out of the words of a command line, however an option is written."""
    shown, follows = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = name.startswith("-") and is_secret(name.lstrip("-"))
        if follows and not name.startswith("--"):
            shown.append(REDACTED)
        elif secret and equals:
            shown.append(f"{name}={REDACTED}")
        else:
            shown.append(redact(word))
        follows = secret and not equals
    return shown


def without_secrets(value: Any) -> Any:
    """Leaves out the entries of settings that hold secrets, at any depth, and tokens in their texts."""
    if isinstance(value, dict):
        return {name: without_secrets(part) for name, part in value.items() if not is_secret(str(name))}
    if isinstance(value, (list, tuple)):
        return [without_secrets(part) for part in value]
    return without_values(value) if type(value) is str else value


def secret_names(value: Any) -> list[str]:
    """Names the entries of settings that hold secrets, at any depth, with dots between."""
    if not isinstance(value, dict):
        return []
    found = []
    for name, part in value.items():
        if is_secret(str(name)) and part is not None:
            found.append(str(name))
        found += [f"{name}.{inner}" for inner in secret_names(part)]
    return found
