"""lm-eval on VWN checkpoints, which it loads because importing this package registered them."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field
from rich.table import Column, Table


class EvaluationRecipe(BaseModel):
    """What `vwn-hf evaluate` runs."""

    model_config = ConfigDict(extra="forbid")

    checkpoints: list[str] = Field(min_length=1, description="local folders or Hub ids, measured side by side")
    tasks: list[str] = Field(min_length=1, description="names of lm-eval tasks or groups")
    include_path: str | None = Field(None, description="folder with more task files")
    limit: int | None = Field(None, gt=0, description="items per task")
    batch_size: int | str = 8
    num_fewshot: int | None = None
    output: str | None = Field(None, description="JSON file for the results")


def evaluate(recipe: EvaluationRecipe) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure checkpoints with lm-eval.

    Returns:
        {checkpoint: {task: {metric: value}}}, metrics by lm-eval's names ("acc,none", "acc_stderr,none", …).
    Raises:
        ImportError: lm-eval is not installed. ValueError: lm-eval does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"{error}. Evaluation needs lm-eval: pip install 'vwn-hf[eval]'") from error

    manager = TaskManager(include_path=recipe.include_path)
    unknown = [task for task in recipe.tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"lm-eval knows no task {unknown[0]!r}; `lm-eval ls tasks` lists them, include_path adds some."
        )
    results = {}
    for checkpoint in recipe.checkpoints:
        outcome = simple_evaluate(
            model="hf",
            model_args={"pretrained": checkpoint, "backend": "causal"},
            tasks=recipe.tasks,
            num_fewshot=recipe.num_fewshot,
            batch_size=recipe.batch_size,
            device="cuda" if torch.cuda.is_available() else "cpu",  # lm-eval's default is cuda, there or not
            limit=recipe.limit,
            task_manager=manager,
            log_samples=False,
        )
        results[checkpoint] = {task: dict(scores) for task, scores in outcome["results"].items()}
    if recipe.output:
        Path(recipe.output).parent.mkdir(parents=True, exist_ok=True)
        Path(recipe.output).write_text(json.dumps(results, indent=2, default=str) + "\n")
    return results


def results_table(results: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """A row for each task and metric, a column for each checkpoint, with standard errors."""
    table = Table("task", "metric", *(Column(checkpoint, overflow="fold") for checkpoint in results))
    tasks = next(iter(results.values()))
    for task, scores in tasks.items():
        for metric, value in scores.items():
            if isinstance(value, int | float) and "," in metric and "_stderr" not in metric:
                error = metric.replace(",", "_stderr,")
                cells = [(r[task][metric], r[task].get(error)) for r in results.values()]
                table.add_row(task, metric.split(",")[0], *(format_score(*cell) for cell in cells))
    return table


def format_score(value: float, error: float | str | None) -> str:
    return f"{value:.4f} ± {error:.4f}" if isinstance(error, float) else f"{value:.4f}"


def write_continuation_task(
    texts: list[str], folder: Path, name: str, items: int, context: int = 400, ending: int = 60, seed: int = 0
) -> Path:
    """Write an lm-eval task: choose the true continuation of a passage among four from the same documents.

    Args:
        texts: documents; each item takes a passage from one and wrong endings from three others.
        context, ending: lengths in characters.
    Returns:
        the folder, for `include_path`. Random choice scores 0.25.
    """
    documents = [text for text in texts if len(text) > 2 * (context + ending)]
    if len(documents) < 4:
        raise ValueError(f"A task needs at least 4 documents longer than {2 * (context + ending)} characters.")
    rng = random.Random(seed)

    def passage(text: str) -> tuple[str, str]:
        start = rng.randrange(len(text) - context - ending)
        return text[start : start + context], text[start + context : start + context + ending]

    lines = []
    for _ in range(items):
        document, *others = rng.sample(documents, 4)
        beginning, truth = passage(document)
        choices = [truth, *(passage(other)[1] for other in others)]
        rng.shuffle(choices)
        lines.append(json.dumps({"context": beginning, "choices": choices, "label": choices.index(truth)}))
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(lines) + "\n")
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": metrics,
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    return folder
