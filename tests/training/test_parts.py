"""Objects of a YAML file take what they get, or one message says what they would take."""

import re

import pytest

from common.errors import UserError
from tests.ctc_runs import REPOSITORY
from training.launch.command_line import load_hparams
from training.launch.parts import check_parts
from training.launch.yaml_file import read_yaml

FILES = sorted(path.relative_to(REPOSITORY) for path in REPOSITORY.glob("hparams/*/*.yaml"))


def refusal(tmp_path, text):
    """What is said of a file with this text."""
    path = tmp_path / "file.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_hparams(str(path), {})
    return str(error.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "opt_class: !name:torch.optim.AdamW {weight_decai: 0.1}",
            "opt_class: torch.optim.AdamW takes no weight_decai. Did you mean weight_decay?",
        ),
        (
            "counter: !new:speechbrain.utils.epoch_loop.EpochCounter {limits: 3}",
            "counter: speechbrain.utils.epoch_loop.EpochCounter takes no limits. Did you mean lim",
        ),
        (
            "parts: [!new:torch.nn.Linear {in_feature: 3, out_features: 2}]",
            "parts.1: torch.nn.Linear takes no in_feature. Did you mean in_features?",
        ),
        (
            "net: {inner: !name:torch.nn.GELU {x: !name:torch.nn.ReLU {inplaze: True}}}",
            "net.inner: torch.nn.GELU takes no x. It takes approximate.",
        ),
        ("net: !new:torch.nn.Linear {in_features: 3}", "net: torch.nn.Linear needs out_features."),
        ("net: !new:torch.nn.Liner {}", "net: there is no torch.nn.Liner. Did you mean torch.nn.L"),
        ("net: !new:no.such.Thing {}", "net: there is no no.such.Thing."),
        (
            "test_searcher: !name:decoding.ctc_beam_search.CTCBeamSearch\n"
            "test_beam_search: {alfa: 2.0}",
            "test_beam_search: decoding.ctc_beam_search.CTCBeamSearch takes no alfa. Did you mean "
            "alpha?",
        ),
    ],
)
def test_a_wrong_argument_is_named_with_its_place_and_what_may_be_meant(tmp_path, text, message):
    assert re.match(re.escape(message), refusal(tmp_path, text))


def test_what_a_class_takes_it_gets(tmp_path):
    (tmp_path / "file.yaml").write_text(
        "a: !name:torch.optim.AdamW {lr: 1.0}\nb: !new:torch.nn.Linear [3, 2]\n"
        "c: !name:torch.nn.Linear {out_features: 2}\nd: !new:torch.nn.Sequential\n"
        "e: !new:builtins.dict {any: 3}\n",
        encoding="utf-8",
    )
    assert load_hparams(str(tmp_path / "file.yaml"), {})["c"](3).out_features == 2


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_gives_its_objects_what_they_take(path):
    check_parts(read_yaml(REPOSITORY / path), str(path))
