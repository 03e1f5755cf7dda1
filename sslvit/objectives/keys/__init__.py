"""The keys of the methods, with their papers' values and presets: what the command line needs before it imports torch.

Imports the pure helpers only. A method that has no file here has its keys in its own module.
"""
