"""conf/datasets.yaml and what is refused in a catalogue."""

import datetime
import json
import math

import pytest
import yaml
from programs import REPOSITORY, python, succeeded

from molmo2_nemo.catalogue.datasets import load_catalogue
from molmo2_nemo.catalogue.forms import STYLES
from molmo2_nemo.catalogue.raw import RawSource, media_name, read_rows
from molmo2_nemo.data import tasks
from molmo2_nemo.fetch.inventory import how, listed, with_license
from molmo2_nemo.fetch.plan import TIERS, VIDEO_BYTES, plan_downloads, shares_of, totals

MINE = {
    "name": "mine",
    "source": {"kind": "hf", "hf": {"repo": "me/mine", "split": "train"}},
    "media": {"kind": "in-parquet"},
    "fields": {"image": "image"},
}


def catalogue(tmp_path, *entries, **more):
    path = tmp_path / "datasets.yaml"
    path.write_text(yaml.safe_dump({"datasets": list(entries), **more}))
    return load_catalogue(path)


def test_the_shipped_catalogue_has_108_sets_and_five_of_stage_1():
    shipped = load_catalogue()
    assert len(shipped.sets) == 108 and len(shipped.of_stage(1)) == 5
    assert all(entry.media.columns for entry in shipped.sets if entry.media.kind == "url-list")
    # A set that no program can get has a page and a layout.
    for entry in shipped.sets:
        assert not entry.by_hand or entry.layout, entry.name
        assert entry.source.kind != "manual" or entry.source.page, entry.name
    assert not [entry.name for entry in shipped.sets if entry.unsure]


def test_one_entry_is_enough(tmp_path):
    entry = catalogue(tmp_path, MINE).sets[0]
    assert entry.stages == [2, 3] and entry.category == "own" and not entry.by_hand and not entry.unsure


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"licence": "mit"}, "data set mine has the unknown key licence"),
        ({"examples": "many"}, "data set mine has examples='many'"),
        ({"examples": -1}, "examples=-1"),
        ({"source": {"kind": "hf"}}, "data set mine, source: kind hf needs the key hf"),
        ({"source": {"kind": "url", "urls": ["file:///etc/passwd"]}}, "source.urls.0='file:///etc/passwd'"),
        ({"source": {"kind": "hf", "hf": {"repo": "no-owner"}}}, "source.hf.repo='no-owner'"),
        ({"source": {"kind": "hf", "hf": {"repo": "a/b", "revision": "main"}}}, "source.hf.revision='main'"),
        ({"media": {"kind": "url-list"}}, "kind url-list needs the key columns"),
        (
            {"media": {"kind": "archive", "hf": {"repo": "a/b"}}},
            "kind archive in a repository needs the key hf.files",
        ),
        ({"media": {"kind": "cd-rom"}}, "media.kind='cd-rom'"),
        ({"stages": [1]}, "needs the key ratio"),
        ({"stages": [4]}, "stages.0=4"),
        ({"name": "../up"}, "name='../up'"),
        ({"name": "Raw"}, "data set Raw is a name that the data root has for files of its own"),
        ({"name": "stage2.yaml"}, "stage2.yaml is a name that the data root has"),
        ({"name": None}, "entry 1 of datasets has name=None"),
        ({"counts": {"sed": 3}}, "counts.sed='sed': it should be 'seed', "),
        ({"counts": {"seed": "3k"}}, "counts.seed='3k' is no number"),
        ({"loss_weight": "point"}, "loss_weight='point'"),
        ({"media": {"kind": "manual", "layout": ["**.mp4"]}}, "'**.mp4' has ** beside other letters"),
        ({"media": {"kind": "manual", "layout": ["/data/*.mp4"]}}, "'/data/*.mp4' is no pattern"),
        ({"media": {"kind": "manual", "layout": ["a/../*.mp4"]}}, "'a/../*.mp4' is no pattern"),
        ({"source": {"kind": "hf", "hf": {"repo": "a/b", "files": ["<config>/*.json"]}}}, "which needs the key config"),
        ({"source": {"kind": "hf", "hf": {"repo": "a/b", "filter": "kind = x"}}}, "write it as COLUMN == VALUE"),
        ({"media": {"kind": "url-list", "columns": ["u", "u"]}}, "media.columns: u is there twice"),
        (
            {"layout_evidence": {"repository": "a/b", "file": "c", "date": "soon"}},
            "'soon' is no date: write it as 2026",
        ),
        ({"source_state": {"state": "opn", "evidence": "x", "date": "2026-01-02"}}, "state='opn': it should be 'open'"),
    ],
)
def test_a_mistake_is_named_in_one_sentence(tmp_path, change, said):
    with pytest.raises(ValueError) as error:
        catalogue(tmp_path, {**MINE, **change})
    assert said in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


# What `convert` of a question may say wrongly, and what is said of it.
CONVERT = [
    ({"kind": "qestion"}, "convert.kind='qestion', which is none of chat, pointing, choice, question, caption"),
    ({"columns": {"question": ["query"]}}, "convert.columns.question=['query'], which is none of its fields: "),
    ({"unit": "percents"}, "convert.unit='percents', which is none of fraction, percent, pixels"),
    ({"style": "user_qaa"}, "convert.style=user_qaa: did you mean user_qa? The known ones of question are user_qa, "),
    (
        {"style": "pointing"},
        "convert.style=pointing, which is one of pointing and not of question; of it are user_qa, ",
    ),
    ({"style": "two words"}, "convert.style='two words': it is a word"),
    ({"columns": {"question": "query", "answer": "query"}}, "where query is read as two things"),
    (
        {"kind": "pointing", "columns": {"points": "answer", "label": "query"}, "style": "pointng"},
        "these do: pointing, ",
    ),
]


@pytest.mark.parametrize(("change", "said"), CONVERT)
def test_a_mistyped_convert_is_refused_when_the_catalogue_is_read(tmp_path, change, said):
    form = {"kind": "question", "columns": {"question": "query"}}
    entry = {**MINE, "fields": dict.fromkeys(("image", "query", "answer"), "")}
    catalogue(tmp_path, {**entry, "convert": form})
    with pytest.raises(ValueError, match="datasets.yaml: data set mine has convert") as error:
        catalogue(tmp_path, {**entry, "convert": form | change})
    assert said in str(error.value)


def test_both_tools_refuse_a_mistyped_style_before_they_do_anything(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    import download
    import prepare

    entry = {**MINE, "fields": dict.fromkeys(("image", "question", "answer"), ""), "convert": {"style": "user_qaa"}}
    said, file = "data set mine has convert.style=user_qaa: did you mean user_qa?", tmp_path / "datasets.yaml"
    file.write_text(yaml.safe_dump({"datasets": [entry]}))
    for words in (["list"], ["fetch", "mine"]):
        assert download.main([*words, "--catalogue", str(file), "--root", str(tmp_path)]) == 1
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        prepare.main(["--stage", "2", "mine", "--catalogue", str(file), "--out", str(tmp_path)])
    assert said in str(stop.value) and not (tmp_path / "raw").exists()


def test_a_style_of_ones_own_is_taken_and_those_of_pointing_are_those_that_are_written(tmp_path):
    fields = dict.fromkeys(("image", "question", "answer"), "")
    for style in ("invoices", "my-charts", "vqa2"):
        catalogue(tmp_path, {**MINE, "fields": fields, "convert": {"style": style}})
    pointing = tasks.POINTS_ONLY | tasks.POINTS_THEN_COUNT | tasks.COUNT_THEN_POINTS | tasks.COUNT_ONLY
    assert sorted(STYLES["pointing"]) == sorted(pointing)


def test_a_date_in_quotes_is_a_date_and_a_commit_of_digits_a_commit(tmp_path):
    evidence = {"repository": "a/b", "file": "README.md", "revision": 1234567, "date": "2026-01-02"}
    [entry] = catalogue(tmp_path, {**MINE, "layout_evidence": evidence}).sets
    assert entry.layout_evidence.date == datetime.date(2026, 1, 2) and entry.layout_evidence.revision == "1234567"


def test_names_are_unique_and_groups_complete(tmp_path):
    with pytest.raises(ValueError, match="the name Mine is there twice"):
        catalogue(tmp_path, MINE, {**MINE, "name": "Mine"})
    with pytest.raises(ValueError, match="names other, which is no entry"):
        catalogue(tmp_path, {**MINE, "group_of": ["other"]})
    (tmp_path / "twice.yaml").write_text("datasets: []\ndatasets: []\n")
    with pytest.raises(ValueError, match="the key datasets is there twice"):
        load_catalogue(tmp_path / "twice.yaml")


def test_sets_are_found_without_regard_to_case_and_groups_stand_for_their_members():
    shipped = load_catalogue()
    assert [entry.name for entry in shipped.find(["CHARTQA", "pixmo-cap"])] == ["chartqa", "pixmo-cap"]
    assert len(shipped.find(["Molmo2-SynMultiImageQA"])) == 6
    with pytest.raises(ValueError, match="there is no data set pixmo: did you mean .*pixmo-cap"):
        shipped.find(["pixmo"])


def test_a_licence_that_forbids_sale_is_not_its_namesake(tmp_path):
    names = ["odc-by", "cc-by-4.0", "cc-by-nc-4.0", "CC-BY-4.0, mit", None]
    sets = catalogue(tmp_path, *({**MINE, "name": f"s{n}", "license": name} for n, name in enumerate(names))).sets
    assert [entry.name for entry in with_license(sets, ["cc-by"], tmp_path)] == ["s1"]
    assert [entry.name for entry in with_license(sets, ["cc-by", "mit", "ODC-BY"], tmp_path)] == ["s0", "s1", "s3"]


def test_plan_takes_what_is_worth_most_for_its_bytes_and_stays_within_the_budget(tmp_path):
    sizes = {"small": (1, 10_000), "large": (90, 10_000), "rich": (20, 1_000_000)}
    entries = [{**MINE, "name": name, "disk_gb": gb, "examples": examples} for name, (gb, examples) in sizes.items()]
    by_hand = {**MINE, "name": "hand", "source": {"kind": "manual", "instructions": "ask", "page": "https://a.org/b"}}
    found = catalogue(tmp_path, *entries, by_hand, {**MINE, "name": "odd", "fields": None})
    rows = plan_downloads(found.sets, found, tmp_path, 30 * 10**9, speed=1e6)
    assert [(row.name, row.action) for row in rows] == [
        ("small", "fetch"),
        ("rich", "fetch"),
        ("large", "no room"),
        ("hand", "by hand"),
        ("odd", "refused"),
    ]
    assert rows[0].seconds == 1000 and sum(row.gigabytes for row in rows if row.action == "fetch") <= 30
    # What is there, whole or in part, is not paid for again.
    for name, note in (("rich", {"complete": True}), ("large", {"complete": False, "bytes": 80 * 10**9})):
        (tmp_path / "raw" / name).mkdir(parents=True)
        (tmp_path / "raw" / name / "fetched.json").write_text(json.dumps(note))
    rows = {row.name: row for row in plan_downloads(found.sets, found, tmp_path, 12 * 10**9, speed=None)}
    assert rows["rich"].action == "there" and rows["large"].action == "fetch" and rows["large"].gigabytes == 10


def test_a_plan_tells_media_by_hand_from_what_is_fetched_and_who_says_how_large_they_are(tmp_path):
    size = {"gb": 134, "source": "a page", "date": datetime.date(2026, 1, 2)}
    youtube = {"kind": "youtube-ids", "columns": ["video"]}
    found = catalogue(
        tmp_path,
        {**MINE, "name": "whole", "disk_gb": 10},
        {**MINE, "name": "named", "media": youtube, "modality": "video", "examples": 1000, "media_size": size},
        {**MINE, "name": "guessed", "media": youtube, "modality": "video", "examples": 1000},
    )
    rows = {row.name: row for row in plan_downloads(found.sets, found, tmp_path, math.inf, None, whole=True)}
    assert (rows["named"].by_hand_gb, rows["named"].by_hand_source, rows["named"].by_hand_estimated) == (
        134,
        "a page",
        False,
    )
    assert rows["guessed"].by_hand_gb == pytest.approx(1000 * VIDEO_BYTES / 1e9) and rows["guessed"].by_hand_estimated
    assert [name for name, row in rows.items() if row.annotations_only] == ["guessed", "named"]
    sums = totals(list(rows.values()))
    assert (sums.automatic, sums.automatic_gb, sums.by_hand) == (1, 10, 2)
    assert sums.by_hand_gb == pytest.approx(134 + 1000 * VIDEO_BYTES / 1e9)
    # A budget for the whole of a set has no room for what the user would have to bring.
    rows = plan_downloads(found.sets, found, tmp_path, 100 * 10**9, None, whole=True)
    assert {row.name for row in rows if row.action == "no room"} == {"named"}


def test_media_and_archives_that_sets_share_are_counted_once_and_rows_agree_with_the_sums(tmp_path):
    youtube, urls = {"kind": "youtube-ids", "columns": ["video"]}, ["http://a.org/1.zip", "http://a.org/2.zip"]
    archive = {"kind": "archive", "urls": urls[:1]}
    found = catalogue(
        tmp_path,
        # By worth the owner of the media comes later, and it is planned before all the same.
        {**MINE, "name": "owner", "media": youtube, "modality": "video", "examples": 10, "size_gb": 50},
        {**MINE, "name": "user", "media": youtube, "modality": "video", "examples": 100, "media_of": "owner"},
        {**MINE, "name": "coco", "media": archive, "disk_gb": 30, "examples": 1000},
        {**MINE, "name": "more", "media": {**archive, "urls": urls}, "disk_gb": 40, "examples": 1000},
        archive_gb={urls[0]: 28},
    )
    for whole in (True, False):
        rows = plan_downloads(found.sets, found, tmp_path, math.inf, None, whole=whole)
        by_name = {row.name: row for row in rows}
        assert (by_name["owner"].by_hand_gb, by_name["user"].by_hand_gb) == (50, 0)
        assert by_name["user"].media_of == "owner" and "among those of owner" in by_name["user"].why
        assert (by_name["coco"].gigabytes, by_name["more"].gigabytes) == (30, 12)
        sums = totals(rows)
        assert (sums.automatic, sums.automatic_gb, sums.by_hand, sums.by_hand_gb) == (2, 42, 2, 50)
    # Alone, it takes all of its own.
    [row] = plan_downloads(found.find(["user"]), found, tmp_path, math.inf, None)
    assert row.by_hand_gb == pytest.approx(100 * VIDEO_BYTES / 1e9) and row.media_of is None
    with pytest.raises(ValueError, match="mine has media_of=ownr, which is no entry"):
        catalogue(tmp_path, {**MINE, "media_of": "ownr"})


def test_the_shipped_sets_that_share_media_are_counted_once(tmp_path):
    found = load_catalogue()
    rows = plan_downloads(found.sets, found, tmp_path, math.inf, None, whole=True)
    shared = {row.name: row.media_of for row in rows if row.media_of}
    assert shared["countix"] == "kinetics" and shared["star"] == "charades-sta" and len(shared) == 8
    assert sum(row.by_hand_gb == 867 for row in rows) == 1
    sums = totals(rows)
    assert sums.automatic + sums.by_hand == len(rows) == 108
    assert sums.automatic_gb + sums.by_hand_fetched_gb == pytest.approx(sum(row.gigabytes for row in rows))
    assert sums.by_hand_gb == pytest.approx(sum(row.by_hand_gb for row in rows))


@pytest.mark.parametrize("tier, least, most", [("small", 400, 500), ("medium", 900, 1000), ("full", 5000, math.inf)])
def test_the_tiers_hold_what_they_say(tier, least, most, tmp_path):
    found = load_catalogue()
    rows = plan_downloads(found.sets, found, tmp_path, TIERS[tier] or math.inf, None, whole=True)
    sums = totals(rows)
    assert least < sums.automatic_gb + sums.by_hand_fetched_gb + sums.by_hand_gb <= most
    assert {"pixmo-cap", "pixmo-count"} <= {row.name for row in rows if row.action == "fetch"}


def test_resized_pictures_bring_stage_1_into_80_gb_and_pixmo_count_comes_round_35_times(tmp_path):
    found = load_catalogue()
    shares = shares_of(found, 1, tmp_path)
    for max_side, left_out in ((None, {"pixmo-cap"}), (600, set())):
        rows = plan_downloads(found.of_stage(1), found, tmp_path, 80 * 10**9, None, max_side=max_side, shares=shares)
        assert {row.name for row in rows if row.action != "fetch"} == left_out
    assert shares["pixmo-count"] == (pytest.approx(0.1), pytest.approx(34.7, abs=0.1))
    # 100,000 steps of 128 rows, each with one sample.
    assert sum(times * found.find([name])[0].samples for name, (_, times) in shares.items()) == pytest.approx(12.8e6)


def test_every_entry_says_whether_it_can_be_had_and_where_its_licence_is():
    entries = load_catalogue().sets
    assert all(entry.source_state and (entry.license or entry.license_page) for entry in entries)
    assert {entry.counts.get("released_rows") for entry in load_catalogue().of_stage(1)} == {
        717042,
        2376222,
        36916,
        68051,
        326154,
    }


def test_who_must_fill_a_form_is_told_where(tmp_path):
    state = {"state": "form", "evidence": "its page", "date": datetime.date(2026, 1, 2)}
    with pytest.raises(ValueError, match="source_state: state form needs the key page"):
        catalogue(tmp_path, {**MINE, "source_state": state})
    [entry] = catalogue(
        tmp_path, {**MINE, "source_state": {**state, "page": "https://a.org"}, "license": "unknown"}
    ).sets
    assert "a form or an account: https://a.org (its page, 2026-01-02)" in how(entry, tmp_path)
    assert entry.license is None
    [row] = listed([entry], tmp_path)
    assert (row.source, row.source_page, row.source_date) == ("form", "https://a.org", "2026-01-02")


def test_list_is_a_table_or_json(tmp_path):
    rows = json.loads(succeeded(python("tools/download.py", "list", "--stage", 1, "--json", "--root", tmp_path)).stdout)
    assert [row["name"] for row in rows] == [entry.name for entry in load_catalogue().of_stage(1)]
    assert {"name", "kind", "examples", "size_gb", "license", "gated", "state"} <= set(rows[0])
    odd = catalogue(tmp_path, MINE, {**MINE, "name": "odd", "fields": None})
    assert [row.state for row in listed(odd.find(["odd", "mine"]), tmp_path)] == ["refused", "-"]


def test_rows_and_media_of_a_raw_folder(tmp_path):
    folder = tmp_path / "raw" / "mine"
    for name in ("hub/data", "media", "extracted/train2014/train2014", "manual/images"):
        (folder / name).mkdir(parents=True)
    url = "http://a.org/1.jpg?x=1"
    (folder / "media" / media_name(url)).parent.mkdir()
    for file in (f"media/{media_name(url)}.png", "extracted/train2014/train2014/c.jpg", "manual/images/1.png"):
        (folder / file).write_bytes(b"x")
    (folder / "hub/data/train-0.jsonl").write_text('{"a": 1, "s": "x"}\n\n{"a": 2, "s": "y"}\n')
    (folder / "hub/data/train-1.json").write_text('[{"a": 3, "s": "x"}]')
    (folder / "hub/data/val-0.csv").write_text('a,s\n4,"x"\n')
    source = RawSource(tmp_path, "mine")
    with pytest.raises(ValueError, match="mine is not fetched: run python tools/download.py fetch mine"):
        list(source.rows())
    note = {"splits": {"train": ["hub/data/train-0.jsonl", "hub/data/train-1.json"], "val": ["hub/data/val-0.csv"]}}
    (folder / "fetched.json").write_text(json.dumps(note))
    assert [int(row["a"]) for row in source.rows()] == [1, 2, 3, 4]
    assert [row["a"] for row in source.rows("train")] == [1, 2, 3]
    with pytest.raises(ValueError, match="mine has no split test: it has train, val"):
        list(source.rows("test"))
    (folder / "fetched.json").write_text(json.dumps(note | {"filter": "s == x", "limit": 2}))
    assert [int(row["a"]) for row in RawSource(tmp_path, "mine").rows()] == [1, 3]
    assert source.media(url) == folder / f"media/{media_name(url)}.png"
    assert source.media("http://a.org/other.jpg") is None
    assert source.media("coco/train2014/c.jpg") == folder / "extracted/train2014/train2014/c.jpg"
    assert source.media("images/1.png") == folder / "manual/images/1.png"
    for outside in ("../mine/manual/images/1.png", "/etc/hostname", "images/../../fetched.json", ""):
        assert source.media(outside) is None
    (folder / "hub/data/train-0.jsonl").write_text('{"a": 1}\n[2]\n')
    with pytest.raises(ValueError, match="train-0.jsonl cannot be read: line 2 is not an object"):
        list(source.rows("train"))


def test_parquet_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="not in requirements.lock yet")
    from pyarrow import parquet

    folder = tmp_path / "raw" / "mine" / "hub"
    folder.mkdir(parents=True)
    rows = [{"image": {"bytes": bytes([n]), "path": None}, "n": n} for n in range(200)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train-0.parquet", row_group_size=50)
    (folder.parent / "fetched.json").write_text(json.dumps({"splits": {"train": ["hub/train-0.parquet"]}}))
    assert list(RawSource(tmp_path, "mine").rows("train")) == rows
    (folder / "train-0.parquet").write_bytes((folder / "train-0.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match="train-0.parquet"):
        list(RawSource(tmp_path, "mine").rows("train"))


def test_rows_that_the_library_datasets_saved_are_read(tmp_path):
    """As save_to_disk writes them: Arrow's stream format."""
    import pyarrow as pa

    table = pa.table({"n": list(range(200)), "s": [str(n) for n in range(200)]})
    with pa.ipc.new_stream(str(tmp_path / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=150)
    assert list(read_rows(tmp_path / "data-00000-of-00001.arrow")) == table.to_pylist()
    (tmp_path / "cut.arrow").write_bytes((tmp_path / "data-00000-of-00001.arrow").read_bytes()[:500])
    with pytest.raises(ValueError, match="cut.arrow cannot be read"):
        list(read_rows(tmp_path / "cut.arrow"))


WRONG = {
    "fetch pixmo-capp": "did you mean pixmo-cap",
    "how qvhighlight": "did you mean qvhighlights",
    "fetch pixmo-cap --jobs 0": "0 is not a whole number above 0",
    "fetch pixmo-cap --jobs -3": "-3 is not a whole",
    "fetch pixmo-cap --limit 1.5": "1.5 is not a whole",
    "fetch pixmo-cap --timeout nan": "nan is not a number",
    "plan --budget lots": "lots is not a size",
    "plan --budget 0": "0 is not above 0",
    "plan --budget 80": "--budget 80 is so many bytes: write the unit, as in 80GB",
    f"plan --budget {'9' * 400}": "is not a size",
    "list --stage 4": "invalid choice: 4",
    "list --category x": "invalid choice: 'x'",
    "list --catalogue /none.yaml": "/none.yaml cannot be read",
    "fetch": "needs names, --stage or --category",
}


def test_what_a_user_gets_wrong_ends_in_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    from download import main

    for words, said in WRONG.items():
        try:
            status = main([*words.split(), "--root", str(tmp_path)])
        except SystemExit as stop:
            status = stop.code
        error = capsys.readouterr().err
        assert status in (1, 2) and said in error.splitlines()[-1], (words, error)


@pytest.mark.slow
def test_json_is_a_list_of_objects(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    from download import main

    catalogue(tmp_path, {**MINE, "name": "odd", "fields": None})
    refused = f"fetch odd --catalogue {tmp_path / 'datasets.yaml'}"
    for words in ("list", "plan --budget 1TB", "how docvqa", "doctor", refused):
        main([*words.split(), "--json", "--root", str(tmp_path)])
        values = json.loads(capsys.readouterr().out)
        assert isinstance(values, list) and all(isinstance(value, dict) for value in values), words


def test_the_help_says_which_commands_need_names(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    import download

    for command in ("list", "plan", "doctor", "fetch", "how", "verify"):
        with pytest.raises(SystemExit):
            download.main([command, "--help"])
        needed = "needed, unless --stage or --category" in " ".join(capsys.readouterr().out.split())
        try:
            download.parse([command])
        except SystemExit:
            assert needed, command
        else:
            assert not needed, command
        capsys.readouterr()
