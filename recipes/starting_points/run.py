"""Which start of the extra slots helps an upcycled model learn on? Small MoE models, real text, several seeds.

    python recipes/starting_points/run.py --seeds 0 1 2 --out runs/starting_points

Per seed: pretrain a small OLMoE, then train it on in each way of `ROWS`, on the same tokens in the same order. What
has its result on disk is not run again. One thread; the table is printed and written to OUT/table.md.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from vwn_hf.data import write_standard_library_corpus
from vwn_hf.training import TrainingRecipe, read_recipe, train
from vwn_hf.upcycling import upcycle

RECIPES = Path(__file__).parent
RATE = 1e-3


@dataclass(frozen=True)
class Row:
    """One way to train on. `start` None is the plain backbone; `added_rate` None is `rate`."""

    start: str | None = None
    rate: float = RATE
    added_rate: float | None = None
    slots: int = 8
    group_norm: bool = True

    @property
    def name(self) -> str:
        norm = "norm" if self.group_norm else "no_norm"
        return f"{self.start or 'plain'}-n{self.slots}-{norm}-rate{self.rate:g}-added{self.added_rate or self.rate:g}"


STARTS = ("noise", "copies", "scaled_copies", "zeros")
PLAIN = [Row(rate=rate) for rate in (RATE / 2, RATE, 2 * RATE)]
ROWS = [*PLAIN, *(Row(start) for start in STARTS), *(Row(start, added_rate=10 * RATE) for start in STARTS)]


def make_corpus(out: Path) -> None:
    if not (out / "corpus" / "tokenizer").exists():
        write_standard_library_corpus(out / "corpus", vocab_size=1024, megabytes=100.0)


def run_recipe(stage: str, out: Path, folder: Path, seed: int, *overrides: str) -> dict:
    corpus = [f"data.{part}.data_files={out}/corpus/{name}.jsonl" for part, name in
              (("train", "train"), ("evaluation", "heldout"))]  # fmt: skip
    shared = [*corpus, f"training.output_dir={folder}", f"training.seed={seed}", *overrides]
    return train(read_recipe(RECIPES / stage / "config.yaml", shared, TrainingRecipe))


def pretrain(out: Path, seed: int) -> Path:
    folder = out / f"seed-{seed}" / "base"
    if not (folder / "recipe.yaml").exists():  # the last file that `train` writes
        run_recipe("pretrain", out, folder, seed, f"tokenizer={out}/corpus/tokenizer")
    return folder


def upcycled(base: Path, row: Row, seed: int) -> Path:
    folder = base.parent / f"upcycled-{row.start}-{row.slots}-{row.group_norm}"
    if not folder.exists():
        upcycle(base, folder, slots=row.slots, group_norm=row.group_norm, slot_start=row.start, seed=seed)
    return folder


def continue_training(out: Path, row: Row, seed: int) -> dict:
    """Train on as `row` says, on a tenth of the text that no pretraining saw, another one for each seed."""
    folder = out / f"seed-{seed}" / row.name
    path = folder / "result.json"
    if path.exists():
        return json.loads(path.read_text())
    base = pretrain(out, seed)
    source = upcycled(base, row, seed) if row.start else base
    tenth = 50 + 10 * (seed % 5)
    overrides = [
        f"model={source}",
        f"data.train.split=train[{tenth}%:{tenth + 10}%]",
        f"training.learning_rate={row.rate}",
    ]
    if row.added_rate is not None:
        overrides.append(f"added.learning_rate={row.added_rate}")
    begin = time.process_time()  # not wall time: other processes do not count
    metrics = run_recipe("train", out, folder, seed, *overrides)
    seconds = time.process_time() - begin
    parameters = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    result = {"loss": metrics["eval_loss"], "seconds": seconds, "parameters": parameters}
    path.write_text(json.dumps(result) + "\n")
    return result


def loss_before(out: Path, seed: int) -> float:
    history = json.loads((out / f"seed-{seed}" / "base" / "trainer_state.json").read_text())["log_history"]
    return [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1]


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def table(results: dict[Row, list[dict]]) -> str:
    """Markdown; differences are to the plain backbone at its best rate, seed by seed."""
    losses = {row: [run["loss"] for run in runs] for row, runs in results.items()}
    baseline = min((row for row in losses if row.start is None), key=lambda row: statistics.mean(losses[row]))
    columns = ["start", "r", "group norm", "rate", "rate of the added", "parameters", "held-out loss"]
    columns += ["against plain at its best", "CPU time"]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row, values in losses.items():
        paired = [value - plain for value, plain in zip(values, losses[baseline], strict=True)]
        error = spread(paired) / len(paired) ** 0.5
        difference = "—" if row == baseline else f"{statistics.mean(paired):+.4f} ± {error:.4f}"
        cells = [
            row.start or "plain backbone", f"{row.slots / 4:g}" if row.start else "—",
            ("yes" if row.group_norm else "no") if row.start else "—", f"{row.rate:g}",
            f"{row.added_rate or row.rate:g}" if row.start else "—", f"{results[row][0]['parameters']:,}",
            f"{statistics.mean(values):.4f} ± {spread(values):.4f}", difference,
            f"{statistics.median(run['seconds'] for run in results[row]):.0f} s",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/starting_points"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    make_corpus(options.out)
    for seed in options.seeds:
        pretrain(options.out, seed)
        print(f"seed {seed}: held-out loss before {loss_before(options.out, seed):.4f}", flush=True)
    results = {}
    for row in ROWS:
        results[row] = [continue_training(options.out, row, seed) for seed in options.seeds]
        print(row.name, [f"{run['loss']:.4f}" for run in results[row]], flush=True)
    (options.out / "table.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
