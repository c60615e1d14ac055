"""The scores of an evaluation as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..utils.tables import markdown_table


AVERAGES = {"in_distribution": "in distribution", "out_of_distribution": "out of distribution", "all": "all sets"}


def table(scores: Mapping[str, Any]) -> str:
    """Writes the content of `scores.json` as Markdown: a row for each set, then averages where there are several."""
    sets, settings = scores["sets"], scores["settings"]
    averages = scores["averages"] if len(sets) > 1 else {}
    rows = {**sets, **{f"*{AVERAGES[group]}*": part for group, part in averages.items()}}
    seeds = settings["seeds"]
    sampled = f"{len(seeds)} seeds" if len(seeds) > 1 else "sampled"
    columns = {"examples": [str(part["examples"]) if "examples" in part else "–" for part in rows.values()]}
    for name, title in (("rouge_l", "ROUGE-L"), ("exact_match", "exact match")):
        for kind, how in (("greedy", "greedy"), ("sampled", sampled)):
            if kind in next(iter(rows.values())):
                columns[f"{title}, {how}"] = [_score(part[kind], name) for part in rows.values()]
    columns["bits per byte"] = [_number(part["bits_per_byte"], 4) for part in rows.values()]
    columns["token accuracy"] = [_number(part["token_accuracy"], 2) for part in rows.values()]
    counts = {
        "unfinished, greedy": [_unfinished(part, "greedy") for part in rows.values()],
        f"unfinished, {sampled}": [_unfinished(part, "sampled") for part in rows.values()],
    }
    for name in ("prompts_cut", "references_cut", "references_skipped"):
        counts[name.replace("_", " ")] = [str(part.get(name, "–")) for part in rows.values()]
    # The averages have none; what no set has is no column.
    columns |= {title: cells for title, cells in counts.items() if any(cell not in ("–", "0") for cell in cells)}
    caption = (
        "ROUGE-L, exact match and token accuracy in percent; ± sample standard deviation over decoding seeds, [95%"
        " interval] of a bootstrap over examples. Bits per byte and token accuracy of the references."
    )
    decoding = f"prompts: {settings['prompt_style']}, at most {settings['max_prompt_length']} tokens"
    decoding += f"; answers: at most {settings['max_length'] - settings['max_prompt_length']} tokens (unfinished ones"
    decoding += f" ran into that), no {settings['no_repeat_ngram_size']}-gram twice" * bool(
        settings["no_repeat_ngram_size"]
    )
    if seeds:
        decoding += f"; sampled with temperature {settings['temperature']:g}, top-p {settings['top_p']:g}, seeds"
        decoding += f" {', '.join(map(str, seeds))}"
    lines = [f"{scores['model']}, {settings['dtype']}{', 4-bit' if settings['load_in_4bit'] else ''}", "", caption, ""]
    return "\n".join([*lines, *markdown_table(list(rows), columns), "", f"Protocol: {decoding}."]) + "\n"


def _score(part: Mapping[str, Any], name: str) -> str:
    text = f"{part[name]:.2f}"
    if f"{name}_sd" in part:
        text += f" ± {part[f'{name}_sd']:.2f}"
    if f"{name}_interval" in part:
        low, high = part[f"{name}_interval"]
        text += f" [{low:.2f}, {high:.2f}]"
    return text


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _unfinished(part: Mapping[str, Any], kind: str) -> str:
    if "answers" not in part.get(kind, {}):
        return "–"
    return f"{part[kind]['unfinished']} of {part[kind]['answers']}" if part[kind]["unfinished"] else "0"
