"""Degradations: how a low-quality picture is made from a good one.

``parameters`` draws them, ``reference`` applies them to one picture with OpenCV, ``batched`` to tensors.
"""
