"""Licences of what a run was made of, as far as they are stated somewhere."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

from ..utils.markup import Markdown, code, escaped
from .identity import FinishedRun, Model
from .names import page


logger = logging.getLogger(__name__)

# https://huggingface.co/docs/hub/repositories-licenses: what else is "other" there.
LICENCES = frozenset(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other""".split()
)


class Licence(NamedTuple):
    """A licence that was found."""

    ids: str | list[str]  # as the hub knows it, such as "apache-2.0"; several where there are several
    found: str  # where
    # Of one that the hub knows as "other".
    name: str | None = None
    link: str | None = None
    file: Path | None = None  # its text, where a local folder has it


def licence_of(model: Model, token: str | None, online: bool) -> Licence | None:
    """Looks for the licence of a model, as its package says, else the local folder, else the hub."""
    if model.packaged is not None and re.fullmatch(r"[\w.-]+", model.packaged.licence):
        return Licence(model.packaged.licence.lower(), "stated by the package that its weights came in")
    if model.hub_id is not None:
        return _hub_licence(model.hub_id, "model", token) if online else None
    return None if model.folder is None else _folder_licence(model.folder)


def _hub_licence(name: str, kind: str, token: str | None) -> Licence | None:
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        info: Any = api.model_info(name, timeout=10) if kind == "model" else api.dataset_info(name, timeout=10)
    except Exception as error:  # offline, gated, gone: the client raises those of two HTTP libraries
        logger.warning("the licence of %s is not known: %s", name, " ".join(str(error).split())[:200])
        return None
    return _card_licence(info.card_data, "stated on its page on the hub", page(name, kind))


def _known(licence: Licence) -> Licence:
    """As the hub takes it: a licence that it has no id for is `"other"`, with that name."""
    ids = [licence.ids] if isinstance(licence.ids, str) else licence.ids
    if LICENCES.issuperset(ids):
        return licence
    return licence._replace(ids="other", name=licence.name or ", ".join(map(str, ids)))


def given_licence(ids: str) -> Licence:
    """Takes a licence that the user states."""
    return _known(Licence(ids, "as stated by who trained this"))


def _card_licence(data: Any, found: str, address: str | None) -> Licence | None:
    """Of a card's metadata. The hub wants a name and a link for one that it doesn't know."""
    ids = data and data.get("license")
    if not ids:
        return None
    if ids != "other":
        return _known(Licence(ids, found))
    link = data.get("license_link")
    if address is not None and not str(link or "").startswith("http"):
        link = f"{address}/blob/main/{link}" if link else address
    return Licence("other", found, data.get("license_name") or "license-of-the-base-model", link)


def _folder_licence(folder: Path) -> Licence | None:
    file = next((path for path in sorted(folder.glob("LICEN[SC]E*")) if path.is_file()), None)
    readme = folder / "README.md"
    if readme.is_file():
        data = card_data(readme.read_text(encoding="utf-8", errors="replace"))
        found = None if data is None else _card_licence(data, "stated by the README.md in its folder", None)
        if found is not None and not str(found.link or "").startswith("http"):
            # Its link is to a file in that folder, which goes with the student; one that isn't there can't be linked.
            named = folder / Path(str(found.link)).name
            file = named if found.link and named.is_file() else file
            found = found._replace(link="LICENSE" if file is not None and found.name is not None else None)
        if found is not None:
            return found._replace(file=file)
    if file is None:
        return None
    text = " ".join(file.read_text(encoding="utf-8", errors="replace")[:2000].split())
    known = {"Apache License Version 2.0": "apache-2.0", "MIT License": "mit"}
    ids = next((name for title, name in known.items() if text.startswith(title)), None)
    found_in = f"the {file.name} in its folder"
    if ids is not None:
        return Licence(ids, found_in, file=file)
    return Licence("other", found_in, "license-of-the-base-model", "LICENSE", file)


def licence_lines(
    licence: Licence | None, run: FinishedRun, token: str | None, online: bool
) -> list[tuple[str, Markdown]]:
    """Says of student, whose licence was sought before, teacher and data what was found."""
    lines = [("student before training", _licence_words(licence, run.student, is_sought(run.student, online)))]
    if run.teacher is not None:
        found = licence_of(run.teacher, token, online)
        lines.append(("teacher", _licence_words(found, run.teacher, is_sought(run.teacher, online))))
    found = _hub_licence(run.dataset, "dataset", token) if run.dataset is not None and online else None
    lines.append(("training data", _licence_words(found, None, online and run.dataset is not None)))
    return lines


def is_sought(model: Model, online: bool) -> bool:
    """Tells whether there is a place to look for a model's licence."""
    return model.folder is not None or (online and model.hub_id is not None)


def _licence_words(licence: Licence | None, model: Model | None, sought: bool) -> Markdown:
    if licence is None:
        stated = model.packaged.licence if model is not None and model.packaged is not None else None
        missing = "not found" if sought else "not looked up"
        return escaped(f"{missing} ({stated})" if stated else missing)
    names = [licence.ids] if isinstance(licence.ids, str) else licence.ids
    words = ", ".join(map(code, names))
    if licence.name is not None:
        words += f", [{escaped(licence.name)}]({licence.link})" if licence.link else f", {escaped(licence.name)}"
    return Markdown(f"{words}, {licence.found}")


def card_data(text: str) -> Any:
    """Reads the metadata of a README.md; `None` if it begins with something else."""
    import yaml
    from huggingface_hub import ModelCard

    try:
        return ModelCard(text, ignore_metadata_errors=True).data
    except (ValueError, TypeError, yaml.YAMLError):
        return None
