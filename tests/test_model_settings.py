"""Every setting of trl's ModelConfig and ScriptArguments, and every option of from_pretrained, is used or refused."""

import json
import shutil
import subprocess
from dataclasses import fields, make_dataclass

import pytest
import tiny
import torch
import trl
from datasets import Dataset

from hf_dskd import run
from hf_dskd.data.fingerprint import fingerprint
from hf_dskd.errors import UserError
from hf_dskd.hub.card import model_card
from hf_dskd.models.pretrained import origin
from hf_dskd.teacher.identity import files_digest
from hf_dskd.utils import environment


COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A cache of the hub's client, with two revisions of a student and of a teacher, of different weights."""
    folder = tmp_path_factory.mktemp("hub")
    for name, make, tokenizer in (
        ("student", tiny.gpt2, tiny.byte_level_tokenizer()),
        ("teacher", tiny.qwen2, tiny.sentencepiece_tokenizer()),
    ):
        repository = folder / f"models--some--{name}"
        (repository / "refs").mkdir(parents=True)
        for seed, (revision, commit) in enumerate(COMMITS.items()):
            (repository / "refs" / revision).write_text(commit)
            snapshot = repository / "snapshots" / commit
            make(len(tokenizer), seed=seed).save_pretrained(snapshot)
            tokenizer.save_pretrained(snapshot)
    return folder


@pytest.fixture
def parsed(hub, tmp_path):
    def parse(*flags):
        where = json.dumps({"cache_dir": str(hub)})
        base = ["--model_name_or_path=some/student", "--teacher_model_name_or_path=some/teacher"]
        base += [f"--model_init_kwargs={where}", f"--teacher_model_init_kwargs={where}"]
        base += [f"--output_dir={tmp_path / 'run'}", "--use_cpu=true", "--bf16=false", "--max_steps=1"]
        base += ["--method=dskd_cma", "--max_length=256", "--prompt_style=plain", "--save_strategy=no"]
        given = {flag.partition("=")[0] for flag in flags}
        return run.parse(None, None, [*(flag for flag in base if flag.partition("=")[0] not in given), *flags])

    return parse


def make(parsed_run):
    model, options = parsed_run.model, parsed_run.options
    return run.make_trainer(
        parsed_run, model.model_name_or_path, options.teacher_model_name_or_path, tiny.dataset(4), None
    )


def adapter(trainer):
    return trainer.model.peft_config["default"]


def weight(model):
    return model.get_input_embeddings().weight


LORA = ["--use_peft", "--lora_target_modules=c_attn"]
# Of each setting a value that isn't the default, as flags, and what it does to a trainer or what refuses it.
MODEL = {
    "model_name_or_path": ([], lambda trainer: trainer._facts["student"] == "some/student"),
    "model_revision": (
        ["--model_revision=v2"],
        lambda trainer: torch.equal(weight(trainer.model), weight(tiny.gpt2(400, seed=1))),
    ),
    "dtype": (["--dtype=bfloat16"], lambda trainer: trainer.model.dtype == torch.bfloat16),
    "attn_implementation": (
        ["--attn_implementation=eager"],
        lambda trainer: trainer.model.config._attn_implementation == "eager",
    ),
    "lora_target_modules": (
        ["--use_peft", "--lora_target_modules", "c_proj", "c_fc"],
        lambda trainer: adapter(trainer).target_modules == {"c_proj", "c_fc"},
    ),
    "lora_target_parameters": (
        [
            *("--model_name_or_path=some/teacher", "--teacher_model_name_or_path=some/student", "--use_peft"),
            *("--lora_target_modules=q_proj", "--lora_dropout=0", "--lora_target_parameters", "0.mlp.up_proj.weight"),
        ],
        lambda trainer: adapter(trainer).target_parameters == ["0.mlp.up_proj.weight"],
    ),
    "lora_task_type": ([*LORA, "--lora_task_type=SEQ_CLS"], "peft_config.task_type='SEQ_CLS'"),
    "load_in_8bit": (["--load_in_8bit"], "load_in_8bit=True needs an adapter to train"),
    "load_in_4bit": ([*LORA, "--load_in_4bit"], "load_in_4bit=True: a 4-bit student can't be trained on a CPU"),
    "bnb_4bit_quant_type": (["--bnb_4bit_quant_type=fp4"], "bnb_4bit_quant_type='fp4' without load_in_4bit"),
    "use_bnb_nested_quant": (["--use_bnb_nested_quant"], "use_bnb_nested_quant=True without load_in_4bit"),
    "bnb_4bit_quant_storage": (
        ["--bnb_4bit_quant_storage=uint8"],
        "bnb_4bit_quant_storage='uint8' without load_in_4bit",
    ),
}
# Those that peft's configuration keeps under a name.
for name, flags, field, value in (
    ("use_peft", [], "target_modules", {"c_attn"}),
    ("lora_r", ["--lora_r=3"], "r", 3),
    ("lora_alpha", ["--lora_alpha=5"], "lora_alpha", 5),
    ("lora_dropout", ["--lora_dropout=0.5"], "lora_dropout", 0.5),
    ("lora_modules_to_save", ["--lora_modules_to_save", "ln_f"], "modules_to_save", ["ln_f"]),
    ("use_rslora", ["--use_rslora"], "use_rslora", True),
    ("use_dora", ["--use_dora"], "use_dora", True),
):
    MODEL[name] = [*LORA, *flags], lambda trainer, field=field, value=value: getattr(adapter(trainer), field) == value
# What versions of trl have or had beside these is refused without being known, but for one.
BESIDE = {"trust_remote_code", "torch_dtype"}


@pytest.mark.parametrize("name", [setting.name for setting in fields(trl.ModelConfig)])
def test_every_setting_of_the_model(name, parsed):
    if name in BESIDE:
        return
    flags, expected = MODEL[name]
    if isinstance(expected, str):
        with pytest.raises(UserError) as error:
            make(parsed(*flags))
        assert expected in str(error.value)
    else:
        assert expected(make(parsed(*flags)))


def test_an_unknown_setting_of_the_model():
    from hf_dskd.run.trl_settings import check_model_config

    later = make_dataclass("Later", [("sparsity", float, 0.0)], bases=(trl.ModelConfig,))
    check_model_config(later(), ())
    with pytest.raises(UserError, match=r"sparsity=0\.5 of trl's ModelConfig is not used"):
        check_model_config(later(sparsity=0.5), ())


@pytest.mark.parametrize("name", ["lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora"])
def test_an_adapters_settings_without_an_adapter(name, parsed):
    flags = [
        flag for flag in MODEL[name][0] if flag not in ("--use_peft", *(LORA if name != "lora_target_modules" else ()))
    ]
    with pytest.raises(UserError, match=f"{name}=.* without use_peft: all of the student would be trained; add --use"):
        parsed(*flags)
    # Who says so switches a recipe's adapter off, and a file of such a run makes the same run.
    off = parsed(*flags, "--use_peft=false")
    assert make(off).model.num_parameters(only_trainable=True) == tiny.gpt2(400).num_parameters()
    assert not {"use_peft", name} & run.changed_settings(off).keys()


# ---- The data


def saved_to_disk(tmp_path):
    tiny.dataset(4).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def a_file(tmp_path):
    tiny.dataset(4).to_json(tmp_path / "rows.jsonl")
    return str(tmp_path / "rows.jsonl")


def test_data_that_are_not_there(parsed, tmp_path):
    for dataset in (saved_to_disk(tmp_path), a_file(tmp_path), "python_functions"):
        with pytest.raises(UserError, match=r"dataset_config='en': .* has no configurations"):
            parsed(f"--dataset_name={dataset}", "--dataset_config=en")
    flags = [f"--dataset_name={a_file(tmp_path)}", "--held_out_size=1"]
    for name, words in (("validation", "isn't there: the splits are train"), ("train", "is what is")):
        with pytest.raises(UserError, match=f"dataset_test_split='{name}' {words}"):
            run.load_data(parsed(*flags, f"--dataset_test_split={name}"))
    assert len(run.load_data(parsed(*flags))[1]) == 1


def test_the_settings_of_the_data_are_known(parsed):
    # Of each of these there is a test here, or of loading data.
    assert {setting.name for setting in fields(trl.ScriptArguments)} <= {
        *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming"),
        "ignore_bias_buffers",
    }
    with pytest.raises(UserError, match="ignore_bias_buffers=True is not used"):
        parsed("--ignore_bias_buffers=true")


# ---- The teacher's revision


def test_the_teachers_revision(parsed):
    trainer = make(parsed("--teacher_model_revision=v2"))
    assert torch.equal(weight(trainer.teacher.model), weight(tiny.qwen2(450, seed=1)))
    trainer = make(parsed())
    assert torch.equal(weight(trainer.teacher.model), weight(tiny.qwen2(450, seed=0)))


def test_the_revision_of_a_teacher_that_is_trained_first(parsed):
    settings = ["--teacher_model_revision=v2", "--sft_teacher", "--sft_teacher_lora_r=0", "--sft_teacher_epochs=1"]
    started = parsed(*settings, "--sft_teacher_learning_rate=1e-12")
    folder = run.chosen_teacher(started, tiny.dataset(4))
    trainer = run.make_trainer(started, "some/student", folder, tiny.dataset(4), None)
    # Its folder has no revisions, and is where it is.
    assert trainer.args.teacher_model_init_kwargs == {}
    torch.testing.assert_close(weight(trainer.teacher.model), weight(tiny.qwen2(450, seed=1)), rtol=0, atol=1e-6)


def test_revisions_that_are_refused(parsed, hub):
    both = json.dumps({"cache_dir": str(hub), "revision": "main"})
    folder = hub / "models--some--student" / "snapshots" / COMMITS["main"]
    for flags, words in (
        (
            ["--teacher_model_revision=v2", f"--teacher_model_init_kwargs={both}"],
            "teacher_model_revision='v2' and teacher_model_init_kwargs with revision='main'",
        ),
        (
            ["--model_revision=v2", f"--model_init_kwargs={both}"],
            "model_revision='v2' and model_init_kwargs with revision='main'",
        ),
        (
            [f"--model_name_or_path={folder}", "--model_revision=v2"],
            r"revision='v2', and .* is a folder, which has no revisions",
        ),
    ):
        with pytest.raises(UserError, match=words):
            make(parsed(*flags))
    with pytest.raises(UserError, match="teacher_model_revision='v2' without teacher_model_name_or_path"):
        run.parse(None, None, ["--teacher_model_revision=v2", "--output_dir=x", "--use_cpu=true"])


def test_a_smoke_run_leaves_revisions_and_folders_behind(parsed):
    smoke = parsed(
        "--model_name_or_path=openai-community/gpt2",
        "--teacher_model_name_or_path=Qwen/Qwen1.5-1.8B",
        "--model_revision=v2",
        "--teacher_model_revision=v2",
        "--smoke",
    )
    trainer = make(smoke)
    assert trainer.args.model_init_kwargs == {"dtype": "float32"} and trainer.args.teacher_model_init_kwargs == {}


# ---- Options of from_pretrained


def options(hub, **more):
    return json.dumps({"cache_dir": str(hub), **more})


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("dtype", "torch.bfloat16", torch.bfloat16),
        ("torch_dtype", "bfloat16", torch.bfloat16),
        ("dtype", "auto", torch.float32),  # that of the files
    ],
)
def test_both_names_of_the_dtype(name, value, expected, parsed, hub, tmp_path):
    flags = [f"--{side}model_init_kwargs={options(hub, **{name: value})}" for side in ("", "teacher_")]
    trainer = make(parsed(*flags, f"--teacher_cache={tmp_path / 'cache'}"))
    assert trainer.model.dtype == trainer.teacher.head.weight.dtype == expected
    facts = json.loads((tmp_path / "cache" / "index.json").read_text())["facts"]
    assert facts["teacher_dtype"] == str(expected).removeprefix("torch.")


def test_a_torch_dtype_in_python(tmp_path, hub):
    import runs

    where = {"cache_dir": str(hub), "dtype": torch.float16}
    trainer = runs.trainer(
        tmp_path,
        student="some/student",
        teacher="some/teacher",
        model_init_kwargs=where,
        method="dskd_cma",
        teacher_model_init_kwargs=where,
    )
    assert trainer.model.dtype == trainer.teacher.model.dtype == torch.float16


@pytest.mark.parametrize(
    "more, words",
    [
        ({"dtype": "bfloat"}, "dtype='bfloat': name one of float32, bfloat16, float16 or auto"),
        ({"torch_dtype": "int8"}, "torch_dtype='int8': name one of"),
        ({"dtype": 16}, "dtype=16: name one of"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "dtype='float32' and torch_dtype='bfloat16': name one"),
        ({"load_in_4bit": True}, "has 'load_in_4bit'; write quantization_config="),
        ({"output_loading_info": True}, "has 'output_loading_info'; a model alone is needed"),
        ({"tp_plan": "auto"}, "has 'tp_plan'; a model isn't cut over processes here"),
        ({"use_auth_token": "x"}, "has 'use_auth_token'; write token instead"),
        ({"attn_implementatio": "eager"}, "have 'attn_implementatio', .* did you mean 'attn_implementation'"),
        ({"hidden_layers": 3}, "have 'hidden_layers', which is no option of from_pretrained and no setting of"),
    ],
)
def test_options_that_are_refused(more, words, parsed, hub):
    for side in ("", "teacher_"):
        with pytest.raises(UserError, match=words):
            make(parsed(f"--{side}model_init_kwargs={options(hub, **more)}"))


def test_a_dtype_against_an_option(parsed, hub):
    option = f"--model_init_kwargs={options(hub, dtype='float16')}"
    with pytest.raises(
        UserError, match=r"dtype='bfloat16' and model_init_kwargs with dtype='torch.float16': name one"
    ):
        make(parsed("--dtype=bfloat16", option))
    assert make(parsed(option)).model.dtype == make(parsed("--dtype=float16", option)).model.dtype == torch.float16
    flags = ["--teacher_dtype=float16", f"--teacher_model_init_kwargs={options(hub, dtype='bfloat16')}"]
    with pytest.raises(UserError, match="teacher_dtype='float16' and teacher_model_init_kwargs with dtype 'bfloat16'"):
        make(parsed(*flags))


def test_options_of_a_loaded_model(tmp_path):
    import runs

    with pytest.raises(
        UserError, match=r"model_init_kwargs=.* is for a model given by name, and this GPT2LMHeadModel"
    ):
        runs.trainer(tmp_path, model_init_kwargs={"attn_implementation": "eager"})
    with pytest.raises(UserError, match=r"teacher_model_init_kwargs=.* and this Qwen2ForCausalLM is loaded already"):
        runs.trainer(tmp_path, teacher_model_init_kwargs={"revision": "v2"})
    with pytest.raises(UserError, match="teacher_dtype='float16' needs teacher_model as a name"):
        runs.trainer(tmp_path, teacher_dtype="float16")


def test_settings_of_the_configuration_are_checked_as_they_will_be(parsed, hub):
    # Positions that the model will have decide how long a sequence may be.
    make(
        parsed(
            "--max_length=1200",
            f"--model_init_kwargs={options(hub, n_positions=2048, ignore_mismatched_sizes=True)}",
            f"--teacher_model_init_kwargs={options(hub, max_position_embeddings=2048)}",
        )
    )
    with pytest.raises(UserError, match="max_length=1200 is too long for the student"):
        make(parsed("--max_length=1200"))


def test_replaced_settings_of_the_teacher_are_facts_of_the_cache(parsed, hub, tmp_path):
    cache = f"--teacher_cache={tmp_path / 'cache'}"
    make(parsed(cache))
    with pytest.raises(UserError, match="teacher_settings"):
        make(parsed(cache, f"--teacher_model_init_kwargs={options(hub, rms_norm_eps=0.1)}"))


def test_a_subfolder(parsed, hub, tmp_path):
    whole = hub / "models--some--student" / "snapshots" / COMMITS["main"]
    shutil.copytree(whole, tmp_path / "repository" / "inner")
    flags = [f"--model_name_or_path={tmp_path / 'repository'}", '--model_init_kwargs={"subfolder": "inner"}']
    assert torch.equal(weight(make(parsed(*flags)).model), weight(tiny.gpt2(400)))


def test_the_cache_tells_revisions_and_variants_apart(hub, tmp_path):
    teacher = tmp_path / "teacher"
    tiny.qwen2(seed=0).save_pretrained(teacher)
    tiny.qwen2(seed=1).save_pretrained(teacher, variant="fp16")
    for name, kinds in (
        (str(teacher), ({}, {"variant": "fp16"})),
        ("some/teacher", [{"cache_dir": str(hub), "revision": revision} for revision in COMMITS]),
    ):
        digests = {files_digest(name, kind, download=False) for kind in kinds}
        assert len(digests) == 2 and None not in digests


# ---- What a run writes down of what it was made of


def test_commits_and_fingerprint_are_written_down(parsed, tmp_path):
    trainer = make(parsed("--teacher_model_revision=v2"))
    trainer.train()
    report = trainer.write_report().read_text()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["models"]["student_commit"] == COMMITS["main"] in report
    assert result["models"]["teacher_commit"] == COMMITS["v2"] in report
    assert result["data"]["fingerprint"] == fingerprint(trainer.train_dataset)
    assert result["data"]["fingerprint"] in report
    card = str(model_card(tmp_path / "run", online=False))
    assert all(word in card for word in (*COMMITS.values(), result["data"]["fingerprint"]))


def test_models_of_folders_have_no_commit_and_loaded_ones_what_transformers_notes(hub, tmp_path):
    loaded = tiny.gpt2()
    loaded.config._commit_hash = COMMITS["v2"]
    assert origin(loaded) == {"commit": COMMITS["v2"]}
    assert origin("some/teacher", {"cache_dir": str(hub), "revision": "v2"}) == {"commit": COMMITS["v2"]}
    assert origin(str(tmp_path)) == origin(tiny.gpt2()) == {"commit": None}


def test_the_fingerprint_is_of_the_examples_alone(tmp_path):
    import runs

    rows = tiny.dataset(8)
    rows.save_to_disk(tmp_path / "saved")
    same = (rows, Dataset.load_from_disk(tmp_path / "saved"), Dataset.from_list(rows.to_list()))
    datasets = [runs.trainer(tmp_path / "run", train_dataset=data, method="sft").train_dataset for data in same]
    found = [fingerprint(data) for data in datasets]
    assert len(set(found)) == 1 and len(found[0]) == 32
    first = datasets[0]
    other = first.map(
        lambda row, place: {"input_ids": [*row["input_ids"][:-1], 3]} if place == 7 else {}, with_indices=True
    )
    others = [other, first.select(range(7)), first.select([1, 0, *range(2, 8)]), first.remove_columns("input_ids")]
    assert len({found[0], *map(fingerprint, others)}) == 5
    # Cut otherwise, nested rows would have the same values.
    assert fingerprint(Dataset.from_dict({"a": [[1, 2], [3]]})) != fingerprint(Dataset.from_dict({"a": [[1], [2, 3]]}))
    assert fingerprint(first.to_iterable_dataset()) is None


def test_the_commit_of_hf_dskd(monkeypatch, tmp_path):
    package = tmp_path / "checkout" / "hf_dskd"
    package.mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(package / "utils" / "environment.py"))

    class Installed:
        def read_text(self, name):
            return json.dumps({"vcs_info": {"vcs": "git", "commit_id": "c" * 40}})

    monkeypatch.setattr(environment, "distribution", lambda name: Installed())
    assert environment.own_commit() == "c" * 12
    git = ["git", "-C", str(package.parent), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    (package / "__init__.py").write_text("")
    # A repository that it was copied into.
    (package.parent / "own.py").write_text("")
    subprocess.run([*git, "add", "own.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "own"], check=True)
    assert environment.own_commit() is None
    (package / "a.py").write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout[:12]
    assert environment.own_commit() == commit
    assert environment.versions()["hf_dskd"].endswith(f"+g{commit}")
    (package / "a.py").write_text("2")
    assert environment.own_commit() == f"{commit}.dirty"
