"""What a configuration makes of a method's row, and combinations that it takes."""

from dataclasses import replace

import pytest
import runs
import torch
from transformers import get_scheduler

from hf_dskd.errors import UserError
from hf_dskd.methods import ALIGNMENTS, MATCHINGS, METHODS
from hf_dskd.settings import DISCRIMINATOR_SCHEDULES


def test_what_methods_need():
    def names(of):
        return {name for name, row in METHODS.items() if of(row)}

    assert names(lambda row: not row.needs_teacher) == {"sft", "seq_kd"}
    assert names(lambda row: not row.dual_space) == {"sft", "seq_kd", "kd", "uld", "min_edit", "alm", "bpm"}
    assert names(lambda row: row.has_queries) == {"dskd_cma", "dskd_cma_ga", "dskd_cma_ct", "dskd_cla"}
    assert names(lambda row: row.needs_chunks) == {"dskd_clp", "dskd_cla", "dskd_eta", "alm", "bpm"}
    assert names(lambda row: row.same_vocabulary) == {"kd", "dskd"}


# ---- Parts of a row that settings replace


@pytest.mark.parametrize(
    "method, settings, changes",
    [
        *(("dskd_clp", {"alignment": name}, {"alignment": name}) for name in ALIGNMENTS if name != "chunk_mean"),
        *(("dskd_cma", {"matching": name}, {"matching": name}) for name in MATCHINGS),
        ("dskd_cma_ga", {"matching": "none"}, {"matching": None}),
        ("dskd_cma_ga", {"alignment": "identity", "matching": "none"}, {"alignment": "identity", "matching": None}),
        ("dskd", {"spaces": "both"}, {}),
        ("dskd_clp", {"alignment": "chunk_mean"}, {}),
        ("dskd", {"spaces": "student"}, {"spaces": ("student",)}),
        ("dskd_clp", {"spaces": "teacher"}, {"spaces": ("teacher",)}),
        ("dskd_cma", {"teacher_value": "state"}, {"teacher_value": "state"}),
        ("dskd_eta", {"teacher_value": "state_and_target"}, {"teacher_value": "state_and_target"}),
        ("dskd_eta", {"t2s_label": "response"}, {"label": "response"}),
        ("dskd", {"t2s_label": "teacher"}, {"label": "teacher"}),
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


# ---- What is taken (what is refused is in test_bad_inputs.py)


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
        {"adversarial_loss": "non_saturating"},
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
