"""Tiny models, tokenizers and data that every test builds its runs from: no network, no files, seconds on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hf_dskd.offline.tiny_models import learn_bpe


REAL_TOKENIZERS = Path(__file__).resolve().parents[2] / "shared" / "tokenizers"
TEXTS = [
    "The cat sat on the mat and looked at the moon.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "def add(a, b):\n    return a + b\n",
    "東京は日本の首都です。👩‍👩‍👧 ok",
    "Knowledge distillation trains a small model to imitate a large one.",
    "Numbers: 3.14159, 2.71828 and 1.41421.",
]


def byte_level_tokenizer(size: int = 400) -> PreTrainedTokenizerFast:
    """GPT-2's kind: bytes as characters, no BOS."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = [word for text in TEXTS for word, _ in split.pre_tokenize_str(text)]
    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary, merges = learn_bpe(words, alphabet, size)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def sentencepiece_tokenizer(size: int = 450) -> PreTrainedTokenizerFast:
    """Llama-2's kind: '▁' for spaces, one put before every text, byte fallback, BOS."""
    latin = [chr(code) for code in range(33, 127)]
    alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *latin]
    words = ["▁" + word for text in TEXTS for word in text.split() if word.isascii()]
    vocabulary, merges = learn_bpe(words, alphabet, size)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def real_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One of the papers' tokenizers, which may lie beside the checkout; a test without it is skipped."""
    folder = REAL_TOKENIZERS / name
    if not folder.is_dir():
        pytest.skip(f"no tokenizer at {folder}")
    # Not AutoTokenizer: the folders name classes that only one of the supported versions of transformers has.
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = folder / "chat_template.jinja"
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        chat_template=template.read_text() if template.exists() else None,
        **{key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token") if config.get(key)},
    )


def gpt2(vocab_size: int = 400, width: int = 64, dropout: float = 0.0, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=width,
        n_layer=2,
        n_head=2,
        n_positions=1024,
        attn_pdrop=dropout,
        embd_pdrop=dropout,
        resid_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def qwen2(vocab_size: int = 450, width: int = 128, seed: int = 1) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    return Qwen2ForCausalLM(config)


def llama(vocab_size: int = 450, width: int = 64, seed: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def dataset(rows: int = 16) -> Dataset:
    """Prompts and responses of different lengths, several scripts among them."""
    return Dataset.from_list(
        [
            {"prompt": f"Question {i}: {TEXTS[i % 6][: 10 + 3 * i]}\n", "completion": TEXTS[(i + 1) % 6] * (1 + i % 2)}
            for i in range(rows)
        ]
    )
