"""The catalogue of data sets, conf/datasets.yaml, typed and checked.

A data set whose raw form is a known one needs nothing but an entry here. The shortest entry is

    - name: my-set
      source: {kind: hf, hf: {repo: me/my-set, split: train}}
      media: {kind: in-parquet}
      fields: {image: image, question: text, answer: text}

Unknown facts are null or left out. docs/datasets.md describes every key that a fetch reads.
"""

import datetime
import difflib
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from molmo2_nemo.catalogue.commands import download_command
from molmo2_nemo.catalogue.forms import Form, form_of
from molmo2_nemo.paths import CONF_DIR

CONF_FILE = CONF_DIR / "datasets.yaml"
CATEGORIES = (
    "dense-caption",
    "image-pointing",
    "nlp",
    "molmo2-original",
    "pixmo",
    "academic-image",
    "video-auto",
    "video-manual",
    "tracking",
    "text",
    "own",
)
# Keys of counts: by the first list of stages, by the release, and by the report.
COUNTS = ("seed", "seed_text", "released_rows", "paper_visual", "paper_annotations", "paper_examples")
# Media that no program can download: the user puts them into manual/.
BY_HAND = ("manual", "youtube-ids", "unknown")


def _date(value):
    """A date; YAML has a text for one in quotes. ValueError: it is none."""
    if not isinstance(value, str):
        return value
    try:
        return datetime.date.fromisoformat(value)
    except ValueError:
        raise ValueError(f"{value!r} is no date: write it as 2026-03-18") from None


def _hub_pattern(value: str) -> str:
    """A pattern as a shell's, of paths in a repository. ValueError: no file could match it."""
    parts = value.split("/")
    if not value or "\\" in value or ".." in parts or parts[0] == "" or not value.strip():
        raise ValueError(f"{value!r} is no pattern of a path below a folder: write it as videos/*.mp4")
    if value.count("[") != value.count("]"):
        raise ValueError(f"{value!r} has a bracket that is not closed")
    return value


def _layout(value: str) -> str:
    """A pattern as of Path.glob, below a folder. ValueError: no file could match it."""
    if any("**" in part and part != "**" for part in value.split("/")):
        raise ValueError(f"{value!r} has ** beside other letters: write it between slashes, as **/*.mp4")
    return _hub_pattern(value)


def _once(values: list[str]) -> list[str]:
    if twice := next((value for value in values if values.count(value) > 1), None):
        raise ValueError(f"{twice} is there twice: remove one")
    return values


def _condition(value: str) -> str:
    column, equal, wanted = (part.strip() for part in value.partition("=="))
    if not (column and equal and wanted):
        raise ValueError(f"{value!r} is no condition: write it as COLUMN == VALUE")
    return value


def _not_in_a_file(value):
    raise ValueError("it is no key of a catalogue: remove it")


def _not_of_the_data_root(value: str) -> str:
    """A name. ValueError: the data root has files of its own of this name."""
    if re.fullmatch(r"raw|revisions\.json|stage[123].*\.(yaml|json|txt)", value.lower()):
        raise ValueError(f"{value} is a name that the data root has for files of its own: choose another one")
    return value


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"), AfterValidator(_not_of_the_data_root)]
Repo = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")]
Revision = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
Url = Annotated[str, Field(pattern=r"^https?://[^\s/]+")]
Count = Annotated[int, Field(ge=0)]
Date = Annotated[datetime.date, BeforeValidator(_date)]
Layout = Annotated[str, AfterValidator(_layout)]
HubPattern = Annotated[str, AfterValidator(_hub_pattern)]
Columns = Annotated[list[Annotated[str, Field(min_length=1)]], AfterValidator(_once)]
Condition = Annotated[str, AfterValidator(_condition)]
# The file of a catalogue, as the user names it. load_catalogue sets it; None: conf/datasets.yaml.
CatalogueFile = Annotated[str | None, BeforeValidator(_not_in_a_file)]


class _Strict(BaseModel):
    """Refuses unknown keys, and converts nothing: "3" is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class HubFiles(_Strict):
    """Files of a data set repository on the Hub.

    `revision` pins a commit. Without it, the first fetch writes the commit that it got to raw/revisions.json under the
    data root, and later ones use that.
    """

    repo: Repo
    revision: Revision | None = None
    config: str | list[str] | None = None
    split: str | None = None
    other_splits: list[str] = []
    files: list[HubPattern] = []  # patterns in place of config and split; <config> stands for each config
    also: list[str] = []  # files that are no rows and are needed to read them
    filter: Condition | None = None  # "COLUMN == VALUE": the rows that are meant

    @model_validator(mode="after")
    def _config_is_used(self):
        if self.config is None and (pattern := next((p for p in self.files if "<config>" in p), None)):
            raise ValueError(f"{pattern} has <config>, which needs the key config")
        if isinstance(self.config, list):
            _once(self.config)
        return self

    @property
    def configs(self) -> list[str | None]:
        return self.config if isinstance(self.config, list) else [self.config]


class DownloadSource(_Strict):
    """Where the annotations are."""

    kind: Literal["hf", "url", "manual"]
    hf: HubFiles | None = None
    urls: list[Url] = []
    page: Url | None = None
    instructions: str | None = None
    layout: list[Layout] = []  # patterns of what manual/ must hold
    note: str | None = None
    alternates: list[dict[str, Any]] = []
    raw: dict[str, Any] | None = None
    unused_configs: list[str] = []

    @model_validator(mode="after")
    def _has_its_block(self):
        needed = {"hf": self.hf, "url": self.urls, "manual": self.instructions}[self.kind]
        if not needed:
            key = {"hf": "hf", "url": "urls", "manual": "instructions"}[self.kind]
            raise ValueError(f"kind {self.kind} needs the key {key}")
        return self


class MediaSource(_Strict):
    """Where the pictures and videos are."""

    kind: Literal["in-parquet", "archive", "url-list", "youtube-ids", "manual", "render", "none", "unknown"]
    detail: str | None = None
    page: Url | None = None
    urls: list[Url] = []  # archives, or single files
    hf: HubFiles | None = None  # archives or files in a repository
    columns: Columns = []  # with addresses (url-list, a string or a list in a row) or YouTube ids
    sha256: str | None = None  # column with the hash of the bytes
    layout: list[Layout] = []  # patterns of what manual/ must hold

    @model_validator(mode="after")
    def _has_its_columns(self):
        if self.kind == "url-list" and not self.columns:
            raise ValueError("kind url-list needs the key columns")
        if self.kind == "archive" and self.hf and not self.hf.files:
            raise ValueError("kind archive in a repository needs the key hf.files: name the archives, as [images.zip]")
        if self.sha256 and len(self.columns) != 1:
            raise ValueError("sha256 names the hash of one column of addresses")
        return self


class HeldOut(_Strict):
    """A list of evaluation pictures: training must not see them, so they are not downloaded."""

    repo: Repo
    revision: Revision | None = None
    split: str = "test"
    column: str = "image_url"
    sha256: str | None = None


class LayoutEvidence(_Strict):
    """Where a data set's published form is written, from which tests/published/NAME.yaml was made."""

    repository: str  # of the Hub, or github.com/OWNER/NAME
    file: str
    # YAML takes a commit of digits alone for a number.
    revision: Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)] | None = None
    date: Date | None = None

    @model_validator(mode="after")
    def _says_when(self):
        if self.revision is None and self.date is None:
            raise ValueError("it needs the key revision or date")
        return self


class SourceState(_Strict):
    """Whether the files can be had, and how: what was found where, on which day."""

    state: Literal["open", "gated", "form", "moved", "dead", "unknown"]
    page: Url | None = None  # where to agree, to register, or where it has moved to
    evidence: str  # what says so: a file of a repository, or a thread
    date: Date  # of the evidence
    note: str | None = None

    @model_validator(mode="after")
    def _has_its_page(self):
        if self.state in ("gated", "form", "moved") and self.page is None:
            raise ValueError(f"state {self.state} needs the key page")
        return self


class MediaSize(_Strict):
    """Size of media that a fetch does not bring, or that the size of the entry leaves out."""

    gb: float = Field(gt=0, strict=False)
    source: str  # who says so
    date: Date | None = None


class DataSet(_Strict):
    """One entry. What a fetch and a plan read is typed; the rest is kept as it is."""

    name: Name
    source: DownloadSource
    media: MediaSource
    stages: list[Literal[1, 2, 3]] = [2, 3]
    category: Literal[CATEGORIES] = "own"
    stage2_category: Literal[CATEGORIES] | None = None
    modality: Literal["image", "multi-image", "video", "text"] = "image"
    task: list[str] = []
    source_state: SourceState | None = None  # None: nobody has looked
    # None, in the file null or "unknown": it is not known. license_page is where it is named, or would be.
    license: Annotated[str | None, BeforeValidator(lambda value: None if value == "unknown" else value)] = None
    license_page: Url | None = None
    terms: str | None = None
    gated: bool | None = None
    examples: Count | None = None
    counts: dict[Literal[COUNTS], Count | str] = {}
    size_gb: float | None = Field(None, gt=0, strict=False)
    disk_gb: float | None = Field(None, gt=0, strict=False)  # what a fetch takes, where size_gb is something else
    size_note: str | None = None
    media_size: MediaSize | None = None
    media_of: Name | None = None  # an entry among whose media those of this one are, so that they are got once
    fields: dict[str, str] | None = None
    layout_evidence: LayoutEvidence | None = None  # None: nobody has compared the entry with what is published
    ratio: float | None = Field(None, gt=0, le=1)
    sft: dict[str, Any] | None = None
    loss_weight: Annotated[str, Field(pattern=r"^(default|unweighted|(cap|point)-0?\.\d+)$")] | None = None
    loader: str | None = None
    confidence: Literal["code", "seed", "report", "unsure"] = "code"
    note: str | None = None
    aliases: dict[str, Any] = {}
    group_of: list[str] | None = None  # stands for other entries, which are in the catalogue, too
    parent: str | None = None
    # What tools/prepare.py reads.
    convert: Any = None
    catalogue: CatalogueFile = None  # that the entry is of

    @model_validator(mode="after")
    def _stage_1_has_a_ratio(self):
        if 1 in self.stages and self.ratio is None:
            raise ValueError("stages has 1, which needs the key ratio")
        return self

    @model_validator(mode="after")
    def _counts_are_numbers(self):
        for key, value in self.counts.items():
            if isinstance(value, str) and key != "seed_text":
                raise ValueError(f"counts.{key}={value!r} is no number")
        return self

    @model_validator(mode="after")
    def _can_be_converted(self):
        if self.convert or self.category == "own":
            form_of(self.name, self.fields, self.convert, self.media.kind)
        return self

    @property
    def form(self) -> Form | None:
        """How its rows are read, if that is said or seen by their columns. ValueError: `convert` makes no sense."""
        return form_of(self.name, self.fields, self.convert, self.media.kind)

    @property
    def row_columns(self) -> list[str]:
        """Columns that rows must have: those with addresses, that of the filter, and those that its form reads."""
        condition = self.source.hf.filter if self.source.hf else None
        columns = [*self.media.columns, *([self.media.sha256] if self.media.sha256 else [])]
        columns += [condition.partition("==")[0].strip()] if condition else []
        own = self.form if self.convert or self.category == "own" else None
        return list(dict.fromkeys([*columns, *(own.needed if own else [])]))

    @property
    def unsure(self) -> str | None:
        """Why nothing of this set is fetched: its source or its columns are uncertain. None: both are known."""
        if self.confidence == "unsure":
            return f"which data set this is, is not certain ({self.note})" if self.note else "its source is not certain"
        if self.fields is None:
            return f"its columns are not known ({self.note})" if self.note else "its columns are not known"
        return None

    @property
    def by_hand(self) -> bool:
        """Whether the user must provide some of this set's files."""
        return self.source.kind == "manual" or self.media.kind in BY_HAND

    @property
    def layout(self) -> list[str]:
        """Patterns, relative to manual/, each of which must match a file."""
        if self.source.layout or self.media.layout:
            return [*self.source.layout, *self.media.layout]
        if self.media.kind in BY_HAND or self.source.kind == "manual":
            return ["**/*.mp4"] if self.modality == "video" else ["**/*"]
        return []

    @property
    def samples(self) -> int:
        """About how many samples become of it: one of each picture or video, or of each row, where these are fewer."""
        known = [self.counts.get("paper_visual"), self.counts.get("released_rows") or self.counts.get("paper_examples")]
        return min((int(number) for number in known if number), default=self.examples or 0)

    @property
    def count_differs(self) -> str | None:
        """Where the first stage list names another number of examples than the release has: both. None: it does not."""
        seed, released = self.counts.get("seed"), self.counts.get("released_rows")
        if not seed or not released or abs(int(seed) / int(released) - 1) < 0.05:
            return None
        return f"{released:,} rows are released; the first list of stages says {seed:,} examples"

    @property
    def size(self) -> int:
        """Training examples, message trees where they are known."""
        return int(self.counts.get("paper_examples") or self.examples or 0)


class Catalogue(_Strict):
    """conf/datasets.yaml."""

    datasets: list[DataSet]
    held_out: list[HeldOut] = []
    schema_version: int = 1
    about: str | None = None
    sources: dict[str, str] = {}
    keys: dict[str, str] = {}
    stages: dict[int, dict[str, Any]] = {}
    sampling: dict[str, str] = {}
    groups: dict[str, dict[str, Any]] = {}
    archive_gb: dict[Url, float] = {}  # of addresses that sets share in part
    tracking_sub_rates: dict[str, float] = {}
    loss_weights: dict[str, str] = {}
    related_not_trained: list[dict[str, Any]] = []
    file: CatalogueFile = None

    @model_validator(mode="after")
    def _entries_agree(self):
        seen = set()
        for entry in self.datasets:
            if entry.name.lower() in seen:
                raise ValueError(f"the name {entry.name} is there twice")
            seen.add(entry.name.lower())
        for entry in self.datasets:
            for member in entry.group_of or []:
                if member.lower() not in seen:
                    raise ValueError(f"group_of of {entry.name} names {member}, which is no entry")
            if entry.media_of and entry.media_of.lower() not in seen:
                said = f"{entry.name} has media_of={entry.media_of}, which is no entry"
                raise ValueError(f"{said}: add it, or remove the key")
            group = (entry.sft or {}).get("group")
            if group is not None and self.groups and group not in self.groups:
                raise ValueError(f"{entry.name} has sft.group={group}, which is none of {', '.join(self.groups)}")
        return self

    @cached_property
    def sets(self) -> list[DataSet]:
        """Entries, except those that stand for a group of others."""
        return [entry for entry in self.datasets if not entry.group_of]

    def of_stage(self, stage: int) -> list[DataSet]:
        return [entry for entry in self.sets if stage in entry.stages]

    def is_shared(self, url: str) -> bool:
        """Whether several sets name this address."""
        return sum(url in (*entry.source.urls, *entry.media.urls) for entry in self.sets) > 1

    def find(self, names: list[str]) -> list[DataSet]:
        """Entries by name, in the order asked, without regard to case. ValueError: there is none of a name."""
        by_name = {entry.name.lower(): entry for entry in self.datasets}
        found: dict[str, DataSet] = {}
        for name in names:
            entry = by_name.get(name.lower())
            if entry is None:
                close = difflib.get_close_matches(name.lower(), by_name, n=5)
                close += [key for key in by_name if (name.lower() in key or key in name.lower()) and key not in close]
                names = ", ".join(by_name[key].name for key in close[:5])
                hint = f"did you mean {names}" if close else f"see {download_command('list', catalogue=self.file)}"
                raise ValueError(f"there is no data set {name}: {hint}.")
            for member in entry.group_of or [entry.name]:
                found.setdefault(member.lower(), by_name[member.lower()])
        return list(found.values())


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Refuses a key that is given twice; YAML would silently take the last."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_catalogue(path: Path = CONF_FILE) -> Catalogue:
    """Read and check a catalogue. ValueError, one sentence: file, entry, key, value and what is wrong."""
    try:
        values = yaml.load(Path(path).read_text(), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping with the key datasets.")
    try:
        catalogue = Catalogue.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {_sentence(error.errors()[0], values)}.") from error
    if path == CONF_FILE:
        return catalogue
    entries = [entry.model_copy(update={"catalogue": str(path)}) for entry in catalogue.datasets]
    return catalogue.model_copy(update={"file": str(path), "datasets": entries})


def _sentence(error: dict, values: dict) -> str:
    """A sentence about the first mistake that pydantic found."""
    where, place = "the catalogue", list(error["loc"])
    if place[:1] == ["datasets"] and len(place) > 1:
        entry = values["datasets"][place[1]]
        name = entry.get("name") if isinstance(entry, dict) else None
        where, place = f"data set {name}" if name else f"entry {place[1] + 1} of datasets", place[2:]
    # Pydantic names the members of a union by their type, which does not help the user.
    types = r"^(list|dict|constrained|nullable|function-|str$|int$|\[key\]$)"
    key = ".".join(str(part) for part in place if not re.match(types, str(part)))
    if error["type"] == "extra_forbidden":
        return f"{where} has the unknown key {key}: remove it or correct its spelling"
    if error["type"] == "missing":
        return f"{where} lacks the key {key}: add it"
    if error["type"] == "value_error":
        said = str(error["ctx"]["error"])
        if said.startswith(f"{where.removeprefix('data set ')} "):
            return f"data set {said}"
        return f"{where}{f', {key}' if key else ''}: {said}"
    message = error["msg"].removeprefix("Input ").replace("String should match pattern", "does not match")
    return f"{where} has {key}={error['input']!r}: it {message}"
