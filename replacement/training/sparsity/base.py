"""What keeps features few: the contract of every sparsity, and the controller that brings penalties to a wanted L0.

A sparsity chooses which features fire, turns their pre-activations into activations with the gradients that its paper
gives them, adds its penalty, and says which activation function the finished dictionary has. Knows nothing of sites,
losses or optimisers.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from replacement.activation import Activation
from replacement.training.config import TrainingConfig
from replacement.training.parallel import Mesh
from replacement.training.schemes import Scheme
from replacement.training.sparse import ActiveSet, select_above

_SMALLEST = 1e-6  # what counts as above zero in the bfloat16 choice


@dataclass(frozen=True, eq=False)
class Encoder:
    """An encoder on scaled inputs, and what its features write."""

    W_enc: Float[Tensor, "rows d_in"]
    b_enc: Float[Tensor, " rows"]
    W_dec: Float[Tensor, "n_features n_writes d_out"]
    scheme: Scheme  #: how features are made of rows

    @cached_property
    def norms(self) -> Float[Tensor, " n_features"]:
        """Of the decoder rows, all written sites together."""
        return norms_of(self.W_dec)

    def above(self, x: Float[Tensor, "tokens d_in"], levels: Float[Tensor, " n_features"]) -> ActiveSet:
        """Features whose pre-activation is above their level."""
        return self.scheme.above(x, self.W_enc, self.b_enc, levels)

    def top(self, x: Float[Tensor, "tokens d_in"], k: int) -> ActiveSet:
        """The k features of each token with the largest pre-activations."""
        return self.scheme.top(x, self.W_enc, self.b_enc, k)

    def values(self, x: Float[Tensor, "tokens d_in"], active: ActiveSet) -> Float[Tensor, " entries"]:
        """Pre-activations of active features."""
        return self.scheme.values(x, self.W_enc, self.b_enc, active)

    def dense(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens n_features"]:
        """Pre-activations of all features at few tokens."""
        return self.scheme.dense(x, self.W_enc, self.b_enc)


def norms_of(W_dec: Float[Tensor, "n_features n_writes d_out"]) -> Float[Tensor, " n_features"]:
    """Norm of what a unit of each feature writes, all sites side by side as one vector.

    (Lindsey et al. 2024 weigh a crosscoder's features by the sum of their norms at each site, which favours those of
    few sites.)
    """
    return W_dec.flatten(1).norm(dim=1).clamp_min(1e-8)


class Exported(NamedTuple):
    """The same encoder for the finished dictionary."""

    factors: tuple[Float[Tensor, " rows"], ...]  #: what encoder rows are multiplied by, one after another
    b_enc: Float[Tensor, " rows"]
    activation: Activation
    unit_rows: bool = True  #: whether it is meant for decoder rows of norm 1, so that activations are what is written


class Sparsity(nn.Module, abc.ABC):
    """How features are kept few.

    Law: what the exported activation function gives on the exported encoder is what `activations` gave in training,
    times the norm of the feature's decoder row where rows are exported with norm 1; but for features so near to their
    threshold that the choice in bfloat16 (`select_above`) takes them for above or below it.

    Where several processes hold the features, each has some of them, and of a batch it may see a share of the tokens;
    what is chosen, penalised and remembered is nevertheless what one process would choose for all. Its own tensors
    with an axis have one number a feature held; those without are the same in all processes.
    """

    tied_length = 1.0  # of decoder rows that start as their encoder rows

    def __init__(self, config: TrainingConfig, mesh: Mesh) -> None:
        super().__init__()
        self.k, self.mesh = config.k_of(0, 1), mesh
        self.n_features = config.width  #: of all processes
        self.n_own = config.width // mesh.features.size

    def prepare(self, x: Float[Tensor, "tokens d_in"], encoder: Encoder) -> Float[Tensor, " rows"]:
        """Set the start on a sample of scaled inputs, the same in all processes; returns the encoder
        bias to start from.
        """
        return encoder.b_enc

    @abc.abstractmethod
    def select(
        self, x: Float[Tensor, "tokens d_in"], encoder: Encoder, *, generator: torch.Generator, memory: float
    ) -> ActiveSet:
        """The features whose pre-activations are needed: all that fire, and those that get a gradient nevertheless.

        memory: share of a running threshold that stays.
        """

    def activations(
        self, values: Float[Tensor, " entries"], active: ActiveSet, b_enc: Float[Tensor, " rows"]
    ) -> Float[Tensor, " entries"]:
        """Activations of the selected pre-activations; b_enc: the bias in those, with gradients."""
        return values

    def extra_loss(
        self,
        values: Float[Tensor, " entries"],
        activations: Float[Tensor, " entries"],
        active: ActiveSet,
        norms: Callable[[], Float[Tensor, " n_features"]],
    ) -> Tensor | float:
        """The penalty of all features, weighted; moves its weight along while gradients are on.

        norms: asked for those of the decoder rows, with gradients.
        """
        return 0.0

    def observe(self, values: Float[Tensor, " entries"], active: ActiveSet, fired: Tensor) -> None:
        """Take note of a batch's activations and of which features fired in it, at tokens of any process."""
        return None

    def calibrate(self, x: Float[Tensor, "tokens d_in"], encoder: Encoder) -> None:
        """Set what the finished dictionary needs, on scaled inputs, of which every process sees its share."""
        return None

    def levels(self, encoder: Encoder) -> Float[Tensor, " n_features"]:
        """The pre-activation above which each feature fires."""
        return encoder.W_dec.new_zeros(len(encoder.W_dec))

    def fresh(self, b_enc: Float[Tensor, " fresh"]) -> dict[nn.Parameter, Float[Tensor, " fresh"]]:
        """Its own parameters, one number a feature, with the values of features that start again with these biases."""
        return {}

    def nudge(self, b_enc: nn.Parameter) -> None:
        """Move what features fire by, beside the optimiser and after its step, as the last batch asked for."""
        return None

    def reopen(self, *, widen: float, k: int | None) -> None:
        """Let features fire more widely from here on."""
        self.k = k or self.k

    @abc.abstractmethod
    def export(self, encoder: Encoder) -> Exported:
        """The encoder for unit decoder rows, and its activation function."""


class Penalised(Sparsity):
    """A sparsity that a penalty brings about; a controller moves its weight, and biases, until k features a token fire.

    `log weight += gain * e`, `e = log(L0 / wanted)` cut to [-1, 1], and `damping * e` on top for the step itself: a
    proportional-integral controller on the logarithm. Wanted are 2 k features at first, as many as fire at the start,
    and k from three tenths of the run on: it is quick, so that short runs reach k, but where it holds k from the
    beginning, features settle before they have found their directions. The weight stays in [1e-5, 100], losses being
    about 1: where k is out of reach it would run away, and be of no use when k comes into reach. Below 0.003 it falls
    ten times slower, as it changes little there and is missed when L0 rises: that happens as the learning rate falls.

    A weight only pushes L0 down, and only as fast as the optimiser learns. So after every step all pre-activations are
    also raised by `rate (wanted - L0) / density`, a damped step of Newton's method on L0 as a function of the biases:
    the density of pre-activations at the threshold, counted just above it, is that function's slope. It needs no scale,
    works in both directions, at any learning rate, and outside of the loss, as biases do that balance experts (Wang et
    al. 2024, "Auxiliary-Loss-Free Load Balancing"). Where the weight brings L0 to k it comes to nothing; it is slow
    enough that the weight still does most of the work. Biases fall by no more than the distance that density is counted
    over, and rise by a tenth of it: what lies below the threshold is not seen.
    """

    log_weight: Tensor  # []
    steps_done: Tensor  # []
    distance: Tensor  # [], mean distance above the threshold of what fires, when last anything did
    due: Tensor  # [], what pre-activations are to rise by once the optimiser has made its step
    gain, damping = 0.2, 4.0
    lowest, highest = 1e-5, 100.0
    slow_below, slower = 3e-3, 0.1
    first_weight = 0.03
    first_k = 2.0  # times k features a token fire at the start
    falling = 0.3  # share of the run in which that falls to k
    rate = 0.05  # of what would bring L0 to the wanted one at once
    near = 0.2  # up to where above the threshold density is counted, in mean distances of what fires
    least_near = 1e-3
    most = 0.1  # of that distance up at a step: just below the threshold there may be many more

    def __init__(self, config: TrainingConfig, mesh: Mesh) -> None:
        super().__init__(config, mesh)
        self.steps = config.steps
        self.register_buffer("log_weight", torch.tensor(self.first_weight).log())
        self.register_buffer("steps_done", torch.tensor(0.0))
        self.register_buffer("distance", torch.tensor(0.0))
        self.register_buffer("due", torch.tensor(0.0), persistent=False)

    def bias_to_start(self, x: Tensor, encoder: Encoder, k: float) -> Float[Tensor, " n_features"]:
        """The encoder bias at which every feature fires as often as the others, and k fire at a token."""
        pre = x @ encoder.W_enc.T + encoder.b_enc
        count = min(len(pre) - 1, max(1, round(k * len(pre) / self.n_features)))
        return encoder.b_enc - pre.topk(count + 1, dim=0).values[-1]

    def fires(self, activations: Float[Tensor, " entries"], active: ActiveSet) -> Float[Tensor, ""]:
        """How many features of all processes fire at a token of the whole batch."""
        return self.mesh.world.total((activations.detach() > 0).sum()) / (active.n_tokens * self.mesh.data.size)

    def wanted(self) -> Float[Tensor, ""]:
        """Features that are to fire at a token, at this step of the run."""
        left = (1 - self.steps_done / (self.falling * self.steps)).clamp_min(0)
        return self.k * self.first_k**left

    def aim(
        self,
        above: Float[Tensor, " entries"],
        active: ActiveSet,
        *,
        fires: Float[Tensor, ""],
        wanted: Float[Tensor, ""],
    ) -> None:
        """Set what is due where a training step is made; above: how far features are above where they begin to fire."""
        if not torch.is_grad_enabled():
            return
        total, tokens = self.mesh.world.total, active.n_tokens * self.mesh.data.size
        above = above.detach()
        mean = total(above.clamp_min(0).sum()) / (fires * tokens).clamp_min(1)
        self.distance.copy_(mean.where(fires > 0, self.distance))
        near = (self.near * self.distance).clamp_min(self.least_near)
        density = total(((above > 0) & (above < near)).sum()) / (tokens * near)
        step = self.rate * (wanted - fires) / density.clamp_min(1e-6)
        self.due.copy_(step.clamp(-near, self.most * near))

    @torch.no_grad()
    def nudge(self, b_enc: nn.Parameter) -> None:
        if b_enc.requires_grad:
            b_enc.add_(self.due)

    def controlled(self, fires: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The weight for a batch in which `fires` features a token fire; moves it where a training step is made."""
        error = (fires.clamp_min(1e-3) / self.wanted()).log().clamp(-1, 1)
        if torch.is_grad_enabled():
            slows = (error < 0) & (self.log_weight < math.log(self.slow_below))
            gain = torch.where(slows, self.slower * self.gain, self.gain)
            self.log_weight.add_(gain * error).clamp_(math.log(self.lowest), math.log(self.highest))
            self.steps_done.add_(1)
        return (self.log_weight + self.damping * error).exp()


def positive(x: Tensor, encoder: Encoder, shift: Tensor | float = 0.0) -> ActiveSet:
    """Features whose pre-activation plus `shift` is above zero."""
    return select_above(x, encoder.W_enc, encoder.b_enc + shift, _SMALLEST)
