"""Measure how many bytes photographs have after `tools/download.py fetch --max-side`; molmo2_nemo/catalogue/resized.py
holds the result.

    python tools/check/resized_bytes.py

The photographs come with scikit-image and scikit-learn; none is downloaded. As published pictures are JPEG files, they
are first saved as such, of quality 90.
"""

import argparse
import io
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

from PIL import Image

from molmo2_nemo.catalogue.resized import smaller

PHOTOGRAPHS = {
    "skimage": ["astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg"],
    "sklearn": ["china.jpg", "flower.jpg"],
    "matplotlib": ["grace_hopper.jpg"],
}
FOLDERS = {"skimage": "data", "sklearn": "datasets/images", "matplotlib": "mpl-data/sample_data"}
SCALES = (0.75, 0.625, 0.5, 0.375, 0.25)


def published(path: Path) -> bytes:
    """The photograph as a JPEG file of quality 90."""
    file = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(file, "JPEG", quality=90)
    return file.getvalue()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pixel_bytes, areas, left = [], [], {scale: [] for scale in SCALES}
    for package, names in PHOTOGRAPHS.items():
        folder = Path(find_spec(package).origin).parent / FOLDERS[package]
        for name in names:
            data = published(folder / name)
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
            pixel_bytes.append(len(data) / (width * height))
            areas.append(width * height / max(width, height) ** 2)
            for scale in SCALES:
                left[scale].append(len(smaller(data, round(scale * max(width, height)))) / len(data))
            shares = "  ".join(f"{left[scale][-1]:.3f}" for scale in SCALES)
            print(f"{name:<22}{width:>5} x {height:<5}{len(data):>8,} bytes  {shares}")
    print(f"\nPIXEL_BYTES, AREA = {mean(pixel_bytes):.3f}, {mean(areas):.3f}")
    print(f"LEFT = {{1.0: 1.0, {', '.join(f'{scale}: {mean(left[scale]):.3f}' for scale in SCALES)}}}")


if __name__ == "__main__":
    main()
