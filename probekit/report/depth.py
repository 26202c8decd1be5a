"""What is said of the layers of a backbone together, and of the paths of pairs: functions of the tables of a run."""

from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd

from probekit.diagnostics import marked
from probekit.report.select import Setting
from probekit.report.tables import NONE, interval, percent, points

_KINDS_FROM = 20  # pairs of a kind below which its path says nothing


def of_setting(table: pd.DataFrame, setting: Setting, *, imported: Collection[str] = ()) -> pd.DataFrame:
    """Keep the rows of one setting in the table of families or of trajectories.

    Imported features (names of backbones) know nothing of noise and pooling and belong to every setting.
    """
    same = pd.Series(data=True, index=table.index)
    for name in ("dataset", "protocol", "head", "seed"):
        same &= table[name] == getattr(setting, name)
    for name in ("sigma", "draw", "pooling"):
        same &= (table[name] == getattr(setting, name)) | table["backbone"].isin(imported)
    return table[same]


def layers_table(families: pd.DataFrame, level: float) -> pd.DataFrame:
    """One row for each network: which layers may be the best, what the highest is worth, and the null hypothesis."""
    table = []
    for (backbone, control), rows in families.groupby(["backbone", "control"], sort=False):
        chosen, best = rows[rows["chosen"]], rows[rows["best"]].iloc[0]
        apart = rows[rows["p_adjusted"] <= 1 - level]
        entry: dict[str, Any] = {
            "Backbone": backbone,
            "Condition": str(control).replace("+", " + "),
            "Chosen": _listed(chosen),
            "May be the best": _listed(rows[rows["in_plateau"]]),
            "Within 1 point": _listed(rows[rows["within_point"]]),
            "Worse than the chosen": _listed(apart[apart["difference"] < 0]),
            "Better than the chosen": _listed(apart[apart["difference"] > 0]),
            "Highest on test": marked(
                f"{best['layer']}: {percent(best['best_naive'])}", *rows["converged"], before="\n"
            ),
            "What choosing it is worth": f"{percent(best['best_corrected'])}\n"
            f"{interval(best['best_low'], best['best_high'])}",
            "P of chance": f"{chosen['permutation_p'].iloc[0]:.2g}" if len(chosen) else NONE,
        }
        if families["ece"].notna().any():
            one = chosen if len(chosen) else rows[rows["best"]]
            entry["Calibration error"] = _calibration(one.iloc[0])
        table.append(entry)
    return pd.DataFrame(table)


def _calibration(row: pd.Series) -> str:
    by_chance = row["ece"] <= row["ece_by_chance"]
    return f"{points(row['ece']).removeprefix('+')}{', as by chance' * bool(by_chance)}"


def _listed(rows: pd.DataFrame) -> str:
    return ", ".join(map(str, rows["layer"])) or NONE


def paths_table(trajectories: pd.DataFrame, largest: str) -> pd.DataFrame:
    """Where pairs turn right or wrong along depth: every network, then the kinds of pairs of the largest backbone."""
    kind = trajectories["control"].str.replace(r":\d+", "", regex=True)
    table = [
        _path(f"{backbone}, {condition}" if condition != "trained" else str(backbone), rows)
        for (backbone, condition), rows in trajectories.groupby(["backbone", kind], sort=False)
    ]
    mine = trajectories[(trajectories["backbone"] == largest) & (trajectories["control"] == "trained")]
    kinds = [(source, rows) for source, rows in mine.groupby("source", sort=True) if len(rows) >= _KINDS_FROM]
    table += [_path(f"{largest}: {source}", rows) for source, rows in kinds] if len(kinds) > 1 else []
    return pd.DataFrame(table)


def _path(name: str, rows: pd.DataFrame) -> dict[str, str]:
    first, last = rows["path"].str[0] == "1", rows["path"].str[-1] == "1"
    never, once = rows["flips"] == 0, rows["flips"] == 1
    begin = rows["layers"].str.partition("+")[0].astype("int64")
    settled = rows["last_flip"].fillna(begin).astype("int64")[last]
    return {
        "Of": name,
        "Pairs": f"{rows['pair_id'].nunique():,}",
        "Always right": percent((never & first).mean()),
        "Turn right once": percent((once & ~first).mean()),
        "Turn wrong once": percent((once & first).mean()),
        "Always wrong": percent((never & ~first).mean()),
        "Flip more often": percent((rows["flips"] > 1).mean()),
        "Mean flips": f"{rows['flips'].mean():.1f}",
        "Half of the right ones stay from layer": f"{int(np.ceil(settled.median()))}" if len(settled) else NONE,
    }
