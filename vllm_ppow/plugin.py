"""Entry point `ppow` of group `vllm.general_plugins`.

vLLM calls `register` once in every process: API server, engine core and each worker. It only attaches hooks; models and
loaders are imported when a drafter of ours is about to be loaded. Left out: what the hooks do (compat/).
"""

from __future__ import annotations


def register() -> None:
    """Attach method ppow to this process's vLLM. Calling it again changes nothing.

    A vLLM without the hooks is reported in the log and not broken for other uses: it then refuses method ppow itself.
    """
    from vllm_ppow.compat import engine_args, seams, worker

    for install in (engine_args.install, worker.install):
        try:
            install()
        except seams.SeamMissingError as error:
            seams.logger.error("%s", error)
