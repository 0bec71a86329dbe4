"""`sequencematch export`: a trained model as a folder that stands alone, with its card."""
