"""Rows without features: their images are missing or unreadable, or what the model made of them is not finite."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit.errors import ImageError
from probekit.store import STATUS_NON_FINITE, STATUS_OK, STATUS_UNREADABLE

_NAMED = 10

logger = logging.getLogger(__name__)


class BadRows:
    """Counts the rows without features against the share that is allowed.

    Parameters
    ----------
    prefs
        Preference file, for messages.
    rows
        All rows of the dump: ``row_id``, ``image_id``, ``status``.
    known
        Status of the rows without features that the store holds already, by row key.
    share
        Largest share that is allowed.

    Raises
    ------
    ImageError
        If the store holds more already.
    """

    def __init__(self, prefs: Path, rows: pd.DataFrame, known: Mapping[str, int], *, share: float) -> None:
        self._prefs = prefs
        self._image = rows.set_index("row_id")["image_id"]
        self._share = share
        self._status: dict[str, int] = {}
        self._said: set[str] = set()
        self.settle(known)

    def settle(self, known: Mapping[str, int]) -> None:
        """Count the rows without features that the store holds, those of other workers too; `known` as above.

        Raises
        ------
        ImageError
            If there are too many now.
        """
        self._status |= {row: status for row, status in known.items() if row in self._image.index}
        self._check("found by an earlier dump into this store or by another worker")

    def unreadable(self, part: pd.DataFrame, errors: Mapping[int, ImageError]) -> None:
        """Count the rows of a block whose images are missing (status 1) or cannot be read; `errors` is by position.

        Raises
        ------
        ImageError
            If there are too many now; says what is wrong with one of them.
        """
        missing = part["image_id"][part["status"] == STATUS_UNREADABLE]
        reasons = [*(f"{image}: the file is missing" for image in missing), *map(str, errors.values())]
        for reason in reasons:
            self._name(reason)
        part.loc[list(errors), "status"] = np.uint8(STATUS_UNREADABLE)
        self._add(part["row_id"], part["status"].to_numpy())
        self._check("; ".join(reasons[:1]))

    def not_finite(self, part: pd.DataFrame, setting: str, status: NDArray[np.uint8]) -> None:
        """Count the rows of a block with status 2; `setting` says how their features were computed.

        Raises
        ------
        ImageError
            If there are too many now.
        """
        images = part["image_id"][status == STATUS_NON_FINITE].tolist()
        for image in images:
            self._name(f"{image}: the features are not finite ({setting})")
        self._add(part["row_id"], status)
        self._check(f"{', '.join(images[:1])}: the features are not finite ({setting}); another --dtype may help")

    def report(self, judgements: pd.DataFrame) -> None:
        """Say how many rows have no features, and how many of the pairs that costs."""
        if not self._status:
            return
        images = sorted(set(self._image[list(self._status)]))
        more = f" and {len(images) - _NAMED} more" if len(images) > _NAMED else ""
        lost = judgements["row_a"].isin(list(self._status)) | judgements["row_b"].isin(list(self._status))
        counted = (self._counted(), lost.sum(), len(judgements), ", ".join(images[:_NAMED]), more)
        logger.warning("%s; %d of %d pairs are left out: %s%s", *counted)

    def _add(self, row_ids: pd.Series, status: NDArray[np.uint8]) -> None:
        for row, value in zip(row_ids[status != STATUS_OK], status[status != STATUS_OK], strict=True):
            self._status[row] = max(int(value), self._status.get(row, 0))

    def _check(self, last: str) -> None:
        if len(self._status) > self._share * len(self._image):
            msg = f"{self._prefs}: {self._counted()}; allowed: a share of {self._share:g} (--max-bad); {last}"
            raise ImageError(msg)

    def _counted(self) -> str:
        infinite = sum(status == STATUS_NON_FINITE for status in self._status.values())
        return (
            f"{len(self._status)} of {len(self._image)} rows have no features "
            f"({len(self._status) - infinite} missing or unreadable, {infinite} not finite)"
        )

    def _name(self, what: str) -> None:
        if len(self._said) < _NAMED and what not in self._said:  # a picture may stand under several prompts
            self._said.add(what)
            logger.warning("left out: %s", what)
