"""Everything that train.py and predict.py stand on, one subject a file."""
