"""How fast training is: rates, model FLOPs utilization, and how evenly the work is spread. Formulas:
docs/planner.md."""

import torch
import torch.distributed as dist

from molmo2_nemo.config.schema import Config
from molmo2_nemo.planner.flops import forward_flops, frozen_parts, peak_flops, training_flops
from molmo2_nemo.training.batches import WORK


class Speed:
    """Work done since the last `reduce`.

    peak: FLOP/s of the device in the run's precision, None where it is not known.
    """

    def __init__(self, config: Config, device: str, precision: str):
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        self.config, self.device, self.peak = config, device, peak_flops(name, precision)
        self.frozen = frozen_parts(config.optim, config.model.tie_embeddings, config.lora)
        self.steps: list[torch.Tensor] = []
        self.work: torch.Tensor | None = None  # of the last interval, [ranks, counts]; 0 where no loader is

    def add(self, batches: list[dict]) -> None:
        """Count the micro-batches of a step; they have `work` on one rank of each data-parallel replica."""
        self.steps.append(sum((batch["work"] for batch in batches if "work" in batch), torch.zeros(len(WORK)).double()))

    def reduce(self, seconds: float, rows: int) -> dict:
        """Figures of the `seconds` since the last call, in which `rows` packed rows were trained on. Collective.

        imbalance: of each step, work of the busiest replica, for which the others wait, over the mean work, for the
        vision tower and for the decoder. mfu: None for an unknown device.
        """
        own = torch.stack(self.steps).to(self.device)
        self.steps = []
        everybodys = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everybodys, own)
        # [ranks, steps, counts], of the ranks that hold a loader: a micro-batch is never without tokens.
        by_rank = torch.stack(everybodys).cpu()
        self.work = by_rank.sum(1)
        by_rank = by_rank[by_rank[:, :, WORK.index("tokens")].sum(1) > 0]
        counts = dict(zip(WORK, by_rank.sum((0, 1)).tolist()))
        flops = training_flops(self.config.model, self.frozen, self.config.lora, **counts)
        tflops = flops / seconds / dist.get_world_size() / 1e12
        return {
            "mfu": None if self.peak is None else tflops * 1e12 / self.peak,
            "model_tflops_per_second": tflops,
            "loss_tokens_per_second": counts["loss_tokens"] / seconds,
            "padded_tokens_per_second": rows * self.config.data.seq_length / seconds,
            "rows_per_second": rows / seconds,
            "patches_per_second": counts["crops"] * self.config.model.vision.patches_per_crop / seconds,
            "imbalance": self._imbalance(by_rank),
            "work": {name: int(count) for name, count in counts.items()},
        }

    def _imbalance(self, by_rank: torch.Tensor) -> dict[str, float]:
        flops = forward_flops(self.config.model, **dict(zip(WORK, by_rank.unbind(-1))))
        decoder = flops["decoder"] + flops["decoder attention"] + flops["head"]
        parts = {"vision": sum(flops.values()) - decoder, "decoder": decoder}
        return {name: float(work.amax(0).sum() / work.mean(0).sum()) for name, work in parts.items() if work.sum() > 0}


def speed_note(figures: dict) -> str:
    """MFU, and the imbalance between data-parallel ranks where it is above 1 %, for the console line."""
    mfu = "n/a" if figures["mfu"] is None else f"{figures['mfu']:.1%}"
    uneven = {name: ratio for name, ratio in figures["imbalance"].items() if ratio > 1.01}
    listed = " ".join(f"{name} {ratio:.2f}" for name, ratio in uneven.items())
    return f"MFU {mfu}" + (f" | busiest rank/mean: {listed}" if listed else "")


def impossible_mfu(figures: dict) -> str | None:
    """A sentence for an MFU above 100 %, which is then taken out of the figures."""
    if figures["mfu"] is None or figures["mfu"] <= 1:
        return None
    mfu, figures["mfu"] = figures["mfu"], None
    return (
        f"error: an MFU of {mfu:.0%} cannot be: the device's peak in molmo2_nemo/planner/flops.py or the "
        "count of FLOPs is wrong; the figure is left out."
    )
