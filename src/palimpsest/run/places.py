"""Where results go, looked at before the work begins rather than after it."""

import os
from pathlib import Path

from palimpsest.errors import StorageError
from palimpsest.files import refuse_foreign_folder


def require_place(folder: str | Path, mark: str) -> None:
    """Refuse a folder that cannot be written, or that holds something else. Nothing is made there yet.

    Args:
        folder: where results are to go.
        mark: the file by which such a folder is known, e.g. `update.json`; that one may be written again.

    Raises:
        StorageError: the place cannot be written, or is a file, or a folder of something else.
    """
    folder = Path(folder)
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise StorageError(f"{folder}: cannot be written, since {existing} is a file; choose another folder")
    if not os.access(existing, os.W_OK):
        raise StorageError(f"{folder}: cannot be written; choose a folder that you may write to")
    refuse_foreign_folder(folder, mark)
