"""Small real models and rows for the evaluation floor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakeet.base.records import EncodedSample, Origin


class Rows(list):
    """Samples with lengths, as a ShardReader has them."""

    @property
    def lengths(self):
        return np.array([len(sample.ids) for sample in self])


def make_sample(ids, line=1, *, num_prompt=1, label=-1):
    mask = np.arange(len(ids)) >= num_prompt
    return EncodedSample(
        ids=np.array(ids, dtype=np.int32),
        mask=mask,
        origin=Origin(path="rows.jsonl", line=line),
        label=label,
    )


@pytest.fixture(scope="session")
def llama(tiny_llama):
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    return model.eval(), AutoTokenizer.from_pretrained(tiny_llama)
