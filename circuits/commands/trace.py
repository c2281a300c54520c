"""`circuits trace`: a prompt's attribution graph, reported in words and written to files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from circuits.commands.options import add, add_thresholds, print_json, thresholds

if TYPE_CHECKING:
    from circuits.report import Prediction
    from graphs import AttributionGraph
    from replacement import ReplacementModel

ATTRIBUTE = "circuits.attribution:attribute"
LOAD = "replacement.model:ReplacementModel.load"
N_PREDICTIONS = 5


def configure(parser: argparse.ArgumentParser) -> None:
    """Name the command's arguments."""
    parser.add_argument("prompt", metavar="PROMPT", help="text whose next token is explained")
    model = parser.add_argument_group("model")
    add(model, LOAD, "--model", "a shipped model, a Hugging Face directory, or a hub id")
    add(
        model,
        LOAD,
        "--dictionaries",
        "a set that comes with the model, a folder, a hub id, or 'neurons'; repeat it for several that share the model "
        "(default: the model's first set)",
        action="append",
        metavar="SET",
    )
    add(model, LOAD, "--dtype", "float32, float64, bfloat16 or float16")
    add(model, LOAD, "--device", "a torch device such as cpu or cuda")
    what = parser.add_argument_group("what to trace")
    what.add_argument(
        "--target",
        action="append",
        metavar="T",
        help="a token (' Austin'), a difference ('Austin - Sacramento') or a feature ('L3#1204@7'); repeat it for "
        "several (default: the most probable next tokens)",
    )
    add(
        what, ATTRIBUTE, "--position", "explain the prediction at this token instead of the last", type=int, metavar="P"
    )
    add(what, ATTRIBUTE, "--max-logits", "without --target: trace at most N tokens", type=int, metavar="N")
    add(
        what,
        ATTRIBUTE,
        "--logit-probability",
        "without --target: trace tokens with this much probability",
        type=float,
        metavar="SHARE",
    )
    add(what, ATTRIBUTE, "--max-features", "trace the N most influential features only", type=int, metavar="N")
    add(
        what,
        ATTRIBUTE,
        "--drop",
        "leave out each node's smallest inputs, up to this share of them all (default: 0, or 0.001 for large graphs)",
        type=float,
        metavar="SHARE",
    )
    add(what, ATTRIBUTE, "--trace-bos", "trace the first position like any other", action="store_true")
    add(what, ATTRIBUTE, "--engine", "linear (fast) or autograd (the reference)")
    rest = parser.add_argument_group("what no dictionary replaces")
    add(rest, ATTRIBUTE, "--mlp", "linearise MLPs by relp, jacobian, ig or stop", metavar="RULE")
    add(rest, ATTRIBUTE, "--attention", "frozen (values move by the pattern) or gradient (queries and keys too)")
    add(rest, ATTRIBUTE, "--ig-steps", "points of integrated gradients", type=int, metavar="N")
    add_thresholds(parser)
    out = parser.add_argument_group("output")
    out.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder (default: circuits-out/PROMPT)")
    out.add_argument(
        "--format",
        metavar="LIST",
        help="svg, png, json, dot, graphml, native; several with commas (default: svg,json,dot,native)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Trace, prune, write, report."""
    started = perf_counter()
    # before torch is loaded: its threads sleep while they wait. Spinning, as they do by default, makes a small model's
    # trace take 20 times as long on a machine whose cores are busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from circuits import outputs

    formats = outputs.parse_formats(arguments.format)
    folder = arguments.output or outputs.ROOT / outputs.slug(arguments.prompt)
    outputs.check_folder(folder)
    _check_thresholds(arguments)

    from circuits.display import show, stages
    from circuits.report import as_json, report

    clock = _Clock()
    with stages() as progress:
        progress.begin(f"loading {arguments.model}")
        with clock.time("loading"):
            from graphs import prune
            from replacement import ReplacementModel

            loading = {name: getattr(arguments, name) for name in ("dictionaries", "dtype", "device")}
            model = ReplacementModel.load(arguments.model, **loading)
        progress.begin("tracing")
        with clock.time("tracing"):
            predictions = _predictions(model, arguments.prompt, arguments.position)
            graph = _attribute(model, arguments, progress.advance)
        progress.begin("pruning")
        with clock.time("pruning and writing"):
            pruned = prune(graph, **thresholds(arguments))
            facts = report(graph, pruned, predictions=predictions)
            files = outputs.names(folder, formats)
            outputs.write(graph, pruned, files)
    seconds = perf_counter() - started
    if arguments.json:
        written = {name: str(path) for path, name in files.items()}
        print_json({**as_json(facts), "settings": dict(graph.settings), "files": written, "seconds": round(seconds, 3)})
        return
    notes = [] if arguments.format or outputs.has_graphviz() else [outputs.NO_GRAPHVIZ]
    purposes = {path: outputs.FORMATS[name].purpose for path, name in files.items()}
    show(facts, files=purposes, notes=notes, took=f"{seconds:.1f} s: {clock}")


def _attribute(model: ReplacementModel, arguments: argparse.Namespace, advance: object) -> AttributionGraph:
    from circuits import attribute

    names = ["position", "max_logits", "logit_probability", "max_features", "trace_bos", "engine"]
    names += ["mlp", "attention", "ig_steps", "drop"]
    settings = {name: getattr(arguments, name) for name in names}
    return attribute(model, arguments.prompt, targets=arguments.target, progress=advance, **settings)


def _predictions(model: ReplacementModel, prompt: str, position: int | None) -> tuple[Prediction, ...]:
    from circuits.report import Prediction
    from replacement.errors import InputError

    logits = model.logits(prompt)
    at = -1 if position is None else position
    if not -len(logits) <= at < len(logits):
        raise InputError(f"position {at}: the prompt has positions 0 to {len(logits) - 1} (0 is BOS)")
    top = logits[at].double().softmax(-1).topk(min(N_PREDICTIONS, logits.shape[-1]))
    words = model.token_strings(top.indices)
    return tuple(Prediction(token, float(p)) for token, p in zip(words, top.values, strict=True))


def _check_thresholds(arguments: argparse.Namespace) -> None:
    """Refuse a wrong threshold before the long work, not after it."""
    from graphs.pruning import check_threshold

    for name, value in thresholds(arguments).items():
        check_threshold(name, value)


class _Clock:
    """How long each stage took."""

    def __init__(self) -> None:
        self._stages: dict[str, float] = {}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        started = perf_counter()
        yield
        self._stages[stage] = perf_counter() - started

    def __str__(self) -> str:
        return ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self._stages.items())
