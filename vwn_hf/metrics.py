"""Metrics as `evaluate.Metric` classes that need no Hub, and the functions that feed them.

    sums = rolling_nll(model, tokenizer, texts)
    Perplexity().compute(nll=sums["nll"], tokens=sums["tokens"])
    BitsPerByte().compute(nll=sums["nll"], bytes=sums["bytes"])
    NextTwoTokenLoss().compute(**next_two_token_losses(model, blocks))

All but token efficiency are quotients of sums, so that they are exact however the text is cut into documents and
batches, each of which may be added by itself (`add_batch`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .multi_token_prediction import IGNORED, mtp_targets, next_token_labels

try:
    from evaluate import Metric, MetricInfo
except ImportError:  # it is an extra, which only the classes need

    class Metric:
        def __init__(self, *args, **kwargs):
            raise ImportError(f"{type(self).__name__} needs evaluate: pip install 'vwn-hf[eval]'")


JELINEK = """@article{jelinek1977perplexity,
  title={Perplexity---a measure of the difficulty of speech recognition tasks},
  author={Jelinek, Fred and Mercer, Robert L. and Bahl, Lalit R. and Baker, James K.},
  journal={The Journal of the Acoustical Society of America}, volume={62}, number={S1}, pages={S63}, year={1977}
}"""
PILE = """@misc{gao2020pile,
  title={The {Pile}: An 800GB Dataset of Diverse Text for Language Modeling},
  author={Gao, Leo and Biderman, Stella and Black, Sid and others},
  year={2020}, eprint={2101.00027}, archivePrefix={arXiv}
}"""
VIRTUAL_WIDTH_NETWORKS = """@misc{virtual_width_networks,
  title={Virtual Width Networks}, year={2025}, eprint={2511.11238}, archivePrefix={arXiv}
}"""


# --- the metrics ---


class CheckedMetric(Metric):
    """A metric that says which of its columns is missing."""

    def add_batch(self, **columns):
        """Add documents or batches, an entry of each column for each."""
        names = self._feature_names()
        missing = [name for name in names if columns.get(name) is None]
        if missing:
            raise ValueError(f"{type(self).__name__}: {', '.join(missing)} missing; it takes {', '.join(names)}.")
        super().add_batch(**columns)


def column_sum(name: str, values: list[float]) -> float:
    """Sum in float64; no entry may be negative, NaN or infinite."""
    for value in values:
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}={value} is not a finite number of at least 0.")
    return float(np.sum(values, dtype=np.float64))


def count_sum(name: str, values: list[int]) -> int:
    total = int(column_sum(name, values))
    if total == 0:
        raise ValueError(f"{name}: they sum to 0, so there is nothing to take a mean over.")
    return total


class Perplexity(CheckedMetric):
    """exp(Σ nll / Σ tokens): perplexity per token of the model's own tokenizer.

    Models with different tokenizers cannot be compared by it; `BitsPerByte` can.
    """

    def _info(self):
        return MetricInfo(
            description="Perplexity per token, exp(sum of nll / number of tokens), exact over documents and batches.",
            citation=JELINEK,
            inputs_description="nll: sums of the tokens' negative log-likelihoods in nats; tokens: how many in each.",
            features=Features({"nll": Value("float64"), "tokens": Value("int64")}),
            reference_urls=["https://doi.org/10.1121/1.2016299"],
        )

    def _compute(self, nll, tokens):
        total, count = column_sum("nll", nll), count_sum("tokens", tokens)
        return {"perplexity": float(np.exp(total / count)), "loss": total / count, "tokens": count}


class BitsPerByte(CheckedMetric):
    """Σ nll / (ln 2 · Σ bytes), bytes in UTF-8: independent of the tokenizer (arXiv:2101.00027, section 3.1)."""

    def _info(self):
        return MetricInfo(
            description="Bits per UTF-8 byte of text, sum of nll / (ln 2 * bytes): independent of the tokenizer.",
            citation=PILE,
            inputs_description="nll: negative log-likelihoods of whole texts in nats; bytes: their lengths in UTF-8.",
            features=Features({"nll": Value("float64"), "bytes": Value("int64")}),
            reference_urls=["https://arxiv.org/abs/2101.00027"],
        )

    def _compute(self, nll, bytes):
        total, count = column_sum("nll", nll), count_sum("bytes", bytes)
        return {"bits_per_byte": total / (float(np.log(2)) * count), "bytes": count}


class NextTwoTokenLoss(CheckedMetric):
    """Σ loss · targets / Σ targets: mean cross-entropy of the token after the next, in nats per target.

    That is the loss of the first MTP module (arXiv:2511.11238, section 3.5). The Trainer's `eval_mtp_loss_1` is the
    mean over batches instead, which is the same only if all batches have as many targets.
    """

    def _info(self):
        return MetricInfo(
            description="Cross-entropy of the token after the next, mean over all its targets.",
            citation=VIRTUAL_WIDTH_NETWORKS,
            inputs_description="loss: mean of a batch over its own targets, mtp_losses[0]; targets: how many.",
            features=Features({"loss": Value("float64"), "targets": Value("int64")}),
            reference_urls=["https://arxiv.org/abs/2511.11238"],
        )

    def _compute(self, loss, targets):
        count = count_sum("targets", targets)
        total = column_sum("loss", [mean * number for mean, number in zip(loss, targets, strict=True)])
        return {"next_two_token_loss": total / count, "targets": count}


class TokenEfficiency(CheckedMetric):
    """How many times fewer tokens a run needs to reach its baseline's final loss; see `efficiency`.

    Each entry is a pair of curves, such as a seed's; the result is their geometric mean, with its bounds (equal to it
    where every pair's is observed; otherwise `token_efficiency` is NaN).
    """

    def _info(self):
        curve = List(Value("float64"))
        names = ("tokens", "losses", "baseline_tokens", "baseline_losses")
        return MetricInfo(
            description="Tokens that the baseline needs for its final loss, over those that a run needs for that loss.",
            citation=VIRTUAL_WIDTH_NETWORKS,
            inputs_description=(
                "tokens, losses: a run's curve; baseline_tokens, baseline_losses: the other's; "
                "loss_level: to be reached, in place of the baseline's final loss."
            ),
            features=Features(dict.fromkeys(names, curve)),
            reference_urls=["https://arxiv.org/abs/2511.11238"],
        )

    def _compute(self, tokens, losses, baseline_tokens, baseline_losses, loss_level=None):
        curves = zip(tokens, losses, baseline_tokens, baseline_losses, strict=True)
        pairs = [efficiency(Curve(*curve[:2]), Curve(*curve[2:]), loss_level) for curve in curves]
        mean = mean_efficiency(pairs)
        return {
            "token_efficiency": mean.value, "lower_bound": mean.lower, "upper_bound": mean.upper,
            "by_pair": [pair.value for pair in pairs],
        }  # fmt: skip


# --- what feeds them ---


@torch.no_grad()
def rolling_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    context_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> dict[str, list]:
    """Negative log-likelihood of whole texts, every token counted once, in rolling windows as lm-eval's.

    A text's first token is predicted from the tokenizer's begin (or else end) token, so that no byte goes without.

    Args:
        context_length: most tokens that the model reads at once; default: its `max_position_embeddings`.
        stride: tokens that a window after the first adds; default: `context_length`, windows that do not overlap, as
            in lm-eval's perplexity tasks. Smaller ones give each token more context, at more cost.
        batch_size: windows in a batch.
    Returns:
        {"nll": nats, "tokens": count, "bytes": count in UTF-8}, each a list with an entry for each text.
    Raises:
        ValueError: of sizes that do not fit, a tokenizer without such a token, or a likelihood that is not finite.
    """
    length = context_length or getattr(model.config, "max_position_embeddings", None)
    if length is None:
        raise ValueError("The model's config has no max_position_embeddings: give context_length.")
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(f"stride={stride} is not from 1 to context_length={length}.")
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix is None:
        raise ValueError("The tokenizer has neither bos_token nor eos_token to predict a text's first token from.")
    sums = {"nll": [], "tokens": [], "bytes": []}

    def windows() -> Iterator[tuple[int, list[int], list[int]]]:
        for number, text in enumerate(texts):
            tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for name, value in (("nll", 0.0), ("tokens", len(tokens)), ("bytes", len(text.encode()))):
                sums[name].append(value)
            for inputs, targets in rolling_windows(tokens, prefix, length, stride):
                yield number, inputs, targets

    with evaluating(model):
        for batch in batches(windows(), batch_size):
            for (number, *_), nll in zip(batch, nll_of_windows(model, batch), strict=True):
                if not np.isfinite(nll):
                    raise ValueError(f"Text number {number} has a negative log-likelihood of {nll}.")
                sums["nll"][number] += nll
    return sums


def rolling_windows(tokens: list[int], prefix: int, length: int, stride: int) -> Iterator[tuple[list, list]]:
    """(inputs, targets) of windows of at most `length` inputs; targets are what follows the last inputs.

    The first window predicts up to `length` tokens, each further one up to `stride`, with the inputs filled up by
    what comes before: lm-eval's `get_rolling_token_windows` with context_len = length - stride + 1.
    """
    if tokens:
        first = tokens[:length]
        yield [prefix, *first[:-1]], first
    for begin in range(length, len(tokens), stride):
        end = min(begin + stride, len(tokens))
        yield tokens[end - length - 1 : end - 1], tokens[begin:end]


def nll_of_windows(model: PreTrainedModel, batch: list[tuple[int, list[int], list[int]]]) -> list[float]:
    """Summed over each window's targets, in nats, from logits in float32."""
    width = max(len(inputs) for _, inputs, _ in batch)
    input_ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, (_, inputs, _) in enumerate(batch):
        input_ids[row, : len(inputs)] = torch.tensor(inputs)
        mask[row, : len(inputs)] = 1
    logits = model(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
    sums = []
    for row, (_, inputs, targets) in enumerate(batch):
        scores = logits[row, len(inputs) - len(targets) : len(inputs)].float()
        nll = F.cross_entropy(scores, torch.tensor(targets, device=scores.device), reduction="none")
        sums.append(nll.double().sum().item())
    return sums


@torch.no_grad()
def next_two_token_losses(model: PreTrainedModel, blocks: Dataset, batch_size: int = 8) -> dict[str, list]:
    """Loss of a model's first MTP module on rows of tokens, as recipes' data gives: input of `NextTwoTokenLoss`.

    Args:
        blocks: columns input_ids and labels, and position_ids or attention_mask where they say what belongs together.
    Returns:
        {"loss": mean of each batch over its own targets, "targets": how many}; batches without targets left out.
    Raises:
        ValueError: the model has no MTP modules.
    """
    if not getattr(model.config, "num_mtp_layers", 0) or not hasattr(model, "mtp"):
        raise ValueError("The model has no modules of multi-token prediction (num_mtp_layers=0), so no such loss.")
    columns = {"input_ids", "labels", "position_ids", "attention_mask"} & {*blocks.column_names}
    sums = {"loss": [], "targets": []}
    with evaluating(model):
        for batch in blocks.select_columns(sorted(columns)).with_format("torch").iter(batch_size):
            batch = {name: column.to(model.device) for name, column in batch.items()}
            next_tokens = next_token_labels(batch["labels"])
            targets = mtp_targets(next_tokens, 1, batch.get("position_ids"), batch.get("attention_mask"))
            count = int((targets != IGNORED).sum())
            if count:  # with a cache, transformers' attention would cross documents
                sums["loss"].append(model(**batch, use_cache=False).mtp_losses[0].item())
                sums["targets"].append(count)
    return sums


class evaluating:
    """A model in evaluation mode for a while."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *error) -> None:
        self.model.train(self.training)


def batches(items: Iterator, size: int) -> Iterator[list]:
    while batch := list(islice(items, size)):
        yield batch


# --- efficiency: what two runs spend on the same loss ---


@dataclass(frozen=True)
class Curve:
    """Losses that a run logged, over what it had spent by then: tokens, seconds or FLOPs.

    Raises:
        ValueError: lengths differ, a value is not finite, or `spent` does not rise from 0 or more.
    """

    spent: np.ndarray
    losses: np.ndarray

    def __post_init__(self):
        spent, losses = (np.asarray(values, dtype=np.float64) for values in (self.spent, self.losses))
        object.__setattr__(self, "spent", spent)
        object.__setattr__(self, "losses", losses)
        if spent.ndim != 1 or spent.shape != losses.shape or not spent.size:
            raise ValueError(f"A curve has {spent.shape} points spent and {losses.shape} losses: give as many of each.")
        if not (np.isfinite(spent).all() and np.isfinite(losses).all()):
            raise ValueError("A curve has a NaN or infinite point; leave out what a run logged after it diverged.")
        if spent[0] < 0 or (np.diff(spent) <= 0).any():
            raise ValueError("What a curve has spent must rise from one point to the next, from 0 or more.")

    @property
    def envelope(self) -> np.ndarray:
        """The least loss so far at each point."""
        return np.minimum.accumulate(self.losses)

    def spent_at(self, loss: float) -> tuple[float, float]:
        """(least, most) spent when the envelope first comes down to `loss`; the two are equal within the curve.

        Between two points, loss is linear in the logarithm of what was spent (in itself, from a point at 0).
        """
        envelope = self.envelope
        if envelope[-1] > loss:
            return self.spent[-1], np.inf
        after = int(np.argmax(envelope <= loss))
        if envelope[after] == loss:
            return self.spent[after], self.spent[after]
        if after == 0:
            return 0.0, self.spent[0]
        share = (envelope[after - 1] - loss) / (envelope[after - 1] - envelope[after])
        begin, end = self.spent[after - 1], self.spent[after]
        spent = begin * (end / begin) ** share if begin else end * share
        return spent, spent


@dataclass(frozen=True)
class Efficiency:
    """How many times less a run spent than its baseline to reach `loss`.

    `value` is NaN where the curves do not show it; it lies between `lower` and `upper` then, and equals both otherwise.
    `error` is the standard error of a mean over pairs of runs, NaN for one pair.
    """

    loss: float
    value: float
    lower: float
    upper: float
    error: float = np.nan

    def __str__(self) -> str:
        if self.value == np.inf:
            return "∞"
        if np.isfinite(self.value):
            return f"{self.value:.3f}× ± {self.error:.3f}" if np.isfinite(self.error) else f"{self.value:.2f}×"
        if np.isfinite(self.upper):
            return f"< {self.upper:.2f}×"
        return f"> {self.lower:.2f}×" if self.lower > 0 else "unknown"


def efficiency(run: Curve, baseline: Curve, loss: float | None = None) -> Efficiency:
    """What the baseline spent to reach a loss, over what the run spent to reach it.

        spent_baseline(loss) / spent_run(loss),     spent(loss): when the running minimum first comes down to it

    Over tokens, 2.5 says that the run got there with 2.5 times fewer (the headline of arXiv:2511.11238); a run against
    itself has 1. A run that never gets there has the upper bound spent_baseline(loss) / all that the run spent. A run
    whose first logged loss is lower already has a lower bound.

    Two conditions on the curves. Both runs should have the same learning-rate schedule over the same tokens. Loss falls
    fastest while the rate is annealed: a run that reaches the loss early does so at a high rate, so its efficiency is
    less than one with a schedule that ends there would have; against a baseline that was never annealed it is too
    large. And the running minimum of noisy losses comes too early: smooth training losses, or take evaluations'.

    Args:
        loss: to be reached; default: the least loss of the baseline.
    """
    level = float(baseline.envelope[-1] if loss is None else loss)
    least, most = baseline.spent_at(level)
    run_least, run_most = run.spent_at(level)
    lower, upper = quotient(least, run_most), quotient(most, run_least)
    return Efficiency(level, upper if lower == upper else np.nan, lower, upper)


def quotient(dividend: float, divisor: float) -> float:
    """Of numbers from 0 to ∞; 0/0 and ∞/∞ are NaN."""
    if dividend == divisor and dividend in (0, np.inf):
        return np.nan
    return float(dividend / divisor) if divisor else np.inf


def efficiency_curve(run: Curve, baseline: Curve) -> tuple[np.ndarray, np.ndarray]:
    """(losses, efficiencies) at every loss that either logged and both reached within their curves, falling.

    Empty if there is none.
    """
    highest = min(run.losses[0], baseline.losses[0])
    lowest = max(run.envelope[-1], baseline.envelope[-1])
    levels = np.unique(np.concatenate([run.envelope, baseline.envelope]))[::-1]
    levels = levels[(levels <= highest) & (levels >= lowest)]
    values = np.array([efficiency(run, baseline, level).value for level in levels])
    shown = np.isfinite(values)
    return levels[shown], values[shown]


def mean_efficiency(pairs: list[Efficiency]) -> Efficiency:
    """Geometric mean over pairs of runs, of values and of bounds, with the standard error of the values' mean."""

    def mean(values: list[float]) -> float:
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.exp(np.mean(np.log(values))))

    value = mean([pair.value for pair in pairs])
    error = np.nan
    if len(pairs) > 1 and np.isfinite(value) and value > 0:
        logarithms = np.log([pair.value for pair in pairs])
        error = float(value * np.std(logarithms, ddof=1) / np.sqrt(len(pairs)))
    level = float(np.mean([pair.loss for pair in pairs]))
    return Efficiency(level, value, mean([pair.lower for pair in pairs]), mean([pair.upper for pair in pairs]), error)
