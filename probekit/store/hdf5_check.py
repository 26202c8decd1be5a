"""Let HDF5 parse a shard, in a process of its own: a crafted file can crash or hang the library.

`Hdf5Checker` is the side of the caller. The other side is this file run as a script, which imports nothing of probekit;
the two speak JSON, one line each way.
"""

import json
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

SECONDS = 120.0
"""How long HDF5 may take for one file; its metadata are some kilobytes."""

CRASHES = [-code for code in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)]
"""Exit codes that only the file can be the reason of: others come from a lack of memory or a broken installation."""

DEPTH = 3  # features/<pooling>/<layer>
FIGURES = ("absmax", "noise_ratio", "quantisation_noise", "nonfinite_rows")


class Hdf5Checker:
    """A process that checks one file after another; started when first needed, ended with the context."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Hdf5Checker":
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def check(self, path: Path, *, datasets: dict[str, Any], attributes: dict[str, Any]) -> str | None:
        """Compare what HDF5 finds in a file with what it should find; return the first difference, or that it crashes.

        Parameters
        ----------
        datasets
            Records of the sidecar, JSON-plain.
        attributes
            What the root group must carry.

        Raises
        ------
        TimeoutError
            If HDF5 does not come to an end.
        ChildProcessError
            If the process ends for another reason than a crash, so that nothing is said of the file.
        """
        if self._process is None:
            command = [sys.executable, "-P", __file__]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        request = {"path": str(path), "datasets": datasets, "attributes": attributes}
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            answered, _, _ = select.select([stdout], [], [], SECONDS)
            answer = stdout.readline() if answered else b""
        except BrokenPipeError:
            answered, answer = [stdout], b""
        if not answered:
            self._end()
            msg = f"HDF5 did not end within {SECONDS:.0f} s"
            raise TimeoutError(msg)
        if not answer:
            code = self._process.wait()
            self._end()
            if code in CRASHES:
                return f"HDF5 crashes on it ({signal.Signals(-code).name})"
            msg = f"the process in which HDF5 reads it ended with code {code}"
            raise ChildProcessError(msg)
        problem: str | None = json.loads(answer)
        return problem

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


class _Refused(Exception):
    """What the acceptance rules do not allow."""


def _refuse(what: str) -> NoReturn:
    raise _Refused(what)


def _problem(path: str, datasets: dict[str, Any], attributes: dict[str, Any]) -> str | None:
    """Name the first thing in a file that the rules or the sidecar do not allow."""
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            if file.userblock_size:
                _refuse("it has a user block")
            seen = {_address(file.id)}
            _check_attributes(file.id, "/")
            found = set()
            for name, node in _walk(file.id, "", seen):
                if name not in datasets:
                    _refuse(f"dataset {name} is not in the sidecar")
                found.add(name)
                _check_dataset(name, node, datasets[name])
            if found != datasets.keys():
                _refuse(f"dataset {min(datasets.keys() - found)} is in the sidecar only")
            for key, value in attributes.items():
                if key not in file.attrs or _plain(file.attrs[key]) != value:
                    _refuse(f"attribute {key} of / is not that of the store and the sidecar")
    except _Refused as refused:
        return str(refused)
    # What h5py makes of the library's errors.
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, MemoryError, ArithmeticError) as error:
        return f"HDF5 cannot read it ({' '.join(str(error).split())})"
    return None


def _walk(group: Any, prefix: str, seen: set[Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, dataset) over hard links only; each object is met once."""
    from h5py import h5d, h5g, h5l, h5o

    for link in group:
        name = prefix + link.decode("utf-8", "backslashreplace")
        if group.links.get_info(link).type != h5l.TYPE_HARD:
            _refuse(f"{name} is a soft or external link")
        node = h5o.open(group, link)
        if _address(node) in seen:
            _refuse(f"{name} is a second link to one object")
        seen.add(_address(node))
        _check_attributes(node, name)
        if isinstance(node, h5d.DatasetID):
            yield name, node
        elif isinstance(node, h5g.GroupID) and name.count("/") < DEPTH:
            yield from _walk(node, f"{name}/", seen)
        else:
            _refuse(f"{name} is neither a dataset nor a group in its place")


def _address(node: Any) -> tuple[int, int]:
    from h5py import h5o

    info = h5o.get_info(node)
    return info.fileno, info.addr


def _check_attributes(node: Any, name: str) -> None:
    from h5py import h5a, h5t

    for index in range(h5a.get_num_attrs(node)):
        attribute = h5a.open(node, index=index)
        kind = attribute.get_type()
        text = kind.get_class() == h5t.STRING and not kind.is_variable_str()
        if not text and kind.get_class() not in (h5t.INTEGER, h5t.FLOAT):
            key = attribute.name.decode("utf-8", "backslashreplace")
            _refuse(f"attribute {key} of {name} is neither a number nor a text of fixed length")


def _check_dataset(name: str, node: Any, record: dict[str, Any]) -> None:
    import h5py
    from h5py import h5d, h5t

    types = {"<f2": h5t.IEEE_F16LE, "<f4": h5t.IEEE_F32LE, "<i8": h5t.STD_I64LE, "|u1": h5t.STD_U8LE}
    plist = node.get_create_plist()
    if plist.get_layout() != h5d.CONTIGUOUS:
        _refuse(f"dataset {name} is chunked (so it may be filtered), compact or virtual")
    if plist.get_external_count():
        _refuse(f"dataset {name} has external storage")
    if node.get_type() != types[record["dtype"]] or list(node.shape) != record["shape"]:
        _refuse(f"dataset {name} is not of the type and shape of the sidecar")
    if node.get_offset() != record["offset"]:
        _refuse(f"dataset {name} lies elsewhere than the sidecar says")
    if name.startswith("features/"):
        attributes = h5py.Dataset(node).attrs
        for key in FIGURES:
            stored = _plain(attributes[key]) if key in attributes else None
            if stored != record[key]:
                _refuse(f"attribute {key} of {name} is {stored}, in the sidecar {record[key]}")


def _plain(value: Any) -> Any:
    """Text or number of a scalar attribute."""
    return value.decode() if isinstance(value, bytes) else value.item() if hasattr(value, "item") else value


def _serve() -> None:
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_problem(**json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
