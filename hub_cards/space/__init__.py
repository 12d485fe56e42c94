"""The page on which people try a model: a Gradio app, for a Hugging Face Space or for this machine."""

from .space_folder import build_space

__all__ = ["build_space"]
