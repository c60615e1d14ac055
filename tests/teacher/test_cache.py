import json
import os
import pickle
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest
import runs
import tiny
import torch
import warm
from datasets import concatenate_datasets
from filelock import FileLock
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from hf_dskd import UserError, cli
from hf_dskd.data.collator import DualCollator
from hf_dskd.data.tokenization import tokenize_dataset
from hf_dskd.losses.states import response_states
from hf_dskd.models.causal_lm import input_embedding, lm_head
from hf_dskd.teacher import cache as module
from hf_dskd.teacher import identity
from hf_dskd.teacher.cache import TeacherCache, example_key, open_cache
from hf_dskd.teacher.identity import cache_facts, files_digest


TOKENIZER = runs._TEACHER_TOKENIZER
STUDENT = runs._STUDENT_TOKENIZER
MAX_LENGTH = 256


@pytest.fixture(scope="module", autouse=True)
def same_numbers():
    """Last bits depend on the number of threads. Small shards make several of few examples."""
    threads, size = torch.get_num_threads(), module.SHARD_BYTES
    torch.set_num_threads(1)
    module.SHARD_BYTES = 40_000
    yield
    torch.set_num_threads(threads)
    module.SHARD_BYTES = size


def make_teacher():
    return tiny.qwen2(len(TOKENIZER)).eval()


def tokenized(rows=16, tokenizer=TOKENIZER, **options):
    options = {"max_length": MAX_LENGTH, **options}
    return tokenize_dataset(tiny.dataset(rows), STUDENT, tokenizer, **options)[0]


DATA = tokenized()
TEACHER = make_teacher()


def facts_of(tmp_path, model=TEACHER, tokenizer=TOKENIZER, **settings):
    config = runs.config(tmp_path, **{"max_length": MAX_LENGTH, **settings})
    return cache_facts(config, model, TEACHER.config, tokenizer)


class Loader:
    """Counts how often the teacher is loaded; stops it when so many shards are there."""

    def __init__(self, folder=None, stop_at=None):
        self.loaded, self.folder, self.stop_at = 0, folder, stop_at

    def __call__(self):
        self.loaded += 1
        model = make_teacher()
        if self.stop_at is not None:
            model.model.register_forward_pre_hook(self.stop)
        return model

    def stop(self, *args):
        if len(list(Path(self.folder).glob("states-*"))) == self.stop_at:
            raise KeyboardInterrupt


def not_loaded():
    raise AssertionError("the teacher was loaded")


def filled(folder, tmp_path, data=DATA, loader=make_teacher, **options):
    cache = TeacherCache.open(folder, facts_of(tmp_path), **options)
    cache.fill({"train": data}, loader)
    return cache


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def refused(call, *words):
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text
    return text


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted fill; not to be written to."""
    folder = tmp_path_factory.mktemp("whole")
    return filled(folder / "cache", folder)


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole.folder, tmp_path / "copy")


# ---- States


def live_states(row):
    """Those that predict the response, of the row alone."""
    ids = torch.tensor([row["teacher_input_ids"]])
    with torch.no_grad():
        hidden = TEACHER.model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    return hidden[0, row["teacher_prompt_length"] - 1 : -1]


def test_states_are_those_of_the_live_teacher_that_predict_the_response(whole, tmp_path, monkeypatch):
    assert len(whole) == len(DATA) and len(whole.shards) > 3
    assert len({path.stat().st_mode for path in whole.folder.glob("*.*s*")}) == 1
    for row in DATA:
        states, live = whole.states(example_key(row)), live_states(row)
        assert states.dtype == torch.bfloat16 and states.shape == live.shape
        # One unit of bfloat16's last place.
        torch.testing.assert_close(states.float(), live, atol=1e-4, rtol=2**-8)
    # Computed in the same batch, they are the same bits.
    monkeypatch.setattr(module, "BATCH_TOKENS", 1)
    cache = filled(tmp_path / "cache", tmp_path, DATA.select(range(4)))
    for row in DATA.select(range(4)):
        assert torch.equal(cache.states(example_key(row)), live_states(row).to(torch.bfloat16))


def test_a_batch_has_the_rows_that_losses_gather(whole):
    rows = [DATA[i] for i in (5, 0, 11)]
    batch = DualCollator(STUDENT.pad_token_id, TOKENIZER.pad_token_id, teacher_states=whole.batch)(rows)
    with torch.no_grad():
        hidden = TEACHER.model(input_ids=batch["teacher_input_ids"], attention_mask=batch["teacher_attention_mask"])[0]
    live = response_states(hidden, batch["teacher_input_ids"], batch["teacher_labels"], input_embedding(TEACHER))
    assert batch["teacher_states"].shape == live.hidden.shape
    torch.testing.assert_close(
        live.packed(batch["teacher_states"]).float(), live.packed(live.hidden), atol=1e-4, rtol=2**-8
    )
    assert not batch["teacher_states"][~live.mask].any()


def test_a_response_without_a_prompt_has_no_state_for_its_first_token(tmp_path):
    whole = {"teacher_prompt_length": 0, "teacher_spans": [0, len(DATA[0]["teacher_input_ids"])]}
    row = {**DATA[0], **whole}
    cache = filled(tmp_path / "cache", tmp_path, DATA.select([0]).map(lambda _: whole))
    assert len(cache.states(example_key(row))) == len(row["teacher_input_ids"]) - 1


def test_subset_other_order_and_duplicates_fit(whole, tmp_path):
    twice = concatenate_datasets([DATA.select(range(15, -1, -1)), DATA])
    for data in (DATA.select([3, 1]), DATA.shuffle(seed=0), twice):
        assert whole.missing(data) == []
        assert whole.fill({"train": data, "eval": None}, not_loaded) == (0, 0, 0.0)
    cache = filled(tmp_path / "cache", tmp_path, twice)
    assert len(cache) == 16
    keys = [key for shard in cache.shards for key in shard.keys]
    assert keys == [example_key(row) for row in DATA.select(range(15, -1, -1))]


def test_key_is_of_the_teachers_tokens_and_the_prompts_length():
    row = DATA[0]
    same = {**row, "example_id": 99, "input_ids": [1], "teacher_input_ids": torch.tensor(row["teacher_input_ids"])}
    assert example_key(row) == example_key(same) and len(example_key(row)) == 32
    others = [
        {**row, "teacher_spans": [row["teacher_prompt_length"] + 1, len(row["teacher_input_ids"])]},
        {**row, "teacher_spans": [1, 2, 3, len(row["teacher_input_ids"])]},
        {**row, "teacher_spans": [1, 3, 4, len(row["teacher_input_ids"])]},
        {**row, "teacher_input_ids": row["teacher_input_ids"][:-1]},
        DATA[1],
    ]
    assert len({example_key(other) for other in [row, *others]}) == 6
    # A dataset that was tokenized without spans has one answer, which goes to the end.
    assert example_key({name: value for name, value in row.items() if name != "teacher_spans"}) == example_key(row)


def test_second_fill_only_adds(tmp_path):
    first = filled(tmp_path / "cache", tmp_path, DATA.select(range(10)))
    before = content(first.folder)
    assert first.missing(DATA) == [example_key(DATA[i]) for i in range(10, 16)]
    loader = Loader()
    done = first.fill({"train": DATA.select(range(10)), "eval": DATA.select(range(8, 16))}, loader)
    assert (loader.loaded, done.examples) == (1, 6)
    after = content(first.folder)
    assert {name: after[name] for name in before if name != "index.json"} == {
        name: data for name, data in before.items() if name != "index.json"
    }
    assert len(first) == 16 and len(TeacherCache.open(first.folder, first.facts)) == 16


def test_unknown_example_is_refused(whole):
    row = {**DATA[0], "teacher_spans": [1, len(DATA[0]["teacher_input_ids"])], "example_id": 7}
    refused(lambda: whole.batch([DATA[1], row]), "example 7", str(whole.folder), "cache-teacher")


# ---- Interruptions and processes


def test_a_fill_interrupted_before_its_first_shard_goes_on(whole, tmp_path):
    folder = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        filled(folder, tmp_path, loader=Loader(folder, 0))
    filled(folder, tmp_path)
    assert content(folder) == content(whole.folder)
    # Interrupted before its index, it needs no teacher.
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "head": None, "shards": []}))
    filled(folder, tmp_path, loader=not_loaded)
    assert content(folder) == content(whole.folder)


def test_interrupted_fill_of_other_data_leaves_nothing(whole, tmp_path):
    folder = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        filled(folder, tmp_path, DATA.select(range(15, -1, -1)), Loader(folder, 2))
    filled(folder, tmp_path)
    assert content(folder) == content(whole.folder)


SCRIPT = """
import os, json, signal, sys
import tiny, torch
from accelerate import PartialState
from datasets import load_from_disk
from pathlib import Path
from hf_dskd.teacher import cache

torch.set_num_threads(1)
root, folder = Path(sys.argv[1]), Path(sys.argv[1]) / sys.argv[2]
rows, cache.SHARD_BYTES, stop_at = map(int, sys.argv[3:])
save = cache._save

def load():
    model = tiny.qwen2(rows)
    model.model.register_forward_pre_hook(kill)
    return model

def kill(*args):
    if len(list(folder.glob("states-*"))) == stop_at:
        os.kill(os.getpid(), signal.SIGKILL)

def noted(tensors, path, about):
    with (root / "saved").open("a") as file:
        file.write(f"{os.environ.get('RANK')} {path.name}\\n")
    save(tensors, path, about)

cache._save = noted
PartialState(cpu=True)
facts, data = json.loads((root / "facts.json").read_text()), load_from_disk(str(root / "data"))
assert cache.TeacherCache.open(folder, facts).fill({"train": data}, load).examples == 16
"""


def fill_elsewhere(folder, name, stop_at=-1, ranks=1):
    DATA.save_to_disk(str(folder / "data"))
    (folder / "facts.json").write_text(json.dumps(facts_of(folder)))
    return warm.forked(SCRIPT, folder, name, len(TOKENIZER), module.SHARD_BYTES, stop_at, ranks=ranks)


def test_killed_process_goes_on_to_the_same_bytes(whole, tmp_path):
    assert fill_elsewhere(tmp_path, "killed", stop_at=2).returncode == -signal.SIGKILL
    folder = tmp_path / "killed"
    half, made = sorted(folder.glob("states-*.safetensors"))
    os.truncate(half, half.stat().st_size // 2)
    (folder / f"states-{0:032}.safetensors.tmp").write_bytes(b"half")
    written = made.stat().st_mtime_ns
    # Another run's settings don't get in between.
    refused(lambda: TeacherCache.open(folder, facts_of(tmp_path, max_length=255)), "max_length=256")
    filled(folder, tmp_path)
    assert content(folder) == content(whole.folder)
    assert made.stat().st_mtime_ns == written


def test_two_processes_write_the_same_bytes_as_one(whole, tmp_path):
    done = fill_elsewhere(tmp_path, "two", ranks=2)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "two") == content(whole.folder)
    saved = [line.split() for line in (tmp_path / "saved").read_text().splitlines()]
    # Each file once, every other shard by the second process.
    assert sorted(name for _, name in saved) == sorted(["head.safetensors", *(shard.file for shard in whole.shards)])
    assert [name for rank, name in saved if rank == "1"] == [shard.file for shard in whole.shards[1::2]]


def test_one_fill_at_a_time(tmp_path):
    (tmp_path / "cache").mkdir()
    with FileLock(tmp_path / "cache" / ".lock"):
        refused(lambda: filled(tmp_path / "cache", tmp_path, loader=not_loaded), "another process")


# ---- What it was written with


def test_other_settings_are_refused_by_name(whole, tmp_path):
    for settings, then, now, remedy in (
        ({"max_length": 255}, "max_length=256", "max_length=255", "set max_length=256"),
        ({"prompt_style": "plain"}, "prompt_style='chat'", "prompt_style='plain'", "set prompt_style=chat"),
    ):
        text = refused(lambda: TeacherCache.open(whole.folder, facts_of(tmp_path, **settings)), remedy)  # noqa: B023
        assert text.startswith(f"teacher_cache={str(whole.folder)!r} was written with {then}, this run has {now}: ")
        assert "use another folder" in text


def test_other_teacher_is_refused(whole, tmp_path):
    def opened(model):
        return lambda: TeacherCache.open(whole.folder, facts_of(tmp_path, model))

    text = refused(opened(tiny.qwen2(len(TOKENIZER), seed=5)), "teacher='Qwen2ForCausalLM'", "give that teacher")
    assert "dtype" not in text
    changed = make_teacher()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[:] *= 1.001
    refused(opened(changed), "teacher='Qwen2ForCausalLM'")
    refused(opened(make_teacher().bfloat16()), "teacher_dtype='float32'", "teacher_dtype='bfloat16'")
    assert len(opened(make_teacher())()) == 16


def test_other_tokenizer_or_template_is_refused(whole, tmp_path):
    def opened(tokenizer):
        return lambda: TeacherCache.open(whole.folder, facts_of(tmp_path, tokenizer=tokenizer))

    text = refused(opened(tiny.sentencepiece_tokenizer(440)), "teacher_tokenizer")
    assert "chat_template" not in text
    templated = tiny.sentencepiece_tokenizer()
    templated.chat_template = "{{ messages[0].content }}"
    text = refused(opened(templated), "teacher_chat_template")
    assert "teacher_tokenizer" not in text
    # What a call leaves in a tokenizer is no difference.
    used = tiny.sentencepiece_tokenizer()
    used(["a", "b c"], padding=True, truncation=True, max_length=4)
    assert len(opened(used)()) == 16


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """The teacher's folder, and a cache that was written with it by name."""
    folder = tmp_path_factory.mktemp("named")
    TEACHER.save_pretrained(folder / "teacher")
    cache = open_cache(
        folder / "cache",
        runs.config(folder, max_length=MAX_LENGTH),
        str(folder / "teacher"),
        TEACHER.config,
        TOKENIZER,
    )
    cache.fill({"train": DATA.select(range(3))}, make_teacher)
    return folder


def test_teacher_by_name_is_known_by_its_files(named, whole, tmp_path):
    teacher = str(named / "teacher")

    def opened(model=teacher, folder=named / "cache", **settings):
        return TeacherCache.open(folder, facts_of(tmp_path, model, **settings))

    assert len(opened()) == 3
    # Copied under another name, with files that aren't the model's.
    other = shutil.copytree(teacher, tmp_path / "other")
    (other / "notes.safetensors").write_bytes(b"...")
    assert len(opened(str(other))) == 3
    refused(lambda: opened(teacher_dtype="bfloat16"), "teacher_dtype='float32'", "teacher_dtype='bfloat16'")
    refused(lambda: opened(load_teacher_in_4bit=True), "load_teacher_in_4bit=False")
    refused(lambda: opened(teacher_model_init_kwargs={"dtype": "float16"}), "teacher_dtype='float16'")
    tiny.qwen2(len(TOKENIZER), seed=5).save_pretrained(tmp_path / "third")
    refused(lambda: opened(str(tmp_path / "third")), "teacher='teacher'", "teacher='third'")
    # The two ways of giving one can't be compared.
    refused(lambda: opened(TEACHER), "give the teacher by name", "compared")
    refused(lambda: opened(folder=whole.folder), "as a loaded model", "compared")


def test_digest_of_files(named, tmp_path):
    def digest(folder):
        return files_digest(str(folder), {}, download=False)

    whole = digest(named / "teacher")
    assert whole.startswith("files:") and whole == digest(named / "teacher")
    TEACHER.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    sharded = digest(tmp_path / "sharded")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1 and sharded not in (None, whole)
    data = bytearray(shards[1].read_bytes())
    data[-1] ^= 1
    shards[1].write_bytes(data)
    assert digest(tmp_path / "sharded") not in (None, sharded)
    shards[1].unlink()
    assert digest(tmp_path / "sharded") is None
    (tmp_path / "bin").mkdir()
    shutil.copy(named / "teacher" / "config.json", tmp_path / "bin")
    torch.save(TEACHER.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    assert digest(tmp_path / "bin").startswith("files:")

    # As the hub's client lays out what it downloads.
    hub = tmp_path / "hub" / "models--some--teacher"
    shutil.copytree(named / "teacher", hub / "snapshots" / ("0" * 40))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0" * 40)
    assert files_digest("some/teacher", {"cache_dir": str(tmp_path / "hub")}, download=False) == whole
    assert files_digest("other/teacher", {"cache_dir": str(tmp_path / "hub")}, download=False) is None


def test_large_file_is_sampled_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "BLOCK", 4)
    monkeypatch.setattr(identity, "SAMPLES", 5)
    data = bytes(range(100))
    (tmp_path / "x.bin").write_bytes(data)
    blocks = list(identity._blocks(tmp_path / "x.bin"))
    assert blocks == [data[i : i + 4] for i in (0, 24, 48, 72, 96)]


def test_without_its_weights_a_teacher_is_compared_by_name(named, tmp_path, caplog):
    bare = tmp_path / "teacher"
    bare.mkdir()
    shutil.copy(named / "teacher" / "config.json", bare)
    cache = TeacherCache.open(named / "cache", facts_of(tmp_path, str(bare)))
    assert "only its name was compared" in caplog.text
    assert cache.fill({"train": DATA.select([2, 0])}, not_loaded).states == 0
    refused(lambda: cache.fill({"train": DATA}, not_loaded), "'teacher'", "weights", "download")
    bare.rename(tmp_path / "third")
    refused(
        lambda: TeacherCache.open(named / "cache", facts_of(tmp_path, str(tmp_path / "third"))),
        "teacher_name='teacher'",
        "teacher_name='third'",
    )


# ---- Damage


def truncate(path):
    os.truncate(path, path.stat().st_size - 3)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("which", ["shard", "head"])
def test_damaged_file_is_refused_and_made_again(whole, copy, damage, which):
    path = copy / (whole.shards[1].file if which == "shard" else "head.safetensors")
    lost = len(whole.shards[1].keys) if which == "shard" else 0
    damage(path)
    refused(lambda: TeacherCache.open(copy, whole.facts), path.name, "damaged", "repair_teacher_cache=True")
    cache = TeacherCache.open(copy, whole.facts, repair=True)
    assert len(cache) == len(whole) - lost
    loader = Loader()
    assert cache.fill({"train": DATA}, loader).examples == lost and loader.loaded == 1
    assert content(copy) == content(whole.folder)
    assert len(TeacherCache.open(copy, whole.facts)) == len(whole)


def test_several_damaged_files_are_made_again(whole, copy, tmp_path):
    for shard in whole.shards[:3]:
        flip(copy / shard.file)
    # Interrupted once more, after the first of them.
    left = len(whole.shards) - 2
    with pytest.raises(KeyboardInterrupt):
        filled(copy, tmp_path, loader=Loader(copy, left), repair=True)
    refused(lambda: TeacherCache.open(copy, whole.facts), "is missing")
    filled(copy, tmp_path, repair=True)
    assert content(copy) == content(whole.folder)


def test_repair_leaves_out_examples_that_the_data_lack(whole, copy, caplog):
    flip(copy / whole.shards[0].file)
    cache = TeacherCache.open(copy, whole.facts, repair=True)
    cache.fill({"train": DATA.select([0, 15])}, make_teacher)
    lost = len(whole.shards[0].keys) - 1
    assert len(cache) == 16 - lost == len(TeacherCache.open(copy, whole.facts))
    assert f"{lost + 1} examples of damaged files" in caplog.text
    assert cache.missing(DATA) == whole.shards[0].keys[1:]


@pytest.mark.parametrize(
    "changes",
    [
        {"keys": "ab"},
        {"keys": [1, 2]},
        {"counts": [1]},
        {"counts": ["1"]},
        {"size": "big"},
        {"size": None},
        {"file": None},
        {"file": ["a"]},
        {"more": 1},
    ],
    ids=str,
)
def test_an_index_of_other_types_is_refused(copy, whole, changes):
    index = json.loads((copy / "index.json").read_text())
    index["shards"][0] |= changes
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"damaged|no cache wrote"):
        TeacherCache.open(copy, whole.facts)


def test_damaged_index_is_refused_and_all_made_again(whole, copy, tmp_path):
    (copy / "index.json").write_text('{"facts"')
    refused(lambda: TeacherCache.open(copy, whole.facts), "index.json", "repair_teacher_cache=True")
    filled(copy, tmp_path, repair=True)
    assert content(copy) == content(whole.folder)


def test_full_disk_is_refused_before_the_teacher_is_loaded(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10_000))
    refused(lambda: filled(tmp_path / "cache", tmp_path, loader=not_loaded), "needs 0.2 MB", "0.0 MB left")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 300_000))
    # Then the head doesn't fit.
    refused(lambda: filled(tmp_path / "cache", tmp_path), "needs 0.6 MB", "0.3 MB left")


# ---- Other people's files


FOREIGN = {"draft.tmp": b"mine", "states-2020.safetensors": b"mine", "notes.txt": b"mine"}


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        *({name: text} for name, text in FOREIGN.items()),
        FOREIGN,
        {"index.json": b"[1, 2]"},
        {"index.json": b"not JSON", "page.html": b"mine"},
        {"index.json": b"{}", "head.safetensors": b"", "README.md": b"mine"},
        # Nothing says whose states these are.
        {f"states-{0:032}.safetensors": b"mine", "head.safetensors": b"mine"},
    ],
    ids=lambda files: "+".join(files) if isinstance(files, dict) else str(files),
)
def test_a_folder_that_is_no_cache_is_refused_untouched(tmp_path, files, repair):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_bytes(text)
    foreign = next((name for name in files if name.endswith((".md", ".html", ".tmp", ".txt"))), next(iter(files)))
    refused(lambda: filled(folder, tmp_path, loader=not_loaded, repair=repair), "isn't a teacher cache", foreign)
    if "index.json" not in files:
        # Before weights are fetched, to be compared.
        config = runs.config(tmp_path, repair_teacher_cache=repair)
        refused(lambda: open_cache(folder, config, "nobody/nothing", None, None), "isn't a teacher cache")
    assert content(folder) == {name: files[name] for name in sorted(files)}


def test_what_is_no_folder_or_no_dataset_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for repair in (False, True):
        refused(lambda: filled("", tmp_path, loader=not_loaded, repair=repair), "teacher_cache='' names no")  # noqa: B023
    refused(lambda: open_cache("", runs.config(tmp_path), "nobody/nothing", None, None), "names no folder")
    assert not [path for path in tmp_path.iterdir() if path.is_file()]
    (tmp_path / "file").write_text("")
    refused(lambda: filled(tmp_path / "file", tmp_path, loader=not_loaded), "is a file", "name a folder")
    iterable = "teacher_cache needs a dataset with a length", "train", "IterableDataset"
    refused(lambda: filled(tmp_path / "cache", tmp_path, DATA.to_iterable_dataset(), not_loaded), *iterable)


def test_files_that_others_put_into_a_cache_stay(whole, copy, tmp_path):
    for name, text in FOREIGN.items():
        (copy / name).write_bytes(text)
    (copy / whole.shards[0].file).unlink()
    filled(copy, tmp_path, data=concatenate_datasets([DATA, tokenized(18).select([16, 17])]), repair=True)
    assert FOREIGN.items() <= content(copy).items()
    # What only a cache makes goes: of an interrupted fill.
    (copy / f"states-{0:032}.safetensors").write_bytes(b"")
    (copy / "head.safetensors.tmp").write_bytes(b"")
    filled(copy, tmp_path, data=tokenized(20))
    assert {f"states-{0:032}.safetensors", "head.safetensors.tmp"}.isdisjoint(content(copy))
    assert FOREIGN.items() <= content(copy).items()


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("place", ["head", "shard", "added"])
@pytest.mark.parametrize(
    "name", ["../victim.txt", "{here}/victim.txt", "states-../victim.txt", "notes.txt", f"states-{0:032}.safetensors"]
)
def test_a_name_that_no_cache_wrote_is_refused_before_anything_is_touched(
    whole, copy, tmp_path, monkeypatch, name, place, repair
):
    monkeypatch.chdir(tmp_path)
    name = name.format(here=tmp_path)
    for path in (tmp_path / "victim.txt", copy / "notes.txt"):
        path.write_text("precious")
    index = json.loads((copy / "index.json").read_text())
    if place == "head":
        index["head"]["file"] = name
    elif place == "shard":
        index["shards"][1]["file"] = name
    else:
        index["shards"].append({"file": name, "keys": ["x"], "counts": [1], "size": 1, "sha256": "0"})
    (copy / "index.json").write_text(json.dumps(index))
    # Something that a repair would delete.
    (copy / index["shards"][0]["file"]).write_bytes(b"")
    before = content(copy)
    refused(lambda: filled(copy, tmp_path, loader=not_loaded, repair=repair), repr(name), "which no cache wrote")
    assert content(copy) == before and (tmp_path / "victim.txt").read_text() == "precious"


def test_links_are_not_followed(whole, copy, tmp_path):
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    shard = copy / whole.shards[0].file
    # As the hub's client keeps files, and reading them is fine.
    moved = tmp_path / "blob"
    shard.rename(moved)
    shard.symlink_to(moved)
    assert len(TeacherCache.open(copy, whole.facts)) == len(DATA)
    # A damaged one is made again beside the file that the link led to.
    moved.write_bytes(b"changed")
    for name in (shard.name, "index.json", "head.safetensors"):
        (copy / f"{name}.tmp").symlink_to(victim)
    filled(copy, tmp_path, repair=True)
    assert content(copy) == content(whole.folder)
    assert victim.read_text() == "precious" and moved.read_bytes() == b"changed" and not shard.is_symlink()
    (copy / ".lock").unlink()
    (copy / ".lock").symlink_to(victim)
    refused(lambda: filled(copy, tmp_path, data=tokenized(18), loader=not_loaded), ".lock is a link")
    assert victim.read_text() == "precious"


# ---- Reading


def test_pickled_cache_serves_data_loader_workers(whole):
    whole.states(example_key(DATA[0]))
    pickled = pickle.dumps(whole)
    assert len(pickled) < 20_000
    assert torch.equal(pickle.loads(pickled).batch([DATA[3]]), whole.batch([DATA[3]]))
    collator = DualCollator(STUDENT.pad_token_id, TOKENIZER.pad_token_id, teacher_states=whole.batch)
    loader = DataLoader(DATA, batch_size=4, collate_fn=collator, num_workers=2)
    batches = [batch["teacher_states"] for batch in loader]
    assert len(batches) == 4
    for index, batch in enumerate(batches):
        assert torch.equal(batch, whole.batch([DATA[i] for i in range(4 * index, 4 * index + 4)]))


def gemma():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=3.0,
        initializer_range=0.3,
    )
    return Gemma2ForCausalLM(config).eval()


def with_bias():
    model = make_teacher()
    model.lm_head = nn.Linear(128, len(TOKENIZER))
    return model.eval()


@pytest.mark.parametrize(
    "make, tied, dtype",
    [
        (make_teacher, False, torch.float32),
        (with_bias, False, torch.float32),
        (gemma, True, torch.float32),
        (gemma, True, torch.bfloat16),
    ],
)
def test_head_and_embedding_come_back(tmp_path, make, tied, dtype):
    model = make().to(dtype)
    facts = cache_facts(runs.config(tmp_path), model, model.config, TOKENIZER)
    cache = TeacherCache.open(tmp_path / "cache", facts)
    cache.fill({"train": DATA.select([0])}, lambda: model)
    head, embedding = cache.load_head()
    expected = lm_head(model)
    assert torch.equal(head.weight, expected.weight) and head.weight.dtype == dtype
    assert (head.bias is None) == (expected.bias is None)
    assert (head.softcap, head.scale) == (expected.softcap, expected.scale)
    assert torch.equal(embedding, input_embedding(model))
    assert (head.weight.data_ptr() == embedding.data_ptr()) == tied
    assert not head.weight.requires_grad and not embedding.requires_grad
    hidden = torch.randn(3, facts["hidden_size"])
    with torch.no_grad():
        assert torch.equal(head(hidden), expected(hidden))
    size = expected.weight.nbytes * (1 if tied else 2)
    assert size < (tmp_path / "cache" / "head.safetensors").stat().st_size < size + 4000


# ---- hf-dskd cache-teacher


def test_command_fills_the_cache_of_a_run(tmp_path, capsys):
    tiny.gpt2(len(STUDENT)).save_pretrained(tmp_path / "student")
    STUDENT.save_pretrained(tmp_path / "student")
    TEACHER.save_pretrained(tmp_path / "teacher")
    TOKENIZER.save_pretrained(tmp_path / "teacher")
    tiny.dataset(16).to_json(tmp_path / "data.jsonl")
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {tmp_path}/student\nteacher_model_name_or_path: {tmp_path}/teacher\n"
        f"dataset_name: {tmp_path}/data.jsonl\nheld_out_size: 4\nmax_length: {MAX_LENGTH}\nmethod: dskd_cma\n"
        f"output_dir: {tmp_path}/out\nuse_cpu: true\nbf16: false\nreport_to: none\n"
    )

    def command(*arguments):
        try:
            cli.main(["cache-teacher", "--config", str(tmp_path / "run.yaml"), *arguments])
        except SystemExit as end:
            return end.code, capsys.readouterr()
        return 0, capsys.readouterr()

    code, printed = command()
    folder = tmp_path / "out" / "teacher_cache"
    assert code == 0 and f"{folder}: 16 examples" in printed.out and "computed 16 examples" in printed.out
    # transformers 5 makes another tokenizer of these files beside a Qwen2.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    cache = TeacherCache.open(folder, facts_of(tmp_path, str(tmp_path / "teacher"), tokenizer))
    data = tokenized(tokenizer=tokenizer)
    assert len(cache) == 16 and cache.missing(data) == []
    states = cache.states(example_key(data[0])).float()
    torch.testing.assert_close(states, live_states(data[0]), atol=1e-4, rtol=2**-8)

    flip(folder / cache.shards[0].file)
    code, printed = command()
    assert code == 2 and "--repair_teacher_cache" in printed.err
    code, printed = command("--repair_teacher_cache", "--held_out_size", "0")
    assert code == 0 and f"computed {len(cache.shards[0].keys)} examples" in printed.out
    code, printed = command("--method", "sft")
    assert code == 2 and "method='sft'" in printed.err
    code, printed = command("--teacher_cache", str(tmp_path / "second"), "--train_size", "3", "--held_out_size", "0")
    assert code == 0 and f"{tmp_path / 'second'}: 3 examples" in printed.out
