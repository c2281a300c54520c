"""Options that commands share, their defaults read from the library functions they are passed to."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from circuits.defaults import default

PRUNE = "graphs.pruning:prune"


def add(parser: argparse._ActionsContainer, call: str, flag: str, text: str, **settings: Any) -> None:
    """Add the option `flag` of the library function `call`; `%(default)s` in its help is that function's default."""
    name = settings.pop("argument", flag.lstrip("-").replace("-", "_"))
    value = default(call, name)
    shown = "" if value is None or isinstance(value, bool) else " (default: %(default)s)"
    parser.add_argument(flag, default=value, help=text + shown, **settings)


def add_thresholds(parser: argparse.ArgumentParser, *, only_if_whole: bool = False) -> None:
    """Add `--node-threshold` and `--edge-threshold`.

    only_if_whole: the command leaves a graph that is stored pruned as it is, unless a threshold is given.
    """
    group = parser.add_argument_group("pruning")
    for kind in ("node", "edge"):
        flag, text = f"--{kind}-threshold", f"keep {kind}s with this share of influence"
        if only_if_whole:
            shown = f"{text} (default: {default(PRUNE, f'{kind}_threshold')} where the graph is stored unpruned)"
            group.add_argument(flag, type=float, metavar="SHARE", help=shown)
        else:
            add(group, PRUNE, flag, text, type=float, metavar="SHARE")


def thresholds(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the two thresholds as `prune` takes them."""
    return {name: getattr(arguments, name) for name in ("node_threshold", "edge_threshold")}


def print_json(value: Any) -> None:
    """Print one JSON object on standard output."""
    json.dump(value, sys.stdout, ensure_ascii=True, allow_nan=False, indent=2, default=str)
    print()
