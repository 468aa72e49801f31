"""Isolation of every test and every doctest, hence at the root: seeds, an own working directory, leak checks."""

import os

# Before torch is imported. Processes that a test spawns inherit these.
os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors, several workers; Lightning would set it behind our back
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # LightningCLI itself calls the old names
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"

import random
import threading
import time

import hypothesis
import numpy as np
import pytest
import torch

# Set by Lightning and by the libraries below it, on purpose and for good; restored after each test, but no mistake.
SET_BY_LIBRARIES = {
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_ORDER",
    "CUDA_MODULE_LOADING",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "RANK",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "WORLD_SIZE",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
}
# Threads that live as long as the process (torch.compile, tqdm, fsspec), by the start of their names.
THREADS_OF_LIBRARIES = ("Dummy-", "QueueFeederThread", "ThreadPoolExecutor-", "fsspecIO", "tqdm_monitor")
SECONDS_FOR_THREADS_TO_END = 5.0

pytest_plugins = ["tests.helpers.conformance"]
torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def no_leaks():
    """Fail a test that leaves threads, environment variables, a process group or another default dtype behind."""
    environ, threads, dtype = dict(os.environ), set(threading.enumerate()), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    leaks = []
    if variables := _restore_environ(environ):
        leaks.append(f"environment variables {variables}")
    if torch.get_default_dtype() != dtype:
        leaks.append(f"default dtype {torch.get_default_dtype()}")
        torch.set_default_dtype(dtype)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        leaks.append("the default process group")
        torch.distributed.destroy_process_group()
    torch.use_deterministic_algorithms(deterministic)  # Trainer(deterministic=True) switches it for good
    if names := _wait_for_threads(threads):
        leaks.append(f"threads {names}")
    if leaks:
        pytest.fail("The test leaks " + " and ".join(leaks) + ".", pytrace=False)


@pytest.fixture(autouse=True)
def own_directory(no_leaks, tmp_path):
    """Run in an empty directory, so that loggers and checkpoints never write into the checkout."""
    before = os.getcwd()
    os.chdir(tmp_path)
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def fixed_seeds(own_directory):
    """Start every test from the same random numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # third-party code draws from the global generator
    torch.manual_seed(0)


def _restore_environ(before: dict[str, str]) -> list[str]:
    """Put the environment back and name what differed and was not set by a library."""
    after = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}
    before = {key: value for key, value in before.items() if key != "PYTEST_CURRENT_TEST"}
    changed = [key for key in after.keys() | before.keys() if after.get(key) != before.get(key)]
    for key in changed:
        if key in before:
            os.environ[key] = before[key]
        else:
            del os.environ[key]
    return sorted(set(changed) - SET_BY_LIBRARIES)


def _wait_for_threads(before: set[threading.Thread]) -> list[str]:
    """Name the threads that the test started and that do not end by themselves within a few seconds."""
    deadline = time.monotonic() + SECONDS_FOR_THREADS_TO_END
    new = [t for t in threading.enumerate() if t not in before and not t.name.startswith(THREADS_OF_LIBRARIES)]
    for thread in new:
        thread.join(max(0.0, deadline - time.monotonic()))
    return sorted(thread.name for thread in new if thread.is_alive())
