"""The registry of merge methods: what merges a tensor, and what merges the weight of a linear layer in its place.

The functions are pure: base and K experts in, the merged tensor out. Their settings are in `epmq.merge_settings`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from epmq.merging import entrywise, matrices, spherical


@dataclass(frozen=True)
class Method:
    """How a method merges.

    Attributes:
        entries: merges any tensor: base [*shape] and experts K × [*shape] to [*shape] in the base's dtype.
        matrix: merges the weight of a linear layer in its place: task vectors, K × [out, in] float32, to one of them,
            [out, in] float32. None where all tensors are merged alike.
        whole: `entries` needs a tensor as a whole; other functions are given some rows of a large one at a time.
    """

    entries: Callable[..., Tensor]
    matrix: Callable[..., Tensor] | None = None
    whole: bool = False


METHODS: dict[str, Method] = {
    "average": Method(entrywise.average),
    "task_arithmetic": Method(entrywise.task_arithmetic),
    "ties": Method(entrywise.ties),
    "dare": Method(entrywise.dare, whole=True),
    "consensus": Method(entrywise.consensus),
    "breadcrumbs": Method(entrywise.breadcrumbs, whole=True),
    "della": Method(entrywise.della, whole=True),
    "model_stock": Method(spherical.model_stock, whole=True),
    "slerp": Method(spherical.slerp, whole=True),
    "karcher": Method(spherical.karcher, whole=True),
    # In a run these are the anchor of what layers are fitted to, see `epmq.recipe.Recipe.guidance`.
    "regmean": Method(entrywise.average),
    "regmean_pp": Method(entrywise.average),
    "wudi": Method(entrywise.mean_vector, matrices.wudi),
    "tsv_m": Method(entrywise.mean_vector, matrices.tsv_m),
    "iso_c": Method(entrywise.mean_vector, matrices.iso_c),
    "iso_cts": Method(entrywise.mean_vector, matrices.iso_cts),
}
