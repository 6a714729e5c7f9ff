"""Files that are there whole or not at all, also after a crash of the process or of the machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch

_DIGEST_BYTES = 65
"""A SHA-256 in hexadecimal, and a line feed."""


class DamagedFileError(ValueError):
    """A file is not what was written: cut off, or changed."""


def write_durably(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a temporary file, and give it its name when it is on disk.

    Args:
        path: the file; its folder is made.
        write: writes a whole file at the path that it is given.

    Raises:
        OSError: where it cannot be written; no half file is left.
    """

    def to_the_disk(temporary: Path) -> None:
        write(temporary)
        _sync(temporary)

    write_whole(path, to_the_disk)
    _sync(path.parent)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """As :func:`write_durably`, without waiting for the disk: whole after a crash of the process, not of the machine.

    Args:
        path: the file; its folder is made.
        write: writes a whole file at the path that it is given.

    Raises:
        OSError: where it cannot be written; no half file is left, which would keep a full disk full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(value: Any, path: Path, **options: Any) -> None:
    """``torch.save``, with the system's own error where the file cannot be written: torch's is one of positions in it.

    Args:
        value: anything that it takes.
        path: of the file; in one step with :func:`write_durably`.
        options: of ``torch.save``.

    Raises:
        OSError: where it cannot be written, as on a full disk.
    """
    try:
        with open(path, "wb") as file:
            torch.save(value, file, **options)
    except RuntimeError as error:
        met: Optional[BaseException] = error
        while met is not None and not isinstance(met, OSError):
            met = met.__context__
        if met is not None:
            raise met from None
        raise


def write_checked(path: Path, data: bytes) -> None:
    """Write ``data`` with its checksum in front, durably; :func:`read_checked` reads it.

    Raises:
        OSError: where it cannot be written.
    """
    text = hashlib.sha256(data).hexdigest().encode() + b"\n" + data
    write_durably(path, lambda temporary: temporary.write_bytes(text))


def read_checked(path: Path) -> bytes:
    """What :func:`write_checked` wrote.

    Raises:
        FileNotFoundError: where there is no such file.
        DamagedFileError: where the checksum is not that of the data.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "answer"
        >>> write_checked(path, b"42")
        >>> read_checked(path)
        b'42'
        >>> _ = path.write_bytes(path.read_bytes()[:-1])
        >>> read_checked(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        lightning_slt.durable.DamagedFileError: ...answer: its checksum does not fit: cut off or changed.
    """
    text = path.read_bytes()
    digest, data = text[: _DIGEST_BYTES - 1], text[_DIGEST_BYTES:]
    if digest != hashlib.sha256(data).hexdigest().encode():
        raise DamagedFileError(f"{path}: its checksum does not fit: cut off or changed.")
    return data


def _sync(path: Path) -> None:
    """To the disk itself; a folder too, where the system knows that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # folders cannot be opened everywhere
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # nor can they be synchronised
    finally:
        os.close(descriptor)


__all__ = ["DamagedFileError", "read_checked", "save_tensors", "write_checked", "write_durably", "write_whole"]
