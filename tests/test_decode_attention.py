"""reference.decode_attention and apply_rope against transformers' Llama and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import engine_of
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from chatterbox_fast import reference

HEADS, DIM = 16, 64


def inputs(capacity: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(capacity)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source).to(dtype)

    angles = draw(capacity, DIM // 2).repeat(1, 2)
    return {
        **{name: draw(2, HEADS, 1, DIM) for name in "qkv"},
        "k_cache": draw(2, HEADS, capacity, DIM),
        "v_cache": draw(2, HEADS, capacity, DIM),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }


def oracle(position: int, x: dict[str, Tensor]) -> Tensor:
    """softmax(q k' / 8) v over the valid prefix, in float64, written out."""
    x = {name: value.double() for name, value in x.items()}
    cos, sin = x["cos"][position], x["sin"][position]

    def rotate(t: Tensor) -> Tensor:
        half = DIM // 2
        return t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin

    k = torch.cat([x["k_cache"][:, :, :position], rotate(x["k"])], dim=2)
    v = torch.cat([x["v_cache"][:, :, :position], x["v"]], dim=2)
    scores = rotate(x["q"]) @ k.transpose(-1, -2) / DIM**0.5
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("capacity", [1, 7, 256, 300])
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_attention_over_the_valid_prefix(capacity: int, where: float) -> None:
    position = int(where * (capacity - 1))
    x = inputs(capacity)
    expected = oracle(position, x)
    before = {name: x[name].clone() for name in ("k_cache", "v_cache")}
    got = reference.decode_attention(**x, position=torch.tensor([position]))
    assert got.shape == (2, HEADS, 1, DIM)
    assert (got - expected).abs().max() < 4e-6
    # Only the slot at `position` was written.
    for name, old in before.items():
        changed = (x[name] != old).any(dim=-1).flatten(0, 1).any(dim=0)
        assert changed.nonzero().flatten().tolist() == [position]
    assert torch.equal(x["v_cache"][:, :, position], x["v"][:, :, 0])


def test_what_lies_behind_the_position_does_not_matter() -> None:
    x, y = inputs(64), inputs(64)
    y["k_cache"][:, :, 21:] = 1e4
    y["v_cache"][:, :, 21:] = -1e4
    position = torch.tensor([20])
    assert torch.equal(
        reference.decode_attention(**x, position=position),
        reference.decode_attention(**y, position=position),
    )


def test_rope_is_transformers() -> None:
    x = inputs(9)
    q = torch.randn(2, HEADS, 9, DIM)
    expected, _ = apply_rotary_pos_emb(q, q, x["cos"][None], x["sin"][None])
    assert torch.equal(reference.apply_rope(q, x["cos"], x["sin"]), expected)


def test_the_rotary_table_is_stocks(t3: Any) -> None:
    cos, sin = engine_of(t3).rotary(600)
    for position in (0, 1, 255, 599):
        index = torch.tensor([[position]])
        expected_cos, expected_sin = t3.tfmr.rotary_emb(torch.zeros(1), index)
        assert torch.equal(cos[position], expected_cos[0, 0])
        assert torch.equal(sin[position], expected_sin[0, 0])
