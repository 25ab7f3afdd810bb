"""Image files in folders or in a zip, read in place: nothing is unpacked."""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Protocol

from emoe_med.errors import DataError, Fault

MAX_FILE_BYTES = 64 << 20


class Tree(Protocol):
    """Folders and files by their path inside a root, `/` between the parts; the root is the empty path.

    What systems leave beside the files is not told: names that begin with a dot, and `__MACOSX`.
    """

    root: Path

    def folders(self, path: str = "") -> list[str]:
        """Return the names of the folders in a folder, sorted; none where there is no such folder."""
        ...

    def files(self, path: str = "") -> list[str]:
        """Return the names of the files in a folder, sorted."""
        ...

    def mark(self, path: str) -> int:
        """Return what tells most other contents of a file without reading it: its size, or its checksum in a zip.

        Raises:
            DataError: IMG-MISSING.
        """
        ...

    def read(self, path: str) -> bytes:
        """Return the content of a file.

        Raises:
            DataError: IMG-MISSING, IMG-SIZE (above 64 MiB) or IMG-ZIP (damaged).
        """
        ...


def open_tree(root: Path) -> Tree:
    """Open a folder or a zip.

    Raises:
        DataError: IMG-ROOT, neither of them.
    """
    if root.is_dir():
        return FolderTree(root)
    if not root.exists():
        raise DataError(Fault("IMG-ROOT", "is not there", str(root), hint="name the folder or zip by --data-root"))
    if not zipfile.is_zipfile(root):
        raise DataError(Fault("IMG-ROOT", "is neither a folder nor a zip", str(root)))
    return ZipTree(root)


class FolderTree:
    """A folder on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folders(self, path: str = "") -> list[str]:
        """See `Tree`."""
        return self._names(path, folders=True)

    def files(self, path: str = "") -> list[str]:
        """See `Tree`."""
        return self._names(path, folders=False)

    def _names(self, path: str, folders: bool) -> list[str]:
        try:
            with os.scandir(self.root / path) as found:
                return sorted(item.name for item in found if item.is_dir() == folders and _counts(item.name))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise DataError(Fault("IMG-ROOT", error.strerror or "cannot be read", str(self.root / path))) from error

    def mark(self, path: str) -> int:
        """See `Tree`."""
        try:
            return os.stat(f"{self.root}/{path}").st_size  # a million times: no Path is made
        except OSError as error:
            raise DataError(Fault("IMG-MISSING", error.strerror or "cannot be read", f"{self.root}/{path}")) from error

    def read(self, path: str) -> bytes:
        """See `Tree`."""
        file = self.root / path
        try:
            status = file.stat()
            if not stat.S_ISREG(status.st_mode):  # asked before open: a FIFO would block
                raise DataError(Fault("IMG-MISSING", "is no file", str(file)))
            if (size := status.st_size) > MAX_FILE_BYTES:
                raise DataError(Fault("IMG-SIZE", f"holds {size} bytes, the limit is {MAX_FILE_BYTES}", str(file)))
            return file.read_bytes()
        except OSError as error:
            raise DataError(Fault("IMG-MISSING", error.strerror or "cannot be read", str(file))) from error


class ZipTree:
    """A zip archive; every process has its own file handle, since a shared one has one position."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._handle: tuple[int, zipfile.ZipFile] | None = None
        self._folders: dict[str, set[str]] = {"": set()}
        self._files: dict[str, list[str]] = {}
        for info in self._archive().infolist():
            path = PurePosixPath(info.filename)
            folder = path if info.is_dir() else path.parent
            for parent in [folder, *folder.parents]:
                if str(parent) != ".":
                    self._folders.setdefault(_key(parent.parent), set()).add(parent.name)
            if not info.is_dir():
                self._files.setdefault(_key(path.parent), []).append(path.name)

    def _archive(self) -> zipfile.ZipFile:
        if self._handle is None or self._handle[0] != os.getpid():
            try:
                self._handle = (os.getpid(), zipfile.ZipFile(self.root))
            except (OSError, zipfile.BadZipFile) as error:
                raise DataError(Fault("IMG-ZIP", f"cannot be opened ({error})", str(self.root))) from error
        return self._handle[1]

    def __getstate__(self) -> Mapping[str, object]:
        return {**self.__dict__, "_handle": None}

    def folders(self, path: str = "") -> list[str]:
        """See `Tree`."""
        return sorted(filter(_counts, self._folders.get(path, ())))

    def files(self, path: str = "") -> list[str]:
        """See `Tree`."""
        return sorted(filter(_counts, self._files.get(path, ())))

    def mark(self, path: str) -> int:
        """See `Tree`."""
        return self._info(path).CRC

    def _info(self, path: str) -> zipfile.ZipInfo:
        try:
            return self._archive().getinfo(path)
        except KeyError as error:
            raise DataError(Fault("IMG-MISSING", "is not in the archive", f"{self.root}/{path}")) from error

    def read(self, path: str) -> bytes:
        """See `Tree`."""
        where, info = f"{self.root}/{path}", self._info(path)
        if info.file_size > MAX_FILE_BYTES:
            reason = f"holds {info.file_size} bytes, the limit is {MAX_FILE_BYTES}"
            raise DataError(Fault("IMG-SIZE", reason, where))
        try:
            return self._archive().read(info)
        except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as error:
            raise DataError(Fault("IMG-ZIP", f"cannot be read from the archive ({error})", where)) from error


def _counts(name: str) -> bool:
    return name != "__MACOSX" and not name.startswith(".")


def _key(path: PurePosixPath) -> str:
    return "" if str(path) == "." else str(path)
