"""A recipe in, a trained checkpoint out: strict YAML → datasets → packed blocks → transformers' Trainer."""

import difflib
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.distributed import DistributedConfig
from transformers.trainer_utils import get_last_checkpoint

from .adapters import LoraSettings, add_adapter, freeze_backbone
from .backbones import BACKBONES
from .data import TrainingData
from .modeling_vwn import added_parameters
from .monitoring import ConnectionHealth, connections
from .multi_token_prediction import IGNORED, next_token_labels
from .packing import ResumableStream
from .sharding import ShardedTrainerMixin, built_whole, check_processes, shard
from .sources import RECIPE_NAME, copy_history
from .stopping import GuardedTrainerMixin, StopOnSignal, finished_state, last_complete_checkpoint


class RecipeError(ValueError):
    """A recipe that cannot be run; says which key, why, and what would do."""


class AddedParameters(BaseModel):
    """How to train what VWN added, where it is to differ from `training`."""

    model_config = ConfigDict(extra="forbid")

    learning_rate: float | None = Field(None, ge=0, allow_inf_nan=False, description="peak; default: training's")
    weight_decay: float | None = Field(None, ge=0, allow_inf_nan=False, description="default: training's")
    warmup_steps: int = Field(0, ge=0, description="linear, on top of training's schedule")


class BackboneParameters(BaseModel):
    """How to train what the backbone brought, where it is to differ from `training`."""

    model_config = ConfigDict(extra="forbid")

    freeze_steps: int = Field(0, ge=0, description="steps at the start in which only what VWN added is trained")
    warmup_steps: int = Field(0, ge=0, description="linear, after those steps, on top of training's schedule")


class Distillation(BaseModel):
    """Learn a teacher's next-token probabilities beside the text: the source of an upcycled model, for example.

        loss = the model's loss + weight · temperature² · mean over targets of KL(teacher || model)

    Both distributions are softmax(logits / temperature). The model's vocabulary must be the teacher's.
    """

    model_config = ConfigDict(extra="forbid")

    teacher: str = Field(description="checkpoint, local folder or Hub id")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)


class TrainingRecipe(BaseModel):
    """What `vwn-hf train` reads: a `model` to train on, or a `config` with a model_type to start from scratch with."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = Field(None, description="checkpoint to train on, local folder or Hub id")
    config: dict[str, Any] | None = Field(
        None, description="config to start from scratch with; beside a model, fields of its config that change"
    )
    tokenizer: str | None = Field(None, description="tokenizer's folder or Hub id; default: that of `model`")
    data: TrainingData
    training: dict[str, Any] = Field(description="transformers' TrainingArguments, by their names")
    distributed: dict[str, Any] | None = Field(
        None, description="how processes share the model: transformers' DistributedConfig, by its names"
    )
    added: AddedParameters | None = Field(None, description="other settings for the parameters that VWN added")
    backbone: BackboneParameters | None = Field(None, description="other settings for all other parameters")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the weights; auto: as the checkpoint or the config says. Connections stay float32."
    )
    attn_implementation: str | None = Field(None, description="transformers' name of one; default: its own choice")
    train_only: Literal["added"] | None = Field(None, description="added: freeze all but what VWN added")
    lora: LoraSettings | None = Field(None, description="low-rank adapters in place of the backbone's parameters")
    distillation: Distillation | None = Field(None, description="learn a teacher's probabilities, too")

    def check(self) -> None:
        """Raise RecipeError for what the fields' types do not show."""
        if self.model is None and self.config is None:
            raise RecipeError("Give either model, a checkpoint to train on, or config, to start from scratch.")
        if self.model is None and "model_type" not in self.config:
            raise RecipeError("config has no model_type; for example olmoe or vwn_olmoe.")
        if self.model is not None and "model_type" in (self.config or {}):
            raise RecipeError(
                "Give either model, a checkpoint to train on, or config with a model_type, to start from scratch. "
                "Beside a model, config holds the fields that change, such as mtp_loss_weight."
            )
        if self.lora and (self.train_only or self.backbone):
            raise RecipeError(
                "lora freezes the backbone, with train_added it trains in full what VWN added: "
                "leave train_only and backbone out."
            )
        if self.train_only and self.backbone:
            raise RecipeError("backbone says how to train what train_only=added freezes; leave one of them out.")
        if self.model is None and self.tokenizer is None:
            raise RecipeError("config without tokenizer: say which tokenizer's ids the model is to learn.")
        known = [field.name for field in fields(TrainingArguments) if field.init]
        for key in self.training:
            if key not in known:
                raise RecipeError(unknown_key(f"training.{key}", key, known))
        known = [field.name for field in fields(DistributedConfig)]
        for key in self.distributed or {}:
            if key not in known:
                raise RecipeError(unknown_key(f"distributed.{key}", key, known))
        if "output_dir" not in self.training:
            raise RecipeError("training.output_dir is missing: where the checkpoint is to go.")
        if self.model and Path(self.model).resolve() == Path(self.training["output_dir"]).resolve():
            raise RecipeError(f"training.output_dir is the model's own folder, {self.model}; give another one.")
        if self.data.streaming and self.training.get("max_steps", -1) <= 0:
            raise RecipeError("training.max_steps is missing: streamed data has no end.")
        if self.data.streaming and self.training.get("dataloader_num_workers", 0) > 1:
            raise RecipeError("training.dataloader_num_workers: a stream is read by one process; take 0 or 1.")


Recipe = TypeVar("Recipe", bound=BaseModel)


def unknown_key(path: str, key: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else f". Known: {', '.join(sorted(known))}."
    return f"Unknown key {path}{hint}"


def read_recipe(path: str | Path, overrides: list[str], schema: type[Recipe]) -> Recipe:
    """Read a YAML recipe, apply `key=value` overrides (dotted keys, YAML values), and check it against its schema.

    Raises:
        RecipeError: naming the key, and for an unknown one the nearest known.
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no recipe {path}.")
    content = yaml.safe_load(Path(path).read_text())
    if not isinstance(content, dict):
        raise RecipeError(f"{path} is not a mapping of keys to values.")
    for override in overrides:
        apply_override(content, override)
    try:
        recipe = schema.model_validate(content)
    except ValidationError as error:
        raise RecipeError("\n".join(describe(problem, schema) for problem in error.errors())) from None
    if hasattr(recipe, "check"):
        recipe.check()
    return recipe


def apply_override(content: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{override!r} is not of the form key=value, for example training.max_steps=100.")
    *parents, last = key.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise RecipeError(f"{override!r}: {parent} has no keys below it.")
    content[last] = yaml.safe_load(value)


def describe(problem: dict, schema: type[BaseModel]) -> str:
    """One line for one of pydantic's errors."""
    location = [str(part) for part in problem["loc"] if not str(part).startswith("(")]  # no tags of unions
    path = ".".join(location)
    if problem["type"] == "value_error":
        return f"{path}: {problem['ctx']['error']}."
    if problem["type"] != "extra_forbidden":
        return f"{path}: {problem['msg']} (got {problem['input']!r})."
    for part in location[:-1]:
        if part in schema.model_fields:  # not a number in a list, nor a name in a mapping
            schema = model_within(schema.model_fields[part].annotation)
    return unknown_key(path, location[-1], list(schema.model_fields))


def model_within(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(model_within, getattr(annotation, "__args__", ()))), None)


class VwnTrainerMixin(ShardedTrainerMixin, GuardedTrainerMixin):
    """Put before a Trainer class of transformers or trl: trains the MTP modules and reports next-token losses.

    - Training takes the model's own loss, MTP included, also where the Trainer class would compute one outside of the
      model (trl's SFTTrainer), and logs the MTP losses beside it: `mtp_loss_1` is the next-2-token loss, and so on.
    - The router loss counts once, however many processes and micro-batches a step has.
    - Evaluation gives the next-token loss alone, without the router's auxiliary loss, and `eval_mtp_loss_1`, ….
    - Log entries have the seconds since training began, over all sessions of a run: `elapsed_seconds`.
    - The connections' health is logged where a `ConnectionHealth` is among the callbacks.
    - A loss or gradient that is not finite stops the run: `GuardedTrainerMixin`.
    - A model that several processes share is saved whole and resumes: `ShardedTrainerMixin`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._parts_in_training, self._parts_in_evaluation = LossSum(), LossSum()
        self._step_of_last_log: int | None = None
        self._resumed_from: str | None = None
        self._session_begin, self._seconds_before = None, None

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        self._resumed_from = resume_from_checkpoint or None
        self._session_begin, self._seconds_before = time.monotonic(), None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self):
        if isinstance(self.train_dataset, ResumableStream):
            folder = None if self.args.ignore_data_skip else self._resumed_from
            self.train_dataset.go_on_from(folder, self.get_total_train_batch_size(self.args))
        return super().get_train_dataloader()

    def _save_checkpoint(self, model, trial):
        if isinstance(self.train_dataset, ResumableStream) and self.is_world_process_zero():
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)  # first of all: the Trainer's state comes last
            self.train_dataset.save(folder, self.state.global_step, self.get_total_train_batch_size(self.args))
        super()._save_checkpoint(model, trial)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        losses = outputs.get("mtp_losses") if isinstance(outputs, dict) else None
        if losses is not None:
            parts = {f"mtp_loss_{depth}": loss for depth, loss in enumerate(losses, start=1)}
            self.keep_loss_parts(parts, model.training, num_items_in_batch)
        if model.training and num_items_in_batch is not None:
            loss = loss - self.surplus_router_loss(outputs)
        return (loss, outputs) if return_outputs else loss

    def surplus_router_loss(self, outputs) -> torch.Tensor | float:
        """What this batch's loss has of the router loss beyond its share in the mean over processes and micro-batches.

        The Trainer adds up the losses of all of them, which is right for sums over tokens divided by the number of
        all tokens, and makes of the router loss, a mean already, as many times itself (seen in transformers 5.23).
        """
        router_loss = outputs.get("aux_loss") if isinstance(outputs, dict) else None
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # of an adapter
        factor = getattr(model, router_loss_factor(model.config.model_type), None)
        if router_loss is None or factor is None:
            return 0.0
        processes = 1
        if self.args.average_tokens_across_devices:
            processes = self.accelerator.num_processes // self.get_tp_size()
        batches = processes * self.current_gradient_accumulation_steps
        return processes * factor * router_loss * (1 - 1 / batches)

    def keep_loss_parts(self, parts: dict[str, torch.Tensor], training: bool, num_items_in_batch) -> None:
        """Have parts of a batch's loss logged by their names, in the same measure as the loss itself."""
        if not training:
            return self._parts_in_evaluation.add(parts)
        scale = 1.0
        if num_items_in_batch is None:
            scale = 1 / self.current_gradient_accumulation_steps
        elif self.args.average_tokens_across_devices:
            scale = self.accelerator.num_processes  # they were divided by the items of all processes
        if self._step_of_last_log is None:
            self._step_of_last_log = self.state.global_step
        self._parts_in_training.add(parts, scale)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._parts_in_training:
            steps = self.state.global_step - self._step_of_last_log
            logs |= self._parts_in_training.take(self.accelerator, divisor=steps)
            self._step_of_last_log = self.state.global_step
        if "loss" in logs:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ConnectionHealth):
                    logs |= callback.take()
        if self._session_begin is not None:
            logs["elapsed_seconds"] = self.elapsed_seconds()
        super().log(logs, *args, **kwargs)

    def elapsed_seconds(self) -> float:
        """Since training began, evaluation and saving included; those of earlier sessions by the log that goes on."""
        if self._seconds_before is None:
            earlier = [entry["elapsed_seconds"] for entry in self.state.log_history if "elapsed_seconds" in entry]
            self._seconds_before = earlier[-1] if earlier else 0.0
        return round(self._seconds_before + time.monotonic() - self._session_begin, 3)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        config = self.accelerator.unwrap_model(self.model).config
        adds_router_loss = getattr(config, "output_router_logits", False)
        if adds_router_loss:
            config.output_router_logits = False
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            if adds_router_loss:
                config.output_router_logits = True
        if self._parts_in_evaluation:
            batches = self._parts_in_evaluation.count
            parts = self._parts_in_evaluation.take(self.accelerator, divisor=batches)
            output.metrics.update({f"{metric_key_prefix}_{name}": loss for name, loss in parts.items()})
        return output


def router_loss_factor(model_type: str) -> str:
    """Name that a family's causal language model, plain or VWN's, gives the factor of its router loss."""
    backbone = BACKBONES.get(model_type.removeprefix("vwn_"))
    return backbone.router_loss_factor if backbone else "router_aux_loss_coef"


class LossSum:
    """Sums of losses by their names; `count` is how often something was added, and 0 means nothing yet."""

    def __init__(self):
        self.totals: dict[str, torch.Tensor] = {}
        self.count = 0

    def __bool__(self) -> bool:
        return self.count > 0

    def add(self, losses: dict[str, torch.Tensor], scale: float = 1.0) -> None:
        for name, loss in losses.items():
            self.totals[name] = self.totals.get(name, 0.0) + scale * loss.detach().float()
        self.count += 1

    def take(self, accelerator, divisor: int) -> dict[str, float]:
        """Each sum over `divisor`, mean over processes. The sums begin anew."""
        means = accelerator.reduce(torch.stack([*self.totals.values()]), "mean") / divisor
        names = [*self.totals]
        self.__init__()
        return dict(zip(names, means.tolist(), strict=True))


class VwnTrainer(VwnTrainerMixin, Trainer):
    """transformers' Trainer for VWN models, with settings of their own for what VWN added and for the backbone.

    What transformers does not decay (biases and norms, by their names) is not decayed here either. The schedule
    scales each group from its own rate; the rate in the log is the backbone's. The frozen backbone's optimizer goes on
    collecting its moments, at a rate of 0, so that it is warm when the backbone is let go.

    Args:
        added: rate, decay and warm-up of the parameters that VWN added.
        backbone: for how long all others are frozen, and their warm-up after it.
        distillation: whose probabilities to learn beside the labels; `teacher` is that model, loaded.
    Raises:
        RecipeError: the model has no such parameters, the optimizer does not keep them in groups, or the schedule
            cannot scale groups by the step.
    """

    def __init__(
        self,
        *args,
        added: AddedParameters | None = None,
        backbone: BackboneParameters | None = None,
        distillation: Distillation | None = None,
        teacher: PreTrainedModel | None = None,
        **kwargs,
    ):
        self.added, self.backbone, self.distillation = added, backbone, distillation
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval() if distillation else None
        self._backbone_groups: int | None = None  # the optimizer's first groups; None: not separate

    def create_optimizer(self, model=None):
        exists = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if (self.added or self.backbone) and not exists:
            self._backbone_groups = len(optimizer.param_groups)
            self.separate_groups(optimizer, self.model if model is None else model)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        exists = self.lr_scheduler is not None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self._backbone_groups is not None and not exists:
            self.scale_groups(scheduler)
        return self.lr_scheduler

    def scale_groups(self, scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
        """Multiply each group's schedule by what `backbone` and `added` say of it."""
        backbone, added = self.backbone or BackboneParameters(), self.added or AddedParameters()
        factors = [partial(ramp, start=backbone.freeze_steps, steps=backbone.warmup_steps)] * self._backbone_groups
        factors += [partial(ramp, start=0, steps=added.warmup_steps)] * (
            len(scheduler.optimizer.param_groups) - len(factors)
        )
        if all(factor(step) == 1 for factor in factors for step in (0, 1)):
            return
        if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            raise RecipeError(
                f"training.lr_scheduler_type={self.args.lr_scheduler_type.value} sets rates from the losses, which "
                "freeze_steps and warmup_steps of added and backbone cannot scale; take cosine or constant_with_warmup."
            )
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = rate
        schedules = [partial(product, *pair) for pair in zip(scheduler.lr_lambdas, factors, strict=True)]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(scheduler.optimizer, schedules)

    def separate_groups(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
        """Move what VWN added out of the optimizer's groups, into one that is decayed and one that is not."""
        names = set(added_parameters(model))
        trained = {name: p for name, p in model.named_parameters() if name in names and p.requires_grad}
        if not trained:
            raise RecipeError("added, backbone: the model has no trainable parameters that VWN added; leave both out.")
        decayed_names, moved = set(self.get_decay_parameter_names(model)), 0
        for decayed in (True, False):
            chosen = {p for name, p in trained.items() if (name in decayed_names) == decayed}
            for group in list(optimizer.param_groups):
                mine = [p for p in group["params"] if p in chosen]
                if mine:
                    group["params"] = [p for p in group["params"] if p not in chosen]
                    optimizer.add_param_group({**group, "params": mine, **self.group_settings(decayed)})
                    moved += len(mine)
        if moved < len(trained):
            raise RecipeError(
                f"added, backbone: training.optim={self.args.optim.value} keeps no groups; take adamw_torch."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.distillation and model.training:
            part = self.teacher_loss(inputs, outputs["logits"], num_items_in_batch)
            self.keep_loss_parts({"distillation_loss": part}, True, num_items_in_batch)
            scale = 1
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                scale = self.accelerator.num_processes // self.get_tp_size()  # as the Trainer scales the loss itself
            loss = loss + scale * self.distillation.weight * part
        return (loss, outputs) if return_outputs else loss

    def teacher_loss(self, inputs: dict, logits: torch.Tensor, num_items_in_batch) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = self.teacher(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False).logits
        items = num_items_in_batch
        if items is None:
            items = (next_token_labels(inputs["labels"]) != IGNORED).sum().clamp(min=1)
        return distillation_loss(logits, teacher_logits, inputs["labels"], self.distillation.temperature, items)

    def group_settings(self, decayed: bool) -> dict[str, float]:
        if not self.added:
            return {}
        settings = {"lr": self.added.learning_rate, "weight_decay": self.added.weight_decay if decayed else 0.0}
        return {key: value for key, value in settings.items() if value is not None}


def ramp(step: int, start: int, steps: int) -> float:
    """0 before step `start`, then linear to 1 over `steps`, as a warm-up."""
    if step < start:
        return 0.0
    return min(1.0, (step - start) / steps) if steps else 1.0


def product(schedule: Callable[[int], float], factor: Callable[[int], float], step: int) -> float:
    return schedule(step) * factor(step)


def distillation_loss(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    items: torch.Tensor | int,
) -> torch.Tensor:
    """temperature² · sum over targets of KL(teacher || model) / items; logits [B, S, V], labels [B, S].

    Source: Hinton, Vinyals & Dean, arXiv:1503.02531, section 2.
    """
    counted = next_token_labels(labels) != IGNORED
    model, teacher = ((values[counted].float() / temperature).log_softmax(-1) for values in (logits, teacher_logits))
    return temperature**2 * F.kl_div(model, teacher, reduction="sum", log_target=True) / items


def train(recipe: TrainingRecipe, resume: bool = False, model: PreTrainedModel | None = None) -> dict:
    """Run a recipe and save model, tokenizer, recipe and the Trainer's state under its `training.output_dir`.

    Args:
        resume: go on from the last checkpoint in the output folder.
        model: train this one, in place of the recipe's.
    Returns:
        the Trainer's metrics, those of the last evaluation among them.
    """
    recipe.check()
    has_device = torch.accelerator.is_available()
    defaults = {
        "report_to": "none", "dataloader_pin_memory": has_device, "use_cpu": not has_device,
        "include_num_input_tokens_seen": "all",
    }  # fmt: skip
    arguments = TrainingArguments(**{**defaults, **recipe.training})
    try:
        check_processes(arguments, DistributedConfig(**recipe.distributed) if recipe.distributed else None)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer or recipe.model)
    Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
    checkpoint = last_complete_checkpoint(arguments.output_dir) if resume else None
    if resume and checkpoint is None:
        raise RecipeError(f"There is no checkpoint in {arguments.output_dir} to resume from; leave --resume out.")
    with arguments.main_process_first(desc="tokenizing"):  # the others find it done, in datasets' cache
        blocks = recipe.data.train_blocks(tokenizer)
        heldout = recipe.data.evaluation_blocks(tokenizer)
    model = load_model(recipe, tokenizer, None if recipe.lora else checkpoint) if model is None else model
    if recipe.lora:
        model = add_adapter(model, recipe.lora)  # the Trainer loads a checkpoint's adapter
    if recipe.train_only == "added":
        try:
            freeze_backbone(model)
        except ValueError as error:
            raise RecipeError(f"train_only=added: {error}") from None
    keep_cache = model.config.use_cache
    stop = StopOnSignal()
    trainer = VwnTrainer(
        added=recipe.added,
        backbone=recipe.backbone,
        distillation=recipe.distillation,
        teacher=load_teacher(recipe.distillation, model) if recipe.distillation else None,
        model=model,
        args=arguments,
        train_dataset=blocks,
        eval_dataset=heldout,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[stop, *([ConnectionHealth()] if connections(model) else [])],
    )
    trainer.weights_from = None if recipe.lora else checkpoint
    if trainer.is_world_process_zero():
        save_history(recipe, Path(arguments.output_dir))
    finished = finished_state(checkpoint, arguments.max_steps)
    if finished:
        trainer.state, metrics = finished, {}
    else:
        with stop:
            metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if heldout is not None:
        metrics |= trainer.evaluate()
    model.config.use_cache = keep_cache  # the Trainer switches it off
    trainer.save_model()
    trainer.save_state()
    return metrics


def save_history(recipe: TrainingRecipe, folder: Path) -> None:
    """Save the recipe, and beside it what is known of how its model was made."""
    if recipe.model:
        copy_history(recipe.model, folder)
    text = yaml.safe_dump(recipe.model_dump(exclude_unset=True, exclude_none=True), sort_keys=False)
    (folder / RECIPE_NAME).write_text(text)


@built_whole()
def load_model(
    recipe: TrainingRecipe, tokenizer: PreTrainedTokenizerBase, checkpoint: str | None = None
) -> PreTrainedModel:
    """The recipe's model, or a new one of its config, in float32 unless the config says otherwise.

    A run's own `checkpoint` takes its place, unless it is in shards, which the Trainer loads.
    """
    in_shards = checkpoint is not None and not Path(checkpoint, "config.json").is_file()
    source = recipe.model if in_shards else checkpoint or recipe.model
    distributed = DistributedConfig(**recipe.distributed) if recipe.distributed else None
    settings = {"attn_implementation": recipe.attn_implementation} if recipe.attn_implementation else {}
    if source is not None:
        config = changed_config(source, recipe.config or {})
        settings |= {"config": config, "dtype": recipe.dtype, "distributed_config": distributed}
        model = AutoModelForCausalLM.from_pretrained(source, **settings)
    else:
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        config = {"vocab_size": len(tokenizer), **special, **recipe.config}
        config = AutoConfig.for_model(config.pop("model_type"), **config)
        if recipe.dtype != "auto":
            settings["dtype"] = recipe.dtype
        model = AutoModelForCausalLM.from_config(config, **settings)
        model = shard(model, distributed) if distributed else model
    if len(tokenizer) > model.config.vocab_size:
        raise RecipeError(
            f"The tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}: "
            "they do not belong together."
        )
    return model


def changed_config(source: str, changes: dict[str, Any]) -> PreTrainedConfig:
    """A checkpoint's config with some of its fields changed, checked again.

    Raises:
        RecipeError: the config has no such field.
    """
    config = AutoConfig.from_pretrained(source)
    for key, value in changes.items():
        if not hasattr(config, key):
            raise RecipeError(unknown_key(f"config.{key}", key, list(config.to_dict())))
        setattr(config, key, value)
    config.validate_architecture()
    return config


def load_teacher(distillation: Distillation, model: PreTrainedModel) -> PreTrainedModel:
    teacher = AutoModelForCausalLM.from_pretrained(distillation.teacher, dtype="auto").requires_grad_(False)
    sizes = [m.get_output_embeddings().weight.shape[0] for m in (teacher, model)]
    if sizes[0] != sizes[1]:
        raise RecipeError(
            f"distillation.teacher={distillation.teacher!r} predicts {sizes[0]} tokens, the model {sizes[1]}: "
            "take a teacher with the model's tokenizer."
        )
    return teacher
