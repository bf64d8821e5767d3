"""The configuration of CR-Net (arXiv 2509.18993) for Hugging Face transformers. Travels with every export.

This file needs transformers alone.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

VARIANTS = ("crnet", "low_rank", "cola", "full_rank")
POSITIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""The linear maps of a layer, in the order in which its outputs are handed on."""

FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "sliding_window": None,
    "quantization_config": None,
}
"""Fields of LlamaConfig that have one value here: another one is refused instead of being ignored."""


class CRNetConfig(PretrainedConfig):
    """Shape of the model, with LlamaConfig's field names where it has them.

    Args:
        variant: crnet; low_rank: X A B; cola: B silu(X A); full_rank: X W in every layer.
        rank: an integer, a list with one for each layer, or a mapping of the positions q, k, v, o, gate, up, down
            to either.
        full_rank_layers: layers (from 0) that hold X W and start a new cross-layer chain.
        only_lr_act: gate up in place of silu(gate) up, for cola.
        cross_layer_epsilon: eps of s(beta).
        beta_init: initial value of every beta.
        scale_residual_init: draw o and down (of low-rank ones b) smaller by 1/sqrt(2 num_hidden_layers).

    Raises:
        ValueError: see `check`.
    """

    model_type = "crnet"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 256,
        intermediate_size: int = 688,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int = 256,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000,
        initializer_range: float = 0.02,
        variant: str = "crnet",
        rank: int | list[int] | dict[str, int | list[int]] = 128,
        full_rank_layers: list[int] | None = None,
        cross_layer_epsilon: float = 1e-6,
        beta_init: float = 1.0,
        only_lr_act: bool = False,
        scale_residual_init: bool = False,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        # the two ways in which later versions of transformers spell it
        rotary = kwargs.pop("rope_parameters", None) or kwargs.pop("rope_scaling", None) or {}
        _check_rotary(rotary)
        self.rope_theta = rotary.get("rope_theta", rope_theta)
        self.initializer_range = initializer_range
        self.variant = variant
        self.rank = rank
        self.full_rank_layers = [0] if full_rank_layers is None else full_rank_layers
        self.cross_layer_epsilon = cross_layer_epsilon
        self.beta_init = beta_init
        self.only_lr_act = only_lr_act
        self.scale_residual_init = scale_residual_init
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.check()

    def check(self) -> None:
        """Refuse what the model would ignore or cannot be built from.

        Raises:
            ValueError: sizes that contradict each other, an unknown variant, or a setting of LLaMA that CR-Net lacks.
        """
        for name, only in FIXED.items():
            if (value := getattr(self, name, only)) not in (only, None):
                raise ValueError(f"{name} is {value!r}, which CR-Net does not have: leave it out")
        _check_rotary(getattr(self, "rope_parameters", None) or {})
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}, but must be one of {', '.join(VARIANTS)}")
        if self.only_lr_act and self.variant != "cola":
            raise ValueError(f"only_lr_act is true, but variant {self.variant} has no silu between factors: use cola")
        heads, width = self.num_attention_heads, self.hidden_size
        if width % heads or (width // heads) % 2:
            raise ValueError(f"hidden_size {width} does not give {heads} num_attention_heads an even width each")
        if heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads {self.num_key_value_heads} does not divide {heads} heads")
        if (head_dim := getattr(self, "head_dim", None)) not in (None, width // heads):
            raise ValueError(f"head_dim is {head_dim}, but CR-Net's is hidden_size / num_attention_heads: leave it out")
        if isinstance(self.rank, dict) and set(self.rank) != set(POSITIONS):
            raise ValueError(
                f"rank names {sorted(self.rank)}, but must name all of {', '.join(POSITIONS)}, and no other"
            )
        for position in POSITIONS:
            ranks = self.ranks(position)
            if len(ranks) != self.num_hidden_layers or not all(isinstance(r, int) and r > 0 for r in ranks):
                raise ValueError(
                    f"rank of {position} is {ranks!r}, but must be a positive integer for each of "
                    f"{self.num_hidden_layers} layers"
                )

    def ranks(self, position: str) -> list[int]:
        """What `rank` says of one position, by layer, full-rank layers included."""
        rank = self.rank[position] if isinstance(self.rank, dict) else self.rank
        return [rank] * self.num_hidden_layers if isinstance(rank, int) else list(rank)

    def rank_of(self, layer: int, position: str) -> int:
        """The rank r of a linear map; 0 marks full rank."""
        if self.variant == "full_rank" or layer in self.full_rank_layers:
            return 0
        return self.ranks(position)[layer]

    def std_factor(self, position: str) -> float:
        """What `scale_residual_init` multiplies the initial values of a linear map by."""
        added = self.scale_residual_init and position in ("o", "down")
        return (2 * self.num_hidden_layers) ** -0.5 if added else 1.0

    def has_previous(self, layer: int) -> bool:
        """Whether the previous layer's outputs are added to those of layer `layer`."""
        return self.variant == "crnet" and layer > 0 and layer not in self.full_rank_layers


def _check_rotary(rotary: Any) -> None:
    if not isinstance(rotary, dict):
        raise ValueError(f"rope_parameters is {rotary!r}, but must be a mapping: leave it out")
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind != "default":
        raise ValueError(
            f"rope_parameters ask for rope_type {kind!r}, but CR-Net has the default one alone: leave it out"
        )
