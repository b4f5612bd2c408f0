"""The likeliest token of each row without its logits: a CPU's greedy steps read half of the output head."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from cabochon.engine.int8_linear import error_bounds
from cabochon.engine.logprobs import Slack
from cabochon.kernels.native.layers import LANES
from cabochon.kernels.native.quantize import pack, quantize_weight
from cabochon.kernels.native.screen import TOKENS, can_screen, entries, screen

BF16_ROUNDING = 2.0**-8  # at most, relative to a value


def screen_of(embedding: Tensor) -> "Screen | None":
    """None where it would not be faster (bf16 and VNNI make it so) or what is not finite would be missed."""
    is_known = embedding.device.type == "cpu" and embedding.dtype == torch.bfloat16
    if not is_known or embedding.shape[1] % LANES or not can_screen():
        return None
    found = Screen(embedding)
    return found if found.is_finite else None


class Screen:
    """Beside the head, of the same embedding; it takes half its bytes."""

    def __init__(self, embedding: Tensor) -> None:
        """embedding: [V, E], kept, E a multiple of 16."""
        self._embedding = embedding
        values, scales = quantize_weight(embedding)
        errors, self._largest = error_bounds(embedding, values, scales)
        self.is_finite = bool(errors.isfinite().all())  # else tokens would be passed over
        past = -len(embedding) % TOKENS
        self._packed = pack(values, embedding.shape[1], len(embedding) + past)
        self._scales, self._errors = pad(scales, (0, past)), pad(errors, (0, past), value=torch.nan)
        self.num_bytes = self._packed.nbytes + self._scales.nbytes + self._errors.nbytes

    def __call__(self, x: Tensor) -> Tensor | None:
        """x: [R, E]. Returns [R] int64: of each row the largest product in fp32, the lowest token of those
        that share it. None if there is a row for which logits must be looked at: not finite, or all alike."""
        weight = self._packed, self._scales, self._errors, self._largest
        token_ids = screen(x.contiguous(), *weight, self._embedding)
        return None if (token_ids < 0).any() else token_ids

    def exact(self, x: Tensor, weight_rows: Tensor) -> Tensor:
        """The products that it compares. [C, E] each. Returns [C] fp32."""
        return entries(x.contiguous(), weight_rows.contiguous())

    def slack(self, x: Tensor) -> Slack:
        """Of products that were summed in fp32, in whatever order, and rounded to bf16. x: [R, E].

        The likeliest token's and the largest one are each off by half a step of bf16 and by E roundings of
        the sum; twice as many are granted.
        """
        sum_error = 2 * x.shape[1] * 2.0**-24 * self._largest
        return Slack(x.float().norm(dim=1).mul_(2 * 1.02 * sum_error), 2 * 1.02 * BF16_ROUNDING)
