"""What a Gemma checkpoint's configuration says, in Cabochon's words."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and numerics of one Gemma 2 or Gemma 3 text model. Letters: docs/architecture.md, legend."""

    architecture: str  # as the checkpoint names it: Gemma2ForCausalLM, Gemma3ForCausalLM
    vocab_size: int  # V
    hidden_size: int  # E
    num_layers: int  # L
    num_heads: int  # Hq
    num_kv_heads: int  # Hkv
    head_dim: int  # D; not E / Hq in any Gemma
    mlp_size: int  # F
    norm_eps: float
    attention_scale: float  # query_pre_attn_scalar ** -0.5: 144 at 27B, whose D is 128; never from D
    attention_softcap: float | None  # 50 in Gemma 2, none in Gemma 3
    final_softcap: float | None  # 30 in Gemma 2, none in Gemma 3
    window: int  # W: key k is visible to query q iff q - W < k <= q, in sliding layers
    is_sliding: tuple[bool, ...]  # [L]; Gemma 2: even layers, Gemma 3: five of six
    rope_theta_sliding: float
    rope_theta_global: float
    rope_factor_global: float  # linear scaling of positions in global layers (8 in Gemma 3 4B and up), else 1
    has_qk_norm: bool  # RMSNorm per head on q and k before RoPE (Gemma 3)
    max_model_len: int  # max_position_embeddings
    eos_token_ids: tuple[int, ...]  # config and generation_config together
    bos_token_id: int | None
