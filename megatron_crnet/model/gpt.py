"""The language model: Megatron-Core's `GPTModel` with CR-Net's block as its decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MethodType
from typing import Any

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn

from megatron_crnet.config.megatron import CRNetTransformerConfig, build_transformer_config
from megatron_crnet.config.schema import Config
from megatron_crnet.data.documents import documents_of
from megatron_crnet.model.block import CRNetTransformerBlock
from megatron_crnet.model.compiled import choose_glue
from megatron_crnet.model.layer import StreamHook
from megatron_crnet.model.loss import token_losses
from megatron_crnet.model.weights import Weight, initialize, load_canonical, mark_tensor_parallel


class CRNetModel(GPTModel):
    """Embeddings, RoPE's angles and output layer are Megatron-Core's own.

    Args:
        max_sequence_length: longest sequence, in tokens.
        vp_stage: virtual pipeline stage of this chunk; None without virtual stages.
    """

    def __init__(
        self,
        config: CRNetTransformerConfig,
        max_sequence_length: int,
        rotary_base: int,
        rope_scaling_factor: float | None = None,
        vp_stage: int | None = None,
    ) -> None:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        stage: dict[str, Any] = {"pre_process": first, "post_process": last, "vp_stage": vp_stage}
        super().__init__(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=[]),
            vocab_size=config.table.local_vocabulary * config.table.tp_size,
            max_sequence_length=max_sequence_length,
            position_embedding_type="rope" if config.table.architecture.is_rotary else "learned_absolute",
            share_embeddings_and_output_weights=config.table.ties_head,
            rotary_base=rotary_base,
            rope_scaling=rope_scaling_factor is not None,
            rope_scaling_factor=rope_scaling_factor or 1.0,
            pg_collection=groups,
            **stage,
        )
        if config.table.architecture.is_rotary:
            # Megatron-Core's cache of angles is one for all models, and would keep the last 32 of them in memory
            rope = self.rotary_pos_emb
            rope.forward = lru_cache(maxsize=4)(MethodType(type(rope).forward.__wrapped__, rope))
        # GPTModel hard-codes TransformerBlock; an empty one is replaced
        self.decoder = CRNetTransformerBlock(config=config, pg_collection=groups, **stage)
        if first and not config.table.architecture.is_rotary:
            # Megatron-Core leaves them to its module for half precision
            word, position = self.embedding.word_embeddings.weight, self.embedding.position_embeddings
            position.weight = nn.Parameter(position.weight.to(device=word.device, dtype=word.dtype))
        for layer in (self.embedding.word_embeddings if first else None, self.output_layer if last else None):
            if layer is not None and layer.weight is not None:
                layer.weight.detach().zero_()  # rows of padding stay so
        self.glue = choose_glue(next(self.parameters()), config.cross_layer_fusion)
        mark_tensor_parallel(self)

    def setup_embeddings_and_output_layer(self) -> None:
        """In place of Megatron-Core's, which sends a tied weight to its copy: here both are drawn by their name."""
        if self.share_embeddings_and_output_weights and self.post_process and not self.pre_process:
            self.output_layer.weight.ds_pipe_replicated = True  # DeepSpeed's mark: its norm counts the weight once

    @property
    def parameters_read(self) -> list[nn.Parameter]:
        """A tied output layer's weight, which is the embedding's; see `CRNetTransformerLayer.parameters_read`."""
        ties = self.share_embeddings_and_output_weights and self.pre_process and self.post_process
        return [self.embedding.word_embeddings.weight] if ties else []

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy of every token, [b, s]; labels: [b, s], logits: [s, b, V/t]."""
        return self.losses_of_logits(logits, labels.t().contiguous()).t().contiguous()

    def losses_of_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The same of labels and logits in the same order; see `model/loss.py`."""
        return token_losses(logits, labels, self.config.table.vocabulary, self.pg_collection.tp, self.glue)

    def token_losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy in nats of every token, [b, s], on the last stage; the boundary tensor elsewhere.

        Args:
            batch: tokens, labels, position_ids, each [b, s]; and what `call_model` knows.
        """
        return call_model(self, batch)


def call_model(
    call: Callable[..., Tensor], batch: Mapping[str, Tensor], stream_hook: StreamHook | None = None
) -> Tensor:
    """What `CRNetModel.forward` returns for a micro-batch, within its documents if it names them.

    Args:
        call: the model, or what wraps it.
        batch: tokens, position_ids, and for losses labels, each [b, s]; `document_lengths` (`data/documents.py`)
            or not.
        stream_hook: called behind every layer of the chunk (`model/layer.py`).
    """
    # Megatron-Core's way of handing the block something of one's own
    extra = {"documents": documents_of(batch), "stream_hook": stream_hook}
    return call(batch["tokens"], batch["position_ids"], None, labels=batch.get("labels"), extra_block_kwargs=extra)


def build_model_chunks(config: Config, value_of: Callable[[Weight], Tensor] | None = None) -> list[CRNetModel]:
    """This rank's part of the model: one chunk, or one for each virtual pipeline stage.

    Args:
        value_of: gives the whole value of a weight; None draws initial ones.
    """
    transformer = build_transformer_config(config)
    chunks = config.parallel.virtual_pipeline_model_parallel_size or 1
    models = [
        CRNetModel(
            transformer,
            config.model.max_position_embeddings or config.training.seq_length,
            config.model.rotary_base,
            config.model.rope_scaling_factor,
            vp_stage=chunk if chunks > 1 else None,
        )
        for chunk in range(chunks)
    ]
    for model in models:
        if value_of is None:
            initialize(model, config.training.seed)
        else:
            load_canonical(model, value_of)
    return models
