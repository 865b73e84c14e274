"""vLLM, which reads pack-quantized checkpoints as they are: nothing is written, and it is said whether it takes one.

The rules are those of its code: what its config parser, its models and its weight loaders did with small checkpoints of
every kind (vLLM 0.32, without a GPU: no model ran), and what its kernels say that they implement.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from epmq.errors import InputError
from epmq.export.form import in_block
from epmq.export.target import Coded, Contents, experts_of, refuse_grid
from epmq.models.codes import CodedCheckpoint
from epmq.quantization.grid import Grid

TITLE = "vLLM, which should open the checkpoint as it is, by the code of 0.32 that reads configs and weights; not run"
PACKAGES: tuple[str, ...] = ()
EXTRA: str | None = None
RUNTIME: str | None = None

# Types of models that it has no class for, and that it could not open through transformers' classes either.
ABSENT = ("bart", "clip_vision_model", "dinov2", "distilbert", "t5", "vit")
# Bits that its kernels multiply with: of 4 bits with zero points too, of 8 with them only on Hopper. Those of 2 and 3
# are read, and no kernel of its own takes them.
BITS, WITH_ZERO_POINTS = (4, 8), (4,)
WORD = 32
# Layers outside the blocks that may be quantized, by the ends of their names.
OUTSIDE = ("lm_head", "pooler.dense")
# Layers that it puts together into one, which has one grid; by the last parts of their names.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))
# What it calls the layers of experts when it looks for their grid, whatever files call them.
EXPERT = {"gate_proj", "up_proj", "down_proj"}


def check(contents: Contents) -> None:
    """Refuse what vLLM does not open: see `epmq.export.target.Target`."""
    model_type = contents.config.get("model_type")
    if model_type in ABSENT:
        raise InputError(f"vllm: it has no class for models of type {model_type}")
    tables = [name for name, coded in contents.layers.items() if _is_table(name, coded, contents)]
    if tables:
        raise InputError(f"vllm: it does not open {tables[0]}, a quantized table of tokens: use embeddings: 16")
    for name, coded in contents.layers.items():
        _check_layer(name, coded)
    for parts in fused_layers(contents):
        grids = {part: contents.layers[part].grid if part in contents.layers else None for part in parts}
        if len(set(grids.values())) > 1:
            raise InputError(f"vllm: it makes one layer of {' and '.join(parts)}: they need one grid")
    for mixture, parts in experts_of(contents).items():
        if any(part in contents.layers for part in parts):
            _check_mixture(mixture, parts, contents)


def write(source: CodedCheckpoint, folder: Path) -> list[Path]:
    """Nothing: the checkpoint is what vLLM reads."""
    return []


def fused_layers(contents: Contents) -> Iterator[list[str]]:
    """The layers that vLLM puts together, a list for each that it makes of them; those that are plain, too."""
    plain = {name.removesuffix(".weight") for name, shape in contents.plain.items() if len(shape) == 2}
    names = contents.layers.keys() | plain
    for name in contents.layers:
        module, _, leaf = name.rpartition(".")
        for leaves in FUSED:
            if leaf in leaves:
                yield [part for one in leaves if (part := f"{module}.{one}") in names]


def _check_mixture(mixture: str, parts: list[str], contents: Contents) -> None:
    """Refuse a mixture that vLLM does not open as one layer."""
    grids = {part: contents.layers[part].grid if part in contents.layers else None for part in parts}
    if len(set(grids.values())) > 1:
        raise InputError(f"vllm: it makes one layer of all experts of {mixture}: they need one grid")
    if any(not grid.symmetric for grid in grids.values() if grid is not None):
        raise InputError(f"vllm: it takes no zero points for experts ({mixture}): use symmetric: true")
    if any(f"{part}.bias" in contents.plain for part in parts):
        raise InputError(f"vllm: it reads experts that have biases ({mixture}) only as their own files hold them")
    others = {coded.grid for name, coded in contents.layers.items() if in_block(name)}
    if len(others) > 1 and {part.rpartition(".")[2] for part in parts} - EXPERT:
        raise InputError(f"vllm: it finds the grid of {mixture} only where all linear layers are on it")


def _is_table(name: str, coded: Coded, contents: Contents) -> bool:
    """Whether a weight is a table of tokens: what is packed says no more of itself than its name and its shape."""
    rows = contents.config.get("vocab_size")
    return coded.form.table or (not in_block(name) and not name.endswith(OUTSIDE) and coded.shape[0] == rows)


def _check_layer(name: str, coded: Coded) -> None:
    """Refuse a linear layer that vLLM does not open or cannot multiply with."""
    grid, rows = coded.grid, coded.shape[0]
    if coded.form.transposed:
        raise InputError(f"vllm: {name} is stored as [in, out], which it does not read")
    if not in_block(name) and not name.endswith(OUTSIDE):
        raise InputError(
            f"vllm: it reads {name}, which lies outside the blocks, only as it is: use overrides: "
            f"[{{layers: {name}, skip: true}}]"
        )
    if grid.bits not in (BITS if grid.symmetric else WITH_ZERO_POINTS):
        raise refuse_grid("vllm", name, grid, _nearest(grid))
    if not grid.symmetric and rows * grid.bits % WORD:
        raise InputError(f"vllm: the zero points of the {rows} rows of {name} fill no whole words: use symmetric: true")


def _nearest(grid: Grid) -> Grid:
    """The nearest grid that its kernels multiply with: 8 bits lose their zero points, fewer bits become 4."""
    return replace(grid, symmetric=True) if grid.bits in BITS else replace(grid, bits=BITS[0])
