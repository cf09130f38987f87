"""tools/report.py: what its page shows is what the run logged, and nothing in a run can break it or get out of it."""

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from programs import python, run, succeeded

from molmo2_nemo import report
from molmo2_nemo.report import read_run, sections, write_report

HOSTILE = '</pre></script><script>alert("x")</script><img src=x onerror=y> & $x_{'
COMPONENTS = ("vit", "connector", "llm")


def train(step: int, loss: float = 1.0, **more) -> dict:
    return {"kind": "train", "step": step, "loss": loss, "tokens_seen": 100 * step, "seconds": 2.0, **more}


def validation(step: int, loss: float = 1.0, **more) -> dict:
    return {"kind": "validation", "step": step, "loss": loss, **more}


def write_run(folder: Path, *lines: dict | str, config: str = "") -> Path:
    """A string is a line as it stands, without a line end of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    if config:
        (folder / "config.yaml").write_text(config)
    return folder


def write_answers(run_dir: Path, step: int, entries) -> Path:
    folder = run_dir / "samples" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "answers.json").write_text(json.dumps(entries))
    return folder


def panels(*folders: Path) -> dict[str, report.Panel]:
    runs = [read_run(folder) for folder in folders]
    report.name_runs(runs)
    return {panel.title: panel for _, group in sections(runs) for panel in group}


def points(line: report.Line) -> list[tuple[float, float]]:
    return list(zip(line.x.tolist(), line.y.tolist()))


class Page(HTMLParser):
    """Tags, attributes and text of a page; the rows of its tables."""

    def __init__(self, runs: list[Path], out: Path):
        super().__init__()
        write_report(runs, out)
        self.source, self.tags, self.attributes, self.text, self.rows = out.read_text(), [], [], "", []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag == "table":
            self.rows.append([])  # what follows is in no cell

    def handle_data(self, data):
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def drawn(panel: report.Panel, number: int) -> np.ndarray:
    """[points, 2]: where the SVG of a panel has the points of a line, in its own units, downwards."""
    group = re.search(rf'<g id="line{number}">\s*<path d="([^"]*)"', report.draw(panel))
    return np.array([[float(v) for v in point] for point in re.findall(r"[ML] (\S+) (\S+)", group[1])])


def test_a_drawing_has_the_logged_figures(tmp_path):
    rng = np.random.default_rng(0)
    losses, rates = np.exp(rng.normal(size=40)), rng.random((40, 3))
    lines = [train(10 * i, losses[i], lr=dict(zip(COMPONENTS, rates[i]))) for i in range(40)]
    folder = write_run(tmp_path / "run", *lines, validation(390, 0.5))
    found = panels(folder)
    steps = np.arange(40) * 10.0

    logged, _, held_out = found["weighted loss of a token"].lines
    assert points(logged) == list(zip(steps, losses)) and points(held_out) == [(390, 0.5)]
    assert [line.name for line in found["learning rate"].lines] == list(COMPONENTS)
    for part, line in enumerate(found["learning rate"].lines):
        assert points(line) == list(zip(steps, rates[:, part]))

    # Of all lines of a panel, one scale takes data to the picture: a logarithmic one for the loss.
    for title, values, scale in (
        ("weighted loss of a token", losses[:, None], np.log),
        ("learning rate", rates, np.asarray),
    ):
        x, y = [], []
        for part in range(values.shape[1]):
            picture = drawn(found[title], part)
            x.append(picture[:, 0])
            y.append(picture[:, 1])
        for data, picture in (
            (np.tile(steps, len(x)), np.concatenate(x)),
            (scale(values.T.ravel()), -np.concatenate(y)),
        ):
            slope, offset = np.polyfit(data, picture, 1)
            assert slope > 0
            np.testing.assert_allclose(slope * data + offset, picture, atol=1e-3)


def test_figures_may_come_and_go_and_change_their_form(tmp_path):
    lines = [
        train(1, grad_norm=2.0, mfu=None),
        train(2, grad_norm={"vit": 3.0}, mfu=0.4, unknown={"a": [1]}),
        train(3, grad_norm={"vit": 4.0, "llm": 5.0}, mfu=None),
        {"kind": "checkpoint", "step": 3, "seconds": 7.0, "failed": 0},
        {"kind": "answers", "step": 3, "point_f1": 0.25, "by_task": {"count": 0.5}, "note": "none"},
    ]
    found = panels(write_run(tmp_path / "run", *lines))
    norms = {line.name: points(line) for line in found["gradient norm before clipping"].lines}
    assert norms == {"": [(1, 2)], "vit": [(2, 3), (3, 4)], "llm": [(3, 5)]}
    assert points(found["model FLOPs utilization"].lines[0]) == [(2, 0.4)]
    assert points(found["seconds for a checkpoint"].lines[0]) == [(3, 7)]
    assert points(found["point_f1"].lines[0]) == [(3, 0.25)]
    assert [(line.name, points(line)) for line in found["by_task"].lines] == [("count", [(3, 0.5)])]
    assert "note" not in found and "tokens per second" not in found


@pytest.mark.parametrize("count", [1, 2, 5, 40, 333])
def test_smoothed_is_a_mean_over_neighbours(count):
    values = np.random.default_rng(count).normal(size=count)
    reach = max(1, count // 40)
    expected = []
    for i in range(count):
        left = min(i, reach)
        neighbours = [values[j] for j in range(i - left, i + left + 1) if j < count]
        expected.append(sum(neighbours) / len(neighbours))
    np.testing.assert_allclose(report.smoothed(values), expected, atol=1e-12)


def test_a_long_line_is_thinned_but_keeps_its_peaks():
    x = np.arange(100_000.0)
    y = np.sin(x)
    y[[777, 55_555]] = 9, -9
    few_x, few_y = report.thinned(x, y)
    assert len(few_x) <= report.MAX_POINTS and set(zip(few_x, few_y)) <= set(zip(x, y))
    assert np.all(np.diff(few_x) > 0) and {(777, 9), (55_555, -9)} <= set(zip(few_x, few_y))


def test_a_resumed_run_counts_its_steps_once(tmp_path):
    lines = [
        train(10, 5),
        train(20, 4),
        validation(20, 4),
        {"kind": "checkpoint", "step": 20, "seconds": 1, "failed": 0},
        train(30, 3),
        train(40, 2, data={"a": {"examples": 9}}),
        validation(40, 2),
        train(30, 3.5),
        train(40, 2.5, data={"a": {"examples": 8}}),
        train(50, 1),  # resumed at step 20
        {"kind": "resume", "step": 50},
        train(60, 0.5, data={"a": {"examples": 10}}),
    ]
    folder = write_run(tmp_path / "run", *lines)
    logged, _, held_out = panels(folder)["weighted loss of a token"].lines
    assert points(logged) == [(10, 5), (20, 4), (30, 3.5), (40, 2.5), (50, 1), (60, 0.5)]
    assert points(held_out) == [(20, 4)]
    found = read_run(folder)
    assert found.resumes == [30, 51] and (found.seconds, found.repeated_seconds) == (16, 4)
    assert report.sources_table(found)[0][:2] == ["a", "10"]
    for panel in panels(folder).values():
        assert report.draw(panel).count('id="resume"') == 2


def test_a_resume_without_repeated_steps_drops_nothing(tmp_path):
    lines = [train(10), validation(10), {"kind": "resume", "step": 10}, train(20)]
    found = read_run(write_run(tmp_path / "run", *lines))
    assert [len(found.of(kind)) for kind in ("train", "validation")] == [2, 1] and found.resumes == [11]


def test_a_line_that_is_being_written_is_no_fault(tmp_path):
    folder = write_run(tmp_path / "run", train(10), '{"kind": "train", "step": 20, "los')
    found = read_run(folder)
    assert len(found.of("train")) == 1 and found.unreadable == 0


def test_unreadable_lines_are_counted_and_passed_over(tmp_path):
    odd = [
        "\n",
        "[1]\n",
        "[" * 100_000 + "\n",
        "\x00\xff\n",
        '{"kind": 3, "step": 4}\n',
        '{"kind": "train", "step": "5"}\n',
    ]
    lines = [train(10), '{"kind": "train", "step": 20, "lo', train(30, 0.5), *odd, train(40)]
    folder = write_run(tmp_path / "run", *lines)
    found = read_run(folder)
    assert [record["step"] for record in found.of("train")] == [10, 30, 40]
    assert found.unreadable == 1 + len(odd) - 1  # an empty line is none
    assert ["unreadable lines of metrics.jsonl", "6"] in Page([folder], tmp_path / "report.html").rows


def test_figures_that_are_no_numbers_are_left_out(tmp_path):
    values = ["much", None, True, [1], {"a": {"b": 1}}, float("nan"), float("inf"), 10**400]
    lines = [train(i, value, lr=value, tokens_seen=value, seconds=value, data=value) for i, value in enumerate(values)]
    lines += [
        train(2**70),
        train(100, 2.0, loss_by_source=[1], weight_by_source={"a": "b"}, data={"a": 1, "b": {"examples": "x"}}),
    ]
    folder = write_run(tmp_path / "run", *lines, config="[1, 2]")
    assert points(panels(folder)["weighted loss of a token"].lines[0]) == [(100, 2)]
    rows = Page([folder], tmp_path / "report.html").rows
    assert ["steps", "100"] in rows and ["b", *"\u2013\u2013\u2013\u2013\u2013", "0", "0"] in rows


def test_sources_are_added_up(tmp_path):
    counts = {"examples": 70, "tokens": 9000, "dropped_branches": 5, "dropped_too_long": 2, "dropped_unreadable": 3}
    lines = [
        train(10, loss_by_source={"a": 3.0, "b": 1.0}, weight_by_source={"a": 0.5, "b": 0.5}),
        train(40, loss_by_source={"a": 2.0}, weight_by_source={"a": 1.0}, data={"a": counts, "b": {}, "c": {}}),
        validation(40, loss_by_source={"b": 0.75}),
    ]
    found = read_run(write_run(tmp_path / "run", *lines))
    nothing = "\u2013"
    assert report.sources_table(found) == [
        ["a", "70", "9,000", "87.5%", "2", nothing, "5", "3"],  # (10 * 0.5 + 30 * 1) / 40
        ["b", nothing, nothing, "12.5%", "1", "0.75", "0", "0"],
        ["c", nothing, nothing, nothing, nothing, nothing, "0", "0"],
    ]


def test_facts_of_a_run(tmp_path):
    config = (
        "{stage: stage2, name: try, model: {name: tiny}, train: {max_steps: 60, device: auto}, "
        "parallel: {tensor_model_parallel_size: 2, pipeline_model_parallel_size: 1, context_parallel_size: 2, "
        "sequence_parallel: true}}"
    )
    lines = [
        train(10, tokens_per_second=50.0),
        train(20, 0.25, tokens_per_second=70.0, skipped_steps=1),
        validation(20, 0.375),
    ]
    folder = write_run(tmp_path / "run", *lines)
    checkpoint = folder / "checkpoints" / "step_00000020"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.yaml").write_text(config)
    assert ["ended", "not yet, or it was killed"] in Page([folder], tmp_path / "report.html").rows
    (folder / "versions.json").write_text('{"device": "H200", "torch": "2.11", "ranks": 8}')
    (folder / "ended.json").write_text('{"reason": "SIGTERM", "step": 20}')
    page = Page([folder], tmp_path / "report.html")
    expected = {
        "stage": "stage2",
        "model": "tiny",
        "layout": "TP 2 + SP, PP 1, CP 2, DP 2",
        "device": "H200",
        "software": "torch 2.11",
        "steps": "20 of 60",
        "loss": "0.25",
        "held-out loss": "0.375",
        "tokens": "2,000",
        "tokens per second, median": "60",
        "time in training steps (h:m:s)": "0:00:04",
        "skipped steps": "1",
        "ended": "SIGTERM at step 20",
    }
    assert {row[0]: row[1] for row in page.rows if len(row) == 2} == expected
    assert "try, stage2" in page.text and config in page.text


def test_texts_of_a_run_are_shown_and_not_obeyed(tmp_path):
    figures = {"loss_by_source": {HOSTILE: 1.0, "_x": 2.0}, "lr": {HOSTILE: 1.0}, "data": {HOSTILE: {"examples": 1}}}
    config = json.dumps({"name": HOSTILE, "stage": HOSTILE, "model": {"name": HOSTILE}, HOSTILE: 1})
    runs = []
    for name in ("one", "<b>two"):
        folder = write_run(
            tmp_path / name, train(1, **figures), {"kind": HOSTILE, "step": 2, HOSTILE: 1}, config=config
        )
        (folder / "ended.json").write_text(json.dumps({"reason": HOSTILE, "step": HOSTILE, "message": HOSTILE}))
        (folder / "versions.json").write_text(json.dumps({"device": HOSTILE, "torch": HOSTILE}))
        write_answers(
            folder, 2, [{"picture": HOSTILE, "question": HOSTILE, "answer": HOSTILE, "label": HOSTILE, "correct": True}]
        )
        runs.append(folder)
        config = config.replace('"stage"', '"stages"')
    for chosen in (runs[:1], runs):
        page = Page(chosen, tmp_path / "report.html")
        assert {"script", "img", "b"}.isdisjoint(page.tags) and page.tags.count("pre") == len(chosen)
        assert page.text.count(HOSTILE) >= 10 * len(chosen)
        assert not any(name.startswith("on") for name, _ in page.attributes)


def test_the_page_needs_nothing_else(tmp_path):
    folder = write_run(tmp_path / "run", train(1), train(2), validation(2))
    page = Page([folder], tmp_path / "report.html")
    assert page.tags.count("svg") > 0 and {"script", "link", "iframe", "object"}.isdisjoint(page.tags)
    outside = [
        v
        for name, v in page.attributes
        if name in ("src", "href", "xlink:href") and not v.startswith(("#", "data:image/png;"))
    ]
    assert outside == [] and re.findall(r"@import|url\((?!#)", page.source) == []


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(file, "PNG")
    return file.getvalue()


def test_pictures_come_from_below_the_run(tmp_path):
    folder = write_run(tmp_path / "run", train(1))
    (tmp_path / "secret.png").write_bytes(png("red"))
    other = tmp_path / "run2"
    other.mkdir()
    (other / "secret.png").write_bytes(png("red"))
    names = [
        "good.png",
        "link.png",
        "../../../secret.png",
        str(tmp_path / "secret.png"),
        "../../../run2/secret.png",
        "text.png",
        "large.png",
        "gone.png",
        ".",
        "",
        None,
        7,
    ]
    samples = write_answers(
        folder, 5, [{"picture": name, "answer": f"answer {i}"} for i, name in enumerate(names)] + ["no entry"]
    )
    (samples / "good.png").write_bytes(png("green"))
    (samples / "link.png").symlink_to(tmp_path / "secret.png")
    (samples / "text.png").write_text("no picture")
    (samples / "large.png").write_bytes(png("red") + bytes(report.MAX_PICTURE))
    (folder / "samples" / "step_00000006").symlink_to(samples.parent.parent.parent / "run2")
    (other / "answers.json").write_text('[{"answer": "from elsewhere"}]')
    page = Page([folder], tmp_path / "report.html")
    found = [base64.b64decode(v.split(",")[1]) for name, v in page.attributes if name == "src"]
    assert found == [png("green")]
    assert all(f"answer {i}" in page.text for i in range(len(names))) and "from elsewhere" not in page.text
    assert "8 pictures were left out" in page.text


def test_answers_of_the_newest_steps_say_whether_they_are_right(tmp_path):
    folder = write_run(tmp_path / "run", train(1))
    steps = list(range(10, 10 * report.MAX_STEPS + 11, 10))
    for step in steps:
        correct = {steps[-1]: True, steps[-2]: False}.get(step)
        write_answers(folder, step, [{"answer": f"said at {step}", "label": "seven", "correct": correct}])
    write_answers(folder, 900, {"not": "a list"})
    page = Page([folder], tmp_path / "report.html")
    assert re.findall(r"said at (\d+)", page.text) == [str(step) for step in reversed(steps[1:])]
    assert [value for name, value in page.attributes if value in ("right", "wrong")] == ["right", "wrong"]
    assert re.findall(r"label: seven (.*)", page.text)[:3] == ["(right)", "(wrong)", ""]


def test_runs_are_compared(tmp_path):
    config = "{{name: a, train: {{max_steps: 2, seed: {}}}, data: {{blend: x}}{}}}"
    one = write_run(tmp_path / "runs/a/stage1", train(1, lr={"vit": 1.0}), train(2, 0.5), config=config.format(1, ""))
    lines = [train(1, lr={"vit": 2.0, "llm": 3.0}), train(3, 0.75), train(2, 0.25)]
    two = write_run(tmp_path / "runs/b/stage1", *lines, config=config.format(2, ", extra: 7"))
    found = panels(one, two)
    loss = found["weighted loss of a token"].lines
    assert [points(line) for line in loss if line.style == "faint"] == [[(1, 1), (2, 0.5)], [(1, 1), (2, 0.25)]]
    assert [line.colour for line in loss] == [report.COLOURS[0]] * 2 + [report.COLOURS[1]] * 2
    assert points(found["the same over tokens"].lines[2]) == [(100, 1), (200, 0.25)]
    assert [points(line) for line in found["learning rate: vit"].lines] == [[(1, 1)], [(1, 2)]]
    assert [(line.colour, points(line)) for line in found["learning rate: llm"].lines] == [
        (report.COLOURS[1], [(1, 3)])
    ]
    assert found["learning rate: vit"].resumes == [(2, report.COLOURS[1])]

    page = Page([one, two, one], tmp_path / "report.html")
    assert ["", "a/stage1", "b/stage1"] in page.rows and ["loss", "0.5", "0.25"] in page.rows
    keys = page.rows.index(["key", "a/stage1", "b/stage1"])
    assert page.rows[keys + 1 : keys + 4] == [["extra", "\u2013", "7"], ["train.seed", "1", "2"], []]


def test_many_runs_have_a_colour_each(tmp_path):
    runs = [read_run(write_run(tmp_path / str(i), train(1))) for i in range(30)]
    assert len(set(report.colours(runs))) == 30


def test_wrong_input_is_refused_in_one_sentence(tmp_path):
    good = write_run(tmp_path / "good", train(1))
    cases = {
        "has no metrics.jsonl": [tmp_path / "nothing"],
        "has no training step yet": [good, write_run(tmp_path / "empty", validation(1), '{"kind": "train"')],
        "is a folder": [good, "--out", tmp_path],
    }
    for message, arguments in cases.items():
        result = python("tools/report.py", *arguments)
        assert result.returncode == 2 and result.stdout == ""
        assert re.fullmatch(rf"error: .*{re.escape(message)}.*\n", result.stderr)
    assert not list(tmp_path.rglob("*.html")) + list(tmp_path.rglob("*.tmp"))


def test_the_tool_writes_beside_the_run(tmp_path):
    folder = write_run(tmp_path / "run", train(1))
    result = succeeded(python("tools/report.py", folder))
    assert result.stdout == f"open {folder / 'report.html'}\n" and "<svg" in (folder / "report.html").read_text()


def test_needs_no_torch():
    succeeded(run([sys.executable, "-c", "import molmo2_nemo.report, sys; assert 'torch' not in sys.modules"]))


def test_a_configuration_cannot_grow(tmp_path):
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
    )
    folder = write_run(tmp_path / "run", train(1), config=bomb)
    assert read_run(folder).config == {}
