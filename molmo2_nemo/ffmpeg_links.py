"""Links to the FFmpeg libraries inside PyAV, under the names by which torchcodec looks for them.

transformers decodes {"type": "video", "path": ...} by torchcodec, which brings no FFmpeg and loads that of the system.
Where the system has none, PyAV's serves: its wheel holds a whole one, under names of its own. tools/setup.sh makes the
links in .venv/lib/ffmpeg; a program finds them if LD_LIBRARY_PATH names that folder as it starts.

    python -m molmo2_nemo.ffmpeg_links FOLDER
"""

import re
import sys
from importlib.util import find_spec
from pathlib import Path


def make_links(folder: Path) -> Path:
    """Fill the folder with links; returns it. Nothing where PyAV was built on libraries of the system."""
    folder.mkdir(parents=True, exist_ok=True)
    # auditwheel puts the libraries beside the package, as libavcodec-d61378e8.so.63.1.102.
    for library in (Path(find_spec("av").origin).parent.parent / "av.libs").glob("*.so*"):
        names = {library.name}
        if found := re.fullmatch(r"(lib(?:av|sw)\w+)-\w+(\.so\.\d+)\..*", library.name):
            names.add(found[1] + found[2])
        for name in names:
            link = folder / name
            link.unlink(missing_ok=True)
            link.symlink_to(library)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m molmo2_nemo.ffmpeg_links FOLDER")
    print(make_links(Path(sys.argv[1])))
