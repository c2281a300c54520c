"""`circuits models`: what ships with the package."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from circuits.commands.options import print_json


class Shipped(NamedTuple):
    """A model that comes with the package."""

    name: str
    architecture: str
    n_layers: int
    d_model: int
    vocabulary: int
    megabytes: float
    """All of its files, dictionaries included."""
    dictionaries: tuple[DictionaryFolder, ...]


class DictionaryFolder(NamedTuple):
    """A set of dictionaries that comes with a model."""

    name: str
    kind: str
    n_features: int
    """In all layers together."""
    megabytes: float
    default: bool


def configure(parser: argparse.ArgumentParser) -> None:
    """The command has no arguments."""


def run(arguments: argparse.Namespace) -> None:
    """List the models."""
    from replacement.pretrained import names

    found = [shipped(name) for name in names()]
    if arguments.json:
        from circuits.report import as_json

        print_json({"models": as_json(tuple(found))})
    else:
        from circuits.display import show_models

        show_models(found)


def shipped(name: str) -> Shipped:
    """Read what a shipped model's folder says of it, without loading it."""
    from replacement.formats import find, shipped
    from replacement.pretrained import directory

    folder = directory(name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sets = shipped(folder)
    default = find(None, folder, name) if sets else None
    return Shipped(
        name,
        config["model_type"],
        config["num_hidden_layers"],
        config["hidden_size"],
        config["vocab_size"],
        _megabytes(folder),
        tuple(_dictionaries(path, path == default) for path in sets.values()),
    )


def _dictionaries(folder: Path, default: bool) -> DictionaryFolder:
    entries = json.loads((folder / "config.json").read_text(encoding="utf-8"))["dictionaries"]
    kinds = dict.fromkeys(entry["kind"] for entry in entries)
    return DictionaryFolder(
        folder.name, ", ".join(kinds), sum(entry["n_features"] for entry in entries), _megabytes(folder), default
    )


def _megabytes(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6, 1)
