"""Answers by vLLM in the place of transformers. Nobody has run this yet: vLLM needs a GPU, and none was there.

vLLM resizes pictures and frames by its own copy of Molmo2's processor, and reads the names of the released checkpoints'
configuration. docs/evaluate.md says what to compare first.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from molmo2_nemo.ask.model import Asker, Reply, Seen


def refuse_missing() -> None:
    """ValueError, one sentence: vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("--backend vllm: vLLM is not installed here; install it, or leave --backend out")


def answers_of_vllm(folder: Path, asker: Asker) -> Callable[[Sequence[tuple[list[dict], Seen]], int], list[Reply]]:
    """A function as Asker.answers. ValueError, one sentence: vLLM is not installed."""
    refuse_missing()
    import vllm

    most_images = 1 + max(asker.max_frames, 20)
    model = vllm.LLM(str(folder), limit_mm_per_prompt={"image": most_images, "video": 1}, seed=0)

    def answers(questions: Sequence[tuple[list[dict], Seen]], max_new_tokens: int) -> list[Reply]:
        prompts = []
        for messages, seen in questions:
            media = {}
            if seen.pictures:
                media["image"] = [Image.fromarray(picture) for picture in seen.pictures]
            if seen.frames is not None:
                about = {"fps": 1, "duration": seen.duration, "frames_indices": seen.times, "do_sample_frames": False}
                media["video"] = [(seen.frames.permute(0, 2, 3, 1).numpy(), about)]
            prompts.append({"prompt": asker.prompt(messages, seen)} | ({"multi_modal_data": media} if media else {}))
        settings = vllm.SamplingParams(temperature=0.0, max_tokens=max_new_tokens)
        outputs = [request.outputs[0] for request in model.generate(prompts, settings, use_tqdm=False)]
        return [Reply(one.text.strip(), one.finish_reason == "length", len(one.token_ids)) for one in outputs]

    return answers
