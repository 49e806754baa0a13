"""Data by name: files, folders and data sets, their columns, labels and mixtures."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from conftest import build
from solpath.data.batches import Broken
from solpath.data.columns import Labels, find_columns
from solpath.data.decoding import read_images
from solpath.data.feeding import feed
from solpath.data.mixture import Mixture, split_weight
from solpath.data.tables import Table, images_table, open_table
from solpath.errors import ConfigError, FileError
from test_batching import ENDED, PADDED, tokenizer

datasets = pytest.importorskip("datasets")

ROWS = [{"text": f"w{i} w1", "label": i % 2} for i in range(6)]


def photos(folder: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (40 * i, 0, 0)).save(folder / name)


@pytest.fixture
def sources(tmp_path) -> dict[str, str]:
    """The same six rows in every form."""
    data = datasets.Dataset.from_list(ROWS)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    lines = ["text,label", *(f"{row['text']},{row['label']}" for row in ROWS)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    (tmp_path / "a.tsv").write_text("\n".join(line.replace(",", "\t") for line in lines))
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    data.to_parquet(tmp_path / "folder" / "train.parquet")
    names = "a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "saved", "folder"
    return {name: str(tmp_path / name) for name in names}


def test_every_form_gives_the_same_rows(sources):
    for name in sources.values():
        assert list(open_table(name).rows) == ROWS, name


def test_words_that_mean_nothing_to_pandas_are_texts(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nnull,0\nNA,1\n")
    assert [row["text"] for row in open_table(str(tmp_path / "a.csv")).rows] == ["null", "NA"]


def test_splits_are_chosen(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "saved")
    photos(tmp_path / "photos", ["train/a/0.png", "train/b/1.png", "val/a/2.png", "val/b/3.png"])
    saved, folder = str(tmp_path / "saved"), str(tmp_path / "photos")
    assert list(open_table(saved, split="test").rows) == [ROWS[1]]
    assert open_table(folder, split="val").names == {"label": ["a", "b"]}
    for name, text in ((saved, "splits train, test"), (folder, "splits train, val")):
        with pytest.raises(ConfigError, match=text):
            open_table(name)
        with pytest.raises(ConfigError, match="'dev'"):
            open_table(name, split="dev")


def test_what_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "a.xml").write_text("<a/>")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text":')
    (tmp_path / "w[1].csv").write_text("text\na\n")
    for name, text in (
        ("a.xml", "ending of a file must be one of .txt, .jsonl"),
        ("none.csv", "no such file"),
        ("bad.jsonl", "cannot read .*JSON parse error"),
        ("w[1].csv", "rename it"),
    ):
        with pytest.raises(FileError, match=text):
            open_table(str(tmp_path / name))
    (tmp_path / "a.csv").write_text("text\na\n")
    with pytest.raises(ConfigError, match="no splits to choose from; leave out 'train'"):
        open_table(str(tmp_path / "a.csv"), split="train")


def test_columns_by_one_rule():
    def found(given=None, *, role="text", **holds):
        return find_columns(Table("t", [], holds), [role], given or {})

    assert found(text="text", title="text", label="text") == {"text": "text"}
    assert found(body="text", id="whole") == {"text": "body"}
    assert found(sentence1="text", sentence2="text", label="whole") == {
        "text": "sentence1", "pair": "sentence2"
    }  # fmt: skip
    assert found({"text": "b"}, a="text", b="text") == {"text": "b"}
    assert found(role="image", photo="image", text="text") == {"image": "photo"}
    assert found(role="label", text="text", labels="names") == {"label": "labels"}
    for holds, words in (
        ({"a": "text", "b": "text"}, "several columns that could be the text: a, b"),
        ({"text": "text", "content": "text"}, "could be the text: text, content"),
        ({"n": "whole"}, "no column that could be the text among n"),
    ):
        with pytest.raises(ConfigError, match=words):
            found(**holds)
    with pytest.raises(ConfigError, match="no column 'c'; its columns are a, b"):
        found({"text": "c"}, a="text", b="text")
    with pytest.raises(ConfigError, match="'n' of t does not hold texts"):
        found({"text": "n"}, n="whole")


def numbers(model, *tables: Table) -> list[list[int]]:
    labels = Labels(model.config, [(table, "label") for table in tables])
    return [[labels.number(i, r["label"]) for r in t.rows] for i, t in enumerate(tables)]


def labelled(values, holds="text", names=None) -> Table:
    rows = [{"label": value} for value in values]
    return Table("t", rows, {"label": holds}, {"label": names} if names else {})


def test_labels_become_the_numbers_of_the_model():
    model = build("camembert", num_labels=2)
    assert numbers(model, labelled(["no", "yes", "no"])) == [[0, 1, 0]]
    assert numbers(model, labelled([True, False], "whole")) == [[1, 0]]
    assert numbers(model, labelled([1, 0], "names", ["n", "p"])) == [[1, 0]]
    model.config.id2label = {0: "YES", 1: "NO"}
    model.config.label2id = {"YES": 0, "NO": 1}
    assert numbers(model, labelled(["no", "yes"])) == [[1, 0]]
    assert numbers(model, labelled([0, 1], "names", ["no", "yes"])) == [[1, 0]]
    assert numbers(model, labelled(["no"]), labelled([1], "whole")) == [[1], [1]]
    for table, words in (
        (labelled(["good", "bad"]), "the labels are bad, good, and the model knows YES, NO"),
        (labelled([0, 2], "whole"), "labels from 0 to 2, the model 2 classes"),
        (labelled([0], "names", ["a", "b", "c"]), "has 3 labels"),
    ):
        with pytest.raises(ConfigError, match=words):
            numbers(model, table)
    with pytest.raises(ConfigError, match=r"has 1 labels .*the model 2 classes"):
        numbers(build("camembert", num_labels=2), labelled(["a"]))


def test_a_weight_stands_behind_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("b:2").touch()
    assert split_weight("b:2") == ("b:2", None)
    assert split_weight("b:2:0.5") == ("b:2", 0.5)
    with pytest.raises(ConfigError, match="more than 0"):
        split_weight("a:0")


def texts(name: str, count: int) -> tuple[Table, dict]:
    rows = [{"text": f"{name}{i}"} for i in range(count)]
    return Table(name, rows, {"text": "text"}), {"text": "text"}


def test_mixtures_hold_their_shares_everywhere():
    mixture = Mixture([texts("a", 40), texts("b", 100)], [1.0, 3.0], seed=0)
    found = [row["text"] for row in mixture]
    assert len(found) == len(set(found)) == 133  # as many as 100 of b allow
    assert all(2 <= Counter(t[0] for t in found[i : i + 12])["a"] <= 4 for i in range(0, 120, 12))
    again = [row["text"] for row in Mixture([texts("a", 40), texts("b", 100)], [1, 3], seed=0)]
    other = [row["text"] for row in Mixture([texts("a", 40), texts("b", 100)], [1, 3], seed=1)]
    assert found == again != other
    assert len(Mixture([texts("a", 40), texts("b", 100)], [None, None])) == 140
    assert Mixture([texts("a", 40), texts("b", 100)], [None, None], limit=14).counts == [4, 10]
    with pytest.raises(ConfigError, match="too few"):
        Mixture([texts("a", 40), texts("b", 100)], [1000.0, 1.0])


def test_pairs_are_one_row_for_classifiers_and_two_for_others():
    rows = [{"premise": f"w{i}", "hypothesis": f"w{i + 10}"} for i in range(4)]
    table = Table("nli", rows, {"premise": "text", "hypothesis": "text"})
    model, words = build("camembert"), tokenizer(**PADDED)
    batch = feed(model, words, [(table, None)], length=4, seed=None).batches[0]
    assert batch["input_ids"][1].tolist() == [1, 11, 51, 51]
    plain = model.base_model
    found = feed(plain, words, [(table, None)], length=4, seed=None)
    assert found.paired
    assert found.batches[0]["input_ids"][:, 0].tolist() == [0, 10, 1, 11, 2, 12, 3, 13]
    decoder = build("gpt2")
    blocks = feed(decoder, tokenizer(**ENDED), [(table, None)], length=8, seed=None).batches[0]
    assert blocks["input_ids"][0, :4].tolist() == [0, 52, 10, 52]


def test_labels_only_when_asked_for(sources):
    model, words = build("camembert", num_labels=2), tokenizer(**PADDED)
    table = [(open_table(sources["a.csv"]), None)]
    assert "labels" not in feed(model, words, table).batches[0]
    found = feed(model, words, table, labels=True, seed=None, limit=3, batch_size=2)
    assert [batch["labels"].tolist() for batch in found.batches] == [[0, 1], [0]]
    assert found.said == [f"{sources['a.csv']}: 3 of 6 rows, text from 'text', label from 'label'"]
    plain = [(Table("t", [{"text": "w1"}], {"text": "text"}), None)]
    assert "labels" not in feed(model, words, plain, labels=None).batches[0]
    with pytest.raises(ConfigError, match="could be the label"):
        feed(model, words, plain, labels=True)
    with pytest.raises(ConfigError, match="is no classifier"):
        feed(model.base_model, words, table, labels=True)
    with pytest.raises(ConfigError, match="length is 99, and the model takes"):
        feed(model, words, table, length=99)


def test_labels_are_numbered_as_the_model_has_them():
    generic = build("camembert", num_labels=11)
    words = [str(i) for i in range(11)]
    assert numbers(generic, labelled(words)) == [list(range(11))]
    assert numbers(generic, labelled([f"LABEL_{i}" for i in range(11)])) == [list(range(11))]
    model = build("camembert", num_labels=2)
    assert numbers(model, labelled(["b", "", None, "a"]))[0] == [1, "", None, 0]
    model.config.label2id = {"a": 0, "A": 1}
    assert numbers(model, labelled(["A", "a"])) == [[1, 0]]
    assert numbers(model, labelled([0, 1], "names", ["A", "a"])) == [[1, 0]]


def test_labels_that_cannot_be_matched_are_refused():
    model = build("camembert", num_labels=2)
    model.config.label2id = {"no": 0, "yes": 1}
    with pytest.raises(ConfigError, match="labels from -1 to 1, and names for 0 to 1"):
        numbers(model, labelled([0, -1, 1], "names", ["no", "yes"]))
    with pytest.raises(ConfigError, match="yes is 0 in t and 1 in the model"):
        numbers(model, labelled([0, 1], "names", ["yes", "never"]))
    table = labelled([0, 1], "whole")
    assert (
        Labels(model.config, [(table, "label")]).note
        == "labels keep their numbers: 0 is no, 1 is yes"
    )


def test_a_chosen_second_text_stays_chosen():
    table = Table("t", [], {"sentence1": "text", "sentence2": "text", "other": "text"})
    assert find_columns(table, ["text"], {"pair": "other"}) == {
        "text": "sentence1",
        "pair": "other",
    }
    with pytest.raises(ConfigError, match="cannot be both texts"):
        find_columns(table, ["text"], {"pair": "sentence1"})


def test_no_table_gives_more_rows_than_it_has():
    tables = [texts("a", 8), texts("b", 5), texts("c", 8), texts("d", 9)]
    assert Mixture(tables, [0.5, None, None, None]).counts[1] == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\na,b,0\nc,d,1\n", "more cells than its first line"),
        ("a.tsv", 'text\tlabel\n"a\t0\nb\t1\nc" d\t1\n', "3 lines of 1 rows"),
    ],
)
def test_cells_that_move_to_other_columns_or_rows_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(FileError, match=message):
        open_table(str(tmp_path / name))


def test_folders_and_pipes_are_no_images(tmp_path):
    photos(tmp_path, ["a/0.png", "b/1.png"])
    (tmp_path / "a" / "more.png").mkdir()
    assert len(open_table(str(tmp_path)).rows) == 2
    os.mkfifo(tmp_path / "b" / "pipe.png")
    with pytest.raises(FileError, match="not a regular file"):
        read_images([("pipe", tmp_path / "b" / "pipe.png")], Broken("raise"))


@pytest.mark.parametrize("names", ["file_name", "left_file_name,right_file_name", "file_names"])
def test_images_that_no_metadata_lists_are_refused(tmp_path, names):
    """`datasets` would drop them and say nothing."""
    folder = tmp_path / "photos"
    photos(folder, ["a.png", "b/c.png", ".hidden/d.png", "__old/e.png"])
    values = [["a.png", "b/c.png"]] if names == "file_names" else ["a.png", "b/c.png"]
    keys = names.split(",")
    rows = [dict(zip(keys, values, strict=True))] if len(keys) == 2 else None
    rows = rows or [{names: value} for value in values]
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps(row | {"text": "w1"}) + "\n" for row in rows)
    )
    assert len(open_table(str(folder))) == len(rows)
    photos(folder, ["b/f.png", "g.png"])
    with pytest.raises(FileError, match=r"2 of 4 images that its metadata does not list, b.f\.png"):
        open_table(str(folder))


def test_images_of_another_split_are_not_missed(tmp_path):
    for split in ("train", "test"):
        photos(tmp_path / split, ["a.png", "b.png"])
        (tmp_path / split / "metadata.csv").write_text("file_name,text\na.png,w1\nb.png,w2\n")
    photos(tmp_path / "test", ["c.png"])
    assert len(open_table(str(tmp_path), split="train")) == 2
    with pytest.raises(FileError, match=r"1 of 3 images that its metadata does not list, c\.png"):
        open_table(str(tmp_path), split="test")


def test_splits_are_no_labels(tmp_path):
    photos(tmp_path, ["train/0.png", "test/1.png"])
    table = images_table("photos", tmp_path)
    assert dict(table.holds) == {"image": "image"}
    assert len(table) == 2


def test_samples_have_the_groups_of_their_rows():
    rows = [{"text": text, "doc": f"d{i // 2}"} for i, text in enumerate(["w1", " ", "w2", "w3"])]
    table = Table("rows", rows, {"text": "text", "doc": "text"})
    model = build("bert")
    options = {"columns": {"group": "doc"}, "length": 4, "batch_size": 2, "seed": 3}
    found = feed(model, tokenizer(**PADDED), [(table, None)], **options)
    ids = [int(ids[0]) for batch in found.batches for ids in batch["input_ids"]]
    assert dict(zip(ids, found.groups, strict=True)) == {1: "d0", 2: "d1", 3: "d1"}
    assert found.batches.select([2, 0])[0]["input_ids"][:, 0].tolist() == [ids[2], ids[0]]
    decoder = build("llama")
    with pytest.raises(ConfigError, match="no groups"):
        feed(decoder, tokenizer(**PADDED, **ENDED), [(table, None)], **options)
    bare = Table("bare", [{"text": "w4"}], {"text": "text"})
    with pytest.raises(ConfigError, match="no column 'doc'"):
        feed(model, tokenizer(**PADDED), [(table, None), (bare, None)], **options)
    holes = Table("holes", [{"text": "w4", "doc": None}], {"text": "text", "doc": "text"})
    with pytest.raises(ConfigError, match="rows without a group"):
        feed(model, tokenizer(**PADDED), [(holes, None)], **options)
