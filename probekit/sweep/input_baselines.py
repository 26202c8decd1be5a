"""Baselines that see what enters a backbone and no layer of it: pixels, the VAE latent, and this with the prompt.

They are controls: a layer that reads less than they do says nothing about the transformer. Fitted, tested and stored
like heads, once for every encoders and data set that backbones of a run share.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from sklearn.base import clone

from probekit import results
from probekit.config import Ties
from probekit.heads import BradleyTerryClassifierCV, BradleyTerryMLP
from probekit.heads.base import PairHead
from probekit.store import FeatureStore, canonical_json
from probekit.sweep.evaluate import judged_rows
from probekit.sweep.features import Features, Place
from probekit.sweep.fitting import fit_facts, margins
from probekit.sweep.material import Selection, material, open_cached
from probekit.sweep.plan import FIT_VERSION, Judged, Record

#: What each baseline sees, and its head. A linear head cannot use the prompt, which is the same for both sides.
SEEN: dict[str, tuple[tuple[str, ...], BradleyTerryClassifierCV | BradleyTerryMLP]] = {
    "pixels": (("pixels",), BradleyTerryClassifierCV()),
    "VAE latents": (("latents",), BradleyTerryClassifierCV()),
    "VAE latents and prompt": (("latents", "text"), BradleyTerryMLP(hidden=(64,), patience=3)),
}
_ENCODERS = ("weights", "files")
#: Settings of a store that what enters the transformer does not depend on.
_NOT_ENTERING = (
    *("layers", "poolings", "pooling_layers", "noise", "random_weights", "lora", "class", "extractor"),
    *("mix_rule", "noise_rule", "timestep_rule", "model", "revision", "dtype_policy", *_ENCODERS),
)


@dataclass(frozen=True, kw_only=True)
class InputBaseline(Judged):
    """One baseline on one data set; `entering` is a digest of what its numbers depend on besides the pairs."""

    name: str
    seen: str
    selection: Selection
    sigma: str
    draw: int
    datasets: tuple[str, ...]
    trained_on: str
    data_digest: str
    entering: str
    ties: Ties

    @property
    def record_id(self) -> str:
        """SHA-256 over the plain values, without paths and where the same numbers are read."""
        plain = {key: value for key, value in vars(self).items() if key not in ("selection", "sigma", "draw")}
        plain |= {"head": repr(SEEN[self.seen][1].get_params()), "fit_version": FIT_VERSION}
        return hashlib.sha256(canonical_json(plain).encode()).hexdigest()[:32]


def plan_input_baselines(records: Sequence[Record]) -> list[InputBaseline]:
    """Baselines of the data sets of some records, once where backbones have the same encoders and see the same."""
    found: dict[tuple[str, tuple[str, ...], str, str], Record] = {}
    for record in records:
        stores = [open_cached(path) for path in record.selection.stores]
        if record.control == "trained" and all(store.inputs for store in stores):
            entering = canonical_json([_entering(store) for store in stores])
            found.setdefault((record.trained_on, record.datasets, record.data_digest, entering), record)
    planned = []
    for (trained_on, datasets, _, entering), record in found.items():
        alike = sum(key[:2] == (trained_on, datasets) for key in found)
        held = set(open_cached(record.store).inputs)
        for seen in (seen for seen, (groups, _) in SEEN.items() if held.issuperset(groups)):
            planned.append(
                InputBaseline(
                    name=seen if alike == 1 else f"{seen} ({record.backbone})",
                    seen=seen,
                    selection=record.selection,
                    sigma=record.sigmas[0],
                    draw=record.draw,
                    datasets=record.datasets,
                    trained_on=record.trained_on,
                    data_digest=record.data_digest,
                    entering=hashlib.sha256(entering.encode()).hexdigest(),
                    ties=record.ties,
                    protocol=record.protocol,
                    resamples=record.resamples,
                    level=record.level,
                )
            )
    return planned


def _entering(store: FeatureStore) -> dict[str, object]:
    """Pick the settings of a store that what enters its transformer depends on."""
    settings = {key: value for key, value in store.config.items() if key not in _NOT_ENTERING}
    encoders = {
        key: {part: digest for part, digest in store.config.get(key, {}).items() if part != "transformer"}
        for key in _ENCODERS
    }
    return settings | encoders | {"definitions": {name: store.config["poolings"][name] for name in store.inputs}}


def place_of(baseline: InputBaseline) -> Place:
    """Give what a baseline reads, in the place of a layer."""
    groups, _ = SEEN[baseline.seen]
    (layer,) = open_cached(baseline.selection.stores[0]).layers_of(groups[0])
    return Place(baseline.selection, (baseline.sigma,), baseline.draw, groups, layer.index)


def run_input_baseline(baseline: InputBaseline, *, out: Path) -> None:
    """Fit one baseline and write its part."""
    data, (_, head) = material(baseline.selection), SEEN[baseline.seen]
    features = Features((place_of(baseline),))
    fitted: PairHead | None = None
    if features.vary:
        group = data.train.frame["group"].to_numpy()
        given = {"label": data.train.label, "sample_weight": data.train.frame["weight"].to_numpy(), "groups": group}
        if isinstance(head, BradleyTerryMLP):
            fitted = clone(head).fit(features.rows, data.train.rows, **given)
        else:
            linear = clone(head).set_params(cv=min(head.cv, len(np.unique(group))), quantisation=features.noise)
            fitted = linear.fit_differences(features.differences, **given)
    facts = results.NO_FEATURES | (results.NO_FIT if fitted is None else fit_facts(fitted))
    facts |= {
        "record_id": baseline.record_id,
        "backbone": baseline.name,
        "control": "inputs",
        "trained_on": baseline.trained_on,
        "protocol": baseline.protocol,
        "head": "mlp" if isinstance(head, BradleyTerryMLP) else "linear",
        "head_kind": "inputs",
        "data_digest": baseline.data_digest,
        "probekit_version": version("dit-probekit"),
    }
    judged = data.by_part(margins(fitted, features))
    rows, kept = judged_rows(baseline, data, judged, facts, blind=fitted is None)
    results.write_part(out, baseline.record_id, rows, kept)
