"""Chat templates are tried before they are used."""

from __future__ import annotations

import pytest
from conftest import word_tokenizer
from vision_language import TEMPLATE, llava_processor

from epmq.data.chats import render, template_of, try_template
from epmq.data.encoding import encode
from epmq.data.examples import Examples


@pytest.mark.parametrize(
    "template",
    [
        "{% for",
        "{{ messages[9].content.x }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        2 * "{% for a in range(3000) %}" + 2 * "{% endfor %}",  # a second or so: what runs on would slow other tests
        "{{ messages | tojson(indent=10**9) }}",
        "{{ 'x' * 1000000000 }}",
    ],
)
def test_a_chat_template_that_fails_or_never_ends_is_refused(monkeypatch, template):
    monkeypatch.setattr("epmq.data.chats.TEMPLATE_SECONDS", 0.1)
    chats = Examples("chat", [[{"role": "user", "content": "the cat"}]])
    with pytest.raises(ValueError, match="its chat template cannot be used"):
        next(encode(chats, word_tokenizer(chat_template=template)))


def test_a_template_that_would_fill_the_memory_is_not_started(monkeypatch):
    tokenizer = word_tokenizer(chat_template="{{ 'x' * 10**9 }}")
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", None)
    with pytest.raises(ValueError, match=r"large numbers: \*\*"):
        try_template(tokenizer, [{"role": "user", "content": "the cat"}])


def test_a_joint_processors_template_sees_the_parts_of_messages():
    """Also of a message that is a text: through its characters such a template would find nothing."""
    processor = llava_processor()
    assert render(processor, [{"role": "user", "content": "the cat"}]) == "user the cat "
    assert render(processor, [{"role": "user", "content": "the cat"}], "{{ messages[0].content[0].type }}") == "text"
    assert template_of(processor) == TEMPLATE.replace("IMAGE", "<image>") and template_of(word_tokenizer()) is None
