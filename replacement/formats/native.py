"""The project's own folders: `config.json`, one safetensors file a dictionary, `labels.json` with words for features.

`config.json` lists the dictionaries with kind, layer, sites and activation, and carries free metadata (how they were
trained). Tensors keep the project's names, one feature per row. `labels.json` maps layer to feature to words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from replacement.activation import JumpReLU, build_activation
from replacement.cross_layer import CrossLayerTranscoder
from replacement.crosscoder import Crosscoder
from replacement.dictionary import Dictionary, DictionarySet, LearnedDictionary
from replacement.encoding import LINEAR, Encoding, Linear, build_encoding
from replacement.errors import InputError
from replacement.finite import all_finite
from replacement.formats.drafts import Drafts
from replacement.formats.tensors import Rows, read_tensors, require_known, row_slices, take, write_tensors
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

Pieces = Callable[[LearnedDictionary, str], Iterable[Shaped[Tensor, "*rows"]]]
"""A dictionary, and the name that a tensor is stored under -> the tensor's rows, in pieces one after another."""


def recognises(folder: Path) -> bool:
    """Whether the folder looks like this format."""
    path = folder / "config.json"
    return path.is_file() and FORMAT in path.read_text(encoding="utf-8", errors="replace")


def held(dictionary: LearnedDictionary, name: str) -> Iterator[Shaped[Tensor, "*rows"]]:
    """Pieces of a tensor that the dictionary has in memory."""
    tensor = _tensors(dictionary)[name].detach()
    return (tensor[rows] for rows in row_slices(tensor.shape, tensor.dtype)) if tensor.ndim else iter((tensor,))


def save(
    dictionaries: DictionarySet,
    folder: str | Path,
    *,
    dtype: str = "float32",
    metadata: Mapping[str, object] | None = None,
    pieces: Pieces = held,
) -> None:
    """Write a set; its files appear together when all are whole, `config.json` last. No mixture of two sets is a set.

    dtype: "float32", "float16", "bfloat16" or "float64" of the stored tensors.
    metadata: JSON values, kept in the config.
    pieces: of tensors that are nowhere whole: a dictionary's own, on the device "meta", say shape and dtype. All other
    tensors are taken as they are.
    Raises InputError for another dtype, a kind that has no weights of its own, weights too large for the dtype, or a
    disk that does not take them; what was in the folder stays.
    """
    if dtype not in DTYPES:
        raise InputError(f"save(dtype={dtype!r}): needs one of {', '.join(DTYPES)}")
    folder = Path(folder)
    learned = [_require_learned(dictionary) for dictionary in dictionaries]
    labels = {
        str(layer): {str(feature): words for feature, words in sorted(of_layer.items())}
        for layer, of_layer in sorted(dictionaries.labels.items())
    }
    config = {
        "format": FORMAT,
        "version": VERSION,
        "name": dictionaries.name,
        "dictionaries": [_entry(dictionary) for dictionary in learned],
        "metadata": dict(dictionaries.metadata) | dict(metadata or {}),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with Drafts(folder, whole="config.json") as drafts:
            for dictionary in learned:
                with drafts.file(_file_of(dictionary)) as file:
                    write_tensors(file, _stored(dictionary, getattr(torch, dtype), pieces))
            if not labels:  # those of a set that was here before say nothing of this one
                drafts.drop("labels.json")
            for name, content in {"labels.json": labels, "config.json": config}.items():
                if content:
                    with drafts.file(name) as file:
                        file.write(_json(content))
    except OSError as error:
        raise InputError(
            f"save({folder}): cannot be written ({error.strerror or error}); make room there and run it again, what "
            "was in the folder before stays"
        ) from error


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
    tensors = read_tensors(path, as_stored=["W_enc", "W_dec"])
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


def _require_learned(dictionary: Dictionary) -> LearnedDictionary:
    if not isinstance(dictionary, LearnedDictionary) or dictionary.kind not in _CLASS_OF:
        raise InputError(
            f"save: dictionaries of kind {dictionary.kind!r} are not stored; known: {', '.join(_CLASS_OF)}"
        )
    return dictionary


def _file_of(dictionary: LearnedDictionary) -> str:
    return f"layer_{dictionary.layer}.safetensors"


def _entry(dictionary: LearnedDictionary) -> dict[str, Any]:
    """What the config says of a dictionary."""
    entry = {
        "file": _file_of(dictionary),
        "kind": dictionary.kind,
        "layer": dictionary.layer,
        "read": dictionary.read,
        "write": dictionary.write,
        "n_features": dictionary.n_features,
        "activation": dictionary.activation.settings(),
    }
    if not isinstance(dictionary.encoding, Linear):
        entry["encoder"] = dictionary.encoding.settings()
    return entry | ({"parts": dictionary.parts} if isinstance(dictionary, Crosscoder) else {})


def _tensors(dictionary: LearnedDictionary) -> dict[str, Tensor]:
    """The dictionary's tensors by the names that they are stored under."""
    tensors = {name: getattr(dictionary, name) for name in TENSORS if getattr(dictionary, name) is not None}
    tensors |= dict(dictionary.encoding.named_parameters())
    if isinstance(dictionary.activation, JumpReLU):
        tensors["threshold"] = dictionary.activation.threshold
    return tensors


def _stored(dictionary: LearnedDictionary, dtype: torch.dtype, pieces: Pieces) -> dict[str, Rows]:
    """The dictionary's tensors in `dtype`; thresholds decide what fires, and are never rounded."""
    found = {}
    for name, tensor in _tensors(dictionary).items():
        to = torch.promote_types(tensor.dtype, torch.float32) if name == "threshold" else dtype
        source = pieces if tensor.is_meta else held
        found[name] = Rows(tuple(tensor.shape), to, _converted(dictionary, name, to, source))
    return found


def _converted(dictionary: LearnedDictionary, name: str, to: torch.dtype, source: Pieces) -> Iterator[Tensor]:
    for piece in source(dictionary, name):
        converted = piece.to(device="cpu", dtype=to)
        if name != "threshold" and not all_finite(converted):
            raise InputError(
                f"save: {name} of layer {dictionary.layer} has values that are not finite in {to}; pass float32"
            )
        yield converted


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
