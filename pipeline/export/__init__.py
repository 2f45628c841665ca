"""Export a captioner: ONNX graphs with a runner that needs no PyTorch, or one small file.

May import ``reports`` and the rooms below it. Start with ``onnx``.
"""
