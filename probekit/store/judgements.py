"""Sets of judgements on disk: a Parquet file each, read as texts and numbers only and within bounds, and a sidecar.

What is read here is checked for form; `probekit.store.pairs` joins it to rows.
"""

import os
import re
from pathlib import Path

import pandas as pd
import pyarrow as pa
from pyarrow.parquet import ParquetFile

from probekit.errors import StoreError
from probekit.store import format as fmt
from probekit.store.files import locked, open_regular, publish, read_small, sync_folder, temporary, write_atomically
from probekit.store.mend import MEND_JUDGEMENTS
from probekit.store.records import parse_judgements_sidecar
from probekit.store.shards import file_digest

_BATCH = 4096  # pairs that are unpacked before their size is looked at
_UNPACKED = 256  # bytes of a table for each byte of its file; real ones take up to 10
_PLAIN = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_null,
)
# What pyarrow and pandas raise on bytes that are not what they say.
_DAMAGE = (pa.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RuntimeError)


def read_judgements(path: Path) -> pd.DataFrame:
    """Read a set of judgements.

    Raises
    ------
    StoreError
        If it is missing, a link, not what its sidecar says or not Parquet.
    """
    descriptor, size = open_regular(path)
    try:
        sidecar = path.with_suffix(".json")
        if os.path.lexists(sidecar):  # formats 1.0 and 1.1 have none
            said = parse_judgements_sidecar(read_small(sidecar, limit=2**16))
            if (said.name, said.bytes, said.sha256) != (path.stem, size, file_digest(descriptor, size)):
                msg = f"not the file of {sidecar}"
                raise ValueError(msg)
        with (
            open(descriptor, "rb", closefd=False) as file,
            ParquetFile(file, page_checksum_verification=True) as parquet,
        ):
            frame: pd.DataFrame = _plain_table(parquet, size).to_pandas()
        if not frame.columns.is_unique:
            msg = "a column stands there twice"
            raise ValueError(msg)
        return frame
    except _DAMAGE as error:
        reason = " ".join(str(error).split())
        msg = f"{path}: cannot be read as judgements ({reason}); {MEND_JUDGEMENTS}"
        raise StoreError(msg) from None
    finally:
        os.close(descriptor)


def _plain_table(parquet: ParquetFile, size: int) -> pa.Table:
    """Read a Parquet file of ``size`` bytes that holds texts and numbers only and does not unpack without bound."""
    for column in parquet.schema_arrow:
        if not any(fits(column.type) for fits in _PLAIN):
            msg = f"column {column.name!r} is {column.type}; allowed: texts and numbers"
            raise ValueError(msg)
    if parquet.metadata.num_rows > size:  # each has a name of its own, which takes a byte at least
        msg = f"says that its {size} bytes hold {parquet.metadata.num_rows} pairs"
        raise ValueError(msg)
    batches, unpacked = [], 0
    for batch in parquet.iter_batches(_BATCH):
        batches.append(batch)
        unpacked += batch.nbytes
        if unpacked > _UNPACKED * size:
            msg = f"unpacks to more than {_UNPACKED} times its {size} bytes"
            raise ValueError(msg)
    count = sum(batch.num_rows for batch in batches)
    if count != parquet.metadata.num_rows:  # at some damage pyarrow ends without an error
        msg = f"{count} of its {parquet.metadata.num_rows} pairs can be read"
        raise ValueError(msg)
    # The metadata of the schema is advice of whoever wrote it on which Python types to make: it is not followed.
    schema = parquet.schema_arrow.remove_metadata()
    return pa.Table.from_batches([batch.cast(schema) for batch in batches], schema)


def write_judgements(root: Path, name: str, frame: pd.DataFrame) -> Path:
    """Write a set of pairs beside the shards, in place of an older one of the same name with no other pairs.

    Labels, splits and the like may differ from the older set, and there may be more pairs.

    Raises
    ------
    StoreError
        If the name cannot be a file name everywhere, or pairs of the older set would be lost.
    """
    path = root / "judgements" / f"{name}.parquet"
    with locked(path):
        check_judgements(root, name, frame)
        with temporary(path) as (temp, descriptor):
            frame.to_parquet(temp, index=False, write_page_checksum=True)
            os.fsync(descriptor)
            size = os.fstat(descriptor).st_size
            sidecar = {
                "format": fmt.FORMAT,
                "format_version": fmt.FORMAT_VERSION,
                "name": name,
                "bytes": size,
                "sha256": file_digest(descriptor, size),
            }
            # As with shards: an old sidecar must never vouch for the new file.
            path.with_suffix(".json").unlink(missing_ok=True)
            sync_folder(path.parent)
            publish(temp, descriptor, path)
        write_atomically(path.with_suffix(".json"), fmt.seal(sidecar))
    return path


def check_judgements(root: Path, name: str, frame: pd.DataFrame) -> None:
    """Refuse a set of pairs that `write_judgements` would refuse; the store stays as it is.

    Raises
    ------
    StoreError
        If the name cannot be a file name everywhere, or pairs of the older set would be lost.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", name):
        msg = f"judgements are named {name!r}; allowed: letters, digits, '.', '_' and '-'"
        raise StoreError(msg)
    path = root / "judgements" / f"{name}.parquet"
    if os.path.lexists(path):
        old = read_judgements(path).reindex(columns=["pair_id"])
        lost = int((~old["pair_id"].isin(frame["pair_id"])).sum())
        if lost:
            msg = (
                f"{path}: {lost} of its {len(old)} pairs are not in the new set of this name; "
                f"use a preference file of another name, or delete {path} to replace it"
            )
            raise StoreError(msg)
