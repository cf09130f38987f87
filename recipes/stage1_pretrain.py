"""Pre-training, stage 1 of 3.

python recipes/stage1_pretrain.py model=tiny data=sample schedule=quickstart
torchrun --nproc-per-node 8 recipes/stage1_pretrain.py model=molmo2_8b hardware=h100_8
python recipes/stage1_pretrain.py --cfg job        # print the resolved configuration
"""

import sys

from molmo2_nemo.command_line import prepare
from molmo2_nemo.paths import CONF_DIR
from molmo2_nemo.recipe import hydra_runner_for, run_and_exit

sys.argv[1:] = prepare(sys.argv[1:])
hydra_runner = hydra_runner_for(sys.argv[1:])


@hydra_runner(config_path=str(CONF_DIR), config_name="stage1")
def main(cfg) -> None:
    # Imported here: a typing error or --cfg job need not wait for Megatron.
    from molmo2_nemo.training.run import run_stage

    run_and_exit(run_stage, cfg)


if __name__ == "__main__":
    main()
