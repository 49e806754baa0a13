"""Say in the options of the command line what messages of the package say in Python."""

import re
import shlex

_SENTENCES = {
    " or pass overwrite=True": "",
    ", or leave them out with on_error='skip'": "",
    "; plan every size from the dense model, and read this one with solpath.load": (
        "; give the dense model"
    ),
    "latency_ms needs latency=, a table from solpath.measure_latency(model, batch)": (
        "--latency-ms needs --latency FILE, which solpath extract wrote"
    ),
    "measure again with solpath.measure_latency": (
        "measure again: give extract a new file with --latency"
    ),
    "give pack=True for blocks without padding, or set tokenizer.pad_token": (
        "name a pad_token in its tokenizer_config.json"
    ),
    "with from_pretrained(name, dtype=torch.float32), and cut and save that": (
        "with --dtype float32"
    ),
    "say with groups= which": "say with --column group=COLUMN which",
    "xport without tokenizer=": "xport a folder without the files of its tokenizer",
    "Use lora_rank=None": "Leave --lora-rank out",
    "pass learning_rate= in the TuneConfig": "give --learning-rate",
    "with compensated=False": "without --compensated",
    "the constraint uniform": "--uniform all",
    "loss returned": "--loss returned",
    "for_ must": "--for must",
}
_OPTIONS = (
    "multiple_of", "min_width", "tied_widths", "shared_couples", "whole_groups", "latency_ms",
    "micro_batch", "batch_size", "lora_rank", "learning_rate", "max_loss",
)  # fmt: skip
_VALUED = (
    *_OPTIONS, "protect", "uniform", "latency", "pad", "quantization", "compensated", "metric",
    "loss", "sizes", "dtype",
)  # fmt: skip
_BUDGET = re.compile(r"path\.plan\((\w+)=([\w.]+)\)|(?<=not for )(\w+)=")
_VALUE = re.compile(
    rf"(?<![\w.'-])({'|'.join(_VALUED)})="
    r"(\((?:'[^']*',? ?)+\)|\[(?:'[^']*',? ?)+\]|'[^']*'|(?:torch\.)?\w+|)(?!\.\.)"
)
_NAME = re.compile(rf"(?<![\w.'-])({'|'.join(_OPTIONS)})\b(?!=)")


def as_typed(text: str) -> str:
    """Return a message in which the arguments of functions are options of the command line.

    Args:
        text: The message.

    Example:
        >>> as_typed("plan with protect=('*.qk',) or whole_groups=True")
        "plan with --protect '*.qk' or --whole-groups"
    """
    for python, typed in _SENTENCES.items():
        text = text.replace(python, typed)
    text = _BUDGET.sub(_budget, text)
    return _NAME.sub(lambda found: _option(found[1]), _VALUE.sub(_valued, text))


def _budget(found: re.Match[str]) -> str:
    return _option(found[3]) if found[3] else f"{_option(found[1])} {found[2]}"


def _valued(found: re.Match[str]) -> str:
    option, value = _option(found[1]), found[2].removeprefix("torch.")
    if value in ("", "True"):
        return option
    quoted = re.findall(r"'([^']*)'", value) or [value]
    return " ".join(f"{option} {shlex.quote(one)}" for one in quoted)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
