"""Classes of cut models that run without solpath; `hub.py` writes them into one file of a folder.

They are subclasses of the classes of transformers, and import nothing else. What a file imports
from another one of this room is written out in its place.
"""
