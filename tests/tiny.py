"""Tiny random language models of every supported family, and random dictionaries for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    set_seed,
)

from replacement.activation import Activation, BatchTopK, JumpReLU, ReLU, TopK
from replacement.cross_layer import CrossLayerTranscoder
from replacement.dictionary import Dictionary, DictionarySet
from replacement.encoding import LINEAR, Encoding, Kronecker, Switch
from replacement.transcoder import Transcoder

VOCABULARY = 60
CONTEXT = 32
PROMPT = "w3 w14 w15 w9 w26 w5 w35"

_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
_SIZES |= {"intermediate_size": 40, "max_position_embeddings": CONTEXT}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 6}

FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_SIZES, **_GROUPED),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=24, n_layer=3, n_head=4, n_inner=40),
    "gemma2": lambda: Gemma2Config(
        **_SIZES,
        num_key_value_heads=2,
        head_dim=10,
        query_pre_attn_scalar=12,
        sliding_window=3,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=4.0,
    ),
    "neox": lambda: GPTNeoXConfig(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES, **_GROUPED),
}
READS = {
    "llama": "mlp.hook_in",
    "gpt2": "ln2.hook_normalized",
    "gemma2": "mlp.hook_in",
    "neox": "mlp.hook_in",
    "qwen3": "hook_resid_mid",
}
ENCODERS = ("switch", "kronecker")
"""Kinds of `random_set` that are skip transcoders with that encoder."""
WRITES = {"gemma2": "mlp.hook_out"}  # before the post-norm; hook_mlp_out elsewhere


def save_tiny_model(family: str, folder: Path) -> Path:
    """A random model of the family, weights large enough that nothing is negligible, with a word-level tokenizer."""
    set_seed(len(family))
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.25 if parameter.ndim > 1 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    return folder


def activation(name: str, n_features: int, seed: int) -> Activation:
    """An activation function with thresholds that let some features through."""
    threshold = torch.rand(n_features, generator=torch.Generator().manual_seed(seed))
    made = {
        "relu": ReLU(),
        "topk": TopK(7),
        "jumprelu": JumpReLU(threshold),
        "batchtopk": BatchTopK(threshold.mean(), 7),
    }
    return made[name]


def random_encoding(name: str, d_model: int, seed: int) -> tuple[Encoding, float]:
    """A switch of 3 experts, or pairs of 2 and 3 rows; and how many encoder rows a feature there are."""
    if name == "switch":
        generator = torch.Generator().manual_seed(seed)
        router = torch.randn(3, d_model, generator=generator), torch.randn(3, generator=generator)
        return Switch(router[0] / d_model**0.5, 0.1 * router[1]), 1
    return (Kronecker(2, 3), 5 / 6) if name == "kronecker" else (LINEAR, 1)


def random_transcoder(
    *,
    layer: int,
    read: str,
    write: str,
    n_features: int,
    d_model: int,
    activation: Activation,
    skip: bool,
    seed: int,
    encoder: str = "linear",
) -> Transcoder:
    """A transcoder with random weights."""
    generator = torch.Generator().manual_seed(seed)
    encoding, share = random_encoding(encoder, d_model, seed)
    n_rows = round(n_features * share)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Transcoder(
        layer=layer,
        read=read,
        write=write,
        W_enc=normal(n_rows, d_model) / d_model**0.5,
        b_enc=0.1 * normal(n_rows),
        W_dec=normal(n_features, d_model) / n_features**0.5,
        b_dec=0.1 * normal(d_model),
        activation=activation,
        W_skip=0.3 * normal(d_model, d_model) / d_model**0.5 if skip else None,
        encoding=encoding,
    )


def random_set(family: str, kind: str, activation_name: str, cfg: Any, n_features: int = 30) -> DictionarySet:
    """Random dictionaries for all layers."""
    read, write = READS[family], WRITES.get(family, "hook_mlp_out")
    by_layer: dict[int, Dictionary] = {}
    for layer in range(cfg.n_layers):
        act = activation(activation_name, n_features, layer)
        base = random_transcoder(
            layer=layer, read=read, write=write, n_features=n_features, d_model=cfg.d_model, activation=act,
            skip=kind in ("skip_transcoder", *ENCODERS), seed=layer, encoder=kind if kind in ENCODERS else "linear",
        )  # fmt: skip
        if kind != "cross_layer_transcoder":
            by_layer[layer] = base
            continue
        generator = torch.Generator().manual_seed(100 + layer)
        W_dec = torch.randn(n_features, cfg.n_layers - layer, cfg.d_model, generator=generator) / n_features**0.5
        by_layer[layer] = CrossLayerTranscoder(
            layer=layer, read=read, write=write, W_enc=base.W_enc.detach(), b_enc=base.b_enc.detach(), W_dec=W_dec,
            b_dec=base.b_dec.detach(), activation=act,
        )  # fmt: skip
    return DictionarySet(by_layer, f"random {kind}")
