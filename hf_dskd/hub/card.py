"""
What a run looks like on the hub: a model card made of the run's files, and the folder that is pushed.

    README.md                       the card
    model or adapter, config, generation config, tokenizer, chat template
    images/curves.png               every loss term and what else was logged
    images/alignment.png            the attention on one example, where the run has a picture of it
    auxiliary/                      projectors, discriminator and what they are; only if asked for
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoint import AUXILIARY_NAME, ROLES
from ..errors import UserError
from ..methods import METHODS
from ..packaged import MARKER, PACKAGED_MODELS, PackagedModel, ready_folder
from ..report.files import RunFiles, changed_settings, metrics_before, read_run
from ..report.words import duration, measured, measures_of, millions, setting, title_of


if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

logger = logging.getLogger(__name__)

TAG = "hf_dskd"
HUB = "https://huggingface.co"
TEMPLATE = Path(__file__).with_name("card.md")
# What `from_pretrained` reads of a model or an adapter, and of its tokenizer. A run leaves other files beside them.
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "model*.safetensors", "pytorch_model*.bin")
MODEL_FILES = (
    *WEIGHTS,
    *("config.json", "generation_config.json", "adapter_config.json", "*.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template.jinja", "chat_template.json"),
    "additional_chat_templates/*.jinja",
)
# Where these files name the model or tokenizer that they were made from.
NAME_KEYS = ("base_model_name_or_path", "_name_or_path", "name_or_path")
# Settings that say nothing about the student (where files went, who was told), or that the card has elsewhere.
UNTOLD = frozenset(
    "output_dir logging_dir run_name report_to project trackio_space_id push_to_hub hub_model_id hub_strategy"
    " hub_token hub_private_repo hub_always_push hub_revision resume_from_checkpoint overwrite_output_dir disable_tqdm"
    " teacher_cache repair_teacher_cache model_name_or_path teacher_model_name_or_path dataset_name logging_strategy"
    " logging_steps logging_first_step log_level save_strategy save_steps save_total_limit dataloader_num_workers"
    " dataloader_pin_memory dataset_num_proc do_train do_eval do_predict token cache_dir use_auth_token config"
    " push_to_hub_model_id push_to_hub_organization push_to_hub_token".split()
)


class Licence(NamedTuple):
    """
    A licence that was found.

    Attributes:
        ids: As the hub knows it, such as `"apache-2.0"`; several where there are several.
        found: Where.
        name, link: Of one that the hub knows as `"other"`.
        file: Its text, where a local folder has it.
    """

    ids: str | list[str]
    found: str
    name: str | None = None
    link: str | None = None
    file: Path | None = None


@dataclass(frozen=True)
class Model:
    """
    A student before training, or a teacher, as a card may name it.

    Attributes:
        hub_id: Its name on the hub; `None` for a folder of this machine, which means nothing elsewhere.
        words: For people.
        folder: Where it lies on this machine, as far as that is known.
        packaged: Where it came from, if it is a packaged model.
    """

    hub_id: str | None
    words: str
    folder: Path | None = None
    packaged: PackagedModel | None = None


def identity(student: str | None, adapter: bool) -> dict[str, str | None]:
    """
    What tells a pushed student from other models in a repository, as its card has it: for
    [`~hf_dskd.hub.push.check_access`] before there is a run.

    Args:
        student (`str`, *optional*): Name or folder of the model that is trained.
        adapter (`bool`): Whether an adapter of it is.
    """
    name = student if student is None or not os.path.isdir(student) else Path(student).resolve().name
    return {"base_model": _hub_id(name, student), "library_name": "peft" if adapter else "transformers"}


def run_identity(folder: str | Path) -> dict[str, str | None]:
    """[`identity`] of the student of a finished run."""
    run = read_run(folder)
    library_name = "peft" if _is_adapter(run) else "transformers"
    return {"base_model": _student(run, _settings(run)).hub_id, "library_name": library_name}


def model_card(
    folder: str | Path, repo_id: str | None = None, *, token: str | None = None, online: bool = True
) -> ModelCard:
    """
    The model card of a finished run, from the files in its folder.

    Folders of this machine are named nowhere in it, nor are tokens.

    Args:
        folder (`str` or `Path`): What `hf-dskd train` wrote.
        repo_id (`str`, *optional*): Where the model will be, as `namespace/name`.
        token (`str`, *optional*): Of the hub; the one of `HF_TOKEN` or `hf auth login` by default.
        online (`bool`, *optional*, defaults to `True`): Whether to ask the hub for licences.

    Returns:
        [`~huggingface_hub.ModelCard`]: with `images/curves.png` and `images/alignment.png` where
        [`write_model_folder`] writes them.

    Raises:
        UserError: If it is no folder of a finished run, or a file in it can't be read.
    """
    from huggingface_hub import ModelCard, ModelCardData

    run = read_run(folder)
    models = run.result.get("models") or {}
    settings, adapter = _settings(run), _is_adapter(run)
    student, teacher, source = _student(run, settings), _teacher(run, settings), _dataset(run)
    licence = _licence(student, token, online)
    method = METHODS[run.method]
    scores = _scores(run)
    name = repo_id.split("/")[-1] if repo_id else f"{(student.hub_id or 'student').split('/')[-1]}-{run.method}"
    results = _eval_results(run, scores, source)
    across = _vocabularies_differ(run, teacher)
    data = ModelCardData(
        model_name=name,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=student.hub_id,
        base_model_relation=("adapter" if adapter else "finetune") if student.hub_id else None,
        datasets=[source] if source else None,
        license=licence and licence.ids,  # type: ignore[arg-type]  # a list is as good
        license_name=licence and licence.name,
        license_link=licence and licence.link,
        tags=[TAG, "knowledge-distillation", *(["cross-tokenizer"] if across else []), run.method],
        eval_results=results or None,
    )
    if not results:
        del data.model_name  # of no use without results, and no key that the hub knows
    from ..environment import in_words

    before = metrics_before(run.result, run.history)
    reports = run.result.get("data") or {}
    hardware = run.result.get("hardware")
    return ModelCard.from_template(
        data,
        str(TEMPLATE),
        name=name,
        repo_id=repo_id or "REPOSITORY",
        adapter=adapter,
        method=run.method,
        # What the summary of one method says by the name of another.
        method_summary=re.sub(r"^dskd_cma\b", f"{METHODS['dskd_cma'].summary},", method.summary),
        method_source=_linked(method.source),
        method_has_paper="arXiv" in method.source,
        student=student,
        student_parameters=millions(models["student_parameters"]) if models.get("student_parameters") else None,
        trained_parameters=millions(models["trained_parameters"]) if models.get("trained_parameters") else None,
        teacher=teacher,
        teacher_in_4bit=bool(run.result.get("settings", {}).get("load_teacher_in_4bit")),
        across=across,
        gguf=[model for model in (student, teacher) if model and model.packaged],
        dataset=_dataset_words(run, source),
        prompt_style=run.result.get("settings", {}).get("prompt_style"),
        chat_template_kwargs=run.result.get("settings", {}).get("chat_template_kwargs"),
        result=run.result,
        examples=(reports.get("train") or {}).get("kept"),
        held_out=(reports.get("eval") or {}).get("kept"),
        seconds=duration(run.result["train_runtime"]) if run.result.get("train_runtime") is not None else None,
        hardware=in_words(hardware) if hardware else None,
        versions=", ".join(f"{package} {version}" for package, version in run.result.get("versions", {}).items()),
        changed=_told_settings(settings, [model.hub_id for model in (student, teacher) if model], source),
        measures=[
            (title_of(key), measured(before.get(key)), measured(value))
            for key in measures_of(run.result.get("metrics", {}))
            if isinstance(value := run.result["metrics"][key], (int, float))
        ],
        measured_before=bool(before),
        answered=run.result.get("settings", {}).get("eval_generation_samples"),
        scores=[_scores_table(found) for found in scores],
        seeds_of_training=run.result.get("seed"),
        curves=_has_curves(run),
        alignment=_alignment_picture(run),
        licences=_licence_lines(licence, student, teacher, source, token, online),
        licence_found=licence is not None,
    )


def write_model_folder(
    folder: str | Path,
    destination: str | Path,
    repo_id: str | None = None,
    *,
    auxiliary: bool = False,
    token: str | None = None,
    online: bool = True,
) -> Path:
    """
    Writes what is pushed of a finished run, and nothing else of it; weights are hard links where that is possible.

    Args:
        folder (`str` or `Path`): What `hf-dskd train` wrote.
        destination (`str` or `Path`): A folder that is empty or doesn't exist.
        repo_id (`str`, *optional*): Where the model will be, as `namespace/name`.
        auxiliary (`bool`, *optional*, defaults to `False`): Projectors and discriminator too, in `auxiliary/`.
        token (`str`, *optional*): Of the hub; the one of `HF_TOKEN` or `hf auth login` by default.
        online (`bool`, *optional*, defaults to `True`):
            Whether to ask the hub for licences and for the generation config of an adapter's base.

    Returns:
        `Path`: `destination`.

    Raises:
        UserError: If it is no folder of a finished run, has no model, or `destination` has files already.
    """
    run, destination = read_run(folder), Path(destination)
    settings = _settings(run)
    student = _student(run, settings)
    if not any(path for pattern in WEIGHTS for path in run.folder.glob(pattern)):
        raise UserError(f"{str(folder)!r} has no model or adapter: it must have been moved; name the run's own folder")
    if auxiliary and not (run.folder / AUXILIARY_NAME).is_file():
        raise UserError(f"{str(folder)!r} has no {AUXILIARY_NAME}: leave --auxiliary out")
    if destination.is_dir() and any(destination.iterdir()):
        raise UserError(f"{str(destination)!r} isn't empty: name a folder that is, or a new one")
    write_card(folder, destination, repo_id, token=token, online=online)
    for path in sorted({path for pattern in MODEL_FILES for path in run.folder.glob(pattern) if path.is_file()}):
        target = destination / path.relative_to(run.folder)
        content = _renamed(path, student) if path.name.endswith("config.json") else None
        if content is None:
            _put(path, target)
        else:
            target.write_text(content, encoding="utf-8")
    if not (destination / "generation_config.json").is_file():
        _write_generation_config(destination, student, token, online)
    licence = _licence(student, None, False)
    if licence is not None and licence.file is not None:
        _put(licence.file, destination / "LICENSE")
    if auxiliary:
        _write_auxiliary(run, destination / "auxiliary", student, _teacher(run, settings))
    return destination


def write_card(
    folder: str | Path,
    destination: str | Path,
    repo_id: str | None = None,
    *,
    token: str | None = None,
    online: bool = True,
) -> None:
    """Writes the [`model_card`] of a finished run to `README.md` in a folder, and its pictures to `images` there."""
    from ..analysis.curves import plot_curves

    run, destination = read_run(folder), Path(destination)
    card = model_card(folder, repo_id, token=token, online=online)
    destination.mkdir(parents=True, exist_ok=True)
    if _has_curves(run):
        plot_curves({run.method: run.history}, destination / "images" / "curves.png")
    picture = _alignment_picture(run)
    if picture is not None:
        _put(picture[0], destination / "images" / "alignment.png")
    (destination / "README.md").write_text(str(card).rstrip("\n") + "\n", encoding="utf-8")


# ---- Who the models are


def _settings(run: RunFiles) -> dict[str, Any]:
    """Settings that aren't at their default: everything a command line can say, or those of the trainer alone."""
    from ..result import SETTINGS_NAME
    from ..run import read_yaml

    path = run.folder / SETTINGS_NAME
    if path.is_file():
        return read_yaml("the run's settings", path)
    return {name: value for name, (_, value) in changed_settings(run.result).items()}


def _is_adapter(run: RunFiles) -> bool:
    return (run.folder / "adapter_config.json").is_file()


def _packaged(name: str | None, given: str | None) -> PackagedModel | None:
    """The packaged model that a run calls `name`; another folder may have that name too."""
    if name not in PACKAGED_MODELS or not (given in (None, name) or (Path(given) / MARKER).is_file()):
        return None
    return PACKAGED_MODELS[name]


def _hub_id(name: str | None, given: str | None) -> str | None:
    """
    Name on the hub of the model that a run calls `name` and that was given to it as `given`.

    A run knows folders by their last part: what has a slash in it is no folder. `gpt2` is either.
    """
    packaged = _packaged(name, given)
    if packaged is not None:
        return packaged.hub_id
    if name is None or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return None
    return name if "/" in name or (name == given and not Path(name).is_dir()) else None


def _model(name: str | None, given: str | None, parameters: int | None, like: Path | None = None) -> Model:
    """`like` is a folder whose config is the model's, where its own isn't known."""
    hub_id, packaged = _hub_id(name, given), _packaged(name, given)
    folder = Path(given) if given is not None and Path(given).is_dir() else None
    if packaged is not None:
        folder = ready_folder(packaged.name)
    size = [f"{millions(parameters)} parameters"] if parameters else []
    if hub_id is not None:
        return Model(hub_id, ", ".join([f"[`{hub_id}`]({HUB}/{hub_id})", *size]), folder, packaged)
    known = folder or like
    config = _json(known / "config.json") if known is not None else {}
    parts = [*(f"`{kind}`" for kind in config.get("architectures") or []), *size]
    return Model(None, ", ".join(["a model that isn't on the hub", *parts]), folder)


def _student(run: RunFiles, settings: Mapping[str, Any]) -> Model:
    models, given = run.result.get("models") or {}, settings.get("model_name_or_path")
    parameters = models.get("student_parameters")
    if not _is_adapter(run):
        return _model(models.get("student"), given, parameters, run.folder)
    # Where its base was when it was loaded: a packaged model's own folder.
    base = _json(run.folder / "adapter_config.json").get("base_model_name_or_path")
    given = base if given is None or Path(str(base)).is_dir() else given
    return _model(models.get("student"), given, parameters and parameters - (models.get("trained_parameters") or 0))


def _teacher(run: RunFiles, settings: Mapping[str, Any]) -> Model | None:
    models, given = run.result.get("models") or {}, settings.get("teacher_model_name_or_path")
    name = models.get("teacher")
    if METHODS[run.method].text == "teacher" or (name and settings.get("sft_teacher")):
        name = given if given is None or not Path(given).is_dir() else Path(given).resolve().name
    # One that was passed as a loaded model may have no name.
    if not name and not models.get("teacher_parameters"):
        return None
    teacher = _model(name or None, given, models.get("teacher_parameters"))
    if not settings.get("sft_teacher"):
        return teacher
    # What it was before: its tokenizer and licence are the same.
    return Model(
        teacher.hub_id, f"{teacher.words}, first fine-tuned on the same data", teacher.folder, teacher.packaged
    )


def _dataset(run: RunFiles) -> str | None:
    """Name of the training data on the hub; `None` for what lies on this machine."""
    from ..run import PYTHON_FUNCTIONS

    source = (run.result.get("data") or {}).get("source")
    if source in (None, PYTHON_FUNCTIONS) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        return None
    # A path is relative to where the run was started: here, or in a folder that its own is in.
    places = (Path.cwd(), *run.folder.resolve().parents)
    if source.endswith((".json", ".jsonl", ".csv", ".parquet")) or any((place / source).exists() for place in places):
        return None
    return str(source)


def _dataset_words(run: RunFiles, source: str | None) -> str:
    from ..run import PYTHON_FUNCTIONS

    if source is not None:
        return f"[`{source}`]({HUB}/datasets/{source})"
    if (run.result.get("data") or {}).get("source") == PYTHON_FUNCTIONS:
        return "functions of Python's standard library with their docstrings (`python_functions` of hf_dskd)"
    return "data that isn't on the hub"


def _vocabularies_differ(run: RunFiles, teacher: Model | None) -> bool:
    """Whether student and teacher have two vocabularies, as far as the teacher's lies on this machine."""
    from huggingface_hub import try_to_load_from_cache

    if teacher is None:
        return False
    path: Any = None
    if teacher.folder is not None:
        path = teacher.folder / "tokenizer.json"
    elif teacher.hub_id is not None:
        path = try_to_load_from_cache(teacher.hub_id, "tokenizer.json")
    own = run.folder / "tokenizer.json"
    if not isinstance(path, (str, Path)) or not Path(path).is_file() or not own.is_file():
        return False
    return bool(_json(own)["model"].get("vocab") != _json(Path(path))["model"].get("vocab"))


# ---- Licences


def _licence(model: Model, token: str | None, online: bool) -> Licence | None:
    """As the package says, else the local folder, else the hub."""
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
    page = f"{HUB}/{'datasets/' if kind == 'dataset' else ''}{name}"
    return _card_licence(info.card_data, "stated on its page on the hub", page)


def _card_licence(data: Any, found: str, page: str | None) -> Licence | None:
    """Of a card's metadata. The hub wants a name and a link for one that it doesn't know."""
    ids = data and data.get("license")
    if not ids:
        return None
    if ids != "other":
        return Licence(ids, found)
    link = data.get("license_link")
    if page is not None and not str(link or "").startswith("http"):
        link = f"{page}/blob/main/{link}" if link else page
    return Licence("other", found, data.get("license_name") or "license-of-the-base-model", link or "LICENSE")


def _folder_licence(folder: Path) -> Licence | None:
    from huggingface_hub import ModelCard

    file = next((path for path in sorted(folder.glob("LICEN[SC]E*")) if path.is_file()), None)
    readme = folder / "README.md"
    if readme.is_file():
        data = ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
        found = _card_licence(data, "stated by the README.md in its folder", None)
        if found is not None and (found.link != "LICENSE" or file is not None):
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


def _licence_lines(
    licence: Licence | None, student: Model, teacher: Model | None, source: str | None, token: str | None, online: bool
) -> list[tuple[str, str]]:
    """Whose, and what was found."""
    lines = [("student before training", _licence_words(licence, student))]
    if teacher is not None:
        lines.append(("teacher", _licence_words(_licence(teacher, token, online), teacher)))
    found = _hub_licence(source, "dataset", token) if source is not None and online else None
    lines.append(("training data", _licence_words(found, None)))
    return lines


def _licence_words(licence: Licence | None, model: Model | None) -> str:
    if licence is None:
        stated = model.packaged.licence if model is not None and model.packaged is not None else None
        return f"not found ({stated})" if stated else "not found"
    names = [licence.ids] if isinstance(licence.ids, str) else licence.ids
    words = ", ".join(f"`{name}`" for name in names)
    if licence.name is not None:
        words += f", [{licence.name}]({licence.link})"
    return f"{words}, {licence.found}"


# ---- What was measured


def _scores(run: RunFiles) -> list[dict[str, Any]]:
    """`scores.json` of the evaluations in the run's folder that were made of these very weights."""
    weights = [path for pattern in WEIGHTS for path in sorted(run.folder.glob(pattern))]
    found = []
    for path in sorted(run.folder.glob("*/scores.json")):
        evaluated = _json(path.with_name("evaluation.json")).get("evaluated", {})
        role = "adapter" if _is_adapter(run) else "model"
        if all(evaluated.get(f"{role}: {file.name}") == _sha256(file) for file in weights):
            found.append(_json(path))
        else:
            logger.warning("%s is of other weights than the run's and stays out of the model card", path.parent.name)
    return found


def _scores_table(scores: Mapping[str, Any]) -> str:
    """Without its first line, which names the folder that was evaluated."""
    from ..evaluation.table import table

    return table(scores).partition("\n\n")[2].strip()


def _eval_results(run: RunFiles, scores: list[dict[str, Any]], source: str | None) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    from ..evaluation.sets import HUB_SETS

    task: dict[str, Any] = {"task_type": "text-generation", "task_name": "Text Generation"}
    results = []
    for found in scores:
        for name, part in found["sets"].items():
            hub_set = HUB_SETS.get(name)
            on_hub = hub_set is not None and part["source"] == f"{hub_set.repository}/{hub_set.file}"
            where = {"dataset_type": hub_set.repository if on_hub and hub_set else name, "dataset_name": name}
            given = found["settings"]
            seeds, limit = given["seeds"], given["limit"]
            few = f", the first {limit:,} examples" if limit is not None else ""
            how = f"mean over {len(seeds)} decoding seed{'s' * (len(seeds) > 1)}" if seeds else "greedy"
            answers = part["sampled"] if seeds else part["greedy"]
            measures = [("rouge", f"ROUGE-L ({how}{few})", answers["rouge_l"])]
            measures.append(("bits_per_byte", f"bits per byte of the references{few}", part["bits_per_byte"]))
            results += [
                EvalResult(**task, **where, metric_type=kind, metric_name=title, metric_value=value)
                for kind, title, value in measures
                if value is not None
            ]
    for key in measures_of(run.result.get("metrics", {})):
        if key.endswith("bits_per_byte"):
            results.append(
                EvalResult(
                    **task,
                    dataset_type=source or "held-out",
                    dataset_name=f"held-out examples{f' of {source}' if source else ''}",
                    metric_type="bits_per_byte",
                    metric_name=title_of(key),
                    metric_value=round(run.result["metrics"][key], 6),
                )
            )
    return results


def _has_curves(run: RunFiles) -> bool:
    from ..analysis.curves import PANELS, _panel_lines

    return any(_panel_lines({run.method: run.history}, keys) for keys in PANELS.values())


def _alignment_picture(run: RunFiles) -> tuple[Path, str] | None:
    """The last picture of the attention on one example, and when that was."""
    for path in sorted(run.folder.glob("analysis/step-*"), key=lambda path: -int(path.name.removeprefix("step-"))):
        pictures = sorted(path.glob("alignment-*.png"), key=lambda picture: int(picture.stem.split("-")[1]))
        if pictures:
            return pictures[0], f"after step {int(path.name.removeprefix('step-')):,}"
    path = run.folder / "alignment.png"
    return (path, "after training") if path.is_file() else None


# ---- Text and files


def _linked(text: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _told_settings(settings: Mapping[str, Any], models: list[str | None], source: str | None) -> list[tuple[str, str]]:
    """Settings that may leave the machine, as text."""
    public = {*models, source}
    told = ((name, _told(value, public)) for name, value in sorted(settings.items()) if name not in UNTOLD)
    return [(name, setting(value).replace("|", "\\|")) for name, value in told if value not in (None, {}, [])]


def _told(value: Any, public: set[str | None]) -> Any:
    """The value without what may be a path or a token."""
    if isinstance(value, dict):
        told = {name: _told(part, public) for name, part in value.items() if name not in UNTOLD}
        return {name: part for name, part in told.items() if part is not None}
    if isinstance(value, list):
        return [part for part in (_told(part, public) for part in value) if part is not None]
    if isinstance(value, str) and value not in public and re.search(r"[/\\]|^[~.]|hf_[A-Za-z0-9]{8}", value):
        return None
    return value


def _renamed(path: Path, student: Model) -> str | None:
    """A config with the student's name in place of folders of this machine; `None` if there is nothing to change."""
    content = _json(path)
    named = {key: content[key] for key in NAME_KEYS if content.get(key)}
    changed = {key: student.hub_id or Path(value).name for key, value in named.items()}
    return None if changed == named else json.dumps({**content, **changed}, indent=2, ensure_ascii=False) + "\n"


def _write_generation_config(destination: Path, student: Model, token: str | None, online: bool) -> None:
    """What follows from a model's config; of an adapter that of its base, where it can be had."""
    target = destination / "generation_config.json"
    if (destination / "config.json").is_file():
        from transformers import AutoConfig, GenerationConfig

        GenerationConfig.from_model_config(AutoConfig.from_pretrained(destination)).save_pretrained(destination)
    elif student.folder is not None and (student.folder / target.name).is_file():
        _put(student.folder / target.name, target)
    elif student.hub_id is not None:
        from huggingface_hub import hf_hub_download

        try:
            path = hf_hub_download(student.hub_id, target.name, token=token, local_files_only=not online)
        except Exception as error:  # the client raises those of two HTTP libraries; the base has its own all the same
            logger.warning("no generation config of %s: %s", student.hub_id, " ".join(str(error).split())[:200])
        else:
            _put(Path(path), target)


def _write_auxiliary(run: RunFiles, folder: Path, student: Model, teacher: Model | None) -> None:
    facts = _json(run.folder / AUXILIARY_NAME)
    for role, model in (("student", student), ("teacher", teacher)):
        if facts.get(role):
            facts[role] = (model and model.hub_id) or Path(facts[role]).name
    folder.mkdir()
    (folder / AUXILIARY_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for name in ROLES:
        path = run.folder / f"{name}.safetensors"
        if path.is_file():
            _put(path, folder / path.name)


def _put(source: Path, target: Path) -> None:
    """A copy; of weights, which are large and which nobody edits, another name for the same file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix in (".safetensors", ".bin"):
        try:
            os.link(source, target)
            return
        except OSError:  # another disk, or one that can't
            pass
    shutil.copyfile(source, target)


def _json(path: Path) -> Any:
    """Content of a JSON file; nothing if there is no file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{str(path)!r} isn't valid JSON ({error}): restore it or run the training again") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
