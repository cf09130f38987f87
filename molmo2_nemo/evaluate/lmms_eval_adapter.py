"""An export as a model of lmms-eval, which finds it by the entry point `lmms_eval.models` of pyproject.toml.

    python -m lmms_eval --model molmo2_nemo --model_args pretrained=HF_DIR,max_crops=24 --tasks ai2d --batch_size 8

Pictures and videos are read as everywhere in this project (ask/model.py). Written for lmms-eval 0.7.3, its interface
for simple models; only this file imports it. Answers are greedy.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from molmo2_nemo.ask.model import Asker, Seen
from molmo2_nemo.evaluate.generate import MAX_NEW_TOKENS

NAME = "molmo2_nemo"
# A question's number, its messages, and what it is about.
Waiting = tuple[int, tuple[list[dict], Seen]]


def manifest():
    """What the entry point gives: lmms-eval's ModelManifest."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(NAME, simple_class_path=f"{__name__}.Molmo2")


class Molmo2(lmms):
    """pretrained: the export's folder. max_crops, max_frames: of pictures and videos; None: the export's.

    ValueError, one sentence: as of Asker, or several processes were started.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_crops: int | None = None,
        max_frames: int | None = None,
    ):
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(f"{NAME} answers in one process: start python -m lmms_eval without a launcher of ranks")
        if not str(batch_size).isdecimal():
            raise ValueError(f"--batch_size {batch_size}: give a number, {NAME} does not look for one")
        self.asker, self.batch_size = Asker(Path(pretrained), device, print), max(1, int(batch_size))
        self.asker.max_crops = int(max_crops or self.asker.max_crops)
        self.asker.max_frames = int(max_frames or self.asker.max_frames)

    def generate_until(self, requests: Sequence) -> list[str]:
        """The answers to lmms-eval's instances, in their order.

        A question that cannot be answered has an empty answer, and the end says how many there are and why.
        """
        for request in requests:
            _refuse_sampling(request.args[1], request.args[4])
        answers, errors, waiting = [""] * len(requests), [], {}
        with tqdm(total=len(requests), desc=NAME) as bar:

            def answer(batch: list[Waiting], most: int) -> None:
                for number, said in self._answered(batch, most, errors):
                    answers[number] = _until(said, requests[number].args[1].get("until"))
                bar.update(len(batch))

            # Each picture or video is read once, and those of no more than a batch of each kind are held.
            for number, request in enumerate(requests):
                try:
                    question = self._question(request)
                except ValueError as error:
                    errors.append(_reason(error))
                    bar.update()
                    continue
                most = int(request.args[1].get("max_new_tokens") or MAX_NEW_TOKENS)
                kind = (most, question[1].frames is not None)
                waiting.setdefault(kind, []).append((number, question))
                if len(waiting[kind]) == self.batch_size:
                    answer(waiting.pop(kind), most)
            for (most, _), batch in waiting.items():
                answer(batch, most)
        if errors:
            print(f"{len(errors):,} of {len(requests):,} questions have no answer, the first because {errors[0]}")
        return answers

    def _answered(self, batch: list[Waiting], most: int, errors: list[str]) -> list[tuple[int, str]]:
        """(number, text). A batch that fails is asked one by one."""
        try:
            replies = self.asker.answers([question for _, question in batch], most)
        except ValueError as error:
            if len(batch) == 1:
                errors.append(_reason(error))
                return []
            return [one for waiting in batch for one in self._answered([waiting], most, errors)]
        return [(number, reply.text) for (number, _), reply in zip(batch, replies)]

    def _question(self, request) -> tuple[list[dict], Seen]:
        context, _, to_visuals, doc_id, task, split = request.args
        visuals = to_visuals(self.task_dict[task][split][doc_id]) or []
        videos = [one for one in visuals if isinstance(one, str)]
        pictures = [np.asarray(one.convert("RGB")) for one in visuals if isinstance(one, Image.Image)]
        if len(videos) + len(pictures) < len(visuals) or len(videos) > 1 or (videos and pictures):
            raise ValueError(f"{task} shows something else than pictures or one video")
        seen = self.asker.see([], Path(videos[0])) if videos else Seen(pictures)
        return [{"role": "user", "content": context}], seen

    def loglikelihood(self, requests: Sequence):
        raise NotImplementedError(f"{NAME} answers questions; a task of the output type loglikelihood needs another")

    def generate_until_multi_round(self, requests: Sequence):
        raise NotImplementedError(f"{NAME} answers single questions; a task of several rounds needs another model")


def _refuse_sampling(settings: dict, task: str) -> None:
    if settings.get("do_sample") and settings.get("temperature"):
        raise ValueError(
            f"{task} samples with temperature {settings['temperature']}: give --gen_kwargs do_sample=False"
        )


def _reason(error: ValueError) -> str:
    return " ".join(str(error).split())


def _until(text: str, ends: Sequence[str] | str | None) -> str:
    """The text before the first of `ends`."""
    for end in [ends] if isinstance(ends, str) else ends or []:
        text = text.split(end)[0] if end else text
    return text
