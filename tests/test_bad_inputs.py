"""
Tables of wrong uses, each with its answer: one line that names the value and the remedy.

The answer follows an arrow or, where both are long, on a line of its own; it begins as it stands here, and `...` is
any text. The run of the tables prints how many are refused before any model is loaded.
"""

import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import sys
from dataclasses import fields
from pathlib import Path  # noqa: F401  # so with all names that only the tables have
from string import Template

import datasets
import pytest
import runs
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BitsAndBytesConfig, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from hf_dskd import DSKDConfig, DSKDTrainer, cli, tokenize_dataset
from hf_dskd.data.tokens import answer_tokens
from hf_dskd.errors import UserError
from hf_dskd.training.compatibility import check_pair, check_peft


STUDENT, TEACHER = tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()
ROWS = [dict(row) for row in tiny.dataset(4)]
EMPTY = tiny.dataset(2).select([])
TOKENS = tokenize_dataset(tiny.dataset(4), STUDENT, TEACHER, max_length=256)[0]
# Of the pair the other way round, and as a user's own program may have made them.
OTHERS = tokenize_dataset(tiny.dataset(4), TEACHER, STUDENT, max_length=256)[0]
WITHOUT_CHUNKS = TOKENS.remove_columns(["chunk_ids", "teacher_chunk_ids"])
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
LONG = {"n_positions": 4096, "max_position_embeddings": 4096}
FOUR_BITS = BitsAndBytesConfig(load_in_4bit=True)
SETTINGS = {setting.name for setting in fields(DSKDConfig)} | {"output_dir"}


def on_meta():
    with torch.device("meta"):
        return GPT2LMHeadModel(tiny.gpt2().config)


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, intermediate_size=16))


def t5():
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def silent():
    """A student that doesn't say how it writes."""
    student = tiny.gpt2(400)
    student.generation_config = None
    return student


def lora(**settings):
    return LoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": ["c_attn"], **settings})


def without(role, token):
    tokenizer = {"student": tiny.byte_level_tokenizer, "teacher": tiny.sentencepiece_tokenizer}[role]()
    setattr(tokenizer, token, None)
    return tokenizer


def apart():
    """A tokenizer that has no token of the student's."""
    backend = Tokenizer(models.BPE(vocab={"</s>": 0, "ĠQQ": 1, "ĠZZ": 2}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def changed(**columns):
    """The tokens with other values in the third row."""
    return TOKENS.map(
        lambda row, index: {name: make(row) if index == 2 else row[name] for name, make in columns.items()},
        with_indices=True,
    )


def sgd():
    return torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), 1.0)


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


def uses(table):
    """Pairs of a use and the beginning of its answer."""
    found = re.findall(r"^(\S.*?)(?: -> |\n    )(.*)$", table, re.M)
    assert len(found) == len(re.findall(r"^\S", table, re.M))
    return found


# ---- Settings: types, bounds, words of other tools, combinations that mean nothing

WRONG_SETTINGS = r"""
kq_rate=-0.5 -> kq_rate=-0.5 must be at least 0: 0 switches matching off
kq_rate=float("nan") -> kq_rate=nan must be at least 0: 0 switches matching off
kd_rate=-0.1 -> kd_rate=-0.1 is outside [0, 1]: the papers use 0.5
kd_rate=1.5 -> kd_rate=1.5 is outside [0, 1]: the papers use 0.5
kd_rate=float("nan") -> kd_rate=nan is outside [0, 1]: the papers use 0.5
kd_temperature=0.0 -> kd_temperature=0.0 must be above 0: the papers use 2.0
kd_temperature=-2.0 -> kd_temperature=-2.0 must be above 0: the papers use 2.0
kd_temperature=float("nan") -> kd_temperature=nan must be above 0: the papers use 2.0
divergence="skewed_forwrd_kl"
    divergence='skewed_forwrd_kl' is unknown: did you mean 'skewed_forward_kl'? one of forward_kl
divergence="revkl" -> divergence='revkl' is unknown: did you mean 'reverse_kl'? one of forward_kl
method="dskd-cma-ga" -> method='dskd-cma-ga' is unknown: did you mean 'dskd_cma_ga'? one of sft
model_init_kwargs="sdpa" -> model_init_kwargs='sdpa' isn't a mapping: write a JSON object, such as '{"name": 1}'
teacher_model_init_kwargs="[1]"
    teacher_model_init_kwargs=[1] isn't a mapping: write a JSON object, such as '{"name": 1}'
chat_template_kwargs="{think: false}"
    chat_template_kwargs='{think: false}' isn't a mapping: write a JSON object, such as '{"name": 1}'
chat_template_kwargs={"tokenize": True} -> chat_template_kwargs has 'tokenize', which training decides: leave it out,
chat_template_kwargs='{"add_generation_prompt": false}'
    chat_template_kwargs has 'add_generation_prompt', which training decides: leave it out,
skew_lambda=1.0 -> skew_lambda=1.0 is outside (0, 1): the papers use 0.1
adaptive_kl_alpha=0.0 -> adaptive_kl_alpha=0.0 is outside (0, 1): the papers use 0.5
discriminator_steps=0 -> discriminator_steps=0 must be at least 1 (default 1)
label_smoothing_factor=0.1
    label_smoothing_factor=0.1 is not supported: leave it at 0 (distillation already softens the labels)
teacher_cache="states", as_published=True
    teacher_cache='states': as_published=True needs the states of prompts and padding too,
teacher_cache="states", on_policy_fraction=0.5
    teacher_cache='states': on_policy_fraction=0.5 makes responses that no cache can hold;
kd_rate="0.5" -> kd_rate='0.5' must be a number: the papers use 0.5
kd_rate=None -> kd_rate=None must be a number: the papers use 0.5
max_length=64.5 -> max_length=64.5 must be an integer: a prompt and a response need room
max_length="128" -> max_length='128' must be an integer: a prompt and a response need room
as_published="yes" -> as_published='yes' must be True or False (default False)
skip_long_prompts=1 -> skip_long_prompts=1 must be True or False (default False)
method=None -> method=None is unknown: one of sft
divergence=5 -> divergence=5 is unknown: one of forward_kl
prompt_column=3 -> prompt_column=3 must be a string
teacher_cache="" -> teacher_cache='' is empty: leave it out
teacher_device=0 -> teacher_device=0 must be a string: such as 'cuda:1'
learning_rate="fast" -> learning_rate='fast' must be a number (default 5e-05)
bf16="no" -> bf16='no' must be True or False
lr_scheduler_kwargs="foo" -> lr_scheduler_kwargs='foo' isn't a mapping: write a JSON object, such as '{"name": 1}'
gradient_checkpointing_kwargs="[1]"
    gradient_checkpointing_kwargs=[1] isn't a mapping: write a JSON object, such as '{"name": 1}'
kd_temperature=float("inf") -> kd_temperature=inf must be a finite number: the papers use 2.0
student_temperature=float("inf") -> student_temperature=inf must be a finite number: the papers use 2.0
loss_memory_mb=float("nan") -> loss_memory_mb=nan must be above 0 (default 512.0)
discriminator_learning_rate=float("nan") -> discriminator_learning_rate=nan must be at least 0 (default 0.0001)
attention_layers="first" -> attention_layers='first' is none of 'last', 'uniform' and pairs of layers,
on_nonfinite="ignore" -> on_nonfinite='ignore' is unknown: one of stop, skip
learning_rate=-1.0 -> learning_rate=-1.0 must be at least 0 (default 5e-05)
max_grad_norm=-1.0 -> max_grad_norm=-1.0 must be at least 0: 0 clips nothing
dataloader_prefetch_factor=2 -> --dataloader_prefetch_factor can only be set when data is loaded in a different
logging_steps=2.5 -> --logging_steps must be an integer if bigger than 1: 2.5
eval_strategy="steps", eval_steps=0 -> eval_steps=0 must be above 0: eval_strategy='no' evaluates never
optim="adamw_tourch" -> optim='adamw_tourch' is unknown: did you mean 'adamw_torch'? one of
eval_strategy="step" -> eval_strategy='step' is unknown: did you mean 'steps'? one of no, steps, epoch
save_strategy=5 -> save_strategy=5 is unknown: one of no, steps, epoch, best
bf16=True, fp16=True -> At most one of fp16 and bf16 can be True, but not both
load_best_model_at_end=True
    load_best_model_at_end=True needs evaluations to choose by: set eval_strategy as save_strategy
load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", eval_steps=3, save_steps=4
    --load_best_model_at_end requires the saving steps to be a round multiple of the evaluation steps,
lr_scheduler_type="reduce_lr_on_plateau" -> lr_scheduler_type reduce_lr_on_plateau requires an eval strategy
debug="everything" -> everything is not a valid DebugOption
kd_temprature=1.0 -> DSKDConfig: kd_temprature is no setting: did you mean kd_temperature?
no_such_thing=1 -> DSKDConfig: no_such_thing is no setting: leave it out
beta=0.5 -> DSKDConfig: beta is no setting: the generalized Jensen-Shannon divergence is divergence='js' with th
temperature=0.9 -> DSKDConfig: temperature is no setting: kd_temperature divides the logits in the divergences;
use_vllm=True -> DSKDConfig: use_vllm is no setting: the student answers with transformers' own generate: leave it out
vllm_mode="colocate"
    DSKDConfig: vllm_mode is no setting: the student answers with transformers' own generate: leave it out
max_seq_length=64, max_length=64
    DSKDConfig: max_seq_length is max_length here, and both are given: leave one of them out
method="sft", alignment="identity" -> alignment='identity' means nothing for method='sft': it needs one of dskd
method="seq_kd", spaces="student" -> spaces='student' means nothing for method='seq_kd': it needs one of dskd
method="kd", matching="none" -> matching='none' means nothing for method='kd': it needs one of dskd
method="uld", teacher_value="state" -> teacher_value='state' means nothing for method='uld': it needs one of dskd
method="min_edit", t2s_label="response" -> t2s_label='response' means nothing for method='min_edit': it needs one of
method="alm", projector_init="random" -> projector_init='random' means nothing for method='alm': it needs one of dskd
method="dskd_cma", alignment="exact_token" -> alignment='exact_token' is unknown: did you mean 'exact_tokens'?
method="dskd_cma", alignment="chunks" -> alignment='chunks' is unknown
method="dskd_cma", spaces="logits" -> spaces='logits' is unknown: one of both, student, teacher
method="dskd_cma", matching="mmmd" -> matching='mmmd' is unknown: did you mean 'mmd'?
alignment="chunk_mean" -> matching='gan' needs queries and keys, which alignment='chunk_mean'
alignment="exact_tokens" -> matching='gan' needs queries and keys, which alignment='exact_tokens'
alignment="identity" -> matching='gan' needs queries and keys, which alignment='identity'
method="dskd_clp", matching="mmd" -> matching='mmd' needs queries and keys, which alignment='chunk_mean'
method="dskd_cma", t2s_label="teacher" -> t2s_label='teacher' needs one teacher token per student token
method="dskd_cla", t2s_label="teacher" -> ...alignment='chunk_attention' doesn't give: set alignment to exact
method="dskd_clp", t2s_label="teacher" -> ...alignment='chunk_mean' doesn't give
method="dskd_eta", alignment="chunk_mean" -> ...alignment='chunk_mean' doesn't give
method="seq_kd", as_published=True -> ...method='seq_kd' isn't in the released code, which has sft, kd
method="dskd_eta", as_published=True -> ...method='dskd_eta' isn't in the released code, which has sft, kd
method="min_edit", as_published=True -> ...method='min_edit' isn't in the released code, which has sft, kd
method="alm", as_published=True -> ...method='alm' isn't in the released code, which has sft, kd
as_published=True, alignment="cross_model_attention" -> as_published=True: the released code has no alignment;
as_published=True, spaces="student" -> as_published=True: the released code has no spaces;
as_published=True, matching="none" -> as_published=True: the released code has no matching;
as_published=True, teacher_value="state" -> as_published=True: the released code has no teacher_value;
as_published=True, t2s_label="response" -> as_published=True: the released code has no t2s_label;
as_published=True, projector_init="random" -> as_published=True: the released code has no projector_init;
as_published=True, on_policy_fraction=0.5 -> as_published=True: the released code has no on_policy_fraction;
as_published=True, student_temperature=1.0 -> as_published=True: the released code has no student_temperature;
as_published=True, adversarial_loss="non_saturating" -> as_published=True: the released code has no adversarial_loss;
as_published=True, attention_kd_rate=1.0 -> as_published=True: the released code has no attention_kd_rate;
method="sft", on_policy_fraction=0.5 -> on_policy_fraction=0.5: method='sft' would learn
method="seq_kd", on_policy_fraction=1.0 -> on_policy_fraction=1.0: method='seq_kd' would learn
method="alm", alm_bias_threshold=1.0 -> alm_bias_threshold=1.0 is outside (0, 1): the paper has
method="alm", alm_divergence="symmetric_kl" -> alm_divergence='symmetric_kl' is unknown:
final_kd_temperature=0.0, temperature_schedule="linear" -> final_kd_temperature=0.0 must be above 0
temperature_schedule="linear" -> temperature_schedule='linear' and final_kd_temperature=None belong together
temperature_schedule="cosine" -> temperature_schedule='cosine' and final_kd_temperature=None belong together
final_kd_temperature=1.0 -> temperature_schedule='constant' and final_kd_temperature=1.0 belong together
temperature_schedule="cosin" -> temperature_schedule='cosin' is unknown: did you mean 'cosine'?
method="bpm", kd_temperature=1.0
    kd_temperature=1.0 means nothing for method='bpm', whose models have temperatures of their own: set teacher_t
temperature_scaling="tau" -> temperature_scaling='tau' is unknown: did you mean 'tau_squared'?
student_space_divergence="revers_kl" -> student_space_divergence='revers_kl' is unknown: did you mean 'reverse
teacher_space_divergence="jss" -> teacher_space_divergence='jss' is unknown: did you mean 'js'?
discriminator_lr_scheduler_type="reduce_lr_on_plateau" -> discriminator_lr_scheduler_type='reduce_lr_on_plateau' is
discriminator_lr_scheduler_type="cosine_with_min_lr" -> discriminator_lr_scheduler_type='cosine_with_min_lr' is
discriminator_lr_scheduler_type="warmup_stable_decay" -> discriminator_lr_scheduler_type='warmup_stable_decay' is
optim="galore_adamw_layerwise" -> optim='galore_adamw_layerwise' updates
optim="lomo" -> optim='lomo' updates...leave the projectors of method='dskd_cma_ga' as they are
fsdp="full_shard" -> ...FSDP...accelerate launch --multi_gpu
deepspeed="zero2.json" -> ...DEEPSPEED...accelerate launch --multi_gpu
"""

# ---- What a trainer is given: its arguments and settings, in one

OBJECTS = r"""
args=transformers.TrainingArguments("out", use_cpu=True)
    args is a TrainingArguments, which isn't a DSKDConfig: write DSKDConfig(...) with the same settings
args={"output_dir": "out"} -> args is a dict, which isn't a DSKDConfig: write DSKDConfig(**args)
args="out" -> args is a str, which isn't a DSKDConfig: write DSKDConfig('out'), if that is the output folder
args=DSKDConfig -> args is the class DSKDConfig, which isn't a DSKDConfig: write DSKDConfig(...) with the same settings
model=5 -> model is an int: pass a name, a folder, or a model of AutoModelForCausalLM.from_pretrained(...)
model="" -> model='' is empty: name a model or a folder
model=GPT2LMHeadModel -> model is the class GPT2LMHeadModel: pass a name, a folder,
model=torch.nn.Linear(2, 2)
    model is a Linear: pass a name, a folder, or a model of AutoModelForCausalLM.from_pretrained(...)
model=torch.nn.DataParallel(tiny.gpt2()) -> model is a DataParallel around a GPT2LMHeadModel: pass the model itself
model=on_meta() -> model is on the meta device, without weights: load it with from_pretrained, or name it
teacher_model=["teacher"]
    teacher_model is a list: pass a name, a folder, or a model of AutoModelForCausalLM.from_pretrained(...)
teacher_model=5
    teacher_model is an int: pass a name, a folder, or a model of AutoModelForCausalLM.from_pretrained(...)
processing_class="student" -> processing_class='student' is a name: pass AutoTokenizer.from_pretrained('student')
processing_class=Path("student") -> processing_class='student' is a name: pass AutoTokenizer.from_pretrained('student')
processing_class=5 -> processing_class is an int, which is no tokenizer of transformers:
processing_class=STUDENT.backend_tokenizer -> processing_class is a Tokenizer, which is no tokenizer of transformers:
teacher_processing_class=transformers.AutoTokenizer
    teacher_processing_class is the class AutoTokenizer, which is no tokenizer of transformers:
processing_class=TEACHER, teacher_processing_class=STUDENT
    processing_class gives only 0 of 400 tokens the id that the tokenizer saved with 'student' gives the
processing_class=TEACHER
    processing_class gives only 0 of 400 tokens the id that the tokenizer saved with 'student' gives the
model=tiny.gpt2(450), teacher_model=tiny.qwen2(450), processing_class=TEACHER, teacher_processing_class=STUDENT
    processing_class is the tokenizer of the teacher's model,
train_dataset="databricks/dolly"
    train_dataset='databricks/dolly' is a name: pass datasets.load_dataset('databricks/dolly', split='train')
train_dataset=Path("rows.jsonl")
    train_dataset='rows.jsonl' is a name: pass datasets.load_dataset('json', data_files='rows.jsonl',
train_dataset=datasets.DatasetDict(train=tiny.dataset(2), test=tiny.dataset(2))
    train_dataset is a DatasetDict of the splits train, test: pass one of them
train_dataset={"prompt": ["a"], "completion": ["b"]}
    train_dataset is a dict: pass datasets.Dataset.from_dict(...), or a list of rows
train_dataset=[] -> train_dataset has no rows: pass at least one
train_dataset=["a", "b"]
    train_dataset: row 0 is a str, not a mapping: write rows as {'prompt': ..., 'completion': ...}
train_dataset=[{"prompt": "a", "completion": "b"}, "c"]
    train_dataset: row 1 is a str, not a mapping: write rows as {'prompt': ..., 'completion': ...}
train_dataset=iter(ROWS) -> train_dataset is a list_iterator: pass a datasets.Dataset, or a list of rows
train_dataset=[{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 5}]
    train_dataset is no table (Expected bytes, got a 'int' object): give a column values of one kind
train_dataset=datasets.Dataset -> train_dataset is the class Dataset: pass a datasets.Dataset, or a list of rows
train_dataset=5 -> train_dataset is an int: pass a datasets.Dataset, or a list of rows
eval_dataset="test" -> eval_dataset='test' is a name: pass datasets.load_dataset('test', split='train')
eval_dataset={"prompt": ["a"], "completion": ["b"]}
    eval_dataset['prompt']: row 0 is a str, not a mapping: write rows as {'prompt': ..., 'completion': ...}
peft_config={"r": 4} -> peft_config is a dict: write peft_config=LoraConfig(**peft_config)
peft_config=LoraConfig -> peft_config is the class LoraConfig: write peft_config=LoraConfig(...)
quantization_config={"load_in_4bit": True}
    quantization_config is a dict: write quantization_config=BitsAndBytesConfig(**quantization_config)
teacher_quantization_config="nf4"
    teacher_quantization_config is a str: write teacher_quantization_config=BitsAndBytesConfig(...)
optimizers=None -> optimizers is None: pass the two (optimizer, None)
optimizers=(None,) -> optimizers is a tuple of 1: pass the two (optimizer, None)
optimizers=(torch.optim.SGD, None)
    optimizers has the class SGD as its first: make a torch.optim.Optimizer, or set optim
optimizers=(None, "cosine") -> optimizers has a str as its second: make a schedule, or set lr_scheduler_type
optimizers=(sgd(), None) -> optimizers=(SGD, ...): the student 'student' is loaded by its name,
compute_metrics="rouge" -> compute_metrics='rouge' is a str: pass a function
preprocess_logits_for_metrics=5 -> preprocess_logits_for_metrics=5 is an int: pass a function
callbacks=transformers.EarlyStoppingCallback() -> callbacks is an EarlyStoppingCallback: pass a list of them
callbacks=[print] -> callbacks has a builtin_function_or_method, which is no TrainerCallback: derive it from that
callbacks=["early"] -> callbacks has a str, which is no TrainerCallback: derive it from that
data_collator=5 -> data_collator=5 is an int: pass a function
data_collator=transformers.default_data_collator -> data_collator=default_data_collator can't batch tokenized rows (
data_collator=transformers.DataCollatorForLanguageModeling(STUDENT, mlm=False)
    data_collator=DataCollatorForLanguageModeling can't batch tokenized rows (
data_collator=lambda rows: {"input_ids": torch.ones(2, 2)}
    data_collator=<lambda> makes batches without attention_mask, labels, teacher_input_ids,
tokenizer=STUDENT, processing_class=STUDENT
    DSKDTrainer: tokenizer is processing_class here, and both are given: leave one of them out
teacher="teacher" -> DSKDTrainer: teacher is teacher_model here, and both are given: leave one of them out
formatting_func=str -> DSKDTrainer: formatting_func is no setting: map the dataset to columns prompt and completion,
ref_model="teacher" -> DSKDTrainer: ref_model is no setting: the teacher is teacher_model
model_init=tiny.gpt2
    DSKDTrainer: model_init is no setting: name the model, which is loaded anew for every trial of a search
dataset_text_field="text" -> DSKDTrainer: dataset_text_field is no setting: rows have a prompt and a response:
packing=True -> DSKDTrainer: packing is no setting: sequences hold one example each;
train_datasets=None -> DSKDTrainer: train_datasets is no setting: did you mean train_dataset?
compute_loss_func=print -> DSKDTrainer: compute_loss_func is no setting: method and divergence say what the loss is;
eval_strategy="steps"
    eval_strategy='steps' but eval_dataset=None: pass the examples to evaluate on, or leave eval_strategy out
eval_on_start=True
    eval_on_start=True but eval_dataset=None: pass the examples to evaluate on, or leave eval_on_start out
report_to="tensorbord" -> report_to='tensorbord' is unknown: did you mean 'tensorboard'? one of
**BEST, metric_for_best_model="blue", eval_dataset=ROWS
    metric_for_best_model='blue' is unknown: one of bits_per_byte
**BEST, metric_for_best_model="rouge_l", eval_dataset=ROWS
    metric_for_best_model='rouge_l' is of answers, and there are none: set eval_generation_samples
model_init_kwargs={"dtype": "float99"}
    model_init_kwargs has dtype='float99': name one of float32, bfloat16, float16 or auto
model_init_kwargs={"load_in_4bit": True}
    model_init_kwargs has 'load_in_4bit'; write quantization_config={'quant_method': 'bitsandbytes',
model_init_kwargs={"no_such_option": 1} -> the student's init kwargs have 'no_such_option',
train_dataset=TOKENS, max_length=32 -> the train data is tokenized, and its row 0 has 43 tokens in input_ids,
max_steps=0 -> max_steps=0 takes no step: set it to 1 or more, or to -1 for num_train_epochs;
dataloader_drop_last=True, per_device_train_batch_size=64
    dataloader_drop_last=True drops all of 4 examples, fewer than per_device_train_batch_size=64:
teacher_cache="student" -> teacher_cache='student' isn't a teacher cache, it holds config.json, generation_config.json,
teacher_device="gpu" -> teacher_device='gpu' is no device of this machine:
lr_scheduler_type="cosine_with_min_lr" -> lr_scheduler_type='cosine_with_min_lr':
lr_scheduler_kwargs={"foo": 1} -> lr_scheduler_type='linear' with lr_scheduler_kwargs={'foo': 1}:
optim="adamw_torch", optim_args="foo=1"
    optim='adamw_torch' with optim_args='foo=1': 'foo' has no effect on it, leave it out
optim="adamw_torch", optim_args="foo" -> optim='adamw_torch' with optim_args='foo':
gradient_checkpointing_kwargs={"foo": 1} -> gradient_checkpointing_kwargs has 'foo' is unknown: one of
include_for_metrics=["losses"] -> include_for_metrics has 'losses' is unknown: did you mean 'loss'? one of inputs, loss
torch_compile_backend="inductr" -> torch_compile_backend='inductr' is unknown: did you mean 'inductor'? one of
teacher_model=None, method="dskd_cma" -> method='dskd_cma' needs teacher_model...'sft'
teacher_model=None, method="seq_kd" -> method='seq_kd' needs teacher_model...'sft'
teacher_model="student" -> teacher_model is the student itself ('student'): name a larger model
teacher_model="student/" -> teacher_model is the student itself ('student'): name a larger model
teacher_model="./bert/../student" -> teacher_model is the student itself ('student'): name a larger model
teacher_model=os.path.abspath("student") -> teacher_model is the student itself ('student'): name a larger model
teacher_model="link" -> teacher_model is the student itself ('student'): name a larger model
model="some/model", teacher_model="some/model" -> teacher_model is the student itself ('some/model'): name a larger
teacher_model="long_teacher", max_length=1025 -> max_length=1025...the student 'student'...1024...set max_length=1024
model="long_student", max_length=1025 -> max_length=1025...the teacher 'teacher'...1024 positions...set max_length=1024
teacher_model="long_teacher", max_length=1024, as_published=True -> max_length=1024...set max_length=1023
model="long_student", max_length=1024, as_published=True -> max_length=1024...set max_length=1023
model=tiny.gpt2(), max_length=2048 -> max_length=2048...'gpt2'...1024 positions
model="small_student" -> the student's tokenizer...400 tokens...399 rows...resize_token_embeddings
teacher_model="small_teacher" -> the teacher's tokenizer...450 tokens...449 rows...resize_token_embeddings
model=tiny.gpt2(399), processing_class=STUDENT -> the student's tokenizer...400...399 rows...resize_token_embeddings
teacher_model=tiny.qwen2(449), teacher_processing_class=TEACHER -> the teacher's tokenizer...450...449 rows...resize
method="kd" -> method='kd'...'student' and 'teacher' differ...such as uld, min_edit or alm
method="dskd" -> method='dskd'...'student' and 'teacher' differ...such as dskd_cma
method="dskd", t2s_label="teacher" -> method='dskd'...'student' and 'teacher' differ...such as dskd_cma
method="dskd_cma", alignment="identity" -> alignment='identity'...differ...such as cross_model_attention
**APART, method="dskd_eta" -> ...'the teacher' share no token...such as alm
**APART, method="min_edit" -> ...'the teacher' share no token...such as alm
**APART, method="dskd_cma", projector_init="pseudo_inverse" -> ...'the teacher' share no token...such as alm
**APART, method="dskd_cma", alignment="exact_tokens" -> ...'the teacher' share no token...such as alm
train_dataset=EMPTY -> ...train data...no rows...at least one
eval_dataset={"held_out": EMPTY} -> ...eval_held_out data...no rows...at least one
prompt_column="question" -> ...'question'...'prompt', 'completion'...set prompt_column
response_column="answer" -> ...'answer'...'prompt', 'completion'...set response_column
train_dataset=[{"text": "a", "label": "b"}] -> ...'text', 'label'...set prompt_column
train_dataset=[{"prompt": "a", "label": "b"}] -> ...'completion'...'prompt', 'label'
train_dataset=[{"prompt": "a", "completion": ""}] * 2 -> ...2 have an empty response...check
train_dataset=[{"prompt": "moon " * 100, "completion": "yes"}], max_length=64
    ...row 0...max_length=64...raise max_length or set skip_long_prompts=True
train_dataset=WITHOUT_CHUNKS, method="dskd_clp"
    method='dskd_clp'...the train data...no column chunk_ids...pass the text...hf_dskd.tokenize_dataset
train_dataset=WITHOUT_CHUNKS, method="dskd_cla" -> ...the train data...no column chunk_ids
train_dataset=WITHOUT_CHUNKS, method="dskd_eta" -> ...the train data...no column chunk_ids
train_dataset=WITHOUT_CHUNKS, method="dskd_cma", alignment="chunk_mean" -> ...the train data...no column chunk_ids
eval_dataset=WITHOUT_CHUNKS, method="alm" -> method='alm'...the eval data...no column chunk_ids
eval_dataset={"held_out": WITHOUT_CHUNKS}, method="alm" -> ...the eval_held_out data...no column chunk_ids
train_dataset=TOKENS, method="seq_kd" -> method='seq_kd'...already tokenized...pass the text
model=silent(), processing_class=STUDENT, on_policy_fraction=0.5
    generation_config of the student is None...set model.generation_config = GenerationConfig(
peft_config=lora(target_modules=["c_attn", "lm_head"]) -> peft_config.target_modules=...covers 'lm_head'...leave it out
peft_config=lora(target_modules=["wte"]) -> peft_config.target_modules=...covers 'transformer.wte'
peft_config=lora(target_modules=["transformer.wte"]) -> peft_config.target_modules=...covers 'transformer.wte'
peft_config=lora(target_modules=r".*(c_attn|lm_head)") -> peft_config.target_modules=...covers 'lm_head'
peft_config=lora(target_modules=r".*\.(c_attn|wte)") -> peft_config.target_modules=...covers 'transformer.wte'
peft_config=lora(modules_to_save=["lm_head"]) -> peft_config.modules_to_save=...covers 'lm_head'
peft_config=lora(modules_to_save=["head"]) -> peft_config.modules_to_save=...covers 'lm_head'
peft_config=lora(modules_to_save=["wte"]) -> peft_config.modules_to_save=...covers 'transformer.wte'
peft_config=lora(target_parameters=["lm_head.weight"]) -> peft_config.target_parameters=...covers 'lm_head'
peft_config=lora(target_modules=["q_proj", "v_proj"])
    peft_config.target_modules=['q_proj', 'v_proj'] names no module...c_attn, c_fc, c_proj, or set 'all-linear'
model=get_peft_model(tiny.gpt2(400), lora(target_modules=["c_attn", "lm_head"])), processing_class=STUDENT
    peft_config.target_modules=...covers 'lm_head'
peft_config=lora(), quantization_config=FOUR_BITS -> ...a 4-bit student can't be trained on a CPU
quantization_config=BitsAndBytesConfig(load_in_8bit=True) -> ...load_in_8bit=True needs an adapter to train
teacher_model=tiny.qwen2(), load_teacher_in_4bit=True
    load_teacher_in_4bit=True needs...as a name...a loaded model can't be quantized
teacher_model=tiny.qwen2(), teacher_quantization_config=FOUR_BITS
    teacher_quantization_config needs its model as a name: a loaded model can't be quantized
model=tiny.gpt2(), quantization_config=FOUR_BITS
    quantization_config needs its model as a name: a loaded model can't be quantized
load_teacher_in_4bit=True, teacher_quantization_config=FOUR_BITS -> load_teacher...only one
output_dir="notes.txt" -> output_dir='notes.txt' is not writable...choose another folder
output_dir="notes.txt/far/below" -> output_dir='notes.txt/far/below' is not writable...choose another folder
"""

# ---- The same of student and teacher

OF_EITHER_MODEL = r"""
$model="no-such-organization/no-such-model"
    the $role 'no-such-organization/no-such-model'...check the path or the name...login...HF_HUB_OFFLINE
$model="missing/folder/here" -> the $role 'missing/folder/here'...check the path or the name...login...HF_HUB_OFFLINE
$model="void" -> the $role 'void'...check the path or the name...login...HF_HUB_OFFLINE
$model="untokenized_$role" -> the $role's tokenizer 'untokenized_$role'...no tokenizer_config.json...pass $tokenizer
$model="t5" -> the $role 't5' is a sequence-to-sequence model (T5ForConditionalGeneration)...needs a causal
$model="bert" -> the $role 'bert' is a masked language model (BertForMaskedLM)...needs a causal
$model="vit" -> the $role 'vit' is of a kind without causal language models (vit)...needs a causal
$model=t5() -> ...T5ForConditionalGeneration...causal
$model=bert() -> ...BertForMaskedLM...causal
$model=transformers.GPT2Model(tiny.gpt2().config) -> ...GPT2Model...causal
$tokenizer=without("$role", "eos_token") -> the $role's tokenizer...no EOS token...set tokenizer.eos_token
"""

# ---- Rows that were tokenized elsewhere

ROWS_OF_TOKENS = r"""
changed(input_ids=lambda row: [9999, *row["input_ids"][1:]])
    the train data is tokenized, and its row 2 has the token 9999 in input_ids,
changed(input_ids=lambda row: [-1, *row["input_ids"][1:]])
    the train data is tokenized, and its row 2 has the token -1 in input_ids,
changed(teacher_input_ids=lambda row: [*row["teacher_input_ids"][:-1], 450])
    the train data is tokenized, and its row 2 has the token 450 in teacher_input_ids,
changed(input_ids=lambda row: []) -> the train data is tokenized, and its row 2 has prompt_length=22 of 0 tokens,
changed(prompt_length=lambda row: 999) -> the train data is tokenized, and its row 2 has prompt_length=999 of 28 tokens
changed(prompt_length=lambda row: len(row["input_ids"]))
    the train data is tokenized, and its row 2 has prompt_length=28 of 28 tokens,
changed(prompt_length=lambda row: 0)
    the train data is tokenized, and its row 2 has prompt_length=0, and spans begin at 22:
changed(teacher_prompt_length=lambda row: -3)
    the train data is tokenized, and its row 2 has teacher_prompt_length=-3 of 71 tokens,
changed(chunk_ids=lambda row: row["chunk_ids"][:-1])
    the train data is tokenized, and its row 2 has 5 numbers in chunk_ids for 6 response tokens:
changed(teacher_byte_ends=lambda row: [])
    the train data is tokenized, and its row 2 has 0 numbers in teacher_byte_ends for 53 response tokens
changed(spans=lambda row: row["spans"][:1])
    the train data is tokenized, and its row 2 has 1 numbers in spans, which come in pairs:
changed(spans=lambda row: [row["spans"][0], 999])
    the train data is tokenized, and its row 2 has spans that lie outside of its tokens or overlap:
changed(spans=lambda row: [row["spans"][0]] * 2)
    the train data is tokenized, and its row 2 has no response token in spans:
TOKENS.remove_columns(["spans"]).map(lambda row: {"prompt_length": len(row["input_ids"])})
    the train data is tokenized, and its row 0 has prompt_length=43 of 43 tokens,
TOKENS.remove_columns(["byte_ends"]) -> the train data is tokenized, without the columns byte_ends:
TOKENS.remove_columns([name for name in TOKENS.column_names if name.startswith("teacher_")])
    the train data is tokenized, without the columns teacher_input_ids, teacher_prompt_length,
TOKENS.map(lambda row: {"input_ids": ["a"]}, remove_columns=["input_ids"])
    the column input_ids of the tokenized data is of type list<item: string>, not lists of integers:
TOKENS.remove_columns(["prompt_length"]).add_column("prompt_length", [0.5] * 4)
    the column prompt_length of the tokenized data is of type double, not integer:
OTHERS -> the train data is tokenized, and its row 0 has the token 448 in input_ids,
TOKENS.map(lambda row: {f"teacher_{name}": row[name] for name in row if f"teacher_{name}" in row})
    the train data is tokenized, and the response of its row 0 is 'Zwölf Boxkämpfer jagen Viktor quer üb
TOKENS.select([]) -> the train data has no rows: pass at least one
changed(input_ids=lambda row: [9999, *row["input_ids"][1:]]).shuffle(seed=0)
    the train data is tokenized, and its row 0 has the token 9999 in input_ids,
"""

# ---- Command line, configuration files, files

COMMANDS = r"""
trian -> command 'trian' is unknown: did you mean 'train'? one of train
kl -> command 'kl' is unknown: one of train
--verbose -> command '--verbose' is unknown: one of train
train --config nothere.yaml -> --config 'nothere.yaml' isn't a file: name a YAML file
train --config broken.yaml -> --config 'broken.yaml' isn't valid YAML:
train --config list.yaml -> --config 'list.yaml' holds no settings: write one `name: value` a line
train --config empty.yaml -> --config 'empty.yaml' holds no settings: write one `name: value` a line
train --config unknown.yaml -> 'unknown.yaml': methd is no setting: did you mean method?
train --config words.yaml
    'words.yaml': assistant_only_loss is no setting: responses alone are learnt, prompts never: leave it out
train --config types.yaml -> max_length=64.5 must be an integer: a prompt and a response need room
train --config bounds.yaml -> kd_temperature=0 must be above 0: the papers use 2.0
train --config twice.yaml -> 'twice.yaml': max_seq_length is max_length here, and both are given: leave one of them out
train run.yaml -> 'run.yaml' belongs to no setting: name a configuration file with --config, a value with --NAME
train --output_dir out -> dataset_name is not set: name a dataset on the hub, a folder,
train --output_dir out --methd alm -> --methd is no setting: did you mean --method?
train --output_dir out --no-such-thing 1 -> --no-such-thing is no setting: --help lists the settings
train --output_dir out --max_steps many -> argument --max_steps/--max-steps: invalid int value: 'many'
train --output_dir out --divergence kl_forward
    divergence='kl_forward' is unknown: did you mean 'forward_kl'? one of forward_kl
train --output_dir out --kd_rate 2 -> kd_rate=2.0 is outside [0, 1]: the papers use 0.5
train --output_dir out --beta 0.5
    --beta is no setting: the generalized Jensen-Shannon divergence is divergence='js' with this as js_w
train --output_dir out --packing -> --packing is no setting: sequences hold one example each;
train --output_dir out --tokenizer student -> --tokenizer is no setting: each model's own tokenizer is taken;
train --output_dir out --max_seq_length 64 --max_length 64
    --max_seq_length is --max_length here, and both are given: leave one of them out
train --output_dir out --train_size 0 -> train_size=0 must be at least 1
train --output_dir out --held_out_size -1 -> held_out_size=-1 must be at least 0 (default 0)
train --output_dir out --sft_teacher_epochs 0 -> sft_teacher_epochs=0.0 must be above 0 (default 3.0)
train --output_dir out --total_batch_size 0 -> total_batch_size=0 must be at least 1
train --output_dir out --lora_r 8 -> lora_r=8 without use_peft: all of the student would be trained; add --use_peft
train --output_dir out --dataset_name nothere.jsonl -> dataset 'nothere.jsonl': there is no such file; check the path
train --output_dir out --dataset_name notes.txt
    dataset 'notes.txt' can't be read: the formats are .jsonl, .ndjson, .json, .csv, .tsv, .parquet,
train --output_dir out --dataset_name half.jsonl
    'half.jsonl', line 2 isn't JSON (Unterminated string starting at: line 1 column 17 (char 16)):
train --output_dir out --dataset_name rows.jsonl --dataset_train_split training
    dataset_train_split='training' isn't there: the splits are train
train --output_dir out --dataset_name rows.jsonl --rename_columns question=prompt
    rename_columns='question=prompt': write old=new,old=new with columns out of prompt, completion
train --output_dir out --dataset_name rows.jsonl -> model=None: name the student, or pass a causal language model
train --output_dir out --dataset_name rows.jsonl --train_size 99 -> train_size=99: there are 4 examples to train on
train --output_dir out --dataset_name rows.jsonl --model_name_or_path student
    method='dskd_cma_ga' needs teacher_model (a name or a model); method='sft' trains without one
train --output_dir out --dataset_name rows.jsonl --model_name_or_path student --teacher student
    teacher_model is the student itself ('student'): name a larger model
train --output_dir out --dataset_name rows.jsonl --teacher_model_name_or_path teacher
    model=None: name the student, or pass a causal language model
train --output_dir out --dataset_name rows.jsonl --model student --teacher teacher --eval_strategy steps
    eval_strategy='steps' but there is nothing to evaluate on: set held_out_size
train --output_dir finished --dataset_name rows.jsonl -> output_dir='finished' holds another run (result.json):
train --output_dir rows.jsonl/below --dataset_name rows.jsonl --model_name_or_path student --teacher teacher
    output_dir='rows.jsonl/below' is not writable (Not a directory): choose another folder
cache-teacher --output_dir out --method sft
    method='sft' runs no teacher while it trains: name a method that does, such as dskd_cma
compare --methods sft -> --output_dir is not set: name a folder for the cells and the table
compare --methods sft,sft --config run.yaml --output_dir out -> --methods has 'sft' twice: name it once
compare --methods sft,dskd_cmaa --config run.yaml --output_dir out
    method 'dskd_cmaa' is unknown: did you mean 'dskd_cma'? one of sft
compare --methods sft --seeds one --config run.yaml --output_dir out
    --seeds has 'one': give whole numbers with commas between, such as 0,1,2
methods sft -> hf-dskd methods takes no 'sft': it lists them all
analyse nothere -> 'nothere' isn't a folder: name the output folder of a run, or a checkpoint in it
analyse student -> 'student' has no settings.yaml: name the run's configuration file with --config
analyse out --examples 0 -> --examples 0 must be at least 1
completion powershell -> shell 'powershell' is unknown: one of bash, zsh, fish
evaluate --model student -> --output_dir is not set: name a folder for the answers and scores
report nothere -> 'nothere' isn't a folder: name the --output_dir of a run of `hf-dskd train`
push nothere me/repository -> 'nothere' isn't a folder: name the --output_dir of a run of `hf-dskd train`
train --config bytes.yaml -> --config 'bytes.yaml' isn't valid YAML:
train --config number.yaml -> 'number.yaml': 5 is no setting: --help lists the settings
train --config environment.yaml -> `env` field should be a dict in the YAML file.
train --config nothing.yaml -> max_steps=None must be an integer (default -1)
train --config switch.yaml -> max_steps=True must be an integer (default -1)
train --output_dir -> argument --output_dir/--output-dir: expected one argument
train --output_dir "" --dataset_name rows.jsonl -> output_dir='' is empty: leave it out
train --output_dir out --dataset_name "" -> dataset_name is not set:
train --config sft.yaml --use_peft --lora_task_type FOO -> the adapter's settings: Invalid task type: 'FOO'
train --config sft.yaml --report_to notebook -> report_to='notebook' is unknown:
train --config sft.yaml --held_out_size 4
    held_out_size=4 leaves nothing of 4 examples to train on: set it to less, such as 1
train --config sft.yaml --dataset_streaming -> dataset_streaming=True: max_steps=-1 says when to stop
cache-teacher --config sft.yaml --method dskd_cma --teacher teacher --teacher_cache student
    teacher_cache='student' isn't a teacher cache, it holds config.json,
compare --methods sft --config run.yaml --output_dir out --variants labels.yaml -> labels.yaml: x must say its method
compare --methods sft --config run.yaml --output_dir out --seed 5 -> --seed is different in every cell:
evaluate --model student --sets a=nothere.jsonl --output_dir out -> a=nothere.jsonl isn't a file:
evaluate --model student --sets a=rows.jsonl --output_dir out --seeds x -> --seeds has 'x':
evaluate --model student --sets a=rows.jsonl --output_dir out --limit 0 -> --limit 0 is less than 1:
evaluate --model student --sets a=rows.jsonl --output_dir out --top_p 2 -> --top_p 2.0 is no share:
report broken -> 'broken/result.json' isn't valid JSON (
push broken -> REPO is not set: name the repository on the hub
analyse broken --examples x -> argument --examples: invalid int value: 'x'
"""

# ---- What only the loaded model tells

AFTER_LOADING = r"""
model=tiny.gpt2(400), processing_class=STUDENT, optimizers=(sgd(), None)
    optimizers: 2 of the optimizer's 2 parameters are none of the student's:
peft_config=LoraConfig(r=-1, target_modules="all-linear") -> peft_config doesn't fit the student:
model="bare_student" -> the student 'bare_student' can't be loaded (Error no file named...check the path
teacher_model="bare_teacher" -> the teacher 'bare_teacher' can't be loaded (Error no file named...check the path
model="cut", method="sft" -> the student 'cut' can't be loaded
"""
APART = {"teacher_model": "weights", "teacher_processing_class": apart()}
SHARED = {"teacher_model": "weights", "teacher_processing_class": STUDENT}
# As far as loading: the tables would pass on anything if these didn't.
GOOD = [
    {},
    {"teacher_model": "long_teacher", "max_length": 1024},
    {"model": "long_student", "max_length": 1023, "as_published": True},
    {**SHARED, "method": "kd"},
    {**SHARED, "method": "dskd", "t2s_label": "teacher"},
    {**SHARED, "method": "dskd_cma", "alignment": "identity"},
    {"method": "dskd_eta"},
    {"method": "min_edit"},
    {"method": "dskd_cma", "projector_init": "pseudo_inverse"},
    {"method": "dskd_cma", "alignment": "exact_tokens"},
    {"train_dataset": TOKENS, "eval_dataset": TOKENS, "method": "alm"},
    {"train_dataset": WITHOUT_CHUNKS, "eval_dataset": WITHOUT_CHUNKS, "method": "dskd_cma"},
    {"model": silent(), "processing_class": STUDENT},
    {"model": tiny.gpt2(400), "processing_class": STUDENT, "on_policy_fraction": 0.5},
]


class Loaded(Exception):
    """A model would have been loaded."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the models and files lie that the tables name."""
    folder = tmp_path_factory.mktemp("uses")
    for name, model, tokenizer in (
        ("student", tiny.gpt2(len(STUDENT)), STUDENT),
        ("teacher", tiny.qwen2(len(TEACHER)), TEACHER),
        # As if its own tokenizer had been exchanged together with its embedding.
        ("weights", tiny.qwen2(len(TEACHER)), None),
        ("narrow", tiny.qwen2(len(TEACHER), width=96), TEACHER),
        ("bert", bert(), None),
        ("t5", t5(), None),
    ):
        model.save_pretrained(folder / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / name)
    transformers.ViTConfig().save_pretrained(folder / "vit")
    for role, tokenizer in (("student", STUDENT), ("teacher", TEACHER)):
        for name, settings in {"bare": {}, "small": {"vocab_size": len(tokenizer) - 1}, "long": LONG}.items():
            place = folder / f"{name}_{role}"
            shutil.copytree(folder / role, place, ignore=shutil.ignore_patterns("*.safetensors"))
            config = json.loads((place / "config.json").read_text())
            (place / "config.json").write_text(json.dumps({**config, **settings}))
        (folder / f"untokenized_{role}").mkdir()
        shutil.copy(folder / role / "config.json", folder / f"untokenized_{role}")
    shutil.copytree(folder / "student", folder / "cut")
    os.truncate(folder / "cut" / "model.safetensors", 100)
    # transformers 4 takes an empty folder for the first kind whose name is in its path.
    (folder / "void").mkdir()
    (folder / "link").symlink_to(folder / "student")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "bytes.yaml").write_bytes(b"\xff\xfe\x00a")
    yield folder
    assert (folder / "notes.txt").read_text() == FILES["notes.txt"]


@pytest.fixture(scope="module")
def tally(request):
    """Of each use whether a model was loaded before it was refused."""
    loaded: list[bool] = []
    yield loaded
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{loaded.count(False)} of {len(loaded)} wrong uses are refused before any model is loaded")


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_DSKD_CACHE", str(folder / "cache"))


@pytest.fixture
def refused(tally, monkeypatch):
    """Runs a use, whose answer is to begin as expected, and says whether a model was loaded before it."""
    read, names = PreTrainedModel.from_pretrained.__func__, []

    def spy(cls, name, *args, **kwargs):
        names.append(name)
        return read(cls, name, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(spy))

    def run(use, expected):
        with pytest.raises(UserError) as caught:
            use()
        tally.append(bool(names))
        said = str(caught.value)
        assert len(said.splitlines()) == 1 and re.match(".*".join(map(re.escape, expected.split("..."))), said), said
        return bool(names)

    return run


@pytest.fixture
def nothing_loads(monkeypatch):
    def load(name, **options):
        raise Loaded(name)

    for module in ("hf_dskd.training.pair", "hf_dskd.teacher.load"):
        monkeypatch.setattr(f"{module}.load_causal_lm", load)


def config(**settings):
    return DSKDConfig(**{"output_dir": "out", "use_cpu": True, "max_steps": 1, "max_length": 256, **settings})


def train(**given):
    """A trainer of the saved pair, or of what is given; settings go into its configuration."""
    options = {"model": "student", "teacher_model": "teacher", "train_dataset": tiny.dataset(4), **given}
    settings = {name: options.pop(name) for name in given if name in SETTINGS}
    return DSKDTrainer(**{**({} if "args" in given else {"args": config(**settings)}), **options})


def evaluated(use):
    return eval(f"dict({use})", globals())


@pytest.mark.parametrize("use, expected", uses(WRONG_SETTINGS))
def test_settings(refused, use, expected):
    settings = evaluated(use)
    for name in settings:
        if (name in SETTINGS) == expected.startswith(f"DSKDConfig: {name} "):
            pytest.skip(f"{name} of another version of transformers")
    assert not refused(lambda: DSKDConfig("out", use_cpu=True, **settings), expected)


ROLES = [
    {"role": "student", "model": "model", "tokenizer": "processing_class"},
    {"role": "teacher", "model": "teacher_model", "tokenizer": "teacher_processing_class"},
]


@pytest.mark.parametrize(
    "use, expected", uses(OBJECTS + "".join(Template(OF_EITHER_MODEL).substitute(role) for role in ROLES))
)
def test_objects(refused, use, expected):
    assert not refused(lambda: train(**evaluated(use)), expected)


def test_a_setting_among_the_arguments(refused):
    refused(
        lambda: DSKDTrainer("student", learning_rate=1e-4),
        "DSKDTrainer: learning_rate is no setting: settings go into args=DSKDConfig(...)",
    )


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("data, expected", uses(ROWS_OF_TOKENS))
def test_tokens(refused, data, expected, split):
    rows = eval(data)
    assert not refused(
        lambda: train(**{f"{split}_dataset": rows}), expected.replace("the train data", f"the {split} data")
    )


@pytest.mark.parametrize("use, expected", uses(AFTER_LOADING))
def test_what_only_the_loaded_model_tells(refused, use, expected):
    refused(lambda: train(**evaluated(use)), expected)


@pytest.mark.parametrize("command, expected", uses(COMMANDS))
def test_commands(refused, monkeypatch, capsys, command, expected):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def use():
        with pytest.raises(SystemExit) as end:
            cli.main(shlex.split(command))
        assert end.value.code == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        raise UserError("\n".join(said))

    assert not refused(use, f"error: {expected}")


@pytest.mark.parametrize("options", GOOD, ids=str)
def test_good_input_gets_as_far_as_loading(options, nothing_loads):
    with pytest.raises(Loaded):
        train(**options)


# ---- What takes more than a line


def test_a_loaded_student_as_its_own_teacher(refused):
    model = GPT2LMHeadModel.from_pretrained("student")
    for teacher in (model, "student"):
        refused(
            lambda teacher=teacher: train(model=model, teacher_model=teacher), "teacher_model is the student itself"
        )
    adapted = get_peft_model(GPT2LMHeadModel.from_pretrained("student"), lora())
    for student in (model, "student"):
        check_pair(config(method="kd"), student, adapted)


@pytest.mark.parametrize("option, other", [("revision", "v2"), ("subfolder", "large")])
def test_teacher_is_another_model_of_the_students_name(option, other):
    check_pair(config(method="kd", teacher_model_init_kwargs={option: other}), "some/model", "some/model")
    for own, theirs in (({option: other}, {option: other}), ({"revision": "main"}, None)):
        args = config(method="kd", model_init_kwargs=own, teacher_model_init_kwargs=theirs)
        with pytest.raises(UserError, match="teacher_model is the student itself"):
            check_pair(args, "some/model", "some/model")


def test_packages_that_are_not_installed(refused, monkeypatch):
    check_pair(config(method="min_edit"), "some/student", "some/teacher")
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    remedy = "method='min_edit' needs the package rapidfuzz: pip install 'hf-dskd[min_edit]'"
    refused(lambda: check_pair(config(method="min_edit"), "some/student", "some/teacher"), remedy)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: find(name, *more) if name[:4] != "bits" else None
    )
    refused(lambda: train(load_teacher_in_4bit=True), "load_teacher_in_4bit needs...pip install bitsandbytes")


def test_four_bits_on_other_devices(refused, nothing_loads, monkeypatch):
    pytest.importorskip("bitsandbytes")
    args = config(load_teacher_in_4bit=True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    refused(lambda: train(args=args), "load_teacher_in_4bit:...MPS...leave load_teacher_in_4bit out")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    odd = "...narrow...96 x 96...multiples of 64...leave load_teacher_in_4bit out"
    refused(lambda: train(args=args, teacher_model="narrow"), odd)
    with pytest.raises(Loaded):
        train(args=args)


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role["role"])
def test_missing_pad_token_is_set_and_said(role, nothing_loads, caplog):
    tokenizer = without(role["role"], "pad_token")
    with caplog.at_level(logging.WARNING), pytest.raises(Loaded):
        train(**{role["tokenizer"]: tokenizer})
    assert tokenizer.pad_token == tokenizer.eos_token
    said = [record.getMessage() for record in caplog.records if "padding token" in record.getMessage()]
    assert len(said) == 1 and role["role"] in said[0] and repr(tokenizer.eos_token) in said[0]


def test_rows_that_are_skipped_are_counted(nothing_loads, tmp_path):
    empty = [{"prompt": "a", "completion": text} for text in ("", "  \n", "yes")]
    run = runs.trainer(tmp_path, train_dataset=datasets.Dataset.from_list(empty))
    report = run.tokenization_reports["train"]
    assert (report.rows, report.kept, report.empty_responses) == (3, 1, 2)
    assert run.train_dataset["example_id"] == [2]
    long = datasets.Dataset.from_list([{"prompt": "a" * n, "completion": "yes"} for n in (1, 500)])
    report = runs.trainer(tmp_path, train_dataset=long, max_length=64, skip_long_prompts=True).tokenization_reports
    assert (report["train"].rows, report["train"].kept, report["train"].long_prompts) == (2, 1, 1)


def test_what_is_asked_for_later(refused, tmp_path):
    run = runs.trainer(tmp_path, method="alm", train_dataset=None)
    refused(run.train, "train_dataset=None...pass the examples")
    refused(lambda: run.evaluate(WITHOUT_CHUNKS), "...the eval data...no column chunk_ids")


def test_spans_that_do_not_cover_a_response(monkeypatch):
    """Nothing that a user can mend: a mistake in the library, which names the example."""

    def broken(tokenizer, lead, text, control=False):
        ids, byte_ends, whole = answer_tokens(tokenizer, lead, text, control)
        return ids, byte_ends if "moon" not in text else [*byte_ends[:-1], byte_ends[-1] + 1], whole

    monkeypatch.setattr("hf_dskd.data.tokenization.answer_tokens", broken)
    rows = [{"prompt": "a", "completion": text} for text in ("yes", "no", "the moon")]
    with pytest.raises(RuntimeError, match=r"student's tokens .* response of example 2: .* byte 9 of 8;"):
        train(train_dataset=rows)


@pytest.mark.parametrize(
    "adapter",
    [
        lora(target_modules="all-linear"),
        lora(target_modules=["c_attn", "c_proj"]),
        lora(target_modules=r".*(c_attn|lm_head)", exclude_modules=["lm_head"]),
        lora(modules_to_save=["ln_f"]),
    ],
)
def test_lora_elsewhere_is_fine(adapter):
    check_peft(adapter, tiny.gpt2())
    model = get_peft_model(tiny.gpt2(), adapter).get_base_model()
    assert type(model.lm_head) is torch.nn.Linear and type(model.transformer.wte) is torch.nn.Embedding


def test_launchers_that_do_something_else(refused, monkeypatch):
    monkeypatch.setattr(DSKDConfig, "n_gpu", 2)
    refused(train, "...2 GPUs...accelerate launch --num_processes 2...CUDA_VISIBLE_DEVICES=0")
    monkeypatch.undo()
    for name in ("FSDP", "DEEPSPEED"):
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
        refused(train, f"...{name}...accelerate launch --multi_gpu")
        monkeypatch.delenv(f"ACCELERATE_USE_{name}")


# ---- Resuming


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The folder of a run with checkpoints 9 and 10, and all that a script may save into it."""
    place = tmp_path_factory.mktemp("finished")
    pair = {"student": str(folder / "student"), "teacher": str(folder / "teacher")}
    run = runs.trainer(place, **pair, max_steps=1, save_strategy="steps")
    run.train()
    (place / "checkpoint-1").rename(place / "checkpoint-10")
    shutil.copytree(place / "checkpoint-10", place / "checkpoint-9")
    run.save_model()
    run.save_state()
    return place


def resume(folder, checkpoint, **settings):
    run = runs.trainer(folder, **settings)
    weights = runs.weights(run)

    def train():
        try:
            run.train(resume_from_checkpoint=checkpoint if checkpoint is True else str(checkpoint))
        finally:
            assert run.state.global_step == 0 and run.optimizer is None
            assert all(torch.equal(value, weights[name]) for name, value in runs.weights(run).items())

    return train


def test_resume_from_no_checkpoint(refused, tmp_path, finished):
    for folder in ("missing", "void"):
        refused(resume(tmp_path, folder), f"...{folder}...name a checkpoint-N folder")
    refused(resume(tmp_path / "new", True), "resume_from_checkpoint=True...start without it")
    # It has the student and two of the files, so that only the optimizers would begin anew.
    for name in ("model.safetensors", "trainer_state.json", "auxiliary.json"):
        assert (finished / name).is_file()
    refused(resume(tmp_path, finished), f"...{str(finished)!r}...did you mean {str(finished / 'checkpoint-10')!r}?")


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"method": "dskd_cma"}, "its method is 'dskd_cma_ga', this run's is 'dskd_cma'"),
        ({"method": "sft"}, "its method is 'dskd_cma_ga', this run's is 'sft'"),
        ({"as_published": True}, "its as_published is False, this run's is True"),
        ({"teacher": "narrow"}, "its teacher is 'teacher', this run's is 'narrow'"),
        (
            {"student": "teacher", "teacher": "narrow", "processing_class": TEACHER},
            "its student is 'student', this run's is 'teacher'",
        ),
        ({"peft_config": lora()}, "its adapter is False, this run's is True"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_resume_from_another_run(refused, tmp_path, finished, settings, said):
    place = finished / "checkpoint-10"
    run = resume(tmp_path, place, **{"student": "student", "teacher": "teacher", **settings})
    refused(run, f"...{str(place)!r}...{said}...use the settings it was made with")
