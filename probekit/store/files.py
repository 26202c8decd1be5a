"""Files that appear whole or not at all: temporary files under a lock, atomic replacement, one writer at a time."""

import errno
import fcntl
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from probekit._types import scaled
from probekit.errors import StoreError

logger = logging.getLogger(__name__)

TEMP, LOCK = ".tmp-", ".lock-"
_NO_SPACE = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
LINK = "is a symbolic link; allowed: a file or folder of its own"
_REFUSED = {errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}


def _flock(descriptor: int, operation: int) -> bool:
    """Lock an open file; False if somebody else holds it or the file system knows no locks."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        logger.warning("this file system refuses locks (%s); do not run two dumps into one store here", error)
        return False
    return True


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock that belongs to a file, waiting for another holder to leave.

    Raises
    ------
    StoreError
        If the folder cannot be written.
    """
    path = target.with_name(LOCK + target.name)
    try:
        descriptor = _create_lock(path)
    except OSError as error:
        msg = f"{target.parent}: cannot be written ({error.strerror or error}); allowed: a folder for a feature store"
        raise StoreError(msg) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _create_lock(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        held = _flock(descriptor, fcntl.LOCK_EX)
        # The holder before us may have removed the lock file while we waited for it: then the lock is worth nothing.
        if not held or os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)


@contextmanager
def temporary(target: Path) -> Iterator[tuple[Path, int]]:
    """Create a locked temporary file beside a target; yield its path and descriptor, remove it at the end.

    Raises
    ------
    StoreError
        If it cannot be written, as on a full disk; the target is as it was.
    """
    try:
        path, descriptor = _create_temporary(target)
        try:
            yield path, descriptor
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)
    except OSError as error:
        msg = f"{target}: cannot be written ({error.strerror or error}); mend that and run the same command again"
        raise StoreError(msg) from error


def _create_temporary(target: Path) -> tuple[Path, int]:
    target.parent.mkdir(parents=True, exist_ok=True)
    while True:
        path = target.with_name(f"{TEMP}{target.name}-{os.getpid()}-{secrets.token_hex(4)}")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        _flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:  # else a cleaner was quicker than our lock
            return path, descriptor
        os.close(descriptor)


def reserve(descriptor: int, nbytes: int) -> None:
    """Have space set aside for an open file, so that a full disk is an error here and not a crash inside HDF5.

    Raises
    ------
    OSError
        If there is no space, or the file may not be so large; file systems that cannot reserve are trusted.
    """
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise


def check_space(target: Path, needed: int) -> None:
    """Refuse to begin a file that the disk has no room for; its folder is made.

    Raises
    ------
    StoreError
        If fewer than `needed` bytes are free.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        msg = (
            f"{target}: needs up to {scaled(needed, 'B')}, {scaled(free, 'B')} are free; make space and run the same "
            "command again"
        )
        raise StoreError(msg)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temp: Path, descriptor: int, target: Path) -> None:
    """Give a finished temporary file its name, so that a crash leaves the old file or the new one."""
    os.fsync(descriptor)
    temp.replace(target)
    sync_folder(target.parent)


def write_atomically(target: Path, data: bytes) -> None:
    """Write a small file that is either absent, the old one or complete."""
    with temporary(target) as (temp, descriptor):
        temp.write_bytes(data)
        publish(temp, descriptor, target)


def refuse_link(path: Path) -> None:
    """Keep readers and writers inside the store.

    Raises
    ------
    StoreError
        If the file or folder is a symbolic link.
    """
    if path.is_symlink():
        msg = f"{path}: {LINK}"
        raise StoreError(msg)


def dead_files(root: Path, *, on_link: Callable[[Path], None] = refuse_link) -> Iterator[Path]:
    """Yield temporary and lock files whose writers are gone; those of living writers are locked.

    Parameters
    ----------
    on_link
        Called with every symbolic link in the place of a folder or of such a file; links are never followed.

    Raises
    ------
    StoreError
        From `refuse_link`, unless another function is given.
    """
    for folder, inner, names in os.walk(root):
        ours = [Path(folder, name) for name in names if name.startswith((TEMP, LOCK))]
        for path in [*(Path(folder, name) for name in inner), *ours]:
            if path.is_symlink():
                on_link(path)
        for path in ours:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:  # a link, gone meanwhile, or not ours to lock
                continue
            if _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                yield path
            os.close(descriptor)


def remove_dead_files(root: Path) -> None:
    """Remove temporary and lock files whose writers are gone; `dead_files` says what it refuses."""
    for path in dead_files(root):
        path.unlink(missing_ok=True)


def is_locked(target: Path) -> bool:
    """Whether somebody holds the lock that belongs to a file."""
    try:
        descriptor = os.open(target.with_name(LOCK + target.name), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> tuple[int, int]:
    """Open a file for reading; return its descriptor and size.

    Raises
    ------
    StoreError
        If it is missing, a link or not a regular file.
    """
    try:
        # O_NONBLOCK: opening a pipe must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = "is a symbolic link" if error.errno == errno.ELOOP else (error.strerror or "cannot be opened").lower()
        msg = f"{path}: {reason}; allowed: a regular file"
        raise StoreError(msg) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        msg = f"{path}: not a regular file"
        raise StoreError(msg)
    return descriptor, status.st_size


def read_small(path: Path, *, limit: int = 2**28) -> bytes:
    """Read a whole file of at most ``limit`` bytes.

    Raises
    ------
    StoreError
        If it is missing, a link, not a regular file or too large.
    """
    descriptor, size = open_regular(path)
    try:
        if size > limit:
            msg = f"{path}: {size} bytes; allowed: at most {limit}"
            raise StoreError(msg)
        with os.fdopen(os.dup(descriptor), "rb") as file:
            return file.read()
    finally:
        os.close(descriptor)
