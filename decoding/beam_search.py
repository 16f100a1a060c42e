"""Beam search over a decoder with a state, in which every item of a batch is on its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from speechbrain.decoders.seq2seq import AlivedHypotheses, S2STransformerBeamSearcher
from speechbrain.utils.data_utils import undo_padding
from torch import Tensor, nn

from decoding import scorers
from decoding.memory import SearchMemory
from modules.lengths import absolute_lengths, padding_mask
from modules.mamba_decoder import MambaDecoder
from modules.packed_linear import with_packed_linears


class CachedBeamSearcher(S2STransformerBeamSearcher):
    """SpeechBrain's beam search with a decoder state that follows the beams.

    For one utterance it gives the hypotheses and scores of its parent, which runs the whole prefix
    through the decoder for every token. In a batch every item gives what it gives alone: its limits
    come from its own length, and it leaves the batch when it is finished.

    Two searches differ from the parent's: pure CTC decoding (weight 1), where it adds each step's
    scores to those of the step before; and a partial CTC scorer of all tokens (``beam_size *
    scorer_beam_scale`` reaches the vocabulary), where it lets hypotheses begin with blanks.

    Args:
        modules: a TransformerASR with ``init_decoder_state`` and ``decode_step``, and the linear
            layer from its decoder to the tokens.
        temperature: the logits of the decoder are divided by it.
        **kwargs: as in SpeechBrain's ``S2SBeamSearcher``: bos_index, eos_index, min_decode_ratio,
            max_decode_ratio (tokens per encoder frame), beam_size, scorer, return_topk, topk,
            using_eos_threshold, eos_threshold, length_normalization, using_max_attn_shift,
            max_attn_shift, minus_inf.

    Attributes:
        num_cut: how many of the best hypotheses so far had not ended at ``max_decode_ratio``.

    Raises:
        ValueError: attention weights are needed (by a coverage scorer or ``using_max_attn_shift``)
            of a decoder that has none; or what SpeechBrain refuses.
    """

    def __init__(self, modules: Sequence[nn.Module], temperature: float = 1.0, **kwargs: Any):
        super().__init__(modules=modules, temperature=temperature, **kwargs)
        self.num_cut = 0
        self._needs_attention = self.using_max_attn_shift or (
            self.scorer is not None and "coverage" in scorers.all_scorers(self.scorer)
        )
        if self._needs_attention and isinstance(self.model.decoder, MambaDecoder):
            raise ValueError(
                "A Mamba decoder has no attention weights, which the coverage scorer and "
                "using_max_attn_shift need: leave them out, or use decoder_module: transformer."
            )

    @property
    def _drops_items(self) -> bool:
        return self.scorer is None or scorers.can_select_items(self.scorer)

    @torch.no_grad()
    def forward(self, enc_states: Tensor, wav_len: Tensor) -> tuple[Any, Tensor, Tensor, Tensor]:
        """Searches the best tokens of each item.

        Args:
            enc_states: (batch, time, features) encoder output.
            wav_len: (batch,) valid frames as a fraction of ``time``.

        Returns:
            the best hypotheses (lists of tokens), their lengths as a fraction of the longest, their
            scores, and the log-probabilities of their tokens; with ``return_topk`` tensors
            (batch, topk, ...).
        """
        num_frames_B = absolute_lengths(wav_len, enc_states.shape[1])
        # Attention weighs padding with zero, which does not silence a NaN.
        padding_BT = padding_mask(num_frames_B, enc_states.shape[1])
        enc_states = enc_states.masked_fill(padding_BT.unsqueeze(-1), 0.0)
        frames = num_frames_B.tolist()
        # At least one, so that there is a hypothesis; no more than the decoder has positions.
        max_steps = [
            min(max(1, int(count * self.max_decode_ratio)), self.model.max_length)
            for count in frames
        ]
        min_steps = [int(count * self.min_decode_ratio) for count in frames]
        self._set_batch(len(enc_states), enc_states.device)
        self.min_decode_steps = torch.tensor(min_steps, device=self.device)
        self.n_out = self.set_n_out()

        finished: list[list] = [[] for _ in range(self.batch_size)]
        active = list(range(self.batch_size))
        memory, scorer_memory = self._update_reset_memory(enc_states, num_frames_B)
        hypotheses = self.init_hypotheses()
        tokens_N = torch.full((self.n_bh,), self.bos_index, device=self.device)
        attention_peak_N = torch.zeros(self.n_bh, device=self.device)

        for step in range(max(max_steps)):
            hypotheses, tokens_N, _, _, memory, scorer_memory, _, attention_peak_N, scores_N = (
                self.search_step(
                    hypotheses,
                    tokens_N,
                    self._no_log_probs(),
                    [finished[item] for item in active],
                    memory,
                    scorer_memory,
                    None,
                    attention_peak_N,
                    None,
                    None,
                    step,
                )
            )
            self._end_at_limit(
                [step + 1 >= max_steps[item] for item in active],
                hypotheses,
                [finished[item] for item in active],
                scores_N,
            )
            going_on = [i for i, item in enumerate(active) if len(finished[item]) < self.beam_size]
            if not going_on:
                break
            if self._drops_items and len(going_on) < len(active):
                active = [active[i] for i in going_on]
                items_I = torch.tensor(going_on, device=self.device)
                rows_N = self._rows(items_I)
                self._set_batch(len(active), self.device)
                self.min_decode_steps = self.min_decode_steps[items_I]
                hypotheses = AlivedHypotheses(*hypotheses[rows_N])
                tokens_N, attention_peak_N = tokens_N[rows_N], attention_peak_N[rows_N]
                memory = self._attn_weight_permute_memory_step(memory, rows_N)
                if self.scorer is not None:
                    scorer_memory = scorers.select_items(
                        self.scorer, scorer_memory, items_I, rows_N
                    )

        self._set_batch(len(finished), self.device)
        hyps, lengths, scores, log_probs = self._get_topk_prediction(finished)
        # SpeechBrain's lengths are without the last token, the end of what has ended.
        last_B1 = absolute_lengths(lengths[:, 0], hyps.shape[2])[:, None]
        self.num_cut += int((hyps[:, 0].gather(1, last_B1) != self.eos_index).sum())
        if self.return_topk:
            return hyps, lengths, scores, log_probs
        best = undo_padding(hyps[:, 0], lengths[:, 0])
        return best, lengths[:, 0], scores[:, 0], log_probs[:, 0]

    def forward_step(
        self, inp_tokens: Tensor, memory: SearchMemory, enc_states: None, enc_lens: None
    ) -> tuple[Tensor, SearchMemory, Tensor | None]:
        """Log-probabilities of the next token; the state holds all that is needed of the audio."""
        model, fc = memory.networks
        decoded_ND, state = model.decode_step(inp_tokens, memory.state)
        log_probs_NV = self.softmax(fc(decoded_ND).float() / self.temperature)
        attention_NT = state.layers.attention_BT if self._needs_attention else None
        return log_probs_NV, SearchMemory(memory.networks, state), attention_NT

    def permute_mem(self, memory: SearchMemory, index: Tensor) -> SearchMemory:
        """The states of the hypotheses that the search goes on with."""
        return memory.select(index)

    def _update_reset_memory(
        self, enc_states: Tensor, enc_lens: Tensor
    ) -> tuple[SearchMemory | None, dict[str, Any] | None]:
        memory = scorer_memory = None
        if self.attn_weight > 0:
            state = self.model.init_decoder_state(enc_states, enc_lens).repeat(self.beam_size)
            networks = with_packed_linears(self.model), with_packed_linears(self.fc)
            memory = SearchMemory(networks, state)
        if self.scorer is not None:
            scorer_memory = self.scorer.reset_scorer_mem(enc_states, enc_lens)
        return memory, scorer_memory

    def _set_eos_minus_inf_step(
        self, log_probs: Tensor, step: int, min_decode_steps: Tensor
    ) -> Tensor:
        too_early_N = (step < min_decode_steps).repeat_interleave(self.beam_size)
        log_probs[:, self.eos_index].masked_fill_(too_early_N, self.minus_inf)
        return log_probs

    def _no_log_probs(self) -> Tensor | None:
        """What a step starts from; the decoder, if it has a weight, puts its own in the place."""
        if self.attn_weight > 0:
            return None
        return torch.zeros(self.n_bh, self.n_out, device=self.device)

    def _end_at_limit(
        self,
        at_limit: list[bool],
        hypotheses: AlivedHypotheses,
        finished: list[list],
        scores_N: Tensor,
    ) -> None:
        """Ends the hypotheses of the items that may not grow any further."""
        if not any(at_limit):
            return
        at_limit_N = torch.tensor(at_limit, device=self.device).repeat_interleave(self.beam_size)
        ends_N = torch.where(at_limit_N, self.eos_index, self.eos_index - 1)
        self._update_hyps_and_scores_if_eos_token(ends_N, hypotheses, finished, scores_N)

    def _set_batch(self, batch_size: int, device: torch.device) -> None:
        """Sets what the parent keeps of the batch that it searches."""
        self.device = device
        self.batch_size = batch_size
        self.n_bh = batch_size * self.beam_size
        self.beam_offset = torch.arange(batch_size, device=device) * self.beam_size

    def _rows(self, items_I: Tensor) -> Tensor:
        beams_K = torch.arange(self.beam_size, device=self.device)
        return (self.beam_offset[items_I].unsqueeze(1) + beams_K).flatten()
