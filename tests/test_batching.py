"""Batches of files, data sets and pairs: nothing lost, nothing mixed up, clear errors."""

import builtins

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
)

import solpath
from solpath.errors import BatchError, ConfigError, FileError

datasets = pytest.importorskip("datasets")

WORDS = [f"w{i}" for i in range(50)]


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token per word: ``w7`` has id 7, unknown 50, padding 51, end 52."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, "[UNK]", "[PAD]", "[END]"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **special)


PADDED = {"pad_token": "[PAD]"}
ENDED = {"eos_token": "[END]"}


def gray(value: int) -> Image.Image:
    return Image.new("L", (8, 8), value)


def processor() -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": 4, "width": 4}, do_normalize=False)


def values(batches) -> list[int]:
    """The gray value of every image, in order."""
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    assert pixels.shape[1:] == (3, 4, 4)
    assert (pixels == pixels[:, :1, :1, :1]).all()
    return (pixels[:, 0, 0, 0] * 255).round().int().tolist()


@pytest.fixture
def folder(tmp_path):
    """Images of three classes in nested folders; the gray value says which image it is."""
    for name, value in {"b/1.png": 10, "b/deep/2.JPEG": 20, "c/3.png": 30, "a/4.bmp": 40}.items():
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        gray(value).save(file)
    (tmp_path / "images" / "b" / "notes.txt").write_text("not an image")
    return tmp_path / "images"


def test_a_folder_gives_every_image_once_with_the_label_of_its_subfolder(folder):
    batches = solpath.image_batches(
        folder, processor(), batch_size=3, seed=None, label_column="label"
    )
    assert [len(batch["labels"]) for batch in batches] == [3, 1]
    assert values(batches) == [40, 10, 20, 30]
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [0, 1, 1, 2]
    assert "labels" not in solpath.image_batches(folder, processor())[0]


def test_the_seed_only_orders_and_limit_takes_the_first(folder):
    found = {
        seed: values(solpath.image_batches(folder, processor(), seed=seed)) for seed in (0, 1, 2)
    }
    assert all(sorted(order) == [10, 20, 30, 40] for order in found.values())
    assert len(set(map(tuple, found.values()))) > 1
    for seed, order in found.items():
        assert values(solpath.image_batches(folder, processor(), seed=seed, limit=2)) == order[:2]


def test_batches_index_like_a_list(folder):
    batches = solpath.image_batches(folder, processor(), batch_size=1, seed=None)
    assert values([batches[-1]]) == values(batches[3:]) == [30]
    with pytest.raises(IndexError):
        batches[4]
    assert len(batches) == len(list(batches)) == 4


def test_a_part_of_them_reads_nothing_yet(folder, monkeypatch):
    whole = solpath.image_batches(folder, processor(), batch_size=3, seed=None)
    expected = values(whole)
    monkeypatch.setattr("solpath.data.images._read_images", None)
    parts = [whole[:1], whole[1:], whole[-1:], whole[2:]]
    assert [len(part) for part in parts] == [1, 1, 1, 0]
    monkeypatch.undo()
    first, rest, last = map(values, parts[:3])
    assert first + rest == expected
    assert rest == last
    assert values(whole[::-1]) == rest + first


def test_images_paths_and_data_sets_are_the_same(folder):
    images = [gray(value) for value in (1, 2, 3)]
    rows = datasets.Dataset.from_dict({"picture": images, "kind": [5, 6, 7]})
    rows = rows.cast_column("picture", datasets.Image())
    batches = solpath.image_batches(
        rows, processor(), seed=None, image_column="picture", label_column="kind"
    )
    assert values(batches) == values(solpath.image_batches(images, processor(), seed=None))
    assert batches[0]["labels"].tolist() == [5, 6, 7]
    assert values(solpath.image_batches([folder / "c" / "3.png"], processor())) == [30]
    stream = rows.to_iterable_dataset()
    assert values(solpath.image_batches(stream, processor(), image_column="picture", limit=2)) == [
        1,
        2,
    ]


def test_what_is_wrong_with_images_is_named(folder, tmp_path, monkeypatch):
    broken = folder / "c" / "broken.png"
    broken.write_bytes((folder / "c" / "3.png").read_bytes()[:40])
    with pytest.raises(FileError, match=r"broken\.png"):
        list(solpath.image_batches(folder, processor()))
    with pytest.raises(FileError, match="is not a folder"):
        solpath.image_batches(folder / "zzz", processor())
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=r"has no images; known are \.bmp"):
        solpath.image_batches(tmp_path / "empty", processor())
    with pytest.raises(FileError, match="is in no subfolder"):
        solpath.image_batches(folder / "c", processor(), label_column="label")
    gray(0).save(folder / "z.png")
    with pytest.raises(FileError, match=r"z\.png is in no subfolder"):
        solpath.image_batches(folder, processor(), label_column="label")
    (folder / "z.png").unlink()
    with pytest.raises(BatchError, match="source is empty"):
        solpath.image_batches([], processor())
    with pytest.raises(ConfigError, match="no column 'image'; the columns are photo, kind"):
        solpath.image_batches([{"photo": gray(0), "kind": 1}], processor())
    with pytest.raises(BatchError, match="got a int"):
        solpath.image_batches([3], processor())[0]
    with pytest.raises(ConfigError, match="limit: a stream"):
        solpath.image_batches(iter([gray(0)]), processor())
    for size in (0, 16.0, "16", True):
        with pytest.raises(ConfigError, match="batch_size must be an integer of at least 1, got"):
            solpath.image_batches(folder, processor(), batch_size=size)
    real = builtins.__import__

    def without_pillow(name, *args, **options):
        if name == "PIL":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(ConfigError, match=r"pip install 'solpath\[data\]'"):
        solpath.image_batches(folder, processor())


def test_a_file_a_list_and_a_data_set_give_the_same_texts(tmp_path):
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]
    file = tmp_path / "texts.txt"
    file.write_text("w1 w2 w3\n\n  w4\n \nw5 w6 w7 w8 w9\n")
    rows = datasets.Dataset.from_dict({"line": ["", *texts]})
    made = tokenizer(**PADDED)
    expected = [[1, 2, 3, 51], [4, 51, 51, 51], [5, 6, 7, 8]]
    sources = [(file, {}), (str(file), {}), (texts, {}), (rows, {"text_column": "line"})]
    stream = rows.to_iterable_dataset()
    for source, options in [*sources, (stream, {"text_column": "line", "limit": 3})]:
        batches = solpath.text_batches(source, made, length=4, batch_size=2, seed=None, **options)
        assert [len(batch["input_ids"]) for batch in batches] == [2, 1]
        assert torch.cat([b["input_ids"] for b in batches]).tolist() == expected
        mask = torch.cat([b["attention_mask"] for b in batches])
        assert mask.tolist() == (torch.tensor(expected) != 51).long().tolist()
    orders = {
        str([b["input_ids"].tolist() for b in solpath.text_batches(file, made, seed=seed)])
        for seed in range(6)
    }
    assert len(orders) > 1


def test_packing_keeps_every_token_in_order():
    texts = ["w1 w2 w3", "", "w4", "w5 w6 w7 w8 w9 w10 w11"]
    made = tokenizer(**ENDED)
    batches = solpath.text_batches(texts, made, length=4, batch_size=2, seed=None, pack=True)
    tokens = torch.cat([batch["input_ids"] for batch in batches])
    assert tokens.flatten().tolist() == [
        1,
        2,
        3,
        52,
        4,
        52,
        5,
        6,
        7,
        8,
        9,
        10,
    ]  # 11 and end: no block
    assert all(batch["attention_mask"].all() for batch in batches)
    first = solpath.text_batches(texts, made, length=4, seed=None, pack=True, limit=2)
    assert torch.equal(first[0]["input_ids"], tokens[:2])
    endless = ({"text": "w1 w2"} for _ in iter(int, 1))
    assert (
        solpath.text_batches(endless, made, length=3, pack=True, limit=5)[0]["input_ids"].tolist()
        == [[1, 2, 52]] * 5
    )


def test_what_is_wrong_with_texts_is_named(tmp_path):
    padded, ended = tokenizer(**PADDED), tokenizer(**ENDED)
    with pytest.raises(ConfigError, match="no column 'text'; the columns are line, score"):
        solpath.text_batches([{"line": "w1", "score": 2}], padded)
    with pytest.raises(ConfigError, match="no padding token; give pack=True"):
        solpath.text_batches(["w1"], ended)
    with pytest.raises(FileError, match=r"no\.txt"):
        solpath.text_batches(tmp_path / "no.txt", padded)
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(FileError, match="has no text"):
        solpath.text_batches(tmp_path / "blank.txt", padded)
    with pytest.raises(BatchError, match="source has no text"):
        solpath.text_batches(["", " "], padded)
    with pytest.raises(BatchError, match="source has 3 tokens, less than one block of 128"):
        solpath.text_batches(["w1 w2"], ended, pack=True)
    with pytest.raises(BatchError, match="a text is needed, got a list"):
        solpath.text_batches([{"text": ["w1"]}], padded)
    with pytest.raises(ConfigError, match="limit: a stream"):
        solpath.text_batches(iter(["w1"]), padded)
    with pytest.raises(ConfigError, match="length must be"):
        solpath.text_batches(["w1"], padded, length=0)


def pair_processor(**options) -> CLIPProcessor:
    images = CLIPImageProcessor(
        size={"height": 4, "width": 4}, do_center_crop=False, do_normalize=False
    )
    return CLIPProcessor(images, tokenizer(**PADDED, **options))


def test_pairs_stay_together(tmp_path):
    gray(9).save(tmp_path / "9.png")
    pairs = [(gray(7), "w7"), (str(tmp_path / "9.png"), "w9 w1 w2"), (gray(3), "w3")]
    rows = [{"image": image, "text": text} for image, text in pairs]
    for source in (
        pairs,
        rows,
        datasets.Dataset.from_list([{"image": str(tmp_path / "9.png"), "text": "w9"}]),
    ):
        batches = solpath.image_text_batches(source, pair_processor(), batch_size=2, length=2)
        assert values(batches) == torch.cat([b["input_ids"][:, 0] for b in batches]).tolist()
        assert all(batch["input_ids"].shape[1] == 2 for batch in batches)
    limited = solpath.image_text_batches(pairs, pair_processor(model_max_length=5), limit=1)
    assert limited[0]["input_ids"].shape == (1, 5)


def test_what_is_wrong_with_pairs_is_named():
    with pytest.raises(ConfigError, match="give a length"):
        solpath.image_text_batches([(gray(1), "w1")], pair_processor())
    with pytest.raises(BatchError, match="must be an image and a text"):
        solpath.image_text_batches([gray(1)], pair_processor(), length=2)
    with pytest.raises(BatchError, match="must be an image and a text"):
        solpath.image_text_batches([(gray(1), ["w1"])], pair_processor(), length=2)
    with pytest.raises(ConfigError, match="no column 'text'; the columns are image, captions"):
        solpath.image_text_batches(
            [{"image": gray(1), "captions": ["w1"]}], pair_processor(), length=2
        )
    with pytest.raises(FileError, match=r"missing\.png"):
        solpath.image_text_batches([("missing.png", "w1")], pair_processor(), length=2)[0]
