"""The audit: what is wrong with the photos themselves; train.py runs it where --audit asks for it."""
