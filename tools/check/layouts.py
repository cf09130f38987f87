"""Is training the same at every layout? One batch's loss and gradients, and a loss curve, against one rank's.

    python tools/check/layouts.py                                  # every layout of up to 4 ranks, on the CPU
    python tools/check/layouts.py --layouts tp2_sp,cp2_a2a --seed 7 --steps 50
    python tools/check/layouts.py --ranks 4 --set tensor_model_parallel_size=2 context_parallel_size=2
    python tools/check/layouts.py --device cuda                    # a GPU for each rank

The model is model=tiny with four layers, or --model NAME or --hf DIR, with random weights, the same ones for all
layouts. The rows are random packed documents: text, one image, several, a video, a message tree. After the
gradients of the first global batch, --steps optimiser steps are taken on new batches, without dropout.

Differences are |ours - one rank's| / |one rank's|, of the loss, of each parameter's gradient (the worst is shown),
and of the worst of the steps' losses. Exit status 1 if a loss or a gradient differs by more than --max-difference.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from molmo2_nemo.command_line import compose
from molmo2_nemo.config.checks import check_parallel
from molmo2_nemo.config.components import COMPONENTS
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import Config, ParallelConfig
from molmo2_nemo.paths import REPOSITORY

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
SP, VP = "sequence_parallel", "virtual_pipeline_model_parallel_size"
DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAP = DISTRIBUTED | {"overlap_grad_reduce": True, "overlap_param_gather": True}
# Name -> (ranks, fields of ParallelConfig, fields of Megatron's DistributedDataParallelConfig)
LAYOUTS = {
    "tp2": (2, {TP: 2}, {}),
    "tp2_sp": (2, {TP: 2, SP: True}, {}),
    "pp2": (2, {PP: 2}, {}),
    "pp2_uneven": (2, {PP: 2, "num_layers_in_first_pipeline_stage": 1}, {}),
    "pp2_interleaved": (2, {PP: 2, VP: 2}, {}),
    "cp2_a2a": (2, {CP: 2}, {}),
    "cp2_all_gather": (2, {CP: 2, "cp_comm_type": "all_gather"}, {}),
    "dp2": (2, {}, {}),
    "dp2_distributed": (2, {}, DISTRIBUTED),
    "dp2_overlap": (2, {}, OVERLAP),
    "cp4_a2a": (4, {CP: 4}, {}),
    "cp4_all_gather": (4, {CP: 4, "cp_comm_type": "all_gather"}, {}),
    "tp4_sp": (4, {TP: 4, SP: True}, {}),
    "tp2_sp_pp2": (4, {TP: 2, SP: True, PP: 2}, {}),
    "tp2_sp_pp2_interleaved": (4, {TP: 2, SP: True, PP: 2, VP: 2}, {}),
    "tp2_sp_cp2_a2a": (4, {TP: 2, SP: True, CP: 2}, {}),
    "tp2_sp_dp2_distributed": (4, {TP: 2, SP: True}, DISTRIBUTED),
    "pp2_cp2_all_gather": (4, {PP: 2, CP: 2, "cp_comm_type": "all_gather"}, {}),
    "pp2_dp2_overlap": (4, {PP: 2}, OVERLAP),
    "cp2_a2a_dp2_distributed": (4, {CP: 2}, DISTRIBUTED),
}
GLOBAL_BATCH_SIZE = 4  # rows


def configuration(args) -> Config:
    """The configuration of stage 2 that all layouts share. ConfigError: --model or --hf names none."""
    chosen = [f"model={args.model}"] if args.hf is None else ["model=hf", f"model.hf_path={args.hf.resolve()}"]
    if chosen == ["model=tiny"]:
        # Deep enough for interleaving; heads for every tensor parallel size here.
        chosen += ["model.num_layers=4", "model.num_query_groups=4"]
    chosen += ["data=sample", "schedule=quickstart", "optim=from_scratch", f"train.max_steps={args.steps}"]
    # The shortest warm-up: from the first step on, weights move as far as they ever do.
    chosen += [f"optim.{component}.warmup_steps=1" for component in COMPONENTS]
    return compose("stage2", chosen)


def worker(args) -> None:
    """One rank of one layout: write the loss, the losses of the steps and the gradients to args.worker."""
    import torch
    import torch.distributed as dist
    from gradients import make_shards_whole, released_gradients
    from megatron.core import parallel_state
    from safetensors.torch import save_file

    from molmo2_nemo import checkpoint_dir, parallel
    from molmo2_nemo.random_batches import pack, random_documents
    from molmo2_nemo.training.checkpoint import save_sharded
    from molmo2_nemo.training.optimizer import build_optimizer, clip_and_step, set_learning_rates
    from molmo2_nemo.training.step import (
        build_model,
        forward_backward,
        global_weight,
        load_weights,
        sharded_model_state,
    )

    config, (fields, ddp) = configuration(args), json.loads(args.layout)
    layout = ParallelConfig(**fields)
    parallel.initialize(layout, args.device, timeout_minutes=5, seed=args.seed)
    model = build_model(config.model, layout, args.device, "fp32", ddp=ddp)
    start = args.worker.parent / "step_00000000"
    if not start.exists():  # the first layout is one rank
        temporary = checkpoint_dir.aside(start)
        save_sharded(sharded_model_state(model), temporary)
        checkpoint_dir.publish(temporary, start, config.model, {"step": 0, "stage": "check_layouts"})
    load_weights(model, start)
    optimizer = build_optimizer(config, model, "fp32")
    optimizer.reload_model_params()

    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()

    def run(step: int) -> float:
        """Gradients of a global batch; its loss, the same on all ranks."""
        rows, _ = pack(
            random_documents(config.model, args.seed + step), GLOBAL_BATCH_SIZE, config.model, args.seed + step, 8
        )
        own = [{k: v.to(args.device) for k, v in row.items()} for row in rows[replica::replicas]]
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        total = global_weight(own)
        weighted = forward_backward(model, own, total, z_loss=config.optim.z_loss)
        loss = sum((x[0].double().sum() for x in weighted), torch.zeros((), device=args.device).double()) / total
        dist.all_reduce(loss)
        return loss.item() / layout.tensor_model_parallel_size  # tensor parallel ranks hold copies

    for chunk in model:
        chunk.train()
    first = run(0)
    if ddp.get("use_distributed_optimizer"):
        make_shards_whole(model)
    gradients = released_gradients(model, config.model, args.worker.parent / f"scratch_{args.worker.name}")
    losses = []
    for step in range(1, args.steps + 1):
        losses.append(run(step))
        set_learning_rates(optimizer, config, step)
        updated, _ = clip_and_step(optimizer, config.optim.clip_grad)
        assert updated, f"step {step}: not finite"
    if dist.get_rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in gradients.items()}, f"{args.worker}.safetensors")
        args.worker.write_text(json.dumps({"loss": first, "losses": losses}))
    dist.barrier()
    dist.destroy_process_group()


def measure(name: str, ranks: int, fields: dict, ddp: dict, args, folder: Path) -> tuple[dict, dict] | str:
    """(losses, gradients) of a layout, or the last words of a run that failed."""
    from safetensors.torch import load_file

    passed_on = ["--steps", args.steps, "--seed", args.seed, "--device", args.device, "--model", args.model]
    passed_on += ["--hf", args.hf] if args.hf else []
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        ranks,
        __file__,
        "--worker",
        folder / f"{name}.json",
        "--layout",
        json.dumps([fields, ddp]),
        *passed_on,
    ]
    # Matrix products that are split over other numbers of threads round otherwise.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [str(part) for part in command], cwd=REPOSITORY, capture_output=True, text=True, timeout=1800, env=environment
    )
    if result.returncode != 0:
        words = [line for line in result.stderr.splitlines() if "Error" in line or line.startswith("error")]
        return words[0] if words else f"exit status {result.returncode}"
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.json.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", help=f"some of {', '.join(LAYOUTS)}, with commas between (default all)")
    parser.add_argument("--ranks", type=int, help="of a layout of your own, with --set")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="fields of conf/parallel, with --ranks"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--hf", type=Path, help="a Hugging Face folder with the architecture")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--max-difference", type=float, default=1e-5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--layout", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    try:
        layouts = chosen_layouts(args)
        model = configuration(args).model
        for ranks, fields, _ in layouts.values():
            check_parallel(ParallelConfig(**fields), model, ranks)
    except (ConfigError, TypeError) as error:
        sys.exit(f"error: {error}")
    from gradients import difference

    figures = {}
    with tempfile.TemporaryDirectory(prefix="layouts-") as folder:
        reference = measure("one_rank", 1, {}, {}, args, Path(folder))
        if isinstance(reference, str):
            sys.exit(f"error: the run of one rank failed: {reference}")
        expected, gradients = reference
        # Gradients that are nothing but rounding are compared with the size of all of them.
        floor = 1e-4 * sum(g.norm().item() ** 2 for g in gradients.values()) ** 0.5
        print(
            f"{model.name}, {len(gradients)} parameters, seed {args.seed}, {args.device}, float32; loss"
            f" {expected['loss']:.6f}"
        )
        print("| layout | ranks | loss | gradients | worst of | largest of the curve |")
        print("|---|---|---|---|---|---|")
        for name, (ranks, fields, ddp) in layouts.items():
            found = measure(name, ranks, fields, ddp, args, Path(folder))
            if isinstance(found, str):
                figures[name] = {"passed": False, "failure": found}
                print(f"| {name} | {ranks} | failed: {found} | | | |", flush=True)
                continue
            losses, own = found
            by_parameter = {key: difference(own[key], gradient, floor) for key, gradient in gradients.items()}
            worst = max(by_parameter, key=by_parameter.get)
            loss = abs(losses["loss"] - expected["loss"]) / expected["loss"]
            curve = max((abs(a - b) / b for a, b in zip(losses["losses"], expected["losses"])), default=0.0)
            passed = max(loss, by_parameter[worst]) <= args.max_difference
            figures[name] = {
                "loss": loss,
                "gradients": by_parameter[worst],
                "worst": worst,
                "curve": curve,
                "passed": passed,
            }
            mark = "" if passed else " **too far**"
            print(
                f"| {name} | {ranks} | {loss:.1e} | {by_parameter[worst]:.1e}{mark} | {worst} | {curve:.1e} |",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(
        json.dumps({"check": "layouts", "passed": all(f["passed"] for f in figures.values()), "layouts": len(figures)})
    )
    sys.exit(0 if all(f["passed"] for f in figures.values()) else 1)


def chosen_layouts(args) -> dict[str, tuple[int, dict, dict]]:
    """ConfigError: a layout or a field is unknown."""
    if args.ranks:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            fields = OmegaConf.to_object(
                OmegaConf.merge(OmegaConf.structured(ParallelConfig), OmegaConf.from_dotlist(args.set))
            )
        except OmegaConfBaseException as error:
            raise ConfigError(f"--set {' '.join(args.set)}: {str(error).splitlines()[0]}") from None
        return {"yours": (args.ranks, vars(fields), {})}
    names = args.layouts.split(",") if args.layouts else list(LAYOUTS)
    unknown = [name for name in names if name not in LAYOUTS]
    if unknown:
        raise ConfigError(f"--layouts {unknown[0]} is unknown: choose among {', '.join(LAYOUTS)}.")
    return {name: LAYOUTS[name] for name in names}


if __name__ == "__main__":
    main()
