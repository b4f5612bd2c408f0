"""Gemma with fp8 weights: near the unquantized one, one model in all it says, loaded in little memory."""

import weakref

import pytest
import torch
from forward import Forward
from random_gemma import model_config, random_gemma2, random_gemma3

from cabochon.engine.linear import Fp8Linear
from cabochon.engine.llm import LLM
from cabochon.engine.models.gemma import Gemma
from cabochon.engine.sampling_params import SamplingParams
from cabochon.kernels.definitions import rms_norm

IDS = list(range(5, 45))
CPU = {"kv_cache_gib": 0.02, "threads": 1, "max_seqs": 8}


def forward_for(hf: torch.nn.Module, **options: object) -> Forward:
    return Forward(model_config(hf.config), dict(hf.state_dict()), **options)


@pytest.mark.parametrize("make", [random_gemma2, random_gemma3])
def test_logits_are_near_those_of_the_unquantized_model(make: type) -> None:
    hf = make(qk_gain=1.0)
    plain, quantized = forward_for(hf), forward_for(hf, make_linear=Fp8Linear)
    expected, logits = (one.step([(one.add(IDS), len(IDS))])[0] for one in (plain, quantized))
    error = (logits - expected).norm() / expected.norm()
    assert 0.01 < error < 0.2  # random weights: each of four layers and the head adds its 3.5 %


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_logits_are_bitwise_the_same_on_any_chunking_or_batch(dtype: torch.dtype) -> None:
    chunks = [40] if dtype == torch.bfloat16 else [7, 1, 20, 12]  # bf16: the same chunks, another batch
    alone, ours = (forward_for(random_gemma2(), dtype=dtype, make_linear=Fp8Linear) for _ in range(2))
    expected = alone.step([(alone.add(IDS), len(IDS))])[0]
    row, other = ours.add(IDS), ours.add(IDS[::-1])
    got = [ours.step([(other, 3), (row, n)])[1] for n in chunks]
    assert torch.equal(torch.cat(got), expected)


def test_exact_logits_are_those_of_the_quantized_head() -> None:
    hf = random_gemma2()
    ours = forward_for(hf, dtype=torch.bfloat16, make_linear=Fp8Linear)
    hidden = torch.randn((4, 64), generator=torch.Generator().manual_seed(0)).bfloat16()
    logits = ours.model.logits(hidden).double()  # [4, V]
    rows, ids = (
        index.flatten() for index in torch.meshgrid(torch.arange(4), torch.arange(131), indexing="ij")
    )
    exact = ours.model.exact_logits(hidden[rows], ids).double().view(4, 131)
    rounding = torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-4
    assert ((logits - exact).abs() <= rounding).all()
    normed = rms_norm(hidden, ours.model._final_norm, ours.model.config.norm_eps).double()
    unquantized = normed @ ours.model._embedding.double().T
    assert ((logits - unquantized).abs() > rounding).double().mean() > 0.5


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["tiny_gemma2_dir", "tiny_gemma3_dir"])
def test_an_engine_with_fp8_weights_gives_the_same_tokens_alone_or_not(
    request: pytest.FixtureRequest, model: str, dtype: str
) -> None:
    llm = LLM(str(request.getfixturevalue(model)), dtype=dtype, quantization="fp8", **CPU)
    assert llm.info.quantization == "fp8"
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    prompts = [IDS[:n] for n in (1, 4, 9, 30)]
    together = [one.token_ids for one in llm.generate(prompts, params)]
    assert [len(tokens) for tokens in together] == [16] * 4
    assert [llm.generate([prompt], params)[0].token_ids for prompt in prompts] == together


@pytest.mark.parametrize("has_mkldnn", [True, False])
def test_weights_are_quantized_one_after_the_other(monkeypatch: pytest.MonkeyPatch, has_mkldnn: bool) -> None:
    """While loading, no more of the unquantized model is held than the embedding and one matrix."""
    monkeypatch.setattr(torch._C, "_has_mkldnn", has_mkldnn)
    hf = random_gemma2()
    config, weights = model_config(hf.config), dict(hf.state_dict())
    held: list[tuple[weakref.ref[torch.Tensor], int]] = []

    def load(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = weights[name].to(torch.bfloat16, copy=True).view(shape)
        alive = sum(size for ref, size in held if ref() is not None)
        assert alive <= largest, f"{alive} bytes are held before {name}"
        if len(shape) == 2 and "embed" not in name:
            held.append((weakref.ref(tensor), tensor.nbytes))
        return tensor

    largest = config.mlp_size * config.hidden_size * 2  # up_proj comes while gate_proj waits for it
    model = Gemma(config, load, 64, Fp8Linear)
    assert len(held) == 7 * config.num_layers
    assert all(ref() is None for ref, _ in held)
    matrices = sum(
        tensor.numel() for name, tensor in weights.items() if tensor.dim() == 2 and "embed" in name
    )
    if not has_mkldnn:  # as on a GPU: half of bf16, four bytes a channel, and 131 rows padded to 144
        layers = sum(size for _, size in held) // 2
        channels = config.num_layers * (8 * 16 + 64 + 2 * config.mlp_size + 64)
        head = 144 * 64 + 144 * 4
        assert model.num_bytes == 2 * matrices + layers + 4 * channels + head
