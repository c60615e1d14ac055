"""What a configuration makes of a method's row, and the combinations that it refuses."""

from dataclasses import replace

import pytest
import runs
import torch
from transformers import get_scheduler

from hf_dskd.errors import UserError
from hf_dskd.methods import ALIGNMENTS, BINARY_DIVERGENCES, DIVERGENCES, MATCHINGS, METHODS
from hf_dskd.settings import (
    ADVERSARIAL_LOSSES,
    DISCRIMINATOR_SCHEDULES,
    LABELS,
    PROJECTOR_INITS,
    SPACES,
    TEACHER_VALUES,
    TEMPERATURE_SCALINGS,
)


BOTH = ("student", "teacher")
NOT_DUAL = ("sft", "seq_kd", "kd", "uld", "min_edit", "alm")


# ---- The table


@pytest.mark.parametrize("name", METHODS)
def test_rows_are_made_of_known_parts(name, tmp_path):
    row = METHODS[name]
    assert runs.config(tmp_path, method=name).method_row == row
    assert row.alignment in (*ALIGNMENTS, "position", "min_edit", "chunks", None)
    assert row.spaces in (BOTH, ("logits",), ("sorted_logits",), ("mapped_logits",), ("likelihood",), ())
    assert row.matching in (*MATCHINGS, None)
    assert row.teacher_value in TEACHER_VALUES and row.label in LABELS and row.projector_init in PROJECTOR_INITS
    assert row.text in ("dataset", "teacher")
    assert row.summary and row.source and "\n" not in row.summary + row.source


@pytest.mark.parametrize("table", [METHODS, ALIGNMENTS, MATCHINGS, DIVERGENCES, BINARY_DIVERGENCES], ids=len)
def test_rows_name_their_code(table):
    assert all(callable(row.load()) for row in table.values())


def names(of):
    return {name for name, row in METHODS.items() if of(row)}


def test_what_methods_need():
    dual = {"dskd", "dskd_cma", "dskd_cma_ga", "dskd_cma_ct", "dskd_clp", "dskd_cla", "dskd_eta"}
    assert names(lambda row: not row.needs_teacher) == {"sft", "seq_kd"}
    assert names(lambda row: row.dual_space) == dual == set(METHODS) - set(NOT_DUAL)
    assert names(lambda row: row.has_queries) == {"dskd_cma", "dskd_cma_ga", "dskd_cma_ct", "dskd_cla"}
    assert names(lambda row: row.needs_chunks) == {"dskd_clp", "dskd_cla", "dskd_eta", "alm"}
    assert names(lambda row: row.same_vocabulary) == {"kd", "dskd"}
    assert names(lambda row: row.text == "teacher") == {"seq_kd"}
    assert names(lambda row: row.matching) == {"dskd_cma_ga", "dskd_cma_ct"}
    assert names(lambda row: row.label == "teacher") == {"dskd_eta"}


# ---- Parts of a row that settings replace


@pytest.mark.parametrize(
    "method, settings, changes",
    [
        *(("dskd_clp", {"alignment": name}, {"alignment": name}) for name in ALIGNMENTS if name != "chunk_mean"),
        *(("dskd_cma", {"matching": name}, {"matching": name}) for name in MATCHINGS),
        ("dskd_cma_ga", {"matching": "none"}, {"matching": None}),
        ("dskd_cma_ga", {"matching": "ct"}, {"matching": "ct"}),
        ("dskd_cma_ga", {"alignment": "identity", "matching": "none"}, {"alignment": "identity", "matching": None}),
        ("dskd_cla", {"matching": "gan"}, {"matching": "gan"}),
        ("dskd", {"spaces": "both"}, {}),
        ("dskd_clp", {"alignment": "chunk_mean"}, {}),
        ("dskd", {"spaces": "student"}, {"spaces": ("student",)}),
        ("dskd_clp", {"spaces": "teacher"}, {"spaces": ("teacher",)}),
        ("dskd_cma", {"teacher_value": "state"}, {"teacher_value": "state"}),
        ("dskd_eta", {"teacher_value": "state_and_target"}, {"teacher_value": "state_and_target"}),
        ("dskd_eta", {"t2s_label": "response"}, {"label": "response"}),
        ("dskd", {"t2s_label": "teacher"}, {"label": "teacher"}),
        (
            "dskd_cma",
            {"t2s_label": "teacher", "alignment": "exact_tokens"},
            {"label": "teacher", "alignment": "exact_tokens"},
        ),
        ("dskd_cma", {"projector_init": "pseudo_inverse"}, {"projector_init": "pseudo_inverse"}),
        ("dskd_eta", {"projector_init": "random"}, {"projector_init": "random"}),
    ],
)
def test_method_row(method, settings, changes, tmp_path):
    config = runs.config(tmp_path, method=method, **settings)
    assert config.method_row == replace(METHODS[method], **changes)
    assert (config.method_row == METHODS[method]) == (not changes)


def test_what_a_changed_row_needs(tmp_path):
    row = runs.config(tmp_path, method="dskd_cma", alignment="identity").method_row
    assert row.same_vocabulary and not row.has_queries and not row.needs_chunks and row.dual_space
    row = runs.config(tmp_path, method="dskd", alignment="chunk_attention", spaces="teacher").method_row
    assert row.has_queries and row.needs_chunks and row.dual_space and row.needs_teacher and not row.same_vocabulary


# ---- Combinations and values that mean nothing

PART_VALUES = {
    "alignment": "identity",
    "spaces": "student",
    "matching": "none",
    "teacher_value": "state",
    "t2s_label": "response",
    "projector_init": "random",
}
REFUSED = [
    # Parts of a dual-space method for others.
    *(
        (
            {"method": method, name: value},
            f"{name}='{value}' means nothing for method='{method}': it needs one of dskd",
        )
        for method, (name, value) in zip(NOT_DUAL, PART_VALUES.items())
    ),
    # Values that there aren't.
    *(({"method": "dskd_cma", name: "x"}, f"{name}='x' is unknown: ") for name in PART_VALUES),
    ({"method": "dskd_cma", "alignment": "exact_token"}, "did you mean 'exact_tokens'?"),
    ({"method": "dskd_cma", "alignment": "chunks"}, "alignment='chunks' is unknown"),
    ({"method": "dskd_cma", "spaces": "logits"}, f"one of {', '.join(SPACES)}"),
    ({"method": "dskd_cma", "matching": "mmmd"}, "did you mean 'mmd'?"),
    # Matching without queries.
    *(
        (
            {"method": "dskd_cma_ga", "alignment": name},
            f"matching='gan' needs queries and keys, which alignment='{name}'",
        )
        for name, alignment in ALIGNMENTS.items()
        if "queries" not in alignment.needs
    ),
    ({"method": "dskd_clp", "matching": "mmd"}, "matching='mmd' needs queries and keys, which alignment='chunk_mean'"),
    # The teacher's own prediction where its tokens are mixed.
    ({"method": "dskd_cma", "t2s_label": "teacher"}, "t2s_label='teacher' needs one teacher token per student token"),
    (
        {"method": "dskd_cla", "t2s_label": "teacher"},
        "alignment='chunk_attention' doesn't give: set alignment to exact",
    ),
    ({"method": "dskd_clp", "t2s_label": "teacher"}, "alignment='chunk_mean' doesn't give"),
    ({"method": "dskd_eta", "alignment": "chunk_mean"}, "alignment='chunk_mean' doesn't give"),
    # What the released code doesn't have.
    *(
        ({"method": method, "as_published": True}, f"method='{method}' isn't in the released code, which has sft, kd")
        for method in ("seq_kd", "dskd_eta", "min_edit", "alm")
    ),
    *(
        (
            {"method": "dskd_cma", "as_published": True, name: value},
            f"as_published=True: the released code has no {name};",
        )
        for name, value in PART_VALUES.items()
    ),
    ({"method": "dskd_cma", "as_published": True, "on_policy_fraction": 0.5}, "has no on_policy_fraction;"),
    ({"method": "dskd_cma", "as_published": True, "student_temperature": 1.0}, "has no student_temperature;"),
    # Learning one's own samples.
    ({"method": "sft", "on_policy_fraction": 0.5}, "on_policy_fraction=0.5: method='sft' would learn"),
    ({"method": "seq_kd", "on_policy_fraction": 1.0}, "on_policy_fraction=1.0: method='seq_kd' would learn"),
    *(
        ({"on_policy_fraction": value}, f"on_policy_fraction={value} is outside [0, 1]: the papers use 0.5")
        for value in (-0.1, 1.5, float("nan"))
    ),
    # Bounds.
    *(
        (
            {"method": "alm", "alm_bias_threshold": value},
            f"alm_bias_threshold={value} is outside (0, 1): the paper has",
        )
        for value in (0.0, 1.0, -0.5, 2.0, float("nan"))
    ),
    *(
        ({name: value}, f"{name}={value} is outside (0, 1): the papers use ")
        for name in ("js_weight", "skew_lambda", "adaptive_kl_alpha")
        for value in (0.0, 1.0, -0.1, float("nan"))
    ),
    *(
        ({name: value}, f"{name}={value} must be above 0")
        for name in (
            "kd_temperature",
            "student_temperature",
            "teacher_temperature",
            "teacher_space_temperature",
            "alm_temperature",
        )
        for value in (0.0, -1.0, float("nan"))
    ),
    ({"temperature_schedule": "linear", "final_kd_temperature": 0.0}, "final_kd_temperature=0.0 must be above 0"),
    # A schedule is a kind and an end.
    (
        {"temperature_schedule": "linear"},
        "temperature_schedule='linear' and final_kd_temperature=None belong together",
    ),
    (
        {"temperature_schedule": "cosine"},
        "temperature_schedule='cosine' and final_kd_temperature=None belong together",
    ),
    ({"final_kd_temperature": 1.0}, "temperature_schedule='constant' and final_kd_temperature=1.0 belong together"),
    ({"temperature_schedule": "cosin"}, "temperature_schedule='cosin' is unknown: did you mean 'cosine'?"),
    ({"temperature_scaling": "tau"}, "temperature_scaling='tau' is unknown: did you mean 'tau_squared'?"),
    (
        {"student_space_divergence": "revers_kl"},
        "student_space_divergence='revers_kl' is unknown: did you mean 'reverse",
    ),
    ({"teacher_space_divergence": "jss"}, "teacher_space_divergence='jss' is unknown: did you mean 'js'?"),
    ({"alm_divergence": "symmetric_kl"}, "alm_divergence='symmetric_kl' is unknown: "),
    *(
        ({"discriminator_lr_scheduler_type": name}, f"discriminator_lr_scheduler_type={name!r} is unknown: ")
        for name in ("reduce_lr_on_plateau", "cosine_with_min_lr", "warmup_stable_decay")
    ),
    ({"optim": "galore_adamw_layerwise"}, "optim='galore_adamw_layerwise' updates"),
    ({"optim": "lomo"}, "leave the projectors of method='dskd_cma_ga' as they are"),
]


@pytest.mark.parametrize("settings, expected", REFUSED, ids=[f"{i}-{','.join(s)}" for i, (s, _) in enumerate(REFUSED)])
def test_refused(settings, expected, tmp_path):
    with pytest.raises(UserError) as error:
        runs.config(tmp_path, **settings)
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"on_policy_fraction": 1.0},
        {"method": "alm", "alm_bias_threshold": 0.1, "alm_temperature": 1.0},
        {"temperature_schedule": "linear", "final_kd_temperature": 1.0},
        {"temperature_schedule": "cosine", "final_kd_temperature": 4.0, "temperature_scaling": "tau_squared"},
        {"divergence": "js", "js_weight": 0.9, "student_space_divergence": "reverse_kl"},
        {"method": "dskd_cma", "as_published": True, "teacher_temperature": 2.0, "teacher_space_divergence": "js"},
        *({"method": name, "as_published": True} for name in ("sft", "kd", "dskd", "dskd_cma_ct", "dskd_clp", "uld")),
        *({"adversarial_loss": name} for name in ADVERSARIAL_LOSSES),
        *({"temperature_scaling": name} for name in TEMPERATURE_SCALINGS),
        {"method": "sft", "optim": "lomo"},
    ],
)
def test_accepted(settings, tmp_path):
    config = runs.config(tmp_path, **settings)
    assert all(getattr(config, name) == value for name, value in settings.items())


@pytest.mark.parametrize("what", ["save", "eval", "logging"])
def test_every_0_steps_where_the_strategy_says_never(what, tmp_path):
    never = runs.config(tmp_path, **{f"{what}_steps": 0, f"{what}_strategy": "no"})
    assert getattr(never, f"{what}_steps") == 0
    with pytest.raises(UserError, match=f"{what}_steps=0 must be above 0"):
        runs.config(tmp_path, **{f"{what}_steps": 0, f"{what}_strategy": "steps"})


def test_nothing_is_logged_or_saved_in_a_run_that_says_so(tmp_path):
    trainer = runs.trainer(
        tmp_path, max_steps=2, logging_steps=0, logging_strategy="no", save_steps=0, save_strategy="no"
    )
    trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    assert not [entry for entry in trainer.state.log_history if "loss" in entry]


def test_every_schedule_of_the_discriminator_can_be_made():
    optimizer = torch.optim.SGD([torch.zeros(1)], 1.0)
    for name in DISCRIMINATOR_SCHEDULES:
        schedule = get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=3)
        optimizer.step()
        schedule.step()


def test_the_best_checkpoint_is_that_of_the_fewest_bits_per_byte(tmp_path):
    """Not of the least eval_loss, which moves with the discriminator and with temperature schedules."""
    chosen = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    for settings, expected in (
        (chosen, ("bits_per_byte", False)),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, ("bits_per_byte", False)),
        ({**chosen, "metric_for_best_model": "eval_x_bits_per_byte"}, ("eval_x_bits_per_byte", False)),
        ({**chosen, "metric_for_best_model": "rouge_l"}, ("rouge_l", True)),
        ({**chosen, "metric_for_best_model": "loss"}, ("loss", False)),
        ({**chosen, "greater_is_better": True}, ("bits_per_byte", True)),
        ({}, (None, None)),
    ):
        config = runs.config(tmp_path, **settings)
        assert (config.metric_for_best_model, config.greater_is_better) == expected
