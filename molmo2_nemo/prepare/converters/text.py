"""Conversations without a picture."""

from collections.abc import Iterator

from molmo2_nemo.prepare.converters.common import Converter, Draft, Drop, chat, image_of

# Tokens of the first message (allenai/molmo2: 2304 in stage 1, 4096 afterwards; the shards serve both).
MAX_FIRST_TOKENS = 4096
CATEGORIES = ("code", "non-english")
# In the names of the data sets that went into the mixture: identity, code, puzzles, other languages.
SOURCES = ("hard_coded", "hardcoded", "code_alpaca", "codealpaca", "personahub_code", "puzzle", "aya")


def tulu(row: dict) -> Iterator[Draft | Drop]:
    """A leading system turn stays one: data/encode.py writes it before the first question."""
    source = str(row.get("source") or row.get("dataset") or "").lower()
    if str(row.get("category") or "").lower() in CATEGORIES:
        yield Drop(f"category {row['category']}")
    elif any(name in source for name in SOURCES):
        yield Drop("its origin is identity, code, puzzles or other languages")
    elif row.get("empty_messages") or row.get("has_special_token"):
        yield Drop("an empty message or a special token")
    elif (row.get("first_message_qwen3_tokens") or 0) > MAX_FIRST_TOKENS:
        yield Drop(f"the first message has more than {MAX_FIRST_TOKENS} tokens")
    else:
        messages = list(row["messages"])
        system = messages.pop(0)["content"].strip() if messages and messages[0]["role"] == "system" else None
        if messages and messages[-1]["role"] == "user":
            messages.pop()
        if [m["role"] for m in messages] != ["user", "assistant"] * (len(messages) // 2):
            yield Drop("the roles are not user and assistant in turn")
        else:
            branch = chat([m["content"] for m in messages], "text_sft", system)
            yield Draft([branch], about=str(row.get("id") or messages[0]["content"]), tree=None)


def hardcodes(row: dict) -> Iterator[Draft]:
    """Each question with the same answer, about each of the row's own pictures, or about none."""
    images = [image_of(image) for image in row.get("images") or []]
    for text in row["questions"]:
        for shown in [[image] for image in images] or [[]]:
            yield Draft([chat([text, row["response"]], "user_qa")], shown, about=text)


CONVERTERS = {
    "tulu-v2-sft-mixture": Converter(tulu),
    "molmo2-hardcodes": Converter(hardcodes),
}
