"""circuit-tracer's folders: `config.yaml` beside one safetensors file a layer (transcoders) or two (cross-layer)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from replacement.activation import Activation, JumpReLU, ReLU, TopK
from replacement.cross_layer import CrossLayerTranscoder
from replacement.dictionary import Dictionary, DictionarySet
from replacement.errors import InputError
from replacement.formats.tensors import read_tensors, require_known, take
from replacement.transcoder import Transcoder

EXPECTS = "config.yaml with model_kind and layer_0.safetensors or W_enc_0.safetensors (circuit-tracer)"


def recognises(folder: Path) -> bool:
    """Whether the folder looks like this format."""
    return (folder / "config.yaml").is_file()


def load(folder: Path) -> DictionarySet:
    """Read a set of per-layer transcoders or a cross-layer transcoder."""
    config = _read_config(folder / "config.yaml")
    kind = config.get("model_kind")
    readers = {
        "transcoder_set": (_load_transcoder, "layer_{}.safetensors"),
        "cross_layer_transcoder": (_load_cross_layer, "W_enc_{}.safetensors"),
    }
    if not isinstance(kind, str) or kind not in readers:
        raise InputError(f"{folder / 'config.yaml'}: model_kind is {kind!r}, needs one of {', '.join(readers)}")
    reader, pattern = readers[kind]
    n_layers = 0
    while (folder / pattern.format(n_layers)).is_file():
        n_layers += 1
    if n_layers == 0:
        raise InputError(f"{folder}: lacks {pattern.format(0)}, which a {kind} needs")
    by_layer = {layer: reader(folder, layer, config) for layer in range(n_layers)}
    scan = config.get("scan")
    return DictionarySet(by_layer, scan if isinstance(scan, str) and scan else str(folder), metadata=config)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date that is none
        raise InputError(f"{path}: not readable YAML ({' '.join(str(error).split())[:120]})") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: needs a mapping with model_kind, feature_input_hook and feature_output_hook")
    for key in ("feature_input_hook", "feature_output_hook"):
        if not isinstance(config.get(key), str):
            raise InputError(f"{path}: lacks {key}")
    return config


def _activation(config: dict[str, Any], threshold: Tensor | None, path: Path) -> Activation:
    """TopK where the config says so (the format's own loader does not, and reloads such sets as ReLU)."""
    k = config.get("topk", config.get("k"))
    made: Activation = ReLU() if threshold is None else JumpReLU(threshold.flatten())  # also read as [1, n_features]
    made = made if k is None else TopK(k)
    named = config.get("activation")
    if named is not None and str(named).replace("_", "").lower() != made.name:
        raise InputError(
            f"{path}: config.yaml says activation {named!r}, but with its k and the file's tensors it is {made.name}; "
            "needs k for topk, a threshold for jump_relu, neither for relu"
        )
    return made


def _load_transcoder(folder: Path, layer: int, config: dict[str, Any]) -> Dictionary:
    path = folder / f"layer_{layer}.safetensors"
    tensors = read_tensors(path, as_stored=["W_enc", "W_dec"])
    require_known(tensors, ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "activation_function.threshold"), path)
    return Transcoder(
        layer=layer,
        read=config["feature_input_hook"],
        write=config["feature_output_hook"],
        W_enc=take(tensors, "W_enc", 2, path),
        b_enc=take(tensors, "b_enc", 1, path),
        W_dec=take(tensors, "W_dec", 2, path),
        b_dec=take(tensors, "b_dec", 1, path),
        W_skip=tensors.get("W_skip"),
        activation=_activation(config, tensors.get("activation_function.threshold"), path),
    )


def _load_cross_layer(folder: Path, layer: int, config: dict[str, Any]) -> Dictionary:
    path, decoder_path = folder / f"W_enc_{layer}.safetensors", folder / f"W_dec_{layer}.safetensors"
    tensors = read_tensors(path, as_stored=[f"W_enc_{layer}"])
    decoder = read_tensors(decoder_path, as_stored=[f"W_dec_{layer}"])
    require_known(tensors, [f"{name}_{layer}" for name in ("W_enc", "b_enc", "b_dec", "threshold")], path)
    require_known(decoder, [f"W_dec_{layer}"], decoder_path)
    return CrossLayerTranscoder(
        layer=layer,
        read=config["feature_input_hook"],
        write=config["feature_output_hook"],
        W_enc=take(tensors, f"W_enc_{layer}", 2, path),
        b_enc=take(tensors, f"b_enc_{layer}", 1, path),
        W_dec=take(decoder, f"W_dec_{layer}", 3, decoder_path),
        b_dec=take(tensors, f"b_dec_{layer}", 1, path),
        activation=_activation(config, tensors.get(f"threshold_{layer}"), path),
    )
