"""Models from the Hugging Face hub."""

from wsgi_ts.handlers.hf_utils import download_model

__all__ = ["download_model"]
