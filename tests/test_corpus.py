"""The demo's texts: deterministic, split by file, never overlapping."""

from pathlib import Path

import pytest
import torch

from solpath.data.docstrings import docstring_pairs, read_corpus, split_of, texts_of
from solpath.reporting.retrieval import retrieval_accuracy


@pytest.fixture(scope="module")
def corpus():
    return read_corpus(search=60, calibration=30, test=30)


def test_splits_have_the_asked_size_and_never_overlap(corpus):
    splits = [
        set(map(tuple, (corpus.search, corpus.calibration, corpus.test)[i])) for i in range(3)
    ]
    assert [len(split) for split in splits] == [60, 30, 30]
    first = [{pair[0] for pair in split} for split in splits]
    assert not first[0] & first[1]
    assert not first[0] & first[2]
    assert not first[1] & first[2]


def test_the_corpus_is_deterministic(corpus):
    assert read_corpus(search=60, calibration=30, test=30).digest() == corpus.digest()
    assert texts_of(corpus.search, seed=1) == texts_of(corpus.search, seed=1)
    assert sorted(texts_of(corpus.search)) == sorted(t for pair in corpus.search for t in pair)


def test_a_file_has_one_split():
    names = [f"package/file{i}.py" for i in range(300)]
    assert {split_of(name) for name in names} == {"search", "calibration", "test"}
    assert all(split_of(name) == split_of(name) for name in names)


def test_code_is_read_and_never_run(tmp_path: Path):
    file = tmp_path / "module.py"
    body = "It goes on for long enough to be worth reading, with several words in the second part."
    file.write_text(f'"""A first sentence about it. {body}"""\nraise SystemExit("was run")\n')
    [(first, rest)] = docstring_pairs(file)
    assert first == "A first sentence about it."
    assert rest.startswith("It goes on")
    file.write_text("def broken(:\n")
    assert docstring_pairs(file) == []


def test_retrieval_accuracy_of_a_perfect_and_a_blind_embedding(corpus):
    place = {text: i for i, pair in enumerate(corpus.test) for text in pair}
    size = len(corpus.test)

    def perfect(texts):
        return torch.nn.functional.one_hot(torch.tensor([place[t] for t in texts]), size).float()

    assert retrieval_accuracy(perfect, corpus.test) == 1
    shifted = lambda texts: perfect(texts).roll(int(texts[0] == corpus.test[0][0]), 1)  # noqa: E731
    assert retrieval_accuracy(shifted, corpus.test) < 0.1
