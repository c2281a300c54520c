"""Traces, interventions, effects and figures on another device: `python -m tests.traced_elsewhere OUT [DEVICE]`.

Leaves a JSON file of plain numbers by name, to be compared with those of the CPU.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from circuits import Intervention, attribute, cli, intervene
from circuits.effects import indirect_effects
from circuits.heads import head_loadings
from replacement import ReplacementModel
from tests.elsewhere import NAME, pretended

PROMPT, PATCH = "the capital of the state containing Dallas is", "the capital of the state containing Seattle is"
TRACES: dict[str, dict[str, Any]] = {
    "transcoders": {"max_features": 40},
    "clt": {},
    "skip_transcoders": {"products": "bfloat16"},
    "neurons": {"max_features": 60, "attention": "gradient", "mlp": "jacobian"},
}
"""Settings by set of dictionaries."""


def figures(device: str) -> Iterator[tuple[str, list[float]]]:
    """Numbers that must not depend on the device."""
    for name, settings in TRACES.items():
        model = ReplacementModel.load("atlas", dictionaries=name, device=device)
        graph = attribute(model, PROMPT, **settings)
        yield f"{name}: edges", graph.dense_adjacency().flatten().tolist()
        if settings.get("attention") != "gradient":
            heads = head_loadings(model, graph, edges=range(20)).loadings
            yield f"{name}: heads", heads.toarray().flatten().tolist()
        if name != "neurons":
            node = int(graph.nodes.is_feature.argmax())
            place = (int(getattr(graph.nodes, axis)[node]) for axis in ("layer", "position", "feature"))
            yield f"{name}: without a feature", intervene(model, PROMPT, [Intervention(*place, 0.0)])[-1].tolist()
            pair = (model.tokenize(text)[None] for text in (PROMPT, PATCH))
            effects = indirect_effects(model, *pair, lambda logits: logits[:, -1, 7], method="ig", steps=2)
            yield f"{name}: effects", [float(effect.abs().sum()) for effect in effects.features.values()]
    with contextlib.redirect_stdout(said := io.StringIO()):
        settings = ["--tokens", "512", "--against", "skip_transcoders", "--json", "--device", device]
        assert cli.main(["eval", *settings]) == 0
    yield "eval", list(_numbers(json.loads(said.getvalue())["sets"]))


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _numbers(each)
    elif isinstance(value, int | float):
        yield float(value)


def main() -> None:
    """Write the figures of a device."""
    out, device = Path(sys.argv[1]), (sys.argv[2:] or [NAME])[0]
    torch.set_num_threads(1)
    with pretended() if device == NAME else contextlib.nullcontext(torch.device(device)) as where:
        out.write_text(json.dumps(dict(figures(str(where)))), encoding="utf-8")


if __name__ == "__main__":
    main()
