"""lm-eval's tasks, loaded and tried before any model is: which run, which do not, and why."""

import os
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

TASKS = Path(__file__).parent / "lm_eval_tasks"
COLLECTIONS = {"A": "vwn_collection_a", "B": "vwn_collection_b"}
SEED = 1234  # of few-shot examples; lm-eval's own


@dataclass
class LoadedTasks:
    """Tasks and groups that run; why others do not; of a collection: name and main metric of each benchmark.

    `left_out` has, of each group that runs in part, the members that do not.
    """

    built: list = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    benchmarks: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Conditions:
    """What tasks must fit: see `vwn_hf.evaluation.EvaluationRecipe`; `context` is the models' shortest, in tokens."""

    num_fewshot: int | None
    limit: int | None
    max_gen_toks: int | None
    run_unsafe_code: bool
    context: int
    processes: int


def load_tasks(
    names: list[str], collection: str | None, include_path: str | None, conditions: Conditions
) -> LoadedTasks:
    """Load tasks by name and those of a collection of the paper.

    Raises:
        ValueError: lm-eval does not know a task; one that was asked for by name cannot run; nothing is left to run.
    """
    from lm_eval.tasks import TaskManager

    if conditions.run_unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the code_eval metric asks for it, too
    manager = TaskManager(include_path=[str(TASKS), *([include_path] if include_path else [])])
    loaded, failures = LoadedTasks(), keep_failures(manager, lambda task: prepare(task, conditions))
    for name in known_names(manager, names):
        loaded.built += load_group(manager, name, failures, loaded.left_out)
    if failures:
        raise ValueError(f"Nothing was run. {summary(failures)}")
    if collection:
        benchmarks = load_group(manager, COLLECTIONS[collection], failures, loaded.left_out, members=True)
        metadata = collection_metadata(collection)
        loaded.built += benchmarks
        loaded.benchmarks = metadata["benchmarks"]
        loaded.not_run = failures | metadata.get("missing", {})
    if not loaded.built:
        raise ValueError(f"Nothing of collection {collection} can run. {summary(loaded.not_run)}")
    manager.load(loaded.built)  # refuses a task that is there twice
    return loaded


def known_names(manager, patterns: list[str]) -> list[str]:
    """Names of lm-eval's tasks, groups and tags; patterns may hold * and ?."""
    names = []
    for pattern in patterns:
        matches = manager.match_tasks([pattern])
        if not matches:
            raise ValueError(
                f"lm-eval knows no task {pattern!r}; `vwn-hf lm-eval ls tasks` lists them, include_path adds some."
            )
        names += [name for name in matches if name not in names]
    return names


def keep_failures(manager, prepare: Callable) -> dict[str, str]:
    """Have a task manager put an empty group in place of each task that fails, and note the reason here.

    lm-eval builds a group whole or not at all, and offers no way in: `TaskFactory._build_task` is private to it.
    """
    from lm_eval.api.group import Group

    failures, build = {}, manager._factory._build_task

    def build_or_note(entry, overrides):
        try:
            task = build(entry, overrides)
            prepare(task)
            return task
        except Exception as error:  # tasks run code of their own when they are built
            failures[entry.name] = reason(error)
            return Group(name=entry.name)

    manager._factory._build_task = build_or_note
    return failures


def load_group(manager, name: str, failures: dict, left_out: dict, members: bool = False) -> list:
    """What one name stands for, without what failed: a group or its members, a task, or a tag's tasks."""
    loaded = manager.load([name])
    group = loaded["groups"].get(name)
    if group is None or name in failures:
        return list(loaded["tasks"].values())
    names = remove_empty_groups(group, failures, left_out)
    if members:
        return list(group)
    if not len(group):
        fail_as_one(group.name, names, failures)
    return [group] * bool(len(group))


def remove_empty_groups(group, failures: dict[str, str], left_out: dict[str, list[str]]) -> list[str]:
    """Take out tasks that failed, and groups that lose all of theirs; returns the names of all that were there."""
    from lm_eval.api.group import Group

    names = group.child_names
    for child in [child for child in group if isinstance(child, Group)]:
        members = remove_empty_groups(child, failures, left_out)
        if not len(child):
            group.pop(child.name)
            fail_as_one(child.name, members, failures)
    left_out[group.name] = [name for name in names if name not in group]
    return names


def fail_as_one(group: str, members: list[str], failures: dict[str, str]) -> None:
    """Put one failure, for the first one's reason, in the place of those of all of a group's members."""
    reasons = [failures.pop(name) for name in members]
    if reasons:
        failures[group] = reasons[0]


def prepare(task, conditions: Conditions) -> None:
    """Set what lm-eval would set later, and build the first item's requests, so that what fails, fails now.

    Raises:
        ValueError: the task needs what is not allowed, or does not fit the models or the number of processes.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    if getattr(task, "UNSAFE_CODE", False) and not conditions.run_unsafe_code:
        raise ValueError("it runs code that the model writes; --confirm-run-unsafe-code allows that")
    if getattr(task, "MULTIMODAL", False):
        raise ValueError("it needs images or sound")
    if conditions.num_fewshot is not None and task.get_config("num_fewshot") != 0:  # lm-eval's rule for its option
        task.set_config("num_fewshot", conditions.num_fewshot)
    shots, examples = task.get_config("num_fewshot") or 0, getattr(getattr(task, "sampler", None), "df", None)
    if examples is not None and shots > len(examples):
        raise ValueError(f"{shots} examples were asked for (num_fewshot), and its data has {len(examples)}")
    if task.OUTPUT_TYPE == "generate_until":
        length = normalize_gen_kwargs(task.config.generation_kwargs, 256)["max_gen_toks"]  # HFLM.max_gen_toks
        if length > (conditions.max_gen_toks or length):
            length = conditions.max_gen_toks
            task.set_config("generation_kwargs", {"max_gen_toks": length}, update=True)
        if length >= conditions.context:
            raise ValueError(
                f"it generates up to {length} tokens, and the models' context is {conditions.context}: cap it with "
                f"--max-gen-toks (say {conditions.context // 4})"
            )
    items = min(len(task.eval_docs), conditions.limit or len(task.eval_docs))
    if items < conditions.processes:
        raise ValueError(f"{items} items cannot be split over {conditions.processes} processes")
    task.set_fewshot_seed(SEED)
    with redirect_stderr(StringIO()):  # a progress bar for one item
        task.build_all_requests(limit=1)
    if conditions.processes > 1:
        build_the_same_on_every_process(task)


def build_the_same_on_every_process(task) -> None:
    """Give an item the few-shot examples that it has in one process: lm-eval draws them for a process's own items."""
    build = task.build_all_requests

    def build_all_requests(rank: int = 0, world_size: int = 1, **settings) -> None:
        build(rank=0, world_size=1, **settings)
        task._instances = [instance for instance in task.instances if instance.doc_id % world_size == rank]

    task.build_all_requests = build_all_requests


def collection_metadata(collection: str) -> dict:
    import yaml

    return yaml.safe_load((TASKS / f"{COLLECTIONS[collection]}.yaml").read_text())["metadata"]


def reason(error: Exception) -> str:
    """Why a task cannot run, in one line, with the remedy."""
    text = " ".join(str(error).split())[:400].rstrip(". ") or type(error).__name__
    if "HF_ALLOW_CODE_EVAL" in str(error):  # the metric is there
        return "it runs code that the model writes; --confirm-run-unsafe-code allows that"
    if "code_eval" in text:
        return (
            "it runs code that the model writes: give --confirm-run-unsafe-code, and go online, or put the metric into "
            f"the working directory as code_eval/code_eval.py ({text})"
        )
    if isinstance(error, ConnectionError | OSError):
        return f"{text}; put its data into a folder of that name in the working directory, or go online"
    return text


def summary(failures: dict[str, str]) -> str:
    shown = [f"{name}: {text}." for name, text in list(failures.items())[:5]]
    return " ".join(shown) + f" … and {len(failures) - 5} more." * (len(failures) > 5)
