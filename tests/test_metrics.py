"""Metrics are what one gets by hand, and as lm-eval's, however the text is cut."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_vwn
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import vwn_hf.metrics
from vwn_hf.metrics import (
    BitsPerByte,
    Curve,
    NextTwoTokenLoss,
    Perplexity,
    TokenEfficiency,
    efficiency,
    efficiency_curve,
    mean_efficiency,
    next_two_token_losses,
    rolling_nll,
    rolling_windows,
)
from vwn_hf.multi_token_prediction import IGNORED
from vwn_hf.packing import Packer

METRICS = (Perplexity, BitsPerByte, NextTwoTokenLoss, TokenEfficiency)
TEXTS = ["def häuser(n):\n    return '→' * n\n", "", "x = 1\n", Path(json.__file__).read_text()[:700]]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file):
    return PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_vwn("olmoe", vocab_size=len(tokenizer))


@pytest.fixture(autouse=True)
def metrics_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))


# --- the metrics ---


def test_perplexity_by_hand():
    # two documents of likelihoods 1/2, 1/4 and 1/8, 1/8, 1/2: ln 2 · (1+2+3+3+1) = 10 ln 2 over 5 tokens
    ln2 = math.log(2)
    result = Perplexity().compute(nll=[3 * ln2, 7 * ln2], tokens=[2, 3])
    assert result == {"perplexity": pytest.approx(4.0), "loss": pytest.approx(2 * ln2), "tokens": 5}


def test_bits_per_byte_by_hand():
    # the same 10 bits over "naïve →" (7 characters, 10 bytes) and over it twice
    byte_count = len("naïve →".encode())
    assert byte_count == 10
    bits = [10 * math.log(2)]
    assert BitsPerByte().compute(nll=bits, bytes=[byte_count]) == {"bits_per_byte": pytest.approx(1.0), "bytes": 10}
    assert BitsPerByte().compute(nll=bits, bytes=[2 * byte_count])["bits_per_byte"] == pytest.approx(0.5)


def test_next_two_token_loss_weighs_batches_by_their_targets():
    result = NextTwoTokenLoss().compute(loss=[2.0, 5.0], targets=[9, 1])
    assert result == {"next_two_token_loss": pytest.approx(2.3), "targets": 10}


def test_token_efficiency_by_hand():
    # the baseline ends at 2.0 after 400 tokens; the run has 2.5 at 100 and 1.5 at 400, so 2.0 at 100 · 4^(1/2) = 200
    curves = {"tokens": [[100, 400]], "losses": [[2.5, 1.5]]}
    baseline = {"baseline_tokens": [[100, 200, 400]], "baseline_losses": [[4.0, 3.0, 2.0]]}
    result = TokenEfficiency().compute(**curves, **baseline)
    expected = {"token_efficiency": 2.0, "lower_bound": 2.0, "upper_bound": 2.0, "by_pair": [2.0]}
    assert result == {key: pytest.approx(value) for key, value in expected.items()}
    metric = TokenEfficiency()
    metric.add(**{key: value[0] for key, value in {**curves, **baseline}.items()})
    metric.add(tokens=[1, 4], losses=[3.0, 2.0], baseline_tokens=[1, 2], baseline_losses=[3.0, 2.0])
    result = metric.compute()
    assert result["by_pair"] == pytest.approx([2.0, 0.5]) and result["token_efficiency"] == pytest.approx(1.0)
    assert TokenEfficiency().compute(**curves, **baseline, loss_level=2.5)["by_pair"] == pytest.approx([2**1.5])


@pytest.mark.parametrize("in_memory", [False, True])
def test_batches_added_one_by_one_give_what_all_at_once_give(in_memory):
    nll, tokens = np.random.default_rng(0).uniform(5, 50, 12), np.arange(1, 13)
    metric = Perplexity(keep_in_memory=in_memory)
    metric.add_batch(nll=torch.tensor(nll[:5]), tokens=torch.tensor(tokens[:5]))
    metric.add_batch(nll=nll[5:11], tokens=tokens[5:11])
    metric.add(nll=nll[11], tokens=12)
    expected = math.exp(nll.sum() / tokens.sum())
    assert metric.compute()["perplexity"] == pytest.approx(expected, rel=1e-12)
    assert Perplexity().compute(nll=nll, tokens=tokens)["perplexity"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"nll": [1.0]}, "Perplexity: tokens missing; it takes nll, tokens"),
        ({"nll": [1.0], "tokens": [0]}, "tokens: they sum to 0"),
        ({"nll": [float("nan")], "tokens": [1]}, "nll=nan is not a finite number"),
        ({"nll": [-1.0], "tokens": [1]}, r"nll=-1.0 is not"),
        ({"nll": [1.0], "tokens": [-2]}, "tokens=-2 is not"),
        ({"nll": [1.0, 2.0], "tokens": [1]}, "Mismatch in the number"),
    ],
)
def test_columns_that_say_nothing_are_refused_and_the_metric_goes_on(columns, message):
    metric = Perplexity(keep_in_memory=True)
    with pytest.raises(ValueError, match=message):
        metric.compute(**columns)
    assert Perplexity().compute(nll=[0.0], tokens=[1])["perplexity"] == 1.0


def test_every_metric_has_a_description_a_citation_and_named_columns():
    for metric in METRICS:
        info = metric()
        assert "eprint=" in info.citation or "journal=" in info.citation
        assert info.description and all(name in info.inputs_description for name in info.features)
        assert info.module_type == "metric" and metric.__doc__


def test_importing_the_package_imports_no_metrics():
    code = "import sys, vwn_hf; assert not {'evaluate', 'torch', 'vwn_hf.metrics'} & {*sys.modules}; print('lazy')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "lazy\n"


def test_without_evaluate_only_the_metrics_are_missing_and_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    spec = importlib.util.spec_from_file_location("vwn_hf.metrics_without_evaluate", vwn_hf.metrics.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    curve = module.Curve([1, 2], [2, 1])
    assert module.efficiency(curve, curve).value == 1
    with pytest.raises(ImportError, match=r"Perplexity needs evaluate: pip install 'vwn-hf\[eval\]'"):
        module.Perplexity()


# --- likelihoods of texts ---


def test_a_text_in_one_window_has_the_likelihood_of_its_logits(model, tokenizer):
    sums = rolling_nll(model, tokenizer, TEXTS, context_length=1024)
    for number, text in enumerate(TEXTS):
        ids = tokenizer(text).input_ids
        inputs = torch.tensor([[tokenizer.eos_token_id, *ids]])
        with torch.no_grad():
            scores = model(inputs).logits[0].double().log_softmax(-1)
        expected = -sum(scores[place, token].item() for place, token in enumerate(ids))
        assert sums["nll"][number] == pytest.approx(expected, rel=1e-5, abs=0)
        assert (sums["tokens"][number], sums["bytes"][number]) == (len(ids), len(text.encode()))


@pytest.mark.parametrize("length", [16, 37])
def test_rolling_likelihoods_are_those_of_lm_eval(model, tokenizer, length):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    texts = [text for text in TEXTS if text]
    reference = HFLM(pretrained=model, tokenizer=tokenizer, max_length=length, batch_size=4)
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    expected = [-value for value in reference.loglikelihood_rolling(requests, disable_tqdm=True)]
    sums = rolling_nll(model, tokenizer, texts, context_length=length, batch_size=3)
    assert sums["nll"] == pytest.approx(expected, rel=1e-5)
    assert BitsPerByte().compute(nll=sums["nll"], bytes=sums["bytes"])["bits_per_byte"] == pytest.approx(
        sum(expected) / math.log(2) / sum(len(text.encode()) for text in texts), rel=1e-5
    )


@settings(deadline=None, max_examples=60)
@given(count=st.integers(0, 60), length=st.integers(1, 12), data=st.data())
def test_windows_are_lm_evals_and_predict_each_token_once(count, length, data):
    from lm_eval.utils import get_rolling_token_windows

    stride = data.draw(st.integers(1, length))
    tokens = list(range(100, 100 + count))
    windows = list(rolling_windows(tokens, 7, length, stride))
    assert windows == list(get_rolling_token_windows(tokens, 7, length, length - stride + 1))
    assert [token for _, targets in windows for token in targets] == tokens
    for inputs, targets in windows:
        assert len(inputs) <= length and [*inputs[1:], targets[-1]][-len(targets) :] == targets


def test_batch_size_changes_nothing_and_more_context_is_another_likelihood(model, tokenizer):
    one, many = (rolling_nll(model, tokenizer, TEXTS, 24, batch_size=size)["nll"] for size in (1, 7))
    assert one == pytest.approx(many, rel=1e-5)
    assert rolling_nll(model, tokenizer, TEXTS, 24, stride=4)["nll"][3] != pytest.approx(one[3], rel=1e-3)


def test_the_likelihood_leaves_the_model_in_its_mode_and_refuses_what_cannot_be(model, tokenizer):
    model.train()
    rolling_nll(model, tokenizer, TEXTS[2:3])
    assert model.training and not any(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    with pytest.raises(ValueError, match="stride=9 is not from 1 to context_length=8"):
        rolling_nll(model, tokenizer, TEXTS, context_length=8, stride=9)
    with pytest.raises(ValueError, match="neither bos_token nor eos_token"):
        rolling_nll(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer), TEXTS)
    broken = tiny_model("olmoe", vocab_size=len(tokenizer))
    broken.lm_head.weight.data[5] = float("nan")
    with pytest.raises(ValueError, match="Text number 0 has a negative log-likelihood of nan"):
        rolling_nll(broken, tokenizer, TEXTS)


def test_next_two_token_loss_is_the_mean_over_every_target_of_all_blocks(tokenizer):
    model = tiny_vwn("olmoe", vocab_size=len(tokenizer), num_mtp_layers=1)
    texts = ["a = 1\n", Path(json.__file__).read_text()[:2000], *(f"def f{n}(x): return x + {n}\n" for n in range(40))]
    documents = [tokenizer(text).input_ids for text in texts]
    blocks = Dataset.from_dict(Packer(32).add(zip(documents, documents, strict=True)))
    sums = next_two_token_losses(model, blocks, batch_size=5)
    assert len({*sums["targets"]}) > 1  # so that the mean over batches is another number
    result = NextTwoTokenLoss().compute(**sums)

    caught = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, logits: caught.append(logits))
    total = count = 0
    for block in blocks:
        labels, places = block["labels"], block["position_ids"]
        batch = {name: torch.tensor([block[name]]) for name in ("input_ids", "labels", "position_ids")}
        caught.clear()
        with torch.no_grad():
            model(**batch, use_cache=False)  # with a cache, attention would cross documents
        scores = caught[-1][0].double().log_softmax(-1)  # the module's, which come after the stack's
        for i in range(len(labels) - 2):
            if labels[i + 2] != IGNORED and places[i + 2] == places[i] + 2:
                total, count = total - scores[i, labels[i + 2]].item(), count + 1
    hook.remove()
    assert result["targets"] == count
    assert result["next_two_token_loss"] == pytest.approx(total / count, rel=1e-5)
    with pytest.raises(ValueError, match="num_mtp_layers=0"):
        next_two_token_losses(tiny_vwn("olmoe"), blocks)


# --- efficiency ---


def power_law(tokens, exponent, scale=1.0):
    tokens = np.asarray(tokens, dtype=float)
    return Curve(tokens, 2.0 - exponent * np.log(tokens * scale))


def test_a_run_that_is_twice_as_fast_has_efficiency_two_at_every_loss():
    tokens = np.geomspace(1e3, 1e6, 13)
    baseline, run = power_law(tokens, 0.1), power_law(tokens, 0.1, scale=2)
    assert efficiency(run, baseline).value == pytest.approx(2)
    levels, values = efficiency_curve(run, baseline)
    assert len(levels) > 12 and values == pytest.approx(2) and (np.diff(levels) < 0).all()
    assert efficiency(baseline, run, loss=baseline.losses[-1]).value == pytest.approx(0.5)


@given(st.lists(st.floats(0.5, 9), min_size=2, max_size=20), st.floats(0.01, 100))
def test_a_run_against_itself_has_one_and_the_unit_does_not_matter(losses, unit):
    tokens = np.arange(1, len(losses) + 1)
    curve, scaled = Curve(tokens, losses), Curve(tokens * unit, losses)
    assert efficiency(curve, curve).value == 1
    assert efficiency(scaled, curve).value == pytest.approx(1 / unit)
    assert (efficiency_curve(curve, curve)[1] == 1).all()


def test_noise_after_the_least_loss_does_not_count():
    baseline = Curve([1, 2, 4, 8], [4, 2, 3, 2.5])
    assert baseline.envelope.tolist() == [4, 2, 2, 2]
    result = efficiency(Curve([1, 2, 4, 8], [4, 3, 5, 2]), baseline)
    assert (result.loss, result.value) == (2, 0.25)


def test_a_run_that_never_gets_there_has_an_upper_bound():
    result = efficiency(Curve([1, 2, 4], [4, 3, 2.5]), Curve([1, 2, 4], [4, 3, 2]))
    assert math.isnan(result.value) and (result.lower, result.upper) == (0, 1) and str(result) == "< 1.00×"


def test_a_run_that_begins_below_has_a_lower_bound():
    result = efficiency(Curve([2, 4], [1.5, 1]), Curve([1, 2, 8], [4, 3, 2]))
    assert math.isnan(result.value) and (result.lower, result.upper) == (4, np.inf) and str(result) == "> 4.00×"
    at_once = efficiency(Curve([0, 4], [2.0, 1]), Curve([0, 8], [3.0, 2]))
    assert at_once.value == np.inf and str(at_once) == "∞"


def test_from_a_point_at_nothing_spent_loss_is_linear():
    assert Curve([0, 10], [3, 1]).spent_at(2) == (5, 5)
    assert Curve([1, 100], [3, 1]).spent_at(2) == pytest.approx((10, 10))


def test_losses_that_were_not_both_reached_have_no_efficiency():
    levels, values = efficiency_curve(Curve([1, 2], [9, 8]), Curve([1, 2], [3, 2]))
    assert not len(levels) and not len(values)


def test_the_mean_over_pairs_is_geometric_with_its_error():
    def pair(fewer):
        return efficiency(Curve([1, 8 / fewer], [3, 2]), Curve([1, 8], [3, 2]))

    mean = mean_efficiency([pair(2), pair(4)])
    assert mean.value == pytest.approx(8**0.5)
    assert mean.error == pytest.approx(8**0.5 * math.log(2) / 2)  # two logarithms ln 2 apart: half of that
    assert str(mean) == "2.828× ± 0.980"
    short = efficiency(Curve([1, 2], [3, 2.5]), Curve([1, 8], [3, 2]))
    mixed = mean_efficiency([pair(4), short])
    assert math.isnan(mixed.value) and (mixed.lower, mixed.upper) == (0, pytest.approx(4)) and str(mixed) == "< 4.00×"


@pytest.mark.parametrize(
    ("spent", "losses", "message"),
    [
        ([1, 2], [1.0], "give as many of each"),
        ([], [], "give as many of each"),
        ([1, 2], [1.0, float("nan")], "NaN or infinite"),
        ([2, 1], [1.0, 2.0], "must rise"),
        ([-1, 1], [1.0, 2.0], "from 0 or more"),
    ],
)
def test_curves_that_are_none_are_refused(spent, losses, message):
    with pytest.raises(ValueError, match=message):
        Curve(spent, losses)
