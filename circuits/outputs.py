"""What a graph can be written as, and how its files come to be: all of them whole, or none.

A format is one row of FORMATS. Knows files, folders and names; nothing of models or of what a report says.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from graphs.errors import InputError

if TYPE_CHECKING:
    from graphs import AttributionGraph

ROOT = Path("circuits-out")
"""Where traces go unless another folder is named: one folder a prompt."""


class Format(NamedTuple):
    """One way to write a graph."""

    suffix: str
    purpose: str
    """What the file is for, in a few words."""
    write: Callable[[AttributionGraph, Path], None]
    whole: bool = False
    """Whether it holds the graph before pruning."""
    needs_graphviz: bool = False


def _write_native(graph: AttributionGraph, path: Path) -> None:
    graph.save(path)


def _write_json(graph: AttributionGraph, path: Path) -> None:
    from graphs import write_neuronpedia

    write_neuronpedia(graph, path, slug=slug(graph.prompt), scan=slug(Path(graph.model).name))


def _write_picture(graph: AttributionGraph, path: Path) -> None:
    from graphs import render

    render(graph, path)


def _write_graphml(graph: AttributionGraph, path: Path) -> None:
    from graphs import write_graphml

    write_graphml(graph, path)


FORMATS: Mapping[str, Format] = {
    "svg": Format(".svg", "the picture, for a browser", _write_picture, needs_graphviz=True),
    "png": Format(".png", "the picture", _write_picture, needs_graphviz=True),
    "json": Format(".json", "for the Neuronpedia and circuit-tracer viewers", _write_json),
    "dot": Format(".dot", "the picture as Graphviz text", _write_picture),
    "graphml": Format(".graphml", "for Gephi, yEd, Cytoscape, networkx", _write_graphml),
    "native": Format(
        ".safetensors", "the whole graph, unpruned: circuits show, prune, export", _write_native, whole=True
    ),
}
DEFAULT = ("svg", "json", "dot", "native")
"""Formats of a trace; svg only where Graphviz is installed."""
NO_GRAPHVIZ = "no picture: Graphviz is not installed (apt-get install graphviz, or brew install graphviz)"


def has_graphviz() -> bool:
    """Whether pictures can be drawn here."""
    return shutil.which("dot") is not None


def parse_formats(text: str | None) -> list[str]:
    """Return the formats that `"json,dot"` names, in the order given; None: the default ones that can be written here.

    Raises InputError for an unknown name, and for a picture where Graphviz is not installed.
    """
    if text is None:
        return [name for name in DEFAULT if has_graphviz() or not FORMATS[name].needs_graphviz]
    names = list(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    if unknown := [name for name in names if name not in FORMATS]:
        raise InputError(f"--format {unknown[0]!r}: no such format; have {', '.join(FORMATS)}")
    if not names:
        raise InputError(f"--format {text!r}: names no format; have {', '.join(FORMATS)}")
    for name in names:
        check_graphviz(name)
    return names


def check_graphviz(name: str) -> None:
    """Raise InputError where the format needs Graphviz and it is not installed."""
    if FORMATS[name].needs_graphviz and not has_graphviz():
        raise InputError(
            f"--format {name}: Graphviz is not installed (no `dot` on the PATH); install it (apt-get install graphviz, "
            "brew install graphviz) or pass --format dot and draw the file elsewhere"
        )


def format_of(path: Path) -> str:
    """Return the format that a file name's suffix means; raises InputError where it means none."""
    for name, row in FORMATS.items():
        if path.suffix.lower() == row.suffix:
            check_graphviz(name)
            return name
    known = ", ".join(row.suffix for row in FORMATS.values())
    raise InputError(f"-o {str(path)!r}: the suffix {path.suffix!r} names no format; use one of {known}")


def slug(text: str, *, limit: int = 60) -> str:
    """Return a text as a file name: lower-case letters, digits and dashes, cut at a word."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    result = words[0][:limit] if words else "graph"
    for word in words[1:]:
        if len(result) + 1 + len(word) > limit:
            break
        result += f"-{word}"
    return result


def check_folder(folder: Path) -> None:
    """Raise InputError where `folder` is not, and cannot become, a folder that takes files; leaves nothing behind."""
    parent = _existing(folder)
    try:
        tempfile.TemporaryDirectory(dir=parent, prefix=".circuits-").cleanup()
    except OSError as problem:
        raise _unwritable(folder, problem) from problem


def write(graph: AttributionGraph, pruned: AttributionGraph, paths: Mapping[Path, str]) -> None:
    """Write the graph to every path in its format (path -> format name); all files appear, or none does.

    They are made in a hidden folder beside their place and moved when the last one is whole. Formats that are not
    `whole` get the pruned graph. Raises InputError where they cannot be written; folders made for them are taken back.
    """
    for folder in dict.fromkeys(path.parent for path in paths):
        _write_into(folder, graph, pruned, {path.name: name for path, name in paths.items() if path.parent == folder})


def _write_into(folder: Path, graph: AttributionGraph, pruned: AttributionGraph, files: Mapping[str, str]) -> None:
    parent = _existing(folder)
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".circuits-") as drafts:
            for file, name in files.items():
                FORMATS[name].write(graph if FORMATS[name].whole else pruned, Path(drafts, file))
            for file in files:
                if (folder / file).is_dir():
                    raise InputError(f"-o {str(folder / file)!r}: is a folder, needs a file; choose another place")
            folder.mkdir(parents=True, exist_ok=True)
            for file in files:
                os.replace(Path(drafts, file), folder / file)
    except OSError as problem:
        raise _unwritable(folder, problem) from problem


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    for place in (folder, *folder.absolute().parents):
        if place.is_dir():
            return place
        if place.exists() or place.is_symlink():
            raise InputError(f"-o {str(folder)!r}: {str(place)!r} is a file, needs a folder; choose another place")
    raise InputError(f"-o {str(folder)!r}: no such place; choose another one")


def _unwritable(folder: Path, problem: OSError) -> InputError:
    reason = problem.strerror or str(problem)
    return InputError(f"-o {str(folder)!r}: can't write there ({reason}); choose another place")


def reads(path: Path) -> AttributionGraph:
    """Read a stored graph, native or in the viewers' JSON; raises InputError where it is neither or is damaged."""
    from graphs import AttributionGraph, read_neuronpedia

    return AttributionGraph.load(path) if _is_native(path) else read_neuronpedia(path)


def _is_native(path: Path) -> bool:
    if path.suffix.lower() in (".json", ".safetensors") or not path.is_file():
        return path.suffix.lower() != ".json"
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"  # safetensors: eight bytes of length, then its header


def names(folder: Path, formats: Sequence[str], stem: str = "graph") -> dict[Path, str]:
    """Return the files of a graph in a folder: path -> format name."""
    return {folder / f"{stem}{FORMATS[name].suffix}": name for name in formats}


def pruned_form(graph: AttributionGraph, thresholds: Mapping[str, float | None]) -> AttributionGraph:
    """Return the graph pruned with the thresholds that are given (None: the library's own).

    Without any, a graph that was pruned before it was stored stays as it is, and so does a viewer's JSON.
    """
    from graphs import prune

    given = {name: value for name, value in thresholds.items() if value is not None}
    if not given and ("pruning" in graph.settings or graph.residual is None):
        return graph
    return prune(graph, **given)


def check_overwrite(source: Path, files: Mapping[Path, str]) -> None:
    """Raise InputError where writing would replace the graph that is being read."""
    for path in files:
        if path.resolve() == source.resolve():
            raise InputError(
                f"-o {str(path.parent)!r}: would replace {source.name!r} itself; pass -o with another folder"
            )
