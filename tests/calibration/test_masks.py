"""Which tokens are real."""

import torch

from epmq.calibration.masks import padding_mask, real_tokens

SOURCE = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
TARGET = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]])


def test_a_decoders_own_mask_counts_where_both_are_equally_long():
    inputs = {"attention_mask": SOURCE, "decoder_attention_mask": TARGET}
    assert torch.equal(real_tokens(inputs, (2, 4)), TARGET.bool())
    assert torch.equal(real_tokens({"attention_mask": SOURCE}, (2, 4)), SOURCE.bool())
    assert torch.equal(real_tokens({**inputs, "decoder_attention_mask": TARGET[:, :3]}, (2, 4)), SOURCE.bool())


def test_none_are_padding_without_a_mask_of_that_shape():
    assert real_tokens({}, (2, 4)) is None and real_tokens({"attention_mask": SOURCE}, (2, 5)) is None
    assert real_tokens({"attention_mask": torch.ones(2, 4).long()}, (2, 4)) is None
    assert real_tokens({"attention_mask": SOURCE}, (2,)) is None  # one token an example, such as a pooler's


def test_cross_attention_reads_what_the_encoder_gives():
    states, own = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    arguments = {"attention_mask": TARGET, "encoder_hidden_states": states, "encoder_attention_mask": SOURCE}
    assert torch.equal(padding_mask(arguments, states), SOURCE.bool())
    assert torch.equal(padding_mask(arguments, own), TARGET.bool())
    assert torch.equal(padding_mask(arguments, own.reshape(8, 3)), TARGET.bool())
    assert torch.equal(padding_mask(arguments, own[:, None]), TARGET.bool())
    assert padding_mask({"attention_mask": torch.randn(2, 1, 4, 4)}, own) is None


def test_where_a_part_gets_what_was_made_of_the_mask_the_models_own_counts():
    """As in Gemma 3: a mask for each kind of attention, or one over pairs of tokens."""
    own, given = torch.randn(2, 4, 3), {"attention_mask": SOURCE}
    for made in ({"full_attention": torch.randn(2, 1, 4, 4)}, torch.randn(2, 1, 4, 4)):
        assert torch.equal(padding_mask({"attention_mask": made}, own, given), SOURCE.bool())
        assert padding_mask({"attention_mask": made}, torch.randn(2, 5, 3), given) is None
        assert padding_mask({"attention_mask": made}, own, {**given, "decoder_input_ids": SOURCE}) is None
    assert padding_mask({}, own, given) is None  # a tower beside the texts, of as many patches
