"""The comparison of starts: it runs, does not repeat what it has, and its table says what the runs say."""

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

from vwn_hf.data import write_standard_library_corpus

SCRIPT = Path(__file__).parent.parent / "recipes" / "starting_points" / "run.py"


@pytest.fixture
def run(monkeypatch):
    spec = importlib.util.spec_from_file_location("starting_points", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "starting_points", module)
    spec.loader.exec_module(module)
    return module


def shrink(recipes: Path, folder: Path) -> None:
    """Copies of the recipes that take seconds."""
    for stage in ("pretrain", "train"):
        content = yaml.safe_load((recipes / stage / "config.yaml").read_text())
        if "config" in content:
            content["config"] |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        content["data"]["sequence_length"] = 32
        content["data"]["evaluation"]["split"] = "train[:1]"
        content["training"] |= {"max_steps": 3, "eval_strategy": "no", "use_cpu": True}
        (folder / stage).mkdir(parents=True)
        (folder / stage / "config.yaml").write_text(yaml.safe_dump(content))


def test_it_runs_and_a_result_on_disk_is_not_made_again(run, tmp_path, monkeypatch, capsys):
    shrink(SCRIPT.parent, tmp_path / "recipes")
    out = tmp_path / "out"
    write_standard_library_corpus(out / "corpus", vocab_size=300, megabytes=0.6)
    rows = [
        run.Row("annealed", 1e-3),
        run.Row("annealed", 1e-3, "scaled_copies", added_rate=0.5),
        run.Row("constant", 1e-3),
        run.Row("constant", 1e-3, "noise"),
    ]
    monkeypatch.setattr(run, "RECIPES", tmp_path / "recipes")
    monkeypatch.setattr(run, "ROWS", rows)
    monkeypatch.setattr(run, "CONSTANT_STEPS", 3)
    monkeypatch.setattr(sys, "argv", ["run.py", "--seeds", "0", "1", "--out", str(out)])
    run.main()
    results = {row: [run.continue_training(out, row, seed) for seed in (0, 1)] for row in rows}
    losses = [result["loss"] for runs in results.values() for result in runs]
    assert len(set(losses)) == len(losses)
    recipe = yaml.safe_load((out / "seed-1" / rows[1].name / "recipe.yaml").read_text())
    assert recipe["added"] == {"learning_rate": 0.5} and recipe["data"]["train"]["split"] == "train[60%:70%]"
    table = (out / "table.md").read_text()
    assert table.count("From the ") == 2 and table.count("\n|") == 2 * 2 + len(rows)
    monkeypatch.setattr(run, "train", None)
    run.main()
    assert (out / "table.md").read_text() == table


def test_the_table_gives_spread_and_paired_differences(run):
    def runs(*losses):
        return [{"loss": loss, "seconds": 60.0, "parameters": 1000} for loss in losses]

    plain, better = run.Row("annealed", 1e-3), run.Row("annealed", 2e-3)
    start = run.Row("annealed", 1e-3, "noise", added_rate=1e-2)
    lines = run.table({plain: runs(3, 4, 5), better: runs(2, 3, 4), start: runs(2.1, 3.2, 4.3)}).splitlines()[2:]
    assert lines[0].endswith("| 4.0000 ± 1.0000 | — | +1.0000 ± 0.0000 | 60 s |")
    assert lines[1] == "| plain backbone | — | 0.002 | — | 1,000 | 3.0000 ± 1.0000 | — | — | 60 s |"
    # differences 0.1, 0.2, 0.3: mean 0.2, sample deviation 0.1, over the root of 3
    difference = "-0.8000 ± 0.0577 | +0.2000 ± 0.0577"
    assert lines[2] == f"| noise | 2 | 0.001 | 0.01 | 1,000 | 3.2000 ± 1.1000 | {difference} | 60 s |"
