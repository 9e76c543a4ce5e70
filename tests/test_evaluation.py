"""lm-eval through our command, on a task made from real text."""

import argparse  # noqa: F401  a text
import ast  # noqa: F401  a text
import json
import subprocess
import sys
import typing  # noqa: F401  a text
from pathlib import Path

import pytest
from conftest import tiny_vwn
from transformers import PreTrainedTokenizerFast

from vwn_hf.evaluation import EvaluationRecipe, evaluate, results_table, write_continuation_task


def source_texts():
    return [
        Path(sys.modules[name].__file__).read_text() for name in ("argparse", "json", "subprocess", "typing", "ast")
    ]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    texts = source_texts()
    return write_continuation_task(texts, tmp_path_factory.mktemp("task"), "tiny_continuation", items=12, context=60)


@pytest.fixture
def checkpoint(tokenizer_file, tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token="<|endoftext|>")
    tiny_vwn("olmoe", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_task_holds_one_true_continuation_per_item(task):
    sources = source_texts()
    for line in (task / "tiny_continuation.jsonl").read_text().splitlines():
        item = json.loads(line)
        assert len(item["choices"]) == 4
        true = [any(item["context"] + choice in text for text in sources) for choice in item["choices"]]
        assert true[item["label"]]


def test_scores_agree_with_log_likelihoods_taken_by_hand(task, checkpoint, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = EvaluationRecipe(
        checkpoints=[checkpoint], tasks=["tiny_continuation"], include_path=str(task), output=str(tmp_path / "r.json")
    )
    results = evaluate(recipe)
    accuracy = results[checkpoint]["tiny_continuation"]["acc,none"]

    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    right = []
    for line in (task / "tiny_continuation.jsonl").read_text().splitlines():
        item, scores = json.loads(line), []
        for choice in item["choices"]:
            start = len(tokenizer(item["context"]).input_ids)
            ids = torch.tensor([tokenizer(item["context"] + choice).input_ids])
            with torch.no_grad():
                logs = model(ids).logits[0].log_softmax(-1)
            scores.append(sum(logs[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])))
        right.append(scores.index(max(scores)) == item["label"])
    assert accuracy == pytest.approx(sum(right) / len(right), abs=1 / 12 + 1e-6)  # one tie or token border may differ
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(results, default=str))
    assert results_table(results).row_count == 2


def test_unknown_tasks_are_named(task, checkpoint):
    with pytest.raises(ValueError, match="no task 'nothing_here'"):
        evaluate(EvaluationRecipe(checkpoints=[checkpoint], tasks=["nothing_here"], include_path=str(task)))


def test_without_lm_eval_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from vwn_hf.evaluation import *\n"
        "evaluate(EvaluationRecipe(checkpoints=['x'], tasks=['y']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode and "pip install 'vwn-hf[eval]'" in result.stderr


def test_too_few_documents_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 4 documents"):
        write_continuation_task(["short"] * 9, tmp_path, "x", items=1)
