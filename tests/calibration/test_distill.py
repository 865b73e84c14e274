import pytest
import torch
import transformers
from conftest import padded_batches, tiny_bert
from families import FAMILIES, decoder
from torch.nn import functional

from epmq.calibration import distill
from epmq.calibration.distill import Distiller, head_loss, language_loss, last_hidden_states, says, score_form
from epmq.calibration.head_refit import CannotFollow
from epmq.calibration.held_out import OutputLayer, Piece, Said, TaskPieces
from epmq.calibration.student import Student
from epmq.models.heads import Head
from epmq.models.multitask import MultiTaskModel


def said(rows: int = 5, classes: int = 3) -> Said:
    return Said(torch.randn(rows, 8), torch.randn(rows, classes))


@pytest.mark.parametrize("kind", ["class", "tags", "span", "labels", "number", "choice", None])
def test_nothing_is_lost_where_both_say_the_same(kind):
    one = said()
    assert float(head_loss(kind, one, one)) == pytest.approx(0, abs=1e-6)
    assert float(head_loss(kind, said(), one)) > 0.1


def test_the_loss_of_a_class():
    own, taught = said(), said()
    p, log_q = taught.scores.softmax(-1), own.scores.log_softmax(-1)
    expected = (p * (p.log() - log_q)).sum(-1).mean() + 0.1 * (own.scores - taught.scores).square().mean()
    expected = expected + 1 - functional.cosine_similarity(own.features, taught.features).mean()
    torch.testing.assert_close(head_loss("class", own, taught), expected)


def test_the_loss_of_numbers_does_not_depend_on_their_unit():
    own, taught = said(classes=1), said(classes=1)
    more = [Said(one.features, 1000 * one.scores) for one in (own, taught)]
    torch.testing.assert_close(head_loss("number", *more, spread=1e6), head_loss("number", own, taught))


def test_a_head_without_features_has_its_scores_alone():
    own, taught = said(), said()
    without = head_loss("class", Said(None, own.scores), taught)
    cosine = functional.cosine_similarity(own.features, taught.features).mean()
    torch.testing.assert_close(without + 1 - cosine, head_loss("class", own, taught))


def native(name: str, **settings):
    from epmq.models.multitask import NativeHead

    config = tiny_bert().config.to_dict() | settings
    model = getattr(transformers, f"BertFor{name}")(transformers.BertConfig(**config)).eval()
    own = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("bert.")}
    backbone = model.bert
    return backbone, NativeHead(backbone, f"BertFor{name}", {"model_type": "bert", **config}, own)


@pytest.mark.parametrize("name", ["TokenClassification", "QuestionAnswering"])
def test_padding_says_nothing(name):
    """More padding, and other tokens in it, change no loss."""
    backbone, head = native(name, num_labels=2)
    [inputs] = padded_batches(1)
    junk = {"input_ids": torch.randint(5, 32, (4, 3)), "attention_mask": torch.zeros(4, 3, dtype=torch.long)}
    wider = {key: torch.cat([value, junk[key]], 1) for key, value in inputs.items()}
    one, other = (says(backbone, head, batch) for batch in (inputs, wider))
    taught = [Said(part.features + 1, part.scores * 2) for part in (one, other)]
    kind = head.task.kind
    torch.testing.assert_close(one.features, other.features, rtol=1e-4, atol=1e-5)
    divergences = [head_loss(kind, Said(None, a.scores), Said(None, b.scores)) for a, b in zip((one, other), taught)]
    if kind == "span":  # the squared error is spread over padding
        divergences = [distill.divergence(a.scores, b.scores) for a, b in zip((one, other), taught)]
        assert one.scores.shape == (8, inputs["input_ids"].shape[1])
    torch.testing.assert_close(*divergences, rtol=1e-3, atol=1e-5)


def test_scores_of_a_vocabulary_are_not_kept(monkeypatch):
    monkeypatch.setattr(distill, "MOST_CLASSES", 2)
    backbone, head = native("TokenClassification", num_labels=3)
    assert says(backbone, head, padded_batches(1)[0]).scores is None


def test_next_tokens_a_few_at_a_time(monkeypatch):
    hidden, taught = torch.randn(7, 8, requires_grad=True), torch.randn(7, 8)
    own, experts = torch.nn.Linear(8, 11), torch.nn.Linear(8, 11)
    results = []
    for most in (1 << 20, 22):
        monkeypatch.setattr(distill, "MOST_SCORES", most)
        loss = language_loss(hidden, taught, OutputLayer(own), OutputLayer(experts), 11)
        results.append((loss, torch.autograd.grad(loss, hidden)[0]))
    torch.testing.assert_close(results[0], results[1])
    expected = distill.divergence(own(hidden), experts(taught)) / 7
    torch.testing.assert_close(results[0][0], expected)


@pytest.mark.parametrize("name", ["llama", "t5", "flan_t5", "gpt2", "bart"])
def test_what_the_output_layer_receives_gives_the_scores(name):
    if name not in FAMILIES:
        pytest.skip("no such family")
    family = FAMILIES[name]
    model, inputs = family.build(), family.batches()[0]
    with torch.no_grad():
        form = score_form(model, inputs)
        scores = OutputLayer(model.get_output_embeddings(), *form)(last_hidden_states(model, inputs))
        final = model(**inputs).logits
    mask = inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()
    torch.testing.assert_close(scores, final[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind, settings, form",
    [
        ("Cohere", {"logit_scale": 0.25}, (0.25, None)),
        ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 16}, (1.0, 2.0)),
    ],
)
def test_what_follows_on_the_output_layer(kind, settings, form):
    model = decoder(kind, **settings)()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
        scale, cap = score_form(model, padded_batches(1)[0])
    assert (scale, cap) == (pytest.approx(form[0], rel=1e-5), form[1])


def test_scores_that_follow_otherwise_are_refused():
    model = FAMILIES["llama"].build()
    forward = model.forward
    model.forward = lambda **inputs: type("Out", (), {"logits": forward(**inputs).logits ** 3})
    with torch.no_grad(), pytest.raises(CannotFollow, match="not what its output layer gives"):
        score_form(model, padded_batches(1)[0])


def distiller(rate: float = 1e-2) -> Distiller:
    """A plain BERT whose norms, biases and heads learn from two others."""
    torch.manual_seed(9)
    model, tasks, heads = tiny_bert(), {}, {}
    for seed, task in enumerate(("one", "two")):
        torch.manual_seed(seed)
        expert, heads[task] = tiny_bert(), Head(torch.randn(3, 64), torch.randn(3), "mean")
        with torch.no_grad():
            pieces = [(batch, says(expert, heads[task], batch)) for batch in padded_batches(4 - seed)]
        made = [Piece(batch, lambda one=one: one) for batch, one in pieces]
        tasks[task] = TaskPieces(made[:-1], made[-1:])
    dtypes = {name: torch.float16 for name, _ in model.named_parameters()}
    dtypes |= {Student.HEAD.format(task, leaf): torch.float32 for task in heads for leaf in ("weight", "bias")}
    return Distiller(Student(MultiTaskModel(model, heads), ["encoder.layer.0"], dtypes), tasks, rate)


def test_an_epoch_has_as_many_steps_of_every_task():
    steps = distiller().steps(1, 0)
    assert len(steps) == 6 and [task for task, _ in steps].count("one") == 3
    assert sorted(number for task, number in steps if task == "one") == [0, 1, 2]
    assert {number for task, number in steps if task == "two"} == {0, 1}
    assert all({task for task, _ in steps[i : i + 2]} == {"one", "two"} for i in (0, 2, 4))
    assert steps == distiller().steps(1, 0) != distiller().steps(2, 0)


def test_the_held_out_loss_falls_and_is_that_of_the_stored_model():
    one = distiller()
    losses = [one.held_out_loss()]
    for epoch in range(3):
        for step in one.steps(epoch, 0):
            one.step(*step)
        losses.append(one.held_out_loss())
    assert losses[3] < 0.9 * losses[0]
    with one.student.as_stored():
        means = [float(one.loss(task, own.held_out[0])) for task, own in one.tasks.items()]
    assert losses[3] == pytest.approx(sum(means) / 2, rel=1e-5)


def test_training_goes_on_from_its_state():
    whole, first, second = distiller(), distiller(), distiller()
    for epoch in (1, 2):
        for step in whole.steps(epoch, 0):
            whole.step(*step)
    for step in first.steps(1, 0):
        first.step(*step)
    second.go_on_from({name: tensor.clone() for name, tensor in first.state().items()})
    for step in second.steps(2, 0):
        second.step(*step)
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[name]), name
