"""A training run from the command line, shared by every recipe: arguments, data, models, training, what to look at."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .data.source import PYTHON_FUNCTIONS, load_data
from .errors import UserError
from .field_checks import check_fields
from .launch import command as command
from .packaged import model_name
from .report.record import differences, evaluations
from .training.run_folder import RESULT_NAME, SETTINGS_NAME, check_fresh, checkpoints, forget_run, held
from .utils.files import read_yaml, write_json, write_json_lines, write_yaml
from .words import FLAGS, INSTEAD, SETTINGS, instead_of, translated


if TYPE_CHECKING:
    from datasets import Dataset
    from trl import ModelConfig, ScriptArguments

    from .config import DSKDConfig
    from .trainer import DSKDTrainer

LISTED = "--help lists the settings"

# What a teacher that was trained first is made of.
TEACHER_NAME = "sft_teacher.json"


@dataclass
class RunArguments:
    """What a recipe needs beside the model, the data and the training."""

    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "name or folder of the teacher"})
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "branch, tag or commit of the teacher on the hub"}
    )
    rename_columns: str | None = field(
        default=None, metadata={"help": "columns of the dataset under other names, as old=new,old=new"}
    )
    train_size: int | None = field(default=None, metadata={"help": "train on this many examples only"})
    held_out_size: int = field(
        default=0, metadata={"help": "examples to evaluate on where the dataset has no test split"}
    )
    maximum_characters: int = field(
        default=300, metadata={"help": f"longest prompt and response of dataset_name={PYTHON_FUNCTIONS}"}
    )
    total_batch_size: int | None = field(
        default=None,
        metadata={"help": "examples per optimizer step over all processes; sets gradient_accumulation_steps"},
    )
    smoke: bool = field(
        default=False,
        metadata={"help": "try the recipe in a minute: tiny random models of the same kinds, a few steps, no network"},
    )
    sft_teacher: bool = field(
        default=False, metadata={"help": "first train the teacher on the same data, into OUTPUT_DIR/teacher"}
    )
    sft_teacher_epochs: float = field(default=3.0, metadata={"help": "epochs of that training"})
    sft_teacher_learning_rate: float = field(default=1e-4, metadata={"help": "learning rate of that training"})
    sft_teacher_lora_r: int = field(
        default=64, metadata={"help": "rank of the teacher's adapter, which is merged afterwards; 0 trains all of it"}
    )


_RULES: dict[str, dict[str, Any]] = {
    **{name: {"least": 1} for name in ("train_size", "maximum_characters", "total_batch_size")},
    **{name: {"least": 0} for name in ("held_out_size", "sft_teacher_learning_rate", "sft_teacher_lora_r")},
    "sft_teacher_epochs": {"above": 0},
    # Empty where a smoke run replaces a recipe's.
    "rename_columns": {"unchecked": True},
}


@dataclass
class Run:
    """The parsed arguments of a run."""

    script: ScriptArguments
    config: DSKDConfig
    model: ModelConfig
    options: RunArguments


def parse(description: str | None, config_file: Path | None = None, arguments: list[str] | None = None) -> Run:
    """
    Arguments of a run: those of a YAML file, `config_file` or the one of `--config`, and whatever the command line
    overrides.

    Half precision is taken where the machine computes in it, unless the arguments say otherwise. `--help` answers from
    the light settings alone; importing transformers would take seconds.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in arguments or "-h" in arguments:
        print(help_text(description, config_file))
        sys.exit(0)
    arguments = [part for argument in arguments for part in _split_config(argument)]
    if "--config" not in arguments and config_file is not None:
        arguments = ["--config", str(config_file), *arguments]
    path, settings = "", dict[str, Any]()
    if "--config" in arguments:
        path = [*arguments, ""][arguments.index("--config") + 1]
        settings = read_yaml("--config", path)

    from trl import ModelConfig, ScriptArguments, TrlParser

    from .config import DSKDConfig
    from .precision import launched_precision
    from .trl_settings import (
        check_model_config,
        check_script_arguments,
        student_options,
        teacher_options,
        without_place,
    )

    groups = (ScriptArguments, DSKDConfig, ModelConfig, RunArguments)
    known = [setting.name for group in groups for setting in fields(group) if setting.init]
    same = {**SETTINGS, **FLAGS}

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            # argparse would print the names of some three hundred settings first.
            raise UserError(message)

        def set_defaults_with_config(self, **settings: Any) -> list[str]:
            return super().set_defaults_with_config(**translated(repr(path), settings, known, same, LISTED))

    # What is wanted of `env` is the parser's.
    settings = translated(
        repr(path), {name: settings[name] for name in settings if name != "env"}, known, same, LISTED
    )
    arguments = our_flags(arguments, known, same)
    given = flag_names(arguments)
    smoke = smoke_flags(settings, given) if wants_smoke(arguments, settings) else []
    # What a YAML file says about precision would lose to flags on the command line, and fp16 doesn't replace bf16.
    said = (given | settings.keys()) & {"bf16", "fp16"} or launched_precision()
    precision = [f"{flag}=true" for flag in fastest_precision() if flag == "--use_cpu" or not said]
    # Half of a name would be understood by the parser, but not by what looks for names here.
    parser = Parser(groups, allow_abbrev=False)  # type: ignore[arg-type]
    try:
        script, config, model, options = parser.parse_args_and_config(args=[*precision, *smoke, *arguments])
    except UserError:
        raise
    except ValueError as error:
        raise _not_parsed(" ".join(str(error).split()), known) from None
    run = Run(script, config, model, options)
    check_fields(options, _RULES)
    check_model_config(model, given | settings.keys())
    check_script_arguments(script)
    if options.teacher_model_revision is not None and options.teacher_model_name_or_path is None:
        raise UserError(
            f"teacher_model_revision={options.teacher_model_revision!r} without teacher_model_name_or_path: name the"
            " teacher too"
        )
    set_accumulation(run)
    if options.smoke:
        folder = Path(str(config.output_dir))
        if (folder / "tiny_models").is_dir() and not config.resume_from_checkpoint:
            # A smoke run's folder is of no worth, and the same command is to work again.
            with config.main_process_first(desc="the last smoke run"):
                if config.process_index == 0:
                    with held(folder):
                        forget_run(folder)
        with config.main_process_first(desc="tiny models"):
            names = smoke_models(
                model.model_name_or_path, options.teacher_model_name_or_path, Path(str(config.output_dir))
            )
        model.model_name_or_path, options.teacher_model_name_or_path = names
        config.model_init_kwargs = without_place(student_options(run))
        config.teacher_model_init_kwargs = without_place(teacher_options(run))
        model.model_revision, options.teacher_model_revision = "main", None
        # What is written of the run names these models, and its settings alone make it again.
        options.smoke = False
    return run


def _split_config(argument: str) -> list[str]:
    return ["--config", argument[9:]] if argument.startswith("--config=") else [argument]


def flag_names(arguments: list[str]) -> set[str]:
    """Names of the settings that a command line sets."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}


def our_flags(arguments: list[str], known: Collection[str], same: Mapping[str, str]) -> list[str]:
    """A command line whose settings have the names that they have here (see [`hf_dskd.words`])."""
    given, result = flag_names(arguments), []
    for word in arguments:
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        ours = same.get(name, name)
        if word.startswith("--") and name not in known:
            if ours in given and ours != name:
                raise UserError(f"{flag} is --{ours} here, and both are given: leave one of them out")
            if ours not in known and name in INSTEAD:
                raise UserError(instead_of(flag, known, LISTED))
            flag = f"--{ours}" if ours in known else flag
        result.append(flag + equals + value)
    return result


def wants_smoke(arguments: list[str], settings: dict[str, Any]) -> bool:
    """Whether `--smoke` is set, on the command line or else in the file."""
    wanted = bool(settings.get("smoke", False))
    for word, following in zip(arguments, [*arguments[1:], ""]):
        name, _, value = word.partition("=")
        if name == "--smoke":
            wanted = (value or following).lower() not in ("false", "no", "n", "f", "0")
        elif name in ("--no_smoke", "--no-smoke"):
            wanted = False
    return wanted


def _not_parsed(message: str, known: list[str]) -> UserError:
    """What the parser says, or of a word that it doesn't know, the nearest name."""
    words = re.search(r"not used by the HfArgumentParser: \[(.*?)\]", message)
    word = words.group(1).split(",")[0].strip(" '\"") if words else ""
    if not word:
        return UserError(message)
    if not word.startswith("--"):
        return UserError(
            f"{word!r} belongs to no setting: name a configuration file with --config, a value with --NAME"
        )
    return UserError(instead_of(word.partition("=")[0], known, LISTED))


# What `--smoke` puts in the place of a recipe's own settings; those of the command line go before.
SMOKE: dict[str, Any] = {
    "dataset_name": PYTHON_FUNCTIONS,
    "rename_columns": "",
    "prompt_column": "prompt",
    "response_column": "completion",
    "train_size": 16,
    "held_out_size": 4,
    "maximum_characters": 150,
    "max_length": 384,
    "max_steps": 4,
    "warmup_steps": 0,
    "total_batch_size": 4,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "logging_steps": 1,
    "save_steps": 2,
    "eval_steps": 2,
    "report_to": "none",
    "push_to_hub": False,
    "sft_teacher_epochs": 1,
}


def smoke_flags(settings: dict[str, Any], given: set[str]) -> list[str]:
    """
    Flags for a short run of a recipe's `settings`, in a folder of its own and on data that are always there; of those
    data are left out that the command line, which names the settings `given`, replaces.
    """
    changed = {"output_dir": f"{settings.get('output_dir', 'runs/run')}_smoke", **SMOKE}
    if "dataset_name" in given:
        for name in ("prompt_column", "response_column", "train_size"):
            del changed[name]
    if "dataset_num_proc" in settings:
        changed["dataset_num_proc"] = 1
    return [f"--{name}={value}" for name, value in changed.items()]


def smoke_models(student: str | None, teacher: str | None, output_dir: Path) -> list[str | None]:
    """Folders of tiny random models of the same kinds as the two, made in the output folder."""
    from .tiny_models import tiny_model

    return [
        None if name is None else str(tiny_model(name, output_dir / "tiny_models" / role, role))
        for role, name in (("student", student), ("teacher", teacher))
    ]


def help_text(description: str | None, config_file: Path | None = None) -> str:
    """Every setting of hf_dskd with its default, as text."""
    from .settings import DistillationSettings

    source = "the YAML file of --config" if config_file is None else config_file.name
    defaults = {} if config_file is None else read_yaml("--config", config_file)
    lines = [(description or "").strip(), "", f"Defaults come from {source}; any value can be overridden."]
    for title, group in (("The run", RunArguments), ("Distillation", DistillationSettings)):
        lines += ["", f"{title}:"]
        for setting in fields(group):
            default = defaults.get(setting.name, setting.default)
            lines.append(f"  --{setting.name} ({default})".ljust(46) + f" {setting.metadata['help']}")
    lines += [
        "",
        "The student: --model_name_or_path, --use_peft, --lora_r, --lora_target_modules, ... (trl.ModelConfig).",
        "The data: --dataset_name, --dataset_config, ... (trl.ScriptArguments).",
        "The training: --output_dir, --max_steps, --num_train_epochs, --learning_rate, --per_device_train_batch_size,",
        "--bf16, --seed, --report_to, --push_to_hub, --resume_from_checkpoint last, ...",
        "(transformers.TrainingArguments).",
    ]
    return "\n".join(lines)


def fastest_precision() -> list[str]:
    """Flags for the half precision that this machine computes in, or none."""
    import torch

    if torch.cuda.is_available():
        return ["--bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else ["--fp16"]
    # Processors without such instructions are slower in bf16 than in float32.
    has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    # transformers wants to be told that bf16 on a CPU is meant.
    return ["--bf16", "--use_cpu"] if has_bf16 and not torch.backends.mps.is_available() else []


def variant(config: DSKDConfig, **changes: Any) -> DSKDConfig:
    """
    The same configuration with some settings changed, checked anew.

    For a method without a teacher in its loss, the settings that it would refuse are left out.
    """
    from .config import PARTS
    from .methods import METHODS

    own = {setting.name: getattr(config, setting.name) for setting in fields(config) if setting.init}
    changed = {**own, **changes}
    if not METHODS[changed["method"]].needs_teacher:
        changed |= {**dict.fromkeys(PARTS), "on_policy_fraction": 0.0, "attention_kd_rate": 0.0}
    return type(config)(**changed)


def set_accumulation(run: Run) -> None:
    """Makes `gradient_accumulation_steps` of `total_batch_size`, whatever the number of processes."""
    total = run.options.total_batch_size
    if total is None:
        return
    config = run.config
    at_once = config.per_device_train_batch_size * config.world_size
    if total % at_once:
        raise UserError(
            f"total_batch_size={total} is no multiple of {config.world_size} processes x per_device_train_batch_size"
            f"={config.per_device_train_batch_size}: change one of them"
        )
    config.gradient_accumulation_steps = total // at_once


def make_trainer(
    run: Run,
    student: str | None,
    teacher: str | None,
    train: Dataset,
    held_out: Dataset | None,
    **options: Any,
) -> DSKDTrainer:
    """The trainer of a run; `options` go to [`DSKDTrainer`]."""
    from trl import get_peft_config

    from .trainer import DSKDTrainer
    from .trl_settings import quantization, student_options, teacher_options, without_place

    config = run.config
    config.model_init_kwargs = student_options(run)
    config.teacher_model_init_kwargs = teacher_options(run)
    if run.options.sft_teacher:
        config.teacher_model_init_kwargs = without_place(config.teacher_model_init_kwargs)
    targets = run.model.lora_target_modules
    if isinstance(targets, str) and re.fullmatch(r"\w+", targets):
        # trl makes a word of a list of one, and peft reads that as a pattern for a module's whole name.
        run.model.lora_target_modules = [targets]
    if held_out is None and config.eval_strategy != "no":
        raise UserError(
            f"eval_strategy={getattr(config.eval_strategy, 'value', 'no')!r} but there is nothing to evaluate on: set"
            " held_out_size"
        )
    try:
        peft_config = get_peft_config(run.model)
    except ValueError as error:
        raise UserError(f"the adapter's settings: {' '.join(str(error).split())}") from error
    return DSKDTrainer(
        student,  # type: ignore[arg-type]  # None is refused with a remedy
        teacher,
        config,
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=peft_config,
        quantization_config=quantization(run.model, config.training_dtype),
        **options,
    )


def train_teacher(run: Run, teacher: str, train: Dataset) -> str:
    """
    Trains the teacher on the same data first, as the papers' teachers were, and returns its folder.

    Done once: a folder that is complete is used again, if it was made of the same.
    """
    from .trainer import DSKDTrainer
    from .trl_settings import teacher_options

    folder, facts = Path(str(run.config.output_dir)) / "teacher", teacher_facts(run, teacher, train)
    if folder.exists():
        check_trained_teacher(folder, facts)
        print(f"using the teacher trained before: {folder}")
        return str(folder)
    training = folder.with_name("teacher_training")
    options = run.options
    config = variant(
        run.config,
        output_dir=str(training),
        method="sft",
        num_train_epochs=options.sft_teacher_epochs,
        max_steps=-1,
        learning_rate=options.sft_teacher_learning_rate,
        load_teacher_in_4bit=False,
        eval_strategy="no",
        load_best_model_at_end=False,
        push_to_hub=False,
        model_init_kwargs={
            **{name: value for name, value in teacher_options(run).items() if name != "torch_dtype"},
            "dtype": "bfloat16" if options.sft_teacher_lora_r and run.config.bf16 else "float32",
        },
        teacher_model_init_kwargs=None,
    )
    adapter = None
    if options.sft_teacher_lora_r:
        from peft import LoraConfig

        adapter = LoraConfig(
            r=options.sft_teacher_lora_r,
            lora_alpha=2 * options.sft_teacher_lora_r,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    trainer = DSKDTrainer(teacher, args=config, train_dataset=train, peft_config=adapter)
    trainer.train(resume_from_checkpoint=bool(checkpoints(training)))
    if trainer.is_world_process_zero():
        model: Any = trainer.model
        if adapter is not None:
            model = model.merge_and_unload()
        beside = folder.with_name(".teacher")
        model.save_pretrained(beside)
        trainer.processing_class.save_pretrained(beside)  # type: ignore[union-attr]
        write_json(beside / TEACHER_NAME, facts)
        beside.rename(folder)
    trainer.accelerator.wait_for_everyone()
    return str(folder)


def teacher_facts(run: Run, teacher: str, train: Dataset) -> dict[str, Any]:
    """What a teacher that is trained first depends on, in values of JSON."""
    options = ("sft_teacher_epochs", "sft_teacher_learning_rate", "sft_teacher_lora_r", "teacher_model_revision")
    return {
        "teacher": Path(teacher).resolve().name if Path(teacher).is_dir() else teacher,
        "dataset_name": run.script.dataset_name,
        "rows": len(train) if hasattr(train, "__len__") else None,
        **{name: getattr(run.options, name) for name in options},
        **{name: getattr(run.config, name) for name in ("seed", "max_length", "prompt_style")},
    }


def check_trained_teacher(folder: Path, facts: dict[str, Any]) -> None:
    """Raises a [`UserError`] unless a folder holds a teacher that was trained with these facts."""
    path = folder / TEACHER_NAME
    if not path.is_file():
        raise UserError(
            f"sft_teacher=True trains into {str(folder)!r}, which is there and holds no teacher of a run (no"
            f" {TEACHER_NAME}): move it, or choose another output_dir"
        )
    known = json.loads(path.read_text(encoding="utf-8"))
    for name, value in facts.items():
        if known.get(name) != value:
            raise UserError(
                f"{str(folder)!r} holds a teacher that was trained with {name}={known.get(name)!r}, which is now"
                f" {value!r}: move it, or choose another output_dir"
            )


def chosen_teacher(run: Run, train: Dataset) -> str | None:
    """The teacher's name or folder; with `sft_teacher` that of the one trained on the data."""
    teacher = model_name(run.options.teacher_model_name_or_path)
    if not run.options.sft_teacher:
        return teacher
    if teacher is None:
        raise UserError("sft_teacher=True trains a teacher, but there is none: set teacher_model_name_or_path")
    return train_teacher(run, teacher, train)


def cache_teacher(run: Run) -> None:
    """
    Fills the cache of the teacher's hidden states with the training and the held-out examples, and prints what it has.

    The data go through the checks and the tokenization of a training run; of the models only the teacher is loaded.
    """
    from accelerate import PartialState

    from .training.arguments import check_launch
    from .training.pair import Pair
    from .training.prepare import Preparation
    from .trl_settings import student_options, teacher_options, without_place

    config = run.config
    if not config.method_row.needs_teacher:
        raise UserError(
            f"method={config.method!r} runs no teacher while it trains: name a method that does, such as dskd_cma"
        )
    examples, held_out = load_data(run)
    student, teacher = model_name(run.model.model_name_or_path), chosen_teacher(run, examples)
    check_launch(config)
    config.model_init_kwargs, config.teacher_model_init_kwargs = student_options(run), teacher_options(run)
    if run.options.sft_teacher:
        config.teacher_model_init_kwargs = without_place(config.teacher_model_init_kwargs)
    pair = Pair(config, student, teacher)
    tokenize = Preparation(pair, aligned=False).tokenize
    with config.main_process_first(desc="tokenization"):
        datasets = {"train": tokenize(examples, "train"), "eval": tokenize(held_out, "eval")}
    cache = pair.open_cache(config.teacher_cache or Path(str(config.output_dir)) / "teacher_cache")
    assert cache is not None
    filled = cache.fill(datasets, pair.load_teacher)
    if PartialState().is_main_process:
        print(cache.summary(filled))


def train(run: Run) -> None:
    """A whole run: data, models, training, evaluation, its record, report, push; prints the files to look at."""
    folder = Path(str(run.config.output_dir))
    if not run.config.resume_from_checkpoint:
        check_fresh(folder)
    student = model_name(run.model.model_name_or_path)
    if run.config.push_to_hub and run.options.sft_teacher and run.config.process_index == 0:
        from .hub.identity import identity
        from .hub.push import check_training

        # The trainer asks as well, but is made when the teacher is there.
        check_training(run.config, identity(student, run.model.use_peft, run.config.method))
    examples, held_out = load_data(run)
    # From here on, and not from the first step: a teacher's training is written there too.
    with held(folder) if run.config.process_index == 0 else nullcontext():
        _train(run, folder, student, examples, held_out)


def _train(run: Run, folder: Path, student: str | None, examples: Any, held_out: Any) -> None:
    teacher = chosen_teacher(run, examples)
    settings = changed_settings(run)
    trainer = make_trainer(run, student, teacher, examples, held_out)
    _note_settings(trainer, folder / SETTINGS_NAME, settings)
    distil(run, trainer)
    if trainer.is_world_process_zero():
        for path in [folder, folder / RESULT_NAME, *show(trainer, folder)]:
            print(path)
    if run.config.push_to_hub:
        pushed = trainer.push_to_hub()
        if pushed is not None:
            print(pushed.commit_url)


def _note_settings(trainer: DSKDTrainer, path: Path, settings: dict[str, Any]) -> None:
    """Writes the settings when training begins: a run that is refused leaves those of the one that is there."""
    from transformers import TrainerCallback

    class Write(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                write_yaml(path, settings)

    trainer.add_callback(Write())


def distil(run: Run, trainer: DSKDTrainer) -> Path:
    """
    Trains (from a checkpoint where that is asked for), saves the student, and evaluates it. `result.json` comes last:
    a folder that has it is complete.
    """
    folder = Path(str(run.config.output_dir))
    output = trainer.train(resume_from_checkpoint=run.config.resume_from_checkpoint)
    # As a user's own call it would push, and the model card isn't there yet.
    trainer.save_model(_internal_call=True)
    metrics: dict[str, float] = {}
    # Before the evaluation below, whose model may be the best of the run, not the last one.
    history = evaluations(trainer.state.log_history)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        if trainer.samples:
            write_json_lines(trainer.analysis_folder / "samples.jsonl", trainer.samples)
        runtime = output.metrics.get("train_runtime")
        record = trainer.run_record(metrics, history, runtime, run.script.dataset_name)
        record.write(folder / RESULT_NAME)
    return folder


def changed_settings(run: Run) -> dict[str, Any]:
    """Everything about a run that isn't at its default: as a configuration file it makes the same run."""
    from .trl_settings import unused

    changed: dict[str, Any] = {}
    for part in (run.script, run.model, run.options, run.config):
        changed |= {name: value for name, (_, value) in differences(part).items()}
    # Beside a use_peft that was switched off, the rest of a recipe's adapter would be refused.
    return {name: value for name, value in changed.items() if name not in unused(run.model)}


def show(trainer: DSKDTrainer, folder: Path, example: int = 0) -> list[Path]:
    """
    Writes the report and, where the run made no analyses, a picture of the alignment of a held-out example. Returns
    the files.
    """
    from .analysis.heatmap import cross_attention, has_alignment, plot_attention
    from .hub.card import write_own_card
    from .report.one import write_report

    pictures = []
    rows: Any = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    if has_alignment(trainer.args.method_row) and trainer.args.analysis_steps is None:
        pictures.append(folder / "alignment.png")
        plot_attention([cross_attention(trainer, rows[example])], pictures[-1])
    write_own_card(folder, trainer.args.hub_model_id)
    return [*pictures, write_report(folder)]


def analyse(folder: Path, settings: Path, examples: int, output_dir: Path) -> None:
    """
    Analyses the alignment of a run or of a checkpoint of it, and prints the numbers and the files.

    Args:
        folder (`Path`): A run's output folder or one of its checkpoints.
        settings (`Path`): The run's configuration file.
        examples (`int`): How many, of the held-out examples or else of the training examples.
        output_dir (`Path`): For numbers and pictures (see [`hf_dskd.analysis.record`]).
    """
    from .analysis.record import probe_rows, record
    from .training.run_folder import check_analysed

    check_analysed(folder)
    run = parse(None, None, ["--config", str(settings), "--output_dir", str(output_dir)])
    train_data, held_out = load_data(run)
    rows = train_data if held_out is None else held_out
    few = probe_rows(rows, examples)
    # Nothing is trained here: the few examples need not fill a batch.
    nothing = {"save_strategy": "no", "load_best_model_at_end": False, "dataloader_drop_last": False}
    run.config = variant(run.config, eval_strategy="no", **nothing)
    if run.options.sft_teacher:
        teacher: str | None = str(Path(read_yaml("--config", settings)["output_dir"]) / "teacher")
    else:
        teacher = model_name(run.options.teacher_model_name_or_path)
    from datasets import Dataset

    data = Dataset.from_list(few)
    trainer: Any = make_trainer(run, model_name(run.model.model_name_or_path), teacher, data, None)
    trainer.load_trained(folder)
    numbers = record(trainer, [dict(row) for row in trainer.train_dataset], output_dir, pictures=True)
    width = max(map(len, numbers))
    for name, value in numbers.items():
        print(f"{name:{width}}  {value:.6g}")
    print(output_dir / f"step-{trainer.state.global_step}")
