"""One document per row, cut or padded to the sequence length: the protocol of GaLore, CoLA and CR-Net.

Packing (Megatron-Core's GPTDataset) wastes nothing; this allows comparison with the published figures.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split
from torch import Tensor


class PaddedDocumentDataset(MegatronDataset):
    """Rows of tokens from documents, in a new order each epoch; built by Megatron-Core's builder like GPTDataset.

    The row of a document d: tokens d[0:s], labels d[1:s+1], and beyond its end the padding id with loss mask 0.

    Args:
        indices: documents of the split, [n]; those of less than two tokens are passed over.
        num_samples: rows wanted; None means one epoch. The length is rounded up to whole epochs.
        index_split: which split; its order is independent of the others'.
        config: sequence_length s, random_seed and the tokenizer, whose `pad` fills the rows.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        dataset_path: str | None,
        indices: npt.NDArray[np.int32],
        num_samples: int | None,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        # a document of one token has no label, and a batch of such rows no loss
        labelled = indices[np.asarray(dataset.sequence_lengths)[indices] > 1]
        super().__init__(dataset, dataset_path, labelled, num_samples, index_split, config)
        self._pad: int = config.tokenizer.pad
        self._epoch = -1
        self._order: npt.NDArray[np.int32] = labelled

    numel_low_level_dataset = staticmethod(GPTDataset.numel_low_level_dataset)
    build_low_level_dataset = staticmethod(GPTDataset.build_low_level_dataset)

    def __len__(self) -> int:
        documents = len(self.indices)
        return documents if self.num_samples is None else -(-self.num_samples // documents) * documents

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        """Row `idx`: int64 tokens, labels, position_ids [s] and float32 loss_mask [s]."""
        if not 0 <= idx < len(self):
            raise IndexError(f"row {idx} of {len(self)}")
        length = self.config.sequence_length
        epoch, row = divmod(int(idx), len(self.indices))
        document = int(self._shuffled(epoch)[row])
        ids = self.dataset.get(document, length=min(int(self.dataset.sequence_lengths[document]), length + 1))
        text = np.full(length + 1, self._pad, dtype=np.int64)
        text[: len(ids)] = ids
        loss_mask = torch.zeros(length)
        loss_mask[: max(len(ids) - 1, 0)] = 1.0
        joined = torch.from_numpy(text)
        return {
            "tokens": joined[:-1].clone(),
            "labels": joined[1:].clone(),
            "loss_mask": loss_mask,
            "position_ids": torch.arange(length),
        }

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int32]:
        """The documents in the order of `epoch`; only the latest order is kept."""
        if epoch != self._epoch:
            generator = np.random.default_rng([self.config.random_seed, self.index_split.value, epoch])
            self._order, self._epoch = generator.permuted(self.indices), epoch
        return self._order
