"""How several processes share a model: what transformers, Accelerate, torch and DeepSpeed leave to be done.

A model is sharded either when it is loaded (`distributed_config=DistributedConfig(fsdp_size=…, tp_size=…, ep_size=…)`)
or by Accelerate when training begins (`accelerate launch` with FSDP2 or DeepSpeed ZeRO-3).
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import DistributedType, str_to_bool
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig, load_optimizer_distributed, save_optimizer_distributed
from transformers.integrations import deepspeed
from transformers.trainer import SCHEDULER_NAME

from .modeling_vwn import keep_connections_float32

OPTIMIZER_FOLDER = "optimizer_shards"  # in a checkpoint of a model that was sharded when it was loaded


def check_processes(arguments: TrainingArguments, distributed: DistributedConfig | None) -> None:
    """Raise ValueError where the processes that were started would not share the work as asked."""
    started, working = int(os.environ.get("WORLD_SIZE", 1)), arguments.world_size
    if started > working:
        raise ValueError(
            f"{started} processes were started, and each would train by itself on all of the data: Accelerate found no "
            "device for them to share. To train on CPU, set training.use_cpu=true."
        )
    kind = arguments.distributed_state.distributed_type
    by_accelerate = bool(arguments.fsdp) or str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false"))
    if by_accelerate and kind in (DistributedType.MULTI_CPU, DistributedType.NO):
        where = "training.fsdp" if arguments.fsdp else "fsdp_config of accelerate launch"
        raise ValueError(
            f"{where}: Accelerate shards models on several accelerators only, and would train {working} whole "
            f"{'copies' if working > 1 else 'copy'} here. On CPU, leave it out, start with the processes of "
            "recipes/accelerate_configs/cpu.yaml and set distributed.fsdp_size=2."
        )
    if distributed is None:
        return
    if by_accelerate:
        raise ValueError("distributed and Accelerate's FSDP would both shard the model; leave one of them out.")
    replicas = getattr(distributed, "dp_replicate_size", 1)  # not in every version
    needed = distributed.pp_size * replicas * distributed.fsdp_size * distributed.tp_size
    if needed != working:
        raise ValueError(
            f"distributed: pp_size · dp_replicate_size · fsdp_size · tp_size = {needed} processes, but {working} run. "
            f"Start {needed} with accelerate launch --num_processes {needed}, or change the sizes."
        )
    if distributed.pp_size > 1:
        raise ValueError("distributed.pp_size: the Trainer cannot train in pipeline stages; use fsdp_size or tp_size.")
    if distributed.tp_size > 1 and kind == DistributedType.MULTI_CPU:
        raise ValueError("distributed.tp_size: Accelerate takes it on accelerators only. On CPU, use fsdp_size.")


def shard(model: PreTrainedModel, distributed: DistributedConfig) -> PreTrainedModel:
    """A model that every process has whole, such as a new one, sharded: the same values, each process its part."""
    return type(model).from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), dtype=model.dtype, distributed_config=distributed
    )


@contextmanager
def built_whole() -> Iterator[None]:
    """Build models whole under ZeRO-3, too; DeepSpeed splits them when training begins.

    Otherwise it would split each module's parameters as soon as the module is built, before its parent can give them
    their initial values.
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


class Float32Connections(TrainerCallback):
    """`keep_connections_float32`, once Accelerate has sharded the model."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        keep_connections_float32(model)


class ShardedTrainerMixin:
    """Put before a Trainer class: trains, saves and resumes models in shards.

    - Connections keep float32 parameters under the mixed precision of Accelerate's FSDP2.
    - `save_model` writes a whole checkpoint, also where Accelerate's FSDP2 keeps sharded ones to resume from.
    - Checkpoints of whole models are loaded with their experts, on resuming and as the best model at the end.
    - A model that was sharded when it was loaded resumes with every process's part of the optimizer; transformers 5.23
      keeps that of the first process alone. Load the model itself from the checkpoint before (`load_model` does).
    """

    weights_from: str | None = None  # the checkpoint that the model was loaded from, which need not be read again

    def __init__(self, model=None, args: TrainingArguments | None = None, *others, **kwargs):
        loaded_in_shards = getattr(model, "is_distributed_loading_by_transformers", False)
        resumable = loaded_in_shards and args is not None and not args.save_only_model
        if resumable:  # the Trainer refuses to save them, for it would lose all but the first process's optimizer
            args.save_only_model = True
        super().__init__(model, args, *others, **kwargs)
        if resumable:
            self.args.save_only_model = False
        self.add_callback(Float32Connections())
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.activation_checkpointing:
            warnings.warn(
                "fsdp_activation_checkpointing recomputes connections, and again the layers around them. Leave it out "
                "and set training.activation_checkpointing=true, which recomputes each layer once.",
                stacklevel=2,
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is None or _internal_call:
            return super().save_model(output_dir, _internal_call)
        kind = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir, _internal_call)
        plugin.set_state_dict_type(kind)

    # the rest is private to transformers' Trainer
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        held = resume_from_checkpoint == self.weights_from and not self.is_fsdp_enabled
        if held or self.is_distributed_loading_by_transformers:
            return
        if not self.load_converted(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self.load_converted(self.state.best_model_checkpoint):
            super()._load_best_model()

    def load_converted(self, checkpoint: str) -> bool:
        """Load a whole model's checkpoint as `from_pretrained` does; False where Accelerate, DeepSpeed or peft load it.

        The Trainer matches tensors by name alone and so leaves experts, which are stored one by one and fused in
        memory, as it finds them (seen in transformers 5.23).
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not Path(checkpoint, "config.json").is_file():
            return False
        if self.is_distributed_loading_by_transformers:
            return False
        stored = type(self.model).from_pretrained(checkpoint, config=self.model.config, dtype=self.model.dtype)
        self.model.load_state_dict(stored.state_dict())
        return True

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_distributed_loading_by_transformers:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_optimizer_distributed(self.model, self.optimizer.optimizer, str(Path(output_dir, OPTIMIZER_FOLDER)))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_distributed_loading_by_transformers or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer_distributed(self.model, self.optimizer.optimizer, str(Path(checkpoint, OPTIMIZER_FOLDER)))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))
