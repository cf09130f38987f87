"""Answers to held-out questions while a model is trained: greedy decoding at the layout of the run, scores, pictures.

Questions are chosen once (`choose`), the same at every layout, so that the steps of a run can be compared. Several of
them share a packed row of the training length, each with free positions behind it. A forward pass of these rows, as in
training, fills a cache of keys and values; then each pass has the newest token of every question of the row. Each
data-parallel replica answers some of the rows. What `write` leaves in the run's folder:

    samples/step_XXXXXXXX/answers.json    a list in the order of the questions: source, key, style, question, label,
                                          answer, scores; picture where there is one, correct where it has a score
    samples/step_XXXXXXXX/00.png, ...     the picture or frames with labelled points (green) and the answer's (orange)
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from PIL import Image
from torch import Tensor

from molmo2_nemo.config.checks import row_multiple
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import FP8_RECIPE, Config, DataConfig
from molmo2_nemo.data.blend import Source
from molmo2_nemo.data.encode import Encoder, SamplePlan
from molmo2_nemo.data.inspection import pixels_of
from molmo2_nemo.data.loader import RawSample, stored_samples
from molmo2_nemo.data.marks import Visual, draw_both
from molmo2_nemo.data.packing import Batch, Row, collate, make_row
from molmo2_nemo.data.points import render_content
from molmo2_nemo.data.schema import read_example
from molmo2_nemo.model.cache import KeyValueCache
from molmo2_nemo.training import score
from molmo2_nemo.training.batches import BatchSource
from molmo2_nemo.training.step import iterators, model_inputs

# No more samples are read once this many times the wanted number of questions were of no use.
PATIENCE = 20
PICTURE_SIDE = 280  # pixels of the longer side of a picture that is drawn
NO_TOKEN = -1


@dataclass
class Question:
    """A held-out question: everything up to its answer, and what is right."""

    source: str
    key: str
    style: str
    text: str
    label: str
    plan: SamplePlan  # of the prompt alone
    pixels: tuple[np.ndarray, np.ndarray]  # crops uint8 [C, P, patch_dim], pooling int64 [T, W]
    sizes: list[tuple[int, int]]  # (width, height) of each image in pixels, or of the video
    seconds: float | None  # length of the video


@dataclass
class Exam:
    """The questions as the ranks of a replica hold them. `questions`, `encoder`, `batches`: on its first rank only."""

    questions: list[Question]
    encoder: Encoder | None
    batches: list[Batch] | None  # this replica's micro-batches
    places: np.ndarray  # int64 [this replica's questions, 4]: question, micro-batch, row, position the answer begins at
    count: int  # of the questions of all replicas
    eos_id: int
    multiple: int  # of the tokens of a row that a pass is given


def prepare(config: Config, sources: list[Source], group: dist.ProcessGroup) -> Exam:
    """Choose the questions and lay them out in rows. Collective. ConfigError, on all ranks: there are none."""
    is_first = dist.get_rank() == dist.get_process_group_ranks(group)[0]
    questions, encoder, batches, shared = [], None, None, [None]
    if is_first:
        settings = config.train
        # The free positions for an answer are kept out of what a sample is fitted into.
        data = replace(config.data, seq_length=config.data.seq_length - settings.generate_max_tokens)
        encoder = Encoder(data, config.model.vision)
        questions = choose(data, encoder, sources, settings.generate_examples)
        replicas, stages = parallel_state.get_data_parallel_world_size(), config.parallel.pipeline_model_parallel_size
        rows = deal(questions, settings.generate_max_tokens, config.data)
        interleaved = config.parallel.virtual_pipeline_model_parallel_size is not None
        per_micro_batch, multiple = settings.micro_batch_size, stages if interleaved else 1
        # Every replica runs as many micro-batches, some of them with empty rows.
        each = -(-len(rows) // (replicas * per_micro_batch * multiple)) * multiple
        own = rows[parallel_state.get_data_parallel_rank() :: replicas]
        own += [[] for _ in range(each * per_micro_batch - len(own))]
        batches, places = lay_out(questions, own, per_micro_batch, settings.generate_max_tokens, config.data, encoder)
        shared = [(places, len(questions), encoder.eos_id)]
    if group.size() > 1:
        dist.broadcast_object_list(shared, dist.get_process_group_ranks(group)[0], group=group)
    places, count, eos_id = shared[0]
    if not count:
        raise ConfigError(
            f"train.generate_every={config.train.generate_every}, but the sources of {config.data.said} "
            f"hold out no question that fits into data.seq_length={config.data.seq_length} together with "
            f"train.generate_max_tokens={config.train.generate_max_tokens}: change these or set train.generate_every=0."
        )
    fp8_recipe = config.transformer.get("fp8_recipe", FP8_RECIPE)
    multiple, _ = row_multiple(config.parallel, config.train.precision, fp8_recipe)
    return Exam(questions, encoder, batches, places, count, eos_id, multiple)


# Questions


def choose(data: DataConfig, encoder: Encoder, sources: list[Source], count: int) -> list[Question]:
    """Up to `count` questions of the held-out split, one of a sample, from the sources in turn.

    If there are more sources than questions, they are picked at equal distances in the blend's order. Which questions
    come does not depend on the layout. Samples that are broken, or do not fit with their answer, are passed over.
    """
    sources = [source for source in sources if source.num_validation_samples]
    if len(sources) > count:
        sources = [sources[i * len(sources) // count] for i in range(count)]
    by_name, questions, useless = {source.name: source for source in sources}, [], 0
    if not count:
        return []
    for sample in stored_samples(data, encoder, sources, "val"):
        source = by_name[sample.__subflavors__["source"]]
        try:
            question = read_question(sample, source, data, encoder)
        except MemoryError:
            raise
        except Exception:  # whatever the parsers of hostile data may raise; the validation loader counts and reports it
            question = None
        if question is not None:
            questions.append(question)
        useless += question is None
        if len(questions) == count or useless == PATIENCE * count:
            break
    return questions


def read_question(sample: RawSample, source: Source, data: DataConfig, encoder: Encoder) -> Question | None:
    """The first question of one of the sample's conversations; None if it does not fit. ValueError: broken sample."""
    if sample.error:
        raise ValueError(sample.error)
    example = read_example(sample.parts["json"])
    digest = hashlib.sha256(repr((data.seed, source.name, sample.__key__)).encode()).digest()
    rng = np.random.default_rng(list(digest))
    branch = example.branches[int(rng.integers(len(example.branches)))]
    talk = encoder.talk(replace(example, branches=[branch], multi_turn=0.0), rng, source.options, turns=1)
    plan = encoder.plan_talk(talk, rng, source.options)
    if not plan.num_tokens or plan.labels[-1] != encoder.eos_id:
        return None
    (conversation,) = talk.conversations(plan.shown)
    asked = conversation.messages[-2]
    first = int(((plan.labels != 0) | (plan.loss_weights > 0)).argmax())  # predicts the answer's first token
    prompt = first + 1
    video = plan.video
    return Question(
        source.name,
        sample.__key__,
        conversation.style,
        render_content(asked.content, asked.points, data.point_separator),
        encoder.tokenizer.decode(plan.labels[first:-1]),
        replace(
            plan,
            input_ids=plan.input_ids[:prompt],
            labels=plan.labels[:prompt] * 0,
            loss_weights=plan.loss_weights[:prompt] * 0,
            position_ids=plan.position_ids[:prompt],
            segment_ids=plan.segment_ids[:prompt],
        ),
        encoder.pixels(plan, sample.parts),
        [(entry.width, entry.height) for entry in ([video] if video else plan.images)],
        video.seconds if video else None,
    )


# Rows


def deal(questions: list[Question], max_tokens: int, data: DataConfig) -> list[list[int]]:
    """Indices of the questions of each row: first fit, by tokens with those of the answer, and by crops.

    Those with short answers come first, so that rows are finished together.
    """
    rows, room = [], []
    for number, question in sorted(enumerate(questions), key=lambda pair: len(pair[1].label)):
        tokens, crops = question.plan.num_tokens + max_tokens, question.plan.num_crops
        fitting = (i for i, (free, places) in enumerate(room) if free >= tokens and places >= crops)
        row = next(fitting, len(rows))
        if row == len(rows):
            rows.append([])
            room.append((data.seq_length, data.max_crops))
        rows[row].append(number)
        room[row] = (room[row][0] - tokens, room[row][1] - crops)
    return rows


def lay_out(
    questions: list[Question],
    rows: list[list[int]],
    rows_per_batch: int,
    max_tokens: int,
    data: DataConfig,
    encoder: Encoder,
) -> tuple[list[Batch], np.ndarray]:
    """Micro-batches, and where each question's answer begins (see Exam.places).

    An answer's positions belong to their question's segment from the start: text sees only what is before it, so their
    contents have no effect before they are filled.
    """
    visual, packed, places = encoder.visual, [], []
    nothing = (
        np.zeros((0, visual.patches_per_crop, visual.patch_dim), dtype=np.uint8),
        np.zeros((0, visual.window), dtype=np.int64),
    )
    for number, row in enumerate(rows):
        plans, at = [], 0
        for index in row:
            plan = with_room(questions[index].plan, max_tokens, encoder.pad_id)
            first = at + questions[index].plan.num_tokens
            places.append((index, number // rows_per_batch, number % rows_per_batch, first))
            plans.append(plan)
            at += plan.num_tokens
        fields = make_row(
            plans, [0] * len(plans), [questions[i].pixels for i in row], data.seq_length, encoder.pad_id, nothing
        )
        examples = np.zeros((0, 2), dtype=np.int64)
        packed.append(Row(__key__="", __restore_key__=(), **fields, examples=examples, counters={}, errors=[]))
    batches = [packed[start : start + rows_per_batch] for start in range(0, len(packed), rows_per_batch)]
    places = np.array(places, dtype=np.int64).reshape(-1, 4)
    return [collate(batch, visual.token_ids) for batch in batches], places


def with_room(prompt: SamplePlan, max_tokens: int, pad_id: int) -> SamplePlan:
    """The plan with positions for an answer behind it."""
    more = np.arange(max_tokens, dtype=np.int32)
    nothing = np.zeros(max_tokens, dtype=np.int32)
    return replace(
        prompt,
        input_ids=np.concatenate([prompt.input_ids, nothing + pad_id]),
        labels=np.concatenate([prompt.labels, nothing]),
        loss_weights=np.concatenate([prompt.loss_weights, nothing.astype(np.float32)]),
        position_ids=np.concatenate([prompt.position_ids, prompt.position_ids[-1] + 1 + more]),
        segment_ids=np.concatenate([prompt.segment_ids, nothing + prompt.segment_ids[-1]]),
    )


# Decoding


def answer(
    model, exam: Exam, group: dist.ProcessGroup, device: str, max_tokens: int, stop: Callable[[], bool] = lambda: False
) -> Tensor | None:
    """Greedy answers, int64 [all questions, max_tokens] on every rank, NO_TOKEN behind the end. Collective.

    group: the ranks of this replica. stop: asked before every token, the same on all ranks; true: None is returned.
    """
    architecture = unwrap_model(model)[0].model
    batches_from = BatchSource(iter(exam.batches) if exam.batches is not None else None, group, device, architecture)
    batches = list(iter(batches_from.next, None))
    places = torch.from_numpy(exam.places).to(device)
    tokens = torch.full((exam.count, max_tokens), NO_TOKEN, dtype=torch.int64, device=device)
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    stopped = False
    for chunk in model:
        chunk.eval()
    with torch.no_grad():
        # As many micro-batches at once as training has in a pipeline: their keys and values need less memory than the
        # activations that it keeps. All replicas have as many.
        for first in range(0, len(batches), stages):
            own = places[(places[:, 1] >= first) & (places[:, 1] < first + stages)]
            asked = own[:, 1:] - torch.tensor([first, 0, 0], device=device)
            said = generate(model, batches[first : first + stages], asked, max_tokens, exam, group, stop)
            if stopped := said is None:
                break
            tokens[own[:, 0]] = said
    for chunk in model:
        chunk.train()
    if stopped:
        return None
    dist.all_reduce(tokens, op=dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
    return tokens


def generate(
    model,
    batches: list[dict],
    places: Tensor,
    max_tokens: int,
    exam: Exam,
    group: dist.ProcessGroup,
    stop: Callable[[], bool],
) -> Tensor | None:
    """Answers from `places`, int64 [N, 3] (micro-batch, row, position), in the rows of micro-batches, in their order.

    Returns int64 [N, max_tokens], EOS included, NO_TOKEN behind it; None if `stop` said so. All ranks of all replicas
    run as many passes, on as many micro-batches.
    """
    ranks, stages = dist.get_process_group_ranks(group), parallel_state.get_pipeline_model_parallel_world_size()
    decides = ranks[-(len(ranks) // stages)]  # the first rank of the last pipeline stage: its ranks are the last ones
    tokens = torch.full((len(places), max_tokens), NO_TOKEN, dtype=torch.int64, device=places.device)
    goes_on = torch.ones(len(places), dtype=torch.bool, device=places.device)
    own = [places[places[:, 0] == number, 1:] for number in range(len(batches))]
    width = max((int(torch.bincount(rows[:, 0]).max()) for rows in own if len(rows)), default=1)
    newest = [NewTokens.of(batch, at, -(-width // exam.multiple) * exam.multiple) for batch, at in zip(batches, own)]
    last = torch.tensor([0, -1], device=places.device)  # of the prompt: it predicts the answer's first token
    passes = [
        batch | {"logit_positions": at + last, "cache": now.cache} for batch, at, now in zip(batches, own, newest)
    ]
    for step in range(max_tokens):
        if stop():
            return None
        chosen = next_tokens(model, passes)
        if not parallel_state.is_pipeline_last_stage():  # whatever piece of it
            chosen = torch.empty(len(places), dtype=torch.int64, device=places.device)
        if group.size() > 1:
            dist.broadcast(chosen, decides, group=group)
        tokens[goes_on, step] = chosen[goes_on]
        goes_on &= chosen != exam.eos_id
        unfinished = goes_on.any().int()
        dist.all_reduce(unfinished, op=dist.ReduceOp.MAX)
        if not unfinished:
            break
        passes = [now.inputs(said, step) for now, said in zip(newest, chosen.split([len(at) for at in own]))]
    return tokens


@dataclass
class NewTokens:
    """The newest token of each of a micro-batch's N questions as the model takes them: q places in each of its B rows.

    Places that no question needs repeat their row's first question, or, in a row that has none, position 0.
    """

    question: Tensor  # int64 [B, q]: which of the questions; N: none
    begins: Tensor  # int64 [B, q]: where its answer begins in the row
    logit_positions: Tensor  # int64 [N, 2]: row and place of each question
    position_ids: Tensor  # int64 [B, S], of the whole rows
    cache: KeyValueCache

    @staticmethod
    def of(batch: dict, places: Tensor, width: int) -> "NewTokens":
        """places: int64 [N, 2], row and position of each question's answer; width: q."""
        rows = len(batch["input_ids"])
        question, begins = (torch.zeros(rows, width, dtype=torch.int64, device=places.device) for _ in range(2))
        question += len(places)
        logit_positions = places * 0
        for row in range(rows):
            asked = (places[:, 0] == row).nonzero()[:, 0]
            if not len(asked):
                continue
            question[row], begins[row] = asked[0], places[asked[0], 1]
            question[row, : len(asked)], begins[row, : len(asked)] = asked, places[asked, 1]
            logit_positions[asked, 0], logit_positions[asked, 1] = row, torch.arange(len(asked), device=asked.device)
        cache = KeyValueCache(batch["segment_ids"], batch["vision_mask"])
        return NewTokens(question, begins, logit_positions, batch["position_ids"], cache)

    def inputs(self, chosen: Tensor, step: int) -> dict[str, Tensor]:
        """The next pass. chosen: int64 [N], the tokens number `step` of the answers."""
        self.cache.positions = self.begins + step
        return {
            "input_ids": torch.cat((chosen, chosen.new_zeros(1)))[self.question],
            "position_ids": self.position_ids.gather(1, self.cache.positions),
            "logit_positions": self.logit_positions,
            "cache": self.cache,
        }


def next_tokens(model, batches: list[dict]) -> Tensor | None:
    """The likeliest token after each of the micro-batches' logit_positions, int64 [N], on the last pipeline stage."""

    def forward_step(iterator, model):
        batch = next(iterator)
        own = {name: batch.get(name) for name in ("logit_positions", "cache")}
        return model(**model_inputs(batch), **own), lambda output, non_loss_data: likeliest(output)

    rows, seq_length = batches[0]["input_ids"].shape
    chosen = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators(model, batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=seq_length,
        micro_batch_size=rows,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return torch.cat(chosen) if chosen else None


def likeliest(logits: Tensor) -> Tensor:
    """Index of the largest of all tensor-parallel ranks' logits [N, V / t], of equal ones the lowest. int64 [N]."""
    group = parallel_state.get_tensor_model_parallel_group()
    largest, index = logits.nan_to_num(nan=torch.finfo(logits.dtype).min).max(dim=1)  # some token, whatever happened
    best = largest.clone()
    dist.all_reduce(best, op=dist.ReduceOp.MAX, group=group)
    nowhere = torch.iinfo(torch.int64).max
    index = torch.where(largest == best, index + group.rank() * logits.shape[1], nowhere)
    dist.all_reduce(index, op=dist.ReduceOp.MIN, group=group)
    return index


# Results


def write(exam: Exam, tokens: Tensor, folder: Path) -> tuple[dict, str]:
    """Score and draw the answers; on the first rank. Returns figures for the log and a line for the console.

    OSError: the folder cannot be written.
    """
    said = [decode(row, exam) for row in tokens.tolist()]
    scores = [score.score(q.style, q.label, text, q.sizes, q.seconds) for q, text in zip(exam.questions, said)]
    figures = score.means(scores, [question.source for question in exam.questions])
    line = " ".join(f"{metric} {values['all']:.3f}" for metric, values in figures.items()) or "no scores"
    line = f"{line} | {len(exam.questions)} held-out questions, {folder}"
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, (question, text, found) in enumerate(zip(exam.questions, said, scores)):
        entry = {
            "source": question.source,
            "key": question.key,
            "style": question.style,
            "question": question.text,
            "label": question.label,
            "answer": text,
            "scores": found,
        }
        picture = draw(question, text, exam.encoder)
        if picture is not None:
            entry["picture"] = f"{number:02d}.png"
            picture.save(folder / entry["picture"])
        right = score.is_right(found)
        entries.append(entry if right is None else entry | {"correct": right})
    partial = folder / ".answers.json"
    partial.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
    partial.replace(folder / "answers.json")
    return figures, line


def decode(ids: list[int], exam: Exam) -> str:
    """Text of an answer without its EOS."""
    ids = [token for token in ids if token not in (NO_TOKEN, exam.eos_id)]
    return exam.encoder.tokenizer.decode(ids)


def visuals(question: Question, patch_size: int) -> Iterator[Visual]:
    """Its images or frames as the model sees them whole, in their own proportions."""
    crops, first = question.pixels[0], 0
    for number, (count, _) in enumerate(question.plan.vision_units):
        width, height = question.sizes[0 if question.seconds is not None else number]
        scale = PICTURE_SIDE / max(width, height)
        picture = Image.fromarray(pixels_of(crops[first], patch_size))
        picture = picture.resize((max(1, round(width * scale)), max(1, round(height * scale))))
        seconds = question.plan.times[number] if question.seconds is not None else None
        yield Visual([np.asarray(picture)], seconds)
        first += count


def draw(question: Question, text: str, encoder: Encoder) -> Image.Image | None:
    """The picture of an answer, or several of them side by side; None without images or video."""
    return draw_both(list(visuals(question, encoder.visual.patch_size)), question.label, text)
