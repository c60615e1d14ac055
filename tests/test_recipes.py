"""Every recipe: its YAML, its twin in Python, and a smoke run as CI and a new user start it."""

import ast
import importlib.util
import json
import math
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
import runs
import tiny
import yaml
from benchmark_step import MODELS
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import get_peft_config
from warm import WarmPython

from hf_dskd import run
from hf_dskd.offline.tiny_models import FAMILIES, family_of
from hf_dskd.training.run_folder import RESULT_NAME


FOLDER = Path(__file__).resolve().parents[1] / "recipes"
RECIPES = {path.stem: path for path in sorted(FOLDER.glob("*.py")) if "with_suffix" in path.read_text("utf-8")}
# your_pair's names come from the command line.
PAIRS = [name for name in RECIPES if name != "your_pair"]
ARGUMENTS = {
    # Its analyses and answers take most of the time.
    "smollm2_qwen_coder": ["--analysis_examples", "2", "--eval_generation_samples", "1"],
    "your_pair": ["HuggingFaceTB/SmolLM2-360M-Instruct", "google/gemma-3-4b-it"],
}


def settings(name):
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def test_the_issues_recipes_are_there_each_with_its_yaml():
    assert set(RECIPES) >= {
        *("gpt2_qwen", "tinyllama_mistral", "qwen3_small_from_large", "llama32_1b_qwen25_7b"),
        *("smollm2_qwen_coder", "your_pair"),
    }
    for path in RECIPES.values():
        assert path.with_suffix(".yaml").is_file()


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_pair_specific_outside_the_yaml(name):
    tree = ast.parse(RECIPES[name].read_text(encoding="utf-8"))
    described = ast.get_docstring(tree)
    assert f"recipes/{name}.py" in described
    tree.body = tree.body[1:]
    code = ast.unparse(tree)
    assert len(code.splitlines()) <= 10 or name == "smollm2_qwen_coder"
    assert not [family for family, row in FAMILIES.items() if re.search(row.names, code.lower())]
    for path in (settings(name).get(key, "") for key in ("dataset_name", "model_name_or_path")):
        assert not path or path not in code


@pytest.mark.parametrize("name", RECIPES)
def test_the_yaml_names_known_settings_and_is_valid(name, tmp_path):
    from trl import ModelConfig, ScriptArguments

    from hf_dskd import DSKDConfig

    groups = (ScriptArguments, DSKDConfig, ModelConfig, run.RunArguments)
    known = {setting.name for group in groups for setting in fields(group)}
    given = settings(name)
    assert set(given) <= known
    parsed = run.parse(None, FOLDER / f"{name}.yaml", ["--output_dir", str(tmp_path)])
    for key, value in given.items():
        part = next(part for part in vars(parsed).values() if hasattr(part, key))
        found = getattr(part, key)
        if key not in ("output_dir", "report_to"):
            assert getattr(found, "value", found) == value, key
    assert given["output_dir"] == f"runs/{name}" if name in PAIRS else "output_dir" not in given
    assert (
        parsed.config.gradient_accumulation_steps * given.get("per_device_train_batch_size", 8)
        == (given["total_batch_size"])
    )
    assert parsed.config.load_best_model_at_end is False or parsed.config.greater_is_better is False


@pytest.mark.parametrize("name", PAIRS)
def test_both_models_have_stand_ins(name):
    given = settings(name)
    assert family_of(given["model_name_or_path"]) and family_of(given["teacher_model_name_or_path"])


def test_the_papers_values():
    given = settings("tinyllama_mistral")
    assert given["model_name_or_path"] == "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
    assert given["teacher_model_name_or_path"] == "mistralai/Mistral-7B-v0.1"
    assert (given["lora_r"], given["lora_alpha"], given["lora_dropout"]) == (256, 8, 0.1)
    assert (given["learning_rate"], given["projector_learning_rate"]) == (1e-3, 1e-3)
    assert (given["num_train_epochs"], given["total_batch_size"], given["max_length"]) == (10, 32, 512)


# Sizes of the real models; a T4 has 14.56 GiB for programs.
QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128}
QWEN3 |= {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True}
LARGE_QWEN3 = {**QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
LARGE_QWEN3 |= {"num_attention_heads": 32, "tie_word_embeddings": False}
MISTRAL = "mistralai/Mistral-7B-v0.1"


@pytest.mark.parametrize(
    "name, student, teacher",
    [
        ("tinyllama_mistral", *map(MODELS.get, ("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", MISTRAL))),
        ("qwen3_small_from_large", QWEN3, LARGE_QWEN3),
        ("llama32_1b_qwen25_7b", *map(MODELS.get, ("meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-7B"))),
    ],
)
def test_a_16_gb_card_is_enough(name, student, teacher):
    from transformers import AutoConfig

    from hf_dskd.experiments.memory import estimate

    given = settings(name)
    needed = estimate(
        AutoConfig.for_model(**student),
        AutoConfig.for_model(**teacher),
        batch_size=given["per_device_train_batch_size"],
        max_length=given["max_length"],
        method=given["method"],
        adapter_rank=given["lora_r"],
        adapter_targets=given["lora_target_modules"],
        student_dtype=given["dtype"],
        four_bit_teacher=given["load_teacher_in_4bit"],
        gradient_checkpointing=given.get("gradient_checkpointing", False),
        accumulation=given["total_batch_size"] // given["per_device_train_batch_size"],
    )
    assert 5e9 < needed.total < 14.56 * 2**30


def test_the_smoke_runs_teacher_is_in_4_bits(tmp_path):
    args = run.parse(None, FOLDER / "tinyllama_mistral.yaml", ["--smoke", "--output_dir", str(tmp_path)])
    student, teacher = args.model.model_name_or_path, args.options.teacher_model_name_or_path
    assert {Path(student).parent, Path(teacher).parent} == {tmp_path / "tiny_models"}
    trainer = run.make_trainer(args, student, teacher, *run.load_data(args))
    kinds = [type(module).__name__ for module in trainer.teacher.model.modules()]
    # Seven linear layers in each of the two; the head stays as it is.
    assert kinds.count("Linear4bit") == 14


# ---- The same in Python


def in_python(name):
    """The Python file as a module, whose data are rows of Dolly's kind."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / "python" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = tiny.dataset(508).rename_columns({"prompt": "instruction", "completion": "response"})
    module.load_dataset = lambda *args, **kwargs: rows.add_column("context", list(map(str, range(len(rows)))))
    return module


@pytest.mark.parametrize("name", sorted(path.stem for path in (FOLDER / "python").glob("*.py")))
def test_the_run_in_python_is_that_of_the_yaml(name, tmp_path):
    recipe, made = in_python(name), {}
    recipe.DSKDTrainer = lambda student, teacher, args, **options: made.update(
        student=student, teacher=teacher, args=args, **options
    )
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'train'"):
        recipe.main()
    parsed = run.parse(None, FOLDER / f"{name}.yaml", ["--output_dir", str(tmp_path)])
    assert made["student"] == parsed.model.model_name_or_path
    assert made["teacher"] == parsed.options.teacher_model_name_or_path
    adapter = get_peft_config(parsed.model)
    assert (made.get("peft_config") and made["peft_config"].to_dict()) == (adapter and adapter.to_dict())
    assert (made["args"].model_init_kwargs or {}).get("dtype") == (parsed.model.dtype if adapter else None)
    own = ("output_dir", "hub_model_id", "model_init_kwargs", "bf16", "fp16")
    for field in fields(parsed.config):
        if field.name not in own:
            assert getattr(made["args"], field.name) == getattr(parsed.config, field.name), field.name
    recipe.load_dataset().to_json(tmp_path / "dolly.jsonl")
    parsed.script.dataset_name = str(tmp_path / "dolly.jsonl")
    for found, expected in zip((made["train_dataset"], made["eval_dataset"]), run.load_data(parsed)):
        assert found["input"] == expected["input"] and found["output"] == expected["output"]
    assert len((FOLDER / "python" / f"{name}.py").read_text().splitlines()) <= 60


def test_the_run_in_python_trains(monkeypatch, tmp_path, capsys):
    recipe = in_python("gpt2_qwen")
    monkeypatch.chdir(tmp_path)

    def small(student, teacher, args, **options):
        changes = {"max_steps": 1, "gradient_accumulation_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
        options["eval_dataset"] = options["eval_dataset"].select(range(4))
        config = run.variant(args, **changes, load_best_model_at_end=False, use_cpu=True)
        return runs.DSKDTrainer(
            tiny.gpt2(),
            tiny.qwen2(450),
            config,
            **options,
            processing_class=tiny.byte_level_tokenizer(),
            teacher_processing_class=tiny.sentencepiece_tokenizer(),
        )

    recipe.DSKDTrainer = small
    recipe.main()
    assert "eval_bits_per_byte" in capsys.readouterr().out
    assert (tmp_path / "runs" / "gpt2_qwen_python" / "model.safetensors").is_file()


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    # An empty cache: what isn't made here can't be had.
    cache = str(tmp_path_factory.mktemp("cache"))
    before = "from hf_dskd.offline.python_functions import python_functions\npython_functions()"
    with WarmPython({**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": cache, "HF_DSKD_CACHE": cache}, before) as warm:
        yield warm


@pytest.mark.parametrize("name", RECIPES)
def test_smoke(name, warm, tmp_path):
    out = tmp_path / "out"
    done = warm([str(RECIPES[name]), *ARGUMENTS.get(name, []), "--smoke", "--output_dir", str(out)], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((out / RESULT_NAME).read_text(encoding="utf-8"))
    given = settings(name)
    assert result["steps"] == 4
    assert result["method"] == given.get("method", result["method"])
    metrics = {key: value for key, value in result["metrics"].items() if isinstance(value, float)}
    assert "eval_bits_per_byte" in metrics and all(map(math.isfinite, metrics.values()))
    logged = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    # The student isn't the teacher, nor a real model.
    models = result["models"]
    assert models["student_parameters"] < models["teacher_parameters"] < 1_000_000 or models["adapter"]
    assert (out / "report" / "report.html").is_file()

    if name in PAIRS:
        assert models["adapter"] == given.get("use_peft", False)
        assert result["settings"]["load_teacher_in_4bit"] == given.get("load_teacher_in_4bit", False)
    if models["adapter"]:
        adapter = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
        assert adapter["r"] == given["lora_r"] and (out / "adapter_model.safetensors").is_file()
        assert models["trained_parameters"] < models["student_parameters"]
    assert (out / "model.safetensors").is_file() == (not models["adapter"])
    student, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("def wrap(text):", return_tensors="pt")
    written = student.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert written.shape[1] > prompt["input_ids"].shape[1]
