"""Two models compared feature by feature: a crosscoder trained on both, its figures, and words for what differs.

Knows the order of things and how features are put into words; the measures are `replacement.evaluation.model_diff`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement import formats
from replacement.crosscoder import Crosscoder
from replacement.errors import InputError
from replacement.evaluation.model_diff import Kind, LatentScaling, ModelDiff, exclusive
from replacement.sites import hook_name, read_weights
from replacement.training.config import TrainingConfig
from replacement.training.data import BridgeActivations, TokenSource, open_tokens
from replacement.training.data.harvest import forward
from replacement.training.pairs import require_comparable
from replacement.training.run import run

BASE, TUNED = "base", "tuned"
_STREAM = "hook_resid_post"
_DOCUMENTS = 32
_WORDS, _CONTEXT = 5, 8


class LayerDifference(NamedTuple):
    """How far apart the two models' residual streams are after one block, in shares of the base model's norm."""

    layer: int
    typical: float  #: median over tokens
    largest: float  #: 99th percentile over tokens


class Feature(NamedTuple):
    """One feature that writes in one model what the other lacks."""

    feature: int
    kind: str
    relative_norm: float
    cosine: float
    nu_reconstruction: float  #: of this model's direction
    nu_error: float
    confirmed: bool  #: both nu are below their thresholds
    novelty: float
    rate: float  #: share of the held-out tokens at which it fires
    peak: float
    fires_on: tuple[str, ...]  #: tokens that hold most of its activation
    example: str  #: the end of the text at which it fires most
    promotes_base: tuple[str, ...]  #: tokens that its base row raises by the direct path to the logits
    promotes_tuned: tuple[str, ...]


class Comparison(NamedTuple):
    """Two models compared."""

    base: str
    tuned: str
    data: str
    site: str
    counts: dict[str, int]  #: features by kind
    confirmed: dict[str, int]  #: of the lists below before they are cut: how many latent scaling confirms
    tuned_only: tuple[Feature, ...]  #: largest novelty first; with the rewritten ones
    base_only: tuple[Feature, ...]
    layers: tuple[LayerDifference, ...]
    tokens: int  #: held-out tokens measured on
    l0: float
    crosscoder: str


class Held(NamedTuple):
    """One batch of held-out text in both models, start tokens left out."""

    base: Float[Tensor, "tokens d_model"]
    tuned: Float[Tensor, "tokens d_model"]
    ids: Int[Tensor, "documents pos"]  #: all tokens of the batch
    where: Int[Tensor, " tokens"]  #: index of each row in `ids`, flattened


def diff_models(
    bridges: Mapping[str, Any],
    *,
    names: tuple[str, str],
    out: Path,
    data: str = "atlas-changed",
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
    crosscoder where one is trained; a stopped run goes on there. data: as of `open_tokens`; text on
    which the models differ should be in it. layer, site: where both are read; None for the layer at which they differ
    most at few tokens (`layer_differences`). features, k, tokens: of the training. held_out: tokens to measure on.
    context: tokens of a row. top: features listed of each model. crosscoder: a folder to take instead of training.
    Raises `InputError` where the models cannot be compared, or a folder or data does not fit.
    """
    require_comparable(bridges)
    if min(held_out, top, tokens) < 1:
        raise InputError(f"diff_models(tokens={tokens}, held_out={held_out}, top={top}): each must be at least 1")
    base, context = bridges[BASE], min(context, *(int(one.cfg.n_ctx) for one in bridges.values()))
    source = open_tokens(data, model=base, context=context, split="held_out", seed=seed)
    layers = layer_differences(bridges, source.batch(0, _DOCUMENTS))
    if crosscoder is None:
        chosen = layer if layer is not None else max(layers, key=lambda one: one.largest - one.typical).layer
        config = TrainingConfig(
            kind="crosscoder", site=site, layers=(chosen,), n_features=features, k=k, tokens=tokens, seed=seed,
            batch_tokens=min(1024, tokens), buffer_bytes=64_000_000, start="samples",
        )  # fmt: skip
        trained = run(
            bridges, model=" and ".join(names), data=data, config=config, out=out / "crosscoder", context=context,
            documents=_DOCUMENTS, show_progress=show_progress,
        )  # fmt: skip
        crosscoder = trained.folder
    found = load_crosscoder(crosscoder)
    place = found.parts[0].partition(":")[2]
    measured = measure(found, bridges, source, place, held_out)
    counts = Counter(measured.kinds)
    return Comparison(
        *names,
        data=data,
        site=place,
        counts={str(kind): counts[kind] for kind in Kind},
        **_lists(found, measured, bridges, held_out_pairs(bridges, source, place, held_out), top),
        layers=layers,
        tokens=measured.tokens,
        l0=float(measured.rate.sum()),
        crosscoder=str(crosscoder),
    )


def _lists(
    crosscoder: Crosscoder, measured: ModelDiff, bridges: Mapping[str, Any], text: Iterator[Held], top: int
) -> dict[str, Any]:
    """The fields of a comparison that are about what only one model writes."""
    lists = {tuned: exclusive(measured, tuned=tuned) for tuned in (True, False)}
    listed = {tuned: some[:top].tolist() for tuned, some in lists.items()}
    words = _Words(crosscoder, bridges, sorted({*listed[True], *listed[False]}))
    for held in text:
        words.add(held)
    sides = ((TUNED, True), (BASE, False))
    out = {
        f"{name}_only": tuple(words.feature(i, measured, tuned=tuned) for i in listed[tuned]) for name, tuned in sides
    }
    confirmed = {name: int(measured.is_specific(tuned=tuned)[lists[tuned]].sum()) for name, tuned in sides}
    return {"confirmed": confirmed, **out}


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
    """How far apart two models' residual streams are after each block: `|x_tuned - x_base| / |x_base|` over tokens."""
    layers = range(min(len(one.blocks) for one in bridges.values()))
    sites = [hook_name(layer, _STREAM) for layer in layers]
    base, tuned = (forward(bridges[name], ids, sites).activations for name in (BASE, TUNED))
    out = []
    for layer, name in zip(layers, sites, strict=True):
        x, y = base[name][:, 1:].float(), tuned[name][:, 1:].float().to(base[name].device)
        share = ((x - y).norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-12)).flatten()
        out.append(LayerDifference(layer, share.median().item(), share.quantile(0.99).item()))
    return tuple(out)


def held_out_pairs(bridges: Mapping[str, Any], source: TokenSource, place: str, tokens: int) -> Iterator[Held]:
    """Both models' activations at the same held-out tokens, so many of them or a few more."""
    harvests = {
        name: BridgeActivations(one, source, sites=[place], documents=_DOCUMENTS, drop_norm=None)
        for name, one in bridges.items()
    }
    done = index = 0
    while done < tokens:
        base, tuned = (harvests[name].harvest(index) for name in (BASE, TUNED))
        keep = (~base.starts).nonzero()[:, 0]
        x, y = (one.activations[place].cpu()[keep.cpu()] for one in (base, tuned))
        yield Held(x, y, source.batch(index, _DOCUMENTS), keep.cpu())
        done, index = done + len(keep), index + 1


def measure(
    crosscoder: Crosscoder, bridges: Mapping[str, Any], source: TokenSource, place: str, tokens: int
) -> ModelDiff:
    width = int(bridges[BASE].cfg.d_model)
    if crosscoder.d_out != width:
        raise InputError(f"diff-models: the crosscoder reads width {crosscoder.d_out}, the models have {width}")
    sums = LatentScaling(crosscoder)
    for held in held_out_pairs(bridges, source, place, tokens):
        sums.add(held.base, held.tuned)
    return sums.result()


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
            x = torch.cat([held.base, held.tuned], 1).to(self.crosscoder.W_enc)
            fired = self.crosscoder.encode(x)[:, self.features]
        self.mass.index_add_(1, held.ids.flatten()[held.where], fired.T.float())
        if not len(self.features):
            return
        peaks = fired.max(0)
        for row, (value, at) in enumerate(zip(peaks.values.tolist(), peaks.indices.tolist(), strict=True)):
            if value > self.best[row][0]:
                document, pos = divmod(int(held.where[at]), held.ids.shape[1])
                shown = held.ids[document, max(1, pos - _CONTEXT + 1) : pos + 1].tolist()
                self.best[row] = (value, self.bridge.tokenizer.decode(shown).strip())

    def feature(self, feature: int, found: ModelDiff, *, tuned: bool) -> Feature:
        """One feature's figures and words, of the tuned model's direction or of the base model's."""
        row = self.place[feature]
        scaling, mass = found.of_tuned if tuned else found.of_base, self.mass[row]
        most = [i for i in mass.topk(_WORDS).indices.tolist() if mass[i] > 0.02 * mass.sum()]
        return Feature(
            feature,
            str(found.kinds[feature]),
            float(found.relative_norm[feature]),
            float(found.cosine[feature]),
            float(scaling.reconstruction[feature]),
            float(scaling.error[feature]),
            bool(found.is_specific(tuned=tuned)[feature]),
            float(found.novelty(tuned=tuned)[feature]),
            float(found.rate[feature]),
            float(found.peak[feature]),
            self._tokens(most),
            self.best[row][1],
            self.promoted[0][row],
            self.promoted[1][row],
        )
