"""Ready batches for tiny models of every kind of input; all have 32 or more tokens, of which 3 to 19 are drawn."""

from __future__ import annotations

from collections.abc import Callable

import torch

Batches = list[dict[str, torch.Tensor]]
Make = Callable[[], Batches]
VOCABULARY = 32
# Ids in the models that read pictures among their tokens.
PICTURE, PICTURE_START, PICTURE_END, VIDEO = 31, 30, 29, 28


def _ids(rows: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(4, 20, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def _noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def texts(mask: bool = True) -> Make:
    """Two batches of three texts of eight tokens, the first text of each with three tokens of padding."""

    def make() -> Batches:
        batches = []
        for seed in (1, 2):
            ids = _ids(3, 8, seed)
            if not mask:
                batches.append({"input_ids": ids})
                continue
            attention_mask = torch.ones_like(ids)
            ids[0, 5:] = attention_mask[0, 5:] = 0
            batches.append({"input_ids": ids, "attention_mask": attention_mask})
        return batches

    return make


def seq2seq() -> Batches:
    """Sources of eight tokens and targets of five."""
    return [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": _ids(3, 5, seed + 5)}
        for seed, ids in ((seed, _ids(3, 8, seed)) for seed in (1, 2))
    ]


def pictures(size: int = 28) -> Make:
    """Two batches of three square pictures."""
    return lambda: [{"pixel_values": _noise(3, 3, size, size, seed=seed)} for seed in (1, 2)]


def sound() -> Batches:
    """Two batches of three waves of 2000 samples."""
    return [{"input_values": _noise(3, 2000, seed=seed)} for seed in (1, 2)]


def speech() -> Batches:
    """Two batches of two spectrograms with targets."""
    return [{"input_features": _noise(2, 8, 60, seed=seed), "decoder_input_ids": _ids(2, 5, seed)} for seed in (1, 2)]


def texts_and_pictures() -> Batches:
    """As many texts as pictures; each text ends in the greatest id, as CLIP needs it."""
    batches = []
    for seed in (1, 2):
        ids = _ids(3, 8, seed)
        ids[:, -1] = VOCABULARY - 1
        batches.append({"input_ids": ids, "pixel_values": _noise(3, 3, 28, 28, seed=seed)})
    return batches


def texts_with_pictures(size: int = 28, types: bool = False) -> Make:
    """Texts of twelve tokens, four of which stand for a picture of four patches; `types` marks them."""

    def make() -> Batches:
        batches = []
        for seed in (1, 2):
            ids = _ids(2, 12, seed)
            ids[:, 2:6] = PICTURE
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            batch["pixel_values"] = _noise(2, 3, size, size, seed=seed)
            batches.append(batch | ({"token_type_ids": (ids == PICTURE).long()} if types else {}))
        return batches

    return make


def texts_with_patches() -> Batches:
    """As Qwen2-VL takes them: patches in rows, and for each picture how many there are."""
    batches = []
    for seed in (1, 2):
        ids = _ids(2, 12, seed)
        ids[:, 1], ids[:, 2:6], ids[:, 6] = PICTURE_START, PICTURE, PICTURE_END
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batch["pixel_values"] = _noise(2 * 16, 3 * 2 * 4 * 4, seed=seed)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
        batches.append(batch | {"mm_token_type_ids": (ids == PICTURE).int()})
    return batches


def texts_with_listed_pictures() -> Batches:
    """As Idefics takes them: a list of pictures for every text."""
    return [{**batch, "pixel_values": batch["pixel_values"][:, None]} for batch in texts_with_pictures()()]
