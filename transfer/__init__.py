"""What train.py and predict.py stand on: one file a subject, imports running downwards only."""
