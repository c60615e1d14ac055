"""A folder that can't be read is refused in one line that names the file."""

import pytest
from run_folders import folder

from hf_dskd import UserError
from hf_dskd.report.one import write_report


def broken(path, name, content):
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text(content)


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (lambda run: (run / "result.json").unlink(), ["has no result.json", "hf-dskd train"]),
        (lambda run: ((run / "result.json").unlink(), (run / "checkpoint-3").mkdir()), ["resume_from_checkpoint"]),
        (lambda run: broken(run, "result.json", "{"), ["result.json'", "isn't valid JSON"]),
        (lambda run: broken(run, "result.json", "[1]"), ["result.json'", "names no method"]),
        (lambda run: broken(run, "result.json", "{}"), ["result.json'", "names no method"]),
        (lambda run: broken(run, "trainer_state.json", "nothing"), ["trainer_state.json'", "isn't valid JSON"]),
        (lambda run: broken(run, "analysis/numbers.jsonl", '{"step": 0}\n{"st'), ["numbers.jsonl', line 2"]),
        (lambda run: broken(run, "analysis/samples.jsonl", "x\n"), ["samples.jsonl', line 1"]),
    ],
)
def test_a_bad_folder(spoil, expected, tmp_path):
    run = folder(tmp_path / "run")
    spoil(run)
    with pytest.raises(UserError) as error:
        write_report(run)
    assert all(text in str(error.value) for text in [str(run), *expected]) and "\n" not in str(error.value)
    assert not (run / "report").exists()
