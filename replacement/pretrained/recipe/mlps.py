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
from replacement.training.end_to_end import MLPReplacement, TokenBatch
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
        """Logits at the positions in `where` (None: all, not flattened), and every MLP's input and output, tokens
        flattened.
        """
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def listen(_module: torch.nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            inputs.append(arguments[0].flatten(0, 1))
            outputs.append(output.flatten(0, 1))

        handles = [block.mlp.register_forward_hook(listen) for block in self.blocks]
        try:
            logits = self._logits(tokens, where)
        finally:
            for handle in handles:
                handle.remove()
        return logits, Activations(torch.stack(inputs).float(), torch.stack(outputs).float())

    def replaced(
        self, tokens: Int[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"] | None, mlp: MLPReplacement
    ) -> Float[Tensor, "chosen vocab"]:
        """The same logits with the MLP of layer l computed as `mlp(l, input)`; gradients flow through."""
        for layer, block in enumerate(self.blocks):
            block.mlp.forward = _bind(mlp, layer)
        try:
            return self._logits(tokens, where)
        finally:
            for block in self.blocks:
                del block.mlp.forward

    def _logits(self, tokens: Int[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"] | None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == torch.bfloat16):
            hidden = self.model.model(tokens, use_cache=False).last_hidden_state
            return self.model.lm_head(hidden if where is None else hidden[where])


def _bind(mlp: MLPReplacement, layer: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return mlp(layer, x.float())

    return forward


class CorpusActivations:
    """Activations of a model on documents of the corpus; batch n has a seed of its own, BOS is left out."""

    def __init__(self, model: ReplaceableLlama, *, documents: int = 64, first_seed: int) -> None:
        self.model, self.documents, self.first_seed = model, documents, first_seed
        self.tokens = documents * (Corpus(0).batch(1).tokens.shape[1] - 2)

    @torch.no_grad()
    def batch(self, index: int) -> Activations:
        """The batch of this number; no logits are computed."""
        tokens = Corpus(self.first_seed + index).batch(self.documents).tokens[:, :-1]
        _, found = self.model.original(tokens, torch.zeros_like(tokens, dtype=torch.bool))
        return Activations(*(_without_first(part, self.documents).bfloat16() for part in found))


def _without_first(flat: Float[Tensor, "layers tokens width"], documents: int) -> Float[Tensor, "layers rest width"]:
    return flat.unflatten(1, (documents, -1))[:, :, 1:].flatten(1, 2)


def corpus_documents(index: int, *, documents: int, first_seed: int) -> TokenBatch:
    """Documents by number, with the mask of positions whose next token is an answer."""
    batch = Corpus(first_seed + index).batch(documents)
    return TokenBatch(batch.tokens[:, :-1], batch.answer[:, 1:])
