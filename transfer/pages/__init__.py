"""HTML pages, one file each: the report of predict.py and the audit of train.py."""
