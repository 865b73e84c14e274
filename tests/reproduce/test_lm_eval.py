import sys
from pathlib import Path

import datasets
import pytest
import torch
import transformers

from epmq.reproduce.lm_eval import lm_eval, load_lm_eval
from epmq.reproduce.tables import LmEvalTask, load_table
from tests.kit.mirror import build

MMLU = LmEvalTask(metric="acc,none", dataset="alexandrainst/m_mmlu")
ROWS = 24


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    build(load_table("llama-mergebench"), folder, rows=ROWS)
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def opened(hub):
    folder = hub / "meta-llama" / "Llama-3.2-3B"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
def test_the_score_is_that_of_the_likeliest_answer(hub):
    model, tokenizer = opened(hub)
    shares = lm_eval(model, tokenizer, {"m_mmlu_fr": MMLU, "m_mmlu_de": MMLU}, hub=hub, batch_size=5)
    for language in ("fr", "de"):
        file = hub / "datasets" / MMLU.dataset / language / "test-00000-of-00001.parquet"
        right = 0
        for row in datasets.Dataset.from_parquet(str(file)):
            options = "\n".join(f"{letter}. {row['option_' + letter.lower()]}" for letter in "ABCD")
            ids = tokenizer(f"{row['instruction']}\n{options}\nAnswer:")["input_ids"]
            likelihoods = []
            for letter in "ABCD":
                answer = tokenizer(f" {letter}", add_special_tokens=False)["input_ids"]
                with torch.no_grad():
                    scores = model(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
                likelihoods.append(sum(scores[len(ids) - 1 + i, token].item() for i, token in enumerate(answer)))
            right += "ABCD"[max(range(4), key=likelihoods.__getitem__)] == row["answer"]
        assert shares[f"m_mmlu_{language}"] == pytest.approx(right / ROWS) and 0 < right < ROWS


def test_what_lm_eval_does_not_have_is_named(hub):
    model, tokenizer = opened(hub)
    with pytest.raises(ValueError, match="lm-eval has no task m_mmlu_xx"):
        lm_eval(model, tokenizer, {"m_mmlu_xx": MMLU}, hub=hub)
    wrong = LmEvalTask(metric="bleu,none", dataset=MMLU.dataset)
    with pytest.raises(ValueError, match=r"m_mmlu_fr has no metric bleu,none; it has .*acc,none"):
        lm_eval(model, tokenizer, {"m_mmlu_fr": wrong}, hub=hub, limit=1)


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'epmq\[lm-eval\]'"):
        load_lm_eval()
