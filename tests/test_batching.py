"""Batches of files, data sets and pairs: nothing lost, nothing mixed up, clear errors."""

import builtins
import io
import warnings

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPImageProcessor,
    CLIPProcessor,
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
)

import solpath
from solpath.data.batches import Broken
from solpath.data.decoding import read_images
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
    monkeypatch.setattr("solpath.data.images.read_images", None)
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


@pytest.mark.parametrize("kind", [BertTokenizer, GPT2Tokenizer])
def test_a_tokenizer_without_its_files_is_refused(tmp_path, kind):
    """transformers makes one of special tokens alone, to which every word is unknown."""
    BertConfig().save_pretrained(tmp_path)
    empty = kind.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"of {tmp_path} has . special tokens and no words"):
        solpath.text_batches(["a word"] * 9, empty, pack=kind is GPT2Tokenizer)


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


def shown(image, tmp_path=None) -> list:
    """The first channel, or all of them if they differ, as `image_batches` reads them."""
    [[_, read]] = [("", found) for found in read_images([("", image)], Broken("raise"))]
    pixels = np.asarray(read).astype(int)
    return (pixels[..., 0] if (pixels == pixels[..., :1]).all() else pixels).tolist()


def test_grays_of_more_than_8_bits_are_scaled(tmp_path):
    deep = np.array([[0, 128, 257], [32896, 65278, 65535]], np.uint16)
    expected = np.rint(deep / 257).astype(int).tolist()
    assert expected[1] == [128, 254, 255]
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert Image.open(tmp_path / "deep.png").mode == "I;16"
    assert shown(str(tmp_path / "deep.png")) == expected
    for kind in ("<u2", ">u2", "<i4"):
        assert shown(Image.fromarray(deep.astype(kind))) == expected
    assert shown(Image.fromarray(np.array([[0, 200]], np.int32))) == [[0, 200]]  # has 8 bits
    Image.fromarray(deep).save(tmp_path / "clear.png", transparency=128)
    assert shown(tmp_path / "clear.png")[0] == [0, 255, 1]  # on white
    for values in ([[-1, 3]], [[0, 70000]]):
        with pytest.raises(BatchError, match=r"row 7: grays from .* have no known white"):
            read_images([("row 7", Image.fromarray(np.array(values, np.int32)))], Broken("raise"))


def test_float_grays_are_from_0_to_1_or_to_255(tmp_path):
    unit = np.array([[0, 0.25, 1]], np.float32)
    Image.fromarray(unit).save(tmp_path / "unit.tif")
    assert shown(tmp_path / "unit.tif") == [[0, 64, 255]]
    assert shown(Image.fromarray(255 * unit)) == [[0, 63, 255]]
    for bad in (-1, 256, np.nan, np.inf):
        with pytest.raises(BatchError, match="have no known white; scale them to 0 to 1"):
            shown(Image.fromarray(np.array([[0, bad]], np.float32)))


def on_white(pixels: np.ndarray) -> list:
    color, alpha = pixels[..., :3].astype(float), pixels[..., 3:] / 255
    return np.rint(color * alpha + 255 * (1 - alpha)).astype(int).tolist()


def test_what_is_transparent_shows_white(tmp_path):
    """A viewer shows a page through it; the color that is stored there is arbitrary."""
    rgba = np.array([[[0, 0, 0, 0], [200, 30, 90, 255], [200, 30, 90, 51]]], np.uint8)
    image = Image.fromarray(rgba)
    assert shown(image) == on_white(rgba)
    assert shown(image.convert("RGBa")) == on_white(rgba)
    gray = np.array([[[0, 0], [90, 255]]], np.uint8)
    for mode in ("LA", "La"):
        assert shown(Image.fromarray(gray).convert(mode)) == [[255, 90]]
    palette = Image.new("P", (3, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30, 200, 100, 0])
    palette.putdata([0, 1, 2])
    colors = [[0, 0, 0], [10, 20, 30], [200, 100, 0]]
    assert shown(palette) == [colors]
    palette.save(tmp_path / "one.png", transparency=1)
    assert shown(tmp_path / "one.png") == [[colors[0], [255] * 3, colors[2]]]
    palette.save(tmp_path / "some.png", transparency=bytes([0, 255, 255]))
    assert shown(tmp_path / "some.png") == [[[255] * 3, *colors[1:]]]
    palette.save(tmp_path / "one.gif", transparency=2)
    assert shown(tmp_path / "one.gif") == [[*colors[:2], [255] * 3]]
    opaque = Image.fromarray(np.array([[[1, 2, 3, 255]]], np.uint8))
    assert shown(opaque) == [[[1, 2, 3]]]


def test_cmyk_and_bits_and_turned_photos_are_as_a_viewer_shows_them(tmp_path):
    ink = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 128, 0, 0], [0, 0, 0, 255]]], np.uint8)
    cmyk = Image.frombytes("CMYK", (4, 1), ink.tobytes())
    light = 255 - ink[..., :3].astype(int)
    expected = np.rint(light * (255 - ink[..., 3:]) / 255).astype(int).tolist()
    assert shown(cmyk) == expected
    cmyk.resize((64, 16), 0).save(tmp_path / "ink.jpg", quality=100)  # Adobe stores it inverted
    read = np.array(shown(tmp_path / "ink.jpg"))[8, 8::16]
    assert np.abs(read - expected[0]).max() <= 3
    assert shown(Image.fromarray(np.array([[True, False]]))) == [[255, 0]]
    photo = Image.fromarray(np.array([[0, 90, 200]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright: the first row is on the right
    photo.save(tmp_path / "turned.png", exif=exif)
    assert shown(tmp_path / "turned.png") == [[0], [90], [200]]
    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "turned.png")]})
    [row] = rows.cast_column("image", datasets.Image())  # data sets turn it themselves
    assert shown(row["image"]) == [[0], [90], [200]]


def test_broken_images_are_left_out_if_asked_for(folder):
    for i in range(4):
        (folder / "c" / f"0broken{i}.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match="on_error must be 'raise' or 'skip', got 'ignore'"):
        solpath.image_batches(folder, processor(), on_error="ignore")
    options = {"seed": None, "label_column": "label", "batch_size": 6, "on_error": "skip"}
    batches = solpath.image_batches(folder, processor(), **options)
    with pytest.warns(UserWarning, match=r"left out 3 samples so far.*broken0\.png.*broken2\.png"):
        first = batches[0]
    assert values([first]) == [40, 10, 20]
    assert first["labels"].tolist() == [0, 1, 1]
    with pytest.warns(UserWarning, match=r"left out 4 samples.*broken2\.png, …"):
        assert values([batches[1]]) == [30]
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        assert len(list(batches)) == 2
    options["batch_size"] = 1
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(BatchError, match="none of the 1"),
    ):
        list(solpath.image_batches(folder, processor(), **options))
    pairs = [
        (gray(1), "w1"),
        (folder / "c" / "0broken0.png", "w2"),
        (gray(3), None),
        (gray(4), "w4"),
    ]
    options = {"length": 2, "seed": None}
    with pytest.raises(BatchError, match="row 2: a sample must be an image and a text"):
        solpath.image_text_batches(pairs[2:] and pairs, pair_processor(), **options)[0]
    with pytest.warns(UserWarning, match=r"left out 2 samples.*row 2, .*broken0\.png"):
        [batch] = solpath.image_text_batches(pairs, pair_processor(), on_error="skip", **options)
    assert batch["input_ids"][:, 0].tolist() == values([batch]) == [1, 4]


def test_rows_of_a_data_set_that_cannot_be_decoded_are_named():
    good = io.BytesIO()
    gray(5).save(good, "PNG")
    rows = datasets.Dataset.from_dict({"image": [good.getvalue(), b"no image"]})
    rows = rows.cast_column("image", datasets.Image())
    with pytest.raises(FileError, match="cannot read row 1"):
        solpath.image_batches(rows, processor(), seed=None)[0]
    with pytest.warns(UserWarning, match="left out 1 sample so far that cannot be read: row 1"):
        [batch] = solpath.image_batches(rows, processor(), seed=None, on_error="skip")
    assert values([batch]) == [5]


def test_texts_that_are_none_are_named_or_left_out(tmp_path):
    made = tokenizer(**PADDED)
    options = {"length": 2, "seed": None}
    frame = pandas.DataFrame({"text": ["w1", None, "w3"]}, index=[7, 8, 9])
    for source in (["w1", None, "w3"], frame, frame["text"], datasets.Dataset.from_pandas(frame)):
        with pytest.raises(BatchError, match=r"row 1: a text is needed.*on_error='skip'"):
            solpath.text_batches(source, made, **options)
        with pytest.warns(UserWarning, match="left out 1 sample so far that cannot be read: row 1"):
            [batch] = solpath.text_batches(source, made, on_error="skip", **options)
        assert batch["input_ids"][:, 0].tolist() == [1, 3]
    stream = iter(["w1", None, "w3"])
    with pytest.warns(UserWarning, match="row 1"):
        solpath.text_batches(stream, made, on_error="skip", limit=2, **options)
    (tmp_path / "latin.txt").write_bytes("w1\nw2 café\nw3\n".encode("latin-1"))
    with pytest.raises(FileError, match=r"cannot read line 2 of .*latin\.txt"):
        solpath.text_batches(tmp_path / "latin.txt", made)
    with pytest.warns(UserWarning, match=r"line 2 of .*latin\.txt"):
        [batch] = solpath.text_batches(tmp_path / "latin.txt", made, on_error="skip", **options)
    assert batch["input_ids"][:, 0].tolist() == [1, 3]


def test_lines_end_at_line_ends_only_and_a_byte_order_mark_is_no_text(tmp_path):
    texts = ["w1 w2", "w3\x0cw4", "w5\u2028w6", "w7\x85w8", "w9 \x1cw10", "w11"]
    file = tmp_path / "texts.txt"
    made = tokenizer(**PADDED)
    for i, end in enumerate(["\n", "\r\n", "\r"]):
        mark = b"\xef\xbb\xbf" * (i < 2)
        file.write_bytes(mark + end.join(texts).encode() + end.encode() * i)
        [batch] = solpath.text_batches(file, made, length=4, seed=None)
        [expected] = solpath.text_batches(texts, made, length=4, seed=None)
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert batch["input_ids"][:, 0].tolist() == [1, 3, 5, 7, 9, 11]


def test_labels_are_whole_numbers():
    rows = [{"image": gray(1), "label": 1}, {"image": gray(2), "label": np.int64(2)}]
    [batch] = solpath.image_batches(rows, processor(), seed=None, label_column="label")
    assert batch["labels"].tolist() == [1, 2]
    for label in ("cat", None, 1.5):
        rows[1]["label"] = label
        with pytest.raises(
            BatchError, match=f"row 1: label is {label!r}, not a whole.*class_encode"
        ):
            solpath.image_batches(rows, processor(), seed=None, label_column="label")[0]


def test_several_data_sets_and_columns_in_one_are_named():
    rows = datasets.Dataset.from_dict({"text": ["w1"]})
    splits = datasets.DatasetDict(train=rows, test=rows)
    with pytest.raises(
        BatchError, match=r"is a DatasetDict; choose one of its splits \(train, test"
    ):
        solpath.text_batches(splits, tokenizer(**PADDED))
    with pytest.raises(BatchError, match=r"DatasetDict; choose one of its splits"):
        solpath.image_batches(splits, processor())
    with pytest.raises(BatchError, match=r"is a dict, .*or one of its values \(text\)"):
        solpath.text_batches({"text": ["w1"]}, tokenizer(**PADDED))
    batch = solpath.text_batches(splits["train"]["text"], tokenizer(**PADDED), length=2)[0]
    assert batch["input_ids"].tolist() == [[1, 51]]


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
