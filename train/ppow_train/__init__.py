"""Training half of vllm-ppow. Importing this package imports neither torch nor vLLM."""
