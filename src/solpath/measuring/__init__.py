"""What a model costs and how near it stays to the dense one.

Figures of models as they are; nothing here changes one.
"""
