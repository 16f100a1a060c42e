"""CTC prefix scores without a loop over time or a tensor over the vocabulary.

The recursion of Algorithm 2 in https://www.merl.com/publications/docs/TR2017-190.pdf is linear in
the probability domain, which gives both of its quantities in closed form. With ``phi`` the forward
probability of the prefix, ``p_c(t)`` that of the token ``c`` and ``q(t)`` that of the blank:

* the score of a candidate is ``psi(c) = sum_t phi(t-1) p_c(t)``, a matrix product, for which the
  forward variables of the extended prefix are not needed;
* those variables, needed only for the few prefixes that the search keeps, are
  ``r_n(t) = P_c(t) sum_{s<=t} phi(s-1) / P_c(s-1)`` with ``P_c`` the running product of ``p_c``,
  and likewise ``r_b`` from ``r_n`` and ``q``: a ``cumsum`` and a ``logcumsumexp``.

Letters: N hypotheses (items times beams), C candidates, T frames, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from speechbrain.decoders.scorer import CTCScorer as SpeechBrainCTCScorer
from torch import Tensor

from modules.lengths import padding_mask

MINUS_INF = -1e20
"""SpeechBrain's score of an impossible token: finite, so that differences stay defined."""


@dataclass(frozen=True)
class CTCPrefixState:
    """Forward variables of each hypothesis, in logs and float64.

    Attributes:
        log_nonblank_NT: probability of the prefix on frames up to t, the last one not blank.
        log_blank_NT: the same, the last frame blank.
        log_prefix_N: score of the prefix so far.
        num_tokens: tokens in the prefix, the same for all hypotheses.
    """

    log_nonblank_NT: Tensor
    log_blank_NT: Tensor
    log_prefix_N: Tensor
    num_tokens: int

    def select(self, rows_N: Tensor) -> CTCPrefixState:
        """The state of some hypotheses, in the order of ``rows_N``."""
        return CTCPrefixState(
            self.log_nonblank_NT[rows_N],
            self.log_blank_NT[rows_N],
            self.log_prefix_N[rows_N],
            self.num_tokens,
        )


class CTCPrefixScore:
    """Prefix scores over the posteriors of one batch. Drop-in for SpeechBrain's class of that name.

    The forward variables are float64: they add up hundreds of frames, and a running product is
    divided by its own past, where float32 would lose the fourth digit at 400 frames. On devices
    without float64 (MPS) they live on the CPU.

    Args:
        log_probs_BTV: CTC log-probabilities.
        num_frames_B: valid frames of each item; later frames have no influence.
        blank_index: the blank token.
        eos_index: the end-of-sequence token; its score is that of the finished prefix.
    """

    minus_inf = MINUS_INF

    def __init__(
        self, log_probs_BTV: Tensor, num_frames_B: Tensor, blank_index: int, eos_index: int
    ) -> None:
        self.device = log_probs_BTV.device
        work_device = torch.device("cpu") if self.device.type == "mps" else self.device
        log_probs_BVT = log_probs_BTV.detach().to(work_device).transpose(1, 2)
        num_frames_B = num_frames_B.to(work_device).long()
        padding_BT = padding_mask(num_frames_B, log_probs_BVT.shape[-1])

        self.blank_index = blank_index
        self.eos_index = eos_index
        self.padding_BT = padding_BT
        self.last_frame_B = num_frames_B - 1
        # Probability one in the padding leaves running products as they are.
        self.log_probs_BVT = log_probs_BVT.masked_fill(padding_BT.unsqueeze(1), 0.0).contiguous()
        self.log_blank_cumsum_BT = self.log_probs_BVT[:, blank_index].double().cumsum(-1)
        # Relative to each token's own best frame and in float64, it underflows 700 nats below that.
        self.log_peak_BV = log_probs_BVT.masked_fill(padding_BT.unsqueeze(1), float("-inf")).amax(
            -1
        )
        self.probs_BVT = (self.log_probs_BVT - self.log_peak_BV.unsqueeze(-1)).double().exp_()
        self.probs_BVT.masked_fill_(padding_BT.unsqueeze(1), 0.0)

    @property
    def batch_size(self) -> int:
        return self.padding_BT.shape[0]

    def select(self, items_I: Tensor) -> CTCPrefixScore:
        """The scores of some items of the batch alone."""
        part = object.__new__(CTCPrefixScore)
        part.__dict__.update(
            {
                name: value[items_I] if isinstance(value, Tensor) else value
                for name, value in self.__dict__.items()
            }
        )
        return part

    @torch.no_grad()
    def forward_step(
        self,
        inp_tokens: Tensor,
        states: CTCPrefixState | None,
        candidates: Tensor | None = None,
        attn: Tensor | None = None,
    ) -> tuple[Tensor, tuple[CTCPrefixState, Tensor]]:
        """Scores of one more token, given that the prefix was possible.

        Args:
            inp_tokens: (N,) last token of each prefix.
            states: what :meth:`permute_mem` returned, ``None`` at the first step.
            candidates: (N, C) tokens to score; the others get an impossible score. ``None`` scores
                the whole vocabulary. The end-of-sequence token is always scored.
            attn: unused.

        Returns:
            (N, V) log-probabilities and what :meth:`permute_mem` needs.
        """
        device = self.padding_BT.device
        last_N = inp_tokens.to(device)
        state = self._initial_state(len(last_N)) if states is None else states
        items_N = self._items(len(last_N))
        vocabulary = self.probs_BVT.shape[1]

        phi_NT = torch.logaddexp(_delayed(state.log_nonblank_NT), self._delayed_blank(state))
        phi_NT.masked_fill_(self.padding_BT[items_N], float("-inf"))
        base_N = phi_NT.amax(-1)
        base_N = base_N.masked_fill(base_N.isinf(), 0.0)
        weights_NT = (phi_NT - base_N.unsqueeze(1)).exp_()

        if candidates is None:
            weights_BTK = weights_NT.view(self.batch_size, -1, weights_NT.shape[-1]).transpose(1, 2)
            sums_NC = (self.probs_BVT @ weights_BTK).transpose(1, 2).flatten(0, 1)
            log_peak_NC = self.log_peak_BV[items_N]
        else:
            candidates = candidates.to(device)
            rows_NC = items_N.unsqueeze(1) * vocabulary + candidates
            probs_NCT = self.probs_BVT.flatten(0, 1)[rows_NC]
            sums_NC = (probs_NCT @ weights_NT.unsqueeze(-1)).squeeze(-1)
            log_peak_NC = self.log_peak_BV[items_N.unsqueeze(1), candidates]
        psi_NC = sums_NC.log_() + log_peak_NC + base_N.unsqueeze(1)

        # A repeated token is a new one only after a blank.
        psi_repeat_N = self._log_prefix(self._delayed_blank(state), items_N, last_N).unsqueeze(1)
        if candidates is None:
            psi_NV = psi_NC.scatter_(1, last_N.unsqueeze(1), psi_repeat_N)
        else:
            psi_NC = torch.where(candidates == last_N.unsqueeze(1), psi_repeat_N, psi_NC)
            psi_NV = psi_NC.new_full((len(last_N), vocabulary), MINUS_INF)
            psi_NV.scatter_(1, candidates, psi_NC)

        end_N1 = self.last_frame_B[items_N].unsqueeze(1)
        psi_NV[:, self.eos_index] = torch.logaddexp(
            state.log_nonblank_NT.gather(1, end_N1), state.log_blank_NT.gather(1, end_N1)
        ).squeeze(1)
        if self.eos_index != self.blank_index:
            psi_NV[:, self.blank_index] = MINUS_INF
        scores_NV = psi_NV.clamp_(min=MINUS_INF) - state.log_prefix_N.unsqueeze(1)
        return scores_NV.float().to(self.device), (state, last_N)

    @torch.no_grad()
    def permute_mem(self, memory: tuple[CTCPrefixState, Tensor], index: Tensor) -> CTCPrefixState:
        """The state of the extended prefixes that the search has kept.

        Args:
            memory: from :meth:`forward_step`.
            index: (batch, beam) chosen extensions, numbered beam * V + token within their item.
        """
        state, last_N = memory
        index = index.to(self.padding_BT.device)
        vocabulary = self.probs_BVT.shape[1]
        items_N = self._items(index.numel())
        beams_N = (index // vocabulary).view(-1) + items_N * index.shape[1]
        token_N = (index % vocabulary).view(-1)
        previous = state.select(beams_N)

        blank_NT = self._delayed_blank(previous)
        is_repeat_N1 = (token_N == last_N[beams_N]).unsqueeze(1)
        nonblank_NT = _delayed(previous.log_nonblank_NT)
        phi_NT = torch.logaddexp(nonblank_NT.masked_fill(is_repeat_N1, float("-inf")), blank_NT)

        log_token_NT = self.log_probs_BVT[items_N, token_N].double().cumsum(-1)
        log_blank_NT = self.log_blank_cumsum_BT[items_N]
        new_nonblank_NT = log_token_NT + torch.logcumsumexp(
            phi_NT - _delayed(log_token_NT, 0.0), -1
        )
        new_blank_NT = log_blank_NT + torch.logcumsumexp(
            _delayed(new_nonblank_NT) - _delayed(log_blank_NT, 0.0), -1
        )
        # A blank is no token: what the search may keep of it for want of better stays impossible.
        is_blank_N1 = (token_N == self.blank_index).unsqueeze(1)
        return CTCPrefixState(
            new_nonblank_NT.masked_fill(is_blank_N1, float("-inf")),
            new_blank_NT.masked_fill(is_blank_N1, float("-inf")),
            self._log_prefix(phi_NT, items_N, token_N).clamp_(min=MINUS_INF),
            previous.num_tokens + 1,
        )

    def _items(self, num_hypotheses: int) -> Tensor:
        items_B = torch.arange(self.batch_size, device=self.padding_BT.device)
        return items_B.repeat_interleave(num_hypotheses // self.batch_size)

    def _initial_state(self, num_hypotheses: int) -> CTCPrefixState:
        log_blank_NT = self.log_blank_cumsum_BT[self._items(num_hypotheses)]
        return CTCPrefixState(
            torch.full_like(log_blank_NT, float("-inf")),
            log_blank_NT,
            log_blank_NT.new_zeros(num_hypotheses),
            0,
        )

    def _delayed_blank(self, state: CTCPrefixState) -> Tensor:
        """``log_blank`` one frame earlier; the empty prefix is certain before the first frame."""
        return _delayed(state.log_blank_NT, 0.0 if state.num_tokens == 0 else float("-inf"))

    def _log_prefix(self, phi_NT: Tensor, items_N: Tensor, token_N: Tensor) -> Tensor:
        psi_NT = phi_NT + self.log_probs_BVT[items_N, token_N]
        return psi_NT.masked_fill_(self.padding_BT[items_N], float("-inf")).logsumexp(-1)


class CTCScorer(SpeechBrainCTCScorer):
    """SpeechBrain's CTC scorer over :class:`CTCPrefixScore`; full or partial (on candidates).

    Args:
        ctc_fc: linear layer from encoder states to CTC logits.
        blank_index: the blank token.
        eos_index: the end-of-sequence token.
    """

    def __init__(self, ctc_fc: torch.nn.Module, blank_index: int, eos_index: int) -> None:
        super().__init__(ctc_fc, blank_index, eos_index)

    @torch.no_grad()
    def reset_mem(self, x: Tensor, enc_lens: Tensor) -> None:
        """Starts on encoder states ``x`` (batch, time, features) with ``enc_lens`` valid frames."""
        log_probs_BTV = self.softmax(self.ctc_fc(x).float())
        self.ctc_score = CTCPrefixScore(log_probs_BTV, enc_lens, self.blank_index, self.eos_index)

    def permute_mem(self, memory: tuple[CTCPrefixState, Tensor], index: Tensor) -> CTCPrefixState:
        """See :meth:`CTCPrefixScore.permute_mem`."""
        return self.ctc_score.permute_mem(memory, index)

    def select_items(
        self, memory: CTCPrefixState, items_I: Tensor, rows_N: Tensor
    ) -> CTCPrefixState:
        """Goes on with some items of the batch, whose hypotheses are the rows ``rows_N``."""
        work_device = self.ctc_score.padding_BT.device
        self.ctc_score = self.ctc_score.select(items_I.to(work_device))
        return memory.select(rows_N.to(work_device))


def _delayed(x_NT: Tensor, first: float = float("-inf")) -> Tensor:
    """``x`` one frame later, ``first`` before it."""
    return torch.nn.functional.pad(x_NT[:, :-1], (1, 0), value=first)
