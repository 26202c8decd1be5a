"""A run folder: atomically renamed parts of records, joined as one tidy frame."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.lib as pa

from probekit.errors import ResultsError
from probekit.results.columns import (
    BEYOND_COLUMNS,
    BLOCK_COLUMNS,
    CHOICE_KEYS,
    CONTROL_COLUMNS,
    FAMILY_COLUMNS,
    FILLED_IN,
    MARGIN_COLUMNS,
    PART_COLUMNS,
    RESULT_COLUMNS,
    TRAJECTORY_COLUMNS,
)
from probekit.results.tables import (
    check_rows,
    read_arrow,
    read_or_none,
    read_table,
    replace_file,
    to_pandas,
    write_or_remove,
    write_table,
)

PLAN = "plan"
"""Key of ``config.json``: ids of all records of the sweep, baselines included."""
JUDGED = "judged"
"""Key of ``config.json``: true once what is said of several records together is written too."""
EXTERNAL = "external-"  # what ids of records of scores from elsewhere begin with: no plan lists them
_RECORD_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


def write_part(run: str | Path, record_id: str, rows: pd.DataFrame, margins: pd.DataFrame) -> None:
    """Write the rows and the margins of one record; the part comes last and makes the record count as done.

    Parameters
    ----------
    run
        Run folder; made if absent.
    record_id
        Name of the record: letters, digits, ``_`` and ``-``.
    rows
        `RESULT_COLUMNS`, in any order, without ``chosen`` and those that `rebuild` fills in, which depend on
        other records or on the store alone.
    margins
        `MARGIN_COLUMNS`: one row for each validation and test pair.
    """
    if not _RECORD_ID.fullmatch(record_id):
        msg = f"record_id is {record_id!r}; allowed: letters, digits, '_' and '-', at most 128"
        raise ResultsError(msg)
    run = Path(run)
    rows = rows.assign(chosen=False)
    check_rows(rows, f"record {record_id}")
    if set(rows["record_id"]) != {record_id}:
        msg = f"record {record_id}: column record_id holds {sorted(set(rows['record_id']))[:3]}"
        raise ResultsError(msg)
    write_table(run / "margins" / f"{record_id}.parquet", margins, MARGIN_COLUMNS)
    write_table(_part_path(run, record_id), rows, PART_COLUMNS)


def done_records(run: str | Path) -> set[str]:
    """Ids of the records whose part exists and reads; a damaged part is an error that names it."""
    paths = sorted((Path(run) / "parts").glob("*.parquet"))
    for path in paths:
        read_arrow(path, PART_COLUMNS)
    return {path.stem for path in paths}


def rebuild(run: str | Path, record_ids: Sequence[str], *, facts: pd.DataFrame | None = None) -> int:
    """Join the parts of the current plan into ``results.parquet``, in the order of the plan, and mark chosen layers.

    Parts of earlier configurations stay on disk and are not read. Scores from elsewhere (ids that begin with
    `EXTERNAL`) come after the plan, whichever it is.

    Parameters
    ----------
    run
        Run folder.
    record_ids
        Records of the plan.
    facts
        What the stores say of the records, indexed by record: ``family_tested``, ``sigma_ratio``, ``pooling_layers``
        and ``imported``. Without it every family counts as tested, no noise level as measured, every pooling as
        existing at all ``n_blocks + 1`` layers, and nothing as imported.

    Returns
    -------
    int
        How many such other parts the run holds.
    """
    run = Path(run)
    outside = sorted(path.stem for path in (run / "parts").glob(f"{EXTERNAL}*.parquet"))
    keys = [*record_ids, *(key for key in outside if key not in set(record_ids))]
    if not keys:
        msg = f"{run}: the plan holds no record, so there is no results table to write"
        raise ResultsError(msg)
    parts = [read_arrow(_part_path(run, key), PART_COLUMNS).replace_schema_metadata() for key in keys]
    frame = to_pandas(pa.concat_tables(parts), PART_COLUMNS)
    known = frame.assign(family_tested=True, sigma_ratio=np.nan, pooling_layers=frame["n_blocks"] + 1, imported=False)
    if facts is not None:
        stored = frame["record_id"].isin(facts.index)
        filled = {name: frame["record_id"].map(facts[name]).where(stored, known[name]) for name in FILLED_IN}
        known = frame.assign(**{name: values.astype(known[name].dtype) for name, values in filled.items()})
    frame = known
    write_table(run / "results.parquet", mark_chosen(frame), RESULT_COLUMNS)
    return len({path.stem for path in (run / "parts").glob("*.parquet")} - set(keys))


def add_external(run: str | Path, record_id: str, rows: pd.DataFrame, margins: pd.DataFrame) -> None:
    """Write the part of scores from elsewhere and put it into ``results.parquet``, behind what is there.

    Scores of the same name, data set and protocol take the place of earlier ones.

    Parameters
    ----------
    run, record_id, rows, margins
        As in `write_part`; the id begins with `EXTERNAL`.
    """
    run = Path(run)
    write_part(run, record_id, rows, margins)
    same = ["backbone", "dataset", "protocol"]
    for path in (run / "parts").glob(f"{EXTERNAL}*.parquet"):
        other = read_table(path, PART_COLUMNS)
        if path.stem != record_id and (other[same].iloc[0] == rows[same].iloc[0]).all():
            path.unlink()
            (run / "margins" / path.name).unlink(missing_ok=True)
    if not (run / "results.parquet").is_file():
        rebuild(run, [])
        return
    frame = load_results(run)
    planned = frame[frame["head_kind"] != "external"].drop_duplicates("record_id").set_index("record_id")
    rebuild(run, list(planned.index), facts=planned[list(FILLED_IN)])


def load_results(run: str | Path) -> pd.DataFrame:
    """Read the tidy frame of a run, checked against `RESULT_COLUMNS`."""
    path = Path(run) / "results.parquet"
    if not path.is_file():
        check_finished(run)
        msg = f"{path}: no results table; a run folder is what `probekit sweep --out` writes"
        raise ResultsError(msg)
    frame = read_table(path, RESULT_COLUMNS)
    check_rows(frame, str(path))
    return frame


def load_margins(run: str | Path, record_ids: Iterable[str] | None = None) -> pd.DataFrame:
    """Read the margins of some records (default: of every record in the results table).

    Returns
    -------
    pandas.DataFrame
        ``record_id`` and `MARGIN_COLUMNS`; the pairs of a record in the order in which they were written.
    """
    if record_ids is None:
        record_ids = load_results(run)["record_id"].unique()
    frames = []
    for record_id in record_ids:
        frame = read_table(Path(run) / "margins" / f"{record_id}.parquet", MARGIN_COLUMNS)
        frame.insert(0, "record_id", record_id)
        frames.append(frame)
    if not frames:
        return pd.DataFrame(
            {name: pd.Series(dtype=dtype) for name, dtype in ({"record_id": "str"} | MARGIN_COLUMNS).items()}
        )
    return pd.concat(frames, ignore_index=True)


def write_beyond(run: str | Path, rows: pd.DataFrame) -> None:
    """Write what chosen layers add to the generators' names (`BEYOND_COLUMNS`); without rows the table goes."""
    write_or_remove(Path(run) / "beyond_generator.parquet", rows, BEYOND_COLUMNS)


def load_beyond(run: str | Path) -> pd.DataFrame:
    """Read what chosen layers add to the generators' names; empty where the run has no generator baseline."""
    return read_or_none(Path(run) / "beyond_generator.parquet", BEYOND_COLUMNS)


def write_controls(run: str | Path, rows: pd.DataFrame) -> None:
    """Write what refits and altered features say (`CONTROL_COLUMNS`); without rows the table goes."""
    write_or_remove(Path(run) / "controls.parquet", rows, CONTROL_COLUMNS)


def load_controls(run: str | Path) -> pd.DataFrame:
    """Read what refits and altered features say; empty where no head asked for them."""
    return read_or_none(Path(run) / "controls.parquet", CONTROL_COLUMNS)


def write_blocks(run: str | Path, rows: pd.DataFrame) -> None:
    """Write blocks of layers and what pairs within and across them read (`BLOCK_COLUMNS`); without rows it goes."""
    write_or_remove(Path(run) / "blocks.parquet", rows, BLOCK_COLUMNS)


def load_blocks(run: str | Path) -> pd.DataFrame:
    """Read blocks of layers and what pairs within and across them read; empty where no head asked for blocks."""
    return read_or_none(Path(run) / "blocks.parquet", BLOCK_COLUMNS)


def write_families(run: str | Path, families: pd.DataFrame, trajectories: pd.DataFrame) -> None:
    """Write layers judged together (`FAMILY_COLUMNS`) and the paths of pairs (`TRAJECTORY_COLUMNS`)."""
    write_or_remove(Path(run) / "families.parquet", families, FAMILY_COLUMNS)
    write_or_remove(Path(run) / "trajectories.parquet", trajectories, TRAJECTORY_COLUMNS)


def load_families(run: str | Path) -> pd.DataFrame:
    """Read what holds for the layers of each backbone together; empty where no head reads two single layers."""
    return read_or_none(Path(run) / "families.parquet", FAMILY_COLUMNS)


def load_trajectories(run: str | Path) -> pd.DataFrame:
    """Read at which layers each test pair is right; empty where no head reads two single layers."""
    return read_or_none(Path(run) / "trajectories.parquet", TRAJECTORY_COLUMNS)


def write_config(run: str | Path, config: Mapping[str, Any]) -> None:
    """Write the resolved configuration of a run as ``config.json``."""
    replace_file(Path(run) / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def load_config(run: str | Path) -> dict[str, Any]:
    """Read the resolved configuration of a run; empty where the run has none."""
    path = Path(run) / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path}: not readable as JSON ({error}); run the same sweep again to write it anew"
        raise ResultsError(msg) from error
    if not isinstance(config, dict):
        msg = f"{path}: holds a {type(config).__name__}; a configuration is an object"
        raise ResultsError(msg)
    return config


def check_finished(run: str | Path) -> None:
    """Refuse a run of which some planned fits are missing, or stand in parts and not yet in the results table.

    Raises
    ------
    ResultsError
        If its sweep was stopped.
    """
    run = Path(run)
    config = load_config(run)
    planned = config.get(PLAN)
    if planned is None:  # no sweep wrote it
        return
    parts = {path.stem for path in (run / "parts").glob("*.parquet")}
    held = set(load_results(run)["record_id"]) if (run / "results.parquet").is_file() else set()
    if {key for key in held if not key.startswith(EXTERNAL)} != set(planned) or not config.get(JUDGED):
        msg = (
            f"{run}: not finished: {len(parts & set(planned)):,} of {len(planned):,} fits are done; the same "
            "`probekit sweep` command finishes it"
        )
        raise ResultsError(msg)


def mark_chosen(frame: pd.DataFrame) -> pd.DataFrame:
    """Fill ``chosen``: all rows of the single layer with the best validation accuracy within `CHOICE_KEYS`.

    The output point is no layer and is never chosen. Equal accuracies go to the earlier layer. Settings without
    validation rows, or with fewer than two single layers, choose nothing.
    """
    candidates = frame[
        (frame["split"] == "validation")
        & (frame["slice_by"] == "all")
        & (frame["combination"] == "single")
        & (frame["layer"] <= frame["n_blocks"]).fillna(False)  # noqa: FBT003
        & frame["accuracy"].notna()
    ].sort_values(["accuracy", "layer"], ascending=[False, True], kind="stable")
    within = [*CHOICE_KEYS, "altered"]
    several = candidates.duplicated(within, keep=False)
    best = candidates[several].drop_duplicates(within)
    keys = [*within, "record_id"]
    chosen = pd.MultiIndex.from_frame(frame[keys]).isin(pd.MultiIndex.from_frame(best[keys]))
    return frame.assign(chosen=chosen)


def _part_path(run: Path, record_id: str) -> Path:
    return run / "parts" / f"{record_id}.parquet"
