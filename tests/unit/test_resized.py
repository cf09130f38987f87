"""Pictures that are made smaller when they arrive: their points are those of the published picture, to the pixel."""

import hashlib
import io

import numpy as np
import pytest
import yaml
from fetch_servers import Hub, Media, Repo
from PIL import Image
from published_sets import RULES, picture, rows_file

from molmo2_nemo.catalogue import resized
from molmo2_nemo.catalogue.datasets import load_catalogue
from molmo2_nemo.catalogue.raw import RawSource
from molmo2_nemo.data.pictures import read_image
from molmo2_nemo.fetch.data_set import FetchOptions, Meter, fetch_set
from molmo2_nemo.fetch.journal import Journal
from molmo2_nemo.fetch.url_list import DownloadProgress
from molmo2_nemo.prepare.draft_to_sample import pack
from molmo2_nemo.prepare.spool import converted

# Width, height and the centre of the yellow square, in pixels of the picture as it is displayed.
PICTURES = {
    "upright": ((1200, 900), (900, 200)),
    "turned": ((900, 1200), (200, 1000)),  # stored on its side, with an EXIF orientation
    "small": ((300, 200), (40, 150)),
}


def jpeg(name: str) -> bytes:
    (size, centre), file, exif = PICTURES[name], io.BytesIO(), Image.Exif()
    # A little noise: a picture of one colour would not become smaller.
    noise = np.random.default_rng(0).integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
    shown = np.asarray(picture(size, [])) + noise
    x, y = centre
    shown[y - 20 : y + 21, x - 20 : x + 21] = (255, 255, 0)
    image = Image.fromarray(shown)
    if name == "turned":
        image, exif[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6
    image.save(file, "JPEG", quality=90, exif=exif)
    return file.getvalue()


def centre_of_square(pixels: np.ndarray) -> tuple[float, float]:
    """The centre of the yellow square, in fractions of the width and of the height."""
    red, green, blue = np.moveaxis(pixels.astype(int), 2, 0)
    rows, columns = np.nonzero((red > 200) & (green > 200) & (blue < 100))
    return (columns.mean() + 0.5) / pixels.shape[1], (rows.mean() + 0.5) / pixels.shape[0]


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """Fetch a set whose points are in pixels; returns its server and a function that fetches."""
    with Hub({}) as hub, Media() as media:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        media.files = {f"/{name}.jpg": jpeg(name) for name in PICTURES}
        rows = [
            {
                "image_url": f"{media.url}/{name}.jpg",
                "sha": hashlib.sha256(media.files[f"/{name}.jpg"]).hexdigest(),
                "label": "square",
                "points": [dict(zip("xy", centre))],
            }
            for name, (_, centre) in PICTURES.items()
        ]
        hub.repos["me/mine"] = Repo({"data/train.parquet": rows_file(rows, ".parquet")})
        entry = {
            "name": "mine",
            "source": {"kind": "hf", "hf": {"repo": "me/mine", "split": "train"}},
            "media": {"kind": "url-list", "columns": ["image_url"], "sha256": "sha"},
            "fields": dict.fromkeys(rows[0], "as it says"),
            "convert": {"kind": "pointing", "unit": "pixels"},
        }
        file = tmp_path / "datasets.yaml"
        file.write_text(yaml.safe_dump({"datasets": [entry]}))
        catalogue = load_catalogue(file)

        def fetch_mine(**options):
            given = FetchOptions(tmp_path, RULES, **options)
            return fetch_set(catalogue.sets[0], catalogue, given, Meter(), DownloadProgress())

        yield media, fetch_mine, catalogue.sets[0].model_dump()


def test_points_in_pixels_stay_on_what_they_show(fetch, tmp_path):
    media, fetch_mine, entry = fetch
    result = fetch_mine(max_side=400)
    assert (result.state, result.counts["fetched"], result.counts["resized"]) == ("complete", 3, 2)
    raw = RawSource(tmp_path, "mine")
    assert raw.info["max_side"] == 400
    shown = []
    for [draft] in converted(entry, raw):
        parts, moved, unfit = pack(draft, raw)
        pixels = read_image(next(data for name, data in parts.items() if name.startswith("img")))
        [[_, [point]]] = draft.branches[0]["points"]
        # Within a pixel of the resized picture.
        off = np.abs(np.subtract(centre_of_square(pixels), point)) * (pixels.shape[1], pixels.shape[0])
        assert off.max() < 1 and not moved and not unfit
        shown.append(pixels.shape[1::-1])
    assert shown == [(400, 300), (300, 400), (300, 200)]
    # Hashes are those of what was published, and stay known.
    index = Journal(raw.folder / "media" / "index.jsonl", "url").records
    turned = index[f"{media.url}/turned.jpg"]
    data = media.files["/turned.jpg"]
    assert turned["published"] == {
        "width": 900,
        "height": 1200,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    assert turned["bytes"] < len(data) and "published" not in index[f"{media.url}/small.jpg"]


def test_a_later_fetch_goes_on_in_the_same_way_and_keeps_what_is_there(fetch, tmp_path):
    media, fetch_mine, _ = fetch
    fetch_mine(limit=1, max_side=400)
    # The record of the picture that has come is lost, as if the fetch had been killed before it was written.
    (tmp_path / "raw/mine/media/index.jsonl").unlink()
    result = fetch_mine()
    assert (result.state, result.counts["resized"]) == ("complete", 2)
    assert media.asked["/upright.jpg"] == 1
    assert fetch_mine().reason == "is already complete"
    assert fetch_mine(verify=True).state == "complete"
    assert max(media.asked.values()) == 1


def test_a_picture_that_would_not_become_smaller_stays():
    file = io.BytesIO()
    picture((1000, 1000), []).save(file, "PNG")
    assert resized.smaller(file.getvalue(), 990) is None
    assert resized.published(file.getvalue()) is None


def test_the_share_that_is_left_falls_with_the_side():
    shares = [resized.share_left(side, 331_000) for side in (2000, 1000, 640, 320)]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True)
    assert shares[2] == pytest.approx(0.228, abs=0.005)  # a side of 1,313 pixels is reduced to 640
