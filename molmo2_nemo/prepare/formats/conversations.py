"""Conversations as other trainers have them.

- `conversations` of `from` and `value`: LLaVA (haotian-liu/LLaVA, docs/Finetune_Custom_Data.md) and ShareGPT
  (hiyouga/LLaMA-Factory, data/README.md).
- `messages` of `role` and `content` beside `images` and `videos`, with <image> and <video> where they are shown:
  LLaMA-Factory, and ms-swift (docs/source_en/Customization/Custom-dataset.md).
- `content` as a list of typed parts: transformers (docs/source/en/chat_templating_multimodal.md), and OpenAI's API.
- `instruction`, `input`, `output` and `query`, `response`, both with `history` and `system`: the same two documents.

Molmo2 sees all pictures before the conversation, with "Image k" before each if there are several. So a placeholder
that only says that a picture is there is left out, and one in the midst of a text becomes "Image k".
"""

import re
from collections.abc import Iterator
from functools import partial
from itertools import count

from molmo2_nemo.prepare.formats.line import Line, Unpacked, file_name

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
}
PLACEHOLDER = re.compile(r"<(image|video)>")
# Keys of a typed part that name its file; and those by which Qwen's processors cut a video, in seconds
# (QwenLM/Qwen3-VL, qwen-vl-utils/src/qwen_vl_utils/vision_process.py).
# Type of a part -> what it is, and the key of its file.
PARTS = {
    "image": ("image", "image"),
    "image_url": ("image", "image_url"),
    "input_image": ("image", "image_url"),
    "video": ("video", "video"),
    "video_url": ("video", "video_url"),
}
NAMES_OF_FILES = ("path", "url", "base64")
CUTS = ("video_start", "video_end")
# Keys of a line that are ours and go with any conversation.
KEPT = ("clip", "annotation_fps", "subtitles", "style", "multi_turn", "unit")
# Keys that would change what is taught, so that leaving them out would be wrong.
REFUSED = {
    "audios": "sounds are not read",
    "audio": "sounds are not read",
    "objects": "write the boxes' centres as points, see docs/own_data.md",
    "tools": "calls of tools are not read",
}


def read(record: dict, form: str, unpacked: Unpacked) -> Line:
    """A record with conversations, messages, or instructions. ValueError: it cannot be understood."""
    for key, reason in REFUSED.items():
        if record.get(key):
            raise ValueError(f"{key}: {reason}")
    if form == "instructions":
        messages, names = _instructions(record), {}
    else:
        key = next(key for key in ("conversations", "conversation", "messages") if key in record)
        messages, names = _messages(record[key], key)
    if isinstance(record.get("system"), str) and record["system"].strip():
        if messages and messages[0]["role"] == "system":
            raise ValueError("it has system, and a message of the role system, too")
        messages = [{"role": "system", "content": record["system"]}, *messages]
    media = _media(record, unpacked)
    more, unused = _flatten(messages, media, names, unpacked)
    _name_pictures(messages, media, names, form)
    if form == "instructions":
        keys = ("instruction", "output") if "instruction" in record else ("query", "response")
        names |= {f"messages[{len(messages) - 2 + k}].content": key for k, key in enumerate(keys)}
    document = more | {key: record[key] for key in KEPT if record.get(key) is not None} | {"messages": messages}
    if media["video"]:
        if len(media["video"]) > 1 or media["image"]:
            raise ValueError("it has several videos, or a video and images: a sample has one video, or images")
        document["video"] = media["video"][0]
        names["video"] = "videos[0]" if "videos" in record else "video"
    elif media["image"]:
        document["images"] = media["image"]
        names |= {"images": "image"} if isinstance(record.get("image"), str) else {}
    used = {*KEPT, "system", "image", "images", "video", "videos", "id", "conversations", "conversation", "messages"}
    used |= {"instruction", "input", "output", "query", "response", "history"} if form == "instructions" else set()
    notes = [f"the key {key} is not used" for key in sorted(record.keys() - used) if record[key] is not None]
    return Line(document, form, names, notes=notes + unused)


def _messages(given, key: str) -> tuple[list[dict], dict[str, str]]:
    """Messages with role and content, and what the record calls these."""
    if not isinstance(given, list) or not given:
        raise ValueError(f"{key} is not a list of messages")
    if all(isinstance(turn, dict) and {"human", "assistant"} <= turn.keys() for turn in given):  # ms-swift's ShareGPT
        pairs = [(("user", turn["human"]), ("assistant", turn["assistant"])) for turn in given]
        return [{"role": role, "content": content} for pair in pairs for role, content in pair], {"messages": key}
    names, messages = {} if key == "messages" else {"messages": key}, []
    for number, turn in enumerate(given):
        if not isinstance(turn, dict):
            raise ValueError(f"{key}[{number}] is not an object")
        turn = dict(turn)
        if "from" in turn and "role" not in turn:
            names["role"], turn["role"] = "from", turn.pop("from")
        if "value" in turn and "content" not in turn:
            names["content"], turn["content"] = "value", turn.pop("value")
        role = turn.get("role")
        if isinstance(role, str) and role.lower() in ROLES:
            turn["role"] = ROLES[role.lower()]
        elif role is not None:
            raise ValueError(
                f'{key}[{number}].{names.get("role", "role")}="{role}" is none of user (human), assistant (gpt) and '
                "system"
            )
        messages.append(turn)
    return messages, names


def _instructions(record: dict) -> list[dict]:
    question, answer = ("instruction", "output") if "instruction" in record else ("query", "response")
    messages = []
    for number, pair in enumerate(record.get("history") or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"history[{number}] is not a pair of question and answer")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = record[question]
    if isinstance(asked, str) and isinstance(record.get("input"), str) and record["input"].strip():
        asked = f"{asked}\n{record['input']}" if asked.strip() else record["input"]
    return [*messages, {"role": "user", "content": asked}, {"role": "assistant", "content": record[answer]}]


def _media(record: dict, unpacked: Unpacked) -> dict[str, list[str]]:
    """Files by kind, those beside the conversation."""
    media: dict[str, list[str]] = {"image": [], "video": []}
    for kind, files in media.items():
        for key in (kind, f"{kind}s"):
            values = record.get(key)
            given = values if isinstance(values, list) else [] if values is None else [values]
            for number, value in enumerate(given):
                try:
                    if isinstance(value, list):  # ms-swift's
                        raise ValueError("is a list of frames: make a video file of them, or give them as images")
                    files.append(file_name(value, unpacked))
                except ValueError as error:
                    name = f"{key}[{number}]" if isinstance(values, list) else key
                    raise ValueError(f"{name} {error}") from error
    return media


def _flatten(
    messages: list[dict], media: dict, names: dict, unpacked: Unpacked
) -> tuple[dict[str, list[float]], list[str]]:
    """Change typed content to text with placeholders, and add the files that it names to `media`.

    Returns keys of the line that parts give, and what of the parts is not used.
    """
    beside = {kind: list(files) for kind, files in media.items()}
    inside: dict[str, list[str]] = {"image": [], "video": []}
    more, unused = {}, {}
    for number, message in enumerate(messages):
        if not isinstance(message.get("content"), list):
            continue
        where, texts = f"{names.get('messages', 'messages')}[{number}].{names.get('content', 'content')}", []
        for k, part in enumerate(message["content"]):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
                texts.append(part["text"])
                continue
            medium, key = PARTS.get(kind, (None, None))
            if medium is None:
                raise ValueError(f'{where}[{k}] is a part of the type "{kind}", not text, image or video')
            # Without a file of its own, the next of those beside the messages is meant.
            value = part.get(key) or {name: part[name] for name in NAMES_OF_FILES if part.get(name)}
            if value:
                try:
                    inside[medium].append(file_name(value, unpacked))
                except ValueError as error:
                    raise ValueError(f"{where}[{k}] {error}") from error
            elif beside[medium]:
                inside[medium].append(beside[medium].pop(0))
            else:
                raise ValueError(f"{where}[{k}] names no {medium}, and there is none beside the messages")
            texts.append(f"<{medium}>")
            used = {"type", key, *NAMES_OF_FILES}
            if medium == "video" and all(isinstance(part.get(cut), int | float) for cut in CUTS):
                more["clip"] = [float(part[cut]) for cut in CUTS]
                used.update(CUTS)
            unused |= dict.fromkeys(
                f"the key {name} of a part of the type {kind} is not used" for name in part if name not in used
            )
        message["content"] = "\n".join(texts)
    for kind, files in inside.items():
        if files and beside[kind] and media[kind] != files:
            raise ValueError(f"it has {len(beside[kind])} {kind}s beside the messages that no part of them shows")
        media[kind] = files or media[kind]
    return more, list(unused)


def _name_pictures(messages: list[dict], media: dict, names: dict, form: str) -> None:
    """Take the placeholders out of the texts. ValueError: there are more or fewer than files."""
    spelt = [kind for message in messages for kind in PLACEHOLDER.findall(_text(message))]
    if not spelt:
        return
    for number, message in enumerate(messages):
        if message.get("role") == "assistant" and (found := PLACEHOLDER.search(_text(message))):
            where = f"{names.get('messages', 'messages')}[{number}].{names.get('content', 'content')}"
            raise ValueError(f"{where} has {found[0]}, and an answer shows no {found[1]}: put it into the question")
    counts = {kind: spelt.count(kind) for kind in media}
    # In LLaVA's form <image> stands for a video, too.
    if media["video"] and not media["image"] and counts["image"] and not counts["video"]:
        counts = {"image": 0, "video": counts["image"]}
    for kind, files in media.items():
        if counts[kind] and counts[kind] != len(files):
            where = names.get("messages", "the texts" if form == "instructions" else "messages")
            raise ValueError(
                f"{where} have <{kind}> {counts[kind]} times, and there "
                f"{'is' if len(files) == 1 else 'are'} {len(files)} {kind}{'' if len(files) == 1 else 's'}: "
                "name each file, in the order of the placeholders"
            )
    several = len(media["image"]) > 1
    first = next((message for message in messages if message.get("role") == "user"), messages[0])
    # All at the beginning or the end of the first question: they only say that there are pictures.
    edge = re.fullmatch(r"\s*((?:<(?:image|video)>\s*)*)(.*?)((?:\s*<(?:image|video)>)*)\s*", _text(first), re.DOTALL)
    if edge and len(PLACEHOLDER.findall(edge[1] + edge[3])) == len(spelt):
        first["content"] = edge[2]
        return
    numbers = count(1)
    for message in messages:
        if PLACEHOLDER.search(text := _text(message)):
            message["content"] = PLACEHOLDER.sub(partial(_name, numbers=numbers, several=several), text).strip()


def _name(match: re.Match, numbers: Iterator[int], several: bool) -> str:
    """What stands for a placeholder: "Image 2" among several; else nothing at an end of the text, "the image" in it."""
    before, after = match.string[: match.start()], match.string[match.end() :]
    if not several and (not before.strip() or not after.strip()):
        return ""
    word = f"Image {next(numbers)}" if several and match[1] == "image" else f"the {match[1]}"
    return f"{' ' if before[-1:].isalnum() else ''}{word}{' ' if after[:1].isalnum() or after[:1] == '<' else ''}"


def _text(message: dict) -> str:
    return message["content"] if isinstance(message.get("content"), str) else ""
