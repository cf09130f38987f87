"""Supervised fine-tuning, stage 2 of 3.

python recipes/stage2_sft.py model=tiny data=sample schedule=quickstart
torchrun --nproc-per-node 8 recipes/stage2_sft.py model=molmo2_8b parallel.tensor_model_parallel_size=4
python recipes/stage2_sft.py --cfg job        # print the resolved configuration
"""

import sys

from molmo2_nemo.command_line import prepare

prepare(sys.argv[1:])  # first: NeMo takes seconds to import, a mistyped key is known at once

from nemo.core.config import hydra_runner  # noqa: E402


@hydra_runner(config_path="../conf", config_name="stage2")
def main(cfg) -> None:
    # Imported here: a typing error or --cfg job need not wait for Megatron.
    from molmo2_nemo.training.run import run_stage

    run_stage(cfg)


if __name__ == "__main__":
    main()
