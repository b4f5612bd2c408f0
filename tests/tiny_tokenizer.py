"""A tokenizer of Gemma's kind that is small enough to build in a test: bytes, a few words, turn tokens."""

from tokenizers import Tokenizer

from cabochon.engine.models.demo_tokenizer import PieceType, build_tokenizer

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
WORDS = [
    "he",
    "ll",
    "hell",
    "hello",
    "wo",
    "rl",
    "rld",
    "world",
    "st",
    "sto",
    "stop",
    "us",
    "er",
    "user",
    "▁w",
    "▁world",
]


def tiny_tokenizer() -> Tokenizer:
    """V = 6 + 256 + letters + words; every text can be encoded."""
    letters = [chr(c) for c in range(33, 127)] + ["▁", "\n"]
    pieces = [*CONTROL, *(f"<0x{b:02X}>" for b in range(256)), *letters, *WORDS]
    types = [
        *[PieceType.CONTROL] * len(CONTROL),
        *[PieceType.BYTE] * 256,
        *[PieceType.NORMAL] * (len(letters) + len(WORDS)),
    ]
    scores = [0.0] * (len(pieces) - len(WORDS)) + [-float(i) for i in range(len(WORDS))]
    return build_tokenizer(pieces, scores, [int(t) for t in types], bos="<bos>", unk="<unk>")
