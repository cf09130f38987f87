"""tools/ask.py: what it can be asked, and one sentence for whatever it cannot."""

import io
import json
import re
import shutil
import threading
import urllib.error
import urllib.request

import ask
import av
import numpy as np
import pytest
from media_files import film, scene
from PIL import Image

from molmo2_nemo.ask import drawing, model, web
from molmo2_nemo.ask.model import Asker, Reply, Seen
from molmo2_nemo.ask.requests import read_request
from molmo2_nemo.data.points import Tracks, format_tracks

SHORT = ["--device", "cpu", "--max-new-tokens", "3"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of pictures and videos, some of them broken."""
    folder = tmp_path_factory.mktemp("media")
    scene().save(folder / "picture.png")
    scene(40, 90).save(folder / "other.jpg")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(folder / "float.tiff")
    (folder / "clip.mp4").write_bytes(film())
    (folder / "cut.mp4").write_bytes(film()[:900])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "good.jsonl").write_text('{"question": "q"}')
    return folder


class Answers(list):
    asked: list[list[dict]]


@pytest.fixture
def said(monkeypatch):
    """What the model says, in the place of what random weights do: a list of answers, used up in turn."""
    answers = Answers()
    answers.asked = []

    def answer(self, messages, seen, max_new_tokens, streamer=None):
        self.inputs(messages, seen)
        answers.asked.append([dict(message) for message in messages])
        return Reply(answers.pop(0), False)

    monkeypatch.setattr(Asker, "answer", answer)
    return answers


@pytest.fixture(scope="module")
def loaded(export):
    asker = Asker(export, "cpu")
    asker.load()
    return asker


@pytest.fixture(autouse=True)
def load_once(monkeypatch, export, loaded):
    """One model for all tests of this file."""
    original = Asker.__init__

    def init(self, folder, device=None, report=lambda text: None):
        if folder == export and device == "cpu":
            self.__dict__.update(loaded.__dict__)
        else:
            original(self, folder, device, report)

    monkeypatch.setattr(Asker, "__init__", init)


def run(capsys, *arguments):
    """(status, standard output, standard error) of a command in this process."""
    status = 0
    try:
        ask.main([str(argument) for argument in arguments])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=ask.sys.stderr)
    return status, *capsys.readouterr()


@pytest.mark.slow
@pytest.mark.parametrize(
    "about",
    [[], ["--image", "picture.png"], ["--image", "picture.png", "--image", "other.jpg"], ["--video", "clip.mp4"]],
    ids=["text", "picture", "pictures", "video"],
)
def test_random_weights_answer_a_conversation(about, files, export, capsys):
    about = [files / word if "." in word else word for word in about]
    status, out, error = run(capsys, export, *SHORT, *about, "What is it?", "And then?", "--system", "Be brief.")
    assert status == 0, error
    assert error.count("cut off: allow it more with --max-new-tokens") == 2 and out.count("\n") >= 2


def test_a_conversation_keeps_its_answers_and_its_system_prompt(files, export, said, capsys):
    said += ["A circle.", "Blue."]
    status, out, _ = run(
        capsys, export, *SHORT, "--image", files / "picture.png", "What?", "Which colour?", "--system", "S"
    )
    assert status == 0 and out == "A circle.\nBlue.\n"
    roles = [(message["role"], message["content"]) for message in said.asked[1]]
    assert roles == [("system", "S"), ("user", "What?"), ("assistant", "A circle."), ("user", "Which colour?")]


@pytest.mark.parametrize(
    "pictures, questions, asked",
    [
        (["picture.png"], ["<image>\nWhat?"], ["What?"]),
        (["picture.png", "other.jpg"], ["Is <image> red?", "And <image>?"], ["Is Image 1 red?", "And Image 2?"]),
        (["picture.png"], ["What?", "Is a circle in <image> there?"], ["What?", "Is a circle in the image there?"]),
    ],
)
def test_placeholders_are_taken_out_as_for_training(pictures, questions, asked, files, export, said, capsys):
    said += ["One."] * len(questions)
    about = [word for name in pictures for word in ("--image", files / name)]
    assert run(capsys, export, *SHORT, *about, *questions)[0] == 0
    assert [message["content"] for message in said.asked[-1] if message["role"] == "user"] == asked
    record = {"images": pictures, "messages": [{"role": "user", "content": questions[0]}]}
    if len(questions) == 1:
        assert read_request(record, files).messages[0]["content"] == asked[0]


def test_questions_come_from_standard_input(files, export, said, capsys, monkeypatch):
    said += ["One.", "Two."]
    monkeypatch.setattr("sys.stdin", io.StringIO("First?\n\nSecond?\n"))
    assert run(capsys, export, *SHORT)[1] == "One.\nTwo.\n" and len(said.asked[1]) == 3


def test_two_models_are_compared(files, export, said, capsys):
    said += ["Yes.", "No."]
    status, out, _ = run(capsys, export, *SHORT, "--compare", export, "Is it?")
    assert status == 0 and out == f"{export}: Yes.\n{export}: No.\n"


# --- what cannot be asked ---------------------------------------------------------------------------------------------

# Arguments after the model -> the sentence. {files} is the folder above.
WRONG = {
    "no such picture": (["--image", "{files}/none.png", "q"], "none.png cannot be read: No such file or directory"),
    "a folder": (["--image", "{files}", "q"], "is a folder: name a file of it, or take --web"),
    "no picture": (["--image", "{files}/text.png", "q"], "text.png: The image cannot be decoded"),
    "nothing in it": (["--image", "{files}/empty.png", "q"], "empty.png: The image cannot be decoded"),
    "floating-point": (["--image", "{files}/float.tiff", "q"], "of which none is said to be white"),
    "a video as a picture": (["--image", "{files}/clip.mp4", "q"], "clip.mp4 is a video: give it with --video"),
    "a picture as a video": (["--video", "{files}/picture.png", "q"], "picture.png is a picture: give it with --image"),
    "half a video": (["--video", "{files}/cut.mp4", "q"], "cut.mp4: The video"),
    "picture and video": (["--image", "{files}/picture.png", "--video", "{files}/clip.mp4", "q"], "or about one"),
    "two videos": (["--video", "a.mp4", "--video", "b.mp4", "q"], "about one video"),
    "an address": (["--image", "https://x/a.png", "q"], "https://x/a.png is an address, and none is fetched: download"),
    "more placeholders than pictures": (["--image", "{files}/picture.png", "<image> <image>?"], "<image> 2 times, and"),
    "a placeholder without a picture": (["<image>?"], "have <image> 1 times, and there are 0 images"),
    "a placeholder of others": (["Is <box> there?"], "a text holds <box>, which stands for nothing here: remove it"),
    "out into no folder": (["--batch", "{files}/good.jsonl", "--out", "/nowhere/a"], "there is no folder /nowhere"),
    "out is a folder": (["--batch", "{files}/good.jsonl", "--out", "{files}"], "cannot be written: Is a directory"),
    "empty question": ([" "], "a text of the role user is empty"),
    "a token of the model": (["--image", "{files}/picture.png", "<im_patch>?"], "a text spells <im_patch>, which"),
    "a placeholder": (["--image", "{files}/picture.png", "<|image|>"], "a text spells <|image|>, which"),
    "not UTF-8": (["caf\udce9"], "is not valid UTF-8"),
    "no tokens": (["--max-new-tokens", "0", "q"], "--max-new-tokens: 0 is no whole number above 0"),
    "tokens in words": (["--max-new-tokens", "many", "q"], "many is no whole number above 0"),
    "no frames a second": (["--max-fps", "nan", "q"], "--max-fps: nan is no number above 0"),
    "more frames than positions": (["--video", "{files}/clip.mp4", "q " * 3000], "and the model has 2,048 positions"),
    "drawing of nothing": (["--draw", "a.png", "q"], "nothing to draw on without --image or --video"),
    "drawing of an unknown kind": (["--image", "{files}/picture.png", "--draw", "a.gif", "q"], "ending .png or .mp4"),
    "a picture as MP4": (["--image", "{files}/picture.png", "--draw", "a.mp4", "q"], "give it the ending .png"),
    "drawing into no folder": (["--image", "{files}/picture.png", "--draw", "/nowhere/a.png", "q"], "no folder /"),
    "batch and question": (["--batch", "{files}/b.jsonl", "q"], "--batch has the questions and their files"),
    "no such batch": (["--batch", "{files}/b.jsonl"], "b.jsonl cannot be read: No such file"),
    "out without batch": (["--out", "a.jsonl", "q"], "--out is for the answers of --batch"),
    "page without files": (["--web"], "--web has nothing to show"),
    "page of nothing": (["--web", "--image", "{files}/none"], "none is not there"),
    "port": (["--web", "--port", "99999"], "--port 99999: a port is a number from 0 to 65535"),
    "unknown GPU": (["--device", "cuda", "q"], "torch finds no GPU here; leave --device out"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_mistake_is_one_sentence(kind, files, export, capsys, monkeypatch):
    weights_loaded = []
    monkeypatch.setattr(Asker, "load", lambda self: weights_loaded.append(self))
    arguments, sentence = WRONG[kind]
    before = [] if "--device" in arguments else ["--device", "cpu"]
    status, out, error = run(capsys, export, *before, *(word.format(files=files) for word in arguments))
    last = error.strip().splitlines()[-1]
    assert status in (1, 2) and out == "" and sentence in last and "Traceback" not in error
    assert not weights_loaded  # it is said before that, which takes minutes
    assert re.match(r"(\S+: )?error: ", last)


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda folder: shutil.rmtree(folder), "is not a folder: export a checkpoint with tools/export_hf.py"),
        (lambda folder: (folder / "config.json").unlink(), "holds no model of transformers"),
        (lambda folder: (folder / "config.json").write_text("{"), "holds no model of transformers"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "llava"}'),
            "of the type llava, not molmo2",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"half"), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded"),
        (lambda folder: (folder / "processor_config.json").write_text("]"), "cannot be loaded"),
    ],
    ids=["none", "no config", "broken config", "another model", "weights", "tokenizer", "processor"],
)
def test_a_folder_without_a_model_is_one_sentence(damage, sentence, export, tmp_path, capsys):
    folder = tmp_path / "export"
    shutil.copytree(export, folder)
    damage(folder)
    status, _, error = run(capsys, folder, "--device", "cpu", "q")
    last = error.strip().splitlines()[-1]
    assert status == 1 and last.startswith(f"error: {folder}") and sentence in last


def test_missing_weights_are_not_drawn_at_random(export, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "export"
    shutil.copytree(export, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("att_proj.weight") or "q_proj.weight" in name)]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    status, _, error = run(capsys, folder, "--device", "cpu", "q")
    assert status == 1 and "lacks weights" in error.strip().splitlines()[-1]


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_goes_on_where_it_was_stopped(files, export, said, capsys):
    lines = [
        {"image": "picture.png", "question": "Where?", "answer": "here"},
        {"images": ["picture.png", "other.jpg"], "question": "Which?", "id": 7},
        {"video": "none.mp4", "question": "When?"},
        {"messages": [{"role": "user", "content": "Why?"}], "system": "S"},
        {"video": "clip.mp4", "messages": [{"role": "user", "content": "Why?"}], "answer": "no"},
    ]
    batch, out = files / "batch.jsonl", files / "out.jsonl"
    batch.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    said += ["Here.", "The first."]
    with pytest.raises(IndexError):  # the third answer is missing: the program is stopped in the middle
        said_before = list(said)
        run(capsys, export, *SHORT, "--batch", batch, "--out", out)
    assert said_before == ["Here.", "The first."]
    out.write_text(out.read_text() + '{"video": "no')
    said.append("Yes.")
    status, _, error = run(capsys, export, *SHORT, "--batch", batch, "--out", out)
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert status == 1 and [result.get("said") for result in results] == ["Here.", "The first.", None, None, "Yes."]
    assert all({**result, **line} == result for result, line in zip(results, lines))
    assert "none.mp4 cannot be read" in results[2]["error"] and "begin messages with" in results[3]["error"]
    assert "1 of 2 right" in error and "2 of 5 questions have no answer" in error
    # Finished: nothing is asked again. Other questions are not mixed with these.
    assert run(capsys, export, *SHORT, "--batch", batch, "--out", out)[0] == 1 and not said
    batch.write_text(json.dumps(lines[1]) + "\n")
    status, _, error = run(capsys, export, *SHORT, "--batch", batch, "--out", out)
    assert status == 1 and "has answers of another model or to other questions" in error


def test_answers_can_be_asked_again(files, export, said, capsys):
    """What an earlier batch has written is replaced, and a second run finds its own answers."""
    batch, out = files / "again.jsonl", files / "again_out.jsonl"
    line = {"question": "Where?", "said": "There.", "error": "none", "model": "old"}
    batch.write_text(json.dumps(line) + "\n" + json.dumps({"image": "clip.mp4", "question": "Who?"}))
    said.append("Here.")
    for _ in range(2):
        status, _, error = run(capsys, export, *SHORT, "--batch", batch, "--out", out)
        assert status == 1 and f"{batch} has the keys said, error, model, which the answers replace" in error
        first, second = map(json.loads, out.read_text().splitlines())
        assert first == {"question": "Where?", "said": "Here.", "model": str(export)}
        assert second["error"].endswith('clip.mp4 is a video: give it with the key "video"')


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "is empty"),
        ("{'question': 1}", "line 1: it is not JSON"),
        ('{"question": "a"}\n7', "line 2: it is not a JSON object"),
        ("[1]", "entry 1: it is not a JSON object"),
        ('[{"question": "a"}', "it is not JSON"),
    ],
)
def test_a_file_that_is_no_batch_is_one_sentence(text, sentence, export, tmp_path, capsys):
    (tmp_path / "b.json").write_text(text)
    status, _, error = run(capsys, export, *SHORT, "--batch", tmp_path / "b.json")
    assert status == 1 and sentence in error and error.startswith("error: ")


@pytest.mark.parametrize(
    "record, sentence",
    [
        ({}, "a question, or messages"),
        ({"question": "a", "messages": []}, "not both"),
        ({"question": 3}, "question and system are texts"),
        ({"question": ""}, "is empty"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the last one a question"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "the last one a"),
        ({"messages": [{"role": "user", "text": "a"}]}, "messages are"),
        ({"question": "a", "image": "a", "video": "b"}, "one of them is enough"),
        ({"question": "a", "image": ["a"]}, "image names no file"),
        ({"question": "a", "images": "a"}, "images names no file"),
        ({"question": "a", "image": "s3://b/a.png"}, "s3://b/a.png is an address"),
        ({"question": "<video>?"}, "<video> 1 times, and there are 0 videos"),
    ],
)
def test_a_wrong_record_is_one_sentence(record, sentence, export, tmp_path, said, capsys):
    (tmp_path / "b.jsonl").write_text(json.dumps(record))
    status, out, error = run(capsys, export, *SHORT, "--batch", tmp_path / "b.jsonl")
    assert status == 1 and sentence in json.loads(out)["error"] and "Traceback" not in error


# --- drawing ----------------------------------------------------------------------------------------------------------

TEXT = 'Two: <points coords="1 1 100 200 2 900 800">dots</points>'


def differing(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max(axis=2) > 40


def test_points_are_drawn_where_the_answer_says(files, export, said, capsys, tmp_path):
    said.append(TEXT)
    run(capsys, export, *SHORT, "--image", files / "picture.png", "--draw", tmp_path / "a.png", "Where?")
    drawn, plain = np.array(Image.open(tmp_path / "a.png")), np.array(scene().resize((300, 200), Image.NEAREST))
    assert drawn.shape == plain.shape  # a small picture is enlarged
    changed = differing(drawn, plain)
    for x, y in ((0.1, 0.2), (0.9, 0.8)):
        assert changed[round(y * 199), round(x * 299)]
    assert not changed[100:, :150].any() and changed.mean() < 0.05


def test_points_of_several_pictures_are_drawn_side_by_side(files, loaded, tmp_path):
    seen = loaded.see([files / "picture.png", files / "other.jpg"], None)
    text = '<points coords="1 1 500 500;2 2 500 500 3 700 700;3 4 100 100">dots</points>'
    left_out = ["1 left out, of pictures that were not given, which are 2"]
    assert drawing.draw(text, seen, None, tmp_path / "a.png") == (3, left_out)
    assert Image.open(tmp_path / "a.png").size[0] > 300


def test_tracks_move_with_the_video(files, loaded, tmp_path):
    text = format_tracks(Tracks("ball", [(0.0, [("a", 0.1, 0.5)]), (0.5, [("a", 0.3, 0.5)]), (2.5, [("a", 0.9, 0.5)])]))
    seen = loaded.see([], files / "clip.mp4")
    assert drawing.draw(text, seen, files / "clip.mp4", tmp_path / "a.mp4") == (3, [])
    drawing.draw("no points", seen, files / "clip.mp4", tmp_path / "plain.mp4")
    films = []
    for name in ("a.mp4", "plain.mp4"):
        with av.open(str(tmp_path / name)) as container:
            films.append([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    marked, plain = films
    assert len(marked) == 31 and marked[0].shape == (256, 384, 3)  # ten frames a second, four times as large
    centres = []
    for a, b in zip(marked, plain):
        columns = np.flatnonzero(differing(a, b).any(axis=0))
        centres.append(None if not len(columns) else columns[:20].mean() / 384)
    # From 0.1 to 0.3 within half a second, there for half a second more, away, and back at 2.5 s.
    assert all(abs(centres[i] - (0.1 + 0.04 * i)) < 0.04 for i in range(6))
    assert centres[9] is not None and centres[12] is None and centres[24] is None and abs(centres[26] - 0.9) < 0.06
    assert drawing.draw(text, seen, files / "clip.mp4", tmp_path / "sheet.png") == (3, [])
    assert Image.open(tmp_path / "sheet.png").size == (3 * 480 + 24, 320)


def test_a_point_that_no_frame_shows_is_said_and_one_at_the_end_is_drawn(files, loaded, tmp_path):
    seen = loaded.see([], files / "clip.mp4")
    assert seen.duration == 3.1  # its last frame is at 3.0
    text = '<points coords="3.1 1 900 900;99.0 2 100 100">dots</points>'
    left_out = ["1 left out, after the video's end at 3.1 s"]
    for name in ("a.mp4", "a.png"):
        assert drawing.draw(text, seen, files / "clip.mp4", tmp_path / name) == (1, left_out)
    drawing.draw("no points", seen, files / "clip.mp4", tmp_path / "plain.mp4")
    last = []
    for name in ("a.mp4", "plain.mp4"):
        with av.open(str(tmp_path / name)) as container:
            last.append([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][-1])
    changed = differing(*last)
    assert changed[230, 345] and not changed[:128, :192].any()


def test_a_sheet_says_what_it_has_no_room_for(loaded, tmp_path):
    (tmp_path / "long.mp4").write_bytes(film(times=range(30)))
    seen = loaded.see([], tmp_path / "long.mp4")
    points = ";".join(f"{time:.1f} {number} 500 500" for number, time in enumerate(seen.times, start=1))
    drawn = drawing.draw(f'<points coords="{points}">dots</points>', seen, tmp_path / "long.mp4", tmp_path / "a.png")
    assert len(seen.times) == 24 and drawn == (16, ["8 left out, on frames beyond the 16 of a sheet: an .mp4 has all"])


def test_few_frames_are_held_of_a_long_video(loaded, tmp_path, monkeypatch):
    """Each is resized as it comes: what is held is what the model gets."""
    held = []
    original = model.pick_frames
    monkeypatch.setattr(
        model, "pick_frames", lambda *a, **k: (held.append(frame.shape) or frame for frame in original(*a, **k))
    )
    (tmp_path / "long.mp4").write_bytes(film(times=range(60)))
    seen = loaded.see([], tmp_path / "long.mp4")
    assert len(held) == len(seen.times) == 24 and seen.frames.shape == (24, 3, 84, 84)


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(files, loaded, said):
    """(address, answers to give) of a running server for two models."""
    media = web.find_media([files / "picture.png", files / "cut.mp4"], [files / "clip.mp4"])
    server = web.make_server([loaded, loaded], media, 0, 20)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", said
    server.shutdown()
    thread.join()
    server.server_close()


def fetched(address, body=None, **headers):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers} if data else headers
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=100) as response:
            content, status = response.read(), response.status
            policy = response.headers["Content-Security-Policy"]
    except urllib.error.HTTPError as error:
        content, status, policy = error.read(), error.code, error.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    return status, content


def test_the_page_shows_pictures_and_answers_of_two_models(page, export):
    address, said = page
    status, content = fetched(f"{address}/")
    assert (
        status == 200 and b"<title>Ask the model</title>" in content and b"http" not in content.replace(b"https", b"")
    )
    overview = json.loads(fetched(f"{address}/overview")[1])
    assert overview["models"] == [str(export)] * 2 and overview["media"] == ["picture.png", "cut.mp4", "clip.mp4"]
    assert json.loads(fetched(f"{address}/media/0")[1]) == {"size": [150, 100], "times": None}
    assert np.array_equal(Image.open(io.BytesIO(fetched(f"{address}/media/0/0")[1])), scene())
    about = json.loads(fetched(f"{address}/media/2")[1])
    assert about["times"] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.1]
    assert Image.open(io.BytesIO(fetched(f"{address}/media/2/3")[1])).size == (96, 64)
    said += [TEXT, "No."]
    messages = [{"role": "user", "content": "Where?"}]
    first, second = (
        json.loads(fetched(f"{address}/answer", {"model": m, "media": 0, "messages": messages, "max_new_tokens": 9})[1])
        for m in (0, 1)
    )
    assert first["text"] == TEXT and second == {"text": "No.", "cut": False, "marks": [], "outside": 0}
    assert [(mark["x"], mark["y"], mark["number"], mark["label"]) for mark in first["marks"]] == [
        (0.1, 0.2, 1, "dots"),
        (0.9, 0.8, 2, "dots"),
    ]


def test_what_a_folder_has_besides_is_said(tmp_path):
    scene().save(tmp_path / "a.png")
    for name in ("b.heic", "c.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "d.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "e").mkdir()
    said = []
    assert web.find_media([tmp_path], [], said.append) == [(tmp_path / "a.png", False)]
    assert (
        len(said) == 1 and said[0].startswith(f"{tmp_path}: not shown") and said[0].endswith("b.heic, c.txt, d.png, e")
    )


def test_the_page_refuses_what_is_not_its_own(page, files):
    address, _ = page
    good = {"model": 0, "media": 0, "messages": [{"role": "user", "content": "Where?"}], "max_new_tokens": 9}
    port = address.rsplit(":", 1)[1]
    for path, body, headers, status in [
        ("/overview", None, {"Host": "elsewhere.example"}, 403),
        ("/answer", good, {"Host": f"elsewhere.example:{port}"}, 403),
        ("/answer", good, {"Origin": "http://elsewhere.example"}, 403),
        ("/answer", good, {"Content-Type": "text/plain"}, 415),
        ("/answer", {**good, "model": 2}, {}, 400),
        ("/answer", {**good, "media": -1}, {}, 400),
        ("/answer", {**good, "messages": []}, {}, 400),
        ("/answer", {**good, "max_new_tokens": "9"}, {}, 400),
        ("/answer", [], {}, 400),
        ("/other", good, {}, 404),
        ("/media/7", None, {}, 404),
        ("/media/0/9", None, {}, 404),
        ("/media/1", None, {}, 400),
        ("/../../etc/passwd", None, {}, 404),
        ("/media/../page.html", None, {}, 404),
    ]:
        found, content = fetched(address + path, body, **headers)
        assert found == status and list(json.loads(content)) == ["error"], path


def test_a_taken_port_is_one_sentence(page, export, files, capsys):
    port = page[0].rsplit(":", 1)[1]
    status, _, error = run(capsys, export, *SHORT, "--web", "--image", files, "--port", port)
    assert status == 1 and f"error: --port {port}: Address already in use; give another" in error


def test_nothing_seen_has_no_visuals():
    assert Seen().visuals == []
