"""What a graph explains: logits, differences of logits, features, or directions, resolved on one prompt.

Turns what a user writes (`" Austin"`, `"Austin - Sacramento"`, `"L3#1204@7"`, token ids, vectors) into scalars that the
engine can read. Knows nothing of sweeps or graphs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from graphs.graph import PLACES
from replacement.errors import InputError
from replacement.features import Targets
from replacement.local import LocalModel
from replacement.model import ReplacementModel
from replacement.sites import Place, Slot

_FEATURE = re.compile(r"\s*L(\d{1,9})(?:\.(pre|attn|mid|mlp|post))?\s*#(\d{1,9})\s*@(-?\d{1,9})\s*")


class Direction(NamedTuple):
    """A direction at the last norm's output, used as it is (not demeaned)."""

    vector: Float[Tensor, " d_model"]
    label: str = "direction"
    weight: float = 1.0  # the target's share in influence, p


class Feature(NamedTuple):
    """A feature's pre-activation, written `L{layer}#{feature}@{position}`, or `L{layer}.{place}#...`.

    The place is needed only where a layer has several dictionaries.
    """

    layer: int
    feature: int
    position: int
    place: str = ""  # one of PLACES

    def __str__(self) -> str:
        return f"L{self.layer}{self.place and '.' + self.place}#{self.feature}@{self.position}"


Spec = str | int | Feature | Direction | Tensor


class Target(NamedTuple):
    """One scalar to explain: a feature's pre-activation, or `row . x[position] + bias` after the last norm."""

    position: int
    value: float  # on the prompt, from the forward pass
    label: str
    weight: float = 1.0  # p: probability of a token, 1 for anything else
    token: int = -1  # vocabulary id, -1 where the target is no token
    row: Float[Tensor, " d_model"] | None = None
    bias: float = 0.0
    feature: int = -1  # which of the local model's active features


def as_specs(targets: Spec | Sequence[Spec] | None) -> list[Spec] | None:
    """The targets as a list; None stands for the default, the most probable tokens."""
    if targets is None:
        return None
    if isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point():
        targets = targets.tolist()
    if isinstance(targets, str | Feature | Direction | Tensor) or not isinstance(targets, Iterable):
        targets = [targets]
    specs = [_as_spec(spec) for spec in targets]
    if not specs:
        raise InputError(
            "attribute(targets=[]): is empty; pass None for the most probable tokens, or at least one target"
        )
    return specs


def _as_spec(given: object) -> Spec:
    """One target as a known kind; raises InputError where it is none."""
    if isinstance(given, str):
        match = _FEATURE.fullmatch(given)
        if match is None:
            return given
        layer, place, feature, position = match.groups()
        return Feature(int(layer), int(feature), int(position), place or "")
    if isinstance(given, Feature | Direction) or (isinstance(given, Tensor) and given.is_floating_point()):
        return given
    if isinstance(given, Tensor) and given.ndim == 0 and given.dtype != torch.bool:
        return int(given)
    if isinstance(given, Integral) and not isinstance(given, bool):
        return int(given)
    raise InputError(
        f"attribute(targets=...): got a {type(given).__name__}, needs a token (text or id), 'A - B', "
        "'L3#1204@7' or Feature, a Direction, a vector, or a list of those"
    )


def last_position(specs: list[Spec] | None, position: int | None, n_positions: int) -> int:
    """The last position that any target reads; what comes after it cannot matter to them."""
    wanted = [] if position is None else [position]
    if specs is None or any(not isinstance(spec, Feature) for spec in specs):
        wanted += [-1] if position is None else []
    elif position is not None:
        raise InputError(f"position {position}: features bring their own, after the @; leave it out")
    wanted += [spec.position for spec in specs or [] if isinstance(spec, Feature)]
    for one in wanted:
        if isinstance(one, bool) or not isinstance(one, Integral) or not -n_positions <= one < n_positions:
            raise InputError(f"position {one!r}: the prompt has positions 0 to {n_positions - 1} (0 is BOS)")
    return max(one % n_positions for one in wanted)


def from_start(specs: list[Spec] | None, n_positions: int) -> list[Spec] | None:
    """The targets with features' positions counted from the start of the prompt, before what follows is cut off."""
    if specs is None:
        return None
    return [s._replace(position=s.position % n_positions) if isinstance(s, Feature) else s for s in specs]


def resolve(
    model: ReplacementModel,
    local: LocalModel,
    specs: list[Spec] | None,
    *,
    position: int,
    max_logits: int,
    logit_probability: float,
) -> list[Target]:
    """Targets on a prompt, in the order given; by default the most probable tokens, most probable first."""
    if specs is None:
        specs = list(salient_tokens(local, position, max_logits, logit_probability))
    return [_resolve(model, local, spec, position) for spec in specs]


def salient_tokens(local: LocalModel, position: int, max_logits: int, logit_probability: float) -> list[int]:
    """The smallest set of tokens that holds `logit_probability` of the next token's distribution, at most
    `max_logits`."""
    probabilities = local.forward.logits[position].softmax(-1)
    top, tokens = probabilities.topk(min(max_logits, len(probabilities)))
    enough = int(torch.searchsorted(top.cumsum(0), logit_probability)) + 1
    return tokens[:enough].tolist()


def _resolve(model: ReplacementModel, local: LocalModel, spec: Spec, position: int) -> Target:
    weights, forward = model.weights, local.forward
    if isinstance(spec, Feature):
        return _resolve_feature(model, local, spec)
    if isinstance(spec, Tensor):
        spec = Direction(spec)
    if isinstance(spec, Direction):
        _check_direction(spec, weights.W_U.shape[0])
        row, bias, weight, token, label = spec.vector.to(weights.W_U), 0.0, spec.weight, -1, spec.label
    elif isinstance(spec, str) and (pair := _difference(model, spec)):
        (plus, minus), token, weight, label = pair, -1, 1.0, spec.strip()
        row, bias = weights.W_U[:, plus] - weights.W_U[:, minus], float(weights.b_U[plus] - weights.b_U[minus])
    else:
        token = token_id(model, spec) if isinstance(spec, str) else int(spec)
        if not 0 <= token < weights.W_U.shape[1]:
            raise InputError(f"target {token}: token ids of {model.name} are 0 to {weights.W_U.shape[1] - 1}")
        row = weights.W_U[:, token] - weights.W_U.mean(-1)
        bias = float(weights.b_U[token] - weights.b_U.mean())
        weight = float(forward.logits[position].softmax(-1)[token])
        label = model.token_strings(torch.tensor([token]))[0]
    value = float(forward.final[position] @ row) + bias
    return Target(position, value, label, weight, token, row, bias)


def _check_direction(direction: Direction, d_model: int) -> None:
    vector, weight = direction.vector, direction.weight
    if not isinstance(vector, Tensor) or vector.shape != (d_model,) or not torch.isfinite(vector).all():
        got = f"got shape {list(vector.shape)}" if isinstance(vector, Tensor) else f"got a {type(vector).__name__}"
        raise InputError(f"target {direction.label!r}: needs a finite vector of width {d_model}, {got}")
    if not 0 <= weight < math.inf:
        raise InputError(f"target {direction.label!r}: has weight {weight}, needs a finite number, 0 or more")


def _resolve_feature(model: ReplacementModel, local: LocalModel, spec: Feature) -> Target:
    name = str(spec)
    slot = slot_of(model, spec.layer, spec.place, what=f"target {name}", feature=spec.feature)
    if not 0 <= spec.feature < model.coverage.at[slot].n_features:
        raise InputError(
            f"target {name}: no such feature in {model.coverage.name}; it has features 0 to "
            f"{model.coverage.at[slot].n_features - 1} there"
        )
    table = local.features
    here = local.filed_at(slot) & (table.feature == spec.feature)
    found = here & (table.position == spec.position)
    if not found.any():
        where = sorted(set(table.position[here].tolist()))
        active = f"it is at positions {', '.join(map(str, where))}" if where else "it is nowhere on this prompt"
        raise InputError(f"target {name}: is not active there; {active}")
    index = int(found.nonzero()[0, 0])
    at = f"L{spec.layer}" if slot.place is Place.MLP else f"L{spec.layer}.{PLACES[slot.place]}"
    label = model.coverage.label(slot, spec.feature) or f"{at} #{spec.feature}"
    return Target(spec.position, float(table.activation[index]), label, feature=index)


def slot_of(model: ReplacementModel, layer: int, place: str, *, what: str, feature: int) -> Slot:
    """Where a feature stands; raises InputError, `what` first, where there is nothing, or more than one thing."""
    slots = [slot for slot in model.coverage.at if slot.layer == layer]
    chosen = [slot for slot in slots if not place or PLACES[slot.place] == place]
    if len(chosen) == 1:
        return chosen[0]
    if not slots:
        layers = sorted({slot.layer for slot in model.coverage.at})
        known = f"layers are {layers[0]} to {layers[-1]}" if layers else "it has none"
        raise InputError(f"{what}: no such feature in {model.coverage.name}; {known}")
    names = " or ".join(f"L{layer}.{PLACES[slot.place]}#{feature}" for slot in slots)
    raise InputError(f"{what}: needs the place of a dictionary in layer {layer}; write {names}")


def token_id(model: ReplacementModel, text: str) -> int:
    """The one token that a text is; raises InputError where it is several or unknown."""
    tokenizer = model.bridge.tokenizer
    for variant in dict.fromkeys((text, text.strip(), " " + text.strip())):
        ids = tokenizer(variant, add_special_tokens=False)["input_ids"] if variant.strip() else []
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return int(ids[0])
    if not text.strip():
        raise InputError(f"target {text!r}: is empty; give a token such as ' Austin'")
    ids = model.word_ids(text, what=f"target {text!r}")
    pieces = " | ".join(model.token_strings(torch.tensor(ids)))
    raise InputError(f"target {text!r}: is several tokens ({pieces}); pass one of them")


def _difference(model: ReplacementModel, text: str) -> tuple[int, int] | None:
    """The two tokens of `"A - B"`, None where the text is no difference."""
    plus, dash, minus = text.partition(" - ")
    if not dash or not plus.strip() or not minus.strip():
        return None
    return token_id(model, plus), token_id(model, minus)


def reads(local: LocalModel, targets: list[Target]) -> list[Targets]:
    """Targets of one depth as the engine takes them; their rows add up over the list."""
    if targets[0].row is None:
        return local.feature_targets(torch.tensor([target.feature for target in targets]).to(local.forward.tokens))
    rows = torch.stack([target.row for target in targets if target.row is not None])
    positions = torch.tensor([target.position for target in targets], device=rows.device)
    biases = torch.tensor([target.bias for target in targets], dtype=rows.dtype, device=rows.device)
    return [Targets(local.n_layers, "", positions, rows, biases)]


def depth(local: LocalModel, target: Target) -> int:
    """Where a target stands in the order of computation, comparable with the depths of features."""
    return local.n_layers * len(Place) if target.row is not None else int(local.features.depth[target.feature])
