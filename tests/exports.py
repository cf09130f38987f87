"""The tiny model with random weights, exported whole: weights, tokenizer, chat template, processor."""

from pathlib import Path

from molmo2_nemo.command_line import compose
from molmo2_nemo.config.schema import Config

OVERRIDES = ["model=tiny", "data=sample", "data.seq_length=4096", "data.max_crops=64", "data.max_frames=24"]


def configuration() -> Config:
    """Of a training run that gives the same limits to pictures and videos."""
    return compose("stage2", OVERRIDES)


def save(folder: Path, seed: int = 0) -> None:
    import torch
    from transformers import GenerationConfig, Molmo2ForConditionalGeneration

    from molmo2_nemo.data.processor import build_processor
    from molmo2_nemo.hf.architecture import hf_config

    config = configuration()
    torch.manual_seed(seed)
    Molmo2ForConditionalGeneration(hf_config(config.model)).save_pretrained(folder)
    processor = build_processor(config.data.tokenizer, config.model.vision, config.data.max_crops_per_image)
    processor.video_processor.num_frames = config.data.max_frames
    processor.video_processor.max_fps = config.data.max_fps
    processor.save_pretrained(folder)
    eos = processor.tokenizer.eos_token_id
    GenerationConfig(bos_token_id=eos, eos_token_id=eos, pad_token_id=eos).save_pretrained(folder)
