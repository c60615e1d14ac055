"""Names that other tools have for what is here, and what to write instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from .errors import UserError, nearest


Init = TypeVar("Init", bound=Callable[..., None])

# The same thing under another name: taken as it is.
SETTINGS = {
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "lmbda": "on_policy_fraction",
    "uld_student_temperature": "student_temperature",
    "uld_teacher_temperature": "teacher_temperature",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
}
ARGUMENTS = {
    "tokenizer": "processing_class",
    "student_tokenizer": "processing_class",
    "teacher_tokenizer": "teacher_processing_class",
    "student_model": "model",
    "student": "model",
    "teacher": "teacher_model",
    "config": "args",
    "training_args": "args",
}
FLAGS = {
    "model": "model_name_or_path",
    "student": "model_name_or_path",
    "student_model": "model_name_or_path",
    "student_model_name_or_path": "model_name_or_path",
    "teacher": "teacher_model_name_or_path",
    "teacher_model": "teacher_model_name_or_path",
    "dataset": "dataset_name",
    "attention_implementation": "attn_implementation",
    "torch_dtype": "dtype",
    "use_lora": "use_peft",
}

_ROOM = "max_length bounds prompt and response together, in tokens of either model"
_SAMPLING = (
    "the student samples with its own generation config: set model.generation_config, or save it beside the model"
)
_COLUMNS = "rows have a prompt and a response: name their columns with prompt_column and response_column"
_GENERATES = "the student answers with transformers' own generate: leave it out"

# What is done in another way, for several words at once.
_TOGETHER = {
    "alpha uld_crossentropy_weight uld_distillation_weight": "kd_rate is the weight of distillation, and 1 - kd_rate"
    " that of the cross entropy",
    "loss_type kd_loss": "method says what is compared, divergence how far apart it is",
    "completion_only_loss assistant_only_loss train_on_inputs train_on_prompt": "responses alone are learnt, prompts"
    " never: leave it out",
    "packing eval_packing packing_strategy": "sequences hold one example each; padding_free=True puts those of a"
    " micro-batch into one row",
    "dataset_text_field dataset_kwargs": _COLUMNS,
    "max_new_tokens max_completion_length": _ROOM,
    "eos_token pad_token": "set it on the tokenizer, and pass that as processing_class",
    "tokenizer_name tokenizer_name_or_path": "each model's own tokenizer is taken; in Python pass another as"
    " processing_class",
    "teacher_model_name_or_path model_name_or_path model_name": "in Python the models are arguments of DSKDTrainer"
    " (model, teacher_model)",
    "generation_kwargs top_p top_k min_p": _SAMPLING,
}
# What is done in another way, or not at all.
INSTEAD = {
    **{name: said for names, said in _TOGETHER.items() for name in names.split()},
    "beta": "the generalized Jensen-Shannon divergence is divergence='js' with this as js_weight; at 0 it is"
    " divergence='forward_kl', at 1 'reverse_kl'",
    "temperature": f"kd_temperature divides the logits in the divergences; {_SAMPLING}",
    "seq_kd": "write method='seq_kd'",
    "use_uld_loss": "write method='uld'",
    "use_extended_uld": "write method='uld', or alm for pieces of the same text",
    "formatting_func": f"map the dataset to columns prompt and completion, or messages; else {_COLUMNS}",
    "max_prompt_length": f"{_ROOM}; skip_long_prompts=True skips examples whose prompt fills it",
    "truncation_mode": "responses are cut at max_length; skip_long_prompts=True skips examples whose prompt fills it",
    "pad_to_multiple_of": "pass data_collator=DualCollator(..., pad_to_multiple_of=...)",
    "shuffle_dataset": "examples are shuffled in every epoch; train_sampling_strategy='sequential' keeps their order",
    "chat_template_path": "set processing_class.chat_template",
    "teacher_tokenizer_name_or_path": "the teacher's own is taken; in Python pass another as teacher_processing_class",
    "tokenizer": "each model's own tokenizer is taken; in Python pass another as DSKDTrainer(processing_class=...)",
    "teacher_model_revision": "write teacher_model_init_kwargs={'revision': ...}",
    "model_revision": "write model_init_kwargs={'revision': ...}",
    "trust_remote_code": "write model_init_kwargs={'trust_remote_code': True}, and teacher_model_init_kwargs for the"
    " teacher",
    "use_peft": "in Python pass DSKDTrainer(peft_config=LoraConfig(...))",
    "load_in_4bit": "load_teacher_in_4bit is for the teacher, quantization_config of DSKDTrainer for the student",
    "load_in_8bit": "pass quantization_config or teacher_quantization_config to DSKDTrainer",
    "precompute_ref_log_probs": "teacher_cache keeps the teacher's last hidden states",
    "activation_offloading": "gradient_checkpointing=True saves memory",
    "disable_dropout": "dropout is a setting of the model, such as model_init_kwargs={'attention_dropout': 0}",
    "num_generations": "one response is sampled per prompt: leave it out",
    "log_completions": "eval_generation_samples answers that many prompts in every evaluation",
    "use_vllm": _GENERATES,
    "warmup_ratio": "write warmup_steps, where a number below 1 is a share of the steps",
    "group_by_length": "write train_sampling_strategy='group_by_length'",
    "overwrite_output_dir": "name another output_dir, go on with resume_from_checkpoint, or delete the folder",
    "save_safetensors": "weights are always saved as safetensors: leave it out",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    # Arguments of a trainer
    "model_init": "name the model, which is loaded anew for every trial of a search",
    "compute_loss_func": "method and divergence say what the loss is; a subclass may override compute_loss",
    "optimizer_cls_and_kwargs": "set optim and optim_args, or pass optimizers=(optimizer, None)",
    "ref_model": "the teacher is teacher_model",
    "reward_model": "nothing is rewarded here: leave it out",
}


def translated(
    what: str, given: Mapping[str, Any], known: Collection[str], same: Mapping[str, str], otherwise: str
) -> dict[str, Any]:
    """
    Gives settings the names that they have here.

    `what` is where they are given, such as `"DSKDConfig"`; `known` are the names there are, `same` other tools' names
    for the same things; `otherwise` says what to do about a name that isn't known anywhere. A [`UserError`] for such a
    name, with what to write instead, and for one thing under two names.
    """
    result: dict[str, Any] = {}
    for name, value in ((str(name), value) for name, value in given.items()):
        ours = name if name in known else same.get(name, name)
        if ours not in known:
            raise UserError(f"{what}: {instead_of(name, known, otherwise)}")
        if ours in result or (ours != name and ours in given):
            raise UserError(f"{what}: {name} is {ours} here, and both are given: leave one of them out")
        result[ours] = value
    return result


def instead_of(word: str, known: Collection[str], otherwise: str) -> str:
    """Says what to write instead of a name, or a flag `--name`, that isn't one of `known`."""
    mark = "--" if word.startswith("--") else ""
    name = word.removeprefix(mark).replace("-", "_")
    near = nearest(name, known)
    remedy = INSTEAD.get(name) or (_GENERATES if name.startswith("vllm_") else None)
    return f"{word} is no setting: {remedy or (f'did you mean {mark}{near}?' if near else otherwise)}"


def understands(what: str, same: Mapping[str, str], otherwise: str) -> Callable[[Init], Init]:
    """Decorates an `__init__` that takes keyword arguments under other tools' names too (see [`translated`])."""

    def decorate(init: Init) -> Init:
        known = inspect.signature(init).parameters.keys() - {"self"}

        @functools.wraps(init)
        def understanding(self: Any, *args: Any, **given: Any) -> None:
            init(self, *args, **translated(what, given, known, same, otherwise))

        return understanding  # type: ignore[return-value]

    return decorate
