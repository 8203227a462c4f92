"""Serving half of vllm-ppow: the vLLM plugin. Importing this package never imports vLLM."""

__version__ = "0.1.0"
