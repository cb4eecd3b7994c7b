"""Small tokenizers of every kind that models have, made by code, and texts that are hard on them."""

from __future__ import annotations

import random

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from outliers.model.source import ModelSource

POOLS = (
    ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "runs", "away", "from", "it", "all"],
    list("中文字符测试数据龍馬精神漢字"),
    ["😀", "👩‍👩‍👧", "é", "ñandú", "नमस्ते", "안녕하세요", "Ⅷ", "ﬁne", "e\u0301"],
    ["7", "42", "123", "98765", "1234567"],
    [".", ", ", "!?", "\n", "\r\n", "\t", "  ", "'s", "…"],
)
RUNS = (" ", "a", "7", "中", "\n", "ab", "😀", "\u0301")
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
FROM_THE_RIGHT = (
    r"(?=(\d{3})+(?!\d))|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def hard_text(seed, characters, run_share=0.0015):
    """Words, CJK, emoji, digits, marks, blanks, and now and then a run without any boundary."""
    rng, parts, size = random.Random(seed), [], 0
    while size < characters:
        if rng.random() < run_share:
            part = rng.choice(RUNS) * rng.randrange(10, 3000)
        else:
            part = rng.choice(rng.choice(POOLS)) + " " * (rng.random() < 0.6)
        parts.append(part)
        size += len(part)
    return "".join(parts)[:characters]


def _trained(tokenizer, trainer):
    tokenizer.train_from_iterator([hard_text(seed, 1500, 0) for seed in range(1000, 1010)], trainer)
    return tokenizer


def _byte_level(pattern=None, **model):
    tokenizer = Tokenizer(models.BPE(**model))
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, rest])
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False))


def _metaspace_unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    return _trained(tokenizer, trainer)


def byte_fallback():
    """As of Llama 2: no pre-tokenizer, a blank in front, bytes for what the vocabulary lacks."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, limit_alphabet=60, show_progress=False, max_token_length=8
    )
    _trained(tokenizer, trainer)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def _unsplit_unigram():
    """No pre-tokenizer, pieces over blanks, and ties: where a run is cut depends on its length."""
    singles = sorted({character for seed in range(40) for character in hard_text(seed, 3000, 0.01)})
    pieces = ["aa", "aaaa", "77", "7777", "  ", "    ", "中中中", "the", " the ", "ab", "abab", "quick b", "fox"]
    scores = [("<unk>", -20.0), *((one, -4.0) for one in singles), *((piece, -3.0) for piece in pieces)]
    return Tokenizer(models.Unigram(scores, unk_id=0))


def _wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    return _trained(tokenizer, trainer)


KINDS = {
    "GPT-2": _byte_level,
    "Llama 3": lambda: _byte_level(LLAMA3, ignore_merges=True),
    "digits from the right": lambda: _byte_level(FROM_THE_RIGHT),
    "Metaspace, Unigram, NFKC": _metaspace_unigram,
    "byte fallback": byte_fallback,
    "Unigram, unsplit": _unsplit_unigram,
    "WordPiece": _wordpiece,
}


def save(tokenizer, folder, **options):
    """A folder with a tokenizer alone, as a ModelSource."""
    folder.mkdir(parents=True, exist_ok=True)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    fast.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return ModelSource(kind="folder", id="local:it", name=folder.name, revision="0", path=str(folder))
