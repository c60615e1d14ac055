"""The stand-in of the hub, by the real clients, each in a process of its own."""

import json
import subprocess
import sys
import textwrap
from urllib.request import Request, urlopen

import pytest
from hub_stand_in import HubStandIn, check_card
from tiny import byte_level_tokenizer, gpt2


@pytest.fixture
def hub():
    with HubStandIn() as hub:
        yield hub


@pytest.fixture
def client(hub, tmp_path):
    """Runs code with the hub's client and returns what it prints as JSON."""

    def run(code, token="hf_write", **arguments):
        code = "import json\n" + textwrap.dedent(code)
        environment = hub.environment(tmp_path / "home", token)
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, **arguments
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]) if done.stdout else None

    return run


@pytest.fixture
def folder(tmp_path):
    """To be uploaded: two large files, a small one and a card."""
    folder = tmp_path / "upload"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(bytes(range(256)) * 4096)
    (folder / "b.data").write_bytes(b"text " * (11 * 2**18))
    (folder / "sub/config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    return folder


UPLOAD = """
from huggingface_hub import HfApi
api = HfApi()
repo = api.create_repo("ann/new", exist_ok=True)
done = api.upload_folder(repo_id="ann/new", folder_path={folder!r}, commit_message="all of it")
print(json.dumps([repo.repo_id, done.oid]))
"""


def puts(hub):
    return [path for method, path in hub.requests if method == "PUT"]


def test_upload_is_one_commit_that_can_be_read_again(hub, client, folder, tmp_path):
    name, sha = client(UPLOAD.format(folder=str(folder)))
    given = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (commit,) = hub.commits
    assert (name, commit.repo_id, commit.repo_type) == ("ann/new", "ann/new", "model")
    assert (commit.revision, commit.message, commit.deleted, commit.is_pr) == ("main", "all of it", [], False)
    assert commit.added == given
    assert {**given, ".gitattributes": hub.files("ann/new")[".gitattributes"]} == hub.files("ann/new")
    assert len(puts(hub)) == 2  # the binary file and the one of more than 10 MB
    for asked, first, last in (("3-5", 3, 5), ("1048574-", 2**20 - 2, 2**20 - 1), ("-3", 2**20 - 3, 2**20 - 1)):
        request = Request(f"{hub.url}/ann/new/resolve/main/a.safetensors", headers={"Range": f"bytes={asked}"})
        with urlopen(request, timeout=10) as answer:
            assert answer.status == 206 and answer.headers["Content-Range"] == f"bytes {first}-{last}/{2**20}"
            assert answer.read() == given["a.safetensors"][first : last + 1]
    # Read by its commit, in parts, and a second version by a pull request.
    code = f"""
    from huggingface_hub import HfApi, HfFileSystem, snapshot_download
    from pathlib import Path
    api = HfApi()
    folder = Path(snapshot_download("ann/new", revision="{sha}"))
    same = {{str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}}
    with HfFileSystem().open("ann/new/a.safetensors", block_size=1000) as file:
        file.seek(3000)
        part = list(file.read(3))
    info = api.model_info("ann/new", files_metadata=True)
    pr = api.upload_file(path_or_fileobj=b"two", path_in_repo="new.txt", repo_id="ann/new", create_pr=True)
    api.delete_folder("sub", "ann/new")
    refs = api.list_repo_refs("ann/new", include_pull_requests=True)
    print(json.dumps([same, part, info.sha, info.card_data.to_dict(), info.gated, info.private,
        {{s.rfilename: s.lfs is not None for s in info.siblings}}, pr.pr_revision,
        [ref.ref for ref in refs.pull_requests], [path.path for path in api.list_repo_tree("ann/new")],
        [path.path for path in api.get_paths_info("ann/new", ["README.md", "absent"])]]))
    """
    sizes, part, seen, card, gated, private, large, pr, refs, tree, found = client(code)
    assert sizes == {path: len(content) for path, content in hub.files("ann/new").items()} | {"sub/config.json": 2}
    assert part == [3000 % 256, 3001 % 256, 3002 % 256]
    assert (seen, card, gated, private) == (sha, {"license": "mit"}, False, False)
    assert {path for path, is_large in large.items() if is_large} == {"a.safetensors", "b.data"}
    assert (pr, refs) == ("refs/pr/1", ["refs/pr/1"])
    assert hub.commits[1].is_pr and hub.commits[1].added == {"new.txt": b"two"}
    assert "new.txt" not in hub.files("ann/new")
    assert hub.commits[2].deleted == ["sub/config.json"]
    assert sorted(tree) == [".gitattributes", "README.md", "a.safetensors", "b.data"]
    assert found == ["README.md"]


def test_interrupted_upload_goes_on_with_what_is_missing(hub, client, folder):
    hub.interrupt_uploads(after=1, status=403)
    refused = f"try:\n{textwrap.indent(UPLOAD.format(folder=str(folder)), '    ')}\nexcept Exception as error:\n"
    assert "403 Forbidden: Request has expired" in client(refused + "    print(json.dumps(str(error.__cause__)))")
    assert hub.interrupted.is_set() and len(hub.objects) == 1 and hub.commits == []
    (stored,) = hub.objects
    before = len(puts(hub))
    client(UPLOAD.format(folder=str(folder)))
    assert len(puts(hub)) == before + 1 and f"/storage/{stored}" not in puts(hub)[before:]
    assert len(hub.commits) == 1 and hub.files("ann/new")["b.data"] == (folder / "b.data").read_bytes()


def test_dropped_connection_is_tried_again_and_a_killed_upload_leaves_nothing(hub, folder, tmp_path):
    command = [sys.executable, "-c", "import json\n" + UPLOAD.format(folder=str(folder))]
    environment = hub.environment(tmp_path / "home")
    hub.interrupt_uploads(after=0)
    killed = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    assert hub.interrupted.wait(60)
    killed.kill()
    killed.wait()
    assert hub.commits == [] and set(hub.files("ann/new")) == {".gitattributes"}
    hub.interrupt_uploads(after=0)
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
    assert hub.interrupted.is_set() and len(hub.commits) == 1


def test_what_is_missing_gated_private_or_forbidden(hub, client):
    hub.users |= {
        "hf_fine": {"name": "bob", "role": "fineGrained"},
        "hf_org": {"name": "eve", "role": "write", "orgs": ["team"], "accepted": ["team/gated"]},
    }
    hub.add("team/gated", {"config.json": b"{}"}, gated=True)
    hub.create("ann/secret", "model", private=True)
    code = """
    from huggingface_hub import HfApi, hf_hub_download
    api = HfApi()
    calls = {
        "whoami": lambda: [api.whoami()["name"], api.whoami()["auth"]["accessToken"]["role"]],
        "missing": lambda: api.model_info("ann/none"),
        "private": lambda: api.model_info("ann/secret").private,
        "gated": lambda: hf_hub_download("team/gated", "config.json")[-11:],
        "entry": lambda: hf_hub_download("team/gated", "absent"),
        "revision": lambda: hf_hub_download("team/gated", "config.json", revision="absent"),
        "create": lambda: api.create_repo("ann/mine").repo_id,
        "team": lambda: api.create_repo("team/ours").repo_id,
        "bob": lambda: api.create_repo("bob/his").repo_id,
        "commit": lambda: bool(api.upload_file(path_or_fileobj=b"1", path_in_repo="1", repo_id="team/gated")),
    }
    said = {}
    for name, call in calls.items():
        try:
            said[name] = call()
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            said[name] = [type(error).__name__, status]
    print(json.dumps(said))
    """
    nobody = client(code, token=None)
    assert nobody["whoami"][0] == "LocalTokenNotFoundError"
    assert nobody["missing"] == nobody["private"] == ["RepositoryNotFoundError", 401]
    assert nobody["gated"] == nobody["entry"] == ["GatedRepoError", 401]
    assert nobody["create"] == ["HfHubHTTPError", 401]
    reader = client(code, token="hf_read")
    assert reader["whoami"] == ["ann", "read"] and reader["private"] is True
    assert reader["missing"] == ["RepositoryNotFoundError", 404] and reader["gated"] == ["GatedRepoError", 403]
    assert reader["create"] == reader["team"] == reader["commit"] == ["HfHubHTTPError", 403]
    fine = client(code, token="hf_fine")
    assert fine["whoami"] == ["bob", "fineGrained"] and fine["bob"] == "bob/his" and fine["team"][1] == 403
    member = client(code, token="hf_org")
    assert member["gated"] == "config.json" and member["entry"][0].endswith("EntryNotFoundError")
    assert member["revision"] == ["RevisionNotFoundError", 404] and member["team"] == "team/ours"
    assert member["commit"] is True and member["create"][1] == 403
    unknown = client(code, token="hf_wrong")
    assert unknown["whoami"][1] == unknown["create"][1] == 401
    again = client(
        """
    from huggingface_hub import HfApi
    api = HfApi()
    api.create_repo("team/ours")
    """.replace("api.create_repo", "api.delete_repo"),
        token="hf_org",
    )
    assert again is None and ("model", "team/ours") not in hub.repositories


def test_models_adapters_and_data_load(hub, client, tmp_path):
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model

    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    model, tokenizer = gpt2(), byte_level_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    hub.add("tiny", tmp_path / "model")  # a name without an owner
    hub.add("ann/adapter", tmp_path / "adapter", card={"license": "mit", "base_model": "tiny"})
    hub.add("ann/lines", {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}, "dataset")
    hub.add("ann/columns", {"data/train-0.parquet": (tmp_path / "train.parquet").read_bytes()}, "dataset")
    hub.add("ann/gated", {"train.jsonl": b"{}"}, "dataset", gated=True)
    code = """
    from datasets import load_dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("tiny")
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    adapted = PeftModel.from_pretrained(model, "ann/adapter")
    said = [model.num_parameters(), tokenizer("The cat")["input_ids"], adapted.peft_config["default"].r]
    said += [load_dataset(name, split="train").to_list() for name in ("ann/lines", "ann/columns")]
    for name in ("ann/gated", "ann/none"):
        try:
            load_dataset(name)
        except Exception as error:
            said.append(f"{type(error).__name__} {error}")
    print(json.dumps(said))
    """
    count, ids, rank, lines, columns, gated, missing = client(code, token=None)
    assert rank == 8 and ids == tokenizer("The cat")["input_ids"] and count == model.num_parameters()
    assert lines == columns == rows
    assert gated.startswith("DatasetNotFoundError") and "gated" in gated
    assert missing.startswith("DatasetNotFoundError") and "'ann/none'" in missing


CARD = """---
license: {license}
base_model: {base_model}
base_model_relation: {relation}
model-index:
- name: small
  results:
  - task: {{type: text-generation}}
    dataset: {{type: dolly, name: Dolly}}
    metrics:
    - {{type: rouge, value: {value}}}
---
Text.
"""
GOOD = {"license": "apache-2.0", "base_model": "ann/tiny", "relation": "finetune", "value": 25.1}


@pytest.mark.parametrize(
    "changed, error",
    [
        ({}, ""),
        ({"license": "my-own"}, '"license" with value'),
        ({"base_model": "runs/a/b"}, '"base_model" with value'),
        ({"base_model": "/tmp/model"}, '"base_model" with value'),
        ({"relation": "distilled"}, '"base_model_relation"'),
        ({"value": "null"}, "metrics[0].value"),
        ({"license": "[mit"}, "YAML Metadata Error"),
    ],
)
def test_cards_are_checked(changed, error):
    errors, warnings = check_card(CARD.format(**{**GOOD, **changed}))
    assert warnings == []
    assert error in "".join(errors) and bool(errors) == bool(error)


def test_model_index_must_be_complete():
    card = CARD.format(**GOOD)
    for part, named in (("name: small", "name"), ("type: text-generation", "task"), ("type: dolly, ", "dataset")):
        errors, _ = check_card(card.replace(part, part.replace(":", "x:")))
        assert len(errors) == 1 and named in errors[0]
    assert check_card("no metadata")[1] == ["empty or missing yaml metadata in repo card"]


def test_client_is_told_what_is_wrong_with_a_card(hub, client, folder):
    (folder / "README.md").write_text(CARD.format(**{**GOOD, "license": "my-own"}))
    refused = f"try:\n{textwrap.indent(UPLOAD.format(folder=str(folder)), '    ')}\nexcept ValueError as error:\n"
    assert "Invalid metadata in README.md" in client(refused + "    print(json.dumps(str(error)))")
    assert hub.commits == [] and puts(hub) == []
