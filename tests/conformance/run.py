"""Run transformers' own model tests over VWN classes: `make conformance`, or run.py with arguments for pytest.

The tests are those of the installed release: pip downloads its source distribution into .cache/conformance, once.
Prints a table of outcomes per tester, why tests were skipped, and every override with its reason.
"""

import importlib
import inspect
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import transformers
from rich.console import Console
from rich.table import Column, Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache" / "conformance"
OUTCOMES = ("passed", "failed", "skipped")


def fetch_tests() -> Path:
    """The folder that holds `tests/` of the installed transformers release."""
    release = f"transformers-{transformers.__version__}"
    folder = CACHE / release
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as partial:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "transformers"]
            subprocess.run([*command, "--dest", partial, f"transformers=={transformers.__version__}"], check=True)
            with tarfile.open(Path(partial, f"{release}.tar.gz")) as archive:
                members = [member for member in archive if member.name.startswith(f"{release}/tests/")]
                archive.extractall(partial, members=members, filter="data")
            shutil.move(Path(partial, release), folder)
    return folder


class Tally:
    """A pytest plugin that keeps each test's outcome, and the reasons of skips."""

    def __init__(self):
        self.outcomes, self.reasons = {}, {}

    def pytest_runtest_logreport(self, report):
        if report.outcome != "passed" or report.nodeid not in self.outcomes:
            self.outcomes[report.nodeid] = report.outcome
        if report.skipped:
            self.reasons[report.nodeid] = report.longrepr[2].removeprefix("Skipped: ")

    def print(self, console: Console) -> None:
        table = Table("tester", *OUTCOMES, title=f"transformers {transformers.__version__}, its own tests")
        counts = Counter((nodeid.split("::")[1], outcome) for nodeid, outcome in self.outcomes.items())
        for tester in sorted({tester for tester, _ in counts}):
            table.add_row(tester, *(str(counts[tester, outcome]) for outcome in OUTCOMES))
        console.print(table)
        skips = Table("skipped", "because", title="Skips")
        for reason, count in Counter(self.reasons.values()).most_common():
            skips.add_row(str(count), reason)
        console.print(skips)


def print_overrides(console: Console) -> None:
    """Raises RuntimeError for an override without a reason, or of a test that upstream no longer has."""
    testers = importlib.import_module("vwn_models")
    table = Table(
        Column("override", no_wrap=True), "reason", title="Upstream tests not run as they stand", show_lines=True
    )
    for name, method in vars(testers.VwnOverrides).items():
        if inspect.isfunction(method):
            if not method.__doc__ or not hasattr(testers.ModelTesterMixin, name):
                raise RuntimeError(
                    f"{name} has no docstring that says why, or overrides nothing: correct or remove it."
                )
            table.add_row(name, " ".join(method.__doc__.split()))
    console.print(table)


def main() -> int:
    paths = [str(fetch_tests()), str(ROOT)]
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.path += paths
    os.chdir(ROOT)
    tally, console = Tally(), Console()
    # addopts of pyproject.toml forbid upstream's markers, and upstream's tests warn a lot
    options = ["-n", "2", "-q", "--tb=short", "-o", "addopts=", "-W", "ignore", "-p", "no:cacheprovider"]
    options += ["-o", "verbosity_subtests=0"]
    code = pytest.main([*options, *sys.argv[1:], str(HERE / "vwn_models.py")], plugins=[tally])
    tally.print(console)
    print_overrides(console)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
