"""The process around the training: its signals, flags, messages and files."""
