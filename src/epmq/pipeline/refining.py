"""The step after quantization: what was written is trained towards the experts, without touching a code."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from epmq.calibration.distill import PLAIN_FORM, Distiller, output_product, says, score_form
from epmq.calibration.engine import block_names
from epmq.calibration.held_out import Inputs, OutputLayer, Piece, Said, TaskPieces, hold_out
from epmq.calibration.student import Student
from epmq.data.encoding import split_first, to_device
from epmq.errors import InputError, error_context
from epmq.files import write_whole
from epmq.merging.readers import ExpertReader, guiding_head
from epmq.models.checkpoint import DTYPES
from epmq.models.heads import Head, load_head, read_head_file, save_head, write_head_file
from epmq.models.hooks import first_tensor, stops_before, without_cache
from epmq.models.multitask import HEADS, load
from epmq.models.writer import CheckpointWriter
from epmq.notes import Notes
from epmq.pipeline.journal import Workdir
from epmq.pipeline.output import weight_specs
from epmq.pipeline.prepare import PreparedRun
from epmq.pipeline.verify import WrongOutputError, check_reloaded
from epmq.quantize_settings import RefinedSettings
from epmq.runtime import return_freed_memory

# Files of this step beside the finished blocks: what it begins with, where it is, and what each expert has said.
START, STATE, SAID = "refine-start", "refine-state", "refine-said-{}-{:05d}"
# Epochs without a better model after which no more are tried.
PATIENCE = 2
# Examples on which the form of a language model's scores is tried.
TRIED = 2


def refines(run: PreparedRun) -> bool:
    """Whether the recipe asks for this step."""
    settings = run.recipe.quantize
    return isinstance(settings, RefinedSettings) and settings.refine != "off"


def examples_of(run: PreparedRun) -> Mapping[str, list[Inputs]]:
    """What is trained on and held out: task → inputs of the model, batch by batch."""
    return run.refining or run.calibration


def check_refine(run: PreparedRun) -> None:
    """Refuse, before any compute, what cannot be refined; an InputError says why."""
    if not refines(run):
        return
    if run.recipe.format != "pack-quantized":
        raise InputError("quantize.refine: it keeps codes as they are: use format: pack-quantized")
    if not run.layout.quantized() and not run.layout.free:
        raise InputError("quantize.refine: nothing is quantized, so there are no codes to keep")
    for task, expert in run.experts.experts.items():
        if not run.recipe.task_weight(task):
            continue
        with error_context(f"experts.{task}.calibration"):
            hold_out(examples_of(run)[task])
        head = guiding_head(expert, Notes(), run.experts.model)
        if head is None and not run.experts.output_layer():
            raise InputError(
                f"quantize.refine: expert {task} has no head, and {type(run.experts.model).__name__} gives no scores "
                "of its own, so there is nothing to distil"
            )


def read_quantized(workdir: Workdir) -> dict[str, Any] | None:
    """What `refine` was given as `written` by a run that was stopped in it or later; None if none was.

    The output's files may be refined in part by then, so nothing of them may be quantized again.
    """
    file = _file(workdir, START)
    return _read(file)[1] if file.exists() else None


def refine(run: PreparedRun, workdir: Workdir, written: Mapping[str, Any], bar: Progress) -> dict[str, Any]:
    """Train what lies in the work folder towards the experts, and write it back, if held-out examples say so.

    Every epoch is kept in the work folder: a run that was stopped goes on from there, to the same bytes.

    Args:
        written: what is known of the quantized model, as plain values; kept for a run that goes on.

    Returns:
        held-out losses, epoch by epoch from the unrefined model, which of them was kept, and how many numbers were
        trained.

    Raises:
        WrongOutputError: what was written is not what was trained.
    """
    student = open_student(run, workdir.output)
    file = _file(workdir, START)
    if file.exists():
        student.begin_at(_read(file)[0])
    else:
        write_whole(file, _packed(student.start, {"written": written, "notes": list(run.experts.notes)}))
    with without_cache(student.backbone):
        losses, best = _train(run, workdir, student, bar)
        kept = losses.index(min(losses))
        if kept:
            write_refined(run, workdir.output, student, best)
            _check_written(run, workdir, student, best)
    trained = sum(parameter.numel() for parameter in student.parameters.values())
    return {"held_out": losses, "kept": kept, "parameters": trained}


def open_student(run: PreparedRun, folder: Path) -> Student:
    """What was written, as a student: every tensor of one dimension that the run has written may be trained."""
    specs, written = weight_specs(run), run.experts.written
    dtypes = {name: DTYPES[specs[stored][0]] for name, stored in written.items() if stored in specs}
    model = load(folder, run.device, torch.float32, "packed-exact")
    for task in model.tasks:
        head = model.head(task)
        if isinstance(head, Head):
            own = {"weight": torch.float32, "bias": torch.float32}
        else:
            tensors = read_head_file(folder / HEADS / f"{task}.safetensors")[0]
            own = {leaf: tensors[name].dtype for leaf, name in head.scoring_names().items()}
        dtypes |= {Student.HEAD.format(task, leaf): dtype for leaf, dtype in own.items()}
    return Student(model, block_names(run.experts), dtypes)


def _train(
    run: PreparedRun, workdir: Workdir, student: Student, bar: Progress
) -> tuple[list[float], dict[str, Tensor]]:
    """Held-out losses from the unrefined model on, and the best model's tensors as they are stored."""
    settings, file = run.recipe.quantize, _file(workdir, STATE)
    assert isinstance(settings, RefinedSettings)
    losses, best, state = list[float](), dict(student.start), dict[str, Tensor]()
    if file.exists():
        tensors, facts = _read(file)
        losses = facts["held_out"]
        best = {name: tensors.pop(f"best/{name}").clone() for name in student.start}  # the file is replaced
        state = tensors
    if _is_over(losses, settings.refine_epochs):
        return losses, best
    distiller = make_distiller(run, workdir, student, settings.refine_learning_rate, bar)
    if state:
        distiller.go_on_from({name: tensor.to(run.device) for name, tensor in state.items()})
    shown = bar.add_task("refine", total=None)
    while not _is_over(losses, settings.refine_epochs):
        if losses:
            steps = distiller.steps(len(losses), run.recipe.seed)
            bar.update(shown, total=settings.refine_epochs * len(steps), completed=(len(losses) - 1) * len(steps))
            for step in steps:
                distiller.step(*step)
                bar.advance(shown)
        loss = distiller.held_out_loss()
        if not math.isfinite(loss) and losses:
            run.experts.notes.append(f"refine: no loss after epoch {len(losses)}; try a lower refine_learning_rate")
            break
        losses.append(loss)
        if losses.index(min(losses)) == len(losses) - 1:  # nor as good as an earlier one
            best = student.stored()
        bar.update(shown, description=f"refine, held-out loss {losses[-1]:.4g} of {losses[0]:.4g}")
        kept = {f"best/{name}": tensor for name, tensor in best.items()}
        write_whole(file, _packed({**distiller.state(), **kept}, {"held_out": losses}))
    return losses, best


def _is_over(losses: Sequence[float], epochs: int) -> bool:
    """Whether all epochs are done, or none has been better for some time."""
    if not losses:
        return False
    since = len(losses) - 1 - losses.index(min(losses))
    return len(losses) > epochs or since >= PATIENCE


def make_distiller(run: PreparedRun, workdir: Workdir, student: Student, rate: float, bar: Progress) -> Distiller:
    """What trains the student, when every expert has said what it has to say."""
    tasks, form = dict[str, TaskPieces](), PLAIN_FORM
    for task, expert in run.experts.experts.items():
        weight = run.recipe.task_weight(task) * len(run.experts.experts)
        if weight == 0:
            continue
        parts = [[to_device(one, run.device) for one in part] for part in hold_out(examples_of(run)[task])]
        pieces = ask_expert(run, expert, [one for part in parts for one in part], workdir, bar)
        train, held_out = pieces[: len(parts[0])], pieces[len(parts[0]) :]
        teacher = None
        if task not in student.heads:
            with student.as_stored():
                form = score_form(student.backbone, split_first([held_out[0].inputs], TRIED)[0])
            teacher = OutputLayer(_output_product(run, expert), *form)
        tasks[task] = TaskPieces(train, held_out, weight, _spread(pieces), teacher)
    return Distiller(student, tasks, rate, form)


def _spread(pieces: Sequence[Piece]) -> float:
    """The variance of what an expert's head gives."""
    scores = [said.scores.flatten() for said in (piece.taught() for piece in pieces) if said.scores is not None]
    variance = float(torch.cat(scores).var(correction=0)) if scores else 1.0
    return variance or 1.0


def ask_expert(
    run: PreparedRun, expert: ExpertReader, batches: Sequence[Inputs], workdir: Workdir, bar: Progress
) -> list[Piece]:
    """What an expert says to batches of its task; it is in memory until it has said it, and then in files."""
    files = [_file(workdir, SAID.format(expert.task, number)) for number in range(len(batches))]
    missing = [(file, inputs) for file, inputs in zip(files, batches) if not file.exists()]
    if missing:
        model = run.experts.whole_model(expert, run.device)
        head = guiding_head(expert, run.experts.notes, model)
        with torch.no_grad(), without_cache(model):
            for file, inputs in bar.track(missing, description=f"ask {expert.task}"):
                said = says(model, head, inputs)
                tensors = {"features": said.features, "scores": said.scores}
                write_whole(file, _packed({name: one for name, one in tensors.items() if one is not None}))
        del model, head
        return_freed_memory()
    return [Piece(inputs, partial(_read_said, file, run.device)) for file, inputs in zip(files, batches)]


def _read_said(file: Path, device: torch.device) -> Said:
    tensors = {name: tensor.to(device) for name, tensor in _read(file)[0].items()}
    return Said(tensors.get("features"), tensors.get("scores"))


def _output_product(run: PreparedRun, expert: ExpertReader) -> Any:
    """An expert's output layer as a function of last hidden states."""
    names = {name.rpartition(".")[2]: run.experts.tied.get(name, name) for name in run.experts.output_layer()}
    own = {leaf: expert.tensor(name).to(run.device) for leaf, name in names.items()}
    return output_product(own["weight"], own.get("bias"))


def write_refined(run: PreparedRun, folder: Path, student: Student, tensors: Mapping[str, Tensor]) -> None:
    """Write what was trained over what lies in a folder: scales, what has one dimension, heads."""
    written = run.experts.written
    with CheckpointWriter(folder, weight_specs(run)) as writer:
        for name, tensor in tensors.items():
            if f"{name}.weight" in written:
                writer.write(f"{written[f'{name}.weight'].removesuffix('.weight')}.weight_scale", tensor)
            elif name in written:
                writer.write(written[name], tensor)
        writer.sync()
    for task, head in student.heads.items():
        own = {leaf: tensors.get(Student.HEAD.format(task, leaf)) for leaf in ("weight", "bias")}
        file = folder / HEADS / f"{task}.safetensors"
        draft = file.with_name(f"{file.name}.draft")
        if own["weight"] is None:
            continue
        weight, bias = own["weight"].cpu(), None if own["bias"] is None else own["bias"].cpu()
        if isinstance(head, Head):
            before = load_head(file)
            save_head(replace(before, weight=weight, bias=before.bias if bias is None else bias), draft)
        else:
            stored, settings = read_head_file(file)
            write_head_file(draft, head.with_weights(stored, weight, bias), settings)
        draft.replace(file)


def _check_written(run: PreparedRun, workdir: Workdir, student: Student, tensors: Mapping[str, Tensor]) -> None:
    """Check that the output gives what the student gives with these tensors; if not, nothing of the run is kept."""
    first = to_device(run.calibration[next(iter(run.calibration))][0], run.device)
    inputs = split_first([first], TRIED)[0]
    try:
        check_reloaded(workdir.output, inputs, _last_output(run, student, tensors, inputs), run.calls)
    except WrongOutputError:
        for name in (START, STATE):
            _file(workdir, name).unlink(missing_ok=True)
        workdir.journal.clear()
        raise


def _last_output(run: PreparedRun, student: Student, tensors: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    """What the last block that is called gives on a batch, [..., hidden], with these tensors."""
    given, backbone = list[Tensor](), student.backbone
    with ExitStack() as stack:
        stack.enter_context(student.as_stored(tensors))
        for name in block_names(run.experts):
            block = backbone.get_submodule(name)
            stack.enter_context(
                block.register_forward_hook(lambda module, args, output: given.append(first_tensor(output)))
            )
        stops_before(backbone, backbone.get_output_embeddings(), inputs)
    return given[-1]


def _file(workdir: Workdir, name: str) -> Path:
    return workdir.kept / f"{name}.safetensors"


def _packed(tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> bytes:
    """The content of a file of tensors and plain values."""
    metadata = {"facts": json.dumps(facts or {}, ensure_ascii=False)}
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(str(file), framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        return tensors, json.loads((opened.metadata() or {})["facts"])
