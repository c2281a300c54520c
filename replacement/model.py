"""A language model with its dictionaries: loading, tokens, forward passes, and the local model of a prompt.

This is what users import. It owns a TransformerBridge and a DictionarySet; it knows nothing of graphs.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement import formats, sites
from replacement.autograd import AutogradEngine
from replacement.contributions import Engine, LinearEngine
from replacement.coverage import Coverage, place
from replacement.crosscoder import Crosscoder
from replacement.dictionary import Dictionary, DictionarySet
from replacement.errors import InputError
from replacement.finite import all_finite
from replacement.linearised import Linearisation
from replacement.loading import load_bridge
from replacement.local import LocalModel
from replacement.neurons import Neurons, neurons
from replacement.starts import start_token
from replacement.sweep import Transposed

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
ENGINES = ("linear", "autograd")
PRODUCTS = {"exact": None, "bfloat16": torch.bfloat16}  #: precisions of attention's products; None: the model's own


def check_engine(name: str, products: str, attention: str) -> None:
    """Raise InputError unless there is such an engine, and it makes such products where attention is linearised so."""
    for what, given, known in (("engine", name, ENGINES), ("products", products, PRODUCTS)):
        if given not in known:
            raise InputError(f"{what} {given!r}: needs one of {', '.join(known)}")
    if name == "autograd" and products != "exact":
        raise InputError(f"products {products!r}: engine 'autograd' is the reference, and exact; use engine 'linear'")
    if attention == "gradient" and products != "exact":
        raise InputError(
            f"products {products!r}: attention's full gradient is made by the model's own code; use 'frozen'"
        )


class ReplacementModel:
    """A language model parts of which are replaced by dictionaries, exactly, with error nodes for what they miss.

    Any layers, any of their sites: what no dictionary covers is linearised on the prompt (`Linearisation`).
    """

    def __init__(self, bridge: Any, dictionaries: DictionarySet | Sequence[DictionarySet], *, name: str) -> None:
        """Take a TransformerBridge and its dictionaries; raises InputError where they do not fit each other."""
        self.bridge, self.name = bridge, name
        self._neurons: dict[int, Neurons] = {}
        self.loaded_from: tuple[str, ...] = ()
        """What `load` was given as dictionaries, in its words."""
        self.coverage = Coverage([dictionaries] if isinstance(dictionaries, DictionarySet) else dictionaries)
        parameter = next(bridge.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        # products are computed in at least float32: the rows of a graph have to add up
        self.compute_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        if self.dtype == torch.float64:
            sites.use_exact_norms(bridge)
        self.weights = sites.read_weights(bridge, self.compute_dtype)
        for dictionary in self.coverage:
            self._check(dictionary)
            dictionary.compute_in(self.device, self.compute_dtype)

    @property
    def dictionaries(self) -> DictionarySet:
        """The set of dictionaries, where there is one; raises InputError where there are several."""
        if len(self.coverage.sets) != 1:
            raise InputError(f"{self.name}: has the sets {self.coverage.name}; ask `coverage` for them")
        return self.coverage.sets[0]

    @classmethod
    def load(
        cls,
        model: str | Path = "atlas",
        *,
        dictionaries: str | Path | Sequence[str | Path] | None = None,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> ReplacementModel:
        """Load a language model and its dictionaries.

        model: a shipped model's name, a Hugging Face directory, or a hub id (weights in safetensors).
        dictionaries: a folder, a hub id, the name of a set shipped with the model, or "neurons" (the model's own MLP
            neurons, no training needed), or several of those; None takes the shipped set `transcoders`, or the
            first where none is called so. Beside other sets, "neurons" takes the MLPs that those leave, at
            least one.
        dtype: "float32", "float64", "bfloat16" or "float16".
        device: a torch device, "cpu" or "cuda".
        Raises InputError, one line, where anything is missing, damaged or does not fit.
        """
        if dtype not in DTYPES:
            raise InputError(f"load(dtype={dtype!r}): needs one of {', '.join(DTYPES)}")
        bridge, folder = load_bridge(model, DTYPES[dtype], device)
        several = isinstance(dictionaries, Sequence) and not isinstance(dictionaries, str)
        wanted: list[Any] = list(dictionaries) if several else [dictionaries]  # type: ignore[arg-type]
        stored = [one for one in wanted if str(one) != "neurons"]
        sets = [formats.load(formats.find(one, folder, str(model))) for one in stored]
        if len(stored) < len(wanted):
            compute = torch.float64 if dtype == "float64" else torch.float32
            taken = {slot.layer for slot in Coverage(sets).writes if slot.place is sites.Place.MLP}
            free = [layer for layer in range(len(bridge.blocks)) if layer not in taken]
            if not free:
                pairs = zip(stored, sets, strict=True)
                names = [str(one) for one, each in pairs if any(place(d) is sites.Place.MLP for d in each)]
                raise InputError(
                    f"load(dictionaries='neurons'): every MLP is replaced by {' and '.join(names)}; leave 'neurons' out"
                )
            sets.append(neurons(bridge, compute, layers=free))
        made = cls(bridge, sets, name=str(model))
        made.loaded_from = tuple(sets[0].name if one is None else str(one) for one in wanted)
        return made

    # ---- tokens

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.weights.blocks)

    @property
    def n_context(self) -> int:
        """Longest prompt, in tokens."""
        return int(self.bridge.cfg.n_ctx)

    def tokenize(self, prompt: str | Int[Tensor, " pos"]) -> Int[Tensor, " pos"]:
        """Token ids of a prompt.

        A string is tokenized without special tokens, and the BOS token is put before it unless it begins with a special
        token. A tensor of ids is taken as it is. Raises InputError for an empty prompt, a word that the vocabulary
        lacks, ids out of range, or more tokens than the model's context.
        """
        tokens = self._encode(prompt) if isinstance(prompt, str) else prompt
        if not isinstance(tokens, Tensor):
            raise InputError(f"prompt: needs a string or a 1-D tensor of token ids, got a {type(prompt).__name__}")
        if tokens.ndim != 1 or tokens.dtype not in (torch.int32, torch.int64):
            raise InputError(
                f"prompt: needs a string or a 1-D tensor of token ids, got {list(tokens.shape)} {tokens.dtype}"
            )
        vocabulary = self.weights.W_U.shape[1]
        if len(tokens) == 0:
            raise InputError("prompt: is empty; give at least one word")
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise InputError(
                f"prompt: token ids must be in 0 to {vocabulary - 1}, got {tokens.min()} to {tokens.max()}"
            )
        if len(tokens) > self.n_context:
            raise InputError(
                f"prompt: has {len(tokens)} tokens (with BOS), {self.name} takes at most {self.n_context}; shorten it"
            )
        return tokens.long().to(self.device)

    def _encode(self, prompt: str) -> Int[Tensor, " pos"]:
        tokenizer = self.bridge.tokenizer
        if not prompt.strip():
            raise InputError("prompt: is empty; give at least one word")
        ids = self.word_ids(prompt, what="prompt")
        start = start_token(tokenizer)
        if ids and ids[0] not in tokenizer.all_special_ids and start is not None:
            ids.insert(0, start)
        return torch.tensor(ids, dtype=torch.long)

    def word_ids(self, text: str, *, what: str) -> list[int]:
        """Token ids of a text without special tokens; raises InputError, `what` first, for an unknown word."""
        tokenizer = self.bridge.tokenizer
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
        ids = list(encoded["input_ids"])
        if tokenizer.is_fast and tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            start, end = encoded["offset_mapping"][ids.index(tokenizer.unk_token_id)]
            raise InputError(f"{what}: {self._unknown_word(text[start:end])}")
        return ids

    def _unknown_word(self, word: str) -> str:
        tokenizer = self.bridge.tokenizer
        words = {token.lower(): token for token in tokenizer.get_vocab() if token not in tokenizer.all_special_tokens}
        near = [words[match] for match in difflib.get_close_matches(word.lower(), words, n=3)]
        hint = f"near: {', '.join(near)}; " if near else ""
        return f"{word!r} is not in the vocabulary of {self.name}; {hint}use other words or pass another model"

    def token_strings(self, tokens: Int[Tensor, " n"]) -> list[str]:
        """Each token as text, leading spaces kept where the tokenizer has them."""
        tokenizer, strings = self.bridge.tokenizer, []
        for token in tokens.tolist():
            piece = tokenizer.convert_ids_to_tokens(token) or ""
            strings.append(piece.replace("▁", " ") if "▁" in piece else tokenizer.decode([token]))
        return strings

    # ---- passes

    def logits(self, prompt: str | Int[Tensor, " pos"]) -> Float[Tensor, "pos vocab"]:
        """The language model's own logits, nothing replaced."""
        with torch.no_grad():
            return self.bridge(self.tokenize(prompt)[None])[0]

    def local(
        self,
        prompt: str | Int[Tensor, " pos"],
        *,
        trace_bos: bool = False,
        linearisation: Linearisation | None = None,
    ) -> LocalModel:
        """The prompt's local replacement model, from one forward pass.

        trace_bos: whether position 0 carries features and errors like any other; by the field's convention it does not.
        linearisation: what stands for MLPs without a dictionary, and for attention; None for the default.
        """
        rule = Linearisation() if linearisation is None else linearisation
        if rule.attention == "gradient":
            self.require_own_precision("attention 'gradient'")
        with torch.no_grad():
            forward = sites.forward(self.bridge, self.tokenize(prompt), self.compute_dtype)
            if not all_finite(forward.logits):
                raise InputError(
                    f"{self.name}: the logits of this prompt are not finite; check the weights, or use float32"
                )
            return LocalModel(
                self.weights,
                forward,
                self.coverage,
                trace_bos=trace_bos,
                linearisation=rule,
                own_neurons=self._own_neurons,
                bridge=self.bridge,
            )

    def _own_neurons(self, layers: Sequence[int]) -> dict[int, Neurons]:
        """The neurons of the MLPs of some layers, kept for the next prompt."""
        if missing := [layer for layer in layers if layer not in self._neurons]:
            found = neurons(self.bridge, self.compute_dtype, layers=missing)
            self._neurons |= {one.layer: cast(Neurons, one.requires_grad_(False)) for one in found}
        return {layer: self._neurons[layer] for layer in layers}

    def engine(self, local: LocalModel, name: str, *, products: str = "exact", room: int | None = None) -> Engine:
        """The engine that computes rows: "linear" (fast) or "autograd" (reference).

        products: "exact", or "bfloat16": attention's matrix products of the linear engine are then rounded to it, their
        sums kept in the model's own precision. room: bytes that it may keep from row to row; None: as much as helps.
        """
        check_engine(name, products, local.linearisation.attention)
        if name == "linear":
            return LinearEngine(local, self._transposed, products=PRODUCTS[products], room=room)
        self.require_own_precision("engine 'autograd'")
        if local.linearisation.attention == "frozen":
            self.require_frozen_patterns("engine 'autograd'")
        return AutogradEngine(local, self.bridge)

    def require_own_precision(self, what: str) -> None:
        """Raise InputError, `what` first, where the model computes in less than the rows of a graph do."""
        if self.dtype != self.compute_dtype:
            raise InputError(
                f"{what}: needs a model in float32 or float64, {self.name} is in "
                f"{str(self.dtype).removeprefix('torch.')}; load it with dtype='float32'"
            )

    def require_frozen_patterns(self, what: str) -> None:
        """Raise InputError, `what` first, where the bridge takes no edits of this model's attention patterns."""
        if not self._patterns_take_edits:
            raise InputError(
                f"{what}: needs attention patterns that can be held, and the bridge's hook_pattern has no effect in "
                f"{self.name}; use the linear engine, or freeze='everything'"
            )

    @cached_property
    def _transposed(self) -> Transposed:
        return Transposed(self.weights)

    @cached_property
    def _patterns_take_edits(self) -> bool:
        return sites.patterns_take_edits(self.bridge)

    def _check(self, dictionary: Dictionary) -> None:
        """Raise InputError unless the dictionary's layers, sites and widths fit the model."""
        where = f"dictionaries {self.coverage.name}, layer {dictionary.layer}"
        n_layers, d_model = len(self.weights.blocks), self.weights.W_U.shape[0]
        last = max((dictionary.layer, *dictionary.write_layers))
        if last >= n_layers:
            raise InputError(f"{where}: reaches layer {last}, {self.name} has layers 0 to {n_layers - 1}")
        parts = len(dictionary.parts) if isinstance(dictionary, Crosscoder) else 1
        for verb, width in (("reads", dictionary.d_in // parts), ("writes", dictionary.d_out)):
            if width != d_model:
                raise InputError(f"{where}: {verb} vectors of width {width}, {self.name} has d_model {d_model}")
        mid = "hook_resid_mid"
        if self.weights.parallel and (dictionary.read == mid or place(dictionary) is sites.Place.MID):
            raise InputError(f"{where}: reads {mid}, which {self.name} does not have (attention and MLP are parallel)")
