"""Fine-tuning: the words of its command line, hardware=auto, the blend of one's own data, and epochs as steps."""

import re
from dataclasses import asdict, replace

import prepare as prepare_tool
import pytest
import yaml
from test_blend import make_source

from molmo2_nemo import finetune
from molmo2_nemo.auto import resolve
from molmo2_nemo.command_line import compose, finetune_words, prepare, quoted
from molmo2_nemo.config.checks import check_settings, epochs_of
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import DataConfig
from molmo2_nemo.data import epochs
from molmo2_nemo.data.blend import Source, check_held_out, load_blend, missing_sources
from molmo2_nemo.finetune import Machine, auto_settings, choose, fastest
from molmo2_nemo.planner.memory import GIB, RESERVE_GIB, Job, peak, worst_stage
from molmo2_nemo.planner.search import layouts
from molmo2_nemo.planner.step_time import estimate
from molmo2_nemo.planner.verdict import verdict

TINY = ["model=tiny", "schedule=quickstart", "optim=from_scratch"]


@pytest.fixture
def root(tmp_path):
    """Two folders of one's own, and general data: three of pixmo, of which one is not there, and chats."""
    make_source(tmp_path, "mine", train=(60,), val=(6,))
    make_source(tmp_path, "more", train=(20,), val=())
    for name, number in (("pixmo-cap", 400), ("pixmo-points", 100), ("chats", 50)):
        make_source(tmp_path / "shards", name, train=(number,))
    names = ("pixmo-cap", "pixmo-points", "pixmo-count", "chats")
    sources = "".join(f"  {name}: {{path: {name}}}\n" for name in names)
    (tmp_path / "general.yaml").write_text(f"weighting: sqrt\nsources:\n{sources}")
    return tmp_path


def own(root, **changes):
    settings = {"own": {"mine": str(root / "mine")}, "blend": str(root / "general.yaml"), "root": str(root / "shards")}
    return DataConfig(**settings | changes)


def shares(cfg):
    return {source.name: round(source.weight, 6) for source in load_blend(cfg)}


# -- words ------------------------------------------------------------------------------------------------------------


def test_own_data_have_any_name_and_give_the_run_theirs(root):
    words = ["model=tiny", f"data.my-cats={root / 'mine'}", "data.other=later", "data.num_workers=0"]
    found = finetune_words(words)
    own_words = [f"data.own.my-cats={root / 'mine'}", "data.own.other=later"]
    assert found == ["name=my-cats", "model=tiny", *own_words, "data.num_workers=0"]
    assert finetune_words(found) == found  # said once or twice, the same
    config = compose("finetune", [*TINY, *words])
    assert (config.run_dir, config.data.own["other"]) == ("runs/my-cats", "later")
    assert "name=x" in finetune_words(["data.mine=a", "name=x"]) and len(finetune_words(["data.mine=a", "name=x"])) == 2
    # A key with a slip is no data set, unless it is a folder.
    with pytest.raises(ConfigError, match="data has no key seq_lenght; did you mean data.seq_length"):
        compose("finetune", [*TINY, "data.seq_lenght=512"])
    assert finetune_words([f"data.seq_lenght={root}"])[-1] == f"data.own.seq_lenght={root}"


@pytest.mark.parametrize("name", ["schön (v1), neu", "a,b", "it's", "100 %", "[x]y", "日本", "a=b"])
def test_folders_may_have_any_name(tmp_path, name):
    """Hydra's grammar has a meaning for commas and brackets, and does not know other letters than those of English."""
    folder = tmp_path / name
    folder.mkdir()
    words = ["model=tiny", f"data.mine={folder}", f"run_dir={folder}/run", "--cfg", "job"]
    config = compose("finetune", [*TINY, *words[:-2]])
    assert (config.data.own, config.run_dir, config.name) == ({"mine": str(folder)}, f"{folder}/run", "mine")
    # As a recipe does it, also where a quoted word comes again.
    once = quoted(finetune_words(words))
    assert quoted(once) == once and once[-2:] == ["--cfg", "job"]


@pytest.mark.parametrize("word", ["data.mine", "train", "data.mine shards/mine"])
def test_a_word_without_a_value_is_one_sentence(word):
    words = ["model=tiny", *word.split()]
    with pytest.raises(ConfigError, match="has no value: settings are written KEY=VALUE"):
        compose("finetune", words)
    assert prepare(["model=tiny", "--cfg", "job", "--resolve"])[1:] == ["--cfg", "job", "--resolve"]


@pytest.mark.parametrize("name, what", [("config.json", "a Hugging Face model"), (".nv-meta", "shards of data")])
def test_a_run_is_not_put_into_the_folder_of_something_else(tmp_path, name, what):
    (tmp_path / name).touch()
    words = ["model=tiny", "data.mine=x"]
    with pytest.raises(ConfigError, match=f"run_dir={tmp_path} holds {what}: leave run_dir out, or name a folder"):
        check_settings(compose("finetune", [*words, f"run_dir={tmp_path}"]), 1)
    for advised in ([], [f"run_dir={tmp_path / 'run'}"]):
        check_settings(compose("finetune", [*words, *advised]), 1)


def test_lora_by_its_rank_has_the_rates_of_lora():
    lora = compose("finetune", ["model=tiny", "data.mine=x", "lora.rank=8"])
    assert (lora.lora.rank, lora.optim.llm.lr, lora.optim.vit.lr) == (8, 1e-4, 5e-5)
    full = compose("finetune", ["model=tiny", "data.mine=x"])
    assert (full.lora.rank, full.optim.llm.lr, full.optim.connector.lr) == (0, 1e-5, 5e-6)
    part = compose("finetune", ["model=tiny", "data.mine=x", "tune=connector"])
    assert (part.optim.llm.freeze, part.optim.vit.freeze, part.optim.connector.lr) == (True, True, 2e-4)
    for config in (lora, full, part):
        check_settings(config, 1)
    assert compose("finetune", ["model=tiny", "data.mine=x", "lora.rank=0"]) == full


@pytest.mark.parametrize("tune, rank", [("full", 4), ("connector", 4), ("lora", 0)])
def test_tune_and_rank_that_contradict_each_other_are_refused(tune, rank):
    words = ["model=tiny", "data.mine=x"]
    with pytest.raises(ConfigError, match=f"tune={tune} lora.rank={rank}: .*leave one of the two out"):
        compose("finetune", [*words, f"tune={tune}", f"lora.rank={rank}"])
    # Both ways of the advice work, also where the program's own choice is between the two.
    for one in (f"tune={tune}", f"lora.rank={rank}"):
        check_settings(compose("finetune", [*words, one]), 1)
        assert choose(finetune_words([*words, one, "hardware=auto"]), Machine(0))[1] == 1


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "name the shards that tools/prepare.py has made of your labels, such as data.mine=shards/mine"),
        (["data.mine=x", "train.max_steps=9"], "train.max_steps=9 and train.epochs=3.0: give one of them a number"),
        (["data.mine=x", "train.epochs=null"], "train.max_steps=null and train.epochs=null: give one of them"),
        (["data.mine=x", "train.epochs=0"], "train.epochs=0.0 must be above 0"),
        (
            ["data.mine=x", "train.save_every=often"],
            "train.save_every=often is neither a number of steps nor of epochs",
        ),
        (["data.mine=x", "train.validate_every=0"], "train.validate_every=0 must be at least 1"),
        (["data.mine=x", "train.validate_every=0 epochs"], "is neither a number of steps nor of epochs"),
        (["data.mine=x", "optim.warmup_share=1.5"], "optim.warmup_share=1.5 is not from 0 to below 1"),
        (["data.mine=x", "schedule=seed"], "use schedule=finetune or schedule=quickstart"),
        (["data.mine=x", "train.validation_batches=0"], "train.save_best=loss is measured by train.validation_batches"),
    ],
)
def test_mistakes_are_sentences_before_anything_is_read(words, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_settings(compose("finetune", ["model=tiny", *words]), 1)


def test_a_number_of_steps_is_taken_without_epochs():
    config = compose("finetune", ["model=tiny", "data.mine=x", "train.max_steps=9", "train.epochs=null"])
    check_settings(config, 1)
    assert [epochs_of(value) for value in ("1 epoch", "0.5 epochs", ".25epochs", "2", 2, "epoch", "-1 epochs")] == [
        1.0, 0.5, 0.25, None, None, None, None,
    ]  # fmt: skip


# -- hardware=auto ----------------------------------------------------------------------------------------------------

AUTO = ["data.mine=x", "hardware=auto"]


@pytest.mark.parametrize(
    "model, machine, tune",
    [
        ("molmo2_4b", Machine(1, 139.8, "NVIDIA H200"), "full"),
        ("molmo2_8b", Machine(1, 79.6), "lora"),
        ("molmo2_4b", Machine(1, 40.0, "a GPU of 2031"), "lora"),
    ],
)
def test_full_fine_tuning_where_it_fits_else_lora(model, machine, tune):
    words, ranks, lines = choose(finetune_words([f"model={model}", *AUTO]), machine)
    assert ranks == 1 and f"tune={tune}" in words and "hardware=auto" not in words
    assert f"hardware=auto: {finetune.TUNES[tune]} on 1 GPU of {machine.gib:.1f} GiB" in lines[-1]
    assert (lines[0] == f"hardware=auto: full fine-tuning does not fit 1 GPU of {machine.gib:.1f} GiB") == (
        tune == "lora"
    )
    assert ("s a step" in lines[-1]) == (machine.name != "a GPU of 2031")
    # The words are a configuration that fits by the plan's own verdict.
    config, _ = finetune_resolved(words, machine)
    assert verdict(config, 1, machine.gib) is None


def finetune_resolved(words, machine):
    from molmo2_nemo.auto import resolve

    return resolve(compose("finetune", words), machine.gpus, machine.gib)


def test_what_the_user_says_of_memory_is_kept_and_planned_with():
    machine = Machine(2, 139.8, "NVIDIA H200")
    own = ["transformer.recompute=mlp", "train.vision_chunk_crops=16", "train.micro_batch_size=2"]
    words, gpus, lines = choose(finetune_words(["model=molmo2_8b", "tune=lora", *own, *AUTO]), machine)
    assert all(words.count(word) == 1 for word in own) and "train.vision_recompute=auto" in words
    assert not any(word.startswith(("transformer.recompute=auto", "train.micro_batch_size=1")) for word in words)
    config, _ = finetune_resolved(words, replace(machine, gpus=gpus))
    job = Job(config, gpus)
    assert (job.rows, job.transformer("recompute_modules")) == (2, ["mlp"])
    assert f"({peak(worst_stage(job)[1])[0] / GIB + RESERVE_GIB:.0f} GiB, 4 of them in reserve" in lines[-1]
    # Everything kept of eight rows does not fit, and leaving that out, as is said, does.
    own = ["transformer.recompute=none", "train.micro_batch_size=8"]
    words, machine = finetune_words(["model=molmo2_8b", "tune=lora", *AUTO]), Machine(1, 79.6)
    with pytest.raises(ConfigError, match=rf"and {' '.join(own)}, which would be chosen if left out; the smallest"):
        choose([*words, *own], machine)
    assert "LoRA on 1 GPU" in choose(words, machine)[2][-1]


def test_gpus_that_cannot_share_the_rows_are_left_out():
    words, ranks, lines = choose(finetune_words(["model=molmo2_4b", "tune=lora", *AUTO]), Machine(3, 79.6))
    assert ranks == 2 and "LoRA on 2 GPUs of 79.6 GiB, 1 of 3 GPUs idle" in lines[-1]


def test_where_nothing_fits_the_smallest_that_does_is_named_and_does():
    with pytest.raises(ConfigError) as refused:
        choose(finetune_words(["model=molmo2_8b", *AUTO]), Machine(1, 20.0))
    said = re.search(r"the smallest that fits is LoRA on (\d+) GPUs of 20.0 GiB\.$", str(refused.value))
    assert choose(finetune_words(["model=molmo2_8b", *AUTO]), Machine(int(said[1]), 20.0))[1] == int(said[1])


def test_a_run_goes_on_with_what_it_was_begun_with_and_a_layout_of_ones_own_is_refused(tmp_path):
    words = finetune_words(["model=molmo2_4b", *AUTO, f"run_dir={tmp_path}"])
    for tune in ("lora", "connector", "full"):
        begun = asdict(compose("finetune", ["model=molmo2_4b", "data.mine=x", f"tune={tune}"]))
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(begun))
        assert f"tune={tune}" in choose(words, Machine(1, 139.8))[0]
    with pytest.raises(ConfigError, match="parallel=tp2: hardware=auto chooses the layout itself"):
        choose([*words, "parallel=tp2"], Machine(2, 79.6))
    found, ranks, (line,) = choose(words, Machine(0))
    assert ranks == 1 and "tune=full" in found and "no GPU is here; 1 rank(s) on the CPU" in line


def test_the_recipe_starts_a_rank_for_each_gpu(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(finetune, "this_machine", lambda: Machine(2, 79.6))
    monkeypatch.setattr(finetune.os, "execv", lambda program, words: started.append(words[1:]))
    for name in ("WORLD_SIZE", "RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_ID", "0")  # inside of an allocation, of which this process is no rank
    finetune.ready(["recipes/finetune.py", "model=molmo2_4b", "tune=lora", *AUTO])
    [words] = started
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "recipes/finetune.py"]
    assert words[:6] == torchrun and "hardware=auto" not in words and "data.own.mine=x" in words
    assert "hardware=auto: LoRA on 2 GPUs" in capsys.readouterr().out
    # Under torchrun the ranks are taken as they are.
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "tune=lora" in finetune.ready(["recipes/finetune.py", "model=molmo2_4b", "tune=lora", *AUTO])
    monkeypatch.delenv("WORLD_SIZE")
    shown = finetune.ready(["recipes/finetune.py", "--cfg", "job", "model=molmo2_4b", "tune=lora", *AUTO])
    assert shown[:2] == ["--cfg", "job"] and "model=molmo2_4b" in shown
    assert "hardware=auto" not in shown and len(started) == 1
    with pytest.raises(SystemExit, match="tools/plan.py --config-name finetune model=tiny gpus=8"):
        finetune.ready(["recipes/finetune.py", "model=tiny", "gpus=8"])
    with pytest.raises(SystemExit, match="hardware=auto is for recipes/finetune.py"):
        prepare(["model=tiny", "hardware=auto"])  # of another recipe
    for stage in ("stage2", "finetune"):  # tools that plan nothing themselves
        with pytest.raises(ConfigError, match="hardware=auto is for recipes/finetune.py, and for tools/plan.py"):
            compose(stage, ["model=tiny", *AUTO])


# -- the blend --------------------------------------------------------------------------------------------------------


def test_every_sample_of_ones_own_comes_as_often_unless_weights_say_otherwise(root):
    both = {"mine": str(root / "mine"), "more": str(root / "more")}
    assert shares(own(root, own=both)) == {"mine": 0.75, "more": 0.25}
    assert shares(own(root, own=both, own_weights={"mine": 1, "more": 3})) == {"mine": 0.25, "more": 0.75}
    with pytest.raises(ConfigError, match="data.own_weights is of mine, and your data are mine, more"):
        load_blend(own(root, own=both, own_weights={"mine": 1}))


def test_a_share_of_general_data_is_kept(root):
    kept = own(root, keep="pixmo:0.3")
    # By the square roots of 400 and 100, as the blend says.
    assert shares(kept) == {"mine": 0.7, "pixmo-cap": 0.2, "pixmo-points": 0.1}
    assert missing_sources(kept) == ["pixmo-count"]
    assert shares(own(root, keep=["pixmo-points:0.1", "chats:0.2"])) == {"mine": 0.7, "pixmo-points": 0.1, "chats": 0.2}
    assert len(shares(own(root, keep="all:0.5"))) == 4
    # Only one's own are measured.
    held_out = {source.name: source.num_validation_samples for source in load_blend(kept)}
    assert held_out == {"mine": 6, "pixmo-cap": 0, "pixmo-points": 0}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"own": {"mine": "nowhere"}}, "data.mine=nowhere is no folder: make it with python tools/prepare.py LABELS"),
        ({"keep": "pixmo"}, "data.keep=pixmo: pixmo is not NAME:SHARE, such as pixmo:0.3"),
        ({"keep": "pixmo:2"}, "pixmo:2 is not NAME:SHARE"),
        ({"keep": ["pixmo:0.6", "chats:0.5"]}, "leaves nothing of 1.1 for your own data"),
        (
            {"keep": "tulu:0.1"},
            "is or begins with tulu: choose one of pixmo-cap, pixmo-points, pixmo-count, chats, or all",
        ),
        ({"keep": "pixmo-count:0.1"}, "none of pixmo-count is prepared under data.root="),
        ({"keep": ["pixmo:0.1", "pixmo-cap:0.1"]}, "names pixmo-cap twice"),
    ],
)
def test_wrong_mixtures_are_sentences(root, changes, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_blend(own(root, **changes))


def test_labels_and_pictures_in_the_place_of_shards_are_told_apart(root):
    for path, said in (
        (root / "labels.jsonl", "is a file: make shards of your labels with python tools/prepare.py"),
        (root / "photos", "holds neither .tar files nor .nv-meta: name the folder that python tools/prepare.py LABELS"),
    ):
        path.mkdir() if path.name == "photos" else path.touch()
        with pytest.raises(ConfigError, match=re.escape(f"data.mine={path} {said}")) as refused:
            load_blend(own(root, own={"mine": str(path)}))
        assert "--out shards/mine --split 90/5/5" in str(refused.value)


def test_data_without_a_part_for_validation_keep_no_best(root):
    config = compose("finetune", [*TINY, f"data.more={root / 'more'}"])
    said = f"train.save_best=loss needs held-out samples, and data.more={root / 'more'} has none: prepare it again"
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        check_held_out(config, load_blend(config.data))
    advised = re.search(r"or set (.*)\.$", str(refused.value))[1].split()
    for words in (advised, prepare_tool.WITHOUT_HELD_OUT):
        config = compose("finetune", [*TINY, f"data.more={root / 'more'}", *words])
        check_settings(config, 1)
        check_held_out(config, load_blend(config.data))


# -- epochs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr(epochs, "samples_per_row", lambda config, sources: 2.5)
    return compose("finetune", [*TINY, "data.mine=x", "train.epochs=3", "train.save_every=0.5 epochs"])


def test_an_epoch_is_of_ones_own_data_whatever_is_kept_beside_it(config):
    sources = [Source("mine", "", 0.8, 100), Source("kept", "", 0.2, 10**6)]
    epoch = epochs.measured(config, sources)
    # A step has 4 rows x 2.5 samples, 8 of them one's own.
    assert (epoch.samples, epoch.steps) == (100, 12.5)
    found = epochs.in_steps(config, epoch)
    assert (found.train.max_steps, found.train.save_every, found.train.validate_every) == (38, 6, 12)
    assert found.train.epochs is None and found.optim.llm.warmup_steps == 2  # a twentieth
    check_settings(found, 1)
    own_warmup = replace(config.optim, vit=replace(config.optim.vit, warmup_steps=9))
    assert epochs.in_steps(replace(config, optim=own_warmup), epoch).optim.vit.warmup_steps == 9
    [line] = epochs.described(found, epoch, (10.0, 20.0))
    assert "3.0 epochs of 100 samples are 38 steps" in line and "expected time: 6 min to 13 min by the plan" in line


def test_many_epochs_are_warned_of_and_too_few_samples_refused(config):
    few = [Source("mine", "", 1.0, 30)]
    long = replace(config, train=replace(config.train, epochs=None, max_steps=1000))
    _, warning = epochs.described(epochs.in_steps(long, epochs.measured(long, few)), epochs.measured(long, few), None)
    assert warning.startswith("warning: each sample comes 333 times, more than 20")
    # The advice fits the rows of a micro-batch, or changes these, too.
    for micro in (1, 4, 8):
        large = replace(config, train=replace(config.train, micro_batch_size=micro))
        with pytest.raises(ConfigError, match="has 9 training samples, fewer than the 10 of one step") as refused:
            epochs.measured(large, [Source("mine", "", 1.0, 9)])
        advised = {
            key: int(number) for key, number in re.findall(r"train.(\w+_batch_size)=(\d+)(?! rows)", str(refused.value))
        }
        smaller = replace(large, train=replace(large.train, **advised))
        assert epochs.measured(smaller, [Source("mine", "", 1.0, 9)]).steps >= 1
        check_settings(smaller, 1)


@pytest.mark.slow
def test_samples_of_a_row_are_those_of_the_loader(sample, tmp_path):
    """The loader's own packing of the same blend is the oracle."""
    from molmo2_nemo.data.loader import train_loader

    words = [*TINY, *(f"data.{name}={sample / name}" for name in ("points", "image_qa", "text", "video_caption"))]
    config = compose("finetune", [*words, "data.num_workers=0", "data.packing_buffer_size=32"])
    sources = load_blend(config.data)
    loader = train_loader(config.data, config.model.vision, sources, 0, 1, None, 4)
    drawn = sum(len(next(loader).examples) for _ in range(40))
    assert epochs.samples_per_row(config, sources) == pytest.approx(drawn / 160, rel=0.05)


@pytest.mark.parametrize("tune, gib", [("full", 79.6), ("lora", 79.6), ("lora", 24.0), ("full", 45.0)])
def test_the_layout_that_is_found_early_is_the_fastest_of_all(tune, gib):
    words = finetune_words(["model=molmo2_4b", "data.mine=x", f"tune={tune}"])
    config, machine = compose("finetune", [*words, *auto_settings(words)]), Machine(4, gib)
    jobs = [Job(resolve(layout, 4, gib)[0], 4) for layout in layouts(config, 4)]
    fitting = [job for job in jobs if peak(worst_stage(job)[1])[0] <= (gib - RESERVE_GIB) * GIB]
    times = [estimate(job).seconds for job in fitting]
    assert 1 < len(set(times)) and fastest(config, machine)[1].seconds == min(times)
