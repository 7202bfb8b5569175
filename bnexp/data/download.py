"""Downloads published data sets by torchvision, which knows addresses and checksums; errors for missing files."""

import http.client
import os
import socket
import ssl
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import URLError

from bnexp.errors import UserError

TIMEOUT_S = 10  # per connection and per read, so that a machine without network says so in seconds
# torchvision raises RuntimeError when every address failed or a checksum is wrong.
DOWNLOAD_ERRORS = (RuntimeError, URLError, http.client.HTTPException, ssl.SSLError, TimeoutError, ConnectionError)


def download(source, missing: list[str] | None, looked_for: str) -> None:
    """Download a published data set and put its files ``missing``, or all if None, into ``source.folder``.

    ``source`` has ``name``, ``root``, ``folder`` and ``fetch(root)``, which downloads the data set into ``root``. It
    gets a scratch folder, from which the files are moved when all are complete. So no interrupted download is taken
    for a data set, and several processes may download at once. Raises :class:`UserError` naming ``looked_for`` if no
    address answers, and if the folder cannot be written to.
    """
    root, folder = source.root, source.folder
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)  # torchvision sets none
    try:
        there = next(each for each in (root, *root.absolute().parents) if each.exists())
        with TemporaryDirectory(dir=there, prefix=".download-") as scratch:
            print(f"data={source.name}: downloading into {folder}", file=sys.stderr, flush=True)
            source.fetch(Path(scratch))
            folder.mkdir(parents=True, exist_ok=True)
            whole = Path(scratch) / folder.relative_to(root)
            everything = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
            for name in everything if missing is None else missing:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(whole / name, folder / name)
    except DOWNLOAD_ERRORS as error:
        raise UserError(
            f"data={source.name}: looked in {folder} for {looked_for}; not there, and downloading failed, "
            f"is there no network? ({' '.join(str(error).split())}) Copy the files into that folder, "
            "name another one with data.root=..., or use data=digits, which needs neither"
        ) from None
    except OSError as error:
        raise UserError(
            f"data={source.name}: cannot write the files of a download into {folder} ({error.strerror or error}); "
            "free some space or name another folder with data.root=..."
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def damaged(path: Path, what: str) -> UserError:
    """The error for a data file whose content cannot be right."""
    return UserError(f"{path}: damaged or not the right file: {what}; delete it and run again to download it")
