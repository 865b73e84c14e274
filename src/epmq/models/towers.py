"""What lies beside the language model in a model that reads pictures or sounds: its towers and projectors."""

from typing import Any

from epmq.models.blocks import find_stacks, linears
from epmq.models.meta import is_generator


def beside_language(model: Any) -> dict[str, str]:
    """Linear layers of towers and projectors beside a language model: name → name of the part.

    There are some where the model writes texts, has a config of its own for them, and transformers calls one of its
    modules the decoder. In a model of two towers, such as CLIP, and in an encoder–decoder none is beside.
    """
    config = model.config
    if config.is_encoder_decoder or config.get_text_config() is config or not is_generator(type(model).__name__):
        return {}
    decoder: Any = model.get_decoder()
    path = next((path for path, module in model.named_modules() if module is decoder), "")
    words = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    others = [name for name, layer in linears(model) if id(layer) not in words and not name.startswith(f"{path}.")]
    return {name: _part(name, path) for name in others} if path else {}


def _part(layer: str, decoder: str) -> str:
    """The outermost module that holds a layer and not the decoder."""
    names, others = layer.split("."), decoder.split(".")
    depth = next(number for number, name in enumerate(names) if name != others[number])
    return ".".join(names[: depth + 1])


def keep_first_blocks(model: Any) -> None:
    """Take all blocks but the first of each stack from a model; its towers count on no more, either.

    A language model may ask for what the last block but one of a tower gives, by its config's number of layers.
    """
    parts = set(beside_language(model).values())
    for stack in find_stacks(model):
        del model.get_submodule(stack.name)[1:]
    for part in parts:
        for module in model.get_submodule(part).modules():
            if getattr(getattr(module, "config", None), "num_hidden_layers", None):
                module.config.num_hidden_layers = 1
