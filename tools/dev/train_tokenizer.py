"""Train the tokenizer of the tiny model and write it to molmo2_nemo/data/tokenizer; gives the same files every time.

A byte-level BPE of 600 ids, of which the last three are special, then the 128 extra tokens of Molmo2 (ids 600..727).
600 is no multiple of 128 on purpose: padding of the embedding must show in the tests.

    python tools/dev/train_tokenizer.py [--out DIR]
"""

import argparse
import shutil
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from molmo2_nemo.config.schema import EXTRA_TOKENS
from molmo2_nemo.prepare.sample_world.write import text_corpus

SHIPPED = Path(__file__).resolve().parents[2] / "molmo2_nemo" / "data" / "tokenizer"
BASE_SIZE = 600
EXTRA_SIZE = 128
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # the last ids below BASE_SIZE

# So that text outside the world is not spelt byte by byte.
ENGLISH = """
The people of the town walked along the river in the morning, and some of them stopped to look at the water. It was
clear and cold, and there were small stones on the ground under it. A child asked where the water comes from. Her
mother said that it comes from the mountains, where the snow of the winter turns into many little streams.
When you read a book, you can see places that you have never been to. When you write one, other people can see what
you have thought about. That is why we have been writing for thousands of years, and why we will not stop.
Please tell me what you know about this. I think that it is not far from here, but I would like to know more.
How do you do that? First take the large box, then open it, and put everything on the table. Do not forget the key.
Which one is better? The first is faster, the second uses less memory, and the third works with every computer.
This model was trained with pictures, videos and text. It can describe what is in a picture, count things, point to
them, follow them over time and answer questions. It can also be wrong, so check its answers before using them.
Yes, there is. No, there is not. I do not know. They are in the house; we were at school. He has his work to do, she
has hers. If it rains, the children will play inside, or they could go to see their friends after they have eaten.
The user writes a message, the assistant gives an answer, and the system sets the rules for both of them.
"""

# What the chat format and the style prefixes put around the texts.
FORMAT = "user\nassistant\nSystem: Image long_caption 65: pointing: point_count: video_short_answer: "


def train(corpus) -> Tokenizer:
    """BPE over bytes with BASE_SIZE - len(SPECIAL) entries; every digit is a token of its own, as in Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_SIZE - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fillers = [f"<|extra_{offset}|>" for offset in range(len(EXTRA_TOKENS), EXTRA_SIZE)]
    tokenizer.add_special_tokens([*SPECIAL, *EXTRA_TOKENS, *fillers])
    return tokenizer


def save(tokenizer: Tokenizer, out: Path) -> None:
    """Write the files that transformers' AutoTokenizer loads; the chat template is written by hand and copied."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image|>", "video_token": "<|video|>"},
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        padding_side="left",
    ).save_pretrained(out)
    if out.resolve() != SHIPPED:
        shutil.copy(SHIPPED / "chat_template.jinja", out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=SHIPPED)
    out = parser.parse_args().out
    save(train([*text_corpus(), *[ENGLISH] * 20, *[FORMAT] * 500]), out)
    print(f"Wrote the tokenizer to {out}.")


if __name__ == "__main__":
    main()
