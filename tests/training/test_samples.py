import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from agrpo.training.samples import pieces

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """A token a byte, so that a character takes up to four."""
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(ALPHABET)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@given(st.text(max_size=30))
def test_the_pieces_of_a_text_are_the_text(bytes_tokenizer, text):
    ids = bytes_tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(bytes_tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == text


def test_a_cut_character_is_a_mark_and_the_rest_stands(bytes_tokenizer):
    ids = bytes_tokenizer("a€b", add_special_tokens=False)["input_ids"]
    assert pieces(bytes_tokenizer, ids) == ["a", "", "", "€", "b"]
    assert pieces(bytes_tokenizer, ids[:3]) == ["a", "", "\ufffd"]
