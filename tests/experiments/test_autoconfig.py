"""What a pair of models needs: derived from configurations and tokenizers, fitted into a memory."""

import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny
import yaml
from benchmark_step import model_config  # sizes of real models

from hf_dskd import UserError, run
from hf_dskd.experiments import autoconfig
from hf_dskd.experiments.autoconfig import derive


RECIPES = Path(__file__).resolve().parents[2] / "recipes"
RECIPE = RECIPES / "your_pair.py"
# Memory of cards, in bytes, as the table of README.md has it.
T4, RTX_3060, RTX_4090 = 14.56 * 2**30, 11.75 * 2**30, 23.6 * 2**30
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
FITTED = ("load_teacher_in_4bit", "per_device_train_batch_size", "gradient_checkpointing")


def write(folder, config, tokenizer, template=None, **changes):
    """A model without weights: deriving must not load any."""
    config.update(changes)
    config.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    names = {
        "gpt2": ("openai-community/gpt2", tiny.byte_level_tokenizer),
        "qwen-1.8b": ("Qwen/Qwen1.5-1.8B", tiny.sentencepiece_tokenizer),
        "llama-1b": ("meta-llama/Llama-3.2-1B", tiny.byte_level_tokenizer),
        "qwen-7b": ("Qwen/Qwen2.5-7B", tiny.sentencepiece_tokenizer),
    }
    found = {key: write(folder / key, model_config(name), make()) for key, (name, make) in names.items()}
    found["same"] = write(folder / "same", model_config("Qwen/Qwen1.5-1.8B"), tiny.byte_level_tokenizer(), TEMPLATE)
    found["short"] = write(
        folder / "short", model_config("tiny teacher"), tiny.byte_level_tokenizer(), max_position_embeddings=300
    )
    return found


def derived(models, student="gpt2", teacher="qwen-1.8b", memory=None, device="cuda", **given):
    processes = given.pop("processes", 1)
    dtype = given.pop("training_dtype", "bfloat16")
    options = {"memory": memory, "device": device, "dtype": dtype, "processes": processes}
    return derive(models[student], models[teacher], given={"total_batch_size": 32, **given}, **options)


def refused(call, *parts):
    """Calls; expects a one-line error that contains each of `parts`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
    return message


def fitted(found):
    return tuple(found.settings[name] for name in FITTED)


def takes(found):
    """Gigabytes."""
    return float(found.reasons["per_device_train_batch_size"].split()[1])


# ---- What doesn't depend on memory


def test_a_small_student_of_another_vocabulary(models):
    found = derived(models)
    assert found.settings == {
        "model_name_or_path": models["gpt2"],
        "teacher_model_name_or_path": models["qwen-1.8b"],
        "output_dir": "runs/gpt2_qwen-1.8b",
        "max_length": 512,
        "method": "dskd_cma_ga",
        "prompt_style": "plain",
        "use_peft": False,
        "learning_rate": 5e-5,
        "load_teacher_in_4bit": False,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "gradient_checkpointing": False,
    }
    # Every one has a reason, on the line of its own value; the text is a configuration file.
    assert found.reasons.keys() == found.settings.keys() and all(found.reasons.values())
    lines = str(found).splitlines()
    assert len({line.index("# ") for line in lines}) == 1 and yaml.safe_load(str(found)) == found.settings
    assert "124 M parameters: all of them are trained" in str(found)


def test_a_larger_student_gets_an_adapter(models):
    found = derived(models, "llama-1b", "qwen-7b")
    expected = {
        "use_peft": True,
        "lora_r": 64,
        "lora_alpha": 128,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "dtype": "bfloat16",
        "learning_rate": 2e-4,
    }
    assert expected.items() <= found.settings.items()
    assert "1,236 M parameters: above 500 M" in found.reasons["use_peft"]
    assert derived(models, "llama-1b", "qwen-7b", training_dtype="float16").settings["dtype"] == "float16"


def test_one_vocabulary_and_one_chat_template(models):
    found = derived(models, "gpt2", "same")
    assert found.settings["method"] == "dskd" and "one vocabulary" in found.reasons["method"]
    # Queries and keys are set: a method that has them.
    assert derived(models, "gpt2", "same", matching="mmd").settings["method"] == "dskd_cma_ga"
    assert found.settings["prompt_style"] == "chat"
    assert found.reasons["prompt_style"] == "gpt2: plain text, it has no template; same: its chat template"
    assert "neither" in derived(models).reasons["prompt_style"]


def test_what_chat_templates_are_told(models, tmp_path):
    template = TEMPLATE + "{% if enable_thinking %}<think>{% endif %}"
    name = write(tmp_path / "qwen3", model_config("Qwen/Qwen1.5-1.8B"), tiny.sentencepiece_tokenizer(), template)
    models = {**models, "qwen3": name}
    assert "chat_template_kwargs" not in derived(models, "gpt2", "same").settings
    found = derived(models, "gpt2", "qwen3")
    assert found.settings["chat_template_kwargs"] == {"enable_thinking": False}
    assert found.reasons["chat_template_kwargs"] == "the data's responses don't think aloud"
    assert """--chat_template_kwargs={"enable_thinking": false}""" in found.flags and "--max_length=512" in found.flags
    # What is printed is a configuration file.
    assert yaml.safe_load(str(found)) == found.settings
    for given in ({"prompt_style": "plain"}, {"chat_template_kwargs": {"enable_thinking": True}}):
        assert "chat_template_kwargs" not in derived(models, "gpt2", "qwen3", **given).settings
    template = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}" + template
    )
    name = write(tmp_path / "dated", model_config("openai-community/gpt2"), tiny.byte_level_tokenizer(), template)
    found = derived({**models, "dated": name}, "dated", "qwen3")
    assert found.settings["chat_template_kwargs"] == {"enable_thinking": False, "date_string": "26 Jul 2024"}
    assert "tomorrow" in found.reasons["chat_template_kwargs"]


def test_the_length_is_what_both_have_positions_for(models):
    for names in (("gpt2", "short"), ("short", "gpt2")):
        found = derived(models, *names)
        assert found.settings["max_length"] == 300 and found.reasons["max_length"] == "short has no more positions"


# ---- What does


def test_what_fits_on_the_cards_of_the_readme(models):
    """There, at 4 x 512: 9.5 GB for the first pair; 16.0 for the second in 4 bits, 12.2 with checkpointing."""
    cards = (T4, RTX_3060, RTX_4090)
    first = [derived(models, memory=card) for card in cards]
    assert [fitted(found) for found in first] == [(False, 8, False), (False, 4, False), (False, 8, False)]
    assert not any(found.settings["use_peft"] for found in first)
    assert first[1].reasons["per_device_train_batch_size"] == "takes 10.0 of 12.6 GB"
    second = [derived(models, "llama-1b", "qwen-7b", card) for card in cards]
    # The largest has room for two examples beside a teacher in 16 bits; on the smallest one is a tight fit.
    assert [fitted(found) for found in second] == [(True, 1, False), (True, 1, True), (False, 2, True)]
    assert second[1].reasons["per_device_train_batch_size"] == "takes 12.0 of 12.6 GB: tight, and nothing takes less"


def test_what_fits_is_tried_in_the_order_of_what_is_lost(models):
    """Smaller batches and checkpointing first, which change no result, then a teacher in 4 bits, then an adapter."""
    seen = []
    for gigabytes in (16, 10, 9, 8, 7, 6.5, 6, 5, 4.5):
        found = derived(models, memory=gigabytes * 1e9)
        four_bit, batch_size, checkpointing = fitted(found)
        seen.append((found.settings["use_peft"], four_bit, checkpointing, -batch_size))
        assert takes(found) <= 0.9 * gigabytes + 0.05
    assert seen == sorted(seen) and len(set(seen)) >= 7
    assert {row[:2] for row in seen} == {(False, False), (False, True), (True, False), (True, True)}
    assert "training all of them doesn't fit" in derived(models, memory=5e9).reasons["use_peft"]


def test_a_student_that_is_larger_than_its_teacher_is_told(models, caplog):
    caplog.set_level("WARNING", logger="hf_dskd.experiments.autoconfig")
    derived(models, "gpt2", "qwen-1.8b")
    assert "more parameters" not in caplog.text
    derived(models, "qwen-1.8b", "gpt2")
    assert "the student has more parameters (1,836,828,672) than the teacher (124,439,808)" in caplog.text


def test_batches_share_the_examples_of_a_step(models):
    assert derived(models, total_batch_size=12).settings["per_device_train_batch_size"] == 4
    assert derived(models, processes=8).settings["per_device_train_batch_size"] == 4
    assert derived(models, total_batch_size=3).settings["per_device_train_batch_size"] == 1
    found = derived(models, total_batch_size=None, gradient_accumulation_steps=3)
    assert found.settings["per_device_train_batch_size"] == 8


def test_the_heap_of_a_cpu_needs_more_room(models):
    memory = 13e9
    gpu, cpu = (derived(models, memory=memory, device=device) for device in ("cuda", "cpu"))
    assert gpu.settings["per_device_train_batch_size"] > cpu.settings["per_device_train_batch_size"]


def test_given_settings_stay_and_are_fitted_around(models):
    given = {"max_length": 128, "method": "alm", "learning_rate": 1e-3, "output_dir": "mine", "prompt_style": "plain"}
    found = derived(models, "llama-1b", "qwen-7b", T4, **given)
    assert not given.keys() & found.settings.keys() and not given.keys() & found.reasons.keys()
    # A quarter of the length and no projectors: four times the batch of the test above.
    assert fitted(found) == (True, 8, False)
    found = derived(models, "llama-1b", "qwen-7b", T4, per_device_train_batch_size=4)
    assert found.settings["gradient_checkpointing"] and "per_device_train_batch_size" not in found.settings
    found = derived(models, memory=T4, load_teacher_in_4bit=True)
    assert "load_teacher_in_4bit" not in found.settings
    found = derived(models, memory=T4, gradient_checkpointing=True, per_device_train_batch_size=8)
    assert "takes 1" in derived(models, memory=T4).reasons["per_device_train_batch_size"]
    assert not {"gradient_checkpointing", "per_device_train_batch_size"} & found.settings.keys()


def test_the_kind_of_training_can_be_given(models):
    assert derived(models, use_peft=True).settings["lora_r"] == 64
    found = derived(models, lora_r=8)
    assert found.settings["use_peft"] and found.settings["lora_alpha"] == 16 and "lora_r" not in found.settings
    assert "by your settings" in found.reasons["use_peft"] and found.settings["learning_rate"] == 2e-4
    full = derived(models, "llama-1b", "qwen-7b", use_peft=False)
    assert "lora_r" not in full.settings and full.settings["learning_rate"] == 5e-5
    assert full.settings["per_device_train_batch_size"] == 8
    # Weights of 4 bytes instead of 2 take their place: 2.5 GB.
    few = {"lora_target_modules": ["q_proj", "v_proj"]}
    sizes = [takes(derived(models, "llama-1b", "qwen-7b", 1e12, **given)) for given in ({"dtype": "float32"}, {}, few)]
    assert sizes[0] > sizes[1] + 2 and sizes[1] > sizes[2] + 1


def test_a_teacher_that_runs_elsewhere_takes_less(models):
    places = ({}, {"teacher_cache": "cache"}, {"teacher_device": "cuda:1"}, {"method": "sft"})
    live, cached, beside, none = (takes(derived(models, "llama-1b", "qwen-7b", 1e12, **given)) for given in places)
    assert none < beside <= cached < live
    assert "load_teacher_in_4bit" not in derived(models, method="sft").settings
    # The cache is filled with a teacher that fits alone, and one in 4 bits makes another cache.
    small = derived(models, "llama-1b", "qwen-7b", RTX_3060, teacher_cache="cache")
    large = derived(models, "llama-1b", "qwen-7b", RTX_4090, teacher_cache="cache")
    assert small.settings["load_teacher_in_4bit"] and not large.settings["load_teacher_in_4bit"]


def test_without_nf4_the_teacher_stays_in_16_bits(models, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused(lambda: derived(models, "llama-1b", "qwen-7b", T4), "pip install bitsandbytes")
    assert "Qwen" not in message and "NF4 teacher" not in message
    assert not derived(models, "llama-1b", "qwen-7b").settings["load_teacher_in_4bit"]


def test_nf4_on_a_cpu_needs_shapes_that_it_can_run(models, tmp_path):
    odd = write(
        tmp_path / "odd", model_config("Qwen/Qwen2.5-7B"), tiny.sentencepiece_tokenizer(), intermediate_size=18_950
    )
    message = refused(lambda: derived({**models, "odd": odd}, "gpt2", "odd", 20e9, "cpu"), "multiples of 64")
    assert "NF4 teacher" not in message
    assert derived(models, "gpt2", "qwen-7b", 20e9, "cpu").settings["load_teacher_in_4bit"]


def test_what_cannot_fit_is_refused_with_numbers_and_remedies(models):
    message = refused(
        lambda: derived(models, "llama-1b", "qwen-7b", 8.5e9),
        "llama-1b from qwen-7b doesn't fit: it takes ",
        "(LoRA r 64, NF4 teacher, gradient checkpointing, batches of 1 x 512) and 8.5 GB are free; ",
        "GB from a --teacher_cache that hf-dskd cache-teacher fills on a larger machine; or name smaller models",
        "nothing is offloaded to the CPU",
    )
    assert "leave" not in message
    least = float(message.partition("takes ")[2].split()[0])
    assert 8.5 < least < 12.5
    # It says the truth: with as much it fits, with a bit less it doesn't.
    assert fitted(derived(models, "llama-1b", "qwen-7b", (least + 0.06) * 1e9)) == (True, 1, True)
    refused(lambda: derived(models, "llama-1b", "qwen-7b", (least - 0.06) * 1e9))
    assert "--teacher_cache" not in refused(lambda: derived(models, "llama-1b", "qwen-7b", 3e9))
    assert "--teacher_cache" not in refused(lambda: derived(models, "llama-1b", "qwen-7b", 3e9, teacher_cache="cache"))
    refused(
        lambda: derived(models, memory=5e9, use_peft=False, per_device_train_batch_size=32),
        "leave use_peft=False and per_device_train_batch_size=32 out",
        "all of the student trained, NF4 teacher, gradient checkpointing, batches of 32 x 512",
    )


# ---- Names


def test_models_that_cannot_be_used_are_one_line(models, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(models["gpt2"]).parent)
    (tmp_path / "empty").mkdir()
    masked = tmp_path / "masked"
    write(masked, model_config("tiny teacher"), tiny.byte_level_tokenizer(), architectures=["BForMaskedLM"])
    for student, teacher, *expected in (
        ("gpt2", "./gpt2", "'gpt2' is student and teacher"),
        ("a/b", "a/b", "'a/b' is student and teacher"),
        # Names of the hub, offline; the tests run so.
        ("gpt2", "no/such", "the teacher 'no/such' can't be"),
        ("no/such", "gpt2", "the student 'no/such'", "OFFLINE"),
        ("gpt2", str(tmp_path / "empty"), "the teacher", "the folder has no config.json"),
        ("gpt2", str(masked), "a masked language model"),
    ):
        refused(partial(derive, student, teacher, memory=None, device="cpu", given={}), *expected)


def test_two_names_go_first():
    assert autoconfig.two_names(["a", "b", "--seed", "1", "c"]) == ("a", "b", ["--seed", "1", "c"])
    got = {"": "nothing", "--seed 1 a b": "nothing", "a --smoke": "'a'", "a b c": "'a' 'b' 'c'"}
    for words, named in got.items():
        refused(partial(autoconfig.two_names, words.split()), f"got {named}")


# ---- The recipe


@pytest.fixture
def started(models, monkeypatch, tmp_path):
    """Starts the recipe up to the run itself, which it returns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_dskd.experiments.memory.free_memory", lambda device: 60e9)
    runs = []
    monkeypatch.setattr(run, "train", runs.append)

    def start(*flags, student=models["gpt2"], teacher=models["qwen-1.8b"]):
        autoconfig.train(None, RECIPE.with_suffix(".yaml"), [student, teacher, "--use_cpu", *flags])
        return runs.pop() if runs else None

    return start


def test_the_recipe_runs_what_is_derived(started, models, capsys):
    found = started()
    assert found.model.model_name_or_path == models["gpt2"]
    assert found.options.teacher_model_name_or_path == models["qwen-1.8b"]
    config = found.config
    assert str(config.output_dir) == "runs/gpt2_qwen-1.8b" and config.method == "dskd_cma_ga"
    assert (
        config.per_device_train_batch_size * config.gradient_accumulation_steps == found.options.total_batch_size == 32
    )
    assert config.learning_rate == 5e-5 and config.num_train_epochs == 3 and not found.model.use_peft
    assert found.script.dataset_name == "databricks/databricks-dolly-15k"
    assert found.options.rename_columns == "context=input,response=output"
    printed = capsys.readouterr().out
    assert "method: dskd_cma_ga" in printed and "of 60.0 GB" in printed and "dataset_name" not in printed


def test_the_users_settings_win(started, capsys):
    flags = """--learning_rate 1e-3 --use-peft --lora_r=8 --dataset_name my.jsonl --output_dir mine
        --total_batch_size 4 --no_correctness_mask"""
    found = started(*flags.split())
    assert found.config.learning_rate == 1e-3 and found.model.use_peft and found.model.lora_r == 8
    assert found.model.lora_alpha == 16 and found.model.lora_target_modules == "all-linear"
    assert found.config.per_device_train_batch_size == 4 and found.config.gradient_accumulation_steps == 1
    assert str(found.config.output_dir) == "mine" and not found.config.correctness_mask
    # The columns of the YAML file are those of its own dataset.
    assert found.script.dataset_name == "my.jsonl" and not found.options.rename_columns
    printed = capsys.readouterr().out
    assert not any(f"{name}:" in printed for name in ("learning_rate", "use_peft", "lora_r", "output_dir"))
    assert started("--dataset_name=my.jsonl", "--rename_columns", "a=b").options.rename_columns == "a=b"


def test_a_configuration_file_of_ones_own_is_fitted_around(started, tmp_path):
    text = "dataset_name: my.jsonl\nlearning_rate: 0.25\nper_device_train_batch_size: 2\n"
    (tmp_path / "mine.yaml").write_text(text)
    found = started("--config", "mine.yaml")
    assert found.config.learning_rate == 0.25 and found.config.per_device_train_batch_size == 2
    assert found.script.dataset_name == "my.jsonl" and found.config.method == "dskd_cma_ga"


def test_a_dry_run_prints_a_configuration_file(started, capsys, tmp_path):
    assert started("--dry_run", "--dataset_name", "my.jsonl", "--seed", "7", "--hub_token", "secret") is None
    text = capsys.readouterr().out
    (tmp_path / "pair.yaml").write_text(text)
    kept = run.parse(None, tmp_path / "pair.yaml", [])
    assert kept.config.greater_is_better is False
    started_with = started("--dataset_name", "my.jsonl", "--seed", "7")
    # What a machine computes in isn't kept; transformers 4 puts the time into the other.
    left_out = {"bf16", "use_cpu", "logging_dir"}
    was, is_now = (
        {name: value for name, value in run.changed_settings(each).items() if name not in left_out}
        for each in (started_with, kept)
    )
    assert is_now == was and is_now["seed"] == 7 and "secret" not in text


def test_the_recipe_refuses_in_one_line(started, monkeypatch, capsys):
    # Before anything.
    refused(lambda: started("--smoke", student="a", teacher="a"), "'a' is student and teacher")
    monkeypatch.setattr("sys.argv", [str(RECIPE), "openai-community/gpt2", "--smoke"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(RECIPE), run_name="__main__")
    errors = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: two names go before")


def test_help_answers_without_heavy_imports():
    code = (
        "import sys; from pathlib import Path; from hf_dskd.experiments import autoconfig\n"
        f"try: autoconfig.train('about', Path({str(RECIPE.with_suffix('.yaml'))!r}), ['--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'transformers', 'datasets', 'accelerate'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("about") and "your_pair.yaml" in done.stdout
