"""What the jobs share: a tiny tokenizer, and commands as they are typed."""

import shlex
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from solpath.cli.main import run

WORDS = [
    "[PAD]",
    "[UNK]",
    "[END]",
    *[
        "a",
        "the",
        "good",
        "bad",
        "red",
        "blue",
        "cat",
        "dog",
        "film",
        "song",
        "was",
        "is",
        "very",
        "not",
    ],
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few words."""
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]",
        model_max_length=16,
    )  # fmt: skip


def home() -> Path:
    """Return the folder to work in: the first argument, or a new one."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="solpath-job-"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def solpath(*words: str | Path) -> None:
    """Run one command line, and stop if it fails."""
    given = [str(word) for word in words]
    print(f"$ solpath {shlex.join(given)}", flush=True)
    if code := run(given):
        raise SystemExit(code)
