"""The subcommands of `ppow`, one per file. Left out: what they call."""
