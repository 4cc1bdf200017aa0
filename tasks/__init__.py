"""What a trained model is asked to do, and how that is scored. Above model.py, below the scripts."""
