"""The model card of a run: its metadata, its text, its pictures."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..analysis.curves import has_curves, plot_curves
from ..methods import METHODS
from ..offline.python_functions import PYTHON_FUNCTIONS
from ..report.record import RunRecord
from ..report.words import duration, measured, measures_of, millions, setting, title_of
from ..utils.files import read_json, write_text
from ..utils.markup import Markdown, code, escaped, render
from ..utils.tables import spread
from .identity import TAG, FinishedRun
from .licences import Licence, card_data, given_licence, is_sought, licence_lines, licence_of
from .names import page


if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

logger = logging.getLogger(__name__)

# Files of the weights of an adapter, and of a model.
WEIGHTS = {
    True: ("adapter_model.safetensors", "adapter_model.bin"),
    False: ("model*.safetensors", "pytorch_model*.bin"),
}
# Settings that say nothing about the student (where files went, who was told), or that the card has elsewhere.
NOT_IN_CARDS = frozenset(
    "output_dir logging_dir run_name report_to project trackio_space_id push_to_hub hub_model_id hub_strategy"
    " hub_token hub_private_repo hub_always_push hub_revision resume_from_checkpoint overwrite_output_dir disable_tqdm"
    " teacher_cache repair_teacher_cache model_name_or_path teacher_model_name_or_path dataset_name logging_strategy"
    " logging_steps logging_first_step log_level save_strategy save_steps save_total_limit dataloader_num_workers"
    " dataloader_pin_memory dataset_num_proc do_train do_eval do_predict token cache_dir use_auth_token config"
    " push_to_hub_model_id push_to_hub_organization push_to_hub_token".split()
)


def model_card(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    alignment: bool = True,
    token: str | None = None,
    online: bool = True,
) -> ModelCard:
    """
    Makes the model card of a finished run, from the files in its folder.

    Folders of this machine are named nowhere in it, nor are tokens.

    Args:
        folder (`str` or `Path`): What `hf-dskd train` wrote.
        repo_id (`str`, *optional*): Where the model will be, as `namespace/name`.
        alignment (`bool`, *optional*, defaults to `True`):
            With the picture of the alignment, where there is one: it shows the text of an example.
        token (`str`, *optional*): Of the hub; the one of `HF_TOKEN` or `hf auth login` by default.
        online (`bool`, *optional*, defaults to `True`):
            Whether to ask the hub for licences; not with HF_HUB_OFFLINE=1.

    Returns:
        [`~huggingface_hub.ModelCard`]: with `images/curves.png` and `images/alignment.png` where
        [`~hf_dskd.hub.folder.write_model_folder`] writes them.

    Raises:
        UserError: If it is no folder of a finished run, or a file in it can't be read.
    """
    from huggingface_hub import ModelCard, constants

    run, online = FinishedRun(folder), online and not constants.HF_HUB_OFFLINE
    student, given = run.student, run.record.card
    of_student = licence_of(student, token, online)
    licence = given_licence(given.license) if given.license else of_student
    scores = _scores(run)
    name = repo_id.split("/")[-1] if repo_id else f"{(student.hub_id or 'student').split('/')[-1]}-{run.record.method}"
    name = given.model_name or name
    metadata = _metadata(run, name, licence, scores)
    return ModelCard(
        render(
            "hub/card.md",
            metadata=Markdown(metadata.to_yaml()),
            name=name,
            repo_id=repo_id or "REPOSITORY",
            run=run,
            **_models(run),
            **_training(run),
            **_results(run, scores),
            alignment=alignment_picture(run) if alignment else None,
            licence_found=licence is not None,
            licence_sought=is_sought(student, online),
            licences=licence_lines(of_student, run, token, online),
        )
    )


def _metadata(
    run: FinishedRun, name: str, licence: Licence | None, scores: Sequence[Mapping[str, Any]]
) -> ModelCardData:
    from huggingface_hub import ModelCardData

    student, teacher, given, method = run.student, run.teacher, run.record.card, run.record.method
    sources = [name for name in given.datasets if run.is_on_hub(name)] or ([run.dataset] if run.dataset else [])
    results = _eval_results(run.record, scores, sources[0] if sources else None)
    # By its tags a repository is told from one with another model: a base of the hub says enough.
    architecture = run.record.models.student_type if student.hub_id is None else None
    across = _vocabularies_differ(run) and "cross-tokenizer"
    tags = [TAG, teacher and "knowledge-distillation", across, method, architecture, *given.tags]
    data = ModelCardData(
        language=given.language,
        model_name=name,
        library_name="peft" if run.adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=student.hub_id,
        base_model_relation=("adapter" if run.adapter else "finetune") if student.hub_id else None,
        datasets=sources or None,
        license=licence and licence.ids,  # type: ignore[arg-type]  # a list is as good
        license_name=licence and licence.name,
        license_link=licence and licence.link,
        tags=[tag for tag in tags if tag],
        eval_results=results or None,
    )
    if not results:
        del data.model_name  # of no use without results, and no key that the hub knows
    return data


def _models(run: FinishedRun) -> dict[str, Any]:
    """What the card's beginning says of the models and the data."""
    models, method, options = run.record.models, METHODS[run.record.method], run.record.settings
    trained = models.trained_parameters
    saved_template = (run.folder / "chat_template.jinja").is_file()
    told = "".join(f", {name}={value!r}" for name, value in (options.get("chat_template_kwargs") or {}).items())
    return {
        # What the summary of one method says by the name of another.
        "method_summary": Markdown(re.sub(r"^dskd_cma\b", f"{METHODS['dskd_cma'].summary},", method.summary)),
        "method_source": Markdown(
            re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", method.source)
        ),
        "method_has_paper": "arXiv" in method.source,
        "student_parameters": millions(models.student_parameters) if models.student_parameters else None,
        "trained_parameters": "all" if trained == models.student_parameters else trained and millions(trained),
        "across": _vocabularies_differ(run),
        "gguf": [model for model in (run.student, run.teacher) if model and model.packaged],
        "dataset": _dataset_words(run),
        "chat_template": saved_template
        or bool(read_json(run.folder / "tokenizer_config.json", {}).get("chat_template")),
        "template_call": told and code(f"apply_chat_template(messages, add_generation_prompt=True{told})"),
    }


def _training(run: FinishedRun) -> dict[str, Any]:
    """What the card says of how the student was trained."""
    record = run.record
    roles = [role for role in ("student", "teacher") if getattr(record.models, f"{role}_commit")]
    return {
        "seconds": None if record.train_runtime is None else duration(record.train_runtime),
        "commits": [f"{role}: {record.models.with_commit(role)}" for role in roles],
        "versions": ", ".join(f"{package} {version}" for package, version in record.versions.items()),
        "changed": _told_settings(run),
        "curves": has_curves(run.files.history),
    }


def _results(run: FinishedRun, scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the card says of how good the student is."""
    from ..evaluation.table import table

    record, before, seeds = run.record, run.files.metrics_before, _training_seeds(run)
    held_out, answered = record.data.rows("eval"), record.settings.get("eval_generation_samples")
    return {
        "held_out": held_out,
        "answered": min(answered, held_out) if answered and held_out else answered,
        "measured_before": bool(before),
        "measures": [
            (title_of(key), measured(before.get(key)), measured(value), _over_seeds(seeds, key))
            for key in measures_of(record.metrics)
            if isinstance(value := record.metrics[key], (int, float))
        ],
        "score_seeds": "; a standard deviation of scores is that of decoding seeds" if scores else "",
        "compared_seeds": ", ".join(str(line["seed"]) for line in seeds),
        # Without their first line, which names the folder that was evaluated.
        "scores": [Markdown(table(found).partition("\n\n")[2].strip()) for found in scores],
    }


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
    run, destination = FinishedRun(folder), Path(destination)
    card = model_card(folder, repo_id, alignment=alignment, token=token, online=online)
    destination.mkdir(parents=True, exist_ok=True)
    if has_curves(run.files.history):
        plot_curves({run.record.method: run.files.history}, destination / "images" / "curves.png")
    picture = alignment_picture(run) if alignment else None
    if picture is not None:
        put(picture.path, destination / "images" / "alignment.png")
    write_text(destination / "README.md", str(card).rstrip("\n") + "\n")


def write_own_card(folder: str | Path, repo_id: str | None) -> None:
    """Does [`write_card`] in the run's own folder, without asking the hub; somebody else's README.md there stays."""
    readme = Path(folder) / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="replace")
        tags = getattr(card_data(text), "tags", None)
        if not isinstance(tags, list) or TAG not in tags:
            logger.warning("%s isn't a model card of %s and stays: the card is written by a push", readme, TAG)
            return
    write_card(folder, folder, repo_id, online=False)


# ---- Models and data


def _dataset_words(run: FinishedRun) -> Markdown:
    given, recorded = run.record.card.datasets, run.record.data.source
    if given or run.dataset is not None:
        return Markdown(
            ", ".join(
                f"[`{name}`]({page(name, 'dataset')})" if run.is_on_hub(name) else escaped(name)
                for name in given or [str(run.dataset)]
            )
        )
    if recorded == PYTHON_FUNCTIONS:
        return Markdown("functions of Python's standard library with their docstrings (`python_functions` of hf_dskd)")
    return Markdown("not recorded" if recorded is None else "data that isn't on the hub")


def _vocabularies_differ(run: FinishedRun) -> bool:
    """Whether student and teacher have two vocabularies, as far as the teacher's lies on this machine."""
    from huggingface_hub import try_to_load_from_cache

    teacher, own = run.teacher, run.folder / "tokenizer.json"
    path: Any = None
    if teacher is not None and teacher.folder is not None:
        path = teacher.folder / "tokenizer.json"
    elif teacher is not None and teacher.hub_id is not None:
        path = try_to_load_from_cache(teacher.hub_id, "tokenizer.json")
    if not isinstance(path, (str, Path)) or not Path(path).is_file() or not own.is_file():
        return False
    return bool(read_json(own)["model"].get("vocab") != read_json(Path(path))["model"].get("vocab"))


def _told_settings(run: FinishedRun) -> list[tuple[str, str]]:
    """Settings that may leave the machine, as text."""
    public = {model.hub_id for model in (run.student, run.teacher) if model} | {run.dataset}
    told = ((name, _told(value, public)) for name, value in sorted(run.settings.items()) if name not in NOT_IN_CARDS)
    return [(name, setting(value)) for name, value in told if value not in (None, {}, [])]


def _told(value: Any, public: set[str | None]) -> Any:
    """The value without what may be a path or a token."""
    if isinstance(value, dict):
        told = {name: _told(part, public) for name, part in value.items() if name not in NOT_IN_CARDS}
        return {name: part for name, part in told.items() if part is not None}
    if isinstance(value, list):
        return [part for part in (_told(part, public) for part in value) if part is not None]
    if isinstance(value, str) and value not in public and re.search(r"[/\\]|^[~.]|hf_[A-Za-z0-9]{8}", value):
        return None
    return value


# ---- What was measured


def _scores(run: FinishedRun) -> list[dict[str, Any]]:
    """`scores.json` of the evaluations in the run's folder that were made of these very weights."""
    weights = [path for pattern in WEIGHTS[run.adapter] for path in sorted(run.folder.glob(pattern))]
    found = []
    for path in sorted(run.folder.glob("*/scores.json")):
        evaluated = read_json(path.with_name("evaluation.json"), {}).get("evaluated", {})
        role = "adapter" if run.adapter else "model"
        if all(evaluated.get(f"{role}: {file.name}") == _sha256(file) for file in weights):
            found.append(read_json(path))
        else:
            logger.warning("%s is of other weights than the run's and stays out of the model card", path.parent.name)
    return found


def _eval_results(record: RunRecord, scores: Sequence[Mapping[str, Any]], source: str | None) -> list[EvalResult]:
    """The measures as the hub's metadata has them."""
    from huggingface_hub import EvalResult

    task: dict[str, Any] = {"task_type": "text-generation", "task_name": "Text Generation"}
    # Several evaluations of a set are told apart by their prompts.
    several = len({found["settings"]["prompt_style"] for found in scores}) > 1
    results = [
        EvalResult(**task, **where, metric_type=kind, metric_name=title, metric_value=value)
        for found in scores
        for name in found["sets"]
        for where, kind, title, value in _set_results(found, name, several)
        if value is not None
    ]
    for key in measures_of(record.metrics):
        if key.endswith("bits_per_byte"):
            held_out: dict[str, Any] = {
                "dataset_type": source or "held-out",
                "dataset_name": f"held-out examples{f' of {source}' if source else ''}",
                "metric_type": "bits_per_byte",
                "metric_name": title_of(key),
                "metric_value": round(record.metrics[key], 6),
            }
            results.append(EvalResult(**task, **held_out))
    return results


def _set_results(scores: Mapping[str, Any], name: str, several: bool) -> list[tuple[dict[str, Any], str, str, Any]]:
    """Dataset, kind, title and value of what was measured on one of the sets."""
    from ..evaluation.sets import HUB_SETS

    part, given, hub_set = scores["sets"][name], scores["settings"], HUB_SETS.get(name)
    on_hub = hub_set is not None and part["source"] == f"{hub_set.repository}/{hub_set.file}"
    where: dict[str, Any] = {"dataset_type": hub_set.repository if on_hub and hub_set else name, "dataset_name": name}
    seeds, limit = given["seeds"], given["limit"]
    few = f", the first {limit:,} examples" if limit is not None else ""
    few += f", {given['prompt_style']} prompts" if several else ""
    how = f"mean over {len(seeds)} decoding seed{'s' * (len(seeds) > 1)}" if seeds else "greedy"
    answers = part["sampled"] if seeds else part["greedy"]
    return [
        (where, "rouge", f"ROUGE-L ({how}{few})", answers["rouge_l"]),
        (where, "bits_per_byte", f"bits per byte of the references{few}", part["bits_per_byte"]),
    ]


def _training_seeds(run: FinishedRun) -> list[dict[str, Any]]:
    """Of a cell of a comparison, the lines of `results.jsonl` of the same row; none where it has one seed."""
    cell, label = run.folder.resolve(), run.files.label
    path = cell.parent.parent / "results.jsonl"
    if label is None or cell.parent.name != "cells" or not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    own = [line for line in lines if line["label"] == label and line["status"] == "ok"]
    known = any(line["seed"] == run.record.seed and line["metrics"] == run.record.metrics for line in own)
    return own if known and len(own) > 1 else []


def _over_seeds(seeds: Sequence[Mapping[str, Any]], key: str) -> str:
    """Mean and standard deviation of a metric over training seeds."""
    numbers = [line["metrics"][key] for line in seeds if line["metrics"].get(key) is not None]
    deviation = spread(numbers)
    return "–" if deviation is None else f"{measured(statistics.fmean(numbers))} ± {measured(deviation)}"


class Picture(NamedTuple):
    """Of the attention on one example."""

    path: Path
    when: str
    example: str


def alignment_picture(run: FinishedRun) -> Picture | None:
    """Finds the last picture of the attention on one example."""
    splits = [name for name in run.record.data.splits if name.startswith("eval")]
    example = "a held-out example" if splits else "an example of the training data"
    # Pictures whose numbers are gone are of a run before this one in the same folder.
    for step in sorted((line["step"] for line in run.files.analyses), reverse=True):
        pictures = sorted(
            run.folder.glob(f"analysis/step-{step}/alignment-*.png"),
            key=lambda picture: int(picture.stem.split("-")[1]),
        )
        if pictures:
            return Picture(pictures[0], f"after step {step:,}", example)
    path = run.folder / "alignment.png"
    return Picture(path, "after training", example) if path.is_file() else None


# ---- Files


def put(source: Path, target: Path) -> None:
    """Copies a file; weights, which are large and which nobody edits, get another name for the same file."""
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
