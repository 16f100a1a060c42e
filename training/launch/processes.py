"""The processes of a run: how many they are, and what one does for all of them."""

import sys
from collections.abc import Callable
from typing import TypeVar

import torch.distributed
from speechbrain.utils.distributed import (
    ddp_broadcast,
    if_main_process,
    is_distributed_initialized,
    main_process_only,
)

from common.errors import EXIT_USER_ERROR, UserError

Result = TypeVar("Result")


def num_ranks() -> int:
    """Processes of the run."""
    return torch.distributed.get_world_size() if is_distributed_initialized() else 1


def on_main(function: Callable[..., Result], *arguments: object) -> Result:
    """Call a function on the main process; every process gets its result, which can be pickled.

    Files are asked for here alone: on shared storage other hosts see them later.

    Raises:
        UserError: from the function; the other processes end with its exit status.
    """

    def outcome() -> tuple[Result | None, UserError | None]:
        try:
            return function(*arguments), None
        except UserError as error:
            return None, error

    result, error = ddp_broadcast(main_process_only(outcome)())
    if error is not None:
        if if_main_process():
            raise error
        sys.exit(EXIT_USER_ERROR)
    return result
