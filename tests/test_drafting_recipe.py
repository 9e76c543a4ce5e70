"""The measurement of drafting runs from its own recipe, shrunk to seconds, and counts what it should."""

import importlib.util
from pathlib import Path

import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from vwn_hf.data import write_standard_library_corpus
from vwn_hf.training import TrainingRecipe, train

FOLDER = Path(__file__).parent.parent / "recipes" / "drafting"


def test_it_trains_and_compares(tmp_path):
    spec = importlib.util.spec_from_file_location("drafting", FOLDER / "run.py")
    drafting = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drafting)
    write_standard_library_corpus(tmp_path / "corpus", vocab_size=300, megabytes=0.3)
    recipe = yaml.safe_load((FOLDER / "pretrain" / "config.yaml").read_text())
    recipe["config"] |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    recipe["tokenizer"] = str(tmp_path / "corpus" / "tokenizer")
    for part, name in (("train", "train"), ("evaluation", "heldout")):
        recipe["data"][part] |= {"data_files": str(tmp_path / "corpus" / f"{name}.jsonl"), "split": "train[:2]"}
    recipe["data"]["sequence_length"] = 64
    recipe["training"] |= {"output_dir": str(tmp_path / "model"), "max_steps": 3, "logging_steps": 1}
    train(TrainingRecipe.model_validate(recipe))
    folder = drafting.train_model(tmp_path)  # finds both, and makes neither again
    assert folder == tmp_path / "model"
    prompts = drafting.heldout_prompts(tmp_path, AutoTokenizer.from_pretrained(folder), number=4, length=10)
    assert [tuple(prompt.shape) for prompt in prompts] == [(1, 10)] * 4
    result = drafting.compare(AutoModelForCausalLM.from_pretrained(folder).eval(), prompts, new_tokens=8)
    assert result["prompts"] == result["same tokens"] == 4 and result["times as fast, median"] > 0
    assert 1 <= result["tokens per step"] <= 3 and len(result["acceptance per depth"]) == 2
