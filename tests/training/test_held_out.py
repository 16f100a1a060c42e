"""A run whose checkpoints are chosen on speakers of its own training split."""

import pytest

from common.errors import UserError
from training.launch.settings import check_setting


@pytest.mark.parametrize("value", [[], [90015, 7], ["0019"]])
def test_speakers_are_a_list_of_numbers_or_names(value):
    check_setting("held_out_speakers", value, "--")


@pytest.mark.parametrize("value", [90015, "90015", [1.5], None])
def test_anything_else_is_refused(value):
    with pytest.raises(UserError, match=r"held_out_speakers is .*a list of speakers"):
        check_setting("held_out_speakers", value, "--")
