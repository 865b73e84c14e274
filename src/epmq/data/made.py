"""Made-up examples, for trying a model where no data is at hand."""

from typing import Any

import numpy as np

from epmq.data.examples import Examples
from epmq.data.processors import tokenizer_of

TEXTS = ["one", "two words", "a text that is a little longer than the others", "and the last of them: 1, 2, 3."]
PIXELS = 64  # height and width of a picture, before the processor takes it to the model's own size


def made_examples(processor: Any, use: str) -> Examples:
    """Some texts, or pictures of noise where the processor takes no texts.

    Args:
        processor: the tokenizer, the image processor or both in one.
        use: kind of the examples that are made of texts: `text`, `causal` or `seq2seq`.
    """
    if tokenizer_of(processor) is not None:
        return Examples(use, TEXTS, targets=TEXTS[::-1] if use == "seq2seq" else None)
    noise = np.random.default_rng(0)
    return Examples("image", noise.integers(0, 256, (len(TEXTS), PIXELS, PIXELS, 3), dtype=np.uint8))
