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
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..data.files import format_of
from ..errors import UserError
from ..methods import METHODS
from ..packaged import MARKER, PACKAGED_MODELS, PackagedModel, ready_folder
from ..report.files import RunFiles, changed_settings, metrics_before, read_run, runs_in
from ..report.words import duration, measured, measures_of, millions, setting, title_of, with_commit
from ..training.run_folder import AUXILIARY_NAME, ROLES
from ..utils.files import read_json, read_yaml, write_text
from .names import page


if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

logger = logging.getLogger(__name__)

TAG = "hf_dskd"
TEMPLATE = Path(__file__).with_name("card.md")
# What `from_pretrained` reads of an adapter, of a model, and of either's tokenizer. A run leaves other files beside
# them, and the run before it in the same folder may have left what is not its own.
WEIGHTS = {
    True: ("adapter_model.safetensors", "adapter_model.bin"),
    False: ("model*.safetensors", "pytorch_model*.bin"),
}
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
    *(f"auxiliary/{name}" for name in (AUXILIARY_NAME, *(f"{role}.safetensors" for role in ROLES))),
)
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
        name: For people.
        size: Its parameters, for people.
        folder: Where it lies on this machine, as far as that is known.
        packaged: Where it came from, if it is a packaged model.
    """

    hub_id: str | None
    name: str
    size: str | None = None
    folder: Path | None = None
    packaged: PackagedModel | None = None

    @property
    def words(self) -> str:
        return self.name if self.size is None else f"{self.name}, {self.size} parameters"


def identity(student: str | None, adapter: bool, method: str, model_type: str | None = None) -> dict[str, str | None]:
    """
    What tells a pushed student from other models in a repository, as its card has it: for
    [`~hf_dskd.hub.push.check_access`] before there is a run.

    Args:
        student (`str`, *optional*): Name or folder of the model that is trained.
        adapter (`bool`): Whether an adapter of it is.
        method (`str`): By which it is.
        model_type (`str`, *optional*): Its architecture, as its config says; that of the folder by default.
    """
    is_folder = student is not None and os.path.isdir(student)
    name = Path(str(student)).resolve().name if is_folder else student
    if model_type is None and is_folder:
        model_type = read_json(Path(str(student)) / "config.json", {}).get("model_type")
    return {
        "base_model": _hub_id(name, student),
        "library_name": "peft" if adapter else "transformers",
        "method": method,
        "model_type": model_type,
    }


def run_identity(folder: str | Path) -> dict[str, str | None]:
    """[`identity`] of the student of a finished run."""
    run = read_finished(folder)
    return {
        "base_model": _student(run, _settings(run)).hub_id,
        "library_name": "peft" if _is_adapter(run) else "transformers",
        "method": run.method,
        "model_type": (run.result.get("models") or {}).get("student_type"),
    }


def read_finished(folder: str | Path) -> RunFiles:
    """[`~hf_dskd.report.files.read_run`]; of a comparison, which is several runs, it names them."""
    if (Path(folder) / "cells").is_dir():
        cells = ", ".join(str(cell) for cell in runs_in([folder])[0])
        raise UserError(f"{str(folder)!r} holds the runs of a comparison: push one of them, {cells}")
    return read_run(folder)


def model_card(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    alignment: bool = True,
    token: str | None = None,
    online: bool = True,
) -> ModelCard:
    """
    The model card of a finished run, from the files in its folder.

    Folders of this machine are named nowhere in it, nor are tokens.

    Args:
        folder (`str` or `Path`): What `hf-dskd train` wrote.
        repo_id (`str`, *optional*): Where the model will be, as `namespace/name`.
        alignment (`bool`, *optional*, defaults to `True`): With the picture of the alignment, where there is one.
        token (`str`, *optional*): Of the hub; the one of `HF_TOKEN` or `hf auth login` by default.
        online (`bool`, *optional*, defaults to `True`):
            Whether to ask the hub for licences; not with HF_HUB_OFFLINE=1.

    Returns:
        [`~huggingface_hub.ModelCard`]: with `images/curves.png` and `images/alignment.png` where
        [`write_model_folder`] writes them.

    Raises:
        UserError: If it is no folder of a finished run, or a file in it can't be read.
    """
    from huggingface_hub import ModelCard, ModelCardData, constants

    run, online = read_finished(folder), online and not constants.HF_HUB_OFFLINE
    models, given = run.result.get("models") or {}, run.result.get("card") or {}
    settings, adapter = _settings(run), _is_adapter(run)
    student, teacher, source = _student(run, settings), _teacher(run, settings), _dataset(run)
    sources = [name for name in given.get("datasets", ()) if _is_on_hub(run, name)] or ([source] if source else [])
    of_student = _licence(student, token, online)
    licence = _given_licence(given["license"]) if given.get("license") else of_student
    method = METHODS[run.method]
    scores = _scores(run)
    name = repo_id.split("/")[-1] if repo_id else f"{(student.hub_id or 'student').split('/')[-1]}-{run.method}"
    name = given.get("model_name") or name
    results = _eval_results(run, scores, sources[0] if sources else None)
    across = _vocabularies_differ(run, teacher)
    # By its tags a repository is told from one with another model: a base of the hub says enough.
    architecture = models.get("student_type") if student.hub_id is None else None
    tags = [TAG, teacher and "knowledge-distillation", across and "cross-tokenizer", run.method, architecture]
    data = ModelCardData(
        language=given.get("language"),
        model_name=name,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=student.hub_id,
        base_model_relation=("adapter" if adapter else "finetune") if student.hub_id else None,
        datasets=sources or None,
        license=licence and licence.ids,  # type: ignore[arg-type]  # a list is as good
        license_name=licence and licence.name,
        license_link=licence and licence.link,
        tags=[tag for tag in (*tags, *given.get("tags", ())) if tag],
        eval_results=results or None,
    )
    if not results:
        del data.model_name  # of no use without results, and no key that the hub knows
    from ..utils.environment import in_words

    before = metrics_before(run.result, run.history)
    reports = run.result.get("data") or {}
    held_out = (reports.get("eval") or {}).get("kept")
    answered = run.result.get("settings", {}).get("eval_generation_samples")
    seeds = _training_seeds(run)
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
        trained_parameters=_trained(models),
        student_bits=models.get("student_bits"),
        teacher=teacher,
        teacher_in_4bit=bool(run.result.get("settings", {}).get("load_teacher_in_4bit")),
        across=across,
        gguf=[model for model in (student, teacher) if model and model.packaged],
        dataset=_dataset_words(run, source, given.get("datasets", ())),
        prompt_style=run.result.get("settings", {}).get("prompt_style"),
        chat_template=_has_chat_template(run.folder),
        chat_template_kwargs=run.result.get("settings", {}).get("chat_template_kwargs"),
        result=run.result,
        examples=(reports.get("train") or {}).get("kept"),
        held_out=held_out,
        seconds=duration(run.result["train_runtime"]) if run.result.get("train_runtime") is not None else None,
        hardware=in_words(hardware) if hardware else None,
        commits=[
            f"{role}: {with_commit(models, role)}" for role in ("student", "teacher") if models.get(f"{role}_commit")
        ],
        fingerprint=reports.get("fingerprint"),
        versions=", ".join(f"{package} {version}" for package, version in run.result.get("versions", {}).items()),
        changed=_told_settings(settings, [model.hub_id for model in (student, teacher) if model], source),
        measures=[
            (title_of(key), measured(before.get(key)), measured(value), _over_seeds(seeds, key))
            for key in measures_of(run.result.get("metrics", {}))
            if isinstance(value := run.result["metrics"][key], (int, float))
        ],
        measured_before=bool(before),
        answered=min(answered, held_out) if answered and held_out else answered,
        scores=[_scores_table(found) for found in scores],
        seeds_of_training=run.result.get("seed"),
        compared_seeds=", ".join(str(line["seed"]) for line in seeds),
        curves=_has_curves(run),
        alignment=_alignment_picture(run) if alignment else None,
        licence_given=given.get("license"),
        licences=_licence_lines(of_student, student, teacher, source, token, online),
        licence_found=licence is not None,
        licence_sought=_is_sought(student, online),
    )


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
        folder (`str` or `Path`): What `hf-dskd train` wrote.
        destination (`str` or `Path`): A folder that is empty or doesn't exist.
        repo_id (`str`, *optional*): Where the model will be, as `namespace/name`.
        auxiliary (`bool`, *optional*, defaults to `False`): Projectors and discriminator too, in `auxiliary/`.
        alignment (`bool`, *optional*, defaults to `True`):
            The picture of the alignment too, where there is one: it shows the text of an example.
        token (`str`, *optional*): Of the hub; the one of `HF_TOKEN` or `hf auth login` by default.
        online (`bool`, *optional*, defaults to `True`):
            Whether to ask the hub for licences and for the generation config of an adapter's base; not with
            HF_HUB_OFFLINE=1.

    Returns:
        `Path`: `destination`.

    Raises:
        UserError: If it is no folder of a finished run, has no model, or `destination` has files already.
    """
    run, destination = read_finished(folder), Path(destination)
    settings, adapter = _settings(run), _is_adapter(run)
    student = _student(run, settings)
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
            _put(path, target)
        else:
            write_text(target, content)
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
    alignment: bool = True,
    token: str | None = None,
    online: bool = True,
) -> None:
    """Writes the [`model_card`] of a finished run to `README.md` in a folder, and its pictures to `images` there."""
    from ..analysis.curves import plot_curves

    run, destination = read_finished(folder), Path(destination)
    card = model_card(folder, repo_id, alignment=alignment, token=token, online=online)
    destination.mkdir(parents=True, exist_ok=True)
    if _has_curves(run):
        plot_curves({run.method: run.history}, destination / "images" / "curves.png")
    picture = _alignment_picture(run) if alignment else None
    if picture is not None:
        _put(picture.path, destination / "images" / "alignment.png")
    write_text(destination / "README.md", str(card).rstrip("\n") + "\n")


def write_own_card(folder: str | Path, repo_id: str | None) -> None:
    """[`write_card`] to the run's own folder, without asking the hub; a README.md of somebody else's there stays."""
    readme = Path(folder) / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="replace")
        tags = getattr(_card_data(text), "tags", None)
        if not isinstance(tags, list) or TAG not in tags:
            logger.warning("%s isn't a model card of %s and stays: the card is written by a push", readme, TAG)
            return
    write_card(folder, folder, repo_id, online=False)


def _card_data(text: str) -> Any:
    """The metadata of a README.md; `None` if it begins with something else."""
    import yaml
    from huggingface_hub import ModelCard

    try:
        return ModelCard(text, ignore_metadata_errors=True).data
    except (ValueError, TypeError, yaml.YAMLError):
        return None


# ---- Who the models are


def _settings(run: RunFiles) -> dict[str, Any]:
    """Settings that aren't at their default: everything a command line can say, or those of the trainer alone."""
    from ..result import SETTINGS_NAME

    path = run.folder / SETTINGS_NAME
    if path.is_file():
        return read_yaml("the run's settings", path)
    return {name: value for name, (_, value) in changed_settings(run.result).items()}


def _is_adapter(run: RunFiles) -> bool:
    """As the run says; files of a run before it may lie in its folder."""
    said = (run.result.get("models") or {}).get("adapter")
    return (run.folder / "adapter_config.json").is_file() if said is None else bool(said)


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
    size = millions(parameters) if parameters else None
    if hub_id is not None:
        return Model(hub_id, f"[`{hub_id}`]({page(hub_id)})", size, folder, packaged)
    known = folder or like
    config = read_json(known / "config.json", {}) if known is not None else {}
    kinds = ", ".join(f"`{kind}`" for kind in config.get("architectures") or [])
    # A model that was passed as an object may be on the hub all the same.
    where = "a local model" if given is not None else "a model whose origin was not recorded"
    return Model(None, f"{where} ({kinds})" if kinds else where, size, folder)


def _student(run: RunFiles, settings: Mapping[str, Any]) -> Model:
    models, given = run.result.get("models") or {}, settings.get("model_name_or_path")
    parameters = models.get("student_parameters")
    if given is None and models.get("base_model") == models.get("student"):
        given = models.get("base_model")  # of a run that `hf-dskd` didn't start: a name without a slash is no folder's
    if not _is_adapter(run):
        return _model(models.get("student"), given, parameters, run.folder)
    # Where its base was when it was loaded: a packaged model's own folder.
    base = read_json(run.folder / "adapter_config.json", {}).get("base_model_name_or_path")
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
    return replace(teacher, name=f"{teacher.name}, first fine-tuned on the same data")


def _trained(models: Mapping[str, Any]) -> str | None:
    """How many of the student's parameters were trained."""
    trained = models.get("trained_parameters")
    if not trained:
        return None
    return "all" if trained == models.get("student_parameters") else millions(trained)


def _has_chat_template(folder: Path) -> bool:
    saved = (folder / "chat_template.jinja").is_file()
    return saved or bool(read_json(folder / "tokenizer_config.json", {}).get("chat_template"))


def _dataset(run: RunFiles) -> str | None:
    """Name of the training data on the hub; `None` for what lies on this machine."""
    source = (run.result.get("data") or {}).get("source")
    return source if source is not None and _is_on_hub(run, source) else None


def _is_on_hub(run: RunFiles, source: str) -> bool:
    """Whether that is the name of a dataset on the hub, as far as names and this machine's folders tell."""
    from ..run import PYTHON_FUNCTIONS

    if source == PYTHON_FUNCTIONS or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        return False
    # A path is relative to where the run was started: here, or in a folder that its own is in.
    places = (Path.cwd(), *run.folder.resolve().parents)
    return format_of(source) is None and not any((place / source).exists() for place in places)


def _dataset_words(run: RunFiles, source: str | None, given: Sequence[str]) -> str:
    """`given` are names that the user has for the card."""
    from ..run import PYTHON_FUNCTIONS

    if given or source is not None:
        names = given or [str(source)]
        return ", ".join(f"[`{name}`]({page(name, 'dataset')})" if _is_on_hub(run, name) else name for name in names)
    recorded = (run.result.get("data") or {}).get("source")
    if recorded == PYTHON_FUNCTIONS:
        return "functions of Python's standard library with their docstrings (`python_functions` of hf_dskd)"
    return "not recorded" if recorded is None else "data that isn't on the hub"


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
    return bool(read_json(own, {})["model"].get("vocab") != read_json(Path(path), {})["model"].get("vocab"))


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
    return _card_licence(info.card_data, "stated on its page on the hub", page(name, kind))


def _known(licence: Licence) -> Licence:
    """As the hub takes it: a licence that it has no id for is `"other"`, with that name."""
    ids = [licence.ids] if isinstance(licence.ids, str) else licence.ids
    if LICENCES.issuperset(ids):
        return licence
    return licence._replace(ids="other", name=licence.name or ", ".join(map(str, ids)))


def _given_licence(ids: str) -> Licence:
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
        data = _card_data(readme.read_text(encoding="utf-8", errors="replace"))
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


def _licence_lines(
    licence: Licence | None, student: Model, teacher: Model | None, source: str | None, token: str | None, online: bool
) -> list[tuple[str, str]]:
    """Whose, and what was found."""
    lines = [("student before training", _licence_words(licence, student, _is_sought(student, online)))]
    if teacher is not None:
        found = _licence(teacher, token, online)
        lines.append(("teacher", _licence_words(found, teacher, _is_sought(teacher, online))))
    found = _hub_licence(source, "dataset", token) if source is not None and online else None
    lines.append(("training data", _licence_words(found, None, online and source is not None)))
    return lines


def _is_sought(model: Model, online: bool) -> bool:
    """Whether there is a place to look for a model's licence."""
    return model.folder is not None or (online and model.hub_id is not None)


def _licence_words(licence: Licence | None, model: Model | None, sought: bool) -> str:
    if licence is None:
        stated = model.packaged.licence if model is not None and model.packaged is not None else None
        missing = "not found" if sought else "not looked up"
        return f"{missing} ({stated})" if stated else missing
    names = [licence.ids] if isinstance(licence.ids, str) else licence.ids
    words = ", ".join(f"`{name}`" for name in names)
    if licence.name is not None:
        words += f", [{licence.name}]({licence.link})" if licence.link else f", {licence.name}"
    return f"{words}, {licence.found}"


# ---- What was measured


def _scores(run: RunFiles) -> list[dict[str, Any]]:
    """`scores.json` of the evaluations in the run's folder that were made of these very weights."""
    weights = [path for pattern in WEIGHTS[_is_adapter(run)] for path in sorted(run.folder.glob(pattern))]
    found = []
    for path in sorted(run.folder.glob("*/scores.json")):
        evaluated = read_json(path.with_name("evaluation.json"), {}).get("evaluated", {})
        role = "adapter" if _is_adapter(run) else "model"
        if all(evaluated.get(f"{role}: {file.name}") == _sha256(file) for file in weights):
            found.append(read_json(path, {}))
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

    # Several evaluations of a set are told apart by their prompts.
    styles = {found["settings"]["prompt_style"] for found in scores}
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
            few += f", {given['prompt_style']} prompts" if len(styles) > 1 else ""
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
    from ..analysis.curves import panel_lines, panels

    return any(panel_lines({run.method: run.history}, keys) for keys in panels().values())


def _training_seeds(run: RunFiles) -> list[dict[str, Any]]:
    """Of a cell of a comparison, the lines of `results.jsonl` of the same row; none where it has one seed."""
    cell = run.folder.resolve()
    path = cell.parent.parent / "results.jsonl"
    if run.label is None or cell.parent.name != "cells" or not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    own = [line for line in lines if line["label"] == run.label and line["status"] == "ok"]
    known = any(line["seed"] == run.result.get("seed") and line["metrics"] == run.result["metrics"] for line in own)
    return own if known and len(own) > 1 else []


def _over_seeds(seeds: Sequence[Mapping[str, Any]], key: str) -> str:
    """Mean and standard deviation of a metric over training seeds."""
    numbers = [line["metrics"][key] for line in seeds if line["metrics"].get(key) is not None]
    if len(numbers) < 2:
        return "–"
    return f"{measured(statistics.fmean(numbers))} ± {measured(statistics.stdev(numbers))}"


class Picture(NamedTuple):
    """
    Of the attention on one example.

    Attributes:
        when: It was taken.
        example: What it is of.
    """

    path: Path
    when: str
    example: str


def _alignment_picture(run: RunFiles) -> Picture | None:
    """The last picture of the attention on one example."""
    splits = [name for name in run.result.get("data") or {} if name.startswith("eval")]
    example = "a held-out example" if splits else "an example of the training data"
    # Pictures whose numbers are gone are of a run before this one in the same folder.
    for step in sorted((line["step"] for line in run.analyses), reverse=True):
        pictures = sorted(
            run.folder.glob(f"analysis/step-{step}/alignment-*.png"),
            key=lambda picture: int(picture.stem.split("-")[1]),
        )
        if pictures:
            return Picture(pictures[0], f"after step {step:,}", example)
    path = run.folder / "alignment.png"
    return Picture(path, "after training", example) if path.is_file() else None


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
    facts = read_json(run.folder / AUXILIARY_NAME, {})
    for role, model in (("student", student), ("teacher", teacher)):
        if facts.get(role):
            facts[role] = (model and model.hub_id) or Path(facts[role]).name
    folder.mkdir()
    (folder / AUXILIARY_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for module in facts["modules"].values():
        _put(run.folder / module["file"], folder / module["file"])


def _put(source: Path, target: Path) -> None:
    """A copy; of weights, which are large and which nobody edits, another name for the same file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()  # of a link, another name for its file
    if source.suffix in (".safetensors", ".bin"):
        try:
            os.link(source, target)
            return
        except OSError:  # another disk, or one that can't
            pass
    shutil.copyfile(source, target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
