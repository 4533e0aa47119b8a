"""The rows of a draft forward in a paged cache, and the adapter on them, without vLLM."""

import pytest
import torch
from torch import nn

from retrofit.errors import ArtifactError
from retrofit.serving.vllm.rows import draft_rows
from retrofit.serving.vllm.updates import applied, updates


def test_rows_of_two_requests_by_hand():
    """Blocks of 4 positions; seeds at 2 and 7, so that the second request's draft rows are in its third block."""
    table = torch.tensor([[5, 9, 0], [3, 1, 8]], dtype=torch.int32)
    rows = draft_rows(torch.tensor([2, 7]), table, 3, 4)
    assert rows.positions.tolist() == [2, 7, 3, 4, 5, 8, 9, 10]
    assert rows.slots.tolist() == [22, 7, 23, 36, 37, 32, 33, 34]
    assert rows.query_start.tolist() == [0, 1, 2, 5, 8]
    assert rows.lengths.tolist() == [3, 8, 6, 11]
    assert rows.table_RB.tolist() == [[5, 9, 0], [3, 1, 8], [5, 9, 0], [3, 1, 8]]
    assert (rows.query_start.dtype, rows.lengths.dtype) == (torch.int32, torch.int32)


class Fused(nn.Linear):
    """As vLLM's: several projections in one, and a tuple as its answer."""

    def __init__(self, wide, sizes):
        super().__init__(wide, sum(sizes), bias=False)
        self.output_sizes, self.output_size = sizes, sum(sizes)

    def forward(self, x):
        return super().forward(x), None


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Module()
        self.layer.qkv_proj, self.layer.o_proj = Fused(6, [4, 2, 2]), Fused(4, [6])


FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def lora(name, wide, size, rank=2):
    generator = torch.Generator().manual_seed(size)
    return {
        f"base_model.model.{name}.lora_A.weight": torch.randn(rank, wide, generator=generator),
        f"base_model.model.{name}.lora_B.weight": torch.randn(size, rank, generator=generator),
    }


def found(model, state, scale=0.5):
    return updates(model, FUSED, state, scale, torch.float32, torch.device("cpu"))


def test_updates_are_those_of_a_lora_on_the_unfused_projections():
    model, x = Model(), torch.randn(5, 6)
    q, v, o = lora("layer.q_proj", 6, 4), lora("layer.v_proj", 6, 2), lora("layer.o_proj", 4, 6)
    [a_q, b_q], [a_v, b_v], [a_o, b_o] = q.values(), v.values(), o.values()
    plain, plain_o = model.layer.qkv_proj(x)[0], model.layer.o_proj(x[:, :4])[0]
    with applied(found(model, {**q, **v, **o}), first=2):
        changed, changed_o = model.layer.qkv_proj(x)[0], model.layer.o_proj(x[:, :4])[0]
    want = plain.clone()
    want[2:, :4] += 0.5 * x[2:] @ a_q.T @ b_q.T
    want[2:, 6:] += 0.5 * x[2:] @ a_v.T @ b_v.T
    torch.testing.assert_close(changed, want)
    torch.testing.assert_close(changed_o[2:], plain_o[2:] + 0.5 * x[2:, :4] @ a_o.T @ b_o.T)
    assert torch.equal(changed[:2], plain[:2]) and torch.equal(changed_o[:2], plain_o[:2])
    assert torch.equal(changed[:, 4:6], plain[:, 4:6])


def test_base_rows_never_meet_the_adapter_and_afterwards_nothing_does():
    model, x = Model(), torch.randn(5, 6)
    broken = {name: tensor * float("nan") for name, tensor in lora("layer.q_proj", 6, 4).items()}
    plain, before = model.layer.qkv_proj(x)[0], model.layer.qkv_proj.forward
    changed = []

    def interrupted():
        with applied(found(model, broken), first=3):
            changed.append(model.layer.qkv_proj(x)[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(changed[0][:3], plain[:3]) and changed[0][3:, :4].isnan().all()
    assert model.layer.qkv_proj.forward == before and torch.equal(model.layer.qkv_proj(x)[0], plain)


def test_a_forward_of_somebody_elses_is_kept():
    model, x = Model(), torch.randn(2, 6)
    model.layer.qkv_proj.forward = theirs = lambda x: (torch.zeros(len(x), 8), None)
    with applied(found(model, lora("layer.q_proj", 6, 4)), first=1):
        assert model.layer.qkv_proj(x)[0][1, :4].abs().min() > 0
    assert model.layer.qkv_proj.forward is theirs


@pytest.mark.parametrize(
    "state",
    [lora("layer.gate_proj", 6, 4), lora("layer.q_proj", 6, 3), lora("layers.0.q_proj", 6, 4)],
    ids=["name", "size", "place"],
)
def test_a_tensor_without_a_place_is_refused(state):
    with pytest.raises(ArtifactError, match="does not fit the model"):
        found(Model(), state)
