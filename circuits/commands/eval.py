"""`circuits eval`: how good dictionaries are, as a table, as JSON and as pictures."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from circuits.commands.options import add, print_json
from circuits.measures import MEASURES

if TYPE_CHECKING:
    from circuits.quality import Quality
    from replacement.dictionary import DictionarySet

LOAD = "replacement.model:ReplacementModel.load"
MEASURE = "circuits.quality:measure"
OPEN = "replacement.training.data:open_tokens"
DATA, TOKENS, CONTEXT, PROMPTS = "atlas", 16384, 128, 50
EMBEDDED = "atlas"
"""The shipped model, which brings documents, questions and labels of its own."""
SHOWN = ("reconstruction", "replacement", "graphs")
"""What the table of several sets has columns for."""
SETTINGS = (
    "model", "dtype", "device", "data", "text_field", "tokens", "context", "measure", "against", "prompts", "labels",
    "replace_first",
)  # fmt: skip
"""What decides the figures, for --json; `context` and `measure` as they were used, not as they were given."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Name the command's arguments."""
    model = parser.add_argument_group("model")
    add(model, LOAD, "--model", "a shipped model, a Hugging Face directory, or a hub id")
    model.add_argument(
        "--dictionaries",
        action="append",
        metavar="SET",
        help="a set that comes with the model, a folder, a hub id, or 'neurons'; repeat it to compare several "
        "(default: the model's first set)",
    )
    model.add_argument("--against", metavar="SET", help="the same trained with another seed: adds stability")
    add(model, LOAD, "--dtype", "float32, float64, bfloat16 or float16")
    add(model, LOAD, "--device", "a torch device such as cpu or cuda")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        default=DATA,
        help="held-out documents: 'atlas' (its own generator), a text or .jsonl file, or a data set "
        "(default: %(default)s)",
    )
    add(data, OPEN, "--text-field", "of JSON objects", metavar="NAME")
    data.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help="tokens to read (default: %(default)s)")
    data.add_argument(
        "--context", type=int, metavar="N", help=f"tokens of a document (default: {CONTEXT}, or what the model takes)"
    )
    data.add_argument("--prompts", type=Path, metavar="FILE", help="prompts for graphs' scores, one a line")
    data.add_argument("--labels", type=Path, metavar="FILE", help='probes: JSON {"task": {"yes": [...], "no": [...]}}')
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--measure",
        metavar="LIST",
        help=f"with commas between them: {', '.join(MEASURES)} (default: all of them; of several sets "
        f"{', '.join(SHOWN)}, unless --json is given)",
    )
    add(what, MEASURE, "--replace-first", "replace start tokens (BOS) like any other", action="store_true")
    out = parser.add_argument_group("output")
    out.add_argument("--plots", type=Path, metavar="DIR", help="write pictures there (needs matplotlib)")


class Given(NamedTuple):
    """A set as it was asked for."""

    given: str | None  #: as typed; None for the model's first set
    path: Path | None  #: where it was read; None for what the model brings itself
    dictionaries: DictionarySet


def run(arguments: argparse.Namespace) -> None:
    """Load, measure, report."""
    started = perf_counter()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in `trace`
    _check(arguments)
    if arguments.plots is not None:
        from circuits.plots import require_place

        require_place(arguments.plots)
    from circuits.display import stages

    with stages() as progress:
        progress.begin(f"loading {arguments.model}")
        sets, qualities = _measure_all(arguments, progress)
    titles = titles_of(sets)
    shown = [one._replace(name=title) for one, title in zip(qualities, titles, strict=True)]
    files: dict[Path, str] = {}
    try:
        if arguments.plots is not None:
            from circuits.plots import write_plots

            files = write_plots(shown, arguments.plots)
    finally:  # figures that took long are printed, whatever came of their pictures
        seconds = perf_counter() - started
        if arguments.json:
            _print_json(arguments, sets, qualities, files, seconds)
        else:
            _show(arguments, shown, files, seconds)


def titles_of(sets: Sequence[Given]) -> list[str]:
    """What to call each set: its name, or, where two have the same one, what was typed."""
    names = [one.dictionaries.name for one in sets]
    if len(set(names)) == len(names):
        return names
    return [name if one.given is None else one.given for one, name in zip(sets, names, strict=True)]


def _show(arguments: argparse.Namespace, qualities: Sequence[Quality], files: Mapping[Path, str], took: float) -> None:
    from circuits.display_eval import show_qualities

    where = {name: getattr(arguments, name) for name in ("model", "data", "against")}
    show_qualities(qualities, **where, files=files, took=f"{took:.1f} s")


def _print_json(
    arguments: argparse.Namespace,
    sets: Sequence[Given],
    qualities: Sequence[Quality],
    files: Mapping[Path, str],
    seconds: float,
) -> None:
    from circuits.report import as_json

    found = [
        {"given": one.given, "path": one.path} | finite(as_json(quality))
        for one, quality in zip(sets, qualities, strict=True)
    ]
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    written = [str(path) for path in files]
    print_json({"sets": found, "settings": settings, "files": written, "seconds": round(seconds, 3)})


def _check(arguments: argparse.Namespace) -> None:
    from replacement.errors import InputError

    for name in ("tokens", "context"):
        value = getattr(arguments, name)
        if value is not None and value < 2:
            raise InputError(f"--{name} {value}: needs at least 2")
    several = len(arguments.dictionaries or ()) > 1 and not arguments.json
    if arguments.measure is None:
        arguments.measure = SHOWN if several else tuple(MEASURES)
    else:
        names = [part.strip() for part in arguments.measure.split(",")]
        if unknown := [name for name in names if name not in MEASURES]:
            raise InputError(f"--measure {unknown[0]!r}: no such measure; have {', '.join(MEASURES)}")
        arguments.measure = names


def _measure_all(arguments: argparse.Namespace, progress: Any) -> tuple[list[Given], list[Quality]]:
    from circuits.quality import Documents, measure
    from replacement.errors import InputError
    from replacement.loading import load_bridge
    from replacement.model import DTYPES

    if arguments.dtype not in DTYPES:
        raise InputError(f"--dtype {arguments.dtype!r}: needs one of {', '.join(DTYPES)}")
    bridge, folder = load_bridge(arguments.model, DTYPES[arguments.dtype], arguments.device)
    names = arguments.dictionaries or [None]
    sets = [_set(name, bridge, folder, arguments.model) for name in names]
    against = None
    if arguments.against is not None:
        from replacement.evaluation.stability import shared_layers

        against = _set(arguments.against, bridge, folder, arguments.model).dictionaries
        for one in sets:
            shared_layers(one.dictionaries, against)  # refuses other sites before the long work on any of them
    source = _open(arguments, bridge)
    arguments.context = source.context
    features = max(sum(dictionary.n_features for dictionary in one.dictionaries) for one in sets)
    vocabulary = int(bridge.cfg.d_vocab)
    documents = Documents(source, tokens=arguments.tokens, vocabulary=vocabulary, features=features)
    prompts, tasks = _prompts(arguments, bridge), _tasks(arguments, bridge)

    def advance(title: str, what: str, done: int, total: int) -> None:
        if done == 0:
            progress.begin(f"{title}: {what}")
        else:
            progress.advance(done, total)

    found = []
    for one, title in zip(sets, titles_of(sets), strict=True):
        found.append(
            measure(
                bridge,
                one.dictionaries,
                documents,
                model=arguments.model,
                measures=arguments.measure,
                against=against,
                prompts=prompts,
                tasks=tasks,
                replace_first=arguments.replace_first,
                advance=partial(advance, title),
            )
        )
    return sets, found


def _set(name: str | None, bridge: Any, folder: Path | None, model: str) -> Given:
    import torch

    from replacement import formats
    from replacement.neurons import neurons

    if name == "neurons":
        dtype = torch.float64 if next(bridge.parameters()).dtype == torch.float64 else torch.float32
        return Given(name, None, neurons(bridge, dtype))
    path = formats.find(name, folder, model)
    return Given(name, path, formats.load(path))


def _open(arguments: argparse.Namespace, bridge: Any) -> Any:
    from replacement.training.data import open_tokens

    context = min(arguments.context or CONTEXT, int(bridge.cfg.n_ctx))
    return open_tokens(arguments.data, model=bridge, context=context, split="held_out", text_field=arguments.text_field)


def _prompts(arguments: argparse.Namespace, bridge: Any) -> Sequence[Any] | None:
    if arguments.prompts is not None:
        from circuits.scored_prompts import read_scored_prompts

        return read_scored_prompts(arguments.prompts, bridge, name=arguments.model)
    if arguments.model != EMBEDDED or arguments.data != DATA:
        return None
    import torch

    from replacement.pretrained.recipe.tasks import build

    questions = [question for name, asked in build().items() for question in asked if name.startswith("two_hop")]
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(0))[:PROMPTS]
    return [torch.tensor(questions[i].ids) for i in order.tolist()]


def _tasks(arguments: argparse.Namespace, bridge: Any) -> Any:
    if arguments.labels is not None:
        from circuits.labels import read_labels

        return read_labels(arguments.labels, bridge.tokenizer)
    if arguments.model != EMBEDDED or arguments.data != DATA:
        return None
    from replacement.pretrained.recipe.probes import probe_tasks

    return probe_tasks()


def finite(value: Any) -> Any:
    """Return JSON values with null where a figure is not a number."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
