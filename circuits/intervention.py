"""What happens when a feature is set to another value: the check of a graph against the model itself.

Each intervention adds `(value - activation) d` where its feature writes. With attention frozen, everything else is
recomputed by the real language model; with everything frozen only the graph's own linear paths transmit, which gives
the exact direct effects. Follows circuit-tracer's conventions (Hanna et al. 2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement import sites
from replacement.errors import InputError
from replacement.linear import apply_norm
from replacement.local import soft_cap
from replacement.model import ReplacementModel

FREEZES = ("nothing", "attention", "everything")


class Intervention(NamedTuple):
    """Set a feature to a value at one position."""

    layer: int
    position: int
    feature: int
    value: float


def intervene(
    model: ReplacementModel,
    prompt: str | Int[Tensor, " pos"],
    interventions: Sequence[Intervention | tuple[int, int, int, float]],
    *,
    freeze: str = "attention",
) -> Float[Tensor, "pos vocab"]:
    """The logits with features set to given values.

    freeze: "attention" (patterns as on the prompt, all else recomputed), "everything" (patterns, norm scales and MLP
        outputs as on the prompt: only the linear paths of the graph transmit), or "nothing".
    A feature that is given twice at one position gets the last value.
    Raises InputError for a value that is not finite, or a layer, position or feature that does not exist.
    """
    if freeze not in FREEZES:
        raise InputError(f"intervene(freeze={freeze!r}): needs one of {', '.join(FREEZES)}")
    if freeze == "attention":
        model.require_frozen_patterns("intervene(freeze='attention')")
    tokens = model.tokenize(prompt)
    made = [_check(model, one, len(tokens)) for one in interventions]
    checked = list({one[:3]: one for one in made}.values())
    with torch.no_grad():
        return _linear(model, tokens, checked) if freeze == "everything" else _rerun(model, tokens, checked, freeze)


def _check(
    model: ReplacementModel, given: Intervention | tuple[int, int, int, float], n_positions: int
) -> Intervention:
    if len(given) != 4 or any(isinstance(i, bool) or not isinstance(i, Integral) for i in given[:3]):
        raise InputError(f"intervene({given}): needs (layer, position, feature, value), the first three whole numbers")
    one = Intervention(*given)
    if not math.isfinite(one.value):
        raise InputError(f"{one}: needs a finite value")
    dictionary = model.dictionaries.by_layer.get(one.layer)
    if dictionary is None:
        raise InputError(f"{one}: layers are 0 to {model.n_layers - 1}")
    if not 0 <= one.feature < dictionary.n_features:
        raise InputError(f"{one}: features of layer {one.layer} are 0 to {dictionary.n_features - 1}")
    if not -n_positions <= one.position < n_positions:
        raise InputError(f"{one}: positions of this prompt are 0 to {n_positions - 1}")
    return one._replace(position=one.position % n_positions)


def _rerun(
    model: ReplacementModel, tokens: Int[Tensor, " pos"], interventions: list[Intervention], freeze: str
) -> Float[Tensor, "pos vocab"]:
    """The language model itself, with hooks that add each feature's change; activations are those of this very run."""
    hooks: list[sites.Hook] = []
    if freeze == "attention":
        hooks += sites.freeze_hooks(sites.forward(model.bridge, tokens, model.compute_dtype), norms=False)
    changes: dict[int, list[tuple[int, Tensor]]] = {}  # write layer -> (position, vector), filled as the run goes up

    def reader(layer: int, of_layer: list[Intervention]) -> Callable[..., None]:
        dictionary = model.dictionaries.by_layer[layer]

        def hook(tensor: Tensor, hook: object) -> None:
            activations = dictionary.encode(tensor[0].to(model.compute_dtype))
            for one in of_layer:
                change = one.value - activations[one.position, one.feature]
                feature = torch.tensor([one.feature], device=tensor.device)
                for write_layer in dictionary.write_layers:
                    vector = change * dictionary.write_rows(feature, write_layer)[0]
                    changes.setdefault(write_layer, []).append((one.position, vector))

        return hook

    def writer(layer: int) -> Callable[..., Tensor]:
        def hook(tensor: Tensor, hook: object) -> Tensor:
            tensor = tensor.clone()
            for position, vector in changes.get(layer, ()):
                tensor[0, position] += vector.to(tensor.dtype)
            return tensor

        return hook

    by_layer: dict[int, list[Intervention]] = {}
    for one in interventions:
        by_layer.setdefault(one.layer, []).append(one)
    for layer, of_layer in sorted(by_layer.items()):
        hooks.append((sites.hook_name(layer, model.dictionaries.by_layer[layer].read), reader(layer, of_layer)))
    write_layers = {layer for one in by_layer for layer in model.dictionaries.by_layer[one].write_layers}
    for layer in sorted(write_layers):
        site = model.dictionaries.writers(layer)[0].write
        hooks.append((sites.hook_name(layer, site), writer(layer)))
    return sites.hooked(model.bridge, tokens, hooks)


def _linear(
    model: ReplacementModel, tokens: Int[Tensor, " pos"], interventions: list[Intervention]
) -> Float[Tensor, "pos vocab"]:
    """The change carried up the frozen linear path, added to the residual stream of the prompt."""
    local = model.local(tokens, trace_bos=True)
    path, weights = local.path, model.weights
    change = torch.zeros_like(local.forward.embedding)
    for layer in range(model.n_layers):
        attention = path.attention(layer, change, bias=False)
        middle = path.middle(layer, change, attention)
        value = torch.zeros_like(change)
        dictionary = model.dictionaries.by_layer[layer]
        value += dictionary.skip(path.read(layer, dictionary.read, middle, bias=False))
        for one in interventions:
            writer = model.dictionaries.by_layer[one.layer]
            if layer in writer.write_layers:
                x = local.forward.blocks[one.layer].reads[writer.read][one.position]
                activation = writer.encode(x[None])[0, one.feature]
                feature = torch.tensor([one.feature], device=value.device)
                value[one.position] += (one.value - activation) * writer.write_rows(feature, layer)[0]
        change = change + attention + path.write(layer, local.write_site(layer), value, bias=False)
    final = local.forward.final + apply_norm(weights.ln_final, local.forward.ln_final_scale, change, bias=False)
    return soft_cap(final @ weights.W_U + weights.b_U, weights.logit_soft_cap)
