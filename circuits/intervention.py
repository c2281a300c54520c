"""What happens when a feature is set to another value: the check of a graph against the model itself.

Each intervention adds `(value - activation) d` where its feature writes. With attention frozen, everything else is
recomputed by the real language model; with everything frozen only the graph's own linear paths transmit, which gives
the exact direct effects. Follows circuit-tracer's conventions (Hanna et al. 2025).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.targets import slot_of
from graphs.graph import PLACES
from replacement import sites
from replacement.crosscoder import Crosscoder
from replacement.errors import InputError
from replacement.linear import apply_norm
from replacement.linearised import Linearisation
from replacement.local import soft_cap
from replacement.model import ReplacementModel
from replacement.sites import Place, Slot

FREEZES = ("nothing", "attention", "everything")


class Intervention(NamedTuple):
    """Set a feature to a value at one position; of an acausal crosscoder's, what it writes at that layer."""

    layer: int
    position: int
    feature: int
    value: float
    place: str = ""  # pre, attn, mid, mlp or post; needed only where a layer has several dictionaries


def intervene(
    model: ReplacementModel,
    prompt: str | Int[Tensor, " pos"],
    interventions: Sequence[Intervention | tuple[int, int, int, float] | tuple[int, int, int, float, str]],
    *,
    freeze: str = "attention",
    linearisation: Linearisation | None = None,
) -> Float[Tensor, "pos vocab"]:
    """The logits with features set to given values.

    freeze: "attention" (patterns as on the prompt, all else recomputed), "everything" (patterns, norm scales and what
        stands at written sites as on the prompt: only the linear paths of the graph transmit), or "nothing".
    linearisation: with "everything", what passes through MLPs without a dictionary.
    A feature that is given twice at one position gets the last value.
    Raises InputError for a value that is not finite, or a layer, position or feature that does not exist.
    """
    if freeze not in FREEZES:
        raise InputError(f"intervene(freeze={freeze!r}): needs one of {', '.join(FREEZES)}")
    if freeze == "attention":
        model.require_frozen_patterns("intervene(freeze='attention')")
    tokens = model.tokenize(prompt)
    made = [_check(model, one, len(tokens)) for one in interventions]
    checked = list({(*one[:3], one.place): one for one in made}.values())
    with torch.no_grad():
        if freeze == "everything":
            return _linear(model, tokens, checked, linearisation)
        return _rerun(model, tokens, checked, freeze)


def _check(model: ReplacementModel, given: Sequence[Any], n_positions: int) -> Intervention:
    if not 4 <= len(given) <= 5 or any(isinstance(i, bool) or not isinstance(i, Integral) for i in given[:3]):
        raise InputError(f"intervene({given}): needs (layer, position, feature, value), the first three whole numbers")
    one = Intervention(*given)
    if not math.isfinite(one.value):
        raise InputError(f"{one}: needs a finite value")
    slot = slot_of(model, one.layer, one.place, what=f"{one}", feature=one.feature)
    if not 0 <= one.feature < model.coverage.at[slot].n_features:
        raise InputError(f"{one}: features of layer {one.layer} are 0 to {model.coverage.at[slot].n_features - 1}")
    if not -n_positions <= one.position < n_positions:
        raise InputError(f"{one}: positions of this prompt are 0 to {n_positions - 1}")
    return one._replace(position=one.position % n_positions, place=PLACES[slot.place])


def _slot(one: Intervention) -> Slot:
    return Slot(one.layer, Place(PLACES.index(one.place)))


def _changes(
    model: ReplacementModel, slot: Slot, of_slot: list[Intervention], activations: Float[Tensor, "pos n_features"]
) -> Iterator[tuple[Slot, int, Float[Tensor, " d_model"]]]:
    """What interventions on features of one slot add: slot that is written, position, vector."""
    dictionary = model.coverage.at[slot]
    layers = (slot.layer,) if isinstance(dictionary, Crosscoder) else dictionary.write_layers
    for one in of_slot:
        change = one.value - activations[one.position, one.feature]
        feature = torch.tensor([one.feature], device=activations.device)
        for layer in layers:
            yield Slot(layer, slot.place), one.position, change * dictionary.write_rows(feature, layer)[0]


def _rerun(
    model: ReplacementModel, tokens: Int[Tensor, " pos"], interventions: list[Intervention], freeze: str
) -> Float[Tensor, "pos vocab"]:
    """The language model itself, with hooks that add each feature's change; activations are those of this very run.

    A crosscoder reads layers that come after its writes: of its features the prompt's own activations are taken.
    """
    forward = sites.forward(model.bridge, tokens, model.compute_dtype)
    hooks: list[sites.Hook] = sites.freeze_hooks(forward, norms=False) if freeze == "attention" else []
    added: dict[Slot, Tensor] = defaultdict(lambda: torch.zeros_like(forward.embedding))  # filled as the run goes up
    by_slot: dict[Slot, list[Intervention]] = defaultdict(list)
    for one in interventions:
        by_slot[_slot(one)].append(one)

    def note(slot: Slot, activations: Float[Tensor, "pos n_features"]) -> None:
        for written, position, vector in _changes(model, slot, by_slot[slot], activations):
            added[written][position] += vector

    def reader(slot: Slot) -> Callable[..., None]:
        return lambda tensor, hook: note(slot, model.coverage.at[slot].encode(tensor[0].to(model.compute_dtype)))

    def writer(slot: Slot) -> Callable[..., Tensor]:
        return lambda tensor, hook: tensor + added[slot].to(tensor.dtype) if slot in added else tensor

    for slot in (slot for slot in model.coverage.writes if slot.place is Place.MID):
        # the middle's hook feeds the MLP alone; the stream that goes by it changes as well, before its end is read
        hooks.append((sites.hook_name(slot.layer, "hook_resid_post"), writer(slot)))
    for slot in by_slot:
        dictionary = model.coverage.at[slot]
        if isinstance(dictionary, Crosscoder):
            parts = [forward.blocks[layer].at[dictionary.read] for layer in dictionary.part_layers]
            note(slot, dictionary.encode(torch.cat(parts, -1)))
        else:
            hooks.append((sites.hook_name(slot.layer, dictionary.read), reader(slot)))
    for slot, site in model.coverage.writes.items():
        hooks.append((sites.hook_name(slot.layer, site), writer(slot)))
    return sites.hooked(model.bridge, tokens, hooks)


def _linear(
    model: ReplacementModel,
    tokens: Int[Tensor, " pos"],
    interventions: list[Intervention],
    linearisation: Linearisation | None,
) -> Float[Tensor, "pos vocab"]:
    """The change carried up the frozen linear path, added to the residual stream of the prompt."""
    local, weights = model.local(tokens, trace_bos=True, linearisation=linearisation), model.weights
    added: dict[Slot, Tensor] = {}
    for one in interventions:
        activations = model.coverage.at[_slot(one)].encode(local.read(model.coverage.at[_slot(one)]))
        for slot, position, vector in _changes(model, _slot(one), [one], activations):
            added.setdefault(slot, torch.zeros_like(local.forward.embedding))[position] += vector
    *_, change = local.carry(added.get)
    final = local.forward.final + apply_norm(weights.ln_final, local.forward.ln_final_scale, change, bias=False)
    return soft_cap(final @ weights.W_U + weights.b_U, weights.logit_soft_cap)
