"""Which features to trace next when not all are: influence over the rows known so far. Array work only."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

MIN_ROW_SUM = 1e-8  #: rows whose absolute weights sum to less are divided by this, as in the reference tool


def partial_influence(
    rows: csr_array,
    layers: Int[np.ndarray, " n_rows"],
    features: Int[np.ndarray, " n_feature_rows"],
    weights: Float[np.ndarray, " n_targets"],
) -> Float[np.ndarray, " n_columns"]:
    """Influence of every source on the targets along the rows known so far.

    rows: [n_rows, n_columns] contributions, targets first, then one row for each entry of `features`, the column of the
    feature whose row it is. layers: each row's layer; a row only has sources of lower layers, so one sweep from the
    highest layer down is exact: `I = p (Â + Â² + ...)` with Â the row-normalised absolute rows.
    """
    absolute = abs(rows).astype(np.float64)
    sums = np.maximum(absolute.sum(1), MIN_ROW_SUM)
    influence = np.zeros(rows.shape[1])
    column = np.concatenate([np.full(len(weights), -1), features])
    gain = np.concatenate([weights, np.zeros(len(features))])
    for layer in np.unique(layers)[::-1]:
        of_layer = np.flatnonzero(layers == layer)
        own = column[of_layer]
        gain[of_layer] += np.where(own >= 0, influence[own], 0.0)
        influence += (gain[of_layer] / sums[of_layer]) @ absolute[of_layer]
    return influence
