"""The chunks in which a model hears: their size in frames, from milliseconds."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import UserError
from inference.model import Model
from modules.overlapping_chunks import ChunkConfig

CHUNK_MS = 640.0


@dataclass(frozen=True)
class Chunks:
    """Chunks of a model.

    Attributes:
        frames: encoder frames of one.
        step: from the beginning of one to that of the next.
        mask: at whose ends the network's sight ends; None for a causal one.
    """

    frames: int
    step: int
    mask: ChunkConfig | None

    def describe(self) -> str:
        """What log probabilities depend on, the same wherever they are."""
        left = None if self.mask is None else self.mask.left_context_size
        return f"{self.frames} frames, a step of {self.step}, {left} to the left"


def chunks_of(
    model: Model,
    chunk_ms: float = CHUNK_MS,
    left_context_chunks: int | None = None,
    lookahead: float | None = None,
) -> Chunks:
    """The chunks of so many milliseconds.

    Args:
        model: that is to hear in them.
        chunk_ms: a multiple of an encoder frame.
        left_context_chunks: chunks before its own that a frame sees, in an encoder that attends;
            None: as many as in training.
        lookahead: share of a chunk that the next one begins with; None: as the model's recipe.

    Raises:
        UserError: the model cannot, or not in such chunks; the message says what can be done.
    """
    frame_ms = 1000 * model.frame_s
    frames = round(chunk_ms / frame_ms) if 0 < chunk_ms < 1e6 else 0
    if frames < 1 or abs(frames * frame_ms - chunk_ms) > 1e-6 * chunk_ms:
        raise UserError(
            f"chunk_ms is {chunk_ms:g}; it must be a multiple of {frame_ms:g} ms, the distance of "
            "this model's frames."
        )
    if left_context_chunks is None:
        left_context_chunks = model.left_context_chunks
    if left_context_chunks < 0:
        raise UserError(f"left_context_chunks is {left_context_chunks}; it cannot be negative.")
    check_lookahead(model, lookahead)
    causal, share = model.encoder.Transformer.causal, lookahead
    if share is None:
        share = model.lookahead
    mask = None if causal else ChunkConfig(frames, left_context_chunks, share)
    try:
        model.encoder.check_streaming(mask)
    except ValueError as error:
        raise UserError(
            f"This model cannot hear in chunks. {error} The recipes hparams/CTC/*_streaming.yaml "
            "train models that can."
        ) from None
    step = frames if mask is None else model.encoder.step_frames(mask)
    if lookahead and step == frames:
        raise UserError(
            f"lookahead is {lookahead:g}: of {chunk_ms:g} ms that is less than a frame of "
            f"{frame_ms:g} ms."
        )
    return Chunks(frames, step, mask)


def check_lookahead(model: Model, lookahead: float | None) -> None:
    """Checks that such a share of chunks can overlap; None leaves it to the model's recipe.

    Raises:
        UserError: it is no share below 1, or the model does not look ahead.
    """
    if lookahead is None:
        return
    network = model.encoder.Transformer
    if network.causal or not network.encoder.takes_lookahead:
        raise UserError("lookahead is of ConMamba and Mamba models that hear in chunks.")
    try:
        ChunkConfig(1, lookahead=lookahead)
    except ValueError as error:
        raise UserError(str(error)) from None
