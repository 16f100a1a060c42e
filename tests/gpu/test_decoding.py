"""A search on a GPU finds what the search on the CPU finds."""

import pytest
import torch

from decoding.beam_search import CachedBeamSearcher
from decoding.ctc_prefix_scorer import CTCScorer
from decoding.lm_scorers import LMScorer
from decoding.scorers import ScorerBuilder
from tests.decoding.networks import BLANK, EOS, memory, output_layer, recogniser
from tests.decoding.test_beam_search import (
    DECODERS,
    LENGTHS,
    SETTING,
    assert_same,
    item,
    small_lm,
)


def search(decoder, device):
    """The best four hypotheses of a batch, on the CPU."""
    mixer = {"d_state": 16, "expand": 2, "d_conv": 4}
    modules = [recogniser(decoder, mamba_config=mixer), output_layer(eos_bias=4.0)]
    ctc = CTCScorer(output_layer(seed=3).to(device), BLANK, EOS)
    searcher = CachedBeamSearcher(
        modules=[module.to(device) for module in modules],
        scorer=ScorerBuilder({"ctc": 0.4, "lm": 0.6}, [LMScorer(small_lm(), 1.15)], [ctc]),
        return_topk=True,
        topk=4,
        **SETTING,
    )
    states = memory(LENGTHS).to(device)
    lengths = torch.tensor(LENGTHS, device=device) / states.shape[1]
    return tuple(part.cpu() for part in searcher(states, lengths))


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_joint_search_is_that_of_the_cpu(device, decoder):
    found, wanted = search(decoder, device), search(decoder, torch.device("cpu"))
    for row in range(len(LENGTHS)):
        assert_same(item(found, row), item(wanted, row))
