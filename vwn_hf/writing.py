"""A folder that gets its name when it is complete, and whose writing goes on where it stopped.

While it is written, everything lies in `.NAME.unfinished` beside it:

    files/          what will be the folder
    plan.json       what is written, and from what: a run with another plan does not touch it
    finished.jsonl  a line for each finished file: name, size, time of change, sha256
    lock            held by the run that writes

Files are written from front to back, so what is there of one after a cut is right as far as it goes. Copies are made
in the kernel (copy_file_range); hashes are taken of what was written, on another thread.
"""

import errno
import hashlib
import io
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from .checkpoints import CheckpointError, read_into, read_json

MANIFEST_NAME = "SHA256SUMS"
LINKS = ("auto", "always", "never")
BLOCK_BYTES = 16 << 20
BLOCKS_AHEAD = 4  # written and not hashed yet
FICLONE = 0x40049409  # linux/fs.h: two files share their blocks until one of them is changed
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_IN_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)

Progress = Callable[[int], None]  # told of bytes that were written and hashed


@dataclass(frozen=True)
class CopiedBytes:
    """`size` bytes of another file, from byte `start` on."""

    file: Path
    start: int
    size: int
    block_size = BLOCK_BYTES


@dataclass(frozen=True)
class MadeBytes:
    """`size` bytes in blocks of `block_size`, the last one shorter; `make(i)` gives block i, the same each time."""

    size: int
    block_size: int
    make: Callable[[int], memoryview]


@dataclass(frozen=True)
class FileToWrite:
    """A file to be put together from parts, or to be the same as another file."""

    name: str
    parts: list[CopiedBytes | MadeBytes] = field(default_factory=list)
    same_as: Path | None = None

    @property
    def size(self) -> int:
        return self.same_as.stat().st_size if self.same_as else sum(part.size for part in self.parts)


class UnfinishedFolder:
    """The folder while it is written, given by `unfinished_folder`.

    Attributes:
        files: where its files are.
        hashes: sha256 of each weight file that is finished, by name.
        linked: names of those that share their bytes with another file on disk.
    """

    def __init__(self, place: Path):
        self.place = place
        self.files = place / "files"
        self.hashes: dict[str, str] = {}
        self.linked: list[str] = []

    def write(self, files: list[FileToWrite], link: str, progress: Progress) -> None:
        """Write or link files; those that an earlier run finished are left as they are.

        Raises:
            CheckpointError: link="always", and a file cannot be linked.
            OSError: the disk is full, or a file cannot be read or written.
        """
        before = self.finished_before()
        hashed: dict[str, Future] = {}
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for file in files:
                target = self.files / file.name
                if target.exists() and before.get(file.name, {}).items() >= described(target).items():
                    self.hashes[file.name] = before[file.name]["sha256"]
                    progress(file.size)
                elif file.same_as and link != "never" and linked(file.same_as, target):
                    hashed[file.name] = threads.submit(sha256_of, target, progress)
                elif file.same_as and link == "always":
                    raise CheckpointError(
                        f"{file.same_as} cannot be linked to {target}: they are not on one file system, or it allows "
                        "no links. Choose link='auto' (--link auto) to copy what cannot be linked."
                    )
                else:
                    parts = file.parts or [CopiedBytes(file.same_as, 0, file.size)]
                    self.finish(file.name, write_parts(target, parts, progress))
            for name, future in hashed.items():
                self.finish(name, future.result())
        self.linked += [file.name for file in files if file.same_as and file.same_as.samefile(self.files / file.name)]

    def finished_before(self) -> dict[str, dict]:
        """What the journal says of finished files, by name."""
        journal = self.place / "finished.jsonl"
        entries = {}
        for line in journal.read_text().splitlines() if journal.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # empty, or cut off
                continue
            entries[entry["name"]] = entry
        return entries

    def finish(self, name: str, sha256: str) -> None:
        self.hashes[name] = sha256
        entry = described(self.files / name) | {"sha256": sha256}
        with open(self.place / "finished.jsonl", "a") as journal:
            journal.write(f"\n{json.dumps(entry)}\n")

    def write_manifest(self) -> None:
        """The sha256 of every file, as `sha256sum --check` reads it; it gets its name when it is whole."""
        names = sorted(path.relative_to(self.files).as_posix() for path in self.files.rglob("*") if path.is_file())
        lines = [
            f"{self.hashes.get(name) or sha256_of(self.files / name)}  {name}\n"
            for name in names
            if name != MANIFEST_NAME
        ]
        whole = self.place / MANIFEST_NAME
        whole.write_text("".join(lines))
        whole.replace(self.files / MANIFEST_NAME)


@contextmanager
def unfinished_folder(output: Path, plan: dict, restart: bool = False) -> Iterator[UnfinishedFolder]:
    """A folder that becomes `output`, with a manifest of its files' hashes, when the block ends.

    If the block is killed or the disk fails, what was written stays, and the next call with the same plan goes on
    with it. If the block raises anything else, all of it is removed.

    Args:
        plan: of JSON values; says what is written and from which files.
        restart: throw away what an earlier run left, whatever its plan was.
    Raises:
        FileExistsError: output exists.
        CheckpointError: another run writes it now; an earlier run left a folder with another plan; the disk is full;
            a file cannot be read or written.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists; give a new folder or remove it.")
    place = output.parent / f".{output.name}.unfinished"
    with readable_disk_errors(place), locked(place, output):
        if restart:
            shutil.rmtree(place / "files", ignore_errors=True)
            (place / "finished.jsonl").unlink(missing_ok=True)
            (place / "plan.json").unlink(missing_ok=True)
        check_plan(place, plan)
        try:
            folder = UnfinishedFolder(place)
            folder.files.mkdir(exist_ok=True)
            yield folder
            folder.write_manifest()
            folder.files.rename(output)
            shutil.rmtree(place)
        except (OSError, MemoryError):
            raise
        except Exception:
            shutil.rmtree(place)
            raise


@contextmanager
def locked(place: Path, output: Path) -> Iterator[None]:
    """The right to write in `place`, which no other process has meanwhile."""
    place.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(
            f"Another run is writing {output} now. Wait for it, stop it, or give another folder."
        ) from None
    try:
        if output.exists():  # the other run has just finished
            shutil.rmtree(place)
            raise FileExistsError(f"{output} exists; give a new folder or remove it.")
        yield
    finally:
        lock.release()


def check_plan(place: Path, plan: dict) -> None:
    """Note the plan, or raise CheckpointError if what lies there was begun with another."""
    path = place / "plan.json"
    plan = json.loads(json.dumps(plan))
    if not path.exists():
        whole = place / "plan.json.part"
        whole.write_text(json.dumps(plan, indent=2))
        whole.replace(path)
        return
    before = read_json(path)
    if before == plan:
        return
    changed = [key for key in {**before, **plan} if before.get(key) != plan.get(key)]
    shown = "; ".join(f"{key} was {shortened(before.get(key))}, is {shortened(plan.get(key))}" for key in changed)
    raise CheckpointError(
        f"{place} holds the beginning of a run with other settings or another source ({shown}). Run with those again "
        "to go on with it, or throw it away with restart=True (--restart)."
    )


def shortened(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


@contextmanager
def readable_disk_errors(place: Path) -> Iterator[None]:
    """Turn errors of the file system into a sentence that says what happened and how to go on."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        file = error.filename or place
        kept = f" What was written is in {place}: run the same again to go on, or remove it." if place.exists() else ""
        what = "There is no room left to write" if error.errno in NO_SPACE else f"{error.strerror}:"
        raise CheckpointError(f"{what} {file}.{kept}") from error


def described(path: Path) -> dict:
    status = path.stat()
    return {"name": path.name, "size": status.st_size, "changed": status.st_mtime_ns}


def linked(source: Path, target: Path) -> bool:
    """Make `target` share the bytes of `source`: as a copy-on-write clone where the file system can, or a hard link."""
    source, new = source.resolve(), target.with_name(f"{target.name}.link")
    new.unlink(missing_ok=True)
    try:
        if not cloned(source, new):
            os.link(source, new)
        new.replace(target)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        return False
    return True


def cloned(source: Path, target: Path) -> bool:
    """Whether `target` could be made as a clone of `source` that shares its blocks (btrfs, XFS, …)."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    with open(source, "rb") as old, open(target, "wb") as new:
        try:
            fcntl.ioctl(new.fileno(), FICLONE, old.fileno())
            return True
        except OSError:
            pass
    target.unlink()
    return False


def sha256_of(path: Path, progress: Progress = lambda size: None) -> str:
    """Hex digest of a file, read in blocks."""
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
    with open(path, "rb", buffering=0) as stream:
        while size := stream.readinto(block):
            digest.update(block[:size])
            progress(size)
    return digest.hexdigest()


def write_parts(target: Path, parts: list[CopiedBytes | MadeBytes], progress: Progress) -> str:
    """Write a file, or what is missing of it; returns the sha256 of the whole."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(BLOCK_BYTES))
    pending: deque[Future] = deque()

    def update(start: int, size: int) -> None:
        for first in range(start, start + size, BLOCK_BYTES):
            view = block[: min(BLOCK_BYTES, start + size - first)]
            read_into(target, first, view)
            digest.update(view)
            progress(len(view))

    with open_to_write(target) as stream, ThreadPoolExecutor(1) as hasher:
        position = stream.seek(0, os.SEEK_END)
        if position > sum(part.size for part in parts):
            position = stream.truncate(0)
        pending.append(hasher.submit(update, 0, position))
        for part, start, size in missing_blocks(parts, position):
            write_block(stream.fileno(), position, part, start, size)
            pending.append(hasher.submit(update, position, size))
            position += size
            while len(pending) > BLOCKS_AHEAD:
                pending.popleft().result()
        for future in pending:
            future.result()
    return digest.hexdigest()


def open_to_write(path: Path) -> io.FileIO:
    """A file to go on with, made if it is not there."""
    return open(path, "r+b", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))


def missing_blocks(
    parts: list[CopiedBytes | MadeBytes], done: int
) -> Iterator[tuple[CopiedBytes | MadeBytes, int, int]]:
    """(part, first byte in it, number of bytes) of all that comes after the first `done` bytes of the parts."""
    for part in parts:
        start = min(done, part.size)
        done -= start
        while start < part.size:
            size = min(part.block_size - start % part.block_size, part.size - start)
            yield part, start, size
            start += size


def write_block(target: int, position: int, part: CopiedBytes | MadeBytes, start: int, size: int) -> None:
    """Bytes `start` to `start + size` of a part, which lie in one of its blocks, to a place in an open file."""
    if isinstance(part, MadeBytes):
        first = start % part.block_size
        write_all(target, position, part.make(start // part.block_size)[first : first + size])
    else:
        copy_bytes(part.file, part.start + start, target, position, size)


def write_all(target: int, position: int, view: memoryview) -> None:
    while view:
        count = os.pwrite(target, view, position)
        view, position = view[count:], position + count


def copy_bytes(source: Path, start: int, target: int, position: int, size: int) -> None:
    """Copy a range of a file into an open one, in the kernel where it can."""
    with open(source, "rb", buffering=0) as stream:
        while size:
            try:
                count = os.copy_file_range(stream.fileno(), target, size, start, position)
            except (AttributeError, OSError) as error:
                if getattr(error, "errno", errno.ENOSYS) not in NOT_IN_KERNEL:
                    raise
                block = memoryview(bytearray(size))
                read_into(source, start, block)
                return write_all(target, position, block)
            if not count:
                raise CheckpointError(f"{source} ends too early; it was cut off or changed while it was read.")
            start, position, size = start + count, position + count, size - count
