"""Readers and writers of dictionary folders, one file a format.

Foreign layouts are turned into the project's own (one feature per row) here, at the door. A format is recognised by the
files in the folder.
"""

from __future__ import annotations

from pathlib import Path

from replacement.dictionary import DictionarySet
from replacement.errors import InputError
from replacement.formats import circuit_tracer, native
from replacement.formats.native import save
from replacement.hub import require_on_hub

__all__ = ["find", "load", "save", "shipped"]

DEFAULT_SET = "transcoders"  #: of the sets that come with a model, the one used unless another is named
FORMATS = (native, circuit_tracer)  # each has `recognises(folder)`, `load(folder)` and EXPECTS, what it looks for
RUN = "training.json"  #: what a training run writes when it begins; the dictionaries' own files come when it is done


def load(folder: str | Path) -> DictionarySet:
    """Read a folder of dictionaries of any known format; raises InputError where it is none, is damaged, or holds a
    training run that is not finished.
    """
    folder = Path(folder)
    for reader in FORMATS:
        if reader.recognises(folder):
            return reader.load(folder)
    if (folder / RUN).is_file() and not (folder / "config.json").exists():
        raise InputError(
            f"dictionaries {str(folder)!r}: holds a training run that is not finished; give its command again "
            "(`circuits train ...`)"
        )
    expected = ", or ".join(reader.EXPECTS for reader in FORMATS)
    raise InputError(f"dictionaries {str(folder)!r}: no known format; a folder needs {expected}")


def shipped(model_folder: Path | None) -> dict[str, Path]:
    """Sets that come with a model, in its folder `dictionaries/`: name -> folder."""
    root = None if model_folder is None else model_folder / "dictionaries"
    if root is None or not root.is_dir():
        return {}
    return {path.name: path for path in sorted(root.iterdir()) if path.is_dir()}


def find(dictionaries: str | Path | None, model_folder: Path | None, model: str) -> Path:
    """The folder that `dictionaries` means: a set shipped with the model (None: its default), a folder, or a hub id."""
    sets = shipped(model_folder)
    if dictionaries is None:
        if not sets:
            raise InputError(f"model {model!r}: comes with no dictionaries; pass a folder, a hub id, or 'neurons'")
        return sets.get(DEFAULT_SET, next(iter(sets.values())))
    if str(dictionaries) in sets:
        return sets[str(dictionaries)]
    folder = Path(dictionaries)
    if folder.is_dir():
        return folder
    name = str(dictionaries)
    choices = ", ".join([*sets, "neurons"])
    if folder.is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise InputError(f"dictionaries {name!r}: no such folder; pass a folder, a hub id, or one of: {choices}")
    require_on_hub(name, "config.yaml", what="dictionaries", choices=f"a folder, a hub id, or one of: {choices}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.yaml"]))
    except Exception as error:  # huggingface_hub raises many kinds, all of them "could not be had"
        raise InputError(f"dictionaries {name!r}: the hub did not deliver it ({type(error).__name__})") from error
