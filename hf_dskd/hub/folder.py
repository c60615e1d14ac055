"""
The folder that is pushed of a run.

    README.md                       the card
    model or adapter, config, generation config, tokenizer, chat template
    images/curves.png               every loss term and what else was logged
    images/alignment.png            the attention on one example, where the run has a picture of it
    auxiliary/                      projectors, discriminator and what they are; only if asked for
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..training.run_folder import AUXILIARY_NAME
from ..utils.files import read_json, write_text
from .card import WEIGHTS, put, write_card
from .identity import FinishedRun, Model
from .licences import licence_of


logger = logging.getLogger(__name__)

# What `from_pretrained` reads of an adapter, of a model, and of either's tokenizer. A run leaves other files beside
# them, and the run before it in the same folder may have left what is not its own.
MODEL_FILES = {
    True: (*WEIGHTS[True], "adapter_config.json", "generation_config.json"),
    False: (*WEIGHTS[False], "config.json", "generation_config.json", "*.index.json"),
}
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template.jinja", "chat_template.json"),
    "additional_chat_templates/*.jinja",
)
# All that a push may write.
PUSHED = (
    *("README.md", "LICENSE", "images/curves.png", "images/alignment.png"),
    *MODEL_FILES[True],
    *MODEL_FILES[False],
    *TOKENIZER_FILES,
    *(f"auxiliary/{AUXILIARY_NAME}", "auxiliary/*.safetensors"),
)
# Where these files name the model or tokenizer that they were made from.
NAME_KEYS = ("base_model_name_or_path", "_name_or_path", "name_or_path")


def write_model_folder(
    folder: str | Path,
    destination: str | Path,
    repo_id: str | None = None,
    *,
    auxiliary: bool = False,
    alignment: bool = True,
    token: str | None = None,
    online: bool = True,
) -> Path:
    """
    Writes what is pushed of a finished run, and nothing else of it; weights are hard links where that is possible.

    Args:
        folder, repo_id, alignment, token: As in [`~hf_dskd.hub.card.model_card`].
        destination (`str` or `Path`): A folder that is empty or doesn't exist.
        auxiliary (`bool`, *optional*, defaults to `False`): Projectors and discriminator too, in `auxiliary/`.
        online (`bool`, *optional*, defaults to `True`):
            Whether to ask the hub for licences and for the generation config of an adapter's base; not with
            HF_HUB_OFFLINE=1.

    Returns:
        `Path`: `destination`.

    Raises:
        UserError: If it is no folder of a finished run, has no model, or `destination` has files already.
    """
    run, destination = FinishedRun(folder), Path(destination)
    student, adapter = run.student, run.adapter
    if not any(path for pattern in WEIGHTS[adapter] for path in run.folder.glob(pattern)):
        raise UserError(f"{str(folder)!r} has no model or adapter: it must have been moved; name the run's own folder")
    if auxiliary and not (run.folder / AUXILIARY_NAME).is_file():
        raise UserError(f"{str(folder)!r} has no {AUXILIARY_NAME}: leave --auxiliary out")
    if destination.is_dir() and any(destination.iterdir()):
        raise UserError(f"{str(destination)!r} isn't empty: name a folder that is, or a new one")
    write_card(folder, destination, repo_id, alignment=alignment, token=token, online=online)
    patterns = (*MODEL_FILES[adapter], *TOKENIZER_FILES)
    for path in sorted({path for pattern in patterns for path in run.folder.glob(pattern) if path.is_file()}):
        target = destination / path.relative_to(run.folder)
        content = _for_others(path, student) if path.name.endswith("config.json") else None
        if content is None:
            put(path, target)
        else:
            write_text(target, content)
    if not (destination / "generation_config.json").is_file():
        _write_generation_config(destination, student, token, online)
    licence = licence_of(student, None, False)
    if licence is not None and licence.file is not None:
        put(licence.file, destination / "LICENSE")
    if auxiliary:
        _write_auxiliary(run, destination / "auxiliary")
    return destination


def _for_others(path: Path, student: Model) -> str | None:
    """A config with the student's name in place of folders of this machine; `None` if there is nothing to change."""
    content = read_json(path, {})
    changed: dict[str, Any] = {key: student.hub_id or Path(content[key]).name for key in NAME_KEYS if content.get(key)}
    if content.get("use_cache") is False:
        changed["use_cache"] = True  # Trainer switches it off to train; generation would be slow without it
    changed = {**content, **changed}
    return None if changed == content else json.dumps(changed, indent=2, ensure_ascii=False) + "\n"


def _write_generation_config(destination: Path, student: Model, token: str | None, online: bool) -> None:
    """What follows from a model's config; of an adapter that of its base, where it can be had."""
    target = destination / "generation_config.json"
    if (destination / "config.json").is_file():
        from transformers import AutoConfig, GenerationConfig

        GenerationConfig.from_model_config(AutoConfig.from_pretrained(destination)).save_pretrained(destination)
    elif student.folder is not None and (student.folder / target.name).is_file():
        put(student.folder / target.name, target)
    elif student.hub_id is not None:
        from huggingface_hub import hf_hub_download

        try:
            path = hf_hub_download(student.hub_id, target.name, token=token, local_files_only=not online)
        except Exception as error:  # the client raises those of two HTTP libraries; the base has its own all the same
            logger.warning("no generation config of %s: %s", student.hub_id, " ".join(str(error).split())[:200])
        else:
            put(Path(path), target)


def _write_auxiliary(run: FinishedRun, folder: Path) -> None:
    facts = read_json(run.folder / AUXILIARY_NAME, {})
    for role, model in (("student", run.student), ("teacher", run.teacher)):
        if facts.get(role):
            facts[role] = (model and model.hub_id) or Path(facts[role]).name
    folder.mkdir()
    (folder / AUXILIARY_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for module in facts["modules"].values():
        put(run.folder / module["file"], folder / module["file"])
