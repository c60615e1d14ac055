"""Tiny models, tokenizers and data that every test builds its runs from: no network, no files, seconds on a CPU."""

from __future__ import annotations

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)


TEXTS = [
    "The cat sat on the mat and looked at the moon.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "def add(a, b):\n    return a + b\n",
    "東京は日本の首都です。👩‍👩‍👧 ok",
    "Knowledge distillation trains a small model to imitate a large one.",
    "Numbers: 3.14159, 2.71828 and 1.41421.",
]


def byte_level_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """GPT-2's kind: bytes as characters, no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def sentencepiece_tokenizer(vocab_size: int = 450) -> PreTrainedTokenizerFast:
    """Llama-2's kind: '▁' for spaces, one put before every text, byte fallback, BOS."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    latin = [chr(code) for code in range(32, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=latin, limit_alphabet=100, show_progress=False
    )
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in TEXTS], trainer)
    # Byte pieces are ordinary vocabulary, not special tokens: rebuild without marking them as such.
    state = tokenizer.model.__getstate__()
    plain = Tokenizer.from_str(tokenizer.to_str())
    import json

    description = json.loads(plain.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["id"] < 3]
    del state
    tokenizer = Tokenizer.from_str(json.dumps(description))
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
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
