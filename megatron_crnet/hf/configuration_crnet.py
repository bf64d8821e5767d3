"""The configuration of CR-Net (arXiv 2509.18993) for Hugging Face transformers. Travels with every export.

This file needs transformers alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

VARIANTS = ("crnet", "low_rank", "cola", "full_rank")


@dataclass(frozen=True)
class Traits:
    """What the layers of an architecture have.

    Attributes:
        positions: the linear maps of a layer, in the order in which its outputs are handed on: q, k, v, o, and those
            of the feed-forward network, down last; those of experts are not handed on.
        norm: rms, or layer: LayerNorm with a bias.
        activation: swiglu: silu(gate) up; gelu: gelu(up) in its tanh form.
        token_positions: rotary embedding of queries and keys, or a learned vector per position.
        has_biases: of all linear maps; outside of the chain: this layer uses Y + bias, the next one takes Y.
        has_qk_norm: an RMSNorm over each head of queries and keys.
        has_experts: a router gives each token to some of many feed-forward networks, through which no chain passes.
    """

    positions: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    norm: str = "rms"
    activation: str = "swiglu"
    token_positions: str = "rotary"
    has_biases: bool = False
    has_qk_norm: bool = False
    has_experts: bool = False


ARCHITECTURES = {
    "llama": Traits(),
    "gpt2": Traits(("q", "k", "v", "o", "up", "down"), "layer", "gelu", "learned", has_biases=True),
    "qwen3": Traits(has_qk_norm=True),
    "qwen3_moe": Traits(has_qk_norm=True, has_experts=True),
}
"""By `CRNetConfig.architecture`."""
HIDDEN_ACT = {"swiglu": "silu", "gelu": "gelu_pytorch_tanh"}
"""`hidden_act` in LlamaConfig's words."""
FIXED = {
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "sliding_window": None,
    "quantization_config": None,
}
"""Fields of LlamaConfig that have one value here: another one is refused instead of being ignored."""


class CRNetConfig(PretrainedConfig):
    """Shape of the model, with LlamaConfig's field names where it has them.

    Args:
        architecture: llama, gpt2, qwen3 or qwen3_moe: see `ARCHITECTURES`.
        intermediate_size: width of the feed-forward network, or of each expert.
        num_experts: of a layer; None without experts.
        full_rank_experts: they hold X W in every layer.
        num_experts_per_tok: how many a token is given to.
        moe_router_pre_softmax: weigh them by the softmax over all experts; otherwise by that over the chosen ones.
        head_dim: width of a head; None is hidden_size / num_attention_heads.
        max_position_embeddings: longest sequence; of learned positions, as many are learned.
        rms_norm_eps: eps of the norms, of LayerNorm as well.
        variant: crnet; low_rank: X A B; cola: B silu(X A); full_rank: X W in every layer.
        rank: an integer, a list with one for each layer, or a mapping of the architecture's positions to either.
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
        head_dim: int | None = None,
        max_position_embeddings: int = 256,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000,
        rope_scaling_factor: float | None = None,
        initializer_range: float = 0.02,
        architecture: str = "llama",
        variant: str = "crnet",
        rank: int | list[int] | dict[str, int | list[int]] = 128,
        full_rank_layers: list[int] | None = None,
        cross_layer_epsilon: float = 1e-6,
        beta_init: float = 1.0,
        only_lr_act: bool = False,
        scale_residual_init: bool = False,
        num_experts: int | None = None,
        full_rank_experts: bool = False,
        num_experts_per_tok: int = 8,
        moe_router_pre_softmax: bool = False,
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
        if head_dim is None and hidden_size % num_attention_heads:
            raise ValueError(f"hidden_size {hidden_size} does not divide by {num_attention_heads} heads: set head_dim")
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        # the two ways in which later versions of transformers spell it
        rotary = kwargs.pop("rope_parameters", None) or kwargs.pop("rope_scaling", None) or {}
        _check_rotary(rotary)
        self.rope_theta = rotary.get("rope_theta", rope_theta)
        self.rope_scaling_factor = rope_scaling_factor
        self.initializer_range = initializer_range
        self.architecture = architecture
        self.variant = variant
        self.rank = rank
        self.full_rank_layers = [0] if full_rank_layers is None else full_rank_layers
        self.cross_layer_epsilon = cross_layer_epsilon
        self.beta_init = beta_init
        self.only_lr_act = only_lr_act
        self.scale_residual_init = scale_residual_init
        self.num_experts = num_experts
        self.full_rank_experts = full_rank_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_router_pre_softmax = moe_router_pre_softmax
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.check()

    def check(self) -> None:
        """Refuse what the model would ignore or cannot be built from.

        Raises:
            ValueError: sizes that contradict each other, an unknown variant, or a setting of LLaMA that CR-Net lacks.
        """
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture is {self.architecture!r}, but must be one of {', '.join(ARCHITECTURES)}")
        traits = self.traits
        biases = {"attention_bias": traits.has_biases, "mlp_bias": traits.has_biases}
        for name, only in {**FIXED, **biases, "hidden_act": HIDDEN_ACT[traits.activation]}.items():
            if (value := getattr(self, name, only)) not in (only, None):
                raise ValueError(
                    f"{name} is {value!r}, which CR-Net does not have as {self.architecture}: leave it out"
                )
        _check_rotary(getattr(self, "rope_parameters", None) or {})
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}, but must be one of {', '.join(VARIANTS)}")
        if self.only_lr_act and (self.variant != "cola" or traits.activation != "swiglu"):
            raise ValueError(
                f"only_lr_act is true, but {self.architecture} as {self.variant} has not both a gate and silu between "
                "factors: use cola, or leave it out"
            )
        self._check_heads()
        self._check_experts()
        self._check_ranks()

    def _check_heads(self) -> None:
        heads, width = self.num_attention_heads, self.head_dim
        if self.traits.token_positions == "rotary" and width % 2:
            raise ValueError(f"head_dim is {width}, but rotary embeddings need an even width: change it")
        if heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads {self.num_key_value_heads} does not divide {heads} heads")

    def _check_experts(self) -> None:
        experts, used = self.num_experts, self.num_experts_per_tok
        if (experts is not None) != self.traits.has_experts:
            need = "needs" if self.traits.has_experts else "has no"
            raise ValueError(f"num_experts is {experts}, but {self.architecture} {need} experts: correct it")
        if self.full_rank_experts and experts is None:
            raise ValueError(f"full_rank_experts is true, but {self.architecture} has no experts: leave it out")
        if experts is not None and not 1 <= used <= experts:
            raise ValueError(f"num_experts_per_tok is {used}, but must be from 1 to num_experts, {experts}")

    def _check_ranks(self) -> None:
        positions = self.factored
        if isinstance(self.rank, dict) and not set(positions) <= set(self.rank) <= set(self.traits.positions):
            raise ValueError(
                f"rank names {sorted(self.rank)}, but must name all of {', '.join(positions)}, and no other"
            )
        for position in positions:
            ranks = self.ranks(position)
            if len(ranks) != self.num_hidden_layers or not all(isinstance(r, int) and r > 0 for r in ranks):
                raise ValueError(
                    f"rank of {position} is {ranks!r}, but must be a positive integer for each of "
                    f"{self.num_hidden_layers} layers"
                )

    @property
    def traits(self) -> Traits:
        """What its layers have."""
        return ARCHITECTURES[self.architecture]

    @property
    def factored(self) -> tuple[str, ...]:
        """The linear maps that have a rank in layers of low rank."""
        if self.variant == "full_rank":
            return ()
        return self.traits.positions[:4] if self.full_rank_experts else self.traits.positions

    def ranks(self, position: str) -> list[int]:
        """What `rank` says of one position, by layer, full-rank layers included."""
        rank = self.rank[position] if isinstance(self.rank, dict) else self.rank
        return [rank] * self.num_hidden_layers if isinstance(rank, int) else list(rank)

    def rank_of(self, layer: int, position: str) -> int:
        """The rank r of a linear map; 0 marks full rank."""
        if self.variant == "full_rank" or layer in self.full_rank_layers or position not in self.factored:
            return 0
        return self.ranks(position)[layer]

    def std_factor(self, position: str) -> float:
        """What `scale_residual_init` multiplies the initial values of a linear map by."""
        added = self.scale_residual_init and position in ("o", "down")
        return (2 * self.num_hidden_layers) ** -0.5 if added else 1.0

    def has_previous(self, layer: int, position: str = "q") -> bool:
        """Whether the previous layer's output is added to that of a position of layer `layer`."""
        chains = self.variant == "crnet" and layer > 0 and layer not in self.full_rank_layers
        return chains and (position in self.traits.positions[:4] or not self.traits.has_experts)


def _check_rotary(rotary: Any) -> None:
    if not isinstance(rotary, dict):
        raise ValueError(f"rope_parameters is {rotary!r}, but must be a mapping: leave it out")
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind != "default":
        raise ValueError(
            f"rope_parameters ask for rope_type {kind!r}, but CR-Net has rope_scaling_factor in its place: leave it out"
        )
