"""Chat templates: programs that come with a model, which are read and tried before they are used."""

from threading import Thread
from typing import Any

from epmq.data.pictures import placeholders, without_sources
from epmq.data.processors import tokenizer_of
from epmq.errors import InputError, error_context

# Far longer than a chat template needs for one conversation.
TEMPLATE_SECONDS = 3
# Of a number in a chat template.
MOST_DIGITS = 6


def template_of(processor: Any, template: str | None = None) -> str | None:
    """The chat template of a joint processor, or of a tokenizer; None where there is none."""
    own = getattr(processor, "chat_template", None)
    own = own.get("default") if isinstance(own, dict) else own
    try:
        return template or own or tokenizer_of(processor).get_chat_template()
    except ValueError:  # there is none, or none by default
        return None


def render(processor: Any, messages: Any, template: str | None = None) -> str:
    """A conversation as its template writes it; `template` is another than the processor's own."""
    if placeholders(processor):  # templates for pictures go through the parts of each message
        messages = without_sources(messages)
    text: str = tokenizer_of(processor).apply_chat_template(
        messages, chat_template=template_of(processor, template), tokenize=False
    )
    return text


def try_template(processor: Any, messages: Any, template: str | None = None) -> None:
    """Refuse a chat template that fails or comes to no end."""
    tokenizer = tokenizer_of(processor)
    error: BaseException | None = TimeoutError(f"no end within {TEMPLATE_SECONDS} s")

    def run() -> None:
        nonlocal error
        try:
            render(processor, messages, template)
            error = None
        except BaseException as raised:
            error = raised

    with error_context(tokenizer.name_or_path, "its chat template cannot be used"):
        check_template(template_of(processor, template) or tokenizer.get_chat_template())
        # A thread cannot be stopped, but this one does not keep the process from ending.
        thread = Thread(target=run, daemon=True)
        thread.start()
        thread.join(TEMPLATE_SECONDS)
        if error is not None:
            raise error


def check_template(template: str) -> None:
    """Refuse a chat template that computes with numbers so large that it would fill the memory in one step.

    One such step cannot be interrupted, so that a limit of time does not help.
    """
    from jinja2 import Environment

    for _, kind, value in Environment().lex(template):
        if (kind, value) == ("operator", "**") or (kind == "integer" and len(value) > MOST_DIGITS):
            raise InputError(f"it computes with large numbers: {value}")
