"""What the two training scripts share: Brain base, data pipeline, checkpoints, reports, plots."""

import logging

# SpeechBrain's logger module warns on import about torchvision, which recognition does not use.
logging.getLogger("speechbrain.utils.train_logger").addFilter(
    lambda record: "torchvision" not in record.getMessage()
)
