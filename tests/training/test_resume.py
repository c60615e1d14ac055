"""A run that stops after any step and goes on ends where an uninterrupted one ends, to the last bit."""

import signal

import pytest
import runs
import tiny
import torch
from peft import LoraConfig
from warm import forked


STEPS = 4
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")


def make(folder, adapter, method="dskd_cma_ga", max_steps=STEPS, save_steps=1, **settings):
    return runs.trainer(
        folder,
        student=tiny.gpt2(len(runs._STUDENT_TOKENIZER), dropout=0.1),
        peft_config=LORA if adapter else None,
        method=method,
        rows=12,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,  # three steps an epoch: the run crosses one
        max_steps=max_steps,
        save_strategy="steps",
        save_steps=save_steps,
        lr_scheduler_type="cosine",
        discriminator_lr_scheduler_type="linear",
        discriminator_dropout=0.2,
        discriminator_steps=2,
        **settings,
    )


def state(run):
    tensors = runs.weights(run)
    optimizers = {"main": run.optimizer}
    if run.adversary is not None:
        optimizers["discriminator"] = run.adversary.optimizer
    for name, optimizer in optimizers.items():
        for key, values in optimizer.state_dict()["state"].items():
            for part, value in values.items():
                tensors[f"{name}.{key}.{part}"] = torch.as_tensor(value).clone()
    return tensors


def assert_same(one, two):
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different, different[:5]


# What an adapter adds hangs on no method.
WITH_ADAPTERS = ("sft", "dskd_cma_ga", "alm", "attention")


@pytest.mark.parametrize(
    "case, adapter",
    [pytest.param(case, False, id=f"{case}-full") for case in runs.CASES]
    + [pytest.param(case, True, id=f"{case}-lora") for case in WITH_ADAPTERS],
)
def test_resume_is_bit_exact(adapter, case, tmp_path):
    """After every step for one method of each kind, after one in the middle of an epoch for the others."""
    saves = {"save_steps": 1 if case in ("sft", "dskd_cma_ga") else 2}
    whole = make(tmp_path / "whole", adapter, **saves, **runs.CASES[case])
    whole.train()
    expected = state(whole)
    for step in range(saves["save_steps"], STEPS, saves["save_steps"]):
        resumed = make(tmp_path / "resumed", adapter, **saves, **runs.CASES[case])
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(expected, state(resumed))
        assert resumed.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()
        if whole.adversary is not None:
            assert resumed.adversary.scheduler.state_dict() == whole.adversary.scheduler.state_dict()


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_resume_after_the_last_step_adds_none(adapter, tmp_path):
    """Stopped between the last step and the final save; Trainer itself would train one step more."""
    whole = make(tmp_path / "whole", adapter)
    whole.train()
    resumed = make(tmp_path / "resumed", adapter)
    output = resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{STEPS}"))
    assert output.global_step == resumed.state.global_step == STEPS
    assert_same(runs.weights(whole), runs.weights(resumed))


def test_killed_process_resumes_bit_exactly(tmp_path):
    """SIGKILL in the middle of the run, as a preempted machine would."""
    code = (
        "import sys, os, signal\n"
        "import test_resume\n"
        "from transformers import TrainerCallback\n"
        "class Kill(TrainerCallback):\n"
        "    def on_substep_end(self, args, state, control, **kwargs):\n"
        "        if state.global_step == 3:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "test_resume.make(sys.argv[1], False, callbacks=[Kill()]).train()\n"
    )
    killed = forked(code, tmp_path / "run")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    resumed = make(tmp_path / "run", False)
    resumed.train(resume_from_checkpoint=True)
    whole = make(tmp_path / "whole", False)
    whole.train()
    assert_same(state(whole), state(resumed))
