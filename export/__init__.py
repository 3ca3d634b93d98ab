"""Offline: a Hugging Face checkpoint becomes a verified model repository entry.

This is the only package that imports torch, transformers and onnx, and it imports them inside functions or inside
modules that ``export.cli`` loads lazily, so that ``truthgpt --help`` stays cheap and works without the export extra.
"""
