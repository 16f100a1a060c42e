"""The ``hyperparams.yaml`` of a bundle, with which SpeechBrain's own classes load it."""

from collections.abc import Mapping
from typing import Any

_HEAD = """\
# For SpeechBrain, from the root of Mamba-ASR's repository:
#
#   from speechbrain.inference.ASR import {interface}
#   asr = {interface}.from_hparams(source="path/of/this/folder")
#   print(asr.transcribe_file("speech.wav"))
#
# The model is in config.json; Mamba-ASR itself never reads this file.

sample_rate: {sample_rate}

encoder: !new:inference.speechbrain_interface.BundleEncoder
decoder: !new:inference.speechbrain_interface.BundleDecoder
tokenizer: !new:sentencepiece.SentencePieceProcessor

modules:
  encoder: !ref <encoder>
  decoder: !ref <decoder>

audio_normalizer: !new:speechbrain.dataio.preprocess.AudioNormalizer
  sample_rate: !ref <sample_rate>

pretrainer: !new:inference.speechbrain_interface.BundlePretrainer
  encoder: !ref <encoder>
  decoder: !ref <decoder>
  tokenizer: !ref <tokenizer>
"""

_CTC = """
decoding_function: !name:inference.speechbrain_interface.decode
  decoder: !ref <decoder>
"""


def speechbrain_yaml(config: Mapping[str, Any]) -> str:
    """The file's text.

    Args:
        config: of the bundle.
    """
    is_ctc = config["kind"] == "ctc"
    head = _HEAD.format(
        interface="EncoderASR" if is_ctc else "EncoderDecoderASR",
        sample_rate=config["features"]["compute_features"].get("sample_rate", 16000),
    )
    return head + (_CTC if is_ctc else "")
