"""Processes that make data in parallel."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor


def pool(num_workers: int) -> ProcessPoolExecutor:
    """Worker processes, forked from a server that has imported the tasks.

    Importing takes a second and 200 MB; so this happens once, not in every worker. The server
    ends with this process. Workers import the main module, so a script that uses them needs the
    usual `if __name__ == "__main__"`.
    """
    context = multiprocessing.get_context("forkserver")
    # By name: the tasks import this module.
    context.set_forkserver_preload(["spectral_pod.data.tasks"])
    return ProcessPoolExecutor(num_workers, mp_context=context)
