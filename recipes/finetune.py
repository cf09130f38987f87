"""Fine-tuning on data of your own: docs/finetune.md.

python recipes/finetune.py model=hf model.hf_path=/models/Molmo2-8B data.mine=shards/mine hardware=auto
python recipes/finetune.py model=tiny data.mine=shards/mine schedule=quickstart optim=from_scratch
torchrun --nproc-per-node 8 recipes/finetune.py model=hf model.hf_path=/models/Molmo2-8B data.mine=shards parallel=tp2
"""

import sys

from molmo2_nemo.command_line import prepare
from molmo2_nemo.finetune import ready
from molmo2_nemo.paths import CONF_DIR
from molmo2_nemo.recipe import hydra_runner_for, run_and_exit

sys.argv[1:] = ready(sys.argv)
sys.argv[1:] = prepare(sys.argv[1:])
hydra_runner = hydra_runner_for(sys.argv[1:])


@hydra_runner(config_path=str(CONF_DIR), config_name="finetune")
def main(cfg) -> None:
    # Imported here: a typing error or --cfg job need not wait for Megatron.
    from molmo2_nemo.training.run import run_stage

    run_and_exit(run_stage, cfg)


if __name__ == "__main__":
    main()
