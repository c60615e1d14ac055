"""The model card and the folder that is pushed, of several shapes of runs."""

import json
import shutil

import pytest
from hub_runs import SECRET, changed, evaluated, of_pair, texts, with_settings
from huggingface_hub import EvalResult, ModelCard, constants

from hf_dskd import cli
from hf_dskd.errors import UserError
from hf_dskd.hub.card import model_card
from hf_dskd.hub.folder import write_model_folder
from hf_dskd.hub.identity import identity
from hf_dskd.hub.push import TRAINING, push_run
from hf_dskd.offline.packaged import MARKER, PACKAGED_MODELS
from hf_dskd.training.run_folder import RESULT_NAME, SETTINGS_NAME
from hf_dskd.utils.files import read_json, write_yaml


pytestmark = pytest.mark.usefixtures("undrawn")


SMOL, QWEN = "SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct"
ALWAYS = {"README.md", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}


@pytest.fixture
def run(made, tmp_path):
    def copy(name, **changes):
        target = tmp_path / f"run_{name}"
        shutil.copytree(made[name], target)
        return changed(target, **changes)

    return copy


def written(folder, target, repo_id="ann/tiny", **options):
    """What is pushed, and its card parsed back from the file."""
    write_model_folder(folder, target, repo_id, online=False, **options)
    card = ModelCard.load(target / "README.md")
    assert "model_name" not in card.data.to_dict() and "[More Information Needed]" not in card.text
    return card


def headings(card):
    return [line[3:] for line in card.text.splitlines() if line.startswith("## ")]


def row(card, name):
    [line] = [line for line in card.text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("| ").split(" | ")][1:]


# ---- Shapes of runs


def test_a_whole_student_from_folders(run, tmp_path, models):
    folder, target = run("full"), tmp_path / "pushed"
    # Trainer of transformers 5 switches it off while it trains.
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "use_cache": False}))
    (folder / "generation_config.json").unlink()
    card = written(folder, target)
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["hf_dskd", "knowledge-distillation", "cross-tokenizer", "dskd_cma_ga", "gpt2"]
    assert not {"base_model", "base_model_relation", "datasets", "license"} & set(data)
    expected = {"config.json", "model.safetensors", "images/curves.png", "images/alignment.png"}
    assert set(texts(target)) == ALWAYS | expected | (set(texts(target)) & {"special_tokens_map.json"})
    # The picture of the last analysis, not of the first.
    assert (target / "images" / "alignment.png").read_bytes() == (
        folder / "analysis" / "step-2" / "alignment-0.png"
    ).read_bytes()
    assert "tokens of a held-out example attend to the teacher's, after step 2. The picture shows" in card.text
    assert read_json(target / "config.json")["use_cache"] is True
    assert read_json(target / "generation_config.json").get("use_cache") is not False
    assert (target / "model.safetensors").samefile(folder / "model.safetensors")
    assert row(card, "student before training")[0].startswith("a local model (`GPT2LMHeadModel`), ")
    assert row(card, "teacher")[0].startswith("a local model (`Qwen2ForCausalLM`), ")
    assert "A fine-tuned copy of a local model (`GPT2LMHeadModel`), trained with" in card.text
    assert row(card, "student's parameters")[0].endswith(", all of them trained")
    assert row(card, "training data") == ["data that isn't on the hub"]
    assert "put into the chat template of the student's tokenizer." in card.text and "quantized" not in card.text
    assert "tokens aligned by cross-model attention, with queries matched to keys by a discriminator" in card.text
    assert "The method is that of [arXiv 2603.22056](https://arxiv.org/abs/2603.22056), Eqs. 14 and 16." in card.text
    assert row(card, "optimizer steps") == ["2"] and row(card, "training examples") == ["8, 1 times each"]
    assert row(card, "time") == ["0:04 min since the start or the last resume"]
    assert row(card, "training seeds") == ["one: 0"] and "torch 2" in row(card, "versions")[0]
    assert row(card, "`kd_rate`") == ["0.25"] and row(card, "`model_init_kwargs`") == ['{"dtype": "float32"}']
    assert "No licence of the student was found" in card.text and "- teacher: not found" in card.text
    assert 'AutoModelForCausalLM.from_pretrained("ann/tiny")' in card.text and "PeftModel" not in card.text


def test_an_adapter_from_folders(run, tmp_path, models):
    folder, target = run("adapter"), tmp_path / "pushed"
    assert read_json(folder / "adapter_config.json")["base_model_name_or_path"] == str(models[0])
    card = written(folder, target)
    assert card.data.library_name == "peft" and card.data.base_model is None
    config = read_json(target / "adapter_config.json")
    assert config["base_model_name_or_path"] == "my_student" and config["r"] == 4
    assert "`base_model_name_or_path` in `adapter_config.json` is only" in card.text
    assert 'base = AutoModelForCausalLM.from_pretrained("FOLDER_OF_THE_BASE_MODEL")' in card.text
    assert {"adapter_model.safetensors", "adapter_config.json"} < set(texts(target))
    assert "config.json" not in texts(target) and not (target / "auxiliary").exists()
    # Its own, which knows where an answer ends.
    name = "generation_config.json"
    assert (target / name).read_bytes() == (folder / name).read_bytes()
    assert "images/alignment.png" not in card.text and "Alignment" not in headings(card)
    bits = row(card, "bits per byte")
    result = read_json(folder / RESULT_NAME)
    assert bits == [f"{result['evaluations']['0']['eval_bits_per_byte']:.4f}"] + [
        f"{result['metrics']['eval_bits_per_byte']:.4f}"
    ]
    assert "On 4 held-out examples:" in card.text and "generated for 2 of these" in card.text
    few = changed(run("sft"), settings={"eval_generation_samples": 10})
    assert "generated for 4 of these" in model_card(few, online=False).text
    trained = result["models"]["trained_parameters"]
    assert row(card, "student's parameters")[0].endswith(f", {trained:,} of them trained") and trained < 1e5
    assert "quantized" not in card.text
    card = model_card(changed(folder, models={"student_bits": 4}), online=False)
    assert "quantized to 4 bits while it was trained and measured: the adapter was not measured on" in card.text


def test_training_on_text_alone(run, tmp_path):
    folder = run("sft")
    (folder / "chat_template.jinja").unlink()
    card = written(folder, tmp_path / "pushed")
    assert card.data.tags == ["hf_dskd", "sft", "gpt2"]
    assert "The student's tokenizer has no chat template: it was given the prompts" in card.text
    assert "teacher" not in card.text.lower().replace("no teacher", "")
    assert "Its loss is −log q(y)." in card.text and "arxiv" not in card.text.lower()


def test_packaged_models(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DSKD_CACHE", str(tmp_path / "cache"))
    folder = of_pair(run("adapter"), SMOL, QWEN, "python_functions")
    facts = read_json(folder / "auxiliary.json")
    (folder / "auxiliary.json").write_text(json.dumps({**facts, "student": f"/gone/{SMOL}"}))
    target = tmp_path / "pushed"
    card = written(folder, target, auxiliary=True)
    data = card.data.to_dict()
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and data["base_model_relation"] == "adapter"
    assert data["license"] == "apache-2.0" and "datasets" not in data and "license_name" not in data
    assert 'from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")' in card.text
    for name in (SMOL, QWEN):
        assert f"`{PACKAGED_MODELS[name].gguf_file}`" in card.text
    assert card.text.count("a GGUF file of 4 bits") == 2 and card.text.count("the adapter was not measured") == 1
    assert "teacher: not looked up (none stated in the packages; the model family's own is Apache-2.0)" in card.text
    assert "functions of Python's standard library" in row(card, "training data")[0]
    config = read_json(target / "adapter_config.json")
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    facts = read_json(target / "auxiliary" / "auxiliary.json")
    assert set(texts(target / "auxiliary")) == {"auxiliary.json", "projectors.safetensors"}
    assert facts["student"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert facts["method"] == "dskd_cma" and facts["modules"]["projectors"]["file"] == "projectors.safetensors"


def test_a_folder_with_the_name_of_a_packaged_model(run, tmp_path):
    folder = run("full")
    own = tmp_path / "models" / SMOL
    own.mkdir(parents=True)
    changed(with_settings(folder, model_name_or_path=str(own)), models={"student": SMOL})
    assert model_card(folder, online=False).data.base_model is None
    (own / MARKER).write_text("{}")
    assert model_card(folder, online=False).data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_models_and_data_of_the_hub(run, tmp_path, monkeypatch):
    folder = of_pair(run("full"), "gpt2", "Qwen/Qwen1.5-1.8B", "databricks/databricks-dolly-15k")
    card = written(folder, tmp_path / "pushed")
    data = card.data.to_dict()
    assert data["base_model"] == "gpt2" and data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["databricks/databricks-dolly-15k"]
    assert "cross-tokenizer" not in data["tags"]  # nothing on this machine tells
    assert card.data.eval_results[-1].dataset_type == "databricks/databricks-dolly-15k"
    link = f"[`databricks/databricks-dolly-15k`]({constants.ENDPOINT}/datasets/databricks/databricks-dolly-15k)"
    assert row(card, "training data") == [link]
    # The same names, but folders.
    (folder.parent / "databricks" / "databricks-dolly-15k").mkdir(parents=True)
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    data = model_card(folder, online=False).data.to_dict()
    assert "datasets" not in data and "base_model" not in data
    for source in ("data/rows.jsonl", "/srv/data/rows", "../rows", None):
        changed(folder, data={"source": source})
        card = model_card(folder, online=False)
        assert "datasets" not in card.data.to_dict()
    assert row(card, "training data") == ["not recorded"]


def test_a_run_that_was_started_from_python(run):
    """Without `settings.yaml`: where its models came from isn't said."""
    folder = run("full")
    (folder / SETTINGS_NAME).unlink()
    card = model_card(changed(folder, models={"student": "gpt2"}), online=False)
    assert card.data.base_model is None
    assert row(card, "teacher")[0].startswith("a model whose origin was not recorded, ")
    card = model_card(changed(folder, models={"base_model": "gpt2"}), online=False)
    assert card.data.base_model == "gpt2"


def test_what_the_user_has_for_the_card(run):
    given = {
        **{"language": "en", "license": "our-terms", "tags": ["mine", "sft"], "model_name": "My model"},
        **{"datasets": ["ann/data", "wikitext of 2016"]},
    }
    card = model_card(changed(run("sft"), card=given), "ann/tiny", online=False)
    data = card.data.to_dict()
    assert (data["language"], data["license"], data["license_name"]) == ("en", "other", "our-terms")
    assert data["tags"] == ["hf_dskd", "sft", "gpt2", "mine"] and data["datasets"] == ["ann/data"]
    assert "\n# My model\n" in card.text and 'from_pretrained("ann/tiny")' in card.text
    assert row(card, "training data") == [f"[`ann/data`]({constants.ENDPOINT}/datasets/ann/data), wikitext of 2016"]
    assert "states `our-terms`" in card.text and "- student before training: not found" in card.text


@pytest.mark.parametrize("later", ["adapter", "full"])
def test_what_an_earlier_run_left_in_the_folder_stays_there(run, made, tmp_path, later):
    folder, earlier = run(later), made["full" if later == "adapter" else "adapter"]
    own = {path.name for path in folder.iterdir()}
    for path in earlier.iterdir():
        if path.is_file() and path.name not in own:
            shutil.copy(path, folder)
    # Its pictures, without the numbers that a new run drops.
    shutil.copytree(made["full"] / "analysis", folder / "analysis", dirs_exist_ok=True)
    (folder / "analysis" / "numbers.jsonl").unlink()
    card = written(folder, tmp_path / "pushed", auxiliary=True)
    pushed = set(texts(tmp_path / "pushed"))
    assert card.data.library_name == ("peft" if later == "adapter" else "transformers")
    assert ("adapter_config.json" in pushed) == ("adapter_model.safetensors" in pushed) == (later == "adapter")
    assert ("config.json" in pushed) == ("model.safetensors" in pushed) == (later == "full")
    assert ("auxiliary/discriminator.safetensors" in pushed) == (later == "full")
    assert "images/alignment.png" not in pushed


def test_without_the_text_of_an_example(run, tmp_path):
    card = written(run("full"), tmp_path / "pushed", alignment=False)
    assert not (tmp_path / "pushed" / "images" / "alignment.png").exists() and "Alignment" not in headings(card)
    # Nothing was held out.
    folder = run("adapter")
    result = read_json(folder / RESULT_NAME)
    del result["data"]["eval"]
    (folder / RESULT_NAME).write_text(json.dumps(result))
    (folder / "alignment.png").touch()
    assert "tokens of an example of the training data attend" in model_card(folder, online=False).text


def test_a_cell_of_a_comparison(run, tmp_path):
    folder = tmp_path / "grid" / "cells" / "row-seed0"
    shutil.copytree(run("adapter"), folder)
    (folder / "cell.json").write_text(json.dumps({"label": "row"}))
    metrics = read_json(folder / RESULT_NAME)["metrics"]
    other = {**metrics, "eval_bits_per_byte": metrics["eval_bits_per_byte"] + 0.2}
    lines = [
        {"label": label, "seed": seed, "status": status, "metrics": found}
        for label, seed, status, found in (
            *(("row", 0, "ok", metrics), ("row", 3, "ok", other)),
            *(("row", 4, "failed", {}), ("else", 0, "ok", other)),
        )
    ]

    def results(lines):
        (tmp_path / "grid" / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return model_card(folder, online=False)

    card = results(lines)
    mean = metrics["eval_bits_per_byte"] + 0.1
    assert row(card, "bits per byte")[-1] == f"{mean:.4f} ± {0.2 / 2**0.5:.4f}"
    assert "differ in their training seed alone (0, 3); all else in this card is about the one" in card.text
    # One seed, or the results of another run under that name.
    for few in (lines[:1], [{**line, "metrics": other} for line in lines]):
        card = results(few)
        assert "over training seeds" not in card.text and "one training run, with seed 0." in card.text
    with pytest.raises(UserError, match=r"holds the runs of a comparison: push one of them, .*cells/row-seed0$"):
        push_run(tmp_path / "grid", "ann/tiny")


def test_a_teacher_that_was_trained_or_wrote_the_text(run):
    folder = with_settings(of_pair(run("full"), "ann/student", "ann/teacher"), sft_teacher=True)
    changed(folder, models={"teacher": "teacher"}, settings={"load_teacher_in_4bit": True})
    [told] = row(model_card(folder, online=False), "teacher")
    assert told.startswith("[`ann/teacher`]") and told.endswith(" parameters, quantized to 4 bits (NF4)")
    assert ", first fine-tuned on the same data, " in told
    folder = changed(of_pair(run("sft"), "ann/student", "ann/teacher"), method="seq_kd", models={"teacher": None})
    card = model_card(folder, online=False)
    assert row(card, "teacher")[0].startswith("[`ann/teacher`]") and "arXiv 1606.07947" in card.text


def test_without_anything_that_may_be_missing(run, tmp_path):
    folder = run("sft")
    for name in (SETTINGS_NAME, "trainer_state.json"):
        (folder / name).unlink()
    result = read_json(folder / RESULT_NAME)
    kept = {name: result[name] for name in ("method", "steps", "settings", "metrics")}
    (folder / RESULT_NAME).write_text(json.dumps({**kept, "metrics": {}}))
    card = written(folder, tmp_path / "pushed", None)
    assert headings(card) == ["How to use", "Training", "Limits", "Licence"]
    assert "No score of this model was measured" in card.text and "images" not in card.text
    assert "model-index" not in card.data.to_dict() and "None" not in card.text and "nan" not in card.text
    assert 'from_pretrained("REPOSITORY")' in card.text


# ---- Scores


def test_scores_of_these_weights(run, tmp_path, caplog):
    folder = run("adapter")
    scores = evaluated(folder)
    evaluated(folder, "evaluation-greedy", seeds=())
    # Both are 0 of this model.
    part = scores["sets"]["inside"]
    part["sampled"] |= {"rouge_l": 21.5, "rouge_l_sd": 0.25}
    part["greedy"] |= {"rouge_l": 22.75}
    for name in ("evaluation", "evaluation-greedy"):
        path = folder / name / "scores.json"
        kept = json.loads(path.read_text())
        kept["sets"]["inside"] |= {
            kind: part[kind] for kind in ("sampled", "greedy") if kind in kept["sets"]["inside"]
        }
        path.write_text(json.dumps(kept))
    card = written(folder, tmp_path / "pushed")
    results = card.data.eval_results
    assert all(isinstance(result, EvalResult) for result in results)
    found = {(result.metric_type, result.metric_name): result.metric_value for result in results}
    result = read_json(folder / RESULT_NAME)
    assert found == {
        ("rouge", "ROUGE-L (mean over 2 decoding seeds)"): part["sampled"]["rouge_l"],
        ("bits_per_byte", "bits per byte of the references"): part["bits_per_byte"],
        ("rouge", "ROUGE-L (greedy)"): part["greedy"]["rouge_l"],
        ("bits_per_byte", "bits per byte"): round(result["metrics"]["eval_bits_per_byte"], 6),
    }
    assert {result.dataset_type for result in results} == {"inside", "held-out"}
    assert "21.50 ± 0.25 [" in card.text
    assert "one training run, with seed 0; a standard deviation of scores is that of decoding" in card.text
    # Only other prompts tell an evaluation of the same set from another.
    path = folder / "evaluation-greedy" / "scores.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "settings": {**kept["settings"], "prompt_style": "chat"}}))
    names = [result.metric_name for result in model_card(folder, online=False).data.eval_results]
    assert "ROUGE-L (greedy, chat prompts)" in names and len(set(names)) == len(names)
    assert "bits per byte of the references, alpaca prompts" in names
    # Of other weights: the run was trained anew.
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)
    caplog.clear()
    card = model_card(folder, online=False)
    assert "decoding" not in card.text and len(card.data.eval_results) == 1
    assert {"evaluation", "evaluation-greedy"} == {record.args[0] for record in caplog.records}


def test_sets_of_the_hub_and_their_first_examples(run):
    folder = run("full")
    scores = evaluated(folder)
    scores["settings"]["limit"] = 1000
    scores["sets"] = {"dolly": scores["sets"]["inside"] | {"source": "MiniLLM/dolly/valid.jsonl"}}
    scores["sets"]["vicuna"] = scores["sets"]["dolly"] | {"source": "/srv/vicuna.jsonl", "bits_per_byte": None}
    (folder / "evaluation" / "scores.json").write_text(json.dumps(scores))
    results = model_card(folder, online=False).data.eval_results[:-1]
    assert [(result.dataset_type, result.metric_type) for result in results] == [
        ("MiniLLM/dolly", "rouge"),
        ("MiniLLM/dolly", "bits_per_byte"),
        ("vicuna", "rouge"),
    ]
    assert results[0].metric_name == "ROUGE-L (mean over 2 decoding seeds, the first 1,000 examples)"


# ---- What stays here


@pytest.mark.parametrize("name", ["full", "adapter", "sft"])
def test_no_path_and_no_token_leaves_the_machine(run, made, models, tmp_path, name):
    folder, target = run(name), tmp_path / "pushed"
    evaluated(folder)
    for file in ("config.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            content = read_json(folder / file)
            (folder / file).write_text(
                json.dumps({**content, "_name_or_path": str(models[0]), "name_or_path": str(models[0])})
            )
    (folder / "checkpoint-1").mkdir(exist_ok=True)
    (folder / "checkpoint-1" / "model.safetensors").write_bytes(b"x")
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "log.txt").write_text("x")
    written(folder, target, auxiliary=name != "sft")
    for path, text in texts(target).items():
        for secret in (str(folder), str(made[name]), str(models[0].parent), str(tmp_path), SECRET):
            assert secret not in text, (path, secret)
    # Nor do the names of the folders into what people read.
    assert "my_student" not in texts(target)["README.md"] and "my_teacher" not in texts(target)["README.md"]
    unwanted = "training_args optimizer checkpoint trainer_state result.json settings log questions".split()
    assert not [path for path in texts(target) if any(word in path for word in unwanted)]
    if name == "full":
        assert read_json(target / "config.json")["_name_or_path"] == "my_student"
    if name != "sft":
        assert (target / "auxiliary" / "projectors.safetensors").is_file()
        assert (target / "auxiliary" / "discriminator.safetensors").is_file() == (name == "full")


def test_settings_that_are_not_told(run):
    folder = run("full")
    told = {"lora_target_modules": ["q_proj", "v_proj"], "bf16": True, "attention_layers": "3:7,5:11", "max_steps": 2}
    kept = {
        **{"deepspeed": "conf/ds.json", "fsdp": [], "note": "~/x", "other": "C:\\x", "more": SECRET, "seed": None},
        **{"hub_token": "short", "teacher_model_init_kwargs": {"token": "short"}, "report_to": ["wandb"]},
        **{"list": ["../x"]},
    }
    write_yaml(folder / SETTINGS_NAME, {**told, **kept, "pipe": "a|b"})
    text = str(model_card(folder, online=False))
    found = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert found == sorted([*told, "pipe"]) and "short" not in text and "| a\\|b |" in text


# ---- Licences of folders


def test_licences_of_folders(run, tmp_path):
    folder, student = run("sft"), tmp_path / "other_student"
    student.mkdir()
    with_settings(folder, model_name_or_path=str(student))

    def licence():
        data = model_card(folder, online=False).data.to_dict()
        return [data.get(name) for name in ("license", "license_name", "license_link")]

    assert licence() == [None] * 3
    for text, *expected in (
        ("                Apache License\n        Version 2.0, January 2004\n", "apache-2.0", None, None),
        ("MIT License\n\nCopyright", "mit", None, None),
        ("Our own terms", "other", "license-of-the-base-model", "LICENSE"),
    ):
        (student / "LICENSE").write_text(text)
        assert licence() == expected
    target = tmp_path / "pushed"
    card = written(folder, target)
    assert (target / "LICENSE").read_text() == "Our own terms"
    assert "[license-of-the-base-model](LICENSE), the LICENSE in its folder" in card.text
    for metadata, *expected in (
        # One that the hub has no id for.
        ("license: Our Licence", "other", "Our Licence", "LICENSE"),
        ("license: llama3.2", "llama3.2", None, None),
        ("license: other\nlicense_name: ours", "other", "ours", "LICENSE"),
    ):
        (student / "README.md").write_text(f"---\n{metadata}\n---\n# x\n")
        assert licence() == expected
    # The file that the link names goes with the student; where there is none, nor is there a link.
    metadata = "---\nlicense: other\nlicense_name: ours\nlicense_link: TERMS.md\n---\n# x\n"
    (student / "README.md").write_text(metadata)
    (student / "TERMS.md").write_text("Terms")
    assert licence() == ["other", "ours", "LICENSE"]
    write_model_folder(folder, tmp_path / "with_terms", online=False)
    assert (tmp_path / "with_terms" / "LICENSE").read_text() == "Terms"
    (student / "TERMS.md").unlink()
    (student / "LICENSE").rename(student / "not_here")
    assert licence() == ["other", "ours", None]
    assert "`other`, ours, stated by the README.md" in model_card(folder, online=False).text
    (student / "not_here").rename(student / "LICENSE")
    (student / "README.md").write_text("# no metadata\n")
    assert licence()[0] == "other"


# ---- Bad input, and the command


def test_folders_that_are_no_runs(run, tmp_path):
    folder = run("sft")
    cases = [
        (tmp_path / "none", {}, "isn't a folder"),
        (tmp_path, {}, "has no result.json"),
        (folder, {"auxiliary": True, "without": "auxiliary.json"}, "leave --auxiliary out"),
        (folder, {"without": "model.safetensors"}, "no model or adapter"),
    ]
    for path, options, expected in cases:
        if options.get("without"):
            (path / options.pop("without")).unlink()
        with pytest.raises(UserError) as error:
            write_model_folder(path, tmp_path / "pushed", online=False, **options)
        assert expected in str(error.value) and "\n" not in str(error.value)
        assert not (tmp_path / "pushed").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="isn't empty: name a folder that is"):
        write_model_folder(run("full"), tmp_path / "full", online=False)


def test_offline(run):
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE=1 set: unset it$"):
        push_run(run("sft"), "ann/tiny")
    with pytest.raises(UserError, match="unset it, or leave push_to_hub out and push later with `hf-dskd push"):
        push_run(run("adapter"), "ann/tiny", words=TRAINING)
    card = model_card(of_pair(run("full"), "ann/student", "ann/teacher", "ann/data"))
    for whose in ("student before training", "teacher", "training data"):
        assert f"- {whose}: not looked up" in card.text
    assert "The licence of the student was not looked up" in card.text


def test_command_line(run, tmp_path, capsys):
    folder, target = run("sft"), tmp_path / "pushed"
    assert cli.run(["push", str(folder), "ann/tiny", "--dry_run", str(target)]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1] == str(target) and '"ann/tiny"' in (target / "README.md").read_text()
    )
    # Options in between, and no namespace that could be asked for.
    assert cli.run(["push", str(folder), "--no_alignment", "tiny", "--dry_run", str(tmp_path / "between")]) == 0
    assert '"NAMESPACE/tiny"' in (tmp_path / "between" / "README.md").read_text()
    for arguments, expected in (
        ([str(folder)], "REPO is not set"),
        ([], "required: RUN"),
        ([str(folder), "a", "--token", "hf_x"], "unrecognized arguments: --token ..."),
        ([str(tmp_path / "none"), "a"], "isn't a folder"),
    ):
        with pytest.raises(UserError) as error:
            cli.run(["push", *arguments])
        assert expected in str(error.value) and "\n" not in str(error.value)


def test_identity(tmp_path):
    facts = {"library_name": "transformers", "method": "sft", "model_type": None}
    assert identity("ann/student", True, "sft") == {**facts, "base_model": "ann/student", "library_name": "peft"}
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert identity(str(tmp_path), False, "sft") == {**facts, "base_model": None, "model_type": "gpt2"}
    assert identity(SMOL, False, "sft")["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    (tmp_path / SMOL).mkdir()
    (tmp_path / SMOL / MARKER).write_text("{}")
    assert identity(str(tmp_path / SMOL), False, "sft")["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
