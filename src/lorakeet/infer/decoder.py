"""The forward passes of one batch: prompts into a key-value cache, then a token a row.

    prompts, padded on the left        attention     positions
    . . . A B C                        0 0 0 1 1 1   0 0 0 0 1 2
    D E F G H I                        1 1 1 1 1 1   0 1 2 3 4 5

Left padding puts the newest token of all rows in the last column, so a step is
one column for all.  Positions count real tokens only and padding is masked out:
a row's logits are those it would have alone, to rounding.

Shape letters:  B rows of the batch,  T tokens so far,  V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


class Decoder:
    """A batch of rows that grow by one token a step; rows leave and never join.

    Args:
        model: a causal language model of transformers, in evaluation mode.

    Cost: the cache holds 2 * layers * B * T * key width numbers.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        names = inspect.signature(model.forward).parameters
        self._has_positions = "position_ids" in names
        self._keeps_last = "logits_to_keep" in names
        self._attention_BT = torch.empty(0, 0, dtype=torch.int64)

    def read_prompts(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Fills the cache; called once.

        Args:
            prompts: B rows of at least one token id.

        Returns:
            logits [B, V] for each row's first new token.
        """
        width = max(len(prompt) for prompt in prompts)
        ids_BT = torch.zeros(len(prompts), width, dtype=torch.int64)
        attention_BT = torch.zeros_like(ids_BT)
        for row, prompt in enumerate(prompts):
            ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
            attention_BT[row, width - len(prompt) :] = 1
        device = self._model.device
        self._attention_BT = attention_BT.to(device)
        positions_BT = (self._attention_BT.cumsum(-1) - 1).clamp(min=0)
        return self._forward(ids_BT.to(device), positions_BT)

    def step(self, tokens: Sequence[int], places: Sequence[int]) -> Tensor:
        """One more token for the rows that go on; the others leave the cache.

        Args:
            tokens: the newest token of each row that goes on.
            places: those rows, as places in the batch of the last call, ascending.

        Returns:
            logits [len(places), V].
        """
        device = self._attention_BT.device
        if len(places) < len(self._attention_BT):
            kept = torch.tensor(places, device=device)
            self._cache.batch_select_indices(kept)
            self._attention_BT = self._attention_BT[kept]
        column = self._attention_BT.new_ones(len(places), 1)
        self._attention_BT = torch.cat([self._attention_BT, column], dim=1)
        positions_B1 = self._attention_BT.sum(-1, keepdim=True) - 1
        ids_B1 = torch.tensor(tokens, device=device).unsqueeze(1)
        return self._forward(ids_B1, positions_B1)

    def _forward(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        options: dict[str, Any] = {"position_ids": positions_BT} if self._has_positions else {}
        if self._keeps_last:
            options["logits_to_keep"] = 1
        output = self._model(
            input_ids=ids_BT,
            attention_mask=self._attention_BT,
            past_key_values=self._cache,
            use_cache=True,
            **options,
        )
        return output.logits[:, -1]
