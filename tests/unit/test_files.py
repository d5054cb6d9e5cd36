"""Files of text are found by name, and read to their last byte or refused."""

from __future__ import annotations

import gzip
import os
import struct
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import fsspec
import pytest
import zstandard
from text_data import jsonl

from gptj_train.data import files
from gptj_train.data.files import SUFFIXES, find_files, numbered_lines
from gptj_train.data.tables import read_rows
from gptj_train.errors import UserError

LINES = [b"line %d of a text, " % number + b"word " * (number % 50) for number in range(2000)]
CONTENT = b"\n".join(LINES) + b"\n"


def lines_of(file: Path) -> list[bytes]:
    found = list(numbered_lines(file, lambda read: None))
    assert [number for number, _ in found] == list(range(1, len(found) + 1))
    return [line for _, line in found]


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def zst(content: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True, **options).compress(content)


def refusal(file: Path) -> str:
    with pytest.raises(UserError, match=r"\S") as caught:
        lines_of(file)
    assert type(caught.value) is UserError
    message = str(caught.value)
    assert message.startswith(str(file))
    assert "\n" not in message
    return message.removeprefix(str(file))


# --- finding ---


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    jsonl(tmp_path / "d" / "b.jsonl", "b")
    jsonl(tmp_path / "d" / "deep" / "a.json", "a")
    for name in ("c.txt", "e.jsonl.zst", "f.txt.gz", "g.parquet", "h.arrow", "notes.md"):
        (tmp_path / "d" / name).write_text("c")
    return tmp_path / "d"


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("", ["b.jsonl", "c.txt", "deep/a.json", "e.jsonl.zst", "f.txt.gz", "g.parquet", "h.arrow"]),
        ("b.jsonl", ["b.jsonl"]),
        ("*.jsonl", ["b.jsonl"]),
        ("[bc].*", ["b.jsonl", "c.txt"]),
        ("*/", ["deep/a.json"]),
        ("**/*.json*", ["b.jsonl", "deep/a.json", "e.jsonl.zst"]),
        ("deep/**", ["deep/a.json"]),
    ],
)
def test_folders_and_globs(tree: Path, pattern: str, found: list[str]) -> None:
    assert find_files(f"{tree}/{pattern}", "data.train") == [tree / name for name in found]


def test_a_list_keeps_its_order_and_its_repetitions(tree: Path) -> None:
    paths = [f"{tree}/c.txt", f"{tree}/*.jsonl", f"{tree}/c.txt"]
    assert find_files(paths, "data.train") == [tree / "c.txt", tree / "b.jsonl", tree / "c.txt"]


def test_a_path_that_exists_is_not_taken_for_a_glob(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "run[1].jsonl", "x")
    assert find_files(str(file), "data.train") == [file]


@pytest.mark.parametrize("name", ["nowhere.jsonl", "*.jsonl", "empty", ""])
def test_a_path_that_matches_nothing_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        find_files(name, "data.validation")
    if name == "empty":
        assert f"no {', '.join(SUFFIXES)} file in the folder 'empty'" in str(caught.value)
    else:
        assert str(caught.value).startswith(f"data.validation: no file at {name!r} (working directory: ")
    assert "\n" not in str(caught.value)


def test_one_bad_path_of_a_list_is_enough(tree: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        find_files([str(tree), f"{tree}/nowhere"], "data.train")


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.train is empty; give files"):
        find_files([], "data.train")


@pytest.mark.parametrize("pattern", ["notes.md", "*.md", "*"])
def test_a_file_of_another_kind_is_refused(tree: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=r"notes\.md is none of \.jsonl, .*\.arrow; convert it, or name files without"):
        find_files(f"{tree}/{pattern}", "data.train")


def test_another_reader_may_ask_for_other_kinds(tree: Path) -> None:
    assert find_files(str(tree), "data.train", (".md",)) == [tree / "notes.md"]


def test_what_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match=r"pipe\.jsonl is not a regular file"):
        find_files(str(tmp_path), "data.train")


# --- reading ---


def test_plain_lines(tmp_path: Path) -> None:
    assert lines_of(written(tmp_path / "a.jsonl", CONTENT)) == LINES
    assert lines_of(written(tmp_path / "b.jsonl", CONTENT.rstrip(b"\n"))) == LINES
    assert lines_of(written(tmp_path / "c.jsonl", b"")) == []
    assert lines_of(written(tmp_path / "d.jsonl", b"\n\nx\r\n")) == [b"", b"", b"x\r"]


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_lines_do_not_depend_on_how_much_is_read_at_once(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_CHUNK", chunk)
    monkeypatch.setattr(files, "_ZSTD_CHUNK", max(1, chunk // 3))
    few = b"\n".join(LINES[:200])
    assert lines_of(written(tmp_path / "a.jsonl", few)) == LINES[:200]
    assert lines_of(written(tmp_path / "a.jsonl.zst", zst(few))) == LINES[:200]
    assert lines_of(written(tmp_path / "a.jsonl.gz", gzip.compress(few))) == LINES[:200]


SKIPPABLE = struct.pack("<II", 0x184D2A50, 5) + b"aside"


def in_frames(pieces: int) -> bytes:
    borders = [len(CONTENT) * number // pieces for number in range(pieces + 1)]
    return b"".join(zst(CONTENT[start:end]) for start, end in pairwise(borders))


PACKED = {
    "one frame": (".zst", zst(CONTENT)),
    "many frames": (".zst", in_frames(50)),
    "an empty frame between": (".zst", zst(CONTENT[:5000]) + zst(b"") + zst(CONTENT[5000:])),
    "skippable frames": (".zst", SKIPPABLE + zst(CONTENT[:777]) + SKIPPABLE + zst(CONTENT[777:]) + SKIPPABLE),
    "a frame without its size": (".zst", zst(CONTENT, write_content_size=False)),
    "one member": (".gz", gzip.compress(CONTENT)),
    "several members": (".gz", gzip.compress(CONTENT[:1234]) + gzip.compress(b"") + gzip.compress(CONTENT[1234:])),
}


@pytest.mark.parametrize(("suffix", "packed"), PACKED.values(), ids=PACKED)
def test_packed_lines_and_how_much_is_read(tmp_path: Path, suffix: str, packed: bytes) -> None:
    file = written(tmp_path / f"a.jsonl{suffix}", packed)
    assert lines_of(file) == LINES
    read: list[int] = []
    for _ in numbered_lines(file, read.append):
        pass
    assert sum(read) == len(packed)


@pytest.mark.parametrize("frames", [1, 3])
def test_a_zst_cut_off_anywhere_is_refused(tmp_path: Path, frames: int) -> None:
    packed = in_frames(frames)
    ends: set[int] = set()
    if frames == 3:
        sizes = [len(zst(CONTENT[len(CONTENT) * n // 3 : len(CONTENT) * (n + 1) // 3])) for n in range(3)]
        ends |= {sizes[0], sizes[0] + sizes[1]}  # whole frames are a whole file: no reader can tell
    cuts = {*range(1, 20), *range(20, len(packed), 97), *range(len(packed) - 12, len(packed))} - ends
    assert len(cuts) > 40
    for cut in sorted(cuts):
        message = refusal(written(tmp_path / "a.jsonl.zst", packed[:cut]))
        assert message == ": cut off in the middle of a zstd frame; fetch it again", cut


@pytest.mark.parametrize("cut", [1, 5, 9, 200, -9, -8, -4, -1])
def test_a_gz_cut_off_anywhere_is_refused(tmp_path: Path, cut: int) -> None:
    message = refusal(written(tmp_path / "a.jsonl.gz", gzip.compress(CONTENT)[:cut]))
    assert message.startswith(": damaged, cut off or not supported (")


def test_every_flipped_bit_of_a_checksummed_zst_is_noticed(tmp_path: Path) -> None:
    packed = zst(CONTENT[:3000])
    for place in range(0, len(packed), 7):
        spoilt = bytearray(packed)
        spoilt[place] ^= 1 << place % 8
        file = written(tmp_path / "a.jsonl.zst", bytes(spoilt))
        try:
            found = lines_of(file)
        except UserError:
            continue
        assert b"\n".join(found) == CONTENT[:3000].rstrip(b"\n"), place  # a bit without meaning


def test_a_wrong_crc_of_a_gz(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(CONTENT))
    packed[-6] ^= 1
    assert "CRC check failed" in refusal(written(tmp_path / "a.jsonl.gz", bytes(packed)))


def test_a_bomb_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_FREE", 2**20)
    rows = zst(b"\n" * 2**28)
    assert len(rows) < 2**16
    began = time.monotonic()
    file = written(tmp_path / "a.jsonl.zst", rows)
    assert refusal(file) == ": refused, it decompresses to more than 1000 times its size"
    assert time.monotonic() - began < 30
    # The same in many small frames.
    file.write_bytes(zst(b"\n" * 2**20) * 64)
    assert "decompresses to more than 1000 times" in refusal(file)


def test_text_that_compresses_well_is_not_a_bomb(tmp_path: Path) -> None:
    text = b"the same line again and again\n" * 10**5
    assert len(zst(text)) * 1000 < len(text)  # beyond the ratio, and below what is judged
    assert len(lines_of(written(tmp_path / "a.jsonl.zst", zst(text)))) == 10**5


def test_a_frame_that_requires_too_much_memory_is_refused(tmp_path: Path) -> None:
    options = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=options).compressobj()
    file = written(tmp_path / "a.jsonl.zst", packer.compress(CONTENT) + packer.flush())
    assert "Frame requires too much memory for decoding" in refusal(file)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_line_that_does_not_end(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", 2**20)
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zst}[suffix]
    just = b"a\n" + b"x" * 2**20 + b"\nb\n"
    assert [len(line) for line in lines_of(written(tmp_path / f"a.jsonl{suffix}", pack(just)))] == [1, 2**20, 1]
    more = b"a\n" + b"x" * (2**20 + 1) + b"\nb\n"
    message = refusal(written(tmp_path / f"a.jsonl{suffix}", pack(more)))
    assert message == ":2: the line is longer than 1 MiB; split the record"


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.jsonl.zst", "gone.txt.gz"])
def test_a_file_that_went_away(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path / name) == ": cannot be read (No such file or directory)"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.parquet"])
def test_a_git_lfs_pointer_is_no_data(tmp_path: Path, name: str) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    file = written(tmp_path / name, pointer)
    read = partial(read_rows, columns={"text"}) if name == "a.parquet" else numbered_lines
    with pytest.raises(UserError, match=r"this is a Git LFS pointer, not the file itself; run 'git lfs pull'"):
        list(read(file, progress=lambda read: None))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz", "a.parquet"])
def test_a_login_page_is_no_data(tmp_path: Path, name: str) -> None:
    page = written(tmp_path / name, b"\n<!DOCTYPE html><html><body>Sign in</body></html>")
    read = partial(read_rows, columns={"text"}) if name == "a.parquet" else numbered_lines
    with pytest.raises(UserError, match=r"this is an HTML page, such as a login or error page, not the file itself"):
        list(read(page, progress=lambda read: None))
    assert lines_of(written(tmp_path / "page.txt", b"<html> is where a page begins"))  # text about it is text


def test_a_near_name_is_offered(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "train.jsonl", "x")
    with pytest.raises(UserError, match=rf"did you mean '{file}'\?"):
        find_files(str(tmp_path / "train.jsonk"), "data.train")
    with pytest.raises(UserError, match="correct the path") as caught:
        find_files(str(tmp_path / "other"), "data.train")
    assert "did you mean" not in str(caught.value)


def test_paths_with_commas_between_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [jsonl(tmp_path / name, "x") for name in ("a.jsonl", "b.jsonl", "c,d.jsonl")]
    assert find_files(f"{files[0]}, {files[1]}", "data.train") == files[:2]
    assert find_files(str(files[2]), "data.train") == files[2:]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_files("~/a.jsonl,~/b.jsonl", "data.train") == files[:2]
    assert find_files([str(files[2]), str(files[0])], "data.train") == [files[2], files[0]]


def test_suffixes_in_capitals(tmp_path: Path) -> None:
    names = ["a.JSONL", "b.Json.GZ", "c.TXT"]
    files = [jsonl(tmp_path / name, "x") for name in names]
    assert find_files(str(tmp_path), "data.train") == files
    assert [find_files(str(file), "data.train") for file in files] == [[file] for file in files]
    written(tmp_path / "b.Json.GZ", gzip.compress(CONTENT))
    assert lines_of(tmp_path / "b.Json.GZ") == LINES


def test_urls_are_copied_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    there = fsspec.filesystem("memory")
    for folder in ("a", "b"):
        there.pipe(f"/{folder}/part.jsonl", CONTENT)
    found = find_files(["memory://a/*.jsonl", "memory://b/part.jsonl"], "data.train")
    assert [file.name for file in found] == ["part.jsonl"] * 2
    assert found[0] != found[1]
    assert [lines_of(file) for file in found] == [LINES] * 2
    assert capsys.readouterr().out.count("data.train: copying ") == 2
    there.rm("/a/part.jsonl")
    there.rm("/b/part.jsonl")
    assert find_files("memory://b/part.jsonl", "data.train") == found[1:]
    with pytest.raises(UserError, match=r"data\.train=memory://b/none\.jsonl: cannot be fetched \(.*; correct it"):
        find_files("memory://b/none.jsonl", "data.train")
    with pytest.raises(UserError, match=r"data\.train=none://x: cannot be fetched \(Protocol not known: none"):
        find_files("none://x", "data.train")


def test_a_folder_of_a_url_is_read_as_a_folder_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    there = fsspec.filesystem("memory")
    for name in ("b.jsonl", "deep/a.JSONL.gz", "deep/c.txt", "notes.md"):
        there.pipe(f"/folder/{name}", CONTENT)
    for url in ("memory://folder", "memory://folder/"):
        found = find_files(url, "data.train")
        assert [file.name for file in found] == ["b.jsonl", "a.JSONL.gz", "c.txt"]  # in the order of their paths there
    there.rm("/folder", recursive=True)
    assert find_files("memory://folder", "data.train") == found
    found[1].unlink()
    with pytest.raises(UserError, match=r"data\.train=memory://folder: cannot be fetched"):
        find_files("memory://folder", "data.train")


def test_a_saved_dataset_is_the_files_that_it_names(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    rows.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    rows.save_to_disk(str(tmp_path / "saved"), num_shards=2)  # over the first
    assert len(list((tmp_path / "saved").glob("*.arrow"))) == 5
    found = find_files(str(tmp_path / "saved"), "data.train")
    assert [file.name for file in found] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    state = tmp_path / "saved" / "state.json"
    state.write_text('{"_data_files": [{"filename": "../secret.arrow"}]}')
    with pytest.raises(UserError, match=r"state\.json: refused, it names \.\./secret\.arrow, which is outside"):
        find_files(str(tmp_path / "saved"), "data.train")
    for content in ("[]", "{", '{"_data_files": 5}'):
        state.write_text(content)
        with pytest.raises(UserError, match=r"state\.json: not what datasets writes; save the dataset again"):
            find_files(str(tmp_path / "saved"), "data.train")


def test_the_split_of_a_saved_dataset_is_that_of_the_key(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": rows, "dev": rows}).save_to_disk(str(tmp_path / "both"))
    (file,) = find_files(str(tmp_path / "both"), "data.train")
    assert file.parent == tmp_path / "both" / "train"
    with pytest.raises(UserError, match=r"contains several splits; name one of them: .*/both/dev, .*/both/train$"):
        find_files(str(tmp_path / "both"), "data.validation")
