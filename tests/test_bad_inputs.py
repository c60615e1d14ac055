"""
A table of wrong uses, each with the first line of its answer: one line that names the value and the remedy.

The run of the table prints how many of them are refused before any model is loaded.
"""

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    EarlyStoppingCallback,
    GPT2LMHeadModel,
    PreTrainedModel,
    TrainingArguments,
    default_data_collator,
)

from hf_dskd import DSKDConfig, DSKDTrainer, cli, tokenize_dataset
from hf_dskd.errors import UserError


STUDENT, TEACHER = tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()
ROWS = [dict(row) for row in tiny.dataset(4)]
TOKENS = tokenize_dataset(tiny.dataset(4), STUDENT, TEACHER, max_length=256)[0]
# Of the pair the other way round.
OTHERS = tokenize_dataset(tiny.dataset(4), TEACHER, STUDENT, max_length=256)[0]
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}


def config(**settings):
    return DSKDConfig("out", **{"use_cpu": True, "max_steps": 1, "max_length": 256, **settings})


def on_meta():
    with torch.device("meta"):
        return GPT2LMHeadModel(tiny.gpt2().config)


def changed(**columns):
    """The tokens with other values in the third row."""
    return TOKENS.map(
        lambda row, index: {name: make(row) if index == 2 else row[name] for name, make in columns.items()},
        with_indices=True,
    )


FILES = {
    "rows.jsonl": "\n".join(map(json.dumps, ROWS)),
    "half.jsonl": json.dumps(ROWS[0]) + '\n{"prompt": "a", "compl',
    "notes.txt": "text",
    "run.yaml": "output_dir: out\nmethod: sft\n",
    "sft.yaml": "output_dir: out\nmethod: sft\nmodel_name_or_path: student\ndataset_name: rows.jsonl\n",
    "broken.yaml": "method: [sft\n",
    "list.yaml": "- method\n- sft\n",
    "empty.yaml": "",
    "unknown.yaml": "output_dir: out\nmethd: alm\n",
    "words.yaml": "output_dir: out\nassistant_only_loss: true\n",
    "types.yaml": "output_dir: out\nmax_length: 64.5\n",
    "bounds.yaml": "output_dir: out\nkd_temperature: 0\n",
    "twice.yaml": "output_dir: out\nmax_seq_length: 64\nmax_length: 64\n",
    "number.yaml": "output_dir: out\n5: 3\n",
    "environment.yaml": "output_dir: out\nenv: [a]\n",
    "nothing.yaml": "output_dir: out\nmax_steps: null\n",
    "switch.yaml": "output_dir: out\nmax_steps: yes\n",
    "labels.yaml": "x: {max_steps: 3}\n",
    "finished/result.json": "{}",
    "broken/result.json": "{",
}


# ---- Settings: types, bounds, and words of other tools

SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"kq_rate": -0.5}, "kq_rate=-0.5 must be at least 0: 0 switches matching off"),
    ({"kq_rate": float("nan")}, "kq_rate=nan must be at least 0: 0 switches matching off"),
    ({"kd_rate": -0.1}, "kd_rate=-0.1 is outside [0, 1]: the papers use 0.5"),
    ({"kd_rate": 1.5}, "kd_rate=1.5 is outside [0, 1]: the papers use 0.5"),
    ({"kd_rate": float("nan")}, "kd_rate=nan is outside [0, 1]: the papers use 0.5"),
    ({"kd_temperature": 0.0}, "kd_temperature=0.0 must be above 0: the papers use 2.0"),
    ({"kd_temperature": -2.0}, "kd_temperature=-2.0 must be above 0: the papers use 2.0"),
    ({"kd_temperature": float("nan")}, "kd_temperature=nan must be above 0: the papers use 2.0"),
    (
        {"divergence": "skewed_forwrd_kl"},
        "divergence='skewed_forwrd_kl' is unknown: did you mean 'skewed_forward_kl'? one of forward_kl",
    ),
    ({"divergence": "revkl"}, "divergence='revkl' is unknown: did you mean 'reverse_kl'? one of forward_kl"),
    ({"method": "dskd-cma-ga"}, "method='dskd-cma-ga' is unknown: did you mean 'dskd_cma_ga'? one of sft"),
    (
        {"model_init_kwargs": "sdpa"},
        "model_init_kwargs='sdpa' isn't a mapping: write a JSON object, such as '{\"name\": 1}'",
    ),
    (
        {"teacher_model_init_kwargs": "[1]"},
        "teacher_model_init_kwargs=[1] isn't a mapping: write a JSON object, such as '{\"name\": 1}'",
    ),
    (
        {"chat_template_kwargs": "{think: false}"},
        "chat_template_kwargs='{think: false}' isn't a mapping: write a JSON object, such as '{\"name\": 1}'",
    ),
    (
        {"chat_template_kwargs": {"tokenize": True}},
        "chat_template_kwargs has 'tokenize', which training decides: leave it out, ",
    ),
    (
        {"chat_template_kwargs": '{"add_generation_prompt": false}'},
        "chat_template_kwargs has 'add_generation_prompt', which training decides: leave it out, ",
    ),
    ({"skew_lambda": 1.0}, "skew_lambda=1.0 is outside (0, 1): the papers use 0.1"),
    ({"adaptive_kl_alpha": 0.0}, "adaptive_kl_alpha=0.0 is outside (0, 1): the papers use 0.5"),
    ({"discriminator_steps": 0}, "discriminator_steps=0 must be at least 1 (default 1)"),
    (
        {"label_smoothing_factor": 0.1},
        "label_smoothing_factor=0.1 is not supported: leave it at 0 (distillation already softens the labels)",
    ),
    (
        {"teacher_cache": "states", "as_published": True},
        "teacher_cache='states': as_published=True needs the states of prompts and padding too, ",
    ),
    (
        {"teacher_cache": "states", "on_policy_fraction": 0.5},
        "teacher_cache='states': on_policy_fraction=0.5 makes responses that no cache can hold; ",
    ),
    ({"kd_rate": "0.5"}, "kd_rate='0.5' must be a number: the papers use 0.5"),
    ({"kd_rate": None}, "kd_rate=None must be a number: the papers use 0.5"),
    ({"max_length": 64.5}, "max_length=64.5 must be an integer: a prompt and a response need room"),
    ({"max_length": "128"}, "max_length='128' must be an integer: a prompt and a response need room"),
    ({"as_published": "yes"}, "as_published='yes' must be True or False (default False)"),
    ({"skip_long_prompts": 1}, "skip_long_prompts=1 must be True or False (default False)"),
    ({"method": None}, "method=None is unknown: one of sft"),
    ({"divergence": 5}, "divergence=5 is unknown: one of forward_kl"),
    ({"prompt_column": 3}, "prompt_column=3 must be a string"),
    ({"teacher_cache": ""}, "teacher_cache='' is empty: leave it out"),
    ({"teacher_device": 0}, "teacher_device=0 must be a string: such as 'cuda:1'"),
    ({"learning_rate": "fast"}, "learning_rate='fast' must be a number (default 5e-05)"),
    ({"bf16": "no"}, "bf16='no' must be True or False"),
    (
        {"lr_scheduler_kwargs": "foo"},
        "lr_scheduler_kwargs='foo' isn't a mapping: write a JSON object, such as '{\"name\": 1}'",
    ),
    (
        {"gradient_checkpointing_kwargs": "[1]"},
        "gradient_checkpointing_kwargs=[1] isn't a mapping: write a JSON object, such as '{\"name\": 1}'",
    ),
    ({"kd_temperature": float("inf")}, "kd_temperature=inf must be a finite number: the papers use 2.0"),
    ({"student_temperature": float("inf")}, "student_temperature=inf must be a finite number: the papers use 2.0"),
    ({"loss_memory_mb": float("nan")}, "loss_memory_mb=nan must be above 0 (default 512.0)"),
    (
        {"discriminator_learning_rate": float("nan")},
        "discriminator_learning_rate=nan must be at least 0 (default 0.0001)",
    ),
    ({"attention_layers": "first"}, "attention_layers='first' is none of 'last', 'uniform' and pairs of layers, "),
    ({"on_nonfinite": "ignore"}, "on_nonfinite='ignore' is unknown: one of stop, skip"),
    ({"learning_rate": -1.0}, "learning_rate=-1.0 must be at least 0 (default 5e-05)"),
    ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0 must be at least 0: 0 clips nothing"),
    (
        {"dataloader_prefetch_factor": 2},
        "--dataloader_prefetch_factor can only be set when data is loaded in a different process, ",
    ),
    ({"logging_steps": 2.5}, "--logging_steps must be an integer if bigger than 1: 2.5"),
    ({"eval_strategy": "steps", "eval_steps": 0}, "eval_steps=0 must be above 0: eval_strategy='no' evaluates never"),
    ({"optim": "adamw_tourch"}, "optim='adamw_tourch' is unknown: did you mean 'adamw_torch'? one of "),
    ({"eval_strategy": "step"}, "eval_strategy='step' is unknown: did you mean 'steps'? one of no, steps, epoch"),
    ({"save_strategy": 5}, "save_strategy=5 is unknown: one of no, steps, epoch, best"),
    ({"bf16": True, "fp16": True}, "At most one of fp16 and bf16 can be True, but not both"),
    (
        {"load_best_model_at_end": True},
        "load_best_model_at_end=True needs evaluations to choose by: set eval_strategy as save_strategy",
    ),
    (
        {
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "eval_steps": 3,
            "save_steps": 4,
        },
        "--load_best_model_at_end requires the saving steps to be a round multiple of the evaluation steps, ",
    ),
    (
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        "lr_scheduler_type reduce_lr_on_plateau requires an eval strategy",
    ),
    ({"debug": "everything"}, "everything is not a valid DebugOption"),
    ({"kd_temprature": 1.0}, "DSKDConfig: kd_temprature is no setting: did you mean kd_temperature?"),
    ({"no_such_thing": 1}, "DSKDConfig: no_such_thing is no setting: leave it out"),
    (
        {"beta": 0.5},
        "DSKDConfig: beta is no setting: the generalized Jensen-Shannon divergence is divergence='js' with th",
    ),
    (
        {"temperature": 0.9},
        "DSKDConfig: temperature is no setting: kd_temperature divides the logits in the divergences; ",
    ),
    (
        {"use_vllm": True},
        "DSKDConfig: use_vllm is no setting: the student answers with transformers' own generate: leave it out",
    ),
    (
        {"vllm_mode": "colocate"},
        "DSKDConfig: vllm_mode is no setting: the student answers with transformers' own generate: leave it out",
    ),
    (
        {"max_seq_length": 64, "max_length": 64},
        "DSKDConfig: max_seq_length is max_length here, and both are given: leave one of them out",
    ),
]

# ---- Arguments of the trainer

OBJECTS: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (
        lambda: {"args": TrainingArguments("out", use_cpu=True)},
        "args is a TrainingArguments, which isn't a DSKDConfig: write DSKDConfig(...) with the same settings",
    ),
    (lambda: {"args": {"output_dir": "out"}}, "args is a dict, which isn't a DSKDConfig: write DSKDConfig(**args)"),
    (
        lambda: {"args": "out"},
        "args is a str, which isn't a DSKDConfig: write DSKDConfig('out'), if that is the output folder",
    ),
    (
        lambda: {"args": DSKDConfig},
        "args is the class DSKDConfig, which isn't a DSKDConfig: write DSKDConfig(...) with the same settings",
    ),
    (
        lambda: {"model": 5},
        "model is an int: pass a name, a folder, or a model of AutoModelForCausalLM.from_pretrained(...)",
    ),
    (lambda: {"model": ""}, "model='' is empty: name a model or a folder"),
    (lambda: {"model": GPT2LMHeadModel}, "model is the class GPT2LMHeadModel: pass a name, a folder, "),
    (
        lambda: {"model": torch.nn.Linear(2, 2)},
        "model is a Linear: pass a name, a folder, or a model of AutoModelForCausalLM.from_pretrained(...)",
    ),
    (
        lambda: {"model": torch.nn.DataParallel(tiny.gpt2())},
        "model is a DataParallel around a GPT2LMHeadModel: pass the model itself",
    ),
    (
        lambda: {"model": on_meta()},
        "model is on the meta device, without weights: load it with from_pretrained, or name it",
    ),
    (
        lambda: {"teacher_model": ["teacher"]},
        "teacher_model is a list: pass a name, a folder, or a model of AutoModelForCausalLM.from_pretrained(...)",
    ),
    (
        lambda: {"teacher_model": 5},
        "teacher_model is an int: pass a name, a folder, or a model of AutoModelForCausalLM.from_pretrained(...)",
    ),
    (
        lambda: {"processing_class": "student"},
        "processing_class='student' is a name: pass AutoTokenizer.from_pretrained('student')",
    ),
    (
        lambda: {"processing_class": Path("student")},
        "processing_class='student' is a name: pass AutoTokenizer.from_pretrained('student')",
    ),
    (lambda: {"processing_class": 5}, "processing_class is an int, which is no tokenizer of transformers: "),
    (
        lambda: {"processing_class": STUDENT.backend_tokenizer},
        "processing_class is a Tokenizer, which is no tokenizer of transformers: ",
    ),
    (
        lambda: {"teacher_processing_class": AutoTokenizer},
        "teacher_processing_class is the class AutoTokenizer, which is no tokenizer of transformers: ",
    ),
    (
        lambda: {"processing_class": TEACHER, "teacher_processing_class": STUDENT},
        "processing_class gives only 0 of 400 tokens the id that the tokenizer saved with 'student' gives the",
    ),
    (
        lambda: {"processing_class": TEACHER},
        "processing_class gives only 0 of 400 tokens the id that the tokenizer saved with 'student' gives the",
    ),
    (
        lambda: {
            "model": tiny.gpt2(450),
            "teacher_model": tiny.qwen2(450),
            "processing_class": TEACHER,
            "teacher_processing_class": STUDENT,
        },
        "processing_class is the tokenizer of the teacher's model, ",
    ),
    (
        lambda: {"train_dataset": "databricks/dolly"},
        "train_dataset='databricks/dolly' is a name: pass datasets.load_dataset('databricks/dolly', split='train')",
    ),
    (
        lambda: {"train_dataset": Path("rows.jsonl")},
        "train_dataset='rows.jsonl' is a name: pass datasets.load_dataset('json', data_files='rows.jsonl', ",
    ),
    (
        lambda: {"train_dataset": DatasetDict(train=tiny.dataset(2), test=tiny.dataset(2))},
        "train_dataset is a DatasetDict of the splits train, test: pass one of them",
    ),
    (
        lambda: {"train_dataset": {"prompt": ["a"], "completion": ["b"]}},
        "train_dataset is a dict: pass datasets.Dataset.from_dict(...), or a list of rows",
    ),
    (lambda: {"train_dataset": []}, "train_dataset has no rows: pass at least one"),
    (
        lambda: {"train_dataset": ["a", "b"]},
        "train_dataset: row 0 is a str, not a mapping: write rows as {'prompt': ..., 'completion': ...}",
    ),
    (
        lambda: {"train_dataset": [{"prompt": "a", "completion": "b"}, "c"]},
        "train_dataset: row 1 is a str, not a mapping: write rows as {'prompt': ..., 'completion': ...}",
    ),
    (
        lambda: {"train_dataset": iter(ROWS)},
        "train_dataset is a list_iterator: pass a datasets.Dataset, or a list of rows",
    ),
    (
        lambda: {"train_dataset": [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 5}]},
        "train_dataset is no table (Expected bytes, got a 'int' object): give a column values of one kind",
    ),
    (
        lambda: {"train_dataset": Dataset},
        "train_dataset is the class Dataset: pass a datasets.Dataset, or a list of rows",
    ),
    (lambda: {"train_dataset": 5}, "train_dataset is an int: pass a datasets.Dataset, or a list of rows"),
    (
        lambda: {"eval_dataset": "test"},
        "eval_dataset='test' is a name: pass datasets.load_dataset('test', split='train')",
    ),
    (
        lambda: {"eval_dataset": {"prompt": ["a"], "completion": ["b"]}},
        "eval_dataset['prompt']: row 0 is a str, not a mapping: write rows as {'prompt': ..., 'completion': ...}",
    ),
    (lambda: {"peft_config": {"r": 4}}, "peft_config is a dict: write peft_config=LoraConfig(**peft_config)"),
    (lambda: {"peft_config": LoraConfig}, "peft_config is the class LoraConfig: write peft_config=LoraConfig(...)"),
    (
        lambda: {"quantization_config": {"load_in_4bit": True}},
        "quantization_config is a dict: write quantization_config=BitsAndBytesConfig(**quantization_config)",
    ),
    (
        lambda: {"teacher_quantization_config": "nf4"},
        "teacher_quantization_config is a str: write teacher_quantization_config=BitsAndBytesConfig(...)",
    ),
    (lambda: {"optimizers": None}, "optimizers is None: pass the two (optimizer, None)"),
    (lambda: {"optimizers": (None,)}, "optimizers is a tuple of 1: pass the two (optimizer, None)"),
    (
        lambda: {"optimizers": (torch.optim.SGD, None)},
        "optimizers has the class SGD as its first: make a torch.optim.Optimizer, or set optim",
    ),
    (
        lambda: {"optimizers": (None, "cosine")},
        "optimizers has a str as its second: make a schedule, or set lr_scheduler_type",
    ),
    (
        lambda: {"optimizers": (torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), 1.0), None)},
        "optimizers=(SGD, ...): the student 'student' is loaded by its name, ",
    ),
    (lambda: {"compute_metrics": "rouge"}, "compute_metrics='rouge' is a str: pass a function"),
    (lambda: {"preprocess_logits_for_metrics": 5}, "preprocess_logits_for_metrics=5 is an int: pass a function"),
    (lambda: {"callbacks": EarlyStoppingCallback()}, "callbacks is an EarlyStoppingCallback: pass a list of them"),
    (
        lambda: {"callbacks": [print]},
        "callbacks has a builtin_function_or_method, which is no TrainerCallback: derive it from that",
    ),
    (lambda: {"callbacks": ["early"]}, "callbacks has a str, which is no TrainerCallback: derive it from that"),
    (lambda: {"data_collator": 5}, "data_collator=5 is an int: pass a function"),
    (
        lambda: {"data_collator": default_data_collator},
        "data_collator=default_data_collator can't batch tokenized rows (",
    ),
    (
        lambda: {"data_collator": DataCollatorForLanguageModeling(STUDENT, mlm=False)},
        "data_collator=DataCollatorForLanguageModeling can't batch tokenized rows (",
    ),
    (
        lambda: {"data_collator": lambda rows: {"input_ids": torch.ones(2, 2)}},
        "data_collator=<lambda> makes batches without attention_mask, labels, teacher_input_ids, ",
    ),
    (
        lambda: {"tokenizer": STUDENT, "processing_class": STUDENT},
        "DSKDTrainer: tokenizer is processing_class here, and both are given: leave one of them out",
    ),
    (
        lambda: {"teacher": "teacher"},
        "DSKDTrainer: teacher is teacher_model here, and both are given: leave one of them out",
    ),
    (
        lambda: {"formatting_func": str},
        "DSKDTrainer: formatting_func is no setting: map the dataset to columns prompt and completion, ",
    ),
    (lambda: {"ref_model": "teacher"}, "DSKDTrainer: ref_model is no setting: the teacher is teacher_model"),
    (
        lambda: {"model_init": tiny.gpt2},
        "DSKDTrainer: model_init is no setting: name the model, which is loaded anew for every trial of a search",
    ),
    (
        lambda: {"dataset_text_field": "text"},
        "DSKDTrainer: dataset_text_field is no setting: rows have a prompt and a response: ",
    ),
    (lambda: {"packing": True}, "DSKDTrainer: packing is no setting: sequences hold one example each; "),
    (
        lambda: {"learning_rate": 1e-4},
        "DSKDTrainer: learning_rate is no setting: settings go into args=DSKDConfig(...)",
    ),
    (lambda: {"train_datasets": None}, "DSKDTrainer: train_datasets is no setting: did you mean train_dataset?"),
    (
        lambda: {"compute_loss_func": print},
        "DSKDTrainer: compute_loss_func is no setting: method and divergence say what the loss is; ",
    ),
    (
        lambda: {"args": config(eval_strategy="steps")},
        "eval_strategy='steps' but eval_dataset=None: pass the examples to evaluate on, or leave eval_strategy out",
    ),
    (
        lambda: {"args": config(eval_on_start=True)},
        "eval_on_start=True but eval_dataset=None: pass the examples to evaluate on, or leave eval_on_start out",
    ),
    (
        lambda: {"args": config(report_to="tensorbord")},
        "report_to='tensorbord' is unknown: did you mean 'tensorboard'? one of ",
    ),
    (
        lambda: {"args": config(**BEST, metric_for_best_model="blue"), "eval_dataset": ROWS},
        "metric_for_best_model='blue' is unknown: one of bits_per_byte",
    ),
    (
        lambda: {"args": config(**BEST, metric_for_best_model="rouge_l"), "eval_dataset": ROWS},
        "metric_for_best_model='rouge_l' is of answers, and there are none: set eval_generation_samples",
    ),
    (
        lambda: {"args": config(model_init_kwargs={"dtype": "float99"})},
        "model_init_kwargs has dtype='float99': name one of float32, bfloat16, float16 or auto",
    ),
    (
        lambda: {"args": config(model_init_kwargs={"load_in_4bit": True})},
        "model_init_kwargs has 'load_in_4bit'; write quantization_config={'quant_method': 'bitsandbytes', ",
    ),
    (
        lambda: {"args": config(model_init_kwargs={"no_such_option": 1})},
        "the student's init kwargs have 'no_such_option', ",
    ),
    (
        lambda: {"train_dataset": TOKENS, "args": config(max_length=32)},
        "the train data is tokenized, and its row 0 has 43 tokens in input_ids, ",
    ),
    (
        lambda: {"args": config(max_steps=0)},
        "max_steps=0 takes no step: set it to 1 or more, or to -1 for num_train_epochs; ",
    ),
    (
        lambda: {"args": config(dataloader_drop_last=True, per_device_train_batch_size=64)},
        "dataloader_drop_last=True drops all of 4 examples, fewer than per_device_train_batch_size=64: ",
    ),
    (
        lambda: {"args": config(teacher_cache="student")},
        "teacher_cache='student' isn't a teacher cache, it holds config.json, generation_config.json, ",
    ),
    (lambda: {"args": config(teacher_device="gpu")}, "teacher_device='gpu' is no device of this machine: "),
    (
        lambda: {"args": config(lr_scheduler_type="cosine_with_min_lr")},
        "lr_scheduler_type='cosine_with_min_lr': ",
    ),
    (
        lambda: {"args": config(lr_scheduler_kwargs={"foo": 1})},
        "lr_scheduler_type='linear' with lr_scheduler_kwargs={'foo': 1}: ",
    ),
    (
        lambda: {"args": config(optim="adamw_torch", optim_args="foo=1")},
        "optim='adamw_torch' with optim_args='foo=1': 'foo' has no effect on it, leave it out",
    ),
    (
        lambda: {"args": config(optim="adamw_torch", optim_args="foo")},
        "optim='adamw_torch' with optim_args='foo': ",
    ),
    (
        lambda: {"args": config(gradient_checkpointing_kwargs={"foo": 1})},
        "gradient_checkpointing_kwargs has 'foo' is unknown: one of ",
    ),
    (
        lambda: {"args": config(include_for_metrics=["losses"])},
        "include_for_metrics has 'losses' is unknown: did you mean 'loss'? one of inputs, loss",
    ),
    (
        lambda: {"args": config(torch_compile_backend="inductr")},
        "torch_compile_backend='inductr' is unknown: did you mean 'inductor'? one of ",
    ),
]

# ---- Rows that were tokenized elsewhere

ROWS_OF_TOKENS: list[tuple[Callable[[], Dataset], str]] = [
    (
        lambda: changed(input_ids=lambda row: [9999, *row["input_ids"][1:]]),
        "the train data is tokenized, and its row 2 has the token 9999 in input_ids, ",
    ),
    (
        lambda: changed(input_ids=lambda row: [-1, *row["input_ids"][1:]]),
        "the train data is tokenized, and its row 2 has the token -1 in input_ids, ",
    ),
    (
        lambda: changed(teacher_input_ids=lambda row: [*row["teacher_input_ids"][:-1], 450]),
        "the train data is tokenized, and its row 2 has the token 450 in teacher_input_ids, ",
    ),
    (
        lambda: changed(input_ids=lambda row: []),
        "the train data is tokenized, and its row 2 has prompt_length=22 of 0 tokens, ",
    ),
    (
        lambda: changed(prompt_length=lambda row: 999),
        "the train data is tokenized, and its row 2 has prompt_length=999 of 28 tokens, ",
    ),
    (
        lambda: changed(prompt_length=lambda row: len(row["input_ids"])),
        "the train data is tokenized, and its row 2 has prompt_length=28 of 28 tokens, ",
    ),
    (
        lambda: changed(prompt_length=lambda row: 0),
        "the train data is tokenized, and its row 2 has prompt_length=0, and spans begin at 22: ",
    ),
    (
        lambda: changed(teacher_prompt_length=lambda row: -3),
        "the train data is tokenized, and its row 2 has teacher_prompt_length=-3 of 71 tokens, ",
    ),
    (
        lambda: changed(chunk_ids=lambda row: row["chunk_ids"][:-1]),
        "the train data is tokenized, and its row 2 has 5 numbers in chunk_ids for 6 response tokens: ",
    ),
    (
        lambda: changed(teacher_byte_ends=lambda row: []),
        "the train data is tokenized, and its row 2 has 0 numbers in teacher_byte_ends for 53 response tokens",
    ),
    (
        lambda: changed(spans=lambda row: row["spans"][:1]),
        "the train data is tokenized, and its row 2 has 1 numbers in spans, which come in pairs: ",
    ),
    (
        lambda: changed(spans=lambda row: [row["spans"][0], 999]),
        "the train data is tokenized, and its row 2 has spans that lie outside of its tokens or overlap: ",
    ),
    (
        lambda: changed(spans=lambda row: [row["spans"][0]] * 2),
        "the train data is tokenized, and its row 2 has no response token in spans: ",
    ),
    (
        lambda: TOKENS.remove_columns(["spans"]).map(lambda row: {"prompt_length": len(row["input_ids"])}),
        "the train data is tokenized, and its row 0 has prompt_length=43 of 43 tokens, ",
    ),
    (lambda: TOKENS.remove_columns(["byte_ends"]), "the train data is tokenized, without the columns byte_ends: "),
    (
        lambda: TOKENS.remove_columns([name for name in TOKENS.column_names if name.startswith("teacher_")]),
        "the train data is tokenized, without the columns teacher_input_ids, teacher_prompt_length, ",
    ),
    (
        lambda: TOKENS.map(lambda row: {"input_ids": ["a"]}, remove_columns=["input_ids"]),
        "the column input_ids of the tokenized data is of type list<item: string>, not lists of integers: ",
    ),
    (
        lambda: (
            TOKENS.map(lambda row: {"text_length": 0.5})
            .remove_columns(["prompt_length"])
            .rename_column("text_length", "prompt_length")
        ),
        "the column prompt_length of the tokenized data is of type double, not integer: ",
    ),
    (lambda: OTHERS, "the train data is tokenized, and its row 0 has the token 448 in input_ids, "),
    (
        lambda: TOKENS.map(
            lambda row: {
                f"teacher_{name}": row[name]
                for name in ("input_ids", "prompt_length", "byte_ends", "spans", "chunk_ids")
            }
        ),
        "the train data is tokenized, and the response of its row 0 is 'Zwölf Boxkämpfer jagen Viktor quer üb",
    ),
    (lambda: TOKENS.select([]), "the train data has no rows: pass at least one"),
    (
        lambda: changed(input_ids=lambda row: [9999, *row["input_ids"][1:]]).shuffle(seed=0),
        "the train data is tokenized, and its row 0 has the token 9999 in input_ids, ",
    ),
]

# ---- Command line, configuration files, files

COMMANDS: list[tuple[str, str]] = [
    ("trian", "command 'trian' is unknown: did you mean 'train'? one of train"),
    ("kl", "command 'kl' is unknown: one of train"),
    ("--verbose", "command '--verbose' is unknown: one of train"),
    ("train --config nothere.yaml", "--config 'nothere.yaml' isn't a file: name a YAML file"),
    ("train --config broken.yaml", "--config 'broken.yaml' isn't valid YAML: "),
    ("train --config list.yaml", "--config 'list.yaml' holds no settings: write one `name: value` a line"),
    ("train --config empty.yaml", "--config 'empty.yaml' holds no settings: write one `name: value` a line"),
    ("train --config unknown.yaml", "'unknown.yaml': methd is no setting: did you mean method?"),
    (
        "train --config words.yaml",
        "'words.yaml': assistant_only_loss is no setting: responses alone are learnt, prompts never: leave it out",
    ),
    ("train --config types.yaml", "max_length=64.5 must be an integer: a prompt and a response need room"),
    ("train --config bounds.yaml", "kd_temperature=0 must be above 0: the papers use 2.0"),
    (
        "train --config twice.yaml",
        "'twice.yaml': max_seq_length is max_length here, and both are given: leave one of them out",
    ),
    (
        "train run.yaml",
        "'run.yaml' belongs to no setting: name a configuration file with --config, a value with --NAME",
    ),
    ("train --output_dir out", "dataset_name is not set: name a dataset on the hub, a folder, "),
    ("train --output_dir out --methd alm", "--methd is no setting: did you mean --method?"),
    ("train --output_dir out --no-such-thing 1", "--no-such-thing is no setting: --help lists the settings"),
    ("train --output_dir out --max_steps many", "argument --max_steps/--max-steps: invalid int value: 'many'"),
    (
        "train --output_dir out --divergence kl_forward",
        "divergence='kl_forward' is unknown: did you mean 'forward_kl'? one of forward_kl",
    ),
    ("train --output_dir out --kd_rate 2", "kd_rate=2.0 is outside [0, 1]: the papers use 0.5"),
    (
        "train --output_dir out --beta 0.5",
        "--beta is no setting: the generalized Jensen-Shannon divergence is divergence='js' with this as js_w",
    ),
    ("train --output_dir out --packing", "--packing is no setting: sequences hold one example each; "),
    ("train --output_dir out --tokenizer student", "--tokenizer is no setting: each model's own tokenizer is taken; "),
    (
        "train --output_dir out --max_seq_length 64 --max_length 64",
        "--max_seq_length is --max_length here, and both are given: leave one of them out",
    ),
    ("train --output_dir out --train_size 0", "train_size=0 must be at least 1"),
    ("train --output_dir out --held_out_size -1", "held_out_size=-1 must be at least 0 (default 0)"),
    ("train --output_dir out --sft_teacher_epochs 0", "sft_teacher_epochs=0.0 must be above 0 (default 3.0)"),
    ("train --output_dir out --total_batch_size 0", "total_batch_size=0 must be at least 1"),
    (
        "train --output_dir out --lora_r 8",
        "lora_r=8 without use_peft: all of the student would be trained; add --use_peft",
    ),
    (
        "train --output_dir out --dataset_name nothere.jsonl",
        "dataset 'nothere.jsonl': there is no such file; check the path",
    ),
    (
        "train --output_dir out --dataset_name notes.txt",
        "dataset 'notes.txt' can't be read: the formats are .jsonl, .ndjson, .json, .csv, .tsv, .parquet, ",
    ),
    (
        "train --output_dir out --dataset_name half.jsonl",
        "'half.jsonl', line 2 isn't JSON (Unterminated string starting at: line 1 column 17 (char 16)): ",
    ),
    (
        "train --output_dir out --dataset_name rows.jsonl --dataset_train_split training",
        "dataset_train_split='training' isn't there: the splits are train",
    ),
    (
        "train --output_dir out --dataset_name rows.jsonl --rename_columns question=prompt",
        "rename_columns='question=prompt': write old=new,old=new with columns out of prompt, completion",
    ),
    (
        "train --output_dir out --dataset_name rows.jsonl",
        "model=None: name the student, or pass a causal language model",
    ),
    (
        "train --output_dir out --dataset_name rows.jsonl --train_size 99",
        "train_size=99: there are 4 examples to train on",
    ),
    (
        "train --output_dir out --dataset_name rows.jsonl --model_name_or_path student",
        "method='dskd_cma_ga' needs teacher_model (a name or a model); method='sft' trains without one",
    ),
    (
        "train --output_dir out --dataset_name rows.jsonl --model_name_or_path student --teacher student",
        "teacher_model is the student itself ('student'): name a larger model",
    ),
    (
        "train --output_dir out --dataset_name rows.jsonl --teacher_model_name_or_path teacher",
        "model=None: name the student, or pass a causal language model",
    ),
    (
        "train --output_dir out --dataset_name rows.jsonl --model student --teacher teacher --eval_strategy steps",
        "eval_strategy='steps' but there is nothing to evaluate on: set held_out_size",
    ),
    (
        "train --output_dir finished --dataset_name rows.jsonl",
        "output_dir='finished' holds another run (result.json): ",
    ),
    (
        "train --output_dir rows.jsonl/below --dataset_name rows.jsonl --model_name_or_path student --teacher teacher",
        "output_dir='rows.jsonl/below' is not writable (Not a directory): choose another folder",
    ),
    (
        "cache-teacher --output_dir out --method sft",
        "method='sft' runs no teacher while it trains: name a method that does, such as dskd_cma",
    ),
    ("compare --methods sft", "--output_dir is not set: name a folder for the cells and the table"),
    ("compare --methods sft,sft --config run.yaml --output_dir out", "--methods has 'sft' twice: name it once"),
    (
        "compare --methods sft,dskd_cmaa --config run.yaml --output_dir out",
        "method 'dskd_cmaa' is unknown: did you mean 'dskd_cma'? one of sft",
    ),
    (
        "compare --methods sft --seeds one --config run.yaml --output_dir out",
        "--seeds has 'one': give whole numbers with commas between, such as 0,1,2",
    ),
    ("methods sft", "hf-dskd methods takes no 'sft': it lists them all"),
    ("analyse nothere", "'nothere' isn't a folder: name the output folder of a run, or a checkpoint in it"),
    ("analyse student", "'student' has no settings.yaml: name the run's configuration file with --config"),
    ("analyse out --examples 0", "--examples 0 must be at least 1"),
    ("completion powershell", "shell 'powershell' is unknown: one of bash, zsh, fish"),
    ("evaluate --model student", "--output_dir is not set: name a folder for the answers and scores"),
    ("report nothere", "'nothere' isn't a folder: name the --output_dir of a run of `hf-dskd train`"),
    ("push nothere me/repository", "'nothere' isn't a folder: name the --output_dir of a run of `hf-dskd train`"),
    ("train --config bytes.yaml", "--config 'bytes.yaml' isn't valid YAML: "),
    ("train --config number.yaml", "'number.yaml': 5 is no setting: --help lists the settings"),
    ("train --config environment.yaml", "`env` field should be a dict in the YAML file."),
    ("train --config nothing.yaml", "max_steps=None must be an integer (default -1)"),
    ("train --config switch.yaml", "max_steps=True must be an integer (default -1)"),
    ("train --output_dir", "argument --output_dir/--output-dir: expected one argument"),
    ('train --output_dir "" --dataset_name rows.jsonl', "output_dir='' is empty: leave it out"),
    ('train --output_dir out --dataset_name ""', "dataset_name is not set: "),
    (
        "train --config sft.yaml --use_peft --lora_task_type FOO",
        "the adapter's settings: Invalid task type: 'FOO'",
    ),
    (
        "train --config sft.yaml --report_to notebook",
        "report_to='notebook' is unknown: ",
    ),
    (
        "train --config sft.yaml --held_out_size 4",
        "held_out_size=4 leaves nothing of 4 examples to train on: set it to less, such as 1",
    ),
    (
        "train --config sft.yaml --dataset_streaming",
        "dataset_streaming=True: max_steps=-1 says when to stop",
    ),
    (
        "cache-teacher --config sft.yaml --method dskd_cma --teacher teacher --teacher_cache student",
        "teacher_cache='student' isn't a teacher cache, it holds config.json, ",
    ),
    (
        "compare --methods sft --config run.yaml --output_dir out --variants labels.yaml",
        "labels.yaml: x must say its method",
    ),
    ("compare --methods sft --config run.yaml --output_dir out --seed 5", "--seed is different in every cell: "),
    ("evaluate --model student --sets a=nothere.jsonl --output_dir out", "a=nothere.jsonl isn't a file: "),
    ("evaluate --model student --sets a=rows.jsonl --output_dir out --seeds x", "--seeds has 'x': "),
    ("evaluate --model student --sets a=rows.jsonl --output_dir out --limit 0", "--limit 0 is less than 1: "),
    ("evaluate --model student --sets a=rows.jsonl --output_dir out --top_p 2", "--top_p 2.0 is no share: "),
    ("report broken", "'broken/result.json' isn't valid JSON ("),
    ("push broken", "REPO is not set: name the repository on the hub"),
    ("analyse broken --examples x", "argument --examples: invalid int value: 'x'"),
]

# ---- What only the loaded student tells

AFTER_LOADING: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (
        lambda: {
            "model": tiny.gpt2(400),
            "processing_class": STUDENT,
            "optimizers": (torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), 1.0), None),
        },
        "optimizers: 2 of the optimizer's 2 parameters are none of the student's: ",
    ),
    (lambda: {"peft_config": LoraConfig(r=-1, target_modules="all-linear")}, "peft_config doesn't fit the student: "),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the models and files lie that the table names."""
    folder = tmp_path_factory.mktemp("uses")
    for name, model, tokenizer in (
        ("student", tiny.gpt2(len(STUDENT)), STUDENT),
        ("teacher", tiny.qwen2(len(TEACHER)), TEACHER),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "bytes.yaml").write_bytes(b"\xff\xfe\x00a")
    return folder


@pytest.fixture(scope="module")
def tally(request):
    """Of each use whether a model was loaded before it was refused."""
    loaded: list[bool] = []
    yield loaded
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{loaded.count(False)} of {len(loaded)} wrong uses are refused before any model is loaded")


@pytest.fixture
def answer(folder, tally, monkeypatch):
    """Runs a use, and gives its answer and whether a model was loaded before it."""
    monkeypatch.chdir(folder)
    read, names = PreTrainedModel.from_pretrained.__func__, []

    def spy(cls, name, *args, **kwargs):
        names.append(name)
        return read(cls, name, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(spy))

    def run(use):
        with pytest.raises(UserError) as caught:
            use()
        tally.append(bool(names))
        return str(caught.value), bool(names)

    return run


def ids(table):
    return [f"{index}-{use if isinstance(use, str) else ''}"[:60] for index, (use, _) in enumerate(table)]


def check(said, expected):
    assert len(said.splitlines()) == 1 and said.startswith(expected), said


@pytest.mark.parametrize(
    "settings, expected", SETTINGS, ids=[f"{i}-{','.join(s)}" for i, (s, _) in enumerate(SETTINGS)]
)
def test_settings(answer, settings, expected):
    known = {setting.name for setting in fields(DSKDConfig)}
    for name in settings:
        if (name in known) == expected.startswith(f"DSKDConfig: {name} "):
            pytest.skip(f"{name} of another version of transformers")
    said, loaded = answer(lambda: DSKDConfig(**{"output_dir": "out", "use_cpu": True, **settings}))
    check(said, expected)
    assert not loaded


def train(options):
    given = {"model": "student", "teacher_model": "teacher", "train_dataset": tiny.dataset(4)}
    if "args" not in options:
        options["args"] = config()
    DSKDTrainer(**{**given, **options})


@pytest.mark.parametrize("options, expected", OBJECTS, ids=[str(index) for index in range(len(OBJECTS))])
def test_objects(answer, options, expected):
    said, loaded = answer(lambda: train(options()))
    check(said, expected)
    assert not loaded


@pytest.mark.parametrize("data, expected", ROWS_OF_TOKENS, ids=[str(index) for index in range(len(ROWS_OF_TOKENS))])
def test_tokens(answer, data, expected):
    for options in ({"train_dataset": data()}, {"eval_dataset": data()}):
        said, loaded = answer(lambda options=options: train(options))
        split = next(iter(options)).removesuffix("_dataset")
        check(said, expected.replace("the train data", f"the {split} data"))
        assert not loaded


@pytest.mark.parametrize("options, expected", AFTER_LOADING, ids=[str(index) for index in range(len(AFTER_LOADING))])
def test_what_only_the_loaded_student_tells(answer, options, expected):
    check(answer(lambda: train(options()))[0], expected)


@pytest.mark.parametrize("command, expected", COMMANDS, ids=[command for command, _ in COMMANDS])
def test_commands(answer, monkeypatch, capsys, command, expected):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def use():
        with pytest.raises(SystemExit) as end:
            cli.main(shlex.split(command))
        assert end.value.code == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        raise UserError("\n".join(said))

    said, loaded = answer(use)
    check(said, f"error: {expected}")
    assert not loaded
