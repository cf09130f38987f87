"""Files in object storage by their address, through multi-storage-client, and the same functions for local paths.

    msc://PROFILE/PATH    a profile of multi-storage-client's own configuration file (S3, Google, Azure, OCI, a folder)
    s3://BUCKET/PATH      with the credentials that boto3 finds by itself: environment, ~/.aws, the machine's role
    gs://BUCKET/PATH      with Google's application default credentials

This is the only module that knows addresses. Every function takes an address or a local path as text, retries what may
go away (for PATIENCE seconds, with growing pauses), and raises StorageError, one sentence that names the object and the
cause, or Missing. No sentence has a credential in it: the parts of an address that may hold one are left out, and of an
error only what is listed here is quoted. multi-storage-client is imported by the first address that is used.

Checked against multi-storage-client 1.3.1.
"""

import contextlib
import functools
import hashlib
import importlib
import logging
import os
import posixpath
import random
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.files import disk_error_behind, sha256_of

SCHEMES = ("msc", "s3", "gs")
LOCAL = "__filesystem__"  # multi-storage-client's own name of a profile for local paths
# Also s3:BUCKET, a slip of the pen, which would become a local folder of this name.
SCHEME = re.compile(rf"([A-Za-z][A-Za-z0-9+.-]*(?=:/)|(?i:{'|'.join(SCHEMES)})(?=:))")
# Seconds after its first failure in which an operation is tried again; a storm of 503 lasts a minute or two.
PATIENCE = 120.0
_PATIENCE: ContextVar[float] = ContextVar("patience")
# Seconds before the second attempt, doubled for each one after it up to LONGEST_PAUSE, each by half more or less.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
# Seconds of vain attempts after which it is said, once, that there will be more.
SILENT_FOR = 5.0
# Seconds without a byte or an answer after which an attempt has failed. Only where the profile sets nothing itself.
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 30
# Bytes that are in memory at once while an object is read for its checksum.
READ_AT_ONCE = 64 * 2**20
# How often an object is written again that came back with other bytes.
TRIES = 3
# What has to be installed for a kind of storage: the extra of this project (pyproject.toml).
EXTRAS = {"boto3": "s3", "botocore": "s3", "google": "gcs", "azure": "azure"}
# Providers of multi-storage-client that take the options of boto3.
S3_PROVIDERS = ("s3", "s8k", "gcs_s3", "ais_s3")
# Answers of S3 that say that the credentials are too old, or wrong. A token that has ended is invalid to some servers.
# Source: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
EXPIRED = {"ExpiredToken", "TokenRefreshRequired", "RequestExpired", "InvalidToken", "InvalidTokenId"}
WRONG_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthorizationHeaderMalformed"}
# Seconds for which a client is kept after it was made, though its credentials have expired: many threads see that.
RENEW_AFTER = 1.0
# The answer of S3 where not the object but all of its bucket is missing.
NO_BUCKET, NO_BUCKET_SAID = "NoSuchBucket", "there is no such bucket: correct the address, or create it"


class StorageError(ConfigError):
    """Storage that cannot be used. The message is one sentence: the object, the cause, what to do."""


class Missing(StorageError, FileNotFoundError):
    """There is no such object."""


class Unreachable(StorageError):
    """Storage that has not answered, or not well, for as long as is tried: it may do so later."""


def is_for_all(error: BaseException) -> bool:
    """Whether an error of reading ends the work: the storage cannot be used, or a shard was replaced.

    That one object is not there concerns its samples alone, as on a disk.
    """
    return isinstance(error, StorageError) and not isinstance(error, Missing)


@dataclass(frozen=True)
class Object:
    """size: bytes. version: changes when the object is replaced (its ETag, or the time it was written)."""

    size: int
    version: str


def is_remote(path) -> bool:
    """Whether this is an address rather than a local path; also one with a scheme that is not known."""
    match = SCHEME.match(str(path))
    return bool(match) and match[1].lower() != "file"


def check(address: str, key: str) -> None:
    """StorageError, if no function here can take this address; `key` is the setting that has it. Asks nobody."""
    scheme, _, rest = str(address).partition(":")
    if scheme.lower() not in SCHEMES:
        raise StorageError(
            f"{key}={shown(address)} has an unknown scheme: write s3://BUCKET/PATH, gs://BUCKET/PATH, or"
            " msc://PROFILE/PATH with a profile of multi-storage-client, which knows Azure and OCI, too."
        )
    form = f"{scheme}://{'PROFILE' if scheme.lower() == 'msc' else 'BUCKET'}/PATH"
    if not re.match(r"//[^/]", rest):
        raise StorageError(f"{key}={shown(address)} is not {form}: correct it.")
    if not re.match(r"//[^/?#@:]+(/|$)", rest) or "?" in rest or "#" in rest:
        raise StorageError(
            f"{key}={shown(address)}, of which a part is not shown here, has more in it than {form}: credentials and"
            " the server's address belong into the environment or into multi-storage-client's file, and paths with ? or"
            " # cannot be used."
        )


def shown(address: str) -> str:
    """The address as it may be printed: without a query, and without a user and a password."""
    address = str(address)
    if not is_remote(address):
        return address
    scheme, _, rest = re.split(r"[?#]", address, maxsplit=1)[0].partition(":")
    slashes = rest[: len(rest) - len(rest.lstrip("/"))]
    first, slash, path = rest.lstrip("/").partition("/")
    if ":" in first and "@" in rest:  # a password may have slashes of its own
        first, slash, path = rest.rpartition("@")[2].partition("/")
    return f"{scheme}:{slashes}{first.rpartition('@')[2].partition(':')[0]}{slash}{path}"


def join(root: str, *parts: str) -> str:
    """The address or local path of something below `root`; a part that is itself an address or absolute wins."""
    for part in parts:
        if is_remote(part) or not is_remote(root):
            root = str(part) if is_remote(part) else os.path.join(root, os.path.expanduser(part))
        elif part.startswith(("/", "~")):
            root = os.path.expanduser(part)
        else:
            scheme, _, path = root.partition("://")
            root = f"{scheme}://{posixpath.normpath(posixpath.join(path, part))}"
    return root


def parent(address: str) -> str:
    """The address of the folder that holds this one; that of a whole bucket or profile is its own."""
    scheme, _, path = address.rstrip("/").partition("://")
    return f"{scheme}://{posixpath.dirname(path) or path}" if is_remote(address) else os.path.dirname(address)


def name(address: str) -> str:
    """The last part of an address or a path."""
    return posixpath.basename(str(address).rstrip("/"))


def forget_clients() -> None:
    """Read the configuration and the credentials anew at the next operation."""
    _made_client.cache_clear()
    _path_mapping.cache_clear()


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Inside of this, operations are tried again for so long after their first failure, in the place of PATIENCE."""
    token = _PATIENCE.set(seconds)
    try:
        yield
    finally:
        _PATIENCE.reset(token)


def connect(address: str) -> None:
    """Make this process' client for an address now, not at its first use. StorageError."""
    _tried("look at", address, lambda: _client(address))


@contextlib.contextmanager
def named(key: str) -> Iterator[None]:
    """Errors that leave this begin with the setting that they are about."""
    try:
        yield
    except ConfigError as error:
        if str(error).startswith(key.partition("=")[0]):
            raise
        raise type(error)(f"{key}: {error}") from None


# -- operations -------------------------------------------------------------------------------------------------------


def info(address: str) -> Object:
    """Size and version of an object. Missing, StorageError."""

    def ask():
        client, path = _client(address)
        if not is_remote(address):  # by one request for it, unlike multi-storage-client's
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):
                raise FileNotFoundError(f"{address} is no file")
            return Object(found.st_size, str(datetime.fromtimestamp(found.st_mtime, UTC).timestamp()))
        try:
            return _object(client.info(path, strict=False), address)
        except Exception as error:
            if _answer(error)[0] not in ("400", "403"):
                raise
            refused = error
        with contextlib.suppress(FileNotFoundError):  # an answer to HEAD has no body that says why, one to GET has
            client.read(path, byte_range=_library().types.Range(0, 1))
        raise refused

    return _tried("look at", address, ask)


def exists(address: str) -> bool:
    """Whether there is an object (a folder is none). StorageError."""
    with contextlib.suppress(Missing):
        info(address)
        return True
    return False


def read(address: str, offset: int = 0, size: int | None = None) -> bytes:
    """`size` bytes of an object from `offset` on, by default all of it. Missing, StorageError; never fewer bytes."""

    def ask():
        client, path = _client(address)
        if not is_remote(address):
            with open(path, "rb", buffering=0) as file:
                return _read_all(file.fileno(), offset, size)
        if size is None and not offset:
            return client.read(path)
        wanted = info(address).size - offset if size is None else size
        data = client.read(path, byte_range=_library().types.Range(offset, wanted)) if wanted else b""
        if len(data) != wanted:
            raise _Cut(f"{len(data):,} of {wanted:,} bytes came")
        return data

    return _tried("read", address, ask)


def write(address: str, data: bytes) -> None:
    """Write an object; it appears when it is whole. StorageError."""

    def ask():
        client, path = _client(address)
        client.write(path, data)

    _tried("write", address, ask)


def send(content: Path | bytes, address: str, sha256: str | None = None, read_back: bool = True) -> None:
    """Write an object, of a local file or of bytes, and see that it is there as it was sent; else write it again.

    read_back: read it for its SHA-256, else its size is compared alone. sha256: that it must have, by default that of
    `content`. StorageError: it cannot be written, or is not as it was sent after TRIES times.
    """
    is_file = isinstance(content, Path)
    size = content.stat().st_size if is_file else len(content)
    if read_back and sha256 is None:
        sha256 = sha256_of(content) if is_file else hashlib.sha256(content).hexdigest()
    for _ in range(TRIES):
        if is_file:
            upload_file(content, address)
        else:
            write(address, content)
        if info(address).size == size and (not read_back or sha256_there(address, size) == sha256):
            return
    raise StorageError(
        f"{shown(address)} was written {TRIES} times and came back with other bytes: look at the storage."
    )


def sha256_there(address: str, size: int) -> str:
    """SHA-256 of an object of `size` bytes, which are read. Missing, StorageError."""
    digest = hashlib.sha256()
    for begin in range(0, size, READ_AT_ONCE):
        digest.update(read(address, begin, min(READ_AT_ONCE, size - begin)))
    return digest.hexdigest()


def list_files(folder: str) -> dict[str, Object]:
    """All objects below a folder, in any depth, by their path from it; none where there is no such folder.

    StorageError. Versions that Google gives in a list are others than those of `info`.
    """

    def ask():
        client, path = _client(folder)
        prefix = path.strip("/") + "/" if path.strip("/") else ""
        found = {}
        for entry in client.list(prefix):
            if entry.type == "file" and entry.key.lstrip("/").startswith(prefix):
                found[entry.key.lstrip("/")[len(prefix) :]] = _object(entry, folder)
        return found

    try:
        return _tried("list", folder, ask)
    except Missing:
        return {}


def upload_file(local: Path, address: str) -> None:
    """Copy a local file to an address; it appears there when it is whole. StorageError."""

    def ask():
        client, path = _client(address)
        client.upload_file(path, str(local))

    _tried("write", address, ask)


def download_file(address: str, local: Path) -> Object:
    """Copy an object to a local file, which appears when it is whole; the folder must be there. Missing, StorageError.

    An OSError of the local disk is passed on.
    """

    partial = local.with_name(f".{local.name}.{os.uname().nodename}.{os.getpid()}")

    def ask():
        client, path = _client(address)
        found = info(address)
        file.seek(0)
        file.truncate()
        client.download_file(path, file)
        file.flush()
        came = os.fstat(file.fileno()).st_size  # parts of a large object come in any order: the last one may be any
        if came != found.size:
            raise _Cut(f"{came:,} of {found.size:,} bytes came")
        return found

    try:
        with partial.open("wb") as file:
            found = _tried("read", address, ask, to_disk=True)
        partial.replace(local)
    finally:
        partial.unlink(missing_ok=True)
    return found


def delete(address: str) -> None:
    """Remove an object; one that is not there is removed already. StorageError."""

    def ask():
        client, path = _client(address)
        client.delete(path)

    with contextlib.suppress(Missing):
        _tried("delete", address, ask)


def delete_folder(folder: str, first: tuple[str, ...] = ()) -> None:
    """Remove all objects below a folder, those of these names first: a folder without its marker is known as a rest."""
    files = list_files(folder)
    for file in sorted(files, key=lambda file: name(file) not in first):
        delete(join(folder, file))


# -- the library ------------------------------------------------------------------------------------------------------


class _Cut(Exception):
    """Fewer bytes came than there are."""


@functools.cache
def _library():
    """multi-storage-client. It logs the errors that are told here, and so it logs none.

    botocore tells at the level INFO where each client has found its credentials, hundreds of times in a run.
    """
    logging.getLogger("multistorageclient").setLevel(logging.CRITICAL + 1)
    logging.getLogger("botocore").setLevel(logging.WARNING)
    return importlib.import_module("multistorageclient")


def _client(address: str) -> tuple[Any, str]:
    """The client for an address, and the object's path for it."""
    profile, path = _profile(address)
    with _MAKING:
        return _made_client(profile, os.getpid())[0], path


def _profile(address: str) -> tuple[str, str]:
    """The name of the profile for an address, and the object's path in it."""
    if not is_remote(address):
        return LOCAL, os.path.abspath(os.path.expanduser(address))
    check(address, "address")
    scheme, _, rest = address.partition("://")
    profile, _, path = rest.partition("/")
    if scheme.lower() == "msc":
        return profile, path
    return _path_mapping().find_mapping(address) or (f"_{scheme.lower()}-{profile}", path)


def _renew(address: str) -> None:
    """Have the next operation read the credentials anew, unless another thread has just done so."""
    profile, _ = _profile(address)
    with _MAKING:
        _, made = _made_client(profile, os.getpid())
        if time.monotonic() > made + RENEW_AFTER:
            forget_clients()


@functools.cache
def _path_mapping():
    return _library().config.PathMapping.from_config()


# Making a client takes a tenth of a second of a core, and dozens of threads may want their first one at the same time.
# A fork waits until none is being made.
_MAKING = threading.RLock()
os.register_at_fork(before=_MAKING.acquire, after_in_parent=_MAKING.release, after_in_child=_MAKING.release)


@functools.cache
def _made_client(profile: str, pid: int) -> tuple[Any, float]:
    """(a client, when it was made); connections must not be shared with a process that was forked (pid).

    As multi-storage-client makes it, but without its own cache, and with other times where the profile sets none: it
    and boto3 try again by themselves, so that one attempt of ours would be nine, and wait for a minute.
    """
    config = _library().config
    if profile == LOCAL:
        client = _library().StorageClient(config=config.StorageClientConfig.from_file(profile=LOCAL))
        return client, time.monotonic()
    given, _ = config.StorageClientConfig.read_msc_config()
    profiles = dict((given or {}).get("profiles") or {})
    if profile not in profiles:
        protocol, bucket = profile.removeprefix("_").split("-", 1)  # ValueError: no such profile
        profiles |= config.create_implicit_profile_config(profile, protocol, bucket)["profiles"]
    settings = {"retry": {"attempts": 1, "delay": 0.0}, **profiles[profile]}
    provider = settings.get("storage_provider") or {}
    if provider.get("type") in S3_PROVIDERS:
        options = {
            "connect_timeout": CONNECT_TIMEOUT,
            "read_timeout": READ_TIMEOUT,
            "retries": {"mode": "standard", "total_max_attempts": 1},
            **(provider.get("options") or {}),
        }
        settings["storage_provider"] = {**provider, "options": options}
    given = {key: value for key, value in (given or {}).items() if key != "cache"}
    made = config.StorageClientConfig.from_dict(
        {**given, "profiles": {**profiles, profile: settings}}, profile=profile, skip_validation=True
    )
    return _library().StorageClient(config=made), time.monotonic()


def _object(found, address: str) -> Object:
    if found.type != "file":
        raise FileNotFoundError(f"{address} is a folder")
    return Object(found.content_length, found.etag or str(found.last_modified.timestamp()))


def _read_all(file: int, offset: int, size: int | None) -> bytes:
    """`size` bytes of an open local file from `offset` on, by default all. _Cut: it has fewer."""
    size = os.fstat(file).st_size - offset if size is None else size
    parts, left = [], size
    while left and (part := os.pread(file, left, offset + size - left)):
        parts.append(part)
        left -= len(part)
    if left:
        raise _Cut(f"{size - left:,} of {size:,} bytes came")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _tried[T](verb: str, address: str, ask: Callable[[], T], to_disk: bool = False) -> T:
    """What `ask` returns, tried again while that may help. to_disk: it writes to this machine's disk, too."""
    first, pause, patience = None, FIRST_PAUSE, _PATIENCE.get(PATIENCE)
    while True:
        try:
            return ask()
        except StorageError:
            raise
        except Exception as error:
            if to_disk and (of_disk := disk_error_behind(error)):
                raise of_disk from None
            cause, lasting = _cause(error, address)
            now = time.monotonic()
            first = now if first is None else first
            if lasting or now + pause > first + patience:
                is_missing = lasting and isinstance(error, FileNotFoundError) and cause != NO_BUCKET_SAID
                kind = Missing if is_missing else StorageError if lasting else Unreachable
                tried = "" if lasting else f" for {now - first:.0f} s"
                raise kind(f"cannot {verb} {shown(address)}{tried}: {cause}.") from None
            if now > first + SILENT_FOR:
                store, what = "/".join(address.split("/")[:3]), cause.rpartition(": ")[0]
                _say_once(f"{shown(store)}: {what}; it is tried again for up to {patience:.0f} s")
        time.sleep(pause * random.uniform(0.5, 1.5))
        pause = min(2 * pause, LONGEST_PAUSE)


@functools.cache
def _say_once(sentence: str) -> None:
    """Print it, but not from every rank of a job and for every object."""
    if os.environ.get("RANK", "0") == "0":
        print(sentence, file=sys.stderr, flush=True)


def _chain(error: BaseException) -> list[BaseException]:
    """The error, and those that it comes from."""
    chain = [error]
    while following := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(following)
    return chain


def _answer(error: BaseException) -> tuple[str, str]:
    """(code, status) of the server's answer behind an error, each "" if there is none."""
    answers = [one.response for one in _chain(error) if isinstance(getattr(one, "response", None), dict)]
    if not answers:
        return "", ""
    found = answers[-1]
    return str(found.get("Error", {}).get("Code", "")), str(found.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))


def _cause(error: Exception, address: str) -> tuple[str, bool]:
    """(What has happened and what to do, in words that hold no credential, whether it will be the same next time)."""
    chain = _chain(error)
    kinds = [type(one).__name__ for one in chain]
    code, status = _answer(error)
    if code == NO_BUCKET:
        return NO_BUCKET_SAID, True
    if "ParamValidationError" in kinds or code == "InvalidBucketName":
        return "no bucket can have this name: correct the address, or the base_path of the profile", True
    if isinstance(error, FileNotFoundError):
        return "it is not there: correct the address, or upload it again", True
    if code in EXPIRED:
        _renew(address)
        return f"the credentials have expired ({code}): renew them", False
    if code in WRONG_CREDENTIALS:
        return f"the credentials are refused ({code}): correct them", True
    if isinstance(error, PermissionError):
        return f"no right to ({code or 'permission denied'}): correct the credentials or the rights on it", True
    if {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"} & set(kinds):
        ways = "gcloud auth application-default login" if address.startswith("gs") else "AWS_ACCESS_KEY_ID and others"
        return f"there are no credentials: set them in the environment ({ways}) or in multi-storage-client's file", True
    if {"ImportError", "ModuleNotFoundError"} & set(kinds):
        module = next((getattr(one, "name", None) or "" for one in chain if isinstance(one, ImportError)), "")
        extra = EXTRAS.get(module.partition(".")[0], "s3")
        return f"the package {module or 'for it'} is not installed: pip install 'molmo2-nemo[{extra}]'", True
    if isinstance(error, _Cut):
        return f"the answer was cut off ({error})", False
    if isinstance(error, (ValueError, KeyError, TypeError)) or "ValidationError" in kinds:
        profile = address.partition("://")[2].partition("/")[0]
        file = os.environ.get("MSC_CONFIG", "~/.msc_config.yaml")
        if "MSC_CONFIG" in os.environ and not os.path.isfile(file):
            return f"MSC_CONFIG={file} is no file: correct the variable", True
        if not address.lower().startswith("msc:"):  # which needs no profile
            return f"{file} (MSC_CONFIG) is no valid file of multi-storage-client: correct or remove it", True
        return f"multi-storage-client has no valid profile {profile} in {file} (MSC_CONFIG): correct the file", True
    if isinstance(error, OSError) and error.errno is not None and not is_remote(address):
        return f"{error.strerror}: correct the path or its rights", True
    what = {"EndpointConnectionError": "no connection to the server", "ConnectTimeoutError": "no answer in time"}
    names = [what.get(kind, kind) for kind in kinds if kind not in ("RetryableError", "RuntimeError")]
    said = names[0] if names else kinds[0]
    if status or code:
        said = f"the server answered {' '.join(str(part) for part in (status, code) if part)}"
    return f"{said}: see whether the storage can be reached, and start again", False
