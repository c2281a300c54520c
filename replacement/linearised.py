"""How the parts of a model that no dictionary replaces become linear maps on a prompt.

An MLP is linearised by one of four rules, attention by its frozen pattern (in `replacement.linear`) or by its full
gradient. Each is a map `x -> J x` with its transpose; what `J x` and the constants miss is an error, kept by
`replacement.local`. Knows nothing of dictionaries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement.errors import InputError
from replacement.neurons import Neurons
from replacement.sites import BlockWeights, ForwardPass, Hook, freeze_hooks, hook_name, hooked

MLP_RULES = ("relp", "jacobian", "ig", "stop")
ATTENTION_RULES = ("frozen", "gradient")
PUSHED_BYTES = 16 * 2**20  #: of attention patterns, one for each change that is pushed through a full gradient at once


@dataclass(frozen=True)
class Linearisation:
    """What stands for MLPs and attention where no dictionary does.

    | mlp | the map |
    | --- | --- |
    | relp | layer-wise relevance: `act(z)` becomes `z` times its ratio, each factor of a gated product half of it |
    | jacobian | the gradient at the prompt |
    | ig | the gradient averaged over `steps` points between zero input and the prompt's (integrated gradients) |
    | stop | nothing passes |

    RelP (Jafari et al. 2025) is exact: only biases are left over. What the others miss is an error node. attention:
    "frozen" moves values by the prompt's pattern; "gradient" follows queries and keys too.
    """

    mlp: str = "relp"
    attention: str = "frozen"
    steps: int = 10

    def __post_init__(self) -> None:
        for name, known in (("mlp", MLP_RULES), ("attention", ATTENTION_RULES)):
            if getattr(self, name) not in known:
                raise InputError(f"linearisation {name}={getattr(self, name)!r}: needs one of {', '.join(known)}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise InputError(f"linearisation steps={self.steps!r}: needs a whole number, 1 or more")


class LinearMLP(NamedTuple):
    """An MLP with each neuron's derivatives held: `J = W_out (c_in W_in + c_gate W_gate)`, c by position and neuron."""

    neurons: Neurons
    c_in: Float[Tensor, "pos d_mlp"]
    c_gate: Float[Tensor, "pos d_mlp"] | None
    constant: Float[Tensor, "pos d_model"]

    def forward(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """`J x`."""
        hidden = self.c_in * (x @ self.neurons.W_enc.T)
        if self.c_gate is not None and self.neurons.W_gate is not None:
            hidden = hidden + self.c_gate * (x @ self.neurons.W_gate.T)
        return hidden @ self.neurons.W_dec

    def transpose(
        self, gradient: Float[Tensor, "n d_model"], positions: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d_model"]:
        """`J^T g` at listed positions, one a row."""
        hidden = gradient @ self.neurons.W_dec.T
        out = (hidden * self.c_in[positions]) @ self.neurons.W_enc
        if self.c_gate is not None and self.neurons.W_gate is not None:
            out = out + (hidden * self.c_gate[positions]) @ self.neurons.W_gate
        return out


def linear_mlp(neurons: Neurons, x: Float[Tensor, "pos d_model"], rule: Linearisation) -> LinearMLP:
    """The map that a rule other than "stop" makes of an MLP at its inputs on the prompt.

    Constants: `b_dec`, and for RelP the biases of the neurons times their ratios.
    """
    if rule.mlp == "relp":
        c_in, c_gate = neurons.ratios(x)
        inner = c_in * neurons.b_enc
        if c_gate is not None and neurons.b_gate is not None:
            inner = inner + c_gate * neurons.b_gate
        return LinearMLP(neurons, c_in, c_gate, inner @ neurons.W_dec + neurons.b_dec)
    shares = [1.0] if rule.mlp == "jacobian" else [(step + 0.5) / rule.steps for step in range(rule.steps)]
    points = [neurons.derivatives(share * x) for share in shares]  # midpoints of equal parts of the way from zero
    c_in = torch.stack([at for at, _ in points]).mean(0)
    gates = [gate for _, gate in points if gate is not None]
    c_gate = torch.stack(gates).mean(0) if gates else None
    return LinearMLP(neurons, c_in, c_gate, neurons.b_dec.expand(len(x), -1))


class AttentionGradient:
    """Attention's full gradient at the prompt, queries and keys included, by autograd through the model's own code."""

    def __init__(
        self,
        x: Float[Tensor, "pos d_model"],
        out: Float[Tensor, "pos d_model"],
        heads: Float[Tensor, "pos heads d_head"] | None,
        constant: Float[Tensor, " d_model"],
        *,
        at_once: int,
    ) -> None:
        """Take what one run computed, with its graph.

        heads: what each head gave to the output map; None where the model does not show it. at_once: changes that are
        pushed through together.
        """
        self.x, self.out, self.heads, self.constant, self.at_once = x, out, heads, constant, at_once

    def forward(self, x: Float[Tensor, "*n pos d_model"]) -> Float[Tensor, "*n pos d_model"]:
        """`J x`."""
        return self._push(self.out, x)

    def head_outputs(self, x: Float[Tensor, "*n pos d_model"]) -> Float[Tensor, "*n heads pos d_head"]:
        """The same, of what each head gives to the output map; raises InputError where the model does not show it."""
        if self.heads is None:
            raise InputError(
                "attention 'gradient' by head: this model does not show what each head gives to the output map; "
                "use 'frozen'"
            )
        return self._push(self.heads, x).transpose(-3, -2)

    def _push(self, out: Tensor, x: Tensor) -> Tensor:
        """`J x`, as the derivative of `J^T u` by u."""
        with torch.enable_grad():
            u = torch.zeros_like(out, requires_grad=True)
            (pulled,) = torch.autograd.grad(out, self.x, u, create_graph=True, retain_graph=True)

        def push(along: Tensor, *, batched: bool) -> Tensor:
            return torch.autograd.grad(pulled, u, along, retain_graph=True, is_grads_batched=batched)[0]

        x = x.to(self.x.dtype)
        if x.ndim == self.x.ndim:
            return push(x, batched=False)
        parts = x.flatten(0, -1 - self.x.ndim).split(self.at_once)
        return torch.cat([push(part, batched=True) for part in parts]).unflatten(0, x.shape[: -self.x.ndim])

    def transpose(self, gradient: Float[Tensor, "batch prefix d_model"]) -> Float[Tensor, "batch prefix d_model"]:
        """`J^T g`; attention is causal, so nothing comes out beyond the prefix."""
        batch, prefix, width = gradient.shape
        full = gradient.new_zeros(batch, len(self.x), width)
        full[:, :prefix] = gradient
        (pulled,) = torch.autograd.grad(self.out, self.x, full, retain_graph=True, is_grads_batched=True)
        return pulled[:, :prefix]


def attend_hooks(n_layers: int) -> list[Hook]:
    """Hooks that let gradients through attention's softmax in the scores' own precision.

    The bridge computes it in float32 whatever the model's precision is, so that its gradients are no linear map to
    float64's accuracy. Where it shows no scores (GPT-Neo), gradients go through the model's own softmax. Raises
    InputError where the patterns are no softmax of the scores.
    """
    scores: dict[int, Tensor] = {}

    def score(layer: int) -> Callable[..., None]:
        def hook(tensor: Tensor, hook: object) -> None:
            scores[layer] = tensor

        return hook

    def attend(layer: int) -> Callable[..., Tensor]:
        def hook(tensor: Tensor, hook: object) -> Tensor:
            if layer not in scores:
                return tensor
            own = scores[layer].masked_fill(tensor == 0, -torch.inf).softmax(-1)
            if not torch.allclose(own, tensor, atol=1e-3):
                raise InputError(
                    "attention 'gradient': this model's patterns are no softmax of its scores; use 'frozen'"
                )
            return tensor.detach() + (own - own.detach())

        return hook

    hooks: list[Hook] = []
    for layer in range(n_layers):
        hooks.append((hook_name(layer, "attn.hook_attn_scores"), score(layer)))
        hooks.append((hook_name(layer, "attn.hook_pattern"), attend(layer)))
    return hooks


def attention_gradients(bridge: Any, forward: ForwardPass, blocks: Sequence[BlockWeights]) -> list[AttentionGradient]:
    """One map a layer, from attention's input (after the norm) to its output (before a post-norm), by one hooked run.

    Attention's output bias is the map's constant.
    """
    inputs: dict[int, Tensor] = {}
    kept: dict[str, Tensor] = {}

    def enter(layer: int) -> Callable[..., Tensor]:
        def hook(tensor: Tensor, hook: object) -> Tensor:
            inputs[layer] = tensor[0].detach().requires_grad_()
            return inputs[layer][None]

        return hook

    def keep(name: str) -> Callable[..., None]:
        def hook(tensor: Tensor, hook: object) -> None:
            kept[name] = tensor[0]

        return hook

    layers = range(len(blocks))
    hooks = freeze_hooks(forward, norms=True, patterns=False)
    hooks += [(hook_name(layer, "attn.hook_in"), enter(layer)) for layer in layers]
    hooks += attend_hooks(len(blocks))
    names = [hook_name(layer, site) for layer in layers for site in ("attn.hook_z", "attn.hook_out")]
    hooks += [(name, keep(name)) for name in names if name in bridge.hook_dict]
    with torch.enable_grad():
        hooked(bridge, forward.tokens, hooks)
    zero = torch.zeros_like(forward.embedding[0])
    found = []
    for layer, (block, run) in enumerate(zip(blocks, forward.blocks, strict=True)):
        out = kept[hook_name(layer, "attn.hook_out")]
        heads = _head_outputs(kept.get(hook_name(layer, "attn.hook_z")), out, block)
        at_once = max(1, PUSHED_BYTES // (run.pattern.numel() * run.pattern.element_size()))
        constant = zero if block.b_O is None else block.b_O
        found.append(AttentionGradient(inputs[layer], out, heads, constant, at_once=at_once))
    return found


def _head_outputs(
    heads: Tensor | None, out: Float[Tensor, "pos d_model"], block: BlockWeights
) -> Float[Tensor, "pos heads d_head"] | None:
    """What the model shows as its heads' outputs; None where the output map does not make attention's output of it."""
    n_heads, d_head, _ = block.W_O.shape
    if heads is None or heads[0].numel() != n_heads * d_head:
        return None
    with torch.enable_grad():
        heads = heads.reshape(-1, n_heads, d_head)
    made = torch.einsum("phe,hed->pd", heads.detach(), block.W_O) + (0.0 if block.b_O is None else block.b_O)
    return heads if torch.allclose(made, out.detach(), atol=1e-3 * float(out.detach().abs().max())) else None
