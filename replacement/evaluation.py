"""How good dictionaries are: reconstruction per layer, and what a language model loses when its MLPs are replaced by
them.

Every figure is a sum over a stream, kept in float64, so the size of the evaluation set is not bound by memory. Knows
models only as functions from tokens to logits, and dictionaries only by their contract.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from replacement.dictionary import Dictionary
from replacement.errors import InputError

LogitFunction = Callable[[Int[Tensor, "batch pos"]], Float[Tensor, "batch pos vocab"]]


class LayerFigures(NamedTuple):
    """Reconstruction by one layer's dictionary over an evaluation set."""

    layer: int
    n_features: int
    fvu: float  #: `sum |y - y'|^2 / sum |y - mean y|^2`, the mean over the whole set
    l0: float  #: features that are not zero at a token, on average
    dead: float  #: share of features that fire at no token of the set
    tokens: int  #: size of the set


class ReplacementFigures(NamedTuple):
    """The replaced model against the original, averaged over the chosen tokens."""

    top1: float  #: share of tokens where both models' most likely next token is the same
    kl: float  #: `KL(original || replaced)` in nats
    ce_original: float  #: cross-entropy of the true next token under the original, nats
    ce_replaced: float  #: the same under the replaced model
    ce_ablated: float  #: the same with every MLP writing zero
    ce_recovered: float  #: `(ce_ablated - ce_replaced) / (ce_ablated - ce_original)`
    tokens: int  #: number of tokens averaged over


class ReconstructionMeter:
    """Streams one layer's FVU, L0 and dead fraction."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        self.fired = torch.zeros(dictionary.n_features, dtype=torch.long)  #: tokens at which each feature fired
        self._error = self._square = 0.0
        self._sum = torch.zeros(dictionary.d_out, dtype=torch.float64)
        self._tokens = 0

    @torch.no_grad()
    def update(self, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"]) -> None:
        """Take in one batch: the dictionary's input and what it should write at its own layer."""
        activations = self.dictionary.encode(x)
        approximation = (
            self.dictionary.decode(activations, self.dictionary.layer) + self.dictionary.b_dec + self.dictionary.skip(x)
        )
        self.fired += (activations != 0).sum(0)
        wide = y.double()
        self._error += (wide - approximation).square().sum().item()
        self._square += wide.square().sum().item()
        self._sum += wide.sum(0)
        self._tokens += len(x)

    def figures(self) -> LayerFigures:
        """Figures over everything taken in so far; raises `InputError` when that is nothing."""
        if not self._tokens:
            raise InputError(
                "ReconstructionMeter.figures(): got no tokens, needs at least one batch; call update first"
            )
        variance = self._square - self._sum.square().sum().item() / self._tokens
        return LayerFigures(
            layer=self.dictionary.layer,
            n_features=self.dictionary.n_features,
            fvu=self._error / variance if variance > 0 else float("nan"),
            l0=self.fired.sum().item() / self._tokens,
            dead=(self.fired == 0).double().mean().item(),
            tokens=self._tokens,
        )


def evaluate_reconstruction(
    dictionaries: Iterable[Dictionary], batches: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]]
) -> list[LayerFigures]:
    """FVU, L0 and dead fraction of each dictionary, over the same tokens.

    `FVU = sum |y - y'|^2 / sum |y - mean y|^2`; `L0 = E #(a != 0)`; dead: no fire in the whole set.

    dictionaries: any number, each writing its own layer. batches: pairs of MLP inputs and MLP outputs, `[layers,
    tokens, width]` or a list with one tensor a layer, indexed by layer. Raises `InputError` for an empty stream.
    """
    meters = [ReconstructionMeter(dictionary) for dictionary in dictionaries]
    for inputs, outputs in batches:
        for meter in meters:
            meter.update(inputs[meter.dictionary.layer], outputs[meter.dictionary.layer])
    return [meter.figures() for meter in meters]


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
        self._sums += torch.stack([agree.double(), divergence, *losses])
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
