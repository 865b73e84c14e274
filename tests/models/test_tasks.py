"""What a task head answers, as transformers' own tables say it."""

import pytest
import transformers

from epmq.models.tasks import input_names, kind_of_class, output_names, task_of_class, task_of_settings


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("BertForSequenceClassification", "class"),
        ("LlamaForSequenceClassification", "class"),
        ("T5ForSequenceClassification", "class"),
        ("ViTForImageClassification", "class"),
        ("DeiTForImageClassificationWithTeacher", "class"),
        ("HubertForSequenceClassification", "class"),
        ("BertForNextSentencePrediction", "class"),
        ("RobertaForTokenClassification", "tags"),
        ("BartForQuestionAnswering", "span"),
        ("XLNetForQuestionAnsweringSimple", "span"),
        ("BertForMultipleChoice", "choice"),
        ("XLNetForQuestionAnswering", None),
        ("LayoutLMv3ForQuestionAnswering", None),
        ("TapasForQuestionAnswering", None),
        ("BertForMaskedLM", None),
        ("Wav2Vec2ForCTC", None),
        ("DetrForObjectDetection", None),
        ("SegformerForSemanticSegmentation", None),
        ("nothing", None),
    ],
)
def test_a_class_is_found_in_the_tables(architecture, kind):
    assert kind_of_class(architecture) == kind


@pytest.mark.parametrize(
    ("settings", "kind", "size"),
    [
        ({"num_labels": 3}, "class", 3),
        ({"num_labels": 1}, "number", 1),
        ({"num_labels": 2, "problem_type": "regression"}, "number", 2),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "labels", 3),
        ({"id2label": {"0": "a", "10": "c", "2": "b"}}, "class", 3),
    ],
)
def test_the_config_says_what_the_scores_are(settings, kind, size):
    content = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], **settings}
    found = task_of_settings(content)
    assert (found.kind, found.size, found.title) == (kind, size, "BertForSequenceClassification")
    assert found.names == (("a", "b", "c") if "id2label" in settings else found.names)
    assert task_of_settings({"architecture": content["architectures"][0]}, content) == found


def test_what_has_no_classes_has_no_names():
    config = transformers.BertConfig()
    assert task_of_class("BertForQuestionAnswering", config).names == ()
    assert task_of_class("BertForMaskedLM", config).labels is None
    assert task_of_class("BertForQuestionAnswering", config).use == "question"


def test_inputs_and_outputs_are_read_off_the_forward():
    assert "last_hidden_state" in output_names(transformers.BertModel)
    assert "last_hidden_state" not in output_names(transformers.LlamaForCausalLM)
    assert output_names(type("Silent", (), {"forward": lambda self: None})) is None
    names, others = input_names(transformers.BertForQuestionAnswering)
    assert {"input_ids", "token_type_ids"} <= names and "start_positions" not in names
    assert isinstance(others, bool)
