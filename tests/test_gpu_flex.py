"""Attention over packed rows by flex_attention: its masks and its forward pass, on the CPU in eager mode."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from loralib.data.packing import pack
from loralib.data.tokens import TokenExample
from loralib.engine.attention import AttentionSettings, PackedLayout
from loralib.engine.flex import BLOCK, FlexLayout, bucket

# flex_attention says that it is slow without torch.compile, as it is meant to be here.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def packed_row(seed, prompts=3, completions=3, longest=90):
    """Several prompts of which each has several completions, padded to a bucket, and the number of real tokens."""
    draw = torch.Generator().manual_seed(seed)

    def some():
        count = int(torch.randint(1, longest, (), generator=draw))
        return tuple(torch.randint(3, 60, (count,), generator=draw).tolist())

    examples = []
    for _ in range(prompts):
        prompt = some()
        for _ in range(completions):
            ids = prompt + some()
            examples.append(TokenExample(ids, tuple(place >= max(1, len(prompt)) for place in range(len(ids)))))
    row = pack(examples)
    return row.extended(bucket(row.ids.shape[1])), row.ids.shape[1]


@pytest.mark.parametrize("window", [None, 40, 300])
@pytest.mark.parametrize("seed", range(3))
def test_block_masks_are_those_that_pytorch_makes_of_all_pairs(seed, window):
    row, _ = packed_row(seed)
    layout = FlexLayout(row.ends, row.positions[0], "cpu", flex=True)
    ours, dense = layout.mask(window), layout.mask(window, dense=True)
    tokens = len(row.ends)
    theirs = create_block_mask(ours.mask_mod, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=BLOCK)
    blocks = dense.view(tokens // BLOCK, BLOCK, tokens // BLOCK, BLOCK).transpose(1, 2)
    ours_seen, theirs_seen = ours.to_dense()[0, 0].bool(), theirs.to_dense()[0, 0].bool()
    assert torch.equal(theirs_seen, blocks.any(-1).any(-1))  # what "seen" means
    if window is None:
        assert torch.equal(ours_seen, theirs_seen)
        assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)
    assert not (theirs_seen & ~ours_seen).any()  # no block is left out that holds a pair
    for query, count in enumerate(ours.full_kv_num_blocks[0, 0].tolist()):
        assert all(blocks[query, key].all() for key in ours.full_kv_indices[0, 0, query, :count].tolist())


@pytest.mark.parametrize(
    "settings",
    [
        AttentionSettings(0.25),
        AttentionSettings(0.25, window=40),
        AttentionSettings(0.25, softcap=2.0),
        AttentionSettings(0.25, softcap=2.0, window=40),
    ],
)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flex_attention_computes_what_our_attention_does(settings, kv_heads):
    row, real = packed_row(0)
    tokens = len(row.ends)
    torch.manual_seed(0)
    q, k, v = (torch.randn(tokens, heads, 16) for heads in (4, kv_heads, kv_heads))
    ours = PackedLayout(row.ends[:real], row.positions[0][:real]).attend(0, q[:real], k[:real], v[:real], settings)
    with torch.no_grad():
        for flex in (True, False):
            y = FlexLayout(row.ends, row.positions[0], "cpu", flex=flex).attend(0, q, k, v, settings)
            torch.testing.assert_close(y[:real], ours, rtol=1e-5, atol=1e-5)
