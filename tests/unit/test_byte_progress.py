"""Lines on how far a transfer is."""

from molmo2_nemo.byte_progress import ByteProgress


def test_lines_come_at_the_start_now_and_then_and_at_the_end():
    lines = []
    progress = ByteProgress(4096, lines.append, "fetching x", seconds=1000)
    progress.add(1024)
    progress.add(1024)
    assert lines == ["fetching x: 4.0 KiB"]
    progress.add(2048, "the last")
    assert len(lines) == 2 and lines[1].startswith("fetching x: 4.0 KiB of 4.0 KiB, ")
    assert lines[1].endswith("/s, 0 s left (the last)")
    often = []
    progress = ByteProgress(4096, often.append, seconds=0)
    assert not often
    progress.add(1024)
    assert len(often) == 1 and often[0].startswith("1.0 KiB of 4.0 KiB, ")
