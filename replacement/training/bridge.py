"""A TransformerBridge as a model whose activations can be replaced while gradients flow: for the end-to-end stage.

Start tokens are left out everywhere: dictionaries are not trained on them, and they keep the model's own values.
Activations and logits stay where the model is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from replacement.errors import InputError
from replacement.starts import start_token, start_tokens
from replacement.substitution import Replacement
from replacement.training.data.tokens import TokenSource
from replacement.training.end_to_end import TokenBatch
from replacement.training.source import Activations

_ALIKE = 8
"""Batches whose rows are sorted by how much text they hold."""


class ReplaceableBridge:
    """A frozen TransformerBridge that can be listened to and replaced at named hooks."""

    def __init__(self, bridge: Any, sites: Sequence[str]) -> None:
        """sites: full names of the hooks that dictionaries read or write."""
        self.bridge, self.sites = bridge, tuple(sites)
        self._start = None if bridge.tokenizer is None else start_token(bridge.tokenizer)
        bridge.requires_grad_(False)

    def documents(self, rows: Int[Tensor, "batch pos"]) -> TokenBatch:
        """Rows as a batch of the stage, no token marked as an answer.

        All get as many text tokens: what a row has beyond the others, at its end, becomes start tokens, so that
        processes that share the rows have as many as each other. Nothing before them sees that. Raises `InputError` for
        a row without text.
        """
        text = ~start_tokens(rows, self._start)
        if not text.any(1).all():
            raise InputError(
                "train(end_to_end=...): a row holds start tokens alone; leave empty documents out of the data"
            )
        if self._start is not None:
            text &= text.cumsum(1) <= text.sum(1).min()
            rows = rows.where(text, self._start)
        return TokenBatch(rows, torch.zeros_like(text))

    def batches(self, source: TokenSource, documents: int) -> Callable[[int], TokenBatch]:
        """Batches of so many rows of the source, by number; every row is in one of them, as in the source's own.

        Of every 8 batches the rows with the least text come first: rows that are short by several documents, each with
        its start token, are cut where their like are, and not the others with them.
        """
        last: dict[int, Tensor] = {}

        def batch(index: int) -> TokenBatch:
            group, place = divmod(index, _ALIKE)
            if group not in last:
                rows = torch.cat([source.batch(group * _ALIKE + i, documents) for i in range(_ALIKE)])
                last.clear()
                last[group] = rows[self._text(rows).sum(1).argsort(stable=True)]
            return self.documents(last[group][place * documents : (place + 1) * documents])

        return batch

    def original(
        self, tokens: Int[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"]
    ) -> tuple[Float[Tensor, "chosen vocab"], Activations]:
        """Logits at the positions in `where`, and activations at all sites, flattened; without start tokens."""
        found: dict[str, Tensor] = {}
        text = self._text(tokens)

        def keep(name: str) -> Callable[..., None]:
            def hook(tensor: Tensor, hook: object) -> None:
                found[name] = tensor.detach().flatten(2)[text.to(tensor.device)]

            return hook

        return self._run(tokens, where & text, [(name, keep(name)) for name in self.sites]), found

    def replaced(
        self, tokens: Int[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"], replacement: Replacement
    ) -> Float[Tensor, "chosen vocab"]:
        """The same logits with what `replacement` writes at the sites, but for start tokens."""
        text = self._text(tokens)
        places = text.nonzero(as_tuple=True)

        def put(name: str) -> Callable[..., Tensor | None]:
            def hook(tensor: Tensor, hook: object) -> Tensor | None:
                flat, there = tensor.flatten(2), tuple(index.to(tensor.device) for index in places)
                replacement.read(name, flat[there])
                out = replacement.write(name)
                return None if out is None else flat.index_put(there, out.to(flat)).view_as(tensor)

            return hook

        return self._run(tokens, where & text, [(name, put(name)) for name in self.sites])

    def _text(self, tokens: Tensor) -> Tensor:
        return ~start_tokens(tokens.cpu(), self._start)

    def _run(self, tokens: Tensor, where: Tensor, hooks: list[tuple[str, Callable[..., Tensor | None]]]) -> Tensor:
        with warnings.catch_warnings():  # the bridge warns that edited values round differently; that is meant here
            warnings.simplefilter("ignore", UserWarning)
            device = next(self.bridge.parameters()).device
            logits = self.bridge.run_with_hooks(tokens.to(device), fwd_hooks=hooks)
            return logits[where.to(logits.device)]
