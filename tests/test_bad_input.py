"""Bad input ends in one line that names the value and the remedy, before a model is loaded or a file is lost."""

import importlib.util
import json
import logging
import os
import shutil
import sys

import pytest
import runs
import tiny
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    GPT2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
)

from hf_dskd import DSKDConfig, DSKDTrainer
from hf_dskd.data.tokenization import tokenize_dataset
from hf_dskd.data.tokens import answer_tokens
from hf_dskd.errors import UserError
from hf_dskd.training.compatibility import check_pair, check_peft


class Loaded(Exception):
    """A model would have been loaded."""


def bert():
    return BertForMaskedLM(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    )


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with every model that tests name."""
    folder = tmp_path_factory.mktemp("models")
    pairs = {
        "student": (tiny.gpt2(len(runs._STUDENT_TOKENIZER)), runs._STUDENT_TOKENIZER),
        "teacher": (tiny.qwen2(len(runs._TEACHER_TOKENIZER)), runs._TEACHER_TOKENIZER),
        # As if its own tokenizer had been exchanged together with its embedding.
        "weights": (tiny.qwen2(len(runs._TEACHER_TOKENIZER)), None),
        "narrow": (tiny.qwen2(len(runs._TEACHER_TOKENIZER), width=96), runs._TEACHER_TOKENIZER),
        "bert": (bert(), None),
        "t5": (t5(), None),
    }
    for name, (model, tokenizer) in pairs.items():
        model.save_pretrained(folder / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / name)
    ViTConfig().save_pretrained(folder / "vit")
    return folder


@pytest.fixture
def nothing_loads(monkeypatch):
    def load(name, **options):
        raise Loaded(name)

    for module in ("hf_dskd.training.pair", "hf_dskd.teacher.load"):
        monkeypatch.setattr(f"{module}.load_causal_lm", load)


@pytest.fixture
def make(saved, tmp_path, nothing_loads):
    """Makes a trainer of two saved models; that one of them would be loaded ends it with `Loaded`."""

    def trainer(model=saved / "student", teacher_model=saved / "teacher", args=None, rows=None, **settings):
        of_trainer = ("processing_class", "teacher_processing_class", "peft_config", "train_dataset", "eval_dataset")
        of_trainer += ("quantization_config", "teacher_quantization_config")
        options = {name: settings.pop(name) for name in of_trainer if name in settings}
        return DSKDTrainer(
            str(model) if isinstance(model, os.PathLike) else model,
            str(teacher_model) if isinstance(teacher_model, os.PathLike) else teacher_model,
            args or runs.config(tmp_path / "run", **settings),
            **{"train_dataset": tiny.dataset(4) if rows is None else tiny.Dataset.from_list(rows), **options},
        )

    return trainer


def refused(call, *parts):
    """Calls; expects a one-line error that contains each of `parts`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    for part in parts:
        assert str(part) in message, f"{part!r} is not in {message!r}"


def changed(source, folder, **settings):
    """A copy of a saved model without its weights, `settings` in its config."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


def test_good_input_gets_as_far_as_loading(make):
    """The other tests would pass on anything if this one didn't."""
    with pytest.raises(Loaded):
        make()


# ---- Which two models


@pytest.mark.parametrize("method", ["dskd_cma", "seq_kd"])
def test_no_teacher(make, method):
    refused(lambda: make(teacher_model=None, method=method), f"method={method!r}", "teacher_model", "'sft'")


@pytest.mark.parametrize("spelling", ["{0}/student", "{0}/student/", "{0}/./bert/../student", "link", "relative"])
def test_teacher_is_the_students_folder(make, saved, tmp_path, monkeypatch, spelling):
    if spelling == "link":
        (tmp_path / "link").symlink_to(saved / "student")
        spelling = str(tmp_path / "link")
    elif spelling == "relative":
        monkeypatch.chdir(saved)
        spelling = "student"
    refused(lambda: make(teacher_model=spelling.format(saved)), "teacher_model", "student'", "name a larger model")


def test_teacher_is_the_loaded_student(make, saved):
    model = AutoModelForCausalLM.from_pretrained(saved / "student")
    refused(lambda: make(model, model), "teacher_model is the student itself", "student'", "name a larger model")
    refused(lambda: make(model, saved / "student"), "teacher_model is the student itself", "name a larger model")


def test_teacher_is_an_adapted_student(saved, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(saved / "student")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(saved / "student"), LoraConfig(target_modules=["c_attn"])
    )
    args = runs.config(tmp_path, method="kd")
    for student in (base, str(saved / "student")):
        check_pair(args, student, adapted)
    refused(lambda: check_pair(args, base, str(saved / "student")), "teacher_model is the student itself")


@pytest.mark.parametrize("option, other", [("revision", "v2"), ("subfolder", "large")])
def test_teacher_is_another_model_of_the_students_name(option, other, tmp_path):
    args = runs.config(tmp_path, method="kd", teacher_model_init_kwargs={option: other})
    check_pair(args, "some/model", "some/model")
    args.model_init_kwargs = {option: other}
    refused(lambda: check_pair(args, "some/model", "some/model"), "teacher_model is the student itself")
    args.model_init_kwargs, args.teacher_model_init_kwargs = {"revision": "main"}, None
    refused(lambda: check_pair(args, "some/model", "some/model"), "teacher_model is the student itself")


def test_min_edit_says_what_to_install(tmp_path, monkeypatch):
    args = runs.config(tmp_path, method="min_edit")
    check_pair(args, "some/student", "some/teacher")
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    remedy = "method='min_edit' needs the package rapidfuzz: pip install 'hf-dskd[min_edit]'"
    refused(lambda: check_pair(args, "some/student", "some/teacher"), remedy)


def test_teacher_is_the_students_name(make):
    refused(lambda: make("some/model", "some/model"), "'some/model'", "name a larger model")


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("name", ["no-such-organization/no-such-model", "missing/folder/here", "empty"])
def test_model_that_does_not_exist(make, tmp_path, role, name):
    if name == "empty":
        # transformers 4 takes an empty folder for an MPT, since "mpt" is in its name.
        (tmp_path / name).mkdir()
        name = str(tmp_path / name)
    options = {"model" if role == "student" else "teacher_model": name}
    refused(lambda: make(**options), f"the {role} {name!r}", "check the path or the name", "HF_HUB_OFFLINE", "login")


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_model_without_weights(saved, tmp_path, role):
    folder = changed(saved / role, tmp_path / "bare")
    refused(
        lambda: runs.trainer(tmp_path / "run", **{role: str(folder)}),
        f"the {role} {str(folder)!r} can't be loaded (Error no file named",
        "check the path",
    )


@pytest.mark.parametrize("role, parameter", [("student", "processing_class"), ("teacher", "teacher_processing_class")])
def test_model_without_tokenizer(make, saved, tmp_path, role, parameter):
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(saved / role / "config.json", folder)
    options = {"model" if role == "student" else "teacher_model": folder}
    refused(
        lambda: make(**options),
        f"the {role}'s tokenizer {str(folder)!r}",
        "no tokenizer_config.json",
        f"pass {parameter}",
    )


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    "kind, shown",
    [
        ("t5", "a sequence-to-sequence model (T5ForConditionalGeneration)"),
        ("bert", "a masked language model (BertForMaskedLM)"),
        ("vit", "of a kind without causal language models (vit)"),
    ],
)
def test_not_a_causal_model_by_name(make, saved, role, kind, shown):
    options = {"model" if role == "student" else "teacher_model": saved / kind}
    refused(lambda: make(**options), f"the {role} {str(saved / kind)!r} is {shown}", "needs a causal")


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    "model, shown",
    [
        (t5, "T5ForConditionalGeneration"),
        (bert, "BertForMaskedLM"),
        (lambda: GPT2Model(tiny.gpt2().config), "GPT2Model"),
    ],
    ids=["t5", "bert", "headless"],
)
def test_not_a_causal_model_as_an_object(make, role, model, shown):
    options = {"model" if role == "student" else "teacher_model": model()}
    refused(lambda: make(**options), shown, "causal")


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_max_length_beyond_the_positions(make, saved, tmp_path, role):
    other = "student" if role == "teacher" else "teacher"
    folder = changed(saved / other, tmp_path / "long", n_positions=4096, max_position_embeddings=4096)
    models = {"student": "model", "teacher": "teacher_model"}
    options = {models[role]: saved / role, models[other]: folder}
    refused(
        lambda: make(**options, max_length=1025),
        "max_length=1025",
        f"the {role} {str(saved / role)!r}",
        "1024 positions",
        "set max_length=1024",
    )
    with pytest.raises(Loaded):
        make(**options, max_length=1024)
    # The released code's sequences are padded to one more than max_length.
    refused(lambda: make(**options, max_length=1024, as_published=True), "max_length=1024", "set max_length=1023")
    with pytest.raises(Loaded):
        make(**options, max_length=1023, as_published=True)


def test_max_length_beyond_the_positions_of_an_object(make):
    refused(lambda: make(model=tiny.gpt2(), max_length=2048), "max_length=2048", "'gpt2'", "1024 positions")


# ---- Tokenizers


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_tokenizer_without_eos(make, role):
    tokenizer = {"student": tiny.byte_level_tokenizer, "teacher": tiny.sentencepiece_tokenizer}[role]()
    tokenizer.eos_token = None
    option = {"student": "processing_class", "teacher": "teacher_processing_class"}[role]
    refused(lambda: make(**{option: tokenizer}), f"the {role}'s tokenizer", "no EOS token", "set tokenizer.eos_token")


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_missing_pad_token_is_set_and_said(make, caplog, role):
    tokenizer = {"student": tiny.byte_level_tokenizer, "teacher": tiny.sentencepiece_tokenizer}[role]()
    tokenizer.pad_token = None
    option = {"student": "processing_class", "teacher": "teacher_processing_class"}[role]
    with caplog.at_level(logging.WARNING), pytest.raises(Loaded):
        make(**{option: tokenizer})
    assert tokenizer.pad_token == tokenizer.eos_token
    said = [record.getMessage() for record in caplog.records if "padding token" in record.getMessage()]
    assert len(said) == 1 and role in said[0] and repr(tokenizer.eos_token) in said[0]


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_vocabulary_larger_than_the_embedding(make, saved, tmp_path, role):
    size = {"student": len(runs._STUDENT_TOKENIZER), "teacher": len(runs._TEACHER_TOKENIZER)}[role]
    option = "model" if role == "student" else "teacher_model"
    parts = (f"the {role}'s tokenizer", f"{size} tokens", f"{size - 1} rows", "resize_token_embeddings")
    refused(lambda: make(**{option: changed(saved / role, tmp_path / "small", vocab_size=size - 1)}), *parts)
    loaded = tiny.gpt2(size - 1) if role == "student" else tiny.qwen2(size - 1)
    tokenizers = {"processing_class": runs._STUDENT_TOKENIZER, "teacher_processing_class": runs._TEACHER_TOKENIZER}
    refused(lambda: make(**{option: loaded}, **tokenizers), *parts)


# ---- Two vocabularies


@pytest.mark.parametrize(
    "settings, parts",
    [
        ({"method": "kd"}, ["method='kd'", "such as uld, min_edit or alm"]),
        ({"method": "dskd"}, ["method='dskd'", "such as dskd_cma"]),
        ({"method": "dskd", "t2s_label": "teacher"}, ["method='dskd'", "such as dskd_cma"]),
        # Here it isn't the method that has to change.
        ({"method": "dskd_cma", "alignment": "identity"}, ["alignment='identity'", "such as cross_model_attention"]),
    ],
)
def test_same_vocabulary_methods_on_different_ones(make, saved, settings, parts):
    refused(lambda: make(**settings), f"{str(saved / 'student')!r} and {str(saved / 'teacher')!r} differ", *parts)
    with pytest.raises(Loaded):
        make(teacher_model=saved / "weights", teacher_processing_class=runs._STUDENT_TOKENIZER, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dskd_eta"},
        {"method": "min_edit"},
        {"method": "dskd_cma", "projector_init": "pseudo_inverse"},
        {"method": "dskd_cma", "alignment": "exact_tokens"},
    ],
)
def test_vocabularies_without_a_common_token(make, saved, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DSKD_CACHE", str(tmp_path / "cache"))
    backend = Tokenizer(models.BPE(vocab={"</s>": 0, "ĠQQ": 1, "ĠZZ": 2}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    apart = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    options = {"teacher_model": saved / "weights", "teacher_processing_class": apart}
    refused(lambda: make(**options, **settings), "'the teacher' share no token", "such as alm")
    with pytest.raises(Loaded):
        make(**settings)


# ---- Data


def test_empty_dataset(make):
    empty = tiny.dataset(2).select([])
    refused(lambda: make(train_dataset=empty), "train data set", "no rows", "at least one")
    refused(lambda: make(eval_dataset={"held_out": empty}), "eval_held_out data set", "no rows", "at least one")


def test_column_that_is_not_there(make):
    refused(lambda: make(prompt_column="question"), "'question'", "'prompt', 'completion'", "set prompt_column")
    refused(lambda: make(response_column="answer"), "'answer'", "'prompt', 'completion'", "set response_column")
    refused(lambda: make(rows=[{"text": "a", "label": "b"}]), "'text', 'label'", "set prompt_column")
    refused(lambda: make(rows=[{"prompt": "a", "label": "b"}]), "'completion'", "'prompt', 'label'")


def test_empty_responses_are_skipped_and_counted(tmp_path):
    rows = [{"prompt": "a", "completion": text} for text in ("", "  \n", "yes")]
    run = runs.trainer(tmp_path, train_dataset=tiny.Dataset.from_list(rows))
    report = run.tokenization_reports["train"]
    assert (report.rows, report.kept, report.empty_responses) == (3, 1, 2)
    assert run.train_dataset["example_id"] == [2]


def test_only_empty_responses(make):
    refused(lambda: make(rows=[{"prompt": "a", "completion": ""}] * 2), "2 have an empty response", "check")


LONG = [{"prompt": "a", "completion": "yes"}, {"prompt": "moon " * 100, "completion": "yes"}]


def test_prompt_longer_than_max_length(make):
    refused(
        lambda: make(rows=LONG, max_length=64),
        "row 1",
        "max_length=64",
        "raise max_length or set skip_long_prompts=True",
    )


def test_skip_long_prompts(tmp_path):
    dataset = tiny.Dataset.from_list(LONG)
    run = runs.trainer(tmp_path, train_dataset=dataset, max_length=64, skip_long_prompts=True)
    report = run.tokenization_reports["train"]
    assert (report.rows, report.kept, report.long_prompts) == (2, 1, 1)


@pytest.fixture(scope="module")
def tokens():
    """As a user's own program may have made them: without what only hf_dskd needs."""
    tokenized, _ = tokenize_dataset(tiny.dataset(4), runs._STUDENT_TOKENIZER, runs._TEACHER_TOKENIZER, max_length=256)
    return tokenized, tokenized.remove_columns(["chunk_ids", "teacher_chunk_ids"])


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dskd_clp"},
        {"method": "dskd_cla"},
        {"method": "dskd_eta"},
        {"method": "alm"},
        {"method": "dskd_cma", "alignment": "chunk_mean"},
    ],
)
def test_tokens_without_chunks(make, tokens, settings):
    whole, without = tokens
    parts = f"method={settings['method']!r}", "no column chunk_ids", "pass the text", "hf_dskd.tokenize_dataset"
    refused(lambda: make(train_dataset=without, **settings), "the train data", *parts)
    refused(lambda: make(eval_dataset=without, **settings), "the eval data", *parts)
    refused(lambda: make(eval_dataset={"held_out": without}, **settings), "the eval_held_out data", *parts)
    with pytest.raises(Loaded):
        make(train_dataset=whole, eval_dataset=whole, **settings)


def test_tokens_without_chunks_serve_other_methods(make, tokens):
    with pytest.raises(Loaded):
        make(train_dataset=tokens[1], eval_dataset=tokens[1], method="dskd_cma")


def test_chunks_are_asked_for_when_evaluating_later(tmp_path, tokens):
    run = runs.trainer(tmp_path, method="alm")
    refused(lambda: run.evaluate(tokens[1]), "the eval data", "no column chunk_ids")


def test_teacher_can_not_answer_tokens(make, tokens):
    refused(
        lambda: make(train_dataset=tokens[0], method="seq_kd"), "method='seq_kd'", "already tokenized", "pass the text"
    )


def test_spans_that_do_not_cover_a_response(make, monkeypatch):
    """Nothing that a user can mend: a mistake in the library, which names the example."""

    def broken(tokenizer, lead, text, control=False):
        ids, byte_ends, whole = answer_tokens(tokenizer, lead, text, control)
        return ids, byte_ends if "moon" not in text else [*byte_ends[:-1], byte_ends[-1] + 1], whole

    monkeypatch.setattr("hf_dskd.data.tokenization.answer_tokens", broken)
    rows = [{"prompt": "a", "completion": text} for text in ("yes", "no", "the moon")]
    with pytest.raises(RuntimeError, match=r"student's tokens .* response of example 2: .* byte 9 of 8;"):
        make(rows=rows)


def test_on_policy_without_a_generation_config(make):
    student = tiny.gpt2(len(runs._STUDENT_TOKENIZER))
    options = {"model": student, "processing_class": runs._STUDENT_TOKENIZER}
    with pytest.raises(Loaded):
        make(**options, on_policy_fraction=0.5)
    student.generation_config = None
    refused(
        lambda: make(**options, on_policy_fraction=0.5),
        "generation_config of the student is None",
        "set model.generation_config = GenerationConfig(",
    )
    with pytest.raises(Loaded):
        make(**options)


def test_training_without_data(tmp_path):
    run = runs.trainer(tmp_path, train_dataset=None)
    refused(run.train, "train_dataset=None", "pass the examples")


# ---- LoRA on the vocabulary


def lora(**settings):
    return LoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": ["c_attn"], **settings})


@pytest.mark.parametrize(
    "adapter, setting, module",
    [
        (lora(target_modules=["c_attn", "lm_head"]), "target_modules", "lm_head"),
        (lora(target_modules=["wte"]), "target_modules", "transformer.wte"),
        (lora(target_modules=["transformer.wte"]), "target_modules", "transformer.wte"),
        (lora(target_modules=r".*(c_attn|lm_head)"), "target_modules", "lm_head"),
        (lora(target_modules=r".*\.(c_attn|wte)"), "target_modules", "transformer.wte"),
        (lora(modules_to_save=["lm_head"]), "modules_to_save", "lm_head"),
        (lora(modules_to_save=["head"]), "modules_to_save", "lm_head"),
        (lora(modules_to_save=["wte"]), "modules_to_save", "transformer.wte"),
        (lora(target_parameters=["lm_head.weight"]), "target_parameters", "lm_head"),
    ],
)
def test_lora_on_head_or_embedding(make, adapter, setting, module):
    refused(lambda: make(peft_config=adapter), f"peft_config.{setting}=", f"covers {module!r}", "leave it out")


def test_lora_on_modules_that_are_not_there():
    refused(
        lambda: check_peft(lora(target_modules=["q_proj", "v_proj"]), tiny.gpt2()),
        "target_modules=['q_proj', 'v_proj'] names no module",
        "c_attn, c_fc, c_proj, or set 'all-linear'",
    )


@pytest.mark.parametrize(
    "quantization, adapter, expected",
    [
        ({"load_in_4bit": True}, lora(), "a 4-bit student can't be trained on a CPU"),
        ({"load_in_8bit": True}, None, "load_in_8bit=True needs an adapter to train"),
    ],
)
def test_a_quantized_student(quantization, adapter, expected, tmp_path):
    tiny.gpt2(len(runs._STUDENT_TOKENIZER)).save_pretrained(tmp_path)
    refused(
        lambda: DSKDTrainer(
            str(tmp_path),
            args=runs.config(tmp_path, method="sft"),
            train_dataset=tiny.dataset(4),
            processing_class=runs._STUDENT_TOKENIZER,
            peft_config=adapter,
            quantization_config=BitsAndBytesConfig(**quantization),
        ),
        expected,
    )


def test_weights_that_are_cut_off(tmp_path):
    tiny.gpt2(len(runs._STUDENT_TOKENIZER)).save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    refused(
        lambda: DSKDTrainer(
            str(tmp_path / "cut"),
            args=runs.config(tmp_path, method="sft"),
            train_dataset=tiny.dataset(4),
            processing_class=runs._STUDENT_TOKENIZER,
        ),
        "the student",
        "cut' can't be loaded",
    )


def test_lora_on_the_head_of_a_loaded_student(make):
    student = get_peft_model(tiny.gpt2(len(runs._STUDENT_TOKENIZER)), lora(target_modules=["c_attn", "lm_head"]))
    refused(
        lambda: make(model=student, processing_class=runs._STUDENT_TOKENIZER), "target_modules", "covers 'lm_head'"
    )


@pytest.mark.parametrize(
    "adapter",
    [
        lora(target_modules="all-linear"),
        lora(target_modules=["c_attn", "c_proj"]),
        lora(target_modules=r".*(c_attn|lm_head)", exclude_modules=["lm_head"]),
        lora(modules_to_save=["ln_f"]),
    ],
)
def test_lora_elsewhere_is_fine(adapter):
    check_peft(adapter, tiny.gpt2())
    model = get_peft_model(tiny.gpt2(), adapter).get_base_model()
    assert type(model.lm_head) is torch.nn.Linear and type(model.transformer.wte) is torch.nn.Embedding


# ---- Four bits


def test_four_bits_without_bitsandbytes(make, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest)
    )
    refused(lambda: make(load_teacher_in_4bit=True), "load_teacher_in_4bit needs", "pip install bitsandbytes")


def test_four_bits_on_mps(make, tmp_path, monkeypatch):
    args = runs.config(tmp_path, load_teacher_in_4bit=True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    refused(lambda: make(args=args), "load_teacher_in_4bit:", "MPS", "leave load_teacher_in_4bit out")


def test_four_bits_on_a_cpu_with_odd_sizes(make, saved, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    refused(
        lambda: make(teacher_model=saved / "narrow", load_teacher_in_4bit=True),
        str(saved / "narrow"),
        "96 x 96",
        "multiples of 64",
        "leave load_teacher_in_4bit out",
    )
    with pytest.raises(Loaded):
        make(load_teacher_in_4bit=True)


def test_four_bits_for_a_loaded_model(make):
    four_bits = BitsAndBytesConfig(load_in_4bit=True)
    for options, named in (
        ({"teacher_model": tiny.qwen2(), "load_teacher_in_4bit": True}, "load_teacher_in_4bit=True needs"),
        ({"teacher_model": tiny.qwen2(), "teacher_quantization_config": four_bits}, "teacher_quantization_config"),
        ({"model": tiny.gpt2(), "quantization_config": four_bits}, "quantization_config"),
    ):
        refused(lambda options=options: make(**options), named, "as a name", "a loaded model can't be quantized")
    refused(lambda: make(load_teacher_in_4bit=True, teacher_quantization_config=four_bits), "load_teacher", "only one")


# ---- Where and how it runs


@pytest.mark.parametrize("below", ["", "below", "far/below"])
def test_output_dir_is_not_writable(make, tmp_path, below):
    """Not with permissions: root may write anywhere."""
    (tmp_path / "file").write_text("keep")
    folder = str(tmp_path / "file" / below)
    refused(lambda: make(args=runs.config(folder)), f"output_dir={folder!r}", "choose another folder")
    assert (tmp_path / "file").read_text() == "keep"


def test_data_parallel(make, monkeypatch):
    monkeypatch.setattr(DSKDConfig, "n_gpu", 2)
    refused(make, "2 GPUs", "accelerate launch --num_processes 2", "CUDA_VISIBLE_DEVICES=0")


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharding_by_launcher(make, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    refused(make, name, "accelerate launch --multi_gpu")


@pytest.mark.parametrize("settings", [{"fsdp": "full_shard"}, {"deepspeed": "zero2.json"}])
def test_sharding_by_setting(make, settings):
    """Without asking for deepspeed to be installed first."""
    refused(lambda: make(**settings), next(iter(settings)).upper(), "accelerate launch --multi_gpu")


# ---- Resuming


@pytest.fixture(scope="module")
def finished(saved, tmp_path_factory):
    """The folder of a run with checkpoints 9 and 10, and all that a script may save into it."""
    folder = tmp_path_factory.mktemp("finished")
    run = runs.trainer(
        folder, student=str(saved / "student"), teacher=str(saved / "teacher"), max_steps=1, save_strategy="steps"
    )
    run.train()
    (folder / "checkpoint-1").rename(folder / "checkpoint-10")
    shutil.copytree(folder / "checkpoint-10", folder / "checkpoint-9")
    run.save_model()
    run.save_state()
    return folder


def resume(folder, checkpoint, **settings):
    run = runs.trainer(folder, **settings)
    weights = runs.weights(run)

    def train():
        try:
            run.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not True else True)
        finally:
            assert run.state.global_step == 0 and run.optimizer is None
            assert all(torch.equal(value, weights[name]) for name, value in runs.weights(run).items())

    return train


def test_resume_from_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(resume(tmp_path, tmp_path / "missing"), str(tmp_path / "missing"), "name a checkpoint-N folder")
    refused(resume(tmp_path, tmp_path / "empty"), str(tmp_path / "empty"), "name a checkpoint-N folder")
    refused(resume(tmp_path / "new", True), "resume_from_checkpoint=True", "start without it")


def test_resume_from_the_runs_own_folder(tmp_path, finished):
    """It has the student, trainer_state.json and auxiliary.json, so that only the optimizers would begin anew."""
    for name in ("model.safetensors", "trainer_state.json", "auxiliary.json"):
        assert (finished / name).is_file()
    refused(resume(tmp_path, finished), repr(str(finished)), f"did you mean {str(finished / 'checkpoint-10')!r}?")


@pytest.mark.parametrize(
    "settings, parts",
    [
        ({"method": "dskd_cma"}, ["its method is 'dskd_cma_ga'", "this run's is 'dskd_cma'"]),
        ({"method": "sft"}, ["its method is 'dskd_cma_ga'", "this run's is 'sft'"]),
        ({"as_published": True}, ["its as_published is False", "this run's is True"]),
        ({"teacher": "narrow"}, ["its teacher is 'teacher'", "this run's is 'narrow'"]),
        ({"student": "teacher", "teacher": "narrow"}, ["its student is 'student'", "this run's is 'teacher'"]),
        ({"peft_config": lora()}, ["its adapter is False", "this run's is True"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_resume_from_another_run(saved, tmp_path, finished, settings, parts):
    models = {role: str(saved / settings.get(role, role)) for role in ("student", "teacher")}
    tokenizers = {}
    if settings.get("student") == "teacher":
        tokenizers["processing_class"] = runs._TEACHER_TOKENIZER
    run = resume(tmp_path, finished / "checkpoint-10", **{**settings, **models, **tokenizers})
    refused(run, repr(str(finished / "checkpoint-10")), *parts, "use the settings it was made with")
