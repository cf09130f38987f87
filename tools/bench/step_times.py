"""What it costs to measure each step's parts (molmo2_nemo/training/step_times.py), which every run does.

    python tools/bench/step_times.py [--steps 10] [--device cpu] [OVERRIDE ...]
    torchrun --nproc-per-node 2 tools/bench/step_times.py parallel=tp2

Takes steps of the tiny model (or of --config-name stage2 with these overrides) on rows of random documents, and counts
the marks of each: a part begins or ends, or a collective. Then it makes many marks alone, and prints their share of a
step's time, on rank 0. The steps themselves differ by more than that from each other: their times with and without
marks are printed, too.
"""

import statistics
import time

import torch.distributed as dist
from tables import parser, print_json, print_table

from molmo2_nemo import gpu, parallel
from molmo2_nemo.command_line import compose
from molmo2_nemo.config.checks import check
from molmo2_nemo.config.schema import Config
from molmo2_nemo.environment import set_cpu_environment, world_size_from_environment
from molmo2_nemo.random_batches import pack, random_documents
from molmo2_nemo.training import step_times
from molmo2_nemo.training.optimizer import build_optimizer, clip_and_step, set_learning_rates
from molmo2_nemo.training.step import build_model, forward_backward, global_weight

TINY = ["model=tiny", "data=sample", "schedule=quickstart", "optim=from_scratch"]
MARKS = 20_000  # that are timed alone, in pairs


def measure(config: Config, device: str, steps: int) -> dict[str, float]:
    """How many marks a step has, what they cost, and median seconds of a step with and without them. Collective."""
    precision = parallel.resolve_precision(config.train, device)
    model = build_model(
        config.model, config.parallel, device, precision, config.transformer, gpu.ddp_settings(config, device)
    )
    optimizer = build_optimizer(config, model, precision)
    times = step_times.of(model, optimizer, device, print)
    batches, _ = pack(random_documents(config.model, 1), 1, config.model, 1, 16)
    batches = [{name: x.to(device) for name, x in batch.items()} for batch in batches]
    seconds, marks = {True: [], False: []}, 0
    for step in range(1, 2 * steps + 3):
        measured = step % 2 == 0
        dist.barrier()
        began = time.perf_counter()
        if measured:
            times.begin(step)
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        set_learning_rates(optimizer, config, step)
        forward_backward(model, batches, global_weight(batches))
        with times.part("optimizer"):
            clip_and_step(optimizer, config.optim.clip_grad)  # waits for a GPU
        if measured:
            times.end()
            marks = len(times.marks)
        if step > 2:
            seconds[measured].append(time.perf_counter() - began)
    times.begin(0)
    began = time.perf_counter()
    for _ in range(MARKS // 2):
        times.start("decoder")
        times.stop("decoder")
    of_a_mark = (time.perf_counter() - began) / MARKS
    times.end()
    began = time.perf_counter()
    times.take()
    of_a_mark += (time.perf_counter() - began) / MARKS  # what adding them up takes
    times.close()
    with_marks, without = statistics.median(seconds[True]), statistics.median(seconds[False])
    cost = {"marks of a step": marks, "µs of a mark": 1e6 * of_a_mark, "% of a step": 100 * marks * of_a_mark / without}
    return cost | {"step, s": with_marks, "without, s": without}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--config-name", default="stage2")
    options.add_argument("--steps", type=int, default=10, help="with and without marks, each")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    args = options.parse_args()
    if args.device == "cpu":
        set_cpu_environment()
    ranks = world_size_from_environment()
    batch = f"train.global_batch_size={ranks}", "train.micro_batch_size=1", f"train.device={args.device}"
    config = compose(args.config_name, [*TINY, *batch, *args.overrides])
    check(config, ranks)
    parallel.initialize(config.parallel, args.device, 5, config.train.seed)
    found = measure(config, args.device, args.steps)
    if dist.get_rank() == 0:
        print_table([found])
        print_json(found, args.out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
