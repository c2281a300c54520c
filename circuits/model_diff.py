"""Two models compared feature by feature: a crosscoder trained on both, its figures, and words for what differs.

Knows the order of things and how features are put into words; the measures are `replacement.evaluation`'s `model_diff`
(whose a feature is) and `divergence` (what it does to the predictions, by which features are listed).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from replacement import formats
from replacement.crosscoder import Crosscoder
from replacement.errors import InputError
from replacement.evaluation.divergence import Divergence, DivergenceMeter, GoOn
from replacement.evaluation.model_diff import Kind, LatentScaling, ModelDiff
from replacement.sites import hook_name, read_weights
from replacement.starts import start_token, start_tokens
from replacement.training.config import TrainingConfig
from replacement.training.data import BridgeActivations, TokenSource, open_tokens
from replacement.training.data.harvest import forward
from replacement.training.pairs import require_comparable
from replacement.training.run import run

BASE, TUNED = "base", "tuned"
_STREAM = "hook_resid_post"
_DOCUMENTS = 32
_TINY = 1e-30
_AT_ONCE = 8
"""Documents whose gradients are taken together: their logits are what memory goes to."""
_WORDS, _CONTEXT = 5, 8


class LayerDifference(NamedTuple):
    """How far apart the two models' residual streams are after one block, in shares of the base model's norm."""

    layer: int
    typical: float  #: median over tokens
    largest: float  #: 99th percentile over tokens


class Feature(NamedTuple):
    """One feature of a list."""

    feature: int
    kind: str
    share: float  #: of the divergence between the two models' predictions
    own_share: float  #: what of it comes of a direction that one model alone has
    relative_norm: float
    cosine: float
    nu_reconstruction: float  #: of the tuned model's direction; of the base model's for what is base only
    nu_error: float
    confirmed: bool  #: both nu are below their thresholds
    rate: float  #: share of the held-out tokens at which it fires
    peak: float
    fires_on: tuple[str, ...]  #: tokens that hold most of its activation
    example: str  #: the end of the text at which it fires most
    promotes_base: tuple[str, ...]  #: tokens that its base row raises by the direct path to the logits
    promotes_tuned: tuple[str, ...]


class Parts(NamedTuple):
    """How far apart the two models' predictions are, in nats a token, and where that comes from: see `Divergence`."""

    total: float  #: KL of what the tuned model says from what it says when it goes on from the base model's stream
    features: float
    bias: float
    error: float
    residual: float


class Comparison(NamedTuple):
    """Two models compared."""

    base: str
    tuned: str
    data: str
    site: str
    counts: dict[str, int]  #: features by kind
    confirmed: dict[str, int]  #: those of them whose direction latent scaling finds in no other model
    divergence: Parts
    differing: tuple[Feature, ...]  #: of all kinds, the largest own share of the divergence first
    tuned_only: tuple[Feature, ...]  #: of this kind, in the same order
    base_only: tuple[Feature, ...]
    layers: tuple[LayerDifference, ...]
    tokens: int  #: held-out tokens measured on
    l0: float
    crosscoder: str


class Held(NamedTuple):
    """One batch of held-out text in both models."""

    streams: tuple[Float[Tensor, "documents pos d_model"], Float[Tensor, "documents pos d_model"]]  #: base, tuned
    ids: Int[Tensor, "documents pos"]
    keep: Bool[Tensor, "documents pos"]  #: all but start tokens

    @property
    def base(self) -> Float[Tensor, "tokens d_model"]:
        """The base model's activations at the tokens that are kept."""
        return self.streams[0][self.keep]

    @property
    def tuned(self) -> Float[Tensor, "tokens d_model"]:
        """The tuned model's."""
        return self.streams[1][self.keep]


class Measures(NamedTuple):
    """What held-out text says of every feature."""

    scaling: ModelDiff
    divergence: Divergence

    @property
    def own(self) -> Float[Tensor, " n_features"]:
        """What lists are ordered by: parts of the divergence that come of directions which one model alone has.

        `part * (1 - max(nu_r, nu_e))`, nu cut to [0, 1] and of the model whose the feature is: a row that is a little
        different in the two models moves predictions too, but latent scaling finds its direction in both.
        """
        found = self.scaling
        of_base = torch.tensor([kind is Kind.BASE_ONLY for kind in found.kinds])
        nu = torch.where(of_base, torch.maximum(*found.of_base), torch.maximum(*found.of_tuned)).clamp(0, 1)
        return torch.where(found.rate > 0, self.divergence.features * (1 - nu), 0.0)

    @property
    def confirmed(self) -> dict[str, int]:
        """How many features of each kind have a direction that one model alone has."""
        own = {tuned: self.scaling.is_specific(tuned=tuned).tolist() for tuned in (True, False)}
        found = Counter(kind for i, kind in enumerate(self.scaling.kinds) if own[kind is not Kind.BASE_ONLY][i])
        return {str(kind): found[kind] for kind in Kind}

    def order(self, *kinds: Kind) -> list[int]:
        """Features of these kinds, of all but the dead if none is named; the largest own part first."""
        wanted, found = kinds or tuple(set(Kind) - {Kind.DEAD}), self.scaling.kinds
        return [i for i in self.own.argsort(descending=True, stable=True).tolist() if found[i] in wanted]


def diff_models(
    bridges: Mapping[str, Any],
    *,
    names: tuple[str, str],
    out: Path,
    data: str = "atlas-changed",
    text_field: str = "text",
    layer: int | None = None,
    site: str = "hook_resid_post",
    features: int = 512,
    k: int = 8,
    tokens: int = 400_000,
    held_out: int = 20_000,
    context: int = 64,
    top: int = 10,
    seed: int = 0,
    crosscoder: Path | None = None,
    show_progress: bool = True,
) -> Comparison:
    """Train a BatchTopK crosscoder on two models, or take a stored one, and say which features are whose.

    bridges: the models under the names "base" and "tuned". names: how they are called in reports. out: folder of the
    crosscoder where one is trained; a stopped run goes on there. data, text_field: as of `open_tokens`; text on
    which the models differ should be in it. layer, site: where both are read; None for the layer at which they differ
    most at few tokens (`layer_differences`). features, k, tokens: of the training. held_out: tokens to measure on.
    context: tokens of a row. top: features listed of each model. crosscoder: a folder to take instead of training.
    Raises `InputError` where the models cannot be compared, or a folder or data does not fit.
    """
    require_comparable(bridges)
    if min(held_out, top, tokens) < 1:
        raise InputError(f"diff_models(tokens={tokens}, held_out={held_out}, top={top}): each must be at least 1")
    base, context = bridges[BASE], min(context, *(int(one.cfg.n_ctx) for one in bridges.values()))
    source = open_tokens(data, model=base, context=context, split="held_out", text_field=text_field, seed=seed)
    layers = layer_differences(bridges, source.batch(0, _DOCUMENTS))
    if crosscoder is None:
        chosen = layer if layer is not None else max(layers, key=lambda one: one.largest - one.typical).layer
        config = TrainingConfig(
            kind="crosscoder", site=site, layers=(chosen,), n_features=features, k=k, tokens=tokens, seed=seed,
            batch_tokens=min(1024, tokens), buffer_bytes=64_000_000, start="samples",
        )  # fmt: skip
        trained = run(
            bridges, model=" and ".join(names), data=data, text_field=text_field, config=config, out=out / "crosscoder",
            context=context, documents=_DOCUMENTS, show_progress=show_progress,
        )  # fmt: skip
        crosscoder = trained.folder
    found = load_crosscoder(crosscoder)
    place = found.parts[0].partition(":")[2]
    measured = measure(found, bridges, source, place, held_out)
    return Comparison(
        base=names[0],
        tuned=names[1],
        data=data,
        site=place,
        **_figures(measured),
        **_lists(found, measured, bridges, held_out_pairs(bridges, source, place, held_out), top),
        layers=layers,
        crosscoder=str(crosscoder),
    )


def _figures(measured: Measures) -> dict[str, Any]:
    """The fields of a comparison that are about all features together."""
    counts, parts = Counter(measured.scaling.kinds), measured.divergence
    return {
        "counts": {str(kind): counts[kind] for kind in Kind},
        "confirmed": measured.confirmed,
        "divergence": Parts(parts.total, float(parts.features.sum()), parts.bias, parts.error, parts.residual),
        "tokens": parts.tokens,
        "l0": float(measured.scaling.rate.sum()),
    }


def _lists(
    crosscoder: Crosscoder, measured: Measures, bridges: Mapping[str, Any], text: Iterator[Held], top: int
) -> dict[str, Any]:
    """The lists of a comparison."""
    kinds = {"differing": (), "tuned_only": (Kind.TUNED_ONLY,), "base_only": (Kind.BASE_ONLY,)}
    lists = {name: measured.order(*some)[:top] for name, some in kinds.items()}
    words = _Words(crosscoder, bridges, sorted({i for one in lists.values() for i in one}))
    for held in text:
        words.add(held)
    return {name: tuple(words.feature(i, measured) for i in one) for name, one in lists.items()}


def load_crosscoder(folder: Path) -> Crosscoder:
    """The crosscoder of a folder; raises `InputError` unless it reads one site of a base and a tuned model."""
    dictionaries = list(formats.load(folder))
    one = dictionaries[0]
    if len(dictionaries) != 1 or not isinstance(one, Crosscoder) or one.models != (BASE, TUNED) or len(one.parts) != 2:
        raise InputError(
            f"diff-models(crosscoder={str(folder)!r}): holds no crosscoder over one site of a base and a tuned model; "
            "leave it out to train one"
        )
    return one


def layer_differences(bridges: Mapping[str, Any], ids: Int[Tensor, "documents pos"]) -> tuple[LayerDifference, ...]:
    """How far apart two models' residual streams are after each block: `|x_tuned - x_base| / |x_base|` over tokens but
    start tokens.
    """
    layers = range(min(len(one.blocks) for one in bridges.values()))
    sites = [hook_name(layer, _STREAM) for layer in layers]
    base, tuned = (forward(bridges[name], ids, sites).activations for name in (BASE, TUNED))
    tokenizer = bridges[BASE].tokenizer
    text, out = ~start_tokens(ids, None if tokenizer is None else start_token(tokenizer)), []
    for layer, name in zip(layers, sites, strict=True):
        x, y = (part[name][text.to(part[name].device)].float() for part in (base, tuned))
        share = (x - y.to(x.device)).norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-12)
        out.append(LayerDifference(layer, share.median().item(), share.quantile(0.99).item()))
    return tuple(out)


def held_out_pairs(bridges: Mapping[str, Any], source: TokenSource, place: str, tokens: int) -> Iterator[Held]:
    """Both models' activations of the same held-out text, so many tokens of it or a few more."""
    harvests = {
        name: BridgeActivations(one, source, sites=[place], documents=_DOCUMENTS, drop_norm=None)
        for name, one in bridges.items()
    }
    done = index = 0
    while done < tokens:
        base, tuned = (harvests[name].harvest(index) for name in (BASE, TUNED))
        ids = source.batch(index, _DOCUMENTS)
        x, y = (one.activations[place].cpu().unflatten(0, ids.shape) for one in (base, tuned))
        keep = ~base.starts.cpu().view(ids.shape)
        yield Held((x, y), ids, keep)
        done, index = done + int(keep.sum()), index + 1


def measure(
    crosscoder: Crosscoder, bridges: Mapping[str, Any], source: TokenSource, place: str, tokens: int
) -> Measures:
    """Latent scaling, and each feature's part of the divergence, over so many held-out tokens or a few more."""
    width = int(bridges[BASE].cfg.d_model)
    if crosscoder.d_out != width:
        raise InputError(f"diff-models: the crosscoder reads width {crosscoder.d_out}, the models have {width}")
    scaling, divergence = LatentScaling(crosscoder), DivergenceMeter(crosscoder)
    device = next(bridges[TUNED].parameters()).device
    for held in held_out_pairs(bridges, source, place, tokens):
        scaling.add(held.base, held.tuned)
        for parts in zip(*(one.split(_AT_ONCE) for one in (*held.streams, held.keep, held.ids)), strict=True):
            x, y, keep, ids = (one.to(device) for one in parts)
            divergence.add(x, y, keep, _from(bridges[TUNED], place, ids))
    return Measures(scaling.result(), divergence.result())


def _from(bridge: Any, place: str, ids: Int[Tensor, "documents pos"]) -> GoOn:
    """A model's way on from activations at a site to the logits of some documents."""

    def logits(x: Float[Tensor, "documents pos d_model"]) -> Float[Tensor, "documents pos vocab"]:
        hooks = [(place, lambda tensor, hook: x.to(tensor).reshape(tensor.shape))]
        with warnings.catch_warnings():  # the bridge warns that edited values round differently; that is meant here
            warnings.simplefilter("ignore", UserWarning)
            return bridge.run_with_hooks(ids, fwd_hooks=hooks)

    return logits


class _Words:
    """Words for a few features, gathered over held-out text."""

    def __init__(self, crosscoder: Crosscoder, bridges: Mapping[str, Any], features: list[int]) -> None:
        self.crosscoder, self.bridge = crosscoder, bridges[BASE]
        self.place = {feature: row for row, feature in enumerate(features)}
        self.features = torch.tensor(features, dtype=torch.long)
        self.mass = torch.zeros(len(features), int(self.bridge.cfg.d_vocab))
        self.best: list[tuple[float, str]] = [(0.0, "")] * len(features)
        rows = crosscoder.W_dec[self.features].detach()
        self.promoted = [self._promoted(bridges[name], rows[:, part]) for part, name in enumerate((BASE, TUNED))]

    def _promoted(self, bridge: Any, rows: Float[Tensor, "n d_model"]) -> list[tuple[str, ...]]:
        if not len(rows):
            return []
        weights = read_weights(bridge, torch.float32)
        effect = (rows.to(weights.W_U.device) * weights.ln_final.weight) @ weights.W_U
        return [self._tokens(ids) for ids in effect.topk(3).indices.tolist()]

    def _tokens(self, ids: list[int]) -> tuple[str, ...]:
        return tuple(self.bridge.tokenizer.decode([i]).strip() for i in ids)

    def add(self, held: Held) -> None:
        """Take one batch."""
        with torch.no_grad():
            x = torch.cat([held.base, held.tuned], 1).to(self.crosscoder.b_enc)
            fired = self.crosscoder.encode(x)[:, self.features]
        self.mass.index_add_(1, held.ids[held.keep], fired.T.float())
        if not len(self.features):
            return
        peaks = fired.max(0)
        for row, (value, at) in enumerate(zip(peaks.values.tolist(), peaks.indices.tolist(), strict=True)):
            if value > self.best[row][0]:
                document, pos = held.keep.nonzero()[at].tolist()
                shown = held.ids[document, max(1, pos - _CONTEXT + 1) : pos + 1].tolist()
                self.best[row] = (value, self.bridge.tokenizer.decode(shown).strip())

    def feature(self, feature: int, found: Measures) -> Feature:
        """One feature's figures and words."""
        row, scaling, parts = self.place[feature], found.scaling, found.divergence
        kind, mass = scaling.kinds[feature], self.mass[row]
        tuned = kind is not Kind.BASE_ONLY
        nu = scaling.of_tuned if tuned else scaling.of_base
        most = [i for i in mass.topk(_WORDS).indices.tolist() if mass[i] > 0.02 * mass.sum()]
        return Feature(
            feature,
            str(kind),
            float(parts.features[feature]) / max(parts.total, _TINY),
            float(found.own[feature]) / max(parts.total, _TINY),
            float(scaling.relative_norm[feature]),
            float(scaling.cosine[feature]),
            float(nu.reconstruction[feature]),
            float(nu.error[feature]),
            bool(scaling.is_specific(tuned=tuned)[feature]),
            float(scaling.rate[feature]),
            float(scaling.peak[feature]),
            self._tokens(most),
            self.best[row][1],
            self.promoted[0][row],
            self.promoted[1][row],
        )
