"""The project's own folders: `config.json`, one safetensors file a dictionary, `labels.json` with words for features.

`config.json` lists the dictionaries with kind, layer, sites and activation, and carries free metadata (how they were
trained). Tensors keep the project's names, one feature per row. `labels.json` maps layer to feature to words.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from replacement.activation import JumpReLU, build_activation
from replacement.cross_layer import CrossLayerTranscoder
from replacement.crosscoder import Crosscoder
from replacement.dictionary import Dictionary, DictionarySet, LearnedDictionary
from replacement.encoding import LINEAR, Encoding, Linear, build_encoding
from replacement.errors import InputError
from replacement.formats.tensors import read_tensors, require_known, take
from replacement.transcoder import Transcoder

FORMAT = "circuits-dictionaries"
VERSION = 1
EXPECTS = "config.json that says circuits-dictionaries"
DTYPES = ("float32", "float16", "bfloat16", "float64")
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")
ROUTER = ("W_router", "b_router")
_CLASS_OF: dict[str, type[LearnedDictionary]] = {
    kind: of for of in (Transcoder, CrossLayerTranscoder) for kind in of.KINDS
} | {Crosscoder.kind: Crosscoder}
_DECODER_AXES = {Transcoder: 2, CrossLayerTranscoder: 3, Crosscoder: 3}


def recognises(folder: Path) -> bool:
    """Whether the folder looks like this format."""
    path = folder / "config.json"
    return path.is_file() and FORMAT in path.read_text(encoding="utf-8", errors="replace")


def save(
    dictionaries: DictionarySet,
    folder: str | Path,
    *,
    dtype: str = "float32",
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Write a set; every file appears whole, `config.json` last.

    dtype: "float32", "float16", "bfloat16" or "float64" of the stored tensors.
    metadata: JSON values, kept in the config.
    Raises InputError for another dtype, a kind that has no weights of its own, or weights too large for the dtype.
    """
    if dtype not in DTYPES:
        raise InputError(f"save(dtype={dtype!r}): needs one of {', '.join(DTYPES)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for dictionary in dictionaries:
        if not isinstance(dictionary, LearnedDictionary) or dictionary.kind not in _CLASS_OF:
            raise InputError(
                f"save: dictionaries of kind {dictionary.kind!r} are not stored; known: {', '.join(_CLASS_OF)}"
            )
        name = f"layer_{dictionary.layer}.safetensors"
        write_whole(folder / name, safetensors_bytes(_stored(dictionary, getattr(torch, dtype))))
        entry = {
            "file": name,
            "kind": dictionary.kind,
            "layer": dictionary.layer,
            "read": dictionary.read,
            "write": dictionary.write,
            "n_features": dictionary.n_features,
            "activation": dictionary.activation.settings(),
        }
        if not isinstance(dictionary.encoding, Linear):
            entry["encoder"] = dictionary.encoding.settings()
        entries.append(entry | ({"parts": dictionary.parts} if isinstance(dictionary, Crosscoder) else {}))
    labels = {
        str(layer): {str(feature): words for feature, words in sorted(of_layer.items())}
        for layer, of_layer in sorted(dictionaries.labels.items())
    }
    if labels:
        write_whole(folder / "labels.json", _json(labels))
    else:  # those of a set that was here before say nothing of this one
        (folder / "labels.json").unlink(missing_ok=True)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "name": dictionaries.name,
        "dictionaries": entries,
        "metadata": dict(dictionaries.metadata) | dict(metadata or {}),
    }
    write_whole(folder / "config.json", _json(config))


def load(folder: Path) -> DictionarySet:
    """Read a set; raises InputError for anything missing, damaged or of another version."""
    path = folder / "config.json"
    config = _read_json(path)
    if config.get("version") != VERSION:
        raise InputError(f"{path}: version {config.get('version')!r}, this release reads {VERSION}")
    entries = config.get("dictionaries")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: lists no dictionaries")
    by_layer = {}
    for entry in entries:
        dictionary = _load_one(folder, path, entry)
        if dictionary.layer in by_layer:
            raise InputError(f"{path}: lists two dictionaries for layer {dictionary.layer}, needs one a layer")
        by_layer[dictionary.layer] = dictionary
    metadata, name = config.get("metadata", {}), config.get("name", folder.name)
    if not isinstance(metadata, dict) or not isinstance(name, str):
        raise InputError(f"{path}: needs text as `name` and an object as `metadata`")
    return DictionarySet(by_layer, name, _load_labels(folder / "labels.json"), metadata)


def _load_one(folder: Path, config_path: Path, entry: Any) -> Dictionary:
    fields = {"file": str, "kind": str, "layer": int, "read": str, "write": str, "activation": dict}
    typed = isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in fields.items())
    if not typed or isinstance(entry["layer"], bool):
        raise InputError(f"{config_path}: an entry of `dictionaries` lacks one of {', '.join(fields)}")
    if entry["kind"] not in _CLASS_OF:
        raise InputError(f"{config_path}: kind {entry['kind']!r} is not known; known: {', '.join(_CLASS_OF)}")
    if Path(entry["file"]).name != entry["file"] or not entry["file"].isprintable():
        raise InputError(f"{config_path}: file {entry['file']!r} must lie in the folder itself")
    path = folder / entry["file"]
    tensors = read_tensors(path, as_stored=["W_dec"])
    of = _CLASS_OF[entry["kind"]]
    require_known(tensors, [*TENSORS[: None if of is Transcoder else -1], *ROUTER, "threshold"], path)
    bias_axes = 2 if of is Crosscoder else 1
    axes = {"W_enc": 2, "b_enc": 1, "W_dec": _DECODER_AXES[of], "b_dec": bias_axes}
    arguments: dict[str, Any] = {name: take(tensors, name, ndim, path) for name, ndim in axes.items()}
    arguments["activation"] = build_activation(entry["activation"], tensors.get("threshold"))
    arguments["encoding"] = _encoding(entry, tensors, path)
    if of is Crosscoder:
        parts = entry.get("parts")
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise InputError(f"{config_path}: a crosscoder needs `parts`, a list of hooks")
        return Crosscoder(parts=tuple(parts), site=entry["read"], **arguments)
    arguments |= {key: entry[key] for key in ("layer", "read", "write")}
    if of is Transcoder:
        arguments["W_skip"] = tensors.get("W_skip")
    return of(**arguments)


def _encoding(entry: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> Encoding:
    settings = entry.get("encoder", LINEAR.settings())
    if not isinstance(settings, dict):
        raise InputError(f"{path}: its `encoder` in the config needs an object with a name")
    encoding = build_encoding(settings, tensors, str(path))
    if unused := [name for name in ROUTER if name in tensors and name not in dict(encoding.named_parameters())]:
        raise InputError(f"{path}: holds {unused[0]}, which a {encoding.name} encoder does not use")
    return encoding


def _stored(dictionary: LearnedDictionary, dtype: torch.dtype) -> dict[str, Tensor]:
    """The dictionary's tensors in `dtype`; thresholds decide what fires, and are never rounded."""
    kept = {name: getattr(dictionary, name) for name in TENSORS if getattr(dictionary, name) is not None}
    kept |= dict(dictionary.encoding.named_parameters())
    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in kept.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"save: {name} of layer {dictionary.layer} has values that are not finite in {dtype}; pass float32"
            )
    if isinstance(dictionary.activation, JumpReLU):
        threshold = dictionary.activation.threshold.detach()
        tensors["threshold"] = threshold.to(torch.promote_types(threshold.dtype, torch.float32)).contiguous()
    return tensors


def _load_labels(path: Path) -> dict[int, dict[int, str]]:
    if not path.is_file():
        return {}
    try:
        return {
            int(layer): {int(feature): str(words) for feature, words in of_layer.items()}
            for layer, of_layer in _read_json(path).items()
        }
    except (AttributeError, ValueError) as error:
        raise InputError(f"{path}: needs layer -> feature -> words ({error})") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, no JSON, or a number too long
        raise InputError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: needs a JSON object")
    return value


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it appears whole or not at all."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        with open(draft, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
