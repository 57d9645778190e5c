"""Tokenizers for GGUF files: the rule that splits text is recognised by its exact expression, or refused."""

import json

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers, processors
from transformers import Qwen2Tokenizer

from prefopt.errors import UserError
from prefopt.export.gguf_tokenizer import read_tokenizer
from support.trained_runs import LLAMA3, make_split_tokenizer


@pytest.mark.parametrize("split", ["qwen2", "llama-bpe", "gpt-2", "smollm"])
def test_each_rule_for_splitting_is_known(split, tmp_path):
    tokenizer = make_split_tokenizer(split, tmp_path)
    assert read_tokenizer(tokenizer, len(tokenizer)).pre == split


def test_transformers_own_qwen_tokenizer_is_known(tmp_path):
    core = json.loads(make_split_tokenizer("gpt-2", tmp_path).backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in core["merges"]]
    published = Qwen2Tokenizer(vocab=core["vocab"], merges=merges)
    assert read_tokenizer(published, len(published)).pre == "qwen2"


def test_a_bos_token_that_the_tokenizer_adds_is_said(tmp_path):
    tokenizer = make_split_tokenizer("gpt-2", tmp_path)
    assert read_tokenizer(tokenizer, len(tokenizer)).add_bos is False
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.bos_token_id)]
    )
    found = read_tokenizer(tokenizer, len(tokenizer))
    assert found.add_bos is True and found.add_eos is False


def altered(tmp_path, change):
    tokenizer = make_split_tokenizer("gpt-2", tmp_path / "tokenizer")
    change(tokenizer.backend_tokenizer)
    return tokenizer


def other_split(core):
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def llama_split_without_whole_words(core):
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def space_in_front(core):
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def lower_case(core):
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_split, "another one, so the file would give other tokens"),
        (space_in_front, "another one, so the file would give other tokens"),
        (llama_split_without_whole_words, "splits text as llama-bpe does, but does not take"),
        (lower_case, "normaliser (Lowercase, NFC)"),
    ],
)
def test_tokenizers_that_the_file_cannot_hold_are_refused(change, said, tmp_path):
    tokenizer = altered(tmp_path, change)
    with pytest.raises(UserError, match=said.replace("(", r"\(").replace(")", r"\)")):
        read_tokenizer(tokenizer, len(tokenizer))


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    tokenizer = make_split_tokenizer("gpt-2", tmp_path)
    with pytest.raises(UserError, match="the id 420, and the model's embedding 420 rows"):
        read_tokenizer(tokenizer, 420)
