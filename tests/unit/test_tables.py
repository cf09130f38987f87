"""Tables of annotations, CSV and parquet: names of columns as people write them, and what is said of a bad row."""

import pyarrow
import pyarrow.parquet
import pytest
from own_pictures import examples, make_pictures, pointed, read_file

from molmo2_nemo.data.schema import Message

ASKED = [Message("user", "What is it?"), Message("assistant", "A cat.")]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("own") / "pictures").resolve()


POINTS_TABLE = (
    "file;class;px;py\ncat.jpg;eye;45.1;30\ncat.jpg;eye;90.2;30\ncat.jpg;dog;;\ndeep/turned.jpg;cup;200;300\n"
)
COLUMNS = {"image": "file", "label": "class", "x": "px", "y": "py"}


def test_tables_of_text(pictures, tmp_path):
    file = tmp_path / "points.csv"
    file.write_text(POINTS_TABLE)
    cat, cup = examples(pictures, file, columns=COLUMNS, unit="pixels")
    assert pointed(cat.branches) == {"eye": [(0.1, 0.1), (0.2, 0.1)], "dog": []}
    assert pointed(cup.branches) == {"cup": [(0.5, 0.5)]}
    with pytest.raises(
        ValueError,
        match="has the columns file, class, px, py .its first line., and none is called .*--columns image=file",
    ):
        read_file(pictures, file)
    with pytest.raises(ValueError, match="has no column name .--columns., but file, class"):
        read_file(pictures, file, columns=COLUMNS | {"label": "name"})
    file.write_text('\ufeffimage,question,answer\ncat.jpg,"What, then?",A cat.\ncat.jpg,Why?,\n', encoding="utf-8")
    (_, example), (outcome, _) = read_file(pictures, file)
    assert (example.branches[0].question, example.branches[0].answers) == ("What, then?", ["A cat."])
    assert (outcome.place, outcome.mistakes) == ("line 3", ["answer is empty"])
    file.write_text("image\ttext\ncat.jpg\tA cat.\n")
    assert examples(pictures, file)[0].branches[0].text == "A cat."


def test_mistakes_in_a_table_are_of_one_picture_each(pictures, tmp_path):
    file = tmp_path / "points.csv"
    bad = POINTS_TABLE.replace("45.1", "45,1").replace("dog;;", "dog;7;").replace("eye;90.2", ";90.2")
    file.write_text(bad + "deep/turned.jpg;cup;9\n;;;\n\ncat.jpg;eye;90.2;30;;;\n")
    found = read_file(pictures, file, columns=COLUMNS, unit="pixels")
    # All bad rows of a picture; the picture is left out, as nobody would know what is missing in it.
    assert [(outcome.place, outcome.form) for outcome, _ in found] == [(f"line {k}", "table") for k in (2, 3, 4, 5, 6)]
    left_out = '; the other rows of "cat.jpg" (1) are left out with it'
    assert [mistake for outcome, _ in found for mistake in outcome.mistakes] == [
        f'x = "45,1" is not a number, with a point before its decimals{left_out}',
        f"label is empty{left_out}",
        f"it has x and no y: write both, or none if there is nothing to point at{left_out}",
        "it has 3 cells, fewer than the first line has columns, 4: an empty cell needs its delimiter",
    ]
    assert pointed(found[3][1].branches) == {"cup": [(0.5, 0.5)]}
    # What the sentences advise.
    file.write_text(POINTS_TABLE + "deep/turned.jpg;cat;;\n")
    assert len(examples(pictures, file, columns=COLUMNS, unit="pixels")) == 2
    for rows, reason in (
        (
            "image,text\ncat.jpg,A cat, asleep.\ncat.jpg,A cat.",
            "it has 3 cells, more than the first line has columns, 2",
        ),
        ("image,text,text\ncat.jpg,A cat.,B\n", 'the column "text" twice'),
        ("cat.jpg,A cat.\n", "no rows below its first line, which must name the columns"),
        ("file,caption\ncat.jpg,A cat.\n", "--columns image=file text=caption"),
        ("text\nA cat.\n", "none is called image or video"),
        ("", "points.csv is empty"),
    ):
        file.write_text(rows)
        try:
            [(outcome, _), (_, example)] = read_file(pictures, file)
            [said] = outcome.mistakes
            assert example
        except ValueError as error:
            said = str(error)
        assert reason in said
    file.write_text('image,text\ncat.jpg,"A cat, asleep."\n')
    assert examples(pictures, file)[0].branches[0].text == "A cat, asleep."
    file.write_text("file,caption\ncat.jpg,A cat.\n")
    assert examples(pictures, file, columns={"image": "file", "text": "caption"})


@pytest.mark.parametrize("header", ["Image, Label,X ,Y,", '" image",LABEL,x,y,note', "file_name,label,x,y,id"])
def test_names_of_columns_as_people_write_them(pictures, tmp_path, header):
    (tmp_path / "points.csv").write_text(f"{header}\ncat.jpg,eye,0.1,0.2,7\n")
    [(outcome, example)] = read_file(pictures, tmp_path / "points.csv")
    assert pointed(example.branches) == {"eye": [(0.1, 0.2)]}
    name = header.rpartition(",")[2]
    assert outcome.notes == [f"the column {name} is not used" if name else "a column without a name is not used"]


CHOICES = [
    ("A,B,C,answer", "red,green,blue,B", 1),
    ("A,B,C,answer", "red,green,blue,(c)", 2),
    ("A,B,C,answer", "red,green,,Green", None),
    ("A,B,C,answer", "red,green,,green", 1),  # a question with fewer options
    ("A,B,C,answer", "red,,blue,A", "the option in the column B is empty"),
    ("Answer,option_a,option_b", "a,red,green", 0),
    ("answer,options1,options2", "2,red,green", 1),
    ("answer,choice 0,choice 1", "1,red,green", 1),
    (
        "A,B,answer",
        "red,green,C",
        'answer = "C" is none of the options A to B: write its letter or number, or its text',
    ),
    ("A,B,answer", "B,A,B", "one option by its letter or number and one by its text: write its letter"),
    ("A,B,answer", "B,A,(B)", 1),  # what that sentence advises
]


@pytest.mark.parametrize("columns, cells, expected", CHOICES)
def test_options_in_columns(pictures, tmp_path, columns, cells, expected):
    (tmp_path / "asked.csv").write_text(f"image,question,{columns},hint\ncat.jpg,Which?,{cells},none\n")
    [(outcome, example)] = read_file(pictures, tmp_path / "asked.csv")
    if isinstance(expected, int):
        [task] = example.branches
        assert (task.task, task.question, task.answer) == ("multiple_choice", "Which?", expected)
        options = [
            cell for name, cell in zip(columns.split(","), cells.split(",")) if name.lower() != "answer" and cell
        ]
        assert task.options == options and outcome.notes == ["the column hint is not used"]
    else:
        assert (expected or "is none of the options") in outcome.mistakes[0]


def test_parquet(pictures, tmp_path):
    """As Hugging Face `datasets` writes pictures: the bytes of the file, and its name."""
    data = (pictures / "cat.jpg").read_bytes()
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    tables = {
        "talks": {"image": [{"bytes": data, "path": "a.jpg"}], "conversations": [talk]},
        "captions": {"image": [{"bytes": data, "path": None}], "caption": ["A cat."]},
        "named": {"image": ["cat.jpg"], "caption": ["A cat."]},
        "points": {"image": ["cat.jpg"] * 2, "label": ["eye"] * 2, "x": [0.1, 0.2], "y": [0.1, 0.1]},
    }
    found = {}
    for name, columns in tables.items():
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
        named = {"text": "caption"} if "caption" in columns else None
        [(outcome, found[name])] = read_file(pictures, tmp_path / f"{name}.parquet", columns=named)
        assert outcome.sample.files[0][1].read_bytes() == data
    assert found["talks"].branches == [ASKED]
    assert found["captions"].branches[0].text == found["named"].branches[0].text == "A cat."
    assert pointed(found["points"].branches) == {"eye": [(0.1, 0.1), (0.2, 0.1)]}
    # No number is none, and options are a list with an index, a letter or one of them.
    nothing = {"image": ["cat.jpg"], "label": ["dog"], "x": [float("nan")], "y": [None]}
    options = {"image": ["cat.jpg"] * 3, "question": ["Which?"] * 3, "options": [["cat", "dog"]] * 3}
    pyarrow.parquet.write_table(pyarrow.table(nothing), tmp_path / "nothing.parquet")
    assert pointed(examples(pictures, tmp_path / "nothing.parquet")[0].branches) == {"dog": []}
    for answers in ([1, 1, 0], ["B", "dog", "A"], [1.0, 1.0, 0.0]):
        pyarrow.parquet.write_table(pyarrow.table(options | {"answer": answers}), tmp_path / "options.parquet")
        found = examples(pictures, tmp_path / "options.parquet")
        assert [example.branches[0].answer for example in found] == [1, 1, 0]


def test_the_unit_of_a_table_is_an_option(pictures, tmp_path):
    file = tmp_path / "points.csv"
    file.write_text("image,label,x,y\ncat.jpg,eye,90.2,150\n")
    assert read_file(pictures, file)[0][0].mistakes[0].endswith("If not, give --unit pixels")
    assert pointed(examples(pictures, file, unit="pixels")[0].branches) == {"eye": [(0.2, 0.5)]}
    file.write_text("image,label,x,y,unit\ncat.jpg,eye,90.2,150,fraction\n")
    assert read_file(pictures, file)[0][0].mistakes[0].endswith("write pixels into the column unit")


def test_points_of_a_table_are_counted_from_one(pictures, tmp_path):
    file = tmp_path / "points.csv"
    file.write_text("image,label,x,y\ncat.jpg,eye,0.2,0.5\ncat.jpg,eye,0.2,0.5\n")
    [mistake] = read_file(pictures, file)[0][0].mistakes
    assert mistake.startswith('point 2 of "eye" = [0.2, 0.5] is point 1 again')


@pytest.mark.parametrize("path, said", [("mine.jpg", "mine.jpg"), (None, "picture in the column image.jpg")])
def test_a_picture_inside_of_a_table_is_named_as_its_writer_does(pictures, tmp_path, path, said):
    data = (pictures / "cut.jpg").read_bytes()
    table = {"image": [{"bytes": data, "path": path}], "text": ["A cat."]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "captions.parquet")
    [(outcome, _)] = read_file(pictures, tmp_path / "captions.parquet")
    assert outcome.mistakes[0].startswith(f'image = "{said}": The image cannot be decoded')
