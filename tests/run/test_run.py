"""Recipes end to end on tiny models, and what the command line answers."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
import tiny
from transformers import AutoModelForCausalLM
from trl import ModelConfig, ScriptArguments
from warm import run_command

from hf_dskd import UserError, run
from hf_dskd.report.record import evaluations
from hf_dskd.run import arguments as run_arguments
from hf_dskd.run import smoke as run_smoke
from hf_dskd.training.run_folder import check_fresh, remove_run
from hf_dskd.utils import files


ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders of a tiny student and teacher with their tokenizers, and a JSONL file."""
    folder = tmp_path_factory.mktemp("pair")
    tiny.gpt2(len(runs._STUDENT_TOKENIZER)).save_pretrained(folder / "student")
    runs._STUDENT_TOKENIZER.save_pretrained(folder / "student")
    tiny.qwen2(len(runs._TEACHER_TOKENIZER)).save_pretrained(folder / "teacher")
    runs._TEACHER_TOKENIZER.save_pretrained(folder / "teacher")
    rows = [{"instruction": row["prompt"], "context": "", "response": row["completion"]} for row in tiny.dataset(16)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def gpt2_qwen(pair, output, *arguments, check=True):
    done = run_command(
        *(ROOT / "recipes" / "gpt2_qwen.py", "--output_dir", output),
        *("--model_name_or_path", pair / "student", "--teacher_model_name_or_path", pair / "teacher"),
        *("--dataset_name", pair / "data.jsonl", "--held_out_size", "4", "--dataset_num_proc", "1"),
        *("--total_batch_size", "4", "--per_device_train_batch_size", "2", "--num_train_epochs", "1"),
        *("--max_length", "256", "--use_cpu", "--bf16", "false", *arguments),
    )
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def hf_dskd(*arguments):
    return run_command("hf-dskd", *arguments)


def test_gpt2_recipe_trains_its_teacher_distils_draws_and_resumes(pair, tmp_path):
    out = tmp_path / "out"
    done = gpt2_qwen(pair, out, "--sft_teacher", "--sft_teacher_epochs", "1", "--sft_teacher_lora_r", "4")
    printed = [Path(line) for line in done.stdout.splitlines() if line.startswith(str(out))]
    assert {path.name for path in printed} >= {"out", "alignment.png", "report.html"}
    assert all(path.exists() for path in printed)
    AutoModelForCausalLM.from_pretrained(out)
    # The teacher was trained: it is another model than the one given.
    trained = AutoModelForCausalLM.from_pretrained(out / "teacher").state_dict()
    given = AutoModelForCausalLM.from_pretrained(pair / "teacher").state_dict()
    assert any((trained[name].float() - given[name].float()).abs().max() > 0 for name in given)
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 3 and any("eval_bits_per_byte" in log for log in state["log_history"])

    result = json.loads((out / "result.json").read_text())
    assert (result["method"], result["seed"], result["steps"]) == ("dskd_cma_ga", 10, 3)
    assert result["settings"]["kd_temperature"] == 2.0
    assert set(result["versions"]) >= {"python", "torch", "transformers", "hf_dskd"}
    assert list(result["evaluations"]) == ["3"] and result["train_runtime"] > 0
    assert result["command"].startswith("gpt2_qwen.py ") and result["hardware"]["cores"] > 0
    assert result["models"]["trained_parameters"] == result["models"]["student_parameters"] > 0
    counts = {"rows": 12, "kept": 12, "cut": 0, "empty_responses": 0, "long_prompts": 0}
    assert counts.items() <= result["data"]["train"].items()
    assert result["changed_settings"]["max_length"] == [512, 256]
    assert (out / "report" / "report.md").is_file()

    # The run again, to look at its alignment.
    done = hf_dskd("analyse", out, "--examples", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = dict(line.split() for line in done.stdout.splitlines()[:-1])
    assert 0 < float(numbers["chunk_mass"]) < 1 and float(numbers["gradient_norm_kq"]) > 0
    (line,) = (out / "analysis" / "numbers.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 3
    done = hf_dskd("report", out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "chunk_mass" in (out / "report" / "report.md").read_text()
    # load_best_model_at_end is in the recipe's YAML.
    assert result["best_checkpoint"] == "checkpoint-3"
    assert (
        result["metrics"]["eval_bits_per_byte"]
        == json.loads((out / "eval_results.json").read_text())["eval_bits_per_byte"]
    )

    teacher = ("--sft_teacher", "--sft_teacher_epochs", "1", "--sft_teacher_lora_r", "4")
    longer = (*teacher, "--num_train_epochs", "2", "--resume_from_checkpoint", "last")
    settings = (out / "settings.yaml").read_text()
    refused = gpt2_qwen(pair, out, *longer, check=False)
    assert refused.returncode == 2 and "num_train_epochs was 1.0 and is 2.0; " in refused.stderr
    assert (out / "settings.yaml").read_text() == settings and (out / "result.json").is_file()
    again = gpt2_qwen(pair, out, *longer, "--allow_changed_settings")
    assert "using the teacher trained before" in again.stdout
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 6


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--divergence", "forward"], "did you mean 'forward_kl'"),
        (["--config", "nothere.yaml"], "nothere.yaml"),
        (["--dataset_name", "python_functions"], "train_size is not set"),
        (["--dataset_name", "nothere.jsonl"], "nothere.jsonl"),
        (["--rename_columns", "contxt=input"], "instruction, context, response"),
        (["--total_batch_size", "3"], "no multiple"),
        (["--held_out_size", "16"], "held_out_size=16"),
        (["--train_size", "13"], "train_size=13: there are 12 examples"),
        (["--dataset_train_split", "training"], "the splits are train"),
        (["--methd", "alm"], "--methd is no setting: did you mean --method?"),
        (["--smok"], "--smok is no setting: did you mean --smoke?"),
        (["--no-such-thing=1"], "--no-such-thing is no setting: --help lists the settings"),
    ],
)
def test_wrong_arguments(arguments, expected, pair, tmp_path):
    given = ["--output_dir", str(tmp_path), "--dataset_name", str(pair / "data.jsonl"), "--use_cpu", "--bf16", "false"]
    given += ["--total_batch_size", "4", "--per_device_train_batch_size", "2", "--held_out_size", "4"]
    with pytest.raises(UserError) as error:
        run.load_data(run.parse(None, ROOT / "recipes" / "gpt2_qwen.yaml", [*given, *arguments]))
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_file_without_its_flag_and_a_setting_that_is_none(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(f"output_dir: {tmp_path}\nmethd: alm\n")
    with pytest.raises(UserError, match=r"'.*my.yaml' belongs to no setting: name a configuration file with --config"):
        run.parse(None, None, [str(file)])
    for arguments in (["--config", str(file)], [f"--config={file}"]):
        with pytest.raises(UserError, match=r"my.yaml': methd is no setting: did you mean method\?"):
            run.parse(None, None, arguments)
    with pytest.raises(UserError, match="or a configuration file that does with --config"):
        run.load_data(run.parse(None, None, ["--output_dir", str(tmp_path)]))


@pytest.mark.parametrize(
    "arguments, in_file, expected",
    [
        (["--smoke"], {}, True),
        (["--smoke", "--seed", "1"], {}, True),
        (["--smoke=true"], {}, True),
        (["--smoke", "false"], {"smoke": True}, False),
        (["--smoke=False"], {}, False),
        (["--no_smoke"], {"smoke": True}, False),
        ([], {"smoke": False}, False),
        ([], {"smoke": True}, True),
    ],
)
def test_what_asks_for_a_smoke_run(arguments, in_file, expected):
    assert run_smoke.wants_smoke(arguments, in_file) == expected


def test_a_smoke_run_of_data_of_ones_own():
    flags = run_smoke.smoke_flags({"output_dir": "runs/x"}, {"smoke", "dataset_name"})
    assert "--output_dir=runs/x_smoke" in flags and "--max_steps=4" in flags
    assert not run_arguments.flag_names(flags) & {"prompt_column", "response_column", "train_size"}
    assert "--prompt_column=prompt" in run_smoke.smoke_flags({}, {"smoke"})


def test_a_folder_with_another_run_is_refused(tmp_path):
    config = runs.config(tmp_path)
    check_fresh(tmp_path)
    (tmp_path / "settings.yaml").touch()  # stopped before its first checkpoint
    check_fresh(tmp_path)
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(UserError, match=r"holds another run \(checkpoint-10\): .*--resume_from_checkpoint last"):
        check_fresh(tmp_path)
    (tmp_path / "result.json").touch()
    with pytest.raises(UserError, match=r"\(checkpoint-10, result.json\)"):
        run.train(run.Run(ScriptArguments(), config, None, run.RunArguments()))
    config.resume_from_checkpoint = "last"
    with pytest.raises(UserError, match="dataset_name is not set"):
        run.train(run.Run(ScriptArguments(), config, ModelConfig(), run.RunArguments()))
    remove_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".run.lock"] == ["settings.yaml"]


def test_a_recipes_help_has_its_own_defaults():
    text = run_arguments.help_text("x", ROOT / "recipes" / "gpt2_qwen.yaml")
    assert "--prompt_style (plain)" in text and "--prompt_style (chat)" in run_arguments.help_text("x")


def test_a_recipes_error_is_one_line_without_traceback(pair, tmp_path):
    done = gpt2_qwen(pair, tmp_path, "--kd_temperature", "0", check=False)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and errors[0].startswith("error: kd_temperature=0.0 must be above 0: the papers use 2.0")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_help_answers_within_a_second(recipe):
    start = time.perf_counter()
    done = subprocess.run([sys.executable, str(recipe), "--help"], capture_output=True, text=True, timeout=60)
    # A recipe that trains has its YAML beside it; a benchmark has options of its own.
    option = "--kd_temperature" if recipe.with_suffix(".yaml").is_file() else "--json"
    assert done.returncode == 0 and option in done.stdout
    # Loosely, since machines are busy: an import of torch alone takes longer.
    assert time.perf_counter() - start < 3


def test_total_batch_size_fixes_the_batch_for_any_number_of_processes(tmp_path):
    args = run.Run(
        None, runs.config(tmp_path, per_device_train_batch_size=2), None, run.RunArguments(total_batch_size=8)
    )
    run_arguments.set_accumulation(args)
    assert args.config.gradient_accumulation_steps == 4
    args.options.total_batch_size = 5
    with pytest.raises(UserError, match="total_batch_size=5"):
        run_arguments.set_accumulation(args)


def test_variant_keeps_everything_but_the_change(tmp_path):
    config = runs.config(tmp_path, kd_temperature=3.0, lr_scheduler_type="cosine", warmup_steps=3)
    other = run.variant(config, method="sft")
    assert other.method == "sft" and config.method == "dskd_cma_ga"
    one, two = config.to_dict(), other.to_dict()
    assert {name for name in one if one[name] != two[name]} == {"method"}


def test_python_functions_is_a_dataset(tmp_path):
    given = f"--output_dir {tmp_path} --use_cpu --bf16 false --train_size 5 --held_out_size 3 --maximum_characters 200"
    given = given.split()
    recipe = ROOT / "recipes" / "smollm2_qwen_coder.yaml"
    train, held_out = run.load_data(run.parse(None, recipe, given))
    assert (len(train), len(held_out)) == (5, 3)
    assert all(len(text) <= 200 for part in (train, held_out) for row in part for text in row.values())
    args = run.parse(None, recipe, [*given, "--held_out_size", "0"])
    assert run.load_data(args)[1] is None
    # A folder of that name is the user's own data.
    args.script.dataset_name = str(tmp_path / "python_functions")
    train.save_to_disk(args.script.dataset_name)
    assert run.load_data(args)[0]["prompt"] == train["prompt"]


def test_packaged_models_go_by_their_names_unless_a_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_dskd.offline.packaged.packaged_model", lambda name: Path("cache") / name)
    monkeypatch.chdir(tmp_path)
    assert run.model_name("SmolLM2-135M-Instruct") == str(Path("cache") / "SmolLM2-135M-Instruct")
    (tmp_path / "SmolLM2-135M-Instruct").mkdir()
    assert run.model_name("SmolLM2-135M-Instruct") == "SmolLM2-135M-Instruct"
    assert run.model_name("openai-community/gpt2") == "openai-community/gpt2" and run.model_name(None) is None


def test_precision_that_is_said_anywhere_is_not_overridden(tmp_path, monkeypatch):
    monkeypatch.setattr(run_arguments, "fastest_precision", lambda: ["--bf16", "--use_cpu"])
    file = tmp_path / "config.yaml"
    file.write_text(f"output_dir: {tmp_path}\n")
    assert run.parse(None, None, ["--config", str(file)]).config.bf16
    assert not run.parse(None, None, ["--config", str(file), "--bf16", "false"]).config.bf16
    file.write_text(f"output_dir: {tmp_path}\nbf16: false\n")
    config = run.parse(None, file, []).config
    assert not config.bf16 and config.use_cpu
    assert run.parse(None, file, ["--bf16"]).config.bf16


def test_the_settings_of_a_run_make_the_same_run(tmp_path):
    recipe = ROOT / "recipes" / "smollm2_qwen_coder.yaml"
    given = run.parse(None, recipe, ["--analysis_steps", "0", "--seed", "3", "--kd_rate", "0.0"])
    settings = run.changed_settings(given)
    assert (settings["analysis_steps"], settings["seed"], settings["kd_rate"]) == (0, 3, 0.0)
    assert settings["use_peft"] is True and settings["train_size"] == 320 and settings["lr_scheduler_type"] == "cosine"
    assert not {"remove_unused_columns", "skew_lambda"} & settings.keys()
    run.write_yaml(tmp_path / "settings.yaml", settings)
    again = run.parse(None, None, ["--config", str(tmp_path / "settings.yaml")])
    assert run.changed_settings(again) == settings
    # In transformers 4 the text of a configuration has the entries of one of its mappings in any order.
    assert again.config.to_dict() == given.config.to_dict()
    for name in ("options", "script"):
        assert str(getattr(again, name)) == str(getattr(given, name))


def test_evaluations_are_metrics_by_step():
    history = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 3.0, "epoch": 0.5}, {"step": 2, "eval_loss": 1.0}]
    assert evaluations(history) == {1: {"eval_loss": 3.0}, 2: {"eval_loss": 1.0}}


def test_a_run_that_logged_nothing_still_ends_well(tmp_path):
    trainer = runs.trainer(tmp_path, method="sft", max_steps=1, logging_steps=10)
    args = run.Run(ScriptArguments(), trainer.args, None, run.RunArguments())
    assert run.show(trainer, run.distil(args, trainer)) == [tmp_path / "report" / "report.html"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metrics"] == result["evaluations"] == {} and result["steps"] == 1


def test_settings_that_were_written_choose_the_same_checkpoint(tmp_path):
    """Left out, `greater_is_better` would come back as what it is by default."""
    arguments = ["--output_dir", str(tmp_path / "out"), "--save_strategy", "no", "--use_cpu", "--report_to", "none"]
    arguments += ["--metric_for_best_model", "eval_bits_per_byte", "--model_name_or_path", "student"]
    for said, expected in (((), False), (("--greater_is_better", "true"), True)):
        given = run.parse(None, None, [*arguments, "--load_best_model_at_end", "false", *said])
        files.write_yaml(tmp_path / "settings.yaml", run.changed_settings(given))
        again = run.parse(None, None, ["--config", str(tmp_path / "settings.yaml")])
        if said:
            assert given.config.greater_is_better is again.config.greater_is_better is expected
        else:
            assert given.config.greater_is_better == again.config.greater_is_better
        assert again.config.metric_for_best_model == "eval_bits_per_byte"
