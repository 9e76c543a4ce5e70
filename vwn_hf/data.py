"""Text in, packed blocks of tokens out; and a small corpus that every machine has.

A packed block is `sequence_length` tokens of one or more documents. Position ids start again at each document, which
is how transformers' masks keep its attention inside it; the first token of a document is no target.
"""

import glob
import json
import random
import sysconfig
from itertools import chain
from pathlib import Path

from datasets import Dataset, load_dataset
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label that no loss counts


class DataSource(BaseModel):
    """Where text comes from: the arguments of `datasets.load_dataset`, and the column that holds it."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(description="Hub name of a data set, or a format of local files: json, text, parquet, csv")
    name: str | None = Field(None, description="configuration of the data set")
    data_files: str | list[str] | None = Field(None, description="local files, for a format")
    split: str = "train"
    text_column: str = "text"

    def load(self) -> Dataset:
        files = [self.data_files] if isinstance(self.data_files, str) else self.data_files or []
        missing = [file for file in files if "://" not in file and not glob.glob(file)]
        if missing:
            raise FileNotFoundError(f"data_files: {missing[0]} does not exist.")
        dataset = load_dataset(self.path, self.name, data_files=self.data_files, split=self.split)
        if self.text_column not in dataset.column_names:
            raise ValueError(f"text_column={self.text_column!r} is not a column; the data has {dataset.column_names}.")
        return dataset.select_columns([self.text_column])


def packed_blocks(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Dataset:
    """Tokenize a data set's only column and pack it into blocks, in order, an end-of-text token after each document.

    Columns: input_ids, position_ids, labels, each [sequence_length]. What is left over at the end of each 1,000
    documents, less than a block, is left out.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no eos_token, which documents must end with; set one.")
    (column,) = dataset.column_names

    def tokenize(batch):
        texts = tokenizer(batch[column], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in texts]}

    def pack(batch):
        return pack_documents(batch["input_ids"], sequence_length)

    tokenized = dataset.map(tokenize, batched=True, remove_columns=[column], desc="Tokenizing")
    blocks = tokenized.map(pack, batched=True, desc="Packing")
    if not len(blocks):
        raise ValueError(f"The text is shorter than one block of sequence_length={sequence_length} tokens.")
    return blocks


def pack_documents(documents: list[list[int]], sequence_length: int) -> dict[str, list[list[int]]]:
    """Concatenate documents and cut them into blocks; position ids and labels as the module's docstring says."""
    tokens = list(chain.from_iterable(documents))
    starts = list(chain.from_iterable([True] + [False] * (len(ids) - 1) for ids in documents if ids))
    columns = {"input_ids": [], "position_ids": [], "labels": []}
    for begin in range(0, len(tokens) - sequence_length + 1, sequence_length):
        block = tokens[begin : begin + sequence_length]
        positions, labels = [], []
        for token, first in zip(block, starts[begin : begin + sequence_length], strict=True):
            positions.append(0 if first or not positions else positions[-1] + 1)
            labels.append(IGNORED if first else token)
        columns["input_ids"].append(block)
        columns["position_ids"].append(positions)
        columns["labels"].append(labels)
    return columns


def write_standard_library_corpus(folder: Path, vocab_size: int, megabytes: float, seed: int = 0) -> dict[str, int]:
    """Write the source of Python's standard library as a corpus: real text that every machine has.

    Files: train.jsonl and heldout.jsonl (column "text"; split by file, one in ten held out), tokenizer/ (byte-level
    BPE trained on the training text).

    Args:
        megabytes: how much text to take, in files of random order.
    Returns:
        number of files and characters in each split.
    """
    paths = [p for p in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")) if "site-packages" not in p.parts]
    random.Random(seed).shuffle(paths)
    splits, size = {"train": [], "heldout": []}, 0
    for number, path in enumerate(paths):
        text = path.read_text(errors="ignore")
        if not 1_000 < len(text) < 200_000:
            continue
        splits["heldout" if number % 10 == 0 else "train"].append(text)
        size += len(text)
        if size > megabytes * 1e6:
            break
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split, texts in splits.items():
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        counts |= {f"{split}_files": len(texts), f"{split}_characters": sum(map(len, texts))}
    train_tokenizer(splits["train"], vocab_size).save_pretrained(folder / "tokenizer")
    return counts


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with <|endoftext|> (id 0, begin and end of text) and <|padding|> (id 1)."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    specials = ["<|endoftext|>", "<|padding|>"]
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=specials, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token=specials[0], eos_token=specials[0], pad_token=specials[1]
    )
