"""Read and write one table of a run as Parquet, checked against its columns."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.lib as pa
from pyarrow.parquet import ParquetFile, ParquetWriter

from probekit.errors import ResultsError
from probekit.results.columns import RESULTS_VERSION, SLICES, SPLITS, UNPROBED

_ARROW = {"str": pa.string(), "int64": pa.int64(), "Int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}


def write_or_remove(path: Path, rows: pd.DataFrame, columns: Mapping[str, str]) -> None:
    """Write a table; without rows it goes."""
    if rows.empty:
        path.unlink(missing_ok=True)
    else:
        write_table(path, rows, columns)


def read_or_none(path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    """Read a table; empty where there is none."""
    if not path.is_file():
        return pd.DataFrame({name: pd.Series(dtype=dtype) for name, dtype in columns.items()})
    return read_table(path, columns)


def check_rows(rows: pd.DataFrame, where: str) -> None:
    """Refuse rows whose values no honest record can hold."""
    for column, allowed in (
        ("split", SPLITS),
        ("head_kind", ("linear", "mlp", *UNPROBED)),
        ("slice_by", ("all", *SLICES)),
    ):
        if strange := set(rows[column].unique()) - set(allowed):
            bad = sorted(strange)[0]
            msg = f"{where}: column {column} holds {bad!r}; allowed: {', '.join(allowed)}"
            raise ResultsError(msg)
    accuracy = rows["accuracy"].to_numpy(dtype=np.float64)
    if ((accuracy < 0) | (accuracy > 1)).any():
        msg = f"{where}: column accuracy holds {accuracy[(accuracy < 0) | (accuracy > 1)][0]}; allowed: 0 to 1, or NaN"
        raise ResultsError(msg)
    names = ["record_id", "dataset", "split", "slice_by", "source", "protocol"]
    if len(set(zip(*(rows[name].tolist() for name in names), strict=True))) < len(rows):
        row = rows[rows.duplicated(names)].iloc[0]
        msg = (
            f"{where}: two rows for data set {row['dataset']!r}, split {row['split']!r}, {row['slice_by']!r}, source "
            f"{row['source']!r}, protocol {row['protocol']!r}"
        )
        raise ResultsError(msg)


def write_table(path: Path, frame: pd.DataFrame, columns: Mapping[str, str]) -> None:
    """Write `columns` of `frame` without pandas' own metadata, which would tie the bytes to library versions."""
    if set(frame.columns) != set(columns):
        missing, unknown = sorted(set(columns) - set(frame.columns)), sorted(set(frame.columns) - set(columns))
        msg = f"{path.name}: missing columns {missing}, unknown columns {unknown}"
        raise ResultsError(msg)
    fields = [pa.field(name, _ARROW[dtype], nullable=dtype in ("Int64", "float64")) for name, dtype in columns.items()]
    schema = pa.schema(fields, metadata={"probekit_results": RESULTS_VERSION})
    arrays = []
    for field in schema:
        try:
            arrays.append(pa.array(frame[field.name], field.type, from_pandas=True))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            msg = f"{path.name}: column {field.name} does not have the type of the schema ({error})"
            raise ResultsError(msg) from error
        if not field.nullable and arrays[-1].null_count:
            msg = f"{path.name}: column {field.name} has missing values"
            raise ResultsError(msg)
    table = pa.Table.from_arrays(arrays, schema=schema)
    sink = pa.BufferOutputStream()
    with ParquetWriter(sink, schema, compression="zstd") as writer:
        writer.write_table(table)
    replace_file(path, sink.getvalue().to_pybytes())


def read_table(path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    """Read a table with the types of its columns."""
    return to_pandas(read_arrow(path, columns), columns)


def read_arrow(path: Path, columns: Mapping[str, str]) -> pa.Table:
    """Read a table as it is stored.

    Raises
    ------
    ResultsError
        If it is missing, damaged, of another format or without one of the columns.
    """
    try:
        table = ParquetFile(path).read()
    except FileNotFoundError as error:
        msg = f"{path}: missing; run the same sweep again to compute it"
        raise ResultsError(msg) from error
    except (OSError, pa.ArrowException) as error:
        detail = str(error).splitlines()[0]
        msg = f"{path}: damaged ({detail}); delete it and run the same sweep again to compute it anew"
        raise ResultsError(msg) from error
    version = (table.schema.metadata or {}).get(b"probekit_results", b"none").decode()
    if version.partition(".")[0] != RESULTS_VERSION.partition(".")[0]:
        msg = f"{path}: written in results format {version}; this version reads {RESULTS_VERSION}"
        raise ResultsError(msg)
    if missing := columns.keys() - set(table.column_names):
        old = f" (written in results format {version}, this is {RESULTS_VERSION})" if version != RESULTS_VERSION else ""
        kept = {"parts": "the folder", "margins": "the folder parts beside its own"}
        what = kept.get(path.parent.name, "the file")
        msg = f"{path}: column {sorted(missing)[0]!r} is missing{old}; delete {what} and run the same sweep again"
        raise ResultsError(msg)
    return table.select(list(columns))


def to_pandas(table: pa.Table, columns: Mapping[str, str]) -> pd.DataFrame:
    """Give a table that was read the types of its columns."""
    schema = pa.schema([(name, _ARROW[dtype]) for name, dtype in columns.items()])
    table = table.cast(schema)
    frame: pd.DataFrame = table.to_pandas()
    for name, dtype in columns.items():
        if dtype == "Int64":  # a plain conversion turns integers with gaps into floats
            frame[name] = table.column(name).to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    return frame


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or all of the new one, whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself lives in the folder
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
