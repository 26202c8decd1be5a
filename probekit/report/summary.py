"""What a feature store or a run holds, in lines for a person: from the plain facts that ``inspect --json`` prints."""

from collections.abc import Iterator, Mapping
from typing import Any

from probekit._types import scaled
from probekit.diagnostics import marked
from probekit.report.style import in_millions
from probekit.report.tables import interval, percent

Lines = Iterator[tuple[str, str]]
_SHORT = 16  # characters of a hash


def store_lines(facts: Mapping[str, Any]) -> Lines:
    """Heading and text for the facts of `probekit.FeatureStore.summary`."""
    told = facts["backbone"]
    parameters = "" if told.get("n_parameters") is None else f", {in_millions(told['n_parameters'])} parameters"
    yield "feature store", facts["path"]
    yield "features", f"{told['name']}: {told['n_blocks']} blocks, width {told['width']}{parameters}"
    yield "of", "imported features" if told.get("imported") else str(told.get("model_id"))
    said = {"weights": told.get("random_weights") or "trained", "prompts": told.get("prompts")}
    said |= {key: told.get(key) for key in ("resolution", "dtype")}
    yield "made with", ", ".join(f"{key} {value}" for key, value in said.items() if value is not None)
    bad = f", {facts['bad_rows']:,} without features" if facts["bad_rows"] else ""
    yield "rows", f"{facts['rows']:,} of {facts['prompts']:,} prompts{bad}"
    yield "poolings", ", ".join(f"{name} ({layers})" for name, layers in facts["poolings"].items())
    for at in facts["coordinates"]:
        ratio = facts["sigma_resolution"].get(at["sigma"], {}).get("ratio")
        noise = "" if ratio is None else f", moves features {ratio:.1f} times as much as rounding to bfloat16"
        yield f"sigma {at['sigma']}, draw {at['draw']}", f"{at['rows']:,} rows{noise}"
    if facts["inputs"]:
        yield "inputs kept", ", ".join(facts["inputs"])
    for name, splits in facts["judgements"].items():
        yield f"pairs of {name}", ", ".join(f"{count:,} {split}" for split, count in splits.items()) or "none"
    stored = ", ".join(facts["datasets"])
    yield "on disk", f"{scaled(facts['bytes'], 'B')} in {facts['shards']:,} shards of {stored}"
    yield "fingerprint", f"{facts['fingerprint'][:_SHORT]} (format {facts['format_version']})"


def run_lines(facts: Mapping[str, Any]) -> Lines:
    """Heading and text for the facts of `probekit.results.describe_run`."""
    yield "run", facts["path"]
    heads = ", ".join(f"{count:,} {name}" for name, count in facts["fits"].items())
    yield "fits", f"{facts['records']:,}: {heads}" if facts["fits"] else "none on features"
    for heading, column in (("backbones", "backbones"), ("conditions", "controls"), ("poolings", "poolings")):
        yield heading, ", ".join(facts[column])
    yield "noise", f"sigma {', '.join(facts['sigmas'])}; draw {', '.join(map(str, facts['draws']))}"
    yield "accuracy", f"{', '.join(facts['protocols'])}, on up to {facts['test_pairs']:,} test pairs"
    for name in facts["datasets"]:
        left = f"; not in it: {facts['left_out'][name]}" if name in facts["left_out"] else ""
        yield f"data set {name}", f"split {facts['splits'].get(name, 'unknown')}{left}"
    for row in facts["unresolved"]:
        yield "not resolved", f"{row['backbone']} ({row['control']}) at sigma {row['sigma']}: {row['sigma_ratio']:.1f}"
    several = {
        text: key
        for key, text in (("dataset", "{}"), ("sigma", "sigma {}"), ("draw", "draw {}"), ("pooling", "{}"))
        if len({str(row[key]) for row in facts["chosen"]}) > 1
    }
    for row in facts["chosen"]:
        at = [f"{row['backbone']} ({row['control']})", *(text.format(row[key]) for text, key in several.items())]
        head = row["head"] + (f", seed {row['seed']}" if row["seed"] else "")
        share = marked(f"{percent(row['accuracy'])} % {interval(row['low'], row['high'])}", row["converged"])
        yield f"layer chosen, {head}", f"{', '.join(at)}: layer {row['layer_set']}, {share} on test pairs"
    for row in facts["scorers"]:
        share = f"{percent(row['accuracy'])} % {interval(row['low'], row['high'])}".replace("\N{EN DASH}", "").strip()
        yield "beside", f"{row['backbone']} ({row['control']}), {row['dataset']}: {share}"
