"""Pushing runs: the real client of the hub talks to a stand-in."""

import json
import os
import re
import shutil
import signal
import textwrap
import threading
from pathlib import Path

import hub_stand_in
import pytest
import torch
from hub_runs import changed, of_pair, texts
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


# Runs expressions, with undrawn figures, and prints what each gave or which error it raised.
DRIVER = """
import json, sys
from huggingface_hub import constants
from matplotlib.figure import Figure
from hf_dskd.hub.card import model_card
from hf_dskd.hub.folder import write_model_folder
from hf_dskd.cli import run
from hf_dskd.hub.push import TRAINING, check_access, push_run
vars(constants).update(json.loads(sys.argv[2]))
Figure.savefig = lambda figure, path, **_: path.write_bytes(b"PNG")
found = []
for expression in json.loads(sys.argv[1]):
    try:
        found.append(str(eval(expression)))
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
print("\\n" + json.dumps(found))
"""
# Heeds Ctrl-C also where the tests run in the background of a shell, which has what it starts there ignore it.
STOPPED = """
import os, signal, sys
from hf_dskd.cli import run
signal.signal(signal.SIGINT, signal.default_int_handler)
open(sys.argv[1], "w").write(str(os.getpid()))
sys.exit({})
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, made):
    """Runs of models of the stand-in; they are not changed."""
    folder = tmp_path_factory.mktemp("runs")
    pair = ("base/gpt2-tiny", "base/qwen-tiny", "base/rows")
    return {name: of_pair(shutil.copytree(made[name], folder / name), *pair) for name in ("full", "adapter")}


@pytest.fixture
def call(hub, served, tmp_path):
    """Runs expressions, or `code`, with a hub that is the stand-in."""

    def run(*expressions, token="hf_write", code=DRIVER, **constants):
        words = [json.dumps(expressions), json.dumps(constants)]
        done = served[1](["-c", *words], tmp_path, code, environment={"HF_TOKEN": token} if token else {})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def puts(hub):
    return [path for method, path in hub.requests if method == "PUT"]


def logits(model, tokenizer):
    with torch.no_grad():
        return model.float().eval()(**tokenizer("The cat sat", return_tensors="pt")).logits[0, -1, :8].tolist()


def test_pushed_models_are_loaded_by_the_lines_of_their_cards(hub, call, pushed, models):
    full, adapter = pushed["full"], pushed["adapter"]
    said = call(
        f"push_run({str(full)!r}, 'tiny-full', private=True)",
        f"run(['push', {str(adapter)!r}, 'team/tiny-adapter', '--auxiliary', '--commit_message', 'Adapter'])",
    )
    assert said == [f"{hub.url}/ann/tiny-full/commit/{said[0][-40:]}", "0"]
    first, second = hub.commits
    assert (first.repo_id, first.message, first.deleted) == (
        "ann/tiny-full",
        "A student trained by dskd_cma_ga with hf_dskd",
        [],
    )
    assert (second.repo_id, second.message, second.is_pr) == ("team/tiny-adapter", "Adapter", False)
    assert (
        hub.repositories["model", "ann/tiny-full"].private
        and not hub.repositories["model", "team/tiny-adapter"].private
    )
    names = {"README.md", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    names |= {"images/curves.png"}
    optional = {"special_tokens_map.json", "vocab.json", "merges.txt"}
    assert set(first.added) - optional == names | {"config.json", "model.safetensors", "images/alignment.png"}
    assert set(second.added) - optional == names | {
        *("adapter_config.json", "adapter_model.safetensors"),
        *("auxiliary/auxiliary.json", "auxiliary/projectors.safetensors"),
    }
    assert not list(full.glob(".push-*")) and not list(adapter.glob(".push-*"))
    # Licences as the hub has them.
    card = ModelCard(second.added["README.md"].decode())
    data = card.data.to_dict()
    terms = f"{hub.url}/base/gpt2-tiny/blob/main/TERMS.md"
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "tiny-terms", terms)
    assert (data["base_model"], data["base_model_relation"]) == ("base/gpt2-tiny", "adapter")
    assert data["datasets"] == ["base/rows"]
    assert "- teacher: `mit`, stated on its page" in card.text and "- training data: `cc-by-sa-3.0`" in card.text
    # The generation config is the base's.
    assert second.added["generation_config.json"] == (adapter / "generation_config.json").read_bytes()

    codes = [re.search(r"```python\n(.*?)```", commit.added["README.md"].decode(), re.S)[1] for commit in hub.commits]
    driver = "import json, torch\nfound = []\n"
    for code in codes:
        assert sum(line.startswith(("tokenizer", "base", "model")) for line in code.splitlines()) <= 3
        driver += code + textwrap.dedent("""
            with torch.no_grad():
                given = tokenizer("The cat sat", return_tensors="pt")
                found.append(model.float().eval()(**given).logits[0, -1, :8].tolist())
            found.append(model.generation_config.eos_token_id in (0, [0]))  # transformers 4.57 has a list
        """)
    loaded = call(code=driver + "print(json.dumps(found))")
    tokenizer = AutoTokenizer.from_pretrained(full)
    whole = AutoModelForCausalLM.from_pretrained(full)
    base = AutoModelForCausalLM.from_pretrained(models[0])
    adapted = PeftModel.from_pretrained(base, adapter)
    assert loaded == [pytest.approx(logits(whole, tokenizer), abs=1e-5), True] + [
        pytest.approx(logits(adapted, tokenizer), abs=1e-5),
        True,
    ]
    with adapted.disable_adapter():
        assert loaded[2] != pytest.approx(logits(adapted, tokenizer), abs=1e-5)


def test_what_stands_in_the_way(hub, call, pushed):
    hub.add("ann/other", {"config.json": b"{}"})
    hub.add("ann/readme", {"README.md": b"# Mine"})
    tagged = {"tags": ["hf_dskd", "sft"], "base_model": "base/gpt2-tiny", "library_name": "transformers"}
    hub.add("ann/same", {"config.json": b"{}"}, card=tagged)
    hub.add("ann/adapter", {"config.json": b"{}"}, card={**tagged, "library_name": "peft"})
    hub.add("ann/elsewhere", {"config.json": b"{}"}, card={**tagged, "base_model": "x/y"})
    hub.add(
        "ann/local", {"config.json": b"{}"}, card={**tagged, "tags": ["hf_dskd", "sft", "gpt2"], "base_model": None}
    )
    hub.create("ann/empty", "model")
    hub.create("bob/one", "model")

    def facts(**changes):
        made = {"base_model": "base/gpt2-tiny", "library_name": "transformers", "method": "sft", "model_type": "gpt2"}
        return f"folder_facts={ ({**made, **changes})!r}"

    local = facts(base_model=None)
    cases = {
        "check_access('new')": "ann/new",
        "check_access('team/new')": "team/new",
        f"check_access('ann/same', {facts()})": "ann/same",
        f"check_access('ann/empty', {facts()})": "ann/empty",
        f"check_access('ann/local', {local})": "ann/local",
        f"check_access('ann/empty', private=False, {local})": "ann/empty",
        "check_access('ann/elsewhere')": "ann/elsewhere",
        "check_access('ann/other', replace=True)": "ann/other",
        "check_access('ann/other', create_pr=True)": "ann/other",
        "check_access('bob/one', create_pr=True)": "bob/one",
        "check_access('bob/one', token='hf_elsewhere')": "bob/one",
        "check_access('bob/two', token='hf_fine')": "bob/two",
        f"check_access('ann/same', revision='new', {facts()})": "ann/same",
        "check_access('a/b/c')": "'a/b/c' can't name a repository",
        "check_access('-a')": "write REPO as NAMESPACE/NAME",
        "check_access('-a', words=TRAINING)": "write hub_model_id as NAMESPACE/NAME",
        "check_access('ann/new', token='hf_read')": "the role 'read': take one with the role \"write\" from",
        "check_access('ann/new', token='hf_unknown')": "the hub doesn't know the token; make another at",
        "check_access('eve/new')": "write REPO as NAMESPACE/NAME with one of ann, team, or open a pull",
        "check_access('eve/new', words=TRAINING)": "write hub_model_id as NAMESPACE/NAME with one of ann, team",
        "check_access('bob/two', token='hf_elsewhere')": "fine-grained token, which may not write there",
        "check_access('bob/none', create_pr=True)": "nothing to open a pull request in",
        "check_access('ann/other')": "holds something else (its model card has no tag hf_dskd): choose another",
        "check_access('ann/readme')": "holds something else",
        "check_access('ann/readme', words=TRAINING)": "or delete what it holds with replace_on_hub",
        f"check_access('ann/same', {facts(method='alm')})": "the student of another method (sft, not alm)",
        f"check_access('ann/same', {local})": "(its base_model is 'base/gpt2-tiny', this one's None)",
        f"check_access('ann/local', {facts()})": "(its base_model is None, this one's 'base/gpt2-tiny')",
        f"check_access('ann/local', {facts(base_model=None, model_type='qwen3')})": "no tag qwen3, the architecture)",
        "check_access('ann/empty', private=True)": "is public, and --private only makes new repositories private",
        "check_access('ann/same', private=True, replace=True, words=TRAINING)": "or leave hub_private_repo out",
        "check_access('ann/other', revision='new')": "holds something else",
        f"check_access('ann/elsewhere', {facts()})": "(its base_model is 'x/y', this one's 'base/gpt2-tiny'): choose",
        f"check_access('ann/adapter', {facts()})": "(its library_name is 'peft', this one's 'transformers')",
        f"push_run({str(pushed['adapter'])!r}, 'ann/same')": "(its library_name is 'transformers', this one's 'peft')",
        f"push_run({str(pushed['full'])!r}, 'ann/x', token='hf_read')": "the role 'read'",
    }
    for (expression, expected), said in zip(cases.items(), call(*cases), strict=True):
        if re.fullmatch(r"[\w-]+/[\w-]+", expected):
            assert said == expected, expression
        else:
            assert said.startswith("UserError: ") and expected in said and "\n" not in said, (expression, said)
    assert hub.commits == [] and ("model", "ann/new") not in hub.repositories
    nobody, trained = call("check_access('ann/new')", "check_access('ann/new', words=TRAINING)", token=None)
    assert "without a token: run `hf auth login` or set HF_TOKEN" in nobody and "hf-dskd push RUN REPO" not in nobody
    assert trained.endswith(", or leave push_to_hub out and push later with `hf-dskd push RUN REPO`")
    [nowhere] = call("check_access('ann/new')", ENDPOINT="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 didn't answer as it should" in nowhere and nowhere.endswith("check the network")
    assert "\n" not in nobody + nowhere


def test_replacing_updating_and_pull_requests(hub, call, pushed, monkeypatch):
    hub.add(
        "ann/other",
        {"config.json": b"{}", "old/weights.bin": b"1", "model.safetensors": b"2", "tokenizer.json": b"{}"},
    )
    tagged = {"tags": ["hf_dskd", "dskd_cma_ga"], "base_model": "base/gpt2-tiny", "library_name": "transformers"}
    stale = {"adapter_model.bin", "model-00001-of-00002.safetensors", "auxiliary/projectors.safetensors", "LICENSE"}
    own = {"notes.md", "images/mine.png", "old/adapter_model.bin"}
    hub.add("ann/again", dict.fromkeys(stale | own, b"1"), card=tagged)
    hub.add("bob/one", {"README.md": b"# Bob's"})
    hub.add("team/one", {"README.md": b"# The team's"})

    def branch(handler, kind, repo_id, name):
        repository = handler.repository(kind, repo_id, write=True)
        repository.refs[name] = repository.refs["main"]
        handler.answer({})

    route = (rf"{hub_stand_in.KIND}/branch/(.+)", ("POST",), branch)
    monkeypatch.setattr(hub_stand_in, "ROUTES", [route, *hub_stand_in.ROUTES])
    adapter, full = str(pushed["adapter"]), str(pushed["full"])
    said = call(
        f"push_run({adapter!r}, 'ann/other', replace=True)",
        f"push_run({adapter!r}, 'ann/other')",
        f"push_run({full!r}, 'ann/full', revision='try')",
        f"push_run({full!r}, 'bob/one', create_pr=True)",
        f"push_run({full!r}, 'team/one', create_pr=True).pr_url",
        f"push_run({full!r}, 'ann/again', alignment=False)",
    )
    assert not [line for line in said[:3] if "Error" in line], said
    replaced, tried = hub.commits[:2]
    assert replaced.repo_id == "ann/other" and sorted(replaced.deleted) == [
        *("config.json", "model.safetensors", "old/weights.bin")
    ]
    assert ".gitattributes" in hub.files("ann/other") and "adapter_model.safetensors" in hub.files("ann/other")
    # Pushed again unchanged: no commit, and nothing of the models is sent again.
    assert said[1].split("/commit/")[1] == said[0].split("/commit/")[1]
    assert (tried.repo_id, tried.revision) == ("ann/full", "try") and set(hub.files("ann/full")) == {".gitattributes"}
    # Of the repositories of others the stand-in, unlike the hub, takes no pull requests.
    assert said[3].startswith("UserError: 'bob/one' may not be written with this token (403")
    assert "nothing was published" in said[3] and "\n" not in said[3]
    assert said[4] == f"{hub.url}/team/one/discussions/1" and set(hub.files("team/one")) == {
        ".gitattributes",
        "README.md",
    }
    assert len(hub.commits) == 4 and hub.commits[2].is_pr and hub.commits[2].deleted == []
    # What an earlier push left would be loaded in place of the new weights; what the user added stays.
    assert set(hub.commits[3].deleted) == stale and own <= set(hub.files("ann/again"))
    assert "images/alignment.png" not in hub.files("ann/again")


def test_interrupted_it_goes_on(hub, served, call, pushed, tmp_path):
    push = f"run(['push', {str(pushed['adapter'])!r}, 'ann/tiny', '--auxiliary'])"
    hub.interrupt_uploads(after=2, status=403)
    [said] = call(push)
    assert said.startswith("UserError: 'ann/tiny': ") and "\n" not in said
    assert "nothing was published and the same command goes on" in said
    assert hub.commits == [] and set(hub.files("ann/tiny")) == {".gitattributes"}
    stored, before = set(hub.objects), len(puts(hub))
    assert len(stored) >= 2
    # Ctrl-C, in the middle of what is left.
    hub.interrupt_uploads(after=0)
    pid = tmp_path / "pid"

    def interrupt():
        if hub.interrupted.wait(60):
            os.kill(int(pid.read_text()), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    done = served[1](["-c", str(pid)], tmp_path, STOPPED.format(push), environment={"HF_TOKEN": "hf_write"})
    watcher.join()
    assert done.returncode == 130 and "stopped; nothing was published, and the same command goes on" in done.stderr
    assert hub.commits == [] and not list(pushed["adapter"].glob(".push-*"))
    assert call(push) == ["0"]
    assert len(hub.commits) == 1 and "auxiliary/projectors.safetensors" in hub.files("ann/tiny")
    sent_again = {path.removeprefix("/storage/") for path in puts(hub)[before:]}
    assert not sent_again & stored and sent_again


def test_a_dry_run_is_what_would_be_pushed(hub, call, pushed, tmp_path):
    adapter = str(pushed["adapter"])
    asked, written, offline = (str(tmp_path / name) for name in ("asked", "written", "offline"))
    said = call(
        f"run(['push', {adapter!r}, 'tiny', '--dry_run', {asked!r}])",
        f"write_model_folder({adapter!r}, {written!r}, 'ann/tiny')",
    )
    assert said[0] == "0" and {method for method, _ in hub.requests} <= {"GET", "HEAD"}
    assert texts(Path(asked)) == texts(Path(written)) and "tiny-terms" in texts(Path(asked))["README.md"]
    hub.requests.clear()
    assert call(f"run(['push', {adapter!r}, 'tiny', '--dry_run', {offline!r}])", HF_HUB_OFFLINE=True) == ["0"]
    assert hub.requests == [] and "student before training: not looked up" in texts(Path(offline))["README.md"]


def test_a_card_that_the_hub_refuses_leaves_no_repository(hub, call, pushed, tmp_path):
    full = tmp_path / "full"
    shutil.copytree(pushed["full"], full)
    push = f"push_run({str(changed(full, card={'tags': [1]}))!r}, 'ann/{{}}')"
    # Where it couldn't be asked before, the commit is refused.
    unasked = "setattr(sys.modules['hf_dskd.hub.push'], '_check_card', lambda *given: None)"
    before, _, late = call(push.format("new"), unasked, push.format("late"))
    for said in (before, late):
        assert '"tags' in said and "the hub doesn't take what is pushed" in said and "mend its README.md" in said
        assert "\n" not in said
    assert ("model", "ann/new") not in hub.repositories and hub.commits == []
