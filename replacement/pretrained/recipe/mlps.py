"""A Llama model's MLPs, read and replaced: what the trainer and the evaluation need of transformers.

Knows where a `LlamaForCausalLM` keeps its MLPs; knows nothing of dictionaries or training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LlamaForCausalLM

from replacement.pretrained.recipe.corpus import Corpus
from replacement.substitution import Replacement
from replacement.training.end_to_end import TokenBatch
from replacement.training.kinds import MLP_IN, MLP_OUT, hook
from replacement.training.source import Activations


class ReplaceableLlama:
    """A frozen Llama model whose MLPs can be listened to and swapped for functions; position 0 like any other."""

    def __init__(self, model: LlamaForCausalLM, *, precision: torch.dtype = torch.float32) -> None:
        """precision: of the model's own matrix products; bfloat16 halves a training step and is too coarse for
        figures.
        """
        self.model = model.eval().requires_grad_(False)
        self.model.config._attn_implementation = "eager"  # its backward is much the fastest on a CPU at this length
        self.blocks, self.precision = model.model.layers, precision

    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        """The original model's logits everywhere."""
        return self._logits(tokens, None)

    def original(
        self, tokens: Int[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"] | None = None
    ) -> tuple[Float[Tensor, "chosen vocab"], Activations]:
        """Logits at the positions in `where` (None: all, not flattened), and every MLP's input and output by
        hook, tokens flattened.
        """
        found: dict[str, Tensor] = {}

        def listen(layer: int) -> Callable[..., None]:
            def keep(_module: torch.nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
                found[hook(layer, MLP_IN)] = arguments[0].flatten(0, 1).float()
                found[hook(layer, MLP_OUT)] = output.flatten(0, 1).float()

            return keep

        handles = [block.mlp.register_forward_hook(listen(layer)) for layer, block in enumerate(self.blocks)]
        try:
            logits = self._logits(tokens, where)
        finally:
            for handle in handles:
                handle.remove()
        return logits, found

    def replaced(
        self, tokens: Int[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"] | None, replacement: Replacement
    ) -> Float[Tensor, "chosen vocab"]:
        """The same logits with MLP outputs replaced; gradients flow through."""
        for layer, block in enumerate(self.blocks):
            block.mlp.forward = _bind(replacement, layer, block.mlp.forward)
        try:
            return self._logits(tokens, where)
        finally:
            for block in self.blocks:
                del block.mlp.forward

    def _logits(self, tokens: Int[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"] | None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == torch.bfloat16):
            hidden = self.model.model(tokens, use_cache=False).last_hidden_state
            return self.model.lm_head(hidden if where is None else hidden[where])


def _bind(replacement: Replacement, layer: int, mlp: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            replacement.read(hook(layer, MLP_IN), x.float())
            out = replacement.write(hook(layer, MLP_OUT))
        return mlp(x) if out is None else out

    return forward


class CorpusActivations:
    """Activations of a model on documents of the corpus; batch n has a seed of its own, BOS is left out."""

    def __init__(self, model: ReplaceableLlama, *, documents: int = 64, first_seed: int) -> None:
        self.model, self.documents, self.first_seed = model, documents, first_seed
        self.sites = tuple(hook(layer, site) for layer in range(len(model.blocks)) for site in (MLP_IN, MLP_OUT))

    @torch.no_grad()
    def batch(self, index: int) -> Activations:
        """The batch of this number; no logits are computed."""
        tokens = Corpus(self.first_seed + index).batch(self.documents).tokens[:, :-1]
        _, found = self.model.original(tokens, torch.zeros_like(tokens, dtype=torch.bool))
        return {name: _without_first(part, self.documents).bfloat16() for name, part in found.items()}


def _without_first(flat: Float[Tensor, "tokens width"], documents: int) -> Float[Tensor, "rest width"]:
    return flat.unflatten(0, (documents, -1))[:, 1:].flatten(0, 1)


def corpus_documents(index: int, *, documents: int, first_seed: int) -> TokenBatch:
    """Documents by number, with the mask of positions whose next token is an answer."""
    batch = Corpus(first_seed + index).batch(documents)
    return TokenBatch(batch.tokens[:, :-1], batch.answer[:, 1:])
