"""How far two models' answers to the same prompts are apart, and how far they may be.

    relative difference   max |p - q| / max |p|        p, q: logits of the two models
    KL divergence         sum softmax(p) (log softmax(p) - log softmax(q)), mean over positions
    top-1 agreement       share of positions with the same likeliest token

A merge in float32 only reorders sums, so it must agree to rounding.  Weights
stored in 16 bits are rounded once more, to 8 (bfloat16) or 11 (float16) bits,
which moves logits by a known order of magnitude; the limits below say which.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorakeet.base.units import to_percent
from lorakeet.export.fresh import Outputs

TIE = 1e-6  # of the logit scale: the rounding of a float32 sum decides such a pair by chance


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """What still counts as equal.

    Args:
        max_relative_difference: of logits, as a fraction of the largest logit.
        max_mean_kl: nats a position.
        min_top1_agreement: share of positions, 0 to 1.  Two tokens whose logits
            differ by less than a millionth of the scale are a tie and agree.
        same_greedy_text: whether greedy continuations must be the same, letter by letter.
    """

    max_relative_difference: float
    max_mean_kl: float
    min_top1_agreement: float
    same_greedy_text: bool


TOLERANCES = {
    torch.float32: Tolerances(
        max_relative_difference=1e-3, max_mean_kl=1e-5, min_top1_agreement=1.0,
        same_greedy_text=True,
    ),
    torch.float16: Tolerances(
        max_relative_difference=1e-2, max_mean_kl=1e-3, min_top1_agreement=0.98,
        same_greedy_text=False,
    ),
    torch.bfloat16: Tolerances(
        max_relative_difference=8e-2, max_mean_kl=1e-2, min_top1_agreement=0.95,
        same_greedy_text=False,
    ),
}  # fmt: skip


def compare_outputs(expected: Outputs, found: Outputs) -> dict[str, float | bool | int]:
    """The figures of a proof.

    Args:
        expected: base + adapter, in memory.
        found: the merged files, in a fresh process.

    Returns:
        figures by name; differences are infinite where shapes do not even agree.
    """
    same_prompts = expected.prompts == found.prompts
    shapes = [[tuple(one.shape) for one in side.logits] for side in (expected, found)]
    if not same_prompts or shapes[0] != shapes[1]:
        return {"same_prompts": same_prompts, "same_shapes": shapes[0] == shapes[1]}
    p = torch.cat([one.double() for one in expected.logits])
    q = torch.cat([one.double() for one in found.logits])
    scale = float(p.abs().max().clamp_min(1e-12))
    difference = (p - q).abs()
    log_p, log_q = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    gap = p.max(-1).values - p.gather(-1, q.argmax(-1, keepdim=True)).squeeze(-1)
    return {
        "same_prompts": True,
        "same_shapes": True,
        "num_positions": int(p.shape[0]),
        "logit_scale": scale,
        "max_logit_difference": float(difference.max()),
        "mean_logit_difference": float(difference.mean()),
        "max_relative_difference": float(difference.max()) / scale,
        "mean_kl": max(0.0, float(kl.mean())),
        "top1_agreement": float((gap <= TIE * scale).double().mean()),
        "same_greedy_text": expected.texts == found.texts,
    }


def find_problems(figures: dict[str, float | bool | int], limits: Tolerances) -> list[str]:
    """Every figure outside its tolerance as a sentence; empty when the proof holds.

    NaN is outside every tolerance.
    """
    if not figures["same_prompts"]:
        return ["the written tokenizer makes other tokens of the same text"]
    if not figures["same_shapes"]:
        return ["the logits have another shape, so the vocabularies differ"]
    problems = []
    relative = figures["max_relative_difference"]
    if not relative <= limits.max_relative_difference:
        problems.append(
            f"logits differ by {relative:.2g} of their scale, allowed are "
            f"{limits.max_relative_difference:.2g}"
        )
    if not figures["mean_kl"] <= limits.max_mean_kl:
        problems.append(
            f"mean KL is {figures['mean_kl']:.2g} nats, allowed are {limits.max_mean_kl:.2g}"
        )
    agreement = figures["top1_agreement"]
    if not agreement >= limits.min_top1_agreement:
        problems.append(
            f"the likeliest token agrees at {to_percent(agreement)} of "
            f"{figures['num_positions']} positions, needed are "
            f"{to_percent(limits.min_top1_agreement)}"
        )
    if limits.same_greedy_text and not figures["same_greedy_text"]:
        problems.append("greedy answers differ")
    return problems
