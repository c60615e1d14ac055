"""
Checks hf_dskd in its as-published mode against golden values of the published code.

    python tests/parity.py DIR [--only SUBSTRING]

`DIR` holds `cases.json` and one `<case>.safetensors` a case. Prints a line a case with the worst relative difference
‖a − b‖ / ‖b‖ over losses and gradients; exits 1 if one is above 1e-4 or a case can't be run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


TOLERANCE = 1e-4


class NotBuiltError(Exception):
    """The criterion of a case has no counterpart in hf_dskd yet."""


DIVERGENCE_NAMES = {"js_divergence": "js"}  # every other name is the same here and there


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

    from hf_dskd.losses.divergences import divergence_function, forward_kl
    from hf_dskd.losses.dual_space import dual_space_terms, published_states, queries_and_keys, token_cross_entropy
    from hf_dskd.losses.key_query import Discriminator, published_key_query_loss
    from hf_dskd.models import LMHead
    from hf_dskd.projectors import Projectors

    criterion, matching = case["criterion"], case["matching"]
    built = ("cross_entropy", "dual_space_kd_with_cma", "dual_space_kd_with_cma_plus_kq_matching")
    if criterion not in built or matching not in (None, "gan"):
        raise NotBuiltError(f"criterion {criterion!r}" + (f" with matching {matching!r}" if matching else ""))

    hidden = tensors["student_hidden"].clone().requires_grad_()
    student = published_states(
        hidden, tensors["student_input_ids"], tensors["student_labels"], tensors["student_embedding"]
    )
    student_head = LMHead(tensors["student_lm_head"])
    student_logits = student_head(student.packed(student.hidden))
    nll = token_cross_entropy(student, student_logits).sum()
    losses = {
        "nll_loss": nll,
        "accuracy": (student_logits.argmax(-1) == student.packed(student.targets)).sum(),
    }
    parameters: dict[str, torch.Tensor] = {"student_hidden": hidden}

    if criterion == "cross_entropy":
        losses["loss"] = nll / case["loss_denominator"]
    else:
        teacher = published_states(
            tensors["teacher_hidden"],
            tensors["teacher_input_ids"],
            tensors["teacher_labels"],
            tensors["teacher_embedding"],
        )
        projectors = Projectors(hidden.shape[-1], tensors["teacher_hidden"].shape[-1])
        projectors.load_state_dict(
            {
                f"{name}.{part}": tensors[f"projector.{name}.0.{part}"]
                for name in ("query", "s2t", "t2s")
                for part in ("weight", "bias")
            }
        )
        for name, parameter in projectors.named_parameters():
            module, part = name.split(".")
            parameters[f"projector.{module}.0.{part}"] = parameter
        queries, keys = queries_and_keys(student, teacher, projectors)
        name = DIVERGENCE_NAMES.get(case["divergence"], case["divergence"])
        if case["teacher_temperature"] != 1.0:
            raise NotBuiltError(f"teacher_temperature {case['teacher_temperature']}")
        terms = dual_space_terms(
            student,
            teacher,
            queries,
            keys,
            projectors,
            student_head,
            LMHead(tensors["teacher_lm_head"]),
            student_logits=student_logits,
            student_space_divergence=divergence_function(
                name, skew_lambda=case["skew_lambda"], adaptive_kl_alpha=case["adaptive_kl_alpha"]
            ),
            # The released code has forward KL in teacher space, whatever the divergence is called.
            teacher_space_divergence=forward_kl,
            temperature=case["kd_temperature"],
        )
        sums = {key: value.sum() for key, value in terms.items()}
        losses["t2s_ce_loss"] = sums["t2s_ce"]
        losses["t2s_kd_loss"] = sums["t2s_kd"]
        losses["s2t_kd_loss"] = sums["s2t_kd"]
        losses["t2s_acc"] = sums["t2s_correct"]
        losses["kd_loss"] = kd = sums["t2s_ce"] + sums["t2s_kd"] + sums["s2t_kd"]
        loss = (1 - case["kd_rate"]) * nll + case["kd_rate"] * kd
        if matching == "gan":
            discriminator = Discriminator(
                keys.shape[-1], tensors["critic.kq_linear1.weight"].shape[0], dropout=0.0
            ).train()
            discriminator.load_state_dict(
                {
                    f"{ours}.{part}": tensors[f"critic.kq_{theirs}.{part}"]
                    for ours, theirs in (("highway", "highway1"), ("linear1", "linear1"), ("linear2", "linear2"))
                    for part in ("weight", "bias")
                }
            )
            for key, parameter in discriminator.named_parameters():
                module, part = key.split(".")
                parameters[f"critic.kq_{'highway1' if module == 'highway' else module}.{part}"] = parameter
            losses["kq_loss"] = published_key_query_loss(discriminator, queries, keys, (None, None))
            loss = loss + case["kq_rate"] * losses["kq_loss"]
        losses["loss"] = loss / case["loss_denominator"]

    names = list(parameters)
    gradients = torch.autograd.grad(losses["loss"], [parameters[name] for name in names], allow_unused=True)
    return (
        {key: value.detach() for key, value in losses.items()},
        {name: gradient for name, gradient in zip(names, gradients) if gradient is not None},
    )


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
        try:
            difference, what = compare(case, load_file(options.folder / f"{case['case']}.safetensors"))
        except NotBuiltError as error:
            print(f"NOT BUILT  {case['case']}: {error}")
            failed += 1
            continue
        ok = difference <= TOLERANCE
        failed += not ok
        print(f"{'ok  ' if ok else 'FAIL'}  {difference:.1e}  {case['case']} (worst: {what})")
    print(f"{len(cases) - failed} of {len(cases)} cases within {TOLERANCE:g}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
