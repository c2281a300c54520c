"""The kinds of dictionaries that are trained: what each one reads and writes, and what it becomes when it is done.

| kind | reads | writes |
| --- | --- | --- |
| transcoder, skip_transcoder | `mlp.hook_in` of a layer | `mlp.hook_out` of that layer |
| clt | `mlp.hook_in` of a layer | `mlp.hook_out` of that layer and all later ones |
| sae | a site of a layer | the same |
| causal_crosscoder | a site of a layer | that site of that layer and all later ones |
| crosscoder | a site of all layers (or of several models) | the same |

A new kind is a function here and a row in `_PLANS`. Knows hooks by name only, and nothing of losses or steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from replacement.activation import Activation
from replacement.cross_layer import CrossLayerTranscoder
from replacement.crosscoder import Crosscoder
from replacement.dictionary import LearnedDictionary
from replacement.encoding import Encoding
from replacement.errors import InputError
from replacement.sites import hook_name
from replacement.training.config import TrainingConfig
from replacement.transcoder import Transcoder

MLP_IN, MLP_OUT = "mlp.hook_in", "mlp.hook_out"


class Plan(NamedTuple):
    """One dictionary: full names of the hooks that it reads (side by side) and writes."""

    layer: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    skip: bool = False
    across: bool = False
    """Whether it is part of a set that writes across layers, even where only its own layer is left to write."""


class Weights(NamedTuple):
    """Tensors of a trained dictionary on unscaled activations."""

    W_enc: Float[Tensor, "rows d_in"]
    b_enc: Float[Tensor, " rows"]
    W_dec: Float[Tensor, "n_features n_writes d_out"]
    b_dec: Float[Tensor, "n_writes d_out"]
    W_skip: Float[Tensor, "d_out d_in"] | None
    activation: Activation
    encoding: Encoding


def hook(layer: int, site: str, model: str = "") -> str:
    """Full name of a site, of a named model where there are several: `tuned:blocks.3.hook_resid_post`."""
    return f"{model}:{hook_name(layer, site)}" if model else hook_name(layer, site)


def _own_layer(config: TrainingConfig, layers: Sequence[int]) -> list[Plan]:
    read, write = (config.site, config.site) if config.kind == "sae" else (MLP_IN, MLP_OUT)
    skip = config.kind == "skip_transcoder"
    return [Plan(layer, (hook(layer, read),), (hook(layer, write),), skip) for layer in layers]


def _later_layers(config: TrainingConfig, layers: Sequence[int]) -> list[Plan]:
    read, write = (MLP_IN, MLP_OUT) if config.kind == "clt" else (config.site, config.site)
    if list(layers) != list(range(layers[0], layers[-1] + 1)):
        raise InputError(
            f"TrainingConfig(kind={config.kind!r}, layers={tuple(layers)}): needs layers without a gap, "
            "each dictionary writes to all later ones"
        )
    later = [tuple(hook(j, write) for j in layers if j >= layer) for layer in layers]
    return [Plan(layer, (hook(layer, read),), writes, across=True) for layer, writes in zip(layers, later, strict=True)]


def _all_at_once(config: TrainingConfig, layers: Sequence[int], models: Sequence[str] = ("",)) -> list[Plan]:
    names = tuple(hook(layer, config.site, model) for model in models for layer in layers)
    return [Plan(layers[0], names, names)]


_PLANS: dict[str, Callable[[TrainingConfig, Sequence[int]], list[Plan]]] = {
    "transcoder": _own_layer,
    "skip_transcoder": _own_layer,
    "sae": _own_layer,
    "clt": _later_layers,
    "causal_crosscoder": _later_layers,
    "crosscoder": _all_at_once,
}


def plans(config: TrainingConfig, n_layers: int, models: Sequence[str] = ()) -> list[Plan]:
    """The dictionaries that a config asks for, of a model with that many layers.

    models: names of several models whose sites one crosscoder reads side by side. Raises `InputError` for layers that
    the model lacks, several models with another kind, or a number of k that is not one each.
    """
    layers = config.layers or tuple(range(n_layers))
    if layers[-1] >= n_layers:
        raise InputError(f"TrainingConfig(layers={config.layers}): the model has layers 0 to {n_layers - 1}")
    if not models:
        planned = _PLANS[config.kind](config, layers)
        config.of(0, len(planned))  # raises where there is not one number each
        return planned
    if config.kind != "crosscoder":
        raise InputError(f"TrainingConfig(kind={config.kind!r}): several models need kind='crosscoder'")
    config.of(0, 1)
    return _all_at_once(config, layers, models)


def sites(planned: Sequence[Plan]) -> tuple[str, ...]:
    """All hooks that are read or written, each once."""
    return tuple(dict.fromkeys(name for plan in planned for name in (*plan.reads, *plan.writes)))


def build(plan: Plan, weights: Weights) -> LearnedDictionary:
    """The dictionary of a plan, for inference."""
    read, write = (site_of(names[0]) for names in (plan.reads, plan.writes))
    if len(plan.reads) > 1:
        return Crosscoder(
            parts=plan.reads,
            site=read,
            W_enc=weights.W_enc,
            b_enc=weights.b_enc,
            W_dec=weights.W_dec,
            b_dec=weights.b_dec,
            activation=weights.activation,
            encoding=weights.encoding,
        )
    common: dict[str, Any] = {"layer": plan.layer, "read": read, "write": write, "b_dec": weights.b_dec[0]}
    common |= {"W_enc": weights.W_enc, "b_enc": weights.b_enc}
    common |= {"activation": weights.activation, "encoding": weights.encoding}
    if not plan.across:
        return Transcoder(**common, W_dec=weights.W_dec[:, 0].contiguous(), W_skip=weights.W_skip)
    return CrossLayerTranscoder(**common, W_dec=weights.W_dec)


def site_of(name: str) -> str:
    """The site of a hook, without its layer and model."""
    return name.split(".", 2)[2]
