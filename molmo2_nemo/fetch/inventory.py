"""Which data sets there are, which are on the disk, what is missing or broken, and how to fix it.

This module only reads.
"""

import importlib.util
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from molmo2_nemo.catalogue.commands import download_command
from molmo2_nemo.catalogue.datasets import DataSet
from molmo2_nemo.catalogue.raw import read_note
from molmo2_nemo.fetch.hub import page, pinned
from molmo2_nemo.fetch.on_disk import NEWER, broken_files, fault, glance, lacking, lacks_by_hand, missing_layout
from molmo2_nemo.limits import MAX_DROPPED

GB = 10**9
# Bytes above which `doctor` does not read annotation files that the user provided.
READ_BYTES = 10**8


@dataclass(frozen=True)
class ListedSet:
    """A data set's row in `list`."""

    name: str
    stages: list[int]
    category: str
    modality: str
    kind: str  # annotations / media
    examples: int | None
    size_gb: float | None  # None: not known
    license: str | None
    terms: str | None
    gated: bool | None
    source: str  # open | gated | form | moved | dead | unknown
    source_page: str | None  # where to agree, to register, or where it has moved to
    source_date: str | None  # of the evidence
    license_page: str | None  # where the licence is named, or would be
    released_rows: int | None
    count_differs: str | None  # where the release and the first list of stages have unlike numbers
    layout: str  # verified: the entry was compared with what is published | unverified | own
    by_hand: bool
    state: str
    bytes_on_disk: int
    page: str | None


@dataclass(frozen=True)
class Problem:
    """Something that `doctor` found, and the command that fixes it."""

    name: str
    what: str
    fix: str  # a command


def state_of(entry: DataSet, root: Path) -> str:
    """State of a data set on the disk: complete | damaged | changed | sample | useless | part | by hand | refused | -.

    damaged: files of a complete set are missing or have another size. changed: some are newer than its fetch. Contents
    are not read: `doctor` with `deep` does.
    """
    folder = root / "raw" / entry.name
    if entry.unsure:
        return "refused"
    info = read_note(root, entry.name)
    if info is None:
        return "part" if any((folder / name).exists() for name in ("files.jsonl", "media", "hub")) else "-"
    if info.get("complete") and (wrong := _wrong_at_a_glance(folder, info)):
        return wrong
    if info.get("works") is False:
        return "useless"
    if info.get("complete"):
        return "by hand" if lacks_by_hand(entry, folder, info) else "complete"
    if info.get("stopped"):
        return "part"
    if info.get("waiting"):
        return "by hand" if entry.by_hand else "part"
    return "sample" if info.get("limit") is not None else "part"


def _wrong_at_a_glance(folder: Path, info: dict) -> str | None:
    try:
        found = glance(folder, info)
    except OSError:  # a file, or its folder, cannot be read
        return "damaged"
    return None if found is None else "changed" if found[1] == NEWER else "damaged"


def media_lacking(entry: DataSet, info: dict) -> bool:
    """Whether more annotations than a set may lose had no pictures or video on disk after the fetch.

    That many videos of YouTube are gone is expected.
    """
    searched = info.get("searched") or 0
    lacking = searched - (info.get("found") or 0)
    return entry.media.kind != "youtube-ids" and lacking > MAX_DROPPED * searched


def page_of(entry: DataSet) -> str | None:
    return entry.source.page or (page(entry.source.hf.repo) if entry.source.hf else None) or entry.media.page


def layout_of(entry: DataSet) -> str:
    """Whether somebody has compared the entry with what is published; what is `own`, the user knows."""
    return "verified" if entry.layout_evidence else "own" if entry.category == "own" else "unverified"


def listed(entries: list[DataSet], root: Path) -> list[ListedSet]:
    rows = []
    for entry in entries:
        info, found = read_note(root, entry.name) or {}, entry.source_state
        rows.append(
            ListedSet(
                entry.name,
                list(entry.stages),
                entry.category,
                entry.modality,
                f"{entry.source.kind}/{entry.media.kind}",
                entry.examples,
                entry.disk_gb or entry.size_gb,
                info.get("license") or entry.license or ("unknown" if entry.license_page else None),
                entry.terms,
                entry.gated,
                found.state if found else "unknown",
                found.page if found else None,
                str(found.date) if found else None,
                entry.license_page,
                entry.counts.get("released_rows"),
                entry.count_differs,
                layout_of(entry),
                entry.by_hand,
                state_of(entry, root),
                info.get("bytes") or 0,
                page_of(entry),
            )
        )
    return rows


def with_license(entries: list[DataSet], allowed: list[str], root: Path) -> list[DataSet]:
    """Entries under one of the licences, by name or by its beginning ("cc-by" has "cc-by-4.0", not "cc-by-nc-4.0").

    A data set of unknown licence is left out.
    """

    def fits(license: str | None) -> bool:
        parts = [part.strip().lower() for part in (license or "").split(",") if part.strip()]
        return bool(parts) and all(any(_same_license(part, one.lower()) for one in allowed) for part in parts)

    return [e for e in entries if fits(e.license or (read_note(root, e.name) or {}).get("license"))]


def _same_license(license: str, wanted: str) -> bool:
    rest = license.removeprefix(f"{wanted}-") if license.startswith(f"{wanted}-") else None
    return license == wanted or (rest is not None and rest.replace(".", "").isdigit())


def doctor(entries: list[DataSet], root: Path, deep: bool = False) -> Iterator[Problem]:
    """What is broken or missing of the data sets that are there, complete or in part.

    deep: read every byte.
    """
    for package, fix in (("pyarrow", "pip install pyarrow"), ("aiohttp", "pip install aiohttp")):
        if importlib.util.find_spec(package) is None:
            yield Problem("-", f"the package {package} is missing, which reading parquet or downloading needs", fix)
    trouble = root_trouble(root)
    if trouble:
        yield trouble
        if not os.access(root / "raw", os.R_OK | os.X_OK):
            return
    free = _free(root)
    if free is not None and free < 2 * GB:
        yield Problem("-", f"only {free / GB:.1f} GB are free under {root}", "export DATA_ROOT=/a/larger/disk")
    for entry in entries:
        try:
            yield from _of_set(entry, root, deep)
        except OSError as error:
            path = Path(error.filename or root / "raw" / entry.name)
            what = f"{path} cannot be read ({error.strerror or error})"
            folder = root / "raw" / entry.name
            yield Problem(entry.name, what, _own(folder) if isinstance(error, PermissionError) else _move_away(path))


def root_trouble(root: Path) -> Problem | None:
    """Why nothing can be fetched to this root; None: something can."""
    there = shlex.quote(str(root))
    for path, what in ((root, "the data root"), (root / "raw", "the folder of raw data")):
        if path.is_symlink() and not path.exists():
            aim = root / os.readlink(path) if path != root else path.parent / os.readlink(path)
            fix = f"mkdir -p {shlex.quote(str(aim))}"
            return Problem("-", f"{what} {path} is a link to {aim}, which does not exist", fix)
        if path.exists() and not path.is_dir():
            return Problem("-", f"{what} {path} is a file", f"mv {shlex.quote(str(path))} {shlex.quote(f'{path}.old')}")
        if path.is_dir() and not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            if os.statvfs(path).f_flag & os.ST_RDONLY:
                said = f"{what} {path} is on a read-only disk"
                return Problem("-", said, "export DATA_ROOT=/another/disk")
            return Problem("-", f"{what} {path} is not writable by you", _own(path))
    if not root.exists():
        return Problem("-", f"the data root {root} (--root, or DATA_ROOT) does not exist", f"mkdir -p {there}")
    return None


def _own(path: Path) -> str:
    """A command that gives a folder to the user."""
    there = shlex.quote(str(path))
    fix = f"chmod -R u+rwX {there}"
    return fix if path.stat().st_uid == os.getuid() else f"sudo chown -R $(id -u) {there} && {fix}"


def _command(verb: str, entry: DataSet, root: Path) -> str:
    return download_command(verb, entry.name, root=root, catalogue=entry.catalogue)


def _move_away(path: Path) -> str:
    return f"mv {shlex.quote(str(path))} {shlex.quote(f'{path}.old')}"


def _of_set(entry: DataSet, root: Path, deep: bool) -> Iterator[Problem]:
    """Problems of one set. OSError: something of it cannot be read."""
    folder = root / "raw" / entry.name
    fetch, how, verify = (_command(verb, entry, root) for verb in ("fetch", "how", "verify"))
    if not folder.is_dir():
        if folder.is_symlink() or folder.exists():
            yield Problem(entry.name, f"{folder} is not a folder but a file or a broken link", _move_away(folder))
        return
    if not os.access(folder, os.R_OK | os.X_OK):
        raise PermissionError(13, "no right to read", str(folder))
    if not os.access(folder, os.W_OK) and os.access(root / "raw", os.W_OK):
        yield Problem(entry.name, f"{folder} is not writable by you", _own(folder))
    if entry.unsure:
        if any(folder.iterdir()):
            yield Problem(entry.name, f"is not fetched: {entry.unsure}", _move_away(folder))
        return
    manual = folder / "manual"
    if manual.is_symlink() | manual.exists() and not manual.is_dir():
        yield Problem(entry.name, f"{manual} is not a folder but a file or a broken link", _move_away(manual))
        return
    info = read_note(root, entry.name)
    if info is None:
        if any(path.name not in ("manual", ".lock") for path in folder.iterdir()):
            noted = (folder / "fetched.json").exists()
            what = "its fetched.json cannot be read" if noted else "was started and is not complete"
            broken = next(broken_files(folder, deep), None)
            yield Problem(entry.name, what, f"{fetch} --verify" if broken else fetch)
        elif (folder / "manual").is_dir():
            if missing := missing_layout(entry, folder):
                yield Problem(entry.name, f"manual/ lacks {', '.join(missing)}", how)
            else:
                yield Problem(entry.name, "is in manual/ and not yet registered", fetch)
            yield from _bad_manual(entry, folder, how)
        return
    faults = list(_bad_manual(entry, folder, how))
    stopped = info.get("stopped")
    broken = [*([] if stopped else lacking(folder, info)), *broken_files(folder, deep)]
    for name, what in broken[:5]:
        yield Problem(entry.name, f"{name} {what}", f"{fetch} --verify")
    if len(broken) > 5:
        yield Problem(entry.name, f"{len(broken) - 5} more files are missing or changed", f"{fetch} --verify")
    missing = lacks_by_hand(entry, folder, info)
    if stopped:
        yield Problem(entry.name, f"is not complete: {stopped}", f"{fetch} --verify" if broken else fetch)
    elif missing:
        yield Problem(entry.name, f"manual/ lacks {', '.join(missing)}", how)
    elif info.get("waiting") and not faults:
        yield Problem(entry.name, "; ".join(info["waiting"]), fetch)
    elif info.get("limit") is not None:
        yield Problem(entry.name, f"is a sample of {info['limit']:,} rows", fetch)
    if info.get("works") is False and not broken:
        yield Problem(entry.name, f"no sample can be made of it: {info.get('useless')}", how)
    if media_lacking(entry, info) and not broken:
        what = (
            f"{info['searched'] - info['found']:,} of {info['searched']:,} annotations looked at have no media on disk"
        )
        yield Problem(entry.name, what, verify)
    revision = entry.source.hf and (entry.source.hf.revision or pinned(root, entry.source.hf.repo))
    if entry.source.hf and info.get("revision") and revision != info["revision"]:
        now = f"{revision[:12]} is pinned" if revision else "none is pinned any more"
        yield Problem(entry.name, f"is of the commit {info['revision'][:12]}, {now}", fetch)
    if info.get("held_out") == "not checked":
        what = "the list of held-out pictures was not on the Hub; pictures of evaluations may be among its own"
        yield Problem(entry.name, what, f"{fetch} --retry-lost")
    media = info.get("media") or {}
    if media.get("later") and not info.get("waiting"):
        yield Problem(entry.name, f"{media['later']:,} addresses gave no file in time", fetch)
    yield from faults


def _bad_manual(entry: DataSet, folder: Path, how: str) -> Iterator[Problem]:
    """Files provided by the user that are empty, broken, or web pages."""
    shown = 0
    for pattern in entry.layout:
        for path in (folder / "manual").glob(pattern):
            if path.is_file() and shown < 5 and (what := fault(path, read=path.stat().st_size < READ_BYTES)):
                shown += 1
                yield Problem(entry.name, f"{path.relative_to(folder)} is {what}", how)


def how(entry: DataSet, root: Path, of_media: DataSet | None = None) -> str:
    """A data set's page: where it comes from, what is downloaded, what the user must provide, and where to put it.

    of_media: the entry that media_of names.
    """
    source, media, folder = entry.source, entry.media, root / "raw" / entry.name
    fetch = _command("fetch", entry, root)
    lines = [f"# {entry.name}", ""]
    lines += [
        f"{key}: {value}"
        for key, value in (
            ("Tasks", ", ".join(entry.task)),
            ("Stages", ", ".join(map(str, entry.stages))),
            ("Examples", f"{entry.examples:,}" if entry.examples else ""),
            ("Counts", entry.count_differs),
            ("Licence", _license(entry)),
            ("Terms", entry.terms),
            ("Account or form needed", {True: "yes", False: "no", None: "not known"}[entry.gated]),
            ("Source", _source(entry)),
            ("Page", page_of(entry)),
            ("Layout", _evidence(entry)),
            ("Note", entry.note),
        )
        if value
    ]
    lines += ["", "## Annotations", ""]
    if entry.unsure:
        lines += [f"Not fetched: {entry.unsure}."]
    elif source.kind == "hf":
        lines += [f"`{fetch}` gets them from {page(source.hf.repo)}."]
    elif source.kind == "url":
        lines += [
            f"`{fetch}` gets them from:",
            *(f"- {url}" for url in source.urls),
        ]
    else:
        lines += [f"By hand, from {source.page}: {source.instructions}."]
    lines += ["", "## Media", ""]
    lines += [f"{media.kind}: {media.detail or ''}".rstrip(": ")]
    if media.page:
        lines += [f"Page: {media.page}"]
    lines += [f"- {url}" for url in media.urls]
    if media.kind == "youtube-ids":
        lines += [
            "",
            "Where yt-dlp is installed, fetch gets the videos that are still there; it is not installed for you.",
        ]
    if entry.layout:
        lines += [
            "",
            "## What goes where",
            "",
            f"Unpack into {folder / 'manual'} so that each of these matches a file:",
            "",
        ]
        lines += [f"    manual/{pattern}" for pattern in entry.layout]
        if of_media:
            there = "manual" if of_media.by_hand else "extracted"
            lines += [
                "",
                f"They are among those of {of_media.name}. Once these are there, a link will do:",
                "",
                f"    ln -s ../{of_media.name}/{there} {folder / 'manual'}",
            ]
        lines += [
            "",
            f"Then `{fetch}` registers it, and `{_command('doctor', entry, root)}` checks it.",
        ]
    return "\n".join(lines) + "\n"


def _license(entry: DataSet) -> str:
    if entry.license:
        return f"{entry.license}{f' ({entry.license_page})' if entry.license_page else ''}"
    return (
        f"unknown: none was found, look at {entry.license_page}" if entry.license_page else "not known: read its page"
    )


def _source(entry: DataSet) -> str:
    found = entry.source_state
    if found is None:
        return "nobody has looked whether it can be had"
    words = {
        "open": "open",
        "gated": f"gated: agree on {found.page}",
        "form": f"a form or an account: {found.page}",
        "moved": f"moved to {found.page}",
        "dead": "reported dead",
        "unknown": "unknown",
    }[found.state]
    note = f"; {found.note}" if found.note else ""
    return f"{words} ({found.evidence}, {found.date}){note}"


def _evidence(entry: DataSet) -> str:
    evidence = entry.layout_evidence
    if evidence is None:
        return "" if layout_of(entry) == "own" else "unverified: nobody has compared this entry with what is published"
    return f"as in {evidence.file} of {evidence.repository} ({evidence.revision or evidence.date})"


def as_json(rows: list) -> str:
    return json.dumps([asdict(row) for row in rows], indent=1)


def _free(root: Path) -> int | None:
    path = root
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def free_bytes(root: Path) -> int:
    return _free(Path(os.path.abspath(root))) or 0
