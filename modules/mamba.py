"""The Mamba mixer: one sequence layer with a fixed-size state, causal or bidirectional.

Letters: B batch, T frames, D model width, E inner width, N scan state, R rank of the step sizes,
W convolution taps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from modules.mamba_modules import DirectionModules, mamba_inner_of_modules, states_of_chunks
from modules.stream_state import StreamState, stream_state
from ops.mamba_inner import Direction, mamba_inner_fn, mamba_inner_step


@stream_state
class MambaState(StreamState):
    """What a causal pass has to remember of the frames behind it; never modified in place.

    Attributes:
        conv: the last W-1 inputs of the convolution (B, E, W-1), the newest last.
        ssm: state of the scan (B, E, N), float32.
    """

    conv: Tensor
    ssm: Tensor

    @classmethod
    def zeros(
        cls,
        batch_size: int,
        d_inner: int,
        d_state: int,
        d_conv: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MambaState:
        """The state before the first frame.

        Args:
            dtype: of the convolution's inputs; float64 makes the scan's state float64, too.
        """
        ssm_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(
            conv=torch.zeros(batch_size, d_inner, d_conv - 1, device=device, dtype=dtype),
            ssm=torch.zeros(batch_size, d_inner, d_state, device=device, dtype=ssm_dtype),
        )


class Mamba(nn.Module):
    """Gated selective state-space layer over frames (B, T, D).

    Parameters have the names and shapes of mamba_ssm's ``Mamba``; a bidirectional mixer adds those
    of Vision Mamba's v2 (``A_b_log``, ``conv1d_b``, ``x_proj_b``, ``dt_proj_b``, ``D_b``): both
    directions share ``in_proj``, the gate and ``out_proj``, and their outputs are averaged.

    Whoever initialises the weights of a whole network by itself must call `reset_dynamics`
    afterwards: with, say, Xavier numbers in ``A_log`` every channel forgets at one rate.

    Args:
        d_model: D.
        d_state: N.
        d_conv: W.
        expand: E / D.
        dt_rank: R; ``"auto"`` is D / 16, rounded up.
        bidirectional: add a second direction, from each item's last frame to its first.
        dt_min: smallest initial step size.
        dt_max: largest initial step size.
        dt_init_floor: lower bound of the initial step sizes.
        conv_bias: whether the convolution has a bias.
        bias: whether ``in_proj`` and ``out_proj`` have one.
        backend: of the scan and the convolution; ``"auto"`` takes the fastest.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: a size that is not positive.

    Papers: arXiv:2312.00752; arXiv:2401.09417 (two directions); arXiv:2206.11893 (S4D-real).
    """

    # Set by its name, as everything is that a direction has of its own.
    D: nn.Parameter

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        bidirectional: bool = False,
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        for name in ("d_model", "d_state", "d_conv", "d_inner", "dt_rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; wanted a positive integer")
        self.bidirectional = bidirectional
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        self.backend = backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        for suffix in self._suffixes():
            setattr(
                self,
                f"conv1d{suffix}",
                nn.Conv1d(
                    self.d_inner,
                    self.d_inner,
                    d_conv,
                    groups=self.d_inner,
                    padding=d_conv - 1,
                    bias=conv_bias,
                    **factory,
                ),
            )
            setattr(
                self,
                f"x_proj{suffix}",
                nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **factory),
            )
            setattr(self, f"dt_proj{suffix}", nn.Linear(self.dt_rank, self.d_inner, **factory))
            A_log = nn.Parameter(torch.empty(self.d_inner, d_state, **factory))
            D = nn.Parameter(torch.empty(self.d_inner, **factory))
            for parameter in (A_log, D):
                # A name of mamba_ssm's, which optimisers ask for.
                parameter._no_weight_decay = True  # type: ignore[attr-defined]
            setattr(self, f"A{suffix}_log", A_log)
            setattr(self, f"D{suffix}", D)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)
        self.reset_dynamics()

    def _suffixes(self) -> tuple[str, ...]:
        return ("", "_b") if self.bidirectional else ("",)

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        for suffix in self._suffixes():
            getattr(self, f"x_proj{suffix}").reset_parameters()
        self.reset_dynamics()

    @torch.no_grad()
    def reset_dynamics(self) -> None:
        """Initialises what decides over memory: A, D, step sizes and convolution of each direction.

        A is S4D-real, -1 .. -N in every channel; step sizes are log-uniform in dt_min .. dt_max.
        """
        for suffix in self._suffixes():
            A_log = getattr(self, f"A{suffix}_log")
            rates = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=A_log.device)
            A_log.copy_(rates.log().expand_as(A_log))
            getattr(self, f"D{suffix}").fill_(1.0)
            getattr(self, f"conv1d{suffix}").reset_parameters()

            dt_proj = getattr(self, f"dt_proj{suffix}")
            bound = self.dt_rank**-0.5
            nn.init.uniform_(dt_proj.weight, -bound, bound)
            log_dt = torch.rand(self.d_inner, device=A_log.device)
            log_dt = math.log(self.dt_min) + log_dt * math.log(self.dt_max / self.dt_min)
            dt = log_dt.exp().clamp(min=self.dt_init_floor)
            # softplus(x) = dt
            dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def initial_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MambaState:
        """The state before the first frame; device and dtype default to those of the weights."""
        return MambaState.zeros(
            batch_size,
            self.d_inner,
            self.d_state,
            self.d_conv,
            device=self.D.device if device is None else device,
            dtype=self.D.dtype if dtype is None else dtype,
        )

    def forward(
        self,
        x_BTD: Tensor,
        lengths: Tensor | None = None,
        state: MambaState | None = None,
        *,
        chunk_size: int | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, MambaState]:
        """Mixes frames; what an item gives, it gives in any batch.

        Args:
            x_BTD: (B, T, D).
            lengths: valid frames of each item (B,), integers; later frames influence no valid one.
                They must be finite where gradients of the weights are wanted: ``in_proj``
                multiplies them by zeros.
            state: left by the frames before these; None starts with silence behind.
            chunk_size: cut the backward direction, its convolution included, into chunks of so
                many frames, counted from the first frame given, so that a frame sees no further
                than the end of its chunk. A causal mixer has no such direction and ignores it.
            return_state: return (y, state), the state after each item's last valid frame.

        Returns:
            y (B, T, D), or y and the forward direction's state.

        Raises:
            ValueError: a state for a bidirectional mixer without ``chunk_size``, whose backward
                direction would need the frames to come; or shapes that do not fit.
        """
        if x_BTD.dim() != 3 or x_BTD.shape[-1] != self.d_model:
            raise ValueError(
                f"x has shape {tuple(x_BTD.shape)}; wanted (batch, time, {self.d_model})"
            )
        if self.bidirectional and state is not None and chunk_size is None:
            raise ValueError(
                "a bidirectional mixer was given a state without chunk_size: its backward "
                "direction starts at the end of the utterance and cannot go on from a state. "
                "Pass chunk_size, or build the network with bidirectional=False"
            )
        if state is not None:
            self._check_state(state, x_BTD.shape[0])
        xz_BTF = self.in_proj(x_BTD)
        y_BTE, state = self._mix(xz_BTF, lengths, state, chunk_size, return_state)
        y_BTD = self.out_proj(y_BTE)
        if not return_state:
            return y_BTD
        assert state is not None
        return y_BTD, state

    def forward_in_chunks(
        self,
        x_RLD: Tensor,
        lengths_R: Tensor | None,
        state: MambaState | None,
        *,
        chunk_size: int | None,
        ahead: int = 0,
    ) -> tuple[Tensor, MambaState]:
        """``forward``, or the same of chunks whose last frames the next one mixes again.

        The backward direction then begins at the end of each row, and the forward one goes on where
        the next row begins.

        Args:
            x_RLD: of overlapping chunks one row each, the same number for every row of ``state``,
                one after the other; else as in ``forward``.
            lengths_R: valid frames of each row, integers; None means all.
            state: before the first chunk of each stream; None, where none overlap, starts with
                silence behind.
            chunk_size: as in ``forward``.
            ahead: frames at the end of a row that the next one begins with.

        Returns:
            y (R, L, D), and the state before what comes next of each stream.
        """
        if not ahead:
            mixed = self.forward(x_RLD, lengths_R, state, chunk_size=chunk_size, return_state=True)
            return cast(tuple[Tensor, MambaState], mixed)
        assert state is not None
        own = x_RLD.shape[1] - ahead
        xz_RLF = self.in_proj(x_RLD)
        before, after = states_of_chunks(
            xz_RLF[:, :own, : self.d_inner],
            self._modules_of(""),
            state.conv,
            state.ssm,
            d_conv=self.d_conv,
            lengths=None if lengths_R is None else lengths_R.clamp(max=own),
            backend=self.backend,
        )
        y_RLE, _ = self._mix(xz_RLF, lengths_R, MambaState(*before), x_RLD.shape[1], False)
        return self.out_proj(y_RLE), MambaState(*after)

    def _mix(
        self,
        xz_BTF: Tensor,
        lengths: Tensor | None,
        state: MambaState | None,
        chunk_size: int | None,
        return_state: bool,
    ) -> tuple[Tensor, MambaState | None]:
        """What lies between the projections, of all directions."""
        directions = [self._modules_of(suffix) for suffix in self._suffixes()]
        options: dict[str, Any] = {
            "lengths": lengths,
            "conv_state": None if state is None else state.conv,
            "ssm_state": None if state is None else state.ssm,
            "chunk_size": chunk_size if self.bidirectional else None,
            "backend": self.backend,
        }
        if all(direction.are_plain() for direction in directions):
            y_BTE, conv_state, ssm_state = mamba_inner_fn(
                xz_BTF, *map(_weights, directions), return_state=return_state, **options
            )
        else:
            y_BTE, conv_state, ssm_state = mamba_inner_of_modules(
                xz_BTF, *directions, d_conv=self.d_conv, **options
            )
        if conv_state is None or ssm_state is None:
            return y_BTE, None
        return y_BTE, MambaState(conv_state, ssm_state)

    @torch.no_grad()
    def forward_in_pieces(
        self, x_BTD: Tensor, piece_frames: int, before: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """``forward(before(x_BTD))`` in memory for a piece, without gradients.

        The forward direction carries its state from piece to piece; the backward one goes through
        the pieces from the last to the first, each turned round.

        Args:
            x_BTD: (B, T, D), all of it valid.
            piece_frames: frames of a piece.
            before: applied to every piece first, frame by frame.
        """
        y_BTD = torch.zeros_like(x_BTD)
        directions = [self._modules_of(suffix) for suffix in self._suffixes()]
        for turned, direction in zip((False, True), directions, strict=False):
            state: MambaState | None = None
            starts = range(0, x_BTD.shape[1], piece_frames)
            for start in reversed(starts) if turned else starts:
                piece = slice(start, start + piece_frames)
                xz_BTF = self.in_proj(before(x_BTD[:, piece]))
                inner_BTE, state = self._mix_one_way(
                    xz_BTF.flip(1) if turned else xz_BTF, direction, state
                )
                mixed_BTD = self.out_proj(inner_BTE.flip(1) if turned else inner_BTE)
                y_BTD[:, piece] += mixed_BTD / len(directions)
        return y_BTD

    def _mix_one_way(
        self, xz_BTF: Tensor, direction: DirectionModules, state: MambaState | None
    ) -> tuple[Tensor, MambaState]:
        conv_state, ssm_state = (None, None) if state is None else (state.conv, state.ssm)
        options: dict[str, Any] = {
            "conv_state": conv_state,
            "ssm_state": ssm_state,
            "backend": self.backend,
        }
        if direction.are_plain():
            y_BTE, conv_state, ssm_state = mamba_inner_fn(
                xz_BTF, _weights(direction), return_state=True, **options
            )
        else:
            y_BTE, conv_state, ssm_state = mamba_inner_of_modules(
                xz_BTF, direction, d_conv=self.d_conv, lengths=None, chunk_size=None, **options
            )
        assert conv_state is not None
        assert ssm_state is not None
        return y_BTE, MambaState(conv_state, ssm_state)

    def _modules_of(self, suffix: str) -> DirectionModules:
        return DirectionModules(
            conv1d=getattr(self, f"conv1d{suffix}"),
            x_proj=getattr(self, f"x_proj{suffix}"),
            dt_proj=getattr(self, f"dt_proj{suffix}"),
            A_log=getattr(self, f"A{suffix}_log"),
            D=getattr(self, f"D{suffix}"),
        )

    def directions(self) -> tuple[Direction, ...] | None:
        """The parameters of each direction; None where a part of it has to be called."""
        found = [self._modules_of(suffix) for suffix in self._suffixes()]
        return tuple(map(_weights, found)) if all(d.are_plain() for d in found) else None

    def _check_state(self, state: MambaState, batch_size: int) -> None:
        rows = batch_size, self.d_inner
        wanted = {"ssm": (*rows, self.d_state), "conv": (*rows, self.d_conv - 1)}
        for name, shape in wanted.items():
            given = tuple(getattr(state, name).shape)
            if given != shape:
                raise ValueError(
                    f"the {name} state has shape {given}; wanted {shape}: one row per row of x, "
                    "from a mixer of this size"
                )

    def step(self, x_BD: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """One frame of a causal mixer.

        Args:
            x_BD: the frame (B, D).
            state: left by the frame before; `initial_state` for the first one.

        Returns:
            y (B, D) and the state after this frame; ``state`` itself stays as it was.

        Raises:
            ValueError: the mixer is bidirectional, or the shapes do not fit.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional mixer cannot step: it needs the frames to come")
        if x_BD.dim() != 2 or x_BD.shape[-1] != self.d_model:
            raise ValueError(f"x has shape {tuple(x_BD.shape)}; wanted (batch, {self.d_model})")
        direction = self._modules_of("")
        if torch.is_grad_enabled() or not direction.are_plain():
            y, state = self.forward(x_BD[:, None], state=state, return_state=True)
            return y[:, 0], state
        self._check_state(state, x_BD.shape[0])
        y_BE, conv_state, ssm_state = mamba_inner_step(
            self.in_proj(x_BD), _weights(direction), state.conv, state.ssm, self.backend
        )
        return self.out_proj(y_BE), MambaState(conv_state, ssm_state)


def _weights(direction: DirectionModules) -> Direction:
    """What plain submodules compute with, for code that reads it."""
    parts: tuple[Any, ...] = direction
    conv1d, x_proj, dt_proj, A_log, D = parts
    return Direction(
        conv_weight=conv1d.weight.squeeze(1),
        conv_bias=conv1d.bias,
        x_proj=x_proj.weight,
        dt_proj=dt_proj.weight,
        dt_bias=dt_proj.bias,
        A_log=A_log,
        D=D,
    )
