"""The folder of a run: what it may hold before a sweep, and which stores it was made from."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from probekit import results
from probekit.config import PreferenceOptions
from probekit.errors import ConfigError, FingerprintError
from probekit.preferences import load_preferences
from probekit.store import IMAGE_DIGESTS, FeatureStore
from probekit.store.files import LOCK, TEMP
from probekit.sweep.layer_sets import ANSWERS

JUDGEMENTS, DIGESTS = "judgements", IMAGE_DIGESTS  # what `prefs` leaves in a run
MADE_FROM = "made_from"
"""Key of ``config.json``: the stores of all sweeps into this run, with backbone and fingerprint."""


def check_folder(out: Path) -> None:
    """Refuse to mix a run with other files; one that was stopped early may hold bound judgements and no plan yet."""
    if not out.exists() or (out / "config.json").is_file():
        return
    known = (JUDGEMENTS, DIGESTS, ANSWERS, TEMP, LOCK)
    if not out.is_dir() or any(not path.name.startswith(known) for path in out.iterdir()):
        message = f"{out}: is no run; allowed: a new or empty folder, or the folder of an earlier sweep"
        raise ConfigError(message)


def bind_file(prefs: Path | str, reading: PreferenceOptions, *, out: Path) -> Path:
    """Judgements of another preference file, keyed by row, kept in the run so that every process reads the same.

    Raises
    ------
    ConfigError
        If none of its images is there: rows are found by the bytes of the images.
    """
    loaded = load_preferences(prefs, **reading.loading())
    # A missing file costs its pairs here, as a row that the store lacks does.
    digests = loaded.image_digests(out / DIGESTS, max_bad=1.0)
    if not digests.facts:
        message = (
            f"{prefs}: none of its {len(digests):,} image files is there, such as {min(digests)}; "
            "allowed: a preference file that lies where its images are, as rows of a store are found by their bytes"
        )
        raise ConfigError(message)
    frame = loaded.judgements(digests)
    path = out / JUDGEMENTS / f"{loaded.name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    frame.to_parquet(temporary, index=False)
    temporary.replace(path)
    return path


def made_from(out: Path, stores: Iterable[tuple[FeatureStore, str]]) -> list[dict[str, Any]]:
    """List the stores of a run, those of earlier sweeps first, and refuse one that was made anew since.

    Parameters
    ----------
    out
        The run.
    stores
        The stores that are given now, each with the name of its control.

    Raises
    ------
    FingerprintError
        If a store that the run knows, or the only store of a backbone that it knows, has another fingerprint now.
    """
    known = {entry["store"]: entry for entry in results.load_config(out).get(MADE_FROM, [])}
    given = {
        os.path.relpath(store.path, out.absolute()): {
            "backbone": f"{store.describe['name']} ({control})",
            "fingerprint": store.fingerprint,
        }
        for store, control in stores
    }
    for path, now in given.items():
        before = known.get(path)
        if before is None and now["fingerprint"] not in {one["fingerprint"] for one in known.values()}:
            # the folder may be another one: what counts is whether the run still gets the store it knows
            gone = (
                one
                for one in known.values()
                if one["backbone"] == now["backbone"]
                and one["fingerprint"] not in {other["fingerprint"] for other in given.values()}
            )
            before = next(gone, None)
        if before is not None and before["fingerprint"] != now["fingerprint"]:
            message = (
                f"{out}: was made from {before['store']} ({before['backbone']}) with fingerprint "
                f"{before['fingerprint'][:12]}; {(out / path).resolve()} has {now['fingerprint'][:12]}, so its "
                "features are others; allowed: the same store, or another --out"
            )
            raise FingerprintError(message)
    return list((known | {path: {"store": path} | now for path, now in given.items()}).values())
