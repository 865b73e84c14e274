"""Tokenizers in the form of GGUF, and what is refused where llama.cpp cuts texts otherwise."""

import json

import pytest
from conftest import word_tokenizer
from packed_models import byte_pairs
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from epmq.errors import InputError
from epmq.export.gguf_tokens import SPLITS, other_end, vocabulary

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def fast(core: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def test_byte_pairs_have_merges_and_a_name_for_how_texts_are_split():
    tokenizer = byte_pairs()
    tokenizer.chat_template = "{{ messages }}"
    made = vocabulary(tokenizer, 34)
    assert made.model == "gpt2" and made.merges == ["a b", "c d"] and not made.scores
    assert made.tokens[:3] == ["<pad>", "<s>", "</s>"] and made.tokens[-2:] == ["[PAD32]", "[PAD33]"]
    assert made.kinds == [3, 3, 3, *[1] * 29, 5, 5]
    assert made.settings["ggml.pre"] == "gpt-2" and made.settings["chat_template"] == "{{ messages }}"
    assert made.settings["ggml.bos_token_id"] == 1 and not made.settings["ggml.add_bos_token"]


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_a_pattern_is_known_by_its_name(name):
    (pattern,) = next(steps for steps, known in SPLITS.items() if known == name)
    tokenizer = byte_pairs()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    assert vocabulary(tokenizer, 32).settings["ggml.pre"] == ("dbrx" if name == "llama-bpe" else name)
    tokenizer.backend_tokenizer.model.ignore_merges = True
    assert vocabulary(tokenizer, 32).settings["ggml.pre"] == name


def test_byte_pairs_of_sentencepiece_have_the_order_of_their_merges_as_scores():
    pieces = ["<unk>", "<s>", "</s>", "<0x41>", "▁", "a", "b", "ab", "▁ab"]
    merges = [("a", "b"), ("▁", "ab")]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    core = Tokenizer(model)
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = vocabulary(fast(core, **NAMES), 10)
    assert made.model == "llama" and made.scores == [-2, -2, -2, -2, -2, -2, -2, 0, -1, 0]
    assert made.kinds == [2, 3, 3, 6, 1, 1, 1, 1, 1, 5]
    assert made.settings["ggml.add_space_prefix"] and made.settings["ggml.add_bos_token"]
    assert not made.settings["ggml.add_eos_token"]


def test_unigrams_keep_their_scores():
    core = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.5)], 2))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made = vocabulary(fast(core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"), 4)
    assert made.model == "t5" and made.scores == [0.0, 0.0, 0.0, -1.5] and made.kinds == [3, 3, 2, 1]
    assert made.settings["ggml.add_eos_token"] and made.settings["ggml.eos_token_id"] == 1
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Digits(True)])
    with pytest.raises(InputError, match="t5 knows no Digits"):
        vocabulary(fast(core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"), 4)


@pytest.mark.parametrize("lower", [True, False])
def test_word_pieces_begin_with_a_space_unless_they_go_on(tmp_path, lower):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b"]))
    made = vocabulary(BertTokenizerFast(str(tmp_path / "vocab.txt"), do_lower_case=lower), 7)
    assert made.model == "bert" and made.tokens == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁a", "b"]
    assert made.settings["ggml.normalizer.lowercase"] is lower
    assert made.settings["ggml.bos_token_id"] == 2 and made.settings["ggml.seperator_token_id"] == 3


def two_in_front() -> PreTrainedTokenizerFast:
    tokenizer = byte_pairs()
    ids = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> </s> $A", special_tokens=ids)
    return tokenizer


def split_at_digits() -> PreTrainedTokenizerFast:
    tokenizer = byte_pairs()
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    steps = [pre_tokenizers.Split(Regex(r"\d"), "isolated"), plain]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


REFUSED = {
    "words": (word_tokenizer, "a tokenizer of type WordLevel"),
    "pattern": (split_at_digits, r"splits no text as it does (\d)"),
    "two tokens": (two_in_front, "several tokens in front of or behind a text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(InputError, match="gguf cannot hold") as error:
        vocabulary(make(), 32)
    assert message in str(error.value)


def test_without_a_tokenizer_there_are_only_ids():
    assert vocabulary(None, 32).model == "none" and vocabulary(object(), 32).tokens == []


def test_the_second_end_of_an_answer_is_named(tmp_path):
    assert other_end(tmp_path, {}) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert other_end(tmp_path, {"ggml.eos_token_id": 2}) == {"ggml.eot_token_id": 7}
