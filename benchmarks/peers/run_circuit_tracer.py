"""One row of the tracing benchmark: circuit-tracer with its TransformerLens backend, from folders, without a hub.

Its own loaders take names on the hub; the model is built here from a Llama folder, the way that its `from_pretrained`
would, and the dictionaries by its own loaders with the command line's choice: encoders in memory, decoders lazy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import yaml
from circuit_tracer.attribution.attribute import attribute
from circuit_tracer.graph import Graph
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from trace_row import EMBEDDING, ERROR, FEATURE, LOGIT, Edges, Tool, node_codes, run
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BATCH = 256
"""Its command line's default (`DEFAULT_BATCH_SIZE`); its function's is 512."""


def load(options: argparse.Namespace) -> TransformerLensReplacementModel:
    """Its replacement model."""
    theirs = LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    sizes = theirs.config
    d_head = sizes.hidden_size // sizes.num_attention_heads
    grouped = sizes.num_key_value_heads != sizes.num_attention_heads
    config = HookedTransformerConfig(
        n_layers=sizes.num_hidden_layers,
        d_model=sizes.hidden_size,
        d_head=d_head,
        n_heads=sizes.num_attention_heads,
        n_key_value_heads=sizes.num_key_value_heads if grouped else None,
        d_mlp=sizes.intermediate_size,
        d_vocab=sizes.vocab_size,
        n_ctx=sizes.max_position_embeddings,
        act_fn=sizes.hidden_act,
        eps=sizes.rms_norm_eps,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=d_head,
        final_rms=True,
        gated_mlp=True,
        model_name="random",
        device=options.device,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.model)
    model = TransformerLensReplacementModel(config, tokenizer=tokenizer)
    model.load_and_process_state_dict(
        convert_llama_weights(theirs, config), fold_ln=False, center_writing_weights=False, center_unembed=False
    )
    model.to(options.device)
    model._configure_replacement_model(_dictionaries(options.dictionaries, torch.device(options.device)))
    return model


def _dictionaries(folder: Path, device: torch.device):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    common = {name: config[name] for name in ("scan", "feature_input_hook", "feature_output_hook")}
    common |= {"device": device, "dtype": torch.float32, "lazy_encoder": False, "lazy_decoder": True}
    if config["model_kind"] == "cross_layer_transcoder":
        return load_clt(str(folder), **common)
    paths = {layer: str(folder / f"layer_{layer}.safetensors") for layer in range(len(list(folder.glob("layer_*"))))}
    return load_transcoder_set(paths, **common)


def logits(model: TransformerLensReplacementModel, tokens: torch.Tensor) -> torch.Tensor:
    """The language model's logits."""
    with torch.no_grad():
        return model(tokens[None].to(model.cfg.device))[0]


def trace(model: TransformerLensReplacementModel, tokens: torch.Tensor, options: argparse.Namespace) -> Graph:
    """Its graph with its default targets."""
    return attribute(tokens, model, batch_size=options.batch or BATCH, max_feature_nodes=options.rows)


def edges(graph: Graph) -> Edges:
    """Its edges; nodes are features, errors (layer by layer), embeddings, logits."""
    layer, position, feature = graph.active_features[graph.selected_features].cpu().numpy().T
    n_layers, n_pos, n_features = graph.cfg.n_layers, graph.n_pos, len(layer)
    positions, targets = np.arange(n_pos), graph.logit_token_ids.cpu().numpy()
    nodes = np.concatenate(
        [
            node_codes(np.full_like(layer, FEATURE), layer, position, feature),
            *(node_codes(*_columns(n_pos, ERROR, one, positions)) for one in range(n_layers)),
            node_codes(*_columns(n_pos, EMBEDDING, -1, positions)),
            node_codes(*_columns(len(targets), LOGIT, n_layers, n_pos - 1, targets)),
        ]
    )
    rows = np.concatenate([np.arange(n_features), np.arange(len(nodes) - len(targets), len(nodes))])
    matrix = graph.adjacency_matrix
    return Edges(nodes, rows, lambda index: matrix[torch.from_numpy(index)].float().cpu().numpy())


def _columns(n: int, *values: int | np.ndarray) -> list[np.ndarray]:
    """Kind, layer, position, number as columns; number is -1 where there is none."""
    return [np.broadcast_to(np.asarray(value), (n,)) for value in (*values, -1)[:4]]


def figures(model: TransformerLensReplacementModel, graph: Graph) -> dict[str, float]:
    """Sizes of its graph."""
    return {"n_active": len(graph.active_features), "n_features": len(graph.selected_features)}


if __name__ == "__main__":
    run(Tool(load, logits, trace, edges, figures))
