"""The settings of a distillation run beyond those of any training; light, so that `--help` answers at once."""

from __future__ import annotations

import re
from collections import ChainMap
from dataclasses import dataclass, field
from typing import Any

from .errors import UserError
from .methods import ALIGNMENTS, BINARY_DIVERGENCES, DIVERGENCES, MATCHINGS, METHODS


ADVERSARIAL_LOSSES = ("minimax", "non_saturating")
# As papers and other tools write them.
DIVERGENCE_ALIASES = {
    alias: name for table in (DIVERGENCES, BINARY_DIVERGENCES) for name, row in table.items() for alias in row.aliases
}
LABELS = ("response", "teacher")
ON_NONFINITE = ("stop", "skip")
PROJECTOR_INITS = ("random", "pseudo_inverse")
SEGMENTATIONS = ("student", "longest")
PROMPT_STYLES = ("chat", "plain")
SPACES = ("both", "student", "teacher")
TEACHER_VALUES = ("state_and_target", "state")
TEMPERATURE_SCALINGS = ("none", "tau_squared")
TEMPERATURE_SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Those that need no arguments of their own and no metric.
DISCRIMINATOR_SCHEDULES = (
    *("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"),
)
HUB_STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")

# Choices that are tables, so that a row added later is one.
_DIVERGENCE = {"choices": DIVERGENCES, "aliases": DIVERGENCE_ALIASES}


class _Metadata(dict[str, Any]):
    """
    Of a field: what a parser is told of it, and as `rule` what its values must be (see [`hf_dskd.field_checks`]).

    Parsers hand a copy of a field's metadata to argparse, which knows nothing of rules: no copy has it.
    """

    def __init__(self, told: dict[str, Any], rule: dict[str, Any]):
        super().__init__(told)
        self.rule = rule

    def __missing__(self, key: str) -> Any:
        if key != "rule":
            raise KeyError(key)
        return self.rule


def _setting(default: Any, help: str, **more: Any) -> Any:
    told: dict[str, Any] = {name: more.pop(name) for name in ("nargs", "const") if name in more}
    return field(default=default, metadata=_Metadata({"help": help, **told}, more))


def _choice(default: Any, help: str, choices: Any, **more: Any) -> Any:
    """One of a few names, which end the help."""
    return _setting(
        default, f"{help} {(' or ' if len(choices) == 2 else ', ').join(choices)}", choices=choices, **more
    )


def _share(default: Any, help: str, usual: float) -> Any:
    return _setting(default, help, above=0, below=1, usual=f"the papers use {usual}")


def _temperature(default: Any, help: str) -> Any:
    return _setting(default, help, above=0, usual="the papers use 2.0")


@dataclass
class DistillationSettings:
    r"""
    Everything that [`DSKDConfig`] adds to [`~transformers.TrainingArguments`].

    Where the paper and its released code differ, the defaults follow the paper, except: `correctness_mask=True` and no
    factor τ², and `dskd_clp` and `dskd_cla` that stay inside a chunk, are the code's. `as_published=True` follows the
    code, except: adaptive KL divides by its temperature once, and both responses are cut at one byte.

    In names, t2s is what leads from the teacher into the student's space, and s2t what leads from the student into the
    teacher's. Of `messages` with several turns every answer is learnt (see `train_on`).

    Parameters:
        method (`str`, *optional*, defaults to `"dskd_cma_ga"`):
            A row of [`~hf_dskd.methods.METHODS`]; `hf-dskd methods` prints them with their papers. The next six
            settings replace parts of the row; `None` keeps the method's own.
        alignment (`str`, *optional*):
            Of the dual-space methods: a row of [`~hf_dskd.methods.ALIGNMENTS`].
        spaces (`str`, *optional*): Of the dual-space methods: `"both"`, `"student"` or `"teacher"`.
        matching (`str`, *optional*):
            Of queries to keys: a row of [`~hf_dskd.methods.MATCHINGS`], or `"none"`.
        teacher_value (`str`, *optional*): What t2s projects: `"state_and_target"` or `"state"`.
        t2s_label (`str`, *optional*):
            What the projected teacher is trained to predict: the `"response"`, or the `"teacher"`'s own prediction
            where the student has that token.
        projector_init (`str`, *optional*): `"random"` or `"pseudo_inverse"` (from the two heads).
        divergence (`str`, *optional*, defaults to `"skewed_forward_kl"`):
            A row of [`~hf_dskd.methods.DIVERGENCES`]. Not used by `uld` and `alm`.
        student_space_divergence, teacher_space_divergence (`str`, *optional*): In that space instead.
        skew_lambda (`float`, *optional*, defaults to `0.1`): λ of the skewed divergences, in (0, 1).
        js_weight (`float`, *optional*, defaults to `0.5`): The teacher's weight in the mixture of `"js"`, in (0, 1).
        adaptive_kl_alpha (`float`, *optional*, defaults to `0.5`): Teacher mass of the tail, in (0, 1).
        kd_temperature (`float`, *optional*, defaults to `2.0`): Divides both logits in the divergences, once.
        student_temperature, teacher_temperature (`float`, *optional*): For one model's logits instead.
        teacher_space_temperature (`float`, *optional*): For both logits in teacher space instead.
        temperature_scaling (`str`, *optional*, defaults to `"none"`):
            `"tau_squared"` multiplies a divergence by the product of its two temperatures.
        temperature_schedule (`str`, *optional*, defaults to `"constant"`):
            `"linear"` or `"cosine"` moves the temperatures above by one common factor over the run.
        final_kd_temperature (`float`, *optional*): Where `kd_temperature` ends with such a schedule.
        kd_rate (`float`, *optional*, defaults to `0.5`):
            Weight of the distillation terms; the student's own cross entropy has 1 − `kd_rate`.
        correctness_mask (`bool`, *optional*, defaults to `True`):
            Student-space divergence only where the projected teacher predicts its label.
        alm_divergence (`str`, *optional*, defaults to `"forward_kl"`):
            Of `alm`, between binary likelihoods: a row of [`~hf_dskd.methods.BINARY_DIVERGENCES`].
        alm_temperature (`float`, *optional*, defaults to `100.0`):
            Divides the log-likelihoods of `alm`, whose divergence is multiplied by it. The end-of-sequence token is
            not matched: the cross entropy teaches it, so that `kd_rate=1.0` teaches no end.
        alm_bias_threshold (`float`, *optional*):
            Of `alm`: a chunk goes on until the teacher gives at least this probability to whitespace or the end after
            it, which removes the bias of tokenizations that can't end there (the paper has 0.1). `None` merges none.
        bpm_segmentation (`str`, *optional*, defaults to `"student"`):
            Of `bpm`: a string begins with the token that the student's own tokenizer begins it with (`"student"`), or
            with the longest one (`"longest"`, arXiv 2607.22334, which also leaves out tokens of white space alone).
            At temperatures of its own where none are set: the student's 1, the teacher's fitted on the training text.
        bpm_top_k (`int`, *optional*, defaults to `64`):
            Of `bpm`: tokens of the target that are told apart. The rest is one outcome more, for any divergence.
        on_policy_fraction (`float`, *optional*, defaults to `0.0`):
            Share of the optimizer steps whose responses the student samples now with its own generation config. In
            them the student's cross entropy has no weight.
        kq_rate (`float`, *optional*, defaults to `1.0`): Weight of key-query matching, per response token.
        adversarial_loss (`str`, *optional*, defaults to `"minimax"`):
            Of the query projector against the discriminator: `"minimax"` (arXiv 2603.22056, Eq. 14) or
            `"non_saturating"`.
        attention_kd_rate (`float`, *optional*, defaults to `0.0`):
            Weight of one more term, for any method with a teacher that runs: KL of the teacher's attention from the
            student's, the mean over layers and heads, per response token. Token by token where both read the same
            tokens, else over chunks of the same bytes (see [`hf_dskd.losses.attention`]).
        attention_layers (`str`, *optional*, defaults to `"last"`):
            Layers of that term: `"last"` with last, `"uniform"` (every one of the student's, the teacher's at even
            distances), or pairs student:teacher counted from 0, such as `"3:7,5:11"`.
        attention_relation_heads (`int`, *optional*):
            Heads that queries and keys of both are cut into anew (MiniLMv2). By default heads are compared one to one
            where there are as many, else in as many as divides both.
        scale_queries (`bool`, *optional*, defaults to `False`): Give queries the keys' unit standard deviation.
        projector_learning_rate (`float`, *optional*, defaults to `1e-3`): Peak learning rate of the projectors.
        discriminator_learning_rate (`float`, *optional*, defaults to `1e-4`): Peak, of the discriminator's optimizer.
        discriminator_lr_scheduler_type (`str`, *optional*, defaults to `"constant"`): As `lr_scheduler_type`.
        discriminator_adam_beta1 (`float`, *optional*, defaults to `0.5`): β₁ of the discriminator's AdamW.
        discriminator_adam_beta2 (`float`, *optional*, defaults to `0.999`): β₂ of the discriminator's AdamW.
        discriminator_weight_decay (`float`, *optional*, defaults to `0.0`): Of the discriminator's AdamW.
        discriminator_steps (`int`, *optional*, defaults to `1`): Discriminator updates per student update.
        discriminator_hidden_size (`int`, *optional*, defaults to `768`): Width of its layer before the output.
        discriminator_dropout (`float`, *optional*, defaults to `0.1`): Of the discriminator.
        as_published (`bool`, *optional*, defaults to `False`):
            Reproduce the released code: sequences padded to `max_length`, prompt and padding in the attention's
            statistics and in the matching, forward KL in teacher space, teacher-space sums divided by student tokens,
            a discriminator that is never trained, and its loss as a mean divided by the number of tokens once more.
            (Not reproduced: see above.)
        on_nonfinite (`str`, *optional*, defaults to `"stop"`):
            At a step whose loss or gradients are NaN or infinite: `"stop"` with an error before anything is saved, or
            `"skip"` it on all processes and for all optimizers and schedules; `skipped_steps` in log and result counts
            them. That waits for the device once a step, and stops after 10 such steps in a row. What a loss scale of
            fp16 makes overflow is neither: the scaler skips it by itself.
        allow_changed_settings (`bool`, *optional*, defaults to `False`):
            Let a run go on from a checkpoint with other settings than it was saved with, as a learning rate, data or
            number of processes. Without, a change of what decides what becomes of the student is refused by name.
        max_length (`int`, *optional*, defaults to `512`): Longest sequence (prompt, response and EOS) of either model.
        skip_long_prompts (`bool`, *optional*, defaults to `False`):
            Skip examples whose prompt leaves no room for a response, instead of stopping with an error.
        on_bad_row (`str`, *optional*, defaults to `"stop"`):
            What to do about a row that can't be read: `"stop"` with an error, or `"skip"` it and count it.
        train_on (`str`, *optional*, defaults to `"all"`):
            Which answers of a conversation are learnt: `"all"`, or the `"last"`. A message of `weight` 0 isn't.
        prompt_style (`str`, *optional*, defaults to `"chat"`):
            `"chat"`: each model sees the prompt in its own chat template where it has one, and ends an answer as that
            does. `"plain"`: plain text, which ends with EOS.
        chat_template_kwargs (`dict` or `str`, *optional*):
            For both models' chat templates, of which each takes what it knows, such as
            `{"enable_thinking": false}` for Qwen3, or `{"date_string": "26 Jul 2024"}` for Llama 3.2, which else
            writes today's date into every prompt.
        prompt_column, response_column (`str`, *optional*): Columns of the dataset, where they have names of their own.
        dataset_num_proc (`int`, *optional*): Processes that tokenize.
        teacher_cache (`str`, *optional*):
            Folder of the teacher's last hidden states. It is filled on first use and whenever examples are missing;
            from then on training needs the teacher's head and embedding alone. Of no account for methods without a
            teacher in their loss.
        repair_teacher_cache (`bool`, *optional*, defaults to `False`): Make damaged files of the cache anew.
        bf16 (`bool`, *optional*):
            Train in bf16. Without it and without `fp16`: as `accelerate launch --mixed_precision` says, else in bf16
            on a GPU that computes in it, else in float32. The command line asks the processor too.
        loss_memory_mb (`float`, *optional*, defaults to `512`):
            Budget for logits and the work on them, in MB; the losses are the same for any.
        padding_free (`bool`, *optional*, defaults to `False`):
            Run the student on the tokens of a micro-batch in one row, without padding. Without flash attention that
            pays for small batches of uneven lengths alone, since attention then runs over the whole row.
        report_to (`str` or `list[str]`, *optional*, defaults to `"none"`):
            Trackers of the log, such as `"tensorboard"`, `"wandb"`, `"trackio"`. Transformers 4 by itself would take
            all that are installed.
        analysis_steps (`int`, *optional*):
            Optimizer steps between two analyses of the alignment, beside those before and after training; `0` for
            these two alone. Numbers and pictures go to `analysis` in the output folder. `None` analyses nothing.
        analysis_examples (`int`, *optional*, defaults to `12`):
            Examples that every analysis takes, the same ones: of the evaluation data, or else of the training data.
        eval_generation_samples (`int`, *optional*, defaults to `0`):
            Prompts of the evaluation data that the student answers greedily in every evaluation, which adds
            `eval_rouge_l`, `eval_exact_match` (percent) and `eval_unfinished` (share that ran into `max_length`).
        hub_strategy (`str`, *optional*, defaults to `"end"`):
            When `push_to_hub` pushes: at the end, in one commit. Others would publish half a run.
        push_auxiliary_to_hub (`bool`, *optional*, defaults to `False`):
            Push projectors and discriminator too, which the student doesn't need.
        replace_on_hub (`bool`, *optional*, defaults to `False`):
            Let a push delete another model that the repository holds.
        load_teacher_in_4bit (`bool`, *optional*, defaults to `False`): NF4 teacher through bitsandbytes.
        teacher_device (`str`, *optional*): Where the teacher is, such as `"cuda:1"`; by default beside the student.
        teacher_dtype (`str`, *optional*, defaults to `"auto"`):
            Of a teacher given by name: `"auto"` is the training precision (bf16, fp16, or else float32).
        model_init_kwargs (`dict` or `str`, *optional*):
            For `from_pretrained` of a student given by name. Each option goes to configuration, tokenizer, weights and
            code, wherever it means something; one that has no effect is refused.
        teacher_model_init_kwargs (`dict` or `str`, *optional*): The same for a teacher given by name.
    """

    # Method
    method: str = _choice("dskd_cma_ga", "what is learnt from the teacher: one of", METHODS)
    alignment: str | None = _choice(None, "how tokens are aligned, instead of the method's: one of", ALIGNMENTS)
    spaces: str | None = _choice(None, "spaces that are compared, instead of the method's:", SPACES)
    matching: str | None = _setting(
        None,
        f"how queries are matched to keys, instead of the method's: {', '.join(MATCHINGS)} or none",
        choices=ChainMap({"none": None}, MATCHINGS),
    )
    teacher_value: str | None = _choice(
        None, "what t2s projects of the teacher, instead of the method's:", TEACHER_VALUES
    )
    t2s_label: str | None = _choice(None, "what the projected teacher is to predict, instead of the method's:", LABELS)
    projector_init: str | None = _choice(
        None, "beginning of the projectors, instead of the method's:", PROJECTOR_INITS
    )
    divergence: str = _choice(
        "skewed_forward_kl", "distance of the distributions: one of", DIVERGENCES, aliases=DIVERGENCE_ALIASES
    )
    student_space_divergence: str | None = _setting(
        None, "divergence in student space, where it is another", **_DIVERGENCE
    )
    teacher_space_divergence: str | None = _setting(
        None, "divergence in teacher space, where it is another", **_DIVERGENCE
    )
    skew_lambda: float = _share(0.1, "lambda of the skewed divergences, in (0, 1)", 0.1)
    js_weight: float = _share(0.5, "the teacher's weight in the mixture of js, in (0, 1)", 0.5)
    adaptive_kl_alpha: float = _share(0.5, "teacher mass of the tail, in (0, 1)", 0.5)
    kd_temperature: float = _temperature(2.0, "divides both logits in the divergences, once")
    student_temperature: float | None = _temperature(None, "divides the student's logits instead of kd_temperature")
    teacher_temperature: float | None = _temperature(None, "divides the teacher's logits instead of kd_temperature")
    teacher_space_temperature: float | None = _temperature(
        None, "divides both logits in teacher space instead of kd_temperature"
    )
    temperature_scaling: str = _choice("none", "factor of the divergences:", TEMPERATURE_SCALINGS)
    temperature_schedule: str = _choice("constant", "course of every temperature over the run:", TEMPERATURE_SCHEDULES)
    final_kd_temperature: float | None = _temperature(
        None, "where kd_temperature ends with a linear or cosine schedule"
    )
    kd_rate: float = _setting(
        0.5, "weight of distillation; cross entropy has 1 - kd_rate", least=0, most=1, usual="the papers use 0.5"
    )
    correctness_mask: bool = _setting(
        True, "student-space divergence only where the projected teacher predicts its label"
    )
    alm_divergence: str = _choice(
        "forward_kl",
        "divergence between binary likelihoods of alm: one of",
        BINARY_DIVERGENCES,
        aliases=DIVERGENCE_ALIASES,
    )
    alm_temperature: float = _setting(100.0, "divides the log-likelihoods of alm", above=0, usual="the paper uses 100")
    alm_bias_threshold: float | None = _setting(
        None,
        "merge chunks of alm that the teacher wouldn't end (the paper has 0.1)",
        above=0,
        below=1,
        usual="the paper has 0.1",
    )
    bpm_segmentation: str = _setting(
        "student",
        f"how bpm cuts what a teacher's token says into the student's: {' or '.join(SEGMENTATIONS)} (the paper's)",
        choices=SEGMENTATIONS,
    )
    bpm_top_k: int = _setting(64, "how many tokens of bpm's target are told apart; the rest is one", least=1)
    on_policy_fraction: float = _setting(
        0.0, "share of the steps whose responses the student samples now", least=0, most=1, usual="the papers use 0.5"
    )
    kq_rate: float = _setting(
        1.0, "weight of key-query matching, per response token", least=0, usual="0 switches matching off"
    )
    adversarial_loss: str = _choice(
        "minimax", "loss of the query projector against the discriminator:", ADVERSARIAL_LOSSES
    )
    attention_kd_rate: float = _setting(
        0.0,
        "weight of the divergence of the models' own attention, per response token",
        least=0,
        usual="0 leaves attention out",
    )
    attention_layers: str = _setting(
        "last", "layers whose attention is compared: last, uniform, or pairs student:teacher such as 3:7,5:11"
    )
    attention_relation_heads: int | None = _setting(
        None, "heads that both models' queries and keys are cut into anew before attention is compared", least=1
    )
    scale_queries: bool = _setting(False, "give queries the keys' unit standard deviation")
    as_published: bool = _setting(False, "reproduce the released code, defects included")

    # Optimizers
    projector_learning_rate: float = _setting(1e-3, "peak learning rate of the projectors", least=0)
    discriminator_learning_rate: float = _setting(1e-4, "peak learning rate of the discriminator", least=0)
    discriminator_lr_scheduler_type: str = _setting(
        "constant", "schedule of the discriminator, as lr_scheduler_type", choices=DISCRIMINATOR_SCHEDULES
    )
    discriminator_adam_beta1: float = _setting(0.5, "beta 1 of the discriminator's AdamW", least=0, below=1)
    discriminator_adam_beta2: float = _setting(0.999, "beta 2 of the discriminator's AdamW", least=0, below=1)
    discriminator_weight_decay: float = _setting(0.0, "weight decay of the discriminator's AdamW", least=0)
    discriminator_steps: int = _setting(1, "discriminator updates per student update", least=1)
    discriminator_hidden_size: int = _setting(768, "width of the discriminator's layer before its output", least=1)
    discriminator_dropout: float = _setting(0.1, "dropout of the discriminator", least=0, below=1)
    on_nonfinite: str = _setting(
        "stop",
        "what to do at a step that is NaN or infinite: stop, or skip it (which waits for the device once a step)",
        choices=ON_NONFINITE,
    )
    allow_changed_settings: bool = _setting(False, "resume with other settings than the checkpoint was saved with")

    # Data
    max_length: int = _setting(
        512, "longest sequence of either model, in tokens", least=2, usual="a prompt and a response need room"
    )
    skip_long_prompts: bool = _setting(False, "skip examples whose prompt leaves no room for a response, not an error")
    on_bad_row: str = _setting(
        "stop", "what to do about a row that can't be read: stop, or skip and count it", choices=("stop", "skip")
    )
    train_on: str = _setting("all", "which answers of a conversation are learnt: all or last", choices=("all", "last"))
    prompt_style: str = _setting(
        "chat", "how prompts are written: chat (own template where there is one) or plain", choices=PROMPT_STYLES
    )
    chat_template_kwargs: dict[str, Any] | str | None = _setting(
        None, "JSON for both chat templates, such as '{\"enable_thinking\": false}'"
    )
    prompt_column: str | None = _setting(None, "column of the dataset that holds the prompt")
    response_column: str | None = _setting(None, "column of the dataset that holds the response")
    dataset_num_proc: int | None = _setting(None, "how many processes tokenize", least=1)

    # Memory and speed
    teacher_cache: str | None = _setting(None, "folder of the teacher's hidden states, filled on first use")
    repair_teacher_cache: bool = _setting(False, "make damaged files of the teacher's cache anew")
    bf16: bool | None = _setting(
        None,
        "train in bf16; by default as the launcher says, or where the GPU computes in it",
        # Without a value it is a flag, as of any other setting that is True or False.
        nargs="?",
        const=True,
    )
    loss_memory_mb: float = _setting(512.0, "budget for logits and the work on them, in MB", above=0)
    padding_free: bool = _setting(False, "run the student without padding")

    # Logs and evaluation
    logging_steps: float = _setting(10, "optimizer steps between two logs", above=0)
    report_to: None | str | list[str] = _setting(  # noqa: RUF036  # transformers 4 reads the second type
        "none", "trackers of the log: tensorboard, wandb, trackio, ..., several of them, all or none"
    )
    analysis_steps: int | None = _setting(
        None, "optimizer steps between two analyses of the alignment; 0: before and after training only", least=0
    )
    analysis_examples: int = _setting(12, "how many examples every analysis takes", least=1)
    eval_generation_samples: int = _setting(
        0, "prompts that the student answers in every evaluation, for ROUGE-L", least=0
    )

    # Models
    hub_strategy: str = _setting("end", "when push_to_hub pushes: at the end, in one commit", choices=HUB_STRATEGIES)
    push_auxiliary_to_hub: bool = _setting(False, "push projectors and discriminator with the student")
    replace_on_hub: bool = _setting(False, "let a push delete another model that the repository holds")
    load_teacher_in_4bit: bool = _setting(False, "quantize the teacher to NF4 through bitsandbytes")
    teacher_device: str | None = _setting(
        None, "where the teacher is, such as cuda:1; by default beside the student", usual="such as 'cuda:1'"
    )
    teacher_dtype: str = _choice("auto", "precision of a teacher given by name: one of", DTYPES)
    model_init_kwargs: dict[str, Any] | str | None = _setting(
        None, "JSON of options for from_pretrained of the student"
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = _setting(
        None, "JSON of options for from_pretrained of the teacher"
    )


def parse_layers(attention_layers: str) -> list[tuple[int, int]] | None:
    """
    Reads the pairs of an `attention_layers` like `"3:7,5:11"`, student:teacher and counted from 0; `None` for
    `"last"` and `"uniform"`.

    Raises:
        UserError: If it is none of these.
    """
    if attention_layers in ("last", "uniform"):
        return None
    if not re.fullmatch(r"\s*\d+\s*:\s*\d+\s*(,\s*\d+\s*:\s*\d+\s*)*", attention_layers):
        raise UserError(
            f"attention_layers={attention_layers!r} is none of 'last', 'uniform' and pairs of layers, student:teacher"
            " and counted from 0, such as '3:7,5:11'"
        )
    pairs = (pair.split(":") for pair in attention_layers.split(","))
    return [(int(student), int(teacher)) for student, teacher in pairs]
