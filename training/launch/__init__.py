"""From a command line to processes on devices, and how they are stopped."""
