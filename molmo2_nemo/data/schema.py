"""What one training sample is: pictures or a video, and conversations or tasks about them, as JSON.

    {"images": [{"part": "img0.jpg", "width": 640, "height": 480}],
     "branches": [{"task": "pointing", "label": "cat", "points": [[1, [[0.25, 0.5]]]]},
                  [{"role": "user", "content": "Who is that?"}, {"role": "assistant", "content": "The cat."}]]}

Every branch is a conversation of its own about the same images or video (a message tree). It is either a list of
messages, taken as they are, or a task, from which tasks.py makes another conversation each time the sample is drawn.
Coordinates are fractions 0..1 of width and height. Times are seconds from the start of the video, or of its clip.
"""

from typing import Annotated, Literal

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Tag,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

from molmo2_nemo import limits

# An unknown key or a wrong type is an error, and so are NaN and infinity.
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

# What coordinates of annotations may be in.
UNITS = ("fraction", "percent", "pixels")
# Where a value is: the keys and indices from the Example down to it, as ("branches", 0, "options", 2).
Place = tuple[str | int, ...]

Frame = tuple[NonNegativeFloat, list[tuple[float, float]]]  # image index from 1 or seconds, [(x, y), ...]
TrackFrame = tuple[NonNegativeFloat, list[tuple[int | str, float, float]]]  # seconds, [(object, x, y), ...]
Style = Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-]+$", max_length=80)]


@dataclass(config=_STRICT)
class Image:
    """A picture: the sample's part that holds it, and its size in pixels as displayed (after EXIF rotation)."""

    part: str
    width: PositiveInt
    height: PositiveInt


@dataclass(config=_STRICT)
class Video:
    """A video file. `clip`: only these seconds of it are used, and all times count from the clip's start."""

    part: str
    width: PositiveInt
    height: PositiveInt
    duration: NonNegativeFloat  # seconds, of the whole file
    fps: PositiveFloat | None = None
    num_frames: PositiveInt | None = None
    clip: tuple[NonNegativeFloat, NonNegativeFloat] | None = None
    # Annotations are at multiples of 1 / annotation_fps seconds: frames are taken there, and if they are too many, a
    # part of the video is shown (frames.py). None: uniformly over the whole, the last frame included.
    annotation_fps: PositiveFloat | None = None
    subtitles: list[tuple[float, float, str]] = Field(default_factory=list)  # (start, end, text)

    @property
    def seconds(self) -> float:
        """Length of what is used."""
        return self.clip[1] - self.clip[0] if self.clip else self.duration

    @property
    def start(self) -> float:
        return self.clip[0] if self.clip else 0.0


@dataclass(config=_STRICT)
class Origin:
    """Where the annotations of a sample come from, for people who look at it. Nothing of it is taught.

    file: name of the annotations' file; place: in that file, as "line 3"; unit: of its coordinates; media: the names
    of the pictures, or of the video, below their folder.
    """

    file: str
    place: str
    unit: Literal[UNITS] | None = None
    media: list[str] = Field(default_factory=list)


@dataclass(config=_STRICT)
class Message:
    """One turn. `<points k/>` in the content stands for entry k of `points` (points.to_json), and `<time 12.5/>`
    for a time, which questions spell as seconds or as a clock and answers always as seconds."""

    role: Literal["system", "user", "assistant"]
    content: str
    points: list[dict] = Field(default_factory=list)


@dataclass(config=_STRICT)
class Chat:
    """A conversation taken as it is: an optional system message, then user and assistant in turn."""

    messages: list[Message]
    task: Literal["chat"] = "chat"
    style: Style | None = None


@dataclass(config=_STRICT)
class Caption:
    """A description, or a transcript of a spoken one. Of several texts one is drawn each time."""

    text: str | Annotated[list[str], Field(min_length=1)]
    task: Literal["caption"] = "caption"
    style: Style | None = None


@dataclass(config=_STRICT)
class Question:
    """A question and its answers. Of several answers the commonest is taught, ties drawn. With an explanation the
    answer is the explanation and then the answer."""

    question: str
    answers: Annotated[list[str], Field(min_length=1)]
    explanation: str | None = None
    task: Literal["question"] = "question"
    style: Style | None = None


@dataclass(config=_STRICT)
class MultipleChoice:
    """A question with options; `answer` is the index from 0 of the right one."""

    question: str
    options: Annotated[list[str], Field(min_length=2, max_length=26)]
    answer: int
    explanation: str | None = None
    task: Literal["multiple_choice"] = "multiple_choice"
    style: Style | None = None


@dataclass(config=_STRICT)
class Region:
    """The mask of one thing, in the images or frames where it was drawn. Evaluation alone reads it.

    size: (height, width) of the masks in pixels. masks: (image index from 1 or seconds, COCO's compressed run lengths).
    object: of a track.
    """

    size: tuple[PositiveInt, PositiveInt]
    masks: list[tuple[NonNegativeFloat, str]]
    object: int | str | None = None


@dataclass(config=_STRICT)
class Pointing:
    """Where all things of one kind are, in images or in a video. No points: there are none.

    `style` decides the mode: the points, the points and their number, or the number; of a list one is drawn.
    `count_question`: the question, where the answer has the number and there is no `question`. `images`: ask about
    these images only (index from 1). `unanswerable`: the answer, if the question has none. `regions`: of the points,
    in their order.
    """

    label: str
    points: list[Frame]
    question: str | None = None
    count_question: str | None = None
    images: list[PositiveInt] | None = None
    unanswerable: str | None = None
    regions: list[Region] | None = None
    task: Literal["pointing"] = "pointing"
    style: Style | list[Style] | None = None


@dataclass(config=_STRICT)
class Tracking:
    """Where things are over time; an object is left out of the frames in which it cannot be seen.

    `style` decides the variant: every frame, the first and last frame of each object, or one object from a given
    point on; of a list one is drawn. `fps`: of the annotations.
    """

    label: str
    frames: list[TrackFrame]
    fps: PositiveFloat
    question: str | None = None
    regions: list[Region] | None = None
    task: Literal["tracking"] = "tracking"
    style: Style | list[Style] | None = None


Task = Chat | Caption | Question | MultipleChoice | Pointing | Tracking


def _kind(branch) -> str | None:
    if isinstance(branch, dict):
        return branch.get("task")
    return "messages" if isinstance(branch, list) else getattr(branch, "task", None)


Branch = Annotated[
    Annotated[list[Message], Tag("messages")]
    | Annotated[Chat, Tag("chat")]
    | Annotated[Caption, Tag("caption")]
    | Annotated[Question, Tag("question")]
    | Annotated[MultipleChoice, Tag("multiple_choice")]
    | Annotated[Pointing, Tag("pointing")]
    | Annotated[Tracking, Tag("tracking")],
    Discriminator(
        _kind,
        custom_error_type="branch",
        custom_error_message=(
            "a branch is a list of messages, or has a task: chat, caption, question, "
            "multiple_choice, pointing or tracking"
        ),
    ),
]


@dataclass(config=_STRICT)
class Example:
    """A sample. `style`: of branches that name none."""

    branches: Annotated[list[Branch], Field(min_length=1, max_length=limits.MAX_BRANCHES)]
    images: list[Image] = Field(default_factory=list)
    video: Video | None = None
    style: Style | None = None
    # How often the branches become the turns of one conversation instead of a tree.
    multi_turn: Annotated[float, Field(ge=0, le=1)] = 0.0
    origin: Origin | None = None


class ValueMistake(ValueError):
    """What is wrong with the value at a place. `problem` goes on from the value's name, or is a sentence of its own."""

    def __init__(self, place: Place, problem: str):
        super().__init__(place, problem)  # as they are, so that it comes back whole from another process
        self.place, self.problem = place, problem

    def __str__(self) -> str:
        return said_of(spelt(self.place), self.problem)


def spelt(place: Place) -> str:
    """branches[0].options[2]"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def said_of(name: str, problem: str) -> str:
    """One sentence about what has that name."""
    if not name:
        return problem
    return f"{name}: {problem}" if problem[:1].isupper() else f"{name} {problem}"


_ADAPTER, _BRANCH_ADAPTER = TypeAdapter(Example), TypeAdapter(Branch)


def read_example(text: bytes | str) -> Example:
    """An Example from its JSON. ValueError, one sentence: what is wrong with it, and where.

    It is a ValueMistake, or was caused by pydantic's ValidationError, which has all mistakes of form.
    """
    example = _validated(_ADAPTER, text)
    if example.images and example.video:
        raise ValueError("images and video: a sample has images or a video, not both.")
    video = example.video
    if video and video.clip and not video.clip[0] < video.clip[1] <= video.duration + 1e-3:
        raise ValueMistake(("video", "clip"), f"= {list(video.clip)} is no part of {video.duration} seconds")
    for number, branch in enumerate(example.branches):
        _check_branch(branch, ("branches", number))
    return example


def check_branch(text: bytes | str) -> None:
    """ValueError, one sentence: this JSON is no branch of an Example."""
    _check_branch(_validated(_BRANCH_ADAPTER, text), ("branch",))


def _validated(adapter: TypeAdapter, text: bytes | str):
    try:
        return adapter.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the JSON"
        raise ValueError(f"{where}: {first['msg']}.") from error


def _check_branch(branch, place: Place) -> None:
    if isinstance(branch, list | Chat):
        roles = [message.role for message in (branch if isinstance(branch, list) else branch.messages)]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if len(turns) < 2 or turns != ["user", "assistant"] * (len(turns) // 2):
            raise ValueMistake(place, f"The roles are {roles}, not user and assistant in turn")
    elif isinstance(branch, MultipleChoice) and not 0 <= branch.answer < len(branch.options):
        last = len(branch.options) - 1
        raise ValueMistake((*place, "answer"), f"= {branch.answer} is none of 0 to {last}, the indices of the options")
    elif isinstance(branch, Pointing) and branch.regions is not None:
        points = sum(len(group) for _, group in branch.points)
        if len(branch.regions) != points:
            raise ValueMistake((*place, "regions"), f"are {len(branch.regions)} of {points} points")
