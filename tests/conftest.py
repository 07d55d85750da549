import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""      # the tests are of the CPU, also where there is a GPU; tests/bench/gpu.py is of that
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LLMREC_CACHE"] = tempfile.mkdtemp(prefix="llmrec-test-cache-")
atexit.register(shutil.rmtree, os.environ["LLMREC_CACHE"], ignore_errors=True)
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture
def telling():
    """values -> an evaluate_rows that tells them one after the other, and at None is killed."""
    def of(values):
        left = iter(values)

        def evaluate_rows(*_):
            if (value := next(left)) is None:
                raise KeyboardInterrupt
            return {"overall": value}
        return evaluate_rows
    return of
