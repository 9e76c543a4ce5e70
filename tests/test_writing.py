"""A folder is written whole, whatever cuts it short, and nothing that lay there before is touched."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vwn_hf import writing
from vwn_hf.checkpoints import CheckpointError
from vwn_hf.writing import (
    MANIFEST_NAME,
    CopiedBytes,
    FileToWrite,
    MadeBytes,
    check_room,
    copy_bytes,
    room_needed,
    unfinished_folder,
    unfinished_place,
    write_parts,
)

CONTENT = bytes(range(251)) * 40
PLAN = {"settings": 1}


def ignore(size: int) -> None:
    pass


def made(content: bytes, block_size: int) -> MadeBytes:
    return MadeBytes(len(content), block_size, lambda i: memoryview(content)[i * block_size : (i + 1) * block_size])


@pytest.fixture
def sources(tmp_path):
    """Two files to take bytes from."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name, content in (("a", CONTENT), ("b", CONTENT[::-1])):
        (folder / name).write_bytes(content)
    return folder


def files_of(sources):
    return [
        FileToWrite("joined", [made(b"header--" * 5, 7), CopiedBytes(sources / "a", 100, 5000), made(CONTENT, 999)]),
        FileToWrite("a", same_as=sources / "a"),
        FileToWrite("b", same_as=sources / "b"),
    ]


EXPECTED = {"joined": b"header--" * 5 + CONTENT[100:5100] + CONTENT, "a": CONTENT, "b": CONTENT[::-1]}


def write(sources, output, link="never", plan=PLAN, restart=False, progress=ignore):
    with unfinished_folder(output, plan, restart) as folder:
        folder.write(files_of(sources), link, progress)
    return folder


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def is_whole(output):
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", MANIFEST_NAME], cwd=output, check=True)
    there = contents(output)
    assert there.pop(MANIFEST_NAME).count(b"\n") == len(there)
    return there == EXPECTED and not unfinished_place(output).exists()


def cut(sources, output, link="never", after=0, writers=1):
    """A run that is stopped, as by Ctrl-C, once it has done `after` bytes. With one writer its files are in order."""
    left = [after]

    def stop(size):
        left[0] -= size
        if left[0] < 0:
            raise KeyboardInterrupt

    stopped = pytest.raises(KeyboardInterrupt, match="run the same again to go on")
    with patch.object(writing, "MOST_WRITERS", writers), stopped:
        write(sources, output, link, progress=stop)
    assert not output.exists()
    return unfinished_place(output) / "files"


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_file_cut_at_any_byte_is_completed(data):
    parts, expected = [], b""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        source.write_bytes(CONTENT)
        for _ in range(data.draw(st.integers(1, 5))):
            start, size = data.draw(st.integers(0, 3000)), data.draw(st.integers(0, 3000))
            content = CONTENT[start : start + size]
            block_size = data.draw(st.integers(1, 1200))
            parts.append(
                data.draw(st.sampled_from([made(content, block_size), CopiedBytes(source, start, len(content))]))
            )
            expected += content
        told = []
        assert write_parts(target, parts, told.append) == hashlib.sha256(expected).hexdigest()
        for _ in range(2):
            os.truncate(target, data.draw(st.integers(0, len(expected))))
            assert write_parts(target, parts, ignore) == hashlib.sha256(expected).hexdigest()
            assert target.read_bytes() == expected and sum(told) == len(expected)
        target.write_bytes(expected + b"more")
        write_parts(target, parts, ignore)
        assert target.read_bytes() == expected and source.read_bytes() == CONTENT


def without_kernel_copies(number):
    def fail(*args):
        raise AttributeError("copy_file_range") if number is None else OSError(number, os.strerror(number))

    return fail


def one_copy_in_the_kernel():
    calls = []

    def copy(source, target, size, start, position):
        calls.append(size)
        return os.pwrite(target, os.pread(source, 1000, start), position) if len(calls) == 1 else 0

    return copy


@pytest.mark.parametrize(
    "system",
    [*map(without_kernel_copies, (None, errno.EXDEV, errno.ENOSYS, errno.EPERM)), one_copy_in_the_kernel()],
    ids=["absent", "EXDEV", "ENOSYS", "EPERM", "stops"],
)
def test_bytes_are_copied_where_the_kernel_cannot(system, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "copy_file_range", system)
    with open(tmp_path / "target", "w+b") as target:
        copy_bytes(sources / "a", 10, target.fileno(), 3, 4000)
        assert target.read() == b"\0\0\0" + CONTENT[10:4010]
        with pytest.raises(CheckpointError, match="a ends too early; it was cut off or changed"):
            copy_bytes(sources / "a", len(CONTENT) - 5, target.fileno(), 0, 6)


def test_an_error_of_the_disk_is_not_taken_for_a_kernel_that_cannot(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "copy_file_range", without_kernel_copies(errno.EIO))
    with pytest.raises(CheckpointError, match=r"Input/output error: .*\. What was written is in .*unfinished: run"):
        write(sources, tmp_path / "out")


@pytest.mark.parametrize("link", ["auto", "always", "never"])
def test_a_folder_gets_its_name_when_it_is_whole(link, sources, tmp_path):
    folder = write(sources, tmp_path / "out", link)
    assert is_whole(tmp_path / "out")
    hard_links = [name for name in "ab" if (sources / name).samefile(tmp_path / "out" / name)]
    assert folder.linked == hard_links and bool(hard_links) == (link != "never")
    assert contents(sources) == {"a": CONTENT, "b": CONTENT[::-1]}


def test_the_clone_of_a_file_is_preferred_to_a_link(sources, tmp_path, monkeypatch):
    def clone(source, target):
        return bool(target.write_bytes(source.read_bytes()))

    monkeypatch.setattr(writing, "cloned", clone)
    monkeypatch.setattr(os, "link", without_kernel_copies(errno.EPERM))
    cut(sources, tmp_path / "out", "always", after=len(EXPECTED["joined"]) + len(CONTENT))
    assert write(sources, tmp_path / "out", "always").linked == ["a", "b"] and is_whole(tmp_path / "out")


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_what_cannot_be_linked_is_copied_or_refused(number, sources, tmp_path, monkeypatch):
    """EXDEV: on another file system. EPERM: as exFAT says, and Linux of others' files. EMLINK: too many links."""
    monkeypatch.setattr(os, "link", without_kernel_copies(number))
    with pytest.raises(CheckpointError, match=f"cannot be linked to .*{os.strerror(number)}.*link='auto'"):
        write(sources, tmp_path / "out", "always")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert write(sources, tmp_path / "out", "auto").linked == [] and is_whole(tmp_path / "out")


def test_a_link_leads_to_the_blob_not_to_the_hub_caches_link(sources, tmp_path):
    (tmp_path / "blob").write_bytes(CONTENT)
    (sources / "a").unlink()
    (sources / "a").symlink_to("../blob")
    write(sources, tmp_path / "out", "always")
    assert is_whole(tmp_path / "out") and not (tmp_path / "out" / "a").is_symlink()
    assert (tmp_path / "out" / "a").samefile(tmp_path / "blob")


@pytest.mark.parametrize("writers", [1, 4])
@pytest.mark.parametrize("link", ["never", "auto"])
@pytest.mark.parametrize("after", [0, 1, 50, 15080, 15090, 25120, 35159])
def test_a_run_that_was_stopped_goes_on(after, link, writers, sources, tmp_path):
    cut(sources, tmp_path / "out", link, after, writers)
    write(sources, tmp_path / "out", link)
    assert is_whole(tmp_path / "out") and contents(sources) == {"a": CONTENT, "b": CONTENT[::-1]}


def test_what_is_finished_is_not_written_or_read_again(sources, tmp_path, monkeypatch):
    cut(sources, tmp_path / "out", after=25120)
    again = []

    def noted(target, *rest):
        again.append(target.name)
        return write_parts(target, *rest)

    monkeypatch.setattr(writing, "write_parts", noted)
    write(sources, tmp_path / "out")
    assert again == ["b"] and is_whole(tmp_path / "out")


def grow(path):
    path.write_bytes(path.read_bytes() + b"more")


def shrink(path):
    os.truncate(path, 40)


def flip(path):
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("harm", [grow, shrink, flip, remove, Path.touch])
def test_a_finished_file_that_was_changed_after_the_cut_is_written_again(harm, sources, tmp_path):
    files = cut(sources, tmp_path / "out", after=25120)
    harm(files / "joined")
    write(sources, tmp_path / "out")
    assert is_whole(tmp_path / "out")


@pytest.mark.parametrize("end", [b'\n{"name": "a", "si', b"\n\0\0\0\0", b"\xff\xfe", b'\n{"name"'])
def test_a_journal_that_was_cut_off_is_read_as_far_as_it_goes(end, sources, tmp_path):
    journal = cut(sources, tmp_path / "out", after=25120).parent / "finished.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole[: whole.index(b"}\n") + 1] + end)
    write(sources, tmp_path / "out")
    assert is_whole(tmp_path / "out")


def test_a_file_that_was_linked_is_replaced_not_written_to(sources, tmp_path, monkeypatch):
    files = cut(sources, tmp_path / "out", "auto", after=15080)
    assert (files / "a").samefile(sources / "a")
    monkeypatch.setattr(os, "link", without_kernel_copies(errno.EXDEV))
    grow(sources / "a")
    with pytest.raises(AssertionError), unfinished_folder(tmp_path / "out", PLAN) as folder:
        folder.write([FileToWrite("a", [made(b"short", 2)])], "auto", ignore)
        assert (files / "a").read_bytes() != b"short"
    assert (sources / "a").read_bytes() == CONTENT + b"more"


def test_another_plan_is_refused_by_what_differs_and_loses_nothing(sources, tmp_path):
    before = contents(cut(sources, tmp_path / "out", after=15080).parent)
    for plan, difference in (
        ({"settings": 2}, r"\(settings was 1, is 2\)"),
        ({"settings": 1, "files": {"a": 1}}, r"\(files was null, is {\"a\": 1}\)"),
    ):
        with pytest.raises(CheckpointError, match=difference + r".* restart=True \(--restart\)"):
            write(sources, tmp_path / "out", plan=plan)
    assert contents(unfinished_place(tmp_path / "out")) == before
    write(sources, tmp_path / "out", plan=plan, restart=True)
    assert is_whole(tmp_path / "out")


def test_a_refusal_names_the_files_that_differ():
    before = {"files": {f"model-{i}": [10, 1000] for i in range(999)}, "link": "auto"}
    after = {"files": before["files"] | {"model-7": [10, 1001]}, "link": "auto"}
    assert writing.differences(before, after) == ["model-7 was [10, 1000], is [10, 1001]"]


def test_the_manifest_lists_every_file_in_every_folder(sources, tmp_path):
    with unfinished_folder(tmp_path / "out", PLAN) as folder:
        folder.write(files_of(sources), "never", ignore)
        (folder.files / "templates").mkdir()
        for name in ("templates/tool use.jinja", "zwölf", "back\\slash", "two\nlines"):
            (folder.files / name).write_text(name)
    manifest = (tmp_path / "out" / MANIFEST_NAME).read_text()
    assert f"{hashlib.sha256(CONTENT).hexdigest()}  a\n" in manifest and len(manifest.splitlines()) == 7
    subprocess.run(["sha256sum", "--check", "--strict", MANIFEST_NAME], cwd=tmp_path / "out", check=True)


def test_what_is_wrong_is_removed_and_what_is_interrupted_is_kept(sources, tmp_path):
    for error, kept in ((CheckpointError("wrong"), False), (RuntimeError("out of memory"), True)):
        with pytest.raises(RuntimeError), unfinished_folder(tmp_path / "out", PLAN) as folder:
            folder.write(files_of(sources), "never", ignore)
            raise error
        assert unfinished_place(tmp_path / "out").exists() == kept and not (tmp_path / "out").exists()
    write(sources, tmp_path / "out")
    assert is_whole(tmp_path / "out")


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_an_output_that_exists_or_appears_is_left_alone(make, sources, tmp_path):
    output = tmp_path / "out"
    appeared = pytest.raises(FileExistsError, match=r"out appeared while it was written to .*; move it away and run")
    with appeared, unfinished_folder(output, PLAN) as folder:
        folder.write(files_of(sources), "never", ignore)
        make(output)
    with pytest.raises(FileExistsError, match="out exists; give a new folder or remove it"):
        write(sources, output)
    output.rmdir() if output.is_dir() else output.unlink()
    write(sources, output)
    assert is_whole(output)


WRITER = """
import sys, time
from pathlib import Path
from vwn_hf.writing import unfinished_folder
with unfinished_folder(Path(sys.argv[1]), {}) as folder:
    (folder.files / "begun").touch()
    while not Path(sys.argv[2]).exists():
        time.sleep(0.01)
"""


def test_of_two_runs_the_second_is_refused_and_the_first_finishes(sources, tmp_path):
    output, go = tmp_path / "out", tmp_path / "go"
    first = subprocess.Popen([sys.executable, "-c", WRITER, output, go])
    while not (unfinished_place(output) / "files" / "begun").exists():
        time.sleep(0.01)
    for restart in (False, True):
        with pytest.raises(CheckpointError, match=r"Another run is writing .*out now\. Wait for it, stop it"):
            write(sources, output, restart=restart)
    go.touch()
    assert first.wait() == 0
    assert {path.name for path in output.iterdir()} == {"begun", MANIFEST_NAME}
    assert not unfinished_place(output).exists()


def test_everything_is_on_the_disk_before_the_folder_gets_its_name(sources, tmp_path, monkeypatch):
    synced, honest = [], writing.sync

    def sync(path):
        synced.append((path.name, (tmp_path / "out").exists()))
        honest(path)

    monkeypatch.setattr(writing, "sync", sync)
    write(sources, tmp_path / "out")
    assert sorted(synced) == sorted(
        [(name, False) for name in ("a", "b", "joined", MANIFEST_NAME, "files")] + [(tmp_path.name, True)]
    )


def test_room_is_asked_for_what_is_still_to_be_written(sources, tmp_path):
    files, output = files_of(sources), tmp_path / "out"
    joined, same = len(EXPECTED["joined"]), len(CONTENT)
    assert room_needed(output, files, "auto") == joined and room_needed(output, files, "never") == joined + 2 * same
    cut(sources, output, "auto", after=joined)
    os.truncate(unfinished_place(output) / "files" / "joined", 1000)
    assert room_needed(output, files, "auto") == joined - 1000
    assert room_needed(output, files, "never") == joined - 1000 + 2 * same  # what is linked takes no room yet


def test_too_little_room_is_refused_before_anything_is_written(sources, tmp_path, monkeypatch):
    before = contents(cut(sources, tmp_path / "out", after=15080).parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(9, 9, 5000))
    with pytest.raises(CheckpointError, match=r"out needs [\d,]+ bytes more, and .* has 5,000 free. Make room, or"):
        check_room(tmp_path / "out", files_of(sources), "never")
    assert contents(unfinished_place(tmp_path / "out")) == before


def test_a_plan_is_noted_whole_or_not_at_all(tmp_path, monkeypatch):
    def cut_short(path, text, **kwargs):
        path.write_bytes(text.encode()[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", cut_short)
        with pytest.raises(CheckpointError, match=r"There is no room left to write .*plan.json.part\. What was"):
            write(tmp_path, tmp_path / "out")
    with unfinished_folder(tmp_path / "out", PLAN):
        assert json.loads((unfinished_place(tmp_path / "out") / "plan.json").read_text()) == PLAN
