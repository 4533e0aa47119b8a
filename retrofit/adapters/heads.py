"""What is trained beside the LoRA: the mask vector, the Markov head and the confidence head.

All start as the identity: the Markov bias is zero, the confidence 1/2.  Shapes: N rows, H hidden size, V vocabulary,
r Markov rank, K drafts per block.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from retrofit.errors import ArtifactError

MARKOV = "markov_"
"""How the names of the Markov head's tensors begin."""


class Heads(nn.Module):
    """Mask vector, Markov head (`bias = W2 W1[previous token]`, DSpark), confidence head on `[h ; W1[previous]]`.

    `markov_w1` has one row more than the vocabulary: the previous token is unknown (its slot is still masked).
    """

    confidence_temperature: Tensor

    def __init__(self, hidden: int, vocab: int, drafts: int, markov_rank: int, confidence: bool):
        super().__init__()
        self.vocab = vocab
        self.mask_vector = nn.Parameter(torch.zeros(hidden))
        self.markov_w1: nn.Parameter | None = None
        self.markov_w2: nn.Parameter | None = None
        self.confidence_weight: nn.Parameter | None = None
        if markov_rank:
            self.markov_w1 = nn.Parameter(torch.randn(vocab + 1, markov_rank) * markov_rank**-0.5)
            self.markov_w2 = nn.Parameter(torch.zeros(vocab, markov_rank))
        if confidence:
            self.confidence_weight = nn.Parameter(torch.zeros(2, hidden + markov_rank))
            self.confidence_bias = nn.Parameter(torch.zeros(2))
            self.register_buffer("confidence_temperature", torch.ones(2, drafts))

    @property
    def unknown(self) -> int:
        """The Markov head's index for a previous token that is still masked."""
        return self.vocab

    def markov_parameters(self) -> list[nn.Parameter]:
        """None without a Markov head."""
        return [p for name, p in self.named_parameters() if name.startswith(MARKOV)]

    def markov_bias(self, previous_N: Tensor, ids_NM: Tensor | None = None) -> Tensor | None:
        """[N] previous token ids -> [N, V] bias on the draft logits; None without a Markov head.

        ids_NM: tokens whose bias alone is wanted, [N, M].
        """
        if self.markov_w1 is None or self.markov_w2 is None:
            return None
        if ids_NM is None:
            return self.markov_w1[previous_N] @ self.markov_w2.T
        return (self.markov_w2[ids_NM] @ self.markov_w1[previous_N][..., None]).squeeze(-1)

    def draft_logits(self, trunk_logits_NV: Tensor, previous_N: Tensor, ids_NM: Tensor | None = None) -> Tensor:
        """Trunk logits plus the Markov bias of the previous token, in fp32.

        ids_NM: which tokens the trunk logits are of, where they are [N, M].
        """
        bias = self.markov_bias(previous_N, ids_NM)
        logits = trunk_logits_NV.float()
        return logits if bias is None else logits + bias

    def confidence_logits(self, hidden_NH: Tensor, previous_N: Tensor) -> Tensor | None:
        """[N, 2] logits that a draft is accepted given all before it are: (greedy, sampled).  None without the head.

        In place of N there may be several dimensions.
        """
        if self.confidence_weight is None:
            return None
        features = hidden_NH.float()
        if self.markov_w1 is not None:
            features = torch.cat([features, self.markov_w1[previous_N].detach()], dim=-1)
        return features @ self.confidence_weight.T + self.confidence_bias

    def confidence(self, hidden_BDH: Tensor, previous_BD: Tensor, sampled: bool) -> Tensor | None:
        """[B, D] calibrated probability that the draft of each slot is accepted, given all before it are."""
        logits = self.confidence_logits(hidden_BDH, previous_BD)
        if logits is None:
            return None
        kind = int(sampled)
        return torch.sigmoid(logits[..., kind] / self.confidence_temperature[kind, : logits.shape[1]])


def load_heads(heads: Heads, state: Mapping[str, Tensor]) -> None:
    """Load the tensors of `heads.safetensors`.  Raises ArtifactError when names or shapes do not fit."""
    try:
        heads.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ArtifactError(f"heads.safetensors does not fit the base model: {error}") from error
