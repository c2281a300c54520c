"""Settings of dictionary training: one object for the reconstruction stage, one for the end-to-end stage.

Says what the numbers mean and which contradict each other; runs nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

from replacement.errors import InputError

KINDS = ("transcoder", "skip_transcoder", "sae", "clt", "crosscoder", "causal_crosscoder")
"""What is read and written; `replacement.training.kinds` holds the meaning."""
SPARSITIES = ("batchtopk", "topk", "relu", "jumprelu", "gated")
"""How features are kept few; `replacement.training.sparsity` holds the meaning."""
PENALISED = ("relu", "jumprelu", "gated")
"""Sparsities that a penalty brings about; its weight and biases are moved until `k` features a token fire."""
ENCODERS = ("linear", "switch", "kronecker")
"""How features are made of encoder rows; `replacement.training.schemes` holds the meaning."""
DEAD = ("auxk", "resample", "ghost", "preactivation", "none")
"""What is done for dead features; `replacement.training.dead` holds the meaning."""
STARTS = ("random", "samples", "clusters", "shared_clusters")
"""Where features start; `replacement.training.starts` holds the meaning."""
CLUSTERED = ("clusters", "shared_clusters")
"""Those that look for clusters."""

_BELONGS = {
    "site": ("kind", ("sae", "crosscoder", "causal_crosscoder")),
    "penalty": ("sparsity", ("jumprelu",)),
    "bandwidth": ("sparsity", ("jumprelu",)),
    "floor": ("sparsity", ("batchtopk",)),
    "skip_starts": ("kind", ("skip_transcoder",)),
    "experts": ("encoder", ("switch",)),
    "balance_weight": ("encoder", ("switch",)),
    "pairs": ("encoder", ("kronecker",)),
    "dead_weight": ("dead", ("auxk", "ghost", "preactivation")),
    "dead_k": ("dead", ("auxk",)),
    "threshold_memory": ("sparsity", ("batchtopk",)),
}
"""Settings that say something under some values of another one alone: elsewhere they would be ignored in silence."""
_NOT_NEGATIVE = (
    *("learning_rate", "warmup_steps", "kl_weight", "reconstruction_weight", "bridging_weight", "aux_weight"),
    *("widen", "input_noise"),
)  # of the last stage
START_TOKENS = 24_576
"""Tokens that features start from, and scales are estimated on."""


class Settings:
    """A frozen dataclass that travels as JSON."""

    def to_json(self) -> str:
        """The fields as one line of JSON, in alphabetical order."""
        assert dataclasses.is_dataclass(self) and not isinstance(self, type)
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> Self:
        """The settings of a mapping, as from JSON; raises InputError for an unknown name."""
        assert dataclasses.is_dataclass(cls)
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(given) - known):
            raise InputError(f"{cls.__name__}: does not know {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})

    def _require_finite(self) -> None:
        """Raise InputError for a setting that is NaN or infinite: those pass comparisons and spoil a run in silence."""
        for name, value in vars(self).items():
            if any(isinstance(one, float) and not math.isfinite(one) for one in _each(value)):
                raise InputError(f"{type(self).__name__}({name}={value}): must be finite; pass a number")


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


@dataclass(frozen=True)
class TrainingConfig(Settings):
    """Reconstruction stage: all dictionaries learn from one stream of activations."""

    kind: str = "transcoder"
    """What is trained: transcoder, skip_transcoder, sae, clt, crosscoder, causal_crosscoder."""
    site: str = "hook_resid_post"
    """Hook that an SAE or a crosscoder reads and writes; the others read `mlp.hook_in` and write `mlp.hook_out`."""
    layers: tuple[int, ...] = ()
    """Blocks that take part, ascending; () for all."""
    n_features: int | tuple[int, ...] = 2048
    """Features, for all dictionaries or one number each; multiples of 8. A cross-layer transcoder's early layers cost
    most: they write to all later ones.
    """
    sparsity: str = "batchtopk"
    """How features are kept few: batchtopk, topk, relu (L1), jumprelu, gated."""
    k: int | tuple[int, ...] = 16
    """Features that fire at a token on average, for all dictionaries or one number each. Exact at every token for topk
    (with encoder kronecker at most that many: only positive products fire); under a penalty its weight and all biases
    are moved until it holds.
    """
    penalty: str = "tanh"
    """Of jumprelu: "tanh" (of each activation times its decoder norm) or "quadratic" (of L0 around k)."""
    bandwidth: float = 0.2
    """Of jumprelu: width of the straight-through window around a threshold, in scaled units."""
    floor: float = 0.0
    """Of batchtopk: a feature fires only above this share of its own usual peak; 0 for no floor."""
    prefixes: tuple[int, ...] = ()
    """Sizes of nested dictionaries that must each reconstruct (Matryoshka), ascending, all below n_features; () for
    none.
    """
    encoder: str = "linear"
    """How features are made of encoder rows: linear (one each), switch (one expert a token, chosen by a router) or
    kronecker (pairs of rows, which fire where both are positive: fewer than k where too few are); the last two with
    batchtopk and topk.
    """
    experts: int = 8
    """Of switch: groups that the features are divided into."""
    balance_weight: float = 0.03
    """Of switch: weight of the loss that keeps experts evenly used."""
    pairs: tuple[int, int] = (2, 4)
    """Of kronecker: rows a head of either kind; m and n rows make m * n features."""
    start: str = "random"
    """Where features start: random directions, sampled tokens, or clusters of tokens. With clusters (batchtopk alone)
    each writes all of its tokens' output, so that fewer than k fire: a token is of one cluster at each size. With
    shared_clusters k of them fire and each writes its share, which suits tokens that come in kinds.
    """
    skip_starts: float = 0.0
    """Of skip_transcoder: share of the run after which the skip connection starts to learn; 1 leaves it to the
    end-to-end stage. A skip that learns from the start takes what features would have stood for.
    """
    tokens: int = 4_000_000
    """Tokens to train on."""
    batch_tokens: int = 4096
    """Tokens of one step, drawn from the shuffled buffer."""
    buffer_bytes: int = 256_000_000
    """Bound on the buffer in which activations of many sequences are shuffled."""
    learning_rate: float = 2e-3
    """Adam's step size at its peak."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's decay rates; short runs at a high learning rate do better with (0.5, 0.95)."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises from zero."""
    decay_fraction: float = 0.4
    """Share of the run, at its end, over which the learning rate falls to 2 % of its peak."""
    dead: str = "auxk"
    """What is done for dead features: auxk, resample, ghost, preactivation or none."""
    dead_weight: float = 0.125
    """Weight of the loss that auxk, ghost and preactivation add."""
    dead_k: int = 32
    """Dead features that take part in AuxK at a token (batchtopk, topk); under a penalty each does at k / n_features of
    the tokens.
    """
    dead_after: int = 100_000
    """Tokens without firing after which a feature counts as dead in training."""
    threshold_memory: float = 0.9
    """Share of the old threshold that stays at a step (batchtopk)."""
    seed: int = 0
    """Seed of initialisation, shuffling and sampling."""

    def __post_init__(self) -> None:
        self._require_finite()
        named = {"kind": KINDS, "sparsity": SPARSITIES, "encoder": ENCODERS, "dead": DEAD, "start": STARTS}
        for name, known in named.items():
            if getattr(self, name) not in known:
                raise InputError(f"TrainingConfig({name}={getattr(self, name)!r}): needs one of {', '.join(known)}")
        if self.penalty not in ("tanh", "quadratic"):
            raise InputError(f"TrainingConfig(penalty={self.penalty!r}): needs one of tanh, quadratic")
        self._check_belonging()
        if not isinstance(self.n_features, int):
            self._check_each()
            return
        if self.n_features < 8 or self.n_features % 8:
            raise InputError(f"TrainingConfig(n_features={self.n_features}): needs a positive multiple of 8")
        if list(self.layers) != sorted(set(self.layers)) or any(layer < 0 for layer in self.layers):
            raise InputError(f"TrainingConfig(layers={self.layers}): needs ascending layers from 0, each once")
        if list(self.prefixes) != sorted(set(self.prefixes)) or any(not 0 < p < self.n_features for p in self.prefixes):
            raise InputError(
                f"TrainingConfig(prefixes={self.prefixes}): needs ascending sizes in 1..{self.n_features - 1}; "
                "leave n_features itself out"
            )
        sizes = [b - a for a, b in pairwise((0, *self.prefixes, self.n_features))]
        if self.start in CLUSTERED and max(sizes) > sizes[-1]:
            raise InputError(
                f"TrainingConfig(start={self.start!r}, prefixes={self.prefixes}): its parts have {sizes} features and "
                "the last must be the largest, since the others merge its clusters; lower the last prefix"
            )
        if self.k == () or any(not 0 < k <= self.n_features for k in self._all_k):
            raise InputError(f"TrainingConfig(k={self.k}): needs between 1 and n_features = {self.n_features}")
        if not 0 <= self.floor < 1:
            raise InputError(f"TrainingConfig(floor={self.floor}): must be in [0, 1); for 20 percent pass 0.2")
        if self.batch_tokens < 1:
            raise InputError(f"TrainingConfig(batch_tokens={self.batch_tokens}): must be above 0")
        if self.tokens < self.batch_tokens:
            raise InputError(f"TrainingConfig(tokens={self.tokens}): less than one batch of {self.batch_tokens} tokens")
        for name in ("learning_rate", "bandwidth", "buffer_bytes", "dead_k", "dead_after"):
            if not getattr(self, name) > 0:
                raise InputError(f"TrainingConfig({name}={getattr(self, name)}): must be above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"TrainingConfig(betas={self.betas}): needs two numbers in [0, 1)")
        for name in ("decay_fraction", "threshold_memory", "skip_starts"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"TrainingConfig({name}={getattr(self, name)}): must be in [0, 1]")
        if not 0 <= self.seed < 1 << 31:
            raise InputError(f"TrainingConfig(seed={self.seed}): needs a whole number in 0..{(1 << 31) - 1}")
        for name in ("warmup_steps", "dead_weight", "balance_weight"):
            if getattr(self, name) < 0:
                raise InputError(f"TrainingConfig({name}={getattr(self, name)}): must not be negative")
        if self.encoder != "linear":
            self._check_encoder()

    def _check_belonging(self) -> None:
        """Raise InputError for a setting that the others leave without a meaning."""
        for name, (decider, values) in _BELONGS.items():
            default = next(field.default for field in dataclasses.fields(self) if field.name == name)
            if getattr(self, name) != default and getattr(self, decider) not in values:
                raise InputError(
                    f"TrainingConfig({name}={getattr(self, name)!r}): belongs to {decider}="
                    f"{' or '.join(map(repr, values))}; leave it out"
                )
        if self.sparsity in PENALISED and self.dead_k != type(self).dead_k:
            raise InputError(
                f"TrainingConfig(dead_k={self.dead_k}): belongs to sparsity='batchtopk' or 'topk'; leave it out"
            )
        if self.start == "clusters" and self.sparsity != "batchtopk":  # k features would each write a whole output
            raise InputError(
                f"TrainingConfig(start='clusters', sparsity={self.sparsity!r}): belongs to sparsity='batchtopk', with "
                "which fewer than k may fire; pass start='shared_clusters'"
            )

    def _check_each(self) -> None:
        """Raise InputError for what the settings of any one dictionary contradict."""
        if not isinstance(self.n_features, tuple) or not all(isinstance(n, int) for n in self.n_features):
            raise InputError(f"TrainingConfig(n_features={self.n_features!r}): needs an int, or a tuple of them")
        if not self.n_features or (isinstance(self.k, tuple) and len(self.k) != len(self.n_features)):
            raise InputError(
                f"TrainingConfig(n_features={self.n_features}, k={self.k}): needs one number each, or one for all"
            )
        for index in range(len(self.n_features)):
            self.of(index, len(self.n_features))

    def _check_encoder(self) -> None:
        """Raise InputError for what a switch or Kronecker encoder cannot be combined with."""
        own = f"TrainingConfig(encoder={self.encoder!r}"
        fits = {"sparsity": ("batchtopk", "topk"), "start": ("random", "samples"), "dead": ("auxk", "none")}
        for name, known in fits.items():
            if getattr(self, name) not in known:
                raise InputError(f"{own}, {name}={getattr(self, name)!r}): takes {name} {' or '.join(known)}")
        if self.encoder == "switch":
            if self.experts < 1 or self.width % self.experts:
                raise InputError(f"{own}, experts={self.experts}): needs a divisor of n_features = {self.n_features}")
            if max(self._all_k) > (size := self.width // self.experts):  # a token fires features of one expert only
                raise InputError(f"{own}, k={self.k}): an expert has {size} features; needs k of at most that")
            if self.prefixes:
                raise InputError(f"{own}, prefixes={self.prefixes}): experts have no order to nest by; leave it out")
        elif len(self.pairs) != 2 or min(self.pairs) < 1 or self.width % (self.pairs[0] * self.pairs[1]):
            raise InputError(f"{own}, pairs={self.pairs}): needs two numbers whose product divides {self.n_features}")

    @property
    def _all_k(self) -> tuple[int, ...]:
        return self.k if isinstance(self.k, tuple) else (self.k,)

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return self.tokens // self.batch_tokens

    @property
    def tokens_read(self) -> int:
        """Tokens that a run looks at: to start from, to train on, and the batch that it calibrates on."""
        return max(START_TOKENS, self.tokens + self.batch_tokens)

    @property
    def widths(self) -> tuple[int, ...]:
        """All numbers of features that were given."""
        return self.n_features if isinstance(self.n_features, tuple) else (self.n_features,)

    @property
    def width(self) -> int:
        """Features of the one dictionary that these settings are of."""
        (width,) = self.widths
        return width

    def k_of(self, index: int, count: int) -> int:
        """k of one dictionary; raises `InputError` when a tuple's length is not the number of dictionaries."""
        return self._one_of("k", index, count)

    def of(self, index: int, count: int) -> Self:
        """The settings of one dictionary of so many: n_features and k are its own; raises as `k_of` does."""
        own = {name: self._one_of(name, index, count) for name in ("n_features", "k")}
        return dataclasses.replace(self, **own)  # type: ignore[arg-type]

    def _one_of(self, name: str, index: int, count: int) -> int:
        given = getattr(self, name)
        if isinstance(given, int):
            return given
        if len(given) != count:
            raise InputError(
                f"TrainingConfig({name}={given}): {len(given)} numbers for {count} dictionaries; give one each"
            )
        return given[index]


@dataclass(frozen=True)
class EndToEndConfig(Settings):
    """End-to-end stage: the fully replaced model learns the original's next-token distribution."""

    steps: int = 400
    """Optimiser steps."""
    documents: int = 32
    """Documents of one step, of about as much text each; all are cut to as many text tokens as the shortest has."""
    learning_rate: float = 5e-4
    """Adam's step size at its peak; it falls linearly to zero."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises from zero."""
    kl_weight: float = 1.0
    """Weight of KL(original || replaced) per token."""
    reconstruction_weight: float = 1.0
    """Weight of the reconstruction error against the original model's outputs, mean over sites and nested prefixes."""
    bridging_weight: float = 0.0
    """Weight of the bridging term: KL(original || a model of which each site is replaced with probability 1/2), and the
    error that every dictionary makes beside the original's own activations. KL alone makes dictionaries right together
    and less right one by one; with the term, error nodes stay small and the replacement score does not fall.
    """
    other_share: float = 1.0
    """Share of the tokens that take part in the KL, drawn anew each step; tokens that data marks as answers all do."""
    aux_weight: float = 0.125
    """Weight of the loss for dead features, as in the reconstruction stage."""
    threshold_memory: float = 0.98
    """Share of the old threshold that stays at a step."""
    layers: tuple[int, ...] = ()
    """Layers that learn in this stage; () for all."""
    widen: float = 0.0
    """Added to the encoder biases of those layers at the start, in scaled units; above 0 it also ends their floor."""
    k: int | None = None
    """New k of those layers; None to keep theirs."""
    input_noise: float = 0.0
    """Standard deviation of noise on the scaled inputs of those layers: makes features fire for the unfamiliar too."""
    seed: int = 1
    """Seed of sampling."""

    def __post_init__(self) -> None:
        self._require_finite()
        if self.steps < 0 or self.documents < 1:
            raise InputError(
                f"EndToEndConfig(steps={self.steps}, documents={self.documents}): needs steps >= 0 and documents >= 1"
            )
        if self.k is not None and self.k < 1:
            raise InputError(f"EndToEndConfig(k={self.k}): needs k >= 1, or None to keep the dictionaries' own")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise InputError(f"EndToEndConfig({name}={getattr(self, name)}): must not be negative")
        for name in ("other_share", "threshold_memory"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"EndToEndConfig({name}={getattr(self, name)}): needs a share in [0, 1]")
        if list(self.layers) != sorted(set(self.layers)) or any(layer < 0 for layer in self.layers):
            raise InputError(f"EndToEndConfig(layers={self.layers}): needs ascending layers from 0, each once")
        if not 0 <= self.seed < 1 << 31:
            raise InputError(f"EndToEndConfig(seed={self.seed}): needs a whole number in 0..{(1 << 31) - 1}")
