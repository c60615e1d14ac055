"""The settings of a distillation run beyond those of any training; light, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .methods import DUAL_SPACE_ALIGNMENTS, MATCHINGS, METHODS


ADVERSARIAL_LOSSES = ("minimax", "non_saturating")
BINARY_DIVERGENCE_NAMES = ("forward_kl", "reverse_kl", "total_variation", "binary_ce")
DIVERGENCE_NAMES = (
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "js",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "adaptive_kl",
    "total_variation",
)
LABELS = ("response", "teacher")
PROJECTOR_INITS = ("random", "pseudo_inverse")
PROMPT_STYLES = ("chat", "plain")
SPACES = ("both", "student", "teacher")
TEACHER_VALUES = ("state_and_target", "state")
TEMPERATURE_SCALINGS = ("none", "tau_squared")
TEMPERATURE_SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class DistillationSettings:
    r"""
    Everything that [`DSKDConfig`] adds to [`~transformers.TrainingArguments`].

    Where the paper and its released code differ, the defaults follow the paper, except: `correctness_mask=True` and no
    factor τ², and `dskd_clp` and `dskd_cla` that stay inside a chunk, are the code's. `as_published=True` follows the
    code, except: adaptive KL divides by its temperature once, and both responses are cut at one byte.

    In names, t2s is what leads from the teacher into the student's space, and s2t what leads from the student into the
    teacher's. Of `messages` with several turns the last answer is learnt; earlier ones are part of the prompt.

    Parameters:
        method (`str`, *optional*, defaults to `"dskd_cma_ga"`):
            A row of [`~hf_dskd.methods.METHODS`]; `hf-dskd methods` prints them with their papers. The next six
            settings replace parts of the row; `None` keeps the method's own.
        alignment (`str`, *optional*):
            Of the dual-space methods: `"cross_model_attention"`, `"chunk_attention"`, `"chunk_mean"`,
            `"exact_tokens"` or `"identity"`.
        spaces (`str`, *optional*): Of the dual-space methods: `"both"`, `"student"` or `"teacher"`.
        matching (`str`, *optional*):
            Of queries to keys: `"gan"`, `"ct"`, `"moments"`, `"mmd"` or `"none"`.
        teacher_value (`str`, *optional*): What t2s projects: `"state_and_target"` or `"state"`.
        t2s_label (`str`, *optional*):
            What the projected teacher is trained to predict: the `"response"`, or the `"teacher"`'s own prediction
            where the student has that token.
        projector_init (`str`, *optional*): `"random"` or `"pseudo_inverse"` (from the two heads).
        divergence (`str`, *optional*, defaults to `"skewed_forward_kl"`):
            `"forward_kl"`, `"reverse_kl"`, `"symmetric_kl"`, `"js"`, `"skewed_forward_kl"`, `"skewed_reverse_kl"`,
            `"adaptive_kl"` or `"total_variation"`. Not used by `uld` and `alm`.
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
            Of `alm`, between binary likelihoods: `"forward_kl"`, `"reverse_kl"`, `"total_variation"` or `"binary_ce"`.
        alm_temperature (`float`, *optional*, defaults to `100.0`):
            Divides the log-likelihoods of `alm`, whose divergence is multiplied by it. The end-of-sequence token is
            not matched: the cross entropy teaches it, so that `kd_rate=1.0` teaches no end.
        alm_bias_threshold (`float`, *optional*):
            Of `alm`: a chunk goes on until the teacher gives at least this probability to whitespace or the end after
            it, which removes the bias of tokenizations that can't end there (the paper has 0.1). `None` merges none.
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
        max_length (`int`, *optional*, defaults to `512`): Longest sequence (prompt, response and EOS) of either model.
        skip_long_prompts (`bool`, *optional*, defaults to `False`):
            Skip examples whose prompt leaves no room for a response, instead of stopping with an error.
        prompt_style (`str`, *optional*, defaults to `"chat"`):
            `"chat"`: each model sees the prompt in its own chat template where it has one. `"plain"`: plain text.
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
        model_init_kwargs (`dict` or `str`, *optional*): For `from_pretrained` of a student given by name.
        teacher_model_init_kwargs (`dict` or `str`, *optional*): For `from_pretrained` of a teacher given by name.
    """

    # Method
    method: str = field(default="dskd_cma_ga", metadata={"help": f"one of {', '.join(METHODS)}"})
    alignment: str | None = field(
        default=None, metadata={"help": f"instead of the method's: one of {', '.join(DUAL_SPACE_ALIGNMENTS)}"}
    )
    spaces: str | None = field(default=None, metadata={"help": f"instead of the method's: {', '.join(SPACES)}"})
    matching: str | None = field(
        default=None, metadata={"help": f"of queries to keys, instead of the method's: {', '.join(MATCHINGS)} or none"}
    )
    teacher_value: str | None = field(
        default=None, metadata={"help": f"what t2s projects, instead of the method's: {' or '.join(TEACHER_VALUES)}"}
    )
    t2s_label: str | None = field(
        default=None, metadata={"help": f"of the projected teacher, instead of the method's: {' or '.join(LABELS)}"}
    )
    projector_init: str | None = field(
        default=None, metadata={"help": f"instead of the method's: {' or '.join(PROJECTOR_INITS)}"}
    )
    divergence: str = field(default="skewed_forward_kl", metadata={"help": f"one of {', '.join(DIVERGENCE_NAMES)}"})
    student_space_divergence: str | None = field(default=None, metadata={"help": "in student space instead"})
    teacher_space_divergence: str | None = field(default=None, metadata={"help": "in teacher space instead"})
    skew_lambda: float = field(default=0.1, metadata={"help": "lambda of the skewed divergences, in (0, 1)"})
    js_weight: float = field(default=0.5, metadata={"help": "the teacher's weight in the mixture of js, in (0, 1)"})
    adaptive_kl_alpha: float = field(default=0.5, metadata={"help": "teacher mass of the tail, in (0, 1)"})
    kd_temperature: float = field(default=2.0, metadata={"help": "divides both logits in the divergences, once"})
    student_temperature: float | None = field(default=None, metadata={"help": "for the student's logits instead"})
    teacher_temperature: float | None = field(default=None, metadata={"help": "for the teacher's logits instead"})
    teacher_space_temperature: float | None = field(
        default=None, metadata={"help": "for both logits in teacher space instead"}
    )
    temperature_scaling: str = field(
        default="none", metadata={"help": f"of the divergences: {' or '.join(TEMPERATURE_SCALINGS)}"}
    )
    temperature_schedule: str = field(
        default="constant", metadata={"help": f"of every temperature: {', '.join(TEMPERATURE_SCHEDULES)}"}
    )
    final_kd_temperature: float | None = field(
        default=None, metadata={"help": "where kd_temperature ends with such a schedule"}
    )
    kd_rate: float = field(default=0.5, metadata={"help": "weight of distillation; cross entropy has 1 - kd_rate"})
    correctness_mask: bool = field(
        default=True,
        metadata={"help": "student-space divergence only where the projected teacher predicts its label"},
    )
    alm_divergence: str = field(
        default="forward_kl", metadata={"help": f"of alm: one of {', '.join(BINARY_DIVERGENCE_NAMES)}"}
    )
    alm_temperature: float = field(default=100.0, metadata={"help": "divides the log-likelihoods of alm"})
    alm_bias_threshold: float | None = field(
        default=None, metadata={"help": "of alm: merge chunks that the teacher wouldn't end (the paper has 0.1)"}
    )
    on_policy_fraction: float = field(
        default=0.0, metadata={"help": "share of the steps whose responses the student samples now"}
    )
    kq_rate: float = field(default=1.0, metadata={"help": "weight of key-query matching, per response token"})
    adversarial_loss: str = field(default="minimax", metadata={"help": f"one of {', '.join(ADVERSARIAL_LOSSES)}"})
    attention_kd_rate: float = field(
        default=0.0, metadata={"help": "weight of the divergence of the models' own attention, per response token"}
    )
    attention_layers: str = field(
        default="last", metadata={"help": "of that: last, uniform, or pairs student:teacher such as 3:7,5:11"}
    )
    attention_relation_heads: int | None = field(
        default=None, metadata={"help": "heads that both models' queries and keys are cut into anew for that"}
    )
    scale_queries: bool = field(default=False, metadata={"help": "give queries the keys' unit standard deviation"})
    as_published: bool = field(default=False, metadata={"help": "reproduce the released code, defects included"})

    # Optimizers
    projector_learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate of the projectors"})
    discriminator_learning_rate: float = field(default=1e-4, metadata={"help": "of the discriminator's optimizer"})
    discriminator_lr_scheduler_type: str = field(default="constant", metadata={"help": "as lr_scheduler_type"})
    discriminator_adam_beta1: float = field(default=0.5, metadata={"help": "beta 1 of the discriminator's AdamW"})
    discriminator_adam_beta2: float = field(default=0.999, metadata={"help": "beta 2 of the discriminator's AdamW"})
    discriminator_weight_decay: float = field(default=0.0, metadata={"help": "of the discriminator's AdamW"})
    discriminator_steps: int = field(default=1, metadata={"help": "discriminator updates per student update"})
    discriminator_hidden_size: int = field(default=768, metadata={"help": "width of its layer before the output"})
    discriminator_dropout: float = field(default=0.1, metadata={"help": "of the discriminator"})

    # Data
    max_length: int = field(default=512, metadata={"help": "longest sequence of either model, in tokens"})
    skip_long_prompts: bool = field(
        default=False, metadata={"help": "skip examples whose prompt leaves no room for a response, not an error"}
    )
    prompt_style: str = field(default="chat", metadata={"help": "chat (own template where there is one) or plain"})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON for both chat templates, such as '{\"enable_thinking\": false}'"}
    )
    prompt_column: str | None = field(default=None, metadata={"help": "column that holds the prompt"})
    response_column: str | None = field(default=None, metadata={"help": "column that holds the response"})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "processes that tokenize"})

    # Memory and speed
    teacher_cache: str | None = field(
        default=None, metadata={"help": "folder of the teacher's hidden states, filled on first use"}
    )
    repair_teacher_cache: bool = field(default=False, metadata={"help": "make damaged files of the cache anew"})
    loss_memory_mb: float = field(default=512.0, metadata={"help": "budget for logits and the work on them, in MB"})
    padding_free: bool = field(default=False, metadata={"help": "run the student without padding"})

    # Logs and evaluation
    logging_steps: float = field(default=10, metadata={"help": "optimizer steps between two logs"})
    report_to: None | str | list[str] = field(  # noqa: RUF036  # transformers 4 reads the second type
        default="none", metadata={"help": "tensorboard, wandb, trackio, ..., several of them, all or none"}
    )
    analysis_steps: int | None = field(
        default=None, metadata={"help": "between two analyses of the alignment; 0: before and after training only"}
    )
    analysis_examples: int = field(default=12, metadata={"help": "examples that every analysis takes"})
    eval_generation_samples: int = field(
        default=0, metadata={"help": "prompts that the student answers in every evaluation, for ROUGE-L"}
    )

    # Models
    hub_strategy: str = field(default="end", metadata={"help": "when push_to_hub pushes: at the end, in one commit"})
    push_auxiliary_to_hub: bool = field(default=False, metadata={"help": "push projectors and discriminator too"})
    replace_on_hub: bool = field(default=False, metadata={"help": "let a push delete another model that is there"})
    load_teacher_in_4bit: bool = field(default=False, metadata={"help": "NF4 teacher through bitsandbytes"})
    teacher_device: str | None = field(
        default=None, metadata={"help": "where the teacher is, such as cuda:1; by default beside the student"}
    )
    teacher_dtype: str = field(default="auto", metadata={"help": f"of the teacher: one of {', '.join(DTYPES)}"})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON for from_pretrained of the student"}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON for from_pretrained of the teacher"}
    )
