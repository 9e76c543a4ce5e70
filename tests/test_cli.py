"""The command line, run as a user would."""

import json
import subprocess
import sys

import pytest
from conftest import tiny_model
from typer.testing import CliRunner

from vwn_hf.cli import app


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def source(tmp_path):
    tiny_model("olmoe").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_upcycle_prints_its_check(source, tmp_path):
    result = run("upcycle", source, tmp_path / "vwn", "--segments", 2, "--slots", 3)
    assert result.exit_code == 0, result.output
    assert "m=2, n=3, state 1.5 times as wide" in result.output and "equal the source's bit for bit" in result.output
    assert json.loads((tmp_path / "vwn" / "upcycling_report.json").read_text())["logits_equal"] is True


def test_upcycle_takes_a_carry_a_preset_and_a_rank(source, tmp_path):
    options = ["--preset", "hyper_connections", "--slots", 3, "--carry", "doubly_stochastic", "--embedding-rank", 50]
    result = run("upcycle", source, tmp_path / "vwn", "--no-group-norm", *options)
    assert result.exit_code == 0, result.output
    assert "m=1, n=3" in result.output and "bit for bit" in result.output
    assert "projected embedding of rank 50, doubly_stochastic carry" in result.output
    config = json.loads((tmp_path / "vwn" / "config.json").read_text())
    expected = {"vwn_segments": 1, "vwn_carry": "doubly_stochastic", "vwn_embedding_rank": 50}
    assert {key: config[key] for key in expected} == expected and "vwn_preset" not in config
    result = run("upcycle", source, tmp_path / "other", "--embedding-rank", 47)
    assert result.exit_code == 1 and "embedding_rank=47 is less than hidden_size=48" in result.output


def test_upcycle_takes_its_settings_from_a_recipe_and_options_win(source, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"source: {source}\noutput: {tmp_path / 'vwn'}\nsegments: 2\nslots: 6\ngroup_norm: false\n")
    result = run("upcycle", "--recipe", recipe, "--slots", 4)
    assert result.exit_code == 0 and "m=2, n=4" in result.output and "bit for bit" in result.output, result.output
    recipe.write_text("slot: 3\n")
    result = run("upcycle", "--recipe", recipe, source, tmp_path / "other")
    assert result.exit_code == 2 and "did you mean slots" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["upcycle", "nowhere/at/all", "out"], "neither a folder nor a Hub id"),
        (["train", "none.yaml"], "There is no recipe none.yaml"),
    ],
)
def test_errors_are_one_line_and_a_status(arguments, message, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "vwn_hf.cli", *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 1
    assert message in result.stderr and "Traceback" not in result.stderr


def test_upcycle_refuses_bad_settings_in_one_line(source, tmp_path):
    result = run("upcycle", source, tmp_path / "vwn", "--segments", 5)
    assert result.exit_code == 1 and "segments=5 does not divide hidden_size=48" in result.output
    assert not (tmp_path / "vwn").exists()


def test_a_missing_folder_is_named(tmp_path):
    for command in (["cost", tmp_path / "gone"], ["upcycle", tmp_path / "gone", tmp_path / "vwn"]):
        result = run(*command)
        assert result.exit_code == 1 and f"{tmp_path / 'gone'} is neither a folder nor a Hub id" in result.output


def test_help_names_every_command():
    output = run("--help").output
    for command in ("upcycle", "train", "evaluate", "cost", "families", "corpus", "demo"):
        assert command in output


def test_the_demo_does_not_replace_a_folder_that_is_not_its_own(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    result = run("demo", "--output", tmp_path)
    assert result.exit_code == 1 and "not an earlier demo" in result.output
    assert (tmp_path / "thesis.txt").exists()
