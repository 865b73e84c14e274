"""What a run leaves behind: weights in the recipe's format, config, heads, processor."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

from rich.progress import Progress
from torch import Tensor, nn

from epmq.calibration.engine import Block, LayerReport, report_of
from epmq.calibration.head_refit import HeadFit, with_weights
from epmq.export import FORMATS
from epmq.export.form import Form
from epmq.files import write_json
from epmq.merging.readers import ExpertReader
from epmq.models.blocks import LINEAR, as_matrix, find_stacks, is_transposed
from epmq.models.checkpoint import DTYPE_NAMES, TensorSpec, count_parameters, is_finite
from epmq.models.heads import load_head, save_head, write_head_file
from epmq.models.mixtures import routers
from epmq.models.multitask import HEADS, NativeHead
from epmq.models.pieces import tensor_on_disk
from epmq.models.side_files import copy_files
from epmq.models.writer import CheckpointWriter, specs_on_disk
from epmq.pipeline.prepare import PreparedRun
from epmq.pipeline.processor import write_processor
from epmq.pipeline.verify import WrongOutputError
from epmq.quantization.grid import Grid


class QuantizedWeights:
    """Writes and reads the weights of a quantized output: the tensors outside the blocks, and block after block.

    The writer has the `weight_specs` of the run; what lies in the files of an earlier run stays.
    """

    def __init__(self, run: PreparedRun, writer: CheckpointWriter) -> None:
        self._run, self._format, self._layout = run, FORMATS[run.recipe.format], run.layout
        self._stored, self._writer = run.experts.written, writer

    def _layer(self, name: str) -> str:
        """A layer's name on disk."""
        return self._stored[f"{name}.weight"].removesuffix(".weight")

    def _is_transposed(self, name: str) -> bool:
        return is_transposed(self._run.experts.model.get_submodule(name))

    def write_outside(self) -> list[LayerReport]:
        """Merge and write the tensors that lie in no block, but for layers that are solved after the last one.

        Returns:
            a report for each that is rounded to nearest, such as a table.
        """
        layout, merged, reports = self._layout, self._run.merged, list[LayerReport]()
        for name in self._run.experts.outside_names():
            layer = name.removesuffix(".weight")
            if name not in layout.of or layer in layout.late:
                continue
            if layout.of[name].grid is None:
                self._writer.write(self._stored[name], (layout.cast(name, part) for part in merged.parts(name)))
                continue
            block, start = Block("", []), time.perf_counter()
            weight = block.layers[layer] = layout.round(name, self._matrix_parts(name))
            self.write_block(block)
            self.check_block(block)
            reports.append(
                report_of(layer, weight.codes, weight.grid, group=layer, seconds=time.perf_counter() - start)
            )
        return reports

    def _matrix_parts(self, name: str) -> Iterable[Tensor]:
        """A merged weight [out, in], some rows at a time where it is stored so."""
        if self._is_transposed(name.removesuffix(".weight")):
            return [self._run.merged.tensor(name).T]
        return self._run.merged.parts(name)

    def write_block(self, block: Block) -> None:
        """Write a finished block; when this returns it is on the disk."""
        for name, weight in block.layers.items():
            for stored, tensor in self._format.tensors(self._layer(name), weight, form_of(self._run, name)).items():
                self._writer.write(stored, tensor)
        for name, tensor in block.tensors.items():
            self._writer.write(self._stored[name], tensor)
        self._writer.sync()

    def check_block(self, block: Block) -> None:
        """Read a block's layers back and hold them against their codes, where no data is there to run them on.

        Raises:
            WrongOutputError: a layer is another one, or not finite; it is named.
        """
        for name, weight in block.layers.items():
            plain = weight.dequantize()
            if not is_finite(plain):
                raise WrongOutputError(f"{name}: weights are not finite when quantized; nothing was published")
            if not self._plain(name).equal(plain):
                raise WrongOutputError(
                    f"{self._writer.folder}: read back, {name} is not what was quantized; nothing was published"
                )

    def _plain(self, name: str) -> Tensor:
        """The weight [out, in] of a quantized layer that has been written."""
        return self._format.weight(self._layer(name), self._writer.tensor, form_of(self._run, name))

    def tensor(self, name: str) -> Tensor:
        """A tensor that has been written, by its name in the model and as the model stores it."""
        layer = name.removesuffix(".weight")
        if self._layout.of[name].grid is None:
            return self._writer.tensor(self._stored[name])
        return as_matrix(self._run.experts.model.get_submodule(layer), self._plain(layer))


def weight_specs(run: PreparedRun) -> dict[str, TensorSpec]:
    """Stored name → dtype and shape of every tensor that a run writes, in the order in which they are written."""
    return specs_on_disk(_specs(run), run.experts.base.checkpoint.shape)


def _specs(run: PreparedRun) -> dict[str, TensorSpec]:
    """As `weight_specs`, with pieces of tensors on disk by their names."""
    experts, layout = run.experts, run.layout
    if not layout.of:
        return {experts.written[name]: experts.base.spec(name) for name in experts.names}
    specs = dict[str, TensorSpec]()
    for name in experts.outside_names():
        specs |= specs_of(run, name) if name in layout.of else {}
    for stack in find_stacks(experts.model):
        for index in range(len(stack.blocks)):
            names = experts.block_names(stack.block_name(index))
            for name in sorted(names, key=lambda name: layout.of[name].grid is None):
                specs |= specs_of(run, name)
    return specs


def parameters_of(run: PreparedRun) -> int:
    """How many parameters the output has."""
    return count_parameters(run.experts.base.spec(name) for name in run.layout.of or run.experts.names)


def specs_of(run: PreparedRun, name: str, grid: Grid | None = None) -> dict[str, TensorSpec]:
    """Stored name → dtype and shape of what is written of a tensor of the model; `grid` takes the place of its own."""
    stored, (dtype, shape), storage = run.experts.written[name], run.experts.base.spec(name), run.layout.of[name]
    if storage.grid is None and grid is None:
        return {stored: (dtype if storage.dtype is None else DTYPE_NAMES[storage.dtype], shape)}
    form = form_of(run, name.removesuffix(".weight"))
    form = form if grid is None else replace(form, grid=grid)
    rows, columns = shape[::-1] if form.transposed else shape
    return FORMATS[run.recipe.format].specs(stored.removesuffix(".weight"), (rows, columns), form)


def form_of(run: PreparedRun, layer: str) -> Form:
    """How the quantized weight of a layer is stored, by its name in the model."""
    experts, storage = run.experts, run.layout.of[f"{layer}.weight"]
    assert storage.grid is not None and storage.dtype is not None and storage.scale is not None
    module = experts.model.get_submodule(layer)
    tied = [name.removesuffix(".weight") for name, leader in experts.tied.items() if leader == f"{layer}.weight"]
    followers = tuple(name for name in tied if experts.model.get_submodule(name) is not module)
    table = isinstance(module, nn.Embedding)
    return Form(storage.grid, storage.dtype, storage.scale, is_transposed(module), table, followers)


def write_merged(run: PreparedRun, folder: Path, bar: Progress) -> int:
    """Merge into `folder` without quantizing; returns the bytes of all weights."""
    held: dict[str, list[str]] = {}
    for name, stored in run.experts.written.items():
        held.setdefault(tensor_on_disk(stored), []).append(name)
    with CheckpointWriter(folder, weight_specs(run), reread=False) as writer:
        for tensor in bar.track(writer.order, description="merge"):
            for name in held[tensor]:
                writer.write(run.experts.written[name], run.merged.parts(name))
        writer.finish()
        return writer.total


def write_rest(run: PreparedRun, folder: Path, fits: Mapping[str, HeadFit]) -> None:
    """Write all that is beside the weights: config, heads, and the base's other files.

    `fits` says, by task, what became of its head, where it follows the model.
    """
    write_config(run, folder)
    (folder / HEADS).mkdir(exist_ok=True)
    for expert in run.experts.experts.values():
        _write_head(expert, folder / HEADS / f"{expert.task}.safetensors", fits.get(expert.task))
    if not any((folder / HEADS).iterdir()):
        (folder / HEADS).rmdir()
    copy_files(run.side_files, folder)
    write_processor(run.plan, run.experts, folder)


def write_config(run: PreparedRun, folder: Path) -> None:
    """Write `config.json`: the base's with what the recipe changes, and how weights are quantized."""
    model, forms = run.experts.model, {name: form_of(run, name) for name in run.layout.quantized()}
    model.config.save_pretrained(folder)
    config = {**run.experts.config, "architectures": [type(model).__name__]}
    if run.experts.is_untied:
        config["tie_word_embeddings"] = False
    config.pop("quantization_config", None)
    if forms:
        # Else it would be found in the file, where norms may have another one than is computed in.
        config = {"dtype": _dtype(run), **config} if "torch_dtype" not in config else config
        named = {*forms, *(name for form in forms.values() for name in form.followers)}
        ignored = [name for name, module in model.named_modules() if isinstance(module, LINEAR) and name not in named]
        # To others the modules that choose experts are linear layers, too.
        choosing = [name for name in routers(model) if f"{name}.weight" in run.experts.written]
        choosing += [run.experts.written[f"{name}.weight"].removesuffix(".weight") for name in choosing]
        ignored += dict.fromkeys(name for name in choosing if name not in ignored)
        # transformers looks a layer up by its name in the model; whoever reads the file alone, by the one in there
        stored = {run.experts.written[f"{name}.weight"].removesuffix(".weight"): form for name, form in forms.items()}
        settings = FORMATS[run.recipe.format].config({**forms, **stored}, ignored)
        if settings is not None:
            config["quantization_config"] = settings
    write_json(folder / "config.json", config)


def _dtype(run: PreparedRun) -> str:
    """The dtype that most of the base's weights are stored in."""
    experts = run.experts
    sizes = Counter[str]()
    for name in experts.names:
        sizes[str(experts.base.dtype(name)).removeprefix("torch.")] += prod(experts.base.shape(name))
    return next(name for name, _ in sizes.most_common() if name != "None")


def _write_head(expert: ExpertReader, path: Path, fit: HeadFit | None) -> None:
    """Write a task's head: the expert's own, or what became of it where it follows the model."""
    if expert.head_file is not None:
        head = load_head(expert.head_file)
        save_head(head if fit is None else with_weights(head, fit.fit), path)
        return
    tensors, config = expert.head_tensors(), expert.head_config
    if not tensors or config is None:
        return
    if fit is not None and isinstance(fit.head, NativeHead):
        tensors = fit.head.with_weights(tensors, fit.fit.weight, fit.fit.bias)
    write_head_file(path, tensors, {"architecture": config["architectures"][0], "config": config})
