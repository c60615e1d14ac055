"""The comparison grid: its arguments, what it keeps on disk, what its table says; once end to end on tiny models."""

import json
import math
import os
import signal
import statistics
import sys
from pathlib import Path

import pytest
import runs
import tiny
import yaml
from warm import run_command

from hf_dskd import UserError, cli
from hf_dskd.experiments import grid as compare


@pytest.fixture
def config(tmp_path, undrawn):
    path = tmp_path / "config.yaml"
    path.write_text("method: dskd_cma_ga\nlearning_rate: 1e-3\nmax_steps: 4\nbf16: false\nseed: 7\n")
    return path


def grid(config, *arguments, output=None):
    output = output or config.parent / "out"
    return compare.parse(["--config", str(config), "--output_dir", str(output), *arguments])


def variants(config, text):
    path = config.with_name("variants.yaml")
    path.write_text(text)
    return str(path)


# ---- The grid


def test_rows_are_methods_and_variants_times_seeds(config):
    file = variants(config, "ga-lr4: {method: dskd_cma_ga, learning_rate: 1.0e-4}\n")
    found = grid(config, "--methods", "sft,dskd_cma", "--variants", file, "--seeds", "0,3")
    assert [cell.name for cell in found.cells()] == [
        *("sft-seed0", "dskd_cma-seed0", "ga-lr4-seed0"),
        *("sft-seed3", "dskd_cma-seed3", "ga-lr4-seed3"),
    ]
    cell = found.cells()[-1]
    assert (cell.method, cell.folder) == ("dskd_cma_ga", config.parent / "out" / "cells" / "ga-lr4-seed3")
    assert cell.config["seed"] == 3 and cell.config["learning_rate"] == 1e-4 and cell.config["max_steps"] == 4
    assert cell.config["output_dir"] == str(cell.folder)
    assert {cell.config["data_seed"] for cell in found.cells()} == {0}
    assert grid(config, "--methods", "sft").seeds == [0]


def test_a_variant_comes_before_the_command_line_and_that_before_the_file(config):
    file = variants(config, "slow: {method: sft, learning_rate: 2.0e-5}\nnomask: {method: sft}\n")
    given = ("--learning_rate", "5e-4", "--no_correctness_mask", "--use_peft", "--lora_target_modules", "a", "b")
    slow, nomask = grid(config, "--variants", file, *given, "--data_seed=2", "--max-steps", "9").cells()
    assert slow.settings["learning_rate"] == 2e-5 and nomask.settings["learning_rate"] == 5e-4
    assert slow.settings["max_steps"] == 9 and slow.settings["data_seed"] == 2
    assert slow.settings["lora_target_modules"] == ["a", "b"] and slow.settings["use_peft"] is True
    assert nomask.settings["correctness_mask"] is False
    words = ["--correctness_mask", "false", "--use_peft", "--lora_target_modules", "a", "b"]
    words += ["--data_seed", "2", "--max_steps", "9"]
    start = [sys.executable, "-m", "hf_dskd.cli", "train", "--config", str(slow.folder / "config.yaml")]
    assert slow.command(resume=False) == [*start, *words]
    assert nomask.command(resume=True)[6:] == ["--learning_rate", "5e-4", *words, "--resume_from_checkpoint", "last"]


def test_what_a_run_alone_would_push_can_be_compared(config):
    config.write_text("push_to_hub: true\n")
    assert grid(config, "--methods", "sft", "--push_to_hub", "false").cells()[0].settings["push_to_hub"] is False


def test_several_processes_go_through_accelerate(config):
    command = grid(config, "--methods", "sft", "--num_processes", "2").cells()[0].command(False)
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m", "hf_dskd.cli"]
    assert command[1:8] == launcher


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--methods sft,dskd_cm", "did you mean 'dskd_cma'"),
        ("--methods sft,sft", "'sft' twice"),
        ("--methods sft --seeds 0,1,1", "'1' twice"),
        ("--methods sft --seeds 0,01,1", "'1' twice"),
        ("--methods sft --seeds 0,one", "'one'"),
        ("--methods sft --seeds -1", "'-1'"),
        ("--methods sft --num_processes 0", "'0'"),
        ("--methods sft --seed 1", "--seeds"),
        ("--methods sft --method sft", "--methods"),
        ("--methods sft --resume_from_checkpoint last", "resume_from_checkpoint"),
        ("--methods sft --sft_teacher", "hf-dskd train --sft_teacher"),
        ("--methods sft --push_to_hub", "push the cell you choose with `hf-dskd push out/cells/sft-seed0 REPO`"),
        ("--methods sft --push_to_hub True", "hf-dskd push"),
        ("--methods sft --config", "--config has 0 values"),
        ("--methods sft --config nothere.yaml", "nothere.yaml"),
        ("--seeds 1", "nothing to compare"),
        ("sft --seeds 1", "'sft' belongs to no setting"),
        ("--variants nothere.yaml", "nothere.yaml"),
    ],
)
def test_wrong_arguments(words, expected, config):
    with pytest.raises(UserError) as error:
        given = [] if "--config" in words else ["--config", str(config)]
        compare.parse([*words.split(), *given, "--output_dir", "out"])
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, other", [("config", "output_dir"), ("output_dir", "config")])
def test_config_and_output_dir_must_be_there(name, other):
    with pytest.raises(UserError, match=f"--{name} is not set"):
        compare.parse(["--methods", "sft", f"--{other}", "x"])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("sft: {method: sft}\n", "'sft' is also in --methods"),
        ("a/b: {method: sft}\n", "'a/b' can't name a folder"),
        ("..: {method: sft}\n", "'..' can't name a folder"),
        ("a: {max_steps: 3}\n", "a must say its method"),
        ("a: {method: uldd}\n", "method 'uldd' is unknown"),
        ("a: {method: sft, seed: 3}\n", "a sets seed"),
        ("a: {method: sft, sft_teacher: true}\n", "sft_teacher"),
        ("a: [\n", "isn't valid YAML"),
        ("sft\n", "holds no settings"),
    ],
)
def test_wrong_variants(text, expected, config):
    with pytest.raises(UserError) as error:
        grid(config, "--methods", "sft", "--variants", variants(config, text))
    assert expected in str(error.value) and "\n" not in str(error.value)


# ---- Cells


class Runner:
    """Stands in for the process of a cell: notes the command and does what `act` says for it."""

    def __init__(self, monkeypatch, act):
        self.commands, self.act = [], act
        monkeypatch.setattr(compare, "run_process", self)

    def __call__(self, command, log):
        self.commands.append(command)
        return self.act(log.parent, log)

    def names(self):
        return [Path(command[command.index("--config") + 1]).parent.name for command in self.commands]


def finish(folder, log, value=0.7):
    written = {"method": "sft", "metrics": {"eval_bits_per_byte": value}, "steps": 4}
    (folder / "result.json").write_text(json.dumps(written))
    return 0


def fail(folder, log):
    with log.open("a") as out:
        out.write("Traceback (most recent call last):\n  File x\nValueError: a | b\n")
    return 1


def lines(folder):
    return {
        f"{line['label']}-seed{line['seed']}": line
        for line in map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    }


def test_a_failed_cell_is_recorded_the_rest_go_on_and_it_is_tried_again(config, monkeypatch, capsys):
    bad = ["dskd_cma-seed0"]
    runner = Runner(monkeypatch, lambda folder, log: (fail if folder.name in bad else finish)(folder, log))
    work = grid(config, "--methods", "sft,dskd_cma", "--seeds", "0,1")
    assert compare.run_grid(work) == 1
    assert runner.names() == ["sft-seed0", "dskd_cma-seed0", "sft-seed1", "dskd_cma-seed1"]
    written = lines(work.output_dir)
    assert [line["status"] for line in written.values()] == ["ok", "failed", "ok", "ok"]
    assert written["dskd_cma-seed0"]["error"] == "ValueError: a | b" and written["sft-seed0"]["error"] is None
    assert written["sft-seed0"]["metrics"] == {"eval_bits_per_byte": 0.7} and written["sft-seed1"]["seed"] == 1
    table = (work.output_dir / "table.md").read_text()
    assert "- dskd_cma, seed 0: failed: ValueError: a \\| b" in table and "1 of 2" in table
    assert "failed after 0:00 min: ValueError: a | b" in capsys.readouterr().out
    assert (work.output_dir / "table.png").read_bytes().startswith(b"\x89PNG")
    saved = yaml.safe_load((work.output_dir / "cells" / "dskd_cma-seed1" / "config.yaml").read_text())
    assert saved == work.cells()[3].config

    runner.commands.clear()
    bad.clear()
    assert compare.run_grid(work) == 0
    assert runner.names() == ["dskd_cma-seed0"]
    assert lines(work.output_dir)["dskd_cma-seed0"]["status"] == "ok"
    assert "failed" not in (work.output_dir / "table.md").read_text()


def test_a_result_left_by_a_failed_process_does_not_count(config, monkeypatch):
    def late(folder, log):
        finish(folder, log)
        return fail(folder, log)

    runner = Runner(monkeypatch, late)
    work = grid(config, "--methods", "sft")
    assert compare.run_grid(work) == 1 and compare.status(work.cells()[0]) == "failed"
    runner.act = fail
    assert compare.run_grid(work) == 1 and not (work.cells()[0].folder / "result.json").exists()


@pytest.mark.parametrize("checkpoint", [True, False])
def test_ctrl_c_stops_and_the_same_command_goes_on(checkpoint, config, monkeypatch, capsys):
    def stop_at_the_second(folder, log):
        if folder.name == "dskd_cma-seed0":
            if checkpoint:
                (folder / "checkpoint-3").mkdir()
            raise KeyboardInterrupt
        return finish(folder, log)

    runner = Runner(monkeypatch, stop_at_the_second)
    work = grid(config, "--methods", "sft,dskd_cma,dskd_cma_ga")
    with pytest.raises(SystemExit) as stopped:
        compare.run_grid(work)
    assert stopped.value.code == 130 and "1 of 3 cells complete; the same command goes on" in capsys.readouterr().err
    assert [line["status"] for line in lines(work.output_dir).values()] == ["ok", "interrupted", "waiting"]

    runner.commands.clear()
    runner.act = finish
    assert compare.run_grid(work) == 0
    assert runner.names() == ["dskd_cma-seed0", "dskd_cma_ga-seed0"]
    assert [command[-2:] == ["--resume_from_checkpoint", "last"] for command in runner.commands] == [checkpoint, False]


def test_time_adds_up_over_a_resume_only(config, monkeypatch):
    Runner(monkeypatch, fail)
    cell = grid(config, "--methods", "sft").cells()[0]
    compare.run_cell(cell)
    path = cell.folder / "cell.json"
    path.write_text(json.dumps({**compare.record(cell), "seconds": 1000.0}))
    compare.run_cell(cell)  # anew
    assert compare.record(cell)["seconds"] < 100
    path.write_text(json.dumps({**compare.record(cell), "seconds": 1000.0}))
    (cell.folder / "checkpoint-3").mkdir()
    compare.run_cell(cell)
    assert 1000 <= compare.record(cell)["seconds"] < 1100


def test_a_cell_that_ended_while_nobody_watched_is_complete(config, monkeypatch):
    runner = Runner(monkeypatch, finish)
    work = grid(config, "--methods", "sft")
    compare.run_grid(work)
    path = work.cells()[0].folder / "cell.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": "running"}))
    assert compare.run_grid(work) == 0 and len(runner.commands) == 1


def test_changed_settings_are_refused_before_anything_runs(config, monkeypatch):
    runner = Runner(monkeypatch, finish)
    compare.run_grid(grid(config, "--methods", "sft"))
    # The same settings, written and placed differently.
    config.write_text("max_steps: 4\nbf16: 'false'\nmethod: sft\n")
    assert compare.run_grid(grid(config, "--methods", "sft", "--learning_rate", "0.001")) == 0
    assert len(runner.commands) == 1
    with pytest.raises(UserError) as error:
        compare.run_grid(grid(config, "--methods", "dskd_cma,sft", "--learning_rate", "0.002", "--bf16"))
    message = str(error.value)
    assert "sft-seed0" in message and "learning_rate was 0.001 and is 0.002 now" in message
    assert "bf16 was False and is True now" in message and "another --output_dir, or delete" in message
    assert len(runner.commands) == 1
    with pytest.raises(UserError, match=r"learning_rate was 0\.001 and is unset now"):
        compare.run_grid(grid(config, "--methods", "sft"))


def test_settings_of_a_cell_with_nothing_to_lose_may_change(config, monkeypatch):
    def interrupted(folder, log):
        (folder / "checkpoint-1").mkdir()
        return fail(folder, log)

    runner = Runner(monkeypatch, fail)
    compare.run_grid(grid(config, "--methods", "sft", "--max_steps", "5"))
    runner.act = interrupted
    compare.run_grid(grid(config, "--methods", "sft", "--max_steps", "6"))
    with pytest.raises(UserError, match="max_steps was 6"):
        compare.run_grid(grid(config, "--methods", "sft", "--max_steps", "5"))
    runner.act = finish
    assert compare.run_grid(grid(config, "--methods", "sft", "--max_steps", "6")) == 0
    with pytest.raises(UserError, match="max_steps was 6"):
        compare.run_grid(grid(config, "--methods", "sft", "--max_steps", "5"))


def test_a_stopped_program_stops_its_process(tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    log = tmp_path / "log.txt"
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            compare.run_process(["sh", "-c", f"echo $$; sleep 1; kill -USR1 {os.getpid()}; sleep 300"], log)
    finally:
        signal.signal(signal.SIGUSR1, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


@pytest.mark.parametrize(
    "log, expected",
    [
        (
            "loading\nerror: kd_rate=2 is outside\nTraceback\nsubprocess.CalledProcessError: x\n",
            "kd_rate=2 is outside",
        ),
        ("  3%|\r 4%|\nTraceback:\ntorch.OutOfMemoryError: 3 GiB\n\n 5%|", "torch.OutOfMemoryError: 3 GiB"),
        ("[rank1]: ValueError: bad\ntorch.x.ChildFailedError:\n====", "ValueError: bad"),
        ("one\ntwo\n", "two"),
        ("", "it printed nothing"),
    ],
)
def test_last_error(log, expected):
    assert compare.last_error(log) == expected


def test_a_killed_process_is_named_so(config, monkeypatch):
    Runner(monkeypatch, lambda folder, log: -9)
    cell = grid(config, "--methods", "sft").cells()[0]
    compare.run_cell(cell)
    assert compare.record(cell)["error"] == "killed by SIGKILL; it printed nothing"


# ---- The table


def line(label, seed, bits=None, error=None, method=None, steps=60, best=None, on_the_way=None, **metrics):
    metrics = {**metrics} if bits is None else {"eval_bits_per_byte": bits, **metrics}
    return {
        "label": label,
        "method": method or label,
        "seed": seed,
        "status": "failed" if error else "ok",
        "error": error,
        "metrics": {} if error else metrics,
        "evaluations": {str(step): {"eval_bits_per_byte": value} for step, value in (on_the_way or {}).items()},
        "steps": steps,
        "best_checkpoint": best,
        "seconds": 3.0,
    }


def cells(table, label):
    """Rows of a Markdown table with this first cell, as lists of their other cells."""
    rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines() if row[:1] == "|"]
    return [row[1:] for row in rows if row[0] == label]


def test_table_has_mean_and_sample_deviation_and_the_best_in_bold():
    bits = {"sft": [0.71, 0.72, 0.74], "uld": [0.70, 0.75, 0.71]}
    results = [
        line(label, seed, value, eval_token_accuracy=0.4 + 0.1 * (label == "uld"), eval_loss=seed + len(label))
        for label, found in bits.items()
        for seed, value in enumerate(found)
    ]
    table = compare.table(results)
    for label, found in bits.items():
        mean = sum(found) / 3
        deviation = math.sqrt(sum((value - mean) ** 2 for value in found) / 2)
        expected = f"{mean:.4f} ± {deviation:.4f}"
        assert cells(table, label)[0][0] == (f"**{expected}**" if label == "uld" else expected)
        assert cells(table, label)[0][-1] == "3"
    assert [cells(table, label)[0][1] for label in bits] == ["0.4000 ± 0.0000", "**0.5000 ± 0.0000**"]
    # Losses of different methods aren't compared.
    assert [cells(table, label)[0][2] for label in bits] == ["4.0000 ± 1.0000", "4.0000 ± 1.0000"]
    assert cells(table, "")[0] == ["bits per byte", "token accuracy", "method's own loss", "seeds"]


def test_one_seed_has_no_deviation_and_equal_means_are_both_best():
    table = compare.table([line("sft", 0, 0.70001), line("uld", 0, 0.70002), line("alm", 0, 0.8)])
    assert [cells(table, label)[0] for label in ("sft", "uld", "alm")] == [
        ["**0.7000**", "1"],
        ["**0.7000**", "1"],
        ["0.8000", "1"],
    ]
    assert "**" not in compare.table([line("sft", 0, 0.7)])


def test_failed_cells_stand_in_the_table():
    results = [line("sft", 0, 0.7), line("sft", 1, error="killed"), line("uld", 0, error="no | way")]
    table = compare.table([*results, line("uld", 1, error="no")])
    assert cells(table, "sft")[0] == ["0.7000", "1 of 2"]
    assert cells(table, "uld")[0] == ["failed: no \\| way", "0 of 2"]
    assert "- sft, seed 1: failed: killed" in table and "- uld, seed 1: failed: no\n" in table


def test_a_loss_that_is_not_finite_is_never_the_best():
    table = compare.table([line("sft", 0, 0.7), line("uld", 0, math.nan), line("uld", 1, 0.5), line("alm", 0, 0.8)])
    assert cells(table, "sft")[0][0] == "**0.7000**" and cells(table, "uld")[0][0] == "nan"


def test_evaluations_on_the_way():
    results = [
        line("sft", 0, 0.70, on_the_way={30: 0.8, 60: 0.7}),
        line("sft", 1, 0.72, on_the_way={30: 0.9, 60: 0.72}),
        line("long", 0, 0.69, steps=90, on_the_way={30: 0.84, 60: 0.75, 90: 0.69}, method="sft"),
    ]
    table = compare.table(results)
    assert cells(table, "")[1] == ["30 steps", "60 steps"]
    deviation = statistics.stdev([0.8, 0.9])
    assert cells(table, "sft")[1] == [f"0.8500 ± {deviation:.4f}", "**0.7100 ± 0.0141**"]
    assert cells(table, "long")[1] == ["**0.8400**", "0.7500"]
    # The best checkpoint was evaluated at the end, so the last step has a number of its own.
    best = [line("sft", 0, 0.65, best="checkpoint-30", on_the_way={30: 0.65, 60: 0.7})]
    assert cells(compare.table(best), "")[1] == ["30 steps", "60 steps"]
    assert "best checkpoint" in compare.table(best) and "best checkpoint" not in table


def test_picture_marks_training_on_the_text_alone(tmp_path):
    results = [line("dskd_cma", seed, 0.7 + 0.01 * seed) for seed in range(3)] + [line("x", 0, error="no")]
    reference = [line("sft", 0, 0.72)]
    compare.plot_table(results, tmp_path / "without.png")
    compare.plot_table(results + reference, tmp_path / "with.png")
    from matplotlib.image import imread

    def reddish(path):
        pixels = imread(path)[..., :3]
        return int(((pixels[..., 0] > 0.8) & (pixels[..., 2] < 0.4)).sum())

    assert reddish(tmp_path / "without.png") == 0 < reddish(tmp_path / "with.png")


# ---- End to end


def test_the_order_of_the_data_follows_data_seed_alone(tmp_path):
    def order(**seeds):
        return list(runs.trainer(tmp_path, **seeds)._get_train_sampler())

    assert order(method="sft", seed=0, data_seed=5) == order(method="dskd_cma", seed=1, data_seed=5)
    assert order(method="sft", seed=0, data_seed=5) != order(method="sft", seed=0, data_seed=6)


def test_grid_of_tiny_models(tmp_path, monkeypatch, capsys):
    for name, model, tokenizer in (
        ("student", tiny.gpt2, runs._STUDENT_TOKENIZER),
        ("teacher", tiny.qwen2, runs._TEACHER_TOKENIZER),
    ):
        model(len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.dataset(12)))
    (tmp_path / "config.yaml").write_text(
        f"model_name_or_path: {tmp_path / 'student'}\nteacher_model_name_or_path: {tmp_path / 'teacher'}\n"
        f"dataset_name: {tmp_path / 'data.jsonl'}\nheld_out_size: 4\nmax_steps: 2\nper_device_train_batch_size: 2\n"
        "max_length: 256\nuse_cpu: true\nbf16: false\nreport_to: none\nsave_strategy: 'no'\n"
        "eval_strategy: steps\neval_steps: 1\nlogging_steps: 1\n"
    )
    (tmp_path / "variants.yaml").write_text("cold: {method: dskd_cma, kd_temperature: 0.0}\n")
    started = compare.run_process

    def run_process(command, log):
        """The cell that fails in a process of its own, the others without its seconds of imports."""
        if log.parent.name == "cold-seed1":
            return started(command, log)
        done = run_command("hf-dskd", *command[3:])
        with log.open("a") as out:
            out.write(done.stdout + done.stderr)
        return done.returncode

    monkeypatch.setattr(compare, "run_process", run_process)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    words = ["--variants", tmp_path / "variants.yaml", "--config", tmp_path / "config.yaml"]
    words += ["--output_dir", tmp_path / "out", "--learning_rate", "1e-3"]
    assert cli.run(["compare", "--methods", "sft,dskd_cma", "--seeds", "1", *map(str, words)]) == 1
    written = lines(tmp_path / "out")
    assert {name: found["status"] for name, found in written.items()} == {
        "sft-seed1": "ok",
        "dskd_cma-seed1": "ok",
        "cold-seed1": "failed",
    }
    assert written["cold-seed1"]["error"].startswith("kd_temperature=0.0 must be above 0")
    for label in ("sft", "dskd_cma"):
        found = written[f"{label}-seed1"]
        assert found["steps"] == 2 and sorted(found["evaluations"]) == ["1", "2"] and found["seconds"] > 0
        assert found["metrics"]["eval_bits_per_byte"] == pytest.approx(
            found["evaluations"]["2"]["eval_bits_per_byte"], rel=1e-6
        )
        result = json.loads((tmp_path / "out" / "cells" / f"{label}-seed1" / "result.json").read_text())
        assert (result["method"], result["seed"], result["data_seed"]) == (label, 1, 0)
        assert result["settings"]["max_length"] == 256 and result["versions"]["hf_dskd"]
    assert "failed: kd_temperature=0.0" in capsys.readouterr().out and (tmp_path / "out" / "table.png").is_file()
    # The cell's own configuration is a run that can be done again.
    assert yaml.safe_load((tmp_path / "out/cells/sft-seed1/config.yaml").read_text())["method"] == "sft"
