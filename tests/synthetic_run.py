"""A run folder with invented results that look like a family of small trained backbones.

The accuracies follow known curves (rise over the first blocks, slight decline at the end, more with size and training,
random weights gaining from width alone), and the rows are computed from the invented margins, so that everything a
report prints can be checked against the margins.
"""

import hashlib
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm

from probekit.results import rebuild, write_config, write_part

KINDS = {  # peak accuracy of a large backbone, and the relative depth at which the rise is half done
    "background": (0.93, 0.02),
    "degradation": (0.84, 0.01),
    "colour": (0.84, 0.08),
    "size": (0.73, 0.15),
    "count": (0.68, 0.18),
    "binding": (0.59, 0.45),
    "shape": (0.56, 0.40),
    "relation": (0.51, 0.50),
}
TEXT_FREE = {"degradation"}
STRENGTHS = [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0]


@dataclass(frozen=True)
class Net:
    """One invented backbone."""

    name: str
    n_blocks: int
    width: int
    training_images: int | None = 300_000
    control: str = "trained"

    @property
    def parameters(self) -> int:
        return self.n_blocks * 36 * self.width**2 + 40 * self.width

    @property
    def size(self) -> float:
        """0 for 3 x 48, 1 for 8 x 128."""
        return float(np.log(self.parameters / 254_000) / np.log(4_724_000 / 254_000))


FAMILY = (
    Net("3x48-seed0", 3, 48),
    Net("3x48-seed1", 3, 48),
    Net("3x48-seed2", 3, 48),
    Net("6x48", 6, 48),
    Net("3x96", 3, 96),
    Net("3x96-step03", 3, 96, 9_000),
    Net("3x96-step10", 3, 96, 30_000),
    Net("3x96-step30", 3, 96, 90_000),
    Net("6x96", 6, 96),
    Net("8x128", 8, 128),
)


def with_controls(nets: tuple[Net, ...], n_init: int = 3, n_shuffled: int = 0) -> tuple[Net, ...]:
    """Add random-weights controls to the first net of each shape."""
    shapes: dict[tuple[int, int], Net] = {}
    for net in nets:
        shapes.setdefault((net.n_blocks, net.width), net)
    kinds = [f"init:{seed}" for seed in range(n_init)] + [f"shuffled:{seed}" for seed in range(n_shuffled)]
    return nets + tuple(replace(net, control=kind, training_images=None) for net in shapes.values() for kind in kinds)


def make_pairs(n_test: int, n_validation: int, kinds: tuple[str, ...], seed: int) -> pd.DataFrame:
    """Pairs in groups of three, with a soft spot for ties: every fortieth pair is one."""
    rng = np.random.default_rng(seed)
    n = n_test + n_validation
    split = np.where(np.arange(n) < n_test, "test", "validation")
    group = [f"g{i // 3}" if i < n_test else f"v{i // 3}" for i in range(n)]
    label = rng.integers(0, 2, n).astype(float)
    label[::40] = 0.5
    source = [kinds[(i // 3) % len(kinds)] if kinds else "" for i in range(n)]
    return pd.DataFrame(
        {"pair_id": [f"p{i:05d}" for i in range(n)], "group": group, "split": split, "source": source, "label": label}
    )


def accuracy_curve(net: Net, depth: float, kind: str, *, joined: bool) -> float:
    """Invented probability of a right answer; without its prompt a network knows what needs no text."""
    peak, half = KINDS.get(kind, (0.70, 0.08))
    if "prompts" in net.control and kind not in TEXT_FREE:
        peak = 0.5 + 0.2 * (peak - 0.5)
    trained = not net.control.startswith(("init:", "shuffled:"))
    if trained:
        learned = 1.0 if net.training_images is None else np.log10(net.training_images / 1000) / np.log10(300)
        strength = (0.62 + 0.38 * net.size) * (0.25 + 0.75 * learned)
    else:
        strength = 0.12 + 0.32 * net.size + 0.04 * (int(net.control.partition("+")[0].split(":")[1]) - 1)
    if joined:
        return float(min(0.97, 0.5 + (peak - 0.5) * strength * 1.3 + 0.01))
    seen = 1.0 if kind in TEXT_FREE else 1 / (1 + np.exp(-(depth - half) / 0.06)) if depth > 0 else 0.0
    decline = 1 - 0.25 * max(0.0, depth - 0.55)
    return float(0.5 + (peak - 0.5) * strength * seen * decline)


def _interval(correct: np.ndarray, groups: np.ndarray) -> tuple[float, float, float, float, float, int]:
    decided = ~np.isnan(correct)
    correct, groups = correct[decided], groups[decided]
    if len(correct) == 0:
        return (np.nan,) * 4 + (0.0, 0)  # type: ignore[return-value]
    accuracy = correct.mean()
    _, index, size = np.unique(groups, return_inverse=True, return_counts=True)
    residual = np.bincount(index, weights=correct - accuracy)
    se = float(np.sqrt((residual**2).sum()) / len(correct))
    inner = min(max(accuracy, 1e-3), 1 - 1e-3)
    logit, half = np.log(inner / (1 - inner)), 1.96 * se / (inner * (1 - inner))
    low, high = 1 / (1 + np.exp(-logit + half)), 1 / (1 + np.exp(-logit - half))
    return float(accuracy), float(low), float(high), se, float(size.sum() ** 2 / (size**2).sum()), len(size)


def write_run(
    run: Path,
    nets: tuple[Net, ...],
    *,
    kinds: tuple[str, ...] = tuple(KINDS),
    n_test: int = 1800,
    n_validation: int = 600,
    sigmas: tuple[str, ...] = ("0.005",),
    draws: tuple[int, ...] = (0,),
    output: bool = False,
    ratio: float = np.nan,
    tested: bool = True,
    heads: tuple[str, ...] = ("linear",),
    singles: bool = True,
    joined: bool = True,
    validation: bool = True,
    seed: int = 0,
) -> list[str]:
    """Write parts, results and configuration; returns the record ids in the order of the plan.

    `output` adds the output point to the single layers, `ratio` is the sigma_ratio of every store, `tested`
    its family_tested.
    """
    pairs = make_pairs(n_test, n_validation if validation else 0, kinds, seed)
    difficulty = np.random.default_rng(seed + 1).normal(size=len(pairs))
    keys = []
    layers_in_all = {}
    for net in nets:
        single = [(k,) for k in range(net.n_blocks + 1 + output)]
        for sigma, draw in product(sigmas, draws):
            for layers in single * singles + [tuple(range(net.n_blocks + 1))] * joined:
                for head in heads if len(layers) > 1 else heads[:1]:
                    keys.append(_write_record(run, net, layers, head, (sigma, draw), pairs, difficulty, kinds))
                    layers_in_all[keys[-1]] = net.n_blocks + 1
    facts = {"pooling_layers": layers_in_all, "sigma_ratio": ratio, "family_tested": tested, "imported": False}
    rebuild(run, keys, facts=pd.DataFrame(facts))
    store = {"store": "features/demo", "resolution": 32, "dtype": "float32", "noise": "shared", "noise_seed": 0}
    sweep = {"heads": [_head(name) for name in heads], "protocol": "strict", "resamples": 2000, "level": 0.95}
    write_config(run, {"sweep": sweep, "stores": [store]})
    return keys


def _head(name: str) -> dict[str, object]:
    return {"name": name, "kind": "mlp"} if name == "mlp" else {"name": name, "kind": "linear", "strengths": STRENGTHS}


def _write_record(
    run: Path,
    net: Net,
    layers: tuple[int, ...],
    head: str,
    place: tuple[str, int],
    pairs: pd.DataFrame,
    difficulty: np.ndarray,
    kinds: tuple[str, ...],
) -> str:
    sigma, draw = place
    name = f"{net.name}|{net.control}|{layers}|{head}|{sigma}" + f"|{draw}" * (draw > 0)
    key = hashlib.sha256(name.encode()).hexdigest()[:24]
    rng = np.random.default_rng(int(key[:8], 16))
    single = len(layers) == 1
    depth = min(layers[0], net.n_blocks) / net.n_blocks
    chance = np.array([accuracy_curve(net, depth, kind, joined=not single) for kind in pairs["source"]])
    chance += 0.01 * (head == "mlp")
    noise = 0.75 * difficulty + np.sqrt(1 - 0.75**2) * rng.normal(size=len(pairs))
    right = norm.ppf(chance) > noise
    tie = pairs["label"].to_numpy() == 0.5
    sign = np.where(tie, 1.0, np.where((pairs["label"] > 0.5) == right, 1.0, -1.0))
    margins = pairs.assign(
        margin=sign * np.abs(rng.normal(1.0, 0.3, len(pairs))),
        prompt_id=pairs["group"],
        row_a=2 * np.arange(len(pairs)),
        row_b=2 * np.arange(len(pairs)) + 1,
        correct=np.where(tie, np.nan, right.astype(float)),
    )
    linear = head != "mlp"
    strength = STRENGTHS[rng.choice([0, 5]) if rng.random() < 0.04 else rng.integers(1, 5)] if linear else np.nan
    common = {
        "record_id": key,
        "backbone": net.name,
        "control": net.control,
        "dataset": "demo",
        "trained_on": "demo",
        "protocol": "strict",
        "sigma": sigma,
        "draw": draw,
        "pooling": "mean",
        "layer_set": "+".join(map(str, layers)),
        "layer": layers[0] if single else None,
        "n_layers": len(layers),
        "combination": "single" if single else "concat",
        "head": head,
        "head_kind": "linear" if linear else "mlp",
        "seed": 0,
        "altered": "",
        "n_train": 1000,
        "left_out": 2,
        "predicted_ties": 0,
        "strength": strength,
        "edge_of_grid": strength in (STRENGTHS[0], STRENGTHS[-1]),
        "converged": bool(rng.random() > 0.02),
        "n_iter": 4,
        "gradient_norm": 1e-6,
        "n_dropped": 0,
        "n_less_than_d": False,
        "matrix_free": False,
        "train_left_out": 0,
        "train_ties": 0,
        "train_connected": 0,
        "train_accuracy": min(1.0, float(chance.mean()) + 0.04),
        "head_parameters": net.width * len(layers),
        "backbone_parameters": net.parameters,
        "width": net.width,
        "n_blocks": net.n_blocks,
        "relative_depth": depth if single else np.nan,
        "training_images": net.training_images,
        "store_fingerprint": hashlib.sha256(f"{net.name}{net.control}".encode()).hexdigest(),
        "data_digest": "ab" * 32,
        "probekit_version": "0.1.0",
    }
    rows = []
    correct = np.where(tie, np.nan, right.astype(float))
    for split in pairs["split"].unique():
        here = (pairs["split"] == split).to_numpy()
        by_kind = [correct[here & (pairs["source"] == kind).to_numpy()] for kind in kinds]
        macro = float(np.mean([np.nanmean(c) for c in by_kind])) if kinds else np.nan
        for source in ("all", *kinds):
            mask = here if source == "all" else here & (pairs["source"] == source).to_numpy()
            accuracy, low, high, se, effective, n_groups = _interval(correct[mask], pairs["group"].to_numpy()[mask])
            whole = source == "all" and bool(kinds)
            rows.append(
                common
                | {
                    "split": split,
                    "slice_by": "all" if source == "all" else "source",
                    "source": source,
                    "accuracy": accuracy,
                    "low": low,
                    "high": high,
                    "se": se,
                }
                | {"macro_accuracy": macro if whole else np.nan, "macro_low": macro - 1.96 * se if whole else np.nan}
                | {"macro_high": macro + 1.96 * se if whole else np.nan, "n_pairs": int((mask & ~tie).sum())}
                | {"micro_accuracy": accuracy, "prompt_accuracy": accuracy, "threshold": np.nan}
                | {"expected_random": 0.5, "expected_constant": 0.0, "expected_first": np.nan}
                | {"true_ties": int(tie[mask].sum()), "n_groups": n_groups, "effective_groups": effective}
            )
    write_part(run, key, pd.DataFrame(rows), margins.assign(dataset="demo"))
    return key
