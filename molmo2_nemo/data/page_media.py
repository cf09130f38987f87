"""The pictures and videos of the pages of tools/inspect_data.py, as files that every browser shows."""

from pathlib import Path

import av
from PIL import Image

from molmo2_nemo.data.pictures import read_image
from molmo2_nemo.data.video import pick_frames, write_video

# Pixels of a side of what the pages show, at most: pictures, videos, thumbnails.
PICTURE_SIDE, FILM_SIDE, THUMBNAIL_SIDE = 1600, 854, 200
PNG_SIDE = 800  # pictures up to this side are kept without loss
# Frames a second of the pages' videos, and frames in all, at most.
FILM_FPS, FILM_FRAMES = 12, 900


class Media:
    """The pictures and the video of one page, in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder, self.film_problem = folder, ""
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, image, file: str) -> str:
        """The address of the picture, for the page beside the folder."""
        image.save(self.folder / file, **({"quality": 92} if file.endswith(".jpg") else {"compress_level": 1}))
        return f"{self.folder.name}/{file}"

    def visual(self, visual, number: int) -> dict:
        """A picture or frame as the model gets it, to be completed by `own_proportions`."""
        crops = [self.save(Image.fromarray(c), f"picture{number}-crop{k}.png") for k, c in enumerate(visual.crops)]
        height, width = visual.crops[0].shape[:2]
        name = f"image {number + 1}"
        return {
            "seconds": visual.seconds,
            "name": name,
            "crops": crops,
            "file": crops[0],
            "width": width,
            "height": height,
            "size": "of unknown size",
        }

    def own_proportions(self, visuals: list[dict], stored, start: float) -> dict | None:
        """Give the visuals the names and sizes of their files, and pictures instead of the model's view of them; the
        video, if the sample has one. start: seconds of it at which what is shown begins."""
        if stored.example is None or not visuals:
            return None
        video = stored.example.video
        names = stored.example.origin.media if stored.example.origin else []
        sizes = [video] * len(visuals) if video else stored.example.images
        for number, (visual, size) in enumerate(zip(visuals, sizes)):
            visual |= {"width": size.width, "height": size.height, "size": f"{size.width} \u00d7 {size.height} pixels"}
            if video:
                visuals[number] = visual
                continue
            image = Image.fromarray(read_image(stored.parts[size.part]))
            image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            ending = "png" if max(image.size) <= PNG_SIDE else "jpg"
            visual["file"] = self.save(image, f"picture{number}.{ending}")
            if number < len(names):
                visual["name"] = f"image {number + 1}: {names[number]}" if len(visuals) > 1 else names[number]
        return self.film(visuals, video, stored.parts[video.part], start, names) if video else None

    def film(self, visuals: list[dict], video, data: bytes, start: float, names: list[str]) -> dict | None:
        """What is shown of the video, as every browser plays it; None, and `film_problem`, if it is damaged."""
        times = [visual["seconds"] for visual in visuals]
        seconds = max(min(2 * times[-1] - times[-2], video.duration - start) if len(times) > 1 else 0.0, times[-1])
        fps = max(0.1, min(FILM_FPS, video.fps or FILM_FPS, FILM_FRAMES / max(seconds, 1e-3)))
        shown = [number / fps for number in range(max(1, round(seconds * fps)))]
        frames = pick_frames(data, shown, video.num_frames, start=start)
        try:
            write_video(map(Image.fromarray, frames), fps, self.folder / "video.mp4", FILM_SIDE)
        except (ValueError, OSError, av.error.FFmpegError) as error:  # frames that the model does not get
            (self.folder / "video.mp4").unlink(missing_ok=True)
            self.film_problem = str(error)
            return None
        return {
            "file": f"{self.folder.name}/video.mp4",
            "name": names[0] if names else "video",
            "times": shown,
            "fps": fps,
            "seconds": seconds,
            "start": start,
            **{key: visuals[0][key] for key in ("width", "height", "size")},
        }

    def thumbnail(self, visuals: list[dict]) -> str | None:
        """The address of a small picture, for the list."""
        if not visuals:
            return None
        first = visuals[0]
        with Image.open(self.folder.parent / first["file"]) as image:
            scale = THUMBNAIL_SIDE / max(first["width"], first["height"])
            size = [max(1, round(first[side] * scale)) for side in ("width", "height")]
            small = image.convert("RGB").resize(size)
        return f"samples/{self.save(small, 'thumbnail.jpg')}"
