"""Adapters in files: into and out of PEFT, merged, and what is refused. Layouts: tests/ranks/test_lora_layouts.py."""

import json
import shutil

import export_hf
import import_hf
import pytest
import torch
from hf_models import as_released, assert_same, released_file
from safetensors.torch import load_file, save_file

from molmo2_nemo import checkpoint_dir, lora_base
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.lora import adapted_matrices
from molmo2_nemo.config.schema import LORA_TARGETS, Config, LoraConfig, TrainConfig
from molmo2_nemo.hf import convert, peft
from molmo2_nemo.hf.adapters import adapted
from molmo2_nemo.hf.architecture import model_config_from_hf
from molmo2_nemo.hf.names import tensor_table
from molmo2_nemo.training import start


def trained_by_peft(folder, out, **settings):
    """A random adapter on transformers' model as PEFT saves one. Returns what PEFT makes of both, merged."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import Molmo2ForConditionalGeneration

    torch.manual_seed(5)
    # init_lora_weights=False: B is not zero.
    config = PeftConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **settings})
    model = get_peft_model(Molmo2ForConditionalGeneration.from_pretrained(folder), config)
    model.save_pretrained(out / "peft")
    model.merge_and_unload().save_pretrained(out / "merged")
    return out / "peft", as_released(out / "merged")


@pytest.fixture(scope="module")
def base(hf_models, tmp_path_factory):
    """A checkpoint with another one of the same sizes beside it."""
    folder = tmp_path_factory.mktemp("base")
    convert.import_hf(hf_models["qwen3_gqa"], folder / "base", progress=lambda line: None)
    other = shutil.copytree(hf_models["qwen3_gqa"], folder / "other_hf")
    tensors = released_file(other)
    tensors["model.transformer.ln_f.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    convert.import_hf(other, folder / "other", progress=lambda line: None)
    return folder / "base"


@pytest.fixture(scope="module")
def imported(hf_models, base, tmp_path_factory):
    """(a folder of PEFT's with adapters on some layers, the checkpoint of it, what PEFT has merged, what was said)."""
    out, said = tmp_path_factory.mktemp("adapter"), []
    some = r".*language_model.*(q_proj|v_proj|down_proj|gate_proj)|.*vision_tower.*\.(k_proj|fc1)"
    some += r"|.*image_pooling_2d\.(q_proj|o_proj)|.*image_projector\.up_proj"
    folder, merged = trained_by_peft(hf_models["qwen3_gqa"], out, target_modules=some, use_rslora=True)
    peft.import_adapter(folder, base, out / "step_00000000", said.append)
    return folder, out / "step_00000000", merged, said


def test_an_adapter_of_peft_merges_to_the_same_bits(imported, tmp_path):
    _, checkpoint, merged, _ = imported
    convert.export_hf(checkpoint, tmp_path / "out", progress=lambda line: None)
    assert_same(released_file(tmp_path / "out"), merged)
    # The sum is made in float32, and then rounded.
    convert.export_hf(checkpoint, tmp_path / "half", dtype=torch.bfloat16, progress=lambda line: None)
    assert_same(released_file(tmp_path / "half"), {name: tensor.bfloat16() for name, tensor in merged.items()})


def test_an_adapter_comes_in_and_goes_out_bit_for_bit(imported, base, tmp_path):
    folder, checkpoint, _, said = imported
    layers = peft.export_adapter(checkpoint, tmp_path / "out")
    before, after = (load_file(path / peft.WEIGHTS) for path in (folder, tmp_path / "out"))
    assert len(after) == 2 * layers and set(before) < set(after)
    assert_same({name: after[name] for name in before}, before)
    added = {name: tensor for name, tensor in after.items() if name not in before}
    assert all(not tensor.any() for name, tensor in added.items() if "lora_B" in name)
    # Those that were missing can be trained, from values that the seed decides.
    for seed, same in ((TrainConfig.seed, True), (7, False)):
        peft.import_adapter(folder, base, tmp_path / f"seed{seed}", lambda line: None, seed=seed)
        peft.export_adapter(tmp_path / f"seed{seed}", tmp_path / f"seed{seed}_out")
        again = load_file(tmp_path / f"seed{seed}_out" / peft.WEIGHTS)
        assert all(tensor.any() and torch.equal(again[name], tensor) == same
                   for name, tensor in added.items() if "lora_A" in name)  # fmt: skip
    [line] = said
    assert line.startswith(f"{len(added) // 2} linear layers had no adapter")
    assert "4 x model.language_model.layers.*.self_attn.k_proj" in line
    written, read = (json.loads((path / peft.CONFIG).read_text()) for path in (tmp_path / "out", folder))
    for key in ("peft_type", "r", "lora_alpha", "use_rslora", "bias", "fan_in_fan_out", "use_dora"):
        assert written[key] == read[key], key


def test_peft_loads_what_is_exported_on_the_layers_that_are_adapted_alone(imported, hf_models, tmp_path):
    from peft import PeftModel
    from transformers import Molmo2ForConditionalGeneration

    _, checkpoint, merged, _ = imported
    peft.export_adapter(checkpoint, tmp_path / "out")
    model = PeftModel.from_pretrained(
        Molmo2ForConditionalGeneration.from_pretrained(hf_models["qwen3_gqa"]), tmp_path / "out"
    )
    loaded = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    architecture = checkpoint_dir.read_model(checkpoint)
    lora = LoraConfig(rank=3, targets=list(LORA_TARGETS))
    expected = {layer for one in adapted(architecture, lora) for layer in one.layers}
    assert loaded == {f"base_model.model.{layer}" for layer in expected}
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_same(as_released(tmp_path / "merged"), merged)


def test_sizes_of_the_adapters_are_those_of_the_weights(hf_models):
    for name, folder in hf_models.items():
        model = model_config_from_hf(folder)
        shapes = {entry.key: entry.shape for entry in tensor_table(model)}
        for matrix in adapted_matrices(model, LoraConfig(rank=1, targets=list(LORA_TARGETS))):
            assert shapes[f"{matrix.name}.weight"] == (matrix.rows, matrix.columns), (name, matrix)
            assert len(matrix.part_of_row(1)) == matrix.rows
            if matrix.split == "rows":
                assert len(matrix.part_of_row(2)) == matrix.rows // 2


def test_the_tools_say_what_they_did_and_their_advice_is_followed(imported, base, tmp_path, monkeypatch, capsys):
    folder, _, merged, _ = imported
    words = ["import_hf.py", "--adapter", folder, "--base", base, tmp_path / "run" / "step_00000000"]
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    import_hf.main()
    said = capsys.readouterr().out.splitlines()
    assert said[-2].endswith("adapters of attention, mlp, connector, vit, rank 3")
    assert "lora.rank=3 lora.alpha=5 lora.rslora=true 'lora.targets=[attention,mlp,connector,vit]'" in said[-1]
    monkeypatch.setattr("sys.argv", ["export_hf.py", str(tmp_path / "run"), str(tmp_path / "out"), "--adapter"])
    export_hf.main()
    assert "holds the adapters of" in capsys.readouterr().out and (tmp_path / "out" / peft.WEIGHTS).is_file()
    with pytest.raises(SystemExit, match="exists: remove it or export to another folder"):
        export_hf.main()
    for given, said in (
        (tmp_path / "run" / "step_00000000", "chooses a checkpoint of a run, and .*step_00000000 is one: leave out --"),
        (tmp_path / "nowhere", "nowhere is no folder: name a run, such as runs/mine"),
        (tmp_path / "run", "run has no best checkpoint: train.save_best was null, or what it names"),
    ):
        monkeypatch.setattr("sys.argv", ["export_hf.py", str(given), str(tmp_path / "more"), "--best"])
        with pytest.raises(SystemExit, match=said):
            export_hf.main()
    (tmp_path / "run" / checkpoint_dir.BEST).write_text('{"step": 0}')
    assert checkpoint_dir.resolve_best(str(tmp_path / "run")) == tmp_path / "run" / "step_00000000"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"use_dora": True}, "use_dora=True, which is more than an A and a B .*: merge the adapter with PEFT"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern="),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"bias": "all"}, "bias=all"),
        ({"peft_type": "LOHA"}, "peft_type=LOHA, not LORA"),
        ({"r": 4}, r"lora_A has the shape \(3, [0-9]+\), not \(4, [0-9]+\): it is of another model or rank"),
    ],
)
def test_what_is_no_plain_adapter_is_refused(changes, said, imported, base, tmp_path):
    folder = shutil.copytree(imported[0], tmp_path / "peft")
    config = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError, match=said):
        peft.import_adapter(folder, base, tmp_path / "out", lambda line: None)
    assert not (tmp_path / "out").exists()


def test_adapters_of_other_layers_and_folders_without_any_are_refused(imported, base, tmp_path):
    folder = shutil.copytree(imported[0], tmp_path / "peft")
    tensors = load_file(folder / peft.WEIGHTS)
    for which in "AB":
        tensors[f"{peft.PREFIX}lm_head.lora_{which}.weight"] = torch.ones(3, 3)
    save_file(tensors, folder / peft.WEIGHTS)
    with pytest.raises(ConfigError, match="adapts lm_head, which is none of attention, mlp, connector, vit"):
        peft.import_adapter(folder, base, tmp_path / "out")
    with pytest.raises(ConfigError, match="is no adapter that PEFT has saved"):
        peft.import_adapter(tmp_path, base, tmp_path / "out")
    with pytest.raises(ConfigError, match="holds adapters alone: give the checkpoint of the weights"):
        peft.import_adapter(imported[0], imported[1], tmp_path / "out")
    with pytest.raises(ConfigError, match="holds all weights and no adapters: export it without --adapter"):
        peft.export_adapter(base, tmp_path / "out")
    with pytest.raises(ConfigError, match="holds all weights: leave out --base"):
        convert.export_hf(base, tmp_path / "out", base=base)


def test_the_weights_beside_adapters_are_found_where_they_are_and_are_compared(imported, base, tmp_path):
    """A run that is moved as a whole finds them beside it; others have to be named, and have to be the same."""
    for name in ("base", "other"):
        shutil.copytree(base.parent / name, tmp_path / "before" / name)
    peft.import_adapter(
        imported[0], tmp_path / "before" / "base", tmp_path / "before" / "step_00000000", lambda x: None
    )
    moved = (tmp_path / "before").rename(tmp_path / "after")
    checkpoint = moved / "step_00000000"
    assert lora_base.find_base(checkpoint).resolve() == (moved / "base").resolve()
    away = (moved / "base").rename(tmp_path / "away")
    with pytest.raises(ConfigError, match=f"are not at {tmp_path}/before/base: put that checkpoint back, or name"):
        convert.export_hf(checkpoint, tmp_path / "out")
    convert.export_hf(checkpoint, tmp_path / "out", progress=lambda line: None, base=away)
    assert_same(released_file(tmp_path / "out"), imported[2])
    # Adapters alone need no weights; with them it is known what they were imported from.
    source = checkpoint_dir.read_marker(away)["source"]
    for name, given, expected in (("without", None, None), ("with", away, source)):
        peft.export_adapter(checkpoint, tmp_path / name, base=given)
        assert json.loads((tmp_path / name / peft.CONFIG).read_text())["base_model_name_or_path"] == expected
    with pytest.raises(ConfigError, match="holds adapters of other weights than those of"):
        peft.export_adapter(checkpoint, tmp_path / "again", base=moved / "other")
    with pytest.raises(ConfigError, match="holds adapters of other weights than those of"):
        convert.export_hf(checkpoint, tmp_path / "again", base=moved / "other")


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(rank=0), "holds adapters alone, but lora.rank=0: set lora.rank=3"),
        (dict(rank=4), "has adapters with lora.rank=3, this run has 4: set lora.rank=3"),
        (dict(alpha=6.0), "lora.alpha=5.0"),
        (dict(targets=["mlp"]), r"set lora.targets=\[attention,mlp,connector,vit\]"),
        (dict(rslora=False), "set lora.rslora=true"),
        (dict(dropout=0.5, targets=["vit", "mlp", "connector", "attention"]), None),
    ],
)
def test_a_run_goes_on_with_the_adapters_that_it_has_alone(changes, said, imported, base):
    fitting = dict(rank=3, alpha=5.0, rslora=True, targets=list(LORA_TARGETS))
    lora = LoraConfig(**{**fitting, **changes})
    if said is None:
        lora_base.refuse_other_adapters(imported[1], lora)
        return
    with pytest.raises(ConfigError, match=said):
        lora_base.refuse_other_adapters(imported[1], lora)
    with pytest.raises(ConfigError, match="holds all weights and no adapters, but lora.rank=3: start a new run"):
        lora_base.refuse_other_adapters(base, LoraConfig(rank=3))


def test_a_run_of_adapters_starts_from_weights_that_are_there(imported, base, hf_models, tmp_path):
    folder, fitting = hf_models["qwen3_gqa"], dict(rank=3, alpha=5.0, rslora=True, targets=list(LORA_TARGETS))
    config = Config(run_dir=str(tmp_path), model=model_config_from_hf(folder), lora=LoraConfig(**fitting))
    with pytest.raises(ConfigError, match="lora.rank=3 trains adapters of weights that are there: name them, as in"):
        start.find_start(config)
    config.model.hf_path = str(folder)
    assert start.find_start(config) == start.Start(hugging_face=[folder])
    config.train.init_from = str(imported[1])
    assert start.find_start(config) == start.Start(init_from=base, adapters=imported[1])
    config.lora.rank = 0
    with pytest.raises(ConfigError, match="holds adapters alone, but lora.rank=0: set lora.rank=3"):
        start.find_start(config)
    # A run that goes on has its weights from its own checkpoint, and what is given where these are gone.
    own, resume, config.lora.rank = tmp_path / "start", tmp_path / "checkpoints" / "step_00000000", 3
    shutil.copytree(base, own)
    peft.import_adapter(imported[0], own, resume, lambda line: None)
    assert start.find_start(config) == start.Start(resume=resume, init_from=own)
    shutil.rmtree(own)
    assert start.find_start(config) == start.Start(resume=resume, init_from=base)
    config.lora.rank = 0
    with pytest.raises(ConfigError, match="holds adapters alone, but lora.rank=0: set lora.rank=3"):
        start.find_start(config)
