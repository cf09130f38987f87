"""Every shipped configuration builds; what cannot work is refused in a sentence that names key, value and mend."""

import copy
import functools
import re

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from molmo2_nemo import command_line
from molmo2_nemo.config import checks, flags, megatron_fields, schema
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.paths import CONF_DIR

STAGES = ("stage1", "stage2", "stage3")


@functools.cache
def composed(stage, *overrides):
    command_line.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(stage, overrides=list(overrides))


def build(stage, *overrides):
    """What a recipe would get. Hydra composes each choice of files once; keys are then set as Hydra sets them."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    keys = [override for override in parsed if "." in override.key_or_group]
    assert all(override.type.name == "CHANGE" for override in keys)
    cfg = copy.deepcopy(composed(stage, *(override.input_line for override in parsed if override not in keys)))
    for override in keys:
        OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
    return command_line.to_dataclass(cfg)


def refusal(stage, *overrides, world_size=1):
    with pytest.raises(ConfigError) as error:
        checks.check(build(stage, *overrides), world_size)
    message = str(error.value)
    assert "\n" not in message and message.endswith((".", "?")), message
    return message


def options(group):
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", [m for m in options("model") if m != "hf"])
@pytest.mark.parametrize("schedule", ["seed", "report"])
def test_every_model_and_schedule_is_accepted(stage, model, schedule):
    # Two or four heads do not divide by a context parallel size of eight.
    extra = ["parallel.cp_comm_type=all_gather"] if model in ("quickstart", "tiny") else []
    checks.check(build(stage, f"model={model}", f"schedule={schedule}", *extra), 8)


@pytest.mark.parametrize("stage", STAGES)
def test_the_quickstart_is_accepted(stage):
    parallel = "cp2" if stage == "stage3" else "tp2"
    settings = ["model=quickstart", "data=sample", "schedule=quickstart", "optim=from_scratch", f"parallel={parallel}"]
    checks.check(build(stage, *settings), 2)


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["train.profile_steps=[0,2]"], "begins before step 1, the first one: use [1,2]"),
        (["train.profile_steps=[5,3]"], "ends before it begins: use [5,5] for one step"),
        (["train.profile_steps=[5]"], "must be the first and the last step of the profile, as in [20,22]"),
        (["train.profile_steps=[9,11]", "train.max_steps=10"], "ends after train.max_steps=10: name earlier steps"),
        (["train.profile_steps=[0,11]", "train.max_steps=10"], "ends after train.max_steps=10"),
        (["train.profile_steps=[12,11]", "train.max_steps=10"], "ends after train.max_steps=10"),
        (["train.profile_ranks=[2]"], "train.profile_ranks=[2] must name ranks of this run, from 0 to 1, each once"),
        (["train.profile_ranks=[-1]"], "from 0 to 1"),
        (["train.profile_ranks=[]"], "from 0 to 1"),
        (["train.profile_ranks=[1,1]"], "each once: [0] is the first one"),
        (["train.profile_with=nvprof"], "train.profile_with=nvprof is unknown: choose one of torch, nsys"),
        (["train.profile_steps=[1,2]", "train.profile_with=nsys", "train.device=cpu"], "use train.profile_with=torch"),
    ],
)
def test_a_profile_that_cannot_be_made_is_refused(overrides, sentence):
    tiny = ["model=tiny", "data=sample", "schedule=quickstart", "optim=from_scratch", "parallel=tp2"]
    assert sentence in refusal("stage2", *tiny, *overrides, world_size=2)
    # What the sentences name instead is accepted.
    advised = ["train.profile_steps=[1,2]", "train.profile_ranks=[0]", "train.profile_with=torch"]
    checks.check(build("stage2", *tiny, *advised), 2)
    # A search of layouts asks for other numbers of ranks than the run will have.
    checks.check_settings(build("stage2", *tiny, "train.profile_steps=[1,2]", "train.profile_ranks=[0,7]"), 2)
    for steps in ("[5,5]", "[20,22]"):
        checks.check(build("stage2", *tiny, f"train.profile_steps={steps}"), 2)


def test_the_cache_is_no_address():
    sentence = refusal("stage2", "model=tiny", "data=sample", "data.cache_dir='s3://b/x?key=secret'")
    assert "data.cache_dir=s3://b/x is an address" in sentence and "secret" not in sentence


def test_a_profile_behind_the_end_is_refused_when_epochs_are_counted():
    config = build("stage2", "model=tiny", "data=sample", "schedule=quickstart", "train.profile_steps=[9,11]")
    config.train.max_steps = None  # until the data are looked at
    checks.check_profile(config.train, 1)
    config.train.max_steps = 10
    with pytest.raises(ConfigError, match="ends after train.max_steps=10"):
        checks.check_profile(config.train, 1)


def test_no_option_is_left_untested():
    assert options("schedule") == ["finetune", "quickstart", "report", "seed"]
    assert options("data") == ["sample", "stage1", "stage2", "stage2_report"]
    assert options("optim") == ["default", "from_scratch"]


@pytest.mark.parametrize("parallel", options("parallel"))
def test_every_parallel_preset_is_accepted(parallel):
    checks.check(build("stage2", "model=molmo2_8b", f"parallel={parallel}"), 8)


def test_the_former_name_of_the_hardware_presets_is_refused_with_the_new_one():
    with pytest.raises(ConfigError, match=r"conf/parallel has no h100_8.yaml; use hardware=h100_8\.$"):
        command_line.refuse_unknown_overrides(["parallel=h100_8"])
    command_line.refuse_unknown_overrides(["hardware=h100_8"])


@pytest.mark.slow
def test_seed_schedule_is_the_default():
    # Figures of the project's brief.
    expected = {"stage1": (100_000, 4096, 128), "stage2": (50_000, 4096, 128), "stage3": (2_000, 36_864, 384)}
    for stage, (steps, tokens, frames) in expected.items():
        cfg = build(stage)
        assert (cfg.train.max_steps, cfg.data.seq_length, cfg.data.max_frames) == (steps, tokens, frames)
    assert build("stage3").parallel.context_parallel_size == 8


def test_report_schedule_holds_the_report():
    # arXiv 2601.10611: steps, tokens of a row; rates and warm-ups of ViT, connector, LLM.
    expected = {
        "stage1": (32_000, 2_560, (6e-6, 2e-4, 2e-5), (2000, 200, 2000)),
        "stage2": (30_000, 16_384, (5e-6, 5e-6, 1e-5), (200, 200, 200)),
        "stage3": (2_000, 36_864, (5e-6, 5e-6, 1e-5), (200, 200, 200)),
    }
    for stage, (steps, tokens, rates, warmups) in expected.items():
        cfg = build(stage, "schedule=report")
        o = cfg.optim
        assert (cfg.train.max_steps, cfg.data.seq_length, cfg.train.global_batch_size) == (steps, tokens, 128)
        assert (o.vit.lr, o.connector.lr, o.llm.lr) == rates
        assert (o.vit.warmup_steps, o.connector.warmup_steps, o.llm.warmup_steps) == warmups


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_its_own_data_and_takes_others(stage, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", "/shards")
    own = build(stage).data
    assert (own.blend, own.root) == ("stage1" if stage == "stage1" else "stage2", "/shards")
    assert build(stage, "data=sample").data.blend == f"sample_{stage}"
    assert build(stage, "data=stage2_report").data.blend == "stage2_report"
    assert build(stage, "data.blend=my/blend.yaml").data.blend == "my/blend.yaml"
    for name in options("data"):
        assert (CONF_DIR / "blend" / f"{build(stage, f'data={name}').data.blend}.yaml").is_file()


@pytest.mark.parametrize(
    "stage, overrides, world_size, expected",
    [
        (
            "stage2",
            ["model=molmo2_8b", "parallel.tensor_model_parallel_size=16"],
            16,
            "parallel.tensor_model_parallel_size=16 does not divide model.num_query_groups=8",
        ),
        ("stage2", ["parallel.tensor_model_parallel_size=3"], 3, "must be a power of two"),
        ("stage2", ["parallel=tp2"], 1, "1 rank(s) cannot be divided"),
        ("stage3", [], 4, "4 rank(s) cannot be divided"),
        ("stage2", ["parallel.sequence_parallel=true"], 1, "parallel.sequence_parallel=true needs"),
        ("stage2", ["parallel.pipeline_model_parallel_size=5"], 5, "cannot be dealt to parallel.pipeline_model"),
        ("stage2", ["parallel=pp2", "parallel.num_layers_in_first_pipeline_stage=36"], 2, "cannot be dealt"),
        (
            "stage3",
            ["model=molmo2_8b", "parallel.context_parallel_size=64"],
            64,
            "set parallel.cp_comm_type=all_gather",
        ),
        ("stage2", ["parallel.cp_comm_type=ring"], 1, "parallel.cp_comm_type=ring is unknown"),
        ("stage2", ["data.max_crops=4"], 1, "data.max_crops=4 cannot hold one image"),
        ("stage2", ["data.max_frames=200"], 1, "data.max_frames=200 does not fit data.max_crops=128"),
        ("stage2", ["data.seq_length=100"], 1, "data.seq_length=100 cannot hold the 392 patch tokens"),
        ("stage2", ["parallel=tp2", "data.seq_length=4097"], 2, "use 4098"),
        ("stage2", ["train.global_batch_size=100"], 8, "train.global_batch_size=100 is not a multiple"),
        (
            "stage2",
            ["lora.rank=4", "lora.targets=[atention]"],
            1,
            "atention is unknown; choose of attention, mlp, conn",
        ),
        ("stage2", ["lora.targets=[q_proj]"], 1, "lora.targets: q_proj is unknown"),
        ("stage2", ["lora.rank=-1"], 1, "lora.rank=-1 must not be negative"),
        ("stage2", ["lora.alpha=0"], 1, "lora.alpha=0.0 must be above 0"),
        ("stage2", ["lora.dropout=1"], 1, "lora.dropout=1.0 must be from 0 to below 1"),
        ("stage2", ["lora.rank=4", "lora.targets=[]"], 1, "lora.targets=[] adapts nothing"),
        ("stage2", ["lora.rank=4", "optim.llm.freeze=true"], 1, "names attention, but optim.llm.freeze=true: take one"),
        (
            "stage2",
            ["model=molmo2_8b", "lora.rank=2000"],
            1,
            "lora.rank=2000 is above 1024, the smaller side of decoder",
        ),
        (
            "stage2",
            ["optim.vit.freeze=true", "optim.connector.freeze=true", "optim.llm.freeze=true"],
            1,
            "nothing would",
        ),
        ("stage2", ["transformer.nonsense=1"], 1, "transformer.nonsense=1: Megatron's TransformerConfig has no field"),
        ("stage2", ["transformer.hidden_size=64"], 1, "is decided by model.hidden_size"),
        ("stage2", ["optimizer.lr=1"], 1, "is decided by optim.llm.lr"),
        ("stage2", ["model.vision.image_size=380"], 1, "use 378"),
        ("stage2", ["train.precision=fp7"], 1, "choose one of auto, fp32, bf16, fp8"),
        ("stage2", ["train.vision_chunk_crops=-1"], 1, "train.vision_chunk_crops=-1 must not be negative"),
        ("stage2", ["train.vision_recompute=all"], 1, "train.vision_recompute=all must be true, layers, false or auto"),
        (
            "stage2",
            ["train.precision=fp8", "parallel.layer_spec=local"],
            1,
            "set parallel.layer_spec=transformer_engine",
        ),
        (
            "stage2",
            ["transformer.fp8_recipe=blockwise"],
            1,
            "transformer.fp8_recipe=blockwise needs train.precision=fp8",
        ),
        (
            "stage2",
            ["train.precision=fp8", "transformer.fp8_recipe=fine"],
            1,
            "choose one of delayed, tensorwise, blockwise",
        ),
        ("stage2", ["train.vit_fp8=true"], 1, "train.vit_fp8=true needs train.precision=fp8"),
        (
            "stage2",
            ["train.precision=fp8", "train.vit_fp8=true", "transformer.fp8_recipe=delayed"],
            1,
            "numbers of chunks",
        ),
        (
            "stage2",
            ["train.precision=fp8", "transformer.first_last_layers_bf16=true", "transformer.fp8_recipe=delayed"],
            1,
            "transformer.first_last_layers_bf16=true does not work with transformer.fp8_recipe=delayed",
        ),
        (
            "stage2",
            ["train.precision=fp8", "transformer.num_layers_at_start_in_bf16=2"],
            1,
            "first_last_layers_bf16=true",
        ),
        (
            "stage2",
            ["train.precision=fp8", "data.seq_length=4104"],
            1,
            "data.seq_length=4104 is not a positive multiple of 16 (context parallel 1 x 16 for FP8): use 4112",
        ),
        (
            "stage2",
            ["train.precision=fp8", "transformer.fp8_recipe=blockwise", "data.seq_length=4112"],
            1,
            "data.seq_length=4112 is not a positive multiple of 128 (context parallel 1 x 128 for FP8): use 4224",
        ),
        (
            "stage3",
            [
                "train.precision=fp8",
                "transformer.fp8_recipe=mxfp8",
                "parallel=tp4",
                "data.seq_length=16400",
                "parallel.context_parallel_size=2",
            ],
            8,
            (
                "is not a positive multiple of 256 (context parallel 2 x tensor parallel 4 with sequence_parallel x 32"
                " for FP8): use"
            ),
        ),
        (
            "stage2",
            ["train.precision=fp8", "model.ffn_hidden_size=9736"],
            1,
            "a rank's part of model.ffn_hidden_size is 9736",
        ),
        (
            "stage2",
            ["transformer.cpu_offloading=true", "transformer.cpu_offloading_num_layers=4", "parallel=pp2"],
            2,
            "transformer.cpu_offloading=true works with neither pipeline parallelism nor",
        ),
        (
            "stage2",
            [
                "transformer.cpu_offloading=true",
                "transformer.cpu_offloading_num_layers=4",
                "transformer.recompute_granularity=full",
            ],
            1,
            "nor transformer.recompute_granularity",
        ),
        (
            "stage2",
            ["transformer.cpu_offloading=true"],
            1,
            "transformer.cpu_offloading_num_layers=0 must be at least 1",
        ),
        ("stage2", ["transformer.tp_comm_overlap=true"], 1, "needs parallel.sequence_parallel=true"),
        (
            "stage2",
            ["ddp.overlap_param_gather=true", "ddp.overlap_grad_reduce=false"],
            1,
            "needs ddp.overlap_grad_reduce",
        ),
        ("stage2", ["optimizer.overlap_param_gather=true"], 1, "is decided by ddp.overlap_param_gather"),
        ("stage2", ["transformer.fp8=hybrid"], 1, "is decided by train.precision"),
        (
            "stage2",
            ["transformer.fp8_param=true"],
            1,
            "transformer.fp8_param=True does not work here, since weights are not",
        ),
        ("stage2", ["ddp.fp8_param_gather=true"], 1, "ddp.fp8_param_gather=True does not work here"),
        ("stage2", ["transformer.apply_rope_fusion=true"], 1, "since each token has a position of its own"),
        ("stage2", ["transformer.persist_layer_norm=true"], 1, "since the norms are not apex's"),
        ("stage2", ["transformer.attention_dropout=0.1"], 1, "since attention is FlexAttention or SDPA"),
    ],
)
def test_impossible_settings_are_refused(stage, overrides, world_size, expected):
    assert expected in refusal(stage, *overrides, world_size=world_size)


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("data.seqlen=5", "data.seqlen=5: data has no key seqlen; did you mean data.seq_length."),
        ("+train.steps=5", "train.steps=5: train has no key steps; did you mean train.max_steps."),
        ("modell=tiny", "modell=tiny: the configuration has no key modell; did you mean model."),
        ("model=large", "model=large: conf/model has no large.yaml; choose one of hf, molmo2_4b"),
        ("optim.vit.warmup=3", "did you mean optim.vit.warmup_steps"),
        ("optim.clip_grad=null", "optim.clip_grad=null: it cannot be null; docs/settings.md"),
        ("train.max_steps=abc", "train.max_steps=abc: Value 'abc' of type 'str' could not be converted to Integer"),
        ("train.report=maybe", "train.report=maybe: Value 'maybe' is not a valid bool"),
        ("optim.llm.lr=low", "optim.llm.lr=low: Value 'low' of type 'str' could not be converted to Float"),
        ("train.precision=[", "train.precision=[: no viable alternative"),
        (
            "train.profile_steps=20",
            "train.profile_steps=20: it is no list, such as [1,2]; docs/settings.md has its type.",
        ),
        (
            "data.root=s3://b/x?sig=planted",
            "data.root=s3://b/x: mismatched input '=' expecting <EOF>; docs/settings.md",
        ),
        ("train.upload_to='s3://u:planted@b", "train.upload_to=s3://b: "),
        ("=3", "=3 has no key: settings are written KEY=VALUE."),
        ("~model", "~model takes away a part that every run needs: choose another with model=NAME."),
    ],
)
def test_unknown_keys_and_options_are_named(argument, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)) as raised:
        command_line.refuse_unknown_overrides([argument])
    assert "planted" not in str(raised.value)


@pytest.mark.parametrize(
    "arguments, use",
    [
        (["--seq-length", "36864"], "data.seq_length=36864"),
        (["model=tiny", "--max-frames=384"], "data.max_frames=384"),
        (["--lr", "1e-5"], "optim.vit.lr=1e-5 optim.connector.lr=1e-5 optim.llm.lr=1e-5"),
        (["--vit_lr", "1e-6"], "optim.vit.lr=1e-6"),
        (["--freeze_llm"], "optim.llm.freeze=true"),
        (["--freeze-vit", "true"], "optim.vit.freeze=true"),
        (["--hidden-size", "4096"], "model.hidden_size=4096"),
        (["--num-layers", "32"], "model.num_layers=32"),
        (["--bf16", "false"], "train.precision=fp32"),
        (["--sequence-parallel"], "parallel.sequence_parallel=true"),
        (["--use-distributed-optimizer"], "ddp.use_distributed_optimizer=true"),
        (["--recompute-granularity", "full"], "transformer.recompute_granularity=full"),
        (["--lr_scheduler_type", "cosine"], "optim.decay=cosine"),
        (["--model", "Molmo2-8B"], "model=molmo2_8b"),
        (["--batch-size", "64", "model=tiny"], "train.global_batch_size=64"),
        (["--tensor-model-parallel-size", "2"], "parallel.tensor_model_parallel_size=2"),
        (["--bf16", "model=tiny"], "train.precision=bf16"),
        (["--model", "tiny"], "model=tiny"),
        (["--max-framez", "8"], "data.max_frames=8"),
        (["--ffn-hidden-size", "9728"], "model.ffn_hidden_size=9728"),
        (["--ft_llm", "false"], "optim.llm.freeze=true"),
        (["--torch_dtype", "bfloat16"], "train.precision=bf16"),
        (["--lr_scheduler_type=constant_with_warmup"], "optim.decay=constant"),
        (["--training.seq_len", "4096"], "data.seq_length=4096"),
        (["--parallelism.tensor_parallel_degree=2"], "parallel.tensor_model_parallel_size=2"),
        (["--optim.llm.lr=1e-5"], "optim.llm.lr=1e-5"),
        (["--overlap-grad-reduce"], "ddp.overlap_grad_reduce=true"),
        (["--freeze_multi_modal_projector"], "optim.connector.freeze=true"),
        (["--dataloader_num_workers", "8", "--save_overwrite"], "data.num_workers=8 train.start_over=true"),
        (["--model", "allenai/Molmo2-8B"], "model=molmo2_8b"),
        (["--seq-length", "36864", "--max-frames=384"], "data.seq_length=36864 data.max_frames=384"),
    ],
)
def test_options_of_argparse_are_answered_with_what_works(arguments, use):
    with pytest.raises(ConfigError, match=f"KEY=VALUE here, without dashes: (perhaps )?use {re.escape(use)}\\.$"):
        flags.refuse_flags(arguments)
    command_line.refuse_unknown_overrides(use.split())


# What users of other trainers are likely to type: launch_scripts/pretrain.py and sft.py of allenai/molmo2, and the
# commonest of Megatron-LM, transformers, LLaMA-Factory, ms-swift, torchtune and torchtitan.
OF_OTHERS = """
    model vision_backbone global_batch_size n_eval_examples device_eval_batch_size seq_len vit_layers warmup_factor nlp
    pointing checkpoint mixture debug device_batch_size max_loss_examples max_inf_eval_examples prefetch_factor
    num_workers cp_degree save_folder max_duration save_overwrite
    tensor-model-parallel-size pipeline-model-parallel-size context-parallel-size sequence-parallel num-layers
    hidden-size ffn-hidden-size num-attention-heads num-query-groups kv-channels max-position-embeddings norm-epsilon
    rotary-base micro-batch-size global-batch-size seq-length train-iters train-samples lr min-lr lr-decay-style
    lr-decay-iters lr-warmup-iters lr-warmup-fraction weight-decay clip-grad adam-beta1 adam-beta2 adam-eps bf16 fp16
    fp8-format save load save-interval log-interval eval-interval eval-iters data-path split tokenizer-type
    tokenizer-model num-workers distributed-backend hidden-dropout attention-dropout use-flash-attn transformer-impl
    recompute-granularity recompute-method recompute-num-layers recompute-activations overlap-grad-reduce
    overlap-param-gather tp-comm-overlap use-distributed-optimizer num-layers-per-virtual-pipeline-stage num-experts
    expert-model-parallel-size distributed-timeout-minutes exit-duration-in-mins tensorboard-dir wandb-project
    wandb-exp-name async-save finetune pretrained-checkpoint no-load-optim no-load-rng seed img-h img-w patch-dim
    freeze-LM freeze-ViT vision-model-type dataloader-type
    output_dir overwrite_output_dir do_train do_eval per_device_train_batch_size per_device_eval_batch_size
    gradient_accumulation_steps num_train_epochs max_steps learning_rate lr_scheduler_type warmup_steps warmup_ratio
    optim weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm gradient_checkpointing torch_compile
    use_liger_kernel logging_steps logging_strategy eval_strategy eval_steps save_strategy save_steps save_total_limit
    run_name report_to dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor ddp_timeout fsdp
    deepspeed load_best_model_at_end metric_for_best_model push_to_hub data_seed resume_from_checkpoint local_rank
    model_name_or_path stage dataset dataset_dir template cutoff_len finetuning_type lora_rank lora_target
    freeze_vision_tower freeze_multi_modal_projector freeze_language_model image_max_pixels video_max_pixels video_fps
    video_maxlen val_size flash_attn packing max_samples preprocessing_num_workers train_type tuner_type torch_dtype
    freeze_vit freeze_aligner freeze_llm vit_lr aligner_lr max_pixels attn_impl split_dataset_ratio max_length system
    config epochs batch_size dtype compile training.steps training.local_batch_size optimizer.name optimizer.lr
    parallelism.pipeline_parallel_degree activation_checkpoint.mode checkpoint.interval
""".split()


def test_options_of_other_trainers_are_answered_and_keys_in_answers_are_those_of_the_configuration():
    silent = [name for name in OF_OTHERS if re.match("docs/settings.md|perhaps", flags.advice(f"--{name}", ""))]
    assert not silent
    keys = [key.split(".") for key in flags.types_of_keys()]
    known = {".".join(parts[:number]) for parts in keys for number in range(1, len(parts) + 1)}
    for name, words in flags.WORDS.items():
        for key in re.findall(r"\b(?:train|data|optim|parallel|model|schedule|lora)\.[a-z_.0-9]*[a-z_0-9]", words):
            assert key in known, (name, key)
    command_line.refuse_unknown_overrides(
        [f"{key}={value}" for key, values in flags.CHOICES.items() for value in values.values()]
    )


@pytest.mark.parametrize(
    "option, said",
    [
        ("--lr-decay-style=inverse-square-root", "use optim.decay=NAME, which is one of cosine, linear, constant"),
        ("--model=Qwen/Qwen3-8B", "use model=NAME, which is one of hf, molmo2_4b"),
        ("--schedule=reprot", "use schedule=NAME, which is one of finetune, quickstart, report, seed"),
        ("--torch_dtype=float16", "use train.precision=NAME, which is one of auto, fp32, bf16, fp8"),
    ],
)
def test_an_option_whose_value_is_none_of_ours_is_answered_with_those_that_are(option, said):
    with pytest.raises(ConfigError, match=said):
        flags.refuse_flags([option])


def test_every_advised_key_is_one_of_the_configuration_and_what_hydra_takes_passes():
    groups = {path.name for path in command_line.CONF_DIR.iterdir() if path.is_dir()}
    of_megatron = {key for key in flags.KEYS.values() if key.startswith(("transformer.", "ddp."))}
    keys = {*flags.KEYS.values(), *(key for several in flags.SEVERAL.values() for key in several)}
    assert keys - of_megatron <= {*flags.types_of_keys(), *groups}
    command_line.refuse_unknown_overrides([pair for both in flags.SWITCHES.values() for pair in both])
    for option, words in (
        ("--resume_from_checkpoint=x", "dashes: run the same command with the same run_dir: it goes on by itself; to"),
        ("--schedule=report", "use schedule=report"),
        ("--freeze_vision", "use optim.vit.freeze=true"),
        ("--gradient-accumulation=4", "use train.global_batch_size and train.micro_batch_size"),
        ("--lora_rank=8", "use lora.rank=8"),
        ("--train_type=lora", "use lora.rank=16"),
        ("--report_to=wandb", "train.wandb_project=NAME"),
        ("--nnodes=4", "torchrun --nnodes N"),
    ):
        with pytest.raises(ConfigError, match=words):
            flags.refuse_flags([option])
    flags.refuse_flags(["--config-name", "stage1", "-c", "job", "--resolve", "train.seed=-1", "data.root=a--b"])
    with pytest.raises(ConfigError, match="docs/settings.md has what is meant by --no-such-thing"):
        flags.refuse_flags(["--cfg=job", "--no-such-thing"])
    cfg = build("stage3", "data.seq_length=36864", "data.max_frames=384", "optim.llm.lr=1e-5")
    assert (cfg.data.seq_length, cfg.data.max_frames, cfg.optim.llm.lr) == (36864, 384, 1e-5)


def test_known_overrides_pass():
    command_line.refuse_unknown_overrides(
        [
            "model=tiny",
            "parallel.tensor_model_parallel_size=4",
            "transformer.recompute_granularity=full",
            "--cfg",
            "job",
            "hydra.verbose=true",
            "model.rope_scaling.factor=2",
            "optimizer.adam_eps=1e-8",
            "train.save_best=null",
            "train.init_from=[a,b]",
            "optim.freeze_patterns=[.*]",
            "run_dir='a b/${name}'",
            "optim.llm.lr=1e-4",
            "train.async_checkpoint=true",
        ]
    )


def test_megatron_fields_are_set_from_the_command_line():
    words = ["transformer.recompute_granularity=selective", "optimizer.adam_eps=1e-8", "ddp.bucket_size=1000"]
    cfg = build("stage2", *words)
    checks.check(cfg, 1)
    assert (cfg.transformer, cfg.optimizer, cfg.ddp) == (
        {"recompute_granularity": "selective"},
        {"adam_eps": 1e-8},
        {"bucket_size": 1000},
    )


def test_a_key_without_a_value_is_named():
    with pytest.raises(ConfigError, match="model.hf_path has no value"):
        build("stage2", "model=hf")


def test_uneven_pipeline_stages():
    cfg = build("stage2", "parallel.pipeline_model_parallel_size=4", "parallel.num_layers_in_first_pipeline_stage=6")
    assert checks.layers_per_stage(cfg.parallel, cfg.model) == [6, 10, 10, 10]


@pytest.mark.slow
def test_architecture_survives_json():
    for model in ("tiny", "molmo2_o_7b"):
        original = build("stage2", f"model={model}").model
        assert schema.model_config_from_json(schema.model_config_to_json(original)) == original


def test_megatron_fields_that_cannot_work_are_fields_of_megatron():
    from dataclasses import fields

    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.fp8_utils import get_fp8_align_size
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    classes = {"transformer": TransformerConfig, "optimizer": OptimizerConfig, "ddp": DistributedDataParallelConfig}
    for prefix, cls in classes.items():
        names = {field.name for field in fields(cls)}
        assert set(megatron_fields.CANNOT_WORK[prefix]) <= names
        # They are read from Megatron's source, so that the planner need not import it.
        assert megatron_fields.names_of_fields(prefix) == names
    for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8"):
        multiple, _ = checks.row_multiple(schema.ParallelConfig(), "fp8", recipe)
        assert multiple % get_fp8_align_size(recipe) == 0


@pytest.mark.slow
def test_fp8_settings_that_work_are_accepted():
    fp8 = ["train.precision=fp8", "train.vit_fp8=true"]
    for extra in ([], ["transformer.first_last_layers_bf16=true"]):
        for model in ("molmo2_4b", "molmo2_8b", "molmo2_o_7b"):
            checks.check(build("stage2", f"model={model}", "parallel=tp4", *fp8, *extra), 4)
    for model in ("molmo2_4b", "molmo2_8b"):
        blockwise = ["train.precision=fp8", "transformer.fp8_recipe=blockwise"]
        checks.check(build("stage2", f"model={model}", "parallel=tp4", *blockwise), 4)


@pytest.mark.parametrize(
    "world_size, overrides, width",
    [
        (1, ["transformer.fp8_recipe=blockwise", "train.vit_fp8=true"], "model.vit.ffn_hidden_size is 4304"),
        (1, ["transformer.fp8_recipe=mxfp8", "train.vit_fp8=true"], "model.vit.ffn_hidden_size is 4304"),
        # 11,008 / 4 is 21.5 blocks.
        (4, ["transformer.fp8_recipe=blockwise", "parallel=tp4", "model=molmo2_o_7b"], "model.ffn_hidden_size is 2752"),
        (
            1,
            ["transformer.fp8_recipe=blockwise", "model.hidden_size=2568", "train.vit_fp8=true"],
            "model.hidden_size is 2568",
        ),
    ],
)
def test_the_advice_on_widths_in_fp8_works(world_size, overrides, width):
    overrides = ["train.precision=fp8", *overrides]
    message = refusal("stage2", *overrides, world_size=world_size)
    assert width in message
    for way in message.split(": use ")[1].rstrip(".").split(" or "):
        change, _, left_out = way.partition(" without ")
        left_out = [change.split("=")[0], *left_out.split(", ")]
        kept = [override for override in overrides if override.split("=")[0] not in left_out]
        checks.check_settings(build("stage2", *kept, change), world_size)
