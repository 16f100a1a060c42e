"""Keys of the YAML files whose values are checked before anything is built, read or written."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import require_file, require_folder, require_place
from text.tokenizer import BOS_ID, EOS_ID, TOKEN_TYPES, UNK_ID, UNKNOWN_CHARACTERS


@dataclass(frozen=True)
class Setting:
    """What a key may hold.

    Attributes:
        kind: integer, number, switch, name, names (one or a list of them), speakers, layers, path,
            paths (one or a list of them) or mapping. Names and paths are taken as they are written:
            a folder may be called 2024-06-01 or 1e3.
        low, high: limits of a number, themselves allowed.
        above, below: limits of a number, themselves not allowed.
        choices: the only values there are.
        optional: whether null is a value.
        default: value of a key that only special recipes have in their files; None: every file
            that uses the key has it.
    """

    kind: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    optional: bool = False
    default: Any = None
    hint: str = ""

    def refuses(self, value: object) -> bool:
        """Whether a value is none of these."""
        if value is None:
            return not self.optional
        if not _KINDS[self.kind](value) or (self.choices and value not in self.choices):
            return True
        return self.kind in ("integer", "number") and (
            (self.low is not None and value < self.low)
            or (self.high is not None and value > self.high)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )

    def __str__(self) -> str:
        """What is wanted, in words."""
        if len(self.choices) == 1:
            return f"it must be {self.choices[0]}"
        if self.choices:
            return f"it must be one of {', '.join(map(str, self.choices))}"
        limits = [
            f"{words} {limit:g}"
            for words, limit in (
                ("at least", self.low),
                ("above", self.above),
                ("at most", self.high),
                ("below", self.below),
            )
            if limit is not None
        ]
        named = _IN_WORDS[self.kind] + (" or null" if self.optional else "")
        return f"it must be {named}" + (f", {' and '.join(limits)}" if limits else "")


def _is_number(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


_KINDS = {
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": _is_number,
    "switch": lambda value: isinstance(value, (bool, int)) and value in (True, False),
    "name": _is_name,
    "names": lambda value: (
        _is_name(value) or (isinstance(value, list) and all(map(_is_name, value)))
    ),
    "speakers": lambda value: (
        isinstance(value, list) and all(isinstance(v, int) or _is_name(v) for v in value)
    ),
    "path": _is_name,
    "layers": lambda value: (
        isinstance(value, list)
        and all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in value)
    ),
    "mapping": lambda value: isinstance(value, Mapping),
}
_KINDS["paths"] = _KINDS["names"]
_IN_WORDS = {
    "integer": "an integer",
    "number": "a number",
    "switch": "True or False",
    "name": "a name",
    "names": "a list of names",
    "speakers": "a list of speakers such as '[103, 1034]'",
    "path": "a path",
    "paths": "a path or a list of paths",
    "layers": "a list of layers, counted from 1, such as '[3, 6]'",
    "mapping": "a mapping such as '{d_state: 16}'",
}

_COUNT = Setting("integer", low=1)
_SHARE = Setting("number", low=0, high=1)
_POSITIVE = Setting("number", above=0)
_SWITCH = Setting("switch")
_PATH = Setting("path")
_OPTIONAL_PATH = Setting("path", optional=True)
_OPTIONAL_PATHS = Setting("paths", optional=True)
_PRECISION = Setting("name", choices=("fp32", "fp16", "bf16"))

ATTENTION_ENCODERS = ("branchformer", "conformer", "transformer")
"""Names of ``encoder_module`` that divide the model's width among heads."""

SETTINGS: dict[str, Setting] = {
    "seed": Setting("integer"),
    "data_folder": _PATH,
    "output_folder": _PATH,
    "save_folder": _PATH,
    "train_log": _PATH,
    "kenlm_model_path": _OPTIONAL_PATH,
    "token_ngram_path": _OPTIONAL_PATH,
    "pretrained_lm_tokenizer_path": _OPTIONAL_PATH,
    "tokenizer_path": _OPTIONAL_PATH,
    "train_text": Setting("paths"),
    "valid_text": _OPTIONAL_PATHS,
    "test_text": _OPTIONAL_PATHS,
    "train_splits": Setting("names"),
    "dev_splits": Setting("names"),
    "test_splits": Setting("names"),
    "skip_prep": _SWITCH,
    "skip_bad": _SWITCH,
    "sample_rate": _COUNT,
    "number_of_epochs": _COUNT,
    "avg_checkpoints": _COUNT,
    "early_stop_patience": Setting("integer", low=0),
    "gradient_checkpointing": _SWITCH,
    "log_interval_steps": _COUNT,
    "sorting": Setting("name", choices=("random", "ascending", "descending")),
    "num_workers": Setting("integer", low=0),
    "dynamic_batching": _SWITCH,
    "batch_size": _COUNT,
    "max_batch_length_train": _POSITIVE,
    "max_batch_length_val": _POSITIVE,
    "num_bucket": _COUNT,
    "max_batch_ex": Setting("integer", low=1, optional=True),
    "lr_adam": Setting("number", low=0),
    "weight_decay": Setting("number", low=0),
    "n_warmup_steps": Setting("integer", low=0),
    "n_hold_steps": Setting("integer", low=0),
    "total_steps": Setting("integer", low=1, optional=True),
    "ctc_weight": _SHARE,
    "label_smoothing": Setting("number", low=0, below=1),
    "n_fft": _COUNT,
    "win_length": _POSITIVE,
    "n_mels": _COUNT,
    "token_type": Setting("name", choices=TOKEN_TYPES),
    "character_coverage": Setting("number", above=0, high=1),
    "unknown_characters": Setting("name", choices=UNKNOWN_CHARACTERS),
    "output_neurons": _COUNT,
    "blank_index": Setting("integer", choices=(UNK_ID,)),
    "pad_index": Setting("integer", choices=(UNK_ID,)),
    "bos_index": Setting("integer", choices=(BOS_ID,)),
    "eos_index": Setting("integer", choices=(EOS_ID,)),
    "d_model": _COUNT,
    "nhead": _COUNT,
    "num_encoder_layers": _COUNT,
    "num_decoder_layers": _COUNT,
    "d_ffn": _COUNT,
    "transformer_dropout": Setting("number", low=0, below=1),
    "layerdrop_prob": Setting("number", low=0, below=1),
    "self_conditioning": _SWITCH,
    "signed_positions": _SWITCH,
    "mamba_config": Setting("mapping", optional=True),
    "valid_search_interval": _COUNT,
    "valid_beam_size": _COUNT,
    "test_beam_size": _COUNT,
    "ctc_weight_decode": Setting(
        "number", low=0, below=1, hint=" train_CTC.py decodes with CTC alone."
    ),
    "temperature": _POSITIVE,
    "temperature_lm": _POSITIVE,
    "min_decode_ratio": Setting("number", low=0),
    "max_decode_ratio": _POSITIVE,
    "scorer_beam_scale": Setting("number", low=1),
    "no_lm": _SWITCH,
    "lm_weight": Setting("number", low=0),
    "token_ngram_weight": Setting("number", low=0),
    "using_eos_threshold": _SWITCH,
    "eos_threshold": _POSITIVE,
    "length_normalization": _SWITCH,
    "alpha": Setting("number"),
    "beta": Setting("number"),
    "use_wandb": _SWITCH,
    "wandb_entity": Setting("name", optional=True),
    "wandb_project": Setting("name", optional=True),
    "use_tensorboard": _SWITCH,
    "chunkwise_prob": _SHARE,
    "chunk_size_min": _COUNT,
    "chunk_size_max": _COUNT,
    "valid_chunk_size": _COUNT,
    "left_context_chunks": Setting("integer", low=0),
    "kernel_size": _COUNT,
    "causal_convolution": _SWITCH,
    "stream_lookahead": _SHARE,
    "causal": _SWITCH,
    "remove_utterance_mean": _SWITCH,
    # Of language models.
    "text_parts": _COUNT,
    "max_sentence_tokens": _COUNT,
    "max_batch_tokens": _COUNT,
    "tokenizer_sentences": _COUNT,
    "num_layers": _COUNT,
    "dropout": Setting("number", low=0, below=1),
    # Run options that may stand in a file.
    "device": Setting("name"),
    "precision": _PRECISION,
    "eval_precision": _PRECISION,
    "grad_accumulation_factor": _COUNT,
    "max_grad_norm": Setting("number"),
    "ckpt_interval_minutes": Setting("integer", low=0),
    "ckpt_interval_steps": Setting("integer", low=0),
    "nonfinite_patience": Setting("integer", low=0),
    "optimizer_step_limit": Setting("integer", low=1, optional=True),
    # Keys of special recipes.
    "resample": Setting("switch", default=False),
    "cuda_graphs": Setting("integer", low=0, default=0),
    "held_out_speakers": Setting("speakers", default=[]),
    "consistency_weight": Setting("number", low=0, default=0.0),
    "inter_ctc_layers": Setting("layers", default=[]),
    "inter_ctc_weight": Setting("number", low=0, below=1, default=0.3),
    "ema_decay": Setting("number", low=0, below=1, default=0.0),
    "flat_start_epochs": Setting("integer", low=0, default=0),
    "augment_from_epoch": Setting("integer", low=0, default=1),
    "spliced_share": Setting("number", low=0, high=1, default=0.0),
    "splice_from_epoch": Setting("integer", low=1, default=10),
    "splice_min_log_prob": Setting("number", high=0, default=-2.0),
    "decoder_token_noise": Setting("number", low=0, below=1, default=0.0),
}

DEFAULTS = {
    key: setting.default for key, setting in SETTINGS.items() if setting.default is not None
}
"""Keys that a file may lack, and what holds then."""


UNREAD = {
    "train_LM.py": DEFAULTS.keys() - {"ema_decay"},
    "train_CTC.py": {"decoder_token_noise"},
}
"""Those of them that a script does nothing with."""

_TEXT = "Give text with one sentence per line, plain or .gz, or a manifest (.csv)."
INPUT_FILES = {
    "kenlm_model_path": "Give an n-gram of words as an ARPA file (python -m tools.make_ngram makes "
    "one), or null to search without.",
    "token_ngram_path": "Give an n-gram of tokens (python -m tools.make_ngram --tokenizer makes "
    "one), or null to search without.",
    "tokenizer_path": "Give the recogniser's save/tokenizer.model, or null to train a tokenizer on "
    "the text.",
    "train_text": _TEXT,
    "valid_text": _TEXT,
    "test_text": _TEXT,
}
"""Keys of files that have to be there, with what to give."""

_OF_TRAINING = ("tokenizer_path", "train_text")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")

NEEDED_OBJECTS = {
    *(
        "compute_features",
        "normalize",
        "CNN",
        "Transformer",
        "speech_encoder",
        "ctc_lin",
        "seq_lin",
    ),
    *("model", "modules", "opt_class", "noam_scheduler", "counter", "checkpointer", "train_logger"),
}
"""Parts of a file that no recipe runs without."""

PATHS = {key for key, setting in SETTINGS.items() if setting.kind in ("path", "paths")}
"""Keys of files and folders."""

VERBATIM = PATHS | {key for key, setting in SETTINGS.items() if setting.kind in ("name", "names")}
"""Keys whose values are texts, whatever else they look like."""


def check_setting(key: str, value: object, where: str) -> None:
    """Checks the value of a key; one that is not known may hold anything.

    Args:
        where: what comes before the key in the message: the file, or ``--``.

    Raises:
        UserError: a value of the wrong kind or out of its limits.
    """
    setting = SETTINGS.get(key)
    if setting is not None and setting.refuses(value):
        raise UserError(f"{where}{key} is {value!r}; {setting}.{setting.hint}")


def check_inputs(values: Mapping[str, Any], test_only: bool) -> None:
    """Checks that the files and folders that keys name are there and can be read.

    Args:
        values: of the keys.
        test_only: nothing is trained, and what only training reads may be gone.

    Raises:
        UserError: names the key and its path, and says what is wrong and what to give.
    """
    for key, advice in INPUT_FILES.items():
        if test_only and key in _OF_TRAINING:
            continue
        paths = values.get(key) or []
        for path in [paths] if isinstance(paths, str) else paths:
            require_file(key, path, advice)
    if folder := values.get("data_folder"):
        require_folder("data_folder", folder, "Give the folder that holds the splits.")
    source = values.get("pretrained_lm_tokenizer_path")
    is_read = source and not (test_only and values.get("no_lm"))
    if is_read and (Path(source).exists() or not _HUB_NAME.fullmatch(source)):
        advice = (
            "Give a folder with lm.ckpt and tokenizer.ckpt (train_LM.py makes one), a name on the "
            "Hugging Face hub (owner/name), or null."
        )
        require_folder("pretrained_lm_tokenizer_path", source, advice)


def check_places(values: Mapping[str, Any]) -> None:
    """Checks that what a training leaves has a place.

    Args:
        values: of the keys.

    Raises:
        UserError: see ``common.files.require_place``.
    """
    for key in ("output_folder", "save_folder"):
        if values.get(key):
            require_place(key, values[key])
    if values.get("train_log"):
        require_place("train_log", Path(values["train_log"]).parent)


def check_together(values: Mapping[str, Any], where: str) -> None:
    """Checks what depends on each other.

    Args:
        values: of the keys that hold plain values.
        where: what comes before a key in the message.

    Raises:
        UserError: two values that exclude each other.
    """

    def refuse(first: str, wrong: str, second: str, hint: str = "") -> None:
        raise UserError(
            f"{where}{first} is {values[first]} and {second} is {values[second]}; "
            f"{first} must {wrong} {second}.{hint}"
        )

    has = values.keys().__ge__
    if values.get("ckpt_interval_steps") and values.get("ckpt_interval_minutes"):
        raise UserError(
            f"{where}ckpt_interval_steps and ckpt_interval_minutes are both above 0: give one."
        )
    attends = values.get("encoder_module") in ATTENTION_ENCODERS or (
        values.get("decoder_module") == "transformer" and values.get("num_decoder_layers")
    )
    if attends and has({"d_model", "nhead"}) and values["d_model"] % values["nhead"]:
        refuse("d_model", "be a multiple of", "nhead", " Give --nhead or --d_model.")
    for low, high in (
        ("min_decode_ratio", "max_decode_ratio"),
        ("n_warmup_steps", "total_steps"),
        ("chunk_size_min", "chunk_size_max"),
    ):
        if (
            has({low, high})
            and None not in (values[low], values[high])
            and values[low] > values[high]
        ):
            refuse(low, "not be above", high)
    encoder, is_causal = values.get("encoder_module"), values.get("causal")
    if (
        encoder in ("conformer", "conmamba")
        and values.get("kernel_size", 1) % 2 == 0
        and not (is_causal or values.get("causal_convolution"))
    ):
        raise UserError(
            f"{where}kernel_size is {values['kernel_size']}; a convolution that sees as many "
            "frames ahead as behind needs an odd one. Give another --kernel_size, or "
            "--causal_convolution True."
        )
    if "chunkwise_prob" in values and encoder in ATTENTION_ENCODERS and not is_causal:
        for key, whole in (("encoder_module", "branchformer"), ("attention_type", "hypermixing")):
            if values.get(key) == whole:
                raise UserError(
                    f"{where}{key} is {whole}, which needs whole utterances, and this file trains "
                    f"in chunks. Give another --{key}."
                )
