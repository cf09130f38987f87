"""Ask a model the held-out questions of your data or of a public set, and score its answers. docs/evaluate.md

python tools/evaluate.py runs/mine --data shards/mine --split test --best
python tools/evaluate.py HF_DIR --set pixmo-points-eval --root $DATA_ROOT
torchrun --nproc-per-node 8 tools/evaluate.py HF_DIR --data shards/mine --batch-size 16
python tools/evaluate.py --compare runs/evaluate/a runs/evaluate/b

The model is a run (its newest checkpoint, or with --best its best), a checkpoint (both are exported into a temporary
folder first) or a Hugging Face folder. The same command goes on where it was stopped.
"""

import argparse
import datetime
import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from molmo2_nemo.option_types import local_path

EXIT_STOPPED = 130  # as a shell has it after Ctrl-C
SHOWN_ERRORS = 5
LIMITS = ("max_crops", "max_frames")  # options that replace what the export says


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=local_path, metavar="MODEL", help="a run, a checkpoint or an export")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="SHARDS", help="folders of tools/prepare.py, or their addresses"
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="as data.cache_dir (docs/storage.md)")
    parser.add_argument("--split", choices=("train", "val", "test"), help="of --data (default: test, else val)")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME", help="public sets, of conf/evaluations.yaml")
    parser.add_argument("--root", type=local_path, help="of --set: holds raw/ (default: $DATA_ROOT)")
    parser.add_argument("--best", action="store_true", help="the best checkpoint of a run, not the newest")
    parser.add_argument(
        "--out", type=local_path, metavar="DIR", help="default: runs/evaluate/MODEL-DATA, or RUN-STEP-DATA"
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="the first N samples alone")
    parser.add_argument("--batch-size", type=_positive, default=8, help="questions at once (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=_positive, help="of an answer (default: by the kind of question)")
    parser.add_argument("--max-crops", type=_positive, help="of a picture (default: the export's; 24 in the report)")
    parser.add_argument("--max-frames", type=_positive, help="of a video (default: the export's)")
    parser.add_argument("--backend", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument("--page", type=int, default=200, metavar="N", help="answers on the page (default: %(default)s)")
    parser.add_argument("--sam2", action="store_true", help="write the tracks' points and videos to OUT/sam2")
    parser.add_argument("--masks", type=local_path, metavar="FILE", help="what SAM 2 made of them: score J&F")
    parser.add_argument("--card", action="store_true", help="put the scores into the model card, MODEL/README.md")
    parser.add_argument("--compare", type=local_path, nargs=2, metavar=("A", "B"), help="two folders of --out")
    args = parser.parse_args(arguments)
    if args.compare and (args.model or args.data or args.set):
        parser.error("--compare reads two evaluations that are there: leave out the model, --data and --set")
    if not args.compare and not (args.model and (args.data or args.set)):
        parser.error("give a model and --data SHARDS or --set NAME; or --compare A B")
    if args.compare and (args.sam2 or args.masks or args.card or args.best):
        parser.error("--sam2, --masks, --card and --best are of one evaluation: leave out --compare")
    if args.card and not (args.model / "config.json").is_file():
        parser.error("--card is for an export: of a run, tools/export_hf.py takes the scores into the card itself")
    if args.masks and not args.masks.is_file():
        parser.error(f"--masks {args.masks} is no file: give the lines that SAM 2's masks were written to")
    if args.data and args.set:
        parser.error("--data and --set are evaluated one after the other: leave one of them out")
    if args.split and args.set:
        parser.error("--split is for --data: a set of --set is one split")
    return args


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    args = read_arguments(arguments)
    try:
        compare(*args.compare) if args.compare else evaluate(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(EXIT_STOPPED)


def compare(first: Path, second: Path) -> None:
    from molmo2_nemo.evaluate import table
    from molmo2_nemo.evaluate.records import read_predictions

    differences, unpaired = table.compare(read_predictions(first), read_predictions(second))
    print(f"A  {first}\nB  {second}\n")
    print(table.text_of_differences(differences))
    if unpaired:
        print(f"\n{unpaired:,} questions have a score in one of them alone and are left out")


def evaluate(args: argparse.Namespace) -> None:
    import torch.distributed as dist

    from molmo2_nemo.evaluate import records
    from molmo2_nemo.evaluate.samples import Samples

    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    refuse_backend(args, ranks)
    if ranks > 1:
        # Ranks wait for each other at the end, for as long as the slowest one needs.
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    # The first rank looks for the model, since a run that goes on may save while the others look.
    args.model, name = by_first_rank(lambda: model_of(args.model, args.best))
    folders = by_first_rank(lambda: prepare_sets(args)) if args.set else args.data
    samples = Samples(folders, "test" if args.set else args.split, args.cache_dir)
    out = args.out or records.EVALUATIONS / "-".join([name, *(source.name for source in samples.sources)])
    settings = {
        "data": ", ".join(f"{source.path} ({source.split})" for source in samples.sources),
        "data_hash": samples.identity,
        "samples": min(len(samples), args.limit or len(samples)),
        "max_new_tokens": args.max_new_tokens,
        "backend": args.backend,
    }
    settings |= {name: value for name in LIMITS if (value := getattr(args, name)) is not None}
    with ExitStack() as held:
        # All that can be refused is, before an export that takes minutes.
        by_first_rank(lambda: held.enter_context(records.held(out)))
        by_first_rank(lambda: records.check_settings(out, settings))
        folder = held.enter_context(hugging_face_folder(args.model, out))
        try:
            ask(args, samples, folder, out, settings, rank, ranks)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(f"{out}: {error.strerror}; make room there, and the same command goes on") from error
    if ranks > 1:
        dist.destroy_process_group()


def refuse_backend(args: argparse.Namespace, ranks: int) -> None:
    """ValueError, one sentence: the backend or the device cannot be used here."""
    from molmo2_nemo.ask.model import device_of
    from molmo2_nemo.evaluate.vllm_backend import refuse_missing

    device_of(args.device)
    if args.backend == "vllm":
        refuse_missing()
        if ranks > 1:
            raise ValueError("--backend vllm answers in one process: start it without torchrun")


def by_first_rank(work: Callable):
    """What `work` returns on the first rank, on every rank; without torchrun there is one. Collective.

    ValueError, OSError: as of `work`, on the first rank. The others end then, without a word.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return work()
    found, problem = [None, True], None
    if dist.get_rank() == 0:
        try:
            found = [work(), False]
        except (ValueError, OSError) as error:
            problem = error
    dist.broadcast_object_list(found)
    if problem is not None:
        raise problem
    if found[1]:
        sys.exit(1)
    return found[0]


def ask(args: argparse.Namespace, samples, folder: Path, out: Path, settings: dict, rank: int, ranks: int) -> None:
    """Each rank asks about its share of the samples; the first one then makes table and page."""
    import torch.distributed as dist
    from tqdm import tqdm

    from molmo2_nemo.ask.model import Asker
    from molmo2_nemo.evaluate import generate, records

    device = args.device
    if device is None and "LOCAL_RANK" in os.environ:
        import torch

        device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else None
    asker = Asker(folder, device, lambda text: print(text, file=sys.stderr) if rank == 0 else None)
    for name in LIMITS:
        setattr(asker, name, getattr(args, name) or getattr(asker, name))
    number = settings["samples"]
    settings |= {"model": str(args.model), "max_crops": asker.max_crops, "max_frames": asker.max_frames}
    settings["model_hash"] = records.model_identity(folder)
    by_first_rank(lambda: records.write_settings(out, settings))
    if args.backend == "vllm":
        from molmo2_nemo.evaluate.vllm_backend import answers_of_vllm

        answer = answers_of_vllm(folder, asker)
    else:
        answer = asker.answers
    share = range(rank, number, ranks)
    left = generate.unanswered(out, share)
    if rank == 0 and len(left) < len(share):
        print(
            f"{out} has answers about {len(share) - len(left):,} of {len(share):,} samples: going on", file=sys.stderr
        )
    begin, tokens, done = time.monotonic(), 0, len(share) - len(left)
    wait = 1 if sys.stderr.isatty() else 30  # seconds between two states of the progress bar
    with tqdm(total=len(share), initial=done, unit=" samples", mininterval=wait, disable=rank > 0) as bar:

        def progress(count: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            bar.set_postfix_str(f"{tokens / (time.monotonic() - begin):.0f} tokens/s", refresh=False)
            bar.update(count)

        generate.answer_all(samples, left, asker, answer, out, rank, args.batch_size, args.max_new_tokens, progress)
    if ranks > 1:
        dist.barrier()
    if rank == 0:
        summarise(args, samples, asker, out, settings, number)


def summarise(args: argparse.Namespace, samples, asker, out: Path, settings: dict, number: int) -> None:
    """Print the table, and write predictions, scores and page. Exits with 1 if questions have no answer."""
    from molmo2_nemo.evaluate import card, records, segmentation, table
    from molmo2_nemo.evaluate.page import write_page
    from molmo2_nemo.files import write_json

    found = sorted(records.read_answers(out).values(), key=lambda record: (record["index"], record["id"]))
    if missing := set(range(number)) - {record["index"] for record in found}:
        raise ValueError(f"{len(missing)} of {number} samples have no line in {out}: run the same command again")
    about_masks = segmentation.add_scores(args.masks, samples, found) if args.masks else ""
    records.write_predictions(out, found)
    lines, counts = table.lines(found), table.counts(found)
    write_json(
        out / records.SCORES,
        {
            "settings": settings,
            "sets": [{"name": s.name, "split": s.split, "public": bool(args.set)} for s in samples.sources],
            "samples": len(samples),
            "scores": [asdict(line) for line in lines],
            "counts": asdict(counts),
        },
    )
    page = write_page(out, samples, asker, found, lines, counts, settings, max(0, args.page))
    print(table.text(lines) if lines else "no answer has a score: no metric is known for these questions")
    print(f"\n{counts.questions:,} questions about {number:,} samples, {counts.scored:,} with a score")
    for amount, what in (
        (counts.without_metric, "have no metric: captions, or answers too long for an exact match"),
        (counts.empty, "have an empty answer, which is scored as it is"),
        (counts.names_no_option, "have an answer that names no option: that of the nearest letters is taken"),
        (counts.cut, "have an answer that was cut at the most tokens: allow more with --max-new-tokens"),
    ):
        if amount:
            print(f"{amount:,} {what}")
    if about_masks:
        print(about_masks)
    if args.card:
        added, stay = card.add_to_card(args.model, card.evaluations_of(args.model, [out]))
        of_more = f"; {stay:,} of more samples stay" if stay else ""
        print(f"{args.model / card.CARD} has {added:,} means of this evaluation{of_more}")
    if args.sam2:
        number = segmentation.write_prompts(out, samples, found)
        print(f"{out / segmentation.PROMPTS}: the points of {number:,} answers about tracks with masks")
    print(f"{out / records.PREDICTIONS}, {page}")
    if counts.failed:
        for reason, times in list(counts.errors.items())[:SHOWN_ERRORS]:
            print(f"{times:,} times: {reason}", file=sys.stderr)
        sys.exit(
            f"{counts.failed:,} of {counts.questions:,} questions have no answer, and count for no mean: the same "
            "command asks them again, and with other limits it needs another --out"
        )


def prepare_sets(args: argparse.Namespace) -> list[Path]:
    """Folders of the sets' shards, which are made if they are not there. ValueError: one of them cannot be had."""
    from molmo2_nemo.catalogue.commands import default_root
    from molmo2_nemo.evaluate.public_sets import prepared_set

    root = args.root or default_root()
    return [prepared_set(name, root, lambda text: print(text, file=sys.stderr)) for name in args.set]


def model_of(model: Path, best: bool) -> tuple[Path, str]:
    """The export or the checkpoint that is meant, and its name in a folder of results: that of an export's folder, or
    of a checkpoint RUN-STEP.

    ValueError, one sentence: there is none.
    """
    from molmo2_nemo import checkpoint_dir
    from molmo2_nemo.hf import peft

    if not model.is_dir():
        raise ValueError(f"{model} is no folder: name a run, a checkpoint or an export, such as runs/mine")
    if (model / peft.CONFIG).is_file():
        raise ValueError(f"{model} holds adapters alone: evaluate their run, or export it without --adapter")
    if (model / "config.json").is_file():
        if best:
            raise ValueError(f"--best chooses a checkpoint of a run, and {model} is an export: leave out --best")
        return model, model.resolve().name
    path = (checkpoint_dir.resolve_best if best else checkpoint_dir.resolve)(str(model))
    print(f"evaluating {path}", file=sys.stderr)
    *_, run, folder, step = ("", "", *path.resolve().parts)
    return path, f"{run}-{step}" if folder == "checkpoints" else step


@contextmanager
def hugging_face_folder(model: Path, out: Path):
    """The model's own folder, if it is one, or an export of the checkpoint beside `out`, which the first rank makes
    and removes again. Collective.

    ValueError, one sentence: it cannot be exported.
    """
    if (model / "config.json").is_file():
        yield model
        return
    folder = out.with_name(f".{out.name}.export")
    try:
        by_first_rank(lambda: _export(model, folder))
        yield folder
    finally:
        if int(os.environ.get("RANK", 0)) == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _export(model: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    export = Path(__file__).with_name("export_hf.py")
    done = subprocess.run([sys.executable, export, model, folder], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2].removeprefix("error: ")
        raise ValueError(f"{model} cannot be exported: {said}")


if __name__ == "__main__":
    main()
