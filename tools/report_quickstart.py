"""Summarise a quickstart run: losses, tokens and time of each stage, the answers, the loss curves and a report page.

    python tools/report_quickstart.py runs/quickstart

Writes loss.png and report.html into the folder.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from molmo2_nemo.option_types import local_path
from molmo2_nemo.report import Run, read_run, write_report

STAGES = {"stage1": "pre-training", "stage2": "SFT", "stage3": "long context"}


def intervals(run: Run) -> list[tuple[int, int, float]]:
    """(first step, last step, mean loss) of equal intervals of training steps; the last interval may be shorter.

    The log has one record for step 1 alone, and then one for the steps since the record before, so the first two are
    joined: a point of the curve never stands for a single step beside points that are means.
    """
    records = [(record["step"], record["loss"]) for record in run.of("train")]
    result, before = [], 0
    for step, loss in records:
        result.append((before + 1, step, loss))
        before = step
    if len(result) > 1 and result[0][:2] == (1, 1):
        (_, _, first), (_, last, rest) = result[:2]
        result[:2] = [(1, last, (first + rest * (last - 1)) / last)]
    return result


def plot(runs: dict[str, Run], out: Path) -> None:
    """One panel for each stage with the same logarithmic axis: training loss by interval, and held-out loss."""
    figure, axes = plt.subplots(1, len(runs), figsize=(12, 3.6), sharey=True)
    for axis, (stage, run) in zip(axes, runs.items()):
        found = intervals(run)
        width = found[0][1] - found[0][0] + 1
        axis.plot(
            [(first + last) / 2 for first, last, _ in found],
            [loss for _, _, loss in found],
            marker="." if len(found) < 20 else "",
            label="training",
        )
        held_out = run.of("validation")
        axis.plot([r["step"] for r in held_out], [r["loss"] for r in held_out], "o", label="held out")
        axis.set(title=f"{stage}: {STAGES[stage]}", xlabel=f"step (training loss: means over {width} steps)")
        axis.set_xlim(left=0)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("weighted loss of a token")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=local_path, help="folder of the quickstart, runs/quickstart")
    parser.add_argument(
        "--data", type=local_path, default=Path("data/sample"), help="the sample data (default data/sample)"
    )
    given = parser.parse_args()
    folder, quiz = given.runs, given.data / "quiz"
    runs = {stage: read_run(folder / stage) for stage in STAGES}
    plot(runs, folder / "loss.png")
    write_report([folder / stage for stage in STAGES], folder / "report.html")
    print("Loss: mean of the first and of the last interval between two lines of the log, and of held-out samples.\n")
    print(f"{'stage':20} {'steps':>6} {'first':>7} {'last':>7} {'held out':>9} {'tokens':>10} {'seconds':>8}")
    for stage, title in STAGES.items():
        train, validation = runs[stage].of("train"), runs[stage].of("validation")
        found = intervals(runs[stage])
        seconds = (folder / stage / "seconds").read_text().strip()
        held_out = f"{validation[-1]['loss']:.3f}" if validation else "-"
        print(
            f"{stage + ' ' + title:20} {train[-1]['step']:>6} {found[0][2]:>7.3f} {found[-1][2]:>7.3f} "
            f"{held_out:>9} {train[-1]['tokens_seen']:>10,} {seconds:>8}"
        )
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    print()
    for kind in ("image", "video"):
        for item in [a for a in answers if kind in a][:4]:
            print(f"{item[kind]:12} {item['question']:44} -> {item['said']}   (label: {item['answer']})")
    right = sum(a["said"].lower().rstrip(".") == a["answer"].lower().rstrip(".") for a in answers)
    print(f"{right} of {len(answers)} held-out questions answered right")
    print(f"""
report (open it in a browser)   {folder}/report.html
loss curves                     {folder}/loss.png
answers while it trained        {folder}/stage2/samples/
answers of the exported model   {folder}/answers.jsonl
Hugging Face model              {folder}/hf
each stage's run                {folder}/stage1, stage2, stage3 (checkpoints/, metrics.jsonl, report.html, ...)

Next: ask the model yourself, or train on pictures of your own (docs/own_data.md).
  .venv/bin/python tools/ask.py {folder}/hf --image {quiz}/image0.png "What colour is the star?"
  .venv/bin/python tools/prepare.py docs/own_data.jsonl --images {quiz} --out runs/own_data/shards""")


if __name__ == "__main__":
    main()
