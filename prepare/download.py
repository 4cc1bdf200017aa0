"""Where files come from: a folder that has them already, an address, or the Hugging Face hub."""

import hashlib
import http.client
import os
import shutil
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data import UserError


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset or a set of weights before its files are opened."""
    name: str
    licence: str
    access: str  # "open", or what its owner asks for
    megabytes: int  # to download
    page: str  # where a person finds it
    layouts: tuple  # alternatives, each the patterns that its raw folder must match; first one wins
    urls: tuple = ()  # files to fetch into the raw folder
    hub: str = ""  # or a repository on the Hugging Face hub, and which of its files
    hub_type: str = "dataset"  # or "model"
    hub_files: tuple = ()
    folder: Path | str = ""  # its raw folder, if that is not <raw_dir>/<name>

    def raw(self, raw_dir):
        return Path(raw_dir) / (self.folder or self.name)

    def find(self, raw_dir):
        """{relative name: path} of the first layout that is all there; empty if none is."""
        raw = self.raw(raw_dir)
        for layout in self.layouts:
            found = [sorted(raw.glob(pattern)) for pattern in layout]
            if all(found):
                return {path.relative_to(raw).as_posix(): path for path in sum(found, [])}
        return {}


def hash_file(path):
    """A file's sha256, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(url, path, sha256=""):
    """
    Download a file unless it is there already. A download that was cut goes on where it stopped.

    Raises UserError when the server refuses or cannot be reached, when the connection is cut, and
    when the content has another hash than `sha256`.
    """
    path = Path(path)
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        whole = receive(url, partial)
    except urllib.error.HTTPError as error:
        if error.code == 416 and partial.exists():  # nothing lies beyond it: killed before the rename
            partial.unlink()
            return fetch(url, path, sha256)
        reasons = {401: "asks for a login", 403: "refuses access", 404: "has no such file"}
        reason = reasons.get(error.code, f"answers {error.code} {error.reason}")
        raise UserError(f"{url}: the server {reason}") from None
    except (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError,
            http.client.HTTPException) as error:
        raise UserError(f"{url}: no connection ({getattr(error, 'reason', error)}); run it again "
                        f"to go on, or put the file at {path} yourself") from None
    if not whole:
        raise UserError(f"{url}: cut after {partial.stat().st_size} bytes; run it again to go on")
    if sha256:
        found = hash_file(partial)
        if found != sha256:
            partial.unlink()
            raise UserError(f"{url}: its sha256 is {found}, not {sha256}")
    partial.replace(path)


def receive(url, partial):
    """Append what `partial` lacks of a file; False if the connection ended before its end."""
    start = partial.stat().st_size if partial.exists() else 0
    headers = {"User-Agent": "nanoMedQ"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        if response.status != 206:  # the server sends the whole file, asked or not
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with (open(partial, "ab" if start else "wb") as file,
              tqdm(desc=partial.name, initial=start, total=total, unit="B", unit_scale=True) as bar):
            while chunk := response.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
            return total is None or file.tell() == total


def fetch_hub(repository, patterns, folder, repo_type="dataset"):
    """
    Download a hub repository's files that match the patterns into a folder, all or none.

    Raises UserError when the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi, errors, snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        # Raises where snapshot_download, given a folder of files, would only warn.
        facts = HfApi().repo_info(repository, repo_type=repo_type)
        snapshot_download(repository, repo_type=repo_type, revision=facts.sha,
                          allow_patterns=list(patterns), local_dir=partial)
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{'datasets/' * (repo_type == 'dataset')}{repository}"
        raise UserError(f"{repository}: ask for access on {page}, then run `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{repository}: the hub has no such {repo_type}, or asks for a login") from None
    except (OSError, errors.HTTPError) as error:  # the hub's own, and those of its connection
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{repository}: not fetched from the hub ({first})") from None
    names = list(filter_repo_objects([file.rfilename for file in facts.siblings],
                                     allow_patterns=list(patterns)))
    lacking = [name for name in names if not (partial / name).is_file()]
    if lacking:
        raise UserError(f"{repository}: {lacking[0]} did not arrive; run it again to go on")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).replace(folder / name)
    shutil.rmtree(partial, ignore_errors=True)  # with the hub's own notes
