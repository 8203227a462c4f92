"""Everything that touches vLLM internals which differ between versions lives here, and nowhere else."""
