"""Whatever fails while a checkpoint is upcycled: one clear sentence, the source as it was, nothing half-written."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import tiny_model

from vwn_hf import CheckpointError, cli, upcycle, upcycling, writing
from vwn_hf.upcycling import UpcyclingRecipe, carry_out, plan_upcycling
from vwn_hf.writing import MANIFEST_NAME, sha256_of, unfinished_place

NOBODY = 65534
OPTIONS = {"verify": "bytes", "link": "never"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A source of several small files, and what an undisturbed run makes of it."""
    folder = tmp_path_factory.mktemp("faults")
    tiny_model("olmoe").save_pretrained(folder / "source", max_shard_size="40KB")
    (folder / "source" / "LICENSE").write_text("free")
    upcycle(folder / "source", folder / "vwn", **OPTIONS)
    return folder / "source", hashes(folder / "vwn")


@pytest.fixture
def source(checkpoint, tmp_path):
    shutil.copytree(checkpoint[0], tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def expected(checkpoint):
    return checkpoint[1]


def hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


def shards(source: Path) -> list[Path]:
    return sorted(source.glob("*.safetensors"))


def refused(source, output, match, error=CheckpointError, **options):
    """Check that a run fails with one line, and that neither source nor output is touched by it."""
    before = hashes(source)
    with pytest.raises(error, match=match) as raised:
        upcycle(source, output, **OPTIONS | options)
    assert "\n" not in str(raised.value) and not output.exists()
    assert hashes(source) == before
    return str(raised.value)


def stopped_at(stage, source, output, **options):
    """A run that is interrupted when it comes to a stage; returns where it left what it wrote."""

    def watch(name, done, total):
        if name == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"Stopped\. What was written is in .*: run the same again to go on"):
        upcycle(source, output, **OPTIONS | options, progress=watch)
    return unfinished_place(output)


WRITES = [(os, "pwrite"), (os, "copy_file_range"), (os, "fsync"), (shutil, "copyfile")]
WRITES += [(Path, "write_text"), (Path, "write_bytes"), (Path, "mkdir"), (Path, "replace"), (Path, "rename")]


def fail_at(number: int, patch) -> list:
    """Let the n-th call that writes something find the disk full; returns a list that holds the calls so far."""
    calls = []

    def failing(honest):
        def call(*args, **kwargs):
            calls.append(honest.__name__)
            if len(calls) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return honest(*args, **kwargs)

        return call

    for place, name in WRITES:
        patch.setattr(place, name, failing(getattr(place, name)))
    return calls


def test_a_disk_that_is_full_at_any_write_costs_nothing_that_was_written(source, expected, tmp_path, monkeypatch):
    whole, number, before = tmp_path / "vwn", 0, hashes(source)
    while not whole.exists():  # each run gets one write further than the one before
        number += 1
        with monkeypatch.context() as patch:
            fail_at(number, patch)
            try:
                upcycle(source, whole, **OPTIONS)
            except CheckpointError as error:
                assert "There is no room left to write" in str(error) and "\n" not in str(error)
    assert number > 20 and hashes(whole) == expected and hashes(source) == before


@pytest.mark.parametrize("number", [1, 5, 12, 20, 30])
def test_a_full_disk_can_be_resumed_once_there_is_room(number, source, expected, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(number, patch)
        refused(source, tmp_path / "vwn", "There is no room left to write")
    upcycle(source, tmp_path / "vwn", **OPTIONS)
    assert hashes(tmp_path / "vwn") == expected


def in_child(function, *args) -> tuple[int, str]:
    """Exit status and stderr of the command line in a process of its own, after function(*args)."""
    with tempfile.TemporaryFile("w+") as output:

        def run():
            sys.stderr = output
            cli.app(function(*args))

        child = multiprocessing.get_context("fork").Process(target=run)
        child.start()
        child.join()
        output.seek(0)
        return child.exitcode, output.read()


def command(source, output, *options):
    return ["upcycle", str(source), str(output), "--verify", "bytes", "--link", "never", *options]


def fails_in_child(function, *args) -> str:
    status, message = in_child(function, *args)
    assert status == 1 and message.startswith("Error: ") and message.count("\n") == 1, message
    return message


def test_a_file_size_limit_is_named_and_can_be_resumed_beyond(source, expected, tmp_path):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        return command(source, tmp_path / "vwn")

    message = fails_in_child(limited)
    assert "File too large: " in message and "run the same again to go on" in message
    assert unfinished_place(tmp_path / "vwn").exists() and not (tmp_path / "vwn").exists()
    upcycle(source, tmp_path / "vwn", **OPTIONS)
    assert hashes(tmp_path / "vwn") == expected


@pytest.fixture
def public():
    """A folder that an unprivileged user can reach."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


def unprivileged(*arguments):
    if os.getuid() == 0:  # who may do everything
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    return command(*arguments)


@pytest.mark.parametrize("denied", ["source file", "source", "parent", "unfinished", "unfinished files"])
def test_what_may_not_be_read_or_written_is_named(denied, checkpoint, expected, public):
    source, output = public / "source", public / "parent" / "vwn"
    shutil.copytree(checkpoint[0], source)
    output.parent.mkdir()
    unfinished = unfinished_place(output)
    if denied.startswith("unfinished"):
        stopped_at("comparing bytes", source, output)
    place, mode = {
        "source file": (shards(source)[1], 0), "source": (source, 0), "parent": (output.parent, 0o555),
        "unfinished": (unfinished, 0o555), "unfinished files": (unfinished / "files", 0o555),
    }[denied]  # fmt: skip
    before = hashes(source)
    if denied == "unfinished files":
        shards(place)[0].unlink()
    for path in public.rglob("*") if os.getuid() == 0 else ():
        os.chown(path, NOBODY, NOBODY)
    os.chmod(place, mode)
    message = fails_in_child(unprivileged, source, output)
    assert str(place) in message and ("Permission denied: " in message or denied == "source"), message
    os.chmod(place, 0o755)
    assert not output.exists() and hashes(source) == before
    upcycle(source, output, **OPTIONS)
    assert hashes(output) == expected


def grow(path):
    path.write_bytes(path.read_bytes() + b"more")


def shrink(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


HARMS = [grow, shrink, flip, remove, Path.touch]


@pytest.mark.parametrize("stage", ["writing", "comparing bytes", "running the source"])
@pytest.mark.parametrize("harm", HARMS)
def test_a_source_that_changes_meanwhile_is_named(harm, stage, source, tmp_path):
    victim, before = shards(source)[3], hashes(source)
    harmed = []

    def watch(name, done, total):
        if name == stage and not harmed:
            harmed.append(harm(victim))

    with pytest.raises(CheckpointError, match=rf"source changed while it was read \({victim.name}\); run the same"):
        upcycle(source, tmp_path / "vwn", link="never", progress=watch)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    after = hashes(source)
    assert {name for name in before if after.get(name) != before[name]} <= {victim.name}


@pytest.mark.parametrize("name", ["model-00002-of-*.safetensors", "config.json", "LICENSE"])
@pytest.mark.parametrize("harm", HARMS)
def test_a_source_that_changed_since_it_was_planned_is_not_read(harm, name, source, tmp_path):
    victim = next(source.glob(name))
    plan = plan_upcycling(UpcyclingRecipe(source=str(source), output=str(tmp_path / "vwn"), **OPTIONS))
    harm(victim)
    with pytest.raises(CheckpointError, match=rf"changed while it was read \({victim.name}\)"):
        carry_out(plan, writing.silent)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("harm", HARMS)
def test_a_source_that_changed_after_the_cut_is_refused_and_loses_nothing(harm, source, expected, tmp_path):
    unfinished = stopped_at("comparing bytes", source, tmp_path / "vwn")
    written, victim = hashes(unfinished), shards(source)[3]
    content, times = victim.read_bytes(), victim.stat()
    harm(victim)
    message = refused(source, tmp_path / "vwn", victim.name)
    assert harm not in (flip, Path.touch) or f"another source ({victim.name} was [" in message
    assert hashes(unfinished) == written
    victim.write_bytes(content)
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    upcycle(source, tmp_path / "vwn", **OPTIONS)
    assert hashes(tmp_path / "vwn") == expected


@pytest.mark.parametrize("link", ["never", "auto"])
@pytest.mark.parametrize("stage", ["writing", "comparing bytes", "running the source"])
def test_a_refused_run_loses_nothing_of_an_unfinished_one(stage, link, source, tmp_path, monkeypatch):
    output = tmp_path / "vwn"
    options = {"verify": "auto", "link": link}
    upcycle(source, tmp_path / "whole", **options)
    unfinished = stopped_at(stage, source, output, **options)
    written = hashes(unfinished)
    refused(source, output, "segments=5 does not divide", ValueError, segments=5)
    refused(source, output, r"slots was 8, is 12.*restart=True", **options, slots=12)
    refused(source, output, r"link was .*, is \"always\"", link="always")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(9, 9, 5000))
        refused(source, output, r"has 5,000 free\. Make room", **options)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub id"):
        upcycle(tmp_path / "nowhere", output)
    assert hashes(unfinished) == written
    upcycle(source, output, **options)
    assert hashes(output) == hashes(tmp_path / "whole")


def test_a_verification_that_fails_leaves_nothing(source, tmp_path, monkeypatch):
    def flipped(target, position, view):
        honest(target, position, memoryview(bytes(view[:-1]) + bytes([view[-1] ^ 1])))

    honest = writing.write_all
    with monkeypatch.context() as patch:
        patch.setattr(writing, "copied_in_kernel", lambda *args: 0)
        patch.setattr(writing, "write_all", flipped)
        refused(source, tmp_path / "vwn", "header|The bytes of .* are not the source's|JSON")
    monkeypatch.setattr(upcycling, "verify", lambda *args: (_ for _ in ()).throw(CheckpointError("It is wrong.")))
    refused(source, tmp_path / "vwn", "It is wrong")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_output_and_source_do_not_overlap(source, tmp_path, monkeypatch):
    refused(source, source / "vwn", "lies in the source, .*; give a folder outside of it", ValueError)
    (tmp_path / "link").symlink_to(source)
    refused(source, tmp_path / "link" / "deep" / "vwn", "lies in the source", ValueError)
    refused(tmp_path / "link", source / "vwn", "lies in the source", ValueError)
    inside = unfinished_place(tmp_path / "vwn") / "files"
    shutil.copytree(source, inside)
    refused(inside, tmp_path / "vwn", "which becomes the output; give another output", ValueError, restart=True)
    monkeypatch.chdir(source)
    refused(Path("."), Path("vwn"), "lies in the source", ValueError)
    before = hashes(source)
    with pytest.raises(FileExistsError, match="give a new folder"):
        upcycle(source, tmp_path)
    assert hashes(source) == before


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_an_output_that_is_anything_already_is_left_alone(make, source, tmp_path):
    make(tmp_path / "vwn")
    before = os.lstat(tmp_path / "vwn")
    assert "exists; give a new folder or remove it." in fails_in_child(command, source, tmp_path / "vwn")
    after = os.lstat(tmp_path / "vwn")
    kept = [name for name in dir(before) if name.startswith("st_") and "atime" not in name]  # reading a link is a use
    assert len(kept) > 10 and [getattr(after, name) for name in kept] == [getattr(before, name) for name in kept]
    assert not unfinished_place(tmp_path / "vwn").exists()


def test_a_parent_that_is_no_folder_is_named(source, tmp_path):
    (tmp_path / "file").touch()
    assert "Not a directory: " in refused(source, tmp_path / "file" / "vwn", "Nothing was written; correct that")


def test_relative_paths_and_closing_slashes_lead_to_the_same_bytes(source, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    upcycle("source/", "deep/er/vwn/", **OPTIONS)
    assert hashes(tmp_path / "deep" / "er" / "vwn") == expected
    monkeypatch.chdir(tmp_path / "deep")
    upcycle("../source", "vwn", **OPTIONS)
    assert hashes(tmp_path / "deep" / "vwn") == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_says_how_to_go_on(number, source, expected, tmp_path):
    def stopping():
        def verify(*args):
            os.kill(os.getpid(), number)
            time.sleep(60)

        upcycling.verify = verify  # in the child alone
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return command(source, tmp_path / "vwn")

    status, message = in_child(stopping)
    assert status == 130 and message.startswith("Stopped. What was written is in "), message
    assert message.count("\n") == 1 and not (tmp_path / "vwn").exists()
    upcycle(source, tmp_path / "vwn", **OPTIONS)
    assert hashes(tmp_path / "vwn") == expected


def test_the_manifest_is_written_last(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *args: (_ for _ in ()).throw(OSError(errno.EIO, "cut")))
        refused(source, tmp_path / "vwn", "cut")
    files = unfinished_place(tmp_path / "vwn") / "files"
    last = max(files.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert last.name == MANIFEST_NAME and set(hashes(files)) == {
        MANIFEST_NAME, *(line.split("  ")[1] for line in last.read_text().splitlines())
    }  # fmt: skip
