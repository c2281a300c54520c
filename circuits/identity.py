"""What tells one trace's rows from another's: all that decides them, weights by what they made of the prompt.

Knows models and what is asked of them; nothing of files, nor of how rows are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits import __version__
from circuits.saved_rows import Identity
from circuits.tracer import Tracer
from graphs.graph import PLACES
from replacement.local import LocalModel
from replacement.model import ReplacementModel

ALIKE = 1e-5  #: relative difference up to which numbers are the same: another number of threads rounds otherwise
ROUGHLY = 1e-3  #: the same for models in half precision


def identity(model: ReplacementModel, tracer: Tracer, settings: Mapping[str, Any]) -> Identity:
    """What decides a trace's rows; settings: those that are not seen on model and tracer, as JSON values."""
    local, rule = tracer.local, tracer.local.linearisation
    table = np.stack([column.cpu().numpy() for column in local.features[:4]])
    named = {
        "version": __version__,
        "model": model.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "dictionaries": [model.coverage.name, *model.loaded_from],
        "prompt": local.forward.tokens.tolist(),
        "targets": [[one.label, one.position, one.token, one.feature] for one in tracer.targets],
        **settings,
        "mlp": rule.mlp,
        "attention": rule.attention,
        "ig_steps": rule.steps,
        "features": sha256(table.tobytes()).hexdigest(),
        "sources": tracer.n_sources,
        # to the byte: a vector is given, and a difference is one subtraction; a token's direction has a mean in it,
        # which threads may round otherwise, but its number says which it is
        "directions": [_digest(one.row) for one in tracer.targets if one.row is not None and one.token < 0],
    }
    measured = {"logits": float(local.forward.logits.double().abs().mean())}
    for number, one in enumerate(tracer.targets):
        measured[f"weight of target {number + 1}"] = float(one.weight)
        if one.row is not None:
            measured[f"direction of target {number + 1}"] = float(one.row.double().abs().sum())
    alike = ALIKE if model.dtype in (torch.float32, torch.float64) else ROUGHLY
    return Identity(named, measured | _activations(model, local) | _written(local), alike)


def _activations(model: ReplacementModel, local: LocalModel) -> dict[str, float]:
    """What encoders decide, by slot."""
    return {
        f"activations at L{slot.layer}.{PLACES[slot.place]}": float(
            local.features.activation[local.filed_at(slot)].double().sum()
        )
        for slot in model.coverage.at
    }


def _written(local: LocalModel) -> dict[str, float]:
    """What decoders, biases and skips decide, by slot: how large what they write is, and how large what they miss.

    Each beside the size of what stands at the site, as dictionaries that miss nothing leave a sum of roundings. What is
    at position 0 is often so large that nothing else would be seen in the same sum.
    """
    found = {}
    for slot, errors, bos in zip(local.slots, local.errors, local.bos, strict=True):
        site, name = local.forward.blocks[slot.layer].at[local.write_site(slot)], f"L{slot.layer}.{PLACES[slot.place]}"
        for where, stands, missed in (("", site[1:], errors[1:]), (" of position 0", site[:1], errors[:1] + bos)):
            size = _size(stands)
            found[f"writes at {name}{where}"] = size + _size(stands - missed)
            found[f"errors at {name}{where}"] = size + _size(missed)
    return found


def _size(vectors: Float[Tensor, "n d_model"]) -> float:
    return float(vectors.double().abs().sum())


def _digest(row: Float[Tensor, " d_model"]) -> str:
    return sha256(row.detach().double().cpu().numpy().tobytes()).hexdigest()
