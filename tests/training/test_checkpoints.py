"""A run goes on from a whole checkpoint of its own, with its own settings, or says what is in the way."""

import json
import os
import shutil
import signal
import stat

import pytest
import runs
import test_resume
import tiny
import torch
from peft import AdaLoraConfig, LoraConfig
from safetensors import safe_open
from transformers import GPT2LMHeadModel
from warm import forked

from hf_dskd.errors import UserError
from hf_dskd.training import run_folder as checkpoint_files
from hf_dskd.training.resume import damage, differences, rates, set_rates, trajectory
from hf_dskd.training.run_folder import recover


LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], task_type="CAUSAL_LM")
KINDS = {
    "full": {},
    "lora": {"peft_config": LORA},
    "transport": {"method": "dskd_cma_ct"},
    "sft": {"method": "sft"},
}


def make(folder, kind="full", **settings):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "rows": 12, **KINDS[kind], **settings}
    return runs.trainer(folder, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of finished runs, by kind."""
    folder = tmp_path_factory.mktemp("made")
    for kind in KINDS:
        make(folder / kind, kind).train()
    # As a large student is saved.
    shutil.copytree(folder / "full", folder / "sharded")
    for place in (folder / "sharded").glob("checkpoint-*"):
        model = GPT2LMHeadModel.from_pretrained(place)
        (place / "model.safetensors").unlink()
        model.save_pretrained(place, max_shard_size="200KB")
    return folder


def files(made, kind):
    """What a resume reads of its last checkpoint."""
    names = ["trainer_state.json", "auxiliary.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
    names += {"sft": [], "transport": ["projectors.safetensors", "transport_critics.safetensors"]}.get(
        kind, ["projectors.safetensors", "discriminator.safetensors"]
    )
    names += [] if kind == "sft" else ["discriminator_optimizer.pt"]
    place = made / kind / "checkpoint-3"
    shards = sorted(path.name for path in place.glob("model-0*.safetensors"))
    weights = {"lora": ["adapter_model.safetensors"], "sharded": ["model.safetensors.index.json", *shards[1:2]]}
    return names + weights.get(kind, ["model.safetensors"])


@pytest.mark.parametrize("kind", [*KINDS, "sharded"])
def test_every_file_that_is_read_is_looked_at_first(kind, made, tmp_path):
    shutil.copytree(made / kind, tmp_path / "run")
    place = tmp_path / "run" / "checkpoint-3"
    run = make(tmp_path / "run", "full" if kind == "sharded" else kind)
    before = runs.weights(run)
    for name in files(made, kind):
        whole = (place / name).read_bytes()
        for content, resume in ((None, True), (whole[:-9], str(place)), (b"", True), (b"\0" * len(whole), True)):
            (place / name).unlink(missing_ok=True)
            if content is not None:
                (place / name).write_bytes(content)
            with pytest.raises(UserError) as error:
                run.train(resume_from_checkpoint=resume)
            message = str(error.value)
            assert name in message and "\n" not in message, name
            assert f"go on from '{tmp_path / 'run' / 'checkpoint-2'}', the last whole one" in message
            (place / name).write_bytes(whole)
    after = runs.weights(run)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert damage(place, ["discriminator_optimizer.pt"] if kind != "sft" else [], 1) is None


def test_a_bit_that_has_turned_is_found(made, tmp_path):
    shutil.copytree(made / "full", tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-3" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"optimizer.pt can't be read .*checksum"):
        make(tmp_path / "run").train(resume_from_checkpoint=True)


CHANGES = [
    {"seed": 1},
    {"data_seed": 7},
    {"train_dataset": tiny.dataset(11)},
    {"per_device_train_batch_size": 2},
    {"gradient_accumulation_steps": 2},
    {"max_length": 200},
    {"divergence": "forward_kl"},
    {"skew_lambda": 0.2},
    {"kd_temperature": 1.0},
    {"kd_rate": 0.3},
    {"discriminator_steps": 2},
    {"learning_rate": 5e-2},
    {"projector_learning_rate": 5e-2},
    {"discriminator_learning_rate": 5e-2},
    {"lr_scheduler_type": "linear"},
    {"adam_beta2": 0.9},
    {"weight_decay": 0.1},
    {"max_grad_norm": 0.5},
    {"bf16": True},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_a_changed_setting_is_named_and_may_be_allowed(change, made, tmp_path, caplog):
    shutil.copytree(made / "full", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    name = next(iter(change)).replace("train_dataset", "train_data")
    with pytest.raises(UserError, match=rf"{name} was .* and is .*--allow_changed_settings") as error:
        make(tmp_path / "run", **change).train(resume_from_checkpoint=True)
    assert "\n" not in str(error.value)
    if name not in ("seed", "train_data", "learning_rate", "bf16"):
        return
    run = make(tmp_path / "run", allow_changed_settings=True, **change)
    run.train(resume_from_checkpoint=True)
    assert f"goes on with other settings: {name} was" in caplog.text
    assert run.state.global_step == 3
    # What was allowed isn't a change any more.
    make(tmp_path / "run", **change).train(resume_from_checkpoint=True)


def test_what_is_allowed_takes_effect(made, tmp_path):
    """PyTorch's own loading would go on at the old rates."""
    shutil.copytree(made / "full", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    changed = {
        "learning_rate": 4e-3,
        "projector_learning_rate": 6e-3,
        "discriminator_learning_rate": 8e-3,
        "lr_scheduler_type": "linear",
        "discriminator_lr_scheduler_type": "linear",
        "weight_decay": 0.25,
        "discriminator_adam_beta1": 0.25,
        "max_steps": 4,
    }
    run = make(tmp_path / "run", allow_changed_settings=True, **changed)
    run.train(resume_from_checkpoint=True)
    rates = runs.history(run, "learning_rate", "projector_learning_rate", "discriminator_learning_rate")[-2:]
    assert rates == [pytest.approx((4e-3 * left / 4, 6e-3 * left / 4, 8e-3 * left / 4)) for left in (2, 1)]
    assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0.0, 0.25}
    assert run.adversary.optimizer.param_groups[0]["betas"][0] == 0.25


def test_what_cannot_change(made, tmp_path):
    other = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"], task_type="CAUSAL_LM")
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_dataset": tiny.dataset(2)}
    alpha = LoraConfig(r=4, lora_alpha=16, target_modules=["c_attn"], task_type="CAUSAL_LM")
    for kind, settings, expected in (
        ("full", {"optim": "sgd"}, r"optim was 'adamw_torch.* and is 'sgd'; optim can't change"),
        ("full", {"discriminator_hidden_size": 16}, "other discriminator than this run"),
        ("lora", {"peft_config": other}, "peft_config.r was 4 and is 8; peft_config.r can't change"),
        ("full", {"method": "dskd_cma"}, "is of another run: its method"),
        ("full", plateau, "lr_scheduler_type can't change"),
    ):
        run = make(tmp_path / "new", kind, allow_changed_settings=True, **settings)
        with pytest.raises(UserError, match=expected) as error:
            run.train(resume_from_checkpoint=str(made / kind / "checkpoint-2"))
        assert "\n" not in str(error.value)
    run = make(tmp_path / "new", "lora", peft_config=alpha)
    with pytest.raises(UserError, match=r"peft_config.lora_alpha was 8 and is 16; set as it was, or accept"):
        run.train(resume_from_checkpoint=str(made / "lora" / "checkpoint-2"))


def test_a_longer_run_at_constant_rates_is_the_same_run(made, tmp_path):
    run = make(tmp_path, max_steps=5)
    run.train(resume_from_checkpoint=str(made / "full" / "checkpoint-3"))
    whole = make(tmp_path / "whole", max_steps=5)
    whole.train()
    test_resume.assert_same(test_resume.state(whole), test_resume.state(run))
    with pytest.raises(UserError, match="max_steps was 3 and is 5"):
        make(tmp_path / "new", max_steps=5, temperature_schedule="linear", final_kd_temperature=1.0).train(
            resume_from_checkpoint=str(made / "full" / "checkpoint-3")
        )


def test_what_comes_after_a_change_is_not_left_beside_it(made, tmp_path):
    shutil.copytree(made / "full", tmp_path / "run")
    run = make(tmp_path / "run", learning_rate=1e-2, allow_changed_settings=True)
    with pytest.raises(UserError, match=r"checkpoint-3 comes after .*checkpoint-1.* delete what comes after"):
        run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    # With the same settings it comes again.
    make(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_checkpoint_of_an_earlier_version_goes_on_with_a_warning(kind, made, tmp_path, caplog):
    shutil.copytree(made / kind, tmp_path / "run")
    (tmp_path / "run" / ".run.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    for path in (tmp_path / "run").glob("*/auxiliary.json"):
        saved = json.loads(path.read_text())
        for name in ("settings", "run_id", "skipped_steps"):
            del saved[name]
        path.write_text(json.dumps(saved))
    run = make(tmp_path / "run", kind)
    run.train(resume_from_checkpoint=True)
    assert caplog.text.count("is of an earlier version") == 1
    expected = checkpoint_weights(made / kind / "checkpoint-3")
    assert checkpoint_weights(tmp_path / "run" / "checkpoint-3") == expected
    make(tmp_path / "run", kind, max_steps=4).train(resume_from_checkpoint=True)


def checkpoint_weights(folder):
    """Every tensor of a checkpoint's safetensors, as lists."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            found |= {(path.name, key): tensors.get_tensor(key).tolist() for key in tensors.keys()}
    return found


def test_links_are_rotated_and_what_they_lead_to_stays(tmp_path):
    run = make(tmp_path / "run", "sft", max_steps=2)
    run.train()
    (tmp_path / "run" / "checkpoint-1").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
    # One whose place is written anew.
    (tmp_path / "run" / "checkpoint-2").rename(tmp_path / "other")
    (tmp_path / "run" / "checkpoint-2").symlink_to(tmp_path / "other")
    again = make(tmp_path / "run", "sft", save_total_limit=1)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-3"]
    assert (tmp_path / "elsewhere" / "optimizer.pt").is_file() and (tmp_path / "other" / "optimizer.pt").is_file()


def test_another_runs_checkpoints_are_not_rotated_away(made, tmp_path):
    shutil.copytree(made / "sft" / "checkpoint-2", tmp_path / "checkpoint-2")
    make(tmp_path / "x", "sft", max_steps=1).train()
    own = checkpoint_files.run_id(tmp_path / "x" / "checkpoint-1")
    for step in (4, 5, 6):
        shutil.copytree(tmp_path / "x" / "checkpoint-1", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "auxiliary.json").write_text("{")
    checkpoint_files.rotate(tmp_path, 1, None, None)  # a run of an earlier version, which has none here
    checkpoint_files.rotate(tmp_path, 1, None, own)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3, 6)]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def replaced(source, target):
        events.append(("rename", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    make(tmp_path, max_steps=1).train()
    place = events.index(("rename", "checkpoint-1"))
    written = {path.name for path in (tmp_path / "checkpoint-1").iterdir()} | {"checkpoint-1"}
    assert written <= set(events[:place]) and len(written) > 10
    assert tmp_path.name in events[place:]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = make(tmp_path_factory.mktemp("whole"))
    run.train()
    return test_resume.state(run)


# Where the process is killed while it writes the second checkpoint: a function, and what it is called with then.
MOMENTS = {
    "optimizer.pt": "torch, 'save', lambda value, path, *more: str(path).endswith('/optimizer.pt')",
    "auxiliary.json": "Path, 'write_text', lambda path, *more: path.name == 'auxiliary.json'",
    "fsync": "run_folder, '_sync', lambda path: path.name == 'scheduler.pt'",
    "rename": "os, 'replace', lambda source, target: Path(target).name == 'checkpoint-2'",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_while_a_checkpoint_is_written(moment, uninterrupted, tmp_path):
    code = f"""
import os, signal, sys
from pathlib import Path
import test_checkpoints, torch
from hf_dskd.training import run_folder

run = test_checkpoints.make(sys.argv[1])

def killing(place, name, matches):
    function = getattr(place, name)
    def killed(*args, **kwargs):
        if run.state.global_step == 2 and matches(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    setattr(place, name, killed)

killing({MOMENTS[moment]})
run.train()
"""
    killed = forked(code, tmp_path / "run")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    resumed = make(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    test_resume.assert_same(uninterrupted, test_resume.state(resumed))
    assert not list((tmp_path / "run").glob(".incomplete"))


def test_a_checkpoint_whose_replacement_was_interrupted_is_put_back(tmp_path):
    for name in (".old-checkpoint-1", ".old-checkpoint-2", "checkpoint-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    recover(tmp_path)
    assert {path.name for path in tmp_path.glob("*/*")} == {".old-checkpoint-1", "checkpoint-2"}
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2"}


def test_an_adapter_that_was_added_to_a_model_of_transformers(tmp_path):
    student = tiny.gpt2(len(runs._STUDENT_TOKENIZER))
    student.add_adapter(LORA)
    run = make(tmp_path, "sft", student=student)
    run.train()
    saved = json.loads((tmp_path / "checkpoint-3" / "auxiliary.json").read_text())["settings"]
    assert saved["peft_config.r"] == 4
    with pytest.raises(UserError, match="pass the model without its adapter, and peft_config") as error:
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "\n" not in str(error.value)


def test_folders_that_cannot_be_synced(tmp_path, monkeypatch):
    sync = os.fsync

    def files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    run = make(tmp_path, "sft", max_steps=1)
    run.train()
    assert (tmp_path / "checkpoint-1").is_dir()

    def none(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", none)
    with pytest.raises(UserError, match=r"checkpoint-1 could not be saved .*No space left"):
        make(tmp_path / "full", "sft", max_steps=1).train()


def test_other_data_in_the_same_trainer(tmp_path):
    run = make(tmp_path, "sft", max_steps=2)
    run.train()
    run.args.max_steps = 3
    run.train_dataset = run.train_dataset.select(range(11))
    with pytest.raises(UserError, match="train_data was"):
        run.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["model_init_kwargs", "teacher_model_init_kwargs"])
def test_settings_of_the_models_are_compared(name):
    def said(**options):
        return trajectory(runs.config("x", **({name: options} if options else {})), 1, None)

    elsewhere = {"token": "hf_" + "a" * 30, "cache_dir": "/x", "revision": "main", "attn_implementation": "eager"}
    assert differences(said(), said(**elsewhere), False) == {}
    for options in ({"attn_pdrop": 0.1}, {"revision": "v2"}):
        assert differences(said(**options, cache_dir="/x"), said(), False) == {name: (options, {})}
    bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert differences(said(), said(quantization_config=bits), False) == {name: ({}, {"quantization": bits})}


def test_ranks_that_adalora_has_allocated_are_no_setting():
    ranks = {"rank_pattern": {"h.0.attn.c_attn": [True, False]}}
    config, plain = runs.config("x"), {"target_modules": ["c_attn"]}
    one, two = (trajectory(config, 1, None, AdaLoraConfig(total_step=9, **plain, **more)) for more in ({}, ranks))
    assert differences(one, two, False) == {} and one["peft_config.peft_type"] == "ADALORA"
    ranks = {"rank_pattern": {"c_attn": 2}}
    one, two = (trajectory(config, 1, None, LoraConfig(**plain, **more)) for more in ({}, ranks))
    assert differences(one, two, False).keys() == {"peft_config.rank_pattern"}


def test_states_in_the_groups_of_an_optimizer_stay():
    """As schedule-free optimizers and Prodigy have them."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=1e-2, weight_decay=0.5)
    kept = rates(optimizer, None)
    kept[0][0].update(k=0, weight_sum=0.0, d=1e-6)
    optimizer.param_groups[0].update(k=7, weight_sum=0.25, d=1e-3, weight_decay=0.1, lr=1e-3, betas=(0.5, 0.6))
    set_rates(optimizer, None, kept)
    group = optimizer.param_groups[0]
    assert (group["k"], group["weight_sum"], group["d"]) == (7, 0.25, 1e-3)
    assert (group["weight_decay"], group["betas"], group["lr"]) == (0.5, (0.9, 0.999), 1e-3)
