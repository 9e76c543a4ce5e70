"""Recipes are strict; a run trains, keeps its settings, and can be continued."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from vwn_hf import upcycle
from vwn_hf.data import write_standard_library_corpus
from vwn_hf.evaluation import EvaluationRecipe
from vwn_hf.training import RecipeError, TrainingRecipe, read_recipe, train
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
    from conftest import tiny_vwn

    trainer = Trainer(tiny_vwn("olmoe"), TrainingArguments(str(tmp_path), use_cpu=True, weight_decay=0.1))
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    connection = [name for name, _ in trainer.model.named_parameters() if "_connection" in name]
    assert connection
    for name in connection:
        assert (name in decayed) == name.endswith((".proj", ".scale")), name


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
