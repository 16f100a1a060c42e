"""From manifests to batches: recordings, augmentation, noise on decoder inputs."""
