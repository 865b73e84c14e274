"""Pictures among texts: in messages, beside texts, and as joint processors take them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from vision_language import PROCESSORS, llava_processor, picture, write_rows

from epmq.data.encoding import encode
from epmq.data.examples import Examples
from epmq.data.pictures import conversation, pictures_in, placeholder_ids, placeholders, with_pictures
from epmq.data.readers import read_examples

ASKED = {"role": "user", "content": "the cat"}
SHOWN = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the cat"}]}
SAID = {"role": "assistant", "content": "a dog"}


def messages(*pictures: Any, text: str = "the cat sat") -> list[dict[str, Any]]:
    return [*conversation(pictures, text), SAID]


@pytest.mark.parametrize("said", [ASKED, SHOWN])
@pytest.mark.parametrize("listed", [False, True])
def test_a_rows_picture_goes_where_messages_leave_room_or_before_the_first_words(tmp_path, said, listed):
    row = {"messages": [said, SAID], "image": ["0.png"] if listed else "0.png"}
    examples = read_examples(write_rows(tmp_path, {"messages": [ASKED, SAID]}, row))
    assert examples.kind == "chat" and list(map(len, map(pictures_in, examples.inputs))) == [1, 0]  # those come first
    first = examples.inputs[0]
    assert first[0]["content"] == [{"type": "image", "image": tmp_path / "0.png"}, {"type": "text", "text": "the cat"}]
    assert first[1] == SAID


def test_parts_may_name_their_own_pictures(tmp_path):
    parts = [{"type": "image", "path": "1.png", "text": None}, {"type": "text", "text": "the cat"}]
    path = write_rows(tmp_path, {"messages": [{"role": "user", "content": parts}]})
    assert pictures_in(read_examples(path).inputs[0]) == [tmp_path / "1.png"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [SHOWN], "image": ["0.png", "1.png"]}, "line 1: 2 images, but the messages have room for 1"),
        ({"messages": [SHOWN]}, "line 1: 0 images, but the messages have room for 1"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "must be a text or an image, found .*video"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "https://a.b/c.png"}]}]}, "not fetched"),
        ({"messages": [SHOWN], "image": "2.png"}, r"2\.png: no such image"),
        ({"image": ["0.png", "1.png"]}, "line 1: no image field 'image': several images need a text"),
    ],
)
def test_rows_of_which_it_is_not_clear_what_they_show_are_refused(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_examples(write_rows(tmp_path, row))


def test_texts_without_a_picture_lie_beside_those_with_one(tmp_path):
    rows = [{"text": "a"}, {"text": "b", "image": "0.png"}, {"text": "c", "image": None}]
    for use in ("text", "causal"):
        examples = read_examples(write_rows(tmp_path, *rows, {"text": "d", "image": ["0.png", "1.png"]}), use=use)
        assert examples.kind == "image_text" and [text for _, text in examples.inputs] == ["b", "d", "a", "c"]
        assert [len(pictures_in(one)) for one in examples.inputs] == [1, 2, 0, 0]


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_joint_processor_puts_tokens_for_pictures_into_conversations(name):
    build, size = PROCESSORS[name]
    processor = build()
    one, two = picture(0), picture(1)
    chats = [messages(one), messages(one, two, text="the big tree ran"), messages(text="the red tree"), [ASKED]]
    shown, plain = encode(Examples("chat", chats), processor)
    soft = processor.image_token_ids[0]
    assert soft in placeholder_ids(processor) and processor.image_token in placeholders(processor)
    assert (shown["input_ids"] == soft).sum(1).tolist() == [size, 2 * size] and "pixel_values" not in plain
    assert shown["attention_mask"].sum(1).tolist()[0] < shown["input_ids"].shape[1] == shown["attention_mask"].sum(1)[1]
    words = processor.tokenizer("user the red tree assistant a dog")["input_ids"]
    assert plain["input_ids"][0].tolist() == words and next(iter(shown)) == "input_ids"
    # A text beside a picture is what a user says who shows it.
    pair = next(encode(Examples("image_text", [(one, "the cat sat")]), processor))
    alone = next(encode(Examples("chat", [messages(one)[:1]]), processor))
    assert pair.keys() == alone.keys() and torch.equal(pair["input_ids"], alone["input_ids"])
    torch.testing.assert_close(pair["pixel_values"], alone["pixel_values"])


def test_a_text_that_names_its_picture_stays_as_it_is():
    processor = llava_processor()
    (batch,) = encode(Examples("image_text", [(picture(), "<image> the cat")]), processor)
    assert batch["input_ids"][0].tolist() == processor.tokenizer("<image> " * 4 + "the cat")["input_ids"]


def test_texts_with_pictures_are_cut_behind_the_pictures():
    examples = Examples("chat", [messages(picture()), messages(picture(1), text="the cat sat on the mat")])
    (batch,) = encode(examples, llava_processor(), max_length=7)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 7) and len(batch["pixel_values"]) == 2
    with pytest.raises(ValueError, match="pictures take more than the 4 tokens that texts are cut to"):
        next(encode(examples, llava_processor(), max_length=4))


def test_messages_that_are_full_stay():
    full = conversation([np.zeros((2, 2, 3))], "a")
    assert with_pictures(full, [], "line 1") is not None and with_pictures([ASKED], [], "line 1") == [ASKED]
