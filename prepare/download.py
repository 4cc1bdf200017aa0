"""Where files come from: a folder that has them already, an address, or the Hugging Face hub."""

import email.utils
import errno
import http.client
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from urllib.parse import quote

from tqdm import tqdm

from plumbing.files import hash_file
from plumbing.flags import UserError


ATTEMPTS = 6  # in a row that bring no byte more; then a download gives up
SILENT = 2  # of a server that has never said a word: it is out of reach, and so may all others be
PAUSE = 2.0  # seconds before the second attempt, doubled before each further one
TIMEOUT = 60  # seconds without a word from the server
LONGEST_WAIT = 300  # seconds; a server that asks for more is not waited for
PASSING = (408, 429, 500, 502, 503, 504)  # statuses that the next attempt may not meet again
CONNECTION_ERRORS = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError,
                     http.client.HTTPException)


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
    revision: str = ""  # of the hub repository; the newest where none is named
    folder: Path | str = ""  # its raw folder, if that is not <raw_dir>/<name>
    also: tuple = ()  # other names that its raw folder may have, such as its repository's
    in_place: bool = False  # a hub folder that is used as it is: downloaded into weights/ itself

    def raw(self, raw_dir):
        names = (self.folder or self.name, *self.also)
        folders = [Path(raw_dir) / name for name in names]
        return next(filter(Path.is_dir, folders), folders[0])

    def find(self, raw_dir):
        """{relative name: path} of the first layout that is all there; empty if none is."""
        raw = self.raw(raw_dir)
        for layout in self.layouts:
            matches = [sorted(raw.glob(pattern)) for pattern in layout]
            if all(matches):
                return {path.relative_to(raw).as_posix(): path for path in sum(matches, [])}
        return {}


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def require_space(name, folder, needed):
    """Raise UserError unless the disk of a folder has so many bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{name}: needs {needed / 1e6:,.1f} MB more, and {free / 1e6:,.1f} MB are free "
                        f"in {folder}; make space there and run it again")


def one_line(error):
    lines = str(getattr(error, "reason", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__


def seconds_asked(headers):
    """How long a Retry-After header asks to wait, in seconds or until a date; 0 if it does not."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    date = email.utils.parsedate_tz(value)
    return max(0, email.utils.mktime_tz(date) - time.time()) if date else 0


def keep_trying(name, attempt, errors, arrived=lambda: 0):
    """
    What attempt() returns, called again after ever longer pauses while it raises one of `errors`.

    arrived() is how many bytes are there: whenever more have come, the count of attempts starts
    anew. Raises the error of the last attempt, or one whose status would be the same the next time,
    and UserError when the server asks for too long a wait.
    """
    failures, most, spoke = 0, arrived(), False
    while True:
        try:
            return attempt()
        except errors as error:
            failures, most = 1 if arrived() > most else failures + 1, max(most, arrived())
            answer = getattr(error, "response", error)  # of huggingface_hub's errors, and of urllib's
            status = getattr(answer, "status_code", getattr(answer, "code", None))
            spoke = spoke or status or most > 0
            if failures == (ATTEMPTS if spoke else SILENT) or status and status not in PASSING:
                raise
            asked = seconds_asked(answer.headers) if status else 0
            reason = f"the server answers {status}" if status else one_line(error)
            if asked > LONGEST_WAIT:
                raise UserError(f"{name}: {reason} and asks to wait {asked:,.0f} s; "
                                "run it again after that") from None
            wait = max(asked, PAUSE * 2 ** (failures - 1))
            print(f"{name}: {reason}; trying again in {wait:,.0f} s", flush=True)
        sleep(wait)


def fetch(url, path, sha256="", token=""):
    """
    Download a file unless it is there already. A download that was cut goes on where it stopped.

    `token` is a login for the server of the url. Raises UserError when the server refuses or cannot
    be reached, when the connection fails again and again, when the disk lacks the space, and when
    the content has another hash than `sha256`.
    """
    path = Path(path)
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    version = path.with_name(f".{path.name}.version")
    by_hand = f"put the file at {path} yourself"
    try:
        keep_trying(url, lambda: receive(url, partial, version, token), CONNECTION_ERRORS,
                    lambda: size_of(partial))
    except urllib.error.HTTPError as error:
        if error.code == 416 and partial.exists():  # the server's file is shorter: it has changed
            partial.unlink()
            return fetch(url, path, sha256, token)
        reasons = {401: "asks for a login", 403: "refuses access", 404: "has no such file",
                   "GatedRepo": "asks you to request access on the page of the repository and to run "
                                "`hf auth login`"}
        reason = (reasons.get(error.headers.get("X-Error-Code")) or reasons.get(error.code)
                  or f"answers {error.code} {error.reason}")
        again = "run it again later, or " if error.code in PASSING else ""
        raise UserError(f"{url}: the server {reason}; {again}{by_hand}") from None
    except CONNECTION_ERRORS as error:
        raise UserError(f"{url}: the connection fails ({one_line(error)}); run it again to go on, or "
                        f"{by_hand}") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{url}: no space is left in {path.parent}; make space there and run it again: "
                        "it goes on where it stopped") from None
    if sha256:
        digest = hash_file(partial)
        if digest != sha256:
            partial.unlink()
            raise UserError(f"{url}: its sha256 is {digest}, not {sha256}; run it again to start anew, "
                            f"or {by_hand}")
    partial.replace(path)
    version.unlink(missing_ok=True)


class Redirect(urllib.request.HTTPRedirectHandler):
    """Follows a redirect, but shows a login to no other server."""

    def redirect_request(self, request, *details):
        target = super().redirect_request(request, *details)
        if (target.type, target.host) != (request.type, request.host):
            target.remove_header("Authorization")
        return target


def receive(url, partial, version, token):
    """
    Append what `partial` lacks of a file.

    The file `version` keeps what the server calls the version, and its size. Raises ConnectionError
    when the connection ends before the file, and when the version is another one: after that, the
    next call starts from nothing.
    """
    there = size_of(partial)
    known = version.read_text() if version.exists() else ""
    if there and known.endswith(f" {there}"):  # whole: the run was killed before the rename
        return
    headers = ({"User-Agent": "nanoMedQ"} | ({"Range": f"bytes={there}-"} if there else {})
               | ({"Authorization": f"Bearer {token}"} if token else {}))
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.build_opener(Redirect).open(request, timeout=TIMEOUT) as response:
        start = there if response.status == 206 else 0  # 200: the whole file, asked or not
        length = response.headers.get("Content-Length")
        total = response.headers.get("Content-Range", "").rpartition("/")[2]  # a 206 may end before it
        total = int(total) if total.isdecimal() else start + int(length) if length else None
        stamp = f"{response.headers.get('ETag') or response.headers.get('Last-Modified')} {total}"
        if start and stamp != known:
            partial.unlink()
            raise ConnectionError("the file on the server has changed")
        require_space(url, partial.parent, (total or 0) - there)
        with (open(partial, "ab" if start else "wb") as file,
              tqdm(desc=partial.name, initial=start, total=total, unit="B", unit_scale=True) as bar):
            version.write_text(stamp)  # not before older content is gone from `partial`
            while chunk := response.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
            if total is not None and file.tell() != total:
                raise ConnectionError(f"cut after {file.tell()} of {total} bytes")


def hub_place(repository, repo_type):
    """A repository's path on the hub."""
    return f"{'datasets/' * (repo_type == 'dataset')}{repository}"


def list_hub(repository, repo_type, revision):
    """
    What the hub knows of a repository, its commit and files among it; None if it lacks the revision.

    Raises UserError when the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi, errors

    try:
        return keep_trying(repository, lambda: HfApi().repo_info(
            repository, repo_type=repo_type, revision=revision or None, files_metadata=True,
            timeout=TIMEOUT), errors.HTTPError)
    except errors.RevisionNotFoundError:
        return None
    except errors.GatedRepoError:
        raise UserError(f"{repository}: ask for access on https://huggingface.co/"
                        f"{hub_place(repository, repo_type)}, then run `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{repository}: the hub has no such {repo_type}, or asks for a login: "
                        "run `hf auth login`") from None
    except (OSError, ValueError, errors.HTTPError) as error:
        raise UserError(f"{repository}: not fetched from the hub ({one_line(error)}); "
                        "run it again later") from None


def hub_revision(folder):
    """"<repository>@<commit>" of the files that fetch_hub put into a folder; "" if it put none there."""
    path = Path(folder) / "hub_revision.txt"
    return path.read_text().strip() if path.exists() else ""


def require_inside(repository, folder, name):
    """Refuse a name of a hub's listing that is no plain file below the folder, or one that is kept there."""
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") and len(part.encode("utf-8", "replace")) < 240 for part in parts)
    if (not plain or any(char in "\\:" or not char.isprintable() for char in name) or parts[0][0] == "."
            or name == "hub_revision.txt" or not (folder / name).resolve().is_relative_to(folder.resolve())):
        raise UserError(f"{repository}: its listing has the name {name!r:.120}, which is none of a file "
                        f"below {folder}; fetch by hand what you trust")


def fetch_hub(repository, patterns, folder, repo_type="dataset", revision=""):
    """
    Download a hub repository's files that match the patterns into a folder, all or none.

    `revision` is a commit, tag or branch. Without it, files that are there, or in a download that
    was cut, are completed with those of their own commit, if the hub still has that: no two commits
    mix. Raises UserError when the hub refuses, cannot be reached or lacks the revision, and as
    fetch does.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import filter_repo_objects

    place = hub_place(repository, repo_type)
    folder = Path(folder).resolve()  # a link to another disk: download to that disk
    partial = folder.with_name(f".{folder.name}.partial")
    begun, _, commit = (hub_revision(partial) or hub_revision(folder)).partition("@")
    wanted = [revision] if revision else [commit, ""] if begun == repository else [""]
    facts = next(filter(None, (list_hub(repository, repo_type, name) for name in wanted)), None)
    if not facts:
        raise UserError(f"{repository}: the hub has no revision {revision or 'main'} of it; see "
                        f"https://huggingface.co/{place}/commits")
    record = f"{repository}@{facts.sha}"
    if partial.exists() and hub_revision(partial) != record:
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "hub_revision.txt").write_text(record + "\n")
    files = list(filter_repo_objects(facts.siblings, allow_patterns=list(patterns),
                                     key=lambda file: file.rfilename))
    for file in files:
        require_inside(repository, partial, file.rfilename)
    there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    require_space(repository, partial, sum(file.size or 0 for file in files) - there)
    # Not with huggingface_hub's own download: once cut, that deletes what it has of a file.
    for file in files:
        fetch(f"{constants.ENDPOINT}/{place}/resolve/{facts.sha}/{quote(file.rfilename)}",
              partial / file.rfilename, file.lfs.sha256 if file.lfs else "", get_token() or "")
    for name in [*(file.rfilename for file in files), "hub_revision.txt"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).replace(folder / name)
    shutil.rmtree(partial, ignore_errors=True)
