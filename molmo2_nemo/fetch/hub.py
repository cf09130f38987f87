"""Download files of data set repositories from the Hugging Face Hub, with the Hub's own client.

The commit is pinned: by the catalogue, or by raw/revisions.json under the data root, where the first fetch of a
repository writes the commit that it got. Every file is checked against the checksum that the Hub lists for it, and an
interrupted download is resumed (`hf_hub_download` of huggingface_hub 2.4 would start it from the beginning).
"""

import contextlib
import errno
import fnmatch
import hashlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, OnErrorOmit, TypeAdapter

from molmo2_nemo import compat
from molmo2_nemo.catalogue.datasets import HubFiles
from molmo2_nemo.catalogue.raw import ROW_SUFFIXES
from molmo2_nemo.fetch.media_check import instead_of_file
from molmo2_nemo.fetch.rules import Rules
from molmo2_nemo.fetch.web import USER_AGENT, Lost, OutOfBytes, check_address, retry_after
from molmo2_nemo.files import is_disk_error, locked, publish, sha256_of_text, write_json

SPLIT_WORDS = ("train", "validation", "valid", "val", "dev", "test")
# Bytes; the Hub serves larger files only through its own storage protocol (huggingface_hub,
# constants.MAX_HTTP_DOWNLOAD_SIZE).
MAX_HTTP_BYTES = 50_000_000_000
FILES_AT_ONCE = 8


class NotOnHub(ValueError):
    """The Hub has no such repository or file, or none that this account may see."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, as the Hub lists it."""

    name: str
    size: int | None
    sha256: str | None  # of a large file
    git_sha1: str | None  # of a small one, as git hashes a blob


def _listed(value: Any) -> list:
    """A card may have one value where it may have several."""
    return value if isinstance(value, list) else [value] if value else []


def _parts(value: Any) -> list:
    """`data_files` of a card's config, as it is written most fully: split -> patterns is a list of both."""
    if isinstance(value, dict):
        return [{"split": split, "path": path} for split, path in value.items()]
    return [part if isinstance(part, dict) else {"path": part} for part in _listed(value)]


class CardFiles(BaseModel):
    """Patterns of the files of a split; None: of whatever split is asked for."""

    split: str | None = None
    path: Annotated[list[str], BeforeValidator(_listed)] = []


class CardConfig(BaseModel):
    config_name: str | None = None
    default: bool = False
    data_dir: str = ""
    data_files: Annotated[list[CardFiles], BeforeValidator(_parts)] = []


class Card(BaseModel):
    """The YAML header of a repository's README.md, in the form that the Hub documents
    (https://huggingface.co/docs/hub/datasets-manual-configuration). A config of another form is left out."""

    license: Annotated[list[Any], BeforeValidator(_listed)] = []
    configs: Annotated[list[OnErrorOmit[CardConfig]], BeforeValidator(_listed)] = []


@dataclass(frozen=True)
class Repository:
    """A repository at a commit."""

    repo: str
    revision: str
    files: dict[str, HubFile]
    card: Card

    @property
    def license(self) -> str | None:
        return ", ".join(map(str, self.card.license)) or None


def page(repo: str) -> str:
    return f"{_endpoint()}/datasets/{repo}"


def pinned(root: Path, repo: str) -> str | None:
    """The commit of a repository that an earlier fetch recorded."""
    return _revisions(root / "raw" / "revisions.json").get(repo)


def _revisions(path: Path) -> dict[str, str]:
    """Repository -> commit. What is no such pair is left out; of a file that is no JSON object, everything."""
    try:
        values = TypeAdapter(dict[str, Any]).validate_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return {repo: revision for repo, revision in values.items() if isinstance(revision, str)}


def open_repository(files: HubFiles, root: Path, rules: Rules) -> Repository:
    """List a repository at its pinned commit; one that is not pinned yet is pinned to its newest commit.

    NotOnHub: there is no such repository. ValueError, one sentence: it cannot be read.
    """
    from huggingface_hub import HfApi

    wanted = files.revision or pinned(root, files.repo)
    asked = wanted or "main"
    _configure_client(rules)
    api = HfApi(endpoint=_endpoint(), user_agent=USER_AGENT)
    info = _with_retries(
        files.repo,
        wanted,
        rules,
        lambda: api.dataset_info(files.repo, revision=asked, files_metadata=True, timeout=rules.timeout),
    )
    revision = info.sha
    found = [(sibling.rfilename, sibling) for sibling in info.siblings or []]
    if not found:
        tree = _with_retries(
            files.repo,
            wanted,
            rules,
            lambda: list(
                api.list_repo_tree(files.repo, recursive=True, revision=revision or asked, repo_type="dataset")
            ),
        )
        found = [(file.path, file) for file in tree if hasattr(file, "blob_id")]
    listed = {}
    for name, file in found:
        if not isinstance(name, str) or not _is_safe(name):
            raise ValueError(f"{files.repo} lists the file {name!r}, which leads out of its folder: refused.")
        sha256 = file.lfs.sha256 if file.lfs else None
        size = file.size if isinstance(file.size, int) and file.size >= 0 else None
        listed[name] = HubFile(name, size, sha256, None if sha256 else file.blob_id)
    if not re.fullmatch("[0-9a-f]{40,64}", str(revision)) or (wanted and revision != wanted):
        raise ValueError(f"{files.repo} answered with the commit {revision} instead of {wanted}: try again later.")
    if files.revision is None:
        _pin(root, files.repo, revision)
    card = Card()
    if "README.md" in listed:
        readme = root / "raw" / ".cards" / files.repo.replace("/", "--") / f"{revision}.md"
        with locked(readme.parent / ".lock", wait=True):
            download_file(files.repo, revision, listed["README.md"], readme, rules, lambda count: None)
        card = read_card(readme)
    return Repository(files.repo, revision, listed, card)


def choose_files(repository: Repository, wanted: HubFiles) -> dict[str, list[str]]:
    """Files of each split that the catalogue asks for: by its patterns, by the card's configs, or by their names.

    ValueError, one sentence: no file is of this config or split, or a pattern matches no file.
    """
    names = sorted(repository.files)
    split = wanted.split or "train"
    if wanted.files:
        chosen = []
        for config in wanted.configs:
            for pattern in wanted.files:
                found = fnmatch.filter(names, pattern.replace("<config>", config or ""))
                if not found:
                    shown = pattern.replace("<config>", config or "")
                    raise ValueError(f"no file of {repository.repo} matches {shown}: it holds {_shown(names)}.")
                chosen += [name for name in found if name not in chosen]
        return {split: chosen}
    chosen = []
    for config in wanted.configs:
        found = _by_card(repository, config, split) or _by_name(repository.repo, names, config, split)
        chosen += [name for name in found if name not in chosen]
    return {split: chosen}


def _by_card(repository: Repository, config: str | None, split: str) -> list[str]:
    """By `configs` in the dataset card."""
    configs = repository.card.configs
    if config is None:
        named = [entry for entry in configs if entry.default or entry.config_name == "default"]
        configs = named[:1] or (configs if len(configs) == 1 else [])
    else:
        configs = [entry for entry in configs if entry.config_name == config]
    names, found = sorted(repository.files), []
    for entry in configs:
        folder = entry.data_dir.strip("/")
        for pattern in (path for part in entry.data_files if part.split in (None, split) for path in part.path):
            pattern = f"{folder}/{pattern}" if folder else pattern
            found += [name for name in fnmatch.filter(names, pattern) if name not in found]
    return found


def _by_name(repo: str, names: list[str], config: str | None, split: str) -> list[str]:
    """By folders and words in file names, as the library `datasets` finds splits without a card."""
    rows = [name for name in names if name.lower().endswith(ROW_SUFFIXES) and not name.startswith(".")]
    if config is not None:
        rows = [name for name in rows if config in PurePosixPath(name).parts[:-1] or _words(name)[:1] == [config]]
        if not rows:
            raise ValueError(f"{repo} has no files of the config {config}: it holds {_shown(names)}.")
    by_split = {
        name: next((w for w in reversed(_words(name)) if w in {*SPLIT_WORDS, split.lower()}), None) for name in rows
    }
    mine = [name for name, word in by_split.items() if word == split.lower()]
    if mine:
        return mine
    if not rows or any(by_split.values()):
        raise ValueError(f"{repo} has no files of the split {split}: it holds {_shown(names)}.")
    return rows


def _words(name: str) -> list[str]:
    """Parts of a path, the words of each part, and its beginning, which may have an underscore, last:
    track/valid_u-0.parquet -> track, track, track, valid_u-0.parquet, valid, u, 0, parquet, valid_u."""
    words = []
    for part in PurePosixPath(name.lower()).parts:
        words += [part, *part.replace("_", "-").replace(".", "-").split("-"), part.partition("-")[0]]
    return words


def fetch_files(
    repository: Repository,
    names: list[str],
    folder: Path,
    known: dict[str, dict],
    rules: Rules,
    add_bytes: Callable[[int], None],
    done: Callable[[str, dict], None],
    expect: Callable[[int], None] = lambda count: None,
) -> None:
    """Download files to `folder`.

    known: records of files that are there, by name; those with the right checksum and size are not downloaded again.
    add_bytes: called with the bytes of each piece. done: called with (name, record) of each file, by one thread at a
    time. expect: called with the number of bytes to download, before the first comes.
    """
    open_files = []
    for name in names:
        file, record = repository.files[name], known.get(name)
        path = folder / name
        if record and path.is_file() and path.stat().st_size == record["bytes"] and _agrees(record, file):
            continue
        open_files.append(file)

    expect(sum(file.size or 0 for file in open_files))
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(bytes_left(repository, file.name, folder) for file in open_files)
    if needed > (free := shutil.disk_usage(folder).free):
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed, {free:,} are free", str(folder))
    stop = threading.Event()

    def counted(count: int) -> None:
        if stop.is_set():
            raise OutOfBytes("another file stopped the run")
        add_bytes(count)

    def one(file: HubFile) -> tuple[str, dict]:
        digest = download_file(repository.repo, repository.revision, file, folder / file.name, rules, counted)
        return file.name, {"bytes": (folder / file.name).stat().st_size, "sha256": digest}

    with ThreadPoolExecutor(min(rules.jobs, FILES_AT_ONCE)) as threads:
        futures = [threads.submit(one, file) for file in open_files]
        try:
            for future in futures:
                done(*future.result())
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            # Complete files are recorded; the parts of the others stay and are resumed by the next run.
            for future in futures:
                with contextlib.suppress(BaseException):
                    done(*future.result())
            raise


def _agrees(record: dict, file: HubFile) -> bool:
    if file.sha256:
        return record["sha256"] == file.sha256
    return file.size is None or record["bytes"] == file.size


def download_file(
    repo: str, revision: str, file: HubFile, path: Path, rules: Rules, add_bytes: Callable[[int], None]
) -> str:
    """Download and check one file; return its SHA-256. ValueError, one sentence: it cannot be downloaded."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, get_token

    if (file.sha256 or file.git_sha1) and path.is_file() and (digest := _verified(path, file)):
        return digest
    part = _part(path, file, revision)
    part.parent.mkdir(parents=True, exist_ok=True)
    url = hf_hub_url(repo, file.name, repo_type="dataset", revision=revision, endpoint=_endpoint())
    headers = build_hf_headers(token=get_token(), user_agent=USER_AGENT) | {"Accept-Encoding": "identity"}
    if not file.sha256 and not file.git_sha1:
        # The listing has names only; the headers of the file itself have size and checksum.
        head = _with_retries(
            repo,
            revision,
            rules,
            lambda: get_hf_file_metadata(url, token=get_token(), timeout=rules.timeout),
            file.name,
        )
        tag = (head.etag or "").lower()
        file = replace(
            file,
            size=file.size if file.size is not None else head.size,
            sha256=tag if re.fullmatch("[0-9a-f]{64}", tag) else None,
            git_sha1=tag if re.fullmatch("[0-9a-f]{40}", tag) else None,
        )
        if path.is_file() and (digest := _verified(path, file)):
            return digest
    for _attempt in range(2):
        have = part.stat().st_size if part.exists() else 0
        if have and (file.size is None or have > file.size):
            part.unlink()
        if (file.size or 0) > MAX_HTTP_BYTES:
            _large_file(repo, revision, file, part)
        else:

            def get() -> None:
                with part.open("r+b" if part.exists() else "w+b") as stream:
                    start = stream.seek(0, os.SEEK_END)
                    if start and (file.size is None or start >= file.size):
                        start = stream.truncate(stream.seek(0))
                    http_get(
                        url,
                        _Counted(stream, add_bytes, file.size),
                        resume_size=start,
                        headers=headers,
                        expected_size=file.size,
                        displayed_filename=file.name,
                        _nb_retries=2,
                    )

            _with_retries(repo, revision, rules, get, file.name)
        digest = _verified(part, file)
        if digest is not None:
            publish(part, path)
            return digest
        size = part.stat().st_size
        part.unlink()
    raise ValueError(
        f"{file.name} of {repo} came twice with {size:,} bytes that do not match the checksum on the Hub: "
        "try again later."
    )


def bytes_left(repository: Repository, name: str, folder: Path) -> int:
    """Bytes of a file that are still to come to `folder`, without what an interrupted download has left there."""
    file = repository.files[name]
    part = _part(folder / name, file, repository.revision)
    return max(0, (file.size or 0) - (part.stat().st_size if part.exists() else 0))


def _part(path: Path, file: HubFile, revision: str) -> Path:
    """Where a file is kept until it is complete."""
    return path.parent / ".part" / f"{sha256_of_text(file.name)[:16]}-{revision[:12]}"


class _Counted:
    """A file that reports the bytes written to it, and refuses more than the size that the Hub lists."""

    def __init__(self, stream, add_bytes: Callable[[int], None], size: int | None):
        self._stream, self._add_bytes, self._size = stream, add_bytes, size or MAX_HTTP_BYTES

    def write(self, data: bytes) -> int:
        if self._stream.tell() + len(data) > self._size:
            self._stream.truncate(0)
            raise ValueError(f"the server sent more than the {self._size:,} bytes that the Hub lists")
        self._add_bytes(len(data))
        written = self._stream.write(data)
        self._stream.flush()
        return written

    def __getattr__(self, name):
        return getattr(self._stream, name)


def _large_file(repo: str, revision: str, file: HubFile, part: Path) -> None:
    """Download with hf_xet, which the Hub requires for large files. An interrupted download is not resumed."""
    from huggingface_hub import hf_hub_download

    folder = part.with_name(f"{part.name}.hub")
    got = hf_hub_download(
        repo, file.name, repo_type="dataset", revision=revision, local_dir=folder, endpoint=_endpoint()
    )
    Path(got).replace(part)


def _verified(path: Path, file: HubFile) -> str | None:
    """SHA-256 of a file that has the size and checksum that the Hub lists; None: it does not."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return None
    sha256 = hashlib.sha256()
    blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    plain = hashlib.sha1(usedforsecurity=False)
    if not file.sha256 and not file.git_sha1 and instead_of_file(path):
        return None
    with path.open("rb") as stream:
        while chunk := stream.read(2**20):
            sha256.update(chunk)
            if file.git_sha1:
                blob.update(chunk)
                plain.update(chunk)
    if file.sha256 and sha256.hexdigest() != file.sha256:
        return None
    # Some mirrors list the SHA-1 of the plain file in place of git's.
    if file.git_sha1 and not file.sha256 and file.git_sha1 not in (blob.hexdigest(), plain.hexdigest()):
        return None
    return sha256.hexdigest()


def _with_retries(repo: str, revision: str | None, rules: Rules, ask: Callable, what: str | None = None):
    """Ask the Hub, with retries, and return its answer. ValueError, one sentence: there is none."""
    import httpx2
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = f"{what} of {repo}" if what else repo
    for attempt in range(rules.tries):
        try:
            return ask()
        except GatedRepoError as error:
            raise ValueError(
                f"{name} is gated: agree to its terms at {page(repo)}, then log in with `hf auth login` or set "
                "HF_TOKEN, and run it again."
            ) from error
        except RevisionNotFoundError as error:
            raise ValueError(
                f"{repo} has no commit {revision} any more: remove its line from raw/revisions.json or correct "
                "the catalogue."
            ) from error
        except (RepositoryNotFoundError, DisabledRepoError) as error:
            raise NotOnHub(
                f"{repo} is not on the Hub, or not visible to you: see {page(repo)}, and log in with "
                "`hf auth login` if it is private."
            ) from error
        except RemoteEntryNotFoundError as error:
            raise NotOnHub(f"{name} is not on the Hub at the commit {revision}: see {page(repo)}.") from error
        except OfflineModeIsEnabled as error:
            raise ValueError(f"{name} cannot be downloaded while HF_HUB_OFFLINE is set: unset it.") from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise ValueError(f"{name} is not open to this account (status {status}): see {page(repo)}.") from error
            if status < 500 and status not in (408, 429):
                raise ValueError(f"{name}: the Hub answered {' '.join(str(error).split())[:200]}.") from error
            last = error
        except (
            httpx2.HTTPError,
            httpx2.StreamError,
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            if is_disk_error(error):
                raise
            if isinstance(error, Lost):
                raise ValueError(f"{name}: {error.reason}.") from error
            last = error
        if attempt + 1 < rules.tries:
            time.sleep(rules.backoff * 2**attempt)
    raise ValueError(
        f"{name} cannot be downloaded from {_endpoint()} now ({' '.join(str(last).split())[:200]}): run it again."
    )


def _configure_client(rules: Rules) -> None:
    """Have the Hub's client drop connections below the minimum rate, and refuse to be sent to private addresses."""
    import httpx2
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    class RateChecked(httpx2.SyncByteStream):
        def __init__(self, stream):
            self._stream = stream

        def __iter__(self):
            started, got = time.monotonic(), 0
            for chunk in self._stream:
                got, passed = got + len(chunk), time.monotonic() - started
                if passed >= rules.timeout:
                    if got < rules.min_rate * passed:
                        raise httpx2.ReadTimeout(f"slower than {rules.min_rate:.0f} bytes/s for {rules.timeout:.0f} s")
                    started, got = time.monotonic(), 0
                yield chunk

        def close(self):
            self._stream.close()

    def check(request) -> None:
        try:
            check_address(str(request.url), rules)
        except Lost as error:
            raise httpx2.UnsupportedProtocol(error.reason) from error

    def limit(response) -> None:
        response.stream = RateChecked(response.stream)
        # The client would wait as long as a server asks for, without a limit.
        response.headers.pop("ratelimit", None)
        if (seconds := retry_after(response.headers.get("Retry-After"))) and seconds > rules.max_wait:
            response.headers["Retry-After"] = str(int(rules.max_wait))

    def factory():
        client = compat.hub_client()
        hooks = client.event_hooks
        client.event_hooks = {"request": [*hooks["request"], check], "response": [*hooks["response"], limit]}
        client.timeout = httpx2.Timeout(rules.timeout)
        return client

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    huggingface_hub.set_client_factory(factory)


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _pin(root: Path, repo: str, revision: str) -> None:
    path = root / "raw" / "revisions.json"
    with locked(path.with_name(".revisions.lock"), wait=True):
        values = _revisions(path)
        if values.get(repo) != revision:
            write_json(path, values | {repo: revision}, sort_keys=True)


def _is_safe(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        bool(path.parts)
        and not path.is_absolute()
        and ".." not in path.parts
        and "\0" not in name
        and "\\" not in name
        and ".part" not in path.parts
        and all(len(os.fsencode(part)) <= 255 for part in path.parts)
    )


def read_card(readme: Path) -> Card:
    """That of a README.md; an empty one: it has no header that can be read."""
    text = readme.read_text(errors="replace")
    if not text.startswith("---"):
        return Card()
    try:
        return Card.model_validate(yaml.safe_load(text.split("\n---", 1)[0].removeprefix("---")))
    except (yaml.YAMLError, ValueError, RecursionError):
        return Card()


def _shown(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "nothing"
