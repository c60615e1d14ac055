"""
The papers' evaluation: ROUGE-L over decoding seeds, bits per byte.

Answers the papers' sets of instructions, greedily and sampled with five seeds, and scores the answers: ROUGE-L, exact
match, and of the references bits per byte (comparable between tokenizers) and token accuracy.

Everything is kept: every answer is a line in answers/SET-greedy.jsonl or answers/SET-seed10.jsonl. Stopped, the same
command goes on; a folder with an evaluation of something else is refused.

    hf-dskd evaluate --model runs/student --output_dir runs/student/evaluation
    hf-dskd evaluate --model runs/student --output_dir runs/quick --sets dolly=data/test.jsonl,vicuna --limit 50
        --greedy_only
    hf-dskd evaluate --model runs/adapter --base_model SmolLM2-135M-Instruct --output_dir runs/chat
        --prompt_style chat
    accelerate launch --multi_gpu --num_processes 2 -m hf_dskd.cli evaluate --model runs/student --output_dir runs/two
"""

from __future__ import annotations

import json
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError


if TYPE_CHECKING:
    from ..evaluation.protocol import EvaluationSettings

USAGE = "--model PATH --output_dir FOLDER [--sets NAME,NAME=FILE.jsonl] [--option VALUE ...]"
# Meaning of each option, by its type and name.
OPTIONS: dict[Any, dict[str, str]] = {
    str: {
        "model": "a student's folder, an adapter's folder, a packaged model, or a name on the hub",
        "output_dir": "where answers/, references/, scores.json and table.md are written",
        "sets": "of dolly, self_inst, vicuna, s_ni, un_ni, which come from the hub, or NAME=FILE.jsonl for a file,"
        " with commas between (dolly,self_inst,vicuna,s_ni,un_ni). A row has `instruction`, `input` and `output`, or"
        " `prompt` and `output`; `output` is a string or a list of them",
        "in_distribution": "sets of the kind that the model was trained on; the others are averaged apart (dolly)",
        "prompt_style": "alpaca: MiniLLM's template, for students trained with prompt_style=plain; plain: instruction"
        " and input alone; chat: the tokenizer's chat template. A row's own `prompt` stays as it is, except in a chat"
        " (alpaca; chat for a run that was trained in its student's template)",
        "chat_template_kwargs": "JSON for that template, such as '{\"enable_thinking\": false}'",
        "seeds": "seeds of the sampling, with commas between (10,20,30,40,50)",
        "dtype": "float32, bfloat16, float16 or auto, the model's own (float32). Faster in the others, but an answer"
        " then depends on what else is in its batch",
        "base_model": "the base of an adapter, where its config doesn't name the right one",
    },
    int: {
        "limit": "take this many examples of each set, the first ones",
        "no_repeat_ngram_size": "no sequence of this many tokens twice, as in the papers' scripts; 0 allows it (6)",
        "max_prompt_length": "tokens of a prompt; of a longer one the first are taken, as in the papers (256)",
        "max_length": "tokens; an answer has room for max_length - max_prompt_length of them (512)",
        "batch_size": "answers at a time, of each process; in float32 it changes no answer (16)",
    },
    float: {
        "temperature": "temperature of the sampling (1.0)",
        "top_p": "probability that the sampled tokens share, most probable first (1.0)",
    },
    bool: {"greedy_only": "answer greedily alone, without sampling", "load_in_4bit": "quantize the model to NF4"},
}


def add_arguments(parser: ArgumentParser) -> None:
    """Tells the parser what the command takes."""
    for kind, options in OPTIONS.items():
        taken: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": kind, "metavar": ""}
        for name, meaning in options.items():
            parser.add_argument(f"--{name}", default=SUPPRESS, help=meaning, **taken)


def settings_of(given: dict[str, Any]) -> EvaluationSettings:
    """
    Makes the settings of an evaluation of what a command line says.

    Raises:
        UserError: For anything that is wrong with it.
    """
    from ..evaluation.protocol import EvaluationSettings
    from ..evaluation.sets import HUB_SETS, parse_sets

    for name, what in (("model", "a folder or a name"), ("output_dir", "a folder for the answers and scores")):
        if name not in given:
            raise UserError(f"--{name} is not set: name {what}")
    given["output_dir"] = Path(given["output_dir"])
    if "chat_template_kwargs" in given:
        given["chat_template_kwargs"] = _mapping("--chat_template_kwargs", given["chat_template_kwargs"])
    given["sets"] = parse_sets(given.get("sets", ",".join(HUB_SETS)))
    if "in_distribution" in given:
        given["in_distribution"] = tuple(given["in_distribution"].replace(",", " ").split())
        missing = [name for name in given["in_distribution"] if name not in given["sets"]]
        if missing:
            raise UserError(f"--in_distribution has {missing[0]!r}, which isn't one of --sets: add it there")
    if given.pop("greedy_only", False):
        if "seeds" in given:
            raise UserError("--greedy_only and --seeds: leave one of them out")
        given["seeds"] = ""
    if "seeds" in given:
        words = given["seeds"].replace(",", " ").split()
        wrong = [word for word in words if not word.isdecimal()]
        if wrong:
            raise UserError(f"--seeds has {wrong[0]!r}: give whole numbers with commas between, such as 10,20,30")
        given["seeds"] = tuple(map(int, words))
    if "prompt_style" not in given:
        given |= _as_trained(Path(given["model"]))
    return EvaluationSettings(**given)


def _as_trained(folder: Path) -> dict[str, Any]:
    """Takes over the chat template of a run whose student saw it in training, and what it was told."""
    from ..training.run_folder import RESULT_NAME

    template, tokenizer = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if not (folder / RESULT_NAME).is_file() or not (
        template.is_file() or (tokenizer.is_file() and '"chat_template"' in tokenizer.read_text(encoding="utf-8"))
    ):
        return {}
    settings = json.loads((folder / RESULT_NAME).read_text(encoding="utf-8")).get("settings", {})
    if settings.get("prompt_style") != "chat":
        return {}
    return {"prompt_style": "chat", "chat_template_kwargs": settings.get("chat_template_kwargs")}


def _mapping(option: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{option} {text!r} isn't a JSON object: write one, such as '{{\"enable_thinking\": false}}'")
    return found


def run(given: Namespace) -> int:
    """Evaluates a model and prints the table at the end."""
    settings = settings_of(vars(given))

    from ..evaluation.protocol import SETTINGS_NAME, evaluate
    from ..utils.environment import in_words

    try:
        scores = evaluate(settings)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    if scores:
        folder = settings.output_dir
        about = json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))
        print(f"\n{(folder / 'table.md').read_text(encoding='utf-8')}")
        print(f"{in_words(about['hardware'])}; {sum(about['seconds'].values()):,.0f} seconds")
        for name in ("table.md", "scores.json", "answers"):
            print(folder / name)
    return 0
