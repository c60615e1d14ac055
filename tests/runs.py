"""Short runs on tiny models, for tests of the trainer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny
import torch
from transformers import GPT2Config, Qwen2Config

from hf_dskd import DSKDConfig, DSKDTrainer
from hf_dskd.methods import METHODS


# Every way of composing a loss, as settings: the methods (what the teacher wrote for seq_kd is learnt as sft learns
# any text), each matching, and parts that replace those of a method.
CASES = {
    **{name: {"method": name} for name in METHODS if name != "seq_kd"},
    "moments": {"method": "dskd_cma", "matching": "moments"},
    "mmd": {"method": "dskd_cma", "matching": "mmd"},
    "non_saturating": {"method": "dskd_cma_ga", "adversarial_loss": "non_saturating"},
    "student_space": {"method": "dskd_cma", "spaces": "student", "correctness_mask": False},
    "teacher_space": {"method": "dskd_cla", "spaces": "teacher", "matching": "gan"},
    "attention": {"method": "uld", "attention_kd_rate": 1.0},
    "attention_of_tokens": {"method": "kd", "attention_kd_rate": 1.0, "attention_layers": "uniform"},
    "bpm_longest": {"method": "bpm", "bpm_segmentation": "longest"},
    "merged_chunks": {"method": "alm", "alm_bias_threshold": 0.1, "alm_temperature": 1.0},
}

_STUDENT_TOKENIZER = tiny.byte_level_tokenizer()
_TEACHER_TOKENIZER = tiny.sentencepiece_tokenizer()


def config(folder: Path | str, **settings: Any) -> DSKDConfig:
    defaults = {
        "method": "dskd_cma_ga",
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "max_length": 256,
        "discriminator_dropout": 0.0,
        "discriminator_hidden_size": 32,
        # Small enough for several chunks and tiles of logits in a batch.
        "loss_memory_mb": 1.0,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return DSKDConfig(str(folder), **{**defaults, **settings})


def trainer(folder: Path | str, *, student=None, teacher=None, rows: int = 16, **settings: Any) -> DSKDTrainer:
    """
    A trainer of a tiny GPT-2 from a tiny Qwen2; `settings` go to the config, or to the trainer if it knows them.

    For methods that need one vocabulary the teacher has the student's tokenizer, and some rows more in its head.
    """
    of_trainer = ("peft_config", "callbacks", "compute_metrics", "data_collator", "optimizers", "eval_dataset")
    of_trainer += ("train_dataset", "processing_class", "teacher_processing_class", "preprocess_logits_for_metrics")
    options = {name: settings.pop(name) for name in of_trainer if name in settings}
    args = config(folder, **settings)
    teacher_tokenizer, teacher_rows = _TEACHER_TOKENIZER, len(_TEACHER_TOKENIZER)
    if args.method_row.same_vocabulary:
        teacher_tokenizer, teacher_rows = _STUDENT_TOKENIZER, len(_STUDENT_TOKENIZER) + 7
    return DSKDTrainer(
        student if student is not None else tiny.gpt2(len(_STUDENT_TOKENIZER)),
        teacher if teacher is not None else tiny.qwen2(teacher_rows),
        args,
        **{
            "train_dataset": tiny.dataset(rows),
            "processing_class": _STUDENT_TOKENIZER,
            "teacher_processing_class": teacher_tokenizer,
            **options,
        },
    )


def save_pair(folder: Path) -> tuple[str, str]:
    """Saves a tiny student and a tiny teacher, with their tokenizers, and names their folders."""
    student, teacher = tiny.gpt2(len(_STUDENT_TOKENIZER)), tiny.qwen2(len(_TEACHER_TOKENIZER))
    for name, model, tokens in (("student", student, _STUDENT_TOKENIZER), ("teacher", teacher, _TEACHER_TOKENIZER)):
        model.save_pretrained(folder / name)
        tokens.save_pretrained(folder / name)
    return str(folder / "student"), str(folder / "teacher")


def history(run: DSKDTrainer, *names: str) -> list[tuple[float, ...]]:
    """The named values of every training log."""
    return [tuple(log[name] for name in names) for log in run.state.log_history if "loss" in log]


def weights(run: DSKDTrainer) -> dict[str, torch.Tensor]:
    """Every trained tensor of a run, by where it lives."""
    parts = {"student": run.model, "projectors": run.projectors}
    if run.adversary is not None:
        parts["critic"] = run.adversary.critic
    return {
        f"{part}.{name}": parameter.detach().clone()
        for part, module in parts.items()
        if module is not None
        for name, parameter in module.named_parameters()
    }


def objective(args: DSKDConfig, **pair: Any) -> Any:
    """A method's objective without models, on hidden states of 6 and of 8 numbers; what else it reads is in `pair`."""
    configs = GPT2Config(n_embd=6), Qwen2Config(hidden_size=8)
    tokenizers = _STUDENT_TOKENIZER, _TEACHER_TOKENIZER
    sides = [SimpleNamespace(config=config, rows=len(tokens)) for config, tokens in zip(configs, tokenizers)]
    found = {"student": sides[0], "teacher": sides[1], "tokenizers": tokenizers}
    kept = SimpleNamespace(**found, **{"ends": None, "vocabulary_map": torch.zeros(17, dtype=torch.int64), **pair})
    return args.method_row.load()(args, kept, torch.device("cpu"))


def first_batch(run: DSKDTrainer, rows: int = 4) -> dict[str, torch.Tensor]:
    return run.data_collator([run.train_dataset[i] for i in range(rows)])
