"""Recipes are strict; a run trains, keeps its settings, and can be continued."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_model, tiny_vwn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from vwn_hf import added_parameters, upcycle
from vwn_hf.data import write_standard_library_corpus
from vwn_hf.evaluation import EvaluationRecipe
from vwn_hf.training import AddedParameters, RecipeError, TrainingRecipe, VwnTrainer, read_recipe, train
from vwn_hf.upcycling import UpcyclingRecipe

RECIPES = Path(__file__).parent.parent / "recipes"
SCHEMAS = {
    "pretrain": TrainingRecipe,
    "train": TrainingRecipe,
    "upcycle": UpcyclingRecipe,
    "evaluate": EvaluationRecipe,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_standard_library_corpus(folder, vocab_size=300, megabytes=0.4)
    return folder


def tiny_recipe(corpus, output, **training):
    return {
        "config": {
            "model_type": "vwn_olmoe", "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "vwn_segments": 2, "vwn_slots": 4,
            "output_router_logits": True,
        },
        "tokenizer": str(corpus / "tokenizer"),
        "data": {
            "train": {"path": "json", "data_files": str(corpus / "train.jsonl")},
            "evaluation": {"path": "json", "data_files": str(corpus / "heldout.jsonl"), "split": "train[:2]"},
            "sequence_length": 32,
        },
        "training": {
            "output_dir": str(output), "max_steps": 12, "per_device_train_batch_size": 4,
            "learning_rate": 1e-2, "logging_steps": 4, "per_device_eval_batch_size": 64, "disable_tqdm": True, 
            "save_strategy": "no", "use_cpu": True, **training,
        },
    }  # fmt: skip


def write(folder, content):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*/config.yaml")), ids=lambda path: str(path.parent.name))
def test_every_recipe_of_the_repository_is_valid(path):
    recipe = read_recipe(path, [], SCHEMAS[path.parent.name])
    if getattr(recipe, "config", None):
        config = dict(recipe.config)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    if isinstance(recipe, TrainingRecipe):
        TrainingArguments(**recipe.training)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modell": "x"}, "Unknown key modell; did you mean model?"),
        ({"data.sequence_lenght": 3}, "Unknown key data.sequence_lenght; did you mean sequence_length?"),
        ({"data.train.split_": "x"}, "Unknown key data.train.split_; did you mean split?"),
        ({"data.evaluation.columns": "x"}, "Unknown key data.evaluation.columns"),
        ({"training.lr": 1}, "Unknown key training.lr"),
        ({"added.learning_rat": 1}, "Unknown key added.learning_rat; did you mean learning_rate?"),
        ({"added.learning_rate": -1}, "added.learning_rate: .*got -1"),
        ({"training.learning_rat": 1}, "Unknown key training.learning_rat; did you mean learning_rate?"),
        ({"data.sequence_length": "long"}, "data.sequence_length: .*got 'long'"),
        ({"model": "x"}, "Give either model"),
        ({"config": None}, "Give either model"),
        ({"config": {"hidden_size": 3}}, "config has no model_type"),
        ({"tokenizer": None}, "config without tokenizer"),
    ],
)
def test_a_recipe_with_a_mistake_is_refused_by_name(change, message, corpus, tmp_path):
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in change.items()]
    with pytest.raises(RecipeError, match=message):
        read_recipe(write(tmp_path, tiny_recipe(corpus, tmp_path)), overrides, TrainingRecipe)


@pytest.mark.parametrize("override", ["training.max_steps", "=3", "tokenizer.a=1"])
def test_an_override_that_cannot_be_read_is_refused(override, corpus, tmp_path):
    with pytest.raises(RecipeError, match=r"key=value|no keys below"):
        read_recipe(write(tmp_path, tiny_recipe(corpus, tmp_path)), [override], TrainingRecipe)
    with pytest.raises(FileNotFoundError, match="no recipe"):
        read_recipe(tmp_path / "none.yaml", [], TrainingRecipe)


def test_a_run_learns_and_saves_what_loads_again(corpus, tmp_path):
    output = tmp_path / "out"
    path = write(tmp_path, tiny_recipe(corpus, output))
    recipe = read_recipe(path, ["training.max_steps=30", "training.seed=5"], TrainingRecipe)
    metrics = train(recipe)
    assert metrics["eval_loss"] < 5.2 < torch.tensor(300.0).log()  # ln 300 = 5.7 is where it starts
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()) and model.config.model_type == "vwn_olmoe" and model.config.use_cache
    assert model.model.layers[0].attention_connection.read.proj.any()
    assert yaml.safe_load((output / "recipe.yaml").read_text())["training"]["max_steps"] == 30
    still = {**recipe.training, "max_steps": 1, "learning_rate": 0.0, "output_dir": str(tmp_path / "again")}
    again = train(TrainingRecipe(**{**recipe.model_dump(), "model": str(output), "config": None, "training": still}))
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_a_stopped_run_resumes_where_it_was(corpus, tmp_path):
    whole = train(TrainingRecipe(**tiny_recipe(corpus, tmp_path / "whole", save_strategy="steps", save_steps=6)))
    parts = TrainingRecipe(**tiny_recipe(corpus, tmp_path / "parts", save_strategy="steps", save_steps=6))
    train(parts)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-12")
    resumed = train(parts, resume=True)
    assert resumed["eval_loss"] == whole["eval_loss"]
    with pytest.raises(RecipeError, match="no checkpoint in"):
        train(TrainingRecipe(**tiny_recipe(corpus, tmp_path / "new")), resume=True)


def test_evaluation_loss_leaves_the_router_loss_out(corpus, tmp_path):
    losses = []
    for coefficient in (0.0, 5.0):
        content = tiny_recipe(corpus, tmp_path / "out", max_steps=1, learning_rate=0.0)
        content["config"]["router_aux_loss_coef"] = coefficient
        losses.append(train(TrainingRecipe(**content))["eval_loss"])
    assert losses[0] == losses[1]


def test_a_tokenizer_that_is_too_large_for_the_model_is_refused(corpus, tmp_path):
    content = tiny_recipe(corpus, tmp_path / "out")
    content["config"]["vocab_size"] = 200
    with pytest.raises(RecipeError, match="tokenizer has 300 tokens, the model 200"):
        train(TrainingRecipe(**content))


def test_static_parts_are_not_decayed_and_dynamic_ones_are(corpus, tmp_path):
    trainer = Trainer(tiny_vwn("olmoe"), TrainingArguments(str(tmp_path), use_cpu=True, weight_decay=0.1))
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    connection = [name for name, _ in trainer.model.named_parameters() if "_connection" in name]
    assert connection
    for name in connection:
        assert (name in decayed) == name.endswith((".proj", ".scale")), name


ADDED = re.compile(r"_connection\.|\.norm\.(reduce|group_norm)\.|\.embed_tokens\.(expansion|slot_scale)\.")


@pytest.mark.parametrize("embedding", ["direct", "projected", "scaled_copies"])
def test_what_vwn_added_is_what_the_backbone_does_not_have(embedding):
    model, native = tiny_vwn("olmoe", vwn_embedding=embedding), tiny_model("olmoe")
    backbone = {name for name, _ in native.named_parameters()}
    added = added_parameters(model)
    assert added == [name for name, _ in model.named_parameters() if name not in backbone]
    assert all(ADDED.search(name) for name in added) and added_parameters(native) == []
    model.mtp = torch.nn.Linear(2, 2)
    assert added_parameters(model) == [*added, "mtp.weight", "mtp.bias"]


@pytest.mark.parametrize("settings", [{}, {"learning_rate": 0.05}, {"learning_rate": 0.05, "weight_decay": 0.0}])
def test_each_parameter_is_in_one_group_with_its_rate_and_decay(settings, tmp_path):
    model = tiny_vwn("olmoe", vwn_embedding="scaled_copies")
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=0.01, weight_decay=0.1, adam_beta1=0.8)
    trainer = VwnTrainer(model=model, args=arguments, added=AddedParameters(**settings))
    names, seen = {parameter: name for name, parameter in model.named_parameters()}, []
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            seen.append(name)
            added = bool(ADDED.search(name))
            plain = any(part in name for part in ("bias", "norm."))
            decay = 0.0 if plain else settings.get("weight_decay", 0.1) if added else 0.1
            assert group["lr"] == (settings.get("learning_rate", 0.01) if added else 0.01), name
            assert group["weight_decay"] == decay and group["betas"] == (0.8, 0.999), name
    assert sorted(seen) == sorted(names.values())


def test_the_schedule_scales_each_group_from_its_own_rate(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=0.01, lr_scheduler_type="linear")
    added = AddedParameters(learning_rate=0.05)
    trainer = VwnTrainer(model=tiny_vwn("olmoe"), args=arguments, added=added)
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    assert trainer.lr_scheduler.get_last_lr() == pytest.approx([0.0075, 0.0075, 0.0375, 0.0375])


def test_a_rate_of_zero_leaves_what_vwn_added_where_it_was(corpus, tmp_path):
    path = write(tmp_path, tiny_recipe(corpus, tmp_path / "out", save_strategy="steps", save_steps=6))
    recipe = read_recipe(path, ["added.learning_rate=0", "training.weight_decay=0.1"], TrainingRecipe)
    train(recipe)
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    connection = "model.layers.0.attention_connection."
    assert not state[connection + "read.proj"].any() and torch.equal(state[connection + "carry.bias"], torch.eye(4))
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["added"] == {"learning_rate": 0.0}
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-6").state_dict()
    assert not torch.equal(first["lm_head.weight"], state["lm_head.weight"])


def test_a_run_with_separate_rates_resumes_where_it_was(corpus, tmp_path):
    content = {"added": {"learning_rate": 0.03, "weight_decay": 0.2}}
    recipes = [
        TrainingRecipe(**content, **tiny_recipe(corpus, tmp_path / name, save_strategy="steps", save_steps=6))
        for name in ("whole", "parts")
    ]
    whole, _ = (train(recipe) for recipe in recipes)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-12")
    assert train(recipes[1], resume=True)["eval_loss"] == whole["eval_loss"]


def test_separate_rates_that_reach_nothing_are_refused(corpus, tmp_path):
    content = tiny_recipe(corpus, tmp_path / "out") | {"added": {"learning_rate": 0.03}}
    native = {key: value for key, value in content["config"].items() if not key.startswith("vwn_")}
    with pytest.raises(RecipeError, match="no trainable parameters that VWN added"):
        train(TrainingRecipe(**{**content, "config": native | {"model_type": "olmoe"}}))


def test_an_upcycled_checkpoint_trains_on(corpus, tmp_path):
    content = tiny_recipe(corpus, tmp_path / "base")
    content["config"] = {k: v for k, v in content["config"].items() if not k.startswith("vwn_")} | {
        "model_type": "olmoe"
    }
    base = train(TrainingRecipe(**content))
    upcycle(tmp_path / "base", tmp_path / "vwn", segments=2, slots=4)
    content |= {"config": None, "model": str(tmp_path / "vwn")}
    content["training"] |= {
        "output_dir": str(tmp_path / "on"),
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": 12,
    }
    after = train(TrainingRecipe(**content))
    assert after["eval_loss"] < base["eval_loss"]
