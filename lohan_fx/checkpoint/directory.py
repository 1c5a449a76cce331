"""A directory that is replaced as a whole, and found whole after a crash at any moment.

[Note: replacing a directory]
    ckpt            the checkpoint, always whole
    ckpt.tmp-P-N    being written by process P, which holds a lock on it; a crash leaves it behind
    ckpt.old-P-N    the previous one, for a moment, where the kernel cannot exchange two names
Files and directory are on the disk before a name changes. Two names are exchanged in one system
call (renameat2). Without it the previous one is renamed away first; where a crash comes right then,
there is no `ckpt`, but a complete ckpt.tmp-P-N beside ckpt.old-P-N, and `recover` puts it in place.
A lock and not the process number says that somebody is still writing: numbers are used again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from lohan_fx.errors import LohanError

from .shards import file_errors

_numbers = itertools.count(1)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class Staging:
    """A new directory beside `target`, to be filled and published.

    Args:
        target: the directory's final path; its parents are made.
        mark: a file that only complete directories hold; written last by the caller.

    Raises:
        LohanError: there is something else at `target`.
        TransferError: the directory cannot be made.
    """

    def __init__(self, target: Path, mark: str) -> None:
        self.target = real_path(target)
        self._mark = mark
        check_replaceable(self.target, mark)
        with file_errors("made", self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            recover(self.target, mark)
            while True:
                name = f"{self.target.name}.tmp-{os.getpid()}-{next(_numbers)}"
                self.path = self.target.parent / name
                with contextlib.suppress(FileExistsError, FileNotFoundError, BlockingIOError):
                    self.path.mkdir()
                    self._lock = _lock(self.path)
                    if self.path.exists():  # no cleaner came between the two lines
                        break

    def publish(self, kept: Iterator[Path]) -> None:
        """Put the filled directory in place of the old one, and remove that.

        `kept` are paths in the old directory that go into the new one as well.
        """
        with file_errors("replaced", self.target):
            for path in kept:
                _adopt(path, self.path / path.name)
            sync_directory(self.path)
            if self.target.exists():
                old = self._exchange()
            else:
                os.rename(self.path, self.target)
                old = None
            sync_directory(self.target.parent)
        os.close(self._lock)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def abandon(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self._lock)

    def _exchange(self) -> Path:
        """See [Note: replacing a directory]; the path at which the old one is now."""
        if _exchange(self.path, self.target):
            return self.path
        old = self.target.parent / self.path.name.replace(".tmp-", ".old-")
        os.rename(self.target, old)
        os.rename(self.path, self.target)
        return old


def real_path(target: Path) -> Path:
    """Where the directory really is: a link to it stays as it is."""
    return Path(os.path.realpath(target))


def check_replaceable(target: Path, mark: str) -> None:
    """Raise LohanError where something other than a checkpoint would be replaced."""
    if target.is_dir():
        if not (target / mark).is_file() and any(target.iterdir()):
            raise LohanError(
                f"{target} has files in it, but no checkpoint of lohan_fx; it would be replaced, so give "
                "an empty or a new directory"
            )
    elif os.path.lexists(target):
        raise LohanError(f"{target} is not a directory; a checkpoint is one")


def recover(target: Path, mark: str) -> None:
    """Finish what a process that died was doing; see [Note: replacing a directory]."""
    if not target.parent.is_dir():
        return
    name = re.compile(re.escape(target.name) + r"\.(tmp|old)-\d+-\d+")
    leftovers = [path for path in target.parent.iterdir() if name.fullmatch(path.name)]
    # Complete new ones come before old ones.
    for path in sorted(leftovers, key=lambda path: (".old-" in path.name, path.name)):
        with contextlib.suppress(OSError):
            lock = _lock(path)
            try:
                if not target.exists() and (path / mark).is_file():
                    os.rename(path, target)
                    sync_directory(target.parent)
                elif target.exists() or ".tmp-" in path.name:
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def sync_directory(path: Path) -> None:
    """What was made and renamed in it is on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, text: str) -> None:
    """A small file, on the disk when this returns.

    Raises:
        TransferError: it cannot be written.
    """
    with file_errors("written", path), open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _lock(path: Path) -> int:
    """An open, locked descriptor of a directory; BlockingIOError where somebody holds it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _adopt(source: Path, to: Path) -> None:
    """The same file under a second name, or a copy."""
    if to.exists():
        return
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, to, symlinks=True)
        return
    try:
        os.link(source, to, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, to, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    result = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(other))
