"""The error that a user can act on. Left out: that of the adapter directory (vllm_ppow.artifact)."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user asked for cannot be done; the message is one sentence that ends with the remedy.

    `ppow` prints it without a traceback. Raise it for bad input only: a bug must keep its traceback.
    """
