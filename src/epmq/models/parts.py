"""Names of tensors as other programs and larger models call them: wrappers around a model, and parts of one."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from epmq.errors import InputError

# Names of modules that programs put around a model, or around parts of it, while they train it: compiled, sharded or
# with checkpointed activations. No model has modules of these names.
_AROUND = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# … and those that are one only at the front of every name: data parallel, and PEFT.
_IN_FRONT = ("module.", "base_model.model.")


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Names without the wrappers of programs that train: name → the name it had; of all names, in order.

    Two names that would be one stay as they are, and with them all others.
    """
    names = list(names)
    inner = [_AROUND.sub("", name) for name in names]
    while front := next((one for one in _IN_FRONT if inner and all(name.startswith(one) for name in inner)), None):
        inner = [_AROUND.sub("", name.removeprefix(front)) for name in inner]
    return dict(zip(inner if len(set(inner)) == len(inner) else names, names))


def wrappers(names: Mapping[str, str]) -> list[str]:
    """The modules that `unwrapped` has taken off some names, in order."""
    left = (Counter(outer.split(".")) - Counter(inner.split(".")) for inner, outer in names.items())
    return list(dict.fromkeys(module for modules in left for module in modules))


def place(
    names: Sequence[str],
    model: Collection[str],
    fits: Callable[[str, str], bool] = lambda name, own: True,
    prefers: Callable[[str], bool] = lambda module: False,
) -> tuple[str, str] | None:
    """Where in a model tensors belong whose names begin otherwise: their beginning, and the model's in its place.

    Of several places it is the one with most tensors of the right shape. None where no numbered module of theirs is in
    the model.

    Args:
        names: of the tensors.
        model: the names of its own tensors.
        fits: whether a tensor, by its name, has the shape of the model's.
        prefers: whether a module of the model, by its name, is to be taken where several are as good.

    Raises:
        InputError: two places are equally good.
    """
    ends: dict[str, list[str]] = {}
    for own in model:
        for tail in _tails(own):
            ends.setdefault(tail, []).append(own[: len(own) - len(tail)])
    exchanges = dict[tuple[str, str], None]()
    for name in filter(is_numbered, names):
        longest = next((tail for tail in _tails(name) if tail in ends and is_numbered(tail)), "")
        exchanges |= {(name.removesuffix(longest), front): None for front in ends.get(longest, ())}

    def rank(exchange: tuple[str, str]) -> tuple[int, int, bool, int]:
        taken, put = exchange
        pairs = [(name, put + name.removeprefix(taken)) for name in names if name.startswith(taken)]
        found = [pair for pair in pairs if pair[1] in model]
        return sum(fits(*pair) for pair in found), len(found), prefers(put.rstrip(".")), -len(taken)

    ranked = sorted(((rank(one), one) for one in exchanges), reverse=True)
    if len(ranked) > 1 and ranked[0][0] == ranked[1][0]:
        places = " or of ".join(sorted(put.rstrip(".") or "the whole" for _, (_, put) in ranked[:2]))
        raise InputError(f"its tensors may be those of {places}")
    return ranked[0][1] if ranked else None


def is_numbered(name: str) -> bool:
    """Whether a tensor lies in a list of modules."""
    return any(part.isdigit() for part in name.split("."))


def _tails(name: str) -> list[str]:
    """A name, and what is left of it as modules are taken from its front."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1)]
