"""Numbers as people read them, and what the measures and the numbers of the analyses are called and mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..losses.terms import TERMS


_OF_ANSWERS = {
    "bits_per_byte": ("bits per byte", "lower"),
    "rouge_l": ("ROUGE-L of generated answers, percent", "higher"),
    "exact_match": ("exact match of generated answers, percent", "higher"),
    "unfinished": ("share of them that ran into the maximum length", "lower"),
}
# Number of an analysis → what it means.
MEANINGS = {
    "aligned_rate": "tokens that have a partner",
    "chunk_mass": "attention on the tokens of the same bytes; 1 is all of it",
    "chunk_mass_uniform": "what uniform attention would have there",
    "argmax_in_chunk": "share of tokens whose strongest partner is one of them",
    "monotonicity": "1: partners come in the order of the text; 0: in no order; −1: backwards",
    "entropy": "nats; 0: one partner each",
    "entropy_normalised": "1: uniform attention; 0: one partner each",
    "attention_distance_bytes": "bytes between a token and what it attends to; lower is nearer",
    "attention_distance_bytes_uniform": "what uniform attention would have",
    "prior_kl": "nats from the chunk prior to the attention; 0: they are equal",
    "t2s_accuracy": "tokens that the projected teacher predicts rightly",
    "s2t_accuracy": "tokens that the projected student predicts rightly",
    "s2t_agreement": "tokens for which projected student and teacher predict the same",
    "t2s_ce_loss": "cross entropy of the projected teacher, in nats",
    "mmd": "squared discrepancy of queries and keys; 0: the same distribution",
    "mmd_p_value": "small: queries and keys do differ",
    "sliced_wasserstein": "distance of queries and keys; 0: the same distribution",
    "mean_gap": "between the means of queries and keys, per dimension; 0: none",
    "variance_gap": "between their variances, per dimension; 0: none",
    "mean_cosine": "cosine of the two means; 1: the same direction",
    "linear_probe_auc": "a linear probe that tells queries from keys; 0.5: it can't, 1: always",
    "discriminator_auc": "the run's own discriminator doing so; 0.5: it can't, 1: always",
}
# Start of a number's name → what is different in it.
PROBES = {
    "probe_clp_": "with the mean of the chunk instead",
    "probe_cla_": "with attention inside the chunk instead",
    "s2t_": "from the teacher's tokens to the student's",
}


def number(value: Any) -> str:
    """Writes a number or a setting for people."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if (value.is_integer() and abs(value) < 1e6) or abs(value) >= 1e4:
            return f"{value:,.0f}".replace("-", "−")
        return f"{value:.4g}".replace("-", "−")
    return str(value)


def setting(value: Any) -> str:
    """Writes a setting as it would be given on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def percent(value: float, decimals: int = 1) -> str:
    """Writes a share in percent."""
    return f"{100 * value:.{decimals}f} %"


def measured(value: float | None) -> str:
    """Writes a measure, with the same decimals for all that are as large."""
    return "–" if value is None else (f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}").replace("-", "−")


def difference(before: float, after: float) -> str:
    """Writes the change of a number, with its sign."""
    change = after - before
    return f"{'+' if change > 0 else ''}{number(change)}"


def duration(seconds: float) -> str:
    """Writes seconds as minutes, or as hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"


def millions(count: float) -> str:
    """Writes a number of parameters."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def _measures() -> dict[str, tuple[str, str | None]]:
    """End of a key among the metrics → title and which end is better."""
    terms = {term.evaluated: (term.title, term.better) for term in TERMS.values() if term.better is not None}
    return {**_OF_ANSWERS, **terms, "loss": ("method's own loss", None)}


def _parse_measure(key: str) -> tuple[str, str] | None:
    """Name of the evaluation set (`""` for a single one) and of the measure, of a key among the metrics."""
    rest, measures = f"_{key.removeprefix('eval_')}", _measures()
    for name in sorted({*measures, *(term.evaluated for term in TERMS.values())}, key=len, reverse=True):
        if key.startswith("eval_") and rest.endswith(f"_{name}"):
            return (rest.removesuffix(f"_{name}").strip("_"), name) if name in measures else None
    return None


def title_of(key: str) -> str:
    """Finds the title of a key among the metrics, with its evaluation set; the key itself where it is no measure."""
    parsed = _parse_measure(key)
    if parsed is None:
        return key
    title = _measures()[parsed[1]][0]
    return f"{title} ({parsed[0]})" if parsed[0] else title


def better_end(key: str) -> str | None:
    """Tells which end of a measure is better, `"lower"` or `"higher"`; `None` where neither is."""
    parsed = _parse_measure(key)
    return _measures()[parsed[1]][1] if parsed else None


def measures_of(*metrics: Mapping[str, Any]) -> list[str]:
    """Finds the keys of metrics that are a measure, those of the text and of answers first."""
    order = list(_measures())
    found = {key: parsed for part in metrics for key in part if (parsed := _parse_measure(key))}
    return sorted(found, key=lambda key: (order.index(found[key][1]), found[key][0]))


def numbers_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Picks the numbers of an analysis that aren't gradients: known ones first."""
    own = {key: value for key, value in entry.items() if key != "step" and not key.startswith("gradient_norm_")}
    order = list(MEANINGS)
    return dict(sorted(own.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def meaning_of(name: str) -> str:
    """Says what a number of an analysis means, also one with the prefix of a direction or of a probe."""
    if name in MEANINGS:
        return MEANINGS[name]
    for prefix, words in PROBES.items():
        if name.startswith(prefix) and (meaning := meaning_of(name.removeprefix(prefix))):
            return f"{meaning} ({words})"
    return ""
