"""The recipes of examples/recipes, each on a tiny stand-in of its data and model."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers

import solpath
from conftest import build
from solpath.errors import ConfigError, FileError
from solpath.pretrained import from_pretrained

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
SHORT = {"sparsity": "0.5,0.25", "steps": 3, "tune_steps": 0, "device": "cpu"}


@pytest.fixture(autouse=True)
def recipes(monkeypatch):
    """The scripts find `family` beside them, as when they are started. A benchmark is called
    `language` too, and comes back if another test has imported it."""
    monkeypatch.syspath_prepend(RECIPES)
    names = ("coco", "family", "imagenet", "language")
    known = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    yield
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(known)


def processor() -> transformers.ViTImageProcessor:
    return transformers.ViTImageProcessor(size={"height": 8, "width": 8})


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per word, below 60 of them; the words are numbers."""
    vocabulary = {str(i): i for i in range(57)} | {"[UNK]": 57, "[PAD]": 58, "[END]": 59}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", eos_token="[END]",
        model_max_length=16,
    )  # fmt: skip


def check_family(out: Path, dense: torch.nn.Module, *metrics: str) -> dict:
    """What is on disk fits together; returns the dense model's metrics."""
    family = json.loads((out / "family.json").read_text())
    assert [member["name"] for member in family["members"]] == ["dense", "s25", "s50"]
    rows = (out / "family.md").read_text().splitlines()[2:]
    path = solpath.SolutionPath.load(out / "path")
    for member, row in zip(family["members"], rows, strict=True):
        assert set(member["metrics"]) >= set(metrics)
        assert ("cosine" in member["metrics"]) == (member["name"] != "dense")
        assert row.startswith(f"| {member['name']} |")
        assert f"{member['params']:,}" in row
        small = dense if member["name"] == "dense" else solpath.load(out / member["name"])
        assert sum(p.numel() for p in small.parameters()) == member["params"]
    assert path.plan(sparsity=0.5).achieved.params == family["members"][2]["params"]
    return family["members"][0]["metrics"]


@pytest.fixture
def digits(tmp_path):
    """Two images of every digit in train and val, in folders as ImageNet has them."""
    found = load_digits()
    for i, split in enumerate(("train", "val")):
        for label in range(10):
            for image in found.images[found.target == label][2 * i : 2 * i + 2]:
                file = tmp_path / split / f"n{label}" / f"{id(image)}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((image * 15).astype("uint8")).save(file)
    return tmp_path


def test_imagenet(digits, tmp_path):
    import imagenet

    model = build("vit", num_channels=3, num_labels=10)
    files = sorted((digits / "val").rglob("*.png"))
    images = [Image.open(file).convert("RGB") for file in files]
    labels = torch.tensor([int(file.parent.name[1:]) for file in files])
    with torch.no_grad():  # a head that is right on all of val
        features = model.vit(**processor()(images, return_tensors="pt")).last_hidden_state[:, 0]
        centre, answers = features.mean(0), torch.nn.functional.one_hot(labels, 10) - 0.1
        weight = (torch.linalg.pinv(features - centre) @ answers).T
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(-weight @ centre)
    model.save_pretrained(tmp_path / "model")
    processor().save_pretrained(tmp_path / "model")
    options = {"model": str(tmp_path / "model"), "samples": 12, "heldout": 8, "batch_size": 8}
    imagenet.main(digits, tmp_path / "out", **options, **SHORT)
    metrics = check_family(tmp_path / "out", model, "top-1")
    assert metrics["top-1"] == 1
    assert (tmp_path / "out" / "s50" / "preprocessor_config.json").exists()

    order = solpath.SolutionPath.load(tmp_path / "out" / "path").order()
    imagenet.main(digits, tmp_path / "out", **options, **SHORT)
    assert torch.equal(solpath.SolutionPath.load(tmp_path / "out" / "path").order(), order)
    (digits / "val" / "n10").mkdir()
    with pytest.raises(ConfigError, match=r"has 11 folders, one per class; .* has 10 classes"):
        imagenet.main(digits, tmp_path / "out", **options, **SHORT)


def language_files(folder: Path) -> dict[str, str]:
    """A tiny LLaMA with its tokenizer, texts to search on, and texts to judge on."""
    build("llama", vocab_size=60).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    draw = torch.Generator().manual_seed(0)
    words = torch.randint(57, (12, 20), generator=draw).tolist()
    lines = [" ".join(map(str, line)) for line in words]
    (folder / "c4").mkdir()
    (folder / "c4" / "train.jsonl").write_text(
        "".join(json.dumps({"text": line}) + "\n" for line in lines[:8])
    )
    (folder / "wiki.txt").write_text("\n".join(lines[8:]))
    return {
        "model": str(folder / "model"),
        "data": str(folder / "c4"),
        "evaluation": str(folder / "wiki.txt"),
    }


def test_language(tmp_path, monkeypatch):
    import language

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    files = language_files(tmp_path)
    options = {"length": 10, "samples": 8, "heldout": 4, "batch_size": 4}
    language.main(tmp_path / "out", **files, **options, **SHORT)
    model = from_pretrained(files["model"])
    ids = tokenizer()(Path(files["evaluation"]).read_text())["input_ids"]
    blocks = torch.tensor(ids)[: len(ids) // 10 * 10].view(-1, 10)
    with torch.no_grad():
        expected = model(input_ids=blocks, labels=blocks).loss.exp().item()
    metrics = check_family(tmp_path / "out", model, "perplexity")
    assert metrics["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert (tmp_path / "out" / "s25" / "tokenizer.json").exists()


def test_a_recipe_tunes(tmp_path, monkeypatch):
    import language

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    files = language_files(tmp_path)
    options = {"length": 10, "samples": 8, "heldout": 4, "batch_size": 4}
    for tune_steps in (0, 3):
        steps = SHORT | {"tune_steps": tune_steps}
        language.main(tmp_path / f"out{tune_steps}", **files, **options, **steps)
    cut, tuned = (
        solpath.load(tmp_path / f"out{tune_steps}" / "s50").state_dict() for tune_steps in (0, 3)
    )
    assert cut.keys() == tuned.keys()
    assert any(not torch.equal(cut[name], tuned[name]) for name in cut)


@pytest.fixture
def coco(tmp_path):
    """Gray images with two captions each; every caption names the gray value of its image."""
    (tmp_path / "annotations").mkdir()
    for split, values in (("train2017", (5, 10, 20, 30)), ("val2017", (15, 25, 35))):
        (tmp_path / split).mkdir()
        content = {"images": [], "annotations": []}
        for value in values:
            Image.new("L", (9, 9), value).save(tmp_path / split / f"{value}.png")
            content["images"].append({"id": 100 + value, "file_name": f"{value}.png"})
            content["annotations"] += [
                {"image_id": 100 + value, "caption": f"{value} {n}\n"} for n in (1, 2)
            ]
        content["annotations"].reverse()
        file = tmp_path / "annotations" / f"captions_{split}.json"
        file.write_text(json.dumps(content))
    return tmp_path


def clip_processor() -> transformers.CLIPProcessor:
    images = transformers.CLIPImageProcessor(
        size={"height": 8, "width": 8}, do_center_crop=False, do_normalize=False
    )
    return transformers.CLIPProcessor(images, tokenizer())


def test_coco_captions_stay_with_their_images(coco):
    from coco import read_captions

    found = read_captions(coco, "val2017")
    assert [path.name for path in found] == ["15.png", "25.png", "35.png"]
    assert list(found.values()) == [["15 2", "15 1"], ["25 2", "25 1"], ["35 2", "35 1"]]
    (coco / "annotations" / "captions_val2017.json").write_text('{"images": []}')
    with pytest.raises(FileError, match=r"captions_val2017\.json is not a file of COCO captions"):
        read_captions(coco, "val2017")


def test_retrieval_of_towers_that_know_and_that_mix_up(coco):
    from coco import read_captions, retrieval

    def known(value):
        return torch.nn.functional.one_hot(value.long(), 60).float()

    model = torch.nn.Module()
    model.get_image_features = lambda pixel_values: SimpleNamespace(
        pooler_output=known((pixel_values[:, 0, 0, 0] * 255).round())
    )
    captions = read_captions(coco, "val2017")
    arguments = captions, clip_processor(), 2, torch.device("cpu")
    model.get_text_features = lambda input_ids, attention_mask: known(input_ids[:, 0])
    assert set(retrieval(model, *arguments).values()) == {1.0}
    # The second caption of 15 and 25 (listed first) goes to the next image: 4 of 6 texts are right,
    # and every image still has one caption of its own that is as near as any.
    swapped = {(15, 2): 25, (25, 2): 35}
    model.get_text_features = lambda input_ids, attention_mask: known(
        torch.tensor([swapped.get((a, b), a) for a, b in input_ids[:, :2].tolist()])
    )
    assert retrieval(model, *arguments)["text to image R@1"] == pytest.approx(4 / 6)


def test_coco(coco, tmp_path):
    from coco import main

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2}
    text = {"vocab_size": 60, "max_position_embeddings": 16, "eos_token_id": 59, **sizes}
    config = transformers.CLIPConfig(
        text_config=text,
        vision_config={"image_size": 8, "patch_size": 4, **sizes},
        projection_dim=12,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "model")
    clip_processor().save_pretrained(tmp_path / "model")
    options = {"model": str(tmp_path / "model"), "samples": 8, "heldout": 3, "batch_size": 4}
    main(coco, tmp_path / "out", **options, **SHORT)
    check_family(tmp_path / "out", model, "image to text R@1", "text to image R@1")


def test_sizes_are_checked():
    from family import read_sizes

    assert read_sizes("0.5, 0.2,0.5") == [0.2, 0.5]
    for text in ("", "a", "0", "0.5,1"):
        with pytest.raises(ConfigError, match="sparsity must be"):
            read_sizes(text)


@pytest.mark.parametrize("recipe", ["coco", "imagenet", "language"])
def test_an_error_of_a_recipe_is_one_line(recipe, tmp_path, monkeypatch):
    from importlib import import_module

    arguments = [] if recipe == "language" else ["--data", str(tmp_path)]
    arguments += ["--model", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *arguments])
    module = import_module(recipe)
    with pytest.raises(SystemExit, match=r"error: .*nothing: no such folder"):
        module.start(module.main)
