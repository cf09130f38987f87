"""Ask an exported model about pictures or a video, which it sees as in training.

python tools/ask.py HF_DIR --image photo.png "What colour is the circle?"
python tools/ask.py HF_DIR --image left.png --image right.png "What has changed?"
python tools/ask.py HF_DIR --video clip.mp4 "Track the ball." --draw tracks.mp4
python tools/ask.py HF_DIR --image photo.png "What is it?" "And what is beside it?"
python tools/ask.py HF_DIR --batch data/sample/quiz/quiz.json --out answers.jsonl
python tools/ask.py HF_DIR --web --image pictures/ --compare OTHER_HF_DIR

Several questions are the turns of one conversation; without any, they are read from the terminal. A line of a batch:
{"image": "a.png", "question": "..."}, with "images", "video", "system" or "messages" as you need them, and "answer" for
a score; paths are relative to the file. docs/ask.md has more.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from molmo2_nemo.option_types import local_path

EXIT_STOPPED = 130  # as a shell has it after Ctrl-C


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="HF_DIR", type=local_path)
    parser.add_argument("questions", nargs="*", metavar="QUESTION")
    parser.add_argument("--image", type=_file, action="append", default=[], help="a picture; give it again for more")
    parser.add_argument("--video", type=_file, action="append", default=[])
    parser.add_argument("--system", help="a system prompt")
    parser.add_argument("--max-new-tokens", type=_positive, default=2048, help="of an answer (default: %(default)s)")
    parser.add_argument("--max-crops", type=_positive, help="of a picture (default: the export's; 24 for small print)")
    parser.add_argument("--max-frames", type=_positive, help="of a video (default: the export's)")
    parser.add_argument("--max-fps", type=_positive_number, help="frames a second (default: the export's)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument(
        "--draw", type=local_path, metavar="FILE", help="points and tracks on a .png, or of a video an .mp4"
    )
    parser.add_argument("--batch", type=local_path, metavar="FILE", help="questions, a JSON object a line, or an array")
    parser.add_argument("--out", type=local_path, metavar="FILE", help="answers of --batch, a JSON object a line")
    parser.add_argument("--compare", type=local_path, metavar="HF_DIR", help="ask this model the same, too")
    parser.add_argument(
        "--web", action="store_true", help="a page on this machine to click through --image and --video"
    )
    parser.add_argument("--port", type=int, default=8765, help="of --web (default: %(default)s; 0: any)")
    args = parser.parse_intermixed_args(arguments)  # a question may follow --image
    if args.batch and (args.questions or args.image or args.video or args.draw or args.web):
        parser.error(
            "--batch has the questions and their files: leave out questions, --image, --video, --draw and --web"
        )
    if args.out and not args.batch:
        parser.error("--out is for the answers of --batch")
    if args.web and (args.questions or args.draw):
        parser.error("--web is asked on its page, which draws: leave out questions and --draw")
    if not args.web and (len(args.video) > 1 or args.video and args.image):
        parser.error("a question is about pictures or about one video: ask several questions, or use --batch or --web")
    if args.compare and (args.batch or args.draw):
        parser.error("--compare is for single questions and --web: run --batch or --draw once with each model")
    if not 0 <= args.port < 65536:
        parser.error(f"--port {args.port}: a port is a number from 0 to 65535")
    return args


def _file(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is an address, and none is fetched: download the file first")
    return Path(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def _positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    args = read_arguments(arguments)
    try:
        if args.batch:
            ask_batch(args)
        elif args.web:
            show_page(args)
        else:
            ask_questions(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(EXIT_STOPPED)


def load(args: argparse.Namespace, folder: Path):
    """The model of a folder, its weights not loaded yet, with the limits of the command line."""
    from molmo2_nemo.ask.model import Asker

    asker = Asker(folder, args.device, lambda text: print(text, file=sys.stderr))
    for name in ("max_crops", "max_frames", "max_fps"):
        if getattr(args, name) is not None:
            setattr(asker, name, getattr(args, name))
    return asker


def ask_questions(args: argparse.Namespace) -> None:
    """Each question after the answer to the one before, by one model or by two."""
    from transformers import TextStreamer

    from molmo2_nemo.ask import drawing
    from molmo2_nemo.ask.requests import conversation, placed

    video = args.video[0] if args.video else None
    if args.draw:
        drawing.check_target(args.draw, bool(video))
        if not (video or args.image):
            raise ValueError(f"--draw {args.draw}: there is nothing to draw on without --image or --video")
    for question in args.questions:
        conversation(question, args.system)

    def texts(questions: Sequence[str]) -> list[str]:
        """Without placeholders, for which each picture may have one in all of them."""
        turns = [{"role": "user", "content": question} for question in questions]
        return [turn["content"] for turn in placed(turns, len(args.image), bool(video))]

    given = texts(args.questions)
    folders = [args.model, *([args.compare] if args.compare else [])]
    askers = [load(args, folder) for folder in folders]
    seen = [asker.see(args.image, video) for asker in askers]
    for asker, about in zip(askers, seen):
        asker.check_tokens([message for text in given for message in conversation(text, args.system)])
        if given:
            asker.inputs(conversation(given[0], args.system), about)
    for asker in askers:  # all that can be known before is: this takes minutes
        asker.load()
    histories = [[] for _ in askers]
    for question in given or (text for typed in typed_questions() for text in texts([typed])):
        asked = conversation(question, None if histories[0] else args.system)
        for asker, about, history in zip(askers, seen, histories):
            streams = sys.stdout.isatty() and len(askers) == 1
            streamer = TextStreamer(asker.tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
            reply = asker.answer([*history, *asked], about, args.max_new_tokens, streamer)
            history += [*asked, {"role": "assistant", "content": reply.text}]
            if len(askers) > 1:
                print(f"{asker.folder}: {reply.text}", flush=True)
            elif not streams:
                print(reply.text, flush=True)
            if reply.is_cut:
                print("the answer was cut off: allow it more with --max-new-tokens", file=sys.stderr)
        if args.draw:
            number, left_out = drawing.draw(reply.text, seen[0], video, args.draw)
            drawn = f"{number} points drawn" if number or left_out else "no points in the answer"
            print(f"{args.draw}: {'; '.join([drawn, *left_out])}", file=sys.stderr)


def typed_questions() -> Iterator[str]:
    """From standard input, a line each, until its end or an empty line at a terminal."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("ask; an empty line ends the conversation", file=sys.stderr)
    while True:
        if is_terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or is_terminal and not line.strip():
            return
        if line.strip():
            yield line.strip()


def ask_batch(args: argparse.Namespace) -> None:
    """Answer the questions of a file, and write each with its answer as soon as it is there."""
    from tqdm import tqdm

    from molmo2_nemo.ask.requests import WRITTEN, read_records

    records = read_records(args.batch)
    if replaced := [key for key in WRITTEN if any(key in record for record in records)]:
        print(f"{args.batch} has the keys {', '.join(replaced)}, which the answers replace", file=sys.stderr)
    records = [{key: record[key] for key in record if key not in WRITTEN} for record in records]
    if args.out:
        check_out(args.out)
    results = finished_results(args.out, records, str(args.model)) if args.out else []
    if results:
        print(
            f"{args.out} has the first {len(results)} of {len(records)} answers: going on behind them", file=sys.stderr
        )
    rest = records[len(results) :]
    asker = load(args, args.model) if rest else None
    out = args.out.open("a", encoding="utf-8") if args.out else None
    seconds = 1 if sys.stderr.isatty() else 30  # between two states of the progress bar
    with tqdm(total=len(records), initial=len(results), unit=" questions", mininterval=seconds) as progress:
        for record in rest:
            result = {**record, **answer_to(record, asker, args), "model": str(args.model)}
            results.append(result)
            progress.update()
            if out:
                out.write(json.dumps(result, ensure_ascii=False) + "\n")
                out.flush()
            else:
                progress.write(json.dumps(result, ensure_ascii=False))  # the bar moves out of the way
    if out:
        out.close()
    report_score(results)


def answer_to(record: dict, asker, args: argparse.Namespace) -> dict:
    """The keys that are added to a question of a batch. ValueError: the model cannot be loaded."""
    from molmo2_nemo.ask.requests import read_request

    try:
        request = read_request(record, args.batch.parent, args.system)
        seen = asker.see(request.images, request.video, ('the key "image"', 'the key "video"'))
        asker.check_tokens(request.messages)
    except ValueError as error:
        return {"error": " ".join(str(error).split())}
    asker.load()
    try:
        reply = asker.answer(request.messages, seen, args.max_new_tokens)
    except ValueError as error:
        return {"error": " ".join(str(error).split())}
    return {"said": reply.text} | ({"cut": True} if reply.is_cut else {})


def check_out(out: Path) -> None:
    """ValueError: nothing can be written to this file. An empty one is left."""
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}: make it")
    try:
        out.open("a").close()
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}") from error


def finished_results(out: Path, records: list[dict], model: str) -> list[dict]:
    """What an earlier run has written. ValueError: of another model, or to other questions."""
    from molmo2_nemo.ask.requests import WRITTEN, read_records

    if not out.stat().st_size:
        return []
    content = out.read_bytes()
    if not content.endswith(b"\n"):  # it was stopped in the middle of a line
        content = content[: content.rfind(b"\n") + 1]
        os.truncate(out, len(content))
    results = read_records(out) if content.strip() else []
    asked = [{key: result[key] for key in result if key not in WRITTEN} for result in results]
    if asked != records[: len(results)] or any(result.get("model") != model for result in results):
        raise ValueError(f"{out} has answers of another model or to other questions: name another --out, or remove it")
    return results


def report_score(results: list[dict]) -> None:
    """Of the answers to questions with a right answer; and how many questions failed. Exits with 1 if any did."""
    marked = [result for result in results if isinstance(result.get("answer"), str) and "said" in result]
    right = sum(result["said"].lower().rstrip(".") == result["answer"].lower().rstrip(".") for result in marked)
    if marked:
        print(f"{right} of {len(marked)} right", file=sys.stderr)
    failed = [(number, result) for number, result in enumerate(results, start=1) if "error" in result]
    for number, result in failed[:10]:
        print(f"question {number}: {result['error']}", file=sys.stderr)
    if failed:
        sys.exit(f"{len(failed)} of {len(results)} questions have no answer")


def show_page(args: argparse.Namespace) -> None:
    from molmo2_nemo.ask.web import find_media, make_server

    media = find_media(args.image, args.video, lambda text: print(text, file=sys.stderr))
    askers = [load(args, folder) for folder in [args.model, *([args.compare] if args.compare else [])]]
    server = make_server(askers, media, args.port, args.max_new_tokens, args.system)
    for asker in askers:
        asker.load()
    print(f"http://127.0.0.1:{server.server_address[1]}/ shows {len(media)} files; Ctrl-C ends it", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
