"""What SpeechBrain's ``EncoderASR`` and ``EncoderDecoderASR`` load a bundle with.

Their ``from_hparams`` makes these objects from the bundle's ``hyperparams.yaml``, empty; the
pretrainer fills them.
"""

from pathlib import Path

import sentencepiece as spm
import torch
from speechbrain.utils.fetching import FetchConfig, FetchSource, LocalStrategy
from speechbrain.utils.parameter_transfer import Pretrainer
from torch import Tensor, nn

from common.errors import UserError
from inference.bundle import read_bundle
from inference.hub import pull
from inference.model import Model
from inference.search import SearchOptions, TextSearch
from modules.lengths import absolute_lengths, padding_mask


class BundleEncoder(nn.Module):
    """Waveforms to encoder output, zero beyond an item's own frames."""

    def fill(self, model: Model) -> None:
        """Takes the encoder of a model."""
        self.encoder = model.encoder
        self.min_samples = model.min_samples

    def forward(self, wavs: Tensor, wav_lens: Tensor) -> Tensor:
        """Encoder output (B, T, D); none of a recording that is too short to hold text.

        Args:
            wavs: waveforms (B, S) between -1 and 1.
            wav_lens: fraction of the longest.
        """
        num_samples_B = absolute_lengths(wav_lens, wavs.shape[1])
        encoder_out_BTD, num_frames_B = self.encoder(wavs, num_samples_B)
        num_frames_B = num_frames_B.where(num_samples_B >= self.min_samples, 0)
        padding_BT = padding_mask(num_frames_B, encoder_out_BTD.shape[1])
        return encoder_out_BTD.float().masked_fill(padding_BT.unsqueeze(-1), 0.0)


class BundleDecoder(nn.Module):
    """Encoder output to tokens, with the search of ``inference.Recognizer``."""

    def fill(self, model: Model) -> None:
        """Takes the search of a model, and the modules that it consists of."""
        self.parts = nn.ModuleDict(model.parts())
        self.search = TextSearch(model)

    def forward(
        self, encoder_out_BTD: Tensor, wav_lens: Tensor
    ) -> tuple[list[list[int]], None, None, None]:
        """Tokens of each item, in the place that they have in what SpeechBrain's searches return.

        Args:
            encoder_out_BTD: of a ``BundleEncoder``.
            wav_lens: unused: samples are no frames. A frame that is zero is padding.
        """
        num_frames_B = (encoder_out_BTD != 0).any(-1).sum(1)
        tokens: list[list[int]] = [[] for _ in encoder_out_BTD]
        spoken = num_frames_B.nonzero()[:, 0]
        if len(spoken):
            spoken_out_BTD = encoder_out_BTD[spoken]
            log_probs_BTV = self.parts["ctc_lin"](spoken_out_BTD).float().log_softmax(-1)
            found = self.search(
                spoken_out_BTD, log_probs_BTV, num_frames_B[spoken], SearchOptions()
            )
            for item, result in zip(spoken.tolist(), found, strict=True):
                tokens[item] = result.hypotheses[0]
        return tokens, None, None, None


def decode(encoder_out_BTD: Tensor, wav_lens: Tensor, decoder: BundleDecoder) -> list[list[int]]:
    """Tokens of each item, as ``EncoderASR`` wants them; arguments as in ``BundleDecoder``."""
    return decoder(encoder_out_BTD, wav_lens)[0]


class BundlePretrainer(Pretrainer):
    """SpeechBrain's pretrainer, which reads a bundle instead of one ``.ckpt`` for each part.

    Args:
        encoder, decoder, tokenizer: what is to be filled.
    """

    def __init__(
        self,
        encoder: BundleEncoder,
        decoder: BundleDecoder,
        tokenizer: spm.SentencePieceProcessor,
    ):
        super().__init__()
        self.encoder, self.decoder, self.tokenizer = encoder, decoder, tokenizer
        self.model: Model | None = None

    def collect_files(
        self,
        default_source: str | Path | FetchSource | None = None,
        local_strategy: LocalStrategy = LocalStrategy.SYMLINK,
        fetch_config: FetchConfig | None = None,
    ) -> dict[str, Path]:
        """Reads the bundle where it is: nothing is copied or linked into another folder.

        Args:
            default_source: folder of the bundle, or a repository of the Hugging Face hub.
            local_strategy: unused.
            fetch_config: its revision is that of the repository.

        Raises:
            UserError: there is no bundle, or a damaged one.
        """
        if isinstance(default_source, FetchSource):
            _, default_source = default_source
        if default_source is None:
            raise UserError("Give from_hparams the bundle's folder as source.")
        if Path(default_source).is_dir():
            self.model = read_bundle(default_source)
        else:
            self.model = pull(str(default_source), fetch_config and fetch_config.revision)
        return {}

    @torch.no_grad()
    def load_collected(self) -> None:
        """Fills encoder, decoder and tokenizer."""
        self.encoder.fill(self.model)
        self.decoder.fill(self.model)
        self.tokenizer.LoadFromSerializedProto(self.model.tokenizer.serialized_model_proto())
