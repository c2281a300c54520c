"""The reference engine: contributions by `torch.autograd` on the hooked language model.

Slow and independent of the linear path: the language model itself runs with attention patterns and norm scales held
constant by hooks, and every MLP's output replaced by a leaf tensor plus the dictionary's skip. One backward pass a
target. Used by tests, on request, and for architectures that the linear path does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.contributions import Contributions, zero_contributions
from replacement.local import LocalModel, Targets
from replacement.sites import freeze_hooks, hook_name, hooked


class AutogradEngine:
    """Rows by one backward pass a target."""

    def __init__(self, local: LocalModel, bridge: Any) -> None:
        self.local, self.bridge = local, bridge
        self._run()

    def _run(self) -> None:
        """One hooked forward pass whose graph all backward passes share."""
        local, forward = self.local, self.local.forward
        self.read: dict[tuple[int, str], Tensor] = {}
        self.embedding = forward.embedding.clone().requires_grad_()
        self.written = [torch.zeros_like(forward.embedding, requires_grad=True) for _ in range(local.n_layers)]
        hooks = freeze_hooks(forward, norms=True)

        def embed(tensor: Tensor, hook: object) -> Tensor:
            position = forward.position_embedding
            return (self.embedding if position is None else self.embedding + position)[None]

        def keep(layer: int, site: str) -> Callable[..., None]:
            def hook(tensor: Tensor, hook: object) -> None:
                self.read[layer, site] = tensor[0]

            return hook

        def replace(layer: int, value: Float[Tensor, "pos d_model"]) -> Callable[..., Tensor]:
            def hook(tensor: Tensor, hook: object) -> Tensor:
                dictionary = local.dictionaries.by_layer.get(layer)
                skip = 0.0 if dictionary is None else dictionary.skip(self.read[layer, dictionary.read])
                return (value + self.written[layer] + skip)[None]

            return hook

        hooks.append((hook_name(0, "hook_resid_pre"), embed))
        for layer in range(local.n_layers):
            dictionary = local.dictionaries.by_layer.get(layer)
            if dictionary is not None:
                hooks.append((hook_name(layer, dictionary.read), keep(layer, dictionary.read)))
            hooks.append((hook_name(layer, local.write_site(layer)), replace(layer, self._constant(layer))))
        hooks.append(("ln_final.hook_out", keep(local.n_layers, "")))
        with torch.enable_grad():
            hooked(self.bridge, forward.tokens, hooks)

    def _constant(self, layer: int) -> Float[Tensor, "pos d_model"]:
        """The MLP's output of `layer` without its skip: features, error, bos and b_dec as they are on the prompt."""
        local = self.local
        dictionary = local.dictionaries.by_layer.get(layer)
        value = local.forward.blocks[layer].writes[local.write_site(layer)]
        if dictionary is None or dictionary.W_skip is None:
            return value.clone()
        return value - dictionary.skip(local.forward.blocks[layer].reads[dictionary.read])

    def rows(self, targets: Targets) -> Contributions:
        result = zero_contributions(self.local, len(targets.rows))
        site = "" if targets.layer == self.local.n_layers else targets.site
        x = self.read[targets.layer, site]
        leaves = [self.embedding, *self.written]
        for row, (position, direction, bias) in enumerate(
            zip(targets.positions, targets.rows, targets.biases, strict=True)
        ):
            with torch.enable_grad():
                value = x[position] @ direction + bias
            found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
            gradients = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
            self._fill(row, value.detach(), gradients[0], gradients[1:], result)
        return result

    def _fill(
        self, row: int, value: Tensor, at_embedding: Tensor, at_writes: list[Tensor], result: Contributions
    ) -> None:
        local = self.local
        result.embeddings[row] = (at_embedding * local.forward.embedding).sum(-1)
        for layer, gradient in enumerate(at_writes):
            result.errors[row, layer] = (gradient * local.errors[layer]).sum(-1)
            result.bos[row] += gradient[0] @ local.bos[layer]
            writes = local.writes[layer]
            result.features[row].index_add_(0, writes.source, (gradient[writes.position] * writes.vectors).sum(-1))
        sources = (result.features[row], result.errors[row], result.embeddings[row], result.bos[row])
        result.bias[row] = value - sum(part.sum() for part in sources)
