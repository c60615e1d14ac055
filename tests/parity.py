"""
Checks hf_dskd in its as-published mode against golden values of the published code.

    python tests/parity.py DIR [--only SUBSTRING]

`DIR` holds `cases.json` and one `<case>.safetensors` a case. Prints a line a case with the worst relative difference
‖a − b‖ / ‖b‖ over losses and gradients; exits 1 if one is above 1e-4.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace


TOLERANCE = 1e-4


DIVERGENCE_NAMES = {"js_divergence": "js"}  # every other name is the same here and there
# The published name of a criterion → (method, alignment) here.
CRITERIA = {
    "dual_space_kd": "identity",
    "dual_space_kd_with_cma": "cross_model_attention",
    "dual_space_kd_with_cma_plus_kq_matching": "cross_model_attention",
    "dual_space_kd_with_cla": "chunk_attention",
    "dual_space_kd_with_clp": "chunk_mean",
}
CRITICS = {
    "gan": {"highway": "kq_highway1", "linear1": "kq_linear1", "linear2": "kq_linear2"},
    "ct": {
        "critic1.highway": "kq_highway1",
        "critic1.linear1": "kq_linear3",
        "critic1.linear2": "kq_linear4",
        "navigator1.linear1": "kq_linear5",
        "navigator1.linear2": "kq_linear6",
        "critic2.highway": "kq_highway2",
        "critic2.linear1": "kq_linear7",
        "critic2.linear2": "kq_linear8",
        "navigator2.linear1": "kq_linear9",
        "navigator2.linear2": "kq_linear10",
    },
}


def relative_difference(actual, expected) -> float:
    import torch

    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    if actual.shape != expected.shape:
        return float("inf")
    scale = expected.norm().item()
    difference = (actual - expected).norm().item()
    return difference / scale if scale > 0 else difference


def run_case(case: dict, tensors: dict) -> tuple[dict, dict]:
    """Losses (by the published names) and gradients (by the file's names) as hf_dskd computes them."""
    import torch
    import torch.nn.functional as F

    from hf_dskd.losses.divergences import divergence_function
    from hf_dskd.losses.logits import rows_at_places, shared_prefix_kd, uld
    from hf_dskd.losses.temperature import Temperatures, with_temperature

    hidden = tensors["student_hidden"].clone().requires_grad_()
    student, teacher = states(tensors, "student", hidden), states(tensors, "teacher")
    student_logits = student.head(student.packed(student.hidden))
    nll = F.cross_entropy(student_logits, student.packed(student.targets), reduction="sum")
    losses = {
        "nll_loss": nll,
        "accuracy": (student_logits.argmax(-1) == student.packed(student.targets)).sum(),
    }
    parameters: dict[str, torch.Tensor] = {"student_hidden": hidden}
    name = DIVERGENCE_NAMES.get(case["divergence"], case["divergence"])
    divergence = with_temperature(
        divergence_function(name, SimpleNamespace(js_weight=0.5, **case)),
        Temperatures(case["kd_temperature"], case["kd_temperature"] * case["teacher_temperature"]),
    )

    criterion, rate = case["criterion"], case["kd_rate"]
    if criterion == "cross_entropy":
        loss = nll
    elif criterion in CRITERIA:
        loss = dual_space_loss(case, tensors, student, teacher, divergence, losses, parameters)
        loss = loss + (1 - rate) * nll
    else:
        # Both are one response: the i-th token with the i-th.
        places = [(mask.cumsum(1) - 1).masked_fill(~mask, -1) for mask in (student.mask, teacher.mask)]
        rows = rows_at_places(*places, student.mask, teacher.mask)
        logits = student_logits[rows >= 0], teacher.head(teacher.packed(teacher.hidden))[rows[rows >= 0]]
        if criterion == "universal_logit_distillation":
            losses["uld_loss"] = kd = uld(*logits).sum()
        else:
            assert criterion == "various_divergence"
            losses["kd_loss"] = kd = shared_prefix_kd(*logits, divergence).sum()
        loss = (1 - rate) * nll + rate * kd
    losses["loss"] = loss / case["loss_denominator"]

    names = list(parameters)
    gradients = torch.autograd.grad(losses["loss"], [parameters[name] for name in names], allow_unused=True)
    return (
        {key: value.detach() for key, value in losses.items()},
        {name: gradient for name, gradient in zip(names, gradients) if gradient is not None},
    )


def states(tensors: dict, side: str, hidden=None):
    """One model's view of a case; chunks are those of the input tokens, from their end characters."""
    import torch

    from hf_dskd.alignment.spans import chunk_ids
    from hf_dskd.models.causal_lm import LMHead
    from hf_dskd.training.published import published_states

    chunks = None
    if "student_char_end" in tensors:
        chunks = torch.full_like(tensors[f"{side}_labels"], -1)
        masks = {name: tensors[f"{name}_labels"] != -100 for name in ("student", "teacher")}
        for i in range(len(chunks)):
            # The first row's input is the prompt's last token, a chunk of its own; the response counts from 0 again.
            ends = [tensors[f"{name}_char_end"][i, masks[name][i]].tolist()[1:] for name in ("student", "teacher")]
            ids = dict(zip(("student", "teacher"), chunk_ids(*ends, False, False)))
            chunks[i, masks[side][i]] = torch.tensor([0, *(chunk + 1 for chunk in ids[side])], dtype=chunks.dtype)
    return published_states(
        tensors[f"{side}_hidden"] if hidden is None else hidden,
        tensors[f"{side}_input_ids"],
        tensors[f"{side}_labels"],
        tensors[f"{side}_embedding"],
        chunks,
        head=LMHead(tensors[f"{side}_lm_head"]),
    )


def dual_space_loss(case, tensors, student, teacher, divergence, losses, parameters):
    """The weighted distillation and matching terms; fills `losses` and `parameters`."""
    from hf_dskd.losses.conditional_transport import TransportCritics
    from hf_dskd.losses.divergences import forward_kl
    from hf_dskd.losses.dual_space import dual_space_terms, queries_and_keys
    from hf_dskd.losses.key_query import Discriminator
    from hf_dskd.losses.projectors import Projectors
    from hf_dskd.losses.temperature import Temperatures, with_temperature
    from hf_dskd.methods import ALIGNMENTS
    from hf_dskd.training.published import published_matching_term

    alignment, matching, tau = CRITERIA[case["criterion"]], case["matching"], case["kd_temperature"]
    saved = {key: value for key, value in tensors.items() if key.startswith("projector.")}
    projectors = Projectors(
        student.hidden.shape[-1], teacher.hidden.shape[-1], has_query="projector.query.0.weight" in saved
    )
    projectors.load_state_dict(
        {key.removeprefix("projector.").replace(".0.", "."): value for key, value in saved.items()}
    )
    for key, parameter in projectors.named_parameters():
        module, part = key.split(".")
        parameters[f"projector.{module}.0.{part}"] = parameter
    queries = keys = None
    if alignment in ("cross_model_attention", "chunk_attention"):
        queries, keys = queries_and_keys(student, teacher, projectors)
    _, terms, *_ = dual_space_terms(
        student,
        teacher,
        ALIGNMENTS[alignment].load()(student, teacher, queries, keys),
        projectors,
        student_space_divergence=divergence,
        # The released code has forward KL in teacher space, whatever the divergence is called.
        teacher_space_divergence=with_temperature(forward_kl, Temperatures(tau, tau)),
        teacher_value="state" if alignment == "identity" else "state_and_target",
        # It masks nothing where the vocabulary is one.
        correctness_mask=alignment != "identity",
    )
    sums = {key: value.sum() for key, value in terms.items()}
    losses |= {f"{key}_loss": sums[key] for key in ("t2s_ce", "t2s_kd", "s2t_kd")}
    losses["t2s_acc"] = sums["t2s_correct"]
    losses["kd_loss"] = kd = sums["t2s_ce"] + sums["t2s_kd"] + sums["s2t_kd"]
    loss = case["kd_rate"] * kd
    if matching is not None:
        hidden_size = tensors["critic.kq_linear1.weight"].shape[0]
        kind = {"gan": Discriminator, "ct": TransportCritics}[matching]
        critic = kind(keys.shape[-1], hidden_size, dropout=0.0)
        names = {f"{ours}.": f"critic.{theirs}." for ours, theirs in CRITICS[matching].items()}
        theirs = {}
        for key in critic.state_dict():
            module = max((module for module in names if key.startswith(module)), key=len)
            theirs[key] = names[module] + key.removeprefix(module)
        critic.load_state_dict({key: tensors[name] for key, name in theirs.items()})
        parameters |= {theirs[key]: parameter for key, parameter in critic.named_parameters()}
        losses["kq_loss"] = published_matching_term(critic, queries, keys, 0)
        loss = loss + case["kq_rate"] * losses["kq_loss"]
    return loss


def compare(case: dict, tensors: dict) -> tuple[float, str]:
    """The worst relative difference of a case, and of what."""
    losses, gradients = run_case(case, tensors)
    differences = {
        name: relative_difference(value, case["expected"][name])
        for name, value in losses.items()
        if name in case["expected"]
    }
    for name, expected in tensors.items():
        if name.startswith("grad."):
            actual = gradients.get(name.removeprefix("grad."))
            if actual is None:
                differences[name] = 0.0 if expected.abs().max() == 0 else float("inf")
            else:
                differences[name] = relative_difference(actual, expected)
    worst = max(differences, key=differences.__getitem__)
    return differences[worst], f"{worst}, {len(differences)} numbers compared"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases whose name contains this")
    options = parser.parse_args(arguments)

    from safetensors.torch import load_file

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    listing = options.folder / "cases.json"
    if not listing.is_file():
        print(f"error: {listing} isn't there: name a folder with cases.json", file=sys.stderr)
        return 2
    cases = [case for case in json.loads(listing.read_text()) if options.only in case["case"]]
    if not cases:
        print(f"error: no case of {listing} contains {options.only!r}", file=sys.stderr)
        return 2
    failed = 0
    for case in cases:
        difference, what = compare(case, load_file(options.folder / f"{case['case']}.safetensors"))
        ok = difference <= TOLERANCE
        failed += not ok
        print(f"{'ok  ' if ok else 'FAIL'}  {difference:.1e}  {case['case']} (worst: {what})")
    print(f"{len(cases) - failed} of {len(cases)} cases within {TOLERANCE:g}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
