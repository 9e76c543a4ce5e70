"""What a dry run says of memory and FLOPs is what torch allocates and counts; what it cannot run, it refuses."""

import math
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import MOE_FAMILIES, tiny_config, tiny_vwn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from vwn_hf import GeneralizedHyperConnection
from vwn_hf.analysis import cost
from vwn_hf.cli import app
from vwn_hf.estimation import (
    Devices,
    dry_run,
    estimate,
    keep_activations,
    kept_activations,
    optimizer_bytes,
    training_arguments,
    training_flops,
)
from vwn_hf.training import RecipeError, TrainingRecipe, freeze_backbone

LENGTH = 16
EVALUATED = {"train": {"path": "text", "streaming": True}, "evaluation": {"path": "text"}, "sequence_length": LENGTH}


def recipe(training=None, **more):
    arguments = {"output_dir": "runs/none", "max_steps": 100, "per_device_train_batch_size": 2, **(training or {})}
    content = {"model": "somewhere", "dtype": "float32", "data": EVALUATED, "training": arguments}
    return TrainingRecipe(**{**content, **more})


def tokens(rows=1):
    return torch.randint(3, 99, (rows, LENGTH), generator=torch.Generator().manual_seed(0))


def allocated(tensors):
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


TIED = {"tie_word_embeddings": True, "vwn_embedding": "projected"}


@pytest.mark.parametrize(("family", "form"), [("olmoe", {"num_mtp_layers": 1}), ("qwen3", TIED)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("train_only", [None, "added"])
def test_weights_gradients_and_optimizer_are_what_torch_allocates(family, form, dtype, train_only, tmp_path):
    tiny_vwn(family, **form).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    if train_only:
        freeze_backbone(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    model.train()(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    expected = estimate(recipe(dtype=dtype, train_only=train_only), model.config, Devices(number=1))
    assert expected.weights == allocated(model.parameters())
    assert expected.gradients == allocated(p.grad for p in trained if p.grad is not None) > 0
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert expected.optimizer == allocated(states)
    assert expected.trained_parameters == sum(p.numel() for p in trained)
    assert expected.parameters == model.num_parameters()
    assert expected.added_parameters > 0 and expected.gathered == 0


def test_what_is_split_is_split_and_the_rest_is_not():
    config = tiny_config("vwn_olmoe")
    whole, split = (estimate(recipe(), config, Devices(number=4, shards=shards)) for shards in (1, 4))
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(split, part) == getattr(whole, part) / 4
    assert split.activations == whole.activations
    layer = [p.numel() for n, p in tiny_vwn("olmoe").named_parameters() if ".layers.0." in n]
    rest = [p.numel() for n, p in tiny_vwn("olmoe").named_parameters() if ".layers." not in n]
    assert split.gathered == 4 * (3 * sum(layer) + sum(rest))
    assert split.memory == sum((split.weights, split.gradients, split.optimizer, split.gathered, split.activations))


@pytest.mark.parametrize("family", ["llama", "olmoe", "deepseek_v3"])
@pytest.mark.parametrize("form", [{}, {"num_mtp_layers": 1, "vwn_embedding": "projected"}], ids=str)
def test_activations_of_fake_tensors_are_those_of_real_ones(family, form):
    config = tiny_config(f"vwn_{family}", **form)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    real = kept_activations(model, tokens(), position_ids=torch.tensor([[*range(6), *range(LENGTH - 6)]]))
    assert keep_activations(recipe(), config) == real
    assert all(real.layers) and real.outside > 0
    wide = 2 * LENGTH * config.virtual_width
    assert real.inputs[: config.num_hidden_layers] == [wide] * config.num_hidden_layers


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing():
    config = tiny_config("vwn_llama")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    packed = torch.tensor([[*range(6), *range(LENGTH - 6)]])
    one, two, three = (kept_activations(model, tokens(n), position_ids=packed.repeat(n, 1)) for n in (1, 2, 3))
    assert three.all - two.all == pytest.approx(two.all - one.all, rel=0.001)
    connections = [m for m in model.modules() if isinstance(m, GeneralizedHyperConnection)]
    maps = [connection.maps(torch.float32) for connection in connections]
    joined = sum(4 * x.numel() for m in maps for x in (m.weight, m.weight, m.scale, m.bias))  # proj: for the norm, too
    assert two.all + joined == pytest.approx(2 * one.all, rel=0.02)  # rotary tables are of the batch
    half = {"bf16": True}
    plain, again = (estimate(recipe({"activation_checkpointing": on, **half}), config, Devices()) for on in (0, 1))
    assert plain.activations == plain.activations_without_checkpointing == 2 * one.all
    assert again.activations == 2 * (one.outside + sum(one.inputs) + max(one.layers)) < plain.activations
    single = estimate(recipe(), config, Devices())
    assert single.activations == 2 * plain.activations


def product_flops(summand, left, right, **_):
    return 2 * math.prod(left) * right[1]


IN_PLACE = {torch.ops.aten.addmm_: product_flops}  # torch counts only what makes a new tensor


def counted_parts(model):
    """The parts of `cost` as torch counts them: no norms, and the scores that the causal mask hides."""
    figures, parts = cost(model.config, LENGTH, "float32"), []
    for part in figures.parts:
        hidden = 2 * LENGTH / (LENGTH + 1) if part.name.endswith("attention scores") else 1
        parts.append(replace(part, flops_per_token=0 if "norm" in part.name else hidden * part.flops_per_token))
    return replace(figures, parts=parts)


@pytest.mark.parametrize("family", ["llama", "olmoe", "deepseek_v3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_of_training_are_what_torch_counts(family, checkpointing):
    model = tiny_vwn(family)
    model.set_attn_implementation("eager")
    if family in MOE_FAMILIES:
        model.set_experts_implementation("eager")
    if checkpointing:
        model.activation_checkpointing_enable()
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        model.train()(tokens(), labels=tokens(), use_cache=False).loss.backward()
    content = recipe({"activation_checkpointing": checkpointing})
    expected = training_flops(counted_parts(model), content, model, False, training_arguments(content))
    assert counter.get_total_flops() / LENGTH == pytest.approx(expected, rel=1e-12)


def test_flops_of_training_only_what_was_added_are_what_torch_counts():
    """Up to the first attention's way back to its inputs, which nothing trained stands before but its connection."""
    model = tiny_vwn("llama")
    model.set_attn_implementation("eager")
    freeze_backbone(model)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        model.train()(tokens(), labels=tokens(), use_cache=False).loss.backward()
    content = recipe(train_only="added")
    expected = training_flops(counted_parts(model), content, model, False, training_arguments(content))
    assert 0.97 * expected < counter.get_total_flops() / LENGTH <= expected


def test_tokens_and_time_follow_from_the_recipe_by_hand():
    devices = Devices(number=8, peak_tflops=100, utilization=0.5, bandwidth=1000)
    entry = estimate(recipe({"gradient_accumulation_steps": 3}), tiny_config("vwn_llama"), devices)
    assert entry.tokens_per_step == 2 * LENGTH * 3 * 8 and entry.tokens == 100 * entry.tokens_per_step
    known = replace(entry, flops_per_token=50e9, moved_per_token=1e9)
    assert known.tokens_per_second == pytest.approx(8 / (1e-3 + 1e-3))
    assert known.seconds == pytest.approx(known.tokens * 2e-3 / 8)
    epochs = {"max_steps": -1, "num_train_epochs": 2}
    open_end = estimate(
        recipe(epochs, data={"train": {"path": "text"}, "sequence_length": LENGTH}), tiny_config("vwn_llama"), devices
    )
    assert open_end.steps is open_end.tokens is open_end.seconds is None


def test_a_backbone_moves_nothing_and_adds_nothing():
    plain, wide = (estimate(recipe(), tiny_config(name), Devices()) for name in ("olmoe", "vwn_olmoe"))
    assert plain.moved_per_token == plain.added_parameters == 0 and plain.name == "backbone"
    assert wide.name == "r = 2" and wide.tokens_per_second < plain.tokens_per_second
    assert wide.parameters - plain.parameters == wide.added_parameters


@pytest.mark.parametrize(("optimizer", "expected"), [("adamw_torch", 800), ("sgd", 0), ("adamw_torch_8bit", 203.125)])
def test_states_of_optimizers(optimizer, expected):
    assert optimizer_bytes([torch.empty(100)], optimizer) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {"optim": "galore_adamw"}}, "training.optim=galore_adamw: the size of its states"),
        ({"training": {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "data": EVALUATED,
          "added": {"warmup_steps": 3}}, "cannot scale"),
        ({"training": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_ratex": 0.1}}},
         "min_lr_ratex"),
        ({"training": {"bf16": True, "fp16": True}}, "fp16 and bf16"),
        ({"training": {"max_steps": -1}}, "training.max_steps is missing"),
        ({"distributed": {"tp_size": 2}}, "distributed.tp_size=2"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_or_estimated_is_refused(change, message, tmp_path):
    tiny_config("vwn_llama").save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=message):
        dry_run(recipe(**change), Devices(), str(tmp_path))


def test_an_evaluation_without_data_is_refused(tmp_path):
    tiny_config("vwn_llama").save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="eval_dataset"):
        dry_run(recipe({"eval_strategy": "steps"}, data={"train": {"path": "text"}}), Devices(), str(tmp_path))


def test_added_settings_of_a_model_that_added_nothing_are_refused(tmp_path):
    tiny_config("llama").save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="no trainable parameters that VWN added"):
        dry_run(recipe(added={"learning_rate": 0.1}), Devices(), str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "vwn_olmoe", "hidden_sise": 32}, "Unknown key config.hidden_sise; did you mean hidden_size?"),
        ({"model_type": "vwn_olmoe"}, "config has no vocab_size"),
    ],
)
def test_a_config_from_scratch_is_checked(config, message):
    with pytest.raises(RecipeError, match=message):
        dry_run(recipe(model=None, config=config, tokenizer="nowhere"), Devices())


def test_a_model_that_is_not_there_yet_is_named_with_the_remedy(tmp_path):
    with pytest.raises(RecipeError, match="--model-config"):
        dry_run(recipe(model=str(tmp_path / "gone")), Devices())
    with pytest.raises(RecipeError, match="there is no such upcycling recipe"):
        dry_run(recipe(), Devices(), widening=str(tmp_path / "*.yaml"))


def written(tmp_path, **training):
    tiny_config("olmoe").save_pretrained(tmp_path / "source")
    for slots in (4, 8):
        content = {"source": str(tmp_path / "source"), "output": "out", "segments": 4, "slots": slots}
        (tmp_path / f"upcycle-{slots}.yaml").write_text(yaml.safe_dump(content))
    content = recipe(training, config={"output_router_logits": True}).model_dump(exclude_unset=True)
    content["training"]["output_dir"] = str(tmp_path / "out")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "train.yaml")


def test_the_command_estimates_widths_side_by_side_and_writes_nothing(tmp_path):
    path = written(tmp_path)
    before = sorted(tmp_path.iterdir())
    options = [
        "--dry-run",
        "--widening",
        str(tmp_path / "upcycle-*.yaml"),
        "--devices",
        "2",
        "--device-memory",
        "0.0001",
    ]
    shown = CliRunner().invoke(app, ["train", path, "training.max_steps=7", *options], env={"COLUMNS": "150"})
    assert shown.exit_code == 0, shown.output
    for text in ("backbone", "r = 1", "r = 2", "7 steps", "Estimates by the formulas", "Warning: r = 2 does not fit"):
        assert text in shown.output
    assert sorted(tmp_path.iterdir()) == before
    table = CliRunner().invoke(app, ["train", path, "--markdown", *options])
    rows = [line.strip("| ").split(" | ") for line in table.output.splitlines()]
    assert rows[0] == ["backbone", "r = 1", "r = 2"] and all(len(row) == 4 for row in rows[1:])
    assert {row[0]: row[1:] for row in rows[2:]}["memory"][2].endswith(" !")


@pytest.mark.parametrize("options", [["--markdown"], ["--widening", "x"], ["--model-config", "x"]])
def test_options_of_the_estimate_are_refused_without_it(options, tmp_path):
    result = CliRunner().invoke(app, ["train", written(tmp_path), *options])
    assert result.exit_code == 2 and "--dry-run" in result.output
