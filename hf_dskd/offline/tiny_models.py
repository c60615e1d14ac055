"""
Tiny stand-ins with random weights for the models of a recipe: the model class, the tokenizer class and pipeline, the
special tokens and the chat markers of the real family, in a second and without a network. They show that a pair runs,
not how well.

    python -m hf_dskd.offline.tiny_models Qwen/Qwen3-0.6B FOLDER
    python -m hf_dskd.offline.tiny_models Qwen/Qwen3-8B FOLDER --role teacher

NAME is a model on the hub, a packaged one, the folder of a model, or a family's name.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, check_name
from ..launch import Parser, command


if TYPE_CHECKING:
    from tokenizers import Tokenizer

MARKER = "tiny_model.json"
# Raise this when folders made by an earlier version must be made again.
FORMAT_VERSION = 2
ROLES = ("student", "teacher")
WIDTHS = {"student": 64, "teacher": 128}
POSITIONS = 1024

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN3 = _CHATML.replace(
    "{% endif %}",
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
)
_LLAMA3 = (
    "{% set date = date_string if date_string is defined else strftime_now('%d %b %Y') %}"
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date + '\n\n<|eot_id|>' }}"
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_TINYLLAMA = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}"
    "{% endif %}{% endfor %}"
)
_GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else"
    " message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """
    Describes a kind of model, as its repositories on the hub have it.

    Attributes:
        model_type (`str`): Of the config in transformers.
        tokenizer_class (`str`): As `tokenizer_config.json` names it.
        pipeline (`str`): How the tokenizer cuts text: see [`set_pipeline`].
        names (`str`): Regular expression that finds the family in a model's name, in lower case.
        tokens (`dict[str, str | None]`): BOS, EOS, PAD and UNK, for `tokenizer_config.json`.
        first, last (`tuple[str, ...]`): Special tokens before the vocabulary, and after it.
        spaces (`tuple[str, ...]`): Runs of whitespace that are added tokens, but no special ones.
        adds_bos (`bool`): Whether every text begins with BOS.
        chat_template (`str`, *optional*): With the markers of the real one.
        ends (`tuple[str, ...]`): Tokens that end an answer, beside EOS.
        vocabulary (`int`): Tokens in all; the rows of the embedding are more.
        text (`str`): Module of the standard library whose source the vocabulary is learnt from; families that have
            the same one, as OPT has GPT-2's, learn the same pieces.
        tied (`tuple[str, ...]`): Roles whose head is the embedding: large models of most families don't tie it.
        config (`dict[str, Any]`): What the config needs besides.
    """

    model_type: str
    tokenizer_class: str
    pipeline: str
    names: str
    tokens: dict[str, str | None]
    vocabulary: int
    text: str
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    spaces: tuple[str, ...] = ()
    adds_bos: bool = False
    chat_template: str | None = None
    ends: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)


def _tokens(bos: str | None, eos: str, pad: str | None, unk: str | None) -> dict[str, str | None]:
    return {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unk}


# Queries share keys in pairs in the teacher; the student is too narrow for it.
_GROUPED = {"num_key_value_heads": 2}
_END_OF_TEXT, _IM_END = "<|endoftext|>", "<|im_end|>"
_CHAT = (_END_OF_TEXT, "<|im_start|>", _IM_END)

_LLAMA2 = Family(
    "llama",
    "LlamaTokenizer",
    "sentencepiece",
    r"llama(?!-?[34])|vicuna",
    _tokens("<s>", "</s>", None, "<unk>"),
    vocabulary=700,
    text="gettext",
    first=("<unk>", "<s>", "</s>"),
    adds_bos=True,
    chat_template=_TINYLLAMA,
    config=_GROUPED,
)
_QWEN2 = Family(
    "qwen2",
    "Qwen2Tokenizer",
    "qwen2",
    r"qwen(1\.5|2)",
    _tokens(None, _IM_END, _END_OF_TEXT, None),
    vocabulary=920,
    text="contextlib",
    last=_CHAT,
    chat_template=_CHATML,
    ends=(_END_OF_TEXT,),
    tied=("student",),
    config=_GROUPED,
)
_GPT2 = Family(
    "gpt2",
    "GPT2Tokenizer",
    "gpt2",
    r"gpt-?2",
    _tokens(_END_OF_TEXT, _END_OF_TEXT, None, _END_OF_TEXT),
    vocabulary=641,
    text="textwrap",
    last=(_END_OF_TEXT,),
    tied=ROLES,
)

# Names are looked for in this order.
FAMILIES: dict[str, Family] = {
    "smollm2": Family(
        "llama",
        "GPT2Tokenizer",
        "smollm2",
        r"smollm2|smollm-",
        _tokens("<|im_start|>", _IM_END, _IM_END, _END_OF_TEXT),
        vocabulary=740,
        text="heapq",
        first=_CHAT,
        chat_template=_CHATML,
        tied=ROLES,
        config=_GROUPED,
    ),
    "llama3": Family(
        "llama",
        "PreTrainedTokenizerFast",
        "llama3",
        r"llama-?3",
        _tokens("<|begin_of_text|>", "<|eot_id|>", None, None),
        vocabulary=900,
        text="calendar",
        last=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        adds_bos=True,
        chat_template=_LLAMA3,
        ends=("<|end_of_text|>",),
        tied=("student",),
        config=_GROUPED,
    ),
    "llama2": _LLAMA2,
    "mistral": replace(
        _LLAMA2,
        model_type="mistral",
        names=r"mistral",
        vocabulary=760,
        text="shlex",
        chat_template=_MISTRAL,
        config={**_GROUPED, "sliding_window": None},
    ),
    "qwen3": replace(
        _QWEN2,
        model_type="qwen3",
        names=r"qwen3(?!\.)",
        vocabulary=922,
        last=(*_CHAT, "<think>", "</think>"),
        chat_template=_QWEN3,
        config={**_GROUPED, "head_dim": 32},
    ),
    "qwen2": _QWEN2,
    "gemma3": Family(
        "gemma3_text",
        "GemmaTokenizer",
        "gemma3",
        r"gemma-?3(?!n)",
        _tokens("<bos>", "<eos>", "<pad>", "<unk>"),
        vocabulary=980,
        text="csv",
        first=("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"),
        adds_bos=True,
        chat_template=_GEMMA,
        ends=("<end_of_turn>",),
        tied=ROLES,
        # One layer of each kind; heads wider than the model, as in the real one.
        config={
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 128,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "query_pre_attn_scalar": 64,
        },
    ),
    "gpt_neox": Family(
        "gpt_neox",
        "GPTNeoXTokenizer",
        "gpt_neox",
        r"pythia|neox",
        _tokens(_END_OF_TEXT, _END_OF_TEXT, None, _END_OF_TEXT),
        vocabulary=680,
        text="fractions",
        first=(_END_OF_TEXT, "<|padding|>"),
        spaces=tuple(" " * count for count in range(24, 1, -1)),
    ),
    "opt": replace(
        _GPT2,
        model_type="opt",
        names=r"\bopt-",
        tokens=_tokens("</s>", "</s>", "<pad>", "</s>"),
        vocabulary=644,
        first=("<s>", "<pad>", "</s>", "<unk>"),
        last=(),
        adds_bos=True,
    ),
    "phi": replace(
        _GPT2,
        model_type="phi",
        tokenizer_class="CodeGenTokenizer",
        names=r"\bphi-?(1|2)",
        vocabulary=679,
        spaces=(*(" " * count for count in range(31, 1, -1)), *("\t" * count for count in range(9, 1, -1))),
        tied=(),
    ),
    "gpt2": _GPT2,
}


def family_of(name: str) -> str:
    """
    Finds the family of a model, a key of `FAMILIES`.

    `name` is the folder of a model (its `config.json` and tokenizer tell), a name on the hub or among the packaged
    models (`"Qwen/Qwen1.5-1.8B"` is `"qwen2"`), or the name of a family.

    Raises:
        `UserError`: For a model of none of the families.
    """
    if name in FAMILIES:
        return name
    folder = Path(name)
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = [key for key, family in FAMILIES.items() if family.model_type == config.get("model_type")]
        if len(found) > 1:  # Llama's
            found = [_llama_family(folder)]
    else:
        found = [key for key, family in FAMILIES.items() if re.search(family.names, Path(name).name.lower())]
    if not found:
        raise UserError(f"there is no tiny stand-in for {name!r}: name a model of {', '.join(FAMILIES)}")
    return found[0]


def _llama_family(folder: Path) -> str:
    """Llama's class is shared by models with three kinds of tokenizers."""
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if "<|begin_of_text|>" in text:
        return "llama3"
    return "smollm2" if '"ByteLevel"' in text else "llama2"


def tiny_model(name: str, folder: str | Path, role: str) -> Path:
    """
    Writes a tiny model with random weights, its tokenizer and generation config, as the hub has the real one's.

    Two layers, a width of 64 (student) or 128 (teacher), every linear layer a multiple of 64 both ways (NF4 on CPUs
    needs that), 1,024 positions. Both roles of a family have the same tokenizer, but the teacher's embedding has more
    rows that no token uses, as larger Qwen models do. The same call writes the same bytes. Of a folder in which it is
    already, nothing changes.

    Args:
        name (`str`): Whose stand-in it is; see [`family_of`].
        folder (`str` or `Path`): Where to write; it appears when it is complete.
        role (`str`): `"student"` or `"teacher"`.

    Raises:
        `UserError`: For a model of no known family, and for a folder with something else in it.
    """
    check_name("role=", role, ROLES)
    key, folder = family_of(name), Path(folder)
    mark = {"family": key, "role": role, "version": FORMAT_VERSION}
    if _marked(folder) == mark:
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{str(folder)!r} holds something other than a tiny {key} {role}: name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        made = Path(beside) / "model"
        _write_tokenizer(key, made)
        _write_model(key, role, made)
        (made / MARKER).write_text(json.dumps(mark) + "\n", encoding="utf-8")
        made.rename(folder)
    return folder


def _marked(folder: Path) -> dict[str, Any] | None:
    path = folder / MARKER
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write_model(key: str, role: str, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from ..utils.random import cpu_seed

    family, width = FAMILIES[key], WIDTHS[role]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in family.tokens.items() if token is not None}
    special = {f"{name}_token_id": ids.get(f"{name}_token") for name in ("bos", "eos", "pad")}
    rows = -(-family.vocabulary // 64) * 64 + (64 if role == "teacher" else 0)
    settings: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 32,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": role in family.tied,
        **special,
    }
    if family.model_type == "opt":
        settings |= {"ffn_dim": 4 * width, "word_embed_proj_dim": width}
    elif family.model_type != "gpt2":  # which makes it four times the width
        settings |= {"intermediate_size": 4 * width}
    config = AutoConfig.for_model(family.model_type, **{**settings, **family.config})
    with cpu_seed(zlib.crc32(f"{key} {role}".encode())):
        model = AutoModelForCausalLM.from_config(config)
    ends = [special["eos_token_id"], *(tokenizer.convert_tokens_to_ids(token) for token in family.ends)]
    model.generation_config = GenerationConfig(**{**special, "eos_token_id": ends if family.ends else ends[0]})
    model.save_pretrained(folder)


# ---- Tokenizers


def learn_bpe(words: Iterable[str], alphabet: list[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """
    Learns byte-pair encoding: a vocabulary of `size` pieces or fewer, which begins with `alphabet`, and its merges.

    The `tokenizers` trainer breaks ties by hash order, which differs from process to process.
    """
    vocabulary = {piece: index for index, piece in enumerate(alphabet)}
    counts = Counter(words)
    pieces = {word: list(word) for word in counts}
    pairs: Counter[tuple[str, str]] = Counter()

    def count(word: str, times: int) -> None:
        for pair in pairwise(pieces[word]):
            pairs[pair] += times

    for word, times in counts.items():
        count(word, times)
    merges = []
    while len(vocabulary) < size:
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if best is None or not pairs[best]:
            break
        merges.append(best)
        vocabulary.setdefault("".join(best), len(vocabulary))
        for word in [word for word in counts if "".join(best) in word]:
            # Only these change.
            count(word, -counts[word])
            parts, i = pieces[word], 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1
            count(word, counts[word])
    return vocabulary, merges


def set_pipeline(tokenizer: Tokenizer, name: str) -> None:
    """Sets normalizer, pre-tokenizer and decoder as the `tokenizer.json` of the real families has them."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]

    def split(pattern: str) -> Any:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])

    normalizer, pre_tokenizer, decoder = {
        "gpt2": (None, byte_level, decoders.ByteLevel()),
        "gpt_neox": (normalizers.NFC(), byte_level, decoders.ByteLevel()),
        "qwen2": (normalizers.NFC(), split(QWEN2_SPLIT), decoders.ByteLevel()),
        "llama3": (None, split(_LLAMA3_SPLIT), decoders.ByteLevel()),
        "smollm2": (
            None,
            pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
            decoders.ByteLevel(),
        ),
        "sentencepiece": (
            normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
            None,
            decoders.Sequence([*fallback, decoders.Strip(" ", 1, 0)]),
        ),
        "gemma3": (
            normalizers.Replace(" ", "▁"),
            pre_tokenizers.Split(" ", "merged_with_previous"),
            decoders.Sequence(fallback),
        ),
    }[name]
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder


@functools.cache
def _tokenizer(key: str) -> Tokenizer:
    """Makes a family's tokenizer, with a vocabulary of its size."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    family = FAMILIES[key]
    cutting = Tokenizer(models.BPE())
    set_pipeline(cutting, family.pipeline)
    byte_level = family.pipeline not in ("sentencepiece", "gemma3")
    text = inspect.getsource(importlib.import_module(family.text))
    size = family.vocabulary - len(family.last) - len(family.spaces)
    if byte_level:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = [word for word, _ in cutting.pre_tokenizer.pre_tokenize_str(text)]
    else:
        # SentencePiece: a space belongs to the word after it, what has no piece falls back to its bytes.
        letters = [chr(code) for code in range(33, 127)]
        breaks = ["\n"] if family.pipeline == "gemma3" else []
        alphabet = [*(f"<0x{byte:02X}>" for byte in range(256)), *breaks, "▁", *letters]
        words = re.findall("▁+(?=▁)|▁?[^▁\n]+", text.replace(" ", "▁"))
    vocabulary, merges = learn_bpe(words, [*family.first, *alphabet], size)
    # Llama 3's tokens without merges of their own are whole words; none is here, but the setting is the real one's.
    options: dict[str, Any] = {"ignore_merges": True} if family.pipeline == "llama3" else {}
    if not byte_level:
        options = {"byte_fallback": True, "fuse_unk": True, "unk_token": family.tokens["unk_token"]}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))
    set_pipeline(tokenizer, family.pipeline)
    tokenizer.add_special_tokens([*family.first, *family.last])
    tokenizer.add_tokens(list(family.spaces))
    bos = family.tokens["bos_token"]
    if family.adds_bos and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    elif byte_level:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _write_tokenizer(key: str, folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, as both supported versions of transformers read them."""
    family = FAMILIES[key]
    config = {
        "tokenizer_class": family.tokenizer_class,
        # None of these models takes the token types that transformers 4 would add.
        "model_input_names": ["input_ids", "attention_mask"],
        **{name: token for name, token in family.tokens.items() if token is not None or name == "bos_token"},
        "add_bos_token": family.adds_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": POSITIONS,
        **({"chat_template": family.chat_template} if family.chat_template else {}),
    }
    if family.tokenizer_class == "LlamaTokenizer":
        config |= {"add_eos_token": False, "legacy": False}
    folder.mkdir()
    _tokenizer(key).save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Does `python -m hf_dskd.offline.tiny_models NAME FOLDER [--role ROLE]`: writes the model, prints its folder."""
    parser = Parser("python -m hf_dskd.offline.tiny_models", description=__doc__)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--role", choices=ROLES, default="student", help="(student)")
    given = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    print(tiny_model(given.name, given.folder, given.role))


if __name__ == "__main__":
    command(main)
