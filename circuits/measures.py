"""What can be measured of dictionaries, by name. Words only: the command line reads them before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping

MEASURES: Mapping[str, str] = {
    "reconstruction": "what each site's dictionary rebuilds, and how often features fire",
    "replacement": "what the model loses with all sites replaced",
    "sites": "the same with each site alone, and the next layer",
    "baselines": "approximations that need no dictionary, at the same L0",
    "probing": "sparse probes of known properties",
    "absorption": "first-letter absorption",
    "graphs": "replacement and completeness scores over prompts",
}
