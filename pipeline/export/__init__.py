"""A captioner elsewhere: ONNX graphs with a runner that needs no PyTorch, and one small file.

May import ``reports`` and the rooms below it. Start with ``onnx``.
"""
