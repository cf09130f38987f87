"""Ask an exported model about a picture or a video. It uses only transformers; nothing of this repository is imported.

python tools/ask.py HF_DIR --image photo.png "What colour is the circle?"
python tools/ask.py HF_DIR --video clip.mp4 "Which way does it move?"
python tools/ask.py HF_DIR --quiz data/sample/quiz/quiz.json --json answers.json
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging


def answer(model, processor, question: str, image: Path | None = None, video: Path | None = None) -> str:
    """The model's greedy answer."""
    content = [{"type": "text", "text": question}]
    kwargs = {}
    if image is not None:
        content.insert(0, {"type": "image", "image": Image.open(image).convert("RGB")})
    if video is not None:
        frames, metadata = read_video(video, processor.video_processor)
        content.insert(0, {"type": "video", "video": frames})
        kwargs = {"processor_kwargs": {"videos_kwargs": {"video_metadata": [metadata], "do_sample_frames": False}}}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        **kwargs,
    )
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def read_video(path: Path, video_processor):
    """Frames uint8 [T, 3, H, W] at max_fps with the last one included, as in training, and their metadata.

    transformers' own sampler leaves out the last frame (5.23), so the frames are chosen here.
    """
    import av
    from transformers.video_utils import VideoMetadata

    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate)
        frames = list(container.decode(video=0))
        times = [float(frame.time - frames[0].time) for frame in frames]
    duration = times[-1] + 1 / rate
    step, limit = 1 / video_processor.max_fps, video_processor.num_frames
    if (limit - 1) * step < duration:
        wanted = torch.linspace(0, duration, limit).tolist()
    else:
        wanted = [i * step for i in range(int(duration / step) + 1) if i * step < duration] + [duration]
    # The frame on screen at a time is the last one that began by then.
    chosen = [max(i for i, begin in enumerate(times) if begin <= t + 1e-6) for t in wanted]
    pixels = torch.stack([torch.from_numpy(frames[i].to_ndarray(format="rgb24")).permute(2, 0, 1) for i in chosen])
    # The prompt's timestamps are index / fps: indices in milliseconds give the times exactly.
    metadata = VideoMetadata(
        total_num_frames=len(times),
        fps=1000,
        duration=duration,
        frames_indices=[round(t * 1000) for t in wanted],
        height=pixels.shape[2],
        width=pixels.shape[3],
    )
    return pixels, metadata


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="HF_DIR")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--video", type=Path)
    parser.add_argument("--quiz", type=Path, help="JSON list of {image or video, question, answer}, paths beside it")
    parser.add_argument("--json", type=Path, help="write questions, answers and labels here")
    args = parser.parse_intermixed_args()  # the question may follow --image
    if not Path(args.model).is_dir():
        parser.error(f"{args.model} is not a folder: export a checkpoint with tools/export_hf.py first")
    if (args.question is None) == (args.quiz is None):
        parser.error("give a question, or --quiz")
    logging.disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(args.model).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    if args.question is not None:
        print(answer(model, processor, args.question, args.image, args.video))
        return
    results = []
    for item in json.loads(args.quiz.read_text()):
        media = {kind: args.quiz.parent / item[kind] for kind in ("image", "video") if kind in item}
        said = answer(model, processor, item["question"], **media)
        results.append({**item, "said": said})
        print(f"{next(iter(media.values())).name}: {item['question']} -> {said} (label: {item['answer']})", flush=True)
    right = sum(r["said"].lower().rstrip(".") == r["answer"].lower().rstrip(".") for r in results)
    print(f"{right} of {len(results)} right")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
