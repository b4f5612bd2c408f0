"""tokenizer.json for the demo, from the vocabulary in its GGUF file.

Gemma's tokenizer is a SentencePiece BPE: merge the adjacent pair whose piece has the best score. In
`tokenizers` that is a BPE whose merges are all splits of each piece into two pieces, in order of score.
User-defined pieces (runs of newlines, tabs and spaces, HTML tags) are cut out first, longest match, on the
normalized text. Checked against sentencepiece itself (tests/engine/models/test_demo_tokenizer.py).
"""

from enum import IntEnum

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

SPACE = "▁"


class PieceType(IntEnum):
    """GGUF's tokenizer.ggml.token_type, which are SentencePiece's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def build_tokenizer(
    pieces: list[str], scores: list[float], types: list[int], *, bos: str, unk: str
) -> Tokenizer:
    """pieces, scores, types: [V], by token id."""
    pieces = [
        piece.replace(" ", SPACE) if kind == PieceType.USER_DEFINED else piece
        for piece, kind in zip(pieces, types, strict=True)
    ]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    model = models.BPE(
        vocab=vocab,
        merges=_merges(pieces, scores, types, vocab),
        unk_token=unk,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [AddedToken(p, normalized=False, special=True) for p in _of_type(pieces, types, PieceType.CONTROL)]
    )
    tokenizer.add_tokens(
        [AddedToken(p, normalized=True) for p in _of_type(pieces, types, PieceType.USER_DEFINED)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
    )
    return tokenizer


def _of_type(pieces: list[str], types: list[int], wanted: PieceType) -> list[str]:
    return [piece for piece, kind in zip(pieces, types, strict=True) if kind == wanted]


def _merges(
    pieces: list[str], scores: list[float], types: list[int], vocab: dict[str, int]
) -> list[tuple[str, str]]:
    """All ways to make a normal piece of two normal ones, best score first."""
    is_normal = [kind == PieceType.NORMAL for kind in types]
    ranked: list[tuple[float, int, str, str]] = []
    for token_id, piece in enumerate(pieces):
        if not is_normal[token_id]:
            continue
        for cut in range(1, len(piece)):
            left, right = vocab.get(piece[:cut]), vocab.get(piece[cut:])
            if left is not None and right is not None and is_normal[left] and is_normal[right]:
                ranked.append((-scores[token_id], token_id, piece[:cut], piece[cut:]))
    ranked.sort(key=lambda entry: entry[:2])
    return [(left, right) for _, _, left, right in ranked]
