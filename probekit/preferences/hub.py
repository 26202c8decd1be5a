"""Data sets of the library ``datasets``: what it saved, folders of data files, and ids of the Hugging Face Hub."""

import logging
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from probekit.errors import PreferenceError
from probekit.preferences.packed import DatasetRows
from probekit.preferences.readers import split_of
from probekit.preferences.records import READERS
from probekit.preferences.tables import Opened, Root

logger = logging.getLogger(__name__)


def seems_hub_id(path: str | Path) -> bool:
    """Say whether a text is an id such as ``owner/name``, and no file name."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path))) and Path(path).suffix.lower() not in READERS


def open_folder(folder: Path, notes: Counter[str]) -> list[tuple[str, Opened]]:
    """Open what is in a folder, each part with its official split (empty where it has none).

    What is odd about the parts is added to the notes (see `PreferenceSet`).

    Raises
    ------
    PreferenceError
        If ``datasets`` is not installed, or finds no data in the folder.
    """
    datasets = _library(folder)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = _asked(folder, lambda: datasets.load_from_disk(str(folder)))
        return _arrow_parts(datasets, folder, saved, folder, notes)
    found = _asked(folder, lambda: datasets.load_dataset_builder(str(folder)).config.data_files)
    files = [(split, Path(str(file))) for split, of in (found or {}).items() for file in of]
    files = [(split, file) for split, file in files if file.suffix.lower() in READERS]
    if not files:
        msg = (
            f"{folder}: datasets finds no data files there (in a folder of pictures it does not look for others); "
            f"allowed: {', '.join(READERS)}, what datasets saved, or one file by its own name"
        )
        raise PreferenceError(msg)
    doubled = _doubled([str(split) for split, _ in files], folder, notes)
    files = [(split, file) for split, file in files if split not in doubled]
    several = len({split for split, _ in files}) > 1  # the one split of an unnamed file is called train
    return [
        (split_of(str(split)) if several else split_of(file.name), Opened(file, _root(folder, file)))
        for split, file in files
    ]


def open_hub(name: str, notes: Counter[str]) -> list[tuple[str, Opened]]:
    """Open a data set of the Hub, which is downloaded; see `open_folder`."""
    datasets = _library(Path(name))
    found = _asked(Path(name), lambda: datasets.load_dataset(name), hub=datasets.config)
    files = [entry["filename"] for part in _parts(datasets, found).values() for entry in part.cache_files]
    return _arrow_parts(datasets, Path(name), found, Path(files[0]).parent, notes)


def _arrow_parts(datasets: Any, named: Path, found: Any, folder: Path, notes: Counter[str]) -> list[tuple[str, Opened]]:
    parts = _parts(datasets, found)
    doubled = _doubled(list(parts), named, notes)
    parts = {split: part for split, part in parts.items() if split not in doubled}
    several = len(parts) > 1
    return [
        (
            split_of(str(split)) if several else "",  # the one split of a set without is called train
            Opened(named / str(split), _root(folder, folder / (str(split) or folder.name)), DatasetRows(part)),
        )
        for split, part in parts.items()
    ]


def _doubled(splits: list[str], folder: Path, notes: Counter[str]) -> set[str]:
    """Name parts such as Pick-a-Pic's ``test_unique``, whose pairs are also in ``test``."""
    found = {split for split in splits if split.removesuffix("_unique") in set(splits) - {split}}
    if found:
        what = f"parts are left out, since their pairs are in other parts too: {', '.join(sorted(found))}"
        logger.warning("%s: %d %s", folder, len(found), what)
        notes[what] += len(found)
    return found


def _parts(datasets: Any, found: Any) -> dict[str, Any]:
    return dict(found) if isinstance(found, datasets.DatasetDict) else {"": found}


def _root(folder: Path, part: Path) -> Root:
    """Images in the folder, by path from a part; those unpacked go beside it: in it, they would be taken for data.

    Parts in several folders may have one name.
    """
    prefix = f"{part.parent.relative_to(folder.parent).as_posix()}/"
    stem = "-".join(part.relative_to(folder).with_suffix("").parts)
    return Root(folder.parent, folder, folder.parent / f"{folder.name}.images", stem, prefix)


def _library(path: Path) -> Any:
    try:
        import datasets
    except ImportError:
        msg = f"{path}: folders and ids of data sets need the library datasets; pip install 'dit-probekit[datasets]'"
        raise PreferenceError(msg) from None
    return datasets


def _asked(path: Path, call: Callable[[], Any], *, hub: Any = None) -> Any:
    """Ask the library, and say in one line what is wrong; `hub` is its configuration where the Hub is asked."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - the library raises its own and those of a dozen others
        msg = f"{path}: {_reason(path, error, hub)}"
        raise PreferenceError(msg) from None


def _reason(path: Path, error: Exception, hub: Any) -> str:
    """Say what an error of `datasets` means and, about the Hub, what to do."""
    said = " ".join(str(error).split()) or type(error).__name__
    page = "" if hub is None else f"{hub.HF_ENDPOINT}/datasets/{path}"
    match type(error).__name__:
        case "DatasetNotFoundError" if page and "gated" in said:
            return f"is gated; accept its terms at {page} and log in with HF_TOKEN"
        case "DatasetNotFoundError" if page:
            return f"is not at {page}, or private; check the name, or log in with HF_TOKEN"
        case "ConnectionError" | "OfflineModeIsEnabled" if page:
            why = "HF_HUB_OFFLINE is set" if hub.HF_HUB_OFFLINE else f"{hub.HF_ENDPOINT} cannot be reached"
            todo = "unset it to download" if hub.HF_HUB_OFFLINE else "check the network"
            return f"is not in the cache {hub.HF_DATASETS_CACHE}, and {why}; {todo}, or give a file or folder"
    return f"datasets cannot open it ({said[:200]})"
