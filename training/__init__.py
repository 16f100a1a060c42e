"""What the two training scripts share: Brain base, data pipeline, checkpoints, reports, plots."""

import logging

# SpeechBrain's logger module warns on import about torchvision, which recognition does not use.
logging.getLogger("speechbrain.utils.train_logger").addFilter(
    lambda record: "torchvision" not in record.getMessage()
)
# It calls every option overridden by the command line that is given to a Brain, and tells how it
# samples before each epoch. matplotlib tells of every font, in the log of the run.
logging.getLogger("speechbrain.core").addFilter(lambda record: "hparams" not in record.getMessage())
for _name in (
    "speechbrain.dataio.sampler",
    "speechbrain.utils.quirks",
    "matplotlib.font_manager",
    "matplotlib.figure",
):
    # Not by its level, which the configuration of a run's log sets anew.
    logging.getLogger(_name).addFilter(lambda record: record.levelno >= logging.WARNING)
