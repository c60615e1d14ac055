"""`hf-dskd doctor`: every finding, and that one check's failure is no other's."""

import json
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from hub_stand_in import HubStandIn

from hf_dskd import cli, doctor
from hf_dskd.errors import UserError
from hf_dskd.run import arguments as run_arguments
from hf_dskd.run import data as run_data


def statuses(lines):
    return [status for status, _ in lines]


def one(lines):
    """The only line of a check."""
    (line,) = list(lines)
    return line


# ---- The report itself


def test_a_check_that_raises_is_a_line_and_the_others_go_on(monkeypatch, capsys):
    def broken():
        yield "ok", "the first line\n   goes on"
        raise KeyError("nothing")

    def refused():
        raise UserError("x=1 is wrong: set it to 2")
        yield

    checks = {"one": broken, "two": refused, "three": lambda: iter([("note", f"{doctor.Path.home()}/runs")])}
    monkeypatch.setattr(doctor, "MACHINE", checks)
    found = [(finding.check, finding.status, finding.text) for finding in doctor.examine()]
    assert found == [
        ("one", "ok", "the first line goes on"),
        ("one", "problem", "couldn't be looked at (KeyError: 'nothing')"),
        ("two", "problem", "x=1 is wrong: set it to 2"),
        ("three", "note", "~/runs"),
    ]
    assert cli.run(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 problems, 1 notes"
    monkeypatch.setattr(doctor, "MACHINE", {"three": checks["three"]})
    assert cli.run(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"check": "three", "status": "note", "text": "~/runs"}


@pytest.mark.parametrize("arguments", [["--confg", "x"], ["x.yaml"], ["--config"]])
def test_wrong_arguments_are_one_line(arguments):
    with pytest.raises(UserError, match="--help"):
        cli.run(["doctor", *arguments])


# ---- The machine


def test_packages_are_held_against_the_bounds(monkeypatch):
    assert statuses(doctor.packages()) == ["ok"]
    found = dict.fromkeys(doctor.PACKAGES, "99.0")
    found |= {"trl": "0.1.0", "transformers": "5.0.0", "evaluate": "0.1"}

    def version(name):
        if name == "peft":
            raise doctor.PackageNotFoundError(name)
        return found[name]

    bounds = {
        "hf-dskd": [
            *("transformers>=4.57.1,<6", "trl>=0.24", "peft>=0.17", "torch>=2", "datasets>=100; extra == 'demo'"),
            "evaluate>=0.4; python_version >= '3'",
        ],
        "transformers": ["huggingface-hub>=1,<2", "torch>=100"],
    }
    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "requires", bounds.get)
    lines = list(doctor.packages())
    problems = [text for status, text in lines if status == "problem"]
    assert [text.split(":")[0] for text in problems] == [
        "trl 0.1.0 is not >=0.24",
        "peft is missing",
        "evaluate 0.1 is not >=0.4",
        "huggingface_hub 99.0 is not <2,>=1",
    ]
    assert "pip install 'peft>=0.17'" in problems[1]
    assert lines[-1][0] == "ok" and "transformers 5.0.0" in lines[-1][1] and "torch 99.0" in lines[-1][1]


def test_an_old_python_is_a_problem(monkeypatch):
    assert statuses(doctor.python()) == ["ok"]
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.1")
    assert one(doctor.python())[0] == "problem"


@pytest.mark.parametrize(
    "cuda, available, driver, expected",
    [
        (None, False, True, ("problem", "CUDA build")),
        (None, False, False, ("ok", "without CUDA")),
        ("13.0", True, True, ("ok", "CUDA 13.0")),
        ("13.0", False, True, ("problem", "CUDA_VISIBLE_DEVICES")),
        ("13.0", False, False, ("note", "no NVIDIA driver")),
    ],
)
def test_torch_build_and_driver(monkeypatch, cuda, available, driver, expected):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "nvidia-smi" if driver else None)
    monkeypatch.setattr(doctor.Path, "exists", lambda path: False)
    status, text = one(doctor.torch_build())
    assert status == expected[0] and expected[1] in text


def test_several_gpus_need_a_launcher(monkeypatch):
    cards = [
        SimpleNamespace(name="Tesla T4", total_memory=15.8e9, major=7, minor=5),
        SimpleNamespace(name="RTX 4090", total_memory=25.3e9, major=8, minor=9),
    ]
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: cards[place])
    lines = list(doctor.gpus())
    assert statuses(lines) == ["ok", "ok", "note"]
    assert "Tesla T4, 15.8 GB, no bf16" in lines[0][1] and "cuda:1: RTX 4090, 25.3 GB, bf16" in lines[1][1]
    assert "--num_processes 2" in lines[2][1]
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert statuses(doctor.gpus()) == ["ok", "ok"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert one(doctor.gpus())[0] == "note"


@pytest.mark.parametrize("flags, expected", [(["--bf16", "--use_cpu"], "bf16"), (["--fp16"], "fp16"), ([], "float32")])
def test_precision(monkeypatch, flags, expected):

    monkeypatch.setattr(run_arguments, "fastest_precision", lambda: flags)
    assert one(doctor.precision())[1].startswith(f"{expected} is what")


def test_four_bits_are_tried_in_a_process_of_their_own(monkeypatch):
    status, text = one(doctor.four_bit())
    assert status == "ok" and "NF4 runs on cpu" in text
    status, text = doctor.try_four_bit("import os; os.abort()")
    assert status == "note" and "exit code -6" in text and "load_teacher_in_4bit" in text
    assert "is off by 90%" in doctor.try_four_bit("print('cpu', 0.9)")[1]
    assert doctor.try_four_bit("print('cpu', float('nan'))")[0] == "note"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert one(doctor.four_bit())[0] == "note"


@pytest.mark.parametrize(
    "installed, on_gpu, expected", [(True, True, "ok"), (False, False, "ok"), (False, True, "note")]
)
def test_optional_kernels(monkeypatch, installed, on_gpu, expected):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(doctor, "version", lambda name: "1.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    assert statuses(doctor.kernels()) == [expected, "ok" if installed else "note"]


def test_accelerate_that_shards_is_a_problem(monkeypatch, tmp_path):
    from accelerate.commands.config import config_args

    path = tmp_path / "default_config.yaml"
    monkeypatch.setattr(config_args, "default_config_file", str(path))
    for name in ("FSDP", "DEEPSPEED"):
        monkeypatch.delenv(f"ACCELERATE_USE_{name}", raising=False)
    assert statuses(doctor.launcher()) == ["ok"]
    content = {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "no", "use_cpu": False, "debug": False}
    for kind, expected in (("MULTI_GPU", "ok"), ("FSDP", "problem"), ("DEEPSPEED", "problem"), ("NO", "ok")):
        path.write_text(yaml.safe_dump({**content, "distributed_type": kind}))
        status, text = one(doctor.launcher())
        assert status == expected and kind in text
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert statuses(doctor.launcher()) == ["problem", "ok"]


def test_memory_and_disk(monkeypatch, tmp_path):
    assert one(doctor.memory())[0] == "ok"
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setenv("HF_DSKD_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(9e9, 0, 6e9))
    assert set(statuses(doctor.disk())) == {"ok"}
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(9e9, 0, 1e9))
    lines = list(doctor.disk())
    assert set(statuses(lines)) == {"note"} and any(str(tmp_path / "not" / "yet") in text for _, text in lines)


def test_offline_flags_and_packaged_models(monkeypatch, tmp_path):
    for name in doctor.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    assert one(doctor.offline())[0] == "ok"
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "0")
    assert one(doctor.offline())[0] == "ok"
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    status, text = one(doctor.offline())
    assert status == "note" and text.startswith("HF_DATASETS_OFFLINE=1:")
    monkeypatch.setenv("HF_DSKD_CACHE", str(tmp_path))
    lines = list(doctor.packaged())
    assert set(statuses(lines)) == {"note"} and "hf_dskd.offline.packaged SmolLM2-135M-Instruct" in lines[0][1]


def test_reporters(monkeypatch):
    from transformers import integrations

    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: ["trackio"])
    assert one(doctor.reporters()) == ("ok", "report_to can be trackio")
    monkeypatch.setattr(integrations, "get_available_reporting_integrations", list)
    assert one(doctor.reporters())[0] == "note"


TOKEN = """
import json, os, sys
from huggingface_hub import constants
from hf_dskd import doctor

for constants.ENDPOINT, token, constants.HF_HUB_OFFLINE in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    os.environ |= {} if token is None else {"HF_TOKEN": token}
    print(json.dumps(list(doctor.token())))
"""


def test_hub_token_by_what_the_hub_says_of_it(tmp_path):
    with HubStandIn() as hub, socket.socket() as silent, socket.socket() as closed:
        hub.users["hf_fine"] = {"name": "bob", "role": "fineGrained"}
        for end in (silent, closed):
            end.bind(("127.0.0.1", 0))
        silent.listen()
        # Nobody listens at the one, nobody answers at the other.
        unreached, mute = (f"http://127.0.0.1:{end.getsockname()[1]}" for end in (closed, silent))
        asked = [(hub.url, token, False) for token in ("hf_write", "hf_read", "hf_fine", "hf_wrong", None)]
        asked += [(hub.url, "hf_write", True), (unreached, "hf_write", False), (mute, "hf_write", False)]
        done = subprocess.run(
            [sys.executable, "-c", TOKEN, json.dumps(asked)],
            **{"env": hub.environment(tmp_path), "capture_output": True, "text": True, "timeout": 60},
        )
        assert done.returncode == 0, done.stderr
        assert "hf_" not in (done.stdout + done.stderr).replace("hf_dskd", "")
        assert len(hub.requests) == 4
    write, read, fine, wrong, none, offline, missing, slow = (
        one(json.loads(line)) for line in done.stdout.splitlines()
    )
    assert write == ["ok", "of 'ann', with the role write"]
    assert read[0] == "ok" and "it can't push" in read[1] and "own permissions" in fine[1]
    assert wrong[0] == "problem" and "hf auth login" in wrong[1] and none[1].startswith("none")
    assert {status for status, _ in (offline, missing, slow)} == {"note"} and "offline" in offline[1]
    assert "can't be reached" in missing[1] and "didn't answer within 3 s" in slow[1]


# ---- A run


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two tiny models with their tokenizers, and data."""
    folder = tmp_path_factory.mktemp("pair")
    for name, model, tokenizer in (
        ("student", tiny.gpt2(400), tiny.byte_level_tokenizer()),
        ("teacher", tiny.qwen2(450), tiny.sentencepiece_tokenizer()),
        ("cousin", tiny.qwen2(450), tiny.byte_level_tokenizer()),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_rows(folder / "data.jsonl", [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(20)])
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def examined(pair, tmp_path, monkeypatch):
    """Findings about a run of the pair with some settings changed, by check."""
    monkeypatch.setattr(doctor, "MACHINE", {})

    def run(**changed):
        settings = {
            "model_name_or_path": str(pair / "student"),
            "teacher_model_name_or_path": str(pair / "teacher"),
            "dataset_name": str(pair / "data.jsonl"),
            "output_dir": str(tmp_path / "runs" / "one"),
            "max_length": 128,
            "report_to": "none",
            **changed,
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
        found = {}
        for finding in doctor.examine(path):
            found.setdefault(finding.check, []).append((finding.status, finding.text))
        return found

    return run


def problems(found):
    return {check: text for check, lines in found.items() for status, text in lines if status == "problem"}


def test_a_run_that_can_start_has_no_problem(examined, tmp_path):
    found = examined(held_out_size=4, eval_strategy="steps", eval_steps=2)
    assert problems(found) == {}
    assert list(found) == ["config", *doctor.RUN]
    assert "GPT" not in found["student"][0][1] and "gpt2, 0 M parameters" in found["student"][0][1]
    assert "vocabulary of 450" in found["teacher"][0][1]
    assert [text for _, text in found["tokenizers"]][-1] == "two vocabularies"
    assert found["tokenizers"][0][1].endswith("no chat template; an answer ends with '<|endoftext|>'")
    assert "prompt and completion, held out too" in found["data"][0][1]
    assert found["step"][0][0] == "ok" and "x 128 tokens takes about" in found["step"][0][1]
    assert not (tmp_path / "runs").exists()


def test_what_is_told_of_the_teacher(examined, pair, tmp_path):
    found = examined(method="sft", teacher_model_name_or_path=None)
    assert problems(found) == {} and "teacher" not in found
    tokenizer = tiny.sentencepiece_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + m.content + '<s>' }}{% endfor %}"
    shutil.copytree(pair / "teacher", tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    line = examined(teacher_model_name_or_path=str(tmp_path / "chat"))["tokenizers"][1]
    assert line[1].endswith("an answer ends with '<s>' as its template writes it (its EOS is '</s>')")
    cousin = str(pair / "cousin")
    assert "token by token" in examined(teacher_model_name_or_path=cousin)["tokenizers"][-1][1]
    line = examined(teacher_model_name_or_path=cousin, method="dskd")["tokenizers"][-1]
    assert line == ("ok", "one vocabulary: the models are compared token by token")


@pytest.mark.parametrize(
    "changed, check, expected",
    [
        ({"teacher_model_name_or_path": None}, "method", "needs teacher_model"),
        ({"teacher_model_name_or_path": "no/such-model"}, "teacher", "no/such-model"),
        ({"max_length": 100000}, "student", "max_length=100000"),
        ({"method": "dskd"}, "tokenizers", "vocabularies"),
        ({"dataset_name": "nothere.jsonl"}, "data", "nothere.jsonl"),
        ({"prompt_column": "question"}, "data", "'question' is missing"),
        ({"rename_columns": "a=b"}, "data", "rename_columns='a=b'"),
        ({"eval_strategy": "steps", "eval_steps": 2}, "data", "held_out_size"),
        ({"method": "dksd"}, "config", "did you mean"),
        ({"kd_tmperature": 1}, "config", "kd_tmperature"),
    ],
)
def test_what_stands_in_the_way_is_a_problem_with_its_remedy(examined, changed, check, expected):
    found = problems(examined(**changed))
    assert expected in found[check] and "couldn't be looked at" not in found[check]
    # The others were looked at all the same.
    assert check == "config" or set(found) <= {check, "teacher", "tokenizers", "step"}


def test_folders_without_weights_and_data_without_responses(examined, pair, tmp_path):
    shutil.copytree(pair / "teacher", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "has no weights" in problems(examined(teacher_model_name_or_path=str(tmp_path / "bare")))["teacher"]
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, [{"prompt": "p", "completion": "c" if i else ""} for i in range(9)])
    status, text = examined(dataset_name=str(rows))["data"][0]
    assert status == "note" and text.startswith("1 of the first 8 responses")
    write_rows(rows, [{"prompt": "p", "completion": 3}])
    assert "must be a string" in problems(examined(dataset_name=str(rows)))["data"]


def test_data_are_streamed(examined, monkeypatch):
    load, streamed = run_data.load_data, []
    monkeypatch.setattr(
        run_data, "load_data", lambda wanted: streamed.append(wanted.script.dataset_streaming) or load(wanted)
    )
    # Neither stands in the way, though a run on a stream would refuse the one and miss the other.
    assert problems(examined(num_train_epochs=2, teacher_cache="cache", method="dskd_cma")) == {}
    assert streamed == [True]


def test_packaged_models_are_not_fetched(examined, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DSKD_CACHE", str(tmp_path / "cache"))
    found = examined(model_name_or_path="SmolLM2-135M-Instruct")
    assert found["student"][0][0] == found["step"][0][0] == "note" and problems(found) == {}
    assert len(found["tokenizers"]) == 1 and not (tmp_path / "cache").exists()


def test_output_dir(examined, tmp_path):
    (tmp_path / "file").touch()
    assert "not writable" in problems(examined(output_dir=str(tmp_path / "file" / "out")))["output_dir"]
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "result.json").touch()
    (tmp_path / "stopped" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "stopped" / "checkpoint-2" / "trainer_state.json").touch()
    for name in ("done", "stopped"):
        status, text = examined(output_dir=str(tmp_path / name))["output_dir"][-1]
        assert status == "note" and "resume_from_checkpoint" in text


def test_what_a_step_needs_is_held_against_what_is_free(examined, monkeypatch):
    from hf_dskd.experiments import memory

    with monkeypatch.context() as small:
        small.setattr(memory, "free_memory", lambda device: 1e6)
        text = problems(examined())["step"]
        assert "0.0 GB free" in text and "gradient_checkpointing" in text
    estimate, asked = memory.estimate, []

    def spy(student, teacher, **settings):
        asked.append((student.vocabulary, teacher.vocabulary, settings))
        return estimate(student, teacher, **settings)

    monkeypatch.setattr(memory, "estimate", spy)
    changed = {"use_peft": True, "lora_r": 4, "teacher_cache": "cache", "gradient_checkpointing": True}
    changed |= {"load_teacher_in_4bit": True, "per_device_train_batch_size": 2, "method": "dskd_cma"}
    assert problems(examined(**changed, total_batch_size=6, loss_memory_mb=64.0, use_cpu=True, bf16=False)) == {}
    ((student, teacher, settings),) = asked
    assert (student, teacher) == (400, 450)
    expected = {"batch_size": 2, "max_length": 128, "method": "dskd_cma", "dtype": "float32", "device": "cpu"}
    # PEFT's own choice for GPT-2.
    expected |= {"adapter_rank": 4, "adapter_targets": ["c_attn"], "student_dtype": "float32", "accumulation": 3}
    expected |= dict.fromkeys(("four_bit_teacher", "cached_teacher", "gradient_checkpointing"), True)
    expected |= {"loss_memory_mb": 64.0}
    assert settings == expected
    examined(**changed, lora_target_modules=["c_attn", "c_proj"], dtype="bfloat16")
    assert asked[1][2]["adapter_targets"] == ["c_attn", "c_proj"] and asked[1][2]["student_dtype"] == "bfloat16"


def test_four_bit_shapes_on_a_cpu(examined, pair, tmp_path):
    odd = shutil.copytree(pair / "teacher", tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "intermediate_size": 100}))
    found = problems(examined(teacher_model_name_or_path=str(odd), load_teacher_in_4bit=True, use_cpu=True))
    assert "multiples of 64" in found["step"]
