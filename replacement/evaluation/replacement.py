"""What a language model loses when sites are replaced by what dictionaries write there.

Sums over a stream, kept in float64. Knows models only as functions from tokens to logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from replacement.errors import InputError

LogitFunction = Callable[[Int[Tensor, "batch pos"]], Float[Tensor, "batch pos vocab"]]


class ReplacementFigures(NamedTuple):
    """The replaced model against the original, averaged over the chosen tokens."""

    top1: float  #: share of tokens where both models' most likely next token is the same
    kl: float  #: `KL(original || replaced)` in nats
    ce_original: float  #: cross-entropy of the true next token under the original, nats
    ce_replaced: float  #: the same under the replaced model
    ce_ablated: float  #: the same with every MLP writing zero
    ce_recovered: float  #: `(ce_ablated - ce_replaced) / (ce_ablated - ce_original)`
    tokens: int  #: number of tokens averaged over


class ReplacementMeter:
    """Streams the comparison of two models, and of the original with all MLPs ablated."""

    def __init__(self) -> None:
        self._sums = torch.zeros(5, dtype=torch.float64)
        self._tokens = 0

    @torch.no_grad()
    def update(
        self,
        original: Float[Tensor, "tokens vocab"],
        replaced: Float[Tensor, "tokens vocab"],
        ablated: Float[Tensor, "tokens vocab"],
        targets: Int[Tensor, " tokens"],
    ) -> None:
        """Take in three models' logits at the same tokens, with the true next tokens."""
        logs = [logits.double().log_softmax(-1) for logits in (original, replaced, ablated)]
        agree = (original.argmax(-1) == replaced.argmax(-1)).sum()
        divergence = F.kl_div(logs[1], logs[0], log_target=True, reduction="sum")
        losses = [F.nll_loss(log, targets, reduction="sum") for log in logs]
        self._sums += torch.stack([agree.double(), divergence, *losses]).cpu()
        self._tokens += len(targets)

    def figures(self) -> ReplacementFigures:
        """Averages over everything taken in so far; raises `InputError` when that is nothing."""
        if not self._tokens:
            raise InputError("ReplacementMeter.figures(): got no tokens, needs at least one; check the mask of tokens")
        top1, kl, clean, replaced, ablated = (self._sums / self._tokens).tolist()
        recovered = (ablated - replaced) / (ablated - clean) if ablated != clean else float("nan")
        return ReplacementFigures(top1, kl, clean, replaced, ablated, recovered, self._tokens)


def evaluate_replacement(
    original: LogitFunction,
    replaced: LogitFunction,
    ablated: LogitFunction,
    batches: Iterable[tuple[Int[Tensor, "batch pos+1"], Bool[Tensor, "batch pos+1"]]],
) -> dict[str, ReplacementFigures]:
    """Compare the replaced model with the original, on all tokens ("all") and on marked ones ("answer").

    original, replaced, ablated: the model, the model with its MLPs replaced and no error terms, the model with all
    MLPs writing zero. batches: documents with one token more than is read, and a mask of the tokens that count as
    answers (as targets). Raises `InputError` for an empty stream.
    """
    everything, answers = ReplacementMeter(), ReplacementMeter()
    for tokens, answer in batches:
        read, targets, marked = tokens[:, :-1], tokens[:, 1:].flatten(), answer[:, 1:].flatten()
        clean, ours, none = (model(read).flatten(0, 1) for model in (original, replaced, ablated))
        everything.update(clean, ours, none, targets)
        answers.update(clean[marked], ours[marked], none[marked], targets[marked])
    return {"all": everything.figures(), "answer": answers.figures()}
