"""A TransformerBridge as a model whose activations can be replaced while gradients flow: for the end-to-end stage.

The first position (BOS) is left out everywhere: dictionaries are not trained on it, and it keeps the model's own
values. Activations and logits stay where the model is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from replacement.substitution import Replacement
from replacement.training.source import Activations


class ReplaceableBridge:
    """A frozen TransformerBridge that can be listened to and replaced at named hooks."""

    def __init__(self, bridge: Any, sites: Sequence[str]) -> None:
        """sites: full names of the hooks that dictionaries read or write."""
        self.bridge, self.sites = bridge, tuple(sites)
        bridge.requires_grad_(False)

    def original(
        self, tokens: Int[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"]
    ) -> tuple[Float[Tensor, "chosen vocab"], Activations]:
        """Logits at the positions in `where`, and activations at all sites, flattened; without the first position."""
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(tensor: Tensor, hook: object) -> None:
                found[name] = tensor.detach()[:, 1:].flatten(2).flatten(0, 1)

            return hook

        return self._run(tokens, where, [(name, keep(name)) for name in self.sites]), found

    def replaced(
        self, tokens: Int[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"], replacement: Replacement
    ) -> Float[Tensor, "chosen vocab"]:
        """The same logits with what `replacement` writes at the sites, but for the first position."""

        def put(name: str) -> Callable[..., Tensor | None]:
            def hook(tensor: Tensor, hook: object) -> Tensor | None:
                replacement.read(name, tensor[:, 1:].flatten(2))
                out = replacement.write(name)
                if out is None:
                    return None
                return torch.cat([tensor[:, :1], out.to(tensor).view_as(tensor[:, 1:])], 1)

            return hook

        return self._run(tokens, where, [(name, put(name)) for name in self.sites])

    def _run(self, tokens: Tensor, where: Tensor, hooks: list[tuple[str, Callable[..., Tensor | None]]]) -> Tensor:
        with warnings.catch_warnings():  # the bridge warns that edited values round differently; that is meant here
            warnings.simplefilter("ignore", UserWarning)
            device = next(self.bridge.parameters()).device
            logits = self.bridge.run_with_hooks(tokens.to(device), fwd_hooks=hooks)
            where = where.to(logits.device, copy=True)
            where[:, 0] = False
            return logits[where]
