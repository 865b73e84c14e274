"""What a page runs on: packages of npm whose files are copied into it, each of one version and with its hash."""

from dataclasses import dataclass
from pathlib import Path

from epmq.packages import npm


@dataclass(frozen=True)
class Package:
    """A package of npm.

    Attributes:
        name, version: as npm has them.
        integrity: SHA-512 of its archive, in base64.
        files: what is needed of it, by their names in the archive.
        licence: under which it may be copied, and whose it is.
    """

    name: str
    version: str
    integrity: str
    files: tuple[str, ...]
    licence: str

    def fetch(self) -> Path:
        """Folder with its files; a RuntimeError says why npm could not fetch it."""
        return npm(f"{self.name}@{self.version}", self.integrity, self.files)


# The model itself: onnxruntime as WebAssembly.
LOADER, GLUE, WASM = (
    f"package/dist/{name}" for name in ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
)
ONNXRUNTIME = Package(
    "onnxruntime-web",
    "1.30.0",
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
    (LOADER, GLUE, WASM),
    "MIT License, Copyright (c) Microsoft Corporation",
)
# Tokenizers, from their tokenizer.json.
CODE, APACHE = "package/dist/tokenizers.min.cjs", "package/LICENSE"
TOKENIZERS = Package(
    "@huggingface/tokenizers",
    "0.2.0",
    "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
    (CODE, APACHE),
    "Apache License 2.0, Copyright The Hugging Face team",
)
MIT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def licences(packages: list[Package]) -> str:
    """What packages are copied under: a text that goes with them."""
    parts = [f"{one.name} {one.version}: {one.licence}\n" for one in packages]
    parts += [MIT] * (ONNXRUNTIME in packages)
    if TOKENIZERS in packages:
        parts.append((TOKENIZERS.fetch() / APACHE).read_text(encoding="utf-8"))
    return "\n".join(parts)
