"""A recipe in, a trained checkpoint out: strict YAML → datasets → packed blocks → transformers' Trainer."""

import difflib
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from .data import DataSource, packed_blocks
from .modeling_vwn import added_parameters


class RecipeError(ValueError):
    """A recipe that cannot be run; says which key, why, and what would do."""


class TextData(BaseModel):
    """The data of a recipe."""

    model_config = ConfigDict(extra="forbid")

    train: DataSource
    evaluation: DataSource | None = None
    sequence_length: int = Field(512, gt=1)


class AddedParameters(BaseModel):
    """How to train what VWN added, where it is to differ from `training`."""

    model_config = ConfigDict(extra="forbid")

    learning_rate: float | None = Field(None, ge=0, allow_inf_nan=False, description="peak; default: training's")
    weight_decay: float | None = Field(None, ge=0, allow_inf_nan=False, description="default: training's")


class TrainingRecipe(BaseModel):
    """What `vwn-hf train` reads. Exactly one of `model` and `config` is given."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = Field(None, description="checkpoint to train on, local folder or Hub id")
    config: dict[str, Any] | None = Field(None, description="config to start from scratch with; has a model_type")
    tokenizer: str | None = Field(None, description="tokenizer's folder or Hub id; default: that of `model`")
    data: TextData
    training: dict[str, Any] = Field(description="transformers' TrainingArguments, by their names")
    added: AddedParameters | None = Field(None, description="other settings for the parameters that VWN added")

    def check(self) -> None:
        """Raise RecipeError for what the fields' types do not show."""
        if (self.model is None) == (self.config is None):
            raise RecipeError("Give either model, a checkpoint to train on, or config, to start from scratch.")
        if self.config is not None and "model_type" not in self.config:
            raise RecipeError("config has no model_type; for example olmoe or vwn_olmoe.")
        if self.model is None and self.tokenizer is None:
            raise RecipeError("config without tokenizer: say which tokenizer's ids the model is to learn.")
        known = [field.name for field in fields(TrainingArguments) if field.init]
        for key in self.training:
            if key not in known:
                raise RecipeError(unknown_key(f"training.{key}", key, known))
        if "output_dir" not in self.training:
            raise RecipeError("training.output_dir is missing: where the checkpoint is to go.")


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
    location = [str(part) for part in problem["loc"]]
    path = ".".join(location)
    if problem["type"] != "extra_forbidden":
        return f"{path}: {problem['msg']} (got {problem['input']!r})."
    for part in location[:-1]:
        annotation = schema.model_fields[part].annotation
        options = getattr(annotation, "__args__", (annotation,))
        schema = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return unknown_key(path, location[-1], list(schema.model_fields))


class VwnTrainerMixin:
    """Put before a Trainer class of transformers or trl: trains the MTP modules and reports next-token losses.

    - Training takes the model's own loss, MTP included, also where the Trainer class would compute one outside of the
      model (trl's SFTTrainer), and logs the MTP losses beside it: `mtp_loss_1` is the next-2-token loss, and so on.
    - Evaluation gives the next-token loss alone, without the router's auxiliary loss, and `eval_mtp_loss_1`, ….
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._mtp_training, self._mtp_evaluation = LossSum(), LossSum()
        self._step_of_last_log: int | None = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        losses = outputs.get("mtp_losses") if isinstance(outputs, dict) else None
        if losses is not None:
            self._keep_mtp_losses(losses.detach().float(), model.training, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _keep_mtp_losses(self, losses: torch.Tensor, training: bool, num_items_in_batch) -> None:
        if not training:
            return self._mtp_evaluation.add(losses)
        if num_items_in_batch is None:
            losses = losses / self.current_gradient_accumulation_steps
        elif self.args.average_tokens_across_devices:
            losses = losses * self.accelerator.num_processes  # they were divided by the items of all processes
        if self._step_of_last_log is None:
            self._step_of_last_log = self.state.global_step
        self._mtp_training.add(losses)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._mtp_training:
            steps = self.state.global_step - self._step_of_last_log
            logs |= self._mtp_training.take("mtp_loss", self.accelerator, divisor=steps)
            self._step_of_last_log = self.state.global_step
        super().log(logs, *args, **kwargs)

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
        if self._mtp_evaluation:
            name, batches = f"{metric_key_prefix}_mtp_loss", self._mtp_evaluation.count
            output.metrics.update(self._mtp_evaluation.take(name, self.accelerator, divisor=batches))
        return output


class LossSum:
    """Sum of vectors of losses [K]; true once it has one."""

    def __init__(self):
        self.total: torch.Tensor | None = None
        self.count = 0

    def __bool__(self) -> bool:
        return self.count > 0

    def add(self, losses: torch.Tensor) -> None:
        self.total = losses if self.total is None else self.total + losses
        self.count += 1

    def take(self, name: str, accelerator, divisor: int) -> dict[str, float]:
        """`name`_1, `name`_2, …: the sum over `divisor`, mean over processes. The sum begins anew."""
        means = accelerator.reduce(self.total, "mean") / divisor
        self.__init__()
        return {f"{name}_{depth}": loss for depth, loss in enumerate(means.tolist(), start=1)}


class VwnTrainer(VwnTrainerMixin, Trainer):
    """transformers' Trainer for VWN models, with a learning rate and a weight decay of its own for what VWN added.

    What transformers does not decay (biases and norms, by their names) is not decayed here either. The schedule
    scales each group from its own rate; the rate in the log is the backbone's.

    Raises:
        RecipeError: the model has no such parameters, or the optimizer does not keep them in groups.
    """

    def __init__(self, *args, added: AddedParameters | None = None, **kwargs):
        self.added = added
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model=None):
        exists = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if self.added and not exists:
            self.separate_groups(optimizer, self.model if model is None else model)
        return optimizer

    def separate_groups(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
        """Move what VWN added out of the optimizer's groups, into one that is decayed and one that is not."""
        names = set(added_parameters(model))
        trained = {name: p for name, p in model.named_parameters() if name in names and p.requires_grad}
        if not trained:
            raise RecipeError("added: the model has no trainable parameters that VWN added; leave it out.")
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
            raise RecipeError(f"added: training.optim={self.args.optim!s} keeps no groups; take adamw_torch.")

    def group_settings(self, decayed: bool) -> dict[str, float]:
        settings = {"lr": self.added.learning_rate, "weight_decay": self.added.weight_decay if decayed else 0.0}
        return {key: value for key, value in settings.items() if value is not None}


def train(recipe: TrainingRecipe, resume: bool = False) -> dict:
    """Run a recipe and save model, tokenizer, recipe and the Trainer's state under its `training.output_dir`.

    Args:
        resume: go on from the last checkpoint in the output folder.
    Returns:
        the Trainer's metrics, those of the last evaluation among them.
    """
    recipe.check()
    defaults = {"report_to": "none", "dataloader_pin_memory": torch.cuda.is_available()}
    arguments = TrainingArguments(**{**defaults, **recipe.training})
    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer or recipe.model)
    Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
    checkpoint = get_last_checkpoint(arguments.output_dir) if resume else None
    if resume and checkpoint is None:
        raise RecipeError(f"There is no checkpoint in {arguments.output_dir} to resume from; leave --resume out.")
    model = load_model(recipe, tokenizer, checkpoint)
    keep_cache = model.config.use_cache
    blocks = packed_blocks(recipe.data.train.load(), tokenizer, recipe.data.sequence_length)
    heldout = recipe.data.evaluation
    trainer = VwnTrainer(
        added=recipe.added,
        model=model,
        args=arguments,
        train_dataset=blocks,
        eval_dataset=packed_blocks(heldout.load(), tokenizer, recipe.data.sequence_length) if heldout else None,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if heldout:
        metrics |= trainer.evaluate()
    model.config.use_cache = keep_cache  # the Trainer switches it off
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        text = yaml.safe_dump(recipe.model_dump(exclude_none=True), sort_keys=False)
        (Path(arguments.output_dir) / "recipe.yaml").write_text(text)
    return metrics


def load_model(
    recipe: TrainingRecipe, tokenizer: PreTrainedTokenizerBase, checkpoint: str | None = None
) -> PreTrainedModel:
    """The recipe's model, or a new one of its config, in float32 unless the config says otherwise.

    A run's own `checkpoint` takes its place: the Trainer, resuming, matches tensors by name alone and so leaves
    experts, which are stored one by one and fused in memory, as it finds them (seen in transformers 5.23).
    """
    source = checkpoint or recipe.model
    if source is not None:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    else:
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        config = {"vocab_size": len(tokenizer), **special, **recipe.config}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    if len(tokenizer) > model.config.vocab_size:
        raise RecipeError(
            f"The tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}: "
            "they do not belong together."
        )
    return model
