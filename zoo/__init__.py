"""Published parts beside the paper's, a file each. Above model.py, below weights.py."""
