"""What a checkpoint holds and where it lies. Weights are in Hugging Face's format, beside the state that an exact
resume needs. They are written beside training, to a local folder or to an fsspec URL.
"""
