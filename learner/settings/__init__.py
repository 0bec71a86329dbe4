"""What a recipe says of model, objective, optimizer and stages. A setting is defined once, here. No torch is imported,
because the command line reads them at once.
"""
