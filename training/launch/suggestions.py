"""What somebody may have meant who wrote a key that a YAML file does not have."""

import difflib
from collections.abc import Mapping

from ruamel.yaml.comments import TaggedScalar

from training.launch.run_options import IN_USE
from training.launch.settings import DEFAULTS, SETTINGS
from training.launch.yaml_file import tag_of

OTHER_NAMES = {
    "learning_rate": "lr_adam",
    "lr": "lr_adam",
    "max_lr": "lr_adam",
    "warmup": "n_warmup_steps",
    "warmup_steps": "n_warmup_steps",
    "epochs": "number_of_epochs",
    "max_epochs": "number_of_epochs",
    "num_epochs": "number_of_epochs",
    "n_epochs": "number_of_epochs",
    "bs": "batch_size",
    "train_batch_size": "batch_size",
    "accumulate_grad_batches": "grad_accumulation_factor",
    "gradient_accumulation": "grad_accumulation_factor",
    "gradient_accumulation_steps": "grad_accumulation_factor",
    "grad_clip": "max_grad_norm",
    "gradient_clip_val": "max_grad_norm",
    "patience": "early_stop_patience",
    "data_dir": "data_folder",
    "data_path": "data_folder",
    "dataset": "data_folder",
    "exp_dir": "output_folder",
    "output_dir": "output_folder",
    "save_dir": "output_folder",
    "workers": "num_workers",
    "vocab_size": "output_neurons",
    "beam_size": "test_beam_size",
    "beam": "test_beam_size",
    "kenlm_model_path": "token_ngram_path",
    "token_ngram_path": "kenlm_model_path",
    "lm_path": "pretrained_lm_tokenizer_path",
    "ngram": "kenlm_model_path",
    "ngram_path": "kenlm_model_path",
    "amp": "precision",
    "layers": "num_encoder_layers",
    "encoder": "encoder_module",
    "decoder": "decoder_module",
}
"""Names of the field for keys of ours."""


def describe_unknown(key: str, written: Mapping) -> str:
    """A sentence that follows "... has no key ...": what it is called here, or what there is.

    Args:
        written: the document of the file.
    """
    name = key.replace("-", "_")
    known = [*written, *DEFAULTS]
    if name in known:
        return f" It is written --{name}."
    if (ours := OTHER_NAMES.get(name.lower())) in known:
        return f" It is called {ours}: --{ours} VALUE."
    for section, values in written.items():
        if isinstance(values, Mapping) and name in values:
            if refers_to := reference(values[name]):
                return f" It is called {refers_to}: --{refers_to} VALUE."
            return f" It is part of {section}: --{section} '{{{name}: VALUE}}'."
    if close := difflib.get_close_matches(name, [*known, *IN_USE], n=3, cutoff=0.7):
        return f" Did you mean {' or '.join(close)}?"
    return " --help behind the name of the file lists its keys."


def misspelt(key: str, written: Mapping) -> str:
    """What a key of a file was probably meant to be, if that is a key and the file lacks it.

    A file may have keys of its own, which its objects refer to; their names are not that close.
    """
    if key in SETTINGS or not isinstance(written[key], str | int | float):
        return ""
    missing = SETTINGS.keys() - written.keys()
    return next(iter(difflib.get_close_matches(key, missing, n=1, cutoff=0.9)), "")


def reference(node: object) -> str:
    """The key that a node refers to, if it is nothing but that."""
    if isinstance(node, TaggedScalar) and tag_of(node) == "!ref":
        name = str(node.value).strip()
        if name.startswith("<") and name.endswith(">") and name[1:-1].isidentifier():
            return name[1:-1]
    return ""
