"""A backbone's checkpoint in, a VWN checkpoint that computes the same function out.

Only the embedding changes; connections and reduce are added in one more shard. Every other tensor is copied as it
stands on disk, one shard at a time. The output gets its name when it is complete and has passed its check.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .backbones import Backbone, get_backbone
from .configuration_vwn import resolve_segments
from .modeling_vwn import build_family, last_attention_layer, norm_epsilon
from .over_width import OverWidthLinear

SLOT_STARTS = ("noise", "copies", "zeros", "scaled_copies")
DEFAULT_SLOT_START = "noise"  # in recipes/starting_points no start helps more than another
REPORT_NAME = "upcycling_report.json"
COMPANION_FILES = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "chat_template*", "additional_chat_templates/*", "LICENSE*", "NOTICE*",
)  # fmt: skip
# Largest difference of logits put down to rounding, as a share of the largest logit, where a group norm is added.
MOST_BY_EPSILON = 0.1  # likewise, of what the norms' epsilons may explain: beyond it a mismatch is a mismatch
ROUNDING = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class UpcyclingError(RuntimeError):
    """The source cannot be upcycled, or the result does not compute the source's function. No output is left."""


@dataclass
class UpcyclingReport:
    """What `upcycle` did. `max_difference` is the largest |VWN logit − source logit|; None if it was not checked."""

    source: str
    output: str
    model_type: str
    segments: int
    slots: int
    carry: str
    embedding: str
    embedding_rank: int | None
    group_norm: bool
    slot_start: str
    untied: bool
    mtp_layers: int
    dropped: list[str]
    source_parameters: int
    added_parameters: int
    logits_equal: bool | None = None
    max_difference: float | None = None

    def summary(self) -> str:
        added = self.added_parameters / self.source_parameters
        lines = [
            f"{self.source} ({self.model_type.removeprefix('vwn_')}) → {self.output}",
            f"m={self.segments}, n={self.slots}, "
            f"state {self.slots / self.segments:g} times as wide, {self.embedding} embedding"
            + (f" of rank {self.embedding_rank}" if self.embedding_rank else "")
            + (", untied" if self.untied else "")
            + (f", {self.carry} carry" if self.carry != "free" else ""),
            f"{self.source_parameters:,} parameters + {self.added_parameters:,} ({added:.1%})",
        ]
        if self.mtp_layers:
            lines.append(f"multi-token prediction: {self.mtp_layers} added, from the last layer")
        if self.dropped:
            lines.append(f"Left out, as asked: the source's MTP tensors ({len(self.dropped)}, {self.dropped[0]}, …)")
        if self.max_difference is None:
            lines.append("Not verified.")
        elif self.logits_equal:
            lines.append("Verified: logits equal the source's bit for bit.")
        else:
            lines.append(
                f"Verified: logits differ from the source's by at most {self.max_difference:.2g} (group norm)."
            )
        return "\n".join(lines)


class UpcyclingRecipe(BaseModel):
    """The arguments of `upcycle`, as a recipe names them."""

    model_config = ConfigDict(extra="forbid")

    source: str
    output: str
    segments: int | None = None
    slots: int = 8
    preset: str | None = None
    dynamic: bool = True
    carry: str = "free"
    embedding: str | None = None
    embedding_rank: int | None = None
    group_norm: bool | None = None
    slot_start: str | None = None
    seed: int = 0
    mtp_layers: int = 0
    drop_source_mtp: bool = False
    revision: str | None = None
    verify: bool = True


def upcycle(
    source: str | Path,
    output: str | Path,
    *,
    segments: int | None = None,
    slots: int = 8,
    preset: str | None = None,
    dynamic: bool = True,
    carry: str = "free",
    embedding: str | None = None,
    embedding_rank: int | None = None,
    group_norm: bool | None = None,
    slot_start: str | None = None,
    seed: int = 0,
    mtp_layers: int = 0,
    drop_source_mtp: bool = False,
    revision: str | None = None,
    verify: bool = True,
) -> UpcyclingReport:
    """Write a VWN checkpoint that computes the function of a backbone's checkpoint (method: arXiv:2511.11238).

    Args:
        source: local folder or Hub id of a safetensors checkpoint of a supported family.
        output: folder to make; must not exist.
        segments, slots: m and n; the state becomes n/m times as wide as the backbone. segments=None: as the preset
            says, or 4.
        preset: "hyper_connections" (m = 1) or "frac_connections" (m = n), in place of segments.
        dynamic: whether the connections' matrices depend on the token.
        carry: how connections carry slots on: "free", "identity" or "doubly_stochastic". All start as the identity.
        embedding: "direct", "projected" or "scaled_copies"; None takes what slot_start says, else "projected" for tied
            embeddings, which keeps the tie, or where embedding_rank is given, else "direct". Tied embeddings in the
            direct form are untied.
        embedding_rank: k ≥ hidden_size of the projected embedding; None: hidden_size. Above it, embeddings are untied.
        group_norm: RMS norm before the reduce; None: where slots is a multiple of segments. Without it the new
            model's logits equal the source's bit for bit, with it up to the rounding of one more norm.
        slot_start: what the extra embedding columns start as: "noise" of the table's scale, "copies" of the
            table's columns, cyclic, or "zeros"; or "scaled_copies", which leaves the table as it is and copies its
            columns when they are looked up, each slot times a learned factor (an embedding form of its own).
            None: "scaled_copies" if that is the embedding, else "noise". It changes how the model learns on, not
            what it computes.
        seed: of that noise.
        mtp_layers: modules of multi-token prediction to add. Each gets the source's last layer that keeps keys and
            values, its last norm, and a mixing that starts it close to the model's own next-token state.
        drop_source_mtp: leave out MTP tensors that the source ships; without it they are refused. They join state and
            embedding by a dense map over the width, which the mixing [d, 2d] shared by the slots cannot hold.
        revision: of a Hub id.
        verify: load both and compare their logits before the output gets its name.

    Raises:
        UpcyclingError: the source has something that cannot be carried over, or the check failed.
        ValueError: the settings do not fit the source.
        FileExistsError, FileNotFoundError: output is there already; source is not.
    """
    embedding, slot_start = resolve_start(embedding, slot_start)
    output = Path(output)
    folder = resolve_source(source, revision)
    source_config = read_source_config(folder)
    config = widen_config(
        source_config,
        segments=segments,
        slots=slots,
        preset=preset,
        dynamic=dynamic,
        carry=carry,
        embedding=embedding,
        embedding_rank=embedding_rank,
        group_norm=group_norm,
        mtp_layers=mtp_layers,
    )
    weight_map = read_weight_map(folder)
    check_embedding(folder, weight_map, source_config)
    dropped = source_mtp_tensors(weight_map, source_config)
    if dropped and not drop_source_mtp:
        raise UpcyclingError(describe_source_mtp(folder, dropped))
    with folder_when_complete(output) as partial:
        generator = torch.Generator().manual_seed(seed)
        added = write_weights(folder, weight_map, partial, config, source_config, slot_start, generator, set(dropped))
        config.save_pretrained(partial)
        copy_companions(folder, partial)
        report = UpcyclingReport(
            source=str(source), output=str(output), model_type=config.model_type,
            segments=config.vwn_segments, slots=slots, carry=carry,
            embedding=config.vwn_embedding, embedding_rank=embedding_rank,
            group_norm=config.vwn_group_norm, slot_start=slot_start,
            untied=source_config.tie_word_embeddings and not config.tie_word_embeddings,
            mtp_layers=mtp_layers, dropped=dropped,
            source_parameters=count_parameters(folder, weight_map), added_parameters=added,
        )  # fmt: skip
        if verify:
            report.logits_equal, report.max_difference = compare_logits(folder, partial, config, set(dropped))
        (partial / REPORT_NAME).write_text(json.dumps(asdict(report), indent=2) + "\n")
    return report


def resolve_start(embedding: str | None, slot_start: str | None) -> tuple[str | None, str]:
    """Fill in what the one says about the other: scaled copies are a form of the embedding and its start at once."""
    if slot_start not in (None, *SLOT_STARTS):
        raise ValueError(f"slot_start={slot_start!r} is not one of {SLOT_STARTS}.")
    if "scaled_copies" not in (embedding, slot_start):
        return embedding, slot_start or DEFAULT_SLOT_START
    if {embedding, slot_start} - {None, "scaled_copies"}:
        raise ValueError(
            f"embedding={embedding!r} and slot_start={slot_start!r} contradict each other: 'scaled_copies' is an "
            "embedding form that has its own start. Give 'scaled_copies' for one of them and leave the other out."
        )
    return "scaled_copies", "scaled_copies"


def resolve_source(source: str | Path, revision: str | None) -> Path:
    """The folder that holds the checkpoint; a Hub id is downloaded: its weights, config and tokenizer, no code."""
    if Path(source).is_dir():
        return Path(source)
    refuse_missing_path(source)
    patterns = ["config.json", "*.safetensors", SAFE_WEIGHTS_INDEX_NAME, *COMPANION_FILES]
    return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))


def refuse_missing_path(source: str | Path) -> None:
    """Raise FileNotFoundError for what is not there and cannot be a Hub id either."""
    if Path(source).exists():
        return
    if Path(source).is_absolute() or str(source).startswith(".") or str(source).count("/") > 1:
        raise FileNotFoundError(f"{source} is neither a folder nor a Hub id (owner/name).")


def read_source_config(folder: Path) -> PreTrainedConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder of a transformers checkpoint.")
    raw = json.loads(path.read_text())
    try:
        backbone = get_backbone(str(raw.get("model_type")))
    except ValueError as error:
        raise UpcyclingError(f"{folder}: {error}") from None
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method")
        raise UpcyclingError(f"{folder} is quantized ({method}); give the checkpoint it was quantized from.")
    return backbone.config_class.from_pretrained(folder)


def widen_config(
    source_config: PreTrainedConfig,
    *,
    segments: int | None,
    slots: int,
    preset: str | None,
    dynamic: bool,
    carry: str,
    embedding: str | None,
    embedding_rank: int | None,
    group_norm: bool | None,
    mtp_layers: int = 0,
) -> PreTrainedConfig:
    """The VWN config of a backbone's config. Raises ValueError for settings that do not fit it."""
    backbone = get_backbone(source_config.model_type)
    classes = build_family(backbone)
    hidden_size = source_config.hidden_size
    if embedding is None:
        embedding = "projected" if source_config.tie_word_embeddings or embedding_rank is not None else "direct"
    if embedding_rank is not None and embedding_rank < hidden_size:
        raise ValueError(
            f"embedding_rank={embedding_rank} is less than hidden_size={hidden_size}: a table of lower rank cannot "
            "hold the old one, and the function would change. "
            f"Use embedding_rank >= {hidden_size}, or train from scratch."
        )
    segments = resolve_segments(segments, slots, preset)
    keeps_table_width = slots == segments if embedding == "direct" else embedding_rank in (None, hidden_size)
    fields = source_config.to_dict()
    for key in ("model_type", "transformers_version", source_config.attribute_map.get("num_mtp_layers")):
        fields.pop(key, None)
    fields |= {
        "architectures": [classes.ForCausalLM.__name__],
        "tie_word_embeddings": source_config.tie_word_embeddings and keeps_table_width,
        "vwn_segments": segments,
        "vwn_slots": slots,
        "vwn_dynamic": dynamic,
        "vwn_carry": carry,
        "vwn_embedding": embedding,
        "vwn_embedding_rank": embedding_rank,
        "vwn_group_norm": group_norm,
        "num_mtp_layers": mtp_layers,
    }
    try:
        return classes.Config(**fields)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from None


def read_weight_map(folder: Path) -> dict[str, str]:
    """File name of each tensor of the checkpoint. Raises UpcyclingError unless it is safetensors, inside the folder."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        with safe_open(folder / SAFE_WEIGHTS_NAME, "pt") as file:
            return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
    if not (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        raise UpcyclingError(
            f"{folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. Other formats are not read; "
            "load the model with transformers and save it again to convert it."
        )
    weight_map = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"]
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UpcyclingError(
                f"{SAFE_WEIGHTS_INDEX_NAME} names {name!r}, which is no safetensors file in the folder."
            )
    for name in names:
        if not (folder / name).is_file():
            raise UpcyclingError(
                f"{SAFE_WEIGHTS_INDEX_NAME} names {name}, which is not in {folder}; download it again."
            )
        with safe_open(folder / name, "pt") as file:
            listed = {key for key, value in weight_map.items() if value == name}
            if listed != set(file.keys()):
                raise UpcyclingError(f"{name} holds other tensors than {SAFE_WEIGHTS_INDEX_NAME} says.")
    return weight_map


def backbone_of(config: PreTrainedConfig) -> Backbone:
    """The row of a backbone's config, or of the VWN config made from it."""
    return get_backbone(config.model_type.removeprefix("vwn_"))


def check_embedding(folder: Path, weight_map: dict[str, str], config: PreTrainedConfig) -> None:
    key = backbone_of(config).embedding_key
    if key not in weight_map:
        raise UpcyclingError(f"{folder} has no tensor {key}; is it a causal language model's checkpoint?")
    with safe_open(folder / weight_map[key], "pt") as file:
        view = file.get_slice(key)
        if view.get_shape() != [config.vocab_size, config.hidden_size]:
            raise UpcyclingError(
                f"{key} has shape {view.get_shape()}, but config.json says vocab_size={config.vocab_size}, "
                f"hidden_size={config.hidden_size}; correct config.json."
            )


def number_of_layers(config: PreTrainedConfig) -> int:
    return getattr(config, backbone_of(config).depth)


def source_mtp_tensors(weight_map: dict[str, str], config: PreTrainedConfig) -> list[str]:
    """Names of the tensors of multi-token prediction that a checkpoint ships: layers after the last, and mtp…."""
    layer, module = re.compile(r"^model\.layers\.(\d+)\."), re.compile(r"(^|\.)mtp")
    after_last = {
        key for key in weight_map if (match := layer.match(key)) and int(match[1]) >= number_of_layers(config)
    }
    return sorted(after_last | {key for key in weight_map if module.search(key)})


def describe_source_mtp(folder: Path, keys: list[str]) -> str:
    shown = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
    return (
        f"{folder} ships multi-token prediction ({shown}). It joins state and embedding by a dense map over the whole "
        "width, which VWN's mixing, shared by the slots, cannot hold, so it cannot be carried over. Leave it out with "
        "drop_source_mtp=True (--drop-source-mtp); mtp_layers (--mtp-layers) adds new modules from the last layer."
    )


@contextmanager
def folder_when_complete(output: Path) -> Iterator[Path]:
    """A folder beside `output` that is renamed to it at the end, or removed if anything goes wrong."""
    if output.exists():
        raise FileExistsError(f"{output} exists; give a new folder or remove it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_weights(
    folder: Path,
    weight_map: dict[str, str],
    output: Path,
    config: PreTrainedConfig,
    source_config: PreTrainedConfig,
    slot_start: str,
    generator: torch.Generator,
    dropped: set[str],
) -> int:
    """Write all shards and their index; return the number of parameters added."""
    key = backbone_of(config).embedding_key
    with safe_open(folder / weight_map[key], "pt") as file:
        table = file.get_tensor(key)
    changed = {}
    if config.table_width != config.hidden_size:
        changed[key] = widen_table(table, config, slot_start, generator)
    if source_config.tie_word_embeddings and not config.tie_word_embeddings and "lm_head.weight" not in weight_map:
        changed["lm_head.weight"] = table
    changed |= new_tensors(config, slot_start, table.dtype, generator)
    changed |= mtp_tensors(folder, weight_map, config, table.dtype)

    names = sorted(set(weight_map.values()))
    shards = len(names) + 1
    new_map = {}
    for number, name in enumerate(names, start=1):
        new_name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        copied = copy_shard(folder / name, output / new_name, without=changed.keys() | dropped)
        new_map |= dict.fromkeys(copied, new_name)
    new_name = f"model-{shards:05d}-of-{shards:05d}.safetensors"
    save_file(changed, output / new_name, metadata={"format": "pt"})
    new_map |= dict.fromkeys(changed, new_name)
    total_size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(new_map.items()))}
    (output / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    replaced = table.numel() if key in changed else 0
    return sum(tensor.numel() for tensor in changed.values()) - replaced


def copy_shard(source: Path, output: Path, without) -> list[str]:
    """Copy a safetensors file, leaving tensors out; byte for byte if there are none to leave out. Returns its keys."""
    with safe_open(source, "pt") as file:
        keys = [key for key in file.keys() if key not in without]
        if len(keys) < len(list(file.keys())):
            save_file({key: file.get_tensor(key) for key in keys}, output, metadata=file.metadata())
            return keys
    shutil.copyfile(source, output)
    return keys


def widen_table(table: Tensor, config: PreTrainedConfig, slot_start: str, generator: torch.Generator) -> Tensor:
    """[V, D] -> [V, D' or k]: the table, then its extra columns as `slot_start` says, in the table's dtype."""
    extra = config.table_width - config.hidden_size
    if slot_start == "copies":
        return table[:, torch.arange(config.table_width) % config.hidden_size].contiguous()
    columns = torch.zeros(table.shape[0], extra, dtype=table.dtype)
    if slot_start == "noise":
        std = table.float().std().item()
        columns = torch.randn(columns.shape, generator=generator).mul_(std).to(table.dtype)
    return torch.cat([table, columns], dim=1)


def new_tensors(
    config: PreTrainedConfig, slot_start: str, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    """The tensors that VWN adds, by name: connections in float32, the rest in `dtype`."""
    with torch.device("meta"):
        model = build_family(backbone_of(config)).ForCausalLM(config)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, OverWidthLinear):
            rows, columns = module.weight.shape
            weight = torch.zeros(rows, columns)
            weight[: min(rows, columns), : min(rows, columns)] = torch.eye(min(rows, columns))
            if name.endswith("expansion") and slot_start == "copies":
                weight[columns:] = torch.eye(columns)[torch.arange(columns, rows) % config.hidden_size]
            elif name.endswith("expansion") and slot_start == "noise":
                weight[columns:] = torch.randn(rows - columns, columns, generator=generator) * module.std
            tensors[f"{name}.weight"] = weight.to(dtype)
        elif hasattr(module, "initial_values"):
            keep = torch.float32 if "_connection" in name else dtype
            tensors |= {f"{name}.{key}": value.to(keep) for key, value in module.initial_values().items()}
    return tensors


def mtp_tensors(
    folder: Path, weight_map: dict[str, str], config: PreTrainedConfig, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What each MTP module takes from the source: its last attention layer and last norm; and the mixing's start."""
    tensors = {}
    if not config.num_mtp_layers:
        return tensors
    layer = last_attention_layer(config, number_of_layers(config))
    last_norm = backbone_of(config).last_norm
    prefixes = {f"model.layers.{layer}.": "layer.", f"model.{last_norm}.": "norm."}
    for number in range(config.num_mtp_layers):
        for prefix, new_prefix in prefixes.items():
            for key in (key for key in weight_map if key.startswith(prefix)):
                with safe_open(folder / weight_map[key], "pt") as file:
                    tensors[f"mtp.{number}.{new_prefix}{key.removeprefix(prefix)}"] = file.get_tensor(key)
        tensors[f"mtp.{number}.mixing.weight"] = mixing_start(config.slot_width).to(dtype)
    return tensors


def mixing_start(slot_width: int) -> Tensor:
    """[d, 2d]: half the state and the whole embedding, each normalized.

    Of the mixings tried on a small trained OLMoE it brought a module's first prediction closest to the model's own at
    the next token (KL 2.7 nats; a random mixing 5.7), and its loss lowest after 60 steps.
    """
    return torch.cat([torch.eye(slot_width) / 2, torch.eye(slot_width)], dim=1)


def copy_companions(folder: Path, output: Path) -> None:
    """Copy tokenizer, generation config, chat templates and licence byte for byte."""
    for pattern in COMPANION_FILES:
        for path in folder.glob(pattern):
            if path.is_file():
                target = output / path.relative_to(folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def count_parameters(folder: Path, weight_map: dict[str, str]) -> int:
    total = 0
    for name in set(weight_map.values()):
        with safe_open(folder / name, "pt") as file:
            for key in file.keys():
                total += torch.Size(file.get_slice(key).get_shape()).numel()
    return total


@torch.no_grad()
def compare_logits(
    source: Path, output: Path, config: PreTrainedConfig, dropped: set[str] = frozenset()
) -> tuple[bool, float]:
    """Load both checkpoints and compare logits on sample tokens; the source's `dropped` tensors are not missed.

    Returns:
        (whether they are equal bit for bit, largest absolute difference).
    Raises:
        UpcyclingError: a tensor is missing or left over, or the logits differ by more than the method allows:
            at all without a group norm, by more than rounding with one.
    """
    tokens = torch.randint(config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    expected, expected_info, _ = _logits(source, tokens)
    actual, info, epsilon_share = _logits(output, tokens)
    left_over = expected_info["unexpected_keys"] - dropped
    if info["missing_keys"] or info["mismatched_keys"] or info["unexpected_keys"] != left_over:
        raise UpcyclingError(f"The new checkpoint does not load cleanly: {info}")
    if not torch.isfinite(expected).all():
        raise UpcyclingError("The source's own logits are not finite on sample tokens; its weights are damaged.")
    equal = torch.equal(actual, expected)
    difference = (actual.double() - expected.double()).abs().max().item()
    allowed = 0.0
    if config.vwn_group_norm:
        allowed = (ROUNDING[expected.dtype] + min(epsilon_share, MOST_BY_EPSILON)) * expected.abs().max().item()
    if not difference <= allowed:
        raise UpcyclingError(
            f"Logits differ from the source's by up to {difference:.3g}; at most {allowed:.3g} is allowed."
        )
    return equal, difference


def _logits(folder: Path, tokens: Tensor) -> tuple[Tensor, dict, float]:
    """Logits, loading report, and how much a group norm may change the state's scale through the norms' epsilons.

    A norm divides by sqrt(mean square + eps). Of a state that is normalized already, the last norm's eps is no
    longer a share of eps / (2 · mean square), which shows where the state is small, as in a hardly trained model.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True, trust_remote_code=False
    )
    for parameter in model.parameters():  # as it lies in the file it may be unaligned, and be summed in another order
        parameter.data = parameter.data.clone()
    mean_squares = []
    width = model.config.hidden_size
    last_norm = getattr(model.model, backbone_of(model.config).last_norm)
    last_norm.register_forward_pre_hook(
        lambda module, inputs: mean_squares.append(inputs[0][..., :width].float().square().mean(-1).min().item())
    )
    logits = model.eval()(tokens).logits
    epsilons = norm_epsilon(last_norm) + getattr(model.config, "vwn_norm_eps", 0.0)
    return logits, info, epsilons / (2 * mean_squares[0]) if mean_squares[0] else 0.0
