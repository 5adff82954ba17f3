"""A pack's attention as the GPU's packages want it, against the calls document by document.

FlexAttention runs uncompiled on a CPU and has no backward there; flash_attn is not here, so
its arguments are read by the few lines that its documentation promises.
"""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from lorakeet.base.gpu_code import (
    APART,
    FLASH,
    FLEX,
    choose_packed_attention,
    has_flash_attention,
    has_triton,
)
from lorakeet.models import attention_gpu as gpu
from lorakeet.models.attention import How, Layout, attend_apart

LAYOUTS = {
    "one": Layout.build((0, 9)),
    "apart": Layout.build((0, 5, 6, 140)),
    "shared": Layout.build((0, 40, 150, 190, 300), (-1, 0, 0, -1)),
    "nested": Layout.build((0, 7, 9, 60, 133, 150, 260), (-1, 0, 1, 1, 0, -1)),
}
HOWS = {
    "causal": How(is_causal=True),
    "both-sides": How(is_causal=False, scaling=0.3),
    "window": How(is_causal=True, window=11),
    "wide-window": How(is_causal=False, window=30),
    "soft-cap": How(is_causal=True, soft_cap=2.0),
}


def draw(layout, *, kv_heads=2):
    generator = torch.Generator().manual_seed(0)
    num_tokens = layout.segments[-1][-1][1]
    return [torch.randn(1, h, num_tokens, 8, generator=generator) for h in (4, kv_heads, kv_heads)]


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_flex_attention_answers_as_the_documents_apart(layout, how):
    q, k, v = draw(layout)
    with torch.no_grad():
        found = gpu.attend_flex(q, k, v, layout, how, call=flex_attention)
        expected = attend_apart(q, k, v, layout, how)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_block_is_left_out_that_holds_a_pair(layout, how):
    mask = gpu.to_block_mask(layout, how, torch.device("cpu"))
    num_tokens = layout.segments[-1][-1][1]
    i = torch.arange(num_tokens)
    seen = mask.mask_mod(0, 0, i[:, None], i[None])
    blocks = mask.to_dense()[0, 0].bool()
    held = torch.zeros_like(blocks)
    for a, b in seen.nonzero().tolist():
        held[a // gpu.BLOCK, b // gpu.BLOCK] = True
    assert (blocks | ~held).all() and seen.any(1).all()
    if layout is LAYOUTS["apart"] and how.is_causal:
        assert int(blocks.sum()) == 3  # of four


def varlen(q, k, v, keys, how):
    """What flash_attn_varlen_func promises: the causal mask ends at the lower right corner."""
    parts = []
    ends = zip(keys.query_ends.tolist(), keys.query_ends.tolist()[1:],
               keys.key_ends.tolist(), keys.key_ends.tolist()[1:], strict=False)  # fmt: skip
    for q_start, q_end, k_start, k_end in ends:
        whole = Layout.build((0, k_end - k_start))
        padded = torch.zeros(1, q.shape[1], k_end - k_start, q.shape[-1])
        padded[:, :, k_end - k_start - (q_end - q_start) :] = q[:, :, q_start:q_end]
        out = attend_apart(padded, k[:, :, k_start:k_end], v[:, :, k_start:k_end], whole, how)
        parts.append(out[:, :, k_end - k_start - (q_end - q_start) :])
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_varlen_call_gets_every_segment_with_its_ancestors(layout, how):
    q, k, v = draw(layout)
    keys = gpu.to_flash_keys(layout, torch.device("cpu"))
    found = varlen(q, k[:, :, keys.places], v[:, :, keys.places], keys, how)
    torch.testing.assert_close(found, attend_apart(q, k, v, layout, how), rtol=1e-5, atol=1e-5)
    assert keys.query_ends[-1] == q.shape[2] and keys.key_ends[-1] == len(keys.places)
    assert keys.most_keys == layout.longest


def test_a_way_serves_only_when_answer_and_gradients_are_right(monkeypatch):
    def fail(*given):
        raise RuntimeError("no kernel image\nfor this device")

    def halve_gradient(q, k, v, layout, how):
        out = attend_apart(q, k, v, layout, how)
        return out / 2 + out.detach() / 2

    q, how = draw(LAYOUTS["one"])[0], HOWS["causal"]
    for attend, told in ((attend_apart, ""), (fail, "fails (no kernel image)"),
                         (halve_gradient, "answers otherwise than SDPA")):  # fmt: skip
        monkeypatch.setitem(gpu._WAYS, FLEX, attend)
        assert gpu._prove(FLEX, q, 2, how) == told


def test_a_cpu_takes_each_document_apart():
    assert choose_packed_attention("cpu", "float32").way == APART
    q, _, v = draw(LAYOUTS["one"])
    assert gpu.find_attention(q, v, HOWS["causal"]) is None


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("triton", [True, False])
def test_a_gpu_takes_what_is_installed_and_says_why(flash, triton, monkeypatch):
    import lorakeet.base.gpu_code as code

    assert {type(has_triton()), type(has_flash_attention())} == {bool}
    monkeypatch.setattr(code, "has_flash_attention", lambda: flash)
    monkeypatch.setattr(code, "has_triton", lambda: triton)
    half, single = (choose_packed_attention("cuda", d) for d in ("bfloat16", "float32"))
    other = FLEX if triton else APART
    assert (half.way, single.way) == (FLASH if flash else other, other)
    assert "float32" in single.why and half.why.endswith(".")
