"""`sequencematch export`: a trained model as a folder that stands alone. The weights of a checkpoint are copied bit for
bit, without what only training needs. The model card tells what they are.
"""
