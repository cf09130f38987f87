"""OpenStack Swift with its S3 interface, as Debian packages it, in a folder and on free ports of 127.0.0.1."""

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from molmo2_nemo.config.errors import ConfigError

PACKAGES = ("swift", "swift-proxy", "swift-account", "swift-container", "swift-object")
# Account and user of Swift's tempauth; the access key of S3 is both.
ACCOUNT, USER = "check", "tester"
# Objects that it lists at once.
LISTED_AT_ONCE = 100
SECONDS_TO_START = 60
PROXY = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
user = {user}
workers = 2

[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache listing_formats s3api tempauth copy slo dlo versioned_writes
    proxy-server

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true

[filter:tempauth]
use = egg:swift#tempauth
user_{account}_{name} = {secret} .admin

[filter:s3api]
use = egg:swift#s3api
location = us-east-1
max_bucket_listing = {at_once}

[filter:catch_errors]
use = egg:swift#catch_errors

[filter:gatekeeper]
use = egg:swift#gatekeeper

[filter:healthcheck]
use = egg:swift#healthcheck

# tempauth wants one; that there is no server at the address only means that nothing is remembered.
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:1

[filter:listing_formats]
use = egg:swift#listing_formats

[filter:versioned_writes]
use = egg:swift#versioned_writes

[filter:copy]
use = egg:swift#copy

[filter:slo]
use = egg:swift#slo

[filter:dlo]
use = egg:swift#dlo
"""
STORE = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
devices = {folder}/devices
mount_check = false
swift_dir = {folder}
user = {user}
workers = 1

[pipeline:main]
pipeline = {kind}-server

[app:{kind}-server]
use = egg:swift#{kind}

[object-updater]
interval = 5
recon_cache_path = {folder}/recon
"""


@contextlib.contextmanager
def swift(folder: Path) -> Iterator[tuple[str, str, str, str]]:
    """Address, access key, secret key and version of a server that keeps its objects below `folder`, without a bucket.

    The servers' logs are in `folder`, and they end with the context. ConfigError: what is missing.
    """
    check(folder)
    secret, ports = secrets.token_hex(16), _free_ports(4)
    for name in ("devices/disk", "recon"):
        (folder / name).mkdir(parents=True)
    common = {"folder": folder, "user": pwd.getpwuid(os.getuid()).pw_name}
    for kind, port in zip(("account", "container", "object"), ports[1:]):
        (folder / f"{kind}.conf").write_text(STORE.format(kind=kind, port=port, **common))
        builder = ["swift-ring-builder", str(folder / f"{kind}.builder")]
        for what in (["create", "4", "1", "0"], ["add", f"r1z1-127.0.0.1:{port}/disk", "1"], ["rebalance"]):
            subprocess.run([*builder, *what], check=True, capture_output=True)
    keys = {"account": ACCOUNT, "name": USER, "secret": secret}
    (folder / "proxy.conf").touch(0o600)
    (folder / "proxy.conf").write_text(PROXY.format(port=ports[0], at_once=LISTED_AT_ONCE, **keys, **common))
    with contextlib.ExitStack() as stack:
        for program in ("account-server", "container-server", "object-server", "object-updater", "proxy-server"):
            stack.enter_context(_running(program, folder))
        _wait_for(f"http://127.0.0.1:{ports[0]}/healthcheck", folder)
        yield f"http://127.0.0.1:{ports[0]}", f"{ACCOUNT}:{USER}", secret, version()


def check(folder: Path) -> None:
    """ConfigError: Swift is not installed, or cannot keep its objects in this folder."""
    programs = ("swift-ring-builder", "swift-proxy-server", *(f"swift-{kind}-server" for kind in ("account", "object")))
    if not all(map(shutil.which, programs)):
        raise ConfigError(
            f"Swift is not installed: apt-get install --no-install-recommends {' '.join(PACKAGES)} (Debian, Ubuntu; no "
            "service of them needs to run), or name a storage of yours with --at."
        )
    probe = folder / "probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.swift.probe", b"x")
    except OSError as error:
        raise ConfigError(
            f"{folder} takes no extended attributes ({error.strerror}), which Swift needs: set TMPDIR to a folder on "
            "ext4 or XFS."
        ) from None
    finally:
        probe.unlink()


def version() -> str:
    asked = subprocess.run(["dpkg-query", "-Wf", "${Version}", "swift"], capture_output=True, text=True)
    return f"OpenStack Swift {asked.stdout or 'of an unknown version'}"


@contextlib.contextmanager
def _running(program: str, folder: Path) -> Iterator[None]:
    """One of the servers, in a process group of its own, which it ends itself; also if this process is killed."""
    command = ["setpriv", "--pdeathsig", "TERM", f"swift-{program}", str(folder / f"{program.split('-')[0]}.conf")]
    with (folder / f"{program}.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--verbose"], stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(address: str, folder: Path) -> None:
    until = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < until:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.3)
    log = (folder / "proxy-server.log").read_text(errors="replace").strip()
    raise ConfigError(f"Swift has not started within {SECONDS_TO_START} s: {log[-500:]}")


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]
