"""llama.cpp computes what `epmq.load` does, and what does not is found."""

import pytest
import torch
from conftest import WORDS, padded_batches
from families import FAMILIES
from packed_models import byte_pairs, packed
from transformers import BertTokenizerFast

from epmq.export import gguf as target
from epmq.export.gguf_run import log_perplexity, run
from epmq.files import read_json
from epmq.models.loading import load_model

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")


def test_decoders_give_the_same_next_tokens(tmp_path, monkeypatch):
    """… but for the error of inputs in 8 bits; rows in another order are found."""
    source, batches = packed(tmp_path, FAMILIES["llama"].build(), byte_pairs()), padded_batches(1)
    target.write(source, tmp_path)
    found = target.verify(tmp_path, source.checkpoint.path, batches)
    assert found["examples"] == 4 and found["texts"] == 1 and found["top1"] > 0.8 and found["kl"] < 0.001
    assert found["error"] == pytest.approx(found["expected"], abs=0.01)
    monkeypatch.setattr(target, "row_order", lambda config, name: None)
    target.write(source, tmp_path)
    with pytest.raises(RuntimeError, match="gives other next tokens than epmq"):
        target.verify(tmp_path, source.checkpoint.path, batches)


def test_the_perplexity_of_texts_is_that_of_pytorch(tmp_path):
    source, (batch,) = packed(tmp_path, FAMILIES["llama"].build(), byte_pairs()), padded_batches(1)
    [path] = target.write(source, tmp_path)
    model = load_model(source.checkpoint.path, read_json(source.checkpoint.path / "config.json"))
    sequences = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    with torch.no_grad():
        scores = [model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1) for ids in sequences]
    given = torch.cat([score.gather(1, ids[1:, None]) for score, ids in zip(scores, sequences)])
    assert log_perplexity(path, sequences) == pytest.approx(-float(given.mean()), rel=1e-3)


def test_encoders_give_the_same_features(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    source = packed(tmp_path, FAMILIES["bert"].build(), BertTokenizerFast(str(tmp_path / "vocab.txt")))
    target.write(source, tmp_path)
    batch = {"input_ids": torch.tensor([[2, 5, 7, 9, 3], [2, 6, 8, 3, 0]])}
    batch["attention_mask"] = (batch["input_ids"] > 0).long()
    found = target.verify(tmp_path, source.checkpoint.path, [batch])
    assert found["examples"] == 2 and found["texts"] == 1 and found["cosine"] > 0.999


def test_a_file_that_llama_cpp_cannot_open_is_an_error(tmp_path):
    (tmp_path / "model-q4_0.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(RuntimeError, match=r"model-q4_0.gguf: llama.cpp cannot run it \("):
        run(tmp_path / "model-q4_0.gguf", "open", [])
