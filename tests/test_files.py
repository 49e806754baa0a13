"""Files: whole or not at all when written, checked before anything is allocated when read."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from solpath.errors import FileError
from solpath.files import digests, file_in, new_folder, read_header, read_json, read_tensors


def test_new_folder_appears_whole(tmp_path):
    with new_folder(tmp_path / "a" / "out") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "x").read_text() == "1"
    assert os.listdir(tmp_path / "a") == ["out"]


def test_new_folder_follows_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_folder(tmp_path / "link", overwrite=True) as folder:
        (folder / "x").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "x").read_text() == "new"


def test_read_json_reads_objects_only(tmp_path):
    file = tmp_path / "x.json"
    file.write_text('{"a": 1.5}')
    assert read_json(file, sha256=hashlib.sha256(b'{"a": 1.5}').hexdigest()) == {"a": 1.5}
    for text in ("[]", "1", '{"a": NaN}', '{"a": -1e999}', "{", '{"a": 1}' + "]" * 9):
        file.write_text(text)
        with pytest.raises(FileError, match=r"x\.json"):
            read_json(file)


def test_read_json_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="regular"):
        read_json(tmp_path / "pipe")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_of_every_shape(tmp_path, dtype):
    tensors = {"a": torch.ones(3, 2).to(dtype), "b": torch.ones(()).to(dtype)}
    tensors["c"] = torch.ones(0, 4).to(dtype)
    save_file(tensors, tmp_path / "x")
    expected = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    found = read_tensors(tmp_path / "x", expected)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert {name: shape for name, (_, shape) in read_header(tmp_path / "x").items()} == {
        name: shape for name, (_, shape) in expected.items()
    }
    with digests([tmp_path / "x"]) as jobs:
        digest = jobs["x"].result()
    assert digest == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()


def test_header_that_claims_more_than_the_file_holds(tmp_path):
    entry = {"dtype": "F32", "shape": [10**12, 10**5], "data_offsets": [0, 4 * 10**17]}
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FileError, match="cannot read"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "none", "a\0b"])
def test_member_stays_in_the_folder(tmp_path, name):
    (tmp_path / "x").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError):
        file_in(tmp_path / "folder", name)
