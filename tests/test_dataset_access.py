"""A dataset that can't be had: what is said, by the real clients against a stand-in of the hub."""

import json
import os
import subprocess
import sys

import pytest
import tiny
from hub_stand_in import HubStandIn


ROWS = "".join(json.dumps(row) + "\n" for row in tiny.dataset(4)).encode()
LOAD = """
import sys
from types import SimpleNamespace
from hf_dskd import UserError, run

for name in sys.argv[1:]:
    script = SimpleNamespace(
        dataset_name=name, dataset_config=None, dataset_streaming=False, dataset_train_split="train",
        dataset_test_split="test",
    )
    options = SimpleNamespace(rename_columns=None, held_out_size=0, train_size=None)
    try:
        config = SimpleNamespace(on_bad_row="stop")
        train, _ = run.load_data(SimpleNamespace(script=script, options=options, config=config))
        print(len(train))
    except UserError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def hub():
    with HubStandIn() as hub:
        hub.add("ann/open", {"data.jsonl": ROWS}, repo_type="dataset")
        hub.add("bob/gated", {"data.jsonl": ROWS}, repo_type="dataset", gated=True)
        yield hub


def said(hub, home, names, before="", **environment):
    done = subprocess.run(
        [sys.executable, "-c", before + LOAD, *names],
        env={**hub.environment(home, "hf_write"), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_gated_and_missing_datasets_say_what_to_do(hub, tmp_path):
    missing_file = str(tmp_path / "none.jsonl")
    opened, gated, missing, file = said(hub, tmp_path, ["ann/open", "bob/gated", "bob/typo", missing_file])
    assert opened == "4"
    for part in ("'bob/gated'", "gated", f"{hub.url}/datasets/bob/gated", "hf auth login", "local .jsonl"):
        assert part in gated
    for part in ("'bob/typo'", "check the name", "hf auth login", "local .jsonl"):
        assert part in missing
    assert "none.jsonl" in file and "no such file" in file and "check the path" in file


def test_offline_names_the_flag_and_a_file(hub, tmp_path):
    for flag in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        (line,) = said(hub, tmp_path, ["ann/open"], **{flag: "1"})
        for part in ("'ann/open'", f"{flag}=1", "unset", "local .jsonl"):
            assert part in line


def test_a_hub_that_cannot_be_reached(hub, tmp_path):
    hasty = "import time\ntime.sleep = lambda seconds: None\n"
    (line,) = said(hub, tmp_path, ["ann/open"], hasty, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_ETAG_TIMEOUT="1")
    assert "'ann/open'" in line and "local .jsonl" in line and os.linesep not in line
