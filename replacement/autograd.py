"""The reference engine: contributions by `torch.autograd` on the hooked language model.

Slow and independent of the linear path: the language model itself runs with attention patterns and norm scales held
constant by hooks, and what stands at every written site replaced by a leaf tensor plus the dictionary's skip. One
backward pass a target. Used by tests, on request, and for architectures that the linear path does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.contributions import Contributions, zero_contributions
from replacement.features import Targets
from replacement.linearised import LinearMLP, attend_hooks
from replacement.local import LocalModel
from replacement.sites import Hook, Place, Slot, freeze_hooks, hook_name, hooked


class AutogradEngine:
    """Rows by one backward pass a target."""

    def __init__(self, local: LocalModel, bridge: Any) -> None:
        self.local, self.bridge = local, bridge
        self._run()

    def _run(self) -> None:
        """One hooked forward pass whose graph all backward passes share."""
        local, forward = self.local, self.local.forward
        self.read: dict[tuple[int, str, bool], Tensor] = {}  # layer, site, whether it is written too -> what was read
        self.embedding = forward.embedding.clone().requires_grad_()
        self.leaves = {slot: torch.zeros_like(forward.embedding, requires_grad=True) for slot in local.slots}
        frozen = local.linearisation.attention == "frozen"
        hooks = freeze_hooks(forward, norms=True, patterns=frozen) + ([] if frozen else attend_hooks(local.n_layers))
        hooks.append((hook_name(0, "hook_resid_pre"), self._embed))
        for slot, dictionary in local.coverage.at.items():
            if dictionary.read != dictionary.write:
                hooks.append((hook_name(slot.layer, dictionary.read), self._keep(slot.layer, dictionary.read, False)))
        for layer in local.linearised:
            hooks += self._linearise(layer)
        for slot in local.slots:
            hooks += self._write(slot)
        hooks.append(("ln_final.hook_out", self._keep(local.n_layers, "", False)))
        with torch.enable_grad():
            hooked(self.bridge, forward.tokens, hooks)

    def _embed(self, tensor: Tensor, hook: object) -> Tensor:
        position = self.local.forward.position_embedding
        return (self.embedding if position is None else self.embedding + position)[None]

    def _keep(self, layer: int, site: str, written: bool) -> Callable[..., None]:
        def hook(tensor: Tensor, hook: object) -> None:
            self.read[layer, site, written] = tensor[0]

        return hook

    def _write(self, slot: Slot) -> list[Hook]:
        """Hooks that put leaves where a slot is written, and keep what stood there before."""
        local, layer, site = self.local, slot.layer, self.local.write_site(slot)
        if slot not in local.coverage.writes:  # a linearised part of the model: what it misses is a source
            return [(hook_name(layer, site), lambda tensor, hook: tensor + self.leaves[slot])]
        dictionary = local.coverage.at.get(slot)
        constant = local.forward.blocks[layer].at[site] - local.skip(slot)
        shift: list[Tensor] = []

        def replace(tensor: Tensor, hook: object) -> Tensor:
            self.read[layer, site, True] = tensor[0]
            skip: Tensor | float = 0.0
            if dictionary is not None and dictionary.W_skip is not None:
                skip = dictionary.skip(self.read[layer, dictionary.read, False])
            new = (constant + self.leaves[slot] + skip)[None]
            shift.append(new - tensor)
            return new

        hooks: list[Hook] = [(hook_name(layer, site), replace)]
        if slot.place is Place.MID:  # this hook feeds the MLP alone; the stream that goes by it changes as well
            hooks.append((hook_name(layer, "hook_resid_post"), lambda tensor, hook: tensor + shift[-1]))
        return hooks

    def _linearise(self, layer: int) -> list[Hook]:
        """Hooks that give an MLP's output the gradient that the chosen rule asks for; its value stays."""
        rule, seen = self.local.linearisation, self._keep(layer, "mlp.hook_in", False)
        mlp = self.local.path.mlps.get(layer)

        def replace(tensor: Tensor, hook: object) -> Tensor:
            if rule.mlp == "stop" or mlp is None:
                return tensor.detach()
            x = self.read[layer, "mlp.hook_in", False]
            stand_in = _relevance(mlp, x) if rule.mlp == "relp" else self._averaged(layer, x)
            return tensor.detach() + (stand_in - stand_in.detach()).view_as(tensor)

        if rule.mlp == "jacobian":
            return []
        return [(hook_name(layer, "mlp.hook_in"), seen), (hook_name(layer, "mlp.hook_out"), replace)]

    def _averaged(self, layer: int, x: Float[Tensor, "pos d_model"]) -> Tensor:
        """A function whose gradient at x is the mean of the MLP's own at points on the way from zero to x."""
        steps, mlp = self.local.linearisation.steps, self.bridge.blocks[layer].mlp.original_component
        shares = [(step + 0.5) / steps for step in range(steps)]
        return torch.stack([mlp((share * x)[None]) / share for share in shares]).mean(0)

    def rows(self, targets: Targets) -> Contributions:
        result = zero_contributions(self.local, len(targets.rows))
        last = targets.layer == self.local.n_layers
        x = self.read[(targets.layer, "", False) if last else (targets.layer, targets.site, targets.written)]
        leaves = [self.embedding, *self.leaves.values()]
        for row, (position, direction, bias) in enumerate(
            zip(targets.positions, targets.rows, targets.biases, strict=True)
        ):
            with torch.enable_grad():
                value = x[position] @ direction + bias
            nothing = [None] * len(leaves)  # of what reads an MLP that passes nothing
            found = (
                torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
                if value.requires_grad
                else nothing
            )
            gradients = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
            self._fill(row, value.detach(), gradients[0], gradients[1:], result)
        return result

    def _fill(
        self, row: int, value: Tensor, at_embedding: Tensor, at_slots: list[Tensor], result: Contributions
    ) -> None:
        local = self.local
        result.embeddings[row] = (at_embedding * local.forward.embedding).sum(-1)
        for index, (slot, gradient) in enumerate(zip(local.slots, at_slots, strict=True)):
            result.errors[row, index] = (gradient * local.errors[index]).sum(-1)
            result.bos[row] += gradient[0] @ local.bos[index]
            for writes in local.writes.get(slot, ()):
                found = (gradient[writes.position] * writes.vectors()).sum(-1)
                result.features[row, writes.first : writes.first + len(found)] += found
        sources = (result.features[row], result.errors[row], result.embeddings[row], result.bos[row])
        result.bias[row] = value - sum(part.sum() for part in sources)


def _relevance(mlp: LinearMLP, x: Float[Tensor, "pos d_model"]) -> Tensor:
    """An MLP with the ratio `act(z) / z` of each neuron held, and half of a gated product's gradient to each factor."""
    of = mlp.neurons
    pre = x @ of.W_enc.T + of.b_enc
    if of.W_gate is None:
        return (pre * of.ratio(pre).detach()) @ of.W_dec
    gate = x @ of.W_gate.T + (0.0 if of.b_gate is None else of.b_gate)
    passed = gate * of.ratio(gate).detach()
    return (pre * passed.detach() + pre.detach() * passed) @ of.W_dec / 2
