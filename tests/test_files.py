"""Files: whole or not at all when written, checked before anything is allocated when read."""

import hashlib
import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from safetensors.torch import save_file

from solpath import files
from solpath.errors import FileError
from solpath.files import json_bytes, new_folder, write_file
from solpath.holding import MARKS
from solpath.reading import (
    check_header,
    digests,
    file_digest,
    file_in,
    read_data,
    read_header,
    read_json,
)


def test_new_folder_appears_whole(tmp_path):
    with new_folder(tmp_path / "a" / "out") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "x").read_text() == "1"
    assert os.listdir(tmp_path / "a") == ["out"]


def test_new_folder_follows_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_text("old")
    (tmp_path / "real" / "path.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_folder(tmp_path / "link", overwrite=True) as folder:
        (folder / "x").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "x").read_text() == "new"


FALLBACK = [False, True]  # with what the system has, and as if it could not exchange two names


@pytest.fixture(params=FALLBACK, ids=["exchange", "two renames"])
def renames(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(files, "_rename_with", lambda *_: False)


def write(path, text, **options):
    with new_folder(path, **options) as folder:
        (folder / "path.json").write_text(text)


def left(folder):
    return sorted(os.listdir(folder))


@pytest.mark.parametrize(
    ("empty", "overwrite", "words"),
    [
        (False, False, "appeared"),
        (True, False, "'mine' appeared"),
        (True, True, "'mine' appeared"),
        (False, True, "not written by solpath"),
    ],
)
def test_what_appears_meanwhile_is_kept(tmp_path, renames, empty, overwrite, words):
    out = tmp_path / "out"
    if empty:
        out.mkdir()

    def save():
        with new_folder(out, overwrite=overwrite) as folder:
            (folder / "path.json").write_text("{}")
            out.mkdir(exist_ok=True)
            (out / "mine").write_text("mine")

    with pytest.raises(FileError, match=words):
        save()
    assert left(tmp_path) == ["out"]
    assert left(out) == ["mine"]


@pytest.mark.parametrize("empty", [False, True])
def test_one_of_many_writers_wins(tmp_path, empty, renames):
    for i in range(20):
        out, start = tmp_path / str(i), Barrier(4)
        if empty:
            out.mkdir()

        def save(text, out=out, start=start):
            try:
                with new_folder(out) as folder:
                    (folder / "path.json").write_text(text)
                    (folder / f"only-{text}").write_text(text)
                    start.wait(10)
            except FileError:
                return None
            return text

        with ThreadPoolExecutor(4) as pool:
            [winner] = [text for text in pool.map(save, "abcd") if text is not None]
        assert left(out) == [f"only-{winner}", "path.json"]
        assert (out / "path.json").read_text() == winner
    assert len(left(tmp_path)) == 20


def test_replacing_is_one_step_or_undone(tmp_path, renames):
    write(tmp_path / "out", "old")
    write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "path.json").read_text() == "new"
    assert left(tmp_path) == ["out"]


def test_failed_second_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_rename_with", lambda *_: False)
    write(tmp_path / "out", "old")
    rename, calls = os.rename, []

    def fails(source, target):
        calls.append(target)
        if len(calls) == 3:  # the first finds the folder there, the second puts it aside
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", fails)
    with pytest.raises(FileError, match="No space left"):
        write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "path.json").read_text() == "old"
    assert left(tmp_path) == ["out"]


def test_what_was_put_aside_by_a_killed_process_comes_back(tmp_path):
    write(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / f"{files._aside(tmp_path / 'out')}12345678")
    with pytest.raises(FileError, match="not empty"):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "path.json").read_text() == "old"
    assert left(tmp_path) == ["out"]


def test_only_what_solpath_wrote_is_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years")
    with pytest.raises(FileError, match=r"not written by solpath \(it holds 'chapter1.tex'"):
        write(tmp_path / "thesis", "new", overwrite=True)
    with pytest.raises(FileError, match="is a file"):
        write(tmp_path / "thesis" / "chapter1.tex", "new", overwrite=True)
    assert left(tmp_path / "thesis") == ["chapter1.tex"]
    for mark in MARKS:
        (tmp_path / mark).mkdir()
        (tmp_path / mark / mark).write_text("old")
        write(tmp_path / mark, "new", overwrite=True)
        assert left(tmp_path / mark) == ["path.json"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_is_filled_and_stays_the_same(tmp_path, overwrite, monkeypatch):
    (tmp_path / "out").mkdir(mode=0o750)
    before = (tmp_path / "out").stat()
    monkeypatch.chdir(tmp_path / "out")
    write(".", "new", overwrite=overwrite)
    after = os.stat(".")
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert left(".") == ["path.json"]


def test_a_failed_filling_leaves_the_folder_empty(tmp_path, monkeypatch):
    rename = files._rename_with

    def fails(source, target, flags):
        if target.name == "path.json":
            raise OSError(28, "No space left on device")
        return rename(source, target, flags)

    monkeypatch.setattr(files, "_rename_with", fails)

    def save():
        with new_folder(tmp_path) as folder:
            (folder / "path.json").write_text("{}")
            (folder / "another").write_text("")

    with pytest.raises(FileError, match="No space left"):
        save()
    assert left(tmp_path) == []


def test_a_target_with_dots_is_resolved(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    for target in ("sub/..", "sub/../..", ".."):
        with pytest.raises(FileError, match="not empty"):
            write(target, "new")
    write("sub/../out", "new")
    assert left(".") == ["mine", "out"]


def test_leftovers_of_the_dead_are_swept_and_no_others(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from solpath.files import new_folder\n"
        "with new_folder(Path(sys.argv[1]) / 'out') as folder:\n"
        "    (folder / 'x').write_text('x'); print('there', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, tmp_path]
    with subprocess.Popen(command, stdin=-1, stdout=-1) as process:
        assert process.stdout.readline() == b"there\n"
        (tmp_path / ".solpath-tmp-mine").mkdir()
        write(tmp_path / "other", "new")
        assert len(left(tmp_path)) == 3  # that process lives
        process.kill()
    write_file(tmp_path / "file", b"")
    assert left(tmp_path) == [".solpath-tmp-mine", "file", "other"]


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_modes_are_those_of_the_umask_or_of_what_is_replaced(tmp_path, umask):
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "out") as folder:
            save_file({"a": torch.ones(1)}, folder / "path.json")
        write_file(tmp_path / "file", b"1")
        assert mode(tmp_path / "out") == 0o777 & ~umask
        assert mode(tmp_path / "out" / "path.json") == mode(tmp_path / "file") == 0o666 & ~umask
        (tmp_path / "out").chmod(0o710)
        (tmp_path / "out" / "path.json").chmod(0o604)
        (tmp_path / "file").chmod(0o640)
        write(tmp_path / "out", "new", overwrite=True)
        write_file(tmp_path / "file", b"2")
        assert mode(tmp_path / "out") == 0o710
        assert mode(tmp_path / "out" / "path.json") == 0o604
        assert mode(tmp_path / "file") == 0o640
    finally:
        os.umask(before)


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127])
def test_long_names(tmp_path, name):
    write(tmp_path / name, "new")
    write(tmp_path / name, "new", overwrite=True)
    write_file(tmp_path / f"{name[:-1]}f", b"")


@pytest.mark.parametrize("name", ["n" * 256, "a\0b", "\ud800", "file/out"])
def test_names_that_cannot_be(tmp_path, name):
    (tmp_path / "file").write_text("")
    for function in (lambda: write(tmp_path / name, ""), lambda: write_file(tmp_path / name, b"")):
        with pytest.raises(FileError):
            function()
    for function in (read_json, read_header, file_digest):
        with pytest.raises(FileError):
            function(tmp_path / name)
    assert left(tmp_path) == ["file"]


def test_read_json_reads_objects_only(tmp_path):
    file = tmp_path / "x.json"
    file.write_text('{"a": 1.5}')
    assert read_json(file, sha256=hashlib.sha256(b'{"a": 1.5}').hexdigest()) == {"a": 1.5}
    large = f'{{"a": 1{"0" * 400}}}'
    for text in ("[]", "1", '{"a": NaN}', '{"a": -1e999}', large, "{", '{"a": 1}' + "]" * 9):
        file.write_text(text)
        with pytest.raises(FileError, match=r"x\.json"):
            read_json(file)


@pytest.mark.parametrize("function", [read_json, read_header, file_digest])
def test_nothing_waits_for_a_pipe_or_a_device(tmp_path, function):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(FileError, match="not a regular file"):
            function(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_of_every_shape(tmp_path, dtype):
    tensors = {"a": torch.ones(3, 2).to(dtype), "b": torch.ones(()).to(dtype)}
    tensors["c"] = torch.ones(0, 4).to(dtype)
    save_file(tensors, tmp_path / "x")
    expected = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    header = read_header(tmp_path / "x")
    check_header(tmp_path / "x", header, expected)
    found = read_data(tmp_path / "x", header)
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


def test_json_is_what_the_library_reads_and_lists_stay_on_one_line():
    inner = {"kept": [[1, 2, 3], []], "none": None, "text": 'ü"'}
    value = {"a": inner, "b": [{"c": 1.5}], "d": {}}
    text = json_bytes(value).decode()
    assert json.loads(text) == value
    assert "   [1, 2, 3],\n" in text
    for wrong in (float("nan"), [float("inf")]):
        with pytest.raises(ValueError, match="not JSON compliant"):
            json_bytes({"a": wrong})
