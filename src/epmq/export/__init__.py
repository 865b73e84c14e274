"""Output formats. Each module turns one quantized layer into named tensors and describes itself for `config.json`.

To add a format, write a module with the two functions and give it a line in `FORMATS`.
"""

from epmq.export import dequantized, packed

FORMATS = {"pack-quantized": packed, "dequantized": dequantized}
