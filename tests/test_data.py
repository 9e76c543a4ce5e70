"""Packing: nothing lost, nothing crossing a document's border."""

import json

import pytest
import torch
from conftest import tiny_vwn
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from vwn_hf.data import IGNORED, DataSource, pack_documents, packed_blocks, write_standard_library_corpus

DOCUMENTS = st.lists(st.lists(st.integers(3, 98), min_size=1, max_size=9), max_size=12)


@given(documents=DOCUMENTS, length=st.integers(2, 7))
@settings(max_examples=200, deadline=None)
def test_blocks_are_the_documents_in_order(documents, length):
    blocks = pack_documents(documents, length)
    tokens = [token for document in documents for token in document]
    packed = [token for block in blocks["input_ids"] for token in block]
    assert packed == tokens[: len(tokens) // length * length]
    positions = [position for document in documents for position in range(len(document))]
    for number, (ids, starts, labels) in enumerate(zip(*blocks.values(), strict=True)):
        true_positions = positions[number * length : (number + 1) * length]
        for place in range(length):
            first = true_positions[place] == 0
            assert labels[place] == (IGNORED if first else ids[place])
            assert starts[place] == (0 if first or place == 0 else starts[place - 1] + 1)


def test_attention_stays_inside_a_document():
    """A document's loss in a packed block is its loss alone."""
    model = tiny_vwn("olmoe").eval()
    model.config.use_cache = False
    documents = [[5, 6, 7, 8, 9], [20, 21, 22], [40, 41, 42, 43]]
    block = {name: torch.tensor(rows) for name, rows in pack_documents(documents, 12).items()}
    with torch.no_grad():
        packed = model(**block).logits[0]
        alone = torch.cat([model(torch.tensor([ids])).logits[0] for ids in documents])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.fixture
def tokenizer(tokenizer_file):
    return PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token="<|endoftext|>")


def test_text_becomes_blocks_that_decode_to_it(tokenizer):
    texts = ["def f(x):\n    return x\n" * 5, "class A:\n    pass\n" * 4]
    blocks = packed_blocks(Dataset.from_dict({"text": texts}), tokenizer, 8)
    assert set(blocks.column_names) == {"input_ids", "position_ids", "labels"}
    decoded = tokenizer.decode([token for ids in blocks["input_ids"] for token in ids])
    assert "<|endoftext|>".join(texts).startswith(decoded)


def test_what_cannot_be_packed_is_refused(tokenizer, tokenizer_file):
    with pytest.raises(ValueError, match="shorter than one block of sequence_length=512"):
        packed_blocks(Dataset.from_dict({"text": ["short"]}), tokenizer, 512)
    with pytest.raises(ValueError, match="no eos_token"):
        packed_blocks(
            Dataset.from_dict({"text": ["x"]}), PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file)), 4
        )


def test_sources_are_checked(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "x"}) + "\n")
    source = DataSource(path="json", data_files=str(tmp_path / "*.jsonl"), text_column="body")
    assert source.load()["body"] == ["x"]
    with pytest.raises(ValueError, match=r"text_column='text' is not a column; the data has \['body'\]"):
        DataSource(path="json", data_files=str(tmp_path / "a.jsonl")).load()
    with pytest.raises(FileNotFoundError, match=r"b\.jsonl does not exist"):
        DataSource(path="json", data_files=str(tmp_path / "b.jsonl")).load()


def test_the_standard_library_is_split_by_file_and_the_same_every_time(tmp_path):
    counts = write_standard_library_corpus(tmp_path / "a", vocab_size=300, megabytes=0.3)
    write_standard_library_corpus(tmp_path / "b", vocab_size=300, megabytes=0.3)
    splits = {}
    for split in ("train", "heldout"):
        splits[split] = (tmp_path / "a" / f"{split}.jsonl").read_text()
        assert splits[split] == (tmp_path / "b" / f"{split}.jsonl").read_text()
        assert len(splits[split].splitlines()) == counts[f"{split}_files"] > 0
    assert not set(splits["train"].splitlines()) & set(splits["heldout"].splitlines())
    assert (tmp_path / "a" / "tokenizer" / "tokenizer.json").is_file()
