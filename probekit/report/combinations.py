"""What joining brings: layers by several rules, noise levels and poolings side by side, blocks of similar layers."""

from pathlib import Path
from typing import Any

import pandas as pd

from probekit.report.effects import Side, Verdicts
from probekit.report.select import Setting, joined_setting, narrow, reported_rows
from probekit.report.tables import LEVELS, NONE, accuracy_text, effect_text, interval, percent, points
from probekit.results import load_blocks

_KEYS = ["backbone", *LEVELS, "head", "combination", "n_layers"]


def combinations_table(frame: pd.DataFrame, setting: Setting, verdicts: Verdicts) -> pd.DataFrame:
    """One row for each way of joining, with the layer set that is best on validation, against the chosen single layer.

    Parameters
    ----------
    frame
        Rows of all settings.
    setting
        That of the figures: the layer chosen there is compared with, whatever a way of joining reads.
    verdicts
        Of its data set.
    """
    same = (frame["dataset"] == setting.dataset) & (frame["protocol"] == setting.protocol)
    rows = frame[same & (frame["control"] == "trained") & (frame["slice_by"] == "all")]
    rows = narrow(rows, setting, any_head=True, any_level=True)
    shown = rows[(rows["combination"] != "single") | joined_setting(rows)]
    lone = reported_rows(narrow(rows, setting))
    lone = lone[lone["chosen"]].set_index("backbone")
    shown = shown.sort_values(["backbone", "n_layers"], kind="stable")
    table = []
    for _, group in shown.groupby(_KEYS, sort=False):
        backbone, *levels, head, combination, n_layers = group[_KEYS].to_numpy(object)[0]
        validation = group[group["split"] == "validation"].groupby("layer_set", sort=False)["accuracy"].mean()
        sets = group["layer_set"].unique()
        if len(sets) > 1 and validation.notna().sum() == 0:
            continue  # nothing says which to show
        best = sets[0] if len(sets) == 1 else str(validation.idxmax())
        tested = reported_rows(group[group["layer_set"] == best])
        entry: dict[str, Any] = {"Backbone": backbone, "Head": head}
        entry["Layers"] = f"{n_layers} by {combination}" if n_layers > 1 else "1"
        for name, value in zip(LEVELS.values(), levels, strict=True):
            entry[name] = str(value).replace("+", " + ")
        entry |= {
            "Best on validation": "all layers"
            if n_layers == group["pooling_layers"].max()
            else best.replace("+", " + "),
            "Of sets": f"{len(sets):,}",
            "Test accuracy": accuracy_text(tested),
        }
        over = NONE
        if backbone in lone.index and tested["accuracy"].notna().all():
            single = lone.loc[[backbone]]
            sides = [
                Side("", tuple(some["record_id"]), tuple(some["seed"].astype(str)), bool(some["converged"].all()))
                for some in (tested, single)
            ]
            over = effect_text(verdicts.compare(f"{backbone}: {best} - chosen layer", sides[:1], sides[1:]))
        table.append(entry | {"Over the chosen layer": over})
    found = pd.DataFrame(table)
    alike = [name for name in LEVELS.values() if len(found) and found[name].nunique() == 1]
    return found.drop(columns=alike)


def blocks_table(run: Path, setting: Setting) -> pd.DataFrame:
    """Blocks of similar layers of each backbone, and pairs of layers within one against pairs across two."""
    rows = load_blocks(run)
    same = (rows["dataset"] == setting.dataset) & (rows["control"] == "trained") & (rows["sigma"] == setting.sigma)
    same &= (rows["pooling"] == setting.pooling) & (rows["draw"] == setting.draw)
    same &= (rows["head"] == setting.head) & (rows["seed"] == setting.seed)
    table = []
    for row in rows[same & (rows["protocol"] == setting.protocol)].to_dict("records"):
        gain = f"{points(row['difference'])}\n{interval(row['low'], row['high'], signed=True)}"
        table.append(
            {
                "Backbone": row["backbone"],
                "Blocks of layers": row["blocks"],
                "Pairs within": f"{row['n_within']:,}",
                "Their mean": percent(row["within"]),
                "Their best": percent(row["best_within"]),
                "Pairs across": f"{row['n_across']:,}",
                "Mean across": percent(row["across"]),
                "Best across": percent(row["best_across"]),
                "Across over within": NONE if pd.isna(row["difference"]) else gain,
            }
        )
    return pd.DataFrame(table)
