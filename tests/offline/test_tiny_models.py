"""The stand-ins of `--smoke` are what the real families are, only small."""

import json
import os
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_dskd import UserError
from hf_dskd.data.prompts import depends_on_the_day
from hf_dskd.data.vocabulary import same_vocabulary
from hf_dskd.offline.tiny_models import FAMILIES, MARKER, family_of, learn_bpe, tiny_model


SHARED = Path(__file__).resolve().parents[2] / "shared" / "tokenizers"
TEXT = "Zwölf 東京 👩‍👩‍👧\n\tdef f():"
# Class of the model; the tokenizer's, with one for each version of transformers where they differ; EOS and PAD; what
# the tokenizer puts before "Hi"; what begins a chat's answer.
CHAT, END = "<|im_start|>assistant\n", "<|endoftext|>"
EXPECTED = {
    "gpt2": ("GPT2LMHeadModel", ["GPT2Tokenizer"], END, None, None, None),
    "smollm2": ("LlamaForCausalLM", ["GPT2Tokenizer"], "<|im_end|>", "<|im_end|>", None, CHAT),
    "llama2": ("LlamaForCausalLM", ["LlamaTokenizer"], "</s>", None, "<s>", "<|assistant|>\n"),
    "llama3": (
        *("LlamaForCausalLM", ["PreTrainedTokenizer", "TokenizersBackend"], "<|eot_id|>", None),
        *("<|begin_of_text|>", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ),
    "mistral": ("MistralForCausalLM", ["LlamaTokenizer", "TokenizersBackend"], "</s>", None, "<s>", "[/INST]"),
    "qwen2": ("Qwen2ForCausalLM", ["Qwen2Tokenizer"], "<|im_end|>", END, None, CHAT),
    "qwen3": ("Qwen3ForCausalLM", ["Qwen2Tokenizer"], "<|im_end|>", END, None, CHAT),
    "gemma3": ("Gemma3ForCausalLM", ["GemmaTokenizer"], "<eos>", "<pad>", "<bos>", "<start_of_turn>model\n"),
    "gpt_neox": ("GPTNeoXForCausalLM", ["GPTNeoXTokenizer"], END, None, None, None),
    "opt": ("OPTForCausalLM", ["GPT2Tokenizer"], "</s>", "<pad>", "</s>", None),
    "phi": ("PhiForCausalLM", ["CodeGenTokenizer"], END, None, None, None),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of a family's model in a role, made at most once."""
    home = tmp_path_factory.mktemp("tiny")
    return lambda family, role="student": tiny_model(family, home / family / role, role)


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_and_special_tokens_are_the_familys(made, family):
    folder = made(family)
    model_class, tokenizer_classes, eos, pad, bos, answer = EXPECTED[family]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == model_class
    assert type(tokenizer).__name__.removesuffix("Fast") in tokenizer_classes

    ids = tokenizer("Hi")["input_ids"]
    assert (
        [tokenizer.bos_token] * (bos is not None)
        == tokenizer.convert_ids_to_tokens(ids)[: bos is not None]
        == ([bos] if bos else [])
    )
    assert (ids[0] in tokenizer.all_special_ids) == (bos is not None) and ids[-1] not in tokenizer.all_special_ids
    assert tokenizer.eos_token == eos
    if family != "gpt_neox":  # whose class has a default in transformers 5
        assert tokenizer.pad_token == pad
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.bos_token_id == tokenizer.bos_token_id
    ends = model.generation_config.eos_token_id
    assert tokenizer.eos_token_id == (ends[0] if isinstance(ends, list) else ends)
    assert len(tokenizer) == FAMILIES[family].vocabulary

    for text in (TEXT, "two  spaces\n    in 1234 lines\n\n\n", "don't\r\nx<|y|>", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    # What it has learnt is used: English and Python take fewer tokens than bytes.
    words = "    def text(self):\n        return the string of the width"
    assert len(tokenizer(words)["input_ids"]) < 0.6 * len(words)

    assert (tokenizer.chat_template is not None) == (answer is not None)
    if answer:
        chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        assert prompt.endswith(answer) and "Hi" in prompt
        # TinyLlama's template leaves BOS to the tokenizer.
        assert prompt.count(bos or "no BOS") == (bos is not None and family != "llama2")
        # The family's template writes a date, today's unless it is told another.
        dated = tokenizer.apply_chat_template(chat, tokenize=False, date_string="1 May 1995")
        assert (
            ("1 May 1995" in dated) == (depends_on_the_day(tokenizer, "student") is not None) == (family == "llama3")
        )
        whole = tokenizer.apply_chat_template(chat, tokenize=False)
        assert "Ho" in whole.split("Hi")[1]
        # Markers are single tokens where the family has tokens for them.
        markers = [token for token in re.findall(r"<[^<>]*>", prompt) if token in tokenizer.get_vocab()]
        given = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert [tokenizer.decode([i]) for i in given if i in tokenizer.convert_tokens_to_ids(markers)] == markers
        assert not [marker for marker in markers if marker in tokenizer.decode(given, skip_special_tokens=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_and_roles(made, family):
    folders = {role: made(family, role) for role in ("student", "teacher")}
    models = {role: AutoModelForCausalLM.from_pretrained(folder) for role, folder in folders.items()}
    for role, model in models.items():
        assert model.config.hidden_size == {"student": 64, "teacher": 128}[role]
        assert model.config.num_hidden_layers == 2 and model.config.max_position_embeddings == 1024
        head = model.get_output_embeddings()
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and module is not head:
                assert module.in_features % 64 == module.out_features % 64 == 0, name
        tied = head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
        assert tied == (role in FAMILIES[family].tied)
    rows = {role: model.get_input_embeddings().weight.shape[0] for role, model in models.items()}
    assert FAMILIES[family].vocabulary <= rows["student"] < rows["teacher"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folders["student"] / name).read_bytes() == (folders["teacher"] / name).read_bytes()
    assert family_of(str(folders["student"])) == family


def test_families_that_share_tokenizers_and_those_that_do_not(made):
    text = "def wrap(self, text):\n    return 1234"
    made_of = {family: AutoTokenizer.from_pretrained(made(family)) for family in FAMILIES}
    pieces = {}
    for family, tokenizer in made_of.items():
        pieces[family] = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert pieces["gpt2"] == pieces["opt"] and pieces["qwen2"] == pieces["qwen3"]
    shared = {frozenset(pair) for pair in combinations(FAMILIES, 2) if same_vocabulary(*(made_of[f] for f in pair))}
    # Qwen3 and Phi go on where Qwen2 and GPT-2 end; OPT has GPT-2's pieces under other ids.
    assert shared == {frozenset(("qwen2", "qwen3")), frozenset(("gpt2", "phi"))}
    # Numbers: one digit at a time, three, or what has been learnt.
    cut = {family: made_of[family].backend_tokenizer.pre_tokenizer for family in ("qwen2", "llama3", "gpt2")}
    assert {family: [piece for piece, _ in by.pre_tokenize_str("12345")] for family, by in cut.items()} == {
        "qwen2": ["1", "2", "3", "4", "5"],
        "llama3": ["123", "45"],
        "gpt2": ["12345"],
    }


def test_gemma_has_its_specialities_and_phi_its_bias(made):
    config = AutoConfig.from_pretrained(made("gemma3"))
    assert list(config.layer_types) == ["sliding_attention", "full_attention"]
    assert config.sliding_window < 384 < 1024
    model = AutoModelForCausalLM.from_pretrained(made("gemma3"))
    assert any("q_norm" in name for name, _ in model.named_parameters())
    assert AutoModelForCausalLM.from_pretrained(made("phi")).lm_head.bias is not None
    for family in ("llama3", "mistral", "qwen2", "qwen3"):
        config = AutoConfig.from_pretrained(made(family, "teacher"))
        assert config.num_key_value_heads == 2 < config.num_attention_heads


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real tokenizers are not beside this checkout")
@pytest.mark.parametrize("family, real", [("gpt2", "gpt2"), ("qwen2", "qwen1.5"), ("mistral", "mistral")])
def test_text_is_cut_as_the_real_tokenizer_does(made, family, real):
    tiny = json.loads((made(family) / "tokenizer.json").read_text(encoding="utf-8"))
    theirs = json.loads((SHARED / real / "tokenizer.json").read_text(encoding="utf-8"))
    assert tiny["normalizer"] == theirs["normalizer"]
    mine, others = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (made(family), SHARED / real))
    for text in (TEXT, "I'll  pay 1234.50\r\n\n  if x:\tpass", " lead"):
        if others.pre_tokenizer is None:
            assert mine.pre_tokenizer is None
        else:
            assert mine.pre_tokenizer.pre_tokenize_str(text) == others.pre_tokenizer.pre_tokenize_str(text)
    tokens = ["▁", "Z", "<0xC3>", "<0xB6>", "▁x"] if family == "mistral" else ["Z", "wÃ¶", "lf", "Ġx"]
    assert mine.decoder.decode(tokens) == others.decoder.decode(tokens)


def test_the_same_call_writes_the_same_bytes_in_another_process(made, tmp_path):
    words = ["-m", "hf_dskd.offline.tiny_models", "Qwen/Qwen3-8B", str(tmp_path / "new"), "--role", "teacher"]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(tmp_path / "new")
    folder = made("qwen3", "teacher")
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "new").iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", MARKER} <= set(files)
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / "new" / file).read_bytes(), file


def test_student_and_teacher_differ_and_random_numbers_go_on(made, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    folder = tiny_model("gpt2", tmp_path / "gpt2", "student")
    assert torch.equal(torch.rand(2), expected)
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    other = AutoModelForCausalLM.from_pretrained(made("opt")).state_dict()
    embedding = weights["transformer.wte.weight"]
    assert not torch.equal(embedding[:100], other["model.decoder.embed_tokens.weight"][:100])
    assert 0.01 < embedding.std() < 0.05


def test_a_folder_that_is_complete_stays_as_it_is(made):
    folder = made("qwen2")
    # What is written first doesn't stay behind, nor is it seen.
    assert {path.name for path in folder.parent.iterdir()} <= {"student", "teacher"}
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert tiny_model("Qwen/Qwen2.5-7B-Instruct", str(folder), "student") == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_family_of_a_name():
    for name, family in (
        ("Qwen/Qwen1.5-1.8B", "qwen2"),
        ("Qwen2.5-Coder-0.5B-Instruct", "qwen2"),
        ("Qwen/Qwen3-8B", "qwen3"),
        ("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "llama2"),
        ("meta-llama/Llama-2-7b-hf", "llama2"),
        ("meta-llama/Llama-3.2-1B", "llama3"),
        ("meta-llama/Meta-Llama-3-8B", "llama3"),
        ("mistralai/Mistral-7B-v0.1", "mistral"),
        ("SmolLM2-135M-Instruct", "smollm2"),
        ("google/gemma-3-1b-it", "gemma3"),
        ("EleutherAI/pythia-160m", "gpt_neox"),
        ("facebook/opt-125m", "opt"),
        ("microsoft/phi-2", "phi"),
        ("openai-community/gpt2-xl", "gpt2"),
        ("gpt_neox", "gpt_neox"),
    ):
        assert family_of(name) == family, name
    # None is passed off as another.
    for name in ("google/gemma-2-2b", "Qwen/Qwen3.5-4B", "bigscience/bloom-560m", "meta-llama/Llama-4-x"):
        with pytest.raises(UserError, match=rf"tiny stand-in for '{name}'.*smollm2, llama3, .*gpt2") as error:
            family_of(name)
        assert "\n" not in str(error.value)


def test_family_of_a_folder_goes_by_its_files_not_its_name(tmp_path):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert family_of(str(folder)) == "llama2"
    (folder / "tokenizer.json").write_text('{"pre_tokenizer": {"type": "ByteLevel"}}')
    assert family_of(str(folder)) == "smollm2"
    (folder / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(UserError, match="name a model of"):
        family_of(str(folder))


def test_a_folder_of_something_else_is_not_touched(made, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="holds something other than a tiny gpt2 student: name another folder"):
        tiny_model("gpt2", tmp_path / "mine", "student")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="tiny opt teacher"):
        tiny_model("opt", made("opt"), "teacher")
    with pytest.raises(UserError, match="role='learner' is unknown"):
        tiny_model("opt", tmp_path / "new", "learner")


def test_bpe_is_greedy_and_breaks_ties_by_the_pair():
    vocabulary, merges = learn_bpe(["abab", "abc", "bc"], ["a", "b", "c"], 5)
    assert merges == [("a", "b"), ("b", "c")]
    assert vocabulary == {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}
    # A word counts as often as it is there.
    assert learn_bpe(["ab", "ab", "cd"], ["a", "b", "c", "d"], 5)[1] == [("a", "b")]
    # ("b", "c") and ("c", "d") are as frequent: the larger wins, whatever the hash.
    assert learn_bpe(["bc", "cd"], ["b", "c", "d"], 4)[1] == [("c", "d")]
    # Words that run out end it.
    assert learn_bpe(["ab"], ["a", "b"], 99) == ({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    assert learn_bpe(["aaa"], ["a"], 9)[1] == [("a", "a"), ("aa", "a")]
