"""Download one file over HTTP: checks of addresses, redirects, time and size limits, retries, and resuming."""

import asyncio
import contextlib
import email.utils
import ipaddress
import os
import random
import re
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

import aiohttp
import yarl
from pydantic import BaseModel, ConfigDict

from molmo2_nemo import __version__, files
from molmo2_nemo.fetch.rules import Rules
from molmo2_nemo.files import is_disk_error

USER_AGENT = f"molmo2-nemo/{__version__} (research data set download)"
# HTTP status codes after which a retry makes sense.
PASSING = {408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524}
FORBIDDEN = {401, 402, 403, 407}
# Bytes from which on an interrupted download is resumed; smaller files start from the beginning.
RESUMABLE_BYTES = 2**20
CHUNK = 2**18
LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class Lost(Exception):
    """The file cannot be downloaded. kind: "gone", "forbidden" and "content" are permanent, "later" is temporary."""

    def __init__(
        self, kind: str, reason: str, code: int | None = None, wait_too_long: bool = False, again: bool = True
    ):
        super().__init__(reason)
        self.kind, self.reason, self.code, self.wait_too_long = kind, reason, code, wait_too_long
        self.again = again and kind == "later"  # worth a retry within the minute


class Unreachable(Lost):
    """The server did not answer at all, so the fault may be in this machine's network."""

    def __init__(self, reason: str):
        super().__init__("later", reason)


class PrivateAddress(OSError):
    """A host's name stands for addresses of this machine or its network alone."""


class OutOfBytes(Exception):
    """--max-bytes is used up."""


class Busy(Exception):
    """The server asks to wait for `seconds` (Retry-After), and retries are left."""

    def __init__(self, seconds: float):
        super().__init__(f"asked to wait {seconds:.0f} s")
        self.seconds = seconds


def is_private(address: str) -> bool:
    """Whether an IP address belongs to this machine, its network, a cloud's metadata service, or to no single host."""
    ip = ipaddress.ip_address(address.split("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return not ip.is_global or ip.is_multicast


def trusted_hosts() -> set[str]:
    """Hosts that the user configured: proxies, and the endpoint of the Hub (HF_ENDPOINT)."""
    named = [os.environ.get("HF_ENDPOINT", ""), *urllib.request.getproxies().values()]
    return {host for url in named if (host := urllib.parse.urlsplit(url).hostname)}


def is_trusted(host: str, address: str | None = None) -> bool:
    """Whether the user configured this host. A Hub on this machine makes all of the machine's addresses trusted."""
    named = trusted_hosts()
    if host in named:
        return True
    return bool(named & LOOPBACK) and (host in LOOPBACK or (address or host).startswith("127."))


def check_address(url: str, rules: Rules) -> str:
    """Return an address that may be requested. Lost: it is not http(s), or its host is a private IP address."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise Lost("gone", "not an address") from None
    if parts.scheme.lower() not in ("http", "https") or not host:
        raise Lost("gone", f"an address of the type {parts.scheme or 'none'}:, only http and https are followed")
    if not rules.allow_private and not is_trusted(host) and (address := _numeric_address(host)) and is_private(address):
        raise Lost("gone", f"leads to the private address {host} (--allow-private follows it)")
    return url


def _numeric_address(host: str) -> str | None:
    """The IP address that a host is written as, in any form that sockets accept: 127.0.0.1, 127.1, 2130706433."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(host.split("%")[0]))
    with contextlib.suppress(OSError):
        return socket.inet_ntoa(socket.inet_aton(host)) if host.replace(".", "").isdigit() else None
    return None


class _Resolver(aiohttp.ThreadedResolver):
    """Resolves host names, and drops private addresses. PrivateAddress: no other is left."""

    def __init__(self, rules: Rules):
        super().__init__()
        self._rules = rules

    async def resolve(self, host, port=0, family=socket.AF_INET):
        found = await super().resolve(host, port, family)
        if self._rules.allow_private:
            return found
        public = [entry for entry in found if not is_private(entry["host"]) or is_trusted(host, entry["host"])]
        if not public:
            raise PrivateAddress(None, f"{host} is a private address (--allow-private follows it)")
        return public


def session(rules: Rules) -> aiohttp.ClientSession:
    """An HTTP session with these limits, for use inside a running event loop."""
    connector = aiohttp.TCPConnector(
        limit=rules.jobs, resolver=_Resolver(rules), ttl_dns_cache=600, family=socket.AF_UNSPEC
    )
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=True,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=rules.timeout),
        headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
    )


async def download(
    client: aiohttp.ClientSession,
    url: str,
    part: Path,
    rules: Rules,
    count: Callable[[int], None],
    accept: str = "*/*",
    wait: Callable | None = None,
) -> dict:
    """Download `url` to the file `part`, resuming it if the server can; return its content type and file name.

    `count` is called with the bytes of each piece; `wait`(seconds, whether the server asked for it) sleeps before a
    retry. Lost: it cannot be downloaded. OSError of the disk and OutOfBytes pass through; the next run resumes `part`.
    """
    lost = Lost("later", "not tried")
    for attempt in range(rules.tries):
        delay, asked = rules.backoff * 2**attempt * (1 + 0.2 * random.random()), False
        try:
            return await _once(client, url, part, rules, count, accept)
        except Busy as busy:
            too_long = busy.seconds > rules.max_wait
            lost = Lost("later", f"the server asks to wait {busy.seconds:.0f} s", 429, too_long)
            if too_long:
                raise lost from None
            delay, asked = max(delay, busy.seconds), True
        except Lost as error:
            lost = error
            if not error.again:
                raise
        except TimeoutError:
            lost = Unreachable(f"no answer in {rules.timeout:.0f} s")
        except aiohttp.InvalidURL as error:
            raise Lost("gone", "not an address") from error
        except (aiohttp.ClientError, OSError, ValueError, asyncio.IncompleteReadError) as error:
            if is_disk_error(error) and not isinstance(error, aiohttp.ClientError):
                raise
            if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, PrivateAddress):
                raise Lost("gone", " ".join(str(error).split())) from error
            text = " ".join(str(error).split())[:200] or type(error).__name__
            connected = isinstance(error, (aiohttp.ClientPayloadError, aiohttp.ClientResponseError))
            if isinstance(error, aiohttp.ClientPayloadError):
                text = "the body ended before its length"
            lost = Lost("later", text) if connected else Unreachable(text)
        if attempt + 1 < rules.tries:
            await (wait(delay, asked) if wait else asyncio.sleep(delay))
    raise lost


async def length_of(url: str, rules: Rules) -> int | None:
    """Bytes of a file, as its server says before it sends them; None: it does not say, or there is no such file."""
    try:
        async with session(rules) as client:
            response = await _open(client, url, {}, rules)
            response.close()
            return response.content_length if response.status == 200 else None
    except (Lost, TimeoutError, aiohttp.ClientError, OSError, ValueError):
        return None


async def _once(client, url: str, part: Path, rules: Rules, count, accept: str) -> dict:
    """One attempt of `download`."""
    have, known = _so_far(part)
    headers = {"Accept": accept}
    if have:
        headers["Range"] = f"bytes={have}-"
        if known.validator:
            headers["If-Range"] = known.validator
    response = await _open(client, url, headers, rules)
    try:
        status = response.status
        if status == 416 and have:
            _forget(part)
            raise Lost("later", "the rest of the file is not there", status)
        if status in PASSING:
            seconds = retry_after(response.headers.get("Retry-After"))
            if seconds is not None:
                raise Busy(seconds)
            raise Lost("later", f"status {status}", status)
        if status in FORBIDDEN:
            raise Lost("forbidden", f"status {status}", status)
        if status not in (200, 206):
            raise Lost("gone", f"status {status}", status)
        if response.headers.get("Content-Encoding", "identity").lower() not in ("identity", ""):
            raise Lost("content", f"compressed as {response.headers['Content-Encoding'][:40]}, which was not asked for")
        length = response.content_length
        total = None if length is None else length
        if status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            whole = int(match[2]) if match and match[2] != "*" else None
            validator = known.validator
            now = (response.headers.get("ETag"), response.headers.get("Last-Modified"))
            changed = validator is not None and any(now) and validator not in now
            if not have or not match or int(match[1]) != have or whole != known.total or changed:
                _forget(part)
                raise Lost("later", "the server sent another part of the file than was asked for")
            total = whole
        else:
            have = 0
        if (total or 0) > rules.max_file_bytes:
            raise Lost("content", f"a file of {total:,} bytes, more than {rules.max_file_bytes:,}")
        part.parent.mkdir(parents=True, exist_ok=True)
        if status == 200:
            _forget(part)
            if total and total >= RESUMABLE_BYTES:
                validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
                validator = None if validator is None or validator.startswith("W/") else validator
                _notes(part).write_text(PartialFile(total=total, validator=validator).model_dump_json())
        with part.open("ab" if status == 206 else "wb") as file:
            got = have + await _copy(response, file, have, rules, count)
        if total is not None and got != total:
            raise Lost("later", f"{got:,} bytes came, {total:,} were promised")
        return {
            "type": response.headers.get("Content-Type", "").split(";")[0].strip().lower(),
            "file_name": _file_name(response.headers.get("Content-Disposition", "")),
        }
    finally:
        response.close()


async def _open(client, url: str, headers: dict, rules: Rules) -> aiohttp.ClientResponse:
    """The response after all redirects, each of which is checked."""
    url = url.strip()
    for _ in range(rules.max_redirects + 1):
        check_address(url, rules)
        try:
            # Unchanged, so that signed addresses stay valid.
            asked = yarl.URL(url, encoded=url.isascii() and url.isprintable() and " " not in url)
            (asked.host or "").encode("idna")
        except ValueError:
            raise Lost("gone", "not an address") from None
        check_address(str(asked), rules)
        async with asyncio.timeout(rules.timeout):
            response = await client.get(asked, headers=headers, allow_redirects=False)
        if response.status not in (301, 302, 303, 307, 308):
            return response
        target = response.headers.get("Location", "")
        response.close()
        if not target:
            raise Lost("gone", f"status {response.status} without a Location header", response.status)
        try:
            url = urllib.parse.urljoin(str(response.url), target)
        except ValueError:
            raise Lost("gone", "redirected to something that is not an address", response.status) from None
    raise Lost("gone", f"more than {rules.max_redirects} redirects")


async def _copy(response, file, have: int, rules: Rules, count) -> int:
    """Write the body to a file and return its bytes. Lost: it is too slow, takes too long, or is too large."""
    got = in_window = 0
    loop = asyncio.get_running_loop()
    window_ends, ends = loop.time() + rules.timeout, loop.time() + rules.max_seconds
    while True:
        chunk = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(window_ends):
                chunk = await response.content.read(CHUNK)
        if chunk == b"":
            return got
        if chunk:
            got, in_window = got + len(chunk), in_window + len(chunk)
            if have + got > rules.max_file_bytes:
                raise Lost("content", f"more than {rules.max_file_bytes:,} bytes")
            count(len(chunk))
            file.write(chunk)
        if loop.time() >= window_ends:
            if in_window < rules.min_rate * rules.timeout:
                raise Lost("later", f"slower than {rules.min_rate:.0f} bytes/s for {rules.timeout:.0f} s", again=False)
            in_window, window_ends = 0, loop.time() + rules.timeout
            if loop.time() >= ends:
                raise Lost("later", f"not complete after {rules.max_seconds:.0f} s", again=False)


def _notes(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


class PartialFile(BaseModel):
    """What is noted beside a large file that has come in part."""

    model_config = ConfigDict(strict=True)

    total: int = 0  # bytes of the whole file
    validator: str | None = None  # ETag or Last-Modified, with which a server says that the file is still the same


def _so_far(part: Path) -> tuple[int, PartialFile]:
    """Bytes of a part that may be continued, and what is known of the whole; 0 bytes: start anew."""
    try:
        known = PartialFile.model_validate_json(_notes(part).read_bytes())
        have = part.stat().st_size
        return (have, known) if 0 < have < known.total else (0, PartialFile())
    except (OSError, ValueError):
        return 0, PartialFile()


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _notes(part).unlink(missing_ok=True)


def publish(part: Path, path: Path) -> None:
    """Give a complete and checked part its final name. Small files are not flushed: they are checked again anyway."""
    files.publish(part, path, durable=part.stat().st_size >= RESUMABLE_BYTES)
    _notes(part).unlink(missing_ok=True)


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None: it is neither."""
    if not value:
        return None
    if value.strip().isdecimal() and value.isascii():
        return float(value[:12])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _file_name(disposition: str) -> str | None:
    match = re.search(r'filename="?([^";]+)"?', disposition)
    return os.path.basename(match[1].replace("\\", "/")) if match else None
