"""Mixes of dictionaries for the tiny models, ways to linearise what they leave, and the table of both."""

from __future__ import annotations

import torch

from circuits import attribute
from replacement.activation import JumpReLU, ReLU, TopK
from replacement.cross_layer import CrossLayerTranscoder
from replacement.crosscoder import Crosscoder
from replacement.dictionary import DictionarySet
from replacement.linearised import ATTENTION_RULES, MLP_RULES, Linearisation
from replacement.neurons import neurons
from tests.tiny import ENCODERS, FAMILIES, PROMPT, random_set, random_transcoder

WIDTH = 24


def saes(site: str, layers: tuple[int, ...] = (0, 1, 2)) -> DictionarySet:
    """SAEs of different widths and activations at one site."""
    activations = [ReLU(), TopK(5), JumpReLU(torch.full((20,), 0.3))]
    made = {
        layer: random_transcoder(
            layer=layer,
            read=site,
            write=site,
            n_features=(30, 25, 20)[layer],
            d_model=WIDTH,
            activation=activations[layer],
            skip=False,
            seed=50 + layer,
        )
        for layer in layers
    }
    return DictionarySet(made, site)


def crosscoder(site: str = "hook_resid_post", *, causal: bool) -> DictionarySet:
    normal = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=normal) / 5

    if not causal:
        parts = tuple(f"blocks.{layer}.{site}" for layer in range(3))
        one = Crosscoder(parts=parts, site=site, W_enc=draw(30, 3 * WIDTH), b_enc=draw(30), W_dec=draw(30, 3, WIDTH),
                         b_dec=draw(3, WIDTH), activation=ReLU())  # fmt: skip
        return DictionarySet({0: one}, "crosscoder")
    made = {
        layer: CrossLayerTranscoder(
            layer=layer,
            read=site,
            write=site,
            W_enc=draw(20, WIDTH),
            b_enc=draw(20),
            W_dec=draw(20, 3 - layer, WIDTH),
            b_dec=draw(WIDTH),
            activation=ReLU(),
        )
        for layer in range(3)
    }
    return DictionarySet(made, "causal crosscoder")


def some(family: str, kind: str, bridge: object, layers: tuple[int, ...]) -> DictionarySet:
    every = random_set(family, kind, "relu", bridge.cfg)
    return DictionarySet({layer: every.by_layer[layer] for layer in layers}, kind)


MIXES = {
    "nothing": lambda family, bridge: [],
    "sae post": lambda family, bridge: [saes("hook_resid_post")],
    "sae pre, one layer": lambda family, bridge: [saes("hook_resid_pre", (1,))],
    "sae first pre": lambda family, bridge: [saes("hook_resid_pre", (0,))],
    "sae mid": lambda family, bridge: [saes("hook_resid_mid", (0, 2))],
    "sae attention": lambda family, bridge: [saes("attn.hook_out")],
    "sae attention, after the norm": lambda family, bridge: [saes("hook_attn_out", (1, 2))],
    "sae mlp": lambda family, bridge: [saes("mlp.hook_out")],
    "sae mlp, after the norm": lambda family, bridge: [saes("hook_mlp_out", (0, 1))],
    "sae mid and post": lambda family, bridge: [saes("hook_resid_mid"), saes("hook_resid_post", (0, 2))],
    "sparse feature circuits": lambda family, bridge: [
        saes("hook_resid_post"), saes("hook_attn_out"), saes("hook_mlp_out"),
    ],
    "causal crosscoder": lambda family, bridge: [crosscoder(causal=True)],
    "crosscoder": lambda family, bridge: [crosscoder(causal=False)],
    "crosscoder of mlps": lambda family, bridge: [crosscoder("mlp.hook_out", causal=False)],
    "mixed": lambda family, bridge: [
        some(family, "skip_transcoder", bridge, (0,)), saes("hook_resid_post", (1,)),
        neurons(bridge, torch.float64, layers=[2]),
    ],
    "clt and attention": lambda family, bridge: [
        random_set(family, "cross_layer_transcoder", "relu", bridge.cfg), saes("attn.hook_out", (0, 1)),
    ],
    "transcoders and stream": lambda family, bridge: [
        some(family, "transcoder", bridge, (0, 2)), saes("hook_resid_pre", (1, 2)),
    ],
}  # fmt: skip
KINDS = ("transcoder", "skip_transcoder", "cross_layer_transcoder", *ENCODERS)
ALONE = {kind: lambda family, bridge, kind=kind: [some(family, kind, bridge, (1, 2))] for kind in KINDS}
ALONE["neurons"] = lambda family, bridge: [neurons(bridge, torch.float64, layers=[1, 2])]
"""Kinds by themselves; layer 0 is left to be linearised."""
RULES = {
    "relp": Linearisation(),
    "jacobian": Linearisation(mlp="jacobian"),
    "ig": Linearisation(mlp="ig", steps=4),
    "stop": Linearisation(mlp="stop"),
    "gradient": Linearisation(mlp="jacobian", attention="gradient"),
}
TABLE = [(family, mix, "relp") for family in FAMILIES for mix in MIXES]
TABLE += [("llama", mix, rule) for mix in MIXES for rule in RULES if rule != "relp"]
TABLE += [
    (family, mix, rule)
    for family in FAMILIES
    for mix in ("nothing", "sparse feature circuits", "mixed")
    for rule in RULES
    if rule != "relp" and family != "llama"
]
TABLE = [row for row in TABLE if row[0] != "neox" or "mid" not in row[1]]
EVERY_RULE = {
    f"{mlp}, {attention}": Linearisation(mlp=mlp, attention=attention, steps=4)
    for mlp in MLP_RULES
    for attention in ATTENTION_RULES
}
WHOLE_TABLE = [
    (family, mix, rule)
    for family in FAMILIES
    for mix in MIXES | ALONE
    for rule in EVERY_RULE
    if family != "neox" or "mid" not in mix  # parallel blocks have no middle
]


def graph_of(model, rule, engine="linear", **given):
    how = {"mlp": rule.mlp, "attention": rule.attention, "ig_steps": rule.steps}
    return attribute(model, PROMPT, engine=engine, **how, **given)
