"""How fast a model answers held-out questions while it is trained.

    python tools/bench/answers.py [--tokens 64] [--questions 16] [--seq-length 512] [--times 3] [--set KEY=VALUE ...]
    torchrun --standalone --nproc-per-node 2 tools/bench/answers.py --set parallel.tensor_model_parallel_size=2

Of the tiny model on the sample data (tools/make_sample_data.py), or of another with --set model=... With random weights
no answer ends early: each has --tokens tokens. Prints the seconds of each time, with encoding the pictures, and
those of the fastest as a JSON line. --set takes any setting of recipes/stage2_sft.py.
"""

import tempfile
import time

import torch
import torch.distributed as dist
from tables import parser, print_json, print_table

from molmo2_nemo import parallel
from molmo2_nemo.command_line import compose
from molmo2_nemo.config.checks import check
from molmo2_nemo.data import blend
from molmo2_nemo.environment import world_size_from_environment
from molmo2_nemo.training import answers
from molmo2_nemo.training.step import build_model


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tokens", type=int, default=64, help="of each answer (default: %(default)s)")
    arguments.add_argument("--questions", type=int, default=16, help="default: %(default)s")
    arguments.add_argument("--seq-length", type=int, default=512, help="tokens of a row (default: %(default)s)")
    arguments.add_argument("--times", type=int, default=3, help="default: %(default)s")
    arguments.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the stage")
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        config = compose(
            "stage2",
            [
                *("model=tiny", "data=sample", "schedule=quickstart", f"run_dir={temporary}"),
                f"schedule.stage2.seq_length={args.seq_length}",
                *("train.generate_every=1", f"train.generate_examples={args.questions}"),
                f"train.generate_max_tokens={args.tokens}",
                *args.set,
            ],
        )
        seconds, tokens, micro_batches = measure(config, args.times)
    if dist.get_rank() == 0:
        print(f"{args.questions} questions in {micro_batches} micro-batches of rows of {args.seq_length} tokens")
        rows = [{"seconds": one, "tokens": tokens, "tokens_per_second": tokens / one} for one in seconds]
        print_table(rows)
        print_json(min(rows, key=lambda row: row["seconds"]), args.out)
    dist.destroy_process_group()


def measure(config, times: int) -> tuple[list[float], int, int]:
    """Seconds of each time, tokens of all answers, and micro-batches of this rank."""
    check(config, world_size_from_environment())
    device = parallel.resolve_device(config.train)
    parallel.initialize(config.parallel, device, timeout_minutes=5, seed=0)
    precision = parallel.resolve_precision(config.train, device)
    model = build_model(config.model, config.parallel, device, precision)
    group = parallel.model_replica_group(timeout_minutes=5)
    exam = answers.prepare(config, blend.load_blend(config.data), group)
    exam.eos_id = answers.NO_TOKEN  # which no answer says
    seconds = []
    for _ in range(times):
        dist.barrier()
        begin = time.perf_counter()
        tokens = answers.answer(model, exam, group, device, config.train.generate_max_tokens)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds, int((tokens != answers.NO_TOKEN).sum()), len(exam.batches or ())


if __name__ == "__main__":
    main()
