"""What the README shows works as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import vwn_hf
from vwn_hf.backbones import BACKBONES
from vwn_hf.cli import app
from vwn_hf.configuration_vwn import VwnConfigMixin

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text()


def test_python_snippets_run(tmp_path):
    snippets = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    output = ""
    for snippet in snippets:
        result = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        output += result.stdout
    assert "bit for bit" in output and "MtpAcceptance" in output


def test_tables_name_every_family_and_every_field():
    for backbone in BACKBONES.values():
        assert f"`Vwn{backbone.prefix}Config`" in TEXT and hasattr(vwn_hf, f"Vwn{backbone.prefix}Config")
    assert re.findall(r"^\| `(vwn_\w+|num_mtp_layers|mtp_\w+)`", TEXT, re.MULTILINE) == list(
        VwnConfigMixin.__dataclass_fields__
    )


def test_the_tree_and_the_commands_are_those_of_the_package():
    tree = re.search(r"^vwn_hf/\n(.*?)^recipes/", TEXT, re.DOTALL | re.MULTILINE).group(1)
    files = {path.name for path in (README.parent / "vwn_hf").glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"^  (\w+\.py)", tree, re.MULTILINE)) == files
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(re.search(r"cli\.py +vwn-hf (.*)", tree).group(1).split(" | ")) == commands
