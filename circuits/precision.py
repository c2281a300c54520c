"""How far rounded products move rows from exact ones, measured on some rows of a trace. Knows engines and rows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.targets import reads
from circuits.tracer import Tracer
from replacement.contributions import Contributions, Engine, total_rows
from replacement.features import Targets

SAMPLED = 32  #: at most so many features whose rows are computed again, spread over those that have one


def rounding_error(tracer: Tracer, exact: Engine) -> float:
    """The largest error of a row that was looked at, `sum_s |A[t, s] - exact[t, s]| / sum_s |exact[t, s]|`.

    Rows of all targets and of SAMPLED features, each computed by the trace's engine and by `exact`.
    """
    local, worst = tracer.local, 0.0
    order = torch.from_numpy(tracer.order).to(local.forward.tokens)
    sample = order[:: max(1, -(-len(order) // SAMPLED))].sort().values
    depth = local.features.depth[sample]
    asked: list[list[Targets]] = [local.feature_targets(sample[depth == at]) for at in depth.unique()]
    asked += [reads(local, [target]) for target in tracer.targets]
    for one in asked:
        rounded, right = (_rows(total_rows(engine, one)) for engine in (tracer.engine, exact))
        sums = right.abs().sum(1).clamp_min(torch.finfo(right.dtype).tiny)
        worst = max(worst, float(((rounded - right).abs().sum(1) / sums).max()))
    return worst


def _rows(found: Contributions) -> Float[Tensor, "n n_sources"]:
    return torch.cat([part.flatten(1) for part in found[:3]], 1)
