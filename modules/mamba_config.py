"""What a network's ``mamba_config`` means for one of its mixers."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from modules.mamba import Mamba


def mixer_options(mamba_config: Mapping[str, Any] | None, causal: bool) -> dict[str, Any]:
    """Keyword arguments of ``Mamba`` for a layer of a network; the config is left as it is.

    Args:
        mamba_config: options of ``Mamba`` but for d_model, such as d_state, expand, d_conv and
            bidirectional. ``bidirectional`` is by default the opposite of ``causal``.
        causal: the layer may not see later frames.

    Raises:
        ValueError: an option is unknown, or a causal layer is asked to be bidirectional.
    """
    options = {"bidirectional": not causal, **(mamba_config or {})}
    known = [name for name in inspect.signature(Mamba).parameters if name != "d_model"]
    unknown = [name for name in options if name not in known]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), known, n=1)
        raise ValueError(
            f"mamba_config holds {', '.join(map(str, unknown))}; known are {', '.join(known)}."
            + (f" Did you mean {close[0]}?" if close else "")
        )
    if causal and options["bidirectional"]:
        raise ValueError(
            "mamba_config says bidirectional: True in a causal network, whose frames may not see "
            "later ones. Set causal: False, or bidirectional: False."
        )
    return options
