import inspect
import json
import math
import re

import pytest
import runs
import tiny
import torch
from datasets import concatenate_datasets
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_dskd import DSKDTrainer, NonFiniteLossError
from hf_dskd.errors import UserError
from hf_dskd.losses.matching import Features


LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")


# ---- Two optimizers


def test_discriminator_learns_on_fixed_features(tmp_path):
    run = runs.trainer(tmp_path, discriminator_learning_rate=1e-2)
    run.create_optimizer()
    run.create_scheduler(10)
    before = runs.weights(run)
    queries, keys = torch.randn(20, 256) + 0.5, torch.randn(24, 256)
    losses = []
    for _ in range(10):
        masks = torch.ones(1, 20, dtype=torch.bool), torch.ones(1, 24, dtype=torch.bool)
        run.adversary.keep(Features(queries[None], keys[None], *masks, torch.arange(20), torch.arange(24)))
        report = run.adversary.update(torch.tensor(20), torch.tensor(24), run.accelerator)
        losses.append((report["discriminator_query_loss"] / 20 + report["discriminator_key_loss"] / 24).item())
    assert losses[-1] < 0.8 * losses[0]
    after = runs.weights(run)
    for name in after:
        assert torch.equal(before[name], after[name]) == (not name.startswith("critic")), name


def test_projectors_are_averaged_before_a_scaler_looks(tmp_path, monkeypatch):
    """Another rank's overflow must reach this one's search for overflows, so that both skip the step."""
    events = []
    monkeypatch.setattr(
        "hf_dskd.training.steps.reduce_over_ranks", lambda parameters, *_: events.append(("averaged", len(parameters)))
    )
    run = runs.trainer(tmp_path, gradient_accumulation_steps=2, max_steps=2)
    unscale = run.accelerator.clip_grad_norm_
    monkeypatch.setattr(
        run.accelerator,
        "clip_grad_norm_",
        lambda *args, **kwargs: events.append("clipped") or unscale(*args, **kwargs),
    )
    run.train()
    assert events == [("averaged", 6), "clipped"] * 2


def test_a_training_that_begins_again_has_nothing_left_of_the_interrupted_one(tmp_path):
    class Look(TrainerCallback):
        def on_substep_end(self, *args, **kwargs):
            if self.interrupts:
                self.interrupts = False
                raise KeyboardInterrupt

        def on_step_begin(self, *args, **kwargs):
            self.left.append([p.grad is not None for p in run.projectors.parameters()])
            self.features.append(len(run.adversary._features))

    look = Look()
    look.interrupts, look.left, look.features = True, [], []
    run = runs.trainer(tmp_path, gradient_accumulation_steps=2, max_steps=1, callbacks=[look])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert any(p.grad is not None for p in run.projectors.parameters())
    run.train()
    assert not any(look.left[1]) and look.features == [0, 0]


def test_discriminator_steps(tmp_path):
    steps = []
    for count in (1, 3):
        run = runs.trainer(tmp_path / str(count), discriminator_steps=count, max_steps=2)
        run.train()
        steps.append(run.adversary.optimizer.state_dict()["state"][0]["step"].item())
    assert steps == [2, 6]


def test_matching_draws_nothing_from_the_students_random_numbers(tmp_path):
    """CMA and GA on one seed see the same dropout: with kq_rate 0 the students are equal to the last bit."""
    finals = []
    for method in ("dskd_cma", "dskd_cma_ga"):
        run = runs.trainer(
            tmp_path / method,
            method=method,
            kq_rate=0.0,
            discriminator_dropout=0.3,
            student=tiny.gpt2(len(runs._STUDENT_TOKENIZER), dropout=0.1),
        )
        run.train()
        finals.append({k: v for k, v in runs.weights(run).items() if k.startswith("student")})
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


# ---- Precision and memory


def test_bf16_autocast_reaches_student_teacher_and_projectors(tmp_path):
    run = runs.trainer(tmp_path, bf16=True, max_steps=1)
    assert run.model.dtype == torch.float32
    seen = {}

    def note(name):
        def hook(module, args, output):
            seen[name] = output.dtype

        return hook

    run.model.transformer.h[0].mlp.c_fc.register_forward_hook(note("student"))
    run.teacher.model.model.layers[0].mlp.gate_proj.register_forward_hook(note("teacher"))
    for name, projector in run.projectors.named_children():
        projector.register_forward_hook(note(name))
    run.adversary.critic.linear1.register_forward_hook(note("discriminator"))
    run.train()
    assert {seen[name] for name in ("student", "teacher", "query", "s2t", "t2s")} == {torch.bfloat16}
    assert seen["discriminator"] == torch.float32
    assert all(p.dtype == torch.float32 for p in run.projectors.parameters())


def test_bf16_losses_are_close_to_float32(tmp_path):
    logs = []
    for bf16 in (False, True):
        run = runs.trainer(tmp_path / str(bf16), bf16=bf16)
        run.train()
        logs.append(torch.tensor(runs.history(run, "ce_loss", "t2s_ce_loss", "s2t_kd_loss", "kq_loss")))
    torch.testing.assert_close(logs[0], logs[1], rtol=3e-2, atol=3e-2)


def with_scaler(run, scaler):
    """What accelerate does for fp16 on a GPU, on the CPU: one scaler around the main optimizer."""
    run.accelerator.scaler = scaler
    run.accelerator.backward = lambda loss: scaler.scale(loss).backward()
    run.accelerator.unscale_gradients = lambda optimizer=None: scaler.unscale_(run.optimizer.optimizer)
    return run


def test_fp16_scaler_steps_each_optimizer_once(tmp_path, monkeypatch):
    """The scale must not reach an update: 1,024 times too small would go unnoticed."""
    updates = []
    update = torch.amp.GradScaler.update
    monkeypatch.setattr(torch.amp.GradScaler, "update", lambda self: (updates.append(1), update(self)))
    finals = []
    for scale in (None, 1024.0):
        run = runs.trainer(tmp_path / str(scale), optim="adamw_torch", max_steps=2)
        if scale is not None:
            with_scaler(run, torch.amp.GradScaler("cpu", init_scale=scale))
        run.train()
        finals.append(runs.weights(run))
        for optimizer in (run.optimizer, run.adversary.optimizer):
            assert {int(state["step"]) for state in optimizer.state_dict()["state"].values()} == {2}
    assert len(updates) == 2
    for name in finals[0]:
        torch.testing.assert_close(finals[0][name], finals[1][name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_fp16_overflow_skips_every_part_and_lowers_the_scale(optim, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    settings = {"lr_scheduler_type": "linear", "discriminator_lr_scheduler_type": "linear"}
    run = with_scaler(runs.trainer(tmp_path, optim=optim, max_steps=1, **settings), scaler)
    run.model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = runs.weights(run)
    run.train()
    after = runs.weights(run)
    assert not [name for name in after if not torch.equal(before[name], after[name])]
    assert run.lr_scheduler.last_epoch == run.adversary.scheduler.last_epoch == 0
    assert scaler.get_scale() == 512.0 and run.skipped_steps == 0


def test_fp16_that_overflows_at_any_scale_is_not_the_scales_fault(tmp_path):
    run = runs.trainer(tmp_path, optim="adamw_torch", max_steps=9, logging_steps=9)
    with_scaler(run, torch.amp.GradScaler("cpu", init_scale=4.0))
    run.model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteLossError, match=r"at a loss scale of 1, became NaN or infinite at step 2 "):
        run.train()


def test_nf4_teacher_with_lora_student(tmp_path):
    pytest.importorskip("bitsandbytes")
    teacher = tiny.qwen2(len(runs._TEACHER_TOKENIZER))
    teacher.save_pretrained(tmp_path / "teacher")
    runs._TEACHER_TOKENIZER.save_pretrained(tmp_path / "teacher")
    run = runs.trainer(
        tmp_path / "run",
        teacher=str(tmp_path / "teacher"),
        load_teacher_in_4bit=True,
        peft_config=LORA,
        bf16=True,
        max_steps=3,
    )
    linear = run.teacher.model.model.layers[0].mlp.gate_proj
    assert type(linear).__name__ == "Linear4bit"
    assert linear.weight.quant_state.quant_type == "nf4"
    assert linear.compute_dtype == torch.bfloat16
    assert run.teacher.head.weight.shape == (len(runs._TEACHER_TOKENIZER), 128)
    before = runs.weights(run)
    run.train()
    after = runs.weights(run)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert any("lora_A" in name for name in moved) and not any("base_layer" in name for name in moved)


@pytest.mark.parametrize("peft_config", [None, LORA])
def test_gradient_checkpointing_changes_nothing(peft_config, tmp_path):
    run = runs.trainer(tmp_path, gradient_checkpointing=True, peft_config=peft_config, max_steps=2)
    run.train()
    reference = runs.trainer(tmp_path / "reference", peft_config=peft_config, max_steps=2)
    reference.train()
    for name, value in runs.weights(reference).items():
        torch.testing.assert_close(runs.weights(run)[name], value, rtol=1e-4, atol=1e-5)


def test_torch_compile(tmp_path):
    losses = []
    for compiled in (False, True):
        run = runs.trainer(
            tmp_path / str(compiled),
            max_steps=2,
            torch_compile=compiled,
            **({"torch_compile_backend": "aot_eager"} if compiled else {}),
        )
        run.train()
        losses.append(torch.tensor(runs.history(run, "loss", "s2t_kd_loss")))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


# ---- Pairs


def pair(kind):
    models = {
        "gpt2": (tiny.gpt2, tiny.byte_level_tokenizer()),
        "qwen2": (tiny.qwen2, tiny.byte_level_tokenizer()),
        "llama": (tiny.llama, tiny.sentencepiece_tokenizer()),
    }
    make, tokenizer = models[kind]
    return make(len(tokenizer)), tokenizer


@pytest.mark.parametrize(
    "student, teacher",
    [("llama", "gpt2"), ("qwen2", "llama"), ("gpt2", "llama")],
)
def test_byte_level_and_sentencepiece_both_ways(student, teacher, tmp_path):
    """The published code fails on a GPT-2 teacher and knows two families."""
    (student_model, student_tokenizer), (teacher_model, teacher_tokenizer) = pair(student), pair(teacher)
    teacher_model = type(teacher_model)(teacher_model.config)  # a model of its own where the kinds are equal
    run = runs.trainer(
        tmp_path,
        student=student_model,
        teacher=teacher_model,
        processing_class=student_tokenizer,
        teacher_processing_class=teacher_tokenizer,
        max_steps=8,
        learning_rate=5e-3,
    )
    run.train()
    losses = runs.history(run, "ce_loss", "t2s_ce_loss")
    assert losses[-1][0] < losses[0][0] and losses[-1][1] < losses[0][1]


# ---- What a run leaves behind


def test_chat_template_kwargs_and_a_template_of_the_day(tmp_path, caplog):
    student, teacher = tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()
    student.chat_template = "{{ messages[0].content }}{% if think is defined %}[{{ think }}]{% endif %}"
    teacher.chat_template = "{{ date_string or strftime_now('%Y') }} {{ messages[0].content }}"
    prompt = tiny.dataset(1)[0]["prompt"]

    def prompts(given):
        run = runs.trainer(
            *(tmp_path,), processing_class=student, teacher_processing_class=teacher, chat_template_kwargs=given
        )
        row = run.train_dataset[0]
        sides = ((student, ""), (teacher, "teacher_"))
        return [tokenizer.decode(row[f"{side}input_ids"][: row[f"{side}prompt_length"]]) for tokenizer, side in sides]

    found = prompts('{"think": false, "date_string": "then"}')
    assert [text.strip() for text in found] == [f"{prompt}[False]".strip(), f"then {prompt}".strip()]
    assert "today's date" not in caplog.text
    found = prompts(None)
    assert found[0].strip() == prompt.strip() and re.match(r"20\d\d ", found[1])
    assert "the teacher's chat template writes today's date" in caplog.text


def test_saved_student_is_a_plain_model_with_its_tokenizer(tmp_path):
    run = runs.trainer(tmp_path)
    run.train()
    run.save_model(str(tmp_path / "final"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert tokenizer.get_vocab() == runs._STUDENT_TOKENIZER.get_vocab()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, dict(run.model.named_parameters())[name], rtol=0, atol=0)
    assert not any("projector" in name or "discriminator" in name for name in model.state_dict())
    said = json.loads((tmp_path / "final" / "auxiliary.json").read_text())
    assert said["method"] == "dskd_cma_ga"
    for name, module in (("projectors", run.projectors), ("discriminator", run.adversary.critic)):
        saved = load_file(tmp_path / "final" / said["modules"][name]["file"])
        for key, value in module.state_dict().items():
            torch.testing.assert_close(saved[key], value, rtol=0, atol=0)
            assert said["modules"][name]["shapes"][key] == list(value.shape)


def test_logs_name_everything_a_run_shows(tmp_path):
    run = runs.trainer(tmp_path, eval_dataset=tiny.dataset(6), eval_strategy="steps", eval_steps=2, max_steps=2)
    run.train()
    log = next(log for log in run.state.log_history if "loss" in log)
    assert set(log) >= {
        *("ce_loss", "t2s_ce_loss", "t2s_kd_loss", "s2t_kd_loss", "kq_loss", "discriminator_loss"),
        *("discriminator_accuracy_real", "discriminator_accuracy_fake", "correctness_mask_rate"),
        *("grad_norm", "projector_grad_norm", "discriminator_grad_norm", "learning_rate"),
        *("projector_learning_rate", "discriminator_learning_rate", "response_tokens_per_second"),
    }
    evaluation = next(log for log in run.state.log_history if "eval_loss" in log)
    assert {"eval_bits_per_byte", "eval_ce_loss", "eval_t2s_accuracy"} <= set(evaluation)


def test_logging_reads_the_device_once(tmp_path, monkeypatch):
    run = runs.trainer(tmp_path, max_steps=2, logging_steps=2)
    reads = []
    read = type(run.running_log)._read

    def counted(self, *args, **kwargs):
        reads.append(kwargs)
        return read(self, *args, **kwargs)

    monkeypatch.setattr(type(run.running_log), "_read", counted)
    run.train()
    assert sum(kwargs.get("with_sums", False) for kwargs in reads) == 1


def test_bits_per_byte_against_the_models_own_loss(tmp_path):
    run = runs.trainer(tmp_path, method="sft")
    metrics = run.evaluate(run.train_dataset)
    nats = response_bytes = 0.0
    for row in run.train_dataset:
        ids = torch.tensor([row["input_ids"]])
        logp = torch.log_softmax(run.model.eval()(ids).logits[0].double(), -1)
        text = range(row["prompt_length"], len(row["input_ids"]) - (0 if row["cut"] else 1))
        nats -= sum(logp[i - 1, ids[0, i]].item() for i in text)
        response_bytes += row["response_bytes"]
    assert metrics["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / response_bytes, rel=1e-5)


def test_compute_metrics_sees_logits_and_labels(tmp_path):
    def accuracy(prediction):
        hits = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": hits[prediction.label_ids[:, 1:] != -100].mean()}

    run = runs.trainer(tmp_path, compute_metrics=accuracy)
    metrics = run.evaluate(run.train_dataset)
    assert metrics["eval_accuracy"] == pytest.approx(metrics["eval_token_accuracy"], abs=1e-6)
    # Of 400 logits a token, one number is kept.
    shapes = []
    run = runs.trainer(
        tmp_path,
        compute_metrics=lambda prediction: shapes.append(prediction.predictions.shape) or {},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    run.evaluate(run.train_dataset)
    assert len(shapes[0]) == 2


def test_predict_tokenizes_what_it_is_given(tmp_path):
    run = runs.trainer(tmp_path)
    text = tiny.dataset(6)
    metrics = run.predict(text).metrics
    assert metrics["test_bits_per_byte"] == run.evaluate(text)["eval_bits_per_byte"]


def test_every_row_counts_whatever_its_number(tmp_path):
    """Two tokenized sets, both numbered from 0."""
    run = runs.trainer(tmp_path, method="sft")
    parts = [tiny.dataset(8).select(rows) for rows in (range(3), range(3, 8))]
    tokenized = [run._preparation.tokenize(part, "eval") for part in parts]
    assert set(tokenized[0]["example_id"]) < set(tokenized[1]["example_id"])
    both = run.evaluate(concatenate_datasets(tokenized))["eval_bits_per_byte"]
    assert both == pytest.approx(run.evaluate(tiny.dataset(8))["eval_bits_per_byte"], rel=1e-9)


@pytest.mark.parametrize("method", ["dskd_cma_ga", "kd"])
def test_as_published_evaluates_what_has_an_exact_mean(method, tmp_path):
    plain, published = (
        runs.trainer(tmp_path, method=method, as_published=as_published, max_length=128).evaluate(tiny.dataset(6))
        for as_published in (False, True)
    )
    for name in ("eval_bits_per_byte", "eval_ce_loss", "eval_token_accuracy"):
        assert published[name] == pytest.approx(plain[name], rel=1e-5)


@pytest.mark.parametrize(
    "adapter",
    [
        PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    ],
    ids=["prompt tuning", "prefix tuning"],
)
def test_virtual_tokens_are_no_rows_of_the_text(adapter, tmp_path):
    run = runs.trainer(tmp_path, method="sft", peft_config=adapter)
    metrics = run.evaluate(run.train_dataset)
    nats = tokens = 0.0
    for row in run.train_dataset:
        ids, start = torch.tensor([row["input_ids"]]), row["prompt_length"]
        with torch.no_grad():
            logits = run.model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]
        nats += torch.nn.functional.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum").item()
        tokens += ids.shape[1] - start
    assert metrics["eval_ce_loss"] == pytest.approx(nats / tokens, rel=1e-5)


def test_best_model_brings_its_projectors_back(tmp_path):
    run = runs.trainer(
        tmp_path,
        eval_dataset=tiny.dataset(6),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        max_steps=3,
        learning_rate=0.5,  # every step makes it worse, so that the first is the best
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    run.train()
    best = run.state.best_model_checkpoint
    assert best == str(tmp_path / "checkpoint-1")
    saved = load_file(tmp_path / "checkpoint-1" / "projectors.safetensors")
    for name, value in run.projectors.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=0)
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best


# ---- Trouble


def test_a_loss_that_is_not_finite_stops_with_its_name(tmp_path):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                run.projectors.t2s.weight.data.fill_(float("nan"))

    run = runs.trainer(
        tmp_path, max_steps=6, save_strategy="steps", save_steps=1, logging_steps=100, callbacks=[Break()]
    )
    with pytest.raises(NonFiniteLossError, match=r"t2s_ce.* step 2 .*examples \[\d+"):
        run.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    for name, value in load_file(tmp_path / "checkpoint-2" / "projectors.safetensors").items():
        assert torch.isfinite(value).all(), name


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    run = runs.trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    save = torch.save
    calls = []

    def fail_later(*args, **kwargs):
        if "optimizer.pt" in str(args[1]):
            calls.append(args[1])
            if len(calls) > 3:
                raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", fail_later)
    with pytest.raises(ValueError, match=r"checkpoint-2 could not be saved.*No space left.*checkpoint-1"):
        run.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.json", ".run.lock", "checkpoint-1"]
    again = runs.trainer(tmp_path, max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 4


def test_trainer_is_a_transformers_trainer_with_trls_signature():
    names = (
        "model teacher_model args data_collator train_dataset eval_dataset processing_class teacher_processing_class"
        " compute_metrics callbacks optimizers preprocess_logits_for_metrics peft_config quantization_config"
        " teacher_quantization_config"
    )
    assert list(inspect.signature(DSKDTrainer.__init__).parameters)[1:] == names.split()


# ---- The checkpoint that several evaluation sets choose


BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "method": "sft"}


@pytest.mark.parametrize("setting", [{"load_best_model_at_end": True}, {"lr_scheduler_type": "reduce_lr_on_plateau"}])
def test_several_sets_need_the_name_of_one(setting, tmp_path):
    sets = {"short": tiny.dataset(3), "long": tiny.dataset(5)}
    with pytest.raises(UserError, match="set 'short_bits_per_byte' or 'long_bits_per_byte'"):
        runs.trainer(tmp_path, student="nothing is loaded", eval_dataset=sets, **BEST, **setting)
    settings = {**BEST, **setting, "max_steps": 3, "learning_rate": 0.5}
    for name in ("long_bits_per_byte", "eval_short_token_accuracy"):
        run = runs.trainer(
            tmp_path / name,
            eval_dataset=sets,
            metric_for_best_model=name,
            greater_is_better="accuracy" in name,
            **settings,
        )
        run.train()
        key = f"eval_{name.removeprefix('eval_')}"
        values = [log[key] for log in run.state.log_history if key in log]
        assert len(values) == 3
        assert run.state.best_metric == (max(values) if "accuracy" in name else min(values))


def test_one_set_with_a_name_is_the_one(tmp_path):
    run = runs.trainer(
        tmp_path,
        eval_dataset={"held_out": tiny.dataset(3)},
        max_steps=2,
        learning_rate=0.5,
        load_best_model_at_end=True,
        **BEST,
    )
    run.train()
    assert run.args.metric_for_best_model == "held_out_bits_per_byte"
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
