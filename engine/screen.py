"""The next token of each row without its logits: steps of a CPU read half of the output head."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from cabochon.engine.int8_linear import error_bounds
from cabochon.kernels.native.layers import LANES
from cabochon.kernels.native.quantize import pack, quantize_weight
from cabochon.kernels.native.sampling import Slack
from cabochon.kernels.native.screen import MAX_COLUMNS, TOKENS, can_screen, entries, screen
from cabochon.kernels.sampling import Draw, noise_key, winner

LEAST_NORM = 1e-10  # of the largest row: squares of less vanish in fp32
BF16_ROUNDING = 2.0**-8  # at most, relative to a value


def screen_of(embedding: Tensor) -> "Screen | None":
    """None without bf16 and VNNI, for which alone it was timed, or where it would miss what is not finite."""
    is_known = embedding.device.type == "cpu" and embedding.dtype == torch.bfloat16
    columns = embedding.shape[1]
    if not is_known or columns % LANES or columns > MAX_COLUMNS or not can_screen():
        return None
    found = Screen(embedding)
    return found if found.is_sound else None


class Screen:
    """Beside the head, of the same embedding; it takes half its bytes."""

    def __init__(self, embedding: Tensor) -> None:
        """embedding: [V, E], kept, E a multiple of 16."""
        self._embedding = embedding
        values, scales = quantize_weight(embedding)
        errors, self._largest = error_bounds(embedding, values, scales)
        self.is_sound = bool(errors.isfinite().all()) and self._largest > LEAST_NORM
        past = -len(embedding) % TOKENS
        self._packed = pack(values, embedding.shape[1], len(embedding) + past)
        self._scales, self._errors = pad(scales, (0, past)), pad(errors, (0, past), value=torch.nan)
        self.num_bytes = self._packed.nbytes + self._scales.nbytes + self._errors.nbytes

    def __call__(self, x: Tensor, draws: Sequence[Draw | None], cap: float | None) -> list[int | None]:
        """The next tokens: of each row the one with the largest product in fp32, the lowest of those that
        share it; or what its draw gives from those products, capped.

        x: [R, E]. draws: [R]. None for a row whose logits must be looked at: it is not finite, or they are
        all alike.
        """
        keyed = [None if d is None else (d.temperature, noise_key(d.seed, d.position)) for d in draws]
        weight = self._packed, self._scales, self._errors, self._largest
        found = screen(x.contiguous(), *weight, self._embedding, keyed, cap)
        counts = found.num_tokens.tolist()
        chosen: list[int | None] = found.token_ids[:, 0].tolist()
        for row, (draw, count) in enumerate(zip(draws, counts, strict=True)):
            if count < 1:
                chosen[row] = None
            elif draw is not None and count > 1:
                token_ids, order = found.token_ids[row, :count].long().sort()
                chosen[row] = winner(draw, token_ids, found.logits[row, :count][order], cap)
        return chosen

    def exact(self, x: Tensor, weight_rows: Tensor) -> Tensor:
        """The products that it compares. [C, E] each. Returns [C] fp32."""
        return entries(x.contiguous(), weight_rows.contiguous())

    def slack(self, x: Tensor) -> Slack:
        """Of products that were summed in fp32, in whatever order, and rounded to bf16. x: [R, E].

        They are off by half a step of bf16 and by E roundings of the sum; twice as many are granted.
        """
        sum_error = 2 * x.shape[1] * 2.0**-24 * self._largest
        return Slack(x.float().norm(dim=1).mul_(1.02 * sum_error), 1.02 * BF16_ROUNDING)
