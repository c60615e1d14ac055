import hashlib
import json
import subprocess
import sys
import threading
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from hf_dskd.errors import UserError
from hf_dskd.offline import packaged, python_functions
from hf_dskd.offline.packaged import PACKAGED_MODELS, PackagedModel, packaged_model, ready_folder


FIRST, SECOND = b"GGUF first part ", b"and the second"
DATA = FIRST + SECOND
TINY = PackagedModel(
    name="Tiny",
    parts=(
        ("hf-dskd-fake-part1==1.0", "hf_dskd_fake_part1/data/part01.bin"),
        ("hf-dskd-fake-part2==1.0", "hf_dskd_fake_part2/data/part02.bin"),
    ),
    gguf_file="tiny.gguf",
    size=len(DATA),
    sha256=hashlib.sha256(DATA).hexdigest(),
    converted_size=100,
    licence="none",
)


def make_wheel(folder: Path, part: int, data: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"hf_dskd_fake_part{part}"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", "raise ImportError('must not be imported')")
        archive.writestr(f"{name}/data/part0{part}.bin", data)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")


def install(site: Path, part: int, data: bytes, version: str = "1.0") -> None:
    name = f"hf_dskd_fake_part{part}"
    (site / name / "data").mkdir(parents=True)
    (site / name / "__init__.py").write_text("raise ImportError('must not be imported')")
    (site / name / "data" / f"part0{part}.bin").write_bytes(data)
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The tiny model, no wheels folder, no network, a conversion that only copies. Returns what was converted."""
    converted: list[bytes] = []

    def convert(gguf_file, folder):
        converted.append(Path(gguf_file).read_bytes())
        Path(folder).mkdir()
        (Path(folder) / "model.bin").write_bytes(converted[-1])

    def no_pip(requirements, folder):
        raise AssertionError(f"pip was asked for {requirements}")

    monkeypatch.setitem(PACKAGED_MODELS, "Tiny", TINY)
    monkeypatch.delenv(packaged.WHEELS_VARIABLE, raising=False)
    monkeypatch.setenv(packaged.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "convert_gguf", convert)
    monkeypatch.setattr(packaged, "_pip_download", no_pip)
    return converted


@pytest.fixture
def wheels(tiny, monkeypatch, tmp_path):
    make_wheel(tmp_path / "wheels", 1, FIRST)
    make_wheel(tmp_path / "wheels", 2, SECOND)
    monkeypatch.setenv(packaged.WHEELS_VARIABLE, str(tmp_path / "wheels"))
    return tmp_path / "wheels"


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def test_made_once_from_wheels(tiny, wheels, tmp_path, capsys):
    assert ready_folder("Tiny") is None
    folder = packaged_model("Tiny")
    assert folder == tmp_path / "cache" / "Tiny" == ready_folder("Tiny")
    assert tiny == [DATA]
    assert json.loads((folder / packaged.MARKER).read_text())["sha256"] == TINY.sha256
    assert visible(tmp_path / "cache") == {"Tiny"}  # neither wheels nor GGUF stay
    assert wheels.exists()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(line.startswith("hf_dskd: Tiny: ") for line in captured.err.splitlines())

    assert packaged_model("Tiny") == folder
    assert tiny == [DATA]
    assert capsys.readouterr().err == ""


def test_made_from_installed_packages(tiny, monkeypatch, tmp_path):
    for part, data in ((1, FIRST), (2, SECOND)):
        install(tmp_path / "site", part, data)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert packaged_model("Tiny", tmp_path / "other") == tmp_path / "other" / "Tiny"
    assert tiny == [DATA]
    assert (tmp_path / "site" / "hf_dskd_fake_part1" / "data" / "part01.bin").exists()


def test_only_what_is_missing_is_downloaded(tiny, monkeypatch, tmp_path):
    install(tmp_path / "site", 1, FIRST)
    install(tmp_path / "site", 2, b"of another version", version="2.0")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    asked = []

    def pip(requirements, folder):
        asked.extend(requirements)
        make_wheel(folder, 2, SECOND)

    monkeypatch.setattr(packaged, "_pip_download", pip)
    packaged_model("Tiny")
    assert asked == ["hf-dskd-fake-part2==1.0"]
    assert tiny == [DATA]


def test_wrong_sha256(tiny, wheels, tmp_path):
    make_wheel(wheels, 2, SECOND[::-1])
    got = hashlib.sha256(FIRST + SECOND[::-1]).hexdigest()
    with pytest.raises(UserError, match=f"(?s){got}.*{TINY.sha256}") as error:
        packaged_model("Tiny")
    assert "\n" not in str(error.value)
    assert tiny == []
    assert visible(tmp_path / "cache") == set()


def test_bad_wheels_folder(tiny, wheels, monkeypatch, tmp_path):
    (wheels / "hf_dskd_fake_part2-1.0-py3-none-any.whl").write_bytes(b"half a download")
    with pytest.raises(UserError, match=r"part2.*not a whole wheel file"):
        packaged_model("Tiny")
    monkeypatch.setenv(packaged.WHEELS_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere is not a folder"):
        packaged_model("Tiny")


def test_full_disk(tiny, wheels, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(packaged.shutil, "disk_usage", lambda _: usage(10, 0, len(DATA) + 99))
    with pytest.raises(UserError, match=r"needs about .* but only .* HF_DSKD_CACHE"):
        packaged_model("Tiny")
    monkeypatch.setattr(packaged.shutil, "disk_usage", lambda _: usage(10, 0, len(DATA) + 100))
    with monkeypatch.context() as without_wheels:
        # A download takes room of its own.
        without_wheels.delenv(packaged.WHEELS_VARIABLE)
        with pytest.raises(UserError, match="needs about"):
            packaged_model("Tiny")
    packaged_model("Tiny")


def test_cache_that_is_no_folder(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file can't be made.*HF_DSKD_CACHE"):
        packaged_model("Tiny", tmp_path / "file")


@pytest.mark.parametrize("marker", ["{", "[]", '{"sha256": "0", "format_version": 1}', "old"])
def test_incomplete_folder_is_made_again(tiny, wheels, tmp_path, marker):
    folder = tmp_path / "cache" / "Tiny"
    folder.mkdir(parents=True)
    (folder / "stale").write_text("")
    (tmp_path / "cache" / ".Tiny.work").mkdir()  # of a killed process
    (tmp_path / "cache" / ".Tiny.work" / "tiny.gguf").write_text("half")
    if marker == "old":
        marker = json.dumps({"sha256": TINY.sha256, "format_version": packaged.FORMAT_VERSION - 1})
    (folder / packaged.MARKER).write_text(marker)
    assert ready_folder("Tiny") is None
    packaged_model("Tiny")
    assert {path.name for path in folder.iterdir()} == {"model.bin", packaged.MARKER}
    assert visible(tmp_path / "cache") == {"Tiny"}


def test_failed_conversion_leaves_nothing(tiny, wheels, monkeypatch, tmp_path):
    def fail(gguf_file, folder):
        Path(folder).mkdir()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(packaged, "convert_gguf", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        packaged_model("Tiny")
    assert visible(tmp_path / "cache") == set()


def test_two_at_once_convert_once(tiny, wheels, monkeypatch, capsys):
    convert = packaged.convert_gguf

    def slow(gguf_file, folder):
        time.sleep(0.5)
        convert(gguf_file, folder)

    monkeypatch.setattr(packaged, "convert_gguf", slow)
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(packaged_model("Tiny"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 3 and len(set(folders)) == 1
    assert tiny == [DATA]
    assert "waiting" in capsys.readouterr().err


def test_unknown_name():
    with pytest.raises(UserError, match="'GPT-5'; choose one of SmolLM2-135M-Instruct, Qwen2"):
        packaged_model("GPT-5")
    with pytest.raises(UserError):
        ready_folder("GPT-5")


def test_pip(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # no network even where there is one
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(UserError, match=r"hf-dskd-fake-part1==1.0.*HF_DSKD_WHEELS") as error:
        packaged._pip_download(["hf-dskd-fake-part1==1.0"], tmp_path / "wheels")
    assert "\n" not in str(error.value)
    pytest.importorskip("pip", reason="this environment has no pip")
    make_wheel(tmp_path / "links", 1, FIRST)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    packaged._pip_download(["hf-dskd-fake-part1==1.0"], tmp_path / "wheels")
    source = packaged._wheel_source(tmp_path / "wheels", *TINY.parts[0])
    assert source is not None
    with source() as file:
        assert file.read() == FIRST


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DSKD_CACHE", str(tmp_path / "own"))
    assert packaged.default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("HF_DSKD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert packaged.default_cache_dir() == tmp_path / "xdg" / "hf_dskd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert packaged.default_cache_dir() == Path.home() / ".cache" / "hf_dskd"


def test_command_prints_the_folder(tiny, wheels, tmp_path, capsys):
    assert packaged.main(["Tiny", "--cache-dir", str(tmp_path / "there")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'there' / 'Tiny'}\n"
    assert packaged.main(["Nothing"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: no packaged model is called 'Nothing'")


def test_import_is_light():
    code = (
        "import sys, importlib.util as u\n"
        "for path in sys.argv[1:]:\n"
        "    spec = u.spec_from_file_location('m', path)\n"
        "    m = sys.modules['m'] = u.module_from_spec(spec); spec.loader.exec_module(m)\n"
        "assert not {'torch', 'transformers', 'gguf', 'tokenizers', 'datasets'} & set(sys.modules), 'heavy import'\n"
    )
    subprocess.run([sys.executable, "-c", code, packaged.__file__, python_functions.__file__], check=True)


def write_tiny_gguf(path: Path, pre: str, tied: bool) -> None:
    """A random Llama with a byte-level tokenizer: 3 control tokens, the bytes, one merge, one unused row."""
    gguf = pytest.importorskip("gguf", reason="conversion needs gguf")
    import numpy as np
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "de", "[PAD260]"]
    hidden, inner, rows = 64, 128, len(tokens)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(hidden // 4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(letters) + 1), 5])
    writer.add_token_merges(["d e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (rows, hidden),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (hidden // 2, hidden),
        "blk.0.attn_v": (hidden // 2, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (inner, hidden),
        "blk.0.ffn_up": (inner, hidden),
        "blk.0.ffn_down": (hidden, inner),
        "blk.0.attn_norm": (hidden,),
        "blk.0.ffn_norm": (hidden,),
        "output_norm": (hidden,),
    }
    if not tied:
        shapes["output"] = (rows, hidden)
    for name, shape in shapes.items():
        values = rng.normal(1.0 if len(shape) == 1 else 0.0, 0.1, shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("pre, tied", [("smollm", True), ("qwen2", False)])
def test_converted_folder(tmp_path, pre, tied):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_tiny_gguf(tmp_path / "tiny.gguf", pre, tied)
    packaged.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).eval()
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert getattr(model.config, "quantization_config", None) is None

    # Both places, for Transformers 4.57 and 5.
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 50000.0
    assert config["dtype"] == "bfloat16"

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", *["<|im_end|>"] * 2)
    assert len(tokenizer) == 260  # the unused row is no token
    assert tokenizer.model_max_length == 128
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)

    text = "def f(x):\n    return 12  34 é🙂"
    batch = tokenizer(text, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert tokenizer.decode(batch["input_ids"][0]) == text
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][0])[:2] == ["de", "f"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert chat == "<|im_start|>x<|im_end|>"
    assert tokenizer(chat)["input_ids"][::2] == [1, 2]

    with torch.no_grad():
        before = loaded(**batch).logits
        after = model(**batch).logits
        for parameter in loaded.parameters():
            parameter.copy_(parameter.bfloat16())
        rounded = loaded(**batch).logits
    assert torch.equal(after, rounded)
    assert (after - before).abs().max() < 0.05 * before.std()
    assert model.generate(**batch, max_new_tokens=2, do_sample=False).shape[1] > batch["input_ids"].shape[1]


def test_what_is_not_converted(monkeypatch, tmp_path):
    write_tiny_gguf(tmp_path / "tiny.gguf", "llama-bpe", tied=True)
    with pytest.raises(UserError, match="llama-bpe"):
        packaged.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        packaged.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")


@pytest.mark.parametrize("name", sorted(PACKAGED_MODELS))
def test_real_folder(name):
    folder = ready_folder(name)
    if folder is None:
        pytest.skip(f"{name} isn't converted yet (python -m hf_dskd.offline.packaged {name})")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert (tokenizer.eos_token, model.generation_config.eos_token_id) == ("<|im_end|>", tokenizer.eos_token_id)
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == name.startswith("SmolLM2")
    batch = tokenizer("def add(a, b):\n    return a +", return_tensors="pt")
    assert tokenizer.decode(model.generate(**batch, max_new_tokens=1, do_sample=False)[0, -1]) == " b"


def test_real_conversion(tmp_path, monkeypatch):
    name = "SmolLM2-135M-Instruct"
    model = PACKAGED_MODELS[name]
    if any(packaged._local_source(requirement, member) is None for requirement, member in model.parts):
        pytest.skip(f"{', '.join(model.requirements)} is neither installed nor in a folder {packaged.WHEELS_VARIABLE}")
    pytest.importorskip("gguf", reason="conversion needs gguf")
    folder = packaged_model(name, tmp_path)
    assert ready_folder(name, tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_size == pytest.approx(model.converted_size, rel=0.05)
