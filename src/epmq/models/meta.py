"""The model without its weights: which class it is, what its tensors are called, and how they get in and out."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from epmq.errors import InputError, error_context
from epmq.models.checkpoint import Checkpoint, architecture_of
from epmq.models.config import transformers_config
from epmq.models.mixtures import mixtures, unfuse
from epmq.models.origins import Origins
from epmq.models.pieces import piece_of

# Classes whose weights are all shared between experts: their own architecture is merged. Everything else that is not
# a plain `…Model` has a task head; its backbone is merged and the head is kept apart.
_WHOLE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# How the names of a model's halves end, of which some can be saved alone.
_HALVES = ("Encoder", "Decoder")
# Parameters that a model may have beyond eight times the tensors on disk: some are set more than once.
SPARE = 1000


def has_task_head(architecture: str | None) -> bool:
    """Whether an architecture is a shared model with a task head on top, such as `BertForSequenceClassification`."""
    return architecture is not None and not architecture.endswith(("Model", *_HALVES, *_WHOLE))


def is_generator(architecture: str) -> bool:
    """Whether a class of that name generates text: its output layer belongs to what base and experts share."""
    named = named_class(architecture)  # such as MarianMTModel, whose name does not say it
    return architecture.endswith(_WHOLE) or (named is not None and bool(named.can_generate()))


def named_class(architecture: Any) -> Any:
    """The model class of transformers of that name; None if it has none."""
    import transformers

    named = getattr(transformers, architecture, None) if isinstance(architecture, str) else None
    if named is None and isinstance(architecture, str) and architecture.endswith(_HALVES):
        named = _half(architecture)
    return named if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel) else None


def _half(architecture: str) -> Any:
    """An encoder or a decoder of transformers by its class name, such as `WhisperEncoder`; it exports none of them."""
    import transformers.models.auto.configuration_auto as auto

    for kind in sorted(auto.CONFIG_MAPPING, key=len, reverse=True):
        module = auto.model_type_to_module_name(kind)
        if architecture.lower().startswith(module.replace("_", "")):
            try:
                found = import_module(f"transformers.models.{module}.modeling_{module}")
            except ImportError:
                continue
            if hasattr(found, architecture):
                return getattr(found, architecture)
    return None


def backbone_class(config: Any) -> Any:
    """The plain `…Model` of a config of transformers; None where there is none."""
    import transformers

    found: Any = transformers.MODEL_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


@contextmanager
def no_larger(source: str | Path, tensors: int, entries: int) -> Iterator[None]:
    """Refuse to build, in a `with` block, a model far larger than so many `tensors` of at most so many `entries`.

    A config may say anything; without this a billion layers would be made, one by one, before the first is missed.
    The ValueError names `source`, which describes the model.
    """
    budget = SPARE + 8 * tensors

    def check(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal budget
        budget -= 1
        if budget < 0:
            raise InputError(f"{source} describes far more tensors than the {tensors} that there are")
        if parameter is not None and parameter.numel() > entries:
            raise InputError(f"{source} describes a {name} of {list(parameter.shape)}, more than there is in all")

    with register_module_parameter_registration_hook(check):
        yield


def build_meta_model(checkpoint: Checkpoint, model_class: Any = None, tokens: int | None = None) -> Any:
    """The model of a checkpoint with parameters on the meta device and real buffers, in eval mode, in float32.

    Without a `model_class` it is the one that the config names, or the backbone of that; `tokens` is the size of its
    vocabulary, where that is not the config's. A ValueError says that transformers does not know the model type without
    remote code, or that the model is quantized already.
    """
    from epmq.models.blocks import use_fast_matmul  # imports transformers, which looking into a checkpoint does without

    config_file = checkpoint.path / checkpoint.CONFIG
    if checkpoint.config.get("quantization_config"):
        raise InputError(f"{config_file}: the model is quantized already; give the one it was quantized from")
    with error_context(config_file, "transformers cannot open this model"):
        config = transformers_config(checkpoint)
        if tokens is not None:
            config.get_text_config().vocab_size = tokens
        architecture = architecture_of(checkpoint.config)
        whole = None if has_task_head(architecture) else named_class(architecture)
        model_class = model_class or whole or backbone_class(config)
        if model_class is None:
            raise InputError(f"there is no plain model of {type(config).__name__}")
        bounds = no_larger(config_file, len(checkpoint.names), checkpoint.bits)
        model = empty_model(model_class, config, bounds, dtype=torch.float32)
    use_fast_matmul(model)
    return model


def empty_model(model_class: Any, config: Any, bounds: AbstractContextManager[None], **settings: Any) -> Any:
    """A model of a transformers class with parameters on the meta device and real buffers, in eval mode.

    `bounds` is a `no_larger`; `settings` are those of the class's `_from_config`.
    """
    from accelerate import init_empty_weights

    # Once with nothing allocated at all: real buffers, and a parameter before it is registered, may be of any size.
    with bounds, torch.device("meta"):
        model_class._from_config(config, **settings)
    with init_empty_weights(include_buffers=False):
        model = model_class._from_config(config, **settings).eval()
    return unfuse(model)


def rename(model: Any, stored: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """What a checkpoint calls the tensors of a model.

    transformers renames tensors when it loads (old layouts, prefixes of task classes); its own table is applied, so
    that any checkpoint that `from_pretrained` reads is read here too, with a task head's tensors or without. What is
    fused on disk is found by the names of pieces (`epmq.models.pieces`).

    Returns:
        name in the model → name on disk, and the names on disk that the model does not have.

    Raises:
        ValueError: transformers would convert (split, permute) a tensor on load, other than those of experts; or the
            experts of a mixture are there twice. It is named.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms: Any = get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    state = model.state_dict()
    origins = Origins(mixtures(model), renamings, converters)
    known = {**state, **origins.fused}
    stored_names, extra = dict[str, str](), list[str]()
    for name in stored:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed in origins.fused:
            found = origins.of(name, renamed, pattern)
            twice = next((held for held in found if held in stored_names), None)
            if twice is not None:
                raise InputError(f"tensors {name!r} and {stored_names[twice]!r} are both {twice}")
            stored_names |= found
            extra += [] if found else [name]
        elif renamed in state:
            if pattern is not None:
                raise InputError(f"tensor {name!r} is converted by transformers on load, which epmq does not do yet")
            stored_names[renamed] = name
        else:
            extra.append(name)
    return stored_names, extra


def matrices_on_disk(model: Any) -> dict[str, str]:
    """What transformers calls the matrices of experts when it saves a model: name in the model → name on disk.

    Those that it saves as it fuses them are not in it.
    """
    from transformers.core_model_loading import revert_weight_conversion

    fused = {
        f"{path}.{name}": torch.empty(shape, device="meta")
        for path, mixture in mixtures(model).items()
        for name, shape in mixture.fused_shapes().items()
    }
    saved = rename(model, revert_weight_conversion(model, fused))[0]
    return {name: stored for name, stored in saved.items() if piece_of(stored) is None}


def tied_names(model: Any) -> dict[str, str]:
    """Tensors that share another one's storage: name → the name it follows."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return dict(tied) if getattr(model.config, "tie_word_embeddings", True) else {}


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a real tensor in the place of a parameter or buffer (which may be on the meta device)."""
    module, leaf = _owner(model, name), name.rpartition(".")[2]
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def materialize(model: nn.Module, names: Iterable[str], read: Callable[[str], Tensor], device: torch.device) -> None:
    """Put real tensors in the place of the named ones; half precision is computed in float32."""
    for name in names:
        tensor = read(name).to(device)
        set_tensor(model, name, tensor.float() if torch.is_floating_point(tensor) else tensor)


def load_outside(
    model: Any, names: Iterable[str], read: Callable[[str], Tensor], device: torch.device, tied: dict[str, str]
) -> None:
    """Put real tensors in the place of those outside of the blocks, and tie them.

    Embeddings of tokens and the output layer stay in the dtype that they have on disk: read lazily (memory-mapped) and
    cast after the look-up, a large vocabulary costs an expert no memory, and its output layer, which no calibration
    runs, costs nothing. Other embeddings are small, and some are read without a look-up, such as DeBERTa's of relative
    positions.

    Args:
        model: a model on the meta device.
        names: of the tensors, without tied copies.
        read: gives the tensor of a name.
        tied: tied copy → the name it follows.
    """
    output, tokens = model.get_output_embeddings(), vocabulary(model)
    for name in names:
        module = _owner(model, name)
        if type(module) is nn.Embedding and module.num_embeddings == tokens:
            module.register_forward_hook(lambda module, args, rows: rows.float())
        elif module is not output:
            materialize(model, [name], read, device)
            continue
        set_tensor(model, name, read(name).to(device))
    move_rest(model, device)
    tie(model, tied)


def move_rest(model: nn.Module, device: torch.device) -> None:
    """Take what is real of a model to the device: buffers that no file holds, and zeros in the place of what is absent.

    What is on the meta device stays there.
    """
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        moved = tensor if tensor.is_meta else tensor.detach().to(device)
        if moved.device != tensor.device:
            set_tensor(model, name, moved)


def tie(model: Any, tied: dict[str, str]) -> None:
    """Let tied copies (name → the name it follows) share their storage again, once those they follow are real."""
    model.all_tied_weights_keys = dict(tied)
    model.tie_weights(recompute_mapping=False)


class UsedRows:
    """Looks up the rows of an embedding that calibration uses, and holds no others, in float32.

    A table [size, features] that is mapped into memory would become resident piece by piece, one an expert.
    """

    def __init__(self, size: int, read: Callable[[], Tensor], device: torch.device) -> None:
        self._read, self._rows = read, torch.empty(0)
        self._position = torch.full((size,), -1, device=device)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """As a forward pre-hook: give the embedding the rows it needs, and their positions instead of the ids."""
        ids = args[0]
        used = ids.unique()
        new = used[self._position[used] < 0]
        if len(new):
            rows = self._read()[new.cpu()].float().to(new.device)
            self._position[new] = torch.arange(len(self._rows), len(self._rows) + len(new), device=new.device)
            self._rows = torch.cat([self._rows, rows]) if len(self._rows) else rows
        module._parameters["weight"] = nn.Parameter(self._rows, requires_grad=False)
        return self._position[ids], *args[1:]


def hold_used_rows(
    model: Any, names: Iterable[str], tied: dict[str, str], read: Callable[[str], Tensor], device: torch.device
) -> list[str]:
    """Let the word embedding read the rows that it looks up when it does; returns the names of all other tensors.

    Other embeddings are small, and models take their weight by other ways than a look-up. Embeddings that are tied to
    it look up the same rows. Arguments are as in `load_outside`.
    """
    try:
        words = model.get_input_embeddings()
    except NotImplementedError:  # a model of several parts, such as CLIP
        return list(names)
    others = []
    for name in names:
        if _owner(model, name) is not words or not isinstance(words, nn.Embedding):
            others.append(name)
            continue
        rows = UsedRows(words.num_embeddings, partial(read, name), device)
        for owner in {_owner(model, key) for key in (name, *tied) if tied.get(key, key) == name}:
            if isinstance(owner, nn.Embedding):
                owner.register_forward_pre_hook(rows)
    return others


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def to_meta(module: nn.Module) -> None:
    """Send a block's parameters back to the meta device, which frees their memory."""
    for child in module.modules():
        for leaf, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def vocabulary(model: Any) -> int | None:
    """How many tokens a model has embeddings for; None if it takes none."""
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (NotImplementedError, AttributeError):  # a model of several parts, such as CLIP, or one for images
        size: int | None = getattr(getattr(model.config, "text_config", model.config), "vocab_size", None)
        return size


def token_tables(model: Any, larger: Any) -> dict[str, int]:
    """Tensors with a row a token: name → the dimension that counts tokens.

    `larger` is the same model with one token more: what is larger by one is such a tensor, in whatever model.
    """
    tables, state = {}, larger.state_dict()
    for name, tensor in model.state_dict().items():
        grown = [i for i, (less, more) in enumerate(zip(tensor.shape, state[name].shape)) if more == less + 1]
        if len(grown) == 1 and tensor.shape[grown[0]] == vocabulary(model):
            tables[name] = grown[0]
    return tables


def text_config(config: dict[str, Any], model: Any, **fields: Any) -> dict[str, Any]:
    """The content of a `config.json` with some fields of its part that is about tokens, wherever in it that is."""
    text = model.config.get_text_config()
    named = {text.attribute_map.get(field, field): value for field, value in fields.items()}
    parts = [name for name, part in vars(model.config).items() if part is text]
    return {**config, **({name: {**config.get(name, {}), **named} for name in parts} or named)}
