"""Summarise a quickstart run: losses, tokens and time of each stage, the answers, a PNG of the loss curves.

python tools/report_quickstart.py runs/quickstart
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STAGES = {"stage1": "pre-training", "stage2": "SFT", "stage3": "long context"}


def curves(run: Path) -> tuple[list[dict], list[dict]]:
    """(training, validation) records of a stage's metrics.jsonl."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["kind"] == "train"], [r for r in records if r["kind"] == "validation"]


def plot(runs: Path, out: Path) -> None:
    figure, axes = plt.subplots(1, len(STAGES), figsize=(12, 3.6), sharey=True)
    for axis, (stage, title) in zip(axes, STAGES.items()):
        train, validation = curves(runs / stage)
        axis.plot([r["step"] for r in train], [r["loss"] for r in train], label="training")
        axis.plot([r["step"] for r in validation], [r["loss"] for r in validation], "o", label="held out")
        axis.set(title=f"{stage}: {title}", xlabel="step", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("weighted token loss")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    runs = parser.parse_args().runs
    picture = runs / "loss.png"
    plot(runs, picture)
    print(f"{'stage':22} {'steps':>6} {'loss first':>11} {'last':>7} {'held out':>9} {'tokens':>10} {'seconds':>8}")
    for stage, title in STAGES.items():
        train, validation = curves(runs / stage)
        seconds = (runs / stage / "seconds").read_text().strip()
        held_out = f"{validation[-1]['loss']:.3f}" if validation else "-"
        print(
            f"{stage + ' ' + title:22} {train[-1]['step']:>6} {train[0]['loss']:>11.3f} {train[-1]['loss']:>7.3f} "
            f"{held_out:>9} {train[-1]['tokens_seen']:>10,} {seconds:>8}"
        )
    answers = json.loads((runs / "answers.json").read_text())
    print()
    for kind in ("image", "video"):
        for item in [a for a in answers if kind in a][:4]:
            print(f"{item[kind]:12} {item['question']:44} -> {item['said']}   (label: {item['answer']})")
    right = sum(a["said"].lower().rstrip(".") == a["answer"].lower().rstrip(".") for a in answers)
    print(f"{right} of {len(answers)} held-out questions answered right")
    print(f"\nloss curves       {picture}\nHugging Face      {runs / 'hf'}\nall answers       {runs / 'answers.json'}")
    for stage in STAGES:
        print(f"{stage + ' run':17} {runs / stage} (checkpoints/, tensorboard/, metrics.jsonl)")


if __name__ == "__main__":
    main()
