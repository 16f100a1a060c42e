"""Language model scorers whose states follow the beams, so that a token costs one token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from speechbrain.decoders.scorer import KenLMScorer as SpeechBrainKenLMScorer
from speechbrain.decoders.scorer import TransformerLMScorer as SpeechBrainTransformerLMScorer
from speechbrain.lobes.models.transformer.TransformerLM import (
    TransformerLM as SpeechBrainTransformerLM,
)
from torch import Tensor, nn

from decoding.memory import SearchMemory
from modules import lm as language_models
from modules.packed_linear import with_packed_linears


class LMState(Protocol):
    """What a language model remembers of each hypothesis."""

    def select(self, rows_N: Tensor) -> LMState:
        """The state of some hypotheses, in the order of ``rows_N``."""


class LMScorer(SpeechBrainTransformerLMScorer):
    """SpeechBrain's LM scorer over a state instead of over the prefix; its key is ``lm``.

    Args:
        language_model: any ``TransformerLM`` of SpeechBrain, for which a key/value cache is kept
            here, or a model with ``initial_state(batch_size)`` and ``step(tokens, state)``.
        temperature: the logits are divided by it.

    Raises:
        ValueError: a ``TransformerLM`` that cannot be run token by token.
    """

    def __init__(self, language_model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__(language_model, temperature)
        self._initial_state: Callable[[int], LMState]
        self._step: Callable[[Tensor, Any], tuple[Tensor, LMState]]
        if isinstance(language_model, SpeechBrainTransformerLM):
            language_models.check_cacheable(language_model)
            self._initial_state = partial(language_models.transformer_lm_state, language_model)
            self._step = partial(language_models.transformer_lm_step, language_model)
        else:
            self._initial_state = self._memory
            self._step = self._stepped

    @torch.no_grad()
    def score(
        self,
        inp_tokens: Tensor,
        memory: LMState | None,
        candidates: Tensor | None,
        attn: Tensor | None,
    ) -> tuple[Tensor, LMState]:
        """Log-probabilities (N, V) of the token after ``inp_tokens``, and the new state."""
        if memory is None:
            self.lm.to(inp_tokens.device)
            memory = self._initial_state(len(inp_tokens))
        logits_NV, memory = self._step(inp_tokens, memory)
        return self.softmax(logits_NV.float() / self.temperature), memory

    def permute_mem(self, memory: LMState, index: Tensor) -> LMState:
        """The states of the hypotheses that the search goes on with."""
        return memory.select(index)

    def _memory(self, batch_size: int) -> SearchMemory:
        network: Any = with_packed_linears(self.lm)
        return SearchMemory((network,), network.initial_state(batch_size))

    @staticmethod
    def _stepped(tokens_N: Tensor, memory: SearchMemory) -> tuple[Tensor, SearchMemory]:
        logits_NV, state = memory.networks[0].step(tokens_N, memory.state)
        return logits_NV, SearchMemory(memory.networks, state)


class KenLMScorer(SpeechBrainKenLMScorer):
    """SpeechBrain's scorer of a token n-gram; its weight has the key ``kenlm``.

    A hypothesis begins at the start of a sentence, which the parent does not tell the n-gram.

    Meant as a partial scorer: it asks kenlm about one token of one hypothesis at a time.

    Args:
        lm_path: ARPA file or kenlm binary over the tokens of the model.
        vocab_size: number of tokens.
        token_list: how the n-gram spells each token, in order of their indices.

    Raises:
        ImportError: kenlm is not installed.
        ValueError: ``token_list`` has another length than the vocabulary.
    """

    def score(
        self, inp_tokens: Tensor, memory: tuple | None, candidates: Tensor | None, attn: Tensor
    ) -> tuple[Tensor, tuple]:
        """See the parent, which is slow to walk through tensors and fast through arrays."""
        array = None if candidates is None else candidates.cpu().numpy()
        if memory is None:
            start = self.kenlm.State()
            self.lm.BeginSentenceWrite(start)
            memory = np.array([start] * len(inp_tokens)), np.ones(len(inp_tokens))
        return super().score(inp_tokens, memory, array, attn)

    def select_items(self, memory: tuple, items_I: Tensor, rows_N: Tensor) -> tuple:
        """Goes on with some items of the batch, whose hypotheses are the rows ``rows_N``."""
        self.batch_index = np.arange(len(items_I))
        rows = rows_N.cpu().numpy()
        return tuple(part[rows] for part in memory)
