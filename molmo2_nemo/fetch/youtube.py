"""Videos by their YouTube ids, through yt-dlp, which only the user installs."""

import re
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from molmo2_nemo.fetch.journal import Journal
from molmo2_nemo.fetch.media_check import BadContent, check_video
from molmo2_nemo.fetch.url_list import DAYS, DownloadProgress

YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")
# What yt-dlp says of a video that does not come back.
GONE = re.compile(
    "unavailable|private video|removed|terminated|not available|does not exist|members-only|copyright|confirm your age",
    re.IGNORECASE,
)


def fetch_videos(
    ids: set[str], media: Path, add_bytes: Callable[[int], None], progress: DownloadProgress, retry_lost: bool = False
) -> dict[str, int]:
    """Get media/ID.mp4 of each id; counts: videos, fetched, lost, and later, of those that may come another time.

    What is no id is left out. A video that is gone is not asked for again before its date in media/lost.jsonl.
    """
    wanted, today = {video for video in ids if YOUTUBE_ID.fullmatch(video)}, datetime.now(UTC).date()
    lost = Journal(media / "lost.jsonl", "url")
    progress.start(len(wanted), 0)
    for video in sorted(wanted):
        due = video not in lost.records or lost.records[video]["not_before"] <= today.isoformat()
        if not (media / f"{video}.mp4").is_file() and (due or retry_lost):
            try:
                add_bytes(_get(video, media))
                lost.remove(video)
            except _Lost as error:
                day = today + timedelta(days=DAYS.get(error.kind, 0))
                lost.append(
                    {
                        "url": video,
                        "kind": error.kind,
                        "reason": str(error),
                        "code": None,
                        "runs": 1,
                        "not_before": day.isoformat(),
                    }
                )
        progress.add_files(1)
    lost.close()
    there = sum((media / f"{video}.mp4").is_file() for video in wanted)
    later = sum(lost.records[video]["kind"] == "later" for video in wanted if video in lost.records)
    return {"videos": len(wanted), "fetched": there, "lost": len(wanted) - there} | ({"later": later} if later else {})


class _Lost(Exception):
    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


def _get(video: str, media: Path) -> int:
    """Its bytes, checked and under their name; their number. _Lost: there are none."""
    part = media / ".part" / video
    part.mkdir(parents=True, exist_ok=True)
    command = [
        "yt-dlp",
        "--quiet",
        "--no-playlist",
        "--no-exec",
        "--ignore-config",
        "--format",
        "best[ext=mp4][height<=720]/best[ext=mp4]",
        "--socket-timeout",
        "30",
        "--output",
        str(part / "video.mp4"),
        "--",
        f"https://www.youtube.com/watch?v={video}",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    try:
        if ended.returncode != 0 or not (part / "video.mp4").is_file():
            reason = (ended.stderr.strip().splitlines() or ["no file"])[-1][:200]
            # Anything else may pass: no network, too many requests, an old yt-dlp.
            raise _Lost("gone" if GONE.search(reason) else "later", reason)
        check_video(part / "video.mp4")
        size = (part / "video.mp4").stat().st_size
        (part / "video.mp4").replace(media / f"{video}.mp4")
        return size
    except BadContent as error:
        raise _Lost("content", str(error)) from error
    finally:
        shutil.rmtree(part)
